"""The root and the intermediate on disk: making, renewing and rotating them, safe at every power cut.

Every function here expects the caller to hold `files.locked(places.root)`, except `published`.
"""

from __future__ import annotations

import datetime
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from aa.ca import files
from aa.ca.certificate import (
    Certificate,
    Key,
    belongs,
    certificate_pem,
    constraints_for,
    fingerprint,
    issued,
    key_pem,
    make_intermediate,
    make_root,
    name_constraints,
    new_key,
    parse_certificate,
    parse_key,
    validity,
)
from aa.ca.errors import CertificateAuthorityError
from aa.ca.inspected import NOTHING, Inspected
from aa.ca.places import Places

ROOT_DIRECTORY_MODE, PROXY_DIRECTORY_MODE = 0o755, 0o750
RENEW_BELOW = 0.5
"""The share of the intermediate's life that is left when it is renewed."""
ROOT_ENDS_SOON = datetime.timedelta(days=90)

ROTATE = "`sudo aasm ca rotate` makes a new root"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Renewal:
    """What became of the intermediate. `why` is empty when it stayed."""

    intermediate: Certificate
    why: str = ""


@dataclass(frozen=True, slots=True)
class Published:
    """What everybody may know of the authority."""

    root: Certificate
    intermediate: Certificate | None
    rotating: bool
    """A new root waits to be taken into use."""


def make_directories(places: Places, gid: int) -> None:
    """Makes what is missing of the two directories. Raises `UnsafeFile` when one is not as it should be."""
    files.make_directory(places.root, mode=ROOT_DIRECTORY_MODE)
    files.make_directory(places.proxy, mode=PROXY_DIRECTORY_MODE, gid=gid)


def ensure_root(places: Places, *, host: str, now: datetime.datetime) -> bool:
    """Makes the root where there is none. Returns whether it did."""
    _finish_commit(places)
    if places.root_certificate.exists():
        return False
    if places.root_key.exists():
        raise CertificateAuthorityError(
            f"{places.root_key} is there and {places.root_certificate} is not",
            fix=f"put the certificate back, or {ROTATE}",
        )
    stage(places, host=host, now=now)
    commit(places)
    return True


def stage(places: Places, *, host: str, now: datetime.datetime) -> Certificate:
    """Makes a new root that is not used yet, in place of one that was staged before."""
    key = new_key()
    certificate = make_root(key, host=host, now=now)
    for stale in (places.next_certificate, places.next_key):
        stale.unlink(missing_ok=True)
    files.write(places.next_key, key_pem(key), mode=files.SECRET)
    files.write(places.next_certificate, certificate_pem(certificate), mode=files.PUBLIC)
    return certificate


def staged(places: Places) -> Certificate | None:
    try:
        pem = files.read_public(places.next_certificate)
    except FileNotFoundError:
        return None
    return parse_certificate(pem, str(places.next_certificate))


def commit(places: Places) -> Certificate:
    """Makes the staged root the root. Two renames: `_finish_commit` does the second after a power cut."""
    key = parse_key(files.read_secret(places.next_key), str(places.next_key))
    certificate = parse_certificate(
        files.read_public(places.next_certificate), str(places.next_certificate)
    )
    if not belongs(key, certificate):
        raise CertificateAuthorityError("the staged root's key and certificate differ", fix=ROTATE)
    files.rename(places.next_key, places.root_key)
    files.rename(places.next_certificate, places.root_certificate)
    return certificate


def _finish_commit(places: Places) -> None:
    """After a power cut between the two renames: the key is the staged certificate's already."""
    if places.next_key.exists() or not places.next_certificate.exists():
        return
    if not places.root_key.exists():
        return
    key = parse_key(files.read_secret(places.root_key), str(places.root_key))
    certificate = staged(places)
    if certificate is not None and belongs(key, certificate):
        log.warning("the root's rotation was interrupted; it is finished now")
        files.rename(places.next_certificate, places.root_certificate)


def read_root(places: Places) -> tuple[Key, Certificate]:
    """The root's key and certificate, checked. Only the service of the authority calls this."""
    try:
        key = parse_key(files.read_secret(places.root_key), str(places.root_key))
        certificate = parse_certificate(
            files.read_public(places.root_certificate), str(places.root_certificate)
        )
    except FileNotFoundError as e:
        raise CertificateAuthorityError(f"{e.filename} is missing", fix=ROTATE) from None
    if not belongs(key, certificate):
        raise CertificateAuthorityError(
            f"{places.root_key} is not the key of {places.root_certificate}",
            fix=f"put back the one that belongs to the other, or {ROTATE}",
        )
    return key, certificate


def renew(
    places: Places,
    *,
    inspected: Inspected | None,
    host: str,
    gid: int,
    now: datetime.datetime,
    force: bool = False,
) -> Renewal:
    """Issues a new intermediate when the one in use ends soon or does not fit; otherwise keeps it.

    `inspected` None means that nobody said: the constraints stay, and without any before it may
    sign for nothing.
    """
    root_key, root = read_root(places)
    if validity(root)[1] - now < ROOT_ENDS_SOON:
        log.warning("the root ends on %s; %s", f"{validity(root)[1]:%F}", ROTATE)
    used = _used(places, gid)
    if inspected is None:
        constraints = _last_constraints(places, used)
    else:
        constraints = constraints_for(inspected)
        if inspected.cut:
            log.warning("the intermediate is not limited as asked: %s", inspected.cut)
    why = "it was asked for" if force else _why_renew(used, root, constraints, now)
    if used is not None and not why:
        _publish(places, used)
        return Renewal(used)
    key = new_key()
    certificate = make_intermediate(
        key, root_key, root, host=host, constraints=constraints, now=now
    )
    both = key_pem(key) + certificate_pem(certificate)
    files.write(places.intermediate, both, mode=files.GROUP_SECRET, gid=gid)
    _publish(places, certificate)
    return Renewal(certificate, why)


def read_intermediate(path: Path) -> tuple[Key, Certificate]:
    """The proxy's key and certificate. Raises `CertificateAuthorityError`, `OSError`."""
    where = str(path)
    pem = files.read_secret(path, group_reads=True)
    key, certificate = parse_key(pem, where), parse_certificate(pem, where)
    if not belongs(key, certificate):
        raise CertificateAuthorityError(
            f"key and certificate in {where} differ",
            fix="`sudo systemctl start aa-ca` makes new ones",
        )
    return key, certificate


def published(places: Places) -> Published | None:
    """What anybody may read, or None where there is no root yet. Raises `CertificateAuthorityError`."""
    try:
        pem = files.read_public(places.root_certificate)
    except FileNotFoundError:
        return None
    root = parse_certificate(pem, str(places.root_certificate))
    try:
        pem = files.read_public(places.published)
    except FileNotFoundError:
        return Published(root, None, places.next_certificate.exists())
    intermediate = parse_certificate(pem, str(places.published))
    return Published(root, intermediate, places.next_certificate.exists())


def _used(places: Places, gid: int) -> Certificate | None:
    """The intermediate in use, or None when it is missing or not as it should be: then it is replaced."""
    try:
        _, certificate = read_intermediate(places.intermediate)
        owner = os.stat(places.intermediate)
    except FileNotFoundError:
        return None
    except (CertificateAuthorityError, OSError) as e:
        log.warning("the intermediate cannot be used and is replaced: %s", e)
        return None
    if gid not in (-1, owner.st_gid):
        log.warning("the intermediate belongs to gid %d and is replaced", owner.st_gid)
        return None
    return certificate


def _last_constraints(places: Places, used: Certificate | None) -> x509.NameConstraints | None:
    """Those of the intermediate in use, or of the published one when that cannot be read."""
    if used is None:
        try:
            pem = files.read_public(places.published)
            used = parse_certificate(pem, str(places.published))
        except (CertificateAuthorityError, OSError):
            return constraints_for(NOTHING)
    return name_constraints(used)


def _why_renew(
    used: Certificate | None,
    root: Certificate,
    constraints: x509.NameConstraints | None,
    now: datetime.datetime,
) -> str:
    if used is None:
        return "there was none"
    if not issued(root, used):
        return "the root is a new one"
    begins, ends = validity(used)
    if now < begins:
        return "it begins in the future"
    if ends - now < (ends - begins) * RENEW_BELOW:
        return f"it ends on {ends:%F %H:%M}Z"
    if name_constraints(used) != constraints:
        return "other hosts are inspected"
    return ""


def _publish(places: Places, certificate: Certificate) -> None:
    """The copy without the key; information only, so it may lag behind for a moment."""
    pem = certificate_pem(certificate)
    try:
        if files.read_public(places.published) == pem:
            return
    except (CertificateAuthorityError, OSError) as e:
        log.debug("%s is written anew: %s", places.published, e)
    files.write(places.published, pem, mode=files.PUBLIC)


def describe(renewal: Renewal) -> str:
    """One line for the journal and the audit log."""
    ends = validity(renewal.intermediate)[1]
    if not renewal.why:
        return f"the intermediate stays, until {ends:%F %H:%M}Z"
    return (
        f"issued intermediate {fingerprint(renewal.intermediate)}, until {ends:%F %H:%M}Z, "
        f"because {renewal.why}"
    )
