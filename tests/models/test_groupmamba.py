"""GroupMamba's numbers, names and heads, its grouped scan, and what it refuses."""

import zlib
from functools import partial

import pytest
import torch

from fambav import flops
from fambav.layers.group_mamba import GroupMambaMixer as Mixer
from fambav.layers.ss2d import scan_groups
from fambav.models import GroupMamba
from fambav.timm_compat import timm
from tests import golden
from tests.golden import fill, images, wave, wave_images
from tests.identical import same_gradients_when_checkpointed
from tests.models.test_golden import check_gradients, near

ARRAYS, CASES = golden.load("groupmamba")


def small(**arguments):
    torch.manual_seed(0)
    known = dict(dims=(16, 24, 32, 48), depths=(1, 1, 2, 1), ratios=(2, 2, 2, 2), stem=8)
    return GroupMamba(**{**known, "img_size": 64, "num_classes": 5, **arguments})


def built(name, **arguments):
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def test_logits_and_gradients_agree_with_the_official_code():
    case = CASES["square"]
    model, batch = fill(GroupMamba(**case["arguments"])), images(case["image_keys"], *case["size"])
    near(model(batch), ARRAYS["square/logits"], 3e-5)
    check_gradients(ARRAYS, case, "square", model, batch)
    assert sum(p.numel() for p in model.parameters()) == case["params"]


@torch.no_grad()
def test_published_widths_agree_with_the_official_code():
    model, batch = fill(timm.create_model("groupmamba_tiny"), wave), wave_images(2, 64, 96)
    x, maps = model.forward_intermediates(batch, output_fmt="NHWC")
    near(model.forward_head(x), ARRAYS["tiny/logits"], 2e-3)
    near(model.forward_head(x, pre_logits=True), ARRAYS["tiny/feature"], 1e-3)
    for stage, each in enumerate(maps, 1):
        near(each[..., :4].flatten(1, 2), ARRAYS[f"tiny/stage{stage}"], 1e-3)


def test_the_mixer_by_itself_agrees_with_the_official_code():
    mixer = fill(Mixer(64), wave)
    x = (0.3 * torch.arange(2 * 5 * 7 * 64, dtype=torch.float64)).sin().float().view(2, 5, 7, 64)
    near(mixer(x).flatten(1, 2), ARRAYS["mixer/out"], 1e-5)


@pytest.mark.parametrize(
    ("name", "parameters", "of_head", "literature", "products"),
    [
        ("groupmamba_tiny", 23_361_917, 449_000, 4.7058, 4.6491),
        ("groupmamba_small", 34_781_555, 513_000, 7.2810, 7.2072),
        ("groupmamba_base", 57_150_838, 513_000, 14.1865, 14.0673),
    ],
)
def test_names_parameters_and_operations_are_the_published_ones(
    name, parameters, of_head, literature, products
):
    model, plain = built(name), built(name, distillation=False)
    state = model.state_dict().items()
    found = [f"{key}\t{tuple(value.shape)}\t{str(value.dtype)[6:]}" for key, value in state]
    assert zlib.crc32("\n".join(found).encode()) == CASES["keys"][name]
    assert list(plain.state_dict()) == list(model.state_dict())[:-2]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in plain.parameters()) == parameters - of_head
    total = flops.count(model).total
    assert round(total.literature / 1e9, 4) == literature
    assert round(total.multiply_adds / 1e9, 4) == products


def test_nano_is_small():
    assert sum(p.numel() for p in built("groupmamba_nano").parameters()) < 1_500_000


def test_one_scan_of_all_groups_is_that_of_each():
    mixer = fill(Mixer(4 * 87))
    x = torch.randn(2, 3, 5, 4 * 87)
    each = [own(part) for own, part in zip(mixer.mixers, x.chunk(4, dim=3), strict=True)]
    near(scan_groups(mixer.mixers, x), torch.cat(each, dim=3), 5e-6)


def test_gradients_are_those_of_the_forward_pass_where_maps_are_not_square():
    mixer = fill(Mixer(16)).double()
    names, weights = zip(*mixer.named_parameters(), strict=True)

    def mix(x, *values):
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(1, 2, 3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mix, (x, *weights), fast_mode=True)


def test_every_size_of_an_image_gives_the_maps_that_the_model_describes():
    for size in ((32, 32), (70, 102)):
        model = small(img_size=size).eval()
        maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
        stages = model.info.stages
        assert [tuple(x.shape[2:]) for x in maps] == [stage.grid for stage in stages]
        assert [x.shape[1] for x in maps] == [stage.width for stage in stages]


def test_both_heads_are_returned_in_distilled_training_and_else_their_mean():
    model, batch = small(), torch.randn(2, 3, 32, 48)
    one, other = (
        head(model.forward_head(model.forward_features(batch), pre_logits=True))
        for head in (model.head, model.dist_head)
    )
    near(model(batch), (one + other) / 2, 1e-6)
    model.set_distilled_training()
    for found, expected in zip(model(batch), (one, other), strict=True):
        near(found, expected, 1e-6)
    assert model.eval()(batch).shape == (2, 5)
    with pytest.raises(ValueError, match="distillation is False, expected True"):
        small(distillation=False).set_distilled_training()


def test_both_heads_are_replaced_together():
    model, file = small(num_classes=3), {"model": small().state_dict()}
    weights = model.remap(file, head="drop")
    assert torch.equal(weights["dist_head.weight"], model.dist_head.weight)
    assert torch.equal(weights["norm4.weight"], file["model"]["norm4.weight"])
    model.reset_classifier(7)
    assert model.dist_head.out_features == model.head.out_features == 7
    with pytest.raises(ValueError, match=r"lacks 2 weights such as dist_head\.bias"):
        small().remap(small(distillation=False).state_dict())


def test_feature_maps_need_no_class_block():
    part = timm.create_model("groupmamba_nano", features_only=True, out_indices=(0, 2))
    sum(x.square().sum() for x in part(torch.randn(2, 3, 32, 64))).backward()
    assert [n for n, p in part.named_parameters() if p.grad is None] == []
    rest = {name.split(".")[1] for name, _ in part.named_parameters()}
    assert not {"post_network", "head", "dist_head", "block4", "patch_embed4"} & rest


def test_what_is_between_blocks_is_grouped_with_the_one_behind_it():
    model = small()
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    for part, block in (
        ("norm1.bias", "block2.0.norm2.bias"),
        ("patch_embed2.norm.bias", "block2.0.norm2.bias"),
        ("post_network.0.norm1.bias", "block4.0.norm2.bias"),
        ("norm4.bias", "block4.0.norm2.bias"),
    ):
        assert groups[part] == groups[block]


def test_checkpointing_changes_no_gradient():
    build = partial(small, drop_path_rate=0.5, drop_rate=0.2)
    same_gradients_when_checkpointed(build, torch.ones(2, 3, 32, 48))


def test_low_precision_is_finite_and_close():
    model, batch = small().eval(), torch.randn(2, 3, 64, 64)
    exact = model(batch)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            near(model(batch).float(), exact, 0.05 * exact.abs().max().item())
        assert small().to(dtype).eval()(batch.to(dtype)).isfinite().all()


def test_a_wrong_argument_is_refused_in_a_sentence():
    for arguments, message in (
        (dict(dims=(32, 64, 96)), r"dims are \[32, 64, 96\] and ratios \[4, 4, 4, 4\]"),
        (dict(dims=(32, 64, 90, 128)), "dim is 90, expected a multiple of 4 of at least 16"),
        (dict(dims=(8, 64, 96, 128)), "dim is 8, expected a multiple of 4"),
        (dict(img_size=31), "img_size is 31 x 31, expected sides of at least 32"),
    ):
        with pytest.raises(ValueError, match=message):
            timm.create_model("groupmamba_nano", **arguments)
