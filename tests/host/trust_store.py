"""A copy of this machine whose trust store may be changed: an overlay that is a namespace's whole root.

Nothing in it leads back to the machine's own files: the old root is unmounted after `pivot_root`.
"""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
PYTHON = "/usr/bin/python3"
COMMAND_SECONDS = 170.0
FEW = 12
"""Authorities that are left in the copy's store: the update takes its time for each."""


class Machine:
    """One private copy. Everything in it vanishes with the process that holds it."""

    def __init__(self, *, java: bool = True) -> None:
        self._java = java
        self._holder: subprocess.Popen[str] | None = None

    def __enter__(self) -> Machine:
        hide_java = "" if self._java else "rm -r etc/ssl/certs/java etc/ca-certificates/update.d/*"
        script = f"""\
            set -e
            mount --make-rprivate /
            mount -t tmpfs -o size=512m none /mnt
            mkdir /mnt/upper /mnt/work /mnt/root
            mount -t overlay none -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/root
            cd /mnt/root
            rm -rf usr/lib/python3/dist-packages/aa usr/local/share/ca-certificates/*
            # start-up hooks of this machine's own, which may write to the trust store
            rm -f usr/lib/python3/dist-packages/_*.pth usr/local/lib/python3*/dist-packages/*.pth
            cp -r {REPOSITORY}/aa usr/lib/python3/dist-packages/aa
            mount --rbind /proc proc
            mount -t tmpfs none dev
            for node in null zero urandom random tty; do touch dev/$node; mount --bind /dev/$node dev/$node; done
            mount -t tmpfs none run
            mount -t tmpfs -o mode=1777 none tmp
            mkdir -p run/agent-assembly var/lib/agent-assembly run/old
            {hide_java}
            pivot_root . run/old
            umount -l /run/old
            cd /
            mount -t tmpfs none /work
            test -z "$(ls /run/old)"
            # a store as its own tool makes it, whatever this machine did to its
            grep '^mozilla' /etc/ca-certificates.conf >/tmp/all
            head -n {FEW} /tmp/all >/etc/ca-certificates.conf
            rm /tmp/all
            /usr/sbin/update-ca-certificates --fresh >/dev/null 2>&1
            groupadd --system --force aa-proxy
            echo ready
            exec sleep 1000000
            """
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--net", "--ipc", "--uts", "setpriv", "--pdeathsig", "KILL", "sh", "-c",
             textwrap.dedent(script)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        if self._holder is not None:
            self._holder.kill()
            self._holder.wait(20)

    def run(
        self, *command: str | Path, code: int | None = 0, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs inside, as root. Asserts the exit code unless it is None."""
        assert self._holder is not None
        done = subprocess.run(
            ["nsenter", f"--target={self._holder.pid}", "--mount", "--net", "--ipc", "--uts", "--wdns=/",
             "--", *map(str, command)],
            capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False,
            stdin=subprocess.DEVNULL,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", **(env or {})},
        )  # fmt: skip
        assert code is None or done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done

    def authority(self, *arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
        return self.run(PYTHON, "-I", "-m", "aa.ca", *arguments, **how)

    def aasm(self, *arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
        """The commands of `aa.cli.ca`, whichever group they hang in."""
        code = (
            "import sys, click; from aa.cli.ca import ca, install_ca, uninstall_ca; from aa.cli import main; "
            "ca.add_command(install_ca); ca.add_command(uninstall_ca); main.COMMANDS = "
            "{'ca': ('aa.cli.ca:ca', '')}; main.main()"
        )
        return self.run(PYTHON, "-I", "-c", code, "ca", *arguments, **how)

    def shown(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.aasm("show", "--json", code=None).stdout)
        return told

    def store(self) -> dict[str, str]:
        """Every name of the store, with the content of files and the target of links, without Java's."""
        script = (
            "import os, hashlib, json\n"
            "found = {}\n"
            "for base in ('/etc/ssl', '/usr/local/share', '/etc/ca-certificates', '/usr/share/ca-certificates'):\n"
            "    for d, ds, fs in os.walk(base):\n"
            "        for n in ds + fs:\n"
            "            p = os.path.join(d, n)\n"
            "            s = os.lstat(p)\n"
            "            what = os.readlink(p) if os.path.islink(p) else 'directory' if os.path.isdir(p) "
            "else hashlib.sha256(open(p, 'rb').read()).hexdigest()\n"
            "            found[p] = f'{s.st_mode:o} {s.st_uid} {s.st_gid} {what}'\n"
            "found.pop('/etc/ssl/certs/java/cacerts', None)\n"
            "print(json.dumps(found))\n"
        )
        told: dict[str, str] = json.loads(self.run(PYTHON, "-I", "-c", script).stdout)
        return told

    def java_aliases(self) -> set[str]:
        """As Java's own tool tells them."""
        told = self.run(
            "keytool",
            "-list",
            "-rfc",
            "-keystore",
            "/etc/ssl/certs/java/cacerts",
            "-storepass",
            "changeit",
        ).stdout
        return {
            line.split(":", 1)[1].strip()
            for line in told.splitlines()
            if line.startswith("Alias name:")
        }


def own_files() -> dict[str, int]:
    """This machine's own store and the tools for it, with times of change: no test may touch them."""
    found = {
        entry.path: os.lstat(entry.path).st_ctime_ns
        for directory in (
            "/etc/ssl/certs",
            "/usr/local/share/ca-certificates",
            "/etc/ssl/certs/java",
        )
        if os.path.isdir(directory)
        for entry in os.scandir(directory)
    }
    for file in ("/usr/sbin/update-ca-certificates", "/etc/ca-certificates.conf", "/etc/group"):
        found[file] = os.lstat(file).st_ctime_ns
    return found
