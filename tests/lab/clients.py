"""Programs that talk HTTPS, each with its own way to find the authorities it trusts: rows of a matrix.

Every one asks the origin `API` for a path of its own, so that the origin's log tells who got through.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.lab.harness.names import API

PACKAGE = "lab-package"
"""What the origin's package indexes offer."""

URLLIB = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=10).status)"
STRICT = (
    "import ssl, sys, urllib.request as u; c = ssl.create_default_context(); "
    "c.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN; "
    "print(u.urlopen(sys.argv[1], timeout=10, context=c).status)"
)
"""What Python 3.13 asks for by itself."""
REQUESTS = "import requests, sys; print(requests.get(sys.argv[1], timeout=10).status_code)"
HTTPX = "import httpx, sys; print(httpx.get(sys.argv[1], timeout=10).status_code)"
AIOHTTP = """
import aiohttp, asyncio, sys
async def main():
    async with aiohttp.ClientSession() as session, session.get(sys.argv[1]) as answer:
        print(answer.status)
asyncio.run(main())
"""
FETCH = (
    "fetch(process.argv[1]).then(r => r.text()).then(console.log, "
    "e => { console.log(e.cause ?? e); process.exit(1) })"
)
JAVA = """
import java.net.URI;
import java.net.http.*;
public class Fetch {
    public static void main(String[] a) throws Exception {
        var request = HttpRequest.newBuilder(URI.create(a[0])).build();
        var answer = HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString());
        System.out.println(answer.statusCode());
    }
}
"""
FOLDER = "/usr/local/lib/lab/clients"
"""Where the programs that are files lie in the container."""

PYTHON = ["/usr/bin/python3", "-I", "-W", "ignore", "-c"]


@dataclass(frozen=True)
class Client:
    """`path` is what the origin must have been asked for; `command` gets its URL where it says URL."""

    name: str
    command: tuple[str, ...]
    path: str

    @property
    def argv(self) -> list[str]:
        return [f"https://{API}{self.path}" if word == "URL" else word for word in self.command]


def client(name: str, *command: str, path: str = "") -> Client:
    return Client(name, command, path or f"/trust/{name}")


QUICK = (
    client("curl", "curl", "--silent", "--show-error", "--fail", "--max-time", "10", "URL"),
    client("git", "git", "ls-remote", f"https://{API}/project.git",
           path="/project.git/info/refs?service=git-upload-pack"),
    client("openssl-strict", "sh", "-c",
           f"printf 'GET /trust/openssl-strict HTTP/1.0\\r\\nHost: {API}\\r\\n\\r\\n' | "
           f"openssl s_client -quiet -verify_return_error -x509_strict -verify_hostname {API} "
           f"-servername {API} -connect {API}:443"),
    client("python", *PYTHON, URLLIB, "URL"),
    client("python-strict", *PYTHON, STRICT, "URL"),
    client("debian-requests", *PYTHON, REQUESTS, "URL"),
    client("debian-httpx", *PYTHON, HTTPX, "URL"),
    client("debian-aiohttp", *PYTHON, AIOHTTP, "URL"),
    client("debian-pip", "/usr/bin/python3", "-I", "-m", "pip", "download", "--quiet",
           "--no-cache-dir", "--no-deps", "--disable-pip-version-check",
           "--index-url", f"https://{API}/simple", PACKAGE, path=f"/simple/{PACKAGE}/"),
    client("node-fetch", "node", "-e", FETCH, "URL"),
    client("java", "java", "-Xmx128m", f"{FOLDER}/Fetch.java", "URL"),
)  # fmt: skip
"""Debian's own programs, and what is installed for the tests anyway."""
