"""What a model's tokens cost, from prices.toml. What has no price there costs the most that is known."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from aa import paths
from aa.tomlfile import InvalidFile, schema
from aa.tomlfile import load as load_toml

PRICES_FILE = paths.CONFIG_DIR / "prices.toml"
PER = 1_000_000
"""Prices are for so many tokens."""


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens of one request, as its provider told them."""

    provider: str
    model: str
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int

    @property
    def tokens(self) -> int:
        return (
            self.input_tokens
            + self.output_tokens
            + self.cache_read_tokens
            + self.cache_write_tokens
        )


@dataclass(frozen=True, slots=True)
class Price:
    """In USD for a million tokens."""

    input: float
    output: float
    cache_read: float
    cache_write: float

    def of(self, usage: Usage) -> float:
        return (
            usage.input_tokens * self.input
            + usage.output_tokens * self.output
            + usage.cache_read_tokens * self.cache_read
            + usage.cache_write_tokens * self.cache_write
        ) / PER


@dataclass(frozen=True, slots=True)
class Provider:
    """One provider: the hosts that it answers on, and its models in the order of the file."""

    id: str
    hosts: tuple[str, ...]
    models: tuple[tuple[str, Price], ...]


@dataclass(frozen=True, slots=True)
class Prices:
    """All that is known. `problem` says why nothing is, when the file cannot be used."""

    providers: Mapping[str, Provider]
    problem: str = ""

    def cost(self, usage: Usage) -> tuple[float, bool]:
        """In USD, and whether the model has a price of its own."""
        provider = self.providers.get(usage.provider)
        for pattern, price in provider.models if provider else ():
            if fnmatchcase(usage.model, pattern):
                return price.of(usage), True
        return _dearest(self._candidates(provider)).of(usage), False

    def _candidates(self, provider: Provider | None) -> Iterator[Price]:
        for one in [provider] if provider else self.providers.values():
            yield from (price for _, price in one.models)

    def is_provider(self, host: str) -> bool:
        """Whether model requests go to a host."""
        return bool(self.provider_of(host))

    def provider_of(self, host: str) -> str:
        """The id of the provider that answers on a host, or ""."""
        return next((p.id for p in self.providers.values() if host in p.hosts), "")


def _dearest(prices: Iterator[Price]) -> Price:
    """The highest of each part: a price that no model of theirs can exceed."""
    known = list(prices)
    return Price(
        max((p.input for p in known), default=0.0),
        max((p.output for p in known), default=0.0),
        max((p.cache_read for p in known), default=0.0),
        max((p.cache_write for p in known), default=0.0),
    )


def load(path: Path = PRICES_FILE, *, owners: Collection[int] | None = None) -> Prices:
    """Never raises: without a usable file `problem` is set, and limits in USD deny."""
    try:
        document = load_toml(path, schema("prices"), owners=owners)
    except FileNotFoundError:
        return Prices({}, f"{path} is missing")
    except InvalidFile as e:
        return Prices({}, str(e.problems[0]))
    providers = {p["id"]: _provider(p) for p in document.data["provider"]}
    return Prices(providers)


def _provider(written: Mapping[str, Any]) -> Provider:
    models = tuple((m["match"], _price(m)) for m in written["model"])
    return Provider(written["id"], tuple(h.lower() for h in written.get("hosts", ())), models)


def _price(written: Mapping[str, Any]) -> Price:
    """Cached tokens without a price of their own cost what other input does."""
    each = float(written["input"])
    return Price(
        each,
        float(written["output"]),
        float(written.get("cache_read", each)),
        float(written.get("cache_write", each)),
    )
