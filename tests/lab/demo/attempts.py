"""What the sample agent tries, what must become of it, and where that is seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.lab.harness import names

CURL = ["curl", "--silent", "--show-error", "--max-time", "8"]
PYTHON = ["/usr/bin/python3", "-I", "-c"]
API_V4 = "10.77.0.10"
IO_URING_SETUP = 425

FETCH = "fetch(process.argv[1]).then(r => r.text()).then(t => console.log(t), e => { console.log(e.cause ?? e); process.exit(1) })"
URLOPEN = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=8).status)"
TCP = (
    "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 3); "
    "s.send(b'x'); d = s.recv(9); print(d or 'closed'); raise SystemExit(not d)"
)
UDP = (
    "import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(2); "
    "s.connect((sys.argv[1], int(sys.argv[2]))); s.send(b'x'); print(s.recv(9))"
)
SOCKET = "import socket, sys; print(socket.socket(*map(int, sys.argv[1:])))"
RING = (
    "import ctypes, os; c = ctypes.CDLL(None, use_errno=True); "
    f"r = c.syscall({IO_URING_SETUP}, 4, ctypes.create_string_buffer(120)); "
    "print(os.strerror(ctypes.get_errno())); raise SystemExit(r < 0)"
)
CHAT = """
import aiohttp, asyncio, sys
async def main():
    async with aiohttp.ClientSession() as session, session.ws_connect(sys.argv[1]) as chat:
        await chat.send_str(sys.argv[2])
        answer = await chat.receive(timeout=8)
        print(answer.type.name, answer.data, answer.extra or "")
        return answer.type is not aiohttp.WSMsgType.TEXT
sys.exit(asyncio.run(main()))
"""
INSPECTED = f"{names.INSPECTED}:443"
FORBIDDEN = "DROP TABLE users"
CONNECT_UNIX = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print('connected')"


@dataclass(frozen=True)
class Attempt:
    """`allowed` is whether it must succeed; `target` is that of its record, empty where no layer is asked.

    `seen` are fields of the event that the origins must have seen if it is allowed, and must not have
    seen if it is not.
    """

    title: str
    command: list[str]
    allowed: bool
    target: str = ""
    seen: Mapping[str, Any] = field(default_factory=dict)


def _request(host: str, path: str) -> dict[str, Any]:
    return {"kind": "request", "host": host, "path": path}


ATTEMPTS = (
    Attempt(
        "HTTPS by curl, IPv4",
        [*CURL, "-4", f"https://{names.API}/curl4"],
        True,
        f"{names.API}:443",
        _request(names.API, "/curl4"),
    ),
    Attempt(
        "HTTPS by curl, IPv6",
        [*CURL, "-6", f"https://{names.API}/curl6"],
        True,
        f"{names.API}:443",
        _request(names.API, "/curl6"),
    ),
    Attempt(
        "HTTPS by Python",
        [*PYTHON, URLOPEN, f"https://{names.API}/python"],
        True,
        f"{names.API}:443",
        _request(names.API, "/python"),
    ),
    Attempt(
        "HTTPS by Node's fetch",
        ["node", "-e", FETCH, f"https://{names.API}/node"],
        True,
        f"{names.API}:443",
        _request(names.API, "/node"),
    ),
    Attempt(
        "git clone over HTTPS",
        ["git", "clone", "--quiet", f"https://{names.GIT}/project.git", "clone"],
        True,
        f"{names.GIT}:443",
        {"kind": "request", "host": names.GIT},
    ),
    Attempt(
        "plain HTTP",
        [*CURL, "--fail", f"http://{names.API}/plain"],
        True,
        f"{names.API}:80",
        _request(names.API, "/plain"),
    ),
    Attempt(
        "the explicit proxy",
        [*CURL, "--proxy", "http://127.0.0.1:8899", f"https://{names.API}/explicit"],
        True,
        f"{names.API}:443",
        _request(names.API, "/explicit"),
    ),
    Attempt(
        "inspected: an allowed path",
        [*CURL, "--fail-with-body", f"https://{names.INSPECTED}/public/readme"],
        True,
        INSPECTED,
        _request(names.INSPECTED, "/public/readme"),
    ),
    Attempt(
        "inspected: another path of the same host",
        [*CURL, "--fail-with-body", f"https://{names.INSPECTED}/private/keys"],
        False,
        INSPECTED,
        _request(names.INSPECTED, "/private/keys"),
    ),
    Attempt(
        "inspected: a WebSocket message",
        [*PYTHON, CHAT, f"wss://{names.INSPECTED}/public/chat", "hello"],
        True,
        INSPECTED,
        {"kind": "message", "text": "hello"},
    ),
    Attempt(
        "inspected: a message with DROP TABLE",
        [*PYTHON, CHAT, f"wss://{names.INSPECTED}/public/chat", FORBIDDEN],
        False,
        INSPECTED,
        {"kind": "message", "text": FORBIDDEN},
    ),
    Attempt(
        "a name no rule allows",
        ["getent", "ahosts", names.OTHER],
        False,
        names.OTHER,
        {"kind": "dns"},
    ),
    Attempt(
        "a denied host by address",
        [*CURL, "--resolve", f"{names.DENIED}:443:10.77.0.20", f"https://{names.DENIED}/"],
        False,
        f"{names.DENIED}:443",
        {"kind": "connection"},
    ),
    Attempt(
        "a denied host by the explicit proxy",
        [*CURL, "--proxy", "http://127.0.0.1:8899", f"https://{names.DENIED}/"],
        False,
        f"{names.DENIED}:443",
        {"kind": "connection"},
    ),
    Attempt(
        "an allowed name, one address on loopback",
        [*CURL, "--resolve", f"{names.MIXED}:443:{API_V4}", f"https://{names.MIXED}/"],
        False,
        f"{names.MIXED}:443",
        {"kind": "connection"},
    ),
    Attempt(
        "the cloud's metadata address",
        [*CURL, "--fail-with-body", f"http://{names.METADATA_V4}/"],
        False,
        f"{names.METADATA_V4}:80",
        {"kind": "packet"},
    ),
    Attempt(
        "TCP to another port",
        [*PYTHON, TCP, API_V4, "9999"],
        False,
        f"{API_V4}:9999",
        {"kind": "connection"},
    ),
    Attempt("UDP", [*PYTHON, UDP, API_V4, "9999"], False, f"{API_V4}:9999/udp", {"kind": "packet"}),
    Attempt(
        "QUIC's port", [*PYTHON, UDP, API_V4, "443"], False, f"{API_V4}:443/udp", {"kind": "packet"}
    ),
    Attempt(
        "a ping socket",
        [*PYTHON, SOCKET, "2", "2", "1"],
        False,
        "socket:inet/dgram/icmp",
        {"kind": "packet"},
    ),
    Attempt("a raw socket", [*PYTHON, SOCKET, "2", "3", "1"], False, "", {"kind": "packet"}),
    Attempt("a packet socket", [*PYTHON, SOCKET, "17", "3"], False, "", {"kind": "packet"}),
    Attempt("a vsock socket", [*PYTHON, SOCKET, "40", "1"], False, ""),
    Attempt("an io_uring", [*PYTHON, RING], False, ""),
    Attempt(
        "the operators' socket", [*PYTHON, CONNECT_UNIX, "/run/agent-assembly/control"], False, ""
    ),
    Attempt("the audit log", ["cat", "/var/log/agent-assembly/audit.jsonl"], False, ""),
)
