"""Rules as values: what a file says, ready to be matched against a question."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aa.model import Effect, Mode, Run
from aa.policy.approve import Approve
from aa.policy.limits import Limit
from aa.policy.matchers import (
    Access,
    DnsMatcher,
    ExecMatcher,
    FileMatcher,
    InboundMatcher,
    LlmMatcher,
    McpMatcher,
    ToolMatcher,
)
from aa.policy.network import NetworkMatcher, listed
from aa.policy.sandbox import Sandbox
from aa.policy.secret import Secret
from aa.policy.when import When
from aa.tomlfile import Document

__all__ = [
    "Access",
    "PolicyFile",
    "Rule",
    "Section",
    "Selector",
    "UNSTATED",
    "every_rule",
]

Json = Any


class Section(enum.StrEnum):
    """What a rule can be about: the key of its matcher."""

    NETWORK = "network"
    INBOUND = "inbound"
    DNS = "dns"
    EXEC = "exec"
    FILE = "file"
    TOOL = "tool"
    MCP = "mcp"
    LLM = "llm"


UNSTATED: Mapping[Section, str] = {
    Section.NETWORK: "deny",
    Section.DNS: "deny",
    Section.EXEC: "allow",
    Section.FILE: "sandbox",
    Section.TOOL: "deny",
    Section.MCP: "deny",
    # Asked only about a request that the network rules let through.
    Section.LLM: "allow",
}
"""The sections that have a default, and what it is in a policy that does not state it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of a file, with exactly one matcher. `ref` is how decisions name it: POLICY-ID/RULE-ID."""

    ref: str
    id: str
    effect: Effect
    reason: str
    section: Section
    file_number: int  # index into the policy's files
    bit: int  # 1 << file_number
    document: Document = field(repr=False, compare=False)
    number: int
    """The how manieth rule of its document this is, from 0."""
    when: When | None = None
    approve: Approve | None = None
    """Of an ask rule that says how; for the others an `Approve()` holds."""
    network: NetworkMatcher | None = None
    inbound: InboundMatcher | None = None
    dns: DnsMatcher | None = None
    exec: ExecMatcher | None = None
    file: FileMatcher | None = None
    tool: ToolMatcher | None = None
    mcp: McpMatcher | None = None
    llm: LlmMatcher | None = None

    matcher: Any = field(init=False, repr=False, compare=False)
    """The one of these that there is."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "matcher", getattr(self, self.section.value))

    def holds(self, now: float) -> bool:
        """Whether this is a time at which the rule counts."""
        return self.when is None or self.when.holds(now, against=self.effect is not Effect.ALLOW)

    @property
    def line(self) -> int:
        return self.document.line(("rule", self.number))

    @property
    def written(self) -> Mapping[str, Json]:
        """The matcher as the file has it, with its time."""
        rule: Mapping[str, Json] = self.document.data["rule"][self.number]
        return {key: rule[key] for key in (self.section.value, "when") if key in rule}

    def as_json(self) -> dict[str, Json]:
        return {
            "id": self.id,
            "effect": self.effect.value,
            "reason": self.reason,
            "matcher": dict(self.written),
            "line": self.line,
        }


@dataclass(frozen=True, slots=True)
class Selector:
    """Which runs a policy is about. An empty part selects all; the parts are ANDed."""

    agents: frozenset[str] = frozenset()
    users: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()

    def selects(self, run: Run) -> bool:
        return (
            (not self.agents or run.agent in self.agents)
            and (not self.users or run.user in self.users)
            and (not self.tags or not self.tags.isdisjoint(run.tags))
        )

    def as_json(self) -> dict[str, Json]:
        parts = {"agents": self.agents, "users": self.users, "tags": self.tags}
        return {name: sorted(values) for name, values in parts.items() if values}

    def __str__(self) -> str:
        parts = (f"{name} {listed(values)}" for name, values in self.as_json().items())
        return " and ".join(parts) or "every run"


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """One file of policy.d."""

    path: str
    id: str
    revision: str
    mode: Mode
    applies_to: Selector
    defaults: Mapping[Section, str]
    """Those that the file states."""
    rules: tuple[Rule, ...]
    sandbox: Sandbox
    limits: tuple[Limit, ...]
    secrets: tuple[Secret, ...]
    document: Document = field(repr=False, compare=False)

    @property
    def digest(self) -> str:
        return self.document.digest

    def line(self, section: Section) -> int:
        """Where the default of a section stands, or the policy that does not state it."""
        return self.document.line(("policy", "default", section.value))

    def default(self, section: Section) -> str:
        return self.defaults.get(section, UNSTATED[section])

    def as_json(self) -> dict[str, Json]:
        return {
            "path": self.path,
            "id": self.id,
            "revision": self.revision,
            "mode": self.mode.value,
            "applies_to": self.applies_to.as_json(),
            "default": {section.value: self.default(section) for section in UNSTATED},
            "sandbox": self.sandbox.as_json(),
            "rules": [rule.as_json() for rule in self.rules],
            "limits": [limit.as_json() for limit in self.limits],
            "secrets": [secret.as_json() for secret in self.secrets],
        }

    def __str__(self) -> str:
        return f"{self.path} ({self.id})"


def every_rule(files: Sequence[PolicyFile]) -> tuple[Rule, ...]:
    """All rules in the one order that does not depend on the order of files or rules."""
    return tuple(sorted((r for f in files for r in f.rules), key=lambda r: r.ref))
