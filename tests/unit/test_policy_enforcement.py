"""For every rule: what enforces it on a host, in words, and nothing that is dropped silently."""

from __future__ import annotations

from pathlib import Path

import pytest

from aa.model import Rung
from aa.policy import loads
from aa.policy.enforcement import Enforced, Host, Mechanism, report
from aa.policy.vectors import vectors

HERE = Host(Rung.CGROUP, landlock=6, inspection=True)
VECTORS = sorted((Path(__file__).parents[1] / "vectors/policy").glob("*.toml"))


def told(body: str, host: Host = HERE, **head: str) -> list[Enforced]:
    more = "".join(f"{key} = {value}\n" for key, value in head.items())
    return report(loads({"p.toml": f'[policy]\nid = "p"\n{more}{body}'}).files, host)


def rule(effect: str, matcher: str, host: Host = HERE, **head: str) -> list[tuple[str, str]]:
    """The mechanisms of one rule, with their words."""
    found = told(f'[[rule]]\nid = "r"\neffect = "{effect}"\n{matcher}\n', host, **head)
    (one,) = [e for e in found if e.key == "p/r"]
    return [(way.mechanism.value, way.words) for way in one.ways]


def by(effect: str, matcher: str, host: Host = HERE, **head: str) -> list[str]:
    return [mechanism for mechanism, _ in rule(effect, matcher, host, **head)]


def test_every_rule_of_every_vector_is_told_of() -> None:
    for path in VECTORS:
        policy = vectors(path.read_bytes(), file=path.name).policy
        assert policy is not None
        found = report(policy.files, HERE)
        assert {r.ref for r in policy.rules} <= {e.key for e in found}
        assert all(e.ways and all(way.words for way in e.ways) for e in found)


@pytest.mark.parametrize(
    ("matcher", "mechanism"),
    [
        ('network = { hosts = ["a.example"] }', "proxy"),
        ('dns = { names = ["a.example"] }', "proxy"),
        ('tool = { names = ["x"] }', "gateway"),
        ('mcp = { server = "x" }', "gateway"),
        ('llm = { model = "x" }', "proxy"),
        ('file = { paths = ["/etc/shadow"] }', "unit"),
        ('file = { paths = ["~/.ssh/**"] }', "unit"),
        ('file = { paths = ["~/.ssh/id_*"] }', "unit"),
        ('exec = { paths = ["/usr/bin/sudo"] }', "unit"),
        ('file = { paths = ["/srv/*/x"] }', "detect only"),
        ('file = { paths = ["/srv/x/**"], access = ["delete"] }', "detect only"),
        ('exec = { paths = ["/**/sudo"] }', "detect only"),
        ('exec = { paths = ["/usr/bin/python3"] }', "detect only"),
        ('exec = { paths = ["/usr/bin/su"] }\nwhen = { hours = "09:00-17:00" }', "detect only"),
    ],
)
def test_a_denial_is_enforced_by(matcher: str, mechanism: str) -> None:
    assert by("deny", matcher)[0] == mechanism


def test_what_only_the_kernel_could_match_names_the_rung_of_this_host() -> None:
    ((_, words),) = rule("deny", 'exec = { paths = ["/opt/*/x"] }')
    assert "(lsm), which this version does not have" in words and "rung cgroup" in words
    ((_, words),) = rule("deny", 'exec = { paths = ["/opt/*/x"] }', Host())
    assert "this host" not in words


def test_patterns_of_one_rule_that_are_enforced_differently_are_told_apart() -> None:
    found = rule("deny", 'file = { paths = ["/etc/shadow", "/etc/gshadow", "/srv/**/.env"] }')
    assert [(m, w.partition(": ")[0]) for m, w in found] == [
        ("unit", "/etc/shadow, /etc/gshadow"),
        ("detect only", "/srv/**/.env"),
    ]


def test_a_denial_that_would_keep_every_program_from_starting_says_so() -> None:
    for matcher in ('file = { paths = ["/usr/**"] }', 'exec = { paths = ["/usr/bin/**"] }'):
        ((mechanism, words),) = rule("deny", matcher)
        assert (mechanism, words.partition(":")[0]) == ("unit", "no run starts")


def test_a_stricter_mount_than_the_rule_is_told() -> None:
    ((_, words),) = rule("deny", 'file = { paths = ["/srv/x"], access = ["read"] }')
    assert "so it cannot be changed either" in words
    ((_, words),) = rule("deny", 'file = { paths = ["/srv/x"], access = ["write"] }')
    assert "so it cannot be removed either" in words


def test_an_allow_rule_that_opens_nothing_says_so() -> None:
    read = 'file = { paths = ["~/.gitconfig"], access = ["read"] }'
    assert by("allow", read) == ["nothing"]
    assert by("allow", read, default='{ file = "deny" }') == ["landlock"]
    assert by("allow", 'exec = { paths = ["/usr/bin/git"] }') == ["nothing"]
    git = 'exec = { paths = ["/usr/bin/git", "/opt/*/git"] }'
    assert by("allow", git, default='{ exec = "deny" }') == ["landlock", "nothing"]
    write = 'access = ["write", "delete"]'
    assert by("allow", f'file = {{ paths = ["/srv/x/**"], {write} }}') == ["unit", "landlock"]
    assert by("allow", f'file = {{ paths = ["/srv/x"], {write} }}') == ["nothing"]
    assert by("allow", f'file = {{ paths = ["/etc/**"], {write} }}') == ["nothing"]
    assert by("allow", 'inbound = { cidrs = ["10.0.0.0/8"] }') == ["nothing"]


def test_what_needs_inspection_says_when_its_package_is_missing() -> None:
    matcher = 'network = { hosts = ["a.example"], methods = ["GET"] }'
    assert "not installed" not in str(rule("allow", matcher))
    assert "agent-assembly-inspect is not installed" in str(
        rule("allow", matcher, Host(inspection=False))
    )
    denial = rule("deny", 'network = { hosts = ["**"], body = { secrets = ["any"] } }')
    assert [mechanism for mechanism, _ in denial] == ["proxy", "nothing"]


def test_a_file_that_observes_enforces_nothing() -> None:
    assert by("deny", 'file = { paths = ["/etc/shadow"] }', mode='"observe"') == ["detect only"]
    assert [e.key for e in told("", mode='"observe"', default='{ exec = "deny" }')] == []


def test_defaults_of_files_and_programs_and_the_sandbox_are_told() -> None:
    text = '[sandbox]\nwritable = ["."]\nread_only = ["a"]\nmemory = "1G"\ntasks = 9\n'
    found = {e.key: e for e in told(text, default='{ exec = "deny", file = "deny" }')}
    assert found["policy.default.exec"].mechanisms == ("unit", "landlock", "nothing")
    assert found["policy.default.file"].mechanisms == ("landlock", "nothing")
    assert found["sandbox.writable"].mechanisms == ("unit", "landlock")
    assert found["sandbox.read_only"].line == 6
    assert {found[f"sandbox.{k}"].mechanisms for k in ("memory", "tasks")} == {("unit",)}
    (allow,) = told('[sandbox]\nuser_namespaces = "allow"\n')
    assert allow.mechanisms == ("nothing",) and "no run starts" in allow.ways[0].words


def test_without_landlock_nothing_starts_and_that_is_told() -> None:
    found = told('[sandbox]\nwritable = ["."]\n', Host(landlock=0))[0]
    assert found.mechanisms == ("unit", "nothing") and "no run starts" in found.ways[1].words


def test_it_says_itself_as_json() -> None:
    (found,) = told('[[rule]]\nid = "r"\neffect = "deny"\ntool = { names = ["x"] }\n')
    assert found.as_json() == {
        "file": "p.toml", "line": 3, "key": "p/r", "effect": "deny",
        "ways": [{"mechanism": "gateway", "words": found.ways[0].words}],
    }  # fmt: skip
    assert set(found.mechanisms) <= {m.value for m in Mechanism}
