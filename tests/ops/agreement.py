"""Inputs of every kind, and how close a backend must come to the float64 reference."""

import pytest
import torch

from fambav.ops import force, selective_scan

# Largest difference from the reference in float64, over the largest number of the same tensor.  In
# bfloat16 it is the rounding of the result, as inputs are rounded before the reference sees them.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 4e-3}
# The same over every length: the rounding of a result in its dtype; for the mixer that of several
# results, one made of the other.
ROUNDED = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
CHAINED = {torch.float32: 5e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}
LENGTHS = (
    *(1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100),
    *(127, 128, 129, 130, 196, 197, 255, 256, 257),
)


def every_length(*small, least=1, dense=False):
    """Parametrize a test by length and dtype: a few small ones everywhere, the rest on a GPU.

    `small` are pairs of a length and a dtype; `dense` takes all lengths in float32.
    """
    pairs = [
        (length, dtype)
        for dtype in ROUNDED
        for length in (range(1, 258) if dense and dtype == torch.float32 else LENGTHS)
        if length >= least and (length, dtype) not in small
    ]
    params = [*small, *(pytest.param(*pair, marks=pytest.mark.gpu) for pair in pairs)]
    return pytest.mark.parametrize(("length", "dtype"), params, ids=str)


def agrees_twice(run, want, dtype, record, limits=ROUNDED):
    """Run twice: the same bits, and close to the result in float64; record the largest error."""
    got, again = run(), run()
    assert got.keys() == want.keys()
    errors = {}
    for name, expected in want.items():
        assert torch.equal(got[name], again[name]), f"{name} is another at the second call"
        assert got[name].shape == expected.shape, f"{name} has another shape"
        assert got[name].isfinite().all(), f"{name} is not finite"
        exact = expected.detach().cpu().double()
        error = (got[name].detach().cpu().double() - exact).abs().max()
        errors[name] = (error / (exact.abs().max() or 1)).item()
    worst = max(errors, key=errors.get)
    record("worst_error", errors[worst])
    record("worst_tensor", worst)
    # Triton's interpreter cuts the digits of bfloat16 off instead of rounding.
    limit = limits[dtype] * (1 if torch.cuda.is_available() else 2)
    assert errors[worst] <= limit, f"{worst} is off by {errors[worst]:.1e}, expected {limit:.1e}"


def draw(name, *shape, dtype=torch.float32, device="cpu"):
    """Normal numbers that depend on the name and the shape, as a leaf."""
    generator = torch.Generator().manual_seed(sum(name.encode()) + sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()


def scan_inputs(batch, dim, groups, state, length, *, dtype=torch.float32, device="cpu"):
    """Every tensor that a scan can take, channels last in memory."""
    wide = torch.promote_types(dtype, torch.float32)

    def tokens(name):
        return draw(name, batch, length, dim, dtype=dtype, device=device)

    def weight(name):
        return draw(name, batch, groups, state, length, dtype=dtype, device=device)

    def channels(name, *more):
        return draw(name, dim, *more, dtype=wide, device=device)

    rate = -channels("A", state).detach().exp()
    return dict(
        u=tokens("u").mT.detach().requires_grad_(),
        delta=tokens("delta").mT.detach().requires_grad_(),
        A=rate.requires_grad_(),
        B=weight("B"),
        C=weight("C"),
        D=channels("D"),
        z=tokens("z").mT.detach().requires_grad_(),
        delta_bias=channels("bias"),
    )


def widened(inputs):
    """The same numbers in float64, as new leaves on the CPU."""
    return {n: x.detach().cpu().double().requires_grad_() for n, x in inputs.items()}


def results(function, inputs, backend, op="selective_scan", *, lay=None, **options):
    """Outputs by their place, and the gradient of every input by its name.

    `lay` gives the gradients of the outputs another layout.
    """
    with force(backend, op):
        outputs = function(**inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [draw(f"grad {i}", *y.shape).detach().bfloat16() for i, y in enumerate(outputs)]
    weights = [w.to(y) for w, y in zip(weights, outputs, strict=True)]
    weights = weights if lay is None else list(map(lay, weights))
    grads = torch.autograd.grad(outputs, list(inputs.values()), weights)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return found | {f"gradient of {n}": g for n, g in zip(inputs, grads, strict=True)}


def agree(got, want, dtype):
    """Compare two results tensor by tensor."""
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert got[name].isfinite().all(), f"{name} is not finite"
        error = (got[name].cpu().double() - expected).abs().max()
        scale = expected.abs().max()
        assert error <= TOLERANCE[dtype] * scale, f"{name} is off by {error:.1e} of {scale:.1e}"


def device_of(backend):
    """Where a set of kernels runs; without a GPU, Triton's run in its interpreter."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def expected_scans(given, reverse, *, D, bias, softplus, dlast, backend="reference", device="cpu"):
    """Results and gradients of the loop in float64, under their names, directions stacked.

    `given` has a tensor for each direction of what a set of kernels takes, and dy and dlast.
    Another backend than the reference keeps less.
    """
    found = []
    for k, backward in enumerate(reverse):
        own = {n: x[k].to(device).double().requires_grad_() for n, x in given.items()}
        tokens = {n: own[n].movedim(1, -1) for n in ("u", "delta", "B", "C")}
        with force(backend):
            y, last = selective_scan(
                **tokens,
                A=own["A"],
                D=own["D"] if D else None,
                delta_bias=own["bias"] if bias else None,
                delta_softplus=softplus,
                return_last_state=True,
                reverse=backward,
            )
        names = ["u", "delta", "A", "B", "C", *["D"] * D, *["bias"] * bias]
        outputs, weights = (y.mT, last), (own["dy"], own["dlast"])
        pairs = slice(2 if dlast else 1)
        grads = torch.autograd.grad(outputs[pairs], [own[n] for n in names], weights[pairs])
        results = dict(y=y.mT.detach(), last=last.detach())
        results |= {f"d{n}": g for n, g in zip(names, grads, strict=True)}
        found.append(results)
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}
