"""What the three kinds of certificate look like: root, intermediate, leaf. Values in, values out, no files."""

from __future__ import annotations

import datetime
import ipaddress
import re
import secrets
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from aa.ca.errors import CannotIssue, CertificateAuthorityError
from aa.ca.inspected import NAME, Inspected

ROOT_LIFE = datetime.timedelta(days=3650)
INTERMEDIATE_LIFE = datetime.timedelta(days=7)
LEAF_LIFE = datetime.timedelta(days=2)
CLOCK_SKEW = datetime.timedelta(hours=1)
"""How far in the past a certificate begins, for clients whose clock is behind."""
SERIAL_BITS = 128
COMMON_NAME_LIMIT = 64
"""Characters of a common name (ub-common-name of RFC 5280)."""
ORGANIZATION = "Agent Assembly"
RESERVED_NAME = "invalid"
"""A name that no host has (RFC 2606): what an intermediate is limited to that may sign for nothing."""

Key = ec.EllipticCurvePrivateKey
Certificate = x509.Certificate
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def new_key() -> Key:
    return ec.generate_private_key(ec.SECP256R1())


def make_root(key: Key, *, host: str, now: datetime.datetime) -> Certificate:
    """This host's own root. Its name is unique, so two roots of one host are never confused."""
    name = _authority_name("root", key, host)
    builder = _builder(name, name, key, now - CLOCK_SKEW, now + ROOT_LIFE)
    builder = _authority_extensions(builder, key, path_length=1)
    return builder.sign(key, hashes.SHA256())


def make_intermediate(
    key: Key,
    root_key: Key,
    root: Certificate,
    *,
    host: str,
    constraints: x509.NameConstraints | None,
    now: datetime.datetime,
) -> Certificate:
    """What the proxy signs with. Raises `CannotIssue` when the root is out of its time."""
    begins, ends = validity(root)
    if not begins <= now < ends:
        raise CannotIssue(
            f"the root is valid from {begins:%F} to {ends:%F} and now is {now:%F %H:%M}Z",
            fix="check the clock; if it is right: `sudo aasm ca rotate`",
        )
    builder = _builder(
        _authority_name("proxy", key, host),
        root.subject,
        key,
        max(begins, now - CLOCK_SKEW),
        min(ends, now + INTERMEDIATE_LIFE),
    )
    builder = _authority_extensions(builder, key, path_length=0)
    builder = builder.add_extension(_issued_by(root), critical=False)
    builder = builder.add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
    )
    if constraints is not None:
        builder = builder.add_extension(constraints, critical=True)
    return builder.sign(root_key, hashes.SHA256())


@dataclass(frozen=True)
class Issuer:
    """An intermediate with its key, and what of it every leaf needs, read once."""

    key: Key
    certificate: Certificate

    @cached_property
    def validity(self) -> tuple[datetime.datetime, datetime.datetime]:
        return validity(self.certificate)

    @cached_property
    def constraints(self) -> x509.NameConstraints | None:
        return name_constraints(self.certificate)

    @cached_property
    def identifier(self) -> x509.AuthorityKeyIdentifier:
        return _issued_by(self.certificate)

    @cached_property
    def subject(self) -> x509.Name:
        return self.certificate.subject


def make_leaf(key: Key, issuer: Issuer, host: str, *, now: datetime.datetime) -> Certificate:
    """A server certificate for exactly this host, a canonical name or an address as text.

    Raises `CannotIssue` for anything else, for a host outside the intermediate's constraints, and
    when the intermediate is out of its time.
    """
    subject = host_name(host)
    begins, ends = issuer.validity
    if not begins <= now < ends:
        raise CannotIssue(
            f"the proxy's intermediate is valid from {begins:%F %H:%M}Z to {ends:%F %H:%M}Z and now "
            f"is {now:%F %H:%M}Z",
            fix="`sudo systemctl start aa-ca` issues a new one",
        )
    if not permits(issuer.constraints, subject):
        raise CannotIssue(
            f"the proxy's intermediate may not sign for {host}",
            fix="it follows the policy within seconds; if not: `sudo systemctl start aa-ca`",
        )
    attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION)]
    if isinstance(subject, x509.DNSName) and len(host) <= COMMON_NAME_LIMIT:
        attributes.append(x509.NameAttribute(NameOID.COMMON_NAME, host))
    builder = _builder(
        x509.Name(attributes),
        issuer.subject,
        key,
        max(begins, now - CLOCK_SKEW),
        min(ends, now + LEAF_LIFE),
    )
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([subject]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(issuer.identifier, critical=False)
        .sign(issuer.key, hashes.SHA256())
    )


def constraints_for(inspected: Inspected) -> x509.NameConstraints | None:
    """The name constraints of an intermediate, or None when it may sign for everything.

    A permitted domain says nothing about addresses, so those are excluded unless they are listed.
    """
    permitted: list[x509.GeneralName] = []
    excluded: list[x509.GeneralName] = []
    if inspected.domains is not None:
        permitted += [x509.DNSName(d) for d in inspected.domains or (RESERVED_NAME,)]
    for everything in (ipaddress.IPv4Network("0.0.0.0/0"), ipaddress.IPv6Network("::/0")):
        wanted = [n for n in inspected.networks if n.version == everything.version]
        if not wanted:
            excluded.append(x509.IPAddress(everything))
        elif wanted != [everything]:
            permitted += [x509.IPAddress(n) for n in wanted]
    if _addresses(permitted) and not excluded and len(_versions(permitted)) == 1:
        # one family is unlimited, which has to be said beside a list of the other
        other = "::/0" if _versions(permitted) == {4} else "0.0.0.0/0"
        permitted.append(x509.IPAddress(ipaddress.ip_network(other)))
    if not permitted and not excluded:
        return None
    return x509.NameConstraints(permitted or None, excluded or None)


def permits(constraints: x509.NameConstraints | None, host: x509.GeneralName) -> bool:
    """Whether a name is within constraints (RFC 5280, 4.2.1.10), for DNS names and addresses."""
    if constraints is None:
        return True
    permitted = [g for g in constraints.permitted_subtrees or () if isinstance(g, type(host))]
    excluded = [g for g in constraints.excluded_subtrees or () if isinstance(g, type(host))]
    if any(_within(host, g) for g in excluded):
        return False
    return not permitted or any(_within(host, g) for g in permitted)


def name_constraints(certificate: Certificate) -> x509.NameConstraints | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.NameConstraints).value
    except x509.ExtensionNotFound:
        return None


def constraint_texts(constraints: x509.NameConstraints | None) -> tuple[list[str], list[str]]:
    """Permitted and excluded subtrees as text; a permitted domain includes everything below it."""
    if constraints is None:
        return [], []
    return (
        [str(g.value) for g in constraints.permitted_subtrees or ()],
        [str(g.value) for g in constraints.excluded_subtrees or ()],
    )


def host_name(host: str) -> x509.DNSName | x509.IPAddress:
    """The subject of a leaf. Raises `CannotIssue` for what is no canonical name or address."""
    try:
        address: Address | None = ipaddress.ip_address(host)
    except ValueError:
        address = None
    if address is not None and str(address) == host and "%" not in host:
        return x509.IPAddress(address)
    if address is not None or not NAME.fullmatch(host) or host.rsplit(".", 1)[-1].isdigit():
        raise CannotIssue(f"{host[:COMMON_NAME_LIMIT]!r} is no canonical host name or address")
    return x509.DNSName(host)


def validity(certificate: Certificate) -> tuple[datetime.datetime, datetime.datetime]:
    """Begin and end, in UTC. Older versions of the library have only the naive ones."""
    known: Any = certificate
    if hasattr(certificate, "not_valid_before_utc"):
        return known.not_valid_before_utc, known.not_valid_after_utc
    return (
        known.not_valid_before.replace(tzinfo=datetime.UTC),
        known.not_valid_after.replace(tzinfo=datetime.UTC),
    )


def belongs(key: Key, certificate: Certificate) -> bool:
    """Whether the certificate is for this key."""
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(*form) == certificate.public_key().public_bytes(*form)


def issued(issuer: Certificate, certificate: Certificate) -> bool:
    """Whether the certificate is signed by the issuer's key."""
    key = issuer.public_key()
    algorithm = certificate.signature_hash_algorithm
    if not isinstance(key, ec.EllipticCurvePublicKey) or algorithm is None:
        return False
    try:
        key.verify(certificate.signature, certificate.tbs_certificate_bytes, ec.ECDSA(algorithm))
    except InvalidSignature:
        return False
    return certificate.issuer == issuer.subject


def fingerprint(certificate: Certificate) -> str:
    """SHA-256 as people compare it: pairs of hexadecimal digits."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def short_fingerprint(certificate: Certificate) -> str:
    """64 bits of it, for file names."""
    return certificate.fingerprint(hashes.SHA256()).hex()[:16]


def certificate_pem(certificate: Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key: Key) -> bytes:
    serializable: Any = key  # the type that says so has another name in each version of the library
    pem: bytes = serializable.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return pem


def parse_key(pem: bytes, name: str) -> Key:
    """Raises `CertificateAuthorityError` without a word of what was in it."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise CertificateAuthorityError(f"{name} holds no key that can be read") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateAuthorityError(f"{name} holds no key of an elliptic curve")
    return key


def parse_certificate(pem: bytes, name: str) -> Certificate:
    """The first certificate. Raises `CertificateAuthorityError`."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise CertificateAuthorityError(f"{name} holds no certificate that can be read") from None


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: Key,
    begins: datetime.datetime,
    ends: datetime.datetime,
) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key.public_key(),
        serial_number=secrets.randbits(SERIAL_BITS) + 1,
        not_valid_before=_naive(begins),
        not_valid_after=_naive(ends),
    )


def _naive(moment: datetime.datetime) -> datetime.datetime:
    """Whole seconds of UTC, as certificates have them and as every version of the library takes them."""
    return moment.astimezone(datetime.UTC).replace(microsecond=0, tzinfo=None)


def _authority_extensions(
    builder: x509.CertificateBuilder, key: Key, *, path_length: int
) -> x509.CertificateBuilder:
    return (
        builder.add_extension(
            x509.BasicConstraints(ca=True, path_length=path_length), critical=True
        )
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _authority_name(role: str, key: Key, host: str) -> x509.Name:
    """`root of HOST 1f2e3d4c`: with a part of the key's identifier, because some clients look up issuers by name."""
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest.hex()[:8]
    frame = f"{role} of  {identifier}"
    clean = re.sub(r"[^A-Za-z0-9._-]", "-", host)[: COMMON_NAME_LIMIT - len(frame)] or "localhost"
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION),
            x509.NameAttribute(NameOID.COMMON_NAME, f"{role} of {clean} {identifier}"),
        ]
    )


def _issued_by(issuer: Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _key_usage(
    *, digital_signature: bool = False, signs_certificates: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _within(host: x509.GeneralName, subtree: x509.GeneralName) -> bool:
    if isinstance(host, x509.DNSName):
        return host.value == subtree.value or host.value.endswith("." + subtree.value)
    address, network = host.value, subtree.value
    return address.version == network.version and address in network


def _addresses(names: list[x509.GeneralName]) -> list[x509.IPAddress]:
    return [n for n in names if isinstance(n, x509.IPAddress)]


def _versions(names: list[x509.GeneralName]) -> set[int]:
    return {n.value.version for n in _addresses(names)}
