"""The certificates themselves, as strict programs see them."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from aa.ca.certificate import (
    INTERMEDIATE_LIFE,
    ROOT_LIFE,
    Issuer,
    belongs,
    constraints_for,
    host_name,
    issued,
    make_intermediate,
    make_leaf,
    make_root,
    new_key,
    parse_certificate,
    parse_key,
    permits,
    validity,
)
from aa.ca.errors import CannotIssue, CertificateAuthorityError
from aa.ca.inspected import parse
from aa.ca.leaf import utc_now
from tests.unit.ca_world import World

HOSTS = ("api.example.com", "a" * 60 + ".example.com", "_dmarc.example", "xn--bcher-kva.example",
         "localhost", "10.1.2.3", "2001:db8::1")  # fmt: skip
NO_HOSTS = ("", ".", "a..b", "API.example.com", "*.example.com", "a.example.com.", "a b", "a\0b",
            "a\nb", "-a.example", "b\u00fccher.example", "1.2.3", "010.0.0.1", "fe80::1%eth0",
            "2001:DB8::1", "::ffff:0a00:0001", "a" * 64 + ".example", "a." * 127 + "example",
            "user@example.com", "https://example.com", "256.1.1.1")  # fmt: skip


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def extension(certificate: x509.Certificate, kind: type) -> tuple[object, bool]:
    found = certificate.extensions.get_extension_for_class(kind)
    return found.value, found.critical


def test_root_signs_one_level_of_authorities_for_ten_years(world: World) -> None:
    root = parse_certificate(world.places.root_certificate.read_bytes(), "root")
    assert extension(root, x509.BasicConstraints) == (x509.BasicConstraints(True, 1), True)
    usage, critical = extension(root, x509.KeyUsage)
    assert critical and usage.key_cert_sign and usage.crl_sign and not usage.digital_signature
    begins, ends = validity(root)
    assert ROOT_LIFE < ends - begins < ROOT_LIFE + datetime.timedelta(days=1)
    assert issued(root, root)
    assert "box.example" in root.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value


def test_two_roots_of_one_host_differ_in_name_and_serial() -> None:
    one, other = (make_root(new_key(), host="box", now=utc_now()) for _ in range(2))
    assert one.subject != other.subject
    assert one.serial_number != other.serial_number


@pytest.mark.parametrize("host", ["", "h" * 300, "b\u00fccher", "a,b=c\n"])
def test_any_host_name_makes_a_valid_subject(host: str) -> None:
    root = make_root(new_key(), host=host, now=utc_now())
    name = root.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    assert name.isascii() and len(name) <= 64


def test_intermediate_signs_servers_only_and_no_authority(world: World) -> None:
    _, intermediate = world.issuer(), world.issuer().issue("a.example").chain[0]
    assert extension(intermediate, x509.BasicConstraints) == (x509.BasicConstraints(True, 0), True)
    usage, _ = extension(intermediate, x509.ExtendedKeyUsage)
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    begins, ends = validity(intermediate)
    assert INTERMEDIATE_LIFE <= ends - begins < INTERMEDIATE_LIFE + datetime.timedelta(hours=2)


@pytest.mark.parametrize("host", HOSTS)
def test_strict_programs_accept_a_leaf_for_its_host(world: World, host: str) -> None:
    leaf = world.issuer().issue(host)
    option = "-verify_ip" if ":" in host or host[0].isdigit() else "-verify_hostname"
    told = world.openssl(leaf, option, host)
    assert told.returncode == 0, told.stderr
    world.handshake(leaf, host)
    if option == "-verify_hostname":
        told = world.certtool(leaf, host)
        assert told.returncode == 0, told.stdout + told.stderr


@pytest.mark.parametrize("host", ["example.com", "x.api.example.com", "10.1.2.4"])
def test_strict_programs_refuse_a_leaf_for_another_host(world: World, host: str) -> None:
    leaf = world.issuer().issue("api.example.com")
    option = "-verify_ip" if host[0].isdigit() else "-verify_hostname"
    assert world.openssl(leaf, option, host).returncode != 0
    with pytest.raises(ssl.SSLCertVerificationError):
        world.handshake(leaf, host)


def test_leaf_names_exactly_its_host(world: World) -> None:
    leaf = world.issuer().issue("api.example.com").certificate
    names, _ = extension(leaf, x509.SubjectAlternativeName)
    assert list(names) == [x509.DNSName("api.example.com")]
    assert extension(leaf, x509.BasicConstraints) == (x509.BasicConstraints(False, None), True)


def test_leaf_for_an_address_has_no_name_at_all(world: World) -> None:
    leaf = world.issuer().issue("10.1.2.3").certificate
    names, _ = extension(leaf, x509.SubjectAlternativeName)
    assert [str(n.value) for n in names] == ["10.1.2.3"]
    assert not leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)


def test_leaves_carry_the_key_identifiers_that_python_3_13_insists_on(world: World) -> None:
    leaf = world.issuer().issue("api.example.com")
    own, _ = extension(leaf.chain[0], x509.SubjectKeyIdentifier)
    issuer, _ = extension(leaf.certificate, x509.AuthorityKeyIdentifier)
    assert issuer.key_identifier == own.digest
    extension(leaf.certificate, x509.SubjectKeyIdentifier)


def test_serials_are_random_and_use_their_128_bits(world: World) -> None:
    issuer = world.issuer()
    serials = {issuer.issue(f"h{n}.example").certificate.serial_number for n in range(64)}
    assert len(serials) == 64
    assert 0 < min(serials) and 2**120 < max(serials) <= 2**128


@pytest.mark.parametrize("host", NO_HOSTS)
def test_what_is_no_canonical_host_gets_no_certificate(world: World, host: str) -> None:
    with pytest.raises(CannotIssue):
        world.issuer().issue(host)


def test_leaf_does_not_outlive_the_intermediate(world: World) -> None:
    issuer = world.issuer()
    first = issuer.issue("a.example")
    world.pass_time(days=6, hours=12)
    last = issuer.issue("a.example")
    end_of_intermediate = validity(last.chain[0])[1]
    assert validity(first.certificate)[1] < end_of_intermediate
    assert validity(last.certificate)[1] == end_of_intermediate


def test_an_intermediate_out_of_its_time_signs_nothing(world: World) -> None:
    issuer = world.issuer()
    issuer.issue("a.example")
    world.pass_time(days=7, minutes=1)
    with pytest.raises(CannotIssue, match="systemctl start aa-ca"):
        issuer.issue("a.example")


def test_a_root_out_of_its_time_signs_nothing() -> None:
    key, now = new_key(), utc_now()
    root = make_root(key, host="box", now=now)
    inside = make_intermediate(new_key(), key, root, host="box", constraints=None, now=now)
    assert issued(root, inside)
    for moment in (now - datetime.timedelta(days=1), now + ROOT_LIFE):
        with pytest.raises(CannotIssue, match="clock"):
            make_intermediate(new_key(), key, root, host="box", constraints=None, now=moment)


def test_an_intermediate_does_not_outlive_the_root() -> None:
    key, now = new_key(), utc_now()
    root = make_root(key, host="box", now=now)
    late = now + ROOT_LIFE - datetime.timedelta(days=2)
    intermediate = make_intermediate(new_key(), key, root, host="box", constraints=None, now=late)
    assert validity(intermediate)[1] == validity(root)[1]


# Limits of the intermediate: (list, permitted, refused)
LIMITS = [
    ("api.example\n**.wild.example\n", ["api.example", "x.api.example", "wild.example", "a.b.wild.example"],
     ["example", "apixexample", "xapi.example", "other.example", "10.0.0.1", "::1"]),
    ("", ["invalid"], ["api.example", "10.0.0.1", "2001:db8::1"]),
    ("**\n", ["api.example", "com"], ["10.0.0.1", "2001:db8::1"]),
    ("api.example\n10.0.0.0/8\n", ["api.example", "10.9.9.9"], ["b.example", "11.0.0.1", "2001:db8::1"]),
    ("10.0.0.0/8\n2001:db8::/32\n", ["10.0.0.1", "2001:db8::5"], ["a.example", "11.0.0.1", "2001:db9::1"]),
    ("10.0.0.0/8\n::/0\n", ["10.0.0.1", "2001:db8::5"], ["a.example", "11.0.0.1"]),
    ("a.example\n0.0.0.0/0\n2001:db8::/32\n", ["a.example", "8.8.8.8", "2001:db8::1"], ["2001:db9::1"]),
    ("**\n0.0.0.0/0\n", ["a.example", "8.8.8.8"], ["2001:db8::1"]),
    ("**\n0.0.0.0/0\n::/0\n", ["a.example", "8.8.8.8", "2001:db8::1"], []),
]  # fmt: skip


@pytest.mark.parametrize(("text", "permitted", "refused"), LIMITS)
def test_an_intermediate_signs_within_its_limits_and_not_outside(
    tmp_path: Path, text: str, permitted: list[str], refused: list[str]
) -> None:
    issuer = World(tmp_path, parse(text)).issuer()
    for host in permitted:
        issuer.issue(host)
    for host in refused:
        with pytest.raises(CannotIssue, match="may not sign for"):
            issuer.issue(host)


@pytest.mark.parametrize(("text", "permitted", "refused"), LIMITS)
def test_other_programs_hold_a_stolen_intermediate_to_its_limits(
    tmp_path: Path, text: str, permitted: list[str], refused: list[str]
) -> None:
    """Signs whatever is asked for, as a thief of the proxy's key would."""
    world = World(tmp_path, parse(text))
    key = parse_key(world.places.intermediate.read_bytes(), "intermediate")
    intermediate = parse_certificate(world.places.published.read_bytes(), "intermediate")
    unlimited = World(tmp_path_of(tmp_path, "unlimited"))
    template = unlimited.issuer()
    for host in (*permitted, *refused):
        shape = template.issue(host)
        forged = resigned(shape.certificate, intermediate, key)
        leaf = type(shape)(host, forged, shape.key, (intermediate,), shape.begins, shape.renew_at)
        told = world.openssl(leaf)
        assert (told.returncode == 0) == (host in permitted), (host, told.stderr)
        told = world.certtool(leaf, host)
        assert (told.returncode == 0) == (host in permitted), (host, told.stdout)


def tmp_path_of(path: Path, name: str) -> Path:
    directory = path / name
    directory.mkdir()
    return directory


def resigned(shape: x509.Certificate, issuer: x509.Certificate, key: object) -> x509.Certificate:
    """The same certificate as if this issuer had signed it, its limits notwithstanding."""
    begins, ends = validity(issuer)
    builder = x509.CertificateBuilder(
        issuer.subject, shape.subject, shape.public_key(), shape.serial_number,
        begins.replace(tzinfo=None), ends.replace(tzinfo=None),
    )  # fmt: skip
    for found in shape.extensions:
        value = found.value
        if isinstance(value, x509.AuthorityKeyIdentifier):
            own = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            value = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)
        builder = builder.add_extension(value, found.critical)
    return builder.sign(key, hashes.SHA256())


def test_without_limits_there_is_no_extension_and_with_them_it_is_critical(tmp_path: Path) -> None:
    assert constraints_for(parse("**\n0.0.0.0/0\n::/0\n")) is None
    world = World(tmp_path, parse("a.example\n"))
    _, critical = extension(world.issuer().issue("a.example").chain[0], x509.NameConstraints)
    assert critical
    assert permits(None, host_name("a.example"))


def test_a_certificate_of_another_key_is_not_taken_for_issued_or_belonging() -> None:
    key, other, now = new_key(), new_key(), utc_now()
    root = make_root(key, host="box", now=now)
    impostor = make_root(other, host="box", now=now)
    child = make_intermediate(new_key(), key, root, host="box", constraints=None, now=now)
    assert issued(root, child) and not issued(impostor, child)
    assert belongs(key, root) and not belongs(other, root)


@pytest.mark.parametrize("junk", [b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
                                  b"\xff" * 100])  # fmt: skip
def test_junk_is_an_error_that_shows_nothing_of_it(junk: bytes) -> None:
    with pytest.raises(CertificateAuthorityError) as caught:
        parse_key(junk, "root.key")
    assert str(caught.value) == "root.key holds no key that can be read"
    with pytest.raises(CertificateAuthorityError):
        parse_certificate(junk, "root.pem")


def test_make_leaf_refuses_by_itself_whatever_its_caller_checked() -> None:
    key, now = new_key(), utc_now()
    root = make_root(key, host="box", now=now)
    limits = constraints_for(parse("a.example\n"))
    intermediate = make_intermediate(key, key, root, host="box", constraints=limits, now=now)
    issuer = Issuer(key, intermediate)
    make_leaf(key, issuer, "a.example", now=now)
    with pytest.raises(CannotIssue):
        make_leaf(key, issuer, "b.example", now=now)
