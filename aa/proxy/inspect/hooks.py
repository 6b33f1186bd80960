"""What is asked and told while a connection is inspected: one method for each place in mitmproxy's core.

A method that raises denies; see `engine.Connection.handle_hook`. There is no policy here.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mitmproxy import http

from aa.ca.errors import CannotIssue
from aa.model import (
    Action,
    Decision,
    Effect,
    Kind,
    Layer,
    MalformedValue,
    Obligation,
    RecordType,
    Report,
    deny,
)
from aa.policy.content import IN, OUT, body_facts, judges, message_facts
from aa.policy.host import InvalidHost, canonical_host
from aa.prices import Prices
from aa.proxy.ask import Gateway, GatewayAway, Refusals
from aa.proxy.dial import UpstreamFailed
from aa.proxy.inspect.engine import (
    LIMIT,
    REFUSAL,
    SHOWN,
    SOCKETS,
    Connection,
    Hook,
    http_layer,
    refuse_flow,
    tls_layers,
)
from aa.proxy.inspect.request import (
    MALFORMED,
    Head,
    Request,
    judge,
    looks_like_http,
    outgoing_fields,
)
from aa.proxy.inspect.secret import Injection, Mask, NoSecret, read_credential
from aa.proxy.inspect.session import INSPECT, INSPECT_LIMIT, MAX_INSPECT_LIMIT, Session, Waiting
from aa.proxy.inspect.tls import REFUSES_CERTIFICATE, Presented, Trusted
from aa.proxy.inspect.usage import (
    BATCHES,
    METERED,
    UsageReader,
    asked,
    charged,
    may_be_model_request,
)
from aa.sockdiag import SockDiag

PINNED, NOT_HTTP, NO_LEAF = "<pinned>", "<not-http>", "<no-certificate>"
ENCODING, LLM_USAGE, SECRET = "<encoding>", "<llm-usage>", "<secret>"
INJECT = "inject"

EXCHANGE = "aa.exchange"

log = logging.getLogger(__name__)


class Exchange:
    """What is remembered of one request until its record is written."""

    def __init__(self, request: Request, decision: Decision, orders: Orders) -> None:
        self.action = request.action
        self.approval = decision.approval
        self.orders = orders
        self.began = time.monotonic()
        self.sent = self.received = 0
        self.provider = ""
        """Of a request that may be one to a model."""
        self.model = ""
        self.usage: UsageReader | None = None
        self.whole = False
        """Whether the answer came to its end."""
        self.mask: Mask | None = None
        """Of a request that has a secret in it: no answer may show it."""

    def count_sent(self, data: bytes) -> bytes:
        self.sent += len(data)
        return data

    def count_received(self, data: bytes) -> bytes | list[bytes]:
        self.received += len(data)
        if self.usage is not None:
            self.usage.feed(data)
        if self.mask is None:
            return data
        shown = self.mask.feed(data)
        return [shown] if shown else []  # an empty chunk would end the answer


class Orders:
    """What an allowed request is bound to. Raises MalformedValue for what cannot be met here."""

    def __init__(self, obligations: tuple[Obligation, ...]) -> None:
        self.body: Mapping[str, Any] = {}
        self.ws: Mapping[str, Any] = {}
        self.limit = INSPECT_LIMIT
        self.secrets: list[Injection] = []
        for one in obligations:
            if one.name == INJECT:
                self.secrets.append(Injection.from_json(one.parameters))
                continue
            if one.name != INSPECT:
                raise MalformedValue(f"this proxy cannot meet {one.name}")
            unknown = sorted(set(one.parameters) - {"body", "ws", "limit"})
            if unknown:
                raise MalformedValue(f"this proxy cannot look at {', '.join(unknown)}")
            self.body = one.parameters.get("body") or {}
            self.ws = one.parameters.get("ws") or {}
            limit = one.parameters.get("limit", INSPECT_LIMIT)
            if type(limit) is not int or not 0 < limit <= MAX_INSPECT_LIMIT:
                raise MalformedValue("inspect: limit must be a number of bytes")
            self.limit = limit
            if not isinstance(self.body, dict) or not isinstance(self.ws, dict):
                raise MalformedValue("inspect: body and ws must be objects")


class Hooks:
    """All connections of a worker share one."""

    def __init__(
        self,
        *,
        gateway: Gateway,
        refusals: Refusals,
        report: Callable[[Report], None],
        waiting: Waiting,
        pump: Callable[[], None],
        presented: Presented,
        trusted: Trusted,
        diag: SockDiag,
        prices: Callable[[], Prices],
        max_waiting_per_run: int = 32,
    ) -> None:
        self._gateway = gateway
        self._refusals = refusals
        self._report = report
        self._waiting = waiting
        self._pump = pump
        self._presented = presented
        self._trusted = trusted
        self._diag = diag
        self._prices = prices
        self._uid = os.geteuid()
        self._max_waiting_per_run = max_waiting_per_run
        self._asking_people: Counter[str] = Counter()
        self.requests = 0

    def table(self) -> dict[str, Hook]:
        """By the names that mitmproxy's core has for them."""
        return {
            "client_connected": self.client_connected,
            "client_disconnected": self.client_disconnected,
            "socks5_auth": self.socks5_auth,
            "next_layer": self.next_layer,
            "tls_clienthello": self.tls_clienthello,
            "tls_start_client": self.tls_start_client,
            "tls_established_client": self.tls_established_client,
            "tls_failed_client": self.tls_failed_client,
            "tls_start_server": self.tls_start_server,
            "tls_established_server": self.tls_established_server,
            "tls_failed_server": self.tls_failed_server,
            "malformed_head": self.malformed_head,
            "requestheaders": self.requestheaders,
            "request": self.request,
            "responseheaders": self.responseheaders,
            "response": self.response,
            "error": self.error,
            "websocket_start": lambda conn, flow: None,
            "websocket_message": self.websocket_message,
            "websocket_end": self.websocket_end,
        }

    # -- who comes

    def client_connected(self, conn: Connection, client: Any) -> None:
        """Only a socket of our own user, and that is the front, may come at all."""
        client.error = "not decided yet"
        owner = self._diag.owner(
            socket.AF_INET, socket.IPPROTO_TCP, client.peername[:2], client.sockname[:2]
        )
        if owner is not None and owner.uid == self._uid:
            client.error = None
        else:
            log.warning("a connection that is not the front's is refused (%s)", owner)

    def socks5_auth(self, conn: Connection, data: Any) -> None:
        session = self._waiting.take(data.username, data.password)
        if session is None:
            self._pump()  # what the front said before it connected lies in the channel
            session = self._waiting.take(data.username, data.password)
        if session is None:
            log.warning("a connection without a valid token is refused")
            return
        conn.state.session = session
        conn.state.refuse = lambda decision, shown, kind=Kind.HTTP_REQUEST: self._refuse(
            session, decision, shown, kind
        )
        data.valid = True

    def client_disconnected(self, conn: Connection, client: Any) -> None:
        for flow in list(conn.flows):
            self._tell(conn, flow, "the connection ended")

    # -- what it speaks

    def next_layer(self, conn: Connection, data: Any) -> None:
        session, context = conn.session, data.context
        if len(context.layers) == 1:
            if context.server.address != (str(session.addresses[0]), session.port):
                raise RuntimeError("the front asked for another address than it announced")
            context.server.sni = session.name
            data.layer = (tls_layers if session.protocol == "tls" else http_layer)(context)
            return
        if context.client.alpn == b"h2":
            data.layer = http_layer(context)
            return
        found = looks_like_http(data.data_client())
        if found:
            data.layer = http_layer(context)
        elif found is False:
            why = "what is inside the connection is not HTTP, so it cannot be inspected"
            conn.state.refuse(deny(why, rule=NOT_HTTP), "", Kind.NET_CONNECT)
            conn.abort(why)

    # -- TLS

    def tls_clienthello(self, conn: Connection, data: Any) -> None:
        """The name that this reader sees is the one that the front saw."""
        named, session = data.client_hello.sni, conn.session
        if named is None:
            return
        try:
            same = str(canonical_host(named)) == session.host
        except InvalidHost:
            same = False
        if not same:
            why = f"the SNI names {named[:253]}, but the connection is for {session.target}"
            self._refuse_tls(conn, deny(why, rule="<name-mismatch>"))

    def tls_start_client(self, conn: Connection, data: Any) -> None:
        try:
            data.ssl_conn = self._presented.towards_client(conn.session.name)
        except CannotIssue as e:
            self._refuse_tls(conn, deny(f"no certificate can be made: {e}", rule=NO_LEAF))
            return
        conn.await_client_tls()

    def _refuse_tls(self, conn: Connection, decision: Decision) -> None:
        conn.state.refuse(decision, "", Kind.NET_CONNECT)
        conn.refuse_tls(decision)

    def tls_established_client(self, conn: Connection, data: Any) -> None:
        conn.in_time(data.conn)

    def tls_failed_client(self, conn: Connection, data: Any) -> None:
        late = conn.late(data.conn)
        conn.in_time(data.conn)
        alert = data.ssl_conn.alert if data.ssl_conn is not None else ""
        if alert not in REFUSES_CERTIFICATE:
            why = data.ssl_conn.failure if data.ssl_conn is not None else ""
            conn.end_with(f"client: {late or why or data.conn.error}")
            return
        host = conn.session.name
        words = alert.partition("_ALERT_")[2].replace("_", " ").lower()
        why = (
            f"the program does not accept this host's certificate for {host} ({words}): have it "
            "trust the authority that `aasm ca show` names; if it pins its own, allow the host by a "
            "rule without methods, paths, headers and inspect, so that it passes uninspected"
        )
        conn.end_with("client: refused our certificate")
        conn.state.refuse(deny(why, rule=PINNED), "", Kind.NET_CONNECT)

    def tls_start_server(self, conn: Connection, data: Any) -> None:
        alpn = ("h2", "http/1.1") if data.context.client.alpn == b"h2" else ("http/1.1",)
        data.ssl_conn = self._trusted.towards_origin(conn.session.name, alpn=alpn)
        conn.state.tls[data.conn] = data.ssl_conn

    def tls_established_server(self, conn: Connection, data: Any) -> None:
        conn.opened(data.conn)

    def tls_failed_server(self, conn: Connection, data: Any) -> None:
        late = conn.late(data.conn)
        conn.opened(data.conn)
        conn.state.tls.pop(data.conn, None)
        alert = data.ssl_conn.alert if data.ssl_conn is not None else ""
        why = data.ssl_conn.failure if data.ssl_conn is not None else ""
        error = "tls_protocol_error"
        if "ALERT" in alert:
            error = "tls_alert_received"
        elif why and not alert:
            error = "tls_certificate_error"
        what = f"{conn.session.name} at {conn.upstream} port {conn.session.port}"
        told = UpstreamFailed(
            f"{what}: {late or why or 'it closed the connection during the TLS handshake'}",
            error="connection_timeout" if late else error,
            status=504 if late else 502,
        )
        conn.state.failures[data.conn.error] = told

    # -- requests

    def malformed_head(self, conn: Connection, data: Any) -> None:
        why = f"the request can be read in two ways: {data[1]}"
        conn.state.refuse(deny(why, rule=MALFORMED), "")

    async def requestheaders(self, conn: Connection, flow: Any) -> None:
        session, head = conn.session, head_of(flow.request)
        flow.metadata[SHOWN] = head.shown
        conn.requests += 1
        self.requests += 1
        request = judge(head, session)
        if isinstance(request, Decision):
            conn.state.refuse(request, head.shown)
            status = 400 if request.rule == MALFORMED else 403
            refuse_flow(flow, session, request, status=status)
            return
        decision = await self._decide(conn, request.action, head.shown)
        orders = self._orders(conn, decision, head.shown)
        if isinstance(orders, Decision):
            refuse_flow(flow, session, orders)
            return
        exchange = Exchange(request, decision, orders)
        unmetered = self._look_for_a_model(exchange, session, flow.request)
        if unmetered is not None:
            conn.state.refuse(unmetered, head.shown)
            refuse_flow(flow, session, unmetered)
            return
        flow.metadata[EXCHANGE] = exchange
        flow.metadata[LIMIT] = min(orders.limit, session.wanted.limit)
        conn.flows.add(flow)
        flow.request.headers = http.Headers(outgoing_fields(head, session, upgrade=request.upgrade))
        flow.request.authority = session.authority if head.version == "HTTP/2.0" else ""
        try:
            self._inject(exchange, session, flow.request)
        except NoSecret as e:
            conn.flows.discard(flow)
            denied = deny(str(e), rule=SECRET)
            conn.state.refuse(denied, head.shown)
            refuse_flow(flow, session, denied)
            return
        if not orders.body and not exchange.provider:
            flow.request.stream = exchange.count_sent

    def _inject(self, exchange: Exchange, session: Session, request: Any) -> None:
        """Puts secrets where the agent holds their placeholders: over TLS to a verified name alone.
        Raises `NoSecret`."""
        used = []
        for one in exchange.orders.secrets:
            values = [v.encode("latin-1", "replace") for v in request.headers.get_all(one.header)]
            if not any(map(one.is_asked_for, values)):
                continue
            if session.protocol != "tls" or not session.host:
                raise NoSecret(f"the secret {one.id} goes to a name over TLS alone")
            secret = read_credential(one.credential)
            request.headers[one.header] = one.filled(secret).decode("ascii")
            used.append(secret)
        if used:
            exchange.mask = Mask(tuple(used))
            request.headers["accept-encoding"] = "identity"

    def _look_for_a_model(
        self, exchange: Exchange, session: Session, request: Any
    ) -> Decision | None:
        """Notes that a request may be one to a model, so that its body is read first. A denial for
        what would use tokens where nobody can count them."""
        provider = self._prices().provider_of(session.host) if session.wanted.llm else ""
        method, path = (exchange.action.attributes[name] for name in ("method", "path"))
        if provider and path in BATCHES and method == "POST":
            why = "what a batch uses is told later, where it cannot be counted"
            return deny(why, rule=LLM_USAGE)
        if provider and "upgrade" in request.headers:
            why = "what is used over a WebSocket cannot be counted"
            return deny(why, rule=LLM_USAGE)
        content_type = request.headers.get("content-type", "")
        if provider and may_be_model_request(method, path, content_type):
            exchange.provider = provider
        return None

    async def _decide(
        self, conn: Connection, action: Action, shown: str, approval: str = ""
    ) -> Decision:
        """The gateway's answer, a person's where it takes one, or the denial in its place."""
        run = conn.session.run
        try:
            decision = await self._gateway.decide(run, action, approval=approval)
            if decision.effect is not Effect.ASK:
                return decision
            return await self._ask_a_person(run, action, decision)
        except GatewayAway as e:
            conn.state.refuse(e.decision, shown)
            return e.decision

    async def _ask_a_person(self, run: str, action: Action, decision: Decision) -> Decision:
        most = self._max_waiting_per_run
        if self._asking_people[run] >= most:
            why = (
                f"{most} requests of this run wait for a person already; raise "
                "proxy.max_waiting_per_run in agent-assembly.toml"
            )
            rule = "<limit:max_waiting_per_run>"
            raise GatewayAway(deny(why, rule=rule, policy=decision.policy))
        self._asking_people[run] += 1
        try:
            return await self._gateway.settle(run, action, decision)
        finally:
            self._asking_people[run] -= 1
            if not self._asking_people[run]:
                del self._asking_people[run]

    def _orders(self, conn: Connection, decision: Decision, shown: str) -> Orders | Decision:
        """What an allow is bound to, or a denial."""
        if not decision.permits:
            return decision
        try:
            return Orders(tuple(decision.obligations))
        except MalformedValue as e:
            denied = replace(decision, effect=Effect.DENY, reason=str(e), obligations=())
            conn.state.refuse(denied, shown)
            return denied

    async def request(self, conn: Connection, flow: Any) -> None:
        """All of a request is here. One that was held back is judged now."""
        exchange: Exchange | None = flow.metadata.get(EXCHANGE)
        if exchange is None or not (exchange.orders.body or exchange.provider):
            return
        content = flow.request.raw_content or b""
        denied = await self._judge_body(conn, flow, exchange, content)
        if denied is None and exchange.provider:
            denied = await self._judge_model(conn, flow, exchange, content)
        if denied is not None:
            conn.flows.discard(flow)
            refuse_flow(flow, conn.session, denied)
        else:
            exchange.sent = len(content)

    async def _judge_body(
        self, conn: Connection, flow: Any, exchange: Exchange, content: bytes
    ) -> Decision | None:
        """A denial, or None where the body may leave."""
        shown = flow.metadata[SHOWN]
        encoding = flow.request.headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity":
            why = f"its body is encoded ({encoding[:40]}), so it cannot be judged"
            decision = deny(why, rule=ENCODING)
            conn.state.refuse(decision, shown)
            return decision
        if not exchange.orders.body:
            return None
        facts = body_facts(exchange.orders.body, content)
        decision = await self._with(conn, exchange, shown, body=facts)
        orders = self._orders(conn, decision, shown)
        return orders if isinstance(orders, Decision) else None

    async def _judge_model(
        self, conn: Connection, flow: Any, exchange: Exchange, content: bytes
    ) -> Decision | None:
        """The same for the model that a body asks for. What asks for none is no model request."""
        shown, path = flow.metadata[SHOWN], exchange.action.attributes["path"]
        wanted = asked(path, content)
        if wanted is None and path not in METERED:
            return None
        if wanted is None or not wanted.tells_usage:
            why = "it names no model"
            if wanted is not None:
                why = (
                    "its stream would not say what it used; have it ask for that with "
                    'stream_options = {"include_usage": true}'
                )
            decision = deny(why, rule=LLM_USAGE)
            conn.state.refuse(decision, shown)
            return decision
        exchange.model = wanted.model
        target = f"{exchange.provider}/{wanted.model}"
        attributes = {"provider": exchange.provider, "model": wanted.model}
        attributes["host"] = conn.session.host
        action = Action(Kind.LLM_REQUEST, target, attributes)
        decision = await self._decide(conn, action, shown)
        orders = self._orders(conn, decision, shown)
        if isinstance(orders, Decision):
            return orders
        flow.request.headers["accept-encoding"] = "identity"
        return None

    async def _with(
        self, conn: Connection, exchange: Exchange, shown: str, **facts: Any
    ) -> Decision:
        """Decides the same request again, with facts about what is in it."""
        action = replace(exchange.action, attributes={**exchange.action.attributes, **facts})
        return await self._decide(conn, action, shown, exchange.approval)

    def responseheaders(self, conn: Connection, flow: Any) -> None:
        exchange: Exchange | None = flow.metadata.get(EXCHANGE)
        if REFUSAL in flow.metadata or exchange is None:
            return
        if exchange.mask is not None and not self._mask_head(exchange.mask, flow.response):
            why = "the answer to a request with a secret is encoded, so the secret could be in it"
            conn.state.refuse(deny(why, rule=SECRET), flow.metadata[SHOWN])
            conn.abort(why)
            return
        if flow.response.status_code == 101:
            return
        if exchange.model and flow.response.status_code < 400:
            headers = flow.response.headers
            exchange.usage = UsageReader(
                headers.get("content-type", ""), headers.get("content-encoding", "")
            )
        flow.response.stream = exchange.count_received
        if conn.session.single:
            flow.response.headers["Connection"] = "close"

    def _mask_head(self, mask: Mask, response: Any) -> bool:
        """False for an answer in whose body a secret could not be seen."""
        response.headers = _masked(mask, response.headers)
        response.data.reason = mask.all(response.data.reason)
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        return encoding in ("", "identity")

    def response(self, conn: Connection, flow: Any) -> None:
        exchange: Exchange | None = flow.metadata.get(EXCHANGE)
        if exchange is not None:
            exchange.whole = True
            if exchange.mask is not None and flow.response.trailers is not None:
                flow.response.trailers = _masked(exchange.mask, flow.response.trailers)
        if flow.websocket is None:
            self._tell(conn, flow, "closed")

    def error(self, conn: Connection, flow: Any) -> None:
        self._tell(conn, flow, f"failed: {flow.error.msg if flow.error else 'unknown'}")

    # -- WebSocket

    async def websocket_message(self, conn: Connection, flow: Any) -> None:
        message = flow.websocket.messages[-1]
        del flow.websocket.messages[:-1]
        exchange: Exchange = flow.metadata[EXCHANGE]
        if exchange.mask is not None and not message.from_client:
            message.content = exchange.mask.all(message.content)
        direction = OUT if message.from_client else IN
        if judges(exchange.orders.ws, direction):
            message.dropped = True  # until it is allowed
            facts = message_facts(exchange.orders.ws, direction, message.content)
            decision = await self._with(conn, exchange, flow.metadata[SHOWN], ws=facts)
            message.dropped = not decision.permits
            if not decision.permits:
                ends = flow.metadata[SOCKETS]
                why = f"denied by {decision.rule}"
                ends[0 if message.from_client else 1].deny(why[:120])
                return
        if message.from_client:
            exchange.sent += len(message.content)
        else:
            exchange.received += len(message.content)

    def websocket_end(self, conn: Connection, flow: Any) -> None:
        why = flow.websocket.close_reason or "closed"
        self._tell(conn, flow, f"websocket {flow.websocket.close_code}: {why[:200]}")

    # -- records

    def _refuse(
        self, session: Session, decision: Decision, shown: str, kind: Kind = Kind.HTTP_REQUEST
    ) -> None:
        attributes: dict[str, Any] = {"port": session.port, "protocol": session.protocol}
        if session.host:
            attributes["host"] = session.host
        if shown:
            attributes["method"], _, attributes["path"] = shown.partition(" ")
        self._refusals.refuse(
            decision, kind, session.target, run=session.run, attributes=attributes
        )

    def _tell(self, conn: Connection, flow: Any, ended: str) -> None:
        """The one record of a request that was allowed, beside its decision's."""
        exchange: Exchange | None = flow.metadata.get(EXCHANGE)
        if exchange is None or flow not in conn.flows:
            return
        conn.flows.discard(flow)
        session, asked = conn.session, exchange.action.attributes
        attributes: dict[str, Any] = {
            "port": session.port,
            "protocol": session.protocol,
            "method": asked["method"],
            "path": asked["path"],
            "http": asked["http"],
            "sent": exchange.sent,
            "received": exchange.received,
            "seconds": round(time.monotonic() - exchange.began, 3),
        }
        if session.host:
            attributes["host"] = session.host
        if conn.upstream:
            attributes["upstream"] = conn.upstream
        if flow.response is not None and REFUSAL not in flow.metadata:
            attributes["status"] = flow.response.status_code
        self._observed(session, Kind.HTTP_REQUEST, session.target, ended, attributes)
        if exchange.model and flow.server_conn.timestamp_tcp_setup is not None:
            self._tell_usage(session, exchange, attributes.get("status"))

    def _tell_usage(self, session: Session, exchange: Exchange, status: int | None) -> None:
        """What a model request used, for the limits. An error of the provider's costs nothing."""
        if status is not None and status >= 400:
            return
        if exchange.usage is not None and exchange.whole:
            exchange.usage.end()
        used = charged(
            exchange.usage, whole=exchange.whole, sent=exchange.sent, received=exchange.received
        )
        problem = used.pop("problem", "")
        attributes = {"provider": exchange.provider, "model": exchange.model, **used}
        target = f"{exchange.provider}/{exchange.model}"
        self._observed(session, Kind.LLM_REQUEST, target, problem or "closed", attributes)

    def _observed(
        self, session: Session, kind: Kind, target: str, reason: str, attributes: dict[str, Any]
    ) -> None:
        self._report(
            Report(
                type=RecordType.OBSERVED,
                layer=Layer.PROXY,
                kind=kind,
                target=target,
                time=time.time_ns(),
                run=session.run,
                reason=reason,
                attributes=attributes,
            )
        )


def _masked(mask: Mask, headers: Any) -> Any:
    return http.Headers([(mask.all(n), mask.all(v)) for n, v in headers.fields])


def head_of(request: Any) -> Head:
    data = request.data
    return Head(
        version=data.http_version.decode("latin-1"),
        method=data.method,
        scheme=b"" if data.http_version != b"HTTP/2.0" and not data.authority else data.scheme,
        authority=data.authority,
        path=data.path,
        fields=tuple(data.headers.fields),
    )
