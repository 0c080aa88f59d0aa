"""A plan as a YAML file of settings, for a run that evaluates it or trains with it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fambav.config import Config
from fambav.engine.checkpoint import write_text
from fambav.registry import FUSION_METHODS
from fambav.search.space import Plan
from fambav.text import printable


def plan_settings(config: Config, plan: Plan, policies: Mapping[str, Any] | None = None) -> Config:
    """Return a run of the same recipe that reduces tokens as planned.

    Args:
        config: The recipe; its own reduction is replaced.
        plan: The plan; one that keeps every token is a run without reduction.
        policies: Settings beside the method and the schedule, such as `scan_policy`.

    Raises:
        ConfigError: If one of these is unknown or wrong.
    """
    unreduced = config.unreduced()
    if not any(plan.counts):
        return unreduced
    if plan.method in FUSION_METHODS and not policies and not plan.names:
        return unreduced.replace(fusion_method=plan.method, fusion_plan=plan.summary())
    given = dict(reduction=plan.method, reduction_schedule=plan.summary())
    return unreduced.replace(**given, **(policies or {}))


def write_plan(
    path: Path, config: Config, remarks: str, *, command: Sequence[str], weights: Path
) -> None:
    """Write settings for `main.py --config`, with comments that say where they come from.

    Args:
        path: The file.
        config: The settings.
        remarks: What the plan is, and how the command came to it.
        command: The words of the command.
        weights: The checkpoint that the plan is for.
    """
    lines = (
        remarks,
        shlex.join(command),
        f"main.py --config {path} --eval --resume {weights}",
        f"main.py --config {path} --finetune {weights} --output_dir DIR",
    )
    comments = "".join(f"# {printable(' '.join(line.split()))}\n" for line in lines)
    write_text(path, f"{comments}\n{config.to_yaml()}")
