"""Values of the vocabulary as JSON: read back as they were, and nothing else is taken for one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aa.model import (
    Action,
    Decision,
    Effect,
    Kind,
    Layer,
    MalformedValue,
    Obligation,
    RecordType,
    Report,
    Run,
)

VALUES = (
    Action(Kind.TOOL_CALL, "search", {"args": {"q": [1, None]}}),
    Obligation("inspect", {"limit": 5}),
    Decision(Effect.ALLOW, "why", "a/b", "rev", obligations=(Obligation("inspect"),)),
    Run("r", "agent", "dev", 1000, layers=frozenset(Layer), tags=("t",), argv=("x",)),
    Report(RecordType.OBSERVED, Layer.KERNEL, Kind.EXEC, "/bin/x", 10**18, count=3),
)
odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -1, 1 << 63])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_is_read_back_as_it_was(value: Any) -> None:
    assert type(value).from_json(json.loads(json.dumps(value.as_json()))) == value


@given(st.sampled_from(VALUES), st.data())
def test_with_odd_values_in_it_is_a_value_or_malformed(value: Any, data: st.DataObject) -> None:
    written = value.as_json()
    names = st.sampled_from(sorted(written))
    changed = {**written, **data.draw(st.dictionaries(names, odd, min_size=1, max_size=3))}
    for given_ in (changed, data.draw(odd)):
        try:
            read = type(value).from_json(given_)
        except MalformedValue:
            continue
        assert type(value).from_json(read.as_json()) == read


@pytest.mark.parametrize(
    "changes",
    [
        {"time": -1},
        {"time": 1 << 63},
        {"time": 10**400},
        {"time": True},
        {"count": 0},
        {"count": 1 << 63},
        {"count": "1"},
    ],
)
def test_a_report_of_no_time_or_count_is_malformed(changes: dict[str, Any]) -> None:
    """A log that cannot write its time would refuse it for ever, and what comes behind it."""
    with pytest.raises(MalformedValue):
        Report.from_json({**VALUES[-1].as_json(), **changes})
