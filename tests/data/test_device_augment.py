"""Batches made on a device are those that Pillow makes, to the bit."""

from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fambav.config import Augment
from fambav.data import (
    ArraySet,
    eval_loader,
    eval_transform,
    load,
    train_loader,
    train_transform,
)
from fambav.data.augment_params import ParamSampler, ProxySamples
from fambav.data.device_augment import DeviceEvalLoader, DeviceSet, device_train_loader
from fambav.data.device_ops import OPERATIONS, affine
from fambav.data.loaders import Augmented
from fambav.engine import checkpoint
from fambav.timm_compat import timm
from tests.data.made import made_cifar
from tests.made import crashing, go, refused

CPU = torch.device("cpu")
RUN = dict(batch_size=16, seed=3, epochs=2)
OFF = dict(aa=None, color_jitter=0, reprob=0.0, hflip=0.0)
POLICY = "rand-m9-mstd0.5-inc1"


def pictures(count=64, height=32, width=32):
    """Smooth pictures with noise; every fourth uses few levels, one is all of one colour."""
    source = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=source)
    pixels = 200 * F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    pixels = pixels + 55 * torch.rand(count, 3, height, width, generator=source)
    pixels[::4] = (pixels[::4] / 40).floor() * 25 + 30
    pixels[1] = 77
    images = pixels.permute(0, 2, 3, 1).to(torch.uint8).numpy()
    return ArraySet(images, np.arange(count) % 10)


def on_device(samples, transform, device=CPU, **options):
    return device_train_loader(DeviceSet(samples, device=device), transform, **RUN | dict(options))


def recipe(input_size, **augment):
    return train_transform(Augment(**augment), input_size=input_size)


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True)
    )


RECIPES = {
    "published": dict(input_size=48),
    "published, small": dict(input_size=32),
    "another shape": dict(input_size=(40, 56)),
    "bilinear": dict(input_size=48, train_interpolation="bilinear"),
    "either": dict(input_size=48, train_interpolation="random"),
    "three operations": dict(input_size=48, aa="rand-m9-n3-mstd0.5-p1.0"),
    "weighted": dict(input_size=48, aa="rand-m9-mstd101-tweights-inc1"),
    "greater magnitudes": dict(input_size=48, aa="rand-m12-mmax20-mstd2-t3aw-inc1"),
    "jitter": dict(input_size=48, aa=None, color_jitter=0.4),
    "turned": dict(input_size=48, affine=25.0),
    "turned, small": dict(input_size=32, affine=25.0),
    "erased thrice": dict(input_size=48, reprob=0.9, recount=3),
    "erased in one colour": dict(input_size=48, reprob=0.9, remode="rand"),
    "erased in grey": dict(input_size=48, reprob=0.9, remode="const"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_gives_the_images_of_the_loader_to_the_bit(name):
    samples, transform = pictures(), recipe(**RECIPES[name])
    assert same(list(on_device(samples, transform)), list(train_loader(samples, transform, **RUN)))


@pytest.mark.parametrize("options", [{}, {"src": True}, {"color_jitter": 0}])
def test_three_augment_gives_the_images_of_the_loader_to_the_bit(options):
    samples, transform = pictures(), recipe(48, three_augment=True, **options)
    assert same(list(on_device(samples, transform)), list(train_loader(samples, transform, **RUN)))


@pytest.mark.parametrize("name", timm.data.auto_augment.LEVEL_TO_ARG)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_every_operation_at_every_magnitude_is_pillows_to_the_bit(name, interpolation):
    policy = "rand-m10-n1-mstd101-p1.0"
    transform = recipe(40, train_interpolation=interpolation, **OFF | {"aa": policy})
    augment = transform.transforms[1]
    augment.ops = [type(augment.ops[0])(name, prob=1.0, hparams=augment.ops[0].hparams)]
    samples = pictures()
    assert same(
        list(on_device(samples, transform, epochs=1)),
        list(train_loader(samples, transform, **RUN | dict(epochs=1))),
    )


@pytest.mark.parametrize("magnitude", [0, 30, 60])
def test_quarter_turns_are_pillows_to_the_bit(magnitude):
    policy = f"rand-m{magnitude}-mmax60-n1-p1.0"  # 30 is a quarter
    transform = recipe(40, **OFF | {"aa": policy})
    augment = transform.transforms[1]
    augment.ops = [operation for operation in augment.ops if operation.name == "Rotate"]
    samples = pictures()
    assert same(list(on_device(samples, transform)), list(train_loader(samples, transform, **RUN)))


@pytest.mark.parametrize("kind", ["BICUBIC", "BILINEAR"])
@pytest.mark.parametrize("by", [-7.5, -0.5, 0.5, 3.0, 31.5, 40.0])
@pytest.mark.parametrize("axes", ["across", "down", "both"])
def test_a_place_on_the_edge_is_inside_or_outside_as_for_pillow(axes, by, kind):
    samples = pictures(2)
    right, down = by * (axes != "down"), by * (axes != "across")
    resample = Image.Resampling[kind]
    fill = (1, 2, 3)
    matrix = (1, 0, right, 0, 1, down)
    expected = [
        np.asarray(samples[index][0].transform((32, 32), 0, matrix, resample, fillcolor=fill))
        for index in range(2)
    ]
    given = (1, 0, down, 0, 1, right) if axes == "down" else matrix
    values = torch.tensor([[*given, *fill]] * 2, dtype=torch.float64)
    made = affine(DeviceSet(samples, device=CPU).images, values, axes=axes, cubic=kind == "BICUBIC")
    assert np.array_equal(made.permute(0, 2, 3, 1).numpy(), np.stack(expected))


@pytest.mark.parametrize("shape", [(8, 8), (100, 100), (30, 70)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crops_are_enlarged_and_reduced_as_pillow_does(shape, interpolation):
    samples = pictures(32, *shape)
    transform = recipe(44, train_interpolation=interpolation, **OFF)
    assert same(list(on_device(samples, transform)), list(train_loader(samples, transform, **RUN)))


def test_a_policy_draws_each_operation_as_often_as_timm_says():
    samples, count = ProxySamples(1, image_size=(32, 32)), 3000
    params = Augmented(samples, ParamSampler(recipe(48, aa=POLICY)), seed=0)
    records = [params[0, position, 0][0] for position in range(count)]
    policy = Counter(step.name for record in records for step in record.steps if step.stage == 2)
    geometric = (
        "AffineAcrossCubic",
        "AffineDownCubic",
        "AffineBothCubic",
    )  # two, two and one of fifteen
    expected = dict.fromkeys(policy, 1) | dict(zip(geometric, (2, 2, 1), strict=True))
    assert sum(expected.values()) == 15
    each = count * 2 * 0.5 / 15
    for name, share in expected.items():
        assert abs(policy[name] - share * each) < 4 * (share * each) ** 0.5, name
    flips = sum(step.name == "FLIP_LEFT_RIGHT" for record in records for step in record.steps)
    assert abs(flips - count / 2) < 4 * (count / 4) ** 0.5
    erased = sum(bool(record.erasings) for record in records)
    assert abs(erased - count / 4) < 4 * (count * 3 / 16) ** 0.5
    assert policy.keys() <= OPERATIONS.keys()


@pytest.mark.parametrize("size", [32, 48, (40, 56)])
@pytest.mark.parametrize("shape", [(32, 32), (8, 8), (30, 70)])
def test_evaluation_gives_the_images_of_the_loader_to_the_bit(size, shape):
    samples, transform = pictures(21, *shape), eval_transform(input_size=size)
    made = DeviceEvalLoader(DeviceSet(samples, device=CPU), transform, batch_size=8)
    assert len(made) == 3
    expected = list(eval_loader(samples, transform, batch_size=8))
    assert same(list(made), expected)
    assert same(list(made), expected)


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.875, 1.0])
def test_evaluation_keeps_the_share_of_an_image_that_it_is_given(ratio):
    samples = pictures(4, 70, 70)
    transform = eval_transform(input_size=48, eval_crop_ratio=ratio)
    made = list(DeviceEvalLoader(DeviceSet(samples, device=CPU), transform, batch_size=4))
    assert same(made, list(eval_loader(samples, transform, batch_size=4)))
    other = eval_transform(input_size=48, eval_crop_ratio=0.7)
    assert not same(made, list(eval_loader(samples, other, batch_size=4)))


@pytest.mark.parametrize("world", [2, 5, 21, 22, 30])
def test_processes_share_evaluation_as_the_loader_does(world):
    """Also where there are fewer samples than processes."""
    samples, transform = pictures(21), eval_transform(input_size=40)
    for rank in range(world):
        share = dict(batch_size=8, rank=rank, world=world)
        made = DeviceEvalLoader(DeviceSet(samples, device=CPU), transform, **share)
        assert len(made) == len(list(made))
        assert same(list(made), list(eval_loader(samples, transform, **share)))


def test_a_sample_is_augmented_alike_by_one_process_and_by_two():
    samples, transform = pictures(), train_transform(input_size=48)
    alone = list(on_device(samples, transform))
    shares = [
        list(on_device(samples, transform, batch_size=8, world=2, rank=rank)) for rank in range(2)
    ]
    for whole, *parts in zip(alone, *shares, strict=True):
        for rank, (images, labels) in enumerate(parts):
            assert torch.equal(whole[0][rank::2], images)
            assert torch.equal(whole[1][rank::2], labels)


def test_processes_that_draw_ahead_change_nothing():
    samples, transform = pictures(), recipe(48, reprob=0.6)
    assert same(list(on_device(samples, transform, workers=2)), list(on_device(samples, transform)))


def test_the_stream_may_start_anywhere_and_repeats_samples_as_set():
    samples, transform = pictures(), train_transform(input_size=48)
    repeated = on_device(samples, transform, repeats=3)
    assert repeated.updates_per_epoch == 4
    batches = list(repeated)
    assert same(batches, list(train_loader(samples, transform, repeats=3, **RUN)))
    assert same(batches[5:], list(on_device(samples, transform, repeats=3, start_update=5)))
    images, labels = batches[0]
    assert torch.equal(labels[:3], labels[:1].expand(3))
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("three", [False, True])
def test_every_image_of_a_batch_has_parameters_of_its_own(three):
    image = pictures(2).images[:1]
    copies = ArraySet(image.repeat(16, axis=0), np.zeros(16))
    images, _ = next(iter(on_device(copies, recipe(48, three_augment=three))))
    assert not any(torch.equal(one, other) for one, other in combinations(images, 2))


def test_no_two_batches_are_alike():
    batches = [images for images, _ in on_device(pictures(), train_transform(input_size=48))]
    assert not any(torch.equal(one, other) for one, other in pairwise(batches))


def test_a_policy_that_is_not_offered_is_refused_by_name():
    for policy, step in (("augmix-m5-w4-d2", "AugMixAugment"), ("original", "AutoAugment")):
        transform = recipe(48, aa=policy)
        with pytest.raises(ValueError, match=rf"aa is a policy with {step}, expected rand-\*"):
            on_device(pictures(), transform)


def test_a_set_that_is_not_in_memory_is_refused():
    with pytest.raises(ValueError, match="from a FakeImages, expected a set held in memory"):
        DeviceSet(load("FAKE").train, device=CPU)


def test_an_epoch_without_a_full_batch_is_refused():
    with pytest.raises(ValueError, match="batch_size is 16"):
        on_device(pictures(8), train_transform(input_size=48))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    made_cifar(folder, train=40, test=37)
    text = """--model vim_micro --input-size 48 --stride 16 --patch-size 16 --data-set CIFAR
        --num_workers 0 --batch-size 8 --grad-accum-steps 2 --epochs 2 --warmup-epochs 0 --lr 1e-3
        --unscale-lr --device cpu"""
    return [*text.split(), "--data-path", folder]


@pytest.fixture(scope="module")
def plain(words, tmp_path_factory):
    """A run whose images come from the loader."""
    folder = tmp_path_factory.mktemp("run") / "plain"
    found = go(*words, "--output_dir", folder)
    assert found.status == 0, found.err
    return checkpoint.load(folder / "checkpoint.pth")


def lasting(state):
    history = [
        {name: value for name, value in record.items() if name.endswith(("loss", "acc1", "acc5"))}
        for record in state["history"]
    ]
    return history, state["model"], state["model_ema"]


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()


def assert_same_run(folder, plain):
    ours, theirs = lasting(checkpoint.load(folder / "checkpoint.pth")), lasting(plain)
    assert ours[0] == theirs[0]
    assert equal(ours[1], theirs[1])
    assert equal(ours[2], theirs[2])


def test_a_run_learns_the_same_weights_with_and_without(words, plain, tmp_path):
    found = go(*words, "--output_dir", tmp_path, "--gpu-augment")
    assert found.status == 0, found.err
    assert_same_run(tmp_path, plain)


@pytest.mark.parametrize("before", [["--gpu-augment"], []])
def test_an_interrupted_run_goes_on_to_the_bit_with_or_without_before(
    words, plain, tmp_path, before
):
    with crashing():  # in the middle of the second epoch
        go(*words, "--output_dir", tmp_path, *before)
    torch.manual_seed(99)  # whatever was drawn before must not matter
    found = go(*words, "--output_dir", tmp_path, "--gpu-augment", "--resume", "auto")
    assert found.status == 0, found.err
    assert "going on from" in found.out
    assert_same_run(tmp_path, plain)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--data-set FAKE", "--gpu-augment is on, expected off with --data-set FAKE"),
        ("--data-set IMNET", "SHAPES100, CIFAR, CIFAR10 are held in memory"),
        ("--aa augmix-m5-w4-d2", "expected off with --aa augmix-m5-w4-d2; rand-*, such as"),
        ("--aa original", "none and --ThreeAugment are offered on the device"),
    ],
)
def test_what_the_device_cannot_do_is_refused_in_one_line(more, message):
    assert message in refused("--gpu-augment", *more.split())


@pytest.mark.gpu
@pytest.mark.parametrize("three", [False, True])
def test_a_gpu_makes_the_batches_of_a_cpu(three):
    samples, transform = pictures(), recipe(224, three_augment=three)
    options = dict(workers=1, pin_memory=True)
    made = list(on_device(samples, transform, torch.device("cuda"), **options))
    for (images, labels), (expected, wanted) in zip(
        made, on_device(samples, transform), strict=True
    ):
        assert images.is_cuda
        assert labels.is_cuda
        assert torch.equal(labels.cpu(), wanted)
        torch.testing.assert_close(images.cpu(), expected, rtol=0, atol=1e-3)


@pytest.mark.gpu
def test_a_gpu_evaluates_the_images_of_a_cpu():
    samples, transform = pictures(), eval_transform(input_size=224)
    made = DeviceEvalLoader(
        DeviceSet(samples, device=torch.device("cuda")), transform, batch_size=24
    )
    expected = eval_loader(samples, transform, batch_size=24)
    for (images, labels), (theirs, wanted) in zip(made, expected, strict=True):
        assert torch.equal(labels.cpu(), wanted)
        torch.testing.assert_close(images.cpu(), theirs, rtol=0, atol=1e-3)
