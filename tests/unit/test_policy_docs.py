"""The examples of docs/policy.md and docs/configuration.md load, and do what the text says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aa import config
from aa.model import Action, Effect, Kind, Layer, Run
from aa.policy import Policy, loads
from aa.tomlfile import parse, schema, validate

DOCS = Path(__file__).parents[2] / "docs"


def examples(name: str) -> list[str]:
    return re.findall(r"^```toml\n(.*?)^```", (DOCS / name).read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def policies() -> tuple[Policy, ...]:
    return tuple(loads({"example.toml": text}) for text in examples("policy.md"))


CODEX = Run("r", "codex", "dev", 1000, tags=("team:platform",), home="/home/dev", directory="/w")


def effect(policy: Policy, action: Action) -> Effect:
    return policy.decide(CODEX, action, now=0).effect


def test_every_example_of_the_policy_page_loads(policies: tuple[Policy, ...]) -> None:
    assert [p.files[0].id for p in policies] == ["coding", "payments", "budgets"]


def test_the_first_example_does_what_the_page_says(policies: tuple[Policy, ...]) -> None:
    coding = policies[0]
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
    small, big = ({"args": {"amount": amount}} for amount in (1000, 1001))
    assert effect(coding, Action(Kind.TOOL_CALL, "transfer_x", small)) is Effect.ALLOW
    assert effect(coding, Action(Kind.TOOL_CALL, "transfer_x", big)) is Effect.ASK
    assert coding.writable(CODEX) == (".", "~/.cache")


def test_the_second_example_does_what_the_page_says(policies: tuple[Policy, ...]) -> None:
    payments = policies[1]
    good = {"amount": 50, "to": {"country": "DE"}}
    for args, expected in (
        (good, Effect.ALLOW),
        ({**good, "amount": 51}, Effect.DENY),
        ({**good, "amount": "50"}, Effect.DENY),
        ({"amount": 50}, Effect.DENY),
        ({**good, "force": 0}, Effect.DENY),
    ):
        assert effect(payments, Action(Kind.TOOL_CALL, "pay", {"args": args})) is expected, args


def test_the_page_names_every_operator_and_what_is_not_built() -> None:
    from aa.policy.arguments import OPERATORS

    text = (DOCS / "policy.md").read_text()
    assert all(f"`{operator}`" in text for operator in OPERATORS)
    rule = schema("policy")["properties"]["rule"]["items"]["properties"]
    absent = [n for t in (rule, rule["network"]["properties"]) for n, s in t.items() if "not" in s]
    assert all(
        f"`{n}`" in text for n in absent if n not in ("dns", "inspect_limit", "redact", "record")
    )


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
