"""The numba gate: agreement with PyTorch in float64, layouts, and numbers of every size."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.agreement import agree, draw

pytest.importorskip("numba")
from fambav.ops import numba as numba_kernels

SCALE = 0.5


def drawn(directions=2, batch=2, length=17, dim=24):
    """Inputs of a gate and the gradient of its output."""
    tokens = {n: draw(n, batch, length, dim).detach() for n in ("z", "grad")}
    return dict(tokens, y=draw("y", directions, batch, length, dim).detach())


def expected(given):
    """Results and gradients of PyTorch in float64, under their names."""
    y, z = (given[n].double().requires_grad_() for n in ("y", "z"))
    out = SCALE * F.silu(z) * y.sum(0)
    dy, dz = torch.autograd.grad(out, [y, z], given["grad"].double())
    out = out.detach()
    return dict(out=out, total=y.detach().sum(0), dy=dy[0], dz=dz, again=out)


def computed(given, place=torch.empty_like):
    """Results and gradients of the kernels, under their names."""
    y, z, grad = (given[n] for n in ("y", "z", "grad"))
    found = {n: place(z) for n in ("out", "total", "dy", "dz", "again")}
    numba_kernels.gate_forward(y, z, found["out"], found["total"], scale=SCALE)
    places = found["dy"], found["dz"], found["again"]
    numba_kernels.gate_backward(grad, found["total"], z, *places, scale=SCALE)
    return found


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("length", [1, 16, 65])
@pytest.mark.parametrize("dim", [10, 64, 87])
def test_it_agrees_with_pytorch_in_float64(dim, length, directions):
    given = drawn(directions, 2, length, dim)
    agree(computed(given), expected(given), torch.float32)


def test_the_sum_need_not_be_kept():
    given = drawn()
    out = torch.empty_like(given["z"])
    numba_kernels.gate_forward(given["y"], given["z"], out, None, scale=SCALE)
    torch.testing.assert_close(out, computed(given)["out"], rtol=0, atol=0)


def in_wider_rows(x):
    return x.new_full((*x.shape[:-1], x.shape[-1] + 9), 7)[..., 4:-5]


def channels_first(x):
    return x.new_full((*x.shape[:-2], x.shape[-1], x.shape[-2]), 7).mT


@pytest.mark.parametrize("layout", [in_wider_rows, channels_first])
@pytest.mark.parametrize("dim", [24, 48])
def test_strides_change_no_bit_and_nothing_is_written_beside_a_place(dim, layout):
    given = drawn(dim=dim)
    want = computed(given)
    got = computed({n: layout(x).copy_(x) for n, x in given.items()}, layout)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, check_stride=False)
        memory = torch.empty(0).set_(got[name].untyped_storage())
        got[name].fill_(7)
        assert (memory == 7).all()


def test_repeated_inputs_are_read_where_they_are():
    given = drawn()
    repeated = given["y"][:1, :, :1].expand_as(given["y"])
    want = computed(given | dict(y=repeated.contiguous()))
    for name, tensor in computed(given | dict(y=repeated)).items():
        torch.testing.assert_close(tensor, want[name], rtol=0, atol=0)


def test_silu_is_exact_to_a_millionth_everywhere():
    z = torch.linspace(-90, 90, 180_001).view(1, 1, -1)
    one, out = torch.ones_like(z), torch.empty_like(z)
    numba_kernels.gate_forward(one[None], z, out, None, scale=1.0)
    want = F.silu(z.double())
    error = (out.double() - want).abs()
    assert (error <= 1e-6 * want.abs() + 90 * torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("name", ["y", "z", "grad"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), 1e30, -1e30])
def test_numbers_that_are_too_large_do_what_they_do_in_pytorch(number, name):
    given = drawn()
    given[name][0, 1, 3] = number
    wide = expected(given)
    for key, tensor in computed(given).items():
        torch.testing.assert_close(tensor, wide[key].float(), equal_nan=True, msg=key)
