"""Findings about valid policies, the words of decisions, and the folders a run may write to."""

from __future__ import annotations

import pytest

from aa.model import Action, Kind, Run
from aa.policy import Policy, check, loads

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


EVERY_SECTION = [
    ('tool = { names = ["a*"] }', 'tool = { names = ["ab", "a*"] }', 'tool = { names = ["b"] }'),
    (
        'tool = { names = ["*"] }',
        'tool = { names = ["a"], args = { n = { gt = 1 } } }',
        'mcp = { tool = "a" }',
    ),
    ('dns = { names = ["**.a.b"] }', 'dns = { names = ["*.a.b"] }', 'dns = { names = ["a.b"] }'),
    (
        'exec = { paths = ["/opt/**"] }',
        'exec = { paths = ["/opt/a", "/opt/b/*"] }',
        'exec = { paths = ["/opt/a", "/usr/b"] }',
    ),
    (
        'file = { paths = ["~/x/**"], access = ["write", "delete"] }',
        'file = { paths = ["~/x/y"], access = ["write"] }',
        'file = { paths = ["~/x/y"], access = ["read", "write"] }',
    ),
    (
        'inbound = { cidrs = ["10.0.0.0/8"] }',
        'inbound = { cidrs = ["10.1.0.0/16"], ports = [80] }',
        'inbound = { cidrs = ["11.0.0.0/8"], ports = [80] }',
    ),
    (
        'mcp = { server = "g*" }',
        'mcp = { server = "github", tool = "get_*" }',
        'mcp = { tool = "get_*" }',
    ),
    (
        'llm = { model = "*opus*" }',
        'llm = { provider = "a", model = "claude-opus-4" }',
        'llm = { provider = "a", model = "claude-*" }',
    ),
    (
        'network = { hosts = ["**.a.b"], methods = ["GET", "PUT"] }',
        'network = { hosts = ["x.a.b"], methods = ["GET"], ports = [443] }',
        'network = { hosts = ["x.a.b"], methods = ["POST"], ports = [443] }',
    ),
    (
        'network = { hosts = ["x.a.b"], paths = ["/v1/**"] }',
        'network = { hosts = ["x.a.b"], paths = ["/v1/a/*"] }',
        'network = { hosts = ["x.a.b"], paths = ["/v2/a/*"] }',
    ),
    (
        'network = { hosts = ["x.a.b"], headers = { X-A = "1" } }',
        'network = { hosts = ["x.a.b"], headers = { X-A = "1", X-B = "2" } }',
        'network = { hosts = ["x.a.b"], headers = { X-A = "2" } }',
    ),
]  # fmt: skip


@pytest.mark.parametrize(("wide", "narrow", "other"), EVERY_SECTION)
def test_a_denial_that_covers_an_allow_is_told_in_every_section(
    wide: str, narrow: str, other: str
) -> None:
    def about(matcher: str) -> str:
        head = 'default = { exec = "deny", llm = "deny" }'
        rules = (rule("wide", "deny", wide), rule("narrow", "allow", matcher))
        return messages(policy(*rules, head=head))

    assert "has no effect: p/wide denies all of it" in about(narrow)
    assert "has no effect" not in about(other)


def test_a_rule_of_another_time_makes_none_useless() -> None:
    allow = rule("a", "allow", 'tool = { names = ["x"] }')
    when = '\nwhen = { days = ["mon"] }'
    deny = rule("d", "deny", 'tool = { names = ["x"] }' + when)
    same = rule("a", "allow", 'tool = { names = ["x"] }' + when)
    assert found(policy(allow, deny)) == []
    assert "has no effect" in messages(policy(same, deny))
    always = rule("a", "allow", 'tool = { names = ["x"] }\nwhen = { days = ["mon-sun"] }')
    assert "when is always" in messages(policy(always))


def test_an_allow_of_what_is_allowed_by_default_changes_nothing() -> None:
    program = rule("r", "allow", 'exec = { paths = ["/usr/bin/git"] }')
    assert "changes nothing: the default of exec is allow" in messages(policy(program))
    assert found(policy(program, head='default = { exec = "deny" }')) == []
    strict = policy(head='default = { exec = "deny" }', id_="q")
    assert "changes nothing" not in messages(policy(program), strict)


def test_content_that_a_plain_rule_makes_useless_is_told() -> None:
    narrow = rule("narrow", "allow", 'network = { hosts = ["a.example"], methods = ["GET"] }')
    plain = rule("plain", "allow", 'network = { hosts = ["a.example", "b.example"] }')
    other = rule("plain", "allow", 'network = { hosts = ["a.example"], ports = [8443] }')
    told = messages(policy(narrow, plain))
    assert "p/narrow restricts nothing: p/plain allows every request to its hosts" in told
    assert "restricts nothing" not in messages(policy(narrow, other))


NO_SECRETS = rule("s", "deny", 'network = { hosts = ["**"], body = { secrets = ["any"] } }')


def test_a_denial_by_content_that_nothing_inspects_is_told() -> None:
    assert ("warning", "p/s") in [(s, k) for s, k, _ in found(policy(ALLOW_A, NO_SECRETS))]
    assert "nothing inspects the connections" in messages(policy(ALLOW_A, NO_SECRETS))
    inspected = rule("i", "allow", 'network = { hosts = ["i.example"], inspect = true }')
    assert found(policy(inspected, NO_SECRETS)) == []
    told = found(policy(inspected, ALLOW_A, NO_SECRETS))
    assert told == [
        ("advice", "p/s", "does not see what these let through without inspection: p/allow-a")
    ]
    both = rule("i", "allow", 'network = { hosts = ["**.example"], wide = true, inspect = true }')
    assert "does not see" not in messages(policy(both, ALLOW_A, NO_SECRETS))


def test_rules_about_models_and_secrets_need_something_that_inspects() -> None:
    model = rule("m", "deny", 'llm = { model = "x" }')
    secret = """[[secret]]
    id = "k"
    source = { credential = "c" }
    inject = { hosts = ["a.example"], header = "X-Key" }
    placeholder = "placeholder"
    """
    inspected = rule("i", "allow", 'network = { hosts = ["a.example"], inspect = true }')
    told = messages(policy(ALLOW_A, model) + secret)
    assert "no request to a model is seen" in told
    assert "p/k no rule inspects its hosts" in told
    assert found(policy(inspected, model) + secret) == []


def test_an_allow_of_what_is_kept_read_only_is_told() -> None:
    write = rule("w", "allow", 'file = { paths = ["~/x/y/*"], access = ["write"] }')
    read = rule("w", "allow", 'file = { paths = ["~/x/y/*"], access = ["read"] }')
    box = '[sandbox]\nread_only = ["~/x"]\n'
    assert "read_only keeps it" in messages(policy(write) + box)
    assert "read_only keeps it" not in messages(policy(read) + box)
    assert found(policy(write) + box.replace("~/x", "~/other")) == []


@pytest.mark.parametrize(
    ("matcher", "words"),
    [
        ('dns = { names = ["**"] }', "names carry data out"),
        ('dns = { names = ["*.com"], wide = true }', "names carry data out"),
        ('inbound = { cidrs = ["0.0.0.0/0"] }', "connections from every address"),
        ('mcp = { tool = "get_*" }', "every MCP server"),
        ('llm = { model = "*" }', "every model"),
        ('file = { paths = ["/**"], access = ["write"] }', "nearly everywhere"),
        ('file = { paths = ["~/**"], access = ["delete"] }', "nearly everywhere"),
    ],
)
def test_other_openings_that_may_not_be_meant_are_told(matcher: str, words: str) -> None:
    head = 'default = { llm = "deny" }'
    assert words in messages(policy(rule("r", "allow", matcher), head=head))
    assert words not in messages(policy(rule("r", "deny", matcher), head=head))


def test_a_denial_of_one_segment_is_told() -> None:
    one = rule("r", "deny", 'network = { hosts = ["a.example"], paths = ["/admin/*"] }')
    assert "what lies deeper is not denied" in messages(policy(one))
    assert "write /admin/** to deny all of it" in {f.fix for f in loads({"p": policy(one)}).check()}


def test_very_many_rules_are_told_not_to_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [rule(f"r{n}", "allow", f'tool = {{ names = ["t{n}"] }}') for n in range(4)]
    monkeypatch.setattr(check, "PAIRS_LIMIT", 15)
    assert "too many to look for useless ones" in messages(policy(*rules))
    monkeypatch.setattr(check, "PAIRS_LIMIT", 16)
    assert found(policy(*rules)) == []


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


def request(host: str, **attributes: object) -> Action:
    return Action(Kind.HTTP_REQUEST, f"{host}:443", {"protocol": "tls", **attributes})


def test_a_denied_request_is_explained_by_its_url_and_method() -> None:
    text = reason(loads({"p": policy(ALLOW_A)}), request("b.example", method="POST", path="/v1/x"))
    assert 'hosts = ["b.example"], methods = ["POST"], paths = ["/v1/x"]' in text
    told = "aasm policy explain http.request https://b.example:443/v1/x --attributes "
    assert told + """'{"method": "POST"}' tells more""" in text


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
        Action(Kind.TOOL_CALL, 'odd "name" \\ *'),
        Action(Kind.EXEC, "/opt/x y"),
        Action(Kind.FILE_OPEN, "/srv/hosts", {"access": "read"}),
        Action(Kind.MCP_CALL, "server/tool"),
        Action(Kind.MCP_CALL, "server/", {"method": "resources/read"}),
        Action(Kind.LLM_REQUEST, "provider/model/x"),
        Action(Kind.NET_ACCEPT, "[fd00::1]:80"),
        request("b.example", method="POST", path="/v1/a b", headers={}),
        request("a.example", method="POST", path="/v1/x", headers={}),
        request("b.example", method="odd method", path="/%2f"),
    ]
    head = 'default = { exec = "deny", file = "deny", llm = "deny" }'
    only_get = ALLOW_A.replace('"a.example"]', '"a.example"], methods = ["GET"]')
    p = loads({"p": policy(only_get, head=head)})
    for action in refused:
        told = reason(p, action)
        matcher = told.split('effect = "allow" and ')[1].split(" would; ")[0]
        more = loads({"p": policy(only_get, rule("more", "allow", matcher), head=head)})
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
