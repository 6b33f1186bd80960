"""The root goes into the trust store with the inspection engine, and out of it without a trace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.harness import Container
from tests.lab.harness.__main__ import ENGINE, HERE, newest_debs

STORE = (
    "cd / && find etc/ssl etc/ca-certificates usr/local/share/ca-certificates ! -name cacerts "
    "-printf '%M %U %G %p %l\\n' | sort; cat etc/ssl/certs/ca-certificates.crt | sha256sum"
)
JAVA = "keytool -list -rfc -cacerts -storepass changeit | grep '^Alias' | sort"


@pytest.fixture(scope="module")
def box() -> Iterator[Container]:
    with Container() as container:
        yield container


def trusted(box: Container) -> bool:
    return "agent-assembly" in box.run(STORE).check().out


def test_the_trust_store_is_after_removal_what_it_was_before_installation(box: Container) -> None:
    box.install_deb(*newest_debs())
    store, java = box.run(STORE).check().out, box.run(JAVA, timeout=120).check().out
    assert "agent-assembly" not in store + java, "nothing can be decrypted yet"
    box.install_deb(*newest_debs(engine=HERE))
    assert trusted(box)
    assert "agent-assembly" in box.run(JAVA, timeout=120).check().out
    box.run(["apt-get", "remove", "--yes", ENGINE], timeout=180).check()
    assert box.run(STORE).check().out == store
    assert box.run(JAVA, timeout=120).check().out == java


def test_removing_the_guard_takes_the_engine_and_its_root_along(box: Container) -> None:
    store = box.run(STORE).check().out
    box.install_deb(*newest_debs(engine=HERE))
    assert trusted(box), "a new installation is a new wish"
    box.run(["apt-get", "remove", "--yes", "agent-assembly"], timeout=180).check()
    assert box.run(STORE).check().out == store
    assert not box.raw(["test", "-e", "/usr/lib/agent-assembly/inspect"]).ok
    # the root's key is still there, for when the packages come back; purging takes it too
    assert box.raw(["test", "-e", "/var/lib/agent-assembly/ca/root.key"]).ok
    box.run(["apt-get", "purge", "--yes", "agent-assembly", ENGINE], timeout=180).check()
    assert box.run(STORE).check().out == store
    assert not box.raw(["test", "-e", "/var/lib/agent-assembly"]).ok


def test_an_upgrade_does_not_bring_back_what_a_person_took_out(box: Container) -> None:
    packages = newest_debs(engine=HERE)
    box.install_deb(*packages)
    upgrade = ["dpkg", "--install", *(f"/var/cache/lab/{path.name}" for path in packages)]
    box.run(upgrade, timeout=180).check()
    assert trusted(box), "it does not take away what nobody took out, either"
    box.run(["aasm", "proxy", "uninstall-ca"], timeout=120).check()
    box.run(upgrade, timeout=180).check()
    assert not trusted(box)
