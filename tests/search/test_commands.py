"""fambav search-plan and fambav tune, from flags to files."""

import json

import pytest
import torch

from fambav import config, training
from fambav.cli import main
from fambav.commands import search_plan, tune
from fambav.config import Config, ConfigError
from fambav.data import load
from fambav.search.baselines import Row, count_beaten
from fambav.search.budget_search import SearchOptions
from fambav.search.budget_search import search_plan as search
from fambav.search.parsing import parse_budget
from fambav.search.plan_file import plan_settings
from fambav.search.space import Plan
from fambav.search.subject import opened
from fambav.tasks import Scores, task_of
from tests.search.made import weights

SMALL = ["--images", "8", "--steps", "3", "--trials", "2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return weights(tmp_path_factory.mktemp("trained"), fusion_plan="6:2", class_token="head")


def words(source, folder, *rest):
    files = ["--output", str(folder / "plan.yaml"), "--json", str(folder / "plan.json")]
    return [str(source), *files, *rest]


def figures(folder):
    return json.loads((folder / "plan.json").read_text())


def test_the_plan_found_meets_the_budget_and_runs_as_written(source, tmp_path, capsys):
    search_plan.run(words(source, tmp_path, "--budget", "token-layers:0.7", *SMALL, "--compare"))
    found = figures(tmp_path)
    made = config.load(tmp_path / "plan.yaml")
    assert "# fambav search-plan " in (tmp_path / "plan.yaml").read_text()
    schedule = training.schedule(made)
    assert list(schedule.counts) == found["counts"] and any(found["counts"])
    assert schedule.share == found["cost"] <= 0.7
    assert (made.model.class_token, made.model.patch_size) == ("head", 8)
    capsys.readouterr()
    assert main(["--config", str(tmp_path / "plan.yaml"), "--eval", "--resume", str(source)]) == 0
    said = capsys.readouterr().out
    row = next(row for row in found["held_out"] if row["name"] == "found")
    assert f"* Acc@1 {row['acc1']:.3f}" in said and schedule.table() in said


def test_no_strategy_compared_costs_less_and_the_front_only_holds_what_nothing_beats(
    source, tmp_path, capsys
):
    search_plan.run(words(source, tmp_path, "--budget", "flops:0.8", *SMALL, "--compare"))
    unreduced, found, *others = figures(tmp_path)["held_out"]
    assert unreduced["cost"] == 1.0 and found["cost"] <= 0.8
    assert {"all", "interleaved"} < {row["name"] for row in others}
    assert all(row["cost"] >= found["cost"] for row in others)
    front = figures(tmp_path)["front"]
    assert [p["cost"] for p in front] == sorted({p["cost"] for p in front}, reverse=True)
    assert [p["loss"] for p in front] == sorted({p["loss"] for p in front})
    assert front[-1]["cost"] <= 0.8
    assert "as trained, the reference of the search: top-1 " in capsys.readouterr().out


def test_strategies_that_are_beaten_and_equalled_are_counted():
    rows = [Row("", (), 1.0, value) for value in (97.0, 90.0, 89.0, 90.0, 91.0, 12.0)]
    higher = task_of("DIGITS").primary
    assert count_beaten(rows, higher) == (2, 1, 4)
    assert count_beaten(rows, higher._replace(higher_is_better=False)) == (1, 1, 4)


def test_the_same_seed_finds_the_same_and_another_draws_other_images(source, tmp_path):
    runs = []
    for seed in ("0", "0", "1"):
        flags = ["--budget", "token-layers:0.75", "--seed", seed, *SMALL]
        search_plan.run(words(source, tmp_path, *flags))
        runs.append(figures(tmp_path))
    assert runs[0] == runs[1] and runs[0]["held_out"] == []
    assert runs[0]["loss"] != runs[2]["loss"]


def test_of_several_methods_the_best_is_taken_and_written_so_that_it_runs(source, tmp_path):
    flags = ["--budget", "token-layers:0.8", "--method", "random", "prune-aligned", *SMALL]
    search_plan.run(words(source, tmp_path, *flags))
    found, made = figures(tmp_path), config.load(tmp_path / "plan.yaml")
    assert made.reduction.reduction == found["method"]
    assert list(training.schedule(made).counts) == found["counts"]
    assert {plan["method"] for plan in found["front"]} <= {"random", "prune-aligned"}


def test_policies_of_a_method_are_searched_with_and_written(source, tmp_path):
    flags = ["--budget", "token-layers:0.8", "--scan-policy", "aligned", "--gap-policy", "bias"]
    search_plan.run(words(source, tmp_path, *flags, "--algorithm", "greedy", *SMALL))
    made = config.load(tmp_path / "plan.yaml")
    assert (made.reduction.scan_policy, made.reduction.gap_policy) == ("aligned", "bias")
    assert training.reduction(made).scan == "aligned"


def test_a_budget_in_milliseconds_is_measured(source, tmp_path, monkeypatch, capsys):
    def times(self, reductions):
        return 100.0, [100 * made.schedule.share + 3 for made in reductions]

    monkeypatch.setattr("fambav.search.cost_models.Stopwatch.times", times)
    search_plan.run(words(source, tmp_path, "--budget", "ms:80", *SMALL))
    found = figures(tmp_path)
    share = training.schedule(config.load(tmp_path / "plan.yaml")).share
    assert found["cost"] == pytest.approx(100 * share + 3) and 70 < found["cost"] <= 80
    assert "noisy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("budget", "method"), [("token-layers:0.1", "ordered"), ("flops:0.01", "storm")]
)
def test_a_budget_that_no_plan_meets_is_refused_with_the_least(source, tmp_path, budget, method):
    flags = [str(source), "--budget", budget, "--method", method, *SMALL]
    with pytest.raises(ValueError, match=f"the least that {method} can reach") as refused:
        search_plan.run(flags)
    least = str(refused.value).split("expected at least ")[1].split(",")[0]
    search_plan.run([str(source), "--budget", least, "--method", method, *SMALL])


def test_images_of_the_held_out_set_are_never_looked_at(source, monkeypatch):
    class Forbidden:
        def __len__(self):
            return 360

        def __getitem__(self, place):
            raise AssertionError("a held-out image was read")

    found, read = load("DIGITS"), []

    class Watched:
        def __len__(self):
            return len(found.train)

        def __getitem__(self, place):
            read.append(place)
            return found.train[place]

    with opened(source) as subject:
        data = subject.data.__class__(**{**vars(found), "train": Watched(), "val": Forbidden()})
        object.__setattr__(subject, "data", data)
        budget = parse_budget("token-layers:0.8")
        options = SearchOptions(
            budget=budget,
            methods=["ordered"],
            policies={},
            images=30,
            objective="accuracy",
            algorithm="both",
            steps=3,
            trials=4,
            seed=5,
        )
        search(subject, options, lambda _: None)
    assert len(read) == len(set(read)) == 30 and read != sorted(read)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--budget", "gflops:3"], "budget is 'gflops:3'"),
        (["--budget", "flops:0.5", "--method", "orderd"], "did you mean 'ordered'"),
        (["--budget", "flops:0.5", "--images", "0"], "--images is 0"),
        (["--budget", "flops:0.5", "--steps", "0"], "--steps is 0"),
        (["--budget", "flops:0.5", "--seed", "-1"], "--seed is -1"),
        (["--budget", "flops:0.5", "--images", "1438"], "at most 1437, the training images"),
        (["--budget", "flops:0.5", "--output", "no/such/plan.yaml"], "folder is 'no/such'"),
        (["--budget", "flops:0.5", "--fusion-plan", "6:1"], "expected --method"),
        (["--budget", "flops:0.5", "--scan-policy", "masked"], "saves something"),
        (["--budget", "flops:0.5", "--epochs", "3"], "where it would change nothing"),
        (["--budget", "flops:0.5", "--patch-size", "4"], "beside weights that know theirs"),
        (["--budget", "flops:0.5", "--model", "vim_tiny"], "expected no model beside it"),
        (["--budget", "flops:0.5", "--method", "evit", "stm", "--gap-policy", "bias"], "several"),
    ],
)
def test_what_cannot_be_meant_is_refused(source, flags, said):
    with pytest.raises(ValueError, match=said):
        search_plan.run([str(source), *flags])


@pytest.mark.parametrize("command", [search_plan, tune])
def test_a_checkpoint_that_is_missing_or_damaged_is_refused(source, tmp_path, command):
    flags = ["--budget", "flops:0.5"] if command is search_plan else ["--margin", "1"]
    with pytest.raises(ConfigError, match=r"checkpoint is .*gone\.pth"):
        command.run([str(tmp_path / "gone.pth"), *flags])
    with pytest.raises(ValueError, match=r"holds no best_checkpoint\.pth"):
        command.run([str(tmp_path), *flags])
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(source.read_bytes()[:4000])
    with pytest.raises(ValueError, match="damaged"):
        command.run([str(damaged), *flags])


def test_a_file_that_is_not_ours_needs_its_model_and_its_data(source, tmp_path):
    bare = tmp_path / "bare.pth"
    torch.save({"model": torch.load(source, weights_only=True)["model"]}, bare)
    flags = ["--budget", "token-layers:0.8", "--algorithm", "greedy", *SMALL]
    with pytest.raises(ValueError, match="does not say what it is of"):
        search_plan.run([str(bare), *flags])
    model = ["--model", "vim_micro", "--patch-size", "8", "--input-size", "32"]
    data = ["--data-set", "DIGITS", "--class-token", "head", "--num-workers", "0"]
    search_plan.run(words(bare, tmp_path, *flags, *model, *data))
    assert training.schedule(config.load(tmp_path / "plan.yaml")).share <= 0.8


def test_a_run_is_known_by_its_folder(source, tmp_path):
    (tmp_path / "checkpoint.pth").write_bytes(source.read_bytes())
    with opened(tmp_path) as subject:
        assert subject.path == tmp_path / "checkpoint.pth"
        assert subject.net.schedule.removed == 0 and subject.run.config.fusion.fusion_plan == "6:2"
        assert subject.reduction.schedule.counts == (0, 0, 0, 0, 0, 2)


def test_tuning_finds_the_margin_and_writes_what_it_found(source, tmp_path, capsys):
    tune.run(words(source, tmp_path, "--margin", "4", "--family", "upper:4"))
    found = figures(tmp_path)
    best, trail = found["answer"], found["trail"]
    assert [(row["name"], row["counts"]) for row in trail[:2]] == [
        ("as trained", [0, 0, 0, 0, 0, 2]),
        ("every token", [0] * 6),
    ]
    assert best in trail
    assert best["lost"] == pytest.approx(trail[0]["acc1"] - best["acc1"]) and best["lost"] <= 4
    behind = [row for row in trail[2:] if row["token_layers"] < best["token_layers"]]
    assert all(row["lost"] > 4 for row in behind)
    assert list(training.schedule(config.load(tmp_path / "plan.yaml")).counts) == best["counts"]
    said = capsys.readouterr().out
    assert "the held-out images were used to choose" in said


def test_a_margin_that_nothing_holds_is_said(source, tmp_path, monkeypatch, capsys):
    falling = iter(range(90, 0, -1))

    def held_out(self, reduction):
        return Scores({"acc1": float(next(falling))}, samples=1)

    monkeypatch.setattr("fambav.search.subject.Subject.held_out", held_out)
    tune.run(words(source, tmp_path, "--margin", "0.5"))
    assert figures(tmp_path)["answer"] is None and not (tmp_path / "plan.yaml").exists()
    said = capsys.readouterr().out
    assert "even the smallest reduction, r 1, loses more than 0.5 points" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--margin", "-1"], "--margin is -1"),
        (["--margin", "nan"], "--margin is nan"),
        (["--margin", "1", "--family", "uper:3"], "did you mean 'upper'"),
        (["--margin", "1", "--family", "upper:7"], "a layer from 1 to 6"),
        (["--margin", "1", "--method", "fuse"], "--method is 'fuse'"),
    ],
)
def test_what_cannot_be_tuned_is_refused(source, flags, said):
    with pytest.raises(ValueError, match=said):
        tune.run([str(source), *flags])


@pytest.mark.parametrize("method", ["ordered", "famba-v", "utrc"])
def test_settings_of_a_plan_train_and_evaluate_without_the_reduction_of_the_run(method):
    recipe = Config.from_flat({"model": "vim_micro", "data_set": "DIGITS", "epochs": 7})
    made = plan_settings(recipe, Plan(method, (0, 4, 0, 0, 2, 0)))
    read = Config.from_flat(made.replace(resume="x.pth", eval=True).flat())
    assert training.schedule(read).counts == (0, 4, 0, 0, 2, 0)
    assert read.optim.epochs == 7 and training.reduction(read).name == method
