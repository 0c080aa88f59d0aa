"""Flags of the original programs that are known here but cannot be switched on.

Their original values parse, so old commands work; any other value is refused with a way out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fambav import launcher
from fambav.config.setting import Option, Setting, format_value, refuse


def _flag(flag: str, text: str, *, default: Any = False, **rest: Any) -> Option:
    filled: dict[str, Any] = {"kind": type(default), "optional": default is None, **rest}
    return Option(text, name=flag.replace("-", "_"), flag=flag, default=default, **filled)


_COSINE = "only --sched cosine is offered"
_NOISE = "noise on the learning rate is not offered"
_INF = "a loss that is NaN or infinite stops the run; --if_continue_inf skips its update"
_UNSUPPORTED = (
    _flag("cosub", "use --drop-path"),
    _flag("pretrained", "nothing is fetched; --finetune starts from a file of weights"),
    _flag("attn-only", "--finetune trains every weight"),
    _flag("visualize", "`fambav plan` prints the tokens of each layer"),
    _flag("bi-merge", "use --fusion-strategy"),
    _flag("resplit", "use --reprob alone"),
    _flag("lr-noise", _NOISE, default=None, kind=tuple),
    _flag("lr-noise-pct", _NOISE, default=0.67),
    _flag("lr-noise-std", _NOISE, default=1.0),
    _flag("decay-epochs", _COSINE, default=30.0),
    _flag("decay-rate", _COSINE, default=0.1, also=("dr",)),
    _flag("cooldown-epochs", _COSINE, default=10),
    _flag("patience-epochs", _COSINE, default=10),
    _flag("model-ema-force-cpu", "the average stays on the model's device"),
    _flag("start_epoch", "--resume knows its epoch", default=0),
    _flag("if_nan2num", _INF, off="no_nan2num"),
    _flag(
        "if_random_cls_token_position",
        "choose a place with --class-token",
        off="no_random_cls_token_position",
    ),
    _flag("if_random_token_rank", "tokens keep the order of the image", off="no_random_token_rank"),
)
_LAUNCHER = (  # what torchrun sets instead
    _flag("local-rank", "only a launcher sets it", default=0),
    _flag("world_size", "use torchrun --nproc-per-node=N", default=1),
    _flag("dist_url", "the launcher sets it", default="env://"),
    _flag("distributed", "use torchrun --nproc-per-node=N"),
    _flag("dist-eval", "every process evaluates its share", default=True),
)
UNSUPPORTED: dict[str, Option] = {option.name: option for option in _UNSUPPORTED}
LAUNCHER: dict[str, Option] = {option.name: option for option in _LAUNCHER}


def refuse_unsupported(given: Mapping[str, Setting], environment: Mapping[str, str]) -> None:
    """Refuse what is not offered, and what differs from what the launcher sets.

    Args:
        given: Settings that were given, by name.
        environment: Variables of the process; a launcher sets LOCAL_RANK and WORLD_SIZE.

    Raises:
        ConfigError: If one of them is switched on.
        LauncherError: If one of the launcher's is given, and what it sets is malformed.
    """
    launched: dict[str, Any] = {}
    if LAUNCHER.keys() & given.keys():
        _, world, local_rank = launcher.place(environment)
        launched = dict(local_rank=local_rank, world_size=world)
        launched["distributed"] = "WORLD_SIZE" in environment
    for name, option in {**UNSUPPORTED, **LAUNCHER}.items():
        expected = launched.get(name, option.default)
        if name in given and given[name].value != expected:
            refuse(given[name].label, given[name].value, f"{format_value(expected)}; {option.text}")
