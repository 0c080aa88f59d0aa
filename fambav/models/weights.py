"""Published and saved weights: picked out of what a file holds, and fitted to a model.

Nothing here reads files.  Names are never matched loosely: what `adapt` returns loads strictly.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fambav.arguments import instance
from fambav.layers.embed import resize_positions
from fambav.short_repr import short_repr

if TYPE_CHECKING:  # a model is fitted by what is written here
    from fambav.models.timm_model import TimmModel

# What torch adds to names: of compile, FSDP and activation checkpointing anywhere; of DDP in front,
# as of AveragedModel, which also counts its updates.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_IN_FRONT, _COUNT = "module.", "n_averaged"
_RAW, _AVERAGED = ("model", "state_dict"), ("model_ema", "state_dict_ema")
_HEADS = ("head", "fc", "classifier", "head_dist", "Linear_Seasonal", "Linear_Trend")
_SHOWN = 4  # prefixes that a refusal names


_PAYLOAD = "a dictionary of weights"  # what a file has to hold


def official(
    payload: Mapping[str, Any],
    *,
    ema: bool = False,
    own: Collection[str] = (),
    head: Literal["strict", "drop"] = "strict",
) -> dict[str, Tensor]:
    """Pick the weights out of a checkpoint of DeiT's or OpenMMLab's family, or a bare state_dict.

    Args:
        payload: What the file holds: weights, or a dictionary that has them under "model" or
            "state_dict", and their moving average under "model_ema" or "state_dict_ema".
        ema: Take the moving average.
        own: Names of the weights of the model that they are for.
        head: "drop" takes weights without a classifier too.

    Returns:
        A state_dict without the prefixes that wrappers add.  With `own` also without one that all
        weights of the model have, such as "model." of Lightning or "backbone." of OpenMMLab, and
        then without weights that do not have it.

    Raises:
        ValueError: If there are no such weights, one is sparse or has no values, or the model's
            have several prefixes.
    """
    instance("payload", payload, Mapping, _PAYLOAD)
    names = _AVERAGED if ema else _RAW
    inside = (payload[name] for name in names if isinstance(payload.get(name), Mapping))
    found: Mapping[Any, Any] = next(inside, {} if ema else payload)
    if not found or not _are_weights(found):
        here = ", ".join(map(str, list(payload)[:8])) or "nothing"
        raise ValueError(f"checkpoint holds {here}, expected weights under {' or '.join(names)}")
    for name, value in found.items():
        if value.is_meta or value.layout != torch.strided:
            kind = "on the meta device" if value.is_meta else str(value.layout)
            raise ValueError(f"{name} of the checkpoint is {kind}, expected dense values")
    weights = {_bare(name): value for name, value in found.items() if name != _COUNT}
    prefix = _prefix(weights, own, head) if own else ""
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def is_classifier(name: str) -> bool:
    """Whether a weight of a model of ours or timm's belongs to its classifier, by its name."""
    return name.split(".")[0] in _HEADS


def published_class_token(payload: Mapping[str, Any]) -> str | None:
    """Return where the class token of a checkpoint of Vim's or Famba-V's own code is.

    Their weights have the same names wherever it is, but the command line is saved beside them.
    Famba-V's flags distinguish its checkpoints from Vim's.

    Args:
        payload: What the file holds, with the command line under "args".

    Returns:
        "middle" for Vim's, "head" for Famba-V's, None if the file does not show it.

    Raises:
        ValueError: If Famba-V's code trained the model in a way that is not offered here.
    """
    instance("payload", payload, Mapping, _PAYLOAD)
    arguments = getattr(payload.get("args"), "__dict__", {})
    name = str(arguments.get("model", ""))
    if not name.startswith("vim_"):
        return None
    if "fusion_strategy" not in arguments:
        return "middle"
    if "stride8" in name or "tiny" in name:
        how = "read its class from patch 0" if "stride8" in name else "ran its layers in pairs"
        raise ValueError(f"checkpoint is of Famba-V's {name}, which {how}; expected another model")
    return "head"


def check_class_token(saved: str, wanted: str) -> None:
    """Refuse weights that were trained with the class token in another position.

    Raises:
        ValueError: If the positions differ.
    """
    if saved != wanted:
        raise ValueError(
            f"class_token is {short_repr(wanted)}, expected {short_repr(saved)} as the checkpoint"
            " was trained; the same names of weights would mean other tokens"
        )


def adapt(
    state_dict: Mapping[str, Tensor],
    model: TimmModel,
    *,
    class_token: str | None = None,
    grid: tuple[int, int] | None = None,
    head: Literal["strict", "drop"] = "strict",
) -> dict[str, Tensor]:
    """Fit weights to a model of the same kind with another image size or number of classes.

    Args:
        state_dict: The weights.
        model: What they are for.
        class_token: Where the class token was in training, if that is known.
        grid: Patches along height and width in training.  None takes them for as many on both
            sides, and is refused where that is in doubt.
        head: "strict" refuses another number of classes; "drop" keeps the model's head then.

    Returns:
        Weights that load strictly into the model: position embeddings are resized bicubically,
        with the rows of class tokens taken out of the grid where they are and put back where the
        model has them.

    Raises:
        ValueError: If class tokens, classes, names or shapes do not fit, or the grid has to be
            given.
    """
    instance("state_dict", state_dict, Mapping, "tensors by name")
    instance("model", model, nn.Module, "a model of ours")
    if class_token is not None:
        check_class_token(class_token, model.class_token)
    own = model.state_dict()
    weights = _fit_head(dict(state_dict), model, own, head)
    _check_names(weights, own)
    name = model.position
    shape = weights[name].shape
    if len(shape) == 3 and shape[::2] == own[name].shape[::2]:
        weights[name] = resize_pos_embed(weights[name], model, grid)
    for name, value in weights.items():
        if value.shape != own[name].shape:
            wanted = tuple(own[name].shape)
            raise ValueError(f"{name} of the checkpoint is {tuple(value.shape)}, expected {wanted}")
    return weights


def resize_pos_embed(
    pos_embed: Tensor, model: TimmModel, grid: tuple[int, int] | None = None
) -> Tensor:
    """Resize a position embedding to a model's grid.

    Args:
        pos_embed: The rows of patches and class tokens, (1, length, dim).
        model: Has the class tokens in the same position in its own sequence.
        grid: Patches along height and width in training; None if that is not known.

    Returns:
        (1, model.length, dim); pos_embed itself if the grid is the model's.

    Raises:
        ValueError: If grid does not have as many cells as there are patches; if it is None and
            they make no square, or make a square and the model's other grid just as well.
    """
    length = pos_embed.shape[1]
    patches = length - len(model.cls_index)
    if grid is None:
        side = math.isqrt(max(patches, 0))
        grid, own = (side, side), math.prod(model.grid)
        if not side or math.prod(grid) != patches or (own == patches and grid != model.grid):
            raise ValueError(
                f"grid is None, expected patches along height and width in training, such as"
                f" adapt(..., grid={model.grid}): the {patches} rows of the checkpoint's pos_embed"
                " do not show them"
            )
    if grid[0] * grid[1] != patches:
        raise ValueError(
            f"grid is {grid[0]} x {grid[1]}, expected {patches} cells as the checkpoint's"
            f" pos_embed has {length} rows with {len(model.cls_index)} class tokens"
        )
    return resize_positions(pos_embed, grid, model.grid, class_token=model.class_token)


def _fit_head(
    weights: dict[str, Tensor], model: TimmModel, own: Mapping[str, Tensor], head: str
) -> dict[str, Tensor]:
    """Check the number of classes, or replace a head that differs by the model's."""
    name = f"{model.classifier}.weight"
    shape = weights[name].shape if name in weights else ()
    saved = shape[0] if shape else 0
    if saved == model.num_classes:
        return weights
    if head != "drop":
        raise ValueError(
            f"checkpoint has {saved} classes, expected {model.num_classes} as the model;"
            " --finetune replaces the head"
        )
    fitted = {name: value for name, value in weights.items() if not name.startswith("head.")}
    return fitted | {name: value for name, value in own.items() if name.startswith("head.")}


def _check_names(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse weights that are missing or that the model does not have."""
    problems = (("lacks", own.keys() - weights.keys()), ("has", weights.keys() - own.keys()))
    for verb, names in problems:
        if names:
            example = min(names)
            raise ValueError(
                f"checkpoint {verb} {len(names)} weights such as {example},"
                f" expected the {len(own)} of the model; class token, mixer or depth may differ"
            )


def _are_weights(found: Mapping[Any, Any]) -> bool:
    return all(isinstance(n, str) and isinstance(value, Tensor) for n, value in found.items())


def _bare(name: str) -> str:
    """Take the prefixes of torch's wrappers off a name."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while name.startswith(_IN_FRONT):
        name = name.removeprefix(_IN_FRONT)
    return name


def _prefix(weights: Mapping[str, Tensor], own: Collection[str], head: str) -> str:
    """Return the one prefix under which weights of a file have all names that a model's have.

    Raises:
        ValueError: If there are several, or weights have prefixes and none is of all.
    """
    known = set(own)
    needed = {name for name in known if not (head == "drop" and is_classifier(name))}
    found: dict[str, set[str]] = {}
    for name in weights:
        parts = name.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        end = next((end for end in ends if end in known), None)
        if end is not None:
            found.setdefault(name.removesuffix(end), set()).add(end)
    whole = [prefix for prefix, names in found.items() if needed <= names]
    if "" in whole:
        return ""
    if len(whole) > 1:
        raise ValueError(f"weights begin with {_listed(whole)}, expected one of these prefixes")
    if whole:
        return whole[0]
    most = max(found, key=lambda prefix: len(found[prefix]), default="")
    if "" in found and 2 * len(found[""]) >= len(found[most]):
        return ""  # another model of the same kind, whose weights can be compared one by one
    firsts = {f"{name.split('.')[0]}." if "." in name else name for name in weights}
    lacking = needed - found.get(most, set())
    hint = f"; {most} lacks {len(lacking)} such as {min(lacking)}" if most else ""
    raise ValueError(
        f"weights begin with {_listed(firsts)}, expected the {len(needed)} of the model, such as"
        f" {min(needed)}, behind one prefix or none{hint}"
    )


def _listed(prefixes: Collection[str]) -> str:
    first, more = sorted(prefixes)[:_SHOWN], len(prefixes) - _SHOWN
    return ", ".join(first) + (f" and {more} others" if more > 0 else "")
