"""The mixer, in one direction and both."""

import math

import pytest
import torch
import torch.nn.functional as F

from fambav.layers import Mamba
from fambav.ops import scan_aligned
from tests.golden import fill, hashed, load

ARRAYS, _ = load("vim")


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 37])
@pytest.mark.parametrize("kind", ["v2", "v1", "none"])
def test_mixers_agree_with_the_official_ones_at_any_length(kind, length):
    mixer = fill(Mamba(32, bimamba_type=kind))
    out = mixer(hashed(f"mixer:{length}", 2, length, 32))
    torch.testing.assert_close(out, ARRAYS[f"mixer_{kind}/L{length}"], atol=3e-6, rtol=0)


def test_swapping_the_directions_of_v2_reverses_the_sequence():
    mixer, swapped = Mamba(16), Mamba(16)
    names = {
        "A_log": "A_b_log",
        "D": "D_b",
        "conv1d": "conv1d_b",
        "x_proj": "x_proj_b",
        "dt_proj": "dt_proj_b",
    }
    names |= {value: key for key, value in names.items()}
    state = mixer.state_dict()
    swapped.load_state_dict(
        {
            ".".join([names.get(head, head), *tail]): state[".".join([head, *tail])]
            for head, *tail in (key.split(".") for key in state)
        }
    )
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(swapped(x.flip(1)).flip(1), mixer(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("kind", "reaches"), [("v2", True), ("v1", True), ("none", False)])
def test_only_bidirectional_mixers_see_the_tokens_behind(kind, reaches):
    mixer = Mamba(16, bimamba_type=kind)
    x = torch.randn(1, 12, 16, requires_grad=True)
    mixer(x)[0, 0].sum().backward()
    assert bool(x.grad[0, 11].any()) is reaches


def test_dividing_halves_v2_only():
    x = torch.randn(2, 5, 16)
    for kind, factor in (("v2", 2), ("v1", 1), ("none", 1)):
        whole, halved = (Mamba(16, bimamba_type=kind, divide_out=on) for on in (False, True))
        halved.load_state_dict(whole.state_dict())
        torch.testing.assert_close(whole(x), factor * halved(x))


def test_step_sizes_start_spread_from_a_thousandth_to_a_tenth_in_both_directions():
    mixer = Mamba(256)
    for linear in (mixer.dt_proj, mixer.dt_proj_b):
        dt = F.softplus(linear.bias).log10()
        assert -3.001 < dt.min() < -2.9
        assert -1.1 < dt.max() < -0.999
        assert dt.mean().item() == pytest.approx(-2, abs=0.15)
        assert linear.weight.abs().max() <= 16**-0.5
    assert not torch.equal(mixer.dt_proj.bias, mixer.dt_proj_b.bias)


def test_legacy_initialisation_zeroes_the_backward_step_bias_only():
    mixer = Mamba(32, legacy_init=True)
    assert not mixer.dt_proj_b.bias.any()
    assert mixer.dt_proj.bias.all()


def test_parameters_start_as_published():
    mixer = Mamba(256, depth=24)
    for name in ("A_log", "A_b_log"):
        expected = torch.arange(1.0, 17).log().expand(512, 16)
        torch.testing.assert_close(getattr(mixer, name), expected)
    assert (mixer.D == 1).all()
    assert (mixer.D_b == 1).all()
    bounds = {
        "in_proj": 256**-0.5,
        "x_proj": 512**-0.5,
        "x_proj_b": 512**-0.5,
        "dt_proj_b": 16**-0.5,
        "conv1d": 0.5,
        "conv1d_b": 0.5,
        "out_proj": 512**-0.5 / math.sqrt(24),
    }
    for name, bound in bounds.items():
        assert getattr(mixer, name).weight.abs().max().item() == pytest.approx(bound, rel=0.02)


def test_low_precision_keeps_scan_parameters_in_float32(monkeypatch):
    mixer, x = Mamba(64), torch.randn(2, 17, 64)
    exact, scan, seen = mixer(x), scan_aligned.selective_scan, []

    def record(*args, **options):
        seen.append([t.dtype for t in (*args, options["delta_bias"])])
        return scan(*args, **options)

    monkeypatch.setattr(scan_aligned, "selective_scan", record)
    with torch.autocast("cpu", torch.bfloat16):
        rough = mixer(x)
    low, full = torch.bfloat16, torch.float32
    assert seen == [[low, low, full, low, low, full, full]] * 2  # u, dt, A, B, C, D, bias
    assert rough.dtype == low
    assert (rough.float() - exact).norm() < 0.02 * exact.norm()


def test_double_precision_is_kept():
    mixer = Mamba(16).double()
    assert mixer(torch.randn(1, 4, 16, dtype=torch.float64)).dtype == torch.float64


def test_an_unknown_mixer_is_refused_by_name():
    with pytest.raises(ValueError, match="bimamba_type is 'v3', expected a known name"):
        Mamba(16, bimamba_type="v3")
