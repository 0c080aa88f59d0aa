"""Merging on the grid against loops, and which grids can follow."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fambav
import fambav.models
from fambav.layers import Tokens
from fambav.reduction import make_reducer, make_reduction
from tests.reduction.made import agree, body, reduce, some, twin_order

SHAPE = make_reducer("storm").grid_after


def test_the_grid_keeps_its_proportions_as_nearly_as_it_can():
    assert SHAPE((14, 14), 27) == (13, 13)
    assert SHAPE((13, 13), 25) == (12, 12)
    assert SHAPE((12, 12), 44) == (10, 10)
    assert SHAPE((10, 10), 19) == (9, 9)
    assert SHAPE((14, 14), 14) == (13, 14)
    assert SHAPE((6, 10), 20) == (5, 8)
    assert SHAPE((8, 4), 24) == (4, 2)
    assert SHAPE((1, 7), 3) == (1, 4)


@pytest.mark.parametrize(
    ("grid", "count", "message"),
    [
        ((14, 14), 29, "a number that makes of 14 x 14 patches a smaller grid, such as 28"),
        ((14, 14), 148, "such as 147"),
        ((1, 7), 4, "such as 3"),
        (None, 4, "none, since the patches form no grid"),
    ],
)
def test_a_number_that_leaves_no_grid_is_refused(grid, count, message):
    with pytest.raises(ValueError, match=message):
        SHAPE(grid, count)


def test_a_schedule_that_leaves_no_grid_is_refused_with_the_layer():
    sizes = body(196, depth=3, grid=(14, 14))
    with pytest.raises(ValueError, match=r"at layer 2 are 24, expected a number that makes of 13"):
        make_reduction(sizes, "storm", "list:27,24")
    with pytest.raises(ValueError, match="expected at most 56; layer 1 has 196"):
        make_reduction(sizes, "storm", 150)
    with pytest.raises(ValueError, match="grid is None, expected the one that the patches form"):
        reduce(some((), length=64), "storm", 15)


@pytest.mark.parametrize("grid", [(8, 8), (7, 9), (5, 6), (1, 9), (9, 1), (2, 2)])
def test_every_count_leaves_the_grid_that_was_foreseen(grid):
    method = make_reducer("storm")
    tokens = some((), length=grid[0] * grid[1], grid=grid)
    for count in range(1, grid[0] * grid[1]):
        try:
            height, width = method.grid_after(grid, count)
        except ValueError:
            continue
        assert count <= method.limit(grid[0] * grid[1], ())
        merged = reduce(tokens, "storm", count)
        assert merged.grid == (height, width)
        assert merged.x.shape[1] == height * width == grid[0] * grid[1] - count


def test_most_that_can_go_are_all_pairs_both_ways():
    merged = reduce(some((), length=64, grid=(8, 8)), "storm", 48)
    assert merged.size.tolist() == [[4] * 16] * 3
    square = [8 * row + column for row in (0, 1) for column in (0, 1)]
    assert merged.source[:, square].tolist() == [[0] * 4] * 3


def test_tokens_stay_in_their_row_and_column_but_for_a_place():
    """A token is one of the pairs from which its row and column can come."""
    merged = reduce(some((), length=64, grid=(8, 8)), "storm", 15)
    for row in merged.source.tolist():
        for place, now in enumerate(row):
            for was, here in zip(divmod(place, 8), divmod(now, 7), strict=True):
                assert here in (was, was - 1)


def test_alike_neighbours_merge_first():
    x = torch.arange(16.0).square().view(1, 16, 1)
    x[0, 6], x[0, 13] = x[0, 7], x[0, 12]
    tokens = Tokens.start(x, cls_index=(), grid=(2, 8), trace=True)
    source = reduce(tokens, "storm", 2, metric="hidden").source[0].tolist()
    assert source[6] == source[7]
    assert source[12] == source[13]


def test_merges_are_shared_among_windows():
    x = torch.arange(20.0).square().flip(0).view(1, 20, 1)  # alike at the end
    tokens = Tokens.start(x, cls_index=(), grid=(1, 20), trace=True)
    for window, expected in ((10, [12, 14, 16, 18]), (5, [6, 8, 16, 18])):
        how = dict(metric="hidden", window=window)
        source = reduce(tokens, "storm", 4, **how).source[0].tolist()
        assert [n for n in range(0, 20, 2) if source[n] == source[n + 1]] == expected


def test_it_loses_the_order_of_the_scan():
    with pytest.raises(ValueError, match="expected 'compact' with storm, which loses order"):
        make_reduction(body(64, grid=(8, 8)), "storm", 15, scan="masked")


@st.composite
def grids(draw):
    """Features of few distinct values on a small grid, and a smaller grid."""
    height, width = draw(st.integers(1, 6)), draw(st.integers(2, 6))
    numbers = st.integers(-3, 3)
    row = st.tuples(numbers, numbers, numbers)
    size = height * width
    rows = draw(st.lists(row, min_size=size, max_size=size))
    counts = [
        size - h * w
        for h in range(height - height // 2, height + 1)
        for w in range(width - width // 2, width + 1)
    ]
    count = draw(st.sampled_from([count for count in counts if count]))
    return (height, width), rows, count


@settings(deadline=None, derandomize=True, database=None)
@given(
    grids(),
    st.sampled_from(["none", "head", "middle", "double"]),
    st.sampled_from(["exact", "proportional"]),
    st.integers(1, 3),
    st.sampled_from(["by size", "plain", "sum"]),
)
def test_the_merge_is_what_loops_over_a_list_would_do(drawn, cls, policy, window, kind):
    grid, rows, count = drawn
    patches = len(rows)
    places = dict(none=(), head=(0,), middle=(patches // 2,), double=(0, patches + 1))[cls]
    length = patches + len(places)
    for place in places:
        rows.insert(place, (9, 9, 9))
    policy = policy if places else "exact"
    x = torch.tensor([rows], dtype=torch.float32)
    tokens = Tokens.start(x, cls_index=places, grid=grid, trace=True)
    tokens = tokens._replace(size=torch.arange(1.0, length + 1)[None] % 3 + 1)
    how = dict(window=window, weighted=kind != "plain", class_policy=policy)
    how["merge"] = "sum" if kind == "sum" else "mean"
    merged = reduce(tokens, "storm", count, **how)
    weights = {"by size": tokens.size[0].tolist(), "plain": [1.0] * length, "sum": None}
    groups = by_hand(rows, places, grid, SHAPE(grid, count), window, weights[kind])
    agree(
        merged,
        tokens,
        twin_order(groups, places, policy, length),
        tokens.size if kind == "by size" else None,
        summed=kind == "sum",
    )


def by_hand(rows, places, grid, smaller, window, weight):
    """Groups of places in their new order, the absorbing one first, written without tensors."""
    free = iter([p for p in range(len(rows)) if p not in places])
    table = [[[next(free)] for _ in range(grid[1])] for _ in range(grid[0])]
    table = [shorter(line, grid[1] - smaller[1], rows, window, weight) for line in table]
    turned = [list(column) for column in zip(*table, strict=True)]
    turned = [shorter(line, grid[0] - smaller[0], rows, window, weight) for line in turned]
    out = [group for line in zip(*turned, strict=True) for group in line]
    before = [sum(group[0] < place for group in out) for place in places]
    for n, (place, ahead) in enumerate(zip(places, before, strict=True)):
        out.insert(ahead + n, [place])
    return out


def shorter(line, count, rows, window, weight):
    """Merge pairs of groups of a line."""
    pairs = len(line) // 2
    starts = range(0, pairs, window)
    sizes = [min(window, pairs - start) for start in starts]
    exact = [count * size / pairs if pairs else 0 for size in sizes]
    shares = [int(share + 1e-9) for share in exact]
    rest = sorted(range(len(sizes)), key=lambda n: (round(shares[n] - exact[n], 9), n))
    for n in rest[: count - sum(shares)]:
        shares[n] += 1
    gone = []
    for start, size, share in zip(starts, sizes, shares, strict=True):
        here = range(start, start + size)
        gone += sorted(here, key=lambda n: (apart(line, n, rows, weight), n))[:share]
    out = []
    for n, group in enumerate(line):
        if n // 2 in gone and n // 2 < pairs:
            if n % 2:
                out.append(group + line[n - 1])
        else:
            out.append(group)
    return out


def apart(line, n, rows, weight):
    """Sum of absolute differences between a pair's means (sums without weights), in float32."""
    means = []
    for group in line[2 * n : 2 * n + 2]:
        total = sum(weight[p] for p in group) if weight else 1.0
        each = [(weight[p] if weight else 1.0, rows[p]) for p in group]
        means.append([sum(w * row[d] for w, row in each) / total for d in range(3)])
    return round(sum(abs(a - b) for a, b in zip(*means, strict=True)), 4)


def test_a_sum_is_that_of_both_streams():
    tokens = some((), length=64, grid=(8, 8))
    tokens = tokens._replace(residual=2 * tokens.x)
    whole, mean = (reduce(tokens, "storm", 48, merge=kind) for kind in ("sum", "mean"))
    again = tokens.x.new_zeros(whole.x.shape).scatter_add(
        1, whole.source[..., None].expand_as(tokens.x), tokens.x
    )
    torch.testing.assert_close(whole.x, again)
    torch.testing.assert_close(whole.residual, 2 * again)
    assert whole.size.equal(mean.size)


@pytest.mark.parametrize(("depth", "known"), [(36, True), (24, True), (12, False)])
def test_the_published_schedule_is_that_of_the_code(depth, known):
    sizes = body(196, depth=depth, grid=(14, 14), family="plainmamba")
    assert (make_reducer("storm").published(sizes) is not None) == known
    if known:
        lengths = make_reduction(sizes, "storm").schedule.lengths
        first = [196] * 5 + [169] * 6 + [144] * 6 + [100] * 6
        assert list(lengths) == first + [81] * (depth - len(first))


def test_the_published_schedule_runs_on_the_grids_that_it_leaves():
    torch.manual_seed(0)
    sizes = dict(img_size=224, patch_size=16, depth=24, dim=32, num_classes=5)
    model = fambav.reduce(timm.create_model("plainmamba_micro", **sizes).eval(), "storm")
    seen = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _module, _args, tokens: seen.append(tokens.grid))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).isfinite().all()
    sides = [14] * 4 + [13] * 6 + [12] * 6 + [10] * 6 + [9] * 2
    assert seen == [(side, side) for side in sides]


def test_models_of_both_kinds_run_and_learn_with_it():
    torch.manual_seed(0)
    for name in ("vim_micro", "plainmamba_micro"):
        model = timm.create_model(name, num_classes=5)
        (height, width), length = model.info.grid, model.info.tokens
        first = height * width - (height - 1) * (width - 1)
        fambav.reduce(model, "storm", f"r:{first}@2")
        assert model.schedule.final == length - first
        logits = model(torch.randn(2, 3, *model.img_size))
        assert logits.shape == (2, 5)
        logits.square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
