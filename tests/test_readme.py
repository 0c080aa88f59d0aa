"""What the README shows is what the software does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import fambav
import fambav.reduction  # registers the methods
from fambav.commands.bench import parser as bench_parser
from fambav.config import parse
from fambav.registry import REDUCERS
from tests.data.made import made_cifar
from tests.made import run

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text()
BLOCKS = dict(re.findall(r"## ([^\n]+)\n(?:(?!\n## ).)*?```python\n(.*?)```", TEXT, re.DOTALL))


@pytest.fixture
def registry():
    before = dict(REDUCERS._builders)
    yield
    REDUCERS._builders.clear()
    REDUCERS._builders.update(before)


def test_the_reducer_of_the_readme_removes_what_the_plan_says(registry):
    shown = {}
    exec(compile(BLOCKS["A reducer of your own"], README.name, "exec"), shown)
    model = shown["model"]
    seen = []
    for block in model.layers:
        block.mixer.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert tuple(seen) == model.schedule.lengths == (65, 65, 53, 41, 29, 17)


@pytest.mark.slow
def test_the_reducer_of_the_readme_trains_from_a_file_of_its_own(tmp_path):
    assert BLOCKS["A reducer of your own"].count("\n") < 40
    file, data = tmp_path / "quiet.py", tmp_path / "data"
    section = TEXT.split("## A reducer of your own\n")[1]
    script, end, *_ = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    file.write_text(script + end)
    made_cifar(data, train=16, test=8)
    words = f"""--reduction quiet --reduction-schedule r:12@3-6 --reduction-options power=1
        --model vim_micro --data-set CIFAR --data-path {data} --epochs 1 --batch-size 8
        --num_workers 1 --output_dir {tmp_path / "run"}"""
    given = dict(cwd=README.parent, env={**os.environ, "PYTHONPATH": str(README.parent)}, text=True)
    done = subprocess.run([sys.executable, file, *words.split()], capture_output=True, **given)
    assert done.returncode == 0, done.stderr
    assert "total removed: 48 of 65 tokens" in done.stdout
    wrong = [sys.executable, file, "--reduction", "quite", "--reduction-schedule", "r:1"]
    done = subprocess.run(wrong, capture_output=True, **given)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --reduction is 'quite', expected one of none, famba-v,")
    assert done.stderr.endswith("utrc, quiet; did you mean 'quiet'?\n")


def test_the_backbone_of_the_readme_returns_the_maps_that_it_says():
    shown = {}
    block = TEXT.split("### As a backbone\n")[1].split("```python\n")[1].split("```")[0]
    exec(compile(block, README.name, "exec"), shown)
    assert [found.shape for found in shown["maps"]] == [(1, 192, 6, 10)] * 3
    distinct = [len(found[0].flatten(1).T.unique(dim=0)) for found in shown["maps"]]
    assert distinct == [60, 42, 30]


@pytest.mark.filterwarnings("ignore")  # a new head, single modules, torch.ao's end
def test_the_adapters_and_the_int8_layers_of_the_readme(tmp_path, monkeypatch):
    (tmp_path / "output" / "run").mkdir(parents=True)
    run(tmp_path / "output" / "run" / "best_checkpoint.pth")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(100, (8,))
    lora, int8 = re.findall(r"```python\n(.*?)```", TEXT.split("## LoRA and int8\n")[1], re.DOTALL)[
        :2
    ]
    shown = {"loader": 6 * [(images, labels)]}
    exec(compile(lora, README.name, "exec"), shown)
    model, before = shown["model"], fambav.from_pretrained("output/run").state_dict()
    assert model.unfused == {}
    assert cross_entropy(model(images), labels) < 4, "it learns; chance is 4.6"
    changed = {name for name, v in model.state_dict().items() if not torch.equal(v, before[name])}
    parts = {name.split(".")[-2] for name in changed}
    assert parts == {"in_proj", "x_proj", "dt_proj", "out_proj", "head"}
    shown = {"images": images}
    exec(compile(int8, README.name, "exec"), shown)
    exact = shown["model"](images)
    assert 0 < (shown["logits"] - exact).norm() < 0.1 * exact.norm()
    assert (tmp_path / "int8.pt").stat().st_size < 0.5 * model_bytes(shown["model"])


def model_bytes(model):
    return sum(value.nbytes for value in model.state_dict().values())


def commands():
    """Every command line that gives flags to main.py, without its continuation lines' ends."""
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = re.sub(r"\s#.*", "", line).split()
            if "main.py" in words:
                yield words[words.index("main.py") + 1 :]


@pytest.mark.parametrize("flags", list(commands()), ids=" ".join)
def test_every_command_of_the_readme_is_understood(flags, tmp_path):
    made = tmp_path / "plan.yaml"  # by `fambav search-plan`
    made.write_text('model: vim_micro\nfusion_plan: "3:9"\n')
    parse([str(made) if word == made.name else word for word in flags])


def benchmarks():
    """Every `fambav bench` command line of the README."""
    for line in re.findall(r"^fambav bench (.*)$", TEXT, re.MULTILINE):
        yield re.sub(r"\s#.*", "", line).split()


@pytest.mark.parametrize("words", list(benchmarks()), ids=" ".join)
def test_every_benchmark_of_the_readme_is_understood(words):
    assert bench_parser().parse_args(words).what == words[0]


def rows():
    for row in re.findall(r"^\| `[st]-.*\| `(--fusion[^|]*)` ", TEXT, re.MULTILINE):
        yield row.split("`")[0].split()


@pytest.mark.parametrize("flags", list(rows()), ids=" ".join)
def test_every_row_of_the_table_of_scripts_fuses_what_the_original_meant_to(flags):
    fusion = parse(["--model", "vim_tiny", *flags]).fusion
    assert fusion.fusion_strategy in flags
    assert fusion.fusion_strategy == "none" or str(fusion.fusion_token) in flags


def test_the_table_of_scripts_names_all_thirty_six():
    named = set(re.findall(r"`([st]-(?:cifar|imagenet)-[a-z0-9-]+)`", TEXT))
    listed = named | {f"t-cifar-lower-merge-r{r}-l4" for r in range(1, 9)}
    assert len(listed) == 36
