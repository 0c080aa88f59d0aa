"""The description of a backbone: plain data, known before the first image."""

from __future__ import annotations

from typing import NamedTuple


class Stage(NamedTuple):
    """Layers at one resolution.

    Attributes:
        depth: Number of layers.
        width: Channels of a token.
        grid: Height and width of the grid of patches.
        tokens: Tokens before the first layer, class tokens included.
        directions: In how many directions a mixer scans.
        intermediates: Fields of `Intermediates` that a mixer can return.
    """

    depth: int
    width: int
    grid: tuple[int, int]
    tokens: int
    directions: int
    intermediates: frozenset[str]


class BackboneInfo(NamedTuple):
    """A model in figures.

    The properties are those of its only stage; a model of several has them stage by stage.

    Attributes:
        family: Kind of model, a key of `fambav.registry.FAMILIES`; published schedules are for one
            family.
        stages: From the image to the output.
        cls_index: Where the class tokens are before the first layer, from 0.
        unaligned: Why its scans cannot age their state over tokens that went; None if they can.
        needs_positions: Whether its mixers have to know where the kept tokens come from.
        staged: Whether its layers are named stage.layer, each counted from 1.
        prefix: What comes before the number of a layer in its name, such as "2." in a stage.
    """

    family: str
    stages: tuple[Stage, ...]
    cls_index: tuple[int, ...] = ()
    unaligned: str | None = None
    needs_positions: bool = False
    staged: bool = False
    prefix: str = ""

    @property
    def stage(self) -> Stage:
        """The only stage.

        Raises:
            ValueError: If there are several.
        """
        if len(self.stages) != 1:
            raise ValueError(f"{self.family} has {len(self.stages)} stages, expected one")
        return self.stages[0]

    def of_stage(self, number: int) -> BackboneInfo:
        """Return the layers of one stage, from 0, by themselves."""
        prefix = f"{number + 1}."
        return self._replace(stages=(self.stages[number],), staged=False, prefix=prefix)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.stage.depth

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.stage.width

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the grid of patches."""
        return self.stage.grid

    @property
    def tokens(self) -> int:
        """Tokens before the first layer, class tokens included."""
        return self.stage.tokens

    @property
    def directions(self) -> int:
        """In how many directions a mixer scans."""
        return self.stage.directions

    @property
    def intermediates(self) -> frozenset[str]:
        """Fields of `Intermediates` that a mixer can return."""
        return self.stage.intermediates
