"""The canary itself, run as a file by the interpreter alone: tries each thing once and prints the errno of each.

Arguments: the port that must be refused, the port that must be let through. Output:
one JSON object; 0 is success.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from collections.abc import Callable
from functools import partial

SOCKETS = {
    "udplite": (socket.SOCK_DGRAM, 136),
    "mptcp": (socket.SOCK_STREAM, 262),
    "raw": (socket.SOCK_RAW, 1),
}


def send_connected(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect(("127.0.0.1", port))
        s.send(b"")


def send_to(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.sendto(b"", ("127.0.0.1", port))


def make_socket(name: str) -> None:
    kind, protocol = SOCKETS[name]
    socket.socket(socket.AF_INET, kind, protocol).close()


def remove_nothing() -> None:
    """A file call that changes nothing wherever it is made; an attempt is seen as well."""
    os.unlink("/nonexistent/aa-canary")


def outcome(attempt: Callable[[], None]) -> int:
    try:
        attempt()
    except OSError as e:
        return e.errno or errno.EIO
    return 0


if __name__ == "__main__":
    refused, allowed = int(sys.argv[1]), int(sys.argv[2])
    outcome(remove_nothing)
    tried = {
        "refused": outcome(partial(send_connected, refused)),
        "allowed": outcome(partial(send_to, allowed)),
        "sockets": {name: outcome(partial(make_socket, name)) for name in SOCKETS},
    }
    print(json.dumps(tried))
