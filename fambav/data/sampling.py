"""Which sample goes where: every batch of a run as a function of its number.

    order of an epoch    permutation, each index repeated, cut
    window of update k   order[k G : (k + 1) G],  G = batch x world x accum
    shard v of V         window[v::V],  v = micro x world + rank,  V = world x accum

A run on several processes, or with several micro-batches to an update, therefore sees in each
update what one process with one large batch sees, and a run may start at any update.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from fambav.seeding import key

Key = tuple[int, int, int]
_ROUND = 256


def repeat_augmented(permutation: Tensor, *, repeats: int) -> Tensor:
    """Return the sample indices of one epoch, for repeated augmentation.

    Each index comes `repeats` times in a row, so that the copies, each augmented by itself, fall
    into the same update; the epoch keeps its length, rounded down to a multiple of 256, and so
    shows about 1 / repeats of the set.

    Args:
        permutation: Indices in random order, (count,), int64.
        repeats: 1 for no repeated augmentation; the published recipe takes 3.

    Returns:
        (count,) or, with repeats and from 256 samples on, (count // 256 * 256,), int64.

    Source: Hoffer et al., "Augment your batch", arXiv:1901.09335, in DeiT's order.  Ours keeps
    the samples of a set smaller than 256, of which the original's epoch has none.
    """
    if repeats == 1:
        return permutation
    kept = len(permutation) // _ROUND * _ROUND or len(permutation)
    return permutation.repeat_interleave(repeats)[:kept]


class TrainBatches(Sampler[list[Key]]):
    """The batches that one process sees from one update to the end of the run.

    Yields lists of (epoch, position in the epoch, sample index), one list for each micro-batch.

    Args:
        count: Samples in the set.
        batch_size: Samples in a micro-batch of one process.
        seed: Seed of the run.
        epochs: Epochs of the whole run.
        rank: Number of this process.
        world: Number of processes.
        accum: Micro-batches to an update.
        start_update: Updates that are done.
        repeats: Number of times in a row that each sample comes; see `repeat_augmented`.

    Raises:
        ValueError: If an epoch has not enough samples for one update.
    """

    def __init__(
        self,
        count: int,
        *,
        batch_size: int,
        seed: int,
        epochs: int,
        rank: int = 0,
        world: int = 1,
        accum: int = 1,
        start_update: int = 0,
        repeats: int = 1,
    ) -> None:
        self.count, self.seed, self.repeats = count, seed, repeats
        self.rank, self.world, self.accum = rank, world, accum
        self.window = batch_size * world * accum
        kept = len(repeat_augmented(torch.arange(count), repeats=repeats))
        self.updates_per_epoch = kept // self.window
        if self.updates_per_epoch == 0:
            raise ValueError(
                f"batch_size is {batch_size} (x {world} processes x {accum} micro-batches = "
                f"{self.window}), expected at most the {kept} samples of an epoch in all"
            )
        self.updates = range(start_update, epochs * self.updates_per_epoch)

    def __len__(self) -> int:
        """Return the number of remaining micro-batches."""
        return len(self.updates) * self.accum

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield the remaining micro-batches."""
        now, order = -1, []
        for update in self.updates:
            epoch, step = divmod(update, self.updates_per_epoch)
            if epoch != now:
                now, order = epoch, self.order(epoch).tolist()
            for micro in range(self.accum):
                positions = self._positions(step, micro, self.rank)
                yield [(epoch, position, order[position]) for position in positions]

    def indices(self, update: int) -> list[list[list[int]]]:
        """Return the sample indices of one update: by process, then by micro-batch."""
        epoch, step = divmod(update, self.updates_per_epoch)
        order = self.order(epoch).tolist()
        return [
            [
                [order[position] for position in self._positions(step, micro, rank)]
                for micro in range(self.accum)
            ]
            for rank in range(self.world)
        ]

    def _positions(self, step: int, micro: int, rank: int) -> range:
        start = step * self.window
        first = start + micro * self.world + rank
        return range(first, start + self.window, self.world * self.accum)

    def order(self, epoch: int) -> Tensor:
        """Return the sample indices of one epoch in the order of training, int64."""
        generator = torch.Generator().manual_seed(key(self.seed, "order", epoch))
        permutation = torch.randperm(self.count, generator=generator)
        return repeat_augmented(permutation, repeats=self.repeats)
