"""Runs one target under libFuzzer: `python -m tests.fuzz.engine NAME SECONDS DIRECTORY`.

Only `aa` is instrumented for coverage. One input that takes longer than
`INPUT_SECONDS`, or a process above `RSS_MB`, is a finding like an exception is.
"""

from __future__ import annotations

import hashlib
import logging
import random
import resource
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import atheris
from hypothesis import settings

from tests.fuzz import replay

INPUT_SECONDS = 10
"""One input takes milliseconds; the machine may be busy with other work."""
INPUT_BYTES = 1 << 16
RSS_MB = 1024
ADDRESS_SPACE = 4 << 30
"""A single allocation beyond this raises MemoryError in the target."""


def main(name: str, seconds: str, directory: str) -> None:
    top = Path(directory)
    crashes, corpus, seeds = top / "crashes", top / "corpus" / name, top / "seeds" / name
    for folder in (crashes, corpus, seeds):
        folder.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    settings.register_profile("fuzz", database=None, deadline=None)
    settings.load_profile("fuzz")
    with atheris.instrument_imports(include=["aa"]):
        target = replay.target(name)
    for seed in target.seeds():
        (seeds / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    arguments = [
        sys.argv[0],
        f"-max_total_time={seconds}",
        f"-timeout={INPUT_SECONDS}",
        f"-max_len={INPUT_BYTES}",
        f"-rss_limit_mb={RSS_MB}",
        f"-artifact_prefix={crashes}/{name}-",
        "-print_final_stats=1",
    ]
    words = getattr(target, "WORDS", ())
    if words:
        written = top / f"{name}.words"
        written.write_text("".join(f'"{_escaped(word)}"\n' for word in words))
        arguments.append(f"-dict={written}")
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    change = getattr(target, "mutate", None)
    mutator = {"custom_mutator": _mutator(change)} if change else {}
    atheris.Setup([*arguments, str(corpus), str(seeds)], target.one, **mutator)
    atheris.Fuzz()


def _mutator(change: Callable[[bytes, random.Random], bytes]) -> Callable[[bytes, int, int], bytes]:
    """Half of the changes by the target's own function, half by libFuzzer's."""

    def mutate(data: bytes, limit: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = change(data, rng) if rng.random() < 0.5 else data
        return changed[:limit] if changed != data else atheris.Mutate(data, limit)

    return mutate


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


if __name__ == "__main__":
    main(*sys.argv[1:])
