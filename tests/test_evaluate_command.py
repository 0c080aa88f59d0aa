"""`fambav evaluate`: the scores of main.py, and what they say of classes and of single images."""

import csv
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fambav import cli
from fambav.commands import evaluate
from fambav.data import load
from fambav.engine.checkpoint import load as load_checkpoint
from fambav.tasks import task_of
from fambav.training.inference import load_run
from tests.data.made import made_folder
from tests.made import go, run, scores
from tests.trust.forked import run_two
from tests.trust.refusals import call, refused

FLAGS = ("--num_workers", "0", "--threads", "1")


def evaluated(*words):
    found = go("evaluate", *words, *FLAGS, program=cli.console)
    assert found.status == 0, found.err
    return found.out.splitlines()


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run, what is printed of it, and the files that are written."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "run").mkdir()
    run(folder / "run" / "best_checkpoint.pth")
    files = ("--confusion", folder / "c.svg", "--predictions", folder / "p.csv")
    return folder, evaluated(folder / "run", "--per-class", *files)


def test_the_metrics_are_those_of_main_py(done):
    folder, lines = done
    line, _ = scores("--resume", folder / "run")
    assert lines[0] == line
    assert lines[1].startswith("Accuracy of the network on the 360 test images: ")


def test_there_is_a_row_for_each_sample_with_what_the_model_says_of_it(done):
    folder, lines = done
    found, held_out = rows(folder / "p.csv"), load("DIGITS").val
    assert [int(row["index"]) for row in found] == list(range(360))
    assert [int(row["target"]) for row in found] == [held_out[n][1] for n in range(360)]
    right = sum(row["target"] == row["prediction"] for row in found)
    assert f"* Acc@1 {100 * right / 360:.3f} " in lines[0]
    assert {row["path"] for row in found} == {""}
    trained = load_run(folder / "run")
    with torch.no_grad():
        shares = trained.net(trained.transform(held_out[7][0])[None]).softmax(dim=1)[0]
    assert int(found[7]["prediction"]) == shares.argmax()
    assert float(found[7]["probability"]) == pytest.approx(float(shares.max()), rel=1e-4)


def test_classes_stand_weakest_first_and_are_counted_from_the_same_samples(done):
    folder, lines = done
    found = rows(folder / "p.csv")
    table = [re.split(r" {2,}", line) for line in lines[3:13]]
    assert re.split(r" {2,}", lines[2]) == ["class", "most often taken for", "images", "accuracy %"]
    assert [float(row[3]) for row in table] == sorted(float(row[3]) for row in table)
    for name, taken, images, accuracy in table:
        own = [row for row in found if row["target_name"] == name]
        wrong = [row["prediction_name"] for row in own if row["prediction_name"] != name]
        assert int(images) == len(own)
        assert accuracy == f"{100 * (1 - len(wrong) / len(own)):.1f}"
        most = max(map(wrong.count, wrong), default=0)
        assert taken in ({f"{w} ({most} x)" for w in wrong if wrong.count(w) == most} or {"-"})


def test_the_picture_says_what_it_is_of(done):
    folder, lines = done
    text = (folder / "c.svg").read_text()
    accuracy = float(lines[0].split()[2])
    assert f"vim_micro on DIGITS: top-1 accuracy {accuracy:.2f}%" in text
    assert "written: " + str(folder / "p.csv") == lines[-1]


def test_images_in_files_are_named_and_other_settings_of_the_same_weights_are_taken(tmp_path):
    made_folder(tmp_path / "data", classes=[str(n) for n in range(10)], train=1, val=1)
    path = run(tmp_path / "w.pth", data_stats="imagenet")
    target = tmp_path / "p.csv"
    words = ("--data-set", "FOLDER", "--data-path", tmp_path / "data", "--batch-size", "4")
    evaluated(path, *words, "--predictions", target)
    every = rows(target)
    assert [Path(row["path"]).parent.name for row in every] == [row["target_name"] for row in every]
    evaluated(path, *words, "--predictions", target, "--fusion-plan", "2:8")
    assert rows(target) != every


def test_two_processes_write_what_one_does(done, tmp_path):
    folder, _ = done
    files = ("--confusion", tmp_path / "c.svg", "--predictions", tmp_path / "p.csv")
    words = ("evaluate", folder / "run", "--per-class", *files, "--batch-size", "42", *FLAGS)
    found = run_two(words, tmp_path / "run", program=cli.console)
    assert found.status == [0, 0], found.out + found.other
    assert found.other == "", "the first process prints"
    for name in ("c.svg", "p.csv"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--confusion", "c.jpg"], ["--confusion is 'c.jpg'", ".png or .svg"]),
        (["--confusion", "a.png", "--predictions", "./a.png"], ["--predictions is 'a.png'"]),
        (["--predictions", "."], ["expected no folder of that name"]),
        (["--lr", "1"], ["lr is 1", "would change nothing"]),
        (["--num-classes", "7"], ["num_classes is 7"]),
        (["--modle", "x"], ["--modle is not a flag"]),
        (["--model", "vim_tiny"], ["expected no model beside it"]),
        (["--data-set", "SHAPES100"], ["num_classes is 10, expected 100"]),
    ],
)
def test_a_mistake_is_a_line_before_the_pass(done, tmp_path, monkeypatch, words, names):
    def begun(*given, **options):
        raise AssertionError("the pass has begun")

    monkeypatch.setattr("torch.nn.Module.__call__", begun)
    monkeypatch.chdir(tmp_path)
    refused("evaluate", done[0] / "run", *words, *FLAGS, names=names, program=cli.console)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_a_picture_is_refused_before_the_pass(done, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = ("evaluate", done[0] / "run", "--confusion", tmp_path / "c.png")
    refused(*words, names=['pip install "fambav[viz]"'], program=cli.console)


def test_a_file_that_is_not_ours_is_described_by_flags(done, tmp_path):
    folder, lines = done
    bare = tmp_path / "bare.safetensors"
    save_file(load_checkpoint(folder / "run" / "best_checkpoint.pth")["model"], bare)
    words = "--model vim_micro --patch-size 8 --input-size 32 --data-set DIGITS --data-stats own"
    assert evaluated(bare, *words.split())[:2] == lines[:2]
    names = ["does not say what it is of"]
    refused("evaluate", bare, names=names, program=cli.console)


def test_confusion_matrices_of_shares_add_up_and_agree_with_top_1():
    torch.manual_seed(0)
    outputs, targets = torch.randn(23, 10), torch.randint(10, (23,))
    outputs[3] = 0.0  # a tie
    task, cpu = task_of("DIGITS"), torch.device("cpu")
    whole, *shares = (task.class_meter(10, cpu) for _ in range(3))
    plain = task.meter(10, cpu)
    for meter in (whole, plain):
        meter.update(outputs, targets)
    for rank, share in enumerate(shares):
        share.update(outputs[rank::2], targets[rank::2])
    shares[0].sums += shares[1].sums
    assert torch.equal(shares[0].confusion(), whole.confusion())
    assert whole.scores() == plain.scores()
    counts = whole.confusion()
    assert counts.sum(dim=1).tolist() == targets.bincount(minlength=10).tolist()
    assert 100 * int(counts.trace()) / 23 == whole.scores().metrics["acc1"]


def test_help_names_every_output(capsys):
    assert cli.console(["evaluate", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--per-class", "--confusion", "--predictions"))
    assert evaluate.run.__doc__.splitlines()[0] in call("--help", program=cli.console).out


def test_several_methods_and_runs_make_a_table(done, tmp_path):
    folder, lines = done
    (tmp_path / "other").mkdir()
    run(tmp_path / "other" / "best_checkpoint.pth")
    methods = ["--reduction", "none", "ordered", "--reduction-schedule", "r:2@3-4"]
    runs = (folder / "run", tmp_path / "other")
    table = json.loads("\n".join(evaluated(*runs, *methods, "--format", "json")))
    assert [(row["run"], row["reduction"]) for row in table["rows"]] == [
        (str(run), method) for run in runs for method in ("none", "ordered")
    ]
    first, second, *others = table["rows"]
    assert (
        f"* Acc@1 {first['acc1']:.3f} Acc@5 {first['acc5']:.3f} loss {first['loss']:.3f}" in lines
    )
    assert first["token_layers_left_percent"] == 100 > second["token_layers_left_percent"]
    assert [{**row, "run": str(folder / "run")} for row in others] == [first, second]


def test_a_table_of_one_run_is_for_programs_too(done):
    folder, lines = done
    head, row = csv.reader(evaluated(folder / "run", "--format", "csv"))
    assert head == ["run", "reduction", "token_layers_left_percent", *head[3:]]
    assert f"* Acc@1 {float(row[head.index('acc1')]):.3f} " in lines[0]
    words = [folder / "run", "--reduction", "none", "ordered", "--per_class"]
    refused("evaluate", *words, names=["need one run, and no table"], program=cli.console)
