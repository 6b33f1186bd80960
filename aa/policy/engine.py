"""The engine: decides an action of a run by the rules, and explains how. Pure: no I/O, no clock.

`Policy.decide` looks at the rules that an index finds for the question;
`Policy.explain` looks at every rule. Both weigh what matched with the same code.
"""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from aa.model import Action, Decision, Effect, Kind, Mode, Run
from aa.policy.address import Place, place
from aa.policy.check import Finding, findings
from aa.policy.host import InvalidHost, canonical_host
from aa.policy.index import RuleIndex
from aa.policy.limits import Limit
from aa.policy.rules import (
    DEFAULT_PORTS,
    Match,
    NetworkQuestion,
    PolicyFile,
    Rule,
    Section,
    ToolQuestion,
    every_rule,
)

Json = Any

ADDRESSES_LIMIT = 256
"""Addresses of one name that are looked at; a name with more is denied."""
VIEWS_LIMIT = 4096
"""Different kinds of runs whose applicable files are remembered."""
SHOWN_TARGET = 200
"""Characters of a target that a reason repeats."""

NO_POLICY = (
    "there is no policy, so everything is denied; an operator can choose one to begin with: "
    "aasm policy use observe, aasm policy use coding-agent, or aasm policy use locked-down"
)

SECTIONS: Mapping[Kind, Section] = {
    Kind.NET_CONNECT: Section.NETWORK,
    Kind.HTTP_REQUEST: Section.NETWORK,
    Kind.DNS_QUERY: Section.DNS,
    Kind.TOOL_CALL: Section.TOOL,
    Kind.MCP_CALL: Section.MCP,
    Kind.EXEC: Section.EXEC,
    Kind.FILE_OPEN: Section.FILE,
    Kind.FILE_UNLINK: Section.FILE,
    Kind.FILE_RENAME: Section.FILE,
}

_STRICTNESS = ("deny", "ask", "sandbox", "allow")
_EFFECT_RANK = {Effect.DENY: 0, Effect.ASK: 1, Effect.ALLOW: 2}


class Malformed(ValueError):
    """The action does not say what its kind needs, or says it in two ways."""

    def __init__(self, message: str, rule: str = "<malformed-action>") -> None:
        self.rule = rule
        super().__init__(message)


class Verdict(NamedTuple):
    """What a set of rules makes of a question, before modes. `rule` is a Rule or a bracketed name."""

    effect: Effect
    rule: Rule | str
    place: Place | None = None
    words: str = ""
    asks: tuple[Rule | str, ...] = ()
    """Of an ask: all rules that ask, so that an approval for one is not taken for another."""


Pair = tuple[Rule, Match]
Weigh = Callable[[int, Mapping[Section, str]], Verdict]
"""Weighs what matched, for a set of files and their defaults."""


@dataclass(frozen=True, slots=True)
class View:
    """The files that apply to one kind of run, as bits, with the strictest of their defaults."""

    files: tuple[PolicyFile, ...]
    enforced: int
    observed: int
    enforced_defaults: Mapping[Section, str]
    all_defaults: Mapping[Section, str]
    mode: Mode
    limits: tuple[Limit, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that was considered."""

    rule: str
    effect: str
    matched: bool
    why: str
    file: str = ""
    line: int = 0

    def as_json(self) -> dict[str, Json]:
        return {
            "rule": self.rule,
            "effect": self.effect,
            "matched": self.matched,
            "why": self.why,
            "file": self.file,
            "line": self.line,
        }


@dataclass(frozen=True, slots=True)
class Explanation:
    """A decision and everything that was considered for it."""

    decision: Decision
    steps: tuple[Step, ...]

    def as_json(self) -> dict[str, Json]:
        return {"decision": self.decision.as_json(), "steps": [s.as_json() for s in self.steps]}


class Policy:
    """All files of a policy, immutable. Their order makes no difference to any answer."""

    def __init__(self, files: Sequence[PolicyFile], revision: str) -> None:
        self.files = tuple(files)
        self.revision = revision
        self.rules = every_rule(self.files)
        self._index = RuleIndex(self.rules)
        self._views: dict[tuple[str, str, tuple[str, ...]], View] = {}

    # -- the four things it does

    def decide(self, run: Run, action: Action, *, now: float) -> Decision:
        """The answer to an action of a run. `now` is in seconds since the epoch."""
        view = self._view(run)
        return self._answer(view, run, action, self._weigher(view, run, action, now))

    def explain(self, run: Run, action: Action, *, now: float) -> Explanation:
        """The same answer, found by looking at every rule, and why each did or did not match."""
        view = self._view(run)
        steps: list[Step] = [*self._file_steps(view, run)]
        weigh = self._weigher(view, run, action, now, steps)
        decision = self._answer(view, run, action, weigh)
        section = SECTIONS.get(action.kind)
        if section is not None:
            steps += _default_steps(view, section, decision)
        return Explanation(decision, tuple(steps))

    def check(self) -> list[Finding]:
        """What a person should look at in files that are valid."""
        return findings(self.files)

    def writable(self, run: Run) -> tuple[str, ...] | None:
        """Folders that `[sandbox] writable` opens to a run: what all applicable files that state
        it agree on, or None if none states it. `.` is the working directory, `~` the home."""
        stated = [f.writable for f in self._view(run).files if f.writable is not None]
        if not stated:
            return None
        agreed = stated[0]
        for folders in stated[1:]:
            agreed = _common(agreed, folders)
        return tuple(sorted(set(agreed)))

    def limits(self, run: Run) -> tuple[Limit, ...]:
        """The limits of all files that apply to a run."""
        return self._view(run).limits

    # -- which files apply

    def _view(self, run: Run) -> View:
        key = (run.agent, run.user, run.tags)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= VIEWS_LIMIT:
                self._views.clear()
            view = self._views[key] = self._make_view(run)
        return view

    def _make_view(self, run: Run) -> View:
        applicable = [(1 << n, f) for n, f in enumerate(self.files) if f.applies_to.selects(run)]
        enforced = [(bit, f) for bit, f in applicable if f.mode is Mode.ENFORCE]
        observed = [(bit, f) for bit, f in applicable if f.mode is Mode.OBSERVE]
        return View(
            files=tuple(f for _, f in applicable),
            enforced=sum(bit for bit, _ in enforced),
            observed=sum(bit for bit, _ in observed),
            enforced_defaults=_strictest(f for _, f in enforced),
            all_defaults=_strictest(f for _, f in applicable),
            mode=Mode.OBSERVE if observed and not enforced else Mode.ENFORCE,
            limits=tuple(limit for _, f in applicable for limit in f.limits),
        )

    # -- from verdict to decision

    def _answer(self, view: View, run: Run, action: Action, weigh: Weigh) -> Decision:
        """Modes: files that enforce decide. Files that observe take part in `would` alone, so
        that they neither block nor open anything."""
        if not view.files:
            why = NO_POLICY if not self.files else _not_for(run)
            return Decision(Effect.DENY, why, "<no-policy>", self.revision)
        would = weigh(view.enforced | view.observed, view.all_defaults) if view.observed else None
        if view.mode is Mode.OBSERVE:
            assert would is not None
            return Decision(
                Effect.ALLOW,
                _observed_reason(would, action, view),
                _name(would.rule),
                self.revision,
                Mode.OBSERVE,
                would.effect,
            )
        verdict = weigh(view.enforced, view.enforced_defaults)
        return Decision(
            verdict.effect,
            _reason(verdict, action, view),
            _name(verdict.rule),
            self.revision,
            Mode.ENFORCE,
            would.effect if would is not None else None,
            asked_by=tuple(dict.fromkeys(_name(rule) for rule in verdict.asks)),
        )

    def _weigher(
        self, view: View, run: Run, action: Action, now: float, steps: list[Step] | None = None
    ) -> Weigh:
        """Finds out what matches; with `steps`, by looking at every rule and saying why."""
        del now  # no matcher of this version depends on the time
        try:
            match action.kind:
                case Kind.NET_CONNECT | Kind.HTTP_REQUEST:
                    return self._network(view, action, steps)
                case Kind.DNS_QUERY:
                    return self._dns(view, action, steps)
                case Kind.TOOL_CALL:
                    return self._tool(view, action, steps)
                case Kind.MCP_CALL:
                    return _by_default(Section.MCP)
                case Kind.EXEC:
                    return _by_default(Section.EXEC)
                case Kind.FILE_OPEN | Kind.FILE_UNLINK | Kind.FILE_RENAME:
                    return _always(self._file(run, action))
                case Kind.LLM_REQUEST:
                    words = "requests to models are decided as connections in this version"
                    return _always(Verdict(Effect.DENY, "<not-built>", words=words))
                case Kind.RUN | Kind.EXIT | Kind.GUARD:
                    words = f"{action.kind.value} is recorded, never asked for"
                    return _always(Verdict(Effect.DENY, "<not-decided>", words=words))
        except (Malformed, InvalidHost) as e:
            rule = e.rule if isinstance(e, Malformed) else "<invalid-host>"
            return _always(Verdict(Effect.DENY, rule, words=str(e)))

    # -- the network

    def _network(self, view: View, action: Action, steps: list[Step] | None) -> Weigh:
        questions = network_questions(action)
        applicable = view.enforced | view.observed
        asked: list[tuple[NetworkQuestion, list[Pair]]] = []
        if steps is None:
            for q in questions:
                asked.append((q, self._index.network(q, applicable)))
        else:
            rules = [r for r in self.rules if r.bit & applicable and r.network is not None]
            for q in questions:
                pairs = [(r, m) for r in rules if r.network and (m := r.network.match(q))]
                asked.append((q, pairs))
            steps += _network_steps(self.files, rules, questions)

        def weigh(files: int, defaults: Mapping[Section, str]) -> Verdict:
            default = defaults[Section.NETWORK]
            worst: Verdict | None = None
            asks: tuple[Rule | str, ...] = ()
            for q, pairs in asked:
                verdict = weigh_network(q, pairs, files, default)
                asks += verdict.asks
                if worst is None or _EFFECT_RANK[verdict.effect] < _EFFECT_RANK[worst.effect]:
                    worst = verdict
            assert worst is not None
            return worst._replace(asks=asks) if worst.effect is Effect.ASK else worst

        return weigh

    def _dns(self, view: View, action: Action, steps: list[Step] | None) -> Weigh:
        name = canonical_host(action.target)
        if name.is_address:
            raise Malformed(f"{name} is an address, not a name to resolve")
        applicable = view.enforced | view.observed
        if steps is None:
            rules: Sequence[Rule] = self._index.hosts(name.text)
        else:
            network = [r for r in self.rules if r.network is not None]
            rules = [r for r in network if r.network and _names(r, name.text)]
            steps += _dns_steps(self.files, [r for r in network if r.bit & applicable], name.text)

        def weigh(files: int, defaults: Mapping[Section, str]) -> Verdict:
            return weigh_dns(rules, files, defaults[Section.DNS])

        return weigh

    # -- tools and files

    def _tool(self, view: View, action: Action, steps: list[Step] | None) -> Weigh:
        q = ToolQuestion(action.target, action.attributes.get("args"))
        applicable = view.enforced | view.observed
        if steps is None:
            pairs = self._index.tool(q, applicable)
        else:
            rules = [r for r in self.rules if r.bit & applicable and r.tool is not None]
            whys = [(r, *r.tool.why(q)) for r in rules if r.tool is not None]
            pairs = [(r, m) for r, m, _ in whys if m]
            steps += [_step(self.files, r, m is not Match.NO, why) for r, m, why in whys]

        def weigh(files: int, defaults: Mapping[Section, str]) -> Verdict:
            return weigh_rules(pairs, files, defaults[Section.TOOL])

        return weigh

    def _file(self, run: Run, action: Action) -> Verdict:
        """`file = "sandbox"`, the one default there is: reads as the user may, writes in
        the writable folders."""
        path = action.target
        if not path.startswith("/") or "\0" in path or posixpath.normpath(path) != path:
            raise Malformed("the path is not absolute and in its normal form")
        if action.kind is Kind.FILE_OPEN and action.attributes.get("access") == "read":
            return Verdict(Effect.ALLOW, "<default>", words="reading is up to the user's rights")
        folders = self.writable(run) or (".",)
        if any(_inside(path, _absolute(folder, run)) for folder in folders):
            return Verdict(Effect.ALLOW, "<default>", words="it is in a writable folder")
        words = (
            f"{_shown(path)} is outside the folders that the run may write to "
            f"({', '.join(folders)}); [sandbox] writable in the policy can add one"
        )
        return Verdict(Effect.DENY, "<default>", words=words)

    def _file_steps(self, view: View, run: Run) -> Iterable[Step]:
        for f in self.files:
            if f in view.files:
                continue
            why = f"the file applies to {f.applies_to}; this run is agent {run.agent or '-'}, "
            why += f"user {run.user or '-'}, tags {', '.join(run.tags) or '-'}"
            yield Step(f.id, "", False, why, f.path, 1)


# -- weighing ----------------------------------------------------------------------------------


def weigh_rules(pairs: Sequence[Pair], files: int, default: str) -> Verdict:
    """Deny over ask over allow over the default."""
    asks: tuple[Rule, ...] = ()
    allow: Rule | None = None
    for rule, _ in pairs:
        if not rule.bit & files:
            continue
        if rule.effect is Effect.DENY:
            return Verdict(Effect.DENY, rule)
        if rule.effect is Effect.ASK:
            asks += (rule,)
        else:
            allow = allow or rule
    if asks:
        return Verdict(Effect.ASK, asks[0], asks=asks)
    if allow is not None:
        return Verdict(Effect.ALLOW, allow)
    return Verdict(Effect(default), "<default>")


def weigh_network(q: NetworkQuestion, pairs: Sequence[Pair], files: int, default: str) -> Verdict:
    """The same for a connection to one address, with the guard list.

    A rule with cidrs alone allows bare addresses; for a connection by name it can
    deny, ask, and lift the guard, but the name needs a rule that names it.
    """
    ask = allow = maybe_ask = maybe_allow = range_ask = None
    asks: tuple[Rule, ...] = ()
    guarded = q.place is not None and bool(q.place.guard)
    for rule, match in pairs:
        if not rule.bit & files:
            continue
        if rule.effect is Effect.DENY:
            return Verdict(Effect.DENY, rule, q.place)
        if rule.effect is Effect.ASK:
            asks += (rule,)
        matcher = rule.network
        assert matcher is not None
        if guarded and q.place is not None and q.place.named_by(matcher.ranges):
            guarded = False
        if not matcher.hosts and not q.by_address:
            if rule.effect is Effect.ASK:
                range_ask = range_ask or rule
        elif rule.effect is Effect.ASK:
            if match is Match.YES:
                ask = ask or rule
            else:
                maybe_ask = maybe_ask or rule
        elif match is Match.YES:
            allow = allow or rule
        else:
            maybe_allow = maybe_allow or rule
    chosen = ask or allow or maybe_ask or maybe_allow
    effect = chosen.effect if chosen is not None else Effect(default)
    if effect is Effect.DENY:
        return Verdict(effect, "<default>", q.place)
    if guarded:
        return Verdict(Effect.DENY, "<guard-list>", q.place)
    if effect is Effect.ALLOW and range_ask is not None:
        chosen, effect = range_ask, Effect.ASK
    if effect is not Effect.ASK:
        return Verdict(effect, chosen or "<default>", q.place)
    return Verdict(effect, chosen or "<default>", q.place, asks=asks or ("<default>",))


def weigh_dns(rules: Sequence[Rule], files: int, default: str) -> Verdict:
    """A name may be resolved if a rule may let a connection to it through, on whatever port."""
    ask: Rule | None = None
    allow: Rule | None = None
    for rule in rules:
        if not rule.bit & files:
            continue
        if rule.effect is Effect.DENY:
            if denies_whole_host(rule):
                return Verdict(Effect.DENY, rule)
        elif rule.effect is Effect.ASK:
            ask = ask or rule
        else:
            allow = allow or rule
    chosen = allow or ask
    if chosen is not None:
        return Verdict(chosen.effect, chosen)
    return Verdict(Effect(default), "<default>")


def denies_whole_host(rule: Rule) -> bool:
    """A deny rule without ports, cidrs and protocol leaves nothing of a host."""
    n = rule.network
    return n is not None and n.ports is None and not n.ranges and n.protocol == "any"


def _names(rule: Rule, name: str) -> bool:
    return rule.network is not None and any(h.matches(name) for h in rule.network.hosts)


def _by_default(section: Section) -> Weigh:
    return lambda _files, defaults: Verdict(Effect(defaults[section]), "<default>")


def _always(verdict: Verdict) -> Weigh:
    return lambda _files, _defaults: verdict


def _strictest(files: Iterable[PolicyFile]) -> Mapping[Section, str]:
    applicable = list(files)
    return {
        section: min(
            (f.default(section) for f in applicable), key=_STRICTNESS.index, default="deny"
        )
        for section in Section
    }


# -- questions ---------------------------------------------------------------------------------


def network_questions(action: Action) -> list[NetworkQuestion]:
    """One question per address; one without an address in the step of names.

    Raises Malformed or InvalidHost for what cannot be decided.
    """
    a = action.attributes
    host, port, addresses = a.get("host"), a.get("port"), a.get("addresses")
    if port is None or (host is None and addresses is None):
        host, port = _from_target(action.target, host, port)
    if type(port) is not int or not 0 < port < 65536:
        raise Malformed("the port must be a whole number from 1 to 65535")
    protocol = a.get("protocol") or ""
    if protocol not in ("", "tls", "http", "opaque"):
        raise Malformed("the protocol must be tls, http or opaque")
    places = None if addresses is None else _places(addresses)
    if host is None:
        assert places is not None
        answered = a.get("answered") if protocol == "opaque" else None
        name, by_address = "" if answered is None else _name_of(answered), True
    else:
        asked = canonical_host(_text(host))
        name, by_address = "" if asked.is_address else asked.text, asked.is_address
        if by_address:
            if places is not None and any(p.text != asked.text for p in places):
                raise Malformed("host is an address, and addresses has another one")
            places = [place(asked.text)]
    if action.target != f"{host}:{port}":
        _same_target(action.target, name, port, places if by_address else None)
    if places is None:
        return [NetworkQuestion(name, port, protocol, None)]
    return [NetworkQuestion(name, port, protocol, p, by_address) for p in places]


def _places(addresses: Json) -> list[Place]:
    if not isinstance(addresses, (list, tuple)) or not 0 < len(addresses) <= ADDRESSES_LIMIT:
        raise Malformed(f"addresses must be a list of 1 to {ADDRESSES_LIMIT} addresses")
    return [place(_text(address)) for address in addresses]


def _text(value: Json) -> str:
    if not isinstance(value, str):
        raise Malformed("hosts and addresses must be text")
    return value


def _name_of(value: Json) -> str:
    host = canonical_host(_text(value))
    return "" if host.is_address else host.text


_TARGET = re.compile(r"(?:\[([^\[\]]+)\]|([^:\[\]]+))(?::([0-9]{1,5}))?")


def _split_target(target: str) -> tuple[str, int | None]:
    """`host`, `host:port` or `[address]:port`."""
    found = _TARGET.fullmatch(target)
    if found is None:
        raise Malformed("the target is not host:port")
    return found[1] or found[2], int(found[3]) if found[3] else None


def _from_target(target: str, host: Json, port: Json) -> tuple[Json, Json]:
    named, number = _split_target(target)
    return named if host is None else host, number if port is None else port


def _same_target(target: str, name: str, port: int, places: Sequence[Place] | None) -> None:
    """What is recorded must be what is decided."""
    written, number = _split_target(target)
    host = canonical_host(written)
    same = host.text in {p.text for p in places} if places is not None else host.text == name
    if not same or number not in (None, port):
        raise Malformed("the target names another host or port than the attributes")


# -- folders -----------------------------------------------------------------------------------


def _absolute(folder: str, run: Run) -> str:
    if folder == ".":
        return run.directory
    return run.home + folder[1:] if folder.startswith("~/") and run.home else folder


def _inside(path: str, folder: str) -> bool:
    return folder.startswith("/") and (path == folder or path.startswith(folder + "/"))


def _common(some: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """The folders that lie within both lists."""
    both = [a for a in some for b in others if a == b or a.startswith(b + "/")]
    return tuple(both + [b for b in others for a in some if b.startswith(a + "/")])


# -- words -------------------------------------------------------------------------------------


def _name(rule: Rule | str) -> str:
    return rule if isinstance(rule, str) else rule.ref


def _shown(text: str) -> str:
    """A text that an agent chose, safe for a terminal and of bounded length."""
    short = text if len(text) <= SHOWN_TARGET else text[: SHOWN_TARGET - 3] + "..."
    return short if short.isascii() and short.isprintable() else ascii(short)[1:-1]


def _not_for(run: Run) -> str:
    who = f"agent {_shown(run.agent)} of user {_shown(run.user)}"
    return (
        f"no policy applies to {who}, so everything is denied; add a file to policy.d whose "
        "applies_to selects it, or that has no applies_to: aasm policy show lists them"
    )


def _observed_reason(would: Verdict, action: Action, view: View) -> str:
    if would.effect is Effect.ALLOW:
        return _reason(would, action, view)
    return f"only observed; enforced it would be: {_reason(would, action, view)}"


def _reason(verdict: Verdict, action: Action, view: View) -> str:
    rule = verdict.rule
    target = _shown(action.target)
    if isinstance(rule, Rule):
        verb = _VERBS[verdict.effect]
        because = f": {rule.reason}" if rule.reason else ""
        if verdict.effect is Effect.DENY:
            return f"{rule.ref} denies {target}{because}; {_ask_why(action)} tells more"
        return f"{rule.ref} {verb} {target}{because}"
    if verdict.words:
        return f"{target}: {verdict.words}"
    if rule == "<guard-list>":
        assert verdict.place is not None
        return _guard_reason(target, verdict.place, action)
    policies = ", ".join(f.id for f in view.files)
    if verdict.effect is not Effect.DENY:
        return f"no rule is about {target}; the default of {policies} {_VERBS[verdict.effect]} it"
    place_text = verdict.place.text if verdict.place is not None else ""
    where = f" at {place_text}" if place_text and place_text not in target else ""
    return f"no rule of {policies} allows {target}{where}; {_remedy(verdict, action)}"


_VERBS = {Effect.ALLOW: "allows", Effect.DENY: "denies", Effect.ASK: "asks a person about"}


def _ask_why(action: Action) -> str:
    return f"aasm policy explain {action.kind.value} {shlex.quote(_shown(action.target))}"


def _guard_reason(target: str, guarded: Place, action: Action) -> str:
    inner = f" (which stands for {guarded.inner.text})" if guarded.inner is not None else ""
    return (
        f"{target}: {guarded.text}{inner} is a {guarded.guard} address, and no rule that matches "
        f'names it; cidrs = ["{guarded.text}"] in the rule would; {_ask_why(action)} tells more'
    )


def _remedy(verdict: Verdict, action: Action) -> str:
    """The rule that would allow it, as one would write it."""
    build = _MATCHERS.get(action.kind)
    matcher = build(verdict, action) if build is not None else ""
    rule = f'a [[rule]] with an id, effect = "allow" and {matcher} would; ' if matcher else ""
    return f"{rule}{_ask_why(action)} tells more"


def _network_matcher(verdict: Verdict, action: Action) -> str:
    q = network_questions(action)[0]
    what = [f'hosts = ["{q.host}"]'] if q.host else []
    guarded = verdict.place is not None and verdict.place.guard
    if verdict.place is not None and (guarded or not what):
        what.append(f'cidrs = ["{verdict.place.text}"]')
    if q.port not in DEFAULT_PORTS:
        what.append(f"ports = [{q.port}]")
    if q.protocol == "opaque" and q.host:
        what.append('protocol = "opaque"')
    return f"network = {{ {', '.join(what)} }}"


def _host_matcher(_verdict: Verdict, action: Action) -> str:
    return f'network = {{ hosts = ["{_shown(action.target)}"] }}'


def _tool_matcher(_verdict: Verdict, action: Action) -> str:
    return f'tool = {{ names = ["{_shown(action.target)}"] }}'


_MATCHERS: Mapping[Kind, Callable[[Verdict, Action], str]] = {
    Kind.NET_CONNECT: _network_matcher,
    Kind.HTTP_REQUEST: _network_matcher,
    Kind.DNS_QUERY: _host_matcher,
    Kind.TOOL_CALL: _tool_matcher,
}


# -- steps of an explanation -------------------------------------------------------------------


def _step(files: Sequence[PolicyFile], rule: Rule, matched: bool, why: str) -> Step:
    return Step(rule.ref, rule.effect.value, matched, why, files[rule.file].path, rule.line)


def _network_steps(
    files: Sequence[PolicyFile], rules: Sequence[Rule], questions: Sequence[NetworkQuestion]
) -> Iterable[Step]:
    for rule in rules:
        assert rule.network is not None
        answers = [rule.network.why(q) for q in questions]
        whys = list(dict.fromkeys(why for _, why in answers))
        matched = any(m for m, _ in answers)
        alone = matched and not rule.network.hosts and not questions[0].by_address
        if alone and rule.effect is not Effect.DENY:
            whys.append("for a connection by name it only lifts the guard or asks")
        yield _step(files, rule, matched, "; ".join(whys))
    for q in questions:
        if q.place is not None and q.place.guard:
            why = f"{q.place.text} is {q.place.guard}: a rule that matches must name it by cidrs"
            yield Step("<guard-list>", "deny", True, why)


def _dns_steps(files: Sequence[PolicyFile], rules: Sequence[Rule], name: str) -> Iterable[Step]:
    for rule in rules:
        matched = _names(rule, name)
        why = f"its hosts match {name}" if matched else f"its hosts do not match {name}"
        if matched and rule.effect is Effect.DENY and not denies_whole_host(rule):
            matched, why = False, f"it leaves some of {name} open, so the name may be resolved"
        yield _step(files, rule, matched, why)


def _default_steps(view: View, section: Section, decision: Decision) -> Iterable[Step]:
    for f in view.files:
        stated = "states" if section in f.defaults else "does not state, which means"
        why = f"{f.path} {stated} default.{section.value} = {f.default(section)}"
        if f.mode is Mode.OBSERVE:
            why += " (observe)"
        used = decision.rule == "<default>"
        yield Step(f"{f.id}/<default>", f.default(section), used, why, f.path, f.line(section))
