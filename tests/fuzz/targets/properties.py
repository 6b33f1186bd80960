"""The property tests of the policy language, with libFuzzer choosing their examples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

from tests.unit import (
    test_policy_learn,
    test_policy_load,
    test_policy_properties,
    test_policy_replay,
)

TESTS: tuple[Callable[[bytes], bytes | None], ...] = tuple(
    test.hypothesis.fuzz_one_input
    for module in (test_policy_properties, test_policy_load, test_policy_learn, test_policy_replay)
    for name, test in sorted(vars(module).items())
    if name.startswith("test_") and hasattr(test, "hypothesis")
)


def seeds() -> Iterator[bytes]:
    for number in range(len(TESTS)):
        for size in (40, 400):
            blocks = (hashlib.sha256(b"%d %d" % (number, n)).digest() for n in range(size // 32))
            yield bytes([number]) + b"".join(blocks)


def one(data: bytes) -> None:
    if data:
        TESTS[data[0] % len(TESTS)](data[1:])
