"""Makes reports of refused packets: whose they were, repeats merged, and none missing without a number."""

from __future__ import annotations

import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aa import cgroup, report
from aa.model import Effect, Kind, Layer, RecordType, Report, Run, RunState
from aa.nflog import Logged, Packet
from aa.paths import CGROUP_ROOT, PROXY_SLICE
from aa.redirect.ruleset import PREFIX
from aa.sockdiag import SockDiag, SockDiagError, SocketOwner

RULE = "<redirect>"
MERGE_SECONDS = 5.0
"""The first refusal of its kind is reported at once; its repeats together, this much later."""
MERGE_LIMIT = 1024
"""Kinds of refusals that are told apart at one time."""
TARGETS_PER_RUN = 128
"""Targets of one run that are told apart at one time; further ones become one record."""
ENDED_SECONDS = 10.0
ENDED_LIMIT = 256
"""Runs that ended are remembered this long for what their last packets are blamed on."""

REASONS: Mapping[str, str] = {
    "tcp": "this TCP connection was not led to the proxy: its socket is older than the rules,"
    " or it answers somebody who connected to the run",
    "udp": "UDP leaves a run only as DNS to the host's resolver",
    "other": "only TCP and DNS leave a run, and both through the proxy",
    "inbound": "connections to a run are closed",
}
QUIC = "QUIC is refused so that the client uses TCP"
MORE = "further refusals to other targets"


@dataclass(frozen=True, slots=True)
class Culprit:
    """Whose packet it was. `identity` says how that is known: `cgroup`, `uid` or `unknown`."""

    run: str
    identity: str
    uid: int


class Runs:
    """The proxied runs, and for a little while those that ended."""

    def __init__(self, live: Callable[[], Iterable[Run]], root: Path = CGROUP_ROOT) -> None:
        self._live = live
        self._root = root
        self._ended: deque[tuple[float, Run]] = deque(maxlen=ENDED_LIMIT)

    def ended(self, run: Run) -> None:
        self._ended.append((time.monotonic(), run))

    def proxied(self) -> list[Run]:
        oldest = time.monotonic() - ENDED_SECONDS
        while self._ended and self._ended[0][0] < oldest:
            self._ended.popleft()
        known = {run.id: run for _, run in self._ended}
        for run in self._live():
            if run.state is not RunState.ENDED:
                known[run.id] = run
        return [run for run in known.values() if Layer.PROXY in run.layers]

    def by_cgroup(self, cgroup_id: int) -> Run | None:
        """The run whose cgroup this is, or lies above it."""
        runs = self.proxied()
        for run in runs:
            if run.cgroup_id == cgroup_id:
                return run
        path = cgroup.find_by_id(cgroup_id, PROXY_SLICE, self._root)
        if path is None:
            return None
        below = (r for r in runs if r.cgroup and f"{path}/".startswith(f"{r.cgroup}/"))
        return next(below, None)

    def by_uid(self, uid: int) -> Run | None:
        """The one live run of this user; None where there are more."""
        theirs = [run for run in self.proxied() if run.uid == uid and run.live]
        return theirs[0] if len(theirs) == 1 else None


def attribute(logged: Logged, runs: Runs, sockets: SockDiag) -> Culprit:
    """Whose packet it was: by its socket's cgroup, else by its uid if that is one run's alone."""
    owners = _owners(logged, sockets)
    blamed = {run.id for run in (runs.by_cgroup(o.cgroup_id) for o in owners) if run}
    if len(blamed) == 1:
        return Culprit(blamed.pop(), "cgroup", logged.uid)
    if logged.uid >= 0 and (run := runs.by_uid(logged.uid)) is not None:
        return Culprit(run.id, "uid", logged.uid)
    return Culprit("", "unknown", logged.uid)


def _owners(logged: Logged, sockets: SockDiag) -> tuple[SocketOwner, ...]:
    packet = logged.packet
    family = socket.AF_INET if packet.version == 4 else socket.AF_INET6
    ours = (packet.source, packet.source_port)
    theirs = (packet.destination, packet.destination_port)
    if is_inbound(logged):
        ours, theirs = theirs, ours
    try:
        if packet.protocol == socket.IPPROTO_TCP:
            owner = sockets.owner(family, packet.protocol, ours, theirs)
            return (owner,) if owner else ()
        return sockets.senders(family, packet.protocol, ours)
    except SockDiagError:
        return ()


def is_inbound(logged: Logged) -> bool:
    return reason_word(logged) == "inbound"


def reason_word(logged: Logged) -> str:
    return logged.prefix.removeprefix(PREFIX).strip()


def target(packet: Packet, *, inbound: bool) -> str:
    """The other side, as `address:port/protocol`."""
    address, port = packet.destination, packet.destination_port
    if inbound:
        address, port = packet.source, packet.source_port
    if not port:
        return f"{address}/{packet.protocol_name}"
    bracketed = f"[{address}]" if packet.version == 6 else address
    return f"{bracketed}:{port}/{packet.protocol_name}"


def refusal(logged: Logged, culprit: Culprit) -> Report:
    packet, inbound, word = logged.packet, is_inbound(logged), reason_word(logged)
    reason = REASONS.get(word, REASONS["other"])
    if word == "udp" and packet.destination_port == 443:
        reason = QUIC
    attributes: dict[str, Any] = {
        "identity": culprit.identity,
        "protocol": packet.protocol_name,
        "direction": "in" if inbound else "out",
        "source": _end(packet.source, packet.source_port),
        "destination": _end(packet.destination, packet.destination_port),
    }
    if culprit.uid >= 0:
        attributes["uid"] = culprit.uid
    return Report(
        type=RecordType.REFUSAL,
        layer=Layer.PROXY,
        kind=Kind.NET_CONNECT,
        target=target(packet, inbound=inbound),
        time=report.now(),
        run=culprit.run,
        effect=Effect.DENY,
        rule=RULE,
        reason=reason,
        attributes=attributes,
    )


def _end(address: str, port: int) -> str:
    if not port:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


MergeKey = tuple[str, str, str]


@dataclass
class _Repeats:
    until: float
    last: Report
    count: int = 0


@dataclass
class Merger:
    """Lets the first of equal refusals through and holds their repeats back for a while."""

    deliver: Callable[[Report], None]
    _open: OrderedDict[MergeKey, _Repeats] = field(default_factory=OrderedDict)
    _targets: dict[str, int] = field(default_factory=dict)

    def take(self, one: Report, now: float) -> None:
        self.flush(now)
        key = self._key(one)
        if key[1] == MORE:
            one = replace(one, target="*", reason=MORE)
        repeats = self._open.get(key)
        if repeats is not None:
            repeats.count += one.count
            repeats.last = one
            return
        self._open[key] = _Repeats(now + MERGE_SECONDS, one)
        self._targets[one.run] = self._targets.get(one.run, 0) + 1
        self.deliver(one)

    def flush(self, now: float) -> None:
        """Reports the repeats whose time is over. Called before each refusal and on a timer."""
        while self._open:
            key, repeats = next(iter(self._open.items()))
            if repeats.until > now:
                return
            self._close(key, repeats)

    def flush_all(self) -> None:
        for key, repeats in list(self._open.items()):
            self._close(key, repeats)

    def _close(self, key: MergeKey, repeats: _Repeats) -> None:
        del self._open[key]
        run = repeats.last.run
        self._targets[run] -= 1
        if not self._targets[run]:
            del self._targets[run]
        if repeats.count:
            self.deliver(replace(repeats.last, count=repeats.count))

    def _key(self, one: Report) -> MergeKey:
        key = (one.run, one.target, one.attributes["direction"])
        if key in self._open:
            return key
        crowded = self._targets.get(one.run, 0) >= TARGETS_PER_RUN
        return (one.run, MORE, "") if crowded or len(self._open) >= MERGE_LIMIT else key


@dataclass
class Account:
    """Compares what the rules counted with what was read, so that lost log messages have a number.

    `covered` is how many of the packets that the rules count now have a record or are in
    a gap record. It outlives the process in `file`, so that packets refused while nobody
    read are found at the next start; after a crash the number may be too high by what
    was read in the last moment.
    """

    file: Path | None = None
    covered: int = 0

    def load(self) -> None:
        if self.file is None:
            return
        try:
            self.covered = max(0, int(self.file.read_text()))
        except (FileNotFoundError, ValueError):
            self.covered = 0

    def save(self) -> None:
        if self.file is None:
            return
        new = self.file.with_suffix(".new")
        new.write_text(str(self.covered))
        new.replace(self.file)

    def read(self, count: int) -> None:
        self.covered += count

    def reset(self) -> None:
        """The rules are new and count from zero."""
        self.covered = 0

    def missing(self, counted: int) -> int:
        """How many of `counted` packets nobody has told of yet; counts them as told.

        `counted` must be older than the last look into the log.
        """
        missing = max(0, counted - self.covered)
        self.covered += missing
        return missing


def gap(count: int, why: str) -> Report:
    return Report(
        type=RecordType.GAP,
        layer=Layer.PROXY,
        kind=Kind.NET_CONNECT,
        target="refused packets",
        time=report.now(),
        rule=RULE,
        reason=f"{count} refused packets have no record of their own: {why}",
        count=count,
    )
