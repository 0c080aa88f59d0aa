"""Which settings exclude each other.

A flag that would change nothing is refused: a run never ignores what it was told.  A setting
read from a lower level than the one that took its meaning away is put back to its neutral value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

from fambav.config.options import OPTIONS, Fusion, Reduction
from fambav.config.values import DEFAULT, RECORD, ConfigError, Setting, refuse, shown
from fambav.registry import FAMILIES, FOREIGN, family_of

Settings = dict[str, Setting]
Values = Callable[[str], Any]

FUSED_TOKENS, FUSED_LAYER = 7, 11  # Famba-V's defaults
NO_FILES = ("DIGITS", "SHAPES100", "FAKE")
FETCHED = ("CIFAR", "CIFAR10")
IN_MEMORY = ("DIGITS", "SHAPES100", "CIFAR", "CIFAR10")
FOLDERS = ("IMNET", "FOLDER", "INAT", "INAT19")
ABSENT = {  # what a model lacks that does not take a setting
    "drop": ", which has no dropout",
    "param_order": ", which has one form",
    "dt_bias_twice": ", which has one form",
}


class Rule(NamedTuple):
    """Settings that mean nothing in some runs.

    Attributes:
        neutral: Those settings, with the values they then have.
        causes: Settings that decide.
        applies: Tells from the values of all settings whether they mean nothing.
        why: The rest of the sentence "expected X ...", with {setting} filled in.
    """

    neutral: dict[str, Any]
    causes: tuple[str, ...]
    applies: Callable[[Values], bool]
    why: str


def _defaults(*names: str) -> dict[str, Any]:
    return {name: OPTIONS[name].default for name in names}


def _mixes(value: Values) -> bool:
    return bool(value("mixup") or value("cutmix") or value("cutmix_minmax"))


def _of_some_models(name: str) -> Rule:
    """Refuse a setting that is no argument of the model."""
    return Rule(
        _defaults(name),
        ("model",),
        lambda value: name not in family_of(value("model")).arguments,
        f"with --model {{model}}{ABSENT.get(name, '')}",
    )


# In order: a rule may switch off what a later one depends on.
RULES = (
    Rule(
        _defaults(
            "scan_backend", "grad_checkpointing", "cuda_graphs", "reduction", "log_activations"
        ),
        ("model",),
        lambda value: value("model").startswith(FOREIGN),
        "with --model {model}",
    ),
    *map(_of_some_models, dict.fromkeys(n for own in FAMILIES.values() for n in own.arguments)),
    Rule(
        _defaults("cuda_graphs"),
        ("compile",),
        lambda value: value("compile"),
        "with --compile; take one of both",
    ),
    Rule(
        _defaults("log_activations"),
        ("compile", "cuda_graphs"),
        lambda value: value("compile") or value("cuda_graphs"),
        "with --compile or --cuda-graphs, which leave no place to look",
    ),
    Rule(
        _defaults("on_bad_image"),
        ("data_set",),
        lambda value: value("data_set") not in FOLDERS,
        "with --data-set {data_set}, which has no image files",
    ),
    Rule(
        _defaults("allow_world_size_change"),
        ("resume",),
        lambda value: not value("resume"),
        "without --resume",
    ),
    Rule(
        _defaults("data_path"),
        ("data_set",),
        lambda value: value("data_set") in NO_FILES,
        "with --data-set {data_set}, which has no files; is that the set you mean?",
    ),
    Rule(
        _defaults("download"),
        ("data_set",),
        lambda value: value("data_set") not in FETCHED,
        "with --data-set {data_set}, which is not fetched",
    ),
    Rule(
        _defaults("inat_category"),
        ("data_set",),
        lambda value: value("data_set") not in ("INAT", "INAT19"),
        "with --data-set {data_set}",
    ),
    Rule(
        {"aa": None, "reprob": 0.0, **_defaults("affine", "train_interpolation")},
        ("three_augment",),
        lambda value: value("three_augment"),
        "with --ThreeAugment",
    ),
    Rule(
        _defaults("src"),
        ("three_augment",),
        lambda value: not value("three_augment"),
        "without --ThreeAugment",
    ),
    Rule(
        _defaults("gpu_augment"),
        ("data_set",),
        lambda value: value("data_set") not in IN_MEMORY,
        f"with --data-set {{data_set}}, whose images are read one by one; {', '.join(IN_MEMORY)} "
        "are held in memory",
    ),
    Rule(
        _defaults("gpu_augment"),
        ("aa", "three_augment"),
        lambda value: not (value("aa") or "rand").startswith("rand"),
        "with --aa {aa}; rand-*, such as rand-m9-mstd0.5-inc1, none and --ThreeAugment are "
        "offered on the device",
    ),
    Rule(
        {"color_jitter": None},
        ("aa", "three_augment"),
        lambda value: value("aa") is not None,
        "with --aa {aa}; --aa none leaves room for it",
    ),
    Rule(
        _defaults("remode", "recount"),
        ("reprob", "three_augment"),
        lambda value: not value("reprob"),
        "with --reprob 0",
    ),
    Rule(
        {"cutmix": 1.0},
        ("cutmix_minmax",),
        lambda value: value("cutmix_minmax") is not None,
        "with --cutmix-minmax, which replaces it",
    ),
    Rule(
        _defaults("mixup_prob", "mixup_switch_prob", "mixup_mode"),
        ("mixup", "cutmix", "cutmix_minmax"),
        lambda value: not _mixes(value),
        "with --mixup 0 --cutmix 0",
    ),
    Rule(
        _defaults("mixup_switch_prob"),
        ("mixup", "cutmix", "cutmix_minmax"),
        lambda value: not (value("mixup") and (value("cutmix") or value("cutmix_minmax"))),
        "with only one of --mixup and --cutmix",
    ),
    Rule(
        _defaults("momentum"),
        ("opt",),
        lambda value: value("opt") != "sgd",
        "with --opt {opt}; its --opt-betas are what momentum is to sgd",
    ),
    Rule(
        _defaults("opt_betas"),
        ("opt",),
        lambda value: value("opt") == "sgd",
        "with --opt sgd",
    ),
    Rule(
        _defaults("opt_eps"),
        ("opt",),
        lambda value: value("opt") in ("sgd", "lion"),
        "with --opt {opt}",
    ),
    Rule(
        _defaults("warmup_lr"),
        ("warmup_epochs",),
        lambda value: not value("warmup_epochs"),
        "with --warmup-epochs 0",
    ),
    Rule(
        _defaults("amp_dtype"),
        ("amp",),
        lambda value: value("amp") is False,
        "with --no_amp",
    ),
    Rule(
        _defaults("model_ema_decay", "model_ema_warmup"),
        ("model_ema",),
        lambda value: not value("model_ema"),
        "with --no-model-ema",
    ),
    Rule(
        _defaults("distillation_alpha", "distillation_tau", "teacher_model", "teacher_path"),
        ("distillation_type",),
        lambda value: value("distillation_type") == "none",
        "without --distillation-type, so that there is no teacher",
    ),
    Rule(
        _defaults("distillation_tau"),
        ("distillation_type",),
        lambda value: value("distillation_type") != "soft",
        "with --distillation-type {distillation_type}",
    ),
)

LIMITS = (("warmup_epochs", "epochs"), ("min_lr", "lr"), ("warmup_lr", "lr"))  # at most as much


def settle(given: Settings) -> tuple[dict[str, Any], list[str]]:
    """Fill in defaults, refuse contradictions and return the value of every setting.

    Args:
        given: What was given, the highest level of each setting.

    Returns:
        The values, and lines to warn the user with.

    Raises:
        ConfigError: If settings contradict each other.
    """
    settings = {
        name: given.get(name, Setting(option.default, DEFAULT, f"--{option.flag}"))
        for name, option in OPTIONS.items()
    }
    for rule in RULES:
        _apply(rule, settings)
    _choose_reduction_or_fusion(settings)
    _settle_fusion(settings)
    _check_loss(settings)
    _settle_teacher(settings)
    _check_checkpoints(settings)
    warnings = [line for low, high in LIMITS if (line := _limit(settings, low, high))]
    return {name: setting.value for name, setting in settings.items()}, warnings


def _apply(rule: Rule, settings: Settings) -> None:
    if not rule.applies(lambda name: settings[name].value):
        return
    decided = max(settings[cause].level for cause in rule.causes)
    why = rule.why.format(**{name: setting.value for name, setting in settings.items()})
    for name, neutral in rule.neutral.items():
        _drop(settings, name, decided, neutral, why)


def _drop(settings: Settings, name: str, decided: int, neutral: Any, why: str) -> None:
    """Put a setting back to neutral, or refuse it if it was given at `decided` or above."""
    value, level, label = settings[name]
    if value != neutral and level != DEFAULT and level >= decided:
        refuse(label, value, f"{shown(neutral)} {why}")
    settings[name] = Setting(neutral, level, label)


def _choose_reduction_or_fusion(settings: Settings) -> None:
    """Keep the one that was given at the higher level; what describes the other goes with it."""
    reduction, strategy = settings["reduction"], settings["fusion_strategy"]
    fused = [strategy, settings["fusion_plan"]]
    given = [s for s in fused if s.value not in (None, "none")]
    if reduction.value == "none":
        if given and all(s.level < reduction.level for s in given):
            settings["fusion_plan"] = settings["fusion_plan"]._replace(value=None)
            settings["fusion_strategy"] = strategy._replace(value="none", level=reduction.level)
        _drop_all(settings, "reduction_", reduction, "without --reduction")
    elif not given and strategy.level > reduction.level:
        settings["reduction"] = reduction._replace(value="none")
        _drop_all(settings, "reduction_", strategy, f"with {strategy.label} none")
    elif any(s.level == reduction.level for s in given):
        other = next(s for s in given if s.level == reduction.level)
        refuse(reduction.label, reduction.value, f"none beside {other.label} {other.value}")
    elif any(s.level > reduction.level for s in given):
        decided = max(given, key=lambda s: s.level)
        settings["reduction"] = reduction._replace(value="none")
        _drop_all(settings, "reduction_", decided, f"with {decided.label}")
    else:
        why = f"with --reduction {reduction.value}, whose schedule says it all"
        settings["fusion_plan"] = settings["fusion_plan"]._replace(value=None)
        settings["fusion_strategy"] = strategy._replace(value="none")
        _drop_all(settings, "fusion_", reduction, why)


def _drop_all(settings: Settings, prefix: str, cause: Setting, why: str) -> None:
    """Put back what describes a reduction, or a fusion, that there is not."""
    group = {"reduction_": Reduction, "fusion_": Fusion}[prefix]
    for item in fields(group):
        if item.name not in ("reduction", "fusion_strategy", "fusion_plan"):
            _drop(settings, item.name, cause.level, OPTIONS[item.name].default, why)


def _settle_fusion(settings: Settings) -> None:
    _choose_plan_or_strategy(settings)
    strategy, plan = settings["fusion_strategy"], settings["fusion_plan"]
    fused = plan if plan.value is not None else strategy
    if plan.value is None and strategy.value == "none":
        why = "with --fusion-strategy none, which fuses nothing"
        decided = max(strategy.level, plan.level)
        for name in ("fusion_token", "fusion_layer", "fusion_method"):
            _drop(settings, name, decided, OPTIONS[name].default, why)
        return
    model = settings["model"]
    if model.value.startswith(FOREIGN):
        refuse(fused.label, fused.value, f"none with --model {model.value}")
    if plan.value is not None:
        for name in ("fusion_token", "fusion_layer"):
            why = "with --fusion-plan, which says it all"
            _drop(settings, name, plan.level, OPTIONS[name].default, why)
        return
    _fill_strategy(settings)


def _choose_plan_or_strategy(settings: Settings) -> None:
    strategy, plan = settings["fusion_strategy"], settings["fusion_plan"]
    if plan.value is None:
        return
    if strategy.level > plan.level:
        settings["fusion_plan"] = plan._replace(value=None)
    elif strategy.level == plan.level:
        refuse(plan.label, plan.value, f"none with {strategy.label} {strategy.value}")
    else:
        settings["fusion_strategy"] = strategy._replace(value="none")


def _fill_strategy(settings: Settings) -> None:
    """Complete a strategy other than none with Famba-V's defaults."""
    strategy, count, layer = (settings[f"fusion_{n}"] for n in ("strategy", "token", "layer"))
    if not count.value:
        if count.level != DEFAULT and count.level >= strategy.level:
            refuse(count.label, count.value, f"at least 1 with --fusion-strategy {strategy.value}")
        settings["fusion_token"] = count._replace(value=FUSED_TOKENS)
    if strategy.value in ("lower", "upper"):
        if layer.value is None:
            settings["fusion_layer"] = layer._replace(value=FUSED_LAYER)
        return
    why = f"with --fusion-strategy {strategy.value}, where it has no meaning"
    _drop(settings, "fusion_layer", strategy.level, None, why)


def _check_loss(settings: Settings) -> None:
    value = {name: setting.value for name, setting in settings.items()}
    if value["batch_size"] % 2 and _mixes(value.__getitem__):
        batch = settings["batch_size"]
        expected = "an even number while mixup or cutmix is on; --mixup 0 --cutmix 0 ends that"
        refuse(batch.label, batch.value, expected)
    if value["bce_loss"] and value["smoothing"]:
        smoothing = settings["smoothing"]
        expected = "0 with --bce-loss, which takes every target above 0 for right"
        refuse(smoothing.label, smoothing.value, expected)


def _settle_teacher(settings: Settings) -> None:
    """Let the model without reduction be taught by the weights that it starts from itself."""
    kind, alpha, path = (
        settings[n] for n in ("distillation_type", "distillation_alpha", "teacher_path")
    )
    if kind.value in ("soft", "hard") and alpha.value > 1:
        expected = f"at most 1 with --distillation-type {kind.value}, where it is a share"
        refuse(alpha.label, alpha.value, expected)
    own = kind.value != "none" and settings["teacher_model"].value is None
    if own and not path.value:
        settings["teacher_path"] = path._replace(value=settings["finetune"].value)


def _limit(settings: Settings, low: str, high: str) -> str | None:
    """Refuse a setting above its limit, or return a line on one that gives way.

    A default stays as it is and is cut to its limit where it is used.  What runs say of themselves
    is not looked at: their steps were made so.
    """
    own, limit = settings[low], settings[high]
    unused = low == "warmup_lr" and not settings["warmup_epochs"].value
    unused = unused or (high == "lr" and settings["rising_lr"].value)
    if unused or own.value <= limit.value or max(own.level, limit.level) <= RECORD:
        return None
    if own.level != DEFAULT and own.level >= limit.level:
        hint = "; --rising-lr allows it" * (high == "lr")
        refuse(own.label, own.value, f"at most {shown(limit.value)}, as {limit.label} is{hint}")
    default = own.level <= RECORD and own.value == OPTIONS[low].default
    if not default:
        settings[low] = own._replace(value=limit.value)
    told = f"{low} is {shown(own.value)}{' by default' * default}"
    return f"warning: {told}, more than {limit.label}; it is {shown(limit.value)} in this run"


def _check_checkpoints(settings: Settings) -> None:
    resume, finetune, evaluate = (settings[name] for name in ("resume", "finetune", "eval"))
    if evaluate.value and not (resume.value or finetune.value):
        raise ConfigError(f"{evaluate.label} has nothing to evaluate, expected --resume FILE")
    if resume.value == "auto" and settings["output_dir"].value is None:
        refuse(resume.label, "auto", "--output_dir with it, the folder to look in")
    if finetune.value and resume.value not in ("", "auto"):
        refuse(finetune.label, finetune.value, "no file beside --resume, whose weights win")
