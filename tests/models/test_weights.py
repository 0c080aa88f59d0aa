"""Weights of other codes, sizes and numbers of classes."""

import argparse
from functools import partial

import pytest
import torch

from fambav.layers.embed import insert
from fambav.models import Vim, adapt, check_class_token, official, published_class_token
from fambav.models.weights import resize_pos_embed
from fambav.timm_compat import timm


def small(**arguments):
    torch.manual_seed(0)
    return Vim(**{**dict(dim=16, depth=1, img_size=32, patch_size=8, num_classes=5), **arguments})


def checkpoint(model, **arguments):
    """What Vim's code saves."""
    state = model.state_dict()
    return {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
        "lr_scheduler": {},
        "epoch": 299,
        "model_ema": {name: value + 1 for name, value in state.items()},
        "scaler": "none",
        "args": argparse.Namespace(model="vim_tiny_patch16_224_x", **arguments),
    }


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_weights_are_picked_out_of_what_the_official_code_saves(prefix):
    model = small()
    payload = checkpoint(model)
    payload["model"] = {prefix + name: value for name, value in payload["model"].items()}
    raw, averaged = official(payload), official(payload, ema=True)
    assert list(raw) == list(averaged) == list(model.state_dict())
    small().load_state_dict(raw, strict=True)
    assert torch.equal(averaged["pos_embed"], raw["pos_embed"] + 1)


def test_bare_weights_are_taken_as_they_are():
    state = small().state_dict()
    assert official(state).keys() == state.keys()
    assert official({"state_dict": state}).keys() == state.keys()


@pytest.mark.parametrize(
    ("payload", "ema"),
    [
        ({}, False),
        ({"epoch": 3}, False),
        ({"model": {"a": 1}}, False),
        ({"model": {1: torch.zeros(2)}}, False),
        ({"model": {}}, False),
        ({"model": {"a": torch.zeros(2)}}, True),
        ({"model": {"a": torch.zeros(2)}, "model_ema": torch.zeros(2)}, True),
    ],
)
def test_a_file_without_weights_is_refused(payload, ema):
    with pytest.raises(ValueError, match="expected weights under model"):
        official(payload, ema=ema)


def test_published_checkpoints_tell_where_their_class_token_stands():
    vim = dict(args=argparse.Namespace(model="vim_small_patch16_224"))
    famba = dict(args=argparse.Namespace(model="vim_small_patch16_224", fusion_strategy="no"))
    deit = dict(args=argparse.Namespace(model="deit_tiny_patch16_224"))
    assert published_class_token(vim) == "middle"
    assert published_class_token(famba) == "head"
    assert published_class_token(deit) is None
    assert published_class_token({"model": {}}) is None


@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "vim_small_patch16_stride8_224"])
def test_checkpoints_of_models_that_are_not_offered_are_refused(name):
    payload = dict(args=argparse.Namespace(model=name, fusion_strategy="no"))
    with pytest.raises(ValueError, match=f"checkpoint is of Famba-V's {name}"):
        published_class_token(payload)


def test_weights_trained_with_another_class_token_are_refused():
    check_class_token("head", "head")
    with pytest.raises(ValueError, match="class_token is 'middle', expected 'head'"):
        check_class_token("head", "middle")
    with pytest.raises(ValueError, match="class_token is 'middle', expected 'head'"):
        adapt(small().state_dict(), small(), class_token="head")


def test_weights_that_fit_are_not_touched():
    state = small().state_dict()
    weights = adapt(state, small(), class_token="middle")
    assert list(weights) == list(state)
    assert all(weights[name] is value for name, value in state.items())


def ramp(model, scale):
    """A position embedding that is its own coordinates, with -1, -2 in the class rows."""
    height, width = model.grid
    down, right = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    raster = torch.stack((down / scale[0], right / scale[1]), dim=-1).reshape(1, -1, 2)
    raster = torch.nn.functional.pad(raster, (0, model.dim - 2))
    extra = [torch.full((1, 1, model.dim), -1.0 - i) for i in range(len(model.cls_index))]
    return insert(raster, extra, model.cls_index)


@pytest.mark.parametrize("class_token", ["middle", "head", "double", "none"])
@pytest.mark.parametrize(
    ("old", "new"), [((32, 32), (64, 64)), ((64, 64), (32, 32)), ((32, 64), (64, 32))]
)
def test_position_embeddings_resize_around_their_class_rows(class_token, old, new):
    source = small(class_token=class_token, img_size=old)
    target = small(class_token=class_token, img_size=new)
    scale = [o / n for o, n in zip(old, new, strict=True)]
    out = resize_pos_embed(ramp(source, (1, 1)), target, source.grid)
    rows = out[0, list(target.cls_index), 0].tolist()
    assert rows == [-1.0 - i for i in range(len(rows))]
    patches = [i for i in range(target.length) if i not in target.cls_index]
    grid = out[0, patches, :2].reshape(*target.grid, 2)
    centre = torch.tensor([(side - 1) / 2 for side in source.grid])
    torch.testing.assert_close(grid.mean(dim=(0, 1)), centre, atol=0.05, rtol=0)
    torch.testing.assert_close(grid[:, :1].expand_as(grid)[..., 0], grid[..., 0])
    inner = grid[1:-1, 1:-1]
    torch.testing.assert_close(
        inner[:, 0, 0].diff(), torch.full((inner.shape[0] - 1,), scale[0]), atol=0.3, rtol=0
    )


def test_an_embedding_of_the_same_grid_is_returned_as_it_is():
    model = small(img_size=(32, 64))
    embedding = torch.randn(1, 33, 16)
    assert resize_pos_embed(embedding, model, (4, 8)) is embedding
    assert not torch.equal(resize_pos_embed(embedding, model, (8, 4)), embedding)


def test_a_square_is_assumed_of_a_grid_that_is_not_known():
    model = small(img_size=(16, 128))  # 2 x 16 patches
    square = resize_pos_embed(torch.randn(1, 17, 16), model)
    assert square.shape == (1, 33, 16)
    with pytest.raises(ValueError, match="grid is 2 x 16, expected 20 cells"):
        resize_pos_embed(torch.randn(1, 21, 16), model, (2, 16))


@pytest.mark.parametrize("size", [(16, 64), (64, 16), (16, 128), (16, 16)])
@pytest.mark.parametrize("build", [small, partial(timm.create_model, "plainmamba_micro")])
def test_weights_loaded_into_their_own_model_change_nothing_or_ask_for_the_grid(build, size):
    model = build(img_size=size)
    weights = model.state_dict()
    if size[0] != size[1]:  # 2 x 8 patches are as many as 4 x 4
        with pytest.raises(ValueError, match=rf"grid is None, .* grid=\({model.grid[0]}, "):
            adapt(weights, model)
    grid = None if size[0] == size[1] else model.grid
    assert all(value is weights[name] for name, value in adapt(weights, model, grid=grid).items())


def test_a_model_of_another_size_takes_adapted_weights_strictly():
    source, target = small(), small(img_size=64)
    target.load_state_dict(adapt(source.state_dict(), target), strict=True)
    middle = target.cls_index[0]
    assert torch.equal(target.pos_embed[0, middle], source.pos_embed[0, source.cls_index[0]])


def test_another_number_of_classes_is_refused_or_drops_the_head():
    source, target = small(num_classes=1000), small(num_classes=5)
    with pytest.raises(ValueError, match="checkpoint has 1000 classes, expected 5"):
        adapt(source.state_dict(), target)
    weights = adapt(source.state_dict(), target, head="drop")
    assert torch.equal(weights["head.weight"], target.head.weight)
    target.load_state_dict(weights, strict=True)
    same = small(num_classes=1000)
    torch.nn.init.zeros_(same.head.weight)
    kept = adapt(source.state_dict(), same, head="drop")
    assert torch.equal(kept["head.weight"], source.head.weight)


def test_heads_may_be_missing_on_either_side_if_they_may_be_dropped():
    headless, model = small(num_classes=0), small()
    with pytest.raises(ValueError, match="checkpoint has 0 classes, expected 5"):
        adapt(headless.state_dict(), model)
    model.load_state_dict(adapt(headless.state_dict(), model, head="drop"), strict=True)
    with pytest.raises(ValueError, match="checkpoint has 5 classes, expected 0"):
        adapt(model.state_dict(), headless)
    headless.load_state_dict(adapt(model.state_dict(), headless, head="drop"), strict=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(depth=2), "checkpoint has 17 weights such as layers.1.mixer.A_b_log"),
        (dict(class_token="double"), "checkpoint lacks 1 weights such as cls_token"),
        (dict(bimamba_type="v1"), "checkpoint lacks"),
        (dict(dim=32), r"cls_token of the checkpoint is \(1, 1, 32\), expected \(1, 1, 16\)"),
        (dict(in_chans=1), r"patch_embed.proj.weight of the checkpoint is \(16, 1, 8, 8\)"),
        (dict(patch_size=4), r"patch_embed.proj.weight of the checkpoint is \(16, 3, 4, 4\)"),
    ],
)
def test_weights_of_another_model_are_refused_in_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        adapt(small(**arguments).state_dict(), small())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("pos_embed", (17,)),
        ("pos_embed", (2, 17, 16)),
        ("pos_embed", (1, 1, 16)),
        ("pos_embed", (1, 0, 16)),
        ("pos_embed", (1, 12, 16)),
        ("head.weight", ()),
        ("head.weight", (5,)),
        ("head.bias", (4,)),
        ("norm_f.weight", ()),
    ],
)
@pytest.mark.parametrize("class_token", ["middle", "double"])
def test_weights_of_a_wrong_shape_are_refused_in_a_sentence(name, shape, class_token):
    model = small(class_token=class_token)
    state = model.state_dict() | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match="expected"):
        adapt(state, model)
