"""fambav flops."""

from __future__ import annotations

from pathlib import Path

from fambav import config
from fambav.commands.output import check_files, print_line, show
from fambav.commands.parser import Parser


def run(words: list[str]) -> None:
    """Count what an image costs each part of a model, with main.py's flags, without running it."""
    parser = Parser("fambav flops", add_help=False, allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true")
    if {"-h", "--help"} & set(words):
        own = "--json FILE writes the counts there too, --markdown prints a Markdown table."
        print(config.help_text("fambav flops", f"{run.__doc__}\n{own}"))
        return
    given, flags = parser.parse_known_args(words)
    check_files(given.json)
    settings = config.parse(flags)
    for line in settings.notice.splitlines():
        print_line(line)
    from fambav.flops import count_config

    report = count_config(settings)
    form = "markdown" if given.markdown else "text"
    show(report.table().render(form), report.json(), given.json)
