"""The system's trust store: our root goes in and comes out by Debian's own tool, Java's store included.

`update-ca-certificates` takes a certificate from its store only when its configuration says so with
a `!`; one that has merely vanished stays behind as a dangling link and in Java's store. So removal
runs it with a configuration that names our files in that way, and nothing else in the store moves.
"""

from __future__ import annotations

import os
import re
import signal
import ssl
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from aa.ca import java
from aa.ca.certificate import Certificate, certificate_pem, fingerprint, short_fingerprint
from aa.ca.errors import CertificateAuthorityError

LOCAL = Path("/usr/local/share/ca-certificates")
CONFIGURATION = Path("/etc/ca-certificates.conf")
STORE = Path("/etc/ssl/certs")
BUNDLE = STORE / "ca-certificates.crt"
UPDATE = "/usr/sbin/update-ca-certificates"

UPDATE_SECONDS = 180.0
"""How long the update with all its hooks may take; Java's is the slow one."""
MAX_BUNDLE = 16 * 1024 * 1024
TRUST_MODE, DIRECTORY_MODE = 0o644, 0o755
OURS = re.compile(r"agent-assembly-[0-9a-f]{16}")
ALIAS = "debian:"
"""What Debian puts before a certificate's name in Java's store."""


@dataclass(frozen=True, slots=True)
class Trust:
    """Where a root is trusted. `java` is None where Java has no store (or one that cannot be read)."""

    system: bool
    java: bool | None
    problem: str = ""

    @property
    def complete(self) -> bool:
        return self.system and self.java is not False

    @property
    def absent(self) -> bool:
        return not self.system and not self.java


def name_of(root: Certificate) -> str:
    return f"agent-assembly-{short_fingerprint(root)}"


def state(root: Certificate) -> Trust:
    """Where this root is trusted now, read from the stores themselves."""
    der = root.public_bytes(serialization.Encoding.DER)
    system = (STORE / f"{name_of(root)}.pem").exists() and der in _bundle()
    try:
        stored = java.trusted()
    except (java.UnknownFormat, OSError) as e:
        return Trust(system, None, str(e))
    return Trust(system, None if stored is None else der in stored.values())


def installed() -> list[str]:
    """The names under which roots of ours are, or have left something, in any store."""
    found = {p.stem for p in LOCAL.glob("agent-assembly-*.crt")}
    found |= {p.stem for p in STORE.glob("agent-assembly-*.pem")}
    found |= {alias.removeprefix(ALIAS).removesuffix(".pem") for alias in _java_aliases()}
    return sorted(name for name in found if OURS.fullmatch(name))


def install(root: Certificate) -> Trust:
    """Puts a root into the stores and checks that it is there. Does nothing where it is already.

    Raises `CertificateAuthorityError` when it is not in the system's store afterwards.
    """
    before = state(root)
    if before.complete and (LOCAL / f"{name_of(root)}.crt").exists():
        return before
    if not LOCAL.exists():
        LOCAL.mkdir(DIRECTORY_MODE)
        LOCAL.chmod(DIRECTORY_MODE)
    if before.java is False:
        # a certificate that is linked already is not told to Java again
        (STORE / f"{name_of(root)}.pem").unlink(missing_ok=True)
    _write(LOCAL / f"{name_of(root)}.crt", certificate_pem(root))
    said = _update([])
    after = state(root)
    if not after.system:
        raise CertificateAuthorityError(
            f"root {fingerprint(root)} is not in {BUNDLE}: {said}",
            fix=f"run {UPDATE} and see what it says",
        )
    return after


def uninstall(*, keep: Certificate | None = None) -> list[str]:
    """Takes every root of ours but `keep` out of the stores, with all its traces. Returns their names.

    Raises `CertificateAuthorityError` when something stays behind.
    """
    kept = name_of(keep) if keep else ""
    names = [name for name in installed() if name != kept]
    if not names:
        return []
    for name in names:
        link = STORE / f"{name}.pem"
        if not link.is_symlink():
            # Java is told of a removal only together with a link's
            link.symlink_to(LOCAL / f"{name}.crt")
        (LOCAL / f"{name}.crt").unlink(missing_ok=True)
    said = _update(names)
    left = [n for n in installed() if n in names]
    if left and not _deferred():
        raise CertificateAuthorityError(
            f"{', '.join(left)} cannot be taken out of the trust store: {said}",
            fix=f"`sudo {UPDATE} --fresh`, then `aasm ca show`",
        )
    return names


def _deferred() -> bool:
    """Whether Java's store changes only when dpkg, which runs this, is done."""
    return "DPKG_MAINTSCRIPT_PACKAGE" in os.environ


def _update(removed: Sequence[str]) -> str:
    """Runs Debian's update; `removed` are names to take out. Returns the end of what it said."""
    if not removed:
        return _run([UPDATE])
    with tempfile.NamedTemporaryFile(prefix="aa-ca-certificates.") as configuration:
        if CONFIGURATION.exists():
            configuration.write(CONFIGURATION.read_bytes())
        configuration.write("".join(f"\n!{name}.crt" for name in removed).encode() + b"\n")
        configuration.flush()
        return _run([UPDATE, "--certsconf", configuration.name])


def _run(command: Sequence[str]) -> str:
    """Runs a command in a session of its own, so that nothing of it is left at the deadline."""
    # dpkg's variables tell Java's hook whether it is dpkg that waits for it
    environment = {k: v for k, v in os.environ.items() if k.startswith("DPKG_")}
    environment |= {"PATH": "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            umask=0o022,
            cwd="/",
            start_new_session=True,
        )
    except FileNotFoundError:
        raise CertificateAuthorityError(
            f"{command[0]} is not installed", fix="sudo apt install ca-certificates"
        ) from None
    try:
        said, _ = process.communicate(timeout=UPDATE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise CertificateAuthorityError(
            f"{command[0]} takes longer than {UPDATE_SECONDS:.0f} s", fix="run it by hand"
        ) from None
    told = " ".join(said.split())[-400:]
    if process.returncode:
        raise CertificateAuthorityError(
            f"{command[0]} failed ({process.returncode}): {told}", fix="run it by hand"
        )
    return told


def _write(path: Path, data: bytes) -> None:
    # Debian lets the group staff write to this directory; its members may install authorities anyway.
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, TRUST_MODE)
        file.write(data)
    os.rename(fresh, path)


def _bundle() -> set[bytes]:
    """The certificates (DER) of the system's bundle."""
    try:
        with BUNDLE.open(encoding="ascii", errors="replace") as file:
            text = file.read(MAX_BUNDLE)
    except FileNotFoundError:
        return set()
    blocks = re.findall(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", text, re.DOTALL)
    found = set()
    for block in blocks:
        try:
            found.add(ssl.PEM_cert_to_DER_cert(block))
        except ValueError:
            continue  # not ours to judge: others' certificates
    return found


def _java_aliases() -> list[str]:
    try:
        return list(java.trusted() or ())
    except (java.UnknownFormat, OSError):
        return []
