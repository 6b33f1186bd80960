"""The list of inspected hosts as it goes from the gateway to the authority: one pattern or network a line.

`**` means every name. Without it the list is finite, and the intermediate can sign for nothing else.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from aa.ca.errors import CertificateAuthorityError
from aa.ca.places import INSPECTED_HOSTS

MAX_LIST = 256 * 1024
"""Bytes of the list."""
MAX_NAMES = 256
"""Names that an intermediate is limited to; a longer list is not finite any more (each handshake carries it)."""
MAX_NETWORKS = 64

EVERY_NAME = "**"
WRITE_AGAIN = "`sudo systemctl restart aa-gateway` writes it again"
NAME = re.compile(
    r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*"
)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Inspected:
    """What the intermediate may sign for: domains with all below them, and networks.

    `domains` is None for every name. With no domain and no network it may sign for nothing.
    """

    domains: tuple[str, ...] | None = ()
    networks: tuple[Network, ...] = ()
    cut: str = ""
    """Why the list is wider than it was asked to be, if it is."""


NOTHING = Inspected()


def parse(text: str) -> Inspected:
    """Reads the list. Raises `CertificateAuthorityError` for a line that is neither pattern nor network."""
    domains: set[str] = set()
    networks: list[Network] = []
    every = False
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.strip()
        if entry == EVERY_NAME:
            every = True
        elif name := _domain(entry):
            domains.add(name)
        elif entry:
            networks.append(_network(entry, number))
    cut = ""
    kept = _without_covered(domains)
    if not every and len(kept) > MAX_NAMES:
        every, cut = True, f"{len(kept)} inspected names are more than {MAX_NAMES}"
    merged = _merged(networks)
    if len(merged) > MAX_NETWORKS:
        merged = EVERY_NETWORK
        cut = cut or f"more than {MAX_NETWORKS} inspected networks"
    return Inspected(None if every else kept, merged, cut)


EVERY_NETWORK: tuple[Network, ...] = (
    ipaddress.IPv4Network("0.0.0.0/0"),
    ipaddress.IPv6Network("::/0"),
)


def read(path: Path = INSPECTED_HOSTS) -> Inspected | None:
    """The published list, or None where there is none (yet)."""
    try:
        # The directory is the gateway's, which must not make the authority read another file.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise CertificateAuthorityError(f"{path} is no regular file", fix=WRITE_AGAIN)
            data = file.read(MAX_LIST + 1)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise CertificateAuthorityError(f"{path}: {e.strerror}", fix=WRITE_AGAIN) from e
    if len(data) > MAX_LIST:
        raise CertificateAuthorityError(
            f"{path} is larger than {MAX_LIST} bytes", fix="inspect `**`"
        )
    try:
        return parse(data.decode("ascii"))
    except UnicodeDecodeError:
        raise CertificateAuthorityError(f"{path} is not ASCII", fix=WRITE_AGAIN) from None
    except CertificateAuthorityError as e:
        raise CertificateAuthorityError(f"{path}: {e.what}", fix=WRITE_AGAIN) from None


def publish(patterns: Iterable[str], path: Path = INSPECTED_HOSTS) -> bool:
    """Writes the list for the authority, by rename and only when it changed. Returns whether it did.

    Takes host patterns of the policy and networks. The directory's group decides who can read it.
    """
    text = "".join(f"{p}\n" for p in sorted(set(patterns)))
    parse(text)
    try:
        if path.read_text() == text:
            return False
    except OSError:
        pass  # whatever is there, or is not, is replaced
    fresh = path.with_name(f".{path.name}.new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
    with os.fdopen(fd, "w") as file:
        os.fchmod(fd, 0o640)
        file.write(text)
    os.rename(fresh, path)
    return True


def _domain(entry: str) -> str:
    """The domain that a host pattern is in, or "" for what is no name.

    A certificate can only be limited to a domain and everything below it, so `a.example` and
    `**.a.example` come to the same.
    """
    name = entry.removeprefix("**.").removeprefix("*.")
    if not NAME.fullmatch(name) or name.rsplit(".", 1)[-1].isdigit():
        return ""
    return name


def _network(entry: str, line: int) -> Network:
    try:
        return ipaddress.ip_network(entry)
    except ValueError:
        raise CertificateAuthorityError(
            f"line {line} is neither a host pattern nor a network"
        ) from None


def _without_covered(domains: set[str]) -> tuple[str, ...]:
    """Sorted, without the names that lie below another one of them."""

    def covered(name: str) -> bool:
        labels = name.split(".")
        return any(".".join(labels[n:]) in domains for n in range(1, len(labels)))

    return tuple(sorted(d for d in domains if not covered(d)))


def _merged(networks: list[Network]) -> tuple[Network, ...]:
    v4 = [n for n in networks if isinstance(n, ipaddress.IPv4Network)]
    v6 = [n for n in networks if isinstance(n, ipaddress.IPv6Network)]
    return (*ipaddress.collapse_addresses(v4), *ipaddress.collapse_addresses(v6))
