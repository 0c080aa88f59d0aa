"""The kernels of a block, called as a mixer calls them, each on its own."""

from __future__ import annotations

from typing import Any

import torch

from fambav.bench.scan import REVERSE, SCALE, Inputs
from fambav.bench.work import Shape
from fambav.engine.timing import Run
from fambav.ops.kernels import kernel_set

EPS = 1e-5


class Calls:
    """Inputs and places of every kernel for one shape.

    Args:
        shape: Sizes of the block.
        kernels: Name of the set.
        device: Where.
        dtype: Of the tokens.
    """

    def __init__(
        self, shape: Shape, kernels: str, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._set: Any = kernel_set(kernels).load()
        self._x = x = Inputs.draw(
            shape.batch, shape.length, shape.inner, shape.state, device=device, dtype=dtype
        )
        self._y, self._dy = torch.empty_like(x.u), torch.empty_like(x.z)
        self._total, self._place, self._other = (torch.empty_like(x.z) for _ in range(3))
        self._du, self._ddelta = torch.empty_like(x.u), torch.empty_like(x.delta)
        self._dprojected = torch.empty_like(x.projected)
        taps = [torch.randn(shape.inner, shape.taps, device=device) for _ in range(2)]
        self._conv = taps, [torch.randn(shape.inner, device=device) for _ in range(2)]
        rows = shape.tokens, shape.dim
        self._hidden, self._normed = (torch.randn(rows, device=device).to(dtype) for _ in range(2))
        self._residual, self._sum = (torch.randn(rows, device=device) for _ in range(2))
        self._weight = torch.ones(shape.dim, device=device)

    def runs(self) -> dict[str, Run]:
        """Return what calls each kernel, by the names of `work.kernels`."""
        self.scan_forward()
        self.gate_forward()
        self.norm_forward()
        names = ("scan", "conv", "gate", "norm")
        return {
            f"{name}_{way}": getattr(self, f"{name}_{way}")
            for name in names
            for way in ("forward", "backward")
        }

    def scan_forward(self, **form: int) -> object:
        """Scan both ways and keep states; `form` may fix the block and the warps of a program."""
        x = self._x
        given = x.u, x.delta, x.A, *x.weights(x.projected), x.D, x.bias
        found = self._set.scan_forward(
            *given, self._y, softplus=True, reverse=REVERSE, keep=True, **form
        )
        self._kept = found[1]
        return found

    def scan_backward(self, **form: int) -> object:
        """Return or write all gradients of both scans."""
        x = self._x
        given = x.u, x.delta, x.A, *x.weights(x.projected), x.D, x.bias
        places = self._du, self._ddelta, *x.weights(self._dprojected)
        grad = x.grad.expand_as(x.u)
        options = dict(softplus=True, reverse=REVERSE, **form)
        return self._set.scan_backward(grad, None, self._kept, *given, *places, **options)

    def conv_forward(self) -> object:
        """Convolve both ways."""
        run = self._set.conv_forward
        return run(self._x.z, *self._conv, self._y, silu=True, reverse=REVERSE)

    def conv_backward(self) -> object:
        """Return or write the gradients of both convolutions."""
        run, x = self._set.conv_backward, self._x
        return run(x.u, x.z, *self._conv, self._place, silu=True, reverse=REVERSE)

    def gate_forward(self) -> object:
        """Add both directions and gate them."""
        x = self._x
        return self._set.gate_forward(x.u, x.z, self._place, self._total, scale=SCALE)

    def gate_backward(self) -> object:
        """Write the gradients of the gate."""
        x = self._x
        places = self._dy, self._other
        return self._set.gate_backward(x.grad, self._total, x.z, *places, scale=SCALE)

    def norm_forward(self) -> object:
        """Add to the residual stream and normalise."""
        given = self._hidden, self._residual, self._weight, self._normed, self._sum
        self._scale = self._set.add_rms_norm_forward(*given, eps=EPS)
        return self._scale

    def norm_backward(self) -> object:
        """Return or write the gradients of the norm."""
        given = self._hidden, self._residual, self._sum, self._weight, self._scale
        places = torch.empty_like(self._hidden), torch.empty_like(self._residual)
        return self._set.add_rms_norm_backward(*given, *places)
