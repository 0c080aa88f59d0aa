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
from fambav.registry import METHODS
from tests.export.made import weights
from tests.trust.refusals import call

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("vim_micro", "plainmamba_micro")
OFTEN = [("vim_micro", "none"), ("vim_micro", "ordered"), ("plainmamba_micro", "none")]
PAIRS = [(name, method) for name in MODELS for method in ("none", *METHODS)]
SIZES = (1, 3, 7)


def model(name, method):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10, img_size=32, depth=4).eval()
    if method != "none":
        schedule = f"r:{net.grid[0]}@3" if method == "storm" else "r:3@3"
        scan = {"scan": "compact"} if name.startswith("plain") else {}
        fambav.reduce(net, method, schedule, **scan)
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
    batch = {0: Dim("batch", min=1)}
    with torch.no_grad():
        program = torch.export.export(net, (torch.randn(2, 3, 32, 32),), dynamic_shapes=(batch,))
        for size in SIZES:
            images = torch.randn(size, 3, 32, 32)
            torch.testing.assert_close(program.module()(images), net(images), rtol=1e-4, atol=1e-4)


FIRST = """
import sys
import fambav.models
import timm, torch
from torch.export import Dim
net = timm.create_model(sys.argv[1], num_classes=10, img_size=32, depth=2).eval()
images = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    if sys.argv[2] == "export":
        program = torch.export.export(net, (images,), dynamic_shapes=({0: Dim("batch", min=1)},))
        got = program.module()(images)
    else:
        got = torch.jit.trace(net, images, check_trace=False)(images)
    torch.testing.assert_close(got, net(images), rtol=1e-4, atol=1e-4)
print("the same")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["export", "trace"])
@pytest.mark.parametrize("name", MODELS)
def test_it_may_be_the_first_call_of_a_process(name, how):
    """What is compiled at the first call must not be traced with it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIRST, name, how],
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
    path = tmp_path_factory.mktemp("weights") / "checkpoint.pth"
    weights(path, input_size=32, patch_size=8, data_stats="own")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_the_command_writes_what_takes_any_batch(checkpoint, tmp_path, form):
    words = ["export", checkpoint, "--format", form, "--noise", "--images", 3, "--dynamic-batch"]
    found = call(*words, "--output_dir", tmp_path / "new", program=cli.console)
    assert found.status == 0, found.err
    if form == "torch":
        run = torch.export.load(tmp_path / "new/model.pt2").module()
    else:
        session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "new/model.onnx")
        name = session.get_inputs()[0].name

        def run(images):
            return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    net = fambav.from_pretrained(checkpoint)
    with torch.no_grad():
        for size in SIZES:
            images = torch.randn(size, 3, 32, 32)
            torch.testing.assert_close(run(images), net(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["safetensors", "hf"])
def test_a_batch_means_nothing_to_weights_alone(checkpoint, tmp_path, form):
    words = ["export", checkpoint, "--format", form, "--noise", "--dynamic-batch"]
    found = call(*words, "--output_dir", tmp_path / "new", program=cli.console)
    assert found.status == 2
    assert found.err.startswith("error: --dynamic-batch")
    assert not (tmp_path / "new").exists()
