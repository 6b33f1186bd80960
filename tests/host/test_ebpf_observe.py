"""What is seen of governed programs, and that nothing is seen of others."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from aa.ebpf import events
from aa.ebpf.events import Exec, Exit, Net
from aa.ebpf.loader import Loader
from tests.host.ebpf_world import SERVER4, SERVER6, Recorder, World, ids, sh

LISTEN = """
host, port = sys.argv[1], int(sys.argv[2])
s = socket.socket(AF6 if ":" in host else AF4, TCP)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.setsockopt(socket.IPPROTO_TCP, 23, 16)  # TCP_FASTOPEN
s.bind((host, port))
s.listen(16)
print("listening")
while True:
    c, _ = s.accept()
    c.recv(100)
    c.close()
"""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World.make("o")
    yield world
    world.close()


@pytest.fixture(scope="module")
def loader(world: World) -> Iterator[Loader]:
    loader = world.loader()
    assert not loader.refused
    yield loader
    loader.close()


@pytest.fixture
def recorder(loader: Loader) -> Iterator[Recorder]:
    recorder = Recorder(loader)
    recorder.read()
    recorder.events.clear()
    yield recorder
    recorder.close()


def test_sees_exec_of_a_governed_program_with_its_arguments(
    world: World, recorder: Recorder
) -> None:
    run = world.run_dir(world.local)
    world.do(run, "/bin/echo", "one", "", "zwei drei", "ünï")
    seen = recorder.find(Exec, lambda e: e.filename == "/bin/echo")
    assert seen is not None
    assert seen.argv == ("/bin/echo", "one", "", "zwei drei", "ünï")
    assert seen.exe == "/usr/bin/echo"
    assert seen.argv_complete
    assert seen.head.cgroup == ids(run)
    assert seen.head.uid == 0
    assert seen.head.pid > 0 and seen.head.ppid > 0


def test_sees_nothing_of_an_ungoverned_program(world: World, recorder: Recorder) -> None:
    world.do(world.outside, "/bin/echo", "outside")
    world.python(world.outside, "udp('127.0.0.1', 9); attempt(tcp, '127.0.0.1', 9)")
    run = world.run_dir(world.local)
    world.do(run, "/bin/echo", "inside")
    assert recorder.find(Exec, lambda e: "inside" in e.argv)
    assert {e.head.cgroup for e in recorder.read()} == {ids(run)}


def test_a_program_in_a_sub_cgroup_belongs_to_its_run(world: World, recorder: Recorder) -> None:
    run = world.run_dir(world.local)
    below = run / "a" / "b"
    below.mkdir(parents=True, exist_ok=True)
    world.do(below, "/bin/echo", "deep")
    seen = recorder.find(Exec, lambda e: "deep" in e.argv)
    assert seen is not None and seen.head.cgroup == ids(run)


def test_relative_program_and_script_become_absolute(
    world: World, recorder: Recorder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    script = tmp_path_factory.mktemp("x") / "tool"
    script.write_text("#!/bin/sh\n:\n")
    script.chmod(0o755)
    run = world.run_dir(world.local)
    world.do(run, "/bin/sh", "-c", f"cd {script.parent}; ./tool; true")
    seen = recorder.find(Exec, lambda e: e.filename == str(script))
    assert seen is not None
    assert seen.exe == "/usr/bin/dash"
    assert seen.argv == ("/bin/sh", "./tool")


def test_long_arguments_are_cut_and_say_so(world: World, recorder: Recorder) -> None:
    run = world.run_dir(world.local)
    world.do(run, "/bin/echo", "x" * 3000, "last")
    seen = recorder.find(Exec, lambda e: e.filename == "/bin/echo")
    assert seen is not None and not seen.argv_complete
    assert seen.argc == 3
    assert sum(len(a) + 1 for a in seen.argv) - 1 <= events.ARGV_MAX
    assert seen.argv[1].startswith("xxx")


@pytest.mark.parametrize(
    ("code", "status", "signal"),
    [("sys.exit(7)", 7, 0), ("os.kill(os.getpid(), 9)", None, 9), ("", 0, 0)],
)
def test_exit_code_and_signal(
    world: World, recorder: Recorder, code: str, status: int | None, signal: int
) -> None:
    run = world.run_dir(world.local)
    world.python(run, code, check=False)
    seen = recorder.find(Exit, lambda e: e.head.comm == "python3")
    assert seen is not None
    assert (seen.code, seen.signal) == (status, signal)


def test_a_process_with_threads_ends_once(world: World, recorder: Recorder) -> None:
    run = world.run_dir(world.local)
    code = "import threading; [threading.Thread(target=time.sleep, args=(0.05,)).start() for _ in range(20)]"
    for _ in range(5):
        world.python(run, code)
    done = world.python(run, "print('end')")
    assert done == "end"
    assert recorder.find(Exec, lambda e: e.argv[-1].endswith("print('end')"))
    started = recorder.count(Exec, lambda e: e.filename == "/usr/bin/python3")
    assert started == 6
    assert recorder.find(Exit, lambda e: recorder.count(Exit) >= 6)
    assert recorder.count(Exit) == 6


@pytest.mark.parametrize("host", [SERVER4, SERVER6])
def test_sees_tcp_connect(world: World, recorder: Recorder, host: str) -> None:
    run = world.run_dir(world.local)
    with world.background(None, LISTEN, host, "8080"):
        assert world.python(run, "print(attempt(tcp, sys.argv[1], 8080))", host) == "0"
    seen = recorder.find(Net)
    assert seen is not None and not seen.refused
    assert (seen.key.address, seen.key.port, seen.key.protocol_name) == (host, 8080, "tcp")
    assert seen.key.cgroup == ids(run)
    assert recorder.count(Net) == 1


def test_sees_tcp_fast_open(world: World, recorder: Recorder) -> None:
    run = world.run_dir(world.local)
    code = """
    for _ in range(2):  # the first fetches the cookie, the second's data goes with the SYN
        s = socket.socket(AF4, TCP)
        s.sendto(b"data", socket.MSG_FASTOPEN, (sys.argv[1], 8081))
        s.close()
    print("sent")
    """
    with world.background(None, LISTEN, SERVER4, "8081"):
        assert world.python(run, code, SERVER4) == "sent"
    seen = recorder.find(Net)
    assert seen is not None and seen.key.port == 8081
    assert recorder.count(Net) == 2


def test_sees_udp_with_and_without_connect_and_counts_datagrams(
    world: World, recorder: Recorder, loader: Loader
) -> None:
    run = world.run_dir(world.local)
    code = """
    a = socket.socket(AF4, UDP)
    for _ in range(50):
        a.sendto(b"x", (sys.argv[1], 5301))
    b = socket.socket(AF6, UDP)
    b.connect((sys.argv[2], 5302))
    b.send(b"x"); attempt(b.send, b"x")
    c = socket.socket(AF6, UDP)
    c.sendto(b"x", ("::ffff:" + sys.argv[1], 5303))
    """
    world.python(run, code, SERVER4, SERVER6)
    plain = recorder.find(Net, lambda e: e.key.port == 5301)
    assert plain is not None and plain.key.via == events.VIA_DATAGRAM
    assert recorder.count(Net, lambda e: e.key.port == 5301) == 1
    assert loader.tallies()[plain.raw_key] == 50
    connected = recorder.find(Net, lambda e: e.key.port == 5302)
    assert connected is not None and connected.key.via == events.VIA_CONNECT
    assert connected.key.address == SERVER6
    mapped = recorder.find(Net, lambda e: e.key.port == 5303)
    assert mapped is not None and mapped.key.address == SERVER4


def test_sees_multipath_tcp_of_a_run_without_the_proxy(world: World, recorder: Recorder) -> None:
    run = world.run_dir(world.local)
    code = """
    s = socket.socket(AF4, TCP, 262)
    s.settimeout(2)
    print(attempt(s.connect, (sys.argv[1], 8082)))
    """
    with world.background(None, LISTEN, SERVER4, "8082"):
        assert world.python(run, code, SERVER4) == "0"
    assert recorder.find(Net, lambda e: e.key.port == 8082)
    assert recorder.count(Net, lambda e: e.key.port == 8082) == 1


def test_sees_connect_on_a_socket_from_outside_the_run(world: World, recorder: Recorder) -> None:
    """The cgroup programs go by the socket's cgroup and miss this one; the tracepoint does not."""
    run = world.run_dir(world.local)
    code = """
    s = socket.socket(AF4, TCP)  # made outside
    open(sys.argv[2] + "/cgroup.procs", "w").write("0")
    s.settimeout(2)
    print(attempt(s.connect, (sys.argv[1], 8083)))
    """
    with world.background(None, LISTEN, SERVER4, "8083"):
        assert world.python(world.outside, code, SERVER4, str(run)) == "0"
    seen = recorder.find(Net, lambda e: e.key.port == 8083)
    assert seen is not None
    assert seen.key.via == events.VIA_FOREIGN
    assert seen.key.address == SERVER4
    assert seen.head.cgroup == ids(run)


def test_a_process_in_a_nested_pid_namespace_is_named_by_our_pid(
    world: World, recorder: Recorder
) -> None:
    run = world.run_dir(world.local)
    world.do(run, "unshare", "--pid", "--fork", "/bin/echo", "nested")
    seen = recorder.find(Exec, lambda e: e.argv == ("/bin/echo", "nested"))
    parent = recorder.find(Exec, lambda e: "unshare" in e.filename)
    assert seen is not None and parent is not None
    assert seen.head.ppid == parent.head.pid
    assert seen.head.pid > parent.head.pid


def test_the_real_path_survives_a_chroot(
    world: World, recorder: Recorder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    jail = tmp_path_factory.mktemp("jail")
    tool = jail / "tool"
    sh("sh", "-c", f"echo 'int main(void) {{ return 0; }}' | gcc -static -x c -o {tool} -")
    run = world.run_dir(world.local)
    world.do(run, "chroot", str(jail), "/tool", "jailed")
    seen = recorder.find(Exec, lambda e: e.argv == ("/tool", "jailed"))
    assert seen is not None
    assert seen.filename == "/tool"
    assert seen.exe == str(tool)
    assert seen.inode == tool.stat().st_ino


def test_a_refused_family_is_not_mistaken_for_an_address(world: World, recorder: Recorder) -> None:
    run = world.run_dir(world.local)
    code = "s = socket.socket(socket.AF_UNIX, UDP); print(attempt(s.connect, '/nowhere'))"
    assert world.python(run, code) == "2"
    assert recorder.find(Exec, lambda e: e.argv[-1].endswith("'/nowhere'))"))
    assert recorder.count(Net) == 0
    assert socket.AF_UNIX not in events.FAMILIES
