"""Arguments that cannot be: a ValueError or a TypeError in a sentence that names the argument."""

import numpy as np
import pytest
import timm
import torch

import fambav
from fambav import cli
from fambav.ops import causal_conv1d, selective_scan
from fambav.ops.match import match
from tests import made
from tests.trust.refusals import refused


def net():
    return timm.create_model("vim_micro", num_classes=10, img_size=32)


def vim(**arguments):
    return timm.create_model("vim_micro", **arguments)


def plain(**arguments):
    return timm.create_model("plainmamba_micro", **arguments)


def scan(**arguments):
    u, A, B = torch.ones(1, 4, 5), -torch.ones(4, 2), torch.ones(1, 2, 5)
    return selective_scan(**{**dict(u=u, delta=u, A=A, B=B, C=B), **arguments})


def conv(**arguments):
    return causal_conv1d(**{**dict(x=torch.ones(1, 4, 5), weight=torch.ones(4, 3)), **arguments})


def chosen(count, x=None):
    return match(torch.randn(1, 8, 4) if x is None else x, count)


REDUCE = {
    "method None": ("method|reduction", lambda: fambav.reduce(net(), None)),
    "method 3": ("method|reduction", lambda: fambav.reduce(net(), 3)),
    "method empty": ("method|reduction", lambda: fambav.reduce(net(), "")),
    "method a list": ("method|reduction", lambda: fambav.reduce(net(), ["ordered"])),
    "no model": ("model", lambda: fambav.reduce(None, "ordered", "r:3")),
    "a model's name": ("model", lambda: fambav.reduce("vim_micro", "ordered", "r:3")),
    "another's model": ("model", lambda: fambav.reduce(torch.nn.Linear(2, 2), "ordered", "r:3")),
    "schedule None": ("schedule", lambda: fambav.reduce(net(), "ordered", None)),
    "schedule 1.5": ("schedule", lambda: fambav.reduce(net(), "ordered", 1.5)),
    "schedule []": ("schedule", lambda: fambav.reduce(net(), "ordered", [])),
    "schedule [3]": ("schedule", lambda: fambav.reduce(net(), "ordered", [3])),
    "schedule True": ("schedule", lambda: fambav.reduce(net(), "ordered", True)),
    "schedule -3": ("schedule", lambda: fambav.reduce(net(), "ordered", -3)),
    "schedule bytes": ("schedule", lambda: fambav.reduce(net(), "ordered", b"r:3")),
    "schedule empty": ("schedule", lambda: fambav.reduce(net(), "ordered", "")),
    "schedule superscript": ("schedule", lambda: fambav.reduce(net(), "ordered", "r:\u00b2")),
    "hook 3": ("hook", lambda: fambav.reduce(net(), "ordered", "r:3", hook=3)),
    "hook []": ("hook", lambda: fambav.reduce(net(), "ordered", "r:3", hook=[])),
    "scan 3": ("scan", lambda: fambav.reduce(net(), "ordered", "r:3", scan=3)),
    "gap 3": ("gap", lambda: fambav.reduce(net(), "evit", "r:3", scan="aligned", gap=3)),
    "class_policy 3": ("class", lambda: fambav.reduce(net(), "ordered", "r:3", class_policy=3)),
    "an unknown option": ("powr", lambda: fambav.reduce(net(), "mtr", "r:3", powr=3)),
}
MODELS = {
    "in_chans 0": ("in_chans", lambda: vim(in_chans=0)),
    "in_chans -1": ("in_chans", lambda: vim(in_chans=-1)),
    "in_chans '3'": ("in_chans", lambda: vim(in_chans="3")),
    "in_chans 0 of plain": ("in_chans", lambda: plain(in_chans=0)),
    "img_size 0": ("img_size", lambda: vim(img_size=0)),
    "img_size '224'": ("img_size", lambda: vim(img_size="224")),
    "img_size 32.0": ("img_size", lambda: vim(img_size=32.0)),
    "img_size three": ("img_size", lambda: vim(img_size=(32, 32, 32))),
    "patch_size 0": ("patch_size", lambda: vim(patch_size=0)),
    "patch_size '8'": ("patch_size", lambda: vim(patch_size="8")),
    "patch_size a pair": ("patch_size", lambda: vim(patch_size=(8, 8))),
    "stride 0": ("stride", lambda: vim(stride=0)),
    "num_classes -1": ("num_classes", lambda: vim(num_classes=-1)),
    "num_classes '10'": ("num_classes", lambda: vim(num_classes="10")),
    "num_classes 2.5": ("num_classes", lambda: vim(num_classes=2.5)),
    "drop_rate 1": ("drop_rate", lambda: vim(drop_rate=1.5)),
    "drop_path_rate -1": ("drop_path_rate", lambda: vim(drop_path_rate=-1)),
    "drop_path_rate 'a'": ("drop_path_rate", lambda: vim(drop_path_rate="a")),
    "class_token 3": ("class_token", lambda: vim(class_token=3)),
    "class_token []": ("class_token", lambda: vim(class_token=[])),
    "bimamba_type v9": ("bimamba_type", lambda: vim(bimamba_type="v9")),
    "param_order 3": ("param_order", lambda: plain(param_order=3)),
    "global_pool 'max'": ("global_pool", lambda: net().reset_classifier(3, "max")),
    "global_pool 3": ("global_pool", lambda: net().reset_classifier(3, 3)),
    "classes of a new head": ("num_classes", lambda: net().reset_classifier(-1)),
    "fusion_token '3'": ("fusion_token", lambda: vim(fusion_strategy="all", fusion_token="3")),
    "fusion_token 2.5": ("fusion_token", lambda: vim(fusion_strategy="all", fusion_token=2.5)),
    "fusion_token None": ("fusion_token", lambda: vim(fusion_strategy="all", fusion_token=None)),
    "fusion_token True": ("fusion_token", lambda: vim(fusion_strategy="all", fusion_token=True)),
    "fusion_strategy 3": ("fusion_strategy", lambda: vim(fusion_strategy=3, fusion_token=3)),
    "fusion_layer '4'": (
        "fusion_layer",
        lambda: vim(fusion_strategy="upper", fusion_layer="4", fusion_token=3),
    ),
    "fusion_layer 2.5": (
        "fusion_layer",
        lambda: vim(fusion_strategy="upper", fusion_layer=2.5, fusion_token=3),
    ),
    "fusion_method 3": (
        "method",
        lambda: vim(fusion_strategy="all", fusion_token=3, fusion_method=3),
    ),
    "input size 0": ("img_size", lambda: net().set_input_size(0)),
    "input size '64'": ("img_size", lambda: net().set_input_size("64")),
}
IMAGES = {
    "uint8": ("images", lambda: net()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))),
    "int64": ("images", lambda: net()(torch.zeros(1, 3, 32, 32, dtype=torch.int64))),
    "bool": ("images", lambda: net()(torch.zeros(1, 3, 32, 32, dtype=torch.bool))),
    "complex": ("images", lambda: net()(torch.zeros(1, 3, 32, 32, dtype=torch.complex64))),
    "uint8 for plain": (
        "images",
        lambda: plain(img_size=32)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)),
    ),
    "one image": ("images", lambda: net()(torch.zeros(3, 32, 32))),
    "None": ("images", lambda: net()(None)),
    "an array": ("images", lambda: net()(np.zeros((1, 3, 32, 32), np.float32))),
    "a list": ("images", lambda: net()([torch.zeros(3, 32, 32)])),
    "channels last": ("images", lambda: net()(torch.zeros(1, 32, 32, 3))),
    "indices 99": ("indices", lambda: net().forward_intermediates(torch.zeros(1, 3, 32, 32), 99)),
    "indices 'a'": ("indices", lambda: net().forward_intermediates(torch.zeros(1, 3, 32, 32), "a")),
    "indices 1.5": ("indices", lambda: net().forward_intermediates(torch.zeros(1, 3, 32, 32), 1.5)),
    "indices []": ("indices", lambda: net().forward_intermediates(torch.zeros(1, 3, 32, 32), [])),
}
OPS = {
    "u None": ("u", lambda: scan(u=None)),
    "u a list": ("u", lambda: scan(u=[1.0])),
    "u an array": ("u", lambda: scan(u=np.ones((1, 4, 5), np.float32))),
    "delta None": ("delta", lambda: scan(delta=None)),
    "A None": ("A", lambda: scan(A=None)),
    "A a number": ("A", lambda: scan(A=1.0)),
    "B None": ("B", lambda: scan(B=None)),
    "C None": ("C", lambda: scan(C=None)),
    "C a list": ("C", lambda: scan(C=[1])),
    "D a number": ("D", lambda: scan(D=1.0)),
    "z a number": ("z", lambda: scan(z=1.0)),
    "delta_bias a number": ("delta_bias", lambda: scan(delta_bias=1.0)),
    "out_dtype text": ("out_dtype", lambda: scan(out_dtype="float32")),
    "out_dtype int32": ("out_dtype", lambda: scan(out_dtype=torch.int32)),
    "out_dtype complex": ("out_dtype", lambda: scan(out_dtype=torch.complex64)),
    "out_dtype a type": ("out_dtype", lambda: scan(out_dtype=float)),
    "x None": ("x", lambda: conv(x=None)),
    "x an array": ("x", lambda: conv(x=np.ones((1, 4, 5), np.float32))),
    "weight None": ("weight", lambda: conv(weight=None)),
    "weight a list": ("weight", lambda: conv(weight=[[1.0]])),
    "width 0": ("weight", lambda: conv(weight=torch.ones(4, 0))),
    "bias a number": ("bias", lambda: conv(bias=1.0)),
    "activation True": ("activation", lambda: conv(activation=True)),
    "activation []": ("activation", lambda: conv(activation=[])),
    "count -1": ("count", lambda: chosen(-1)),
    "count 99": ("count", lambda: chosen(99)),
    "count 1.5": ("count", lambda: chosen(1.5)),
    "count None": ("count", lambda: chosen(None)),
    "features None": ("x", lambda: match(None, 1)),
    "features of two axes": ("x", lambda: chosen(1, torch.randn(8, 4))),
}
FILES = {
    "path None": ("path", lambda: fambav.from_pretrained(None)),
    "path 3": ("path", lambda: fambav.from_pretrained(3)),
    "path bytes": ("path", lambda: fambav.from_pretrained(b"a.pth")),
    "path a list": ("path", lambda: fambav.from_pretrained(["a.pth"])),
    "path a tensor": ("path", lambda: fambav.from_pretrained(torch.ones(1))),
    "path empty": ("checkpoint|path|run folder", lambda: fambav.from_pretrained("")),
    "path with zeros": ("path|checkpoint", lambda: fambav.from_pretrained("a\0b")),
    "path too long": ("path|checkpoint", lambda: fambav.from_pretrained("a" * 5000)),
    "model None": ("model", lambda: fambav.from_pretrained("a.pth", model=None)),
    "model 3": ("model", lambda: fambav.from_pretrained("a.pth", model=3)),
    "a setting of no model": ("lr", lambda: fambav.from_pretrained("a.pth", lr=1)),
}
ALL = {
    f"{name}: {case}": what
    for name, group in (
        *(("reduce", REDUCE), ("model", MODELS), ("images", IMAGES), ("operation", OPS)),
        ("file", FILES),
    )
    for case, what in group.items()
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", ALL)
def test_a_wrong_argument_is_a_sentence(case):
    name, misuse = ALL[case]
    with pytest.raises((ValueError, TypeError), match=r"^[^\n]+, expected [^\n]+$") as refusal:
        misuse()
    first = str(refusal.value).split(", expected ")[0]
    assert any(word in first for word in name.split("|")), first
    assert len(str(refusal.value)) < 600


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "mps", "cpu:3", "meta", "CPU"])
@pytest.mark.parametrize("command", ["predict", "bench"])
def test_a_device_that_there_is_not_is_refused(tmp_path, command, device):
    path = made.run(tmp_path / "checkpoint.pth")
    words = {
        "predict": ["predict", path, tmp_path / "a.png", "--device", device],
        "bench": ["bench", "scan", "--device", device],
    }[command]
    refused(*words, names=["device", device, "cpu"], program=cli.console)


NUMBERS = {
    "bench --rounds 0": "rounds",
    "bench --warmup -1": "warmup",
    "bench --batch 0": "batch",
    "bench --length 0": "length",
    "bench --dim -4": "dim",
    "bench --state 0": "state",
}


@pytest.mark.parametrize("words", NUMBERS)
def test_a_number_of_a_benchmark_that_means_nothing_is_refused(words):
    kind, *flags = words.split()
    refused(kind, "scan", *flags, names=[NUMBERS[words]], program=cli.console)
