"""Vision Mamba training made fast by cross-layer token fusion."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what needs torch at its first use, so that `import fambav` stays light."""
    if name == "from_pretrained":
        from fambav.training import from_pretrained

        return from_pretrained
    if name == "composed":
        from fambav.ops import composed

        return composed
    if name == "reduce":
        from fambav.reduction import reduce

        return reduce
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
