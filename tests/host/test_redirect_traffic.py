"""What the rules do to real packets: governed ones to the proxy or to nothing, all others untouched."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.host.redirect_lab import (
    CLIENT4,
    CLIENT6,
    CONNECT,
    LISTEN,
    PEER4,
    PEER6,
    PYTHON,
    REPOSITORY,
    Gateway,
    Lab,
    Listener,
    original,
    run_json,
    stop,
    wait_for,
)

RUN = "0001"
UID = 4000
_ports = itertools.count(20000)


@dataclass
class Host:
    """A lab with the rules in force and a listener on each of the proxy's ends."""

    lab: Lab
    gateway: Gateway
    ends: dict[tuple[str, str, int], Listener]

    def end(self, family: str, kind: str, port: int) -> Listener:
        return self.ends[(family, kind, port)]

    def exchange(self, *to: Any, governed: bool, family: str, kind: str) -> dict[str, Any]:
        """One exchange with `to`, by a run or by the same user outside of any."""
        argv = (PYTHON, "-c", CONNECT, family, kind, *(str(x) for x in to), "hello")
        if governed:
            done = self.lab.governed(RUN, *argv, uid=UID)
        else:
            done = self.lab.run("setpriv", f"--reuid={UID}", "--clear-groups", *argv)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def refused(self, target: str) -> list[dict[str, Any]]:
        return [r for r in self.gateway.refusals() if r["target"] == target]


LOOPBACK = {"AF_INET": "127.0.0.1", "AF_INET6": "::1"}
ENDS = [
    (family, kind, port)
    for family in LOOPBACK
    for kind, port in (("SOCK_STREAM", 8898), ("SOCK_STREAM", 8853), ("SOCK_DGRAM", 8853))
] + [("AF_INET", "SOCK_STREAM", 8899)]


@pytest.fixture(scope="module", params=["nft", "legacy"])
def host(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Host]:
    log: Path = tmp_path_factory.mktemp("redirect") / "log"
    with Lab(request.param) as lab, Gateway(lab.path("/run/agent-assembly/enforce")) as gateway:
        daemon = lab.daemon(log=log)
        gateway.set_run(run_json(lab, RUN, state="starting", uid=UID))
        assert wait_for(lambda: gateway.confirmed), log.read_text()
        assert gateway.confirmed[0]["ok"], gateway.confirmed
        gateway.set_run(run_json(lab, RUN, state="running", uid=UID))
        backend = {"nft": "nf_tables", "legacy": "legacy"}[request.param]
        assert wait_for(lambda: gateway.status)
        assert gateway.status["details"]["backend"] == backend
        ends = {
            (family, kind, port): Listener(
                lab.start(PYTHON, "-c", LISTEN, family, kind, LOOPBACK[family], str(port))
            )
            for family, kind, port in ENDS
        }
        yield Host(lab, gateway, ends)
        assert stop(daemon) == 0, log.read_text()


@pytest.fixture(params=["AF_INET", "AF_INET6"], ids=["v4", "v6"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def peer(family: str) -> str:
    return PEER4 if family == "AF_INET" else PEER6


def client(family: str) -> str:
    return CLIENT4 if family == "AF_INET" else CLIENT6


def bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def listen_at_peer(host: Host, family: str, kind: str, port: int) -> Listener:
    return Listener(
        host.lab.start_peer(PYTHON, "-c", LISTEN, family, kind, peer(family), str(port))
    )


def test_tcp_of_a_run_goes_to_the_front_with_its_original_destination(
    host: Host, family: str
) -> None:
    port, front = next(_ports), host.end(family, "SOCK_STREAM", 8898)
    origin, before = listen_at_peer(host, family, "SOCK_STREAM", port), len(front.told(0))
    answer = host.exchange(peer(family), port, governed=True, family=family, kind="SOCK_STREAM")
    assert answer["answer"] == "here"
    told = front.told(before + 1)[before:]
    assert [original(t) for t in told] == [(peer(family), port)]
    assert origin.told(1, seconds=0.3) == []
    outside = host.exchange(peer(family), port, governed=False, family=family, kind="SOCK_STREAM")
    assert outside["answer"] == "here" and len(origin.told(1)) == 1
    assert len(front.told(before + 2, seconds=0.3)) == before + 1


WHOSE = """
import json, socket, sys
from aa.sockdiag import SockDiag
family, kind, address, port, original, original_port = sys.argv[1:7]
family = getattr(socket, family)
diag = SockDiag()
s = socket.socket(family, getattr(socket, kind))
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind((address, int(port)))
if kind == "SOCK_STREAM":
    s.listen()
print("listening", flush=True)
if kind == "SOCK_STREAM":
    c, peer = s.accept()
    owner = diag.owner(family, socket.IPPROTO_TCP, peer[:2], (original, int(original_port)))
else:
    data, peer = s.recvfrom(100)
    owner = diag.owner(family, socket.IPPROTO_UDP, peer[:2], None)
print(json.dumps([owner.uid, owner.cgroup_id] if owner else None), flush=True)
"""


@pytest.mark.parametrize(
    ("kind", "port"), [("SOCK_STREAM", 443), ("SOCK_DGRAM", 53)], ids=["tcp", "udp"]
)
def test_the_proxy_sees_whose_connection_was_redirected(
    host: Host, family: str, kind: str, port: int
) -> None:
    """With a proxy on other ports, in a lab where the first one's are taken."""
    front, dns = next(_ports), next(_ports)
    with Lab(host.lab.backend) as lab:
        configure(lab, front_port=front, dns_port=dns)
        log = lab.path("/run/log")
        with Gateway(lab.path("/run/agent-assembly/enforce")) as gateway:
            daemon = lab.daemon(log=log)
            gateway.set_run(run_json(lab, RUN, state="starting", uid=UID))
            assert wait_for(lambda: gateway.confirmed), log.read_text()
            end = front if kind == "SOCK_STREAM" else dns
            asked = (family, kind, LOOPBACK[family], str(end), peer(family), str(port))
            proxy = lab.start(PYTHON, "-c", WHOSE, *asked, env={"PYTHONPATH": str(REPOSITORY)})
            assert proxy.stdout is not None and proxy.stdout.readline() == "listening\n"
            argv = (PYTHON, "-c", CONNECT, family, kind, peer(family), str(port), "hello")
            asking = lab.start_governed(RUN, *argv, uid=UID)
            whose = json.loads(proxy.stdout.readline())
            asking.kill()
            assert whose == [UID, lab.make_run(RUN).stat().st_ino]
            assert stop(daemon) == 0


def configure(lab: Lab, **listen: int) -> None:
    """Writes the lab's own agent-assembly.toml."""
    lines = [f"{key} = {value}\n" for key, value in listen.items()]
    lab.config().write_text("[listen]\n" + "".join(lines))


@pytest.mark.parametrize("kind", ["SOCK_DGRAM", "SOCK_STREAM"], ids=["udp", "tcp"])
def test_dns_of_a_run_goes_to_the_forwarder(host: Host, family: str, kind: str) -> None:
    forwarder = host.end(family, kind, 8853)
    resolver, before = listen_at_peer(host, family, kind, 53), len(forwarder.told(0))
    answer = host.exchange(peer(family), 53, governed=True, family=family, kind=kind)
    assert answer["answer"] == "here" and len(forwarder.told(before + 1)) == before + 1
    assert resolver.told(1, seconds=0.3) == []
    outside = host.exchange(peer(family), 53, governed=False, family=family, kind=kind)
    assert outside["answer"] == "here" and len(resolver.told(1)) == 1


def test_dns_to_a_resolver_on_loopback_goes_to_the_forwarder(host: Host) -> None:
    forwarder = host.end("AF_INET", "SOCK_DGRAM", 8853)
    before = len(forwarder.told(0))
    answer = host.exchange("127.0.0.53", 53, governed=True, family="AF_INET", kind="SOCK_DGRAM")
    assert answer["answer"] == "here" and len(forwarder.told(before + 1)) == before + 1


@pytest.mark.parametrize("port", [443, 9999])
def test_udp_of_a_run_is_refused_and_recorded(host: Host, family: str, port: int) -> None:
    origin = listen_at_peer(host, family, "SOCK_DGRAM", port)
    answer = host.exchange(peer(family), port, governed=True, family=family, kind="SOCK_DGRAM")
    assert answer == {"error": "PermissionError", "errno": 1}
    target = f"{bracketed(peer(family))}:{port}/udp"
    assert wait_for(lambda: host.refused(target))
    record = host.refused(target)[0]
    assert (record["run"], record["effect"], record["rule"]) == (RUN, "deny", "<redirect>")
    assert record["attributes"]["uid"] == UID
    assert record["attributes"]["identity"] in ("cgroup", "uid")
    assert ("QUIC" in record["reason"]) == (port == 443)
    assert origin.told(1, seconds=0.3) == []
    outside = host.exchange(peer(family), port, governed=False, family=family, kind="SOCK_DGRAM")
    assert outside["answer"] == "here" and len(origin.told(1)) == 1
    assert len(host.refused(target)) == 1


def test_a_udp_socket_that_stays_open_is_known_by_its_cgroup(host: Host, family: str) -> None:
    keep = (
        "import socket, sys\ns = socket.socket(getattr(socket, sys.argv[1]), socket.SOCK_DGRAM)\n"
    )
    keep += "try: s.sendto(b'x', (sys.argv[2], int(sys.argv[3])))\nexcept OSError: pass\n"
    keep += "sys.stdin.read()\n"
    port = next(_ports)
    sender = host.lab.start_governed(
        RUN, PYTHON, "-c", keep, family, peer(family), str(port), uid=UID
    )
    target = f"{bracketed(peer(family))}:{port}/udp"
    assert wait_for(lambda: host.refused(target))
    sender.kill()
    assert host.refused(target)[0]["attributes"]["identity"] == "cgroup"


PACKETS = """
import json, socket, sys
family, protocol, address = getattr(socket, sys.argv[1]), int(sys.argv[2]), sys.argv[3]
s = socket.socket(family, socket.SOCK_RAW, protocol)
s.settimeout(1)
try:
    for _ in range(2):
        s.sendto(bytes([8 if family == socket.AF_INET else 128, 0]) + bytes(30), (address, 0))
    print(json.dumps("sent"))
except OSError as e:
    print(json.dumps(e.errno))
"""
SNIFF = """
import socket, sys
s = socket.socket(getattr(socket, sys.argv[1]), socket.SOCK_RAW, int(sys.argv[2]))
s.settimeout(float(sys.argv[3]))
print("listening", flush=True)
try:
    s.recvfrom(100)
    print("seen", flush=True)
except TimeoutError:
    print("nothing", flush=True)
"""


@pytest.mark.parametrize("protocol", ["icmp", "sctp", "unassigned"])
def test_icmp_and_other_protocols_of_a_run_are_refused_and_recorded(
    host: Host, family: str, protocol: str
) -> None:
    """By a raw socket, which only root may make: the rules hold for root's runs too."""
    icmp = ("1", "icmp") if family == "AF_INET" else ("58", "icmp6")
    number, word = {"icmp": icmp, "sctp": ("132", "sctp"), "unassigned": ("253", "253")}[protocol]
    send = (PYTHON, "-c", PACKETS, family, number, peer(family))
    sniffer = host.lab.start_peer(PYTHON, "-c", SNIFF, family, number, "0.4")
    assert sniffer.stdout is not None and sniffer.stdout.readline() == "listening\n"
    host.lab.governed(RUN, *send)
    # v6 neighbours speak ICMPv6 to each other whatever a run does
    assert protocol == "icmp" or sniffer.stdout.readline() == "nothing\n"
    assert wait_for(lambda: host.refused(f"{peer(family)}/{word}"))
    sniffer = host.lab.start_peer(PYTHON, "-c", SNIFF, family, number, "3")
    assert sniffer.stdout is not None and sniffer.stdout.readline() == "listening\n"
    assert json.loads(host.lab.run(*send).stdout) == "sent"
    assert sniffer.stdout.readline() == "seen\n"


def test_a_ping_reaches_the_peer_from_outside_a_run_only(host: Host, family: str) -> None:
    ping = ("ping", "-c1", "-W1", "-n", peer(family))
    assert host.lab.run(*ping, check=False).returncode == 0
    assert host.lab.governed(RUN, *ping, check=False).returncode != 0


def test_the_explicit_proxy_is_reached_as_it_is(host: Host) -> None:
    explicit = host.end("AF_INET", "SOCK_STREAM", 8899)
    for governed in (True, False):
        before = len(explicit.told(0))
        kind = {"family": "AF_INET", "kind": "SOCK_STREAM"}
        answer = host.exchange("127.0.0.1", 8899, governed=governed, **kind)
        assert answer["answer"] == "here" and len(explicit.told(before + 1)) == before + 1


def test_listeners_of_others_on_loopback_are_decided_too(host: Host, family: str) -> None:
    port, front = next(_ports), host.end(family, "SOCK_STREAM", 8898)
    other = Listener(
        host.lab.start(PYTHON, "-c", LISTEN, family, "SOCK_STREAM", LOOPBACK[family], str(port))
    )
    before, to = len(front.told(0)), (LOOPBACK[family], port)
    host.exchange(*to, governed=True, family=family, kind="SOCK_STREAM")
    assert original(front.told(before + 1)[before]) == to
    assert other.told(1, seconds=0.3) == []
    host.exchange(*to, governed=False, family=family, kind="SOCK_STREAM")
    assert len(other.told(1)) == 1


def test_udp_listeners_on_loopback_are_closed(host: Host, family: str) -> None:
    port = next(_ports)
    other = Listener(
        host.lab.start(PYTHON, "-c", LISTEN, family, "SOCK_DGRAM", LOOPBACK[family], str(port))
    )
    kind = {"family": family, "kind": "SOCK_DGRAM"}
    assert "error" in host.exchange(LOOPBACK[family], port, governed=True, **kind)
    assert other.told(1, seconds=0.3) == []
    assert host.exchange(LOOPBACK[family], port, governed=False, **kind)["answer"] == "here"


def test_v4_through_a_v6_socket_goes_to_the_front(host: Host) -> None:
    port, front = next(_ports), host.end("AF_INET", "SOCK_STREAM", 8898)
    origin, before = listen_at_peer(host, "AF_INET", "SOCK_STREAM", port), len(front.told(0))
    mapped = (f"::ffff:{PEER4}", port)
    host.exchange(*mapped, governed=True, family="AF_INET6", kind="SOCK_STREAM")
    assert original(front.told(before + 1)[before]) == (PEER4, port)
    assert origin.told(1, seconds=0.3) == []
    host.exchange(*mapped, governed=False, family="AF_INET6", kind="SOCK_STREAM")
    assert len(origin.told(1)) == 1


FAST_OPEN = """
import socket, struct, sys
MSG_FASTOPEN, TCP_FASTOPEN_NO_COOKIE = 0x20000000, 34
s = socket.socket()
s.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE, 1)
for timeout in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
    s.setsockopt(socket.SOL_SOCKET, timeout, struct.pack("ll", 2, 0))
s.sendto(b"early", MSG_FASTOPEN, (sys.argv[1], int(sys.argv[2])))
print(s.recv(9))
"""
"""Puts its first bytes into the very first packet."""


def test_tcp_fast_open_carries_nothing_past_the_front(host: Host) -> None:
    port, front = next(_ports), host.end("AF_INET", "SOCK_STREAM", 8898)
    origin, before = listen_at_peer(host, "AF_INET", "SOCK_STREAM", port), len(front.told(0))
    host.lab.governed(RUN, PYTHON, "-c", FAST_OPEN, PEER4, str(port), uid=UID)
    assert original(front.told(before + 1)[before]) == (PEER4, port)
    assert origin.told(1, seconds=0.3) == []
    host.lab.run(PYTHON, "-c", FAST_OPEN, PEER4, str(port))
    assert len(origin.told(1)) == 1


SERVE_ONE = """
import socket, sys
family, address, port = getattr(socket, sys.argv[1]), sys.argv[2], int(sys.argv[3])
s = socket.socket(family)
s.bind((address, port))
s.listen()
s.settimeout(3)
print("listening", flush=True)
try:
    c, _ = s.accept()
    c.settimeout(1)
    c.sendall(b"secret")
    print(c.recv(100).decode() or "closed", flush=True)
except OSError as e:
    print(type(e).__name__, flush=True)
"""
KNOCK = """
import socket, sys, time
try:
    s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 1)
    time.sleep(0.2)
    s.settimeout(1)
    try:
        s.sendall(b"order")
    finally:
        print(s.recv(100).decode() or "closed", flush=True)
except OSError as e:
    print(type(e).__name__, flush=True)
"""


@pytest.mark.parametrize("whence", ["peer", "loopback"])
def test_a_listener_of_a_run_neither_hears_nor_answers(
    host: Host, family: str, whence: str
) -> None:
    address = client(family) if whence == "peer" else LOOPBACK[family]
    told = {}
    for governed in (True, False):
        port = str(next(_ports))
        argv = (PYTHON, "-c", SERVE_ONE, family, address, port)
        start = host.lab.start_governed(RUN, *argv, uid=UID) if governed else host.lab.start(*argv)
        assert start.stdout is not None and start.stdout.readline() == "listening\n"
        knock = host.lab.run_peer if whence == "peer" else host.lab.run
        answer = knock(PYTHON, "-c", KNOCK, address, port).stdout.strip()
        told[governed] = (start.stdout.readline().strip(), answer)
    assert "order" not in told[True][0] and "secret" not in told[True][1]
    assert told[False] == ("order", "secret")
    assert wait_for(lambda: any(r["type"] == "refusal" for r in host.gateway.reports))


def test_a_run_cannot_answer_a_datagram_from_outside(host: Host, family: str) -> None:
    for governed in (True, False):
        port = str(next(_ports))
        argv = (PYTHON, "-c", LISTEN, family, "SOCK_DGRAM", client(family), port)
        Listener(
            host.lab.start_governed(RUN, *argv, uid=UID) if governed else host.lab.start(*argv)
        )
        knock = (PYTHON, "-c", CONNECT, family, "SOCK_DGRAM", client(family), port, "hello")
        answer = json.loads(host.lab.run_peer(*knock).stdout)
        assert ("answer" in answer) != governed


HOLD = """
import socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)
print("connected", flush=True)
sys.stdin.readline()
try:
    s.settimeout(5)
    s.sendall(b"late")
    print(s.recv(100).decode() or "closed", flush=True)
except OSError as e:
    print(type(e).__name__, flush=True)
"""


@pytest.mark.parametrize("backend", ["nft", "legacy"])
@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
def test_a_connection_older_than_the_rules_is_cut(
    backend: str, family: str, tracked: bool, tmp_path: Path
) -> None:
    """Whether the kernel has followed the connection from its beginning or not."""
    with Lab(backend) as lab, Gateway(lab.path("/run/agent-assembly/enforce")) as gateway:
        if tracked:
            for tool in ("iptables", "ip6tables"):
                lab.run(tool, "-A", "INPUT", "-m", "conntrack", "--ctstate", "ESTABLISHED")
        lab.make_run(RUN)
        held, origins = {}, {}
        for governed in (True, False):
            port = str(next(_ports))
            argv = (PYTHON, "-c", LISTEN, family, "SOCK_STREAM", peer(family), port)
            origins[governed] = Listener(lab.start_peer(*argv))
            argv = (PYTHON, "-c", HOLD, peer(family), port)
            start = lab.start_governed(RUN, *argv) if governed else lab.start(*argv)
            assert start.stdout is not None and start.stdout.readline() == "connected\n"
            held[governed] = start
        lab.daemon(log=tmp_path / "log")
        gateway.set_run(run_json(lab, RUN, state="starting"))
        assert wait_for(lambda: gateway.confirmed), (tmp_path / "log").read_text()
        answers = {}
        for governed, process in held.items():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            answers[governed] = process.stdout.readline().strip()
        assert answers == {True: "ConnectionResetError", False: "here"}
        assert "late" not in json.dumps(origins[True].told(1, seconds=0.3))
        assert wait_for(gateway.refusals)
        record = gateway.refusals()[0]
        assert record["attributes"]["protocol"] == "tcp" and record["run"] == RUN


def test_without_a_proxy_connections_are_refused(family: str, tmp_path: Path) -> None:
    with Lab() as lab, Gateway(lab.path("/run/agent-assembly/enforce")) as gateway:
        lab.daemon(log=tmp_path / "log")
        gateway.set_run(run_json(lab, RUN, state="starting"))
        assert wait_for(lambda: gateway.confirmed), (tmp_path / "log").read_text()
        port = str(next(_ports))
        argv = (PYTHON, "-c", LISTEN, family, "SOCK_STREAM", peer(family), port)
        origin = Listener(lab.start_peer(*argv))
        argv = (PYTHON, "-c", CONNECT, family, "SOCK_STREAM", peer(family), port, "hello")
        assert json.loads(lab.governed(RUN, *argv).stdout)["error"] == "ConnectionRefusedError"
        assert origin.told(1, seconds=0.3) == []
        assert json.loads(lab.run(*argv).stdout)["answer"] == "here"


def test_without_v6_on_loopback_v6_is_closed_and_v4_works(tmp_path: Path) -> None:
    with Lab() as lab, Gateway(lab.path("/run/agent-assembly/enforce")) as gateway:
        lab.run("ip", "-6", "addr", "del", "::1/128", "dev", "lo")
        lab.daemon(log=tmp_path / "log")
        gateway.set_run(run_json(lab, RUN, state="starting"))
        assert wait_for(lambda: gateway.confirmed), (tmp_path / "log").read_text()
        assert gateway.confirmed[0]["ok"]
        front = Listener(
            lab.start(PYTHON, "-c", LISTEN, "AF_INET", "SOCK_STREAM", "127.0.0.1", "8898")
        )
        for family, governed, reached in (
            ("AF_INET", True, "front"),
            ("AF_INET6", True, "nothing"),
            ("AF_INET6", False, "origin"),
        ):
            port = str(next(_ports))
            argv = (PYTHON, "-c", LISTEN, family, "SOCK_STREAM", peer(family), port)
            origin = Listener(lab.start_peer(*argv))
            argv = (PYTHON, "-c", CONNECT, family, "SOCK_STREAM", peer(family), port, "hello")
            done = lab.governed(RUN, *argv) if governed else lab.run(*argv)
            assert ("answer" in json.loads(done.stdout)) == (reached != "nothing")
            assert bool(origin.told(1, seconds=0.3)) == (reached == "origin")
        assert len(front.told(1)) == 1
