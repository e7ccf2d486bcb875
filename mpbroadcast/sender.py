"""What a handle publishes through: its pipe and its shared memory, made when they are first needed, and anew for a broker that
takes over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mpbroadcast.arguments import Deadline
from mpbroadcast.errors import BrokerRestarted, ClosedError, TimedOut
from mpbroadcast.wire.attachment import Attachment
from mpbroadcast.wire.descriptors import DescriptorSocket, PipeEnd
from mpbroadcast.wire.frames import IMAGE, MAX_FRAME, frame_head
from mpbroadcast.wire.link import Link, for_answer
from mpbroadcast.wire.outlet import Outlet
from mpbroadcast.wire.payload import Payload
from mpbroadcast.wire.shared_outlet import SHARED_FROM, SharedOutlet

_NOWHERE: Final = PipeEnd(-1)


def framed(payload: Payload, way: tuple[bytes, int]) -> bytes:
    """The frame of a message that goes through the pipe; ``way`` is its topic, and the channel that is left out."""
    return b"".join((frame_head(payload.size, *way, IMAGE if payload.image else 0), *payload.parts))


class Sender:
    """``pipe`` and ``shared`` are for the short ways, and lead nowhere while there is something to be done first."""

    __slots__ = ("_attachment", "_closed", "_gap", "_link", "_made", "outlet", "pipe", "shared")

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._closed = False
        self._link: Link | None = None  # that the outlet came through
        self._gap = False  # whether something was published to a broker that has died since
        self._made: dict[int, tuple[Outlet, SharedOutlet]] = {}  # for the broker of this number
        self.outlet: Outlet | None = None
        self.pipe = _NOWHERE
        self.shared: SharedOutlet | None = None

    def publish(self, payload: Payload, way: tuple[bytes, int], deadline: Deadline, done: list[int]) -> None:
        """Send one message of any length; put a number into ``done`` when it went.

        :raises TimedOut: it was not sent, and never will be.
        :raises BrokerLost, ClosedError: there is nobody to send it to.
        """
        if payload.size + 16 + len(way[0]) > MAX_FRAME:
            raise ValueError(f"a message of {payload.size} bytes is too long: with its topic, the limit is {MAX_FRAME - 16}")

        def share() -> bool:
            return self.shared is not None and self.shared.send(payload, *way, deadline, done)

        if payload.size >= SHARED_FROM:
            went: bool | None = None
            while went is None:
                if self.outlet is None:
                    self._make(deadline)
                went = self._try(share)
            if went:
                return
        self.send(framed(payload, way), deadline, done)

    def send(self, frame: bytes, deadline: Deadline, done: list[int]) -> None:
        """Send one frame of any length, or several that fit into one write together; errors as of :meth:`publish`."""

        def send() -> bool:
            outlet.send(frame, deadline, done)
            return True

        went: bool | None = None
        while not went:
            outlet = self.outlet or self._make(deadline)
            went = self._try(send)

    def _try(self, send: Callable[[], bool]) -> bool | None:
        """What ``send`` returns; ``None`` when another broker has taken over."""
        outlet, attachment = self.outlet, self._attachment
        try:
            return send()
        except TimedOut:
            raise
        except OSError as error:
            if self._closed:
                raise self.closed_error() from None
            link = self._link
            if not attachment.restarts:
                raise attachment.lost(error)  # noqa: B904, it has its cause
            if link is not None and outlet is self.outlet:
                link.lost = True
            self.follow()
            return None
        finally:
            if not self._closed and outlet is not None and outlet is self.outlet:
                self.pipe = outlet.pipe

    def _make(self, deadline: Deadline) -> Outlet:
        if self._closed:
            raise self.closed_error()
        link, answer = self._attachment.ask("publisher", for_answer(deadline))
        if answer.end is None:
            raise self._attachment.lost()
        number = answer.said["publisher"]

        def ask(deadline: Deadline) -> DescriptorSocket | None:
            return link.request("beside", publisher=number, deadline=for_answer(deadline)).beside

        outlet = Outlet(answer.end, number)
        # Of several threads that come here first, one makes it for all: this is one step, where `if` and `=` are two.
        outlet, shared = self._made.setdefault(link.number, (outlet, SharedOutlet(outlet, ask)))
        self._link, self.outlet, self.shared = link, outlet, shared
        for former in [number for number in self._made if number < link.number]:
            self._made.pop(former, None)
        if self._closed:  # meanwhile, by another thread
            self.outlet = self.shared = None
            outlet.pipe.close()
            raise self.closed_error()
        return outlet

    def follow(self) -> None:
        """To the broker that has taken over, if the last one has died.

        :raises BrokerLost: there is none.
        """
        before = self._link
        if self._attachment.link() is not before and before is not None and before.lost:
            self._gap = True
            if self._made.get(before.number, (None,))[0] is self.outlet:
                self._made.pop(before.number, None)
            self._link = self.outlet = self.shared = None
            self.pipe = _NOWHERE

    def say_gap(self) -> None:
        """Nothing, if all that was published went to the broker that is there now.

        :raises BrokerRestarted: once, otherwise.
        """
        if self._gap:
            self._gap = False
            raise BrokerRestarted("the broker has died: what this handle had published before may not have reached everybody")

    def close(self) -> Outlet | None:
        """What there was, closed; it is here until :meth:`forget`, so that an interrupted close can be called again."""
        self._closed = True
        self.shared, self.pipe = None, _NOWHERE
        if self.outlet is not None:
            self.outlet.pipe.close()
        return self.outlet

    def forget(self) -> None:
        """Closing is done."""
        self.outlet = self._link = None
        self._made.clear()

    @staticmethod
    def closed_error() -> ClosedError:
        """Of who uses a handle that was closed."""
        return ClosedError("this broadcaster was closed in this process: start or connect() another")
