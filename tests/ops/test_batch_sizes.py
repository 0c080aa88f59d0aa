"""Every operation by every backend on an empty batch, and exported for a batch of any size."""

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from fambav.ops import (
    BackendError,
    Direction,
    Selection,
    add_rms_norm,
    backends,
    bimamba_scan,
    causal_conv1d,
    force,
    match,
    pool,
    selective_scan,
)
from fambav.ops.kernels import KernelSet
from fambav.ops.scan_aligned import aligned_scan
from tests.ops.agreement import device_of, draw

LENGTH, DIM, STATE, RANK = 5, 4, 3, 2
HERE = [(op, name) for op, name, reason in backends() if reason is None and name != "cuda"]


def constant(name, *shape):
    return draw(name, *shape).detach()


PARAMETERS = dict(
    A=-constant("A", DIM, STATE).abs(),
    D=constant("D", DIM),
    weight=constant("weight", DIM),
    taps=constant("taps", DIM, 3),
    out_proj=constant("out", DIM, DIM),
    x_proj=constant("x_proj", RANK + 2 * STATE, DIM),
    dt_proj=constant("dt_proj", DIM, RANK),
)


def scan(p, u, delta, B, C):
    return selective_scan(u.mT, delta.mT, p.A, B.mT, C.mT, p.D, z=u.mT, delta_softplus=True)


def ordered(p, u, delta, B, C):
    order = torch.arange(1, LENGTH, device=u.device).flip(0)[:, None]
    options = dict(delta_softplus=True, order=order)
    return selective_scan(u.mT, delta.mT, p.A, B.mT, C.mT, p.D, z=u.mT, **options)


def aligned(p, u, delta, B, C):
    gaps = dict(skipped=torch.ones_like(u[..., 0]), delta_bias=p.D, delta_softplus=True)
    return aligned_scan(u, delta, p.A, B, C, p.D, **gaps)[0]


def mixer(p, xz):
    one = Direction(p.taps, p.D, p.x_proj, p.dt_proj, p.D, p.A, p.D)
    return bimamba_scan(xz, one, one, p.out_proj)


def pooled(p, x, residual):
    index = torch.arange(LENGTH, device=x.device).expand(x.shape[0], -1)
    size = x.new_ones(x.shape[:2])
    groups = Selection(index[:, :3], index[:, 3:], index[:, :2])
    found = pool(x, residual, size, size, groups)
    return found.x, found.residual, found.size


# The last axis of each input with a batch, and the operation.
OPERATIONS = {
    "selective_scan": ((DIM, DIM, STATE, STATE), scan),
    "ordered_scan": ((DIM, DIM, STATE, STATE), ordered),
    "aligned_scan": ((DIM, DIM, STATE, STATE), aligned),
    "causal_conv1d": ((DIM,), lambda p, x: causal_conv1d(x.mT, p.taps, p.D, "silu")),
    "bimamba_scan": ((2 * DIM,), mixer),
    "add_rms_norm": ((DIM, DIM), lambda p, x, residual: add_rms_norm(x, residual, p.weight)),
    "match": ((DIM,), lambda p, x: match(x, 2)),
    "pool": ((DIM, DIM), pooled),
}


class Model(nn.Module):
    """One operation with its parameters."""

    def __init__(self, op, device):
        super().__init__()
        self.op = op
        for name, tensor in PARAMETERS.items():
            self.register_buffer(name, tensor.to(device).clone())

    def forward(self, *inputs):
        return OPERATIONS[self.op][1](self, *inputs)


def made(op, backend, batch):
    device = device_of(backend)
    widths = enumerate(OPERATIONS[op][0])
    inputs = [draw(f"{op} {n}", batch, LENGTH, width, device=device) for n, width in widths]
    return Model(op, device), inputs


def flat(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def test_every_operation_is_tried():
    assert {op for op, _, _ in backends()} == {*OPERATIONS}


@pytest.mark.parametrize(("op", "backend"), HERE)
def test_an_empty_batch_gives_empty_results_and_gradients_of_zero(op, backend):
    (model, inputs), (_, full) = made(op, backend, 0), made(op, backend, 2)
    for parameter in model.buffers():
        parameter.requires_grad_(op not in ("match", "pool"))
    with force(backend, op):
        got, want = flat(model(*inputs)), flat(model(*full))
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == (0, *theirs.shape[1:])
        assert ours.dtype == theirs.dtype
    if op != "match":
        sum(y.sum() for y in got if y.requires_grad).backward()
        assert all(x.grad.shape == x.shape for x in inputs)
        assert not any(p.grad.any() for p in model.buffers() if p.grad is not None)


def test_a_backend_that_cannot_run_is_refused_for_an_empty_batch_too():
    model, inputs = made("selective_scan", "numba", 0)
    double = [x.double() for x in inputs]
    with force("numba"), pytest.raises(BackendError, match="float64, expected float32"):
        model.double()(*double)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("op", "backend"), HERE)
def test_it_can_be_exported_for_a_batch_of_any_size(op, backend, training, monkeypatch):
    model, inputs = made(op, backend, 3)
    batch = Dim("batch", min=2, max=64)

    def load(kernels):
        raise AssertionError(f"{kernels.name} was imported while tracing")

    with force(backend, op), torch.set_grad_enabled(training):
        with monkeypatch.context() as patch:
            patch.setattr(KernelSet, "load", load)
            program = export(model, tuple(inputs), dynamic_shapes=(({0: batch},) * len(inputs),))
        _, others = made(op, backend, 7)
        got, want = flat(program.module()(*others)), flat(model(*others))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
