"""Graphs of plain operations give what models give, wherever they run."""

import subprocess
import sys

import pytest
import torch

import fambav
from fambav.export.graph import onnx_model
from fambav.export.recurrence import in_blocks
from fambav.export.tracing import bare, traced
from fambav.timm_compat import timm

LOWERING = {torch.ops.fambav.recurrence.default: in_blocks}
# Where the tokens of a layer are told to the next there are two layers, which both remove tokens.
KINDS = {
    "fambav": ("vim_micro", "famba-v", {"class_token": "middle", "depth": 1}),
    "ordered": ("vim_micro", "ordered", {"class_token": "middle", "depth": 2}),
    "aligned": ("vim_micro", "prune-aligned", {"class_token": "none", "depth": 2}),
    "plain": ("plainmamba_micro", "evit", {"depth": 1}),
}
# A fresh process in which our package cannot be imported.
LOADING = """
import sys
sys.modules["fambav"] = None
import torch
for name in sys.argv[1:]:
    images, want = torch.load(name + "/images.pt")
    model = torch.export.load(name + "/model.pt2").module()
    print(float((torch.cat([model(images[:1]), model(images[1:])]) - want).abs().max()))
"""


def small(kind):
    model, method, options = KINDS[kind]
    torch.manual_seed(0)
    net = timm.create_model(model, num_classes=10, img_size=16, **options).eval()
    fambav.reduce(net, method, "r:3")
    return net


def images(number=3):
    torch.manual_seed(1)
    return torch.randn(number, 3, 16, 16)


def answers(net, x):
    with torch.no_grad():
        return net(x)


def runtime(model):
    """A function from images to logits."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString())
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_saved_programs_answer_as_the_models_without_our_package(tmp_path):
    for kind in KINDS:
        net, x = small(kind), images()
        want = answers(net, x)
        program = bare(traced(net, (3, 16, 16), LOWERING))
        called = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert len(called) > 100
        assert not [target for target in called if "fambav" in str(target)]
        assert not torch.equal(want[0], want[1])
        (tmp_path / kind).mkdir()
        torch.export.save(program, tmp_path / kind / "model.pt2")
        torch.save((x, want), tmp_path / kind / "images.pt")
    command = [sys.executable, "-W", "ignore", "-c", LOADING, *KINDS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    errors = dict(zip(KINDS, map(float, done.stdout.split()), strict=True))
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_runtime_answers_as_the_model_for_any_batch(kind):
    net = small(kind)
    model = onnx_model(net, (3, 16, 16))
    run = runtime(model)
    for number in (1, 3):
        near(run(images(number)), answers(net, images(number)))
    assert {opset.domain for opset in model.opset_import} == {""}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    scans = sum(node.op_type == "Scan" for node in model.graph.node)
    each = 1 if kind == "plain" else 2
    assert scans == each * len(net.layers), "one loop for each scan, however many tokens"


@pytest.mark.slow
def test_equal_tokens_are_chosen_alike_by_onnx_runtime():
    net, grey = small("fambav"), torch.ones(2, 3, 16, 16)
    with torch.no_grad():
        net.pos_embed.zero_()  # all patches of a grey image are one now
    near(runtime(onnx_model(net, (3, 16, 16)))(grey), answers(net, grey))
