"""Vim's names, shapes, initialisation and interface."""

import warnings

import pytest
import torch

from fambav.models import Vim
from fambav.models.backbone import drop_path_rates
from fambav.timm_compat import timm

PUBLISHED = "vim_{}_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"


def small(**arguments):
    torch.manual_seed(0)
    return Vim(**{**dict(dim=32, depth=3, img_size=32, patch_size=8, num_classes=5), **arguments})


def published(dim, rank, rows, classes=1000, depth=24):
    """Names and shapes of the released weights, in their order."""
    inner, mixed = 2 * dim, rank + 32
    direction = {
        "conv1d{}.weight": (inner, 1, 4),
        "conv1d{}.bias": (inner,),
        "x_proj{}.weight": (mixed, inner),
        "dt_proj{}.weight": (inner, rank),
        "dt_proj{}.bias": (inner,),
    }
    mixer = {
        "A_log": (inner, 16),
        "D": (inner,),
        "A_b_log": (inner, 16),
        "D_b": (inner,),
        "in_proj.weight": (2 * inner, dim),
        **{key.format(""): shape for key, shape in direction.items()},
        **{key.format("_b"): shape for key, shape in direction.items()},
        "out_proj.weight": (dim, inner),
    }
    block = {f"mixer.{key}": shape for key, shape in mixer.items()} | {"norm.weight": (dim,)}
    return {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, rows, dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16),
        "patch_embed.proj.bias": (dim,),
        "head.weight": (classes, dim),
        "head.bias": (classes,),
        **{f"layers.{i}.{key}": shape for i in range(depth) for key, shape in block.items()},
        "norm_f.weight": (dim,),
    }


@pytest.mark.parametrize(
    ("name", "dim", "rank", "rows", "parameters"),
    [
        ("vim_tiny", 192, 12, 197, 7_148_008),
        ("vim_small", 384, 24, 197, 25_796_584),
        ("vim_base", 768, 48, 197, 97_598_440),
        (PUBLISHED.format("tiny_patch16_224"), 192, 12, 197, 7_148_008),
        (PUBLISHED.format("tiny_patch16_stride8_224"), 192, 12, 730, 7_250_344),
        (PUBLISHED.format("small_patch16_stride8_224"), 384, 24, 730, 26_001_256),
    ],
)
def test_weights_have_the_published_names_order_and_shapes(name, dim, rank, rows, parameters):
    with torch.device("meta"):
        model = timm.create_model(name)
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    expected = published(dim, rank, rows)
    assert list(state.items()) == list(expected.items())
    assert len(state) == 415
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert not list(model.buffers())


def test_a_hundred_classes_take_as_many_parameters_as_published():
    with torch.device("meta"):
        model = timm.create_model("vim_tiny", num_classes=100)
    assert sum(p.numel() for p in model.parameters()) == 6_974_308


def test_micro_is_a_small_model_of_65_tokens():
    model = timm.create_model("vim_micro")
    assert (model.dim, model.depth, model.img_size, model.grid, model.length) == (
        *(64, 6, (32, 32), (8, 8)),
        65,
    )


@pytest.mark.parametrize(
    ("class_token", "names", "length"),
    [
        ("middle", ["cls_token", "pos_embed"], 17),
        ("head", ["cls_token", "pos_embed"], 17),
        ("double", ["cls_token_head", "cls_token_tail", "pos_embed"], 18),
        ("none", ["pos_embed"], 16),
    ],
)
def test_class_tokens_have_their_published_names(class_token, names, length):
    model = small(class_token=class_token)
    assert list(model.state_dict())[: len(names) + 1] == [*names, "patch_embed.proj.weight"]
    assert model.length == model.pos_embed.shape[1] == length


@pytest.mark.parametrize(
    ("kind", "absent"),
    [
        ("v2", ()),
        ("v1", ("D_b", "conv1d_b", "x_proj_b", "dt_proj_b")),
        ("none", ("A_b_log", "D_b", "conv1d_b", "x_proj_b", "dt_proj_b")),
    ],
)
def test_mixers_have_the_published_parameters(kind, absent):
    keys = {key.split(".")[3] for key in small(bimamba_type=kind).state_dict() if "mixer" in key}
    full = {key.split(".")[3] for key in small().state_dict() if "mixer" in key}
    assert full - keys == set(absent)
    assert keys <= full


def test_weights_start_with_the_published_spread():
    model = timm.create_model("vim_tiny")
    for name in ("cls_token", "pos_embed", "head.weight"):
        assert model.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.15), name
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(0.0410, rel=0.01)
    out = model.get_parameter("layers.0.mixer.out_proj.weight")
    assert out.abs().max().item() == pytest.approx(0.0104, rel=0.01)
    assert not model.head.bias.any()
    assert not model.patch_embed.proj.bias.any()
    assert all((block.norm.weight == 1).all() for block in model.layers)


def test_legacy_initialisation_reaches_every_block():
    biases = [block.mixer.dt_proj_b.bias for block in small(legacy_init=True).layers]
    assert not any(bias.any() for bias in biases)
    assert all(block.mixer.dt_proj_b.bias.all() for block in small().layers)


@pytest.mark.parametrize(
    ("shape", "arguments", "grid"),
    [
        ((32, 48), dict(img_size=(32, 48)), (4, 6)),
        ((32, 32), dict(patch_size=4), (8, 8)),
        ((32, 32), dict(stride=4), (7, 7)),
        ((20, 12), dict(img_size=[20, 12], patch_size=4, stride=2), (9, 5)),
    ],
)
def test_any_size_that_patches_divide_fits(shape, arguments, grid):
    model = small(**arguments)
    assert model.grid == grid
    assert model(torch.randn(1, 3, *shape)).shape == (1, 5)


def test_a_size_that_patches_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"img_size is 33.*\(33 - 8\) / 8"):
        small(img_size=33)
    with pytest.raises(ValueError, match="stride is 0"):
        small(stride=0)


def test_an_image_of_another_size_is_refused():
    for shape in ((1, 3, 64, 64), (1, 1, 32, 32)):
        with pytest.raises(ValueError, match=r"images are \(.*\), expected \(batch, 3, 32, 32\)"):
            small()(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"images are \(.*\), expected \(batch, channels, "):
        small()(torch.zeros(3, 32, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(pretrained=True), "pretrained is set, expected none"),
        (dict(class_token="first"), "class_token is 'first'"),
        (
            dict(global_pool="map"),
            "global_pool is 'map', expected one of 'token', 'avg', 'max', 'a",
        ),
        (
            dict(global_pool="token", class_token="none"),
            "global_pool is 'token', expected one of 'a",
        ),
        (dict(bimamba_type="v3"), "bimamba_type is 'v3'"),
        (dict(num_classes=-1), "num_classes is -1"),
        (dict(drop_path_rate=1.0), "drop_path_rate is 1.0"),
        (dict(depth=0), "depth is 0"),
        (dict(fusion_strategy="uper"), "fusion_strategy is 'uper'"),
        (dict(fusion_strategy="upper", fusion_layer=7, fusion_token=1), "fusion_layer is 7"),
        (dict(fusion_strategy="all", fusion_token=0), "fusion_token is 0"),
        (dict(fusion_strategy="all", fusion_token=30), "fusion_token is 30"),
        (dict(fusion_token=3), "fusion_token is 3"),
        (dict(fusion_method="tom"), "fusion_method is 'tom'"),
    ],
)
def test_a_wrong_argument_is_refused_in_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("vim_micro", **arguments)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("num_clases", "'num_clases' is no argument of vim_micro; did you mean 'num_classes'"),
        ("fusion_tokens", "did you mean 'fusion_token'"),
        ("if_bidirectional", "'if_bidirectional' is no argument of vim_micro"),
    ],
)
def test_an_unknown_argument_is_refused_in_a_sentence(name, message):
    with pytest.raises(TypeError, match=message):
        timm.create_model("vim_micro", **{name: 3})


def test_an_impossible_plan_is_refused_before_weights_are_made():
    with pytest.raises(ValueError, match="fusion_token is 200"):
        timm.create_model("vim_base", dim=2**24, fusion_strategy="all", fusion_token=200)


def test_importing_and_building_say_nothing(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timm.create_model("vim_micro", fusion_strategy="all", fusion_token=2)
    assert capfd.readouterr() == ("", "")


def test_drop_path_rises_from_zero_and_belongs_to_what_each_block_receives():
    assert drop_path_rates(0.3, 4) == pytest.approx([0, 0, 0.1, 0.2])
    assert drop_path_rates(0.3, 1) == [0]
    model = small(drop_path_rate=0.2)
    assert [block.drop_path.rate for block in model.layers] == pytest.approx([0, 0, 0.1])
    assert model.drop_path.rate == 0.2


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("class_token", ["middle", "head", "double", "none"])
def test_intermediates_are_the_residual_stream_on_the_grid(class_token):
    model = small(class_token=class_token).eval()
    rows, maps = model.forward_intermediates(IMAGES)
    assert [tuple(x.shape) for x in maps] == [(2, 32, 4, 4)] * 3
    torch.testing.assert_close(rows, model.forward_features(IMAGES))
    feature = model.forward_head(rows, pre_logits=True)
    pairs = model.forward_intermediates(
        IMAGES,
        [-1],
        norm=True,
        return_prefix_tokens=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    (patches, prefix) = pairs[0]
    assert (patches.shape[1], prefix.shape[1]) == (16, len(model.cls_index))
    read = prefix if class_token != "none" else patches
    torch.testing.assert_close(read.mean(dim=1), feature)
    normed = model.forward_intermediates(IMAGES, [2], norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(normed.flatten(2).mT, patches)


def test_intermediates_are_chosen_as_in_timm():
    model = small().eval()
    every = model.forward_intermediates(IMAGES, intermediates_only=True)
    for indices, layers in ((2, [1, 2]), ([0, -1], [0, 2]), ([1], [1]), (None, [0, 1, 2])):
        chosen = model.forward_intermediates(IMAGES, indices, intermediates_only=True)
        assert len(chosen) == len(layers)
        assert all(torch.equal(x, every[i]) for x, i in zip(chosen, layers, strict=True))


def test_stopping_early_runs_no_layer_behind_the_last_one_wanted():
    model, ran = small().eval(), []
    for layer, block in enumerate(model.layers):
        block.register_forward_pre_hook(lambda *_, layer=layer: ran.append(layer))
    model.forward_intermediates(IMAGES, [1], stop_early=True, intermediates_only=True)
    assert ran == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(indices=[3]), r"indices are \[3\], expected some of -3 to 2"),
        (dict(indices=4), "indices are"),
        (dict(indices=0), "indices are"),
        (dict(indices=[]), "indices are"),
        (dict(output_fmt="NHWC"), "output_fmt is 'NHWC'"),
    ],
)
def test_wrong_intermediates_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        small().forward_intermediates(IMAGES, **arguments)
