"""The aa-launch daemon."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from pathlib import Path

from aa import config as configuration
from aa import paths
from aa.cgroup import NoUnifiedCgroup, require_unified
from aa.config import Config
from aa.daemon import CannotStart, Daemon, inherited_sockets, serve
from aa.launch.sandbox import SHIM_SOCKETS_DIR
from aa.launch.service import Launcher
from aa.launch.systemd import Systemd
from aa.report import Reporter
from aa.tomlfile import InvalidFile
from aa.varlink import Peer, Server
from aa.varlink.server import MAX_FDS, Limits

STATUS_SECONDS = 1.0
LIMITS = Limits(fds=MAX_FDS)
"""It alone takes descriptors: a run's streams and its folder."""

log = logging.getLogger(__name__)


class LastGood:
    """The configuration as it is now, or as it was when it was last valid."""

    def __init__(self) -> None:
        self._seen: tuple[tuple[str, int, int], ...] | None = None
        self._config: Config | None = None
        self.problem = ""

    def __call__(self) -> Config:
        now = _fingerprint(paths.CONFIG_FILE, paths.AGENTS_DIR)
        if self._config is None or now != self._seen:
            self._seen = now
            try:
                self._config = configuration.load()
                self.problem = ""
            except InvalidFile as e:
                self.problem = str(e.problems[0])
                if self._config is None:
                    raise
                log.error("configuration not changed: %s", self.problem)
        return self._config


def _fingerprint(file: Path, folder: Path) -> tuple[tuple[str, int, int], ...]:
    found = []
    with contextlib.suppress(OSError):
        for path in (file, folder, *sorted(folder.glob("*.toml"))):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((str(path), status.st_mtime_ns, status.st_ino))
    return tuple(found)


def refuse_governed(peer: Peer) -> str | None:
    if peer.governed:
        return "a run cannot start or end runs (or the caller's cgroup could not be read)"
    return None


async def main(daemon: Daemon) -> None:
    try:
        require_unified()
    except NoUnifiedCgroup as e:
        raise CannotStart(str(e)) from e
    config = LastGood()
    try:
        config()
    except InvalidFile as e:
        raise CannotStart(
            str(e.problems[0]), hint="mend it; aa-launch starts again by itself"
        ) from e
    given = inherited_sockets()
    if len(given) != 1:
        raise CannotStart(
            "systemd passed no socket", hint="`systemctl start aa-launch.socket` comes first"
        )
    if not os.access(paths.SHIM, os.R_OK):
        raise CannotStart(f"{paths.SHIM} is missing", hint="reinstall agent-assembly")
    SHIM_SOCKETS_DIR.mkdir(mode=0o711, exist_ok=True)
    SHIM_SOCKETS_DIR.chmod(0o711)

    def reload() -> None:
        with contextlib.suppress(InvalidFile):
            config()

    reporter = Reporter("launch")
    launcher = Launcher(config, Systemd(), report=reporter.report)
    server = Server(given[0], launcher.service(), admit=refuse_governed, limits=LIMITS)
    daemon.reload = reload
    daemon.ready(launcher.status_line())
    chores = [
        asyncio.create_task(launcher.follow()),
        asyncio.create_task(reporter.run()),
        asyncio.create_task(_keep_status(daemon, launcher, config)),
    ]
    await daemon.stop.wait()
    launcher.stopping = True
    await reporter.close()
    for chore in chores:
        chore.cancel()
    server.close()


async def _keep_status(daemon: Daemon, launcher: Launcher, config: LastGood) -> None:
    while True:
        problem = f"; configuration not changed: {config.problem}" if config.problem else ""
        daemon.status(launcher.status_line() + problem)
        await asyncio.sleep(STATUS_SECONDS)


if __name__ == "__main__":
    sys.exit(serve(main))
