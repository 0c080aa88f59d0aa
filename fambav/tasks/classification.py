"""Classification of images: cross-entropy, and top-1 and top-5 accuracy, as DeiT logs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fambav.registry import TASKS
from fambav.table import Table
from fambav.tasks import ClassMeter, Loss, Meter, Metric, Mixing, Scores, Statistics, Task
from fambav.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch
    from PIL import Image
    from torch import Tensor, nn

    from fambav.config import Config


class Classification(Task):
    """Each image has one of several classes."""

    hub = "image-classification"
    tags = ("vision-mamba", "token-reduction", "timm")
    classes = True
    metrics = (
        Metric("acc1", "top-1", "%", "top-1 accuracy", higher_is_better=True, hub="accuracy"),
        Metric("acc5", "top-5", "%", "top-5 accuracy", higher_is_better=True),
    )

    def line(self, scores: Scores) -> str:
        """Return DeiT's line, which tools look for."""
        values = scores.metrics
        return f"* Acc@1 {values['acc1']:.3f} Acc@5 {values['acc5']:.3f} loss {values['loss']:.3f}"

    def best_line(self, value: float) -> str:
        """Return DeiT's line."""
        return f"Max accuracy: {value:.2f}%"

    def summary(self, scores: Scores) -> str:
        """Return DeiT's line."""
        first = scores.metrics[self.primary.name]
        return f"Accuracy of the network on the {scores.samples} test images: {first:.1f}%"

    def input_words(self, config: Config, size: tuple[int, int]) -> dict[str, Any]:
        """Return how an image is resized and cut."""
        from fambav import data

        return data.eval_crop(size, config.data.eval_crop_ratio)

    def input_lines(self, known: Mapping[str, Any]) -> tuple[str, ...]:
        """Return lines on images and classes."""
        mean, std = (", ".join(f"{v:.4g}" for v in known[name]) for name in ("mean", "std"))
        names = [printable(name) for name in known["label_names"] or ()]
        shown = ", ".join([*names[:10], *["..."] * (len(names) > 10)]) or "no names"
        shape = " x ".join(map(str, known["input_size"]))
        return (
            f"- images: {shape}, resized bicubically, mean {mean}, standard deviation {std}",
            f"- classes: {known['num_classes']} ({shown})",
        )

    def preprocessing(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """Return how an image becomes what a model reads."""
        _, height, width = known["input_size"]
        return {
            "do_resize": True,
            "size": {"height": height, "width": width},
            "resample": 3,
            "do_rescale": True,
            "do_normalize": True,
            "image_mean": list(known["mean"]),
            "image_std": list(known["std"]),
            "crop_pct": known["crop_pct"],
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
        """Return the likeliest classes with their probabilities, best first; 5 by default."""
        if folder is not None:
            raise ValueError(f"output_dir is {str(folder)!r}, expected none: classes are printed")
        shares = outputs_of(image)[0].float().softmax(dim=0)
        best = shares.topk(min(5 if topk is None else topk, len(names)))
        return [
            f"  {100 * share:5.1f}%  {names[index]}"
            for share, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def train_transform(
        self, config: Config, statistics: Statistics, input_size: tuple[int, int]
    ) -> Any:
        """Return DeiT's augmentation, or with --ThreeAugment that of DeiT III."""
        from fambav import data

        mean, std = statistics
        return data.train_transform(config.augment, input_size=input_size, mean=mean, std=std)

    def eval_transform(
        self, config: Config, statistics: Statistics, input_size: tuple[int, int]
    ) -> Any:
        """Return what resizes an image, cuts out its centre and normalises it."""
        from fambav import data

        mean, std = statistics
        ratio = config.data.eval_crop_ratio
        return data.eval_transform(input_size=input_size, eval_crop_ratio=ratio, mean=mean, std=std)

    def mixing(self, config: Config, num_classes: int) -> Mixing | None:
        """Return Mixup and CutMix, or None if both are off."""
        from fambav import data

        return data.mixup(
            config.augment,
            num_classes=num_classes,
            batch_size=config.optim.batch_size,
            seed=config.run.seed,
        )

    def loss(self, config: Config, *, mixed: bool) -> Loss:
        """Return cross-entropy of soft or smoothed targets, or with --bce-loss the binary one."""
        if config.optim.bce_loss:
            return binary_cross_entropy
        return soft_cross_entropy if mixed else smooth_cross_entropy(config.augment.smoothing)

    def meter(self, num_classes: int, device: torch.device) -> Meter:
        """Return an empty meter of cross-entropy and accuracy."""
        return Accuracy(3, device)

    def class_meter(self, num_classes: int, device: torch.device) -> ClassMeter:
        """Return an empty meter that has the confusion matrix too."""
        return ClassAccuracy(3, num_classes, device)


TASKS.register("classification")(Classification())


class Accuracy(Meter):
    """Sums of cross-entropy and of hits, among one guess and among five."""

    def batch_sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sums of logits, (batch, classes), and labels, (batch,); (3,), float64."""
        import torch
        import torch.nn.functional as F

        logits = outputs.float()
        hits = likeliest(logits) == targets[:, None]  # (batch, 5)
        loss = F.cross_entropy(logits, targets, reduction="none")
        loss = loss.masked_fill(~logits.isfinite().all(dim=1), torch.nan)
        return torch.stack([x.double().sum() for x in (loss, hits[:, 0], hits.any(dim=1))])

    def metrics(self, sums: Tensor, samples: int) -> dict[str, float]:
        """Return the mean loss in nats, and both accuracies in percent."""
        loss, first, five = sums[:3].tolist()
        return {"loss": loss / samples, "acc1": 100 * first / samples, "acc5": 100 * five / samples}


class ClassAccuracy(Accuracy, ClassMeter):
    """The same with the confusion matrix, so that its diagonal adds up to the top-1 hits."""

    def batch_sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sums, and the confusion matrix; (3 + classes^2,), float64."""
        import torch

        cells = targets * self.num_classes + likeliest(outputs.float())[:, 0]  # (batch,)
        counts = torch.bincount(cells, minlength=self.num_classes**2)
        return torch.cat([super().batch_sums(outputs, targets), counts.double()])

    def table(self, names: Sequence[str]) -> Table:
        """Return the accuracy of each class, and what it is most often taken for."""
        rows = []
        for label, counts in enumerate(self.confusion().tolist()):
            images, right, counts[label] = sum(counts), counts[label], 0
            if images:
                wrong = max(range(len(counts)), key=counts.__getitem__)
                taken = f"{names[wrong]} ({counts[wrong]} x)" if counts[wrong] else "-"
                rows.append((right / images, [names[label], taken, str(images)]))
        rows.sort(key=lambda row: row[0])
        return Table(
            head=("class", "most often taken for", "images", "accuracy %"),
            rows=[[*cells, f"{100 * share:.1f}"] for share, cells in rows],
            names=2,
        )

    def describe(
        self, outputs: Tensor, targets: Tensor, names: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return target, prediction and the prediction's probability."""
        logits = outputs.float()
        guesses = likeliest(logits)[:, :1]  # (batch, 1)
        shares = logits.softmax(dim=1).gather(1, guesses)[:, 0].tolist()
        return [
            {
                "target": target,
                "target_name": names[target],
                "prediction": guess,
                "prediction_name": names[guess],
                "probability": f"{share:.6g}",
            }
            for target, guess, share in zip(
                targets.tolist(), guesses[:, 0].tolist(), shares, strict=True
            )
        ]


def likeliest(logits: Tensor) -> Tensor:
    """Return the five classes of largest logits, best first, (batch, 5); of fewer classes all."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits, (batch, classes), and probabilities of the same shape."""
    import torch.nn.functional as F

    return F.cross_entropy(logits, targets)


def smooth_cross_entropy(smoothing: float) -> Loss:
    """Return the mean cross-entropy of logits, (batch, classes), and labels, (batch,).

    Args:
        smoothing: Share of the target spread over all classes, at least 0 and less than 1.
    """
    import torch.nn.functional as F

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)

    return loss


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy over samples and classes, each class its own decision.

    Targets, probabilities or labels, are first made yes or no: a class with any share is a yes.
    Smoothed targets have a share in every class, so smoothing must be off.

    Source: DeiT III, arXiv:2204.07118, as its code computes it.
    """
    import torch.nn.functional as F

    if targets.ndim == 1:
        targets = F.one_hot(targets, logits.shape[1])
    return F.binary_cross_entropy_with_logits(logits, targets.gt(0).to(logits.dtype))
