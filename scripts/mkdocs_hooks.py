"""What mkdocs needs beside the pages: files outside docs/ that they link to, the table of flags.

A link such as `../benchmarks/README.md` works where the repository is read.  The site has that file
as a page under the same path.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fambav.config.schema import GROUPS
from fambav.config.setting import Option, format_value, options_of

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
FLAGS = re.compile(r"<!-- flags: .*? -->")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that pages link to."""
    from mkdocs.structure.files import File

    queue = sorted(DOCS.rglob("*.md"))
    for page in queue:
        for target in outside(page):
            source = target.relative_to(ROOT).as_posix()
            if files.get_file_from_path(source) is None:
                files.append(File.generated(config, source, abs_src_path=str(target)))
                if target.suffix == ".md":
                    queue.append(target)
    return files


def outside(page: Path) -> list[Path]:
    """Return the files outside docs/ that a page links to."""
    targets = [(page.parent / link).resolve() for link in LINK.findall(page.read_text())]
    return [path for path in targets if path.is_file() and not path.is_relative_to(DOCS)]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links go to where the site has a file, and put the table of flags in its place."""
    del config, files
    source = Path(str(page.file.abs_src_path))

    def moved(link: re.Match[str]) -> str:
        target = (source.parent / link[0]).resolve()
        if not target.is_file():
            return link[0]
        base = DOCS if target.is_relative_to(DOCS) else ROOT
        site = target.relative_to(base).as_posix()
        return posixpath.relpath(site, posixpath.dirname(page.file.src_uri) or ".")

    return FLAGS.sub(lambda _: flags(), LINK.sub(moved, markdown))


def flags() -> str:
    """Return a table of every flag of main.py, by concern, in Markdown."""
    lines: list[str] = []
    for group in GROUPS.values():
        lines += [f"## {str(group.__doc__).rstrip('.')}", ""]
        lines += ["| flag | default | meaning |", "|---|---|---|"]
        lines += [row(option) for option in options_of(group).values()]
        lines.append("")
    return "\n".join(lines)


def row(option: Option) -> str:
    """Return the line of one flag."""
    names = [f"`--{name}`" for name in (option.flag, *option.also, option.off) if name]
    names += [f"`{option.short}`"] if option.short else []
    text = option.text.replace("|", "\\|")
    if option.choices:
        text += f": {', '.join(f'`{name}`' for name in option.choices)}"
    elif option.kind in (int, float):
        text += f" ({option.bounds})"
    return f"| {', '.join(names)} | {format_value(option.default)} | {text} |"
