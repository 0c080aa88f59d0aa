"""What single pages of docs/ promise of the code they show; that it runs is in test_pages.py."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import fambav
from fambav.config import parse
from fambav.reduction import parse_schedule
from fambav.timm_compat import timm
from tests.data.made import made_cifar
from tests.made import run
from tests.trust import forked
from tests.trust.forked import run_alone

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def python(name):
    """The blocks of Python of a page."""
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)


def test_the_reducer_of_the_manual_removes_what_the_plan_says(registry):
    shown = {}
    exec(compile(python("reducer.md")[0], "reducer.md", "exec"), shown)
    model = shown["model"]
    seen = []
    for block in model.layers:
        block.mixer.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert tuple(seen) == model.schedule.lengths == (65, 65, 53, 41, 29, 17)


def test_the_reducer_of_the_manual_trains_from_a_file_of_its_own(tmp_path):
    script, end = python("reducer.md")
    assert script.count("\n") < 40
    file, data = tmp_path / "quiet.py", tmp_path / "data"
    file.write_text(script + end)
    made_cifar(data, train=16, test=8)
    words = f"""--reduction quiet --reduction-schedule r:12@3-6 --reduction-options power=1
        --model vim_micro --data-set CIFAR --data-path {data} --epochs 1 --batch-size 8
        --num_workers 1 --output_dir {tmp_path / "run"}"""
    done = run_alone([file, *words.split()], tmp_path / "out", program=forked.python)
    assert done.status == 0, done.out
    assert "total removed: 48 of 65 tokens" in done.out
    wrong = [file, "--reduction", "quite", "--reduction-schedule", "r:1"]
    done = run_alone(wrong, tmp_path / "refused", program=forked.python)
    assert done.status == 2
    assert done.out.startswith("error: --reduction is 'quite', expected one of none, famba-v,")
    assert done.out.endswith("utrc, quiet; did you mean 'quiet'?\n")


def test_the_backbone_of_the_manual_returns_the_maps_that_it_says():
    shown = {}
    exec(compile(python("python.md")[1], "python.md", "exec"), shown)
    assert [found.shape for found in shown["maps"]] == [(1, 192, 6, 10)] * 3
    distinct = [len(found[0].flatten(1).T.unique(dim=0)) for found in shown["maps"]]
    assert distinct == [60, 42, 30]


@pytest.mark.filterwarnings("ignore")  # a new head, single modules, torch.ao's end
def test_the_adapters_and_the_int8_layers_of_the_manual(tmp_path, monkeypatch):
    (tmp_path / "output" / "run").mkdir(parents=True)
    run(tmp_path / "output" / "run" / "best_checkpoint.pth")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    lora, int8 = python("adapters.md")
    shown = {}
    exec(compile(lora, "adapters.md", "exec"), shown)
    images, labels = shown["images"], shown["labels"]
    model, before = shown["model"], fambav.from_pretrained("output/run").state_dict()
    assert model.unfused == {}
    assert cross_entropy(model(images), labels) < 4, "it learns; chance is 4.6"
    changed = {name for name, v in model.state_dict().items() if not torch.equal(v, before[name])}
    parts = {name.split(".")[-2] for name in changed}
    assert parts == {"in_proj", "x_proj", "dt_proj", "out_proj", "head"}
    shown = {}
    exec(compile(int8, "adapters.md", "exec"), shown)
    exact = shown["model"](shown["images"])
    assert 0 < (shown["logits"] - exact).norm() < 0.1 * exact.norm()
    assert (tmp_path / "int8.pt").stat().st_size < 0.5 * model_bytes(shown["model"])


def model_bytes(model):
    return sum(value.nbytes for value in model.state_dict().values())


SCRIPTS = (DOCS / "migrating.md").read_text()


def rows():
    for row in re.findall(r"^\| `[st]-.*\| `(--fusion[^|]*)` ", SCRIPTS, re.MULTILINE):
        yield row.split("`")[0].split()


@pytest.mark.parametrize("flags", list(rows()), ids=" ".join)
def test_every_row_of_the_table_of_scripts_fuses_what_the_original_meant_to(flags):
    fusion = parse(["--model", "vim_tiny", *flags]).fusion
    assert fusion.fusion_strategy in flags
    assert fusion.fusion_strategy == "none" or str(fusion.fusion_token) in flags


def test_the_table_of_scripts_names_all_thirty_six():
    named = set(re.findall(r"`([st]-(?:cifar|imagenet)-[a-z0-9-]+)`", SCRIPTS))
    listed = named | {f"t-cifar-lower-merge-r{r}-l4" for r in range(1, 9)}
    assert len(listed) == 36


def test_schedules_of_the_manual_are_read():
    text = (DOCS / "reduction.md").read_text().split("| schedule | removes |")[1].split("\n\n")[0]
    forms = set(re.findall(r"`([a-z0-9:,.@/-]+)`", "".join(re.findall(r"^\|[^|]*\|", text, re.M))))
    whole, staged = timm.create_model("vim_tiny"), timm.create_model("vssd_nano")
    assert len(forms) == 14
    for form in forms - {"published"}:
        info = (staged if "1.1" in form else whole).info
        assert sum(parse_schedule(form, info)) > 0


def test_the_shares_of_token_layers_in_the_manual():
    text = (DOCS / "reduction.md").read_text()
    model = timm.create_model("vim_micro", class_token="none")
    for hook, share in (("before", "79.2%"), ("after", "87.5%")):
        fambav.reduce(model, "ordered", "r:8@3-6", hook=hook)
        assert f"{100 * model.schedule.share:.1f}%" == share
        assert share in text
