"""A small world for the kernel layer: slices, a bpffs and two network namespaces of the test's own.

Nothing here touches the machine's cgroups, mounts or firewall; everything carries
the test's pid and goes with `World.close`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from aa.ebpf import tables
from aa.ebpf.events import Event, decode
from aa.ebpf.libbpf import Ring
from aa.ebpf.loader import Loader, Slices

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
OBJECTS = ROOT / "probes" / "build"
PYTHON = "/usr/bin/python3"

COMMAND_SECONDS = 20
CLIENT4, SERVER4 = "10.78.0.1", "10.78.0.2"
CLIENT6, SERVER6 = "fd78::1", "fd78::2"


def sh(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, text=True, capture_output=True, timeout=COMMAND_SECONDS, check=False
    )
    if check and done.returncode:
        raise AssertionError(f"{command}: {done.returncode} {done.stdout}{done.stderr}")
    return done


def eventually(what: Callable[[], T], *, seconds: float = 8.0) -> T:
    """What `what` returns as soon as that is true; its last answer when time is up."""
    end = time.monotonic() + seconds
    while not (answer := what()) and time.monotonic() < end:
        time.sleep(0.02)
    return answer


def cgroup_root() -> Path:
    for line in Path("/proc/mounts").read_text().splitlines():
        fields = line.split()
        if fields[2] == "cgroup2":
            return Path(fields[1])
    raise AssertionError("this machine has no cgroup2 mount")


@dataclass
class World:
    name: str
    root: Path  # of cgroup2
    top: Path  # our own subtree
    pins: Path
    slices: Slices

    @classmethod
    def make(cls, label: str) -> World:
        name = f"aat{os.getpid()}{label}"
        root = cgroup_root()
        top = root / f"aa-test-{os.getpid()}-{label}"
        relative = top.relative_to(root)
        pins = Path(tempfile.mkdtemp(prefix=f"aa-test-{os.getpid()}-bpf-"))
        sh("mount", "-t", "bpf", "-o", "mode=0700", "bpf", str(pins))
        world = cls(
            name,
            root,
            top,
            pins,
            Slices(
                root,
                f"{relative}/aa.slice/aa-agents.slice",
                f"{relative}/aa.slice/aa-agents.slice/aa-agents-proxy.slice",
            ),
        )
        world.make_slices()
        for ns in (world.client, world.server):
            sh("ip", "netns", "add", ns)
            sh("ip", "-n", ns, "link", "set", "lo", "up")
        a, b = f"c{os.getpid()}", f"s{os.getpid()}"
        sh(
            "ip",
            "link",
            "add",
            a,
            "netns",
            world.client,
            "type",
            "veth",
            "peer",
            "name",
            b,
            "netns",
            world.server,
        )
        for ns, link, v4, v6 in (
            (world.client, a, CLIENT4, CLIENT6),
            (world.server, b, SERVER4, SERVER6),
        ):
            sh("ip", "-n", ns, "link", "set", link, "up")
            sh("ip", "-n", ns, "addr", "add", f"{v4}/24", "dev", link)
            sh("ip", "-n", ns, "-6", "addr", "add", f"{v6}/64", "dev", link, "nodad")
        world.client_link = a
        sh(
            "ip",
            "netns",
            "exec",
            world.client,
            "sysctl",
            "-qw",
            "net.ipv4.ping_group_range=0 2147483647",
            "net.ipv4.tcp_fastopen=3",
        )
        sh("ip", "netns", "exec", world.server, "sysctl", "-qw", "net.ipv4.tcp_fastopen=3")
        return world

    client_link: str = ""
    pem: Path = Path()  # of a test that has a certificate

    @property
    def client(self) -> str:
        return self.name + "c"

    @property
    def server(self) -> str:
        return self.name + "s"

    @property
    def agents(self) -> Path:
        return self.root / self.slices.agents

    @property
    def proxied(self) -> Path:
        return self.root / self.slices.proxy

    @property
    def local(self) -> Path:
        return self.agents / "aa-agents-local.slice"

    @property
    def outside(self) -> Path:
        return self.top / "outside"

    def make_slices(self) -> None:
        for directory in (self.proxied, self.local, self.outside):
            directory.mkdir(parents=True, exist_ok=True)

    def remove_slices(self) -> None:
        """Kills what is in them and removes them, as a stopped slice would be."""
        _remove_cgroups(self.agents)

    def run_dir(self, where: Path, name: str = "aa-agent-test.service") -> Path:
        directory = where / name
        directory.mkdir(exist_ok=True)
        return directory

    def loader(self) -> Loader:
        loader = Loader(pins=self.pins, objects=OBJECTS, slices=self.slices)
        loader.open()
        loader.load(tables.proxy_ends())
        return loader

    def command(self, cgroup: Path | None, netns: str, *command: str) -> list[str]:
        join = f"echo $$ > {cgroup}/cgroup.procs && " if cgroup else ""
        return [
            "nsenter",
            f"--net=/run/netns/{netns}",
            "sh",
            "-c",
            join + 'exec "$@"',
            "sh",
            *command,
        ]

    def do(
        self, cgroup: Path | None, *command: str, netns: str = "", check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        return sh(*self.command(cgroup, netns or self.client, *command), check=check)

    def python(
        self, cgroup: Path | None, code: str, *arguments: str, netns: str = "", check: bool = True
    ) -> str:
        """Runs Python in a cgroup and a network namespace; what it printed."""
        done = self.do(
            cgroup,
            PYTHON,
            "-I",
            "-S",
            "-c",
            PRELUDE + textwrap.dedent(code),
            *arguments,
            netns=netns,
            check=check,
        )
        return done.stdout.strip() + done.stderr.strip()

    @contextlib.contextmanager
    def background(
        self, cgroup: Path | None, code: str, *arguments: str, netns: str = ""
    ) -> Iterator[subprocess.Popen[str]]:
        """The same, while the block runs; it begins when the program has printed a line."""
        python = (PYTHON, "-I", "-S", "-u", "-c", PRELUDE + textwrap.dedent(code))
        with self.process(cgroup, *python, *arguments, netns=netns) as process:
            yield process

    @contextlib.contextmanager
    def process(
        self, cgroup: Path | None, *command: str, netns: str = ""
    ) -> Iterator[subprocess.Popen[str]]:
        """A program while the block runs, by default a server's."""
        process = subprocess.Popen(
            self.command(cgroup, netns or self.server, *command),
            text=True,
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline(), "it did not start"
            yield process
        finally:
            process.kill()
            process.wait(COMMAND_SECONDS)
            process.stdout and process.stdout.close()
            process.stdin and process.stdin.close()

    def close(self) -> None:
        """Takes everything away, whatever state a failed test left it in."""
        with contextlib.ExitStack() as last:
            last.callback(shutil.rmtree, self.pins, ignore_errors=True)
            # Lazily: a loader that a failed test did not close holds its lock there.
            last.callback(sh, "umount", "--lazy", str(self.pins), check=False)
            for ns in (self.client, self.server):
                last.callback(sh, "ip", "netns", "del", ns, check=False)
            _remove_cgroups(self.top)


PRELUDE = """
import os, socket, sys, time
AF4, AF6 = socket.AF_INET, socket.AF_INET6
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
def attempt(f, *a):
    try:
        f(*a)
        return 0
    except OSError as e:
        return e.errno or str(e)
def tcp(host, port, seconds=1.0):
    s = socket.socket(AF6 if ":" in host else AF4, TCP)
    s.settimeout(seconds)
    s.connect((host, port))
    return s
def udp(host, port, data=b"x"):
    s = socket.socket(AF6 if ":" in host else AF4, UDP)
    s.sendto(data, (host, port))
"""


def _remove_cgroups(top: Path) -> None:
    for directory, _, _ in os.walk(top, topdown=False):
        with contextlib.suppress(FileNotFoundError):
            for pid in (Path(directory) / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        eventually(lambda d=directory: _rmdir(Path(d)))


def _rmdir(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


class Recorder:
    """Reads the ring of a loader in the test's own thread."""

    def __init__(self, loader: Loader) -> None:
        self.events: list[Event] = []
        self._raw: list[bytes] = []
        self._ring = Ring(loader.ring_fd, self._take)

    def _take(self, record: bytes) -> bool:
        self._raw.append(record)
        return True

    def read(self) -> list[Event]:
        self._ring.consume()
        self.events += [decode(raw) for raw in self._raw]
        self._raw.clear()
        return self.events

    def find(
        self, kind: type[T], test: Callable[[T], bool] = lambda _: True, *, seconds: float = 5.0
    ) -> T | None:
        """The first event of a kind that passes a test, when it comes in time."""
        return eventually(
            lambda: next((e for e in self.read() if isinstance(e, kind) and test(e)), None),
            seconds=seconds,
        )

    def count(self, kind: type[T], test: Callable[[T], bool] = lambda _: True) -> int:
        return sum(isinstance(e, kind) and test(e) for e in self.read())

    def close(self) -> None:
        self._ring.close()


def ids(directory: Path) -> int:
    return directory.stat().st_ino
