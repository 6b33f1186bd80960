"""A whole inspected connection with a hostile client and a hostile origin: nothing undecided gets through.

Runs the engine of the inspection worker, without TLS: HTTP/1, and HTTP/2 as if ALPN had chosen it.
The gateway denies what lies below /denied, and below /judged a body or a message with `forbidden`
in it. Whatever the client's bytes are, what the origin gets is a row of requests that were allowed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

ALONE = True
"""It has libraries of its own, so it wants a process of its own."""

ENGINE = Path(__file__).parents[3] / "build/inspect/py311"
if not ENGINE.is_dir():
    raise RuntimeError(f"{ENGINE} is not there: `make inspect` lays it in")
sys.path.insert(0, str(ENGINE))

import h11  # noqa: E402
import h2.connection  # noqa: E402
import wsproto.frame_protocol as frames  # noqa: E402
from hpack import Encoder  # noqa: E402

from aa.model import Action, Decision, Effect, Kind, Obligation  # noqa: E402
from aa.proxy.ask import Refusals  # noqa: E402
from aa.proxy.inspect import engine, hooks  # noqa: E402
from aa.proxy.inspect.handover import introduction  # noqa: E402
from aa.proxy.inspect.session import Session, Waiting, Wanted  # noqa: E402
from tests.fuzz.mutate import words  # noqa: E402

engine.install()

WORDS = (
    b"GET /a HTTP/1.1\r\nHost: a.example\r\n\r\n", b"POST /judged HTTP/1.1\r\nHost: a.example\r\n",
    b"GET /denied HTTP/1.1\r\nHost: a.example\r\n\r\n", b"Content-Length: 9\r\n", b"\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n", b"9\r\nforbidden\r\n", b"0\r\n\r\n", b"forbidden", b"Expect: 100-continue\r\n",
    b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 101 Switching Protocols\r\n", b"HTTP/1.1 100 Continue\r\n\r\n",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b"Connection: close\r\n", b"HTTP/1.0",
    b"\0\0\x05\x01\x04\0\0\0\x03", b"\0\0\x09\0\x01\0\0\0\x01forbidden", b"\0\0\x04\x03\0\0\0\0\x01\0\0\0\0",
)  # fmt: skip
mutate = words(WORDS)

LOOP = asyncio.new_event_loop()
SECONDS = 5.0
FORBIDDEN = b"forbidden"
SESSION = Session(
    id="i", secret="s", run="r", uid=1000, host="a.example", port=80, protocol="http",
    addresses=(ip_address("192.0.2.1"),), wanted=Wanted(body=True, ws=True, llm=True),
)  # fmt: skip
JUDGED = (
    Obligation(
        "inspect",
        {"body": {"texts": ["*forbidden*"]}, "ws": {"out": ["*forbidden*"]}, "limit": 4096},
    ),
)


MODEL = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n3a\r\n"
    b'data: {"usage": {"input_tokens": 1, "output_tokens": 2}}\n\n\r\n0\r\n\r\n'
)


class Faults(logging.Handler):
    """A hook of ours that raised: it denies, and it is a fault all the same."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "hook %s":
            self.seen.append(logging.Formatter().format(record))


FAULTS = Faults()
engine.log.addHandler(FAULTS)
engine.log.propagate = False
hooks.log.propagate = False


class Brain:
    """The gateway. It remembers which requests it allowed."""

    def __init__(self) -> None:
        self.allowed: list[tuple[str, str]] = []

    async def decide(self, run: str, action: Action, *, approval: str = "") -> Decision:
        a = action.attributes
        if action.kind is Kind.LLM_REQUEST:
            return Decision(
                Effect.DENY if "no" in action.target else Effect.ALLOW, "", "t/m", "rev"
            )
        facts = a.get("body") or a.get("ws") or {}
        denied = a["path"].startswith("/denied") or bool(facts.get("texts"))
        orders = JUDGED if a["path"].startswith("/judged") and not facts else ()
        if not denied and not facts:
            self.allowed.append((a["method"], a["path"]))
        await asyncio.sleep(0)
        return Decision(
            Effect.DENY if denied else Effect.ALLOW, "the test says so", "t/r", "rev",
            obligations=() if denied else orders,
        )  # fmt: skip


class Diag:
    """Whoever connects is the front."""

    uid = hooks.os.geteuid()

    def owner(self, *_: Any) -> Diag:
        return self


class Prices:
    """Whoever is asked is a model provider, but it is only metered where its paths are."""

    def provider_of(self, host: str) -> str:
        return "p"


def _split(client: bytes, origin: bytes, how: int = 0) -> bytes:
    return bytes((how, 255)) + len(client).to_bytes(2, "big") + client + origin


def seeds() -> Iterator[bytes]:
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    host = b" HTTP/1.1\r\nHost: a.example\r\n"
    get, denied = b"GET /a" + host + b"\r\n", b"GET /denied" + host + b"\r\n"
    sent = b"Content-Length: 13\r\n\r\nis forbidden."
    chunked = b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    upgrade = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    upgrade += b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    switched = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    switched += b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
    for client, origin in (
        (get + get, ok + ok),
        (denied + get, ok),
        (b"POST /judged" + host + sent + get, ok + ok),
        (b"POST /judged" + host + chunked, ok),
        (b"POST /b" + host + chunked + get, b"HTTP/1.1 100 Continue\r\n\r\n" + ok),
        (b"POST /b" + host + b"Expect: 100-continue\r\n" + sent, ok),
        (get, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX: y\r\n\r\n"),
        (get, b"HTTP/1.0 200 OK\r\n\r\nuntil the end"),
        (get, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\ncut"),
        (get, b"no HTTP at all\r\n\r\n"),
        (b"HEAD /a" + host + b"\r\n" + get, ok + ok),
        (b"CONNECT a.example:80 HTTP/1.1\r\nHost: a.example\r\n\r\n" + get, ok),
        (b"GET /judged/ws" + host + upgrade + _frame(b"hello") + _frame(b"forbidden"), switched),
        (b"GET /ws" + host + upgrade + _frame(b"forbidden"), switched + b"\x81\x02hi\x88\x00"),
        (
            b"GET /judged/ws" + host + upgrade + _frame(b"forbidden", 9) + _frame(b"forbidden", 10),
            switched,
        ),
        (b"GET /judged/ws" + host + upgrade + _frame(b"\x03\xe8forbidden", 8), switched),
        (b"GET /judged/ws" + host + upgrade + _frame(b"", 9), switched + b"\x89\x02hi"),
        (b"GET /judged/ws" + host + upgrade.partition(b"\n")[2] + _frame(b"unasked"), switched),
        (b"POST /v1/messages" + host + b"Content-Length: 13\r\n\r\n" + b'{"model":"m"}', MODEL),
        (b"POST /v1/messages" + host + b"Content-Length: 14\r\n\r\n" + b'{"model":"no"}' + get, ok),
        (b"\x16\x03\x01\0\x05hello", ok),
    ):
        yield _split(client, origin)
        yield bytes((0, 7)) + _split(client, origin)[2:]
    for path, body in (
        ("/a", b"x"),
        ("/judged", b"forbidden"),
        ("/judged", b"x"),
        ("/denied", b""),
    ):
        yield _split(_http2(path, body), ok, how=1)


def _frame(text: bytes, kind: int = 1) -> bytes:
    """A frame of a client, masked with zeros."""
    return bytes((0x80 | kind, 0x80 | len(text))) + bytes(4) + text


def _http2(path: str, body: bytes) -> bytes:
    encoder = Encoder()
    connection = h2.connection.H2Connection()
    connection.initiate_connection()
    data = connection.data_to_send()
    for stream in (1, 3):
        block = encoder.encode(
            [(":method", "POST"), (":path", path), (":authority", "a.example"), (":scheme", "http")]
        )
        data += len(block).to_bytes(3, "big") + b"\x01\x04" + stream.to_bytes(4, "big") + block
        data += len(body).to_bytes(3, "big") + b"\x00\x01" + stream.to_bytes(4, "big") + body
    return data


def one(data: bytes) -> None:
    if len(data) < 5:
        return
    size = int.from_bytes(data[2:4], "big")
    client, origin = data[4 : 4 + size], data[4 + size :]
    FAULTS.seen.clear()
    LOOP.run_until_complete(_inspected(data[0] & 1 == 1, data[1] + 1, client, origin))
    assert not FAULTS.seen, FAULTS.seen[0]


async def _inspected(http2: bool, step: int, client: bytes, answer: bytes) -> None:
    brain, got = Brain(), _Origins(answer)
    waiting = Waiting(lambda: 0.0)
    waiting.add(SESSION)
    nothing: Any = None
    table = hooks.Hooks(
        gateway=brain,  # type: ignore[arg-type]
        refusals=Refusals(lambda report: None),
        report=lambda report: None,
        waiting=waiting,
        pump=lambda: None,
        presented=nothing,
        trusted=nothing,
        diag=Diag(),  # type: ignore[arg-type]
        prices=Prices,  # type: ignore[arg-type]
    ).table()
    ours, theirs = socket.socketpair()
    engine.dial = got.dial
    with ours, theirs:
        reader, writer = await asyncio.open_connection(sock=theirs)
        connection = engine.Connection(
            reader, _Named(writer), hooks=table, limits=engine.Limits(1, 1)
        )
        if http2:
            connection.client.alpn = b"h2"
        serving = asyncio.ensure_future(connection.serve())
        sending = asyncio.ensure_future(_client(ours, introduction(SESSION) + client, step))
        try:
            async with asyncio.timeout(SECONDS):
                await serving
        finally:
            for task in (sending, serving, *got.tasks):
                task.cancel()
            await asyncio.gather(sending, serving, *got.tasks, return_exceptions=True)
            writer.close()
            for sock in got.socks:
                sock.close()
    _judge(brain, got, connection)


class _Named:
    """A writer whose peer has an address, as that of the front has."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name in ("peername", "sockname"):
            return ("127.0.0.1", 9)
        return self._writer.get_extra_info(name, default)


async def _client(sock: socket.socket, data: bytes, step: int) -> None:
    """Sends its bytes in pieces, says that it is done, and reads whatever comes."""
    loop = asyncio.get_running_loop()
    sock.setblocking(False)
    with contextlib.suppress(OSError):
        step = max(step if step < 256 else len(data), len(data) // 64 + 1)
        for at in range(0, len(data), step):
            await loop.sock_sendall(sock, data[at : at + step])
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        sock.shutdown(socket.SHUT_WR)
        while await loop.sock_recv(sock, 1 << 16):
            pass


class _Origins:
    """Every upstream connection of the engine; each is answered alike."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self.received: list[bytearray] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.socks: list[socket.socket] = []

    async def dial(self, *_: Any, **__: Any) -> tuple[socket.socket, Any]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self.socks.append(ours)
        self.received.append(bytearray())
        self.tasks.append(asyncio.ensure_future(self._serve(ours, self.received[-1])))
        return theirs, SESSION.addresses[0]

    async def _serve(self, sock: socket.socket, received: bytearray) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            received += await loop.sock_recv(sock, 1 << 16)
            await loop.sock_sendall(sock, self._answer)
            sock.shutdown(socket.SHUT_WR)
            while data := await loop.sock_recv(sock, 1 << 16):
                received += data


def _judge(brain: Brain, got: _Origins, connection: Any) -> None:
    """All that origins got are requests that were allowed, one time each."""
    allowed = list(brain.allowed)
    for received in got.received:
        for method, path, body in _requests(bytes(received)):
            assert (method, path) in allowed, (method, path, brain.allowed)
            allowed.remove((method, path))
            if path.startswith("/judged"):
                assert FORBIDDEN not in body, body
            if path == "/v1/messages":
                assert b'"no"' not in body, body


def _requests(data: bytes) -> Iterator[tuple[str, str, bytes]]:
    """The requests in an origin's bytes as h11 reads them, which must read all of them."""
    while data:
        reader = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        reader.receive_data(data)
        reader.receive_data(b"")
        request, body = reader.next_event(), b""
        assert isinstance(request, h11.Request), (request, data)
        assert [v for n, v in request.headers if n == b"host"] in ([b"a.example"], []), request
        path = request.target.partition(b"?")[0].decode()
        upgrade = any(n == b"upgrade" for n, _ in request.headers)
        while True:
            try:
                event = reader.next_event()
            except h11.RemoteProtocolError:  # cut short: nothing can be behind it
                data = b""
                break
            if isinstance(event, h11.Data):
                body += bytes(event.data)
            else:
                data = reader.trailing_data[0]
                break
        if upgrade:
            body, data = body + b"".join(_messages(data)), b""
        yield request.method.decode(), path, body


def _messages(data: bytes) -> Iterator[bytes]:
    """The whole messages in what a WebSocket's client sent, and what else can carry words."""
    protocol, message = frames.FrameProtocol(client=False, extensions=[]), b""
    protocol.receive_bytes(data)
    for frame in protocol.received_frames():
        if frame.opcode in (frames.Opcode.TEXT, frames.Opcode.BINARY):
            payload = frame.payload
            message += payload.encode() if isinstance(payload, str) else bytes(payload)
            if frame.message_finished:
                yield message
                message = b""
        elif frame.opcode is frames.Opcode.CLOSE:
            yield (frame.payload[1] or "").encode()
        else:
            yield bytes(frame.payload)
