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

DEEP = b'[{"a":' * 50_000
# What may happen to a line or a file of JSON that holds an object.
SPOILED = {
    "a flipped bit inside": lambda raw: raw[:9] + bytes([raw[9] ^ 0x80]) + raw[10:],
    "zeros": lambda raw: bytes(len(raw)),
    "deep": lambda raw: DEEP,
    "deep inside": lambda raw: raw.rstrip()[:-1] + b', "more": ' + DEEP,
    "deep for people": lambda raw: b'{"a":' * 40 + b"1" + b"}" * 40,
    "a list of pairs": lambda raw: b'[["share", 0.5]]',
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
    "no time at all": edited(train_seconds="0"),
    "an epoch before the first": edited(epoch="-1"),
    "no epoch": without("epoch"),
    "no time": without("train_seconds"),
    "no accuracy": without("test_acc1"),
}
DEIT = ("no time", "no accuracy")  # curves draw what a log of other code has
READERS = {
    "table": lambda folder: ["table", folder],
    "report": lambda folder: ["report", folder, "--no-class-accuracy"],
    "show": lambda folder: ["show", folder, "--what", "curves"],
}


@pytest.fixture
def nothing_is_drawn(monkeypatch):
    """Files are looked at before pictures are drawn, which takes half a minute."""

    def drawn(*given, **options):
        raise AssertionError("drawn before the files were looked at")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", drawn)


FEW = ("a flipped bit inside", "deep", "no epoch")


@pytest.mark.parametrize(
    ("harm", "reader"),
    [*((harm, "table") for harm in LOG), *((h, r) for h in FEW for r in ("report", "show"))],
)
@pytest.mark.usefixtures("nothing_is_drawn")
def test_a_spoiled_line_of_a_log_is_named(folder, harm, reader):
    spoil(folder / "log.txt", LOG[harm])
    before = content(folder)
    refused(*READERS[reader](folder), names=[folder / "log.txt: line 1"], program=cli.console)
    assert content(folder) == before


@pytest.mark.parametrize("harm", DEIT)
def test_curves_draw_what_a_log_has(folder, harm):
    spoil(folder / "log.txt", LOG[harm])
    found = call(*READERS["show"](folder), program=cli.console)
    assert found.status == 0, found.err
    assert (folder / "pictures/curves.png").is_file()


def test_a_last_line_that_was_not_cut_short_counts(folder):
    log = folder / "log.txt"
    log.write_bytes(log.read_bytes() + b"\0\0")
    assert call("table", folder, program=cli.console).status == 0
    log.write_bytes(log.read_bytes() + b"\n")
    refused("table", folder, names=[f"{log}: line 4"], program=cli.console)


def test_an_epoch_of_skipped_updates_has_no_loss(folder):
    spoil(folder / "log.txt", edited(train_loss="NaN"))
    assert call("table", folder, program=cli.console).status == 0


@pytest.mark.parametrize("harm", ["zeros", "deep", "deep inside", "a time that is a list"])
def test_a_resumed_run_writes_spoiled_files_again(whole, recipe, folder, harm):
    spoil(folder / "log.txt", LOG[harm])
    for name in ("metrics.csv", "plan.json", "env.json", "config.yaml"):
        if harm in ("zeros", "deep"):
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
    "a share that is true": edited(share="true"),
    "an infinite share": edited(share="1e400"),
    "a share above 1": edited(share="1.5"),
    "lengths that are a number": edited(lengths="3"),
    "lengths that are text": edited(lengths='["a", "b"]'),
    "fewer counts": edited(counts="[1]"),
    "no lengths": without("lengths"),
}
ENVIRONMENT = {
    **{harm: SPOILED[harm] for harm in ("deep", "deep for people", "a list of pairs")},
    "packages that are a number": edited(packages="3"),
    "a processor that is a list": edited(cpu="[[]]"),
    "threads of 400 digits": edited(threads="1" + "0" * 400),
    "no processor": without("cpu"),
    "no packages": without("packages"),
}


@pytest.mark.parametrize(
    ("harm", "reader"), [*((harm, "table") for harm in PLAN), ("fewer counts", "report")]
)
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


ROW = dict(name="a", labels=["a"], baseline=True, method="none", settings={}, paper=None)
ROW["phases"] = {"scratch": {"acc1": {"mean": "high", "std": None, "count": 1}}}
GRID = {
    "deep": SPOILED["deep"],
    "a list of pairs": SPOILED["a list of pairs"],
    "no rows": without("rows"),
    "rows that are a number": edited(rows="3"),
    "a row that is a number": edited(rows="[3]"),
    "a row that is empty": edited(rows="[{}]"),
    "a figure that is text": edited(rows=json.dumps([ROW])),
    "a title that is a list": edited(title="[1]"),
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


@pytest.mark.parametrize(
    ("harm", "reader"), [*((harm, "pareto") for harm in GRID), ("no rows", "report")]
)
@pytest.mark.usefixtures("nothing_is_drawn")
def test_spoiled_results_of_a_grid_are_named(grid, harm, reader):
    spoil(grid / "results.json", GRID[harm])
    before = content(grid)
    refused(reader, grid, names=[grid / "results.json"], program=cli.console)
    assert content(grid) == before


EXPORTED = {
    "deep": SPOILED["deep"],
    "another encoding": SPOILED["another encoding"],
    "no settings": edited(fambav="{}"),
    "settings that are a list": edited(fambav='{"settings": [1], "class_token": "middle"}'),
    "settings that are deep": edited(
        fambav='{"class_token": "middle", "settings": {"model": %s}}' % ("[" * 900 + "]" * 900)
    ),
    "a part that is a list": edited(fambav="[1]"),
    "names that are a number": edited(label_names="3"),
    "fewer names": edited(label_names='["a", "b"]'),
    "names that are a text": edited(label_names='"0123456789"'),
    "no description of images": without("pretrained_cfg"),
    "images that are a list": edited(pretrained_cfg="[1]"),
    "a mean of 400 digits": edited(
        pretrained_cfg='{"mean": [1%s, 0, 0], "std": [1, 1, 1]}' % ("0" * 400)
    ),
    "a mean of four": edited(pretrained_cfg='{"mean": [0, 0, 0, 0], "std": [1, 1, 1]}'),
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
