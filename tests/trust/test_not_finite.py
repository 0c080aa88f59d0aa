"""A loss or a gradient that is no number: all stop at one step, and nothing good is lost."""

import json

import pytest
import torch

from fambav.engine import checkpoint
from fambav.engine.step import TrainStep
from tests.identical import log
from tests.trust.forked import run, run_two

UPDATE = 3


def poisons(what, update=UPDATE):
    """Spoil the loss, or one gradient while the loss stays as it is, of one update."""

    def prepare():
        real = TrainStep._backward

        def spoiled(self, batch, number, micro):
            loss = real(self, batch, number, micro)
            if number == update and what == "gradient":
                next(self.model.parameters()).grad.view(-1)[0] = torch.inf
            return loss * (torch.nan if number == update and what == "loss" else 1)

        TrainStep._backward = spoiled

    return prepare


def finite(state):
    return all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_none_ends_the_run_with_status_3_and_a_dump(recipe, tmp_path, what):
    folder = tmp_path / "run"
    found = run(recipe, folder, poisons(what))
    assert found.status == 3, found.out
    errors = [line for line in found.out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"not finite at update {UPDATE}," in errors[0]
    assert "Traceback" not in found.out
    known = json.loads((folder / "not_finite" / "update.json").read_text())
    assert (known["update"], known["epoch"]) == (UPDATE, 1)
    ((first, second),) = known["samples"]
    assert len(first) == len(second) == 8
    state = checkpoint.load(folder / "not_finite" / "state.pth")
    assert state["updates"] == UPDATE
    assert len(state["losses"]) == UPDATE - 2
    assert finite(state), "the weights are those before the update"
    last = checkpoint.load(folder / "checkpoint.pth")
    assert last["epoch"] == 0
    assert finite(last)
    assert len(log(folder)) == 1


def test_the_dump_is_a_run_to_go_on_with(recipe, tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"
    assert run(recipe, folder, poisons("loss")).status == 3
    found = run([*recipe, "--resume", folder / "not_finite" / "state.pth"], other)
    assert found.status == 0, found.out
    assert [line["epoch"] for line in log(other)] == [0, 1, 2]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_of_two_processes_both_stop_at_the_step_where_one_went_wrong(recipe, tmp_path, what):
    def prepare(rank):
        if rank == 1:
            poisons(what)()

    words = [*recipe, "--batch-size", "4"]
    found = run_two(words, tmp_path / "run", prepare)
    assert found.status == [3, 3], found.out + found.other
    assert found.out.count("error: ") == 1
    assert f"not finite at update {UPDATE}," in found.out
    assert "error: " not in found.other
    known = json.loads((tmp_path / "run" / "not_finite" / "update.json").read_text())
    assert [[len(batch) for batch in mine] for mine in known["samples"]] == [[4, 4], [4, 4]]
    assert finite(checkpoint.load(tmp_path / "run" / "checkpoint.pth"))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_with_the_flag_such_an_update_is_left_out_and_counted(recipe, tmp_path, what):
    found = run([*recipe, "--if_continue_inf"], tmp_path / "run", poisons(what))
    assert found.status == 0, found.out
    assert [line["skipped_updates"] for line in log(tmp_path / "run")] == [0, 1, 0]
    assert finite(checkpoint.load(tmp_path / "run" / "checkpoint.pth"))
