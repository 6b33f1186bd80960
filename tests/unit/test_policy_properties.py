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
from aa.policy.engine import SECTIONS

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
METHODS = ["GET", "POST", "DELETE"]
REQUEST_PATHS = ["/", "/a", "/a/b", "/a/b/c", "/b", "/a/", "/%61/b", "/a/../b", "/a%2fb", "*"]
PATH_PATTERNS = ["/a", "/a/*", "/a/**", "/**", "/*", "/**/b", "/"]
HEADERS = [{}, {"x-v": "1"}, {"x-v": "2"}, {"x-v": "1, 2"}, {"x-v": "3", "x-w": "1"}]
SECRETS = ["jwt", "aws-access-key", "any"]
TEXTS = ["*p*", "*q*"]
FILES = ["/a", "/a/b", "/a/b/c", "/home/dev", "/home/dev/x", "/home/dev/x/y", "/home/dev/work/f"]
FILE_PATTERNS = ["/a", "/a/*", "/a/**", "~/x", "~/x/**", "~/**", "/**/c", "/home/*/x"]
MODELS = ["big-1", "small-1", "small-2"]
MONDAY = 1767571200  # 2026-01-05, 0:00 UTC
TIMES = [0, MONDAY, MONDAY + 10 * 3600, MONDAY + 5 * 86400, 1e18]
WHENS = [
    '{ days = ["mon-fri"] }',
    '{ hours = "09:00-18:00", timezone = "Europe/Berlin" }',
    '{ not = { days = ["mon"], hours = "22:00-08:00" } }',
]


def some(values: list[Any], most: int = 3) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=most, unique=True)


def toml_list(values: list[Any]) -> str:
    return "[" + ", ".join(str(v) if isinstance(v, int) else f'"{v}"' for v in values) + "]"


def table(keys: dict[str, str]) -> str:
    return "{ " + ", ".join(f"{k} = {v}" for k, v in keys.items()) + " }"


def maybe(draw: st.DrawFn, one_in: int = 2) -> bool:
    return draw(st.integers(1, one_in)) == 1


@st.composite
def networks(draw: st.DrawFn, effect: str) -> str:
    keys = {}
    which = draw(st.sampled_from(["hosts", "hosts", "cidrs", "both"]))
    if which != "cidrs":
        keys["hosts"] = toml_list(draw(some(PATTERNS)))
    if which in ("cidrs", "both"):
        keys["cidrs"] = toml_list(draw(some(CIDRS)))
    if maybe(draw):
        keys["ports"] = toml_list(draw(some([80, 443, 22])))
    if maybe(draw):
        return "network = " + table({**keys, **draw(contents(effect))})
    if maybe(draw):
        keys["protocol"] = '"' + draw(st.sampled_from(["tls", "http", "opaque"])) + '"'
    return "network = " + table(keys)


@st.composite
def contents(draw: st.DrawFn, effect: str) -> dict[str, str]:
    keys = {}
    if maybe(draw):
        keys["methods"] = toml_list(draw(some(METHODS)))
    if maybe(draw):
        keys["paths"] = toml_list(draw(some(PATH_PATTERNS)))
    if maybe(draw, 3):
        keys["headers"] = '{ X-V = "' + draw(st.sampled_from(["1", "2", "*"])) + '" }'
    if effect != "deny" and maybe(draw, 3):
        keys["inspect"] = "true"
    if effect != "allow" and maybe(draw):
        body = {"secrets": toml_list(draw(some(SECRETS)))} if maybe(draw) else {}
        if not body or maybe(draw):
            body["text"] = toml_list(draw(some(TEXTS)))
        keys["body"] = table(body)
    if effect != "allow" and maybe(draw, 3):
        ws = {"text": toml_list(draw(some(TEXTS)))}
        if maybe(draw):
            ws["direction"] = '"' + draw(st.sampled_from(["in", "out"])) + '"'
        keys["ws"] = table(ws)
    return keys


@st.composite
def arguments(draw: st.DrawFn) -> str:
    operators = ["gt = 3", "lt = 3", "eq = 3", 'ne = "x"', "exists = true", "in = [1, 3]"]
    return "{ n = { " + draw(st.sampled_from(operators)) + " } }"


@st.composite
def others(draw: st.DrawFn, effect: str) -> str:
    """A matcher of a section other than network."""
    sections = ["tool", "dns", "mcp", "llm"]
    section = draw(
        st.sampled_from(sections if effect == "ask" else [*sections, "exec", "file", "in"])
    )
    if section == "tool":
        keys = {"names": toml_list(draw(some(NAMES)))}
        if maybe(draw):
            keys["args"] = draw(arguments())
        return "tool = " + table(keys)
    if section == "dns":
        return "dns = " + table({"names": toml_list(draw(some(PATTERNS)))})
    if section == "mcp":
        keys = {"server": toml_list(draw(some(["s", "s*", "t"])))} if maybe(draw) else {}
        if not keys or maybe(draw):
            keys["tool"] = toml_list(draw(some(NAMES)))
        elif maybe(draw):
            keys["method"] = toml_list(draw(some(["tools/*", "ping"])))
        if "method" not in keys and maybe(draw, 3):
            keys["args"] = draw(arguments())
        return "mcp = " + table(keys)
    if section == "llm":
        keys = {"provider": '"p*"'} if maybe(draw) else {}
        if not keys or maybe(draw):
            keys["model"] = toml_list(draw(some(["big-*", "small-1", "*-1"])))
        return "llm = " + table(keys)
    if section == "exec":
        return "exec = " + table({"paths": toml_list(draw(some(FILE_PATTERNS)))})
    if section == "file":
        access = toml_list(draw(some(["read", "write", "delete"])))
        return "file = " + table({"paths": toml_list(draw(some(FILE_PATTERNS))), "access": access})
    keys = {"cidrs": toml_list(draw(some(CIDRS)))}
    if maybe(draw):
        keys["ports"] = "[80]"
    return "inbound = " + table(keys)


@st.composite
def bodies(draw: st.DrawFn, *effects: str) -> tuple[str, str]:
    """An effect, and the rest of a rule."""
    effect = draw(st.sampled_from(effects or ("allow", "deny", "ask")))
    matcher = draw(st.one_of(networks(effect), others(effect)))
    when = f"\nwhen = {draw(st.sampled_from(WHENS))}" if maybe(draw, 4) else ""
    return effect, matcher + when


def rule_text(number: int, body: tuple[str, str]) -> str:
    return f'[[rule]]\nid = "r{number}"\neffect = "{body[0]}"\n{body[1]}\n'


@st.composite
def files(draw: st.DrawFn) -> dict[str, list[str]]:
    """File name -> its head and its rules, each as text."""
    found = {}
    for number in range(draw(st.integers(1, 3))):
        head = f'[policy]\nid = "p{number}"\n'
        if maybe(draw):
            head += f"applies_to = {{ agents = {toml_list(draw(some(AGENTS)))} }}\n"
        if maybe(draw, 3):
            head += 'mode = "observe"\n'
        default = draw(st.sampled_from(["deny", "ask", "allow"]))
        kernel = draw(st.sampled_from(["deny", "allow"]))
        stated = {name: default for name in ("network", "dns", "tool", "mcp", "llm")}
        stated |= {"exec": kernel, "file": draw(st.sampled_from([kernel, "sandbox"]))}
        head += "default = " + table({k: f'"{v}"' for k, v in stated.items()}) + "\n"
        found[f"f{number}"] = [
            head,
            *map(rule_text, range(5), draw(st.lists(bodies(), max_size=5))),
        ]
        if maybe(draw, 3):
            found[f"f{number}"].append('[sandbox]\nwritable = ["."]\nread_only = ["x", "/a/b"]\n')
    return found


@st.composite
def actions(draw: st.DrawFn, *kinds: Kind) -> Action:
    chosen = draw(st.sampled_from(kinds or ACTION_KINDS))
    match chosen:
        case Kind.DNS_QUERY:
            return Action(chosen, draw(st.sampled_from(HOSTS)))
        case Kind.TOOL_CALL:
            return Action(chosen, draw(st.sampled_from(TOOLS)), {"args": draw(given_arguments)})
        case Kind.MCP_CALL:
            server = draw(st.sampled_from(["s", "s1", "t"]))
            if maybe(draw, 4):
                return Action(
                    chosen, f"{server}/", {"method": draw(st.sampled_from(["ping", "x"]))}
                )
            more = {"args": draw(given_arguments)}
            return Action(chosen, f"{server}/{draw(st.sampled_from(TOOLS))}", more)
        case Kind.LLM_REQUEST:
            provider = draw(st.sampled_from(["p", "p1", "q"]))
            return Action(chosen, f"{provider}/{draw(st.sampled_from(MODELS))}")
        case Kind.EXEC | Kind.FILE_UNLINK:
            return Action(chosen, draw(st.sampled_from(FILES)))
        case Kind.FILE_OPEN:
            access = draw(st.sampled_from(["read", "write", ["read", "write"]]))
            return Action(chosen, draw(st.sampled_from(FILES)), {"access": access})
        case Kind.FILE_RENAME:
            return Action(
                chosen, draw(st.sampled_from(FILES)), {"to": draw(st.sampled_from(FILES))}
            )
        case Kind.NET_ACCEPT:
            return Action(chosen, _end(draw(st.sampled_from(ADDRESSES)), 80))
        case Kind.HTTP_REQUEST:
            return draw(requests())
    return draw(connections())


ACTION_KINDS = [*SECTIONS, *[Kind.NET_CONNECT, Kind.HTTP_REQUEST] * 4]
given_arguments = st.sampled_from([{}, {"n": 1}, {"n": 3}, {"n": 5}, {"n": "x"}, {"n": None}])


def _end(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@st.composite
def connections(draw: st.DrawFn) -> Action:
    port = draw(st.sampled_from([80, 443, 22]))
    attributes: dict[str, Any] = {"port": port}
    if maybe(draw):
        attributes["protocol"] = draw(st.sampled_from(["tls", "http", "opaque"]))
    if maybe(draw):
        host = attributes["host"] = draw(st.sampled_from(HOSTS))
        if maybe(draw):
            attributes["addresses"] = draw(some(ADDRESSES))
    else:
        host = draw(st.sampled_from(ADDRESSES))
        attributes["addresses"] = [host]
        if maybe(draw):
            attributes["answered"] = draw(st.sampled_from(HOSTS))
    if "addresses" in attributes and maybe(draw, 8):
        attributes["own_listener"] = True
    return Action(Kind.NET_CONNECT, _end(host, port), attributes)


@st.composite
def requests(draw: st.DrawFn) -> Action:
    port = draw(st.sampled_from([80, 443]))
    address = draw(st.sampled_from(ADDRESSES))
    host = draw(st.sampled_from([*HOSTS, address]))
    attributes = {
        "host": host,
        "port": port,
        "addresses": [address],
        "protocol": draw(st.sampled_from(["tls", "http"])),
        "method": draw(st.sampled_from([*METHODS, "get"])),
        "path": draw(st.sampled_from(REQUEST_PATHS)),
        "headers": draw(st.sampled_from(HEADERS)),
    }
    for key in ("method", "path", "headers"):
        if maybe(draw, 10):
            del attributes[key]
    found = {"secrets": draw(found_secrets), "texts": draw(found_texts), "bytes": 1}
    if maybe(draw, 3):
        attributes["body"] = found
    elif maybe(draw, 3):
        attributes["ws"] = {"direction": draw(st.sampled_from(["in", "out"])), **found}
    return Action(Kind.HTTP_REQUEST, _end(host, port), attributes)


found_secrets = st.lists(st.sampled_from(["jwt", "aws-access-key", "google-key"]), unique=True)
found_texts = st.lists(st.sampled_from(TEXTS), unique=True)
times = st.sampled_from(TIMES)


RUNS = [Run("r", agent, "dev", 1000, "/home/dev", directory="/home/dev/work") for agent in AGENTS]
RUNS += [Run("r", "one", "dev", 1000)]  # of which home and directory are not known
runs = st.sampled_from(RUNS)


def policy_of(written: dict[str, list[str]]) -> Policy:
    return loads({name: "".join(parts) for name, parts in written.items()})


def decide(written: dict[str, list[str]], run: Run, action: Action, now: float = 0.0) -> Decision:
    return policy_of(written).decide(run, action, now=now)


def enforced(written: dict[str, list[str]]) -> dict[str, list[str]]:
    return {n: [parts[0].replace("observe", "enforce"), *parts[1:]] for n, parts in written.items()}


def by_a_rule(decision: Decision) -> bool:
    return not decision.rule.startswith("<")


def goes_on_to_inspection(decision: Decision) -> bool:
    """Then its requests are decided one by one, so nothing is allowed by it alone."""
    return any(o.name == "inspect" for o in decision.obligations)


examples = settings(max_examples=100, deadline=None)


@examples
@given(files(), runs, actions(), times, st.randoms(use_true_random=False))
def test_order_of_rules_and_files_never_matters(
    written: dict[str, list[str]], run: Run, action: Action, now: float, order: random.Random
) -> None:
    before = decide(written, run, action, now)
    names = list(written)
    order.shuffle(names)
    shuffled = {}
    for new_name, name in zip(sorted(names), names, strict=True):
        parts = written[name][1:]
        order.shuffle(parts)
        shuffled[new_name] = [written[name][0], *parts]
    after = decide(shuffled, run, action, now)
    assert (before.effect, before.rule, before.would) == (after.effect, after.rule, after.would)
    assert before.obligations == after.obligations
    assert before.asked_by == after.asked_by


@examples
@given(files(), runs, actions(), times, bodies("deny"), st.data())
def test_adding_a_deny_never_allows_more(
    written: dict[str, list[str]],
    run: Run,
    action: Action,
    now: float,
    body: tuple[str, str],
    data: Any,
) -> None:
    before = decide(written, run, action, now)
    name = data.draw(st.sampled_from(sorted(written)))
    more = {**written, name: [*written[name], rule_text(99, body)]}
    after = decide(more, run, action, now)
    assert RANK[after.effect] <= RANK[before.effect]
    if goes_on_to_inspection(before) and after.effect is not Effect.DENY:
        assert goes_on_to_inspection(after)


@examples
@given(files(), runs, actions(), times, bodies("allow"), st.data())
def test_adding_an_allow_never_allows_what_a_deny_names(
    written: dict[str, list[str]],
    run: Run,
    action: Action,
    now: float,
    body: tuple[str, str],
    data: Any,
) -> None:
    before = decide(written, run, action, now)
    name = data.draw(st.sampled_from(sorted(written)))
    more = {**written, name: [*written[name], rule_text(99, body)]}
    after = decide(more, run, action, now)
    if before.effect is Effect.DENY and by_a_rule(before):
        assert after.effect is Effect.DENY
    # A name is resolved if any of its ports may be allowed, so there allow goes before ask.
    if before.effect is Effect.ASK and by_a_rule(before) and action.kind is not Kind.DNS_QUERY:
        assert after.effect is not Effect.ALLOW or (
            action.kind is Kind.NET_CONNECT and goes_on_to_inspection(after)
        )


@examples
@given(files(), runs, actions(), times)
def test_explain_and_decide_agree(
    written: dict[str, list[str]], run: Run, action: Action, now: float
) -> None:
    policy = policy_of(written)
    decision = policy.decide(run, action, now=now)
    explanation = policy.explain(run, action, now=now)
    assert explanation.decision == decision
    matched = {step.rule for step in explanation.steps if step.matched}
    if by_a_rule(decision):
        assert decision.rule in matched
    section = SECTIONS[action.kind].value
    told = {step.rule for step in explanation.steps}
    for file in policy.files:
        if file.applies_to.selects(run):
            about = {r.ref for r in file.rules if r.section == section}
            assert about <= told or decision.rule in ("<malformed-action>", "<invalid-host>")


@examples
@given(files(), runs, actions(Kind.NET_CONNECT), times)
def test_what_the_step_of_names_denies_the_step_of_addresses_does_not_allow(
    written: dict[str, list[str]], run: Run, action: Action, now: float
) -> None:
    if "host" not in action.attributes or "addresses" not in action.attributes:
        return
    if "own_listener" in action.attributes:
        return  # only the step of addresses can know it
    names = {k: v for k, v in action.attributes.items() if k != "addresses"}
    first = decide(written, run, Action(action.kind, action.target, names), now)
    second = decide(written, run, action, now)
    if first.effect is Effect.ASK and second.effect is Effect.ALLOW:
        # Whoever asks about some addresses alone has nothing to ask about the others.
        steps = policy_of(written).explain(run, action, now=now).steps
        assert not set(first.asked_by) & {step.rule for step in steps if step.matched}
    else:
        assert RANK[second.effect] <= RANK[first.effect]


@examples
@given(files(), runs, requests(), times)
def test_no_request_is_allowed_in_a_connection_that_is_not(
    written: dict[str, list[str]], run: Run, action: Action, now: float
) -> None:
    kept = ("host", "port", "addresses", "protocol")
    connection = {key: action.attributes[key] for key in kept}
    whole = decide(written, run, Action(Kind.NET_CONNECT, action.target, connection), now)
    request = decide(written, run, action, now)
    assert RANK[request.effect] <= RANK[whole.effect]


@examples
@given(files(), runs, requests(), times, found_secrets, found_texts)
def test_what_is_found_in_a_body_never_allows_more(
    written: dict[str, list[str]],
    run: Run,
    action: Action,
    now: float,
    secrets: list[str],
    texts: list[str],
) -> None:
    plain = {k: v for k, v in action.attributes.items() if k not in ("body", "ws")}
    first = decide(written, run, Action(action.kind, action.target, plain), now)
    for key in ("body", "ws"):
        some_facts = {"secrets": secrets, "texts": texts, "direction": "out"}
        all_facts = {"secrets": ["jwt", "aws-access-key"], "texts": TEXTS, "direction": "out"}
        second, third = (
            decide(written, run, Action(action.kind, action.target, {**plain, key: facts}), now)
            for facts in (some_facts, all_facts)
        )
        assert RANK[third.effect] <= RANK[second.effect] <= RANK[first.effect]


@examples
@given(files(), runs, actions(Kind.NET_CONNECT), times)
def test_a_further_address_never_allows_more(
    written: dict[str, list[str]], run: Run, action: Action, now: float
) -> None:
    if "host" not in action.attributes or "addresses" not in action.attributes:
        return
    fewer = decide(written, run, action, now)
    for address in ADDRESSES:
        addresses = [*action.attributes["addresses"], address]
        more = Action(action.kind, action.target, {**action.attributes, "addresses": addresses})
        assert RANK[decide(written, run, more, now).effect] <= RANK[fewer.effect]


@examples
@given(files(), runs, actions(), times)
def test_files_that_observe_change_nothing_for_those_that_enforce(
    written: dict[str, list[str]], run: Run, action: Action, now: float
) -> None:
    decision = decide(written, run, action, now)
    if decision.mode is Mode.OBSERVE:
        assert decision.effect is Effect.ALLOW
        assert decision.would is decide(enforced(written), run, action, now).effect
        return
    alone = {n: parts for n, parts in written.items() if "observe" not in parts[0]}
    if alone:
        expected = decide(alone, run, action, now)
        assert (decision.effect, decision.rule) == (expected.effect, expected.rule)
        assert goes_on_to_inspection(decision) == goes_on_to_inspection(expected)
    if decision.would is not None:
        assert decision.would is decide(enforced(written), run, action, now).effect


@examples
@given(files(), runs, actions(), times, st.lists(bodies("deny", "ask"), max_size=5))
def test_a_further_file_without_allow_rules_never_widens(
    written: dict[str, list[str]],
    run: Run,
    action: Action,
    now: float,
    narrow: list[tuple[str, str]],
) -> None:
    before = decide(written, run, action, now)
    if before.rule == "<no-policy>" or before.mode is Mode.OBSERVE:
        return
    extra = ['[policy]\nid = "extra"\n', *map(rule_text, range(5), narrow)]
    after = decide({**written, "extra": extra}, run, action, now)
    # An ask rule can turn a default of deny into a question, or let a connection go on to
    # inspection to ask about its requests, never into an allow of anything.
    if before.effect is not Effect.ALLOW and after.effect is Effect.ALLOW:
        assert action.kind in (Kind.NET_CONNECT, Kind.DNS_QUERY)
        assert goes_on_to_inspection(after) or action.kind is Kind.DNS_QUERY


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
