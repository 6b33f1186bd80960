"""The guest itself, seen by tests that run in it: the same words as a container of the harness."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.lab import harness
from tests.lab.harness.container import AUTHORITY_INSIDE, ROOT_ENVIRONMENT, RUN_TIMEOUT

HERE = Path(__file__).resolve().parent
ORIGINS = HERE.parent / "harness" / "origins.py"

WIDE_SECONDS = 300  # for every deadline of the services under test
SLOWNESS = 6.0  # how much longer than on a real machine a wait may take under emulation
READY_TIMEOUT = (
    300.0  # seconds until the origins listen, and until the machine has finished starting
)

SERVICES = ("aa-gateway", "aa-launch", "aa-proxy", "aa-redirect", "aa-ebpf")
CONFIG_FILE = "/etc/agent-assembly/agent-assembly.toml"
DROP_IN = f"""\
[Service]
TimeoutStartSec={WIDE_SECONDS}
TimeoutStopSec={WIDE_SECONDS}
WatchdogSec={WIDE_SECONDS}
"""
WIDER = {
    "barrier_seconds": 120.0,
    "decide_seconds": 60.0,
    "connect_seconds": 60.0,
    "peek_seconds": 60.0,
}


class Machine(harness.Container):
    """This machine with origins beside it. One life: it is brought up once and thrown away with the guest."""

    def __init__(self, name: str | None = None, **_: Any) -> None:
        super().__init__("guest")
        self.leader = 1

    def __enter__(self) -> Self:
        if not self.state.exists():
            self.up()
        return self

    def up(self) -> None:
        self.origins.directory.mkdir(parents=True)
        _checked(["/bin/sh", HERE / "network.sh"])
        with self._console.open("wb") as console:
            self._supervisor = subprocess.Popen(
                [
                    "ip",
                    "netns",
                    "exec",
                    "origins",
                    "/usr/bin/python3",
                    "-I",
                    ORIGINS,
                    self.origins.directory,
                ],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=ROOT_ENVIRONMENT,
            )
        ready = self.origins.directory / "ready"
        deadline = time.monotonic() + READY_TIMEOUT
        while not ready.exists():
            if self._supervisor.poll() is not None or time.monotonic() > deadline:
                raise harness.LabError(f"the origins did not start:\n{self.console()}")
            time.sleep(0.2)
        shutil.copy(self.origins.authority, AUTHORITY_INSIDE)
        _checked(["update-ca-certificates"])
        self.systemctl("is-system-running", "--wait", timeout=READY_TIMEOUT)

    def down(self) -> None:
        """Nothing: the next module of tests finds the machine as this one leaves it."""

    def install_deb(self, *packages: Path, timeout: float = 180.0) -> harness.Result:
        """As in a container; then every deadline that can be set is set wider, and nothing else."""
        done = super().install_deb(*packages, timeout=timeout)
        for service in SERVICES:
            self.push(f"/etc/systemd/system/{service}.service.d/90-emulation.conf", DROP_IN)
        config = self.pull(CONFIG_FILE)
        for key, seconds in WIDER.items():
            config, found = re.subn(rf"(?m)^{key} = .*$", f"{key} = {seconds}", config)
            if found != 1:
                raise harness.LabError(f"{CONFIG_FILE} has {found} lines for {key}, not one")
        self.push(CONFIG_FILE, config)
        self.systemctl("daemon-reload").check()
        return done

    def raw(
        self,
        argv: Sequence[str | Path],
        *,
        input: str | bytes | None = None,
        timeout: float = RUN_TIMEOUT,
    ) -> harness.Result:
        return super().raw(argv, input=input, timeout=timeout * SLOWNESS)

    def run(
        self,
        command: str | Sequence[str | Path],
        *,
        user: str = "root",
        input: str | bytes | None = None,
        timeout: float = RUN_TIMEOUT,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        properties: Sequence[str] = (),
    ) -> harness.Result:
        return super().run(
            command,
            user=user,
            input=input,
            timeout=timeout * SLOWNESS,
            env=env,
            cwd=cwd,
            properties=properties,
        )


def eventually(
    condition: Callable[[], Any],
    *,
    timeout: float = 10.0,
    every: float = 0.05,
    what: str = "condition",
) -> Any:
    """The harness's own, with an emulated machine's patience."""
    return harness.container.eventually(
        condition, timeout=timeout * SLOWNESS, every=max(every, 0.5), what=what
    )


def _checked(argv: Sequence[str | Path]) -> None:
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        env=ROOT_ENVIRONMENT,
        timeout=READY_TIMEOUT,
        check=False,
    )
    if done.returncode != 0:
        raise harness.LabError(f"{argv[0]}: exit {done.returncode}\n{done.stdout}{done.stderr}")
