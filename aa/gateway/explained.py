"""Which hosts a run was allowed to reach, and so which requests inside TLS a decision explains.

The kernel layer sees requests at TLS libraries. One for a host that no connection of its run was decided for
went through a connection that was decided under another name (fronting), or round the proxy: a person should
look. Memory is bounded, and what was forgotten is not held against a run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from aa.audit.record import Record
from aa.model import Action, Effect, Kind, Layer, RecordType, Report, Run

MAX_RUNS = 1024
"""Runs whose hosts are known, among them those that ended last."""
MAX_HOSTS = 512
"""Names and addresses of one run."""
MAX_ALERTS = 32
"""Different hosts of one run that are alerts of their own."""

DECIDED = (Kind.NET_CONNECT, Kind.HTTP_REQUEST)
PLAINTEXT = "tls-probe"


@dataclass(slots=True)
class _Reached:
    hosts: OrderedDict[str, None] = field(default_factory=OrderedDict)
    partial: bool = False
    """Whether some were forgotten."""
    alerted: set[str] = field(default_factory=set)


class Explained:
    def __init__(self, *, runs: int = MAX_RUNS, hosts: int = MAX_HOSTS) -> None:
        self._limit = runs
        self._hosts = hosts
        self._runs: OrderedDict[str, _Reached] = OrderedDict()
        self._forgot = 0.0
        """Of runs that began before this (seconds since the epoch) some may be forgotten."""

    def __len__(self) -> int:
        return len(self._runs)

    def decided(self, run: str, action: Action, *, now: float) -> None:
        """A connection or request of a run was allowed."""
        if action.kind in DECIDED:
            self._add(run, _ends(action.attributes, action.target), now)

    def recall(self, records: Iterable[Record], *, complete: bool, now: float) -> None:
        """Decisions that were made before this gateway began, from the log; `complete`: it was read to its end."""
        for record in records:
            attributes = record.get("attributes")
            if (
                record.get("type") == RecordType.DECISION.value
                and record.get("decision") == Effect.ALLOW.value
                and record.get("kind") in DECIDED
                and isinstance(attributes, dict)
            ):
                self._add(record["run"], _ends(attributes, str(record["target"])), now)
        if not complete:
            self._forgot = now

    def judge(self, run: Run, report: Report) -> tuple[Report, str]:
        """The report, with `decided` where that is known, and the reason of an alert, or ""."""
        about = report.attributes
        if (
            report.kind is not Kind.HTTP_REQUEST
            or report.type is not RecordType.OBSERVED
            or about.get("source") != PLAINTEXT
            or "unmeasured" in about
            or Layer.PROXY not in run.layers
        ):
            return report, ""
        host = _host(about)
        if not host:
            return report, ""
        reached = self._runs.get(run.id)
        if reached is not None and host in reached.hosts:
            return _marked(report, True), ""
        if run.started <= self._forgot or (reached is not None and reached.partial):
            return report, ""
        return _marked(report, False), self._alert(run.id, host, about)

    def _alert(self, run: str, host: str, about: Mapping[str, Any]) -> str:
        alerted = self._of(run, self._forgot).alerted
        if host in alerted or len(alerted) > MAX_ALERTS:
            return ""
        alerted.add(host)
        if len(alerted) > MAX_ALERTS:
            return (
                f"the run sent requests for more than {MAX_ALERTS} hosts that no decided connection "
                "explains; further ones are in the log with decided: false"
            )
        return (
            f"a request for {host} was sent inside TLS, and no connection of this run to it was "
            f"decided: the program {about.get('comm') or '?'} used one that was allowed for another "
            "name, or went round the proxy"
        )

    def _add(self, run: str, hosts: Iterable[str], now: float) -> None:
        reached = self._of(run, now)
        for host in hosts:
            reached.hosts[host] = None
            reached.hosts.move_to_end(host)
        while len(reached.hosts) > self._hosts:
            reached.hosts.popitem(last=False)
            reached.partial = True

    def _of(self, run: str, now: float) -> _Reached:
        reached = self._runs.setdefault(run, _Reached())
        self._runs.move_to_end(run)
        if len(self._runs) > self._limit:
            self._runs.popitem(last=False)
            self._forgot = max(self._forgot, now)
        return reached


def _ends(attributes: Mapping[str, Any], target: str) -> list[str]:
    """Names and addresses that a decision was about."""
    host, addresses = attributes.get("host"), attributes.get("addresses")
    found = [host] if isinstance(host, str) and host else []
    if isinstance(addresses, list):
        found += [a for a in addresses if isinstance(a, str)]
    elif not found:
        found = [_without_port(target)]
    return found


def _host(about: Mapping[str, Any]) -> str:
    """Whom a request names; where it names nobody, the address that it went to, if that is certain."""
    host, peer = about.get("host"), about.get("peer")
    if isinstance(host, str) and host:
        return host
    return _without_port(peer) if about.get("peer_exact") and isinstance(peer, str) else ""


def _without_port(end: str) -> str:
    return end.rpartition(":")[0].strip("[]")


def _marked(report: Report, decided: bool) -> Report:
    return replace(report, attributes={**report.attributes, "decided": decided})
