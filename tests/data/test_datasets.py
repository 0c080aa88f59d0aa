"""The data sets a run may name."""

import json
import shutil
import struct

import numpy as np
import pytest
from PIL import Image

from fambav.data import DataError, DataSet, fetch, load, read_image
from fambav.data.datasets import hold_out
from fambav.data.types import IMAGENET_MEAN, IMAGENET_STD
from fambav.registry import BUILDERS, DATA_SETS, MADE
from fambav.timm_compat import torchvision
from tests.data.made import made_folder


def test_every_listed_name_has_a_builder():
    assert BUILDERS.names() == list(DATA_SETS)


@pytest.mark.parametrize("name", MADE)
def test_a_loop_over_a_made_set_ends(name):
    data = load(name, classes=2, image_size=(8, 8), lookback=8, horizon=8)
    for part in (data.train, data.val):
        part[len(part) - 1]
        with pytest.raises(IndexError):
            part[len(part)]


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
def test_holding_out_takes_the_number_given(count):
    labels = np.arange(100) ** 2 % 7
    chosen = hold_out(labels, count=count)
    assert chosen.sum() == count
    held, all_of_them = (np.bincount(part, minlength=7) for part in (labels[chosen], labels))
    assert np.abs(held - all_of_them * count / 100).max() < 1


def test_fake_images_are_a_function_of_index_and_seed():
    data, again = (load("FAKE", classes=7, image_size=(16, 24), seed=1) for _ in range(2))
    other = load("FAKE", classes=7, image_size=(16, 24), seed=2)
    image, label = data.train[9]
    assert (image.mode, image.size, label) == ("RGB", (24, 16), 2)
    assert image.tobytes() == again.train[9][0].tobytes()
    seen = {part[index][0].tobytes() for part in (data.train, data.val) for index in range(8)}
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
def test_a_missing_folder_is_reported(tmp_path, part):
    root = made_folder(tmp_path)
    (root / part).rename(root / "elsewhere")
    with pytest.raises(DataError, match=f"missing: {root / part}/; IMNET has to be put there"):
        load("IMNET", root)


def test_classes_without_images_are_reported(tmp_path):
    root = made_folder(tmp_path)
    (root / "val" / "emu").mkdir()
    with pytest.raises(DataError, match=r"val is incomplete: .*emu"):
        load("FOLDER", root)


def test_classes_that_differ_are_reported(tmp_path):
    root = made_folder(tmp_path)
    (root / "val" / "dog").rename(root / "val" / "emu")
    with pytest.raises(DataError, match="only in one of them: dog, emu"):
        load("FOLDER", root)


@pytest.mark.parametrize("left", [0, 10, 0.6])
def test_a_damaged_image_is_reported_by_its_path(tmp_path, left):
    path = made_folder(tmp_path) / "train" / "cat" / "0.png"
    raw = path.read_bytes()
    path.write_bytes(raw[: left if left > 1 else int(left * len(raw))])
    with pytest.raises(DataError, match=r"train/cat/0.png is .*, expected an image") as caught:
        load("FOLDER", tmp_path).train[0]
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"gone\.png is missing"):
        read_image(tmp_path / "gone.png")


LEVELS = (0, 1000, 32896, 65535)
SCALED = [0, 4, 128, 255]  # rounded; Pillow alone says 0, 255, 255, 255


def made_tiff(*, bits, photometric, kind, data, width):
    """Return a TIFF of one grey row; of kind 1 (unsigned), 2 (signed) or 3 (real)."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1}
    tags |= {279: len(data), 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(data)) + data
    return head + struct.pack("<H", len(tags)) + entries + bytes(4)


UNSIGNED = dict(bits=16, photometric=1, kind=1, data=struct.pack("<4H", *LEVELS), width=4)


@pytest.mark.parametrize("name", ["x.png", "x.pgm", "x.tif", "x.jp2", "big-endian", "12 bits"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, name):
    path = tmp_path / name
    if name == "big-endian":
        path.write_bytes(b"P5 4 1 65535\n" + struct.pack(">4H", *LEVELS))
        with Image.open(path) as image:
            image.convert("I;16B").save(path, "TIFF")
    elif name == "12 bits":  # which a PGM tells
        path.write_bytes(b"P5 4 1 4095\n" + struct.pack(">4H", 0, 62, 2056, 4095))
    else:
        Image.fromarray(np.array([LEVELS], dtype="<u2")).save(path)
    image = read_image(path)
    assert image.mode == "RGB"
    assert np.asarray(image)[0].tolist() == [[level] * 3 for level in SCALED]


UNKNOWN = {
    "F": dict(bits=32, kind=3, data=struct.pack("<4f", 0, 0.2, 0.5, 1)),
    "I": dict(bits=32, kind=2, data=struct.pack("<4i", 0, 1000, 32896, 65535)),
    "I (TIFF)": dict(kind=2, data=struct.pack("<4h", 0, 1000, -1, 32767)),
    "I;16": dict(photometric=0),
    "I;16 (TIFF)": dict(bits=12, data=b"\x00\x00\x3e\x80\x8f\xff"),
}


@pytest.mark.parametrize("mode", UNKNOWN)
def test_images_of_unknown_range_are_refused_by_mode(tmp_path, mode):
    path = made_folder(tmp_path) / "train" / "cat" / "0.tif"
    path.write_bytes(made_tiff(**UNSIGNED | UNKNOWN[mode]))
    with Image.open(path) as image:
        assert image.mode == mode.split()[0]
    with pytest.raises(DataError) as caught:
        load("FOLDER", tmp_path).train[1]
    assert str(caught.value).startswith(f"image {path} has mode {mode.split()[0]} (TIFF), expected")
    assert "\n" not in str(caught.value)


def test_a_tiff_of_sixteen_bits_written_by_hand_is_read(tmp_path):
    (tmp_path / "x.tif").write_bytes(made_tiff(**UNSIGNED))
    assert np.asarray(read_image(tmp_path / "x.tif"))[0, :, 0].tolist() == SCALED


def test_sixteen_bits_that_are_cut_off_are_reported(tmp_path):
    Image.fromarray(np.arange(10000, dtype="<u2").reshape(100, 100)).save(tmp_path / "x.png")
    raw = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match=r"x\.png is damaged, expected an image"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize(
    "extension", ["png", "jpg", "jp2", "bmp", "ppm", "pgm", "tif", "webp", "gif"]
)
def test_common_formats_are_read(tmp_path, extension):
    path = tmp_path / f"x.{extension}"
    Image.new("L", (3, 2), 90).save(path)
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", (3, 2))
    assert abs(np.asarray(image).astype(int) - 90).max() <= 2


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PCX", "PDF", "SGI", "TGA"])
def test_other_formats_are_refused_whatever_the_name(tmp_path, kind):
    Image.new("RGB", (16, 16), 90).save(tmp_path / "x.png", kind)
    with pytest.raises(
        DataError, match=r"x\.png is of no known format, expected an image in PNG, JPEG"
    ):
        read_image(tmp_path / "x.png")


def nest(folder, *names):
    """Put the images of a folder into folders within it, one after the other."""
    for index, path in enumerate(sorted(folder.glob("*.png"))):
        inner = folder / names[index % len(names)]
        inner.mkdir(parents=True, exist_ok=True)
        path.rename(inner / path.name)


def test_folders_in_class_folders_are_read_in_torchvisions_order(tmp_path):
    root = made_folder(tmp_path / "set", train=4)
    nest(root / "train" / "cat", "b", "b-c", "b/d", ".")
    made_folder(tmp_path / "other", classes=["emu"])
    (root / "train" / "dog" / "linked").symlink_to(tmp_path / "other" / "train" / "emu")
    (root / "train" / "dog" / "note.txt").write_text("no image")
    found = torchvision.datasets.ImageFolder(str(root / "train")).samples
    assert load("FOLDER", root).train.entries == found
    assert len(found) == 4 + 4 + 6


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "../dog", "inner"])
def test_a_link_to_a_folder_that_is_read_is_refused(tmp_path, target):
    root = made_folder(tmp_path / "set")
    (root / "train" / "cat" / "inner").mkdir()
    link = root / "train" / "cat" / "link"
    link.symlink_to(target)
    with pytest.raises(DataError, match=r"are one folder, expected two; remove the") as caught:
        load("FOLDER", root)
    both = {f"{link} and {link.resolve()} are", f"{link.resolve()} and {link} are"}
    assert any(str(caught.value).startswith(each) for each in both)


def test_a_loop_in_a_folder_elsewhere_is_refused(tmp_path):
    root = made_folder(tmp_path / "set")
    away = made_folder(tmp_path / "away" / "of" / "here", classes=["emu"])
    (root / "train" / "cat" / "emu").symlink_to(away / "train" / "emu")
    (away / "train" / "emu" / "up").symlink_to(tmp_path / "away")
    with pytest.raises(DataError, match=r"/emu/up.* and .* are one folder, expected two"):
        load("FOLDER", root)


def deeper(root, *names):
    """Put what is in train/ and val/ into folders within them."""
    for part in ("train", "val"):
        (root / part).rename(root / "kept")
        for name in names:
            (root / part).mkdir(exist_ok=True)
            shutil.copytree(root / "kept", root / part / name)
        shutil.rmtree(root / "kept")
    return root


def test_a_single_class_is_refused(tmp_path):
    root = made_folder(tmp_path, classes=["cat"])
    with pytest.raises(DataError, match=r"train has one class, cat, expected at least two"):
        load("FOLDER", root)
    (tmp_path / "inat").mkdir()
    made_inat(tmp_path / "inat", genera=1)
    for name, options in (("FAKE", {"classes": 1}), ("INAT", {"inat_category": "genus"})):
        with pytest.raises(DataError, match=rf"num_classes of {name}.* is 1, expected at least 2"):
            load(name, tmp_path / "inat", **options)


@pytest.mark.parametrize("names", ["set", "one/set"])
def test_classes_that_lie_too_deep_are_named(tmp_path, names):
    root = deeper(made_folder(tmp_path), names)
    one = names.split("/")[0]
    with pytest.raises(DataError) as caught:
        load("IMNET", root)
    assert str(caught.value) == (
        f"{root}/train has one class, {one}, expected at least two; are cat, dog the classes? "
        f"then move them to {root}/train"
    )


@pytest.mark.parametrize("inner", ["", "images"])
def test_data_sets_in_the_place_of_classes_are_refused(tmp_path, inner):
    root = deeper(made_folder(tmp_path), f"a/{inner}", f"b/{inner}")
    with pytest.raises(DataError, match=r"train has a, b, which look like .*are cat, dog the clas"):
        load("FOLDER", root)
    extra = root / "train" / "a" / inner / "emu"
    shutil.copytree(extra.parent / "dog", extra)
    with pytest.raises(DataError, match=r"train has a, b, which look like .* one folder up"):
        load("FOLDER", root)


@pytest.mark.parametrize("names", [("set",), ("a", "b")])
def test_the_folder_of_a_data_set_is_named(tmp_path, names):
    """As a set with its parts lies in train/, as one class or several, or right below."""
    whole = made_folder(tmp_path / "whole")
    for part in ("train", "val"):
        for name in names:
            shutil.copytree(whole, tmp_path / "deep" / part / name)
    expected = rf"did you mean --data-path {tmp_path}/deep/train/{names[0]}\?"
    with pytest.raises(DataError, match=expected):
        load("FOLDER", tmp_path / "deep")
    shutil.rmtree(tmp_path / "deep")
    for wrong in (tmp_path, whole / "train", whole / "nowhere"):
        with pytest.raises(DataError, match=rf"missing: .*; did you mean {whole}\?"):
            load("FOLDER", wrong)


def test_parts_of_a_set_are_no_classes(tmp_path):
    root = made_folder(tmp_path / "parts", classes=["train", "val"])
    with pytest.raises(DataError, match=r"has train, val, which look like .* parts of one"):
        load("FOLDER", root)
    root = made_folder(tmp_path / "inner")
    nest(root / "train" / "cat", "Train", "val")
    nest(root / "train" / "dog", "Train", "test")
    with pytest.raises(DataError, match=r"has cat, dog, which look like .* parts of one"):
        load("FOLDER", root)


@pytest.mark.parametrize(
    ("cat", "dog"),
    [
        (["images"], ["images"]),  # as in Tiny ImageNet
        (["tabby", "siamese"], ["poodle", "collie"]),
        (["young", "old"], ["young", "puppy"]),
        (["young", "old"], ["young", "old", "."]),
    ],
)
def test_folders_within_classes_are_ordinary(tmp_path, cat, dog):
    root = made_folder(tmp_path)
    nest(root / "train" / "cat", *cat)
    nest(root / "train" / "dog", *dog)
    data = load("FOLDER", root)
    assert (data.class_names, len(data.train)) == (("cat", "dog"), 12)


def made_inat(root, *, kingdoms=True, genera=2):
    """Write iNaturalist 2018 with four categories of two genera; ids follow no order."""
    species = {3: ("Corvus corax", "Corvus"), 0: ("Corvus corone", "Corvus")}
    species |= {2: ("Pica pica", "Pica"), 1: ("Pica nutalli", "Pica")}
    if genera == 1:
        species = {number: species[number] for number in (3, 0)}
    categories = [
        {"id": number, "name": species[number][0], "genus": species[number][1]}
        for number in species
    ]
    (root / "categories.json").write_text(json.dumps(categories))
    made_folder(root / "images", classes=[str(number) for number in species], train=2, val=1)
    for part, count in (("train", 2), ("val", 1)):
        images, annotations = [], []
        for number in species:
            for index in range(count):
                name = len(images)
                file = f"images/Birds/{number}/{part}{index}.png"
                short = root / "images" / str(number) / f"{part}{index}.png"
                path = root / file if kingdoms else short
                path.parent.mkdir(parents=True, exist_ok=True)
                (root / "images" / part / str(number) / f"{index}.png").rename(path)
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
    assert [data.val[index][1] for index in range(4)] == [0, 1, 2, 3]
    assert data.train[0][0].size == (48, 40)


def test_inaturalist_labels_are_those_of_the_category(tmp_path):
    data = load("INAT", made_inat(tmp_path), inat_category="genus")
    assert data.class_names == ("Corvus", "Pica")
    assert [label for _, label in data.val.entries] == [0, 0, 1, 1]
    with pytest.raises(DataError, match="inat_category is 'order', expected one of genus, name"):
        load("INAT", tmp_path, inat_category="order")


@pytest.mark.parametrize("name", ["train2018.json", "val2018.json", "categories.json"])
def test_lists_that_are_missing_or_damaged_are_reported(tmp_path, name):
    path = made_inat(tmp_path) / name
    whole = path.read_text()
    path.write_text(whole[:-5])
    with pytest.raises(DataError, match=f"{name} is damaged, expected iNaturalist's list: "):
        load("INAT", tmp_path)
    path.write_text("{}")
    with pytest.raises(DataError, match=rf"{name}(: images is missing| is {{}}), expected a list"):
        load("INAT", tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=f"missing: {name}; INAT has to be put there"):
        load("INAT", tmp_path)


def test_a_class_that_is_only_validated_is_reported(tmp_path):
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
