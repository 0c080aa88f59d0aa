"""Better plans at the same cost."""

from fambav.search.evolution import evolve
from tests.search.made import problem

WEIGHTS = (6, 1, 3, 2)
START = (4, 0, 0, 0)


def test_evolution_improves_plans_and_stays_within_the_budget():
    seen = []
    task = problem(WEIGHTS, length=12, share=0.7, seen=seen)
    found = evolve(task, [(5, 0, 0, 0)], seed=0, trials=100)
    assert all(task.meets(counts) for counts in seen)
    assert task.losses([found])[0] < 0.7 * task.losses([(5, 0, 0, 0)])[0]


def test_evolution_is_never_worse_than_its_seeds():
    task = problem(WEIGHTS, length=12, share=0.7)
    seeds = [(5, 0, 0, 0), (0, 5, 0, 0), (0, 4, 2, 0)]
    best = min(seeds, key=lambda counts: task.losses([counts]))
    for trials in (0, 1, 5):
        found = evolve(task, seeds, seed=3, trials=trials)
        assert task.losses([found]) <= task.losses([best])


def test_the_same_seed_tries_the_same_plans_and_another_others():
    tried = []
    for seed in (0, 0, 1):
        tried.append([])
        task = problem(WEIGHTS, length=12, share=0.7, seen=tried[-1])
        evolve(task, [(5, 0, 0, 0)], seed=seed, trials=30)
    assert tried[0] == tried[1] != tried[2]


def test_no_more_plans_are_tried_than_allowed():
    seen = []
    evolve(problem(WEIGHTS, length=12, share=0.7, seen=seen), [(5, 0, 0, 0)], seed=0, trials=17)
    assert len(set(seen)) <= 1 + 17


def test_a_space_of_one_plan_ends_the_search():
    task = problem((1, 50), length=3, share=2 / 6)  # only (2, 0) is cheap enough
    assert evolve(task, [(2, 0)], seed=0, trials=1000) == (2, 0)
