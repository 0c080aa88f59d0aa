"""The files of a run folder."""

import csv
import json
import sys

import pytest

from fambav.engine.run_dir import Recorder, environment, prepare, set_aside
from tests.identical import scalars


def record(epoch, **more):
    return {"epoch": epoch, "train_loss": 1 / (epoch + 1), "tokens": [65, 53], **more}


def lines(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def never(text):
    raise AssertionError(text)


@pytest.fixture
def begun(tmp_path):
    recorder = Recorder(tmp_path, [], updates=0, warn=never)
    for epoch in range(3):
        recorder.epoch(record(epoch, seconds=epoch + 0.5))
        recorder.updates(2 * epoch + 2, [0.5, 0.25], 1e-3)
    recorder.close()
    return tmp_path


def test_log_and_table_hold_one_row_per_epoch(begun):
    assert lines(begun) == [record(epoch, seconds=epoch + 0.5) for epoch in range(3)]
    rows = list(csv.DictReader((begun / "metrics.csv").read_text().splitlines()))
    assert [float(row["train_loss"]) for row in rows] == [1 / 1, 1 / 2, 1 / 3]
    assert rows[0]["tokens"] == "65 53"
    assert list(begun.glob("events.*"))


def going_on(folder, epochs, *, warn=never):
    """Go on behind so many epochs of `begun`, as the checkpoint has them."""
    history = [record(epoch, seconds=epoch + 0.5) for epoch in range(epochs)]
    return Recorder(folder, history, updates=2 * epochs, warn=warn)


def test_going_on_cuts_back_to_the_checkpoint(begun):
    recorder = going_on(begun, 2)
    recorder.epoch(record(2, seconds=9.0))
    recorder.close()
    assert [line["seconds"] for line in lines(begun)] == [0.5, 1.5, 9.0]
    rows = list(csv.DictReader((begun / "metrics.csv").read_text().splitlines()))
    assert [row["seconds"] for row in rows] == ["0.5", "1.5", "9.0"]


def test_a_line_that_a_crash_cut_short_is_written_again(begun):
    log = begun / "log.txt"
    log.write_text(log.read_text()[:-20])
    going_on(begun, 3).close()
    assert [line["seconds"] for line in lines(begun)] == [0.5, 1.5, 2.5]


DAMAGES = {
    "a digit of the first epoch": (b"0.5", b"0.7"),
    "a digit of the last epoch": (b"2.5", b"9.5"),
    "a byte that is no text": (b"0.5", b"0\xff5"),
    "a byte that ends a line": (b"0.5", b"0\n5"),
}


@pytest.mark.parametrize("name", ["log.txt", "metrics.csv"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_is_believed_where_a_file_says_something_else(begun, name, damage):
    whole, said = {path: path.read_bytes() for path in begun.glob("*.*") if path.is_file()}, []
    path = begun / name
    path.write_bytes(whole[path].replace(*DAMAGES[damage], 1))
    assert path.read_bytes() != whole[path]
    going_on(begun, 3, warn=said.append).close()
    assert said == [f"{name} differs from the checkpoint's history; it is written anew from that"]
    for kept in ("log.txt", "metrics.csv"):
        assert (begun / kept).read_bytes() == whole[begun / kept]


def test_the_time_of_a_save_is_kept_which_its_own_checkpoint_cannot_know(tmp_path):
    recorder = Recorder(tmp_path, [], updates=0, warn=never)
    for epoch in range(2):
        recorder.epoch(record(epoch, save_seconds=0.25))
    recorder.close()
    history = [record(0, save_seconds=0.25), record(1, save_seconds=0.0)]
    for _ in range(2):
        Recorder(tmp_path, history, updates=4, warn=never).close()
        assert [line["save_seconds"] for line in lines(tmp_path)] == [0.25, 0.25]


def test_going_on_keeps_the_events_of_what_is_done(begun):
    before = scalars(begun)
    assert [step for step, _ in before["update/loss"]] == [0, 1, 2, 3, 4, 5]
    recorder = going_on(begun, 2)
    recorder.close()
    assert scalars(begun) == {
        name: [(step, value) for step, value in points if step < (4 if "update" in name else 2)]
        for name, points in before.items()
    }
    assert len(list(begun.glob("events.*"))) == 1


def test_events_that_a_crash_cut_off_are_written_again(begun):
    before = scalars(begun)
    (path,) = begun.glob("events.*")
    path.write_bytes(path.read_bytes()[:200])
    going_on(begun, 3).close()
    after = scalars(begun)
    for name in ("epoch/train_loss", "epoch/seconds"):
        assert after[name] == before[name]


def test_events_of_others_stay(tmp_path):
    other = tmp_path / "events.out.tfevents.other"
    other.write_bytes(b"mine")
    Recorder(tmp_path, [record(0)], updates=2, warn=never).close()
    assert other.read_bytes() == b"mine"


def test_going_on_elsewhere_brings_the_history_along(tmp_path):
    Recorder(tmp_path, [record(0), record(1)], updates=4, warn=never).close()
    assert lines(tmp_path) == [record(0), record(1)]


def test_missing_tensorboard_is_said_once_and_nothing_else_is_lost(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = []
    recorder = Recorder(tmp_path, [], updates=0, warn=said.append)
    recorder.updates(1, [0.5], 1e-3)
    recorder.epoch(record(0))
    recorder.close()
    assert said == ["no TensorBoard events are written: pip install tensorboard"]
    assert lines(tmp_path) == [record(0)]


def test_an_earlier_run_is_moved_and_not_lost(begun):
    (begun / "checkpoint.pth").write_text("weights")
    (begun / "notes.md").write_text("mine")
    kept = set_aside(begun)
    assert kept.parent == begun
    assert {p.name.split(".")[0] for p in kept.iterdir()} == {
        "checkpoint",
        "log",
        "metrics",
        "events",
    }
    assert sorted(p.name for p in begun.iterdir()) == sorted([kept.name, "notes.md"])
    assert set_aside(begun) is None


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    prepare(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError, match="file"):
        prepare(file)
    with pytest.raises(OSError, match="file"):
        prepare(file / "below")


def test_environment_is_plain_and_names_versions_and_command():
    found = environment(processes=2)
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"]
    assert found["command"] == sys.argv
    assert found["processes"] == 2
