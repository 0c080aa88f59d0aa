"""Semantic segmentation: a class for each pixel, scored by intersections over unions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fambav.registry import TASKS
from fambav.table import Table
from fambav.tasks import ClassMeter, Loss, Metric, Statistics, Task

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor, nn

    from fambav.config import Config

IGNORE = 255  # label of pixels that neither teach nor count, as `fambav.data.types` has it
_SMOOTH = 1e-5  # of Dice, which is 0 / 0 for a class that is neither there nor predicted


class Segmentation(Task):
    """Each pixel has one of several classes, or none.

    A model returns logits, (batch, classes, height, width), of any size; they are resized
    bilinearly to the labels', (batch, height, width), int64.  While training it may return those of
    an auxiliary head too, whose loss has the weight of --auxiliary-weight.
    """

    hub = "image-segmentation"
    tags = ("semantic-segmentation",)
    pictures = ("masks",)
    metrics = (
        Metric("miou", "mIoU", "%", "mean IoU", higher_is_better=True, hub="mean_iou"),
        Metric("oa", "OA", "%", "overall accuracy", higher_is_better=True, hub="accuracy"),
        Metric("mf1", "mF1", "%", "mean F1", higher_is_better=True, hub="f1"),
    )

    def train_transform(
        self, config: Config, statistics: Statistics, input_size: tuple[int, int]
    ) -> Any:
        """Return what resizes, crops, mirrors and recolours an image and its mask."""
        from fambav.data.masks import TrainMasks

        return TrainMasks(config.augment, input_size, statistics)

    def eval_transform(
        self, config: Config, statistics: Statistics, input_size: tuple[int, int]
    ) -> Any:
        """Return what normalises an image, whole and in its own size."""
        from fambav.data.masks import EvalMasks

        return EvalMasks(statistics)

    def inference(self, config: Config, net: nn.Module, input_size: tuple[int, int]) -> nn.Module:
        """Return the model on windows that slide over an image of any size."""
        from fambav.layers.sliding import SlidingWindow

        wanted = config.data
        return SlidingWindow(
            net,
            window=input_size,
            overlap=wanted.window_overlap,
            scales=wanted.eval_scales,
            flip=wanted.eval_flip,
        )

    def loss(self, config: Config, *, mixed: bool) -> Loss:
        """Return cross-entropy, Dice or their sum, by --mask-loss, of each head."""
        parts = [_LOSSES[name] for name in config.optim.mask_loss.split("+")]
        second = config.model.auxiliary_weight

        def of_head(logits: Tensor, labels: Tensor) -> Tensor:
            resized = at_size(logits, labels)
            return sum((part(resized, labels) for part in parts[1:]), parts[0](resized, labels))

        def loss(outputs: Tensor | tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
            if not isinstance(outputs, tuple):
                return of_head(outputs, labels)
            logits, auxiliary = outputs
            return of_head(logits, labels) + second * of_head(auxiliary, labels)

        return loss

    def meter(self, num_classes: int, device: torch.device) -> ClassMeter:
        """Return an empty confusion matrix of pixels."""
        return Pixels(1, num_classes, device)

    def class_meter(self, num_classes: int, device: torch.device) -> ClassMeter:
        """Return the same."""
        return self.meter(num_classes, device)

    def input_lines(self, known: Mapping[str, Any]) -> tuple[str, ...]:
        """Return lines on images and classes."""
        mean, std = (", ".join(f"{v:.4g}" for v in known[name]) for name in ("mean", "std"))
        window = " x ".join(map(str, known["input_size"]))
        return (
            f"- images: of any size, in windows of {window}, mean {mean}, standard deviation {std}",
            f"- classes: {known['num_classes']} of pixels",
        )

    def preprocessing(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """Return how an image becomes what a model reads."""
        return {
            "do_resize": False,
            "do_rescale": True,
            "do_normalize": True,
            "image_mean": list(known["mean"]),
            "image_std": list(known["std"]),
        }

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
        """Write FILE_mask.png, with a class's number in each pixel, and FILE_overlay.png."""
        from fambav.data.palette import overlay, palette_image

        if topk is not None:
            raise ValueError(f"topk is {topk}, expected none: a mask has one class for each pixel")
        if folder is None:
            raise ValueError("output_dir is None, expected a folder for the masks")
        mask = predicted_mask(image, net, outputs_of)
        folder.mkdir(parents=True, exist_ok=True)
        written = {"mask": palette_image(mask), "overlay": overlay(image, mask)}
        for kind, picture in written.items():
            picture.save(folder / f"{file.stem}_{kind}.png")
        shares = [(float((mask == label).mean()), name) for label, name in enumerate(names)]
        lines = [f"  {100 * share:5.1f}%  {name}" for share, name in sorted(shares)[::-1] if share]
        return [*lines, *(f"  written: {folder / f'{file.stem}_{kind}.png'}" for kind in written)]


TASKS.register("segmentation")(Segmentation())


class Pixels(ClassMeter):
    """The confusion matrix of all labelled pixels, after the sum of the images' mean losses.

    Its numbers are whole, so that shares of several processes add up to it exactly.
    """

    def batch_sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sums of logits and labels; (1 + classes^2,), float64."""
        import torch
        import torch.nn.functional as F

        logits = at_size(outputs, targets)
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none").flatten(1)
        labelled = targets != IGNORE
        loss = losses.double().sum(dim=1) / labelled.flatten(1).sum(dim=1).clamp(min=1)
        loss = loss.masked_fill(~logits.flatten(1).isfinite().all(dim=1), torch.nan)
        cells = targets[labelled] * self.num_classes + logits.argmax(dim=1)[labelled]
        counts = torch.bincount(cells, minlength=self.num_classes**2)
        return torch.cat([loss.sum()[None], counts.double()])

    def metrics(self, sums: Tensor, samples: int) -> dict[str, float]:
        """Return the mean loss in nats, and metrics in percent.

        Means are over the classes that are there or were predicted, without those of `unscored`;
        the overall accuracy is of all labelled pixels.
        """
        counts = sums[1:].long().view(self.num_classes, -1)
        shares = class_shares(counts)
        scored = [s for label, s in enumerate(shares) if s and label not in self.unscored]
        total, right = int(counts.sum()), int(counts.diagonal().sum())
        return {
            "loss": float(sums[0]) / samples,
            "miou": 100 * _mean([iou for iou, _, _, _ in scored]),
            "oa": 100 * right / total if total else 0.0,
            "mf1": 100 * _mean([f1 for _, f1, _, _ in scored]),
        }

    def table(self, names: Sequence[str]) -> Table:
        """Return IoU, F1, precision and recall of each class."""
        counts = self.confusion()
        rows = []
        for label, shares in enumerate(class_shares(counts)):
            if shares:
                name = names[label] + (" (not in the means)" if label in self.unscored else "")
                figures = [f"{100 * share:.1f}" for share in shares]
                rows.append((shares[0], [name, str(int(counts[label].sum())), *figures]))
        rows.sort(key=lambda row: row[0])
        return Table(
            head=("class", "pixels", "IoU %", "F1 %", "precision %", "recall %"),
            rows=[cells for _, cells in rows],
            names=1,
        )

    def describe(
        self, outputs: Tensor, targets: Tensor, names: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return mean IoU, accuracy and number of labelled pixels of each image."""
        described = []
        for logits, labels in zip(outputs, targets, strict=True):
            own = Pixels(1, self.num_classes, logits.device)
            own.unscored = self.unscored
            own.update(logits[None], labels[None])
            metrics = own.scores().metrics
            described.append(
                {
                    "pixels": int(own.confusion().sum()),
                    "miou": f"{metrics['miou']:.6g}",
                    "oa": f"{metrics['oa']:.6g}",
                }
            )
        return described


def predicted_mask(
    image: Image.Image, net: nn.Module, outputs_of: Callable[[Image.Image], Tensor]
) -> NDArray[np.uint8]:
    """Return the likeliest class of each pixel, (height, width), tile by tile.

    Memory beside image and mask is that of a tile, whatever the size of the image.

    Args:
        image: In RGB.
        net: A `SlidingWindow`.
        outputs_of: Its logits for an image, (1, classes, height, width).
    """
    import numpy as np

    from fambav.layers.sliding import SlidingWindow

    mask = np.empty(image.size[::-1], dtype=np.uint8)
    for outer, inner in cast(SlidingWindow, net).tiles((image.height, image.width)):
        top, left, bottom, right = outer
        labels = outputs_of(image.crop((left, top, right, bottom)))[0].argmax(dim=0)
        rows, columns = slice(inner[0], inner[2]), slice(inner[1], inner[3])
        part = labels[inner[0] - top : inner[2] - top, inner[1] - left : inner[3] - left]
        mask[rows, columns] = part.byte().cpu().numpy()
    return mask


def class_shares(counts: Tensor) -> list[tuple[float, float, float, float] | None]:
    """Return IoU, F1, precision and recall of each class.

    Args:
        counts: The confusion matrix, (true class, predicted class), integers.

    Returns:
        Shares from 0 to 1, of 0 / 0 it is 0; None for a class that is neither there nor predicted.
    """
    both, truth, guessed = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    return [
        (b / (t + g - b), 2 * b / (t + g), b / g if g else 0.0, b / t if t else 0.0)
        if t + g
        else None
        for b, t, g in zip(both.tolist(), truth.tolist(), guessed.tolist(), strict=True)
    ]


def at_size(logits: Tensor, labels: Tensor) -> Tensor:
    """Return logits, (batch, classes, *, *), in float32 and resized to labels, (batch, h, w)."""
    import torch.nn.functional as F

    if logits.ndim != 4:
        shape = tuple(logits.shape)
        raise ValueError(f"output is {shape}, expected (batch, classes, height, width) of a model")
    if logits.shape[2:] == labels.shape[1:]:
        return logits.float()
    return F.interpolate(logits.float(), labels.shape[1:], mode="bilinear", align_corners=False)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of labelled pixels over the number of all pixels.

    With that number, unlike that of the labelled ones, the mean over parts of a batch is that of
    the batch.

    Args:
        logits: (batch, classes, height, width).
        labels: (batch, height, width), int64.

    Source: mmsegmentation, as the published heads were trained with.
    """
    import torch.nn.functional as F

    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / labels.numel()


def dice(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over classes of 1 - (2 sum(p g) + s) / (sum(p^2) + sum(g^2) + s); arguments as above.

    p are softmax probabilities, g is 1 where a class is and 0 elsewhere, s is 1e-5; sums are over
    the labelled pixels of the batch, of all processes.

    Source: Ruan et al., "VM-UNet", arXiv:2402.02491, as its code computes it.
    """
    import torch
    import torch.nn.functional as F

    from fambav.layers.batch_norm import over_processes

    labelled = (labels != IGNORE)[:, None]  # (batch, 1, height, width)
    truth = F.one_hot(labels.masked_fill(labels == IGNORE, 0), logits.shape[1])
    truth = truth.permute(0, 3, 1, 2) * labelled
    shares = logits.softmax(dim=1) * labelled
    over = (0, 2, 3)
    sums = (shares * truth).sum(over), shares.square().sum(over) + truth.sum(over)
    both, sizes = over_processes(torch.stack(sums))  # (classes,) each
    loss: Tensor = 1 - ((2 * both + _SMOOTH) / (sizes + _SMOOTH)).mean()
    return loss


_LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dice": dice}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
