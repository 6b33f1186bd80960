"""`aasm ca`: what this host's certificate authority is, and a new one; `aasm proxy install-ca` and back."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from aa.ca import authority, files, tell, trust
from aa.ca.authority import Published
from aa.ca.certificate import (
    RESERVED_NAME,
    Certificate,
    constraint_texts,
    fingerprint,
    issued,
    name_constraints,
    validity,
)
from aa.ca.errors import CertificateAuthorityError
from aa.ca.places import Places
from aa.cli.errors import NOT_PERMITTED, Failure
from aa.cli.output import json_option, print_json, print_table
from aa.cli.units import systemctl

SERVICE = "aa-ca.service"
STEP_SECONDS = 120.0
"""How long one step of the authority, a process of its own, may take."""
NEED_A_RESTART = "programs that run already know the old trust store until they are started again"


@click.group()
def ca() -> None:
    """Show and renew this host's certificate authority."""


@ca.command(
    epilog="""\b
Examples:
  aasm ca show
  aasm ca show --json | jq -r .root.fingerprint

Anybody may ask. Exits with 1 when there is no authority, or something is wrong with it."""
)
@json_option
def show(as_json: bool) -> None:
    """Show the root and the intermediate: fingerprints, lifetimes, limits, trust."""
    places = Places()
    known = _published(places)
    told = _told(known, places)
    if as_json:
        print_json(told)
    else:
        _print(told)
    if told["problems"]:
        click.get_current_context().exit(1)


@ca.command(
    epilog="""\b
Examples:
  sudo aasm ca rotate

What happens, in this order:
  1. a new root is made, and not used yet
  2. the trust store learns it, if it knows the old one
  3. it becomes the root; the old root's key is gone
  4. aa-ca.service issues a new intermediate, which the proxy takes into use at once
  5. the trust store forgets the old root

Connections go on. Programs that read the trust store before (runs that live now) accept
inspected connections again only after they are started anew. If a step fails, what was
before it holds, and the command can be run again. Each step is in the audit log."""
)
def rotate() -> None:
    """Replace the root and everything below it."""
    _need_root()
    places = Places()
    old = _old_root(places)
    trusted = bool(old and trust.state(old).system) or bool(trust.installed())
    try:
        _step("--stage", "--record")
        new = authority.staged(places)
        if new is None:
            raise CertificateAuthorityError("the new root is not there", fix="run it again")
        click.echo(f"1. made root {fingerprint(new)}", err=True)
        if trusted:
            with files.locked(places.root):
                trust.install(new)
            tell.record(f"root {fingerprint(new)} is in the trust store", root=fingerprint(new))
        click.echo(
            f"2. {'the trust store knows it' if trusted else 'no trust store to tell'}", err=True
        )
        _step("--commit", "--record")
        click.echo("3. it is the root now; the old key is gone", err=True)
        _issue()
        click.echo("4. the proxy has a new intermediate", err=True)
        with files.locked(places.root):
            gone = trust.uninstall(keep=new)
    except CertificateAuthorityError as e:
        raise Failure(f"rotation is not finished: {e.what}", hint=e.fix or "run it again") from e
    except Failure as e:
        raise Failure(
            f"rotation is not finished: {e.message}", hint=e.hint, code=e.exit_code
        ) from e
    for name in gone:
        tell.record(f"{name} is out of the trust store")
    click.echo(f"5. {', '.join(gone) or 'nothing'} is out of the trust store", err=True)
    click.echo(NEED_A_RESTART, err=True)


@click.command(
    "install-ca",
    epilog="""\b
Examples:
  sudo aasm proxy install-ca
  sudo aasm proxy install-ca && aasm ca show

Puts this host's root into the system's trust store by update-ca-certificates, and so into
Java's where ca-certificates-java is installed. Programs with a store of their own (Node,
requests and httpx from PyPI) get it from the variables that `aasm run` sets. Does nothing
when it is there already.""",
)
def install_ca() -> None:
    """Put this host's root into the system's trust store."""
    _need_root()
    places = Places()
    known = _published(places)
    try:
        with files.locked(places.root):
            state = trust.install(known.root)
    except CertificateAuthorityError as e:
        raise Failure(e.what, hint=e.fix) from e
    name = fingerprint(known.root)
    tell.record(f"root {name} is in the trust store", root=name)
    click.echo(f"root {name} is in the system's trust store", err=True)
    if state.java is False:
        click.echo(
            "Java's store does not have it yet: `sudo dpkg --triggers-only --pending`", err=True
        )
    if state.problem:
        click.echo(f"Java's store cannot be read: {state.problem}", err=True)


@click.command(
    "uninstall-ca",
    epilog="""\b
Examples:
  sudo aasm proxy uninstall-ca

Takes every root of Agent Assembly out of the system's trust store and Java's; the store is
then as it was before. The authority itself stays; inspected connections of programs that
use the system's store fail from now on.""",
)
def uninstall_ca() -> None:
    """Take this host's root out of the system's trust store."""
    _need_root()
    try:
        names = trust.uninstall()
    except CertificateAuthorityError as e:
        raise Failure(e.what, hint=e.fix) from e
    for name in names:
        tell.record(f"{name} is out of the trust store")
    click.echo(f"{', '.join(names) or 'nothing'} taken out of the trust store", err=True)


def _published(places: Places) -> Published:
    try:
        known = authority.published(places)
    except CertificateAuthorityError as e:
        raise Failure(e.what, hint=e.fix) from e
    except PermissionError as e:
        raise Failure(f"{e.filename}: not permitted", code=NOT_PERMITTED) from e
    if known is None:
        raise Failure(
            "this host has no certificate authority yet", hint=f"`sudo systemctl start {SERVICE}`"
        )
    return known


def _old_root(places: Places) -> Certificate | None:
    """The root as it is, or None when it cannot be read: that is what a rotation may be for."""
    try:
        known = authority.published(places)
    except (CertificateAuthorityError, OSError) as e:
        click.echo(f"the old root cannot be read ({e}); it is replaced all the same", err=True)
        return None
    return known.root if known else None


def _need_root() -> None:
    if os.geteuid() != 0:
        raise Failure(
            "only root changes what this host trusts", hint="use sudo", code=NOT_PERMITTED
        )


def _step(*arguments: str) -> None:
    """One step of the authority, in a process that does nothing else: it holds the root's key."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-m", "aa.ca", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=STEP_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CertificateAuthorityError(
            f"{arguments[0]} takes too long", fix="run it again"
        ) from None
    if done.returncode:
        raise CertificateAuthorityError(done.stderr.strip() or f"{arguments[0]} failed")


def _issue() -> None:
    """A new intermediate: by the service where there is systemd, directly where there is not."""
    if Path("/run/systemd/system").is_dir():
        systemctl("start", SERVICE)
    else:
        _step("--init")


def _told(known: Published, places: Places) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC)
    state = trust.state(known.root)
    intermediate = known.intermediate
    return {
        "root": {**_certificate_json(known.root), "file": str(places.root_certificate)},
        "intermediate": _intermediate_json(intermediate) if intermediate else None,
        "trust": {"system": state.system, "java": state.java, "problem": state.problem},
        "rotating": known.rotating,
        "problems": _problems(known, now),
    }


def _certificate_json(certificate: Certificate) -> dict[str, Any]:
    begins, ends = validity(certificate)
    return {
        "subject": certificate.subject.rfc4514_string(),
        "fingerprint": fingerprint(certificate),
        "serial": f"{certificate.serial_number:x}",
        "not_before": begins.isoformat(),
        "not_after": ends.isoformat(),
    }


def _intermediate_json(certificate: Certificate) -> dict[str, Any]:
    constraints = name_constraints(certificate)
    permitted, excluded = constraint_texts(constraints)
    limits = {"limited": constraints is not None, "permitted": permitted, "excluded": excluded}
    return {**_certificate_json(certificate), "constraints": limits}


def _problems(known: Published, now: datetime.datetime) -> list[str]:
    found = []
    begins, ends = validity(known.root)
    if not begins <= now < ends:
        found.append("the root is out of its time: check the clock, or `sudo aasm ca rotate`")
    elif ends - now < authority.ROOT_ENDS_SOON:
        found.append(f"the root ends in {(ends - now).days} days: `sudo aasm ca rotate`")
    if known.intermediate is None:
        found.append(f"there is no intermediate: `sudo systemctl start {SERVICE}`")
    else:
        begins, ends = validity(known.intermediate)
        if not issued(known.root, known.intermediate):
            found.append(f"the intermediate is another root's: `sudo systemctl start {SERVICE}`")
        elif not begins <= now < ends:
            found.append(f"the intermediate is out of its time: `sudo systemctl start {SERVICE}`")
    if known.rotating:
        found.append("a rotation was begun and not finished: `sudo aasm ca rotate`")
    return found


def _print(told: dict[str, Any]) -> None:
    root, intermediate, state = told["root"], told["intermediate"], told["trust"]
    rows = [("root", root["subject"]), *_rows(root)]
    rows.append(("file", root["file"]))
    rows.append(("system's trust store", "trusted" if state["system"] else "not in it"))
    java = {True: "trusted", False: "not in it", None: state["problem"] or "there is none"}
    rows.append(("Java's trust store", java[state["java"]]))
    if intermediate:
        rows += [("", ""), ("intermediate", intermediate["subject"]), *_rows(intermediate)]
        rows.append(("may sign for", _limits(intermediate["constraints"])))
    print_table(("", ""), rows)
    for problem in told["problems"]:
        click.echo(f"problem: {problem}", err=True)


def _rows(certificate: dict[str, Any]) -> list[tuple[str, str]]:
    times = [datetime.datetime.fromisoformat(certificate[k]) for k in ("not_before", "not_after")]
    return [
        ("SHA-256", certificate["fingerprint"]),
        ("valid", f"{times[0]:%F %H:%M}Z to {times[1]:%F %H:%M}Z"),
    ]


def _limits(constraints: dict[str, Any]) -> str:
    if not constraints["limited"]:
        return "every name and address"
    permitted = constraints["permitted"]
    if permitted == [RESERVED_NAME]:
        return "nothing: no host is inspected"
    names = ", ".join(permitted) if permitted else "every name"
    return (
        f"{names}; not for {', '.join(constraints['excluded'])}"
        if constraints["excluded"]
        else names
    )
