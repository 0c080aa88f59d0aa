"""The recurrence in blocks is the scan that models run."""

import pytest
import torch

from fambav.export.recurrence import scan
from fambav.ops import selective_scan
from fambav.ops.dispatch import force


def inputs(length, *, batch=2, dim=6, state=3):
    torch.manual_seed(length)
    u, delta, z = torch.randn(3, batch, dim, length).unbind(0)
    A, D, bias = -4 * torch.rand(dim, state), torch.randn(dim), torch.randn(dim)
    B, C = torch.randn(2, batch, state, length).unbind(0)
    return u, delta, A, B, C, D, z, bias


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 64, 65, 197])
def test_blocks_of_steps_give_what_single_steps_give(length, reverse):
    u, delta, A, B, C, D, z, bias = inputs(length)
    with force("reference"):
        want = selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True, reverse=reverse)
    options = dict(softplus=True, reverse=reverse, out_dtype=torch.float32)
    got, _ = scan(u, delta, A, B[:, None], C[:, None], D, z, bias, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_long_steps_forget_and_do_not_overflow():
    u, _, A, B, C, *_ = inputs(100)
    delta = torch.full_like(u, 1e4)
    options = dict(softplus=False, reverse=False, out_dtype=torch.float32)
    got, _ = scan(u, delta, A - 1, B[:, None], C[:, None], None, None, None, **options)
    torch.testing.assert_close(got, delta * u * (B * C).sum(1, keepdim=True), rtol=1e-4, atol=0.1)


def test_weights_in_other_groups_are_refused():
    u, delta, A, B, C, *rest = inputs(5)
    options = dict(softplus=True, reverse=False, out_dtype=torch.float32)
    with pytest.raises(ValueError, match="C has no tokens or other groups, expected"):
        scan(u, delta, A, B[:, None].repeat(1, 2, 1, 1), C[:, None], *rest, **options)
