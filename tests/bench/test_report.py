"""Reports are tables to read, and the same figures as JSON."""

import json

import torch

from fambav.bench.report import Report, settings

CPU = torch.device("cpu")


def made(**more):
    rows = (
        {"backend": "cpu", "median_ms": 12.345, "quartiles_ms": (1.0, 2000.4), "over_cuda": None},
        {"backend": "reference", "median_ms": 0.01234, "quartiles_ms": (1, 2), "over_cuda": 1.5},
    )
    given = dict(title="scan", settings={"batch": 3}, rows=rows, skipped={"cuda": "no GPU"})
    return Report(**given | more)


def test_a_table_has_a_column_for_each_key_and_a_line_for_what_is_absent():
    shown = made().text().splitlines()
    assert shown[0] == "scan: batch 3"
    assert shown[2].startswith("backend  ")
    assert "median ms" in shown[2]
    assert shown[3].split() == ["cpu", "12.3", "1", "..", "2000", "-"]
    assert shown[4].split() == ["reference", "0.0123", "1", "..", "2", "1.5"]
    assert len({len(line) for line in shown[2:5]}) == 1
    assert shown[5] == "cuda is absent: no GPU"


def test_json_holds_everything_with_a_line_for_each_row():
    report = made()
    parsed = json.loads(report.json())
    assert parsed["rows"][0] == {**report.rows[0], "quartiles_ms": [1.0, 2000.4]}
    assert parsed["skipped"] == {"cuda": "no GPU"}
    assert sum(line.startswith("  {") for line in report.json().splitlines()) == 2
    assert json.loads(made(rows=()).json())["rows"] == []


def test_settings_say_where_when_and_with_what():
    told = settings(CPU, torch.float32, batch=2)
    assert told["batch"] == 2
    assert told["dtype"] == "float32"
    assert told["torch"] == torch.__version__
    assert {"device", "threads", "triton", "date", "commit"} <= told.keys()
