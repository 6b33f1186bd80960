"""The DNS forwarder: a query is decided by name before anybody is asked, then answered as usual.

Only the decided name and its type travel on, in a query made anew: flags, EDNS
options and letter case of the client's packet carry nothing out. A name about which
a person must be asked gets a placeholder: nobody is asked for it before. HTTPS and SVCB
are answered as having no data: the keys for encrypted ClientHellos that they
carry would hide the name that a connection is decided by.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
import socket
import struct
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from typing import cast

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
from dns.edns import EDECode

from aa.model import Action, Decision, Effect, Kind, deny
from aa.policy.host import InvalidHost, canonical_host
from aa.proxy.answered import AnsweredNames
from aa.proxy.ask import Gateway, GatewayAway, Refusals
from aa.proxy.connection import Original, original_destination
from aa.proxy.hostdns import Address, HostNames, Nameservers
from aa.proxy.identify import Client, Identify, Stranger
from aa.proxy.placeholder import TTL as PLACEHOLDER_TTL
from aa.proxy.placeholder import Placeholders

QUERY_LIMIT = 4096
"""Bytes of a query; a name and an OPT record need 600."""
IN_FLIGHT = 512
IN_FLIGHT_PER_RUN = 64
QUERIES_PER_SECOND = 200.0
"""Of one run, with bursts of twice as many."""
TCP_CONNECTIONS = 128
TCP_CONNECTIONS_PER_RUN = 16
TCP_IDLE_SECONDS = 10.0
UPSTREAM_SECONDS = 1.5
"""How long one resolver may take before the next is asked."""
ANSWER_SECONDS = 4.5
"""How long a query may take in all: below the 5 s after which libc asks again."""
UDP_PAYLOAD = 1232
"""EDNS payload size, both ways: below every path's fragmentation."""
PLAIN_PAYLOAD = 512
HOSTS_TTL = 10
REASON_BYTES = 160
"""Of an extended error's text, so that a refusal stays a small packet."""
RATES_KEPT = 1024

META_TYPES = range(128, 256)
"""Queries that are no lookups (RFC 6895): transfers, TKEY, ANY."""
HIDDEN_TYPES = frozenset((dns.rdatatype.HTTPS, dns.rdatatype.SVCB))
ADDRESS_TYPES = {dns.rdatatype.A: 4, dns.rdatatype.AAAA: 6}

_LENGTH = struct.Struct("!H")

log = logging.getLogger(__name__)


class Rejected(Exception):
    """The packet is no query that is answered. With `rcode` None it is not answered at all."""

    def __init__(self, rcode: dns.rcode.Rcode | None, why: str = "") -> None:
        self.rcode = rcode
        super().__init__(why)


class NoAnswer(Exception):
    """No resolver of this host answered."""


@dataclass(frozen=True, slots=True)
class Query:
    """A parsed query: its one question and, where the name is one, its canonical text."""

    message: dns.message.Message
    name: dns.name.Name
    type: dns.rdatatype.RdataType
    text: str


def parse_query(wire: bytes) -> Query:
    """The only form of query that is served. Raises `Rejected`."""
    if len(wire) < 12 or wire[2] & 0x80:
        raise Rejected(None, "no query")
    if len(wire) > QUERY_LIMIT:
        raise Rejected(dns.rcode.FORMERR, "too long")
    if (wire[2] >> 3) & 0xF != dns.opcode.QUERY:
        raise Rejected(dns.rcode.NOTIMP, "no lookup")
    if struct.unpack_from("!3H", wire, 4) != (1, 0, 0):
        raise Rejected(dns.rcode.FORMERR, "a query has one question and no answers")
    try:
        message = dns.message.from_wire(wire)
    except (dns.exception.DNSException, ValueError, IndexError, struct.error) as e:
        raise Rejected(dns.rcode.FORMERR, str(e)) from None
    if len(message.question) != 1 or message.additional or message.had_tsig:
        raise Rejected(dns.rcode.FORMERR, "records in a query")
    if message.edns > 0:
        raise Rejected(dns.rcode.FORMERR, "EDNS version")
    question = message.question[0]
    if question.rdclass != dns.rdataclass.IN:
        raise Rejected(dns.rcode.REFUSED, "class")
    if question.rdtype in META_TYPES or question.rdtype == dns.rdatatype.OPT:
        raise Rejected(dns.rcode.NOTIMP, "no lookup type")
    return Query(message, question.name, question.rdtype, canonical_name(question.name))


def canonical_name(name: dns.name.Name) -> str:
    """The text that is decided: lower case, no dot at the end. Raises `Rejected`."""
    labels = name.labels[:-1]
    if not labels or any(b"." in label or not label.isascii() for label in labels):
        raise Rejected(dns.rcode.REFUSED, "not a name that can be decided")
    try:
        host = canonical_host(b".".join(labels).decode("ascii"))
    except InvalidHost as e:
        raise Rejected(dns.rcode.REFUSED, str(e)) from None
    if host.is_address:
        raise Rejected(dns.rcode.REFUSED, "an address in place of a name")
    return str(host)


def failure(
    query: dns.message.Message, rcode: dns.rcode.Rcode, code: EDECode, why: str
) -> dns.message.Message:
    """An answer without records; the reason goes along when the client speaks EDNS."""
    answer = _answer(query, rcode)
    if query.edns >= 0 and why:
        text = why.encode()[:REASON_BYTES].decode(errors="ignore")
        option = dns.edns.EDEOption(code, text)
        answer.use_edns(0, payload=UDP_PAYLOAD, options=[option])
    return answer


def bare_failure(wire: bytes, rcode: dns.rcode.Rcode) -> bytes:
    """An answer to what could not be parsed: the header alone, with its id."""
    flags = 0x8000 | (int.from_bytes(wire[2:4], "big") & 0x7900) | (int(rcode) & 0xF)
    return wire[:2] + struct.pack("!5H", flags, 0, 0, 0, 0)


def to_wire(answer: dns.message.Message, query: dns.message.Message, *, udp: bool) -> bytes:
    """The answer as bytes; cut to its question, and marked so, where the client has no room."""
    limit = 65535
    if udp:
        limit = max(PLAIN_PAYLOAD, min(query.payload, UDP_PAYLOAD)) if query.edns >= 0 else 512
    try:
        return answer.to_wire(max_size=limit)
    except dns.exception.TooBig:
        cut = _answer(query, answer.rcode())
        cut.flags |= dns.flags.TC
        return cut.to_wire(max_size=limit)


def _answer(query: dns.message.Message, rcode: dns.rcode.Rcode) -> dns.message.Message:
    answer = dns.message.make_response(query, recursion_available=True, our_payload=UDP_PAYLOAD)
    answer.set_rcode(rcode)
    return answer


@dataclass(slots=True)
class _Rate:
    tokens: float
    at: float


@dataclass
class Counts:
    queries: int = 0
    denied: int = 0
    failed: int = 0


@dataclass
class Forwarder:
    """Serves UDP and TCP sockets. `answer` is the whole life of one query."""

    gateway: Gateway
    identify: Identify
    refusals: Refusals
    answered: AnsweredNames = field(default_factory=AnsweredNames)
    placeholders: Placeholders = field(default_factory=Placeholders)
    names: HostNames = field(default_factory=HostNames)
    nameservers: Nameservers = field(default_factory=Nameservers)
    upstream_port: int = 53
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._per_run: Counter[str] = Counter()
        self._tcp_per_run: Counter[str] = Counter()
        self._tcp_total = 0
        self._rates: dict[str, _Rate] = {}
        self._servers: list[asyncio.Server] = []
        self._datagrams: list[asyncio.DatagramTransport] = []

    async def listen_udp(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        transport, _ = await self._loop.create_datagram_endpoint(
            lambda: _Datagrams(self, sock.family), sock=sock
        )
        self._datagrams.append(transport)

    async def listen_tcp(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._servers.append(
            await asyncio.start_server(self._serve_tcp, sock=sock, limit=QUERY_LIMIT + 2)
        )

    @property
    def listening(self) -> bool:
        return bool(self._datagrams) and bool(self._servers)

    def close(self) -> None:
        for server in self._servers:
            server.close()
        for transport in self._datagrams:
            transport.close()
        for task in self._tasks:
            task.cancel()

    # -- transports

    def take_datagram(
        self, wire: bytes, sender: tuple[str, int], reply: _Datagrams, family: int
    ) -> None:
        who = self.identify.udp(family, sender)
        if len(self._tasks) >= IN_FLIGHT:
            self._over_limit("in_flight", "", who)
            reply.send(_refused(wire), sender)
            return

        async def serve() -> None:
            answer = await self.answer(wire, who, udp=True)
            if answer is not None:
                reply.send(answer, sender)

        task = self._loop.create_task(serve())
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a query ended in an error", exc_info=task.exception())

    async def _serve_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock: socket.socket = writer.get_extra_info("socket")
        try:
            here, source = sock.getsockname()[:2], sock.getpeername()[:2]
        except OSError:
            writer.close()
            return
        original = original_destination(sock) or Original(*here)
        who = self.identify.tcp(sock.family, source, (original.address, original.port))
        run = _run(who)
        if self._tcp_total >= TCP_CONNECTIONS or self._tcp_per_run[run] >= TCP_CONNECTIONS_PER_RUN:
            self._over_limit("tcp_connections", "", who)
            writer.transport.abort()
            return
        self._tcp_total += 1
        self._tcp_per_run[run] += 1
        try:
            await self._serve_stream(reader, writer, who)
        except (OSError, EOFError, TimeoutError):
            pass  # the client left, or was silent for too long
        finally:
            self._tcp_total -= 1
            _count_down(self._tcp_per_run, run)
            writer.close()

    async def _serve_stream(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, who: Client | Stranger
    ) -> None:
        while True:
            async with asyncio.timeout(TCP_IDLE_SECONDS):
                (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                if not 12 <= length <= QUERY_LIMIT:
                    return
                wire = await reader.readexactly(length)
            answer = await self.answer(wire, who, udp=False)
            if answer is None:
                return
            writer.write(_LENGTH.pack(len(answer)) + answer)
            async with asyncio.timeout(TCP_IDLE_SECONDS):
                await writer.drain()

    # -- one query

    async def answer(self, wire: bytes, who: Client | Stranger, *, udp: bool) -> bytes | None:
        """The answer to one packet; None for what deserves none. Never raises for bad input."""
        self.counts.queries += 1
        try:
            query = parse_query(wire)
        except Rejected as e:
            self.counts.denied += 1
            if e.rcode is None:
                return None
            self.refusals.refuse(
                deny(f"not a query that can be decided: {e}", rule="<malformed-dns>"),
                Kind.DNS_QUERY,
                "",
                run=_run(who),
            )
            return bare_failure(wire, e.rcode)
        run = _run(who)
        limit = self._limit(run)
        if limit:
            self._over_limit(limit, query.text, who)
            why = f"over the limit {limit}"
            answer = failure(query.message, dns.rcode.REFUSED, EDECode.PROHIBITED, why)
            return to_wire(answer, query.message, udp=udp)
        self._per_run[run] += 1
        try:
            answer = await self._decide_and_ask(query, who)
        finally:
            _count_down(self._per_run, run)
        return to_wire(answer, query.message, udp=udp)

    async def _decide_and_ask(self, query: Query, who: Client | Stranger) -> dns.message.Message:
        decision = await self._decide(query, who)
        if decision.effect is Effect.ASK and not decision.obligations:
            return self._placeholder(query, _run(who), decision)
        if not decision.permits or decision.obligations:
            self.counts.denied += 1
            why = f"{decision.reason} [{decision.rule}]"
            return failure(query.message, dns.rcode.REFUSED, EDECode.PROHIBITED, why)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await self._look_up(query, _run(who))
        except (NoAnswer, TimeoutError) as e:
            self.counts.failed += 1
            why = str(e) or f"no resolver of this host answered within {ANSWER_SECONDS:g} s"
            code = EDECode.NO_REACHABLE_AUTHORITY
            return failure(query.message, dns.rcode.SERVFAIL, code, why)

    async def _decide(self, query: Query, who: Client | Stranger) -> Decision:
        if isinstance(who, Stranger):
            return self._refuse(deny(who.reason, rule="<unknown-run>"), query, who)
        attributes = {"qtype": dns.rdatatype.to_text(query.type), "uid": who.uid}
        action = Action(Kind.DNS_QUERY, query.text, attributes)
        try:
            return await self.gateway.decide(who.run, action)
        except GatewayAway as e:
            return self._refuse(e.decision, query, who)

    def _refuse(self, decision: Decision, query: Query, who: Client | Stranger) -> Decision:
        self.refusals.refuse(
            decision,
            Kind.DNS_QUERY,
            query.text,
            run=_run(who),
            attributes={"qtype": dns.rdatatype.to_text(query.type), "uid": who.uid},
        )
        return decision

    def _limit(self, run: str) -> str:
        """The limit that this run is over, or an empty text."""
        if self._per_run[run] >= IN_FLIGHT_PER_RUN:
            return "in_flight_per_run"
        now = time.monotonic()
        if len(self._rates) >= RATES_KEPT:
            self._rates.clear()
        rate = self._rates.setdefault(run, _Rate(2 * QUERIES_PER_SECOND, now))
        rate.tokens = min(
            2 * QUERIES_PER_SECOND, rate.tokens + (now - rate.at) * QUERIES_PER_SECOND
        )
        rate.at = now
        if rate.tokens < 1:
            return "queries_per_second"
        rate.tokens -= 1
        return ""

    def _over_limit(self, limit: str, target: str, who: Client | Stranger) -> None:
        self.counts.denied += 1
        decision = deny(f"more DNS queries than {limit} allows", rule=f"<limit:dns_{limit}>")
        self.refusals.refuse(decision, Kind.DNS_QUERY, target, run=_run(who))

    # -- the answer

    def _placeholder(self, query: Query, run: str, decision: Decision) -> dns.message.Message:
        """For an address that stands for the name; no data for anything else."""
        if query.type != dns.rdatatype.A:
            why = f"{decision.reason}, when it is connected to [{decision.rule}]"
            return failure(query.message, dns.rcode.NOERROR, EDECode.PROHIBITED, why)
        return _addresses(query, [self.placeholders.give(run, query.text)], PLACEHOLDER_TTL)

    async def _look_up(self, query: Query, run: str) -> dns.message.Message:
        if query.type in HIDDEN_TYPES:
            return _answer(query.message, dns.rcode.NOERROR)
        version = ADDRESS_TYPES.get(query.type)
        if version is not None:
            known = self._known_here(query.text)
            if known:
                chosen = [a for a in known if a.version == version]
                self.answered.remember(run, query.text, chosen, HOSTS_TTL)
                return _addresses(query, chosen, HOSTS_TTL)
        found = await self._ask_host(query)
        answer = _answer(query.message, found.rcode())
        answer.answer = [r for r in _internet(found.answer) if r.rdtype not in HIDDEN_TYPES]
        answer.authority = [r for r in _internet(found.authority) if r.rdtype == dns.rdatatype.SOA]
        if version is not None:
            self._remember(run, query, answer.answer)
        return answer

    def _known_here(self, name: str) -> tuple[Address, ...]:
        listed = self.names.addresses(name)
        if not listed and (name == "localhost" or name.endswith(".localhost")):
            return (ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1"))
        return listed

    def _remember(self, run: str, query: Query, records: Sequence[dns.rrset.RRset]) -> None:
        for rrset in records:
            if rrset.rdtype == query.type:
                addresses = [ipaddress.ip_address(r.address) for r in rrset]
                self.answered.remember(run, query.text, addresses, rrset.ttl)

    async def _ask_host(self, query: Query) -> dns.message.Message:
        """Asks the host's resolvers in turn. Raises `NoAnswer` with what each one did."""
        failed = []
        last: dns.message.Message | None = None
        for server in self.nameservers.get():
            try:
                async with asyncio.timeout(UPSTREAM_SECONDS):
                    last = await ask(server, self.upstream_port, query)
            except TimeoutError:
                failed.append(f"{server}: no answer")
                continue
            except (OSError, EOFError, dns.exception.DNSException) as e:
                failed.append(f"{server}: {e}")
                continue
            if last.rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
                return last
        if last is not None:
            return last
        raise NoAnswer("the host's resolvers failed: " + "; ".join(failed))


class _Datagrams(asyncio.DatagramProtocol):
    """One UDP socket of the forwarder."""

    def __init__(self, forwarder: Forwarder, family: int) -> None:
        self._forwarder = forwarder
        self._family = family
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Python 3.11's own datagram transport is no subclass of it, so a check would fail there.
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._forwarder.take_datagram(data, addr, self, self._family)

    def send(self, data: bytes, addr: tuple[str, int]) -> None:
        if self._transport is not None and data:
            self._transport.sendto(data, addr)


async def ask(server: str, port: int, query: Query) -> dns.message.Message:
    """One resolver's answer to a query made anew: over UDP, then over TCP if it was cut.

    Raises `OSError`, `EOFError` or a DNS exception. A random id and a fresh socket
    for each question; answers that do not fit the question are passed over.
    """
    number = secrets.randbelow(1 << 16)
    wire = upstream_question(query, number)
    family, name = _socket_name(server, port)
    loop = asyncio.get_running_loop()
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    with socket.socket(family, kind) as sock:
        sock.connect(name)
        await loop.sock_sendall(sock, wire)
        while True:
            answer = fitting(await loop.sock_recv(sock, 65535), query, number)
            if answer is not None:
                break
    if not answer.flags & dns.flags.TC:
        return answer
    return await _ask_tcp(family, name, query, wire)


async def _ask_tcp(
    family: int, name: tuple[str | int, ...], query: Query, wire: bytes
) -> dns.message.Message:
    loop = asyncio.get_running_loop()
    kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    sock = socket.socket(family, kind)
    try:
        await loop.sock_connect(sock, name)
        reader, writer = await asyncio.open_connection(sock=sock)
    except BaseException:
        sock.close()
        raise
    try:
        writer.write(_LENGTH.pack(len(wire)) + wire)
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        number = int.from_bytes(wire[:2], "big")
        answer = fitting(await reader.readexactly(length), query, number)
    finally:
        writer.close()
    if answer is None:
        raise ConnectionError("an answer to another question")
    return answer


def upstream_question(query: Query, number: int) -> bytes:
    """The query made anew: recursion wanted, one question, an empty OPT record, nothing else."""
    labels = query.text.encode("ascii").split(b".")
    name = b"".join(bytes((len(label),)) + label for label in labels) + b"\0"
    head = struct.pack("!6H", number, dns.flags.RD, 1, 0, 0, 1)
    question = name + struct.pack("!2H", query.type, dns.rdataclass.IN)
    return head + question + struct.pack("!B2HIH", 0, dns.rdatatype.OPT, UDP_PAYLOAD, 0, 0)


def fitting(wire: bytes, query: Query, number: int) -> dns.message.Message | None:
    """The parsed answer, if it is one to this question."""
    if wire[:2] != number.to_bytes(2, "big"):
        return None
    try:
        answer = dns.message.from_wire(wire, ignore_trailing=True)
    except (dns.exception.DNSException, ValueError, IndexError, struct.error):
        return None
    if not answer.flags & dns.flags.QR or answer.opcode() != dns.opcode.QUERY:
        return None
    asked = [(q.name, q.rdtype, q.rdclass) for q in answer.question]
    return answer if asked == [(query.name, query.type, dns.rdataclass.IN)] else None


def _socket_name(server: str, port: int) -> tuple[int, tuple[str | int, ...]]:
    address, _, scope = server.partition("%")
    if ":" not in address:
        return socket.AF_INET, (address, port)
    index = 0
    if scope:
        index = int(scope) if scope.isdecimal() else socket.if_nametoindex(scope)
    return socket.AF_INET6, (address, port, 0, index)


def _internet(records: Sequence[dns.rrset.RRset]) -> list[dns.rrset.RRset]:
    return [r for r in records if r.rdclass == dns.rdataclass.IN]


def _addresses(query: Query, addresses: Sequence[Address], ttl: int) -> dns.message.Message:
    answer = _answer(query.message, dns.rcode.NOERROR)
    if addresses:
        texts = [str(a) for a in addresses]
        answer.answer = [dns.rrset.from_text_list(query.name, ttl, "IN", query.type, texts)]
    return answer


def _refused(wire: bytes) -> bytes:
    return bare_failure(wire, dns.rcode.REFUSED) if len(wire) >= 12 else b""


def _run(who: Client | Stranger) -> str:
    return who.run if isinstance(who, Client) else ""


def _count_down(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]
