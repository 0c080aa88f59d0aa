"""fambav list."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from fambav import registry
from fambav.commands.parser import Parser

NAMES: dict[str, Sequence[str]] = {
    "models": registry.MODELS,
    "strategies": (
        *registry.STRATEGIES,
        *(f"{alias} = {name}" for alias, name in registry.STRATEGY_ALIASES.items()),
    ),
    "methods": registry.METHODS,
    "data-sets": tuple(registry.DATA_SETS),
    "backends": registry.SCAN_BACKENDS,
}


def run(words: list[str]) -> None:
    """Print the names that a flag may take."""
    parser = Parser("fambav list", description=run.__doc__)
    parser.add_argument("kind", choices=KINDS)
    kind = parser.parse_args(words).kind
    print(*(_READ[kind]() if kind in _READ else NAMES[kind]), sep="\n")


def _options() -> list[str]:
    """Each method's options with their defaults, as --reduction-options takes them."""
    from fambav import reduction

    known = {method: reduction.known_options(method) for method in registry.METHODS}
    lines = {
        method: ",".join(f"{name}={str(value).lower()}" for name, value in options.items())
        for method, options in known.items()
    }
    return [f"{method:<14} {text or '-'}" for method, text in lines.items()]


_READ: dict[str, Callable[[], Collection[str]]] = {
    "options": _options,
    "grids": registry.grids,
    "configs": registry.configs,
}
KINDS = (*NAMES, *_READ)
