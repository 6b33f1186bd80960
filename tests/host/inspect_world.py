"""A host whose proxy inspects: real workers, an authority of its own, and origins that keep a record.

The gateway is the stand-in of `front_world`. It answers a connection with the obligation to inspect
and each request by its method and path, as the test says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import wsproto
import wsproto.events

from aa.model import Decision, Obligation
from tests.host.front_world import RUN, Peer, World, certificates, decision
from tests.host.redirect_lab import REPOSITORY, wait_for

ENGINE = REPOSITORY / "build" / "inspect" / "py311"
NOBODY = "nogroup"
EXPIRED, OTHER_NAME, UNTRUSTED, MUTE, NOT_TLS = 9443, 9444, 9445, 9446, 9447
"""Ports of origins with something wrong."""


def engine() -> Path:
    """mitmproxy as the package has it, made when it is not there."""
    if not (ENGINE / "mitmproxy").is_dir():
        subprocess.run(
            ["make", "--no-print-directory", "-C", str(REPOSITORY), "build/inspect/py311"],
            check=True,
            timeout=600,
            stdout=subprocess.DEVNULL,
        )
    return ENGINE


PRICES = """
[[provider]]
id = "maker"
hosts = ["allowed.test"]
[[provider.model]]
match = "*"
input = 1.0
output = 2.0
"""

Judge = Callable[[Mapping[str, Any]], Decision]


def inspect(**parameters: Any) -> Decision:
    """The answer to a connection: look inside."""
    return decision(obligations=(Obligation("inspect", parameters),))


def requests(judge: Judge, **parameters: Any) -> Callable[[Mapping[str, Any]], Decision]:
    """Inspects the connection, and has `judge` answer each request by its attributes."""

    def answer(action: Mapping[str, Any]) -> Decision:
        if action["kind"] == "net.connect":
            return inspect(**parameters)
        return judge(action["attributes"])

    return answer


def by_path(attributes: Mapping[str, Any]) -> Decision:
    """Everything but what lies below /denied."""
    return decision("deny" if attributes["path"].startswith("/denied") else "allow")


class Origin(Peer):
    """HTTP/1.1 and HTTP/2 with keep-alive, events and WebSockets. `seen` has each request's head and
    body, and `("ended", why)` when a connection ended inside a request."""

    def served(self, tls: ssl.SSLContext) -> tuple[tuple[int, Any, ssl.SSLContext | None], ...]:
        tls.set_alpn_protocols(["h2", "http/1.1"])
        plain = [one for one in super().served(tls) if one[0] not in (443, 8443, 80, 8080)]
        directory = self._leaf.parent
        return (
            (443, self._serve, tls),
            (8443, self._serve, _context(self._leaf)),  # HTTP/1.1 alone
            (80, self._serve, None),
            (8080, self._serve, None),
            (EXPIRED, self._serve, _context(directory / "expired" / "leaf.pem")),
            (OTHER_NAME, self._serve, _context(directory / "other" / "leaf.pem")),
            (UNTRUSTED, self._serve, _context(directory / "untrusted" / "leaf.pem")),
            (MUTE, self._keep, None),
            (NOT_TLS, self._not_tls, None),
            *plain,
        )

    async def _not_tls(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 this is no TLS\r\n")
        with contextlib.suppress(OSError):
            await reader.read(1000)
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.seen.append(("connection", None))
        tls = writer.get_extra_info("ssl_object")
        try:
            if tls is not None and tls.selected_alpn_protocol() == "h2":
                await self._http2(reader, writer)
            else:
                while await self._one(reader, writer):
                    pass
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as e:
            self.seen.append(("ended", type(e).__name__))
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as e:
            if e.partial:
                raise
            return False
        self.seen.append(("http", head))
        lines = head.decode("latin-1").split("\r\n")
        fields = {
            name.lower(): value.strip()
            for name, _, value in (x.partition(":") for x in lines[1:] if x)
        }
        if fields.get("upgrade", "").lower() == "websocket":
            await self._websocket(head, reader, writer)
            return False
        body, size = b"", 0
        if "content-length" in fields:
            size = int(fields["content-length"])
            body = await self._body(reader, size)
        elif fields.get("transfer-encoding") == "chunked":
            while length := int(await reader.readline(), 16):
                body += await reader.readexactly(length)
                await reader.readline()
            await reader.readline()
            size = len(body)
        self.seen.append(("body", body[:1000]))
        self.seen.append(("size", size))
        method, path = lines[0].split()[:2]
        await self._answer(method, path, head, body, writer)
        return fields.get("connection", "").lower() != "close" and not path.startswith("/until-end")

    async def _body(self, reader: asyncio.StreamReader, size: int) -> bytes:
        """Reads all of it and returns its beginning."""
        kept = b""
        left = size
        while left:
            data = await reader.read(min(left, 1 << 16))
            if not data:
                raise EOFError
            left -= len(data)
            kept = kept if len(kept) > 1000 else kept + data
        return kept

    async def _model(self, streams: bool, writer: asyncio.StreamWriter) -> None:
        """A model's answer in Anthropic's shape, with what it used."""
        usage = {"input_tokens": 10, "output_tokens": 1, "cache_read_input_tokens": 7}
        if not streams:
            text = json.dumps({"type": "message", "usage": {**usage, "output_tokens": 5}}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
            writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(text), text))
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n")
        writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
        for event in (
            {"type": "message_start", "message": {"usage": usage}},
            {"type": "content_block_delta", "delta": {"text": "hello"}},
            {"type": "message_delta", "usage": {"output_tokens": 42}},
        ):
            line = b"event: x\ndata: " + json.dumps(event).encode() + b"\n\n"
            for part in (line[:30], line[30:]):  # not at the ends of lines
                writer.write(b"%x\r\n%b\r\n" % (len(part), part))
                await writer.drain()
        writer.write(b"0\r\n\r\n")

    async def _answer(
        self, method: str, path: str, head: bytes, body: bytes, writer: asyncio.StreamWriter
    ) -> None:
        if path == "/events":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n")
            writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
            for number in range(3):
                event = b"data: %d\n\n" % number
                writer.write(b"%x\r\n%b\r\n" % (len(event), event))
                await writer.drain()
                await asyncio.sleep(0.4)
            writer.write(b"0\r\n\r\n")
        elif path == "/echo":  # what it was asked with, in pieces
            text = head + b"\n"
            writer.write(b"HTTP/1.1 200 OK\r\nX-Seen: " + _authorization(head) + b"\r\n")
            writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
            for at in range(0, len(text), 7):
                writer.write(b"%x\r\n%b\r\n" % (len(text[at : at + 7]), text[at : at + 7]))
                await writer.drain()
            writer.write(b"0\r\n\r\n")
        elif path == "/encoded":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 1\r\n\r\nx")
        elif path == "/v1/messages":
            await self._model(b'"stream": true' in body, writer)
        elif path.startswith("/bytes/"):
            size = int(path.rpartition("/")[2])
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            await self._pour(size, writer)
        elif path.startswith("/cut/"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * 1000)
            await writer.drain()
            writer.transport.abort()
        elif path == "/until-end":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\nno length\n")
        elif path == "/nonsense":
            writer.write(b"this is no answer\r\n\r\n")
        elif path == "/two-lengths":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 5\r\n\r\nabcde")
        elif path == "/huge-head":
            writer.write(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000)
        elif path == "/hang-up":
            writer.transport.abort()
        elif path == "/early":
            writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nearly\n")
        elif path == "/trailers":
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n")
            writer.write(b"5\r\nhello\r\n0\r\nX: y\r\n\r\n")
        else:
            text = b"" if method == "HEAD" else f"{method} {path}\n".encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))
        with contextlib.suppress(OSError):
            await writer.drain()

    async def _pour(self, size: int, writer: asyncio.StreamWriter) -> None:
        block = bytes(range(256)) * 256
        while size > 0:
            writer.write(block[: min(size, len(block))])
            size -= len(block)
            await writer.drain()

    async def _websocket(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Echoes text, and says once a second what was not asked for after `push`."""
        ws = wsproto.WSConnection(wsproto.ConnectionType.SERVER)
        ws.receive_data(head)
        while True:
            for event in ws.events():
                if isinstance(event, wsproto.events.Request):
                    writer.write(ws.send(wsproto.events.AcceptConnection()))
                elif isinstance(event, wsproto.events.TextMessage):
                    self.seen.append(("message", event.data))
                    text = wsproto.events.TextMessage(f"echo {event.data}")
                    writer.write(ws.send(text))
                elif isinstance(event, wsproto.events.CloseConnection):
                    self.seen.append(("closed", event.code))
                    writer.write(ws.send(event.response()))
                    await writer.drain()
                    return
            await writer.drain()
            data = await reader.read(1 << 16)
            if not data:
                return
            ws.receive_data(data)

    async def _http2(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conn = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=False, header_encoding="latin-1")
        )
        conn.initiate_connection()
        writer.write(conn.data_to_send())
        heads: dict[int, dict[str, str]] = {}
        bodies: dict[int, bytes] = {}
        while data := await reader.read(1 << 16):
            for event in conn.receive_data(data):
                if isinstance(event, h2.events.RequestReceived):
                    heads[event.stream_id] = dict(event.headers)
                    bodies[event.stream_id] = b""
                    self.seen.append(("http2", dict(event.headers)))
                elif isinstance(event, h2.events.DataReceived):
                    bodies[event.stream_id] += event.data
                    conn.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    fields = heads.pop(event.stream_id)
                    self.seen.append(("body", bodies.pop(event.stream_id)))
                    text = f"{fields[':method']} {fields[':path']} by 2\n".encode()
                    bare = fields[":method"] == "HEAD"
                    conn.send_headers(event.stream_id, [(":status", "200")], end_stream=bare)
                    if not bare:
                        conn.send_data(event.stream_id, text, end_stream=True)
                elif isinstance(event, h2.events.StreamReset):
                    self.seen.append(("reset", int(event.error_code)))
            writer.write(conn.data_to_send())
            await writer.drain()


def _authorization(head: bytes) -> bytes:
    lines = head.split(b"\r\n")
    return next((x for x in lines if x.lower().startswith(b"authorization")), b"")


def _context(leaf: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(leaf)
    return context


class InspectingWorld(World):
    """`root` is the authority whose leaves a client sees inside."""

    peer_type = Origin
    peer: Origin
    engine: Path | None = None

    def __init__(self, lab: Any, directory: Path) -> None:
        for name, names, days in (
            ("expired", ("allowed.test",), -2),
            ("other", ("other.test",), 1),
            ("untrusted", ("allowed.test",), 1),
        ):
            place = directory / name
            place.mkdir()
            certificates(place, names, days=days)
        super().__init__(lab, directory)
        self.root = directory / "authority" / "root.pem"
        self.environment["CREDENTIALS_DIRECTORY"] = str(directory / "credentials")

    def prepare(self) -> None:
        self.write("/etc/agent-assembly/prices.toml", PRICES)
        self._install_engine()
        self.overlay("/var/lib")
        self.renew_authority()
        names = ("expired", "other")
        others = [(self.directory / name / "ca.pem").read_text() for name in names]
        self.trust(self.ca.read_text() + "".join(others))

    def _install_engine(self) -> None:
        self.overlay("/usr/lib")
        self.lab.run("mkdir", "-p", "/usr/lib/agent-assembly/inspect")
        self.lab.run(
            "mount", "--bind", str(self.engine or engine()), "/usr/lib/agent-assembly/inspect"
        )

    def give_credential(self, name: str, text: str) -> None:
        """What LoadCredential= of the unit does; `start` names the directory to the daemon."""
        credentials = self.directory / "credentials"
        credentials.mkdir(exist_ok=True)
        (credentials / name).write_text(text)

    def renew_authority(self, *more: str) -> None:
        """What aa-ca.service does: a root if there is none, and a new intermediate."""
        inspected = self.directory / "inspected"
        inspected.write_text("**\n0.0.0.0/0\n::/0\n")
        inspected.chmod(0o644)
        self.lab.run("mkdir", "-p", "/var/lib/agent-assembly")
        self.lab.run(
            "env",
            f"PYTHONPATH={REPOSITORY}",
            "/usr/bin/python3",
            "-m",
            "aa.ca",
            *(more or ("--init",)),
            "--ca-dir",
            "/var/lib/agent-assembly/ca",
            "--proxy-dir",
            "/var/lib/agent-assembly/proxy-ca",
            "--group",
            NOBODY,
            "--inspected",
            str(inspected),
        )
        self.root.parent.mkdir(exist_ok=True)
        self.root.write_text(self.lab.run("cat", "/var/lib/agent-assembly/ca/root.pem").stdout)

    def trust(self, pem: str) -> None:
        """The host's trust store."""
        self.lab.run("mkdir", "-p", "/etc/ssl/certs")
        file = "/etc/ssl/certs/ca-certificates.crt"
        self.lab.run("sh", "-c", f"cat >{file}", input=pem)

    def started_workers(self, count: int = 1) -> list[int]:
        """Waits until so many serve; returns their pids."""

        def inspection() -> dict[str, Any]:
            return dict(self.gateway.status.get("details", {}).get("inspection", {}))

        assert wait_for(lambda: inspection().get("workers", 0) >= count, 30), (
            f"{self.gateway.status}\n{self.log.read_text()}"
        )
        return list(inspection()["pids"])

    def curl(self, *arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
        """A client that trusts our authority and not the origins' own."""
        return super().curl("--cacert", str(self.root), *arguments, **how)

    def start_curl(self, *arguments: str) -> subprocess.Popen[str]:
        options = ["--silent", "--show-error", "--max-time", "20", "--cacert", str(self.root)]
        return self.lab.start_governed(RUN, "curl", *options, *arguments, stderr=subprocess.PIPE)

    def worker_port(self) -> int:
        """The loopback port of the one worker, from the kernel's table."""
        (pid,) = self.started_workers()
        mine = {os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir()}
        for line in Path(f"/proc/{pid}/net/tcp").read_text().split("\n")[1:]:
            words = line.split()
            if words and words[3] == "0A" and f"socket:[{words[9]}]" in mine:
                return int(words[1].partition(":")[2], 16)
        raise AssertionError("the worker does not listen")

    def as_user(self, uid: int, script: str, *arguments: str) -> str:
        """A program of the host's, outside every run."""
        user = ["setpriv", f"--reuid={uid}", "--clear-groups"]
        done = self.lab.run(*user, "/usr/bin/python3", "-c", script, *arguments)
        return str(done.stdout)

    def asked(self, kind: str = "http.request") -> list[dict[str, Any]]:
        return [
            a["action"]["attributes"] for a in self.gateway.asked if a["action"]["kind"] == kind
        ]

    def told(self, kind: str = "http.request", count: int = 1) -> list[dict[str, Any]]:
        """Waits for so many records of what became of requests."""

        def found() -> list[dict[str, Any]]:
            return [
                r for r in self.gateway.reports if r["type"] == "observed" and r["kind"] == kind
            ]

        wait_for(lambda: len(found()) >= count)
        return found()

    def refused(self, count: int = 1) -> list[dict[str, Any]]:
        return self.gateway.reported("refusal", count)
