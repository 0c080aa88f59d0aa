"""fambav train, which main.py is too."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from fambav import config, launcher, registry
from fambav.commands.output import print_line
from fambav.config import Config, ConfigError

DRY_RUN = "--dry-run"
_RECIPES = 3  # named in a hint


def run(words: list[str], program: str = "fambav train") -> int:
    """Train or evaluate a model; main.py is the same.

    Returns:
        The exit status, 0.
    """
    if {"-h", "--help"} & set(words):
        own = f"{DRY_RUN} prints the settings and the plan, and reads and writes nothing."
        print(config.help_text(program, f"Train or evaluate a model.\n\n{own}"))
        return 0
    flags = [word for word in words if word.replace("_", "-") != DRY_RUN]
    settings = config.parse(flags, record=_record)
    first = launcher.may_be_first(os.environ)
    notes = settings.notice.splitlines() + _note_on_defaults(flags, settings)
    for line in notes + launcher.notes(os.environ):
        if first:
            print_line(line, sys.stderr if line.startswith("warning: ") else None)
    if len(flags) < len(words):
        if first:
            print(_dry_run(settings))
        return 0
    from fambav import training

    return int(training.run(settings))


def _note_on_defaults(flags: list[str], settings: Config) -> list[str]:
    """Return a line where a data set alone is given, for which the defaults are seldom meant."""
    given = config.read_flags(flags)
    if "data_set" not in given or {"model", "config", "eval"} & given.keys():
        return []
    known = registry.recipes(given["data_set"])
    hint = f"; recipes for it: --config {', '.join(known[:_RECIPES])}" if known else ""
    return [
        f"note: --data-set {given['data_set']} without --model or --config trains"
        f" {settings.model.model} for {settings.optim.epochs} epochs{hint}"
    ]


def _record(given: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Read the settings of the checkpoint to be evaluated."""
    from fambav import training

    return training.record(given)


def _dry_run(settings: Config) -> str:
    """Return the settings of a run and what its model is, neither of whose data is read.

    Raises:
        ConfigError: If the run is an evaluation.
        ValueError: If the model cannot be built, or its tokens cannot be reduced so.
    """
    if settings.run.eval:
        raise ConfigError(f"{DRY_RUN} has no meaning with --eval, which writes nothing")
    import torch

    from fambav.flops import CLASSES, VARIATES
    from fambav.training.network import layout, model

    plan, optim = layout(settings), settings.optim
    classes = settings.model.num_classes or {**CLASSES, **VARIATES}.get(settings.data.data_set)
    outputs = f"{classes} outputs" if classes else "1 output, since data say how many there are"
    with torch.device("meta"):
        weights = sum(p.numel() for p in model(settings, num_classes=classes or 1).parameters())
    world = launcher.place(os.environ).world
    images = optim.batch_size * optim.grad_accum_steps * world
    lines = [settings.to_yaml()]
    if plan.reduction is not None:
        lines.append(plan.reduction.summary())
    lines += [
        f"model: {settings.model.model} at {' x '.join(map(str, plan.input_size))},"
        f" {weights / 1e6:.2f} M weights with {outputs}",
        f"images per update: {images} = {optim.batch_size} x {optim.grad_accum_steps} forward"
        f" passes x {world} processes",
        f"epochs: {optim.epochs}",
        "dry run: no data were read, nothing was written",
    ]
    return "\n".join(lines)
