"""What the engine remembers between decisions: it stays small, and never changes an answer."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from aa.model import Action, Effect, Kind, Run
from aa.policy import Policy, loads
from aa.policy.index import KEPT_LIMIT, PATHS_SEARCHED

RUN = Run("r", "agent", "dev", 1000, home="/home/dev", directory="/home/dev/work")


def policy(*rules: str) -> Policy:
    text = '[policy]\nid = "p"\n'
    for n, rule in enumerate(rules):
        effect, matcher = rule.split(" ", 1)
        text += f'[[rule]]\nid = "r{n:03}"\neffect = "{effect}"\n{matcher}\n'
    return loads({"p": text})


def request(host: str, path: str, **more: Any) -> Action:
    told = {"protocol": "tls", "method": "GET", "path": path, "headers": {}, **more}
    return Action(Kind.HTTP_REQUEST, f"{host}:443", told)


def test_many_names_and_long_paths_do_not_fill_the_memory() -> None:
    everywhere = [
        f'deny network = {{ hosts = ["**"], methods = ["PUT"], paths = ["/x{n}"] }}'
        for n in range(50)
    ]
    p = policy('allow network = { hosts = ["**"] }', *everywhere)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for n in range(2 * KEPT_LIMIT):
            host = f"{'a' * 60}.{n}.example"
            assert p.decide(RUN, request(host, f"/{'b/' * 2000}{n}"), now=0).permits
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 16 << 20


def test_rules_about_paths_are_found_among_many_of_one_host() -> None:
    count = 20 * PATHS_SEARCHED
    rules = [
        f'allow network = {{ hosts = ["a.example"], paths = ["/p{n}", "/q{n}/**"] }}'
        for n in range(count)
    ]
    p = policy(
        *rules,
        'deny network = { hosts = ["a.example"], paths = ["/q7/secret/**"] }',
        'deny network = { hosts = ["**"], methods = ["DELETE"] }',
    )
    for n in range(count):
        for path in (f"/p{n}", f"/q{n}/x/y"):
            decision = p.decide(RUN, request("a.example", path), now=0)
            assert decision.rule == f"p/r{n:03}"
            assert p.explain(RUN, request("a.example", path), now=0).decision == decision
    for path, rule in (
        ("/q7/secret", f"p/r{count:03}"),
        ("/q7/secret/", f"p/r{count:03}"),
        ("/q7/other/../secret", f"p/r{count:03}"),
        ("/elsewhere", "<default>"),
    ):
        assert p.decide(RUN, request("a.example", path), now=0).rule == rule
    assert p.decide(RUN, request("a.example", "/p1", method="DELETE"), now=0).rule == (
        f"p/r{count + 1:03}"
    )


@pytest.mark.parametrize(
    "attributes",
    [
        {"port": 443.0},
        {"port": True},
        {"port": "443"},
        {"host": 443},
        {"host": ["a.example"]},
        {"protocol": ["tls"]},
        {"protocol": 1},
        {"addresses": "93.184.216.34"},
        {"addresses": {"93.184.216.34": 1}},
        {"addresses": [["93.184.216.34"]]},
        {"addresses": []},
        {"addresses": 5},
    ],
)
def test_an_odd_action_is_not_taken_for_a_good_one_asked_before(attributes: dict[str, Any]) -> None:
    p = policy('allow network = { hosts = ["a.example"] }')
    good = {"host": "a.example", "port": 443, "protocol": "tls", "addresses": ["93.184.216.34"]}
    for _ in range(2):
        assert p.decide(RUN, Action(Kind.NET_CONNECT, "a.example:443", good), now=0).permits
        odd = Action(Kind.NET_CONNECT, "a.example:443", {**good, **attributes})
        assert p.decide(RUN, odd, now=0).rule in ("<malformed-action>", "<invalid-host>")


def test_a_listener_is_the_runs_own_only_when_it_is_told_so() -> None:
    p = policy('allow tool = { names = ["x"] }')
    for own, effect in ((True, Effect.ALLOW), (1, Effect.DENY), ("true", Effect.DENY)) * 2:
        told = {"port": 80, "addresses": ["127.0.0.1"], "own_listener": own}
        action = Action(Kind.NET_CONNECT, "127.0.0.1:80", told)
        assert p.decide(RUN, action, now=0).effect is effect


def test_what_is_remembered_is_the_same_at_every_time_and_for_every_run() -> None:
    p = loads(
        {
            "p": """
            [policy]
            id = "p"
            [[rule]]
            id = "r"
            effect = "allow"
            network = { hosts = ["a.example"] }
            when = { days = ["mon"] }
            """,
            "q": """
            [policy]
            id = "q"
            applies_to = { agents = ["other"] }
            [[rule]]
            id = "r"
            effect = "deny"
            network = { hosts = ["a.example"] }
            """,
        }
    )
    monday, tuesday = 1767571200, 1767571200 + 86400
    action = Action(Kind.NET_CONNECT, "a.example:443")
    other = Run("r", "other", "dev", 1000)
    for _ in range(2):
        assert p.decide(RUN, action, now=monday).rule == "p/r"
        assert p.decide(RUN, action, now=tuesday).rule == "<default>"
        assert p.decide(other, action, now=monday).rule == "q/r"
