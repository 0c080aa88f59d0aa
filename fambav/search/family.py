"""The plans of a family, from the least reduction to the most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fambav.reduction.schedule import parse_schedule, plan
from fambav.search.space import Counts, Space
from fambav.search.written import Family

_PERCENT = 100


class Level(NamedTuple):
    """One plan of a family.

    Attributes:
        name: The number in which it differs from the others.
        counts: Tokens removed at each layer.
    """

    name: str
    counts: Counts


def levels(family: Family, space: Space) -> list[Level]:
    """Return the plans that can be carried out, each removing more than the one before.

    Raises:
        ValueError: If a layer is not there, or no plan can be carried out.
    """
    found: dict[Counts, str] = {}
    for name, counts in _MEMBERS.get(family.kind, _strategy)(family, space):
        if any(counts) and space.fits(counts):
            found.setdefault(counts, name)
    if not found:
        raise ValueError(
            f"family is {family.told()!r}, expected one of which {space.method} can carry out a"
            " plan"
        )
    ordered = sorted(found, key=lambda counts: -space.reduction(counts).schedule.share)
    return [Level(found[counts], counts) for counts in ordered]


def _strategy(family: Family, space: Space) -> Iterator[tuple[str, Counts]]:
    layer, depth = int(family.rest) if family.rest else None, space.info.depth
    if layer is not None and not 1 <= layer <= depth:
        raise ValueError(f"family is {family.told()!r}, expected a layer from 1 to {depth}")
    for count in range(1, space.info.tokens):
        yield f"r {count}", plan(family.kind, depth=depth, count=count, layer=layer)


def _constant(family: Family, space: Space) -> Iterator[tuple[str, Counts]]:
    for count in range(1, space.info.tokens):
        yield f"r {count}", _read(f"r:{count}@{family.rest}", space)


def _keep(family: Family, space: Space) -> Iterator[tuple[str, Counts]]:
    patches = space.info.tokens - len(space.info.cls_index)
    for percent in range(_PERCENT - 1, 0, -1):
        if patches * (_PERCENT - percent) >= _PERCENT:  # else no patch goes
            share = percent / _PERCENT
            yield f"keep {share:g}", _read(f"keep:{share:g}@{family.rest}", space)


def _scaled(family: Family, space: Space) -> Iterator[tuple[str, Counts]]:
    """Yield a plan times the factors that change its largest count by one token."""
    counts = tuple(map(int, family.rest.split(",")))
    depth, most = space.info.depth, max(counts)
    if len(counts) != depth or not most:
        raise ValueError(
            f"family is {family.told()!r}, expected {depth} counts, one for each layer, not all 0"
        )
    for count in range(1, space.info.tokens):
        scaled = tuple((2 * each * count + most) // (2 * most) for each in counts)
        yield f"scale {count / most:.3g}", scaled


_MEMBERS = {"r": _constant, "keep": _keep, "scale": _scaled}


def _read(text: str, space: Space) -> Counts:
    return parse_schedule(text, space.info)
