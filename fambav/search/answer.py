"""A plan as settings of a run, which evaluates it or trains with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fambav.config import Config
from fambav.registry import FUSION_METHODS
from fambav.search.space import Plan


def settings(config: Config, plan: Plan, how: Mapping[str, Any] | None = None) -> Config:
    """Return a run of the same recipe that reduces tokens as planned.

    Args:
        config: The recipe; its own reduction goes.
        plan: The plan; one that keeps every token is a run without reduction.
        how: Settings beside the method and the schedule, such as `scan_policy`.

    Raises:
        ConfigError: If one of these is unknown or wrong.
    """
    dense = config.dense()
    if not any(plan.counts):
        return dense
    if plan.method in FUSION_METHODS and not how:
        return dense.replace(fusion_method=plan.method, fusion_plan=plan.told())
    schedule = "list:" + ",".join(map(str, plan.counts))
    return dense.replace(reduction=plan.method, reduction_schedule=schedule, **(how or {}))


def to_yaml(config: Config, remarks: Iterable[str]) -> str:
    """Return the text of a file for `main.py --config`, with remarks ahead."""
    lines = "".join(f"# {' '.join(remark.split())}\n" for remark in remarks)
    return f"{lines}\n{config.to_yaml()}"
