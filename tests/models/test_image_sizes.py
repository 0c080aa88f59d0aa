"""Models on images of other sizes than the one that they were built for."""

import pytest
import torch

import fambav
import fambav.models
from fambav.registry import CLASS_TOKENS, METHODS
from fambav.timm_compat import timm

SIZE = (24, 40)  # 6 x 10 patches instead of 8 x 8
IMAGES = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
SCHEDULES = {"storm": "keep:0.75@2"}
KINDS = [
    *(("vim_micro", dict(class_token=place)) for place in CLASS_TOKENS),
    ("plainmamba_micro", {}),
]


def build(name="vim_micro", **arguments):
    torch.manual_seed(0)
    return timm.create_model(name, **{**dict(depth=3, num_classes=5), **arguments}).eval()


def pair(name="vim_micro", **arguments):
    """A model that takes any size, and one of SIZE with its weights."""
    dynamic = build(name, dynamic_img_size=True, **arguments)
    fixed = build(name, dynamic_img_size=False, img_size=SIZE, **arguments)
    fixed.load_state_dict(fixed.remap(dynamic.state_dict()))
    return dynamic, fixed


@pytest.mark.parametrize(("name", "arguments"), KINDS)
def test_a_dynamic_model_is_one_of_the_images_size_with_resized_positions(name, arguments):
    dynamic, fixed = pair(name, **arguments)
    before = dynamic.info
    for pooling in ("avg", "token") if dynamic.cls_index else ("avg",):
        dynamic.global_pool = fixed.global_pool = pooling
        assert torch.equal(dynamic(IMAGES), fixed(IMAGES))
        rows = dynamic.forward_features(IMAGES)
        assert rows.shape[1] == fixed.info.tokens
        torch.testing.assert_close(dynamic.forward_head(rows), dynamic(IMAGES))
    assert dynamic.info == before
    assert dynamic.pretrained_cfg["fixed_input_size"] is False
    assert fixed.pretrained_cfg["fixed_input_size"] is True
    with pytest.raises(ValueError, match=r"images are \(2, 3, 24, 40\), expected \(batch, 3, 32"):
        build(name, dynamic_img_size=False, **arguments)(IMAGES)
    with pytest.raises(ValueError, match=r"side of an image is 30, .* fit are 28 and 32"):
        dynamic(torch.zeros(1, 3, 32, 30))
    with pytest.raises(ValueError, match=r"images are .*, expected \(batch, 3, height, width\)"):
        dynamic(torch.zeros(1, 1, 24, 40))


@pytest.mark.parametrize("name", ["vim_micro", "plainmamba_micro"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_on_images_of_any_size(name, method):
    dynamic, fixed = pair(name)
    how = {"scan": "compact"} if method == "prune-aligned" and name == "plainmamba_micro" else {}
    for model in (dynamic, fixed):
        fambav.reduce(model, method, SCHEDULES.get(method, "keep:0.8@2,3"), **how)
    torch.manual_seed(1)
    wanted, maps = fixed.forward_intermediates(IMAGES)
    torch.manual_seed(1)
    rows, found = dynamic.forward_intermediates(IMAGES)
    assert [x.shape for x in found] == [(2, 64, 6, 10)] * 3
    assert torch.equal(rows, wanted)
    assert all(map(torch.equal, found, maps))


@pytest.mark.parametrize("policy", [dict(scan="masked"), dict(scan="aligned", gap_policy="bias")])
def test_scans_of_a_grid_know_that_of_the_images(policy):
    dynamic, fixed = pair("plainmamba_micro", param_order="permuted")
    for model in (dynamic, fixed):
        fambav.reduce(model, "ordered", "r:7@2,3", **policy)
    assert torch.equal(dynamic(IMAGES), fixed(IMAGES))


def test_mixers_see_the_tokens_of_the_schedule_read_for_the_images():
    model, seen = build(dynamic_img_size=True), []
    for block in model.layers:
        block.mixer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    for text, lengths in (("keep:0.5@2", [61, 31, 31]), ("tokens:40@3", [61, 61, 40])):
        fambav.reduce(model, "ordered", text)
        model(IMAGES)
        assert seen == lengths
        seen.clear()
    fambav.reduce(model, "ordered", "r:30@2")
    with pytest.raises(ValueError, match="reduction_schedule is 'r:30@2', expected at most 4"):
        model(torch.zeros(1, 3, 8, 16))


@pytest.mark.parametrize("name", ["vim_micro", "plainmamba_micro"])
def test_maps_of_a_dynamic_model_of_features_only_are_those_of_the_whole_one(name):
    whole = fambav.reduce(build(name, dynamic_img_size=True), "ordered", "keep:0.8@2,3")
    part = timm.create_model(
        name, depth=3, features_only=True, out_indices=(0, 1), dynamic_img_size=True
    ).eval()
    part.model.load_state_dict(whole.state_dict(), strict=False)
    part.model.reduction = whole.reduction.of_first_layers(part.model.info)
    wanted = whole.forward_intermediates(IMAGES, [0, 1], intermediates_only=True)
    assert [x.shape for x in wanted] == [(2, 64, 6, 10)] * 2
    assert all(map(torch.equal, part(IMAGES), wanted))


@pytest.mark.parametrize("name", ["vim_micro", "plainmamba_micro"])
def test_position_embeddings_learn_from_images_of_any_size(name):
    model = build(name, dynamic_img_size=True).train()
    model(IMAGES).square().sum().backward()
    gradient = model.get_parameter(model.position).grad
    assert gradient.shape[1] == model.info.tokens
    assert gradient.abs().sum(dim=2).all()  # each row has a share of some patch


@pytest.mark.parametrize(("name", "arguments"), KINDS)
def test_a_reduced_model_goes_on_at_another_size_with_its_schedule_read_anew(name, arguments):
    model, wanted = build(name, **arguments), build(name, **arguments, img_size=SIZE)
    wanted.load_state_dict(wanted.remap(model.state_dict()))
    for each in (model, wanted):
        fambav.reduce(each, "ordered", "keep:0.5@2")
    model.set_input_size(SIZE)
    assert model.schedule == wanted.schedule
    assert torch.equal(model(IMAGES), wanted(IMAGES))
    model.train()(IMAGES).sum().backward()
    assert model.get_parameter(model.position).grad.abs().sum(dim=2).all()
    fambav.reduce(model, "ordered", "r:20@2")
    with pytest.raises(ValueError, match="reduction_schedule is 'r:20@2', expected at most"):
        model.set_input_size(16)
    assert model.img_size == SIZE
    assert torch.equal(model.eval()(IMAGES), model(IMAGES))
