"""Calls of any local user to aa-launch: typed answers, no descriptor kept, and nothing started.

There is no gateway, so a request that is right in itself ends as `NotStarted`.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aa.config import Agent, Config, Launch, Permission
from aa.launch import environment
from aa.launch.service import Launcher
from aa.model import Layer
from aa.varlink import Peer
from tests.fuzz.calls import checked, exchange, messages
from tests.fuzz.mutate import json_value
from tests.unit.test_launch_service import FakeSystemd

FOLDER = Path(tempfile.mkdtemp(prefix="aa-fuzz-"))
NULL, PLACE = os.open("/dev/null", os.O_RDWR), os.open(FOLDER, os.O_PATH)
LOOP = asyncio.new_event_loop()
UIDS = (65534, 0, 4_000_000_000)
CONFIG = Config(
    agents={"two": Agent("two", frozenset({Layer.KERNEL}), user="nobody", command=("x",))},
    launch=Launch(permissions=(Permission(users=("nobody",), agents=("*",), run_as=("nobody",)),)),
)
mutate = json_value


def seeds() -> Iterator[bytes]:
    start = {
        "agent": None, "user": "nobody", "argv": ["prog", "-x"], "environment": ["TERM=x", "A=b"],
        "terminal": False, "stdin": 0, "stdout": 0, "stderr": 0, "directory": 1,
    }  # fmt: skip
    several = (
        ("Start", start),
        ("Start", {**start, "agent": "two", "argv": [], "user": None}),
        ("Start", {**start, "directory": 0, "terminal": True}),
        ("Wait", {"run": "x"}),
        ("Signal", {"run": "x", "signal": 9}),
        ("Kill", {"run": "x"}),
        ("Pause", {"run": "x"}),
        ("Resume", {"run": "x"}),
        ("Tree", {"run": "x"}),
        ("Halt", {"reason": "because"}),
        ("Release", {}),
    )
    calls = [
        {
            "method": f"io.agentassembly.Launch.{name}",
            "parameters": parameters,
            "more": name == "Wait",
        }
        for name, parameters in several
    ]
    for who in range(len(UIDS)):
        yield json.dumps([who, calls]).encode()
        for call in calls:
            yield json.dumps([who, [call]]).encode()


def one(data: bytes) -> None:
    try:
        asked = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(asked, list) or len(asked) != 2 or type(asked[0]) is not int:
        return
    LOOP.run_until_complete(_asked(UIDS[asked[0] % len(UIDS)], asked[1]))
    _environment(asked[1])


async def _asked(uid: int, calls: Any) -> None:
    before = set(os.listdir("/proc/self/fd"))
    systemd = FakeSystemd()
    launcher = Launcher(
        lambda: CONFIG,
        systemd,  # type: ignore[arg-type]
        enforce=FOLDER / "none",
        doors=FOLDER,
        halt=FOLDER / "halt" / "halt.json",
    )
    launcher._known.set()
    service = checked(launcher.service())
    peer = Peer(os.getpid(), uid, uid, "user.slice")
    await exchange(service, peer, messages(calls), (NULL, PLACE))
    assert systemd.done == [] and systemd.states == {}
    (FOLDER / "halt" / "halt.json").unlink(missing_ok=True)
    left = set(os.listdir("/proc/self/fd")) - before
    assert not left, left


def _environment(calls: Any) -> None:
    """What of a caller's environment reaches a run is what may."""
    for call in calls if isinstance(calls, list) else ():
        parameters = call.get("parameters") if isinstance(call, dict) else None
        given = parameters.get("environment") if isinstance(parameters, dict) else None
        if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
            continue
        try:
            passed = environment.of_run(
                environment.parse(given), allowed=("A",), user="nobody", home="/h", shell="/bin/sh",
                run="r", agent="a", proxied=True,
            )  # fmt: skip
        except environment.BadEnvironment:
            continue
        ours = {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "AA_RUN", "AA_AGENT", "A"}
        ours |= {*environment.TRUSTED_BY}
        assert all(n in ours | environment.PASSED or n.startswith("LC_") for n in passed)
        assert (passed["AA_RUN"], passed["HOME"]) == ("r", "/h")
