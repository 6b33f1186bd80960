"""A stand-in for the gateway's enforce socket: keeps what the kernel layer says, and tells it of runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

from aa.model import Layer, Report, Run, RunState
from aa.varlink import Call, Server, Service
from aa.varlink.idl import load_interface

ENFORCE = "io.agentassembly.Enforce"
STOP_SECONDS = 5.0


class Gateway:
    """Runs in a thread of its own. `open` and `shut` make it come and go."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reports: list[Report] = []
        self.lost = 0
        self.statuses: list[tuple[str, dict[str, Any]]] = []
        self.confirmed: dict[str, tuple[bool, str]] = {}
        self.runs: dict[str, Run] = {}
        self._watchers: list[asyncio.Queue[Run]] = []
        self._loop = asyncio.new_event_loop()
        self._server: Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def open(self) -> None:
        async def start() -> None:
            service = Service("stand-in", "0")
            methods = {name: self._unexpected for name in load_interface(ENFORCE).methods}
            methods |= {
                "Report": self._report,
                "SetStatus": self._set_status,
                "ConfirmRun": self._confirm,
                "WatchRuns": self._watch,
            }
            service.add(ENFORCE, methods)
            self._server = Server.at(self.path, service)

        self._do(start())

    def shut(self) -> None:
        async def stop() -> None:
            if self._server is not None:
                self._server.close()
                self._server = None
                self._watchers.clear()

        self._do(stop())

    def close(self) -> None:
        self.shut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_SECONDS)

    def tell(self, run: Run) -> None:
        """A run began or changed."""

        async def put() -> None:
            if run.state is RunState.ENDED:
                self.runs.pop(run.id, None)
            else:
                self.runs[run.id] = run
            for watcher in self._watchers:
                watcher.put_nowait(run)

        self._do(put())

    def starting(
        self, id: str, cgroup: str, cgroup_id: int, layers: tuple[Layer, ...] = tuple(Layer)[:3]
    ) -> Run:
        run = Run(
            id=id,
            agent="test",
            user="root",
            uid=0,
            layers=frozenset(layers),
            state=RunState.STARTING,
            cgroup=cgroup,
            cgroup_id=cgroup_id,
        )
        self.tell(run)
        return run

    @property
    def rung(self) -> str:
        return str(self.statuses[-1][1]["rung"]) if self.statuses else ""

    def _do(self, work: Awaitable[None]) -> None:
        async def run() -> None:
            await work

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(STOP_SECONDS)

    def _report(self, call: Call) -> dict[str, Any]:
        self.lost += call.parameters["lost"]
        self.reports += [Report.from_json(r) for r in call.parameters["reports"]]
        return {}

    def _set_status(self, call: Call) -> dict[str, Any]:
        self.statuses.append((call.parameters["state"], call.parameters["details"]))
        return {}

    def _confirm(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        assert p["component"] == "ebpf"
        self.confirmed[p["run"]] = (p["ok"], p["reason"])
        return {}

    async def _watch(self, call: Call) -> AsyncIterator[dict[str, Any]]:
        mine: asyncio.Queue[Run] = asyncio.Queue()
        self._watchers.append(mine)
        yield {"event": "snapshot", "runs": [r.as_json() for r in self.runs.values()]}
        while True:
            run = await mine.get()
            yield {"event": "changed", "runs": [run.as_json()]}

    def _unexpected(self, call: Call) -> dict[str, Any]:
        raise AssertionError(f"nobody asked for {call.method}")
