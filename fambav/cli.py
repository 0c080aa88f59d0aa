"""The command line.

main.py      train or evaluate
fambav ...   plan, bench, flops, doctor, list, predict, table

A user's mistake is one line that begins with `error:`, and status 2; a run that diverged is 3, a
full disk 4; a bug keeps its traceback.
"""

from __future__ import annotations

import argparse
import errno
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from fambav import config, registry
from fambav.config import ConfigError

Words = list[str]

PACKAGE = Path(__file__).parent
STATUS = {"DivergedError": 3}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ARCHS = (75, 80, 86, 89, 90, 100, 120)  # compute capabilities that Triton compiles for
NAMES: dict[str, Sequence[str]] = {
    "models": registry.MODELS,
    "strategies": (
        *registry.STRATEGIES,
        *(f"{alias} = {name}" for alias, name in registry.STRATEGY_ALIASES.items()),
    ),
    "methods": registry.METHODS,
    "data-sets": registry.DATA_SETS,
    "backends": registry.SCAN_BACKENDS,
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{message}; see {self.prog} --help")


def main(argv: Words | None = None) -> int:
    """Train or evaluate as the flags say; return the exit status."""
    return _guarded(_train, sys.argv[1:] if argv is None else argv)


def console(argv: Words | None = None) -> int:
    """Run one of the commands beside training; return the exit status."""
    return _guarded(_command, sys.argv[1:] if argv is None else argv)


def _train(words: Words) -> int:
    if {"-h", "--help"} & set(words):
        print(config.help_text("main.py", "Train or evaluate a model."))
        return 0
    run = config.parse(words)
    if run.notice and _speaks():
        print(run.notice, flush=True)
    from fambav import build

    return int(build.run(run))


def _command(words: Words) -> int:
    if not words:
        raise ConfigError(f"command is missing, expected one of {', '.join(COMMANDS)}")
    name, *rest = words
    if name in ("-h", "--help"):
        print("usage: fambav COMMAND ...\n")
        print("\n".join(f"  {name:<8} {command.__doc__}" for name, command in COMMANDS.items()))
        return 0
    if name not in COMMANDS:
        hint = registry.nearest(name, COMMANDS)
        raise ConfigError(f"command is {name!r}, expected a known name; {hint}")
    COMMANDS[name](rest)
    return 0


def plan(words: Words) -> None:
    """Print how many tokens each layer sees, with main.py's flags, without training."""
    if {"-h", "--help"} & set(words):
        print(config.help_text("fambav plan", f"{plan.__doc__}"))
        return
    run = config.parse(words)
    if run.notice:
        print(run.notice)
    from fambav import build

    print(build.reduction(run).told())


def bench(words: Words) -> None:
    """Measure kernels, blocks, steps and what fusion saves, or what kernels compile to."""
    from fambav.bench.commands import KINDS

    given = vars(bench_parser().parse_args(words))
    what = given.pop("what")
    if what in BENCHES:
        BENCHES[what][0](given)
        return
    target = given.pop("json")
    report = KINDS[what].run(given)
    _show(report.text(), report.json(), target)
    report.refuse()


def bench_parser() -> Parser:
    """Return the parser of `fambav bench`."""
    from fambav.bench.commands import KINDS

    parser = Parser("fambav bench", description=bench.__doc__, allow_abbrev=False)
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
    _show(report.text(), report.json(), given["json"])
    if recorded is not None:
        ahead.compare(report, recorded, only=given["only"])


def _show(text: str, figures: str, target: Path | None) -> None:
    print(text)
    if target is not None:
        target.write_text(figures + "\n")


def flops(words: Words) -> None:
    """Count what an image costs each part of a model, with main.py's flags, without running it."""
    parser = Parser("fambav flops", add_help=False, allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true")
    if {"-h", "--help"} & set(words):
        own = "--json FILE writes the counts there too, --markdown prints a Markdown table."
        print(config.help_text("fambav flops", f"{flops.__doc__}\n{own}"))
        return
    given, flags = parser.parse_known_args(words)
    run = config.parse(flags)
    if run.notice:
        print(run.notice)
    from fambav import costs

    report = costs.configured(run)
    _show(report.markdown() if given.markdown else report.text(), report.json(), given.json)


def doctor(words: Words) -> None:
    """Print versions, devices and which implementations can run here."""
    Parser("fambav doctor", description=doctor.__doc__).parse_args(words)
    import torch

    from fambav import ecosystem, ops

    print(f"python      {platform.python_version()} on {platform.platform()}")
    for name in ("torch", "torchvision", "timm", "pillow", "triton", "numba"):
        note = f" ({ecosystem.TORCHVISION})" if name == "torchvision" else ""
        print(f"{name:<11} {_version(name)}{note}")
    print(f"cpu         {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        print(f"cuda:{index}      {torch.cuda.get_device_name(index)}, {memory:.0f} GiB")
    if not torch.cuda.device_count():
        print(f"cuda        none (torch was built {_built(torch.version.cuda)})")
    for op, backend, reason in ops.backends():
        print(f"{op:<16} {backend:<10} {'runs here' if reason is None else f'no: {reason}'}")


def names(words: Words) -> None:
    """Print the names that a flag may take."""
    parser = Parser("fambav list", description=names.__doc__)
    parser.add_argument("kind", choices=(*NAMES, "options"))
    kind = parser.parse_args(words).kind
    print(*(_options() if kind == "options" else NAMES[kind]), sep="\n")


def _options() -> list[str]:
    """Each method's options with their defaults, as --reduction-options takes them."""
    from fambav import reduction

    known = {method: reduction.known_options(method) for method in registry.METHODS}
    lines = {
        method: ",".join(f"{name}={str(value).lower()}" for name, value in found.items())
        for method, found in known.items()
    }
    return [f"{method:<14} {text or '-'}" for method, text in lines.items()]


def predict(words: Words) -> None:
    """Print the most likely classes of images under a checkpoint."""
    flags = next((n for n, word in enumerate(words) if word.startswith("-")), len(words))
    parser = Parser(
        "fambav predict",
        usage="fambav predict CHECKPOINT IMAGE ... [--topk N] [--device NAME] [--model NAME ...]",
        description=predict.__doc__,
        epilog="A file that is not ours needs --model and whatever else describes it to main.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--topk", type=int, default=5, metavar="N")
    parser.add_argument("--device", metavar="NAME")
    given, rest = parser.parse_known_args(words[flags:])
    if given.topk < 1:
        raise ConfigError(f"--topk is {given.topk}, expected at least 1")
    if flags < 2:
        raise ConfigError("images are missing, expected fambav predict CHECKPOINT IMAGE ...")
    model = config.parse(rest) if rest else None
    checkpoint, *images = words[:flags]
    from fambav import build

    found = build.predict(checkpoint, images, config=model, device=given.device, topk=given.topk)
    for image, guesses in zip(images, found, strict=True):
        print(image)
        for name, share in guesses:
            print(f"  {100 * share:5.1f}%  {name}")


def table(words: Words) -> None:
    """Compare finished runs, differences to the first; or run a grid of settings and seeds."""
    parser = Parser("fambav table", description=table.__doc__, allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    _grid_flags(parser.add_argument_group("a grid of settings and seeds instead of runs"))
    given = parser.parse_args(words)
    if given.grid is not None:
        _table_of_grid(given)
        return
    if not given.runs:
        raise ConfigError("the following arguments are required: RUN, or --grid FILE.yaml")
    if given.output_dir or given.jobs or given.keep:
        raise ConfigError("--output_dir, --jobs and --keep have no meaning without --grid")
    from fambav import comparison

    rows = [comparison.read(folder) for folder in given.runs]
    print(comparison.table(rows, markdown=given.markdown))


def _grid_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--grid", type=Path, metavar="FILE.yaml", help="what to run and compare")
    group.add_argument(
        "--output_dir", "--output-dir", type=Path, metavar="DIR", help="gets the runs and the table"
    )
    group.add_argument("--jobs", type=int, metavar="N", help="processes that train at once (1)")
    group.add_argument("--keep", action="store_true", help="keep every run's checkpoints")


def _table_of_grid(given: argparse.Namespace) -> None:
    """Run what is missing of a grid, and print its table; what is finished is not run again."""
    if given.runs or given.output_dir is None:
        raise ConfigError("--grid stands without runs, expected --grid FILE.yaml --output_dir DIR")
    jobs = 1 if given.jobs is None else given.jobs
    if jobs < 1:
        raise ConfigError(f"--jobs is {jobs}, expected at least 1")
    from fambav import experiments

    def say(line: str) -> None:
        print(line, flush=True)

    grid, folder = experiments.read(given.grid), given.output_dir
    found = experiments.run(grid, folder, jobs=jobs, keep=given.keep, say=say)
    print(experiments.table(grid, found, markdown=given.markdown))
    experiments.refuse_failures(grid, found, folder)


COMMANDS: dict[str, Callable[[Words], None]] = {
    "plan": plan,
    "bench": bench,
    "flops": flops,
    "doctor": doctor,
    "list": names,
    "predict": predict,
    "table": table,
}


BENCHES = {"aot": (_bench_aot, _aot_flags)}


def _guarded(function: Callable[[Words], int], words: Words) -> int:
    """Call `function`; turn what is not a bug into a line and a status."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # Read when torch loads its thread pool.  By default idle threads spin for milliseconds: on
        # cores that are shared with other programs a step then takes up to twenty times as long.
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    try:
        status = function(words)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read our lines has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return _tell("interrupted", 130)
    except SystemExit as stop:  # argparse has printed its help
        return stop.code if isinstance(stop.code, int) else 0
    except OSError as error:
        if error.errno in FULL:
            return _tell(f"error: {_reason(error)}; nothing saved before is lost", 4)
        if error.filename is None:
            raise
        return _tell(f"error: {_reason(error)}", 2)
    except (ValueError, RuntimeError) as error:
        if not _is_ours(error):
            raise
        return _tell(f"error: {_one_line(error)}", STATUS.get(type(error).__name__, 2))


def _is_ours(error: Exception) -> bool:
    """Whether this package raised it on purpose: its own class, or a ValueError of its own."""
    if type(error).__module__.split(".")[0] == __package__:
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    source = Path(trace.tb_frame.f_code.co_filename) if trace else Path()
    return type(error) is ValueError and source.is_relative_to(PACKAGE)


def _one_line(error: Exception) -> str:
    """The message in one line; of one that a loader process passed on, without its traceback."""
    text = str(error)
    if "Original Traceback" in text:
        kind = f"{type(error).__module__}.{type(error).__qualname__}: "
        text = text.rpartition("\n" + kind)[2]
    return " ".join(text.split())


def _reason(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{(error.strerror or str(error)).lower()}"


def _tell(line: str, status: int) -> int:
    if _speaks():
        print(line, file=sys.stderr)
    return status


def _speaks() -> bool:
    """Whether this is the one process of a launched run that talks to the user."""
    return os.environ.get("RANK", "0") in ("", "0")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _built(cuda: str | None) -> str:
    return "without CUDA" if cuda is None else f"for CUDA {cuda}"
