"""Files of runs, grids and exports that a disk, an editor or another program has spoiled."""

import json
import shutil

import pytest

import fambav
from fambav import cli
from fambav.config import ConfigError
from fambav.engine.checkpoint import CheckpointError
from tests.export.made import weights
from tests.trust.refusals import call, content, refused, the_line

DEEP = b"[" * 100_000
# What may happen to a line or a file of JSON that holds an object.
SPOILED = {
    "a flipped bit": lambda raw: b"\x93" + raw[1:],
    "a flipped bit inside": lambda raw: raw[:9] + bytes([raw[9] ^ 0x80]) + raw[10:],
    "zeros": lambda raw: bytes(len(raw)),
    "deep lists": lambda raw: DEEP,
    "deep objects": lambda raw: b'{"a":' * 100_000,
    "deep lists inside": lambda raw: raw.rstrip()[:-1] + b', "more": ' + DEEP,
    "a list": lambda raw: b"[1, 2]",
    "a list of pairs": lambda raw: b'[["share", 0.5]]',
    "text": lambda raw: b'"abc"',
    "null": lambda raw: b"null",
    "a long number": lambda raw: b"1" * 5000,
    "another encoding": lambda raw: raw.decode().encode("utf-16"),
}


def edited(**changes):
    """Give some entries other values; written as text, since Python reads more than JSON is."""

    def change(raw):
        known = json.loads(raw)
        places = {name: f"place of {name}" for name in changes}
        text = json.dumps({**known, **places})
        for name, value in changes.items():
            text = text.replace(json.dumps(places[name]), value)
        return text.encode()

    return change


def without(name):
    return lambda raw: json.dumps({k: v for k, v in json.loads(raw).items() if k != name}).encode()


@pytest.fixture
def folder(whole, tmp_path):
    """A finished run of one's own."""
    return shutil.copytree(whole, tmp_path / "run")


def spoil(path, change):
    """Change a file, or the first line of a log."""
    raw = path.read_bytes()
    if path.name != "log.txt":
        path.write_bytes(change(raw))
        return
    first, *rest = raw.splitlines(keepends=True)
    path.write_bytes(b"".join([change(first.rstrip(b"\n")) + b"\n", *rest]))


LOG = {
    **SPOILED,
    "an infinite accuracy": edited(test_acc1="1e400"),
    "an infinite time": edited(train_seconds="1e400"),
    "an infinite speed": edited(images_per_second="Infinity"),
    "memory of 400 digits": edited(peak_memory_mib="1" + "0" * 400),
    "an infinite epoch": edited(epoch="1e400"),
    "an epoch that is text": edited(epoch='"first"'),
    "an accuracy that is text": edited(test_acc1='"high"'),
    "a time that is a list": edited(train_seconds="[1]"),
    "no time": without("train_seconds"),
    "no epoch": without("epoch"),
    "no accuracy": without("test_acc1"),
}
READERS = {
    "table": lambda folder: ["table", folder],
    "report": lambda folder: ["report", folder, "--no-class-accuracy"],
    "show": lambda folder: ["show", folder, "--what", "curves"],
}
AGAIN = {
    "log.txt": (*SPOILED, "an infinite time", "a time that is a list"),
    **dict.fromkeys(
        ("metrics.csv", "plan.json", "env.json", "config.yaml"), ("zeros", "deep lists")
    ),
}


@pytest.fixture
def nothing_is_drawn(monkeypatch):
    """Files are looked at before pictures are drawn, which takes half a minute."""

    def drawn(*given, **options):
        raise AssertionError("drawn before the files were looked at")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", drawn)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("harm", LOG)
@pytest.mark.usefixtures("nothing_is_drawn")
def test_a_spoiled_line_of_a_log_is_named(folder, harm, reader):
    spoil(folder / "log.txt", LOG[harm])
    before = content(folder)
    refused(*READERS[reader](folder), names=[folder / "log.txt"], program=cli.console)
    assert content(folder) == before


@pytest.mark.parametrize(
    ("name", "harm"), [(name, harm) for name, harms in AGAIN.items() for harm in harms]
)
def test_a_resumed_run_writes_spoiled_files_again(whole, recipe, folder, harm, name):
    spoil(folder / name, LOG[harm])
    found = call(*recipe, "--resume", "auto", "--output_dir", folder)
    assert found.status == 0, found.err
    lines = [(at / "log.txt").read_text().splitlines() for at in (folder, whole)]
    assert len(lines[0]) == len(lines[1])
    for ours, theirs in zip(*lines, strict=True):
        own, kept = json.loads(ours), json.loads(theirs)
        assert {**own, "save_seconds": 0} == {**kept, "save_seconds": 0}
    assert json.loads((folder / "plan.json").read_text())["share"] < 1
    assert json.loads((folder / "env.json").read_text())["processes"] == 1


PLAN = {
    **SPOILED,
    "no share": without("share"),
    "a share that is text": edited(share='"half"'),
    "a share that is true": edited(share="true"),
    "an infinite share": edited(share="1e400"),
    "a share of 400 digits": edited(share="1" + "0" * 400),
    "lengths that are a number": edited(lengths="3"),
    "lengths that are text": edited(lengths='["a", "b"]'),
    "fewer counts": edited(counts="[1]"),
    "no lengths": without("lengths"),
}
ENVIRONMENT = {
    **SPOILED,
    "packages that are a number": edited(packages="3"),
    "a processor that is a list": edited(cpu="[[]]"),
    "threads of 400 digits": edited(threads="1" + "0" * 400),
    "no processor": without("cpu"),
    "no packages": without("packages"),
}


@pytest.mark.parametrize("reader", ["table", "report"])
@pytest.mark.parametrize("harm", PLAN)
@pytest.mark.usefixtures("nothing_is_drawn")
def test_a_spoiled_plan_is_named(folder, harm, reader):
    spoil(folder / "plan.json", PLAN[harm])
    refused(*READERS[reader](folder), names=[folder / "plan.json"], program=cli.console)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("harm", ENVIRONMENT)
def test_a_spoiled_description_of_a_machine_is_named_or_shown(folder, harm):
    spoil(folder / "env.json", ENVIRONMENT[harm])
    found = call("table", folder, program=cli.console)
    if found.status:
        the_line(found, folder / "env.json")
    else:
        assert harm not in SPOILED


GRID = {
    **SPOILED,
    "no rows": without("rows"),
    "rows that are a number": edited(rows="3"),
    "a row that is a number": edited(rows="[3]"),
    "a row that is empty": edited(rows="[{}]"),
    "a title that is a list": edited(title="[1]"),
    "figures that are text": edited(rows='[{"name": "a", "phases": {"dense": {"acc1": "high"}}}]'),
    "cells that are a number": edited(cells="3"),
}


@pytest.fixture
def grid(tmp_path):
    """The results of a grid, as one without finished cells leaves them."""
    known = dict(grid="made", title="made", train="scratch", phase="trained", names=["strategy"])
    known |= dict(seeds=[0], baseline="none", paper=None, rows=[], cells=[])
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid/results.json").write_text(json.dumps(known))
    return tmp_path / "grid"


@pytest.mark.parametrize("reader", ["pareto", "report"])
@pytest.mark.parametrize("harm", GRID)
@pytest.mark.usefixtures("nothing_is_drawn")
def test_spoiled_results_of_a_grid_are_named(grid, harm, reader):
    spoil(grid / "results.json", GRID[harm])
    before = content(grid)
    refused(reader, grid, names=[grid / "results.json"], program=cli.console)
    assert content(grid) == before


EXPORTED = {
    **SPOILED,
    "no settings": edited(fambav="{}"),
    "settings that are a list": edited(fambav='{"settings": [1], "class_token": "middle"}'),
    "settings that are deep": edited(
        fambav='{"class_token": "middle", "settings": {"model": %s}}' % ("[" * 900 + "]" * 900)
    ),
    "a part that is a list": edited(fambav="[1]"),
    "a part that is null": edited(fambav="null"),
    "names that are a number": edited(label_names="3"),
    "names that are numbers": edited(label_names="[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]"),
    "names that are a text": edited(label_names='"0123456789"'),
    "no description of images": without("pretrained_cfg"),
    "images that are a list": edited(pretrained_cfg="[1]"),
    "an infinite mean": edited(pretrained_cfg='{"mean": [1e400, 0, 0], "std": [1, 1, 1]}'),
    "a mean of 400 digits": edited(
        pretrained_cfg='{"mean": [1%s, 0, 0], "std": [1, 1, 1]}' % ("0" * 400)
    ),
    "a mean of four": edited(pretrained_cfg='{"mean": [0, 0, 0, 0], "std": [1, 1, 1]}'),
    "a mean by name": edited(pretrained_cfg='{"mean": {"r": 0}, "std": [1, 1, 1]}'),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    place = tmp_path_factory.mktemp("exported")
    settings = dict(input_size=32, patch_size=8, data_stats="own")
    weights(place / "checkpoint.pth", class_token="middle", **settings)
    words = ["export", place / "checkpoint.pth", "--format", "hf", "--noise", "--images", 1]
    assert call(*words, "--output_dir", place / "hf", program=cli.console).status == 0
    return place / "hf"


@pytest.mark.parametrize("harm", EXPORTED)
def test_a_spoiled_description_of_an_exported_model_is_named(exported, tmp_path, harm):
    folder = shutil.copytree(exported, tmp_path / "hf")
    spoil(folder / "config.json", EXPORTED[harm])
    with pytest.raises((CheckpointError, ConfigError), match=r"^[^\n]+$") as refusal:
        fambav.from_pretrained(folder)
    assert str(folder) in str(refusal.value)
