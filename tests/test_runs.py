"""Whole runs through the command line: what they print, write, refuse and resume."""

import argparse
import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

import fambav
from fambav import cli
from fambav.config import parse
from fambav.engine import checkpoint, trainer
from fambav.engine.run_dir import Recorder
from fambav.engine.step import TrainStep
from fambav.models import Vim
from fambav.tasks import Scores
from fambav.training import job, model, predict
from tests.data.made import made_cifar, made_cifar10
from tests.identical import assert_identical, lasting, log, same
from tests.made import Crash, crash_in_update, crashing, go, refused
from tests.trust.forked import run_two

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    made_cifar(folder, train=40, test=37)
    return folder


FUSION = ["--fusion-strategy", "upper", "--fusion-layer", "4", "--fusion-token", "3"]


@pytest.fixture(scope="module")
def unfused(data):
    """A run of 2 updates per epoch with everything that has a memory or draws numbers."""
    text = """--model vim_micro --input-size 16 --data-set CIFAR --num_workers 0 --batch-size 8
        --grad-accum-steps 2 --epochs 3 --warmup-epochs 1 --lr 1e-3 --unscale-lr --clip-grad 1
        --drop-path 0.3 --log_every 1"""
    return [*text.split(), "--data-path", str(data)]


@pytest.fixture(scope="module")
def flags(unfused):
    return [*unfused, *FUSION]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    return SimpleNamespace(folder=folder, **vars(go(*flags, "--output_dir", folder)))


def test_a_run_says_its_plan_and_what_tools_look_for(finished):
    assert finished.status == 0, finished.err
    assert "total removed: 9 of 17 tokens" in finished.out
    assert finished.out.index("total removed") < finished.out.index("Epoch: [0]")
    assert finished.out.count("* Acc@1 ") == EPOCHS
    assert finished.out.count("Max accuracy: ") == EPOCHS
    assert re.search(r"^Epoch: \[0\] \[1/2\] loss .* 0:\d\d:\d\d left$", finished.out, re.MULTILINE)
    assert re.search(r"^Epoch: \[2\] \[2/2\] loss .* 0:00:0\d left$", finished.out, re.MULTILINE)
    assert (
        "CIFAR: 100 classes, 40 training and 37 held-out samples, 16 in an update" in finished.out
    )
    assert finished.out.splitlines()[-1].startswith("Training time 0:")
    assert finished.err == ""


def test_a_run_leaves_its_files(finished):
    names = {path.name.split(".out")[0] for path in finished.folder.iterdir()}
    assert names == {
        ".lock",
        "checkpoint.pth",
        "previous_checkpoint.pth",
        "best_checkpoint.pth",
        "model.safetensors",
        "log.txt",
        "metrics.csv",
        "events",
        "config.yaml",
        "env.json",
        "plan.json",
    }
    assert json.loads((finished.folder / "plan.json").read_text())["lengths"] == [17] * 3 + [
        14,
        11,
        8,
    ]
    about = json.loads((finished.folder / "env.json").read_text())
    assert (about["processes"], about["device"], about["precision"]) == (1, "cpu", "float32")
    assert len(about["data"]["sha256"]) == 64


def test_the_log_holds_one_full_line_per_epoch(finished):
    lines = log(finished.folder)
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    wanted = """train_lr train_loss test_loss test_acc1 test_acc5 epoch n_parameters test_ema_loss
        test_ema_acc1 test_ema_acc5 train_seconds eval_seconds save_seconds images_per_second
        peak_memory_mib peak_memory_kind rss_mib tokens skipped_updates"""
    for line in lines:
        assert set(line) == set(wanted.split())
        assert line["tokens"] == [17, 17, 17, 14, 11, 8]
        assert line["peak_memory_kind"] == "saved for backward"
        assert all(math.isfinite(v) for v in line.values() if isinstance(v, float))
        assert 0 < line["peak_memory_mib"] < 20 < line["rss_mib"]
        assert line["save_seconds"] > 0
        # 37 samples, each counted once
        assert line["test_acc1"] * 37 / 100 == pytest.approx(round(line["test_acc1"] * 37 / 100))
    rows = csv.DictReader((finished.folder / "metrics.csv").read_text().splitlines())
    assert [float(row["train_loss"]) for row in rows] == [line["train_loss"] for line in lines]


def test_peak_memory_is_the_same_in_every_epoch(finished):
    assert len({line["peak_memory_mib"] for line in log(finished.folder)}) == 1


def test_the_written_configuration_is_the_run_again(finished, flags):
    again = parse(["--config", str(finished.folder / "config.yaml")])
    asked = parse([*flags, "--output_dir", str(finished.folder), "--num-classes", "100"])
    assert again.flat() == asked.flat()
    assert yaml.safe_load((finished.folder / "config.yaml").read_text())["num_classes"] == 100


def test_the_checkpoint_says_what_it_is_of(finished):
    state = torch.load(finished.folder / "checkpoint.pth", weights_only=True)
    assert state["epoch"] == EPOCHS - 1
    assert state["class_token"] == "middle"
    assert state["grid"] == [4, 4]
    assert state["schedule"]["lengths"] == [17, 17, 17, 14, 11, 8]
    assert state["config"]["fusion_token"] == 3
    assert state["best_acc1"] == max(line["test_acc1"] for line in log(finished.folder))
    assert set(state) >= {"model", "optimizer", "model_ema", "scaler", "history"}
    alone = checkpoint.load(finished.folder / "model.safetensors")
    assert same(alone["model"], dict(state["model"]))
    assert alone["metadata"]["class_token"] == "middle"
    assert alone["metadata"]["grid"] == "[4, 4]"
    assert not same(state["model"], state["model_ema"])


def test_the_best_checkpoint_is_that_of_the_best_epoch(finished):
    best = torch.load(finished.folder / "best_checkpoint.pth", weights_only=True)
    accuracies = [line["test_acc1"] for line in log(finished.folder)]
    assert best["epoch"] == accuracies.index(max(accuracies))


def crash_before_log(monkeypatch):
    real = Recorder.epoch

    def epoch(self, record):
        if record["epoch"] == 1:  # its checkpoint is there already
            raise Crash
        real(self, record)

    monkeypatch.setattr(Recorder, "epoch", epoch)


def crash_before_best(monkeypatch):
    def copy(source, target):
        raise Crash

    monkeypatch.setattr(trainer.checkpoint, "copy", copy)


@pytest.mark.parametrize("crash", [crash_in_update, crash_before_log, crash_before_best])
def test_a_resumed_run_is_bit_identical(finished, flags, tmp_path, crash):
    where = ["--output_dir", tmp_path]
    with crashing(crash):
        go(*flags, *where)
    torch.manual_seed(99)  # whatever was drawn before must not matter
    found = go(*flags, *where, "--resume", "auto")
    assert found.status == 0, found.err
    assert "going on from" in found.out
    assert_identical(tmp_path, finished.folder)


def test_a_resumed_run_in_fp16_has_the_same_loss_scale(flags, tmp_path):
    words = [*flags, "--if_amp", "--amp-dtype", "fp16"]
    folders = [tmp_path / "whole", tmp_path / "resumed"]
    assert go(*words, "--output_dir", folders[0]).status == 0
    with crashing():
        go(*words, "--output_dir", folders[1])
    found = go(*words, "--output_dir", folders[1], "--resume", "auto")
    assert found.status == 0, found.err
    assert_identical(folders[1], folders[0])
    scaler = checkpoint.load(folders[1] / "checkpoint.pth")["scaler"]
    assert scaler["_growth_tracker"] == 6, "updates since the first, not since the resume"


class Scripted:
    """Evaluation whose top-1 is known beforehand, for the raw weights and for the average."""

    def __init__(self, *accuracies):
        self.accuracies = iter([accuracy for a in accuracies for accuracy in (a, a + 1)])

    def __call__(self, net, batches, **given):
        return Scores({"loss": 1.0, "acc1": next(self.accuracies), "acc5": 50.0}, 37)


def test_the_best_epoch_is_kept_over_a_crash_that_lost_its_copy(flags, tmp_path):
    real, copies = checkpoint.copy, []

    def copy(source, target):
        copies.append(target.name)
        if copies.count("best_checkpoint.pth") == 2:
            raise Crash
        real(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.checkpoint, "copy", copy)
        patch.setattr(job, "evaluate", Scripted(5.0, 9.0))
        with pytest.raises(Crash):
            go(*flags, "--output_dir", tmp_path)
    assert copies.count("best_checkpoint.pth") == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "evaluate", Scripted(7.0))
        found = go(*flags, "--output_dir", tmp_path, "--resume", "auto")
    assert found.status == 0, found.err
    assert "Max accuracy: 9.00%" in found.out
    assert checkpoint.load(tmp_path / "best_checkpoint.pth")["epoch"] == 1
    assert checkpoint.load(tmp_path / "checkpoint.pth")["best_acc1"] == 9.0
    assert [line["test_acc1"] for line in log(tmp_path)] == [5.0, 9.0, 7.0]
    assert [line["test_ema_acc1"] for line in log(tmp_path)] == [6.0, 10.0, 8.0]


def test_loader_processes_change_nothing(finished, flags, tmp_path):
    found = go(*flags, "--num_workers", "2", "--output_dir", tmp_path)
    assert found.status == 0, found.err
    assert lasting(log(tmp_path)) == lasting(log(finished.folder))


def test_auto_without_a_checkpoint_starts_and_says_so(flags, tmp_path):
    found = go(*flags, "--output_dir", tmp_path, "--resume", "auto", "--epochs", "1")
    assert found.status == 0, found.err
    assert f"there is no {tmp_path / 'checkpoint.pth'}: starting anew" in found.out


def test_resuming_a_file_goes_on_in_its_folder_or_takes_the_history_along(
    finished, flags, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    source = finished.folder / "checkpoint.pth"
    before = sorted(path.name for path in finished.folder.iterdir())
    found = go(*flags, "--resume", source, "--output_dir", "elsewhere")
    assert found.status == 0, found.err
    assert lasting(log(Path("elsewhere"))) == lasting(log(finished.folder))
    state = checkpoint.load(Path("elsewhere/checkpoint.pth"))
    assert same(state["model"], checkpoint.load(source)["model"])
    assert same(state["model"], checkpoint.load(Path("elsewhere/model.safetensors"))["model"])
    assert sorted(path.name for path in finished.folder.iterdir()) == before
    crashed = Path("crashed")
    go(*flags, "--output_dir", crashed, "--seed", "5")
    found = go(*flags, "--resume", crashed / "checkpoint.pth", "--seed", "5")
    assert found.status == 0, found.err
    assert not Path("output").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--lr", "2e-3"], "lr 0.001 -> 0.002"),
        (["--class-token", "head"], "class_token middle -> head"),
        (["--fusion-token", "2", "--seed", "4"], "fusion_token 3 -> 2, seed 0 -> 4"),
        (["--grad-accum-steps", "1"], "images per update 16 -> 8"),
    ],
)
def test_resuming_with_other_settings_is_refused_with_their_names(finished, flags, change, named):
    line = refused(*flags, "--resume", finished.folder / "checkpoint.pth", *change)
    assert "is of a run with other settings" in line
    assert named in line


def test_resuming_may_deal_an_update_otherwise(finished, flags):
    found = go(
        *(*flags, "--resume", finished.folder / "checkpoint.pth"),
        *("--batch-size", "4", "--grad-accum-steps", "4", "--log_every", "7"),
    )
    assert found.status == 0, found.err


def test_an_earlier_run_in_the_same_folder_is_not_lost(flags, tmp_path):
    short = [*flags, "--epochs", "1", "--output_dir", tmp_path]
    go(*short)
    weights = (tmp_path / "model.safetensors").read_bytes()
    found = go(*short, "--seed", "1")
    assert "holds an earlier run" in found.out
    kept = next(tmp_path.glob("earlier-*"))
    assert (kept / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "model.safetensors").read_bytes() != weights
    assert len(log(tmp_path)) == 1


def test_evaluation_of_a_run_repeats_its_last_scores(finished, flags):
    found = go(*flags, "--eval", "--resume", finished.folder / "checkpoint.pth")
    assert found.status == 0, found.err
    last = log(finished.folder)[-1]
    scores = [f"Acc@1 {last[f'test_{kind}acc1']:.3f}" for kind in ("", "ema_")]
    lines = [line for line in found.out.splitlines() if "Acc@1" in line]
    assert lines[0].startswith(f"* {scores[0]}")
    assert lines[1].startswith(f"EMA {scores[1]}")
    assert "Accuracy of the network on the 37 test images" in found.out
    again = go(*flags, "--eval", "--resume", "auto", "--output_dir", finished.folder)
    assert again.out == found.out
    alone = go(*flags, "--eval", "--resume", finished.folder / "model.safetensors")
    assert lines[0] in alone.out
    assert "EMA" not in alone.out


@pytest.fixture(scope="module")
def published(flags, tmp_path_factory):
    """A file as Vim's own code writes it, of an unfused model of 16 x 16 pixels."""
    torch.manual_seed(0)
    net = model(parse(["--model", "vim_micro", "--input-size", "16"]), num_classes=100)
    args = argparse.Namespace(model="vim_tiny_patch16_224_bimambav2", input_size=16, lr=1e-3)
    path = tmp_path_factory.mktemp("published") / "vim_t.pth"
    weights = {f"module.{name}": value for name, value in net.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters()).state_dict()
    torch.save(
        {"model": weights, "optimizer": optimizer, "epoch": 9, "scaler": "none", "args": args}, path
    )
    return path


def test_a_published_file_is_evaluated_with_fusion_and_without_training(
    published, unfused, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    plain, fused, larger = (
        go(*unfused, "--eval", "--resume", published, *more)
        for more in ([], FUSION, ["--input-size", "32"])
    )
    for found in (plain, fused, larger):
        assert found.status == 0, found.err
        assert "* Acc@1 " in found.out
    scores = {found.out[found.out.index("* Acc@1") :] for found in (plain, fused, larger)}
    assert len(scores) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_published_file_is_no_run_to_go_on_with(published, flags):
    line = refused(*flags, "--resume", published)
    assert "expected a checkpoint of ours; --finetune starts from its weights" in line


def test_another_class_token_is_refused_though_all_names_fit(published, flags):
    line = refused(*flags, "--eval", "--resume", published, "--class-token", "head")
    assert "class_token is 'head', expected 'middle' as the checkpoint was trained" in line


def test_finetuning_takes_another_head_and_another_size(published, flags, tmp_path):
    other = ["--data-set", "CIFAR10", "--data-path", made_cifar10(tmp_path / "data")]
    found = go(
        *(*flags, *other, "--finetune", published, "--input-size", "20", "--epochs", "1"),
        *("--warmup-lr", "0", "--lr", "1e-12", "--min-lr", "0", "--output_dir", tmp_path / "run"),
    )
    assert found.status == 0, found.err
    lines = found.out.splitlines()
    assert f"starting from {published}: it does not say its settings" in lines
    assert "  head.weight: [100, 64] in the file, [10, 64] here, drawn anew" in lines
    assert "  pos_embed: [1, 17, 64] in the file, [1, 26, 64] here, resized" in lines
    before = torch.load(published, weights_only=False)["model"]
    after = checkpoint.load(tmp_path / "run" / "checkpoint.pth")["model"]
    assert after["head.weight"].shape == (10, 64)
    name = "layers.0.mixer.in_proj.weight"
    torch.testing.assert_close(after[name], before[f"module.{name}"], rtol=0, atol=1e-6)
    assert after["pos_embed"].shape == (1, 26, 64)


def test_finetuning_names_the_settings_that_the_file_had_otherwise(finished, flags, tmp_path):
    other = ["--data-set", "CIFAR10", "--data-path", made_cifar10(tmp_path / "data")]
    words = ("--finetune", finished.folder, "--fusion-token", "2", "--epochs", "1")
    found = go(*flags, *other, *words, "--warmup-epochs", "0", "--output_dir", tmp_path / "run")
    assert found.status == 0, found.err
    path = finished.folder / "best_checkpoint.pth"
    changes = "num_classes 100 -> 10, fusion_token 3 -> 2, data_set CIFAR -> CIFAR10"
    assert f"starting from {path}: {changes}" in found.out.splitlines()


def test_another_number_of_classes_is_refused_with_both_numbers(published, flags):
    digits = [*flags, "--data-set", "DIGITS", "--data-path", "datasets"]
    line = refused(*digits, "--eval", "--resume", published)
    assert "checkpoint has 100 classes, expected 10" in line
    assert "num_classes is 7, expected 100" in refused(*flags, "--num-classes", "7")


def test_what_cannot_be_done_is_refused_before_anything_is_written(
    flags, unfused, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    file, broken = tmp_path / "file", tmp_path / "broken.pth"
    file.touch()
    broken.write_bytes(b"PK" + bytes(99))
    for words, expected in {
        ("--data-path", "nowhere"): "nowhere",
        ("--fusion-token", "9"): "fusion_token is 9, expected at most",
        ("--input-size", "18"): "img_size is 18",
        ("--output_dir", "file"): "file",
        ("--resume", "broken.pth"): "broken.pth is truncated or damaged",
        ("--resume", "none.pth"): "checkpoint is none.pth, expected a file that exists",
        ("--finetune", "none.pth"): "checkpoint is none.pth, expected a file that exists",
        ("--batch-size", "64"): "batch_size is 64",
        ("--scan-backend", "cuda"): "'cuda'",
        ("--device", "cuda:7"): "device is cuda:7",
        ("--model", "timm/deit_tony"): "model is 'timm/deit_tony'",
    }.items():
        base = unfused if "--model" in words else flags
        assert expected in refused(*base, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.pth", "file"]


def test_a_run_that_diverges_ends_with_status_3_and_keeps_its_finite_files(
    flags, tmp_path, monkeypatch
):
    real = TrainStep.__call__

    def call(self, batches, number):
        return real(self, batches, number) * (math.inf if number == 3 else 1)

    monkeypatch.setattr(TrainStep, "__call__", call)
    found = go(*flags, "--output_dir", tmp_path)
    assert found.status == 3
    assert found.err.startswith("error: loss or gradient is not finite at update 3, expected")
    assert len(log(tmp_path)) == 1
    state = checkpoint.load(tmp_path / "checkpoint.pth")
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize(
    "words",
    [
        ["--if_amp", "--amp_dtype", "bf16", "--epoch-sched", "--no-model-ema", "--opt", "lion"],
        ["--if_amp", "--amp-dtype", "fp16", "--class-token", "double", "--ThreeAugment"],
        ["--mixup", "0", "--cutmix", "0", "--bce-loss", "--smoothing", "0", "--deterministic"],
        ["--bimamba-type", "none", "--class-token", "none", "--grad-checkpointing"],
        ["--model", "timm/vit_tiny_patch16_224", "--drop", "0.1"],
        ["--fusion-method", "ordered", "--num_workers", "3", "--data-stats", "own"],
        ["--decay-groups", "published", "--scan-backend", "reference", "--if_continue_inf"],
    ],
    ids=" ".join,
)
def test_settings_train_together(flags, unfused, tmp_path, words):
    found = go(
        *(unfused if "--model" in words else flags),
        *words,
        "--epochs",
        "1",
        "--output_dir",
        tmp_path,
    )
    assert found.status == 0, found.err
    assert len(log(tmp_path)) == 1
    if "--num_workers" in words and (os.cpu_count() or 1) < 3:
        assert found.out.count("num_workers is 3 on ") == 1


def test_prediction_needs_nothing_but_a_file_of_ours_and_images(finished, tmp_path):
    from PIL import Image

    image = tmp_path / "image.png"
    Image.new("RGB", (40, 30), (200, 10, 30)).save(image)
    for name in ("checkpoint.pth", "model.safetensors"):
        (guesses,) = predict(finished.folder / name, [image], topk=3)
        assert len(guesses) == 3
        assert all(name.startswith("class_") for name, _ in guesses)
        shares = [share for _, share in guesses]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1
    with pytest.raises(checkpoint.CheckpointError, match="says itself what it is of"):
        predict(finished.folder / "checkpoint.pth", [image], config=parse(["--model", "vim_tiny"]))


def test_prediction_with_a_published_file_needs_the_name_of_its_model(published, tmp_path):
    from PIL import Image

    image = tmp_path / "image.png"
    Image.new("RGB", (16, 16)).save(image)
    with pytest.raises(checkpoint.CheckpointError, match="name its model with --model"):
        predict(published, [image])
    config = parse(["--model", "vim_micro", "--input-size", "16"])
    (guesses,) = predict(published, [image], config=config)
    assert len(guesses) == 5
    assert {name for name, _ in guesses} <= set(map(str, range(100)))


def test_prediction_reads_sixteen_bits_as_eight_and_no_unknown_range(published, tmp_path, capsys):
    from PIL import Image

    grey = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype("<u2") * 257).save(tmp_path / "16.png")
    Image.fromarray(grey.astype("f4") / 255).save(tmp_path / "float.tif")
    words = ["--model", "vim_micro", "--input-size", "16", "--device", "cpu"]
    told = {}
    for name in ("8.png", "16.png", "float.tif"):
        status = cli.console(["predict", str(published), str(tmp_path / name), *words])
        told[name] = (status, *capsys.readouterr())
    assert told["8.png"][0] == 0, told
    assert told["16.png"][1].replace("16.png", "8.png") == told["8.png"][1]
    assert told["float.tif"][0] == 2
    assert told["float.tif"][2].startswith(f"error: image {tmp_path}/float.tif has mode F (TIFF)")
    assert told["float.tif"][2].count("\n") == 1


def test_evaluation_and_prediction_crop_as_they_are_told(published, unfused, tmp_path):
    from PIL import Image

    words = [*unfused, "--input-size", "48", "--eval", "--resume", published]
    told = {}
    for ratio in ("", "0.5", "0.875", "1"):
        crop = ["--eval-crop-ratio", ratio] if ratio else []
        for gpu in ([], ["--gpu-augment"]):
            found = go(*words, *crop, *gpu)
            assert found.status == 0, found.err
            line = next(text for text in found.out.splitlines() if text.startswith("* Acc@1"))
            assert told.setdefault(ratio, line) == line
    assert told[""] == told["0.875"]
    assert len(set(told.values())) == 3
    image = tmp_path / "image.png"
    source = np.random.default_rng(0)
    Image.fromarray(source.integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(image)
    micro = ["--model", "vim_micro", "--input-size", "48", "--eval-crop-ratio"]
    guesses = [predict(published, [image], config=parse([*micro, size])) for size in ("0.5", "1")]
    assert guesses[0] != guesses[1]


def test_a_model_is_built_as_the_flags_say():
    words = "--model vim_micro --stride 2 --class-token head --drop-path 0.5 --fusion-plan 2:5"
    net = model(parse(words.split()), num_classes=7)
    assert isinstance(net, Vim)
    assert (net.num_classes, net.class_token, net.length) == (7, "head", 226)
    assert net.schedule.counts == (0, 5, 0, 0, 0, 0)
    assert net.drop_path.rate == 0.5


@pytest.fixture(scope="module")
def pair(flags, tmp_path_factory):
    """Five updates on two processes and on one, on the same 16 images each."""
    folder = tmp_path_factory.mktemp("pair")
    plain = [*flags, "--mixup", "0", "--cutmix", "0", "--epochs", "5", "--no-repeated-aug"]
    one = [*plain, "--batch-size", "32", "--grad-accum-steps", "1"]
    two = [*plain, "--batch-size", "8", "--grad-accum-steps", "2"]
    alone, both = go(*one, "--output_dir", folder / "one"), run_two(two, folder / "two")
    alone.folder, both.folder = folder / "one", folder / "two"
    return alone, both


def test_two_processes_have_the_losses_of_one(pair):
    one, two = pair
    assert (one.status, *two.status) == (0, 0, 0), two.out + two.other
    ours, theirs = log(two.folder), log(one.folder)
    assert len(ours) == 5
    for key in ("train_loss", "test_loss", "test_ema_loss", "train_lr"):
        assert [x[key] for x in ours] == pytest.approx([x[key] for x in theirs], rel=1e-5), key
    assert len({round(x["train_loss"], 3) for x in ours}) == 5


def test_two_processes_count_every_test_image_once(pair):
    one, two = pair
    for key in ("test_acc1", "test_acc5"):
        assert [x[key] for x in log(two.folder)] == pytest.approx(
            [x[key] for x in log(one.folder)], abs=100 / 37 + 1e-6
        )


def test_of_two_processes_one_prints_and_writes(pair):
    two = pair[1]
    for line in ("total removed", "Training time"):
        assert (two.out.count(line), two.other.count(line)) == (1, 0)
    assert json.loads((two.folder / "env.json").read_text())["processes"] == 2
    assert not list(two.folder.glob(".tmp-*"))


@pytest.mark.slow
def test_the_old_launcher_starts_a_single_process(flags, tmp_path):
    launcher = ["torch.distributed.launch", "--nproc_per_node=1", "--use_env", ROOT / "main.py"]
    words = [*launcher, *flags, "--epochs", "1", "--output_dir", tmp_path / "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-m", *words], check=True, env=environment, timeout=240)
    assert len(log(tmp_path / "run")) == 1


def test_two_processes_tell_a_mistake_once(flags, tmp_path):
    found = run_two([*flags, "--resume", "none.pth"], tmp_path / "run")
    assert found.status == [2, 2]
    lines = [line for line in (found.out + found.other).splitlines() if line.startswith("error: ")]
    assert lines == ["error: checkpoint is none.pth, expected a file that exists"]
    assert not (tmp_path / "run").exists()


def test_a_model_comes_back_from_a_file_and_may_fuse_otherwise(finished):
    images = torch.randn(2, 3, 16, 16)
    own, other = (
        fambav.from_pretrained(finished.folder / "checkpoint.pth", **changes)
        for changes in ({}, {"fusion_strategy": "none"})
    )
    saved = checkpoint.load(finished.folder / "checkpoint.pth")
    assert own.schedule.lengths == tuple(saved["schedule"]["lengths"])
    assert set(other.schedule.lengths) == {own.length}
    assert all(torch.equal(v, saved["model"][n]) for n, v in other.state_dict().items())
    assert own(images).shape == other(images).shape == (2, 100)
    assert not torch.equal(own(images), other(images))


def test_a_published_file_comes_back_as_the_model_that_is_named(published):
    with pytest.raises(checkpoint.CheckpointError, match="name its model"):
        fambav.from_pretrained(published)
    net = fambav.from_pretrained(published, model="vim_micro", input_size=16)
    assert net.num_classes == 100
    with pytest.raises(
        checkpoint.CheckpointError, match="class_token is 'head', expected 'middle'"
    ):
        fambav.from_pretrained(published, model="vim_micro", input_size=16, class_token="head")


def test_the_package_offers_nothing_else_lazily():
    with pytest.raises(AttributeError, match="no attribute 'from_nowhere'"):
        fambav.from_nowhere  # noqa: B018  asking is the test
