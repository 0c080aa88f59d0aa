"""One step of the optimizer, as a configuration asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from fambav.config import Config
from fambav.engine import optim, train
from fambav.engine.distill import Teacher
from fambav.engine.replay import Replayed
from fambav.engine.runtime import Precision, Processes
from fambav.models import Backbone
from fambav.seeding import seed_all
from fambav.training.batches import mixing
from fambav.training.teacher import lesson

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def images_per_update(config: Config, group: Processes) -> int:
    """Count the images of one update over all processes."""
    return config.optim.batch_size * config.optim.grad_accum_steps * group.world


def precision(config: Config, group: Processes) -> Precision:
    """Return the number format of the forward pass: mixed on a GPU, if nothing else is said."""
    wanted = config.optim.amp
    mixed = group.device.type == "cuda" if wanted is None else wanted
    return Precision(group.device, _DTYPES[config.optim.amp_dtype] if mixed else None)


def update(
    config: Config,
    net: nn.Module,
    group: Processes,
    *,
    num_classes: int,
    per_epoch: int,
    teacher: Teacher | None = None,
) -> train.Update:
    """Return what makes one update.

    Args:
        config: The recipe.
        net: The model, on its device, with its initial weights.
        group: The processes that share an update.
        num_classes: Length of the model's output.
        per_epoch: Updates in an epoch.
        teacher: What else to learn from, on the same device; None for the labels alone.
    """
    wanted, mix = config.optim, mixing(config, num_classes)
    average = None
    if wanted.model_ema:
        average = optim.Average(net, decay=wanted.model_ema_decay, warmup=wanted.model_ema_warmup)
    if config.model.compile:
        net.compile()
    loss = _loss(config, mixed=mix is not None)
    return train.Update(
        model=net,
        forward=group.wrap(_replayed(config, net, group) if config.model.cuda_graphs else net),
        optimizer=_optimizer(config, net),
        loss=loss if teacher is None else lesson(config, loss),
        lr=learning_rate(config, group, per_epoch=per_epoch),
        seed=_seeding(config, net),
        teacher=teacher,
        mix=mix,
        precision=precision(config, group),
        processes=group,
        accumulate=wanted.grad_accum_steps,
        max_grad_norm=wanted.clip_grad,
        average=average,
        skipping=wanted.if_continue_inf,
        training=wanted.train_mode,
    )


def learning_rate(config: Config, group: Processes, *, per_epoch: int) -> Callable[[int], float]:
    """Return the learning rate, given the number of updates done."""
    wanted = config.optim
    min_lr, warmup_lr = _ends(config)
    return optim.cosine(
        _top(config, group),
        epochs=wanted.epochs,
        updates=per_epoch,
        warmup_epochs=min(wanted.warmup_epochs, wanted.epochs),
        warmup_lr=warmup_lr,
        min_lr=min_lr,
        late=wanted.epoch_sched,
    )


def rate_warning(config: Config, group: Processes) -> str | None:
    """Return a line if an end of the learning rate, which is not scaled, is above its middle."""
    top, (min_lr, warmup_lr) = _top(config, group), _ends(config)
    ends = {"min_lr": min_lr, "warmup_lr": warmup_lr if config.optim.warmup_epochs else 0.0}
    above = [f"{name} {value:g}" for name, value in ends.items() if value > top]
    if config.optim.rising_lr or not above:
        return None
    return (
        f"warning: lr is {top:g} at {images_per_update(config, group)} images per update, less than"
        f" {' and '.join(above)}, which are not scaled; --unscale-lr takes --lr as it is"
    )


def _top(config: Config, group: Processes) -> float:
    """Highest learning rate."""
    wanted = config.optim
    if wanted.unscale_lr:
        return wanted.lr
    return optim.scaled(wanted.lr, images=images_per_update(config, group))


def _ends(config: Config) -> tuple[float, float]:
    """Learning rate at the end and at the start of the warm-up; defaults are at most --lr."""
    wanted = config.optim
    ends = wanted.min_lr, wanted.warmup_lr
    return ends if wanted.rising_lr else (min(ends[0], wanted.lr), min(ends[1], wanted.lr))


def _replayed(config: Config, net: nn.Module, group: Processes) -> nn.Module:
    """Return the model with its passes over one process's batch recorded."""
    ours = cast(Backbone, net)
    return Replayed(
        ours.train(config.optim.train_mode),
        (config.optim.batch_size, ours.patch_embed.in_chans, *ours.img_size),
        precision=precision(config, group),
        shards=group.world * config.optim.grad_accum_steps,
        accumulating=config.optim.grad_accum_steps > 1,
    )


def _optimizer(config: Config, net: nn.Module) -> torch.optim.Optimizer:
    wanted = config.optim
    found: torch.optim.Optimizer = optim.optimizer(
        optim.groups(net, weight_decay=wanted.weight_decay, rule=wanted.decay_groups),
        name=wanted.opt,
        lr=wanted.lr,
        eps=wanted.opt_eps,
        betas=wanted.opt_betas,
        momentum=wanted.momentum,
    )
    return found


def _loss(config: Config, *, mixed: bool) -> train.Loss:
    if config.optim.bce_loss:
        return train.binary_cross_entropy
    if mixed:
        return train.soft_cross_entropy
    return train.smooth_cross_entropy(config.augment.smoothing)


def _seeding(config: Config, net: nn.Module) -> Callable[[int, int], None]:
    """Seed the draws of a forward pass.

    Our models draw for the whole update and keep their share, so all batches start alike; others
    draw for their batch only, and must not draw the same for each.
    """
    seed, shares = config.run.seed, getattr(net, "draws_whole_update", False)

    def start(done: int, place: int) -> None:
        seed_all(seed, "update", done, *(() if shares else (place,)))

    return start
