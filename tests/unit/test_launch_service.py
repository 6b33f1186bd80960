"""aa-launch between a gateway and a systemd that are not there: what goes wrong, and what is told to whom."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from aa.config import Agent, Config
from aa.launch import folders, sandbox, service
from aa.launch.folders import Found, see
from aa.launch.halt import Halt
from aa.launch.live import Live
from aa.launch.service import Launcher
from aa.launch.systemd import NoSuchUnit, SystemdError, UnitState, Who
from aa.model import Layer, Report, Run, RunState
from aa.policy.compile import Bits, Closed, Share, absolute
from aa.varlink import AsyncClient, Call, Client, Peer, Server, Service, VarlinkError
from aa.varlink.server import Limits

USER = pwd.getpwnam("nobody") if os.getuid() == 0 else pwd.getpwuid(os.getuid())
LAUNCH = "io.agentassembly.Launch"
ACTIVE = UnitState(True, "active", main_pid=os.getpid())


class FakeSystemd:
    """Units as the test says. A unit that is started begins a shim, which the test plays."""

    def __init__(self) -> None:
        self.states: dict[str, UnitState] = {}
        self.units: dict[str, Any] = {}
        self.refusal: SystemdError | None = None
        self.done: list[tuple[str, Any]] = []
        self.frozen: set[str] = set()
        self.unfreezable: set[str] = set()
        self.on_start: Callable[[str], None] = lambda socket: None

    def start(self, unit: str, properties: Any) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.units[unit] = list(properties)
        argv = next(value for name, value in properties if name == "ExecStart")[0][1]
        self.states.setdefault(unit, ACTIVE)
        self.on_start(argv[-1])

    def state(self, unit: str) -> UnitState:
        return self.states.get(unit, UnitState(False, "inactive"))

    def loaded(self, pattern: str) -> list[str]:
        return list(self.states)

    def kill(self, unit: str, who: Who, number: int) -> None:
        self.done.append(("kill", unit))
        if unit not in self.states:
            raise NoSuchUnit(unit)
        self.states[unit] = UnitState(True, "failed", "signal", signal=number)

    def freezer_state(self, unit: str) -> str:
        return "frozen" if unit in self.frozen else "running"

    def freeze(self, unit: str) -> None:
        if unit in self.unfreezable:
            raise SystemdError("it does not stop")
        self.frozen.add(unit)

    def thaw(self, unit: str) -> None:
        self.frozen.discard(unit)

    def stop(self, unit: str) -> None:
        self.done.append(("stop", unit))
        self.states[unit] = UnitState(True, "inactive", signal=signal.SIGTERM)

    def forget(self, unit: str) -> None:
        self.done.append(("forget", unit))
        self.states.pop(unit, None)


@dataclass
class FakeGateway:
    """The Enforce interface with answers that a test may change."""

    path: Path
    runs: dict[str, Run] = field(default_factory=dict)
    ends: list[dict[str, Any]] = field(default_factory=list)
    refusal: VarlinkError | None = None
    end_refusals: int = 0
    share: Share = Share()
    raw_share: dict[str, Any] | None = None
    shares: list[str] = field(default_factory=list)
    """The digests that runs were registered with."""
    pauses: list[tuple[str, bool, str]] = field(default_factory=list)
    halts: list[bool] = field(default_factory=list)
    server: Server | None = None

    def open(self) -> None:
        offered = Service("fake", "0")
        nothing: dict[str, Any] = {
            name: lambda call: {}
            for name in ("Decide", "WaitApproval", "Report", "SetStatus", "ConfirmRun")
        }
        offered.add(
            "io.agentassembly.Enforce",
            {
                **nothing,
                "GetSandbox": lambda call: {"share": self.raw_share or self.share.as_json()},
                "RegisterRun": self.register,
                "StartRun": self.start,
                "AwaitRun": self.wait,
                "EndRun": self.end,
                "SetPaused": self.set_paused,
                "SetHalt": self.set_halt,
                "WatchRuns": self.watch,
            },
        )
        self.server = Server.at(self.path, offered)

    def close(self) -> None:
        assert self.server
        self.server.close()
        self.path.unlink()

    def register(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        self.shares.append(p["share"])
        run = Run(f"r{len(self.runs)}", p["agent"], p["user"], p["uid"], p["home"],
                  frozenset(map(Layer, p["layers"])), caller_uid=p["caller_uid"],
                  share=p["share"])  # fmt: skip
        self.runs[run.id] = run
        return {"run": run.as_json()}

    def start(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        run = replace(self.runs[p["run"]], cgroup=p["cgroup"], cgroup_id=p["cgroup_id"],
                      state=RunState.STARTING)  # fmt: skip
        self.runs[run.id] = run
        return {"run": run.as_json()}

    def wait(self, call: Call) -> dict[str, Any]:
        if self.refusal is not None:
            raise self.refusal
        run = replace(self.runs[call.parameters["run"]], state=RunState.RUNNING)
        self.runs[run.id] = run
        return {"run": run.as_json()}

    def end(self, call: Call) -> dict[str, Any]:
        if self.end_refusals:
            self.end_refusals -= 1
            raise VarlinkError("io.agentassembly.AuditUnavailable", {"reason": "disk full"})
        self.runs.pop(call.parameters["run"], None)
        self.ends.append(call.parameters)
        return {}

    def set_paused(self, call: Call) -> dict[str, Any]:
        p = call.parameters
        self.pauses.append((p["run"], p["paused"], p["user"]))
        paused_by = p["uid"] if p["paused"] else -1
        self.runs[p["run"]] = replace(self.runs[p["run"]], paused_by=paused_by)
        return {}

    def set_halt(self, call: Call) -> dict[str, Any]:
        self.halts.append(call.parameters["halted"])
        return {}

    async def watch(self, call: Call) -> AsyncIterator[dict[str, Any]]:
        yield {"event": "snapshot", "runs": [r.as_json() for r in self.runs.values()]}
        await asyncio.Event().wait()


@dataclass
class Stage:
    """Everything around one Launcher."""

    folder: Path
    systemd: FakeSystemd
    gateway: FakeGateway
    launcher: Launcher
    server: Server
    reports: list[Report]
    heard: list[dict[str, Any]] = field(default_factory=list)
    """What the shim was sent."""

    @property
    def socket(self) -> Path:
        return self.folder / "launch"

    def play_shim(self, reply: bytes = b"", *, then: str = "exit", code: int = 0) -> None:
        """The shim to come: reads until the go-ahead, sends `reply`, closes; its unit ends then."""

        async def act(path: str) -> None:
            reader, writer = await asyncio.open_unix_connection(path)
            with contextlib.suppress(asyncio.IncompleteReadError):
                while not self.heard or self.heard[-1] != {"go": True}:
                    self.heard.append(json.loads((await reader.readuntil(b"\0"))[:-1]))
            writer.write(reply)
            writer.close()
            if then == "exit":
                self.systemd.states[f"aa-agent-{Path(path).name}.service"] = UnitState(
                    True, "inactive", exit_code=code
                )

        tasks = []
        self.systemd.on_start = lambda path: tasks.append(asyncio.create_task(act(path)))

    async def start(self, argv: list[str] | None = None, **named: Any) -> list[dict[str, Any]]:
        """Calls Start with streams of /dev/null; returns the replies, or raises what came instead."""
        parameters = {
            "agent": None, "user": USER.pw_name, "argv": argv or ["prog"], "environment": [],
            "terminal": False, "stdin": 0, "stdout": 0, "stderr": 0, "directory": 1, **named,
        }  # fmt: skip

        def call() -> list[dict[str, Any]]:
            null, place = os.open("/dev/null", os.O_RDWR), os.open(self.folder, os.O_PATH)
            try:
                with Client(self.socket, timeout=10) as client:
                    return list(client.stream(f"{LAUNCH}.Start", parameters, fds=[null, place]))
            finally:
                os.close(null)
                os.close(place)

        return await asyncio.to_thread(call)

    async def ended(self) -> dict[str, Any]:
        async with asyncio.timeout(10):
            while not self.gateway.ends:
                await asyncio.sleep(0.005)
        return self.gateway.ends[-1]


Play = Callable[[Callable[[Stage], Coroutine[Any, Any, None]]], None]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Runs a test's coroutine on a stage."""

    async def look(
        user: pwd.struct_passwd, directory: str, declared: Any, *, terminal: int, wanted: Any
    ) -> Found:
        status = os.stat(directory)
        place = sandbox.Directory(directory, status.st_dev, status.st_ino)
        seen = {w: (see(absolute(w.path, home="/nobody", directory=directory)),) for w in wanted}
        return Found("/home/nobody-at-all", place, "", (), (), (), seen)

    def is_main_process(self: Launcher, live: Live, peer: Peer) -> bool:
        group = f"{sandbox.SLICE_PATHS[True]}/{live.unit}"
        live.run = replace(live.run, cgroup=group, cgroup_id=7)
        return True

    monkeypatch.setattr(folders, "look", look)
    monkeypatch.setattr(Launcher, "_is_main_process", is_main_process)
    monkeypatch.setattr(service, "ADOPT_SECONDS", 0.05)
    monkeypatch.setattr(service, "HANGUP_SECONDS", 0.1)

    def run(test: Callable[[Stage], Coroutine[Any, Any, None]]) -> None:
        async def staged() -> None:
            (tmp_path / "doors").mkdir()
            systemd, gateway = FakeSystemd(), FakeGateway(tmp_path / "enforce")
            reports: list[Report] = []
            config = Config(agents={"two": Agent("two", frozenset({Layer.KERNEL}))})
            launcher = Launcher(
                lambda: config,
                systemd,  # type: ignore[arg-type]
                enforce=gateway.path,
                doors=tmp_path / "doors",
                halt=tmp_path / "state" / "halted",
                report=reports.append,
            )
            gateway.open()
            server = Server.at(tmp_path / "launch", launcher.service(), limits=Limits(fds=16))
            following = asyncio.create_task(launcher.follow())
            try:
                async with asyncio.timeout(20):
                    await test(Stage(tmp_path, systemd, gateway, launcher, server, reports))
            finally:
                following.cancel()
                launcher.stopping = True
                server.close()

        asyncio.run(staged())

    return run


def test_a_run_is_told_from_its_start_to_its_end(play: Play) -> None:
    async def test(stage: Stage) -> None:
        stage.play_shim(code=3)
        started, exited = await stage.start(["prog", "-x"])
        assert (started["event"], started["run"]) == ("started", "r0")
        assert (exited["event"], exited["exit_code"], exited["signal"]) == ("exited", 3, None)
        instructions, go = stage.heard
        assert instructions["argv"] == ["prog", "-x"] and go == {"go": True}
        assert instructions["landlock"]["required"] is True
        assert (await stage.ended())["exit_code"] == 3
        assert list((stage.folder / "doors").iterdir()) == []

    play(test)


def test_what_the_policy_closes_is_for_the_shim_to_prove_and_the_run_remembers_it(
    play: Play,
) -> None:
    async def test(stage: Stage) -> None:
        closed = Closed(str(stage.folder / "secret"), "", Bits.READ, "p/secret")
        (stage.folder / "secret").touch()
        stage.gateway.share = Share(closed=(closed,), tasks=50)
        stage.play_shim()
        await stage.start()
        assert stage.heard[0]["closed"] == [[closed.path, "closed"]]
        assert stage.gateway.shares == [stage.gateway.share.digest]
        unit = dict(stage.systemd.units["aa-agent-r0.service"])
        assert f"-{closed.path}" in unit["InaccessiblePaths"] and unit["TasksMax"] == 50

    play(test)


def test_a_policy_that_cannot_be_enforced_means_not_started(play: Play) -> None:
    async def test(stage: Stage) -> None:
        stage.gateway.share = Share(user_namespaces=True)
        stage.play_shim()
        with pytest.raises(VarlinkError, match="NotStarted.*rung lsm or fmod_ret"):
            await stage.start()
        assert stage.gateway.runs == {} and stage.systemd.units == {}

    play(test)


def test_a_share_of_another_version_means_not_started(play: Play) -> None:
    async def test(stage: Stage) -> None:
        stage.gateway.raw_share = {**Share().as_json(), "new": True}
        stage.play_shim()
        with pytest.raises(VarlinkError, match="another version"):
            await stage.start()

    play(test)


def test_a_layer_that_is_not_ready_means_no_go_ahead_and_an_end(play: Play) -> None:
    async def test(stage: Stage) -> None:
        stage.gateway.refusal = VarlinkError(
            "io.agentassembly.Enforce.LayerNotReady",
            {"reason": "no rules", "component": "redirect"},
        )
        stage.play_shim()
        with pytest.raises(VarlinkError) as refused:
            await stage.start()
        assert refused.value.name == "NotStarted"
        assert refused.value.parameters == {"reason": "no rules", "component": "redirect"}
        assert {"go": True} not in stage.heard
        assert "no rules" in (await stage.ended())["reason"]
        assert ("kill", "aa-agent-r0.service") in stage.systemd.done

    play(test)


def test_a_step_that_fails_in_the_shim_means_not_started(play: Play) -> None:
    async def test(stage: Stage) -> None:
        told = {"failed": "landlock", "reason": "ABI 0", "code": 125}
        stage.play_shim(json.dumps(told).encode() + b"\0")
        with pytest.raises(VarlinkError, match="landlock: ABI 0"):
            await stage.start()
        assert "landlock" in (await stage.ended())["reason"]

    play(test)


def test_words_of_the_shim_that_nobody_understands_mean_not_started(play: Play) -> None:
    async def test(stage: Stage) -> None:
        stage.play_shim(b"\xff\xfe")
        with pytest.raises(VarlinkError, match="NotStarted"):
            await stage.start()

    play(test)


def test_a_shim_that_leaves_without_listening_is_no_start(play: Play) -> None:
    async def test(stage: Stage) -> None:
        async def leave(path: str) -> None:
            with socket.socket(socket.AF_UNIX) as shim:
                shim.setblocking(False)
                await asyncio.get_running_loop().sock_connect(shim, path)
                await asyncio.sleep(0.2)

        tasks = []
        stage.systemd.on_start = lambda path: tasks.append(asyncio.create_task(leave(path)))
        with pytest.raises(VarlinkError, match="NotStarted"):
            await stage.start()

    play(test)


def test_a_program_that_cannot_be_executed_is_an_end_with_a_reason(play: Play) -> None:
    async def test(stage: Stage) -> None:
        told = {"failed": "exec", "reason": "prog: not found", "code": 127}
        stage.play_shim(json.dumps(told).encode() + b"\0", code=127)
        (exited,) = await stage.start()
        assert (exited["exit_code"], exited["reason"]) == (127, "prog: not found")

    play(test)


def test_a_unit_that_dies_before_the_shim_is_explained(play: Play) -> None:
    async def test(stage: Stage) -> None:
        failed = UnitState(True, "failed", "exit-code", exit_code=226)
        stage.systemd.on_start = lambda path: stage.systemd.states.update(
            {"aa-agent-r0.service": failed}
        )
        with pytest.raises(VarlinkError, match="mount namespace"):
            await stage.start()
        assert "226" in (await stage.ended())["reason"]

    play(test)


def test_a_refusal_of_systemd_is_told_and_the_run_ended(play: Play) -> None:
    async def test(stage: Stage) -> None:
        stage.systemd.refusal = SystemdError("Access denied")
        with pytest.raises(VarlinkError, match="Access denied"):
            await stage.start()
        assert (await stage.ended())["run"] == "r0"

    play(test)


def test_without_a_gateway_no_unit_is_started(play: Play) -> None:
    async def test(stage: Stage) -> None:
        stage.gateway.close()
        stage.play_shim()
        with pytest.raises(VarlinkError) as refused:
            await stage.start()
        assert refused.value.parameters["component"] == "gateway"
        assert stage.systemd.states == {} and stage.heard == []

    play(test)


def test_the_end_is_told_again_until_the_gateway_takes_it(play: Play) -> None:
    async def test(stage: Stage) -> None:
        stage.gateway.end_refusals = 2
        stage.play_shim(code=4)
        _, exited = await stage.start()
        assert exited["exit_code"] == 4
        assert len(stage.gateway.ends) == 1

    play(test)


def test_a_bad_request_registers_nothing(play: Play) -> None:
    async def test(stage: Stage) -> None:
        for wrong in (
            {"stdin": 5},
            {"directory": 0},
            {"terminal": True},
            {"environment": ["no assignment"]},
            {"agent": "../x"},
            {"user": "no-such-user-here"},
        ):
            with pytest.raises(VarlinkError, match="BadRequest"):
                await stage.start(**wrong)
        assert stage.gateway.runs == {} and stage.systemd.states == {}

    play(test)


def test_a_run_whose_client_leaves_is_hung_up_and_then_stopped(play: Play) -> None:
    async def test(stage: Stage) -> None:
        stage.play_shim(then="live on")
        waiting = asyncio.create_task(stage.start())
        while "aa-agent-r0.service" not in stage.systemd.states or len(stage.heard) < 2:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        for connection in list(stage.server._connections):
            connection.close()
        with pytest.raises(ConnectionResetError):
            await waiting
        assert (await stage.ended())["signal"] == signal.SIGTERM
        assert ("stop", "aa-agent-r0.service") in stage.systemd.done

    play(test)


def test_runs_of_an_earlier_life_are_watched_again_and_those_over_are_ended(play: Play) -> None:
    async def test(stage: Stage) -> None:
        base = Run("", "a", USER.pw_name, USER.pw_uid, state=RunState.RUNNING, caller_uid=4711)
        for name, state in (
            ("gone", None),
            ("failed", UnitState(True, "failed", "exit-code", exit_code=9)),
            ("alive", ACTIVE),
        ):
            stage.gateway.runs[name] = replace(base, id=name, cgroup=f"x/{name}")
            if state:
                stage.systemd.states[f"aa-agent-{name}.service"] = state
        stage.systemd.states["aa-agent-unknown.service"] = UnitState(True, "failed", exit_code=1)
        stage.gateway.runs["half"] = replace(base, id="half", state=RunState.STARTING)
        stage.gateway.runs["user/ada"] = replace(base, id="user/ada")
        restart(stage)
        while len(stage.gateway.ends) < 3:
            await asyncio.sleep(0.01)
        ends = {e["run"]: e for e in stage.gateway.ends}
        assert set(ends) == {"gone", "failed", "half"}
        assert ends["failed"]["exit_code"] == 9
        assert (ends["gone"]["exit_code"], ends["gone"]["signal"]) == (None, None)
        assert "restarted" in ends["half"]["reason"]
        assert ("forget", "aa-agent-unknown.service") in stage.systemd.done
        stage.systemd.states["aa-agent-alive.service"] = UnitState(True, "inactive", exit_code=1)
        while len(stage.gateway.ends) < 4:
            await asyncio.sleep(0.01)
        assert stage.gateway.ends[-1]["exit_code"] == 1

    play(test)


def test_who_waits_for_a_run_is_told_its_end_also_afterwards(play: Play) -> None:
    async def test(stage: Stage) -> None:
        stage.play_shim(code=6)
        await stage.start()
        client = await AsyncClient.connect(stage.socket)
        told = [r async for r in client.stream(f"{LAUNCH}.Wait", {"run": "r0"})]
        assert told[-1]["exit_code"] == 6
        with pytest.raises(VarlinkError, match="RunUnknown"):
            await client.call(f"{LAUNCH}.Kill", {"run": "nobody"})
        with pytest.raises(VarlinkError, match="BadRequest"):
            await client.call(f"{LAUNCH}.Signal", {"run": "r0", "signal": 99})
        await client.close()

    play(test)


def test_a_gateway_that_does_not_take_the_end_does_not_hold_up_the_client(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "TELL_SECONDS", 0.05)

    async def test(stage: Stage) -> None:
        stage.gateway.end_refusals = 1_000_000
        stage.play_shim(code=4)
        _, exited = await stage.start()
        assert exited["exit_code"] == 4 and stage.gateway.ends == []
        restart(stage)  # a snapshot that still has it makes no second life of it
        stage.gateway.end_refusals = 0
        assert (await stage.ended())["exit_code"] == 4
        await asyncio.sleep(0.2)
        assert len(stage.gateway.ends) == 1

    play(test)


@pytest.mark.parametrize("limit", ["MAX_STARTING", "MAX_STARTING_PER_CALLER"])
def test_more_runs_at_once_than_the_limit_are_refused(
    play: Play, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(service, limit, 0)

    async def test(stage: Stage) -> None:
        with pytest.raises(VarlinkError, match="starting already"):
            await stage.start()
        assert stage.gateway.runs == {}

    play(test)


def test_while_the_host_is_halted_no_run_starts_and_afterwards_it_does(play: Play) -> None:
    async def test(stage: Stage) -> None:
        client = await AsyncClient.connect(stage.socket)
        if os.getuid() != 0:
            with pytest.raises(VarlinkError, match="NotPermitted"):
                await client.call(f"{LAUNCH}.Halt", {"reason": "a drill"})
            return
        await client.call(f"{LAUNCH}.Halt", {"reason": "a drill"})
        with pytest.raises(VarlinkError, match="a drill") as refused:
            await stage.start()
        assert refused.value.parameters["component"] == "halt"
        assert stage.gateway.runs == {} and stage.gateway.halts[-1] is True
        await client.call(f"{LAUNCH}.Release")
        stage.play_shim(code=3)
        assert (await stage.start())[-1]["exit_code"] == 3
        await client.close()

    play(test)


def test_a_run_that_starts_while_the_host_is_halted_gets_no_go_ahead(play: Play) -> None:
    async def test(stage: Stage) -> None:
        client = await AsyncClient.connect(stage.socket)

        async def halt(path: str) -> None:
            stage.launcher._switch.halted = Halt.now(0, "root", "a drill")

        stage.play_shim()
        begin, tasks = stage.systemd.on_start, []

        def on_start(path: str) -> None:
            tasks.append(asyncio.create_task(halt(path)))
            begin(path)

        stage.systemd.on_start = on_start
        with pytest.raises(VarlinkError, match="a drill"):
            await stage.start()
        assert {"go": True} not in stage.heard
        await stage.ended()
        await client.close()

    play(test)


def test_a_paused_run_whose_client_leaves_stays_as_it_is_until_it_is_resumed(play: Play) -> None:
    async def test(stage: Stage) -> None:
        stage.play_shim(then="live on")
        waiting = asyncio.create_task(stage.start())
        while len(stage.heard) < 2 or not stage.launcher._live["r0"].begun:
            await asyncio.sleep(0.005)
        client = await AsyncClient.connect(stage.socket)
        await client.call(f"{LAUNCH}.Pause", {"run": "r0"})
        me = pwd.getpwuid(os.getuid()).pw_name
        assert stage.gateway.pauses == [("r0", True, me)]
        await client.close()
        for connection in list(stage.server._connections):
            connection.close()
        with pytest.raises(ConnectionResetError):
            await waiting
        await asyncio.sleep(0.4)  # four times what a run has after its hang-up
        assert stage.gateway.ends == []
        client = await AsyncClient.connect(stage.socket)
        await client.call(f"{LAUNCH}.Resume", {"run": "r0"})
        assert (await stage.ended())["signal"] == signal.SIGTERM
        await client.close()

    play(test)


def test_who_killed_a_run_is_reported(play: Play) -> None:
    async def test(stage: Stage) -> None:
        stage.play_shim(then="live on")
        waiting = asyncio.create_task(stage.start())
        while len(stage.heard) < 2 or not stage.launcher._live["r0"].begun:
            await asyncio.sleep(0.005)
        client = await AsyncClient.connect(stage.socket)
        await client.call(f"{LAUNCH}.Kill", {"run": "r0"})
        assert (await waiting)[-1]["signal"] == signal.SIGKILL
        assert [(r.run, r.attributes["by_uid"]) for r in stage.reports] == [("r0", os.getuid())]
        await client.close()

    play(test)


def restart(stage: Stage) -> None:
    """The gateway's clients connect again and get a snapshot, as after a restart of either side."""
    stage.gateway.close()
    stage.gateway.open()


def test_a_door_is_closed_to_who_is_not_the_runs_main_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        systemd = FakeSystemd()
        run = Run("r1", "a", USER.pw_name, USER.pw_uid, layers=frozenset({Layer.PROXY}))
        live = Live(run, "aa-agent-r1.service")
        group = f"{sandbox.SLICE_PATHS[True]}/{live.unit}"
        launcher = Launcher(Config, systemd)  # type: ignore[arg-type]
        me = os.getpid()
        right = UnitState(True, "active", main_pid=me, cgroup=group)

        def judged(state: UnitState = right, *, where: str = group, uid: int = run.uid) -> bool:
            systemd.states[live.unit] = state
            monkeypatch.setattr(service.cgroup, "of_process", lambda pid: where)
            monkeypatch.setattr(service.cgroup, "cgroup_id", lambda path: 77)
            return launcher._is_main_process(live, Peer(me, uid, 0, where))

        assert judged() and (live.run.cgroup, live.run.cgroup_id) == (group, 77)
        assert not judged(uid=run.uid + 1)
        assert not judged(where="user.slice/session.scope")
        assert not judged(where=group + "/sub")
        assert not judged(replace(right, main_pid=me + 1))
        assert not judged(replace(right, cgroup="aa.slice/other.service"))
        live.close()

    asyncio.run(test())


def test_the_resolvers_file_is_found_only_in_hidden_places(tmp_path: Path) -> None:
    plain = tmp_path / "resolv.conf"
    plain.write_text("nameserver 192.0.2.1\n")
    assert service.hidden_resolver(str(plain)) == ""
    link = tmp_path / "link"
    link.symlink_to("/run/no-such-file-of-a-resolver")
    assert service.hidden_resolver(str(link)) == ""


def test_the_socket_of_a_door_is_its_users_alone_and_gone_afterwards(tmp_path: Path) -> None:
    async def test() -> None:
        with service.Door(tmp_path / "d", USER.pw_uid) as door:
            status = door.path.stat()
            assert (status.st_mode & 0o777, status.st_uid) == (0o600, USER.pw_uid)
            caller = asyncio.create_task(door.caller())
            with socket.socket(socket.AF_UNIX) as shim:
                shim.setblocking(False)
                await asyncio.get_running_loop().sock_connect(shim, str(door.path))
                peer, connection = await caller
                assert peer.pid == os.getpid()
                connection.close()
        assert not door.path.exists()

    asyncio.run(test())
