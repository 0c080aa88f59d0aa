"""Reading files of weights, and what each entry of one of ours has to be.

A digest says that a file is as it was written, not who wrote it: entries that are not what they
should be are refused here, before anything is made of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fambav.engine import checkpoint
from fambav.engine.checkpoint import CheckpointError, State

TEXTS = {"class_token", "torch"}  # facts that are strings to begin with

_CHANNELS = 3


class _Kind(NamedTuple):
    """What an entry has to be: whether it is, and in words."""

    holds: Callable[[Any], bool]
    words: str


def _count(least: int) -> _Kind:
    words = f"a whole number of at least {least}"
    return _Kind(lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least, words)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_plain(value: Any) -> bool:
    """Whether something could stand in a JSON file."""
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(own) for name, own in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def _is_optimizer(value: Any) -> bool:
    """Whether something is a state as torch's optimizers have it."""
    if not isinstance(value, Mapping) or not isinstance(value.get("state"), Mapping):
        return False
    groups, states = value.get("param_groups"), value["state"].values()
    return (
        isinstance(groups, list)
        and all(isinstance(group, Mapping) for group in groups)
        and all(isinstance(own, Mapping) for own in states)
        and all(isinstance(v, Tensor | int | float) for own in states for v in own.values())
    )


def _all(of: Callable[[Any], bool], *, long: int | None = None) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list | tuple) and long in (None, len(v)) and all(map(of, v))


def _or_none(kind: _Kind) -> _Kind:
    return _Kind(lambda v: v is None or kind.holds(v), f"{kind.words} or nothing")


_TEXT = _Kind(lambda v: isinstance(v, str), "text")
_NUMBER = _Kind(_is_number, "a number")
_NUMBERS = _Kind(_all(_is_number), "numbers")
_WEIGHTS = _Kind(
    lambda v: (
        isinstance(v, Mapping)
        and all(isinstance(n, str) and isinstance(own, Tensor) for n, own in v.items())
    ),
    "tensors by name",
)
_PLAIN = _Kind(lambda v: isinstance(v, Mapping) and _is_plain(v), "plain values by name")
_STATISTIC = _Kind(
    _all(lambda v: _is_number(v) and math.isfinite(v), long=_CHANNELS), "3 finite numbers"
)
_SPREAD = _Kind(
    lambda v: _STATISTIC.holds(v) and all(own > 0 for own in v), "3 finite numbers above 0"
)
_RECORDS = _Kind(
    _all(
        lambda v: (
            isinstance(v, Mapping)
            and _is_plain(v)
            and _is_number(v.get("epoch"))
            and all(_is_number(own) for name, own in v.items() if name.startswith("test_"))
        )
    ),
    "a record for each epoch",
)
_KINDS = {
    "config": _PLAIN,
    "class_token": _or_none(_TEXT),
    "grid": _or_none(_Kind(_all(_count(1).holds, long=2), "2 whole numbers of at least 1")),
    "schedule": _or_none(_PLAIN),
    "images_per_update": _count(1),
    "teacher": _or_none(_TEXT),
    "world": _count(1),
    "num_classes": _count(1),
    "class_names": _or_none(_Kind(_all(_TEXT.holds), "names")),
    "mean": _STATISTIC,
    "std": _SPREAD,
    "torch": _TEXT,
    "model": _WEIGHTS,
    "model_ema": _or_none(_WEIGHTS),
    "optimizer": _Kind(_is_optimizer, "the state of an optimizer"),
    "scaler": _or_none(_PLAIN),
    "epoch": _count(-1),
    "updates": _or_none(_count(0)),
    "history": _RECORDS,
    "losses": _NUMBERS,
    "seconds": _NUMBER,
    "peak_mib": _NUMBER,
    "maxima": _NUMBERS,
}


def load(path: Path) -> State:
    """Read a file of weights, and check what it says if it is one of ours.

    Raises:
        CheckpointError: If it cannot be read, or an entry is not what it should be.
    """
    state = checkpoint.load(path)
    strings = state.get("metadata")
    if isinstance(strings, Mapping) and "config" in strings:
        found = {name: _parsed(path, name, text) for name, text in strings.items()}
    elif "config" in state:
        found = state
    else:
        return state
    check(path, found)
    return state


def check(path: Path, found: Mapping[str, Any]) -> None:
    """Refuse entries that are not what they should be.

    Args:
        path: Where they come from.
        found: Some or all entries of a file of ours.

    Raises:
        CheckpointError: If there is one.
    """
    best = {name: _NUMBER for name in found if name.startswith("best_")}
    for name, kind in {**_KINDS, **best}.items():
        if name in found and not kind.holds(found[name]):
            shown = " ".join(repr(found[name]).split())
            shown = shown if len(shown) < 60 else f"{shown[:60]}..."
            raise CheckpointError(f"{path}: {name} is {shown}, expected {kind.words}")


def fact(state: State, name: str) -> Any:
    """Return what a file of ours says under `name`; None if it says nothing."""
    strings = state.get("metadata")
    if isinstance(strings, Mapping) and name in strings:
        return strings[name] if name in TEXTS else json.loads(strings[name])
    return state.get(name)


def _parsed(path: Path, name: str, text: str) -> Any:
    if name in TEXTS or name not in _KINDS:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {name} is no JSON, expected what was written") from error
