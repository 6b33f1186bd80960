"""What a policy becomes for mechanisms that do not ask: addresses, paths, and the sandbox's share."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aa.model import MalformedValue, Run
from aa.policy import loads
from aa.policy.compile import Bits, Compiled, PathRule, Shape, Share, absolute

RUN = Run("r", "codex", "dev", 1000, home="/home/dev", directory="/home/dev/work")


def policy(body: str, *, id_: str = "p", **head: str) -> str:
    more = "".join(f"{key} = {value}\n" for key, value in head.items())
    return f'[policy]\nid = "{id_}"\n{more}{body}'


def rule(id_: str, effect: str, matcher: str) -> str:
    return f'\n[[rule]]\nid = "{id_}"\neffect = "{effect}"\n{matcher}\n'


def compiled(*texts: str, run: Run = RUN) -> Compiled:
    return loads({f"{n}.toml": text for n, text in enumerate(texts)}).compile(run)


def share(*texts: str, run: Run = RUN) -> Share:
    return compiled(*texts, run=run).share


def closed(*texts: str) -> list[tuple[str, str, Bits]]:
    return [(c.path, c.names, c.bits) for c in share(*texts).closed]


KEYS = rule("keys", "deny", 'file = { paths = ["~/.ssh/**", "/etc/shadow"] }')
BASHRC = rule("rc", "deny", 'file = { paths = ["~/.bashrc"], access = ["write", "delete"] }')
SUDO = rule("sudo", "deny", 'exec = { paths = ["/usr/bin/sudo", "/opt/x/**"] }')
ALL = Bits.READ | Bits.WRITE | Bits.DELETE


# -- paths


@pytest.mark.parametrize(
    ("pattern", "prefix", "rest", "shape"),
    [
        ("/etc/shadow", "/etc/shadow", "", Shape.PATH),
        ("~/.ssh/**", "~/.ssh", "**", Shape.TREE),
        ("~/**", "~", "**", Shape.TREE),
        ("/**", "/", "**", Shape.TREE),
        ("~/.ssh/id_*", "~/.ssh", "id_*", Shape.NAMES),
        ("/opt/*/bin", "/opt", "*/bin", Shape.OTHER),
        ("/srv/**/.env", "/srv", "**/.env", Shape.OTHER),
        ("/a/b*/**", "/a", "b*/**", Shape.OTHER),
    ],
)
def test_a_pattern_is_a_fixed_folder_and_the_rest_of_the_way(
    pattern: str, prefix: str, rest: str, shape: Shape
) -> None:
    (found,) = compiled(policy(rule("x", "deny", f'file = {{ paths = ["{pattern}"] }}'))).paths
    assert (found.prefix, found.rest, found.shape) == (prefix, rest, shape)
    assert (found.bits, found.rule, found.whole) == (ALL, "p/x", True)


def test_every_rule_about_paths_is_in_the_tables_also_one_that_no_mount_can_say() -> None:
    text = policy(
        KEYS + SUDO + rule("env", "deny", 'file = { paths = ["/srv/**/.env"], access = ["read"] }')
        + rule("git", "allow", 'exec = { paths = ["/usr/bin/git"] }')
    )  # fmt: skip
    found = compiled(text)
    assert {(p.rule, p.bits) for p in found.paths} == {
        ("p/keys", ALL), ("p/sudo", Bits.EXEC), ("p/env", Bits.READ), ("p/git", Bits.EXEC),
    }  # fmt: skip
    assert "/srv" not in {path for path, _, _ in closed(text)}


# -- addresses


def test_rules_about_addresses_alone_are_tables_of_ranges_and_ports() -> None:
    text = policy(
        rule("lan", "allow", 'network = { cidrs = ["10.0.0.0/8"], ports = [5432] }')
        + rule("host", "allow", 'network = { hosts = ["a.example"] }')
        + rule("both", "allow", 'network = { hosts = ["a.example"], cidrs = ["10.9.0.0/16"] }')
        + rule("no", "deny", 'network = { cidrs = ["10.1.0.0/16", "fd00::/8"] }')
        + rule("night", "deny", 'network = { cidrs = ["10.2.0.0/16"] }\nwhen = { hours = "22:00-06:00" }')
    )  # fmt: skip
    found = compiled(text).addresses
    assert [(e.range.text, e.ports, e.rule) for e in found.allow] == [
        ("10.0.0.0/8", (5432,), "p/lan")
    ]
    assert [(e.range.text, e.ports) for e in found.deny] == [
        ("10.1.0.0/16", None),
        ("fd00::/8", None),
    ]
    assert found.default == "deny"


# -- the sandbox's share


def test_deny_rules_close_what_they_name() -> None:
    assert closed(policy(KEYS + BASHRC + SUDO)) == [
        ("/etc/shadow", "", ALL),
        ("/opt/x", "", Bits.EXEC),
        ("/usr/bin/sudo", "", Bits.EXEC),
        ("~/.bashrc", "", Bits.WRITE | Bits.DELETE),
        ("~/.ssh", "", ALL),
    ]
    glob = policy(rule("ids", "deny", 'file = { paths = ["~/.ssh/id_*"] }'))
    assert closed(glob) == [("~/.ssh", "id_*", ALL)]


def test_a_rule_that_depends_on_the_time_closes_and_opens_nothing_for_a_whole_run() -> None:
    timed = '\nwhen = { hours = "22:00-06:00" }'
    text = policy(
        rule("keys", "deny", 'file = { paths = ["~/.ssh/**"] }' + timed)
        + rule("data", "allow", 'file = { paths = ["/srv/**"], access = ["write", "delete"] }' + timed)
    )  # fmt: skip
    assert share(text) == Share()
    assert len(compiled(text).paths) == 2


def test_files_that_only_observe_close_and_open_nothing() -> None:
    watching = policy(KEYS + SUDO, mode='"observe"', default='{ exec = "deny", file = "allow" }')
    assert share(watching) == Share()
    assert share(policy("", id_="q"), watching) == Share()
    assert closed(policy(KEYS, id_="q"), watching) == closed(policy(KEYS))


def test_a_policy_that_is_not_about_the_run_is_not_in_it() -> None:
    other = policy(KEYS, applies_to='{ agents = ["claude-code"] }')
    assert share(other) == Share() and share(other, policy(BASHRC, id_="q")).closed


def test_an_allow_rule_opens_a_folder_that_it_names_as_a_whole_and_nothing_else() -> None:
    def opened(matcher: str) -> tuple[str, ...] | None:
        return share(policy(rule("x", "allow", f"file = {matcher}"))).writable

    both = 'access = ["write", "delete"]'
    assert opened(f'{{ paths = ["/srv/data/**"], {both} }}') == (".", "/srv/data")
    assert opened(f'{{ paths = ["~/.cache/x/**"], {both} }}') == (".", "~/.cache/x")
    for nothing in (
        '{ paths = ["/srv/data/**"], access = ["write"] }',
        '{ paths = ["/srv/data/**"], access = ["read"] }',
        f'{{ paths = ["/srv/data"], {both} }}',
        f'{{ paths = ["/srv/*/data/**"], {both} }}',
        f'{{ paths = ["/etc/**"], {both} }}',
        f'{{ paths = ["/**"], {both} }}',
        f'{{ paths = ["~/**"], {both} }}',
    ):
        assert opened(nothing) is None, nothing


def test_grants_are_there_only_where_the_default_denies() -> None:
    rules = rule("git", "allow", 'exec = { paths = ["/usr/bin/git", "~/bin/**", "/opt/*/x"] }')
    rules += rule("conf", "allow", 'file = { paths = ["~/.gitconfig"], access = ["read"] }')
    assert share(policy(rules)).executable == share(policy(rules)).readable == ()
    strict = share(policy(rules, default='{ exec = "deny", file = "deny" }'))
    assert strict.executable == ("/usr/bin/git", "~/bin/**")
    assert strict.readable == ("~/.gitconfig",)
    assert (strict.exec, strict.file) == ("deny", "deny")


def test_of_several_files_the_strictest_holds() -> None:
    loose = policy(
        '[sandbox]\nwritable = [".", "~/.cache"]\nread_only = ["a"]\nmemory = "4G"\ntasks = 500\n'
        'user_namespaces = "allow"\n',
        default='{ file = "allow" }',
    )  # fmt: skip
    strict = policy(
        '[sandbox]\nwritable = [".", "~/.npm"]\nread_only = ["b"]\nmemory = "1G"\n'
        'user_namespaces = "deny"\n',
        id_="q",
        default='{ exec = "deny" }',
    )
    both = share(loose, strict)
    assert (both.writable, both.read_only) == ((".",), ("a", "b"))
    assert (both.memory, both.tasks, both.user_namespaces) == (1 << 30, 500, False)
    assert (both.file, both.exec) == ("sandbox", "deny")
    assert share(loose).user_namespaces is True and share(loose).file == "allow"


# -- a digest that says whether a run has it


def test_the_digest_is_that_of_what_makes_the_sandbox_and_of_nothing_else() -> None:
    base = share(policy(KEYS))
    network = rule("net", "allow", 'network = { hosts = ["a.example"] }')
    assert share(policy(network + KEYS)).digest == base.digest
    assert share(policy(KEYS + SUDO)).digest != base.digest
    assert Share().digest != base.digest


def test_a_share_is_the_same_after_a_trip_over_the_socket() -> None:
    made = share(policy(KEYS + SUDO + '[sandbox]\nmemory = "1G"\nwritable = ["."]\n'))
    assert Share.from_json(json.loads(json.dumps(made.as_json()))) == made
    assert made.digest == Share.from_json(made.as_json()).digest


@pytest.mark.parametrize(
    "change",
    [
        {"file": "everything"},
        {"exec": "ask"},
        {"writable": "."},
        {"writable": [1]},
        {"closed": [{"path": "/x"}]},
        {"closed": [{"path": "/x", "names": "", "bits": "all", "rule": "r"}]},
        {"memory": -1},
        {"tasks": True},
        {"user_namespaces": "yes"},
        {"more": 1},
    ],
)
def test_a_share_that_is_not_one_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedValue):
        Share.from_json({**Share().as_json(), **change})
    with pytest.raises(MalformedValue):
        Share.from_json(list(change))


def test_paths_of_a_share_are_absolute_for_a_run() -> None:
    def of(path: str, home: str = "/home/dev") -> str:
        return absolute(path, home=home, directory="/w")

    assert [of(p) for p in (".", "a/b", "~", "~/x", "/etc")] == [
        "/w", "/w/a/b", "/home/dev", "/home/dev/x", "/etc",
    ]  # fmt: skip
    assert of("~/x", home="") == ""


# -- adding a file never opens


TEXTS = st.lists(
    st.sampled_from(
        [
            KEYS,
            BASHRC,
            SUDO,
            rule("open", "allow", 'file = { paths = ["/srv/x/**"], access = ["write", "delete"] }'),
            rule("git", "allow", 'exec = { paths = ["/usr/bin/git"] }'),
        ]
    ),
    unique=True,
).map("".join)
BOXES = st.sampled_from(
    ["", '[sandbox]\nwritable = ["."]\n', '[sandbox]\nwritable = [".", "~/.npm"]\nmemory = "1G"\n',
     '[sandbox]\nread_only = [".git/hooks"]\nuser_namespaces = "allow"\n']
)  # fmt: skip
DEFAULTS = st.sampled_from(
    ['{ exec = "deny" }', '{ file = "deny" }', '{ tool = "deny" }', '{ file = "allow" }']
)
FILES = st.builds(lambda rules, box, default: (rules + box, default), TEXTS, BOXES, DEFAULTS)


@given(st.lists(FILES, min_size=1, max_size=3), st.sampled_from([KEYS, BASHRC, SUDO]))
def test_a_file_with_denials_closes_more_and_opens_nothing(
    files: list[tuple[str, str]], denial: str
) -> None:
    texts = [policy(body, id_=f"p{n}", default=default) for n, (body, default) in enumerate(files)]
    before = share(*texts)
    after = share(*texts, policy(denial, id_="more", default='{ file = "allow" }'))
    assert {(c.path, c.bits) for c in before.closed} <= {(c.path, c.bits) for c in after.closed}
    assert (after.file, after.exec, after.writable) == (before.file, before.exec, before.writable)
    assert set(before.read_only) <= set(after.read_only)
    assert after.executable == before.executable and after.readable == before.readable


def test_a_path_rule_says_itself_as_json() -> None:
    (found,) = compiled(policy(rule("x", "deny", 'exec = { paths = ["/bin/su"] }'))).paths
    assert isinstance(found, PathRule)
    assert found.as_json() == {
        "effect": "deny", "prefix": "/bin/su", "rest": "", "whole": True, "bits": 8, "rule": "p/x",
    }  # fmt: skip
