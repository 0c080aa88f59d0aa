"""Every setting of a run, and the ways to write one: flags, YAML and code."""

from fambav.config.config import Config, load, parse
from fambav.config.options import Augment, Data, Distillation, Fusion, Model, Optim, Reduction, Run
from fambav.config.policies import policy
from fambav.config.sources import help_text
from fambav.config.values import ConfigError

__all__ = [
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
    "help_text",
    "load",
    "parse",
    "policy",
]
