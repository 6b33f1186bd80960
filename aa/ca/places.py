"""Where the certificate authority keeps what it has, and who may read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aa.paths import RUNTIME_DIR, STATE_DIR

PROXY_GROUP = "aa-proxy"
"""The group that may read the intermediate's key."""
INSPECTED_HOSTS = RUNTIME_DIR / "inspected" / "hosts"
"""Where the gateway publishes which hosts are inspected; see `aa.ca.inspected`."""


@dataclass(frozen=True, slots=True)
class Places:
    """Two directories: root's own, and the one that the proxy reads."""

    root: Path = STATE_DIR / "ca"
    proxy: Path = STATE_DIR / "proxy-ca"

    @property
    def root_key(self) -> Path:
        return self.root / "root.key"

    @property
    def root_certificate(self) -> Path:
        return self.root / "root.pem"

    @property
    def next_key(self) -> Path:
        """A new root that waits until the trust store knows it."""
        return self.root / "next.key"

    @property
    def next_certificate(self) -> Path:
        return self.root / "next.pem"

    @property
    def published(self) -> Path:
        """The intermediate's certificate for everybody, without its key."""
        return self.root / "intermediate.pem"

    @property
    def intermediate(self) -> Path:
        """Key and certificate of the intermediate in one file, so that they always belong together."""
        return self.proxy / INTERMEDIATE


INTERMEDIATE = "intermediate.pem"
