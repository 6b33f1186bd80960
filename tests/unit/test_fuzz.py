"""The fuzz targets without their engine: every seed, and some changes of each, find nothing."""

from __future__ import annotations

import importlib
import json
import random
from types import ModuleType

import pytest

from tests.fuzz import targets
from tests.fuzz.mutate import ODD_VALUES, json_value

CHANGED = 150
"""Changed inputs of one target, the same in every run."""
FOUND = targets.names()


def target(name: str) -> ModuleType:
    return importlib.import_module(f"tests.fuzz.targets.{name}")


@pytest.mark.parametrize("name", FOUND)
def test_no_seed_is_a_finding(name: str) -> None:
    seeds = list(target(name).seeds())
    assert seeds
    for seed in seeds:
        target(name).one(seed)


@pytest.mark.parametrize("name", FOUND)
def test_no_changed_seed_is_a_finding(name: str) -> None:
    module = target(name)
    seeds = list(module.seeds())
    rng = random.Random(name)
    change = getattr(module, "mutate", None)
    for _ in range(CHANGED):
        data = rng.choice(seeds)
        for _ in range(rng.randrange(1, 4)):
            data = change(data, rng) if change and rng.random() < 0.7 else bytes_changed(data, rng)
        module.one(data)


@pytest.mark.parametrize("name", FOUND)
def test_a_target_takes_nothing_and_bytes_of_no_form(name: str) -> None:
    module = target(name)
    for data in (b"", b"\0", b"\xff" * 70, b"{" * 300, b"\n", random.Random(1).randbytes(500)):
        module.one(data)


def bytes_changed(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    match rng.randrange(4):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + rng.randbytes(rng.randrange(1, 5)) + data[at:]
        case 2:
            return data[:at] + data[at + rng.randrange(1, 5) :]
    return data[:at] + rng.randbytes(1) + data[at + 1 :]


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
