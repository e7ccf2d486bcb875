"""An ASGI application without a framework: each worker answers what is published, with its process ID."""

import asyncio
import contextlib
import os
from typing import Any

from mpbroadcast import Broadcaster, connect, connect_or_start


class Worker:
    """What a worker process has: a handle, and a task that answers."""

    def __init__(self) -> None:
        name = os.environ.get("STARTS_AT")  # set where the workers start the broker themselves
        self.bus: Broadcaster[Any] = connect_or_start(name, linger=1.0, start_timeout=60) if name else connect()
        self.task = asyncio.get_running_loop().create_task(self.answer())

    async def answer(self) -> None:
        with self.bus.subscribe("question") as channel:
            async for message in channel:
                self.bus.publish((os.getpid(), message), topic="answer")

    async def close(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        self.bus.publish((os.getpid(), "closes"), topic="end")
        self.bus.close()


worker: Worker


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """A request publishes its path, and is answered with the process ID."""
    global worker  # noqa: PLW0603
    if scope["type"] == "lifespan":
        await receive()
        worker = Worker()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await worker.close()
        await send({"type": "lifespan.shutdown.complete"})
    elif scope["type"] == "http":
        worker.bus.publish(scope["path"], topic="question")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(os.getpid()).encode()})
