"""Data sets with masks on miniature files in their real layouts, and what is refused of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from fambav.config import Augment
from fambav.data import DataError, folders, load
from fambav.data.masks import EvalMasks, TrainMasks
from fambav.data.palette import Palette, overlay, palette_image
from fambav.data.segments import LAYOUTS
from fambav.data.types import IGNORE
from tests.made import go, refused

STATISTICS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SIX = [(255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0)]


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def blobs(height, width, classes, seed):
    """Labels in blocks of 20 pixels."""
    small = np.random.default_rng(seed).integers(classes, size=(height // 20 + 1, width // 20 + 1))
    return np.kron(small, np.ones((20, 20), dtype=int))[:height, :width]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "palette.yaml").write_text(
        "classes:\n  land: '#0a0000'\n  water: [0, 10, 0]\nignore: ['#000000']\n"
    )
    for part, count in (("train", 3), ("val", 2)):
        for number in range(count):
            labels = blobs(40, 60, 3, number)
            colours = np.array([(10, 0, 0), (0, 10, 0), (0, 0, 0)])[labels]
            save(tmp_path / "images" / part / f"{number}.jpg", np.zeros((40, 60, 3)) + number)
            save(tmp_path / "masks" / part / f"{number}.png", colours)
    return tmp_path


def test_a_folder_of_images_and_coloured_masks(folder):
    found = load("SEGFOLDER", folder)
    assert (len(found.train), len(found.val)) == (3, 2)
    assert (found.class_names, found.uniform) == (("land", "water"), False)
    image, labels = found.train[1]
    assert image.size == (60, 40)
    want = blobs(40, 60, 3, 1)
    assert np.array_equal(labels, np.where(want == 2, IGNORE, want))


def test_masks_of_indices_in_other_folders(folder):
    """As GID-15 is packaged."""
    (folder / "palette.yaml").write_text(
        "classes: {a: 1, b: 2}\nignore: [0]\nimages: images\nmasks: ann_dir\n"
        "mask_suffix: _15label\n"
    )
    for part, count in (("train", 3), ("val", 2)):
        for number in range(count):
            save(folder / "ann_dir" / part / f"{number}_15label.png", blobs(40, 60, 3, number))
    _, labels = load("SEGFOLDER", folder).val[1]
    want = blobs(40, 60, 3, 1)
    assert np.array_equal(labels, np.where(want == 0, IGNORE, want - 1))


def another_size(folder):
    save(folder / "masks" / "val" / "1.png", np.zeros((41, 60, 3)))
    return "masks/val/1.png is 60 x 41, expected 60 x 40 as", "images/val/1.jpg"


def no_mask(folder):
    (folder / "masks" / "train" / "2.png").unlink()
    return "masks/train lacks 1, expected each: 2", ""


def no_image(folder):
    save(folder / "masks" / "train" / "7.png", np.zeros((40, 60, 3)))
    return "masks/train/7.png has no image in", ""


def no_palette(folder):
    (folder / "palette.yaml").unlink()
    return "palette.yaml is missing, expected classes:", ""


def colours_and_indices(folder):
    (folder / "palette.yaml").write_text("classes: {a: '#000000', b: 3}\n")
    return "palette.yaml: 3 is there, expected a colour as the others are", ""


def twice(folder):
    (folder / "palette.yaml").write_text("classes: {a: 3, b: 3}\n")
    return "palette.yaml: 3 is there twice, expected each once", ""


def misspelt(folder):
    (folder / "palette.yaml").write_text("classes: {a: 3, b: 4}\nunknwon: ignore\n")
    return "palette.yaml has 'unknwon', expected classes, ignore, unknown", ""


BROKEN = [no_mask, no_image, no_palette, colours_and_indices, twice, misspelt]


@pytest.mark.parametrize("change", BROKEN, ids=lambda change: change.__name__)
def test_what_does_not_fit_is_refused_when_the_set_is_opened(folder, change):
    words = change(folder)
    with pytest.raises(DataError) as error:
        load("SEGFOLDER", folder)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


WORDS = [
    *("--model", "vssd_nano", "--crop-size", "32"),
    *("--batch-size", "2", "--num_workers", "0", "--device", "cpu"),
]


@pytest.mark.parametrize("change", BROKEN, ids=lambda change: change.__name__)
def test_a_run_refuses_it_in_one_line_before_it_writes(folder, change):
    message, _ = change(folder)
    out = folder / "out"
    words = [*WORDS, "--data-set", "SEGFOLDER", "--data-path", folder, "--output_dir", out]
    assert message in refused(*words)
    assert not out.exists()


def test_a_run_names_a_tile_that_is_missing_and_a_pixel_that_is_unknown(folder):
    out = ("--output_dir", folder / "out")
    write_isprs(folder / "isprs", "POTSDAM", eroded=False)
    (folder / "isprs" / "5_Labels_all" / "top_potsdam_6_9_label.tif").unlink()
    words = [*WORDS, "--data-set", "POTSDAM", "--data-path", folder / "isprs", *out]
    assert "5_Labels_all lacks 1, expected each: top_potsdam_6_9_label.tif" in refused(*words)
    assert not out[1].exists()


def unknown(folder):
    pixels = np.zeros((40, 60, 3))
    pixels[7, 30] = (1, 2, 3)
    for number in range(3):
        save(folder / "masks" / "train" / f"{number}.png", pixels)
    return "png: row 7, column 30 is #010203, expected a colour of the palette", ""


@pytest.mark.parametrize("change", [unknown, another_size], ids=lambda change: change.__name__)
def test_masks_that_do_not_fit_are_refused_before_a_run_or_end_it(folder, change, monkeypatch):
    """Sets that are too large to be read beforehand end a run when it comes to such a mask."""
    out, (message, _) = folder / "out", change(folder)
    words = [*WORDS, "--head-channels", "8", "--data-set", "SEGFOLDER", "--data-path", folder]
    assert message in refused(*words, "--output_dir", out)
    assert not out.exists()
    monkeypatch.setattr(folders, "_READ", 0)
    save(folder / "masks" / "train" / "0.png", np.zeros((40, 60, 3)))  # the one that is still read
    found = go(*words, "--epochs", "1", "--warmup-epochs", "0", "--output_dir", out)
    assert found.status == 5 and found.err.count("\n") == 1
    assert message in found.err


def test_classes_of_a_folder_that_differ_from_the_head_are_refused(folder):
    words = [*WORDS, "--data-set", "SEGFOLDER", "--data-path", folder, "--num-classes", "3"]
    assert "num_classes is 3, expected 2, the classes of SEGFOLDER" in refused(*words)


def damaged(folder):
    (folder / "images" / "val" / "1.jpg").write_bytes(b"no image")
    return "images/val/1.jpg", ""


@pytest.mark.parametrize("change", [another_size, damaged], ids=lambda change: change.__name__)
def test_files_are_opened_when_they_are_read_and_named_if_they_do_not_fit(folder, change):
    words = change(folder)
    found = load("SEGFOLDER", folder)
    assert found.val[0][0].size == (60, 40)
    with pytest.raises(DataError) as error:
        found.val[1]
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_opening_a_set_opens_no_image(folder, monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    assert len(load("SEGFOLDER", folder).train) == 3


def test_an_unknown_colour_is_named_or_ignored(folder):
    path = folder / "masks" / "train" / "0.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[7, 30] = (1, 2, 3)
    save(path, pixels)
    with pytest.raises(DataError, match=r"0\.png: row 7, column 30 is #010203, expected a colour"):
        load("SEGFOLDER", folder).train[0]
    text = (folder / "palette.yaml").read_text()
    (folder / "palette.yaml").write_text(text + "unknown: ignore\n")
    assert load("SEGFOLDER", folder).train[0][1][7, 30] == IGNORE


def write_isprs(root, name, *, eroded=True):
    """Every tile of a benchmark, 90 x 70 pixels; one mask has a pixel of another colour."""
    layout = LAYOUTS[name]
    for number, tile in enumerate(f"{layout.train} {layout.test}".split()):
        colours = np.array(SIX)[blobs(70, 90, 6, number)]
        save(root / layout.image.format(tile), np.full((70, 90, 3), number))
        colours[0, 0] = (9, 9, 9) if number == 0 else colours[0, 0]
        save(root / layout.mask.format(tile), colours)
        if eroded:
            colours[:, ::20] = 0
            save(root / layout.eroded.format(tile), colours)


@pytest.mark.parametrize(("name", "tiles"), [("VAIHINGEN", (12, 4)), ("POTSDAM", (23, 14))])
def test_tiles_of_isprs(tmp_path, name, tiles):
    write_isprs(tmp_path, name)
    found = load(name, tmp_path, image_size=16)
    assert (found.num_classes, found.unscored) == (6, (5,))
    assert found.class_names[5] == "clutter"
    # windows of 32 cover 90 x 70 in 3 x 3
    assert (len(found.train), len(found.val)) == (9 * tiles[0], tiles[1])
    covered = np.zeros((70, 90), dtype=bool)
    for index in range(9):
        left, top, right, bottom = found.train.entries[index].box
        image, labels = found.train[index]
        assert image.size == (32, 32) and labels.shape == (32, 32)
        covered[top:bottom, left:right] = True
    assert covered.all()
    assert found.train[0][1][0, 0] == IGNORE, "a colour that is not in the palette"
    image, labels = found.val[0]
    assert image.size == (90, 70)
    assert (labels[:, ::20] == IGNORE).all(), "the eroded mask"
    want = blobs(70, 90, 6, tiles[0])
    assert (labels == want)[:, 1:20].all()
    assert "eroded masks" in found.notes[0]


def test_tiles_that_are_missing_are_named(tmp_path):
    write_isprs(tmp_path, "VAIHINGEN", eroded=False)
    assert "full masks" in load("VAIHINGEN", tmp_path, image_size=16).notes[0]
    (tmp_path / "top" / "top_mosaic_09cm_area15.tif").unlink()
    with pytest.raises(DataError, match=r"top lacks 1, expected each: top_mosaic_09cm_area15\.tif"):
        load("VAIHINGEN", tmp_path, image_size=16)


@pytest.mark.parametrize("inner", ["", "ADEChallengeData2016"])
def test_ade20k(tmp_path, inner):
    root = tmp_path / inner
    for part, short, count in (("training", "train", 2), ("validation", "val", 1)):
        for number in range(count):
            name = f"ADE_{short}_{number + 1:08d}"
            save(root / "images" / part / f"{name}.jpg", np.zeros((30, 45, 3)))
            save(root / "annotations" / part / f"{name}.png", blobs(30, 45, 151, number))
    found = load("ADE20K", tmp_path)
    assert (found.num_classes, len(found.train), len(found.val)) == (150, 2, 1)
    want = blobs(30, 45, 151, 1)
    assert np.array_equal(found.train[1][1], np.where(want == 0, IGNORE, want - 1))
    assert found.class_names[0] == "class 1"
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    lines += [f"{n}\t0\t0\t0\t0\tname{min(n, 149)}, other" for n in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(lines))
    names = load("ADE20K", tmp_path).class_names
    assert names[:1] + names[148:] == ("name1", "name149 149", "name149 150")


def pair(height, width):
    """An image whose red channel is its mask."""
    labels = blobs(height, width, 6, 0).astype(np.uint8)
    pixels = np.stack([labels, labels * 0, labels * 0], axis=-1)
    return Image.fromarray(pixels), labels


@pytest.mark.parametrize("size", [(80, 100), (20, 30)])
def test_image_and_mask_are_cut_and_mirrored_alike(size):
    augment = Augment(color_jitter=None, hflip=0.5, vflip=0.5, resize_range=(1.0, 1.0))
    transform = TrainMasks(augment, (32, 48), STATISTICS)
    torch.manual_seed(0)
    views = [transform(*pair(*size)) for _ in range(8)]
    for image, labels in views:
        assert image.shape == (3, 32, 48) and image.dtype == torch.float32
        assert labels.shape == (32, 48) and labels.dtype == torch.int64
        red = (image[0] * 0.5 + 0.5) * 255
        known = labels != IGNORE
        assert torch.equal(red[known].round().long(), labels[known])
        assert known.all() if size == (80, 100) else known.sum() == 20 * 30
    assert len({view[1].numpy().tobytes() for view in views}) > 2


def test_resized_masks_keep_their_labels():
    transform = TrainMasks(Augment(resize_range=(0.5, 2.0)), (32, 32), STATISTICS)
    torch.manual_seed(0)
    for _ in range(5):
        _, labels = transform(*pair(80, 100))
        assert set(labels.unique().tolist()) <= {*range(6), IGNORE}


def test_evaluation_takes_an_image_whole():
    image, labels = EvalMasks(STATISTICS)(*pair(33, 47))
    assert image.shape == (3, 33, 47) and labels.shape == (33, 47)
    assert torch.equal(EvalMasks(STATISTICS)(pair(33, 47)[0]), image)
    with pytest.raises(ValueError, match="mask is 47 x 32, expected 47 x 33 as its image"):
        EvalMasks(STATISTICS)(pair(33, 47)[0], pair(32, 47)[1])


def test_masks_become_pictures_and_are_read_again(tmp_path):
    _, labels = pair(40, 40)
    palette_image(labels).save(tmp_path / "a.png")
    palette = Palette.of({name: n for n, name in enumerate("abcdef")})
    assert np.array_equal(palette.read(tmp_path / "a.png"), labels)
    assert overlay(pair(40, 40)[0], labels).size == (40, 40)
