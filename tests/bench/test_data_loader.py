"""Images a second, from loader processes and from the device."""

import json

import pytest
import torch

from fambav.bench.data_loader import loading
from fambav.cli import console
from tests.bench import find

CPU = torch.device("cpu")
QUICK = dict(input_size=32, batch=8, batches=1, rounds=2, warmup=0, device=CPU)


@pytest.fixture(scope="module")
def report():
    return loading(workers=(0, 1, 2), **QUICK)


def test_every_number_of_processes_has_a_row_in_both_ways(report):
    found = [(row["way"], row["workers"]) for row in report.rows]
    assert found == [(way, n) for way in ("loader", "resident") for n in (0, 1, 2)]
    assert report.skipped == {}
    assert report.settings["data"] == "DIGITS"


def test_rates_are_given_per_process_and_beside_one_worker(report):
    one = find(report, way="loader", workers=1)["images_per_s"]
    for row in report.rows:
        low, high = row["quartiles_per_s"]
        assert low <= row["images_per_s"] <= high
        assert row["images_per_s"] > 0
        assert row["per_worker"] * max(1, row["workers"]) == pytest.approx(row["images_per_s"])
        assert row["over_one_worker"] == pytest.approx(row["images_per_s"] / one)


def test_a_set_that_is_not_in_memory_has_a_reason_and_no_ratio_without_one_worker():
    report = loading(data_set="FAKE", workers=(0,), **QUICK)
    assert [(row["way"], row["over_one_worker"]) for row in report.rows] == [("loader", None)]
    assert "expected a set held in memory" in report.skipped["resident"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(batch=0), "batch is 0, expected at least 1"),
        (dict(rounds=0), "rounds is 0, expected at least 1"),
        (dict(batches=0), "batches is 0, expected at least 1"),
        (dict(workers=(-1,)), "workers is -1, expected at least 0"),
        (dict(workers=()), "workers is -1, expected at least 0"),
        (dict(warmup=-1), "warmup is -1, expected at least 0"),
        (dict(batch=5000), "batch_size is 5000"),
        (dict(input_size=(8, 16, 8)), "input_size is .8, 16, 8., expected a whole number of 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        loading(**dict(workers=(0,)) | QUICK | arguments)


def test_the_command_prints_its_table_and_writes_it(capsys, tmp_path):
    words = "bench data --input-size 24 32 --batch 8 --batches 1 --rounds 1 --warmup 0 --device cpu"
    target = tmp_path / "data.json"
    assert console([*words.split(), "--workers", "0", "--json", str(target)]) == 0
    assert "images per s" in capsys.readouterr().out
    report = json.loads(target.read_text())
    assert [row["way"] for row in report["rows"]] == ["loader", "resident"]
    assert report["settings"]["input_size"] == "24 x 32"
