"""The fuzz targets without their engine: every seed, and some changes of each, find nothing."""

from __future__ import annotations

import ast
import json
import random
from pathlib import Path

import pytest

from tests.fuzz import targets
from tests.fuzz.mutate import ODD_VALUES, json_value
from tests.fuzz.replay import changed, target

ALONE = ["inspected"]
"""Targets that want a process of their own: tests/host has them."""
HERE = [name for name in targets.names() if name not in ALONE]


@pytest.mark.parametrize("name", HERE)
def test_no_seed_is_a_finding(name: str) -> None:
    seeds = list(target(name).seeds())
    assert seeds
    for seed in seeds:
        target(name).one(seed)


@pytest.mark.parametrize("name", HERE)
def test_no_changed_seed_is_a_finding(name: str) -> None:
    for data in changed(target(name)):
        target(name).one(data)


@pytest.mark.parametrize("name", HERE)
def test_a_target_takes_nothing_and_bytes_of_no_form(name: str) -> None:
    module = target(name)
    for data in (b"", b"\0", b"\xff" * 70, b"{" * 300, b"\n", random.Random(1).randbytes(500)):
        module.one(data)


def test_every_target_is_run_here_or_in_a_process_of_its_own() -> None:
    for path in Path(targets.__file__).parent.glob("[a-z]*.py"):
        names = {
            name.id
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Assign)
            for name in node.targets
            if isinstance(name, ast.Name)
        }
        assert ("ALONE" in names) is (path.stem in ALONE)


def test_changes_of_json_stay_json_and_reach_every_part() -> None:
    seen = {
        json_value(b'{"a": [1, {"b": "c"}], "d": null}', random.Random(seed)) for seed in range(999)
    }
    assert len(seen) > 100
    for text in seen:
        json.loads(text)
    assert any(b'"b": ""' in text for text in seen)
    assert json_value(b"{", random.Random(1)) == b"{"
    assert len(ODD_VALUES) > 20
