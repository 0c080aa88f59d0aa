"""A parser of flags whose errors are one line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fambav.config import ConfigError
from fambav.config.setting import COUNT, NATURAL, PROCESSES, Bounds, Option, from_text


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line; hyphens and underscores are the same in it."""

    def parse_known_args(  # type: ignore[override]  # argparse takes any sequence
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Spell flags as they were added, and parse them."""
        known = {name.replace("_", "-"): name for name in self._option_string_actions}
        words = []
        for word in sys.argv[1:] if args is None else args:
            name, equals, value = word.partition("=")
            own = known.get(name.replace("_", "-"), name) if name.startswith("--") else name
            words.append(own + equals + value)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise the message as one line.

        Raises:
            ConfigError: Always.
        """
        message = re.sub(r"^argument (\S+): is ", r"\1 is ", message)
        raise ConfigError(f"{message}; see {self.prog} --help")


def number(kind: type, bounds: Bounds) -> Callable[[str], Any]:
    """Return the `type` of a flag: reads finite numbers of a kind within bounds."""
    option = Option("", kind=kind, bounds=bounds)

    def read(text: str) -> Any:
        try:
            return from_text(option, [text], "")
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error).strip()) from None

    return read


count, natural = number(int, COUNT), number(int, NATURAL)
processes = number(int, PROCESSES)
