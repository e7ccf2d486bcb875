"""Three buses, bridged over one engine: bridges, engine and brokers are killed, stopped and cut off at random under load.

Meanwhile garbage, copies and forgeries are written into the streams, and keys are rotated. Then the checker compares what was
published with what each channel was given.

    python -m tests.bridge.chaos --engine redis --seconds 60 --seed 1 [--buses] [--trims] [--overflow drop_oldest]
    python -m tests.bridge.chaos --engine nats --messages 10000000 --pause 20

The exit status is 0 if nothing is wrong. What is wrong is printed, a line for each kind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final
from zlib import crc32

import psutil

from mpbroadcast.bridge.entries import Signer
from tests.bridge import roles
from tests.bridge.checker import Channel, Finding, Log, Reasons, Source, check, check_figures
from tests.bridge.roles import KEYS, KINDS, LAYOUT, MACHINES, PATIENCE, SOURCES, TOPICS, Settings
from tests.bridge.servers import ENGINES, Server
from tests.support.helpers import wait_until

MOST_KILLS: Final = 3  # of one broker in 30 seconds: one that dies 5 times is given up
READERS: Final = dict.fromkeys(MACHINES, KINDS) | {"A's local topics": KINDS[2:], "C's rooms": KINDS[:1]}


class Process:
    """A role in a process of its own, and the pipe for its orders."""

    def __init__(self, role: roles.Role, settings: Settings, name: str, *arguments: Any) -> None:
        context = multiprocessing.get_context("fork")
        self.name = name
        self.orders, theirs = context.Pipe()
        self.process = context.Process(target=roles.main, args=(role, settings, theirs, name, *arguments))
        self.process.start()
        theirs.close()

    def answer(self, timeout: float = PATIENCE) -> Any:
        """Return what it sends next."""
        if not self.orders.poll(timeout):
            raise TimeoutError(f"{self.name} does not answer")
        return self.orders.recv()

    def ask(self, order: str, argument: Any = None) -> Any:
        self.orders.send((order, argument))
        return self.answer()

    def kill(self) -> None:
        if self.orders.closed:
            return
        self.process.kill()
        self.process.join()
        self.process.close()
        self.orders.close()


def signalled(pid: int | None, number: int) -> bool:
    """Send a signal, and return whether there was such a process."""
    with contextlib.suppress(ProcessLookupError):
        if pid is not None:
            os.kill(pid, number)
            return True
    return False


class World:
    """All that runs, and what can happen to it: each method that :attr:`HAPPENINGS` has."""

    def __init__(self, settings: Settings, server: Server, stack: contextlib.ExitStack) -> None:
        self.settings = settings
        self.server = server
        self.stack = stack
        self.rng = random.Random(settings.seed)
        self.counts: Counter[str] = Counter()
        self.kills: dict[str, deque[float]] = {machine: deque() for machine in MACHINES}
        self.killed: Counter[str] = Counter()
        self.losses = 0
        self.later: list[tuple[float, Callable[[], object]]] = []  # what ends at some time
        self.proxy = self.start(roles.forward, "proxy", server.port)
        self.ports: dict[str, int] = self.proxy.answer()
        self.hosts = {machine: self.start_caller(machine, True) for machine in MACHINES}
        self.readers = {name: self.start(roles.read, name, name[0], name, kinds) for name, kinds in READERS.items()}
        for reader in self.readers.values():
            reader.answer()
        for host in self.hosts.values():
            host.ask("link")
        self.second = self.start_caller("A", False)
        self.second.ask("link")
        self.wait_up()
        self.publishers = {machine: self.start(roles.publish, f"{machine} publishes", machine) for machine in MACHINES}
        for publisher in self.publishers.values():
            publisher.answer()

    def start(self, role: roles.Role, name: str, *arguments: Any) -> Process:
        process = Process(role, self.settings, name, *arguments)
        self.stack.callback(process.kill)
        return process

    def start_caller(self, machine: str, is_host: bool) -> Process:
        url = self.server.url.replace(str(self.server.port), str(self.ports[machine]))
        return self.start(roles.call_bridges, f"{machine} {'host' if is_host else 'second'}", machine, url, is_host)

    def wait_up(self) -> None:
        def all_up() -> bool:
            for machine, host in self.hosts.items():
                state = host.ask("stats")
                streams = {name: row.state for name, row in state[1].items()} if state else {}
                if streams != {stream: "up" for stream, row in TOPICS.items() if machine in row}:
                    return False
            return True

        wait_until(all_up, PATIENCE)

    # What can happen

    def some_bridge(self) -> int | None:
        """Return the process ID of some bridge, if it is at work."""
        state = self.hosts[self.rng.choice(MACHINES)].ask("stats")
        rows = [row for row in state[1].values() if row.pid is not None] if state else []
        return self.rng.choice(rows).pid if rows else None

    def kill_bridge(self) -> bool:
        return signalled(self.some_bridge(), signal.SIGKILL)

    def kill_supervisor(self) -> bool:
        """Kill a bridge with its supervisor: the caller calls ``bridge()`` anew, or the second one takes over."""
        pid = self.some_bridge()
        callers = {process.process.pid for process in (*self.hosts.values(), self.second)}
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(pid).parent() if pid is not None else None
            if parent is not None and parent.pid not in callers:
                parent.kill()
                if self.rng.random() < 0.7:
                    signalled(pid, signal.SIGKILL)
                return True
        return False

    def stop_bridge(self) -> bool:
        pid = self.some_bridge()
        self.soon(2, lambda: signalled(pid, signal.SIGCONT))
        return signalled(pid, signal.SIGSTOP)

    def kill_caller(self) -> bool:
        self.second.kill()
        self.second = self.start_caller("A", False)
        self.second.orders.send(("link", None))
        self.soon(0, self.second.answer)
        return True

    def rotate_keys(self) -> bool:
        self.hosts[self.rng.choice(MACHINES)].ask("rotate")
        return self.kill_supervisor()

    def kill_engine(self) -> bool:
        self.server.kill()
        time.sleep(self.rng.random())
        self.server.restart()
        return True

    def stop_engine(self) -> bool:
        with self.server.stopped():
            time.sleep(self.rng.random() * 2)
        return True

    def cut_off(self) -> bool:
        """Cut a machine off from the engine, for some time or for a moment; connections stay, or do not."""
        machine = self.rng.choice(MACHINES)
        if self.rng.random() < 0.6:
            self.proxy.ask("stop", machine)
            self.soon(4, lambda: self.proxy.ask("go on", machine))
        if self.rng.random() < 0.7:
            self.proxy.ask("cut", machine)
        return True

    def forge(self) -> bool:
        stream = self.rng.choice([*TOPICS])
        kind = self.rng.choice(["garbage", "copy", "changed", "other key", "other stream", "copies"])
        try:
            Forger(self.server, stream, self.rng).forge(kind)
        except Exception:  # of whichever client, while the engine is being killed
            kind = "failed"
        self.counts[f"forged: {kind}"] += 1
        return True

    def kill_bus(self) -> bool:
        machine = self.rng.choice(MACHINES)
        state = self.hosts[machine].ask("stats")
        kills, now = self.kills[machine], time.monotonic()
        while kills and kills[0] < now - 31:
            kills.popleft()
        if state is None or len(kills) >= MOST_KILLS:
            return False
        if self.rng.random() < 0.3:
            for row in state[1].values():
                signalled(row.pid, signal.SIGKILL)
        if not signalled(state[0], signal.SIGKILL):
            return False
        kills.append(now)
        self.killed[machine] += 1
        return True

    def stop_bus(self) -> bool:
        state = self.hosts[self.rng.choice(MACHINES)].ask("stats")
        if state is None:
            return False
        signalled(state[0], signal.SIGSTOP)
        time.sleep(self.rng.random())
        return signalled(state[0], signal.SIGCONT)

    def trim(self) -> bool:
        """Empty a log."""
        self.losses += 1
        with contextlib.suppress(Exception):
            Forger(self.server, self.rng.choice([*TOPICS]), self.rng).empty()
        return True

    HAPPENINGS: Final = (
        *(
            kill_bridge,
            kill_bridge,
            kill_bridge,
            kill_supervisor,
            stop_bridge,
            kill_caller,
            rotate_keys,
            kill_engine,
            stop_engine,
        ),
        *(cut_off, cut_off, forge, forge, forge, kill_bus, kill_bus, stop_bus, trim, trim),
    )

    def soon(self, most: float, action: Callable[[], object]) -> None:
        self.later.append((time.monotonic() + self.rng.random() * most, action))

    def end_what_is_due(self, now: float) -> None:
        for due in [due for due in self.later if due[0] <= now]:
            self.later.remove(due)
            due[1]()

    def happen(self) -> None:
        """Let something happen."""
        left_out = set() if self.settings.buses else {"kill_bus", "stop_bus"}
        left_out |= set() if self.settings.trims else {"trim"}
        names = [each.__name__ for each in self.HAPPENINGS if each.__name__ not in left_out]
        name = self.rng.choice([name for name in names if not self.settings.only or name in self.settings.only])
        if getattr(self, name)():
            self.counts[name] += 1

    def live(self) -> None:
        """Let things happen until the time is over, or all messages are published."""
        begin = time.monotonic()
        while True:
            now = time.monotonic()
            self.end_what_is_due(now)
            if not self.settings.messages and now > begin + self.settings.seconds:
                break
            # A publisher whose machine is cut off may wait for room, and replies when that is over.
            if self.settings.messages and not self.later and all(each.ask("is paused") for each in self.publishers.values()):
                break
            time.sleep(self.rng.random() * self.settings.pause)
            self.happen()
        self.end_what_is_due(float("inf"))

    # The end

    def settle(self) -> tuple[list[int], list[str]]:
        """Wait until all has arrived. Return how much each source has published, and what does not come to an end."""
        self.wait_up()
        for publisher in self.publishers.values():
            publisher.orders.send(("pause", None))
        for publisher in self.publishers.values():
            publisher.answer()
        stuck = self.flush()  # else the last messages can be dropped
        published = [0] * len(SOURCES)
        for publisher in self.publishers.values():
            counts = [count for each in publisher.ask("finish") for count in each]
            first = SOURCES.index(Source(publisher.name[0], 0, KINDS[0]))
            published[first : first + len(counts)] = counts
        stuck += self.flush()
        self.wait_quiet(published)
        return published, stuck

    def flush(self) -> list[str]:
        for host in self.hosts.values():
            host.orders.send(("flush", None))
        return [f"{host.name}: {problem}" for host in self.hosts.values() if (problem := host.answer(3 * PATIENCE))]

    def wait_quiet(self, published: list[int]) -> None:
        """Wait until each channel has what was published last, or nothing comes any more."""
        deadline = time.monotonic() + 2 * PATIENCE
        before, since = 0, time.monotonic()
        while time.monotonic() < deadline:
            received, is_complete = 0, True
            for name, reader in self.readers.items():
                count, latest = reader.ask("latest")
                received += count
                for source, number, last in zip(SOURCES, published, latest, strict=True):
                    is_due = source.kind in READERS[name] and LAYOUT.reaches(source, name[0])
                    is_complete &= not is_due or last >= number - 1
            now = time.monotonic()
            if received != before:
                before, since = received, now
            if now - since > (0.5 if is_complete else 10):
                return
            time.sleep(0.1)

    def channels(self) -> Iterator[tuple[Channel, list[str]]]:
        """Yield each channel, and the errors that it raised."""
        for name, reader in self.readers.items():
            path = Path(self.settings.folder, f"{name}.log")
            errors = reader.ask("save", path)
            log = Log()
            with open(path, "rb") as file:
                log.records.fromfile(file, path.stat().st_size // log.records.itemsize)
            yield Channel(name, name[0], frozenset(READERS[name]), log), errors

    def rows(self) -> dict[str, dict[str, Any]]:
        """Return the row of each bridge: stream -> machine -> row."""
        found: dict[str, dict[str, Any]] = {stream: {} for stream in TOPICS}
        for machine, host in self.hosts.items():
            for stream, row in host.ask("stats")[1].items():
                found[stream][machine] = row
        return found

    def end(self) -> None:
        """End all in order: nothing may be left."""
        for caller in (self.second, *self.hosts.values()):
            caller.ask("end")
        for reader in self.readers.values():
            reader.process.join(PATIENCE)


class Forger:
    """Writes into a stream what no bridge has written: garbage, true copies, changed copies, entries with another key."""

    def __init__(self, server: Server, stream: str, rng: random.Random) -> None:
        self.server = server
        self.stream = stream
        self.rng = rng

    def forge(self, kind: str) -> None:
        asyncio.run(self._nats(kind) if self.server.url.startswith("nats") else self._redis(kind))

    def empty(self) -> None:
        asyncio.run(self._nats("") if self.server.url.startswith("nats") else self._redis(""))

    async def _redis(self, kind: str) -> None:
        from redis.asyncio import Redis

        async with Redis.from_url(self.server.url, socket_timeout=1) as client:
            if not kind:
                await client.xtrim(self.stream, maxlen=0, approximate=False)
                return
            rows: Any = await client.xrevrange(self.stream, count=50)
            entries = [value for _, fields in rows for value in fields.values()]
            name = [name for _, fields in rows for name in fields][:1] or [b"x"]
            for entry in self.made(kind, entries):
                await client.xadd(self.stream, {name[0] if self.rng.random() < 0.9 else b"other": entry})

    async def _nats(self, kind: str) -> None:
        import nats

        client = await nats.connect(self.server.url, connect_timeout=1, allow_reconnect=False)
        try:
            stream = client.jetstream(timeout=1)
            if not kind:
                await stream.purge_stream(self.stream)
                return
            last = (await stream.stream_info(self.stream)).state.last_seq
            entries = []
            for _ in range(5):
                with contextlib.suppress(nats.js.errors.NotFoundError):
                    entries.append(
                        (await stream.get_msg(self.stream, self.rng.randrange(max(1, last - 50), last + 1))).data or b""
                    )
            for entry in self.made(kind, entries):
                await stream.publish(self.stream, entry)
        finally:
            await client.close()

    def made(self, kind: str, entries: list[bytes]) -> list[bytes]:
        """Return what to write."""
        rng = self.rng
        if kind == "garbage" or not entries:
            return [rng.randbytes(rng.choice([0, 1, 50, 100, 5000]))]
        if kind in ("copy", "copies"):
            return [rng.choice(entries) for _ in range(10 if kind == "copies" else 1)]
        if kind == "changed":
            data = bytearray(rng.choice(entries))
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            return [bytes(data)]
        keys = [key.encode() for key in KEYS]
        names = [self.stream] if kind == "other key" else [name for name in TOPICS if name != self.stream]
        origin = Signer(keys, self.stream).open(rng.choice(entries)).origin
        signer = Signer([b"a key that no bridge has"] if kind == "other key" else keys, names[0])
        message = pickle.dumps((0, 1 << 40, 0, crc32(b""), b""))
        return [entry for entry, _ in signer.pack(origin, 1 << 40, 1, [("room:0", message)], 1 << 16)]


def run(settings: Settings, keep: bool = False) -> dict[str, Finding]:
    """Run it, print what happened, and return what is wrong."""
    with contextlib.ExitStack() as stack:
        server: Server = stack.enter_context(ENGINES[settings.engine]())
        folder = tempfile.mkdtemp(prefix="chaos-")
        stack.callback(print if keep else shutil.rmtree, folder)
        settings = replace(settings, folder=folder)
        try:
            return lived(settings, World(settings, server, stack))
        except BaseException as error:
            for path in sorted(Path(folder).glob("*.err")):
                print(f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-15:], sep="\n", file=sys.stderr)
            if not isinstance(error, (TimeoutError, AssertionError, EOFError)):
                raise
            print(f"WRONG stuck: {error!r}")
            return {"stuck": Finding(1, repr(error))}


def lived(settings: Settings, world: World) -> dict[str, Finding]:
    begin = time.monotonic()
    world.live()
    counts, stuck = world.settle()
    seconds = time.monotonic() - begin
    channels = [*world.channels()]
    rows = world.rows()
    world.end()
    dropped = frozenset((stream, machine) for stream, row in rows.items() for machine in row if row[machine].dropped)
    reasons = Reasons(world.killed, dropped, world.losses)
    published = dict(zip(SOURCES, counts, strict=True))
    findings = check(published, [channel for channel, _ in channels], LAYOUT, reasons)
    findings |= check_figures(published, rows, LAYOUT, reasons)
    for what, examples in (("stuck", stuck), ("errors of channels", [text for _, texts in channels for text in texts])):
        if examples:
            findings[what] = Finding(len(examples), examples[0])
    facts = {"engine": settings.engine, "seed": settings.seed, "seconds": round(seconds, 1), "published": sum(counts)}
    facts |= {"received": sum(len(channel.log.records) for channel, _ in channels), "happened": dict(world.counts)}
    for name in ("sent", "received", "dropped", "missed", "duplicates", "refused"):
        facts[f"bridges: {name}"] = sum(getattr(each, name) for row in rows.values() for each in row.values())
    print(json.dumps(facts))
    for what, finding in findings.items():
        print(f"WRONG {what}: {finding.occurrences} times, e.g. {finding.example}")
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Settings):
        if field.name in ("only", "folder"):
            continue
        if field.type == "bool":
            parser.add_argument(f"--{field.name}", action="store_true")
        else:
            kind = {"int": int, "float": float, "str": str}[str(field.type)]
            parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    parser.add_argument("--only", nargs="*", default=(), help="the names of what can happen, of class World")
    parser.add_argument("--keep", action="store_true", help="keep the folder with logs, and print its name")
    options = vars(parser.parse_args())
    keep = options.pop("keep")
    return 1 if run(Settings(**options | {"only": tuple(options["only"])}), keep) else 0


if __name__ == "__main__":
    sys.exit(main())
