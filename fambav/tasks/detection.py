"""Detection of objects: boxes with classes and perhaps masks, scored by average precision (AP).

AP is that of COCO: objects are matched from the best score down, precision is read at 101 recalls,
and its mean is over classes and, for `ap`, over ten thresholds of the intersection over union.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, product, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fambav.registry import TASKS
from fambav.tasks import Loss, Meter, Metric, Statistics, Task

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor, nn

    from fambav.config import Config

Arrays = dict[str, "NDArray[Any]"]
IOU_THRESHOLDS = tuple(n / 100 for n in range(50, 100, 5))
_RECALLS = 101
_SHOWN = 0.5  # least score of a box that is drawn
_FALSE_POSITIVE, _TRUE_POSITIVE, _IGNORED = range(3)


class Detection(Task):
    """Each image has objects of several classes, or none.

    A model returns for each image `boxes`, `labels`, `scores` and perhaps `masks`, as
    `fambav.heads.Detector` does; while training it reads the targets too, and returns losses by
    name.
    """

    hub = "object-detection"
    pictures = ("boxes",)
    guided = True
    exported = False
    metrics = (
        Metric("ap", "AP", "%", "box AP", higher_is_better=True, hub="mean_average_precision"),
        Metric("ap50", "AP50", "%", "box AP at IoU 0.5", higher_is_better=True),
        Metric("ap75", "AP75", "%", "box AP at IoU 0.75", higher_is_better=True),
    )

    @staticmethod
    def collate(samples: Sequence[Any]) -> Any:
        """Return images as one tensor, and their targets as a list."""
        from fambav.data.instances import stacked

        return stacked(samples)

    def train_transform(
        self, config: Config, statistics: Statistics, input_size: tuple[int, int]
    ) -> Any:
        """Return what resizes, mirrors and recolours an image with its boxes and masks."""
        from fambav.data.instances import BoxTransform

        masks = config.model.head == "mask-rcnn"
        return BoxTransform(input_size, statistics, masks=masks, augment=config.augment)

    def eval_transform(
        self, config: Config, statistics: Statistics, input_size: tuple[int, int]
    ) -> Any:
        """Return what resizes an image and normalises it."""
        from fambav.data.instances import BoxTransform

        return BoxTransform(input_size, statistics, masks=config.model.head == "mask-rcnn")

    def loss(self, config: Config, *, mixed: bool) -> Loss:
        """Return the sum of the model's losses."""

        def loss(outputs: Any, targets: Any) -> Tensor:
            first, *others = outputs.values()
            total: Tensor = sum(others, first)
            return total

        return loss

    def meter(self, num_classes: int, device: torch.device) -> Meter:
        """Return an empty meter of AP."""
        return AveragePrecision(num_classes, device)

    def input_lines(self, known: Mapping[str, Any]) -> tuple[str, ...]:
        """Return lines on images and classes."""
        mean, std = (", ".join(f"{v:.4g}" for v in known[name]) for name in ("mean", "std"))
        size = " x ".join(map(str, known["input_size"][1:]))
        return (
            f"- images: of any size, resized to lie within {size}, mean {mean}, standard deviation"
            f" {std}",
            f"- classes: {known['num_classes']} of objects",
        )

    def answer(
        self,
        image: Image.Image,
        net: nn.Module,
        outputs_of: Callable[[Image.Image], Tensor],
        names: Sequence[str],
        *,
        file: Path,
        topk: int | None = None,
        folder: Path | None = None,
    ) -> list[str]:
        """Write FILE_boxes.json, with all boxes, and FILE_boxes.png, with those of score 0.5 up.

        Boxes are left, top, right and bottom in pixels of the image; masks are lengths of runs,
        outside and inside in turn, down each column, as COCO has them.
        """
        if topk is not None:
            raise ValueError(f"topk is {topk}, expected none: all boxes of an image are written")
        if folder is None:
            raise ValueError("output_dir is None, expected a folder for the boxes")
        known = on_image(image, net, outputs_of)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [_row(known, n, names) for n in range(len(known["labels"]))]
        written = [folder / f"{file.stem}_boxes{ending}" for ending in (".json", ".png")]
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
        written[0].write_text(text, encoding="utf-8")
        picture(image, known, names).save(written[1])
        lines = [f"  {100 * r['score']:5.1f}%  {r['label']}  {r['box']}" for r in rows]
        shown = [line for line, r in zip(lines, rows, strict=True) if r["score"] >= _SHOWN]
        return [*shown, *(f"  written: {path}" for path in written)]


TASKS.register("detection")(Detection())


class Matched(NamedTuple):
    """The detections of an image and what each of them matches.

    Attributes:
        scores, labels: (detections,), best scores first.
        state: (thresholds, detections): false positive, true positive or ignored.
        known: (classes,), objects that count, which crowds do not.
    """

    scores: NDArray[Any]
    labels: NDArray[Any]
    state: NDArray[Any]
    known: NDArray[Any]


class AveragePrecision(Meter):
    """The detections of all images, matched image by image; AP needs all of their scores.

    Args:
        num_classes: Classes of objects.
        device: Where the sums are kept.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        super().__init__(1, device)
        self.num_classes = num_classes
        self.images: list[dict[str, Matched]] = []  # by what is compared, box or mask

    def batch_sums(self, outputs: Any, targets: Any) -> Tensor:
        """Match the detections of a batch, and return the sum of their `finite`; (1,), float64."""
        import torch

        for output, target in zip(outputs, targets, strict=True):
            own = {name: value.cpu().numpy() for name, value in output.items()}
            truth = {name: value.cpu().numpy() for name, value in target.items()}
            overlaps = {"box": box_iou(own["boxes"], truth["boxes"], truth["crowd"])}
            if "masks" in own:
                both = own["masks"], truth["masks"].astype(bool)
                overlaps["mask"] = mask_iou(*both, truth["crowd"])
            made, known = (own["scores"], own["labels"]), (truth["labels"], truth["crowd"])
            self.images.append(
                {k: matched(iou, made, known, self.num_classes) for k, iou in overlaps.items()}
            )
        return torch.stack([output["finite"].double() for output in outputs]).sum()[None]

    def share(self, gather: Callable[[Any], list[Any]]) -> None:
        """Bring the images of all processes together, in their order in the data set."""
        rows = zip_longest(*gather(self.images))
        self.images = [image for row in rows for image in row if image is not None]

    def metrics(self, sums: Tensor, samples: int) -> dict[str, float]:
        """Return AP over all thresholds, at 0.5 and at 0.75, in percent, of boxes and of masks.

        The mean is over the classes that there are objects of; without any it is 0.
        """
        scores: dict[str, float] = {}
        for kind in self.images[0]:
            table = average_precision([image[kind] for image in self.images])
            prefix = "" if kind == "box" else f"{kind}_"
            columns = {"ap": table, "ap50": table[:1], "ap75": table[5:6]}
            for name, values in columns.items():
                scores[f"{prefix}{name}"] = 100 * float(values.mean()) if values.size else 0.0
        return scores


def box_iou(
    boxes: NDArray[Any], others: NDArray[Any], crowd: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return the intersection over union (IoU) of boxes, (n, 4), and known ones, (m, 4): (n, m).

    With a crowd, whose outline nobody can hit, it is the share of the box that lies inside.
    """
    import numpy as np

    boxes, others = boxes.astype(np.float64), others.astype(np.float64)
    low = np.maximum(boxes[:, None, :2], others[:, :2])
    high = np.minimum(boxes[:, None, 2:], others[:, 2:])
    both = (high - low).clip(min=0).prod(axis=2)
    areas, known = ((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (boxes, others))
    return _shares(both, areas, known, crowd)


def mask_iou(
    masks: NDArray[np.bool_], others: NDArray[np.bool_], crowd: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return the same of pixels, (n, height, width) and (m, height, width)."""
    import numpy as np

    pixels = masks.shape[1] * masks.shape[2]
    flat, known = (m.reshape(len(m), pixels).astype(np.float32) for m in (masks, others))
    both = (flat @ known.T).astype(np.float64)  # whole numbers, exact below 2^24 pixels
    return _shares(both, flat.sum(axis=1), known.sum(axis=1), crowd)


def _shares(
    both: NDArray[Any], areas: NDArray[Any], known: NDArray[Any], crowd: NDArray[np.bool_]
) -> NDArray[np.float64]:
    import numpy as np

    union = np.where(crowd, areas[:, None], areas[:, None] + known - both)
    shares: NDArray[np.float64] = np.where(union > 0, both / np.where(union > 0, union, 1), 0.0)
    return shares


def matched(
    overlaps: NDArray[np.float64],
    detections: tuple[NDArray[Any], NDArray[Any]],
    known: tuple[NDArray[Any], NDArray[Any]],
    num_classes: int,
) -> Matched:
    """Match the detections of an image, at each threshold, with objects of their class.

    From the best score down, a detection takes the object of the largest overlap that is left; if
    there is none, a crowd, which any number may take, makes it ignored.

    Args:
        overlaps: (detections, objects).
        detections: Scores and labels, (detections,).
        known: Labels and whether it is a crowd, (objects,).
        num_classes: Number of classes.
    """
    import numpy as np

    (scores, labels), (truth, crowd) = detections, known
    order = np.argsort(-scores, kind="stable")
    scores, labels, overlaps = scores[order], labels[order], overlaps[order]
    least = np.array(IOU_THRESHOLDS)[:, None]
    free = np.ones((len(IOU_THRESHOLDS), len(truth)), dtype=bool)
    state = np.full((len(IOU_THRESHOLDS), len(scores)), _FALSE_POSITIVE, dtype=np.uint8)
    rows = np.arange(len(IOU_THRESHOLDS))
    for n, label in enumerate(labels):
        fits = (overlaps[n] >= least) & (truth == label)
        single = fits & free & ~crowd
        if not fits.any():
            continue
        ranks = np.where(single, overlaps[n], -1.0)
        best = len(truth) - 1 - ranks[:, ::-1].argmax(axis=1)  # of equal ones the last
        taken = single.any(axis=1)
        state[:, n] = np.where((fits & crowd).any(axis=1), _IGNORED, _FALSE_POSITIVE)
        state[taken, n] = _TRUE_POSITIVE
        free[rows[taken], best[taken]] = False
    counts = np.bincount(truth[~crowd], minlength=num_classes)
    return Matched(scores, labels, state, counts)


def average_precision(images: Sequence[Matched]) -> NDArray[np.float64]:
    """Return AP from 0 to 1, (thresholds, classes that there are objects of).

    Of detections with equal scores, those of earlier images come first.

    Source: Lin et al., "Microsoft COCO", arXiv:1405.0312, as pycocotools computes it, for boxes of
    all areas.
    """
    import numpy as np

    known = np.sum([image.known for image in images], axis=0)
    scores, labels = (np.concatenate([i[n] for i in images]) for n in range(2))
    state = np.concatenate([image.state for image in images], axis=1)
    order = np.argsort(-scores, kind="stable")
    labels, state = labels[order], state[:, order]
    table = np.zeros((len(IOU_THRESHOLDS), len(known)))
    for row, label in product(range(len(table)), np.flatnonzero(known)):
        own = state[row, labels == label]
        own = own[own != _IGNORED]
        hits = np.cumsum(own == _TRUE_POSITIVE)
        precision = hits / np.arange(1, len(own) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(hits / known[label], np.linspace(0, 1, _RECALLS))
        table[row, label] = np.append(precision, 0.0)[at].mean()  # 0 where a recall is not reached
    return table[:, known > 0]


def on_image(
    image: Image.Image, net: nn.Module, outputs_of: Callable[[Image.Image], Tensor]
) -> Arrays:
    """Return what a model finds, in pixels of the image: boxes, labels, scores, perhaps masks.

    Args:
        image: In RGB.
        net: The model, which has an `img_size`.
        outputs_of: Its outputs for an image.
    """
    import numpy as np
    from PIL import Image as Pictures

    from fambav.data.instances import fitted

    sides = (image.height, image.width)
    height, width = fitted(sides, net.img_size)  # type: ignore[arg-type]  # of a detector
    known: Arrays = {n: v.cpu().numpy() for n, v in outputs_of(image)[0].items()}  # type: ignore[attr-defined]
    scale = np.array([image.width / width, image.height / height] * 2)
    known["boxes"] = (known["boxes"] * scale).clip(0, [image.width, image.height] * 2)
    if "masks" in known:
        inner = (Pictures.fromarray(mask[:height, :width]) for mask in known["masks"])
        resized = [np.asarray(mask.resize(image.size)) for mask in inner]
        known["masks"] = np.array(resized, dtype=bool).reshape(-1, *sides)
    return known


def picture(image: Image.Image, known: Arrays, names: Sequence[str]) -> Image.Image:
    """Draw what `on_image` returns, from a score of 0.5 up, over the image."""
    from fambav.data.instances import drawn

    shown = known.get("scores", known["labels"] * 0 + 1) >= _SHOWN
    part = {name: known[name][shown] for name in known if name != "finite"}
    texts = [names[label] for label in part["labels"]]
    if "scores" in part:
        texts = [f"{t} {100 * s:.0f}" for t, s in zip(texts, part["scores"], strict=True)]
    return drawn(image, part["boxes"], part["labels"].tolist(), texts, part.get("masks"))


def _row(known: Arrays, n: int, names: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "label": names[known["labels"][n]],
        "score": round(float(known["scores"][n]), 4),
        "box": [round(float(v), 1) for v in known["boxes"][n]],
    }
    if "masks" in known:
        mask = known["masks"][n]
        runs = [len(list(run)) for _, run in groupby(mask.T.ravel().tolist())]
        row["mask"] = {"size": list(mask.shape), "counts": [0] * bool(mask[0, 0]) + runs}
    return row
