"""Bad input as hypothesis makes it up, for what matters most: calls, paths, requests, and values of any size."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aa.model import Action, Effect, Kind, Run
from aa.policy import loads
from aa.tomlfile import InvalidFile
from aa.varlink import Peer, Service
from aa.varlink.codec import MAX_DEPTH, MAX_MESSAGE, encode
from tests.fuzz import calls
from tests.fuzz.mutate import ODD_VALUES
from tests.fuzz.targets import decide, exchange, paths

RUN = Run("r", "agent", "dev", 1000, home="/home/dev", directory="/home/dev/work")
PEER = Peer(os.getpid(), os.getuid(), os.getgid(), "user.slice")

segments = st.sampled_from(
    "v1 admin secret a .. . %2e%2e %2E a%2fsecret a%5csecret a\\secret ;x admin;x %61dmin %00 a%00".split()
    + ["", "%252e%252e", "admin%20", "%ef%bc%8f", "ADMIN", "secret%2f", "*", "**", "v1/admin", "~"]
)


@settings(max_examples=400)
@given(st.lists(segments, min_size=1, max_size=6), st.sampled_from(["", "/", "?x", "#x"]))
def test_a_path_that_is_allowed_is_allowed_however_a_server_reads_it(
    parts: list[str], end: str
) -> None:
    paths.one(("/" + "/".join(parts) + end).encode())


pieces = st.sampled_from(
    [
        b"3\r\nabc\r\n", b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"3;a=b\r\nabc\r\n", b"GET /2 HTTP/1.1\r\n",
        b"Host: b.test\r\n\r\n", b"\r\n", b"\n", b"abc", b"ffff\r\n", b"-1\r\n", b"0x3\r\n", b"\0",
    ]
)  # fmt: skip
framings = st.sampled_from(
    [b"", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 0\r\n"]
)


@settings(max_examples=100)
@given(framings, st.lists(pieces, max_size=6), st.integers(0, 255))
def test_an_origin_gets_one_request_and_nothing_behind_it(
    framing: bytes, parts: list[bytes], early: int
) -> None:
    head = b"POST / HTTP/1.1\r\nHost: a.test\r\n" + framing + b"\r\n"
    exchange.one(bytes((early,)) + head + b"".join(parts))


odd = st.sampled_from(ODD_VALUES)
called = st.one_of(
    odd,
    st.dictionaries(st.sampled_from(["method", "parameters", "more", "oneway", "x"]), odd),
    st.fixed_dictionaries(
        {
            "method": st.sampled_from(
                [
                    "org.varlink.service.GetInfo",
                    "org.varlink.service.GetInterfaceDescription",
                    "x",
                    ".",
                ]
            ),
            "parameters": st.dictionaries(st.sampled_from(["interface", "y"]), odd),
            "more": odd,
        }
    ),
)


@settings(max_examples=150)
@given(st.lists(called, max_size=6), st.binary(max_size=60))
def test_whatever_is_called_the_service_answers_the_next_one(made: list[Any], rest: bytes) -> None:
    service = calls.checked(Service("test", "0"))
    asyncio.run(calls.exchange(service, PEER, [*calls.messages(made), rest]))


@pytest.mark.parametrize(
    "message",
    [
        b"x" * (MAX_MESSAGE + 2),
        b'{"method":"' + b"x" * (MAX_MESSAGE // 2) + b'"}\0',
        b'{"method":"x","parameters":' + b"[" * MAX_DEPTH * 2 + b"]" * MAX_DEPTH * 2 + b"}\0",
        b'{"method":"\\ud800"}\0',
        '{"method":"größe"}\0'.encode("utf-16"),
        b"\0" * 5000,
    ],
    ids=["endless", "huge text", "deep", "half a pair", "UTF-16", "nothing, many times"],
)
def test_a_hostile_message_ends_its_own_connection_at_most(message: bytes) -> None:
    service = calls.checked(Service("test", "0"))
    asyncio.run(calls.exchange(service, PEER, [message]))


def policy_of(count: int) -> str:
    rules = (
        f'[[rule]]\nid = "r{n}"\neffect = "{("allow", "deny")[n % 2]}"\n'
        f'network = {{ hosts = ["h{n}.example"], paths = ["/p{n}/**"] }}\n'
        for n in range(count)
    )
    return '[policy]\nid = "p"\n' + "".join(rules)


def test_ten_thousand_rules_are_a_policy_and_too_many_are_an_error() -> None:
    policy = loads({"p.toml": policy_of(10_000)})
    for number in (0, 1, 9_998, 9_999):
        attributes = {"protocol": "tls", "method": "GET", "path": f"/p{number}/x"}
        action = Action(Kind.HTTP_REQUEST, f"h{number}.example:443", attributes)
        decision = policy.decide(RUN, action, now=0.0)
        assert decision.effect is (Effect.DENY if number % 2 else Effect.ALLOW)
    with pytest.raises(InvalidFile):
        loads({"p.toml": policy_of(20_001)})


@pytest.mark.parametrize("kind", [k for k in Kind], ids=str)
def test_arguments_of_any_size_and_depth_get_an_answer(kind: Kind) -> None:
    deep: Any = "x"
    for _ in range(MAX_DEPTH - 8):
        deep = {"a": [deep]} if len(str(deep)) % 2 else [deep]
    for value in (deep, "x" * 500_000, ["x"] * 50_000, {str(n): n for n in range(10_000)}):
        for name in ("args", "host", "path", "headers", "body", "addresses", "access", "to"):
            action = Action(kind, "a.example:443", {"port": 443, "protocol": "tls", name: value})
            for policy in decide.POLICIES:
                answer = policy.decide(RUN, action, now=0.0)
                assert len(encode(answer.as_json())) < 10_000
