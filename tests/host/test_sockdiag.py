"""SOCK_DIAG against the real kernel: the right cgroup for every kind of connection, none for the rest."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from aa.sockdiag import SockDiag, SocketOwner
from tests.host.redirect_lab import PYTHON, cgroup2_root, wait_for

V4, V6 = (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")
FAMILIES = pytest.mark.parametrize(("family", "loopback"), [V4, V6], ids=["v4", "v6"])


@pytest.fixture
def diag() -> Iterator[SockDiag]:
    with SockDiag() as one:
        yield one


@pytest.fixture
def governed() -> Iterator[Path]:
    directory = cgroup2_root() / f"aa-test-{os.getpid()}-sockdiag"
    directory.mkdir()
    yield directory
    (directory / "cgroup.kill").write_text("1")
    for _ in range(500):
        try:
            directory.rmdir()
            return
        except OSError:
            pass
    directory.rmdir()


def start_in(cgroup: Path, script: str, *arguments: str) -> subprocess.Popen[str]:
    join = f'echo $$ >{cgroup}/cgroup.procs; exec "$@"'
    return subprocess.Popen(
        ["bash", "-c", join, "join", PYTHON, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


CLIENT = """
import os, socket, sys
family, address, port, uid = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
os.setuid(uid)
s = socket.socket(family)
s.connect((address, port))
sys.stdin.read()
"""


@FAMILIES
def test_finds_cgroup_and_user_of_the_client_of_a_connection(
    diag: SockDiag, governed: Path, family: int, loopback: str
) -> None:
    with socket.create_server((loopback, 0), family=family) as server:
        here = server.getsockname()[:2]
        client = start_in(governed, CLIENT, str(int(family)), *map(str, here), "1234")
        with client, server.accept()[0] as end:
            there = end.getpeername()[:2]
            found = diag.owner(family, socket.IPPROTO_TCP, there, here)
            accepted = diag.owner(family, socket.IPPROTO_TCP, here, there)
            client.kill()
    assert found is not None and accepted is not None
    assert (found.uid, found.cgroup_id) == (1234, governed.stat().st_ino)
    assert (accepted.uid, accepted.cgroup_id) != (found.uid, found.cgroup_id)


def test_finds_the_client_that_speaks_v4_from_a_v6_socket(diag: SockDiag, governed: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = start_in(
            governed, CLIENT, str(int(socket.AF_INET6)), "::ffff:127.0.0.1", str(port), "0"
        )
        with client, server.accept()[0] as end:
            source = end.getpeername()
            v4 = diag.owner(socket.AF_INET, socket.IPPROTO_TCP, source, ("127.0.0.1", port))
            mapped = diag.owner(
                socket.AF_INET6,
                socket.IPPROTO_TCP,
                (f"::ffff:{source[0]}", source[1]),
                ("::ffff:127.0.0.1", port),
            )
            client.kill()
    assert v4 is not None and v4 == mapped and v4.cgroup_id == governed.stat().st_ino


@FAMILIES
def test_finds_every_client_of_a_destination_whatever_its_port(
    diag: SockDiag, governed: Path, family: int, loopback: str
) -> None:
    with socket.create_server((loopback, 0), family=family) as server:
        here = server.getsockname()[:2]
        client = start_in(governed, CLIENT, str(int(family)), *map(str, here), "1234")
        with client, server.accept()[0], socket.create_connection(here), server.accept()[0]:
            found = diag.connected(family, loopback, here)
            client.kill()
        assert diag.connected(family, loopback, (loopback, 1)) == ()
    assert len(found) == 2
    assert [o.uid for o in found if o.cgroup_id == governed.stat().st_ino] == [1234]


@FAMILIES
def test_a_listener_is_not_taken_for_a_connection(
    diag: SockDiag, family: int, loopback: str
) -> None:
    with socket.create_server((loopback, 0), family=family) as server:
        here = server.getsockname()[:2]
        assert diag.owner(family, socket.IPPROTO_TCP, here, (loopback, 1)) is None


FILL = """
import socket, sys
family, address, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
s = socket.socket(family)
s.connect((address, port))
s.setblocking(False)
try:
    while True:
        s.send(bytes(65536))
except BlockingIOError:
    print("full", flush=True)
sys.stdin.read()
"""
"""Sends until nothing more fits, so that its end stays unsaid after it is gone."""


@FAMILIES
def test_a_client_that_is_gone_keeps_its_cgroup_but_no_user(
    diag: SockDiag, governed: Path, family: int, loopback: str
) -> None:
    """Its bytes still wait to be decided, and its uid would read as root's on many kernels."""
    with socket.create_server((loopback, 0), family=family) as server:
        here = server.getsockname()[:2]
        client = start_in(governed, FILL, str(int(family)), *map(str, here))
        with client, server.accept()[0] as end:
            assert client.stdout is not None and client.stdout.readline() == "full\n"
            client.kill()
            client.wait()
            found = diag.owner(family, socket.IPPROTO_TCP, end.getpeername()[:2], here)
    assert found == SocketOwner(-1, 0, governed.stat().st_ino)


@FAMILIES
def test_a_connection_that_its_client_has_finished_is_nobodys(
    diag: SockDiag, governed: Path, family: int, loopback: str
) -> None:
    """The kernel keeps no cgroup in FIN_WAIT2 and TIME_WAIT; nobody waits for an answer either."""
    with socket.create_server((loopback, 0), family=family) as server:
        here = server.getsockname()[:2]
        client = start_in(governed, CLIENT, str(int(family)), *map(str, here), "1234")
        with client, server.accept()[0] as end:
            source = end.getpeername()[:2]
            before = diag.owner(family, socket.IPPROTO_TCP, source, here)
            client.kill()
            client.wait()
            assert end.recv(1) == b""
            gone = wait_for(lambda: diag.owner(family, socket.IPPROTO_TCP, source, here) is None)
    assert before is not None and gone


UDP = """
import socket, sys
family, address, port, peer = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
s = socket.socket(family, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind((address, port))
if peer:
    s.connect((peer, 53))
print(s.getsockname()[1], flush=True)
sys.stdin.read()
"""


def udp_client(cgroup: Path, family: int, *arguments: str) -> tuple[subprocess.Popen[str], int]:
    client = start_in(cgroup, UDP, str(int(family)), *arguments)
    assert client.stdout is not None
    return client, int(client.stdout.readline())


@FAMILIES
@pytest.mark.parametrize("connected", [False, True], ids=["unconnected", "connected"])
def test_finds_a_udp_sender_by_its_source_alone(
    diag: SockDiag, governed: Path, family: int, loopback: str, connected: bool
) -> None:
    client, port = udp_client(governed, family, "", "0", loopback if connected else "")
    with client:
        found = diag.owner(family, socket.IPPROTO_UDP, (loopback, port), None)
        other = diag.owner(family, socket.IPPROTO_UDP, (loopback, port ^ 1), None)
        client.kill()
    assert found is not None and found.cgroup_id == governed.stat().st_ino
    assert other is None or other.cgroup_id != found.cgroup_id


def test_finds_a_v6_socket_that_sends_v4(diag: SockDiag, governed: Path) -> None:
    client, port = udp_client(governed, socket.AF_INET6, "::", "0", "")
    with client:
        found = diag.owner(socket.AF_INET, socket.IPPROTO_UDP, ("127.0.0.1", port), None)
        client.kill()
    assert found is not None and found.cgroup_id == governed.stat().st_ino


@FAMILIES
def test_a_port_shared_with_another_cgroup_has_no_owner(
    diag: SockDiag, governed: Path, family: int, loopback: str
) -> None:
    client, port = udp_client(governed, family, "", "0", "")
    with client:
        alone = diag.owner(family, socket.IPPROTO_UDP, (loopback, port), None)
        with socket.socket(family, socket.SOCK_DGRAM) as outsider:
            outsider.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            outsider.bind(("", port))
            shared = diag.owner(family, socket.IPPROTO_UDP, (loopback, port), None)
        client.kill()
    assert alone is not None and shared is None


def test_a_question_is_cheap_enough_to_ask_for_each_connection(diag: SockDiag) -> None:
    """Not a measurement: ten thousand answers within a generous time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            ends = client.getsockname(), client.getpeername()
            for _ in range(10_000):
                assert diag.owner(socket.AF_INET, socket.IPPROTO_TCP, *ends)
