"""The sandbox of a run as properties of its systemd unit, and which folders it may write. Pure.

Every daemon's own paths, other programs' sockets and shared folders are out of its sight:
what the same user's ungoverned programs offer is the nearest way out of a run.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from aa import paths
from aa.model import Layer, Run
from aa.policy.sandbox import PRIVATE

SHIM_SOCKETS_DIR = paths.RUNTIME_DIR / "shim"
"""One socket of aa-launch per starting run; also where the run sees its own."""

INTERPRETER = "/usr/bin/python3"
"""The shim's."""

START_SECONDS = 30
STOP_SECONDS = 5
"""Between SIGTERM and SIGKILL for what a run leaves behind."""

CAP_SETGID, CAP_SETPCAP = 6, 8
SHIM_CAPABILITIES = 1 << CAP_SETGID | 1 << CAP_SETPCAP
"""What the shim needs to give up groups and capabilities; nothing is left of them for the program."""

MS_REC = 16384  # for BindPaths: with what is mounted below
USEC = 1_000_000

SLICES = {True: "aa-agents-proxy.slice", False: "aa-agents-local.slice"}
SLICE_PATHS = {True: paths.PROXY_SLICE, False: paths.LOCAL_SLICE}

ADDRESS_FAMILIES = ["AF_UNIX", "AF_INET", "AF_INET6"]
SYSTEM_CALLS = [
    "@system-service",
    # The group @sandbox by its members: systemd 252 does not know it.
    "landlock_add_rule",
    "landlock_create_ruleset",
    "landlock_restrict_self",
    "seccomp",
]
FORBIDDEN_SYSTEM_CALLS = ["io_uring_enter", "io_uring_register", "io_uring_setup"]
"""They make and use sockets past this very filter."""

HIDDEN = ("/run",)
"""Replaced by an empty read-only folder: sockets of the bus, of systemd, of container engines, of
the journal, of screen and tmux, of every session's own daemons."""

OWN_PATHS = (
    str(paths.CONFIG_DIR),
    str(paths.STATE_DIR),
    str(paths.LOG_DIR),
)
"""What this software keeps: policies of others, keys, the audit log."""

INACCESSIBLE = (
    *OWN_PATHS,
    "/var/log/journal",
    "/sys/fs/bpf",
    "/sys/kernel/debug",
    "/sys/kernel/security",
    "/sys/kernel/tracing",
    # Sockets and spools that lie outside of /run.
    "/var/lib/containerd",
    "/var/lib/docker",
    "/var/lib/incus",
    "/var/lib/lxd",
    "/var/snap/lxd",
    "/var/spool/at",
    "/var/spool/cron",
)

SYSTEM_TREES = tuple(
    f"/{name}"
    for name in (
        "bin boot dev etc lib lib32 lib64 libx32 lost+found proc root run sbin sys usr var"
    ).split()
)
"""Nothing in them becomes writable, unless it is below the user's home or private to the run."""


class Place(enum.Enum):
    """What a run's working directory may be."""

    WRITABLE = "writable"
    READ_ONLY = "read-only"
    PRIVATE = "private"  # the path is the run's own, not what the caller sees there
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Directory:
    """A folder of the host as it was when the run was asked for."""

    path: str
    device: int
    inode: int


class Proof(enum.StrEnum):
    """What the shim finds of a path before the program starts; the shim has the same words."""

    CLOSED = "closed"  # it cannot be opened
    READ_ONLY = "read-only"
    NO_EXEC = "no-exec"


@dataclass(frozen=True, slots=True)
class Check:
    path: str
    proof: Proof


@dataclass(frozen=True, slots=True)
class Mounts:
    """Paths that the policy takes from a run, by how. Those that are missing do not matter."""

    inaccessible: tuple[str, ...] = ()
    read_only: tuple[str, ...] = ()
    no_exec: tuple[str, ...] = ()
    exec: tuple[str, ...] = ()
    """Executable all the same, in what is writable."""
    fixed: tuple[str, ...] = ()
    """Read-only mounts of their own. systemd makes the mount of a path that it takes execution from, or
    gives it to, writable, and drops `ReadOnlyPaths=` of what is read-only around."""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """What a run may write, and how it begins."""

    directory: Directory
    place: Place
    folders: tuple[Directory, ...] = ()
    """Declared state folders, writable."""
    covered: tuple[str, ...] = ()
    """Sockets and terminals of programs outside of the run."""
    file: str = "sandbox"
    """The policy's default for files: deny, sandbox or allow."""
    exec: str = "allow"
    private: tuple[str, ...] = PRIVATE
    """Folders of the run's own that it may write to."""
    mounts: Mounts = Mounts()
    kept: tuple[Directory, ...] = ()
    """Folders and files in writable ones that can be neither moved nor removed."""
    fixed: tuple[Directory, ...] = ()
    """Those of `mounts.fixed` that the run's user looked at."""
    checks: tuple[Check, ...] = ()
    readable: tuple[Directory, ...] = ()
    """What `file = "deny"` leaves open by rules."""
    executable: tuple[Directory, ...] = ()
    """The same of `exec = "deny"`."""
    memory: int | None = None
    """Bytes."""
    tasks: int | None = None
    umask: int = 0o022
    resolver: str = ""
    """What /etc/resolv.conf is a link to, when that is in a hidden place."""

    @property
    def writable(self) -> tuple[str, ...]:
        own = (self.directory.path,) if self.place is Place.WRITABLE else ()
        return own + tuple(f.path for f in self.folders)


def is_below(path: str, top: str) -> bool:
    """True for `top` itself too. Both are absolute and normal."""
    return PurePosixPath(path).is_relative_to(top)


def is_home(path: str) -> bool:
    """False for what passwd(5) gives to accounts of the system: `/`, `/bin`, `/usr/sbin`, `/dev`."""
    trees = (tree for tree in SYSTEM_TREES if tree != "/var")
    return path.count("/") > 1 and not any(is_below(path, tree) for tree in trees)


def judge_directory(path: str, home: str) -> tuple[Place, str]:
    """What becomes of a working directory, and a note for the person where it is not as usual."""
    if any(is_below(path, top) for top in (*HIDDEN, *INACCESSIBLE)):
        return Place.REFUSED, f"{path} is not visible to a run; start it in another folder"
    if path in PRIVATE:
        return Place.PRIVATE, f"{path} is the run's own, empty folder"
    if any(is_below(path, top) for top in PRIVATE):
        return Place.WRITABLE, ""
    own_home = is_home(home)
    if own_home and path == home:
        return Place.READ_ONLY, (
            f"{path} is read-only, because it is your home; start in a project folder to write there"
        )
    if own_home and is_below(home, path):
        return Place.READ_ONLY, f"{path} is read-only, because your home is in it"
    if any(is_below(own, path) for own in (*OWN_PATHS, str(paths.LIB_DIR))):
        return Place.READ_ONLY, f"{path} is read-only, because it holds Agent Assembly itself"
    if own_home and is_below(path, home):
        return Place.WRITABLE, ""
    if path == "/" or any(is_below(path, tree) for tree in SYSTEM_TREES):
        return Place.READ_ONLY, f"{path} is read-only, because it belongs to the system"
    return Place.WRITABLE, ""


def judge_open_directory(path: str, home: str) -> tuple[Place, str]:
    """The same where the policy lets files be written as the user may."""
    if is_home(home) and is_below(path, home):
        return Place.WRITABLE, ""
    return judge_directory(path, home)


def state_folder(declared: str, home: str) -> tuple[str, str] | None:
    """A declared state folder as (an existing folder, the path below it), or None for one that cannot be.

    `~/x` is below the home; the configuration has checked the others.
    """
    if not declared.startswith("~/"):
        return "/", declared
    path = PurePosixPath(home, declared[2:])
    if not is_home(home) or ".." in path.parts or str(path) == home:
        return None
    return home, str(path)


def properties(
    run: Run, sandbox: Sandbox, *, shim_socket: str, streams: Sequence[int]
) -> list[tuple[str, Any]]:
    """The unit of a run. `streams` are descriptors of this process for stdin, stdout and stderr."""
    unit = [
        ("Description", f"Agent {run.agent}, run {run.id}"),
        ("Slice", SLICES[Layer.PROXY in run.layers]),
        ("CollectMode", "inactive"),
        ("AddRef", True),
        *_process(run, sandbox, shim_socket, streams),
        *_privileges(),
        *_file_system(run, sandbox, shim_socket),
        *_kernel(),
        *_amounts(sandbox),
    ]
    for name, value in unit:
        if any(ord(c) < 0x20 or ord(c) == 0x7F for text in _texts(value) for c in text):
            raise ValueError(f"{name} holds a control character; systemd would read it as a line")
    return unit


def _texts(value: Any) -> Iterator[str]:
    """Every text in a property's value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _texts(one)


def _process(
    run: Run, sandbox: Sandbox, shim_socket: str, streams: Sequence[int]
) -> Iterable[tuple[str, Any]]:
    argv = [INTERPRETER, "-I", "-S", str(paths.SHIM), shim_socket]
    stdin, stdout, stderr = streams
    return [
        ("Type", "exec"),
        ("ExecStart", [(argv[0], argv, False)]),
        ("User", run.user),
        ("UMask", sandbox.umask),
        ("StandardInputFileDescriptor", stdin),
        ("StandardOutputFileDescriptor", stdout),
        ("StandardErrorFileDescriptor", stderr),
        ("IgnoreSIGPIPE", False),
        ("TimeoutStartUSec", START_SECONDS * USEC),
        ("TimeoutStopUSec", STOP_SECONDS * USEC),
        ("SendSIGHUP", True),  # shells do not end on SIGTERM
        ("OOMPolicy", "continue"),
    ]


def _privileges() -> Iterable[tuple[str, Any]]:
    return [
        ("NoNewPrivileges", True),
        ("CapabilityBoundingSet", SHIM_CAPABILITIES),
        ("AmbientCapabilities", SHIM_CAPABILITIES),
        ("KeyringMode", "private"),
        ("LockPersonality", True),
        ("RestrictNamespaces", 0),  # none may be made
        ("RestrictRealtime", True),
        ("RestrictSUIDSGID", True),
        ("RestrictAddressFamilies", (True, ADDRESS_FAMILIES)),
        ("SystemCallArchitectures", ["native"]),
        ("SystemCallFilter", (True, SYSTEM_CALLS)),
        ("SystemCallFilter", (False, FORBIDDEN_SYSTEM_CALLS)),
        ("SystemCallErrorNumber", errno.EPERM),
    ]


def _file_system(run: Run, sandbox: Sandbox, shim_socket: str) -> Iterable[tuple[str, Any]]:
    bound = [p for p in sandbox.writable if any(is_below(p, top) for top in PRIVATE)]
    shown = [
        (str(paths.run_directory(run.id)), str(paths.RUN_VIEW)),
        (shim_socket, shim_socket),
    ]
    if sandbox.resolver:
        shown.append((sandbox.resolver, sandbox.resolver))
    mounts = sandbox.mounts
    open_home = sandbox.file == "allow"
    return [
        # strict leaves /home and /root alone, ProtectHome= is for them
        ("ProtectSystem", "full" if open_home else "strict"),
        ("ProtectHome", "no" if open_home else "read-only"),
        ("ReadWritePaths", [p for p in sandbox.writable if p not in bound]),
        ("PrivateTmp", True),
        ("PrivateDevices", True),
        ("PrivateIPC", True),
        (
            "TemporaryFileSystem",
            [(path, "ro,mode=0755") for path in HIDDEN] + [("/dev/shm", "mode=1777")],
        ),
        (
            "BindPaths",
            [(path, path, False, MS_REC) for path in (*bound, *(k.path for k in sandbox.kept))],
        ),
        (
            "BindReadOnlyPaths",
            [(source, target, False, MS_REC) for source, target in shown]
            + [(path, path, True, MS_REC) for path in mounts.fixed],
        ),
        ("InaccessiblePaths", _lenient((*INACCESSIBLE, *sandbox.covered, *mounts.inaccessible))),
        ("ReadOnlyPaths", _lenient(mounts.read_only)),
        ("NoExecPaths", _lenient(mounts.no_exec)),
        ("ExecPaths", _lenient(mounts.exec)),
    ]


def _lenient(listed: Iterable[str]) -> list[str]:
    """Paths that need not exist."""
    return [f"-{path}" for path in listed]


def _amounts(sandbox: Sandbox) -> Iterable[tuple[str, Any]]:
    amounts = (("MemoryMax", sandbox.memory), ("TasksMax", sandbox.tasks))
    return [(name, value) for name, value in amounts if value is not None]


def _kernel() -> Iterable[tuple[str, Any]]:
    return [
        ("ProtectClock", True),
        ("ProtectControlGroups", True),
        ("ProtectHostname", True),
        ("ProtectKernelLogs", True),
        ("ProtectKernelModules", True),
        ("ProtectKernelTunables", True),
        ("ProtectProc", "invisible"),
    ]
