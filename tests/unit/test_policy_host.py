"""Host names have one form; what could be read in two ways is refused."""

from __future__ import annotations

import ipaddress
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aa.policy.host import Host, InvalidHost, address_of, canonical_host, canonical_label


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("example.org", "example.org"),
        ("EXAMPLE.Org", "example.org"),
        ("example.org.", "example.org"),
        ("localhost", "localhost"),
        ("_dmarc.example.org", "_dmarc.example.org"),
        ("my_bucket.example.org", "my_bucket.example.org"),
        ("r3---sn-abc.example.org", "r3---sn-abc.example.org"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example", "xn--bcher-kva.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("XN--BCHER-KVA.example", "xn--bcher-kva.example"),
        ("straße.de", "xn--strae-oqa.de"),
        ("example。org", "example.org"),
        ("3com.example", "3com.example"),
        ("1.2.3.4.example", "1.2.3.4.example"),
        ("0x7f.example", "0x7f.example"),
        ("a" * 63 + ".org", "a" * 63 + ".org"),
        (".".join(["a" * 49] * 5) + ".aaa", ".".join(["a" * 49] * 5) + ".aaa"),
    ],
)
def test_names_have_one_form(text: str, canonical: str) -> None:
    host = canonical_host(text)
    assert str(host) == canonical
    assert not host.is_address
    assert canonical_host(canonical) == host


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("0:0:0:0:0:0:0:1", "::1"),
        ("2001:DB8::A", "2001:db8::a"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("::ffff:7f00:1", "127.0.0.1"),
        ("１２７.0.0.1", "127.0.0.1"),
    ],
)
def test_addresses_are_addresses_and_not_names(text: str, canonical: str) -> None:
    host = canonical_host(text)
    assert host == Host(canonical, ipaddress.ip_address(canonical))
    assert host.is_address


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "a..b",
        ".a",
        "a..",
        "exam\0ple.org",
        "example.org\0.evil.org",
        "example.org\n",
        "example.org\r\nHost: evil",
        "exam ple.org",
        "exam\tple.org",
        "a\x7fb",
        "a\x85b",
        "user@example.org",
        "example.org/",
        "example.org:443",
        "[::1]",
        "*.example.org",
        "-a.example",
        "a-.example",
        "a" * 64 + ".org",
        ".".join(["a" * 50] * 5),
        "a." * 127 + "aaaa",
        "a" * 10_000,
        "fe80::1%eth0",
        "a%41.example",
        "xn--.example",
        "xn--a.example",
        "xn--bcher-kvb9999999999.example",
        "xn--foo-.example",
        "\ud800.example",
        "a\u200db.example",
        "☕.example",
    ],
)
def test_refuses_what_is_no_name(text: str) -> None:
    with pytest.raises(InvalidHost):
        canonical_host(text)


@pytest.mark.parametrize(
    "text",
    [
        "0x7f.1",
        "0x7f.0.0.1",
        "0x7f000001",
        "0x",
        "2130706433",
        "017700000001",
        "0177.0.0.1",
        "127.1",
        "127.0.1",
        "127.0.0.01",
        "127.0.0.1.",
        "127.0.0.256",
        "1.2.3.4.5",
        "example.1",
        "example.0xff",
        "１２７.１",
        "::ffff:127.1",
        "1::2::3",
    ],
)
def test_refuses_odd_spellings_of_addresses_instead_of_taking_them_for_names(text: str) -> None:
    with pytest.raises(InvalidHost):
        canonical_host(text)


def test_address_of_reads_addresses_only() -> None:
    assert address_of("10.0.0.1") == ipaddress.ip_address("10.0.0.1")
    assert address_of("::ffff:10.0.0.1") == ipaddress.ip_address("10.0.0.1")
    for text in ("example.org", "010.0.0.1", "fe80::1%lo", ""):
        with pytest.raises(InvalidHost):
            address_of(text)


def test_label_is_one_label() -> None:
    assert canonical_label("Bücher") == "xn--bcher-kva"
    for text in ("a.b", "", "a b", "-a", "a。b"):
        with pytest.raises(InvalidHost):
            canonical_label(text)


@given(st.text(max_size=40))
def test_any_text_is_canonical_or_refused_and_canonical_is_final(text: str) -> None:
    try:
        host = canonical_host(text)
    except InvalidHost:
        return
    assert canonical_host(str(host)) == host
    assert set(str(host)) <= set(string.ascii_lowercase + string.digits + "-_.:")


@given(st.text("0123456789abcdefx.:%", min_size=1, max_size=20))
def test_what_looks_like_an_address_is_exactly_one_address_or_no_host(text: str) -> None:
    try:
        host = canonical_host(text)
    except InvalidHost:
        return
    if host.is_address:
        assert ipaddress.ip_address(str(host)) == host.address
    else:
        assert not str(host).rpartition(".")[2].isdecimal()
