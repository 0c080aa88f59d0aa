"""What ONNX has other operators for gives what PyTorch's operations give."""

import pytest
import torch

from fambav.export.graph import rank_by_counting, sort_by_topk


@pytest.mark.parametrize("right", [True, False])
def test_counting_ranks_as_a_search_does(right):
    ordered = torch.tensor([[1, 3, 3, 7], [0, 0, 5, 9]])
    x = torch.tensor([[0, 3, 8], [0, 4, 9]])
    want = torch.searchsorted(ordered, x, right=right)
    assert rank_by_counting(ordered, x, right=right).tolist() == want.tolist()


@pytest.mark.parametrize("descending", [True, False])
def test_sorting_by_the_largest_is_sorting(descending):
    x = torch.randperm(50).view(2, 25)
    want = torch.sort(x, dim=1, descending=descending)
    values, indices = sort_by_topk(x, dim=1, descending=descending)
    assert values.tolist() == want.values.tolist()
    assert indices.tolist() == want.indices.tolist()


def test_the_rank_in_nothing_is_zero():
    assert rank_by_counting(torch.zeros(2, 0), torch.rand(2, 3)).tolist() == [[0] * 3] * 2
