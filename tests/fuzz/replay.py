"""Runs a target without the engine: `python -m tests.fuzz.replay NAME [FILE...]`.

Without files: every seed, and some changes of each, the same in every run.
"""

from __future__ import annotations

import importlib
import logging
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

CHANGED = 150
"""Changed inputs of one target."""


def target(name: str) -> ModuleType:
    return importlib.import_module(f"tests.fuzz.targets.{name}")


def changed(module: ModuleType, count: int = CHANGED) -> Iterator[bytes]:
    """Seeds with one to three changes each."""
    seeds = list(module.seeds())
    rng = random.Random(module.__name__.rpartition(".")[2])
    change = getattr(module, "mutate", None)
    for _ in range(count):
        data = rng.choice(seeds)
        for _ in range(rng.randrange(1, 4)):
            data = change(data, rng) if change and rng.random() < 0.7 else _bytes(data, rng)
        yield data


def _bytes(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    match rng.randrange(4):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + rng.randbytes(rng.randrange(1, 5)) + data[at:]
        case 2:
            return data[:at] + data[at + rng.randrange(1, 5) :]
    return data[:at] + rng.randbytes(1) + data[at + 1 :]


def main(name: str, *files: str) -> None:
    logging.disable(logging.CRITICAL)
    module = target(name)
    inputs = [Path(file).read_bytes() for file in files]
    if not files:
        inputs = [*module.seeds(), *changed(module)]
    for data in inputs:
        module.one(data)
    print(f"{name}: {len(inputs)} inputs, no finding")


if __name__ == "__main__":
    main(*sys.argv[1:])
