"""Gives a capability up: before the process has a second thread, for a thread gives up its own only."""

from __future__ import annotations

import ctypes
import os

SYS_ADMIN = 21

_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
_WORDS = 2


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def give_up(capability: int) -> None:
    """Takes a capability out of this thread, and so of its later threads.

    With NoNewPrivileges, as the unit has it, no program that is executed gets it back. Not
    having it is no error. Raises `OSError`.
    """
    c = ctypes.CDLL(None, use_errno=True)
    header = _Header(_VERSION, 0)
    sets = (_Sets * _WORDS)()
    _check(c.capget(ctypes.byref(header), sets), "capget")
    word, bit = divmod(capability, 32)
    for name in ("effective", "permitted", "inheritable"):
        setattr(sets[word], name, getattr(sets[word], name) & ~(1 << bit))
    _check(c.capset(ctypes.byref(header), sets), "capset")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
