"""The data sets a run may name."""

import json

import numpy as np
import pytest

from fambav.data import DataError, DataSet, fetch, load, read_image
from fambav.data.arrays import IMAGENET_MEAN, IMAGENET_STD
from fambav.data.datasets import hold_out
from fambav.registry import BUILDERS, DATA_SETS
from tests.data.made import made_folder


def test_every_listed_name_has_a_builder():
    assert tuple(BUILDERS.names()) == DATA_SETS


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"data_set is 'CIFAR100'.*did you mean 'CIFAR10'"):
        load("CIFAR100")


def test_digits_never_change():
    data = load("DIGITS")
    assert data.digest == "33c7029ecf7d38ddb44ab362a2e96e5b69a1e59c0e25152692d3c61229797efc"
    assert (len(data.train), len(data.val), data.num_classes) == (1437, 360, 10)
    assert data.notes == (
        "DIGITS: 1,437 images to train and 360 held out, sha256 33c7029ecf7d38dd",
    )


def test_digits_hold_out_every_class_in_proportion():
    data = load("DIGITS")
    held, kept = (np.bincount(part.labels, minlength=10) for part in (data.val, data.train))
    assert np.abs(held - (held + kept) * 360 / 1797).max() < 1
    images = [part.images.reshape(len(part), -1) for part in (data.train, data.val)]
    assert not {image.tobytes() for image in images[0]} & {image.tobytes() for image in images[1]}


def test_a_digit_is_a_small_grey_picture():
    image, label = load("DIGITS").train[0]
    assert (image.mode, image.size, label) == ("RGB", (8, 8), 0)
    pixels = np.asarray(image)
    assert (pixels.min(), pixels.max()) == (0, 239)  # 15 of 16 shades
    assert (pixels[..., 0] == pixels[..., 2]).all()


@pytest.mark.parametrize("count", [0, 1, 7, 50, 99, 100])
def test_holding_out_takes_the_number_asked_for(count):
    labels = np.arange(100) ** 2 % 7
    chosen = hold_out(labels, count=count)
    assert chosen.sum() == count
    held, all_of_them = (np.bincount(part, minlength=7) for part in (labels[chosen], labels))
    assert np.abs(held - all_of_them * count / 100).max() < 1


def test_fake_images_are_a_function_of_place_and_seed():
    data, again = (load("FAKE", classes=7, image_size=(16, 24), seed=1) for _ in range(2))
    other = load("FAKE", classes=7, image_size=(16, 24), seed=2)
    image, label = data.train[9]
    assert (image.mode, image.size, label) == ("RGB", (24, 16), 2)
    assert image.tobytes() == again.train[9][0].tobytes()
    seen = {part[place][0].tobytes() for part in (data.train, data.val) for place in range(8)}
    assert len(seen) == 16
    assert image.tobytes() != other.train[9][0].tobytes()
    assert (data.num_classes, len(data.train), len(data.val)) == (7, 1280, 256)


@pytest.mark.parametrize("name", ["IMNET", "FOLDER"])
def test_folders_are_classes(tmp_path, name):
    data = load(name, made_folder(tmp_path))
    assert (len(data.train), len(data.val), data.num_classes) == (12, 8, 2)
    assert data.class_names == ("cat", "dog")
    image, label = data.train[6]
    assert (image.mode, image.size, label) == ("RGB", (48, 40), 1)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_missing_folder_is_told(tmp_path, part):
    root = made_folder(tmp_path)
    (root / part).rename(root / "elsewhere")
    with pytest.raises(DataError, match=f"missing: {root / part}/; IMNET has to be put there"):
        load("IMNET", root)


def test_classes_without_images_are_told(tmp_path):
    root = made_folder(tmp_path)
    (root / "val" / "emu").mkdir()
    with pytest.raises(DataError, match=r"val is incomplete: .*emu"):
        load("FOLDER", root)


def test_classes_that_differ_are_told(tmp_path):
    root = made_folder(tmp_path)
    (root / "val" / "dog").rename(root / "val" / "emu")
    with pytest.raises(DataError, match="only in one of them: dog, emu"):
        load("FOLDER", root)


@pytest.mark.parametrize("left", [0, 10, 0.6])
def test_a_damaged_image_is_told_by_its_path(tmp_path, left):
    path = made_folder(tmp_path) / "train" / "cat" / "0.png"
    raw = path.read_bytes()
    path.write_bytes(raw[: left if left > 1 else int(left * len(raw))])
    with pytest.raises(DataError, match=r"train/cat/0.png is damaged, expected an image") as caught:
        load("FOLDER", tmp_path).train[0]
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"gone\.png is missing"):
        read_image(tmp_path / "gone.png")


def made_inat(root, *, kingdoms=True):
    """Write iNaturalist 2018 with four categories of two genera; ids follow no order."""
    species = {3: ("Corvus corax", "Corvus"), 0: ("Corvus corone", "Corvus")}
    species |= {2: ("Pica pica", "Pica"), 1: ("Pica nutalli", "Pica")}
    categories = [
        {"id": number, "name": species[number][0], "genus": species[number][1]}
        for number in species
    ]
    (root / "categories.json").write_text(json.dumps(categories))
    made_folder(root / "images", classes=[str(number) for number in species], train=2, val=1)
    for part, count in (("train", 2), ("val", 1)):
        images, annotations = [], []
        for number in species:
            for place in range(count):
                name = len(images)
                file = f"images/Birds/{number}/{part}{place}.png"
                short = root / "images" / str(number) / f"{part}{place}.png"
                path = root / file if kingdoms else short
                path.parent.mkdir(parents=True, exist_ok=True)
                (root / "images" / part / str(number) / f"{place}.png").rename(path)
                images.append({"id": name, "file_name": file})
                annotations.append({"image_id": name, "category_id": number})
        lists = {"images": images, "annotations": annotations}
        (root / f"{part}2018.json").write_text(json.dumps(lists))
    return root


@pytest.mark.parametrize("kingdoms", [True, False])
def test_inaturalist_counts_labels_as_the_training_list_shows_them(tmp_path, kingdoms):
    data = load("INAT", made_inat(tmp_path, kingdoms=kingdoms))
    assert data.class_names == ("Corvus corax", "Corvus corone", "Pica pica", "Pica nutalli")
    assert [label for _, label in data.train.entries] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [data.val[place][1] for place in range(4)] == [0, 1, 2, 3]
    assert data.train[0][0].size == (48, 40)


def test_inaturalist_tells_apart_what_it_is_asked_to(tmp_path):
    data = load("INAT", made_inat(tmp_path), inat_category="genus")
    assert data.class_names == ("Corvus", "Pica")
    assert [label for _, label in data.val.entries] == [0, 0, 1, 1]
    with pytest.raises(DataError, match="inat_category is 'order', expected one of genus, name"):
        load("INAT", tmp_path, inat_category="order")


@pytest.mark.parametrize("name", ["train2018.json", "val2018.json", "categories.json"])
def test_lists_that_are_missing_or_damaged_are_told(tmp_path, name):
    path = made_inat(tmp_path) / name
    whole = path.read_text()
    path.write_text(whole[:-5])
    with pytest.raises(DataError, match=f"{name} is truncated or damaged, expected JSON"):
        load("INAT", tmp_path)
    path.write_text("{}")
    with pytest.raises(DataError, match="do not fit together"):
        load("INAT", tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=f"missing: {name}; INAT has to be put there"):
        load("INAT", tmp_path)


def test_a_class_that_is_only_validated_is_told(tmp_path):
    path = made_inat(tmp_path) / "train2018.json"
    lists = json.loads(path.read_text())
    lists["annotations"] = lists["annotations"][2:]
    path.write_text(json.dumps(lists | {"images": lists["images"][2:]}))
    with pytest.raises(DataError, match="'Corvus corax' is only in the validation list"):
        load("INAT", tmp_path)


def test_sets_without_files_need_nothing_fetched():
    for name in ("DIGITS", "FAKE"):
        fetch(name, "/nowhere")


def test_statistics_are_imagenets_or_the_sets_own():
    digits = load("DIGITS")
    assert digits.statistics("imagenet") == (IMAGENET_MEAN, IMAGENET_STD)
    assert digits.statistics("own") == (digits.mean, digits.std)
    plain = DataSet(name="FOLDER", train=[], val=[], num_classes=2)
    with pytest.raises(ValueError, match="data_stats is 'own', expected 'imagenet' for FOLDER"):
        plain.statistics("own")
    flat = DataSet(name="X", train=[], val=[], num_classes=2, mean=(0,) * 3, std=(0,) * 3)
    with pytest.raises(ValueError, match="data_stats is 'own'"):
        flat.statistics("own")
