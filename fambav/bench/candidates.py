"""What takes part in a comparison: a model, a plan, a backend, a dtype, a way to launch it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from fambav.bench.report import MeasureError, Row, dtype_name
from fambav.bench.timing import Times, ratio
from fambav.engine.precision import Precision
from fambav.models import Backbone
from fambav.ops import BackendError, backends, force
from fambav.ops.dispatch import SCAN
from fambav.reduction import (
    Reduction,
    make_reducer,
    make_schedule,
    make_staged_reduction,
    parse_schedule,
)
from fambav.reduction.schedule import PUBLISHED
from fambav.registry import CLASSIFIERS, STRATEGY_ALIASES, UNREDUCED, family_of, nearest
from fambav.timm_compat import timm

NONE = "none"
EAGER, REPLAYED = "eager", "replayed"
CLASSES = 1000
METHOD = "famba-v"
MODEL = "vim_tiny"
T = TypeVar("T")


class Candidate(NamedTuple):
    """One of those that are compared.

    Attributes:
        model: One of ours, or a model of timm.
        plan: Which layers fuse how many tokens, a schedule as for `fambav.reduce`.
        method: How they are fused.
        backend: What operations run by; None for the fastest.
        dtype: Of the forward pass, under autocast unless it is float32; weights stay float32.
        launch: "eager", or "replayed" from a CUDA graph.
        length: Tokens at the start; None for the model's own.
    """

    model: str
    plan: str = NONE
    method: str = METHOD
    backend: str | None = None
    dtype: torch.dtype = torch.float32
    launch: str = EAGER
    length: int | None = None

    @property
    def ours(self) -> bool:
        """Whether the model is one of ours."""
        return self.model in CLASSIFIERS

    @property
    def name(self) -> str:
        """All that is not as usual, in words."""
        values = (self.plan, self.backend, dtype_name(self.dtype), self.launch, self.length)
        usual = (NONE, None, dtype_name(torch.float32), EAGER, None)
        more = (str(own) for own, other in zip(values, usual, strict=True) if own != other)
        return " ".join((self.model, *more))

    def row(self) -> dict[str, Any]:
        """Return the columns that name it."""
        return {
            "model": self.model,
            "plan": self.plan if self.ours else "-",
            "backend": (self.backend or "fastest") if self.ours else "torch",
            "dtype": dtype_name(self.dtype),
            "launch": self.launch,
        }

    def precision(self, device: torch.device) -> Precision:
        """Return the dtype of the forward pass as autocast takes it."""
        return Precision(device, None if self.dtype == torch.float32 else self.dtype)

    def network(self, device: torch.device, *, drop_path: float = 0.0, seed: int = 0) -> nn.Module:
        """Return the model with new weights, drawn on the CPU, in training mode.

        Args:
            device: Where; the meta device for no weights at all.
            drop_path: Stochastic depth of one of ours.
            seed: Of the weights.

        Raises:
            ValueError: If there is no such model, or it cannot carry out the plan.
        """
        torch.manual_seed(seed)
        with torch.device("meta" if device.type == "meta" else "cpu"):
            if not self.ours:
                return _peer(self.model).to(device)
            options: dict[str, Any] = dict(num_classes=CLASSES, drop_path_rate=drop_path)
            if self.length is not None:
                options["img_size"] = image_size(self.model, self.length)
            net = cast(Backbone, timm.create_model(self.model, **options))
        if self.plan != NONE:
            given = ("plan", self.plan)
            if net.info.staged:
                own = make_staged_reduction(net.info, self.method, self.plan, given=given)
                cast(Any, net).reduction = own
            else:
                reducer = make_reducer(self.method)
                schedule = make_schedule(self.plan, net.info, reducer, given=given)
                net.reduction = Reduction(net.info, reducer, schedule)
        return net.to(device)


def candidates(
    *,
    model: str = MODEL,
    plans: Sequence[str] = (NONE,),
    method: str = METHOD,
    names: Sequence[str | None] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    cuda_graphs: bool = False,
    lengths: Sequence[int | None] = (None,),
    peers: Sequence[str] = (),
    device: torch.device,
) -> list[Candidate]:
    """Return all combinations for our model, then the peers in every dtype and launch.

    Args:
        model: One of ours.
        plans: Which layers fuse how many tokens, schedules as for `fambav.reduce`, or none.
        method: How tokens are fused.
        names: Backends of our operations; by default the fastest.
        dtypes: Of the forward pass.
        cuda_graphs: Take each also as a replay of a CUDA graph.
        lengths: Tokens at the start of ours; None for the model's own.
        peers: Models of timm, on images of their own size.
        device: Where they are to run.

    Raises:
        ValueError: If a plan cannot be read, there is no such peer, or the device cannot compute
            in a dtype.
    """
    for dtype in dtypes:
        _check_dtype(dtype, device)
    named = [STRATEGY_ALIASES.get(text, text) for text in plans]
    planned = [text for text in named if text != NONE]
    if model in CLASSIFIERS and planned:
        if not family_of(model).reducible:
            expected = f"none with {model}, {UNREDUCED}"
            raise ValueError(f"plan is {planned[0]!r}, expected {expected}")
        with torch.device("meta"):
            info = cast(Backbone, timm.create_model(model)).info
        for text in planned:
            if text != PUBLISHED:
                parse_schedule(text, info, name="plan")
    for name in (peer for peer in peers if peer not in CLASSIFIERS):
        with torch.device("meta"):
            _peer(name)
    launches = (EAGER, REPLAYED) if cuda_graphs else (EAGER,)
    ours = itertools.product(dtypes, (None,) if names is None else names, named, launches, lengths)
    found = [Candidate(model, p, method, b, d, launch, n) for d, b, p, launch, n in ours]
    theirs = itertools.product(peers, dtypes, launches)
    found += [Candidate(p, dtype=d, launch=launch) for p, d, launch in theirs]
    return list(dict.fromkeys(found))


def prepared(
    given: Sequence[Candidate], make: Callable[[Candidate], T], key: Callable[[Candidate], str]
) -> tuple[dict[Candidate, T], dict[str, str]]:
    """Make something of every candidate, or give the reason why it cannot be had.

    Args:
        given: The candidates.
        make: Raises BackendError for one that cannot run here, RuntimeError for one that cannot be
            recorded as a CUDA graph.
        key: Names what cannot run; after a refusal nothing else of that name is tried.

    Raises:
        MeasureError: If nothing can be had.
    """
    found, refused = dict[Candidate, T](), dict[str, str]()
    for candidate in given:
        if key(candidate) in refused:
            continue
        try:
            found[candidate] = make(candidate)
        except BackendError as error:
            refused[key(candidate)] = str(error)
        except RuntimeError as error:
            if candidate.launch == EAGER:
                raise
            refused[candidate.name] = str(error).splitlines()[0]
    if not found:
        raise MeasureError(next(iter(refused.values()), "there is nothing to compare"))
    return found, refused


def relative(
    own: Times,
    baselines: Mapping[str, Times | None],
    longest: tuple[Times | None, int] | None,
    length: int | None,
    peak: float | None,
) -> Row:
    """Compare a candidate with others, and with itself at more tokens.

    Returns:
        over_NAME   how many times faster than that backend in the same round
        peak_mib    peak memory
        growth      time over that at the longest length, divided by the ratio of the lengths: 1 is
                    proportional
    """
    growth = None
    if longest is not None and length is not None:
        share = ratio(own, longest[0])
        growth = None if share is None else share * longest[1] / length
    over = {f"over_{name}": ratio(times, own) for name, times in baselines.items()}
    return {**over, "peak_mib": peak, "growth": growth}


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force a backend of the scan, and of every other operation that has it and can run it here.

    The others choose for themselves: beside mamba-ssm's scan, for instance, our norm.

    Args:
        name: Of the backend; None lets all choose.

    Raises:
        BackendError: If the scan has no such backend.
    """
    with ExitStack() as forced:
        if name is not None:
            forced.enter_context(force(name))
            for op in _others(name):
                forced.enter_context(force(name, op))
        yield


@functools.cache
def _others(backend: str) -> tuple[str, ...]:
    return tuple(op for op, n, reason in backends() if n == backend and op != SCAN and not reason)


def _peer(name: str) -> nn.Module:
    if not timm.is_model(name):
        hint = nearest(name, timm.list_models())
        more = hint if hint.startswith("did you") else "timm.list_models() has them all"
        raise ValueError(f"peer is {name!r}, expected a model of timm; {more}")
    return timm.create_model(name, num_classes=CLASSES)


def _check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Refuse what this device has no arithmetic for."""
    reason, bf16 = None, dtype == torch.bfloat16 and device.type == "cuda"
    if bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        reason = "it is only emulated there"
    else:
        one = torch.ones(8, 8, device=device)
        try:
            one.to(dtype) @ one.to(dtype)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
    if reason is not None:
        wrong = f"dtype is {dtype_name(dtype)}, expected one that {device.type} computes in"
        raise ValueError(f"{wrong}; {reason}")


def images(net: nn.Module, batch: int, device: torch.device) -> Tensor:
    """Draw images of the size that a model takes, (batch, channels, height, width)."""
    return torch.randn(batch, *cast(Any, net).pretrained_cfg["input_size"]).to(device)


def image_size(model: str, length: int) -> tuple[int, int]:
    """Return height and width, in pixels, of images that become so many tokens.

    The grid of patches is as square as their number allows.

    Raises:
        ValueError: If there would be no patch.
    """
    with torch.device("meta"):
        net = cast(Backbone, timm.create_model(model))
    classes = len(net.info.cls_index)
    patches = length - classes
    if patches < 1:
        raise ValueError(f"length is {length}, expected at least {1 + classes}")
    rows = next(n for n in range(int(patches**0.5), 0, -1) if patches % n == 0)
    patch = stride = net.img_size[0] // net.info.grid[0]
    if (proj := getattr(net.patch_embed, "proj", None)) is not None:  # patches may overlap
        (patch, _), (stride, _) = proj.kernel_size, proj.stride
    return patch + stride * (rows - 1), patch + stride * (patches // rows - 1)
