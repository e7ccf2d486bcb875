"""NATS: one stream of JetStream, by nats-py. A position is a sequence number, a time and the end of the entry's bytes.

A server that has lost its end gives sequence numbers again; the end of a signature shows that. The time is the server's, in
milliseconds; only if an entry is gone it decides where reading goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import re
import ssl
import time
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, PubAck, RetentionPolicy, StorageType, StreamConfig, StreamInfo
from nats.js.errors import APIError, NotFoundError, ServiceUnavailableError

from mpbroadcast.bridge.engine import EngineRefused, longest_entry, shown
from mpbroadcast.bridge.entries import LEAST
from mpbroadcast.bridge.retention import retention_of

_ENTRIES: Final = 64  # of one request
_BYTES: Final = 4 << 20  # of one request
_HEARTBEAT: Final = 2  # seconds: a server with nothing to send sends this
_SILENCE: Final = 6.0  # seconds without entry and heartbeat, after which the server counts as gone
_EXPIRES: Final = 30  # seconds: a request ends
_INACTIVE: Final = 300.0  # seconds: the server removes a consumer without requests
_OPTIONS: Final = {"tls_ca", "tls_cert", "tls_key", "credentials"}
_LASTING: Final = ("authorization violation", "permissions violation", "user authentication", "account authentication")
_NAME_IN_USE: Final = 10058
_SECOND: Final = 1_000_000_000  # ns


class _Tls(ssl.SSLContext):
    """Gives user and password to the client when TLS begins, not before: a server without TLS, or one that an attacker between
    has made look so, does not get them."""

    secrets: dict[str, str]
    client_options: dict[str, Any]
    is_used = False

    def wrap_bio(self, *args: Any, **named: Any) -> ssl.SSLObject:
        self.client_options.update(self.secrets)
        self.is_used = True
        return super().wrap_bio(*args, **named)


class NatsEngine:
    """One JetStream stream, with one subject of the same name.

    The URL: ``nats://[USER:PASSWORD@ or TOKEN@]HOST[:PORT]``, several servers separated by commas, percent-escapes allowed;
    ``tls://`` refuses a server without TLS. Options behind ``?``: ``tls_ca`` (a file of certificates, for servers whose
    authority the system does not know), ``tls_cert`` and ``tls_key`` (this client's own), ``credentials`` (a ``.creds`` file).
    """

    def __init__(self, url: str, stream: str, max_bytes: int, max_age: float) -> None:
        if not re.fullmatch(r"[\w:-]{1,200}", stream, flags=re.ASCII):
            raise ValueError(f"{stream!r} is no name for a stream of NATS: letters, digits, '-', '_' and ':'")
        self.max_entry = longest_entry(max_bytes)
        self._stream = stream
        self._most = 2 * max(max_bytes, 1 << 16)
        self._retention = retention_of(url, stream, max_bytes, max_age)
        self._servers, self._secrets, self._files = _parsed(url)
        self._is_tls = url.lower().startswith("tls:")
        self._client = Client()
        self._js = self._client.jetstream(timeout=5)
        self._is_begun = False  # a client that was never to connect cannot be closed
        self._failed: Exception | None = None
        self._lost: asyncio.Future[None] | None = None  # done: the connection is
        self._since: int | None = None  # a time in ms before what is appended
        self._next = ""  # the subject of requests for entries; "": not reading
        self._inbox = ""
        self._messages: Any = None
        self._requested = 0  # entries that the server may still send
        self._last = 0  # sequence number behind which reading goes on; 0: unknown
        self._silent = 0.0  # seconds that a read has waited since the server has sent anything
        self._number = 0  # how many entries the consumer has sent

    async def open(self) -> None:
        async def note(error: Exception) -> None:
            self._failed = self._failed or error

        async def note_end() -> None:
            if not lost.done():
                lost.set_result(None)

        lost = self._lost = asyncio.get_running_loop().create_future()
        options: dict[str, Any] = {"allow_reconnect": False, "max_reconnect_attempts": 1, "reconnect_time_wait": 0}
        tls = None
        if self._is_tls or any(name.startswith("tls_") for name in self._files):
            tls = options["tls"] = _context(self._files)
            tls.secrets = self._secrets
            tls.client_options = self._client.options
        else:
            options.update(self._secrets)
        if credentials := self._files.get("credentials"):
            _check_credentials(credentials)
            options["user_credentials"] = credentials
        self._is_begun = True
        try:
            await self._client.connect(self._servers, error_cb=note, closed_cb=note_end, connect_timeout=3, **options)
        except (NatsError, OSError) as error:
            raise self._explained(self._failed or error) from None
        except ImportError as error:
            raise EngineRefused("a credentials file needs: pip install 'nats-py[nkeys]'") from error
        if tls is not None and not tls.is_used:
            raise EngineRefused("the server has no TLS, and the URL asks for it")
        self._failed = None
        self.max_entry = min(self.max_entry, self._client.max_payload - 128 - len(self._stream))  # that is a header
        if self.max_entry < LEAST:
            raise EngineRefused(f"max_payload of the server is {self._client.max_payload} bytes: too few for entries")
        try:
            await self._open_stream()
        except (NatsError, OSError) as error:
            raise self._explained(error) from error

    async def _open_stream(self) -> None:
        try:
            info = await self._js.stream_info(self._stream)
        except NotFoundError:
            config = StreamConfig(name=self._stream, subjects=[self._stream], storage=StorageType.FILE, max_bytes=self._most)
            try:
                info = await self._js.add_stream(config)
            except APIError as error:
                if error.err_code != _NAME_IN_USE:
                    raise EngineRefused(f"NATS cannot make the stream {self._stream!r}: {error.description}") from error
                info = await self._js.stream_info(self._stream)  # another bridge has made it just now
        if info.config.subjects != [self._stream] or info.config.retention not in (None, RetentionPolicy.LIMITS):
            raise EngineRefused(f"the stream {self._stream!r} is one for other subjects: choose another name for the stream")

    async def append(self, entry: bytes) -> str:
        try:
            made = await self._publish(entry)
            if self._since is None:
                self._since = _milliseconds((await self._js.get_msg(self._stream, made.seq)).time)
        except (NatsError, OSError) as error:
            raise self._explained(error) from error
        return f"{made.seq}.{self._since}.{_tail(entry)}"

    async def _publish(self, entry: bytes) -> PubAck:
        """Publish an entry. Where the connection ends, nats-py would wait for the answer until its time has passed."""
        assert self._lost is not None
        publishing = asyncio.ensure_future(self._js.publish(self._stream, entry, timeout=5, stream=self._stream))
        try:
            await asyncio.wait((publishing, self._lost), return_when=asyncio.FIRST_COMPLETED)
            if publishing.done():
                return publishing.result()
            raise self._failed or ConnectionError("the connection is lost")
        finally:
            publishing.cancel()

    async def seek(self, position: str) -> bool:
        try:
            return await self._seek(position)
        except (NatsError, OSError) as error:
            raise self._explained(error) from error

    async def _seek(self, position: str) -> bool:
        config = ConsumerConfig(ack_policy=AckPolicy.NONE, inactive_threshold=_INACTIVE, mem_storage=True)
        config.deliver_policy = DeliverPolicy.ALL
        is_there = False
        if match := re.fullmatch(r"(\d+)\.(\d+)\.(\w*)", position):  # else one of another engine, by which it was linked before
            sequence = int(match[1])
            with contextlib.suppress(NotFoundError):
                is_there = _tail((await self._js.get_msg(self._stream, sequence)).data or b"") == match[3]
            if is_there:
                config.deliver_policy, config.opt_start_seq = DeliverPolicy.BY_START_SEQUENCE, sequence + 1
                self._retention.add(sequence, 0, time.monotonic())
                self._last = sequence
            elif sequence >= (await self._info()).state.first_seq:  # it has lost its end: what came since is later
                config.deliver_policy = DeliverPolicy.BY_START_TIME
                config.opt_start_time = datetime.datetime.fromtimestamp(int(match[2]) / 1000, datetime.UTC)
        if not is_there:
            self._retention.reset()
        consumer = await self._js.add_consumer(self._stream, config)
        self._inbox = self._client.new_inbox()
        self._messages = await self._client.subscribe(self._inbox)
        self._next = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{consumer.name}"
        return is_there

    async def _info(self) -> StreamInfo:
        return await self._js.stream_info(self._stream)

    async def read(self, timeout: float) -> list[tuple[str, bytes]]:
        try:
            return await self._read(timeout)
        except (NatsError, OSError) as error:
            raise self._explained(error) from error

    async def _read(self, timeout: float) -> list[tuple[str, bytes]]:
        deadline = time.monotonic() + timeout
        entries: list[tuple[str, bytes]] = []
        while not entries or self._messages.pending_msgs:
            if self._failed or not self._client.is_connected:
                raise self._failed or ConnectionError("the connection is lost")
            if not self._requested:
                await self._request()
            now = time.monotonic()
            try:
                message = await self._messages.next_msg(timeout=max(0.001, min(deadline - now, _SILENCE)))
            except TimeoutError:
                self._silent += time.monotonic() - now
                if self._silent >= _SILENCE:
                    raise ConnectionError(f"nothing has come from the server for {_SILENCE:.0f} s") from None
                if time.monotonic() >= deadline:
                    break
                continue
            self._silent = 0.0
            if message.reply:  # an entry, whatever headers it has
                entries.append(await self._taken(message))
            else:
                self._note_status(message.headers or {})
        return entries

    async def _request(self) -> None:
        """Ask for entries, and for heartbeats until they come."""
        self._requested = _ENTRIES
        most = max(_BYTES, self._client.max_payload + (1 << 16))  # one that is longer would never come
        request = {"batch": _ENTRIES, "max_bytes": most, "expires": _EXPIRES * _SECOND, "idle_heartbeat": _HEARTBEAT * _SECOND}
        await self._client.publish(self._next, json.dumps(request).encode(), reply=self._inbox)

    def _note_status(self, headers: dict[str, str]) -> None:
        status, description = headers.get("Status", ""), headers.get("Description", "")
        if status == "100":
            return  # a heartbeat
        self._requested = 0
        if status not in ("404", "408") and "MaxBytes" not in description and "Completed" not in description:
            raise ConnectionError(f"the server has ended the reading: {status} {description}")

    async def _taken(self, message: Msg) -> tuple[str, bytes]:
        """Return an entry, and its position. What was removed behind the one before it is an error."""
        metadata = message.metadata
        sequence = metadata.sequence.stream
        self._requested -= 1
        self._number += 1
        if metadata.sequence.consumer != self._number:
            raise ConnectionError("an entry was lost on its way")
        if self._last and sequence != self._last + 1:
            try:
                await self._js.get_msg(self._stream, self._last)  # else a single one was deleted, which no second look changes
            except NotFoundError:
                raise ConnectionError(f"the stream {self._stream!r} was emptied or cut behind what was read") from None
        self._last = sequence
        self._retention.add(sequence, len(message.data), time.monotonic())
        return f"{sequence}.{_milliseconds(metadata.timestamp)}.{_tail(message.data)}", message.data

    async def lag(self, position: str) -> int | None:
        try:
            state = (await self._info()).state
        except (NatsError, OSError) as error:
            raise self._explained(error) from error
        sequence = position.partition(".")[0]
        return max(0, min(state.messages, state.last_seq - int(sequence))) if sequence.isdigit() else state.messages

    async def trim(self) -> None:
        """Remove what is too old or too much, if this is the side that reads. The server holds twice ``max_bytes`` itself."""
        if self._next and (cut := self._retention.cut(time.monotonic())):
            try:
                await self._js.purge_stream(self._stream, seq=cut)
            except (NatsError, OSError) as error:
                raise self._explained(error) from error

    async def close(self) -> None:
        if not self._is_begun:
            return
        try:
            async with asyncio.timeout(1.0):
                await self._client.close()
        except (NatsError, OSError):  # TimeoutError is one
            pass

    def _explained(self, error: Exception) -> Exception:
        """Return the error with a text, as a refusal if it will last."""
        known = [error, self._failed] if self._failed else [error]  # a request without permission is only not answered
        if any(sign in str(one).lower() for one in known for sign in _LASTING):
            return EngineRefused(f"NATS refuses: {' '.join(str(one) for one in known)}")
        if "not enabled" in str(error):
            return EngineRefused(f"NATS refuses: {error}")
        if isinstance(error, ServiceUnavailableError):
            return ConnectionError(f"JetStream does not answer: {error.description or 'is it enabled?'}")
        return error if str(error) else ConnectionError(type(error).__name__)


def _parsed(url: str) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Return the servers without secrets, the secrets as options of nats-py, and the options with names of files.

    :raises ValueError: the URL makes no sense; no secret is in the text.
    """
    servers = []
    secrets: dict[str, str] = {}
    files: dict[str, str] = {}
    wrong = f"the URL {shown(url)!r} is not nats://[USER:PASSWORD@]HOST[:PORT], or a special character needs a percent-escape"
    for one in url.split(","):
        try:
            parts = urlsplit(one if "://" in one else f"{url.partition('://')[0]}://{one}")
            port = parts.port or 4222
        except ValueError:
            raise ValueError(wrong) from None  # the cause has a part of the URL
        if not parts.hostname or parts.scheme not in ("nats", "tls") or parts.path not in ("", "/") or parts.fragment:
            raise ValueError(wrong)
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        servers.append(f"{parts.scheme}://{host}:{port}")
        if parts.username and parts.password is not None:
            secrets = {"user": unquote(parts.username), "password": unquote(parts.password)}
        elif parts.username:
            secrets = {"token": unquote(parts.username)}
        files.update(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := {*files} - _OPTIONS:
        raise ValueError(f"a URL of NATS has no option {min(unknown)!r}: it may have {', '.join(sorted(_OPTIONS))}")
    return servers, secrets, files


def _context(files: dict[str, str]) -> _Tls:
    context = _Tls(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if authority := files.get("tls_ca"):
            context.load_verify_locations(authority)
        else:
            context.load_default_certs()
        if certificate := files.get("tls_cert"):
            context.load_cert_chain(certificate, files.get("tls_key"))
    except OSError as error:
        raise EngineRefused(f"a file of tls_ca, tls_cert or tls_key: {error}") from error
    return context


def _check_credentials(path: str) -> None:
    try:
        with open(path, encoding="latin-1") as file:
            if "BEGIN USER NKEY SEED" in file.read():
                return
        why = "it has no key of a user"
    except OSError as error:
        why = str(error)
    raise EngineRefused(f"the credentials file {path!r}: {why}")


def _milliseconds(moment: datetime.datetime | None) -> int:
    return int(moment.timestamp() * 1000) if moment else 0


def _tail(data: bytes) -> str:
    return data[-4:].hex()
