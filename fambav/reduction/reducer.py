"""The interface of every reduction method.

A method is a class with `select` and `limit`, registered by name.  It chooses which tokens are
kept, which are merged into others and which are dropped; `apply` does that to everything a token
carries, and `Reduction` at which layers, at which point of a block, and how the scan goes on.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar, cast

from torch import nn

from fambav.arguments import flag, known_name, refusal, whole
from fambav.layers import BackboneInfo, Tokens
from fambav.ops.match import Selection
from fambav.registry import HOOKS, REDUCERS, nearest

Indices = tuple[int, ...]
Grid = tuple[int, int]

OPTION = "reduction option"  # what a refusal calls one
_WORDS = {"true": True, "false": False}


class Reducer(nn.Module, ABC):
    """Chooses which tokens stay.  Its options are keyword-only arguments with defaults.

    The attributes are what the method does by default.

    Attributes:
        hook: Where tokens go: "before" the add of a block, "between" its norm and mixer, or
            "after" its mixer.
        hooks: Where they may go.
        scan: What the scan makes of it, one of `registry.SCAN_POLICIES`.
        gap_policy: How the state ages if that is "aligned", one of `registry.GAP_POLICIES`.
        class_policy: Where the class token goes, one of `registry.CLASS_TOKEN_POLICIES`.
        ordered: Whether kept tokens are in the order of the scan.
        weighted: Whether the mean of a group counts the patches behind each token.
        summed: Whether a group becomes the plain sum of its tokens instead of a mean.
        needs: Intermediates of the mixer before it that it reads, fields of `Intermediates`.
        name: What it is registered as.
    """

    hook: ClassVar[str] = "between"
    hooks: ClassVar[tuple[str, ...]] = HOOKS
    scan: ClassVar[str] = "compact"
    gap_policy: ClassVar[str] = "bias"
    class_policy: str = "exact"
    ordered: bool = True
    weighted: bool = True
    summed: bool = False
    needs: frozenset[str] = frozenset()
    name: str = "a method"

    def check(self, info: BackboneInfo) -> None:
        """Refuse a model for which the method's options mean nothing.

        Raises:
            ValueError: If it is one.
        """
        del info

    @abstractmethod
    def select(self, tokens: Tokens, count: int) -> Selection:
        """Choose `count` >= 1 tokens of every sequence that go, and never a class token.

        Args:
            tokens: Sequences of equal length, with the `intermediates` that the method needs.
            count: At most `limit`.
        """

    @abstractmethod
    def limit(self, length: int, cls_index: Indices) -> int:
        """Return how many of `length` tokens can go at once, whatever their features."""

    def cls_index_after(self, length: int, cls_index: Indices, count: int) -> set[Indices]:
        """Return where the class tokens may be after `count` of `length` tokens went.

        Matters only to a `limit` that depends on more than the number of class tokens.
        """
        return {cls_index}

    def grid_after(self, grid: Grid | None, count: int) -> Grid | None:
        """Return the grid that the patches form after `count` went; None if they form none.

        Raises:
            ValueError: If the method needs a grid, with what was expected as its text.
        """
        return None

    @classmethod
    def published(cls, info: BackboneInfo) -> str | None:
        """Return the schedule of the method's paper for such a model; None if it has none."""
        return None

    @classmethod
    def presumed(cls, info: BackboneInfo) -> bool:
        """Return whether that schedule is ours, since the paper does not give its own."""
        return False


def make_reducer(name: str, **options: Any) -> Reducer:
    """Build the method registered as `name`.

    Raises:
        ValueError: If there is no method of that name, or it has no such option or value.
    """
    build = REDUCERS[name]
    known = known_options(name)
    for option in options:
        _check_option(name, option, known)
    made = cast(Reducer, build(**options))
    made.name = name
    return made


def read_options(name: str, text: str) -> dict[str, Any]:
    """Read a method's options as written on a command line, such as "order=lost,weighted=false".

    A value has the type of the option's default.

    Raises:
        ValueError: If the method or an option is unknown, or a value cannot be read.
    """
    known, found = known_options(name), dict[str, Any]()
    if not isinstance(text, str):
        raise refusal("reduction_options", text, "a text of key=value pairs")
    for part in filter(None, (part.strip() for part in text.split(","))):
        option, equals, value = (word.strip() for word in part.partition("="))
        if not equals or option in found:
            raise refusal("reduction_options", text, "key=value pairs, no key twice")
        _check_option(name, option, known)
        found[option] = _read(option, value, known[option])
    return found


def one_of(option: str, value: str, known: tuple[str, ...]) -> str:
    """Return the value of an option that must be one of some words.

    Raises:
        ValueError: If it is another.
    """
    return known_name(f"{OPTION} {option}", value, known)


def at_least(option: str, value: int, least: int) -> int:
    """Return the value of an option that must be a whole number of at least another.

    Raises:
        ValueError: If it is not.
    """
    return whole(f"{OPTION} {option}", value, least=least, most=2**63 - 1)


def switch(option: str, value: bool) -> bool:  # noqa: FBT001  of whatever type it may be
    """Return the value of an option that must be True or False.

    Raises:
        ValueError: If it is another.
    """
    return flag(f"{OPTION} {option}", value)


def known_options(name: str) -> dict[str, Any]:
    """Return the options of a method with their defaults.

    Raises:
        ValueError: If there is no method of that name.
    """
    parameters = inspect.signature(REDUCERS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _check_option(name: str, option: str, known: Collection[str]) -> None:
    if option not in known:
        hint = nearest(option, known) if known else f"{name} has none"
        raise refusal(OPTION, option, f"one of {name}; {hint}")


def _read(option: str, value: str, default: Any) -> Any:
    kind = type(default)
    if kind is bool:
        if value.lower() not in _WORDS:
            raise refusal(f"{OPTION} {option}", value, "true or false")
        return _WORDS[value.lower()]
    try:
        return kind(value)
    except ValueError:
        raise refusal(f"{OPTION} {option}", value, kind.__name__) from None
