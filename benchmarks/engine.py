"""What a decision of the policy engine costs, beside cedarpy and agent-os-kernel in the same process.

    python3 -m benchmarks.engine

The two other engines are not in Debian: `make bench` installs them into build/bench, and this module
starts itself again with the Python there.

How the rule sets are made equivalent. `RuleSet` is a list of plain rules of three shapes that all
three languages can say: a tool by name with an amount below a bound; a request by host, method and
path; a host with its subdomains. One rule in ten denies. Each is written as a policy file for us,
as a `permit` or `forbid` with an `@id` for Cedar, and as a rule with one condition per part for
Agent OS, where denials get the higher priority, because there the first match wins. Before anything
is measured, all three must give the same effect and name the same rule for every question. What
is measured is what a caller needs: the effect, the rule that decided, and the reason as text (Cedar
has none, so its part is the list of determining policies). Rules, and Cedar's entities, are parsed
before.

Our own numbers with "mixed" are of rules of every section; some of them cannot be said in the
other languages.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aa.model import Action, Effect, Kind, Run
from aa.policy import Policy, loads
from benchmarks.measures import Measure

OTHERS = Path(__file__).resolve().parents[1] / "build/bench/bin/python"
"""A Python that has the other engines."""

ROUNDS = 5
CALLS = 20_000  # of one round
SLOW_CALLS = 300  # of the others, of one round
NAMES = 64  # different questions that take turns
SIZES = (100, 1_000, 10_000)
COMPARED = (100, 1_000)  # rules
RUN = Run("r", "claude-code", "dev", 1000, home="/home/dev", directory="/home/dev/work")
NOW = 1_767_600_000.0

Ask = Callable[[Any], object]


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds of one call: the medians of the rounds."""

    median: float
    p99: float

    def __str__(self) -> str:
        return f"{self.median:.2f} us, 99th percentile {self.p99:.2f} us"


def measured(ask: Ask, questions: Sequence[Any], calls: int) -> Times:
    """Asks in turn, each call timed by itself."""
    medians, tails = [], []
    clock = time.perf_counter_ns
    for _ in range(ROUNDS):
        spent = []
        for question in itertools.islice(itertools.cycle(questions), calls):
            begin = clock()
            ask(question)
            spent.append(clock() - begin)
        spent.sort()
        medians.append(spent[len(spent) // 2] / 1000)
        tails.append(spent[len(spent) * 99 // 100] / 1000)
    return Times(statistics.median(medians), statistics.median(tails))


# -- rules of every section --------------------------------------------------------------------

MIXED = (
    'network = {{ hosts = ["api{n}.example"], methods = ["POST", "GET"], paths = ["/v1/messages", "/v1/files/*"] }}',
    'network = {{ hosts = ["h{n}.example", "**.d{n}.example"] }}',
    'tool = {{ names = ["tool{n}", "group{n}_*"], args = {{ amount = {{ lt = 1000 }}, to.country = {{ in = ["DE", "FR"] }} }} }}',
    'network = {{ cidrs = ["10.{a}.{b}.0/24"], ports = [443] }}',
    'dns = {{ names = ["**.n{n}.example"] }}',
    'mcp = {{ server = "server{n}", tool = ["get_*", "list_*"] }}',
    'tool = {{ names = ["search{n}"] }}\nwhen = {{ days = ["mon-fri"], hours = "08:00-18:00" }}',
    'file = {{ paths = ["/srv/d{n}/**", "~/d{n}/*"], access = ["read"] }}',
    'exec = {{ paths = ["/opt/d{n}/bin/*"] }}',
    'llm = {{ provider = "p{n}", model = "small-*" }}',
)  # fmt: skip
EVERYWHERE = """
[[rule]]
id = "no-delete"
effect = "deny"
network = { hosts = ["**"], methods = ["DELETE"] }
[[rule]]
id = "no-force"
effect = "deny"
tool = { names = ["*"], args = { force = { eq = true } } }
"""
"""Rules that match every name, so that each question has something to weigh."""


def mixed(size: int) -> Policy:
    rules = "".join(
        f'[[rule]]\nid = "r{n}"\neffect = "allow"\n'
        + MIXED[n % len(MIXED)].format(n=n, a=n // 256 % 256, b=n % 256)
        + "\n"
        for n in range(size - 2)
    )
    # A tool call without `force` must not be denied for its absence.
    everywhere = EVERYWHERE.replace("{ eq = true }", "{ exists = true }")
    head = '[policy]\nid = "mixed"\ndefault = { llm = "deny" }\n'
    return loads({"mixed.toml": head + rules + everywhere})


def tool_calls(size: int) -> list[Action]:
    args = {"amount": 120, "to": {"country": "DE", "iban": "DE00"}, "memo": "invoice 7"}
    numbers = [n for n in range(size - 2) if n % len(MIXED) == 2]
    return [Action(Kind.TOOL_CALL, f"tool{n}", {"args": args}) for n in numbers[:NAMES]]


def http_requests(size: int) -> list[Action]:
    numbers = [n for n in range(size - 2) if n % len(MIXED) == 0]
    return [http_request(f"api{n}.example") for n in numbers[:NAMES]]


def http_request(host: str, path: str = "/v1/messages", method: str = "POST") -> Action:
    attributes = {
        "host": host,
        "port": 443,
        "addresses": ["93.184.216.34"],
        "protocol": "tls",
        "method": method,
        "path": path,
        "headers": {},
        "http": "2",
    }
    return Action(Kind.HTTP_REQUEST, f"{host}:443", attributes)


def decider(policy: Policy) -> Ask:
    return lambda action: policy.decide(RUN, action, now=NOW)


def of_sizes() -> Iterator[Measure]:
    found: dict[tuple[str, int], Times] = {}
    for size in SIZES:
        policy = mixed(size)
        for name, questions in (
            ("tool call", tool_calls(size)),
            ("HTTP request", http_requests(size)),
        ):
            for question in questions:
                assert policy.decide(RUN, question, now=NOW).permits, question
            times = found[name, size] = measured(decider(policy), questions, CALLS)
            how = f"median; one process, {CALLS} calls in {ROUNDS} rounds, {NAMES} names in turn"
            yield Measure(f"engine: {name}, {size:,} mixed rules", str(times), how)
        if size == SIZES[1]:
            yield _first(policy)
    for name in ("tool call", "HTTP request"):
        most, least = found[name, SIZES[-1]], found[name, SIZES[0]]
        yield Measure(
            f"engine: {name}, {SIZES[-1]:,} rules to {SIZES[0]}",
            f"{most.median / least.median:.2f} times",
            "ratio of the medians above",
        )


def _first(policy: Policy) -> Measure:
    """A host that was never asked about, each time: nothing is remembered."""
    questions = [http_request(f"x{n}.d1.example", f"/p{n}") for n in range(CALLS * ROUNDS)]
    times = measured_once(decider(policy), questions)
    return Measure("engine: HTTP request, new host and path each time", str(times), "1,000 rules")


def measured_once(ask: Ask, questions: Sequence[Any]) -> Times:
    spent = []
    clock = time.perf_counter_ns
    for question in questions:
        begin = clock()
        ask(question)
        spent.append(clock() - begin)
    spent.sort()
    return Times(spent[len(spent) // 2] / 1000, spent[len(spent) * 99 // 100] / 1000)


# -- rules that all three can say --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plain:
    """A rule in no language. Either a tool, or a host with or without method and path."""

    id: str
    allows: bool
    tool: str = ""
    below: int = 0
    host: str = ""
    method: str = ""
    path: str = ""
    subdomains: bool = False


def rule_set(size: int) -> list[Plain]:
    found = []
    for n in range(size):
        allows = n % 10 != 9
        match n % 3:
            case 0:
                found.append(Plain(f"r{n}", allows, tool=f"tool{n}", below=1000))
            case 1:
                path = f"/v1/resource{n}"
                found.append(
                    Plain(f"r{n}", allows, host=f"api{n}.example", method="POST", path=path)
                )
            case _:
                found.append(Plain(f"r{n}", allows, host=f"d{n}.example", subdomains=True))
    return found


@dataclass(frozen=True, slots=True)
class Question:
    """What an agent tries, in no language, and what must be answered."""

    effect: str
    rule: str
    tool: str = ""
    amount: int = 0
    host: str = ""
    method: str = ""
    path: str = ""


def questions_of(rules: Sequence[Plain]) -> list[Question]:
    """One about each of `NAMES` rules spread over the set, so that none is near an end by chance."""
    step = max(1, len(rules) // NAMES)
    found = []
    for rule in rules[::step][:NAMES]:
        effect = "allow" if rule.allows else "deny"
        if rule.tool:
            found.append(Question(effect, rule.id, tool=rule.tool, amount=120))
        else:
            host = f"www.{rule.host}" if rule.subdomains else rule.host
            path = rule.path or "/index"
            found.append(
                Question(effect, rule.id, host=host, method=rule.method or "GET", path=path)
            )
    return found


Answer = tuple[str, str, object]
"""Effect, rule, and the reason."""


def ours(rules: Sequence[Plain]) -> Callable[[Question], tuple[Any, Callable[[Any], Answer]]]:
    text = '[policy]\nid = "p"\n'
    for r in rules:
        text += f'[[rule]]\nid = "{r.id}"\neffect = "{"allow" if r.allows else "deny"}"\n'
        if r.tool:
            text += (
                f'tool = {{ names = ["{r.tool}"], args = {{ amount = {{ lt = {r.below} }} }} }}\n'
            )
        elif r.subdomains:
            text += f'network = {{ hosts = ["**.{r.host}"] }}\n'
        else:
            content = f'methods = ["{r.method}"], paths = ["{r.path}"]'
            text += f'network = {{ hosts = ["{r.host}"], {content} }}\n'
    policy = loads({"p.toml": text})

    def ask(action: Action) -> Answer:
        decision = policy.decide(RUN, action, now=NOW)
        return decision.effect, decision.rule, decision.reason

    def prepare(q: Question) -> tuple[Any, Callable[[Any], Answer]]:
        if q.tool:
            return Action(Kind.TOOL_CALL, q.tool, {"args": {"amount": q.amount}}), ask
        return http_request(q.host, q.path, q.method), ask

    return prepare


def cedar(rules: Sequence[Plain]) -> Callable[[Question], tuple[Any, Callable[[Any], Answer]]]:
    import cedarpy

    text = ""
    for r in rules:
        action = "call" if r.tool else "request"
        parts = []
        if r.tool:
            head = f'resource == Tool::"{r.tool}"'
            parts.append(f"context.amount < {r.below}")
        else:
            head = "resource"
            if r.subdomains:
                parts.append(f'context.host like "*.{r.host}"')
            else:
                parts.append(f'context.host == "{r.host}"')
                parts += [f'context.method == "{r.method}"', f'context.path == "{r.path}"']
        effect = "permit" if r.allows else "forbid"
        text += f'@id("{r.id}") {effect}(principal, action == Action::"{action}", {head}) '
        text += f"when {{ {' && '.join(parts)} }};\n"
    policies = cedarpy.PolicySet.from_str(text)
    entities = cedarpy.Entities.from_json_str("[]")

    def ask(request: dict[str, Any]) -> Answer:
        result = cedarpy.is_authorized(request, policies, entities)
        named = result.diagnostics.id_annotations_by_reason
        (rule,) = named.values()
        return "allow" if result.allowed else "deny", rule, result.diagnostics.reasons

    def prepare(q: Question) -> tuple[Any, Callable[[Any], Answer]]:
        request: dict[str, Any] = {"principal": 'Agent::"claude-code"'}
        if q.tool:
            request |= {"action": 'Action::"call"', "resource": f'Tool::"{q.tool}"'}
            return {**request, "context": {"amount": q.amount}}, ask
        request |= {"action": 'Action::"request"', "resource": 'Web::"web"'}
        context = {"host": q.host, "method": q.method, "path": q.path}
        return {**request, "context": context}, ask

    return prepare


def agent_os(rules: Sequence[Plain]) -> Callable[[Question], tuple[Any, Callable[[Any], Answer]]]:
    from agent_os.policies import Condition, SharedPolicyEvaluator, SharedPolicyRule

    written = []
    for r in rules:
        if r.tool:
            conditions = [Condition("tool", "eq", r.tool), Condition("amount", "lt", r.below)]
        elif r.subdomains:
            pattern = r"\." + r.host.replace(".", r"\.") + "$"
            conditions = [Condition("host", "matches", pattern)]
        else:
            conditions = [Condition("host", "eq", r.host), Condition("method", "eq", r.method)]
            conditions.append(Condition("path", "eq", r.path))
        action, priority = ("allow", 0) if r.allows else ("deny", 1)
        written.append(SharedPolicyRule(r.id, action, conditions, priority))
    evaluator = SharedPolicyEvaluator()

    def ask(context: dict[str, Any]) -> Answer:
        found = evaluator.evaluate(context, written)
        return found.action, found.matched_rule_id or "", found.reason

    def prepare(q: Question) -> tuple[Any, Callable[[Any], Answer]]:
        if q.tool:
            return {"tool": q.tool, "amount": q.amount}, ask
        return {"host": q.host, "method": q.method, "path": q.path}, ask

    return prepare


def compared() -> Iterator[Measure]:
    from importlib.metadata import version

    engines = {
        "ours": (ours, CALLS),
        f"cedarpy {version('cedarpy')}": (cedar, SLOW_CALLS),
        f"agent-os-kernel {version('agent-os-kernel')}": (agent_os, SLOW_CALLS),
    }
    for size in COMPARED:
        rules = rule_set(size)
        questions = questions_of(rules)
        own = 0.0
        for name, (engine, calls) in engines.items():
            prepare = engine(rules)
            asked = [prepare(q) for q in questions]
            for q, (form, ask) in zip(questions, asked, strict=True):
                effect, rule, _ = ask(form)
                assert (str(effect), rule.removeprefix("p/")) == (q.effect, q.rule), (name, q)
            times = measured(asked[0][1], [form for form, _ in asked], calls)
            own = own or times.median
            how = f"{len(questions)} questions in turn, the same answers"
            if times.median != own:
                how += f"; {times.median / own:.0f} times ours"
            yield Measure(
                f"engine: one decision, {size:,} equivalent rules: {name}", str(times), how
            )


def measures() -> Iterator[Measure]:
    assert Effect.ALLOW == "allow"
    yield from of_sizes()
    yield from compared()


def main() -> None:
    if importlib.util.find_spec("cedarpy") is None:
        if not OTHERS.exists():
            sys.exit("cedarpy and agent-os-kernel are missing: `make build/bench/bin/pip`")
        os.execv(OTHERS, [str(OTHERS), "-m", "benchmarks.engine"])
    for measure in measures():
        print(json.dumps(asdict(measure)), flush=True)


if __name__ == "__main__":
    main()
