"""Provenance of figures: the machine, and the fingerprint of a config.

Two runs may be compared in time and memory if they differ in nothing but tokens and seed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any

from fambav.config import Config, Fusion, Reduction, affecting

Facts = Mapping[str, Any]

MACHINE = (
    *("platform", "cpu", "cpu_count", "gpu", "device", "processes", "threads", "jobs"),
    "unfused",
)
REDUCTION = frozenset(item.name for group in (Fusion, Reduction) for item in fields(group))
_FILES = {"finetune", "teacher_path"}  # that there is one counts, its name does not
LOCATIONS = affecting("nothing") - _FILES
_NAMED = 8  # settings that an error names


def machine(environment: Facts, *, without: Collection[str] = ()) -> dict[str, Any]:
    """Return where something was measured.

    Args:
        environment: Of `engine.run_dir.environment`.
        without: Entries to leave out.
    """
    names = (name for name in MACHINE if name in environment and name not in without)
    return {name: environment[name] for name in names}


def fingerprint(config: Config) -> dict[str, Any]:
    """Return all that a run is made with but its reduction, its seed and the locations of files."""
    left_out = REDUCTION | LOCATIONS | {"seed"}
    return {
        name: bool(value) if name in _FILES else value
        for name, value in config.flat().items()
        if name not in left_out
    }


def differing(facts: Iterable[Facts]) -> dict[str, list[Any]]:
    """Return the entries that are not the same in all of `facts`, each with its values.

    An entry that some do not have is compared among those that have it: a file of an earlier
    version may not know it.
    """
    values: dict[str, list[Any]] = {}
    for each in facts:
        for name, value in each.items():
            known = values.setdefault(name, [])
            if value not in known:
                known.append(value)
    return {name: known for name, known in values.items() if len(known) > 1}


def described(differences: Mapping[str, list[Any]]) -> str:
    """Return differences in one line: `lr (0.001, 0.002), gpu (none, H200)`."""
    texts = [
        f"{name} ({', '.join(_short(value) for value in values)})"
        for name, values in list(differences.items())[:_NAMED]
    ]
    more = len(differences) - len(texts)
    return ", ".join(texts) + (f" and {more} more" if more else "")


def _short(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
