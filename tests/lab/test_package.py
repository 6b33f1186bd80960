"""The package on a real systemd: what it installs, what it starts, and that purging it leaves nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.harness import Container, eventually
from tests.lab.harness.__main__ import DIST, ENGINE, HERE, newest_debs

SOCKETS = {
    "/run/agent-assembly/enforce": "660 root aa-enforce",
    "/run/agent-assembly/control": "660 root aa-operators",
    "/run/agent-assembly/launch": "666 root root",
}
STARTED = ("aa.target", "aa-gateway.socket", "aa-gateway-control.socket", "aa-launch.socket")
NOT_STARTED = ("aa-proxy.service", "aa-redirect.service", "aa-ebpf.service")
BAD_CALL = b"x" * 8 + b"\0"

TRACES = r"""
set -f
find / -xdev ( -path /proc -o -path /sys -o -path /var/cache/lab -o -path /var/log/journal
    -o -path /var/log/apt -o -path /var/lib/dpkg -o -path /work ) -prune -o
    ( -name *agent-assembly* -o -name *agent_assembly* -o -name aa-* -o -name aasm* ) -print
"""
RULES = "iptables-save; ip6tables-save; iptables-legacy-save; ip6tables-legacy-save"


def traces(box: Container) -> set[str]:
    """Files that could be ours. The machine below the container may have some of its own."""
    found = box.run(TRACES.replace("(", "\\(").replace(")", "\\)").replace("\n    ", " "))
    return set(found.check().out.splitlines())


@pytest.fixture(scope="module")
def bare() -> Iterator[Container]:
    """A container of its own: these tests remove the package."""
    with Container() as container:
        yield container


@pytest.fixture(scope="module")
def traces_before(bare: Container) -> set[str]:
    return traces(bare)


@pytest.fixture(scope="module")
def box(bare: Container, traces_before: set[str]) -> Container:
    bare.install_deb(*newest_debs(engine=HERE))
    return bare


def units_of_package(box: Container) -> list[str]:
    listed = box.raw(["dpkg", "--listfiles", "agent-assembly"]).check().out.splitlines()
    return [path for path in listed if path.startswith("/lib/systemd/system/aa")]


def test_systemd_finds_no_fault_in_any_unit(box: Container) -> None:
    units = units_of_package(box)
    assert len(units) >= 12
    verified = box.run(["systemd-analyze", "verify", "--man=no", *units])
    assert verified.code == 0 and not verified.out + verified.err, verified.out + verified.err


def test_nothing_is_failed_after_installation(box: Container) -> None:
    assert box.systemctl("is-system-running").out.strip() == "running"
    assert box.systemctl("--failed", "--no-legend", "--plain").out == ""


def test_sockets_listen_with_their_owners_and_modes(box: Container) -> None:
    for path, owner in SOCKETS.items():
        assert box.raw(["stat", "--format=%a %U %G", path]).check().out.strip() == owner
    listening = box.raw(["ss", "--listening", "--unix", "--no-header"]).check().out
    for path in SOCKETS:
        assert path in listening


@pytest.mark.parametrize("unit", STARTED)
def test_installation_starts_what_only_listens(box: Container, unit: str) -> None:
    assert box.show(unit, "ActiveState", "UnitFileState") == {
        "ActiveState": "active",
        "UnitFileState": "enabled",
    }


@pytest.mark.parametrize("unit", NOT_STARTED)
def test_installation_does_not_start_what_changes_the_network(box: Container, unit: str) -> None:
    assert box.show(unit, "ActiveState", "UnitFileState") == {
        "ActiveState": "inactive",
        "UnitFileState": "disabled",
    }
    rules = box.raw(["sh", "-c", "iptables-save; ip6tables-save"]).check().out
    assert "AA-" not in rules


def test_slices_of_the_runs_are_there_before_any_run(box: Container) -> None:
    for slice_ in ("aa-agents-proxy.slice", "aa-agents-local.slice"):
        cgroup = box.show(slice_, "ControlGroup")["ControlGroup"]
        assert cgroup == f"/aa.slice/aa-agents.slice/{slice_}"
        assert box.raw(["test", "-d", f"/sys/fs/cgroup{cgroup}"]).ok


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/run/agent-assembly", "755 root root"),
        ("/run/agent-assembly/runs", "750 aa-gateway aa-gateway"),
        ("/run/agent-assembly/bpf", "700 root root"),
        ("/var/log/agent-assembly", "750 aa-gateway aa-gateway"),
    ],
)
def test_directories_belong_to_whom_they_should(box: Container, path: str, expected: str) -> None:
    assert box.raw(["stat", "--format=%a %U %G", path]).check().out.strip() == expected


def test_services_are_users_without_a_login(box: Container) -> None:
    for user in ("aa-gateway", "aa-proxy"):
        assert box.raw(["getent", "passwd", user]).check().out.strip().endswith("/usr/sbin/nologin")


def test_python_package_imports_without_anything_of_the_build_machine(box: Container) -> None:
    where = box.run(["/usr/bin/python3", "-I", "-c", "import aa; print(aa.__file__)"], user="dev")
    assert where.out.strip() == "/usr/lib/python3/dist-packages/aa/__init__.py"
    code = "import aa.varlink.idl, pathlib; print(*pathlib.Path(aa.__file__).parent.glob('varlink/*.varlink'))"
    assert "io.agentassembly.Gateway.varlink" in box.run(["/usr/bin/python3", "-I", "-c", code]).out


def test_modules_are_compiled_when_the_package_is_installed(box: Container) -> None:
    assert box.run("ls /usr/lib/python3/dist-packages/aa/__pycache__/model.*.pyc").ok


@pytest.mark.parametrize("service", ["aa-gateway", "aa-proxy"])
def test_sandbox_of_what_parses_strangers_bytes_is_tight(box: Container, service: str) -> None:
    limit = "--threshold=20"  # tenths: exposure below 2.0
    scored = box.run(["systemd-analyze", "security", "--no-pager", limit, f"{service}.service"])
    assert scored.ok, scored.out


def test_gateway_starts_when_somebody_calls(box: Container) -> None:
    box.systemctl("stop", "aa-gateway.service")
    call = (
        "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/agent-assembly/control')"
    )
    box.run(
        ["/usr/bin/python3", "-I", "-c", call + f"; s.send({BAD_CALL!r}); s.recv(9)"], timeout=30
    )
    eventually(
        lambda: box.show("aa-gateway.service", "ActiveState")["ActiveState"] == "active",
        what="the gateway is active",
    )


def test_reinstallation_keeps_the_listeners_and_what_runs(box: Container) -> None:
    before = box.raw(["stat", "--format=%i", *SOCKETS]).check().out
    box.systemctl("start", "aa-gateway.service").check()
    deb = f"/var/cache/lab/{newest_debs()[0].name}"
    box.run(["dpkg", "--install", deb], timeout=120).check()
    assert box.raw(["stat", "--format=%i", *SOCKETS]).check().out == before
    eventually(
        lambda: box.show("aa-gateway.service", "ActiveState")["ActiveState"] == "active",
        what="the gateway is active",
    )


# The inspection engine

FOLDER = "/usr/lib/agent-assembly/inspect"
LOAD = f"""
import sys
sys.path.insert(0, "{FOLDER}")
from mitmproxy.proxy import layer, server
from mitmproxy.proxy.layers import http, tls, websocket
import brotli, zstandard, OpenSSL.SSL
strangers = [m.__file__ for m in sys.modules.values() if "-packages" in (getattr(m, "__file__", "") or "")]
print(sys.modules["mitmproxy"].__path__[0], strangers)
"""
PLACES = (FOLDER, "/usr/share/doc/", "/usr/share/lintian/overrides/")
"""Where the engine's files may lie."""
SUITES = {"deb12": ("3.11", "3.12"), "deb13": ("3.13", "3.14")}


def field(package: Path, name: str) -> str:
    told = subprocess.run(
        ["dpkg-deb", "--field", package, name], check=True, capture_output=True, text=True
    )
    return told.stdout.strip()


@pytest.mark.parametrize("suite", SUITES)
def test_there_is_an_engine_for_each_release_and_its_python_alone(suite: str) -> None:
    guard, engine = newest_debs(engine=suite)
    wanted = [part.strip() for part in field(engine, "Depends").split(",")]
    python, next_python = SUITES[suite]
    assert f"agent-assembly (= {field(guard, 'Version')})" in wanted
    assert {f"python3 (>= {python})", f"python3 (<< {next_python})"} <= set(wanted)
    listed = subprocess.run(
        ["dpkg-deb", "--contents", engine], check=True, capture_output=True, text=True
    ).stdout
    outside = [
        line
        for line in listed.splitlines()
        if not line.startswith("d") and not any(place in line for place in PLACES)
    ]
    assert len(listed.splitlines()) > 300 and outside == []
    assert len(list(DIST.glob(f"{ENGINE}_*"))) == len(SUITES)


def test_the_engine_is_whole_and_needs_nothing_of_the_systems_python(box: Container) -> None:
    loaded = box.run(["/usr/bin/python3", "-I", "-S", "-c", LOAD], user="aa-proxy").check()
    assert loaded.out.strip() == f"{FOLDER}/mitmproxy []"
    assert box.run(f"ls {FOLDER}/mitmproxy/__pycache__/http.*.pyc").ok, "it is compiled already"


def test_nobody_else_imports_the_engines_libraries(box: Container) -> None:
    code = "import cryptography, h11; print(cryptography.__file__, h11.__file__)"
    said = box.run(["/usr/bin/python3", "-I", "-c", code]).check().out
    assert said.split() == [
        f"/usr/lib/python3/dist-packages/{name}/__init__.py" for name in ("cryptography", "h11")
    ]


def test_only_root_writes_the_engine(box: Container) -> None:
    writable = f"find {FOLDER} \\( ! -user root -o ! -group root -o -perm /7022 \\) ! -type l"
    assert box.run(writable).check().out == ""


def test_each_wheels_licence_is_told(box: Container) -> None:
    told = box.raw(["cat", f"/usr/share/doc/{ENGINE}/copyright"]).check().out
    wheels = box.run(f"cd {FOLDER} && ls -d *.dist-info").check().out.split()
    assert len(wheels) >= 20
    for wheel in wheels:
        assert f"{FOLDER[1:]}/{wheel}/*" in told, wheel
    assert "Copyright (c) 2013, Aldo Cortesi" in told


def test_a_running_proxy_takes_a_new_engine_and_a_stopped_one_stays_stopped(box: Container) -> None:
    (engine,) = (f"/var/cache/lab/{p.name}" for p in newest_debs(engine=HERE) if ENGINE in p.name)
    box.run(["dpkg", "--install", engine], timeout=120).check()
    assert box.show("aa-proxy.service", "ActiveState") == {"ActiveState": "inactive"}
    box.systemctl("start", "aa-proxy.service").check()
    try:
        before = box.show("aa-proxy.service", "MainPID")
        box.run(["dpkg", "--install", engine], timeout=120).check()
        after = box.show("aa-proxy.service", "MainPID", "ActiveState")
        assert after["ActiveState"] == "active" and after["MainPID"] != before["MainPID"]
    finally:
        box.systemctl("stop", "aa-proxy.service", "aa-redirect.service", "aa-ebpf.service")


def test_purge_ends_what_runs_and_leaves_nothing(box: Container, traces_before: set[str]) -> None:
    """Comes last: the package is gone after it."""
    box.systemctl("start", "aa-proxy.service", timeout=60).check()
    agent = box.popen(["aasm", "run", "--", "sleep", "600"], user="dev", cwd="/home/dev")
    eventually(lambda: box.raw(["pgrep", "-x", "sleep"]).ok, what="the agent runs")
    assert "AA-" in box.raw(["sh", "-c", RULES]).out
    assert traces(box) > traces_before

    box.run(["apt-get", "purge", "--yes", "agent-assembly", ENGINE], timeout=180).check()

    assert agent.wait(timeout=20) != 0
    assert not box.raw(["pgrep", "-x", "sleep"]).ok
    assert traces(box) == traces_before
    assert "aa-" not in box.raw(["sh", "-c", "getent passwd; getent group"]).out
    assert "AA-" not in box.raw(["sh", "-c", RULES]).out
    assert box.systemctl("list-units", "--all", "--no-legend", "--plain", "aa*").out == ""
    assert not box.raw(["test", "-e", "/sys/fs/cgroup/aa.slice"]).ok
    assert box.raw(["findmnt", "--types", "bpf", "--noheadings"]).out == ""  # and so no pin
    assert box.systemctl("is-system-running").out.strip() == "running", box.systemctl(
        "--failed"
    ).out
