"""Backbones with heads that label pixels: trained, resumed, evaluated, predicted with, exported."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import fambav
from fambav import training
from fambav.cli import console
from fambav.config import Config
from fambav.data import load, synthetic
from fambav.engine import checkpoint
from fambav.export.description import describe
from fambav.heads import SegmentationModel, library
from fambav.models import TimmModel
from fambav.registry import BUILDERS, LIBRARY_HEADS
from fambav.training import run_state
from fambav.training.inference import load_run
from tests.identical import assert_identical, log
from tests.made import crash_in_update, crashing, go, refused, run

WORDS = [
    *("--data-set", "SHAPES-SEG", "--data-stats", "own", "--head-channels", "8"),
    *("--batch-size", "4", "--warmup-epochs", "0", "--lr", "3e-3", "--unscale-lr"),
    *("--num_workers", "0", "--device", "cpu", "--threads", "1", "--no-model-ema"),
]
BACKBONES = {
    "vssd_nano": [],
    "vmamba_nano": [],
    "groupmamba_nano": [],
    "vim2_nano": ["--head", "fcn"],
    "vim_micro": ["--fusion-strategy", "upper", "--fusion-layer", "3", "--fusion-token", "9"],
    "plainmamba_micro": ["--head", "fcn", "--auxiliary-weight", "0"],
    "timm/resnet18": ["--grad-accum-steps", "2"],
}


@pytest.fixture(scope="module", autouse=True)
def few():
    small = synthetic.shapes_seg(counts=(16, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUILDERS._builders, "SHAPES-SEG", lambda _: small)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ["--model", "vssd_nano", *WORDS, "--epochs", "2", "--output_dir", folder]
    found = go(*words)
    assert found.status == 0, found.err
    return folder, words


def built(name, *words, classes=11):
    flat = fambav.config.read_flags(["--model", name, "--data-set", "SHAPES-SEG", *words])
    torch.manual_seed(0)
    return training.model(Config.from_flat(flat), num_classes=classes)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_labels_pixels_and_all_its_parameters_learn(name):
    words = [*BACKBONES[name], "--head-channels", "8", "--crop-size", "32", "--drop-path", "0"]
    net = built(name, *words)
    outputs = net(torch.randn(2, 3, 32, 32))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert [tuple(x.shape) for x in outputs] == [(2, 11, 32, 32)] * (2 - ("0" in words[:4]))
    sum(x.square().sum() for x in outputs).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    assert net.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 11, 32, 32)


@pytest.mark.parametrize("name", ["vssd_nano", "vim_micro"])
def test_names_of_a_backbone_are_its_own_behind_one_prefix(name):
    net = built(name, "--head-channels", "8")
    own = training.model(Config.from_flat({"model": name}), num_classes=10)
    inside = {n.removeprefix("backbone.") for n in net.state_dict() if n.startswith("backbone.")}
    assert {n for n in inside - own.state_dict().keys() if not n.startswith("outnorm")} == set()
    spared = {n.removeprefix("backbone.") for n in net.no_weight_decay()}
    assert spared == own.no_weight_decay() & inside


def test_a_killed_run_resumes_bit_for_bit(finished, tmp_path):
    folder, words = finished
    words = [*words[:-1], tmp_path]
    with crashing(partial(crash_in_update, update=6)):
        go(*words, "--save-every", "1")
    assert go(*words, "--save-every", "1", "--resume", "auto").status == 0
    assert_identical(tmp_path, folder)


def test_a_run_is_evaluated_predicted_with_drawn_and_exported(finished, tmp_path, capsys):
    folder, _ = finished
    best = max(record["test_miou"] for record in log(folder))
    assert console(["evaluate", str(folder), "--device", "cpu"]) == 0
    assert f" mIoU {best:.3f} " in capsys.readouterr().out
    pixels = np.random.default_rng(0).integers(256, size=(40, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    words = ["predict", str(folder), str(tmp_path / "a.png"), "--device", "cpu"]
    assert console([*words, "--output-dir", str(tmp_path)]) == 0
    assert np.asarray(Image.open(tmp_path / "a_mask.png")).shape == (40, 70)
    assert console(["show", str(folder), "--output-dir", str(tmp_path / "pictures")]) == 0
    assert (tmp_path / "pictures" / "masks.png").stat().st_size
    out = tmp_path / "exported"
    words = ["export", str(folder), "--format", "safetensors", "--output-dir", str(out)]
    assert console(words) == 0
    both = [fambav.from_pretrained(path) for path in (folder, out)]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(*(net(images) for net in both))


def test_other_classes_get_new_heads(finished):
    folder, _ = finished
    with pytest.warns(UserWarning, match="the head is new"):
        net = fambav.from_pretrained(folder, num_classes=3)
    old = fambav.from_pretrained(folder)
    assert net(torch.randn(1, 3, 32, 32)).shape == (1, 3, 32, 32)
    same = "decode_head.fpn_bottleneck.conv.weight"
    assert torch.equal(net.state_dict()[same], old.state_dict()[same])


@pytest.mark.parametrize("name", ["vssd_nano", "vim_micro"])
def test_a_classifier_starts_the_backbone(name, tmp_path):
    file = run(tmp_path / "classifier.pth", model=name, patch_size=None)
    net = built(name, "--head-channels", "8")
    before = {n: value.clone() for n, value in net.state_dict().items()}
    state = training.run_state.RunState.read(file)
    state.load_into(net, head="drop")
    there = torch.load(file, weights_only=True)["model"]
    for n, value in net.state_dict().items():
        source = there.get(n.removeprefix("backbone."), before[n])
        assert torch.equal(value, source), n
    with pytest.raises(ValueError, match="checkpoint has no decode_head, expected one of a seg"):
        state.load_into(net)


def test_reduced_tokens_give_whole_maps_and_the_plan_can_change_after_training():
    net = built("vim_micro", *BACKBONES["vim_micro"], "--head-channels", "8").eval()
    assert net.reduction.schedule.lengths[-1] < net.reduction.schedule.start
    images = torch.randn(2, 3, 32, 32)
    assert [tuple(x.shape) for x in net.maps(images)] == [(2, 64, 8, 8)] * 4
    reduced = net(images)
    fambav.reduce(net.backbone, "none")
    unreduced = net(images)
    assert reduced.shape == unreduced.shape == (2, 11, 32, 32)
    assert not torch.equal(reduced, unreduced)
    # Merged members have one value: behind a fusion a map has no more of them than there are tokens
    fambav.reduce(net.backbone, "famba-v", "upper:3:9")
    last = net.maps(images)[-1].flatten(2)  # (batch, dim, patches)
    kept = net.reduction.schedule.lengths[-1]
    assert all(len(cells.unique(dim=1).T) <= kept for cells in last)


def test_a_file_of_a_reduced_backbone_says_its_plan_and_gives_the_same_logits(tmp_path):
    flat = {"model": "vim_micro", "data_set": "SHAPES-SEG", "head_channels": 8, "num_classes": 11}
    fusion = {"fusion_strategy": "upper", "fusion_layer": 3, "fusion_token": 9}
    config, found = Config.from_flat({**flat, **fusion, "input_size": 32}), load("SHAPES-SEG")
    torch.manual_seed(0)
    net = training.model(config, num_classes=11).eval()
    facts = run_state.facts(config, found, net.reduction.schedule, images=4, grid=(8, 8))
    checkpoint.save(tmp_path / "a.pth", {"model": net.state_dict(), **facts})
    loaded = load_run(tmp_path / "a.pth")
    plan = describe(loaded, "safetensors")["fambav"]["plan"]
    assert list(plan["counts"]) == list(net.reduction.schedule.counts) and sum(plan["counts"]) == 36
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.net(images), net(images))
    plain = load_run(tmp_path / "a.pth", {"fusion_strategy": "none"})
    assert not torch.equal(plain.net(images), net(images))


REFUSED = {
    "--model vmunet_nano --head upernet": "--head is 'upernet', expected none with --model vmunet",
    "--model vmunet_nano --head-channels 8": "--head-channels is 8, expected 512 with --model",
    "--model vssd_nano --head unett": "--head is 'unett', expected one of upernet, fcn, unet",
    "--model vssd_nano --head unet --head-channels 8": "--head-channels is 8, expected 512",
    "--model vssd_nano --head-channels 1": "--head-channels is 1, expected at least 2",
    "--model vssd_nano --batch-size 1": "--batch-size is 1, expected at least 2 with --head",
    "--model vssd_nano --drop 0.1": "--drop is 0.1, expected 0.0 with --data-set SHAPES-SEG",
    "--model vim_micro --crop-size 30": "img_size is 30, expected a size that patches of 4",
    "--model vssd_nano --crop-size 16": "img_size is 16 x 16, expected sides of at least 32",
    "--model dlinear": "--model is 'dlinear', expected vmunet or",
    "--model vssd_nano --num-classes 7": "num_classes is 7, expected 11, the classes of SHAPES",
}


@pytest.mark.parametrize("words", REFUSED)
def test_settings_that_do_not_fit_are_refused(words):
    assert REFUSED[words] in refused("--data-set", "SHAPES-SEG", *words.split())


def test_a_decoder_of_a_package_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(library, "find_spec", lambda _: None)
    words = ["--data-set", "SHAPES-SEG", "--model", "vssd_nano", "--head", "unet"]
    assert "head is 'unet', expected an installed one" in refused(*words)


@pytest.mark.extra("segmentation_models_pytorch")
@pytest.mark.parametrize("head", LIBRARY_HEADS)
def test_decoders_of_segmentation_models_pytorch_learn_and_their_weights_load(head):
    net = built("vssd_nano", "--head", head, "--drop-path", "0")
    outputs = net(torch.randn(2, 3, 32, 64))
    assert [tuple(x.shape) for x in outputs] == [(2, 11, 32, 64)] * 2
    sum(x.square().sum() for x in outputs).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    net.load_state_dict(net.remap(net.state_dict()))
    line = "head is 'unet', expected upernet or fcn on vim_micro, whose maps have strides of 4, 4"
    with pytest.raises(ValueError, match=line):
        built("vim_micro", "--head", "unet")


@pytest.mark.extra("segmentation_models_pytorch")
@pytest.mark.parametrize("model", ["timm/test_resnet", "timm/test_convnext"])
def test_decoders_of_the_package_read_all_maps_of_a_model_of_timm(model):
    net = built(model, "--head", "unet")
    strides = [each["reduction"] for each in net.map_info]
    assert strides[-4:] == [4, 8, 16, 32]
    outputs = net(torch.randn(2, 3, 32, 64))
    assert [tuple(x.shape) for x in outputs] == [(2, 11, 32, 64)] * 2
    sum(x.square().sum() for x in outputs).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


def test_a_head_needs_masks():
    line = refused("--model", "vssd_nano", "--data-set", "DIGITS", "--head", "fcn")
    assert "--head is 'fcn', expected none with --model vssd_nano and --data-set DIGITS" in line


def test_other_classes_than_the_head_has_are_refused(finished):
    folder, _ = finished
    line = refused("--eval", "--resume", folder, "--num-classes", "7")
    assert "7" in line and "11" in line


def test_a_data_set_without_a_model_gets_one_that_needs_no_head():
    config = Config.from_flat({"data_set": "SHAPES-SEG"})
    assert config.model.model == "vmunet" and config.model.head is None
    config = Config.from_flat({"data_set": "SHAPES-SEG", "model": "vssd_nano"})
    assert config.model.head == "upernet"
    assert Config.from_flat({"model": "vssd_nano"}).data.data_set == "DIGITS"
    assert Config.from_flat({"model": "vssd_nano"}).model.head is None
    assert Config.from_flat({"model": "vmunet_nano"}).data.data_set == "SHAPES-SEG"


def test_a_model_of_timm_and_one_of_ours_both_make_the_maps():
    assert isinstance(built("vssd_nano", "--head-channels", "8").backbone, TimmModel)
    foreign = built("timm/resnet18", "--head-channels", "8", "--crop-size", "32")
    assert isinstance(foreign, SegmentationModel) and not foreign.draws_whole_update
