"""A small CIFAR in the real layout, and small folders of images."""

import pickle
from pathlib import Path

import numpy as np
from PIL import Image


def pictures(labels, source):
    """Noise on a colour of the class's own, (count, 3072), uint8, channels first."""
    colours = np.random.default_rng(7).integers(40, 216, (int(labels.max()) + 1, 3, 1))
    noise = source.integers(-40, 40, (len(labels), 3, 32 * 32))
    return (colours[labels] + noise).astype(np.uint8).reshape(len(labels), -1)


def write(path, entries):
    """Pickle with the protocol and the keys of the published files."""
    path.write_bytes(pickle.dumps(entries, protocol=2))


def made_cifar(path, classes=100, train=200, test=100, seed=0):
    """Write a CIFAR-100 with `classes` classes into `path`/cifar-100-python; return that folder."""
    folder = Path(path) / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    source = np.random.default_rng(seed)
    for name, count in (("train", train), ("test", test)):
        labels = source.permutation(np.arange(count) % classes)
        entries = {
            b"filenames": [b"made_%05d.png" % index for index in range(count)],
            b"batch_label": b"%sing batch 1 of 1" % name.encode(),
            b"fine_labels": labels.tolist(),
            b"coarse_labels": (labels % 20).tolist(),
            b"data": pictures(labels, source),
        }
        write(folder / name, entries)
    names = {
        b"fine_label_names": [b"class_%d" % label for label in range(classes)],
        b"coarse_label_names": [b"coarse_%d" % label for label in range(20)],
    }
    write(folder / "meta", names)
    return folder


def made_cifar10(path, train=50, test=20, seed=0):
    """Write a CIFAR-10 into `path`/cifar-10-batches-py; return that folder."""
    folder = Path(path) / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    source = np.random.default_rng(seed)
    sizes = {**{f"data_batch_{number}": train // 5 for number in range(1, 6)}, "test_batch": test}
    for name, count in sizes.items():
        labels = np.arange(count) % 10
        entries = {
            b"batch_label": name.encode(),
            b"labels": labels.tolist(),
            b"data": pictures(labels, source),
            b"filenames": [b"made_%05d.png" % index for index in range(count)],
        }
        write(folder / name, entries)
    names = [b"class_%d" % label for label in range(10)]
    write(folder / "batches.meta", {b"label_names": names, b"num_vis": 3072})
    return folder


def made_folder(path, classes=("cat", "dog"), train=6, val=4, size=(40, 48)):
    """Write `path`/train/<class>/<image>.png and `path`/val/...; return `path`."""
    source = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for name in classes:
            folder = Path(path) / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = source.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return Path(path)
