"""A page of tables and pictures as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fambav.table import Table

_KINDS = {".png": "png", ".gif": "gif"}
_TEMPLATE = Path(__file__).with_name("page.html")


class Picture(NamedTuple):
    """A picture inside the page.

    Attributes:
        text: What it shows.
        uri: The picture itself, as a data address.
    """

    text: str
    uri: str


class Section(NamedTuple):
    """One run.

    Attributes:
        name: Of the run.
        summary: What it came to, in a sentence.
        pictures: Its pictures.
        plan: Tokens of each layer, None for a model without a plan.
        changed: Settings that differ from the defaults.
        settings: All settings, as YAML.
        environment: Machine, versions and command.
    """

    name: str
    summary: str
    pictures: Sequence[Picture]
    plan: Table | None
    changed: Table
    settings: str
    environment: Table


class Page(NamedTuple):
    """What a page shows.

    Attributes:
        title: Of the page.
        made: When and by what it was made.
        tables: Results.
        pictures: Of all runs together.
        sections: One for each run.
    """

    title: str
    made: str
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    sections: Sequence[Section]


def picture(path: Path, text: str) -> Picture:
    """Read a PNG or GIF file.

    Args:
        path: The file.
        text: What it shows.
    """
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return Picture(text, f"data:image/{_KINDS[path.suffix]};base64,{data}")


def drawn(page: Page) -> str:
    """Return the HTML of a page; every text in it is escaped.

    Raises:
        ValueError: If Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise ValueError(
            'jinja2 is not installed, expected it for reports; pip install "fambav[viz]"'
        ) from None
    made = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return made.render(page=page) + "\n"
