"""VSSD's numbers and names, its low precision, and what it refuses."""

import zlib
from pathlib import Path

import pytest
import torch

from fambav import flops
from fambav.layers import DropPath
from fambav.layers.nc_ssd import NonCausalSSD
from fambav.models import VSSD
from fambav.timm_compat import timm
from tests import golden
from tests.golden import fill, images, wave, wave_images
from tests.identical import same_gradients_when_checkpointed
from tests.models.test_golden import check_gradients, near

ARRAYS, CASES = golden.load("vssd")
KEYS = Path(golden.__file__).parent / "keys"
CASE, DIGESTS = CASES["vssd"], CASES["keys"]


def small(**arguments):
    torch.manual_seed(0)
    known = dict(dims=(16, 24, 32, 48), depths=(1, 1, 2, 1), heads=(2, 4, 4, 6), state=8)
    return VSSD(**{**known, **dict(img_size=64, num_classes=5), **arguments})


def built(name, **arguments):
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def test_logits_and_gradients_agree_with_the_official_code():
    model, batch = fill(VSSD(**CASE["arguments"])), images(CASE["image_keys"], *CASE["size"])
    near(model(batch), ARRAYS["vssd/logits"], 3e-5)
    check_gradients(ARRAYS, CASE, "vssd", model, batch)
    assert sum(p.numel() for p in model.parameters()) == CASE["params"]


@torch.no_grad()
def test_published_widths_agree_with_the_official_code():
    model, batch = fill(timm.create_model("vssd_micro"), wave), wave_images(2, 64, 96)
    rows, maps = model.forward_intermediates(batch, output_fmt="NHWC")
    near(model.forward_head(rows), ARRAYS["vssd_micro/logits"], 1e-3)
    for stage in (1, 2):  # behind which float32 is no longer that exact
        near(maps[stage - 1][..., :4], ARRAYS[f"vssd_micro/stage{stage}"], 1e-3)


def test_the_mixer_by_itself_agrees_with_the_official_code():
    mixer = fill(NonCausalSSD(48, heads=2, state=48), wave)
    near(mixer(ARRAYS["mixer/in"]), ARRAYS["mixer/out"], 1e-5)


@pytest.mark.parametrize(
    ("name", "parameters", "published", "complete", "products"),
    [
        ("vssd_micro", 13_512_964, 2.3057, 2.407, 2.3874),
        ("vssd_tiny", 24_270_724, 4.4754, 4.694, 4.6638),
        ("vssd_small", 40_075_650, 7.3660, 7.756, 7.7089),
        ("vssd_base", 88_823_151, 16.0662, 16.720, 16.6488),
    ],
)
def test_names_parameters_and_operations_are_the_published_ones(
    name, parameters, published, complete, products
):
    model = built(name)
    state = model.state_dict().items()
    found = [f"{key}\t{tuple(value.shape)}\t{str(value.dtype)[6:]}" for key, value in state]
    if name in DIGESTS:
        assert zlib.crc32("\n".join(found).encode()) == DIGESTS[name]
    else:
        assert found == (KEYS / f"{name}.txt").read_text().splitlines()[1:]
    assert sum(p.numel() for p in model.parameters()) == parameters
    total = flops.count(model).total
    assert round(total.literature / 1e9, 4) == published
    assert round(total.all_directions / 1e9, 3) == complete
    assert round(total.multiply_adds / 1e9, 4) == products


def test_nano_is_small():
    assert sum(p.numel() for p in built("vssd_nano").parameters()) < 1_500_000


def test_every_size_of_an_image_gives_the_maps_that_the_model_describes():
    for size in ((32, 32), (70, 102), (33, 64)):
        model = small(img_size=size, out_norms=True).eval()
        maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
        stages = model.info.stages
        assert [tuple(x.shape[2:]) for x in maps] == [stage.grid for stage in stages]
        assert [x.shape[1] for x in maps] == [stage.width for stage in stages]
    assert [stage.grid for stage in small(img_size=(70, 102)).info.stages] == [
        *((18, 26), (9, 13), (5, 7), (3, 4))
    ]


def test_a_map_may_be_mirrored_or_turned_but_for_its_convolutions():
    mixer = NonCausalSSD(16, heads=2, state=8)
    with torch.no_grad():
        centre = torch.zeros(3, 3)
        centre[1, 1] = 1.0
        mixer.conv2d.weight.mul_(centre)
    x = torch.randn(2, 5, 7, 16)
    torch.testing.assert_close(mixer(x.flip(1)), mixer(x).flip(1))
    torch.testing.assert_close(mixer(x.transpose(1, 2)), mixer(x).transpose(1, 2))


def test_new_weights_start_as_published():
    mixer = NonCausalSSD(64, heads=128, state=8)
    steps, rates = torch.nn.functional.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert 1e-3 <= steps.min() < 5e-3 < 2e-2 < steps.max() <= 0.1001
    assert 1 <= rates.min() < 4 < 12 < rates.max() <= 16
    assert (mixer.D == 1).all()
    model = small()
    assert model.layers[0].blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.layers[3].blocks[0].attn.to_out.bias.any()


@pytest.mark.parametrize("how", [{}, dict(drop_path_rate=0.5, drop_rate=0.2)])
def test_checkpointing_changes_no_gradient(how):
    same_gradients_when_checkpointed(lambda: small(**how), torch.ones(2, 3, 32, 48))


def test_drop_path_rises_from_block_to_block():
    model = small(drop_path_rate=0.4)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_finite_and_close(dtype):
    batch = torch.randn(2, 3, 224, 160)
    model = small().eval()
    exact = model(batch)
    with torch.autocast("cpu", dtype):
        near(model(batch).float(), exact, 0.05 * exact.abs().max().item())
        model.train()(batch).float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    low = small().to(dtype).eval()
    near(low(batch.to(dtype)).float(), exact, 0.05 * exact.abs().max().item())


def test_activations_beyond_float16_are_normalised_before_they_are_halved():
    mixer = NonCausalSSD(16, heads=2, state=8)
    with torch.no_grad():
        mixer.in_proj.weight.mul_(100)
        mixer.dt_bias.fill_(30.0)  # long steps of every cell, as of a run that has gone astray
    x = torch.randn(1, 56, 56, 16, generator=torch.Generator().manual_seed(0))
    exact = mixer(x)
    with torch.autocast("cpu", torch.float16):
        low = mixer(x)
    assert (low.float() - exact).norm() < 0.05 * exact.norm()


def test_weights_of_the_later_form_are_refused_in_a_sentence():
    model = small()
    later = {**model.state_dict(), "layers.0.blocks.0.attn.ropes.rotations": torch.zeros(1)}
    with pytest.raises(ValueError, match="checkpoint is of VSSD's form of 2025, with rotary"):
        model.remap({"model": later})
    averaged = {"model_ema": {f"module.{name}": v for name, v in model.state_dict().items()}}
    assert model.remap(averaged, ema=True).keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match=r"dt_bias of the checkpoint is \(4,\), expected \(2,\)"):
        small(heads=(2, 2, 2, 2)).remap(model.state_dict())


def test_a_wrong_argument_is_refused_in_a_sentence():
    widths = "expected a divisor of each of the widths 64, 128, 192, 160"
    for arguments, message in (
        (dict(heads=(2, 4, 8)), rf"heads are \[2, 4, 8\], {widths}"),
        (dict(heads=(2, 4, 6, 7)), rf"heads are \[2, 4, 6, 7\], {widths}"),
        (dict(heads=(2, 0, 6, 5)), rf"heads are \[2, 0, 6, 5\], {widths}"),
        (dict(state=0), "state is 0, expected at least 1"),
        (dict(dims=(8, 16)), r"dims are \[8, 16\] and depths \[2, 2, 2, 1\]"),
        (dict(img_size=(64, 31)), "img_size is 64 x 31, expected sides of at least 32"),
        (dict(global_pool="token"), "global_pool is 'token', expected one of 'avg', 'max', "),
    ):
        with pytest.raises(ValueError, match=message):
            timm.create_model("vssd_nano", **arguments)
    with pytest.raises(TypeError, match="'class_token' is no argument of vssd_nano"):
        timm.create_model("vssd_nano", class_token="middle")
