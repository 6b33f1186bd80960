"""The environment of a run: what may come from its caller, and what is always set. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

PASSED = frozenset({"TERM", "COLORTERM", "LANG", "LANGUAGE", "TZ", "NO_COLOR"})
PASSED_PREFIX = "LC_"

SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
"""Programs of the system come first, so that a home cannot stand in for them."""

TRUST_STORE = "/etc/ssl/certs/ca-certificates.crt"
TRUSTED_BY = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")
"""Who brings authorities of its own and would not accept this host's: PyPI's httpx and OpenSSL or
Rust programs built elsewhere, PyPI's requests and pip, Node and npm. Others read the store anyway."""

MAX_VARIABLES = 512
MAX_BYTES = 128 << 10
"""Of all names and values that a caller may pass; it may send more, which is not looked at."""

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class BadEnvironment(ValueError):
    """What the caller sent is not an environment."""


def parse(assignments: Iterable[str]) -> dict[str, str]:
    """`NAME=value` texts as a mapping; a later one wins. Names that no shell could set are left out."""
    found: dict[str, str] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or "\0" in text:
            raise BadEnvironment(f"not an assignment: {name[:64]!r}")
        if NAME.fullmatch(name):
            found[name] = value
    return found


def of_run(
    caller: Mapping[str, str],
    *,
    allowed: Iterable[str],
    user: str,
    home: str,
    shell: str,
    run: str,
    agent: str,
    proxied: bool,
) -> dict[str, str]:
    """What a run's program gets. `allowed` are the names that its agent's file adds.

    `proxied` is whether the run has the proxy layer: then its programs look for authorities where
    this host's own is, once the system trusts it.
    """
    wanted = PASSED | set(allowed)
    passed = {
        name: value
        for name, value in caller.items()
        if name in wanted or name.startswith(PASSED_PREFIX)
    }
    if len(passed) > MAX_VARIABLES or sum(map(len, (*passed, *passed.values()))) > MAX_BYTES:
        raise BadEnvironment(
            f"more than {MAX_VARIABLES} variables or {MAX_BYTES} bytes to pass to the run"
        )
    return {
        "PATH": f"{SYSTEM_PATH}:{home}/.local/bin",
        **(dict.fromkeys(TRUSTED_BY, TRUST_STORE) if proxied else {}),
        **passed,
        "HOME": home,
        "USER": user,
        "LOGNAME": user,
        "SHELL": shell,
        "AA_RUN": run,
        "AA_AGENT": agent,
    }
