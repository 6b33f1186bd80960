"""A container whose runs talk to a host that is inspected: they see certificates of this host's own authority."""

from __future__ import annotations

import json

from tests.lab.clients import FOLDER, JAVA, Client
from tests.lab.guarded import POLICY_FILE, governed, guard
from tests.lab.harness import Container, Result, eventually
from tests.lab.harness.__main__ import HERE, newest_debs
from tests.lab.harness.names import API

POLICY = f"""
[policy]
id      = "lab"
default = {{ network = "deny", dns = "deny" }}

[[rule]]
id      = "inspected"
effect  = "allow"
network = {{ hosts = ["{API}"], cidrs = ["10.77.0.0/24", "fd77::/64"], inspect = true }}
"""


def prepare(box: Container) -> None:
    """Installs both packages, as a person would, and has one host inspected."""
    box.install_deb(*newest_debs(engine=HERE))
    guard(box)
    box.push(POLICY_FILE, POLICY)
    box.run(["aasm", "policy", "reload"]).check()
    box.push(f"{FOLDER}/Fetch.java", JAVA)
    await_signer(box, API)


def await_signer(box: Container, domain: str) -> None:
    """Until the intermediate may sign for a domain, a moment after the policy names it."""

    def permitted() -> bool:
        told = json.loads(box.run(["aasm", "ca", "show", "--json"]).out)
        intermediate = told["intermediate"] or {"constraints": {"permitted": []}}
        return domain in intermediate["constraints"]["permitted"]

    eventually(permitted, timeout=30, what=f"the intermediate may sign for {domain}")


def ask(box: Container, client: Client) -> tuple[Result, bool]:
    """What the client did in a run, and whether the origin was asked by it."""
    mark = box.origins.mark()
    done = governed(box, client.argv, timeout=60)
    return done, bool(box.origins.since(mark, kind="request", path=client.path))
