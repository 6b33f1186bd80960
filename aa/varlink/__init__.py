"""Varlink, the protocol that every process here speaks: JSON messages ended by a NUL over a Unix socket.

`idl` reads interface definitions and checks parameters against them, `codec`
turns messages into bytes and back under fixed limits, `server` and `client`
move them. See https://varlink.org for the protocol itself.
"""

from aa.varlink.client import AsyncClient, Client
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
