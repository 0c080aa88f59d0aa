"""Heads on backbones' maps: published names and counts, and a second implementation."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fambav.models  # noqa: F401  registers the models
from fambav import flops
from fambav.config import Config
from fambav.heads import FCNHead, SegmentationModel, UPerHead
from fambav.timm_compat import timm


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("widths", "head", "auxiliary"),
    [
        ((48, 96, 192, 384), 28_769_430, 481_430),
        ((64, 128, 256, 512), 29_678_742, 628_886),
        ((96, 192, 384, 768), 31_497_366, 923_798),
        ((128, 256, 512, 1024), 33_315_990, 1_218_710),
        ((64, 128, 348, 448), 29_299_862, 840_854),
    ],
)
def test_parameters_are_those_of_mmsegmentation(widths, head, auxiliary):
    with torch.device("meta"):
        assert parameters(UPerHead(widths, 150)) == head
        assert parameters(FCNHead(widths[2], 150)) == auxiliary


def test_names_are_those_of_mmsegmentation():
    backbone = timm.create_model("vmamba_nano", features_only=True, out_norms=True)
    model = SegmentationModel(backbone, 3, channels=8)
    names = [n for n, _ in model.named_parameters() if not n.startswith("backbone.")]
    parts = ("conv.weight", "bn.weight", "bn.bias")

    def convs(prefix):
        return [f"{prefix}.{part}" for part in parts]

    last = ("conv_seg.weight", "conv_seg.bias")
    expected = [f"decode_head.{name}" for name in last]
    for prefix, number in (("psp_modules.{}.1", 4), ("bottleneck", 1), ("lateral_convs.{}", 3)):
        expected += [
            name for n in range(number) for name in convs("decode_head." + prefix.format(n))
        ]
    for prefix, number in (("fpn_convs.{}", 3), ("fpn_bottleneck", 1)):
        expected += [
            name for n in range(number) for name in convs("decode_head." + prefix.format(n))
        ]
    expected += [f"auxiliary_head.{name}" for name in last] + convs("auxiliary_head.convs.0")
    assert names == expected


def plain(head, maps):
    """The logits of UPerHead, from its weights alone."""
    state = head.state_dict()

    def conv(name, x):
        weight = state[f"{name}.conv.weight"]
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        norm = ("running_mean", "running_var", "weight", "bias")
        return F.relu(F.batch_norm(x, *(state[f"{name}.bn.{part}"] for part in norm)))

    def to(x, like):
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)

    last = maps[3]
    pooled = [
        to(conv(f"psp_modules.{n}.1", F.adaptive_avg_pool2d(last, side)), last)
        for n, side in enumerate((1, 2, 3, 6))
    ]
    d = conv("bottleneck", torch.cat([last, *pooled], 1))
    a, b, c = (conv(f"lateral_convs.{n}", maps[n]) for n in range(3))
    c = c + to(d, c)
    b = b + to(c, b)
    a = a + to(b, a)
    a, b, c = (conv(f"fpn_convs.{n}", x) for n, x in enumerate((a, b, c)))
    x = conv("fpn_bottleneck", torch.cat([a, to(b, a), to(c, a), to(d, a)], 1))
    return F.conv2d(x, state["conv_seg.weight"], state["conv_seg.bias"])


def test_logits_are_those_of_a_second_implementation():
    torch.manual_seed(0)
    widths = (4, 6, 8, 10)
    head = UPerHead(widths, 5, channels=7).eval()
    for name, value in head.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "var" in name else torch.randn_like(value))
    sides = ((18, 26), (9, 13), (5, 7), (3, 4))
    maps = [torch.randn(2, width, *side) for width, side in zip(widths, sides, strict=True)]
    found, expected = head(maps), plain(head, maps)
    assert found.shape == (2, 5, 18, 26)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vmamba_nano", "vim_micro", "vmunet_nano"])
def test_every_backbone_of_maps_takes_the_heads(name):
    backbone = timm.create_model(name, features_only=True)
    model = SegmentationModel(backbone, 4, channels=8)
    batch = torch.randn(2, 3, 32, 32)
    logits, auxiliary = model(batch)
    assert logits.shape == auxiliary.shape == (2, 4, 32, 32)
    (logits.square().sum() + auxiliary.square().sum()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert model.eval()(batch).shape == (2, 4, 32, 32)


def test_training_drops_whole_channels_before_the_last_layer():
    head = FCNHead(4, 3, channels=64, drop_rate=0.5)
    x = torch.ones(1, 64, 2, 2)
    dropped = head.drop(x)
    assert {0.0, 2.0} == {*dropped.unique().tolist()}
    assert torch.equal(dropped, dropped[..., :1, :1].expand_as(x))
    assert torch.equal(head.eval().drop(x), x)


def test_a_wrong_argument_is_refused_in_a_sentence():
    for arguments, message in (
        (((8,), 3), r"in_channels are \[8\], expected two maps or more"),
        (((8, 16), 0), "num_classes is 0, expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            UPerHead(*arguments)


@pytest.mark.parametrize(("name", "published"), [("vmamba_tiny_s1l8", 949)])
def test_operations_are_the_published_ones(name, published):
    """As the authors' table has them, at 512 x 2048 pixels."""
    config = Config.from_flat(
        {"model": name, "data_set": "ADE20K", "crop_size": [512, 2048], "auxiliary_weight": 0}
    )
    report = flops.count_config(config)
    assert report.total.literature / 1e9 == pytest.approx(published, rel=2e-3)
    assert report.num_classes == 150
    classifier = flops.count_config(Config.from_flat({"model": name, "input_size": [512, 2048]}))
    assert report.rows[:-1] == classifier.rows[:-1]


def test_a_head_costs_the_products_that_it_makes():
    head, grids = UPerHead((4, 6, 8, 10), 5, channels=7), ((8, 12), (4, 6), (2, 3), (1, 2))
    maps = [torch.randn(1, c, *side) for c, side in zip((4, 6, 8, 10), grids, strict=True)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        head.eval()(maps)
    assert 2 * head.cost(grids).multiply_adds == counter.get_total_flops()
    fcn = FCNHead(6, 5, channels=7)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fcn.eval()(maps[1])
    assert 2 * fcn.cost(grids[:2]).multiply_adds == counter.get_total_flops()
