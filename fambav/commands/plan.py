"""fambav plan."""

from __future__ import annotations

from fambav import config
from fambav.commands.output import print_line


def run(words: list[str]) -> None:
    """Print how many tokens each layer sees, with main.py's flags, without training."""
    if {"-h", "--help"} & set(words):
        print(config.help_text("fambav plan", f"{run.__doc__}"))
        return
    settings = config.parse(words)
    for line in settings.notice.splitlines():
        print_line(line)
    from fambav import training

    print(training.reduction(settings).summary())
