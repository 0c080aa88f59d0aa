"""Where commands write: looked at before the work, named where it is full, and names stay names."""

import resource
import shutil
from contextlib import contextmanager

import pytest
from PIL import Image

from fambav import cli
from tests.trust.forked import run_alone
from tests.trust.refusals import call, content, refused, the_line, the_line_of
from tests.trust.test_disk import limited


@pytest.fixture
def no_work(monkeypatch):
    """What takes time must not have begun."""

    def begun(*given, **options):
        raise AssertionError("the work began before the place for it was looked at")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", begun)
    monkeypatch.setattr("torch.nn.Module.__call__", begun)


PLACES = {
    "report": ["report", "{run}", "--output", "{place}/x.html"],
    "flops": ["flops", "--model", "vim_micro", "--json", "{place}/x.json"],
    "bench": ["bench", "scan", "--length", "4", "--json", "{place}/x.json"],
    "search-plan": [
        "search-plan",
        "{run}",
        "--budget",
        "token-layers:0.9",
        "--output",
        "{place}/x",
    ],
    "search-plan --json": [
        *("search-plan", "{run}", "--budget", "token-layers:0.9", "--json", "{place}/x")
    ],
    "tune": ["tune", "{run}", "--margin", "1", "--output", "{place}/x.yaml"],
}
FOLDERS = {
    "show": ["show", "{run}", "--output_dir", "{place}"],
    "pareto": ["pareto", "{run}", "--output_dir", "{place}"],
    "table": ["table", "digits-table1", "--output_dir", "{place}"],
    "export": ["export", "{run}", "--format", "torch", "--noise", "--output_dir", "{place}"],
}


def filled(words, run, place):
    return [word.format(run=run, place=place) for word in words]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command", PLACES)
def test_a_folder_that_there_is_not_is_refused_at_once(whole, tmp_path, command):
    before = content(whole)
    place = tmp_path / "nowhere"
    refused(*filled(PLACES[command], whole, place), names=[place], program=cli.console)
    assert not place.exists()
    assert content(whole) == before


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command", [*PLACES, *FOLDERS])
def test_a_file_in_the_place_of_a_folder_is_refused_at_once(whole, tmp_path, command):
    place = tmp_path / "file"
    place.write_text("mine")
    words = {**PLACES, **FOLDERS}[command]
    refused(*filled(words, whole, place), names=[place], program=cli.console)
    assert place.read_text() == "mine"


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command", PLACES)
def test_a_folder_in_the_place_of_a_file_is_refused_at_once(whole, tmp_path, command):
    words = filled(PLACES[command], whole, tmp_path)
    place = words[-1]
    (tmp_path / place.rpartition("/")[2]).mkdir()
    refused(*words, names=[place], program=cli.console)


STRANGE = {
    "a line": "a\nb",
    "an escape": "a\x1b[31mb",
    "a bell": "a\ab",
    "a return": "a\rb",
    "a column": "a|b",
    "a tab": "a\tb",
    "markup": "<b>ab",
    "latex": "a_b$%&#{}~^\\b",
}


@pytest.mark.parametrize("form", ["text", "markdown", "latex", "json"])
@pytest.mark.parametrize("name", STRANGE)
def test_a_name_of_a_run_breaks_no_table(whole, tmp_path, name, form):
    folder = shutil.copytree(whole, tmp_path / STRANGE[name])
    found = call("table", folder, "--format", form, program=cli.console)
    plain = call("table", whole, "--format", form, program=cli.console)
    assert found.status == 0, found.err
    assert found.out.count("\n") == plain.out.count("\n")
    assert not set(found.out) & set("\x1b\a\r")


@pytest.mark.parametrize("name", ["a line", "an escape", "a bell", "a return"])
def test_a_name_of_a_run_breaks_no_line(whole, tmp_path, name):
    folder = shutil.copytree(whole, tmp_path / STRANGE[name])
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    for words in (["predict", folder, folder / "a.png"], ["predict", folder, folder / "b.png"]):
        found = call(*words, program=cli.console)
        assert not set(found.out + found.err) & set("\x1b\a\r")
        assert len((found.out + found.err).splitlines()) == (6 if found.status == 0 else 1)


def test_a_name_of_a_run_is_no_markup_of_a_page(whole, tmp_path, monkeypatch):
    folder = shutil.copytree(whole, tmp_path / "<script>a")
    monkeypatch.setattr("fambav.viz.report.render", lambda *given, **options: iter(()))
    found = call("report", folder, "--no-class-accuracy", program=cli.console)
    assert found.status == 0, found.err
    assert "<script>a" not in (folder / "report.html").read_text()


@contextmanager
def full(size):
    """Let no file grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS = {
    "report": (["report", "{run}", "--no-class-accuracy"], "report.html"),
    "show": (["show", "{run}", "--what", "curves", "--output_dir", "{new}"], "curves.png"),
    "show --svg": (
        ["show", "{run}", "--what", "curves", "--svg", "--output_dir", "{new}"],
        "curves",
    ),
    "show a GIF": (["show", "{run}", "--what", "animation", "--output_dir", "{new}"], "animation"),
    "flops": (["flops", "--model", "vim_micro", "--json", "{new}/x.json"], "x.json"),
    "bench": (
        ["bench", "scan", "--length", "4", "--rounds", "1", "--json", "{new}/x.json"],
        "x.json",
    ),
    "export hf": (
        ["export", "{run}", "--format", "hf", "--noise", "--output_dir", "{new}/hf"],
        "model.safetensors",
    ),
    "export torch": (
        ["export", "{run}", "--format", "torch", "--noise", "--output_dir", "{new}/torch"],
        "model.pt2",
    ),
    "export onnx": (
        ["export", "{run}", "--format", "onnx", "--noise", "--output_dir", "{new}/onnx"],
        "model.onnx",
    ),
}


@pytest.mark.parametrize("command", WRITERS)
def test_a_full_disk_is_a_line_with_the_path(whole, tmp_path, command, monkeypatch):
    words, name = WRITERS[command]
    run, new = shutil.copytree(whole, tmp_path / "run"), tmp_path / "new"
    new.mkdir()
    if command == "report":
        monkeypatch.setattr("fambav.viz.report.render", lambda *given, **options: iter(()))
    words = [word.format(run=run, new=new) for word in words]
    before = content(run)
    if command in ("export torch", "export onnx"):  # what writes these may abort the process
        found = run_alone(words, tmp_path / "out", limited(20_000), 120, cli.console)
        the_line_of(found, name, status=4)
    else:
        with full(500):
            found = call(*words, program=cli.console)
        the_line(found, name, status=4)
    assert content(run) == before
    assert content(new) == {}, "half a file is worse than none"
