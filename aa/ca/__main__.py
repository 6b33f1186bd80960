"""The authority's work, one step a call: `python3 -m aa.ca --init`, as aa-ca.service does it.

`--stage` and `--commit` are the halves of a rotation, between which the trust store learns the new
root; `--install-trust` and `--uninstall-trust` are for the package's scripts.
"""

from __future__ import annotations

import argparse
import grp
import logging
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from aa.ca import authority, files, tell, trust
from aa.ca.certificate import fingerprint
from aa.ca.errors import CertificateAuthorityError
from aa.ca.inspected import Inspected, read
from aa.ca.leaf import utc_now
from aa.ca.places import INSPECTED_HOSTS, PROXY_GROUP, Places
from aa.paths import ENFORCE_SOCKET

SYSTEMCTL_SECONDS = 10.0
MAX_ROUNDS = 5
"""How often the list of inspected hosts is read again when it changed meanwhile."""
PROXY_UNIT = "aa-proxy.service"

log = logging.getLogger("aa.ca")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 with the reason on stderr, 2 wrong usage."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format=_line_format(), stream=sys.stderr, force=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    try:
        _do(options)
    except CertificateAuthorityError as e:
        log.error("%s", e)
        return 1
    except OSError as e:
        log.error("%s: %s", e.filename or "the authority", e.strerror or e)
        return 1
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m aa.ca", description=(__doc__ or "").split("\n")[0]
    )
    step = parser.add_mutually_exclusive_group(required=True)
    step.add_argument(
        "--init", action="store_true", help="root if there is none, intermediate if due"
    )
    step.add_argument("--renew", action="store_true", help="a new intermediate, due or not")
    step.add_argument("--stage", action="store_true", help="make a new root without using it")
    step.add_argument("--commit", action="store_true", help="use the staged root")
    step.add_argument("--install-trust", action="store_true", help="root into the trust store")
    step.add_argument("--uninstall-trust", action="store_true", help="roots out of the trust store")
    parser.add_argument("--ca-dir", type=Path, default=Places().root, help="the root's directory")
    parser.add_argument("--proxy-dir", type=Path, default=Places().proxy, help="the intermediate's")
    parser.add_argument("--group", default=PROXY_GROUP, help="who reads the intermediate's key")
    parser.add_argument("--inspected", type=Path, default=INSPECTED_HOSTS, help="list of hosts")
    parser.add_argument("--gateway", type=Path, default=ENFORCE_SOCKET, help="its enforce socket")
    parser.add_argument("--record", action="store_true", help="tell the gateway, for the audit log")
    return parser.parse_args(arguments)


def _do(options: argparse.Namespace) -> None:
    places = Places(options.ca_dir, options.proxy_dir)
    if options.uninstall_trust:
        # works without a root too: what an earlier one left is to go
        for name in trust.uninstall():
            _tell(options, f"{name} is out of the trust store")
        return
    gid = _gid(options.group)
    authority.make_directories(places, gid)
    with files.locked(places.root):
        if options.stage:
            root = authority.stage(places, host=socket.gethostname(), now=utc_now())
            _tell(options, f"staged root {fingerprint(root)}")
        elif options.commit:
            root = authority.commit(places)
            _tell(options, f"root {fingerprint(root)} is in use", root=fingerprint(root))
        elif options.install_trust:
            _install_trust(options, places)
        else:
            _ensure(options, places, gid)


def _ensure(options: argparse.Namespace, places: Places, gid: int) -> None:
    """Root and intermediate as they should be, for the list of hosts as it is at the end."""
    host = socket.gethostname()
    if authority.ensure_root(places, host=host, now=utc_now()):
        _, root = authority.read_root(places)
        _tell(options, f"made root {fingerprint(root)}", root=fingerprint(root))
    force, problem = options.renew, None
    for number in range(MAX_ROUNDS):
        inspected, problem = _inspected(options.inspected)
        renewal = authority.renew(
            places, inspected=inspected, host=host, gid=gid, now=utc_now(), force=force
        )
        force = False
        if not renewal.why:
            if number == 0:
                log.info("%s", authority.describe(renewal))
            break
        _tell(options, authority.describe(renewal), intermediate=fingerprint(renewal.intermediate))
        _reload_proxy()
    if problem is not None:
        raise problem


def _inspected(path: Path) -> tuple[Inspected | None, CertificateAuthorityError | None]:
    """The list; one that cannot be used changes no constraints, but is told at the end."""
    try:
        return read(path), None
    except CertificateAuthorityError as e:
        return None, e


def _install_trust(options: argparse.Namespace, places: Places) -> None:
    known = authority.published(places)
    if known is None:
        raise CertificateAuthorityError("there is no root yet", fix="`sudo systemctl start aa-ca`")
    state = trust.install(known.root)
    _tell(options, f"root {fingerprint(known.root)} is in the trust store")
    if state.java is False:
        log.info("Java's store follows when dpkg is done")


def _gid(group: str) -> int:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise CertificateAuthorityError(
            f"there is no group {group}", fix="`sudo systemd-sysusers` makes it"
        ) from None


def _reload_proxy() -> None:
    """Lets the proxy take the new intermediate into use at once; it would see it by itself as well."""
    if not Path("/run/systemd/system").is_dir():
        return
    active = _systemctl("is-active", "--quiet", PROXY_UNIT)
    if active == 0 and _systemctl("--no-block", "reload", PROXY_UNIT) != 0:
        log.warning("%s was not told; it sees the new intermediate by itself", PROXY_UNIT)


def _systemctl(*arguments: str) -> int:
    try:
        return subprocess.run(
            ["/usr/bin/systemctl", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=SYSTEMCTL_SECONDS,
            check=False,
        ).returncode
    except (OSError, subprocess.TimeoutExpired):
        return -1


def _tell(options: argparse.Namespace, text: str, **attributes: Any) -> None:
    """Says it in the journal and, when asked to, in the audit log."""
    log.info("%s", text)
    if options.record:
        tell.record(text, gateway=options.gateway, **attributes)


def _line_format() -> str:
    return "%(message)s" if os.environ.get("JOURNAL_STREAM") else "aa-ca: %(message)s"


if __name__ == "__main__":
    sys.exit(main())
