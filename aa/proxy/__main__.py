"""aa-proxy.service: the front and the DNS forwarder on the sockets that systemd holds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pwd
import socket
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from aa import config as configuration
from aa.daemon import CannotStart, Daemon, inherited_sockets, serve
from aa.model import Layer, Run, RunState
from aa.proxy.answered import AnsweredNames
from aa.proxy.ask import COUNTING_SECONDS, Gateway, GatewayAway, Refusals
from aa.proxy.connection import Shared
from aa.proxy.dial import Resolver
from aa.proxy.dns import Forwarder
from aa.proxy.front import Front
from aa.proxy.identify import Identify
from aa.proxy.inspect.pool import Pool
from aa.proxy.placeholder import Placeholders
from aa.report import Reporter, RunTable, Unreachable, confirm_run
from aa.sockdiag import SockDiag, SockDiagError
from aa.tomlfile import InvalidFile
from aa.varlink import VarlinkError

COMPONENT = "proxy"
SYNCHRONISE_SECONDS = 3.0
"""How long to wait for the table of runs before accepting. Connections wait meanwhile; after it
they are refused, because nobody in them is known."""
DRAIN_SECONDS = 5.0
"""How long live connections may go on after SIGTERM, while bytes move in them."""
STATUS_SECONDS = 5.0
"""How often the gateway hears the counts."""

log = logging.getLogger(__name__)


def _load_config() -> configuration.Config:
    try:
        return configuration.load()
    except InvalidFile as e:
        raise CannotStart(
            f"the configuration is not valid: {e}", hint="correct the file and restart aa-proxy"
        ) from None


def _uids(users: Iterable[str]) -> Mapping[int, str]:
    """Users by uid, looked up once: no connection waits for a user database."""
    found = {}
    for user in users:
        try:
            found[pwd.getpwnam(user).pw_uid] = user
        except KeyError:
            log.warning("proxy.explicit_users names %s, who does not exist", user)
    return found


class Proxy:
    """The daemon: what it is made of, and its life."""

    def __init__(self, config: configuration.Config) -> None:
        self._config = config
        self._config_problem = ""
        self._sockets: tuple[socket.socket, ...] = ()
        enforce = config.gateway.socket
        self._reporter = Reporter(COMPONENT, socket=enforce)
        self._runs = RunTable(socket=enforce, on_run=self._confirm)
        self._gateway = Gateway(
            socket=enforce,
            seconds=config.proxy.decide_seconds,
            max_waiting=config.proxy.max_waiting,
        )
        self._refusals = Refusals(self._reporter.report)
        try:
            diag = SockDiag()
        except (OSError, SockDiagError) as e:
            raise CannotStart(
                f"SOCK_DIAG cannot be asked: {e}", hint="load the modules tcp_diag and udp_diag"
            ) from None
        self._identify = identify = Identify(
            self._runs, diag, explicit_users=_uids(config.proxy.explicit_users)
        )
        answered, placeholders = AnsweredNames(), Placeholders()
        self._pool = Pool(
            config.proxy.workers,
            report=self._reporter.report,
            enforce=enforce,
            settings=self._worker_settings,
        )
        self._resolver = Resolver()
        self._front = Front(
            Shared(
                gateway=self._gateway,
                identify=identify,
                resolver=self._resolver,
                refusals=self._refusals,
                report=self._reporter.report,
                limits=config.proxy,
                answered=answered,
                placeholders=placeholders,
                pool=self._pool,
            )
        )
        self._pool.on_port = self._front.shared.own_ports.add
        self._forwarder = Forwarder(
            gateway=self._gateway,
            identify=identify,
            refusals=self._refusals,
            answered=answered,
            placeholders=placeholders,
        )

    async def live(self, daemon: Daemon) -> None:
        sockets = inherited_sockets()
        if not sockets:
            raise CannotStart(
                "systemd passed no listeners", hint="start it with `systemctl start aa-proxy`"
            )
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._reporter.run()),
                group.create_task(self._runs.follow()),
                group.create_task(self._pool.keep()),
            ]
            await self._synchronise()
            await self._listen(sockets)
            tasks.append(group.create_task(self._keep_house(daemon)))
            daemon.reload = self.reload
            daemon.ready(self._status())
            await daemon.stop.wait()
            await self._stop(daemon)
            for task in tasks:
                task.cancel()

    def reload(self) -> None:
        """Takes [proxy] from the file again, for connections from now on; an error changes nothing."""
        try:
            config = configuration.load()
        except InvalidFile as e:
            self._config_problem = f"configuration not changed: {e.problems[0]}"
            log.error("%s", self._config_problem)
            return
        now = self._config
        stays = config.listen != now.listen or config.gateway.socket != now.gateway.socket
        self._config_problem = "[listen] and gateway.socket take a restart" if stays else ""
        self._front.shared.limits = config.proxy
        self._gateway.set_deadline(config.proxy.decide_seconds)
        self._gateway.max_waiting = config.proxy.max_waiting
        self._identify.set_explicit_users(_uids(config.proxy.explicit_users))
        self._pool.reload()
        log.info("[proxy] is read again")

    def _worker_settings(self) -> dict[str, Any]:
        """What a worker that starts now gets of the configuration."""
        proxy = self._front.shared.limits
        return {
            "connect_seconds": proxy.connect_seconds,
            "peek_seconds": proxy.peek_seconds,
            "decide_seconds": proxy.decide_seconds,
            "idle_seconds": proxy.idle_seconds,
            "max_waiting": proxy.max_waiting,
            "max_waiting_per_run": proxy.max_waiting_per_run,
            "ca_dir": str(proxy.ca_dir),
        }

    async def _synchronise(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SYNCHRONISE_SECONDS):
                while not self._runs.synchronised:
                    self._runs.changed.clear()
                    await self._runs.changed.wait()
                return
        log.warning("the gateway does not answer; connections are refused until it does")

    async def _listen(self, sockets: Iterable[socket.socket]) -> None:
        """Each socket by its port and type: systemd's order is not the meaning."""
        listen = self._config.listen
        self._sockets = tuple(sockets)
        for sock in self._sockets:
            port, stream = sock.getsockname()[1], sock.type == socket.SOCK_STREAM
            if port == listen.dns_port:
                await (self._forwarder.listen_tcp if stream else self._forwarder.listen_udp)(sock)
                self._front.shared.own_ports.add(port)
            elif stream and port in (listen.front_port, listen.explicit_port):
                self._front.listen(sock, explicit=port == listen.explicit_port)
            else:
                log.error("aa-proxy.socket has port %d, which agent-assembly.toml has not", port)

    async def _stop(self, daemon: Daemon) -> None:
        daemon.status("stopping")
        self._front.stop_accepting()
        self._forwarder.close()
        await self._front.drain(DRAIN_SECONDS)
        await self._pool.close()
        self._refusals.flush()
        await self._reporter.close()
        await self._gateway.close()
        self._resolver.close()

    def _problem(self) -> str:
        if not self._forwarder.listening:
            return "the DNS forwarder has no listeners; is aa-proxy.socket up?"
        return self._front.problem()

    async def _confirm(self, run: Run) -> None:
        """Says that a run that starts can rely on the proxy, or why it cannot."""
        if run.state is not RunState.STARTING or Layer.PROXY not in run.layers:
            return
        reason = self._problem()
        try:
            if not reason:
                await self._gateway.reach()
        except GatewayAway as e:
            reason = e.decision.reason
        try:
            await confirm_run(
                run.id, COMPONENT, not reason, reason, socket=self._config.gateway.socket
            )
        except (*Unreachable, VarlinkError) as e:  # it is told again with the next snapshot
            log.warning("confirming run %s: %s", run.id, e)

    async def _keep_house(self, daemon: Daemon) -> None:
        loop = asyncio.get_running_loop()
        told = 0.0
        while True:
            self._refusals.flush()
            daemon.status(self._status())
            if loop.time() - told >= STATUS_SECONDS:
                told = loop.time()
                self._tell_gateway()
            await asyncio.sleep(COUNTING_SECONDS)

    def _status(self) -> str:
        counts, queries = self._front.shared.counts, self._forwarder.counts
        problem = f"; {self._config_problem}" if self._config_problem else ""
        away = "" if self._runs.synchronised else "; gateway unreachable: refusing everything"
        inspecting = self._pool.status()
        workers = f"; {inspecting['workers']} inspection workers" if inspecting["installed"] else ""
        if inspecting["installed"] and inspecting["problem"]:
            problem += f"; {inspecting['problem']}"
        return (
            f"{self._front.connections} connections, "
            f"{self._gateway.waiting} wait for a person, {counts.allowed} allowed, "
            f"{counts.denied} denied, {counts.failed} failed; "
            f"{queries.queries} DNS queries, {queries.denied} denied{workers}{away}{problem}"
        )

    def _tell_gateway(self) -> None:
        counts, queries = self._front.shared.counts, self._forwarder.counts
        problem = self._problem()
        self._reporter.set_status(
            "degraded" if problem else "running",
            {
                "problem": problem,
                "listeners": [_shown(s.getsockname()) for s in self._sockets],
                "connections": self._front.connections,
                "waiting": self._gateway.waiting,
                "allowed": counts.allowed,
                "denied": counts.denied,
                "failed": counts.failed,
                "queries": queries.queries,
                "queries_denied": queries.denied,
                "queries_failed": queries.failed,
                "inspection": self._pool.status(),
            },
        )


def _shown(name: tuple[str, int]) -> str:
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


async def _main(daemon: Daemon) -> None:
    await Proxy(_load_config()).live(daemon)


if __name__ == "__main__":
    sys.exit(serve(_main))
