"""Varlink clients: a blocking one for commands, an asyncio one for daemons. Every wait has a deadline."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from aa.varlink.codec import MAX_MESSAGE, Framer, ProtocolError, VarlinkError, decode, encode

Json = Any

DEFAULT_TIMEOUT = 10.0
"""Seconds to wait for a connection and for each reply unless the caller says otherwise."""


def _call(method: str, parameters: Mapping[str, Json] | None, more: bool) -> bytes:
    message: dict[str, Json] = {"method": method, "parameters": dict(parameters or {})}
    if more:
        message["more"] = True
    return encode(message)


def _parameters(reply: Mapping[str, Json]) -> dict[str, Json]:
    error = reply.get("error")
    parameters = reply.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise ProtocolError("a reply's parameters are an object")
    if error is not None:
        raise VarlinkError(str(error), parameters)
    return parameters


class Client:
    """A blocking connection. Use it as a context manager.

    Raises `OSError` when nobody listens, `TimeoutError` at the deadline,
    `VarlinkError` for an error reply, `ProtocolError` for anything else.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, timeout: float | None = DEFAULT_TIMEOUT
    ) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._sock.settimeout(timeout)
        try:
            self._sock.connect(os.fspath(path))
        except BaseException:
            self._sock.close()
            raise
        self._framer = Framer()
        self._replies: deque[bytes] = deque()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._sock.close()

    def fileno(self) -> int:
        return self._sock.fileno()

    def set_timeout(self, seconds: float | None) -> None:
        self._sock.settimeout(seconds)

    def call(
        self, method: str, parameters: Mapping[str, Json] | None = None, *, fds: Sequence[int] = ()
    ) -> dict[str, Json]:
        """Calls a method (full name) and returns its reply's parameters."""
        self._send(_call(method, parameters, more=False), fds)
        return _parameters(self._receive())

    def stream(
        self, method: str, parameters: Mapping[str, Json] | None = None, *, fds: Sequence[int] = ()
    ) -> Iterator[dict[str, Json]]:
        """Calls a method with `more` and yields each reply. An empty last reply is left out."""
        self._send(_call(method, parameters, more=True), fds)
        while True:
            reply = self._receive()
            parameters_ = _parameters(reply)
            if reply.get("continues") is True:
                yield parameters_
                continue
            if parameters_:
                yield parameters_
            return

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        if not fds:
            self._sock.sendall(data)
            return
        sent = self._sock.sendmsg(
            [data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        )
        self._sock.sendall(data[sent:])

    def _receive(self) -> dict[str, Json]:
        while not self._replies:
            data = self._sock.recv(65536)
            if not data:
                raise ConnectionResetError("the service closed the connection")
            self._replies.extend(self._framer.feed(data))
        return decode(self._replies.popleft())


class AsyncClient:
    """An asyncio connection. Calls may overlap: replies come in the order of the calls."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._waiting: deque[asyncio.Queue[dict[str, Json] | Exception]] = deque()
        self._task = asyncio.get_running_loop().create_task(self._receive())
        self._broken: Exception | None = None

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
        queue = self._submit(_call(method, parameters, more=False))
        try:
            async with asyncio.timeout(timeout):
                reply = await queue.get()
        except TimeoutError:
            self._fail(TimeoutError(f"{method}: no reply within {timeout} s"))
            raise
        if isinstance(reply, Exception):
            raise reply
        return _parameters(reply)

    async def stream(
        self, method: str, parameters: Mapping[str, Json] | None = None
    ) -> AsyncIterator[dict[str, Json]]:
        """Calls with `more` and yields each reply, without a deadline between them."""
        queue = self._submit(_call(method, parameters, more=True))
        while True:
            reply = await queue.get()
            if isinstance(reply, Exception):
                raise reply
            value = _parameters(reply)
            if reply.get("continues") is True:
                yield value
                continue
            if value:
                yield value
            return

    def _submit(self, data: bytes) -> asyncio.Queue[dict[str, Json] | Exception]:
        if self._broken is not None:
            raise self._broken
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
