"""The commands: one module for each, whose `run` takes the words after its name.

The first line of `run`'s docstring stands in `fambav --help`.  What needs torch is imported when a
command runs, so that a mistake in a flag is an error at once.
"""

from types import ModuleType

from fambav.commands import (
    bench,
    completion,
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
    train,
    tune,
)

_CONFIG = "configs/digits/vim_micro_upper.yaml"
# Concerns with their commands, and an example.
CONCERNS: tuple[tuple[str, dict[str, ModuleType], str], ...] = (
    (
        "Train, and use what was trained",
        {"train": train, "evaluate": evaluate, "predict": predict, "export": export},
        f"fambav train --config {_CONFIG} --output_dir output/run",
    ),
    (
        "Plan and count, without training",
        {"plan": plan, "flops": flops, "search-plan": search_plan, "tune": tune},
        "fambav plan --model vim_tiny --fusion-strategy upper --fusion-layer 6 --fusion-token 9",
    ),
    (
        "Compare and look",
        {"table": table, "pareto": pareto, "show": show, "report": report},
        "fambav table output/run output/other",
    ),
    (
        "This machine, and names",
        {"bench": bench, "doctor": doctor, "list": names, "completion": completion},
        "fambav list models",
    ),
)
COMMANDS: dict[str, ModuleType] = {
    name: command for _, commands, _ in CONCERNS for name, command in commands.items()
}


def help_text() -> str:
    """Return the commands by concern, each with the first line of what it does."""
    lines = ["usage: fambav COMMAND ...", "       fambav COMMAND --help", "       fambav --version"]
    for concern, commands, example in CONCERNS:
        lines += ["", concern]
        lines += [
            f"  {name:<12} {(command.run.__doc__ or '').splitlines()[0]}"
            for name, command in commands.items()
        ]
        lines += [f"  such as: {example}"]
    return "\n".join(lines)


__all__ = ["COMMANDS", "CONCERNS", "help_text"]
