"""`aasm policy`: what is in force, what would be answered, and whether files are fit to be used."""

from __future__ import annotations

import difflib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from aa.cli import trials
from aa.cli.errors import NOT_PERMITTED, NOT_RUNNING, Failure, control
from aa.cli.output import cell, console, json_option, print_json, print_table
from aa.model import DECIDED, Action, Kind, Layer, Run
from aa.paths import POLICY_DIR, TEMPLATES_DIR

CHOSEN = "50-template.toml"
"""The file in policy.d that `use` writes."""


@click.group()
def policy() -> None:
    """Check, show, explain, choose and reload the policy."""


@policy.command(
    epilog="""\b
Examples:
  aasm policy check                      the files in /etc/agent-assembly/policy.d
  aasm policy check ./my-policy.d
  aasm policy check --json

After errors and advice it lists every rule, default of files and programs, and sandbox key with what
enforces it on this host: the proxy, the gateway, the unit of a run (its mounts and limits), Landlock; or
what only detects it, and what nothing does. Rules of the network bind agents with the layer `proxy`.

Exits with 1 when a file is not fit to be used; findings that are only advice do not count."""
)
@click.argument("directory", type=click.Path(path_type=Path), default=POLICY_DIR)
@json_option
def check(directory: Path, as_json: bool) -> None:
    """Check policy files without using them."""
    from aa.cli.host import this_host
    from aa.policy import load
    from aa.policy.enforcement import report
    from aa.tomlfile import InvalidFile

    problems: list[dict[str, Any]] = []
    findings: list[dict[str, Any]] = []
    enforced: list[dict[str, Any]] = []
    host = this_host()
    revision = ""
    try:
        found = load(directory)
        revision = found.revision
        findings = [f.as_json() for f in found.check()]
        enforced = [e.as_json() for e in report(found.files, host)]
    except InvalidFile as e:
        problems = [p.as_json() for p in e.problems]
    except OSError as e:
        raise Failure(str(e), hint="name a readable directory of *.toml files") from e
    if as_json:
        print_json(
            {
                "revision": revision,
                "problems": problems,
                "findings": findings,
                "host": host.as_json(),
                "enforcement": enforced,
            }
        )
    else:
        _print_enforcement(enforced)
        _print_check(revision, problems, findings)
    if problems or any(f["severity"] == "error" for f in findings):
        click.get_current_context().exit(1)


def _print_enforcement(enforced: list[dict[str, Any]]) -> None:
    rows = [
        (e["key"] if n == 0 else "", e["effect"] if n == 0 else "", w["mechanism"], w["words"])
        for e in enforced
        for n, w in enumerate(e["ways"])
    ]
    print_table(("what", "effect", "enforced by", "how"), rows)
    if rows:
        console().print()


def _print_check(
    revision: str, problems: list[dict[str, Any]], findings: list[dict[str, Any]]
) -> None:
    for p in problems:
        where = f"{p['file']}:{p['line']}"
        console().print(cell("error"), cell(f"{where}: {p['key']}: {p['message']}"))
        if p["fix"]:
            console().print("      fix:", cell(p["fix"]))
    for f in findings:
        where = f"{f['file']}:{f['line']}"
        console().print(cell(f["severity"]), cell(f"{where}: {f['key']}: {f['message']}"))
        if f["fix"]:
            console().print("      fix:", cell(f["fix"]))
    if problems:
        click.echo(f"{len(problems)} errors: these files would not be used", err=True)
    else:
        click.echo(f"fit to be used, revision {revision}", err=True)


@policy.command(
    epilog="""\b
Examples:
  aasm policy show
  aasm policy show --json"""
)
@json_option
def show(as_json: bool) -> None:
    """Show the policy in force."""
    with control() as client:
        told = client.call("io.agentassembly.Control.ShowPolicy")
    if as_json:
        print_json(told)
        return
    click.echo(f"revision {told['revision'] or 'none'}")
    for file in told["files"]:
        console().print()
        console().print(cell(f"{file['path']}  (id {file['id']}, mode {file['mode']})"))
        print_table(
            ("rule", "effect", "matches", "line"),
            [
                (
                    r["id"],
                    r["effect"],
                    json.dumps(r["matcher"], ensure_ascii=False),
                    r["line"],
                )
                for r in file["rules"]
            ],
            empty="no rules",
        )
        stated = [*_pairs("default", file["default"]), *_pairs("sandbox", file["sandbox"])]
        print_table(("key", "value"), stated)


def _pairs(top: str, table: dict[str, Any]) -> list[tuple[str, str]]:
    """The keys of a table that say something, as a file would have them."""
    return [
        (f"{top}.{key}", value if isinstance(value, str) else json.dumps(value))
        for key, value in table.items()
        if value not in (None, [])
    ]


def _action(kind: str, target: str, attributes: str, port: int | None) -> Action:
    try:
        given = json.loads(attributes)
        if not isinstance(given, dict):
            raise ValueError("not an object")
    except ValueError as e:
        raise Failure(f"--attributes: {e}", hint="a JSON object", code=2) from e
    if kind == Kind.NET_CONNECT.value and "host" not in given:
        host, colon, number = target.rpartition(":")
        if not colon or not number.isdecimal() or (":" in host and not host.startswith("[")):
            host, number = (f"[{target}]" if ":" in target else target), str(port or 443)
        given["host"] = host.removeprefix("[").removesuffix("]")
        given["port"] = int(number)
        target = f"{host}:{number}"
    if kind == Kind.HTTP_REQUEST.value:
        target = _request(target, given)
    return Action(Kind(kind), target, given)


def _request(target: str, given: dict[str, Any]) -> str:
    """Takes a URL apart, as far as the attributes do not say it themselves."""
    url = urlsplit(target if "://" in target else f"https://{target}")
    try:
        port = url.port or (80 if url.scheme == "http" else 443)
    except ValueError as e:
        raise Failure(f"{target}: {e}", hint="https://HOST/PATH", code=2) from e
    host = url.netloc.rpartition("@")[2].removesuffix(f":{url.port}")
    given.setdefault("host", host.removeprefix("[").removesuffix("]"))
    given.setdefault("port", port)
    given.setdefault("protocol", "http" if url.scheme == "http" else "tls")
    given.setdefault("method", "GET")
    given.setdefault("path", url.path or "/")
    given.setdefault("headers", {})
    return f"{host}:{port}"


@policy.command(
    epilog="""\b
Examples:
  aasm policy explain net.connect github.com:443 --agent claude-code
  aasm policy explain net.connect example.org --run k3v9x2mq
  aasm policy explain http.request https://api.example/v1/messages --attributes '{"method": "POST"}'
  aasm policy explain tool.call transfer_money --attributes '{"args": {"amount": 5000}}'
  aasm policy explain --files ./my-policy.d net.connect github.com:443     without the gateway

KIND is net.connect (TARGET host:port), http.request (a URL), dns.query (name), tool.call (the
tool), exec, file.open, file.unlink and file.rename (paths), mcp.call (server/tool), llm.request
(provider/model) or net.accept (address:port). docs/policy.md lists their attributes.

Exits with 0 when the answer is allow, 1 when it is not."""
)
@click.argument("kind", type=click.Choice([k.value for k in DECIDED]), metavar="KIND")
@click.argument("target")
@click.option("--run", help="Ask for this run.")
@click.option("--agent", help="Ask for an agent of this name.")
@click.option("--user", default="", help="Ask for this user.")
@click.option("--attributes", default="{}", help="What else is known, as a JSON object.")
@click.option("--port", type=int, help="The port of a net.connect, if the target has none.")
@click.option("--files", type=click.Path(path_type=Path), help="Explain these files instead.")
@json_option
def explain(
    kind: str,
    target: str,
    run: str | None,
    agent: str | None,
    user: str,
    attributes: str,
    port: int | None,
    files: Path | None,
    as_json: bool,
) -> None:
    """Say how an action would be answered, and why."""
    action = _action(kind, target, attributes, port)
    if files is not None:
        told = _explain_files(files, action, agent or "default", user)
    else:
        with control() as client:
            told = client.call(
                "io.agentassembly.Control.ExplainPolicy",
                {
                    "run": run,
                    "agent": agent,
                    "user": user,
                    "kind": action.kind.value,
                    "target": action.target,
                    "attributes": dict(action.attributes),
                },
            )
    if as_json:
        print_json(told)
    else:
        decision = told["decision"]
        console().print(
            cell(decision["effect"]), "by", cell(decision["rule"]), cell(f": {decision['reason']}")
        )
        for owed in decision["obligations"]:
            told_of = json.dumps(owed["parameters"], ensure_ascii=False)
            console().print("provided that:", cell(owed["name"]), cell(told_of))
        print_table(
            ("rule", "effect", "matches", "why"),
            [
                (s["rule"], s["effect"], "yes" if s["matched"] else "no", s["why"])
                for s in told["steps"]
            ],
        )
    if told["decision"]["effect"] != "allow":
        click.get_current_context().exit(1)


def _explain_files(directory: Path, action: Action, agent: str, user: str) -> dict[str, Any]:
    from aa.policy import load
    from aa.tomlfile import InvalidFile

    try:
        found = load(directory)
    except InvalidFile as e:
        raise Failure(str(e.problems[0]), hint=f"see `aasm policy check {directory}`") from e
    run = Run("", agent, user, -1, layers=frozenset(Layer))
    told: dict[str, Any] = found.explain(run, action, now=time.time()).as_json()
    return told


@policy.command(
    epilog="""\b
Examples:
  aasm policy reload        read the files now; the gateway also notices changes by itself"""
)
@json_option
def reload(as_json: bool) -> None:
    """Read the policy files again."""
    with control(timeout=30.0) as client:
        told = client.call("io.agentassembly.Control.ReloadPolicy")
    if as_json:
        print_json(told)
    else:
        click.echo(f"policy {told['revision'] or 'none'} is in force", err=True)


def templates() -> dict[str, Path]:
    return {p.stem: p for p in sorted(TEMPLATES_DIR.glob("*.toml"))}


@policy.command(
    epilog="""\b
Examples:
  aasm policy use observe           record everything, block nothing
  aasm policy use coding-agent      what coding agents usually need
  aasm policy use locked-down       nothing but what you add
  aasm policy use observe --force   over a file that was edited by hand

Writes /etc/agent-assembly/policy.d/50-template.toml, which is yours to edit, and reloads."""
)
@click.argument("template")
@click.option("--force", is_flag=True, help="Replace the file though it was edited.")
def use(template: str, force: bool) -> None:
    """Choose one of the shipped policies to begin with."""
    shipped = templates()
    if template not in shipped:
        near = difflib.get_close_matches(template, shipped, 1)
        raise Failure(
            f"no template {template!r}" + (f"; did you mean {near[0]}?" if near else ""),
            hint=f"there are: {', '.join(shipped) or 'none installed'}",
        )
    where = POLICY_DIR / CHOSEN
    try:
        edited = where.exists() and where.read_bytes() not in {
            p.read_bytes() for p in shipped.values()
        }
        if edited and not force:
            raise Failure(
                f"{where} was edited",
                hint="keep it (rename it) or call again with --force",
            )
        _replace(where, shipped[template].read_bytes())
    except PermissionError as e:
        raise Failure(f"{e.filename}: not permitted", hint="use sudo", code=NOT_PERMITTED) from e
    click.echo(f"{where} is {template} now", err=True)
    try:
        with control(timeout=30.0) as client:
            revision = client.call("io.agentassembly.Control.ReloadPolicy")["revision"]
    except Failure as e:
        if e.exit_code != NOT_RUNNING:
            raise
        click.echo("the gateway does not run; it will read the file when it starts", err=True)
        return
    click.echo(f"policy {revision} is in force", err=True)


def _replace(path: Path, content: bytes) -> None:
    """Writes a file by rename, so that nobody ever reads half of it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as f:
        try:
            f.write(content)
            f.flush()
            os.fchmod(f.fileno(), 0o644)
            os.fsync(f.fileno())
            os.replace(f.name, path)
        except BaseException:
            os.unlink(f.name)
            raise


policy.add_command(trials.test)
policy.add_command(trials.diff)
policy.add_command(trials.learn)
