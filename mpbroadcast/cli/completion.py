"""Print the completion script for a shell: bash, zsh or fish.

bash: add 'source <(mpbroadcast completion bash)' to ~/.bashrc. zsh: the same with zsh in ~/.zshrc, after compinit. fish: write
it to ~/.config/fish/completions/mpbroadcast.fish.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping
from typing import Final

from mpbroadcast.cli import output
from mpbroadcast.cli.parsing import one_of
from mpbroadcast.cli.text import encode

EXAMPLE = "mpbroadcast completion bash >> ~/.bashrc"

Words = Mapping[str, Mapping[str, argparse.Action]]
"""The options of each command."""

# Where the command of run begins: behind --, or at the first word that is neither an option nor the value of one. bash splits
# words at = and :, so a URL is three words, and so is --option=value.
_BASH: Final = """\
_mpbroadcast_run() {{
    local i=2
    while [ "$i" -lt "$COMP_CWORD" ]; do
        case ${{COMP_WORDS[i]}} in
            --) i=$((i + 1)); break ;;
            --bridge) [ "${{COMP_WORDS[i + 2]}}" = : ] && i=$((i + 3)) ;;
            --topics) while [ "$i" -lt "$COMP_CWORD" ] && [[ ${{COMP_WORDS[i + 1]}} != -* ]]; do i=$((i + 1)); done ;;
            {values}) if [ "${{COMP_WORDS[i + 1]}}" = = ]; then i=$((i + 2)); else i=$((i + 1)); fi ;;
            -*) ;;
            *) break ;;
        esac
        i=$((i + 1))
    done
    [ "$i" -le "$COMP_CWORD" ] || return 1
    [[ $i = "$COMP_CWORD" && ${{COMP_WORDS[i]}} = -* ]] && return 1
    if declare -F _comp_command_offset > /dev/null; then
        _comp_command_offset "$i"
    elif declare -F _command_offset > /dev/null; then
        _command_offset "$i"
    elif [ "$i" = "$COMP_CWORD" ]; then
        COMPREPLY=($(compgen -c -- "${{COMP_WORDS[i]}}"))
    fi
}}
_mpbroadcast() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words
    COMPREPLY=()
    if [ "$COMP_CWORD" -gt 1 ] && [ "${{COMP_WORDS[1]}}" = run ] && _mpbroadcast_run; then return; fi
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
    elif [[ $words[2] == run ]]; then
        local -i end=$words[(i)--]
        if (( end < CURRENT )); then
            shift end words
            (( CURRENT -= end ))
            _normal
            return
        fi
        shift words
        (( CURRENT-- ))
        _arguments -S {options} '(-):command:_command_names -e' '*::arguments:_normal'
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
    values = "|".join(_with_value(words["run"]))
    return _BASH.format(cases="\n".join(cases), commands=" ".join(words), values=values)


def zsh(words: Words) -> str:
    """Return the script for zsh, to be sourced, or as the file ``_mpbroadcast`` of a folder in ``fpath``."""
    cases = [f"            {command}) compadd -- {' '.join(options)} ;;" for command, options in words.items()]
    options = " ".join(_specification(option, action) for option, action in words["run"].items())
    return _ZSH.format(cases="\n".join(cases), commands=" ".join(words), options=options)


def _specification(option: str, action: argparse.Action) -> str:
    """Return an option as zsh's ``_arguments`` takes it. After one with several values the command needs ``--``."""
    forms: dict[object, str] = {None: ":{0}:_files", argparse.OPTIONAL: "::{0}: ", argparse.ONE_OR_MORE: ":*:{0}: "}
    form = forms.get(action.nargs, "")
    text = re.sub(r"([][\\])", r"\\\1", action.help or "")
    return shlex.quote(f"{option}[{text}]{form.format(action.metavar)}")


def fish(words: Words) -> str:
    """Return the script for fish."""
    lines = [f"complete -c mpbroadcast -n __fish_use_subcommand -f -a '{' '.join(words)}'"]
    for command, options in words.items():
        # The command of run may have a word that is a command here, too.
        only = f"__fish_seen_subcommand_from {command}; and test (commandline -opc)[2] = {command}"
        for option, action in options.items():
            name = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
            shown = (action.help or "").replace("\\", "\\\\").replace("'", "\\'")
            value = " -r" if action.nargs is None else ""
            lines.append(f"complete -c mpbroadcast -n '{only}' {name}{value} -d '{shown}'")
    command = f"__fish_complete_subcommand --fcs-skip=2 - {' '.join(_with_value(words['run']))}"  # -: ends its own options
    lines.append(f"complete -c mpbroadcast -n '__fish_seen_subcommand_from run' -x -a '({command})'")
    return "".join(f"{line}\n" for line in lines)


def _with_value(options: Mapping[str, argparse.Action]) -> list[str]:
    return [option for option, action in options.items() if action.nargs is None]


_SHELLS: Final = {"bash": bash, "zsh": zsh, "fish": fish}


def words_of(parsers: Mapping[str, argparse.ArgumentParser]) -> dict[str, dict[str, argparse.Action]]:
    """Return the options of each command that its help or another command's shows, as those of a bridge."""
    options = {
        name: {option: action for action in parser._actions for option in action.option_strings}
        for name, parser in parsers.items()
    }
    every = [item for own in options.values() for item in own.items()]
    shown = {option: action for option, action in every if action.help != argparse.SUPPRESS}
    return {
        name: {
            option: shown[option] if action.help == argparse.SUPPRESS else action
            for option, action in own.items()
            if option in shown
        }
        for name, own in options.items()
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("shell", type=one_of(*_SHELLS), metavar="SHELL", help="bash, zsh or fish")


def run(options: argparse.Namespace) -> int:
    """Print the script, and return the exit code."""
    output.write(encode(_SHELLS[options.shell](words_of(options.parsers))))
    return 0
