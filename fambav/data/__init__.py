"""Data sets, augmentation and batches."""

from fambav.data.datasets import fetch, load
from fambav.data.folders import ListedImages, read_image
from fambav.data.loaders import (
    Batches,
    EvalBatchesLoader,
    SkipCorrupt,
    TrainBatchesLoader,
    eval_loader,
    train_loader,
)
from fambav.data.sampling import TrainBatches, repeat_augmented
from fambav.data.segments import ListedMasks
from fambav.data.transforms import Mix, eval_crop, eval_transform, mixup, train_transform
from fambav.data.types import ArraySet, DataError, DataSet, Samples

__all__ = [
    "ArraySet",
    "Batches",
    "DataError",
    "DataSet",
    "EvalBatchesLoader",
    "ListedImages",
    "ListedMasks",
    "Mix",
    "Samples",
    "SkipCorrupt",
    "TrainBatches",
    "TrainBatchesLoader",
    "eval_crop",
    "eval_loader",
    "eval_transform",
    "fetch",
    "load",
    "mixup",
    "read_image",
    "repeat_augmented",
    "train_loader",
    "train_transform",
]
