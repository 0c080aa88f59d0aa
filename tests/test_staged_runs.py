"""Models of stages through the command line: they train, resume, evaluate, predict and export."""

import pytest
import torch
from PIL import Image

import fambav
from fambav.cli import console
from fambav.engine import checkpoint
from fambav.export.graph import onnx_model
from fambav.export.recurrence import in_blocks
from fambav.export.tracing import bare, traced
from fambav.registry import family_of
from fambav.timm_compat import timm
from tests.data.made import made_cifar
from tests.export.made import weights
from tests.identical import lasting, log, same
from tests.made import crashing, go, refused
from tests.test_reduced_runs import RUN

NAMES = ("vmamba_nano", "vssd_nano", "groupmamba_nano", "vim2_nano")
LOWERING = {torch.ops.fambav.recurrence.default: in_blocks}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_to_the_last_bit_and_its_file_classifies(name, tmp_path):
    made_cifar(tmp_path, train=16, test=5)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = [*RUN, "--model", name, "--data-set", "CIFAR", "--data-path", str(tmp_path)]
    flags += ["--grad-checkpointing", "--log-activations", "--drop", "0.1"]
    found = go(*flags, "--output_dir", whole)
    assert found.status == 0, found.err
    with crashing():  # in the second update of the second epoch
        go(*flags, "--output_dir", broken)
    again = go(*flags, "--output_dir", broken, "--resume", "auto")
    assert again.status == 0, again.err
    assert lasting(log(broken)) == lasting(log(whole))
    states = [checkpoint.load(folder / "checkpoint.pth")["model"] for folder in (whole, broken)]
    assert same(*states)
    told = go(*flags, "--eval", "--resume", whole / "checkpoint.pth").out
    assert f"* Acc@1 {log(whole)[-1]['test_acc1']:.3f}" in told

    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    assert console(["predict", str(whole), str(tmp_path / "red.png")]) == 0
    net = fambav.from_pretrained(whole)
    assert net.pretrained_cfg["architecture"] == name
    assert net(torch.zeros(1, 3, 32, 64)).shape == (1, 100)


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_folder_gives_back_the_model(name, tmp_path, capsys):
    net = weights(tmp_path / "weights.pth", name)
    words = ["export", str(tmp_path / "weights.pth"), "--format", "hf", "--noise"]
    assert console([*words, "--output_dir", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(fambav.from_pretrained(tmp_path / "out")(images), net(images))
    plan = (
        "No token is removed." if family_of(name).reducible else "The model has no plan of tokens."
    )
    assert plan in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_program_of_plain_operations_answers_as_the_model(name):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10, depths=(1, 1, 1, 1)).eval()
    program = bare(traced(net, (3, 32, 32), LOWERING))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert not [target for target in called if "fambav" in str(target)]
    for number in (1, 3):
        x = torch.randn(number, 3, 32, 32)
        torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_onnx_runtime_answers_as_the_model_for_any_batch(name):
    import onnxruntime

    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10, depths=(1, 1, 1, 1)).eval()
    model = onnx_model(net, (3, 32, 32))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for number in (1, 3):
        x = torch.randn(number, 3, 32, 32)
        (found,) = session.run(["logits"], {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_settings_of_other_models_are_refused_in_one_line(name, tmp_path):
    for words, message in (
        ("--class-token head", f"expected 'middle' with --model {name}, which has none to place"),
        ("--patch-size 8", "--patch-size is 8, expected none with --model"),
        ("--fusion-strategy all", f"none with --model {name}, whose "),
        ("--fusion-plan 2:3", f"none with --model {name}, whose "),
        ("--reduction evit --reduction-schedule r:1@1.2", "reduction is 'evit', "),
        ("--input-size 16", "img_size is 16 x 16, expected sides of at least 32 pixels"),
    ):
        folder = tmp_path / "run"
        told = refused(
            "--model", name, "--data-set", "DIGITS", *words.split(), "--output_dir", folder
        )
        assert message in told
        assert not folder.exists()


@pytest.mark.parametrize("name", NAMES)
def test_its_operations_are_counted_and_a_plan_is_refused(name, capsys):
    assert console(["flops", "--model", name, "--num-classes", "10"]) == 0
    told = capsys.readouterr().out
    assert sum(line.startswith("downsample ") for line in told.splitlines()) == 3
    able = name in ("vmamba_nano", "vssd_nano")
    assert console(["plan", "--model", name]) == (0 if able else 2)
    told = capsys.readouterr()
    assert ("4.1" in told.out) if able else ("expected one whose tokens can be" in told.err)
    words = ["--batch", "1", "--rounds", "1", "--warmup", "0", "--method", "tome"]
    assert console(["bench", "reduction", "--model", name, *words]) == (0 if able else 2)
    told = capsys.readouterr()
    assert ("tome" in told.out) if able else ("expected one whose tokens can be" in told.err)
    assert console(["bench", "infer", "--model", name, "--plan", "upper:1:3"]) == 2
    why = "counts in one stage" if able else f"expected none with {name}, whose tokens cannot be"
    assert why in capsys.readouterr().err
    words = ["bench", "infer", "--model", name, "--batch", "1", "--rounds", "1", "--warmup", "1"]
    assert console(words) == 0
    assert name in capsys.readouterr().out
