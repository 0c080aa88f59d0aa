"""fambav completion."""

from __future__ import annotations

from collections.abc import Collection

from fambav import registry
from fambav.commands.names import KINDS
from fambav.commands.parser import Parser
from fambav.config import OPTIONS

_SCRIPT = """_fambav() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words
    case ${{COMP_WORDS[COMP_CWORD - 1]}} in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _fambav fambav"""


def run(words: list[str]) -> None:
    """Print what makes bash complete commands and flags: source <(fambav completion)."""
    from fambav.commands import COMMANDS  # which this command is one of

    Parser("fambav completion", description=run.__doc__).parse_args(words)
    known: dict[str, Collection[str]] = {"fambav": COMMANDS, "list": KINDS}
    options = OPTIONS.values()
    known |= {f"--{option.flag}": option.names for option in options if option.names}
    known |= {"--model": registry.MODELS, "--config": registry.configs()}
    known |= {"*": [f"--{option.flag}" for option in options]}
    cases = (f'    {name}) words="{" ".join(names)}" ;;' for name, names in known.items())
    print(_SCRIPT.format(cases="\n".join(cases)))
