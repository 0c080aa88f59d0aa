"""fambav bench."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fambav.commands.output import show
from fambav.commands.parser import Parser

ARCHS = (75, 80, 86, 89, 90, 100, 120)  # compute capabilities that Triton compiles for


def run(words: list[str]) -> None:
    """Measure kernels, blocks, steps and what fusion saves, or what kernels compile to."""
    from fambav.bench.commands import KINDS

    given = vars(parser().parse_args(words))
    what = given.pop("what")
    if what in BENCHES:
        BENCHES[what][0](given)
        return
    target = given.pop("json")
    report = KINDS[what].run(given)
    show(report.text(), report.json(), target)
    report.refuse()


def parser() -> Parser:
    """Return the parser of `fambav bench`."""
    from fambav.bench.commands import KINDS

    parser = Parser("fambav bench", description=run.__doc__, allow_abbrev=False)
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, (measure, describe) in {**KINDS, **BENCHES}.items():
        kind = kinds.add_parser(
            name, description=measure.__doc__, help=measure.__doc__, allow_abbrev=False
        )
        describe(kind)
        kind.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


def _aot_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHS, default=[80, 90], help="compute capability"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="of a kernel's name")
    parser.add_argument("--against", type=Path, metavar="FILE", help="refuse what is worse there")


def _bench_aot(given: dict[str, Any]) -> None:
    """Compile the Triton kernels without a GPU and count registers, spills and instructions."""
    from fambav import ahead

    against: Path | None = given["against"]
    recorded = None if against is None else ahead.read(against)
    report = ahead.survey(given["arch"], only=given["only"])
    show(report.text(), report.json(), given["json"])
    if recorded is not None:
        ahead.compare(report, recorded, only=given["only"])


BENCHES = {"aot": (_bench_aot, _aot_flags)}
