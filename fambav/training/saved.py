"""What stands in a file of weights, and whether it fits what is asked for now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fambav.config import Config, affecting
from fambav.data import DataSet
from fambav.engine.checkpoint import CheckpointError, NotFiniteWeightsError, State
from fambav.engine.finite import NotFiniteError, check_weights
from fambav.engine.record import BEST, CHECKPOINT, WEIGHTS
from fambav.models import Backbone, official
from fambav.reduction import Schedule
from fambav.training.entries import check, fact, load

# What may differ between a run and its continuation: where and how fast, not what.
_FREE = affecting("nothing", "speed")
DESCRIPTION = "config.json"  # beside exported weights
_IMAGES = {"batch_size", "grad_accum_steps"}  # compared as images per update


def facts(
    config: Config,
    found: DataSet,
    plan: Schedule | None,
    *,
    images: int,
    grid: tuple[int, int] | None = None,
    teacher: str | None = None,
    world: int = 1,
) -> State:
    """Return what a checkpoint says of its run besides weights and optimizer: plain data.

    Args:
        config: The settings, with the model's and the data set's own sizes filled in.
        found: The data set.
        plan: Tokens at each layer, if the model has such a plan.
        images: Images in an update, over all processes.
        grid: Patches along height and width, if the model has such a grid.
        teacher: Digest of the teacher's weights, if there is a teacher.
        world: Number of processes.
    """
    mean, std = found.statistics(config.data.data_stats)
    return {
        "config": config.flat(),
        "class_token": config.model.class_token,
        "grid": grid and list(grid),
        "schedule": plan and {name: _plain(value) for name, value in asdict(plan).items()},
        "images_per_update": images,
        "teacher": teacher,
        "world": world,
        "num_classes": found.num_classes,
        "class_names": found.class_names and list(found.class_names),
        "mean": list(mean),
        "std": list(std),
        "torch": str(torch.__version__),
    }


def as_strings(known: State) -> dict[str, str]:
    """Return facts as the strings that a safetensors file can hold."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in known.items()}


def weights_of(path: Path) -> Path:
    """Return the file of weights that a path means: itself, or the one in a folder.

    Of a run folder that is its best checkpoint, of an exported folder its weights.

    Raises:
        CheckpointError: If a folder holds none.
    """
    if not path.is_dir():
        return path
    names = (WEIGHTS,) if (path / DESCRIPTION).is_file() else (BEST, CHECKPOINT, WEIGHTS)
    for name in names:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path} holds no {names[0]}, expected a run folder or one exported as safetensors or hf"
    )


def read(path: Path) -> State:
    """Read a file of weights, with the description beside it if it was exported.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    state, description = load(path), path.parent / DESCRIPTION
    if path.name != WEIGHTS or not description.is_file():
        return state
    try:
        told = json.loads(description.read_text(encoding="utf-8"))
        own, images = told["fambav"], told["pretrained_cfg"]
        known = {
            "config": own["settings"],
            "class_token": own["class_token"],
            "class_names": told["label_names"],
            "mean": images["mean"],
            "std": images["std"],
        }
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{description} is damaged, expected what fambav export writes: {error!r}"
        ) from error
    check(description, known)
    trained = fact(state, "class_token")
    if trained is not None and trained != known["class_token"]:
        raise CheckpointError(
            f"class_token is {known['class_token']!r} in {description}, expected {trained!r} as"
            f" in {path.name}"
        )
    return {**state, "metadata": {**state.get("metadata", {}), **as_strings(known)}}


def settings(state: State) -> Config | None:
    """Return the configuration that a file of ours was made with; None for another file."""
    flat = fact(state, "config")
    if not isinstance(flat, Mapping):
        return None
    return Config.recorded({name: _listed(value) for name, value in flat.items()})


def record(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the checkpoint that a run evaluates says of what it evaluates.

    Args:
        given: Settings of that run.

    Returns:
        The settings of the run that wrote it, without places and speed; None if there is no
        checkpoint, or it does not say.

    Raises:
        CheckpointError: If it cannot be used.
    """
    path = source(given.get("resume", ""), given.get("output_dir"))
    path = path or (Path(given["finetune"]) if given.get("finetune") else None)
    known = None if path is None else settings(read(path))
    if known is None:
        return None
    kept = {"data_path", "on_bad_image", "matmul_precision"}  # where, and how exact, it was
    return {name: v for name, v in known.flat().items() if name not in _FREE - kept}


def source(resume: str, output_dir: str | None) -> Path | None:
    """Return the checkpoint to go on from, None without --resume; with auto, where one would be."""
    if resume == "auto":
        return Path(output_dir or "") / CHECKPOINT
    return Path(resume) if resume else None


def statistics(state: State, config: Config, found: DataSet) -> tuple[Any, Any]:
    """Return mean and standard deviation of the channels, to evaluate a file of weights with.

    They are those that the file was trained with, unless it does not say or others are asked for.

    Raises:
        ValueError: If the data set has none of the kind that is asked for.
    """
    known, (mean, std) = settings(state), (fact(state, name) for name in ("mean", "std"))
    if known is None or not mean or not std or known.data.data_stats != config.data.data_stats:
        return found.statistics(config.data.data_stats)
    return tuple(mean), tuple(std)


def same_run(
    path: Path,
    state: State,
    config: Config,
    *,
    images: int,
    teacher: str | None = None,
    world: int = 1,
) -> None:
    """Refuse to go on with a run under other settings.

    Args:
        path: Where the state comes from.
        state: A checkpoint.
        config: The settings now.
        images: Images in an update now, over all processes.
        teacher: Digest of the weights of the teacher now, if there is one.
        world: Number of processes now.

    Raises:
        CheckpointError: If it is no run of ours, or a setting that matters differs.
    """
    before = state.get("config")
    if not isinstance(before, Mapping) or "optimizer" not in state or "epoch" not in state:
        hint = "--finetune starts from its weights, --eval evaluates it"
        raise CheckpointError(f"{path} does not hold a run, expected a checkpoint of ours; {hint}")
    before = {**Config().flat(), **before}  # a setting that was not there yet had its default
    changed = [
        f"{name} {before[name]} -> {value}"
        for name, value in config.flat().items()
        if name not in _FREE | _IMAGES and _listed(before[name]) != _listed(value)
    ]
    if state.get("images_per_update") != images:
        changed.append(f"images per update {state.get('images_per_update')} -> {images}")
    if state.get("teacher") != teacher:
        changed.append("weights of the teacher")
    processes = state.get("world", world)
    if processes != world and not config.run.allow_world_size_change:
        changed.append(f"processes {processes} -> {world} (see --allow-world-size-change)")
    if changed:
        raise CheckpointError(
            f"{path} is of a run with other settings, expected the same; {', '.join(changed)}"
        )


def put(
    path: Path,
    state: State,
    net: nn.Module,
    *,
    ema: bool = False,
    head: Literal["strict", "drop"] = "strict",
) -> None:
    """Load the weights of a file into a model.

    Args:
        path: Where the state comes from.
        state: What the file holds.
        net: Gets the weights; those of a model of ours are fitted to its image size.
        ema: Take the moving average instead.
        head: "drop" leaves the model's head as it is if the file's has other classes.

    Raises:
        CheckpointError: If the weights are not those of such a model.
        NotFiniteWeightsError: If one of them is not finite.
    """
    try:
        place, grid = fact(state, "class_token"), fact(state, "grid")
        grid = grid and (grid[0], grid[1])
        weights = official(state, ema=ema)
        check_weights(weights, net.state_dict())
        if isinstance(net, Backbone):
            weights = net.remap(state, ema=ema, class_token=place, grid=grid, head=head)
        else:
            weights = _with_head(weights, net, head)
        net.load_state_dict(weights)
    except (ValueError, RuntimeError) as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:2])
        unusable = isinstance(error, NotFiniteError)
        kind = NotFiniteWeightsError if unusable else CheckpointError
        raise kind(f"{path}: {reason}") from error


def _with_head(weights: dict[str, Tensor], net: nn.Module, head: str) -> dict[str, Tensor]:
    """Put a foreign model's own head in the place of one of another shape, if that is wanted."""
    own = net.state_dict()
    if head != "drop":
        return weights
    fits = {n: v for n, v in weights.items() if n not in own or v.shape == own[n].shape}
    classifier = {n for n in own if n.split(".")[0] in ("head", "fc", "classifier", "head_dist")}
    return fits | {n: own[n] for n in classifier - fits.keys()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _listed(value: Any) -> Any:
    """A tuple as the list that JSON makes of it."""
    return list(value) if isinstance(value, tuple) else value
