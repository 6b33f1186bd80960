"""The private channel between the front and one worker: whole JSON messages, never waiting.

A message that was sent lies in the other end's queue when `send` returns. So what the front sends
before it connects can be read by the worker as soon as the connection is there.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any

MESSAGE_LIMIT = 1 << 16
MESSAGES_PER_WAKE = 256


class ChannelClosed(Exception):
    """The other end is gone."""


class Channel:
    """One end. `fileno` is for the loop."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Mapping[str, Any]) -> bool:
        """False when the other end does not keep up. Raises `ChannelClosed`."""
        data = json.dumps(message).encode()
        if len(data) > MESSAGE_LIMIT:
            raise ValueError(f"a message of {len(data)} bytes")
        try:
            self._socket.send(data)
        except BlockingIOError:
            return False
        except OSError as e:
            raise ChannelClosed(str(e)) from e
        return True

    def receive(self) -> Iterator[dict[str, Any]]:
        """What has come, oldest first. Raises `ChannelClosed` at the end."""
        for _ in range(MESSAGES_PER_WAKE):
            try:
                data = self._socket.recv(MESSAGE_LIMIT)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as e:
                raise ChannelClosed(str(e)) from e
            if not data:
                raise ChannelClosed("the other end is closed")
            message = json.loads(data)
            if not isinstance(message, dict):
                raise ValueError("a message that is no object")
            yield message

    def close(self) -> None:
        self._socket.close()


def channel_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
