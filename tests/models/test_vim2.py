"""ViM2's counts, equations and symmetries, and what it refuses.  There is no other code of it."""

import math
import zlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fambav import flops
from fambav.layers import DropPath
from fambav.layers.channel_mixer import STEP, ChannelMixer
from fambav.layers.hierarchy import PatchMerging
from fambav.layers.ss2d import SS2D
from fambav.models import ViM2, VMamba
from fambav.ops import force
from fambav.timm_compat import timm

FORMS = [{}, dict(averaging="softmax", channel_gated=False)]


def small(**arguments):
    torch.manual_seed(0)
    known = dict(dims=(8, 16, 24, 32), depths=(3, 1, 4, 3), img_size=64, num_classes=5, state=4)
    return ViM2(**{**known, **arguments}).eval()


def disturbed(module, scale=0.3):
    """Every parameter has its say."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn_like(parameter)
    return module


def built(name, **arguments):
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def near(found, expected, within=1e-5):
    torch.testing.assert_close(found, expected, rtol=within, atol=within)


def token_mixers(dim, rank):
    """Numbers of a norm and a scan of four paths, state 16, as VMamba's first form has them."""
    return 6 * dim**2 + 8 * dim * (2 * rank + 32) + 144 * dim + 20 * dim + 4 * dim + 2 * dim


def channel_mixers(dim, width):
    """Numbers of two norms, three projections and two scans of 16 channels and state 16."""
    scan = 16 * 4 + 16 * 33 + 16 + 16 + 16 * 16 + 16  # conv, x_proj, dt_proj, its bias, A, D
    return 3 * dim * width + 2 * dim + 2 * width + 2 * scan


def expected_parameters(dims, depths):
    first, last = dims[0], dims[-1]
    number = 48 * first + first + 2 * first + 2 * last + 1000 * last + 1000
    number += sum(4 * dim * (2 * dim + 2) for dim in dims[:-1])
    for dim, depth in zip(dims, depths, strict=True):
        number += depth // 3 * channel_mixers(dim, dim if dim == last else 2 * dim)
        number += depth // 3 * 2 * token_mixers(dim, math.ceil(dim / 16))
        number += depth * (depth + 1) // 2
    return number


@pytest.mark.parametrize(
    ("name", "parameters", "millions", "averages", "literature", "products"),
    [
        ("vim2_tiny", 24_028_807, 24.03, 63, 6.1730, 4.0677),
        ("vim2_small", 43_711_444, 43.71, 396, 11.3123, 7.8520),
        ("vim2_base", 75_624_948, 75.62, 396, 18.2044, 13.5907),
        ("vim2_nano", 1_477_400, 1.48, 24, 0.0138, 0.0054),
    ],
)
def test_parameters_follow_the_formula_and_operations_are_counted(
    name, parameters, millions, averages, literature, products
):
    model = built(name)
    assert expected_parameters(model.dims, model.depths) == parameters
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert round(parameters / 1e6, 2) == millions
    weights = [p for n, p in model.named_parameters() if n.endswith("earlier_weight")]
    assert sum(weight.numel() for weight in weights) == averages
    total = flops.count(model).total
    assert (round(total.literature / 1e9, 4), round(total.multiply_adds / 1e9, 4)) == (
        literature,
        products,
    )


def test_weights_keep_their_names_shapes_and_order():
    state = built("vim2_tiny").state_dict().items()
    found = [f"{name}\t{tuple(value.shape)}" for name, value in state]
    assert zlib.crc32("\n".join(found).encode()) == 1445040727


def test_depths_are_those_of_the_papers_table():
    kinds = {SS2D: "token", ChannelMixer: "channel"}
    for name, third in (("vim2_tiny", 3), ("vim2_small", 9), ("vim2_base", 9)):
        model = built(name)
        for stage, times in zip(model.stages, (1, 1, third, 1), strict=True):
            assert [kinds[type(b.op)] for b in stage] == ["token", "token", "channel"] * times
        widths = [blocks[2].op.out_proj.in_features for blocks in model.stages]
        assert widths == [2 * dim for dim in model.dims[:-1]] + [model.dims[-1]]


def test_at_first_the_averages_are_a_chain_of_residual_mixers():
    model, chain = small(), small(averaging="none")
    state = model.state_dict()
    names = [name for name in state if name not in chain.state_dict()]
    assert len(names) == sum(model.depths)
    assert {name.rsplit(".", 1)[1] for name in names} == {"earlier_weight"} <= {*model.undecayed}
    assert model.no_weight_decay() >= {*names}
    chain.load_state_dict({name: value for name, value in state.items() if name not in names})
    images = torch.randn(2, 3, 32, 40)
    assert torch.equal(model(images), chain(images))


@pytest.mark.parametrize("averaging", ["linear", "softmax"])
def test_a_mixer_reads_the_average_of_all_maps_before_it(averaging):
    blocks = disturbed(small(averaging=averaging)).layers[2].blocks
    maps = [torch.randn(2, 3, 5, 24)]
    for number, block in enumerate(blocks):
        weight = block.earlier_weight
        assert weight.shape == (number + 1,)
        weight = weight.softmax(0) if averaging == "softmax" else weight
        x = torch.einsum("m,mbhwc->bhwc", weight, torch.stack(maps))
        maps.append(x + block.op(block.norm(x)))
    near(blocks(maps[0]), maps[-1], 1e-4)


def test_token_mixers_in_a_chain_are_vmamba():
    sizes = dict(dims=(8, 16, 24, 32), depths=(1, 2, 1, 1), num_classes=5, state=4)
    source = VMamba(**sizes, form="vanilla").eval()
    model = ViM2(**sizes, mixers=("token",), averaging="none").eval()
    names = {"patch_embed.2": "patch_embed.1", "classifier.": ""}
    state = {}
    for name, value in disturbed(source).state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        state[name] = value
    model.load_state_dict(state)
    images = torch.randn(2, 3, 70, 32)
    assert torch.equal(model(images), source(images))


def test_weights_of_a_softmax_start_equal():
    for block in small(averaging="softmax").blocks:
        maps = torch.randn(len(block.earlier_weight), 1, 2, 2, block.norm.weight.numel())
        near(block.average(list(maps)), maps.mean(0))


def one_cell(mixer, cell):
    """A channel mixer by its equations, of one cell, one direction and one step at a time."""
    value, z = (mixer.in_proj.weight @ cell).chunk(2)
    both, state = torch.zeros_like(value), mixer.A_logs.shape[1]
    conv, A, D = (p.unflatten(0, (2, STEP)) for p in (mixer.conv_weight, mixer.A_logs, mixer.Ds))
    for way in range(2):
        x = value.view(-1, STEP)
        x = F.pad(x.flip(0) if way else x, (0, 0, 3, 0))
        h, y = torch.zeros(STEP, state), []
        for step in range(len(x) - 3):
            u = F.silu((x[step : step + 4].T * conv[way]).sum(1))
            dt, B, C = (mixer.x_proj_weight[way] @ u).split((1, state, state))
            delta = F.softplus(mixer.dt_projs_weight[way] @ dt + mixer.dt_projs_bias[way])
            decay = (-delta[:, None] * A[way].exp()).exp()
            h = decay * h + (delta * u)[:, None] * B
            y.append(h @ C + D[way] * u)
        both += torch.stack(y[::-1] if way else y).flatten()
    norm = mixer.out_norm
    both = F.layer_norm(both, norm.normalized_shape, norm.weight, norm.bias)
    return mixer.out_proj.weight @ (both * F.silu(z))


@torch.no_grad()
def test_the_channel_mixer_agrees_with_its_equations_in_each_cell():
    mixer = disturbed(ChannelMixer(12, 5 * STEP, state=4))
    x = torch.randn(2, 2, 3, 12)
    out = mixer(x)
    for place in ((0, 0, 0), (1, 1, 2)):
        near(out[place], one_cell(mixer, x[place]), 1e-4)
    near(mixer(x.flip(1).transpose(1, 2)), out.flip(1).transpose(1, 2))


@torch.no_grad()
def test_channels_from_their_end_and_directions_exchanged_are_the_same_mixer():
    mixer, other = disturbed(ChannelMixer(12, 3 * STEP)), ChannelMixer(12, 3 * STEP)
    backwards = torch.arange(3 * STEP).view(3, STEP).flip(0).flatten()
    for name, parameter in mixer.named_parameters():
        value = parameter.clone()
        if name == "in_proj.weight":
            value = value[torch.cat((backwards, backwards + 3 * STEP))]
        elif name == "out_proj.weight":
            value = value[:, backwards]
        elif name.startswith("out_norm"):
            value = value[backwards]
        else:
            value = value.unflatten(0, (2, -1)).flip(0).reshape(value.shape)
        other.get_parameter(name).copy_(value)
    x = torch.randn(2, 2, 2, 12)
    near(other(x), mixer(x), 1e-4)


@torch.no_grad()
def test_an_image_across_its_diagonal_is_classified_alike_when_rows_and_columns_are_exchanged():
    model, other = disturbed(small(), 0.05), disturbed(small(), 0.05)
    for module in other.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.copy_(module.weight.mT.clone())
        elif isinstance(module, SS2D):
            for p in (module.x_proj_weight, module.dt_projs_weight, module.dt_projs_bias):
                p.copy_(p[[1, 0, 3, 2]])
            for p in (module.A_logs, module.Ds):
                p.copy_(p.unflatten(0, (4, -1))[[1, 0, 3, 2]].flatten(0, 1))
        elif isinstance(module, PatchMerging):  # upper left, lower left, upper right, lower right
            for p in (module.norm.weight, module.norm.bias, module.reduction.weight):
                p.copy_(p.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].flatten(-2))
    images = torch.randn(2, 3, 40, 68)
    assert (model(images) - other(images)).abs().max() > 1e-2
    near(other(images.mT), model(images), 1e-4)


class Scans(TorchDispatchMode):
    """Counts the calls of the scan."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += "chunked_scan" in str(function)
        return function(*args, **kwargs or {})


@torch.no_grad()
def test_every_mixer_is_one_scan():
    model = small()
    with force("cpu"), Scans() as scans:
        model(torch.randn(1, 3, 32, 32))
    assert scans.calls == len(model.blocks) == 11


def test_every_size_of_an_image_gives_the_maps_that_the_model_describes():
    for size in ((32, 32), (70, 101), (33, 64)):
        model = small(img_size=size)
        maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
        assert [tuple(x.shape[2:]) for x in maps] == [stage.grid for stage in model.info.stages]
    part = timm.create_model("vim2_nano", features_only=True, out_indices=(0, 2), out_norms=True)
    maps = part(torch.randn(1, 3, 48, 36))
    assert [tuple(x.shape[1:]) for x in maps] == [(24, 12, 9), (96, 3, 3)]
    sum(x.square().sum() for x in maps).backward()
    assert [name for name, p in part.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("how", FORMS)
def test_checkpointing_changes_no_gradient(how):
    grads = []
    for enable in (False, True):
        model = small(**how, drop_path_rate=0.3).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        (model(torch.ones(2, 3, 32, 32)) * torch.arange(5)).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_drop_path_rises_from_mixer_to_mixer():
    model = small(depths=(1, 3, 1, 1), drop_path_rate=0.5)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


@torch.no_grad()
@pytest.mark.parametrize("how", FORMS)
def test_low_precision_is_finite_and_close(how):
    model, batch = small(**how), torch.randn(2, 3, 40, 32)
    exact = model(batch)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            found = model(batch).float()
        assert (found - exact).abs().max() < 0.05 * exact.abs().max()
        assert small(**how).to(dtype)(batch.to(dtype)).isfinite().all()


def test_a_wrong_argument_is_refused_in_a_sentence():
    for arguments, message in (
        (dict(mixers=("token", "mlp")), r"mixers is \('token', 'mlp'\), expected a sequence of"),
        (dict(mixers="token"), "mixers is 'token', expected a sequence of 'token' and 'channel'"),
        (dict(mixers=()), r"mixers is \(\), expected a sequence"),
        (dict(averaging="mean"), "averaging is 'mean', expected 'linear' or 'softmax' or 'none'"),
        (dict(channel_dims=(48, 96, 192)), r"channel_dims are \[48, 96, 192\], expected a multi"),
        (dict(channel_dims=(48, 96, 192, 200)), "expected a multiple of 16 for each of 4 stages"),
        (dict(dims=(24, 48, 96, 200)), r"channel_dims are \[48, 96, 192, 200\], expected a mult"),
        (dict(img_size=(64, 31)), "img_size is 64 x 31, expected sides of at least 32"),
    ):
        with pytest.raises(ValueError, match=message):
            built("vim2_nano", **arguments)
    with pytest.raises(ValueError, match="width of a channel mixer is 40, expected a multiple of"):
        ChannelMixer(8, 40)
    with pytest.raises(TypeError, match="'channel_dim' is no argument of vim2_nano; did you mean"):
        built("vim2_nano", channel_dim=(1,))
