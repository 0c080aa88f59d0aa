"""Samples that cannot be read: how many there may be, and what takes their place."""

from __future__ import annotations

import torch
from PIL import Image

from fambav.data.arrays import DataError, Samples

SHARE = 0.01  # of a set


class LeftOutError(DataError):
    """A sample cannot be read, and the user does not mind."""


class Tolerant:
    """Samples of which a few may be unreadable.

    Marks lie in shared memory, so that loader processes count together.

    Args:
        samples: What to read from.
        replacing: Whether the next readable sample takes the place of one that is not, as in
            training; in evaluation it is left out.
    """

    def __init__(self, samples: Samples, *, replacing: bool) -> None:
        self.samples, self.replacing = samples, replacing
        self._bad = torch.zeros(len(samples), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> tuple[Image.Image, int]:
        """Return one image in RGB and its label.

        Raises:
            LeftOutError: If it cannot be read and nothing takes its place.
            DataError: If more than one in a hundred cannot be read.
        """
        while True:
            try:
                return self.samples[place]
            except DataError as error:
                self._mark(place, error)
                if not self.replacing:
                    raise LeftOutError(str(error)) from error
                place = (place + 1) % len(self)

    def count(self) -> int:
        """Return how many samples have turned out to be unreadable."""
        return int(self._bad.sum())

    def _mark(self, place: int, error: DataError) -> None:
        self._bad[place] = 1
        if self.count() > SHARE * len(self):
            raise DataError(
                f"{self.count()} of {len(self)} samples cannot be read, expected at most "
                f"{100 * SHARE:g}% with --on-bad-image skip; the last: {error}"
            )
