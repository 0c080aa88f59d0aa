"""Which sample goes where."""

import hashlib
from itertools import islice

import pytest
import torch

from fambav.data import TrainBatches, repeat_augmented
from tests import golden

ARRAYS, TOLD = golden.load("recipe_data")
RUN = dict(batch_size=4, seed=0, epochs=3)


def permutation(case):
    if not case["shuffle"]:
        return torch.arange(case["N"])
    return torch.randperm(case["N"], generator=torch.Generator().manual_seed(case["epoch"]))


@pytest.mark.parametrize("name", sorted(TOLD["ra"]))
def test_repeated_augmentation_deals_as_the_original_does(name):
    case = TOLD["ra"][name]
    order = repeat_augmented(permutation(case), repeats=case["repeats"])
    ranks = [order[rank :: case["ranks"]][: case["len"]] for rank in range(case["ranks"])]
    assert torch.equal(torch.stack(ranks)[:, :20].int(), ARRAYS[f"ra/{name}/first20"])
    assert [rank[-5:].tolist() for rank in ranks] == case["last5"]
    sums = [hashlib.sha256(rank.numpy().astype("<i8").tobytes()).hexdigest() for rank in ranks]
    assert sums == case["sha256_per_rank_int64_le"]
    assert len(order.unique()) == case["distinct_images"]


@pytest.mark.parametrize("rank", range(4))
def test_the_batches_of_a_rank_are_the_originals(rank):
    """12,480 samples for each of 4 ranks of CIFAR's size, in 97 batches of 128."""
    batches = TrainBatches(50_000, batch_size=128, seed=0, epochs=1, rank=rank, world=4, repeats=3)
    assert batches.updates_per_epoch == len(batches) == 97
    dealt = batches.order(0)[rank::4][: 97 * 128]
    seen = [index for batch in batches for _, _, index in batch]
    assert seen == dealt.tolist()


def test_repeats_keep_a_set_that_is_smaller_than_the_rounding():
    order = repeat_augmented(torch.arange(40), repeats=3)
    assert order.tolist() == [index // 3 for index in range(40)]


def test_an_epoch_shows_every_sample_once_in_an_order_of_its_own():
    batches = TrainBatches(32, **RUN)
    epochs = [batches.order(epoch) for epoch in range(3)]
    assert all(torch.equal(epoch.sort().values, torch.arange(32)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], TrainBatches(32, **RUN | dict(seed=1)).order(0))


@pytest.mark.parametrize(("world", "accum"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_the_batches_of_an_epoch_are_reported_beforehand_and_hold_every_sample_once(world, accum):
    share = dict(batch_size=8 // (world * accum), seed=0, epochs=2, world=world, accum=accum)
    ranks = [TrainBatches(32, **share, rank=rank) for rank in range(world)]
    streams = [iter(rank) for rank in ranks]
    for epoch in range(2):
        seen = []
        for update in range(4 * epoch, 4 * epoch + 4):
            read = [
                [[index for _, _, index in batch] for batch in islice(stream, accum)]
                for stream in streams
            ]
            assert all(rank.indices(update) == read for rank in ranks)
            seen += [index for micros in read for batch in micros for index in batch]
        assert sorted(seen) == list(range(32))


def test_the_order_takes_nothing_from_the_global_generator():
    torch.manual_seed(0)
    list(TrainBatches(32, **RUN))
    drawn = torch.rand(())
    torch.manual_seed(0)
    assert drawn == torch.rand(())


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("start", [0, 1, 7, 8, 9, 24])
def test_starting_anywhere_continues_the_uninterrupted_sequence(start, repeats):
    whole = list(TrainBatches(33, **RUN, repeats=repeats))
    assert len(whole) == 24
    rest = TrainBatches(33, **RUN, repeats=repeats, start_update=start)
    assert list(rest) == whole[start:]
    assert len(rest) == 24 - start


@pytest.mark.parametrize(("world", "accum"), [(2, 1), (1, 2), (2, 3), (4, 2)])
@pytest.mark.parametrize("repeats", [1, 3])
def test_processes_and_micro_batches_share_the_window_of_one_process(world, accum, repeats):
    size = 2
    whole = TrainBatches(100, batch_size=size * world * accum, seed=0, epochs=2, repeats=repeats)
    streams = [
        iter(
            TrainBatches(
                100,
                batch_size=size,
                seed=0,
                epochs=2,
                rank=rank,
                world=world,
                accum=accum,
                repeats=repeats,
            )
        )
        for rank in range(world)
    ]
    for window in whole:
        shards = [list(islice(stream, accum)) for stream in streams]
        for rank, micros in enumerate(shards):
            for micro, shard in enumerate(micros):
                assert shard == window[micro * world + rank :: world * accum]
        together = sorted(sample for micros in shards for shard in micros for sample in shard)
        assert together == sorted(window)
    assert all(next(stream, None) is None for stream in streams)


def test_a_batch_larger_than_an_epoch_is_refused_with_the_arithmetic():
    with pytest.raises(ValueError, match=r"batch_size is 8 \(x 2 processes x 3 .* = 48\), .* 40"):
        TrainBatches(40, batch_size=8, seed=0, epochs=1, world=2, accum=3)
