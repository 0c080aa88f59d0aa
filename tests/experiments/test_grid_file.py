"""A grid's file: the cells that it asks for, what makes a cell another one, and bad files."""

import json
import re
from pathlib import Path

import pytest

import fambav
from fambav.config import ConfigError
from fambav.experiments import read_grid
from fambav.training import schedule

BASE = "model: vim_micro\nclass_token: none\nepochs: 4\nlr: 3.0e-3\nunscale_lr: true\n"
GRID = """base: base.yaml
seeds: [3, 0]
finetune: {epochs: 2, lr: 1.0e-3}
vary: [lr]
rows:
  - {name: "ordered, 12", fusion_strategy: upper, fusion_layer: 3, fusion_method: ordered}
  - {name: Famba-V, fusion_strategy: all, fusion_token: 2, lr: 5.0e-4}
"""


@pytest.fixture
def made(tmp_path):
    """Writes a grid, some of its text replaced, and its base."""

    def write(*changes, base=BASE):
        text = GRID
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "base.yaml").write_text(base)
        (tmp_path / "grid.yaml").write_text(text)
        return tmp_path / "grid.yaml"

    return write


@pytest.fixture
def cells(made):
    return {cell.name: cell for cell in read_grid(made()).cells}


def test_unreduced_models_come_first_and_then_seed_by_seed(made):
    names = [cell.name for cell in read_grid(made()).cells]
    rows = ("ordered, 12", "Famba-V")
    assert names == [
        "unreduced, seed 3, unreduced",
        "unreduced, seed 0, unreduced",
        *(
            f"{row}, seed {seed}, {phase}"
            for seed in (3, 0)
            for row, phase in [
                ("unreduced", "fine-tuned"),
                *((row, phase) for row in rows for phase in ("training-free", "fine-tuned")),
            ]
        ),
    ]


def test_a_cell_is_base_then_fine_tuning_then_row(cells):
    def read(name):
        found = cells[name].config.flat()
        return [found[n] for n in ("epochs", "lr", "fusion_token", "fusion_method", "seed")]

    assert read("unreduced, seed 3, unreduced") == [4, 3e-3, 0, "famba-v", 3]
    assert read("unreduced, seed 0, fine-tuned") == [2, 1e-3, 0, "famba-v", 0]
    assert read("ordered, 12, seed 3, fine-tuned") == [2, 1e-3, 7, "ordered", 3]
    assert read("Famba-V, seed 0, training-free") == [4, 5e-4, 2, "famba-v", 0]
    assert read("Famba-V, seed 0, fine-tuned") == [2, 5e-4, 2, "famba-v", 0]


def test_a_cell_starts_from_its_seeds_unreduced_model_and_has_a_folder_of_its_own(cells):
    for cell in cells.values():
        if cell.phase == "unreduced":
            assert cell.start is None
        else:
            assert (cell.start.phase, cell.start.seed) == ("unreduced", cell.seed)
    assert len({cell.folder for cell in cells.values()}) == len(cells)
    place = cells["ordered, 12, seed 3, fine-tuned"].folder
    assert str(place) == "cells/ordered-12/seed3/fine-tuned"


def test_without_fine_tuning_nothing_is_trained_but_unreduced_models(made):
    found = read_grid(made(("finetune: {epochs: 2, lr: 1.0e-3}\n", "")))
    assert {cell.phase for cell in found.cells} == {"unreduced", "training-free"}
    assert not [cell for cell in found.cells if not cell.row.settings and cell.start]


def test_a_cell_computes_with_one_thread_unless_its_settings_say_more(made):
    assert {cell.config.run.threads for cell in read_grid(made()).cells} == {1}
    path = made(base=f"{BASE}threads: 2\n")
    assert {cell.config.run.threads for cell in read_grid(path).cells} == {2}


def recorded(cell):
    return json.loads(json.dumps(cell.settings))


def test_a_cell_agrees_with_what_it_wrote_and_with_no_other(cells):
    for cell in cells.values():
        others = [name for name, other in cells.items() if cell.agrees(recorded(other))]
        assert others == [cell.name]


def test_a_changed_row_is_a_change_of_its_cells_only(made):
    before = {cell.name: recorded(cell) for cell in read_grid(made()).cells}
    after = read_grid(made(("fusion_token: 2", "fusion_token: 3"))).cells
    changed = {cell.name for cell in after if not cell.agrees(before[cell.name])}
    assert changed == {name for name in before if name.startswith("Famba-V")}


def test_a_changed_unreduced_model_is_a_change_of_every_cell(made):
    before = {cell.name: recorded(cell) for cell in read_grid(made()).cells}
    after = read_grid(made(base=f"{BASE}smoothing: 0.2\n")).cells
    assert not any(cell.agrees(before[cell.name]) for cell in after)


def test_other_epochs_of_the_unreduced_model_change_what_is_fine_tuned_from_it(made):
    before = {cell.name: recorded(cell) for cell in read_grid(made()).cells}
    after = read_grid(made(base=BASE.replace("epochs: 4", "epochs: 5"))).cells
    assert not any(cell.agrees(before[cell.name]) for cell in after)


def test_where_files_are_is_no_change(made):
    before = {cell.name: recorded(cell) for cell in read_grid(made()).cells}
    after = read_grid(made(base=f"{BASE}log_every: 3\n")).cells
    assert all(cell.agrees(before[cell.name]) for cell in after)


def test_a_setting_that_came_later_counts_as_its_default(cells):
    cell = cells["ordered, 12, seed 3, fine-tuned"]
    known = recorded(cell)
    del known["config"]["grad_checkpointing"]
    assert cell.agrees(known)
    del known["config"]["lr"]
    assert not cell.agrees(known)
    assert not cell.agrees({**recorded(cell), "config": {"gone": 1}})
    assert not cell.agrees(None)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds", "seed", "'seed' is not of a grid; did you mean 'seeds'?"),
        ("base: base.yaml", "base: 3", "base is 3, expected the path of a YAML file"),
        ("base: base.yaml\n", "", "base is none, expected the path of a YAML file"),
        ("base.yaml", "none.yaml", "none.yaml', expected a readable file"),
        ("[3, 0]", "3", "seeds is 3, expected a list of seeds such as [0, 1, 2]"),
        ("[3, 0]", "[]", "seeds is [], expected a list of seeds"),
        ("[3, 0]", "[-1]", "seeds is [-1], expected a list of seeds"),
        ("[3, 0]", "[true]", "seeds is [True], expected a list of seeds"),
        ("[3, 0]", "[3, 3]", "seeds is [3, 3], expected every seed once"),
        ("{epochs: 2, lr: 1.0e-3}", "2", "finetune is 2, expected settings such as"),
        ("{epochs: 2,", "{ephocs: 2,", "finetune: 'ephocs' is not a setting; did you mean epochs?"),
        ("{epochs: 2,", "{eval: true,", "finetune sets eval, which the grid sets itself"),
        ("{name: Famba-V, f", "{f", "row 2 is {'fusion_strategy': 'all'"),
        ("name: Famba-V", "name: 5", "expected settings and a `name`, which is a text"),
        ("name: Famba-V", "name: '!'", "row 2: name is '!', expected a name with a letter"),
        (
            "name: Famba-V",
            "name: Unreduced",
            "name that no other row has; it is too near to 'unreduced'",
        ),
        ("name: Famba-V", "name: ordered 12", "it is too near to 'ordered, 12'"),
        ("fusion_token: 2", "fusion_tokens: 2", "row 'Famba-V': 'fusion_tokens' is not a setting"),
        ("fusion_token: 2", "fusion_token: x", "row 'Famba-V': fusion_token is 'x', expected"),
        ("fusion_token: 2", "seed: 2", "row 'Famba-V' sets seed, which the grid sets itself"),
        ("fusion_token: 2", "5: 2", "row 'Famba-V' is {"),
        (", fusion_strategy: all, fusion_token: 2, lr: 5.0e-4", "", "'Famba-V' is {}, expected"),
        (GRID[GRID.index("rows") :], "rows: 3\n", "rows is 3, expected a list of rows"),
        (GRID[GRID.index("rows") :], "", "rows is none, expected a list of rows"),
        ("seeds: [3, 0]", "seeds: [3, 0", "is not YAML"),
    ],
)
def test_a_bad_grid_is_refused_in_one_line_that_names_the_place(made, old, new, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read_grid(made((old, new)))
    assert ".yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["output_dir: x", "resume: x.pth", "finetune: x.pth", "seed: 1"])
def test_a_base_does_not_set_what_the_grid_sets(made, line):
    with pytest.raises(ConfigError, match="which the grid sets itself"):
        read_grid(made(base=f"{BASE}{line}\n"))


SHIPPED = Path(fambav.__file__).parents[1] / "configs/grids/digits-reductions.yaml"


@pytest.fixture(scope="module")
def shipped():
    return read_grid(SHIPPED)


def test_the_shipped_grid_leaves_the_share_of_tokens_that_each_name_says(shipped):
    found = {cell.row.name: cell.config for cell in shipped.cells if cell.phase == "training-free"}
    for name, config in found.items():
        assert schedule(config).share == pytest.approx(float(name.split(", ")[-1]), abs=0.01), name


def test_the_shipped_grid_has_every_method_at_three_points(shipped):
    from fambav.registry import METHODS

    rows = [row.settings["reduction"] for row in shipped.rows if row.settings]
    assert set(rows) == set(METHODS)
    assert all(rows.count(name) % 3 == 0 for name in METHODS)
