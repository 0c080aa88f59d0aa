"""What a reduction has to know of a model."""

from __future__ import annotations

from typing import NamedTuple


class Body(NamedTuple):
    """The sizes of a model, and what its mixers can tell and do.

    Attributes:
        family: Kind of model, such as "vim"; published schedules are for one family.
        dim: Width of a token.
        depth: Number of layers.
        length: Tokens before the first layer, class tokens included.
        class_places: Where the class tokens stand then, from 0.
        grid: Height and width of the grid of patches then.
        signals: Fields of `Signals` that its mixers can fill in.
        directions: In how many directions they scan.
        unaligned: Why its scans cannot age their state over tokens that went; None if they can.
        scattered: Whether its mixers must be told where the tokens that are left come from.
    """

    family: str
    dim: int
    depth: int
    length: int
    class_places: tuple[int, ...]
    grid: tuple[int, int]
    signals: frozenset[str]
    directions: int = 2
    unaligned: str | None = None
    scattered: bool = False
