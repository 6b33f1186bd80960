"""DNS packets from a run and from the host's resolvers: an answer that fits, or none."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dns.edns
import dns.flags
import dns.message
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from aa.model import Action, Decision, Effect
from aa.policy.host import canonical_host
from aa.proxy.ask import Refusals
from aa.proxy.dns import (
    HIDDEN_TYPES,
    PLAIN_PAYLOAD,
    UDP_PAYLOAD,
    Forwarder,
    NoAnswer,
    Query,
    Rejected,
    fitting,
    parse_query,
    upstream_question,
)
from aa.proxy.hostdns import HostNames
from aa.proxy.identify import Client

WORDS = (
    b"\x03abc\x04test\x00", b"\xc0\x0c", b"\x00\x01\x00\x01", b"\x00\x1c\x00\x01", b"\x00\x41\x00\x01",
    b"\x00\x00\x29\x04\xd0\x00\x00\x00\x00\x00\x00", b"\x00\xfa\x00\xff", b"\x00\x05\x00\x01",
    b"\x00\x2e\x00\x01", b"\x00\x00\x0e\x10\x00\x04",
)  # fmt: skip
NUMBER = 7
LOOP = asyncio.new_event_loop()


class Brain:
    """Answers by what the first byte of the input says."""

    effect = Effect.ALLOW

    async def decide(self, run: str, action: Action, *, provisional: bool = False) -> Decision:
        return Decision(self.effect, "the test says so\n", "test/rule", "rev")


class Upstream(Forwarder):
    """The host's resolver answers with bytes of the input."""

    reply = b""

    async def _ask_host(self, query: Query) -> dns.message.Message:
        answer = fitting(self.reply, query, NUMBER)
        if answer is None:
            raise NoAnswer("nobody")
        return answer


async def _forwarder() -> Upstream:
    nothing: Any = None
    refusals = Refusals(lambda report: None)
    return Upstream(Brain(), nothing, refusals, names=HostNames(Path("/dev/null")))  # type: ignore[arg-type]


def wire(name: str = "abc.test", kind: str = "A", **more: Any) -> bytes:
    return bytes(dns.message.make_query(name, kind, **more).to_wire())


def _split(query: bytes, reply: bytes) -> bytes:
    return len(query).to_bytes(2, "big") + query + reply


def seeds() -> Iterator[bytes]:
    options = [dns.edns.GenericOption(65001, b"x")]
    for kind, texts in (
        ("A", ["192.0.2.1", "192.0.2.2"]),
        ("AAAA", ["2001:db8::1"]),
        ("TXT", ['"hello" "world"']),
        ("MX", ["10 mail.abc.test."]),
        ("SRV", ["1 2 443 h.abc.test."]),
        ("HTTPS", ['1 . alpn="h2" ech="AEX+DQBB"']),
        ("CNAME", ["other.test."]),
    ):
        for how, more in ((0, {}), (4, {"use_edns": 0, "options": options})):
            query = wire(kind=kind, **more)
            asked = dns.message.from_wire(upstream_question(parse_query(query), NUMBER))
            reply = dns.message.make_response(asked)
            reply.answer = [dns.rrset.from_text_list("abc.test.", 60, "IN", kind, texts)]
            https = dns.rrset.from_text_list("abc.test.", 60, "IN", "HTTPS", ["1 ."])
            reply.authority = [
                dns.rrset.from_text("test.", 9, "IN", "SOA", "a.test. b.test. 1 2 3 4 5")
            ]
            if kind == "A":
                reply.answer.append(https)
            yield bytes([how]) + _split(query, bytes(reply.to_wire()))
    yield b"\x01" + _split(wire("a.example", "A", use_edns=0), b"")
    yield b"\x02" + _split(wire("a.example"), b"")


def one(data: bytes) -> None:
    if len(data) < 3:
        return
    size = int.from_bytes(data[1:3], "big")
    query, reply = data[3 : 3 + size], data[3 + size :]
    _query(query)
    LOOP.run_until_complete(_served(data[0], query, reply))


def _query(packet: bytes) -> None:
    try:
        query = parse_query(packet)
    except Rejected:
        return
    assert canonical_host(query.text).text == query.text
    # What goes on depends on the name and the type alone.
    sent = upstream_question(query, NUMBER)
    plain = parse_query(wire(query.text, dns.rdatatype.to_text(query.type)))
    assert sent == upstream_question(plain, NUMBER)
    asked = dns.message.from_wire(sent).question[0]
    assert asked.name.to_text(omit_final_dot=True).lower() == query.text
    assert asked.rdtype == query.type


async def _served(how: int, packet: bytes, reply: bytes) -> None:
    forwarder = await _forwarder()
    forwarder.reply = reply
    Brain.effect = (Effect.ALLOW, Effect.ASK, Effect.DENY)[how & 3 if how & 3 < 3 else 0]
    udp = bool(how & 4)
    answer = await forwarder.answer(packet, Client("run", 1000), udp=udp)
    if answer is None:
        return
    assert len(answer) <= (max(UDP_PAYLOAD, PLAIN_PAYLOAD) if udp else 65535)
    assert answer[:2] == packet[:2] and answer[2] & 0x80
    if len(answer) == 12:
        return
    read = dns.message.from_wire(answer)
    for rrset in (*read.answer, *read.authority, *read.additional):
        assert rrset.rdtype not in HIDDEN_TYPES and rrset.rdclass == dns.rdataclass.IN
    if Brain.effect is Effect.DENY:
        assert not read.answer
