"""The scan by compiled kernels, as an operator: its gradient, its place under other tools."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fambav.ops.flop_formulas  # noqa: F401  registers the formulas
from fambav.ops import BackendError, force, fused_scan, selective_scan
from tests.ops.agreement import agree, device_of, results, scan_inputs, widened
from tests.ops.places import close

KERNELS = ["triton", "numba"]
FULL = dict(delta_softplus=True, return_last_state=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("dim", "groups", "state"), [(8, 1, 16), (8, 4, 4), (7, 1, 3)])
@pytest.mark.parametrize("length", [1, 5, 17])
@pytest.mark.parametrize("kernels", KERNELS)
def test_every_gradient_agrees_with_the_float64_reference(
    kernels, length, dim, groups, state, reverse
):
    inputs = scan_inputs(2, dim, groups, state, length, device=device_of(kernels))
    got = results(selective_scan, inputs, kernels, **FULL, reverse=reverse)
    want = results(selective_scan, widened(inputs), "reference", **FULL, reverse=reverse)
    assert got["output 0"].stride() == inputs["u"].stride()
    agree(got, want, torch.float32)


def test_low_precision_tokens_keep_a_float32_state():
    inputs = scan_inputs(2, 8, 1, 16, 5, dtype=torch.bfloat16, device=device_of("triton"))
    got = results(selective_scan, inputs, "triton", **FULL)
    assert got["output 0"].dtype == torch.bfloat16
    assert got["output 1"].dtype == torch.float32
    for name, want in results(selective_scan, widened(inputs), "reference", **FULL).items():
        close(got[name].bfloat16(), want)  # sums of what was rounded on the way are no better


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("absent", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
def test_every_option_can_be_left_out(absent, kernels):
    inputs = scan_inputs(2, 8, 1, 4, 5, device=device_of(kernels))
    inputs = {name: x for name, x in inputs.items() if name not in absent}
    inputs["delta"] = inputs["delta"].detach().abs().requires_grad_()
    want = results(selective_scan, widened(inputs), "reference")
    agree(results(selective_scan, inputs, kernels), want, torch.float32)


@pytest.mark.parametrize("kernels", KERNELS)
def test_only_the_state_may_have_a_gradient(kernels):
    inputs = scan_inputs(2, 8, 1, 4, 5, device=device_of(kernels))
    with force(kernels):
        _, state = selective_scan(**inputs, **FULL)
    got = torch.autograd.grad(state.square().sum(), inputs["B"])[0]
    exact = widened(inputs)
    with force("reference"):
        _, state = selective_scan(**exact, **FULL)
    want = torch.autograd.grad(state.square().sum(), exact["B"])[0]
    agree({"B": got}, {"B": want}, torch.float32)


@pytest.mark.parametrize("kernels", KERNELS)
def test_torchs_own_checks_of_an_operator_pass(kernels):
    inputs = scan_inputs(2, 6, 2, 4, 5, device=device_of(kernels))
    options = dict(softplus=True, reverse=True, kernels=kernels, out_dtype=torch.float32, keep=True)
    torch.use_deterministic_algorithms(False)  # what is kept may have places that nobody reads
    torch.library.opcheck(fused_scan._forward, tuple(inputs.values()), options)


@pytest.mark.parametrize("kernels", KERNELS)
def test_without_a_gradient_nothing_is_kept(kernels):
    inputs = scan_inputs(2, 8, 1, 4, 70, device=device_of(kernels))
    options = dict(softplus=True, reverse=False, kernels=kernels, out_dtype=torch.float32)
    *_, kept, before = fused_scan._forward(*inputs.values(), **options, keep=False)
    assert kept.numel() == before.numel() == 0
    *_, kept, before = fused_scan._forward(*inputs.values(), **options, keep=True)
    assert kept.isfinite().all()
    assert kept.numel()
    assert before.shape == inputs["u"].shape


@pytest.mark.parametrize("kernels", KERNELS)
def test_flops_are_counted(kernels):
    inputs = scan_inputs(2, 8, 1, 4, 5, device=device_of(kernels))
    with force(kernels), FlopCounterMode(display=False) as counter:
        selective_scan(**inputs).sum().backward()
    steps = 2 * 8 * 4 * 5
    assert counter.get_total_flops() == steps * (7 + 20)


def test_what_a_set_of_kernels_cannot_do_is_said():
    inputs = scan_inputs(2, 8, 1, 4, 5)
    double = {name: x.detach().double() for name, x in inputs.items()}
    with force("numba"), pytest.raises(BackendError, match="float64, expected float32"):
        selective_scan(**double)
    constant = inputs | dict(B=torch.ones(8, 4))
    with force("numba"), pytest.raises(BackendError, match="the same at all times"):
        selective_scan(**constant)
    groups = inputs | dict(B=torch.ones(2, 2, 4, 5))
    with force("numba"), pytest.raises(BackendError, match="B has 2 groups and C 1"):
        selective_scan(**groups)
    empty = scan_inputs(1, 8, 1, 4, 5) | {
        n: x.detach()[:0] for n, x in inputs.items() if n in ("u", "delta", "B", "C", "z")
    }
    with force("numba"), pytest.raises(BackendError, match="the batch is empty"):
        selective_scan(**empty)
    assert selective_scan(**empty).shape == (0, 8, 5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted kernels are for no GPU")
def test_the_interpreter_runs_only_where_it_is_asked_for(monkeypatch):
    chosen = []
    monkeypatch.setattr(fused_scan, "_forward", lambda *_, kernels, **__: chosen.append(kernels))
    inputs = scan_inputs(1, 2, 1, 2, 3)
    for forced in (None, "triton"):
        with force(forced), pytest.raises(TypeError):  # from unpacking what is not there
            selective_scan(**inputs)
    assert chosen == ["numba", "triton"]
