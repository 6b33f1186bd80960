"""Disks of guests: a Debian of a suite with the kernel of that suite, made by debootstrap and kept in a cache.

As root: `/usr/bin/python3 -m tests.lab.qemu.image [SUITE...]` makes what is missing and prints where it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.lab.harness import LabError
from tests.lab.harness.container import REPOSITORY

HERE = Path(__file__).resolve().parent
CACHE = Path("/var/cache/agent-assembly-lab")
CONTROL = REPOSITORY / "packaging" / "deb" / "control"

ENGINES = {"bookworm": "deb12", "trixie": "deb13"}
"""Which inspection engine is for a suite."""
SUITES = tuple(ENGINES)

BUILD_TIMEOUT = 1800.0  # seconds for debootstrap and apt together
TOOL_TIMEOUT = 300.0  # seconds for one local program
DISK_SIZE = "3G"  # sparse; what a guest may have written at its end, with what it starts with

# Makes the tree a machine whose systemd can be asked and whose network can be built.
MACHINE = (
    "systemd", "systemd-sysv", "libpam-systemd", "dbus", "udev", "kmod", "iproute2", "procps", "util-linux",
    "ca-certificates", "libnss-systemd",
)  # fmt: skip
# Programs that cases run as agents, and what the cases themselves are run with.
PROGRAMS = (
    "curl", "git", "nodejs", "openssl", "netcat-openbsd", "socat", "iputils-ping", "strace", "bpftool", "psmisc",
    "python3-pytest", "python3-pytest-timeout", "python3-cryptography", "python3-wsproto", "tcpdump",
)  # fmt: skip
# What the root file system cannot be reached without, besides what the kernel has built in.
BOOT_MODULES = ("virtio_pci", "virtio_blk", "ext4", "crc32c_generic")

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/root",
    "DEBIAN_FRONTEND": "noninteractive",
}
PASSED_ON = ("http_proxy", "https_proxy", "no_proxy")

XZ_MAGIC, ZSTD_MAGIC = b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"
ELF_MAGIC = b"\x7fELF"


@dataclass(frozen=True)
class Image:
    """What QEMU needs to boot one suite. All of it is only ever read."""

    suite: str
    directory: Path

    @property
    def disk(self) -> Path:
        return self.directory / "disk.raw"

    @property
    def kernel(self) -> Path:
        return self.directory / "kernel"

    @property
    def initramfs(self) -> Path:
        return self.directory / "initramfs.cpio"

    @property
    def release(self) -> str:
        """The kernel's release, as `uname -r` will say it."""
        return (self.directory / "release").read_text().strip()


@dataclass(frozen=True)
class Mirror:
    """Where this machine's apt gets Debian from."""

    main: str
    security: str


def image(suite: str) -> Image:
    """The image of a suite, from the cache or made now. Needs root; raises `LabError` with the builder's last words."""
    if suite not in SUITES:
        raise LabError(f"no such suite: {suite}; there are {', '.join(SUITES)}")
    found = Image(suite, CACHE / f"{suite}-{_key(suite)}")
    with _alone():
        if not found.directory.exists():
            _build(found)
            _forget_others(found)
    return found


def packages() -> list[str]:
    """What is installed in an image: the machine, the programs of the cases, and what our package depends on."""
    return sorted({*MACHINE, *PROGRAMS, *dependencies(CONTROL.read_text())})


def dependencies(control: str) -> list[str]:
    """The package names in the Depends of every binary package of a source's control file, ours left out."""
    ours = set(re.findall(r"^Package: (\S+)$", control, re.MULTILINE))
    fields = re.findall(r"^Depends:(.*(?:\n[ \t].*)*)", control, re.MULTILINE)
    clauses = [clause.strip() for field in fields for clause in field.split(",")]
    names = [re.split(r"[\s(|:]", clause, maxsplit=1)[0] for clause in clauses if clause]
    return [name for name in names if name not in ours and not name.startswith("$")]


def mirror() -> Mirror:
    """Read from apt's own settings, so that no address of a registry is in this tree."""
    shown = _output(
        [
            "apt-get",
            "indextargets",
            "--format",
            "$(LABEL)\t$(RELEASE)\t$(REPO_URI)",
            "Created-By: Packages",
        ]
    )
    rows = [line.split("\t") for line in shown.splitlines()]
    main = next(
        (uri for label, release, uri in rows if label == "Debian" and "-" not in release), None
    )
    security = next((uri for label, _, uri in rows if label == "Debian-Security"), None)
    if main is None or security is None:
        raise LabError(
            "apt knows no Debian mirror with its security suite: see /etc/apt and run `apt-get update`"
        )
    return Mirror(main, security)


def _key(suite: str) -> str:
    """Changes with everything that an image is made from, the state of the mirror excepted."""
    recipe = b"".join(
        (HERE / name).read_bytes()
        for name in ("image.py", "build-tree.sh", "settle-tree.sh", "initramfs-init.sh")
    )
    return hashlib.sha256(f"{suite} {' '.join(packages())}\n".encode() + recipe).hexdigest()[:16]


@contextmanager
def _alone() -> Iterator[None]:
    """One builder at a time; the lock goes with the process."""
    CACHE.mkdir(mode=0o755, parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in CACHE.glob(".making-*"):
            shutil.rmtree(left)
        yield


def _forget_others(kept: Image) -> None:
    for other in CACHE.glob(f"{kept.suite}-*"):
        if other != kept.directory:
            shutil.rmtree(other)


def _build(made: Image) -> None:
    """Makes everything in a folder beside the final one, which appears by rename when it is whole."""
    work = Path(tempfile.mkdtemp(prefix=".making-", dir=CACHE))
    work.chmod(0o755)
    try:
        _debootstrap(work, made.suite)
        release = (work / "release").read_text().strip()
        ready = Image(made.suite, work / "ready")
        ready.directory.mkdir()
        _write_kernel(next((work / "kernel" / "boot").glob("vmlinuz-*")), ready.kernel)
        _write_initramfs(work / "tree" / "usr" / "lib" / "modules" / release, work, ready.initramfs)
        _output(
            [
                "mke2fs",
                "-q",
                "-t",
                "ext4",
                "-O",
                "^has_journal",
                "-m",
                "0",
                "-d",
                work / "tree",
                ready.disk,
                DISK_SIZE,
            ]
        )
        shutil.copy(work / "release", ready.directory)
        ready.directory.rename(made.directory)
    finally:
        shutil.rmtree(work)


def _debootstrap(work: Path, suite: str) -> None:
    settings = _output(["apt-config", "dump", "Acquire"]).splitlines()
    (work / "apt.conf").write_text("".join(f"{s}\n" for s in settings if "IndexTargets" not in s))
    source = mirror()
    command: list[str | Path] = [
        "setpriv", "--pdeathsig", "KILL",
        "unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child",
        "/bin/sh", HERE / "build-tree.sh", work, suite, source.main, source.security, *packages(),
    ]  # fmt: skip
    log = work / "log"
    with log.open("wb") as out:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT | {k: os.environ[k] for k in PASSED_ON if k in os.environ},
            cwd="/",
            timeout=BUILD_TIMEOUT,
            check=False,
        )
    if done.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
        raise LabError(f"no image of {suite}: exit {done.returncode}\n{tail}")


def _write_kernel(compressed: Path, target: Path) -> None:
    """The ELF kernel out of a bzImage: decompressing it here takes less than the guest would take for it."""
    data = compressed.read_bytes()
    setup_sectors = data[0x1F1] or 4
    offset, length = (int.from_bytes(data[at : at + 4], "little") for at in (0x248, 0x24C))
    start = (setup_sectors + 1) * 512 + offset
    payload = data[start : start + length]
    if payload.startswith(XZ_MAGIC):
        kernel = lzma.LZMADecompressor().decompress(payload)
    elif payload.startswith(ZSTD_MAGIC):
        # What follows the frame is the size of its content, which zstd takes for rubbish.
        done = subprocess.run(
            ["zstd", "--decompress", "--stdout", "--quiet"],
            input=payload,
            capture_output=True,
            timeout=TOOL_TIMEOUT,
            check=False,
        )
        kernel = done.stdout
    else:
        kernel = b""
    target.write_bytes(kernel if kernel.startswith(ELF_MAGIC) else data)


def _write_initramfs(modules: Path, work: Path, target: Path) -> None:
    """A static busybox, our first program, and the modules of the disk in the order in which they load."""
    root = work / "initramfs"
    (root / "bin").mkdir(parents=True)
    (root / "modules").mkdir()
    shutil.copy("/bin/busybox", root / "bin" / "busybox")
    shutil.copy(HERE / "initramfs-init.sh", root / "init")
    (root / "init").chmod(stat.S_IRWXU)
    order = load_order(_module_table((modules / "modules.dep").read_text()), BOOT_MODULES)
    for path in order:
        (root / "modules" / _module_file(path)).write_bytes(_plain_module(modules / path))
    (root / "modules" / "order").write_text("".join(f"{_module_file(path)}\n" for path in order))
    with target.open("wb") as archive:
        names = "".join(f"{path.relative_to(root)}\n" for path in sorted(root.rglob("*")))
        subprocess.run(
            ["cpio", "--create", "--format=newc", "--quiet"],
            input=names.encode(),
            stdout=archive,
            cwd=root,
            timeout=TOOL_TIMEOUT,
            check=True,
        )


def _module_table(modules_dep: str) -> dict[str, list[str]]:
    """Path of a module to the paths that must be loaded before it, the nearest first (as depmod writes them)."""
    rows = (line.split(":", 1) for line in modules_dep.splitlines())
    return {path: needed.split() for path, needed in rows}


def load_order(table: Mapping[str, Sequence[str]], wanted: Sequence[str]) -> list[str]:
    """Paths of the wanted modules and of what they need, in an order that loads; built-in ones are left out."""
    order: dict[str, None] = {}
    for name in wanted:
        path = next((p for p in table if _module_file(p) == f"{name}.ko"), None)
        if path is not None:
            order.update(dict.fromkeys([*reversed(table[path]), path]))
    return list(order)


def _module_file(path: str) -> str:
    return Path(path).name.removesuffix(".xz").removesuffix(".zst").replace("-", "_")


def _plain_module(path: Path) -> bytes:
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def _output(argv: Sequence[str | Path]) -> str:
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=TOOL_TIMEOUT, env=ENVIRONMENT, check=False
    )
    if done.returncode != 0:
        raise LabError(f"{' '.join(map(str, argv))}: exit {done.returncode}\n{done.stderr.strip()}")
    return done.stdout


def main() -> None:
    for suite in sys.argv[1:] or SUITES:
        made = image(suite)
        print(f"{suite}\t{made.release}\t{made.directory}")


if __name__ == "__main__":
    try:
        main()
    except LabError as problem:
        sys.exit(f"lab: {problem}")
