"""The front's half of an inspected connection: shown to a worker by its token, then moved both ways."""

from __future__ import annotations

import asyncio
import socket
import struct

from aa.proxy.dial import Address
from aa.proxy.inspect.session import End, Session
from aa.proxy.splice import Idle, Outcome, Way, reset

HAND_OVER_SECONDS = 5.0
"""How long a worker may take to accept a connection."""
END_SECONDS = 2.0
"""How long the word of a worker about a connection's end may come behind the end itself."""
FOREVER_SECONDS = 1e8
"""An inspected connection is ended by its worker: it knows whether somebody is being asked."""

_USER_PASSWORD = b"\x05\x01\x02"
_ANSWER = b"\x05\x02" + b"\x01\x00" + b"\x05\x00\x00\x01" + bytes(6)


class NotTaken(Exception):
    """The worker did not take the connection."""


def introduction(session: Session) -> bytes:
    """SOCKS5 with the token and the address, in one piece: none of it depends on an answer."""
    address: Address = session.addresses[0]
    kind = b"\x01" if address.version == 4 else b"\x04"
    user, password = session.id.encode(), session.secret.encode()
    token = b"\x01" + _counted(user) + _counted(password)
    connect = b"\x05\x01\x00" + kind + address.packed + struct.pack("!H", session.port)
    return _USER_PASSWORD + token + connect


def _counted(data: bytes) -> bytes:
    return bytes((len(data),)) + data


async def hand_over(session: Session, port: int, first: bytes) -> socket.socket:
    """A connection to the worker on a loopback port, with the client's first bytes sent.

    Raises `NotTaken`.
    """
    loop = asyncio.get_running_loop()
    sock = socket.socket(
        socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    )
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with asyncio.timeout(HAND_OVER_SECONDS):
            await loop.sock_connect(sock, ("127.0.0.1", port))
            await loop.sock_sendall(sock, introduction(session) + first)
            told = b""
            while len(told) < len(_ANSWER):
                data = await loop.sock_recv(sock, len(_ANSWER) - len(told))
                if not data:
                    break
                told += data
    except (OSError, TimeoutError) as e:
        sock.close()
        raise NotTaken(str(e) or f"it did not answer within {HAND_OVER_SECONDS:g} s") from None
    except BaseException:
        sock.close()
        raise
    if told != _ANSWER:
        sock.close()
        raise NotTaken("it refused the connection")
    return sock


class Inspected:
    """Both ways between a client and a worker. The client's end is a clean one only when the worker
    says that it was: a worker that died must not look like the end of an answer."""

    def __init__(
        self, client: socket.socket, worker: socket.socket, ended: asyncio.Future[End], first: int
    ) -> None:
        self._client, self._worker = client, worker
        self._told = ended
        self._first = first
        self._down_done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.idle = Idle(FOREVER_SECONDS, lambda: None)
        self._up = Way(client, worker, self._up_ended, on_move=self.idle.touch)
        self._down = Way(
            worker, client, self._down_ended, on_move=self.idle.touch, half_close=False
        )
        self.end: End | None = None
        """What the worker said, once it did."""

    @property
    def moved(self) -> Outcome:
        return Outcome("", self._first + self._up.moved, self._down.moved)

    async def run(self) -> Outcome:
        """Moves until the worker ends it or the client goes. Leaves both sockets open; after anything
        but a clean end they are set to reset when closed."""
        self._up.start()
        self._down.start()
        try:
            await self._down_done
        finally:
            self.idle.stop()
            self._up.stop()
            self._down.stop()
        ended = await self._how()
        moved = self.moved
        return Outcome(ended, moved.sent, moved.received)

    def close(self) -> None:
        self._worker.close()

    async def _how(self) -> str:
        """How it ended. A client that is gone is not waited for by its worker."""
        gone = self._client_error()
        if gone is not None:
            reset(self._worker)
            self._worker.close()
        try:
            async with asyncio.timeout(END_SECONDS):
                self.end = await asyncio.shield(self._told)
        except TimeoutError:
            self.end = End("", "the inspection worker did not say how it ended", clean=False)
        if gone is not None or not self.end.clean:
            reset(self._client)
        if gone is not None and self.end.reason == "closed":
            return f"client: {gone.strerror}"
        return self.end.reason

    def _client_error(self) -> OSError | None:
        for way in (self._up, self._down):
            if way.error is not None and way.failed is self._client:
                return way.error
        return None

    def _up_ended(self, way: Way) -> None:
        if way.error is not None and way.failed is self._client:
            self._finish()

    def _down_ended(self, way: Way) -> None:
        self._finish()

    def _finish(self) -> None:
        if not self._down_done.done():
            self._down_done.set_result(None)
