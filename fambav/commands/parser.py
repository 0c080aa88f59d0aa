"""A parser of flags whose errors are one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from fambav.config import ConfigError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as one line.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{message}; see {self.prog} --help")
