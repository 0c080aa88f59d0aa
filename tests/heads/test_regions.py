"""Suppression of boxes and pooling of regions against formulas in float64, and the detector."""

import math

import pytest
import torch

import fambav
from fambav.heads import Detector, regions
from fambav.timm_compat import timm, torchvision

BACKBONES = ("vssd_nano", "vim_micro")  # of stages, and a stack of equal layers


def random_boxes(count, side, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator) * side
    low, high = corners.amin(1), corners.amax(1)
    return torch.cat([low, high + 0.5], dim=1)


def overlap(one, other):
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_suppression_is_the_greedy_one(threshold):
    boxes, scores = random_boxes(120, 20), torch.rand(120, generator=torch.Generator())
    scores[10:20] = scores[30]  # equal scores
    kept = []
    for n in sorted(range(120), key=lambda n: -float(scores[n])):
        if all(overlap(boxes[n].tolist(), boxes[k].tolist()) <= threshold for k in kept):
            kept.append(n)
    found = regions.nms(boxes, scores, threshold)
    assert found.tolist() == kept and found.dtype == torch.int64
    assert regions.nms(boxes[:0], scores[:0], threshold).tolist() == []


def test_a_chain_of_boxes_in_which_each_suppresses_the_next():
    left = torch.arange(50.0)
    boxes = torch.stack([left, 0 * left, left + 2, 0 * left + 1], dim=1)  # IoU 1/3 of neighbours
    assert regions.nms(boxes, -left, 0.3).tolist() == list(range(0, 50, 2))


def pooled(image, box, cells, scale, ratio):
    """The mean of bilinear values at a grid of points in each cell, (channels, *cells)."""
    channels, height, width = image.shape
    left, top, right, bottom = (float(v) * scale for v in box)
    sides = max(bottom - top, 1.0) / cells[0], max(right - left, 1.0) / cells[1]
    counts = [ratio if ratio > 0 else math.ceil(side) for side in sides]
    out = torch.zeros(channels, *cells, dtype=torch.float64)
    for i in range(cells[0]):
        for j in range(cells[1]):
            for p in range(counts[0]):
                for q in range(counts[1]):
                    y = top + sides[0] * (i + (p + 0.5) / counts[0])
                    x = left + sides[1] * (j + (q + 0.5) / counts[1])
                    if -1 <= y <= height and -1 <= x <= width:
                        out[:, i, j] += bilinear(image, y, x) / math.prod(counts)
    return out


def bilinear(image, y, x):
    y, x = min(max(y, 0), image.shape[1] - 1), min(max(x, 0), image.shape[2] - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, image.shape[1] - 1), min(left + 1, image.shape[2] - 1)
    dy, dx = y - top, x - left
    return (1 - dy) * ((1 - dx) * image[:, top, left] + dx * image[:, top, right]) + dy * (
        (1 - dx) * image[:, bottom, left] + dx * image[:, bottom, right]
    )


@pytest.mark.parametrize("ratio", [2, -1])
@pytest.mark.parametrize("shape", [(2, 3, 6, 9), (2, 3, 1, 1)])
def test_pooled_regions_and_their_gradients_are_those_of_the_formula(ratio, shape, monkeypatch):
    monkeypatch.setattr(regions, "_MOST_POINTS", 40)  # several parts
    torch.manual_seed(0)
    maps = torch.randn(shape, requires_grad=True)
    boxes = torch.cat([torch.tensor([[1.0], [0], [1], [0], [0]]), random_boxes(5, 30)], dim=1)
    boxes[3, 1:] = torch.tensor([-9.0, -9, 50, 50])  # far outside of the map
    boxes[4, 1:] = torch.tensor([3.0, 3, 3.5, 3.5])  # under one cell
    found = regions.roi_align(maps, boxes, (2, 3), 0.25, ratio)
    exact = maps.detach().double().requires_grad_()
    want = torch.stack([pooled(exact[int(b[0])], b[1:], (2, 3), 0.25, ratio) for b in boxes])
    torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=1e-5)
    weight = torch.randn(found.shape)
    (found * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(maps.grad.double(), exact.grad, atol=1e-5, rtol=1e-5)
    assert regions.roi_align(maps, boxes[:0], 7).shape == (0, 3, 7, 7)


@pytest.mark.gpu()  # where torchvision has its own
def test_compiled_operators_agree():
    boxes, scores = random_boxes(200, 20), torch.rand(200)
    assert torch.equal(torchvision.ops.nms(boxes, scores, 0.5), regions.nms(boxes, scores, 0.5))
    maps, areas = torch.randn(1, 3, 9, 9), torch.cat([torch.zeros(200, 1), boxes], dim=1)
    for ratio in (2, -1):
        want = torchvision.ops.roi_align(maps, areas, (2, 3), 0.5, ratio)
        torch.testing.assert_close(regions.roi_align(maps, areas, (2, 3), 0.5, ratio), want)


def targets(count, side=32):
    box = torch.tensor([[2.0, 3, 15, 14], [6, 16, 20, 30], [0, 0, 32, 32]])
    masks = torch.zeros(3, side, side, dtype=torch.uint8)
    masks[:, 8:20, 8:20] = 1
    crowd = torch.tensor([False, False, True])
    return [
        {"boxes": box, "labels": torch.tensor([0, 2, 1]), "crowd": crowd, "masks": masks}
    ] * count


@pytest.mark.parametrize("name", BACKBONES)
def test_a_detector_on_any_backbone_learns_with_all_its_parameters(name):
    torch.manual_seed(0)
    side = 32
    net = Detector(
        timm.create_model(name, img_size=side, drop_path_rate=0.0),
        3,
        head="mask-rcnn",
        channels=8,
        anchor_scale=3.0,
        region_samples=16,
    )
    assert net.num_classes == 3
    images = torch.randn(2, 3, side, side)
    losses = net(images, targets(2))
    assert len(losses) == 5
    sum(losses.values()).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    net.roi_heads.score_thresh = 0.0  # of new weights no box reaches the usual one
    with torch.no_grad():
        found = net.eval()(images)
    for own in found:
        count = len(own["scores"])
        assert 0 < count <= 100 and own["finite"] == 0
        assert own["masks"].shape == (count, side, side) and own["masks"].dtype == torch.bool
        assert own["labels"].min() >= 0 and own["labels"].max() < 3
        assert (own["scores"].diff() <= 0).all()
    weights = net.state_dict()
    again = net.remap(weights)
    assert again.keys() == weights.keys()
    with torch.no_grad():
        net.fpn.layer_blocks[0][0].bias[0] = torch.nan
        assert all(own["finite"].isnan() for own in net(images))


def test_anchors_and_regions_are_in_the_cells_that_the_backbone_makes():
    net = Detector(timm.create_model("vssd_nano", img_size=36), 3, channels=8).eval()
    net(torch.randn(1, 3, 36, 36))
    assert net.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    maps = [torch.zeros(1, 8, side, side) for side in (9, 5, 3, 2, 1)]
    listed = torchvision.models.detection.image_list.ImageList(
        torch.zeros(1, 3, 36, 36), [(36, 36)]
    )
    (anchors,) = net.rpn.anchor_generator(listed, maps)
    centres = [
        [x * stride, y * stride]
        for stride, own in zip((4, 8, 16, 32, 64), maps, strict=True)
        for y in range(own.shape[2])
        for x in range(own.shape[3])
    ]
    assert ((anchors[::3, :2] + anchors[::3, 2:]) / 2).tolist() == centres


def test_reducing_a_detector_reduces_its_backbone():
    net = Detector(timm.create_model("vim_micro", img_size=32), 3, channels=8)
    assert fambav.reduce(net, "tome", "r:1@2") is net
    assert net.backbone.reduction is net.reduction
    assert net.reduction.schedule.removed == 1 and "reduction" not in dict(net.named_children())


def test_unknown_heads_are_refused():
    with pytest.raises(ValueError, match="head is 'yolo', expected one of faster-rcnn, mask-rcnn"):
        Detector(timm.create_model("vssd_nano", img_size=32), 3, head="yolo")


def test_a_backbone_alone_starts_a_detector_and_other_heads_are_refused():
    backbone = timm.create_model("vssd_nano", img_size=32, num_classes=5)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    net = Detector(timm.create_model("vssd_nano", img_size=32), 3, channels=8)
    taken = net.remap(before, head="drop")
    shared = [n for n in taken if n.removeprefix("backbone.") in before]
    assert shared and all(torch.equal(taken[n], before[n[9:]]) for n in shared)
    with pytest.raises(ValueError, match="checkpoint has no roi_heads, expected one of a det"):
        net.remap(before)
    other = Detector(timm.create_model("vssd_nano", img_size=32), 4, channels=8)
    with pytest.raises(ValueError, match="checkpoint has 4 classes, expected 3"):
        net.remap(other.state_dict())
