"""aa-launch: starts runs for those who may, watches them to their end, signals and kills them.

A run's life does not hang on this process: after a restart the runs that the gateway
knows are looked up in systemd again, and those that are over are told to the gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from aa import __version__, cgroup, paths
from aa.config import Agent, Config
from aa.launch import confine, environment, folders, landlock, request, sandbox, streams
from aa.launch.door import Door, Shim, ShimFailed
from aa.launch.halt import HALT_FILE
from aa.launch.live import End, Live
from aa.launch.switch import Switch
from aa.launch.systemd import NoSuchUnit, Systemd, SystemdError, UnitState, Who
from aa.model import Layer, MalformedValue, Report, Run, RunState
from aa.policy.compile import Share
from aa.report import ENFORCE, Unreachable
from aa.varlink import AsyncClient, Call, Peer, Service, VarlinkError

LAUNCH = "io.agentassembly.Launch"

MAX_STARTING = 32
"""Runs that are between request and program; a further one is refused."""
MAX_STARTING_PER_CALLER = 8
"""Of these, for one user: one user cannot keep the others from starting."""
MAX_ENDS = 512
"""Ended runs whose end can still be waited for."""
LAST_SIGNAL = 64

GATEWAY_SECONDS = 10.0
SHIM_SECONDS = 30.0
"""From the unit's start to the shim's first word."""
HANGUP_SECONDS = 5.0
"""What a run has after SIGHUP before it is stopped."""
POLL_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05)
SETTLE_SECONDS = 120.0
"""For a unit to be over after its main process is; systemd's own deadlines are far shorter."""
ADOPT_SECONDS = 1.0
"""What a run that another request may be starting has to become known."""
KNOWN_SECONDS = 15.0
"""How long `Wait` waits for the first word of the gateway after a restart."""
TELL_SECONDS = 5.0
"""How long the end of a run is kept from its client for the gateway to record it first."""
RETRY_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)

# systemd.exec(5), "Process Exit Codes": what systemd itself could not do before the shim ran.
EXIT_STATUS = {
    200: "the working directory", 203: "the shim is missing", 214: "scheduling",
    216: "its group", 217: "its user", 218: "capabilities", 219: "its cgroup",
    226: "its mount namespace (a folder may have gone)", 227: "no_new_privs",
    228: "the system call filter", 229: "the architecture filter", 232: "address families",
}  # fmt: skip

log = logging.getLogger(__name__)


class NotStarted(Exception):
    """A run that could not start: which component stood in the way, and why."""

    def __init__(self, component: str, reason: str) -> None:
        self.component, self.reason = component, reason
        super().__init__(f"{component}: {reason}")


class Launcher:
    """The state of the service: runs that live, and the ends of those that do not."""

    def __init__(
        self,
        config: Callable[[], Config],
        systemd: Systemd,
        *,
        enforce: Path = paths.ENFORCE_SOCKET,
        doors: Path = sandbox.SHIM_SOCKETS_DIR,
        halt: Path = HALT_FILE,
        report: Callable[[Report], None] = lambda report: None,
    ) -> None:
        self._config = config
        self._systemd = systemd
        self._enforce = enforce
        self._doors = doors
        self._live: dict[str, Live] = {}
        self._ends: OrderedDict[str, End] = OrderedDict()
        self._callers: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._starting: Counter[int] = Counter()
        """By the caller's uid."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._known = asyncio.Event()
        self._switch = Switch(systemd, self._live, self._call_gateway, report, halt)
        self.stopping = False
        """Set when the service ends: clients lose their connection then, and runs go on."""

    def service(self) -> Service:
        service = Service("aa-launch", __version__)
        service.add(
            LAUNCH,
            {
                "Start": self.start,
                "Wait": self.wait,
                "Signal": self.signal,
                "Kill": self.kill,
                "Pause": self.pause,
                "Resume": self.resume,
                "Tree": self.tree,
                "Halt": self._switch.halt,
                "Release": self._switch.release,
            },
        )
        return service

    def status_line(self) -> str:
        halted = f"HALTED: {self._switch.halted}; " if self._switch.halted else ""
        return f"{halted}{len(self._live)} runs live, {self._starting.total()} starting"

    # The methods of the interface

    def start(self, call: Call) -> AsyncIterator[dict[str, Any]]:
        return self._start(call, streams.Descriptors(call))

    async def _start(self, call: Call, fds: streams.Descriptors) -> AsyncIterator[dict[str, Any]]:
        caller = call.peer.uid
        self._refuse_halted()
        if self._starting[caller] >= MAX_STARTING_PER_CALLER:
            raise _not_started(
                "launch", f"{MAX_STARTING_PER_CALLER} runs of yours are starting already; try again"
            )
        if self._starting.total() >= MAX_STARTING:
            raise _not_started("launch", f"{MAX_STARTING} runs are starting already; try again")
        self._starting[caller] += 1
        try:
            live, notes = await self._launch(call.peer, call.parameters, fds)
        except request.NotPermitted as e:
            raise VarlinkError(f"{LAUNCH}.NotPermitted", {"reason": str(e)}) from e
        except (request.BadRequest, streams.BadStream, environment.BadEnvironment) as e:
            raise VarlinkError(f"{LAUNCH}.BadRequest", {"reason": str(e)}) from e
        except NotStarted as e:
            self._refuse_halted()  # the halt itself may be why
            raise _not_started(e.component, e.reason) from e
        finally:
            self._starting[caller] -= 1
            fds.close()
        try:
            if not live.reason:
                yield {
                    "event": "started",
                    "run": live.run.id,
                    "notes": notes,
                    "exit_code": None,
                    "signal": None,
                    "reason": "",
                }
            end = await asyncio.shield(live.ended)
            yield end.as_reply(live.run.id)
        finally:
            if call.more and not live.ended.done() and not self.stopping:
                self._spawn(self._hang_up(live))

    async def wait(self, call: Call) -> AsyncIterator[dict[str, Any]]:
        run = call.parameters["run"]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KNOWN_SECONDS):
                await self._known.wait()
        self._refuse_stranger(run, call.peer)
        live = self._live.get(run)
        end = self._ends[run] if live is None else await asyncio.shield(live.ended)
        yield end.as_reply(run)

    def signal(self, call: Call) -> dict[str, Any]:
        run, number = call.parameters["run"], call.parameters["signal"]
        self._refuse_stranger(run, call.peer)
        if not 1 <= number <= LAST_SIGNAL:
            raise VarlinkError(f"{LAUNCH}.BadRequest", {"reason": f"{number} is no signal"})
        live = self._live.get(run)
        if live is not None:
            self._signal(live, number)
        return {}

    async def kill(self, call: Call) -> dict[str, Any]:
        run = call.parameters["run"]
        self._refuse_stranger(run, call.peer)
        live = self._live.get(run)
        if live is not None:
            self._switch.killing(live, call.peer, "killed")
            try:
                self._systemd.kill(live.unit, Who.ALL, signal.SIGKILL)
            except NoSuchUnit:
                pass  # it ended by itself just now
            except SystemdError as e:
                raise VarlinkError(
                    "io.agentassembly.InternalError", {"reason": f"systemd: {e}"}
                ) from e
            await asyncio.shield(live.ended)
        return {}

    async def pause(self, call: Call) -> dict[str, Any]:
        await self._switch.pause(self._going(call), call.peer)
        return {}

    async def resume(self, call: Call) -> dict[str, Any]:
        await self._switch.resume(self._going(call), call.peer)
        return {}

    def tree(self, call: Call) -> dict[str, Any]:
        return self._switch.tree(self._going(call))

    def _going(self, call: Call) -> Live:
        """The live run that a call is about, when its caller may control it."""
        run = call.parameters["run"]
        self._refuse_stranger(run, call.peer)
        live = self._live.get(run)
        if live is None:
            raise VarlinkError(f"{LAUNCH}.RunUnknown", {"reason": f"run {run} is over"})
        return live

    def _refuse_halted(self) -> None:
        if self._switch.halted is not None:
            raise _not_started(
                "halt", f"{self._switch.halted}; `aasm halt --release` lets runs start again"
            )

    def _refuse_stranger(self, run: str, peer: Peer) -> None:
        known = self._callers.get(run)
        if known is None:
            raise VarlinkError(f"{LAUNCH}.RunUnknown", {"reason": f"there is no run {run}"})
        uid, caller = known
        if not request.may_control(peer.uid, run_uid=uid, run_caller=caller):
            raise VarlinkError(
                f"{LAUNCH}.NotPermitted", {"reason": f"run {run} belongs to somebody else"}
            )

    # Starting

    async def _launch(
        self, peer: Peer, parameters: Mapping[str, Any], fds: streams.Descriptors
    ) -> tuple[Live, list[str]]:
        config = self._config()
        asked = request.resolve(config, peer.uid, parameters)
        three = [fds[parameters[name]] for name in ("stdin", "stdout", "stderr")]
        streams.refuse_streams(three, caller_terminal=streams.terminal_of(peer.pid))
        terminal = streams.terminal_among(three) if parameters["terminal"] else None
        if parameters["terminal"] and terminal is None:
            raise request.BadRequest("none of the streams is a terminal")
        passed = environment.parse(parameters["environment"])
        directory = streams.directory_of(fds[parameters["directory"]])
        async with self._gateway() as gateway:
            share = await _share(gateway, asked)
            box, home, notes = await self._sandbox(peer, asked, directory, terminal, share)
            if terminal is not None:
                streams.give_terminal(terminal, owner=peer.uid, to=asked.user.pw_uid)
            run = await _register(gateway, asked, home, directory.path, peer.uid, share)
            live = Live(run, paths.run_unit(run.id))
            self._put(live)
            try:
                instructions = _instructions(live.run, asked, box, home, passed, terminal)
                await self._bring_up(live, box, three, instructions, gateway, config)
            except BaseException as e:
                self._spawn(self._abandon(live, _reason(e)))
                raise
        self._spawn(self._watch(live))
        return live, notes

    async def _sandbox(
        self,
        peer: Peer,
        asked: request.Request,
        directory: sandbox.Directory,
        terminal: int | None,
        share: Share,
    ) -> tuple[sandbox.Sandbox, str, list[str]]:
        """What the run may do; the user's real home; what a person should know about both.

        `share` is what the policy says of it: all of it, besides the agent's own state folders.
        """
        name = asked.user.pw_name
        stated = share.writable
        try:
            found = await folders.look(
                asked.user,
                directory.path,
                [*asked.agent.state, *(f for f in stated or () if f != ".")],
                terminal=0 if terminal is None else os.fstat(terminal).st_rdev,
                wanted=confine.wanted(share),
            )
        except folders.CannotLook as e:
            raise NotStarted("launch", str(e)) from e
        if found.directory is None:
            raise request.BadRequest(
                f"{name} cannot enter the working directory {directory.path}: {found.reason}"
            )
        if found.directory != directory:
            raise request.BadRequest(
                f"{directory.path} is another folder on this host than where you are"
            )
        place, note = sandbox.judge_directory(directory.path, found.home)
        if place is sandbox.Place.REFUSED:
            raise request.BadRequest(note)
        if place is sandbox.Place.READ_ONLY and share.file == "allow":
            place, note = sandbox.judge_open_directory(directory.path, found.home)
        elif place is sandbox.Place.WRITABLE and stated is not None and "." not in stated:
            place = sandbox.Place.READ_ONLY
            note = f'{directory.path} is read-only, because the policy\'s [sandbox] writable has no "."'
        box = sandbox.Sandbox(
            directory=directory,
            place=place,
            folders=found.folders,
            covered=found.covered,
            umask=streams.umask_of(peer.pid),
            resolver=hidden_resolver(),
        )
        try:
            box, more = confine.confined(
                box,
                share,
                found.seen,
                home=found.home,
                interpreter=os.path.realpath(sandbox.INTERPRETER),
            )
        except confine.Unenforceable as e:
            raise NotStarted("launch", str(e)) from e
        return box, found.home, [*([note] if note else []), *found.notes, *more]

    async def _bring_up(
        self,
        live: Live,
        box: sandbox.Sandbox,
        three: list[int],
        instructions: Mapping[str, Any],
        gateway: AsyncClient,
        config: Config,
    ) -> None:
        """Unit, shim, barrier, go. Raises `NotStarted`."""
        with Door(self._doors / live.run.id, live.run.uid) as door:
            unit = sandbox.properties(live.run, box, shim_socket=str(door.path), streams=three)
            try:
                self._systemd.start(live.unit, unit)
            except SystemdError as e:
                raise NotStarted("launch", f"systemd: {e}") from e
            shim = await self._await_shim(live, door)
        try:
            await shim.send(instructions)
            await self._pass_barrier(live, gateway, config.launch.barrier_seconds)
            if self._switch.halted is not None:
                raise NotStarted("halt", str(self._switch.halted))
            await shim.send({"go": True})
            await shim.executed()
        except ShimFailed as e:
            if e.code == 125:
                raise NotStarted("launch", str(e)) from e
            live.reason = e.reason
        except TimeoutError as e:
            raise NotStarted("launch", "the shim did not start the program in time") from e
        finally:
            shim.close()
        live.begun = True
        if self._switch.halted is not None:  # between the go-ahead and now
            raise NotStarted("halt", str(self._switch.halted))

    async def _await_shim(self, live: Live, door: Door) -> Shim:
        """The shim's connection, once it is clear that it is the unit's main process."""
        waiting = asyncio.ensure_future(door.caller())
        try:
            async with asyncio.timeout(SHIM_SECONDS):
                while True:
                    await asyncio.wait([waiting], timeout=0.05)
                    if not waiting.done():
                        self._refuse_dead_unit(live)
                        continue
                    peer, shim = waiting.result()
                    if self._is_main_process(live, peer):
                        return shim
                    shim.close()
                    waiting = asyncio.ensure_future(door.caller())
        except TimeoutError:
            raise NotStarted(
                "launch", f"the unit {live.unit} did not get as far as the shim"
            ) from None
        except SystemdError as e:
            raise NotStarted("launch", f"systemd: {e}") from e
        finally:
            waiting.cancel()

    def _refuse_dead_unit(self, live: Live) -> None:
        state = self._systemd.state(live.unit)
        if not state.over:
            return
        what = EXIT_STATUS.get(state.exit_code or 0, "")
        told = f": {what}" if what else ""
        ended = f"status {state.exit_code}" if state.signal is None else f"signal {state.signal}"
        raise NotStarted(
            "launch",
            f"systemd could not make the sandbox ({state.result}, {ended}{told}); "
            f"see `journalctl -u {live.unit}`",
        )

    def _is_main_process(self, live: Live, peer: Peer) -> bool:
        """Takes hold of the process, then asks systemd and the kernel whether it is the right one."""
        with contextlib.suppress(ProcessLookupError):
            live.close()
            live.pidfd = os.pidfd_open(peer.pid)
        state = self._systemd.state(live.unit)
        group = f"{sandbox.SLICE_PATHS[Layer.PROXY in live.run.layers]}/{live.unit}"
        found = cgroup.of_process(peer.pid)
        if (peer.uid, found, state.cgroup, state.main_pid) != (
            live.run.uid, group, group, peer.pid,
        ) or not live.main_is_alive():  # fmt: skip
            log.warning("run %s: pid %d in %s is not its shim", live.run.id, peer.pid, found)
            return False
        identity = cgroup.cgroup_id(group)
        if identity is None:
            return False
        live.pid = peer.pid
        live.run = replace(live.run, cgroup=group, cgroup_id=identity)
        return True

    async def _pass_barrier(self, live: Live, gateway: AsyncClient, seconds: float) -> None:
        """Every layer of the run confirms it, or it does not start."""
        run = live.run
        try:
            await gateway.call(
                f"{ENFORCE}.StartRun",
                {"run": run.id, "cgroup": run.cgroup, "cgroup_id": run.cgroup_id},
                timeout=GATEWAY_SECONDS,
            )
            await gateway.call(
                f"{ENFORCE}.AwaitRun",
                {"run": run.id, "deadline": int(seconds * 1000)},
                timeout=seconds + GATEWAY_SECONDS,
            )
        except VarlinkError as e:
            raise _not_ready(e) from e
        except Unreachable as e:
            raise NotStarted("gateway", f"the gateway does not answer: {e}") from e

    # Watching and ending

    async def _watch(self, live: Live) -> None:
        """Waits for the main process, then for systemd to have cleaned up behind it."""
        await self._main_over(live)
        state = await self._unit_over(live)
        if live.reason:
            reason = live.reason
        elif not state.loaded:
            reason = "it ended while nobody watched, in a way that systemd counts as success"
        else:
            reason = "" if state.result in ("success", "exit-code", "signal") else state.result
        await self._finish(live, End(state.exit_code, state.signal, reason))

    async def _main_over(self, live: Live) -> None:
        if live.pidfd < 0:
            return
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        loop.add_reader(live.pidfd, over.set)
        try:
            await over.wait()
        finally:
            loop.remove_reader(live.pidfd)

    async def _unit_over(self, live: Live) -> UnitState:
        """The unit's last state. Leftovers that do not end are killed at the deadline."""
        deadline = asyncio.get_running_loop().time() + SETTLE_SECONDS
        for attempt in range(1_000_000):
            try:
                state = self._systemd.state(live.unit)
                if state.over:
                    return state
                if asyncio.get_running_loop().time() > deadline:
                    self._systemd.kill(live.unit, Who.ALL, signal.SIGKILL)
            except SystemdError as e:
                log.warning("run %s: systemd: %s", live.run.id, e)
            await asyncio.sleep(_step(POLL_SECONDS, attempt))
        raise AssertionError("unreachable: systemd ends every unit at its deadline")

    async def _abandon(self, live: Live, reason: str) -> None:
        """Ends a run that did not start."""
        with contextlib.suppress(SystemdError):
            self._systemd.kill(live.unit, Who.ALL, signal.SIGKILL)
        await self._main_over(live)
        await self._unit_over(live)
        await self._finish(live, End(reason=reason))

    async def _finish(self, live: Live, end: End) -> None:
        """Tells the gateway, as often as it takes, and those who wait."""
        self._systemd.forget(live.unit)
        live.close()
        telling = asyncio.ensure_future(self._tell_end(live.run.id, end))
        await asyncio.wait([telling], timeout=TELL_SECONDS)
        live.ended.set_result(end)
        await telling
        self._live.pop(live.run.id, None)
        self._ends[live.run.id] = end
        while len(self._ends) > MAX_ENDS:
            forgotten, _ = self._ends.popitem(last=False)
            self._callers.pop(forgotten, None)

    async def _tell_end(self, run: str, end: End) -> None:
        for attempt in range(1_000_000):
            try:
                async with self._gateway() as gateway:
                    await gateway.call(
                        f"{ENFORCE}.EndRun",
                        {
                            "run": run,
                            "exit_code": end.exit_code,
                            "signal": end.signal,
                            "reason": end.reason,
                        },
                        timeout=GATEWAY_SECONDS,
                    )
                return
            except VarlinkError as e:
                if e.name == "RunUnknown":  # it knows already
                    return
                log.warning("run %s: the gateway does not take its end: %s", run, e)
            except NotStarted:
                pass  # the gateway is away; its registry says that the run lives until it is back
            await asyncio.sleep(_step(RETRY_SECONDS, attempt))

    def _signal(self, live: Live, number: int) -> None:
        """To the main process and its process group, as a terminal would."""
        if not live.main_is_alive():
            return
        try:
            os.killpg(live.pid, number)
        except ProcessLookupError:  # it changed its group: then to itself alone
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(live.pidfd, number)

    async def _hang_up(self, live: Live) -> None:
        """What a closed terminal does, and an end for what goes on in spite of it."""
        log.info("run %s: its client is gone", live.run.id)
        await live.thawed()  # whoever paused it wants it as it is, and SIGHUP ends frozen ones too
        self._signal(live, signal.SIGHUP)
        self._signal(live, signal.SIGCONT)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HANGUP_SECONDS):
                await asyncio.shield(live.ended)
        if not live.ended.done():
            with contextlib.suppress(SystemdError):
                self._systemd.stop(live.unit)

    # After a restart

    async def follow(self) -> None:
        """Takes up, at each new connection to the gateway, what lives and is not watched."""
        attempt = 0
        while True:
            try:
                async with self._gateway() as gateway:
                    async for message in gateway.stream(f"{ENFORCE}.WatchRuns"):
                        attempt = 0
                        if message["event"] == "snapshot":
                            runs = [Run.from_json(r) for r in message["runs"]]
                            self._take_up(runs)
                            await self._switch.tell_again(runs)
            except (NotStarted, VarlinkError, *Unreachable, ValueError) as e:
                log.warning("gateway: %s", e)
            await asyncio.sleep(_step(RETRY_SECONDS, attempt))
            attempt += 1

    def _take_up(self, runs: list[Run]) -> None:
        for run in runs:
            if run.id in self._live or "/" in run.id:  # user/NAME: not one of ours
                continue
            if run.state is RunState.RUNNING:
                self._adopt(run)
            else:
                self._spawn(self._end_stranded(run))
        self._sweep()
        self._known.set()

    def _sweep(self) -> None:
        """Failed units of runs that the gateway has given up are of no use to anybody."""
        try:
            for unit in self._systemd.loaded(paths.run_unit("*")):
                run = unit.removeprefix("aa-agent-").removesuffix(".service")
                if run in self._live:
                    continue
                if self._systemd.state(unit).over:
                    self._systemd.forget(unit)
                else:
                    log.error("%s runs, but the gateway does not know it: it is denied all", unit)
        except SystemdError as e:
            log.warning("systemd: %s", e)

    def _adopt(self, run: Run) -> None:
        """Watches a run that an earlier life of this service started."""
        live = Live(run, paths.run_unit(run.id), begun=True)
        self._put(live)
        try:
            state = self._systemd.state(live.unit)
            if state.main_pid and not state.over:
                live.pidfd = os.pidfd_open(state.main_pid)
                live.pid = state.main_pid
                if cgroup.of_process(live.pid) != run.cgroup:
                    live.close()
        except (SystemdError, OSError) as e:
            log.warning("run %s: %s", run.id, e)
        log.info("run %s: watched again", run.id)
        self._spawn(self._switch.take_up(live))
        self._spawn(self._watch(live))

    async def _end_stranded(self, run: Run) -> None:
        """Ends a run that was starting when its launch died. One that starts right now is left alone."""
        await asyncio.sleep(ADOPT_SECONDS)
        if run.id in self._live or run.id in self._ends:
            return
        live = Live(run, paths.run_unit(run.id))
        self._put(live)
        await self._abandon(live, "aa-launch was restarted before the run began")

    # Small things

    def _put(self, live: Live) -> None:
        self._live[live.run.id] = live
        self._callers[live.run.id] = (live.run.uid, live.run.caller_uid)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (problem := task.exception()) is not None:
            log.error("%s", problem, exc_info=problem)

    async def _call_gateway(self, method: str, parameters: Mapping[str, Any]) -> None:
        async with self._gateway() as gateway:
            await gateway.call(f"{ENFORCE}.{method}", parameters, timeout=GATEWAY_SECONDS)

    @contextlib.asynccontextmanager
    async def _gateway(self) -> AsyncIterator[AsyncClient]:
        try:
            client = await AsyncClient.connect(self._enforce, timeout=GATEWAY_SECONDS)
        except Unreachable as e:
            raise NotStarted("gateway", f"the gateway cannot be reached: {e}") from e
        try:
            yield client
        finally:
            await client.close()


async def _share(gateway: AsyncClient, asked: request.Request) -> Share:
    """What the policy says of the sandbox of such a run."""
    agent: Agent = asked.agent
    try:
        reply = await gateway.call(
            f"{ENFORCE}.GetSandbox",
            {"agent": agent.name, "user": asked.user.pw_name, "tags": list(agent.tags)},
            timeout=GATEWAY_SECONDS,
        )
        return Share.from_json(reply["share"])
    except VarlinkError as e:
        raise _not_ready(e) from e
    except Unreachable as e:
        raise NotStarted("gateway", f"the gateway does not answer: {e}") from e
    except MalformedValue as e:
        raise NotStarted("gateway", f"{e}: is the gateway of another version?") from e


async def _register(
    gateway: AsyncClient,
    asked: request.Request,
    home: str,
    directory: str,
    caller_uid: int,
    share: Share,
) -> Run:
    agent: Agent = asked.agent
    try:
        reply = await gateway.call(
            f"{ENFORCE}.RegisterRun",
            {
                "agent": agent.name,
                "user": asked.user.pw_name,
                "uid": asked.user.pw_uid,
                "home": home,
                "layers": sorted(layer.value for layer in agent.layers),
                "tags": list(agent.tags),
                "argv": list(asked.argv),
                "directory": directory,
                "caller_uid": caller_uid,
                "share": share.digest,
            },
            timeout=GATEWAY_SECONDS,
        )
        return Run.from_json(reply["run"])
    except VarlinkError as e:
        raise _not_ready(e) from e
    except Unreachable as e:
        raise NotStarted("gateway", f"the gateway does not answer: {e}") from e


def _instructions(
    run: Run,
    asked: request.Request,
    box: sandbox.Sandbox,
    home: str,
    passed: Mapping[str, str],
    terminal: int | None,
) -> dict[str, Any]:
    """What the shim is told."""
    private = box.place is sandbox.Place.PRIVATE
    return {
        "argv": list(asked.argv),
        "env": environment.of_run(
            passed,
            allowed=asked.agent.environment,
            user=asked.user.pw_name,
            home=home,
            shell=asked.user.pw_shell or "/bin/sh",
            run=run.id,
            agent=run.agent,
            proxied=Layer.PROXY in asked.agent.layers,
        ),
        "directory": {
            "path": box.directory.path,
            "device": box.directory.device,
            "inode": None if private else box.directory.inode,
            "writable": box.place is sandbox.Place.WRITABLE,
        },
        "folders": [
            {"path": f.path, "device": f.device, "inode": f.inode, "writable": writable}
            for places, writable in (
                ((*box.folders, *box.kept), True),
                ((*box.fixed, *box.readable, *box.executable), False),
            )
            for f in places
        ],
        "closed": [[check.path, check.proof.value] for check in box.checks],
        "groups": list(asked.groups),
        "landlock": {
            "rules": [[r.path, r.access.value, r.optional] for r in landlock.rules(box)],
            "required": True,
        },
        "terminal": terminal is not None,
        "attributes": None if terminal is None else streams.attributes_of(terminal),
    }


def hidden_resolver(path: str = "/etc/resolv.conf") -> str:
    """The file behind resolv.conf when it is where runs see nothing, else ""."""
    real = os.path.realpath(path)
    hidden = any(sandbox.is_below(real, top) for top in sandbox.HIDDEN)
    return real if hidden and os.path.isfile(real) else ""


def _not_started(component: str, reason: str) -> VarlinkError:
    return VarlinkError(f"{LAUNCH}.NotStarted", {"reason": reason, "component": component})


def _not_ready(error: VarlinkError) -> NotStarted:
    component = error.parameters.get("component") or "gateway"
    return NotStarted(str(component), str(error.parameters.get("reason") or error))


def _reason(error: BaseException) -> str:
    if isinstance(error, NotStarted):
        return f"not started: {error}"
    if isinstance(error, asyncio.CancelledError):
        return "not started: the client left"
    return f"not started: {error!r}"


def _step(steps: tuple[float, ...], attempt: int) -> float:
    return steps[min(attempt, len(steps) - 1)]
