"""Runs side by side: right figures, honest gaps, and one line for what is not a run."""

import json

import pytest

from fambav.comparison import read, table
from fambav.config import parse

RUN = ["--model", "vim_micro"]
FUSED = [*RUN, "--fusion-strategy", "upper", "--fusion-layer", "3", "--fusion-token", "12"]


def epoch(number, **changes):
    record = dict(
        epoch=number,
        tokens=[65, 65, 53, 41, 29, 17],
        train_seconds=2.0,
        images_per_second=100.0 + number,
        peak_memory_mib=50.0,
        peak_memory_kind="saved for backward",
        test_acc1=90.0 + number,
        test_ema_acc1=91.0,
    )
    return {**record, **changes}


def made(folder, epochs, words=FUSED, share=0.692):
    folder.mkdir()
    run = parse([*words, "--epochs", "3"])
    (folder / "config.yaml").write_text(run.to_yaml())
    (folder / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in epochs))
    if share is not None:
        (folder / "plan.json").write_text(json.dumps({"share": share}))
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
    assert (found.acc1, found.ema_acc1) == (92.0, 91.0)
    assert (found.seconds, found.speed) == (6.0, 101.0)
    assert (found.memory_mib, found.memory_kind) == (50.0, "saved for backward")
    assert (found.tokens, found.share) == (17, 0.692)


def test_differences_are_to_the_first_run(plain, fused):
    lines = table([read(plain), read(fused)], markdown=False).splitlines()
    cells = ["plain", "vim_micro", "none", "94.50", "91.00", "12.0", "101.0", "100.0", "65", "1.00"]
    assert lines[1].split() == cells
    assert lines[2].split("  ")[-1] == "0.69"
    for text in ("92.00 (-2.50)", "6.0 (-50%)", "101.0 (+0%)", "50.0 (-50%)"):
        assert text in lines[2]
    assert lines[-1] == "memory: saved for backward; in brackets: against plain"


def test_columns_stand_below_their_names(plain, fused):
    head, *rows = table([read(plain), read(fused)], markdown=False).splitlines()[:3]
    assert all(len(row) <= len(head) for row in rows)
    assert {row.index("vim_micro") for row in rows} == {head.index("model")}


def test_markdown_has_a_rule_and_a_bar_for_each_column(plain, fused):
    head, rule, *rows = table([read(plain), read(fused)], markdown=True).splitlines()[:4]
    assert {line.count("|") for line in (head, rule, *rows)} == {11}
    assert rule.startswith("|---|---|---|---:|")


def test_memory_of_two_kinds_is_not_compared(plain, tmp_path):
    other = made(tmp_path / "gpu", [epoch(0, peak_memory_kind="cuda allocated")] * 3)
    text = table([read(plain), read(other)], markdown=False)
    assert "50.0 (" not in text
    assert "memory: cuda allocated; saved for backward" in text


def test_an_unfinished_run_says_so(tmp_path):
    assert read(made(tmp_path / "run", [epoch(0)])).name == "run (1 of 3 epochs)"


def test_what_a_run_does_not_have_is_a_dash(tmp_path):
    record = epoch(0, tokens=[])
    del record["test_ema_acc1"]
    found = read(made(tmp_path / "run", [record] * 3, RUN, share=None))
    assert (found.ema_acc1, found.tokens, found.share) == (None, None, None)
    row = table([found], markdown=False).splitlines()[1].split()
    assert (row[4], row[-2:]) == ("-", ["-", "-"])


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
    assert read(fused).acc1 == 92.0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.txt", None, "expected a folder with log.txt and config.yaml"),
        ("config.yaml", None, "expected a folder with log.txt and config.yaml"),
        ("log.txt", "", r"log.txt is empty, expected a run with a finished epoch"),
        ("log.txt", "{\n{}\n", r"log.txt: line 1 is not a JSON object"),
        ("log.txt", "3\n{}\n", r"log.txt: line 1 is not a JSON object"),
        ("log.txt", "{}\n", r"log.txt is not a log of this program; it has no 'test_acc1'"),
        ("config.yaml", "ephocs: 3", r"'ephocs' is not a setting; did you mean epochs\?"),
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
