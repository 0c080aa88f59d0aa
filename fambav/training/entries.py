"""Forms of the entries of a checkpoint of ours: what each has to hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fambav.engine.checkpoint import CheckpointError
from fambav.json_files import is_plain
from fambav.short_repr import short_repr

_LARGEST = 2**63 - 1  # of whole numbers
_MOST = 100_000  # values of an entry at one depth


def _is_number(value: Any) -> bool:
    return type(value) is float or _is_count(-_LARGEST)(value)


def _is_count(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= _LARGEST  # and not bool


def _is_list(of: Callable[[Any], bool], *, length: int | None = None) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list | tuple) and length in (None, len(v)) and all(map(of, v))


def _is_table(value: Any, largest: float = _LARGEST) -> bool:
    return isinstance(value, Mapping) and is_plain(value, most=_MOST, largest=largest)


def _is_config(value: Any) -> bool:
    return _is_table(value, math.inf)  # a setting's own limit is checked with the setting


def _is_weights(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(own, Tensor) for name, own in value.items()
    )


def _is_optimizer(value: Any) -> bool:
    """Whether something has the form of a torch optimizer's state_dict."""
    if not isinstance(value, Mapping) or not isinstance(value.get("state"), Mapping):
        return False
    groups, states = value.get("param_groups"), value["state"].values()
    return (
        isinstance(groups, list)
        and all(map(_is_table, groups))
        and all(isinstance(own, Mapping) for own in states)
        and all(isinstance(v, Tensor) or _is_number(v) for own in states for v in own.values())
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_record(value: Any) -> bool:
    return (
        _is_table(value)
        and _is_number(value.get("epoch"))
        and all(_is_number(own) for name, own in value.items() if name.startswith("test_"))
    )


def _is_change(value: Any) -> bool:
    return (
        _is_table(value)
        and _is_count(0)(value.get("epoch"))
        and isinstance(value.get("settings"), Mapping)
        and all(_is_list(is_plain, length=2)(own) for own in value["settings"].values())
    )


_is_mean = _is_list(lambda v: _is_number(v) and math.isfinite(v))
_is_std = _is_list(lambda v: _is_number(v) and 0 < v < math.inf)
FACTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "config": (_is_config, "plain values by name"),
    "class_token": (_is_text, "text"),
    "grid": (_is_list(_is_count(1), length=2), "2 64-bit whole numbers of at least 1"),
    "schedule": (_is_table, "plain values by name"),
    "images_per_update": (_is_count(1), "a 64-bit whole number of at least 1"),
    "teacher": (_is_text, "text"),
    "world": (_is_count(1), "a 64-bit whole number of at least 1"),
    "num_classes": (_is_count(1), "a 64-bit whole number of at least 1"),
    "class_names": (_is_list(_is_text), "names"),
    "mean": (_is_mean, "finite numbers"),
    "std": (_is_std, "finite numbers above 0"),
    "variates": (_is_list(_is_text), "names"),
    "torch": (_is_text, "text"),
    "changes": (_is_list(_is_change), "changes of settings, each with its epoch"),
}
CHECKS = {
    **FACTS,
    "model": (_is_weights, "tensors by name"),
    "model_ema": (_is_weights, "tensors by name"),
    "optimizer": (_is_optimizer, "the state of an optimizer"),
    "scaler": (_is_table, "plain values by name"),
    "epoch": (_is_count(-1), "a 64-bit whole number of at least -1"),
    "updates": (_is_count(0), "a 64-bit whole number of at least 0"),
    "history": (_is_list(_is_record), "a record for each epoch"),
    "losses": (_is_list(_is_number), "64-bit numbers"),
    "seconds": (_is_number, "a 64-bit number"),
    "peak_mib": (_is_number, "a 64-bit number"),
    "maxima": (_is_list(_is_number), "64-bit numbers"),
}
_OPTIONAL = {
    *("class_token", "grid", "schedule", "teacher", "class_names", "variates"),
    *("model_ema", "scaler", "updates", "changes"),
}


def check_entries(path: Path, known: Mapping[str, Any]) -> None:
    """Refuse the first entry of ours that has not the form it is written in.

    Raises:
        CheckpointError: If there is one.
    """
    best = {name: (_is_number, "a 64-bit number") for name in known if name.startswith("best_")}
    for name, (holds, words) in {**CHECKS, **best}.items():
        optional = name in _OPTIONAL
        if name not in known or (optional and known[name] is None) or holds(known[name]):
            continue
        label, value, expected = name, known[name], f"{words}{' or nothing' * optional}"
        inner = _first_wrong(value) if holds in (_is_table, _is_config) else None
        if inner is not None:
            label, value, expected = f"{name}: {inner}", value[inner], "a plain value"
        raise CheckpointError(f"{path}: {label} is {short_repr(value)}, expected {expected}")


def _first_wrong(table: Any) -> str | None:
    """Return the first name whose value is not plain, if names alone are right."""
    if not isinstance(table, Mapping) or not all(isinstance(name, str) for name in table):
        return None
    return next((name for name, own in table.items() if not _is_config({name: own})), None)
