"""A host for the proxy's tests: namespaces, a redirect, a stand-in gateway, origins and a resolver.

The daemon is the real `aa.proxy` with listeners passed as systemd passes them, as an
unprivileged user. Origins and the resolver live in the peer's network namespace and
keep a record of everything that reached them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import datetime
import os
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import dns.message
import dns.rdatatype
import dns.rrset
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from aa.model import Decision, Effect, Mode, Obligation
from aa.varlink import Call, Server, Service
from tests.host.redirect_lab import PEER4, PEER6, REPOSITORY, Lab, run_json, wait_for

PYTHON = "/usr/bin/python3"
CLONE_NEWNET = 0x40000000
PROXY_UID = 65534
START_SECONDS = 15.0
RUN = "front1"

NAMES = ("allowed.test", "denied.test", "other.test", "refusing.test", "inspected.test")

LISTENERS = """
import os, socket, sys
def bound(kind, address, port):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    s = socket.socket(family, kind)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    s.bind((address, port))
    if kind == socket.SOCK_STREAM:
        s.listen(512)
    return s
T, U = socket.SOCK_STREAM, socket.SOCK_DGRAM
all = [bound(T, "127.0.0.1", 8898), bound(T, "::1", 8898), bound(T, "127.0.0.1", 8899),
       bound(T, "127.0.0.1", 8853), bound(T, "::1", 8853),
       bound(U, "127.0.0.1", 8853), bound(U, "::1", 8853)]
moved = [os.dup(s.fileno()) for s in all]
for i, fd in enumerate(moved):
    os.dup2(fd, 100 + i)
for i in range(len(all)):
    os.dup2(100 + i, 3 + i)
os.closerange(3 + len(all), 200)
print("listening", flush=True)
while True:
    pid = os.fork()
    if pid == 0:
        os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
        os.environ["LISTEN_FDS"] = str(len(all))
        os.environ["LISTEN_PID"] = str(os.getpid())
        os.execv("/usr/bin/python3", ["python3", "-m", "aa.proxy"])
    print(pid, flush=True)
    os.waitpid(pid, 0)
    if sys.stdin.readline() != "again\\n":
        break
"""
"""Holds the listeners as systemd does and starts the daemon; a line on stdin starts it again."""


def decision(effect: str = "allow", **more: Any) -> Decision:
    given: dict[str, Any] = {
        "reason": f"the test says {effect}",
        "rule": f"test/{effect}",
        "policy": "rev-7",
        **more,
    }
    return Decision(Effect(effect), **given)


def observed(would: str = "deny") -> Decision:
    return decision(mode=Mode.OBSERVE, would=Effect(would))


def inspected() -> Decision:
    return decision(obligations=(Obligation("inspect"),))


Answer = Decision | Callable[[Mapping[str, Any]], Any]


class Gateway:
    """Answers by name or address as the test says, denies the rest, and remembers all of it."""

    def __init__(self, path: Path) -> None:
        self.rules: dict[str, Answer] = {}
        self.asked: list[dict[str, Any]] = []
        self.reports: list[dict[str, Any]] = []
        self.confirmed: list[dict[str, Any]] = []
        self.status: dict[str, Any] = {}
        self.waits: list[dict[str, Any]] = []
        self.waiting = 0
        self.answers: dict[str, Decision] = {}
        self._runs: dict[str, dict[str, Any]] = {}
        self._watchers: set[asyncio.Queue[dict[str, Any]]] = set()
        self._path = path
        self._loop = asyncio.new_event_loop()
        self._server: Server | None = None
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def start(self) -> None:
        self._in_loop(self._start)

    def stop(self) -> None:
        self._in_loop(self._stop)

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def set_run(self, run: Mapping[str, Any]) -> None:
        def tell() -> None:
            self._runs[run["id"]] = dict(run)
            for watcher in self._watchers:
                watcher.put_nowait({"event": "changed", "runs": [dict(run)]})

        self._in_loop(tell)

    def forget(self) -> None:
        """A clean slate for the next test."""
        self.rules = {}
        self.asked.clear()
        self.reports.clear()
        self.confirmed.clear()
        self.waits.clear()
        self.answers.clear()

    def connects(self, *, final: bool | None = None) -> list[dict[str, Any]]:
        found = [a for a in self.asked if a["action"]["kind"] == "net.connect"]
        return found if final is None else [a for a in found if a["final"] is final]

    def reported(self, kind: str, count: int = 1) -> list[dict[str, Any]]:
        """Waits for so many reports of a type and returns all there are."""
        wait_for(lambda: len([r for r in self.reports if r["type"] == kind]) >= count)
        return [r for r in self.reports if r["type"] == kind]

    def _in_loop(self, act: Callable[[], None]) -> None:
        done = threading.Event()

        def run() -> None:
            act()
            done.set()

        self._loop.call_soon_threadsafe(run)
        assert done.wait(5)

    def _start(self) -> None:
        service = Service("stand-in", "0")

        def unused(call: Call) -> Mapping[str, Any]:
            raise AssertionError(f"the proxy has no business with {call.method}")

        service.add(
            "io.agentassembly.Enforce",
            {
                "Decide": self._decide,
                "WaitApproval": self._wait_approval,
                "Report": self._report,
                "SetStatus": self._set_status,
                "ConfirmRun": self._confirm,
                "WatchRuns": self._watch,
                "GetSandbox": unused,
                "RegisterRun": unused,
                "StartRun": unused,
                "AwaitRun": unused,
                "EndRun": unused,
                "SetPaused": unused,
                "SetHalt": unused,
            },
        )
        self._server = Server.at(self._path, service, mode=0o666)

    def _stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _decide(self, call: Call) -> Mapping[str, Any]:
        action = call.parameters["action"]
        final = not call.parameters.get("provisional")
        approval = call.parameters.get("approval") or ""
        self.asked.append(
            {
                "run": call.parameters["run"],
                "action": action,
                "final": final,
                "approval": approval,
            }
        )
        attributes = action.get("attributes") or {}
        keys = [attributes.get("host"), *attributes.get("addresses", ()), action["target"]]
        rule = next((self.rules[k] for k in keys if k in self.rules), decision("deny"))
        if isinstance(rule, Decision):
            return {"decision": rule.as_json()}
        answer = rule(action)
        if asyncio.iscoroutine(answer):
            answer = await answer
        return {"decision": answer.as_json() if isinstance(answer, Decision) else answer}

    async def _wait_approval(self, call: Call) -> Mapping[str, Any]:
        """What the test puts into `answers`, once it does."""
        p = call.parameters
        self.waits.append(p)
        self.waiting += 1
        try:
            while p["approval"] not in self.answers:
                await asyncio.sleep(0.01)
        finally:
            self.waiting -= 1
        return {"decision": self.answers[p["approval"]].as_json()}

    def _report(self, call: Call) -> Mapping[str, Any]:
        self.reports += call.parameters["reports"]
        return {}

    def _set_status(self, call: Call) -> Mapping[str, Any]:
        self.status = call.parameters
        return {}

    def _confirm(self, call: Call) -> Mapping[str, Any]:
        self.confirmed.append(call.parameters)
        return {}

    async def _watch(self, call: Call) -> AsyncIterator[Mapping[str, Any]]:
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            yield {"event": "snapshot", "runs": list(self._runs.values())}
            while True:
                yield await queue.get()
        finally:
            self._watchers.discard(queue)


def certificates(directory: Path, names: tuple[str, ...], *, days: int = 1) -> tuple[Path, Path]:
    """A CA certificate, and a chain with key for `names` that it signed. With negative `days` the
    chain has expired, the authority has not."""
    now = datetime.datetime.now(datetime.timezone.utc)

    def built(subject: str, issuer: str, key: Any, signer: Any, *, ca: bool) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=7))
            .not_valid_after(now + datetime.timedelta(days=1 if ca else days))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            alternatives = [x509.DNSName(name) for name in names]
            builder = builder.add_extension(
                x509.SubjectAlternativeName(alternatives), critical=False
            )
        return builder.sign(signer, hashes.SHA256())

    authority = f"origin CA of {directory.name}"
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    ca, leaf = directory / "ca.pem", directory / "leaf.pem"
    ca.write_bytes(built(authority, authority, ca_key, ca_key, ca=True).public_bytes(pem))
    leaf.write_bytes(
        built(names[0], authority, key, ca_key, ca=False).public_bytes(pem)
        + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return ca, leaf


class Peer:
    """Servers in the peer's network namespace. `seen` has an entry for each that was reached."""

    def __init__(self, lab: Lab, leaf: Path) -> None:
        self.seen: list[tuple[str, Any]] = []
        self.queries: list[tuple[str, str]] = []
        self.zone: dict[tuple[str, str], list[str]] = {}
        self.mute = False
        self._lab = lab
        self._leaf = leaf
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def start(self) -> None:
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    def reached(self, name: str) -> list[Any]:
        return [what for where, what in self.seen if where == name]

    def _sockets(self, kind: int, port: int) -> list[socket.socket]:
        """Bound in the peer's namespace, by a thread that went there."""
        made: list[socket.socket] = []

        def go() -> None:
            namespace = os.open(f"/run/netns/{self._lab._peer}", os.O_RDONLY)
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.setns(namespace, CLONE_NEWNET) == 0
            os.close(namespace)
            for family, address in ((socket.AF_INET, PEER4), (socket.AF_INET6, PEER6)):
                sock = socket.socket(family, kind)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((address, port))
                made.append(sock)

        thread = threading.Thread(target=go)
        thread.start()
        thread.join(5)
        assert len(made) == 2
        return made

    def served(self, tls: ssl.SSLContext) -> tuple[tuple[int, Any, ssl.SSLContext | None], ...]:
        """Port, protocol and TLS of each server."""
        return (
            (443, self._http, tls),
            (8443, self._http, tls),
            (80, self._http, None),
            (8080, self._http, None),
            (22, self._banner, None),
            (7, self._echo, None),
            (9, self._keep, None),
            (53, self._dns_stream, None),
        )

    async def _start(self) -> None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(self._leaf)
        tls.sni_callback = lambda _, name, __: self.seen.append(("sni", name))
        for port, serve, context in self.served(tls):
            for sock in self._sockets(socket.SOCK_STREAM, port):
                await asyncio.start_server(serve, sock=sock, ssl=context)
        for sock in self._sockets(socket.SOCK_DGRAM, 53):
            sock.setblocking(False)
            await self._loop.create_datagram_endpoint(lambda: _Resolver(self), sock=sock)

    async def _http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Reads one request as it is on the wire. /bytes/N answers with N bytes."""
        with contextlib.suppress(OSError, EOFError, asyncio.LimitOverrunError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.seen.append(("http", head))
            path = head.split()[1].decode()
            lines = head.decode("latin-1").lower().split("\r\n")
            if "expect: 100-continue" in lines:
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = b""
            lengths = [int(x.partition(":")[2]) for x in lines if x.startswith("content-length")]
            if lengths:
                body = await reader.readexactly(lengths[0])
            elif "transfer-encoding: chunked" in lines:
                body = await reader.readuntil(b"0\r\n\r\n")
            self.seen.append(("body", body))
            size = int(path.rpartition("/")[2]) if path.startswith("/bytes/") else 0
            text = bytes(range(256)) * (size // 256 + 1) if size else b"the origin says hello\n"
            text = text[:size] if size else text
            if path == "/keep":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))
                await reader.read()
            else:
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
                    % len(text)
                )
                writer.write(text)
            await writer.drain()
            with contextlib.suppress(asyncio.TimeoutError):
                more = await asyncio.wait_for(reader.read(1000), 0.2)
                if more:
                    self.seen.append(("behind", more))
        writer.close()

    async def _banner(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Speaks first, like ssh and SMTP; then echoes."""
        self.seen.append(("banner", None))
        writer.write(b"220 speak\r\n")
        await self._copy(reader, writer)

    async def _echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.seen.append(("echo", None))
        await self._copy(reader, writer)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.write(b"all of it\n")
            await writer.drain()
        writer.close()

    async def _keep(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Swallows; says nothing and never closes first."""
        self.seen.append(("keep", None))
        with contextlib.suppress(OSError):
            while await reader.read(65536):
                pass
        writer.close()

    def resolve(self, wire: bytes, *, stream: bool) -> bytes | None:
        query = dns.message.from_wire(wire)
        name = query.question[0].name.to_text().removesuffix(".")
        kind = dns.rdatatype.to_text(query.question[0].rdtype)
        self.queries.append((name, kind))
        if self.mute:
            return None
        answer = dns.message.make_response(query)
        found = self.zone.get((name, kind))
        if found is None:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        else:
            answer.answer = [dns.rrset.from_text_list(name + ".", 77, "IN", kind, found)]
        try:
            return answer.to_wire(max_size=65535 if stream else 512)
        except dns.exception.TooBig:
            answer.answer = []
            answer.flags |= dns.flags.TC
            return answer.to_wire()

    async def _dns_stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError):
            length = int.from_bytes(await reader.readexactly(2), "big")
            answer = self.resolve(await reader.readexactly(length), stream=True)
            if answer is not None:
                writer.write(len(answer).to_bytes(2, "big") + answer)
                await writer.drain()
        writer.close()


class _Resolver(asyncio.DatagramProtocol):
    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        answer = self._peer.resolve(data, stream=False)
        if answer is not None:
            self._transport.sendto(answer, addr)


class World:
    """All of it. `curl` and `python` act as the governed run."""

    peer_type: type[Peer] = Peer

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        self.directory = directory
        self.ca, leaf = certificates(directory, NAMES)
        self.gateway = Gateway(lab.path("/run/agent-assembly/enforce"))
        self.peer = self.peer_type(lab, leaf)
        self.environment: dict[str, str] = {}
        """Of the daemon, besides this process's."""
        self.holder: subprocess.Popen[str] | None = None
        self.proxy_pid = 0
        self.log = directory / "proxy.log"

    def start(self, config: str = "") -> None:
        self._mount_etc(config)
        self.prepare()
        self._redirect()
        self.gateway.start()
        self.gateway.set_run(run_json(self.lab, RUN, state="running"))
        self.peer.start()
        environment = {
            **os.environ,
            "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}",
            **self.environment,
        }
        with self.log.open("w") as log:
            self.holder = self.lab.start(
                PYTHON,
                "-c",
                LISTENERS,
                str(PROXY_UID),
                stdin=subprocess.PIPE,
                stderr=log,
                env=environment,
                cwd="/",
            )
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == "listening\n"
        self._started()

    def _started(self) -> None:
        """The daemon accepts once it said so in its own way: its status reaches the gateway."""
        assert self.holder is not None and self.holder.stdout is not None
        self.gateway.status = {}
        self.proxy_pid = int(self.holder.stdout.readline())
        assert wait_for(lambda: self.gateway.status, START_SECONDS), self.log.read_text()

    def kill_proxy(self, number: int) -> None:
        os.kill(self.proxy_pid, number)

    def restart_proxy(self) -> None:
        """What systemd does once the daemon is gone."""
        assert self.holder is not None and self.holder.stdin is not None
        self.holder.stdin.write("again\n")
        self.holder.stdin.flush()
        self._started()

    def close(self) -> None:
        if self.proxy_pid:  # it and its workers are children of nobody that ends with the lab
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.proxy_pid, signal.SIGKILL)
        self.gateway.close()
        self.peer.close()

    def prepare(self) -> None:
        """What must be there before the daemon starts."""

    def overlay(self, path: str) -> None:
        """A folder of the machine's that is the lab's own from now on."""
        upper, work = f"/run/own{path}/upper", f"/run/own{path}/work"
        self.lab.run("mkdir", "-p", upper, work)
        layers = f"lowerdir={path},upperdir={upper},workdir={work}"
        self.lab.run("mount", "-t", "overlay", "overlay", "-o", layers, path)

    def _mount_etc(self, config: str) -> None:
        """This lab's own hosts file, resolvers and configuration."""
        layers = "lowerdir=/etc,upperdir=/run/etc-upper,workdir=/run/etc-work"
        self.lab.run("mkdir", "-p", "/run/etc-upper", "/run/etc-work")
        self.lab.run("mount", "-t", "overlay", "overlay", "-o", layers, "/etc")
        self.write("/etc/resolv.conf", f"nameserver {PEER4}\n")
        self.write("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n")
        hosts = "".join(f"{a} {name}\n" for name in NAMES for a in (PEER4, PEER6))
        self.write("/etc/hosts", f"127.0.0.1 localhost\n::1 localhost\n{hosts}")
        self.lab.run("mkdir", "-p", "/etc/agent-assembly")
        self.write("/etc/agent-assembly/agent-assembly.toml", config)

    def write(self, path: str, text: str) -> None:
        file = self.lab.path(path)
        if file.is_symlink():
            file.unlink()
        file.write_text(text)

    def _redirect(self) -> None:
        """The redirect in short: what aa-redirect does in full."""
        cgroup = self.lab.slice.relative_to(self.lab.cgroup)
        for tool, loopback in (("iptables", "127.0.0.1/32"), ("ip6tables", "::1/128")):
            add = [tool, "-t", "nat", "-A", "OUTPUT", "-m", "cgroup", "--path", str(cgroup)]
            self.lab.run(*add, "-p", "tcp", "-d", loopback, "--dport", "8899", "-j", "RETURN")
            for kind in ("udp", "tcp"):
                self.lab.run(
                    *add, "-p", kind, "--dport", "53", "-j", "REDIRECT", "--to-ports", "8853"
                )
            self.lab.run(*add, "-p", "tcp", "-j", "REDIRECT", "--to-ports", "8898")

    def fresh(self) -> None:
        """A clean slate for the next test: the proxy is done with the connections of the last."""

        def busy() -> bool:
            net = Path(f"/proc/{self.proxy_pid}/net")
            lines = [x.split() for t in ("tcp", "tcp6") for x in (net / t).read_text().split("\n")]
            ours = [x for x in lines if len(x) > 3 and x[1][-4:] in ("22C2", "22C3")]
            return any(x[3] in ("01", "08") for x in ours)  # established, closed by the peer

        wait_for(lambda: not busy(), 3)
        time.sleep(0.02)
        self.gateway.forget()
        self.peer.seen.clear()
        self.peer.queries.clear()

    def curl(self, *arguments: str, run: str = RUN, **how: Any) -> subprocess.CompletedProcess[str]:
        options = ["--silent", "--show-error", "--max-time", "8", "--cacert", str(self.ca)]
        env = _without_proxies()
        return self.lab.governed(run, "curl", *options, *arguments, check=False, env=env, **how)

    def start_curl(self, *arguments: str, run: str = RUN) -> subprocess.Popen[str]:
        """One that may take its time; whoever calls ends it."""
        options = ["--silent", "--show-error", "--insecure", "--max-time", "60"]
        return self.lab.start_governed(
            run, "curl", *options, *arguments, stderr=subprocess.PIPE, env=_without_proxies()
        )

    def python(self, script: str, *arguments: str, run: str = RUN) -> str:
        done = self.lab.governed(run, PYTHON, "-c", script, *arguments, env=_without_proxies())
        return str(done.stdout)

    def start_python(self, script: str, *arguments: str, run: str = RUN) -> subprocess.Popen[str]:
        return self.lab.start_governed(run, PYTHON, "-c", script, *arguments)


def _without_proxies() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}


@contextlib.contextmanager
def world(config: str = "", kind: type[World] = World) -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix=f"aa-test-{os.getpid()}-") as directory, Lab() as lab:
        os.chmod(directory, 0o755)
        made = kind(lab, Path(directory))
        try:
            made.start(config)
            yield made
        finally:
            made.close()


def timed(act: Callable[[], Any]) -> tuple[Any, float]:
    began = time.monotonic()
    return act(), time.monotonic() - began
