"""Is IPv6 really off? Asked only where no v6 rules can be had, and answered no in any doubt."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

SYSCTL = Path("/proc/sys/net/ipv6/conf")
ADDRESSES = Path("/proc/net/if_inet6")


def why_open(sysctl: Path = SYSCTL, addresses: Path = ADDRESSES) -> str:
    """Why v6 packets could leave this host; "" where that is proved impossible.

    Closed means that the kernel has no v6 at all, or that it is switched off for every
    interface, those to come included, and no interface has an address.
    """
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError as e:
        if e.errno == errno.EAFNOSUPPORT:  # not built, or started with ipv6.disable=1
            return ""
        return f"IPv6 cannot be examined: {e}"
    try:
        lines = addresses.read_text().splitlines() if addresses.exists() else []
        if lines:
            return f"interface {lines[0].split()[-1]} has an IPv6 address"
        for conf in sorted(sysctl.iterdir()):
            if (conf / "disable_ipv6").read_text().strip() != "1":
                return f"net.ipv6.conf.{conf.name}.disable_ipv6 is not 1"
    except OSError as e:
        return f"IPv6 cannot be examined: {e}"
    return ""
