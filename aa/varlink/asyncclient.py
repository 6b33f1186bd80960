"""The asyncio Varlink client, for daemons. Every call has a deadline."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from aa.varlink.client import DEFAULT_TIMEOUT, call_message, parameters_of
from aa.varlink.codec import MAX_MESSAGE, ProtocolError, decode

Json = Any


class AsyncClient:
    """An asyncio connection. Calls may overlap: replies come in the order of the calls."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._waiting: deque[asyncio.Queue[dict[str, Json] | Exception]] = deque()
        self._task = asyncio.get_running_loop().create_task(self._receive())
        self._broken: Exception | None = None
        self.on_end: Callable[[], None] | None = None
        """Called once, when the connection has ended."""

    @classmethod
    async def connect(
        cls, path: str | os.PathLike[str], *, timeout: float = DEFAULT_TIMEOUT
    ) -> AsyncClient:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_unix_connection(
                os.fspath(path), limit=MAX_MESSAGE + 1
            )
        return cls(reader, writer)

    @property
    def closed(self) -> bool:
        return self._broken is not None

    async def close(self) -> None:
        self._fail(ConnectionAbortedError("closed"))
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def call(
        self,
        method: str,
        parameters: Mapping[str, Json] | None = None,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
    ) -> dict[str, Json]:
        """Calls a method and returns its reply's parameters. A missed deadline ends the connection,
        because the replies behind it could not be told apart any more."""
        queue = self._submit(call_message(method, parameters, more=False))
        try:
            async with asyncio.timeout(timeout):
                reply = await queue.get()
        except TimeoutError:
            self._fail(TimeoutError(f"{method}: no reply within {timeout} s"))
            raise
        if isinstance(reply, Exception):
            raise reply
        return parameters_of(reply)

    async def stream(
        self, method: str, parameters: Mapping[str, Json] | None = None
    ) -> AsyncIterator[dict[str, Json]]:
        """Calls with `more` and yields each reply, without a deadline between them."""
        queue = self._submit(call_message(method, parameters, more=True))
        while True:
            reply = await queue.get()
            if isinstance(reply, Exception):
                raise reply
            value = parameters_of(reply)
            if reply.get("continues") is True:
                yield value
                continue
            if value:
                yield value
            return

    def _submit(self, data: bytes) -> asyncio.Queue[dict[str, Json] | Exception]:
        if self._broken is not None:
            if isinstance(self._broken, ConnectionError):
                raise self._broken
            raise ConnectionResetError(str(self._broken))
        queue: asyncio.Queue[dict[str, Json] | Exception] = asyncio.Queue()
        self._waiting.append(queue)
        self._writer.write(data)
        return queue

    async def _receive(self) -> None:
        try:
            while True:
                message = await self._reader.readuntil(b"\0")
                reply = decode(message[:-1])
                if not self._waiting:
                    raise ProtocolError("a reply that nobody asked for")
                self._waiting[0].put_nowait(reply)
                if reply.get("continues") is not True:
                    self._waiting.popleft()
        except asyncio.CancelledError:
            raise
        except EOFError:
            self._fail(ConnectionResetError("the service closed the connection"))
        except (OSError, ProtocolError, asyncio.LimitOverrunError) as e:
            self._fail(ConnectionResetError(f"the connection ended: {e}"))

    def _fail(self, error: Exception) -> None:
        if self._broken is not None:
            return
        self._broken = error
        for queue in self._waiting:
            queue.put_nowait(error)
        self._waiting.clear()
        self._writer.close()
        if self.on_end is not None:
            self.on_end()
