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
from aa.policy.learn import FILES_LIMIT, NEVER, PATHS_LIMIT, Proposal, propose
from aa.policy.replay import Question, Replay
from tests.unit.policy_log import RUN, connect, decided, dns, seen, started, tool, written

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


def test_a_name_that_was_only_resolved_is_a_rule_of_its_own_and_opens_no_connection() -> None:
    found = proposed([*DONE, dns("lonely.example")])
    assert rules(found)["resolved-only"] == {"dns": {"names": ["lonely.example"]}}
    assert effect(found, dns("lonely.example")) is Effect.ALLOW
    assert effect(found, connect("lonely.example:443")) is Effect.DENY
    assert "resolved-only" not in rules(proposed(DONE))


# -- requests, MCP calls, models


def request(method: str, path: str, host: str = "api.example") -> Action:
    attributes = {
        "host": host, "port": 443, "protocol": "tls", "addresses": ["93.184.216.34"],
        "method": method, "path": path, "headers": {}, "http": "1.1",
    }  # fmt: skip
    return Action(Kind.HTTP_REQUEST, f"{host}:443", attributes)


def test_requests_that_were_looked_into_are_methods_and_paths_of_a_host() -> None:
    acts = [
        connect("api.example:443"),
        request("POST", "/v1/messages"),
        request("GET", "/v1/a%2Db"),
    ]
    found = proposed(acts)
    assert rules(found) == {
        "api.example-443": {
            "network": {
                "hosts": ["api.example"],
                "ports": [443],
                "methods": ["GET", "POST"],
                "paths": ["/v1/a-b", "/v1/messages"],
            }
        }
    }
    for act in acts:
        assert effect(found, act) is Effect.ALLOW
    assert effect(found, request("DELETE", "/v1/messages")) is Effect.DENY


def test_a_host_with_several_paths_is_allowed_as_a_whole() -> None:
    few = [request("GET", f"/{n}") for n in range(PATHS_LIMIT)]
    assert rules(proposed(few))["api.example-443"]["network"]["paths"] == ["/0", "/1", "/2", "/3"]
    assert effect(proposed(few), request("GET", "/other")) is Effect.DENY
    several = [*few, request("GET", "/more")]
    assert "paths" not in rules(proposed(several))["api.example-443"]["network"]
    assert effect(proposed(several), request("GET", "/other")) is Effect.ALLOW
    assert effect(proposed(several), request("POST", "/other")) is Effect.DENY


def test_a_request_that_no_rule_can_name_is_about_the_host_or_left_out() -> None:
    for path in ("/a*", "/a/../b", "/a%2fb", "/x?y"):
        found = proposed([request("GET", path)])
        assert found.allowed == 1 or found.left, path


def test_mcp_calls_and_models_are_named_by_server_and_provider() -> None:
    def call(server: str, tool: str) -> Action:
        about = {"server": server, "method": "tools/call", "tool": tool}
        return Action(Kind.MCP_CALL, f"{server}/{tool}", about)

    model = Action(
        Kind.LLM_REQUEST, "anthropic/claude-x", {"provider": "anthropic", "model": "claude-x"}
    )
    acts = [call("files", "read"), call("files", "list"), call("web", "get"), model]
    found = proposed(acts, OBSERVE + 'default = { llm = "deny" }\n')
    assert rules(found) == {
        "mcp-files": {"mcp": {"server": "files", "method": "tools/call", "tool": ["list", "read"]}},
        "mcp-web": {"mcp": {"server": "web", "method": "tools/call", "tool": ["get"]}},
        "models-anthropic": {"llm": {"provider": "anthropic", "model": ["claude-x"]}},
    }
    assert found.allowed == 4
    assert effect(found, call("web", "read")) is Effect.DENY
    other = Action(Kind.LLM_REQUEST, "anthropic/dear", {"provider": "anthropic", "model": "dear"})
    assert effect(found, other) is Effect.DENY


# -- programs and files


def of_seen(*records: Record, run: Run = RUN) -> Proposal:
    questions = Replay().questions(written([started(run), *records]))
    return propose(run, list(questions), tomli_w.dumps)


def test_programs_are_named_one_by_one_where_everything_is_and_by_folder_elsewhere() -> None:
    tools = [seen(Kind.EXEC, f"/home/dev/work/bin/tool{n}") for n in range(FILES_LIMIT + 1)]
    system = [seen(Kind.EXEC, f"/usr/bin/{n}") for n in ("git", "sed", "awk", "cat", "env")]
    script = seen(Kind.EXEC, "/opt/x/run", exe="/usr/bin/python3.11")
    found = of_seen(*tools, *system, script)
    assert rules(found)["programs"]["exec"]["paths"] == [
        "/opt/x/run", "/usr/bin/awk", "/usr/bin/cat", "/usr/bin/env", "/usr/bin/git",
        "/usr/bin/python3.11", "/usr/bin/sed", "~/work/bin/**",
    ]  # fmt: skip
    policy = loaded(found)
    assert policy.files[0].defaults["exec"] == "deny"
    assert policy.compile(RUN).share.executable[-1] == "~/work/bin/**"
    assert (found.allowed, found.left) == (10, ())


def test_without_a_record_of_programs_all_are_allowed_as_before() -> None:
    assert "exec" not in loaded(proposed(DONE)).files[0].defaults


def test_folders_that_were_written_to_are_writable_and_several_are_the_one_around_them() -> None:
    cache = [f"/home/dev/.cache/pip/{n}/x" for n in range(FILES_LIMIT + 1)]
    paths = ["/home/dev/work/a", "/tmp/x", "/dev/null", "/srv/out/a", "/home/dev/.npm/b", *cache]
    found = of_seen(*(seen(Kind.FILE_OPEN, path, access="create") for path in paths))
    assert loaded(found).writable(RUN) == (".", "/srv/out", "~/.cache/pip", "~/.npm")
    assert found.left == ()


def test_what_must_not_be_writable_is_left_out_and_named() -> None:
    found = of_seen(
        seen(Kind.FILE_OPEN, "/home/dev/.bashrc", access="write"),
        seen(Kind.FILE_RENAME, "/home/dev/work/x", to="/etc/cron.d/x"),
        seen(Kind.FILE_UNLINK, "/home/dev/work/y", error="EROFS"),
    )
    assert loaded(found).writable(RUN) == (".",)
    assert {(x.target, x.why) for x in found.left} == {
        ("/home/dev/.bashrc", "no rule, and no writable folder, can say it"),
        ("/home/dev/work/x", "no rule, and no writable folder, can say it"),
        ("/home/dev/work/y", "it failed: EROFS"),
    }


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
    | st.builds(request, st.sampled_from(["GET", "get", "X Y"]), st.text(max_size=8), targets)
    | st.builds(
        lambda server, tool_: Action(
            Kind.MCP_CALL, f"{server}/{tool_}", {"server": server, "tool": tool_}
        ),
        targets,
        targets,
    )
    | st.builds(
        lambda model: Action(Kind.LLM_REQUEST, f"x/{model}", {"provider": "x", "model": model}),
        targets,
    )
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
