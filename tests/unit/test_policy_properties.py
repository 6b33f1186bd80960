"""What must hold for every policy: order is nothing, denials only ever narrow, explanations agree."""

from __future__ import annotations

import ipaddress
import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from aa.model import Action, Decision, Effect, Kind, Mode, Run
from aa.policy import Policy, loads
from aa.policy.address import place

RANK = {Effect.DENY: 0, Effect.ASK: 1, Effect.ALLOW: 2}

HOSTS = ["a.x", "b.x", "a.b.x", "b.a.b.x", "x.y", "a.x.y", "single"]
PATTERNS = ["a.x", "b.x", "*.b.x", "**.b.x", "**.a.x", "**", "a.x.y", "single", "a.b.x"]
ADDRESSES = ["1.1.1.1", "8.8.8.8", "10.0.0.1", "10.9.0.1", "127.0.0.1", "169.254.169.254", "::1"]
ADDRESSES += ["2606:4700::1", "64:ff9b::10.0.0.1", "64:ff9b::8.8.8.8", "::ffff:10.0.0.1"]
CIDRS = ["1.0.0.0/8", "10.0.0.0/8", "10.9.0.0/16", "0.0.0.0/0", "127.0.0.0/8", "::/0"]
CIDRS += ["169.254.169.254/32", "2606:4700::/32", "64:ff9b::/96", "64:ff9b::a00:0/104"]
TOOLS = ["read", "read_a", "write", "write_b"]
NAMES = ["read", "read*", "*_a", "w?ite", "*", "write_b"]
AGENTS = ["one", "two"]


def some(values: list[Any], most: int = 3) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=most, unique=True)


def toml_list(values: list[Any]) -> str:
    return "[" + ", ".join(str(v) if isinstance(v, int) else f'"{v}"' for v in values) + "]"


@st.composite
def networks(draw: st.DrawFn) -> str:
    keys = {}
    which = draw(st.sampled_from(["hosts", "cidrs", "both"]))
    if which != "cidrs":
        keys["hosts"] = toml_list(draw(some(PATTERNS)))
    if which != "hosts":
        keys["cidrs"] = toml_list(draw(some(CIDRS)))
    if draw(st.booleans()):
        keys["ports"] = toml_list(draw(some([80, 443, 22])))
    if draw(st.booleans()):
        keys["protocol"] = '"' + draw(st.sampled_from(["tls", "http", "opaque"])) + '"'
    return "network = { " + ", ".join(f"{k} = {v}" for k, v in keys.items()) + " }"


@st.composite
def tools(draw: st.DrawFn) -> str:
    args = ""
    if draw(st.booleans()):
        operator = draw(
            st.sampled_from(["gt = 3", "lt = 3", "eq = 3", 'ne = "x"', "exists = true"])
        )
        args = f", args = {{ n = {{ {operator} }} }}"
    return f"tool = {{ names = {toml_list(draw(some(NAMES)))}{args} }}"


rule_bodies = st.tuples(
    st.sampled_from(["allow", "deny", "ask"]), st.one_of(networks(), networks(), tools())
)


def rule_text(number: int, body: tuple[str, str]) -> str:
    return f'[[rule]]\nid = "r{number}"\neffect = "{body[0]}"\n{body[1]}\n'


@st.composite
def files(draw: st.DrawFn) -> dict[str, list[str]]:
    """File name -> its head and its rules, each as text."""
    found = {}
    for number in range(draw(st.integers(1, 3))):
        head = f'[policy]\nid = "p{number}"\n'
        if draw(st.booleans()):
            head += f"applies_to = {{ agents = {toml_list(draw(some(AGENTS)))} }}\n"
        if draw(st.booleans()):
            head += 'mode = "observe"\n'
        if draw(st.booleans()):
            network = draw(st.sampled_from(["deny", "ask", "allow"]))
            head += f'default = {{ network = "{network}", tool = "{network}" }}\n'
        bodies = draw(st.lists(rule_bodies, max_size=5))
        found[f"f{number}"] = [head, *(rule_text(n, b) for n, b in enumerate(bodies))]
    return found


@st.composite
def actions(draw: st.DrawFn) -> Action:
    kind = draw(
        st.sampled_from([Kind.NET_CONNECT, Kind.NET_CONNECT, Kind.TOOL_CALL, Kind.DNS_QUERY])
    )
    if kind is Kind.DNS_QUERY:
        return Action(kind, draw(st.sampled_from(HOSTS)))
    if kind is Kind.TOOL_CALL:
        args = draw(st.sampled_from([{}, {"n": 1}, {"n": 3}, {"n": 5}, {"n": "x"}, {"n": None}]))
        return Action(kind, draw(st.sampled_from(TOOLS)), {"args": args})
    port = draw(st.sampled_from([80, 443, 22]))
    attributes: dict[str, Any] = {"port": port}
    if draw(st.booleans()):
        attributes["protocol"] = draw(st.sampled_from(["tls", "http", "opaque"]))
    if draw(st.booleans()):
        host = attributes["host"] = draw(st.sampled_from(HOSTS))
        if draw(st.booleans()):
            attributes["addresses"] = draw(some(ADDRESSES))
    else:
        host = draw(st.sampled_from(ADDRESSES))
        attributes["addresses"] = [host]
        if draw(st.booleans()):
            attributes["answered"] = draw(st.sampled_from(HOSTS))
    return Action(kind, f"[{host}]:{port}" if ":" in host else f"{host}:{port}", attributes)


runs = st.sampled_from([Run("r", agent, "dev", 1000) for agent in AGENTS])


def policy_of(written: dict[str, list[str]]) -> Policy:
    return loads({name: "".join(parts) for name, parts in written.items()})


def decide(written: dict[str, list[str]], run: Run, action: Action) -> Decision:
    return policy_of(written).decide(run, action, now=0.0)


def enforced(written: dict[str, list[str]]) -> dict[str, list[str]]:
    return {n: [parts[0].replace("observe", "enforce"), *parts[1:]] for n, parts in written.items()}


examples = settings(max_examples=150, deadline=None)


@examples
@given(files(), runs, actions(), st.randoms(use_true_random=False))
def test_order_of_rules_and_files_never_matters(
    written: dict[str, list[str]], run: Run, action: Action, order: random.Random
) -> None:
    before = decide(written, run, action)
    names = list(written)
    order.shuffle(names)
    shuffled = {}
    for new_name, name in zip(sorted(names), names, strict=True):
        rules = written[name][1:]
        order.shuffle(rules)
        shuffled[new_name] = [written[name][0], *rules]
    after = decide(shuffled, run, action)
    assert (before.effect, before.rule, before.would) == (after.effect, after.rule, after.would)


@examples
@given(files(), runs, actions(), rule_bodies, st.data())
def test_adding_a_deny_never_allows_more(
    written: dict[str, list[str]], run: Run, action: Action, body: tuple[str, str], data: Any
) -> None:
    before = decide(written, run, action)
    name = data.draw(st.sampled_from(sorted(written)))
    more = {**written, name: [*written[name], rule_text(99, ("deny", body[1]))]}
    assert RANK[decide(more, run, action).effect] <= RANK[before.effect]


@examples
@given(files(), runs, actions(), rule_bodies, st.data())
def test_adding_an_allow_never_allows_what_a_deny_names(
    written: dict[str, list[str]], run: Run, action: Action, body: tuple[str, str], data: Any
) -> None:
    before = decide(written, run, action)
    name = data.draw(st.sampled_from(sorted(written)))
    more = {**written, name: [*written[name], rule_text(99, ("allow", body[1]))]}
    after = decide(more, run, action)
    if before.effect is Effect.DENY and not before.rule.startswith("<"):
        assert after.effect is Effect.DENY
    # A name is resolved if any of its ports may be allowed, so there allow goes before ask.
    asked = before.effect is Effect.ASK and not before.rule.startswith("<")
    if asked and action.kind is not Kind.DNS_QUERY:
        assert after.effect is not Effect.ALLOW


@examples
@given(files(), runs, actions())
def test_explain_and_decide_agree(written: dict[str, list[str]], run: Run, action: Action) -> None:
    policy = policy_of(written)
    decision = policy.decide(run, action, now=0.0)
    explanation = policy.explain(run, action, now=0.0)
    assert explanation.decision == decision
    matched = {step.rule for step in explanation.steps if step.matched}
    if "/" in decision.rule:
        assert decision.rule in matched


@examples
@given(files(), runs, actions())
def test_what_the_step_of_names_denies_the_step_of_addresses_does_not_allow(
    written: dict[str, list[str]], run: Run, action: Action
) -> None:
    if "host" not in action.attributes or "addresses" not in action.attributes:
        return
    names = {k: v for k, v in action.attributes.items() if k != "addresses"}
    first = decide(written, run, Action(action.kind, action.target, names))
    second = decide(written, run, action)
    assert RANK[second.effect] <= RANK[first.effect]


@examples
@given(files(), runs, actions())
def test_a_further_address_never_allows_more(
    written: dict[str, list[str]], run: Run, action: Action
) -> None:
    if "host" not in action.attributes or "addresses" not in action.attributes:
        return
    fewer = decide(written, run, action)
    for address in ADDRESSES:
        addresses = [*action.attributes["addresses"], address]
        more = Action(action.kind, action.target, {**action.attributes, "addresses": addresses})
        assert RANK[decide(written, run, more).effect] <= RANK[fewer.effect]


@examples
@given(files(), runs, actions())
def test_files_that_observe_change_nothing_for_those_that_enforce(
    written: dict[str, list[str]], run: Run, action: Action
) -> None:
    decision = decide(written, run, action)
    if decision.mode is Mode.OBSERVE:
        assert decision.effect is Effect.ALLOW
        assert decision.would is decide(enforced(written), run, action).effect
        return
    alone = {n: parts for n, parts in written.items() if "observe" not in parts[0]}
    if alone:
        expected = decide(alone, run, action)
        assert (decision.effect, decision.rule) == (expected.effect, expected.rule)
    if decision.would is not None:
        assert decision.would is decide(enforced(written), run, action).effect


@examples
@given(files(), runs, actions(), files())
def test_a_further_file_without_allow_rules_never_widens(
    written: dict[str, list[str]], run: Run, action: Action, others: dict[str, list[str]]
) -> None:
    before = decide(written, run, action)
    if before.rule == "<no-policy>":
        return
    parts = enforced(others)["f0"]
    narrow = [p for p in parts if '"allow"' not in p.split("network =")[0].split("tool =")[0]]
    narrow = [parts[0].replace("p0", "extra"), *(p for p in narrow if p.startswith("[[rule]]"))]
    after = decide({**written, "extra": narrow}, run, action)
    if before.effect is Effect.DENY and before.mode is Mode.ENFORCE:
        # An ask rule can turn a default of deny into a question, never into an allow.
        assert after.effect is not Effect.ALLOW
    if before.effect is Effect.ASK:
        assert after.effect is not Effect.ALLOW


@given(st.one_of(st.integers(0, 2**32 - 1), st.integers(0, 2**128 - 1)))
def test_guard_list_leaves_nothing_that_is_not_global(number: int) -> None:
    """Against the standard library's own tables, which know no metadata addresses of their own."""
    address = ipaddress.ip_address(number)
    found = place(str(address))
    if found.inner is None and not address.is_global:
        assert found.guard, address


@given(st.ip_addresses(v=4))
def test_every_way_to_write_a_guarded_v4_address_in_v6_is_guarded(
    address: ipaddress.IPv4Address,
) -> None:
    plain = place(str(address))
    number = int(address)
    for v6 in (
        ipaddress.IPv6Address((0xFFFF << 32) | number),
        ipaddress.IPv6Address((0x64FF9B << 96) | number),
        ipaddress.IPv6Address((0x2002 << 112) | (number << 80) | 1),
    ):
        assert bool(place(str(v6)).guard) == bool(plain.guard)
    assert place(str(ipaddress.IPv6Address(number))).guard
