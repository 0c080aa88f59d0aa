"""Steps from every token to a budget."""

from itertools import product

import pytest

from fambav.search.greedy import greedy
from tests.search.made import problem


def brute_force(task):
    plans = [c for c in product(range(task.length), repeat=task.depth) if task.meets(c)]
    return min(zip(task.losses(plans), plans, strict=True))


@pytest.mark.parametrize("weights", [(3, 2, 1), (1, 2, 3), (5, 1, 4), (1, 1, 1)])
@pytest.mark.parametrize("gone", [3, 5, 8])
def test_greedy_finds_what_brute_force_finds_where_losses_add_up(weights, gone):
    # Where losses are convex and tokens save alike, steps of one token lead to the best plan.
    task = problem(weights, share=(27 - gone) / 27, power=2, savings=(1, 1, 1))
    best, _ = brute_force(task)
    found = greedy(task, steps=gone)[-1]
    assert task.meets(found) and task.losses([found]) == [best]


def test_greedy_weighs_a_loss_by_what_it_saves():
    # A token saves 3, 2 and 1, so that per token-layer the first layer loses least.
    task = problem((2, 2, 2), length=9, share=21 / 27, power=1)
    assert greedy(task, steps=2)[-1] == brute_force(task)[1] == (2, 0, 0)


def test_each_step_costs_less_until_the_budget_is_met():
    task = problem((3, 2, 1, 2), length=12, share=0.5)
    *way, last = greedy(task, steps=16)
    costs = [task.cost(counts) for counts in way]
    assert costs == sorted(costs, reverse=True) and way[0] == (0, 0, 0, 0)
    assert all(cost > 0.5 for cost in costs) and task.cost(last) <= 0.5


def test_only_the_steps_that_look_best_are_tried():
    seen = []  # steps at layer 0 look harmless
    task = problem((1, 1, 1, 1), length=12, share=0.8, seen=seen)
    found = greedy(
        task, lambda _, after: after[0] == 0, steps=9, evaluated=1
    )  # layer 0 looks harmless
    assert found[-1][1:] == (0, 0, 0)
    assert all(not any(counts[1:]) for counts in seen)


def test_what_only_the_cheapest_plan_meets_is_found():
    task = problem((1, 50, 50), length=9, share=3 / 27)
    assert greedy(task, steps=4)[-1] == (8, 0, 0)


def test_a_budget_that_nothing_meets_is_refused():
    with pytest.raises(ValueError, match=r"budget is 0.05, expected 0.11"):
        greedy(problem((1, 1, 1), length=9, share=0.05), steps=5)
