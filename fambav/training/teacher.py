"""The teacher of a configuration, with its weights, and the loss of distillation."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fambav.config import Config, format_value
from fambav.engine import distill
from fambav.engine.checkpoint import CheckpointError
from fambav.engine.distill import Teacher
from fambav.engine.run_dir import weights_file
from fambav.engine.step import DistillationLoss, Loss
from fambav.models import official
from fambav.training.network import model
from fambav.training.run_state import RunState


def teacher(config: Config, *, num_classes: int) -> Teacher | None:
    """Build the teacher of `config` and load its weights, drawing from torch's global generator.

    Its images are those of the model in training: of the same size, mixed and normalised alike.

    Args:
        config: The settings, with the image size filled in.
        num_classes: Length of the model's output, and of the teacher's.

    Returns:
        The teacher, frozen, on the CPU; None without distillation, and of MESA, whose teacher is
        the moving average.

    Raises:
        CheckpointError: If its file is missing, or does not hold weights of such a teacher.
        ValueError: If it cannot be built for images of that size.
    """
    settings = config.distillation
    if settings.distillation_type in ("none", "mesa"):
        return None
    if not settings.teacher_path:
        hint = "; --finetune FILE would give the model's own" * (settings.teacher_model is None)
        raise ValueError(f"teacher_path is '', expected a file of the teacher's weights{hint}")
    state = RunState.read(weights_file(Path(settings.teacher_path)))
    net = model(_settings(config, state), num_classes=num_classes)
    try:
        _check_classes(state, net, num_classes)
        state.load_into(net)
    except CheckpointError as error:
        size = format_value(config.model.input_size)
        raise type(error)(f"{error}; the teacher is {_name(config)} at {size} pixels") from error
    return Teacher(net)


def distillation_loss(config: Config, base: Loss) -> DistillationLoss:
    """Return the loss of (logits, targets, teacher's logits).

    Args:
        config: The settings, which have a teacher.
        base: Loss of (logits, targets).
    """
    settings = config.distillation
    alpha, tau = settings.distillation_alpha, settings.distillation_tau
    if settings.distillation_type == "soft":
        return distill.soft(base, alpha=alpha, tau=tau)
    kinds = {"hard": distill.hard, "kl": distill.kl, "mesa": distill.mesa}
    return kinds[settings.distillation_type](base, alpha=alpha)


def described(config: Config) -> str:
    """Return a line on the teacher of `config`, which has one."""
    return f"teacher: {_name(config)}, weights of {config.distillation.teacher_path}"


def _name(config: Config) -> str:
    return config.distillation.teacher_model or f"{config.model.model} with every token kept"


def _settings(config: Config, state: RunState) -> Config:
    """Settings of the teacher's model: the model in training without reduction, or a named one.

    A file of ours has more settings of a named model, such as the position of its class token.
    """
    name = config.distillation.teacher_model
    if name is None:
        return config.unreduced()
    known = state.config
    if known is None or known.model.model != name:
        known = Config.from_flat({"model": name})
    return known.unreduced().replace(input_size=config.model.input_size)


def _check_classes(state: RunState, net: nn.Module, num_classes: int) -> None:
    """Refuse weights with fewer or more classes than the data set.

    Raises:
        CheckpointError: If they have.
    """
    heads = net.pretrained_cfg["classifier"]  # type: ignore[index]  # timm and Vim set it
    name = heads if isinstance(heads, str) else heads[0]
    try:
        weight = official(state.entries, own=net.state_dict().keys()).get(f"{name}.weight")
    except ValueError as error:
        raise CheckpointError(f"{state.path}: {error}") from error
    if weight is not None and weight.ndim and len(weight) != num_classes:
        raise CheckpointError(
            f"{state.path} has {len(weight)} classes, expected {num_classes} of a teacher, as the"
            " data set has"
        )
