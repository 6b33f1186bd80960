"""One plain HTTP/1 request through a decided connection: written anew, and nothing behind it."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace

import h11

from aa.proxy.sniff import Head
from aa.proxy.splice import Idle, Outcome, Way, reset

DROPPED = frozenset(
    (
        "connection",
        "http2-settings",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "upgrade",
        "host",
    )
)
"""Headers of the hop between client and front, and Host, which is written from the decided name."""
HARMLESS_UPGRADES = frozenset((b"h2c",))
"""Offers that the request is complete without; they are left out and the answer is HTTP/1."""
CHUNK_HEAD_LIMIT = 1 << 14
"""Bytes of a chunk's size line, and of trailers, that may wait for their end."""
BODY_READ = 1 << 16
SURPLUS_LIMIT = 1 << 20
"""Bytes behind the request (pipelined ones) that are read away so that the answer is not reset."""
CLOSED_SECONDS = 60.0
"""How long an answer may pause once the client closed its half: it may not be there any more."""
SURPLUS_SECONDS = 15.0
"""How long an answer may pause once the client sent more than its one request."""


def unwanted_upgrade(head: Head) -> str | None:
    """The protocol that a request wants to change to and that the front would be blind to."""
    offered = [v for n, v in head.headers if n == "upgrade"]
    names = [part.strip() for value in offered for part in value.split(b",")]
    wanted = [name for name in names if name.lower() not in HARMLESS_UPGRADES]
    return wanted[0].decode("latin-1") if wanted else None


def outgoing_head(head: Head, port: int) -> bytes:
    """The request as the origin gets it: origin form, the decided name as Host, no keep-alive."""
    lines = [f"{head.method} {head.path} HTTP/1.{head.minor}".encode("ascii")]
    if head.host is not None:
        text = str(head.host)
        name = f"[{text}]" if ":" in text else text
        lines.append(f"Host: {name}{'' if port == 80 else f':{port}'}".encode("ascii"))
    lines += [f"{n}: ".encode("ascii") + v for n, v in head.headers if n not in DROPPED]
    lines.append(b"Connection: close")
    return b"\r\n".join(lines) + b"\r\n\r\n"


def check_head(outgoing: bytes, head: Head) -> str | None:
    """Why a second reader (h11) would see another request in these bytes; None when it agrees."""
    reader = h11.Connection(h11.SERVER, max_incomplete_event_size=len(outgoing) + 1)
    try:
        reader.receive_data(outgoing)
        event = reader.next_event()
    except h11.RemoteProtocolError as e:
        return str(e)
    if not isinstance(event, h11.Request):
        return "the request head is not complete"
    seen = (event.method.decode(), event.target.decode())
    return None if seen == (head.method, head.path) else "the request line reads differently"


class _Chunked:
    """Reads a chunked body with h11 and writes it anew: no extensions, no trailers. No I/O."""

    def __init__(self) -> None:
        self._reader = h11.Connection(h11.SERVER, max_incomplete_event_size=CHUNK_HEAD_LIMIT)
        self._reader.receive_data(
            b"POST / HTTP/1.1\r\nHost: body\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        self._reader.next_event()
        self.complete = False

    @property
    def surplus(self) -> int:
        return len(self._reader.trailing_data[0])

    def feed(self, data: bytes) -> bytes:
        """The chunks to send on. Raises `h11.RemoteProtocolError`."""
        self._reader.receive_data(data)
        out = bytearray()
        while not self.complete:
            event = self._reader.next_event()
            if isinstance(event, h11.Data):
                out += b"%x\r\n%b\r\n" % (len(event.data), bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                out += b"0\r\n\r\n"
                self.complete = True
            else:
                break
        return bytes(out)


class Exchange:
    """One request and its answer between a client and an upstream that are both connected.

    Leaves both sockets open; they are set to reset when the request was cut short
    or the answer was.
    """

    def __init__(
        self,
        client: socket.socket,
        upstream: socket.socket,
        *,
        idle: float,
    ) -> None:
        self._client, self._upstream = client, upstream
        self._loop = asyncio.get_running_loop()
        self._answered: asyncio.Future[str] = self._loop.create_future()
        self.idle = Idle(idle, lambda: self._finish("idle"))
        self._down = Way(
            upstream, client, self._down_ended, on_move=self.idle.touch, half_close=False
        )
        self._sent = 0

    @property
    def moved(self) -> Outcome:
        """How much has moved so far."""
        return Outcome("", self._sent, self._down.moved)

    async def run(self, head: Head, port: int, behind: bytes) -> Outcome:
        """Sends the request; `behind` is what came with its head."""
        self._down.start()
        sending = self._loop.create_task(self._send_request(head, port, behind))
        try:
            ended = await self._answered
        finally:
            self.idle.stop()
            self._down.stop()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        return replace(self.moved, ended=ended)

    async def _send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._upstream, data)
        self._sent += len(data)
        self.idle.touch()

    async def _send_request(self, head: Head, port: int, behind: bytes) -> None:
        """Head and body, then whatever the client sends further is read away.

        A failing upstream is left to the answer's way: it may have answered before
        it stopped reading. A failing client ends the exchange: half a body must not
        look like a whole one.
        """
        try:
            await self._send(outgoing_head(head, port))
            whole = await self._send_body(head, behind)
        except OSError:
            whole = True
        except h11.RemoteProtocolError as e:
            self._abort(f"client: malformed chunk ({e})")
            return
        if not whole:
            self._abort("client: closed inside its request")
            return
        await self._read_away()

    async def _send_body(self, head: Head, behind: bytes) -> bool:
        if head.header("transfer-encoding") is not None:
            return await self._send_chunked(behind)
        length = int(head.header("content-length") or 0)
        first = behind[:length]
        if first:
            await self._send(first)
        if len(behind) > length:
            self.idle.shorten(SURPLUS_SECONDS)
        return await self._splice(length - len(first))

    async def _splice(self, count: int) -> bool:
        """Moves exactly `count` bytes of the body; False when the client ended before."""
        if count == 0:
            return True
        ended = asyncio.Event()
        way = Way(
            self._client,
            self._upstream,
            lambda _: ended.set(),
            on_move=self.idle.touch,
            limit=count,
            half_close=False,
        )
        way.start()
        try:
            await ended.wait()
        finally:
            way.stop()
            self._sent += way.moved
        if way.error is not None and way.failed is self._upstream:
            raise way.error
        return way.at_limit

    async def _send_chunked(self, behind: bytes) -> bool:
        body = _Chunked()
        data = behind
        while True:
            out = body.feed(data) if data else b""
            if out:
                await self._send(out)
            if body.complete:
                if body.surplus:
                    self.idle.shorten(SURPLUS_SECONDS)
                return True
            try:
                data = await self._loop.sock_recv(self._client, BODY_READ)
            except OSError:
                return False
            if not data:
                return False

    async def _read_away(self) -> None:
        left = SURPLUS_LIMIT
        while left > 0:
            try:
                data = await self._loop.sock_recv(self._client, BODY_READ)
            except OSError as e:
                self._abort(f"client: {e.strerror}")
                return
            if not data:  # it may well wait for the answer with its half closed, or be gone
                self.idle.shorten(CLOSED_SECONDS)
                return
            left -= len(data)
            self.idle.shorten(SURPLUS_SECONDS)

    def _abort(self, ended: str) -> None:
        reset(self._upstream)
        reset(self._client)
        self._finish(ended)

    def _down_ended(self, way: Way) -> None:
        if way.error is None:
            self._finish("closed")
        else:
            side = "client" if way.failed is self._client else "upstream"
            self._abort(f"{side}: {way.error.strerror}")

    def _finish(self, ended: str) -> None:
        if not self._answered.done():
            if ended == "idle":
                reset(self._client)
                reset(self._upstream)
            self._answered.set_result(ended)
