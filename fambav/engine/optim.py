"""Parameter groups, optimizer, learning rate and moving average.

Source: the recipe of DeiT (Touvron et al., arXiv:2012.12877) as timm 0.4.12 computes it; a cosine
after the warm-up, timm's warmup_prefix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fambav.timm_compat import timm

_EMBEDDINGS = ("pos_embed", "cls_token", "dist_token")


def groups(model: nn.Module, *, weight_decay: float, rule: str = "default") -> list[dict[str, Any]]:
    """Split the parameters into those that decay and those that do not.

    Args:
        model: Its parameters that need gradients are split.
        weight_decay: Of the group that decays.
        rule: "default" exempts vectors, biases, embeddings and the parameters that the model lists
            in `no_weight_decay` or marks `_no_weight_decay`, such as A_log; "published" exempts
            only vectors, biases and embeddings, as the released training code did.

    Returns:
        Two groups for an optimizer, first the one that does not decay, each in the model's order.
    """
    listed: set[str] = set()
    if rule == "default":
        listed = set(getattr(model, "no_weight_decay", set)())
        listed |= {n for n, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}
    exempt: list[Tensor] = []
    decayed: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or name.endswith(".bias")
            plain = plain or name.rsplit(".", 1)[-1].startswith(_EMBEDDINGS)
            (exempt if plain or name in listed else decayed).append(parameter)
    return [
        {"params": exempt, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": weight_decay},
    ]


def optimizer(parameters: list[dict[str, Any]], *, name: str, **options: Any) -> Any:
    """Make one of timm's optimizers.

    None is fused by torch: the state of a fused one holds its step on the GPU, so that a run saved
    on a CPU would not go on there, and beside a step of 20 ms its launches take 4 ms of a CPU that
    waits.

    Args:
        parameters: Groups, see `groups`.
        name: timm's name, such as "adamw".
        options: lr, eps, betas, momentum; an option that is None, or that the optimizer does not
            have, is left out.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if name == "sgd" and options.get("momentum") == 0:
        name = "momentum"  # timm's sgd is Nesterov's, which needs a momentum
    return timm.optim.create_optimizer_v2(parameters, opt=name, **given)


def scaled(lr: float, *, images: int) -> float:
    """Scale a learning rate given for 512 images to an update of `images`."""
    return lr * images / 512


def cosine(
    lr: float,
    *,
    epochs: int,
    updates: int,
    warmup_epochs: int,
    warmup_lr: float,
    min_lr: float,
    prefix: bool = False,
    late: bool = False,
) -> Callable[[int], float]:
    """Return the learning rate as a pure function of the number of updates done.

    At epoch e, a fraction between two epochs: warmup_lr + e (lr - warmup_lr) / warmup_epochs before
    the end of the warm-up, min_lr + (lr - min_lr) (1 + cos(pi p)) / 2 after it, where p is
    e / epochs, or with prefix (e - warmup_epochs) / (epochs - warmup_epochs).

    Args:
        lr: Highest learning rate.
        epochs: Length of the run.
        updates: Updates in an epoch.
        warmup_epochs: Length of the warm-up; may be 0.
        warmup_lr: Learning rate of the first update.
        min_lr: Learning rate at the end.
        prefix: Start the cosine at the end of the warm-up, as Swin and VMamba do, instead of at
            epoch 0, under it, as DeiT does.
        late: One rate per epoch, that of the epoch before, as the original loop has it, which steps
            its schedule after the epoch; epochs 0 and 1 both run at warmup_lr.
    """
    start = warmup_epochs if prefix else 0

    def at(epoch: float) -> float:
        if epoch < warmup_epochs:
            return warmup_lr + epoch * (lr - warmup_lr) / warmup_epochs
        done = (epoch - start) / (epochs - start) if start < epochs else 1.0
        return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    def of_update(update: int) -> float:
        return at(max(update // updates - 1, 0) if late else update / updates)

    return of_update


class Average:
    """An exponential moving average of a model's weights.

    Args:
        model: The model as it is now; it is copied.
        decay: Weight of the old average in each update.
        warmup: Start from a decay of 0 that grows as 1 - n**(-2/3) with the number of updates, so
            that the average of a short run has no share of the initial weights, which without it
            is decay**n after n updates.
    """

    def __init__(self, model: nn.Module, *, decay: float, warmup: bool = True) -> None:
        self._warmup = warmup
        self._average = timm.utils.ModelEmaV3(model, decay=decay, use_warmup=warmup)

    @property
    def model(self) -> nn.Module:
        """The averaged model, in evaluation mode."""
        module: nn.Module = self._average.module
        return module

    def update(self, model: nn.Module, done: int) -> None:
        """Take `model` into the average after its update number `done`, which counts from 1."""
        self._average.update(model, step=done if self._warmup else None)
