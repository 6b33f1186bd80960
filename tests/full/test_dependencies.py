"""What apt makes of the packages' dependencies on each Debian release it is for."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.lab.harness.__main__ import ENGINE, newest_debs

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def debian_mirror() -> str:
    """Where this machine gets Debian from."""
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(SUITE)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = [
        line.split()[0]
        for line in listed.splitlines()
        if line.endswith((" Debian oldstable", " Debian stable"))
    ]
    assert found, "no Debian release among this machine's apt sources"
    return found[0]


@pytest.mark.parametrize(("release", "engine"), [("bookworm", "deb12"), ("trixie", "deb13")])
@pytest.mark.timeout(300)
def test_apt_resolves_every_dependency_from_main_alone(
    tmp_path: Path, release: str, engine: str
) -> None:
    for directory in ("lists/partial", "archives/partial", "parts"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "status").touch()
    (tmp_path / "sources").write_text(
        f"deb [signed-by={KEYRING}] {debian_mirror()} {release} main\n"
    )
    apt = [
        "apt-get",
        *("-o", f"Dir::State::lists={tmp_path}/lists"),
        *("-o", f"Dir::State::status={tmp_path}/status"),
        *("-o", f"Dir::Cache={tmp_path}"),
        *("-o", f"Dir::Etc::sourcelist={tmp_path}/sources"),
        *("-o", f"Dir::Etc::sourceparts={tmp_path}/parts"),
        *("-o", f"Dir::Etc::preferencesparts={tmp_path}/parts"),
        *("-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User=root"),
    ]
    subprocess.run([*apt, "-qq", "update"], check=True, timeout=240)
    packages = list(map(str, newest_debs(engine=engine)))
    done = subprocess.run(
        [*apt, "--simulate", "--no-install-recommends", "install", *packages],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Inst agent-assembly " in done.stdout and f"Inst {ENGINE} " in done.stdout
    other = {"deb12": "deb13", "deb13": "deb12"}[engine]
    wrong = subprocess.run(
        [*apt, "--simulate", "install", *map(str, newest_debs(engine=other))],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert wrong.returncode != 0 and f"{ENGINE} : Depends: python3" in wrong.stdout, wrong.stdout
