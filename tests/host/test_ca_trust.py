"""Into the trust store and out again, with Debian's own tools, on a copy of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.trust_store import Machine, own_files

BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
ROOT = "/var/lib/agent-assembly/ca/root.pem"
UPDATE = "/usr/sbin/update-ca-certificates"


@pytest.fixture(autouse=True, scope="module")
def untouched() -> Iterator[None]:
    before = own_files()
    yield
    assert own_files() == before, "the machine's own trust store was touched"


@pytest.fixture(scope="module")
def without_java() -> Iterator[Machine]:
    with Machine(java=False) as copy:
        yield copy


@pytest.fixture
def machine(without_java: Machine) -> Iterator[Machine]:
    """With an authority that is new, and a store that knows nothing of it before and after."""
    without_java.authority("--init")
    pristine = without_java.store()
    yield without_java
    without_java.authority("--uninstall-trust")
    assert without_java.store() == pristine
    without_java.run("rm", "-r", "-f", "/var/lib/agent-assembly")
    without_java.run("mkdir", "/var/lib/agent-assembly")


@pytest.fixture(scope="module")
def with_java() -> Iterator[Machine]:
    with Machine(java=True) as copy:
        copy.authority("--init")
        yield copy


def test_a_copy_is_no_way_to_the_machines_own_files(without_java: Machine) -> None:
    before = own_files()
    script = """
        for f in /usr/sbin/update-ca-certificates /etc/group /etc/ssl/certs/ca-certificates.crt; do
            cp $f $f.kept; echo >>$f; rm $f; mv $f.kept $f
        done
        test "$(stat -c %d:%i .)" = "$(stat -c %d:%i /)"
    """
    without_java.run("sh", "-ec", script)
    assert own_files() == before


def trusted_by_openssl(machine: Machine, certificate: str = ROOT) -> bool:
    """By the hashed directory and by the bundle, which different programs use."""
    verify = ("openssl", "verify", "-no-CAstore")
    by_directory = machine.run(
        *verify, "-no-CAfile", "-CApath", "/etc/ssl/certs", certificate, code=None
    )
    by_bundle = machine.run(*verify, "-no-CApath", "-CAfile", BUNDLE, certificate, code=None)
    assert by_directory.returncode == by_bundle.returncode
    return by_directory.returncode == 0


def test_install_and_uninstall_leave_the_store_as_it_was(machine: Machine) -> None:
    before = machine.store()
    assert not trusted_by_openssl(machine)
    machine.aasm("install-ca")
    assert trusted_by_openssl(machine)
    assert machine.shown()["trust"] == {"system": True, "java": None, "problem": ""}
    added = set(machine.store()) - set(before)
    assert {Path(p).suffix for p in added} == {".crt", ".pem", ".0"} and len(added) == 3
    machine.aasm("uninstall-ca")
    assert not trusted_by_openssl(machine)
    assert machine.store() == before


def test_both_can_be_done_twice(machine: Machine) -> None:
    before = machine.store()
    machine.aasm("install-ca")
    once = machine.store()
    machine.aasm("install-ca")
    assert machine.store() == once
    machine.aasm("uninstall-ca")
    assert "nothing taken out" in machine.aasm("uninstall-ca").stderr
    assert machine.store() == before


def test_others_certificates_and_links_stay(machine: Machine) -> None:
    script = """
        cd /usr/local/share/ca-certificates
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout /tmp/k -days 9 \
            -subj /CN=neighbour -out agent-assembly-neighbour.crt 2>/dev/null
        update-ca-certificates >/dev/null
        ln -s /etc/hostname /etc/ssl/certs/agent-assembly-notes.pem.txt
    """
    machine.run("sh", "-ec", script)
    before = machine.store()
    machine.aasm("install-ca")
    machine.aasm("uninstall-ca")
    assert machine.store() == before
    neighbour = "/usr/local/share/ca-certificates/agent-assembly-neighbour.crt"
    assert trusted_by_openssl(machine, neighbour)
    machine.run("rm", neighbour, "/etc/ssl/certs/agent-assembly-notes.pem.txt")
    machine.run("update-ca-certificates", "--fresh")


def test_uninstall_takes_away_what_was_left_half_removed(machine: Machine) -> None:
    before = machine.store()
    machine.aasm("install-ca")
    machine.run("sh", "-ec", "rm /usr/local/share/ca-certificates/agent-assembly-*.crt")
    assert machine.store() != before
    machine.aasm("uninstall-ca")
    assert machine.store() == before


def test_uninstall_works_when_the_authority_is_gone(machine: Machine) -> None:
    before = machine.store()
    machine.authority("--install-trust")
    assert trusted_by_openssl(machine)
    machine.run(
        "sh", "-ec", "cp /var/lib/agent-assembly/ca/root.pem /tmp/; rm -r /var/lib/agent-assembly"
    )
    machine.authority("--uninstall-trust")
    assert not trusted_by_openssl(machine, "/tmp/root.pem")
    assert machine.store() == before


def test_a_failing_update_is_an_error_and_the_next_one_succeeds(machine: Machine) -> None:
    machine.run("sh", "-ec", "mv /etc/ssl/certs /etc/ssl/away; touch /etc/ssl/certs")
    failed = machine.aasm("install-ca", code=1)
    assert "aasm:" in failed.stderr and "Traceback" not in failed.stderr
    machine.run("sh", "-ec", "rm /etc/ssl/certs; mv /etc/ssl/away /etc/ssl/certs")
    machine.aasm("install-ca")
    assert trusted_by_openssl(machine)


def test_without_an_authority_install_says_what_to_do(machine: Machine) -> None:
    machine.run("rm", "-r", "/var/lib/agent-assembly")
    failed = machine.aasm("install-ca", code=1)
    assert "systemctl start aa-ca.service" in failed.stderr


@pytest.mark.parametrize("command", ["install-ca", "uninstall-ca", "rotate"])
def test_only_root_changes_what_is_trusted(machine: Machine, command: str) -> None:
    before = machine.store()
    code = "from aa.cli.ca import *; import os; os.setuid(65534); ca.add_command(install_ca); " \
        "ca.add_command(uninstall_ca); from aa.cli import main; " \
        "main.COMMANDS = {'ca': ('aa.cli.ca:ca', '')}; main.main()"  # fmt: skip
    refused = machine.run("/usr/bin/python3", "-I", "-c", code, "ca", command, code=4)
    assert "sudo" in refused.stderr
    assert machine.store() == before


def test_anybody_may_see_the_authority_and_nobody_its_keys(machine: Machine) -> None:
    nobody = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--")
    code = "from aa.cli import main; main.COMMANDS = {'ca': ('aa.cli.ca:ca', '')}; main.main()"
    told = machine.run(*nobody, "/usr/bin/python3", "-I", "-c", code, "ca", "show")
    assert "root of" in told.stdout and "not in it" in told.stdout
    for key in ("ca/root.key", "proxy-ca/intermediate.pem"):
        assert machine.run(*nobody, "cat", f"/var/lib/agent-assembly/{key}", code=1).stdout == ""
    assert machine.run(*nobody, "cat", ROOT).stdout.startswith("-----BEGIN CERTIFICATE")


def test_rotation_swaps_the_trusted_root(machine: Machine) -> None:
    before = machine.store()
    machine.aasm("install-ca")
    old = machine.shown()
    machine.run("cp", ROOT, "/tmp/old.pem")
    told = machine.aasm("rotate").stderr
    assert [line[:2] for line in told.splitlines() if line[0].isdigit()] == [
        "1.",
        "2.",
        "3.",
        "4.",
        "5.",
    ]
    new = machine.shown()
    assert new["root"]["fingerprint"] != old["root"]["fingerprint"]
    assert new["intermediate"]["fingerprint"] != old["intermediate"]["fingerprint"]
    assert new["trust"]["system"] and new["problems"] == [] and not new["rotating"]
    assert trusted_by_openssl(machine) and not trusted_by_openssl(machine, "/tmp/old.pem")
    machine.aasm("uninstall-ca")
    assert machine.store() == before


def test_rotation_of_an_authority_that_nobody_trusts_installs_nothing(machine: Machine) -> None:
    before = machine.store()
    machine.aasm("rotate")
    assert machine.store() == before


def test_a_rotation_that_fails_changes_nothing_and_can_be_done_again(machine: Machine) -> None:
    machine.aasm("install-ca")
    before, known = machine.store(), machine.shown()
    machine.run("mv", UPDATE, "/root/update")
    failed = machine.aasm("rotate", code=1)
    machine.run("mv", "/root/update", UPDATE)
    assert "rotation is not finished" in failed.stderr and "apt install" in failed.stderr
    half = machine.shown()
    assert half["root"] == known["root"] and half["rotating"]
    assert half["problems"] == ["a rotation was begun and not finished: `sudo aasm ca rotate`"]
    assert trusted_by_openssl(machine)
    machine.aasm("rotate")
    assert trusted_by_openssl(machine) and machine.shown()["problems"] == []
    assert len(machine.store()) == len(before), "what the first attempt left is gone"


def test_java_learns_the_root_and_forgets_it(with_java: Machine) -> None:
    before, aliases = with_java.store(), with_java.java_aliases()
    with_java.aasm("install-ca")
    assert with_java.shown()["trust"]["java"] is True
    added = with_java.java_aliases() - aliases
    assert len(added) == 1 and added.pop().startswith("debian:agent-assembly-")
    with_java.aasm("uninstall-ca")
    assert with_java.shown()["trust"] == {"system": False, "java": False, "problem": ""}
    assert with_java.java_aliases() == aliases
    assert with_java.store() == before


def test_java_forgets_a_root_whose_file_was_deleted_by_hand(with_java: Machine) -> None:
    before, aliases = with_java.store(), with_java.java_aliases()
    with_java.aasm("install-ca")
    with_java.run("sh", "-ec", "rm /usr/local/share/ca-certificates/agent-assembly-*.crt; "
                  "rm /etc/ssl/certs/agent-assembly-*.pem; update-ca-certificates >/dev/null")  # fmt: skip
    assert with_java.java_aliases() != aliases, "this is the trap: Java keeps it"
    with_java.aasm("uninstall-ca")
    assert with_java.java_aliases() == aliases
    assert with_java.store() == before


JAVA_CLIENT = """
import java.io.*; import java.security.*; import java.security.cert.*; import java.util.*;
import javax.net.ssl.*;
public class Check {
    public static void main(String[] a) throws Exception {
        CertificateFactory f = CertificateFactory.getInstance("X.509");
        List<X509Certificate> chain = new ArrayList<>();
        try (InputStream in = new FileInputStream(a[0])) {
            for (java.security.cert.Certificate c : f.generateCertificates(in)) chain.add((X509Certificate) c);
        }
        TrustManagerFactory t = TrustManagerFactory.getInstance(TrustManagerFactory.getDefaultAlgorithm());
        t.init((KeyStore) null);
        ((X509TrustManager) t.getTrustManagers()[0]).checkServerTrusted(
            chain.toArray(new X509Certificate[0]), "ECDHE_ECDSA");
        System.out.println("accepted");
    }
}
"""


def test_a_java_program_accepts_a_leaf_within_the_limits(with_java: Machine) -> None:
    """And none before the root is installed: the program uses the store that Debian keeps for it."""
    issue = (
        "from aa.ca.leaf import LeafIssuer; import pathlib\n"
        "pathlib.Path('/tmp/chain.pem').write_bytes(LeafIssuer().issue('api.allowed.example').chain_pem)\n"
    )
    with_java.run("sh", "-ec", f"mkdir -p /run/agent-assembly/inspected; cat >/tmp/Check.java <<'E'\n{JAVA_CLIENT}E\n"
                  "printf 'allowed.example\\n' >/run/agent-assembly/inspected/hosts")  # fmt: skip
    with_java.authority("--init")
    with_java.run("/usr/bin/python3", "-I", "-c", issue)
    check = ("java", "-Xmx128m", "/tmp/Check.java", "/tmp/chain.pem")
    assert "unable to find valid certification path" in with_java.run(*check, code=1).stderr
    with_java.aasm("install-ca")
    assert with_java.run(*check).stdout == "accepted\n"
    with_java.aasm("uninstall-ca")
    with_java.run(*check, code=1)
