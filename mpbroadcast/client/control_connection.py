"""A control connection, at the user's end: the handshake, then one request at a time and its reply.

It is used by one call at a time. A call that is interrupted, or that runs out of time, leaves it in the middle of a request:
then it is closed, and never used again. Its socket never blocks: what waits yields that, see ``posix/waiting.py``.
"""

from __future__ import annotations

import contextlib
import errno
import select
from typing import Any, Final

from mpbroadcast import trap_points
from mpbroadcast.deadline import Deadline
from mpbroadcast.errors import AuthenticationFailed, BrokerCrashed, BrokerLost, TimedOut, VersionMismatch
from mpbroadcast.posix.descriptors import close_fd, fork_lock, on_fork
from mpbroadcast.posix.fd_socket import CLOEXEC, SPACE, DescriptorSocket, control_socket, taken_apart
from mpbroadcast.posix.pipes import PipeEnd
from mpbroadcast.posix.poller import is_ready
from mpbroadcast.posix.waiting import Steps, Wait
from mpbroadcast.protocol import control
from mpbroadcast.protocol.version import OWN, Announcement

_READ: Final = 1 << 16  # bytes to receive at once
_FULL_QUEUE_PAUSE: Final = 0.005  # seconds until another try to connect
ENDED: Final = "the broker at {!r} has ended: start another one, or connect() to the one that is there now, and subscribe again"

# A reply, and the pipe, the descriptor socket and the pipe back that came with it.
Answer = tuple[dict[str, Any], PipeEnd | None, DescriptorSocket | None, PipeEnd | None]


class ControlConnection:
    """A control connection of this process: :meth:`connecting` comes first."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._inbox = control.Inbox(control.MAX_HANDSHAKE)
        self._crash: BrokerCrashed | None = None
        self._fds: list[int] = []  # descriptors that were received and have no other owner yet
        with fork_lock():
            self._socket = control_socket()
            on_fork(self, ControlConnection.close)

    def connecting(self, authkey: bytes, deadline: Deadline) -> Steps[None]:
        """Connect to the broker, and prove that both have the key.

        :raises BrokerLost: there is no broker at the address.
        :raises AuthenticationFailed: the broker has another key.
        :raises VersionMismatch: the broker has another protocol, or announces none.
        :raises TimedOut: the broker did not answer by ``deadline``.
        """
        try:
            yield from self._connecting(deadline)
            trap_points.reach("connected")
            yield from self._shaking_hands(control.client_handshake(authkey), deadline)
        except BaseException:
            self.close()
            raise
        self._inbox.limit = control.MAX_REPLY

    def _connecting(self, deadline: Deadline) -> Steps[None]:
        while True:
            try:
                with contextlib.suppress(BlockingIOError):
                    self._socket.connect(self._address)
                    return
            except OSError as error:
                raise BrokerLost(
                    f"no broker answers at {self._address!r} ({error.strerror}): it has ended, or this is not its `address`: "
                    "start one, or connect to the `address` of one that is there"
                ) from error
            if deadline.remaining() == 0:
                raise TimedOut(f"the broker at {self._address!r} accepted no connection in time")
            yield Wait(Deadline(_FULL_QUEUE_PAUSE))

    def _shaking_hands(self, handshake: control.Handshake, deadline: Deadline) -> Steps[None]:
        to_send = next(handshake)
        try:
            while True:
                trap_points.reach("answering")
                yield from self._sending(to_send, deadline)
                to_send = handshake.send((yield from self._receiving(deadline)))
        except StopIteration as done:
            proved: control.Proved = done.value
            yield from self._sending(proved.last, deadline)
            if proved.peer is None or proved.peer.protocol != OWN.protocol:
                raise VersionMismatch(_mismatch(self._address, proved.peer)) from None
        except control.WrongKey as error:
            raise AuthenticationFailed(
                f"the broker at {self._address!r} and this process have different keys ({error.args[0]}): pass the key of "
                "its start_broadcaster() as connect(address, authkey=...), or start it at an address of your choice, where it "
                "writes a key file"
            ) from error
        except control.ControlError as error:
            raise AuthenticationFailed(
                f"the process that listens at {self._address!r} is no broker ({error.args[0]}): pass the `address` of one"
            ) from error

    def requesting(self, message: dict[str, Any], deadline: Deadline, notes: bytes = b"") -> Steps[Answer]:
        """Send ``notes``, then a request. Return the reply: the broker has then handled the notes, too."""
        data = control.encode(message)
        if len(data) > control.MAX_REQUEST:
            raise ValueError(f"a request of {len(data)} bytes is too long: name fewer topics in one call")
        yield from self._sending(notes + data, deadline)
        trap_points.reach("waiting for a reply", (message["do"], self._socket))
        reply = control.decode((yield from self._receiving(deadline)))
        fds = self._fds
        with fork_lock():
            fd_socket = DescriptorSocket(fds.pop()) if fds and reply.get("fd_socket") else None
            reports = PipeEnd(fds.pop()) if fds and reply.get("reports") else None
            return reply, PipeEnd(fds.pop(0)) if fds else None, fd_socket, reports

    def _sending(self, data: bytes, deadline: Deadline) -> Steps[None]:
        view = memoryview(data)
        while view:
            try:
                with contextlib.suppress(BlockingIOError):
                    view = view[self._socket.send(view) :]
                    continue
            except OSError as error:
                raise BrokerLost(ENDED.format(self._address)) from error
            yield from self._waiting(select.POLLOUT, deadline)

    def _receiving(self, deadline: Deadline) -> Steps[bytes]:
        while (body := self._inbox.next()) is None:
            try:
                with contextlib.suppress(BlockingIOError):
                    self._inbox.feed(self._read())
                    continue
            except ConnectionError as error:
                raise BrokerLost(ENDED.format(self._address)) from error
            yield from self._waiting(select.POLLIN, deadline)
        return body

    def _read(self) -> bytes:
        with fork_lock():
            data, fds, lost = taken_apart(self._socket.recvmsg(_READ, SPACE, CLOEXEC))
            self._fds += fds
        if lost:
            raise OSError(errno.EMFILE, "no descriptor is left in this process for a pipe: close some, or raise `ulimit -n`")
        if not data:
            raise ConnectionResetError("the connection was closed")
        return data

    def _waiting(self, events: int, deadline: Deadline) -> Steps[None]:
        if not (yield Wait(deadline, events, self._socket)):
            raise TimedOut("the broker did not answer in time")

    def fileno(self) -> int:
        return self._socket.fileno()

    def crash(self) -> BrokerCrashed | None:
        """Return the error that the broker sent when a bug ended it."""
        with contextlib.suppress(OSError, control.ControlError):
            self._inbox.feed(self._read())
            body = self._inbox.next()
            if body is not None:
                self._crash = BrokerCrashed(str(control.decode(body).get("crashed", "")))
        return self._crash

    @property
    def is_ended(self) -> bool:
        """True if the broker, or this process, has closed the connection."""
        fd = self._socket.fileno()
        return fd < 0 or is_ready(fd, 0, 0)

    def send_now(self, notes: bytes) -> bytes:
        """Send what there is room for. Return the rest, empty if the broker has ended.

        A single note is sent whole or not at all, also when threads send at once: Linux puts so few bytes into one buffer, and
        the BSDs take less than a request only when there is room for ``SO_SNDLOWAT``, 1,024 bytes or more.
        """
        try:
            return notes[self._socket.send(notes) :]
        except BlockingIOError:
            return notes
        except OSError:
            return b""

    def close(self) -> None:
        """Close the connection; it can be called again."""
        self._socket.close()
        while self._fds:
            close_fd(self._fds.pop())

    def __del__(self) -> None:
        if hasattr(self, "_socket"):
            self.close()


def _mismatch(address: str, broker: Announcement | None) -> str:
    about = "announces no protocol (an older mpbroadcast)" if broker is None else f"has {broker}"
    is_older = broker is None or broker.protocol < OWN.protocol
    restart = f"the broker at {address!r}" if is_older else "this program"
    return (
        f"version mismatch: the broker at {address!r} {about}, and this process has {OWN}: install the same version of "
        f"mpbroadcast in both environments, then restart {restart}, which has the older one"
    )
