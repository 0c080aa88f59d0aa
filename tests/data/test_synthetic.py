"""SHAPES100, the set that is generated on the fly."""

import functools

import numpy as np
import pytest

from fambav.data import fetch, load, synthetic
from fambav.data.types import digest


@functools.cache
def whole():
    return load("SHAPES100")


def parts():
    return whole().train, whole().val


def middles(image):
    """Height of the centre of brightness of the upper and of the lower half, from the top."""
    bright = np.maximum(image.astype(float).mean(axis=-1) - 90, 0)
    rows = np.arange(16)[:, None]
    return [(half * rows).sum() / half.sum() for half in (bright[:16], bright[16:])]


def test_the_images_are_the_same_on_every_machine():
    few = synthetic.shapes100(counts=(300, 100))
    assert digest(few.train) == "4af33256ff6984eebce8cd46042254df17a61ac63318697805f6a701703adaa2"
    assert digest(few.val) == "d152b3a462a2115bff35311314cb0acb77c5b3a5b5053c1dccd2b6454d05c67a"


def test_the_whole_set_never_changes():
    assert whole().digest == "11791e5c2b16292dadd2740e5f22feb79cfe76eabf1d61e0caefc691d3115afd"
    assert whole().notes == (
        "SHAPES100: 10,000 images made to train and 2,000 held out, sha256 11791e5c2b16292d",
    )


def test_a_smaller_set_is_the_beginning_of_the_whole():
    few = synthetic.shapes100(counts=(700, 101))  # neither is a whole number of chunks
    for part, small in zip(parts(), (few.train, few.val), strict=True):
        assert np.array_equal(small.images, part.images[: len(small)])
        assert np.array_equal(small.labels, part.labels[: len(small)])


def test_an_image_is_a_function_of_its_part_and_index():
    places = np.array([1234, 7])
    again = synthetic.render("train", places, whole().train.labels[places])
    assert np.array_equal(again, whole().train.images[places])
    other = synthetic.render("val", places, whole().train.labels[places])
    assert not np.array_equal(again, other)


@pytest.mark.parametrize("wish", [{"seed": 7}, {"image_size": (8, 8)}, {"classes": 3}])
def test_what_a_run_asks_for_does_not_change_the_set(monkeypatch, wish):
    small = synthetic.shapes100(counts=(100, 100))
    monkeypatch.setattr(synthetic, "shapes100", lambda: small)
    assert load("SHAPES100", "/nowhere", **wish) is small


@pytest.mark.parametrize("name", ["train", "val"])
def test_every_class_is_shown_as_often(name):
    part = getattr(whole(), name)
    counts = np.bincount(part.labels, minlength=100)
    assert (counts == len(part) // 100).all()
    assert len(set(part.labels[:100])) == 100


def test_no_image_is_held_out_and_learnt_from():
    seen = [{image.tobytes() for image in part.images} for part in parts()]
    assert [len(images) for images in seen] == [10_000, 2_000]
    assert not seen[0] & seen[1]


@pytest.mark.parametrize("name", ["train", "val"])
def test_an_image_has_32_by_32_pixels_in_colour(name):
    part = getattr(whole(), name)
    image, label = part[len(part) - 1]
    assert (image.mode, image.size, label) == ("RGB", (32, 32), int(part.labels[-1]))
    assert part.images.dtype == np.uint8
    assert part.images.shape == (len(part), 32, 32, 3)


def test_a_place_that_is_not_there_is_refused():
    with pytest.raises(IndexError):
        whole().val[2000]


def test_it_needs_nothing_fetched_and_no_folder():
    fetch("SHAPES100", "/nowhere")
    assert whole().num_classes == 100


def test_a_class_names_the_upper_and_the_lower_shape():
    assert len(set(whole().class_names)) == 100
    forms = list(synthetic.FORMS)
    assert whole().class_names[37] == f"{forms[3]} over {forms[7]}" == "frame over hourglass"


def test_the_first_shape_of_the_name_is_the_upper_one():
    # in the mean of many images a tee's bar is high and a triangle's base is low
    names = list(synthetic.FORMS)
    tee_over_triangle, triangle_over_tee = (
        np.concatenate([part.images[part.labels == label] for part in parts()]).mean(axis=0)
        for label in (
            10 * names.index("tee") + names.index("triangle"),
            10 * names.index("triangle") + names.index("tee"),
        )
    )
    upper, lower = middles(tee_over_triangle)
    assert upper < 7.5 < lower
    upper, lower = middles(triangle_over_tee)
    assert lower < 7.5 < upper


@pytest.mark.parametrize("name", synthetic.FORMS)
def test_a_mirrored_shape_is_a_shape_of_the_same_class(name):
    # so that --hflip keeps the class: every form is its own mirror image, and any turn may come
    # with either sign, from any position as far on the other side
    u, v = np.meshgrid(np.arange(-400, 401, dtype=np.int32), np.arange(-400, 401, dtype=np.int32))
    inside = synthetic.FORMS[name](u, v)
    assert np.array_equal(inside, inside[:, ::-1])
    left, right = (
        synthetic.coverage(
            synthetic.FORMS[name], *np.array([[x], [128], [60], [turn]], dtype=np.int32)
        )[0]
        for x, turn in ((108, 17), (256 - 108, -17))
    )
    assert abs(left[:, ::-1] - right).sum() < 0.05 * left.sum()  # points on an edge go either way


def test_turns_and_sides_are_as_likely_either_way():
    rng = synthetic.CounterRNG("train", np.arange(2000))
    turns = rng.uniform(-20, 20)
    assert (turns.min(), turns.max()) == (-20, 20)
    assert abs(turns.mean()) < 1
    noise = rng.triangular(8, 8, 3)
    assert abs(noise.mean()) < 1
    assert 99 < noise.std() < 110  # of the difference of two even draws from 0 to 255: 104.5


def test_a_shape_is_brighter_than_what_surrounds_it():
    images = whole().train.images[:1000].astype(float).mean(axis=-1)
    assert images[:, 5:11, 13:19].mean() > images[:, 5:11, :4].mean() + 40


@pytest.mark.parametrize("form", synthetic.FORMS)
def test_no_two_shapes_are_alike(form):
    where = [np.array([n], dtype=np.int32) for n in (128, 128, 56, 0)]
    covers = {name: synthetic.coverage(rule, *where)[0] for name, rule in synthetic.FORMS.items()}
    mine = covers.pop(form)
    for other in covers.values():
        assert abs(mine - other).sum() > 4 * 20  # 20 pixels
