"""Every setting of a run: its name, default, unit and range, in frozen groups.

A field below is one setting.  Its name is the YAML key; the same name with hyphens or underscores
is the flag; its metadata says what it means.  There is no second list of settings anywhere.

Source: flag names and defaults are those of DeiT (github.com/facebookresearch/deit), Vim
(github.com/hustvl/Vim) and Famba-V (github.com/AIoT-MLSys-Lab/Famba-V), main.py.  Differing
defaults: model, input_size (the model's own), data_set, data_path, output_dir (a new folder),
device (a GPU if there is one), amp (on for a GPU), model_ema_warmup, teacher_model (the model
itself), fusion_layer and fusion_token (the original values, but only once a strategy is chosen).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, get_args, get_origin, get_type_hints

from fambav.config.option import (
    COUNT,
    NATURAL,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    RATE,
    Bounds,
    Option,
    option,
)
from fambav.config.policies import policy
from fambav.registry import (
    BIMAMBA,
    CLASS_TOKEN_POLICIES,
    CLASS_TOKENS,
    DATA_SETS,
    FOREIGN,
    FUSION_METHODS,
    GAP_POLICIES,
    HOOKS,
    METHODS,
    MODELS,
    PARAM_ORDERS,
    REDUCERS,
    SCAN_BACKENDS,
    SCAN_POLICIES,
    SCHEDULES,
    STRATEGIES,
    STRATEGY_ALIASES,
    nearest,
)

OPTIMIZERS = ("adamw", "adam", "nadamw", "lamb", "lion", "sgd")
INAT_LEVELS = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


def model_name(name: str) -> None:
    """Refuse a model that is neither ours nor marked as timm's.

    Raises:
        ValueError: If it is neither.
    """
    if name not in MODELS and not (name.startswith(FOREIGN) and name != FOREIGN):
        hint = nearest(name, MODELS)
        if not hint.startswith("did you mean"):
            hint = f"timm's own models are written {FOREIGN}NAME"
        raise ValueError(f"a model of `fambav list models`; {hint}")


def device_name(name: str) -> None:
    """Refuse what is not `cpu`, `cuda` or `cuda:0` and so on.

    Raises:
        ValueError: If it is not.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError("cpu, cuda or cuda:N")


def fusion_list(plan: str) -> None:
    """Refuse what is not `layer:tokens,layer:tokens`, each at least 1, no layer twice.

    Raises:
        ValueError: If it is not.
    """
    pairs = [re.fullmatch(r"\s*0*([1-9]\d*)\s*:\s*0*[1-9]\d*\s*", p) for p in plan.split(",")]
    layers = [pair.group(1) for pair in pairs if pair]
    if len(layers) < len(pairs) or len(set(layers)) < len(layers):
        raise ValueError("layer:tokens pairs such as 6:9,8:9, counted from 1, no layer twice")


def local_file(path: str) -> None:
    """Refuse an address on the network.

    Raises:
        ValueError: If it is one.
    """
    if re.match(r"[a-z]+://", path):
        raise ValueError("a file on this machine; download it first")


def rising(pair: tuple[float, float]) -> None:
    """Refuse a pair whose second number is not above the first.

    Raises:
        ValueError: If it is not.
    """
    if not pair[0] < pair[1]:
        raise ValueError("two rising numbers")


def filled(text: str) -> None:
    """Refuse an empty text.

    Raises:
        ValueError: If it is empty.
    """
    if not text.strip():
        raise ValueError("a text that is not empty")


def schedule_form(text: str) -> None:
    """Refuse what cannot be a schedule, before a model is there to say more.

    Raises:
        ValueError: If it has none of the forms.
    """
    if text != "published" and not re.fullmatch(r"(r|ramp|list|keep|tokens):[-\d.,@/]+", text):
        raise ValueError(f"one of {SCHEDULES}")


@dataclass(frozen=True, kw_only=True)
class Model:
    """What to train."""

    model: str = option("vim_tiny", "model of `fambav list models`, or timm/NAME", check=model_name)
    input_size: int | None = option(
        None, "height and width of an image in pixels; none = the model's own", bounds=COUNT
    )
    patch_size: int | None = option(
        None, "height and width of a patch in pixels; none = the model's own", bounds=COUNT
    )
    stride: int | None = option(
        None, "pixels between patches; none = the model's own", bounds=COUNT
    )
    num_classes: int | None = option(
        None, "length of the output; none = the data set's", bounds=COUNT
    )
    class_token: str = option("middle", "place of the class token", choices=CLASS_TOKENS)
    bimamba_type: str = option("v2", "directions of the mixer", choices=BIMAMBA)
    legacy_init: bool = option(
        default=False, text="zero as the backward scan's initial dt bias, as published"
    )
    param_order: str = option(
        "raster",
        "PlainMamba: step sizes go with the place in the image, as in released weights, or with "
        "their token, as the paper describes",
        choices=PARAM_ORDERS,
    )
    dt_bias_twice: bool = option(
        default=True, text="PlainMamba: add the step sizes' bias twice, as released weights need"
    )
    drop: float = option(0.0, "dropout after the position embedding", bounds=RATE)
    drop_path: float = option(0.1, "largest probability of skipping a block", bounds=RATE)
    grad_checkpointing: bool = option(
        default=False, text="recompute blocks in the backward pass to save memory"
    )
    scan_backend: str | None = option(
        None, "force one implementation of the scan; none = the fastest", choices=SCAN_BACKENDS
    )
    compile: bool = option(default=False, text="compile the model with torch.compile")
    cuda_graphs: bool = option(
        default=False, text="launch forward and backward passes as CUDA graphs"
    )


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """Which tokens go, and where, by any method."""

    reduction: str = option(
        "none", "how tokens are chosen", choices=("none", *METHODS), registry=REDUCERS
    )
    reduction_schedule: str = option(
        "published",
        "where and how many: r:5@3-23/2, ramp:16,-1, list:7,7,0, keep:0.8@5,10, "
        "tokens:157,125@10,20, or published, what the method's paper says for the model",
        check=schedule_form,
    )
    reduction_hook: str | None = option(
        None, "where in a layer tokens go; none = the method's own", choices=HOOKS
    )
    scan_policy: str | None = option(
        None,
        "what the scan makes of tokens that went; none = the method's own",
        choices=SCAN_POLICIES,
    )
    gap_policy: str | None = option(
        None,
        "how an aligned scan ages its state over tokens that went; the method's own if not given",
        choices=GAP_POLICIES,
    )
    class_token_policy: str | None = option(
        None,
        "where the class token goes among what is left; none = the method's own",
        choices=CLASS_TOKEN_POLICIES,
    )
    reduction_options: str = option(
        "", "options of the method, key=value,key=value; `fambav list options` names them"
    )


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """Which tokens to fuse, and where, in the words of Famba-V."""

    fusion_strategy: str = option(
        "none", "layers that fuse tokens", choices=STRATEGIES, aliases=STRATEGY_ALIASES
    )
    fusion_layer: int | None = option(
        None,
        "first fused layer of upper, last of lower, counted from 1; none = 11 where one is needed",
        bounds=COUNT,
    )
    fusion_token: int = option(
        0, "tokens removed in each fused layer; 7 once a strategy is chosen", bounds=NATURAL
    )
    fusion_method: str = option(
        "famba-v",
        "how tokens are paired and merged; ordered keeps the scan order, famba-v is the paper's",
        choices=FUSION_METHODS,
    )
    fusion_plan: str | None = option(
        None, "layer:tokens pairs instead of a strategy, e.g. 6:9,8:9", check=fusion_list
    )


@dataclass(frozen=True, kw_only=True)
class Data:
    """What to train on."""

    data_set: str = option(
        "DIGITS", "data set; CIFAR is CIFAR-100, SHAPES100 is made here", choices=DATA_SETS
    )
    data_path: str = option("datasets", "folder of the data set", check=filled)
    inat_category: str = option("name", "label of an INAT image", choices=INAT_LEVELS)
    data_stats: str = option(
        "imagenet", "channel statistics to normalise by", choices=("imagenet", "own")
    )
    download: bool = option(default=False, text="fetch the data set if it is missing")
    on_bad_image: str = option(
        "error", "skip leaves out files that are no images, 1% at most", choices=("error", "skip")
    )
    num_workers: int = option(10, "loader processes", bounds=NATURAL, flag="num_workers")
    pin_mem: bool = option(
        default=True, text="page-locked memory for batches on a GPU", off="no-pin-mem"
    )
    eval_crop_ratio: float = option(
        0.875, "central part of an image used in evaluation", bounds=Bounds(0, 1, above=True)
    )


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How training images and targets are varied."""

    color_jitter: float | None = option(0.3, "colour jitter without --aa", bounds=NOT_NEGATIVE)
    aa: str | None = option("rand-m9-mstd0.5-inc1", "timm's policy, or none", check=policy)
    smoothing: float = option(0.1, "label smoothing", bounds=RATE)
    train_interpolation: str = option(
        "bicubic", "how images are enlarged", choices=("bicubic", "bilinear", "random")
    )
    repeated_aug: bool = option(
        default=True, text="three views of an image in one epoch", off="no-repeated-aug"
    )
    three_augment: bool = option(
        default=False, text="DeiT III's grey, solarise or blur instead of --aa", flag="ThreeAugment"
    )
    src: bool = option(default=False, text="simple random crop, with --ThreeAugment")
    affine: float = option(
        0.0, "degrees of random rotation, with a tenth of shift and scale", bounds=Bounds(0, 180)
    )
    gpu_augment: bool = option(
        default=False, text="augment on the GPU, where a set held in memory then lives; same images"
    )
    hflip: float = option(0.5, "probability of a horizontal flip", bounds=PROBABILITY)
    reprob: float = option(0.25, "probability of erasing a rectangle", bounds=PROBABILITY)
    remode: str = option("pixel", "filling of the rectangle", choices=("pixel", "rand", "const"))
    recount: int = option(1, "rectangles to erase", bounds=COUNT)
    mixup: float = option(0.8, "alpha of mixup, 0 = off", bounds=NOT_NEGATIVE)
    cutmix: float = option(1.0, "alpha of cutmix, 0 = off", bounds=NOT_NEGATIVE)
    cutmix_minmax: tuple[float, ...] | None = option(
        None,
        "least and largest side of cutmix's rectangle, as a share of the image's",
        bounds=PROBABILITY,
        length=2,
        check=rising,
    )
    mixup_prob: float = option(1.0, "probability of mixing a batch", bounds=PROBABILITY)
    mixup_switch_prob: float = option(
        0.5, "probability of cutmix where both are on", bounds=PROBABILITY
    )
    mixup_mode: str = option("batch", "what shares a mix", choices=("batch", "pair", "elem"))


@dataclass(frozen=True, kw_only=True)
class Optim:
    """How to step."""

    batch_size: int = option(64, "images of one process in one forward pass", bounds=COUNT)
    grad_accum_steps: int = option(1, "forward passes in one update", bounds=COUNT)
    epochs: int = option(300, "passes over the training set", bounds=COUNT)
    bce_loss: bool = option(default=False, text="binary cross-entropy")
    unscale_lr: bool = option(default=False, text="use --lr as it is, whatever the batch")
    opt: str = option("adamw", "optimizer", choices=OPTIMIZERS)
    opt_eps: float = option(1e-8, "epsilon of Adam", bounds=POSITIVE)
    opt_betas: tuple[float, ...] | None = option(
        None, "betas of Adam; none = the optimizer's own", bounds=RATE, length=2
    )
    clip_grad: float | None = option(None, "largest norm of the gradient", bounds=POSITIVE)
    momentum: float = option(0.9, "momentum of sgd", bounds=RATE)
    weight_decay: float = option(0.05, "weight decay", bounds=NOT_NEGATIVE)
    decay_groups: str = option(
        "default",
        "default spares A_log and D from decay, published does not",
        choices=("default", "published"),
    )
    sched: str = option("cosine", "shape of the learning rate", choices=("cosine",))
    lr: float = option(5e-4, "learning rate at 512 images per update", bounds=POSITIVE)
    warmup_lr: float = option(1e-6, "learning rate at the start, not scaled", bounds=NOT_NEGATIVE)
    min_lr: float = option(1e-5, "learning rate at the end, not scaled", bounds=NOT_NEGATIVE)
    rising_lr: bool = option(
        default=False, text="let --min-lr and --warmup-lr be above --lr, as one recipe has it"
    )
    warmup_epochs: int = option(5, "epochs until --lr is reached", bounds=NATURAL)
    epoch_sched: bool = option(
        default=False, text="one learning rate per epoch, an epoch late, as published"
    )
    amp: bool | None = option(
        None, "mixed precision; none = on for a GPU", flag="if_amp", off="no_amp"
    )
    amp_dtype: str = option("bf16", "type of mixed precision", choices=("bf16", "fp16"))
    matmul_precision: str = option(
        "high", "float32 products: high may use TF32", choices=("high", "highest")
    )
    train_mode: bool = option(
        default=True, text="dropout and skipped blocks while training", off="no-train-mode"
    )
    if_continue_inf: bool = option(
        default=False,
        text="skip an update whose loss is not finite",
        flag="if_continue_inf",
        off="no_continue_inf",
    )
    model_ema: bool = option(
        default=True, text="keep a moving average of the weights", off="no-model-ema"
    )
    model_ema_decay: float = option(0.99996, "its decay per update", bounds=RATE)
    model_ema_warmup: bool = option(
        default=True, text="smaller decay in the first updates", off="no-model-ema-warmup"
    )


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What to learn from a teacher."""

    distillation_type: str = option(
        "none",
        "soft and hard share the loss as DeiT does, kl adds to it as R-MeeTo does",
        choices=("none", "soft", "hard", "kl"),
    )
    distillation_alpha: float = option(0.5, "weight of the teacher's part", bounds=POSITIVE)
    distillation_tau: float = option(
        1.0, "temperature of --distillation-type soft", bounds=POSITIVE
    )
    teacher_model: str | None = option(
        None,
        "the teacher; none = the model itself with every token kept",
        aliases={"regnety_160": "timm/regnety_160"},  # DeiT's
        check=model_name,
    )
    teacher_path: str = option(
        "",
        "checkpoint of the teacher's weights; for the model itself --finetune's if there is one",
        check=local_file,
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where it runs and what it leaves behind."""

    output_dir: str | None = option(
        None, "run folder; none = output/MODEL_DATA_TIME", check=filled, flag="output_dir"
    )
    resume: str = option("", "checkpoint to go on from, or auto", check=local_file)
    finetune: str = option("", "checkpoint whose weights to start from", check=local_file)
    eval: bool = option(default=False, text="evaluate --resume or --finetune, without training")
    device: str | None = option(None, "cpu or cuda; none = a GPU if there is", check=device_name)
    threads: int | None = option(
        None, "CPU threads of a process; none = as many as torch takes", bounds=COUNT
    )
    seed: int = option(0, "of every random draw", bounds=Bounds(0, 2**32 - 1))
    deterministic: bool = option(default=False, text="deterministic algorithms only")
    log_every: int = option(10, "updates between printed lines", bounds=COUNT)
    log_activations: bool = option(
        default=False, text="record the largest activation of each layer in each epoch"
    )
    save_every: int | None = option(
        None, "updates between checkpoints; none = one at the end of each epoch", bounds=COUNT
    )
    allow_world_size_change: bool = option(
        default=False, text="go on with another number of processes, at as many images per update"
    )


GROUPS: dict[str, type] = dict(
    model=Model,
    fusion=Fusion,
    reduction=Reduction,
    data=Data,
    augment=Augment,
    optim=Optim,
    distillation=Distillation,
    run=Run,
)


def _completed(name: str, item: Any, hint: Any) -> Option:
    optional = type(None) in get_args(hint)
    kind = next((h for h in get_args(hint) if h is not type(None)), hint) if optional else hint
    kind = get_origin(kind) or kind
    found: Option = item.metadata["option"]
    flag = found.flag or name.replace("_", "-")
    return found._replace(name=name, kind=kind, optional=optional, default=item.default, flag=flag)


def _options() -> dict[str, Option]:
    table = {}
    for group in GROUPS.values():
        hints = get_type_hints(group)
        for item in fields(group):
            table[item.name] = _completed(item.name, item, hints[item.name])
    return table


OPTIONS: dict[str, Option] = _options()
