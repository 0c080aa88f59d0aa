"""Random numbers as functions of what they are for, never of what was drawn before.

    key(seed, "augment", epoch, position) -> 63 bits

No random state is stored anywhere: a resumed run, another number of workers or another number of
processes makes the same draws, because each draw is seeded by its own name.
"""

from __future__ import annotations

import hashlib
from operator import index
from typing import SupportsIndex


def key(*parts: SupportsIndex | str) -> int:
    """Hash the name of a draw to a seed.

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

    Cheap enough for every sample: torch.manual_seed looks at every kind of device and takes a
    hundred times as long.

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
    """Seed what `seed_cpu` seeds and the generators of every GPU.

    Args:
        parts: As for `key`.
    """
    import torch

    seed_cpu(*parts)
    torch.manual_seed(key(*parts))
