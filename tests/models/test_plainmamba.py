"""PlainMamba's numbers, names, interface, and what it does with fewer tokens."""

from pathlib import Path

import pytest
import torch

from fambav.engine.checkpoint import CheckpointError
from fambav.layers.block import Hooks
from fambav.models import PlainMamba, adapt
from fambav.reduction import reduce
from fambav.timm_compat import timm
from fambav.training.run_state import RunState
from tests import golden
from tests.golden import fill, images

ARRAYS, CASES = golden.load("plainmamba")
KEYS = Path(golden.__file__).parent / "keys"
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def small(**arguments):
    torch.manual_seed(0)
    known = dict(dim=32, depth=3, img_size=32, patch_size=8, stem_convs=1, num_classes=5)
    return PlainMamba(**{**known, **arguments})


def near(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_models_agree_with_the_official_code(name):
    case = CASES[name]
    model = fill(PlainMamba(**case["arguments"]))
    batch = images(case["image_keys"], *case["image_size"])
    near(model.patch_embed(batch).flatten(2).mT[..., :16], ARRAYS[f"{name}/patch_embed"], 5e-6)
    rows, layers = model.forward_intermediates(batch, output_fmt="NLC")
    feature = model.forward_head(rows, pre_logits=True)
    near(torch.stack(layers)[..., :16], ARRAYS[f"{name}/layers"], 5e-5)
    near(feature, ARRAYS[f"{name}/feat"], 5e-6)
    near(model.forward_head(rows), ARRAYS[f"{name}/logits"], 5e-6)
    near(model(batch), ARRAYS[f"{name}/logits"], 5e-6)


@pytest.mark.parametrize("name", CASES)
def test_small_models_have_the_official_names_and_shapes(name):
    state = PlainMamba(**CASES[name]["arguments"]).state_dict()
    shapes = {key: list(value.shape) for key, value in state.items()}
    assert list(shapes.items()) == list(CASES[name]["keys"].items())


@pytest.mark.parametrize(
    ("name", "entries", "parameters"),
    [
        ("plainmamba_l1", 361, 7_551_656),
        ("plainmamba_l2", 361, 26_145_832),
        ("plainmamba_l3", 529, 50_956_456),
    ],
)
def test_weights_have_the_published_names_order_shapes_and_types(name, entries, parameters):
    with torch.device("meta"):
        model = timm.create_model(name)
    lines = (KEYS / f"{name}.txt").read_text().splitlines()
    state = model.state_dict().items()
    found = [f"{key}\t{tuple(value.shape)}\t{str(value.dtype)[6:]}" for key, value in state]
    assert found == lines[1:]
    assert len(found) == entries
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_micro_is_a_small_model_of_a_grid_of_8_x_8():
    model = timm.create_model("plainmamba_micro")
    assert (model.dim, model.depth, model.img_size, model.grid) == (64, 6, (32, 32), (8, 8))
    assert model.layers[0].dw is not None
    assert model.layers[1].dw is None


@pytest.mark.parametrize("other", [dict(param_order="permuted"), dict(dt_bias_twice=False)])
def test_the_paper_s_scan_is_not_that_of_the_published_weights(other):
    arguments = CASES["s_dw0_64"]["arguments"]
    batch = images([0, 1], 64)
    published, paper = (fill(PlainMamba(**{**arguments, **how}))(batch) for how in ({}, other))
    assert (published - paper).abs().max() > 0.01


def test_a_wrong_argument_is_refused_in_a_sentence():
    for arguments, message in (
        (dict(param_order="snake"), "param_order is 'snake'"),
        (dict(patch_size=7), "patch_size is 7, expected an even number"),
        (dict(stem_convs=-1), "stem_convs is -1"),
        (dict(img_size=33), "img_size is 33"),
        (dict(depth=0), "depth is 0"),
        (dict(num_classes=-1), "num_classes is -1"),
        (dict(pretrained=True), "pretrained is set, expected none"),
        (dict(drop_rate=0.1), "drop_rate is 0.1, expected 0: there is no dropout"),
        (dict(global_pool="token"), "global_pool is 'token', expected one of 'avg', 'max', 'avg"),
    ):
        with pytest.raises(ValueError, match=message):
            timm.create_model("plainmamba_micro", **arguments)
    with pytest.raises(TypeError, match="'stem_conv' is no argument of plainmamba_micro; did"):
        timm.create_model("plainmamba_micro", stem_conv=3)


def test_images_of_another_size_are_taken_and_stretch_the_position_embedding():
    model = small(dwconv=True).eval()
    model.backbone.pos_embed.data = torch.arange(16.0).repeat_interleave(32).view(1, 16, 32)
    wide = torch.randn(1, 3, 16, 56)
    tokens = model.embed(wide)
    assert tokens.grid == (2, 7)
    assert tokens.x.shape == (1, 14, 32)
    added = (tokens.x - model.patch_embed(wide).flatten(2).mT)[0, :, 0].view(2, 7)
    assert (added.diff(dim=1) > 0).all()
    assert (added.diff(dim=0) > 0).all()
    other = small(dwconv=True, img_size=(16, 56)).eval()
    other.load_state_dict(adapt(model.state_dict(), other, grid=(4, 4)))
    torch.testing.assert_close(other(wide), model(wide))


def test_images_that_patches_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="side of an image is 33, expected a size that patches"):
        small()(torch.zeros(1, 3, 32, 33))
    with pytest.raises(ValueError, match=r"images are \(1, 1, 32, 32\), expected \(batch, 3,"):
        small()(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"images are \(3, 32, 32\)"):
        small()(torch.zeros(3, 32, 32))


def test_intermediates_are_maps_with_the_stride_of_their_layer():
    model = small(dwconv=True).eval()
    rows, maps = model.forward_intermediates(IMAGES)
    assert [tuple(x.shape) for x in maps] == [(2, 32, 4, 4)] * 3
    for found, info in zip(maps, model.feature_info, strict=True):
        assert found.shape[1] == info["num_chs"]
        assert found.shape[2] * info["reduction"] == 32
        assert model.get_submodule(info["module"]) in model.layers
    torch.testing.assert_close(rows, model.forward_features(IMAGES))
    last = model.forward_intermediates(IMAGES, [-1], norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(last.flatten(2).mT, rows)
    [(patches, prefix)] = model.forward_intermediates(
        *(IMAGES, 1), return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    assert torch.equal(patches.mT.unflatten(2, (4, 4)), maps[2])
    assert prefix.shape == (2, 0, 32)
    assert model.forward_intermediates(torch.zeros(1, 3, 24, 40))[1][0].shape == (1, 32, 3, 5)
    ran = []
    for block in model.layers:
        block.register_forward_pre_hook(lambda block, _: ran.append(block))
    model.forward_intermediates(IMAGES, [0, 1], stop_early=True, intermediates_only=True)
    assert ran == list(model.layers[:2])
    with pytest.raises(ValueError, match="output_fmt is 'NHWC'"):
        model.forward_intermediates(IMAGES, output_fmt="NHWC")


def test_the_convolution_behind_layer_0_acts_on_the_sum():
    model, seen = small(dwconv=True).eval(), []
    model.layers[0].dw.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    model.layers[0].mamba.register_forward_hook(lambda _m, _args, out: seen.append(out))
    (first,) = model.forward_intermediates(IMAGES, [0], intermediates_only=True)
    mixed, (total, out) = seen
    start = model.embed(IMAGES).x
    torch.testing.assert_close(total.flatten(2).mT, start + mixed)
    torch.testing.assert_close(first, out)


def test_drop_path_rises_from_zero_and_is_of_no_single_layer():
    model = small(drop_path_rate=0.2)
    assert [layer.drop_path.rate for layer in model.layers] == pytest.approx([0, 0, 0.1])
    assert model.drop_path.rate == 0.2
    assert small(depth=1, drop_path_rate=0.2).drop_path.rate == 0


def test_weight_decay_spares_what_is_not_a_plain_matrix():
    parts = [f"backbone.layers.{n}.mamba.{p}" for n in range(3) for p in ("A_log", "D")]
    parts += [f"backbone.layers.{n}.mamba.direction_Bs" for n in range(3)]
    assert small().no_weight_decay() == {"backbone.pos_embed", *parts}


def test_the_head_can_be_replaced_or_taken_away():
    model = small().eval()
    feature = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
    assert model.get_classifier() is model.head.fc
    model.reset_classifier(0)
    torch.testing.assert_close(model(IMAGES), feature)
    model.double().reset_classifier(3)
    assert model.head.fc.weight.dtype == torch.float64
    assert not model.head.fc.training
    assert model.num_classes == 3
    assert list(model.state_dict()) == list(small().state_dict())


def test_timm_reads_what_images_the_model_wants():
    model = timm.create_model("plainmamba_micro", img_size=(64, 96), in_chans=1)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (1, 64, 96)
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).in_channels == 1
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()


def lengths(model):
    """What each mixer sees."""
    seen = []
    for layer in model.layers:
        layer.mamba.register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[1]))
    model(IMAGES)
    return seen


@pytest.mark.parametrize("hook", ["before", "between", "after"])
@pytest.mark.parametrize("method", ["ordered", "famba-v"])
def test_tokens_are_reduced_at_every_layer_and_every_parameter_learns(method, hook):
    model = reduce(small(dwconv=True, depth=4), method, "r:2", hook=hook)
    assert lengths(model) == list(model.schedule.lengths)
    (model(IMAGES) * torch.randn(2, 5)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("gap", ["cached", "bias", "hold_prev", "self"])
def test_scans_are_aligned_with_parameters_of_their_own_tokens_only(gap):
    model = small(param_order="permuted", depth=4).eval()
    compact = reduce(model, "ordered", "r:3@2-4")(IMAGES)
    aligned = reduce(model, "ordered", "r:3@2-4", scan="aligned", gap_policy=gap)(IMAGES)
    assert compact.shape == aligned.shape
    assert not torch.equal(compact, aligned)
    with pytest.raises(ValueError, match="param_order 'permuted' pairs it with its own"):
        reduce(small(), "ordered", "r:3@2-3", scan="aligned", gap_policy=gap)


def test_masked_tokens_stay_silent_behind_every_layer():
    model, silent = reduce(small(dwconv=True).eval(), "ordered", "r:3", scan="masked"), []
    for layer in model.layers:
        layer.register_forward_hook(lambda _m, _args, tokens: silent.append(tokens))
    model(IMAGES)
    for tokens, left in zip(silent, model.schedule.lengths, strict=True):
        assert tokens.keep_index.shape == (2, left)
        mask = torch.ones(2, 16).scatter(1, tokens.keep_index, 0).bool()
        assert not tokens.x[mask].any()
        assert tokens.residual is None or not tokens.residual[mask].any()
        assert tokens.x[~mask].all()


def test_the_feature_is_the_mean_over_the_patches_behind_the_tokens():
    model, seen = reduce(small().eval(), "ordered", "r:6@2"), []
    model.layers[-1].register_forward_hook(lambda _m, _args, tokens: seen.append(tokens))
    whole, trace = model.forward_features(IMAGES, trace=True)
    feature, (tokens,) = model.forward_head(whole, pre_logits=True), seen
    rows = model.backbone.ln1(tokens.x, tokens.residual)[0]
    index = trace.sources[-1][..., None].expand(-1, -1, 32)
    torch.testing.assert_close(feature, rows.gather(1, index).mean(dim=1))
    assert tokens.size.max() > 1


@pytest.mark.parametrize("reduced", [False, True])
def test_checkpointing_changes_no_gradient(reduced):
    grads = []
    for enable in (False, True):
        model = small(drop_path_rate=0.3, dwconv=True)
        if reduced:
            reduce(model, "ordered", "r:2")
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        (model(IMAGES) * torch.arange(5)).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_drop_path_drops_samples_of_each_output():
    model = small(drop_path_rate=0.99)
    torch.manual_seed(0)
    kept = model.layers[1](model.layers[0](model.embed(IMAGES)))
    model.drop_path.rate = 1 - 1e-9
    alone = model.backbone.ln1(kept.residual)[0].mean(dim=1)
    torch.testing.assert_close(model.pool(kept), alone)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("reduced", [False, True])
def test_it_compiles_without_a_graph_break(reduced):
    model = small(depth=2, dwconv=True).eval()
    if reduced:
        reduce(model, "ordered", "r:2")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES))


def test_hooks_of_one_s_own_may_ask_a_layer():
    model, found = small().eval(), []

    def after(tokens):
        found.append(tokens.intermediates)
        return tokens

    layer, tokens = model.layers[0], model.embed(IMAGES)
    out = layer(tokens, Hooks(after=after, want=frozenset({"y", "delta"})))
    torch.testing.assert_close(out.x, layer(tokens).x)
    assert found[0].y.shape == found[0].delta.shape == (2, 4, 16, 64)
    assert (found[0].delta > 0).all()


def test_checkpoints_in_openmmlab_s_layout_load_and_may_lose_their_head(tmp_path):
    source, model = small(num_classes=1000, img_size=64), small()
    payload = {"meta": {"epoch": 300}, "state_dict": source.state_dict(), "optimizer": {}}
    path = tmp_path / "l1.pth"
    with pytest.raises(CheckpointError, match="checkpoint has 1000 classes, expected 5"):
        RunState.of(path, payload).load_into(model)
    head = model.head.fc.weight.clone()
    RunState.of(path, payload).load_into(model, head="drop")
    assert torch.equal(model.head.fc.weight, head)
    assert model.backbone.pos_embed.shape == (1, 16, 32)
    name = "backbone.layers.2.mamba.direction_Bs"
    assert torch.equal(model.state_dict()[name], source.state_dict()[name])
    twin = small(num_classes=1000, img_size=64)
    RunState.of(path, payload).load_into(twin)
    assert torch.equal(twin.eval()(IMAGES), source.eval()(IMAGES))
    with pytest.raises(CheckpointError, match=r"such as backbone\.layers\.0\.dw"):
        RunState.of(path, payload).load_into(small(num_classes=1000, dwconv=True))
