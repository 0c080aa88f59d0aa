"""Second derivatives, forward mode and `torch.func`: right by references, refused by all else."""

import math

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck, gradgradcheck

from fambav.ops import (
    BackendError,
    Direction,
    Selection,
    add_rms_norm,
    backends,
    bimamba_scan,
    causal_conv1d,
    composed,
    force,
    match,
    pool,
    selective_scan,
)
from fambav.ops.cross_scan import cross_merge, cross_scan, snake_order
from fambav.ops.kernels import interpreted

# `torch.func.jvp` scripts formulas of its own.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")


def number(name, *shape):
    """Numbers that depend on the name; unlike random ones, they may be made under `vmap`."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return (1.7 * steps + sum(name.encode())).sin().view(shape)


def mixer(xz):
    shapes = dict(conv_weight=(2, 4), conv_bias=(2,), x_proj=(5, 2), dt_proj=(2, 1), dt_bias=(2,))
    ends = [
        Direction(
            **{n: number(n + end, *shape).to(xz.dtype) for n, shape in shapes.items()},
            A=-number("A" + end, 2, 2).exp().to(xz.dtype),
            D=number("D" + end, 2).to(xz.dtype),
        )
        for end in "ab"
    ]
    return bimamba_scan(xz, *ends, number("out", 3, 2).to(xz.dtype))


def scan(u):
    delta, z = (number(n, *u.shape).to(u.dtype) for n in ("delta", "z"))
    B, C = (number(n, 2, 2, u.shape[2]).to(u.dtype) for n in "BC")
    A = -number("A", u.shape[1], 2).exp().to(u.dtype)
    return selective_scan(u, delta, A, B, C, None, z, None, True)


def norm(hidden):
    both = add_rms_norm(hidden, hidden * 0.5, number("weight", hidden.shape[-1]).to(hidden.dtype))
    return torch.cat(both, dim=-1)


def convolution(x):
    return causal_conv1d(x, number("weight", x.shape[1], 3).to(x.dtype), None, "silu")


def pooled(x):
    groups = [torch.tensor([row] * 2) for row in ([0, 3], [1, 2], [0, 3])]
    weight = torch.ones(2, 4, dtype=x.dtype)
    return pool(x, x * 2, weight, weight, Selection(*groups)).x


OPS = {
    "selective_scan": (scan, (2, 2, 4)),
    "causal_conv1d": (convolution, (2, 2, 4)),
    "add_rms_norm": (norm, (2, 4, 2)),
    "bimamba_scan": (mixer, (2, 4, 4)),
    "pool": (pooled, (2, 4, 2)),
}


def by_forward_mode(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def by_double_backward(f, x):
    x = x.requires_grad_()
    grad = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)[0]
    return torch.autograd.grad(grad.square().sum(), x)[0]


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).square().sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack((x, 2 * x))),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "forward mode": by_forward_mode,
    "double backward": by_double_backward,
}
OURS = ("triton", "numba", "cpu")
FUSED = [(op, name) for op, name, _ in backends() if op in OPS and name in OURS]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("op", "backend"), FUSED)
def test_all_but_references_refuse_in_a_sentence(op, backend, transform):
    if backend == "triton" and not interpreted():
        pytest.skip("tensors of a CPU need Triton's interpreter")
    function, shape = OPS[op]
    what = "differentiated twice" if transform == "double backward" else "under"
    with force(backend, op), pytest.raises(BackendError) as caught:
        TRANSFORMS[transform](function, number("x", *shape).float())
    assert f"{op} is {what}" in str(caught.value)
    assert str(caught.value).endswith("call it inside `with fambav.composed():`")


def test_a_second_derivative_that_paths_lead_around_is_refused_too():
    x = number("x", 2, 4, 2).requires_grad_()
    with force("cpu", "add_rms_norm"), pytest.raises(BackendError, match="differentiated twice"):
        normed, total = add_rms_norm(x, None, number("weight", 2))
        grad = torch.autograd.grad(normed.sum() + total.pow(3).sum(), x, create_graph=True)[0]
        torch.autograd.grad(grad.sum(), x)


def test_a_first_derivative_may_have_a_graph():
    x = number("x", 2, 2, 4).requires_grad_()
    for backend in ("cpu", "reference"):
        with force(backend, "causal_conv1d"):
            kept = torch.autograd.grad(convolution(x).sum(), x, create_graph=True)[0]
            torch.testing.assert_close(
                kept.detach(), torch.autograd.grad(convolution(x).sum(), x)[0]
            )


@pytest.mark.parametrize("op", OPS)
def test_references_have_all_derivatives(op):
    function, shape = OPS[op]
    x = number("x", *shape).requires_grad_()
    with force("cpu", "selective_scan"), composed():  # whatever is forced
        gradcheck(function, x, check_forward_ad=True)
        gradgradcheck(function, x)
        both = torch.func.vmap(function)(torch.stack((x, 2 * x)))
        torch.testing.assert_close(both, torch.stack((function(x), function(2 * x))))
        grad = torch.func.grad(lambda y: function(y).square().sum())(x)
        want = torch.autograd.grad(function(x).square().sum(), x)[0]
        torch.testing.assert_close(grad, want)


def test_cross_scan_has_all_derivatives_at_all_times():
    order, x = snake_order((2, 2), torch.device("cpu")), number("x", 2, 4, 2).requires_grad_()

    def there_and_back(x):
        scanned = cross_scan(x, order)
        return cross_merge(scanned * scanned[:, :1], order)

    gradcheck(there_and_back, x, check_forward_ad=True)
    gradgradcheck(there_and_back, x)
    both = torch.func.vmap(there_and_back)(torch.stack((x, 2 * x)))
    torch.testing.assert_close(both, torch.stack((there_and_back(x), 4 * there_and_back(x))))


def test_orders_made_under_a_transform_do_not_outlive_it():
    device = torch.device("cpu")
    torch.func.grad(lambda x: cross_scan(x, snake_order((3, 5), device)).sum())(
        torch.ones(1, 15, 2)
    )
    assert snake_order((3, 5), device).order.sum().item() == 4 * sum(range(15))


@pytest.mark.filterwarnings("error")
def test_matching_is_mapped_as_a_batch():
    x = number("x", 3, 2, 7, 4)
    masked = torch.tensor([[2]] * 2)
    found = torch.func.vmap(lambda x: match(x, 2, masked=masked))(x)
    for i, each in enumerate(x):
        for got, want in zip(found, match(each, 2, masked=masked), strict=True):
            assert torch.equal(got[i], want)


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "forward mode"])
def test_matching_has_no_derivative_so_that_every_backend_takes_transforms(transform, backend):
    def matched(x):
        return x * match(x, 2)[1].sum()

    x = number("x", 2, 7, 4).float()
    want = TRANSFORMS[transform](lambda y: y * match(x, 2)[1].sum(), x)
    with force(backend, "match"):
        assert TRANSFORMS[transform](matched, x).equal(want)


def test_composed_blocks_overlap():
    u = number("u", 2, 2, 4)
    first, second = composed(), composed()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    torch.func.grad(lambda u: scan(u).sum())(u)
    second.__exit__(None, None, None)
    with pytest.raises(BackendError):
        torch.func.grad(lambda u: scan(u).sum())(u)


def test_what_is_compiled_refuses_as_well():
    x = number("x", 2, 2, 4).float()
    with force("cpu", "causal_conv1d"):
        compiled = torch.compile(
            lambda x: torch.func.jvp(convolution, (x,), (x,))[1], backend="eager"
        )
        with pytest.raises(Exception, match=r"inside `with fambav\.composed"):
            compiled(x)
