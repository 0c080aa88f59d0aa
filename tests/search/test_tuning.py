"""Families of plans, and the boundary in them."""

import pytest

from fambav.search.parsing import parse_family
from fambav.search.space import SearchSpace
from fambav.search.tuning import bisect, members_of
from tests.reduction.made import body

SPACE = SearchSpace(body(17, depth=4, cls_index=(8,), grid=(4, 4)), "ordered")


def counting(accept):
    tested = []
    return tested, lambda place: tested.append(place) or accept(place)


@pytest.mark.parametrize("boundary", [0, 1, 37, 62, 99])
def test_bisection_finds_the_boundary_with_few_evaluations(boundary):
    tested, holds = counting(lambda place: place <= boundary)
    assert bisect(100, holds) == (boundary, True)
    assert len(tested) == len(set(tested)) <= 7 + 3
    assert {boundary - 1, boundary + 1, boundary + 2} & set(range(100)) <= set(tested)


def test_nothing_holds_where_the_smallest_does_not():
    tested, holds = counting(lambda _: False)
    assert bisect(50, holds)[0] is None
    assert {0, 1} <= set(tested)


def test_a_plan_that_holds_again_behind_the_boundary_takes_its_place():
    _, holds = counting(lambda place: place in (0, 1, 2, 4, 6))
    assert bisect(9, holds) == (6, False)


@pytest.mark.parametrize(
    ("family", "first", "last"),
    [
        ("all", ("r 1", (1, 1, 1, 1)), ("r 3", (3, 3, 3, 3))),
        ("upper:3", ("r 1", (0, 0, 1, 1)), ("r 5", (0, 0, 5, 5))),
        ("lower:2", ("r 1", (1, 1, 0, 0)), ("r 5", (5, 5, 0, 0))),
        ("r@2,4", ("r 1", (0, 1, 0, 1)), ("r 5", (0, 5, 0, 5))),
        ("keep@2", ("keep 0.93", (0, 1, 0, 0)), ("keep 0.5", (0, 8, 0, 0))),
        ("scale:0,2,4,0", ("scale 0.25", (0, 1, 1, 0)), ("scale 1.5", (0, 3, 6, 0))),
    ],
)
def test_a_family_goes_from_the_least_reduction_to_the_most(family, first, last):
    found = members_of(parse_family(family), SPACE)
    assert (found[0], found[-1]) == (first, last)
    shares = [SPACE.reduction(counts).schedule.share for _, counts in found]
    assert shares == sorted(set(shares), reverse=True)


@pytest.mark.parametrize("family", ["upper:5", "lower:0", "r@5", "keep@9", "scale:1,2", "scale:0"])
def test_a_family_that_the_model_has_not_is_refused(family):
    with pytest.raises(ValueError, match="expected"):
        members_of(parse_family(family), SPACE)
