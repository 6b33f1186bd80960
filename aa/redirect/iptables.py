"""Reads and writes the rules with the host's own iptables tools, nf_tables or legacy.

Writing is iptables-restore --noflush alone: one transaction for each table, with the
lock of the legacy tools taken by themselves.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from aa.redirect.ruleset import (
    CHAINS,
    V4,
    V6,
    Family,
    MalformedSave,
    RuleSet,
    Tables,
    parse_save,
    removal,
)

COMMAND_SECONDS = 10.0
"""For one call of a tool, its wait for the lock included."""
LOCK_SECONDS = 5
ATTEMPTS = 3
"""Others may change the table between our reading and our writing."""

SEARCH = "/usr/sbin:/sbin:/usr/bin:/bin"
LEGACY_TABLES = {
    V4: Path("/proc/net/ip_tables_names"),
    V6: Path("/proc/net/ip6_tables_names"),
}


class CannotApply(Exception):
    """The rules could not be read, written or confirmed. The text says what and why."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One of the two sets of tools. `kind` is `nf_tables` or `legacy`."""

    kind: str
    suffix: str  # between "iptables" and "-save" in the names of the tools

    def tool(self, family: Family, what: str) -> str:
        name = "iptables" if family.version == 4 else "ip6tables"
        return f"{name}{self.suffix}-{what}"

    def read(self, family: Family) -> Tables:
        """Every table of this backend, with counters. Raises `CannotApply`."""
        tool = self.tool(family, "save")
        try:
            return parse_save(_call([tool, "-c"]))
        except MalformedSave as e:
            raise CannotApply(f"{tool}: {e}") from e

    def write(self, family: Family, text: str) -> None:
        tool = self.tool(family, "restore")
        _call([tool, "--noflush", "-w", str(LOCK_SECONDS)], text)


NF_TABLES = Backend("nf_tables", "-nft")
LEGACY = Backend("legacy", "-legacy")


def detect() -> Backend:
    """The backend that this host's `iptables` is. Raises `CannotApply` when there is none."""
    version = _call(["iptables", "--version"]).strip()
    kind = re.search(r"\((nf_tables|legacy)\)", version)
    if kind is None:
        raise CannotApply(f"iptables says {version!r}, which names no backend")
    chosen = NF_TABLES if kind[1] == "nf_tables" else LEGACY
    return chosen if _found(chosen.tool(V4, "restore")) else Backend(chosen.kind, "")


def others(backend: Backend) -> list[Backend]:
    """Installed backends beside the one in use."""
    both = (NF_TABLES, LEGACY)
    return [b for b in both if b.kind != backend.kind and _found(b.tool(V4, "restore"))]


def apply(backend: Backend, rules: RuleSet, family: Family) -> None:
    """Writes the rules whatever is there, and reads them back. Raises `CannotApply`.

    Old rules stay in force when anything fails.
    """
    problem = ""
    for _ in range(ATTEMPTS):
        present = backend.read(family)
        try:
            backend.write(family, rules.render(family, present))
        except CannotApply as e:
            problem = str(e)
            continue
        found = rules.differences(family, backend.read(family))
        if not found:
            return
        problem = "read back differently: " + "; ".join(found)
    raise CannotApply(problem)


def remove(backend: Backend, family: Family) -> bool:
    """Takes our rules out, leaving every other rule as it is; False when there were none."""
    for _ in range(ATTEMPTS):
        text = removal(backend.read(family))
        if not text:
            return False
        try:
            backend.write(family, text)
        except CannotApply as e:
            problem = e
            continue
        if not has_ours(backend.read(family)):
            return True
        problem = CannotApply(f"{family.name}: chains of ours are still there")
    raise problem


def has_ours(present: Tables) -> bool:
    return any(name in present.get(table, {}) for table, ours in CHAINS.items() for name in ours)


def in_use(backend: Backend, family: Family) -> bool:
    """False where reading this backend would only make empty tables in the kernel."""
    if backend.kind != LEGACY.kind:
        return True
    try:
        return LEGACY_TABLES[family].read_text().strip() != ""
    except OSError:
        return False


def _found(tool: str) -> bool:
    return any(os.access(Path(d) / tool, os.X_OK) for d in SEARCH.split(":"))


def _call(argv: list[str], stdin: str = "") -> str:
    """The output of a tool. Raises `CannotApply` with the first line of its complaint."""
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_SECONDS,
            check=False,
            env={"PATH": SEARCH, "LC_ALL": "C"},
        )
    except FileNotFoundError as e:
        raise CannotApply(f"{argv[0]} is not installed (package iptables)") from e
    except subprocess.TimeoutExpired as e:
        raise CannotApply(f"{argv[0]} did not end within {COMMAND_SECONDS:.0f} s") from e
    except OSError as e:
        raise CannotApply(f"{argv[0]}: {e}") from e
    if done.returncode != 0:
        complaint = " ".join(done.stderr.split())[:400] or f"exit status {done.returncode}"
        raise CannotApply(f"{argv[0]}: {complaint}")
    return done.stdout
