"""The kill switch without systemd: who may pause, resume and halt, what is told, and what survives."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from aa.launch import halt as halt_file
from aa.launch import switch as switch_module
from aa.launch import tree
from aa.launch.halt import Halt
from aa.launch.live import Live
from aa.launch.switch import Switch
from aa.launch.systemd import NoSuchUnit, SystemdError, Who
from aa.model import Report, Run, RunState
from aa.varlink import Call, Peer, VarlinkError

OWNER, OTHER, OPERATOR = 1000, 1001, 0


def peer(uid: int) -> Peer:
    return Peer(1, uid, uid, "user.slice")


def call(uid: int, **parameters: Any) -> Call:
    return Call("M", parameters, False, peer(uid))


class Freezer:
    """systemd's freezer, with units that do not stop."""

    def __init__(self) -> None:
        self.frozen: set[str] = set()
        self.stubborn: set[str] = set()
        self.killed: list[str] = []
        self.seconds = 0.0

    def freeze(self, unit: str) -> None:
        time.sleep(self.seconds)
        if unit in self.stubborn:
            raise SystemdError("it does not stop")
        self.frozen.add(unit)

    def thaw(self, unit: str) -> None:
        self.frozen.discard(unit)

    def freezer_state(self, unit: str) -> str:
        return "frozen" if unit in self.frozen else "running"

    def kill(self, unit: str, who: Who, number: int) -> None:
        if unit == "gone":
            raise NoSuchUnit(unit)
        self.killed.append(unit)


@dataclass
class Stage:
    folder: Path
    freezer: Freezer = field(default_factory=Freezer)
    live: dict[str, Live] = field(default_factory=dict)
    told: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    gateway_is_away: bool = False

    @property
    def file(self) -> Path:
        return self.folder / "launch" / "halted"

    def switch(self) -> Switch:
        return Switch(self.freezer, self.live, self.tell, self.reports.append, self.file)  # type: ignore[arg-type]

    async def tell(self, method: str, parameters: Mapping[str, Any]) -> None:
        if self.gateway_is_away:
            raise ConnectionRefusedError("nobody listens")
        self.told.append((method, parameters))

    def run(self, name: str, **fields: Any) -> Live:
        run = Run(name, "agent", "dev", OWNER, caller_uid=OWNER, state=RunState.RUNNING, **fields)
        live = Live(run, name, begun=True)
        self.live[name] = live
        return live


Play = Callable[[Callable[[Stage], Coroutine[Any, Any, None]]], None]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    def run(test: Callable[[Stage], Coroutine[Any, Any, None]]) -> None:
        async def staged() -> None:
            async with asyncio.timeout(60):
                await test(Stage(tmp_path))

        asyncio.run(staged())

    return run


def test_a_paused_run_is_frozen_and_goes_on_when_resumed(play: Play) -> None:
    async def test(stage: Stage) -> None:
        switch, live = stage.switch(), stage.run("r1")
        await switch.pause(live, peer(OWNER))
        assert stage.freezer.frozen == {"r1"} and live.run.paused_by == OWNER
        assert not live.goes_on.is_set()
        await switch.resume(live, peer(OWNER))
        assert stage.freezer.frozen == set() and live.run.paused_by == -1
        assert live.goes_on.is_set()
        assert [(m, p["paused"], p["uid"]) for m, p in stage.told] == [
            ("SetPaused", True, OWNER),
            ("SetPaused", False, OWNER),
        ]

    play(test)


def test_what_an_operator_paused_its_owner_does_not_resume_but_an_operator_does(play: Play) -> None:
    async def test(stage: Stage) -> None:
        switch, live = stage.switch(), stage.run("r1")
        await switch.pause(live, peer(OPERATOR))
        with pytest.raises(VarlinkError, match="an operator can let it go on"):
            await switch.resume(live, peer(OWNER))
        assert stage.freezer.frozen == {"r1"}
        await switch.resume(live, peer(OPERATOR))
        assert stage.freezer.frozen == set()

    play(test)


def test_a_run_that_cannot_be_frozen_as_a_whole_goes_on_and_that_is_told(play: Play) -> None:
    async def test(stage: Stage) -> None:
        switch, live = stage.switch(), stage.run("r1")
        stage.freezer.stubborn.add("r1")
        with pytest.raises(VarlinkError, match="it does not stop"):
            await switch.pause(live, peer(OWNER))
        assert live.run.paused_by == -1 and live.goes_on.is_set()
        assert stage.freezer.killed == []

    play(test)


def test_a_freeze_that_hangs_is_given_up_at_its_deadline(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switch_module, "FREEZE_SECONDS", 0.05)

    async def test(stage: Stage) -> None:
        switch, live = stage.switch(), stage.run("r1")
        stage.freezer.seconds = 1.0
        with pytest.raises(VarlinkError, match=r"within 0\.05 s|within"):
            await switch.pause(live, peer(OWNER))

    play(test)


def test_two_changes_of_one_run_at_once_are_refused_and_not_queued(play: Play) -> None:
    async def test(stage: Stage) -> None:
        switch, live = stage.switch(), stage.run("r1")
        stage.freezer.seconds = 0.2
        first = asyncio.create_task(switch.pause(live, peer(OWNER)))
        await asyncio.sleep(0.05)
        with pytest.raises(VarlinkError, match="Busy"):
            await switch.resume(live, peer(OWNER))
        await first
        assert live.run.paused_by == OWNER

    play(test)


def test_a_halt_freezes_all_and_kills_what_does_not_stop(play: Play) -> None:
    async def test(stage: Stage) -> None:
        switch = stage.switch()
        for name in ("r1", "r2", "stubborn", "gone"):
            stage.run(name)
        stage.run("starting").begun = False
        stage.freezer.stubborn |= {"stubborn", "gone"}
        told = await switch.halt(call(OPERATOR, reason="a drill"))
        assert told == {
            "frozen": ["r1", "r2"],
            "killed": ["stubborn", "starting"],
            "problems": [],
        }
        assert stage.freezer.killed == ["stubborn", "starting"] or set(stage.freezer.killed) == {
            "stubborn",
            "starting",
        }
        method, parameters = stage.told[-1]
        assert method == "SetHalt" and parameters["halted"] and parameters["reason"] == "a drill"

    play(test)


def test_only_operators_halt_and_release(play: Play) -> None:
    async def test(stage: Stage) -> None:
        switch, live = stage.switch(), stage.run("r1")
        with pytest.raises(VarlinkError, match="NotPermitted"):
            await switch.halt(call(OWNER, reason=""))
        assert switch.halted is None and stage.freezer.frozen == set()
        await switch.halt(call(OPERATOR, reason=""))
        with pytest.raises(VarlinkError, match="NotPermitted"):
            await switch.release(call(OWNER))
        with pytest.raises(VarlinkError, match="aasm halt --release"):
            await switch.resume(live, peer(OPERATOR))
        assert stage.freezer.frozen == {"r1"}

    play(test)


def test_after_a_halt_runs_go_on_except_those_that_were_paused(play: Play) -> None:
    async def test(stage: Stage) -> None:
        switch = stage.switch()
        stage.run("r1")
        await switch.pause(stage.run("paused"), peer(OWNER))
        await switch.halt(call(OPERATOR, reason=""))
        assert stage.freezer.frozen == {"r1", "paused"}
        assert (await switch.release(call(OPERATOR)))["resumed"] == ["r1"]
        assert stage.freezer.frozen == {"paused"} and switch.halted is None

    play(test)


def test_a_halt_survives_a_restart_and_its_end_does_too(play: Play) -> None:
    async def test(stage: Stage) -> None:
        await stage.switch().halt(call(OPERATOR, reason="a drill"))
        again = stage.switch()
        assert again.halted is not None and again.halted.reason == "a drill"
        await again.release(call(OPERATOR))
        assert stage.switch().halted is None

    play(test)


def test_a_halt_file_that_makes_no_sense_is_a_halt(tmp_path: Path) -> None:
    file = tmp_path / "halted"
    assert halt_file.read(file) is None
    for wrong in (b"", b"{", b"[]", b"\xff", b'{"uid": "x"}'):
        file.write_bytes(wrong)
        assert halt_file.read(file) is not None
    halt = Halt.now(0, "root", "x" * 10_000)
    halt_file.write(halt, file)
    assert halt_file.read(file) == halt and len(halt.reason) == halt_file.MAX_REASON
    halt_file.remove(file)
    assert halt_file.read(file) is None


def test_a_halt_that_cannot_be_kept_stops_everything_all_the_same(play: Play) -> None:
    async def test(stage: Stage) -> None:
        (stage.folder / "launch").write_text("a file where the folder should be")
        switch = stage.switch()
        assert switch.halted is not None  # what cannot be read is a halt
        switch.halted = None
        stage.run("r1")
        told = await switch.halt(call(OPERATOR, reason=""))
        assert told["frozen"] == ["r1"] and "would forget it" in told["problems"][0]

    play(test)


def test_without_a_gateway_all_is_stopped_and_it_is_told_when_it_is_back(play: Play) -> None:
    async def test(stage: Stage) -> None:
        stage.gateway_is_away = True
        switch, live = stage.switch(), stage.run("r1")
        before = live.run
        await switch.pause(live, peer(OWNER))
        told = await switch.halt(call(OPERATOR, reason=""))
        assert stage.freezer.frozen == {"r1"} and "does not know yet" in told["problems"][0]
        stage.gateway_is_away = False
        await switch.tell_again([before])
        assert [m for m, _ in stage.told] == ["SetHalt", "SetPaused"]
        assert stage.told[0][1]["halted"] and stage.told[1][1]["uid"] == OWNER

    play(test)


def test_after_a_restart_a_run_is_what_it_was(play: Play) -> None:
    async def test(stage: Stage) -> None:
        switch = stage.switch()
        paused, going, torn = stage.run("p", paused_by=OTHER), stage.run("g"), stage.run("t")
        stage.freezer.frozen = {"t"}  # frozen, and nobody was told
        for live in (paused, going, torn):
            await switch.take_up(live)
        assert stage.freezer.frozen == {"p", "t"}
        assert going.goes_on.is_set() and not torn.goes_on.is_set()
        assert torn.run.paused_by == 0

    play(test)


def test_who_kills_is_in_the_record(play: Play) -> None:
    async def test(stage: Stage) -> None:
        stage.switch().killing(stage.run("r1"), peer(OPERATOR), "killed")
        (report,) = stage.reports
        assert (report.run, report.reason) == ("r1", "killed by root")
        assert report.attributes == {"by_uid": 0, "by_user": "root"}

    play(test)


def test_a_tree_lists_parents_before_their_children_and_nobody_else(tmp_path: Path) -> None:
    shell = subprocess.Popen(["sh", "-c", "sleep 60 & wait"])
    try:
        where = tree.cgroup.of_process(shell.pid)
        assert where is not None
        folder = tmp_path / where
        folder.mkdir(parents=True, exist_ok=True)
        procs = folder / "cgroup.procs"

        def sleeper() -> int:
            children = Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()
            return int(children[0]) if children else 0

        def has_begun() -> bool:
            pid = sleeper()
            return bool(pid) and Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep")

        while not has_begun():
            time.sleep(0.01)
        procs.write_text(f"{sleeper()}\n{shell.pid}\n999999999\n")
        found, complete = tree.processes(where, tmp_path)
        assert [p.pid for p in found] == [shell.pid, sleeper()] and complete
        assert found[1].parent == shell.pid and found[1].command == ("sleep", "60")
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "cgroup.procs").write_text(f"{shell.pid}\n")
        assert tree.processes("elsewhere", tmp_path) == ([], True)
    finally:
        subprocess.run(["kill", str(sleeper())], check=False)
        shell.kill()
        shell.wait()
