"""Data sets, augmentation and batches."""

from fambav.data.arrays import ArraySet, DataError, DataSet, Samples
from fambav.data.datasets import fetch, load
from fambav.data.folders import read_image
from fambav.data.loaders import Batches, TrainBatchesLoader, eval_loader, train_loader
from fambav.data.mixing import Mix, mixup
from fambav.data.sampling import TrainBatches, deal
from fambav.data.transforms import eval_transform, eval_words, three_augment, train_transform
from fambav.data.unreadable import Tolerant

__all__ = [
    "ArraySet",
    "Batches",
    "DataError",
    "DataSet",
    "Mix",
    "Samples",
    "Tolerant",
    "TrainBatches",
    "TrainBatchesLoader",
    "deal",
    "eval_loader",
    "eval_transform",
    "eval_words",
    "fetch",
    "load",
    "mixup",
    "read_image",
    "three_augment",
    "train_loader",
    "train_transform",
]
