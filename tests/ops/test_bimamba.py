"""The bidirectional Mamba operation: what it computes, and what it refuses."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fambav.ops.flop_formulas  # noqa: F401  registers the formulas
from fambav.ops import BackendError, Direction, bimamba_scan, force, fused_bimamba
from tests.ops.agreement import (
    CHAINED,
    agree,
    agrees_twice,
    device_of,
    draw,
    every_length,
    widened,
)

KERNELS = ["triton", "numba"]
DIM, RANK, STATE, WIDTH = 8, 3, 4, 4
SHAPES = Direction(
    *((DIM, WIDTH), (DIM,), (RANK + 2 * STATE, DIM), (DIM, RANK), (DIM,), (DIM, STATE), (DIM,))
)


def inputs(length, *, batch=2, dtype=torch.float32, device="cpu", out=6, shapes=SHAPES):
    """Every tensor by name; of A, what it is the negative exponential of."""
    dim = shapes.D[0]
    made = dict(xz=draw("xz", batch, length, 2 * dim, dtype=dtype, device=device))
    for end in ("f", "b"):
        for name, shape in shapes._asdict().items():
            made[f"{name}_{end}"] = draw(f"{name}_{end}", *shape, device=device)
    if out:
        made["out_proj"] = draw("out_proj", out, dim, device=device)
    return made


def run(tensors, **options):
    """Call the operation with tensors by name; gaps are options."""
    ends = (Direction(*(tensors[f"{n}_{end}"] for n in Direction._fields)) for end in ("f", "b"))
    forward, backward = (end._replace(A=-end.A.exp()) for end in ends)
    return bimamba_scan(tensors["xz"], forward, backward, tensors.get("out_proj"), **options)


def results(tensors, backend, **options):
    """The output, and the gradient of every input by its name."""
    with force(backend):
        y = run(tensors, **options)
    weight = draw("grad", *y.shape).detach().bfloat16().to(y)
    grads = torch.autograd.grad(y, list(tensors.values()), weight)
    return {"output": y.detach()} | dict(zip(tensors, grads, strict=True))


@pytest.mark.parametrize("length", [1, 5, 17])
@pytest.mark.parametrize("kernels", KERNELS)
def test_every_gradient_agrees_with_the_float64_reference(kernels, length):
    tensors = inputs(length, device=device_of(kernels))
    got = results(tensors, kernels, scale=0.5)
    assert got["output"].shape == (2, length, 6)
    agree(got, results(widened(tensors), "reference", scale=0.5), torch.float32)


@every_length((2, torch.float32))
def test_every_length_agrees(length, dtype, record_property):
    shapes = Direction((40, 4), (40,), (35, 40), (40, 3), (40,), (40, 16), (40,))
    tensors = inputs(length, dtype=dtype, device=device_of("triton"), out=24, shapes=shapes)
    for name, x in tensors.items():  # as a layer under autocast hands them over
        low = name[:4] in ("conv", "x_pr", "dt_p", "out_")
        scaled = x.detach() / (x.shape[1] ** 0.5 if low and x.dim() == 2 else 1)
        tensors[name] = scaled.to(dtype if low or name == "xz" else torch.float32).requires_grad_()
    want = results(widened(tensors), "reference", scale=0.5)
    run = partial(results, tensors, "triton", scale=0.5)
    agrees_twice(run, want, dtype, record_property, CHAINED)


def with_gap(tensors, policy):
    """Add gaps to the tensors of a call, sums of step sizes as a leaf."""
    batch, length, width = tensors["xz"].shape
    if policy == "cached":
        gap = draw("gap", 2, batch, length, width // 2).detach().relu()
        return tensors | dict(skipped_dt=gap.to(tensors["xz"].device).requires_grad_())
    count = torch.arange(2 * batch * length, device=tensors["xz"].device) % 4
    return tensors | dict(skipped=count.view(2, batch, length))


def everything(tensors, backend, policy, want):
    """Results, intermediates and all gradients, also of the step sizes, by name."""
    tensors = with_gap(tensors, policy)
    gaps = {n: tensors.get(n) for n in ("skipped", "skipped_dt")}
    with force(backend):
        y, found = run(tensors, **gaps, gap_policy=policy, scale=0.5, want=want)
    outputs = [y, *(found[n] for n in ("delta",) if n in found)]
    weights = [draw(f"grad {x.dim()}", *x.shape).detach().bfloat16().to(x) for x in outputs]
    leaves = {n: x for n, x in tensors.items() if x.requires_grad}
    grads = torch.autograd.grad(outputs, list(leaves.values()), weights)
    made = {f"made {n}": x.detach() for n, x in found.items()}
    return dict(zip(leaves, grads, strict=True)) | made | dict(output=y.detach())


@pytest.mark.parametrize("policy", ["bias", "hold_prev", "self", "cached", "none"])
@pytest.mark.parametrize(("kernels", "length"), [("numba", 35), ("triton", 18)])
def test_gaps_and_what_is_returned_agree_with_the_float64_reference(kernels, length, policy):
    tensors = inputs(length, device=device_of(kernels))
    want = ("gated", "delta", "B", "C")
    got = everything(tensors, kernels, policy, want)
    agree(got, everything(widened(tensors), "reference", policy, want), torch.float32)


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
@pytest.mark.parametrize("score", fused_bimamba.SCORES)
def test_scores_are_sums_over_channels_without_a_gradient(backend, score):
    tensors = inputs(5, device=device_of(backend))
    with force(backend):
        y, found = run(tensors, want=(score,))
        assert torch.equal(y, run(tensors))
    with force("reference"):
        wide = widened(tensors)
        exact = run(wide, want=(score,))[1]
    assert found.keys() == exact.keys() == {score}
    assert not found[score].requires_grad
    assert found[score].dtype == torch.float32
    agree(found, exact, torch.float32)
    each = [run_one_way(wide, end) for end in (0, 1)]
    gate = F.silu(wide["xz"].chunk(2, dim=-1)[1]) if score.startswith("gated") else 1
    terms = torch.stack(each) * gate
    terms = terms if score.endswith("unclipped") else terms.clamp(min=0)
    torch.testing.assert_close(exact[score], terms.sum(dim=-1).detach())


def run_one_way(tensors, end):
    """The scan of one direction: the other has no skip and no C."""
    mute = "bf"[end]
    x, z = tensors["xz"].chunk(2, dim=-1)
    open_to = torch.cat((x, torch.full_like(z, 60.0)), dim=-1)  # silu(60) is 60
    silent = {f"D_{mute}": torch.zeros(DIM).double()}
    rows = tensors[f"x_proj_{mute}"].detach().clone()
    rows[RANK + STATE :] = 0
    alone = tensors | silent | {f"x_proj_{mute}": rows, "xz": open_to}
    del alone["out_proj"]
    with force("reference"):
        return run(alone) / 60


def test_gaps_in_bfloat16_are_within_its_rounding_of_the_float64_reference():
    tensors = inputs(9, device=device_of("triton"))
    low = dict(tensors, xz=tensors["xz"].detach().bfloat16().requires_grad_())
    got = everything(low, "triton", "bias", ("gated",))
    for name, exact in everything(widened(low), "reference", "bias", ("gated",)).items():
        assert (got[name].double() - exact).norm() < 0.04 * exact.norm(), name


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_step_sizes_alone_have_gradients(kernels):
    tensors = inputs(5, device=device_of(kernels))

    def through(tensors, backend):
        with force(backend):
            delta = run(tensors, want=("delta",))[1]["delta"]
        return torch.autograd.grad(delta.sum(), [tensors["xz"], tensors["dt_bias_b"]])

    pairs = zip(through(tensors, kernels), through(widened(tensors), "reference"), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got.cpu(), want.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_gap_that_is_not_a_number_reaches_what_is_scanned_behind_it(kernels):
    tensors = inputs(5, device=device_of(kernels))
    count = torch.zeros(2, 2, 5, device=tensors["xz"].device)
    count[0, 1, 3] = torch.nan
    with force(kernels):
        y, found = run(tensors, skipped=count, gap_policy="self", want=("gated",))
    assert y[0].isfinite().all()
    assert y[1].isnan().all(dim=1).tolist() == [False, False, False, True, True]
    assert found["gated"].isnan().nonzero().tolist() == [[0, 1, 3], [0, 1, 4]]


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_long_sequence_passes_many_chunks(kernels):
    tensors = inputs(70, batch=1, device=device_of(kernels))
    agree(results(tensors, kernels), results(widened(tensors), "reference"), torch.float32)


@pytest.mark.parametrize("kernels", KERNELS)
def test_nothing_is_filled_with_zeros_for_tensors_that_have_no_gradient(kernels):
    tensors = inputs(5, device=device_of(kernels))
    with force(kernels):
        y = run(tensors)
    filled = []

    class Filled(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.zeros, torch.ops.aten.zeros_like):
                filled.append(tuple(out.shape))
            return out

    with Filled():
        torch.autograd.grad(y, list(tensors.values()), torch.ones_like(y))
    assert not [shape for shape in filled if len(shape) > 2]


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_last_projection_can_be_left_out(kernels):
    tensors = inputs(5, out=0, device=device_of(kernels))
    got = results(tensors, kernels)
    assert got["output"].shape == (2, 5, DIM)
    agree(got, results(widened(tensors), "reference"), torch.float32)


@pytest.mark.parametrize("kernels", KERNELS)
def test_parameters_may_be_views_and_the_input_a_slice(kernels):
    tensors = inputs(5, device=device_of(kernels))
    want = results(tensors, kernels)
    wide = F.pad(tensors["xz"].detach(), (3, 5))
    views = {
        name: x.detach().movedim(0, -1).contiguous().movedim(-1, 0).requires_grad_()
        for name, x in tensors.items()
        if name != "xz"
    }
    got = results(dict(xz=wide[..., 3:-5].requires_grad_()) | views, kernels)
    agree(got, {name: x.cpu().double() for name, x in want.items()}, torch.float32)


def test_autocast_makes_tokens_low_and_leaves_the_scan_alone():
    device = device_of("triton")
    tensors = inputs(5, device=device)
    with torch.autocast(device, torch.bfloat16):
        got = results(tensors, "triton")
    assert got["output"].dtype == torch.bfloat16
    assert all(got[n].dtype == torch.float32 for n in tensors)
    for name, want in results(tensors, "triton").items():
        error = (got[name].double() - want.double()).norm()
        assert error < 0.03 * want.double().norm(), name


def test_swapping_directions_is_flipping_the_sequence():
    tensors = inputs(7, device="cpu")
    swapped = {n[:-1] + "fb"[n[-1] == "f"] if n[-2] == "_" else n: x for n, x in tensors.items()}
    swapped["xz"] = tensors["xz"].flip(1)
    for backend in ("numba", "reference"):
        with force(backend):
            torch.testing.assert_close(run(swapped).flip(1), run(tensors))


@pytest.mark.parametrize("kernels", KERNELS)
def test_torchs_own_checks_of_the_operator_pass(kernels):
    tensors = inputs(5, device=device_of(kernels))
    for end in ("f", "b"):
        tensors[f"A_{end}"] = (-tensors[f"A_{end}"].exp()).detach().requires_grad_()
    options = dict(scale=0.5, gap_policy="cached", kernels=kernels, keep=True)
    options |= dict(score="gated", return_dt=True)
    given = *tensors.values(), None, draw("gap", 2, 2, 5, DIM, device=device_of(kernels))
    torch.use_deterministic_algorithms(False)  # what is kept may have places that nobody reads
    torch.library.opcheck(fused_bimamba._forward, given, options)


@pytest.mark.parametrize("kernels", KERNELS)
def test_equal_calls_give_equal_bits(kernels):
    tensors = inputs(17, device=device_of(kernels))
    first, second = (results(tensors, kernels) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@pytest.mark.parametrize("kernels", KERNELS)
def test_not_a_number_comes_out_where_it_went_in(kernels):
    tensors = inputs(5, device=device_of(kernels))
    tensors["xz"].data[1, 2, 0] = torch.nan
    with force(kernels):
        y = run(tensors)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


def test_flops_are_those_of_the_products_the_convolutions_and_the_steps():
    tensors = inputs(5)
    with force("numba"), FlopCounterMode(display=False) as counter:
        y = run(tensors)
    tokens = 2 * 5
    rows = DIM * (RANK + 2 * STATE) + DIM * RANK
    want = tokens * (2 * 2 * rows + 2 * 6 * DIM + 2 * 2 * WIDTH * DIM + 2 * 7 * DIM * STATE)
    assert counter.get_total_flops() == want
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert 2 * want < counter.get_total_flops() < 4 * want


def test_what_is_forced_for_the_scan_is_forced_here(monkeypatch):
    seen = []

    def forward(xz, *_, kernels, **__):
        seen.append(kernels)
        return [xz] * 6

    monkeypatch.setattr(fused_bimamba, "_forward", forward)
    tensors = inputs(3)
    for forced in ("numba", "triton"):
        with force(forced):
            run(tensors)
    for forced in ("cpu", "reference"):
        with force(forced):
            assert run(tensors).shape == (2, 3, 6)
    assert seen == ["numba", "triton"]
    with force("cpu"), force("numba", "bimamba_scan"):
        run(tensors)
    assert seen[2:] == ["numba"]


def test_backends_that_cannot_run_say_why():
    double = {name: x.detach().double() for name, x in inputs(3).items()}
    told = "backend 'numba' of bimamba_scan cannot run: a tensor is torch.float64, expected float32"
    with force("numba"), pytest.raises(BackendError, match=told):
        run(double)
    assert run(double).dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(xz=torch.ones(2, 0, 16)), r"xz has shape \(2, 0, 16\), expected \(batch, length"),
        (dict(xz=torch.ones(2, 3, 15)), r"xz has shape \(2, 3, 15\), expected"),
        (dict(xz=torch.ones(3, 16)), r"xz has shape \(3, 16\), expected"),
        (
            dict(xz=torch.ones(2, 3, 18)),
            r"forward.conv_weight has shape \(8, 4\), expected \(9, 4\)",
        ),
        (dict(D_b=torch.ones(7)), r"backward.D has shape \(7,\), expected \(8,\)"),
        (dict(A_b=torch.ones(8, 5)), r"backward.A has shape \(8, 5\), expected \(8, 4\)"),
        (dict(x_proj_f=torch.ones(9, 8)), r"forward.x_proj has shape \(9, 8\), expected \(11, 8\)"),
        (
            dict(xz=torch.ones(2, 3, 16).long()),
            "xz is torch.int64, expected a floating-point dtype",
        ),
        (dict(A_f=torch.ones(8, 4, device="meta")), "forward.A is on meta, expected cpu"),
        (dict(out_proj=torch.ones(6, 7)), r"out_proj has shape \(6, 7\), expected \(6, 8\)"),
    ],
)
def test_wrong_shapes_are_refused_by_name(changes, told):
    with pytest.raises(ValueError, match=told):
        run(inputs(3) | changes)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(want=("gatet",)), "want is 'gatet', expected a known name; did you mean 'gated'"),
        (dict(want=("gated", "ungated")), "want is gated and ungated, expected one score"),
        (dict(gap_policy="holdprev"), "gap_policy is 'holdprev', expected a known name"),
        (dict(skipped=torch.ones(2, 3)), r"skipped has shape \(2, 3\), expected \(2, 2, 3\)"),
        (
            dict(skipped_dt=torch.ones(2, 2, 3, 7)),
            r"skipped_dt has shape \(2, 2, 3, 7\), expected \(2, 2, 3, 8\)",
        ),
    ],
)
def test_unknown_names_and_gaps_that_do_not_fit_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        run(inputs(3), **options)
