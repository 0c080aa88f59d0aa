"""Regions of images: suppression of overlapping boxes, and features inside of boxes.

torchvision has compiled operators for both.  A build without them, such as PyPI's beside a CPU
build of torch, gets those of this file, in PyTorch's own operations; where they are, nothing is
changed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fambav.timm_compat import TORCHVISION, torchvision

_MOST_POINTS = 2**20  # of one map that are read at once, to bound the memory


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Leave out boxes that overlap a better one which is kept.

    Boxes are taken from the best score to the lowest, of equal scores the first one first.  A box
    is kept if its intersection over union (IoU) with no kept one is above the threshold.

    Args:
        boxes: (n, 4): left, top, right, bottom.
        scores: (n,).
        iou_threshold: Largest IoU of two that are kept.

    Returns:
        Indices of the kept boxes, the best one first, int64.

    Source: non-maximum suppression as torchvision.ops.nms defines it.
    """
    order = scores.argsort(descending=True, stable=True)
    overlaps = torchvision.ops.box_iou(boxes[order], boxes[order]) > iou_threshold
    better = overlaps.triu(diagonal=1).to(boxes.dtype)  # of each row over the columns behind it
    kept, before = better.new_ones(len(better)), None
    # The first k boxes are decided after k rounds, and nearly always all are after a few.
    while before is None or not torch.equal(kept, before):
        before, kept = kept, (better.T @ kept == 0).to(boxes.dtype)
    return order[kept > 0]


def roi_align(
    input: Tensor,
    boxes: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
) -> Tensor:
    """Return the mean of a map at the points of a grid in each cell of each box.

    Points are read bilinearly.  Those within a cell outside of the map have the value of its
    border, those farther out are 0.  A box is at least one cell of the map wide and high.

    Args:
        input: Maps, (batch, channels, height, width).
        boxes: (n, 5): index of the map, left, top, right, bottom.
        output_size: Cells of a box along height and width.
        spatial_scale: Cells of the map for a unit of the boxes.
        sampling_ratio: Points of a cell along each axis; below 1 as many as keep them at most a
            cell of the map apart.

    Returns:
        (n, channels, *output_size), in the dtype of the maps.

    Source: He et al., "Mask R-CNN", arXiv:1703.06870, as torchvision.ops.roi_align does it without
    `aligned`.
    """
    tall, wide = (output_size, output_size) if isinstance(output_size, int) else output_size
    maps, scaled = input.float(), boxes[:, 1:].float() * spatial_scale
    sides = (scaled[:, 2:] - scaled[:, :2]).clamp(min=1)  # (n, 2): width, height
    cells = sides.new_tensor([wide, tall])
    counts = (sides / cells).ceil().long()
    if sampling_ratio > 0:
        counts = torch.full_like(counts, sampling_ratio)
    places, parts = list[Tensor](), list[Tensor]()
    for across, down in counts.unique(dim=0).tolist():
        alike = (counts == counts.new_tensor([across, down])).all(dim=1)
        for index in boxes[alike, 0].long().unique().tolist():
            chosen = torch.where(alike & (boxes[:, 0] == index))[0]
            for some in chosen.split(max(1, _MOST_POINTS // (tall * down * wide * across))):
                x = _points(scaled[some, 0], sides[some, 0], wide, across)
                y = _points(scaled[some, 1], sides[some, 1], tall, down)
                values = _sample(maps[index], x, y)  # (channels, some, tall * down, wide * across)
                shape = (-1, len(some), tall, down, wide, across)
                parts.append(values.view(shape).mean(dim=(3, 5)).transpose(0, 1))
                places.append(some)
    if not parts:
        return input.new_zeros(0, maps.shape[1], tall, wide)
    return torch.cat(parts)[torch.cat(places).argsort()].to(input.dtype)


def _points(start: Tensor, side: Tensor, cells: int, each: int) -> Tensor:
    """Return the middles of equal parts of boxes along one axis, (n, cells * each)."""
    places = (torch.arange(cells * each, device=side.device) + 0.5) / (cells * each)
    return start[:, None] + side[:, None] * places


def _sample(image: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Read a map, (channels, height, width), at x, (n, w), and y, (n, h): (channels, n, h, w)."""
    height, width = image.shape[1:]
    inside = ((y >= -1) & (y <= height))[:, :, None] & ((x >= -1) & (x <= width))[:, None]
    # grid_sample counts from -1 in the middle of the first cell to 1 in that of the last.
    x, y = (2 * p / max(n - 1, 1) - 1 for p, n in ((x, width), (y, height)))
    grid = torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), dim=-1)
    values = F.grid_sample(
        image[None], grid.flatten(0, 1)[None], padding_mode="border", align_corners=True
    )
    return values[0].view(-1, *inside.shape) * inside


def fill_in_operators() -> None:
    """Let torchvision's detection use what is here, where its compiled operators are missing."""
    if TORCHVISION == "shimmed":
        torchvision.ops.boxes.nms = nms
        for user in (torchvision.ops.poolers, torchvision.models.detection.roi_heads):
            user.roi_align = roi_align
