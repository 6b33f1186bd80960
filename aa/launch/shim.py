#!/usr/bin/python3 -IS
"""The last step before an agent's program: gives up every privilege, confines itself, and execs.

Runs as `python3 -I -S shim SOCKET` in the run's unit. It connects to aa-launch, gets its
instructions, waits for the go-ahead, and then does each step below or ends with a reason: the
program never runs half-confined. A connection that closes without a word means that it runs.
One file, standard library only; what is heavy to import is imported while aa-launch works.
"""

from __future__ import annotations

import _socket
import os
import stat
import sys

TYPE_CHECKING = False  # importing typing would take longer than all the rest
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any, NoReturn

WAIT_SECONDS = 150.0
"""For each message of aa-launch; the barrier's own deadline is shorter."""
MAX_MESSAGE = 1 << 20
"""Bytes of one message."""

NOT_STARTED, NOT_EXECUTABLE, NOT_FOUND = 125, 126, 127
"""Exit codes, as env(1) has them."""

ENOEXEC = 8
LAST_SIGNAL = 64
LAST_CAPABILITY = 63
LAST_DESCRIPTOR = (1 << 31) - 1

# linux/prctl.h
PR_CAPBSET_READ, PR_CAPBSET_DROP = 23, 24
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
PR_GET_KEEPCAPS = 7
# linux/capability.h
CAPABILITY_VERSION_3 = 0x20080522
# The same number on every architecture that Debian has, asm-generic/unistd.h
SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446

# linux/landlock.h
LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1
LANDLOCK_SCOPES = 3  # abstract Unix sockets and signals, ABI 6
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_CHAR, MAKE_DIR = 1 << 4, 1 << 5, 1 << 6, 1 << 7
MAKE_REG, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, MAKE_SYM = 1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
HANDLED_BY_ABI = {
    1: (1 << 13) - 1,
    2: (1 << 14) - 1,
    3: (1 << 15) - 1,
    4: (1 << 15) - 1,
    5: (1 << 16) - 1,
}
"""Rights on files that an ABI knows; later ones know those of 5."""
PROOFS = {"closed": 0, "read-only": os.ST_RDONLY, "no-exec": os.ST_NOEXEC}
"""What a path may have to be before the program starts, and the flag of its mount that says so."""
MINIMUM_ABI = 2
"""Below it files cannot be renamed between folders, which breaks ordinary tools."""

LOOK = READ_FILE | READ_DIR
READ = LOOK | EXECUTE
CHANGE = (
    LOOK | WRITE_FILE | TRUNCATE | REFER | REMOVE_DIR | REMOVE_FILE
    | MAKE_DIR | MAKE_REG | MAKE_SOCK | MAKE_FIFO | MAKE_SYM
)  # fmt: skip
WRITE = CHANGE | EXECUTE
DEVICE = LOOK | WRITE_FILE | TRUNCATE | IOCTL_DEV
ACCESS = {"look": LOOK, "read": READ, "change": CHANGE, "write": WRITE, "device": DEVICE}
"""What a rule of the instructions may grant. Making device nodes is nobody's."""
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
"""Rights that can be granted to a single file; the others are about what is in a folder."""

PLAIN_DEVICES = frozenset({(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)})
"""null, zero, full, random, urandom"""


class Failure(Exception):
    """A step that did not succeed: which one, and why."""

    def __init__(self, step: str, reason: object, code: int = NOT_STARTED) -> None:
        self.step, self.reason, self.code = step, str(reason), code
        super().__init__(f"{step}: {reason}")


class Launch:
    """The connection to aa-launch: JSON objects, each ended by a NUL."""

    def __init__(self, path: str) -> None:
        self._socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        self._socket.settimeout(WAIT_SECONDS)
        self._socket.connect(path)
        self._buffer = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = self._socket.recv(65536)
            if not data:
                raise Failure("launch", "aa-launch went away before the go-ahead")
            self._buffer += data
            if len(self._buffer) > MAX_MESSAGE:
                raise Failure("launch", f"a message is over {MAX_MESSAGE} bytes")
        message, _, self._buffer = self._buffer.partition(b"\0")
        import json

        value = json.loads(message)
        if not isinstance(value, dict):
            raise Failure("launch", "a message is not an object")
        return value

    def tell(self, failure: Failure) -> None:
        import json

        told = {"failed": failure.step, "reason": failure.reason, "code": failure.code}
        self._socket.sendall(json.dumps(told).encode() + b"\0")


def stream_refusal(fd: int) -> str | None:
    """Why a descriptor may not be a run's stream, or None.

    Pipes, terminals, plain files, null devices and unnamed Unix stream pairs may; a socket
    that was connected outside would carry bytes past every decision.
    """
    try:
        status = os.fstat(fd)
    except OSError as e:
        return e.strerror or "not open"
    mode = status.st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISREG(mode):
        return None
    if stat.S_ISCHR(mode):
        numbers = (os.major(status.st_rdev), os.minor(status.st_rdev))
        return None if numbers in PLAIN_DEVICES or os.isatty(fd) else "it is a device"
    if stat.S_ISSOCK(mode):
        return _socket_refusal(fd)
    if stat.S_ISDIR(mode):
        return "it is a directory"
    return "it is neither a file, a pipe nor a terminal"


def _socket_refusal(fd: int) -> str | None:
    probe = _socket.socket(fileno=os.dup(fd))
    try:
        if probe.family != _socket.AF_UNIX:
            return "it is a network socket"
        if probe.type != _socket.SOCK_STREAM:
            return "it is a Unix socket, but not a stream"
        if probe.getsockname() or probe.getpeername():
            return "it is a Unix socket that is connected to a service"
    except OSError as e:
        return f"it is a Unix socket without a peer ({e.strerror})"
    finally:
        probe.close()
    return None


def refuse_streams() -> None:
    for fd in range(3):
        refusal = stream_refusal(fd)
        if refusal is not None:
            raise Failure("streams", f"descriptor {fd} cannot be handed to a run: {refusal}")


def close_other_descriptors(kept: int) -> None:
    os.closerange(3, kept)
    os.closerange(kept + 1, LAST_DESCRIPTOR)


def libc() -> Any:
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    return library


def checked(result: int, what: str) -> int:
    """The result of a C call, or its error as `OSError`."""
    if result == -1:
        import ctypes

        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def take_terminal(attributes: list[Any] | None) -> None:
    """Makes the streams' terminal the controlling one, as its user had it set."""
    import fcntl
    import termios

    fd = next((fd for fd in range(3) if os.isatty(fd)), None)
    if fd is None:
        raise Failure("terminal", "none of the streams is a terminal")
    if os.getpid() != os.getsid(0):
        os.setsid()
    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)
    os.tcsetpgrp(fd, os.getpgrp())
    if attributes is not None:
        termios.tcsetattr(fd, termios.TCSANOW, attributes)


def default_signals() -> None:
    """Python ignores some signals and systemd may block some; the program gets none of that."""
    import ctypes

    c = libc()
    for number in range(1, LAST_SIGNAL + 1):
        c.signal(number, None)  # refused for KILL, STOP and those of the C library: no matter
    nothing = ctypes.create_string_buffer(128)
    checked(c.sigprocmask(2, nothing, None), "sigprocmask")  # SIG_SETMASK


def drop_capabilities() -> None:
    """Empties every set of capabilities for good. Needs CAP_SETPCAP, and takes it away."""
    import ctypes

    c = libc()
    for capability in range(LAST_CAPABILITY + 1):
        if c.prctl(PR_CAPBSET_READ, capability, 0, 0, 0) == 1:
            checked(c.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0), "PR_CAPBSET_DROP")
    checked(c.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "PR_CAP_AMBIENT")
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    checked(c.capset(header, nothing), "capset")


def verify_privileges(groups: list[int]) -> None:
    """Reads back what the kernel thinks of this process now."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        if int(status[name], 16) != 0:
            raise Failure("privileges", f"{name} is not empty: {status[name]}")
    if status["NoNewPrivs"].strip() != "1":
        raise Failure("privileges", "no_new_privs is not set")
    if status["Seccomp"].strip() != "2":
        raise Failure("privileges", "no system call filter is in force")
    if {int(g) for g in status["Groups"].split()} != set(groups):
        raise Failure("privileges", f"supplementary groups are {status['Groups']}")
    if "0" in status["Uid"].split() + status["Gid"].split():
        raise Failure("privileges", "a run cannot be root")
    if libc().prctl(PR_GET_KEEPCAPS, 0, 0, 0, 0) != 0:
        raise Failure("privileges", "capabilities would be kept")


def verify_place(place: dict[str, Any], what: str) -> int:
    """A descriptor of a folder or file, which must be the very one that was checked, and as writable as meant.

    A link swapped in while the sandbox was made shows here: in the inode, or in the mount. What is
    granted later is granted to this descriptor, so that swapping again afterwards gains nothing.
    """
    path = place["path"]
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        found = os.fstat(fd)
        flags = os.fstatvfs(fd).f_flag
    except OSError as e:
        raise Failure(what, f"{path}: {e.strerror}") from None
    if place["inode"] is not None and (found.st_dev, found.st_ino) != (
        place["device"],
        place["inode"],
    ):
        raise Failure(what, f"{path} is not what it was when the run was asked for")
    if place["writable"] and flags & os.ST_RDONLY:
        raise Failure(what, f"{path} is read-only in the sandbox")
    return fd


def enter(directory: dict[str, Any]) -> int:
    try:
        os.chdir(directory["path"])
    except OSError as e:
        raise Failure("directory", f"{directory['path']}: {e.strerror}") from None
    return verify_place({**directory, "path": "."}, "directory")


def verify_closed(path: str, proof: str) -> None:
    """What the policy takes from this run must really be taken from it."""
    try:
        if proof == "closed":
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            held = False
        else:
            held = bool(os.statvfs(path).f_flag & PROOFS[proof])
    except PermissionError:
        held = True
    except OSError as e:
        raise Failure("closed", f"{path}: {e.strerror}") from None
    if not held:
        raise Failure("closed", f"{path} is not {proof} in the sandbox, as the policy wants it")


def landlock_abi() -> int:
    """The kernel's Landlock ABI, 0 where there is none."""
    found = libc().syscall(SYS_LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_CREATE_RULESET_VERSION)
    return max(0, int(found))


def landlock(
    rules: list[list[Any]], required: bool, opened: Mapping[str, int] | None = None
) -> None:
    """Confines this process and all that it will start to what the rules grant.

    `opened` are the folders that were verified, by the paths that rules have for them.
    """
    abi = landlock_abi()
    if abi < MINIMUM_ABI:
        if required:
            raise Failure("landlock", f"this kernel has ABI {abi}, {MINIMUM_ABI} is needed")
        return
    restrict(rules, abi, opened or {})


def restrict(rules: list[list[Any]], abi: int, opened: Mapping[str, int]) -> None:
    """Applies rules (path, access, and whether it may be missing) under one ABI; what it does not
    know is not handled."""
    import ctypes

    c = libc()
    handled = HANDLED_BY_ABI[min(abi, max(HANDLED_BY_ABI))]
    scoped = LANDLOCK_SCOPES if abi >= 6 else 0
    attributes = (ctypes.c_uint64 * 3)(handled, 0, scoped)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = checked(
        c.syscall(SYS_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0),
        "landlock_create_ruleset",
    )
    for path, access, *optional in rules:
        try:
            fd = opened[path] if path in opened else os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            if optional != [True]:
                raise
            continue
        rights = ACCESS[access] & handled
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= OF_FILES
        # struct landlock_path_beneath_attr is packed: 64 bits of rights, 32 of descriptor
        rule = rights.to_bytes(8, sys.byteorder) + fd.to_bytes(4, sys.byteorder)
        checked(
            c.syscall(SYS_LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, 0),
            f"landlock_add_rule {path}",
        )
        if path not in opened:
            os.close(fd)
    checked(c.syscall(SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def candidates(name: str, search: str) -> Iterator[str]:
    """The paths that a command's name may mean, as execvp(3) tries them."""
    if "/" in name:
        yield name
    else:
        for folder in search.split(":"):
            yield os.path.join(folder or ".", name)


def execute(argv: list[str], env: dict[str, str]) -> NoReturn:
    """Becomes the program, or fails with the code that a shell would give."""
    reason, code = f"{argv[0]}: not found", NOT_FOUND
    for path in candidates(argv[0], env.get("PATH", "")):
        try:
            os.execve(path, argv, env)
        except (FileNotFoundError, NotADirectoryError):
            if os.path.exists(path):  # it is there: its interpreter is not
                reason, code = f"{path}: its interpreter is not there", NOT_EXECUTABLE
        except OSError as e:
            if e.errno == ENOEXEC:  # a script without an interpreter line is the shell's
                os.execve("/bin/sh", ["sh", path, *argv[1:]], env)
            reason, code = f"{path}: {e.strerror}", NOT_EXECUTABLE
        except ValueError as e:
            reason, code = f"{argv[0]!r}: {e}", NOT_EXECUTABLE
    raise Failure("exec", reason, code)


def confine(instructions: dict[str, Any]) -> None:
    """Every step between the go-ahead and exec, in order."""
    if instructions["terminal"]:
        take_terminal(instructions["attributes"])
    groups = [int(g) for g in instructions["groups"]]
    os.setgroups(groups)
    drop_capabilities()
    verify_privileges(groups)
    directory = instructions["directory"]
    opened = {directory["path"]: enter(directory)}
    for folder in instructions["folders"]:
        opened[folder["path"]] = verify_place(folder, "folder")
    for path, proof in instructions["closed"]:
        verify_closed(path, proof)
    rules = instructions["landlock"]
    landlock(rules["rules"], rules["required"], opened)
    default_signals()


def main(path: str) -> int:
    try:
        launch = Launch(path)
    except OSError as e:
        sys.stderr.write(f"aa shim: {path}: {e.strerror}\n")
        return NOT_STARTED
    try:
        close_other_descriptors(launch.fileno())
        instructions = launch.receive()
        refuse_streams()
        if launch.receive() != {"go": True}:
            raise Failure("launch", "aa-launch did not give the go-ahead")
        confine(instructions)
        execute(instructions["argv"], instructions["env"])
    except Failure as e:
        failure = e
    except Exception as e:  # whatever it is, the program does not run
        failure = Failure("shim", f"{type(e).__name__}: {e}")
    try:
        launch.tell(failure)
    except OSError:
        sys.stderr.write(f"aa shim: {failure}\n")
    return failure.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
