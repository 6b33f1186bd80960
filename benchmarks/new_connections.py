"""Times new HTTPS connections: new_connections.py HOST COUNT, one JSON line with times in milliseconds.

Runs inside the lab, once governed and once not, with the standard library alone. A connection is a
TCP connect, a TLS handshake and one small request on it; the name's lookup is timed by itself.
"""

import json
import socket
import ssl
import sys
import time


def main(host: str, count: int) -> None:
    context = ssl.create_default_context()
    lookups, connections = [], []
    for _ in range(count + 1):
        begun = time.perf_counter()
        family, kind, protocol, _, address = socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)[
            0
        ]
        found = time.perf_counter()
        with socket.socket(family, kind, protocol) as raw:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            raw.connect(address)
            with context.wrap_socket(raw, server_hostname=host) as stream:
                stream.sendall(
                    f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
                )
                answer = stream.recv(65536)
        done = time.perf_counter()
        if not answer.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"unexpected answer: {answer[:80]!r}")
        lookups.append(1000 * (found - begun))
        connections.append(1000 * (done - found))
    # The first is warm-up.
    print(json.dumps({"lookups": lookups[1:], "connections": connections[1:]}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
