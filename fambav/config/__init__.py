"""Every setting of a run, and the ways to write one: flags, YAML and code."""

from fambav.config.checks import policy
from fambav.config.config import Config, load, parse
from fambav.config.model_settings import Fusion, Model, Reduction
from fambav.config.parsing import check_path, help_text, read_flags, read_settings, read_yaml
from fambav.config.samples import Augment, Data
from fambav.config.schema import (
    OPTIONS,
    Distillation,
    Optim,
    Run,
    affecting,
)
from fambav.config.setting import ConfigError, format_value, refuse

__all__ = [
    "OPTIONS",
    "Augment",
    "Config",
    "ConfigError",
    "Data",
    "Distillation",
    "Fusion",
    "Model",
    "Optim",
    "Reduction",
    "Run",
    "affecting",
    "check_path",
    "format_value",
    "help_text",
    "load",
    "parse",
    "policy",
    "read_flags",
    "read_settings",
    "read_yaml",
    "refuse",
]
