"""The commands beside training: one module for each, whose `run` takes the words after its name.

The first line of `run`'s docstring is what `fambav --help` says.  What needs torch is imported when
a command runs, so that a mistake in a flag is told at once.
"""

from types import ModuleType

from fambav.commands import bench, doctor, flops, names, plan, predict, table

COMMANDS: dict[str, ModuleType] = {
    "plan": plan,
    "bench": bench,
    "flops": flops,
    "doctor": doctor,
    "list": names,
    "predict": predict,
    "table": table,
}

__all__ = ["COMMANDS"]
