"""The Mamba mixer over a sequence, in one direction or both.

    x, z = in_proj(hidden)
    u = silu(conv(x))      dt, B, C = x_proj(u)      y = scan(u, softplus(dt_proj(dt)), A, B, C, D)
    out = out_proj((y + y of the other direction) * silu(z))

Source: Gu and Dao, "Mamba", arXiv:2312.00752, figure 3 and algorithm 2; Zhu et al., "Vision Mamba",
arXiv:2401.09417, algorithm 1.
"""

from __future__ import annotations

import math
import warnings
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooked
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.module_tracker import ModuleTracker

from fambav.arguments import flags, known_name, whole
from fambav.layers.tokens import Intermediates, Tokens
from fambav.ops import Direction, bimamba_scan
from fambav.ops.bimamba import RETURNED, ScanInputs, scan_inputs, token_score
from fambav.ops.dispatch import without_autocast
from fambav.ops.fused_bimamba import SCORES
from fambav.ops.products import linear
from fambav.ops.scan_aligned import aligned_scan, count_skipped, estimate_skipped_dt
from fambav.registry import BIMAMBA

DT_MIN, DT_MAX = 1e-3, 0.1  # step sizes that a new mixer starts from
_PLAIN = (nn.Linear, nn.Conv1d)  # modules that kernels compute in their stead
_FUSED = RETURNED | {"z", "mixed"}  # intermediates that a fused mixer returns
_WATCHED = "is watched by hooks on all modules"

# A, (inner, state); D, (inner,); bias of the step size, (inner,), None if delta includes it.
Recurrence = tuple[Tensor, Tensor, Tensor | None]


class Mamba(nn.Module):
    """Project, scan, gate, project.

    Everything between the projections is (batch, length, inner) in memory, and the backward
    direction is a scan from the last token to the first: no sequence is copied to be reversed.
    Both directions share the gate, which is therefore applied once, to their sum.

    Args:
        dim: Width of a token.
        bimamba_type: "v2", two directions with their own convolution, projections and D; "v1", two
            directions that differ in A only; "none", forward only.
        divide_out: Halve the sum of both directions; v2 only.
        state: Numbers of state per channel.
        kernel: Length of the convolution.
        expand: Inner width, in units of dim.
        depth: Mixers that add to one residual stream; the last projection starts smaller by its
            square root.
        legacy_init: Start the backward dt bias of v2 at the published zero, which is a step 7 to
            700 times the forward direction's, instead of drawing it as the forward one.

    Attributes:
        name: Of this mixer within its model.
        warned: Sub-modules that a warning has named; a model's mixers share it.

    Raises:
        ValueError: If bimamba_type is unknown, or another argument is not one of those above.
    """

    conv1d: nn.Conv1d
    conv1d_b: nn.Conv1d
    x_proj: nn.Linear
    x_proj_b: nn.Linear
    dt_proj: nn.Linear
    dt_proj_b: nn.Linear

    def __init__(
        self,
        dim: int,
        *,
        bimamba_type: str = "v2",
        divide_out: bool = True,
        state: int = 16,
        kernel: int = 4,
        expand: int = 2,
        depth: int = 1,
        legacy_init: bool = False,
    ) -> None:
        super().__init__()
        known_name("bimamba_type", bimamba_type, BIMAMBA)
        whole("state", state, least=1)
        flags(divide_out=divide_out, legacy_init=legacy_init)
        inner, rank = expand * dim, math.ceil(dim / 16)
        self.name, self.warned = "", list[str]()
        self.bimamba_type, self.reach = bimamba_type, kernel - 1
        self.halved = divide_out and bimamba_type == "v2"
        self.splits = (rank, state, state)
        self._ends = ("", "_b") if bimamba_type == "v2" else ("",)  # of names of a direction's own

        # Names and order are those of the published weights.
        self.A_log = init_A_log(inner, state)
        self.D = nn.Parameter(torch.ones(inner))
        if bimamba_type != "none":
            self.A_b_log = init_A_log(inner, state)
        if bimamba_type == "v2":
            self.D_b = nn.Parameter(torch.ones(inner))
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        for end in self._ends:
            self.add_module(f"conv1d{end}", nn.Conv1d(inner, inner, kernel, groups=inner))
            self.add_module(f"x_proj{end}", nn.Linear(inner, sum(self.splits), bias=False))
            self.add_module(f"dt_proj{end}", init_dt_proj(rank, inner))
        if legacy_init and bimamba_type == "v2":
            nn.init.zeros_(self.dt_proj_b.bias)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= depth**0.5
        parts = (f"{name}{end}" for end in self._ends for name in ("conv1d", "x_proj", "dt_proj"))
        self._called = *parts, "out_proj"

    def forward(
        self,
        hidden: Tensor,
        tokens: Tokens | None = None,
        *,
        want: frozenset[str] = frozenset(),
        gap_policy: str | None = None,
    ) -> Tensor | tuple[Tensor, Intermediates]:
        """Mix along length.

        Args:
            hidden: (batch, length, dim).
            tokens: Whose features they are: their positions and skipped step sizes.
            want: Fields of `Intermediates` to return.  For u and y the mixer runs composed of
                single scans, which costs more than the fused one.
            gap_policy: How the state ages over tokens that went, see `registry.GAP_POLICIES`; None
                if it does not.

        Returns:
            Shaped like hidden; with `tokens` also the wanted intermediates, of which scores, B and
            C have no gradient.
        """
        xz = self._projected(hidden)  # (batch, length, 2 * inner)
        if (replaced := self.unfused) is not None:
            self._warn(replaced)
        elif self.bimamba_type == "v2" and want <= _FUSED and len(want & SCORES.keys()) < 2:
            return self._fused(xz, tokens, want, gap_policy)
        x, z = xz.chunk(2, dim=-1)  # both (batch, length, inner)
        inputs, recurrences = self._by_kernels(x) if replaced is None else self._by_modules(x)
        if self.bimamba_type == "v1":  # scans the same both ways
            inputs *= 2
            recurrences.append((A_from_log(self.A_b_log), *recurrences[0][1:]))
        ys, used = self._scan_each(inputs, recurrences, tokens, want, gap_policy or "none")
        out: Tensor = self.out_proj(sum(ys[1:], ys[0]) * self._gate(z))  # (batch, length, dim)
        if tokens is None:
            return out
        scores = [name for name in want if name in SCORES]
        values = {n: token_score(torch.stack(ys, dim=1), z[:, None], n)[..., None] for n in scores}
        values |= {name: torch.stack(x, dim=1) for name, x in used.items() if name in want}
        values |= {name: x for name, x in (("z", z), ("mixed", out)) if name in want}
        return out, Intermediates(order=_order(hidden, len(recurrences)), **values)

    def _fused(
        self, xz: Tensor, tokens: Tokens | None, want: frozenset[str], gap_policy: str | None
    ) -> Tensor | tuple[Tensor, Intermediates]:
        """Do the rest of `forward` in one operation."""
        forward, backward = self._directions(log_A=True)
        weights = forward, backward, self.out_proj.weight
        scale = 0.5 if self.halved else 1.0
        if tokens is None:
            return bimamba_scan(xz, *weights, scale=scale, log_A=True)
        policy = gap_policy or "none"
        out, made = bimamba_scan(
            *(xz, *weights, *self._gaps(tokens, policy)),
            scale=scale,
            gap_policy=policy,
            log_A=True,
            want=want & RETURNED,
        )
        # (2, batch, length, ...) -> (batch, 2, length, ...), for a score with an axis of 1 behind
        values = {n: (x[..., None] if n in SCORES else x).transpose(0, 1) for n, x in made.items()}
        values |= {n: x for n, x in (("z", xz.chunk(2, dim=-1)[1]), ("mixed", out)) if n in want}
        return out, Intermediates(order=_order(xz, 2), **values)

    @staticmethod
    def _gaps(tokens: Tokens | None, policy: str) -> tuple[Tensor | None, Tensor | None]:
        """Return how many tokens went before each, (2, batch, length), or their step sizes."""
        if policy == "none" or tokens is None:
            return None, None
        if policy == "cached":
            carried = tokens.skipped_dt
            return None, None if carried is None else carried.transpose(0, 1)
        each = [count_skipped(tokens.position, reverse=end) for end in (False, True)]
        return torch.stack(each), None

    @property
    def unfused(self) -> tuple[str, str] | None:
        """The first sub-module that kernels must not stand in for, and why; None if they may.

        One that is replaced, hooked or parametrized is called as a module, and so are all others.
        """
        modules = self._modules  # every forward pass comes here
        for name in self._called:
            reason = not_plain(modules[name])
            if reason is not None:
                return name, reason
        return (self._called[0], _WATCHED) if _all_watched() else None

    def _projected(self, hidden: Tensor) -> Tensor:
        """Apply `in_proj`, by its weight alone where calling the module does no more."""
        if not_plain(self.in_proj) is None and not _all_watched():
            return linear(hidden, self.in_proj.weight)
        out: Tensor = self.in_proj(hidden)
        return out

    def _warn(self, unfused: tuple[str, str]) -> None:
        """Warn once for all mixers of a model that they are not fused."""
        name, reason = f"{self.name}.{unfused[0]}".lstrip("."), unfused[1]
        if not self.warned:
            self.warned.append(name)
            warnings.warn(
                f"{name} {reason}: such mixers run as single modules, which takes more time and "
                "memory than the fused kernels; the model's `unfused` lists them",
                stacklevel=2,
            )

    def _part(self, name: str, end: str) -> nn.Module:
        return cast(nn.Module, getattr(self, name + end))

    def _by_kernels(self, x: Tensor) -> tuple[list[ScanInputs], list[Recurrence]]:
        """Return what each scan reads, computed from the weights of the sub-modules."""
        directions = self._directions()
        inputs = [scan_inputs(x, d, reverse=bool(end)) for end, d in enumerate(directions)]
        return inputs, [(d.A, d.D, d.dt_bias) for d in directions]

    def _by_modules(self, x: Tensor) -> tuple[list[ScanInputs], list[Recurrence]]:
        """Return the same by calling the sub-modules; backward ones see the sequence reversed."""
        inputs, recurrences = list[ScanInputs](), list[Recurrence]()
        for end in self._ends:
            rows = F.pad((x.flip(1) if end else x).mT, (self.reach, 0))  # (batch, inner, length)
            u = F.silu(self._part("conv1d", end)(rows)).mT  # (batch, length, inner)
            dt, B, C = self._part("x_proj", end)(u).split(self.splits, dim=-1)
            each = u, apply_dt_proj(self._part("dt_proj", end), dt), B, C
            u, delta, B, C = (t.flip(1) if end else t for t in each)
            inputs.append((u, delta, B, C))
            A_log, D = (self.A_b_log, self.D_b) if end else (self.A_log, self.D)
            recurrences.append((A_from_log(A_log), upcast(D), None))
        return inputs, recurrences

    def _directions(self, *, log_A: bool = False) -> tuple[Direction, ...]:
        """Return the parameters of each direction that has its own."""
        rate = upcast if log_A else A_from_log
        forward = _direction(self.conv1d, self.x_proj, self.dt_proj, rate(self.A_log), self.D)
        if self.bimamba_type != "v2":
            return (forward,)
        parts = self.conv1d_b, self.x_proj_b, self.dt_proj_b, rate(self.A_b_log), self.D_b
        return forward, _direction(*parts)

    def _gate(self, z: Tensor) -> Tensor:
        return F.silu(z) * 0.5 if self.halved else F.silu(z)

    def _scan_each(
        self,
        inputs: list[ScanInputs],
        recurrences: list[Recurrence],
        tokens: Tokens | None,
        want: frozenset[str],
        policy: str,
    ) -> tuple[tuple[Tensor, ...], dict[str, tuple[Tensor, ...]]]:
        """Scan each direction on its own.

        Returns:
            Each scan's output, (batch, length, inner), and by name what each of them used.
        """
        skipped, skipped_dt = self._gaps(tokens, policy)
        used = []
        for end, ((u, delta, B, C), (A, D, bias)) in enumerate(
            zip(inputs, recurrences, strict=True)
        ):
            count, dt = (None if gap is None else gap[end] for gap in (skipped, skipped_dt))
            if policy == "bias" and bias is None and count is not None:
                own = upcast(bias_of(self._part("dt_proj", self._ends[end % len(self._ends)])))
                dt = estimate_skipped_dt(policy, delta=upcast(delta), skipped=count, bias=own)
                count = None
            y, step = aligned_scan(
                *(u, delta, A, B, C, D, dt, count),
                gap_policy=policy,
                delta_bias=bias,
                delta_softplus=True,
                reverse=bool(end),
                return_dt="delta" in want,
            )
            used.append((y, u, delta if step is None else step, B.detach(), C.detach()))
        each = dict(zip(("y", "u", "delta", "B", "C"), zip(*used, strict=True), strict=True))
        return each["y"], each


def _order(hidden: Tensor, directions: int) -> Tensor:
    """Return in which order the tokens are scanned, (1, directions, length)."""
    forward = torch.arange(hidden.shape[1], device=hidden.device)
    return torch.stack((forward, forward.flip(0))[:directions])[None]


def _direction(
    conv: nn.Conv1d, x_proj: nn.Linear, dt_proj: nn.Linear, A: Tensor, D: Tensor
) -> Direction:
    return Direction(
        conv_weight=conv.weight.squeeze(1),  # (inner, 1, kernel) -> (inner, kernel)
        conv_bias=cast(Tensor, conv.bias),
        x_proj=x_proj.weight,
        dt_proj=dt_proj.weight,
        dt_bias=upcast(dt_proj.bias),
        A=A,
        D=upcast(D),
    )


def not_plain(module: nn.Module | None) -> str | None:
    """Return why calling a module may do other than its weights say, or None."""
    kind = type(module)
    if kind not in _PLAIN:  # a parametrization makes a class of its own
        return f"is a {kind.__module__}.{kind.__name__}"
    known = cast(nn.Module, module)
    for weight in known._parameters.values():  # a quantized or sharded one has products of its own
        if type(weight) is not nn.Parameter and is_traceable_wrapper_subclass(weight):
            return f"has a weight that is a {type(weight).__name__}"
    if known._forward_hooks or known._forward_pre_hooks:
        return "has forward hooks"
    if known._backward_hooks or known._backward_pre_hooks:
        return "has backward hooks"
    return "has a forward of its own" if "forward" in known.__dict__ else None


def _all_watched() -> bool:
    """Whether there are hooks on all modules, beside those with which torch's FLOP counter follows.

    That one counts the fused kernels by their own formulas, and has to count what runs.
    """
    if not hooked._has_any_global_hook():
        return False
    hooks = (
        *hooked._global_forward_pre_hooks.values(),
        *hooked._global_forward_hooks.values(),
        *hooked._global_backward_pre_hooks.values(),
        *hooked._global_backward_hooks.values(),
    )
    return not all(isinstance(getattr(h, "__self__", None), ModuleTracker) for h in hooks)


def apply_dt_proj(dt_proj: nn.Module, dt: Tensor) -> Tensor:
    """Call `dt_proj`, (batch, length, rank) -> (batch, length, inner), in its own dtype.

    Autocast would round the sum of product and bias, whose exponential is the step size.
    """
    dtype = next((p.dtype for p in dt_proj.parameters()), torch.float32)
    with without_autocast(dt):
        delta: Tensor = dt_proj(dt.to(dtype))
    return delta


def bias_of(linear: nn.Module) -> Tensor:
    """Return the bias of a linear layer, wrapped or quantized, (inner,).

    Raises:
        ValueError: If it has none.
    """
    bias = getattr(linear, "bias", None)
    bias = bias() if callable(bias) else bias  # torch's quantized layers have a method
    if not isinstance(bias, Tensor):
        raise ValueError(f"dt_proj is a {type(linear).__name__}, expected a layer with a bias")
    return bias


def A_from_log(A_log: Tensor) -> Tensor:
    """Return A from the logarithm of its negative."""
    return -upcast(A_log).exp()


def upcast(parameter: Tensor) -> Tensor:
    """Give a parameter of the scan the dtype of the state, whatever that of the tokens is."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def init_A_log(inner: int, state: int) -> nn.Parameter:
    """Return logarithms of 1 .. state for each channel, (inner, state)."""
    return nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inner, 1))


def init_dt_proj(rank: int, inner: int) -> nn.Linear:
    """Map to steps that start at `init_dt_bias`."""
    linear = nn.Linear(rank, inner)
    nn.init.uniform_(linear.weight, -(rank**-0.5), rank**-0.5)
    with torch.no_grad():
        linear.bias.copy_(init_dt_bias(inner))
    return linear


def init_dt_bias(number: int) -> Tensor:
    """Return biases whose softplus is spread evenly in log from DT_MIN to DT_MAX, (number,)."""
    dt = torch.empty(number).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
    return dt + torch.log(-torch.expm1(-dt))  # softplus of this is dt
