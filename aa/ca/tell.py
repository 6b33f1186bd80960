"""What the authority did goes to the journal, and through the gateway into the audit log."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from aa.model import Kind, Layer, RecordType, Report
from aa.paths import ENFORCE_SOCKET
from aa.varlink import Client, VarlinkError
from aa.varlink.codec import ProtocolError

GATEWAY_SECONDS = 3.0
"""How long the gateway may take to write a record."""
COMPONENT = "ca"

log = logging.getLogger("aa.ca")


def record(text: str, *, gateway: Path = ENFORCE_SOCKET, **attributes: Any) -> bool:
    """Writes a record of the guard's own life. Without a gateway it says so and goes on: a
    certificate must not depend on the log of its making. Returns whether there is a record.
    """
    report = Report(
        type=RecordType.LIFECYCLE,
        layer=Layer.PROXY,
        kind=Kind.GUARD,
        target=COMPONENT,
        time=time.time_ns(),
        reason=text,
        attributes=attributes,
    )
    parameters = {"component": COMPONENT, "sequence": 0, "lost": 0, "reports": [report.as_json()]}
    try:
        with Client(gateway, timeout=GATEWAY_SECONDS) as client:
            client.call("io.agentassembly.Enforce.Report", parameters)
    except (OSError, VarlinkError, ProtocolError) as e:
        log.warning("no audit record of this, the gateway does not answer (%s): %s", e, text)
        return False
    return True
