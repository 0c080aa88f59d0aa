"""Budgets and families of plans, as users write them; no torch, so that a mistake shows at once.

budgets     token-layers:0.7, flops:0.75, ms:12.5
families    all, interleaved, upper:6, lower:3    r tokens at each of the layers of that strategy
            r@3-23/2                              r tokens at these layers
            keep@5,10                             a share of the patches stays at these layers
            scale:0,4,8,8                         these counts, all times the same factor

In a model of stages layers are stage.layer, as in r@2.1-2.4; all and interleaved remove the same
share of its stage's tokens at each layer where the method can; upper and lower are for one stage.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from fambav.arguments import refusal
from fambav.registry import nearest

KINDS = ("token-layers", "flops", "ms")


class Budget(NamedTuple):
    """The most that a plan may cost.

    Attributes:
        kind: "token-layers", tokens summed over the mixers, or "flops", operations as papers count
            them, both as a share of the model's without reduction; "ms", the median time of a batch
            in milliseconds.
        most: Of a share more than 0 and less than 1.
    """

    kind: str
    most: float

    def format(self, cost: float) -> str:
        """Write a cost of this kind."""
        return f"{cost:.2f} ms" if self.kind == "ms" else f"{100 * cost:.2f}% of {self.kind}"


def parse_budget(text: str) -> Budget:
    """Read a budget.

    Raises:
        ValueError: If the text has another form, or every plan or none would meet it.
    """
    if not isinstance(text, str):
        raise refusal("budget", text, BUDGETS)
    kind, _, number = text.partition(":")
    try:
        most = float(number)
    except ValueError:
        most = math.nan
    if kind not in KINDS or not math.isfinite(most):
        raise refusal("budget", text, BUDGETS)
    if most <= 0 or (most >= 1 and kind != "ms"):
        expected = "a time of more than 0" if kind == "ms" else "a share of more than 0 and below 1"
        raise refusal("budget", text, expected)
    return Budget(kind, most)


OBJECTIVES, ALGORITHMS = ("distance", "accuracy"), ("greedy", "evolution", "both")
BUDGETS = "token-layers:0.7, flops:0.75 or ms:12.5"
FAMILIES = "all, interleaved, upper:6, lower:3, r@3-23/2, keep@5,10, keep@1.1,2.1 or scale:0,4,8,8"
_FORMS = {
    "all": "",
    "interleaved": "",
    "upper": r":\d{1,9}",
    "lower": r":\d{1,9}",
    "r": r"@[\d.,/-]+",
    "keep": r"@[\d.,/-]+",
    "scale": r":\d{1,9}(,\d{1,9})*",
}


class Family(NamedTuple):
    """Plans that differ in one number.

    Attributes:
        text: As it was written.
        kind: "all", "interleaved", "upper", "lower", "r", "keep" or "scale".
        rest: What follows the kind: a layer, layers or counts.
    """

    text: str
    kind: str
    rest: str


def parse_family(text: str) -> Family:
    """Read a family.

    Raises:
        ValueError: If the text has another form.
    """
    kind = re.split("[:@]", text)[0] if isinstance(text, str) else ""
    if kind not in _FORMS:
        raise refusal("family", text, f"one of {FAMILIES}; {nearest(kind, _FORMS)}")
    if not re.fullmatch(kind + _FORMS[kind], text):
        raise refusal("family", text, f"one of {FAMILIES}")
    return Family(text, kind, text[len(kind) + 1 :])
