"""What timm asks of a model: names, a description of its data, a way of naming layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from torch import nn

from fambav.ecosystem import timm
from fambav.registry import nearest

Net = TypeVar("Net", bound=nn.Module)

_TIMMS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay")


def register(
    model: type[Net], variants: Mapping[str, Mapping[str, Any]]
) -> dict[str, Callable[..., Net]]:
    """Register variants of a model with timm.

    Args:
        model: Its class; an object has the dictionary `pretrained_cfg`.
        variants: The constructor's arguments under each name.

    Returns:
        The functions that timm calls, for the namespace of the model's module.
    """
    found = {name: _entry_point(model, name, config) for name, config in variants.items()}
    for build in found.values():
        timm.models.register_model(build)
    return found


def data_config(
    img_size: tuple[int, int],
    in_chans: int,
    num_classes: int,
    *,
    first_conv: str = "patch_embed.proj",
    classifier: str = "head",
    fixed: bool = True,
) -> dict[str, Any]:
    """Say what images a model reads, in timm's words.

    Args:
        img_size: Height and width, in pixels.
        in_chans: Channels of an image.
        num_classes: Length of the output.
        first_conv: Name of the module that reads the image.
        classifier: Name of the module that gives the output.
        fixed: Whether images of another size are refused.
    """
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": (in_chans, *img_size),
        "fixed_input_size": fixed,
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": first_conv,
        "classifier": classifier,
    }


def chosen_layers(indices: int | Sequence[int] | None, depth: int) -> set[int]:
    """Resolve timm's way of naming layers: all, the last n, or a list that may count backwards."""
    if indices is None or isinstance(indices, int):
        indices = range(-(depth if indices is None else indices), 0)
    if not indices or not all(-depth <= index < depth for index in indices):
        wanted = list(indices)
        raise ValueError(f"indices are {wanted}, expected some of {-depth} to {depth - 1}")
    return {index % depth for index in indices}


def _entry_point(model: type[Net], name: str, config: Mapping[str, Any]) -> Callable[..., Net]:
    """Return the function that timm calls to build `name`."""
    known = tuple(inspect.signature(model).parameters)

    def build(cache_dir: object = None, **arguments: Any) -> Net:
        del cache_dir  # nothing is fetched
        for unwanted in _TIMMS:
            if arguments.pop(unwanted, None):
                raise ValueError(
                    f"{unwanted} is set, expected none: {name} is built with new weights;"
                    " load a file of weights into it"
                )
        for unknown in set(arguments) - set(known):
            raise ValueError(f"{unknown!r} is no argument of {name}; {nearest(unknown, known)}")
        net = model(**{**config, **arguments})
        cast(dict[str, Any], net.pretrained_cfg)["architecture"] = name
        return net

    build.__name__ = build.__qualname__ = name
    build.__module__ = model.__module__
    build.__doc__ = (
        f"Build {model.__name__} with {dict(config)} and the other arguments of `{model.__name__}`."
    )
    return build
