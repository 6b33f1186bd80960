"""IPv6 counts as closed only where nothing at all speaks for it."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import Any

import pytest

from aa.redirect.v6 import why_open

LOOPBACK = "00000000000000000000000000000001 01 80 10 80       lo\n"
LINK_LOCAL = "fe80000000000000b83fa5fffedbe0aa 02 40 20 80     eth0\n"


def host(tmp_path: Path, addresses: str, **disabled: str) -> dict[str, Path]:
    for name, value in disabled.items():
        (tmp_path / "conf" / name).mkdir(parents=True)
        (tmp_path / "conf" / name / "disable_ipv6").write_text(f"{value}\n")
    (tmp_path / "if_inet6").write_text(addresses)
    return {"sysctl": tmp_path / "conf", "addresses": tmp_path / "if_inet6"}


def test_switched_off_everywhere_is_closed(tmp_path: Path) -> None:
    assert why_open(**host(tmp_path, "", all="1", default="1", lo="1", eth0="1")) == ""


@pytest.mark.parametrize("left_on", ["all", "default", "lo", "eth0"])
def test_one_interface_left_on_is_open(tmp_path: Path, left_on: str) -> None:
    conf = {"all": "1", "default": "1", "lo": "1", "eth0": "1", left_on: "0"}
    assert left_on in why_open(**host(tmp_path, "", **conf))


@pytest.mark.parametrize("addresses", [LOOPBACK, LINK_LOCAL])
def test_an_address_is_open(tmp_path: Path, addresses: str) -> None:
    assert "address" in why_open(**host(tmp_path, addresses, all="1", default="1"))


def test_what_cannot_be_examined_is_open(tmp_path: Path) -> None:
    given = host(tmp_path, "", all="1")
    (given["sysctl"] / "all" / "disable_ipv6").unlink()
    assert "examined" in why_open(**given)
    assert "examined" in why_open(tmp_path / "nowhere", given["addresses"])


def test_a_kernel_without_v6_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = errno.EAFNOSUPPORT

    def refuse(*_: Any) -> Any:
        raise OSError(code, "refused")

    monkeypatch.setattr(socket, "socket", refuse)
    assert why_open(tmp_path / "nowhere", tmp_path / "nothing") == ""
    code = errno.EMFILE  # any other failure proves nothing
    assert why_open(tmp_path / "nowhere", tmp_path / "nothing")
