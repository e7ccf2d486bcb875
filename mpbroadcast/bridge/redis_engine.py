"""Redis: one stream, by redis-py. A position is the ID of an entry, and the end of its bytes.

Redis gives an ID again after it has lost its end (no persistence, failover), though seldom; the end of a signature shows that.
``XREAD`` does not show that entries behind the last ID were removed, so each read looks whether an entry that was read before
is still there: entries are removed from the oldest on.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any, Final

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError

from mpbroadcast.bridge.engine import EngineRefused, longest_entry, shown
from mpbroadcast.bridge.retention import retention_of

_ENTRIES: Final = 16  # of one read
_LONGEST_WAIT: Final = 2.0  # seconds, well below the socket's timeout, and how long a loss may be unnoticed
_SMALL: Final = 4096  # bytes of an entry that costs little to look at
_FIELD: Final = b"e"
_LASTING: Final = (
    "WRONGTYPE",
    "NOAUTH",
    "WRONGPASS",
    "NOPERM",
    "MOVED",
    "unknown command",
    "DB index",
    "AUTH",
    "username-password",
)


class RedisEngine:
    """One stream of a Redis server. The URL is redis-py's: ``redis://``, ``rediss://`` (TLS) or ``unix://``, with its options.

    A cluster is not supported; what is behind a name or a proxy that follows the master of a failover is.
    """

    def __init__(self, url: str, stream: str, max_bytes: int, max_age: float) -> None:
        if not stream or "\0" in stream:
            raise ValueError(f"{stream!r} is no name for a stream")
        self.max_entry = longest_entry(max_bytes)
        self._key = stream
        self._max_bytes = max_bytes
        self._retention = retention_of(url, stream, max_bytes, max_age)
        self._appended = 0
        self._last = b""  # the ID behind which reading goes on; b"": not reading
        self._known = b""  # an entry at or before it that was there; b"": none
        self._is_small = True
        try:
            # redis-py repeats commands by default, also ones that Redis may have executed.
            self._client: Any = Redis.from_url(url, protocol=2)
            pool: Any = self._client.connection_pool
            pool.connection_kwargs.update(retry=Retry(NoBackoff(), 0), retry_on_error=[], decode_responses=False)
            pool.connection_kwargs.update(socket_timeout=5.0, socket_connect_timeout=3.0)
            pool.make_connection()
            if int(pool.connection_kwargs["protocol"]) != 2:
                raise ValueError("answers would have another form")
        except (ValueError, TypeError, AttributeError, RedisError, OSError):  # its text may have a part of a password
            text = f"redis-py does not take the URL {shown(url)!r}: a special character in a password is percent-escaped"
            raise ValueError(f"{text}, and each option is one of redis-py's") from None

    async def open(self) -> None:
        try:
            kind = await self._client.type(self._key)
        except RedisError as error:
            raise _explained(error) from error
        if kind not in (b"none", b"stream"):
            raise EngineRefused(f"the key {self._key!r} is a {kind.decode()}, not a stream: choose another name for the stream")

    async def append(self, entry: bytes) -> str:
        self._appended += len(entry)
        try:
            made = await self._client.xadd(self._key, {_FIELD: entry})
        except RedisError as error:
            raise _explained(error) from error
        return _position(made, entry)

    async def seek(self, position: str) -> bool:
        entry_id = position.partition(".")[0].encode()
        if not re.fullmatch(rb"\d+-\d+", entry_id):
            entry_id = b"0-0"  # a position of another engine, that the broker was linked by before: all that is here is new
        try:
            entries = await self._client.xrange(self._key, entry_id, entry_id, count=1)
            if entries and _position(*_entry(entries[0])) == position:
                self._last = self._known = entry_id
                self._is_small = len(_entry(entries[0])[1]) <= _SMALL
                self._retention.add(_order(entry_id), 0, time.monotonic())
                return True
            newest = (await self._info())["last-generated-id"]
        except RedisError as error:
            raise _explained(error) from error
        self._retention.reset()
        self._last = min(newest, entry_id, key=_order)  # behind both, if the log has lost its end
        self._known = b""
        return False

    async def read(self, timeout: float) -> list[tuple[str, bytes]]:
        pipe = self._client.pipeline(transaction=False)
        pipe.xread({self._key: self._last}, count=_ENTRIES, block=max(1, int(min(timeout, _LONGEST_WAIT) * 1000)))
        if self._known:
            pipe.xrange(self._key, self._known, self._known, count=1)
        try:
            answer, *known = await pipe.execute()
            if known and not known[0] and not await self._is_there():
                raise ConnectionError(f"the stream {self._key!r} was emptied or cut behind what was read")
        except RedisError as error:
            raise _explained(error) from error
        entries = [_entry(one) for one in answer[0][1]] if answer else []
        now = time.monotonic()
        for entry_id, data in entries:
            self._last = entry_id
            self._retention.add(_order(entry_id), len(data), now)
            if not self._known or not self._is_small or len(data) <= _SMALL:
                self._known = entry_id
                self._is_small = len(data) <= _SMALL
        return [(_position(entry_id, data), data) for entry_id, data in entries]

    async def _is_there(self) -> bool:
        """Return True if the entry behind which reading goes on is still there, though an older one is not."""
        if self._known == self._last or not await self._client.xrange(self._key, self._last, self._last, count=1):
            return False
        self._known = self._last
        return True

    async def lag(self, position: str) -> int | None:
        """Return the number of entries behind ``position``, as if they had come evenly in time."""
        try:
            info = await self._info()
        except RedisError as error:
            raise _explained(error) from error
        at = _order(position.partition(".")[0].encode())
        newest = _order(info["last-generated-id"])
        if newest <= at or not info["length"]:
            return 0
        oldest = _order(_entry(info["first-entry"])[0])
        if at < oldest:
            return int(info["length"])
        return max(1, round(int(info["length"]) * (newest[0] - at[0]) / max(1, newest[0] - oldest[0])))

    async def _info(self) -> dict[str, Any]:
        if not await self._client.exists(self._key):
            return {"last-generated-id": b"0-0", "length": 0}
        return dict(await self._client.xinfo_stream(self._key))

    async def trim(self) -> None:
        """Remove what is too old or too much, if this is the side that reads. The side that appends looks now and then whether
        there is twice too much, as when no bridge reads."""
        try:
            if self._last:
                if cut := self._retention.cut(time.monotonic()):
                    await self._client.xtrim(self._key, minid=b"%d-%d" % cut, approximate=False)
            elif self._appended > self._max_bytes // 8:
                self._appended = 0
                # The count comes first: other bridges trim meanwhile, and so it is too high, if wrong.
                count = await self._client.xlen(self._key)
                used = await self._client.memory_usage(self._key, samples=0) or 0
                if used > 1.75 * self._max_bytes:
                    await self._client.xtrim(self._key, maxlen=int(count * self._max_bytes / used), approximate=True)
        except RedisError as error:
            raise _explained(error) from error

    async def close(self) -> None:
        try:
            async with asyncio.timeout(1.0):
                await self._client.aclose()
        except (RedisError, OSError):  # TimeoutError is one
            pass


def _entry(answer: Any) -> tuple[bytes, bytes]:
    """Return the ID and the bytes of an entry, as redis-py gives it. One that no bridge has written has none of ours."""
    entry_id, fields = answer
    if isinstance(fields, list):  # of XINFO
        fields = dict(zip(fields[::2], fields[1::2], strict=False))
    return entry_id, (fields or {}).get(_FIELD, b"")


def _position(entry_id: bytes, data: bytes) -> str:
    return f"{entry_id.decode()}.{data[-4:].hex()}"


def _order(entry_id: bytes) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition(b"-")
    return int(milliseconds), int(number)


def _explained(error: RedisError) -> Exception:
    """Return the error, as a refusal if it will last."""
    lasts = isinstance(error, (AuthenticationError, NoPermissionError)) or (
        isinstance(error, ResponseError) and any(sign in str(error) for sign in _LASTING)
    )
    return EngineRefused(f"Redis refuses: {error}") if lasts else error
