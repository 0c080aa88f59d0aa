"""fambav plan."""

from __future__ import annotations

from fambav import config


def run(words: list[str]) -> None:
    """Print how many tokens each layer sees, with main.py's flags, without training."""
    if {"-h", "--help"} & set(words):
        print(config.help_text("fambav plan", f"{run.__doc__}"))
        return
    settings = config.parse(words)
    if settings.notice:
        print(settings.notice)
    from fambav import training

    print(training.reduction(settings).summary())
