"""Where commands write: looked at before the work, named where it is full, and names stay names."""

import json
import os
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from fambav import cli
from tests.trust.refusals import call, content, refused, the_line


@pytest.fixture
def no_work(monkeypatch):
    """What takes time must not have begun."""

    def begun(*given, **options):
        raise AssertionError("the work began before the place for it was looked at")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", begun)
    monkeypatch.setattr("torch.nn.Module.__call__", begun)


FILES = {
    "report": ["report", "{run}", "--output", "{place}/x.html"],
    "flops": ["flops", "--model", "vim_micro", "--json", "{place}/x.json"],
    "bench": ["bench", "scan", "--length", "4", "--json", "{place}/x.json"],
    "evaluate": ["evaluate", "{run}", "--predictions", "{place}/x.csv"],
    "confusion": ["evaluate", "{run}", "--confusion", "{place}/x.png"],
    "search-plan": ["search-plan", "{run}", "--budget", "flops:0.9", "--output", "{place}/x.yaml"],
    "tune": ["tune", "{run}", "--margin", "1", "--json", "{place}/x.json"],
}
FOLDERS = {
    "show": ["show", "{run}", "--output_dir", "{place}"],
    "pareto": ["pareto", "{run}", "--output_dir", "{place}"],
    "table": ["table", "digits-table1", "--output_dir", "{place}"],
    "export": ["export", "{run}", "--format", "torch", "--noise", "--output_dir", "{place}/new"],
}


def filled(words, run, place):
    return [word.format(run=run, place=place) for word in words]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command", FILES)
def test_a_folder_that_there_is_not_is_refused_at_once(whole, tmp_path, command):
    place = tmp_path / "nowhere"
    refused(*filled(FILES[command], whole, place), names=[place], program=cli.console)
    assert not place.exists()


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command", FOLDERS)
def test_a_file_in_the_place_of_a_folder_is_refused_at_once(whole, tmp_path, command):
    place = tmp_path / "file"
    place.write_text("mine")
    refused(*filled(FOLDERS[command], whole, place), names=[place], program=cli.console)
    assert place.read_text() == "mine"


@pytest.mark.usefixtures("no_work")
def test_a_folder_in_the_place_of_a_file_is_refused_at_once(whole, tmp_path):
    words = filled(FILES["report"], whole, tmp_path)
    (tmp_path / "x.html").mkdir()
    refused(*words, names=[tmp_path / "x.html"], program=cli.console)


def test_figures_go_into_a_pipe_and_through_a_link(tmp_path):
    pipe, link, file = (tmp_path / name for name in ("pipe", "link", "file"))
    os.mkfifo(pipe)
    file.write_text("old")
    link.symlink_to(file)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for place in (pipe, link):
        words = ("flops", "--model", "vim_micro", "--json", place)
        assert call(*words, program=cli.console).status == 0
    piped = os.read(reader, 1 << 16)
    os.close(reader)
    assert link.is_symlink()
    assert json.loads(piped) == json.loads(file.read_text())


STRANGE = "a\nb\x1b[31m\a\r\tc|$%_\\d"


@pytest.mark.parametrize("form", ["text", "markdown", "latex"])
def test_a_name_of_a_run_breaks_no_table(whole, tmp_path, form):
    folder = shutil.copytree(whole, tmp_path / STRANGE)
    found = call("table", folder, "--format", form, program=cli.console)
    plain = call("table", whole, "--format", form, program=cli.console)
    assert found.status == 0, found.err
    assert found.out.count("\n") == plain.out.count("\n")
    assert not set(found.out) & set("\x1b\a\r\t")


def test_a_name_of_a_run_breaks_no_line(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / STRANGE)
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    for words in (["predict", folder, folder / "a.png"], ["predict", folder, folder / "b.png"]):
        found = call(*words, program=cli.console)
        assert not set(found.out + found.err) & set("\x1b\a\r")
        assert len((found.out + found.err).splitlines()) == (6 if found.status == 0 else 1)


def test_a_name_of_a_run_is_drawn_as_it_is(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "a\n$\\frac$")  # no formula
    words = ["show", folder, "--what", "curves", "--svg", "--output_dir", tmp_path / "new"]
    found = call(*words, program=cli.console)
    assert found.status == 0, found.err
    assert r"a\n$\frac$" in (tmp_path / "new/curves.svg").read_text()


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


def export(kind):
    return ["export", "{run}", "--format", kind, "--noise", "--output_dir", "{new}/x"]


WRITERS = {
    "report": (["report", "{run}", "--no-class-accuracy"], "report.html"),
    "show": (["show", "{run}", "--what", "curves", "--output_dir", "{new}"], "curves.png"),
    "flops": (["flops", "--model", "vim_micro", "--json", "{new}/x.json"], "x.json"),
    "evaluate": (["evaluate", "{run}", "--predictions", "{new}/x.csv"], "x.csv"),
    "export hf": (export("hf"), "x/model.safetensors"),
    "export torch": (export("torch"), "x/model.pt2"),
    "export onnx": (export("onnx"), "x/model.onnx"),
}


@pytest.mark.parametrize("command", WRITERS)
def test_a_full_disk_is_a_line_with_the_path(whole, tmp_path, command, monkeypatch):
    if command == "export onnx":
        pytest.importorskip("onnx")
    monkeypatch.setattr("fambav.viz.report.render", lambda *given, **options: iter(()))
    monkeypatch.setattr("fambav.export.tracing.traced", made_program)
    monkeypatch.setattr("fambav.export.graph.onnx_model", made_graph)
    words, name = WRITERS[command]
    run, new = shutil.copytree(whole, tmp_path / "run"), tmp_path / "new"
    new.mkdir()
    before = content(run)
    with full(500):
        found = call(*(word.format(run=run, new=new) for word in words), program=cli.console)
    the_line(found, name, status=4)
    assert content(run) == before
    assert content(new) == {}, "half a file is worse than none"


def made_program(*given):
    return torch.export.export(torch.nn.Linear(20, 20), (torch.ones(1, 20),))


def made_graph(*given):
    import onnx

    return onnx.ModelProto(doc_string=1000 * "a")
