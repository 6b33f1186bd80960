"""Asks the gateway, and tells it what the proxy refused by itself. What goes wrong is a denial."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aa.model import (
    Action,
    Decision,
    Effect,
    Kind,
    Layer,
    MalformedValue,
    RecordType,
    Report,
    deny,
)
from aa.paths import ENFORCE_SOCKET
from aa.report import ENFORCE
from aa.varlink import AsyncClient, VarlinkError
from aa.varlink.codec import ProtocolError

ATTEMPTS = 2
"""A connection that breaks under a call is made again once: the gateway may have restarted."""
REFUSALS_KEPT = 1024
"""Different refusals that are counted at a time; further ones are reported one by one."""
COUNTING_SECONDS = 1.0
"""Equal refusals within this time become one report with a count."""
WAIT_SECONDS = 300.0
"""Of one call that waits for a person; then it is made again."""
AWAY_SECONDS = 30.0
"""How long the gateway may be away while a person is waited for: a restart must not lose them."""
AGAIN_SECONDS = 0.5


class GatewayAway(Exception):
    """No decision could be had. `decision` is the denial to use; the gateway has no record."""

    def __init__(self, decision: Decision) -> None:
        self.decision = decision
        super().__init__(decision.reason)


class Gateway:
    """The one connection on which decisions are asked for. Calls overlap on it.

    Waiting for a person takes a connection of its own, because calls are answered in order.
    """

    def __init__(
        self, *, socket: Path = ENFORCE_SOCKET, seconds: float = 5.0, max_waiting: int = 128
    ) -> None:
        self._socket = socket
        self._seconds = seconds
        self.max_waiting = max_waiting
        self.waiting = 0
        self._client: AsyncClient | None = None
        self._connecting = asyncio.Lock()

    def set_deadline(self, seconds: float) -> None:
        """For what is asked from now on."""
        self._seconds = seconds

    async def decide(
        self, run: str, action: Action, *, provisional: bool = False, approval: str = ""
    ) -> Decision:
        """The gateway's decision. Raises `GatewayAway` within the deadline when there is none.

        `approval` is that of the decision on an earlier step of the same action: a name before its
        addresses, a request before its body.
        """
        parameters = {
            "run": run,
            "layer": Layer.PROXY.value,
            "action": action.as_json(),
            "provisional": provisional,
        }
        if approval:
            parameters["approval"] = approval
        try:
            async with asyncio.timeout(self._seconds):
                reply = await self._call(f"{ENFORCE}.Decide", parameters)
            return Decision.from_json(reply.get("decision"))
        except TimeoutError:
            await self.close()  # the calls behind this one would wait for it too
            raise _away(f"the gateway did not decide within {self._seconds:g} s") from None
        except (OSError, ProtocolError) as e:
            raise _away(f"the gateway cannot be reached ({e})") from None
        except (VarlinkError, MalformedValue, TypeError, ValueError) as e:
            raise _away(f"the gateway gave no usable answer ({e})") from None

    async def settle(self, run: str, action: Action, decision: Decision) -> Decision:
        """The answer behind an `ask`, however long a person takes: an allow, recorded and decided
        with the policy of then, or a denial. Any other decision is its own answer.

        Whoever asked must give up by cancelling when its client is gone. Raises `GatewayAway`.
        """
        if decision.effect is not Effect.ASK:
            return decision
        if self.waiting >= self.max_waiting:
            raise GatewayAway(
                deny(
                    f"{self.waiting} connections wait for a person already; raise "
                    "proxy.max_waiting in agent-assembly.toml",
                    rule="<limit:max_waiting>",
                    policy=decision.policy,
                )
            )
        self.waiting += 1
        try:
            while decision.effect is Effect.ASK:
                if not decision.approval:
                    why = f"{action.kind} {action.target} needs a person, and nobody can be asked"
                    raise GatewayAway(deny(why, rule=decision.rule, policy=decision.policy))
                decision = await self._wait(run, decision.approval)
        finally:
            self.waiting -= 1
        return decision

    async def _wait(self, run: str, approval: str) -> Decision:
        """The answer to an approval, or the same `ask` after `WAIT_SECONDS`."""
        loop = asyncio.get_running_loop()
        parameters = {"run": run, "approval": approval, "deadline": int(WAIT_SECONDS * 1000)}
        reached = loop.time()
        while True:
            client: AsyncClient | None = None
            try:
                client = await AsyncClient.connect(self._socket, timeout=self._seconds)
                seconds = WAIT_SECONDS + self._seconds
                reply = await client.call(f"{ENFORCE}.WaitApproval", parameters, timeout=seconds)
                return Decision.from_json(reply.get("decision"))
            except (OSError, ProtocolError) as e:
                if loop.time() - reached > AWAY_SECONDS:
                    raise _away(f"the gateway cannot be reached ({e})") from None
            except (VarlinkError, MalformedValue, TypeError, ValueError) as e:
                raise _away(f"the gateway gave no usable answer ({e})") from None
            finally:
                if client is not None:
                    reached = loop.time()
                    await client.close()
            await asyncio.sleep(AGAIN_SECONDS)

    async def reach(self) -> None:
        """One round trip on the deciding connection. Raises `GatewayAway`."""
        try:
            async with asyncio.timeout(self._seconds):
                await self._call("org.varlink.service.GetInfo", {})
        except (OSError, TimeoutError, ProtocolError, VarlinkError) as e:
            raise _away(f"the gateway cannot be reached ({e or 'deadline'})") from None

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def _call(self, method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        for attempt in range(1, ATTEMPTS + 1):
            client = await self._connected()
            try:
                return await client.call(method, parameters, timeout=None)
            except (OSError, ProtocolError):
                if attempt == ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    async def _connected(self) -> AsyncClient:
        async with self._connecting:
            if self._client is None or self._client.closed:
                if self._client is not None:
                    await self._client.close()
                self._client = await AsyncClient.connect(self._socket, timeout=self._seconds)
            return self._client


def _away(why: str) -> GatewayAway:
    return GatewayAway(
        deny(
            f"{why}, so it is denied; see `systemctl status aa-gateway`",
            rule="<gateway-unreachable>",
        )
    )


Key = tuple[str, Kind, str, str]


@dataclass(slots=True)
class _Counted:
    report: Report
    more: int = 0


@dataclass
class Refusals:
    """Reports what the proxy refuses without a decision: the first at once, equal ones counted.

    Call `flush` about once in `COUNTING_SECONDS`.
    """

    report: Callable[[Report], None]
    total: int = 0
    _counted: dict[Key, _Counted] = field(default_factory=dict)

    def refuse(
        self,
        decision: Decision,
        kind: Kind,
        target: str,
        *,
        run: str = "",
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        self.total += 1
        key = (run, kind, target, decision.rule)
        counted = self._counted.get(key)
        if counted is not None:
            counted.more += 1
            return
        report = Report(
            type=RecordType.REFUSAL,
            layer=Layer.PROXY,
            kind=kind,
            target=target,
            time=time.time_ns(),
            run=run,
            effect=Effect.DENY,
            rule=decision.rule,
            reason=decision.reason,
            attributes=attributes or {},
        )
        if len(self._counted) < REFUSALS_KEPT:
            self._counted[key] = _Counted(report)
        self.report(report)

    def flush(self) -> None:
        counted, self._counted = self._counted, {}
        for one in counted.values():
            if one.more:
                self.report(replace(one.report, time=time.time_ns(), count=one.more))
