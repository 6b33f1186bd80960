"""What components say to a gateway that comes and goes, and what they know of its runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from aa.model import Kind, Layer, RecordType, Report, Run, RunState
from aa.report import BATCH_LIMIT, ENFORCE, Reporter, RunTable
from aa.varlink import Call, Server, Service, VarlinkError, load_interface

SECONDS = 10.0


class Gateway:
    """The enforce socket, as far as reports and runs go."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.batches: list[dict[str, Any]] = []
        self.statuses: list[str] = []
        self.runs: list[Run] = []
        self.full_disk = False
        self._watchers: list[asyncio.Queue[Run]] = []
        self._server: Server | None = None

    def open(self) -> None:
        service = Service("stand-in", "0")
        methods = {name: self._unexpected for name in load_interface(ENFORCE).methods}
        given = {"Report": self._report, "SetStatus": self._status, "WatchRuns": self._watch}
        service.add(ENFORCE, {**methods, **given})
        self._server = Server.at(self.path, service)

    def shut(self) -> None:
        assert self._server is not None
        self._server.close()
        self._watchers.clear()

    def tell(self, run: Run) -> None:
        for watcher in self._watchers:
            watcher.put_nowait(run)

    @property
    def targets(self) -> list[str]:
        return [r["target"] for batch in self.batches for r in batch["reports"]]

    @property
    def lost(self) -> int:
        return sum(batch["lost"] for batch in self.batches)

    def _report(self, call: Call) -> Mapping[str, Any]:
        if self.full_disk:
            raise VarlinkError(f"{ENFORCE}.AuditUnavailable", {"reason": "the disk is full"})
        self.batches.append(dict(call.parameters))
        return {}

    def _status(self, call: Call) -> Mapping[str, Any]:
        self.statuses.append(call.parameters["state"])
        return {}

    async def _watch(self, call: Call) -> AsyncIterator[Mapping[str, Any]]:
        changes: asyncio.Queue[Run] = asyncio.Queue()
        self._watchers.append(changes)
        yield {"event": "snapshot", "runs": [r.as_json() for r in self.runs]}
        while True:
            yield {"event": "changed", "runs": [(await changes.get()).as_json()]}

    def _unexpected(self, call: Call) -> Mapping[str, Any]:
        raise AssertionError(f"nobody asked for {call.method}")


def report(target: str, count: int = 1) -> Report:
    return Report(RecordType.OBSERVED, Layer.KERNEL, Kind.EXEC, target, 1, count=count)


def run(name: str, cgroup_id: int, state: RunState = RunState.RUNNING) -> Run:
    return Run(name, "a", "dev", 1000, layers=frozenset(Layer), state=state, cgroup_id=cgroup_id)


async def until(met: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not met():
            await asyncio.sleep(0.01)


def play(act: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(act(), 3 * SECONDS))


@contextlib.asynccontextmanager
async def running(work: Any) -> AsyncIterator[None]:
    task = asyncio.get_running_loop().create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def test_reports_arrive_in_order_and_in_bounded_batches(tmp_path: Path) -> None:
    async def act() -> None:
        gateway, reporter = Gateway(tmp_path / "s"), Reporter("ebpf", socket=tmp_path / "s")
        gateway.open()
        expected = [f"/bin/{n}" for n in range(2 * BATCH_LIMIT + 1)]
        for target in expected:
            reporter.report(report(target))
        async with running(reporter.run()):
            await reporter.close()
        assert gateway.targets == expected and gateway.lost == 0
        assert [b["sequence"] for b in gateway.batches] == [0, 1, 2]
        assert max(len(b["reports"]) for b in gateway.batches) == BATCH_LIMIT

    play(act)


def test_reports_wait_for_a_gateway_that_is_away_and_status_is_said_again(tmp_path: Path) -> None:
    async def act() -> None:
        gateway, reporter = Gateway(tmp_path / "s"), Reporter("ebpf", socket=tmp_path / "s")
        reporter.set_status("ok", {})
        reporter.report(report("before"))
        async with running(reporter.run()):
            await asyncio.sleep(0.1)
            gateway.open()
            await until(lambda: gateway.targets == ["before"])
            gateway.shut()
            await until(lambda: not reporter.connected)
            reporter.report(report("meanwhile"))
            gateway.open()
            await until(lambda: gateway.targets == ["before", "meanwhile"])
        assert gateway.statuses == ["ok", "ok"]

    play(act)


def test_what_does_not_fit_is_counted_and_the_count_goes_ahead(tmp_path: Path) -> None:
    async def act() -> None:
        gateway = Gateway(tmp_path / "s")
        reporter = Reporter("ebpf", socket=tmp_path / "s", limit=2)
        for target in ("one", "two"):
            reporter.report(report(target))
        reporter.report(report("three", count=5))
        reporter.lost(2)
        gateway.open()
        async with running(reporter.run()):
            await reporter.close()
        assert gateway.targets == ["one", "two"]
        assert [b["lost"] for b in gateway.batches] == [7]

    play(act)


def test_a_batch_that_the_gateway_cannot_keep_is_kept_here(tmp_path: Path) -> None:
    async def act() -> None:
        gateway, reporter = Gateway(tmp_path / "s"), Reporter("ebpf", socket=tmp_path / "s")
        gateway.open()
        gateway.full_disk = True
        reporter.report(report("kept"))
        async with running(reporter.run()):
            await asyncio.sleep(0.2)
            assert reporter.spooled == 1 and gateway.targets == []
            gateway.full_disk = False
            await until(lambda: gateway.targets == ["kept"])
            await until(lambda: reporter.spooled == 0)

    play(act)


def test_runs_are_known_by_id_and_cgroup_until_they_end(tmp_path: Path) -> None:
    async def act() -> None:
        gateway, told = Gateway(tmp_path / "s"), []
        gateway.runs = [run("r1", 7)]
        gateway.open()
        table = RunTable(socket=tmp_path / "s", on_run=lambda r: told.append((r.id, r.state)))
        async with running(table.follow()):
            await until(lambda: table.by_cgroup(7) is not None)
            gateway.tell(run("r2", 8, RunState.STARTING))
            await until(lambda: table.get("r2") is not None)
            gateway.tell(run("r1", 7, RunState.ENDED))
            await until(lambda: table.get("r1") is None)
        assert table.by_cgroup(7) is None and table.by_cgroup(8) == table.get("r2")
        assert told == [
            ("r1", RunState.RUNNING),
            ("r2", RunState.STARTING),
            ("r1", RunState.ENDED),
        ]

    play(act)


def test_runs_stay_known_while_the_gateway_is_away_and_are_its_own_when_it_is_back(
    tmp_path: Path,
) -> None:
    async def act() -> None:
        gateway, table = Gateway(tmp_path / "s"), RunTable(socket=tmp_path / "s")
        gateway.runs = [run("r1", 7)]
        gateway.open()
        async with running(table.follow()):
            await until(lambda: table.synchronised)
            gateway.shut()
            await until(lambda: not table.synchronised)
            assert [r.id for r in table] == ["r1"]
            gateway.runs = [run("r2", 8)]
            gateway.open()
            await until(lambda: table.synchronised)
            assert [r.id for r in table] == ["r2"] and table.by_cgroup(7) is None

    play(act)
