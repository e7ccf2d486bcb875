"""Requests, replies and the handshake on a control connection. Sans-IO: bytes in, bytes out.

A message is a length (4 bytes, big-endian) and a body, as ``multiprocessing.connection`` has it. First comes its
challenge: each side proves that it has the key, the client first. Here it is a state machine, because the standard functions
block: each silent client would keep a thread. The digest is HMAC-SHA256, which
``multiprocessing`` has from Python 3.12 on. Each side announces its version in its challenge, see ``version.py``.

Behind the handshake a body is JSON, an object: never a pickle.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Generator, Sequence
from struct import Struct
from typing import Any, Final, NamedTuple

from mpbroadcast.protocol.version import OWN, Announcement, announce, announced

MAX_REQUEST: Final = 4 << 20  # bytes of one request: some thousand topics of full length
MAX_REPLY: Final = 1 << 30  # bytes of one reply of the broker, which is trusted: stats of very many subscriptions
_DEEPEST: Final = 16  # levels of lists and objects in a body; ours have 4
_NO_BRACKETS: Final = bytes({*range(256)} - {*b"[]{}"})
MAX_HANDSHAKE: Final = 256  # bytes of one of its messages
_LENGTH: Final = Struct("!i")
_CHALLENGE: Final = b"#CHALLENGE#"
_WELCOME: Final = b"#WELCOME#"
_FAILURE: Final = b"#FAILURE#"
_SHA256: Final = b"{sha256}"
_RANDOM: Final = 32  # bytes of a challenge; an announcement follows them
_OWN: Final = announce(OWN)


class ControlError(Exception):
    """Bytes that no peer of this package sends, or a challenge that was not met."""


class WrongKey(ControlError):
    """A challenge that was not met: one side does not have the key of the other."""


class Inbox:
    """Splits a stream into messages; ``limit`` is the longest body that is accepted."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        self._data += data

    def __len__(self) -> int:
        """Return how many bytes have come and were not taken out."""
        return len(self._data)

    def next(self) -> bytes | None:
        """Take out and return the first body; ``None`` while it is not whole.

        :raises ControlError: a length below 0 or above the limit.
        """
        if len(self._data) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._data)
        if not 0 <= length <= self.limit:
            raise ControlError(f"a message of {length} bytes, where {self.limit} are the most")
        end = _LENGTH.size + length
        if len(self._data) < end:
            return None
        body = bytes(self._data[_LENGTH.size : end])
        del self._data[:end]
        return body


def frame(body: bytes) -> bytes:
    return _LENGTH.pack(len(body)) + body


def frame_of(*parts: bytes) -> list[bytes]:
    """Return the parts of a body as they travel, their length before them."""
    return [_LENGTH.pack(sum(map(len, parts))), *parts]


def encode(message: dict[str, Any]) -> bytes:
    return frame(json.dumps(message, separators=(",", ":")).encode())


def decode(body: bytes) -> dict[str, Any]:
    """Return the request or reply in a body.

    :raises ControlError: it is no JSON object, or a deep one.
    """
    try:
        text = body.decode()
        if body.count(b"[") + body.count(b"{") > _DEEPEST and _is_deep(body):
            raise ControlError("a body that is nested too deeply")
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ControlError("a body that is not JSON") from error
    if not isinstance(message, dict):
        raise ControlError("a body that is not an object")
    return message


def _is_deep(body: bytes) -> bool:
    # Since Python 3.14 the decoder recurses until 8 MB of stack are used, which the process then keeps. The brackets outside of
    # strings lose one or two levels with each turn: none is left of a body that is flat enough.
    outside = b"".join(body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    brackets = outside.translate(None, _NO_BRACKETS)
    for _ in range(_DEEPEST):
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    return bool(brackets)


class Proved(NamedTuple):
    """The outcome of a handshake: both sides have the key. ``peer`` is ``None`` if the other side announces no version."""

    last: bytes  # which is still to be sent; empty at the broker's side
    peer: Announcement | None


# It yields what to send, and is sent what was received. It raises ControlError, whose second argument, if it has one, is still
# to be sent, unless both sides have the key.
Handshake = Generator[bytes, bytes, Proved]


def serve_handshake(keys: Sequence[bytes], announcement: bytes = _OWN) -> Handshake:
    """Return the handshake of the broker, which challenges first. Accept any of ``keys``; answer with the client's."""
    question = _question(announcement)
    response = yield frame(_CHALLENGE + question)
    key = next((key for key in keys if _is_answer(response, key, question)), None)
    if key is None:
        raise WrongKey("the key is not one of the broker's", frame(_FAILURE))
    challenge = yield frame(_WELCOME)
    verdict = yield frame(_answer(key, challenge))
    if verdict != _WELCOME:
        raise ControlError("the client does not accept the answer")
    return Proved(b"", _peer(challenge))


def client_handshake(key: bytes, announcement: bytes = _OWN) -> Handshake:
    challenge = yield b""
    verdict = yield frame(_answer(key, challenge))
    if verdict != _WELCOME:
        raise WrongKey("the key is not the broker's")
    question = _question(announcement)
    response = yield frame(_CHALLENGE + question)
    if not _is_answer(response, key, question):
        raise WrongKey("the broker does not have the key", frame(_FAILURE))
    return Proved(frame(_WELCOME), _peer(challenge))


def _question(announcement: bytes) -> bytes:
    return _SHA256 + os.urandom(_RANDOM) + announcement


def _peer(challenge: bytes) -> Announcement | None:
    return announced(challenge[len(_CHALLENGE) + len(_SHA256) + _RANDOM :])


def _answer(key: bytes, challenge: bytes) -> bytes:
    if not challenge.startswith(_CHALLENGE) or not len(_CHALLENGE) + 16 <= len(challenge) <= MAX_HANDSHAKE:
        raise ControlError("no challenge of a handshake where one was due")
    question = challenge[len(_CHALLENGE) :]
    if not question.startswith(_SHA256):
        raise ControlError("a challenge of another kind than SHA-256")
    return _digest(key, question)


def _is_answer(response: bytes, key: bytes, question: bytes) -> bool:
    return hmac.compare_digest(response, _digest(key, question))


def _digest(key: bytes, question: bytes) -> bytes:
    return _SHA256 + hmac.digest(key, question, "sha256")
