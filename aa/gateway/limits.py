"""Limits at work: counts what was used, and turns an allow into a denial when nothing is left.

Calls are counted when they are decided; bytes and tokens when the proxy reports what a connection
or a request really used. So the one in flight may go over, and the next is denied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aa.gateway.counters import Counters
from aa.prices import Prices, Usage
from aa.model import Action, Decision, Effect, Kind, Layer, Mode, RecordType, Report, Run
from aa.policy.limits import SECTION, WINDOW_SECONDS, Limit, Measure

MAX_TOKENS = 1_000_000_000
"""Of one part of one request; what claims more, or makes no sense, counts as so many."""
MAX_NAMES_KEPT = 1000
"""Models without a price that were reported already."""
NETWORK_KINDS = (Kind.NET_CONNECT, Kind.HTTP_REQUEST)

UNITS: Mapping[Measure, str] = {
    Measure.CALLS_PER_MINUTE: "calls in this minute",
    Measure.BYTES_OUT_PER_HOUR: "bytes sent in this hour",
    Measure.BYTES_OUT_PER_DAY: "bytes sent today",
    Measure.TOKENS_PER_HOUR: "tokens in this hour",
    Measure.USD_PER_DAY: "USD today",
}


@dataclass(frozen=True, slots=True)
class Use:
    """How far one counter of one limit is."""

    limit: Limit
    subject: str
    used: float
    resets: int

    @property
    def exhausted(self) -> bool:
        return self.used >= self.limit.most

    def as_json(self) -> dict[str, Any]:
        return {
            **self.limit.as_json(),
            "subject": self.subject,
            "used": self.used,
            "resets": moment(self.resets),
            "exhausted": self.exhausted,
        }


class Limits:
    """The limits of the policy in force, over counters that outlive it."""

    def __init__(self, counters: Counters, prices: Callable[[], Prices]) -> None:
        self._counters = counters
        self._load_prices = prices
        self.prices = prices()
        self._not_reloaded = ""
        self._unpriced: set[tuple[str, str]] = set()

    def reload(self) -> None:
        """Reads the prices again. With an error the last good ones stay."""
        loaded = self._load_prices()
        self._not_reloaded = loaded.problem
        if not loaded.problem or self.prices.problem:
            self.prices = loaded
            self._unpriced.clear()

    def problems(self) -> list[str]:
        found = [self._counters.problem] if self._counters.problem else []
        if self.prices.problem:
            found.append(f"no prices, so runs under an llm limit are denied: {self.prices.problem}")
        elif self._not_reloaded:
            found.append(f"prices not changed: {self._not_reloaded}")
        return found

    # -- at a decision

    def unseen(self, action: Action, decision: Decision) -> Decision:
        """For a run whose policy judges models: a denial in place of a connection to a provider that
        passes without inspection, where no model could be seen."""
        if action.kind is not Kind.NET_CONNECT or decision.effect is Effect.DENY:
            return decision
        if _is_inspected(decision) or not self._may_be_provider(action):
            return decision
        reason = (
            f"{action.target}: the policy has rules about models, and {decision.rule} lets this "
            "connection to a provider pass without inspection, where no model can be seen; "
            "inspect = true in the rule that allows the host would show it"
        )
        return replace(
            decision, effect=Effect.DENY, rule="<not-inspected>", reason=reason, asked_by=()
        )

    def judge(
        self, limits: tuple[Limit, ...], run: Run, action: Action, decision: Decision, now: float
    ) -> Decision:
        """The decision, or a denial in its place. A call that is allowed is counted."""
        if decision.effect is Effect.DENY:
            return decision
        about = [limit for limit in limits if self._is_about(limit, action)]
        for limit in about:
            reason = self._refusal(limit, run, now) or _unmeasured(limit, action, decision)
            if reason and (decision.mode is Mode.OBSERVE or limit.mode is Mode.OBSERVE):
                words = f"only observed; enforced it would be denied by {limit.ref}: {reason}"
                return replace(decision, would=Effect.DENY, reason=words)
            if reason:
                return replace(
                    decision, effect=Effect.DENY, rule=limit.ref, reason=reason, obligations=()
                )
        for limit in about:
            if limit.measure is Measure.CALLS_PER_MINUTE and decision.permits:
                self._add(limit, run, 1, now)
        return decision

    def _is_about(self, limit: Limit, action: Action) -> bool:
        match limit.measure:
            case Measure.CALLS_PER_MINUTE:
                return action.kind is Kind.TOOL_CALL and limit.is_about_tool(action.target)
            case Measure.BYTES_OUT_PER_HOUR | Measure.BYTES_OUT_PER_DAY:
                return action.kind in NETWORK_KINDS
        if action.kind is Kind.LLM_REQUEST:
            return True
        return action.kind in NETWORK_KINDS and self._may_be_provider(action)

    def _may_be_provider(self, action: Action) -> bool:
        host = action.attributes.get("host")
        return self.prices.problem != "" or self.prices.is_provider(str(host))

    def _refusal(self, limit: Limit, run: Run, now: float) -> str:
        """Why the limit lets nothing more through, or ""."""
        if self._counters.problem:
            return f"{self._counters.problem}, so what it limits is denied"
        if SECTION[limit.measure] == "llm" and self.prices.problem:
            return (
                "which hosts are model providers, and at what price, is not known: "
                f"{self.prices.problem}"
            )
        use = self._use(limit, limit.subject(run), now)
        if not use.exhausted:
            return ""
        whose = f"{limit.per} {use.subject}" if use.subject else "this host"
        return (
            f"{limit.ref} is used up: {_shown(use.used)} of {_shown(limit.most)} "
            f"{UNITS[limit.measure]} for {whose}; it begins anew at {moment(use.resets)}"
        )

    def _use(self, limit: Limit, subject: str, now: float) -> Use:
        key = (limit.ref, limit.measure.value, subject)
        used = self._counters.used(key, limit.window(now))
        return Use(limit, subject, used, limit.resets(now))

    def _add(self, limit: Limit, run: Run, amount: float, now: float) -> None:
        key = (limit.ref, limit.measure.value, limit.subject(run))
        self._counters.add(key, limit.window(now), amount)

    # -- after the fact

    def note(
        self, limits: tuple[Limit, ...], run: Run, report: Report, now: float
    ) -> tuple[Report, str]:
        """Counts what a component saw a run use. Returns the report, with the cost of model
        requests in it, and what a person should know, or ""."""
        if report.type is not RecordType.OBSERVED or report.layer is not Layer.PROXY:
            return report, ""
        if report.kind is Kind.NET_CONNECT:  # the whole connection, whatever requests were in it
            sent = _whole(report.attributes.get("sent", 0), 1 << 60)
            for limit in limits:
                if limit.measure in (Measure.BYTES_OUT_PER_HOUR, Measure.BYTES_OUT_PER_DAY):
                    self._add(limit, run, sent, now)
            return report, ""
        if report.kind is not Kind.LLM_REQUEST:
            return report, ""
        usage = usage_of(report.attributes)
        usd, priced = self.prices.cost(usage)
        for limit in limits:
            if limit.measure is Measure.TOKENS_PER_HOUR:
                self._add(limit, run, usage.tokens, now)
            elif limit.measure is Measure.USD_PER_DAY:
                self._add(limit, run, usd, now)
        alert = "" if priced else self._unpriced_alert(usage)
        attributes = {**report.attributes, "usd": round(usd, 6)}
        return replace(report, attributes=attributes), alert

    def _unpriced_alert(self, usage: Usage) -> str:
        name = (usage.provider, usage.model)
        if self.prices.problem or name in self._unpriced:
            return ""
        if len(self._unpriced) < MAX_NAMES_KEPT:
            self._unpriced.add(name)
        whose = "its provider" if usage.provider in self.prices.providers else "all providers"
        return (
            f"{usage.provider}/{usage.model} has no price and is charged as the dearest of {whose}"
        )

    # -- showing and keeping house

    def uses(self, limits: Sequence[Limit], now: float) -> Iterator[Use]:
        """How far each counter is that was used in the window of now; unused limits once."""
        subjects = self._counters.subjects()
        for limit in limits:
            used = [
                use
                for subject in sorted(subjects.get((limit.ref, limit.measure.value), ()))
                if (use := self._use(limit, subject, now)).used
            ]
            yield from used or [Use(limit, "", 0.0, limit.resets(now))]

    def tidy(self, now: float) -> None:
        self._counters.forget_before(int(now) - max(WINDOW_SECONDS.values()))


def _unmeasured(limit: Limit, action: Action, decision: Decision) -> str:
    """Why what would be used could not be counted, or "". A limit that counts nothing is none."""
    if SECTION[limit.measure] != "llm" or action.kind is not Kind.NET_CONNECT:
        return ""
    if _is_inspected(decision):
        return ""
    return (
        f"{limit.ref} counts {limit.measure}, and {decision.rule} lets this connection pass without "
        "inspection, where nothing can be counted"
    )


def _is_inspected(decision: Decision) -> bool:
    return any(o.name == "inspect" for o in decision.obligations)


def usage_of(attributes: Mapping[str, Any]) -> Usage:
    """The usage that a report tells; a number that makes no sense is the largest there is."""
    return Usage(
        str(attributes.get("provider", ""))[:64],
        str(attributes.get("model", ""))[:128],
        *(
            _whole(attributes.get(name, 0), MAX_TOKENS)
            for name in (
                "input_tokens",
                "output_tokens",
                "cache_read_tokens",
                "cache_write_tokens",
            )
        ),
    )


def _whole(value: Any, most: int) -> int:
    """A count that a component told. Nonsense is charged as the most, never as nothing."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most:
        return value
    return most


def moment(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _shown(amount: float) -> str:
    return f"{amount:.2f}".rstrip("0").rstrip(".")
