"""How timm comes to our models: names, a description of their data, a way of naming layers."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fambav.arguments import instance, is_whole, refusal
from fambav.layers.embed import pair
from fambav.ops.dispatch import expect_dtype
from fambav.reduction.factory import reduce
from fambav.registry import nearest
from fambav.short_repr import short_repr
from fambav.timm_compat import timm

if TYPE_CHECKING:  # which is described with what is written here
    from fambav.models.timm_model import TimmModel

_BUILDER = (  # arguments of timm's builder, beside those of the model
    *("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_model_args"),
    *("cache_dir", "features_only", "out_indices", "feature_cls"),
)
_SOURCES = ("state_dict", "file", "url", "hf_hub_id")


def register(
    model: type[TimmModel], variants: Mapping[str, Mapping[str, Any]]
) -> dict[str, Callable[..., nn.Module]]:
    """Register variants of a model with timm, and what images they read.

    Args:
        model: Its class.
        variants: The constructor's arguments under each name.

    Returns:
        The functions that timm calls, for the namespace of the model's module.
    """
    configs: dict[str, Any] = {
        name: data_config(model, **config) for name, config in variants.items()
    }
    module = sys.modules[model.__module__]
    vars(module)["default_cfgs"] = timm.models.generate_default_cfgs(configs)
    found = {name: _entry_point(model, name, config) for name, config in variants.items()}
    for build in found.values():
        timm.models.register_model(build)
    return found


def data_config(
    model: type[TimmModel],
    *,
    img_size: int | Sequence[int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    dynamic_img_size: bool | None = None,
    **config: Any,
) -> dict[str, Any]:
    """Say what images a model reads, in timm's words.

    Args:
        model: Its class.
        img_size: Height and width, in pixels.
        in_chans: Channels of an image.
        num_classes: Length of the output.
        dynamic_img_size: Whether images of other sizes are taken; None as the class has it.
        config: Other arguments of the constructor.
    """
    size = pair(img_size, name="img_size")
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": (in_chans, *size),
        "fixed_input_size": not (
            model.dynamic_img_size if dynamic_img_size is None else dynamic_img_size
        ),
        "pool_size": model.pool_size(size, **config),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": model.first_conv,
        "classifier": model.classifier_name,
    }


def chosen_layers(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    """Resolve timm's way of naming layers: all, the last n, or a list that may count backwards.

    Returns:
        Layers from 0, ascending.

    Raises:
        ValueError: If there is no such layer, or none is named.
    """
    wanted: Any = range(-depth, 0) if indices is None else indices
    if is_whole(indices):  # of a huge number the first is enough to be refused
        wanted = range(-min(wanted, depth + 1), 0)
    known = isinstance(wanted, Sequence) and all(
        is_whole(n) and -depth <= n < depth for n in wanted
    )
    if not known or not wanted:
        raise ValueError(
            f"indices are {short_repr(indices)}, expected some of {-depth} to {depth - 1}, or the"
            f" number of the last ones, at most {depth}"
        )
    return sorted({index % depth for index in wanted})


def _entry_point(
    model: type[TimmModel], name: str, config: Mapping[str, Any]
) -> Callable[..., nn.Module]:
    """Return the function that timm calls to build `name`."""
    known = tuple(inspect.signature(model).parameters)

    def build(
        pretrained: bool = False,  # noqa: FBT001, FBT002  the signature is timm's
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> nn.Module:
        for unknown in set(arguments) - {*known, *_BUILDER}:
            raise TypeError(f"{unknown!r} is no argument of {name}; {nearest(unknown, known)}")
        _check_place(device, dtype)
        if reduction is not None:
            instance(
                "reduction", reduction, Mapping, 'arguments of reduce: {"method": "ordered", ...}'
            )
        if pretrained:
            _check_source(name, arguments)
        with nullcontext() if device is None else torch.device(device):
            net: nn.Module = timm.models.build_model_with_cfg(
                model,
                name,
                pretrained,
                pretrained_filter_fn=_fitted,
                feature_cfg={"out_indices": model.feature_count, "feature_cls": "getter"},
                **{**config, **arguments},
            )
        ours = cast("TimmModel", net.model if arguments.get("features_only") else net)
        made = cast("dict[str, Any]", net.pretrained_cfg)
        made.update(
            input_size=(ours.in_chans, *ours.img_size),
            fixed_input_size=not ours.dynamic_img_size,
            pool_size=ours.info.stages[-1].grid,
        )
        if reduction is not None:
            reduce(ours, **reduction)
        if ours is net:
            made["num_classes"] = ours.num_classes
        return net if dtype is None else net.to(dtype)

    more = f"the other arguments of `{model.__name__}`, and with `reduction`, those of `reduce`"
    return named(build, name, model, f"{dict(config)}, {more}")


def named(
    build: Callable[..., nn.Module], name: str, model: type[nn.Module], arguments: str
) -> Callable[..., nn.Module]:
    """Let timm find a function under the name of what it builds, in the module of its class."""
    build.__name__ = build.__qualname__ = name
    build.__module__ = model.__module__
    build.__doc__ = f"Build {model.__name__} with {arguments}."
    return build


def _fitted(state_dict: Mapping[str, Any], net: TimmModel) -> dict[str, Tensor]:
    """Fit the weights of a file that timm has read; a head of other classes stays as it is."""
    return net.remap(state_dict, head="drop")


def _check_place(device: Any, dtype: Any) -> None:
    """Refuse what is neither a device nor a dtype of weights.

    Raises:
        ValueError: If that is what is given.
    """
    if dtype is not None:
        expect_dtype("dtype", dtype)
    if device is None:
        return
    try:
        torch.device(device)
    except (RuntimeError, TypeError):
        raise refusal("device", device, "one of torch's, such as cpu or cuda:0") from None


def _check_source(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse `pretrained` where nothing names the weights.

    Raises:
        ValueError: If neither configuration names a file or the like.
    """
    given = [arguments.get("pretrained_cfg"), arguments.get("pretrained_cfg_overlay")]
    configs = [one if isinstance(one, Mapping) else vars(one) for one in given if one]
    if not any(one.get(source) for one in configs for source in _SOURCES):
        raise ValueError(
            f"pretrained is set, expected none: {name} is built with new weights; name a file of"
            " weights, pretrained_cfg_overlay={'file': ...}"
        )
