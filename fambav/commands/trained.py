"""Arguments that the commands on a trained model share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fambav import config
from fambav.config import Config, ConfigError, read_flags
from fambav.registry import METHODS, nearest

# Of the argument that names a trained model; engine.run_dir.weights_file has the whole rule.
RUN = "a run folder, whose best checkpoint is taken, an exported folder, or a file of weights"
# Settings of a method beside its schedule, by their names in `fambav.reduce`.
METHOD_SETTINGS = {
    "reduction_hook": "hook",
    "scan_policy": "scan",
    "gap_policy": "gap_policy",
    "class_token_policy": "class_policy",
    "reduction_options": "",
}


def refuse_method(name: str) -> None:
    """Refuse a method that there is not.

    Raises:
        ConfigError: If it is one.
    """
    if name not in METHODS:
        hint = nearest(name, METHODS)
        raise ConfigError(f"--method is {name!r}, expected a known name; {hint}")


def read_settings(
    path: Path, words: list[str]
) -> tuple[Config | None, dict[str, Any], dict[str, Any]]:
    """Read main.py's flags beside a checkpoint.

    Args:
        path: The checkpoint, a file or a folder.
        words: The flags.

    Returns:
        The settings of a file that is not ours, None without --model or --config; other settings;
        and those of a method.

    Raises:
        ConfigError: If the checkpoint is missing, a flag is unknown or has no meaning here.
    """
    if not path.exists():
        raise ConfigError(f"checkpoint is {path}, expected a file or a run that exists")
    given = read_flags(words)
    how = {name: given.pop(name) for name in METHOD_SETTINGS if name in given}
    for name in ("reduction", "reduction_schedule", *(n for n in given if n.startswith("fusion_"))):
        if name in given:
            raise ConfigError(f"--{name} has no meaning here, expected --method")
    if how.get("scan_policy") == "masked":
        raise ConfigError("--scan_policy is 'masked', expected one that saves something")
    if "config" in given:
        base = config.load(given.pop("config")).unreduced()
        return base.replace(**given) if given else base, {}, how
    if "model" in given:
        return Config.from_flat(given), {}, how
    return None, given, how


def reduction_arguments(method: str, how: dict[str, Any]) -> dict[str, Any]:
    """Return settings of a reduction under the names of `fambav.reduce`'s arguments."""
    from fambav.reduction import read_options

    options = read_options(method, how["reduction_options"]) if "reduction_options" in how else {}
    named = {METHOD_SETTINGS[name]: value for name, value in how.items() if METHOD_SETTINGS[name]}
    return {**named, **options}
