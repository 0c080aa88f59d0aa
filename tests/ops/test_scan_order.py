"""Scans along order tables, against the walk of each group one token after the other."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fambav.ops.flop_formulas  # noqa: F401  registers the formulas
from fambav.ops import BackendError, composed, force, order_table, selective_scan
from fambav.ops.cross_scan import cross_merge, cross_scan, snake_order
from fambav.ops.scan_order import to_steps, to_tokens
from tests.ops.agreement import agree, draw, results, widened
from tests.ops.kept import some_places

SCAN_MODULE = importlib.import_module("fambav.ops.selective_scan")  # the function has its name
BATCH, GROUPS, WIDTH, STATE = 2, 3, 5, 4
BACKENDS = pytest.mark.parametrize("backend", ["numba", "cpu", "reference"])
PARAMS = pytest.mark.parametrize("order_params", [True, False], ids=["tokens", "steps"])
SHARED = pytest.mark.parametrize("shared", ["", "u", "u delta"])
WALKS = pytest.mark.parametrize("walk", ["all", "some", "some of each", "one"])


def table(walk, length):
    """Walks of every kind: of all tokens, of some, of others in each sample, of one."""
    score = draw("walk", BATCH, GROUPS, length).detach()
    order = score.argsort(dim=2).mT  # (batch, length, groups)
    steps = {"all": length, "one": 1}.get(walk, -(-length // 2))
    return order_table(order[:, :steps] if "each" in walk else order[0, :steps], length)


def drawn(length, steps, shared="", *, width=WIDTH, state=STATE, dtype=torch.float32):
    """Inputs of a scan as leaves, channels last in memory; those named are shared by groups."""
    dim, wide = GROUPS * width, torch.promote_types(dtype, torch.float32)

    def tokens(name, count):
        channels = width if name in shared.split() else dim
        x = draw(name, BATCH, count, channels, dtype=dtype)
        return x.mT.detach().requires_grad_()

    return dict(
        u=tokens("u", length),
        delta=tokens("delta", steps),
        A=(-draw("A", dim, state, dtype=wide).detach().exp()).requires_grad_(),
        B=draw("B", BATCH, GROUPS, state, steps, dtype=dtype),
        C=draw("C", BATCH, GROUPS, state, steps, dtype=dtype),
        D=draw("D", dim, dtype=wide),
        z=tokens("z", length),
        delta_bias=draw("bias", dim, dtype=wide),
    )


def walked(u, delta, A, B, C, D, z, delta_bias, *, order, order_params=True, reverse=False):
    """The definition, token by token, without a softplus of anything but delta."""
    batch, _, length = u.shape
    order = order.expand(batch, -1, -1)
    steps, groups = order.shape[1:]
    width = len(A) // groups
    u, delta = (x if x.shape[1] == len(A) else x.repeat(1, groups, 1) for x in (u, delta))
    rows, last = [], []
    for b in range(batch):
        for g in range(groups):
            own = slice(g * width, (g + 1) * width)
            y = [torch.zeros_like(u[b, own, 0])] * length
            h = 0
            for step in reversed(range(steps)) if reverse else range(steps):
                token = order[b, step, g].item()
                t = token if order_params else step
                dt = F.softplus(delta[b, own, t] + delta_bias[own])
                drive = (dt * u[b, own, token])[:, None] * B[b, g, :, t]
                h = (dt[:, None] * A[own]).exp() * h + drive
                y[token] = h @ C[b, g, :, t] + D[own] * u[b, own, token]
            rows.append(torch.stack(y, dim=1) * F.silu(z[b, own]))
            last.append(h)
    shape = batch, len(A)
    return torch.stack(rows).view(*shape, length), torch.stack(last).view(*shape, -1)


FULL = dict(delta_softplus=True, return_last_state=True)


@BACKENDS
@PARAMS
@SHARED
@WALKS
def test_every_backend_walks_as_defined(walk, shared, order_params, backend):
    length, reverse = 7, walk == "some"
    order = table(walk, length)
    inputs = drawn(length, length if order_params else order.shape[-2], shared)
    options = dict(order=order, order_params=order_params, reverse=reverse)
    got = results(selective_scan, inputs, backend, **FULL, **options)
    want = results(walked, widened(inputs), "reference", **options)
    agree(got, want, torch.float32)


@PARAMS
@pytest.mark.parametrize("length", [33, 70])
@pytest.mark.parametrize(("width", "state"), [(29, 1), (16, 16), (87, 1)])
def test_the_kernels_walk_over_chunks_of_any_width_as_the_composition_does(
    width, state, length, order_params
):
    order = table("some of each" if order_params else "all", length)
    inputs = drawn(length, length, "u", width=width, state=state)
    options = dict(order=order, order_params=order_params, reverse=not order_params)
    got = results(selective_scan, inputs, "numba", **FULL, **options)
    want = results(selective_scan, widened(inputs), "cpu", **FULL, **options)
    agree(got, want, torch.float32)


@PARAMS
def test_bfloat16_is_rounded_once(order_params):
    order = table("some", 6)
    inputs = drawn(6, 6 if order_params else 3, dtype=torch.bfloat16)
    options = dict(order=order, order_params=order_params)
    got = results(selective_scan, inputs, None, **FULL, **options)
    assert got["output 0"].dtype == torch.bfloat16
    agree(got, results(walked, widened(inputs), "reference", **options), torch.bfloat16)


def test_the_order_of_the_tokens_is_no_order():
    inputs = drawn(6, 6)
    order = order_table(torch.arange(6)[:, None].expand(-1, GROUPS), 6)
    for backend in ("numba", "reference"):
        with force(backend):
            y, plain = selective_scan(**inputs, order=order), selective_scan(**inputs)
        assert torch.equal(y, plain)


def test_tokens_where_no_group_comes_are_zero_and_have_no_gradient():
    order = order_table(torch.tensor([[4, 0, 1], [2, 3, 0]]), 6)
    inputs = drawn(6, 6)
    y = selective_scan(**inputs, order=order)
    assert y[:, :, 5].eq(0).all()
    assert y[:, :WIDTH].abs().sum(dim=(0, 1)).gt(0).tolist() == [c in (2, 4) for c in range(6)]
    y.sum().backward()
    for name in ("u", "delta", "B", "C", "z"):
        assert inputs[name].grad[..., 5].eq(0).all(), name


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("name", ["u", "delta", "B", "C"])
def test_nan_reaches_what_is_walked_behind_it_and_nothing_else(name, backend):
    order = order_table(torch.tensor([[3, 0], [1, 2], [0, 3]]), 4)
    inputs = {n: x.detach() for n, x in drawn(4, 4).items()}
    inputs = {n: x[:, : 2 * WIDTH] if n in ("u", "delta") else x for n, x in inputs.items()}
    inputs |= {n: inputs[n][: 2 * WIDTH] for n in ("A", "D", "delta_bias")}
    inputs |= {n: inputs[n][:, :2] for n in ("B", "C")} | dict(z=None)
    inputs[name] = inputs[name].clone()
    inputs[name][0, ..., 1] = torch.nan  # which the first group alone visits
    with force(backend):
        y = selective_scan(**inputs, delta_softplus=True, order=order)
    behind = [1] if name == "C" else [0, 1]
    assert y[0, :WIDTH].isnan().all(dim=0).nonzero().flatten().tolist() == behind
    assert y[0, WIDTH:].isfinite().all()
    assert y[1].isfinite().all()


@PARAMS
def test_gradients_are_those_of_differences(order_params):
    order = table("some of each", 4)
    inputs = drawn(4, 4 if order_params else 2, "u", width=1, state=2, dtype=torch.float64)
    options = dict(FULL, order=order, order_params=order_params)

    def scan(*tensors):
        return selective_scan(**dict(zip(inputs, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))
    with composed():
        assert torch.autograd.gradgradcheck(scan, tuple(inputs.values()))


def test_the_composition_takes_transforms_and_export():
    order = table("some", 4)
    inputs = {n: x.detach() for n, x in drawn(4, 4, "u").items()}

    def scan(u):
        return selective_scan(**inputs | dict(u=u), delta_softplus=True, order=order)

    with pytest.raises(BackendError, match="composed"):
        torch.func.grad(lambda u: scan(u).sum())(inputs["u"])
    leaf = inputs["u"].clone().requires_grad_()
    (want,) = torch.autograd.grad(scan(leaf).square().sum(), leaf)
    with composed():
        got = torch.func.grad(lambda u: scan(u).square().sum())(inputs["u"])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

        class Scan(torch.nn.Module):
            def forward(self, u):
                return scan(u)

        program = torch.export.export(Scan(), (inputs["u"],))
    torch.testing.assert_close(program.module()(inputs["u"]), scan(inputs["u"]))


def test_the_operator_along_an_order_compiles_without_a_break():
    order, inputs = table("some", 5), drawn(5, 5, "u delta")

    def scan(**given):
        return selective_scan(**given, delta_softplus=True, order=order)

    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    got, want = (results(f, inputs, "numba") for f in (compiled, scan))
    assert all(torch.equal(got[name], x) for name, x in want.items())


def test_torchs_own_checks_of_the_operator_along_an_order_pass():
    inputs, order = drawn(5, 3, "u", width=2), table("some", 5)
    options = dict(softplus=True, reverse=True, gap_policy="none", order_params=False)
    options |= dict(kernels="numba", out_dtype=torch.float32, keep=True, return_dt=False)
    given = *inputs.values(), None, None, order
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.use_deterministic_algorithms(False)  # what is kept may have places that nobody reads
    torch.library.opcheck(SCAN_MODULE._forward, given, options, test_utils=tests)


def test_flops_are_those_of_the_steps():
    inputs, order = drawn(6, 6, "u"), table("some", 6)
    with force("numba"), FlopCounterMode(display=False) as counter:
        selective_scan(**inputs, order=order).sum().backward()
    assert counter.get_total_flops() == BATCH * 3 * GROUPS * WIDTH * STATE * (7 + 20)


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_snakes_with_the_parameters_of_steps_are_plainmambas_published_form(backend):
    orders, tokens = snake_order((2, 3), torch.device("cpu")), drawn(6, 6, "u delta")
    u, delta, B, C = (tokens[n].detach() for n in ("u", "delta", "B", "C"))
    A, D = tokens["A"].detach()[:WIDTH], tokens["D"].detach()[:WIDTH]
    B, C = (w[:, :1].expand(-1, 4, -1, -1) for w in (B, C))  # (batch, directions, state, steps)
    B = B + draw("moves", 5, STATE).detach()[orders.move].mT

    def stacked(x):
        return x[:, None].expand(-1, 4, -1, -1).flatten(0, 1)

    with force(backend):
        y = selective_scan(
            *(u, delta, A.repeat(4, 1), B, C, D.repeat(4)),
            **dict(delta_softplus=True, order=orders.order[0].mT, order_params=False),
        )
        walked = cross_scan(u.mT, orders).flatten(0, 1).mT  # (batch directions, width, steps)
        each = selective_scan(
            *(walked, stacked(delta), A, B.flatten(0, 1), C.flatten(0, 1), D), delta_softplus=True
        )
    merged = cross_merge(each.mT.unflatten(0, (BATCH, 4)), orders)
    torch.testing.assert_close(y.unflatten(1, (4, WIDTH)).sum(dim=1).mT, merged)


def test_kept_places_are_a_table_of_each_sample():
    keep = some_places(BATCH, 9, 4)
    order = order_table(keep[..., None].expand(-1, -1, GROUPS), 9)
    inputs = {n: x.detach() for n, x in drawn(9, 9).items()}
    y = selective_scan(**inputs, order=order)
    for b, places in enumerate(keep):
        alone = {n: x if x.dim() < 3 else x[b : b + 1, ..., places] for n, x in inputs.items()}
        torch.testing.assert_close(y[b : b + 1, :, places], selective_scan(**alone))


@pytest.mark.parametrize("walk", ["all", "some", "some of each"])
def test_tokens_are_read_in_the_order_and_come_back(walk):
    order = table(walk, 6)
    x = draw("x", BATCH, 6, 2, dtype=torch.float64)
    each = draw("each", BATCH, 6, GROUPS, 2, dtype=torch.float64)
    read, own = to_steps(x, order), to_steps(each, order)
    back = to_tokens(own, order, 6)
    for b, steps in enumerate(order.expand(BATCH, -1, -1)):
        for g, places in enumerate(steps.unbind(1)):
            assert torch.equal(read[b, :, g], x[b, places])
            assert torch.equal(own[b, :, g], each[b, places, g])
            assert torch.equal(back[b, places, g], each[b, places, g])
    assert back.eq(0).all(dim=3).sum() == BATCH * GROUPS * (6 - order.shape[-2])
    for function, given in ((to_steps, x), (to_steps, each)):
        assert torch.autograd.gradcheck(lambda v, f=function: f(v, order), given)
    assert torch.autograd.gradcheck(lambda v: to_tokens(v, order, 6), own.detach().requires_grad_())


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.tensor([[0, 1], [0, 2]]), r"shape \(2, 2\) has the entry 0 twice.*shape \(4,\)"),
        (torch.tensor([[[0], [4]]]), r"shape \(1, 2, 1\) has the entry 4, expected 0 to 3.*\(4,\)"),
        (torch.tensor([[-1]]), r"shape \(1, 1\) has the entry -1, expected 0 to 3"),
        (torch.zeros(5, 1, dtype=torch.int32), r"shape \(5, 1\), expected 1 to 4 steps.*\(4,\)"),
        (torch.zeros(0, 1, dtype=torch.int32), r"shape \(0, 1\), expected 1 to 4 steps"),
        (torch.arange(4), r"torch.int64 of shape \(4,\), expected integers \(steps, groups\)"),
        (torch.zeros(2, 2), r"order is torch.float32 of shape \(2, 2\), expected integers"),
        ([[0]], "order is .*expected a tensor"),
    ],
)
def test_a_table_that_is_none_is_refused_where_it_is_made(order, message):
    with pytest.raises(ValueError, match=message):
        order_table(order, 4)


def test_a_table_is_made_of_any_integers():
    order = order_table(torch.tensor([[3, 0], [1, 2]], dtype=torch.uint8), 4)
    assert order.dtype == torch.int64
    assert order.tolist() == [[3, 0], [1, 2]]
    assert order_table(torch.empty(0, 2, 1, dtype=torch.int64), 3).shape == (0, 2, 1)


def test_shapes_that_do_not_fit_the_order_are_named():
    order, inputs = table("some", 6), drawn(6, 6)

    def refused(message, order=order, **changes):
        with pytest.raises(ValueError, match=message):
            selective_scan(**inputs | changes, order=order)

    refused(r"order has shape \(7, 3\), expected 1 to 6 steps.*\(6,\)", table("all", 7))
    refused(r"order has shape \(1, 3, 3\), expected \(2, steps, groups\)", order[None])
    refused(r"order is torch.int32 of shape \(3, 3\), expected torch.int64", order.int())
    refused(r"B has shape \(2, 3, 4, 6\), expected \(2, 1, 4, 6\)", order[:, :1])
    refused(r"u has shape \(2, 10, 6\), expected \(2, 15, 6\)", u=inputs["u"][:, :10])
    refused(r"delta has shape \(2, 15, 6\), expected \(2, 15, 3\)", order_params=False)
    refused(r"order_params is 'no', expected", order_params="no")


def test_a_batch_of_nothing_is_walked():
    inputs = {n: x[:0] if x.dim() > 2 else x for n, x in drawn(5, 5, "u").items()}
    assert selective_scan(**inputs, order=table("some", 5)).shape == (0, GROUPS * WIDTH, 5)
