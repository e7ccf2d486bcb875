"""Command-line parsing: a usage error shows the usage of its own command and names the nearest option or word that exists."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NoReturn

_CUTOFF: Final = 0.5  # similarity from which a word is suggested
_CLOSE: Final = 0.75  # the same where the word may be right, but in the wrong place
_SIZE: Final = re.compile(r"(\d+)([KMG]?)(?:i?B)?", re.IGNORECASE)
_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class UsageError(Exception):
    """Options that do not go together."""


class Parser(argparse.ArgumentParser):
    """The parser of one command.

    With ``takes_command``, the options end at the first word that belongs to none of them: that word and everything after it is
    stored, unparsed, in ``arguments``.
    """

    takes_command = False

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse the command's words. Options may stand before, between and after the other words."""
        own, command = self._split(words) if self.takes_command else ([*words], [])
        end = own.index("--") if "--" in own else len(own)
        # Words of the command may have become values of an option, but not where -- separates them.
        mixed = own if self.takes_command and len(own) + len(command) == len(words) else []
        for word in own[:end]:
            if word.startswith("--") and " " not in word and not self._actions_of(word):
                self._refuse(word, mixed)
        options, extra = self.parse_known_intermixed_args(own)
        if extra:
            self._refuse(extra[0], mixed)
        if self.takes_command:
            if not command:
                greedy = self._greedy_before(mixed)
                self.error("no COMMAND: give it after the options" if greedy is None else f"no COMMAND: {_separate(greedy)}")
            options.arguments = command
        return options

    def _split(self, words: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return this command's options and the words of the command to run."""
        position = 0
        while position < len(words):
            word = words[position]
            if word == "--":
                return [*words[:position]], [*words[position + 1 :]]
            if not word.startswith("-") or word == "-":
                break
            position += 1
            actions = self._actions_of(word)
            if len(actions) == 1 and "=" not in word:
                position += _values_of(actions[0], words[position:])
        return [*words[:position]], [*words[position:]]

    def _actions_of(self, word: str) -> list[argparse.Action]:
        """Return the actions that an option may stand for: several if it is an ambiguous abbreviation."""
        name = word.partition("=")[0]
        if name in self._option_string_actions:
            return [self._option_string_actions[name]]
        if not name.startswith("--"):
            return []
        return [action for option, action in self._option_string_actions.items() if option.startswith(name)]

    def _refuse(self, word: str, mixed: Sequence[str]) -> NoReturn:
        """End with a usage error. ``mixed`` are the words in which those of the command to run may be, too."""
        if not word.startswith("-"):
            self.error(f"unrecognized arguments: {word}")
        name = word.partition("=")[0]
        greedy = self._greedy_before(mixed[: mixed.index(word)]) if word in mixed else None
        if greedy is None:
            self.error(f"unrecognized arguments: {name}{suggestion(name, self._option_string_actions)}")
        near = suggestion(name, self._option_string_actions, _CLOSE)
        if_ = " If" if near else "; if"
        self.error(f"unrecognized arguments: {name}{near}{if_} it belongs to COMMAND, {_separate(greedy)}")

    def _greedy_before(self, words: Sequence[str]) -> str | None:
        """Return the last option in ``words`` if it takes all words that follow."""
        name = next((word for word in reversed(words) if word.startswith("-")), "")
        actions = self._actions_of(name)
        is_greedy = len(actions) == 1 and "=" not in name and actions[0].nargs == argparse.ONE_OR_MORE
        return actions[0].option_strings[0] if is_greedy else None


def _separate(greedy: str) -> str:
    return f"put -- before COMMAND, because {greedy} takes every word up to the next option"


def _values_of(action: argparse.Action, words: Sequence[str]) -> int:
    """Return how many of the next words are the values of an option that stands before the command to run."""
    if action.nargs is None:
        return 1
    if action.nargs == argparse.OPTIONAL:  # a URL; any other word is the command
        return int(bool(words) and "://" in words[0])
    if action.nargs == argparse.ONE_OR_MORE:
        return next((number for number, word in enumerate(words) if word.startswith("-")), len(words))
    return 0


def suggestion(word: str, words: Iterable[str], cutoff: float = _CUTOFF) -> str:
    """Return the end of an error message that names the most similar word, or nothing if none is similar."""
    near = difflib.get_close_matches(word, [*words], n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def one_of(*words: str) -> Callable[[str], str]:
    """Return the type of an argument that is one of these words."""

    def word(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(words)}{suggestion(text, words)}")
        return text

    return word


def size(text: str) -> int:
    """Return a number of bytes: digits, with K, M or G for a power of 1024."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size in bytes, such as 65536, 64K or 1M")
    return int(found[1]) * _UNITS[found[2].upper()]
