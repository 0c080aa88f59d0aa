"""Flags of the original programs that are known here but cannot be switched on.

Their original values parse, so old commands work; any other value is refused with a way out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fambav.config.option import Option
from fambav.config.values import Setting, refuse, shown


def _known(name: str, text: str, *, default: Any, **rest: Any) -> Option:
    filled: dict[str, Any] = dict(flag=name.replace("_", "-"), kind=type(default)) | rest
    return Option(text, name=name, default=default, optional=default is None, **filled)


def _table(*options: Option) -> dict[str, Option]:
    return {option.name: option for option in options}


_COSINE = "only --sched cosine is offered"
_NOISE = "noise on the learning rate is not offered"

UNOFFERED: dict[str, Option] = _table(
    _known("cosub", "use --drop-path", default=False),
    _known("attn_only", "--finetune trains every weight", default=False),
    _known("visualize", "`fambav plan` prints the tokens of each layer", default=False),
    _known("bi_merge", "use --fusion-strategy", default=False),
    _known("resplit", "use --reprob alone", default=False),
    _known("lr_noise", _NOISE, default=None, kind=tuple),
    _known("lr_noise_pct", _NOISE, default=0.67),
    _known("lr_noise_std", _NOISE, default=1.0),
    _known("decay_epochs", _COSINE, default=30.0),
    _known("decay_rate", _COSINE, default=0.1, also=("dr",)),
    _known("cooldown_epochs", _COSINE, default=10),
    _known("patience_epochs", _COSINE, default=10),
    _known("model_ema_force_cpu", "the average stays on the model's device", default=False),
    _known("start_epoch", "--resume knows its epoch", default=0, flag="start_epoch"),
    _known(
        "if_nan2num",
        "a loss that is not finite stops the run; --if_continue_inf skips its update",
        default=False,
        flag="if_nan2num",
        off="no_nan2num",
    ),
    _known(
        "if_random_cls_token_position",
        "choose a place with --class-token",
        default=False,
        flag="if_random_cls_token_position",
        off="no_random_cls_token_position",
    ),
    _known(
        "if_random_token_rank",
        "tokens keep the order of the image",
        default=False,
        flag="if_random_token_rank",
        off="no_random_token_rank",
    ),
)

LAUNCHED: dict[str, Option] = _table(
    _known("local_rank", "only a launcher sets it", default=0),
    _known("world_size", "use torchrun --nproc-per-node=N", default=1, flag="world_size"),
    _known("dist_url", "the launcher says where", default="env://", flag="dist_url"),
    _known("distributed", "use torchrun --nproc-per-node=N", default=False),
    _known("dist_eval", "every process evaluates its share", default=True),
)


def refuse_given(given: Mapping[str, Setting], environment: Mapping[str, str]) -> None:
    """Refuse what is not offered, and what differs from what the launcher says.

    Args:
        given: Settings that were given, by name.
        environment: Variables of the process; a launcher sets LOCAL_RANK and WORLD_SIZE.

    Raises:
        ConfigError: If one of them is switched on.
    """
    launcher = {
        "local_rank": _number(environment.get("LOCAL_RANK", ""), 0),
        "world_size": _number(environment.get("WORLD_SIZE", ""), 1),
        "distributed": "WORLD_SIZE" in environment,
    }
    for name, option in {**UNOFFERED, **LAUNCHED}.items():
        expected = launcher.get(name, option.default)
        if name in given and given[name].value != expected:
            refuse(given[name].label, given[name].value, f"{shown(expected)}; {option.text}")


def _number(text: str, default: int) -> int:
    return int(text) if text.isdecimal() else default
