"""What the packages say they need is what the code uses, and what units start is there."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
UNITS = sorted((TOP / "units").glob("*.service"))
DAEMONS = [unit for unit in UNITS if "Type=oneshot" not in unit.read_text()]

DEBIAN_PACKAGE = {
    "click": "python3-click",
    "cryptography": "python3-cryptography",
    "dns": "python3-dnspython",
    "h11": "python3-h11",
    "hpack": "python3-hpack",
    "idna": "python3-idna",
    "iptc": "python3-iptables",
    "jsonschema": "python3-jsonschema",
    "psutil": "python3-psutil",
    "pystemd": "python3-pystemd",
    "rich": "python3-rich",
    "tomli_w": "python3-tomli-w",
}
DISTRIBUTION = {"dns": "dnspython", "iptc": "python-iptables", "tomli_w": "tomli-w"}


ENGINE = {"mitmproxy": "mitmproxy", "OpenSSL": "pyopenssl", "wsproto": "wsproto"}
"""Modules that the inspection worker has from agent-assembly-inspect, and what is pinned there."""


def imported(directory: str = "aa") -> set[str]:
    """The modules outside the standard library that the package imports anywhere."""
    return _imported(directory) - set(ENGINE)


def _imported(directory: str) -> set[str]:
    found = set()
    for path in (TOP / directory).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"aa"}


def depends(field: str) -> set[str]:
    control = (TOP / "packaging/deb/control").read_text()
    block = re.search(rf"^{field}:\n((?: .*\n)+)", control, re.MULTILINE)
    assert block is not None
    return {line.split()[0].rstrip(",") for line in block[1].splitlines() if "${" not in line}


def test_deb_depends_on_exactly_the_modules_that_are_imported() -> None:
    wanted = {DEBIAN_PACKAGE[module] for module in imported()}
    assert {p for p in depends("Depends") if p.startswith("python3-")} == wanted


def test_only_the_inspection_worker_imports_what_the_engine_brings() -> None:
    inside = _imported("aa/proxy/inspect") & set(ENGINE)
    assert inside == set(ENGINE)
    for path in (TOP / "aa").rglob("*.py"):
        if path.parent != TOP / "aa/proxy/inspect":
            found = re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
            assert not set(found) & set(ENGINE), path
    for suite in ("py311", "py313"):
        pinned = (TOP / f"packaging/inspect/requirements-{suite}.txt").read_text()
        for name in ENGINE.values():
            assert re.search(rf"^{name}==", pinned, re.MULTILINE), name


def test_distribution_depends_on_exactly_the_modules_that_are_imported() -> None:
    project = (TOP / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert block is not None
    assert set(re.findall(r'"([\w-]+)"', block[1])) == {DISTRIBUTION.get(m, m) for m in imported()}


def test_list_for_building_and_testing_has_all_that_the_deb_needs() -> None:
    listed = set(re.sub("#.*", "", (TOP / "packaging/packages.txt").read_text()).split())
    needed = depends("Depends") | depends("Build-Depends")
    assert {p for p in needed if not p.startswith(("dh-sequence-", "debhelper-compat"))} - {
        "python3"
    } <= listed


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_every_service_starts_a_module_that_is_there(unit: Path) -> None:
    started = re.findall(
        r"^ExecStart=/usr/bin/python3 -I -m (\S+)(?: .*)?$", unit.read_text(), re.MULTILINE
    )
    assert len(started) == 1, "one ExecStart= in the isolated mode of Python"
    assert (TOP / started[0].replace(".", "/") / "__main__.py").exists()


@pytest.mark.parametrize("unit", DAEMONS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "directive",
    ["Type=notify", "WatchdogSec=", "Restart=always", "NoNewPrivileges=yes", "LimitCORE=0"],
)
def test_every_daemon_is_watched_and_restarted(unit: Path, directive: str) -> None:
    assert re.search(rf"^{re.escape(directive)}", unit.read_text(), re.MULTILINE)


def test_version_of_the_deb_is_that_of_the_code() -> None:
    code = re.search(r'__version__ = "(.*)"', (TOP / "aa/__init__.py").read_text())
    deb = re.match(r"agent-assembly \((.*)\)", (TOP / "packaging/deb/changelog").read_text())
    assert code is not None and deb is not None and code[1] == deb[1]
