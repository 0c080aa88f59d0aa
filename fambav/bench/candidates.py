"""What takes part in a comparison: a model, a plan, a backend, a number format.

flags -> candidates -> a network and images for each -> all of them in every round
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fambav.bench.report import MeasureError, Row, short
from fambav.bench.stack import stack
from fambav.ecosystem import timm
from fambav.engine.runtime import Precision
from fambav.models import Backbone, Vim
from fambav.ops import BackendError
from fambav.reduction import fused
from fambav.registry import MODELS, STRATEGIES, STRATEGY_ALIASES, nearest

NONE = "none"
EAGER, REPLAYED = "eager", "replayed"
CLASSES = 1000
METHOD = "famba-v"


class Plan(NamedTuple):
    """Which layers fuse how many tokens.

    Attributes:
        name: strategy:layer:tokens or strategy:tokens, as on the command line.
        fusion: The same as arguments of a model.
    """

    name: str
    fusion: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read a plan such as "upper:6:9", layers counted from 1, or "none".

        Raises:
            ValueError: If it has another form.
        """
        strategy, *numbers = text.split(":")
        known = (*STRATEGIES, *STRATEGY_ALIASES)
        if strategy not in known:
            hint = nearest(strategy, known)
            raise ValueError(f"plan is {text!r}, expected strategy:layer:tokens; {hint}")
        if STRATEGY_ALIASES.get(strategy, strategy) == NONE and not numbers:
            return cls(NONE, {})
        wanted = 2 if strategy in ("lower", "upper") else 1
        if len(numbers) != wanted or not all(re.fullmatch(r"[1-9]\d*", n) for n in numbers):
            form = "layer:tokens" if wanted == 2 else "tokens"
            raise ValueError(f"plan is {text!r}, expected {strategy}:{form}")
        *layer, token = map(int, numbers)
        fusion: dict[str, Any] = dict(fusion_strategy=strategy, fusion_token=token)
        return cls(text, fusion | ({"fusion_layer": layer[0]} if layer else {}))


class Candidate(NamedTuple):
    """One of those that are compared.

    Attributes:
        model: One of ours, or a model of timm.
        plan: Which layers fuse how many tokens, as `Plan.parse` reads it.
        method: How they are fused.
        backend: What operations run by; None for the fastest.
        dtype: Of the forward pass, under autocast unless it is float32; weights stay float32.
        launch: "eager", or "replayed" from a recording.
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
        return self.model in MODELS

    @property
    def name(self) -> str:
        """All that tells it from others, in words."""
        told = (self.plan, self.backend, short(self.dtype), self.launch, self.length)
        usual = (NONE, None, short(torch.float32), EAGER, None)
        more = (str(own) for own, other in zip(told, usual, strict=True) if own != other)
        return " ".join((self.model, *more))

    def row(self) -> Row:
        """Return the columns that name it."""
        return {
            "model": self.model,
            "plan": self.plan if self.ours else "-",
            "backend": (self.backend or "fastest") if self.ours else "torch",
            "dtype": short(self.dtype),
            "launch": self.launch,
        }

    def precision(self, device: torch.device) -> Precision:
        """Return the number format of the forward pass."""
        return Precision(device, None if self.dtype == torch.float32 else self.dtype)

    def network(self, device: torch.device, *, drop_path: float = 0.0, seed: int = 0) -> nn.Module:
        """Return the model with new weights, in training mode.

        Args:
            device: Where; the meta device for no weights at all.
            drop_path: Stochastic depth of one of ours.
            seed: Of the weights, which are drawn on the CPU.

        Raises:
            ValueError: If there is no such model, or it cannot carry out the plan.
        """
        torch.manual_seed(seed)
        drawn = torch.device("meta" if device.type == "meta" else "cpu")
        with drawn:
            if not self.ours:
                return _peer(self.model).to(device)
            options: dict[str, Any] = dict(num_classes=CLASSES, drop_path_rate=drop_path)
            if self.length is not None:
                options["img_size"] = image_size(self.model, self.length)
            net = cast(Backbone, timm.create_model(self.model, **options))
        fusion = Plan.parse(self.plan).fusion
        if fusion:
            named = {key.removeprefix("fusion_"): value for key, value in fusion.items()}
            net.reduction = fused(net.info, **named, method=self.method)
        return net.to(device)

    def able(self, device: torch.device) -> str | None:
        """Say why its backend cannot run here, or None: one image goes through."""
        net = self.network(device).eval()
        try:
            with stack(self.backend), torch.no_grad(), self.precision(device).autocast():
                net(images(net, 1, device))
        except BackendError as error:
            return str(error)
        return None


def _peer(name: str) -> nn.Module:
    if not timm.is_model(name):
        hint = nearest(name, timm.list_models())
        told = hint if hint.startswith("did you") else "timm.list_models() has them all"
        raise ValueError(f"peer is {name!r}, expected a model of timm; {told}")
    return timm.create_model(name, num_classes=CLASSES)


def candidates(
    *,
    model: str = "vim_tiny",
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
        plans: Which layers fuse how many tokens, as `Plan.parse` reads them.
        method: How tokens are fused.
        names: Backends of our operations; by default the fastest.
        dtypes: Of the forward pass.
        cuda_graphs: Take each also with its passes recorded.
        lengths: Tokens at the start of ours; None for the model's own.
        peers: Models of timm, on images of their own size.
        device: Where they are to run.

    Raises:
        ValueError: If a plan cannot be read, there is no such peer, or the device cannot compute
            in a dtype.
    """
    for dtype in dtypes:
        _check_dtype(dtype, device)
    named = [Plan.parse(text).name for text in plans]
    for name in (peer for peer in peers if peer not in MODELS):
        with torch.device("meta"):
            _peer(name)
    launches = (EAGER, REPLAYED) if cuda_graphs else (EAGER,)
    ours = itertools.product(dtypes, (None,) if names is None else names, named, launches, lengths)
    theirs = itertools.product(peers, dtypes, launches)
    return list(
        dict.fromkeys(
            (
                *(Candidate(model, p, method, b, d, launch, n) for d, b, p, launch, n in ours),
                *(Candidate(p, dtype=d, launch=launch) for p, d, launch in theirs),
            )
        )
    )


def sifted(
    given: Sequence[Candidate], device: torch.device
) -> tuple[list[Candidate], dict[str, str]]:
    """Tell which candidates can run here; one of each backend and dtype is tried.

    Returns:
        Those that can, and why each of the other backends cannot.

    Raises:
        MeasureError: If none can.
    """
    tried = {(c.backend, c.dtype): c for c in reversed(given) if c.ours}  # the first of each
    found = {key: candidate.able(device) for key, candidate in tried.items()}
    several = len({dtype for _, dtype in found}) > 1
    reasons = {
        f"{backend or 'fastest'} {short(dtype)}" if several else str(backend): reason
        for (backend, dtype), reason in reversed(found.items())
        if reason is not None
    }
    able = [c for c in given if not c.ours or found[c.backend, c.dtype] is None]
    return able, some(able, reasons)


def some(able: Collection[object], reasons: dict[str, str]) -> dict[str, str]:
    """Return why some cannot run.

    Raises:
        MeasureError: If none can.
    """
    if not able:
        raise MeasureError(next(iter(reasons.values()), "there is nothing to compare"))
    return reasons


def _check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Refuse what this device has no arithmetic for."""
    emulated = (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    )
    reason = "it is only emulated there" if emulated else _unproduced(dtype, device)
    if reason is not None:
        raise ValueError(
            f"dtype is {short(dtype)}, expected one that {device.type} computes in; {reason}"
        )


def _unproduced(dtype: torch.dtype, device: torch.device) -> str | None:
    """Say why a small product cannot be made, or None."""
    one = torch.ones(8, 8, device=device)
    try:
        one.to(dtype) @ one.to(dtype)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


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
        net = cast(Vim, timm.create_model(model))
    patches = length - len(net.class_places)
    if patches < 1:
        raise ValueError(f"length is {length}, expected at least {1 + len(net.class_places)}")
    rows = next(n for n in range(int(patches**0.5), 0, -1) if patches % n == 0)
    (patch, _), (stride, _) = net.patch_embed.proj.kernel_size, net.patch_embed.proj.stride
    return patch + stride * (rows - 1), patch + stride * (patches // rows - 1)
