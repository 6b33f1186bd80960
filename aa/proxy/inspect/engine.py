"""mitmproxy's protocol core with our limits in it, and without its addons.

One `Connection` drives one inspected connection: it asks our hooks in the places where mitmproxy
would ask its addons, and whatever goes wrong in one of them, or in the core, ends the connection
without another byte moved. What is replaced of mitmproxy is in this module alone:

- upstream connections go to the decided addresses, within deadlines (`Connection.open_connection`);
- heads, chunk lines and what waits behind a request are bounded (`_Bounded`);
- answers of ours are given at once, not after the body that came with the request (`Stream`);
- no more is read while somebody is asked, or while the other side takes nothing (`_Gate`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import h11
from mitmproxy import connection, flow, http
from mitmproxy.proxy import commands, events, mode_specs, server
from mitmproxy.proxy.layers import http as http_layers
from mitmproxy.proxy.layers import modes, tls, websocket
from mitmproxy.proxy.layers.http import _http1, _http2
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection as WebSocketClose
from wsproto.events import Message as WebSocketMessage
from wsproto.events import Ping, Pong

from aa.model import Decision, deny
from aa.proxy.denial import Refusal, http_answer, http_fields, tls_alert
from aa.proxy.dial import UpstreamFailed, dial
from aa.proxy.inspect.session import Session
from aa.proxy.inspect.tls import Tls
from aa.proxy.sniff import HEAD_LIMIT
from aa.proxy.splice import reset

PIPELINED_LIMIT = 1 << 18
"""Bytes of further requests that may wait behind one that is being answered."""
DROPPED_LIMIT = 16 << 20
"""Bytes of a refused request's body that are read away, so that its answer is read."""
PAUSED_LIMIT = 1 << 20
"""Bytes that are read ahead while a decision or an upstream is waited for."""
UNSENT_LIMIT = 1 << 20
"""Bytes that wait for an HTTP/2 peer's window; then the other side is not read."""
MESSAGE_LIMIT = 16 << 20
"""Bytes of one WebSocket message."""
FRAME_BYTES = 64
"""What each frame of a message counts as, besides what is in it."""
UPSTREAMS_PER_CLIENT = 32
"""Connections to the origin for one client connection at a time; further requests wait."""

MODE = mode_specs.ProxyMode.parse("socks5")
REFUSAL, SHOWN, LIMIT = "aa.refusal", "aa.shown", "aa.limit"
WHOLE, SOCKETS = "aa.whole", "aa.sockets"
"""Names of what we keep with a flow: our answer to it, how it is shown in records, how much of its
body may be held back, whether all of the request is here, and the two ends of its WebSocket."""

log = logging.getLogger(__name__)


@dataclass
class Limits:
    """What of the configuration reaches the engine."""

    connect_seconds: float = 10.0
    """Also of a TLS handshake with the origin."""
    peek_seconds: float = 5.0
    """Of a client's TLS handshake, and of a head from its first byte."""
    idle_seconds: float = 900.0


@dataclass
class State:
    """What all layers of one connection share. mitmproxy hands it to them as its options."""

    limits: Limits
    session: Session | None = None
    failures: dict[str, UpstreamFailed] = field(default_factory=dict)
    """Why an upstream could not be had, by the words that mitmproxy has for it."""
    http2: list[Any] = field(default_factory=list)
    """Its HTTP/2 ends, which hold what a peer's window does not take yet."""
    tls: dict[Any, Tls] = field(default_factory=dict)
    ended: str = ""
    """Why it ended, where that was not the peers' wish."""
    broken: bool = False
    """An answer was cut short: the client must not take the end for a proper one."""
    refuse: Callable[..., None] = lambda decision, shown: None
    """Records a refusal that the gateway knows nothing of."""

    connection_strategy: str = "lazy"
    stream_large_bodies: None = None
    body_size_limit: None = None
    store_streamed_bodies: bool = False
    validate_inbound_headers: bool = True
    normalize_outbound_headers: bool = True
    keep_host_header: bool = False
    websocket: bool = True
    rawtcp: bool = False
    http2_ping_keepalive: int = 58
    proxyauth: str = "by token"
    proxy_debug: bool = False
    tcp_timeout: float = 600.0

    def __contains__(self, name: str) -> bool:
        return name == "proxyauth"

    def said_goodbye(self, conn: Any) -> bool:
        """Whether a peer ended its side on purpose, where its protocol has words for that."""
        return conn not in self.tls or self.tls[conn].closed_cleanly


Hook = Callable[["Connection", Any], Awaitable[None] | None]


@dataclass
class MalformedHeadHook(commands.StartHook):
    """A client sent what is no request head."""

    blocking = False
    data: tuple[Any, str]


class _Gate:
    """A reader that rests while `closed()`; `moved` wakes it to look again."""

    def __init__(self, reader: asyncio.StreamReader, conn: Connection, *, client: bool) -> None:
        self._reader = reader
        self._connection = conn
        self._client = client

    async def read(self, size: int) -> bytes:
        await self._connection.may_read(client=self._client)
        data = await self._reader.read(size)
        self._connection.note_read(len(data))
        return data


class Connection(server.LiveConnectionHandler):
    """One connection from the front. `serve` is its life."""

    layer: Any

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        hooks: dict[str, Hook],
        limits: Limits,
    ) -> None:
        self.state = State(limits)
        super().__init__(reader, writer, self.state, MODE)
        self.transports[self.client].reader = _Gate(reader, self, client=True)
        self.layer = modes.Socks5Proxy(self.layer.context)
        self.timeout_watchdog.timeout = limits.idle_seconds
        self.dead = False
        self.upstream = ""
        self.requests = 0
        self.flows: set[Any] = set()
        """Allowed requests that have no record yet of what became of them."""
        self._hooks = hooks
        self._writer = writer
        self._asking: set[asyncio.Task[Any] | None] = set()
        self._opening: set[Any] = set()
        self._read_ahead = 0
        self._moved = asyncio.Event()
        self._upstreams = asyncio.Semaphore(UPSTREAMS_PER_CLIENT)
        self._timers: dict[Any, asyncio.TimerHandle] = {}
        self._late: dict[Any, str] = {}

    @property
    def ended(self) -> str:
        return self.state.ended

    def end_with(self, why: str) -> None:
        """The first reason is the one that is told."""
        self.state.ended = self.state.ended or why

    @property
    def session(self) -> Session:
        if self.state.session is None:
            raise RuntimeError("a connection without a session")
        return self.state.session

    async def serve(self) -> None:
        try:
            await self.handle_client()
        finally:
            self.dead = True
            for timer in self._timers.values():
                timer.cancel()
            for task in self._asking:
                if task is not None:
                    task.cancel()  # nobody is there for whom a person is still asked

    # -- the end of it

    def abort(self, why: str) -> None:
        """Ends it at once: nothing that waits goes on, and the client sees a reset."""
        self.end_with(why)
        self.state.broken = True
        self.dead = True
        for transport in self.transports.values():
            if transport.writer is not None:
                reset(transport.writer.get_extra_info("socket"))
            if transport.handler is not None:
                transport.handler.cancel(why)
        self._moved.set()

    def refuse_tls(self, decision: Decision) -> None:
        """Tells a client that has no TLS yet, and ends it."""
        refusal = Refusal(decision, "net.connect", self.session.target)
        self._writer.write(tls_alert(refusal))
        self.end_with(decision.reason)
        self.dead = True
        self.close_connection(self.client)

    def log(self, message: str, level: int = logging.INFO, exc_info: Any = None) -> None:
        """What mitmproxy says. An error is a fault in its core: nothing of it can be relied on."""
        if level >= logging.ERROR:
            log.error("%s: %s", self.client.peername, message, exc_info=exc_info)
            self.abort("the inspection failed on this connection")
        else:
            log.debug("%s", message)

    def close_connection(self, conn: Any, half_close: bool = False) -> None:
        if conn is self.client and not half_close and self.state.broken:
            reset(self._writer.get_extra_info("socket"))
        if conn in self.transports:
            super().close_connection(conn, half_close)

    async def on_timeout(self) -> None:
        self.end_with("idle")
        self.state.broken = True
        await super().on_timeout()

    # -- events and hooks

    async def server_event(self, event: Any) -> None:
        if not self.dead:
            await super().server_event(event)
        self._moved.set()

    async def handle_hook(self, hook: Any) -> None:
        """Runs ours. Any exception in it ends as a refusal, or ends the connection."""
        task = asyncio.current_task()
        with self.timeout_watchdog.disarm():
            self._asking.add(task)
            try:
                result = self._hooks[hook.name](self, *hook.args())
                if result is not None:
                    await result
            except Exception:
                log.exception("hook %s", hook.name)
                self._fail(hook)
            finally:
                self._asking.discard(task)
                self._settled()

    def _fail(self, hook: Any) -> None:
        decision = deny("the inspection failed on this request", rule="<inspect-error>")
        if self.state.session is not None:
            self.state.refuse(decision, "")
        (data,) = hook.args()
        if hook.name == "requestheaders" or (hook.name == "request" and not data.request.stream):
            refuse_flow(data, self.session, decision)
        else:
            self.abort("the inspection failed on this connection")

    # -- when to read

    def note_read(self, size: int) -> None:
        if self._asking or self._opening:
            self._read_ahead += size

    def _settled(self) -> None:
        if not self._asking and not self._opening:
            self._read_ahead = 0
        self._moved.set()

    async def may_read(self, *, client: bool) -> None:
        """Waits while there is no room for what would be read from the client, or from upstream."""
        while not self.dead and (
            self._read_ahead > PAUSED_LIMIT or self._unsent(to_client=not client) > UNSENT_LIMIT
        ):
            self._moved.clear()
            await self._moved.wait()

    def _unsent(self, *, to_client: bool) -> int:
        return sum(
            len(chunk.data)
            for one in self.state.http2
            if (one.conn is self.client) is to_client
            for chunks in one.h2_conn.stream_buffers.values()
            for chunk in chunks
        )

    # -- upstream

    async def open_connection(self, command: Any) -> None:
        """A connection to one of the decided addresses, whatever mitmproxy would dial."""
        conn = command.connection
        self._opening.add(conn)
        try:
            async with self._upstreams:
                await self._upstream(command)
        finally:
            self.opened(conn)

    async def _upstream(self, command: Any) -> None:
        conn, session = command.connection, self.session
        try:
            sock, address = await dial(
                session.addresses,
                session.port,
                seconds=self.state.limits.connect_seconds,
                scope=session.scope,
            )
        except UpstreamFailed as e:
            conn.error = str(e)
            self.state.failures[conn.error] = e
            await self.server_event(events.OpenConnectionCompleted(command, conn.error))
            return
        except asyncio.CancelledError:
            conn.error = "cancelled"
            await self.server_event(events.OpenConnectionCompleted(command, conn.error))
            raise
        self.upstream = str(address)
        reader, writer = await asyncio.open_connection(sock=sock)
        conn.timestamp_start = conn.timestamp_tcp_setup = time.time()
        conn.state = connection.ConnectionState.OPEN
        conn.peername, conn.sockname = sock_names(writer)
        gate = _Gate(reader, self, client=False)
        self.transports[conn] = server.ConnectionIO(asyncio.current_task(), gate, writer)
        if conn.tls:
            self._deadline(conn, self.state.limits.connect_seconds, "TLS")
        else:
            self.opened(conn)
        await self.server_event(events.OpenConnectionCompleted(command, None))
        try:
            await self.handle_connection(conn)
        finally:
            self.in_time(conn)
            conn.timestamp_end = time.time()

    def opened(self, conn: Any) -> None:
        """It is connected, with TLS where it has TLS, or it will not be."""
        self._opening.discard(conn)
        self.in_time(conn)
        self._settled()

    def await_client_tls(self) -> None:
        self._deadline(self.client, self.state.limits.peek_seconds, "TLS")

    def in_time(self, conn: Any) -> None:
        timer = self._timers.pop(conn, None)
        if timer is not None:
            timer.cancel()

    def late(self, conn: Any) -> str:
        """What a connection was too slow with, if it was."""
        return self._late.get(conn, "")

    def _deadline(self, conn: Any, seconds: float, what: str) -> None:
        def late() -> None:
            self._timers.pop(conn, None)
            self._late[conn] = f"no {what} within {seconds:g} s"
            transport = self.transports.get(conn)
            if transport is not None and transport.handler is not None:
                transport.handler.cancel(self._late[conn])

        self._timers[conn] = asyncio.get_running_loop().call_later(seconds, late)


def sock_names(writer: asyncio.StreamWriter) -> tuple[Any, Any]:
    return writer.get_extra_info("peername"), writer.get_extra_info("sockname")


# -- answers of ours


def refuse_flow(
    flow_: Any, session: Session, decision: Decision, *, status: int = 403, error: str = ""
) -> None:
    """Has a request answered by us, and not forwarded."""
    refusal = Refusal(
        decision,
        "http.request",
        session.target,
        session.run,
        status,
        error or "http_request_denied",
    )
    flow_.metadata[REFUSAL] = refusal
    flow_.request.stream = False
    flow_.request.headers.pop("expect", None)
    if flow_.metadata.get(WHOLE):
        flow_.response = answer(refusal, flow_.request, close=False)


def answer(refusal: Refusal, request: Any, *, close: bool) -> Any:
    accept = request.headers.get("accept", "").encode("utf-8", "surrogateescape")
    fields, body = http_fields(refusal, accept=accept)
    if close:
        fields = (*fields, (b"Connection", b"close"))
    content = b"" if request.method == "HEAD" else body
    response = http.Response.make(refusal.status, content, http.Headers(fields))
    response.headers["Content-Length"] = str(len(body))
    return response


class Stream(http_layers.HttpStream):
    """One request and its answer. An answer of ours does not wait for the request's body."""

    client_state: Any
    server_state: Any
    _begun = False
    _dropped = 0

    def state_wait_for_request_headers(self, event: Any) -> Iterator[Any]:
        yield from super().state_wait_for_request_headers(event)
        refusal = self.flow.metadata.get(REFUSAL)
        if refusal is not None and self.client_state == self.state_consume_request_body:
            yield from self._answer(refusal, whole=event.end_stream)

    def state_consume_request_body(self, event: Any) -> Iterator[Any]:
        limit = self.flow.metadata.get(LIMIT, 0)
        if (
            isinstance(event, http_layers.RequestData)
            and len(self.request_body_buf) + len(event.data) > limit
        ):
            decision = deny(
                f"its body is larger than the {limit} bytes that are held back to be judged",
                rule="<limit:inspect_limit>",
            )
            self.request_body_buf.clear()
            self.context.options.refuse(decision, self.flow.metadata.get(SHOWN, ""))
            refuse_flow(self.flow, self.context.options.session, decision)
            yield from self._answer(self.flow.metadata[REFUSAL], whole=False)
            return
        if isinstance(event, http_layers.RequestEndOfMessage):
            self.flow.metadata[WHOLE] = True
        yield from super().state_consume_request_body(event)

    def state_stream_request_body(self, event: Any) -> Iterator[Any]:
        if isinstance(event, http_layers.RequestData) and not event.data:
            return
        yield from super().state_stream_request_body(event)

    def state_stream_response_body(self, event: Any) -> Iterator[Any]:
        if isinstance(event, http_layers.ResponseData) and not event.data:
            return
        yield from super().state_stream_response_body(event)

    def state_drop(self, event: Any) -> Iterator[Any]:
        """The rest of a request that was answered already."""
        if isinstance(event, http_layers.RequestData):
            self._dropped += len(event.data)
            if self._dropped > DROPPED_LIMIT and self.context.client.alpn != b"h2":
                yield commands.CloseConnection(self.context.client)
        elif isinstance(event, http_layers.RequestEndOfMessage):
            yield http_layers.DropStream(self.stream_id)

    def check_invalid(self, request: bool) -> Generator[Any, Any, bool]:
        """Requests are judged by our hook; an answer that is not valid is a failed upstream."""
        if not request:
            return (yield from self._invalid_answer())
        if self.flow.request.method.upper() != "CONNECT":
            return False
        session = self.context.options.session
        decision = deny(
            "CONNECT is served at the explicit proxy port alone", rule="<connect-inside>"
        )
        self.context.options.refuse(decision, "CONNECT")
        refuse_flow(self.flow, session, decision)
        yield from self._answer(self.flow.metadata[REFUSAL], whole=False)
        return True

    def _invalid_answer(self) -> Generator[Any, Any, bool]:
        try:
            http_layers.validate_headers(self.flow.response)
            asked = "upgrade" in self.flow.request.headers
            if self.flow.response.status_code == 101 and not asked:
                raise ValueError("it changes to another protocol unasked")
        except ValueError as e:
            yield commands.CloseConnection(self.flow.server_conn)
            yield from self._failed(f"the origin's answer is not valid: {e}")
            return True
        return False

    def start_response_stream(self) -> Iterator[Any]:
        self._begun = True
        yield from super().start_response_stream()

    def send_response(self, already_streamed: bool = False) -> Iterator[Any]:
        self._begun = True
        yield from super().send_response(already_streamed)

    def handle_protocol_error(self, event: Any) -> Iterator[Any]:
        answerable = (
            isinstance(event, http_layers.ResponseProtocolError)
            and not self._begun
            and self.client_state not in (self.state_errored, self.state_drop)
            and self.server_state != self.state_errored
        )
        if answerable:
            yield from self._failed(event.message)
            return
        if self._begun and self.server_state != self.state_done:
            if self.context.client.alpn != b"h2":
                self.context.options.broken = True
        yield from super().handle_protocol_error(event)

    def _failed(self, message: str) -> Iterator[Any]:
        """The upstream failed before it answered."""
        failed = self.context.options.failures.get(message)
        if failed is None:
            failed = UpstreamFailed(message, error="http_protocol_error")
        self.flow.error = flow.Error(str(failed))
        yield http_layers.HttpErrorHook(self.flow)
        refuse_flow(
            self.flow,
            self.context.options.session,
            deny(str(failed), rule="<upstream>"),
            status=failed.status,
            error=failed.error,
        )
        whole = self.client_state == self.state_done
        yield from self._answer(self.flow.metadata[REFUSAL], whole=whole)

    def _answer(self, refusal: Refusal, *, whole: bool) -> Iterator[Any]:
        """Answers at once. `whole`: nothing of the request comes behind."""
        self._begun = True
        self.flow.live = False
        waits_for_end = self.client_state != self.state_done
        self.client_state = self.state_drop if waits_for_end else self.state_errored
        self.server_state = self.state_errored
        response = answer(refusal, self.flow.request, close=not whole or refusal.status != 403)
        client = self.context.client
        content = response.raw_content
        yield http_layers.SendHttp(
            http_layers.ResponseHeaders(self.stream_id, response, not content), client
        )
        if content:
            yield http_layers.SendHttp(http_layers.ResponseData(self.stream_id, content), client)
        yield http_layers.SendHttp(http_layers.ResponseEndOfMessage(self.stream_id), client)
        if not waits_for_end:
            yield http_layers.DropStream(self.stream_id)


def _error(kind: Any, stream_id: int, message: str) -> Any:
    """An error event; from mitmproxy 12 on its code must be given."""
    return kind(stream_id, message, kind.code)


# -- bounded readers


class _NoTrailers:
    """A body reader that leaves trailers out."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def __call__(self, buffer: Any) -> Any:
        event = self._reader(buffer)
        return h11.EndOfMessage() if isinstance(event, h11.EndOfMessage) else event

    def read_eof(self) -> Any:
        return self._reader.read_eof()


class _Bounded:
    """What both HTTP/1 ends have in common: bounds on what waits to be understood."""

    def _too_much(self: Any) -> str:
        if self.state == self.wait:
            return "too much behind a request" if len(self.buf) > PIPELINED_LIMIT else ""
        if self.state in (self.read_headers, self.read_body) and len(self.buf) > HEAD_LIMIT:
            return f"a head or a chunk's line of more than {HEAD_LIMIT} bytes"
        return ""


class Http1Server(_Bounded, _http1.Http1Server):
    """Towards the client."""

    state: Any
    _head_since = 0.0

    def _handle_event(self, event: Any) -> Iterator[Any]:
        if isinstance(event, events.Wakeup):
            if self.state == self.read_headers and self.buf and self._late():
                yield from self._malformed(f"its head is not whole after {self._patience:g} s")
            return
        yield from super()._handle_event(event)
        if isinstance(event, events.DataReceived):
            much = self._too_much()
            if much:
                yield from self._malformed(much)
            elif self.state == self.read_headers and self.buf:
                if not self._head_since:
                    self._head_since = time.monotonic()
                    yield commands.RequestWakeup(self._patience)
            else:
                self._head_since = 0.0

    @property
    def _patience(self) -> float:
        return float(self.context.options.limits.peek_seconds)

    def _late(self) -> bool:
        waited = time.monotonic() - self._head_since
        return bool(self._head_since) and waited >= self._patience - 0.01

    def read_headers(self, event: Any) -> Iterator[Any]:
        told = super().read_headers(event)
        first = next(told, None)
        if isinstance(first, commands.SendData):  # its own words for what it cannot read
            for _ in told:
                pass
            yield from self._malformed("its head is not one of HTTP/1")
        elif first is not None:
            yield first
            yield from told

    def read_body(self, event: Any) -> Iterator[Any]:
        held = None  # of a body that cannot be read it closes first, and says so then
        for command in super().read_body(event):
            received = command.event if isinstance(command, http_layers.ReceiveHttp) else None
            if isinstance(received, http_layers.RequestProtocolError):
                self.context.options.ended = f"client: {received.message}"
                if isinstance(event, events.DataReceived):
                    yield from self._malformed(received.message)
                    return
                self.context.options.broken = True
            if held is not None:
                yield held
                held = None
            if isinstance(command, commands.CloseConnection):
                held = command
            else:
                yield command
        if held is not None:
            yield held

    def _malformed(self, why: str) -> Iterator[Any]:
        """Ends a connection whose bytes are no requests, in words where there is room for them."""
        options = self.context.options
        options.ended = options.ended or f"client: {why}"
        if self.state in (self.wait, self.read_body):
            yield http_layers.ReceiveHttp(
                _error(http_layers.RequestProtocolError, self.stream_id, why)
            )
        if self.response is not None:
            options.broken = True
        else:
            yield commands.SendData(self.conn, self._bad_request(why))
        yield MalformedHeadHook((self.context, why))
        yield commands.CloseConnection(self.conn)
        self.state = self.done

    def _bad_request(self, why: str) -> bytes:
        session = self.context.options.session
        decision = deny(f"the request can be read in two ways: {why}", rule="<malformed-http>")
        refusal = Refusal(decision, "http.request", session.target, session.run, 400)
        return http_answer(refusal)


class Http1Client(_Bounded, _http1.Http1Client):
    """Towards the origin."""

    state: Any

    def send(self, event: Any) -> Iterator[Any]:
        if isinstance(event, http_layers.RequestHeaders) and not event.end_stream:
            self._say_length(event)
        yield from super().send(event)

    def _say_length(self, event: Any) -> None:
        """HTTP/2 needs no length. In HTTP/1 a body without one would be read as another request."""
        headers = event.request.headers
        if "content-length" not in headers and "transfer-encoding" not in headers:
            headers["Transfer-Encoding"] = "chunked"

    def read_headers(self, event: Any) -> Iterator[Any]:
        if isinstance(event, events.DataReceived) and self.request:
            while bytes(self.buf)[:13].startswith(_INFORMATIONAL):
                if self.buf.maybe_extract_lines() is None:
                    return
        yield from super().read_headers(event)

    def read_body(self, event: Any) -> Iterator[Any]:
        if (
            isinstance(event, events.ConnectionClosed)
            and isinstance(self.body_reader, _http1.Http10Reader)
            and self.conn.tls
            and not self.context.options.said_goodbye(self.conn)
        ):
            yield http_layers.ReceiveHttp(
                _error(
                    http_layers.ResponseProtocolError,
                    self.stream_id,
                    "the origin's connection ended without a word",
                )
            )
            return
        yield from super().read_body(event)

    def _handle_event(self, event: Any) -> Iterator[Any]:
        yield from super()._handle_event(event)
        if isinstance(event, events.DataReceived) and self.state != self.passthrough:
            much = self._too_much()
            if much and self.stream_id is not None:
                yield commands.CloseConnection(self.conn)
                what = f"the origin sent {much}"
                yield http_layers.ReceiveHttp(
                    _error(http_layers.ResponseProtocolError, self.stream_id, what)
                )


_INFORMATIONAL = tuple(
    b"HTTP/1.%d %d" % (minor, status) for minor in (0, 1) for status in (100, 102, 103)
)


class Http2Server(_http2.Http2Server):
    """Towards the client."""

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        context.options.http2.append(self)


class Http2Client(_http2.Http2Client):
    """Towards the origin."""

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        context.options.http2.append(self)


class _Frames(list[bytearray]):
    """The frames of a message that is not whole yet. Each grows in place, however it comes."""

    def append(self, frame: bytes | bytearray) -> None:
        super().append(bytearray(frame))


class WebSocketEnd(websocket.WebsocketConnection):
    """One end of a WebSocket. What is too large, or denied, ends both with a reason.

    Nobody decides what is in pings, pongs and the reason that a client closes with, so it goes no
    further than to us. The pings themselves do: they keep both ways open.
    """

    _size = 0
    _denied = ""

    def __init__(self, *args: Any, **named: Any) -> None:
        self.pings: list[bytes] = []
        """Payloads that this end waits for the echo of."""
        super().__init__(*args, **named)

    @property
    def frame_buf(self) -> _Frames:
        return self._frames

    @frame_buf.setter
    def frame_buf(self, frames: list[bytes]) -> None:
        self._frames = _Frames(bytearray(frame) for frame in frames)

    def deny(self, why: str) -> None:
        """No further message of this end is read."""
        self._denied = why

    def events(self) -> Iterator[Any]:
        for event in super().events():
            if isinstance(event, WebSocketMessage):
                self._size += len(event.data) + FRAME_BYTES * event.frame_finished
                if self._size > MESSAGE_LIMIT:
                    yield WebSocketClose(1009, f"more than {MESSAGE_LIMIT} bytes")
                    return
                if event.message_finished:
                    self._size = 0
            elif isinstance(event, Ping):
                self.pings.append(bytes(event.payload))
                event = Ping()
            elif isinstance(event, Pong):
                event = Pong()
            elif isinstance(event, WebSocketClose) and not self.client:
                event = WebSocketClose(event.code)
            yield event
            if self._denied:
                yield WebSocketClose(1008, self._denied)
                return

    def echoes(self) -> Iterator[Any]:
        """The answers to its pings."""
        pings, self.pings = self.pings, []
        if self.state is ConnectionState.OPEN:
            for payload in pings:
                yield self.send2(Pong(payload))


class WebSocket(websocket.WebsocketLayer):
    """The messages of one WebSocket."""

    client_ws: WebSocketEnd
    server_ws: WebSocketEnd

    def start(self, event: Any) -> Iterator[Any]:
        yield from super().start(event)
        self.flow.metadata[SOCKETS] = (self.client_ws, self.server_ws)

    def relay_messages(self, event: Any) -> Iterator[Any]:
        yield from super().relay_messages(event)
        for end in (self.client_ws, self.server_ws):
            yield from end.echoes()

    _handle_event = start


class ClientTls(tls.ClientTLSLayer):
    """Towards the client. A proper end is said to be one; mitmproxy alone would leave that out."""

    def send_close(self, command: Any) -> Iterator[Any]:
        if self.tls and not self.context.options.broken:
            self.tls.say_goodbye()
            yield from self.tls_interact()
        yield from super().send_close(command)


def tls_layers(context: Any) -> Any:
    outer = tls.ServerTLSLayer(context)
    outer.child_layer = ClientTls(context)
    return outer


def http_layer(context: Any) -> Any:
    return http_layers.HttpLayer(context, http_layers.HTTPMode.transparent)


REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (http_layers, "HttpStream", Stream),
    (http_layers, "Http1Server", Http1Server),
    (http_layers, "Http1Client", Http1Client),
    (http_layers, "Http2Server", Http2Server),
    (http_layers, "Http2Client", Http2Client),
    (websocket, "WebsocketLayer", WebSocket),
    (websocket, "WebsocketConnection", WebSocketEnd),
)
"""Where mitmproxy looks for the classes that ours stand in for."""


def install() -> None:
    """Puts ours in their places, once. Raises RuntimeError when a place is not there: then this is
    no mitmproxy that we know, and nothing is served with it."""
    for module, name, ours in REPLACED:
        theirs = getattr(module, name, None)
        if theirs is not ours and (theirs is None or not issubclass(ours, theirs)):
            raise RuntimeError(f"{module.__name__} has no {name} as we know it")
        setattr(module, name, ours)
    readers = _http1.make_body_reader
    if not getattr(readers, "ours", False):
        _http1.make_body_reader = _without_trailers(readers)


def _without_trailers(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def make_body_reader(expected: Any) -> Any:
        reader = make(expected)
        return _NoTrailers(reader) if isinstance(reader, _http1.ChunkedReader) else reader

    make_body_reader.ours = True  # type: ignore[attr-defined]
    return make_body_reader
