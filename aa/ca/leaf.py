"""Leaves: a certificate for exactly one host, made from the intermediate when it is first needed.

All leaves of a process share one key, made anew with each intermediate. It lives in the memory of
the same process as all the others would, so a key per host would protect nothing more; sharing it
saves a key's making per host. One `LeafIssuer` belongs to one event loop; it does not lock.
"""

from __future__ import annotations

import datetime
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from aa.ca import certificate as form
from aa.ca.authority import read_intermediate
from aa.ca.certificate import Certificate, Issuer, Key
from aa.ca.errors import CannotIssue, CertificateAuthorityError
from aa.ca.places import INTERMEDIATE, Places

MAX_LEAVES = 1024
"""Leaves that are kept; the one that was not used for longest makes room."""
RENEW_BELOW = 0.5
"""The share of a leaf's life that is left when another one is made."""

RETRY_SECONDS = 1.0
"""How often a new intermediate that cannot be used is tried again."""

RESTART = "`sudo systemctl start aa-ca` issues one"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Leaf:
    """What a TLS server presents for one host. `chain` is what goes along, nearest issuer first."""

    host: str
    certificate: Certificate
    key: Key
    chain: tuple[Certificate, ...]
    begins: datetime.datetime
    renew_at: datetime.datetime

    @cached_property
    def chain_pem(self) -> bytes:
        """Leaf and chain."""
        return b"".join(form.certificate_pem(c) for c in (self.certificate, *self.chain))

    @property
    def key_pem(self) -> bytes:
        """The secret half, unencrypted. For memory only, never for a file that others can open."""
        return form.key_pem(self.key)


@dataclass(frozen=True, slots=True)
class Signer:
    """One intermediate, and the key that all leaves made from it have."""

    issuer: Issuer
    leaf_key: Key
    stamp: tuple[int, int, int]
    """Device, inode and time of change of the file, to see that there is another."""

    @property
    def chain(self) -> tuple[Certificate, ...]:
        return (self.issuer.certificate,)


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class LeafIssuer:
    """Issues leaves and keeps them. Follows the intermediate's file; a broken new one changes nothing."""

    def __init__(
        self,
        directory: Path = Places().proxy,
        *,
        limit: int = MAX_LEAVES,
        clock: Callable[[], datetime.datetime] = utc_now,
    ) -> None:
        self._path = directory / INTERMEDIATE
        self._limit = limit
        self._clock = clock
        self._leaves: OrderedDict[str, Leaf] = OrderedDict()
        self._signer: Signer | None = None
        self._retry_at = 0.0
        self._told = ""

    def __len__(self) -> int:
        return len(self._leaves)

    @property
    def intermediate(self) -> Certificate | None:
        """The certificate in use, if there is one."""
        return self._signer.issuer.certificate if self._signer else None

    def issue(self, host: str) -> Leaf:
        """The leaf for a canonical name or an address as text. Raises `CannotIssue`; then deny."""
        signer = self._current()
        now = self._clock()
        leaf = self._leaves.get(host)
        if leaf is not None and leaf.begins <= now < leaf.renew_at:
            self._leaves.move_to_end(host)
            return leaf
        made = form.make_leaf(signer.leaf_key, signer.issuer, host, now=now)
        begins, ends = form.validity(made)
        renew_at = ends - (ends - now) * RENEW_BELOW
        leaf = Leaf(host, made, signer.leaf_key, signer.chain, begins, renew_at)
        self._leaves[host] = leaf
        self._leaves.move_to_end(host)
        while len(self._leaves) > self._limit:
            self._leaves.popitem(last=False)
        return leaf

    def reread(self) -> bool:
        """Takes another intermediate into use if there is one. Returns whether it did.

        Connections that have their leaf go on with it. Raises `CertificateAuthorityError` when the
        file cannot be used; the intermediate in use stays.
        """
        stamp = self._stamp()
        if self._signer is not None and self._signer.stamp == stamp:
            return False
        try:
            key, certificate = read_intermediate(self._path)
        except OSError as e:
            raise CertificateAuthorityError(f"{self._path}: {e.strerror}", fix=RESTART) from e
        self._signer = Signer(Issuer(key, certificate), form.new_key(), stamp)
        self._leaves.clear()
        self._retry_at, self._told = 0.0, ""
        return True

    def _current(self) -> Signer:
        """The signer to use now. One `stat` tells whether there is another."""
        try:
            if self._signer is None or self._signer.stamp != self._stamp():
                self._try_reread()
        except CertificateAuthorityError as e:
            if self._signer is None:
                raise CannotIssue(f"no intermediate: {e.what}", fix=e.fix) from e
            if str(e) != self._told:
                self._told = str(e)
                log.warning("the intermediate in use stays: %s", e)
        if self._signer is None:
            raise CannotIssue(f"no intermediate in {self._path}", fix=RESTART)
        return self._signer

    def _try_reread(self) -> None:
        """Reads a file that could not be used before only once in a while."""
        now = time.monotonic()
        if self._signer is None or now >= self._retry_at:
            self._retry_at = now + RETRY_SECONDS
            self.reread()

    def _stamp(self) -> tuple[int, int, int]:
        try:
            told = os.stat(self._path)
        except OSError as e:
            raise CertificateAuthorityError(f"{self._path}: {e.strerror}", fix=RESTART) from e
        return told.st_dev, told.st_ino, told.st_ctime_ns
