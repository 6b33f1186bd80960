"""A proposal from a log: it loads, allows what was done and no more, and names what it leaves out."""

from __future__ import annotations

from typing import Any

import pytest
import tomli_w
from hypothesis import example, given
from hypothesis import strategies as st

from aa.audit.record import Record
from aa.model import Action, Effect, Kind, Run
from aa.policy import Policy, loads
from aa.policy.learn import NEVER, Proposal, propose
from aa.policy.replay import Question, Replay
from tests.unit.policy_log import RUN, connect, decided, dns, started, tool, written

OBSERVE = '[policy]\nid = "watch"\nmode = "observe"\n'
AGAINST = """
[[rule]]
id = "no-paste"
effect = "deny"
network = { hosts = ["paste.example"] }

[[rule]]
id = "ask-first"
effect = "ask"
tool = { names = ["deploy"] }
"""


def asked(actions: list[Action], text: str = OBSERVE, run: Run = RUN) -> list[Question]:
    records: list[Record] = [started(run), *decided(loads({"p.toml": text}), actions, run)]
    return list(Replay().questions(written(records)))


def proposed(actions: list[Action], text: str = OBSERVE, run: Run = RUN) -> Proposal:
    return propose(run, asked(actions, text, run), tomli_w.dumps)


def loaded(proposal: Proposal) -> Policy:
    return loads({"proposal.toml": proposal.text})


def rules(proposal: Proposal) -> dict[str, Any]:
    return {r.id: dict(r.written) for r in loaded(proposal).rules}


def effect(proposal: Proposal, action: Action, run: Run = RUN) -> Effect:
    return loaded(proposal).decide(run, action, now=0.0).effect


DONE = [
    connect("forge.example:443"),
    connect("api.example:443"),
    connect("api.example:443"),
    connect("mirror.example:80", "http"),
    connect("forge.example:22", "opaque", answered="forge.example"),
    connect("93.184.216.34:8443"),
    connect("db.internal:5432", "opaque", addresses=["10.1.2.3"], answered="db.internal"),
    dns("forge.example"),
    dns("api.example"),
    tool("search", q="x"),
    tool("read_file", path="a"),
]


def test_what_was_done_is_allowed_by_the_proposal_and_nothing_near_it() -> None:
    found = proposed(DONE)
    assert (found.total, found.allowed, found.left) == (len(DONE), len(DONE), ())
    for q in asked(DONE):
        assert effect(found, q.action) is Effect.ALLOW
    near = [
        connect("other.example:443"),
        connect("forge.example:80", "http"),
        connect("mirror.example:443"),
        connect("93.184.216.35:8443"),
        connect("db.internal:5432", "opaque", addresses=["10.1.2.4"], answered="db.internal"),
        tool("write_file"),
        dns("other.example"),
    ]
    assert {effect(found, action) for action in near} == {Effect.DENY}


def test_hosts_at_one_port_and_protocol_are_one_rule() -> None:
    found = rules(proposed(DONE))
    assert found["tls-443"] == {
        "network": {
            "hosts": ["api.example", "forge.example"],
            "ports": [443],
            "protocol": "tls",
        }
    }
    assert found["addresses-tls-8443"]["network"]["cidrs"] == ["93.184.216.34/32"]
    assert found["tools"] == {"tool": {"names": ["read_file", "search"]}}


def test_a_guarded_address_is_named_exactly() -> None:
    found = rules(proposed(DONE))["db.internal-5432"]["network"]
    assert (found["hosts"], found["cidrs"]) == (["db.internal"], ["10.1.2.3/32"])


def test_it_is_about_the_agent_alone() -> None:
    other = Run("x", "claude-code", "dev", 1000)
    assert effect(proposed(DONE), connect("forge.example:443"), other) is Effect.DENY
    person = Run("user/dev", "", "dev", 1000)
    found = proposed([connect("forge.example:443")], run=person)
    assert effect(found, connect("forge.example:443"), person) is Effect.ALLOW


def test_what_a_rule_was_against_is_left_out_and_named() -> None:
    acts = [*DONE, connect("paste.example:443"), tool("deploy"), tool("deploy")]
    found = proposed(acts, OBSERVE + AGAINST)
    left = {(x.kind, x.target): (x.why, x.count) for x in found.left}
    assert left == {
        ("net.connect", "paste.example:443"): ("watch/no-paste would deny it", 1),
        ("tool.call", "deploy"): ("watch/ask-first would ask a person", 2),
    }
    assert "#   tool.call deploy (2 times): watch/ask-first would ask a person" in found.text
    assert effect(found, connect("paste.example:443")) is Effect.DENY
    assert found.allowed == len(DONE)


def test_what_was_refused_is_not_learned() -> None:
    enforced = OBSERVE.replace('mode = "observe"', "")
    found = proposed([connect("forge.example:443")], enforced)
    assert (found.rules, found.allowed, found.total) == (0, 0, 1)
    assert found.left[0].why == "it was refused, by <default>"


@pytest.mark.parametrize("address", ["169.254.169.254", "255.255.255.255", "224.0.0.1"])
def test_some_addresses_are_never_proposed(address: str) -> None:
    found = proposed(
        [connect(f"{address}:80", "http"), connect("a.example:80", addresses=[address])]
    )
    assert found.rules == 0 and found.allowed == 0
    assert all(any(name in x.why for name in NEVER) for x in found.left)


def test_a_name_that_was_only_resolved_is_named() -> None:
    found = proposed([*DONE, dns("lonely.example")])
    assert [(x.target, x.count) for x in found.left] == [("lonely.example", 1)]
    assert "lonely.example" in found.text


def test_a_comment_stays_one_whatever_an_agent_chose() -> None:
    evil = 'x"\n[policy]\nid = "mine"\u202e\x1b[2J'
    found = proposed([tool(evil), tool("a*"), tool("\ud800"), tool("x" * 300)])
    assert found.rules == 0 and len(found.left) == 4
    preface = found.text.split('[policy]\nid = "learned', 1)[0]
    assert all(line.startswith("#") or not line for line in preface.splitlines())
    assert preface.isascii() and "\x1b" not in preface


targets = st.text(max_size=30) | st.sampled_from(
    ["a.example", "b.example", "*.c.example", "10.0.0.1"]
)
actions = st.lists(
    st.builds(tool, targets)
    | st.builds(dns, targets)
    | st.builds(
        lambda host, port, protocol, addresses: Action(
            Kind.NET_CONNECT,
            f"{host}:{port}",
            {"host": host, "port": port, "protocol": protocol, "addresses": addresses},
        ),
        targets,
        st.integers(-1, 70000),
        st.sampled_from(["tls", "http", "opaque", ""]),
        st.lists(st.sampled_from(["93.184.216.34", "10.0.0.1", "::1", "fe80::1", "x"]), max_size=3),
    ),
    max_size=12,
)


@given(actions)
def test_every_act_is_allowed_by_the_proposal_or_named_in_it(acts: list[Action]) -> None:
    found = proposed(acts)
    policy = loaded(found)
    left = {(x.kind, x.target) for x in found.left}
    for q in asked(acts):
        allowed = policy.decide(q.run, q.action, now=q.now).permits
        assert allowed or (q.action.kind.value, q.action.target) in left
    assert found.allowed + sum(x.count for x in found.left) == found.total


@given(actions)
@example([connect("*.c.example:1", addresses=given) for given in ([], ["93.184.216.34"])])
def test_the_order_of_acts_makes_no_difference(acts: list[Action]) -> None:
    assert proposed(acts).text == proposed(acts[::-1]).text
