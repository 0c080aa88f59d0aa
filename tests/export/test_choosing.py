"""The matching in plain operations chooses what the operator chooses."""

import pytest
import torch

from fambav.export.choosing import largest_first, match, others, rank_in


def features(kind, batch=3, length=33):
    torch.manual_seed(0)
    if kind == "equal":
        return torch.ones(batch, length, 8)
    if kind == "few":  # many ties
        return torch.randn(1, 3, 8)[:, torch.randint(3, (batch * length,))].view(batch, length, 8)
    return torch.randn(batch, length, 8)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("places", [(), (0,), (16,), (0, 32)])
@pytest.mark.parametrize("kind", ["distinct", "few", "equal"])
def test_every_choice_is_the_operators_ties_included(kind, places, in_order):
    x = features(kind)
    class_places = torch.tensor([places], dtype=torch.int64).expand(len(x), -1)
    want = torch.ops.fambav.match(x, class_places, 7, in_order=in_order)
    for got, expected in zip(match(x, class_places, 7, in_order=in_order), want, strict=True):
        assert got.tolist() == expected.tolist()


def test_the_others_are_those_left_in_ascending_order():
    assert others(torch.tensor([[4, 0], [1, 2]]), 5).tolist() == [[1, 2, 3], [0, 3, 4]]


@pytest.mark.parametrize("right", [True, False])
def test_counting_ranks_as_a_search_does(right):
    ordered = torch.tensor([[1, 3, 3, 7], [0, 0, 5, 9]])
    x = torch.tensor([[0, 3, 8], [0, 4, 9]])
    want = torch.searchsorted(ordered, x, right=right)
    assert rank_in(ordered, x, right=right).tolist() == want.tolist()


@pytest.mark.parametrize("descending", [True, False])
def test_sorting_by_the_largest_is_sorting(descending):
    x = torch.randperm(50).view(2, 25)
    want = torch.sort(x, dim=1, descending=descending)
    values, places = largest_first(x, dim=1, descending=descending)
    assert values.tolist() == want.values.tolist()
    assert places.tolist() == want.indices.tolist()


def test_the_rank_in_nothing_is_zero():
    assert rank_in(torch.zeros(2, 0), torch.rand(2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]
