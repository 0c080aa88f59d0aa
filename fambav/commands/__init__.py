"""The commands beside training: one module for each, whose `run` takes the words after its name.

The first line of `run`'s docstring stands in `fambav --help`.  What needs torch is imported when a
command runs, so that a mistake in a flag is an error at once.
"""

from types import ModuleType

from fambav.commands import (
    bench,
    doctor,
    evaluate,
    export,
    flops,
    names,
    pareto,
    plan,
    predict,
    report,
    search_plan,
    show,
    table,
    tune,
)

COMMANDS: dict[str, ModuleType] = {
    "plan": plan,
    "bench": bench,
    "flops": flops,
    "doctor": doctor,
    "list": names,
    "predict": predict,
    "evaluate": evaluate,
    "table": table,
    "pareto": pareto,
    "show": show,
    "report": report,
    "search-plan": search_plan,
    "tune": tune,
    "export": export,
}

__all__ = ["COMMANDS"]
