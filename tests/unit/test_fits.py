"""The quick answer whether a value fits a schema is the one that jsonschema gives."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aa import fits
from aa.tomlfile import _validator, schema

SHIPPED = ["agent", "config", "policy"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_schemas_are_valid_and_have_known_keywords_only(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(dict(schema(name)))
    assert fits.compiled(schema(name))({}) in (True, False)


@pytest.mark.parametrize(
    "unknown",
    [
        {"oneOf": [{"type": "string"}]},
        {"properties": {"a": {"format": "date"}}},
        {"items": {"dependentRequired": {}}},
        {"additionalProperties": {"type": "string"}},
        {"not": {"type": "string"}},
        {"$ref": "https://example.org/schema"},
    ],
)
def test_a_keyword_that_is_not_known_is_never_skipped(unknown: dict[str, Any]) -> None:
    with pytest.raises(fits.UnknownKeyword):
        fits.compiled(unknown)


scalars = st.one_of(
    st.booleans(), st.integers(-2, 70000), st.floats(-1, 5), st.sampled_from(
        ["", "a", "a\n", "allow", "deny", "443", "sdk", "proxy", "/x", "x" * 300, "a b", "*", "enforce"]
    ),
)  # fmt: skip


def near(node: Any, root: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    """Values that often fit a schema and often just do not."""
    if "$ref" in node:
        node = root["$defs"][node["$ref"].removeprefix("#/$defs/")]
    if "properties" in node and depth < 6:
        built = {n: s for n, s in node["properties"].items() if "not" not in s}
        members = {n: near(s, root, depth + 1) for n, s in built.items()}
        needed = {n: members.pop(n) for n in node.get("required", ()) if n in members}
        whole = st.fixed_dictionaries(needed, optional=members)
        return st.one_of(whole, whole, whole, st.fixed_dictionaries({}, optional=members), scalars)
    if "items" in node:
        return st.one_of(st.lists(near(node["items"], root, depth + 1), max_size=2), scalars)
    if "enum" in node:
        return st.one_of(st.sampled_from(node["enum"]), scalars)
    return st.one_of(st.just("a"), scalars)


@pytest.mark.parametrize("name", SHIPPED)
def test_agrees_with_jsonschema_on_values_near_the_schema(name: str) -> None:
    known = dict(schema(name))
    fit, validator = fits.compiled(known), _validator(json.dumps(known))
    answers = set()

    @settings(max_examples=150, deadline=None)
    @given(near(known, known))
    def agree(value: Any) -> None:
        answer = fit(value)
        answers.add(answer)
        assert answer == validator.is_valid(value)

    agree()
    assert answers == {True, False}


@settings(max_examples=200, deadline=None)
@given(st.lists(scalars, max_size=4), st.integers(0, 3))
def test_agrees_with_jsonschema_on_lists_and_numbers(values: list[Any], n: int) -> None:
    for keywords in (
        {"uniqueItems": True},
        {"minItems": n},
        {"maxItems": n},
        {"enum": [True, "a"]},
        {"const": 1},
        {"items": {"type": ["integer", "string"]}},
        {"items": {"minimum": n, "maximum": n + 1}},
        {"items": {"minLength": n, "maxLength": n + 1, "pattern": "^[a-z]*$"}},
        {"items": {"const": True}},
        {"items": {"enum": [True, 1.5, "a"]}},
    ):
        assert fits.compiled(keywords)(values) == _validator(json.dumps(keywords)).is_valid(values)
