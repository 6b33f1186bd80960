"""Reasons: what a person reads about a decision, with the rule that would allow what was denied."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence

from aa.model import Action, Effect, Kind, Run
from aa.policy.address import Place
from aa.policy.network import DEFAULT_PORTS
from aa.policy.questions import (
    file_questions,
    inbound_question,
    llm_question,
    mcp_question,
    network_questions,
    request_of,
)
from aa.policy.rules import PolicyFile, Rule
from aa.policy.weigh import Verdict

METHOD = re.compile(r"[A-Z][A-Z0-9_-]{0,31}")
SHOWN_TARGET = 200
"""Characters of a target that a reason repeats."""

NO_POLICY = (
    "there is no policy, so everything is denied; an operator can choose one to begin with: "
    "aasm policy use observe, aasm policy use coding-agent, or aasm policy use locked-down"
)

_DENY = Effect.DENY
_VERBS = {Effect.ALLOW: "allows", Effect.DENY: "denies", Effect.ASK: "asks a person about"}


def name_of(rule: Rule | str) -> str:
    return rule if isinstance(rule, str) else rule.ref


def shown(text: str) -> str:
    """A text that an agent chose, safe for a terminal and of bounded length."""
    short = text if len(text) <= SHOWN_TARGET else text[: SHOWN_TARGET - 3] + "..."
    return short if short.isascii() and short.isprintable() else ascii(short)[1:-1]


def not_for(run: Run) -> str:
    who = f"agent {shown(run.agent)} of user {shown(run.user)}"
    return (
        f"no policy applies to {who}, so everything is denied; add a file to policy.d whose "
        "applies_to selects it, or that has no applies_to: aasm policy show lists them"
    )


def observed_reason(would: Verdict, action: Action, files: Sequence[PolicyFile]) -> str:
    if would.effect is Effect.ALLOW:
        return reason(would, action, files)
    return f"only observed; enforced it would be: {reason(would, action, files)}"


def reason(verdict: Verdict, action: Action, files: Sequence[PolicyFile]) -> str:
    rule = verdict.rule
    target = shown(action.target)
    if isinstance(rule, Rule):
        because = f": {rule.reason}" if rule.reason else ""
        if verdict.effect is _DENY:
            return f"{rule.ref} denies {target}{because}; {_ask_why(action)} tells more"
        if verdict.inspects:
            return f"{rule.ref} inspects {target}: each request is decided by itself{because}"
        return f"{rule.ref} {_VERBS[verdict.effect]} {target}{because}"
    if verdict.words:
        return f"{target}: {verdict.words}"
    if rule == "<guard-list>":
        assert verdict.place is not None
        return _guard_reason(target, verdict.place, action)
    if rule == "<own-listener>":
        return f"{target} is a listener of the run's own"
    if rule == "<loopback>":
        return f"{target}: a run's listeners are open to this host"
    policies = ", ".join(f.id for f in files)
    if verdict.effect is not Effect.DENY:
        return f"no rule is about {target}; the default of {policies} {_VERBS[verdict.effect]} it"
    place_text = verdict.place.text if verdict.place is not None else ""
    where = f" at {place_text}" if place_text and place_text not in target else ""
    return f"no rule of {policies} allows {target}{where}; {_remedy(verdict, action)}"


def _ask_why(action: Action) -> str:
    """The command that explains it."""
    target, more = action.target, ""
    if action.kind is Kind.HTTP_REQUEST:
        a = action.attributes
        path, method = a.get("path"), a.get("method")
        scheme = "http" if a.get("protocol") == "http" else "https"
        target = f"{scheme}://{target}{path if isinstance(path, str) else ''}"
        if isinstance(method, str) and method != "GET":
            more = f" --attributes {shlex.quote(json.dumps({'method': shown(method)}))}"
    return f"aasm policy explain {action.kind.value} {shlex.quote(shown(target))}{more}"


def _guard_reason(target: str, guarded: Place, action: Action) -> str:
    inner = f" (which stands for {guarded.inner.text})" if guarded.inner is not None else ""
    return (
        f"{target}: {guarded.text}{inner} is a {guarded.guard} address, and no rule that matches "
        f'names it; cidrs = ["{guarded.text}"] in the rule would; {_ask_why(action)} tells more'
    )


# -- the rule that would allow it, as one would write it ---------------------------------------


def _remedy(verdict: Verdict, action: Action) -> str:
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
    if action.kind is Kind.HTTP_REQUEST:
        what += _content(action)
    return f"network = {{ {', '.join(what)} }}"


def _content(action: Action) -> list[str]:
    """Method and path, as far as a rule can say them."""
    request, _ = request_of(action)
    found = []
    if request.method and METHOD.fullmatch(request.method):
        found.append(f'methods = ["{request.method}"]')
    if request.path and "*" not in request.path and shown(request.path) == request.path:
        found.append(f"paths = [{_quoted(request.path)}]")
    return found


def _dns_matcher(_verdict: Verdict, action: Action) -> str:
    return f'network = {{ hosts = ["{shown(action.target)}"] }}'


def _tool_matcher(_verdict: Verdict, action: Action) -> str:
    return f"tool = {{ names = [{_quoted(action.target)}] }}"


def _inbound_matcher(_verdict: Verdict, action: Action) -> str:
    q = inbound_question(action)
    return f'inbound = {{ cidrs = ["{q.peer.text}"], ports = [{q.port}] }}'


def _exec_matcher(_verdict: Verdict, action: Action) -> str:
    return f"exec = {{ paths = [{_quoted(action.target)}] }}"


def _file_matcher(_verdict: Verdict, action: Action) -> str:
    questions = file_questions(Run("", "", "", -1), action)
    paths = ", ".join(_quoted(path) for path in dict.fromkeys(q.path for q in questions))
    access = ", ".join(f'"{q.access}"' for q in questions)
    return f"file = {{ paths = [{paths}], access = [{access}] }}"


def _mcp_matcher(_verdict: Verdict, action: Action) -> str:
    q = mcp_question(action)
    what = f"tool = {_quoted(q.tool)}" if q.tool else f"method = {_quoted(q.method)}"
    return f"mcp = {{ server = {_quoted(q.server)}, {what} }}"


def _llm_matcher(_verdict: Verdict, action: Action) -> str:
    q = llm_question(action)
    return f"llm = {{ provider = {_quoted(q.provider)}, model = {_quoted(q.model)} }}"


def _quoted(text: str) -> str:
    return '"' + shown(text).replace("\\", "\\\\").replace('"', '\\"') + '"'


_MATCHERS: Mapping[Kind, Callable[[Verdict, Action], str]] = {
    Kind.NET_CONNECT: _network_matcher,
    Kind.HTTP_REQUEST: _network_matcher,
    Kind.NET_ACCEPT: _inbound_matcher,
    Kind.DNS_QUERY: _dns_matcher,
    Kind.TOOL_CALL: _tool_matcher,
    Kind.EXEC: _exec_matcher,
    Kind.FILE_OPEN: _file_matcher,
    Kind.FILE_UNLINK: _file_matcher,
    Kind.FILE_RENAME: _file_matcher,
    Kind.MCP_CALL: _mcp_matcher,
    Kind.LLM_REQUEST: _llm_matcher,
}
