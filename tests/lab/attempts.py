"""Ways out of a run, one by one: `attempts.py NAME...` tries each and prints {name: outcome} as JSON.

An outcome is "reached: ..." when something answered or the kernel took the packet, and
"refused: ..." with the error otherwise. Runs with the standard library alone, as any user,
inside a run and outside: the same act that is refused inside must work outside.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import ssl
import struct
import sys
import urllib.request
from collections.abc import Callable

ORIGIN = "10.77.0.10"
ORIGIN_V6 = "fd77::10"
DENIED = "10.77.0.20"
ECHO = 9999
PATIENCE = 1.5  # seconds to wait for an answer: a dropped packet gives none

SYS_IO_URING_SETUP = 425  # x86_64 and arm64 alike
AF_VSOCK = 40
MSG_FASTOPEN = 0x20000000


def tcp(address: str, port: int, payload: bytes = b"hello\n") -> str:
    with socket.create_connection((address, port), PATIENCE) as s:
        s.sendall(payload)
        return heard(s.recv(100))


def heard(data: bytes) -> str:
    if not data:
        raise ConnectionResetError("closed without a word")
    return repr(data[:20])


def datagram(address: str, port: int, payload: bytes = b"hello\n") -> str:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.settimeout(PATIENCE)
        s.connect((address, port))
        s.send(payload)
        return heard(s.recv(100))


def echo_request(kind: int, protocol: int, address: str) -> str:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, kind, protocol) as s:
        s.settimeout(PATIENCE)
        head = struct.pack("!BBHHH", 128 if ":" in address else 8, 0, 0, 7, 1)
        total = sum(struct.unpack("!4H", head))
        checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
        s.sendto(head[:2] + struct.pack("!H", checksum) + head[4:], (address, 0))
        return heard(s.recv(100))


def fast_open() -> str:
    """Data in the SYN: `sendto` connects. Python's own timeouts would make the socket non-blocking."""
    patience = struct.pack("ll", int(PATIENCE), int(PATIENCE % 1 * 1e6))
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        s.sendto(b"hello\n", MSG_FASTOPEN, (ORIGIN, ECHO))
        return heard(s.recv(100))


def opened(family: int, kind: int, protocol: int = 0) -> str:
    with socket.socket(family, kind, protocol):
        return "a socket"


def io_uring() -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(120)
    fd = libc.syscall(SYS_IO_URING_SETUP, 4, parameters)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.close(fd)
    return "a ring"


def unix(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(PATIENCE)
        s.connect(path.replace("@", "\0", 1) if path.startswith("@") else path)
        return "connected"


def tls(address: str, name: str | None) -> str:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with socket.create_connection((address, 443), PATIENCE) as raw:
        with context.wrap_socket(raw, server_hostname=name) as s:
            s.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return heard(s.recv(100))


def http_host(address: str, host: str) -> str:
    with socket.create_connection((address, 80), PATIENCE) as s:
        s.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = s.recv(2000)
        if b" 403 " in answer.partition(b"\r\n")[0]:
            raise PermissionError(13, answer.partition(b"\r\n")[0].decode())
        return heard(answer)


def hostile_proxy() -> str:
    """Proxy variables that point somewhere else must not lead anywhere."""
    proxy = urllib.request.ProxyHandler({"http": f"http://{DENIED}:80"})
    opener = urllib.request.build_opener(proxy)
    with opener.open("http://denied.test/", timeout=PATIENCE) as answer:
        return heard(answer.read(100))


def inherited() -> str:
    """Standard input is a socket that somebody connected outside."""
    with socket.socket(fileno=os.dup(0)) as s:
        s.settimeout(PATIENCE)
        s.sendall(b"hello\n")
        return heard(s.recv(100))


def query(server: str, name: str) -> str:
    """Asks a name server of its own choice; an answer that refuses is a refusal."""
    labels = b"".join(bytes([len(x)]) + x.encode() for x in name.split(".")) + b"\0"
    message = struct.pack("!6H", 0x4242, 0x0100, 1, 0, 0, 0) + labels + struct.pack("!2H", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(PATIENCE)
        s.sendto(message, (server, 53))
        answer = s.recv(1000)
    code = answer[3] & 15
    if code:
        raise PermissionError(13, f"DNS response code {code}")
    return f"{struct.unpack('!H', answer[6:8])[0]} answers"


def resolve(name: str) -> str:
    return str(sorted({a[4][0] for a in socket.getaddrinfo(name, 443)}))


ATTEMPTS: dict[str, Callable[[], str]] = {
    "tcp-port": lambda: tcp(ORIGIN, ECHO),
    "tcp-port-v6": lambda: tcp(ORIGIN_V6, ECHO),
    "tcp-port-mapped": lambda: tcp(f"::ffff:{ORIGIN}", ECHO),
    "tcp-banner": lambda: tcp(ORIGIN, 2222, b""),
    "tcp-fast-open": fast_open,
    "tls-denied-name": lambda: tls(DENIED, "denied.test"),
    "tls-no-name": lambda: tls(DENIED, None),
    "tls-borrowed-address": lambda: tls(ORIGIN, "denied.test"),
    "http-denied-host": lambda: http_host(DENIED, "denied.test"),
    "udp": lambda: datagram(ORIGIN, ECHO),
    "udp-v6": lambda: datagram(ORIGIN_V6, ECHO),
    "quic": lambda: datagram(ORIGIN, 443),
    "ping": lambda: echo_request(socket.SOCK_DGRAM, socket.IPPROTO_ICMP, ORIGIN),
    "ping-v6": lambda: echo_request(socket.SOCK_DGRAM, socket.IPPROTO_ICMPV6, ORIGIN_V6),
    "raw": lambda: echo_request(socket.SOCK_RAW, socket.IPPROTO_ICMP, ORIGIN),
    "packet": lambda: opened(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)),
    "vsock": lambda: opened(AF_VSOCK, socket.SOCK_STREAM),
    "netlink": lambda: opened(socket.AF_NETLINK, socket.SOCK_RAW),
    "sctp": lambda: opened(socket.AF_INET, socket.SOCK_STREAM, 132),
    "io-uring": io_uring,
    "hostile-proxy": hostile_proxy,
    "inherited": inherited,
    "dns-denied": lambda: resolve("denied.test"),
    "dns-tunnel": lambda: query("10.77.0.2", "c2VjcmV0.other.test"),
    "dns-other-server": lambda: query(ORIGIN, "denied.test"),
    "bus": lambda: unix("/run/dbus/system_bus_socket"),
    "manager": lambda: unix("/run/systemd/private"),
    "journal": lambda: unix("/run/systemd/journal/stdout"),
    "control": lambda: unix("/run/agent-assembly/control"),
    "enforce": lambda: unix("/run/agent-assembly/enforce"),
    "launch": lambda: unix("/run/agent-assembly/launch"),
    "outside-socket": lambda: unix("/run/lab-outside.sock"),
    "shared-tmp-socket": lambda: unix("/tmp/lab-outside.sock"),
    "loopback-service": lambda: tcp("127.0.0.1", 7777),
}


def attempt(name: str) -> str:
    try:
        return f"reached: {ATTEMPTS[name]()}"
    except Exception as e:  # the error is the result
        return f"refused: {type(e).__name__}: {e}"


if __name__ == "__main__":
    print(json.dumps({name: attempt(name) for name in sys.argv[1:] or ATTEMPTS}))
