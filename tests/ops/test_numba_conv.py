"""The numba convolution: agreement with PyTorch's in float64, layouts, threads, and NaN."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.agreement import agree, draw

pytest.importorskip("numba")
from fambav.ops import numba as numba_kernels

BOTH = (False, True)


def drawn(reverse, batch=2, length=17, dim=24, width=4):
    """Inputs of a convolution and the gradient of its output."""
    return dict(
        x=draw("x", batch, length, dim).detach(),
        weight=[draw(f"weight{k}", dim, width).detach() for k in range(len(reverse))],
        bias=[draw(f"bias{k}", dim).detach() for k in range(len(reverse))],
        du=draw("du", len(reverse), batch, length, dim).detach(),
    )


def expected(given, reverse, *, bias=True, silu=True):
    """Results and gradients of PyTorch in float64, under their names."""
    x = given["x"].double().requires_grad_()
    weight = torch.stack(list(given["weight"])).double().requires_grad_()
    shift = torch.stack(list(given["bias"])).double().requires_grad_()
    outputs = []
    for k, backward in enumerate(reverse):
        tokens = (x.flip(1) if backward else x).mT
        padded = F.pad(tokens, (weight.shape[2] - 1, 0))
        own = shift[k] if bias else None
        u = F.conv1d(padded, weight[k][:, None], own, groups=x.shape[2]).mT
        u = u.flip(1) if backward else u
        outputs.append(F.silu(u) if silu else u)
    u = torch.stack(outputs)
    inputs = dict(x=x, weight=weight) | (dict(bias=shift) if bias else {})
    grads = torch.autograd.grad(u, list(inputs.values()), given["du"].double())
    return dict(u=u.detach()) | {f"d{n}": g for n, g in zip(inputs, grads, strict=True)}


def computed(given, reverse, place=torch.empty, *, bias=True, silu=True):
    """Results and gradients of the kernels, under their names."""
    options = dict(silu=silu, reverse=reverse)
    parameters = given["weight"], given["bias"] if bias else None
    u, dx = place(given["du"].shape), place(given["x"].shape)
    numba_kernels.conv_forward(given["x"], *parameters, u, **options)
    dweight, dbias = numba_kernels.conv_backward(
        given["du"], given["x"], *parameters, dx, **options
    )
    assert (dbias is not None) == bias
    return dict(u=u, dx=dx, dweight=dweight) | (dict(dbias=dbias) if bias else {})


def agrees(reverse=BOTH, *, bias=True, silu=True, **sizes):
    given, options = drawn(reverse, **sizes), dict(bias=bias, silu=silu)
    agree(computed(given, reverse, **options), expected(given, reverse, **options), torch.float32)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("reverse", [(False,), (True,), BOTH, (True, True)], ids=str)
def test_it_agrees_for_any_width_and_direction(reverse, width):
    agrees(reverse, width=width)


@pytest.mark.parametrize("length", [1, 2, 5, 65, 197])
@pytest.mark.parametrize("dim", [10, 64, 87])
def test_it_agrees_for_any_length_and_dim(dim, length):
    agrees(length=length, dim=dim)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_silu_and_bias_can_be_left_out(bias, silu):
    agrees(bias=bias, silu=silu)


def in_wider_rows(shape):
    return torch.full((*shape[:-1], shape[-1] + 9), 7.0)[..., 4:-5]


def channels_first(shape):
    return torch.full((*shape[:-2], shape[-1], shape[-2]), 7.0).mT


@pytest.mark.parametrize("layout", [in_wider_rows, channels_first])
@pytest.mark.parametrize("dim", [24, 48])
def test_strides_change_no_bit_and_nothing_is_written_beside_a_place(dim, layout):
    given = drawn(BOTH, dim=dim)
    want = computed(given, BOTH)
    moved = {n: layout(given[n].shape).copy_(given[n]) for n in ("x", "du")}
    places = []

    def place(shape):
        places.append(layout(shape))
        return places[-1]

    got = computed(given | moved, BOTH, place)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, check_stride=False)
    for x in places:
        memory = torch.empty(0).set_(x.untyped_storage())
        x.fill_(7)
        assert (memory == 7).all()
    assert len(places) == 2


def test_parameters_may_have_any_strides_and_dtype():
    given = drawn(BOTH)
    halves = dict(
        weight=[w.half() for w in given["weight"]], bias=[x.half() for x in given["bias"]]
    )
    rounded = {n: [x.float() for x in tensors] for n, tensors in halves.items()}
    strided = dict(halves, weight=[w.T.contiguous().T for w in halves["weight"]])
    want = computed(given | rounded, BOTH)
    for name, tensor in computed(given | strided, BOTH).items():
        torch.testing.assert_close(tensor, want[name], rtol=0, atol=0)


def test_the_number_of_threads_changes_no_bit():
    given = drawn(BOTH, batch=3, length=65, dim=87)
    want = computed(given, BOTH)
    try:
        torch.set_num_threads(2)
        got = computed(given, BOTH)
    finally:
        torch.set_num_threads(1)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "du"])
def test_nan_goes_where_it_goes_in_pytorch(name):
    given = drawn((True,))
    given[name][0][..., 1] = float("nan")
    want, got = (call(given, (True,)) for call in (expected, computed))
    assert any(tensor.isnan().any() for tensor in want.values())
    for key, tensor in want.items():
        torch.testing.assert_close(got[key].isnan(), tensor.isnan(), msg=key)
