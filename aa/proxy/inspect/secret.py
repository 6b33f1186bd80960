"""Secrets that go into requests in place of a placeholder, and are taken out of what comes back.

The secret is a systemd credential of aa-proxy, read when it is needed; it is in no message, record
or error. What echoes it is masked by as many asterisks, so that no length changes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aa.model import MalformedValue

CREDENTIAL_LIMIT = 1 << 14
"""Bytes of one secret."""
MASKED_AT_LEAST = 6
"""Bytes of a secret that can be told from other text; a shorter one is refused."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_VALUE = re.compile(rb"[\x21-\x7e]+(?: [\x21-\x7e]+)*")
_KEYS = {"id", "source", "header", "format", "placeholder"}


class NoSecret(Exception):
    """The secret cannot be had; the message says why and names no part of it."""


@dataclass(frozen=True, slots=True)
class Injection:
    """The obligation `inject`: whose secret goes into which header."""

    id: str
    credential: str
    header: str
    format: str
    placeholder: str

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Injection:
        """Raises MalformedValue for what it does not know."""
        source = value.get("source")
        texts = {k: value.get(k) for k in _KEYS - {"source"}}
        if set(value) != _KEYS or not all(isinstance(t, str) and t for t in texts.values()):
            raise MalformedValue("inject: it is not an obligation that is known here")
        credential = source.get("credential") if isinstance(source, dict) else None
        if not isinstance(credential, str) or not _NAME.fullmatch(credential):
            raise MalformedValue("inject: its source is not a credential")
        if str(texts["format"]).count("{}") != 1:
            raise MalformedValue("inject: its format has no one place for the secret")
        return cls(credential=credential, **{k: str(t) for k, t in texts.items()})

    def is_asked_for(self, value: bytes) -> bool:
        """Whether a header's value holds the placeholder."""
        return self.placeholder.encode() in value

    def filled(self, secret: bytes) -> bytes:
        return self.format.encode().replace(b"{}", secret)


def read_credential(name: str, directory: str | None = None) -> bytes:
    """A credential of this unit without the line end behind it. Raises `NoSecret`."""
    directory = directory if directory is not None else os.environ.get("CREDENTIALS_DIRECTORY", "")
    how = f"give aa-proxy.service LoadCredential={name}:PATH"
    if not directory:
        raise NoSecret(f"the proxy has no credentials; {how}")
    try:
        with (Path(directory) / name).open("rb") as file:
            secret = file.read(CREDENTIAL_LIMIT + 1).removesuffix(b"\n").removesuffix(b"\r")
    except OSError as e:
        raise NoSecret(f"the credential {name} cannot be read ({e.strerror}); {how}") from None
    if not MASKED_AT_LEAST <= len(secret) <= CREDENTIAL_LIMIT or not _VALUE.fullmatch(secret):
        raise NoSecret(
            f"the credential {name} is not one line of {MASKED_AT_LEAST} to {CREDENTIAL_LIMIT} "
            "printable characters"
        )
    return secret


class Mask:
    """Takes secrets out of a stream. What may be the beginning of one waits for what follows."""

    def __init__(self, secrets: tuple[bytes, ...]) -> None:
        self._secrets = tuple(sorted(secrets, key=len, reverse=True))
        self._held = b""

    def all(self, data: bytes) -> bytes:
        """Of something that is whole."""
        for secret in self._secrets:
            data = data.replace(secret, b"*" * len(secret))
        return data

    def feed(self, data: bytes) -> bytes:
        """What may pass now; b"" at the end of the stream gives the rest."""
        if not data:
            rest, self._held = self.all(self._held), b""
            return rest
        data = self.all(self._held + data)
        keep = max(_begun(data, secret) for secret in self._secrets)
        self._held = data[len(data) - keep :]
        return data[: len(data) - keep]


def _begun(data: bytes, secret: bytes) -> int:
    """How many of the last bytes may be the beginning of a secret."""
    for count in range(min(len(secret) - 1, len(data)), 0, -1):
        if data.endswith(secret[:count]):
            return count
    return 0
