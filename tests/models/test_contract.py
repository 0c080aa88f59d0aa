"""What every registered model must do."""

import copy
import pickle
from itertools import product

import pytest
import torch

import fambav.models  # noqa: F401  registers the models
from fambav.models import groupmamba, plainmamba, vim, vim2, vmamba, vssd
from fambav.reduction import reduce
from fambav.registry import (
    BIMAMBA,
    CLASS_TOKENS,
    CLASSIFIERS,
    FAMILIES,
    FUSION_METHODS,
    family_of,
)
from fambav.timm_compat import timm
from tests.identical import same_gradients_when_checkpointed

STAGED = [name for name in CLASSIFIERS if family_of(name).staged]
# Names with patch16 mean the same models as others.
ROWS = [name for name in CLASSIFIERS if name not in STAGED and "patch16" not in name]
FEWER = [name for name in CLASSIFIERS if name not in STAGED or "tiny" in name or "nano" in name]
SIZES = [*ROWS, *(name for name in STAGED if "nano" in name)]
SMALL = dict(depth=2, img_size=64, patch_size=16, num_classes=7)
SMALL_STAGES = dict(depths=(1, 1, 1, 1), img_size=64, num_classes=7)
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def build(name="vim_micro", **arguments):
    torch.manual_seed(0)
    small = SMALL_STAGES if name in STAGED else SMALL
    return timm.create_model(name, **{**small, **arguments})


def test_the_list_of_names_is_what_is_registered():
    registered = set(timm.list_models("vim_*", module="vim"))
    assert set(vim.VARIANTS) == registered
    for module in (groupmamba, plainmamba, vim2, vmamba, vssd):
        own = set(timm.list_models(module=module.__name__.split(".")[-1]))
        assert set(module.VARIANTS) == own
        registered |= own
    assert set(CLASSIFIERS) == registered


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("vim_micro", "ordered", r"reduction is .ordered., expected arguments of reduce"),
        ("vim_micro", {"method": "tome", "schedule": "r:99@2"}, "r:99@2"),
        ("groupmamba_nano", {"method": "tome"}, "expected one whose tokens can be reduced"),
    ],
)
def test_a_reduction_that_cannot_be_is_refused_while_building(name, given, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, reduction=given)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_name_builds(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert model.get_classifier().out_features == 1000
    assert model.pretrained_cfg["architecture"] == name
    assert model.pretrained_cfg["input_size"] == (3, *model.img_size)
    assert model.class_token == ("middle" if family_of(name) is FAMILIES["vim"] else "none")
    if name not in STAGED:
        assert set(model.schedule.lengths) == {model.length}


@pytest.mark.parametrize("name", SIZES)
def test_every_parameter_learns(name):
    model = build(name)
    logits = model(IMAGES)
    assert logits.shape == (2, 7)
    (logits * torch.randn(2, 7)).sum().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # GroupMamba's class block scans one cell, before which there is no state that could decay.
    assert [n for n in idle if not n.startswith("post_network") or "A_logs" not in n] == []


# A first token that is scanned forward only would see nothing of the image.
SEEING = sorted(set(product(CLASS_TOKENS, BIMAMBA)) - {("head", "none")})


@pytest.mark.parametrize(("class_token", "kind"), SEEING)
@pytest.mark.parametrize("method", FUSION_METHODS)
def test_every_parameter_of_every_variant_learns_through_fusion(class_token, kind, method):
    model = build(
        class_token=class_token,
        bimamba_type=kind,
        fusion_strategy="all",
        fusion_token=3,
        fusion_method=method,
    )
    (model(IMAGES) * torch.randn(2, 7)).sum().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Before the first token there is no state that could decay.
    assert idle == (["layers.1.mixer.A_log"] if class_token == "head" else [])


@pytest.mark.parametrize("method", FUSION_METHODS)
@pytest.mark.parametrize("class_token", CLASS_TOKENS)
@pytest.mark.parametrize(
    "fusion",
    [
        dict(fusion_strategy="all", fusion_token=2),
        dict(fusion_strategy="interleaved", fusion_token=4),
        dict(fusion_strategy="lower", fusion_layer=3, fusion_token=3),
        dict(fusion_strategy="upper", fusion_layer=2, fusion_token=3),
        dict(fusion_plan="1:5,4:1"),
    ],
    ids=["all", "interleaved", "lower", "upper", "plan"],
)
def test_mixers_see_exactly_the_tokens_of_the_schedule(fusion, class_token, method):
    model, seen = build(depth=4, class_token=class_token, fusion_method=method, **fusion), []
    for block in model.layers:
        block.mixer.register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape))
    model.eval()(IMAGES)
    assert seen == [(2, length, 64) for length in model.schedule.lengths]
    assert model.schedule.removed > 0
    seen.clear()
    model.train()(IMAGES)
    assert [shape[1] for shape in seen] == list(model.schedule.lengths)


@pytest.mark.parametrize("method", FUSION_METHODS)
@pytest.mark.parametrize("class_token", ["middle", "head", "double"])
def test_the_feature_is_read_where_each_sample_s_class_token_is_now(class_token, method):
    model = build(depth=4, class_token=class_token, fusion_method=method).eval()
    model.fuse("all", token=2, method=method)
    kept = []
    model.layers[-1].register_forward_hook(lambda _module, _args, tokens: kept.append(tokens))
    images = torch.randn(16, 3, 64, 64)
    rows, trace = model.forward_features(images, trace=True)
    feature, (tokens,) = model.forward_head(rows, pre_logits=True), kept
    start = torch.tensor(model.cls_index).expand(16, -1)
    places = tokens.cls_index
    assert torch.equal(trace.sources[-1].gather(1, start), places)
    assert torch.equal(tokens.position.gather(1, places), start)
    assert (tokens.size.gather(1, places) == 1).all()
    rows, _ = model.norm_f(tokens.x, tokens.residual)
    read = [sample[own].mean(dim=0) for sample, own in zip(rows, places, strict=True)]
    torch.testing.assert_close(feature, torch.stack(read))
    if class_token == "middle":
        assert len(places.unique()) > 1  # or one place for all would do


def test_fusion_keeps_the_mean_over_patches_when_there_is_no_class_token():
    model = build(class_token="none", fusion_method="ordered", fusion_plan="1:8").eval()
    seen = []
    model.norm_f.register_forward_hook(lambda _module, args, out: seen.append(out[0]))
    sizes = []
    model.layers[-1].register_forward_hook(lambda _module, _args, t: sizes.append(t.size))
    feature = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
    expected = (seen[0] * sizes[0][..., None]).sum(dim=1) / 16
    torch.testing.assert_close(feature, expected)
    assert sizes[0].max() > 1


@pytest.mark.parametrize("name", SIZES)
def test_state_dict_round_trips_strictly(name):
    model, other = build(name), build(name)
    if name in ROWS:
        reduce(other, "ordered", "r:1")
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    other.load_state_dict(model.state_dict(), strict=True)
    if name in ROWS:
        reduce(other, "none")
    assert torch.equal(other.eval()(IMAGES), model.eval()(IMAGES))


def test_copies_and_pickles_give_the_same_outputs():
    model = build(fusion_strategy="all", fusion_token=2, drop_path_rate=0.1).eval()
    expected = model(IMAGES)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IMAGES), expected)
        assert twin.schedule == model.schedule


@pytest.mark.parametrize("method", FUSION_METHODS)
def test_checkpointing_changes_no_gradient(method):
    options = dict(drop_path_rate=0.3, fusion_plan="1:2,2:2", fusion_method=method)
    same_gradients_when_checkpointed(lambda: build(**options), IMAGES)


def test_the_head_can_be_replaced_or_taken_away():
    model = build()
    rows = model.forward_features(IMAGES)
    feature = model.forward_head(rows, pre_logits=True)
    assert model.get_classifier() is model.head
    assert torch.equal(model.head(feature), model(IMAGES))
    model.reset_classifier(0)
    assert torch.equal(model(IMAGES), feature)
    model.reset_classifier(0, "")
    assert torch.equal(model(IMAGES), rows)
    patches = rows[:, [n for n in range(17) if n not in model.info.cls_index]]
    mean, largest = patches.mean(dim=1), patches.amax(dim=1)
    for pooling, wanted in (("avg", mean), ("max", largest), ("avgmax", (mean + largest) / 2)):
        model.reset_classifier(0, pooling)
        torch.testing.assert_close(model(IMAGES), wanted)
        torch.testing.assert_close(model.forward_head(rows), wanted)
    model.reset_classifier(0, "token")
    model.reset_classifier(3)
    assert model(IMAGES).shape == (2, 3)
    assert model.num_classes == 3
    assert list(model.state_dict()) == list(build().state_dict())
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_a_new_head_has_the_dtype_and_mode_of_the_model():
    model = build().double().eval()
    model.reset_classifier(5)
    assert model.head.weight.dtype == torch.float64
    assert not model.head.training


def test_weight_decay_spares_what_is_not_a_plain_matrix():
    spared = build(class_token="double").no_weight_decay()
    parts = ("A_log", "D", "A_b_log", "D_b")
    blocks = {f"layers.{layer}.mixer.{part}" for layer in range(2) for part in parts}
    assert spared == {"cls_token_head", "cls_token_tail", "pos_embed", *blocks}


def test_timm_s_grouping_takes_the_list():
    model = build()
    groups = timm.optim.param_groups_weight_decay(
        model, 0.05, no_weight_decay_list=model.no_weight_decay()
    )
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name.split(".")[-2] for name, p in model.named_parameters() if id(p) in decayed}
    projections = {"in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj"}
    assert names == projections | {"proj", "head", "conv1d", "conv1d_b"}


def test_timm_reads_what_images_the_model_wants():
    model = build("vim_tiny", img_size=(64, 96), in_chans=1)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (1, 64, 96)
    assert config["interpolation"] == "bicubic"


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("method", FUSION_METHODS)
def test_a_fused_model_compiles_without_a_graph_break(method):
    model = build(img_size=16, patch_size=4, fusion_plan="1:2,2:3", fusion_method=method)
    images = IMAGES[:, :, :16, :16]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images), model(images))


@pytest.mark.parametrize("method", FUSION_METHODS)
def test_bfloat16_is_close_to_float32(method):
    images = torch.randn(9, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def errors():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images)
        return (rough.float() - exact).norm(dim=1) / exact.norm(dim=1)

    model = build(depth=4).eval()
    assert errors().max() < 0.03
    model.fuse(plan="2:2,3:2", method=method)
    assert errors().median() < 0.03  # rounding turns the choice of a pair in a sample or two


def test_double_precision_agrees_with_float32():
    model = build(fusion_strategy="all", fusion_token=3).eval()
    exact = copy.deepcopy(model).double()(IMAGES.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(model(IMAGES).double(), exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rate", [{"drop_path_rate": 0.5}, {"drop_rate": 0.5}])
def test_drop_rates_act_in_training_only(rate):
    model, plain = build(**rate), build()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.eval()(IMAGES), plain(IMAGES))
    assert not torch.equal(model.train()(IMAGES), plain(IMAGES))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_what_images_a_name_reads_is_known_without_building_it(name):
    model = timm.create_model(name, device="meta")
    known = timm.models.get_pretrained_cfg(name)
    assert known.architecture == name
    assert timm.models.get_pretrained_cfg_value(name, "input_size") == (3, *model.img_size)
    assert timm.models.get_pretrained_cfg_value(name, "pool_size") == model.info.stages[-1].grid
    own = {n: value for n, value in model.pretrained_cfg.items() if hasattr(known, n)}
    assert own == {n: value for n, value in known.to_dict().items() if n in own}
    assert model.get_submodule(known.classifier) is model.get_classifier()
    assert model.get_submodule(known.first_conv).in_channels == model.in_chans == 3


SMALLEST = [name for name in FEWER if name.endswith(("micro", "nano"))]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*product(FEWER, [torch.float32]), *product(SMALLEST, [torch.bfloat16])],
)
def test_every_name_has_the_shapes_and_types_that_timm_expects(name, dtype):
    given = dict(device="meta", dtype=dtype)
    given |= dict(depths=(1, 1, 1, 1)) if name in STAGED else dict(depth=1)
    model = timm.create_model(name, num_classes=7, **given)
    images = torch.zeros(2, 3, *model.img_size, device="meta", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    wide, last = model.num_features, model.info.stages[-1]
    whole = (2, *last.grid, wide) if name in STAGED else (2, last.tokens, wide)
    rows = model.forward_features(images)
    shapes = {
        whole: rows,
        (2, wide): model.forward_head(rows, pre_logits=True),
        (2, 7): model.forward_head(rows),
    }
    assert all(found.shape == shape for shape, found in shapes.items())
    assert {found.dtype for found in shapes.values()} == {dtype}
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert model(images).shape == (2, wide)
    model.reset_classifier(0, "")
    assert model(images).shape == whole
    bare = timm.create_model(name, num_classes=0, global_pool="", **given)
    assert bare(images).shape == whole


@pytest.mark.parametrize("name", FEWER)
def test_every_name_is_a_backbone_of_maps(name):
    model = timm.create_model(name, device="meta", features_only=True, out_indices=(1, 2, -1))
    size = model.pretrained_cfg["input_size"][1:]
    maps = model(torch.zeros(2, 3, *size, device="meta"))
    told = zip(maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    assert len(maps) == 3
    for found, channels, stride in told:
        assert found.shape[:2] == (2, channels)
        assert all(
            s // stride - 1 <= n <= s // stride for n, s in zip(found.shape[2:], size, strict=True)
        )
    with torch.device("meta"):
        every = timm.create_model(name, features_only=True)(maps[0].new_zeros(2, 3, *size))
    assert len(every) == (4 if name in STAGED else 3)


@pytest.mark.parametrize("name", ROWS)
def test_learning_rates_decay_from_block_to_block(name):
    model = build(name, depth=3)
    groups = timm.optim.param_groups_layer_decay(model, 0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    found = {n: scale[id(p)] for n, p in model.named_parameters()}
    assert {value for n, value in found.items() if "head" in n} == {1.0}
    for layer in range(3):
        inside = {value for n, value in found.items() if f"layers.{layer}." in n}
        assert inside == {0.5 ** (3 - layer)}
    rest = {n: value for n, value in found.items() if "layers." not in n and "head" not in n}
    assert max(rest.values()) <= 0.5


@pytest.mark.parametrize("name", [name for name in SIZES if name in STAGED])
def test_learning_rates_decay_from_stage_to_stage_too(name):
    model = build(name)
    groups = timm.optim.param_groups_layer_decay(model, 0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    each = [{scale[id(p)] for p in block.parameters()} for block in model.blocks]
    assert each == [{0.5**depth} for depth in (4, 3, 2, 1)]
    assert {scale[id(p)] for p in model.get_classifier().parameters()} == {1.0}
    first = model.get_submodule(model.first_conv).weight
    assert scale[id(first)] == 0.5**5


@pytest.mark.parametrize(
    ("name", "arguments"),
    [*(("vim_micro", dict(class_token=place)) for place in CLASS_TOKENS), ("plainmamba_micro", {})],
)
def test_a_resized_model_is_one_of_that_size_with_fitted_weights(name, arguments):
    model = build(name, **arguments).requires_grad_(requires_grad=False).eval()
    wanted = build(name, **arguments, img_size=(96, 64)).eval()
    wanted.load_state_dict(wanted.remap(model.state_dict()))
    model.set_input_size(img_size=(96, 64))
    assert model.info == wanted.info
    assert not any(p.requires_grad for p in model.parameters())
    images = torch.randn(2, 3, 96, 64)
    assert torch.equal(model(images), wanted(images))
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 96, 64)
    for wrong, message in ((dict(patch_size=8), "patch_size is 8"), (dict(img_size=65), "is 65")):
        with pytest.raises(ValueError, match=message):
            model.set_input_size(**wrong)
    assert model.info == wanted.info
    assert model.img_size == (96, 64)


@pytest.mark.parametrize("name", [name for name in SIZES if name.endswith(("micro", "nano"))])
def test_timm_loads_a_file_of_weights_and_leaves_a_head_of_other_classes_new(name, tmp_path):
    source, file = build(name), tmp_path / "weights.pth"
    torch.save({"model": source.state_dict()}, file)
    source_of = dict(pretrained=True, pretrained_cfg_overlay={"file": str(file), "num_classes": 7})
    same = build(name, **source_of).eval()
    assert torch.equal(same(IMAGES), source.eval()(IMAGES))
    other = build(name, **source_of | dict(num_classes=3), img_size=(96, 64)).eval()
    assert other(torch.zeros(1, 3, 96, 64)).shape == (1, 3)
    kept, expected = (list(net.blocks[1].parameters()) for net in (other, source))
    assert all(torch.equal(*pair) for pair in zip(kept, expected, strict=True))
