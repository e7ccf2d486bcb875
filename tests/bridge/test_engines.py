"""The engines, each over a real server: one table of cases for both, then what is of one only."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nats
import pytest
from nats.errors import Error as NatsError
from redis.exceptions import RedisError

from mpbroadcast.bridge.engine import Engine, EngineRefused, engine_class, shown
from tests.bridge.nats_users import make_user
from tests.bridge.servers import ENGINES, NatsServer, RedisServer, Server, nats_server, redis_server
from tests.support.helpers import DEADLINE

MIB = 1 << 20
SECRET = "p@ss/w:r d,?#%41ü"
Case = Callable[[Any], Coroutine[Any, Any, None]]


@contextlib.asynccontextmanager
async def opened(
    server: Server | str, *, stream: str = "room", max_bytes: int = 64 * MIB, max_age: float = 3600.0
) -> AsyncIterator[Engine]:
    """An engine that is open, closed at the end."""
    url = server if isinstance(server, str) else server.url
    engine = engine_class(url)(url, stream, max_bytes, max_age)
    try:
        async with asyncio.timeout(DEADLINE):
            await engine.open()
            yield engine
    finally:
        await engine.close()


async def opening_fails(url: str, stream: str = "room", kind: type[Exception] = EngineRefused) -> str:
    """Return the text of the error that opening meets: a refusal, or of the given kind."""
    with pytest.raises(kind) as caught:
        async with opened(url, stream=stream):
            pass
    assert kind is EngineRefused or not isinstance(caught.value, EngineRefused)
    return str(caught.value)


async def take(engine: Engine, count: int) -> list[bytes]:
    """Return the next ``count`` entries, or those that come until there are no more."""
    found: list[bytes] = []
    while len(found) < count and (entries := await engine.read(1.0)):
        found += [data for _, data in entries]
    return found


async def fails(call: Callable[[], Coroutine[Any, Any, object]]) -> Exception:
    """Repeat a call until it raises, and return what."""
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                await call()
            except Exception as error:
                return error


async def appends_and_reads(server: Server) -> None:
    """What is appended is read in order, from any position on, that of an append or of a read; arbitrary bytes."""
    data = [b"first", b"", bytes(range(256)) * 100, b"\r\n+OK\r\n", b"last"]
    async with opened(server) as out, opened(server) as inn:
        positions = [await out.append(one) for one in data]
        assert await inn.seek(positions[0])
        assert await take(inn, 4) == data[1:]
        assert await inn.read(0.01) == []
        waiting = asyncio.create_task(inn.read(DEADLINE))
        await asyncio.sleep(0.05)
        await out.append(b"later")
        ((later, entry),) = await waiting
        assert entry == b"later"
        assert await inn.read(0.01) == []
    for position, rest in [*zip(positions, [data[i:] for i in range(1, 6)], strict=True)]:
        async with opened(server) as inn:
            assert await inn.seek(position)
            assert await take(inn, len(rest) + 1) == [*rest, b"later"]
            assert await inn.seek(later)
    async with opened(server) as inn:
        assert not await inn.seek("1.of.another-engine")
        assert await take(inn, 6) == [*data, b"later"]


async def knows_its_lag(server: Server) -> None:
    """About how many entries there are behind a position; none behind the newest."""
    async with opened(server) as engine:
        positions = [await engine.append(b"%d" % i) for i in range(30)]
        lags = [await engine.lag(position) for position in positions]
        assert lags[-1] == 0
        assert all(lag is not None and 1 <= lag <= 30 for lag in lags[:-1])


async def bounds_entries(server: Server) -> None:
    """The longest entry is taken. A log that keeps little has shorter ones."""
    async with opened(server) as engine:
        assert engine.max_entry == 1 << 19
        position = await engine.append(b"x" * engine.max_entry)
        for _ in range(10):
            await engine.append(b"x" * engine.max_entry)
        assert await engine.seek(position)
        assert await take(engine, 10) == [b"x" * engine.max_entry] * 10
    async with opened(server, max_bytes=100_000) as engine:
        assert engine.max_entry == 100_000 // 16


async def survives_a_kill(server: Server) -> None:
    """Whatever was acknowledged is there after ``kill -9`` and a restart; what came before it goes on behind it."""
    async with opened(server) as engine:
        positions = [await engine.append(b"0")]
        asyncio.get_running_loop().call_later(0.2, server.kill)
        await fails(lambda: append_next(engine, positions))
    server.restart()
    async with opened(server) as engine:
        assert await engine.seek(positions[-1])
        assert await engine.seek(positions[0])
        got = await take(engine, 1 << 30)
        assert got[: len(positions) - 1] == [b"%d" % i for i in range(1, len(positions))]
        assert len(got) <= len(positions)  # the last one was perhaps taken, and not acknowledged


async def append_next(engine: Engine, positions: list[str]) -> None:
    positions.append(await engine.append(b"%d" % len(positions)))


async def notices_a_stop(server: Server) -> None:
    """A server that is stopped is an error for each side, with a text, and so is opening; then it goes on with what it has."""
    async with opened(server) as out, opened(server) as inn:
        position = await out.append(b"0")
        assert await inn.seek(position)
        with server.stopped():
            begin = time.monotonic()
            append, read = (
                asyncio.create_task(fails(lambda: out.append(b"1"))),
                asyncio.create_task(fails(lambda: inn.read(1.0))),
            )
            assert await opening_fails(server.url, kind=Exception)
            for error in await asyncio.gather(append, read):
                assert str(error)
                assert not isinstance(error, EngineRefused)
            assert time.monotonic() - begin < DEADLINE
            await out.close()
            await inn.close()
    async with opened(server) as engine:
        await engine.append(b"2")
        assert await engine.seek(position)
        assert (await take(engine, 2))[-1] == b"2"


async def notices_an_empty_restart(server: Server) -> None:
    """A position is not taken for one of the same number in the new log, of which all is read."""
    async with opened(server) as engine:
        positions = [await engine.append(b"old %d" % i) for i in range(5)]
    server.restart(empty=True)
    async with opened(server) as engine:
        assert not await engine.seek(positions[3])
        for i in range(5):
            await engine.append(b"new %d" % i)
        assert await take(engine, 5) == [b"new %d" % i for i in range(5)]
    for position in positions:
        async with opened(server) as engine:
            assert not await engine.seek(position)
            assert await take(engine, 5) == [b"new %d" % i for i in range(5)]
    if isinstance(server, RedisServer):  # which gives an ID again as soon as its clock has gone back
        with server.client() as client:
            client.delete("room")
            client.xadd("room", {"e": b"another"}, id=positions[0].partition(".")[0])
        async with opened(server) as engine:
            assert not await engine.seek(positions[0])


async def appends_once(server: Server) -> None:
    """Whether the engine has an entry whose acknowledgement is lost is not known: an error, and nothing is sent again."""
    is_lost = False

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal is_lost
        answers, requests = await asyncio.open_connection("127.0.0.1", server.port)

        async def back() -> None:
            nonlocal is_lost
            while (data := await answers.read(1 << 16)) and not is_lost:
                writer.write(data)
            is_lost = False  # a second attempt would succeed
            writer.close()

        returning = asyncio.create_task(back())
        while data := await reader.read(1 << 16):
            is_lost = is_lost or b"an entry" in data
            requests.write(data)
        requests.close()
        await returning

    async with await asyncio.start_server(relay, "127.0.0.1", 0) as between, opened(server) as engine:
        port = between.sockets[0].getsockname()[1]
        first = await engine.append(b"first")
        async with opened(server.url.replace(str(server.port), str(port))) as cut:
            with pytest.raises((OSError, NatsError, RedisError)):
                await cut.append(b"an entry")
        assert await engine.seek(first)
        assert await take(engine, 2) == [b"an entry"]


async def notices_a_lost_end(server: Server) -> None:
    """A server that has gone back in time: what it has lost is noticed, and what came since is read, but nothing older."""
    async with opened(server) as engine:
        kept = [await engine.append(b"kept %d" % i) for i in range(3)]
        copy = server.save()
    async with opened(server) as engine:
        lost = [await engine.append(b"lost %d" % i) for i in range(3)]
    server.go_back(copy)
    async with opened(server) as engine:
        assert not await engine.seek(lost[2])
        for i in range(5):
            await engine.append(b"new %d" % i)
        assert await take(engine, 5) == [b"new %d" % i for i in range(5)]
    for position in lost:
        async with opened(server) as engine:
            assert not await engine.seek(position)
            assert await take(engine, 5) == [b"new %d" % i for i in range(5)]
    async with opened(server) as engine:
        assert await engine.seek(kept[1])
        assert await take(engine, 6) == [b"kept 2", *(b"new %d" % i for i in range(5))]


async def trims_by_size(server: Server) -> None:
    """About ``max_bytes`` are kept, at most twice that, by the side that reads. A bridge that is behind notices."""
    async with (
        opened(server, max_bytes=MIB) as out,
        opened(server, max_bytes=MIB) as inn,
        opened(server, max_bytes=MIB) as behind,
    ):
        first = await out.append(b"first")
        assert await inn.seek(first)
        assert await behind.seek(first)
        for i in range(100):
            last = await out.append(b"%06d" % i * 5000)
            assert await take(inn, 1)
            await inn.trim()
            await out.trim()
        error = await fails(lambda: behind.read(0.1))
        assert "cut" in str(error)
    async with opened(server) as engine:
        assert await engine.seek(last)
        assert not await engine.seek(first)
        left = await take(engine, 1 << 30)
        assert MIB <= sum(map(len, left)) <= 1.5 * MIB
        assert left[-1] == b"%06d" % 99 * 5000


async def trims_by_age(server: Server) -> None:
    """What a bridge has read ``max_age`` seconds ago is removed, also when connections end; the newest stays."""
    async with opened(server, max_age=1.0) as engine:
        position = first = await engine.append(b"first")
    begin = time.monotonic()
    while time.monotonic() < begin + 1.5:
        async with opened(server, max_age=1.0) as engine:
            assert await engine.seek(position)
            position = await engine.append(b"hello")
            await take(engine, 1)
            await asyncio.sleep(0.1)
            await engine.trim()
    async with opened(server) as engine:
        assert not await engine.seek(first)
        assert await engine.seek(position)


async def notices_that_it_was_emptied(server: Server) -> None:
    """The stream is deleted while a bridge waits for entries; or one entry is, behind what was read, which ends nothing."""
    async with opened(server) as out, opened(server) as inn:
        assert await inn.seek(await out.append(b"0"))
        positions = [await out.append(b"%d" % i) for i in range(1, 5)]
        assert await take(inn, 4) == [b"1", b"2", b"3", b"4"]
        middle = await out.append(b"5")
        positions.append(await out.append(b"6"))
        await delete(server, middle)
        assert (await take(inn, 2))[-1] == b"6"
        await out.append(b"7")
        assert await take(inn, 1) == [b"7"]
        await delete(server)
        assert not isinstance(await fails(lambda: inn.read(1.0)), EngineRefused)
    async with opened(server) as engine:
        assert not await engine.seek(positions[-1])
        await engine.append(b"new")
        assert await take(engine, 1) == [b"new"]


async def delete(server: Server, position: str = "") -> None:
    """Delete the stream, or one entry."""
    if isinstance(server, RedisServer):
        with server.client() as client:
            assert client.xdel("room", position.partition(".")[0]) if position else client.delete("room")
    else:
        async with await nats.connect(server.url) as client:
            manager = client.jsm()
            if position:
                await manager.delete_msg("room", int(position.partition(".")[0]))
            else:
                await manager.delete_stream("room")


async def refuses_another_kind(server: Server) -> None:
    """Something else under the stream's name, at the start and later, is a refusal that names it, and nothing is changed."""
    if isinstance(server, RedisServer):
        with server.client() as client:
            client.rpush("list", "x")
    else:
        async with await nats.connect(server.url) as client:
            await client.jsm().add_stream(name="list", subjects=["list.*"])
    assert "list" in await opening_fails(server.url, "list")
    for wrong in ("", "a\0b"):
        with pytest.raises(ValueError, match="name"):
            engine_class(server.url)(server.url, wrong, MIB, 60.0)
    if isinstance(server, RedisServer):
        async with opened(server) as engine:
            position = await engine.append(b"0")
            await engine.seek(position)
            with server.client() as client:
                client.delete("room")
                client.rpush("room", "x")
            for call in (lambda: engine.append(b"1"), lambda: engine.read(0.1), lambda: engine.lag(position)):
                assert "Redis refuses" in str(await fails(call))


async def takes_what_others_have_written(server: Server) -> None:
    """What no bridge has written is read as any entry, whatever it is, and ends nothing."""
    async with opened(server, max_bytes=MIB) as engine:
        position = await engine.append(b"0")
        if isinstance(server, RedisServer):
            with server.client() as client:
                client.xadd("room", {"x": "y", "z": "z"})
                client.xadd("room", {"e": "garbage"})
                client.xadd("room", {"e": b"x" * 5 * MIB})
                client.xadd("room", {"e": b"of a clock that was ahead"}, id="9999999999999-5")
        else:
            async with await nats.connect(server.url) as client:
                for status in ("409", "100", "503"):
                    await client.jetstream().publish("room", b"", headers={"Status": status, "Description": "Consumer Deleted"})
                await client.jetstream().publish("room", b"x" * 1000_000)
        newest = await engine.append(b"1")
        assert await engine.seek(position)
        got = await take(engine, 5)
        assert len(got) == 5
        assert got[-1] == b"1"
        assert await engine.lag(newest) == 0
        await engine.trim()
        assert await engine.seek(newest)


# Where a test ends its loop, the client libraries are not through with the ends of their TLS connections.
UNCLOSED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
CASES: list[Case] = [
    appends_and_reads,
    knows_its_lag,
    bounds_entries,
    appends_once,
    survives_a_kill,
    notices_a_stop,
    notices_an_empty_restart,
    notices_a_lost_end,
    trims_by_size,
    trims_by_age,
    notices_that_it_was_emptied,
    refuses_another_kind,
    takes_what_others_have_written,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine(engine: str, case: Case) -> None:
    """Each case, with each engine."""
    with ENGINES[engine]() as server:
        asyncio.run(case(server))


@pytest.fixture(params=["redis", "nats", "redis, TLS", "nats, TLS", "nats, token"])
def guarded(request: pytest.FixtureRequest) -> Iterator[tuple[Server, str]]:
    """A server that wants a password of odd characters, and its URL with ``SECRET`` where that is to stand."""
    engine, _, kind = request.param.partition(", ")
    options: dict[str, Any] = {"token": SECRET} if kind == "token" else {"password": SECRET}
    with ENGINES[engine](**options, **({"tls": True} if kind == "TLS" else {})) as server:
        yield server, server.url.replace(SECRET, "SECRET")


@UNCLOSED
def test_passwords(guarded: tuple[Server, str]) -> None:
    """The right one works, percent-escaped; a wrong one, none, and one that is not escaped are refused. None is shown."""
    _, url = guarded

    async def use() -> None:
        async with opened(url.replace("SECRET", quote(SECRET, safe=""))) as engine:
            assert await engine.seek(await engine.append(b"x"))
            assert SECRET not in repr(engine)
        for wrong in (
            url.replace("SECRET", "wrong-one"),
            url.replace(":SECRET@", "@" if "bridge" in url else "").replace("SECRET@", ""),
        ):
            text = await opening_fails(wrong)
            assert "wrong-one" not in text
            assert "SECRET" not in text

    asyncio.run(use())
    with pytest.raises(ValueError, match="percent-escape") as caught:
        engine_class(url.replace("SECRET", SECRET))
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert not [
        part for part in ("p@ss", "w:r", "%41", "ss/w") if part in f"{caught.value}{shown(url.replace('SECRET', SECRET))}"
    ]


def test_credentials_of_nats(tmp_path: Path) -> None:
    """A user that proves a key from a file; a file that is not there or has none is refused with its name."""
    path = tmp_path / "user.creds"
    with nats_server(options=make_user(path)) as server:

        async def use() -> None:
            async with opened(f"{server.url}?credentials={path}") as engine:
                assert await engine.seek(await engine.append(b"x"))

        asyncio.run(use())
        assert "Authorization" in asyncio.run(opening_fails(server.url))
        path.write_text("garbage")
        for wrong in (path, tmp_path / "none"):
            assert str(wrong) in asyncio.run(opening_fails(f"{server.url}?credentials={wrong}"))


@UNCLOSED
@pytest.mark.parametrize("engine", ENGINES)
def test_tls(engine: str) -> None:
    """A server whose certificate is not known is no server; the text has the reason."""
    with ENGINES[engine](tls=True) as server:
        error = asyncio.run(opening_fails(server.url.partition("?")[0], kind=Exception))
        assert "certificate" in error.lower()


def test_a_server_without_tls_gets_no_password() -> None:
    """``tls://`` never falls back, also when an attacker in between has removed the server's offer of TLS."""
    received = b""

    def pretend(listener: socket.socket) -> None:
        nonlocal received
        connection, _ = listener.accept()
        with connection:
            connection.sendall(
                b'INFO {"server_id":"x","version":"2.10.0","auth_required":true,"max_payload":1048576,"headers":true}\r\n'
            )
            received = connection.recv(1 << 16)
            connection.sendall(b"PONG\r\n")
            while more := connection.recv(1 << 16):
                received += more

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=pretend, args=(listener,))
        thread.start()
        url = f"tls://user:{quote(SECRET, safe='')}@127.0.0.1:{listener.getsockname()[1]}"
        assert "no TLS" in asyncio.run(opening_fails(url))
        thread.join(DEADLINE)
    assert b"CONNECT" in received
    assert b"pass" not in received


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("redis://:a@b/c@host/0", "percent-escape"),
        ("redis://host:port/0", "percent-escape"),
        ("redis://host/0?colour=blue", "redis-py"),
        ("redis://host/0?protocol=3", "redis-py"),
        ("rediss://host/0?socket_timeout=soon", "redis-py"),
        ("nats://", "HOST"),
        ("nats://host:port", "percent-escape"),
        ("nats://host/path", "HOST"),
        ("nats://host,redis://host", "HOST"),
        ("nats://host?tls_cas=x", "tls_cas"),
    ],
)
def test_a_url_that_makes_no_sense(url: str, text: str) -> None:
    """An error at once, without a connection."""
    with pytest.raises(ValueError, match=text):
        engine_class(url)(url, "room", MIB, 60.0)


def test_small_payloads_of_nats() -> None:
    """A server's ``max_payload`` bounds entries, header included; one of too few bytes is refused."""

    async def use(server: NatsServer) -> None:
        async with opened(server) as engine:
            assert 9_000 < engine.max_entry < 10_000
            assert await engine.seek(await engine.append(b"x" * engine.max_entry))

    with nats_server(max_payload=10_000) as server:
        asyncio.run(use(server))
    with nats_server(max_payload=1000) as server:
        assert "max_payload" in asyncio.run(opening_fails(server.url))


def test_nats_without_jetstream() -> None:
    """It is no server yet: one that starts, or whose cluster has no leader, answers in the same words."""
    with nats_server(jetstream=False) as server:
        assert "JetStream" in asyncio.run(opening_fails(server.url, kind=Exception))


def test_redis_without_memory() -> None:
    """``noeviction``: appending is an error that may pass, and reading goes on. ``allkeys-lru``: that the stream has gone is
    noticed."""

    async def fill(server: RedisServer) -> None:
        async with opened(server) as out, opened(server) as inn:
            position = await out.append(b"x" * 1000)
            assert await inn.seek(position)
            error = await fails(lambda: out.append(b"x" * 400_000))
            assert "maxmemory" in str(error)
            assert not isinstance(error, EngineRefused)
            assert await take(inn, 3)

    async def evict(server: RedisServer) -> None:
        async with opened(server) as out, opened(server) as inn:
            position = await out.append(b"x" * 1000)
            assert await inn.seek(position)
            with server.client() as client:
                numbers = count()
                while client.exists("room"):
                    client.set(f"cache:{next(numbers)}", b"x" * 100_000)
            assert "emptied" in str(await fails(lambda: inn.read(0.1)))

    with redis_server(maxmemory="8mb") as server:
        asyncio.run(fill(server))
    with redis_server(maxmemory="8mb", policy="allkeys-lru") as server:
        asyncio.run(evict(server))


def test_redis_fails_over_to_a_replica_that_lags() -> None:
    """What the replica did not have is noticed as lost; all that it had, and what comes then, is read."""

    async def use(master: RedisServer, replica: RedisServer) -> None:
        async with opened(master) as engine:
            kept = [await engine.append(b"kept %d" % i) for i in range(3)]
            with master.client() as client:
                assert client.wait(1, 10_000) == 1
            replica.stop()
            with master.client() as client:
                client.client_kill_filter(_type="replica")  # so that no more is on its way to it
            lost = [await engine.append(b"lost %d" % i) for i in range(3)]
        master.kill()
        replica.cont()
        replica.take_over(master)
        async with opened(master) as engine:
            assert not await engine.seek(lost[-1])
            await engine.append(b"new")
            assert await take(engine, 1) == [b"new"]
        async with opened(master) as engine:
            assert await engine.seek(kept[0])
            assert await take(engine, 3) == [b"kept 1", b"kept 2", b"new"]

    with redis_server() as master, redis_server(replica_of=master) as replica:
        asyncio.run(use(master, replica))


def test_a_replica_is_no_master() -> None:
    """One that does not take entries is an error that may pass: a failover may be on its way."""

    async def use(replica: RedisServer) -> None:
        async with opened(replica) as engine:
            error = await fails(lambda: engine.append(b"x"))
            assert "read only" in str(error)
            assert not isinstance(error, EngineRefused)

    with redis_server() as master, redis_server(replica_of=master) as replica:
        asyncio.run(use(replica))
