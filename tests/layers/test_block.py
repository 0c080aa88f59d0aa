"""The residual block."""

import pytest
import torch
from torch import nn

from fambav.layers import AddNorm, Block, Hooks, Intermediates, Tokens


class Twice(nn.Module):
    """A mixer that is easy to follow."""

    def forward(self, x):
        return 2 * x


def start(batch=2, length=5, dim=4, dtype=torch.float32):
    return Tokens.start(torch.randn(batch, length, dim, dtype=dtype), cls_index=(2,))


def rms(x):
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()


def test_the_stream_adds_up_what_mixers_return():
    block, tokens = Block(4, Twice()), start()
    first = block(tokens)
    torch.testing.assert_close(first.residual, tokens.x)
    torch.testing.assert_close(first.x, 2 * rms(tokens.x))
    second = block(first)
    torch.testing.assert_close(second.residual, tokens.x + first.x)
    torch.testing.assert_close(second.x, 2 * rms(tokens.x + first.x))


def test_the_hook_sees_what_the_mixer_would_read_and_may_shorten_it():
    block, tokens, seen = Block(4, Twice()), start(), []

    def cut(tokens):
        seen.append(tokens.x)
        return tokens._replace(x=tokens.x[:, :3], residual=tokens.residual[:, :3])

    out = block(tokens, Hooks(between=cut))
    torch.testing.assert_close(seen[0], rms(tokens.x))
    torch.testing.assert_close(out.x, 2 * seen[0][:, :3])
    assert out.residual.shape == (2, 3, 4)


def test_the_three_points_of_a_block_see_output_normalised_sum_and_output():
    block, tokens, seen = Block(4, Twice()), start()._replace(residual=torch.randn(2, 5, 4)), []

    def look(tokens):
        seen.append((tokens.x, tokens.residual))
        return tokens

    out = block(tokens, Hooks(before=look, between=look, after=look))
    total = tokens.residual + tokens.x
    wanted = (tokens.x, tokens.residual), (rms(total), total), (2 * rms(total), total)
    for (x, residual), (want, stream) in zip(seen, wanted, strict=True):
        torch.testing.assert_close(x, want)
        torch.testing.assert_close(residual, stream)
    assert out.x is seen[2][0]


def test_what_is_wanted_of_the_mixer_reaches_it_and_its_intermediates_the_last_hook():
    class Returning(nn.Module):
        def forward(self, x, tokens, *, want, gap_policy):
            assert tokens.x is x
            assert (want, gap_policy) == ({"mixed"}, "bias")
            return 2 * x, Intermediates(order=torch.arange(5)[None, None], mixed=2 * x)

    def look(tokens):
        assert tokens.intermediates.mixed.equal(tokens.x)
        return tokens

    hooks = Hooks(after=look, want=frozenset({"mixed"}), gap_policy="bias")
    block, tokens = Block(4, Returning()), start()
    assert block(tokens, hooks).intermediates.mixed.shape == (2, 5, 4)
    block.mixer = Twice()
    assert block(block(tokens)).intermediates is None


def test_masked_places_stay_silent_whatever_the_mixer_adds():
    class Loud(nn.Module):
        def forward(self, x, tokens, *, want, gap_policy):
            return x + 1, Intermediates(order=torch.arange(5)[None, None])

    keep_index = torch.tensor([[0, 3], [1, 4]])
    out = Block(4, Loud())(start()._replace(keep_index=keep_index), Hooks(positions=True))
    silent = out.x.eq(0).all(dim=2)
    assert silent.tolist() == [[False, True, True, False, True], [True, False, True, True, False]]


def test_the_stream_stays_in_float32_beside_low_precision():
    normed, residual = AddNorm(4)(torch.ones(1, 2, 4, dtype=torch.bfloat16))
    assert (normed.dtype, residual.dtype) == (torch.bfloat16, torch.float32)
    small = torch.full((1, 2, 4), 2.0**-12, dtype=torch.bfloat16)
    assert (AddNorm(4)(small, residual)[1] == 1 + 2.0**-12).all()


def test_drop_path_acts_on_the_stream_and_not_on_what_is_already_in_it():
    torch.manual_seed(0)
    block = Block(4, Twice(), drop_path=0.5)
    tokens = start(batch=8)._replace(residual=torch.ones(8, 5, 4))
    out = block(tokens)
    added = (out.residual - 1) / tokens.x
    share = added[:, :1, :1]
    torch.testing.assert_close(added, share.expand_as(added), atol=1e-4, rtol=1e-4)
    assert {round(s, 3) for s in share.flatten().tolist()} == {0.0, 2.0}


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_checkpointing_changes_no_gradient(rate):
    torch.manual_seed(0)
    block = Block(4, nn.Linear(4, 4), drop_path=rate)
    tokens = start()._replace(residual=torch.randn(2, 5, 4))
    grads = []
    for checkpointed in (False, True):
        block.grad_checkpointing = checkpointed
        block.zero_grad()
        torch.manual_seed(1)
        out = block(tokens)
        torch.manual_seed(2)  # as a training loop may before backward
        (out.x.square().sum() + out.residual.square().sum()).backward()
        grads.append([p.grad for p in block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_checkpointing_keeps_less_for_backward():
    kept = {}
    for checkpointed in (False, True):
        block = Block(4, nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 4)))
        block.grad_checkpointing = checkpointed
        sizes = []

        def pack(x, sizes=sizes):
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            block(start(length=50))
        kept[checkpointed] = sum(sizes)
    assert kept[True] < kept[False] / 10
