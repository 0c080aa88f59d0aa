"""Stateless seeding: every random draw has a seed that is hashed from its purpose and counters.

    key(seed, "augment", epoch, index) -> 63 bits

No generator state is stored: a resumed run, or one with another number of workers or processes,
makes the same draws.
"""

from __future__ import annotations

import hashlib
from operator import index
from typing import SupportsIndex


def key(*parts: SupportsIndex | str) -> int:
    """Derive the seed of a draw.

    Args:
        parts: The run's seed, the purpose and the counters of the draw, in a fixed order.

    Returns:
        An integer in [0, 2**63), equal on every machine and in every version of Python.

    Raises:
        TypeError: If a part is neither an integer nor a string.
    """
    name = repr(tuple(part if isinstance(part, str) else index(part) for part in parts))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def seed_cpu(*parts: SupportsIndex | str) -> None:
    """Seed Python's, numpy's legacy and torch's CPU generator with a key.

    Cheap enough for every sample: torch.manual_seed visits every kind of device and takes a hundred
    times as long.

    Args:
        parts: As for `key`.
    """
    import random

    import numpy as np
    import torch

    seed = key(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def seed_all(*parts: SupportsIndex | str) -> None:
    """Seed the generators of `seed_cpu` and of every GPU.

    Args:
        parts: As for `key`.
    """
    import torch

    seed_cpu(*parts)
    torch.manual_seed(key(*parts))
