"""iNaturalist's lists, spoiled; and categories whose names are no text."""

import json

import pytest

from fambav import cli
from fambav.data import DataError, load
from tests.data.inat import made_inat
from tests.trust.refusals import call, refused
from tests.trust.test_run_files import SPOILED

RECIPE = """--model vim_micro --input-size 16 --data-set INAT --data-stats imagenet --threads 1
    --num_workers 0 --batch-size 8 --epochs 1 --warmup-epochs 0 --no-repeated-aug --device cpu"""
WORDS = RECIPE.split()
LISTS = ("train2018.json", "val2018.json", "categories.json")


@pytest.fixture
def folder(tmp_path):
    return made_inat(tmp_path / "inat")


@pytest.mark.parametrize("harm", SPOILED)
def test_a_spoiled_list_is_named(folder, harm):
    for name in LISTS:
        path = folder / name
        kept = path.read_bytes()
        path.write_bytes(SPOILED[harm](kept))
        with pytest.raises(DataError, match=r"^[^\n]{1,400}$") as refusal:
            load("INAT", folder)
        assert str(path) in str(refusal.value)
        path.write_bytes(kept)


def test_a_spoiled_list_ends_a_command_before_its_folder(folder, tmp_path):
    (folder / LISTS[0]).write_bytes(SPOILED["deep"](b""))
    words = [*WORDS, "--data-path", folder, "--output_dir", tmp_path / "run"]
    refused(*words, names=[folder / LISTS[0]])
    assert not (tmp_path / "run").exists()


def images(value):
    return lambda known: known["images"][0].update(value)


def marks(value):
    return lambda known: known["annotations"][0].update(value)


ENTRIES = {
    "a path that is a number": ("train2018.json", images({"file_name": 3})),
    "a path with zeros": ("train2018.json", images({"file_name": "a\0b.png"})),
    "a path out of the folder": ("train2018.json", images({"file_name": "../../x.png"})),
    "a path from the root": ("train2018.json", images({"file_name": "/etc/passwd"})),
    "no path": ("train2018.json", lambda known: known["images"][0].pop("file_name")),
    "an id that is a list": ("train2018.json", images({"id": []})),
    "a category that is infinite": ("train2018.json", marks({"category_id": float("inf")})),
    "a category that is a half": ("train2018.json", marks({"category_id": 0.5})),
    "a category that is not there": ("train2018.json", marks({"category_id": 9})),
    "a category that is null": ("val2018.json", marks({"category_id": None})),
    "no images": ("train2018.json", lambda known: known.update(images=[], annotations=[])),
    "no held-out images": ("val2018.json", lambda known: known.update(images=[], annotations=[])),
    "images by name": ("train2018.json", lambda known: known.update(images={"a": 1})),
    "an entry that is null": ("categories.json", lambda known: known.__setitem__(1, None)),
    "no categories": ("categories.json", lambda known: known.clear()),
    "a name that is null": ("categories.json", lambda known: known[0].update(name=None)),
    "a name that is true": ("categories.json", lambda known: known[0].update(name=True)),
    "no name": ("categories.json", lambda known: known[1].pop("name")),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_a_wrong_entry_is_one_line(folder, tmp_path, case):
    name, change = ENTRIES[case]
    known = json.loads((folder / name).read_text())
    change(known)
    (folder / name).write_text(json.dumps(known))
    with pytest.raises(DataError, match=r"^[^\n]+$") as refusal:
        load("INAT", folder)
    assert str(folder / name) in str(refusal.value)
    assert len(str(refusal.value)) < 600


def test_what_was_trained_on_categories_without_text_is_taken_again(tmp_path):
    folder = made_inat(tmp_path / "inat", genus=[7, 1.5])
    words = [*WORDS, "--inat-category", "genus", "--data-path", folder]
    run = tmp_path / "run"
    trained = call(*words, "--output_dir", run)
    assert trained.status == 0, trained.err
    for more in (
        ["--resume", run / "checkpoint.pth"],
        ["--eval", "--resume", run / "checkpoint.pth"],
    ):
        found = call(*words, "--output_dir", run, *more)
        assert found.status == 0, found.err
    image = folder / "images/val/0/0.png"
    found = call("predict", run / "checkpoint.pth", image, program=cli.console)
    assert found.status == 0, found.err
    guesses = {line.split("%")[1].strip() for line in found.out.splitlines()[1:]}
    assert guesses == {"7", "1.5"}
