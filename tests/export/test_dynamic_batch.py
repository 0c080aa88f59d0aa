"""Programs for a batch of any size, by torch's export and ours, also as a process's first call."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.export import Dim

import fambav
import fambav.models
from fambav import cli
from fambav.engine.checkpoint import CheckpointError
from fambav.models import vim
from fambav.registry import METHODS, family_of
from tests.export.made import weights
from tests.trust.refusals import call, refused

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("vim_micro", "plainmamba_micro", "vmamba_nano", "vssd_nano")
BATCH = ({0: Dim("batch", min=1)},)
OFTEN = [("vim_micro", "ordered"), *((name, "none") for name in MODELS[1:])]
SIZE = {name: dict(img_size=32) for name in MODELS[2:]}
SMALL = dict(img_size=16, depth=1)
REDUCED = [n for n in MODELS if family_of(n).reducible and not family_of(n).staged]
PAIRS = [(name, "none") for name in MODELS] + [(n, method) for n in REDUCED for method in METHODS]
TRACED = [pair for pair in PAIRS if pair[1] in ("none", "famba-v")]


def model(name, method="none"):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10, **SIZE.get(name, SMALL)).eval()
    if method != "none":
        schedule = f"r:{net.grid[0]}@1" if method == "storm" else "r:3@1"
        fambav.reduce(net, method, schedule, scan="compact")  # what all models can do
    return net


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(*pair, marks=() if pair in OFTEN else pytest.mark.slow, id="-".join(pair))
        for pair in PAIRS
    ],
)
def test_a_program_of_torch_takes_any_batch(name, method):
    net = model(name, method)
    with torch.no_grad():
        sides = net.img_size
        program = torch.export.export(net, (torch.randn(2, 3, *sides),), dynamic_shapes=BATCH)
        for size in (1, 3):
            images = torch.randn(size, 3, *sides)
            torch.testing.assert_close(program.module()(images), net(images), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of torch, of each check of a shape
@pytest.mark.parametrize(("name", "method"), TRACED)
def test_a_trace_is_the_same_when_torch_makes_it_again(name, method):
    net = model(name, method)
    images = torch.randn(2, 3, *net.img_size)
    with torch.no_grad():
        traced = torch.jit.trace(net, images, check_trace=True)
        torch.testing.assert_close(traced(images), net(images), rtol=1e-4, atol=1e-4)


FIRST = """
import sys
import fambav.models
import timm, torch
from torch.export import Dim
net = timm.create_model(sys.argv[1], num_classes=10, img_size=16, depth=1).eval()
images = torch.randn(2, 3, 16, 16)
with torch.no_grad():
    batch = ({0: Dim("batch", min=1)},)
    program = torch.export.export(net, (images,), dynamic_shapes=batch)
    torch.testing.assert_close(program.module()(images), net(images), rtol=1e-4, atol=1e-4)
print("the same")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS[:2])
def test_it_may_be_the_first_call_of_a_process(name):
    """What is compiled at the first call must not be traced with it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIRST, name],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout.strip() == "the same", done.stderr[-2000:]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a model of two layers, which both remove a token."""
    path = tmp_path_factory.mktemp("weights") / "checkpoint.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vim.VARIANTS["vim_micro"], "depth", 2)
        weights(path, input_size=16, patch_size=8, data_stats="own", fusion_plan="1:1,2:1")
        yield path


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_the_command_compares_on_other_batches_and_writes_a_card(
    checkpoint, tmp_path, monkeypatch, form
):
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    from fambav.export import folder

    sizes, kept = [], folder.FORMATS[form]

    def load(place):
        run = kept.load(place)
        return lambda images: (sizes.append(len(images)), run(images))[1]

    monkeypatch.setitem(folder.FORMATS, form, kept._replace(load=load))
    words = ["export", checkpoint, "--format", form, "--images", 7, "--dynamic-batch"]
    found = call(*words, "--output_dir", tmp_path / "new", program=cli.console)
    assert found.status == 0, found.err
    assert sizes == [1, 3, 3]
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"README.md", "config.json", "model.pt2" if form == "torch" else "model.onnx"}
    assert "| 2 | 1 |" in (tmp_path / "new" / "README.md").read_text()
    with pytest.raises(CheckpointError, match="expected a run folder or one exported as"):
        fambav.from_pretrained(tmp_path / "new")


def test_weights_alone_are_compared_on_no_other_batches(checkpoint, tmp_path):
    words = ["export", checkpoint, "--format", "hf", "--noise", "--dynamic-batch"]
    place = tmp_path / "new"
    names = ["dynamic_batch", "torch or onnx", "hf"]
    refused(*words, "--output_dir", place, names=names, program=cli.console)
    assert not place.exists()
