"""One canonical form for the name of a host, made once; the same object is decided, recorded and dialled.

What could be read in two ways (odd spellings of addresses, control characters,
names that IDNA does not allow) is refused here, so no later comparison can be wrong.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from dataclasses import dataclass

import idna

NAME_LIMIT = 253
"""Characters of a name without its last dot (RFC 1035, 2.3.4, as text)."""
CACHE_SIZE = 4096

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Underscores are not of RFC 1123, but names with them are in daily use and resolve.
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_LOOKS_LIKE_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f-\xa0]")


class InvalidHost(ValueError):
    """The text is no host's name in its one form; the message says why."""


@dataclass(frozen=True, slots=True)
class Host:
    """A canonical name, or an address. Equal hosts have equal text."""

    text: str
    address: Address | None = None

    @property
    def is_address(self) -> bool:
        return self.address is not None

    def __str__(self) -> str:
        return self.text


@functools.lru_cache(maxsize=CACHE_SIZE)
def canonical_host(text: str) -> Host:
    """The host that a text names: lower case, without its last dot, IDNA as A-labels.

    Addresses are taken in their usual form only, without brackets or zone; an
    IPv4 address inside `::ffff:0:0/96` is that IPv4 address. Raises InvalidHost.
    """
    if _FORBIDDEN.search(text):
        raise InvalidHost("the host has a control character or a space")
    if len(text) > NAME_LIMIT + 1:
        raise InvalidHost(f"the host is longer than {NAME_LIMIT} characters")
    if ":" in text or "%" in text:
        return _address(text)
    name = (text if text.isascii() else _to_ascii(text)).lower()
    if _LOOKS_LIKE_NUMBER.fullmatch(name.rstrip(".").rpartition(".")[2]):
        return _address(name)
    if name.endswith("."):
        name = name[:-1]
    if len(name) > NAME_LIMIT:
        raise InvalidHost(f"the host is longer than {NAME_LIMIT} characters")
    for label in name.split("."):
        _check_label(label)
    return Host(name)


def canonical_label(text: str) -> str:
    """One label of a name in its canonical form. Raises InvalidHost."""
    if "." in text or _FORBIDDEN.search(text) or len(text) > NAME_LIMIT:
        raise InvalidHost(f"{text!r} is not one label of a name")
    label = (text if text.isascii() else _to_ascii(text)).lower()
    _check_label(label)
    return label


def address_of(text: str) -> Address:
    """An address from its usual form, v4-mapped ones unwrapped. Raises InvalidHost."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise InvalidHost(f"{text!r} is not an address in its usual form") from None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            raise InvalidHost(f"{text!r} has a zone")
        return address.ipv4_mapped or address
    return address


def _address(text: str) -> Host:
    address = address_of(text)
    return Host(str(address), address)


def _check_label(label: str) -> None:
    if not label:
        raise InvalidHost("the host has an empty label")
    if not _LABEL.fullmatch(label):
        shown = label if len(label) <= 64 else label[:61] + "..."
        raise InvalidHost(
            f"{shown!r} is not a label: up to 63 letters, digits, hyphens inside, underscores"
        )
    if label.startswith("xn--"):
        try:
            faithful = idna.alabel(idna.ulabel(label)).decode("ascii") == label
        except (UnicodeError, ValueError, IndexError) as e:
            raise InvalidHost(f"{label!r} is not valid in IDNA 2008") from e
        if not faithful:
            raise InvalidHost(f"{label!r} stands for another label")


def _to_ascii(text: str) -> str:
    try:
        return idna.encode(text, uts46=True, std3_rules=False).decode("ascii")
    except (UnicodeError, ValueError, IndexError) as e:
        raise InvalidHost(f"the host is not valid in IDNA 2008: {e}") from e
