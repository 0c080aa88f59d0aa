"""The kinds of `fambav bench` that measure: their flags, and what they call.

Nothing here loads torch before a kind is run.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fambav.registry import DATA_SETS, FAMILIES, METHODS, MODELS, SCAN_BACKENDS

if TYPE_CHECKING:
    from fambav.bench.report import Report

VIMS = FAMILIES["vim"].models
DTYPES = ("float32", "bfloat16", "float16")
TABLE = Path(__file__).parents[2] / "benchmarks/aot.json"
PARTS = (
    "scan",
    "scan_forms",
    "scan_large",
    "conv",
    "gate",
    "norm",
    "match",
    "pool",
    "mixer",
    "training",
)


class Kind(NamedTuple):
    """A kind of benchmark.

    Attributes:
        run: Takes the flags that were given and returns a report.
        describe: Adds its flags to a parser.
    """

    run: Callable[[dict[str, Any]], Report]
    describe: Callable[[argparse.ArgumentParser], None]


def _numbers(parser: argparse.ArgumentParser, *names: str) -> None:
    for name in names:
        parser.add_argument(f"--{name}", type=int, metavar="N", default=argparse.SUPPRESS)


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda; a GPU if there is one")


def _dtype(parser: argparse.ArgumentParser, text: str = "as in training by default") -> None:
    parser.add_argument("--dtype", choices=DTYPES, help=text)


def _lengths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--length",
        type=int,
        nargs="+",
        metavar="N",
        dest="lengths",
        default=argparse.SUPPRESS,
        help="tokens; several are measured in turn",
    )


def _backends(parser: argparse.ArgumentParser, default: str = "what suits the device") -> None:
    text = f"what to compare; by default {default}"
    parser.add_argument(
        "--backend", nargs="+", choices=SCAN_BACKENDS, dest="names", default=None, help=text
    )


def _dtypes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        dest="dtypes",
        default=None,
        help="of the forward pass; as in training by default",
    )


def _plans(parser: argparse.ArgumentParser, more: str = "") -> None:
    text = "strategy:layer:tokens or strategy:tokens, such as upper:6:9 or all:7, or none"
    parser.add_argument(
        "--plan",
        nargs="+",
        dest="plans",
        metavar="PLAN",
        default=argparse.SUPPRESS,
        help=text + more,
    )
    parser.add_argument("--method", choices=METHODS, default="famba-v")


def _beside(parser: argparse.ArgumentParser) -> None:
    """Add what may stand beside our models in a comparison."""
    parser.add_argument(
        "--peer",
        nargs="+",
        metavar="NAME",
        dest="peers",
        default=(),
        help="models of timm to compare with, such as deit_tiny_patch16_224",
    )
    parser.add_argument(
        "--ceilings",
        action="store_true",
        help="measure a large product and a large copy in the same rounds, and shares of them",
    )
    parser.add_argument(
        "--split",
        action="store_true",
        dest="parts",
        help="tell the share of every layer and of every kind of operation",
    )


def _model(parser: argparse.ArgumentParser, names: Sequence[str] = VIMS) -> None:
    parser.add_argument("--model", choices=names, metavar="NAME", default="vim_tiny")


def _graphs(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--cuda-graphs", action="store_true", help=text)


def _common(parser: argparse.ArgumentParser) -> None:
    _numbers(parser, "batch", "rounds", "warmup")
    _device(parser)
    _dtype(parser)


def _scan_flags(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    _lengths(parser)
    _numbers(parser, "dim", "state")
    _backends(parser)


def _scan(given: dict[str, Any]) -> Report:
    """Time the selective scan of a mixer and weigh what it keeps for the backward pass."""
    from fambav.bench.scan import scan

    with _placed(given):
        return scan(**given)


def _block_flags(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    _model(parser)
    _lengths(parser)
    _backends(parser)


def _block(given: dict[str, Any]) -> Report:
    """Time one block of a model, forward and backward."""
    from fambav.bench.block import block

    with _placed(given):
        return block(**given)


def _step_flags(parser: argparse.ArgumentParser) -> None:
    _numbers(parser, "batch", "rounds", "warmup")
    _device(parser)
    _dtypes(parser)
    _model(parser)
    _lengths(parser)
    _backends(parser)
    _beside(parser)
    _graphs(parser, "measure each also with its passes recorded")


def _step(given: dict[str, Any]) -> Report:
    """Time whole training steps of a model on random images."""
    from fambav.bench.step import step

    with _placed(given):
        _need_gpu(given, "--cuda-graphs")
        return step(**given)


def _latency_flags(parser: argparse.ArgumentParser) -> None:
    _numbers(parser, "rounds", "warmup")
    _device(parser)
    _dtypes(parser)
    _model(parser, MODELS)
    _plans(parser)
    _backends(parser, "the fastest")
    _beside(parser)
    _graphs(parser, "measure each also as a replay of what was recorded")


def _latency(given: dict[str, Any]) -> Report:
    """Time single images through models, from an idle device to the logits."""
    from fambav.bench.infer import latency

    with _placed(given):
        _need_gpu(given, "--cuda-graphs")
        return latency(**given)


def _infer_flags(parser: argparse.ArgumentParser) -> None:
    _latency_flags(parser)
    _numbers(parser, "batch")


def _infer(given: dict[str, Any]) -> Report:
    """Time forward passes over batches of images, without gradients."""
    from fambav.bench.infer import infer

    with _placed(given):
        _need_gpu(given, "--cuda-graphs")
        return infer(**given)


def _strategies_flags(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    _model(parser)
    _plans(parser, "; none is always measured")
    parser.add_argument("--backend", choices=SCAN_BACKENDS, help="the fastest by default")
    _graphs(parser, "with the passes of every step recorded")


def _strategies(given: dict[str, Any]) -> Report:
    """Time training steps with token fusion against none, and what merging costs."""
    from fambav.bench.strategies import strategies

    with _placed(given):
        _need_gpu(given, "--cuda-graphs")
        return strategies(**given)


def _reduction_flags(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    _model(parser, MODELS)
    parser.add_argument(
        "--method",
        nargs="+",
        choices=METHODS,
        dest="methods",
        default=METHODS,
        help="all that the model can carry out by default",
    )
    parser.add_argument(
        "--count",
        type=int,
        metavar="N",
        help="tokens that go; by default 5%% of the patches, or nearly so many that leave a grid",
    )


def _reduction(given: dict[str, Any]) -> Report:
    """Time each reduction method where it acts, in layers of the model."""
    from fambav.bench.reduction import reduction

    with _placed(given):
        return reduction(**given)


def _floors_flags(parser: argparse.ArgumentParser) -> None:
    _numbers(parser, "batch", "rounds", "warmup")
    _device(parser)
    _dtype(parser, "bfloat16 by default")
    _model(parser)
    parser.add_argument("--plan", default="none", help="such as upper:6:9, for the step")
    parser.add_argument(
        "--machine",
        choices=("h200",),
        default="h200",
        dest="name",
        help="what is counted for where there is no GPU",
    )
    parser.add_argument(
        "--clock-mhz",
        type=float,
        metavar="N",
        help="highest clock of the GPU's multiprocessors; nvidia-smi is asked for it by default",
    )
    parser.add_argument(
        "--aot",
        type=Path,
        default=TABLE,
        dest="table",
        metavar="FILE",
        help="what fambav bench aot wrote",
    )


def _floors(given: dict[str, Any]) -> Report:
    """Set kernels and a step beside the least time that they need on this GPU."""
    from fambav.bench.floors import floors

    clock = given.pop("clock_mhz")
    with _placed(given):
        return floors(**given, clock_hz=None if clock is None else 1e6 * clock)


def _check_flags(parser: argparse.ArgumentParser) -> None:
    _device(parser)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, dest="parts")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, dest="dtypes", default=None)
    parser.add_argument("--kernels", choices=("triton", "numba"), help="those for the device")
    _lengths(parser)
    _numbers(parser, "updates", "batch")


def _check(given: dict[str, Any]) -> Report:
    """Compare every kernel with float64, and train twice to the same bits."""
    from fambav.bench.check import check

    with _placed(given):
        return check(**given)


def _sweep_flags(parser: argparse.ArgumentParser) -> None:
    _numbers(parser, "batch", "rounds", "warmup", "dim", "state")
    _device(parser)
    _lengths(parser)
    for name in ("blocks", "warps"):
        parser.add_argument(
            f"--{name}", type=int, nargs="+", metavar="N", default=argparse.SUPPRESS
        )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, dest="dtypes", default=None)


def _sweep(given: dict[str, Any]) -> Report:
    """Find the fastest block sizes of the scan kernels."""
    from fambav.bench.sweep import sweep

    with _placed(given):
        return sweep(**given)


def _data_flags(parser: argparse.ArgumentParser) -> None:
    _numbers(parser, "batch", "batches", "rounds", "warmup")
    _device(parser)
    parser.add_argument("--input-size", type=int, metavar="N", default=224)
    parser.add_argument("--data-set", choices=DATA_SETS, metavar="NAME", default="DIGITS")
    parser.add_argument("--data-path", metavar="FOLDER", default="datasets")
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        metavar="N",
        default=argparse.SUPPRESS,
        help="loader processes; several numbers are measured in turn",
    )


def _data(given: dict[str, Any]) -> Report:
    """Count images that loader processes and a set on the device bring to training."""
    from fambav.bench.loading import loading

    with _placed(given):
        return loading(**given)


KINDS = {
    "scan": Kind(_scan, _scan_flags),
    "block": Kind(_block, _block_flags),
    "step": Kind(_step, _step_flags),
    "infer": Kind(_infer, _infer_flags),
    "latency": Kind(_latency, _latency_flags),
    "strategies": Kind(_strategies, _strategies_flags),
    "reduction": Kind(_reduction, _reduction_flags),
    "floors": Kind(_floors, _floors_flags),
    "check": Kind(_check, _check_flags),
    "sweep": Kind(_sweep, _sweep_flags),
    "data": Kind(_data, _data_flags),
}


@contextmanager
def _placed(given: dict[str, Any]) -> Iterator[None]:
    """Put the device and dtypes themselves in the place of their names."""
    # Read when a profiler starts; below this its library writes lines to the console.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    import torch

    from fambav.engine.runtime import processes

    with processes(given["device"]) as here:
        given["device"] = here.device
        if "dtype" in given:
            given["dtype"] = _typed(given["dtype"])
        if "dtypes" in given:
            names: Sequence[str] | None = given.pop("dtypes")
            given |= {} if names is None else {"dtypes": [getattr(torch, n) for n in names]}
        yield


def _typed(name: str | None) -> Any:
    import torch

    return None if name is None else getattr(torch, name)


def _need_gpu(given: dict[str, Any], flag: str) -> None:
    if given["cuda_graphs"] and given["device"].type != "cuda":
        raise ValueError(f"device is {given['device']}, expected a CUDA device with {flag}")
