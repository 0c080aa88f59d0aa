"""Names that are no UTF-8, and terminals that know no more than ASCII."""

import io
import os
import shutil

import pytest
import torch
from PIL import Image

from fambav import cli, config
from fambav.export.folder import FORMATS
from fambav.search.plan_file import write_plan
from tests.data.made import made_folder
from tests.trust.refusals import call
from tests.trust.test_reading import FOLDER

LATIN = os.fsdecode(b"caf\xe9")  # as an old disk has it
KANJI = "\u6f22\u5b57"
TERMINALS = [(LATIN, "utf-8"), (KANJI, "ascii")]


@pytest.mark.parametrize(("name", "encoding"), TERMINALS, ids=["no UTF-8", "ascii"])
def test_a_run_is_written_into_a_folder_of_any_name(recipe, tmp_path, name, encoding):
    folder = tmp_path / name
    words = [*recipe, "--epochs", "1", "--output_dir", folder]
    found = call(*words, encoding=encoding)
    assert found.status == 0, found.err
    assert (folder / "checkpoint.pth").is_file()
    assert found.out.isascii() or encoding == "utf-8"
    found = call(*words, "--resume", "auto", encoding=encoding)
    assert found.status == 0, found.err
    found = call("--eval", "--resume", folder / "checkpoint.pth", encoding=encoding)
    assert found.status == 0, found.err


COMMANDS = {
    "table": lambda folder, new: ["table", folder],
    "table as csv": lambda folder, new: ["table", folder, "--format", "csv"],
    "show": lambda folder, new: ["show", folder, "--what", "curves", "--output_dir", new],
    "predict": lambda folder, new: ["predict", folder, new / "a.png"],
    "evaluate": lambda folder, new: ["evaluate", folder, "--predictions", new / "a.csv"],
    "export": lambda folder, new: [
        *("export", folder, "--format", "hf", "--noise", "--images", "1"),
        *("--output_dir", new / "hf"),
    ],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_take_a_folder_of_any_name(whole, tmp_path, command):
    folder, new = shutil.copytree(whole, tmp_path / LATIN), tmp_path / f"{LATIN} new"
    new.mkdir()
    Image.new("RGB", (16, 16)).save(new / "a.png")
    found = call(*COMMANDS[command](folder, new), program=cli.console, encoding="ascii")
    assert found.status == 0, found.err
    assert found.out


def test_a_page_is_written_of_a_run_of_any_name(whole, tmp_path, monkeypatch):
    folder = shutil.copytree(whole, tmp_path / LATIN)
    monkeypatch.setattr("fambav.viz.report.render", lambda *given, **options: iter(()))
    words = ["report", folder, "--no-class-accuracy", "--title", LATIN]
    found = call(*words, program=cli.console, encoding="ascii")
    assert found.status == 0, found.err
    assert "caf" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "encoding"), TERMINALS, ids=["no UTF-8", "ascii"])
def test_a_mistake_in_a_name_is_a_line_on_any_terminal(tmp_path, name, encoding):
    for words in (["--model", name], ["--resume", tmp_path / name], [name]):
        found = call(*words, "--model", "vim_micro", encoding=encoding)
        assert found.status == 2
        assert found.err.startswith("error: ")
        assert found.err.count("\n") == 1
    found = call("predict", tmp_path / name, "a.png", program=cli.console, encoding=encoding)
    assert found.status == 2
    assert found.err.count("\n") == 1


def test_classes_and_images_of_any_name_are_trained_on_predicted_and_exported(tmp_path):
    made_folder(tmp_path / "images", classes=[LATIN, KANJI], train=8, val=4, size=(16, 16))
    run, images = tmp_path / "run", tmp_path / "images"
    words = [*FOLDER.split(), "--epochs", "1", "--data-path", images, "--output_dir", run]
    found = call(*words, encoding="ascii")
    assert found.status == 0, found.err
    image, exported = images / "val" / KANJI / "0.png", tmp_path / "exported"
    words = ["export", run, "--format", "hf", "--noise", "--output_dir", exported]
    found = call(*words, program=cli.console, encoding="ascii")
    assert found.status == 0, found.err
    for source in (run, exported):
        found = call("predict", source, image, program=cli.console, encoding="ascii")
        assert found.status == 0, found.err
        assert r"caf\udce9" in found.out
        assert r"\u6f22\u5b57" in found.out


def test_a_plan_of_weights_of_any_name_can_be_read_again(tmp_path):
    weights, settings = (
        tmp_path / f"a\n\x1b{LATIN}",
        config.Config.from_flat({"model": "vim_micro"}),
    )
    command = ("fambav", "tune", str(weights))
    write_plan(tmp_path / "plan.yaml", settings, "found by", command=command, weights=weights)
    assert config.load(tmp_path / "plan.yaml") == settings


def test_programs_are_read_from_a_folder_of_any_name(tmp_path):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    folder, images = tmp_path / LATIN, torch.ones(2, 3)
    folder.mkdir()
    program = io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.Identity(), (images,)), program)
    (folder / "model.pt2").write_bytes(program.getvalue())
    graph = "<ir_version: 8, opset_import: ['': 18]> g (float[2, 3] x) => (float[2, 3] y)"
    graph = onnx.parser.parse_model(f"{graph} {{ y = Identity (x) }}".replace("'", '"'))
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    for kind in ("torch", "onnx"):
        assert torch.equal(FORMATS[kind].load(folder)(images), images)


def test_tables_with_signs_are_printed_on_any_terminal():
    for words in (["flops", "--model", "vim_micro"], ["doctor"], ["--help"]):
        assert call(*words, program=cli.console, encoding="ascii").status == 0
    assert call("--help", encoding="ascii").status == 0
