"""Policy files: a policy or problems with a line, and then the same answer with and without the index."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from aa.model import Action, Kind, Run
from aa.policy import loads
from aa.tomlfile import InvalidFile
from tests.fuzz.mutate import words

VECTORS = Path(__file__).parents[2] / "vectors" / "policy"

WORDS = (
    b"[policy]",
    b'id = "a"',
    b'mode = "observe"',
    b'applies_to = { agents = ["a*"] }',
    b'default = { network = "allow" }',
    b"[[rule]]",
    b'effect = "allow"',
    b'effect = "deny"',
    b'effect = "ask"',
    b'network = { hosts = ["*.a.example"], ports = [443] }',
    b'network = { cidrs = ["10.0.0.0/8"] }',
    b'paths = ["/v1/**"]',
    b'methods = ["GET"]',
    b'headers = { "x-a" = "b*" }',
    b'tool = { names = ["read*"], args = { a = { gt = 1 } } }',
    b'exec = { paths = ["/usr/bin/*"] }',
    b'file = { paths = ["~/x/**"], access = ["write"] }',
    b'dns = { names = ["a.example"] }',
    b'mcp = { server = "s", tool = "t" }',
    b'llm = { provider = "openai" }',
    b'when = { days = ["mon"], hours = "22:00-06:00", timezone = "Europe/Berlin" }',
    b"[[limit]]",
    b"[[secret]]",
    b"[sandbox]",
    b'writable = ["."]',
    b"nan",
    b"1979-05-27T07:32:00Z",
    b'"\\u0000"',
    b"'''",
    b'"""',
    b"\xef\xbb\xbf",
)
mutate = words(WORDS)

RUN = Run("r", "agent", "dev", 1000, home="/home/dev", directory="/home/dev/work")
ACTIONS = (
    Action(Kind.NET_CONNECT, "a.example:443", {"host": "a.example", "port": 443}),
    Action(
        Kind.NET_CONNECT,
        "a.example:443",
        {"host": "a.example", "port": 443, "addresses": ["10.0.0.1"], "protocol": "tls"},
    ),
    Action(Kind.DNS_QUERY, "a.example", {"qtype": "A"}),
    Action(Kind.TOOL_CALL, "read", {"args": {"a": 2, "b": {"c": "x"}}}),
    Action(Kind.FILE_OPEN, "/home/dev/work/x", {"access": "write"}),
    Action(Kind.EXEC, "/usr/bin/true", {}),
    Action(Kind.MCP_CALL, "s/t", {"server": "s", "method": "tools/call", "tool": "t"}),
    Action(Kind.LLM_REQUEST, "openai/x", {"provider": "openai", "model": "x"}),
    Action(
        Kind.HTTP_REQUEST,
        "a.example:443",
        {
            "host": "a.example",
            "port": 443,
            "protocol": "tls",
            "method": "GET",
            "path": "/v1/x",
            "headers": {"x-a": "b"},
            "http": "1.1",
        },
    ),
)


def seeds() -> Iterator[bytes]:
    for path in sorted(VECTORS.glob("*.toml")):
        for text in tomllib.loads(path.read_text()).get("files", {}).values():
            yield text.encode()
    for path in sorted((VECTORS.parents[2] / "etc").rglob("*.toml")):
        yield path.read_bytes()


def one(data: bytes) -> None:
    try:
        policy = loads({"p.toml": data})
    except InvalidFile as e:
        lines = data.count(b"\n") + 1
        assert e.problems
        assert all(1 <= p.line <= lines and p.message for p in e.problems), e.problems
        return
    policy.check()
    for action in ACTIONS:
        decision = policy.decide(RUN, action, now=1.7e9)
        assert policy.explain(RUN, action, now=1.7e9).decision == decision
        assert not re.search(r"[\x00-\x1f\x7f-\x9f]", decision.reason)
