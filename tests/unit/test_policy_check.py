"""Findings about valid policies, the words of decisions, and the folders a run may write to."""

from __future__ import annotations

from aa.model import Action, Kind, Run
from aa.policy import Policy, loads

RUN = Run("r", "agent", "dev", 1000, home="/home/dev", directory="/home/dev/work")


def rule(id_: str, effect: str, matcher: str) -> str:
    return f'[[rule]]\nid = "{id_}"\neffect = "{effect}"\n{matcher}\n'


def policy(*rules: str, head: str = "", id_: str = "p") -> str:
    return f'[policy]\nid = "{id_}"\n{head}\n' + "".join(rules)


def found(*texts: str) -> list[tuple[str, str, str]]:
    loaded = loads({f"{n}.toml": text for n, text in enumerate(texts)})
    return [(f.severity, f.key, f.message) for f in loaded.check()]


def messages(*texts: str) -> str:
    return "\n".join(" ".join(f) for f in found(*texts))


ALLOW_A = rule("allow-a", "allow", 'network = { hosts = ["a.example"] }')


def test_a_plain_policy_has_no_findings() -> None:
    assert found(policy(ALLOW_A, rule("t", "allow", 'tool = { names = ["read"] }'))) == []


def test_allow_that_a_deny_covers_has_no_effect() -> None:
    deny = rule("deny-all", "deny", 'network = { hosts = ["**.example", "example"], wide = true }')
    deny_one = rule("deny-other", "deny", 'network = { hosts = ["b.example"] }')
    told = ("warning", "p/allow-a", "has no effect: p/deny-all denies all of it")
    assert found(policy(ALLOW_A, deny)) == [told]
    assert found(policy(ALLOW_A, deny_one)) == []


def test_deny_of_some_ports_or_addresses_does_not_shadow() -> None:
    for narrower in ("ports = [443]", 'cidrs = ["1.0.0.0/8"]', 'protocol = "http"'):
        deny = rule("d", "deny", f'network = {{ hosts = ["a.example"], {narrower} }}')
        assert found(policy(ALLOW_A, deny)) == []


def test_rule_that_another_repeats_adds_nothing() -> None:
    wide = rule("wide", "allow", 'network = { hosts = ["**.b.example"] }')
    narrow = rule("narrow", "allow", 'network = { hosts = ["x.b.example"] }')
    more_ports = rule("ports", "allow", 'network = { hosts = ["y.b.example"], ports = [8443] }')
    assert found(policy(wide, narrow, more_ports)) == [
        ("advice", "p/narrow", "adds nothing to p/wide")
    ]


def test_of_two_equal_rules_one_is_told() -> None:
    same = rule("again", "allow", 'network = { hosts = ["a.example"] }')
    assert found(policy(ALLOW_A, same)) == [("advice", "p/allow-a", "adds nothing to p/again")]


def test_rule_with_cidrs_is_not_repeated_by_one_without() -> None:
    lifts = rule("lifts", "allow", 'network = { hosts = ["a.example"], cidrs = ["10.0.0.0/8"] }')
    assert "adds nothing" not in messages(policy(ALLOW_A, lifts))


def test_wider_range_that_lifts_no_guard_does_not_repeat_a_narrow_one() -> None:
    wide = rule("wide", "allow", 'network = { cidrs = ["10.0.0.0/7"] }')
    narrow = rule("narrow", "allow", 'network = { cidrs = ["10.0.0.0/8"] }')
    inner = rule("inner", "allow", 'network = { cidrs = ["10.1.0.0/16"] }')
    assert "adds nothing to p/wide" not in messages(policy(wide, narrow))
    assert "adds nothing to p/narrow" in messages(policy(narrow, inner))


def test_shadowing_only_counts_where_the_other_file_applies() -> None:
    deny = rule("d", "deny", 'network = { hosts = ["a.example"] }')
    elsewhere = policy(deny, head='applies_to = { agents = ["other"] }', id_="q")
    everywhere = policy(deny, id_="q")
    trial = policy(deny, head='mode = "observe"', id_="q")
    assert found(policy(ALLOW_A), elsewhere) == []
    assert found(policy(ALLOW_A), trial) == []
    assert "has no effect" in messages(policy(ALLOW_A), everywhere)


def test_tools_shadow_by_name() -> None:
    deny = rule("d", "deny", 'tool = { names = ["read_*"] }')
    some = rule("d", "deny", 'tool = { names = ["read_*"], args = { a = { eq = 1 } } }')
    allow = rule("a", "allow", 'tool = { names = ["read_file"] }')
    assert "has no effect" in messages(policy(deny, allow))
    assert found(policy(some, allow)) == []


def test_openings_that_may_not_be_meant_are_told() -> None:
    every = rule("every", "allow", 'network = { hosts = ["**"] }')
    wide = rule("wide", "allow", 'network = { hosts = ["*.com"], wide = true }')
    zero = rule("zero", "allow", 'network = { cidrs = ["0.0.0.0/0"] }')
    loop = rule("loop", "allow", 'network = { cidrs = ["127.0.0.0/8"] }')
    ssh = rule("ssh", "allow", 'network = { hosts = ["git.example"], ports = [22] }')
    tools = rule("tools", "allow", 'tool = { names = ["*"] }')
    for text, words in (
        (every, "every name"),
        (wide, "names of anybody"),
        (zero, "every address"),
        (loop, "opens loopback"),
        (ssh, "usually ssh"),
        (tools, "every tool"),
    ):
        assert words in messages(policy(text)), words


def test_the_same_as_denials_are_not_told() -> None:
    every = rule("every", "deny", 'network = { hosts = ["**"], ports = [22] }')
    loop = rule("loop", "deny", 'network = { cidrs = ["127.0.0.0/8", "0.0.0.0/0"] }')
    opaque = rule(
        "o", "allow", 'network = { hosts = ["g.example"], ports = [22], protocol = "opaque" }'
    )
    assert "every name" not in messages(policy(every))
    assert "opens" not in messages(policy(loop))
    assert found(policy(opaque)) == []


def test_open_defaults_are_told_unless_they_are_only_observed() -> None:
    head = 'default = { network = "allow", dns = "allow" }'
    assert "can be reached by address" in messages(policy(head=head))
    assert "names carry data out" in messages(policy(head=head))
    assert found(policy(head=head + '\nmode = "observe"')) == []


def test_a_default_that_a_silent_file_overrules_is_told() -> None:
    open_ = policy(head='default = { tool = "allow" }')
    assert "state it there too" not in messages(open_)
    told = loads({"a": open_, "b": policy(id_="silent")}).check()
    assert [f.fix for f in told] == ["state it there too"]
    stated = policy(id_="silent", head='default = { tool = "deny" }')
    assert loads({"a": open_, "b": stated}).check() == []


def test_findings_have_a_line_and_are_in_order() -> None:
    text = policy(*(rule(f"r{n}", "allow", 'tool = { names = ["*"] }') for n in range(3)))
    told = loads({"p.toml": text}).check()
    assert [f.line for f in told] == [4, 8, 8, 12, 12]
    assert told[0].as_json()["severity"] == "warning"
    assert str(told[0]).startswith("p.toml:4: warning: p/r0: ")


# -- words -------------------------------------------------------------------------------------


def reason(p: Policy, action: Action) -> str:
    return p.decide(RUN, action, now=0).reason


def connect(host: str, port: int = 443, **attributes: object) -> Action:
    return Action(Kind.NET_CONNECT, f"{host}:{port}", {"host": host, "port": port, **attributes})


def test_a_denial_by_default_gives_the_rule_that_would_allow_it() -> None:
    p = loads({"p": policy(ALLOW_A)})
    text = reason(p, connect("b.example", 8443))
    assert "no rule of p allows b.example:8443" in text
    assert 'network = { hosts = ["b.example"], ports = [8443] }' in text
    assert "aasm policy explain net.connect b.example:8443" in text


def test_the_rule_that_a_denial_gives_does_allow_it() -> None:
    refused = [
        connect("b.example"),
        connect("b.example", 22, protocol="opaque"),
        connect("b.example", addresses=["10.0.0.1"], protocol="tls"),
        Action(Kind.NET_CONNECT, "10.0.0.1:443", {"port": 443, "addresses": ["10.0.0.1"]}),
        Action(Kind.NET_CONNECT, "1.1.1.1:22", {"port": 22, "addresses": ["1.1.1.1"]}),
        Action(Kind.DNS_QUERY, "b.example"),
        Action(Kind.TOOL_CALL, "read"),
    ]
    p = loads({"p": policy(ALLOW_A)})
    for action in refused:
        told = reason(p, action)
        matcher = told.split('effect = "allow" and ')[1].split(" would; ")[0]
        more = loads({"p": policy(ALLOW_A, rule("more", "allow", matcher))})
        assert not p.decide(RUN, action, now=0).permits
        assert more.decide(RUN, action, now=0).permits, told


def test_the_range_that_the_guard_list_asks_for_lifts_it() -> None:
    action = connect("a.example", addresses=["10.0.0.1"], protocol="tls")
    text = reason(loads({"p": policy(ALLOW_A)}), action)
    assert 'cidrs = ["10.0.0.1"]' in text
    named = rule("n", "allow", 'network = { hosts = ["a.example"], cidrs = ["10.0.0.1"] }')
    assert loads({"p": policy(ALLOW_A, named)}).decide(RUN, action, now=0).permits


def test_a_denial_at_one_of_several_addresses_names_it() -> None:
    named = rule("n", "allow", 'network = { hosts = ["n.example"], cidrs = ["10.0.0.0/8"] }')
    action = connect("n.example", addresses=["10.0.0.1", "1.1.1.1"], protocol="tls")
    assert "n.example:443 at 1.1.1.1" in reason(loads({"p": policy(named)}), action)


def test_text_that_an_agent_chose_cannot_drive_a_terminal() -> None:
    p = loads({"p": policy(ALLOW_A)})
    for target in ("\x1b[2J\nx", "a" * 10_000, "\ud800", "b\u202ec", "'; rm -rf /; '"):
        text = reason(p, Action(Kind.TOOL_CALL, target))
        assert text.isprintable() and text.isascii()
        assert len(text) < 1200


# -- explanations ------------------------------------------------------------------------------


def test_explain_says_why_each_rule_did_or_did_not_match() -> None:
    text = policy(
        ALLOW_A,
        rule("other-host", "allow", 'network = { hosts = ["b.example"] }'),
        rule("other-port", "allow", 'network = { hosts = ["a.example"], ports = [22] }'),
        rule("range", "deny", 'network = { cidrs = ["9.0.0.0/8"] }'),
        rule("opaque", "allow", 'network = { hosts = ["a.example"], protocol = "opaque" }'),
    )
    elsewhere = policy(head='applies_to = { agents = ["other"], tags = ["x"] }', id_="q")
    p = loads({"p.toml": text, "q.toml": elsewhere})
    action = connect("a.example", protocol="tls", addresses=["1.1.1.1"])
    steps = {s.rule: s for s in p.explain(RUN, action, now=0).steps}
    assert steps["p/allow-a"].matched
    assert steps["p/allow-a"].line == 4
    assert "none of its hosts (b.example) matches a.example" in steps["p/other-host"].why
    assert "its ports are 22, not 443" in steps["p/other-port"].why
    assert "1.1.1.1 is in none of its cidrs (9.0.0.0/8)" in steps["p/range"].why
    assert "it is for opaque, and this connection speaks tls" in steps["p/opaque"].why
    assert "applies to agents other and tags x" in steps["q"].why
    assert "does not state" in steps["p/<default>"].why
    assert not any(steps[r].matched for r in steps if r != "p/allow-a")


# -- folders -----------------------------------------------------------------------------------


def sandbox(id_: str, *folders: str, head: str = "") -> str:
    listed = ", ".join(f'"{f}"' for f in folders)
    return policy(id_=id_, head=head) + f"[sandbox]\nwritable = [{listed}]\n"


def test_writable_is_what_all_files_that_state_it_agree_on() -> None:
    one = sandbox("one", ".", "~/.cache", "~/.npm")
    two = sandbox("two", ".", "~/.cache/pip", "/srv/x")
    silent = policy(id_="silent")
    assert loads({"a": silent}).writable(RUN) is None
    assert loads({"a": one, "c": silent}).writable(RUN) == (".", "~/.cache", "~/.npm")
    assert loads({"a": one, "b": two}).writable(RUN) == (".", "~/.cache/pip")
    assert loads({"a": two, "b": one}).writable(RUN) == (".", "~/.cache/pip")
    elsewhere = sandbox("other", "~/.cargo", head='applies_to = { agents = ["x"] }')
    assert loads({"a": one, "b": elsewhere}).writable(RUN) == (".", "~/.cache", "~/.npm")


def test_writable_of_files_that_share_nothing_is_nothing() -> None:
    assert loads({"a": sandbox("a", "."), "b": sandbox("b", "~/.npm")}).writable(RUN) == ()
