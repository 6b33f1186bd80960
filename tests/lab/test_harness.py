"""The lab itself: what it boots, what its origins see, and that it leaves nothing on the machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.harness import Container, eventually, sweep
from tests.lab.harness import names
from tests.lab.harness.container import KILLED, REPOSITORY, ROOT_ENVIRONMENT, STATE

PING = """
import os, socket, struct, sys
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
s.sendto(bytes.fromhex('0800f7ff00000000'), (sys.argv[1], 0))
"""
OWNER = """
from tests.lab.harness import Container
box = Container(NAME)
box.up()
print(box.leader, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def box() -> Iterator[Container]:
    with Container(f"{os.getpid()}-harness") as container:
        yield container


def machine_state() -> dict[str, object]:
    """What a lab could leave on the machine. What others do there meanwhile is left out."""
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    namespaces = {p.name for p in Path("/run/netns").glob("*")}
    return {
        "mounts": [line for line in mounts if "aa-lab" in line],
        "links": [name for _, name in socket.if_nameindex() if name.startswith("veth-")],
        "namespaces": namespaces & {"box", "origins"},
        "cgroups": sorted(str(p) for p in Path("/sys/fs/cgroup").glob("**/aa-lab-*")),
        "trust": sorted(p.name for p in Path("/etc/ssl/certs").iterdir()),
        "users": Path("/etc/passwd").read_text(),
        "run": sorted(str(p) for p in Path("/run/systemd").glob("nspawn/*/aa-lab-*")),
    }


def test_boots_a_real_systemd_with_nothing_failed(box: Container) -> None:
    assert box.raw(["cat", "/proc/1/comm"]).out == "systemd\n"
    assert box.systemctl("is-system-running").out == "running\n"
    assert box.raw(["stat", "--file-system", "--format=%T", "/sys/fs/cgroup"]).out == "cgroup2fs\n"


def test_people_have_their_groups(box: Container) -> None:
    groups = set(box.run(["id", "--name", "--groups"], user="dev").out.split())
    assert groups == {"dev", "adm", "sudo", "docker"}
    assert box.run(["id", "--name", "--groups"], user="plain").out.split() == ["plain"]


def test_nothing_of_the_machine_leaks_in(box: Container) -> None:
    environment = box.run("env", user="dev").out
    assert "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n" in environment
    assert not [line for line in environment.splitlines() if "proxy" in line.lower()]
    assert box.raw(["cat", "/etc/resolv.conf"]).out == "nameserver 10.77.0.2\n"
    assert box.raw(["ls", "-A", str(REPOSITORY)]).out == ""


def test_commands_give_output_code_and_deadline(box: Container) -> None:
    done = box.run("cat; echo err >&2; exit 7", input="in")
    assert (done.code, done.out, done.err) == (7, "in", "err\n")
    late = box.run("echo begun; sleep 60", timeout=1.5)
    assert late.code == KILLED and late.seconds < 10
    eventually(lambda: not box.raw(["pgrep", "-x", "sleep"]).ok, what="the late command is gone")


def test_files_go_in_and_out(box: Container) -> None:
    box.push("/srv/deep/file", b"\x00text", mode=0o640, owner="root:dev")
    assert box.pull("/srv/deep/file") == "\x00text"
    assert box.raw(["stat", "--format=%a %G", "/srv/deep/file"]).out == "640 dev\n"


@pytest.mark.parametrize("family", ["-4", "-6"])
def test_origins_answer_with_their_own_certificates(box: Container, family: str) -> None:
    mark = box.origins.mark()
    done = box.run(
        ["curl", "--silent", "--show-error", family, f"https://{names.API}/x"], user="plain"
    )
    assert done.ok, done.err
    requests = box.origins.since(mark, kind="request", host=names.API, path="/x")
    assert [r["sni"] for r in requests] == [names.API]


def test_origins_serve_git(box: Container) -> None:
    done = box.run(
        f"cd $(mktemp -d) && git clone -q https://{names.GIT}/project.git && cat project/README"
    )
    assert done.out == "A repository of the lab.\n", done.err


@pytest.mark.parametrize("transport", ["UDP4", "TCP4", "UDP6", "TCP6"])
def test_origins_echo(box: Container, transport: str) -> None:
    where = f"{transport}:{names.API}:{names.ECHO_PORT}"
    assert box.run(["socat", "-T1", "-", where], input="hello\n", user="plain").out == "hello\n"


def test_origins_see_dns_queries_even_of_names_that_nobody_has(box: Container) -> None:
    mark = box.origins.mark()
    assert not box.run(["getent", "ahosts", "nobody.nowhere.test"], user="plain").ok
    assert {e["name"] for e in box.origins.since(mark, kind="dns")} == {"nobody.nowhere.test"}


@pytest.mark.parametrize("target", [names.ORIGINS_V4, "192.0.2.1", names.METADATA_V4])
def test_origins_see_packets_that_no_server_hears(box: Container, target: str) -> None:
    mark = box.origins.mark()
    box.run(["python3", "-c", PING, target]).check()
    eventually(
        lambda: box.origins.since(mark, kind="packet", protocol=1, target=target), what="a packet"
    )


def test_kernel_interfaces_that_programs_under_test_need_are_open(box: Container) -> None:
    probe = (
        "import ctypes; c = ctypes.CDLL(None); print(c.syscall(444, 0, 0, 1) > 0, "
        "c.syscall(425, 4, ctypes.create_string_buffer(120)) > 0)"
    )
    assert box.run(["python3", "-c", probe], user="plain").out == "True True\n"
    mounted = (
        "mkdir /run/lab-bpf && mount -t bpf bpf /run/lab-bpf && bpftool map create /run/lab-bpf/m"
    )
    created = box.run(f"{mounted} type hash key 4 value 4 entries 1 name m; umount /run/lab-bpf")
    assert created.ok, created.err
    assert box.raw(["test", "-r", "/sys/kernel/btf/vmlinux"]).ok


def test_leaves_nothing_on_the_machine() -> None:
    before = machine_state()
    with Container(f"{os.getpid()}-gone") as box:
        state, leader = box.state, box.leader
        assert state.exists()
    assert not state.exists() and not Path(f"/proc/{leader}").exists()
    assert machine_state() == before


def test_dies_with_its_owner_and_is_swept_later() -> None:
    before = machine_state()
    name = f"{os.getpid()}-orphan"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER.replace("NAME", repr(name))],
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        env=ROOT_ENVIRONMENT,
        text=True,
    )
    assert owner.stdout is not None
    leader = int(owner.stdout.readline())
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    eventually(lambda: not Path(f"/proc/{leader}").exists(), what="the container is dead")
    sweep()  # or another lab that began meanwhile
    assert not (STATE / f"aa-lab-{name}").exists()
    assert machine_state() == before
