"""Paths of requests: what is allowed is allowed however a server may read it.

`readings` is every reading of a path that servers in the wild are known to make. If one of them
lies outside of what the policy allows, or in what it denies, the request must not be allowed.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

from aa.model import Action, Effect, Kind, Run
from aa.policy import loads
from aa.policy.pathname import AmbiguousPath, normal_path, request_pattern
from aa.policy.pattern import InvalidPattern
from tests.fuzz.targets.decide import judge

POLICY = loads(
    {
        "p.toml": """
[policy]
id = "p"

[[rule]]
id = "allowed"
effect = "allow"
network = { hosts = ["a.example"], paths = ["/v1/**"] }

[[rule]]
id = "denied"
effect = "deny"
network = { hosts = ["a.example"], paths = ["/v1/admin/**", "/v1/*/secret"] }
"""
    }
)
RUN = Run("r", "agent", "dev", 1000)

WORDS = (
    b"/v1/", b"admin", b"secret", b"/../", b"/./", b"//", b"%2e", b"%2f", b"%5c", b"%252e", b"%00",
    b"\\", b";x=y", b"%61", b"%c0%ae", b"?", b"#", b"%ef%bc%8f", b"+", b"%E2%80%8B", b"..;/",
)  # fmt: skip


def seeds() -> Iterator[bytes]:
    for path in (
        "/v1/a", "/v1/admin", "/v1/admin/x", "/v1/a/secret", "/v1/%61dmin", "/v1/a/../admin",
        "/v1//admin", "/v1/./admin", "/v1/%2e%2e/x", "/v1/a%2fsecret", "/v1/;/admin", "/v1/a\\secret",
        "/v1/%C3%BC", "/", "/v2/x", "/v1/admin/", "/v1/a/secret/", "*", "", "/v1/%252e%252e/x",
    ):  # fmt: skip
        yield path.encode()


def one(data: bytes) -> None:
    raw = data[:4096].decode("latin-1")
    try:
        normal = normal_path(raw)
    except AmbiguousPath as e:
        assert str(e)
        normal = ""
    else:
        assert normal.startswith("/")
    _pattern(raw)
    attributes = {"host": "a.example", "port": 443, "protocol": "tls", "method": "GET"}
    action = Action(Kind.HTTP_REQUEST, "a.example:443", {**attributes, "path": raw})
    decision = judge(POLICY, RUN, action)
    if decision.effect is Effect.ALLOW:
        assert normal, raw
        for reading in readings(raw.encode("latin-1")):
            assert permitted(reading), (raw, reading)


def permitted(path: bytes) -> bool:
    """What the two rules mean for a path that a server has understood."""
    parts = path.split(b"/")[1:]
    if parts[:1] != [b"v1"]:
        return False
    if len(parts) == 1:  # /v1/ is below /v1 as rules mean it, whatever a server makes of it
        return True
    return parts[1] != b"admin" and not (len(parts) == 3 and parts[2] == b"secret")


def readings(raw: bytes) -> set[bytes]:
    """A path in the ways that servers read it."""
    found = {raw}
    for _ in range(4):
        more = set()
        for path in found:
            more.add(unquote_to_bytes(path))
            more.add(path.replace(b"\\", b"/"))
            more.add(path.split(b"\0")[0])
            more.add(path.split(b"#")[0].split(b"?")[0])
            more.add(b"/".join(part.split(b";")[0] for part in path.split(b"/")))
            if path.startswith(b"/"):
                clean = posixpath.normpath(path)
                more.add(b"/" + clean.lstrip(b"/"))
        found |= more
        if len(found) > 64:
            break
    return {path for path in found if path}


def _pattern(text: str) -> None:
    try:
        pattern = request_pattern(text, whole=False)
    except InvalidPattern as e:
        assert str(e)
        return
    assert pattern.covers(pattern)
    pattern.matches(("v1", "a", "secret"))
