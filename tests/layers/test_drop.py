"""Randomness that belongs to a sample, not to a process."""

import pytest
import torch

from fambav.layers import Dropout, DropPath, shard


@pytest.mark.parametrize("drop", [DropPath(0.4), Dropout(0.4)], ids=["path", "single"])
@pytest.mark.parametrize("count", [2, 4])
def test_shards_drop_what_one_process_drops(drop, count):
    batch = torch.randn(8, 5, 3)
    torch.manual_seed(7)
    whole = drop(batch)
    for index in range(count):
        torch.manual_seed(7)
        with shard(index, count):
            assert torch.equal(drop(batch[index::count]), whole[index::count])
    torch.manual_seed(7)
    assert torch.equal(drop(batch), whole)  # nothing of the shards is left


@pytest.mark.parametrize("drop", [DropPath(0.4), Dropout(0.4)], ids=["path", "single"])
def test_a_shard_in_a_tensor_is_read_when_numbers_are_drawn(drop):
    batch, place = torch.randn(3, 5, 2), torch.zeros(1, dtype=torch.int64)
    for index in (2, 0, 1):
        place.fill_(index)
        drawn = []
        for given in (place, index):
            torch.manual_seed(7)
            with shard(given, 3):
                drawn.append(drop(batch))
        assert torch.equal(*drawn)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    out = DropPath(0.25)(torch.ones(20000, 3, 2))
    assert (out == out[:, :1, :1]).all()
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert out.mean().item() == pytest.approx(1, abs=0.02)


def test_drop_path_takes_maps_too_and_drops_the_same_samples():
    drop, x = DropPath(0.4), torch.randn(8, 4, 5, 3)
    outs = []
    for shape in ((8, 4, 5, 3), (8, 20, 3)):
        torch.manual_seed(7)
        outs.append(drop(x.reshape(shape)).flatten(1))
    assert torch.equal(*outs)


def test_dropout_drops_single_numbers_and_keeps_the_mean():
    out = Dropout(0.25)(torch.ones(50, 40, 20))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    assert not (out == out[:, :1, :1]).all()


@pytest.mark.parametrize("kind", [DropPath, Dropout])
def test_nothing_is_dropped_or_drawn_in_evaluation_or_at_rate_zero(kind):
    x, before = torch.randn(4, 3, 2), torch.get_rng_state()
    assert kind(0.5).eval()(x) is x
    assert kind(0.0)(x) is x
    assert torch.equal(torch.get_rng_state(), before)


def test_low_precision_is_kept():
    x = torch.ones(8, 3, 2, dtype=torch.bfloat16)
    assert DropPath(0.5)(x).dtype == Dropout(0.5)(x).dtype == torch.bfloat16


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_that_drops_everything_is_refused(rate):
    with pytest.raises(ValueError, match="drop rate is"):
        DropPath(rate)


@pytest.mark.parametrize("index", [-1, 2])
def test_a_shard_that_is_not_there_is_refused(index):
    with pytest.raises(ValueError, match="expected 0 to 1"), shard(index, 2):
        pass
