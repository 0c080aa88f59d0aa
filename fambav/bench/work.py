"""How much a block has to do at least: bytes, products, exponentials and steps of the scan.

Every tensor is read once and written once by each kernel that a fused block consists of.  Counted
for the bidirectional mixer: inner width E, state N, rank R of dt, two directions.
"""

from __future__ import annotations

from typing import NamedTuple, cast

from fambav.layers import Block, Mamba
from fambav.models import Vim

WIDE = 4  # bytes of a number of the residual stream and of the state
KEPT_EVERY = 64  # tokens from one state that is kept for the backward pass to the next
ADAMW = 28  # bytes for each weight: read and write weight and both moments, read the gradient


class Shape(NamedTuple):
    """Sizes of a block.

    Attributes:
        batch, length: Sequences and tokens of each.
        dim, inner: Width of a token outside and inside the mixer.
        state: Numbers of state for each channel.
        rank: Width of dt.
        taps: Length of the convolution.
        bytes: Of a stored number.
    """

    batch: int
    length: int
    dim: int
    inner: int
    state: int
    rank: int
    taps: int
    bytes: int

    @classmethod
    def of(cls, net: Vim, *, batch: int, length: int, bytes_: int) -> Shape:
        """Return the sizes of a model's blocks."""
        mixer = cast(Mamba, cast(Block, net.layers[0]).mixer)
        rank, state, _ = mixer.splits
        inner, _, taps = mixer.conv1d.weight.shape
        return cls(batch, length, net.dim, inner, state, rank, taps, bytes_)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return self.batch * self.length


class Work(NamedTuple):
    """What one kernel has to do at least.

    Attributes:
        bytes: Read and written.
        exps: Exponentials and logarithms.
        steps: State-steps, one state number of one channel at one token.
        flops: Of matrix products.
    """

    bytes: float
    exps: float = 0
    steps: float = 0
    flops: float = 0


def kernels(s: Shape) -> dict[str, Work]:
    """Return what the kernels of a block do that are no matrix products, each run once."""
    inner = s.tokens * s.inner * s.bytes
    narrow, wide = s.tokens * s.dim * s.bytes, s.tokens * s.dim * WIDE
    channels = s.tokens * s.inner
    steps = 2 * channels * s.state
    BC = 2 * s.tokens * 2 * s.state * s.bytes
    kept = _kept(s)
    scale = s.tokens * WIDE
    return {
        "scan_forward": Work(6 * inner + BC + kept, steps + 4 * channels, steps),
        "scan_backward": Work(9 * inner + 2 * BC + kept, steps + 6 * channels, steps),
        "conv_forward": Work(3 * inner, 2 * channels),
        "conv_backward": Work(4 * inner, 2 * channels),
        "gate_forward": Work(5 * inner, channels),
        "gate_backward": Work(5 * inner, channels),
        "norm_forward": Work(2 * (narrow + wide) + scale),
        "norm_backward": Work(2 * narrow + 3 * wide + scale),
    }


def products(s: Shape) -> dict[str, Work]:
    """Return what the matrix products of a block do, forward and backward together."""
    inner, narrow = s.tokens * s.inner * s.bytes, s.tokens * s.dim * s.bytes
    rows = 2 * s.tokens * (s.rank + 2 * s.state) * s.bytes
    dt = 2 * s.tokens * s.rank * s.bytes

    def both(given: float, made: float, weights: float, *, again: bool = False) -> Work:
        """Count a product, its two gradients, and the product once more if it is not kept."""
        times = 4 if again else 3
        return Work(times * (given + made), flops=2 * times * s.tokens * weights)

    return {
        "in_proj": both(narrow, 2 * inner, 2 * s.dim * s.inner),
        "x_proj": both(2 * inner, rows, 2 * s.inner * (s.rank + 2 * s.state)),
        "dt_proj": both(dt, 2 * inner, 2 * s.rank * s.inner, again=True),
        "out_proj": both(inner, narrow, s.inner * s.dim),
    }


def merging(s: Shape, count: int) -> Work:
    """Return what replacing groups by their means does to both streams, forward and backward."""
    tokens = s.tokens + s.batch * (s.length - count)
    return Work(2 * tokens * s.dim * (s.bytes + WIDE))


def block(s: Shape) -> dict[str, tuple[int, Work]]:
    """Return all kernels of a block, forward and backward, with how often each runs.

    The backward pass convolves again and gates again, since neither result is kept.
    """
    twice = ("conv_forward", "gate_forward")
    found = {name: (2 if name in twice else 1, work) for name, work in kernels(s).items()}
    return found | {name: (1, work) for name, work in products(s).items()}


def mixing(s: Shape, *, kept: bool) -> float:
    """Return the bytes of a mixer between in_proj and its result, forward.

    Args:
        s: Sizes.
        kept: Whether states and the sum of both scans are written for a backward pass.
    """
    found, made = kernels(s), products(s)
    names = ("scan_forward", "conv_forward", "gate_forward")
    total = sum(found[name].bytes for name in names) + _once(made)
    return total if kept else total - _kept(s) - s.tokens * s.inner * s.bytes


def mixing_backward(s: Shape) -> float:
    """Return the bytes of a mixer's backward pass, as far as `mixing` goes."""
    found, made = kernels(s), products(s)
    names = ("scan_backward", "conv_backward", "gate_backward", "conv_forward")
    both = sum(made[name].bytes for name in _MIXED)
    return sum(found[name].bytes for name in names) + both - _once(made)


_MIXED = {"x_proj": 3, "dt_proj": 4, "out_proj": 3}  # products, and how often each is made


def _once(made: dict[str, Work]) -> float:
    """Bytes of one forward pass of the products inside."""
    return sum(made[name].bytes / times for name, times in _MIXED.items())


def _kept(s: Shape) -> int:
    """Bytes of the states that are kept for the backward pass."""
    return 2 * s.batch * -(-s.length // KEPT_EVERY) * s.inner * s.state * WIDE
