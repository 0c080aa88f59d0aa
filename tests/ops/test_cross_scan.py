"""Orders of a grid, of what is left of it, and rows brought into them."""

from itertools import pairwise

import pytest
import torch

from fambav.ops.cross_scan import (
    MOVES,
    cross_merge,
    cross_scan,
    kept_order,
    select_rows,
    snake_order,
    to_scan_order,
    to_token_order,
)
from tests.golden import load

GOLDEN, _ = load("plainmamba")
GRIDS = ["4x4", "5x7", "4x6", "3x4", "1x5", "5x1", "14x14"]
CPU = torch.device("cpu")


def sides(name):
    height, width = map(int, name.split("x"))
    return height, width


@pytest.mark.parametrize("name", GRIDS)
def test_orders_and_moves_are_those_of_the_official_code(name):
    orders = snake_order(sides(name), CPU)
    assert torch.equal(orders.order[0], GOLDEN[f"order_{name}"].long())
    assert torch.equal(orders.move[0], GOLDEN[f"dirs_{name}"].long())


@pytest.mark.parametrize("name", [*GRIDS, "1x1", "2x3"])
def test_every_step_goes_to_a_neighbour_and_its_move_says_which(name):
    height, width = sides(name)
    orders = snake_order((height, width), CPU)
    walk = {"right": (0, 1), "left": (0, -1), "up": (-1, 0), "down": (1, 0)}
    for order, move in zip(orders.order[0].tolist(), orders.move[0].tolist(), strict=True):
        assert sorted(order) == list(range(height * width))
        assert MOVES[move[0]] == "start"
        for before, now, number in zip(order, order[1:], move[1:], strict=False):
            down, right = walk[MOVES[number]]
            row, column = divmod(before, width)
            assert divmod(now, width) == (row + down, column + right)


def test_ranks_undo_orders():
    orders = snake_order((3, 5), CPU)
    steps = torch.arange(15).expand(1, 4, -1)
    assert torch.equal(orders.rank.gather(2, orders.order), steps)


def test_orders_are_made_once_for_a_grid_and_serve_training_after_inference():
    with torch.inference_mode():
        first = snake_order((2, 9), CPU)
    assert snake_order((2, 9), CPU) is first
    x = torch.randn(1, 18, 3, requires_grad=True)
    cross_merge(cross_scan(x, first), first).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 4))


@pytest.fixture
def left():
    """Places of 7 tokens of 20 in any order, for 3 samples."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(20, generator=generator)[:7] for _ in range(3)])


def test_tokens_left_are_scanned_as_on_the_whole_grid(left):
    whole = snake_order((4, 5), CPU)
    orders = kept_order(whole, left)
    for sample, places in enumerate(left.tolist()):
        for direction, every in enumerate(whole.order[0].tolist()):
            steps = [step for step, place in enumerate(every) if place in places]
            order = orders.order[sample, direction]
            assert left[sample, order].tolist() == [every[step] for step in steps]
            moves = whole.move[0, direction, steps]
            assert torch.equal(orders.move[sample, direction], moves)
            gone = [now - before - 1 for before, now in pairwise(steps)]
            assert orders.skipped[sample, direction].tolist() == [0, *gone]
        assert left[sample, orders.raster[sample]].tolist() == sorted(places)
    assert torch.equal(orders.rank.gather(2, orders.order), torch.arange(7).expand(3, 4, -1))


def test_of_a_whole_grid_nothing_is_skipped():
    whole = snake_order((3, 4), CPU)
    orders = kept_order(whole, torch.arange(12).expand(2, -1))
    for of_all, of_left in zip(whole[:3], orders[:3], strict=True):
        assert torch.equal(of_all.expand_as(of_left), of_left)
    assert not orders.skipped.any()
    one = kept_order(whole, torch.tensor([[7]]))
    assert one.skipped.tolist() == [[[0]] * 4]


@pytest.mark.parametrize("whole", [True, False])
def test_spreading_and_collecting_are_transposes_with_right_gradients(whole, left):
    orders = snake_order((4, 5), CPU)
    orders = orders if whole else kept_order(orders, left)
    length = orders.order.shape[2]
    x = torch.randn(3, length, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 4, length, 2, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        (cross_scan(x, orders) * y).sum(), (x * cross_merge(y, orders)).sum()
    )
    expected = x[:, None].expand(-1, 4, -1, -1)
    index = orders.order.expand(3, -1, -1)[..., None].expand(-1, -1, -1, 2)
    assert torch.equal(cross_scan(x, orders), expected.gather(2, index))
    assert torch.autograd.gradcheck(lambda x: cross_scan(x, orders), x)
    assert torch.autograd.gradcheck(lambda y: cross_merge(y, orders), y)


def test_steps_and_tokens_undo_each_other(left):
    orders = kept_order(snake_order((4, 5), CPU), left)
    x = torch.randn(3, 4, 7, 2)
    there = to_scan_order(x, orders)
    assert torch.equal(to_token_order(there, orders), x)
    assert torch.equal(there[1, 2], x[1, 2, orders.order[1, 2]])
    torch.testing.assert_close(cross_merge(there, orders), x.sum(dim=1))


def test_rows_are_taken_of_each_sample_or_the_same_of_all():
    x = torch.randn(2, 5, 3)
    assert torch.equal(select_rows(x, torch.tensor([[4, 0], [1, 1]]))[1], x[1, [1, 1]])
    assert torch.equal(select_rows(x, torch.tensor([[4, 0]])), x[:, [4, 0]])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_traced_orders_are_not_kept():
    def doubled(x):
        return cross_merge(cross_scan(x, snake_order((2, 7), CPU)), snake_order((2, 7), CPU))

    x = torch.randn(1, 14, 2)
    traced = torch.compile(doubled, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(x), 4 * x)
    torch.testing.assert_close(doubled(x), 4 * x)
