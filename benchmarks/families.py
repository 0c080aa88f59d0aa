"""Forward passes and training steps of models of stages on a CPU, interleaved in one process.

    OMP_NUM_THREADS=1 python benchmarks/families.py --model vmamba_nano vssd_nano --batch 16
    OMP_NUM_THREADS=1 python benchmarks/families.py --model vmamba_tiny_s1l8 --peer convnext_tiny
    OMP_NUM_THREADS=1 python benchmarks/families.py --model vssd_tiny --growth

A model whose layers scan runs by the fastest backend and by the reference, a loop over the steps.
`--growth` compares forward passes on images of twice the side with those of the model's own.
Times are CPU time of the process, since what else runs on the machine counts little then; ratios
are medians over rounds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fambav.bench.candidates import use_backend
from fambav.bench.report import Report, Row, positive, settings
from fambav.bench.timing import ratio, spread
from fambav.cli import guarded
from fambav.commands.output import show
from fambav.commands.parser import Parser
from fambav.models import Backbone  # noqa: F401  registers the models
from fambav.registry import CLASSIFIERS, family_of
from fambav.timm_compat import timm

REFERENCE = "reference"
CPU = torch.device("cpu")

Key = tuple[str, str, int]  # model, backend, side of an image
Run = Callable[[], object]


def main(words: list[str]) -> None:
    """Time models of stages against their reference, against others and on larger images."""
    parser = Parser("benchmarks/families.py", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--model", nargs="+", default=["vmamba_nano"], help="which models")
    parser.add_argument("--peer", nargs="*", default=[], help="models of timm beside them")
    parser.add_argument("--batch", type=int, default=1, help="images of a pass")
    parser.add_argument("--rounds", type=int, default=5, help="passes of each")
    parser.add_argument("--growth", action="store_true", help="double the side of the images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    given = parser.parse_args(words)
    how: dict[str, Any] = dict(batch=given.batch, rounds=given.rounds, growth=given.growth)
    report = measure(given.model, given.peer, **how)
    show(report.text(), report.json(), given.json)


def measure(
    models: Sequence[str], peers: Sequence[str], *, batch: int, rounds: int, growth: bool
) -> Report:
    """Measure the forward pass and the training step of every model.

    Ratios are to the same model by the fastest backend (for peers, to the first model) on images of
    its own size.

    Raises:
        ValueError: If a number is too small.
    """
    positive(batch=batch, rounds=rounds)
    forwards, steps = dict[Key, Run](), dict[Key, Run]()
    for name in (*models, *peers):
        looped = name in CLASSIFIERS and family_of(name).scan and not growth
        for side in _sides(name, growth=growth):
            net = _net(name, side)
            for backend in ("fastest", REFERENCE)[: 1 + looped]:
                key = name, backend, side
                forwards[key], steps[key] = _runs(net, backend, (batch, 3, side, side))
    times = {"forward": _interleave(forwards, rounds)}
    if not growth:
        times["step"] = _interleave(steps, rounds)
    about = settings(CPU, torch.float32, batch=batch, rounds=rounds)
    rows = [_row(key, kind, own, models[0]) for kind, own in times.items() for key in own]
    return Report(title="models of stages, CPU time", settings=about, rows=rows)


def _sides(name: str, *, growth: bool) -> tuple[int, ...]:
    made: Any = timm.create_model(name)
    side = int(made.default_cfg["input_size"][-1])
    return (side, 2 * side) if growth else (side,)


def _net(name: str, side: int) -> nn.Module:
    torch.manual_seed(0)
    size: dict[str, Any] = {"img_size": side} if name in CLASSIFIERS else {}
    net: nn.Module = timm.create_model(name, **size)
    return net


def _runs(net: nn.Module, backend: str, size: Sequence[int]) -> tuple[Run, Run]:
    images, labels = torch.rand(size), torch.randint(0, 1000, (size[0],))
    chosen = REFERENCE if backend == REFERENCE else None

    def forward() -> None:
        with torch.inference_mode(), use_backend(chosen):
            net.eval()(images)

    def step() -> None:
        with use_backend(chosen):
            F.cross_entropy(net.train()(images), labels).backward()
        net.zero_grad()

    return forward, step


def _interleave(runs: Mapping[Key, Run], rounds: int) -> dict[Key, list[float]]:
    for run in runs.values():  # the first warms up
        run()
    times: dict[Key, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            start = time.process_time()
            run()
            times[key].append(1000 * (time.process_time() - start))
    return times


def _row(key: Key, kind: str, times: Mapping[Key, list[float]], first: str) -> Row:
    name, backend, side = key
    least = min(own for model, _, own in times if model == name)
    to_first: Any = next(own for other, own in times.items() if other[0] == first)
    return {
        "model": name,
        "pass": kind,
        "backend": backend if name in CLASSIFIERS else "torch",
        "side": side,
        **spread(times[key]),
        "to_own": ratio(times[key], times[name, "fastest", least]),
        "to_first": ratio(times[key], to_first),
    }


if __name__ == "__main__":
    raise SystemExit(guarded(main, sys.argv[1:]))
