"""Set a method of reduction up for a model."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, cast

from torch import nn

from fambav.arguments import instance, is_whole, known_name, whole
from fambav.layers import BackboneInfo
from fambav.reduction.reducer import make_reducer
from fambav.reduction.reduction import Reduction
from fambav.reduction.schedule import NAME, PUBLISHED, from_fusion, make_schedule
from fambav.reduction.stages import StagedReduction
from fambav.registry import REDUCERS


class Reducible(Protocol):
    """A model whose tokens can be reduced."""

    reduction: Reduction | StagedReduction

    @property
    def info(self) -> BackboneInfo:
        """Its sizes."""


Model = TypeVar("Model", bound=nn.Module)


def no_reduction(info: BackboneInfo) -> Reduction:
    """Return a reduction that removes nothing.

    Raises:
        ValueError: If info is not that of a model.
    """
    instance("info", info, BackboneInfo, "the `info` of a model")
    return Reduction.none(info)


def fused(
    info: BackboneInfo,
    strategy: str = "none",
    *,
    layer: int | None = None,
    token: int = 0,
    method: str = "famba-v",
    plan: str | None = None,
) -> Reduction:
    """Set a Famba-V fusion up for a model.

    Args:
        info: The model.
        strategy: Layers that fuse, as in `from_fusion`.
        layer: Likewise.
        token: Likewise.
        method: How tokens are fused, usually "famba-v" or "ordered".
        plan: As in `from_fusion`.

    Raises:
        ValueError: If that cannot be done or would do nothing.
    """
    instance("info", info, BackboneInfo, "the `info` of a model")
    known_name("fusion_method", method, REDUCERS.names())
    text = from_fusion(strategy, depth=info.depth, layer=layer, token=token, plan=plan)
    if text is None:
        return no_reduction(info)
    given = ("fusion_token", token) if plan is None else ("fusion_plan", plan)
    reducer = make_reducer(method)
    return Reduction(info, reducer, make_schedule(text, info, reducer, given=given), text=text)


def make_reduction(
    info: BackboneInfo,
    method: str,
    schedule: str | int = PUBLISHED,
    *,
    hook: str | None = None,
    scan: str | None = None,
    gap_policy: str | None = None,
    class_policy: str | None = None,
    **options: Any,
) -> Reduction:
    """Set a method up for a model.

    Args:
        info: The model.
        method: Name of a method, or "none".
        schedule: Where and how many, see `schedule`; a number stands for so many at every layer;
            "published" is the schedule of the method's paper for such a model.
        hook: Where in a block, "before", "between" or "after"; the method's own by default.
        scan: "compact" scans the kept tokens as if none had been between; "aligned" lets the state
            age over those that went; "masked" keeps the length and sets those that went to zero.
        gap_policy: How it ages: by the step sizes that the tokens had ("cached"), the layer's bias
            ("bias"), the step before ("hold_prev"), the token's own ("self"), not at all ("none").
        class_policy: Where the class token goes: to its rank among the kept tokens ("exact"), to
            the same share of the sequence ("proportional"), to the "middle".
        options: The method's own.

    Raises:
        ValueError: If that cannot be done with this model, or would do nothing.
    """
    instance("info", info, BackboneInfo, "the `info` of a model")
    if method == "none":
        return no_reduction(info)
    reducer, text = make_reducer(method, **options), _text(schedule)
    reduction = Reduction(
        info,
        reducer,
        make_schedule(text, info, reducer, hook=hook, class_policy=class_policy),
        hook=hook,
        scan=scan,
        gap_policy=gap_policy,
        class_policy=class_policy,
        text=text,
    )
    if text == PUBLISHED and reducer.presumed(info):
        own = reducer.published(info)
        reduction.remark = f"schedule {own} is ours: the paper of {method} does not give its own"
    return reduction


def make_staged_reduction(
    info: BackboneInfo,
    method: str = "none",
    schedule: str | int = PUBLISHED,
    *,
    hook: str | None = None,
    scan: str | None = None,
    gap_policy: str | None = None,
    class_policy: str | None = None,
    given: tuple[str, object] | None = None,
    **options: Any,
) -> StagedReduction:
    """Set a method up for a model of stages, or none.

    Args:
        info: The model.
        method: As of `make_reduction`.
        schedule: Likewise; its layers are named stage.layer.
        hook: As of `make_reduction`.
        scan: Only "compact".
        gap_policy: Only "none".
        class_policy: Only "exact".
        options: The method's own.
        given: Name and value of the setting that a refusal is about, if schedule is made from it.

    Raises:
        ValueError: As `make_reduction`.
    """
    instance("info", info, BackboneInfo, "the `info` of a model")
    if method == "none":
        return StagedReduction(info)
    policies = dict(hook=hook, scan=scan, gap_policy=gap_policy, class_policy=class_policy)
    reducer = make_reducer(method, **options)
    return StagedReduction(info, reducer, _text(schedule), given=given, **policies)


def make_any_reduction(
    info: BackboneInfo, method: str = "none", schedule: str | int = PUBLISHED, **how: Any
) -> Reduction | StagedReduction:
    """Set a method up for a model of one stage or of several, or none.

    Arguments and errors are those of `make_reduction` or `make_staged_reduction`.
    """
    instance("info", info, BackboneInfo, "the `info` of a model")
    make = make_staged_reduction if info.staged else make_reduction
    return make(info, method, schedule, **how)


def _text(schedule: str | int) -> str:
    return f"r:{whole(NAME, schedule, least=1)}" if is_whole(schedule) else cast(str, schedule)


def reduce(model: Model, method: str, schedule: str | int = PUBLISHED, **how: Any) -> Model:
    """Let a model reduce its tokens from now on, with the weights that it has.

    Args:
        model: One of ours, such as `timm.create_model("vim_tiny")`.
        method: Name of a method; "none" ends it.
        schedule: As in `make_reduction`.
        how: Further arguments of `make_reduction`, and options of the method.

    Returns:
        The model itself.

    Raises:
        ValueError: If that cannot be done with this model, or would do nothing.
    """
    reducible = cast(Reducible, model)
    if not isinstance(getattr(model, "reduction", None), Reduction | StagedReduction):
        raise ValueError(
            f"model is a {type(model).__name__}, expected one whose tokens can be reduced"
        )
    reducible.reduction = make_any_reduction(reducible.info, method, schedule, **how)
    return model
