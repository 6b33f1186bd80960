"""The examples of docs/policy.md and docs/configuration.md load, and do what the text says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from aa import config
from aa.model import DECIDED, Action, Effect, Kind, Layer, Run
from aa.policy import Policy, loads
from aa.policy.approve import Approve
from aa.policy.content import DETECTORS
from aa.policy.rules import Section
from aa.tomlfile import parse, schema, validate

DOCS = Path(__file__).parents[2] / "docs"


def examples(name: str) -> list[str]:
    return re.findall(r"^```toml\n(.*?)^```", (DOCS / name).read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def policies() -> Mapping[str, Policy]:
    """Each example of the page by itself, by the id of its policy."""
    loaded = [loads({"example.toml": text}) for text in examples("policy.md")]
    return {p.files[0].id: p for p in loaded}


CODEX = Run("r", "codex", "dev", 1000, tags=("team:platform",), home="/home/dev", directory="/w")
MONDAY_NOON = 1767610800.0  # 2026-01-05T12:00:00+01:00


def effect(policy: Policy, action: Action, now: float = MONDAY_NOON) -> Effect:
    return policy.decide(CODEX, action, now=now).effect


def request(host: str, method: str, path: str, **more: object) -> Action:
    told = {"protocol": "tls", "method": method, "path": path, "headers": {}, **more}
    return Action(Kind.HTTP_REQUEST, f"{host}:443", told)


def test_every_example_of_the_policy_page_loads(policies: Mapping[str, Policy]) -> None:
    assert list(policies) == ["coding", "requests", "machine", "payments", "assistants", "budgets"]


def test_connections_of_the_first_example(policies: Mapping[str, Policy]) -> None:
    coding = policies["coding"]
    database = {"host": "db.test.internal", "port": 5432, "protocol": "opaque"}
    cases = {
        ("api.anthropic.com:443", None): Effect.ALLOW,
        ("api.anthropic.com:80", None): Effect.DENY,
        ("www.debian.org:80", None): Effect.ALLOW,
        ("debian.org:80", None): Effect.DENY,
        ("x.paste.example:443", None): Effect.DENY,
        ("db.test.internal:5432", "10.20.0.1"): Effect.ALLOW,
        ("db.test.internal:5432", "10.21.0.1"): Effect.DENY,
    }
    for (target, address), expected in cases.items():
        attributes = {**database, "addresses": [address]} if address else {}
        assert effect(coding, Action(Kind.NET_CONNECT, target, attributes)) is expected, target


def test_what_the_first_example_has_inspected(policies: Mapping[str, Policy]) -> None:
    coding = policies["coding"]
    for host, inspected in (
        ("api.anthropic.com", True),
        ("github.com", True),
        ("www.debian.org", False),
    ):
        action = Action(Kind.NET_CONNECT, f"{host}:443", {"protocol": "tls"})
        owed = coding.decide(CODEX, action, now=0).obligations
        assert [o.name for o in owed] == (["inspect"] if inspected else []), host
    assert effect(coding, request("api.anthropic.com", "POST", "/v1/messages")) is Effect.ALLOW
    assert effect(coding, request("api.anthropic.com", "GET", "/v1/messages")) is Effect.DENY
    found = {"secrets": ["jwt"], "texts": [], "bytes": 9}
    assert effect(coding, request("github.com", "POST", "/x", body=found)) is Effect.DENY
    told = [f.message for f in coding.check() if f.key == "coding/no-secrets-out"]
    assert told == ["does not see what these let through without inspection: coding/debian"]


def test_tools_files_and_programs_of_the_first_example(policies: Mapping[str, Policy]) -> None:
    coding = policies["coding"]
    small, big = ({"args": {"amount": amount}} for amount in (1000, 1001))
    assert effect(coding, Action(Kind.TOOL_CALL, "transfer_x", small)) is Effect.ALLOW
    assert effect(coding, Action(Kind.TOOL_CALL, "transfer_x", big)) is Effect.ASK
    deploy = Action(Kind.TOOL_CALL, "deploy_web")
    assert effect(coding, deploy) is Effect.ASK
    assert effect(coding, deploy, MONDAY_NOON + 12 * 3600) is Effect.DENY
    key = Action(Kind.FILE_OPEN, "/home/dev/.ssh/id_ed25519", {"access": "read"})
    assert effect(coding, key) is Effect.DENY
    assert effect(coding, Action(Kind.FILE_OPEN, "/w/.git/hooks/pre-commit")) is Effect.DENY
    assert effect(coding, Action(Kind.FILE_OPEN, "/w/src/main.py")) is Effect.ALLOW
    assert effect(coding, Action(Kind.EXEC, "/usr/bin/sudo")) is Effect.DENY
    assert coding.writable(CODEX) == (".", "~/.cache")
    (rule,) = [r for r in coding.rules if r.id == "big-transfers"]
    assert rule.approve == Approve(("group:aa-operators",), 600.0, "run")


def test_requests_of_the_page_are_decided_as_it_says(policies: Mapping[str, Policy]) -> None:
    requests = policies["requests"]
    version = {"headers": {"x-github-api-version": "2022-11-28"}}
    cases = [
        (request("api.github.com", "GET", "/repos/a/b/issues/7", **version), Effect.ALLOW),
        (request("api.github.com", "GET", "/repos/a/b/issues"), Effect.DENY),
        (request("api.github.com", "GET", "/repos/a/b/pulls", **version), Effect.DENY),
        (request("api.github.com", "POST", "/repos/a/b/releases"), Effect.ASK),
        (request("api.github.com", "GET", "/admin"), Effect.DENY),
        (request("api.github.com", "GET", "/repos/a/../b/issues", **version), Effect.DENY),
        (request("chat.example", "GET", "/"), Effect.ALLOW),
    ]
    for action, expected in cases:
        assert effect(requests, action) is expected, action
    drop = {"direction": "out", "secrets": [], "texts": ["*DROP TABLE*"], "bytes": 20}
    assert effect(requests, request("chat.example", "GET", "/", ws=drop)) is Effect.DENY
    first = request("api.github.com", "GET", "/repos/a/b/issues", **version)
    look, inject = requests.decide(CODEX, first, now=0).obligations
    assert (look.parameters["limit"], inject.parameters["id"]) == (4 << 20, "requests/github")


def test_the_machine_of_the_page_is_kept_as_it_says(policies: Mapping[str, Policy]) -> None:
    machine = policies["machine"]
    read = Action(Kind.FILE_OPEN, "/home/dev/.bashrc", {"access": "read"})
    assert effect(machine, read) is Effect.ALLOW
    assert effect(machine, Action(Kind.FILE_UNLINK, "/home/dev/.bashrc")) is Effect.DENY
    assert effect(machine, Action(Kind.EXEC, "/tmp/a/b/bin/x")) is Effect.DENY
    assert effect(machine, Action(Kind.FILE_OPEN, "/w/.envrc")) is Effect.DENY
    box = machine.sandbox(CODEX)
    assert (box.user_namespaces, box.memory, box.tasks) == (False, 8 << 30, 2000)


def test_payments_of_the_page_are_decided_as_it_says(policies: Mapping[str, Policy]) -> None:
    good = {"amount": 50, "to": {"country": "DE"}}
    for args, expected in (
        (good, Effect.ALLOW),
        ({**good, "amount": 51}, Effect.DENY),
        ({**good, "amount": "50"}, Effect.DENY),
        ({"amount": 50}, Effect.DENY),
        ({**good, "force": 0}, Effect.DENY),
    ):
        action = Action(Kind.TOOL_CALL, "pay", {"args": args})
        assert effect(policies["payments"], action) is expected, args


def test_assistants_of_the_page_are_decided_as_it_says(policies: Mapping[str, Policy]) -> None:
    assistants = policies["assistants"]
    cases = [
        (Action(Kind.MCP_CALL, "github/get_issue"), Effect.ALLOW),
        (Action(Kind.MCP_CALL, "github/delete_repo"), Effect.DENY),
        (Action(Kind.MCP_CALL, "other", {"method": "tools/list"}), Effect.ALLOW),
        (Action(Kind.MCP_CALL, "db-1/query", {"args": {"limit": 5000}}), Effect.ASK),
        (Action(Kind.LLM_REQUEST, "anthropic/claude-haiku-4-5"), Effect.ALLOW),
        (Action(Kind.LLM_REQUEST, "anthropic/claude-opus-4-1"), Effect.DENY),
    ]
    for action, expected in cases:
        assert effect(assistants, action) is expected, action


def test_the_page_names_every_kind_of_action_and_of_secret() -> None:
    text = (DOCS / "policy.md").read_text()
    assert all(f"`{kind.value}`" in text for kind in DECIDED)
    assert all(f"`{name}`" in text for name in DETECTORS)
    assert all(f"`{section.value}`" in text for section in Section)


def test_the_page_names_every_operator_and_what_is_not_built() -> None:
    from aa.policy.arguments import OPERATORS

    text = (DOCS / "policy.md").read_text()
    assert all(f"`{operator}`" in text for operator in OPERATORS)
    rule = schema("policy")["properties"]["rule"]["items"]["properties"]
    box = schema("policy")["properties"]["sandbox"]["properties"]
    tables = (rule, rule["network"]["properties"], box)
    absent = [n for t in tables for n, s in t.items() if "not" in s or "x-not-built-values" in s]
    assert len(absent) == 6
    assert all(f"`{n}`" in text for n in absent)
    for table in (rule, rule["network"]["properties"], box, rule["approve"]["properties"]):
        assert all(f"`{n}" in text or f"{n} " in text for n in table)


def test_examples_of_the_configuration_page_load(tmp_path: Path) -> None:
    main, agent = examples("configuration.md")
    (tmp_path / "c.toml").write_text(main)
    (tmp_path / "agents.d").mkdir()
    (tmp_path / "agents.d/my-agent.toml").write_text(agent)
    loaded = config.load(tmp_path / "c.toml", tmp_path / "agents.d")
    assert loaded.launch.permits(caller="ann", groups=("developers",), agent="codex", user="agent")
    assert not loaded.launch.permits(caller="ann", groups=(), agent="codex", user="agent")
    assert loaded.agent("my-agent").layers == {Layer.PROXY, Layer.KERNEL}


def test_the_configuration_page_names_every_key() -> None:
    text = (DOCS / "configuration.md").read_text()
    for section, table in schema("config")["properties"].items():
        for key in table.get("properties", {}):
            assert f"{section}.{key}" in text, key
    for key, value in schema("agent")["properties"].items():
        assert key in text or "not" in value, key
    assert validate(parse("", file="empty"), schema("config")) == []
