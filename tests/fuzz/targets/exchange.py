"""One plain HTTP/1 request through the front: the origin gets that request and not one byte behind it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import h11

from aa.proxy.http1 import Exchange, check_head, outgoing_head
from aa.proxy.sniff import Head, parse_head
from tests.fuzz.mutate import words

WORDS = (
    b"POST / HTTP/1.1\r\nHost: a.test\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 3\r\n",
    b"\r\n\r\n", b"3\r\nabc\r\n", b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"3;a=b\r\n", b"ffffffffffffffff\r\n",
    b"\n", b"+3\r\n", b"0x3\r\n", b"Connection: x-a, keep-alive\r\n", b"Upgrade: h2c\r\n",
)  # fmt: skip
mutate = words(WORDS)
LOOP = asyncio.new_event_loop()
SECONDS = 5.0


def seeds() -> Iterator[bytes]:
    head = b"POST /p?q HTTP/1.1\r\nHost: a.test\r\nX-A: b\r\n"
    for body in (
        b"Content-Length: 3\r\n\r\nabcGET /2 HTTP/1.1\r\nHost: b.test\r\n\r\n",
        b"Content-Length: 9\r\n\r\nabc",
        b"Transfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nT: u\r\n\r\nGET /2 HTTP/1.1\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n3\r\nab",
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\r\nGET /2 HTTP/1.1\r\nHost: b.test\r\n\r\n",
    ):
        yield b"\x06" + head + body
        yield b"\x00" + head + body
    yield b"\x06GET http://a.test/ HTTP/1.0\r\nConnection: close\r\n\r\n"


def one(data: bytes) -> None:
    if not data:
        return
    early, data = data[0], data[1:]
    end = data.find(b"\r\n\r\n")
    head = parse_head(data[: end + 4]) if end >= 0 else None
    if not isinstance(head, Head) or not head.path or head.host is None:
        return
    if check_head(outgoing_head(head, 80), head) is not None:
        return
    rest = data[end + 4 :]
    LOOP.run_until_complete(_through(head, rest[:early], rest[early:]))


async def _through(head: Head, behind: bytes, later: bytes) -> None:
    client, front = socket.socketpair()
    upstream, origin = socket.socketpair()
    with client, front, upstream, origin:
        for sock in (client, front, upstream, origin):
            sock.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        with contextlib.suppress(BlockingIOError):
            client.send(later) if later else None
        client.shutdown(socket.SHUT_WR)
        answering = asyncio.ensure_future(_origin(origin))
        async with asyncio.timeout(SECONDS):
            outcome = await Exchange(front, upstream, idle=SECONDS).run(head, 80, behind)
            upstream.close()
            reader = await answering
        assert outcome.ended
        assert reader.trailing_data[0] == b"", reader.trailing_data


async def _origin(sock: socket.socket) -> h11.Connection:
    """Answers the first whole request, then takes whatever else comes until the end."""
    loop = asyncio.get_running_loop()
    reader = h11.Connection(h11.SERVER)
    whole = False
    while True:
        try:
            data = await loop.sock_recv(sock, 1 << 16)
        except OSError:
            return reader
        if not data:
            return reader
        reader.receive_data(data)
        while not whole:
            event = reader.next_event()
            if event is h11.NEED_DATA:
                break
            whole = isinstance(event, h11.EndOfMessage)
        if whole:
            with contextlib.suppress(OSError):
                await loop.sock_sendall(
                    sock, b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"
                )
                sock.shutdown(socket.SHUT_WR)
