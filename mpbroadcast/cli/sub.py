"""Print each message as soon as it is published, one per line."""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import Any, Final

from mpbroadcast import Broadcaster, BroadcastError, BrokerRestarted, Channel, Lagged, Received, TimedOut
from mpbroadcast.cli import output
from mpbroadcast.cli.addressing import reached
from mpbroadcast.cli.text import decode, json_line, plain_line
from mpbroadcast.protocol.plain_pickling import PLAIN_DATA

EXAMPLE = "mpbroadcast sub 'room:*' --json --address myapp | jq .message"

_AT_ONCE: Final = 512  # messages of one write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("topics", nargs="*", metavar="TOPIC", help="topics or patterns like 'room:*' (default: everything)")
    parser.add_argument("--json", action="store_true", help='print {"id": ..., "topic": ..., "message": ...} for each')
    parser.add_argument("--count", type=_count, metavar="N", help="exit after N messages")
    parser.add_argument("--timeout", type=_seconds, metavar="S", help="exit after S seconds without a message")
    parser.add_argument("--after", type=int, metavar="ID", help="start after this message id, from the history (0: all of it)")
    parser.add_argument("--group", metavar="NAME", help="share the messages with all subscribers of this group")
    parser.add_argument(
        "--pickle", action="store_true", help="unpickle everything, not only plain data; a publisher can then run code here"
    )


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} is less than 1")
    return count


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds from 0")
    return seconds


def run(options: argparse.Namespace) -> int:
    """Print messages until the options, the broadcaster, the reader of the output or Ctrl-C ends it. Return the exit code."""
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError), reached(options.address) as bus:
        topics = [decode(os.fsencode(topic)) for topic in options.topics]
        group = None if options.group is None else decode(os.fsencode(options.group))
        with bus.subscribe(*topics, after=options.after, group=group, with_id=True) as channel:
            if not options.pickle:
                channel._loaders = PLAIN_DATA
            return _print_all(bus, channel, group, options)
    return 0


def _print_all(bus: Broadcaster[Any], channel: Channel[Received[Any]], group: str | None, options: argparse.Namespace) -> int:
    """Print what comes, up to the count. Return the exit code."""
    printed = 0
    why = "the broadcaster has closed"
    while options.count is None or printed < options.count:
        try:
            batch = channel.recv_many(_AT_ONCE if options.count is None else min(_AT_ONCE, options.count - printed), timeout=0)
        except TimedOut:
            if output.wait(channel.fileno(), options.timeout) or _is_due(bus, channel, group):
                continue
            why = f"nothing has come for {options.timeout:g} s"
            break
        except (Lagged, BrokerRestarted) as error:
            output.warn(f"gap: {error}")
            continue
        except EOFError:
            break
        except BroadcastError:
            raise
        except Exception as error:  # of unpickling this message
            output.warn(f"a message was refused: {type(error).__name__}: {error}")
            continue
        lines = [*filter(None, (_line(received, as_json=options.json) for received in batch))]
        output.write(b"".join(lines))
        printed += len(lines)
    if options.count is None or printed == options.count:
        return 0
    output.warn(f"{why}: {printed} of {options.count} messages have come")
    return 1


def _is_due(bus: Broadcaster[Any], channel: Channel[Any], group: str | None) -> bool:
    """Return whether something is still in the broker for this channel, as what it resumes is at first, or came just now."""
    stats = bus.stats()
    waiting = sum(row.waiting for row in stats.subscribers if row.id == channel.id)
    if group in stats.groups:
        waiting += stats.groups[group].waiting
    return waiting > 0 or channel.poll(0)


def _line(received: Received[Any], *, as_json: bool) -> bytes:
    """Return the line of a message; nothing, but a line on standard error, if it has none."""
    try:
        return json_line(received._asdict()) if as_json else plain_line(received.message)
    except Exception as error:  # of its repr, which may be any code with --pickle, or is too deep
        output.warn(f"a message was refused, as it cannot be printed: {type(error).__name__}: {error}")
        return b""
