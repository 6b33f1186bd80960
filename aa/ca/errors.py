"""The one error of this package: what is wrong, and what a person does about it."""

from __future__ import annotations


class CertificateAuthorityError(Exception):
    """`what` happened; `fix` says what to do. Neither ever holds key material."""

    def __init__(self, what: str, *, fix: str = "") -> None:
        self.what = what
        self.fix = fix
        super().__init__(f"{what}; {fix}" if fix else what)


class UnsafeFile(CertificateAuthorityError):
    """A file or directory belongs to the wrong one, or others may read or write it."""


class CannotIssue(CertificateAuthorityError):
    """No certificate can be made: none to sign with, out of its time, or for a name it may not sign."""
