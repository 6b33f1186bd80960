"""A throw-away machine: a real systemd in a container, and origins in a network of their own beside it.

    with Container("demo") as box:
        box.install_deb(path)
        mark = box.origins.mark()
        box.run(["curl", "-sS", "https://api.allowed.test/"], user="dev").check()
        assert box.origins.since(mark, kind="request")

The container's root is an overlay over the machine's own root, so every installed package is there
and nothing written to it survives. Everything is held by one process in private namespaces and one
cgroup; `destroy` and `sweep` remove what is left of any lab, however it ended.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
STATE = Path("/run/aa-lab")

MEMORY = "3g"  # the most that a container's writes may take
BOOT_TIMEOUT = (
    60.0  # seconds until the manager answers on the bus and has started its default target
)
RUN_TIMEOUT = 60.0  # seconds for one command inside
STOP_TIMEOUT = 10.0  # seconds for an orderly poweroff before everything is killed
KILLED = 124  # exit code of a command that was stopped at its deadline, as in timeout(1)

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
}
ROOT_ENVIRONMENT = {**ENVIRONMENT, "HOME": "/root", "SYSTEMD_PAGER": "", "SYSTEMD_COLORS": "0"}

AUTHORITY_INSIDE = "/usr/local/share/ca-certificates/lab-origins.crt"
"""The origins' authority inside, for programs with a trust store of their own (NODE_EXTRA_CA_CERTS and the like)."""


class LabError(Exception):
    """The lab itself failed, not what is tested in it."""


@dataclass(frozen=True)
class Result:
    """What one command inside did."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str
    seconds: float

    @property
    def ok(self) -> bool:
        return self.code == 0

    def check(self) -> Result:
        """Itself if the command succeeded; otherwise an error that shows all it said."""
        if self.code != 0:
            raise LabError(
                f"{' '.join(self.argv)}: exit {self.code} after {self.seconds:.1f} s\n{self.out}{self.err}"
            )
        return self


@dataclass(frozen=True)
class Origins:
    """What reached the other end of the network, read from the log that its servers write."""

    directory: Path

    @property
    def log(self) -> Path:
        return self.directory / "seen.jsonl"

    @property
    def authority(self) -> Path:
        return self.directory / "ca.pem"

    def mark(self) -> int:
        """A place in the log; what comes later is `since` it."""
        return self.log.stat().st_size if self.log.exists() else 0

    def since(self, mark: int, **wanted: Any) -> list[dict[str, Any]]:
        """The events after `mark` whose fields have these values."""
        with self.log.open("rb") as log:
            log.seek(mark)
            events = [json.loads(line) for line in log.read().splitlines()]
        return [e for e in events if all(e.get(k) == v for k, v in wanted.items())]


class Container:
    """One lab: container and origins. `name` must be unused; by default it is made from this process's id."""

    _labs = itertools.count(1)
    _numbers = itertools.count(1)

    def __init__(
        self, name: str | None = None, *, memory: str = MEMORY, keep: bool = False
    ) -> None:
        self.name = f"aa-lab-{name or f'{os.getpid()}-{next(self._labs)}'}"
        self.state = STATE / self.name
        self.origins = Origins(self.state / "origins")
        self._memory, self._keep = memory, keep
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._hold = -1
        self.leader = 0

    # Life

    def __enter__(self) -> Container:
        sweep()
        self.up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    def up(self) -> None:
        """Boots; returns when systemd has finished starting. Raises `LabError` with the console's end otherwise."""
        if os.geteuid() != 0:
            raise LabError("the lab needs root: it makes namespaces, mounts and cgroups of its own")
        if self.state.exists():
            raise LabError(f"{self.state} exists: a lab of this name runs, or `destroy` it")
        for directory in ("tree", "run", "origins"):
            (self.state / directory).mkdir(parents=True)
        (self.state / "owner").write_text("" if self._keep else _owner(os.getpid()))
        lifeline = self._lifeline()
        with self._console.open("wb") as console:
            self._supervisor = subprocess.Popen(
                [*_private(HERE / "boot.sh"), self.name, self.state, REPOSITORY, self._memory],
                stdin=lifeline,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=ROOT_ENVIRONMENT,
                cwd="/",
            )
        os.close(lifeline)
        try:
            self._await_boot(self._supervisor)
        except BaseException:
            destroy(self.name)
            self._reap()
            raise

    def _lifeline(self) -> int:
        """The supervisor's standard input: it reads its end when this process is no more.

        A lab that is kept gets a fifo that it holds open itself.
        """
        if self._keep:
            os.mkfifo(self.state / "lifeline", 0o600)
            return os.open(self.state / "lifeline", os.O_RDWR)
        held, self._hold = os.pipe()
        return held

    def attach(self) -> Container:
        """Joins a lab that another process keeps up."""
        try:
            self.leader = int((self.state / "leader").read_text())
        except OSError:
            raise LabError(f"{self.name} is not up") from None
        return self

    def down(self) -> None:
        """Powers off and removes everything; also when the container is half dead."""
        if self.leader:
            try:
                self.raw(["systemctl", "poweroff", "--no-block"], timeout=STOP_TIMEOUT)
                deadline = time.monotonic() + STOP_TIMEOUT
                while time.monotonic() < deadline and Path(f"/proc/{self.leader}").exists():
                    time.sleep(0.05)
            except (LabError, OSError):
                pass  # what does not power off is killed below
        destroy(self.name)
        self._reap()
        self.leader = 0

    def _reap(self) -> None:
        if self._supervisor is not None:
            self._supervisor.wait()
        if self._hold >= 0:
            os.close(self._hold)
            self._hold = -1

    @property
    def _console(self) -> Path:
        return self.state / "console.log"

    def console(self, lines: int = 40) -> str:
        return "\n".join(self._console.read_text(errors="replace").splitlines()[-lines:])

    def _await_boot(self, supervisor: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + BOOT_TIMEOUT
        while not (leader := _leader(supervisor.pid)) or not _answers(leader):
            if supervisor.poll() is not None:
                raise LabError(f"{self.name} did not boot:\n{self.console()}")
            if time.monotonic() > deadline:
                raise LabError(
                    f"{self.name} is not up after {BOOT_TIMEOUT:.0f} s:\n{self.console()}"
                )
            time.sleep(0.02)
        self.leader = leader
        (self.state / "leader").write_text(str(leader))
        self.raw(["systemctl", "is-system-running", "--wait"], timeout=BOOT_TIMEOUT)

    # Commands

    def raw(
        self,
        argv: Sequence[str | Path],
        *,
        input: str | bytes | None = None,
        timeout: float = RUN_TIMEOUT,
    ) -> Result:
        """Runs as root in the container's namespaces, but in no cgroup of it: for looking and for files."""
        return _result(self._enter(argv), input, timeout, shown=argv)

    def run(
        self,
        command: str | Sequence[str | Path],
        *,
        user: str = "root",
        input: str | bytes | None = None,
        timeout: float = RUN_TIMEOUT,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        properties: Sequence[str] = (),
    ) -> Result:
        """Runs as a service of the container's systemd, as `user` with all of that user's groups.

        A string is a shell command. At the deadline the whole service is killed and the code is 124.
        """
        argv = _argv(command)
        unit = f"lab-{os.getpid()}-{next(self._numbers)}.service"
        started = time.monotonic()
        try:
            return _result(
                self._enter(self._service(unit, user, env, cwd, properties) + argv),
                input,
                timeout,
                argv,
            )
        except subprocess.TimeoutExpired as late:
            self.raw(["systemctl", "kill", "--signal=KILL", unit])
            out, err = (_text(part) for part in (late.stdout, late.stderr))
            took = time.monotonic() - started
            return Result(tuple(map(str, argv)), KILLED, out, err, took)

    def popen(
        self,
        command: str | Sequence[str | Path],
        *,
        user: str = "root",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        properties: Sequence[str] = (),
        **how: Any,
    ) -> subprocess.Popen[Any]:
        """Like `run`, but returns at once; `how` goes to `subprocess.Popen`. End it by `terminate` and `wait`."""
        argv = _argv(command)
        unit = f"lab-{os.getpid()}-{next(self._numbers)}.service"
        return subprocess.Popen(
            self._enter(self._service(unit, user, env, cwd, properties) + argv),
            env=ROOT_ENVIRONMENT,
            **how,
        )

    def shell(self, user: str = "root") -> int:
        """An interactive login shell inside, on this terminal."""
        argv = ["systemd-run", "--quiet", "--collect", "--pty", f"--uid={user}"]
        return subprocess.call(self._enter([*argv, "/bin/bash", "--login"]), env=ROOT_ENVIRONMENT)

    def _enter(self, argv: Sequence[str | Path]) -> list[str]:
        if not self.leader:
            raise LabError(f"{self.name} is not up")
        return ["nsenter", f"--target={self.leader}", "--all", "--wd=/", "--", *map(str, argv)]

    def _service(
        self,
        unit: str,
        user: str,
        env: Mapping[str, str] | None,
        cwd: str | None,
        properties: Sequence[str],
    ) -> list[str]:
        options = [f"--setenv={k}={v}" for k, v in {**ENVIRONMENT, **(env or {})}.items()]
        options += [f"--property={p}" for p in properties]
        options += [f"--working-directory={cwd}"] if cwd else []
        return [
            "systemd-run", "--quiet", "--collect", "--pipe", "--wait", f"--unit={unit}", f"--uid={user}",
            *options, "--",
        ]  # fmt: skip

    # Files

    def push(
        self, path: str | Path, content: str | bytes, *, mode: int = 0o644, owner: str = "root:root"
    ) -> None:
        """Writes a file inside, by rename, with its folders; never through a link of the machine's."""
        script = (
            'set -e; mkdir -p "$(dirname "$1")"; t="$1.lab-new"; cat > "$t"; '
            'chown "$3" "$t"; chmod "$2" "$t"; mv "$t" "$1"'
        )
        self.raw(["sh", "-c", script, "push", path, f"{mode:o}", owner], input=content).check()

    def push_file(self, source: Path, path: str | Path, *, mode: int = 0o644) -> None:
        self.push(path, source.read_bytes(), mode=mode)

    def pull(self, path: str | Path) -> str:
        return self.raw(["cat", path]).check().out

    # Systemd

    def systemctl(self, *arguments: str, timeout: float = RUN_TIMEOUT) -> Result:
        return self.raw(["systemctl", "--no-pager", *arguments], timeout=timeout)

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Properties of a unit."""
        shown = self.systemctl("show", unit, *(f"--property={p}" for p in properties)).check().out
        return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)

    def journal(
        self, *matches: str, unit: str | None = None, after: str | None = None
    ) -> list[dict[str, Any]]:
        """The journal's records, oldest first; `after` is a cursor of `journal_cursor`."""
        self.raw(["journalctl", "--sync"]).check()
        options = [f"--unit={unit}"] if unit else []
        options += [f"--after-cursor={after}"] if after else []
        done = self.raw(
            ["journalctl", "--quiet", "--no-pager", "--all", "--output=json", *options, *matches]
        )
        return [json.loads(line) for line in done.out.splitlines()]

    def journal_cursor(self) -> str:
        """The end of the journal as it is now."""
        self.raw(["journalctl", "--sync"]).check()
        done = self.raw(["journalctl", "--quiet", "--lines=1", "--output=json"]).check()
        return str(json.loads(done.out)["__CURSOR"])

    def install_deb(self, *packages: Path, timeout: float = 180.0) -> Result:
        """Installs packages as a person would, by apt, and makes `dev` one of the operators."""
        inside = []
        for package in packages:
            self.push(f"/var/cache/lab/{package.name}", package.read_bytes())
            inside.append(f"/var/cache/lab/{package.name}")
        done = self.run(
            [
                "apt-get",
                "install",
                "--yes",
                "--no-install-recommends",
                "-o",
                "APT::Sandbox::User=root",
                *inside,
            ],
            env={"DEBIAN_FRONTEND": "noninteractive"},
            timeout=timeout,
        ).check()
        self.run(["usermod", "--append", "--groups", "aa-operators", "dev"]).check()
        return done


def eventually(
    condition: Callable[[], Any],
    *,
    timeout: float = 10.0,
    every: float = 0.05,
    what: str = "condition",
) -> Any:
    """The first true value of `condition`, asked again until the deadline; `LabError` after it."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise LabError(f"{what}: not so within {timeout:.0f} s")
        time.sleep(every)
    return value


def destroy(name: str) -> None:
    """Ends and removes all of a lab, in whatever state it is. Does nothing where there is none."""
    state = STATE / name
    done = subprocess.run(
        [*_private(HERE / "destroy.sh"), name],
        env=ROOT_ENVIRONMENT,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if done.returncode != 0:
        raise LabError(f"cannot remove {name}: {done.stderr.strip()}")
    shutil.rmtree(state, ignore_errors=True)
    with contextlib.suppress(OSError):  # others may be there
        STATE.rmdir()


def sweep() -> list[str]:
    """Destroys the labs whose owner is gone; returns their names. Labs that are kept on purpose stay."""
    swept = []
    for owner in sorted(STATE.glob("aa-lab-*/owner")):
        try:
            written = owner.read_text()
        except FileNotFoundError:
            continue  # swept by somebody else
        if written and written != _owner(int(written.split()[0])):
            destroy(owner.parent.name)
            swept.append(owner.parent.name)
    return swept


def _private(program: Path) -> list[str | Path]:
    """The command that runs a program in a mount namespace of its own."""
    return ["unshare", "--mount", "--propagation", "private", "/bin/sh", program]


def _owner(pid: int) -> str:
    """Who a pid is now: its number and start time, as numbers are used again."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return f"{pid} {stat.rsplit(')', 1)[1].split()[19]}"


def _leader(supervisor: int) -> int:
    """The container's pid 1 as the machine numbers it, or 0 while there is none."""
    waiting = [supervisor]
    while waiting:
        pid = waiting.pop()
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        except OSError:
            continue
        numbers = next(
            (line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:")), []
        )
        if len(numbers) > 1 and numbers[-1] == "1" and "Name:\tsystemd\n" in status:
            return pid
        waiting += map(int, children.split())
    return 0


def _answers(leader: int) -> bool:
    """Whether the container's bus is there. A relative path below /proc/PID/root cannot leave it."""
    return Path(f"/proc/{leader}/root/run/dbus/system_bus_socket").exists()


def _argv(command: str | Sequence[str | Path]) -> list[str]:
    return ["/bin/sh", "-c", command] if isinstance(command, str) else [str(c) for c in command]


def _result(
    argv: Sequence[str], input: str | bytes | None, timeout: float, shown: Sequence[str | Path]
) -> Result:
    started = time.monotonic()
    done = subprocess.run(
        argv,
        input=input.encode() if isinstance(input, str) else (input or b""),
        capture_output=True,
        timeout=timeout,
        env=ROOT_ENVIRONMENT,
        check=False,
    )
    took = time.monotonic() - started
    return Result(
        tuple(map(str, shown)), done.returncode, _text(done.stdout), _text(done.stderr), took
    )


def _text(output: bytes | None) -> str:
    return (output or b"").decode(errors="replace")
