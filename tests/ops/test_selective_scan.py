"""The scan's definition, its arguments, and what every backend must agree on."""

import functools
import importlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fambav.ops.flop_formulas  # noqa: F401  registers the formulas
from fambav.ops import BackendError, force, selective_scan
from tests import golden
from tests.ops.agreement import agree, device_of, draw, results, scan_inputs, widened
from tests.ops.places import close

SCAN_MODULE = importlib.import_module("fambav.ops.selective_scan")  # the function has its name
BACKENDS = ["cpu", "reference"]
KERNELS = ["triton", "numba"]
GPU = [pytest.param("cuda", marks=pytest.mark.gpu("selective_scan_cuda"))]
FULL = dict(delta_softplus=True, return_last_state=True)
GAPLESS = dict(gap_policy="none", return_dt=False, order_params=True)  # of the operator


def of_operator(inputs):
    """The operator's tensors: without skipped tokens, in their order."""
    return *inputs.values(), None, None, None


def small(**changes):
    return scan_inputs(2, 8, 1, 4, 5, dtype=torch.float64) | changes


def test_an_impulse_decays_at_the_rate_of_A():
    length, rate, step = 6, -0.7, 0.3
    ones = torch.ones(1, 1, length, dtype=torch.float64)
    impulse = F.one_hot(torch.tensor([[1]]), length).double()
    A = torch.tensor([[rate]], dtype=torch.float64)
    for backend in BACKENDS:
        with force(backend):
            y, h = selective_scan(impulse, step * ones, A, ones, ones, return_last_state=True)
        want = [0.0] + [step * math.exp(rate * step * t) for t in range(length - 1)]
        torch.testing.assert_close(y[0, 0], torch.tensor(want, dtype=torch.float64))
        torch.testing.assert_close(h[0, 0, 0], y[0, 0, -1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("direction", "reverse"), [("fwd", False), ("bwd", True)])
@pytest.mark.parametrize("length", [1, 2, 7, 197])
def test_the_golden_scans_are_met_in_both_directions(length, direction, reverse, backend):
    arrays, told = golden.load("scan")

    def made(name, *shape):
        return golden.hashed(f"scan{length}:{name}", *shape)

    A_log = 0.25 * golden.hashed(f"scan{length}:A", 6, 16, dtype=torch.float64)
    A_log = (A_log + torch.arange(1, 17, dtype=torch.float64).log()).float()
    inputs = dict(
        u=made("u", 2, 6, length),
        delta=made("delta", 2, 6, length),
        B=made("B", 2, 16, length),
        C=made("C", 2, 16, length),
        D=made("D", 6),
    )
    z, bias = made("z", 2, 6, length), made("bias", 6)
    for dtype, tolerance in [
        (torch.float32, told["tolerance"]["scan_f32_abs"]),
        (torch.float64, told["tolerance"]["scan_f64_abs"]),
    ]:
        tensors = {name: x.to(dtype) for name, x in inputs.items()}
        tensors |= dict(A=-A_log.to(dtype).exp(), delta_bias=bias.to(dtype) - 2)
        with force(backend):
            y, h = selective_scan(**tensors, **FULL, reverse=reverse)
            gated = selective_scan(**tensors, z=z.to(dtype), delta_softplus=True, reverse=reverse)
        prefix = f"scan_L{length}/{direction}_"
        for name, got in [("y", y), ("last_state", h), ("y_gated", gated)]:
            assert (got - arrays[prefix + name]).abs().max() <= tolerance, name


@functools.cache
def expected(dim, groups, length, reverse, dtype):
    """Inputs of that dtype, and what the reference makes of the same numbers in float64."""
    inputs = scan_inputs(3, dim, groups, 4, length, dtype=dtype)
    return inputs, results(selective_scan, widened(inputs), "reference", **FULL, reverse=reverse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 5, 65, 197])
@pytest.mark.parametrize(("dim", "groups"), [(8, 1), (8, 2), (8, 4), (87, 1), (87, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree_with_the_float64_reference(backend, dim, groups, length, reverse, dtype):
    inputs, want = expected(dim, groups, length, reverse, dtype)
    got = results(selective_scan, inputs, backend, **FULL, reverse=reverse)
    assert got["output 0"].dtype == dtype
    assert all(got[f"gradient of {n}"].dtype == x.dtype for n, x in inputs.items())
    agree(got, want, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 5, 65, 197])
@pytest.mark.parametrize(("dim", "groups"), [(8, 1), (8, 4), (87, 3)])
@pytest.mark.parametrize("backend", [*GPU, pytest.param("cpu", marks=pytest.mark.gpu)])
def test_backends_on_a_gpu_agree_with_the_float64_reference(
    backend, dim, groups, length, reverse, dtype
):
    inputs = scan_inputs(3, dim, groups, 4, length, dtype=dtype, device="cuda")
    if backend == "cuda":  # atomic sums, and no gradient of the last state
        torch.use_deterministic_algorithms(False)
    options = dict(delta_softplus=True, reverse=reverse)
    want = results(selective_scan, widened(inputs), "reference", **options)
    agree(results(selective_scan, inputs, backend, **options), want, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absent", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("softplus", [False, True])
def test_every_option_can_be_left_out(softplus, absent, backend):
    inputs = {name: x for name, x in small().items() if name not in absent}
    inputs["delta"] = inputs["delta"].detach().abs().requires_grad_()
    got = results(selective_scan, inputs, backend, delta_softplus=softplus)
    neutral = dict(D=torch.zeros(8), delta_bias=torch.zeros(8))
    filled = inputs | {n: neutral[n].double() for n in absent if n in neutral}
    with force("reference"):
        want = selective_scan(**filled, delta_softplus=softplus)
    torch.testing.assert_close(got["output 0"], want.detach(), rtol=1e-12, atol=1e-12)
    agree(got, results(selective_scan, inputs, "reference", delta_softplus=softplus), torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_is_flip_scan_flip(backend):
    inputs = small()
    flipped = {
        n: x.flip(-1) if n in ("u", "delta", "B", "C", "z") else x for n, x in inputs.items()
    }
    with force(backend):
        y, h = selective_scan(**inputs, **FULL, reverse=True)
        want, want_h = selective_scan(**flipped, **FULL)
    torch.testing.assert_close(y, want.flip(-1), rtol=0, atol=1e-13)
    torch.testing.assert_close(h, want_h, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_weights_are_one_group(backend):
    inputs = small()
    plain = inputs | {n: inputs[n][:, 0] for n in ("B", "C")}
    with force(backend):
        torch.testing.assert_close(
            selective_scan(**plain), selective_scan(**inputs), rtol=0, atol=0
        )


@pytest.mark.parametrize("names", [("B",), ("C",), ("B", "C")])
def test_constant_weights_are_those_of_every_token(names):
    inputs = small()
    constant = {n: draw(n, 8, 4, dtype=torch.float64) for n in names}
    spread = {n: w.T.expand(2, 5, 4, 8).permute(0, 3, 2, 1) for n, w in constant.items()}
    got = selective_scan(**inputs | constant)
    with force("reference"):
        torch.testing.assert_close(got, selective_scan(**inputs | spread), rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_function(backend):
    inputs = scan_inputs(2, 4, 2, 2, 4, dtype=torch.float64)

    def call(*tensors):
        return selective_scan(**dict(zip(inputs, tensors, strict=True)), **FULL, reverse=True)

    with force(backend):
        assert torch.autograd.gradcheck(call, tuple(inputs.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_the_last_state_alone_is_enough(backend):
    inputs = small()
    with force(backend):
        _, h = selective_scan(**inputs, **FULL)
    names = ["u", "delta", "A", "B", "delta_bias"]
    grads = torch.autograd.grad(h.sum(), [inputs[n] for n in names])
    assert all(g.any() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_has_the_strides_of_u_and_the_dtype_asked_for(backend):
    inputs = scan_inputs(2, 8, 1, 4, 5, dtype=torch.bfloat16)
    with force(backend):
        y = selective_scan(**inputs, out_dtype=torch.float32)
        contiguous = selective_scan(**inputs | dict(u=inputs["u"].contiguous()))
    assert (y.dtype, y.stride()) == (torch.float32, (40, 1, 8))
    assert (contiguous.dtype, contiguous.stride()) == (torch.bfloat16, (40, 5, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    inputs = scan_inputs(2, 8, 1, 4, 5)
    want = results(selective_scan, inputs, backend, **FULL)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(selective_scan, inputs, backend, **FULL)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(u=torch.ones(2, 8)), r"u has shape \(2, 8\), expected \(batch, dim >= 1, length"),
        (dict(u=torch.ones(2, 8, 0)), r"u has shape \(2, 8, 0\)"),
        (dict(delta=torch.ones(2, 8, 4)), r"delta has shape \(2, 8, 4\), expected \(2, 8, 5\)"),
        (dict(A=torch.ones(8)), "A is torch.float32 of shape"),
        (dict(A=torch.ones(8, 4, dtype=torch.complex64)), "A is torch.complex64"),
        (dict(A=torch.ones(7, 4)), r"A has shape \(7, 4\), expected \(8, 4\)"),
        (dict(B=torch.ones(2, 3, 4, 5)), "B has 3 groups, expected a divisor of 8 channels"),
        (dict(C=torch.ones(2, 1, 4, 6)), r"C has shape \(2, 1, 4, 6\), expected \(2, 1, 4, 5\)"),
        (dict(B=torch.ones(8, 5)), r"B has shape \(8, 5\), expected \(8, 4\)"),
        (dict(D=torch.ones(1)), r"D has shape \(1,\), expected \(8,\)"),
        (dict(z=torch.ones(2, 5, 8)), r"z has shape \(2, 5, 8\), expected \(2, 8, 5\)"),
        (dict(delta_bias=torch.ones(8, 1)), r"delta_bias has shape \(8, 1\)"),
        (dict(u=torch.ones(2, 8, 5).int()), "u is torch.int32, expected a floating-point dtype"),
        (dict(z=torch.ones(2, 8, 5, dtype=torch.complex64)), "z is torch.complex64, expected a"),
        (dict(A=torch.ones(8, 4, device="meta")), "A is on meta, expected cpu"),
    ],
)
def test_a_wrong_shape_is_named_with_the_right_one(changes, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**small(**changes))


# The operator of the Triton and numba kernels.


SIZES = [(8, 1, 16), (8, 4, 4), (7, 1, 3)]
TURNS = list(itertools.product([1, 5, 17], SIZES, [False, True]))
# Without a GPU Triton's kernels, interpreted, scan each length and size in one direction.
CASES = [("numba", *turn) for turn in TURNS]
for n, turn in enumerate(TURNS):
    marks = () if n // 2 % 2 == n % 2 else pytest.mark.gpu
    CASES.append(pytest.param("triton", *turn, marks=marks))


@pytest.mark.parametrize(("kernels", "length", "sizes", "reverse"), CASES)
def test_every_gradient_agrees_with_the_float64_reference(kernels, length, sizes, reverse):
    dim, groups, state = sizes
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
def test_every_option_of_the_kernels_can_be_left_out(absent, kernels):
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
    options |= GAPLESS
    torch.use_deterministic_algorithms(False)  # what is kept may have places that nobody reads
    torch.library.opcheck(SCAN_MODULE._forward, of_operator(inputs), options)


@pytest.mark.parametrize("kernels", KERNELS)
def test_without_a_gradient_nothing_is_kept(kernels):
    inputs = scan_inputs(2, 8, 1, 4, 70, device=device_of(kernels))
    options = dict(softplus=True, reverse=False, kernels=kernels, out_dtype=torch.float32) | GAPLESS
    *_, kept, before = SCAN_MODULE._forward(*of_operator(inputs), **options, keep=False)
    assert kept.numel() == before.numel() == 0
    *_, kept, before = SCAN_MODULE._forward(*of_operator(inputs), **options, keep=True)
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
    with force("numba"), pytest.raises(BackendError, match="constant over time"):
        selective_scan(**constant)
    groups = inputs | dict(B=torch.ones(2, 2, 4, 5))
    with force("numba"), pytest.raises(BackendError, match="B has 2 groups and C 1"):
        selective_scan(**groups)


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted kernels are for no GPU")
def test_the_interpreter_runs_only_where_it_is_asked_for(monkeypatch):
    chosen = []
    monkeypatch.setattr(SCAN_MODULE, "_forward", lambda *_, kernels, **__: chosen.append(kernels))
    inputs = scan_inputs(1, 2, 1, 2, 3)
    for forced in (None, "triton"):
        with force(forced), pytest.raises(TypeError):  # from unpacking what is not there
            selective_scan(**inputs)
    assert chosen == ["numba", "triton"]
