"""The files of a run folder."""

import csv
import json
import sys

import pytest

from fambav.engine.record import Recorder, environment, prepare, set_aside


def record(epoch, **more):
    return {"epoch": epoch, "train_loss": 1 / (epoch + 1), "tokens": [65, 53], **more}


def lines(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def never(text):
    raise AssertionError(text)


@pytest.fixture
def begun(tmp_path):
    recorder = Recorder(tmp_path, [], warn=never)
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


def test_going_on_cuts_back_to_the_checkpoint_and_keeps_written_lines(begun):
    history = [record(epoch, seconds=-1.0) for epoch in range(2)]
    recorder = Recorder(begun, history, warn=never)
    recorder.epoch(record(2, seconds=9.0))
    recorder.close()
    assert [line["seconds"] for line in lines(begun)] == [0.5, 1.5, 9.0]
    rows = list(csv.DictReader((begun / "metrics.csv").read_text().splitlines()))
    assert [row["seconds"] for row in rows] == ["0.5", "1.5", "9.0"]


def test_a_line_that_a_crash_cut_short_is_written_again(begun):
    log = begun / "log.txt"
    log.write_text(log.read_text()[:-20])
    Recorder(begun, [record(epoch, seconds=-1.0) for epoch in range(3)], warn=never).close()
    assert [line["seconds"] for line in lines(begun)] == [0.5, 1.5, -1.0]


def test_going_on_elsewhere_brings_the_history_along(tmp_path):
    Recorder(tmp_path, [record(0), record(1)], warn=never).close()
    assert lines(tmp_path) == [record(0), record(1)]


def test_missing_tensorboard_is_said_once_and_nothing_else_is_lost(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = []
    recorder = Recorder(tmp_path, [], warn=said.append)
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
