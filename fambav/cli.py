"""The command line.

main.py      train or evaluate, as `fambav train` does
fambav ...   the commands of fambav.commands

A user's mistake is one line that begins with `error:`, and status 2; NaN or infinity 3, a full
disk 4, samples that cannot be read 5, full memory 6, SIGTERM after the state is saved 143;
a bug keeps its traceback.  A warning is one line that begins with `warning:`.
"""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fambav
from fambav import launcher, registry
from fambav.commands import COMMANDS, help_text
from fambav.config import ConfigError
from fambav.text import printable

Words = list[str]

PACKAGE = Path(__file__).parent
STATUS = {
    "DivergedError": 3,
    "NotFiniteError": 3,
    "NotFiniteWeightsError": 3,
    "LoaderError": 5,
}
_VERSION = "--version"
_LINE = 200  # characters of another library's line
_UNGUARDED = (
    "a process that the script started imports it and calls main() again, expected the call under"
    ' if __name__ == "__main__":'
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Words | None = None) -> int:
    """Train or evaluate; return the exit status."""
    return guarded(_train, sys.argv[1:] if argv is None else argv)


def console(argv: Words | None = None) -> int:
    """Run one of the commands, of which `train` is one; return the exit status."""
    return guarded(_command, sys.argv[1:] if argv is None else argv)


def _train(words: Words) -> int:
    return COMMANDS["train"].run(words, "main.py") if words != [_VERSION] else _print_version()


def _command(words: Words) -> int | None:
    if not words:
        raise ConfigError(f"command is missing, expected one of {', '.join(COMMANDS)}")
    name, *rest = words
    if name == _VERSION:
        return _print_version()
    if name in ("-h", "--help"):
        print(help_text())
        return 0
    if name not in COMMANDS:
        hint = registry.nearest(name, COMMANDS)
        raise ConfigError(f"command is {name!r}, expected a known name; {hint}")
    status: int | None = COMMANDS[name].run(rest)
    return status


def _print_version() -> int:
    print(f"fambav {fambav.__version__}")
    return 0


def guarded(function: Callable[[Words], int | None], words: Words) -> int:
    """Call `function`; turn what is not a bug into a line and a status."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # imports __main__
        return _print_error(f"error: {_UNGUARDED}", 2)
    if "OMP_WAIT_POLICY" not in os.environ:
        # Read when torch loads its thread pool.  By default idle threads spin for milliseconds: on
        # cores that are shared with other programs a step then takes up to twenty times as long.
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # one that knows fewer characters than our lines
            stream.reconfigure(errors="backslashreplace")
    try:
        with _short_warnings():
            status = function(words)
        sys.stdout.flush()
        return status or 0
    except BrokenPipeError:  # whoever read our lines has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return _print_error("interrupted", 130)
    except SystemExit as stop:  # argparse has printed its help
        return stop.code if isinstance(stop.code, int) else 0
    except (OSError, ValueError, RuntimeError, MemoryError, ModuleNotFoundError) as error:
        line, code = _failure(error)
        if code is None:
            raise
        return _print_error(
            f"error: {line}", code, every_rank=isinstance(error, launcher.LauncherError)
        )


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Let Python's warnings be lines on stderr, without the place in the source."""
    before = warnings.showwarning

    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        _print_error(f"warning: {_one_line(message)}", 0)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _failure(error: Exception) -> tuple[str, int | None]:
    """Return an error's line and exit status; no status for a bug."""
    kind, line = type(error).__name__, _one_line(error)
    if isinstance(error, ModuleNotFoundError):
        own = (error.name or __package__).split(".")[0] == __package__
        return _not_installed(error), None if own else 2
    if isinstance(error, OSError):
        if error.errno in FULL or kind == "UnsavedError":
            return f"{_reason(error)}; nothing saved before is lost", 4
        return _reason(error), None if error.filename is None else 2
    hint = "a smaller --batch-size with --grad-accum-steps, or --grad-checkpointing, needs less"
    if isinstance(error, MemoryError) or "can't allocate memory" in line:  # of numpy, of torch
        return f"memory is full; {hint} ({line[:_LINE]})", 6
    if kind == "OutOfMemoryError":
        return f"memory of the device is full; {hint} ({line})", 6
    return line, STATUS.get(kind, 2) if _is_ours(error) else None


def _not_installed(error: ModuleNotFoundError) -> str:
    return (
        f"package {error.name} is not installed for {sys.executable}, expected the Python of an"
        " environment that has it; bash scripts/quickstart.sh makes .venv, and"
        " source .venv/bin/activate enters it"
    )


def _is_ours(error: Exception) -> bool:
    """Whether this package raised it on purpose: its own class, or a ValueError of its own."""
    if type(error).__module__.split(".")[0] == __package__:
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    source = Path(trace.tb_frame.f_code.co_filename) if trace else Path()
    return type(error) is ValueError and source.is_relative_to(PACKAGE)


def _one_line(error: Exception | str) -> str:
    """The message in one line; of one that a loader process passed on, without its traceback."""
    text = str(error)
    if "Original Traceback" in text:
        kind = f"{type(error).__module__}.{type(error).__qualname__}: "
        text = text.rpartition("\n" + kind)[2]
    return " ".join(text.split())


def _reason(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{(error.strerror or str(error)).lower()}"


def _print_error(line: str, status: int, *, every_rank: bool = False) -> int:
    if every_rank or launcher.may_be_first(os.environ):
        print(printable(line), file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(console())
