"""Batches do not depend on who reads them, or from where."""

import multiprocessing

import pytest
import torch

from fambav.config import Augment
from fambav.data import DataError, SkipCorrupt, eval_loader, load, train_loader, train_transform
from fambav.data.loaders import Augmented
from fambav.data.types import ArraySet

DIGITS = load("DIGITS")
TRANSFORM = train_transform(Augment(affine=10.0, reprob=0.5), input_size=32)
RUN = dict(batch_size=8, seed=3, epochs=2)


def few(count=24):
    return ArraySet(DIGITS.train.images[:count], DIGITS.train.labels[:count])


def read(**options):
    return list(train_loader(few(), TRANSFORM, **RUN | options))


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True)
    )


def test_the_draws_of_a_sample_depend_on_seed_epoch_and_position():
    samples = few()
    names = [(3, 1, 5), (4, 1, 5), (3, 0, 5), (3, 1, 6)]
    images = [Augmented(samples, TRANSFORM, seed=name[0])[(*name[1:], 2)][0] for name in names]
    again, _ = Augmented(samples, TRANSFORM, seed=3)[1, 5, 2]
    assert torch.equal(images[0], again)
    assert not any(torch.equal(images[0], image) for image in images[1:])


def test_batches_are_normalised_images_and_labels():
    (images, labels), *_ = read()
    assert images.shape == (8, 3, 32, 32)
    assert images.dtype == torch.float32
    assert labels.shape == (8,)
    assert labels.dtype == torch.int64


def test_reading_again_gives_the_same_and_another_epoch_or_seed_does_not():
    first = read()
    torch.rand(7)
    assert same(read(), first)
    assert not same(first[:3], first[3:])
    assert not same(read(seed=4), first)


@pytest.mark.parametrize("start", range(7))
def test_a_resumed_stream_is_the_uninterrupted_one_bit_for_bit(start):
    whole = read()
    assert len(whole) == 6
    assert same(read(start_update=start), whole[start:])


@pytest.mark.parametrize("start", [0, 4])
def test_workers_do_not_change_a_batch(start):
    assert same(read(workers=2, start_update=start), read()[start:])


def test_two_ranks_and_two_micro_batches_see_what_one_process_sees():
    whole = read()
    shards = {
        (rank, micro): batches[micro::2]
        for rank in range(2)
        for batches in [read(batch_size=2, rank=rank, world=2, accum=2)]
        for micro in range(2)
    }
    for update, (images, labels) in enumerate(whole):
        for (rank, micro), batches in shards.items():
            assert torch.equal(batches[update][0], images[2 * micro + rank :: 4])
            assert torch.equal(batches[update][1], labels[2 * micro + rank :: 4])


def test_copies_of_one_image_are_augmented_each_by_itself():
    images, labels = read(batch_size=3, repeats=3)[0]
    assert labels.unique().numel() == 1
    assert not torch.equal(images[0], images[1])


def test_the_stream_tells_the_updates_of_an_epoch():
    loader = train_loader(few(), TRANSFORM, **RUN, accum=2, start_update=1)
    assert loader.updates_per_epoch == 1
    assert len(loader) == 2 == len(list(loader))


def plain(image):
    return torch.zeros(3, 4, 4)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (eval_loader, dict(batch_size=8)),
        (eval_loader, dict(batch_size=8, workers=1)),
        (train_loader, dict(RUN, workers=1)),
    ],
    ids=["evaluation", "evaluation by a worker", "training by a worker"],
)
def test_a_loader_leaves_the_global_generator_alone(make, options):
    torch.manual_seed(0)
    list(make(few(), plain, **options))
    drawn = torch.rand(())
    torch.manual_seed(0)
    assert drawn == torch.rand(())


def number(image):
    return torch.tensor(float(image.getpixel((0, 0))[0]))


def numbered(count=24):
    """Images whose level is their index, as is their label."""
    places = torch.arange(count, dtype=torch.uint8)
    return ArraySet(places[:, None, None, None].expand(-1, 2, 2, 3).numpy(), places.numpy())


def both(loaders):
    """Images and labels of batches, in order."""
    read = [batch for loader in loaders for batch in loader]
    return [torch.cat([batch[part] for batch in read]).tolist() for part in range(2)]


@pytest.mark.parametrize("world", [1, 2, 5, 30])
def test_evaluation_reads_each_sample_once_over_all_ranks(world):
    ranks = [
        eval_loader(numbered(), number, batch_size=4, rank=rank, world=world)
        for rank in range(world)
    ]
    images, labels = both(ranks)
    assert images == labels
    assert sorted(images) == list(range(24))


@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_of_training_reads_each_sample_once_over_all_ranks(world):
    share = dict(batch_size=8 // world, seed=0, epochs=1, world=world)
    images, labels = both(
        [train_loader(numbered(), number, rank=rank, **share) for rank in range(world)]
    )
    assert images == labels
    assert sorted(images) == list(range(24))


class Spotted:
    """Numbered images, some of which cannot be read."""

    def __init__(self, *bad):
        self.bad, self.samples = bad, numbered(200)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if index in self.bad:
            raise DataError(f"picture {index} is damaged, expected an image")
        return self.samples[index]


@pytest.mark.parametrize("bad", [(), (0, 198), (199,), (198, 199)])
def test_samples_that_cannot_be_read_are_left_out_or_replaced_by_the_next(bad):
    samples = SkipCorrupt(Spotted(*bad), replacing=False)
    loader = eval_loader(samples, number, batch_size=16)
    images, labels = both([loader])
    assert images == labels == [index for index in range(200) if index not in bad]
    assert loader.indices() == labels
    samples = SkipCorrupt(Spotted(*bad), replacing=True)
    found = [samples[index][1] for index in range(200)]
    expected = list(range(200))
    for index in sorted(bad, reverse=True):
        expected[index] = expected[(index + 1) % 200]
    assert found == expected
    assert samples.count() == len(bad)


class Damaged:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        raise DataError(f"picture {index} is damaged, expected an image")


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_met_while_reading_is_one_sentence(workers):
    loader = train_loader(Damaged(), TRANSFORM, batch_size=8, seed=0, epochs=1, workers=workers)
    with pytest.raises(DataError) as caught:
        list(loader)
    assert str(caught.value).startswith("picture ")
    assert str(caught.value).endswith(" is damaged, expected an image")
    assert not multiprocessing.active_children()
