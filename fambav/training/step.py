"""The training step of a configuration: optimizer, learning rate, loss, CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from fambav.config import Config
from fambav.engine import optim
from fambav.engine.cuda_graph import CudaGraph
from fambav.engine.distill import Teacher
from fambav.engine.distributed import Processes
from fambav.engine.precision import Precision
from fambav.engine.step import TrainStep
from fambav.layers.batch_norm import share_batch_norms
from fambav.models import TimmModel
from fambav.seeding import seed_all
from fambav.tasks import task_of
from fambav.training.teacher import distillation_loss

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def images_per_update(config: Config, group: Processes) -> int:
    """Count the images of one update over all processes."""
    return config.optim.batch_size * config.optim.grad_accum_steps * group.world


def precision(config: Config, group: Processes) -> Precision:
    """Return the number format of the forward pass; without a flag, mixed on a GPU."""
    amp = config.optim.amp
    mixed = group.device.type == "cuda" if amp is None else amp
    return Precision(group.device, _DTYPES[config.optim.amp_dtype] if mixed else None)


def train_step(
    config: Config,
    net: nn.Module,
    group: Processes,
    *,
    num_classes: int,
    per_epoch: int,
    teacher: Teacher | None = None,
) -> TrainStep:
    """Return what makes one update.

    Args:
        config: The settings.
        net: The model, on its device, with its initial weights.
        group: The processes that share an update.
        num_classes: Length of the model's output.
        per_epoch: Updates in an epoch.
        teacher: Of distillation, on the same device; None without, and where it is the moving
            average.
    """
    settings, task = config.optim, task_of(config.data.data_set)
    mix = task.mixing(config, num_classes)
    loss = task.loss(config, mixed=mix is not None)
    average = None
    if settings.model_ema:
        decay, warmup = settings.model_ema_decay, settings.model_ema_warmup
        average = optim.Average(net, decay=decay, warmup=warmup)
    kind = config.distillation.distillation_type
    if kind == "mesa" and average is not None:
        teacher = Teacher(average.model)
    elif kind in ("soft", "hard") and _has_second_head(net):
        cast(Any, net).set_distilled_training(enable=True)
    if group.world > 1:
        share_batch_norms(net)
    if config.model.compile:
        net.compile()
    return TrainStep(
        model=net,
        forward=group.wrap(_cuda_graph(config, net, group) if config.model.cuda_graphs else net),
        optimizer=_optimizer(config, net),
        loss=loss if teacher is None else distillation_loss(config, loss),
        lr=learning_rate(config, group, per_epoch=per_epoch),
        seed=_seeding(config, net),
        teacher=teacher,
        taught_from=_taught_from(config, per_epoch),
        mix=mix,
        precision=precision(config, group),
        processes=group,
        accumulate=settings.grad_accum_steps,
        max_grad_norm=settings.clip_grad,
        average=average,
        guided=task.guided,
        skipping=settings.if_continue_inf,
        training=settings.train_mode,
    )


def learning_rate(config: Config, group: Processes, *, per_epoch: int) -> Callable[[int], float]:
    """Return the learning rate, given the number of updates done."""
    settings = config.optim
    min_lr, warmup_lr = _lowest_rates(config)
    return optim.cosine(
        _highest_rate(config, group),
        epochs=settings.epochs,
        updates=per_epoch,
        warmup_epochs=min(settings.warmup_epochs, settings.epochs),
        warmup_lr=warmup_lr,
        min_lr=min_lr,
        prefix=settings.warmup_prefix,
        late=settings.epoch_sched,
    )


def _has_second_head(net: nn.Module) -> bool:
    """Whether a model has a head that learns from a teacher, as GroupMamba's and timm's DeiT."""
    one = isinstance(net, TimmModel) and len(net.classifier_names) == 1
    return not one and hasattr(net, "set_distilled_training")


def _taught_from(config: Config, per_epoch: int) -> int:
    """Return the update from which there is a teacher; the moving average's sets in later."""
    settings = config.distillation
    if settings.distillation_type != "mesa":
        return 0
    return int(settings.mesa_start * config.optim.epochs) * per_epoch


def rate_warning(config: Config, group: Processes) -> str | None:
    """Return a line if an end of the learning rate, which is not scaled, is above its middle."""
    highest, (min_lr, warmup_lr) = _highest_rate(config, group), _lowest_rates(config)
    ends = {"min_lr": min_lr, "warmup_lr": warmup_lr if config.optim.warmup_epochs else 0.0}
    above = [f"{name} {value:g}" for name, value in ends.items() if value > highest]
    if config.optim.rising_lr or not above:
        return None
    return (
        f"warning: lr is {highest:g} at {images_per_update(config, group)} images per update, less"
        f" than {' and '.join(above)}, which are not scaled; --unscale-lr takes --lr as it is"
    )


def _highest_rate(config: Config, group: Processes) -> float:
    if config.optim.unscale_lr:
        return config.optim.lr
    return optim.scaled(config.optim.lr, images=images_per_update(config, group))


def _lowest_rates(config: Config) -> tuple[float, float]:
    """Learning rate at the end and at the start of the warm-up; defaults are at most --lr."""
    settings = config.optim
    most = float("inf") if settings.rising_lr else settings.lr
    return min(settings.min_lr, most), min(settings.warmup_lr, most)


def _cuda_graph(config: Config, net: nn.Module, group: Processes) -> nn.Module:
    """Capture the model's passes over one process's batch."""
    ours = cast(TimmModel, net)
    return CudaGraph(
        ours.train(config.optim.train_mode),
        (config.optim.batch_size, ours.in_chans, *ours.img_size),
        precision=precision(config, group),
        shards=group.world * config.optim.grad_accum_steps,
        accumulating=config.optim.grad_accum_steps > 1,
    )


def _optimizer(config: Config, net: nn.Module) -> torch.optim.Optimizer:
    settings = config.optim
    made: torch.optim.Optimizer = optim.optimizer(
        optim.groups(net, weight_decay=settings.weight_decay, rule=settings.decay_groups),
        name=settings.opt,
        lr=settings.lr,
        eps=settings.opt_eps,
        betas=settings.opt_betas,
        momentum=settings.momentum,
    )
    return made


def _seeding(config: Config, net: nn.Module) -> Callable[[int, int], None]:
    """Seed the random numbers of a forward pass.

    Our models draw for the whole update and keep their share, so all batches start alike; others
    draw for their batch only, and must not draw the same for each.
    """
    seed, shares = config.run.seed, getattr(net, "draws_whole_update", False)

    def start(done: int, index: int) -> None:
        seed_all(seed, "update", done, *(() if shares else (index,)))

    return start
