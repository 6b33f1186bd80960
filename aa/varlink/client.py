"""The blocking Varlink client, for commands. Every wait has a deadline."""

from __future__ import annotations

import array
import os
import socket
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aa.varlink.codec import Framer, ProtocolError, VarlinkError, decode, encode

Json = Any

DEFAULT_TIMEOUT = 10.0
"""Seconds to wait for a connection and for each reply unless the caller says otherwise."""


def call_message(method: str, parameters: Mapping[str, Json] | None, more: bool) -> bytes:
    message: dict[str, Json] = {"method": method, "parameters": dict(parameters or {})}
    if more:
        message["more"] = True
    return encode(message)


def parameters_of(reply: Mapping[str, Json]) -> dict[str, Json]:
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
        self._send(call_message(method, parameters, more=False), fds)
        return parameters_of(self._receive())

    def stream(
        self, method: str, parameters: Mapping[str, Json] | None = None, *, fds: Sequence[int] = ()
    ) -> Iterator[dict[str, Json]]:
        """Calls a method with `more` and yields each reply. An empty last reply is left out."""
        self._send(call_message(method, parameters, more=True), fds)
        while True:
            reply = self._receive()
            parameters_ = parameters_of(reply)
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
        if sent < len(data):
            self._sock.sendall(data[sent:])

    def _receive(self) -> dict[str, Json]:
        while not self._replies:
            data = self._sock.recv(65536)
            if not data:
                raise ConnectionResetError("the service closed the connection")
            self._replies.extend(self._framer.feed(data))
        return decode(self._replies.popleft())
