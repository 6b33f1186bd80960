"""Who is at the other end: the kernel's answer for a socket, turned into a run."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from aa import cgroup
from aa.model import Run
from aa.paths import AGENTS_SLICE, CGROUP_ROOT
from aa.sockdiag import Address, SockDiag, SockDiagError, SocketOwner

OUTSIDE_SECONDS = 1.0
"""How long a cgroup that was found to be no run's is not looked for again."""
OUTSIDE_LIMIT = 256


@dataclass(frozen=True, slots=True)
class Client:
    """A run, or a user who may use the explicit port outside of one (`user/NAME`)."""

    run: str
    uid: int


@dataclass(frozen=True, slots=True)
class Stranger:
    """Nobody we know; `reason` says so to a person."""

    reason: str
    uid: int = -1


class Runs(Protocol):
    """What this module needs of `aa.report.RunTable`."""

    def by_cgroup(self, cgroup_id: int) -> Run | None: ...


class Identify:
    """Answers within microseconds, without waiting: the kernel is asked inside the call."""

    def __init__(
        self,
        runs: Runs,
        diag: SockDiag,
        *,
        explicit_users: Mapping[int, str] | None = None,
        root: Path = CGROUP_ROOT,
        slice_: str = AGENTS_SLICE,
    ) -> None:
        self._runs = runs
        self._diag = diag
        self._explicit_users = explicit_users or {}
        self._root = root
        self._slice = slice_
        self._outside: dict[int, float] = {}

    def tcp(
        self, family: int, source: Address, destination: Address, *, explicit: bool = False
    ) -> Client | Stranger:
        """The client of a connection, by the four-tuple that its own socket has."""
        return self._ask(socket.IPPROTO_TCP, family, source, destination, explicit)

    def udp(self, family: int, source: Address) -> Client | Stranger:
        """The sender of a datagram, while its socket is open."""
        return self._ask(socket.IPPROTO_UDP, family, source, None, False)

    def _ask(
        self,
        protocol: int,
        family: int,
        source: Address,
        destination: Address | None,
        explicit: bool,
    ) -> Client | Stranger:
        try:
            owner = self._diag.owner(family, protocol, source, destination)
        except (SockDiagError, ValueError) as e:
            return Stranger(f"the kernel does not tell whose socket this is: {e}")
        if owner is None:
            return Stranger("the kernel knows no single socket behind this")
        run = self._run_of(owner.cgroup_id)
        if run is not None:
            return Client(run.id, owner.uid)
        if explicit and owner.uid in self._explicit_users:
            return self._explicit(owner)
        return Stranger("this process belongs to no governed run", owner.uid)

    def _explicit(self, owner: SocketOwner) -> Client | Stranger:
        """A user outside every run. What is below the agents' slice is a run, known or not."""
        if cgroup.find_by_id(owner.cgroup_id, self._slice, self._root) is not None:
            return Stranger("this process belongs to a run that is not known", owner.uid)
        return Client(f"user/{self._explicit_users[owner.uid]}", owner.uid)

    def _run_of(self, cgroup_id: int) -> Run | None:
        """The run of a cgroup or of the nearest one above it."""
        run = self._runs.by_cgroup(cgroup_id)
        if run is not None:
            return run
        now = time.monotonic()
        if self._outside.get(cgroup_id, 0.0) > now:
            return None
        path = cgroup.find_by_id(cgroup_id, self._slice, self._root)
        while path is not None and path.startswith(f"{self._slice}/"):
            path = path.rpartition("/")[0]
            above = cgroup.cgroup_id(path, self._root)
            run = None if above is None else self._runs.by_cgroup(above)
            if run is not None:
                return run
        if len(self._outside) >= OUTSIDE_LIMIT:
            self._outside.clear()
        self._outside[cgroup_id] = now + OUTSIDE_SECONDS
        return None
