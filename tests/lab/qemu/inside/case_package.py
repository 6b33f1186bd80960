"""The package on this Debian: it installs, its units are sound, and `systemctl start aa-proxy` starts everything."""

from __future__ import annotations

import json
import os

import pytest

from tests.lab.guarded import SERVICES
from tests.lab.harness import Container, eventually
from tests.lab.harness.__main__ import newest_debs
from tests.lab.qemu.image import ENGINES

LOAD = """
import sys
sys.path.insert(0, "/usr/lib/agent-assembly/inspect")
from mitmproxy.proxy.layers import http, tls, websocket
import mitmproxy.version
print(mitmproxy.version.VERSION)
"""
HANDSHAKE = """
import ssl, tempfile
from aa.ca.leaf import LeafIssuer
leaf = LeafIssuer().issue("www.strict.example")
server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
with tempfile.NamedTemporaryFile() as file:
    file.write(leaf.key_pem + leaf.chain_pem)
    file.flush()
    server.load_cert_chain(file.name)
client = ssl.create_default_context()
client.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
ends = [
    client.wrap_bio(back, there, server_hostname="www.strict.example"),
    server.wrap_bio(there, back, server_side=True),
]
for _ in range(4):
    for end in ends:
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            pass
print(ends[0].version())
"""
"""What a program of this Python makes of a leaf, with the checks that 3.13 makes by itself."""

RUNGS = ("lsm", "fmod_ret", "cgroup")
"""Rungs on which something is enforced."""


def test_apt_installs_it_and_nothing_fails(installed: Container) -> None:
    assert installed.raw(["dpkg", "--audit"]).check().out == ""
    assert installed.systemctl("is-system-running").out.strip() == "running"


def test_the_inspection_engine_is_for_this_python(installed: Container) -> None:
    installed.install_deb(*newest_debs(engine=ENGINES[os.environ["LAB_SUITE"]]))
    load = ["/usr/bin/python3", "-I", "-S", "-c", LOAD]
    assert installed.run(load, user="aa-proxy", timeout=120).check().out.startswith(("11.", "12."))


def test_its_programs_accept_our_certificates_by_the_strictest_rules(installed: Container) -> None:
    installed.systemctl("start", "aa-gateway.service").check()  # it has published its own list then
    hosts = "/run/agent-assembly/inspected/hosts"
    publish = f"echo strict.example >{hosts} && chown aa-gateway {hosts}"
    installed.raw(["sh", "-c", publish]).check()
    installed.systemctl("start", "aa-ca.service").check()
    try:
        shake = ["/usr/bin/python3", "-I", "-c", HANDSHAKE]
        assert installed.run(shake, user="aa-proxy").check().out == "TLSv1.3\n"
    finally:
        installed.raw(["rm", hosts])


def test_systemd_finds_no_fault_in_any_unit(installed: Container) -> None:
    listed = installed.raw(["dpkg", "--listfiles", "agent-assembly"]).check().out.splitlines()
    units = [path for path in listed if "/systemd/system/aa" in path]
    assert len(units) >= 12
    verified = installed.run(["systemd-analyze", "verify", "--man=no", *units])
    assert verified.code == 0 and not verified.out + verified.err, verified.out + verified.err


@pytest.mark.parametrize("service", ["aa-gateway", "aa-proxy"])
def test_sandbox_of_what_parses_strangers_bytes_is_tight(
    installed: Container, service: str
) -> None:
    limit = "--threshold=20"  # tenths: exposure below 2.0
    scored = installed.run(
        ["systemd-analyze", "security", "--no-pager", limit, f"{service}.service"]
    )
    assert scored.ok, scored.out


def test_slices_are_there_and_the_firewall_is_untouched_before_a_start(
    installed: Container,
) -> None:
    for name in ("aa-agents-proxy.slice", "aa-agents-local.slice"):
        assert installed.raw(["test", "-d", f"/sys/fs/cgroup/aa.slice/aa-agents.slice/{name}"]).ok
    assert "AA-" not in installed.raw(["sh", "-c", "iptables-save; ip6tables-save"]).check().out


def test_starting_the_proxy_starts_what_it_needs(guarded: Container) -> None:
    for service in SERVICES:
        if service != "aa-launch":  # starts when somebody calls
            assert guarded.show(f"{service}.service", "ActiveState", "NRestarts") == {
                "ActiveState": "active",
                "NRestarts": "0",
            }
    for tool in ("iptables-save", "ip6tables-save"):
        rules = guarded.raw([tool]).check().out
        assert "AA-REDIRECT" in rules and "AA-FILTER" in rules


def test_status_reports_the_proven_rung(guarded: Container) -> None:
    def rung() -> str | None:
        told = json.loads(guarded.run(["aasm", "status", "--json"]).out)
        return next(
            (c["details"].get("rung") for c in told["components"] if c["name"] == "ebpf"), None
        )

    assert eventually(rung, timeout=20, what="the kernel layer is in the status") in RUNGS
    assert guarded.run(["aasm", "status"]).ok
