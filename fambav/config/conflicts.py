"""What settings mean beside each other: which win, which are reset, which exclude each other.

A flag that would change nothing is refused: a run ignores no setting; but a value that switches
something off is taken where there is nothing to switch off.  A setting read from a lower level than
the one that took its meaning away has its default instead.
"""

from __future__ import annotations

from typing import Any

from fambav.config.schema import OPTIONS
from fambav.config.setting import DEFAULT, RECORD, ConfigError, Setting, When, format_value, refuse
from fambav.config.when import BOXES, CLASSES, FUSED, HEADED, MASKS, MIXING, REDUCED
from fambav.registry import DATA_SETS, DETECTORS, HEADS, UNREDUCED, family_of, models_of

Settings = dict[str, Setting]

FUSED_TOKENS, FUSED_LAYER = 7, 11  # Famba-V's defaults
PYRAMID_CHANNELS = 256  # of Faster and Mask R-CNN, as published
LIMITS = (("warmup_epochs", "epochs"), ("min_lr", "lr"), ("warmup_lr", "lr"))  # at most as much


def resolve(given: Settings) -> tuple[dict[str, Any], list[str]]:
    """Fill in defaults, reset what has no effect, and refuse contradictions.

    Args:
        given: What was given, the highest level of each setting.

    Returns:
        The value of every setting, and lines to warn the user with.

    Raises:
        ConfigError: If settings contradict each other.
    """
    settings = {
        name: given.get(name, Setting(option.default, DEFAULT, f"--{option.flag}"))
        for name, option in OPTIONS.items()
    }
    done: set[str] = set()
    _match_model_and_data(settings)
    _match_crop(settings)
    _choose_head(settings)
    _apply_conditions(settings, "reduction", done)
    _choose_reduction_or_fusion(settings)
    _choose_plan_or_strategy(settings)
    for name in OPTIONS:
        _apply_conditions(settings, name, done)
    _complete_fusion(settings)
    _check_loss(settings)
    _check_teacher(settings)
    _check_checkpoints(settings)
    warnings = [line for low, high in LIMITS if (line := _limit(settings, low, high))]
    return {name: setting.value for name, setting in settings.items()}, warnings


def _match_model_and_data(settings: Settings) -> None:
    """Refuse a model that cannot learn from the data set; one that was not given fits the other."""
    model, data_set = settings["model"], settings["data_set"]
    tasks, task = family_of(model.value).tasks, DATA_SETS[data_set.value]
    fitting = [name for name, own in DATA_SETS.items() if own == tasks[0]]
    if task == tasks[0] or (task in tasks and DEFAULT not in (model.level, data_set.level)):
        return
    able = models_of(task)
    if model.level == DEFAULT and able:
        settings["model"] = model._replace(value=able[0])
    elif data_set.level == DEFAULT and fitting:
        settings["data_set"] = data_set._replace(value=fitting[0])
    elif task not in tasks:
        expected = f"a model for {task}, as --data-set {data_set.value} needs"
        if able and task != "classification":
            expected = f"{' or '.join(able)} with --data-set {data_set.value}"
        refuse(model.label, model.value, expected)


def _match_crop(settings: Settings) -> None:
    """Let a model read what --crop-size cuts out."""
    crop, size = settings["crop_size"], settings["input_size"]
    if crop.value is None or not MASKS.holds(settings["data_set"].value):
        return
    if size.value not in (None, crop.value) and size.level >= crop.level:
        refuse(size.label, size.value, f"{format_value(crop.value)} as {crop.label}")
    settings["input_size"] = size._replace(value=crop.value, level=crop.level)


def _choose_head(settings: Settings) -> None:
    """Give a backbone its head; one that pools each image needs two images for its batch norm."""
    head, batch = settings["head"], settings["batch_size"]
    if not HEADED.holds(settings["model"].value, settings["data_set"].value):
        return
    data_set, channels = settings["data_set"], settings["head_channels"]
    boxes = BOXES.holds(data_set.value)
    able = DETECTORS if boxes else HEADS
    if head.value is None:
        head = settings["head"] = head._replace(value=able[0])
    if head.value not in able:
        refuse(head.label, head.value, f"{' or '.join(able)} with --data-set {data_set.value}")
    if boxes and channels.level == DEFAULT:
        settings["head_channels"] = channels._replace(value=PYRAMID_CHANNELS)
    pooled = not boxes and head.value != "fcn"
    if pooled and batch.value == 1 and not settings["eval"].value:
        expected = f"at least 2 with --head {head.value}, whose batch norms see maps of one cell"
        refuse(batch.label, 1, expected)


def _apply_conditions(settings: Settings, name: str, done: set[str]) -> None:
    """Reset a setting that has no effect, after the settings that decide on it."""
    if name in done:
        return
    done.add(name)
    option = OPTIONS[name]
    for when in option.when:
        for cause in when.causes.split():
            _apply_conditions(settings, cause, done)
        decisive = [settings[cause] for cause in when.causes.split()]
        if not when.holds(*(cause.value for cause in decisive)):
            why = when.why.format(**{other: setting.value for other, setting in settings.items()})
            _reset(settings, name, max(cause.level for cause in decisive), why)


def _reset(settings: Settings, name: str, level: int, why: str) -> None:
    """Reset a setting to its default, or refuse it if it was given at `level` or above."""
    setting, default, off = settings[name], OPTIONS[name].otherwise, OPTIONS[name].off_value
    given = setting.level != DEFAULT and setting.level >= level
    if given and setting.value != default and (off is None or setting.value != off):
        expected = format_value(default) + ("" if off is None else f" or {format_value(off)}")
        refuse(setting.label, setting.value, f"{expected} {why}")
    settings[name] = setting._replace(value=default)


def _reset_all(settings: Settings, when: When, level: int, why: str) -> None:
    """Reset every setting that `when` is a condition of."""
    for name, option in OPTIONS.items():
        if when in option.when:
            _reset(settings, name, level, why)


def _choose_reduction_or_fusion(settings: Settings) -> None:
    """Keep the one that was given at the higher level; what describes the other goes with it."""
    reduction, strategy, plan = (
        settings[name] for name in ("reduction", "fusion_strategy", "fusion_plan")
    )
    fused = [setting for setting in (strategy, plan) if setting.value not in (None, "none")]
    if reduction.value == "none":
        if fused and all(setting.level < reduction.level for setting in fused):
            settings["fusion_plan"] = plan._replace(value=None)
            settings["fusion_strategy"] = strategy._replace(value="none", level=reduction.level)
        return
    for setting in fused:
        if setting.level == reduction.level:
            refuse(reduction.label, reduction.value, f"none beside {setting.label} {setting.value}")
    highest = max(fused or [strategy], key=lambda setting: setting.level)
    if highest.level > reduction.level:
        settings["reduction"] = reduction._replace(value="none")
        why = f"with {highest.label}{'' if fused else ' none'}"
        _reset_all(settings, REDUCED, highest.level, why)
        return
    settings["fusion_plan"] = plan._replace(value=None)
    settings["fusion_strategy"] = strategy._replace(value="none")
    why = f"with --reduction {reduction.value}, which has a schedule of its own"
    _reset_all(settings, FUSED, reduction.level, why)


def _choose_plan_or_strategy(settings: Settings) -> None:
    """Keep the one that was given at the higher level, for a model whose tokens can be fused."""
    strategy, plan = settings["fusion_strategy"], settings["fusion_plan"]
    if plan.value is not None and strategy.level == plan.level:
        refuse(plan.label, plan.value, f"none with {strategy.label} {strategy.value}")
    if strategy.level > plan.level:
        plan = settings["fusion_plan"] = plan._replace(value=None)
    elif plan.value is not None:
        strategy = settings["fusion_strategy"] = strategy._replace(value="none")
    fused, model = strategy if plan.value is None else plan, settings["model"].value
    if fused.value == "none":
        return
    if not family_of(model).reducible:
        refuse(fused.label, fused.value, f"none with --model {model}, {UNREDUCED}")
    if family_of(model).staged:
        more = "whose layers are in stages; --reduction famba-v names them, such as r:8@2.1-2.2"
        refuse(fused.label, fused.value, f"none with --model {model}, {more}")


def _complete_fusion(settings: Settings) -> None:
    """Complete a strategy other than none with Famba-V's defaults."""
    strategy, count, layer = (settings[f"fusion_{n}"] for n in ("strategy", "token", "layer"))
    if strategy.value == "none":
        return
    if not count.value:
        if count.level != DEFAULT and count.level >= strategy.level:
            refuse(count.label, count.value, f"at least 1 with --fusion-strategy {strategy.value}")
        settings["fusion_token"] = count._replace(value=FUSED_TOKENS)
    if strategy.value in ("lower", "upper") and layer.value is None:
        settings["fusion_layer"] = layer._replace(value=FUSED_LAYER)


def _check_loss(settings: Settings) -> None:
    batch, smoothing = settings["batch_size"], settings["smoothing"]
    mixing = CLASSES.holds(settings["data_set"].value)
    mixing = mixing and any(settings[name].value for name in MIXING.causes.split())
    if batch.value % 2 and mixing:
        expected = "an even number while mixup or cutmix is on; --mixup 0 --cutmix 0 ends that"
        refuse(batch.label, batch.value, expected)
    if settings["bce_loss"].value and smoothing.value:
        expected = "0 with --bce-loss, which takes every target above 0 for right"
        refuse(smoothing.label, smoothing.value, expected)


def _check_teacher(settings: Settings) -> None:
    """Let the unreduced teacher have the weights that the model itself starts from."""
    kind, alpha, path = (
        settings[name] for name in ("distillation_type", "distillation_alpha", "teacher_path")
    )
    if kind.value in ("soft", "hard") and alpha.value > 1:
        expected = f"at most 1 with --distillation-type {kind.value}, where it is a share"
        refuse(alpha.label, alpha.value, expected)
    if kind.value == "mesa" and not settings["model_ema"].value:
        refuse(kind.label, "mesa", "another with --no-model-ema: its teacher is the moving average")
    others = kind.value not in ("none", "mesa")
    if others and settings["teacher_model"].value is None and not path.value:
        settings["teacher_path"] = path._replace(value=settings["finetune"].value)


def _check_checkpoints(settings: Settings) -> None:
    resume, finetune, evaluate = (settings[name] for name in ("resume", "finetune", "eval"))
    if evaluate.value and not (resume.value or finetune.value):
        raise ConfigError(f"{evaluate.label} has nothing to evaluate, expected --resume FILE")
    if resume.value == "auto" and settings["output_dir"].value is None:
        refuse(resume.label, "auto", "--output_dir with it, the folder to look in")
    if finetune.value and resume.value not in ("", "auto"):
        refuse(finetune.label, finetune.value, "no file beside --resume, whose weights win")


def _limit(settings: Settings, low: str, high: str) -> str | None:
    """Refuse a setting above its limit, or return a line on one that gives way.

    A default stays as it is and is cut to its limit where it is used.  Recorded
    settings are not checked: the run was trained with them.
    """
    own, limit = settings[low], settings[high]
    unused = low == "warmup_lr" and not settings["warmup_epochs"].value
    unused = unused or (high == "lr" and settings["rising_lr"].value)
    if unused or own.value <= limit.value or max(own.level, limit.level) <= RECORD:
        return None
    if own.level != DEFAULT and own.level >= limit.level:
        hint = "; --rising-lr allows it" * (high == "lr")
        refuse(
            own.label, own.value, f"at most {format_value(limit.value)}, as {limit.label} is{hint}"
        )
    default = own.level <= RECORD and own.value == OPTIONS[low].default
    if not default:
        settings[low] = own._replace(value=limit.value)
    value = f"{low} is {format_value(own.value)}{' by default' * default}"
    cut = format_value(limit.value)
    return f"warning: {value}, more than {limit.label}; it is {cut} in this run"
