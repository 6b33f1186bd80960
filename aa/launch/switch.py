"""The kill switch: freezes one run or all of them, lets them go on, and tells the gateway who did it.

What stands is systemd's freezer and the file of `halt`; the gateway is told, now or when it is
back, and denies for itself. To stop something never waits for the gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pwd
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from aa.launch import halt as halt_file
from aa.launch import request, tree
from aa.launch.halt import Halt
from aa.launch.live import Live
from aa.launch.systemd import NoSuchUnit, Systemd, SystemdError, Who
from aa.model import Kind, Layer, RecordType, Report, Run
from aa.varlink import Call, Peer, VarlinkError

LAUNCH = "io.agentassembly.Launch"

FREEZE_SECONDS = 5.0
"""For every process of a run to stop. One in the middle of a slow disk operation cannot."""
FREEZING_AT_ONCE = 16
"""Threads that wait for systemd's freezer. Halting has its own, so that no pause is in its way."""
TELL_SECONDS = 3.0
"""How long an answer waits for the gateway to know; what it missed it is told when it is back."""

Tell = Callable[[str, Mapping[str, Any]], Awaitable[None]]
"""Calls a method of the gateway. May raise."""

log = logging.getLogger(__name__)


class Switch:
    """Holds what is stopped. `live` is the launcher's own table of runs."""

    def __init__(
        self,
        systemd: Systemd,
        live: Mapping[str, Live],
        tell: Tell,
        report: Callable[[Report], None],
        file: Path = halt_file.HALT_FILE,
    ) -> None:
        self._systemd = systemd
        self._live = live
        self._tell = tell
        self._report = report
        self._file = file
        self.halted: Halt | None = halt_file.read(file)
        self._pausing = ThreadPoolExecutor(FREEZING_AT_ONCE, "pause")
        self._halting = ThreadPoolExecutor(FREEZING_AT_ONCE, "halt")

    # One run

    async def pause(self, live: Live, peer: Peer) -> None:
        """Raises `VarlinkError` and lets the run go on when it cannot be frozen as a whole."""
        _refuse_unready(live)
        async with _alone(live):
            if live.run.paused_by >= 0:
                return
            problem = await self._freeze(live, self._pausing)
            if problem:
                if not self.halted:
                    await self._thaw(live)
                raise VarlinkError(f"{LAUNCH}.NotFrozen", {"reason": problem})
            live.run = replace(live.run, paused_by=peer.uid)
            await self._tell_paused(live, peer.uid)

    async def resume(self, live: Live, peer: Peer) -> None:
        if self.halted is not None:
            raise VarlinkError(
                f"{LAUNCH}.NotPermitted",
                {"reason": f"{self.halted}; `aasm halt --release` lets all go on"},
            )
        async with _alone(live):
            by = live.run.paused_by
            if by < 0:
                raise VarlinkError(f"{LAUNCH}.NotPaused", {"reason": "the run is not paused"})
            if by not in (live.run.uid, live.run.caller_uid) and not request.is_operator(peer.uid):
                raise VarlinkError(
                    f"{LAUNCH}.NotPermitted",
                    {"reason": f"{name_of(by)} paused it; an operator can let it go on"},
                )
            problem = await self._thaw(live)
            if problem:
                raise VarlinkError(f"{LAUNCH}.NotFrozen", {"reason": problem})
            live.run = replace(live.run, paused_by=-1)
            await self._tell_paused(live, peer.uid)

    def killing(self, live: Live, peer: Peer, what: str) -> None:
        """Says in the audit log who ends a run, before it ends."""
        self._report(
            Report(
                type=RecordType.LIFECYCLE,
                layer=Layer.GATEWAY,
                kind=Kind.RUN,
                target=live.run.agent,
                time=time.time_ns(),
                run=live.run.id,
                reason=f"{what} by {name_of(peer.uid)}",
                attributes={"by_uid": peer.uid, "by_user": name_of(peer.uid)},
            )
        )

    def tree(self, live: Live) -> dict[str, Any]:
        found, complete = tree.processes(live.run.cgroup) if live.run.cgroup else ([], True)
        return {"processes": [p.as_json() for p in found], "complete": complete}

    # All of them

    async def halt(self, call: Call) -> dict[str, Any]:
        _refuse_others(call.peer)
        user = name_of(call.peer.uid)
        self.halted = Halt.now(call.peer.uid, user, call.parameters["reason"])
        problems = []
        try:
            halt_file.write(self.halted, self._file)
        except OSError as e:
            problems.append(f"{self._file}: {e.strerror}; a restart of aa-launch would forget it")
        telling = asyncio.ensure_future(self._tell_halt(call.peer.uid))
        lives = list(self._live.values())
        outcomes = await asyncio.gather(*(self._hold(live) for live in lives))
        if problem := await telling:
            problems.append(problem)
        by_outcome: dict[str, list[str]] = {"frozen": [], "killed": [], "over": []}
        for live, outcome in zip(lives, outcomes, strict=True):
            by_outcome[outcome].append(live.run.id)
        log.warning("%s; %d runs are frozen", self.halted, len(by_outcome["frozen"]))
        return {
            "frozen": by_outcome["frozen"],
            "killed": by_outcome["killed"],
            "problems": problems,
        }

    async def release(self, call: Call) -> dict[str, Any]:
        _refuse_others(call.peer)
        if self.halted is None:
            raise VarlinkError(f"{LAUNCH}.NotPaused", {"reason": "this host is not halted"})
        try:
            halt_file.remove(self._file)
        except OSError as e:
            raise VarlinkError(
                f"{LAUNCH}.Busy", {"reason": f"{self._file}: {e.strerror}; the halt stays"}
            ) from e
        self.halted = None
        problem = await self._tell_halt(call.peer.uid)
        problems = [problem] if problem else []
        resumed = []
        for live in [x for x in self._live.values() if x.run.paused_by < 0]:
            async with live.changing:
                failed = "" if self.halted else await self._thaw(live)
            if failed:
                problems.append(f"run {live.run.id}: {failed}")
            else:
                resumed.append(live.run.id)
        log.warning("%s ended the halt; %d runs go on", name_of(call.peer.uid), len(resumed))
        return {"resumed": resumed, "problems": problems}

    async def _hold(self, live: Live) -> Literal["frozen", "killed", "over"]:
        """Freezes a run for a halt, or kills it: one that goes on would make the halt a lie."""
        if live.begun:
            async with live.changing:
                if self.halted is None:  # released meanwhile
                    return "over"
                if not await self._freeze(live, self._halting):
                    return "frozen"
        if live.ended.done():
            return "over"
        try:
            self._systemd.kill(live.unit, Who.ALL, signal.SIGKILL)
        except NoSuchUnit:
            return "over"
        except SystemdError as e:
            log.error("run %s is neither frozen nor killed: %s", live.run.id, e)
        return "killed"

    # After a restart of either side

    async def take_up(self, live: Live) -> None:
        """Makes a run of an earlier life what it was: frozen, or not."""
        try:
            frozen = self._systemd.freezer_state(live.unit) in ("frozen", "freezing")
        except SystemdError as e:
            log.warning("run %s: systemd: %s", live.run.id, e)
            return
        async with live.changing:
            if self.halted or live.run.paused_by >= 0:
                problem = await self._freeze(live, self._halting)
                if problem:
                    log.error("run %s is not frozen again: %s", live.run.id, problem)
            elif frozen:  # died between the freezing and the telling: only an operator knows why
                live.goes_on.clear()
                live.run = replace(live.run, paused_by=0)
                await self._tell_paused(live, 0)

    async def tell_again(self, runs: list[Run]) -> None:
        """What the gateway does not know yet: the halt, and runs that it counts otherwise."""
        await self._tell_halt(self.halted.uid if self.halted else 0)
        for run in runs:
            live = self._live.get(run.id)
            if live is not None and live.begun and live.run.paused_by != run.paused_by:
                await self._tell_paused(live, max(live.run.paused_by, 0))

    # The steps

    async def _freeze(self, live: Live, threads: ThreadPoolExecutor) -> str:
        """ "" when every process of the run stands still, else why not."""
        live.goes_on.clear()
        return await self._in_thread(threads, self._systemd.freeze, live.unit)

    async def _thaw(self, live: Live) -> str:
        problem = await self._in_thread(self._pausing, self._systemd.thaw, live.unit)
        if not problem:
            live.goes_on.set()
        return problem

    async def _in_thread(
        self, threads: ThreadPoolExecutor, call: Callable[[str], None], unit: str
    ) -> str:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(FREEZE_SECONDS):
                await loop.run_in_executor(threads, call, unit)
        except TimeoutError:
            return f"not all of its processes stopped within {FREEZE_SECONDS:g} s"
        except SystemdError as e:
            return f"systemd: {e}"
        return ""

    async def _tell_paused(self, live: Live, uid: int) -> None:
        run = live.run
        parameters = {
            "run": run.id,
            "paused": run.paused_by >= 0,
            "uid": uid,
            "user": name_of(uid),
        }
        if problem := await self._try_to_tell("SetPaused", parameters):
            log.warning("run %s: %s", run.id, problem)

    async def _tell_halt(self, uid: int) -> str:
        halt = self.halted
        return await self._try_to_tell(
            "SetHalt",
            {
                "halted": halt is not None,
                "uid": uid,
                "user": halt.user if halt else name_of(uid),
                "reason": halt.reason if halt else "",
                "since": halt.since if halt else 0.0,
            },
        )

    async def _try_to_tell(self, method: str, parameters: Mapping[str, Any]) -> str:
        """ "" when the gateway knows; else what it will be told when it is back."""
        try:
            async with asyncio.timeout(TELL_SECONDS):
                await self._tell(method, parameters)
        except Exception as e:  # whatever it is, what was done stands
            return f"the gateway does not know yet ({str(e) or 'no answer'})"
        return ""


@contextlib.asynccontextmanager
async def _alone(live: Live) -> Any:
    """One change of a run at a time; a second one is refused, so that none ever queues."""
    if live.changing.locked():
        raise VarlinkError(
            f"{LAUNCH}.Busy", {"reason": "somebody pauses or resumes it right now; try again"}
        )
    async with live.changing:
        yield


def _refuse_unready(live: Live) -> None:
    if not live.begun:
        raise VarlinkError(f"{LAUNCH}.Busy", {"reason": "the run is still starting; try again"})


def _refuse_others(peer: Peer) -> None:
    if not request.is_operator(peer.uid):
        raise VarlinkError(
            f"{LAUNCH}.NotPermitted",
            {"reason": f"only root and members of {request.OPERATORS} may halt this host"},
        )


def name_of(uid: int) -> str:
    """A user's name, or the number where there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError, ValueError):
        return f"uid {uid}"
