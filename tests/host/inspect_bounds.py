"""What one WebSocket message may cost a worker, tried on one end of a WebSocket by itself.

A program of its own, because the engine has libraries of its own: `python -m tests.host.inspect_bounds`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

ENGINE = Path(__file__).parents[2] / "build/inspect/py311"
sys.path.insert(0, str(ENGINE))

from wsproto import ConnectionType  # noqa: E402
from wsproto.events import CloseConnection  # noqa: E402

from aa.proxy.inspect import engine  # noqa: E402

SECONDS = 10.0
"""Of CPU time. It takes about two, and minutes where each piece copies what came before it."""


def end() -> engine.WebSocketEnd:
    return engine.WebSocketEnd(ConnectionType.SERVER, [], conn=None)


def frame_in_small_pieces() -> None:
    one, pieces = end(), 200_000
    size = pieces * 8
    one.receive_data(b"\x82\xff" + size.to_bytes(8, "big") + bytes(4))
    before = time.process_time()
    for _ in range(pieces):
        one.receive_data(b"12345678")
        for event in one.events():
            one.frame_buf[-1] += event.data
    assert len(b"".join(one.frame_buf)) == size
    assert time.process_time() - before < SECONDS, time.process_time() - before


def empty_frames_without_an_end() -> None:
    one, frames = end(), engine.MESSAGE_LIMIT // engine.FRAME_BYTES + 2
    one.receive_data(b"\x02\x80" + bytes(4))
    list(one.events())
    for _ in range(frames // 1000 + 1):
        one.receive_data((b"\x00\x80" + bytes(4)) * 1000)
        for event in one.events():
            if isinstance(event, CloseConnection):
                assert event.code == 1009
                return
    raise AssertionError(f"{frames} frames of one message, and no end")


if __name__ == "__main__":
    frame_in_small_pieces()
    empty_frames_without_an_end()
    print("bounded")
