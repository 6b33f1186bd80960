"""Records of the log asked again: which can be, what differs between two policies, what is left out and why."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aa.audit.record import MAX_TEXT, Record
from aa.model import Action, Effect, Kind, Run
from aa.policy import Policy, loads
from aa.policy import replay as r
from aa.policy.replay import Replay, difference
from tests.unit.policy_log import RUN, connect, decided, dns, seen, started, tool, written

OLD = """
[policy]
id = "coding"
default = { network = "deny", dns = "deny", tool = "ask" }

[[rule]]
id = "forge"
effect = "allow"
network = { hosts = ["forge.example"] }

[[rule]]
id = "search"
effect = "allow"
tool = { names = ["search"] }
"""
NEW = (
    OLD.replace('"forge.example"', '"index.example"')
    + """
[[rule]]
id = "never"
effect = "deny"
tool = { names = ["wipe"] }

[[rule]]
id = "everything-found"
effect = "allow"
tool = { names = ["s*"] }
"""
)
TAGGED = '[policy]\nid = "t"\napplies_to = { tags = ["team:a"] }\n'


def policy(text: str) -> Policy:
    return loads({"p.toml": text})


ACTS = [
    connect("forge.example:443"),
    connect("forge.example:443"),
    connect("index.example:443"),
    connect("elsewhere.example:443"),
    tool("search"),
    tool("wipe"),
]


@pytest.fixture(scope="module")
def log() -> list[Record]:
    return written([started(), *decided(policy(OLD), ACTS)])


def test_a_record_becomes_the_question_that_it_was(log: list[Record]) -> None:
    asked = list(Replay().questions(log))
    assert [q.action for q in asked] == ACTS
    assert {q.run for q in asked} == {RUN}
    assert {q.now for q in asked} == {1_700_000_000.0}
    assert [q.effect for q in asked][:4] == [Effect.ALLOW] * 2 + [Effect.DENY] * 2


def test_the_same_policy_answers_as_it_did(log: list[Record]) -> None:
    for q in Replay().questions(log):
        decision = policy(OLD).decide(q.run, q.action, now=q.now)
        assert (decision.effect, decision.rule) == (q.effect, q.rule)


def test_what_would_change_is_grouped_counted_and_what_opens_comes_first(log: list[Record]) -> None:
    found = difference(policy(OLD), policy(NEW), log)
    told = [(c.opens, c.kind, c.target, c.count, str(c.old), str(c.new)) for c in found.changes]
    assert told == [
        (True, "net.connect", "index.example:443", 1, "deny by <default>", "allow by coding/forge"),
        (
            False,
            "net.connect",
            "forge.example:443",
            2,
            "allow by coding/forge",
            "deny by <default>",
        ),
        (False, "tool.call", "wipe", 1, "ask by <default>", "deny by coding/never"),
    ]
    assert (found.replayed, found.changed, found.by_another_rule) == (6, 4, 1)
    assert found.left_out == {}


def test_nothing_changes_between_a_policy_and_itself(log: list[Record]) -> None:
    found = difference(policy(OLD), policy(OLD), log)
    assert (found.changes, found.replayed, found.by_another_rule) == ((), 6, 0)


def test_a_policy_that_only_observes_opens_and_says_what_it_would_do(log: list[Record]) -> None:
    observing = policy(OLD.replace('id = "coding"', 'id = "coding"\nmode = "observe"'))
    found = difference(policy(OLD), observing, log)
    assert all(c.opens for c in found.changes) and found.changed == 3
    assert str(found.changes[0].new).startswith("allow (enforced: deny)")


def test_what_a_record_does_not_hold_is_counted_by_name() -> None:
    huge = tool("search", text="x" * 20_000)
    long_ = tool("s" * (MAX_TEXT + 1))
    odd = {**decided(policy(OLD), [tool("search")])[0], "count": 3}
    unknown = {**odd, "kind": "mind.read"}
    refusal = {**seen(Kind.NET_CONNECT, "1.2.3.4:5"), "type": "refusal"}
    nobody = {**odd, "uid": -1, "run": "", "count": 1}
    broken = [{**odd, "decision": "perhaps"}, {"seq": 1, "count": "x"}, {**odd, "attributes": 5}]
    records = [started(), *decided(policy(OLD), [huge, long_]), odd, unknown, refusal, nobody]
    found = difference(policy(OLD), policy(NEW), [*written(records), None, *broken])
    assert found.replayed == 3
    assert found.left_out == {
        r.NO_RECORD: 1 + 3 + 1 + 1,
        r.UNKNOWN_KIND: 3,
        r.OMITTED: 1,
        r.CUT_TARGET: 1,
        r.NOT_ASKED: 1,
        r.NO_SUBJECT: 1,
    }


def test_a_run_whose_beginning_is_lost_is_left_out_where_its_tags_or_folders_matter() -> None:
    records = written(decided(policy(OLD), [tool("wipe")]))
    assert difference(policy(OLD), policy(NEW), records).replayed == 1
    found = difference(policy(OLD), policy(TAGGED), records)
    assert (found.replayed, found.left_out) == (0, {r.NO_RUN: 1})
    whole = written([started(), *decided(policy(OLD), [tool("wipe")])])
    assert difference(policy(OLD), policy(TAGGED), whole).replayed == 1
    read = seen(Kind.FILE_OPEN, "/home/dev/work/x", access="write")
    assert difference(policy(OLD), policy(NEW), written([read])).left_out == {r.NO_RUN: 1}


def test_a_person_at_the_explicit_proxy_has_no_beginning_and_is_replayed() -> None:
    person = Run("user/dev", "", "dev", 1000)
    records = written(decided(policy(OLD), [connect("forge.example:443")], person))
    found = difference(policy(OLD), policy(TAGGED), records)
    assert found.replayed == 1 and found.changes[0].user == "dev"


def test_what_the_kernel_saw_is_asked_and_what_it_only_tells_is_not() -> None:
    records = [
        started(),
        seen(Kind.FILE_OPEN, "/home/dev/work/x", access="write"),
        seen(Kind.FILE_UNLINK, "/etc/passwd"),
        seen(Kind.EXEC, "/usr/bin/git", argv=["git"]),
        seen(Kind.EXIT, "/usr/bin/git"),
        seen(Kind.NET_CONNECT, "93.184.216.34:443"),
    ]
    asked = list(Replay().questions(written(records)))
    kinds = [q.action.kind for q in asked]
    assert kinds == [Kind.FILE_OPEN, Kind.FILE_UNLINK, Kind.EXEC]
    assert all(q.seen and q.effect is Effect.ALLOW for q in asked)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(sorted(decided(policy(OLD), [dns("a.example")])[0]))


@given(st.lists(st.dictionaries(FIELDS, json_values) | st.none(), max_size=5))
def test_no_record_can_make_it_fail(changes: list[dict[str, Any] | None]) -> None:
    good = {**decided(policy(OLD), [Action(Kind.DNS_QUERY, "a.example")])[0], "seq": 1}
    records = [None if c is None else {**good, **c} for c in changes]
    found = difference(policy(OLD), policy(NEW), [*records, good])
    assert found.replayed >= 1
