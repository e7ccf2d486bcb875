"""A chat over server-sent events, in as many worker processes as you like: any ASGI server runs it, without a framework.

    mpbroadcast run uvicorn examples.events:app --workers 4 --timeout-graceful-shutdown 1

    curl -N http://127.0.0.1:8000/room/lobby                   # in some terminals
    curl -d 'hello, all' http://127.0.0.1:8000/room/lobby      # in another one

A text that is posted in any worker reaches the readers of the room in all of them.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from mpbroadcast import Broadcaster, aconnect, escape

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

bus: Broadcaster[str]  # of this worker


async def app(scope: Message, receive: Receive, send: Send) -> None:
    """Serve one connection, or this worker's beginning and end."""
    if scope["type"] == "lifespan":
        await live(receive, send)
    elif scope["type"] == "http" and scope["method"] == "POST":
        await post(scope["path"], receive, send)
    elif scope["type"] == "http":
        await stream(scope["path"], receive, send)


async def live(receive: Receive, send: Send) -> None:
    """Connect where the worker begins: its address is in MPBROADCAST_ADDRESS, its key in a file beside the socket."""
    global bus
    await receive()
    async with aconnect() as bus:
        await send({"type": "lifespan.startup.complete"})
        await receive()
    await send({"type": "lifespan.shutdown.complete"})


async def post(room: str, receive: Receive, send: Send) -> None:
    """Publish the body to all readers of the room."""
    body, is_more = b"", True
    while is_more:
        part = await receive()
        body += part.get("body", b"")
        is_more = part.get("more_body", False)
    await bus.apublish(body.decode(errors="replace"), topic=room)
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


async def stream(room: str, receive: Receive, send: Send) -> None:
    """Send what is published to the room, until the reader has gone. A slow one is disconnected, and connects again.

    The room comes from outside: unescaped, ``/room/*`` would read every room.
    """
    async with bus.asubscribe(escape(room), overflow="disconnect", capacity=1 << 20) as channel:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b": you are in\n\n", "more_body": True})

        async def forward() -> None:
            async for text in channel:
                event = f"data: {json.dumps(text)}\n\n"
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})

        forwarding = asyncio.create_task(forward())
        gone = asyncio.create_task(until_gone(receive))
        await asyncio.wait([forwarding, gone], return_when=asyncio.FIRST_COMPLETED)
        for task in (forwarding, gone):
            task.cancel()
        await asyncio.gather(forwarding, gone, return_exceptions=True)  # Overflowed, if it was too slow
    await send({"type": "http.response.body"})


async def until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
