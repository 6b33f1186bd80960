"""What the cgroup guard refuses to proxied runs, each with its permitted twin."""

from __future__ import annotations

import contextlib
import errno
import signal
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from aa.ebpf import events, libbpf
from aa.ebpf.events import Net
from aa.ebpf.loader import AlreadyRunning, Loader, NoPinDirectory, Place, unload
from aa.paths import DNS_PORT, FRONT_PORT
from tests.host.ebpf_world import (
    CLIENT4,
    COMMAND_SECONDS,
    PYTHON,
    ROOT,
    SERVER4,
    SERVER6,
    Recorder,
    World,
    eventually,
    ids,
)

RECEIVE = """
host, port, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
s = socket.socket(AF6 if ":" in host else AF4, TCP if kind == "tcp" else UDP)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind((host, port))
if kind == "tcp":
    s.listen(16)
print("ready")
while True:
    if kind == "tcp":
        c, peer = s.accept()
        c.close()
    else:
        data, peer = s.recvfrom(2000)
    print(peer[0])
"""

COUNT_PACKETS = """
s = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
s.bind((sys.argv[1], 0))
s.settimeout(float(sys.argv[2]))
print("ready")
n = 0
try:
    while True:
        data, where = s.recvfrom(2000)
        # Neighbour discovery and multicast reports are the kernel's own.
        if where[2] != 4 and where[1] in (0x0800, 0x86dd) and not (
            where[1] == 0x86dd and data[6] in (0, 58)):
            n += 1
            print("packet", where, data[:48].hex())
except TimeoutError:
    pass
print("packets:", n)
"""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World.make("g")
    yield world
    world.close()


@pytest.fixture
def loader(world: World) -> Iterator[Loader]:
    loader = world.loader()
    yield loader
    loader.close()


@pytest.fixture
def recorder(loader: Loader) -> Iterator[Recorder]:
    recorder = Recorder(loader)
    recorder.read()
    recorder.events.clear()
    yield recorder
    recorder.close()


def places(world: World) -> dict[str, Path]:
    run = world.run_dir(world.proxied)
    below = run / "sub" / "deeper"
    below.mkdir(parents=True, exist_ok=True)
    return {"run": run, "sub-cgroup": below, "slice itself": world.proxied}


FORBIDDEN_SOCKETS = {
    "raw": (3, 1, errno.EPERM),
    "raw-any": (3, 255, errno.EPERM),
    "ping": (2, 1, errno.EPERM),
    "udplite": (2, 136, errno.EPERM),
    "mptcp": (1, 262, errno.EPROTONOSUPPORT),
}


@pytest.mark.parametrize("where", ["run", "sub-cgroup", "slice itself"])
@pytest.mark.parametrize("name", FORBIDDEN_SOCKETS)
def test_refuses_sockets_that_are_neither_tcp_nor_udp(
    world: World, loader: Loader, name: str, where: str
) -> None:
    kind, protocol, error = FORBIDDEN_SOCKETS[name]
    code = f"print(attempt(socket.socket, AF4, {kind}, {protocol}))"
    cgroup = places(world)[where]
    assert world.python(cgroup, code) == str(error)
    assert world.python(cgroup, "print(attempt(socket.socket, AF4, TCP))") == "0"
    assert world.python(cgroup, "print(attempt(socket.socket, AF6, UDP))") == "0"
    assert world.python(world.outside, code) == "0"
    assert world.python(world.run_dir(world.local), code) == "0"


def test_refuses_v6_ping_and_raw_sockets(world: World, loader: Loader) -> None:
    code = "print(attempt(socket.socket, AF6, UDP, 58), attempt(socket.socket, AF6, 3, 58))"
    assert world.python(places(world)["run"], code) == f"{errno.EPERM} {errno.EPERM}"
    assert world.python(world.outside, code) == "0 0"


def test_sctp_is_refused_or_unknown_to_this_kernel(world: World, loader: Loader) -> None:
    code = "print(attempt(socket.socket, AF4, 1, 132))"
    outside = world.python(world.outside, code)
    inside = world.python(places(world)["run"], code)
    assert inside in (str(errno.EPERM), str(errno.EPROTONOSUPPORT))
    assert outside in ("0", inside)


def test_a_refused_socket_is_told_with_its_run_and_process(
    world: World, recorder: Recorder
) -> None:
    run = places(world)["run"]
    world.python(run, "attempt(socket.socket, AF4, 3, 1)")
    seen = recorder.find(Net, lambda e: e.refused)
    assert seen is not None
    assert seen.key.target == "socket:inet/raw/icmp"
    assert seen.key.cgroup == ids(run)
    assert seen.head.comm == "python3" and seen.head.pid > 0


@pytest.mark.parametrize("where", ["run", "sub-cgroup"])
@pytest.mark.parametrize(
    ("host", "port", "kind"),
    [
        ("127.0.0.1", FRONT_PORT, "tcp"),
        ("::1", FRONT_PORT, "tcp"),
        ("127.0.0.1", DNS_PORT, "udp"),
        ("::1", DNS_PORT, "udp"),
        ("127.0.0.1", DNS_PORT, "tcp"),
        ("127.0.0.1", 8899, "tcp"),
    ],
)
def test_lets_packets_to_the_proxys_own_ends_through(
    world: World, loader: Loader, host: str, port: int, kind: str, where: str
) -> None:
    with world.background(None, RECEIVE, host, str(port), kind, netns=world.client) as server:
        world.python(
            places(world)[where], f"{kind}(sys.argv[1], int(sys.argv[2]))", host, str(port)
        )
        assert server.stdout is not None
        assert server.stdout.readline().strip() == host


@pytest.mark.parametrize("kind", ["tcp", "udp"])
@pytest.mark.parametrize("host", [SERVER4, SERVER6, "127.0.0.1", "::1", "127.0.0.2"])
def test_drops_packets_to_anything_else_and_the_peer_sees_nothing(
    world: World, loader: Loader, recorder: Recorder, host: str, kind: str
) -> None:
    """Other hosts, other loopback services, and the front's port on another address."""
    port = FRONT_PORT if host == "127.0.0.2" else 8855
    netns = world.server if host in (SERVER4, SERVER6) else world.client
    run = places(world)["run"]
    code = f"print(attempt({kind}, sys.argv[1], {port}))"
    with world.background(None, RECEIVE, host, str(port), kind, netns=netns) as server:
        assert world.python(run, code, host) == ("timed out" if kind == "tcp" else "1")
        assert world.python(world.outside, code, host) == "0"
        assert server.stdout is not None
        server.stdout.readline()  # the twin from outside is the first that came
        seen = recorder.find(Net, lambda e: e.refused and e.key.port == port)
        assert seen is not None and seen.key.address == host
        assert seen.key.cgroup == ids(run)


def test_nothing_at_all_reaches_the_wire(world: World, loader: Loader) -> None:
    """Every kind of packet a program can make of TCP and UDP sockets, watched on the other end."""
    code = """
    for host in sys.argv[1:]:
        six = ":" in host
        for port in (53, 80, 443, 8898, 8899, 8853):
            attempt(udp, host, port)
            attempt(tcp, host, port, 0.2)
        s = socket.socket(AF6 if six else AF4, TCP)
        s.settimeout(0.2)
        attempt(s.sendto, b"x", socket.MSG_FASTOPEN, (host, 80))
        s = socket.socket(AF6 if six else AF4, UDP)
        attempt(s.sendto, b"x" * 9000, (host, 8853))  # fragments
    s = socket.socket(AF4, UDP)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    attempt(s.sendto, b"x", ("255.255.255.255", 8853))
    attempt(s.sendto, b"x", ("224.0.0.251", 5353))
    s = socket.socket(AF6, UDP)
    attempt(s.sendto, b"x", ("::ffff:" + sys.argv[1], 8853))
    print("done")
    """
    link = world.client_link.replace("c", "s", 1)
    with world.background(None, COUNT_PACKETS, link, "4.0") as wire:
        assert world.python(places(world)["run"], code, SERVER4, SERVER6) == "done"
        assert wire.stdout is not None
        assert wire.stdout.read().strip() == "packets: 0"
    with world.background(None, COUNT_PACKETS, link, "1.0") as wire:
        world.python(world.outside, "udp(sys.argv[1], 53)", SERVER4)
        assert wire.stdout is not None
        assert not wire.stdout.read().strip().endswith("packets: 0")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_proxys_address_does_not_lead_out_of_another_interface(
    world: World, recorder: Recorder, host: str
) -> None:
    """A socket bound to a link sends loopback addresses to the wire, where anyone may answer."""
    code = """
    s = socket.socket(AF6 if ":" in sys.argv[1] else AF4, UDP)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, sys.argv[2].encode() + b"\\0")
    print(attempt(s.sendto, b"x", (sys.argv[1], 8853)))
    """
    outside = world.python(world.outside, code, host, world.client_link)
    inside = world.python(places(world)["run"], code, host, world.client_link)
    assert inside != "0"
    if outside == "0":  # this kernel routes it; where it does not, there is nothing to refuse
        refused = recorder.find(Net, lambda e: e.refused)
        assert refused is not None
        assert refused.key.reason == events.REFUSED_INTERFACE
    assert world.python(places(world)["run"], code, host, "lo") == "0"


def test_ip_options_are_not_a_way_out(world: World, recorder: Recorder) -> None:
    """Loose source routing names the proxy's address first and another one after it."""
    code = """
    s = socket.socket(AF4, UDP)
    via = bytes([131, 7, 4]) + socket.inet_aton("127.0.0.1") + bytes([0])
    if attempt(s.setsockopt, 0, 4, via):
        s.setsockopt(0, 4, bytes([7, 7, 4, 0, 0, 0, 0, 0]))  # record route
    print(attempt(s.sendto, b"x", ("127.0.0.1", 8853)))
    """
    assert world.python(places(world)["run"], code) == str(errno.EPERM)
    seen = recorder.find(Net, lambda e: e.refused)
    assert seen is not None and seen.key.reason == events.REFUSED_FRAGMENT


JOINS = {
    "ip": "(AF4, 0, 35, socket.inet_aton('239.1.2.3') + socket.inet_aton(sys.argv[1]))",
    "ip-source": "(AF4, 0, 39, b''.join(map(socket.inet_aton,"
    " ('232.1.2.3', sys.argv[1], '10.78.0.2'))))",
    "ip-group": "(AF4, 0, 42, INDEX + bytes(4) + PADDED4)",
    "ipv6": "(AF6, 41, 20, socket.inet_pton(AF6, 'ff15::1:2:3') + INDEX)",
    "ipv6-group": "(AF6, 41, 42, INDEX + bytes(4) + PADDED6)",
}


@pytest.mark.parametrize("name", JOINS)
def test_joins_no_multicast_group(world: World, loader: Loader, name: str) -> None:
    """The kernel reports a membership to the link by itself, with a group that the run chose."""
    code = f"""
    INDEX = socket.if_nametoindex(sys.argv[2]).to_bytes(4, "little")
    PADDED4 = (2).to_bytes(2, "little") + bytes(2) + socket.inet_aton("239.1.2.4") + bytes(120)
    PADDED6 = (10).to_bytes(2, "little") + bytes(6) + socket.inet_pton(AF6, "ff15::9") + bytes(104)
    family, level, option, value = {JOINS[name]}
    s = socket.socket(family, UDP)
    print(attempt(s.setsockopt, level, option, value), attempt(s.setsockopt, 1, 2, 1))
    """
    run = places(world)["run"]
    before = joins_refused(loader, ids(run))
    assert world.python(run, code, CLIENT4, world.client_link) == f"{errno.EPERM} 0"
    assert joins_refused(loader, ids(run)) == before + 1
    assert world.python(world.outside, code, CLIENT4, world.client_link) == "0 0"


def joins_refused(loader: Loader, cgroup: int) -> int:
    tallies = ((events.tally_key(raw), total) for raw, total in loader.tallies().items())
    return sum(
        total
        for key, total in tallies
        if key.cgroup == cgroup and key.target.startswith("multicast:inet")
    )


def test_a_long_socket_option_passes(world: World, loader: Loader) -> None:
    """The kernel copies no more than a page for the guard; the caller must not notice."""
    code = """
    s = socket.socket(AF4, TCP)
    s.setsockopt(6, 13, b"cubic" + bytes(6000))  # TCP_CONGESTION reads as much as it needs
    print(s.getsockopt(6, 13, 16).rstrip(bytes(1)).decode())
    """
    assert world.python(world.outside, code) == "cubic"
    assert world.python(places(world)["run"], code) == "cubic"


def test_a_listener_of_a_run_answers_nobody(world: World, loader: Loader) -> None:
    """Inbound is closed: the SYN/ACK goes by the listener's cgroup and is dropped as well."""
    code = "print(attempt(tcp, sys.argv[1], 8874, 1.5))"
    with world.background(
        places(world)["run"], RECEIVE, CLIENT4, "8874", "tcp", netns=world.client
    ):
        assert world.python(world.outside, code, CLIENT4, netns=world.server) == "timed out"
    with world.background(world.outside, RECEIVE, CLIENT4, "8874", "tcp", netns=world.client):
        assert world.python(world.outside, code, CLIENT4, netns=world.server) == "0"


def test_refusals_are_told_once_a_second_and_counted_always(
    world: World, loader: Loader, recorder: Recorder
) -> None:
    code = """
    s = socket.socket(AF4, UDP)
    print(sum(attempt(s.sendto, b"x", (sys.argv[1], 8860)) == 1 for _ in range(5000)))
    """
    assert world.python(places(world)["run"], code, SERVER4) == "5000"
    seen = recorder.find(Net, lambda e: e.refused)
    assert seen is not None
    told = recorder.count(Net, lambda e: e.refused and e.key.port == 8860)
    assert 1 <= told <= 3
    assert loader.tallies()[seen.raw_key] == 5000


def test_drops_everything_before_the_ends_are_known(world: World, loader: Loader) -> None:
    run = places(world)["run"]
    code = f"print(attempt(udp, '127.0.0.1', {DNS_PORT}))"
    assert world.python(run, code) == "0"
    held = loader.ends
    for key in held:
        libbpf.map_delete(loader.map_fd("aa_ends"), key)
    try:
        assert world.python(run, code) == str(errno.EPERM)
    finally:
        for key in held:
            libbpf.map_update(loader.map_fd("aa_ends"), key, b"\1")
    assert world.python(run, code) == "0"


LOAD_AND_WAIT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from aa.ebpf import tables
from aa.ebpf.loader import Loader, Slices
loader = Loader(pins=Path(sys.argv[2]), objects=Path(sys.argv[3]),
                slices=Slices(Path(sys.argv[4]), sys.argv[5], sys.argv[6]))
loader.open()
loader.load(tables.proxy_ends())
print("loaded", flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def loaded_in_a_process(world: World) -> Iterator[subprocess.Popen[str]]:
    """A loader in a process of its own; killed at the end of the block, if not before."""
    process = subprocess.Popen(
        [
            PYTHON,
            "-c",
            LOAD_AND_WAIT,
            str(ROOT),
            str(world.pins),
            str(ROOT / "probes/build"),
            str(world.root),
            world.slices.agents,
            world.slices.proxy,
        ],
        text=True,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "loaded\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=COMMAND_SECONDS)


def test_guards_on_when_the_loader_is_killed(world: World) -> None:
    with loaded_in_a_process(world) as loading:
        loading.send_signal(signal.SIGKILL)
        loading.wait(COMMAND_SECONDS)
    run = places(world)["run"]
    assert world.python(run, "print(attempt(socket.socket, AF4, 3, 1))") == str(errno.EPERM)
    assert world.python(run, "print(attempt(udp, sys.argv[1], 53))", SERVER4) == str(errno.EPERM)
    assert world.python(run, f"print(attempt(udp, '127.0.0.1', {DNS_PORT}))") == "0"


SEND_ALWAYS = """
import select
s = socket.socket(AF4, UDP)
passed = refused = 0
print("sending")
while not select.select([0], [], [], 0)[0]:
    for _ in range(100):
        if attempt(s.sendto, b"x", (sys.argv[1], 8870)):
            refused += 1
        else:
            passed += 1
print(passed, refused)
"""


def test_no_packet_passes_while_the_loader_is_replaced(world: World) -> None:
    """Killed and started again three times under a sender that never stops."""
    with loaded_in_a_process(world):
        pass
    run = places(world)["run"]
    with world.background(run, SEND_ALWAYS, SERVER4, netns=world.client) as sender:
        for _ in range(3):
            with loaded_in_a_process(world):
                pass
        assert sender.stdin is not None and sender.stdout is not None
        sender.stdin.write("stop\n")
        sender.stdin.flush()
        passed, refused = map(int, sender.stdout.readline().split())
    assert passed == 0
    assert refused > 1000


def test_a_restart_keeps_what_the_maps_hold(world: World, loader: Loader) -> None:
    world.python(places(world)["run"], "attempt(udp, sys.argv[1], 8871)", SERVER4)
    before, ends, config = loader.tallies(), loader.ends, loader.config
    assert any(events.tally_key(k).port == 8871 for k in before)
    loader.close()
    again = world.loader()
    try:
        assert again.tallies() == before
        assert again.ends == ends
        assert again.config.generation == config.generation + 1
        assert again.config.slice == config.slice
        assert [p for place in Place for p in again.problems(place)] == []
    finally:
        again.close()


def test_events_between_two_loaders_are_read_by_the_second(world: World, loader: Loader) -> None:
    loader.close()
    world.python(
        places(world)["run"], "attempt(socket.socket, AF4, 3, 0); attempt(tcp, '::1', 8872)"
    )
    again = world.loader()
    recorder = Recorder(again)
    try:
        assert recorder.find(Net, lambda e: e.key.port == 8872)
    finally:
        recorder.close()
        again.close()


def test_an_overlap_of_two_generations_tells_nothing_twice(world: World, loader: Loader) -> None:
    loader.close()
    again = world.loader()
    recorder = Recorder(again)
    try:
        recorder.read()
        recorder.events.clear()
        world.do(places(world)["run"], "/bin/echo", "once")
        assert recorder.find(events.Exec, lambda e: "once" in e.argv)
        assert recorder.count(events.Exec, lambda e: "once" in e.argv) == 1
    finally:
        recorder.close()
        again.close()


def test_a_slice_that_is_made_again_is_guarded_again(world: World, loader: Loader) -> None:
    before = ids(world.proxied)
    world.remove_slices()
    world.make_slices()
    assert ids(world.proxied) != before
    run = places(world)["run"]
    raw = "print(attempt(socket.socket, AF4, 3, 1))"
    assert world.python(run, raw) == "0", "this test would notice nothing"
    assert loader.problems(Place.PROXY)
    done = loader.refresh()
    assert any("aa_egress attached" in d for d in done)
    assert [p for place in Place for p in loader.problems(place)] == []
    assert loader.refresh() == []
    assert world.python(run, raw) == str(errno.EPERM)
    assert world.python(run, "print(attempt(udp, sys.argv[1], 53))", SERVER4) == str(errno.EPERM)
    recorder = Recorder(loader)
    try:
        world.do(run, "/bin/echo", "again")
        seen = recorder.find(events.Exec, lambda e: "again" in e.argv)
        assert seen is not None and seen.head.cgroup == ids(run)
    finally:
        recorder.close()


def test_two_loaders_do_not_share_the_pins(world: World, loader: Loader) -> None:
    second = Loader(pins=world.pins, slices=world.slices)
    with pytest.raises(AlreadyRunning):
        second.open()


def test_pins_must_be_a_bpffs_of_root_alone(world: World, tmp_path: Path) -> None:
    with pytest.raises(NoPinDirectory, match="no bpffs"):
        Loader(pins=tmp_path, slices=world.slices).open()
    world.pins.chmod(0o755)
    try:
        with pytest.raises(NoPinDirectory, match="open to others"):
            Loader(pins=world.pins, slices=world.slices).open()
    finally:
        world.pins.chmod(0o700)


def test_a_refused_program_leaves_the_others(world: World, tmp_path: Path) -> None:
    """A guard object that this kernel cannot take: observation goes on, and the reason is told."""
    for name in ("observe.bpf.o", "guard_cgroup.bpf.o"):
        (tmp_path / name).write_bytes((ROOT / "probes/build" / name).read_bytes())
    (tmp_path / "guard_cgroup.bpf.o").write_bytes(b"\x7fELF no object")
    loader = Loader(pins=world.pins, objects=tmp_path, slices=world.slices)
    loader.open()
    try:
        loader.load(())
        assert set(loader.refused) == {"aa_egress", "aa_sock_create", "aa_setsockopt"}
        assert loader.problems(Place.TRACEPOINT) == []
        assert loader.problems(Place.PROXY)
    finally:
        loader.close()


def test_unload_takes_everything_out(world: World) -> None:
    world.loader().close()
    run = places(world)["run"]
    raw = "print(attempt(socket.socket, AF4, 3, 1))"
    assert world.python(run, raw) == str(errno.EPERM)
    assert unload(world.pins)
    assert not [p for p in world.pins.iterdir() if p.is_dir()]
    assert eventually(lambda: world.python(run, raw) == "0")


def test_slice_level_is_right_where_paths_begin_elsewhere(world: World) -> None:
    """In a cgroup namespace of its own, as in a container, the loader still finds the depth."""
    code = textwrap.dedent(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        from aa.ebpf import tables
        from aa.ebpf.loader import Loader, Slices
        loader = Loader(pins=Path(sys.argv[2]), objects=Path(sys.argv[3]),
                        slices=Slices(Path(sys.argv[4]), "aa.slice/aa-agents.slice",
                                      "aa.slice/aa-agents.slice/aa-agents-proxy.slice"))
        loader.open()
        loader.load(tables.proxy_ends())
        print(loader.config.level, loader.config.slice)
        """
    )
    script = (
        f"echo $$ > {world.top}/cgroup.procs && exec unshare --cgroup --mount sh -c '"
        f"mount -t cgroup2 cgroup2 /mnt && echo $$ > /mnt/outside/cgroup.procs"
        f' && exec "$@"\' sh "$@"'
    )
    done = subprocess.run(
        [
            "sh",
            "-c",
            script,
            "sh",
            PYTHON,
            "-c",
            code,
            str(ROOT),
            str(world.pins),
            str(ROOT / "probes/build"),
            "/mnt",
        ],
        text=True,
        capture_output=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )
    assert done.stdout.split() == ["3", str(ids(world.agents))], done.stderr
