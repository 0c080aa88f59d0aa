"""Runs side by side: right figures, honest gaps, and one line for what is not a run."""

import csv
import json
import re

import pytest

from fambav.config import parse
from fambav.experiments import compare
from fambav.experiments import read_run as read
from fambav.table import FORMATS

RUN = ["--model", "vim_micro"]
FUSED = [*RUN, "--fusion-strategy", "upper", "--fusion-layer", "3", "--fusion-token", "12"]


def table(results, form="text", **given):
    return compare(results, **given).render(form)


def epoch(number, **changes):
    record = dict(
        epoch=number,
        tokens=[65, 65, 53, 41, 29, 17],
        train_seconds=2.0,
        images_per_second=100.0 + number,
        peak_memory_mib=50.0,
        peak_memory_kind="saved for backward",
        test_acc1=90.0 + number,
        test_acc5=99.0,
        test_ema_acc1=91.0,
    )
    return {**record, **changes}


ABOUT = dict(
    platform="Linux",
    cpu="EPYC",
    cpu_count=2,
    threads=1,
    gpu=None,
    device="cpu",
    processes=1,
    commit="abc",
    started="2026-11-21T03:37:04+0000",
)


def made(folder, epochs, words=FUSED, share=0.692, **about):
    folder.mkdir()
    run = parse([*words, "--epochs", "3"])
    (folder / "config.yaml").write_text(run.to_yaml())
    (folder / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in epochs))
    (folder / "env.json").write_text(json.dumps({**ABOUT, **about}))
    if share is not None:
        plan = dict(start=65, counts=[0], lengths=[65], after=False, share=share)
        (folder / "plan.json").write_text(json.dumps(plan))
    return folder


@pytest.fixture
def fused(tmp_path):
    return made(tmp_path / "fused", [epoch(n) for n in range(3)])


@pytest.fixture
def plain(tmp_path):
    changes = dict(tokens=[65] * 6, train_seconds=4.0, peak_memory_mib=100.0, test_acc1=94.5)
    epochs = [epoch(n, **changes) for n in range(3)]
    return made(tmp_path / "plain", epochs, RUN, share=1.0)


def test_a_run_is_its_last_accuracy_and_its_whole_training(fused):
    found = read(fused)
    assert (found.name, found.model, found.reduction) == ("fused", "vim_micro", "upper 3, r = 12")
    assert (found.metrics, found.ema) == ({"acc1": 92.0, "acc5": 99.0}, 91.0)
    assert (found.seconds, found.speed) == (6.0, 101.0)
    assert (found.memory_mib, found.memory_kind) == (50.0, "saved for backward")
    assert (found.tokens, found.share) == (17, 0.692)


def test_the_time_to_an_accuracy_is_that_of_the_first_epoch_that_has_it(fused, tmp_path):
    low = made(tmp_path / "low", [epoch(n, test_acc1=80.0 + n) for n in range(3)])
    lines = table([read(fused), read(low)], reach=[91.0, 80.5]).splitlines()
    assert lines[0].endswith("s to 91 %  s to 80.5 %")
    assert [line.split()[-2:] for line in lines[1:3]] == [["4.0", "2.0"], ["-", "4.0"]]
    rows = json.loads(table([read(fused), read(low)], "json", reach=[91.0]))
    assert [row["s to 91 %"] for row in rows] == [4.0, None]
    cells = list(csv.reader(table([read(low)], "csv", reach=[91.0, 81.0]).splitlines()))
    assert [cells[0][-2:], cells[1][-2:]] == [["s to 91 %", "s to 81 %"], ["", "4.0"]]


def test_differences_are_to_the_first_run(plain, fused):
    lines = table([read(plain), read(fused)], form="text").splitlines()
    figures = ["94.50", "99.00", "91.00", "12.0", "101.0", "100.0", "65", "1.00"]
    cells = ["plain", "vim_micro", "none", *figures]
    assert lines[1].split() == cells
    assert lines[2].split("  ")[-1] == "0.69"
    for text in ("92.00 (-2.50)", "6.0 (-50%)", "101.0 (+0%)", "50.0 (-50%)"):
        assert text in lines[2]
    assert lines[-1] == "memory: saved for backward; in brackets: against plain"


def test_columns_stand_below_their_names(plain, fused):
    head, *rows = table([read(plain), read(fused)], form="text").splitlines()[:3]
    assert all(len(row) <= len(head) for row in rows)
    assert {row.index("vim_micro") for row in rows} == {head.index("model")}


def test_markdown_has_a_rule_and_a_bar_for_each_column(plain, fused):
    head, rule, *rows = table([read(plain), read(fused)], form="markdown").splitlines()[:4]
    assert {line.count("|") for line in (head, rule, *rows)} == {12}
    assert rule.startswith("|---|---|---|---:|")


def test_memory_of_two_kinds_is_not_compared(plain, tmp_path):
    other = made(tmp_path / "gpu", [epoch(0, peak_memory_kind="cuda allocated")] * 3)
    text = table([read(plain), read(other)], form="text")
    assert "50.0 (" not in text
    assert "memory: cuda allocated; saved for backward" in text


def test_an_unfinished_run_says_so(tmp_path):
    assert read(made(tmp_path / "run", [epoch(0)])).name == "run (1 of 3 epochs)"


def test_what_a_run_does_not_have_is_a_dash(tmp_path):
    record = epoch(0, tokens=[])
    del record["test_ema_acc1"]
    found = read(made(tmp_path / "run", [record] * 3, RUN, share=None))
    assert (found.ema, found.tokens, found.share) == (None, None, None)
    row = table([found], form="text").splitlines()[1].split()
    assert (row[5], row[-2:]) == ("-", ["-", "-"])


def both(tmp_path, words="", **about):
    """A run, and another one with some settings and some facts of its machine changed."""
    epochs = [epoch(n) for n in range(3)]
    data = ["--data-set", "CIFAR"] if "CIFAR" in words else []
    first = made(tmp_path / "first", epochs, [*RUN, *data])
    return [read(first), read(made(tmp_path / "other", epochs, [*FUSED, *words.split()], **about))]


@pytest.mark.parametrize(
    "words",
    [
        "--seed 3",
        "--data-set CIFAR --data-path elsewhere",
        "--output_dir x --log-every 3",
        "--fusion-method ordered",
    ],
)
def test_runs_may_differ_in_reduction_seed_and_names_of_files(tmp_path, words):
    assert "memory" in table(both(tmp_path, words))


def test_the_commit_and_the_time_are_of_no_machine(tmp_path):
    assert "memory" in table(both(tmp_path, commit="other", started="2027"))


@pytest.mark.parametrize(
    ("words", "about", "message"),
    [
        ("--lr 0.01", {}, r"differ in lr \(0.0005, 0.01\), expected one recipe; --mixed shows"),
        ("--threads 2 --seed 1", {}, r"differ in threads \(none, 2\), expected one recipe"),
        ("--finetune w.pth", {}, r"differ in finetune \(false, true\), expected one recipe"),
        ("", {"cpu": "Xeon"}, r"differ in cpu \(EPYC, Xeon\), expected one machine; --mixed"),
        ("", {"gpu": "H200", "device": "cuda"}, r"gpu \(none, H200\), device \(cpu, cuda\), expec"),
        ("", {"processes": 4}, r"differ in processes \(1, 4\), expected one machine"),
        ("--lr 0.01", {"threads": 2}, r"differ in threads \(1, 2\), expected one machine"),
    ],
)
def test_runs_of_two_machines_or_recipes_are_refused_in_one_line(tmp_path, words, about, message):
    runs = both(tmp_path, words, **about)
    for form in FORMATS:
        with pytest.raises(ValueError, match=message) as caught:
            table(runs, form=form)
        assert "\n" not in str(caught.value)


def test_many_settings_that_differ_are_not_all_named(tmp_path):
    words = (
        "--lr 1 --opt sgd --smoothing 0 --mixup 0 --cutmix 0 --aa none --reprob 0 --batch-size 2"
    )
    with pytest.raises(ValueError, match=r"differ in .* and \d+ more, expected one recipe"):
        table(both(tmp_path, f"{words} --hflip 0 --affine 2"))


def test_mixed_runs_stand_without_time_memory_and_differences(tmp_path):
    text = table(both(tmp_path, "--lr 0.01", cpu="Xeon"), mixed=True)
    head, *rows = text.splitlines()[:3]
    assert head.split("  ")[-1] == "token-layers"
    assert not {"train s", "images/s", "memory MiB"} & set(re.split(r"  +", head))
    assert not any("(" in row for row in rows)
    assert "lr (0.0005, 0.01), cpu (EPYC, Xeon)" in text.splitlines()[-1]


def test_a_run_that_does_not_tell_its_machine_is_compared_in_what_is_known(tmp_path):
    runs = [made(tmp_path / name, [epoch(0)] * 3) for name in ("first", "other")]
    (runs[1] / "env.json").unlink()
    assert "memory" in table([read(run) for run in runs])


def test_the_time_of_an_unfinished_run_is_compared_with_nothing(tmp_path):
    whole = made(tmp_path / "whole", [epoch(n) for n in range(3)])
    part = made(tmp_path / "part", [epoch(n) for n in range(2)])
    row = table([read(whole), read(part)]).splitlines()[2]
    assert "4.0 (" not in row
    assert " 4.0  " in row


def test_csv_and_json_have_plain_figures_and_the_machine(plain, fused):
    results = [read(plain), read(fused)]
    lines = list(csv.DictReader(table(results, form="csv").splitlines()))
    assert [line["name"] for line in lines] == ["plain", "fused"]
    assert [float(line["acc1"]) for line in lines] == [94.5, 92.0]
    assert {line["cpu"] for line in lines} == {"EPYC"}
    told = json.loads(table(results, form="json"))
    assert [known["seconds"] for known in told] == [12.0, 6.0]
    assert told[0]["recipe"]["epochs"] == 3
    assert told[0]["machine"]["platform"] == "Linux"


def test_latex_has_a_row_for_each_run(plain, fused):
    text = table([read(plain), read(fused)], form="latex")
    assert text.count("vim\\_micro") == 2
    assert "92.00 ($-$2.50)" in text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--fusion-plan 2:3,4:5", "plan 2:3,4:5"),
        ("--fusion-strategy all --fusion-method ordered", "all, r = 7, ordered"),
        ("--fusion-strategy none", "none"),
        ("--reduction tome --reduction-schedule r:5", "tome, r:5"),
        (
            "--reduction evit --scan-policy aligned --reduction-options score=clip",
            "evit, published, aligned, score=clip",
        ),
    ],
)
def test_a_reduction_is_told_in_short(tmp_path, words, text):
    assert read(made(tmp_path / "run", [epoch(0)], [*RUN, *words.split()])).reduction == text


def test_a_line_that_a_crash_cut_short_is_no_epoch(fused):
    with (fused / "log.txt").open("a") as log:
        log.write('{"epoch": 3, "tra')
    assert read(fused).metrics["acc1"] == 92.0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.txt", None, "expected a folder with log.txt and config.yaml"),
        ("config.yaml", None, "expected a folder with log.txt and config.yaml"),
        ("log.txt", "", r"log.txt is empty, expected a run with a finished epoch"),
        ("log.txt", "{\n{}\n", r"log.txt: line 1 is damaged, expected the record of an epoch: Exp"),
        ("log.txt", "3\n{}\n", r"log.txt: line 1 is damaged, .* it is 3, no JSON object"),
        ("log.txt", "{}\n", r"log.txt: line 1: test_acc1 is missing, expected a number"),
        ("config.yaml", "ephocs: 3", r"'ephocs' is not a setting; did you mean epochs\?"),
        ("env.json", "[", r"env.json is damaged, expected the machine of a run"),
        ("plan.json", "{", r"plan.json is damaged, expected a plan with its share"),
    ],
)
def test_what_is_not_a_run_is_refused_in_one_line(fused, name, content, message):
    if content is None:
        (fused / name).unlink()
    else:
        (fused / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(fused)
    assert "\n" not in str(caught.value)
