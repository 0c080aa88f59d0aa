"""How mamba-ssm's extension is called, shown by one that computes with the reference."""

import sys
from types import ModuleType

import pytest
import torch

from fambav.ops import BackendError, force, kernels, selective_scan
from fambav.ops.dispatch import no_reason
from fambav.ops.scan_mamba_ssm import unsupported
from fambav.ops.selective_scan import SELECTIVE_SCAN
from tests.ops.agreement import agree, results, scan_inputs


class Extension(ModuleType):
    """The two functions of the extension, with its order of arguments and results.

    fwd gives [y before the gate, (batch, dim, chunks, 2 state) with the state in odd places, and
    the gated y if there is a gate]; bwd gives the gradients of u, delta, A, B, C, D, bias and, if
    there is a gate, z.
    """

    def __init__(self):
        super().__init__("selective_scan_cuda")
        self.calls = []

    def fwd(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        self.expect(u, delta, A, B, C, D, z, delta_bias)
        self.calls.append("fwd")
        options = dict(D=D, delta_bias=delta_bias, delta_softplus=delta_softplus)
        with force("reference"):
            y, h = selective_scan(u, delta, A, B, C, **options, return_last_state=True)
            gated = [] if z is None else [selective_scan(u, delta, A, B, C, z=z, **options)]
        pairs = torch.stack([torch.full_like(h, torch.nan), h], dim=-1).flatten(2)
        return [y, pairs[:, :, None], *gated]

    def bwd(self, *arguments):
        *tensors, dout, x, out, dz, delta_softplus, recompute_out_z = arguments
        assert len(tensors) == 8
        assert x.shape[2] == 1
        assert dz is None
        assert recompute_out_z is False
        assert dout.stride(-1) == 1
        self.expect(*tensors)
        assert (out is None) == (tensors[6] is None)
        self.calls.append("bwd")
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        with torch.enable_grad(), force("reference"):
            y = selective_scan(*leaves, delta_softplus=delta_softplus)
            grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dout))
        du, ddelta, dA, dB, dC, dD, dz, dbias = (t if t is None else next(grads) for t in leaves)
        return [du, ddelta, dA, dB, dC, dD, dbias, *([] if dz is None else [dz])]

    @staticmethod
    def expect(u, delta, A, B, C, D, z, bias):
        assert {t.dtype for t in (A, D, bias) if t is not None} == {torch.float32}
        tokens = [t for t in (u, delta, z) if t is not None]
        varying = [t for t in (B, C) if t.dim() == 4]
        assert {t.dtype for t in (*tokens, *varying)} == {u.dtype}
        assert all(t.stride(-1) == 1 for t in (*tokens, *varying))
        assert all(t.is_contiguous() for t in (D, bias) if t is not None)


@pytest.fixture
def extension(monkeypatch):
    """An extension that runs on the CPU, in place of the real one."""
    fake = Extension()
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", fake)
    kernels._module.cache_clear()
    ready = SELECTIVE_SCAN["cuda"]._replace(unsupported=no_reason, unavailable=no_reason)
    monkeypatch.setattr(SELECTIVE_SCAN, "backends", (ready, SELECTIVE_SCAN["reference"]))
    yield fake
    kernels._module.cache_clear()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("absent", [(), ("z",), ("D", "delta_bias"), ("D", "z", "delta_bias")])
def test_arguments_and_gradients_reach_their_places(extension, absent, softplus, reverse):
    inputs = scan_inputs(2, 8, 2, 4, 5)
    inputs = {name: x for name, x in inputs.items() if name not in absent}
    options = dict(delta_softplus=softplus, reverse=reverse)
    got = results(selective_scan, inputs, "cuda", **options)
    assert extension.calls == ["fwd", "bwd"]
    want = results(selective_scan, inputs, "reference", **options)
    agree(got, {name: x.double() for name, x in want.items()}, torch.float32)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_last_state_is_the_extensions(extension, reverse):
    inputs = scan_inputs(2, 8, 1, 4, 5)
    options = dict(reverse=reverse, return_last_state=True)
    with torch.no_grad():
        with force("cuda"):
            _, h = selective_scan(**inputs, **options)
        with force("reference"):
            _, want = selective_scan(**inputs, **options)
    assert extension.calls == ["fwd"]
    torch.testing.assert_close(h, want)


def test_a_gradient_of_the_last_state_is_refused_not_dropped(extension):
    with force("cuda"):
        y, h = selective_scan(**scan_inputs(2, 8, 1, 4, 5), return_last_state=True)
    with pytest.raises(BackendError, match="the last state has a gradient, expected none"):
        (y.sum() + h.sum()).backward()
    assert extension.calls == ["fwd"]


def test_low_precision_inputs_keep_their_dtype_and_parameters_become_float32(extension):
    inputs = scan_inputs(2, 8, 1, 4, 5, dtype=torch.bfloat16)
    inputs = {n: x.detach().bfloat16().requires_grad_() for n, x in inputs.items()}
    inputs["delta"] = inputs["delta"].detach().float().requires_grad_()
    got = results(selective_scan, inputs, "cuda", out_dtype=torch.float32)
    assert extension.calls == ["fwd", "bwd"]
    assert got["output 0"].dtype == torch.float32
    assert all(got[f"gradient of {n}"].dtype == x.dtype for n, x in inputs.items())


def test_numbers_of_channels_reach_the_extension_next_to_each_other(extension):
    inputs = scan_inputs(2, 8, 1, 4, 5)
    for name in ("D", "delta_bias"):
        inputs[name] = inputs[name].detach().repeat_interleave(2)[::2].requires_grad_()
    got = results(selective_scan, inputs, "cuda")
    assert extension.calls == ["fwd", "bwd"]
    want = results(selective_scan, inputs, "reference")
    agree(got, {name: x.double() for name, x in want.items()}, torch.float32)


def test_constant_weights_go_to_the_extension_as_they_are(extension):
    inputs = scan_inputs(2, 8, 1, 4, 5) | dict(B=torch.ones(8, 4))
    for reverse in (False, True):
        with force("cuda"):
            y = selective_scan(**inputs, reverse=reverse)
        with force("reference"):
            torch.testing.assert_close(y, selective_scan(**inputs, reverse=reverse))
    assert extension.calls == ["fwd", "fwd"]


def test_an_extension_with_another_signature_is_refused(extension):
    extension.fwd = lambda u, delta: None
    with force("cuda"), pytest.raises(BackendError, match="fwd does not take our arguments"):
        selective_scan(**scan_inputs(2, 8, 1, 4, 5))


def test_what_the_extension_cannot_do_is_refused_by_name():
    u, A = torch.ones(1, 2, 3), torch.ones(2, 257)
    assert unsupported(u, A, u, u) == "state is 257, expected at most 256"
    assert unsupported(u, A[:, :4], u, u) == "a tensor is on cpu, expected a CUDA device"
    assert kernels.unsupported_dtype(torch.float64).startswith("a tensor is torch.float64")
    assert kernels.unsupported_dtype(torch.bfloat16) is None
