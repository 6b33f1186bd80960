"""An authority in a directory of its own, and what other programs say of its certificates."""

from __future__ import annotations

import datetime
import ssl
import subprocess
from pathlib import Path

from aa.ca import authority, files
from aa.ca.authority import Renewal
from aa.ca.certificate import certificate_pem
from aa.ca.inspected import Inspected, parse
from aa.ca.leaf import Leaf, LeafIssuer, utc_now
from aa.ca.places import Places

EVERYTHING = parse("**\n0.0.0.0/0\n::/0\n")
COMMAND_SECONDS = 20.0
HOST = "box.example"


class World:
    """`places`, made by the product's own code, with a clock that tests may set."""

    def __init__(self, directory: Path, inspected: Inspected | None = EVERYTHING) -> None:
        directory.chmod(0o755)
        self.directory = directory
        self.places = Places(directory / "ca", directory / "proxy-ca")
        self.now = utc_now()
        self.renew(inspected)

    def renew(self, inspected: Inspected | None = None) -> Renewal:
        authority.make_directories(self.places, -1)
        with files.locked(self.places.root):
            authority.ensure_root(self.places, host=HOST, now=self.now)
            return authority.renew(
                self.places, inspected=inspected, host=HOST, gid=-1, now=self.now
            )

    def rotate(self) -> None:
        authority.stage(self.places, host=HOST, now=self.now)
        authority.commit(self.places)

    def pass_time(self, **how: float) -> None:
        self.now += datetime.timedelta(**how)

    def issuer(self, **how: int) -> LeafIssuer:
        return LeafIssuer(self.places.proxy, clock=lambda: self.now, **how)

    def write(self, leaf: Leaf) -> tuple[Path, Path, Path]:
        """Leaf, chain and root as files for other programs."""
        paths = tuple(self.directory / name for name in ("leaf.pem", "chain.pem", "trusted.pem"))
        paths[0].write_bytes(certificate_pem(leaf.certificate))
        paths[1].write_bytes(b"".join(map(certificate_pem, leaf.chain)))
        paths[2].write_bytes(self.places.root_certificate.read_bytes())
        return paths

    def openssl(self, leaf: Leaf, *more: str) -> subprocess.CompletedProcess[str]:
        """What `openssl verify` says of it, at its strictest."""
        certificate, chain, root = self.write(leaf)
        return run(
            "openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-no-CApath", "-no-CAstore",
            "-CAfile", root, "-untrusted", chain, *more, certificate,
        )  # fmt: skip

    def certtool(self, leaf: Leaf, host: str) -> subprocess.CompletedProcess[str]:
        """What GnuTLS says of it."""
        certificate, chain, root = self.write(leaf)
        both = self.directory / "both.pem"
        both.write_bytes(certificate.read_bytes() + chain.read_bytes())
        return run(
            "certtool", "--verify", "--load-ca-certificate", root, "--infile", both,
            "--verify-purpose=1.3.6.1.5.5.7.3.1", f"--verify-hostname={host}",
        )  # fmt: skip

    def handshake(self, leaf: Leaf, host: str) -> None:
        """A TLS handshake in memory with a client as strict as Python 3.13's. Raises `ssl.SSLError`."""
        keyfile = self.directory / "key.pem"
        keyfile.touch(0o600)
        keyfile.write_bytes(leaf.key_pem)
        chain = self.directory / "served.pem"
        chain.write_bytes(leaf.chain_pem)
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(chain, keyfile)
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.verify_flags |= ssl.VERIFY_X509_STRICT | getattr(ssl, "VERIFY_X509_PARTIAL_CHAIN", 0)
        client.load_verify_locations(self.places.root_certificate)
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        near = client.wrap_bio(down, up, server_hostname=host)
        far = server.wrap_bio(up, down, server_side=True)
        waiting = [near, far]
        for _ in range(10):
            for side in list(waiting):
                try:
                    side.do_handshake()
                    waiting.remove(side)
                except ssl.SSLWantReadError:
                    pass
        assert not waiting, "the handshake does not end"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )
