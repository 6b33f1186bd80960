"""Tokens, the obligation to inspect, and what goes over the channel."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import replace

import pytest

from aa.model import MalformedValue, Obligation
from aa.proxy.inspect.channel import Channel, ChannelClosed, channel_pair
from aa.proxy.inspect.handover import introduction
from aa.proxy.inspect.session import (
    SESSIONS_WAITING,
    TOKEN_SECONDS,
    Session,
    Waiting,
    Wanted,
    inspection,
    new_token,
)


def session(**changes: object) -> Session:
    made = Session(
        id="0011223344556677",
        secret="s3cret",
        run="r1",
        uid=1000,
        host="allowed.test",
        port=443,
        addresses=(ipaddress.ip_address("192.0.2.1"), ipaddress.ip_address("2001:db8::1")),
        protocol="tls",
        wanted=Wanted(),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_token_is_worth_its_session_once() -> None:
    waiting = Waiting(Clock())
    waiting.add(session())
    assert waiting.take("0011223344556677", "s3cret") == session()
    assert waiting.take("0011223344556677", "s3cret") is None


def test_a_wrong_secret_uses_the_token_up() -> None:
    waiting = Waiting(Clock())
    waiting.add(session())
    assert waiting.take("0011223344556677", "s3cret ") is None
    assert waiting.take("0011223344556677", "s3cret") is None


def test_a_token_that_comes_late_is_worth_nothing_and_is_forgotten() -> None:
    clock = Clock()
    waiting = Waiting(clock)
    waiting.add(session())
    clock.now += TOKEN_SECONDS
    assert waiting.take("0011223344556677", "s3cret") is None
    waiting.add(session(id="a"))
    clock.now += TOKEN_SECONDS
    waiting.add(session(id="b"))
    assert len(waiting) == 1


def test_tokens_that_wait_are_bounded() -> None:
    waiting = Waiting(Clock())
    for number in range(SESSIONS_WAITING):
        waiting.add(session(id=str(number)))
    with pytest.raises(ValueError, match="do not come"):
        waiting.add(session(id="one more"))


def test_tokens_differ_and_no_repr_shows_a_secret() -> None:
    (first, secret), (second, other) = new_token(), new_token()
    assert first != second and secret != other and len(secret) == 32
    assert "s3cret" not in repr(session())


def test_a_session_is_the_same_after_the_channel() -> None:
    wanted = Wanted(("x-a",), body=True, ws=True, limit=5, llm=True)
    for made in (session(wanted=wanted), session(host="", scope=3, single=True, protocol="http")):
        assert Session.from_json(json.loads(json.dumps(made.as_json()))) == made


@pytest.mark.parametrize(
    "changes", [{"addresses": []}, {"protocol": "opaque"}, {"colour": "blue"}, {"wanted": {"x": 1}}]
)
def test_a_session_that_makes_no_sense_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        Session.from_json({**session().as_json(), **changes})


@pytest.mark.parametrize(
    ("changes", "name", "target", "authority"),
    [
        ({}, "allowed.test", "allowed.test:443", "allowed.test"),
        ({"port": 8443}, "allowed.test", "allowed.test:8443", "allowed.test:8443"),
        ({"protocol": "http"}, "allowed.test", "allowed.test:443", "allowed.test:443"),
        ({"host": ""}, "192.0.2.1", "192.0.2.1:443", "192.0.2.1"),
        (
            {"host": "", "addresses": (ipaddress.ip_address("::2"),), "port": 1},
            "::2",
            "[::2]:1",
            "[::2]:1",
        ),
    ],
)
def test_a_session_has_one_name(
    changes: dict[str, object], name: str, target: str, authority: str
) -> None:
    made = session(**changes)
    assert (made.name, made.target, made.authority) == (name, target, authority)


def test_reads_the_obligation_to_inspect() -> None:
    parameters = {"headers": ["x-a"], "body": True, "ws": False, "limit": 9, "llm": True}
    assert inspection([Obligation("inspect", parameters)]) == Wanted(
        ("x-a",), body=True, ws=False, limit=9, llm=True
    )
    assert inspection([Obligation("inspect")]) == Wanted()
    assert inspection([]) is None


@pytest.mark.parametrize(
    "obligations",
    [
        [Obligation("redact")],
        [Obligation("inspect"), Obligation("redact")],
        [Obligation("inspect"), Obligation("inspect")],
        [Obligation("inspect", {"depth": 1})],
        [Obligation("inspect", {"headers": ["X-A"]})],
        [Obligation("inspect", {"headers": "x-a"})],
        [Obligation("inspect", {"headers": [1]})],
        [Obligation("inspect", {"headers": [""]})],
        [Obligation("inspect", {"body": "yes"})],
        [Obligation("inspect", {"llm": 1})],
        [Obligation("inspect", {"limit": 0})],
        [Obligation("inspect", {"limit": True})],
        [Obligation("inspect", {"limit": 1 << 40})],
    ],
)
def test_an_obligation_that_cannot_be_met_is_an_error(obligations: list[Obligation]) -> None:
    with pytest.raises(MalformedValue):
        inspection(obligations)


def test_introduces_a_connection_with_its_token_and_address() -> None:
    told = introduction(session())
    assert told == (
        b"\x05\x01\x02\x01\x100011223344556677\x06s3cret\x05\x01\x00\x01\xc0\x00\x02\x01\x01\xbb"
    )
    v6 = introduction(session(addresses=(ipaddress.ip_address("::2"),)))
    assert v6.endswith(b"\x05\x01\x00\x04" + bytes(15) + b"\x02\x01\xbb")


def test_messages_arrive_whole_and_in_order() -> None:
    ours, theirs = (Channel(sock) for sock in channel_pair())
    assert ours.send({"a": 1}) and ours.send({"b": "x" * 1000})
    assert list(theirs.receive()) == [{"a": 1}, {"b": "x" * 1000}]
    assert list(theirs.receive()) == []


def test_a_full_channel_says_so_and_an_ended_one_raises() -> None:
    ours, theirs = (Channel(sock) for sock in channel_pair())
    sent = 0
    while ours.send({"a": "x" * 1000}):
        sent += 1
    assert sum(1 for _ in theirs.receive()) <= sent
    theirs.close()
    with pytest.raises(ChannelClosed):
        ours.send({"a": 1})
    with pytest.raises(ChannelClosed):
        list(ours.receive())
