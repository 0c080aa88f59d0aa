"""Every setting of a run: its name, default, unit and range, in frozen groups.

A field below, or in `model_settings` or `samples`, is one setting.  Its name is the YAML key; the
same name with hyphens or underscores is the flag; its metadata has its meaning, the conditions
under which it has one, and what it affects.  There is no second list of settings anywhere.

Source: flag names and defaults are those of DeiT (github.com/facebookresearch/deit), Vim
(github.com/hustvl/Vim) and Famba-V (github.com/AIoT-MLSys-Lab/Famba-V), main.py.  Differing
defaults: model, input_size (the model's own), data_set, data_path, output_dir (a new folder),
device (a GPU if there is one), amp (on for a GPU), model_ema_warmup, teacher_model (the model
itself), fusion_layer and fusion_token (the original values, but only once a strategy is chosen).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fambav.config import checks, when
from fambav.config.model_settings import Fusion, Model, Reduction
from fambav.config.samples import Augment, Data
from fambav.config.setting import (
    COUNT,
    NATURAL,
    NOT_NEGATIVE,
    POSITIVE,
    PROCESSES,
    RATE,
    Affects,
    Bounds,
    Group,
    Option,
    option,
    options_of,
    switch,
)

TRACKERS = ("tensorboard", "wandb", "mlflow")
OPTIMIZERS = ("adamw", "adam", "nadamw", "lamb", "lion", "sgd")


@dataclass(frozen=True, kw_only=True)
class Optim(Group):
    """Loss, optimizer, learning rate and precision."""

    example: ClassVar[str] = "-b 128 --epochs 100 --lr 1e-3 --unscale-lr --weight-decay 0.1"

    batch_size: int = option(
        64, "images of one process in one forward pass", bounds=COUNT, short="-b"
    )
    grad_accum_steps: int = option(
        1, "gradient accumulation: forward passes in one update", bounds=COUNT
    )
    epochs: int = option(300, "passes over the training set", bounds=COUNT)
    bce_loss: bool = switch("binary cross-entropy (BCE)", when.CLASSES)
    mask_loss: str = option(
        "ce",
        "loss of masks: cross-entropy, Dice or their sum",
        when.MASKS,
        choices=("ce", "dice", "ce+dice"),
    )
    unscale_lr: bool = switch("use --lr as it is, whatever the batch")
    opt: str = option("adamw", "optimizer", choices=OPTIMIZERS)
    opt_eps: float = option(1e-8, "epsilon of Adam", when.EPSILON, bounds=POSITIVE)
    opt_betas: tuple[float, ...] | None = option(
        None, "betas of Adam; none = the optimizer's own", when.BETAS, bounds=RATE, length=2
    )
    clip_grad: float | None = option(None, "gradient clipping: largest norm", bounds=POSITIVE)
    momentum: float = option(0.9, "momentum of sgd", when.SGD, off_value=0.0, bounds=RATE)
    weight_decay: float = option(0.05, "weight decay", bounds=NOT_NEGATIVE)
    decay_groups: str = option(
        "default",
        "default spares A_log and D from decay, published does not",
        choices=("default", "published"),
    )
    sched: str = option("cosine", "learning rate schedule", choices=("cosine",))
    lr: float = option(5e-4, "learning rate at 512 images per update", bounds=POSITIVE)
    warmup_lr: float = option(
        1e-6, "learning rate at the start, not scaled", when.WARM_UP, bounds=NOT_NEGATIVE
    )
    min_lr: float = option(1e-5, "learning rate at the end, not scaled", bounds=NOT_NEGATIVE)
    rising_lr: bool = switch(
        "let --min-lr and --warmup-lr be above --lr, as one published recipe has it"
    )
    warmup_epochs: int = option(5, "epochs until --lr is reached", bounds=NATURAL)
    warmup_prefix: bool = switch(
        "start the cosine after the warm-up instead of under it, as Swin and VMamba do",
        when.WARM_UP,
    )
    epoch_sched: bool = switch("one learning rate per epoch, an epoch late, as published")
    amp: bool | None = option(
        None, "mixed precision; none = on for a GPU", flag="if_amp", off="no_amp"
    )
    amp_dtype: str = option("bf16", "type of mixed precision", when.AMP, choices=("bf16", "fp16"))
    matmul_precision: str = option(
        "high", "float32 products: high may use TF32", affects="speed", choices=("high", "highest")
    )
    train_mode: bool = switch(
        "dropout and stochastic depth while training", on=True, off="no-train-mode"
    )
    if_continue_inf: bool = switch(
        "skip an update whose loss is NaN or infinite",
        affects="speed",
        flag="if_continue_inf",
        off="no_continue_inf",
    )
    model_ema: bool = switch(
        "keep an exponential moving average (EMA) of the weights", on=True, off="no-model-ema"
    )
    model_ema_decay: float = option(
        0.99996, "decay of the EMA per update", when.AVERAGED, bounds=RATE
    )
    model_ema_warmup: bool = switch(
        "smaller decay of the EMA in the first updates",
        when.AVERAGED,
        on=True,
        off_value=False,
        off="no-model-ema-warmup",
    )


@dataclass(frozen=True, kw_only=True)
class Distillation(Group):
    """Distillation from a teacher."""

    example: ClassVar[str] = "--distillation-type kl --finetune RUN"

    distillation_type: str = option(
        "none",
        "soft and hard share the loss as DeiT does, kl adds to it as R-MeeTo does, and mesa the "
        "moving average's as VSSD does",
        when.CLASSES,
        choices=("none", "soft", "hard", "kl", "mesa"),
    )
    distillation_alpha: float = option(
        0.5, "weight of the teacher's part", when.TAUGHT, bounds=POSITIVE
    )
    distillation_tau: float = option(
        1.0, "temperature of --distillation-type soft", when.TAUGHT, when.SOFT, bounds=POSITIVE
    )
    mesa_start: float = option(
        0.25,
        "share of the epochs before --distillation-type mesa sets in",
        when.TAUGHT,
        when.MESA,
        bounds=RATE,
    )
    teacher_model: str | None = option(
        None,
        "the teacher; none = the model itself without reduction",
        when.TAUGHT,
        when.NOT_MESA,
        aliases={"regnety_160": "timm/regnety_160"},  # DeiT's
        check=checks.model_name,
    )
    teacher_path: str = option(
        "",
        "file or run folder of the teacher's weights; for the model itself --finetune's, if any",
        when.TAUGHT,
        when.NOT_MESA,
        affects="nothing",  # its weights do, and are compared where it matters
        check=checks.local_file,
    )


@dataclass(frozen=True, kw_only=True)
class Run(Group):
    """Device, files, checkpoints and logs."""

    example: ClassVar[str] = "--output_dir output/run --resume auto --seed 1"

    output_dir: str | None = option(
        None,
        "run folder; none = output/MODEL_DATA_TIME",
        affects="nothing",
        check=checks.filled,
        flag="output_dir",
    )
    resume: str = option(
        "",
        "checkpoint or run folder to go on from, or auto; with --eval a folder's best checkpoint",
        affects="nothing",
        check=checks.local_file,
    )
    finetune: str = option(
        "",
        "file of weights to start from, or a run folder, its best checkpoint",
        affects="nothing",
        check=checks.local_file,
    )
    eval: bool = switch("evaluate --resume or --finetune, without training", affects="nothing")
    device: str | None = option(
        None, "cpu or cuda; none = a GPU if there is", affects="speed", check=checks.device_name
    )
    threads: int | None = option(
        None,
        "CPU threads of a process; none = as many as torch takes",
        affects="speed",
        bounds=PROCESSES._replace(low=1),
    )
    seed: int = option(0, "of every random draw", bounds=Bounds(0, 2**32 - 1))
    deterministic: bool = switch("deterministic algorithms only", affects="speed")
    log_every: int = option(10, "updates between printed lines", affects="nothing", bounds=COUNT)
    tracker: str = option(
        "tensorboard", "gets the numbers of each epoch", affects="nothing", choices=TRACKERS
    )
    log_activations: bool = switch(
        "record the largest activation of each layer in each epoch",
        when.OURS,
        when.EAGER,
        affects="speed",
    )
    save_every: int | None = option(
        None,
        "updates between checkpoints; none = one at the end of each epoch",
        affects="speed",
        bounds=COUNT,
    )
    allow_world_size_change: bool = switch(
        "go on with another number of processes, at as many images per update",
        when.RESUMED,
        affects="speed",
    )
    extend: bool = switch(
        "go on under other settings of training, such as more --epochs, which are recorded",
        when.RESUMED,
        affects="nothing",
    )


GROUPS: dict[str, type[Group]] = dict(
    model=Model,
    fusion=Fusion,
    reduction=Reduction,
    data=Data,
    augment=Augment,
    optim=Optim,
    distillation=Distillation,
    run=Run,
)


OPTIONS: dict[str, Option] = {
    name: option for group in GROUPS.values() for name, option in options_of(group).items()
}


def affecting(*kinds: Affects) -> frozenset[str]:
    """Return the names of the settings that affect one of `kinds` and no more."""
    return frozenset(name for name, option in OPTIONS.items() if option.affects in kinds)
