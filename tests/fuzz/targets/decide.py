"""Odd actions to the policies of the decision vectors: an answer always, and the same by another way.

What makes an answer wrong here: an exception other than `MalformedValue`, `explain` that
disagrees, an attribute nobody knows that changes something, an address that is allowed in
company and not alone, a reason that cannot be shown.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from aa.model import Action, Decision, Effect, Kind, MalformedValue, Mode, Run
from aa.policy import Policy, loads
from aa.policy.vectors import RUN
from aa.varlink.codec import decode, encode
from tests.fuzz.mutate import json_value

VECTORS = Path(__file__).parents[2] / "vectors" / "policy"
NOW = 1.7e9

mutate = json_value


def _read() -> tuple[tuple[Policy, ...], tuple[bytes, ...]]:
    policies: list[Policy] = []
    cases: list[bytes] = []
    for path in sorted(VECTORS.glob("*.toml")):
        data = tomllib.loads(path.read_text())
        if "files" not in data:
            continue
        for case in data["case"]:
            asked = [len(policies), case.get("run", {}), case["action"]]
            cases.append(json.dumps(asked, default=str).encode())
        policies.append(loads(data["files"]))
    return tuple(policies), tuple(cases)


POLICIES, CASES = _read()


def seeds() -> Iterator[bytes]:
    yield from CASES


def one(data: bytes) -> None:
    try:
        asked = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(asked, list) or len(asked) != 3 or type(asked[0]) is not int:
        return
    run = _run(asked[1])
    try:
        action = Action.from_json(asked[2])
    except MalformedValue:
        return
    judge(POLICIES[asked[0] % len(POLICIES)], run, action)


def judge(policy: Policy, run: Run, action: Action) -> Decision:
    """Asks, and holds the answer against what must be true of every answer."""
    decision = policy.decide(run, action, now=NOW)
    assert policy.explain(run, action, now=NOW).decision == decision
    assert decision.reason.isprintable() and len(decision.reason) < 2000, decision.reason
    if decision.mode is Mode.OBSERVE:
        assert decision.effect is Effect.ALLOW
    message = encode(decision.as_json())
    assert Decision.from_json(decode(message[:-1])).effect is decision.effect
    more = replace(action, attributes={**action.attributes, "nobody-knows": [1]})
    assert policy.decide(run, more, now=NOW) == decision
    addresses = action.attributes.get("addresses")
    if decision.effect is Effect.ALLOW and isinstance(addresses, list):
        for address in addresses:
            alone = replace(action, attributes={**action.attributes, "addresses": [address]})
            assert policy.decide(run, alone, now=NOW).effect is Effect.ALLOW, address
    if decision.effect is Effect.ALLOW and decision.mode is Mode.ENFORCE:
        assert action.kind not in (Kind.EXIT, Kind.RUN, Kind.GUARD)
    return decision


def _run(written: Any) -> Run:
    given = written if isinstance(written, dict) else {}
    texts = {k: v for k, v in given.items() if k in RUN and isinstance(v, str)}
    tags = given.get("tags")
    return Run(
        id="r",
        uid=1000,
        tags=tuple(t for t in tags if isinstance(t, str)) if isinstance(tags, list) else (),
        **{**RUN, **texts},
    )
