"""Files that survive a crash: written beside their place, hashed, then moved into it.

A checkpoint is an ordinary `torch.save` archive of tensors, numbers, strings, lists and dicts, so
plain `torch.load(path, weights_only=True)` reads it.  Its SHA-256 stands in the archive's comment,
where every zip reader ignores it; `load` refuses a file that does not match.  Nothing that is
loaded is ever executed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from fambav.arguments import near_path
from fambav.pickles import DeepPickleError, check_depth

State = dict[str, Any]

_TEMPORARY = ".tmp-"
_MARK = b"fambav sha256 "
_COMMENT = len(_MARK) + 64
_WRITER = "fambav"  # in the safetensors files that must have a digest
_RULE = "2"  # of the digest there; files without a number are of the first rule
_END = b"PK\x05\x06"  # a zip archive without a comment has this 22 bytes before its end
_START = b"PK\x03\x04"  # of a zip archive; files of torch before 1.6 are pickles after each other:
_OLD_PICKLES = 5  # magic number, version, system, state and names of storages; bytes follow
_DAMAGED = (
    RuntimeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    MemoryError,
    OSError,
)


class CheckpointError(ValueError):
    """A file is missing, damaged, unsafe, or belongs to another model or recipe."""


class NotFiniteWeightsError(CheckpointError):
    """A file holds weights that are not finite."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path that becomes `path` when the block ends without an error.

    Whatever was at `path` stays until the new content is on the disk.  A device or a pipe, such as
    /dev/stdout, is given as it is.

    Raises:
        OSError: If it cannot be written, such as on a full disk; it names `path`.
    """
    if path.exists() and not path.is_file():
        with naming(path):
            yield path
        return
    with naming(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_TEMPORARY, suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError of writing `path` name it; Python's own name a file only where they open it.

    Raises:
        OSError: That error.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or Path(error.filename).name.startswith(_TEMPORARY):
            error.filename = str(path)
        raise


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Replace the content of `path`, all of it or nothing."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    r"""Replace the content of `path`, all of it or nothing; what UTF-8 lacks becomes `\udce9`."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def save(path: Path, state: State) -> None:
    """Write a checkpoint.

    Args:
        path: Where to; the file there before stays whole until the new one is complete.
        state: Tensors, numbers, strings, None, and lists and dicts of them.

    Raises:
        OSError: If it cannot be written, such as on a full disk.
    """
    buffer = io.BytesIO()  # a file that fails under torch's writer fails without its reason
    torch.save(state, buffer)
    buffer.seek(-2, os.SEEK_END)
    buffer.write(_COMMENT.to_bytes(2, "little") + _MARK)
    buffer.write(hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    write_bytes(path, buffer.getbuffer())


def load(path: Path, *, device: torch.device | str = "cpu") -> State:
    """Read a checkpoint, of ours or of DeiT, Vim or Famba-V, or a `.safetensors` file.

    Args:
        path: A file.  The command line that DeiT's family pickles beside the weights is read as
            data; any other Python object in the file is refused and not built.
        device: Where the tensors go.

    Returns:
        The dictionary that was saved.  A safetensors file gives `model` and `metadata`.

    Raises:
        CheckpointError: If the file is missing, damaged, or holds anything but data.

    Warns:
        UserWarning: If the digest of a safetensors file of ours leaves out dtypes and shapes, as
            those of older versions do.
    """
    if not path.is_file():
        hint = near_path(path)
        raise CheckpointError(f"checkpoint is {path}, expected a file that exists{hint}")
    if path.suffix == ".safetensors":
        return _load_weights(path, device)
    _verify(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on the format of old and broken files
            _check_depth(path)
            state = torch.load(path, map_location=device, weights_only=True)
    except _DAMAGED as error:
        raise CheckpointError(_reason(path, error)) from error
    if not isinstance(state, dict):
        kind = type(state).__name__
        raise CheckpointError(f"{path} holds a {kind}, expected a dictionary of weights")
    return state


def copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` is now; later saves of either leave the other."""
    with atomic(target) as temporary:
        temporary.unlink()
        try:
            temporary.hardlink_to(source)
        except OSError:  # a file system without links
            shutil.copyfile(source, temporary)


def save_weights(path: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write weights alone in the safetensors format.

    Args:
        path: Where to, ending in `.safetensors`.
        weights: A state_dict.
        metadata: Strings stored beside it; the digest of both, with names, dtypes and shapes, and
            the number of its rule are added.

    Raises:
        OSError: If it cannot be written.
    """
    weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    metadata = {**metadata, "format": "pt", "writer": _WRITER, "digest": _RULE}
    metadata["sha256"] = _digest_of(weights, metadata)
    write_bytes(path, save_tensors(weights, metadata))


def _load_weights(path: Path, device: torch.device | str) -> State:
    try:
        with _opened(path) as name, safe_open(name, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
    except (SafetensorError, *_DAMAGED) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
    ours = "sha256" in metadata or metadata.get("writer") == _WRITER  # one may be damaged
    if ours and metadata.get("sha256") != _digest_of(weights, metadata):
        raise CheckpointError(f"{path} is damaged: its SHA-256 does not match its content")
    if ours and "digest" not in metadata:
        warnings.warn(
            f"{path} has a digest of the old rule, which leaves out dtypes and shapes: a weaker "
            "check; a new export or a resumed run writes the present one",
            stacklevel=3,
        )
    return {"model": weights, "metadata": metadata}


@contextmanager
def _opened(path: Path) -> Iterator[str]:
    """Give a name of an open file that is UTF-8, as safetensors wants it."""
    with path.open("rb") as file:
        surrogates = any("\ud800" <= sign <= "\udfff" for sign in str(path))
        yield f"/dev/fd/{file.fileno()}" if surrogates else str(path)


def _digest_of(weights: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Hash the weights and every string beside them but the digest itself.

    Which rule holds stands in the strings: names, dtypes, shapes and values, each tensor's own
    apart from the next one's; by the first rule, names and values one after another.
    """
    digest = hashlib.sha256(repr(sorted({**metadata, "sha256": ""}.items())).encode())
    for name, value in sorted(weights.items()):
        about = json.dumps([name, str(value.dtype), list(value.shape)]) + "\n"
        digest.update((about if "digest" in metadata else name).encode())
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _verify(path: Path) -> None:
    """Check the digest, if the file is one of ours."""
    size = path.stat().st_size
    with path.open("rb") as file:
        archive = file.read(2) == b"PK"
        file.seek(max(size - _COMMENT, 0))
        tail = file.read()
    if tail.startswith(_MARK):
        if tail[len(_MARK) :] != _digest(path):
            raise CheckpointError(f"{path} is damaged: its SHA-256 does not match its content")
    elif archive and tail[-22:-18] != _END:
        raise CheckpointError(f"{path} is truncated or damaged: it does not end as it was written")


def _digest(path: Path) -> bytes:
    """Hash all but the last 64 bytes, which are the digest; 64 hexadecimal digits."""
    digest, remaining = hashlib.sha256(), path.stat().st_size - 64
    with path.open("rb") as file:
        while remaining > 0 and (block := file.read(min(remaining, 1 << 20))):
            digest.update(block)
            remaining -= len(block)
    return digest.hexdigest().encode()


def _check_depth(path: Path) -> None:
    """Refuse a file whose pickles are nested so deeply that loading it ends the process."""
    with path.open("rb") as file:
        if file.read(len(_START)) != _START:
            file.seek(0)
            for _ in range(_OLD_PICKLES):
                check_depth(file)
            return
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith("data.pkl"):
                    check_depth(io.BytesIO(archive.read(entry)))


def _reason(path: Path, error: BaseException) -> str:
    """Return one line on why torch could not read `path`."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return f"{path} holds Python code ({code[1]}), expected only weights; nothing was run"
    if isinstance(error, DeepPickleError):
        return f"{path} is {error}, expected only weights"
    if isinstance(error, MemoryError | OSError):
        return f"{path} could not be read: {error}"
    return f"{path} is truncated, damaged or no checkpoint"


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
