"""fambav bench: the kinds, their flags, and what they call."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from fambav.commands.output import check_files, show
from fambav.commands.parser import Parser, natural, processes
from fambav.registry import CLASSIFIERS, DATA_SETS, FAMILIES, METHODS, SCAN_BACKENDS

VIMS = FAMILIES["vim"].models
IMAGE_SETS = [name for name, task in DATA_SETS.items() if task == "classification"]
DTYPES = ("float32", "bfloat16", "float16")
PLAN = "a schedule as of --reduction-schedule, such as upper:6:9, all:7 or r:5@3-23/2, or none"
NUMBER: dict[str, Any] = dict(type=natural, metavar="N")
SWITCH: dict[str, Any] = dict(action="store_true")
# What may be given to `add_flags`; a flag that is not given is left to the function's own default.
FLAGS: dict[str, dict[str, Any]] = {
    "batch": dict(NUMBER, help="images or sequences at once"),
    "batches": dict(NUMBER, help="batches that are read and timed in a round"),
    "rounds": dict(NUMBER, help="timed repetitions, of which the median counts"),
    "warmup": dict(NUMBER, help="repetitions before, which are not timed"),
    "dim": dict(NUMBER, help="channels of the scan"),
    "state": dict(NUMBER, help="states of each channel"),
    "input-size": dict(NUMBER, nargs="+", help="of images in pixels; or height and width"),
    "device": dict(metavar="NAME", default=None, help="cpu or cuda; a GPU if there is one"),
    "dtype": dict(choices=DTYPES, help="as in training by default"),
    "dtypes": dict(nargs="+", choices=DTYPES, help="several are measured in turn"),
    "lengths": dict(NUMBER, nargs="+", help="tokens; several are measured in turn; not of stages"),
    "backend": dict(choices=SCAN_BACKENDS, help="the fastest by default"),
    "names": dict(nargs="+", choices=SCAN_BACKENDS, help="what to compare"),
    "vim": dict(choices=VIMS, metavar="NAME", help="a Vim of `fambav list models`"),
    "model": dict(choices=CLASSIFIERS, metavar="NAME", help="one of `fambav list models`"),
    "plan": dict(metavar="PLAN", help=PLAN),
    "plans": dict(nargs="+", metavar="PLAN", help=PLAN),
    "method": dict(choices=METHODS, help="how tokens are fused"),
    "methods": dict(nargs="+", choices=METHODS, help="all that the model can carry out by default"),
    "count": dict(
        NUMBER,
        help="tokens that go; by default 5%% of the patches, or nearly so many that leave a grid",
    ),
    "peers": dict(
        nargs="+",
        metavar="NAME",
        help="models of timm to compare with, such as deit_tiny_patch16_224",
    ),
    "roofline": dict(
        SWITCH, help="measure peak compute and bandwidth in the same rounds, and shares of them"
    ),
    "profile": dict(SWITCH, help="report the share of every layer and of every kind of operation"),
    "cuda-graphs": dict(SWITCH, help="measure each also as a replay of a CUDA graph"),
    "data-set": dict(choices=IMAGE_SETS, metavar="NAME", help="one of `fambav list data-sets`"),
    "data-path": dict(metavar="FOLDER", help="where the data set is looked for"),
    "workers": dict(
        type=processes,
        metavar="N",
        nargs="+",
        help="loader processes; several are measured in turn",
    ),
}
SPELLED = dict(dtypes="dtype", lengths="length", names="backend", vim="model", plans="plan")
SPELLED |= dict(methods="method", peers="peer")

COMMON = "batch rounds warmup device dtype"
MODEL = "rounds warmup device dtypes names peers roofline profile cuda-graphs"
# By name: the function of fambav.bench, its flags, and what it does.
KINDS = {
    "scan": (
        "operations.scan",
        f"{COMMON} lengths dim state names",
        "Time the selective scan of a mixer and weigh what it keeps for the backward pass.",
    ),
    "block": (
        "operations.block",
        f"{COMMON} vim lengths names",
        "Time one block of a model, forward and backward.",
    ),
    "step": (
        "passes.step",
        f"{MODEL} batch model lengths",
        "Time whole training steps of a model on random images.",
    ),
    "infer": (
        "passes.infer",
        f"{MODEL} batch model plans method",
        "Time forward passes over batches of images, without gradients.",
    ),
    "latency": (
        "passes.latency",
        f"{MODEL} model plans method",
        "Time single images through models, from an idle device to the logits.",
    ),
    "strategies": (
        "strategies.strategies",
        f"{COMMON} vim plans method backend cuda-graphs",
        "Time training steps with token fusion against none, and what merging costs.",
    ),
    "reduction": (
        "reduction.reduction",
        f"{COMMON} model methods count",
        "Time each reduction method where it acts, in layers of the model.",
    ),
    "data": (
        "data_loader.loading",
        "batch batches rounds warmup device input-size data-set data-path workers",
        "Count images that loader processes and a set on the device bring to training.",
    ),
}


def run(words: list[str]) -> None:
    """Measure scans, blocks, steps, forward passes, and what fusion saves."""
    given = vars(parser().parse_args(words))
    module, function = KINDS[given.pop("what")][0].split(".")

    def measured(**given: Any) -> Any:
        return getattr(import_module(f"fambav.bench.{module}"), function)(**given)

    measure(measured, given)


def parser() -> Parser:
    """Return the parser of `fambav bench`."""
    parser = Parser("fambav bench", description=run.__doc__, allow_abbrev=False)
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, (_, flags, about) in KINDS.items():
        add_flags(kinds.add_parser(name, description=about, help=about, allow_abbrev=False), flags)
    return parser


def add_flags(parser: argparse.ArgumentParser, names: str) -> None:
    """Add flags of `FLAGS`, and where figures are written."""
    for name in names.split():
        flag = SPELLED.get(name, name)
        dest = flag if name == "vim" else name
        options = {"default": argparse.SUPPRESS, "dest": dest.replace("-", "_")} | FLAGS[name]
        parser.add_argument(f"--{flag}", **options)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")


def measure(function: Callable[..., Any], given: dict[str, Any]) -> None:
    """Call a benchmark with the values of flags, devices and dtypes as objects; print its report.

    Args:
        function: Returns a report.
        given: Values of flags by their names.

    Raises:
        ValueError: If CUDA graphs are wanted where there is no GPU.
    """
    target = given.pop("json")
    check_files(target)
    # Read when a profiler starts; below this its library writes lines to the console.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    import torch

    from fambav.engine.distributed import processes
    from fambav.ops import check_environment

    check_environment()
    with processes(given["device"]) as here:
        given["device"] = device = here.device
        if given.get("cuda_graphs") and device.type != "cuda":
            raise ValueError(f"device is {device}, expected a CUDA device with --cuda-graphs")
        if len(given.get("input_size", ())) == 1:
            (given["input_size"],) = given["input_size"]
        if "dtype" in given:
            given["dtype"] = getattr(torch, given["dtype"])
        if "dtypes" in given:
            given["dtypes"] = [getattr(torch, name) for name in given["dtypes"]]
        report = function(**given)
    show(report.text(), report.json(), target)
