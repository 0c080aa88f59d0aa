"""fambav doctor."""

from __future__ import annotations

import os
import platform
from importlib import metadata

from fambav.commands.parser import Parser


def run(words: list[str]) -> None:
    """Print versions, devices and which implementations can run here."""
    Parser("fambav doctor", description=run.__doc__).parse_args(words)
    import torch

    from fambav import ops, timm_compat

    print(f"python      {platform.python_version()} on {platform.platform()}")
    for name in ("torch", "torchvision", "timm", "pillow", "triton", "numba"):
        note = f" ({timm_compat.TORCHVISION})" if name == "torchvision" else ""
        print(f"{name:<11} {_version(name)}{note}")
    print(f"cpu         {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        print(f"cuda:{index}      {torch.cuda.get_device_name(index)}, {memory:.0f} GiB")
    if not torch.cuda.device_count():
        print(f"cuda        none (torch was built {_built(torch.version.cuda)})")
    if timm_compat.TORCHVISION == "shimmed":
        print("note: here `import timm` fails by itself; put `import fambav.models` before it")
    for op, backend, reason in ops.backends():
        print(f"{op:<16} {backend:<10} {'runs here' if reason is None else f'no: {reason}'}")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _built(cuda: str | None) -> str:
    return "without CUDA" if cuda is None else f"for CUDA {cuda}"
