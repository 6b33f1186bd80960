"""Weighs the rules that matched: deny over ask over allow over the default, for each kind of question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from aa.model import Effect
from aa.policy.address import Place
from aa.policy.matchers import Access, InboundQuestion, PathQuestion
from aa.policy.network import Match, NetworkQuestion, Request
from aa.policy.rules import Rule, Section
from aa.policy.sandbox import NEEDED, WRITABLE_ANYHOW, Sandbox

# Reading a member of an enumeration takes longer than reading a name of this module.
_DENY, _ASK, _ALLOW, _YES = Effect.DENY, Effect.ASK, Effect.ALLOW, Match.YES

RANK = {Effect.DENY: 0, _ASK: 1, _ALLOW: 2}


class Side(NamedTuple):
    """A set of files, as bits, with the strictest of what they state."""

    files: int
    defaults: Mapping[Section, str]
    sandbox: Sandbox


class Verdict(NamedTuple):
    """What a set of rules makes of a question, before modes. `rule` is a Rule or a bracketed name."""

    effect: Effect
    rule: Rule | str
    place: Place | None = None
    words: str = ""
    inspects: bool = False
    """Of a connection: its requests are to be decided."""
    stated: bool = False
    """Whether a rule says `inspect = true`, and not by its content alone."""
    judged: tuple[Rule, ...] = ()
    """Of a request: the rules that want to see its body or its messages."""
    asks: tuple[Rule | str, ...] = ()
    """Of an ask: all rules that ask, so that an approval for one is not taken for another."""


Pair = tuple[Rule, Match]


class Requested(NamedTuple):
    """What matched a request."""

    rules: Sequence[Rule]
    judged: Sequence[Rule]
    """Those that want to see its body or its messages, whatever is in them."""
    paths: int
    """The files, as bits, that have a rule about paths among those that match the connection."""


def requested(pairs: Sequence[Pair], r: Request, bits: int) -> Requested:
    """Of the rules that match a connection, those of some files that match a request in it."""
    rules: list[Rule] = []
    judged: list[Rule] = []
    paths = 0
    for rule, _ in pairs:
        n = rule.network
        if not rule.bit & bits or n is None:
            continue
        if n.content:
            if n.paths:
                paths |= rule.bit
            if not n.match_head(r):
                continue
            if n.looks:
                judged.append(rule)
                if n.match_facts(r) is not _YES:
                    continue
        rules.append(rule)
    return Requested(rules, judged, paths)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The strictest of several, the first of equals. What one of them inspects, is inspected."""
    found: Verdict | None = None
    inspects = stated = False
    judged: tuple[Rule, ...] = ()
    asks: tuple[Rule | str, ...] = ()
    for v in verdicts:
        inspects, stated = inspects or v.inspects, stated or v.stated
        judged += tuple(r for r in v.judged if r not in judged)
        asks += tuple(r for r in v.asks if r not in asks)
        if found is None or RANK[v.effect] < RANK[found.effect]:
            found = v
    assert found is not None
    asks = asks if found.effect is _ASK else ()
    return found._replace(inspects=inspects, stated=stated, judged=judged, asks=asks)


def weigh_rules(rules: Iterable[Rule], files: int, default: str) -> Verdict:
    """Deny over ask over allow over the default."""
    asks: tuple[Rule, ...] = ()
    allow: Rule | None = None
    for rule in rules:
        if not rule.bit & files:
            continue
        if rule.effect is _DENY:
            return Verdict(_DENY, rule)
        if rule.effect is _ASK:
            asks += (rule,)
        elif allow is None:
            allow = rule
    if asks:
        return Verdict(_ASK, asks[0], asks=asks)
    if allow is not None:
        return Verdict(_ALLOW, allow)
    return _default(default)


def _default(default: str, place: Place | None = None) -> Verdict:
    effect = Effect(default)
    asks = ("<default>",) if effect is _ASK else ()
    return Verdict(effect, "<default>", place, asks=asks)


def weigh_connection(
    q: NetworkQuestion, pairs: Sequence[Pair], files: int, default: str
) -> Verdict:
    """The same for a connection to one address, with the guard list.

    A rule with cidrs alone allows bare addresses; for a connection by name it can
    deny, ask, and lift the guard, but the name needs a rule that names it. Where a rule
    inspects, the connection goes on to inspection and the rest is decided with each request.
    """
    ask = allow = maybe_ask = maybe_allow = range_ask = inspect = None
    asks: tuple[Rule, ...] = ()
    inspects = stated = asked = False
    guarded = q.place is not None and bool(q.place.guard)
    for rule, match in pairs:
        if not rule.bit & files:
            continue
        matcher = rule.network
        assert matcher is not None
        if matcher.content and not matcher.inspects:
            continue  # a denial by content, or a question about a body: it decides requests
        if rule.effect is _DENY:
            return Verdict(_DENY, rule, q.place)
        asked = asked or rule.effect is _ASK
        if matcher.inspects:
            inspects, stated = True, stated or matcher.inspect
        if matcher.looks:
            continue  # it asks about what is in requests that another rule allows
        if guarded and q.place is not None and q.place.named_by(matcher.ranges):
            guarded = False
        if rule.effect is _ASK and not matcher.inspects:
            asks += (rule,)
        if not matcher.hosts and not q.by_address:
            if rule.effect is _ASK and not matcher.content:
                range_ask = range_ask or rule
        elif matcher.inspects:
            inspect = inspect or rule
        elif rule.effect is _ASK:
            if match is _YES:
                ask = ask or rule
            else:
                maybe_ask = maybe_ask or rule
        elif match is _YES:
            allow = allow or rule
        else:
            maybe_allow = maybe_allow or rule
    chosen = inspect or ask or allow or maybe_ask or maybe_allow
    effect = chosen.effect if chosen is not None else _ALLOW if q.own else Effect(default)
    if inspect is not None:
        effect = _ALLOW
    if q.own and not asked:
        return Verdict(_ALLOW, "<own-listener>", q.place)
    if effect is _DENY:
        return Verdict(effect, "<default>", q.place)
    if guarded and not q.own:
        return Verdict(_DENY, "<guard-list>", q.place)
    if effect is _ALLOW and range_ask is not None and not inspects:
        chosen, effect = range_ask, _ASK
    if effect is not _ASK:
        return Verdict(effect, chosen or "<default>", q.place, "", inspects, stated)
    return Verdict(
        effect, chosen or "<default>", q.place, "", inspects, stated, asks=asks or ("<default>",)
    )


def weigh_request(
    q: NetworkQuestion, found: Requested, files: int, default: str, ambiguous: str
) -> Verdict:
    """The same for a request in an inspected connection. `ambiguous` says what is wrong with its
    path, which matters where a rule about paths applies."""
    ask = allow = range_ask = None
    asks: tuple[Rule, ...] = ()
    guarded = q.place is not None and bool(q.place.guard)
    for rule in found.rules:
        if not rule.bit & files:
            continue
        effect = rule.effect
        if effect is _DENY:
            return Verdict(effect, rule, q.place)
        matcher = rule.network
        assert matcher is not None
        # A question about a body or a message is one about a request that another rule allows.
        looks = matcher.looks
        if guarded and not looks and q.place is not None and q.place.named_by(matcher.ranges):
            guarded = False
        opens = (matcher.hosts or q.by_address) and not looks
        if effect is _ASK:
            asks += (rule,)
            if opens:
                ask = ask or rule
            else:
                range_ask = range_ask or rule
        elif opens:
            allow = allow or rule
    if ambiguous and found.paths & files:
        return Verdict(_DENY, "<ambiguous-path>", q.place, ambiguous)
    chosen = ask or allow
    effect = chosen.effect if chosen is not None else Effect(default)
    if effect is _DENY:
        return Verdict(effect, "<default>", q.place)
    if guarded:
        return Verdict(_DENY, "<guard-list>", q.place)
    if effect is _ALLOW and range_ask is not None:
        chosen, effect = range_ask, _ASK
    wanted = tuple(rule for rule in found.judged if rule.bit & files) if found.judged else ()
    if effect is not _ASK:
        return Verdict(effect, chosen or "<default>", q.place, judged=wanted)
    asked = asks or ("<default>",)
    return Verdict(effect, chosen or "<default>", q.place, judged=wanted, asks=asked)


def weigh_name(network: Sequence[Rule], dns: Sequence[Rule], files: int, default: str) -> Verdict:
    """A name may be resolved if a rule may let a connection to it through, on whatever port, or if
    a dns rule says so; a dns rule can deny or ask all the same."""
    own = weigh_rules(dns, files, Effect.DENY.value)
    if own.rule != "<default>" and own.effect is _DENY:
        return own
    asks: tuple[Rule, ...] = ()
    allow: Rule | None = None
    for rule in network:
        matcher = rule.network
        if not rule.bit & files or matcher is None or matcher.looks:
            continue
        if matcher.content and not matcher.inspects:
            continue
        if rule.effect is _DENY:
            if denies_whole_host(rule):
                return Verdict(_DENY, rule)
        elif rule.effect is _ASK and not matcher.inspects:
            asks += (rule,)
        elif allow is None:
            allow = rule
    if own.rule != "<default>" and (own.effect is _ASK or allow is None):
        return own
    if allow is not None:
        return Verdict(_ALLOW, allow)
    if asks:
        return Verdict(_ASK, asks[0], asks=asks)
    return _default(default)


def denies_whole_host(rule: Rule) -> bool:
    """A deny rule without ports, cidrs, protocol and content leaves nothing of a host."""
    n = rule.network
    return (
        n is not None and n.ports is None and not n.ranges and n.protocol == "any" and not n.content
    )


def weigh_inbound(q: InboundQuestion, rules: Sequence[Rule], files: int) -> Verdict:
    """From loopback a run's listeners are open unless a rule denies it; from elsewhere closed."""
    found = weigh_rules(rules, files, Effect.DENY.value)
    if found.rule == "<default>" and q.peer.guard == "loopback":
        return Verdict(_ALLOW, "<loopback>")
    return found


def weigh_file(
    q: PathQuestion, rules: Sequence[Rule], side: Side, *, directory: str, home: str
) -> Verdict:
    """Rules first; what `[sandbox] read_only` names is not written whatever they allow."""
    found = weigh_rules(rules, side.files, Effect.DENY.value)
    if found.effect is _DENY and found.rule != "<default>":
        return found
    writes = q.access is not Access.READ
    if writes and any(inside(q.path, absolute(p, directory, home)) for p in side.sandbox.read_only):
        words = "[sandbox] read_only keeps it as it is"
        return Verdict(_DENY, "<read-only>", words=words)
    if found.rule != "<default>":
        return found
    return _unnamed_file(q, side, directory, home)


def _unnamed_file(q: PathQuestion, side: Side, directory: str, home: str) -> Verdict:
    """What the default makes of a file that no rule is about."""
    default, reads = side.defaults[Section.FILE], q.access is Access.READ
    if default == "allow" or (reads and default == "sandbox"):
        what = "reading" if reads else "writing"
        return Verdict(_ALLOW, "<default>", words=f"{what} is up to the user's rights")
    folders = (".",) if side.sandbox.writable is None else side.sandbox.writable
    if any(inside(q.path, absolute(folder, directory, home)) for folder in folders):
        return Verdict(_ALLOW, "<default>", words="it is in a writable folder")
    if any(inside(q.path, folder) for folder in WRITABLE_ANYHOW):
        return Verdict(_ALLOW, "<default>", words="the folder is the run's own")
    listed = ", ".join(folders) or "none"
    if not reads:
        words = (
            f"it is outside the folders that the run may write to ({listed}); "
            "[sandbox] writable in the policy can add one"
        )
        return Verdict(_DENY, "<default>", words=words)
    if any(inside(q.path, folder) for folder in NEEDED):
        return Verdict(_ALLOW, "<default>", words="every program needs to read there")
    return Verdict(_DENY, "<default>")


def absolute(folder: str, directory: str, home: str) -> str:
    """A folder of `[sandbox]` as this run has it; "" where it has none."""
    if folder == ".":
        return directory
    if folder.startswith("~/"):
        return home + folder[1:] if home else ""
    if folder.startswith("/"):
        return folder
    return f"{directory}/{folder}" if directory else ""


def inside(path: str, folder: str) -> bool:
    top = folder.rstrip("/")
    return folder.startswith("/") and (path == folder or path.startswith(top + "/"))
