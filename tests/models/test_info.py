"""What a model tells about itself, held against what it does."""

import inspect

import pytest
import torch

from fambav.layers import Tokens
from fambav.models import Backbone
from fambav.registry import CLASS_TOKENS, CLASSIFIERS, FAMILIES, FOREIGN, family_of
from fambav.timm_compat import timm

SMALL = dict(depth=2, img_size=(32, 48), num_classes=7)
KINDS = [
    *(("vim_micro", dict(class_token=place)) for place in CLASS_TOKENS),
    *(("vim_micro", dict(bimamba_type=kind)) for kind in ("v1", "none")),
    ("plainmamba_micro", {}),
    ("plainmamba_micro", dict(param_order="permuted")),
]


def build(name, **arguments):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **arguments}).eval()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_name_tells_its_family_and_its_stages(name):
    with torch.device("meta"):
        info = timm.create_model(name).info
    assert name in FAMILIES[info.family].models
    assert [family_of(name)] == [f for f in FAMILIES.values() if name in f.models]
    assert info.stage == info.stages[0]
    assert info.tokens == info.grid[0] * info.grid[1] + len(info.cls_index)
    with pytest.raises(AttributeError):
        info.family = "other"


@pytest.mark.parametrize(("name", "arguments"), KINDS)
def test_sizes_are_those_of_the_tokens(name, arguments):
    model, seen = build(name, **arguments), []
    model.layers[0].mixer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    model(torch.zeros(2, 3, 32, 48))
    info = model.info
    assert seen == [(2, info.tokens, info.width)]
    assert info.depth == len(model.layers) == 2
    assert info.grid == (8, 12)
    start = model.embed(torch.zeros(1, 3, 32, 48))
    assert tuple(start.cls_index[0].tolist()) == info.cls_index


@pytest.mark.parametrize(("name", "arguments"), KINDS)
def test_mixers_return_the_intermediates_and_scan_as_often_as_info_says(name, arguments):
    model = build(name, **arguments)
    info, x = model.info, torch.randn(1, model.info.tokens, model.info.width)
    tokens = Tokens.start(x, cls_index=info.cls_index, grid=info.grid)
    _, intermediates = model.layers[0].mixer(x, tokens, want=info.intermediates)
    given = {n for n, value in intermediates._asdict().items() if value is not None}
    assert given - {"order"} == info.intermediates
    assert intermediates.y.shape[1] == intermediates.order.shape[1] == info.directions


@pytest.mark.parametrize("name", ["vim_micro", "plainmamba_micro"])
def test_a_family_s_settings_are_arguments_of_its_models(name):
    known = inspect.signature(type(build(name))).parameters
    assert set(family_of(name).arguments.values()) <= set(known)


def test_a_model_of_timm_s_has_no_info():
    net = timm.create_model("resnet10t")
    assert not isinstance(net, Backbone)
    assert not hasattr(net, "info")
    assert family_of(f"{FOREIGN}resnet10t").models == ()
