"""Who is at the other end: the kernel's answer for a socket, turned into a run."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from aa import cgroup
from aa.model import Run
from aa.paths import AGENTS_SLICE, CGROUP_ROOT
from aa.sockdiag import Address, SockDiag, SockDiagError, SocketOwner, unanimous

RUNLESS_SECONDS = 1.0
"""How long a cgroup that was found to be no known run's is not looked for again."""
RUNLESS_LIMIT = 256


SEARCHES_PER_SECOND = 50.0
"""Searches of the whole socket table, with bursts of twice as many; each costs milliseconds."""


@dataclass(frozen=True, slots=True)
class Client:
    """A run, or a user who may use the explicit port outside of one (`user/NAME`)."""

    run: str
    uid: int
    inode: int = field(default=0, compare=False)
    """Of the client's socket; 0 when it is not known for certain."""


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
        self._runless: dict[int, tuple[float, bool]] = {}
        self._held: Counter[int] = Counter()
        self._searches = 2 * SEARCHES_PER_SECOND
        self._searched = time.monotonic()

    def set_explicit_users(self, users: Mapping[int, str]) -> None:
        """For connections from now on."""
        self._explicit_users = users

    def tcp(
        self,
        family: int,
        source: Address,
        destination: Address,
        *,
        explicit: bool = False,
        established: Callable[[], bool] = lambda: True,
    ) -> Client | Stranger:
        """The client of a connection, by the four-tuple that its own socket has.

        `established` says whether the connection is still whole; it matters when the
        four-tuple was changed on the way and the socket must be searched for.
        """
        try:
            owner = self._diag.owner(family, socket.IPPROTO_TCP, source, destination)
            if owner is None and not explicit and self._may_search():
                owner = self._search(family, source[0], destination)
                if not established():
                    return Stranger("the client left before it could be identified")
        except (SockDiagError, ValueError) as e:
            return Stranger(f"the kernel does not tell whose socket this is: {e}")
        return self._client(owner, explicit)

    def udp(self, family: int, source: Address) -> Client | Stranger:
        """The sender of a datagram, while its socket is open."""
        try:
            owner = self._diag.owner(family, socket.IPPROTO_UDP, source, None)
        except (SockDiagError, ValueError) as e:
            return Stranger(f"the kernel does not tell whose socket this is: {e}")
        return self._client(owner, False)

    def hold(self, client: Client) -> None:
        """Its connection lives: its socket is none that is searched for."""
        if client.inode:
            self._held[client.inode] += 1

    def release(self, client: Client) -> None:
        if client.inode:
            self._held[client.inode] -= 1
            if self._held[client.inode] <= 0:
                del self._held[client.inode]

    def _may_search(self) -> bool:
        now = time.monotonic()
        gained = (now - self._searched) * SEARCHES_PER_SECOND
        self._searches = min(2 * SEARCHES_PER_SECOND, self._searches + gained)
        self._searched = now
        if self._searches < 1:
            return False
        self._searches -= 1
        return True

    def _search(self, family: int, local: str, destination: Address) -> SocketOwner | None:
        """The owner of a connection whose source port conntrack changed.

        A program may use one source port towards two destinations; redirected to one
        port they would look alike, so the second gets another source port. It is one
        of the governed sockets with this destination (no other is redirected), and none
        whose connection we hold: named only when all of these lie in one cgroup.
        """
        found = self._diag.connected(family, local, destination)
        return unanimous(
            tuple(
                owner
                for owner in found
                if not (owner.inode and owner.inode in self._held)
                and self._is_governed(owner.cgroup_id)
            )
        )

    def _client(self, owner: SocketOwner | None, explicit: bool) -> Client | Stranger:
        if owner is None:
            return Stranger("the kernel knows no single socket behind this")
        run = self._run_of(owner.cgroup_id)
        if run is not None:
            return Client(run.id, owner.uid, owner.inode)
        if explicit and owner.uid in self._explicit_users:
            return self._explicit(owner)
        return Stranger("this process belongs to no governed run", owner.uid)

    def _explicit(self, owner: SocketOwner) -> Client | Stranger:
        """A user outside every run. What is below the agents' slice is a run, known or not."""
        if self._is_governed(owner.cgroup_id):
            return Stranger("this process belongs to a run that is not known", owner.uid)
        return Client(f"user/{self._explicit_users[owner.uid]}", owner.uid, owner.inode)

    def _is_governed(self, cgroup_id: int) -> bool:
        """Whether a cgroup lies below the agents' slice, in a known run or not."""
        return self._run_of(cgroup_id) is not None or self._runless[cgroup_id][1]

    def _run_of(self, cgroup_id: int) -> Run | None:
        """The run of a cgroup or of the nearest one above it."""
        run = self._runs.by_cgroup(cgroup_id)
        if run is not None:
            return run
        now = time.monotonic()
        if cgroup_id in self._runless and self._runless[cgroup_id][0] > now:
            return None
        path = cgroup.find_by_id(cgroup_id, self._slice, self._root)
        inside = path is not None
        while path is not None and path.startswith(f"{self._slice}/"):
            path = path.rpartition("/")[0]
            above = cgroup.cgroup_id(path, self._root)
            run = None if above is None else self._runs.by_cgroup(above)
            if run is not None:
                return run
        if len(self._runless) >= RUNLESS_LIMIT:
            self._runless.clear()
        self._runless[cgroup_id] = (now + RUNLESS_SECONDS, inside)
        return None
