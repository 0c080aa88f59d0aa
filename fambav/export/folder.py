"""What each format's folder holds, written, read back, compared and only then kept."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fambav.arguments import file_path, is_number, known_name, refusal, whole
from fambav.engine import checkpoint
from fambav.engine.distributed import processes
from fambav.engine.finite import check_logits
from fambav.engine.run_dir import COMPRESSED, DESCRIPTION, WEIGHTS
from fambav.export.card import Check, card
from fambav.export.description import describe, facts
from fambav.training import batches
from fambav.training.inference import LoadedRun, load_run
from fambav.training.run_state import as_strings

Run = Callable[[Tensor], Tensor]

PROGRAM, GRAPH = "model.pt2", "model.onnx"

_BATCH, _OTHERS = 16, (1, 3)  # images that run together; others, to show that a batch may be any
# Of pixels in standard deviations, well above the 1e-7 that float32 rounds; far below what shows.
_NOISE, _DRAWS = 1e-5, 3


class Format(NamedTuple):
    """A format.

    Attributes:
        write: Writes the model into a folder.
        load: Reads it back as a function from images to logits.
        needs: Packages that must be there.
        traced: Whether it is a program that was traced, for a batch of any size.
        tolerance: Largest difference of an output unless another is given, in units of the largest
            one or of 1 if that is less.
    """

    write: Callable[[LoadedRun, Path], None]
    load: Callable[[Path], Run]
    needs: tuple[str, ...] = ()
    traced: bool = False
    tolerance: float = 1e-4


def export(
    path: str | Path,
    kind: str,
    folder: str | Path,
    *,
    images: int = 64,
    noise: bool = False,
    tolerance: float | None = None,
    data_path: str | None = None,
    dynamic_batch: bool = False,
) -> Check:
    """Export a model, and keep the export if it gives what the model gives.

    Args:
        path: A run folder or a file of weights that says what it is of.
        kind: One of `FORMATS`.
        folder: Where to; not there yet, or empty.
        images: Held-out images to compare on, 1 or more.
        noise: Compare on noise instead, where the data set is not at hand.
        tolerance: Largest difference of an output instead of the format's own.
        data_path: Where the data set is, if not where it was in training.
        dynamic_batch: Compare on batches of 1 and 3 images too, of a program that was traced; such
            a program takes a batch of any size, whether it is compared so or not.

    Returns:
        How both compare.

    Raises:
        ValueError: If the format is unknown or no program, a package is missing, the folder is not
            empty, the model cannot be expressed so, or the export differs from it other than by a
            near tie between tokens; then there is no folder.
    """
    place = file_path("folder", folder)
    known_name("format", kind, FORMATS)
    tolerance = FORMATS[kind].tolerance if tolerance is None else tolerance
    _check(kind, place, images, tolerance, dynamic_batch=dynamic_batch)
    settings = {} if data_path is None else {"data_path": data_path}
    run = load_run(path, settings, allowed=("data_path",))
    _check_output(run)
    inputs = _noise(run, images) if noise else _held_out(run, images)
    want = _logits(run.net, inputs)
    check_logits(run.net, inputs, want, "the images to compare on")
    description, others = describe(run, kind), _OTHERS if dynamic_batch else ()
    with _kept(place) as temporary:
        start = time.perf_counter()
        FORMATS[kind].write(run, temporary)
        seconds = time.perf_counter() - start
        _write_json(temporary / DESCRIPTION, description)
        check = _compare(
            run.net,
            inputs,
            want,
            _logits(FORMATS[kind].load(temporary), inputs, batches=others),
            kind="inputs of noise" if noise else f"held-out samples of {run.config.data.data_set}",
            tolerance=tolerance,
            seconds=seconds,
        )
        text = card(run, description, check, folder=place.name)
        checkpoint.write_text(temporary / "README.md", text)
    return check


def _check(kind: str, place: Path, images: int, tolerance: float, *, dynamic_batch: bool) -> None:
    """Refuse what cannot be done, before anything is loaded."""
    if dynamic_batch and not FORMATS[kind].traced:
        able = " or ".join(name for name, known in FORMATS.items() if known.traced)
        raise ValueError(
            f"dynamic_batch is set, expected it of the formats {able}: {kind} holds weights alone,"
            " and their model takes any batch"
        )
    whole("images", images, least=1)
    if not is_number(tolerance) or not tolerance > 0:
        raise refusal("tolerance", tolerance, "a number of more than 0")
    for package in FORMATS[kind].needs:
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{package} is not installed, expected it for export to {kind};"
                ' pip install "fambav[export]"'
            )
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"output_dir is {str(place)!r}, expected a folder that is empty or new")


def _check_output(run: LoadedRun) -> None:
    """Refuse a model whose outputs cannot be compared."""
    if not run.task.exported:
        name, data_set = run.config.model.model, run.config.data.data_set
        raise ValueError(f"model is {name} of {data_set}, expected one whose output is a tensor")


def _compare(
    model: Run,
    images: Tensor,
    want: Tensor,
    got: Tensor,
    *,
    kind: str,
    tolerance: float,
    seconds: float,
) -> Check:
    """Compare outputs, (images, ...), apart from images in which rounding chooses a token.

    Raises:
        ValueError: If they differ by more than the tolerance on another image.
    """
    apart = (got - want).abs().flatten(1).amax(dim=1)
    allowed = tolerance * max(1.0, float(want.abs().max()))
    wrong = ~(apart <= allowed)
    ties = wrong.clone()
    if wrong.any():
        ties[wrong] = ~_steady(model, images[wrong], want[wrong], allowed)
    compared = apart[~ties]
    check = Check(
        images=len(want),
        kind=kind,
        difference=float(compared.max()) if len(compared) else float("nan"),
        agreeing=int((got.argmax(1) == want.argmax(1)).sum()) if want.ndim == 2 else None,
        tolerance=allowed,
        seconds=seconds,
        ties=int(ties.sum()),
    )
    failed = int((wrong & ~ties).sum())
    if failed or ties.all():
        raise ValueError(
            f"export differs on {failed or len(want)} of {check.line()}, expected it to agree;"
            " nothing was kept; --tolerance allows more"
        )
    return check


def _steady(model: Run, images: Tensor, want: Tensor, allowed: float) -> Tensor:
    """Return whose logits stay as they are if pixels change by more than rounding, (images,), bool.

    Which tokens are removed is a choice: where two are nearly as good, rounding makes it.  Noise of
    either sign moves such a choice to either side.
    """
    generator = torch.Generator().manual_seed(0)
    steady = torch.ones(len(images), dtype=torch.bool)
    for _ in range(_DRAWS):
        noise = _NOISE * torch.randn(images.shape, generator=generator)
        for moved in (images + noise, images - noise):
            steady &= (_logits(model, moved) - want).abs().flatten(1).amax(dim=1) <= allowed
    return steady


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
    except OSError as error:
        if error.filename is not None:  # of the folder that there will be no more
            error.filename = str(error.filename).replace(str(temporary), str(place))
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _held_out(run: LoadedRun, images: int) -> Tensor:
    """Return the first held-out images, (at most images, *run.input_size)."""
    with processes("cpu") as group:
        first, second = run.input_size[-2:]
        data = batches.data_set(run.config, group, input_size=(first, second))
    number = min(images, len(data.val))
    return torch.stack([_window(run.transform(data.val[n][0]), run) for n in range(number)])


def _window(sample: Tensor, run: LoadedRun) -> Tensor:
    """Return what a traced model reads of an image of any size: its upper left window."""
    height, width = run.input_size[-2:]
    rest = (0, width - sample.shape[-1], 0, height - sample.shape[-2])
    return nn.functional.pad(sample, rest)  # cuts where rest is negative


def _noise(run: LoadedRun, images: int) -> Tensor:
    return torch.randn(images, *run.input_size, generator=torch.Generator().manual_seed(0))


def _logits(model: Run, images: Tensor, *, batches: Sequence[int] = ()) -> Tensor:
    """Classify images in batches, the first of these sizes: (images, classes)."""
    bounds = [0, *accumulate(batches)]
    parts = [images[start:end] for start, end in pairwise(bounds)]
    parts += images[bounds[-1] :].split(_BATCH)
    with torch.no_grad():
        return torch.cat([model(some) for some in parts if len(some)]).float()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    checkpoint.write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _write_weights(run: LoadedRun, folder: Path) -> None:
    checkpoint.save_weights(folder / WEIGHTS, run.net.state_dict(), as_strings(facts(run)))


def _write_compressed(run: LoadedRun, folder: Path) -> None:
    """Write the weights in float16 as a compressed archive, which torch.load reads as it is."""
    weights = {
        name: value.half() if value.is_floating_point() else value
        for name, value in run.net.state_dict().items()
    }
    stored, compressed = io.BytesIO(), io.BytesIO()
    torch.save({"model": weights, **facts(run)}, stored)
    with (
        zipfile.ZipFile(stored) as source,
        zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    checkpoint.write_bytes(folder / COMPRESSED, compressed.getbuffer())


def _load_weights(folder: Path) -> Run:
    return load_run(folder).net


def _write_hf(run: LoadedRun, folder: Path) -> None:
    _write_weights(run, folder)
    known = run.task.preprocessing(cast(Any, run.net).pretrained_cfg)
    _write_json(folder / "preprocessor_config.json", known)


def _write_program(run: LoadedRun, folder: Path) -> None:
    from fambav.export.recurrence import in_blocks
    from fambav.export.tracing import bare, quiet, traced

    lowering = {torch.ops.fambav.recurrence.default: in_blocks}
    program = bare(traced(run.net, run.input_size, lowering))
    buffer = io.BytesIO()  # torch's writer may end the process where the disk is full
    with quiet():
        torch.export.save(program, buffer)
    checkpoint.write_bytes(folder / PROGRAM, buffer.getbuffer())


def _load_program(folder: Path) -> Run:
    from fambav.export.tracing import quiet

    with quiet():
        run: Run = torch.export.load(io.BytesIO((folder / PROGRAM).read_bytes())).module()
    return run


def _write_graph(run: LoadedRun, folder: Path) -> None:
    from fambav.export.graph import onnx_model

    graph = onnx_model(run.net, run.input_size)
    checkpoint.write_bytes(folder / GRAPH, graph.SerializeToString())


def _load_graph(folder: Path) -> Run:
    import onnxruntime

    graph = (folder / GRAPH).read_bytes()  # its name may be no UTF-8
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


FORMATS: dict[str, Format] = {
    "safetensors": Format(_write_weights, _load_weights),
    "torch": Format(_write_program, _load_program, traced=True),
    "onnx": Format(_write_graph, _load_graph, ("onnx", "onnxscript", "onnxruntime"), traced=True),
    "hf": Format(_write_hf, _load_weights),
    "pth": Format(_write_compressed, _load_weights, tolerance=1e-2),  # float16 rounds by 5e-4
}
