"""The tables of grids: what stands beside what, in each format, and what programs read."""

import csv
import json
import re
from pathlib import Path

import pytest

import fambav
from fambav import experiments
from fambav.config import ConfigError
from fambav.experiments import Results
from fambav.registry import grids
from fambav.table import Table

ROOT = Path(fambav.__file__).parents[1]
BASE = "model: vim_micro\nclass_token: none\ndata_set: DIGITS\nepochs: 4\n"
GRID = """title: "100 % of a_b"
train: scratch
base: base.yaml
seeds: [0, 1]
names: [strategy, method]
paper: {source: "a paper, table 1"}
rows:
  - name: [upper, famba-v]
    fusion_strategy: upper
    fusion_layer: 3
    fusion_token: 12
    paper: {acc1: 70.5, time: "4:08:40", memory: 5996}
  - name: [none, "-"]
    fusion_strategy: none
    paper: {acc1: 70.1, time: "4:33:02", memory: 8302}
  - name: [upper, ordered]
    fusion_strategy: upper
    fusion_layer: 3
    fusion_token: 12
    fusion_method: ordered
"""
TUNED = """base: base.yaml
seeds: [0, 1]
finetune: {epochs: 2, lr: 5.0e-4}
rows:
  - {name: ordered, fusion_strategy: upper, fusion_layer: 4, fusion_token: 3}
"""
ABOUT = dict(
    commit="abc",
    started="2026-11-21T03:37:04+0000",
    platform="Linux",
    cpu="EPYC",
    cpu_count=2,
    threads=1,
    gpu=None,
    jobs=2,
    fambav="0.1.0",
    python="3.11.7",
    packages={"torch": "2.13.0"},
)


@pytest.fixture
def grid(tmp_path):
    """Reads a grid, some of its text replaced."""

    def made(*changes, text=GRID):
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "base.yaml").write_text(BASE)
        (tmp_path / "grid.yaml").write_text(text)
        return experiments.read_grid(tmp_path / "grid.yaml")

    return made


def record(acc1, seconds, memory=20.0, **about):
    figures = dict(
        acc1=acc1,
        acc5=99.0,
        token_layers=0.5,
        seconds=seconds,
        memory_mib=memory,
        memory_kind="saved for backward",
    )
    times = {"started": "2026-11-21T04:00:00+0000", "ended": "2026-11-21T04:00:30+0000"}
    about = {**ABOUT, **about}
    return {"phase": "scratch", "figures": figures, "error": None, "about": about, **times}


def found(unit=1.0):
    return {
        "none, seed 0, scratch": record(90.0, 30.0 * unit),
        "none, seed 1, scratch": record(92.0, 34.0 * unit),
        "upper, famba-v, seed 0, scratch": record(89.0, 24.0 * unit, 15.0),
        "upper, famba-v, seed 1, scratch": record(92.0, 24.0 * unit, 15.0),
        "upper, ordered, seed 1, scratch": record(93.0, 17.0 * unit, 15.0),
    }


def table(grid, records, **given):
    return experiments.table(Results(grid, records), **given)


def cells(drawn, row):
    return dict(zip(drawn.head, drawn.rows[row], strict=True))


def test_a_row_has_means_deviations_and_differences_to_the_row_without_reduction(grid):
    drawn = table(grid(), found())
    assert drawn.head[:4] == ["strategy", "method", "token-layers", "MFLOPs"]
    upper, none = cells(drawn, 0), cells(drawn, 1)
    assert (none["top-1 %"], none["train s"]) == ("91.00 ± 1.41", "32.0 ± 2.8")
    assert upper["top-1 %"] == "90.50 ± 2.12 (-0.50)"
    assert upper["top-5 %"] == "99.00 ± 0.00 (+0.00)"
    assert upper["train s"] == "24.0 ± 0.0 (-25%)"
    assert upper["memory MiB"] == "15.0 (-25%)"
    share = float(upper["MFLOPs"].split()[0]) / float(none["MFLOPs"])
    assert upper["MFLOPs"].endswith(f"({100 * (share - 1):+.0f}%)")
    assert -0.5 < share - 1 < -0.1


def tuned(acc1, seconds=4.0):
    """The record of a cell of a grid whose rows start from the unreduced model."""
    known = record(acc1, 9.0, 10.0, commit="abc+", cpu=None)
    known["figures"] |= {"seconds_per_epoch": seconds, "images_per_second": 100.0}
    return known


def test_rows_that_start_from_the_unreduced_model_are_evaluated_and_fine_tuned(grid):
    known = {
        "unreduced, seed 0, unreduced": tuned(90.0),
        "unreduced, seed 1, unreduced": tuned(92.0),
        "ordered, seed 0, training-free": tuned(50.0),
        "ordered, seed 0, fine-tuned": tuned(80.0, 3.0),
        "ordered, seed 1, fine-tuned": tuned(83.0, 5.0),
    }
    text = table(grid(text=TUNED), known).render("markdown")
    unreduced, ordered = (
        line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| [uo]", line)
    )
    assert unreduced[:2] == ["unreduced", "0.500"]
    assert unreduced[3:] == ["91.00 ± 1.41", "-", "99.00 ± 0.00", "4.00 ± 0.00", "100", "10.0"]
    assert ordered[3:] == [
        "50.00 [1 of 2] (-40.00)",
        "81.50 ± 2.12",
        "99.00 ± 0.00 (+0.00)",
        "4.00 ± 1.41 (+0%)",
        "100",
        "10.0 (+0%)",
    ]
    assert "mean ± sample standard deviation over seeds 0, 1" in text
    assert "commit: abc+\n\ndate: 2026-11-21\n\nmachine: Linux, 2 cores, 2 processes" in text
    assert "versions: fambav 0.1.0, python 3.11.7, torch 2.13.0" in text
    assert "failed" not in text


def test_a_failed_cell_is_below_the_table(grid):
    failed = {**tuned(0.0), "figures": {}, "error": "no"}
    known = {"ordered, seed 0, fine-tuned": failed}
    text = table(grid(text=TUNED), known).render("text")
    assert text.endswith("failed: ordered, seed 0, fine-tuned")
    assert re.search(r"^ordered( +-){8}$", text, re.MULTILINE)


def test_a_missing_seed_is_told_and_differences_are_over_the_seeds_that_both_have(grid):
    ordered = cells(table(grid(), found()), 2)
    assert ordered["top-1 %"] == "93.00 [1 of 2] (+1.00)"
    assert ordered["train s"] == "17.0 [1 of 2] (-50%)"


def test_training_of_hours_is_told_in_hours(grid):
    assert cells(table(grid(), found(360.0)), 0)["train h"] == "2.40 ± 0.00 (-25%)"


def test_the_papers_figures_stand_beside_and_are_called_so(grid):
    drawn = table(grid(), found())
    upper, none, ordered = (cells(drawn, row) for row in range(3))
    assert upper["paper: top-1"] == "70.5 (+0.4)"
    assert upper["paper: time"] == "4:08:40 (-9%)"
    assert upper["paper: memory"] == "5996 (-28%)"
    assert none["paper: time"] == "4:33:02"
    assert ordered["paper: top-1"] == "-"
    assert "paper: top-5" not in upper
    assert "paper: a paper, table 1" in drawn.notes


def test_of_another_data_set_only_the_papers_differences_are_shown(grid):
    drawn = table(grid(('table 1"}', 'table 1", show: differences}')), found())
    upper, none, ordered = (cells(drawn, row) for row in range(3))
    heads = [f"paper's Δ {name}" for name in ("top-1", "time", "memory")]
    assert [upper[head] for head in heads] == ["+0.4", "-9%", "-28%"]
    assert [none[head] for head in heads] == ["", "", ""]
    assert [ordered[head] for head in heads] == ["-", "-", "-"]


def test_one_seed_has_no_deviation_and_is_called_so(grid):
    known = {name: known for name, known in found().items() if "seed 0" in name}
    drawn = table(grid(("[0, 1]", "[0]")), known)
    assert cells(drawn, 0)["top-1 %"] == "89.00 (-1.00)"
    assert drawn.notes[0].startswith("grid.yaml: seed 0 alone, in brackets against none;")


def test_cells_of_several_machines_have_a_table_without_time_and_memory(grid):
    head = table(grid(), found(), mixed=True).head
    assert head[-3:] == ["top-1 %", "top-5 %", "paper: top-1"]


def test_text_does_not_repeat_a_name_and_markdown_does(grid):
    shown = grid(('[none, "-"]', '[a none, "-"]'), ("[upper, famba-v]", "[none, famba-v]"))
    swapped = Table(head=["a", "b", "c"], rows=[["x", "y", "1"], ["x", "y", "2"]], names=2)
    assert swapped.render("text").splitlines()[1:3] == ["x  y  1", "   y  2"]
    assert swapped.render("markdown").splitlines()[2:4] == ["| x | y | 1 |", "| x | y | 2 |"]
    assert shown.baseline.name == "a none"


def test_a_bar_in_a_name_ends_no_cell_of_markdown():
    drawn = Table(head=["a"], rows=[["x | y"]], names=1).render("markdown")
    assert drawn.splitlines()[2] == "| x \\| y |"


def test_latex_is_a_booktabs_table_with_everything_escaped(grid):
    text = table(grid(), found()).render("latex")
    lines = text.splitlines()
    rules = [line for line in lines if line.endswith("rule")]
    assert rules == ["\\toprule", "\\midrule", "\\bottomrule"]
    assert "\\caption{100 \\% of a\\_b}" in lines
    columns = re.search(r"begin\{tabular\}\{(l+r+)\}", text).group(1)
    body = [line for line in lines if line.endswith("\\\\")]
    assert len(body) == 4
    assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in body} == {len(columns)}
    assert "90.50 $\\pm$ 2.12 ($-$0.50)" in text
    assert all(line.startswith("%") for line in lines[lines.index("\\end{table}") + 1 :])
    drawn = "\n".join(line for line in lines if not line.startswith("%"))
    assert not re.search(r"(?<!\\)[%#_^~]", drawn)
    assert drawn.isascii()
    for name in re.findall(r"\\begin\{(\w+)\}", text):
        assert text.count(f"\\begin{{{name}}}") == text.count(f"\\end{{{name}}}") == 1


def test_a_row_of_latex_does_not_begin_with_an_argument_of_the_line_before():
    drawn = Table(head=["a"], rows=[["[x]"]], names=1).render("latex")
    assert "\n{[}x] \\\\\n" in drawn


def test_every_special_character_is_escaped_in_latex():
    drawn = Table(head=["a"], rows=[["\\&%$#_{}~^<>±Δ"]], names=1).render("latex")
    row = drawn.splitlines()[-4]
    assert row == (
        "\\textbackslash{}\\&\\%\\$\\#\\_\\{\\}\\textasciitilde{}\\textasciicircum{}"
        "\\textless{}\\textgreater{}$\\pm$$\\Delta$ \\\\"
    )


def test_csv_has_a_line_for_each_cell_with_its_settings_and_where_it_comes_from(grid):
    text = table(grid(), found()).render("csv")
    lines = list(csv.DictReader(text.splitlines()))
    assert [line["row"] for line in lines] == [
        *["upper, famba-v"] * 2,
        *["none"] * 2,
        "upper, ordered",
    ]
    last = lines[-1]
    assert (last["fusion_token"], last["fusion_method"], last["seed"]) == ("12", "ordered", "1")
    assert lines[2]["fusion_token"] == ""
    where = {name: last[name] for name in ("platform", "cpu", "cpu_count", "threads", "jobs")}
    assert where == {n: str(ABOUT[n]) for n in where}
    assert last["versions"] == "fambav 0.1.0, python 3.11.7, torch 2.13.0"
    assert (last["commit"], last["ended"]) == ("abc", "2026-11-21T04:00:30+0000")


@pytest.mark.parametrize("name", ["digits-table1", "digits-table2", "digits-table3"])
def test_committed_results_have_the_columns_that_are_written_today(name):
    committed = (ROOT / "benchmarks" / f"{name.replace('-', '_')}.csv").read_text()
    drawn = table(experiments.read_grid(grids()[name]), {})
    assert drawn.render("csv") == committed.splitlines()[0]


def test_json_has_every_setting_of_every_cell_and_the_means_of_every_row(grid):
    told = json.loads(table(grid(), found()).render("json"))
    cell = next(known for known in told["cells"] if known["row"] == "upper, ordered")
    assert (cell["seed"], cell["commit"], cell["machine"]["cpu"]) == (1, "abc", "EPYC")
    assert (cell["config"]["fusion_method"], cell["config"]["epochs"]) == ("ordered", 4)
    assert (cell["started"][11:16], cell["ended"][11:19]) == ("04:00", "04:00:30")
    row = told["rows"][0]
    assert row["phases"]["scratch"]["acc1"] == {"mean": 90.5, "std": 4.5**0.5, "count": 2}
    assert [known["baseline"] for known in told["rows"]] == [False, True, False]


def test_points_are_the_rows_of_a_folder(grid, tmp_path):
    (tmp_path / "out").mkdir()
    shown = grid()
    assert not experiments.is_grid(tmp_path / "out")
    few = {name: known for name, known in found().items() if "ordered" not in name}
    (tmp_path / "out" / "results.json").write_text(table(shown, few).render("json"))
    assert experiments.is_grid(tmp_path / "out")
    upper, none = experiments.read_points(tmp_path / "out")
    assert (upper.name, upper.labels, upper.method) == (
        "upper, famba-v",
        ("upper", "famba-v"),
        "famba-v",
    )
    assert (upper.baseline, none.baseline, none.method) == (False, True, "none")
    assert upper.figures["acc1"] == experiments.Estimate(90.5, 4.5**0.5, 2)
    assert upper.figures["seconds"].mean == 24.0
    assert upper.figures["flops"].mean < none.figures["flops"].mean
    assert "seconds_per_epoch" not in upper.figures
    assert upper.paper == {"acc1": 70.5, "seconds": 14920.0, "memory": 5996.0}


@pytest.mark.parametrize(
    ("text", "phase", "message"),
    [
        (None, None, "expected a folder with results.json in it"),
        ("{", None, "results.json is damaged, expected the results of a grid"),
        ("[]", None, "results.json is damaged"),
        ("{}", None, "results.json: grid is missing, expected text"),
        ("whole", "fine-tuned", "phase is 'fine-tuned', expected one of scratch"),
    ],
)
def test_a_folder_without_results_is_refused_in_one_line(grid, tmp_path, text, phase, message):
    if text is not None:
        told = table(grid(), found()).render("json") if text == "whole" else text
        (tmp_path / "results.json").write_text(told)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        experiments.read_points(tmp_path, phase=phase)
    assert "\n" not in str(caught.value)


def test_a_grid_without_a_finished_cell_has_no_points(grid, tmp_path):
    (tmp_path / "results.json").write_text(table(grid(), {}).render("json"))
    assert experiments.read_points(tmp_path) == []


@pytest.mark.parametrize("name", sorted(name for name in grids() if "-table" in name))
def test_every_shipped_grid_compares_rows_of_one_recipe(name):
    read = experiments.read_grid(grids()[name])
    assert read.baseline is read.rows[0]
    assert read.seeds == (0, 1, 2)
    methods = [row.labels[-1] for row in read.rows[1:]]
    assert methods == ["famba-v", "ordered"] * (len(methods) // 2)
    for merged, ordered in zip(read.rows[1::2], read.rows[2::2], strict=True):
        assert ordered.settings == {**merged.settings, "fusion_method": "ordered"}
        assert ordered.labels[:-1] == merged.labels[:-1]
        assert ordered.paper is None


@pytest.mark.parametrize("name", [name for name in grids() if name.startswith("cifar100-table")])
def test_rows_of_the_papers_tables_have_its_figures(name):
    read = experiments.read_grid(grids()[name])
    assert not read.differences
    small = [76.9, 93.6, 27976.0, 16439.0]
    columns = {tuple(row.paper) for row in (read.rows[0], *read.rows[1::2])}
    assert columns == {("acc1", "acc5", "seconds", "memory")}
    assert list(read.rows[0].paper.values()) == (
        small if "small" in name else [70.1, 90.6, 16382.0, 8302.0]
    )


def test_figures_in_grids_are_those_in_the_configs_they_come_from():
    for name in ("cifar100-table1-tiny", "cifar100-table1-small"):
        for row in experiments.read_grid(grids()[name]).rows:
            if row.paper is None:
                continue
            told = re.search(
                r"top-1 ([\d.]+), top-5 ([\d.]+), .*memory (\d+)", row.file.read_text()
            )
            assert [float(value) for value in told.groups()] == [
                row.paper["acc1"],
                row.paper["acc5"],
                row.paper["memory"],
            ]


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("cifar100-table1-tiny", 168, 171),
        ("cifar100-table1-small", 168, 171),
        ("cifar100-table2", 150, 171),
        ("digits-table1", 48, 48),
        ("digits-table2", 30, 32),
        ("shapes100-table1", 48, 48),
    ],
)
def test_rows_that_are_compared_lose_about_the_same_number_of_tokens(name, least, most):
    from fambav.training import schedule

    read = experiments.read_grid(grids()[name], seeds=1)
    removed = [schedule(cell.config).removed for cell in read.cells]
    assert removed[0] == 0
    assert (min(removed[1:]), max(removed)) == (least, most)


def test_papers_rows_beside_table_3_of_digits_lose_about_as_large_a_part_of_their_tokens():
    from fambav.training import schedule

    paper = {str(c.row.paper): schedule(c.config) for c in cells_of("cifar100-table3")}
    for cell in cells_of("digits-table3"):
        ours = schedule(cell.config)
        theirs = paper[str(cell.row.paper)]
        assert ours.removed / 64 == pytest.approx(theirs.removed / 197, abs=0.04)


def cells_of(name):
    read = experiments.read_grid(grids()[name], seeds=1)
    return [cell for cell in read.cells if cell.row.paper is not None]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "train: scratch",
            "train: unreduced",
            "train is 'unreduced', expected one of from-unreduced, scratch",
        ),
        ("seeds:", "finetune: {epochs: 1}\nseeds:", "finetune has no meaning with train: scratch"),
        ("base: base.yaml\n", "", "row 'upper, famba-v' has no config, expected one, or a base"),
        ("fusion_strategy: none", "fusion_strategy: all", "expected a row without reduction"),
        ('[none, "-"]', "none", "row 2: name is ['none'], expected 2 of them, as `names` has"),
        ("[strategy, method]", "strategy", "names is 'strategy', expected a list of columns"),
        ("fusion_method: ordered", "epochs: 3\n    fusion_token: 3", "fusion_token is given twice"),
        (
            "fusion_method: ordered",
            "epochs: 3",
            "differs from 'none' in epochs (4, 3), expected the",
        ),
        ("fusion_method: ordered", "epochs: 3", "vary: [epochs] in the grid allows it"),
        (
            "seeds:",
            "vary: [epoch]\nseeds:",
            "vary: 'epoch' is not a setting; did you mean 'epochs'",
        ),
        ("seeds:", "vary: lr\nseeds:", "vary is 'lr', expected a list of settings such as [lr]"),
        ("70.5", "high", "paper: acc1 is 'high', expected a number"),
        ("acc1: 70.5", "top: 70.5", "paper: 'top' is no figure; known: acc1, acc5, miou, "),
        ('"4:08:40"', "4:08:40", "paper: time is 14920, expected hours, minutes and seconds in"),
        ('"4:08:40"', '"4:61:40"', "paper: time is '4:61:40', expected hours"),
        ('paper: {source: "a paper, table 1"}\n', "", "paper is missing, expected {source: ...}"),
        ('source: "a paper, table 1"', "show: figures", "paper: source is none, expected a text"),
        ('table 1"', 'table 1", show: all', "show is 'all', expected one of figures, differences"),
        ('title: "100 % of a_b"', "title: 3", "title is 3, expected a text"),
    ],
)
def test_a_bad_grid_is_refused_in_one_line_that_names_the_place(grid, old, new, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        grid((old, new))
    assert "grid.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_may_differ_in_what_the_grid_says(grid):
    shown = grid(("seeds:", "vary: [epochs]\nseeds:"), ("fusion_method: ordered", "epochs: 3"))
    assert {cell.config.optim.epochs for cell in shown.cells} == {3, 4}
    assert "rows differ in epochs too" in table(shown, found()).notes


def test_differences_of_a_paper_need_its_row_without_reduction(grid):
    without = ('    paper: {acc1: 70.1, time: "4:33:02", memory: 8302}\n', "")
    with pytest.raises(ConfigError, match="row 'none' has no figures of the paper"):
        grid(without, ('table 1"}', 'table 1", show: differences}'))


def test_a_row_may_be_a_config_of_its_own(grid, tmp_path):
    (tmp_path / "own.yaml").write_text(f"{BASE}fusion_strategy: all\nfusion_token: 8\n")
    shown = grid(("    fusion_method: ordered", "    config: own.yaml"))
    cell = next(cell for cell in shown.cells if cell.row.name == "upper, ordered")
    fusion = cell.config.fusion
    assert (fusion.fusion_strategy, fusion.fusion_token) == ("upper", 12)
    text = GRID[: GRID.index("  - name: [upper, ordered]")]
    (tmp_path / "grid.yaml").write_text(f"{text}  - {{name: [all, famba-v], config: own.yaml}}\n")
    row = experiments.read_grid(tmp_path / "grid.yaml").rows[-1]
    assert row.settings == {"fusion_strategy": "all", "fusion_token": 8}


def test_seeds_and_settings_may_be_others_than_the_files(grid):
    path = grid().path
    read = experiments.read_grid(path, seeds=4)
    assert read.seeds == (0, 1, 2, 3)
    assert len(read.cells) == 12
    settings = {"epochs": 7, "lr": 1e-4, "data_path": "elsewhere"}
    read = experiments.read_grid(grids()["cifar100-micro"], seeds=1, settings=settings)
    assert {cell.config.data.data_path for cell in read.cells} == {"elsewhere"}
    recipes = {(c.phase, c.config.optim.epochs, c.config.optim.lr) for c in read.cells}
    assert ("unreduced", 7, 1e-4) in recipes
    assert ("fine-tuned", 1, 5e-4) in recipes, "what fine-tuning sets by itself stays"
