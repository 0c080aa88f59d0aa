"""The non-causal state: its definition, its gradients, and what sizes of tokens mean."""

import pytest
import torch

from fambav.ops import nc_ssd

BATCH, LENGTH, HEADS, WIDTH, STATE = 2, 7, 3, 4, 5


def inputs(dtype=torch.float64, length=LENGTH):
    torch.manual_seed(0)
    x = torch.randn(BATCH, length, HEADS, WIDTH, dtype=dtype)
    dt, A = torch.rand(BATCH, length, HEADS, dtype=dtype), -torch.rand(HEADS, dtype=dtype)
    B, C = torch.randn(2, BATCH, length, STATE, dtype=dtype)
    return x, dt, A, B, C, torch.randn(HEADS, dtype=dtype)


def rows(index, x, dt, A, B, C, D):
    return x[:, index], dt[:, index], A, B[:, index], C[:, index], D


def test_every_token_reads_the_sum_of_all():
    x, dt, A, B, C, D = inputs()
    y = nc_ssd(x, dt, A, B, C, D)
    for b in range(BATCH):
        for h in range(HEADS):
            state = sum(-A[h] * dt[b, t, h] * B[b, t].outer(x[b, t, h]) for t in range(LENGTH))
            for t in range(LENGTH):
                expected = C[b, t] @ state + D[h] * x[b, t, h]
                torch.testing.assert_close(y[b, t, h], expected)
    torch.testing.assert_close(nc_ssd(x, dt, A, B, C), y - x * D[:, None])


def test_the_order_of_tokens_means_nothing():
    given, order = inputs(), torch.randperm(LENGTH)
    torch.testing.assert_close(nc_ssd(*rows(order, *given)), nc_ssd(*given)[:, order])


def test_gradients_are_those_of_the_formula():
    given = [tensor.requires_grad_() for tensor in inputs()]
    size = torch.rand(BATCH, LENGTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *all_: nc_ssd(*all_[:-1], size=all_[-1]), (*given, size))


def test_tokens_of_size_0_are_as_if_they_were_not_there():
    given, kept = inputs(), torch.tensor([0, 2, 3, 6])
    size = torch.zeros(BATCH, LENGTH).index_fill(1, kept, 1.0)
    torch.testing.assert_close(nc_ssd(*given, size=size)[:, kept], nc_ssd(*rows(kept, *given)))


def test_a_token_counts_for_as_many_equal_ones_as_it_has_size():
    given, copies = inputs(), torch.tensor([1, 3, 1, 2, 1, 1, 4])
    many = rows(torch.arange(LENGTH).repeat_interleave(copies), *given)
    first = copies.cumsum(0) - copies
    merged = nc_ssd(*given, size=copies.expand(BATCH, -1).float())
    torch.testing.assert_close(merged, nc_ssd(*many)[:, first])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_state_is_float32_whatever_autocast_says(dtype):
    x, dt, A, B, C, D = inputs(dtype, length=3136)
    x, B, C = (8 * tensor.abs() for tensor in (x, B, C))  # whose state leaves float16
    exact = nc_ssd(*(tensor.double() for tensor in (x, dt, A, B, C, D)))
    assert exact.max() > 1e6
    with torch.autocast("cpu", dtype):
        found = nc_ssd(x, dt, A, B, C, D)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_no_tokens_and_no_images_are_taken():
    assert nc_ssd(*(tensor[:0] if tensor.ndim > 1 else tensor for tensor in inputs())).numel() == 0
    assert nc_ssd(*inputs(length=0)).shape == (BATCH, 0, HEADS, WIDTH)


@pytest.mark.parametrize(
    ("number", "wrong", "message"),
    [
        (0, torch.zeros(2, 7, 12), r"x is \(2, 7, 12\) of torch.float32, expected \(batch, length"),
        (1, torch.zeros(2, 7, 4), r"dt has shape \(2, 7, 4\), expected \(2, 7, 3\)"),
        (2, torch.zeros(3, 5), r"A has shape \(3, 5\), expected \(3,\)"),
        (3, torch.zeros(2, 6, 5), r"B has shape \(2, 6, 5\), expected \(2, 7, 5\)"),
        (4, torch.zeros(2, 7, 4), r"C has shape \(2, 7, 4\), expected \(2, 7, 5\)"),
        (5, torch.zeros(3, dtype=torch.int64), "D is torch.int64, expected a floating-point"),
        (6, torch.zeros(7), r"size has shape \(7,\), expected \(2, 7\)"),
    ],
)
def test_a_wrong_argument_is_refused_by_its_name(number, wrong, message):
    given = [*inputs(torch.float32), torch.ones(2, 7)]
    given[number] = wrong
    with pytest.raises(ValueError, match=message):
        nc_ssd(*given[:-1], size=given[-1])
