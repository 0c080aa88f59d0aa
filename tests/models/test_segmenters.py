"""Networks of the shape of a U: published names and numbers, invariances, and what is refused."""

import zlib
from pathlib import Path

import pytest
import torch

from fambav import flops
from fambav.layers import DropPath
from fambav.layers.attention import FrequencyAttention, dct_bases
from fambav.models import CVMHUNet, VMamba, VMUNet
from fambav.models.cvmh_unet import MFMSBlock
from fambav.registry import CLASSIFIERS, models_of
from fambav.timm_compat import timm
from tests import golden
from tests.golden import fill, hashed, images
from tests.models.test_golden import near

ARRAYS, CASE = golden.load("vmunet")
KEYS = Path(golden.__file__).parent / "keys"
MODELS = models_of("segmentation")
KINDS = (VMUNet, CVMHUNet)
RAW = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")


def small(kind=CVMHUNet, **arguments):
    torch.manual_seed(0)
    known = dict(
        dims=(8, 16, 32, 48),
        depths=(2, 1, 1, 2),
        depths_up=(1, 2, 1, 1),
        img_size=64,
        num_classes=5,
    )
    return kind(**{**known, **arguments})


def built(name, **arguments):
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_logits_features_and_gradients_agree_with_the_official_code():
    model, seen = fill(timm.create_model("vmunet")), {}

    def keep(name):
        return lambda _module, _args, out: seen.update({name: out})

    for stage in range(3):  # the authors' stages end with what leads to the next one
        model.layers[stage].downsample.register_forward_hook(keep(f"enc{stage}"))
    model.layers[3].blocks.register_forward_hook(keep("enc3"))
    for stage, up in enumerate(model.ups):
        up.register_forward_hook(keep(f"dec{stage}"))
    logits = model(images(CASE["image_keys"], *CASE["size"]))
    near(logits[:, :, ::4, ::4], ARRAYS["logits"], 3e-5)
    assert logits.norm().item() == pytest.approx(CASE["l2"], rel=1e-6)
    assert len(seen) == 8
    for name, x in seen.items():
        near(x[..., :8], ARRAYS[name], 3e-5)
    (logits * hashed("gout", *logits.shape)).sum().backward()
    found = dict(model.named_parameters())
    assert list(found) == CASE["grad_names"]
    for n, (name, p) in enumerate(found.items()):
        grad, norm = p.grad.double(), ARRAYS["grad_norm"][n].item()
        projected = (grad * hashed(f"proj:{name}", *grad.shape, dtype=torch.float64)).sum()
        tolerance = 1e-4 * max(norm, 0.01)
        assert grad.norm().item() == pytest.approx(norm, abs=tolerance), name
        assert projected.item() == pytest.approx(ARRAYS["grad_dot"][n].item(), abs=tolerance), name


@pytest.mark.parametrize(
    ("name", "classes", "total", "published", "literature"),
    [
        ("vmunet", 1, 27_427_561, 22_037_737, 4.112),
        ("vmunet", 6, 27_427_686, 22_037_862, 4.120),
        ("vmunet_deep", 9, 44_274_033, 34_621_809, 7.575),
        ("cvmh_unet", 6, 36_231_246, 30_841_422, 5.738),
    ],
)
def test_names_parameters_and_operations_are_the_published_ones(
    name, classes, total, published, literature
):
    model = built(name, num_classes=classes)
    assert parameters(model) == total
    raw = [p.numel() for n, p in model.named_parameters() if n.split(".")[-1] in RAW]
    assert total - sum(raw) == published  # of which the papers' counter knows
    assert round(flops.count(model).total.literature / 1e9, 3) == literature
    state = model.state_dict().items()
    keys = [f"{key}\t{tuple(value.shape)}\t{str(value.dtype)[6:]}" for key, value in state]
    if f"{name}_{classes}" in CASE["keys"]:
        assert zlib.crc32("\n".join(keys).encode()) == CASE["keys"][f"{name}_{classes}"]
    elif name == "vmunet":
        assert keys == (KEYS / "vmunet.txt").read_text().splitlines()[1:]


def test_blocks_of_cvmh_unet_have_the_parameters_of_the_paper():
    model = built("cvmh_unet")
    blocks = [parameters(stage.blocks[0]) for stage in model.layers]
    assert blocks == [133_154, 443_618, 1_596_770, 6_031_970]
    assert [parameters(one) for one in model.fusions] == [4_971, 19_157, 75_173, 297_797]
    sides = [fusion.channels.bases.shape[1] for fusion in model.fusions]
    assert sides == [56, 28, 14, 7]


@pytest.mark.parametrize("name", [name for name in MODELS if name.endswith("nano")])
def test_nano_is_small_and_labels_images_of_its_size(name):
    model = timm.create_model(name, num_classes=11).eval()
    assert parameters(model) < 1_500_000
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 11, 32, 32)


def test_segmenters_are_no_classifiers():
    assert set(MODELS) == {*(timm.list_models("vmunet*")), *timm.list_models("cvmh*")}
    assert not set(MODELS) & set(CLASSIFIERS)


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_every_size_are_labelled_pixel_by_pixel(kind):
    model = small(kind).eval()
    for height, width in ((32, 32), (33, 64), (70, 101)):
        batch = torch.randn(1, 3, height, width)
        logits = model(batch)
        assert logits.shape == (1, 5, height, width)
        filled = torch.zeros(1, 3, -(-height // 4) * 4, -(-width // 4) * 4)
        filled[..., :height, :width] = batch
        near(logits, model(filled)[..., :height, :width], 1e-6)
        model.set_input_size((height, width))
        maps = [x.shape[2:] for x in model.forward_intermediates(batch, intermediates_only=True)]
        grids = [stage.grid for stage in model.info.stages]
        assert maps + maps[::-1] == grids
        assert model.pretrained_cfg["pool_size"] == grids[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_and_checkpointing_changes_nothing(kind):
    found = []
    for enable in (False, True):
        model = small(kind, drop_path_rate=0.3)
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        logits = model(torch.randn(4, 3, 48, 64, generator=torch.Generator().manual_seed(2)))
        (logits * torch.randn(logits.shape)).sum().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
        found.append([*(p.grad for p in model.parameters()), *model.buffers()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_drop_path_rises_down_the_encoder_and_falls_up_the_decoder(kind):
    rates = [m.rate for m in small(kind, drop_path_rate=0.5).modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.375, 0.25, 0.125, 0])


def test_the_finest_map_of_the_encoder_is_no_skip_of_vm_unet():
    model, x = small(VMUNet), torch.randn(2, 1, 2, 4)
    assert torch.equal(model.fuse(0, torch.ones_like(x), x), x)
    assert torch.equal(model.fuse(1, torch.ones_like(x), x), x + 1)


def test_equal_maps_stay_as_they_are_and_weights_are_between_0_and_1():
    torch.manual_seed(0)
    block = MFMSBlock(16, side=14).eval()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    skip, x = torch.randn(2, 2, 9, 5, 16)
    assert torch.equal(block(skip, skip), skip)
    weight = block.weights((skip + x).permute(0, 3, 1, 2))
    assert 0 < weight.min() < 0.4 < 0.6 < weight.max() < 1
    assert weight.shape == (2, 16, 9, 5)
    weight = weight.permute(0, 2, 3, 1)
    near(block(skip, x), weight * skip + (1 - weight) * x, 1e-6)


def test_bases_are_orthonormal_and_the_first_is_flat():
    for side in (7, 14):
        bases = dct_bases(side).flatten(1)
        near(bases @ bases.T, torch.eye(16), 1e-5)
        near(bases[0], torch.full((side**2,), 1 / side), 1e-6)


def test_channels_are_weighed_by_their_averages_maxima_and_minima_in_each_frequency():
    attention = FrequencyAttention(8, side=7)
    x = torch.randn(2, 8, 7, 7, requires_grad=True)
    pooled = torch.zeros(2, 8)
    for basis in dct_bases(7):
        waved = (x * basis).flatten(2)
        pooled += (waved.mean(dim=2) + waved.amax(dim=2) + waved.amin(dim=2)) / 16
    expected = torch.nn.functional.conv1d(pooled[:, None], attention.conv.weight, padding=1)
    found = attention(x)
    near(found, expected[:, 0], 1e-6)  # the convolution is linear, and the same for all
    near(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (found, expected)), 1e-6)


def test_two_blocks_in_a_row_are_one_residual_branch():
    model, x = small(depths=(3, 1, 1, 1)).eval(), torch.randn(1, 4, 6, 8)
    stage = model.layers[0].blocks
    first, second, third = stage
    assert torch.equal(stage(x), third(x + second(first(x))))


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_encoder(kind):
    model = small(kind).eval()
    batch = torch.randn(1, 3, 40, 64)
    whole = model.forward_intermediates(batch, intermediates_only=True)
    name = "vmunet_nano" if kind is VMUNet else "cvmh_unet_nano"
    part = timm.create_model(name, features_only=True, out_indices=(0, 2))
    assert part.feature_info.channels() == [16, 64]
    sum(x.square().sum() for x in part(batch)).backward()
    assert [n for n, p in part.named_parameters() if p.grad is None] == []
    model.prune_intermediate_layers([0, 1])
    for found, expected in zip(
        model.forward_intermediates(batch, intermediates_only=True), whole, strict=False
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_learning_rates_decay_from_the_decoder_to_the_image(kind):
    model = small(kind)
    groups = timm.optim.param_groups_layer_decay(model, 0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    found = {n.removeprefix("vmunet."): scale[id(p)] for n, p in model.named_parameters()}
    order = [
        "patch_embed.proj.weight",
        "layers.0.blocks.1.ln_1.weight",
        "layers.2.blocks.0.ln_1.weight",
        "layers_up.0.blocks.0.ln_1.weight",
        "layers_up.3.blocks.0.ln_1.weight",
        "final_conv.weight",
    ]
    scales = [found[name] for name in order]
    assert scales == sorted(set(scales))
    assert scales[-1] == 1
    assert found["layers.0.downsample.norm.weight"] == found["layers.1.blocks.0.ln_1.weight"]
    assert found["layers_up.1.upsample.norm.weight"] == found["layers_up.1.blocks.0.ln_1.weight"]


def test_the_head_can_be_replaced_or_taken_away():
    model, batch = small(), torch.randn(1, 3, 33, 35)
    model.reset_classifier(9)
    assert model(batch).shape == (1, 9, 33, 35)
    model.reset_classifier(0)
    assert model(batch).shape == (1, 2, 33, 35)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("old", [True, False])
def test_an_encoder_of_vanilla_vmamba_starts_both_sides(kind, old):
    source = VMamba(dims=(8, 16, 32, 48), depths=(2, 1, 3, 2), form="vanilla", num_classes=7)
    state = {n: torch.randn(value.shape) for n, value in source.state_dict().items()}
    names = (("patch_embed.0", "patch_embed.proj"), ("patch_embed.2", "patch_embed.norm"))
    names += ((".norm.", ".ln_1."), (".op.", ".self_attention."))
    renamed = {}
    for name, value in state.items():
        for new, first in names[: 2 + 2 * (".blocks." in name)]:
            name = name.replace(new, first) if old else name
        renamed[name] = value
    model = small(kind)
    inside = f"{model.body}." if model.body else ""
    before = {n: value.clone() for n, value in model.state_dict().items()}
    model.load_state_dict(model.remap({"model": renamed}, head="drop"))
    after = model.state_dict()
    for here, there in (
        ("patch_embed.proj.weight", "patch_embed.0.weight"),
        ("layers.3.blocks.1.ln_1.bias", "layers.3.blocks.1.norm.bias"),
        ("layers.1.downsample.reduction.weight", "layers.1.downsample.reduction.weight"),
        ("layers_up.0.blocks.0.self_attention.A_logs", "layers.3.blocks.0.op.A_logs"),
        ("layers_up.3.blocks.0.self_attention.Ds", "layers.0.blocks.0.op.Ds"),
    ):
        assert torch.equal(after[inside + here], state[there]), here
    for name in ("final_conv.weight", "layers_up.1.upsample.expand.weight"):
        assert torch.equal(after[inside + name], before[inside + name])
    with pytest.raises(ValueError, match="checkpoint has no decoder, expected one of this model"):
        model.remap({"model": renamed})
    narrow = small(kind, dims=(8, 16, 32, 64))
    with pytest.raises(ValueError, match=r"has no decoder, and lacks \d+ weights such as"):
        narrow.remap({"model": renamed}, head="drop")


def test_own_weights_are_taken_and_a_head_of_other_classes_is_dropped_if_wanted():
    source, model = small(), small(num_classes=3)
    with pytest.raises(ValueError, match="checkpoint has 5 classes, expected 3"):
        model.remap({"model": source.state_dict()})
    head = model.final_conv.weight.clone()
    model.load_state_dict(model.remap({"model": source.state_dict()}, head="drop"))
    assert torch.equal(model.final_conv.weight, head)


def test_low_precision_is_finite_and_close():
    for kind in KINDS:
        model, batch = small(kind, dims=(32, 32, 32, 48)).eval(), torch.randn(1, 3, 64, 64)
        exact = model(batch)
        with torch.autocast("cpu", torch.bfloat16):
            error = model(batch).float() - exact
        assert error.norm() < 0.05 * exact.norm()
        assert small(kind).bfloat16().eval()(batch.bfloat16()).isfinite().all()


def test_a_wrong_argument_is_refused_in_a_sentence():
    for arguments, message in (
        (dict(depths_up=(1, 2)), r"depths_up are \[1, 2\], expected a number for each of dims"),
        (dict(depths_up=(1, 2, 0, 1)), "a number of depths_up is 0, expected"),
        (dict(dims=(6, 8, 8, 8)), r"dims are \[6, 8, 8, 8\], expected a multiple of 4 first"),
        (dict(global_pool="avg"), "global_pool is 'avg', expected ''"),
        (dict(num_classes=-1), "num_classes is -1"),
        (dict(paths=("zigzag",)), "path is 'zigzag', expected one of rows, columns"),
        (dict(img_size=31), "img_size is 31 x 31, expected sides of at least 32"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**arguments)(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="img_size is 16 x 64, expected sides of at least 32"):
        small()(torch.zeros(1, 3, 16, 64))
