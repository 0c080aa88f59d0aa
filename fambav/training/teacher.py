"""The teacher that a configuration asks for, with its weights."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fambav.config import Config
from fambav.engine import distill
from fambav.engine.checkpoint import CheckpointError
from fambav.engine.distill import Teacher
from fambav.engine.run_dir import weights_file
from fambav.engine.train import Lesson, Loss
from fambav.models import official
from fambav.training.network import model
from fambav.training.run_state import RunState


def teacher(config: Config, *, num_classes: int) -> Teacher | None:
    """Build the teacher of `config` and load its weights, drawing from torch's global generator.

    It sees the images that the model in training sees: as large, mixed and normalised as they are.

    Args:
        config: The recipe, with the image size filled in.
        num_classes: Length of the model's output, and of the teacher's.

    Returns:
        The teacher, frozen, on the CPU; None if nothing is to be learnt from one.

    Raises:
        CheckpointError: If its file is missing, or does not hold weights of such a teacher.
        ValueError: If it cannot be built for images of that size.
    """
    asked = config.distillation
    if asked.distillation_type == "none":
        return None
    if not asked.teacher_path:
        hint = "; --finetune FILE would give the model's own" * (asked.teacher_model is None)
        raise ValueError(f"teacher_path is '', expected a file of the teacher's weights{hint}")
    state = RunState.read(weights_file(Path(asked.teacher_path)))
    net = model(_settings(config, state), num_classes=num_classes)
    _check_classes(state, net, num_classes)
    try:
        state.load_into(net)
    except CheckpointError as error:
        size = config.model.input_size
        raise type(error)(f"{error}; the teacher is {_name(config)} at {size} pixels") from error
    return Teacher(net)


def lesson(config: Config, base: Loss) -> Lesson:
    """Return the loss of (logits, targets, teacher's logits) that `config` asks for.

    Args:
        config: The recipe, which has a teacher.
        base: Loss of (logits, targets).
    """
    asked = config.distillation
    if asked.distillation_type == "soft":
        return distill.soft(base, alpha=asked.distillation_alpha, tau=asked.distillation_tau)
    kinds = {"hard": distill.hard, "kl": distill.kl}
    return kinds[asked.distillation_type](base, alpha=asked.distillation_alpha)


def described(config: Config) -> str:
    """Return a line on the teacher of `config`, which has one."""
    return f"teacher: {_name(config)}, weights of {config.distillation.teacher_path}"


def _name(config: Config) -> str:
    return config.distillation.teacher_model or f"{config.model.model} with every token kept"


def _settings(config: Config, state: RunState) -> Config:
    """What the teacher is built from: the model in training without reduction, or a name.

    A file of ours says more of a named model than its name does, such as its class token's place.
    """
    name = config.distillation.teacher_model
    if name is None:
        return config.dense()
    known = state.config
    if known is None or known.model.model != name:
        known = Config.from_flat({"model": name})
    return known.dense().replace(input_size=config.model.input_size)


def _check_classes(state: RunState, net: nn.Module, wanted: int) -> None:
    """Refuse weights whose classes are not those of the model in training.

    Raises:
        CheckpointError: If there are fewer or more of them.
    """
    found = net.pretrained_cfg["classifier"]  # type: ignore[index]  # timm and Vim set it
    name = found if isinstance(found, str) else found[0]  # of several heads the first
    try:
        weight = official(state.entries).get(f"{name}.weight")
    except ValueError as error:
        raise CheckpointError(f"{state.path}: {error}") from error
    if weight is not None and len(weight) != wanted:
        raise CheckpointError(
            f"{state.path} has {len(weight)} classes, expected {wanted} of a teacher, as the data"
            " set has"
        )
