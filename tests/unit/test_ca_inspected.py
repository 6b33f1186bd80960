"""The list of inspected hosts: read strictly, bounded, and never wider by accident."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aa.ca import inspected
from aa.ca.errors import CertificateAuthorityError
from aa.ca.inspected import NOTHING, Inspected, parse, publish, read


def test_patterns_become_the_domains_that_a_certificate_can_be_limited_to() -> None:
    told = parse("api.example\n*.one.example\n**.deep.example\n\n")
    assert told == Inspected(("api.example", "deep.example", "one.example"))


def test_names_below_another_one_are_left_out() -> None:
    assert parse("a.b.example\nb.example\nxb.example\n").domains == ("b.example", "xb.example")


def test_an_empty_list_permits_nothing_and_only_two_stars_permit_every_name() -> None:
    assert parse("") == parse("\n\n") == NOTHING
    assert NOTHING.domains == ()
    assert parse("**\na.example\n").domains is None


def test_networks_are_merged() -> None:
    told = parse("10.0.0.0/9\n10.128.0.0/9\n2001:db8::1\n")
    assert told.networks == (
        ipaddress.IPv4Network("10.0.0.0/8"), ipaddress.IPv6Network("2001:db8::1/128"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "line", ["*", "a.*.example", "http://a.example", "a example", "A.example", "-a", "10.0.0.1/8",
             "1.2.3", "***.a", "a..b", ".a", "\x00", "# comment", "**.", "*.**.a"]
)  # fmt: skip
def test_what_is_neither_pattern_nor_network_is_an_error(line: str) -> None:
    with pytest.raises(CertificateAuthorityError, match="line 2 is neither"):
        parse(f"a.example\n{line}\n")


def test_a_list_too_long_for_a_certificate_says_that_it_is_cut() -> None:
    names = [f"h{n}.example" for n in range(inspected.MAX_NAMES + 1)]
    told = parse("\n".join(names))
    assert told.domains is None and "257 inspected names" in told.cut
    told = parse("\n".join(names[:-1]))
    assert told.domains is not None and not told.cut


@given(st.text(max_size=200))
def test_any_text_is_read_or_is_an_error(text: str) -> None:
    try:
        told = parse(text)
    except CertificateAuthorityError:
        return
    assert told.domains is not None or "**" in text


def test_published_list_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    assert read(path) is None
    assert publish(["b.example", "a.example", "a.example"], path) is True
    assert publish(["a.example", "b.example"], path) is False
    assert read(path) == Inspected(("a.example", "b.example"))
    assert path.stat().st_mode & 0o777 == 0o640
    assert publish([], path) is True
    assert read(path) == NOTHING


def test_a_list_that_would_not_be_read_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(CertificateAuthorityError):
        publish(["a.example\nb b"], tmp_path / "hosts")
    assert list(tmp_path.iterdir()) == []


def test_the_list_cannot_lead_the_authority_to_another_file(tmp_path: Path) -> None:
    secret = tmp_path / "root.key"
    secret.write_text("-----BEGIN PRIVATE KEY-----\nSECRET\n")
    (tmp_path / "hosts").symlink_to(secret)
    with pytest.raises(CertificateAuthorityError) as caught:
        read(tmp_path / "hosts")
    assert "SECRET" not in str(caught.value)
    with pytest.raises(CertificateAuthorityError) as caught:
        read(secret)
    assert "SECRET" not in str(caught.value) and "PRIVATE" not in str(caught.value)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CertificateAuthorityError, match="regular"):
        read(tmp_path / "fifo")


@pytest.mark.parametrize("data", [b"\xff\n", b"a.example\n" * 30_000])
def test_a_list_that_is_no_text_or_too_large_is_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "hosts").write_bytes(data)
    with pytest.raises(CertificateAuthorityError):
        read(tmp_path / "hosts")
