"""Training steps of the reduction methods at equal tokens, on a CPU, interleaved in one process.

    OMP_NUM_THREADS=1 python benchmarks/reduced_steps.py --model vim_micro

Every row is compared with no reduction and with `ordered`, which is the cheapest to choose by and
reads nothing of the mixer.  All remove tokens after the mixer of layers 1 to 3, on images of 32 x
32; `storm`, which has to leave a grid, is compared with an `ordered` of its own lengths.  Times are
CPU time of the process, since what else runs on the machine counts little then; ratios are medians
over rounds.  Memory is the bytes that autograd saves for the backward pass.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from fambav.bench.report import Report, Row, positive, settings
from fambav.bench.timing import peak_mib, ratio, spread
from fambav.cli import guarded
from fambav.commands.output import show
from fambav.commands.parser import Parser
from fambav.models import Backbone
from fambav.reduction import reduce
from fambav.registry import family_of
from fambav.timm_compat import timm

MODELS = ("vim_micro", "plainmamba_micro")
SHARE, GRID = "keep:0.815@1-3", "tokens:49,36@1,3"  # 0.70 of the token-layers
NONE, PLAIN, PLAIN_GRID = "none", "ordered", "ordered on a grid"
CPU = torch.device("cpu")


class Case(NamedTuple):
    """A reduction.

    Attributes:
        method: Its name.
        options: Of `reduce`.
        schedule: Where and how many.
    """

    method: str
    options: Mapping[str, Any]
    schedule: str = SHARE


def _cases() -> dict[str, Case]:
    after = dict(hook="after")
    cases = {PLAIN: Case("ordered", after)}
    for method in ("ordered", "prune-aligned"):
        for gap in ("bias", "self", "hold_prev", "cached"):
            how = dict(after, scan="aligned", gap_policy=gap)
            cases[f"{method}, {gap}"] = Case(method, how)
    cases["ordered, masked"] = Case("ordered", dict(after, scan="masked"))
    cases |= {method: Case(method, after) for method in ("evit", "mtr", "utrc", "stm", "r-meeto")}
    for metric in ("B", "delta"):
        cases[f"r-meeto by {metric}"] = Case("r-meeto", dict(after, metric=metric))
    cases["storm"] = Case("storm", after, GRID)
    cases[PLAIN_GRID] = Case("ordered", after, GRID)
    return cases


def main(words: list[str]) -> None:
    """Time training steps of reduced models and count what they save for the backward pass."""
    parser = Parser("benchmarks/reduced_steps.py", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="which model")
    parser.add_argument("--batch", type=int, default=16, help="images of a step")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each row")
    parser.add_argument("--only", default="", metavar="TEXT", help="of a row's name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    given = parser.parse_args(words)
    report = measure(given.model, batch=given.batch, rounds=given.rounds, only=given.only)
    show(report.text(), report.json(), given.json)


def measure(model: str, *, batch: int, rounds: int, only: str = "") -> Report:
    """Measure every row whose name contains `only`, and those that it is compared with.

    Raises:
        ValueError: If a number is too small.
    """
    positive(batch=batch, rounds=rounds)
    names = {NONE: None} | {
        name: case for name, case in _cases().items() if only in name or name in (PLAIN, PLAIN_GRID)
    }
    nets = {name: _net(model, case) for name, case in names.items()}
    images, labels = torch.rand(batch, 3, 32, 32), torch.randint(0, 10, (batch,))

    def step(net: nn.Module) -> None:
        F.cross_entropy(net(images), labels).backward()
        net.zero_grad()

    memory = {}
    for name, net in nets.items():  # the first step warms up
        memory[name] = peak_mib(lambda net=net: step(net), CPU, ignored=net.parameters())  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in nets}
    for _ in range(rounds):
        for name, net in nets.items():
            start = time.process_time()
            step(net)
            times[name].append(1000 * (time.process_time() - start))
    about = settings(CPU, torch.float32, model=model, batch=batch, rounds=rounds)
    rows = [_row(name, nets[name], times, memory) for name in nets]
    return Report(title="training steps of reduced models, CPU time", settings=about, rows=rows)


def _net(model: str, case: Case | None) -> nn.Module:
    torch.manual_seed(0)
    alignable = "param_order" in family_of(model).arguments
    form: dict[str, Any] = {"param_order": "permuted"} if alignable else {"class_token": "none"}
    net: nn.Module = timm.create_model(model, num_classes=10, **form).train()
    return net if case is None else reduce(net, case.method, case.schedule, **case.options)


def _row(
    name: str, net: nn.Module, times: Mapping[str, list[float]], memory: Mapping[str, float]
) -> Row:
    peer = PLAIN_GRID if name == "storm" else PLAIN
    return {
        "row": name,
        "token_layers": cast(Backbone, net).schedule.share,
        "median_ms": spread(times[name])["median_ms"],
        "time_to_none": ratio(times[name], times[NONE]),
        "time_to_ordered": ratio(times[name], times[peer]),
        "saved_mib": memory[name],
        "saved_to_none": memory[name] / memory[NONE],
        "saved_to_ordered": memory[name] / memory[peer],
    }


if __name__ == "__main__":
    raise SystemExit(guarded(main, sys.argv[1:]))
