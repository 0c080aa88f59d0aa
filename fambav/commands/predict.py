"""fambav predict."""

from __future__ import annotations

from pathlib import Path

from fambav import config
from fambav.arguments import check_folder
from fambav.commands.output import print_line
from fambav.commands.parser import Parser, count
from fambav.commands.trained import RUN
from fambav.config import ConfigError, read_flags


def run(words: list[str]) -> None:
    """Print the most likely classes of images, or write their masks or boxes."""
    flags = next((n for n, word in enumerate(words) if word.startswith("-")), len(words))
    parser = Parser(
        "fambav predict",
        usage="fambav predict RUN|CHECKPOINT IMAGE ... [--topk N] [--output-dir DIR] "
        "[--device NAME] [--name value ...]",
        description=run.__doc__,
        epilog=f"RUN|CHECKPOINT is {RUN}. "
        "A file that is not ours needs --model and whatever else describes it to main.py; other "
        "flags are --eval-scales and the like, which say how masks are made.",
        allow_abbrev=False,
    )
    parser.add_argument("--topk", type=count, metavar="N", help="classes to print, 5 by default")
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="where masks, boxes and overlays go, which need it",
    )
    parser.add_argument("--device", metavar="NAME")
    given, rest = parser.parse_known_args(words[flags:])
    if flags < 2:
        raise ConfigError("images are missing, expected fambav predict RUN|CHECKPOINT IMAGE ...")
    settings = read_flags(rest)
    foreign = config.parse(rest) if {"model", "config"} & settings.keys() else None
    checkpoint, *images = words[:flags]
    if given.output_dir is not None:
        check_folder(given.output_dir)
    from fambav.training.inference import answers

    for image, lines in answers(
        checkpoint,
        images,
        config=foreign,
        settings=None if foreign else settings,
        device=given.device,
        topk=given.topk,
        folder=given.output_dir,
    ):
        print_line(str(image))
        for line in lines:
            print_line(line)
