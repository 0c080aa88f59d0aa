"""VMamba's numbers, names and forms, and what it refuses."""

import zlib
from pathlib import Path

import pytest
import torch

from fambav import flops
from fambav.layers import DropPath
from fambav.layers.ss2d import SS2D
from fambav.models import VMamba
from fambav.timm_compat import timm
from tests import golden
from tests.golden import fill, images, wave, wave_images
from tests.identical import same_gradients_when_checkpointed
from tests.models.test_golden import check_gradients, near

ARRAYS, CASES = golden.load("vmamba")
KEYS = Path(golden.__file__).parent / "keys"
DIGESTS = CASES.pop("keys")
FORMS = [dict(ssm_ratio=1.0), {}, dict(form="vanilla")]


def small(**arguments):
    torch.manual_seed(0)
    known = dict(dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), img_size=64, num_classes=5)
    return VMamba(**{**known, **arguments})


def built(name, **arguments):
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_agree_with_the_official_code(name):
    case = CASES[name]
    model, batch = fill(VMamba(**case["arguments"])), images(case["image_keys"], *case["size"])
    near(model(batch), ARRAYS[f"{name}/logits"], 3e-5)
    check_gradients(ARRAYS, case, name, model, batch)
    assert sum(p.numel() for p in model.parameters()) == case["params"]


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vanilla_vmamba_tiny"])
@torch.no_grad()
def test_published_widths_agree_with_the_official_code(name):
    model, batch = fill(timm.create_model(name), wave), wave_images(2, 64, 96)
    rows, maps = model.forward_intermediates(batch, output_fmt="NHWC")
    near(model.forward_head(rows), ARRAYS[f"{name}/logits"], 1e-3)
    for stage in (1, 2):  # behind which float32 is no longer that exact
        near(maps[stage - 1][..., :4], ARRAYS[f"{name}/stage{stage}"], 1e-3)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("v05_noz", dict(state=1)),
        ("v0", dict(state=16, gated=True, conv_bias=True)),
    ],
)
def test_the_mixer_by_itself_agrees_with_the_official_code(name, how):
    mixer = fill(SS2D(32, expand=2.0, **how), wave)
    x = (0.3 * torch.arange(2 * 5 * 7 * 32, dtype=torch.float64)).sin().float().view(2, 5, 7, 32)
    near(mixer(x), ARRAYS[f"ss2d_{name}/out"], 1e-5)


@pytest.mark.parametrize(
    ("name", "parameters", "literature", "products"),
    [
        ("vmamba_tiny_s1l8", 30_249_064, 4.9056, 4.8126),
        ("vmamba_tiny_s2l5", 30_705_832, 4.8577, 4.7162),
        ("vmamba_small_s2l15", 50_147_752, 8.7158, 8.4990),
        ("vmamba_small_s1l20", 49_012_840, 8.6122, 8.4695),
        ("vmamba_base_s2l15", 88_557_800, 15.3589, 15.0699),
        ("vmamba_base_s1l20", 86_614_504, 15.2209, 15.0306),
        ("vanilla_vmamba_tiny", 22_893_448, 5.6269, 3.6770),
        ("vanilla_vmamba_small", 44_417_416, 11.2315, 7.6897),
        ("vanilla_vmamba_base", 76_254_056, 18.0196, 13.2973),
    ],
)
def test_names_parameters_and_operations_are_the_published_ones(
    name, parameters, literature, products
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
    assert round(total.literature / 1e9, 4) == literature
    assert round(total.multiply_adds / 1e9, 4) == products


def test_the_count_of_the_authors_is_met_to_the_last_digit():
    assert flops.count(built("vmamba_tiny_s1l8")).total.literature == 4_905_609_984


def test_nano_is_small():
    assert sum(p.numel() for p in built("vmamba_nano").parameters()) < 1_500_000


@pytest.mark.parametrize("how", FORMS)
def test_every_size_of_an_image_gives_the_maps_that_the_model_describes(how):
    for size in ((32, 32), (70, 102), (33, 64)):
        model = small(**how, img_size=size).eval()
        maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
        stages = model.info.stages
        assert [tuple(x.shape[2:]) for x in maps] == [stage.grid for stage in stages]
        assert [x.shape[1] for x in maps] == [stage.width for stage in stages]
        wide = torch.randn(1, 3, size[0] + 8, size[1])
        other = small(**how).eval()
        expected = other(wide)
        other.set_input_size((size[0] + 8, size[1]))
        assert torch.equal(other(wide), expected)


def test_patches_of_odd_maps_are_filled_up_below_and_to_the_right():
    merge = small(form="vanilla").layers[0].downsample
    x = torch.randn(2, 5, 3, 16)
    whole = torch.zeros(2, 6, 4, 16)
    whole[:, :5, :3] = x
    assert torch.equal(merge(x), merge(whole))
    assert merge(x).shape == (2, 3, 2, 32)


def test_out_norms_are_those_of_each_stage():
    plain, dense = small().eval(), small(out_norms=True).eval()
    names = dense.state_dict().keys() - plain.state_dict().keys()
    assert names == {f"outnorm{n}.{part}" for n in range(4) for part in ("weight", "bias")}
    dense.load_state_dict(plain.state_dict(), strict=False)
    batch = torch.randn(1, 3, 64, 96)
    for model in (plain, dense):
        assert torch.equal(model(batch), plain(batch))
    maps = plain.forward_intermediates(batch, [1, 3], intermediates_only=True, output_fmt="NHWC")
    found = dense.forward_intermediates(batch, [1, 3], intermediates_only=True, output_fmt="NHWC")
    for x, normed in zip(maps, found, strict=True):
        near(normed, torch.nn.functional.layer_norm(x, x.shape[3:]), 1e-5)
    part = timm.create_model("vmamba_nano", features_only=True, out_indices=(0, 2), out_norms=True)
    sum(x.square().sum() for x in part(batch)).backward()
    assert [n for n, p in part.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("how", [*FORMS, dict(drop_path_rate=0.5, drop_rate=0.2)])
def test_checkpointing_changes_no_gradient(how):
    same_gradients_when_checkpointed(lambda: small(**how), torch.ones(2, 3, 32, 48))


def test_drop_path_rises_from_block_to_block_and_drops_whole_samples():
    model = small(drop_path_rate=0.4)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    block, x = model.layers[3].blocks[0], torch.randn(64, 2, 2, 64)
    unchanged = (block(x) == x).flatten(1).all(dim=1)
    assert 0 < unchanged.sum() < 64
    assert torch.equal(model.eval().layers[3].blocks[0](x), model.layers[3].blocks[0](x))


@pytest.mark.parametrize("how", FORMS)
def test_low_precision_is_finite_and_close(how):
    model, batch = small(**how).eval(), torch.randn(2, 3, 64, 64)
    exact = model(batch)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            near(model(batch).float(), exact, 0.05 * exact.abs().max().item())
        low = small(**how).to(dtype).eval()
        assert low(batch.to(dtype)).isfinite().all()


def old(state):
    """The names of the authors' first code."""
    names = (("patch_embed.0", "patch_embed.proj"), ("patch_embed.2", "patch_embed.norm"))
    names += ((".norm.", ".ln_1."), (".op.", ".self_attention."), ("classifier.", ""))
    found = {}
    for name, value in state.items():
        for ours, theirs in names[: 2 + 2 * (".blocks." in name)] + names[4:]:
            name = name.replace(ours, theirs, 1)
        found[name] = value
    return found


def single(state):
    """The names and shapes of the authors' single file."""
    found = {}
    for name, value in state.items():
        name = name.replace("downsample.norm", "downsample.1")
        name = name.replace("downsample.reduction", "downsample.2")
        if name.endswith(("x_proj_weight", "dt_projs_weight")):
            name, value = name.replace("_weight", ".weight"), value.flatten(0, 1)
        found[name] = value
    return found


def convolved(state):
    """Linear maps saved as convolutions of 1 x 1."""
    linear = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
    return {n: v[:, :, None, None] if n.endswith(linear) else v for n, v in state.items()}


@pytest.mark.parametrize(
    ("other", "how"),
    [
        (old, dict(form="vanilla")),
        (single, dict(form="vanilla")),
        (single, {}),
        (convolved, {}),
        (lambda state: {f"backbone.{n}": v for n, v in state.items()}, {}),
    ],
)
def test_weights_of_older_codes_are_taken(other, how):
    source, target = small(**how), small(**how)
    for p in source.parameters():
        torch.nn.init.normal_(p)
    payload = {"model": other(source.state_dict()), "max_accuray_ema": 1.0}
    target.load_state_dict(target.remap(payload))
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_weights_of_another_form_are_refused_in_a_sentence():
    plain, vanilla = small(), small(form="vanilla")
    with pytest.raises(ValueError, match="is of VMamba's form 'vanilla', expected 'v2'"):
        plain.remap(old(vanilla.state_dict()))
    with pytest.raises(ValueError, match="is of VMamba's form 'v2', expected 'vanilla'"):
        vanilla.remap(plain.state_dict())
    with pytest.raises(ValueError, match=r"x_proj_weight of the checkpoint is \(4, 3, 32\)"):
        small(ssm_ratio=1.0).remap(plain.state_dict())


def test_a_wrong_argument_is_refused_in_a_sentence():
    for arguments, message in (
        (dict(form="v3"), "form is 'v3', expected 'v2' or 'vanilla'"),
        (dict(dims=(8, 16)), r"dims are \[8, 16\] and depths \[2, 2, 2, 1\]"),
        (dict(depths=(1, 0, 1, 1)), "depths is 0, expected at least 1"),
        (dict(in_chans=0), "in_chans is 0"),
        (dict(state=0), "state is 0"),
        (dict(ssm_ratio=0.0), "inner width of a scan is 0"),
        (dict(img_size=(64, 31)), "img_size is 64 x 31, expected sides of at least 32"),
        (dict(global_pool="token"), "global_pool is 'token', expected one of 'avg', 'max', "),
        (dict(num_classes=-1), "num_classes is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            timm.create_model("vmamba_nano", **arguments)
    with pytest.raises(TypeError, match="'class_token' is no argument of vmamba_nano"):
        timm.create_model("vmamba_nano", class_token="middle")
    model = small()
    for shape, message in (
        ((1, 3, 16, 64), "img_size is 16 x 64, expected sides of at least 32"),
        ((1, 1, 64, 64), r"images are \(1, 1, 64, 64\), expected \(batch, 3"),
    ):
        with pytest.raises(ValueError, match=message):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="expected one whose tokens can be reduced"):
        import fambav

        fambav.reduce(model, "tome", 3)
