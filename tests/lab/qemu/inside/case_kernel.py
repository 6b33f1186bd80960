"""The kernel layer on this kernel: every program is taken, and files and plaintext of a run are seen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.lab.guarded import WORK, governed, records, timeline
from tests.lab.harness import Container, eventually
from tests.lab.harness.container import AUTHORITY_INSIDE
from tests.lab.harness.names import API, GIT

PATIENCE = 60  # seconds that a client waits for an answer
SETTLING = 60  # seconds until everything of a run is told
LINGERING = 120  # seconds until what was watched for a run is watched no more
CAP_SYS_ADMIN = 21

FILE_CALLS = Path("/run/agent-assembly/bpf/links/aa_on_file")

NODE = f"""
fetch("https://{API}/by-node").then(r => r.text())
  .catch(e => {{ console.log("error", e.cause || e); process.exit(7); }});
"""
PYTHON = f"""
import urllib.request
urllib.request.urlopen("https://{API}/by-python", timeout={PATIENCE}).read()
"""
CLIENTS = {
    "curl": (
        ["curl", "-sS", "--max-time", str(PATIENCE), f"https://{API}/by-curl?secret=1"],
        f"https://{API}/by-curl",
        "libssl.so.3",
    ),
    "python3": (["/usr/bin/python3", "-c", PYTHON], f"https://{API}/by-python", "libssl.so.3"),
    "node": (
        ["env", f"NODE_EXTRA_CA_CERTS={AUTHORITY_INSIDE}", "node", "-e", NODE],
        f"https://{API}/by-node",
        "",  # its own, or the system's, as this Debian builds it
    ),
    "git": (
        ["git", "ls-remote", "-q", f"https://{GIT}/project.git"],
        f"https://{GIT}/project.git/info/refs",
        "libgnutls.so.30",
    ),
}

CALLS = """
import os, sys
os.chdir(sys.argv[1])
with open("made", "w") as f:
    f.write("x")
with open("made", "a") as f:
    f.write("x")
os.symlink("made", "link")
with open("link", "r+"):
    pass
os.rename("made", "moved")
os.mkdir("folder")
os.rmdir("folder")
os.unlink("moved")
os.unlink("link")
for attempt in (lambda: open("/etc/lab-made", "w"), lambda: os.unlink("nothing")):
    try:
        attempt()
    except OSError:
        pass
print(os.environ["AA_RUN"])
"""


def ebpf(box: Container) -> dict[str, Any]:
    """What the kernel layer says of itself."""
    status = json.loads(box.raw(["aasm", "status", "--json"]).check().out)
    (component,) = (c for c in status["components"] if c["name"] == "ebpf")
    details: dict[str, Any] = component["details"]
    return details


def test_every_program_is_taken_and_proved(guarded: Container) -> None:
    eventually(lambda: ebpf(guarded)["rung"] == "cgroup", timeout=SETTLING)
    told = ebpf(guarded)
    assert told["refused_programs"] == {} and told["problems"] == [], told


def test_the_service_keeps_no_capability_that_this_kernel_does_not_ask_for(
    guarded: Container,
) -> None:
    pid = guarded.show("aa-ebpf.service", "MainPID")["MainPID"]
    status = Path(f"/proc/{pid}/status").read_text()
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    wanted = os.environ["LAB_SUITE"] == "bookworm"  # probes in libraries before Linux 6.6
    assert bool(effective >> CAP_SYS_ADMIN & 1) is wanted


def test_each_file_call_is_told_with_its_result(guarded: Container) -> None:
    run = governed(guarded, ["/usr/bin/python3", "-c", CALLS, WORK], agent="both").check().out
    run = run.strip()

    def files() -> list[tuple[str, str, Any, Any, bool]]:
        return [
            (
                r["kind"].removeprefix("file."),
                r["target"].removeprefix(f"{WORK}/"),
                r["attributes"].get("access") or r["attributes"].get("to", ""),
                r["attributes"].get("error", ""),
                r["attributes"]["exact"],
            )
            for r in timeline(guarded, run)
            if r["kind"].startswith("file.") and r["attributes"].get("comm") == "python3"
        ]

    wanted = [
        ("open", "made", "create", "", True),
        ("open", "made", "write", "", True),
        ("open", "link", "create", "", False),
        ("open", "made", "write", "", True),  # through the link
        ("rename", "made", f"{WORK}/moved", "", False),
        ("open", "folder", "create", "", False),
        ("unlink", "folder", "", "", False),
        ("unlink", "moved", "", "", False),
        ("unlink", "link", "", "", False),
        ("open", "/etc/lab-made", "create", "EROFS", False),  # the sandbox's
        ("unlink", "nothing", "", "ENOENT", False),
    ]
    merged = [wanted[0], wanted[1], wanted[2], *wanted[4:]]  # equal ones in a moment are one
    eventually(lambda: files() in (wanted, merged), timeout=SETTLING, what=f"{wanted}: {files()}")


@pytest.mark.parametrize("client", CLIENTS)
def test_plaintext_is_seen_at_the_library(guarded: Container, client: str) -> None:
    argv, target, library = CLIENTS[client]
    script = 'echo "$AA_RUN"; "$@"; sleep 3'
    done = governed(guarded, ["sh", "-c", script, "sh", *argv], agent="both", timeout=300)
    run = done.check().out.splitlines()[0]

    def seen() -> list[dict[str, Any]]:
        found = records(guarded, run=run, kind="http.request", target=target)
        return [r for r in found if r["layer"] == "kernel"]

    eventually(seen, timeout=SETTLING, what=f"{target}: {records(guarded, run=run)}")
    about = seen()[0]["attributes"]
    assert about["decided"] is True
    assert Path(about["library"]).name.startswith(library)
    assert about["bytes_out"] > 0 and "secret" not in json.dumps(seen())


def test_a_request_under_another_name_raises_an_alert(guarded: Container) -> None:
    front = f"curl -sS --max-time {PATIENCE} -H 'Host: hidden.test' https://{API}/fronted"
    script = f"echo $AA_RUN; {front} >/dev/null; sleep 3"
    run = governed(guarded, script, agent="both", timeout=300).check().out.strip()
    eventually(lambda: records(guarded, run=run, type="alert"), timeout=SETTLING)
    (alert,) = records(guarded, run=run, type="alert")
    assert "hidden.test" in alert["reason"]


def test_file_calls_are_watched_while_a_run_lives_only(guarded: Container) -> None:
    governed(guarded, "true", agent="both").check()
    eventually(lambda: not FILE_CALLS.exists(), timeout=LINGERING)
    argv = ["aasm", "run", "--agent", "both", "--", "sleep", "600"]
    living = guarded.popen(argv, user="dev", cwd=WORK)
    try:
        eventually(FILE_CALLS.exists, timeout=SETTLING)
    finally:
        living.terminate()
        living.wait(SETTLING)
