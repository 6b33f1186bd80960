"""The aa-gateway daemon: sockets from systemd, one more per run, and the state behind them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from aa import config as configuration
from aa import paths
from aa.audit.file import AuditFile
from aa.audit.journal import Journal
from aa.audit.log import AuditLog
from aa.ca import inspected
from aa.ca.errors import CertificateAuthorityError
from aa.ca.places import INSPECTED_HOSTS
from aa.daemon import CannotStart, Daemon, inherited_sockets, serve
from aa import prices
from aa.gateway.approvals import Approvals
from aa.gateway.counters import Counters
from aa.gateway.gateway import Gateway
from aa.gateway.interfaces import control_service, enforce_service, run_service
from aa.gateway.limits import Limits as PolicyLimits
from aa.gateway.runs import RegistryCorrupt, RunRegistry
from aa.gateway.source import WATCH_SECONDS
from aa.model import Kind, Run
from aa.policy import Policy
from aa.tomlfile import InvalidFile
from aa.varlink import Peer, Server
from aa.varlink.server import Limits

VANISHED_SECONDS = 5.0
SECOND = 1.0
TELL_AGAIN_SECONDS = (2.0, 10.0, 60.0)
"""systemd's path unit sees no change while aa-ca.service runs: a list published then would wait for
the next one. So the file is touched again when the service is surely over."""
TIDY_SECONDS = 60.0
RUN_LIMITS = Limits(connections=32, connections_per_uid=32, calls_per_second=4000)
"""Of one run's own socket: what a hostile run can take of the time and memory of all."""

log = logging.getLogger(__name__)


def refuse_governed(peer: Peer) -> str | None:
    """Operators' and services' sockets are closed to runs, whatever groups these have."""
    if peer.governed:
        return "this socket is not for governed runs (or the caller's cgroup could not be read)"
    return None


class RunSockets:
    """One listening socket per run, in a directory of its own that is bound into the run."""

    def __init__(self, gateway: Gateway, directory: Path) -> None:
        self._gateway = gateway
        self._directory = directory
        self._servers: dict[str, Server] = {}

    def open(self, run: Run) -> None:
        where = self._directory / run.id
        where.mkdir(exist_ok=True)
        where.chmod(0o755)  # the daemon's umask is tighter; the run's user must get in

        def admit(peer: Peer) -> str | None:
            return self._refuse_stranger(run.id, peer)

        # Anyone could open the socket by mode; `admit` lets in only the run's own cgroup.
        self._servers[run.id] = Server.at(
            where / "gateway",
            run_service(self._gateway, run.id),
            mode=0o666,
            admit=admit,
            limits=RUN_LIMITS,
        )

    def _refuse_stranger(self, run_id: str, peer: Peer) -> str | None:
        run = self._gateway.registry.get_live(run_id)
        if run is None or not run.cgroup or peer.cgroup is None:
            return f"run {run_id} is not alive"
        if peer.cgroup == run.cgroup or peer.cgroup.startswith(run.cgroup + "/"):
            return None
        return f"the caller is not in run {run_id}"

    def close(self, run_id: str) -> None:
        server = self._servers.pop(run_id, None)
        if server is not None:
            server.close()
        shutil.rmtree(self._directory / run_id, ignore_errors=True)

    def sweep(self) -> None:
        """Removes what an earlier life left of runs that are over."""
        with contextlib.suppress(FileNotFoundError):
            for left in self._directory.iterdir():
                if self._gateway.registry.get_live(left.name) is None:
                    shutil.rmtree(left, ignore_errors=True)


def open_gateway() -> Gateway:
    try:
        config = configuration.load()
    except InvalidFile as e:
        raise CannotStart(
            str(e.problems[0]), hint="mend it and `systemctl restart aa-gateway`"
        ) from e
    file = Path(config.audit.file)
    try:
        audit_file = AuditFile(file, max_bytes=config.audit.max_bytes, keep=config.audit.keep)
    except OSError as e:
        raise CannotStart(f"audit file: {e}", hint=f"aa-gateway must own {file.parent}") from e
    audit = AuditLog(audit_file, Journal() if config.audit.journal else None)
    try:
        registry = RunRegistry(paths.GATEWAY_STATE_DIR / "runs.sqlite")
    except RegistryCorrupt as e:
        raise CannotStart(str(e)) from e
    limits = PolicyLimits(Counters(paths.GATEWAY_STATE_DIR / "limits.sqlite"), prices.load)
    return Gateway(
        config=config,
        policies=paths.POLICY_DIR,
        registry=registry,
        audit=audit,
        limits=limits,
        approvals=Approvals(paths.GATEWAY_STATE_DIR / "approvals.sqlite"),
    )


def sockets_by_path() -> dict[str, socket.socket]:
    return {str(s.getsockname()): s for s in inherited_sockets()}


async def main(daemon: Daemon) -> None:
    gateway = open_gateway()
    run_sockets = RunSockets(gateway, paths.RUNS_DIR)
    given = sockets_by_path()
    missing = {str(paths.ENFORCE_SOCKET), str(paths.CONTROL_SOCKET)} - set(given)
    if missing:
        raise CannotStart(
            f"systemd passed no socket for {', '.join(sorted(missing))}",
            hint="start it with `systemctl start aa-gateway.service`, its sockets come first",
        )

    def in_force(policy: Policy) -> None:
        tell_authority(gateway, policy)
        for seconds in TELL_AGAIN_SECONDS:
            asyncio.get_running_loop().call_later(seconds, tell_again, INSPECTED_HOSTS)

    gateway.on_policy = in_force
    gateway.source.reload()
    gateway.end_vanished()
    run_sockets.sweep()
    for run in gateway.registry.live():
        run_sockets.open(run)
    enforce = enforce_service(gateway, open_run=run_sockets.open, close_run=run_sockets.close)
    control = control_service(gateway, pid=os.getpid())
    Server(given[str(paths.ENFORCE_SOCKET)], enforce, admit=refuse_governed)
    Server(given[str(paths.CONTROL_SOCKET)], control, admit=refuse_governed)

    async def reload() -> None:
        gateway.reload_config()
        await gateway.source.reload_beside()
        daemon.status(gateway.status_line())

    async def follow_files() -> None:
        if gateway.source.changed:
            await gateway.source.reload_beside()

    daemon.reload = reload
    gateway.on_status = lambda: daemon.status(gateway.status_line())
    gateway.write_event(Kind.GUARD, "gateway", "gateway started", pid=os.getpid())
    gc.collect()
    gc.freeze()  # what lives from the start lives to the end: no collection looks at it again
    daemon.ready(gateway.status_line())
    chores = [
        asyncio.create_task(every(WATCH_SECONDS, follow_files)),
        asyncio.create_task(every(SECOND, gateway.flush_over_budget)),
        asyncio.create_task(every(SECOND, gateway.approvals.expire)),
        asyncio.create_task(every(TIDY_SECONDS, lambda: gateway.limits.tidy(time.time()))),
        asyncio.create_task(every(SECOND, lambda: daemon.status(gateway.status_line()))),
        asyncio.create_task(every(VANISHED_SECONDS, lambda: end_vanished(gateway, run_sockets))),
    ]
    await daemon.stop.wait()
    for chore in chores:
        chore.cancel()
    gateway.write_event(Kind.GUARD, "gateway", "gateway stopped", pid=os.getpid())


def tell_authority(gateway: Gateway, policy: Policy, path: Path = INSPECTED_HOSTS) -> None:
    """Publishes the hosts that this policy inspects: the intermediate may sign for no others.

    If that fails, what is newly inspected is denied, because no certificate can be made for it.
    """
    try:
        inspected.publish(policy.inspected(), path)
    except (OSError, CertificateAuthorityError) as e:
        told = f"the authority does not know which hosts are inspected: {e}"
        gateway.write_event(Kind.GUARD, "ca", told, alert=True)


def tell_again(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(path)


def end_vanished(gateway: Gateway, run_sockets: RunSockets) -> None:
    for run in gateway.end_vanished():
        run_sockets.close(run.id)


async def every(seconds: float, chore: Callable[[], Awaitable[None] | None]) -> None:
    """Does a chore again and again; one failure does not end it, and is told."""
    while True:
        await asyncio.sleep(seconds)
        try:
            pending = chore()
            if pending is not None:
                await pending
        except Exception:
            log.exception("a chore of the gateway failed")


if __name__ == "__main__":
    sys.exit(serve(main))
