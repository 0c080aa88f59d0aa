"""Features of models whose tokens were merged or dropped on the way: a value for every patch."""

import pytest
import torch

import fambav
import fambav.models
from fambav.registry import CLASS_TOKENS, METHODS
from fambav.timm_compat import timm

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
KINDS = [
    *(("vim_micro", dict(class_token=place)) for place in CLASS_TOKENS),
    ("plainmamba_micro", {}),
]


def small(name="vim_micro", **arguments):
    torch.manual_seed(0)
    return timm.create_model(name, depth=4, num_classes=5, **arguments).eval()


def followed(model, layer):
    """The normalised rows behind a layer as they are, and which of them each patch is part of."""
    kept = []
    handle = model.layers[layer].register_forward_hook(lambda _m, _a, tokens: kept.append(tokens))
    _, trace = model.forward_features(IMAGES, trace=True)
    handle.remove()
    tokens = kept[0].kept()
    patches = [n for n in range(model.info.tokens) if n not in model.info.cls_index]
    return model.normed(tokens)[0], trace.sources[layer][:, patches], tokens


@pytest.mark.parametrize(("name", "arguments"), KINDS)
@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("scan", ["compact", "masked"])
def test_members_of_a_merged_token_have_its_value_on_the_map(name, arguments, layer, scan):
    model = fambav.reduce(small(name, **arguments), "ordered", "r:7@2,3", scan=scan)
    (found,) = model.forward_intermediates(IMAGES, [layer], norm=True, intermediates_only=True)
    assert found.shape == (2, 64, 8, 8)
    rows, source, _ = followed(model, layer)
    for sample, values, own in zip(found, rows, source, strict=True):
        assert torch.equal(sample.flatten(1).T, values[own])
    distinct = [len(sample.flatten(1).T.unique(dim=0)) for sample in found]
    assert distinct == [64 - (0, 7, 14, 14)[layer]] * 2


@pytest.mark.parametrize(("name", "arguments"), KINDS)
def test_a_dropped_patch_has_the_mean_over_those_that_are_left(name, arguments):
    model = fambav.reduce(small(name, **arguments), "random", "r:7@2,3")
    (found,) = model.forward_intermediates(IMAGES, [3], norm=True, intermediates_only=True)
    rows, source, tokens = followed(model, 3)
    for n, (sample, own) in enumerate(zip(found, source, strict=True)):
        values = sample.flatten(1).T
        size = tokens.size[n].clone()
        size[tokens.cls_index[n]] = 0
        mean = (rows[n] * size[:, None]).sum(dim=0) / size.sum()
        gone = own < 0
        assert gone.sum() == 14
        assert torch.equal(values[~gone], rows[n][own[~gone]])
        torch.testing.assert_close(values[gone], mean.expand(int(gone.sum()), -1))


MERGING = {"famba-v", "ordered", "r-meeto", "tome", "mtr", "stm", "storm", "utrc"}
SCHEDULES = {"storm": "keep:0.75@2"}


@pytest.mark.parametrize(("name", "arguments"), [KINDS[0], KINDS[-1]])
@pytest.mark.parametrize("method", METHODS)
def test_maps_behind_every_method_have_a_value_for_each_patch(name, arguments, method):
    how = {"scan": "compact"} if method == "prune-aligned" and name == "plainmamba_micro" else {}
    text = SCHEDULES.get(method, "r:7@2,3")
    model = fambav.reduce(small(name, **arguments), method, text, **how)
    (found,) = model.forward_intermediates(IMAGES, [3], norm=True, intermediates_only=True)
    rows, source, tokens = followed(model, 3)
    assert found.shape == (2, 64, 8, 8)
    assert (source < 0).any().item() == (method not in MERGING)
    for n, (sample, own) in enumerate(zip(found, source, strict=True)):
        values, size = sample.flatten(1).T, tokens.size[n].clone()
        size[tokens.cls_index[n]] = 0
        mean = (rows[n] * size[:, None]).sum(dim=0) / size.sum()
        assert torch.equal(values[own >= 0], rows[n][own[own >= 0]])
        torch.testing.assert_close(values[own < 0], mean.expand(int((own < 0).sum()), -1))


@pytest.mark.parametrize("pooling", ["avg", "token", "avgmax"])
@pytest.mark.parametrize("method", ["ordered", "random", "famba-v"])
@pytest.mark.parametrize(("name", "arguments"), KINDS)
def test_the_head_reads_the_same_of_all_rows_as_of_the_tokens_left(
    name, arguments, method, pooling
):
    model = small(name, **arguments)
    if pooling == "token" and not model.info.cls_index:
        pooling = "avg"
    model.reset_classifier(5, pooling)
    fambav.reduce(model, method, "r:7@2,4")
    rows = model.forward_features(IMAGES)
    assert rows.shape == (2, model.info.tokens, 64)
    torch.testing.assert_close(model.forward_head(rows), model(IMAGES))


@pytest.mark.parametrize("name", ["vim_micro", "plainmamba_micro"])
@pytest.mark.parametrize("norm", [False, True])
def test_a_model_of_features_only_has_no_parameter_without_a_gradient(name, norm):
    how = dict(features_only=True, out_indices=(0, -2), depth=4)
    plain = small(name)
    model = timm.create_model(name, **how)
    if norm:
        model = type(model)(small(name), out_indices=(0, -2), norm=True)
    assert len(model.model.layers) == 3
    assert model.model.depth == model.model.info.depth == 3
    assert model.feature_info.channels() == [64, 64]
    assert model.feature_info.reduction() == [4, 4]
    sum(x.square().sum() for x in model.train()(IMAGES)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    model.eval().model.load_state_dict(plain.state_dict(), strict=False)
    wanted = plain.forward_intermediates(IMAGES, [0, 2], norm=norm, intermediates_only=True)
    for found, expected in zip(model(IMAGES), wanted, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_pruned_model_keeps_the_reduction_of_its_layers():
    model = fambav.reduce(small(), "ordered", "r:7@2,4")
    (wanted,) = model.forward_intermediates(IMAGES, [2], intermediates_only=True)
    assert model.prune_intermediate_layers([2]) == [2]
    assert model.schedule.counts == (0, 7, 0)
    assert torch.equal(model.forward_intermediates(IMAGES, [2], intermediates_only=True)[0], wanted)
    assert model.prune_intermediate_layers([0]) == [0]
    assert model.schedule.removed == 0
    assert model(IMAGES).shape == (2, 65, 64)
