"""From an image to a tensor."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fambav.config import Augment, Config, ConfigError
from fambav.data import eval_transform, train_transform
from fambav.data.transforms import Blur
from fambav.data.types import IMAGENET_MEAN, IMAGENET_STD
from fambav.seeding import seed_all

SCALE = dict(mean=(0, 0, 0), std=(1, 1, 1))
PLAIN = Augment(aa=None, color_jitter=0, reprob=0.0, hflip=0.0)
THREE = Augment(three_augment=True)


def picture(height=32, width=32):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def drawn(transform, image, *name):
    seed_all(*name)
    return transform(image)


@pytest.mark.parametrize("augment", [Augment(), THREE], ids=["deit", "three"])
@pytest.mark.parametrize("size", [224, 32, (32, 64), (64, 32)])
def test_a_seed_decides_the_result(augment, size):
    transform = train_transform(augment, input_size=size)
    first = drawn(transform, picture(), 0, "augment", 1, 2)
    assert first.shape == (3, *((size, size) if isinstance(size, int) else size))
    assert torch.equal(drawn(transform, picture(), 0, "augment", 1, 2), first)
    others = [drawn(transform, picture(), 0, "augment", 1, index) for index in range(3, 9)]
    assert not any(torch.equal(other, first) for other in others)


def test_the_published_recipe_has_its_steps_in_order():
    transform = train_transform(input_size=224)
    assert [type(step).__name__ for step in transform.transforms] == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "RandAugment",
        "MaybeToTensor",
        "Normalize",
        "RandomErasing",
    ]
    crop, flip, policy, *_, erasing = transform.transforms
    assert (crop.scale, crop.ratio) == ((0.08, 1.0), (3 / 4, 4 / 3))
    assert flip.p == 0.5
    assert len(policy.ops) == 15
    assert {(op.magnitude, op.magnitude_std) for op in policy.ops} == {(9, 0.5)}
    assert policy.ops[0].hparams["translate_const"] == 100
    assert (erasing.probability, erasing.mode) == (0.25, "pixel")


def test_a_small_input_is_the_whole_image_shifted_by_at_most_four_pixels():
    transform = train_transform(PLAIN, input_size=32, **SCALE)
    image = torch.from_numpy(np.array(picture())).permute(2, 0, 1) / 255
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    shifts = set()
    for index in range(90):
        result = drawn(transform, picture(), index)
        found = [
            (top, left)
            for top in range(9)
            for left in range(9)
            if torch.equal(result, padded[:, top : top + 32, left : left + 32])
        ]
        shifts.update(found)
        assert found
    assert {top for top, _ in shifts} == {left for _, left in shifts} == set(range(9))


def test_a_small_input_from_an_image_of_another_size_is_resized_first():
    transform = train_transform(PLAIN, input_size=32, **SCALE)
    result = drawn(transform, Image.new("RGB", (8, 8), (255, 255, 255)), 0)
    assert result.shape == (3, 32, 32)
    assert (result == 1).float().mean() >= (28 / 32) ** 2


@pytest.mark.parametrize("policy", [None, "", "none"])
def test_a_policy_can_be_switched_off(policy):
    transform = train_transform(Augment(aa=policy, color_jitter=0.3), input_size=64)
    assert "RandAugment" not in str(transform)
    assert "ColorJitter" in str(transform)
    for other in (Augment(aa=policy, color_jitter=None), Augment(color_jitter=0.3)):
        assert "ColorJitter" not in str(train_transform(other, input_size=64))


def test_erasing_takes_its_settings():
    transform = train_transform(Augment(reprob=0.4, remode="const", recount=3), input_size=64)
    erasing = transform.transforms[-1]
    assert (erasing.probability, erasing.mode, erasing.max_count) == (0.4, "const", 3)
    assert "RandomErasing" not in str(train_transform(Augment(reprob=0.0), input_size=64))


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_images_are_enlarged_as_set(size, name):
    crop = train_transform(Augment(train_interpolation=name), input_size=size).transforms[0]
    assert crop.interpolation.value == name


PARTIAL = {
    "": "one of rand, augmix, original, originalr, v0, v0r, 3a in place of ''",
    "rnd-m9": "in place of 'rnd'",
    "rand-x9": "parts of rand-* in place of 'x9': m, n, p, mstd, mmax, inc",
    "rand-m9-foo": "in place of 'foo'",
    "rand-m9-mstdX": "in place of 'mstdX'",
    "rand-m9-": "in place of ''",
    "rand-m9-mstd": "mstd with a number of at least 0 in place of 'mstd'",
    "rand-m9-mstd.5": "in place of 'mstd.5'",
    "rand-m9.5": "m with a whole number of at least 0 in place of 'm9.5'",
    "rand-m-9": "in place of 'm'",
    "rand-m9-n0": "n with a whole number of at least 1",
    "rand-m9-p1.5": "p with a number of at least 0 and at most 1",
    "rand-m9-inc2": "inc with a whole number of at least 0 and at most 1",
    "rand-m9-m5": "m once",
    "rand-m15": "a magnitude of at most 10 in place of m15; mmax15 beside it",
    "rand-m12-mmax11": "a magnitude of at most 11 in place of m12",
    "rand-mmax5": "a magnitude of at most 5 in place of m10",
    "rand-m9-mmax0": "mmax with a whole number of at least 1",
    "rand-m9-w0": "in place of 'w0'",
    "rand-m9-twights": "or one of tweights, t3a, t3aw",
    "rand-m9-t3a-tweights": "one set of operations in place of t3a, tweights",
    "rand-m9-tweights-n16": "at most n15",
    "rand-m9-t3aw-n15": "at most n14",
    "rand-m9-t3a-inc0": "inc1 or no inc with t3a",
    "augmix-m11": "a magnitude of at most 10 in place of m11",
    "augmix-inc1": "parts of augmix-* in place of 'inc1': m, w, d, a, b, mstd",
    "augmix-m5-d0": "d with a whole number of at least 1",
    "augmix-m5-a0": "a with a number of more than 0",
    "original-m9": "parts of original-* in place of 'm9': mstd",
    "v0r-mstdX": "in place of 'mstdX'",
    "3a-foo": "in place of 'foo'",
}


@pytest.mark.parametrize("aa", PARTIAL)
def test_a_policy_that_timm_would_not_carry_out_whole_is_refused(aa):
    with pytest.raises(ConfigError) as caught:
        Config.from_flat({"aa": aa})
    assert str(caught.value).startswith(f"aa is {aa!r}, expected ")
    assert PARTIAL[aa] in str(caught.value)
    assert "\n" not in str(caught.value)
    if aa:  # which is none for the transform
        with pytest.raises(ValueError, match=f"^{re.escape(str(caught.value))}$"):
            train_transform(Augment(aa=aa), input_size=64)


@pytest.mark.parametrize(
    "aa",
    [
        *("rand", "rand-m0", "rand-m10-n3-p0.25-mstd101-inc0", "rand-m12-mmax12", "rand-t3a-n20"),
        *("rand-m9-tweights-n15", "rand-m9-t3aw-inc1-n14", "augmix", "augmix-m10-w4-d2-a0.5-b1"),
        *("augmix-mstd1.", "original", "originalr-mstd0.5", "v0", "v0r-mstd2", "3a-mstd0.5"),
    ],
)
def test_every_family_and_key_of_timms_is_taken(aa):
    assert Config.from_flat({"aa": aa}).augment.aa == aa
    transform = train_transform(Augment(aa=aa), input_size=64)
    assert drawn(transform, picture(), 0).shape == (3, 64, 64)


@pytest.mark.parametrize("size", [32, 64])
def test_affine_moves_a_square_a_little_and_none_leaves_it(size):
    pixels = np.zeros((size, size, 3), dtype=np.uint8)
    quarter = slice(size // 4, -size // 4)
    pixels[quarter, quarter] = 255
    image = Image.fromarray(pixels)
    still, moved = (
        str(train_transform(replace(PLAIN, affine=degrees), input_size=size)) for degrees in (0, 15)
    )
    assert "RandomAffine" not in still
    assert "RandomAffine" in moved
    transform = train_transform(replace(PLAIN, affine=15), input_size=size)
    steps = [type(step).__name__ for step in transform.transforms]
    assert steps[:2] == [
        "Resize" if size == 32 else "RandomResizedCropAndInterpolation",
        "RandomAffine",
    ]
    assert "RandomCrop" not in steps
    affine = transform.transforms[steps.index("RandomAffine")]
    for index in range(20):
        seed_all(index)
        result = np.asarray(affine(image), dtype=float)[..., 0] / 255
        rows, columns = np.nonzero(result > 0.5)
        assert abs(rows.mean() - (size - 1) / 2) <= 0.1 * size + 1
        assert abs(columns.mean() - (size - 1) / 2) <= 0.1 * size + 1
        assert 0.75 <= result.sum() / (size / 2) ** 2 <= 1.25


@pytest.mark.parametrize("src", [False, True])
def test_three_augment_takes_one_of_three(src):
    augment = replace(THREE, src=src, color_jitter=0, hflip=0)
    transform = train_transform(augment, input_size=48, **SCALE)
    names = [type(step).__name__ for step in transform.transforms]
    assert names[-3:] == ["RandomChoice", "ToTensor", "Normalize"]
    assert "RandomErasing" not in names
    choices = transform.transforms[names.index("RandomChoice")].transforms
    assert [type(choice).__name__ for choice in choices] == ["Grayscale", "RandomSolarize", "Blur"]
    grey = solarised = 0
    for index in range(30):
        result = drawn(transform, picture(48, 48), index)
        assert result.shape == (3, 48, 48)
        grey += bool((result[0] == result[1]).all() and (result[0] == result[2]).all())
        solarised += bool(result.max() <= 128 / 255)
    assert 3 <= grey <= 20
    assert 3 <= solarised <= 20


def test_three_augment_flips_as_often_as_set():
    often, never = (
        str(train_transform(replace(THREE, hflip=share), input_size=48)) for share in (0.3, 0.0)
    )
    assert "RandomHorizontalFlip(p=0.3)" in often
    assert "RandomHorizontalFlip" not in never


def test_a_simple_random_crop_shifts_over_a_mirrored_border():
    resize, crop, *_ = train_transform(replace(THREE, src=True), input_size=48).transforms
    assert resize.size == 48
    assert (crop.size, crop.padding, crop.padding_mode) == ((48, 48), 4, "reflect")


def test_blur_takes_noise_away_by_a_drawn_amount():
    spread = []
    for index in range(20):
        seed_all(index)
        spread.append(np.asarray(Blur()(picture())).std())
    assert max(spread) < np.asarray(picture()).std()
    assert min(spread) < 0.5 * max(spread)


def test_three_augment_jitters_colours_unless_switched_off():
    assert "ColorJitter" in str(train_transform(THREE, input_size=48))
    plain = train_transform(replace(THREE, color_jitter=None), input_size=48)
    assert "ColorJitter" not in str(plain)


@pytest.mark.parametrize(("ratio", "side"), [(0.875, 256), (0.5, 448)])
def test_evaluation_cuts_the_centre_out_of_a_resized_image(ratio, side):
    image, cut = picture(32, 32), (side - 224) // 2
    transform = eval_transform(input_size=224, eval_crop_ratio=ratio, mean=(0, 0, 0), std=(1, 1, 1))
    result = transform(image)
    enlarged = np.array(image.resize((side, side), Image.Resampling.BICUBIC))[cut:-cut, cut:-cut]
    torch.testing.assert_close(result, torch.from_numpy(enlarged).permute(2, 0, 1) / 255)


@pytest.mark.parametrize(("size", "shape"), [((64, 128), (80, 160)), (64, (100, 64))])
def test_evaluation_keeps_the_shape_of_things_in_any_frame(size, shape):
    result = eval_transform(input_size=size, eval_crop_ratio=0.8)(picture(*shape))
    assert result.shape == (3, *((size, size) if isinstance(size, int) else size))


def test_evaluation_cuts_nothing_off_a_small_image():
    image = picture(32, 32)
    result = eval_transform(input_size=32, mean=(0, 0, 0), std=(1, 1, 1))(image)
    torch.testing.assert_close(result, torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)


def test_images_are_normalised_with_imagenets_statistics_or_others():
    grey = Image.new("RGB", (32, 32), (255, 0, 0))
    default = eval_transform(input_size=32)(grey)
    expected = (torch.tensor([1.0, 0, 0]) - torch.tensor(IMAGENET_MEAN)) / torch.tensor(
        IMAGENET_STD
    )
    torch.testing.assert_close(default[:, 0, 0], expected)
    other = eval_transform(input_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1))(grey)
    torch.testing.assert_close(other[:, 0, 0], torch.tensor([2.0, -1, -0.5]))


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5])
def test_a_crop_of_nothing_or_of_more_than_all_is_refused(ratio):
    with pytest.raises(ValueError, match=f"eval_crop_ratio is {ratio}"):
        eval_transform(input_size=224, eval_crop_ratio=ratio)
