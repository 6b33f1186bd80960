"""Where a run's shim reports: one socket per starting run, and the talk with whoever is rightly behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from aa.launch.shim import MAX_MESSAGE
from aa.varlink.server import Peer, peer_of

EXEC_SECONDS = 30.0
"""From the go-ahead to the program: local steps only, but the home may be on a slow server."""


class ShimFailed(Exception):
    """A step of the shim failed: which, why, and the exit code that stands for it."""

    def __init__(self, step: str, reason: str, code: int) -> None:
        self.step, self.code = step, code
        self.reason = reason
        super().__init__(f"{step}: {reason}")


class Door:
    """The socket of one run, its user's alone. A context manager: the path is gone at the end."""

    def __init__(self, path: Path, uid: int) -> None:
        self.path = path
        self._uid = uid
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)

    def __enter__(self) -> Door:
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        # Who may talk is decided by cgroup; the mode keeps others from filling the queue before it.
        before = os.umask(0o177)
        try:
            self._socket.bind(str(self.path))
        finally:
            os.umask(before)
        os.chown(self.path, self._uid, -1)
        self._socket.listen(4)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    async def caller(self) -> tuple[Peer, Shim]:
        """The next one who connects; whether it is the run is for the caller of this to find out."""
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._socket)
            connection.setblocking(False)
            try:
                return peer_of(connection), Shim(connection)
            except OSError:  # it left already
                connection.close()


class Shim:
    """The connection of a run's shim."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()

    async def send(self, message: Mapping[str, Any]) -> None:
        data = json.dumps(message).encode("ascii")
        if len(data) > MAX_MESSAGE:
            raise ShimFailed("launch", f"command line and environment take {len(data)} bytes", 126)
        try:
            await self._loop.sock_sendall(self._connection, data + b"\0")
        except OSError as e:
            raise ShimFailed("launch", f"the shim went away: {e.strerror}", 125) from e

    async def executed(self) -> None:
        """Returns when the program runs: then, and only then, the connection closes without a word."""
        data, reset = b"", False
        async with asyncio.timeout(EXEC_SECONDS):
            try:
                while part := await self._loop.sock_recv(self._connection, 65536):
                    data += part
                    if len(data) > MAX_MESSAGE:
                        break
            except ConnectionResetError:  # it left without reading what it was sent
                reset = True
        if not data and not reset:
            return
        try:
            told = json.loads(data.partition(b"\0")[0])
            step, reason, code = str(told["failed"]), str(told["reason"]), int(told["code"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            step, reason, code = "shim", "it failed with words that nobody understands", 125
        raise ShimFailed(step, reason, code)

    def close(self) -> None:
        self._connection.close()
