"""How long SOCK_DIAG takes to say whose a connection is: microseconds for one question, median of rounds.

/usr/bin/python3 -m benchmarks.sockdiag
"""

from __future__ import annotations

import json
import resource
import socket
import statistics
import time
from collections.abc import Callable

from aa.sockdiag import SockDiag

ROUNDS = 7
QUESTIONS = 5000
OTHER_CONNECTIONS = 2000
"""Connections of others beside the one asked for; an exact question must not get slower by them."""


def microseconds(question: Callable[[], object], questions: int) -> float:
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(questions):
            question()
        rounds.append((time.perf_counter() - began) / questions * 1e6)
    return statistics.median(rounds)


def tell(name: str, value: float) -> None:
    print(json.dumps({"measure": name, "value": round(value, 1), "unit": "microseconds"}))


def main() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with SockDiag() as diag, socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        here = server.getsockname()
        with socket.create_connection(here) as client, server.accept()[0]:
            ends = client.getsockname(), here

            def tcp() -> object:
                return diag.owner(socket.AF_INET, socket.IPPROTO_TCP, *ends)

            tell("owner of a TCP connection", microseconds(tcp, QUESTIONS))
            others = []
            for _ in range(OTHER_CONNECTIONS // 2):
                others += [socket.create_connection(here), server.accept()[0]]
            tell(f"the same beside {OTHER_CONNECTIONS} other sockets", microseconds(tcp, QUESTIONS))
            for other in others:
                other.close()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind(("127.0.0.1", 0))

            def udp() -> object:
                return diag.owner(socket.AF_INET, socket.IPPROTO_UDP, sender.getsockname(), None)

            tell("owner of a UDP sender, all its possible sockets", microseconds(udp, QUESTIONS))


if __name__ == "__main__":
    main()
