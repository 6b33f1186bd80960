"""TLS towards client and origin with Python's own ssl module, in the shape that mitmproxy's layers use.

mitmproxy brings an OpenSSL of its own (in its cryptography) behind pyOpenSSL, whose callbacks need
memory that is writable and executable, which aa-proxy's sandbox forbids. The host's OpenSSL needs
none, is kept up to date by the distribution, and checks names itself.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

from OpenSSL import SSL

from aa.ca.leaf import Leaf, LeafIssuer

TRUST_STORE = Path("/etc/ssl/certs/ca-certificates.crt")
CLIENT_ALPN = ("h2", "http/1.1")
"""What a client may speak inside, the one we prefer first."""
CONTEXTS_KEPT = 256
"""Contexts towards clients, one for each leaf; the one that was not used for longest makes room."""

REFUSES_CERTIFICATE = frozenset(
    f"{version}_ALERT_{name}"
    for version in ("SSLV3", "TLSV1", "TLSV13")
    for name in (
        "BAD_CERTIFICATE",
        "UNSUPPORTED_CERTIFICATE",
        "CERTIFICATE_REVOKED",
        "CERTIFICATE_EXPIRED",
        "CERTIFICATE_UNKNOWN",
        "UNKNOWN_CA",
        "CERTIFICATE_REQUIRED",
    )
)
"""OpenSSL's names of the alerts with which a client says that it does not want our certificate."""


class Tls:
    """One end of a TLS connection over memory. The methods are those of pyOpenSSL's Connection that
    mitmproxy calls, and raise its exceptions."""

    def __init__(
        self, context: ssl.SSLContext, *, server_side: bool, name: str | None = None
    ) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._in, self._out, server_side=server_side, server_hostname=name
        )
        self._closed = False
        self.alert = ""
        """OpenSSL's name of what ended the handshake, as `TLSV1_ALERT_UNKNOWN_CA`."""
        self.failure = ""
        """The same in words."""

    @property
    def closed_cleanly(self) -> bool:
        """Whether the peer said that nothing more comes."""
        return self._closed

    def bio_write(self, data: bytes) -> int:
        return self._in.write(data)

    def bio_read(self, size: int) -> bytes:
        data = self._out.read(size)
        if not data:
            raise SSL.WantReadError
        return data

    def do_handshake(self) -> None:
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            raise SSL.WantReadError from None
        except ssl.SSLCertVerificationError as e:
            self.alert, self.failure = "", f"its certificate is not valid: {e.verify_message}"
            raise SSL.Error([("SSL routines", "", self.failure)]) from None
        except (ssl.SSLError, OSError) as e:
            reason = getattr(e, "reason", None) or str(e)
            self.alert, self.failure = reason, reason.replace("_", " ").lower()
            raise SSL.Error([("SSL routines", "", self.failure)]) from None

    def recv(self, size: int) -> bytes:
        try:
            data = self._object.read(size)
        except ssl.SSLWantReadError:
            raise SSL.WantReadError from None
        except ssl.SSLZeroReturnError:
            data = b""
        except (ssl.SSLError, OSError) as e:
            raise SSL.Error([("SSL routines", "", str(getattr(e, "reason", e)))]) from None
        if not data:
            self._closed = True
            raise SSL.ZeroReturnError
        return data

    def sendall(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[self._object.write(view) :]
        except (ssl.SSLError, OSError) as e:
            raise SSL.SysCallError(-1, str(e)) from None

    def say_goodbye(self) -> None:
        """Lays the alert close_notify ready for `bio_read`."""
        with contextlib.suppress(ssl.SSLError, OSError):
            self._object.unwrap()

    def get_shutdown(self) -> int:
        return SSL.RECEIVED_SHUTDOWN if self._closed else 0

    def get_peer_cert_chain(self) -> list[object]:
        return []

    def get_peer_certificate(self) -> None:
        return None

    def get_alpn_proto_negotiated(self) -> bytes:
        return (self._object.selected_alpn_protocol() or "").encode()

    def get_cipher_name(self) -> str:
        return (self._object.cipher() or ("",))[0]

    def get_protocol_version_name(self) -> str:
        return self._object.version() or ""


class Presented:
    """Contexts with the leaves of this host's authority, for clients."""

    def __init__(self, issuer: LeafIssuer, *, limit: int = CONTEXTS_KEPT) -> None:
        self._issuer = issuer
        self._limit = limit
        self._contexts: OrderedDict[str, tuple[Leaf, ssl.SSLContext]] = OrderedDict()

    def towards_client(self, host: str, *, http2: bool = True) -> Tls:
        """The server's end for a canonical name or an address. Raises `CannotIssue`."""
        key = host if http2 else f"{host} without http2"
        leaf = self._issuer.issue(host)
        kept, context = self._contexts.get(key, (None, None))
        if context is None or kept is not leaf:
            context = _server_context(leaf, CLIENT_ALPN if http2 else CLIENT_ALPN[1:])
            self._contexts[key] = (leaf, context)
            while len(self._contexts) > self._limit:
                self._contexts.popitem(last=False)
        self._contexts.move_to_end(key)
        return Tls(context, server_side=True)


def _server_context(leaf: Leaf, alpn: Sequence[str]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(list(alpn))
    with _in_memory(leaf.key_pem + leaf.chain_pem) as path:
        context.load_cert_chain(path)
    return context


@contextlib.contextmanager
def _in_memory(data: bytes) -> Iterator[str]:
    """A file that only this process can name, and that is gone with its descriptor."""
    fd = os.memfd_create("leaf", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


class Trusted:
    """Contexts that verify origins against the host's trust store, which may change meanwhile."""

    def __init__(self, store: Path = TRUST_STORE) -> None:
        self._store = store
        self._stamp: tuple[int, ...] = ()
        self._contexts: dict[tuple[str, ...], ssl.SSLContext] = {}

    def towards_origin(self, name: str, *, alpn: Sequence[str]) -> Tls:
        """The client's end, which accepts a certificate for `name` (or an address) and no other.

        Raises OSError when there is no trust store.
        """
        return Tls(self._context(tuple(alpn)), server_side=False, name=name)

    def prepare(self) -> None:
        """Reading the trust store takes a while; better before the first connection than in it."""
        with contextlib.suppress(OSError):
            for count in range(len(CLIENT_ALPN)):
                self._context(CLIENT_ALPN[count:])

    def _context(self, alpn: tuple[str, ...]) -> ssl.SSLContext:
        told = os.stat(self._store)
        stamp = (told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns)
        if stamp != self._stamp:
            self._contexts.clear()
            self._stamp = stamp
        context = self._contexts.get(alpn)
        if context is None:
            context = self._contexts[alpn] = self._make(alpn)
        return context

    def _make(self, alpn: tuple[str, ...]) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_COMPRESSION
        context.load_verify_locations(cafile=str(self._store))
        context.set_alpn_protocols(list(alpn))
        return context
