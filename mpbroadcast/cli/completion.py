"""Print the script that completes this command in a shell: bash, zsh or fish."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Final

from mpbroadcast.cli import output
from mpbroadcast.cli.parsing import one_of
from mpbroadcast.cli.text import encode

EXAMPLE = "mpbroadcast completion bash >> ~/.bashrc"

Words = Mapping[str, Mapping[str, str]]
"""The options of each command, each with its help."""

_BASH: Final = """\
_mpbroadcast() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words
    COMPREPLY=()
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
    if [ "$COMP_CWORD" = 1 ]; then words="{commands}"; fi
    case $word in
        -*) COMPREPLY=($(compgen -W "$words" -- "$word")) ;;
        *) [ "$COMP_CWORD" = 1 ] && COMPREPLY=($(compgen -W "$words" -- "$word")) ;;
    esac
}}
complete -o default -F _mpbroadcast mpbroadcast
"""
_ZSH: Final = """\
#compdef mpbroadcast
_mpbroadcast() {{
    if (( CURRENT == 2 )); then
        compadd -- {commands}
    elif [[ $words[CURRENT] == -* ]]; then
        case $words[2] in
{cases}
        esac
    else
        _files
    fi
}}
if [ "$funcstack[1]" = _mpbroadcast ]; then _mpbroadcast "$@"; else compdef _mpbroadcast mpbroadcast; fi
"""


def bash(words: Words) -> str:
    """Return the script for bash."""
    cases = [f'        {command}) words="{" ".join(options)}" ;;' for command, options in words.items()]
    return _BASH.format(cases="\n".join(cases), commands=" ".join(words))


def zsh(words: Words) -> str:
    """Return the script for zsh, to be sourced, or as the file ``_mpbroadcast`` of a folder in ``fpath``."""
    cases = [f"            {command}) compadd -- {' '.join(options)} ;;" for command, options in words.items()]
    return _ZSH.format(cases="\n".join(cases), commands=" ".join(words))


def fish(words: Words) -> str:
    """Return the script for fish."""
    lines = [f"complete -c mpbroadcast -n __fish_use_subcommand -f -a '{' '.join(words)}'"]
    for command, options in words.items():
        for option, text in options.items():
            name = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
            shown = text.replace("\\", "\\\\").replace("'", "\\'")
            lines.append(f"complete -c mpbroadcast -n '__fish_seen_subcommand_from {command}' {name} -d '{shown}'")
    return "".join(f"{line}\n" for line in lines)


_SHELLS: Final = {"bash": bash, "zsh": zsh, "fish": fish}


def words_of(parsers: Mapping[str, argparse.ArgumentParser]) -> dict[str, dict[str, str]]:
    """Return the options of each command."""
    return {
        name: {option: _text(action) for action in parser._actions for option in action.option_strings}
        for name, parser in parsers.items()
    }


def _text(action: argparse.Action) -> str:
    return "" if action.help in (None, argparse.SUPPRESS) else str(action.help)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("shell", type=one_of(*_SHELLS), metavar="SHELL", help="bash, zsh or fish")


def run(options: argparse.Namespace) -> int:
    """Print the script, and return the exit code."""
    output.write(encode(_SHELLS[options.shell](words_of(options.parsers))))
    return 0
