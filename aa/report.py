"""How a component talks to the gateway: what it saw, in order and never blocking, and which runs there are.

`Reporter` keeps a bounded spool for while the gateway is away; what does not
fit is counted, and the count goes ahead of the next batch, so the audit log
has a gap record with a number and never a silent hole. `RunTable` follows the
live runs and keeps the last ones it knew while the gateway is away.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from aa.model import Report, Run, RunState
from aa.paths import ENFORCE_SOCKET
from aa.varlink import AsyncClient, VarlinkError
from aa.varlink.codec import ProtocolError

ENFORCE = "io.agentassembly.Enforce"

SPOOL_LIMIT = 8192
"""Reports that wait for the gateway; further ones are counted as lost."""
BATCH_LIMIT = 256
"""Reports in one message: at 2 KiB each well below the message limit."""
RECONNECT_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)
CALL_SECONDS = 10.0
FLUSH_SECONDS = 3.0
"""How long `close` tries to hand over what is left."""

Unreachable = (OSError, ProtocolError, TimeoutError)

log = logging.getLogger(__name__)


class Reporter:
    """Hands reports to the gateway. `report` never waits; `run` is the task that sends."""

    def __init__(
        self, component: str, *, socket: Path = ENFORCE_SOCKET, limit: int = SPOOL_LIMIT
    ) -> None:
        self.component = component
        self._socket = socket
        self._limit = limit
        self._spool: deque[Report] = deque()
        self._lost = 0
        self._sequence = 0
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._status: tuple[str, Mapping[str, Any]] | None = None
        self._status_sent = True
        self.connected = False

    @property
    def spooled(self) -> int:
        return len(self._spool)

    def report(self, report: Report) -> None:
        if len(self._spool) >= self._limit:
            self._lost += report.count
        else:
            self._spool.append(report)
        self._idle.clear()
        self._wake.set()

    def lost(self, count: int) -> None:
        """Counts events that were lost before they could become reports."""
        self._lost += count
        self._idle.clear()
        self._wake.set()

    def set_status(self, state: str, details: Mapping[str, Any]) -> None:
        """What the gateway shows of this component; sent again after each reconnect."""
        if self._status != (state, details):
            self._status = (state, details)
            self._status_sent = False
            self._wake.set()

    async def run(self) -> None:
        """Sends until cancelled, through any number of gateway restarts."""
        while True:
            client = await _connection(self._socket)
            client.on_end = self._wake.set  # a gateway that restarts wants the status again
            try:
                self.connected = True
                self._status_sent = self._status is None
                await self._send_all(client)
            except (*Unreachable, VarlinkError) as e:
                log.warning("gateway: %s; %d reports wait", str(e) or repr(e), len(self._spool))
            finally:
                self.connected = False
                await client.close()
            await asyncio.sleep(RECONNECT_SECONDS[0])

    async def close(self) -> None:
        """Waits a little for the spool to empty; what is left then is logged as lost."""
        try:
            async with asyncio.timeout(FLUSH_SECONDS):
                await self._idle.wait()
        except TimeoutError:
            log.error("%d reports could not be handed over", len(self._spool) + self._lost)

    async def _send_all(self, client: AsyncClient) -> None:
        while True:
            self._wake.clear()
            if client.closed:
                raise ConnectionResetError("the connection ended")
            if not self._status_sent and self._status is not None:
                state, details = self._status
                await client.call(
                    f"{ENFORCE}.SetStatus",
                    {"component": self.component, "state": state, "details": dict(details)},
                    timeout=CALL_SECONDS,
                )
                self._status_sent = (state, details) == self._status
                continue
            if self._spool or self._lost:
                await self._send_batch(client)
                continue
            self._idle.set()
            await self._wake.wait()

    async def _send_batch(self, client: AsyncClient) -> None:
        """One batch. It leaves the spool only when the gateway has answered for it."""
        batch = list(itertools.islice(self._spool, BATCH_LIMIT))
        lost = self._lost
        await client.call(
            f"{ENFORCE}.Report",
            {
                "component": self.component,
                "sequence": self._sequence,
                "lost": lost,
                "reports": [r.as_json() for r in batch],
            },
            timeout=CALL_SECONDS,
        )
        self._sequence += 1
        self._lost -= lost
        for _ in batch:
            self._spool.popleft()


async def _connection(socket: Path) -> AsyncClient:
    """Waits for the gateway to be there, with pauses that grow each time anew."""
    pauses = itertools.chain(RECONNECT_SECONDS, itertools.repeat(RECONNECT_SECONDS[-1]))
    while True:
        try:
            return await AsyncClient.connect(socket)
        except Unreachable:
            await asyncio.sleep(next(pauses))


OnRun = Callable[[Run], Awaitable[None] | None]


class RunTable:
    """The live runs as the gateway tells them, by id and by cgroup id.

    `on_run` is called for each run of a snapshot and for each change; an awaitable
    result becomes a task of its own, so a slow confirmation holds up nobody.
    """

    def __init__(self, *, socket: Path = ENFORCE_SOCKET, on_run: OnRun | None = None) -> None:
        self._socket = socket
        self._on_run = on_run
        self._by_id: dict[str, Run] = {}
        self._by_cgroup: dict[int, Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.changed = asyncio.Event()
        """Set at each change; who waits for it clears it."""
        self.synchronised = False

    def __iter__(self) -> Any:
        return iter(list(self._by_id.values()))

    def get(self, run: str) -> Run | None:
        return self._by_id.get(run)

    def by_cgroup(self, cgroup_id: int) -> Run | None:
        return self._by_cgroup.get(cgroup_id)

    async def follow(self) -> None:
        """Keeps the table true until cancelled, through any number of gateway restarts."""
        while True:
            client = await _connection(self._socket)
            try:
                async for message in client.stream(f"{ENFORCE}.WatchRuns"):
                    self._take(message)
            except (*Unreachable, VarlinkError) as e:
                log.warning("gateway: %s; keeping %d runs", str(e) or repr(e), len(self._by_id))
            finally:
                self.synchronised = False
                await client.close()
            await asyncio.sleep(RECONNECT_SECONDS[0])

    def _take(self, message: Mapping[str, Any]) -> None:
        runs = [Run.from_json(r) for r in message["runs"]]
        if message["event"] == "snapshot":
            self._by_id.clear()
            self._by_cgroup.clear()
            self.synchronised = True
        for run in runs:
            self._put(run)
        self.changed.set()
        for run in runs:
            self._tell(run)

    def _put(self, run: Run) -> None:
        old = self._by_id.pop(run.id, None)
        if old is not None:
            self._by_cgroup.pop(old.cgroup_id, None)
        if run.state is not RunState.ENDED:
            self._by_id[run.id] = run
            if run.cgroup_id:
                self._by_cgroup[run.cgroup_id] = run

    def _tell(self, run: Run) -> None:
        if self._on_run is None:
            return
        result = self._on_run(run)
        if inspect.iscoroutine(result):
            task = asyncio.get_running_loop().create_task(result)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


async def confirm_run(
    run: str, component: str, ok: bool, reason: str = "", *, socket: Path = ENFORCE_SOCKET
) -> None:
    """Tells the gateway that a component is ready for a run, or why it is not."""
    client = await AsyncClient.connect(socket)
    try:
        await client.call(
            f"{ENFORCE}.ConfirmRun",
            {"run": run, "component": component, "ok": ok, "reason": reason},
            timeout=CALL_SECONDS,
        )
    finally:
        await client.close()


def now() -> int:
    """The time for a report, in nanoseconds since the epoch."""
    return time.time_ns()
