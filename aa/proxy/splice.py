"""Moves bytes between two sockets inside the kernel: splice(2) through a pipe, half-close kept."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Callable
from dataclasses import dataclass, replace

PIPE_BYTES = 1 << 20
"""Wanted size of a pipe. Over the kernel's soft limit of pages per user they stay smaller."""
FREE_PIPES = 16
"""Empty pipes that are kept. A connection holds one only while bytes are in it."""
ROUNDS = 2
"""Fills of one pipe before the loop serves somebody else."""
BULK = 1 << 15
"""A fill of fewer bytes than this has most likely emptied the socket."""

_FLAGS = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
_RESET = struct.pack("ii", 1, 0)
_INT = struct.Struct("i")


class _Pipe:
    __slots__ = ("read", "write")

    def __init__(self) -> None:
        self.read, self.write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def close(self) -> None:
        os.close(self.read)
        os.close(self.write)


_free: list[_Pipe] = []


def _give_back(pipe: _Pipe) -> None:
    """Keeps an empty pipe. One with bytes in it must be closed, or they would reach a stranger."""
    if len(_free) < FREE_PIPES:
        _free.append(pipe)
    else:
        pipe.close()


class Way:
    """One direction. `on_end` is called once: at the source's end, at `limit`, or at an error.

    At the source's end the sink is told so (`half_close`) after its last byte.
    """

    def __init__(
        self,
        source: socket.socket,
        sink: socket.socket,
        on_end: Callable[[Way], None],
        *,
        on_move: Callable[[], None] = lambda: None,
        limit: int | None = None,
        half_close: bool = True,
    ) -> None:
        self.moved = 0
        self.ended = False
        self.error: OSError | None = None
        self.failed: socket.socket | None = None
        """The socket that the error is of."""
        self._source, self._sink = source, sink
        self._on_end, self._on_move = on_end, on_move
        self._limit = limit
        self._half_close = half_close
        self._pipe: _Pipe | None = None
        self._inside = 0
        self._waits_for_sink = False
        self._loop = asyncio.get_running_loop()

    @property
    def at_limit(self) -> bool:
        return self._limit is not None and self.moved >= self._limit

    def start(self) -> None:
        if self.at_limit:
            self._end()
        else:
            self._loop.add_reader(self._source.fileno(), self._readable)

    def stop(self) -> None:
        """Lets go of everything without a word to `on_end`."""
        if self.ended:
            return
        self.ended = True
        self._release()

    def _release(self) -> None:
        if self._waits_for_sink:
            self._loop.remove_writer(self._sink.fileno())
        else:
            self._loop.remove_reader(self._source.fileno())
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def _end(self) -> None:
        if not self.ended:
            self.stop()
            self._on_end(self)

    def _fail(self, error: OSError, of: socket.socket) -> None:
        self.error, self.failed = error, of
        self._end()

    def _readable(self) -> None:
        for _ in range(ROUNDS):
            taken = self._fill()
            if taken == 0 or not self._drain() or taken < BULK:
                return

    def _writable(self) -> None:
        if self._drain() and not self.ended:
            self._loop.remove_writer(self._sink.fileno())
            self._waits_for_sink = False
            self._loop.add_reader(self._source.fileno(), self._readable)

    def _fill(self) -> int:
        """Bytes taken into the pipe; 0 when there are none or the way has ended."""
        room = PIPE_BYTES if self._limit is None else min(PIPE_BYTES, self._limit - self.moved)
        try:
            pipe = self._pipe = _free.pop() if _free else _Pipe()
            taken = os.splice(self._source.fileno(), pipe.write, room, flags=_FLAGS)
        except (BlockingIOError, InterruptedError):
            self._done_with_pipe()
            return 0
        except OSError as e:
            self._fail(e, self._source)
            return 0
        if taken:
            self._inside = taken
            return taken
        self._done_with_pipe()
        if self._half_close:
            with contextlib.suppress(OSError):  # the sink is gone already; its own way says so
                self._sink.shutdown(socket.SHUT_WR)
        self._end()
        return 0

    def _drain(self) -> bool:
        """Empties the pipe into the sink; False when the sink is full or the way has ended."""
        assert self._pipe is not None
        while self._inside:
            try:
                given = os.splice(self._pipe.read, self._sink.fileno(), self._inside, flags=_FLAGS)
            except (BlockingIOError, InterruptedError):
                if not self._waits_for_sink:
                    self._waits_for_sink = True
                    self._loop.remove_reader(self._source.fileno())
                    self._loop.add_writer(self._sink.fileno(), self._writable)
                return False
            except OSError as e:
                self._fail(e, self._sink)
                return False
            self._inside -= given
            self.moved += given
            self._on_move()
        self._done_with_pipe()
        if self.at_limit:
            self._end()
            return False
        return True

    def _done_with_pipe(self) -> None:
        if self._pipe is not None:
            _give_back(self._pipe)
            self._pipe = None


class Idle:
    """Calls `on_idle` once nothing has moved for a while. `touch` is cheap."""

    def __init__(self, seconds: float, on_idle: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._seconds = seconds
        self._on_idle = on_idle
        self.last = self._loop.time()
        self._timer = self._loop.call_later(seconds, self._check)

    def touch(self) -> None:
        self.last = self._loop.time()

    def shorten(self, seconds: float) -> None:
        if seconds < self._seconds:
            self._seconds = seconds
            self._timer.cancel()
            self._check()

    def stop(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        left = self.last + self._seconds - self._loop.time()
        if left <= 0:
            self._on_idle()
        else:
            self._timer = self._loop.call_later(left, self._check)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a connection ended. `sent` counts from the client to the upstream."""

    ended: str
    sent: int = 0
    received: int = 0


def reset(sock: socket.socket) -> None:
    """Makes the coming close a reset, so that the peer does not take it for a proper end."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def unsent(sock: socket.socket) -> int:
    """Bytes that the kernel still holds for the peer: a slow reader's download is not idle."""
    try:
        queued = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(_INT.size))
    except OSError:
        return 0
    return int(_INT.unpack(queued)[0])


class Relay:
    """Both ways between a client and an upstream, until both end, one fails, or all is idle."""

    def __init__(self, client: socket.socket, upstream: socket.socket, *, idle: float) -> None:
        self._done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._client, self._upstream = client, upstream
        self._first = 0
        self.idle = Idle(idle, lambda: self._finish("idle"))
        self._up = Way(client, upstream, self._ended, on_move=self.idle.touch)
        self._down = Way(upstream, client, self._ended, on_move=self.idle.touch)

    @property
    def moved(self) -> Outcome:
        """How much has moved so far."""
        return Outcome("", self._first + self._up.moved, self._down.moved)

    async def run(self, first: bytes = b"") -> Outcome:
        """Sends `first` to the upstream, then moves everything both ways.

        Leaves both sockets open; after an error they are set to reset when closed.
        """
        self._down.start()
        sending = asyncio.get_running_loop().create_task(self._start_up(first))
        try:
            ended = await self._done
        finally:
            self.idle.stop()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            self._up.stop()
            self._down.stop()
        return replace(self.moved, ended=ended)

    async def _start_up(self, first: bytes) -> None:
        try:
            await asyncio.get_running_loop().sock_sendall(self._upstream, first)
        except OSError as e:
            self._finish(f"upstream: {e.strerror}")
            return
        self._first = len(first)
        self.idle.touch()
        self._up.start()

    def _finish(self, ended: str) -> None:
        if self._done.done():
            return
        if ended != "closed":
            reset(self._client)
            reset(self._upstream)
        self._done.set_result(ended)

    def _ended(self, way: Way) -> None:
        if way.error is not None:
            side = "client" if way.failed is self._client else "upstream"
            self._finish(f"{side}: {way.error.strerror}")
        elif self._up.ended and self._down.ended:
            self._finish("closed")


async def linger(sock: socket.socket, *, seconds: float, limit: int) -> None:
    """Ends a connection so that its last bytes arrive: closes our half and reads away what comes.

    A close with unread bytes would be a reset, which may overtake the last answer.
    """
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError, TimeoutError):
        sock.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(seconds):
            while limit > 0:
                data = await loop.sock_recv(sock, 65536)
                if not data:
                    return
                limit -= len(data)
