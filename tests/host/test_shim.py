"""The shim itself, started as systemd starts it: a step that cannot be taken means that nothing runs."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pwd
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from aa.launch import shim

NOBODY = pwd.getpwnam("nobody")
SETPRIV = [
    "setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={NOBODY.pw_gid}", "--groups=4,27",
    "--bounding-set=-all,+setgid,+setpcap",
]  # fmt: skip
SECONDS = 20


def filter_system_calls() -> None:
    """A filter that allows everything: enough for the shim to see that one is in force."""
    libc = ctypes.CDLL(None, use_errno=True)
    allow = struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)  # BPF_RET | SECCOMP_RET_ALLOW
    text = ctypes.create_string_buffer(allow)
    program = struct.pack("HxxxxxxQ", 1, ctypes.addressof(text))
    if libc.prctl(22, 2, ctypes.c_char_p(program)) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")


@dataclass
class Start:
    """One start of the shim: what it is told, what it says and what its program did."""

    folder: Path
    listener: socket.socket
    instructions: dict[str, Any] = field(default_factory=dict)
    capabilities: str = "+setgid,+setpcap"
    no_new_privileges: bool = True
    seccomp: bool = True
    stdin: int = subprocess.DEVNULL

    @property
    def marker(self) -> Path:
        return self.folder / "work/ran"

    @property
    def argv(self) -> list[str]:
        kept = [f"--{which}-caps=-all,{self.capabilities}" for which in ("inh", "ambient")]
        kept += ["--no-new-privs"] if self.no_new_privileges else []
        program = ["/usr/bin/python3", "-I", "-S", str(self.folder / "shim")]
        return [*SETPRIV, *kept, "--", *program, str(self.folder / "socket")]

    def run(self, *messages: Any) -> tuple[int, dict[str, Any], str]:
        """Exit code, the shim's failure ({} for none), the program's output."""
        process = subprocess.Popen(
            self.argv,
            stdin=self.stdin, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            preexec_fn=filter_system_calls if self.seccomp else None,
            env={"HOSTILE": "1", "PYTHONPATH": "/nowhere"},
        )  # fmt: skip
        self.listener.settimeout(SECONDS)
        connection, _ = self.listener.accept()
        with connection:
            connection.settimeout(SECONDS)
            for message in messages or (self.instructions, {"go": True}):
                connection.sendall(json.dumps(message).encode() + b"\0")
            connection.shutdown(socket.SHUT_WR)
            said = b""
            with contextlib.suppress(ConnectionResetError):  # it left without reading the go-ahead
                while part := connection.recv(65536):
                    said += part
        out, _ = process.communicate(timeout=SECONDS)
        return process.returncode, json.loads(said.strip(b"\0") or b"{}"), out


@pytest.fixture
def start() -> Iterator[Start]:
    folder = Path(tempfile.mkdtemp(dir="/var/lib"))
    folder.chmod(0o755)
    work = folder / "work"
    work.mkdir()
    os.chown(work, NOBODY.pw_uid, NOBODY.pw_gid)
    shutil.copy(shim.__file__, folder / "shim")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    (folder / "socket").chmod(0o666)
    listener.listen()
    status = work.stat()
    yield Start(
        folder,
        listener,
        {
            "argv": ["sh", "-c", "touch ran; cat /proc/self/status; echo end"],
            "env": {"PATH": "/usr/bin:/bin", "ONLY": "this"},
            "directory": {
                "path": str(work),
                "device": status.st_dev,
                "inode": status.st_ino,
                "writable": True,
            },
            "folders": [],
            "closed": [],
            "groups": [],
            "landlock": {
                "rules": [["/", "read"], ["/dev", "device"], [str(work), "write"]],
                "required": True,
            },
            "terminal": False,
            "attributes": None,
        },
    )
    listener.close()
    shutil.rmtree(folder)


def status_of(out: str) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in out.splitlines() if ":\t" in line)


def test_the_program_runs_with_nothing_left(start: Start) -> None:
    code, failure, out = start.run()
    assert (code, failure) == (0, {}) and start.marker.exists()
    status = status_of(out)
    assert status["Groups"].split() == []
    assert {status[n] for n in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"
    # Signals 32 and 33 are the C library's own: nobody may set them, and a test run may inherit them.
    internal = 1 << 31 | 1 << 32
    assert [int(status[n], 16) & ~internal for n in ("SigBlk", "SigIgn")] == [0, 0]


def test_the_environment_is_the_instructions_alone(start: Start) -> None:
    start.instructions["argv"] = ["env"]
    assert sorted(start.run()[2].splitlines()) == ["ONLY=this", "PATH=/usr/bin:/bin"]


def test_only_the_three_streams_are_open(start: Start) -> None:
    start.instructions["argv"] = ["sh", "-c", "ls /proc/self/fd"]
    assert start.run()[2].split() == ["0", "1", "2", "3"]  # 3 is ls reading the folder


def test_groups_of_the_allow_list_are_kept_and_no_others(start: Start) -> None:
    start.instructions["groups"] = [44]
    assert status_of(start.run()[2])["Groups"].split() == ["44"]


def test_the_run_is_confined_to_its_folder(start: Start) -> None:
    start.folder.chmod(0o777)
    start.instructions["argv"] = ["sh", "-c", "touch ../outside; echo $?; touch inside; echo $?"]
    assert start.run()[2].split() == ["1", "0"]


def test_what_is_closed_is_proved_and_what_may_be_missing_is_not_needed(start: Start) -> None:
    (start.folder / "secret").touch(mode=0o600)
    start.instructions["closed"] = [[str(start.folder / "secret"), "closed"]]
    start.instructions["landlock"]["rules"].append(["/missing", "read", True])
    code, failure, _ = start.run()
    assert (code, failure) == (0, {}) and start.marker.exists()


def test_it_is_the_leader_of_its_session_and_owner_of_its_terminal(start: Start) -> None:
    master, slave = os.openpty()
    start.stdin = slave
    start.instructions |= {
        "terminal": True,
        "argv": ["sh", "-c", "exec 3</dev/tty && ps -o tty= -p $$"],
    }
    code, failure, out = start.run()
    name = os.ttyname(slave).removeprefix("/dev/")
    os.close(slave)
    os.close(master)
    assert (code, failure, out.strip()) == (0, {}, name)


def break_inode(s: Start) -> None:
    s.instructions["directory"]["inode"] += 1


def break_path(s: Start) -> None:
    s.instructions["directory"]["path"] += "/missing"


def break_folder(s: Start) -> None:
    s.instructions["folders"] = [{**s.instructions["directory"], "device": 1}]


def break_mount(s: Start) -> None:
    status = os.stat("/proc/sys/kernel")
    s.instructions["folders"] = [
        {"path": "/sys/fs", "device": 0, "inode": None, "writable": True},
        {"path": "/proc/sys/kernel", "device": status.st_dev, "inode": 1, "writable": True},
    ]


def break_capabilities(s: Start) -> None:
    s.capabilities = "+setgid"


def break_setgid(s: Start) -> None:
    s.capabilities = "+setpcap"


def break_no_new_privileges(s: Start) -> None:
    s.no_new_privileges = False


def break_filter(s: Start) -> None:
    s.seccomp = False


def break_rules(s: Start) -> None:
    s.instructions["landlock"]["rules"].append(["/missing", "write"])


def break_optional(s: Start) -> None:
    s.instructions["landlock"]["rules"].append(["/missing", "write", False])


def break_closed(s: Start) -> None:
    s.instructions["closed"] = [[str(s.folder / "shim"), "closed"]]


def break_read_only(s: Start) -> None:
    s.instructions["closed"] = [[str(s.folder / "work"), "read-only"]]


def break_no_exec(s: Start) -> None:
    s.instructions["closed"] = [["/usr/bin/env", "no-exec"]]


def break_gone(s: Start) -> None:
    s.instructions["closed"] = [["/missing", "closed"]]


def break_proof(s: Start) -> None:
    s.instructions["closed"] = [["/usr/bin/env", "somehow"]]


def break_access(s: Start) -> None:
    s.instructions["landlock"]["rules"].append(["/", "everything"])


def break_terminal(s: Start) -> None:
    s.instructions["terminal"] = True


def break_instructions(s: Start) -> None:
    del s.instructions["landlock"]


@pytest.mark.parametrize(
    ("broken", "step"),
    [
        (break_inode, "directory"),
        (break_path, "directory"),
        (break_folder, "folder"),
        (break_mount, "folder"),
        (break_closed, "closed"),
        (break_read_only, "closed"),
        (break_no_exec, "closed"),
        (break_gone, "closed"),
        (break_proof, "shim"),
        (break_optional, "shim"),
        (break_capabilities, "shim"),
        (break_setgid, "shim"),
        (break_no_new_privileges, "privileges"),
        (break_filter, "privileges"),
        (break_rules, "shim"),
        (break_access, "shim"),
        (break_terminal, "terminal"),
        (break_instructions, "shim"),
    ],
)
def test_a_step_that_fails_is_told_and_nothing_runs(
    start: Start, broken: Callable[[Start], None], step: str
) -> None:
    broken(start)
    code, failure, out = start.run()
    assert (code, failure.get("failed"), out) == (125, step, ""), failure
    assert failure["reason"] and not start.marker.exists()


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"go": True}],
        ["instructions"],
        ["instructions", {"go": False}],
        ["instructions", {"go": 1, "x": 2}],
        ["instructions", ["go"]],
        [["no object"]],
    ],
)
def test_without_instructions_and_the_go_ahead_nothing_runs(
    start: Start, messages: list[Any]
) -> None:
    told = [start.instructions if m == "instructions" else m for m in messages]
    code, failure, out = start.run(*(told or [{}, {}]))
    assert (code, out) == (125, "") and failure["code"] == 125
    assert not start.marker.exists()


def test_a_socket_that_came_along_on_a_stream_keeps_the_program_from_running(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as connected:
            start.stdin = connected.fileno()
            code, failure, _ = start.run()
    assert (code, failure["failed"]) == (125, "streams") and "descriptor 0" in failure["reason"]
    assert not start.marker.exists()


def test_a_program_that_is_missing_or_not_executable_has_the_shells_code(start: Start) -> None:
    start.instructions["argv"] = ["no-such-program"]
    code, failure, _ = start.run()
    assert (code, failure["failed"], failure["code"]) == (127, "exec", 127)
    (start.folder / "work/text").write_text("x")
    for argv0 in (f"{start.folder}/work/text", "/etc", "/etc/passwd"):
        start.instructions["argv"] = [argv0]
        code, failure, _ = start.run()
        assert (code, failure["code"]) == (126, 126), failure


def test_a_signal_while_it_waits_ends_it_without_the_program(start: Start) -> None:
    process = subprocess.Popen(
        start.argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    connection, _ = start.listener.accept()
    with connection:
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == -signal.SIGTERM
    assert not start.marker.exists()
