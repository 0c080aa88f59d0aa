"""What merging does to tokens, whatever chose the groups."""

import pytest
import torch

from fambav.layers import Tokens
from fambav.reduction import Reducer, Reduction, Schedule, Selection, make_reducer, merge
from fambav.registry import METHODS, REDUCERS
from tests.reduction.made import body, reduce, reducing


class Neighbours(Reducer):
    """Folds the first `count` tokens at even places into their right neighbours."""

    def select(self, tokens, count):
        every = torch.arange(tokens.x.shape[1]).expand(len(tokens.x), -1)
        source, rest = every[:, 0 : 2 * count : 2], every[:, 2 * count :]
        target = source + 1
        return Selection(torch.cat((target, rest), 1), source, target)

    @staticmethod
    def limit(length, cls_index):
        return length // 2 - len(cls_index)


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    start = Tokens.start(torch.randn(2, 6, 3), cls_index=(5,), trace=True)
    return start._replace(residual=torch.randn(2, 6, 3))


@pytest.fixture
def selection():
    """Fold 0 and 4 into 1, and 2 into 3 in one sample; 2, 4 and 0 into 3 in the other."""
    return Selection(
        keep=torch.tensor([[1, 3, 5], [1, 3, 5]]),
        source=torch.tensor([[0, 4, 2], [2, 4, 0]]),
        target=torch.tensor([[1, 1, 3], [3, 3, 3]]),
    )


def test_groups_become_their_weighted_means(tokens, selection):
    weight = torch.tensor([[1.0, 2, 3, 4, 5, 6], [6.0, 5, 4, 3, 2, 1]])
    merged = merge(tokens._replace(size=weight), selection, weight)
    for got, x in ((merged.x, tokens.x), (merged.residual, tokens.residual)):
        torch.testing.assert_close(got[0, 0], (x[0, 0] + 2 * x[0, 1] + 5 * x[0, 4]) / 8)
        torch.testing.assert_close(got[0, 1], (3 * x[0, 2] + 4 * x[0, 3]) / 7)
        together = 6 * x[1, 0] + 4 * x[1, 2] + 3 * x[1, 3] + 2 * x[1, 4]
        torch.testing.assert_close(got[1, 1], together / 15)
    assert merged.size.tolist() == [[8, 7, 6], [5, 15, 1]]


def test_places_sizes_and_sources_follow_the_groups(tokens, selection):
    merged = merge(tokens, selection, torch.ones(2, 6))
    assert merged.size.tolist() == [[3, 2, 1], [1, 4, 1]]
    assert merged.position.tolist() == [[1, 3, 5], [1, 3, 5]]
    assert merged.cls_index.tolist() == [[2], [2]]
    assert merged.source.tolist() == [[0, 0, 1, 1, 0, 2], [1, 0, 1, 1, 1, 2]]


def test_a_token_without_sources_is_unchanged_to_the_last_bit(tokens, selection):
    merged = merge(tokens, selection, torch.tensor([3.0, 7, 3, 7, 3, 7]).expand(2, -1))
    assert torch.equal(merged.x[:, 2], tokens.x[:, 5])
    assert torch.equal(merged.x[1, 0], tokens.x[1, 1])
    assert torch.equal(merged.residual[1, 0], tokens.residual[1, 1])


def test_gradients_equal_finite_differences(tokens, selection):
    weight = torch.tensor([[1.0, 2, 3, 4, 5, 6], [6.0, 5, 4, 3, 2, 1]])

    def streams(x, residual):
        merged = merge(tokens._replace(x=x, residual=residual), selection, weight)
        return merged.x, merged.residual

    inputs = [t.double().requires_grad_() for t in (tokens.x, tokens.residual)]
    assert torch.autograd.gradcheck(streams, inputs)


def test_tokens_before_the_first_sum_have_no_residual_to_merge(tokens, selection):
    merged = merge(tokens._replace(residual=None), selection, torch.ones(2, 6))
    assert merged.residual is None
    assert merged.x.shape == (2, 3, 3)


def test_nothing_is_traced_unless_asked(tokens, selection):
    assert merge(tokens._replace(source=None), selection, torch.ones(2, 6)).source is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_averaged_in_float32_and_each_stream_keeps_its_type(
    tokens, selection, dtype
):
    short = tokens._replace(x=tokens.x.to(dtype).requires_grad_())
    merged = merge(short, selection, torch.ones(2, 6))
    wide = merge(tokens._replace(x=short.x.detach().float()), selection, torch.ones(2, 6))
    assert merged.x.dtype == dtype
    assert merged.residual.dtype == merged.size.dtype == torch.float32
    assert torch.equal(merged.x, wide.x.to(dtype))
    merged.x.float().sum().backward()
    assert short.x.grad.dtype == dtype


def test_double_precision_is_kept(tokens, selection):
    wide = tokens._replace(x=tokens.x.double(), residual=tokens.residual.double())
    merged = merge(wide, selection, torch.ones(2, 6))
    assert (merged.x[0, 0] - wide.x[0, [0, 1, 4]].mean(0)).abs().max() < 1e-15


def test_backward_keeps_no_copy_of_the_features():
    torch.manual_seed(0)
    x = torch.randn(4, 64, 128, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        merged = reduce(Tokens.start(x, cls_index=(0,)), "famba-v", 20)
    assert merged.x.requires_grad
    assert 0 < sum(t.nbytes for t in saved) < x.nbytes / 16


def test_a_layer_without_a_count_returns_the_very_same_tokens(tokens):
    reducer = reducing("famba-v", (0, 1), tokens)
    assert reducer(tokens, 0) is tokens
    assert reducer(tokens, 1).x.shape == (2, 5, 3)


def test_reducers_have_nothing_to_learn_or_to_save():
    for name in METHODS:
        assert make_reducer(name).state_dict() == {}


def test_an_unknown_reducer_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"reduction is 'fambav'.*did you mean 'famba-v'"):
        make_reducer("fambav")


def test_the_methods_listed_without_torch_are_those_registered():
    assert sorted(REDUCERS.names()) == sorted(METHODS)


def test_a_reducer_of_ones_own_takes_a_few_lines(tokens):
    sizes = body(6, cls_index=(5,))
    reduced = Reduction(sizes, Neighbours(), Schedule.of(6, (2,)))(tokens, 0)
    assert reduced.position.tolist() == [[1, 3, 4, 5]] * 2
    torch.testing.assert_close(reduced.x[:, 1], tokens.x[:, 2:4].mean(1))
    assert reduced.cls_index.tolist() == [[3]] * 2
