"""Reading policy files: strict, all or nothing, and every mistake with its place and remedy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
import tomli_w

from aa.model import Action, Effect, Kind, Mode, Run
from aa.policy import load, loads
from aa.policy.approve import Approve
from aa.policy.rules import UNSTATED, Section
from aa.policy.sandbox import Sandbox
from aa.tomlfile import InvalidFile, Problem, schema

ROOT = Path(__file__).parents[2]
RUN = Run("r", "agent", "dev", 1000, home="/home/dev", directory="/home/dev/work")
HEAD = '[policy]\nid = "p"\n'


def rule(matcher: str, *, effect: str = "allow", more: str = "") -> str:
    return f'{HEAD}[[rule]]\nid = "r"\neffect = "{effect}"\n{more}{matcher}\n'


def problems(text: str) -> tuple[Problem, ...]:
    with pytest.raises(InvalidFile) as caught:
        loads({"p.toml": text})
    return caught.value.problems


def the_problem(text: str) -> Problem:
    (problem,) = problems(text)
    assert problem.file == "p.toml"
    return problem


def connect(target: str) -> Action:
    return Action(Kind.NET_CONNECT, target)


# -- what a file may say -----------------------------------------------------------------------


def test_reads_a_whole_policy() -> None:
    policy = loads(
        {
            "p.toml": """
            [policy]
            id = "whole"
            revision = 7
            applies_to = { agents = ["a"], users = ["u"], tags = ["team:x"] }
            mode = "observe"
            default = { network = "deny", dns = "deny", exec = "allow", file = "sandbox", tool = "ask", mcp = "deny" }
            [[rule]]
            id = "r"
            effect = "allow"
            reason = "because"
            network = { hosts = ["a.example"], cidrs = ["10.0.0.0/8"], ports = [443, 8443], protocol = "tls" }
            [[rule]]
            id = "t"
            effect = "ask"
            tool = { names = ["x_*"], args = { amount = { gt = 1 } } }
            [sandbox]
            writable = [".", "~/.cache"]
            """
        }
    )
    (file,) = policy.files
    assert (file.id, file.revision, file.mode) == ("whole", "7", Mode.OBSERVE)
    assert file.default(Section.TOOL) == "ask"
    assert file.sandbox.writable == (".", "~/.cache")
    assert [r.ref for r in policy.rules] == ["whole/r", "whole/t"]
    told = file.as_json()
    assert told["rules"][0] == {
        "id": "r",
        "effect": "allow",
        "reason": "because",
        "line": 8,
        "matcher": {
            "network": {
                "hosts": ["a.example"],
                "cidrs": ["10.0.0.0/8"],
                "ports": [443, 8443],
                "protocol": "tls",
            }
        },
    }
    assert str(file) == "p.toml (whole)"


@pytest.mark.parametrize("name", ["observe", "coding-agent", "locked-down"])
def test_shipped_templates_are_valid_and_raise_no_finding(name: str) -> None:
    policy = load(ROOT / f"etc/policies/{name}.toml")
    assert [str(f) for f in policy.check()] == []
    assert policy.files[0].id == name
    assert set(policy.files[0].defaults) >= set(UNSTATED) - {Section.LLM}


def test_template_coding_agent_allows_what_coding_agents_need() -> None:
    policy = load(ROOT / "etc/policies/coding-agent.toml")
    ssh = Action(
        Kind.NET_CONNECT,
        "93.184.216.34:22",
        {
            "port": 22,
            "protocol": "opaque",
            "addresses": ["93.184.216.34"],
            "answered": "github.com",
        },
    )
    assert policy.decide(RUN, connect("api.anthropic.com:443"), now=0).permits
    assert policy.decide(RUN, ssh, now=0).permits
    assert not policy.decide(RUN, connect("evil.example:443"), now=0).permits
    assert not policy.decide(RUN, connect("api.anthropic.com:80"), now=0).permits


def test_template_observe_blocks_nothing() -> None:
    policy = load(ROOT / "etc/policies/observe.toml")
    decision = policy.decide(RUN, connect("evil.example:443"), now=0)
    assert decision.permits
    assert decision.would is Effect.DENY


def test_template_locked_down_allows_nothing() -> None:
    policy = load(ROOT / "etc/policies/locked-down.toml")
    assert not policy.decide(RUN, connect("api.anthropic.com:443"), now=0).permits


# -- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "key", "words"),
    [
        ("", 1, "", "is empty"),
        ("# nothing\n", 1, "", "is empty"),
        ("[policy]\n", 1, "policy", "'id' is missing"),
        ('[[rule]]\nid = "r"\neffect = "allow"\n', 1, "", "'policy' is missing"),
        ('[policy]\nid = "a b"\n', 2, "policy.id", "not valid here"),
        ('[policy]\nid = ""\n', 2, "policy.id", "is empty"),
        (HEAD + 'mode = "monitor"\n', 3, "policy.mode", "not one of"),
        (HEAD + "applies_to = {}\n", 3, "policy.applies_to", "empty table"),
        (HEAD + "applies_to = { agents = [] }\n", 3, "policy.applies_to.agents", "empty list"),
        (HEAD + 'applies_to = { agent = ["a"] }\n', 3, "policy.applies_to.agent", "unknown key"),
        (
            HEAD + 'applies_to = { agents = ["a*"] }\n',
            3,
            "policy.applies_to.agents[0]",
            "not valid",
        ),
        (HEAD + "default = {}\n", 3, "policy.default", "empty table"),
        (HEAD + 'default = { net = "deny" }\n', 3, "policy.default.net", "unknown key"),
        (HEAD + 'default = { network = "alow" }\n', 3, "policy.default.network", "not one of"),
        (HEAD + "[[rules]]\nid = 'r'\n", 3, "rules", "unknown key"),
        (HEAD + "rule = []\n", 3, "policy.rule", "unknown key"),
        ("rule = []\n" + HEAD, 1, "rule", "empty list"),
        (HEAD + '[[rule]]\neffect = "allow"\ntool = { names = ["a"] }\n', 3, "rule[0]", "'id'"),
        (HEAD + '[[rule]]\nid = "r"\ntool = { names = ["a"] }\n', 3, "rule[0]", "'effect'"),
        (rule("", more="efect = 'deny'\n"), 6, "rule[0].efect", "unknown key"),
        (rule(""), 3, "rule[0]", "no matcher"),
        (
            rule('tool = { names = ["a"] }\nnetwork = { hosts = ["b"] }'),
            3,
            "rule[0]",
            "two matchers",
        ),
        (rule("tool = {}"), 6, "rule[0].tool", "'names' is missing"),
        (rule("tool = { names = [] }"), 6, "rule[0].tool.names", "empty list"),
        (rule("tool = { names = ['a', 'a'] }"), 6, "rule[0].tool.names", "twice"),
        (rule("network = {}"), 6, "rule[0].network", "empty table"),
        (rule("network = { hosts = [] }"), 6, "rule[0].network.hosts", "empty list"),
        (rule("network = { hosts = 'a' }"), 6, "rule[0].network.hosts", "must be a list"),
        (rule("network = { ports = [443] }"), 6, "rule[0].network", "neither hosts nor cidrs"),
        (rule("network = { hosts = ['a'], ports = [] }"), 6, "rule[0].network.ports", "empty list"),
        (
            rule("network = { hosts = ['a'], ports = [0] }"),
            6,
            "rule[0].network.ports[0]",
            "below 1",
        ),
        (rule("network = { hosts = ['a'], cidrs = [] }"), 6, "rule[0].network.cidrs", "empty list"),
        (rule("network = { hosts = ['a'], wide = false }"), 6, "rule[0].network.wide", ""),
        (rule("network = { hosts = ['a'], wide = true }"), 6, "rule[0].network.wide", "nothing"),
        (rule("network = { hosts = ['a'], port = [1] }"), 6, "rule[0].network.port", "unknown key"),
        (
            rule("", more="reason = 'a\\tb'\n").replace("'a\\tb'", '"a\\tb"'),
            6,
            "rule[0].reason",
            "",
        ),
        ("[sandbox]\nwritable = []\n" + HEAD, 2, "sandbox.writable", "empty list"),
        ("[sandbox]\nwritable = ['/etc']\n" + HEAD, 2, "sandbox.writable[0]", "would open"),
        ("[sandbox]\nwritable = ['src']\n" + HEAD, 2, "sandbox.writable[0]", "neither absolute"),
        ("[sandbox]\n" + HEAD, 1, "sandbox", "empty table"),
    ],
)
def test_mistakes_name_line_and_key(text: str, line: int, key: str, words: str) -> None:
    problem = problems(text)[0]
    assert (problem.line, problem.key) == (line, key)
    assert words in problem.message


@pytest.mark.parametrize(
    ("matcher", "key", "words"),
    [
        ('network = { hosts = ["a"], methods = [] }', "methods", "empty list"),
        ('network = { hosts = ["a"], methods = ["get"] }', "methods[0]", "not valid here"),
        ('network = { hosts = ["a"], paths = ["v1"] }', "paths[0]", "does not begin with /"),
        ('network = { hosts = ["a"], paths = ["/a?b"] }', "paths[0]", "a query"),
        ('network = { hosts = ["a"], paths = ["/%61"] }', "paths[0]", "a %"),
        ('network = { hosts = ["a"], paths = ["/a/../b"] }', "paths[0]", "no request with such"),
        ('network = { hosts = ["a"], headers = {} }', "headers", "empty table"),
        ('network = { hosts = ["a"], headers = { "a b" = "x" } }', 'headers."a b"', "not the name"),
        ('network = { hosts = ["a"], headers = { Cookie = "*" } }', "headers.Cookie", "credential"),
        (
            'network = { hosts = ["a"], headers = { authorization = "*" } }',
            "headers.authorization",
            "credential",
        ),
        ('network = { hosts = ["a"], headers = { Host = "b" } }', "headers.Host", "by hosts"),
        (
            'network = { hosts = ["a"], headers = { X-A = "b", x-a = "c" } }',
            "headers.x-a",
            "once more",
        ),
        ('network = { hosts = ["a"], headers = { X-A = ["b"] } }', "headers.X-A", "must be a text"),
        (
            'network = { hosts = ["a"], headers = { X-A = " b" } }',
            "headers.X-A",
            "can never be true",
        ),
        ('network = { hosts = ["a"], inspect = false }', "inspect", ""),
        ('network = { hosts = ["a"], inspect_limit = "1M" }', "inspect_limit", "limits nothing"),
        (
            'network = { hosts = ["a"], inspect = true, inspect_limit = "1X" }',
            "inspect_limit",
            "not valid",
        ),
        (
            'network = { hosts = ["a"], inspect = true, inspect_limit = "1G" }',
            "inspect_limit",
            "more than",
        ),
        (
            'network = { hosts = ["a"], inspect = true, inspect_limit = 0 }',
            "inspect_limit",
            "below 1",
        ),
        (
            'network = { hosts = ["a"], inspect = true, protocol = "opaque" }',
            "inspect",
            "can never be true",
        ),
        (
            'network = { hosts = ["a"], paths = ["/"], protocol = "opaque" }',
            "paths",
            "can never be true",
        ),
        (
            'network = { hosts = ["a"], body = { secrets = ["jwt"] } }',
            "body",
            "of deny and ask rules alone",
        ),
        (
            'network = { hosts = ["a"], ws = { direction = "in" } }',
            "ws",
            "of deny and ask rules alone",
        ),
        ('dns = { names = ["1.2.3.4"] }', "names[0]", "an address"),
        ('dns = { names = ["*.com"] }', "names[0]", "spans names"),
        ('dns = { names = ["a", "A"] }', "names[1]", "once more"),
        ('dns = { names = ["a"], wide = true }', "wide", "confirms nothing"),
        ('dns = { names = ["a"], hosts = ["a"] }', "hosts", "unknown key"),
        ("inbound = { ports = [80] }", "", "'cidrs' is missing"),
        ('inbound = { cidrs = ["a"] }', "cidrs[0]", "not a range"),
        ("exec = { paths = [] }", "paths", "empty list"),
        ('exec = { paths = ["sudo"] }', "paths[0]", "neither absolute"),
        ('exec = { paths = ["/usr/../bin/su"] }', "paths[0]", "normal form"),
        ('exec = { paths = ["/usr/**x"] }', "paths[0]", "inside a component"),
        ('exec = { paths = ["/a\\u0000"] }', "paths[0]", "not valid"),
        ('file = { paths = ["/a"] }', "", "does not say what it allows"),
        ('file = { paths = ["/a"], access = ["execute"] }', "access[0]", "not one of"),
        ('file = { paths = ["/a"], access = [] }', "access", "empty list"),
        ("mcp = {}", "", "empty table"),
        ('mcp = { server = "" }', "server", "is empty"),
        ("mcp = { server = [] }", "server", "empty list"),
        ('mcp = { tool = "x", method = "tools/list" }', "tool", "can never be true"),
        (
            'mcp = { args = { a = { eq = 1 } }, method = ["ping", "resources/*"] }',
            "args",
            "can never be true",
        ),
        ('mcp = { tool = "x", args = { a = { gt = 2, lt = 1 } } }', "args.a", "can never be true"),
        ("llm = {}", "", "empty table"),
        ("llm = { model = 7 }", "model", "must be text or a list"),
    ],
)
def test_mistakes_in_matchers_are_errors(matcher: str, key: str, words: str) -> None:
    section = matcher.split(" ", 1)[0]
    text = HEAD + 'default = { llm = "deny" }\n' + rule(matcher).removeprefix(HEAD)
    problem = problems(text)[0]
    assert problem.key == f"rule[0].{section}" + (f".{key}" if key else "")
    assert words in problem.message
    assert problem.line == 7


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        (rule('exec = { paths = ["/a"] }', effect="ask"), "rule[0].effect", "cannot wait"),
        (rule('file = { paths = ["/a"] }', effect="ask"), "rule[0].effect", "cannot wait"),
        (rule('inbound = { cidrs = ["10.0.0.0/8"] }', effect="ask"), "rule[0].effect", "cannot wait"),
        (rule('network = { hosts = ["a"], inspect = true }', effect="deny"), "rule[0].network.inspect", "a denial inspects"),
        (rule('network = { hosts = ["a"], body = {} }', effect="deny"), "rule[0].network.body", "empty table"),
        (rule('network = { hosts = ["a"], body = { secrets = ["jwtt"] } }', effect="deny"), "rule[0].network.body.secrets[0]", "can be detected"),
        (rule('network = { hosts = ["a"], ws = { direction = "both" } }', effect="deny"), "rule[0].network.ws.direction", "not one of"),
        (rule('llm = { model = "x" }'), "rule[0].llm", "changes nothing"),
        (rule('tool = { names = ["a"] }\napprove = { remember = "run" }'), "rule[0].approve", "of ask rules alone"),
        (rule('tool = { names = ["a"] }\napprove = {}', effect="ask"), "rule[0].approve", "empty table"),
        (rule('tool = { names = ["a"] }\napprove = { by = ["ann"] }', effect="ask"), "rule[0].approve.by[0]", "not valid"),
        (rule('tool = { names = ["a"] }\napprove = { by = [] }', effect="ask"), "rule[0].approve.by", "empty list"),
        (rule('tool = { names = ["a"] }\napprove = { timeout = "10" }', effect="ask"), "rule[0].approve.timeout", "not valid"),
        (rule('tool = { names = ["a"] }\napprove = { timeout = "8d" }', effect="ask"), "rule[0].approve.timeout", "longer than a week"),
        (rule('tool = { names = ["a"] }\napprove = { remember = "ever" }', effect="ask"), "rule[0].approve.remember", "not one of"),
        (rule('tool = { names = ["a"] }\nwhen = {}'), "rule[0].when", "empty table"),
        (rule('tool = { names = ["a"] }\nwhen = { days = [] }'), "rule[0].when.days", "empty list"),
        (rule('tool = { names = ["a"] }\nwhen = { timezone = "UTC" }'), "rule[0].when", "neither days"),
        (rule('tool = { names = ["a"] }\nwhen = { days = ["mon"], timezone = "X" }'), "rule[0].when.timezone", "time zone"),
        (rule('tool = { names = ["a"] }\nwhen = { not = { not = { days = ["mon"] } } }'), "rule[0].when.not.not", "unknown key"),
        (HEAD + 'default = { exec = "ask" }\n', "policy.default.exec", "not one of"),
        (HEAD + 'default = { file = "ask" }\n', "policy.default.file", "not one of"),
        (HEAD + 'default = { inbound = "deny" }\n', "policy.default.inbound", "unknown key"),
        ("[sandbox]\nread_only = []\n" + HEAD, "sandbox.read_only", "empty list"),
        ("[sandbox]\nread_only = ['../x']\n" + HEAD, "sandbox.read_only[0]", "leaves the folder"),
        ("[sandbox]\nread_only = ['a/../..']\n" + HEAD, "sandbox.read_only[0]", "normal form"),
        ("[sandbox]\nread_only = ['.git/*']\n" + HEAD, "sandbox.read_only[0]", "a wildcard"),
        ("[sandbox]\nread_only = ['.']\n" + HEAD, "sandbox.read_only[0]", "normal form"),
        ("[sandbox]\nread_only = ['~/']\n" + HEAD, "sandbox.read_only[0]", "normal form"),
        ("[sandbox]\nuser_namespaces = true\n" + HEAD, "sandbox.user_namespaces", "not one of"),
        ("[sandbox]\nmemory = '1M'\n" + HEAD, "sandbox.memory", "less than"),
        ("[sandbox]\nmemory = 1000000000\n" + HEAD, "sandbox.memory", "must be text"),
        ("[sandbox]\ntasks = 1\n" + HEAD, "sandbox.tasks", "below 4"),
    ],
)  # fmt: skip
def test_mistakes_around_matchers_are_errors(text: str, key: str, words: str) -> None:
    problem = problems(text)[0]
    assert problem.key == key
    assert words in problem.message


SECRET = """[[secret]]
id = "s"
source = { credential = "token" }
inject = { hosts = ["api.example"], header = "Authorization", format = "Bearer {}" }
placeholder = "aa-placeholder"
"""


@pytest.mark.parametrize(
    ("old", "new", "key", "words"),
    [
        ('id = "s"\n', "", "secret[0]", "'id' is missing"),
        ('"token"', '"../token"', "secret[0].source.credential", "not valid"),
        ('"api.example"', '"**"', "secret[0].inject.hosts[0]", "to anybody"),
        ('"api.example"', '"*.com"', "secret[0].inject.hosts[0]", "to anybody"),
        ('"api.example"', '"10.0.0.1"', "secret[0].inject.hosts[0]", "an address"),
        ('["api.example"]', "[]", "secret[0].inject.hosts", "empty list"),
        ('"Authorization"', '"Host"', "secret[0].inject.header", "about the connection"),
        ('"Authorization"', '"a b"', "secret[0].inject.header", "not valid"),
        ("Bearer {}", "Bearer", "secret[0].inject.format", "{} once"),
        ("Bearer {}", "{} {}", "secret[0].inject.format", "{} once"),
        ("aa-placeholder", "short", "secret[0].placeholder", "not valid"),
        ('header = "Authorization"', 'headr = "Authorization"', "secret[0].inject", "missing"),
    ],
)
def test_secrets_that_could_go_astray_are_errors(old: str, new: str, key: str, words: str) -> None:
    assert loads({"p.toml": HEAD + SECRET}).files[0].secrets[0].credential == "token"
    assert old in SECRET
    problem = problems(HEAD + SECRET.replace(old, new, 1))[0]
    assert problem.key == key
    assert words in problem.message


def test_each_secret_has_a_placeholder_of_its_own() -> None:
    again = SECRET.replace('"s"', '"t"')
    assert "a secret before it" in the_problem(HEAD + SECRET + again).message
    with pytest.raises(InvalidFile, match="p/s has the placeholder of q/s|q/s has .* of p/s"):
        loads({"a": HEAD + SECRET, "b": HEAD.replace('"p"', '"q"') + SECRET})


def test_what_a_file_says_about_asking_times_and_the_sandbox_is_kept() -> None:
    text = (
        HEAD
        + """
    [[rule]]
    id = "r"
    effect = "ask"
    tool = { names = ["a"] }
    when = { days = ["mon"] }
    approve = { by = ["user:ann", "group:ops"], timeout = "2h", remember = "run" }
    [[rule]]
    id = "s"
    effect = "ask"
    tool = { names = ["b"] }
    [sandbox]
    user_namespaces = "allow"
    read_only = [".git/hooks", "~/.config/x", "/srv/y"]
    memory = "2G"
    tasks = 64
    """
    )
    (file,) = loads({"p": text}).files
    first, second = file.rules
    assert first.approve == Approve(("user:ann", "group:ops"), 7200.0, "run")
    assert first.when is not None and second.approve is None
    assert file.sandbox == Sandbox(None, (".git/hooks", "~/.config/x", "/srv/y"), True, 2 << 30, 64)
    assert first.as_json()["matcher"] == {"tool": {"names": ["a"]}, "when": {"days": ["mon"]}}


def test_sandboxes_of_several_files_are_as_strict_as_each() -> None:
    def sandbox(text: str, id_: str, more: str = "") -> str:
        return f'[policy]\nid = "{id_}"\n{more}\n[sandbox]\n{text}\n'

    one = sandbox('user_namespaces = "allow"\nmemory = "2G"\nread_only = ["a"]', "one")
    two = sandbox('user_namespaces = "deny"\nmemory = "1G"\ntasks = 9\nread_only = ["b"]', "two")
    trial = sandbox('memory = "16M"', "trial", 'mode = "observe"')
    both = loads({"1": one, "2": two}).sandbox(RUN)
    assert both == Sandbox(None, ("a", "b"), False, 1 << 30, 9)
    assert loads({"1": one, "2": trial}).sandbox(RUN) == Sandbox(None, ("a",), True, 2 << 30)
    assert loads({"2": trial}).sandbox(RUN).memory == 16 << 20
    assert loads({"1": HEAD}).sandbox(RUN) == Sandbox()


def test_hosts_that_are_inspected_are_listed_for_the_authority() -> None:
    rules = [
        ("allow", 'network = { hosts = ["**.a.example"], paths = ["/"] }'),
        ("ask", 'network = { hosts = ["b.example"], methods = ["PUT"] }'),
        ("allow", 'network = { cidrs = ["10.0.0.0/8"], inspect = true }'),
        ("allow", 'network = { hosts = ["plain.example"] }'),
        ("deny", 'network = { hosts = ["c.example"], paths = ["/"] }'),
        ("ask", 'network = { hosts = ["d.example"], body = { secrets = ["any"] } }'),
    ]
    written = "".join(
        f'[[rule]]\nid = "r{n}"\neffect = "{effect}"\n{matcher}\n'
        for n, (effect, matcher) in enumerate(rules)
    )
    assert loads({"p": HEAD + written}).inspected() == ("**.a.example", "10.0.0.0/8", "b.example")
    observing = HEAD + 'mode = "observe"\n' + written
    assert loads({"p": observing}).inspected() == ("10.0.0.0/8",)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (rule('network = { hosts = ["a"], redact = ["x"] }'), "rule[0].network.redact"),
        (rule('network = { hosts = ["a"], record = true }'), "rule[0].network.record"),
        ("[sandbox]\nssh = true\n" + HEAD, "sandbox.ssh"),
        ("[sandbox]\nown_bus = true\n" + HEAD, "sandbox.own_bus"),
        ("[sandbox]\nsetuid = true\n" + HEAD, "sandbox.setuid"),
        ("[sandbox]\ndevices = ['/dev/kvm']\n" + HEAD, "sandbox.devices"),
    ],
)
def test_what_is_not_built_is_an_error_that_says_so(text: str, key: str) -> None:
    problem = the_problem(text)
    assert problem.key == key
    assert "is not built into this version" in problem.message
    assert problem.line >= 2


@pytest.mark.parametrize(
    ("host", "fix"),
    [
        ("*", "'**' is every name"),
        ("api-*.example", "write *.NAME"),
        ("a.*.example", "write *.NAME"),
        ("***.example", "write *.NAME"),
        ("10.0.0.1", "put it into cidrs"),
        ("*.0.0.1", ""),
        ("10.0.0.0/8", "put it into cidrs"),
        ("https://a.example/", "write the name of the host alone"),
        ("a.example:8443", 'hosts = ["a.example"], ports = [8443]'),
        ("a..example", ""),
        ("a\\u0000.example", ""),
        ("-a.example", ""),
        ("*.com", "wide = true"),
        ("**.com", "wide = true"),
        ("*.co.uk", "wide = true"),
        ("**.github.io", "wide = true"),
        ("*.рф", "wide = true"),
    ],
)
def test_bad_host_patterns_are_errors_with_a_remedy(host: str, fix: str) -> None:
    problem = the_problem(rule(f'network = {{ hosts = ["ok.example", "{host}"] }}'))
    assert (problem.line, problem.key) == (6, "rule[0].network.hosts[1]")
    assert fix in problem.fix


def test_the_same_host_twice_in_two_spellings_is_an_error() -> None:
    assert "once more" in the_problem(rule('network = { hosts = ["a.b", "A.B."] }')).message


def test_wide_patterns_are_allowed_when_confirmed_and_narrow_ones_without() -> None:
    assert loads({"p": rule('network = { hosts = ["*.com"], wide = true }')})
    assert loads({"p": rule('network = { hosts = ["**.example.co.uk", "**"] }')})


@pytest.mark.parametrize(
    ("cidr", "fix"),
    [
        ("10.0.0.1/8", 'write "10.0.0.0/8"'),
        ("example.org", "names belong in hosts"),
        ("10.0.0.0/33", "names belong in hosts"),
        ("010.0.0.0/8", "names belong in hosts"),
        ("::ffff:10.0.0.0/104", "write the IPv4 range"),
        ("fe80::1%eth0", "remove it"),
    ],
)
def test_bad_cidrs_are_errors_with_a_remedy(cidr: str, fix: str) -> None:
    problem = the_problem(rule(f'network = {{ cidrs = ["{cidr}"] }}'))
    assert problem.key == "rule[0].network.cidrs[0]"
    assert fix in problem.fix


@pytest.mark.parametrize(
    ("args", "key", "words"),
    [
        ("{}", "args", "empty table"),
        ("{ a = {} }", "args.a", "empty table"),
        ("{ a = 1 }", "args.a", "table of operators"),
        ("{ a = { gte = 1 } }", "args.a.gte", "unknown operator"),
        ("{ a = { gt = '1' } }", "args.a.gt", "a number"),
        ("{ a = { gt = true } }", "args.a.gt", "a number"),
        ("{ a = { in = [] } }", "args.a.in", "not empty"),
        ("{ a = { in = 'x' } }", "args.a.in", "a list"),
        ("{ a = { in = [['x']] } }", "args.a.in", "compares with"),
        ("{ a = { eq = ['x'] } }", "args.a.eq", "compares with"),
        ("{ a = { glob = 1 } }", "args.a.glob", "a text"),
        ("{ a = { starts_with = '' } }", "args.a.starts_with", "not empty"),
        ("{ a = { contains = '' } }", "args.a.contains", "not empty"),
        ("{ a = { exists = 'yes' } }", "args.a.exists", "true or false"),
        ("{ a = { eq = 1, b = { eq = 1 } } }", "args.a.b", "unknown operator"),
        ("{ a = { gt = 5, lt = 5 } }", "args.a", "can never be true"),
        ("{ a = { gt = 5, le = 4 } }", "args.a", "can never be true"),
        ("{ a = { ge = 5, lt = 5 } }", "args.a", "can never be true"),
        ("{ a = { eq = 'x', ne = 'x' } }", "args.a", "can never be true"),
        ("{ a = { in = ['x', 'y'], starts_with = 'z' } }", "args.a", "can never be true"),
        ("{ a = { eq = 'z', in = ['x', 'y'] } }", "args.a", "can never be true"),
        ("{ a = { exists = false, eq = 1 } }", "args.a", "can never be true"),
        ("{ a.b.c = { gt = 2, lt = 1 } }", "args.a.b.c", "can never be true"),
    ],
)
def test_bad_predicates_are_errors(args: str, key: str, words: str) -> None:
    problem = the_problem(rule(f'tool = {{ names = ["a"], args = {args} }}'))
    assert problem.key == f"rule[0].tool.{key}"
    assert words in problem.message


@pytest.mark.parametrize(
    "args",
    [
        "{ a = { ge = 5, le = 5 } }",
        "{ a = { eq = 'x', in = ['x', 'y'] } }",
        "{ in = { eq = 1 } }",
        "{ eq.exists = { exists = true } }",
        "{ a.b = { gt = 1 }, a.c = { lt = 1 } }",
    ],
)
def test_predicates_that_can_be_true(args: str) -> None:
    assert loads({"p": rule(f'tool = {{ names = ["a"], args = {args} }}')})


def test_rule_ids_are_unique_within_a_file() -> None:
    again = "".join(
        f'[[rule]]\nid = "r"\neffect = "{effect}"\ntool = {{ names = ["a"] }}\n'
        for effect in ("allow", "deny")
    )
    problem = the_problem(HEAD + again)
    assert (problem.line, problem.key) == (8, "rule[1].id")
    assert "a rule before it" in problem.message


def test_policy_ids_are_unique_among_files() -> None:
    with pytest.raises(InvalidFile, match=r"b.toml:1: policy.id: 'p' is the id of a.toml too"):
        loads({"a.toml": HEAD, "b.toml": HEAD})


def test_all_problems_of_all_files_come_at_once() -> None:
    with pytest.raises(InvalidFile) as caught:
        loads(
            {
                "a.toml": rule("network = { hosts = ['*', '10.0.0.1'] }"),
                "b.toml": "[policy]\n",
                "c.toml": HEAD,
            }
        )
    assert [(p.file, p.line) for p in caught.value.problems] == [
        ("a.toml", 6),
        ("a.toml", 6),
        ("b.toml", 1),
    ]


# -- files -------------------------------------------------------------------------------------


def written(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return folder


def test_reads_a_folder_and_leaves_other_files_alone(tmp_path: Path) -> None:
    written(tmp_path, a=HEAD)
    (tmp_path / "README").write_text("not toml")
    (tmp_path / ".b.toml").write_text("an editor's own")
    (tmp_path / "c.toml~").write_text("a backup")
    assert [f.id for f in load(tmp_path).files] == ["p"]


def test_empty_folder_denies_everything(tmp_path: Path) -> None:
    policy = load(tmp_path)
    assert policy.revision == ""
    decision = policy.decide(RUN, connect("a.example:443"), now=0)
    assert (decision.effect, decision.rule) == (Effect.DENY, "<no-policy>")


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match="No such file"):
        load(tmp_path / "policy.d")


def test_one_file_or_a_list_of_files(tmp_path: Path) -> None:
    written(tmp_path, a=HEAD, b=HEAD.replace("p", "q").replace("qolicy", "policy"))
    assert len(load(tmp_path / "a.toml").files) == 1
    assert len(load([tmp_path / "a.toml", tmp_path / "b.toml"]).files) == 2


def test_file_writable_by_others_is_refused_and_with_it_the_whole_policy(tmp_path: Path) -> None:
    written(tmp_path, a=HEAD, b=HEAD.replace('"p"', '"q"'))
    assert load(tmp_path)
    (tmp_path / "b.toml").chmod(0o666)
    with pytest.raises(InvalidFile, match="can be written by its group or by others"):
        load(tmp_path)


def test_dangling_link_is_refused(tmp_path: Path) -> None:
    written(tmp_path, a=HEAD)
    (tmp_path / "b.toml").symlink_to("gone.toml")
    with pytest.raises(InvalidFile, match="dangling link"):
        load(tmp_path)


def test_too_many_files_are_refused(tmp_path: Path) -> None:
    for n in range(257):
        (tmp_path / f"{n}.toml").write_text(f'[policy]\nid = "p{n}"\n')
    with pytest.raises(InvalidFile, match="more than 256 files"):
        load(tmp_path)


def test_too_many_rules_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = "".join(
        f'[[rule]]\nid = "r{n}"\neffect = "allow"\ntool = {{ names = ["t{n}"] }}\n'
        for n in range(11)
    )
    monkeypatch.setattr(sys.modules["aa.policy.load"], "RULES_LIMIT", 10)
    with pytest.raises(InvalidFile, match="11 rules, more than 10"):
        loads({"p.toml": HEAD + rules})
    monkeypatch.setattr(sys.modules["aa.policy.load"], "RULES_LIMIT", 11)
    assert len(loads({"p.toml": HEAD + rules}).rules) == 11


# -- revision ----------------------------------------------------------------------------------


def test_revision_is_of_the_content_and_not_of_names_or_order(tmp_path: Path) -> None:
    one, two = HEAD, '[policy]\nid = "q"\nrevision = "r7"\n'
    revision = loads({"a": one, "b": two}).revision
    assert revision == loads({"x": two, "y": one}).revision
    assert revision != loads({"a": one, "b": two + "# more\n"}).revision
    assert revision.endswith(":q@r7")


def test_revision_stays_short() -> None:
    files = {f"f{n}": f'[policy]\nid = "{"x" * 50}{n}"\nrevision = {n}\n' for n in range(50)}
    assert len(loads(files).revision) <= 120


# -- bad input ---------------------------------------------------------------------------------

words = st.sampled_from(
    """
    [policy] | id = "p" | [[rule]] | effect = "allow" | effect = "deny" | effect = "ask" | network = {
    hosts = [ | "a.b" | ] | } | tool = { | names = [ | "x*" | args = { | a = { | gt = 1 | , | #
    "\\u0000" | [sandbox] | writable = ["."] | ports = [443] | cidrs = ["10.0.0.0/8"] | default = {
    [[limit]] | exec = { paths = ["/a/**"] } | file = { paths = ["~/x"], access = ["read"] } | when = {
    days = ["mon-fri"] | hours = "22:00-06:00" | not = { | timezone = "UTC" | approve = { | timeout = "1h"
    mcp = { | llm = { | dns = { | inbound = { | server = | method = "tools/call" | methods = ["GET"]
    paths = ["/a/*"] | headers = { | X-A = "1" | body = { | secrets = ["any"] | text = | ws = {
    inspect = true | inspect_limit = "1M" | [[secret]] | placeholder = "aa-placeholder" | nan | -0x1
    """.replace("\n", "|").split("|")
).map(lambda word: word.strip() or "\n")


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=80), st.lists(words, max_size=25).map(" ".join)))
def test_any_text_is_a_policy_or_refused_and_never_crashes(text: str) -> None:
    try:
        policy = loads({"p.toml": text})
    except InvalidFile as e:
        assert e.problems
        return
    policy.decide(RUN, connect("a.b:443"), now=0)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 3))
def test_any_bytes_are_a_policy_or_refused(noise: bytes, place: int) -> None:
    parts = [HEAD.encode(), b"[[rule]]\nid = 'r'\neffect = 'deny'\n", b"tool = { names = ['a'] }\n"]
    parts.insert(place, noise)
    try:
        assert loads({"p.toml": b"".join(parts)}).files
    except InvalidFile as e:
        assert all(p.line >= 1 and p.message for p in e.problems)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_values_in_a_rule_are_a_rule_or_refused_by_key(data: Any) -> None:
    """Values of every type and depth at every key, as another program would write the file."""
    section = data.draw(st.sampled_from([s.value for s in Section]))
    known = schema("policy")["properties"]["rule"]["items"]["properties"][section]["properties"]
    matcher = data.draw(
        st.dictionaries(st.sampled_from([*known, "x"]), toml_values, min_size=1, max_size=3)
    )
    effect = data.draw(st.sampled_from(["allow", "deny", "ask"]))
    written = {
        "policy": {"id": "p"},
        "rule": [{"id": "r", "effect": effect, section: matcher}],
    }
    text = tomli_w.dumps(written)
    try:
        policy = loads({"p.toml": text})
    except InvalidFile as e:
        assert all(p.key.startswith("rule[0]") for p in e.problems), text
        return
    assert [r.section for r in policy.rules] == [section]
    for kind in Kind:
        policy.decide(RUN, Action(kind, "a"), now=0)


likely = st.sampled_from(
    [
        "a",
        "a.b",
        "/a",
        "/a/**",
        "~/x",
        "GET",
        "10.0.0.0/8",
        "any",
        "read",
        "in",
        "16M",
        "*",
        "\u202e",
    ]
)
toml_values = st.recursive(
    st.one_of(likely, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.just(443), st.floats(0, 1)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(["a", "eq", "gt", "secrets", "text", "X-A"]), inner, max_size=2)
    ),
    max_leaves=6,
)  # fmt: skip


def test_a_file_in_another_encoding_is_refused_with_its_line() -> None:
    text = HEAD + "# caf\u00e9\n"
    for encoding in ("latin-1", "utf-16", "utf-16-be", "cp1252"):
        with pytest.raises(InvalidFile) as caught:
            loads({"p.toml": text.encode(encoding)})
        assert caught.value.problems[0].line in (1, 3)
    with pytest.raises(InvalidFile, match="byte order mark"):
        loads({"p.toml": text.encode("utf-8-sig")})
    assert loads({"p.toml": text.encode()})


def test_a_lone_surrogate_is_not_text() -> None:
    with pytest.raises(InvalidFile, match="not UTF-8"):
        loads({"p.toml": HEAD + "# \ud800\n"})
    with pytest.raises(InvalidFile, match="not valid TOML"):
        loads({"p.toml": rule('tool = { names = ["\\ud800"] }')})


@pytest.mark.parametrize(
    "text",
    [
        HEAD + 'id = "q"\n',
        HEAD + "[policy]\nmode = 'observe'\n",
        rule('tool = { names = ["a"], names = ["b"] }'),
        rule('tool = { names = ["a"] }\ntool = { names = ["b"] }'),
        rule('tool = { names = ["a"] }', more='effect = "deny"\n'),
        rule('tool = { names = ["a"], args = { n = { gt = 1, gt = 2 } } }'),
    ],
)
def test_a_key_given_twice_is_an_error(text: str) -> None:
    problem = the_problem(text)
    assert "not valid TOML" in problem.message
    assert problem.line >= 3


@pytest.mark.parametrize("number", ["nan", "-inf", "inf", "9223372036854775808", "1e400"])
def test_numbers_that_compare_oddly_are_errors(number: str) -> None:
    problem = the_problem(rule(f'tool = {{ names = ["a"], args = {{ n = {{ gt = {number} }} }} }}'))
    assert problem.line == 6


def test_huge_texts_are_errors_or_matched_whole() -> None:
    name = "a" * 100_000
    assert "not valid" in the_problem(rule(f'tool = {{ names = ["{name}"] }}')).message
    assert "longer than" in the_problem(rule(f'network = {{ hosts = ["{name}"] }}')).message
    policy = loads({"p": rule(f'tool = {{ names = ["a"], args = {{ n = {{ eq = "{name}" }} }} }}')})
    for value, expected in ((name, True), (name + "a", False), (name[1:], False)):
        action = Action(Kind.TOOL_CALL, "a", {"args": {"n": value}})
        assert policy.decide(RUN, action, now=0).permits is expected


def test_deeply_nested_arguments_are_an_error_in_a_file_and_missing_in_a_call() -> None:
    deep = "{ a = " * 30 + "{ eq = 1 }" + " }" * 30
    assert "nested" in the_problem(rule(f'tool = {{ names = ["a"], args = {deep} }}')).message
    policy = loads({"p": rule('tool = { names = ["a"], args = { a.b = { eq = 1 } } }')})
    value: Any = 1
    for _ in range(100_000):
        value = {"b": value}
    decision = policy.decide(RUN, Action(Kind.TOOL_CALL, "a", {"args": {"a": value}}), now=0)
    assert not decision.permits


def test_ten_thousand_rules_are_read_and_each_of_them_decides() -> None:
    written = "".join(
        f'[[rule]]\nid = "r{n}"\neffect = "{"deny" if n % 3 == 0 else "allow"}"\n'
        f'network = {{ hosts = ["h{n}.example"] }}\n'
        for n in range(10_000)
    )
    policy = loads({"p": HEAD + written})
    for n in range(0, 10_000, 97):
        decision = policy.decide(RUN, connect(f"h{n}.example:443"), now=0)
        assert decision.rule == f"p/r{n}"
        assert decision.permits is (n % 3 != 0)


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)


EVERYTHING = (
    HEAD
    + 'default = { llm = "deny" }\n'
    + "".join(
        f'[[rule]]\nid = "r{n}"\neffect = "{effect}"\n{matcher}\n'
        for n, (effect, matcher) in enumerate(
            [
                ("allow", 'network = { hosts = ["**"] }'),
                ("allow", 'network = { hosts = ["**"], paths = ["/**"], headers = { X-A = "*" } }'),
                (
                    "deny",
                    'network = { hosts = ["**"], methods = ["PUT"], body = { secrets = ["any"] } }',
                ),
                ("ask", 'network = { hosts = ["**"], ws = { text = "*" } }'),
                ("deny", 'tool = { names = ["b*"], args = { a.b = { lt = 1 } } }'),
                ("allow", 'tool = { names = ["*"] }'),
                ("ask", 'mcp = { server = "*", args = { a = { exists = true } } }'),
                ("allow", 'llm = { model = "*" }'),
                ("deny", 'exec = { paths = ["~/**", "/**/x"] }'),
                ("deny", 'file = { paths = ["~/**"] }'),
                ("allow", 'inbound = { cidrs = ["0.0.0.0/0"] }'),
                ("allow", 'dns = { names = ["**"] }\nwhen = { days = ["mon-sat"] }'),
            ]
        )
    )
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(list(Kind)), st.text(max_size=30), st.dictionaries(
    st.sampled_from("""host port addresses protocol args access answered method path headers body ws to
    peer server tool provider model own_listener""".split()), values
))  # fmt: skip
def test_any_action_gets_an_answer_and_never_a_crash(
    kind: Kind, target: str, attributes: dict[str, Any]
) -> None:
    policy = loads({"p.toml": EVERYTHING})
    action = Action(kind, target, attributes)
    decision = policy.decide(RUN, action, now=0)
    assert policy.explain(RUN, action, now=0).decision == decision
    assert decision.reason.isprintable()
    assert len(decision.reason) < 1000
