"""What a method can do, and how plans are brought to a budget."""

from dataclasses import replace

import pytest

from fambav.reduction import make_reduction
from fambav.search.space import Plan, SearchSpace
from tests.reduction.made import body
from tests.search.made import problem

SIZES = body(17, depth=4, cls_index=(8,), grid=(4, 4))


def test_a_plan_is_written_as_a_fusion_plan_is():
    assert Plan("ordered", (0, 3, 0, 2)).summary() == "2:3,4:2"
    assert Plan("ordered", (0, 0)).summary() == "every token kept"


def test_a_space_knows_what_its_method_can_do():
    space = SearchSpace(SIZES, "ordered")
    assert space.fits((8, 4, 2, 1)) and not space.fits((9, 0, 0, 0))
    assert not SearchSpace(SIZES, "storm").fits((1, 0, 0, 0))  # no grid is left
    assert SearchSpace(SIZES, "storm").fits((4, 0, 0, 0))


def test_a_space_hands_its_arguments_to_the_method():
    made = SearchSpace(SIZES, "ordered", scan="aligned", gap_policy="bias").reduction((4, 0, 0, 0))
    wanted = make_reduction(SIZES, "ordered", "list:4", scan="aligned", gap_policy="bias")
    assert (made.scan, made.gap_policy) == (wanted.scan, wanted.gap_policy) == ("aligned", "bias")
    assert not made.training


def test_what_a_model_cannot_do_is_refused_in_its_own_words():
    with pytest.raises(ValueError, match="gap_policy is 'bias', expected none unless"):
        SearchSpace(SIZES, "ordered", gap_policy="bias")
    with pytest.raises(ValueError, match="which reads gated of the mixer"):
        SearchSpace(body(17, depth=4, cls_index=(8,), intermediates=frozenset()), "evit")


def test_counts_are_lowered_from_the_first_layer_on_until_they_fit():
    task = problem((1, 1, 1), length=9)
    assert task.repair((4, 3, 5)) == (4, 3, 1)
    assert task.repair((20, 3, 5)) == (8, 0, 0)
    assert task.repair((1, 2, 3)) == (1, 2, 3)


def test_the_fewest_tokens_go_that_save_enough():
    task = problem((1, 1, 1), length=9)  # a token at layer 0 saves 3 of 27
    assert task.remove_more((0, 0, 0), 0, 3.5 / 27) == (2, 0, 0)
    assert task.remove_more((0, 0, 0), 2, 3.5 / 27) == (0, 0, 4)


def test_later_layers_make_room_for_earlier_ones():
    task = problem((1, 1, 1), length=9)
    assert task.remove_more((0, 0, 8), 0, 1.5 / 27) == (1, 0, 7)


def test_the_most_is_removed_where_nothing_saves_enough_and_none_where_nothing_saves():
    task = problem((1, 1, 1), length=9)
    assert task.remove_more((0, 0, 0), 2, 1.0) == (0, 0, 8)
    assert task.remove_more((8, 0, 0), 2, 0.1) is None


def test_what_is_left_of_the_budget_is_given_back_where_wanted():
    task = problem((1, 1, 1), length=9, share=18 / 27)
    assert task.use_slack((4, 0, 0), [0]) == (3, 0, 0)
    assert task.use_slack((3, 1, 1), [2, 1, 0]) == (3, 0, 0)


def cheapest(method):
    """The least plan of a method by its share of token-layers."""
    space = SearchSpace(SIZES, method)
    return replace(
        problem((1,) * 4, length=17),
        unreduced=space.unreduced,
        fits=space.fits,
        cost=lambda counts: space.reduction(counts).schedule.share,
    ).cheapest()


def test_the_least_plan_is_the_cheapest_of_all():
    assert cheapest("ordered") == (8, 4, 2, 1)


def test_a_layer_behind_whose_mixer_nothing_is_saved_keeps_its_tokens():
    assert cheapest("prune-aligned") == (15, 0, 0, 0)  # tokens go behind the mixer
