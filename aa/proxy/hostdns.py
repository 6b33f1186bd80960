"""What this host knows of names: its hosts file and resolvers, read again when they change."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

HOSTS_FILE = Path("/etc/hosts")
RESOLV_CONF = Path("/etc/resolv.conf")
FILE_LIMIT = 4 << 20
"""Bytes of either file that are read; ad-blocking hosts files are below that."""
NAMESERVERS_LIMIT = 3
"""As in resolv.conf(5)."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
T = TypeVar("T")


class WatchedFile(Generic[T]):
    """A file's parsed content. `get` costs one stat while the file stays the same."""

    def __init__(self, path: Path, parse: Callable[[str], T]) -> None:
        self._path = path
        self._parse = parse
        self._seen: tuple[int, int, int] | None = None
        self._value = parse("")

    def get(self) -> T:
        """The content as of now; as of an empty file when it is missing or unreadable."""
        try:
            found = os.stat(self._path)
            seen = (found.st_ino, found.st_mtime_ns, found.st_size)
            if seen != self._seen:
                with self._path.open(encoding="utf-8", errors="replace") as file:
                    self._value = self._parse(file.read(FILE_LIMIT))
                self._seen = seen
        except OSError:
            if self._seen is not None:
                self._seen, self._value = None, self._parse("")
        return self._value


def parse_hosts(text: str) -> Mapping[str, tuple[Address, ...]]:
    """hosts(5): addresses by name in lower case, in the order of the file."""
    found: dict[str, list[Address]] = {}
    for line in text.splitlines():
        fields = line.partition("#")[0].split()
        if len(fields) < 2:
            continue
        try:
            address = ipaddress.ip_address(fields[0].partition("%")[0])
        except ValueError:
            continue
        for name in fields[1:]:
            of_name = found.setdefault(name.lower().removesuffix("."), [])
            if address not in of_name:
                of_name.append(address)
    return {name: tuple(addresses) for name, addresses in found.items()}


def parse_nameservers(text: str) -> tuple[str, ...]:
    """The nameserver lines of resolv.conf(5); this host itself when there are none."""
    found = []
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 2 or fields[0] != "nameserver":
            continue
        try:
            ipaddress.ip_address(fields[1].partition("%")[0])
        except ValueError:
            continue
        found.append(fields[1])
    return tuple(found[:NAMESERVERS_LIMIT]) or ("127.0.0.1",)


class HostNames:
    """The hosts file, looked up by canonical name."""

    def __init__(self, path: Path = HOSTS_FILE) -> None:
        self._file = WatchedFile(path, parse_hosts)

    def addresses(self, name: str) -> tuple[Address, ...]:
        return self._file.get().get(name, ())


class Nameservers:
    """The host's resolvers."""

    def __init__(self, path: Path = RESOLV_CONF) -> None:
        self._file = WatchedFile(path, parse_nameservers)

    def get(self) -> tuple[str, ...]:
        return self._file.get()
