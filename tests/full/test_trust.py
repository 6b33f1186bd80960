"""The matrix of tests/lab/test_trust.py, with what takes long to get: PyPI's libraries and its Rust program uv, npm, Go."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.lab.clients import AIOHTTP, FOLDER, HTTPX, PACKAGE, REQUESTS, Client, client
from tests.lab.harness import Container
from tests.lab.harness.container import REPOSITORY
from tests.lab.harness.names import API
from tests.lab.trusting import ask, prepare

BUILT = REPOSITORY / "build/clients"
"""Where `make lab-full` puts them."""
PYPI = ["/usr/bin/python3", "-I", "-S", "-W", "ignore", "-c"]
FROM_PYPI = f"import sys; sys.path.insert(0, '{FOLDER}/pypi')\n"
PIP = "import runpy, sys; sys.argv[0] = 'pip'; runpy.run_module('pip', run_name='__main__')"

SLOW = (
    client("requests", *PYPI, FROM_PYPI + REQUESTS, "URL"),
    client("httpx", *PYPI, FROM_PYPI + HTTPX, "URL"),
    client("aiohttp", *PYPI, FROM_PYPI + AIOHTTP, "URL"),
    client("pip", *PYPI, FROM_PYPI + PIP, "download", "--quiet", "--no-cache-dir", "--no-deps",
           "--disable-pip-version-check", "--index-url", f"https://{API}/simple", PACKAGE,
           path=f"/simple/{PACKAGE}/"),
    client("npm", "npm", "view", PACKAGE, "version", "--registry", f"https://{API}/npm/",
           "--cache", "npm-cache", "--no-update-notifier", path=f"/npm/{PACKAGE}"),
    client("go", f"{FOLDER}/go", "URL"),
    client("uv", "sh", "-c", f"echo {PACKAGE} | {FOLDER}/pypi/bin/uv pip compile --quiet --no-cache "
           f"--no-config --python /usr/bin/python3 --index-url https://{API}/simple -",
           path=f"/simple/{PACKAGE}/"),
)  # fmt: skip


@pytest.fixture(scope="module")
def box() -> Iterator[Container]:
    with Container() as container:
        prepare(container)
        packed = subprocess.run(
            ["tar", "-C", BUILT, "-c", "go", "pypi"],
            check=True,
            capture_output=True,
            timeout=60,
        ).stdout
        container.raw(["tar", "-C", FOLDER, "--no-same-owner", "-x"], input=packed).check()
        yield container


@pytest.mark.parametrize("client", SLOW, ids=lambda c: c.name)
def test_a_program_in_a_run_accepts_an_inspected_host(box: Container, client: Client) -> None:
    done, asked = ask(box, client)
    assert done.ok and asked, done.out + done.err


def test_without_the_root_none_of_them_does(box: Container) -> None:
    box.run(["aasm", "proxy", "uninstall-ca"], timeout=120).check()
    assert [client.name for client in SLOW if ask(box, client)[1]] == []
