"""Facts about what is sent: which secrets and which texts are in a body or in a WebSocket message.

The worker that holds the bytes calls these pure functions and tells the facts; the
engine decides by them. So no content leaves the worker, and every decision can be made again.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aa.policy.pattern import Matcher, glob

Json = Any

ANY = "any"
"""Stands for all detectors."""
OUT, IN = "out", "in"
"""Directions of a message: from the agent, and to it."""

GLOBS_KEPT = 1024
"""Compiled patterns of texts that are remembered."""

_SPACE = rb"(?: |\+|%20)"


def _key(pattern: bytes) -> re.Pattern[bytes]:
    """A key does not begin in the middle of a longer word."""
    return re.compile(rb"(?<![A-Za-z0-9_-])" + pattern)


DETECTORS: Mapping[str, re.Pattern[bytes]] = {
    "private-key": re.compile(
        rb"-----BEGIN"
        + _SPACE
        + rb"(?:[A-Z0-9]{1,16}"
        + _SPACE
        + rb"){0,3}PRIVATE"
        + _SPACE
        + rb"KEY(?:"
        + _SPACE
        + rb"BLOCK)?-----"
    ),
    "aws-access-key": _key(rb"(?:AKIA|ASIA)[A-Z2-7]{16}(?![A-Za-z0-9])"),
    "github-token": _key(rb"(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})"),
    "gitlab-token": _key(rb"gl(?:pat|dt|rt)-[A-Za-z0-9_-]{20,}"),
    "slack-token": _key(rb"xox[abeoprs]-[A-Za-z0-9-]{10,}"),
    "anthropic-key": _key(rb"sk-ant-[a-z0-9]{2,16}-[A-Za-z0-9_-]{20,}"),
    # Words with hyphens can look alike; a key has a digit and a capital.
    "openai-key": _key(
        rb"sk-(?!ant-)(?=[A-Za-z_-]{0,250}[0-9])(?=[a-z0-9_-]{0,250}[A-Z])[A-Za-z0-9_-]{32,}"
    ),
    "google-key": _key(rb"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),
    "stripe-key": _key(rb"[sr]k_(?:live|test)_[A-Za-z0-9]{20,}"),
    "huggingface-token": _key(rb"hf_[A-Za-z0-9]{30,}"),
    "jwt": _key(rb"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{16,}"),
}
"""What a secret of each kind looks like. Shapes alone: what is encoded or encrypted is not seen."""


def body_facts(wanted: Mapping[str, Json], data: bytes) -> dict[str, Json]:
    """What a policy wants to know of a body: `wanted` is the `body` of an obligation `inspect`.

    Raises ValueError for a detector that is not known, which must end as a denial.
    """
    return {
        "secrets": _secrets(wanted.get("secrets") or (), data),
        "texts": _texts(wanted.get("texts") or (), data),
        "bytes": len(data),
    }


def message_facts(wanted: Mapping[str, Json], direction: str, text: str | bytes) -> dict[str, Json]:
    """The same for a WebSocket message; `wanted` is the `ws` of an obligation `inspect`."""
    if direction not in (OUT, IN):
        raise ValueError(f"{direction!r} is neither {OUT} nor {IN}")
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return {
        "direction": direction,
        "secrets": _secrets(wanted.get("secrets") or (), data) if direction == OUT else [],
        "texts": _texts(wanted.get(direction) or (), data),
        "bytes": len(data),
    }


def judges(wanted: Mapping[str, Json], direction: str) -> bool:
    """Whether messages of a direction must be decided at all."""
    return bool(wanted.get(direction) or (direction == OUT and wanted.get("secrets")))


def detectors(names: Iterable[str]) -> Sequence[str]:
    """The names that `names` stand for. Raises ValueError for one that is not known."""
    chosen = dict.fromkeys(names)
    for name in chosen:
        if name != ANY and name not in DETECTORS:
            raise ValueError(f"{name!r} is not a kind of secret that can be detected")
    return tuple(DETECTORS) if ANY in chosen else tuple(chosen)


def _secrets(names: Iterable[str], data: bytes) -> list[str]:
    chosen = detectors(names)
    # Text in UTF-16 has a NUL at every second place.
    views = (data, data.replace(b"\0", b"")) if chosen and b"\0" in data else (data,)
    return [n for n in chosen if any(DETECTORS[n].search(view) for view in views)]


def _texts(patterns: Iterable[str], data: bytes) -> list[str]:
    wanted = tuple(dict.fromkeys(patterns))
    if not wanted:
        return []
    text = data.decode("utf-8", "replace")
    return [pattern for pattern in wanted if _compiled(pattern)(text)]


@functools.lru_cache(maxsize=GLOBS_KEPT)
def _compiled(pattern: str) -> Matcher:
    return glob(pattern)
