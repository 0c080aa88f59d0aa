"""The sizes, options and tolerances over which mamba-ssm and causal-conv1d test their functions.

Written out for the default backends.  The reference is the loop in float64, so that a result is
compared with the truth and not with another rounding of it.

Sources: the parameters and tolerances of tests/ops/test_selective_scan.py in state-spaces/mamba and
of tests/test_causal_conv1d.py in Dao-AILab/causal-conv1d.
"""

from itertools import product

import pytest
import torch

from fambav.ops import causal_conv1d, force, selective_scan

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCAN = {  # relative and absolute tolerance
    torch.float32: (6e-4, 2e-3),
    torch.float16: (3e-3, 5e-3),
    torch.bfloat16: (3e-2, 5e-2),
}
CONV = SCAN | {torch.float32: (3e-4, 1e-3), torch.bfloat16: (1e-2, 5e-2)}
WEIGHT = (1e-3, 1e-3)
OPTIONS = ("D", "z", "delta_bias", "delta_softplus", "return_last_state")
EVERY = dict.fromkeys(OPTIONS, True)
SHORT = [1, 2, 8, 16, 32, 64, 128, 129, 130, 151, 256]
LENGTHS = [*SHORT, 372, 512, 784, 1024, 1134, 2048, 4096]


def check(function, inputs, tolerances, options, op):
    """Compare outputs and gradients with those of the reference in float64."""
    wide = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    outputs = function(**inputs, **options)
    with force("reference", op):
        wanted = function(**wide, **options)
    if not isinstance(outputs, tuple):
        outputs, wanted = (outputs,), (wanted,)
    grad = torch.randn_like(outputs[0])
    outputs[0].backward(grad)
    wanted[0].backward(grad.double())
    for n, (y, want) in enumerate(zip(outputs, wanted, strict=True)):
        close(f"output {n}", y, want, tolerances["output"])
    for name, x in inputs.items():
        close(f"gradient of {name}", x.grad, wide[name].grad, tolerances[name])


def close(name, got, want, tolerance):
    torch.testing.assert_close(
        got.double(),
        want,
        rtol=tolerance[0],
        atol=tolerance[1],
        msg=lambda text: f"{name}: {text}",
    )


def scan(length, dtype, groups, given, constant=""):
    """Run a scan of 2 sequences, 4 channels and 8 states with some of the options."""
    torch.manual_seed(0)

    def weight(name):
        if name in constant:
            return torch.randn(4, 8)
        shape = (2, 8, length) if groups == 1 else (2, groups, 8, length)
        return torch.randn(shape).to(dtype)

    inputs = dict(
        u=torch.randn(2, 4, length).to(dtype),
        delta=(0.5 * torch.rand(2, 4, length)).to(dtype),
        A=-0.5 * torch.rand(4, 8),
        B=weight("B"),
        C=weight("C"),
    )
    optional = dict(
        D=torch.randn(4), z=torch.randn(2, 4, length).to(dtype), delta_bias=0.5 * torch.rand(4)
    )
    inputs |= {n: x for n, x in optional.items() if given[n]}
    inputs = {n: x.requires_grad_() for n, x in inputs.items()}
    relative, absolute = SCAN[dtype]
    parameter = (max(1e-3, relative), max(1e-3, absolute)) if given["z"] else WEIGHT
    tolerances = dict.fromkeys(("D", "z", "delta_bias"), parameter) | dict(
        output=(relative, absolute),
        u=(2 * relative, 2 * absolute),
        delta=(5 * relative, 10 * absolute),
        A=(parameter[0], 5 * parameter[1]),
        B=parameter if "B" in constant else (relative, absolute),
        C=parameter if "C" in constant else (relative, absolute),
    )
    options = {n: given[n] for n in ("delta_softplus", "return_last_state")}
    check(selective_scan, inputs, tolerances, options, "selective_scan")


@pytest.mark.parametrize("length", LENGTHS)
def test_the_scan_agrees_at_every_length(length):
    given = list(product([1, 2], DTYPES))
    if length not in SHORT:  # the reference takes seconds: half of them, the others at the next
        given = given[LENGTHS.index(length) % 2 :: 2]
    for groups, dtype in given:
        scan(length, dtype, groups, EVERY)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [8, 130])
def test_the_scan_agrees_with_every_choice_of_options(length, groups, dtype):
    for given in product([False, True], repeat=5):
        scan(length, dtype, groups, dict(zip(OPTIONS, given, strict=True)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [8, 151])
@pytest.mark.parametrize("constant", ["B", "C", "BC"])
def test_the_scan_agrees_with_weights_that_are_the_same_at_all_times(constant, length, dtype):
    scan(length, dtype, 1, EVERY, constant)


def convolve(dim, length, width, dtype, *, bias, silu, last):
    """Convolve channels from the midst of a wider tensor."""
    torch.manual_seed(0)
    wider = torch.randn(2, length, dim + 48) if last else torch.randn(2, dim + 48, length).mT
    inputs = dict(x=wider.to(dtype)[:, :, 16 : 16 + dim].mT, weight=torch.randn(dim, width))
    if bias:
        inputs["bias"] = torch.randn(dim)
    inputs = {n: x.requires_grad_() for n, x in inputs.items()}
    tolerances = dict(output=CONV[dtype], x=CONV[dtype], weight=WEIGHT, bias=WEIGHT)
    options = dict(activation="silu" if silu else None)
    check(causal_conv1d, inputs, tolerances, options, "causal_conv1d")


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("length", SHORT)
def test_the_convolution_agrees_with_every_choice_of_options(length, width):
    for dtype, bias, silu, last in product(DTYPES, *[[False, True]] * 3):
        convolve(64, length, width, dtype, bias=bias, silu=silu, last=last)


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("length", [n for n in LENGTHS if n not in SHORT])
def test_the_convolution_agrees_at_long_lengths(length, width):
    for dtype, last in product(DTYPES, [False, True]):
        convolve(64, length, width, dtype, bias=True, silu=True, last=last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["length last", "channels last"])
@pytest.mark.parametrize("length", [1, 2, 129, 151])
def test_the_convolution_agrees_with_many_channels(length, last, dtype):
    convolve(4096 + 32, length, 4, dtype, bias=True, silu=True, last=last)
