"""The authority on a real systemd: its service's sandbox, its units, and who can read which key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.harness import Container, eventually

ROOT_KEY = "/var/lib/agent-assembly/ca/root.key"
INTERMEDIATE = "/var/lib/agent-assembly/proxy-ca/intermediate.pem"
HOSTS = "/run/agent-assembly/inspected/hosts"
SERVICE = "aa-ca.service"
EXPOSURE = 2.0
"""What `systemd-analyze security` may say at most."""


@pytest.fixture
def box(installed: Container) -> Iterator[Container]:
    """With an authority in use, and the list of hosts as it was before, afterwards.

    The gateway publishes its list when it starts, so it is up before a test writes another one.
    """
    installed.systemctl("start", "aa-gateway.service", SERVICE).check()
    before = installed.raw(["cat", HOSTS]).out
    yield installed
    if before:
        publish(installed, before)
    else:
        installed.raw(["rm", "-f", HOSTS])


def shown(box: Container) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(box.run(["aasm", "ca", "show", "--json"]).out)
    return told


def publish(box: Container, text: str) -> None:
    """As the gateway does it."""
    box.raw(
        ["setpriv", "--reuid=aa-gateway", "--regid=aa-gateway", "--clear-groups", "sh", "-ec",
         f"umask 027; cat >{HOSTS}.new; mv {HOSTS}.new {HOSTS}"],
        input=text,
    ).check()  # fmt: skip


def test_installation_makes_root_and_intermediate_and_leaves_the_trust_store(
    box: Container,
) -> None:
    told = shown(box)
    assert not told["trust"]["system"] and told["problems"] == []
    assert "root of box" in told["root"]["subject"]
    modes = box.raw(["stat", "--format=%a %U %G %n", ROOT_KEY, INTERMEDIATE]).check().out
    assert modes == f"400 root root {ROOT_KEY}\n440 root aa-proxy {INTERMEDIATE}\n"


@pytest.mark.parametrize("user", ["dev", "aa-gateway", "aa-proxy"])
def test_nobody_but_root_reads_the_roots_key(box: Container, user: str) -> None:
    refused = box.run(["cat", ROOT_KEY], user=user)
    assert not refused.ok and refused.out == ""
    assert box.run(["cat", ROOT_KEY]).ok


@pytest.mark.parametrize(
    ("user", "reads"), [("dev", False), ("aa-gateway", False), ("aa-proxy", True)]
)
def test_the_proxy_alone_reads_the_intermediate(box: Container, user: str, reads: bool) -> None:
    assert box.run(["cat", INTERMEDIATE], user=user).ok is reads


def test_the_proxys_user_makes_leaves_that_programs_accept(box: Container) -> None:
    box.run(["aasm", "proxy", "install-ca"], timeout=120).check()
    publish(box, "served.example\n")
    box.systemctl("start", SERVICE).check()
    code = "from aa.ca.leaf import LeafIssuer; print(LeafIssuer().issue('www.served.example').chain_pem.decode())"
    leaf = box.run(["/usr/bin/python3", "-I", "-c", code], user="aa-proxy").check().out
    box.push("/run/leaf.pem", leaf)
    verify = "openssl verify -x509_strict -purpose sslserver -untrusted /run/leaf.pem /run/leaf.pem"
    assert box.run(verify).ok, box.run(verify).err
    other = box.run(
        ["/usr/bin/python3", "-I", "-c", code.replace("served", "other")], user="aa-proxy"
    )
    assert not other.ok and "may not sign for www.other.example" in other.err


def test_a_changed_list_of_hosts_reissues_the_intermediate_by_itself(box: Container) -> None:
    publish(box, "one.example\n")
    eventually(lambda: permitted(box) == ["one.example"], what="the first list is in force")
    publish(box, "one.example\ntwo.example\n")
    eventually(lambda: permitted(box) == ["one.example", "two.example"], what="the second as well")
    before = shown(box)["intermediate"]
    publish(box, "two.example\none.example\n")
    box.systemctl("start", SERVICE).check()
    assert shown(box)["intermediate"] == before, "the same hosts in another order change nothing"


def test_a_list_that_is_only_touched_is_read_again(box: Container) -> None:
    """The gateway does it a while after each change, which may have come while the service ran."""
    publish(box, "touched.example\n")
    eventually(lambda: permitted(box) == ["touched.example"], what="the list is in force")

    def started() -> str:
        return box.show(SERVICE, "ExecMainStartTimestampMonotonic", "ActiveState")[
            "ExecMainStartTimestampMonotonic"
        ]

    eventually(
        lambda: box.show(SERVICE, "ActiveState") == {"ActiveState": "inactive"}, what="it is over"
    )
    before = started()
    box.raw(["touch", HOSTS]).check()
    eventually(lambda: started() != before, what="the service ran again")


def permitted(box: Container) -> list[str]:
    names: list[str] = shown(box)["intermediate"]["constraints"]["permitted"]
    return names


def test_a_broken_list_changes_nothing_and_fails_visibly(box: Container) -> None:
    publish(box, "one.example\n")
    box.systemctl("start", SERVICE).check()
    before, cursor = shown(box)["intermediate"], box.journal_cursor()
    publish(box, "not a host\n")
    eventually(
        lambda: box.show(SERVICE, "Result") == {"Result": "exit-code"}, what="the service failed"
    )
    said = [str(r["MESSAGE"]) for r in box.journal(unit=SERVICE, after=cursor)]
    assert any("line 1 is neither a host pattern nor a network" in m for m in said), said
    assert not any("not a host" in m for m in said), "the list may be anything, and is not repeated"
    assert shown(box)["intermediate"] == before
    publish(box, "one.example\n")
    eventually(
        lambda: box.show(SERVICE, "Result") == {"Result": "success"}, what="it is well again"
    )


def test_a_new_intermediate_does_not_restart_the_proxy(box: Container) -> None:
    box.systemctl("start", "aa-proxy.service").check()
    try:
        pid = box.show("aa-proxy.service", "MainPID")
        publish(box, "reload.example\n")
        eventually(lambda: permitted(box) == ["reload.example"], what="the list is in force")
        assert box.show("aa-proxy.service", "MainPID") == pid
        eventually(
            lambda: box.show("aa-proxy.service", "ActiveState") == {"ActiveState": "active"},
            what="the proxy is done with reloading",
        )
        assert box.show("aa-proxy.service", "MainPID") == pid
    finally:
        box.systemctl("stop", "aa-proxy.service", "aa-redirect.service", "aa-ebpf.service")


def test_the_audit_log_tells_what_was_issued(box: Container) -> None:
    publish(box, "audited.example\n")
    eventually(lambda: permitted(box) == ["audited.example"], what="the list is in force")
    told = shown(box)["intermediate"]["fingerprint"]

    def recorded() -> bool:
        found = box.run(["aasm", "audit", "tail", "--lines", "50", "--json"]).out
        return f"issued intermediate {told}" in found

    eventually(recorded, what="a record of it")


def test_rotation_on_a_running_host(box: Container) -> None:
    box.run(["aasm", "proxy", "install-ca"], timeout=120).check()
    before = shown(box)
    box.run(["aasm", "ca", "rotate"], timeout=120).check()
    after = shown(box)
    for what in ("root", "intermediate"):
        assert after[what]["fingerprint"] != before[what]["fingerprint"]
    assert after["trust"]["system"] and after["problems"] == []
    links = box.raw(["sh", "-c", "ls /etc/ssl/certs | grep -c agent-assembly-"]).out
    assert links.strip() == "1"
    found = box.run(["aasm", "audit", "tail", "--lines", "50", "--json"]).out
    assert f"root {after['root']['fingerprint']} is in use" in found


def test_the_service_can_do_nothing_else(box: Container) -> None:
    """The unit with another program in it: what its sandbox leaves to a taken-over authority."""
    probe = """
import os, socket, sys
def refused(act):
    try:
        act()
    except OSError:
        return True
    return False
def write(path):
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
said = {
    "writes its own": not refused(lambda: write("/var/lib/agent-assembly/ca/probe")),
    "no network": refused(lambda: socket.socket(socket.AF_INET)),
    "no other files": all(refused(lambda: write(p)) for p in (
        "/etc/probe", "/usr/probe", "/var/lib/agent-assembly/probe", "/run/agent-assembly/probe",
        "/var/log/agent-assembly/probe", "/etc/ssl/certs/probe")),
    "no capability": "CapEff:\\t0000000000000000" in open("/proc/self/status").read(),
    "no homes": refused(lambda: os.listdir("/home/dev")),
    "no core": __import__("resource").getrlimit(4) == (0, 0),
}
os.unlink("/var/lib/agent-assembly/ca/probe")
sys.exit(",".join(k for k, ok in said.items() if not ok) or 0)
"""
    drop_in = f"/run/systemd/system/{SERVICE}.d/50-probe.conf"
    box.push("/usr/local/lib/lab/ca-probe.py", probe)
    box.push(
        drop_in,
        "[Service]\nExecStart=\nExecStart=/usr/bin/python3 -I /usr/local/lib/lab/ca-probe.py\n",
    )
    box.systemctl("daemon-reload").check()
    done = box.systemctl("start", SERVICE)
    said = [r["MESSAGE"] for r in box.journal(unit=SERVICE)][-4:]
    box.raw(["rm", drop_in]).check()
    box.systemctl("daemon-reload").check()
    assert done.ok, said


def test_its_sandbox_is_as_tight_as_the_others(box: Container) -> None:
    told = box.run(["systemd-analyze", "security", "--no-pager", SERVICE]).out
    last = next(line for line in told.splitlines() if "Overall exposure level" in line)
    assert float(last.split(":")[1].split()[0]) < EXPOSURE, last


def test_no_key_is_in_the_journal_or_the_audit_log(box: Container) -> None:
    keys = (
        box.raw(["cat", ROOT_KEY, INTERMEDIATE])
        .check()
        .out.split("-----BEGIN PRIVATE KEY-----")[1:]
    )
    lines = [line for key in keys for line in key.split("-----END")[0].split()]
    assert len(lines) >= 4
    journal = box.raw(["journalctl", "--no-pager", "--all", "--output=json"]).check().out
    audit = box.raw(["cat", "/var/log/agent-assembly/audit.jsonl"]).out
    assert "issued intermediate" in journal and "issued intermediate" in audit
    for line in lines:
        assert line not in journal and line not in audit


def test_the_timer_is_active_and_renews_after_a_sleep(box: Container) -> None:
    assert box.show("aa-ca.timer", "ActiveState", "Persistent", "Unit") == {
        "ActiveState": "active", "Persistent": "yes", "Unit": SERVICE,
    }  # fmt: skip
    assert box.show("aa-ca.path", "ActiveState") == {"ActiveState": "active"}
