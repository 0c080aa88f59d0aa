"""What README and the pages of docs/ show is what the software does."""

import json
import os
import re
import shlex
import shutil
import textwrap
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from fambav.cli import console
from fambav.commands import COMMANDS
from fambav.commands.bench import parser as bench_parser
from fambav.config import parse
from fambav.config.parsing import SPELLINGS
from fambav.config.schema import OPTIONS
from fambav.registry import MADE
from scripts import mkdocs_hooks
from tests.made import go, run

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
CLIENTS = "docs/other-tools.md"  # of packages that no development installation has: tests/outside
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
RUN = {"plan", "flops", "list"}  # commands that print something and train nothing
# Flags of other programs: launchers, mkdocs, our scripts.
OTHERS = {
    "--nproc-per-node",
    "--signals-to-handle",
    "--max-restarts",
    "--strict",
    "--help",
    "--more",
    "--no",
}


def blocks(path, *languages):
    """The blocks of a page in these languages, without their indentation."""
    found = FENCE.findall(path.read_text())
    return [textwrap.dedent(text) for _, name, text in found if name in languages]


def commands():
    """Every command, and whether it needs what is not here: below a comment `# needs ...`."""
    for path, name in zip(PAGES, NAMES, strict=True):
        for text in blocks(path, "bash", "console"):
            shell = any(line.startswith("$ ") for line in text.splitlines())
            needs = False
            for line in text.replace("\\\n", " ").splitlines():
                needs = needs or line.startswith("# needs ")
                if shell and not line.startswith("$ "):
                    continue
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words:
                    yield pytest.param(words, needs, id=f"{name}: {' '.join(words)}")


COMMAND_LINES = list(commands())


def having(test):
    """Parametrize with the command lines whose words fulfil a condition."""
    chosen = [param for param in COMMAND_LINES if test(param.values[0])]
    return pytest.mark.parametrize(("words", "needs"), chosen)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a checkpoint and an exported model, under the names that pages use."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("run", "upper"):
        (folder / "output" / name).mkdir(parents=True)
        made = run(folder / "output" / name / "best_checkpoint.pth")
    words = ["export", made, "--format", "hf", "--output_dir", folder / "exported"]
    done = go(*words, "--noise", "--images", "2", program=console)
    assert done.status == 0, done.err
    shutil.copytree(ROOT / "benchmarks" / "weights", folder / "benchmarks" / "weights")
    return folder


@pytest.mark.filterwarnings("ignore")  # of adapters and quantized layers
@pytest.mark.parametrize(
    "name",
    [n for n, p in zip(NAMES, PAGES, strict=True) if blocks(p, "python") and n != CLIENTS],
)
def test_the_python_of_a_page_runs(name, trained, registry, tmp_path, monkeypatch):
    for part in trained.iterdir():
        shutil.copytree(part, tmp_path / part.name)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    shown = {"__name__": name}
    for text in blocks(ROOT / name, "python"):
        exec(compile(text, name, "exec"), shown)


def test_fambav_is_imported_before_what_imports_torchvision():
    texts = [text for path in PAGES for text in blocks(path, "python")]
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        texts += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for text in texts:
        for name in ("timm", "peft", "lightning", "accelerate"):
            before, found, _ = text.partition(f"import {name}\n")
            assert not found or "import fambav.models" in before, text


@having(lambda words: "main.py" in words)
def test_a_training_command_is_understood(words, needs, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    made = tmp_path / "plan.yaml"  # by `fambav search-plan`
    made.write_text('model: vim_micro\nfusion_plan: "3:9"\n')
    flags = words[words.index("main.py") + 1 :]
    config = parse([str(made) if word == made.name else word for word in flags])
    assert needs or config.data.data_set in MADE, "it stands below a comment `# needs ...`"


@having(lambda words: words[0] == "fambav")
def test_a_command_is_understood(words, needs, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *rest = words[1:]
    assert name in COMMANDS
    if name == "bench":
        assert bench_parser().parse_args(rest).what == rest[0]
    elif name in RUN:
        done = go(name, *rest, program=console)
        assert done.status == 0, done.err
    else:
        known = {flag(word) for word in helped(name)} | set(SPELLINGS)
        assert {flag(word) for word in rest if word.startswith("--")} <= known


@having(lambda words: words[0] in ("bash", "python", "pytest") and "main.py" not in words)
def test_a_script_is_there(words, needs):
    del needs
    place = next((word for word in words[1:] if "/" in word), None)
    assert place is None or (ROOT / place).exists()


def test_the_weights_that_come_with_the_code_answer_what_their_page_shows(tmp_path, monkeypatch):
    folder = ROOT / "benchmarks" / "weights" / "vim_micro_cifar100"
    assert (folder / "model.pth").stat().st_size < 500_000
    shown = "".join(blocks(ROOT / "docs" / "cifar100.md", "console")).splitlines(keepends=True)
    monkeypatch.chdir(tmp_path)
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        Image.fromarray(photo).save(f"{name}.jpg")
    done = go("predict", folder, "flower.jpg", "china.jpg", program=console)
    assert done.out == "".join(shown[1:])


def flag(word):
    return word.removeprefix("--").split("=")[0].replace("-", "_")


@cache
def helped(name):
    """The flags that the help of a command names."""
    return frozenset(re.findall(r"--[a-z][\w-]*", go(name, "--help", program=console).out))


@pytest.mark.parametrize("name", NAMES)
def test_flags_in_the_text_of_a_page_are_known(name):
    text = FENCE.sub("", (ROOT / name).read_text())
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*\b(?!-?\*)", text)) - OTHERS
    known = {flag(word) for command in COMMANDS for word in helped(command)} | set(SPELLINGS)
    kinds = {flag(word) for kind in bench_flags() for word in kind}
    assert {word for word in named if flag(word) not in known | kinds} == set()


def bench_flags():
    kinds = next(action for action in bench_parser()._actions if action.dest == "what")
    return [parser._option_string_actions for parser in kinds.choices.values()]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    path = ROOT / name
    text = re.sub(r"^    .*$", "", FENCE.sub("", path.read_text()), flags=re.MULTILINE)  # no code
    for link in mkdocs_hooks.LINK.findall(text):
        assert (path.parent / link).exists(), link


def test_the_page_of_flags_has_every_flag():
    page = ROOT / "docs" / "flags.md"
    assert mkdocs_hooks.FLAGS.search(page.read_text())
    table = mkdocs_hooks.flags()
    assert all(f"`--{option.flag}`" in table for option in OPTIONS.values())
    rows = [line for line in table.splitlines() if line.startswith("| `--")]
    assert len(rows) == len(OPTIONS)
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in rows)


def test_readme_is_one_screen_and_then_links():
    text = README.read_text()
    assert len(README.read_bytes()) <= 9 * 1024
    assert "bash scripts/quickstart.sh" in text and "bash scripts/test.sh" in text
    assert "bash scripts/test.sh" in (ROOT / ".ci" / "run").read_text(), "CI runs that too"
    assert max(map(len, re.findall(r"[\w.-]+", text))) < 60, "no long names of models"
    picture = text.index('<img src="benchmarks/pictures/strategies.png"')
    assert picture < text.index("```"), "the picture comes first"
    assert (ROOT / "benchmarks" / "pictures" / "strategies.png").is_file()


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    for path in PAGES[1:]:
        assert f": {path.relative_to(ROOT / 'docs').as_posix()}\n" in text


@pytest.mark.slow
@pytest.mark.timeout(900)  # a kernel of its own on shared cores
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_pictures(path, tmp_path, monkeypatch):
    import nbclient
    import nbformat

    packages = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(packages))  # of the kernel's process
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells), "outputs are stripped"
    metadata = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=metadata).execute()
    drawn = [cell for cell in cells if "viz." in cell.source]
    assert drawn
    for cell in drawn:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source
