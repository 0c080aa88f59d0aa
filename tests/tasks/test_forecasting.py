"""Forecasting through the command line: trained, resumed, kept, evaluated, compared, exported."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch

import fambav
from fambav.cli import console
from fambav.data import load
from fambav.engine import checkpoint
from fambav.experiments import cell
from fambav.registry import TASKS
from fambav.tasks import task_of
from tests.identical import assert_identical, log
from tests.made import crash_in_update, crashing, go, refused

WORDS = """--model {} --lookback 32 --horizon 6 --batch-size 8 --epochs 3 --warmup-epochs 0
    --lr 3e-3 --unscale-lr --num_workers 0 --threads 1 --log_every 4
    --data-set CSV --data-path {}"""


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "made.csv"
    time = np.arange(160)
    columns = np.sin(time[:, None] / [3, 5]) + np.random.default_rng(0).normal(0, 0.3, (160, 2))
    rows = [f"{t},{','.join(map(str, row))}" for t, row in zip(time, columns, strict=True)]
    path.write_text("\n".join(["date,load,oil", *rows]))
    return path


@pytest.fixture(scope="module")
def flags(series):
    return {name: WORDS.format(name, series).split() for name in ("tsm2", "dlinear")}


@pytest.fixture(scope="module", params=["tsm2", "dlinear"])
def finished(request, flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / request.param
    drop = ["--drop", "0.1"] if request.param == "tsm2" else []
    words = [*flags[request.param], *drop]
    found = go(*words, "--output_dir", folder)
    assert found.status == 0, found.err
    return folder, found.out, words


def test_a_run_learns_and_logs_both_errors_of_both_parts(finished):
    folder, printed, _ = finished
    records = log(folder)
    metrics = {f"{part}{name}" for part in ("", "val_") for name in ("loss", "mse", "mae")}
    for record in records:
        names = {name for name in record if name.startswith("test_")}
        assert names == {f"test_{part}{name}" for part in ("", "ema_") for name in metrics}
        assert record["test_loss"] == record["test_mse"]
    assert records[-1]["train_loss"] < 0.95 * records[0]["train_loss"]
    assert "made" not in printed and "2 variates; 75 windows to train, 11 to choose" in printed
    assert "accuracy" not in printed.lower()
    assert f"Best MSE: {records[-1]['test_mse']:.4g}" in printed or records[-1] != records[0]


def test_the_best_epoch_is_chosen_without_held_out_rows():
    task = task_of("WAVES")
    history = [{"test_mse": t, "test_val_mse": v} for t, v in ((0.3, 0.5), (0.9, 0.4), (0.1, 0.6))]
    assert task.best_epoch(history) == 1
    assert TASKS["classification"].best_epoch([{"test_acc1": 1.0}, {"test_acc1": 2.0}]) == 1


def test_a_resumed_run_is_bit_identical(finished, tmp_path):
    folder, _, words = finished
    with crashing(partial(crash_in_update, update=13)):
        go(*words, "--output_dir", tmp_path, "--save_every", "4")
    assert go(*words, "--output_dir", tmp_path, "--resume", "auto").status == 0
    assert_identical(tmp_path, folder)


def test_an_evaluation_repeats_the_best_epoch(finished, flags):
    folder, _, words = finished
    records = log(folder)
    best = records[task_of("CSV").best_epoch(records)]
    printed = go("--eval", "--resume", folder, *words[-2:], "--num_workers", "0").out
    assert f"MSE {best['test_mse']:.3f} MAE {best['test_mae']:.3f}" in printed
    assert f"mean squared error on the 27 test samples: {best['test_mse']:.4g}" in printed
    other = flags["dlinear" if folder.name == "tsm2" else "tsm2"]
    assert "expected" in refused(*other, "--eval", "--resume", folder / "checkpoint.pth")


def test_a_loaded_model_forecasts_and_takes_another_horizon(finished):
    folder, *_ = finished
    model = fambav.from_pretrained(folder)
    assert model.pretrained_cfg["input_size"] == (32, 2)
    assert len(model.pretrained_cfg["mean"]) == 2
    assert model(torch.randn(5, 32, 2)).shape == (5, 6, 2)
    assert checkpoint.load(folder / "best_checkpoint.pth")["variates"] == ["load", "oil"]
    with pytest.warns(UserWarning, match="horizon is 9 and .* has 6: the head is new"):
        longer = fambav.from_pretrained(folder, horizon=9)
    assert longer(torch.randn(5, 32, 2)).shape == (5, 9, 2)


def test_tables_and_reports_have_its_columns(finished, tmp_path, capsys):
    folder, *_ = finished
    assert console(["table", str(folder), "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["mse"], row["mae"]) == tuple(log(folder)[-1][f"test_{n}"] for n in ("mse", "mae"))
    assert console(["table", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "MSE" in shown and f"{row['mse']:.4f}" in shown
    target = tmp_path / "report.html"
    assert console(["report", str(folder), "--output", str(target)]) == 0
    page = target.read_text()
    assert f"a held-out mean squared error of {row['mse']:.4f}" in page
    assert "Accuracy by class" not in page and "not measured" not in page


@pytest.mark.parametrize("kind", ["hf", "onnx"])
def test_an_export_agrees_and_says_what_it_reads(finished, kind, tmp_path, capsys):
    folder, *_ = finished
    target = tmp_path / "exported"
    words = ["export", str(folder), "--output_dir", str(target), "--format", kind]
    assert console(words) == 0, capsys.readouterr().err
    card = (target / "README.md").read_text()
    assert "- input: 32 rows of 2 variates" in card and "top-1" not in card
    assert "27 held-out samples of CSV: largest difference of an output" in card
    records = log(folder)
    best = records[task_of("CSV").best_epoch(records)]
    assert f"| MSE on the held-out samples of CSV | {best['test_mse']:.4f} |" in card
    if kind == "hf":
        assert "type: mse" in card and "vision" not in card
        known = json.loads((target / "preprocessor_config.json").read_text())
        assert (known["lookback"], known["horizon"], len(known["std"])) == (32, 6, 2)
        ours, theirs = (fambav.from_pretrained(path) for path in (folder, target))
        past = torch.randn(2, 32, 2)
        assert torch.equal(ours(past), theirs(past))


def test_commands_on_images_refuse_it(finished, tmp_path, capsys):
    folder, *_ = finished
    (tmp_path / "a.png").write_bytes(b"")
    for words in (["predict", str(folder), str(tmp_path / "a.png")],):
        assert console(words) == 2
        line = capsys.readouterr().err
        assert line == f"error: model is {folder.name} of CSV, expected one that reads images\n"
    assert console(["show", str(folder), "--what", "groups"]) == 2
    assert "expected one whose tokens can be reduced" in capsys.readouterr().err
    copied = tmp_path / folder.name
    shutil.copytree(folder, copied)
    assert console(["show", str(copied)]) == 0
    assert [path.name for path in (copied / "pictures").iterdir()] == ["curves.png"]


def test_a_cell_of_a_grid_has_its_figures(finished, tmp_path):
    folder, *_ = finished
    text = (folder / "config.yaml").read_text().replace(str(folder), str(tmp_path))
    (tmp_path / "cell.yaml").write_text(text)
    figures = cell.figures(tmp_path)
    assert (figures["mse"], figures["mae"]) == tuple(
        log(folder)[-1][f"test_{name}"] for name in ("mse", "mae")
    )


REFUSED = {
    "--model tsm2 --data-set DIGITS": "--model is 'tsm2', expected a model for classification",
    "--model vim_micro --data-set WAVES": "expected tsm2 or dlinear with --data-set WAVES",
    "--data-set WAVES --input-size 32": "expected none with --data-set WAVES, which has no images",
    "--data-set WAVES --mixup 0.2": "expected 0.0 with --data-set WAVES, which has no classes",
    "--data-set WAVES --hflip 0.1": "expected 0.0 with --data-set WAVES, which has no images",
    "--data-set WAVES --num-classes 7": "expected none with --data-set WAVES, which has no images",
    "--data-set WAVES --class-token head": "expected 'middle' with --model tsm2",
    "--data-set WAVES --fusion-strategy all": "expected none with --model tsm2",
    "--data-set WAVES --reduction tome": "expected 'none' with --model tsm2",
    "--data-set WAVES --drop-path 0.2": "--model tsm2, which skips no layer",
    "--data-set WAVES --distillation-type soft": "expected 'none' with --data-set WAVES",
    "--data-set WAVES --data-path x": "with --data-set WAVES, which has no files",
    "--model dlinear --drop 0.1": "expected 0.0 with --model dlinear, which has no dropout",
    "--model dlinear --scan-backend numba": "expected none with --model dlinear",
    "--model vim_micro --horizon 7": "expected 96 with --data-set DIGITS, which is no time series",
    "--data-set WAVES --lookback 50": "lookback is 50, expected 16 and a multiple of 8",
    "--data-set WAVES --horizon 9999": "horizon is 9999 with a lookback of 512, expected at most",
    "--data-set CSV --data-path nowhere.csv": "data_path is nowhere.csv, expected a CSV file",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_makes_no_sense_for_a_series_is_refused_in_one_line(words, tmp_path):
    line = refused(*words.split(), "--output_dir", tmp_path / "run")
    assert REFUSED[words] in line
    assert not (tmp_path / "run").exists()


def test_a_damaged_file_is_refused_by_name_and_row(flags, series, tmp_path):
    path = tmp_path / "gap.csv"
    lines = series.read_text().splitlines()
    lines[8] = lines[8].rpartition(",")[0] + ","
    path.write_text("\n".join(lines))
    line = refused(*flags["dlinear"][:-1], path, "--output_dir", tmp_path / "run")
    assert line == f"error: {path}: row 9, column 'oil' is empty, expected a finite number\n"


def test_a_model_or_a_data_set_alone_finds_the_other():
    from fambav.config import parse

    for words in (["--model", "tsm2"], ["--data-set", "WAVES"]):
        run = parse(words)
        assert (run.model.model, run.data.data_set) == ("tsm2", "WAVES")
    assert parse(["--data-set", "ETTh2", "--model", "dlinear"]).model.horizon == 96


def test_errors_of_processes_and_batches_add_up_to_the_whole_set():
    torch.manual_seed(0)
    forecast, truth = torch.randn(2, 23, 6, 3).unbind()
    task = task_of("WAVES")
    whole, *shares = (task.meter(6, torch.device("cpu")) for _ in range(3))
    assert whole.update(forecast, truth)
    for rank, share in enumerate(shares):
        share.update(forecast[rank::2], truth[rank::2])
    shares[0].sums += shares[1].sums
    scores, errors = shares[0].scores(), (forecast - truth).double()
    want = {"mse": errors.square().mean().item(), "mae": errors.abs().mean().item()}
    assert scores.samples == 23
    assert scores.metrics == pytest.approx({"loss": want["mse"], **want}, rel=1e-6)
    assert scores.metrics == pytest.approx(whole.scores().metrics, rel=1e-12)
    assert not whole.update(forecast * torch.nan, truth)


def test_windows_of_a_batch_are_those_of_the_set(series):
    from fambav.data import eval_loader

    found, same = load("CSV", series, lookback=32, horizon=6), task_of("CSV").eval_transform
    loader = eval_loader(found.val, same(None, ((), ()), (32, 1)), batch_size=4, rank=1, world=2)
    past, future = next(iter(loader))
    assert (past.shape, future.shape) == ((4, 32, 2), (4, 6, 2))
    assert torch.equal(past[1], found.val[3][0]) and torch.equal(future[1], found.val[3][1])
