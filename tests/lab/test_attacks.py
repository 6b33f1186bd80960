"""Ways out of a run, and to take the service from others, each with its allowed twin."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from tests.lab.guarded import WORK, governed, guard
from tests.lab.harness import Container, Result, eventually
from tests.lab.harness.__main__ import newest_debs
from tests.lab.harness.names import API

OUTSIDE = """
import os, socket, threading, time
def serve(listener):
    while True:
        connection, _ = listener.accept()
        connection.sendall(b"outside")
        connection.close()
def listen(name):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(name)
    listener.listen(4)
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
os.makedirs("/home/dev/.ssh", exist_ok=True)
os.chdir("/home/dev/.ssh")
for name in os.listdir("."):
    os.unlink(name)
listen("/home/dev/.ssh/plain")
listen("/home/dev/.ssh/linked.Random")
os.link("linked.Random", "linked")
os.unlink("linked.Random")
listen("relative")
os.chdir("/")
time.sleep(30)  # its client cannot end it
"""

CONNECT = """
import json, socket, sys
said = {}
for name in ("plain", "linked", "relative"):
    with socket.socket(socket.AF_UNIX) as s:
        try:
            s.connect("/home/dev/.ssh/" + name)
            said[name] = s.recv(100).decode()
        except OSError as e:
            said[name] = type(e).__name__
print(json.dumps(said))
"""

FLOOD = """
import json, socket, sys, time
method, seconds = sys.argv[1], float(sys.argv[2])
call = {"method": method, "parameters": {}}
if method.endswith("GetInterfaceDescription"):
    call["parameters"] = {"interface": "io.agentassembly.Gateway"}
if method.endswith("Report"):
    action = {"kind": "tool.call", "target": "x", "attributes": {"a": "y" * 1000}}
    call["parameters"] = {"action": action, "outcome": "z"}
blob = (json.dumps(call).encode() + b"\\0") * 500
peers = []
for _ in range(250):
    s = socket.socket(socket.AF_UNIX)
    s.setblocking(False)
    try:
        s.connect("/run/agent-assembly/run/gateway")
        peers.append([s, b""])
    except OSError:
        s.close()
print("up", flush=True)
end = time.time() + seconds
while time.time() < end:
    for peer in peers:
        try:
            peer[1] = peer[1] or blob
            peer[1] = peer[1][peer[0].send(peer[1]):]
        except OSError:
            pass
"""


@pytest.fixture(scope="module")
def box() -> Iterator[Container]:
    with Container() as container:
        container.install_deb(*newest_debs())
        guard(container)
        yield container


def gateway_memory(box: Container) -> int:
    """Of the gateway's processes, in KiB."""
    script = "grep VmRSS /proc/$(systemctl show -P MainPID aa-gateway)/status"
    return int(box.raw(["sh", "-c", script]).check().out.split()[1])


def test_a_folders_name_writes_no_setting_into_the_runs_unit(box: Container) -> None:
    evil = "/home/dev/a\nExecStopPost=+/bin/touch /home/dev/made\n#"
    for folder in (evil, "/home/dev/a b%n 'c'"):
        script = f"import os; os.makedirs({folder!r}, exist_ok=True)"
        box.run(["python3", "-c", script], user="dev").check()
    inside = ["python3", "-c", "print(open('/proc/self/cgroup').read().count('aa-agent-'))"]
    enter = "import os, sys; os.chdir(sys.argv[1]); os.execvp('aasm', sys.argv[2:])"

    def run_in(folder: str) -> Result:
        argv = ["python3", "-c", enter, folder, "aasm", "run", "--agent", "sample", "--", *inside]
        return box.run(argv, user="dev")

    refused = run_in(evil)
    assert not refused.ok and "control character" in refused.err
    assert run_in("/home/dev/a b%n 'c'").check().out == "1\n"


def test_sockets_that_are_not_where_they_were_bound_are_out_of_reach(box: Container) -> None:
    box.push("/usr/local/lib/lab/outside.py", OUTSIDE)
    listening = box.popen(["python3", "/usr/local/lib/lab/outside.py"], user="dev")
    try:
        look = ["python3", "-c", CONNECT]
        ungoverned = eventually(
            lambda: [
                said
                for said in [json.loads(box.run(look, user="dev").check().out)]
                if set(said.values()) == {"outside"}
            ],
            what="the sockets answer",
        )
        assert ungoverned
        said = json.loads(governed(box, look).check().out)
        assert said == dict.fromkeys(("plain", "linked", "relative"), "PermissionError")
    finally:
        listening.kill()
        listening.wait()


@pytest.mark.parametrize(
    "method",
    [
        "org.varlink.service.GetInfo",
        "org.varlink.service.GetInterfaceDescription",
        "io.agentassembly.Gateway.Report",
    ],
)
def test_a_run_that_floods_its_socket_does_not_keep_others_waiting(
    box: Container, method: str
) -> None:
    box.push("/usr/local/lib/lab/flood.py", FLOOD)
    before = gateway_memory(box)
    command = ["aasm", "run", "--agent", "sample", "--", "python3", "/usr/local/lib/lab/flood.py"]
    flood = box.popen([*command, method, "12"], user="dev", cwd=WORK)
    try:
        time.sleep(3)
        assert flood.poll() is None
        fetch = ["curl", "-sS", "--max-time", "10", f"https://{API}/"]
        done = governed(box, fetch, agent="proxied")
        assert done.ok, done
        assert flood.poll() is None, "it was over before the other run was"
        assert gateway_memory(box) - before < 100 << 10
    finally:
        flood.wait(30)
