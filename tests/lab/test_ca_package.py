"""The root goes into the trust store by a command, and out of it with the package, without a trace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.harness import Container
from tests.lab.harness.__main__ import newest_debs

STORE = (
    "cd / && find etc/ssl etc/ca-certificates usr/local/share/ca-certificates ! -name cacerts "
    "-printf '%M %U %G %p %l\\n' | sort; cat etc/ssl/certs/ca-certificates.crt | sha256sum"
)
JAVA = "keytool -list -rfc -cacerts -storepass changeit | grep '^Alias' | sort"


@pytest.fixture(scope="module")
def box() -> Iterator[Container]:
    with Container() as container:
        yield container


def test_the_trust_store_is_after_removal_what_it_was_before_installation(box: Container) -> None:
    store, java = box.run(STORE).check().out, box.run(JAVA, timeout=120).check().out
    assert "agent-assembly" not in store + java
    box.install_deb(*newest_debs())
    assert "agent-assembly" not in box.run(STORE).check().out
    box.run(["aasm", "proxy", "install-ca"], timeout=120).check()
    assert "agent-assembly" in box.run(STORE).check().out
    assert "agent-assembly" in box.run(JAVA, timeout=120).check().out
    box.run(["apt-get", "remove", "--yes", "agent-assembly"], timeout=180).check()
    assert box.run(STORE).check().out == store
    assert box.run(JAVA, timeout=120).check().out == java
    # the root is still there, for when the package comes back; purging takes it too
    assert box.raw(["test", "-e", "/var/lib/agent-assembly/ca/root.key"]).ok
    box.run(["apt-get", "purge", "--yes", "agent-assembly"], timeout=180).check()
    assert not box.raw(["test", "-e", "/var/lib/agent-assembly"]).ok


def test_an_upgrade_does_not_bring_back_what_a_person_took_out(box: Container) -> None:
    box.install_deb(*newest_debs())
    box.run(["aasm", "proxy", "install-ca"], timeout=120).check()
    box.run(["aasm", "proxy", "uninstall-ca"], timeout=120).check()
    box.run(["dpkg", "--install", f"/var/cache/lab/{newest_debs()[0].name}"], timeout=180).check()
    assert "agent-assembly" not in box.run(STORE).check().out
