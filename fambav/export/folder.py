"""What each format's folder holds, written, read back, compared and only then kept."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fambav.engine import checkpoint
from fambav.engine.distributed import processes
from fambav.engine.finite import check_logits
from fambav.engine.record import WEIGHTS
from fambav.export import description
from fambav.export.card import Check, card
from fambav.registry import nearest
from fambav.training import batches
from fambav.training.prediction import Pretrained, opened
from fambav.training.saved import as_strings

Run = Callable[[Tensor], Tensor]

PROGRAM, GRAPH = "model.pt2", "model.onnx"

_BATCH = 16
# Of pixels in standard deviations, well above the 1e-7 that float32 rounds; far below what shows.
_NOISE, _DRAWS = 1e-5, 3


class Format(NamedTuple):
    """A format.

    Attributes:
        write: Writes the model into a folder.
        load: Reads it back as a function from images to logits.
        needs: Packages that must be there.
    """

    write: Callable[[Pretrained, Path], None]
    load: Callable[[Path], Run]
    needs: tuple[str, ...] = ()


def export(
    path: str | Path,
    kind: str,
    folder: str | Path,
    *,
    images: int = 64,
    noise: bool = False,
    tolerance: float = 1e-4,
    data_path: str | None = None,
) -> Check:
    """Export a model, and keep the export if it gives what the model gives.

    Args:
        path: A run folder or a file of weights that says what it is of.
        kind: One of `FORMATS`.
        folder: Where to; not there yet, or empty.
        images: Held-out images to compare on, 1 or more.
        noise: Compare on noise instead, where the data set is not at hand.
        tolerance: Largest difference of a logit, in units of the largest logit or of 1 if that is
            less.
        data_path: Where the data set is, if not where it was in training.

    Returns:
        How both compare.

    Raises:
        ValueError: If the format is unknown, a package is missing, the folder is not empty, the
            model cannot be expressed so, or the export differs from it other than by a near tie
            between tokens; then there is no folder.
    """
    place = Path(folder)
    _check(kind, place, images, tolerance)
    settings = {} if data_path is None else {"data_path": data_path}
    model = opened(path, **settings)
    inputs = _noise(model, images) if noise else _held_out(model, images)
    want = _answers(model.net, inputs)
    check_logits(model.net, inputs, want, "the images to compare on")
    told = description.described(model, kind)
    with _kept(place) as temporary:
        start = time.perf_counter()
        FORMATS[kind].write(model, temporary)
        seconds = time.perf_counter() - start
        description.write(temporary, told)
        got = _answers(FORMATS[kind].load(temporary), inputs)
        what = "images of noise" if noise else f"held-out images of {model.config.data.data_set}"
        steady = partial(_steady, model.net, inputs, want)
        check = _compared(got, want, steady, what, tolerance=tolerance, seconds=seconds)
        text = card(model, told, check, folder=place.name)
        (temporary / "README.md").write_text(text, encoding="utf-8")
    return check


def _check(kind: str, place: Path, images: int, tolerance: float) -> None:
    """Refuse what cannot be done, before anything is loaded."""
    if kind not in FORMATS:
        raise ValueError(f"format is {kind!r}, expected a known name; {nearest(kind, FORMATS)}")
    if images < 1:
        raise ValueError(f"images is {images}, expected 1 or more")
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}, expected more than 0")
    for package in FORMATS[kind].needs:
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{package} is not installed, expected it for export to {kind};"
                ' pip install "fambav[export]"'
            )
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"output_dir is {str(place)!r}, expected a folder that is empty or new")


def _compared(
    got: Tensor,
    want: Tensor,
    steady: Callable[[Tensor, float], Tensor],
    kind: str,
    *,
    tolerance: float,
    seconds: float,
) -> Check:
    """Compare logits, and look at an image that differs again: rounding may decide it.

    Raises:
        ValueError: If they differ by more than is allowed where the model itself is steady.
    """
    apart = (got - want).abs().amax(dim=1)
    allowed = tolerance * max(1.0, float(want.abs().max()))
    wrong = ~(apart <= allowed)
    close = wrong.clone()
    if wrong.any():
        close[wrong] = ~steady(wrong, allowed)
    told = apart[~close]
    check = Check(
        images=len(want),
        kind=kind,
        difference=float(told.max()) if len(told) else float("nan"),
        agreeing=int((got.argmax(dim=1) == want.argmax(dim=1)).sum()),
        tolerance=allowed,
        seconds=seconds,
        ties=int(close.sum()),
    )
    failed = int((wrong & ~close).sum())
    if failed or close.all():
        raise ValueError(
            f"export differs on {failed or len(want)} of {check.line()}, expected it to agree;"
            " nothing was kept; --tolerance allows more"
        )
    return check


def _steady(net: Run, images: Tensor, want: Tensor, which: Tensor, allowed: float) -> Tensor:
    """Say for which of some images a model gives the same if pixels change by more than rounding.

    Which tokens are removed is a choice: where two are nearly as good, rounding makes it.  Noise of
    either sign moves such a choice to either side.
    """
    images, want, draw = images[which], want[which], torch.Generator().manual_seed(0)
    found = torch.ones(len(images), dtype=torch.bool)
    for _ in range(_DRAWS):
        noise = _NOISE * torch.randn(images.shape, generator=draw)
        for moved in (images + noise, images - noise):
            found &= (_answers(net, moved) - want).abs().amax(dim=1) <= allowed
    return found


@contextmanager
def _kept(place: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `place` if the block ends without an error."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=".tmp-export-"))
    try:
        yield temporary
        temporary.chmod(0o755)
        if place.exists():
            place.rmdir()
        temporary.rename(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _held_out(model: Pretrained, images: int) -> Tensor:
    """Return the first held-out images, (at most images, channels, height, width)."""
    size = description.input_size(model)[1:]
    with processes("cpu") as group:
        found = batches.data_set(model.config, group, input_size=size)
    number = min(images, len(found.val))
    return torch.stack([model.transform(found.val[n][0]) for n in range(number)])


def _noise(model: Pretrained, images: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(images, *description.input_size(model), generator=draw)


def _answers(run: Run, images: Tensor) -> Tensor:
    """Return the logits, (images, classes)."""
    with torch.no_grad():
        return torch.cat([run(some) for some in images.split(_BATCH)]).float()


def _write_weights(model: Pretrained, folder: Path) -> None:
    strings = as_strings(description.facts(model))
    checkpoint.save_weights(folder / WEIGHTS, model.net.state_dict(), strings)


def _load_weights(folder: Path) -> Run:
    return opened(folder).net


def _write_hf(model: Pretrained, folder: Path) -> None:
    _write_weights(model, folder)
    _, height, width = description.input_size(model)
    told: dict[str, Any] = {
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(model.mean),
        "image_std": list(model.std),
        "crop_pct": description.described(model, "hf")["pretrained_cfg"]["crop_pct"],
    }
    text = json.dumps(told, indent=1) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


def _write_program(model: Pretrained, folder: Path) -> None:
    from fambav.export.recurrence import in_blocks
    from fambav.export.tracing import bare, quiet, traced

    lowering = {torch.ops.fambav.recurrence.default: in_blocks}
    program = bare(traced(model.net, description.input_size(model), lowering))
    with quiet():
        torch.export.save(program, folder / PROGRAM)


def _load_program(folder: Path) -> Run:
    from fambav.export.tracing import quiet

    with quiet():
        run: Run = torch.export.load(folder / PROGRAM).module()
    return run


def _write_graph(model: Pretrained, folder: Path) -> None:
    import onnx

    from fambav.export.graph import onnx_model

    onnx.save(onnx_model(model.net, description.input_size(model)), folder / GRAPH)


def _load_graph(folder: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


FORMATS: dict[str, Format] = {
    "safetensors": Format(_write_weights, _load_weights),
    "torch": Format(_write_program, _load_program),
    "onnx": Format(_write_graph, _load_graph, ("onnx", "onnxscript", "onnxruntime")),
    "hf": Format(_write_hf, _load_weights),
}
