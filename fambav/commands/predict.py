"""fambav predict."""

from __future__ import annotations

from fambav import config
from fambav.commands.output import print_line
from fambav.commands.parser import Parser, count
from fambav.commands.trained import RUN
from fambav.config import ConfigError


def run(words: list[str]) -> None:
    """Print the most likely classes of images under a checkpoint."""
    flags = next((n for n, word in enumerate(words) if word.startswith("-")), len(words))
    parser = Parser(
        "fambav predict",
        usage="fambav predict RUN|CHECKPOINT IMAGE ... [--topk N] [--device NAME] "
        "[--model NAME ...]",
        description=run.__doc__,
        epilog=f"RUN|CHECKPOINT is {RUN}. "
        "A file that is not ours needs --model and whatever else describes it to main.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--topk", type=count, default=5, metavar="N")
    parser.add_argument("--device", metavar="NAME")
    given, rest = parser.parse_known_args(words[flags:])
    if flags < 2:
        raise ConfigError("images are missing, expected fambav predict RUN|CHECKPOINT IMAGE ...")
    model = config.parse(rest) if rest else None
    checkpoint, *images = words[:flags]
    from fambav import training

    predicted = training.predict(
        checkpoint, images, config=model, device=given.device, topk=given.topk
    )
    for image, guesses in zip(images, predicted, strict=True):
        print_line(image)
        for name, share in guesses:
            print_line(f"  {100 * share:5.1f}%  {name}")
