"""Reads policy files: all of them or none, every mistake with file, line, key and what to do."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aa.model import Effect, Mode
from aa.policy.engine import Policy
from aa.policy.limits import limits_of
from aa.policy.read import rules_of
from aa.policy.rules import PolicyFile, Rule, Section, Selector
from aa.policy.sandbox import sandbox_of
from aa.policy.secret import secrets_of
from aa.tomlfile import Document, InvalidFile, Problem, parse, read, schema, validate

Json = Any

FILES_LIMIT = 256
"""Files of one policy."""
RULES_LIMIT = 20_000
"""Rules of one policy."""
HASH_LENGTH = 12
"""Hex digits of the hash in a revision."""
REVISION_LENGTH = 120
"""Characters of a revision; it is in every record."""


def load(source: Path | Iterable[Path], *, owners: Collection[int] | None = None) -> Policy:
    """Reads a folder's `*.toml` files, or the files given, as one policy.

    An empty folder is a policy without files, which denies everything. Raises
    InvalidFile with every problem of every file. `owners` is as for `aa.tomlfile.read`.
    """
    texts: list[tuple[str, bytes]] = []
    problems: list[Problem] = []
    for path in _paths(source):
        try:
            texts.append((str(path), read(path, owners=owners)))
        except FileNotFoundError:
            problems.append(Problem(str(path), 1, "", "is gone or a dangling link", "remove it"))
        except InvalidFile as e:
            problems += e.problems
    return _policy(texts, problems)


def loads(texts: Mapping[str, str | bytes]) -> Policy:
    """The same for texts in memory, by file name."""
    return _policy(list(texts.items()), [])


def _paths(source: Path | Iterable[Path]) -> list[Path]:
    if not isinstance(source, Path):
        return list(source)
    if source.is_file():
        return [source]
    try:
        found = sorted(p for p in source.iterdir() if p.suffix == ".toml" and p.name[0] != ".")
    except OSError as e:
        fix = "create it, or make it readable for aa-gateway"
        raise InvalidFile([Problem(str(source), 1, "", f"{e.strerror}", fix)]) from e
    if len(found) > FILES_LIMIT:
        message = f"has more than {FILES_LIMIT} files"
        raise InvalidFile([Problem(str(source), 1, "", message, "merge some")])
    return found


def _policy(texts: Sequence[tuple[str, str | bytes]], problems: list[Problem]) -> Policy:
    files: list[PolicyFile] = []
    for name, text in texts:
        try:
            document = parse(text, file=name)
            files.append(_file(document, len(files)))
        except InvalidFile as e:
            problems += e.problems
    if not problems:
        problems += _collisions(files)
    if problems:
        raise InvalidFile(problems)
    return Policy(files, _revision(files))


def _collisions(files: Sequence[PolicyFile]) -> Iterator[Problem]:
    seen: dict[str, PolicyFile] = {}
    for f in files:
        if f.id in seen:
            message = f"{f.id!r} is the id of {seen[f.id].path} too"
            yield Problem(f.path, 1, "policy.id", message, "give each file its own id")
        seen[f.id] = f
    held: dict[str, str] = {}
    for f in files:
        for secret in f.secrets:
            if secret.placeholder in held:
                message = f"{secret.ref} has the placeholder of {held[secret.placeholder]}"
                yield Problem(f.path, 1, "secret", message, "give each secret its own")
            held[secret.placeholder] = secret.ref
    count = sum(len(f.rules) for f in files)
    if count > RULES_LIMIT:
        message = f"there are {count} rules, more than {RULES_LIMIT}"
        yield Problem(files[-1].path, 1, "rule", message, "use patterns")


def _revision(files: Sequence[PolicyFile]) -> str:
    """A hash of what the files say, whatever they are called, and the revisions they give."""
    if not files:
        return ""
    together = "\n".join(sorted(f.digest for f in files))
    short = hashlib.sha256(together.encode()).hexdigest()[:HASH_LENGTH]
    named = ",".join(f"{f.id}@{f.revision}" for f in sorted(files, key=_by_id) if f.revision)
    text = f"{short}:{named}" if named else short
    return text if len(text) <= REVISION_LENGTH else text[: REVISION_LENGTH - 3] + "..."


def _by_id(file: PolicyFile) -> str:
    return file.id


# -- one file ----------------------------------------------------------------------------------


def _file(document: Document, number: int) -> PolicyFile:
    if not document.data:
        raise InvalidFile([document.problem((), "is empty", "write a policy or remove the file")])
    problems = validate(document, schema("policy"))
    if problems:
        raise InvalidFile(problems)
    head = document.data["policy"]
    rules = tuple(rules_of(document, head["id"], number, problems))
    sandbox = sandbox_of(document, problems)
    mode = Mode(head.get("mode", "enforce"))
    limits = tuple(limits_of(document, head["id"], mode, problems))
    secrets = tuple(secrets_of(document, head["id"], mode, problems))
    _models_have_a_default(document, rules, problems)
    if problems:
        raise InvalidFile(sorted(problems, key=lambda p: p.line))
    applies = {k: frozenset(v) for k, v in head.get("applies_to", {}).items()}
    defaults = {Section(name): value for name, value in head.get("default", {}).items()}
    return PolicyFile(
        path=document.file,
        id=head["id"],
        revision=str(head.get("revision", "")),
        mode=mode,
        applies_to=Selector(**applies),
        defaults=defaults,
        rules=rules,
        sandbox=sandbox,
        limits=limits,
        secrets=secrets,
        document=document,
    )


def _models_have_a_default(
    document: Document, rules: Sequence[Rule], problems: list[Problem]
) -> None:
    """Models are allowed unless said, so a rule that allows some would change nothing."""
    stated = document.data["policy"].get("default", {})
    if Section.LLM.value in stated:
        return
    for rule in rules:
        if rule.llm is not None and rule.effect is Effect.ALLOW:
            message = "changes nothing: all models are allowed as long as the default is not stated"
            fix = 'add llm = "deny" to policy.default'
            problems.append(document.problem(("rule", rule.number, "llm"), message, fix))
