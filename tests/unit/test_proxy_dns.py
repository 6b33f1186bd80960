"""The DNS forwarder without a network: what is a query, what an answer looks like, and its limits."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import dns.rdataclass
import pytest
from dns.edns import EDECode
from hypothesis import given
from hypothesis import strategies as st

from aa.model import Action, Decision, Effect, Report
from aa.proxy import dns as forwarder
from aa.proxy import placeholder
from aa.proxy.ask import Refusals
from aa.proxy.dns import (
    Forwarder,
    Query,
    Rejected,
    failure,
    fitting,
    parse_query,
    to_wire,
    upstream_question,
)
from aa.proxy.hostdns import HostNames, Nameservers
from aa.proxy.identify import Client, Stranger
from aa.proxy.placeholder import NAMES_PER_RUN, RUNS_LIMIT, Placeholders
from aa.proxy.placeholder import NETWORK as PLACEHOLDERS


def wire(name: str = "abc.test", kind: str = "A", **more: Any) -> bytes:
    return bytes(dns.message.make_query(name, kind, **more).to_wire())


def test_a_query_has_one_canonical_name() -> None:
    query = parse_query(wire("AbC.TEST."))
    assert query.text == "abc.test"
    assert str(query.name) == "AbC.TEST."


def test_takes_names_with_underscores() -> None:
    assert parse_query(wire("_dmarc.example.org", "TXT")).text == "_dmarc.example.org"


def test_takes_reverse_names() -> None:
    assert parse_query(wire("7.2.0.192.in-addr.arpa", "PTR")).text == "7.2.0.192.in-addr.arpa"


@pytest.mark.parametrize(
    "name", ["127.1", "1.2.3.4", "0x7f.1", "a\\.b.org", "a\\000b.org", "a\\032b.org", "*.org", "."]
)
def test_refuses_names_that_cannot_be_decided(name: str) -> None:
    with pytest.raises(Rejected) as refused:
        parse_query(wire(name))
    assert refused.value.rcode == dns.rcode.REFUSED


def test_an_answer_gets_no_answer() -> None:
    answer = dns.message.make_response(dns.message.from_wire(wire()))
    with pytest.raises(Rejected) as refused:
        parse_query(answer.to_wire())
    assert refused.value.rcode is None


def test_another_version_of_edns_is_refused() -> None:
    query = dns.message.make_query("abc.test", "A", use_edns=0)
    query.ednsflags |= 1 << 16
    with pytest.raises(Rejected) as refused:
        parse_query(query.to_wire())
    assert refused.value.rcode == dns.rcode.FORMERR


def test_a_query_over_the_limit_is_refused() -> None:
    padded = wire(use_edns=0, options=[dns.edns.GenericOption(12, bytes(5000))], payload=9000)
    with pytest.raises(Rejected) as refused:
        parse_query(padded)
    assert refused.value.rcode == dns.rcode.FORMERR


@given(st.binary(max_size=100))
def test_no_packet_breaks_the_parser(data: bytes) -> None:
    try:
        parse_query(data)
    except Rejected:
        pass


@given(st.integers(0, 28), st.integers(1, 255))
def test_no_changed_byte_breaks_the_parser(at: int, change: int) -> None:
    data = bytearray(wire(use_edns=0))
    data[at] ^= change
    try:
        assert parse_query(bytes(data)).text
    except Rejected:
        pass


def test_a_long_reason_is_cut_so_that_a_refusal_stays_small() -> None:
    query = dns.message.from_wire(wire(use_edns=0))
    answer = failure(query, dns.rcode.REFUSED, EDECode.PROHIBITED, "ü" * 5000)
    assert len(to_wire(answer, query, udp=True)) < 512


def test_an_answer_that_does_not_fit_is_cut_and_says_so() -> None:
    query = dns.message.from_wire(wire())
    answer = dns.message.make_response(query)
    answer.answer = [
        dns.rrset.from_text_list("abc.test.", 1, "IN", "A", [f"192.0.2.{i}" for i in range(100)])
    ]
    cut = dns.message.from_wire(to_wire(answer, query, udp=True))
    assert cut.flags & dns.flags.TC and not cut.answer
    assert len(dns.message.from_wire(to_wire(answer, query, udp=False)).answer[0]) == 100


# -- the question that goes on, and its answer


@pytest.mark.parametrize(("name", "kind"), [("ABC.Test", "A"), ("_x._tcp.a.test", "SRV")])
def test_the_question_that_goes_on_has_the_name_and_the_type_and_nothing_else(
    name: str, kind: str
) -> None:
    options = [dns.edns.GenericOption(65001, b"hidden")]
    query = parse_query(wire(name, kind, use_edns=0, options=options, want_dnssec=True))
    question = upstream_question(query, 0xBEEF)
    expected = dns.message.make_query(name.lower(), kind, use_edns=0, payload=1232, id=0xBEEF)
    assert question == expected.to_wire()


def answered(query: Query, **changes: Any) -> bytes:
    reply = dns.message.make_response(dns.message.from_wire(upstream_question(query, 7)))
    for name, value in changes.items():
        setattr(reply, name, value)
    return bytes(reply.to_wire())


def test_an_answer_to_the_question_fits() -> None:
    query = parse_query(wire("ABC.Test"))
    assert fitting(answered(query), query, 7) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"id": 8},
        {"flags": 0},
        {"flags": dns.flags.QR | 0x2000},
        {"question": []},
        {"question": [dns.rrset.from_text("abc.test.", 0, "IN", "AAAA")]},
        {"question": [dns.rrset.from_text("evil.org.", 0, "IN", "A")]},
        {"question": [dns.rrset.from_text("abc.test.", 0, "CH", "A")]},
    ],
)
def test_an_answer_to_anything_else_is_passed_over(changes: dict[str, Any]) -> None:
    query = parse_query(wire())
    assert fitting(answered(query, **changes), query, 7) is None


@given(st.binary(max_size=80))
def test_no_answer_breaks_the_reader(data: bytes) -> None:
    fitting(b"\0\7" + data, parse_query(wire()), 7)


# -- with a gateway


class Brain:
    """Answers every question after `seconds`."""

    def __init__(self, effect: Effect = Effect.ALLOW, seconds: float = 0.0) -> None:
        self.asked: list[tuple[str, Action]] = []
        self._effect = effect
        self._seconds = seconds

    async def decide(self, run: str, action: Action, *, provisional: bool = False) -> Decision:
        self.asked.append((run, action))
        await asyncio.sleep(self._seconds)
        return Decision(self._effect, "the test says so", "test/rule", "rev")


CLIENT = Client("run1", 1000)


def serve(
    tmp_path: Path, brain: Brain, act: Callable[[Forwarder], Awaitable[Any]]
) -> tuple[Any, list[Report]]:
    """Runs `act` with a forwarder that knows abc.test from a hosts file and has no resolver."""
    (tmp_path / "hosts").write_text("192.0.2.1 abc.test\n2001:db8::1 abc.test\n")
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    reports: list[Report] = []

    async def main() -> Any:
        forwarder_ = Forwarder(
            gateway=brain,  # type: ignore[arg-type]
            identify=None,  # type: ignore[arg-type]
            refusals=Refusals(reports.append),
            names=HostNames(tmp_path / "hosts"),
            nameservers=Nameservers(tmp_path / "resolv.conf"),
            upstream_port=1,
        )
        result = await act(forwarder_)
        forwarder_.refusals.flush()
        return result

    return asyncio.run(main()), reports


def rcode(answer: bytes) -> str:
    return dns.rcode.to_text(dns.message.from_wire(answer).rcode())


def test_answers_from_the_hosts_file_and_remembers_the_name(tmp_path: Path) -> None:
    async def act(f: Forwarder) -> Any:
        answer = await f.answer(wire(), CLIENT, udp=True)
        (record,) = dns.message.from_wire(answer).answer
        return [str(r) for r in record], f.answered.name_of("run1", ip_address("192.0.2.1"))

    result, _ = serve(tmp_path, Brain(), act)
    assert result == (["192.0.2.1"], "abc.test")


def test_a_denied_name_is_not_answered_from_the_hosts_file(tmp_path: Path) -> None:
    result, reports = serve(
        tmp_path, Brain(Effect.DENY), lambda f: f.answer(wire(), CLIENT, udp=True)
    )
    assert rcode(result) == "REFUSED" and reports == []


def test_a_name_that_a_person_is_asked_about_gets_a_placeholder_and_nobody_is_asked_for_it(
    tmp_path: Path,
) -> None:
    async def act(f: Forwarder) -> Any:
        answers = [await f.answer(wire("ask.test", k), CLIENT, udp=True) for k in ("A", "AAAA")]
        (record,) = dns.message.from_wire(answers[0]).answer
        address = ip_address(str(record[0]))
        of_others = f.placeholders.name_of("run2", address)
        return address, f.placeholders.name_of("run1", address), of_others, answers[1]

    (address, name, of_others, v6), reports = serve(tmp_path, Brain(Effect.ASK), act)
    assert address in PLACEHOLDERS and (name, of_others) == ("ask.test", None)
    assert rcode(v6) == "NOERROR" and not dns.message.from_wire(v6).answer
    assert reports == []


def test_placeholders_stay_the_same_are_bounded_and_never_stand_for_two_names() -> None:
    placeholders = Placeholders()
    first = placeholders.give("r", "a.test")
    assert placeholders.give("r", "a.test") == first
    given = {placeholders.give("r", f"n{n}.test"): f"n{n}.test" for n in range(3 * NAMES_PER_RUN)}
    assert placeholders.name_of("r", first) is None
    kept = [a for a in given if placeholders.name_of("r", a) is not None]
    assert len(kept) == NAMES_PER_RUN and len(given) == 3 * NAMES_PER_RUN
    assert all(placeholders.name_of("r", a) == given[a] and a in PLACEHOLDERS for a in kept)
    for n in range(RUNS_LIMIT):
        placeholders.give(f"r{n}", "a.test")
    assert placeholders.name_of("r", kept[-1]) is None


def test_addresses_begin_again_when_all_were_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placeholder, "NAMES_PER_RUN", 4)
    monkeypatch.setattr(placeholder, "_COUNT", 6)
    placeholders = Placeholders()
    given = [placeholders.give("r", f"n{n}.test") for n in range(9)]
    assert given[:3] == given[6:]
    names = [placeholders.name_of("r", a) for a in given[5:]]
    assert names == ["n5.test", "n6.test", "n7.test", "n8.test"]


def test_a_stranger_is_refused_without_asking(tmp_path: Path) -> None:
    brain = Brain()
    result, reports = serve(
        tmp_path, brain, lambda f: f.answer(wire(), Stranger("nobody"), udp=True)
    )
    assert rcode(result) == "REFUSED" and brain.asked == []
    assert [r.rule for r in reports] == ["<unknown-run>"]


def test_a_resolver_that_is_not_there_is_a_servfail(tmp_path: Path) -> None:
    result, _ = serve(tmp_path, Brain(), lambda f: f.answer(wire("a.org"), CLIENT, udp=True))
    assert rcode(result) == "SERVFAIL"


def test_no_answer_carries_the_keys_of_encrypted_hellos_whatever_was_asked(tmp_path: Path) -> None:
    async def act(f: Forwarder) -> Any:
        async def resolver(query: Query) -> dns.message.Message:
            reply = dns.message.make_response(dns.message.from_wire(upstream_question(query, 7)))
            for kind, text in (
                ("A", "192.0.2.9"),
                ("HTTPS", '1 . ech="AEX+DQBB"'),
                ("SVCB", "1 ."),
            ):
                reply.answer.append(dns.rrset.from_text("a.org.", 60, "IN", kind, text))
            soa = dns.rrset.from_text("org.", 60, "IN", "SOA", "a. b. 1 2 3 4 5")
            soa.rdclass = dns.rdataclass.CH  # no class of ours
            reply.authority.append(soa)
            return reply

        f._ask_host = resolver  # type: ignore[method-assign]
        return await f.answer(wire("a.org"), CLIENT, udp=True)

    answer, _ = serve(tmp_path, Brain(), act)
    assert [str(r) for rrset in dns.message.from_wire(answer).answer for r in rrset] == [
        "192.0.2.9"
    ]


def test_a_run_that_floods_is_refused_counted_and_others_are_not(tmp_path: Path) -> None:
    burst = int(2 * forwarder.QUERIES_PER_SECOND)

    async def act(f: Forwarder) -> Any:
        codes = [rcode(await f.answer(wire(), CLIENT, udp=True)) for _ in range(2 * burst)]
        other = rcode(await f.answer(wire(), Client("run2", 1000), udp=True))
        return codes, other

    (codes, other), reports = serve(tmp_path, Brain(), act)
    assert codes[:burst] == ["NOERROR"] * burst
    assert "REFUSED" in codes[burst:]
    assert other == "NOERROR"
    assert {r.rule for r in reports} == {"<limit:dns_queries_per_second>"}
    assert sum(r.count for r in reports) == codes.count("REFUSED")


def test_a_run_with_too_many_queries_in_flight_is_refused(tmp_path: Path) -> None:
    most = forwarder.IN_FLIGHT_PER_RUN

    async def act(f: Forwarder) -> Any:
        return await asyncio.gather(*(f.answer(wire(), CLIENT, udp=True) for _ in range(most + 5)))

    answers, reports = serve(tmp_path, Brain(seconds=0.2), act)
    codes = [rcode(a) for a in answers]
    assert codes.count("NOERROR") == most and codes.count("REFUSED") == 5
    assert {r.rule for r in reports} == {"<limit:dns_in_flight_per_run>"}


def test_what_could_not_be_parsed_gets_its_own_id_back(tmp_path: Path) -> None:
    packet = struct.pack("!6H", 0xBEEF, 0x0100, 2, 0, 0, 0)
    answer, reports = serve(tmp_path, Brain(), lambda f: f.answer(packet, CLIENT, udp=True))
    assert answer[:2] == b"\xbe\xef" and answer[3] & 15 == dns.rcode.FORMERR
    assert [r.rule for r in reports] == ["<malformed-dns>"]
