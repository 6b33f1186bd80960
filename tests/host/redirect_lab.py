"""A host of its own to write firewall rules in: network, mount and cgroup namespaces, nothing else touched.

`Lab` is a client network namespace with a peer on a veth pair, an own cgroup2 subtree
mounted as that client's whole /sys/fs/cgroup, an own /run, and a stand-in for the
gateway's enforce socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aa import paths

PYTHON = "/usr/bin/python3"
REPOSITORY = Path(__file__).parents[2]
UNIFIED = Path("/sys/fs/cgroup/unified")
CLIENT4, CLIENT6, PEER4, PEER6 = "10.77.0.1", "fd77::1", "10.77.0.2", "fd77::2"
COMMAND_SECONDS = 20.0
_numbers = itertools.count()


def cgroup2_root() -> Path:
    """Where this machine mounts cgroup2: beside the old hierarchies, or as its only one."""
    return UNIFIED if UNIFIED.exists() else Path("/sys/fs/cgroup")


def call(argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"check": True, "capture_output": True, "text": True, **options}
    try:
        return subprocess.run(argv, timeout=COMMAND_SECONDS, **options)
    except subprocess.CalledProcessError as e:
        raise AssertionError(f"{' '.join(argv)}: {e.stderr}") from e


class Lab:
    """Use as a context manager. Commands run inside with `run`, governed ones with `governed`."""

    def __init__(self, backend: str = "nft") -> None:
        self.backend = backend
        name = f"aa-test-{os.getpid()}-{next(_numbers)}"
        self.cgroup = cgroup2_root() / name
        self.slice = self.cgroup / paths.PROXY_SLICE
        self._peer = f"{name}p"
        self._processes: list[subprocess.Popen[str]] = []
        self._holder: subprocess.Popen[str] | None = None

    def __enter__(self) -> Lab:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            if process.poll() is None:
                process.kill()
            process.wait(COMMAND_SECONDS)
        if self._holder is not None:
            self._holder.kill()
            self._holder.wait(COMMAND_SECONDS)
        subprocess.run(["ip", "netns", "del", self._peer], capture_output=True, check=False)
        if self.cgroup.exists():
            (self.cgroup / "cgroup.kill").write_text("1")
            for directory, _, _ in os.walk(self.cgroup, topdown=False):
                _patiently(lambda d=directory: os.rmdir(d))

    def _make(self) -> None:
        self.slice.mkdir(parents=True)
        script = textwrap.dedent(
            f"""\
            set -e
            mount --make-rprivate /
            umount -R /sys/fs/cgroup
            mount -t cgroup2 none /sys/fs/cgroup
            mount -t tmpfs none /run
            mkdir -p /run/agent-assembly /run/state
            for d in /etc /usr/sbin; do
                mkdir -p /run/layers$d/upper /run/layers$d/work
                layers=lowerdir=$d,upperdir=/run/layers$d/upper,workdir=/run/layers$d/work
                mount -t overlay none -o $layers $d
            done
            rm -rf /etc/agent-assembly && mkdir /etc/agent-assembly
            for tool in iptables iptables-save iptables-restore \
                ip6tables ip6tables-save ip6tables-restore; do
                ln -sf /usr/sbin/${{tool/tables/tables-{self.backend}}} /etc/alternatives/$tool
            done
            ip link set lo up
            ip link add ve-c type veth peer name ve-s
            echo ready
            exec sleep infinity
            """
        )
        self._holder = subprocess.Popen(
            ["bash", "-c", f"echo $$ >{self.cgroup}/cgroup.procs; exec unshare -C -m -n bash -s"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdin and self._holder.stdout
        self._holder.stdin.write(script)
        self._holder.stdin.close()
        assert self._holder.stdout.readline() == "ready\n"
        call(["ip", "netns", "add", self._peer])
        net = f"--net=/proc/{self._holder.pid}/ns/net"  # alone: /run/netns is not inside
        call(["nsenter", net, "--", "ip", "link", "set", "ve-s", "netns", self._peer])
        for prefix, device, v4, v6 in (
            (self._inside(), "ve-c", CLIENT4, CLIENT6),
            (self._outside(), "ve-s", PEER4, PEER6),
        ):
            call([*prefix, "ip", "link", "set", "lo", "up"])
            call([*prefix, "ip", "link", "set", device, "up"])
            call([*prefix, "ip", "addr", "add", f"{v4}/24", "dev", device])
            call([*prefix, "ip", "addr", "add", f"{v6}/64", "dev", device, "nodad"])
        self.run("ip", "route", "add", "default", "via", PEER4)
        self.run("ip", "-6", "route", "add", "default", "via", PEER6)

    def _inside(self) -> list[str]:
        assert self._holder is not None
        return ["nsenter", "-t", str(self._holder.pid), "-C", "-m", "-n", "--"]

    def _outside(self) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self._peer}", "--"]

    def path(self, inside: str | Path) -> Path:
        """A file of the lab's /run as this process sees it."""
        assert self._holder is not None
        return Path(f"/proc/{self._holder.pid}/root{inside}")

    def run(self, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """A command of the host's root."""
        return call([*self._inside(), *argv], **options)

    def start(self, *argv: str, **options: Any) -> subprocess.Popen[str]:
        return self._start([*self._inside(), *argv], **options)

    def start_peer(self, *argv: str, **options: Any) -> subprocess.Popen[str]:
        return self._start([*self._outside(), *argv], **options)

    def run_peer(self, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return call([*self._outside(), *argv], **options)

    def make_run(self, run: str) -> Path:
        """The cgroup of a run, below the slice."""
        directory = self.slice / paths.run_unit(run)
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def governed(self, run: str, *argv: str, uid: int = 0, **options: Any) -> Any:
        """A command in that run's cgroup, to its end."""
        return call(self._governed(run, argv, uid), **options)

    def start_governed(
        self, run: str, *argv: str, uid: int = 0, **options: Any
    ) -> subprocess.Popen[str]:
        return self._start(self._governed(run, argv, uid), **options)

    def _governed(self, run: str, argv: Sequence[str], uid: int) -> list[str]:
        procs = self.make_run(run) / "cgroup.procs"
        user = ["setpriv", f"--reuid={uid}", "--clear-groups"] if uid else []
        join = ["bash", "-c", f'echo $$ >{procs}; exec "$@"', "join"]
        return [*join, *self._inside(), *user, *argv]

    def _start(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, **options}
        process = subprocess.Popen(argv, **options)
        self._processes.append(process)
        return process

    def config(self) -> Path:
        """The lab's own configuration, which is not there at first."""
        return self.path(paths.CONFIG_FILE)

    def daemon(self, *, log: Path, **environment: str) -> subprocess.Popen[str]:
        """aa-redirect in the lab, as its unit would start it."""
        given = {"PYTHONPATH": str(REPOSITORY), "RUNTIME_DIRECTORY": "/run/state", **environment}
        with log.open("a") as errors:
            return self.start(
                PYTHON, "-m", "aa.redirect", stderr=errors, env={**os.environ, **given}
            )

    def saved(self, tool: str = "iptables-save") -> list[str]:
        """The rules without comments and counters."""
        lines = self.run(tool).stdout.splitlines()
        return [line.partition(" [")[0] for line in lines if not line.startswith("#")]


CONNECT = """
import json, socket, sys
family, kind, address, port, text = sys.argv[1:6]
s = socket.socket(getattr(socket, family), getattr(socket, kind))
s.settimeout(2)
try:
    s.connect((address, int(port)))
    s.send(text.encode())
    print(json.dumps({"answer": s.recv(100).decode(), "port": s.getsockname()[1]}))
except OSError as e:
    print(json.dumps({"error": type(e).__name__, "errno": e.errno}))
"""
"""One exchange of a few bytes; prints what came of it."""

LISTEN = """
import json, socket, sys
family, kind, address, port = sys.argv[1:5]
s = socket.socket(getattr(socket, family), getattr(socket, kind))
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
if family == "AF_INET6":
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
s.bind((address, int(port)))
if kind == "SOCK_STREAM":
    s.listen()
print("listening", flush=True)
level, option, size = (0, 80, 16) if family == "AF_INET" else (41, 80, 28)
while True:
    try:
        if kind == "SOCK_DGRAM":
            data, peer = s.recvfrom(100)
            s.sendto(b"here", peer)
            print(json.dumps({"peer": peer[:2], "data": data.decode()}), flush=True)
            continue
        c, peer = s.accept()
        c.settimeout(15)
        try:
            original = c.getsockopt(level, option, size).hex()
        except OSError:
            original = ""
        data = c.recv(100).decode()
        c.send(b"here")
        print(json.dumps({"peer": peer[:2], "original": original, "data": data}), flush=True)
    except OSError as e:
        print(json.dumps({"error": str(e)}), flush=True)
"""
"""Answers everybody with "here" and tells of each exchange, for TCP with the original destination."""


class Listener:
    """A listening program whose tales are read as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self._lines: list[dict[str, Any]] = []
        self._process = process
        assert process.stdout.readline() == "listening\n"
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(json.loads(line))

    def told(self, count: int = 1, seconds: float = 3.0) -> list[dict[str, Any]]:
        """Waits for so many exchanges and returns all there were."""
        wait_for(lambda: len(self._lines) >= count, seconds)
        return list(self._lines)


def wait_for(condition: Any, seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := bool(condition())) and time.monotonic() < deadline:
        time.sleep(0.02)
    return met


def _patiently(act: Any, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            act()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def original(told: Mapping[str, Any]) -> tuple[str, int]:
    """The destination that SO_ORIGINAL_DST gave."""
    raw = bytes.fromhex(told["original"])
    port = int.from_bytes(raw[2:4], "big")
    if len(raw) == 16:
        return socket.inet_ntop(socket.AF_INET, raw[4:8]), port
    return socket.inet_ntop(socket.AF_INET6, raw[8:24]), port


class Gateway:
    """Stands in for the gateway: keeps what it is told and offers the runs it is given."""

    def __init__(self, path: Path) -> None:
        self.reports: list[dict[str, Any]] = []
        self.confirmed: list[dict[str, Any]] = []
        self.status: dict[str, Any] = {}
        self._runs: dict[str, dict[str, Any]] = {}
        self._watchers: list[Any] = []
        self._path = path
        self._loop = asyncio.new_event_loop()
        self._talking: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Gateway:
        self._up = threading.Event()
        self._thread.start()
        assert self._up.wait(5)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop)
        self._thread.join(5)
        self._path.unlink(missing_ok=True)

    def _stop(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.call_later(0.05, self._talking.cancel)

    def set_run(self, run: Mapping[str, Any]) -> None:
        """Adds or changes a run and tells who watches."""

        def tell() -> None:
            self._runs[run["id"]] = dict(run)
            for writer in self._watchers:
                _reply(writer, {"event": "changed", "runs": [dict(run)]}, continues=True)

        self._loop.call_soon_threadsafe(tell)

    def refusals(self, run: str | None = None) -> list[dict[str, Any]]:
        found = [r for r in self.reports if r["type"] == "refusal"]
        return found if run is None else [r for r in found if r["run"] == run]

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [r for r in self.reports if r["type"] == kind]

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(asyncio.start_unix_server(self._talk, self._path))
        self._up.set()
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._talking)
        self._loop.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                call = json.loads((await reader.readuntil(b"\0"))[:-1])
                self._answer(call["method"].rpartition(".")[2], call.get("parameters", {}), writer)

    def _answer(self, method: str, given: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if method == "WatchRuns":
            self._watchers.append(writer)
            runs = list(self._runs.values())
            return _reply(writer, {"event": "snapshot", "runs": runs}, continues=True)
        if method == "Report":
            self.reports += given["reports"]
        elif method == "ConfirmRun":
            self.confirmed.append(given)
        elif method == "SetStatus":
            self.status = given
        _reply(writer, {})


def _reply(writer: asyncio.StreamWriter, parameters: Any, continues: bool = False) -> None:
    message = {"parameters": parameters, **({"continues": True} if continues else {})}
    writer.write(json.dumps(message).encode() + b"\0")


def run_json(lab: Lab, run: str, *, state: str, uid: int = 0, **changes: Any) -> dict[str, Any]:
    """A run as the gateway would tell it."""
    directory = lab.make_run(run)
    return {
        "id": run,
        "agent": "sample",
        "user": "u",
        "uid": uid,
        "home": "",
        "layers": ["proxy"],
        "tags": [],
        "state": state,
        "argv": [],
        "directory": "",
        "cgroup": str(directory.relative_to(lab.cgroup)),
        "cgroup_id": directory.stat().st_ino,
        "caller_uid": 0,
        "share": "",
        "started": 1.0,
        "ended": 0.0,
        "exit_code": None,
        "signal": None,
        **changes,
    }


@contextlib.contextmanager
def notify_socket(path: Path) -> Iterator[socket.socket]:
    """What systemd would listen on for READY=1."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(COMMAND_SECONDS)
        yield sock


def stop(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> int:
    process.send_signal(number)
    return process.wait(COMMAND_SECONDS)
