"""Forward passes of our models and of others, side by side."""

import json

import pytest
import torch

from fambav.bench import passes as module
from fambav.bench import roofline
from fambav.bench.candidates import Candidate, candidates
from fambav.bench.passes import infer, latency, step
from fambav.bench.profile import GROUPS
from fambav.bench.report import MeasureError
from fambav.cli import console
from fambav.ops.kernels import NUMBA

CPU = torch.device("cpu")
NAMES = ("cpu", "numba") if NUMBA.unavailable() is None else ("cpu",)
PEER = "deit_tiny_patch16_224"
QUICK = dict(model="vim_micro", rounds=3, warmup=0, device=CPU)


@pytest.fixture(scope="module", autouse=True)
def small_peaks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "SIDE", {"cpu": 64})
        patch.setattr(roofline, "COPIED", {"cpu": 2**16})
        yield


@pytest.fixture(scope="module")
def report():
    more = dict(names=NAMES, peers=(PEER,), roofline=True, profile=True)
    return infer(plans=("no", "upper:3:9"), batch=2, **QUICK, **more)


def test_plans_backends_and_peers_stand_side_by_side(report):
    named = [(row["model"], row["plan"], row["backend"]) for row in report.rows]
    assert named == [
        ("vim_micro", "none", "cpu"),
        ("vim_micro", "upper:3:9", "cpu"),
        *(("vim_micro", plan, name) for name in NAMES[1:] for plan in ("none", "upper:3:9")),
        (PEER, "-", "torch"),
    ]
    first, upper, *_, peer = report.rows
    assert first["times_faster"] == 1
    assert first["faster_quartiles"] == (1, 1)
    assert upper["token_layers_left"] == pytest.approx((65 * 2 + 56 + 47 + 38 + 29) / (6 * 65))
    assert peer["token_layers_left"] is None
    assert upper["gflop_per_image"] < first["gflop_per_image"] < peer["gflop_per_image"]
    for row in report.rows:
        low, high = row["quartiles_ms"]
        assert 0 < low <= row["median_ms"] <= high
        assert row["images_per_s"] == pytest.approx(2000 / row["median_ms"])
        assert row["gflop_per_s"] == pytest.approx(row["gflop_per_image"] * row["images_per_s"])
        assert row["first_call_ms"] > 0
        assert row["peak_mib"] > 0
        assert row["bytes_share"] > 0
        assert row["flops_share"] > 0


def test_the_rest_of_the_report_is_shares_that_add_up(report):
    limits, layers, operations = report.tables.values()
    assert [row["what"] for row in limits] == ["product in float32", "copy"]
    assert len(operations) == len(report.rows)
    for row in operations:
        assert sum(row[name] for name in GROUPS) == pytest.approx(1)
        assert sum(part[row["run"]] or 0 for part in layers) == pytest.approx(1)


def test_all_of_it_is_in_the_json_and_in_the_text(report):
    parsed = json.loads(report.json())
    assert [row["plan"] for row in parsed["rows"]] == [row["plan"] for row in report.rows]
    assert [*parsed["tables"]] == [*report.tables]
    assert parsed["settings"]["memory"] == "allocated"
    text = report.text()
    assert all(title in text for title in report.tables)
    assert "first call ms" in text


def test_a_backend_that_cannot_run_is_absent_and_the_rest_is_compared():
    found = infer(names=("cuda", "cpu"), batch=1, **QUICK)
    assert [row["backend"] for row in found.rows] == ["cpu"]
    assert "expected a CUDA device" in found.skipped["vim_micro cuda"]
    assert found.rows[0]["times_faster"] == 1


def test_a_latency_is_of_one_image_from_an_idle_device(monkeypatch):
    asked = []
    timed = module.interleave

    def interleave(*given, **options):
        asked.append(options["alone"])
        return timed(*given, **options)

    monkeypatch.setattr(module, "interleave", interleave)
    found = latency(**QUICK | dict(rounds=1))
    assert found.settings["batch"] == 1
    infer(batch=1, **QUICK | dict(rounds=1))
    assert asked == [True, False]


def test_a_step_compares_dtypes_and_peers():
    dtypes = (torch.float32, torch.bfloat16)
    more = dict(dtypes=dtypes, names=["cpu"], peers=(PEER,), roofline=True, profile=True)
    found = step(batch=1, lengths=(9, 5), **QUICK | dict(rounds=1), **more)
    named = [(row["model"], row["dtype"], row["length"]) for row in found.rows]
    assert named == [
        *(("vim_micro", dtype, n) for dtype in ("float32", "bfloat16") for n in (9, 5)),
        (PEER, "float32", None),
        (PEER, "bfloat16", None),
    ]
    *ours, _, _ = found.rows
    assert all(row["over_cpu"] == 1 for row in ours)
    assert [row["growth"] for row in ours if row["length"] == 9] == [1, 1]
    longest = next(row for row in ours if row["length"] == 9)
    assert longest["gflop_per_image"] > ours[1]["gflop_per_image"]
    assert len(found.tables) == 3
    json.loads(found.json())


@pytest.mark.skipif(NUMBA.unavailable() is not None, reason="needs numba")
def test_what_no_candidate_can_run_is_refused():
    bf16 = dict(names=("numba",), dtypes=(torch.bfloat16,), batch=1)
    for kind in (infer, step):
        more = {} if kind is infer else dict(lengths=(5,))
        with pytest.raises(MeasureError, match=r"a tensor is torch\.bfloat16, expected"):
            kind(**QUICK, **bf16, **more)


def test_a_dtype_that_a_gpu_only_emulates_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(ValueError, match="dtype is bfloat16, expected one that cuda computes in"):
        candidates(model="vim_micro", dtypes=[torch.bfloat16], device=torch.device("cuda"))


def test_a_candidate_has_a_name_and_is_compared_once():
    assert Candidate("vim_tiny").name == "vim_tiny"
    told = Candidate("vim_tiny", "all:7", backend="cpu", dtype=torch.bfloat16, length=65).name
    assert told == "vim_tiny all:7 cpu bfloat16 65"
    assert len(candidates(model="vim_tiny", plans=("no", "none", "all:7"), device=CPU)) == 2


@pytest.mark.parametrize("kind", ["infer", "latency"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--plan uper:6:9", "plan is 'uper:6:9', expected one of r:5, r:5@3-23/2, ramp:"),
        ("--plan all:400", "plan is 'all:400', expected at most 9; layer 1 has 65"),
        ("--peer diet_tiny_patch16_224", "peer is 'diet_tiny_patch16_224', expected a model of"),
        ("--peer hf-hub:someone/something", "peer is 'hf-hub:someone/something', expected"),
        ("--rounds 0", "rounds is 0, expected at least 1"),
        ("--dtype float8", "argument --dtype: invalid choice: 'float8'"),
        ("--cuda-graphs", "device is cpu, expected a CUDA device with --cuda-graphs"),
        ("--backend numba --dtype bfloat16", "backend 'numba' of bimamba_scan cannot run"),
        ("--plan lower:9", "plan is 'lower:9', expected lower:layer:tokens"),
    ],
)
def test_a_mistake_is_one_line(capsys, kind, words, message):
    line = f"{kind} --device cpu --model vim_micro {words}"
    assert console(["bench", *line.split()]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {message}")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    "model", ["plainmamba_micro", "vmamba_nano", "vssd_nano", "groupmamba_nano", "vim2_nano"]
)
def test_every_classifier_makes_training_steps(model, tmp_path):
    target, staged = tmp_path / "found.json", model != "plainmamba_micro"
    words = f"--device cpu --batch 2 --rounds 1 --warmup 0 --backend cpu --json {target}"
    length = [] if staged else ["--length", "16"]
    assert console(["bench", "step", "--model", model, *words.split(), *length]) == 0
    (row,) = json.loads(target.read_text())["rows"]
    assert (row["model"], row["length"]) == (model, None if staged else 16)
    assert row["median_ms"] > 0 and row["peak_mib"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--length 64", "length is 64, expected none with vssd_nano, each stage of which has"),
        ("--batch 1", "batch is 1, expected at least 2 with vssd_nano, whose batch norm would"),
        ("--model dlinear", "argument --model: invalid choice: 'dlinear'"),
    ],
)
def test_steps_that_stages_cannot_make_are_refused_in_one_line(capsys, words, message):
    assert (
        console(["bench", "step", "--device", "cpu", "--model", "vssd_nano", *words.split()]) == 2
    )
    told = capsys.readouterr().err
    assert told.startswith(f"error: {message}")
    assert told.count("\n") == 1


@pytest.mark.parametrize("kind", ["infer", "step"])
def test_an_empty_batch_is_refused(capsys, kind):
    assert console(["bench", kind, "--device", "cpu", "--batch", "0"]) == 2
    assert capsys.readouterr().err == "error: batch is 0, expected at least 1\n"


def test_figures_are_written_where_they_are_wanted(capsys, tmp_path):
    target = tmp_path / "found.json"
    line = f"latency --device cpu --model vim_micro --rounds 1 --warmup 0 --profile --json {target}"
    assert console(["bench", *line.split()]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("one call at a time: method famba-v, batch 1, ")
    assert told.err == ""
    found = json.loads(target.read_text())
    assert found["settings"]["batch"] == len(found["rows"]) == 1
    assert len(found["tables"]) == 2


@pytest.mark.gpu
def test_a_gpu_replays_forward_passes():
    gpu = dict(device=torch.device("cuda", 0), batch=2, cuda_graphs=True, profile=True)
    found = infer(plans=("none", "upper:3:9"), peers=(PEER,), **QUICK | gpu)
    assert found.skipped == {}
    assert {row["launch"] for row in found.rows} == {"eager", "replayed"}
    assert len(found.rows) == 6
    for row in found.tables["share of the time by operation"]:
        assert sum(row[name] for name in GROUPS) == pytest.approx(1)
