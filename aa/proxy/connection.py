"""One connection from accept to close: who, where to, decided in two steps, moved or refused.

There is no policy here. Everything that is not a plain allow of the gateway, and
every error on the way to one, ends as a refusal that is recorded and, where the
protocol has words for it, told to the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from aa.config import Proxy
from aa.model import (
    Action,
    Decision,
    Effect,
    Kind,
    Layer,
    MalformedValue,
    Mode,
    RecordType,
    Report,
    deny,
)
from aa.policy.host import Host, canonical_host
from aa.proxy.answered import AnsweredNames
from aa.proxy.ask import Gateway, GatewayAway, Refusals
from aa.proxy.denial import Refusal, http_answer, tls_alert
from aa.proxy.dial import Address, Resolver, UpstreamFailed, address_of, dial, in_turn
from aa.proxy.http1 import Exchange, check_head, outgoing_head, unwanted_upgrade
from aa.proxy.identify import Client, Identify, Stranger
from aa.proxy.inspect.handover import Inspected
from aa.proxy.inspect.pool import MISSING, NoWorker, Pool
from aa.proxy.inspect.session import Session, Wanted, inspection, new_token
from aa.proxy.placeholder import Placeholders
from aa.proxy.sniff import Finding, Form, Head, Hello, Malformed, Opaque, Protocol, Sniffer
from aa.proxy.splice import Outcome, Relay, linger, reset, unsent

CLIENT_FIRST_PORTS = frozenset((80, 443, 3128, 4443, 8000, 8008, 8080, 8081, 8443, 8888))
"""Ports of protocols in which the client speaks first: its bytes are waited for."""
SILENT_SECONDS = 0.4
"""On any other port: how long a client may be silent, or unlike TLS and HTTP, before its
connection is decided by address alone (in SMTP or MySQL the server speaks first)."""
READ_BYTES = 1 << 16
ANSWER_SECONDS = 1.0
"""How long writing the reason of a refusal may take."""
LOOK_SECONDS = 1.0
"""How often a held connection is looked at: one whose client closed waits for nobody."""
LINGER_SECONDS = 1.0
LINGER_BYTES = 1 << 18
MODES_KEPT = 4096

SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h; IP6T_SO_ORIGINAL_DST has the same number
_SOCKADDR_IN = struct.Struct("!2xH4s8x")
_SOCKADDR_IN6 = struct.Struct("!2xHI16s4s")

CONNECTED = b"HTTP/1.1 200 Connection established\r\n\r\n"

log = logging.getLogger(__name__)


@dataclass
class Counts:
    """What happened since the start, for status displays."""

    accepted: int = 0
    allowed: int = 0
    denied: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Original:
    """Where a redirected connection was to go. `scope` is the interface of a link-local address."""

    address: str
    port: int
    scope: int = 0


def original_destination(sock: socket.socket) -> Original | None:
    """None when the connection was not redirected: then it was meant for the front itself."""
    try:
        if sock.family == socket.AF_INET:
            port, address = _SOCKADDR_IN.unpack(
                sock.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, _SOCKADDR_IN.size)
            )
            return Original(socket.inet_ntop(socket.AF_INET, address), port)
        port, _, address, scope = _SOCKADDR_IN6.unpack(
            sock.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, _SOCKADDR_IN6.size)
        )
    except OSError:
        return None
    return Original(
        socket.inet_ntop(socket.AF_INET6, address), port, int.from_bytes(scope, sys.byteorder)
    )


class Modes:
    """The mode of each run as its last decision told, for what must be refused without asking."""

    def __init__(self) -> None:
        self._last: OrderedDict[str, Mode] = OrderedDict()

    def note(self, run: str, mode: Mode) -> None:
        self._last[run] = mode
        self._last.move_to_end(run)
        if len(self._last) > MODES_KEPT:
            self._last.popitem(last=False)

    def enforced(self, run: str) -> bool:
        return self._last.get(run) is Mode.ENFORCE


@dataclass
class Shared:
    """What all connections share."""

    gateway: Gateway
    identify: Identify
    resolver: Resolver
    refusals: Refusals
    report: Callable[[Report], None]
    limits: Proxy = field(default_factory=Proxy)
    original: Callable[[socket.socket], Original | None] = original_destination
    own_ports: set[int] = field(default_factory=set)
    """Ports of our listeners: the front neither serves nor dials itself."""
    counts: Counts = field(default_factory=Counts)
    per_run: Counter[str] = field(default_factory=Counter)
    per_user: Counter[int] = field(default_factory=Counter)
    waiting: Counter[str] = field(default_factory=Counter)
    """Connections that are held for a person's answer, by run."""
    modes: Modes = field(default_factory=Modes)
    answered: AnsweredNames = field(default_factory=AnsweredNames)
    placeholders: Placeholders = field(default_factory=Placeholders)
    pool: Pool | None = None
    """The inspection workers."""


class Refused(Exception):
    """The connection does not go on. `recorded`: the gateway has its record already."""

    def __init__(self, decision: Decision, *, recorded: bool = False, status: int = 403) -> None:
        self.decision = decision
        self.recorded = recorded
        self.status = status
        super().__init__(decision.reason)


class Gone(Exception):
    """The client left before it said anything, or while a person was asked: nothing to do."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a connection is to go: one host object for policy, record and dial.

    `asked` is the address that the client picked: of every transparent connection,
    and of an explicit one that names an address.
    """

    port: int = 0
    host: Host | None = None
    asked: Address | None = None
    scope: int = 0
    protocol: Protocol | None = None
    more: tuple[tuple[str, Any], ...] = ()

    @property
    def target(self) -> str:
        place = str(self.host or self.asked or "")
        return f"[{place}]:{self.port}" if ":" in place else f"{place}:{self.port}"

    def action(self, addresses: Sequence[Address] | None, uid: int) -> Action:
        attributes: dict[str, Any] = {"port": self.port}
        if self.protocol is not None:
            attributes["protocol"] = self.protocol.value
        if self.host is not None:
            attributes["host"] = str(self.host)
        if addresses is not None:
            attributes["addresses"] = [str(a) for a in addresses]
        if self.asked is not None:
            attributes["original"] = str(self.asked)
        if uid >= 0:
            attributes["uid"] = uid
        return Action(Kind.NET_CONNECT, self.target, {**attributes, **dict(self.more)})

    def with_more(self, **more: Any) -> Destination:
        return replace(self, more=(*self.more, *more.items()))


class Connection:
    """One client. `serve` is its whole life and never raises but for being cancelled."""

    def __init__(self, shared: Shared, sock: socket.socket, *, explicit: bool) -> None:
        self._shared = shared
        self._limits = shared.limits
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._explicit = explicit
        self._client: Client | Stranger = Stranger("nobody has looked yet")
        self._counted = False
        self._destination = Destination()
        self._speaks: Protocol | None = Protocol.HTTP if explicit else None
        """How a refusal is told."""
        self._head: Head | None = None
        self._approval = ""
        """What a person allowed this connection with; its further steps go on with it."""
        self._moving: Relay | Exchange | Inspected | None = None
        self._began = self._loop.time()

    @property
    def last_moved(self) -> float:
        """When a byte last moved, in the loop's time; now while the client has some to come."""
        if unsent(self._sock):
            return self._loop.time()
        return self._moving.idle.last if self._moving is not None else self._began

    @property
    def run(self) -> str:
        return self._client.run if isinstance(self._client, Client) else ""

    async def serve(self) -> None:
        try:
            await (self._serve_explicit() if self._explicit else self._serve_transparent())
        except Gone:
            pass
        except Refused as e:
            await self._refuse(e)
        except UpstreamFailed as e:
            await self._tell_failure(e)
        except OSError as e:  # the client went away under our hands
            log.debug("client: %s", e)
        except Exception:  # a fault of ours must end as a refusal too
            log.exception("a connection of run %r", self.run)
            decision = deny("the proxy failed on this connection", rule="<front-error>")
            await self._refuse(Refused(decision))
        finally:
            self._leave()
            self._sock.close()

    # -- the two ways in

    async def _serve_transparent(self) -> None:
        here = self._sock.getsockname()[:2]
        original = self._shared.original(self._sock)
        there = here if original is None else (original.address, original.port)
        self._identify(there)
        if original is None:
            self._destination = Destination(here[1], asked=address_of(here[0]))
            raise Refused(_itself())
        asked = address_of(original.address)
        self._destination = Destination(original.port, asked=asked, scope=original.scope)
        name = self._shared.placeholders.name_of(self.run, asked)
        if name is not None:
            self._destination = replace(self._destination, host=canonical_host(name))
        self._keep_off_ourselves((asked,))
        self._enter()
        sniffer = Sniffer()
        finding = await self._sniff(sniffer)
        self._must_be_known()
        known = (asked,) if name is None else ()  # a placeholder is no place to go to
        await self._go_on(finding, sniffer, self._destination, known)

    async def _serve_explicit(self) -> None:
        self._identify(self._sock.getsockname()[:2], explicit=True)
        self._destination = Destination(protocol=Protocol.HTTP).with_more(via="proxy")
        self._enter()
        sniffer = Sniffer()
        head = await self._sniff(sniffer, patient=True)
        if isinstance(head, Head) and head.host is not None:
            self._destination = _of_host(
                replace(self._destination, port=head.port or 80), head.host
            )
        self._must_be_known()
        if isinstance(head, Malformed):
            raise Refused(deny(head.reason, rule="<malformed-http>"), status=400)
        if not isinstance(head, Head) or head.host is None:
            raise Refused(deny("this port speaks HTTP proxy only", rule="<not-http>"), status=400)
        self._head = head
        if head.form is Form.AUTHORITY:
            await self._connect(head, sniffer)
        elif head.form is Form.ABSOLUTE:
            await self._forward(head, sniffer)
        else:
            why = "this is a proxy: it needs CONNECT or a request with a whole http:// URL"
            raise Refused(deny(why, rule="<not-for-a-proxy>"), status=400)

    async def _forward(self, head: Head, sniffer: Sniffer) -> None:
        """An absolute-form request to the explicit port."""
        destination = self._destination
        addresses = await self._provisional(destination)
        await self._go_on(head, sniffer, destination, addresses, resolved=True)

    async def _connect(self, head: Head, sniffer: Sniffer) -> None:
        """CONNECT: what can be refused before the tunnel stands is refused in HTTP."""
        destination = replace(self._destination, protocol=None, more=(("via", "connect"),))
        addresses = await self._provisional(destination)
        await self._decide(destination, addresses, provisional=True)
        await self._loop.sock_sendall(self._sock, CONNECTED)
        self._speaks, self._head = None, None
        inner = Sniffer()
        inner.feed(bytes(sniffer.taken[head.size :]))
        finding = await self._sniff(inner)
        await self._go_on(finding, inner, destination, addresses, resolved=True)

    async def _provisional(self, destination: Destination) -> tuple[Address, ...]:
        """The addresses of an explicit destination, once its name is allowed."""
        self._destination = destination
        if destination.asked is not None:
            return (destination.asked,)
        await self._decide(destination, None, provisional=True)
        return await self._resolve(destination)

    # -- what came

    async def _sniff(self, sniffer: Sniffer, *, patient: bool = False) -> Finding:
        """Reads until the client's bytes are understood or its time is over."""
        patient = patient or self._destination.port in CLIENT_FIRST_PORTS
        began = self._loop.time()
        while sniffer.finding is None:
            undecided = sniffer.protocol is None
            wait = SILENT_SECONDS if undecided and not patient else self._limits.peek_seconds
            try:
                async with asyncio.timeout_at(began + wait):
                    data = await self._loop.sock_recv(self._sock, READ_BYTES)
            except TimeoutError:
                sniffer.end(f"nothing more within {wait:g} s")
                break
            if not data:
                if patient and not sniffer.taken:
                    raise Gone
                sniffer.end("the client closed")
                break
            sniffer.feed(data)
        finding = sniffer.finding
        assert finding is not None
        self._speaks = sniffer.protocol
        if isinstance(finding, Head):
            self._head = finding
        return finding

    async def _go_on(
        self,
        finding: Finding,
        sniffer: Sniffer,
        destination: Destination,
        known: tuple[Address, ...],
        *,
        resolved: bool = False,
    ) -> None:
        """From what came to a decision and on. `known` is the address that the client picked (none
        where that was a placeholder), or with `resolved` those of the name it gave, which the
        first step has allowed."""
        destination = replace(destination, protocol=_protocol(finding))
        wrong = _wrong(finding, destination)
        if wrong is not None:
            await self._violation(wrong, sniffer, destination, known)
            return
        if isinstance(finding, (Hello, Head)) and finding.host is not None:
            if not finding.host.is_address:
                destination = replace(destination, host=finding.host)
        elif isinstance(finding, Opaque) and destination.host is None:
            destination = self._remembered(destination)
        if isinstance(finding, Hello) and finding.encrypted:
            destination = destination.with_more(ech=True)
        addresses = known
        if destination.host is not None and not resolved:
            addresses = await self._resolve_if_allowed(destination, known)
        decision = await self._decide(destination, addresses)
        if decision.mode is Mode.OBSERVE and known:
            addresses = known  # where it would have gone without us
        wanted = self._wanted(decision)
        if wanted is not None:
            await self._inspect(wanted, finding, sniffer, destination, addresses)
        else:
            await self._pass(finding, sniffer, destination, addresses)

    def _remembered(self, destination: Destination) -> Destination:
        """What says no name itself has the one that our resolver gave the run for its address.

        It is dialled at that very address, which the second step checks like any other.
        """
        if destination.asked is None:
            return destination
        name = self._shared.answered.name_of(self.run, destination.asked)
        return destination if name is None else destination.with_more(answered=name)

    async def _violation(
        self,
        wrong: Decision,
        sniffer: Sniffer,
        destination: Destination,
        known: tuple[Address, ...],
    ) -> None:
        """Refuses what breaks the rules of its protocol, unless this run is only observed."""
        self._destination = destination = destination.with_more(violation=wrong.reason)
        if self._shared.modes.enforced(self.run):
            raise Refused(wrong)
        decision = await self._ask(destination, known, provisional=True)
        if not decision.permits or decision.mode is not Mode.OBSERVE:
            raise Refused(replace(wrong, policy=decision.policy))
        if not known:
            known = await self._resolve(destination)
        await self._decide(destination, known)
        await self._pass(Opaque(), sniffer, destination, known)

    # -- decisions

    def _identify(self, destination: tuple[str, int], *, explicit: bool = False) -> None:
        source = self._sock.getpeername()[:2]
        self._client = self._shared.identify.tcp(
            self._sock.family,
            source,
            destination,
            explicit=explicit,
            established=lambda: _is_established(self._sock),
        )

    def _enter(self) -> None:
        """Counts this connection to its run. Strangers share one count."""
        most = self._limits.max_connections_per_run
        if self._shared.per_run[self.run] >= most:
            self._speaks = None  # there is no time to learn what it speaks
            raise Refused(
                deny(
                    f"this run has {most} connections open; raise proxy.max_connections_per_run "
                    "in agent-assembly.toml",
                    rule="<limit:max_connections_per_run>",
                )
            )
        uid, share = self._client.uid, self._limits.max_connections_per_user
        if self._shared.per_user[uid] >= share:
            self._speaks = None
            raise Refused(
                deny(
                    f"this user has {share} connections open; raise proxy.max_connections_per_user "
                    "in agent-assembly.toml",
                    rule="<limit:max_connections_per_user>",
                )
            )
        self._shared.per_run[self.run] += 1
        self._shared.per_user[uid] += 1
        self._counted = True
        if isinstance(self._client, Client):
            self._shared.identify.hold(self._client)

    def _leave(self) -> None:
        if not self._counted:
            return
        if isinstance(self._client, Client):
            self._shared.identify.release(self._client)
        self._shared.per_run[self.run] -= 1
        if self._shared.per_run[self.run] <= 0:
            del self._shared.per_run[self.run]
        self._shared.per_user[self._client.uid] -= 1
        if self._shared.per_user[self._client.uid] <= 0:
            del self._shared.per_user[self._client.uid]

    def _must_be_known(self) -> None:
        if isinstance(self._client, Stranger):
            raise Refused(deny(self._client.reason, rule="<unknown-run>"))

    def _keep_off_ourselves(self, addresses: Sequence[Address]) -> None:
        if self._destination.port in self._shared.own_ports and any(
            a.is_loopback or a.is_unspecified for a in addresses
        ):
            raise Refused(_itself())

    async def _ask(
        self,
        destination: Destination,
        addresses: Sequence[Address] | None,
        *,
        provisional: bool = False,
    ) -> Decision:
        assert isinstance(self._client, Client)
        action = destination.action(addresses, self._client.uid)
        try:
            decision = await self._shared.gateway.decide(
                self._client.run, action, provisional=provisional, approval=self._approval
            )
        except GatewayAway as e:
            raise Refused(e.decision) from None
        self._shared.modes.note(self._client.run, decision.mode)
        return decision

    async def _decide(
        self,
        destination: Destination,
        addresses: Sequence[Address] | None,
        *,
        provisional: bool = False,
    ) -> Decision:
        """The gateway's allow, after a person's where it takes one. Raises `Refused` for
        everything else."""
        self._destination = destination
        decision = await self._ask(destination, addresses, provisional=provisional)
        if decision.effect is Effect.ASK and provisional:
            decision = await self._ask(destination, addresses)  # now the question is put
        if decision.effect is Effect.ASK:
            decision = await self._hold(destination.action(addresses, self._client.uid), decision)
        if not decision.permits:
            raise Refused(decision, recorded=True)
        self._approval = decision.approval or self._approval
        self._wanted(decision)
        return decision

    async def _hold(self, action: Action, decision: Decision) -> Decision:
        """A person's answer. Meanwhile what the client sends stays unread in the kernel."""
        run, waiting = self.run, self._shared.waiting
        most = self._limits.max_waiting_per_run
        if waiting[run] >= most:
            raise Refused(
                deny(
                    f"{most} connections of this run wait for a person already; raise "
                    "proxy.max_waiting_per_run in agent-assembly.toml",
                    rule="<limit:max_waiting_per_run>",
                    policy=decision.policy,
                )
            )
        waiting[run] += 1
        answer = self._loop.create_task(self._shared.gateway.settle(run, action, decision))
        try:
            while not answer.done():
                await asyncio.wait((answer,), timeout=LOOK_SECONDS)
                if not _is_established(self._sock):
                    raise Gone
            return answer.result()
        except GatewayAway as e:
            raise Refused(e.decision) from None
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)
            waiting[run] -= 1
            if waiting[run] <= 0:
                del waiting[run]

    def _wanted(self, decision: Decision) -> Wanted | None:
        """What is to be inspected, None when nothing is. Raises `Refused` when an obligation cannot
        be met; in a run that is only observed that passes, for nothing may break there."""
        observed = decision.mode is Mode.OBSERVE
        problem, wanted = "", None
        try:
            wanted = inspection(decision.obligations)
        except MalformedValue as e:
            problem = str(e)
        if wanted is not None:
            problem = self._shared.pool.problem() if self._shared.pool is not None else MISSING
        if problem and not observed:
            raise Refused(replace(decision, effect=Effect.DENY, reason=problem))
        return None if problem else wanted

    async def _resolve_if_allowed(
        self, destination: Destination, known: tuple[Address, ...]
    ) -> tuple[Address, ...]:
        """The first of the two steps: a name that is denied is not resolved.

        It has nothing to keep back where resolving would ask nobody; then the second
        step, which has the record, decides name and addresses at once.
        """
        if self._shared.modes.enforced(self.run):
            addresses = self._shared.resolver.known(str(destination.host))
            if addresses:
                return addresses
        first = await self._decide(destination, None, provisional=True)
        if first.mode is Mode.OBSERVE and known:
            return known
        return await self._resolve(destination)

    async def _resolve(self, destination: Destination) -> tuple[Address, ...]:
        return await self._shared.resolver.resolve(str(destination.host), run=self.run)

    # -- moving

    async def _pass(
        self,
        finding: Finding,
        sniffer: Sniffer,
        destination: Destination,
        addresses: tuple[Address, ...],
    ) -> None:
        """Dials what was checked and moves bytes until the end."""
        self._keep_off_ourselves(addresses)
        upstream, address = await dial(
            addresses,
            destination.port,
            seconds=self._limits.connect_seconds,
            scope=destination.scope,
        )
        self._shared.counts.allowed += 1
        try:
            if isinstance(finding, Head):
                behind = bytes(sniffer.taken[finding.size :])
                outcome = await self._exchange(finding, behind, upstream)
            else:
                outcome = await self._relay(bytes(sniffer.taken), upstream)
        except asyncio.CancelledError:
            moved = self._moving.moved if self._moving is not None else Outcome("")
            self._report(replace(moved, ended="the proxy stopped"), address)
            raise
        finally:
            upstream.close()
        self._report(outcome, address)
        if outcome.ended == "closed":
            await linger(self._sock, seconds=LINGER_SECONDS, limit=LINGER_BYTES)

    async def _inspect(
        self,
        wanted: Wanted,
        finding: Finding,
        sniffer: Sniffer,
        destination: Destination,
        addresses: tuple[Address, ...],
    ) -> None:
        """Hands the connection to a worker, which has each request decided, and moves its bytes."""
        self._keep_off_ourselves(addresses)
        assert self._shared.pool is not None
        if not isinstance(finding, (Hello, Head)):
            why = "the rule asks for inspection, and this is neither TLS nor HTTP"
            raise Refused(deny(why, rule="<not-inspectable>"))
        id_, secret = new_token()
        session = Session(
            id=id_,
            secret=secret,
            run=self.run,
            uid=self._client.uid,
            host="" if destination.host is None else str(destination.host),
            port=destination.port,
            addresses=tuple(in_turn(addresses)),
            protocol="tls" if isinstance(finding, Hello) else "http",
            wanted=wanted,
            scope=destination.scope,
            single=isinstance(finding, Head) and finding.form is Form.ABSOLUTE,
        )
        try:
            self._moving = inspected = await self._shared.pool.hand_over(
                session, bytes(sniffer.taken), self._sock
            )
        except NoWorker as e:
            raise Refused(deny(str(e), rule="<no-inspection>")) from None
        self._shared.counts.allowed += 1
        try:
            outcome = await inspected.run()
        except asyncio.CancelledError:
            self._report(replace(inspected.moved, ended="the proxy stopped"), None, inspected=True)
            raise
        finally:
            inspected.close()
        end = inspected.end
        more = {} if end is None else {"requests": end.requests}
        upstream = address_of(end.upstream) if end is not None and end.upstream else None
        self._report(outcome, upstream, inspected=True, **more)
        if end is not None and end.clean:
            await linger(self._sock, seconds=LINGER_SECONDS, limit=LINGER_BYTES)

    async def _relay(self, first: bytes, upstream: socket.socket) -> Outcome:
        self._moving = relay = Relay(self._sock, upstream, idle=self._limits.idle_seconds)
        return await relay.run(first)

    async def _exchange(self, head: Head, behind: bytes, upstream: socket.socket) -> Outcome:
        self._moving = exchange = Exchange(self._sock, upstream, idle=self._limits.idle_seconds)
        return await exchange.run(head, self._destination.port, behind)

    # -- the end

    def _report(self, outcome: Outcome, address: Address | None, **more: Any) -> None:
        """What became of an allowed connection: its one record beside the decision's."""
        destination = self._destination
        attributes: dict[str, Any] = {
            "port": destination.port,
            "sent": outcome.sent,
            "received": outcome.received,
            "seconds": round(self._loop.time() - self._began, 3),
            **more,
        }
        if destination.protocol is not None:
            attributes["protocol"] = destination.protocol.value
        if address is not None:
            attributes["upstream"] = str(address)
        self._shared.report(
            Report(
                type=RecordType.OBSERVED,
                layer=Layer.PROXY,
                kind=Kind.NET_CONNECT,
                target=destination.target,
                time=time.time_ns(),
                run=self.run,
                reason=outcome.ended,
                attributes=attributes,
            )
        )

    async def _refuse(self, refused: Refused) -> None:
        self._shared.counts.denied += 1
        destination = self._destination
        if not refused.recorded:
            uid = self._client.uid
            self._shared.refusals.refuse(
                refused.decision,
                Kind.NET_CONNECT,
                destination.target,
                run=self.run,
                attributes=destination.action(None, uid).attributes,
            )
        await self._answer(
            Refusal(
                refused.decision,
                Kind.NET_CONNECT.value,
                destination.target,
                self.run,
                refused.status,
            )
        )

    async def _tell_failure(self, failed: UpstreamFailed) -> None:
        self._shared.counts.failed += 1
        self._report(Outcome(f"failed: {failed}"), None, error=failed.error)
        await self._answer(
            Refusal(
                deny(str(failed), rule="<upstream>"),
                Kind.NET_CONNECT.value,
                self._destination.target,
                self.run,
                failed.status,
                failed.error,
            )
        )

    async def _answer(self, refusal: Refusal) -> None:
        """Tells the client in its own protocol; a reset where that has no words."""
        if self._speaks is Protocol.TLS:
            answer = tls_alert(refusal)
        elif self._speaks is Protocol.HTTP:
            head = self._head
            accept = (head.header("accept") if head else None) or b""
            answer = http_answer(
                refusal, accept=accept, head_only=head is not None and head.method == "HEAD"
            )
        else:
            reset(self._sock)
            return
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._loop.sock_sendall(self._sock, answer)
            await linger(self._sock, seconds=LINGER_SECONDS, limit=LINGER_BYTES)


def _is_established(sock: socket.socket) -> bool:
    """The first byte of struct tcp_info is the state; neither end has closed."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x01"


def _itself() -> Decision:
    return deny("this leads to the proxy itself, not through it", rule="<front-itself>")


def _of_host(destination: Destination, host: Host) -> Destination:
    if host.is_address:
        return replace(destination, asked=address_of(str(host)))
    return replace(destination, host=host)


def _protocol(finding: Finding) -> Protocol:
    if isinstance(finding, Hello):
        return Protocol.TLS
    if isinstance(finding, Head):
        return Protocol.HTTP
    if isinstance(finding, Malformed):
        return finding.protocol
    return Protocol.OPAQUE


def _wrong(finding: Finding, destination: Destination) -> Decision | None:
    """Why the bytes do not fit their protocol or their destination; None when all is well."""
    if isinstance(finding, Malformed):
        return deny(finding.reason, rule=f"<malformed-{finding.protocol.value}>")
    if isinstance(finding, Hello) and finding.host is not None:
        return _names_differ("SNI", finding.host, destination)
    if isinstance(finding, Head):
        return _wrong_request(finding, destination)
    return None


def _names_differ(what: str, host: Host, destination: Destination) -> Decision | None:
    """One name everywhere: what an explicit client asked for and what it says inside agree,
    and an address in place of a name is the one the connection goes to."""
    if destination.host is not None:
        expected: object = destination.host
        if host == destination.host:
            return None
    else:
        expected = destination.asked
        if host.is_address and address_of(str(host)) == destination.asked:
            return None
        if not host.is_address and ("via", "connect") not in destination.more:
            return None
    return deny(
        f"the {what} names {host}, but the connection is for {expected}", rule="<name-mismatch>"
    )


def _wrong_request(head: Head, destination: Destination) -> Decision | None:
    if head.form is Form.AUTHORITY:
        why = "CONNECT is served at the explicit proxy port alone"
        return deny(why, rule="<connect-inside>")
    if head.port not in (None, destination.port):
        why = f"the request is for port {head.port}, the connection for {destination.port}"
        return deny(why, rule="<name-mismatch>")
    upgrade = unwanted_upgrade(head)
    if upgrade is not None:
        why = f"an upgrade to {upgrade[:64]!r} over plain HTTP is not passed; use https or wss"
        return deny(why, rule="<upgrade>")
    if head.host is not None:
        differ = _names_differ("Host", head.host, destination)
        if differ is not None:
            return differ
    seen = check_head(outgoing_head(head, destination.port), head)
    if seen is not None:
        return deny(f"the request can be read in two ways: {seen}", rule="<malformed-http>")
    return None
