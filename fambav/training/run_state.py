"""What a file of weights holds; entries of ours are checked as it is read.

A digest says that a file is as it was written, not who wrote it: an entry of the wrong type is
refused here, before anything is made of it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fambav.config import Config, affecting
from fambav.data import DataSet
from fambav.engine import checkpoint
from fambav.engine.checkpoint import CheckpointError, NotFiniteWeightsError, State
from fambav.engine.finite import NotFiniteError, check_weights
from fambav.engine.run_dir import CHECKPOINT, DESCRIPTION, WEIGHTS, weights_file
from fambav.heads import HeadedModel
from fambav.json_files import parse, read_object
from fambav.models import TimmModel, is_classifier, official
from fambav.reduction import Schedule
from fambav.short_repr import short_repr
from fambav.training.entries import CHECKS, FACTS, check_entries

# What may differ between a run and its continuation: where and how fast, not what.
_FREE = affecting("nothing", "speed")
_KEPT_BY_EVAL = {"data_path", "on_bad_image", "matmul_precision"}  # of those, where and how exact
_IMAGES = {"batch_size", "grad_accum_steps"}  # compared as images per update
# What --extend leaves as it is: what the weights and the state of the optimizer are of.
_FIXED = affecting("model") | {"data_set", "inat_category", "opt", "decay_groups", "model_ema"}
_FIXED |= {"amp", "amp_dtype"}
_LENGTHS = {"images_per_update", "repeated_aug"}  # which an epoch's number of updates follows from
_TEXTS = {"class_token", "torch"}  # facts that a safetensors file holds as they are, not as JSON
_HEADS = (
    *("head.weight", "head.fc.weight", "classifier.head.weight", "fc.weight"),
    "Linear_Trend.weight",  # of DLinear
    "decode_head.conv_seg.weight",
)
_CHANNELS = 3
_DESCRIPTION = {
    "fambav": {"settings": dict, "class_token": (str, type(None))},
    "label_names": (list, type(None)),
    "pretrained_cfg": {"mean": list, "std": list},
}


@dataclass(frozen=True)
class RunState:
    """A file of weights, and what it says of the run that wrote it.

    Attributes:
        path: The file.
        entries: All it holds, as `checkpoint.load` returns it.
        facts: What describes the run, checked; empty if the file is not ours.
    """

    path: Path
    entries: State
    facts: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> RunState:
        """Read a file, and of exported weights the description beside them.

        Raises:
            CheckpointError: If a file is missing or damaged, or an entry is of the wrong type.
        """
        state, description = cls.of(path, checkpoint.load(path)), path.parent / DESCRIPTION
        if path.name != WEIGHTS or not description.is_file():
            return state
        known, trained = _read_description(description), state.class_token
        if trained is not None and trained != known["class_token"]:
            raise CheckpointError(
                f"class_token is {known['class_token']!r} in {description}, expected {trained!r} as"
                f" in {path.name}"
            )
        state = dataclasses.replace(state, facts={**state.facts, **known})
        state._check_classes()
        return state

    @classmethod
    def of(cls, path: Path, entries: State) -> RunState:
        """Check what was read from a file.

        Raises:
            CheckpointError: If an entry is of the wrong type, or classes are not those of the head.
        """
        strings, known = entries.get("metadata"), entries
        if isinstance(strings, Mapping) and "config" in strings:
            known = {name: _parse(path, name, text) for name, text in strings.items()}
        elif "config" not in entries:  # not ours
            known = {}
        check_entries(path, known)
        state = cls(path, entries, {name: known[name] for name in FACTS if name in known})
        if state.facts and entries.get("model"):
            state._check_classes()
        return state

    @cached_property
    def config(self) -> Config | None:
        """Settings of the run; None if the file is not ours.

        Raises:
            ConfigError: If one of them is unknown or wrong.
        """
        flat = self.facts.get("config")
        if flat is None:
            return None
        return Config.recorded({name: _as_list(value) for name, value in flat.items()})

    @property
    def class_token(self) -> str | None:
        """Where the class token stood in training, if the file says it."""
        return self.facts.get("class_token")

    @property
    def grid(self) -> tuple[int, int] | None:
        """Patches along height and width in training, if the file says it."""
        grid = self.facts.get("grid")
        return grid and (grid[0], grid[1])

    def num_classes(self, net: nn.Module | None = None) -> int | None:
        """Return the rows of the classifier; if its weight has no name that we know, what is said.

        Args:
            net: The model that the file is of, where it may be of another code.

        Raises:
            CheckpointError: If there are no weights, or that one is no matrix of classes.
        """
        try:
            weights = self._picked(net)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        name = next((name for name in _HEADS if name in weights), None)
        if name is None:
            return self.facts.get("num_classes")
        head = weights[name]
        if head.ndim < 2 or not len(head):
            shape = tuple(head.shape)
            raise CheckpointError(f"{self.path}: {name} is {shape}, expected (classes, width)")
        return len(head)

    def _picked(
        self,
        net: nn.Module | None,
        *,
        ema: bool = False,
        head: Literal["strict", "drop"] = "strict",
    ) -> dict[str, Tensor]:
        """Return the weights under the names that a model has, whichever code saved them.

        Raises:
            ValueError: If they are not those of such a model.
        """
        if isinstance(net, TimmModel | HeadedModel):
            return net.pick(self.entries, ema=ema, head=head)
        own = () if net is None else net.state_dict().keys()
        return official(self.entries, ema=ema, own=own, head=head)

    @property
    def class_names(self) -> list[str] | None:
        """Of the classes, in order, if the file has them."""
        return self.facts.get("class_names")

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation of the channels in training, if the file says them."""
        mean, std = self.facts.get("mean"), self.facts.get("std")
        return (tuple(mean), tuple(std)) if mean and std else None

    def _check_classes(self) -> None:
        """Refuse classes that are not those of the head, or statistics that are not of channels."""
        variates = self.facts.get("variates")
        channels = _CHANNELS if variates is None else len(variates)
        for name in ("mean", "std"):
            if len(known := self.facts.get(name, [0] * channels)) != channels:
                wanted = f"{channels} numbers"
                raise CheckpointError(
                    f"{self.path}: {name} is {short_repr(known)}, expected {wanted}"
                )
        names = self.class_names
        counts = {
            "num_classes": self.facts.get("num_classes"),
            "class_names": None if names is None else len(names),
            "the head": self.num_classes(),
        }
        known = {name: count for name, count in counts.items() if count is not None}
        if len(set(known.values())) > 1:
            text = ", ".join(f"{count} by {name}" for name, count in known.items())
            raise CheckpointError(f"{self.path}: classes are {text}, expected one number of them")

    @property
    def epochs(self) -> int:
        """Epochs that were complete; only a checkpoint of a run knows it."""
        return int(self.entries["epoch"]) + 1

    @property
    def updates(self) -> int | None:
        """Updates that were made; None in older files, which are of complete epochs only."""
        return self.entries.get("updates")

    def statistics_for(self, config: Config, data: DataSet) -> tuple[Any, Any]:
        """Return mean and standard deviation of the channels, to evaluate the weights with.

        They are those of training, unless the file does not say them or `config` sets others.

        Raises:
            ValueError: If the data set has none of the kind that `config` names.
        """
        known = self.config
        if not self.statistics or not known or known.data.data_stats != config.data.data_stats:
            return data.statistics(config.data.data_stats)
        return self.statistics

    def load_into(
        self, net: nn.Module, *, ema: bool = False, head: Literal["strict", "drop"] = "strict"
    ) -> list[str]:
        """Load the weights into a model.

        Args:
            net: Gets the weights; those of a model of ours are fitted to its image size.
            ema: Take the moving average instead.
            head: "drop" leaves the model's head as it is if the file's has other classes.

        Returns:
            A line for each weight whose shape is another in the model: how it was fitted.

        Raises:
            CheckpointError: If the weights are not those of such a model.
            NotFiniteWeightsError: If one of them is not finite.
        """
        try:
            weights = there = self._picked(net, ema=ema, head=head)
            check_weights(weights, net.state_dict())
            if isinstance(net, TimmModel | HeadedModel):
                place, grid = self.class_token, self.grid
                weights = net.remap(self.entries, ema=ema, class_token=place, grid=grid, head=head)
            elif head == "drop":
                weights = _with_own_head(weights, net)
            net.load_state_dict(weights)
        except (ValueError, RuntimeError) as error:
            reason = "; ".join(line.strip() for line in str(error).splitlines()[:2])
            infinite = isinstance(error, NotFiniteError)
            kind = NotFiniteWeightsError if infinite else CheckpointError
            raise kind(f"{self.path}: {reason}") from error
        return [
            f"{name}: {list(there[name].shape)} in the file, {list(own.shape)} here, "
            f"{'drawn anew' if is_classifier(name) else 'resized'}"
            for name, own in weights.items()
            if name in there and there[name].shape != own.shape
        ]

    def differences(self, config: Config) -> str:
        """Say which settings of model and data the run of this file had otherwise.

        Args:
            config: The settings now.
        """
        if self.config is None:
            return "it does not say its settings"
        before, now = self.config.flat(), config.flat()
        names = affecting("model") | {"data_set"}
        changed = {n: [before[n], now[n]] for n in before if n in names and before[n] != now[n]}
        return ", ".join(_shown(changed)) or "its run had the same model and data set"

    def extended(
        self, config: Config, *, images: int, teacher: str | None = None, world: int = 1
    ) -> RunState:
        """Return the state to go on from under the settings now.

        Without --extend these are those of the run.  With it, those that differ are added to the
        entry `changes`.

        Args:
            config: The settings now.
            images: Images in an update now, over all processes.
            teacher: Digest of the weights of the teacher now, if there is one.
            world: Number of processes now.

        Raises:
            CheckpointError: If it is no run of ours, or a setting that has to stay differs.
        """
        entries = self.entries
        if not {"config", "optimizer", "epoch"} <= entries.keys():
            hint = "--finetune starts from its weights, --eval evaluates it"
            raise CheckpointError(
                f"{self.path} does not hold a run, expected a checkpoint of ours; {hint}"
            )
        # A setting that was not there yet had its default.
        before = {**Config().flat(), **self.facts["config"]}
        before |= {name: entries.get(name) for name in ("images_per_update", "teacher")}
        now = {**config.flat(), "images_per_update": images, "teacher": teacher}
        changed = {
            name: [_as_list(before[name]), _as_list(value)]
            for name, value in now.items()
            if name not in _FREE | _IMAGES and _as_list(before[name]) != _as_list(value)
        }
        extend = config.run.extend
        refused = _shown({n: v for n, v in changed.items() if not extend or n in _FIXED})
        hint = "" if extend or not changed.keys() - _FIXED else "; --extend goes on with the others"
        processes = entries.get("world", world)
        if processes != world and not config.run.allow_world_size_change:
            refused.append(f"processes {processes} -> {world} (see --allow-world-size-change)")
        if refused:
            raise CheckpointError(
                f"{self.path} is of a run with other settings, expected the same;"
                f" {', '.join(refused)}{hint}"
            )
        return self._changed(changed, epochs=config.optim.epochs) if changed else self

    def _changed(self, settings: dict[str, list[Any]], *, epochs: int) -> RunState:
        """Return the state with one more change of settings.

        Raises:
            CheckpointError: If the run is too far for it, or in an epoch that it would cut.
        """
        if epochs < self.epochs:
            raise CheckpointError(
                f"epochs is {epochs}, expected at least the {self.epochs} that {self.path} has done"
            )
        updates, lengths = self.updates, {n: settings[n] for n in settings if n in _LENGTHS}
        if lengths and self.entries.get("losses"):
            raise CheckpointError(
                f"{self.path} is within an epoch, expected the end of one to change"
                f" {', '.join(_shown(lengths))}"
            )
        change = {"epoch": self.epochs, "updates": updates, "settings": settings}
        # None: those of the complete epochs, however many an epoch has by now.
        entries = {**self.entries, "updates": None if lengths else updates}
        entries["changes"] = [*(entries.get("changes") or ()), change]
        return dataclasses.replace(self, entries=entries)


def facts(
    config: Config,
    data: DataSet,
    plan: Schedule | None,
    *,
    images: int,
    grid: tuple[int, int] | None = None,
    teacher: str | None = None,
    world: int = 1,
    changes: Sequence[Mapping[str, Any]] = (),
) -> State:
    """Return what a checkpoint says of its run besides weights and optimizer: plain data.

    Args:
        config: The settings, with the model's and the data set's own sizes filled in.
        data: The data set.
        plan: Tokens at each layer, if the model has such a plan.
        images: Images in an update, over all processes.
        grid: Patches along height and width, if the model has such a grid.
        teacher: Digest of the teacher's weights, if there is a teacher.
        world: Number of processes.
        changes: Of settings in the course of the run.
    """
    return {
        "config": config.flat(),
        "class_token": config.model.class_token,
        "grid": grid and list(grid),
        "schedule": plan and {name: _as_list(value) for name, value in asdict(plan).items()},
        "images_per_update": images,
        "teacher": teacher,
        "world": world,
        **data.facts(config.data.data_stats),
        "torch": str(torch.__version__),
        **({"changes": list(changes)} if changes else {}),
    }


def as_strings(known: Mapping[str, Any]) -> dict[str, str]:
    """Return facts as the strings that a safetensors file can hold."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in known.items()}


def record(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the settings of the run that wrote what `--eval` evaluates, without places and speed.

    Args:
        given: Settings of the evaluation.

    Returns:
        The settings; None if no file is named, or it is not ours.

    Raises:
        CheckpointError: If the file cannot be used.
    """
    path = resume_path(given.get("resume", ""), given.get("output_dir"))
    path = path or (Path(given["finetune"]) if given.get("finetune") else None)
    known = None if path is None else RunState.read(weights_file(path)).config
    if known is None:
        return None
    return {name: v for name, v in known.flat().items() if name not in _FREE - _KEPT_BY_EVAL}


def resume_path(resume: str, output_dir: str | None) -> Path | None:
    """Return what --resume names, None without it; with auto, where a checkpoint would be."""
    if resume == "auto":
        return Path(output_dir or "") / CHECKPOINT
    return Path(resume) if resume else None


def _shown(changed: Mapping[str, list[Any]]) -> list[str]:
    """Changes of settings in words."""
    return [
        "weights of the teacher"
        if name == "teacher"
        else f"{name.replace('images_per_update', 'images per update')} {before} -> {now}"
        for name, (before, now) in changed.items()
    ]


def _parse(path: Path, name: str, text: str) -> Any:
    if name in _TEXTS or name not in CHECKS:
        return text
    try:
        return parse(text, f"{path}: {name}", "what was written")
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _read_description(path: Path) -> State:
    """Return the facts in the `config.json` of an exported folder."""
    try:
        content = read_object(path, "what fambav export writes", _DESCRIPTION)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    own, images = content["fambav"], content["pretrained_cfg"]
    known = {
        "config": own["settings"],
        "class_token": own["class_token"],
        "class_names": content["label_names"],
        "mean": images["mean"],
        "std": images["std"],
    }
    check_entries(path, known)
    return known


def _with_own_head(weights: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Replace the classifier of a timm model where its shape is not that of `net`."""
    own = net.state_dict()
    fits = {n: v for n, v in weights.items() if n not in own or v.shape == own[n].shape}
    return fits | {n: own[n] for n in own if is_classifier(n) and n not in fits}


def _as_list(value: Any) -> Any:
    """A tuple as the list that JSON makes of it."""
    return list(value) if isinstance(value, tuple) else value
