"""Varlink, the protocol that every process here speaks: JSON messages ended by a NUL over a Unix socket.

`idl` reads interface definitions and checks parameters against them, `codec`
turns messages into bytes and back under fixed limits, `server`, `client` and
`asyncclient` move them. See https://varlink.org for the protocol itself.

A module is imported when one of its names is first used: asyncio alone takes
longer to import than a whole command of `aasm` takes to run.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aa.varlink.asyncclient import AsyncClient
    from aa.varlink.client import Client
    from aa.varlink.codec import VarlinkError
    from aa.varlink.idl import Interface, load_interface
    from aa.varlink.server import Call, Peer, Server, Service

__all__ = [
    "AsyncClient",
    "Call",
    "Client",
    "Interface",
    "Peer",
    "Server",
    "Service",
    "VarlinkError",
    "load_interface",
]

_MODULES = {
    "AsyncClient": "asyncclient",
    "Call": "server",
    "Client": "client",
    "Interface": "idl",
    "Peer": "server",
    "Server": "server",
    "Service": "server",
    "VarlinkError": "codec",
    "load_interface": "idl",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
