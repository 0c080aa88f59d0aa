"""Arguments that cannot be: a ValueError or a TypeError in a sentence that names the argument."""

from functools import cache

import numpy as np
import pytest
import torch

import fambav
from fambav import cli, ops, training
from fambav.export import export
from fambav.models import PlainMamba, Vim, adapt, official
from fambav.ops import add_rms_norm, bimamba_scan, causal_conv1d, match, pool, selective_scan
from fambav.reduction import from_fusion, make_reduction, parse_schedule, plan, write_schedule
from fambav.search.parsing import parse_budget, parse_family
from fambav.timm_compat import timm
from fambav.viz import groups, save, strategies
from fambav.viz import scan as path_of_scan
from tests import made
from tests.trust.refusals import refused

DIGITS = 10**5000  # more than Python writes
NAN = float("nan")


@cache  # a refusal changes nothing
def net():
    return timm.create_model("vim_micro", num_classes=10, img_size=32)


def vim(**arguments):
    return timm.create_model("vim_micro", **arguments)


def plain(**arguments):
    return timm.create_model("plainmamba_micro", **arguments)


def small(kind=Vim, **arguments):
    return kind(**{**dict(dim=16, depth=2, img_size=16, patch_size=8, num_classes=2), **arguments})


def scan(**arguments):
    u, A, B = torch.ones(1, 4, 5), -torch.ones(4, 2), torch.ones(1, 2, 5)
    return selective_scan(**{**dict(u=u, delta=u, A=A, B=B, C=B), **arguments})


def conv(**arguments):
    return causal_conv1d(**{**dict(x=torch.ones(1, 4, 5), weight=torch.ones(4, 3)), **arguments})


def normed(**arguments):
    given = dict(hidden=torch.ones(2, 4), residual=None, weight=torch.ones(4))
    return add_rms_norm(**{**given, **arguments})


def pooled(selection):
    return pool(torch.ones(1, 4, 2), None, torch.ones(1, 4), torch.ones(1, 4), selection)


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
    "schedule of 5000 digits": ("schedule", lambda: fambav.reduce(net(), "ordered", DIGITS)),
    "hook empty": ("hook", lambda: fambav.reduce(net(), "ordered", "r:3", hook="")),
    "targets '2'": ("targets", lambda: fambav.reduce(net(), "mtr", "r:3", targets="2")),
    "prune_share True": (
        "prune_share",
        lambda: fambav.reduce(net(), "utrc", "r:3", prune_share=True),
    ),
    "seed 2.5": ("seed", lambda: fambav.reduce(net(), "random", "r:3", seed=2.5)),
    "weighted 'no'": ("weighted", lambda: fambav.reduce(net(), "r-meeto", "r:3", weighted="no")),
    "info a model": ("info", lambda: make_reduction(net(), "ordered", "r:3")),
    "counts a text": ("counts", lambda: write_schedule("7,7")),
    "text of a schedule": ("schedule", lambda: parse_schedule(None, net().info)),
    "depth of a plan": ("depth", lambda: plan("all", depth=DIGITS, count=3)),
    "layer of a plan": ("layer", lambda: plan("upper", depth=3, count=3, layer="2")),
    "count of a plan": ("token", lambda: from_fusion("all", depth=3, token=-DIGITS)),
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
    "global_pool 'mean'": ("global_pool", lambda: net().reset_classifier(3, "mean")),
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
    "depth of 400 digits": ("depth", lambda: small(depth=10**400)),
    "depth NaN": ("depth", lambda: small(depth=NAN)),
    "depth True": ("depth", lambda: small(depth=True)),
    "depth of a billion": ("depth", lambda: small(PlainMamba, depth=10**9)),
    "dim of 5000 digits": ("dim", lambda: small(dim=DIGITS)),
    "patch_size of 5000 digits": ("patch_size", lambda: small(patch_size=DIGITS)),
    "img_size of 400 digits": ("img_size", lambda: small(img_size=10**400)),
    "img_size None": ("img_size", lambda: small(img_size=None)),
    "num_classes of 400 digits": ("num_classes", lambda: small(num_classes=10**400)),
    "num_classes True": ("num_classes", lambda: small(num_classes=True)),
    "state 0": ("state", lambda: small(PlainMamba, state=0)),
    "drop_path_rate NaN": ("drop_path_rate", lambda: small(drop_path_rate=NAN)),
    "drop_rate None": ("drop_rate", lambda: small(PlainMamba, drop_rate=None)),
    "legacy_init 'no'": ("legacy_init", lambda: small(legacy_init="no")),
    "dwconv 2": ("dwconv", lambda: small(PlainMamba, dwconv=2)),
    "out_indices 99": ("indices", lambda: vim(features_only=True, out_indices=[99])),
    "rows None": ("x", lambda: net().forward_head(None)),
    "rows of two axes": ("x", lambda: net().forward_head(torch.zeros(2, 64))),
    "weights None": ("payload", lambda: official(None)),
    "weights a list": ("state_dict", lambda: adapt([], net())),
    "device 'gpu'": ("device", lambda: vim(device="gpu")),
    "dtype 'x'": ("dtype", lambda: vim(dtype="x")),
    "input size 0": ("img_size", lambda: net().set_input_size(0)),
    "input size '64'": ("img_size", lambda: net().set_input_size("64")),
}
IMAGES = {
    "float64": ("images", lambda: net()(torch.zeros(1, 3, 32, 32, dtype=torch.float64))),
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
    "masked 3": ("masked", lambda: match(torch.randn(1, 8, 4), 1, masked=3)),
    "reverse 'no'": ("reverse", lambda: scan(reverse="no")),
    "softplus 1": ("softplus", lambda: scan(delta_softplus=1)),
    "hidden None": ("hidden", lambda: normed(hidden=None)),
    "eps NaN": ("eps", lambda: normed(eps=NAN)),
    "eps 'a'": ("eps", lambda: normed(eps="a")),
    "residual_dtype int32": ("residual_dtype", lambda: normed(residual_dtype=torch.int32)),
    "a state of no numbers": (
        "A",
        lambda: scan(A=torch.ones(4, 0), B=torch.ones(1, 0, 5), C=torch.ones(1, 0, 5)),
    ),
    "hidden a number": ("hidden", lambda: normed(hidden=torch.tensor(1.0))),
    "selection a tuple": ("selection", lambda: pooled((1, 2, 3))),
    "selection of None": ("keep", lambda: pooled(ops.Selection(None, None, None))),
    "xz None": ("xz", lambda: bimamba_scan(None, None, None)),
    "a direction None": ("forward", lambda: bimamba_scan(torch.ones(1, 3, 8), None, None)),
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
    "images one path": ("images", lambda: training.predict("a.pth", "a.png")),
    "topk '5'": ("topk", lambda: training.predict("a.pth", ["a.png"], topk="5")),
    "device 3": ("device", lambda: training.predict("a.pth", ["a.png"], device=3)),
    "format 3": ("format", lambda: export("a.pth", 3, "out")),
    "tolerance 'a'": ("tolerance", lambda: export("a.pth", "safetensors", "out", tolerance="a")),
    "folder None": ("folder", lambda: export("a.pth", "safetensors", None)),
    "budget None": ("budget", lambda: parse_budget(None)),
    "family 3": ("family", lambda: parse_family(3)),
    "a picture of None": ("image", lambda: groups(net(), None)),
    "a picture of layer 99": (
        "layer",
        lambda: path_of_scan(net(), torch.zeros(3, 32, 32), layers=[99]),
    ),
    "no figure": ("drawn", lambda: save(None, "a.png")),
    "no frames": ("drawn", lambda: save([], "a.gif")),
    "a picture of no model": ("model", lambda: strategies(None, torch.zeros(3, 32, 32))),
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


@pytest.mark.parametrize("below", ["", "run"])
def test_a_file_in_the_place_of_the_run_folder_is_refused_before_the_data_is_opened(
    tmp_path, below
):
    file = tmp_path / "file"
    file.write_text("mine")
    words = ["--model", "vim_micro", "--data-set", "CIFAR", "--data-path", tmp_path / "nowhere"]
    refused(*words, "--output_dir", file / below, names=["output_dir", file])
    assert file.read_text() == "mine"


@pytest.mark.parametrize("force", [ops.force, ops.set_backend])
@pytest.mark.parametrize("wrong", [("cpu", "no_operation"), (None, []), (3,), ([],)])
def test_a_backend_that_there_is_not_is_refused(force, wrong):
    with (
        pytest.raises(ops.BackendError, match=r"^[^\n]+ is [^\n]+, expected [^\n]+$"),
        force(*wrong),
    ):
        pass
