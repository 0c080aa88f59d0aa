"""What is known of tokens before the first layer."""

import torch

from fambav.layers import Tokens


def test_tokens_start_at_their_own_places_with_size_one():
    x = torch.randn(3, 5, 2)
    tokens = Tokens.start(x, cls_index=(0, 4))
    assert tokens.x is x
    assert tokens.residual is None
    assert tokens.source is None
    assert torch.equal(tokens.size, torch.ones(3, 5))
    assert tokens.position.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert tokens.cls_index.tolist() == [[0, 4]] * 3


def test_without_a_class_token_there_are_no_class_places():
    places = Tokens.start(torch.randn(3, 5, 2), cls_index=()).cls_index
    assert places.shape == (3, 0)
    assert places.dtype == torch.int64


def test_a_trace_starts_with_each_token_as_its_own_source():
    tokens = Tokens.start(torch.randn(2, 3, 2), cls_index=(1,), trace=True)
    assert tokens.source.tolist() == [[0, 1, 2]] * 2


def test_sizes_are_float32_whatever_the_features_are():
    tokens = Tokens.start(torch.randn(2, 3, 2, dtype=torch.float64), cls_index=(1,))
    assert tokens.size.dtype == torch.float32
