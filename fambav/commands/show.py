"""fambav show."""

from __future__ import annotations

import argparse
from pathlib import Path

from fambav.arguments import check_folder
from fambav.commands.output import print_line
from fambav.commands.parser import Parser, natural
from fambav.commands.trained import RUN
from fambav.config import ConfigError, read_flags
from fambav.registry import PICTURES, nearest

_PLACE = Path("pictures")


def run(words: list[str]) -> None:
    """Draw where the tokens of an image go, what each layer costs, and how runs were trained."""
    flags = next((n for n, word in enumerate(words) if word.startswith("-")), len(words))
    given, rest = _parser().parse_known_args(words[flags:])
    if not flags:
        raise ConfigError("run is missing, expected fambav show RUN ...")
    what = None if given.what is None else _names(given.what)
    settings = read_flags(rest)
    from fambav import viz

    source = viz.Source(
        images=tuple(given.image),
        data_set=given.data_set,
        data_path=given.data_path,
        index=tuple(given.index),
    )
    runs = [Path(word) for word in words[:flags]]
    folder = given.output_dir or (runs[0] if runs[0].is_dir() else runs[0].parent) / _PLACE
    check_folder(folder)
    for _, picture in viz.render(
        runs, folder, what=what, source=source, settings=settings, svg=given.svg
    ):
        print_line(f"{picture.path}  {picture.title}")


def _parser() -> argparse.ArgumentParser:
    kinds = "; ".join(f"{name}, {text}" for name, text in PICTURES.items())
    parser = Parser(
        "fambav show",
        usage="fambav show RUN|CHECKPOINT ... [--what NAMES] [--image FILE ...] [--name value ...]",
        description=run.__doc__,
        epilog=f"RUN|CHECKPOINT is {RUN}. "
        "Other flags are those of main.py: they reduce the tokens of the same weights "
        "otherwise, or say what a file is of that is not ours, such as --model vim_tiny.",
        allow_abbrev=False,
    )
    parser.add_argument("--what", metavar="NAMES", help=f"comma-separated, all by default: {kinds}")
    parser.add_argument(
        "--image", type=Path, nargs="+", default=[], metavar="FILE", help="images to look at"
    )
    parser.add_argument("--data-set", metavar="NAME", help="or held-out images of this data set")
    parser.add_argument("--data-path", type=Path, metavar="DIR")
    parser.add_argument(
        *("--index",),
        type=natural,
        nargs="+",
        default=[0],
        metavar="N",
        help="which of them, from 0",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="where files go; pictures/ in the first run's folder by default",
    )
    parser.add_argument("--svg", action="store_true", help="write SVG beside PNG")
    return parser


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PICTURES:
            raise ConfigError(
                f"--what is {name!r}, expected names of pictures; {nearest(name, PICTURES)}"
            )
    return names
