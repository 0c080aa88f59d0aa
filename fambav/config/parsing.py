"""Where settings are read: the command line, YAML files, mappings; and the help that lists them.

Words are read here and not by argparse, which takes a value such as -1e-3 or -r for a flag, knows
no flag in two spellings without listing both, and prints its own errors over several lines.
"""

from __future__ import annotations

import difflib
import textwrap
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fambav.arguments import near_path
from fambav.config.checks import file_path
from fambav.config.legacy_flags import LAUNCHER, UNSUPPORTED
from fambav.config.schema import GROUPS, OPTIONS
from fambav.config.setting import (
    BASE,
    COMMAND,
    FILE,
    ConfigError,
    Option,
    Setting,
    format_value,
    from_data,
    from_text,
    options_of,
    refuse,
)
from fambav.registry import shipped

CONFIG = Option(
    "YAML file of settings; flags win over it",
    name="config",
    flag="config",
    default="",
    check=file_path,
)
_COLUMN = 37  # where the help explains
_WIDTH = 100  # of a line of the help
_REASON = 200  # characters of a reason that is not ours


def _spellings() -> dict[str, tuple[Option, bool]]:
    """Return what every name sets, and whether it switches that off; hyphens are underscores."""
    table = {}
    for option in (*OPTIONS.values(), *UNSUPPORTED.values(), *LAUNCHER.values(), CONFIG):
        for name in (option.name, option.flag, *option.also):
            table[name.replace("-", "_")] = option, False
            if option.name in OPTIONS and option.kind is bool:
                table[f"no_{name}".replace("-", "_")] = option, True
        if option.off:
            table[option.off.replace("-", "_")] = option, True
    return table


SPELLINGS = _spellings()
SHORT = {option.short: option.name for option in OPTIONS.values() if option.short}


def from_words(words: list[str]) -> dict[str, Setting]:
    """Read flags, each `--name value`, `--name=value`, `--name` or `--no-name`.

    Args:
        words: The command line after the name of the program.

    Returns:
        What was given, by setting; the last of several wins.

    Raises:
        ConfigError: If a word is not a flag, or its value cannot be used.
    """
    rest, given = deque(words), {}
    while rest:
        label, equals, value = rest.popleft().partition("=")
        if not _is_flag(label):
            raise ConfigError(
                f"{format_value(label + equals + value)} is not a flag, expected --name"
            )
        name = SHORT.get(label, label[2:].replace("-", "_"))
        if name not in SPELLINGS:
            raise ConfigError(f"{label} is not a flag; {_near(name, '--')}")
        option, off = SPELLINGS[name]
        if option.kind is bool:
            if equals:
                no = option.off or f"no-{option.flag}"
                refuse(label, value, f"no value; use --{option.flag} or --{no}")
            given[option.name] = Setting(not off, COMMAND, label)
            continue
        values = [value] if equals else []
        wanted = 0 if equals else len(rest) if option.kind is tuple else 1 + option.pair
        while rest and len(values) < wanted and not _is_flag(rest[0]):
            values.append(rest.popleft())
        if not values:
            raise ConfigError(f"{label} has no value, expected one after it")
        given[option.name] = Setting(from_text(option, values, label), COMMAND, label)
    return given


def _is_flag(word: str) -> bool:
    return word.startswith("--") or word.partition("=")[0] in SHORT


def read_flags(words: list[str]) -> dict[str, Any]:
    """Return the values of flags by the names of their settings, and of no others.

    Raises:
        ConfigError: If a word is not a flag, or its value cannot be used.
    """
    return {name: setting.value for name, setting in from_words(words).items()}


def read_settings(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of keyword arguments by the names of their settings, and of no others.

    Raises:
        ConfigError: If a key is unknown or given twice, or its value cannot be used.
    """
    return {name: setting.value for name, setting in from_mapping(mapping, COMMAND).items()}


def from_mapping(mapping: Mapping[Any, Any], level: int, where: str = "") -> dict[str, Setting]:
    """Read settings from keys and values.

    Args:
        mapping: Values by key; a key is a flag's name with underscores.
        level: Level of the values.
        where: Prefix of the labels, such as `FILE: `.

    Raises:
        ConfigError: If a key is unknown or given twice, or its value cannot be used.
    """
    given: dict[str, Setting] = {}
    for key, value in mapping.items():
        label = f"{where}{key}"
        if not isinstance(key, str) or key not in SPELLINGS or key == CONFIG.name:
            raise ConfigError(f"{where}{format_value(key)} is not a setting; {_near(str(key), '')}")
        option, off = SPELLINGS[key]
        if off:
            raise ConfigError(f"{label} is not a setting; write {option.name}: false")
        if option.name in given:
            raise ConfigError(f"{label} sets {option.name} twice, expected one of the two")
        given[option.name] = Setting(from_data(option, value, label), level, label)
    return given


def from_file(path: Path) -> dict[str, Setting]:
    """Read a YAML file and the one file that its `base` may name, relative to it.

    A file of configs/ that is not there is the one of that name that comes with the package.

    Raises:
        ConfigError: If a file cannot be read, or one of its settings cannot be used.
    """
    path = shipped(path)
    mapping = read_yaml(path)
    base = mapping.pop("base", None)
    given = from_mapping(mapping, FILE, f"{path}: ")
    if base is None:
        return given
    if not isinstance(base, str):
        refuse(f"{path}: base", base, "the path of a YAML file")
    check_path(f"{path}: base", base)
    parent = path.parent / base
    inherited = read_yaml(parent)
    if "base" in inherited:
        raise ConfigError(f"{path}: base is {base!r}, expected a file without a base of its own")
    return {**from_mapping(inherited, BASE, f"{parent}: "), **given}


def _near(name: str, prefix: str) -> str:
    """A hint for an unknown name, spelled as flags are if there is a prefix, else as keys are."""
    shapes = {
        name.lower(): f"{prefix}{option.off if off else option.flag}" if prefix else name
        for name, (option, off) in SPELLINGS.items()
        if not off or (prefix and option.off)
    }
    text = name.replace("-", "_").lower()
    first = text.split("_")[0]
    short = "".join(word[:1] for word in text.split("_"))  # lr of learning_rate
    close = [short] if len(short) > 1 and short in shapes else []
    close += difflib.get_close_matches(text, shapes, n=1, cutoff=0.8)
    close += difflib.get_close_matches(first, shapes, n=1, cutoff=0.8)  # epochs of epoch_count
    close += difflib.get_close_matches(text, shapes, n=1)
    return f"did you mean {shapes[close[0]]}?" if close else f"see {prefix or 'main.py --'}help"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a key may stand only once."""

    def construct_mapping(
        self,
        node: yaml.MappingNode,
        deep: bool = False,  # noqa: FBT001, FBT002  (PyYAML's signature)
    ) -> dict[Any, Any]:
        """Build a mapping, refusing a repeated key."""
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, times in keys.items():
            if times > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep=deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Take in the mappings that `<<` names, what several of them share once."""
        super().flatten_mapping(node)
        node.value = list({id(key): (key, value) for key, value in node.value}.values())


def read_yaml(path: Path) -> dict[Any, Any]:
    """Read the keys and values of a YAML file.

    Raises:
        ConfigError: If it cannot be read, is not YAML, gives a key twice or holds something else.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir() or _is_pipe_of_shell(path)):
            hint = "a pipe or a device may never end"
            raise ConfigError(f"config is {str(path)!r}, expected a plain file; {hint}")
        text = path.read_text(encoding="utf-8")
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        reason += near_path(path)
        raise ConfigError(f"config is {str(path)!r}, expected a readable file; {reason}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        reason = str(error.problem)[:_REASON]
        raise ConfigError(f"{path}: line {line} is not YAML; {reason}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:_REASON]
        raise ConfigError(f"{path} is not YAML; {reason}") from None
    except (LookupError, AttributeError, TypeError, ArithmeticError):
        raise ConfigError(f"{path} is not YAML; a value does not fit its tag") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        kind = type(tree).__name__
        raise ConfigError(f"{path} is a {kind}, expected lines such as `lr: 0.001`")
    return tree


def check_path(label: str, path: str) -> None:
    """Refuse a path to another file that no file system can hold.

    Raises:
        ConfigError: If it is one.
    """
    try:
        file_path(path)
    except ValueError as error:
        refuse(label, path, str(error))


def _is_pipe_of_shell(path: Path) -> bool:
    """Whether a path was made by `<(command)`, or is /dev/stdin."""
    return path.is_fifo() and path.is_relative_to("/dev")


def help_text(program: str, text: str) -> str:
    """Return the help of a program that takes every setting, described by `text`."""
    lines = [f"usage: {program} [--config FILE.yaml] [--name value ...]", "", text, ""]
    lines += ["Hyphens and underscores are the same.  Every switch has a --no- form.", ""]
    lines += _entry(CONFIG, CONFIG.text)
    for group in GROUPS.values():
        lines += ["", f"{group.__doc__}", f"  such as: {group.example}"]
        for option in options_of(group).values():
            lines += _entry(option, f"{option.text} ({format_value(option.default)})")
    flags = " ".join(f"--{option.flag}" for option in UNSUPPORTED.values())
    lines += ["", "Recognised, but refused when switched on:", *_wrapped(flags, "  ")]
    return "\n".join(lines)


def _entry(option: Option, text: str) -> list[str]:
    names = (option.short, f"--{option.flag}", f"--{option.off}" if option.off else "")
    head = "  " + ", ".join(filter(None, names))
    if option.choices:
        head += f" {{{','.join(option.names)}}}"
    elif option.kind is not bool:
        head += {int: " N", float: " X", tuple: " X X"}.get(option.kind, " TEXT")
        head += " [N]" if option.pair else ""
    lines = _wrapped(text, " " * _COLUMN)
    if len(head) > _WIDTH:
        return [*_wrapped(head.replace(",", ", ").strip(), "  "), *lines]
    if len(head) >= _COLUMN:
        return [head, *lines]
    return [head.ljust(_COLUMN) + lines[0].strip(), *lines[1:]]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
