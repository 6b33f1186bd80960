"""Which certificates Java's trust store holds, read from the file itself: no Java program needs to run.

Debian's ca-certificates-java keeps it in the JKS format: a head, entries in plain, a digest.
"""

from __future__ import annotations

import struct
from pathlib import Path

KEYSTORE = Path("/etc/ssl/certs/java/cacerts")
MAX_KEYSTORE = 16 * 1024 * 1024
MAX_ENTRIES = 10_000
MAGIC, VERSION, TRUSTED_CERTIFICATE = 0xFEEDFEED, 2, 2
DIGEST_BYTES = 20


class UnknownFormat(ValueError):
    """The file is no trust store in the JKS format."""


def trusted(path: Path = KEYSTORE) -> dict[str, bytes] | None:
    """Certificates (DER) by alias; None where there is no store. Raises `UnknownFormat`, `OSError`."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEYSTORE + 1)
    except FileNotFoundError:
        return None
    if len(data) > MAX_KEYSTORE:
        raise UnknownFormat(f"{path} is larger than {MAX_KEYSTORE} bytes")
    try:
        return parse(data)
    except (struct.error, UnicodeDecodeError) as e:
        raise UnknownFormat(f"{path}: {e}") from e


def parse(data: bytes) -> dict[str, bytes]:
    """The trusted certificates of a JKS store. Raises `UnknownFormat`, `struct.error`."""
    magic, version, count = struct.unpack_from(">III", data)
    if (magic, version) != (MAGIC, VERSION) or count > MAX_ENTRIES:
        raise UnknownFormat("not a JKS trust store")
    found, at = {}, 12
    for _ in range(count):
        (tag,) = struct.unpack_from(">I", data, at)
        if tag != TRUSTED_CERTIFICATE:
            raise UnknownFormat("the store holds more than trusted certificates")
        alias, at = _field(data, at + 4, ">H")
        kind, at = _field(data, at + 8, ">H")  # behind the time of its making
        certificate, at = _field(data, at, ">I")
        if kind == b"X.509":
            found[alias.decode()] = certificate
    if at + DIGEST_BYTES != len(data):
        raise UnknownFormat("the store is cut off")
    return found


def _field(data: bytes, at: int, length: str) -> tuple[bytes, int]:
    (size,) = struct.unpack_from(length, data, at)
    begins = at + struct.calcsize(length)
    if begins + size > len(data):
        raise UnknownFormat("the store is cut off")
    return data[begins : begins + size], begins + size
