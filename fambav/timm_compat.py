"""Imports of timm and torchvision, with workarounds; no other module imports them directly.

PyPI's torchvision is linked against CUDA.  With a CPU build of torch its native library does not
load, its operators are not defined, and `import torchvision` fails on the first fake kernel that it
registers for one of them, and `import timm` with it.  Declaring the two operators beforehand
suffices.  Where the native library loads, nothing is changed.

Pillow 13 raises on `posterize` with 0 bits, which RandAugment draws about once in a thousand
images; it is patched to return a black image, as older versions do.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_POSTERIZE = ("Posterize", "PosterizeIncreasing", "PosterizeOriginal")
_kept: list[torch.library.Library] = []  # a Library removes its definitions when it is collected


def prepare_torchvision() -> str:
    """Make `import torchvision` possible; call before the first one.

    Returns:
        "native" if torchvision's own library loads (or torchvision is imported already), "shimmed"
        if its operators had to be declared, "absent" if torchvision is not installed.
    """
    if "torchvision" in sys.modules:
        return "shimmed" if _kept else "native"
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return "absent"
    for library in sorted(Path(spec.origin).parent.glob("_C*")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return "native"
    if not _kept:
        shim = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            shim.define(schema)
        _kept.append(shim)
    return "shimmed"


def _posterize(original: Callable[..., Any], image: Any, bits: int, **options: Any) -> Any:
    return image.point(lambda _: 0) if bits <= 0 else original(image, bits, **options)


def guard_posterize(operations: dict[str, Any]) -> None:
    """Patch the posterize operations to return a black image for 0 bits.

    Args:
        operations: timm's table of augmentations; changed in place, once.
    """
    for name in _POSTERIZE:
        if getattr(operations[name], "func", None) is not _posterize:
            operations[name] = partial(_posterize, operations[name])


TORCHVISION: Final = prepare_torchvision()


import timm  # noqa: E402  after the shim
import timm.data  # noqa: E402  after the shim
import timm.models  # noqa: E402  after the shim
import timm.optim  # noqa: E402  after the shim
import timm.utils  # noqa: E402  after the shim
import torchvision  # noqa: E402  after the shim
import torchvision.datasets  # noqa: E402  after the shim
import torchvision.models.detection  # noqa: E402  after the shim
import torchvision.ops  # noqa: E402  after the shim
import torchvision.transforms  # noqa: E402  after the shim
import torchvision.transforms.v2.functional  # noqa: E402  after the shim

guard_posterize(timm.data.auto_augment.NAME_TO_OP)

__all__ = ["TORCHVISION", "guard_posterize", "prepare_torchvision", "timm", "torchvision"]
