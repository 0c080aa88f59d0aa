"""A parser of flags whose errors are one line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any, NoReturn

from fambav.config import ConfigError
from fambav.config.setting import COUNT, NATURAL, PROCESSES, Bounds, Option, from_text


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

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
