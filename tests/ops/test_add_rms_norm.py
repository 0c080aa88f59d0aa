"""Addition to the residual stream and normalisation."""

from functools import partial

import pytest
import torch

from fambav.ops import add_rms_norm, force
from tests import golden
from tests.ops.agreement import (
    agree,
    agrees_twice,
    device_of,
    draw,
    every_length,
    results,
    widened,
)

OP = "add_rms_norm"
BACKENDS = ["cpu", "reference"]


def inputs(*shape, dtype=torch.float32, device="cpu"):
    """Hidden state in `dtype`; residual and weight in float32 as in a model."""
    wide = torch.promote_types(dtype, torch.float32)
    return dict(
        hidden=draw("hidden", *shape, dtype=dtype, device=device),
        residual=draw("residual", *shape, dtype=wide, device=device),
        weight=draw("weight", shape[-1], dtype=wide, device=device),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "scale"), [("unit", 1), ("small", 1e-3)])
def test_the_golden_sums_are_met(case, scale, backend):
    arrays, told = golden.load("scan")
    double = dict(dtype=torch.float64)
    hidden = (scale * golden.hashed("rms:h", 2, 5, 64, **double)).float()
    residual = (scale * golden.hashed("rms:r", 2, 5, 64, **double)).float()
    weight = (1 + 0.2 * golden.hashed("rms:w", 64, **double)).float()
    with force(backend, OP):
        normed, total = add_rms_norm(hidden, residual, weight, eps=1e-5)
    tolerance = told["tolerance"]["rmsnorm_abs"]
    assert (normed - arrays[f"rmsnorm_{case}/out"]).abs().max() <= tolerance
    assert (total - arrays[f"rmsnorm_{case}/residual"]).abs().max() <= tolerance * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 65, 87), (2, 5)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree_with_the_float64_reference(backend, shape, dtype):
    tensors = inputs(*shape, dtype=dtype)
    got = results(add_rms_norm, tensors, backend, OP)
    assert got["output 0"].dtype == dtype
    assert got["output 1"].dtype == torch.float32
    agree(got, results(add_rms_norm, widened(tensors), "reference", OP), dtype)


@every_length((2, torch.float32), (5, torch.bfloat16), (1, torch.float16))
def test_every_length_agrees_by_the_kernels(length, dtype, record_property):
    """Rows are transposed for odd lengths; for even ones gradients are one number, as of a sum."""
    tensors = inputs(2 * length, 40, dtype=dtype, device=device_of("triton"))
    lay = None if length % 2 else lambda x: x[:1, :1].expand_as(x)
    if length % 2:
        turned = {n: tensors[n].detach().mT.contiguous().mT for n in ("hidden", "residual")}
        tensors |= {n: x.requires_grad_() for n, x in turned.items()}
    want = results(add_rms_norm, widened(tensors), "reference", OP, lay=lay)
    run = partial(results, add_rms_norm, tensors, "triton", OP, lay=lay)
    agrees_twice(run, want, dtype, record_property)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_function(backend):
    tensors = inputs(2, 3, 4, dtype=torch.float64)
    with force(backend, OP):
        assert torch.autograd.gradcheck(add_rms_norm, tuple(tensors.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_residual_the_sum_is_the_hidden_state_in_float32(backend):
    tensors = inputs(2, 3, 8, dtype=torch.bfloat16)
    with force(backend, OP):
        normed, total = add_rms_norm(tensors["hidden"], None, tensors["weight"])
        zero = torch.zeros(2, 3, 8)
        want, _ = add_rms_norm(tensors["hidden"], zero, tensors["weight"])
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, tensors["hidden"].float(), rtol=0, atol=0)
    torch.testing.assert_close(normed, want, rtol=0, atol=0)


def test_the_sum_can_be_kept_in_the_dtype_of_the_hidden_state():
    tensors = inputs(2, 3, 8, dtype=torch.bfloat16)
    _, total = add_rms_norm(tensors["hidden"], None, tensors["weight"], residual_dtype=torch.half)
    assert total.dtype == torch.promote_types(torch.half, torch.bfloat16)
    low = torch.bfloat16
    _, total = add_rms_norm(tensors["hidden"], None, tensors["weight"], residual_dtype=low)
    assert total.dtype == low


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_token_stays_zero(backend):
    tensors = inputs(1, 2, 8)
    zero = torch.zeros(1, 2, 8, requires_grad=True)
    with force(backend, OP):
        normed, _ = add_rms_norm(zero, None, tensors["weight"])
    normed.sum().backward()
    assert not normed.any()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    tensors = inputs(2, 3, 8)
    want = results(add_rms_norm, tensors, backend, OP)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(add_rms_norm, tensors, backend, OP)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0)


def test_the_cpu_backend_keeps_the_sum_and_a_number_for_each_token():
    tensors, kept = inputs(2, 3, 8), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with hooks, force("cpu", OP):
        _, total = add_rms_norm(**tensors)
    addresses = {x.untyped_storage().data_ptr(): x for x in kept}
    assert total.untyped_storage().data_ptr() in addresses
    assert sorted(x.numel() for x in addresses.values()) == [6, 8, 48]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(weight=torch.ones(7)), r"weight has shape \(7,\), expected \(8,\)"),
        (
            dict(residual=torch.ones(2, 4, 8)),
            r"residual has shape \(2, 4, 8\), expected \(2, 3, 8\)",
        ),
        (dict(hidden=torch.ones(2, 3, 8).long()), "hidden is torch.int64, expected a floating"),
        (dict(weight=torch.ones(8, device="meta")), "weight is on meta, expected cpu"),
    ],
)
def test_a_wrong_shape_is_named_with_the_right_one(changes, message):
    with pytest.raises(ValueError, match=message):
        add_rms_norm(**inputs(2, 3, 8) | changes)
