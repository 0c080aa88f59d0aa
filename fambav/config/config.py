"""A run's settings, resolved.

Config.model, .fusion, ..., .run    groups of settings
Config.flat()                       {"lr": 0.0005, ...}, one name space
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from fambav.config import conflicts, legacy_flags, model_settings, parsing, samples, schema
from fambav.config.schema import GROUPS, OPTIONS
from fambav.config.setting import COMMAND, FILE, RECORD, Setting, format_value
from fambav.registry import CONFIGS

DEFAULT_FILE = "configs/digits/vim_micro_upper.yaml"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run.

    Attributes:
        model, fusion, reduction, data, augment, optim, distillation, run: The settings, see
            `schema`.
        notice: Lines to print before anything else, or empty.
    """

    model: model_settings.Model = field(default_factory=model_settings.Model)
    fusion: model_settings.Fusion = field(default_factory=model_settings.Fusion)
    reduction: model_settings.Reduction = field(default_factory=model_settings.Reduction)
    data: samples.Data = field(default_factory=samples.Data)
    augment: samples.Augment = field(default_factory=samples.Augment)
    optim: schema.Optim = field(default_factory=schema.Optim)
    distillation: schema.Distillation = field(default_factory=schema.Distillation)
    run: schema.Run = field(default_factory=schema.Run)
    notice: str = field(default="", compare=False)

    def flat(self) -> dict[str, Any]:
        """Return every setting under its one name."""
        groups = (asdict(getattr(self, group)) for group in GROUPS)
        return {name: value for group in groups for name, value in group.items()}

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> Config:
        """Return the run that `flat` describes; what it leaves out has its default.

        Raises:
            ConfigError: If a setting is unknown, wrong or in conflict with another.
        """
        return _resolved(parsing.from_mapping(_without_empty_choice(flat), FILE))

    @classmethod
    def recorded(cls, flat: Mapping[str, Any]) -> Config:
        """Return the run of a config.yaml or a checkpoint, none of whose limits is applied anew."""
        return _resolved(_record(flat))

    def replace(self, **changes: Any) -> Config:
        """Return a copy in which some settings are others.

        Raises:
            ConfigError: If a setting is unknown, wrong or in conflict with another.
        """
        given = _record(self.flat())
        return _resolved({**given, **parsing.from_mapping(changes, COMMAND)}, self.notice)

    def unreduced(self) -> Config:
        """Return a copy whose model keeps every token."""
        return dataclasses.replace(
            self, fusion=model_settings.Fusion(), reduction=model_settings.Reduction()
        )

    def to_yaml(self) -> str:
        """Return text that `load` turns into an equal run."""
        flat = _without_empty_choice(self.flat())
        for low, high in conflicts.LIMITS:
            if flat[low] == OPTIONS[low].default and flat[low] > flat[high]:
                del flat[low]  # it would be refused where it is given
        return yaml.safe_dump(flat, sort_keys=False, allow_unicode=True)


def load(path: str | Path) -> Config:
    """Return the run that a YAML file describes.

    Raises:
        ConfigError: If the file or one of its settings cannot be used.
    """
    return _resolved(parsing.from_file(Path(path)))


def parse(
    argv: Iterable[str],
    *,
    record: Callable[[Mapping[str, Any]], Mapping[str, Any] | None] | None = None,
) -> Config:
    """Return the run that a command line describes.

    Args:
        argv: Words after the name of the program.
        record: Reads the settings that the checkpoint to be evaluated holds, None if it holds none,
            given what is set. They are the defaults then; what differs is in the notice.

    Raises:
        ConfigError: If a flag, the file it names or one of their settings cannot be used.
    """
    given = parsing.from_words(list(argv))
    config = given.pop("config", None)
    if config is not None:
        given = {**parsing.from_file(Path(config.value)), **given}
    values = {name: setting.value for name, setting in given.items()}
    evaluated = values.get("eval") and (values.get("resume") or values.get("finetune"))
    known = record(values) if record is not None and evaluated else None
    if known is not None:
        return _beside(known, given)
    if config is not None or "model" in given or "data_set" in given:
        return _resolved(given)
    notice = f"no --model, --config or --data-set: reading {DEFAULT_FILE}"
    return _resolved({**parsing.from_file(CONFIGS.parent / DEFAULT_FILE), **given}, notice)


def _beside(known: Mapping[str, Any], given: dict[str, Setting]) -> Config:
    """Return the run with a checkpoint's settings as defaults; its notice names differences."""
    run, before = _resolved({**_record(known), **given}), Config.recorded(known).flat()
    reducing = {**vars(run.fusion), **vars(run.reduction)}
    notes = [run.notice] * bool(run.notice)
    for name, value in run.flat().items():
        if name in known and (name in given or name in reducing) and value != before[name]:
            now, then = format_value(value), format_value(before[name])
            notes.append(f"note: {name} {now} differs from the checkpoint's {then}")
    return dataclasses.replace(run, notice="\n".join(notes))


def _record(flat: Mapping[str, Any]) -> dict[str, Setting]:
    return parsing.from_mapping(_without_empty_choice(flat), RECORD)


def _resolved(given: dict[str, Setting], notice: str = "") -> Config:
    legacy_flags.refuse_unsupported(given, os.environ)
    values, warnings = conflicts.resolve(given)
    groups: dict[str, Any] = {
        name: group(**{item.name: values[item.name] for item in fields(group)})
        for name, group in GROUPS.items()
    }
    return Config(**groups, notice="\n".join((*[notice] * bool(notice), *warnings)))


def _without_empty_choice(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what a resolved run does without and which contradicts the rest when it is given.

    That is `fusion_strategy: none` beside a plan or a reduction, and `reduction: none` beside a
    strategy or a plan.
    """
    kept = dict(flat)
    plan, reduction = kept.get("fusion_plan"), kept.get("reduction", "none")
    if kept.get("fusion_strategy") == "none" and (plan is not None or reduction != "none"):
        del kept["fusion_strategy"]
    if reduction == "none" and (plan is not None or "fusion_strategy" in kept):
        kept.pop("reduction", None)
    return kept
