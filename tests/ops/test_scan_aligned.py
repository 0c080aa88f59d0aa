"""The scan across gaps: what a scan over all tokens gives where some of them say nothing."""

import functools

import pytest
import torch
import torch.nn.functional as F

from fambav.ops import BackendError, force, scan_aligned, selective_scan
from fambav.ops.scan_aligned import (
    carry_skipped_dt,
    count_skipped,
    estimate_skipped_dt,
)
from fambav.registry import GAP_POLICIES
from tests import golden
from tests.ops.agreement import TOLERANCE, agree, device_of, draw, results, widened
from tests.ops.kept import at, in_order, some_places
from tests.ops.places import close

ARRAYS, TOLD = golden.load("align")
EXACT, SINGLE = (TOLD["tolerance"][f"float{bits}_abs"] for bits in (64, 32))
DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["fwd", "bwd"])
POLICIES = pytest.mark.parametrize("policy", GAP_POLICIES)
ESTIMATES = pytest.mark.parametrize("policy", ["bias", "hold_prev", "self"])


def aligned_scan(*tensors, **options):
    """The result alone."""
    return scan_aligned.aligned_scan(*tensors, **options)[0]


def tokens_of(case, batch, dim, state, length):
    """The inputs of a golden case, channels last, float64; delta is after bias and softplus."""

    def made(name, *shape):
        return golden.hashed(f"align:{case}:{name}", *shape).double()

    bias = made("bias", dim) - 1
    delta = F.softplus(made("delta", batch, dim, length) + bias[:, None])
    return bias, dict(
        u=made("u", batch, dim, length).mT,
        delta=delta.mT,
        A=-made("A", dim, state).exp(),
        B=made("B", batch, state, length).mT,
        C=made("C", batch, state, length).mT,
        D=made("D", dim),
    )


def golden_case(case):
    """Inputs of one prune, the bias of the step size and the tokens that stay."""
    batch, dim, state, length = (TOLD["cases"][case][n] for n in ("B", "E", "N", "L"))
    bias, inputs = tokens_of(case, batch, dim, state, length)
    return inputs, bias, ARRAYS[f"{case}/keep"].long()


def taken(inputs, keep):
    """Inputs of the tokens that stay."""
    rows = {n: inputs[n] for n in ("u", "delta", "B", "C")}
    return inputs | {n: at(x, keep) for n, x in rows.items()}


def gap_of(policy, inputs, bias, keep, *, reverse):
    """The gap after one prune of a whole sequence."""
    delta = inputs["delta"]
    if policy == "cached":
        return carry_skipped_dt(delta, None, keep, in_order(delta.shape[1], reverse=reverse))
    return estimate_skipped_dt(
        policy,
        delta=at(delta, keep),
        skipped=count_skipped(keep, reverse=reverse),
        bias=bias,
        reverse=reverse,
    )


def dense(inputs, keep, reverse):
    """Scan all tokens one by one in float64; those that are gone only let the state decay."""
    u, delta, B, C = (inputs[n].double().unbind(1) for n in ("u", "delta", "B", "C"))
    A, D = inputs["A"].double(), inputs["D"].double()
    stays = torch.zeros(inputs["u"].shape[:2]).scatter(1, keep, 1.0).double().unbind(1)
    h = torch.zeros(len(u[0]), *A.shape, dtype=torch.float64)
    y = [None] * len(u)
    for t in reversed(range(len(u))) if reverse else range(len(u)):
        drive = (delta[t] * u[t] * stays[t][:, None])[..., None] * B[t][:, None]
        h = (delta[t][..., None] * A).exp() * h + drive
        y[t] = (h * C[t][:, None]).sum(dim=2) + D * u[t]
    return at(torch.stack(y, dim=1), keep)


def random_tokens(batch, dim, state, length, dtype=torch.float32, device="cpu"):
    """Inputs as leaves, and a gap that is 0 for some tokens."""
    wide = torch.promote_types(dtype, torch.float32)
    made = functools.partial(draw, dtype=dtype, device=device)
    channels = functools.partial(draw, dtype=wide, device=device)
    gap = F.relu(channels("gap", batch, length, dim).detach())
    return dict(
        u=made("u", batch, length, dim),
        delta=F.softplus(made("delta", batch, length, dim)).detach().requires_grad_(),
        A=(-channels("A", dim, state).detach().exp()).requires_grad_(),
        B=made("B", batch, length, state),
        C=made("C", batch, length, state),
        D=channels("D", dim),
        skipped_dt=gap.requires_grad_(),
    )


@DIRECTIONS
@POLICIES
@pytest.mark.parametrize("case", ["a", "one", "all"])
def test_the_golden_scans_are_met_under_every_policy(case, policy, reverse):
    inputs, bias, keep = golden_case(case)
    gap = gap_of(policy, inputs, bias, keep, reverse=reverse)
    want = ARRAYS[f"{case}/{policy}/{'bwd' if reverse else 'fwd'}/y"].mT
    given = taken(inputs, keep) | dict(D=None)
    for dtype, tolerance in [(torch.float64, EXACT), (torch.float32, SINGLE)]:
        cast = {n: None if x is None else x.to(dtype) for n, x in given.items()}
        step = None if gap is None else gap.to(dtype)
        got = aligned_scan(**cast, skipped_dt=step, reverse=reverse)
        assert got.dtype == dtype
        assert (got - want).abs().max() <= tolerance


@DIRECTIONS
@POLICIES
def test_the_golden_gaps_are_met(policy, reverse):
    inputs, bias, keep = golden_case("a")
    gap = gap_of(policy, inputs, bias, keep, reverse=reverse)
    want = ARRAYS[f"a/{policy}/{'bwd' if reverse else 'fwd'}/gap"].mT
    assert (torch.zeros_like(want) if gap is None else gap).sub(want).abs().max() <= EXACT


@DIRECTIONS
def test_skip_and_gate_are_those_of_the_input_itself(reverse):
    inputs, bias, keep = golden_case("a")
    gap = gap_of("cached", inputs, bias, keep, reverse=reverse)
    y = aligned_scan(**taken(inputs, keep), skipped_dt=gap, reverse=reverse)
    z = at(golden.hashed("align:a:z", 2, 6, 24).double().mT, keep)
    want = ARRAYS[f"a/cached/{'bwd' if reverse else 'fwd'}/y_gated"].mT
    assert (y * F.silu(z) - want).abs().max() <= EXACT


@DIRECTIONS
def test_the_golden_gradients_are_met_where_tokens_are_gone_too(reverse):
    inputs, bias, keep = golden_case("a")
    leaves = {n: inputs[n].detach().requires_grad_() for n in ("u", "delta", "A", "B", "C")}
    gap = gap_of("cached", leaves, bias, keep, reverse=reverse)
    y = aligned_scan(**taken(leaves, keep), D=None, skipped_dt=gap, reverse=reverse)
    loss = (y.mT * golden.hashed("align:a:gout", 2, 6, 10).double()).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    prefix = f"a/cached/{'bwd' if reverse else 'fwd'}/grad_"
    for name, got in zip(("u", "dl", "A", "B", "C"), found, strict=True):
        want = ARRAYS[prefix + name]
        assert ((got if name == "A" else got.mT) - want).abs().max() <= EXACT, name


@DIRECTIONS
def test_a_gap_is_handed_on_from_layer_to_layer_as_in_the_golden_numbers(reverse):
    direction = "bwd" if reverse else "fwd"
    keep = ARRAYS["nest/keep1"].long()
    _, inputs = tokens_of("nest1", 2, 5, 4, 30)
    gap = carry_skipped_dt(inputs["delta"], None, keep, in_order(30, reverse=reverse))
    for layer, length in ((2, 18), (3, 9)):
        _, inputs = tokens_of(f"nest{layer}", 2, 5, 4, length)
        y = aligned_scan(**inputs | dict(D=None), skipped_dt=gap, reverse=reverse)
        assert (y - ARRAYS[f"nest/{direction}/y{layer}"].mT).abs().max() <= EXACT
        want = ARRAYS[f"nest/{direction}/gap{layer}"].mT
        rest = slice(0, -1) if reverse else slice(1, None)  # the first one's changes nothing
        assert (gap - want)[:, rest].abs().max() <= EXACT
        if layer == 2:
            stays = ARRAYS["nest/keep2_in_current"].long()
            gap = carry_skipped_dt(inputs["delta"], gap, stays, in_order(18, reverse=reverse))


@DIRECTIONS
@pytest.mark.parametrize(("length", "kept"), [(1, 1), (2, 1), (17, 5), (64, 32)])
def test_a_scan_over_all_tokens_agrees_forward_and_backward(length, kept, reverse):
    inputs = random_tokens(3, 5, 4, length, torch.float64)
    del inputs["skipped_dt"]
    keep = some_places(3, length, kept)

    def compact(**given):
        gap = gap_of("cached", given, None, keep, reverse=reverse)
        return aligned_scan(**taken(given, keep), skipped_dt=gap, reverse=reverse)

    def whole(**given):
        return dense(given, keep, reverse)

    got, want = (results(scan, inputs, "reference") for scan in (compact, whole))
    for name, expected in want.items():
        torch.testing.assert_close(got[name], expected, rtol=1e-10, atol=1e-10, msg=name)


@DIRECTIONS
@POLICIES
def test_where_nothing_is_gone_the_scan_is_the_plain_one(policy, reverse):
    inputs = random_tokens(2, 6, 4, 9)
    del inputs["skipped_dt"]
    keep = torch.arange(9).expand(2, 9)
    gap = gap_of(policy, inputs, draw("bias", 6), keep, reverse=reverse)
    assert gap is None if policy == "none" else not gap.any()
    y = aligned_scan(**inputs, skipped_dt=gap, reverse=reverse)
    by_token = {n: inputs[n].mT for n in ("u", "delta", "B", "C")}
    plain = selective_scan(**inputs | by_token, reverse=reverse).mT
    torch.testing.assert_close(y, plain, rtol=1e-6, atol=1e-6)


@DIRECTIONS
def test_the_gap_of_the_token_scanned_first_changes_nothing(reverse):
    inputs = random_tokens(2, 6, 4, 5, torch.float64)
    first = -1 if reverse else 0
    gap = inputs.pop("skipped_dt").detach()
    other = gap.clone()
    other[:, first] += 3.0
    y, same = (aligned_scan(**inputs, skipped_dt=g, reverse=reverse) for g in (gap, other))
    torch.testing.assert_close(y, same, rtol=1e-13, atol=1e-13)


def exact_form(u, delta, A, B, C, D, skipped_dt, reverse):
    """The recurrence as it is written, in float64."""
    y = [None] * u.shape[1]
    h = 0
    for t in reversed(range(len(y))) if reverse else range(len(y)):
        decay = ((delta[:, t] + skipped_dt[:, t])[..., None] * A).exp()
        h = decay * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        y[t] = (h * C[:, t, None]).sum(dim=2) + D * u[:, t]
    return torch.stack(y, dim=1)


@DIRECTIONS
@pytest.mark.parametrize("length", [1, 5, 17])
@pytest.mark.parametrize("backend", ["triton", "numba", "cpu", "reference"])
def test_every_backend_agrees_with_the_recurrence_in_float64(backend, length, reverse):
    inputs = random_tokens(2, 8, 4, length, device=device_of(backend))
    got = results(aligned_scan, inputs, backend, reverse=reverse)
    want = results(exact_form, widened(inputs), "reference", reverse=reverse)
    if length == 1:  # nothing decays: what is left of gradients that cancel is measured in those
        for name in ("gradient of A", "gradient of skipped_dt"):
            assert got.pop(name).abs().max() <= 1e-6
            del want[name]
    agree(got, want, torch.float32)


@DIRECTIONS
@pytest.mark.parametrize("backend", ["triton", "cpu", "reference", None])
def test_low_precision_tokens_are_rounded_once(backend, reverse):
    inputs = random_tokens(2, 8, 4, 17, torch.bfloat16, device_of(backend))
    got = results(aligned_scan, inputs, backend, reverse=reverse)
    assert got["output 0"].dtype == torch.bfloat16
    assert all(got[f"gradient of {n}"].dtype == x.dtype for n, x in inputs.items())
    want = results(exact_form, widened(inputs), "reference", reverse=reverse)
    for name in ("output 0", "gradient of u", "gradient of delta", "gradient of B"):
        close(got[name], want[name])
    error = (got["gradient of skipped_dt"].cpu() - want["gradient of skipped_dt"]).abs().max()
    assert error <= TOLERANCE[torch.float32] * want["gradient of skipped_dt"].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e-12])
def test_a_step_of_nothing_across_a_gap_of_nothing_has_the_gradients_of_the_recurrence(size, dtype):
    inputs = random_tokens(2, 6, 4, 5, dtype)
    inputs["delta"].data[:, 1:3] = size
    inputs["skipped_dt"].data[:, 2:4] = 0
    got = results(aligned_scan, inputs, "reference")
    want = results(exact_form, widened(inputs), "reference", reverse=False)
    agree(got, want, dtype)


def counted(tensors, policy, **options):
    """A scan from raw step sizes over counted gaps, and the step sizes."""
    tensors = dict(tensors)
    skipped, bias = tensors.pop("skipped"), tensors.pop("bias")
    return scan_aligned.aligned_scan(
        **tensors, skipped=skipped, gap_policy=policy, delta_bias=bias, delta_softplus=True,
        return_dt=True, **options,
    )  # fmt: skip


def counted_exactly(tensors, policy, *, reverse):
    """The same by the formulas."""
    tensors = dict(tensors)
    skipped, bias = tensors.pop("skipped"), tensors.pop("bias")
    tensors["delta"] = F.softplus(tensors["delta"] + bias)
    given = dict(delta=tensors["delta"], skipped=skipped, bias=bias)
    gap = estimate_skipped_dt(policy, **given, reverse=reverse)
    return exact_form(**tensors, skipped_dt=gap, reverse=reverse), tensors["delta"]


@DIRECTIONS
@ESTIMATES
@pytest.mark.parametrize("backend", ["triton", "numba", "reference"])
def test_counted_gaps_agree_with_the_recurrence_in_float64(backend, policy, reverse):
    device, length = device_of(backend), 35 if backend == "numba" else 17
    leaves = random_tokens(2, 8, 4, length, device=device) | dict(bias=draw("bias", 8))
    del leaves["skipped_dt"]
    leaves |= dict(bias=leaves["bias"].detach().to(device).requires_grad_())
    skipped = torch.arange(2 * length, device=device).view(2, length) % 4
    found = []
    for function, inputs in ((counted, leaves), (counted_exactly, widened(leaves))):

        def run(function=function, **tensors):
            here = skipped.to(tensors["u"].device)
            return function(tensors | dict(skipped=here), policy, reverse=reverse)

        found.append(results(run, inputs, backend if function is counted else "reference"))
    agree(*found, torch.float32)


def test_gaps_that_make_no_sense_are_refused():
    inputs = random_tokens(2, 6, 4, 5)
    counts = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="skipped_dt is given beside skipped, expected one"):
        aligned_scan(**inputs, skipped=counts)
    gap = inputs.pop("skipped_dt")
    with pytest.raises(ValueError, match=r"skipped has shape \(2, 4\), expected \(2, 5\)"):
        aligned_scan(**inputs, skipped=counts[:, 1:], gap_policy="self")
    with pytest.raises(ValueError, match="gap_policy is 'cached', expected skipped_dt"):
        aligned_scan(**inputs, skipped=counts, gap_policy="cached")
    with pytest.raises(ValueError, match="gap_policy is 'bias', expected delta_bias"):
        aligned_scan(**inputs, skipped=counts, gap_policy="bias")
    with pytest.raises(ValueError, match=r"gap_policy is 'selv'.*did you mean 'self'"):
        aligned_scan(**inputs, skipped_dt=gap, gap_policy="selv")


def test_a_scan_without_a_gap_is_the_plain_scan_to_the_last_bit():
    inputs = random_tokens(2, 8, 4, 9)
    by_token = {n: inputs[n].mT for n in ("u", "delta", "B", "C")}
    del inputs["skipped_dt"]
    assert aligned_scan(**inputs, skipped_dt=None).equal(selective_scan(**inputs | by_token).mT)


def test_tokens_are_not_moved_in_memory():
    inputs = random_tokens(2, 8, 4, 9)
    assert aligned_scan(**inputs).is_contiguous()
    assert aligned_scan(**inputs | dict(skipped_dt=None)).is_contiguous()


def test_a_backend_that_is_forced_and_cannot_run_says_so():
    inputs = random_tokens(1, 2, 2, 3, torch.float64)
    with force("numba"), pytest.raises(BackendError, match="float64, expected float32"):
        aligned_scan(**inputs)


@pytest.mark.parametrize("name", ["delta", "A", "B", "C", "D", "skipped_dt"])
def test_a_tensor_that_does_not_fit_is_named(name):
    inputs = random_tokens(2, 6, 4, 5)
    wrong = inputs[name].detach()[..., :1]
    with pytest.raises(ValueError, match=f"{name} has shape"):
        aligned_scan(**inputs | {name: wrong.expand(3, *wrong.shape)})
    with pytest.raises(ValueError, match=f"{name} is torch.int64"):
        aligned_scan(**inputs | {name: inputs[name].detach().long()})


def test_input_without_tokens_is_refused():
    inputs = random_tokens(2, 6, 4, 5)
    with pytest.raises(ValueError, match=r"u has shape \(2, 0, 6\)"):
        aligned_scan(**inputs | dict(u=inputs["u"][:, :0]))


def test_the_whole_of_it_compiles_without_a_break():
    inputs = random_tokens(2, 6, 4, 9)
    del inputs["skipped_dt"]
    keep, order = some_places(2, 9, 4), in_order(9, reverse=False)

    def step(**given):
        gap = carry_skipped_dt(given["delta"], None, keep, order)
        gap = gap + estimate_skipped_dt("self", delta=gap, skipped=count_skipped(keep))
        return aligned_scan(**taken(given, keep), skipped_dt=gap)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = (results(f, inputs, "cpu") for f in (compiled, step))
    agree(got, {n: x.double() for n, x in want.items()}, torch.float32)
