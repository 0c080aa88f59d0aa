"""Inputs of every kind, and how close a backend must come to the float64 reference."""

import torch

from fambav.ops import force, selective_scan

# Largest difference from the reference in float64, over the largest number of the same tensor.  In
# bfloat16 it is the rounding of the result, as inputs are rounded before the reference sees them.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 4e-3}


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


def expected_scans(given, reverse, *, D, bias, softplus, dlast):
    """Results and gradients of the loop in float64, under their names, directions stacked.

    `given` has a tensor for each direction of what a set of kernels takes, and dy and dlast.
    """
    found = []
    for k, backward in enumerate(reverse):
        own = {n: x[k].cpu().double().requires_grad_() for n, x in given.items()}
        tokens = {n: own[n].movedim(1, -1) for n in ("u", "delta", "B", "C")}
        with force("reference"):
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
