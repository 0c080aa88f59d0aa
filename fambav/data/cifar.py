"""CIFAR-10 and CIFAR-100, read from the files their authors publish.

The files are pickles, which can run any code when they are loaded; this reader builds arrays,
lists, strings and numbers and refuses a file that names anything else.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; names, digests
and the address of the files are those of torchvision.datasets.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fambav.data.types import ArraySet, DataError, DataSet
from fambav.pickles import DeepPickleError, check_depth
from fambav.timm_compat import torchvision

LAYOUTS: dict[str, Any] = {
    "CIFAR": torchvision.datasets.CIFAR100,
    "CIFAR10": torchvision.datasets.CIFAR10,
}
_PIXELS = 3 * 32 * 32
_BROKEN = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    ImportError,
    MemoryError,
)


class _Refused(pickle.UnpicklingError):
    """A pickle that names something data does not need."""


class _Maker:
    """A function that a pickle may call; without attributes, so that a pickle can not change it."""

    __slots__ = ()


class _Array(_Maker):
    """Stands for numpy's array class and for the function that makes an empty array."""

    __slots__ = ()

    def __call__(self, kind: Any, _shape: Any, _code: Any) -> NDArray[Any]:
        if not isinstance(kind, _Array):
            raise _Refused("an array of another class")
        return np.empty(0, np.uint8)  # its shape, type and bytes follow in the pickle


class _Buffer(_Maker):
    __slots__ = ()

    def __call__(self, raw: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
        array: NDArray[Any] = np.frombuffer(raw, np.dtype(dtype)).reshape(shape, order=order)
        return array


class _Scalar(_Maker):
    __slots__ = ()

    def __call__(self, dtype: Any, raw: bytes) -> int | float:
        value: int | float = np.frombuffer(raw, np.dtype(dtype), count=1)[0].item()
        return value


class _Bytes(_Maker):
    """How Python 3 writes bytes for readers of protocol 2."""

    __slots__ = ()

    def __call__(self, text: str, _encoding: str = "latin1") -> bytes:
        return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array(),
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _Bytes(),
    ("__builtin__", "bytes"): bytes,
    **{
        (f"numpy.{core}.{module}", name): maker
        for core in ("core", "_core")  # before and since numpy 2
        for module, name, maker in (
            ("multiarray", "_reconstruct", _Array()),
            ("multiarray", "scalar", _Scalar()),
            ("numeric", "_frombuffer", _Buffer()),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for `module.name`, if data needs it."""
        if (module, name) not in _ALLOWED:
            raise _Refused(f"{module}.{name}")
        return _ALLOWED[module, name]


def _unpickle(path: Path) -> tuple[dict[str, Any], str]:
    """Return the dictionary in a file, its keys as str, and the file's md5."""
    raw = path.read_bytes()
    try:
        check_depth(io.BytesIO(raw))
        pickled = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
        entries = {_text(name): value for name, value in pickled.items()}
    except _Refused as error:
        raise DataError(
            f"{path} asks for {error}, expected only arrays, lists, strings and numbers; "
            "nothing in it was run"
        ) from None
    except DeepPickleError as error:
        raise DataError(f"{path} is {error}, expected a CIFAR file of pickled arrays") from None
    except _BROKEN as error:
        raise DataError(
            f"{path} is truncated or damaged ({type(error).__name__}), expected a CIFAR file of "
            "pickled arrays; delete it and fetch it again with --download"
        ) from None
    return entries, hashlib.md5(raw, usedforsecurity=False).hexdigest()


def _text(name: Any) -> str:
    return name.decode("utf-8") if isinstance(name, bytes) else str(name)


def _samples(path: Path, entries: dict[str, Any], num_classes: int) -> ArraySet:
    """Check the images and labels of one file."""
    for name in ("data", "fine_labels"):
        if name not in entries and (name == "data" or "labels" not in entries):
            raise DataError(f"{path} holds {sorted(entries)}, expected {name!r} among them")
    data = entries["data"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (_PIXELS,):
        kind = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data)
        raise DataError(f"{path}: data is {kind}, expected uint8 (count, {_PIXELS})")
    try:
        labels = np.asarray(entries.get("fine_labels", entries.get("labels")))
    except ValueError:
        raise DataError(
            f"{path}: labels are lists of different lengths, expected {len(data)} integers"
        ) from None
    if labels.shape != (len(data),) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: labels are {labels.dtype} {labels.shape}, expected {len(data)} integers"
        )
    if len(data) == 0 or labels.min() < 0 or labels.max() >= num_classes:
        span = f"{labels.min()} .. {labels.max()}" if len(data) else "none"
        raise DataError(f"{path}: labels are {span}, expected 0 .. {num_classes - 1}")
    images = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (count, 32, 32, 3)
    return ArraySet(np.ascontiguousarray(images), labels)


def _class_names(path: Path, entries: dict[str, Any], key: str) -> tuple[str, ...]:
    """Return the names of the classes, in order."""
    names = entries.get(key)
    try:
        if names and isinstance(names, list) and all(isinstance(n, str | bytes) for n in names):
            return tuple(map(_text, names))
    except UnicodeDecodeError:
        pass
    raise DataError(
        f"{path} holds {sorted(entries)}, expected a list {key!r} of class names, each a text"
    )


def _files(name: str) -> dict[str, str]:
    """Return the file names of a CIFAR, each with the md5 of the published file."""
    layout = LAYOUTS[name]
    listed = dict([*layout.train_list, *layout.test_list])
    return {**listed, layout.meta["filename"]: layout.meta["md5"]}


def _folder(name: str, root: Path) -> Path:
    """Return the folder of the files of a CIFAR: inside `root`, or `root` itself."""
    inner = LAYOUTS[name].base_folder
    nested = root / inner
    is_root = root.name == inner or any((root / file).is_file() for file in _files(name))
    return root if is_root and not nested.is_dir() else nested


def _missing(name: str, folder: Path) -> list[str]:
    return [file for file in _files(name) if not (folder / file).is_file()]


def fetch(name: str, root: Path) -> None:
    """Download the published archive and unpack it, unless every file is there.

    Files that are there are kept even if they are not the published ones.

    Args:
        name: "CIFAR" or "CIFAR10".
        root: As for `read`.

    Raises:
        DataError: If it can not be fetched.
    """
    layout, folder = LAYOUTS[name], _folder(name, root)
    if not _missing(name, folder):
        return
    try:
        torchvision.datasets.utils.download_and_extract_archive(
            layout.url, str(folder.parent), filename=layout.filename, md5=layout.tgz_md5
        )
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{layout.url} can not be fetched into {folder.parent} ({error}), expected the "
            f"published archive; it can also be unpacked there by hand"
        ) from None


def read(name: str, root: Path) -> DataSet:
    """Read a CIFAR.

    Args:
        name: "CIFAR" for CIFAR-100, "CIFAR10" for CIFAR-10.
        root: The folder that holds the published folder, or that folder itself.

    Returns:
        The set, images of 32 x 32 pixels, with a note if a file is not the published one.

    Raises:
        DataError: If a file is missing, truncated, damaged, or holds anything but data.
    """
    layout, folder, published = LAYOUTS[name], _folder(name, root), _files(name)
    missing = _missing(name, folder)
    if missing:
        raise DataError(
            f"data_path is {str(root)!r}, expected {layout.base_folder}/ with "
            f"{', '.join(published)} in it; looked in {folder}, missing: {', '.join(missing)}; "
            f"fetch it with: python main.py --data-set {name} --data-path {root} --download"
        )
    unpickled = {file: _unpickle(folder / file) for file in published}
    meta = layout.meta["filename"]
    class_names = _class_names(folder / meta, unpickled[meta][0], layout.meta["key"])
    train, val = (
        _joined([_samples(folder / file, unpickled[file][0], len(class_names)) for file, _ in part])
        for part in (layout.train_list, layout.test_list)
    )
    changed = [file for file, md5 in published.items() if unpickled[file][1] != md5]
    note = (
        f"{folder}: {', '.join(changed)} {'is' if len(changed) == 1 else 'are'} not the published "
        f"CIFAR; read as found, {len(train):,} images to train and {len(val):,} to test"
    )
    notes = (note,) if changed else ()
    return DataSet.in_memory(name, train, val, class_names=class_names, notes=notes)


def _joined(parts: list[ArraySet]) -> ArraySet:
    images, labels = ([getattr(part, kind) for part in parts] for kind in ("images", "labels"))
    return ArraySet(np.concatenate(images), np.concatenate(labels))
