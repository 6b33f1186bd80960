"""The other end of the lab: HTTPS, HTTP, git, echo and DNS servers that write down everything that reaches them.

Runs as `origins.py DIRECTORY` in a network namespace of its own. DIRECTORY/seen.jsonl gets one JSON
line for each packet, connection, request and query; DIRECTORY/ca.pem is the authority of the
origins' certificates, made anew each time; DIRECTORY/ready appears when all of them listen.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import http.server
import io
import ipaddress
import json
import os
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import wsproto.connection
import wsproto.events
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # python3 -I leaves it out
from tests.lab.harness import names  # noqa: E402

CLIENT_TIMEOUT = 20.0  # seconds; a client that says nothing for so long is dropped
BODY_LIMIT = (
    64 * 1024 * 1024
)  # bytes; the largest body of /bytes/N and the most that is read of a request
CERTIFICATE_DAYS = 30
GIT_PREFIX = "/project.git"
DNS_TTL = 5  # seconds
WEBSOCKET_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455

TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
NEIGHBOUR_DISCOVERY = range(130, 138)  # ICMPv6 that a quiet link speaks by itself
MULTICAST_REPORT = 143


def _wheel() -> bytes:
    """A package of Python's with nothing in it."""
    info = "lab_package-1.0.dist-info"
    metadata = "Metadata-Version: 2.1\nName: lab-package\nVersion: 1.0\n"
    tag = "Wheel-Version: 1.0\nGenerator: lab\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in (("METADATA", metadata), ("WHEEL", tag), ("RECORD", "")):
            archive.writestr(f"{info}/{name}", text)
    return packed.getvalue()


WHEEL = "lab_package-1.0-py3-none-any.whl"
TARBALL = {"tarball": f"https://{names.API}/npm/lab-package-1.0.0.tgz"}
PAGES: dict[str, tuple[str, bytes]] = {
    "/simple/lab-package/": (
        "text/html",
        f'<!DOCTYPE html><html><body><a href="/{WHEEL}">{WHEEL}</a></body></html>'.encode(),
    ),
    f"/{WHEEL}": ("application/octet-stream", _wheel()),
    "/npm/lab-package": (
        "application/json",
        json.dumps(
            {
                "name": "lab-package",
                "dist-tags": {"latest": "1.0.0"},
                "versions": {"1.0.0": {"name": "lab-package", "version": "1.0.0", "dist": TARBALL}},
            }
        ).encode(),
    ),
}
"""Media type and body by path."""


class Log:
    """Appends to seen.jsonl, one whole line a write, so that readers never see half of one."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"time": time.time(), "kind": kind, **fields}, sort_keys=True)
        os.write(self._file, line.encode() + b"\n")


class Authority:
    """A certificate authority that lives as long as this process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Lab origins")])
        public = self._key.public_key()
        self._certificate = (
            self._builder(self._name, public)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pem = self._certificate.public_bytes(serialization.Encoding.PEM)
        (directory / "ca.pem").write_bytes(pem)

    def context(self, names_and_addresses: list[str]) -> ssl.SSLContext:
        """A server context with a fresh leaf for these names."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names_and_addresses[0])])
        leaf = (
            self._builder(subject, key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([_general_name(n) for n in names_and_addresses]),
                critical=False,
            )
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        chain = self._directory / f"{names_and_addresses[0]}.pem"
        chain.write_bytes(_pem(key) + leaf.public_bytes(serialization.Encoding.PEM))
        chain.chmod(0o600)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain)
        context.set_alpn_protocols(["http/1.1"])
        return context

    def _builder(
        self, subject: x509.Name, public: ec.EllipticCurvePublicKey
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.timezone.utc)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=CERTIFICATE_DAYS))
        )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


class Certificates:
    """One server context for each name of the network, chosen by SNI; names nobody has get the first."""

    def __init__(self, authority: Authority) -> None:
        self._contexts = {host.name: authority.context([host.name]) for host in names.HOSTS}
        self.default = authority.context(
            ["origins.test", names.ORIGINS_V4, names.ORIGINS_V6, *names.addresses()]
        )
        self.default.sni_callback = self._choose

    def _choose(self, connection: ssl.SSLObject, sni: str | None, _: ssl.SSLContext) -> None:
        connection.lab_sni = sni
        if sni in self._contexts:
            connection.context = self._contexts[sni]


class Web(http.server.BaseHTTPRequestHandler):
    """Answers every request with what it saw; /bytes/N with N bytes, /project.git with a repository,
    what package managers ask for with an index of one package, and a WebSocket with its own messages."""

    protocol_version = "HTTP/1.1"
    server: Listener
    timeout = CLIENT_TIMEOUT

    def setup(self) -> None:
        self.sni: str | None = None
        if self.server.certificates is not None:
            self.request.settimeout(CLIENT_TIMEOUT)
            self.request = self.server.certificates.default.wrap_socket(
                self.request, server_side=True
            )
            self.sni = getattr(self.request, "lab_sni", None)
        super().setup()

    def finish(self) -> None:
        super().finish()
        self.request.close()

    def log_message(self, format: str, *args: Any) -> None:
        """The log is seen.jsonl."""

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(min(length, BODY_LIMIT))
        self.server.log.write(
            "request",
            host=self.headers.get("Host"),
            method=self.command,
            path=self.path,
            sni=self.sni,
            body_bytes=len(body),
            peer=self.client_address[0],
            port=self.server.server_address[1],
        )
        if self.headers.get("Upgrade", "").lower() == "websocket":
            self._websocket()
        elif self.path.startswith(GIT_PREFIX):
            self._git(body)
        elif self.path in PAGES:
            self._send(200, *PAGES[self.path])
        elif self.path.startswith("/bytes/"):
            self._send(200, "application/octet-stream", bytes(min(int(self.path[7:]), BODY_LIMIT)))
        else:
            seen = {"host": self.headers.get("Host"), "path": self.path, "method": self.command}
            self._send(200, "application/json", json.dumps(seen).encode() + b"\n")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _answer

    def _send(self, status: int, media: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _websocket(self) -> None:
        """Says each message back until the client goes. Each is an event in the log."""
        self.close_connection = True
        key = self.headers.get("Sec-WebSocket-Key", "") + WEBSOCKET_GUID
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        self.send_response(101)
        for name, value in (
            ("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accept),
        ):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        frames = wsproto.connection.Connection(wsproto.ConnectionType.SERVER)
        while frames.state is wsproto.connection.ConnectionState.OPEN:
            data = self.request.recv(65536)
            frames.receive_data(data or None)
            for event in frames.events():
                if isinstance(event, wsproto.events.TextMessage):
                    self.server.log.write("message", path=self.path, text=event.data)
                    self.wfile.write(frames.send(wsproto.events.TextMessage(data=event.data)))
                elif isinstance(event, wsproto.events.CloseConnection) and data:
                    self.wfile.write(frames.send(event.response()))

    def _git(self, body: bytes) -> None:
        path, _, query = self.path.partition("?")
        done = subprocess.run(
            ["git", "http-backend"],
            input=body,
            capture_output=True,
            timeout=CLIENT_TIMEOUT,
            check=False,
            env={
                "PATH": "/usr/bin:/bin",
                "GIT_PROJECT_ROOT": str(self.server.repositories),
                "GIT_HTTP_EXPORT_ALL": "1",
                "GIT_CONFIG_COUNT": "1",
                "GIT_CONFIG_KEY_0": "safe.directory",
                "GIT_CONFIG_VALUE_0": "*",
                "PATH_INFO": path,
                "QUERY_STRING": query,
                "REQUEST_METHOD": self.command,
                "CONTENT_TYPE": self.headers.get("Content-Type", ""),
                "CONTENT_LENGTH": str(len(body)),
                "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
                "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
                "REMOTE_ADDR": self.client_address[0],
            },
        )
        head, _, payload = done.stdout.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if ": " in line)
        self.send_response(int(fields.pop("Status", "200 OK").split()[0]))
        for field, value in fields.items():
            self.send_header(field, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


class Echo(socketserver.BaseRequestHandler):
    """Sends back what it gets, after a greeting on the port that has one."""

    server: Listener

    def handle(self) -> None:
        self.request.settimeout(CLIENT_TIMEOUT)
        if self.server.server_address[1] == names.BANNER_PORT:
            self.request.sendall(names.BANNER)
        try:
            while data := self.request.recv(65536):
                self.request.sendall(data)
        except (TimeoutError, ConnectionError):
            return


class DnsStream(socketserver.BaseRequestHandler):
    """DNS over TCP."""

    server: Listener

    def handle(self) -> None:
        self.request.settimeout(CLIENT_TIMEOUT)
        try:
            while head := _exactly(self.request, 2):
                query = _exactly(self.request, struct.unpack("!H", head)[0])
                answer = answer_query(query, self.server.log, "tcp", self.client_address[0])
                self.request.sendall(struct.pack("!H", len(answer)) + answer)
        except (TimeoutError, ConnectionError):
            return


def _exactly(stream: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = stream.recv(length - len(data))
        if not part:
            return b""
        data += part
    return data


class Listener(socketserver.ThreadingTCPServer):
    """One TCP port on all addresses of one family; each accepted connection is a line in the log."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self,
        port: int,
        answers: type[socketserver.BaseRequestHandler],
        *,
        v6: bool,
        log: Log,
        repositories: Path,
        certificates: Certificates | None = None,
    ) -> None:
        self.address_family = socket.AF_INET6 if v6 else socket.AF_INET
        self.log, self.repositories, self.certificates = log, repositories, certificates
        super().__init__(("::" if v6 else "0.0.0.0", port), answers)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        super().server_bind()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, peer = super().get_request()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        local = connection.getsockname()
        self.log.write("connection", peer=peer[0], address=local[0], port=local[1])
        return connection, peer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up or refuses the certificate is an event, not an error of ours."""
        self.log.write("broken", peer=client_address[0], reason=repr(sys.exc_info()[1]))


def answer_query(data: bytes, log: Log, transport: str, peer: str) -> bytes:
    """The authoritative answer for names of the network; NXDOMAIN for every other one."""
    query = dns.message.from_wire(data)
    reply = dns.message.make_response(query, recursion_available=True)
    reply.flags |= dns.flags.AA
    question = query.question[0]
    name = question.name.to_text(omit_final_dot=True).lower()
    wanted = dns.rdatatype.to_text(question.rdtype)
    log.write("dns", name=name, type=wanted, transport=transport, peer=peer)
    host = next((h for h in names.HOSTS if h.name == name), None)
    if host is None:
        reply.set_rcode(dns.rcode.NXDOMAIN)
    else:
        found = {"A": host.v4, "AAAA": host.v6}.get(wanted, ())
        if found:
            reply.answer.append(
                dns.rrset.from_text_list(question.name, DNS_TTL, "IN", wanted, list(found))
            )
    return reply.to_wire()


def serve_datagrams(address: str, port: int, log: Log) -> None:
    """Serves one UDP port of one address: DNS on 53, echo elsewhere. Each datagram is a line in the log."""
    endpoint = socket.socket(
        socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM
    )
    endpoint.bind((address, port))

    def loop() -> None:
        while True:
            data, peer = endpoint.recvfrom(65536)
            if port != 53:
                log.write("datagram", peer=peer[0], port=port, bytes=len(data))
                endpoint.sendto(data, peer)
                continue
            try:
                endpoint.sendto(answer_query(data, log, "udp", peer[0]), peer)
            except Exception as problem:  # a malformed query must not end the server
                log.write("broken", peer=peer[0], reason=repr(problem))

    threading.Thread(target=loop, daemon=True).start()


def describe_packet(frame: bytes) -> dict[str, Any] | None:
    """What an Ethernet frame carries, or None for what a quiet link says by itself and for TCP after the SYN."""
    kind = struct.unpack("!H", frame[12:14])[0]
    if kind == 0x0800 and len(frame) >= 34:
        protocol, start = frame[23], 14 + (frame[14] & 15) * 4
        source, target = (str(ipaddress.IPv4Address(frame[i : i + 4])) for i in (26, 30))
    elif kind == 0x86DD and len(frame) >= 54:
        protocol, start = frame[20], 54
        source, target = (str(ipaddress.IPv6Address(frame[i : i + 16])) for i in (22, 38))
        if protocol == 0 and len(frame) >= 62:  # hop-by-hop options stand before multicast reports
            protocol, start = frame[54], 62
    elif kind in (0x0806, 0x0800, 0x86DD):
        return None
    else:
        return {"ethertype": kind}
    payload = frame[start:]
    seen: dict[str, Any] = {"protocol": protocol, "source": source, "target": target}
    if protocol in (TCP, UDP) and len(payload) >= 8:
        seen["port"] = struct.unpack("!H", payload[2:4])[0]
    if protocol == TCP and len(payload) >= 14 and payload[13] & 0x12 != 0x02:
        return None
    if (
        protocol == ICMPV6
        and payload
        and (payload[0] in NEIGHBOUR_DISCOVERY or payload[0] == MULTICAST_REPORT)
    ):
        return None
    return seen


def watch_packets(log: Log) -> None:
    """Writes down what arrives on the link, so that raw, ICMP and unheard-of protocols are seen as well."""
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 * 1024 * 1024)
    tap.bind(("veth-origins", 0))

    def loop() -> None:
        while True:
            frame, address = tap.recvfrom(65536)
            if address[2] == socket.PACKET_OUTGOING:
                continue
            seen = describe_packet(frame)
            if seen is not None:
                log.write("packet", **seen)

    threading.Thread(target=loop, daemon=True).start()


def make_repository(directory: Path) -> None:
    """A bare repository with one commit at DIRECTORY/project.git."""
    tree = directory / "tree"
    tree.mkdir(parents=True)
    (tree / "README").write_text("A repository of the lab.\n")
    bare = directory / GIT_PREFIX.strip("/")
    identity = ["-c", "user.name=Lab", "-c", "user.email=lab@example.test"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(directory), "GIT_CONFIG_NOSYSTEM": "1"}
    for command in (
        ["git", "init", "--quiet", "--initial-branch=main", str(tree)],
        ["git", "-C", str(tree), "add", "README"],
        ["git", "-C", str(tree), *identity, "commit", "--quiet", "--message=First"],
        ["git", "clone", "--quiet", "--bare", str(tree), str(bare)],
    ):
        subprocess.run(command, check=True, timeout=30, env=environment)


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for address in names.addresses():
        bits = "64" if ":" in address else "24"
        subprocess.run(
            [
                "ip",
                "address",
                "add",
                f"{address}/{bits}",
                "dev",
                "veth-origins",
                *(["nodad"] if ":" in address else []),
            ],
            check=True,
            timeout=10,
        )
    log = Log(directory / "seen.jsonl")
    repositories = directory / "repositories"
    make_repository(repositories)
    certificates = Certificates(Authority(directory))
    listeners = []
    for v6 in (False, True):
        for port, answers, secure in (
            (443, Web, certificates),
            (8443, Web, certificates),
            (80, Web, None),
            (names.ECHO_PORT, Echo, None),
            (names.BANNER_PORT, Echo, None),
            (53, DnsStream, None),
        ):
            listeners.append(
                Listener(
                    port, answers, v6=v6, log=log, repositories=repositories, certificates=secure
                )
            )
    for address in (names.ORIGINS_V4, names.ORIGINS_V6):
        serve_datagrams(address, 53, log)
    for address in names.addresses():
        for port in (names.ECHO_PORT, 443):
            serve_datagrams(address, port, log)
    watch_packets(log)
    for listener in listeners:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
    (directory / "ready").write_text("ready\n")
    threading.Event().wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
