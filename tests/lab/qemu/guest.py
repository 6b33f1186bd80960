"""Boots a guest, has it run one program, and brings back what the program left behind.

From a shell, as root: `/usr/bin/python3 -m tests.lab.qemu.guest SUITE PROGRAM [FILE...]`; the files
lie beside the program in the guest, and what it writes to `out/` is unpacked into a folder that is named.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.lab.harness import LabError
from tests.lab.qemu.image import CACHE, ENVIRONMENT, Image, image

MEMORY = "2048"  # MiB
CORES = "2"
CPU = "max,la57=off"  # a fifth level of page tables costs emulation a good deal
GUEST_TIMEOUT = (
    2700.0  # seconds from power-on to power-off; emulation is ten times slower than the machine
)
OUTPUT_SIZE = 256 * 1024 * 1024  # bytes, sparse; the most that a guest may leave behind
NICENESS = "5"  # emulation keeps both cores busy; whoever works on the machine goes first
CONSOLE_LINES = 60  # shown when a guest fails

# One guest at a time on this machine, whoever starts it.
LOCK = CACHE / "guest.lock"


@dataclass(frozen=True)
class Report:
    """What came back from one guest."""

    code: int
    """The program's exit code."""
    out: Path
    """The folder with what it left, `journal.txt` of the guest's own among it."""
    console: str
    seconds: float

    def tail(self, lines: int = CONSOLE_LINES) -> str:
        return "\n".join(self.console.splitlines()[-lines:])


def boot(
    machine: Image,
    program: str,
    files: Mapping[str, Path | bytes],
    out: Path,
    *,
    timeout: float = GUEST_TIMEOUT,
    follow: bool = False,
) -> Report:
    """Boots a guest that runs `program` (a script with its `#!` line) as root in the folder of `files`.

    The image stays as it is: writes go to a temporary overlay. The guest has no network card at all.
    Raises `LabError` with the console's end if the guest is not done in time or leaves no result;
    `follow` prints the console as it comes.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="aa-lab-guest-") as folder:
        work = Path(folder)
        _pack(work / "input.tar", {"run": program.encode(), **files})
        with (work / "output.tar").open("wb") as disk:
            disk.truncate(OUTPUT_SIZE)
        console = work / "console.log"
        with _alone():
            started = time.monotonic()
            finished = _emulate(machine, work, console, timeout, follow)
            seconds = time.monotonic() - started
        said = console.read_text(errors="replace")
        (out / "console.log").write_text(said)
        report = Report(0, out, said, seconds)
        if not finished:
            raise LabError(
                f"{machine.suite}: the guest was not done after {timeout:.0f} s:\n{report.tail()}"
            )
        try:
            _unpack(work / "output.tar", out)
            code = int((out / "exit").read_text())
        except (tarfile.TarError, OSError, ValueError) as problem:
            raise LabError(
                f"{machine.suite}: the guest left no result ({problem}):\n{report.tail()}"
            ) from None
        return Report(code, out, said, seconds)


def _pack(target: Path, files: Mapping[str, Path | bytes]) -> None:
    """A tar archive padded to whole sectors, as a disk has no others; folders come with all that is in them."""
    with tarfile.open(target, "w") as archive:
        for name, content in files.items():
            if isinstance(content, Path):
                archive.add(content, arcname=name, filter=_without_caches)
            else:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def _without_caches(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if entry.name.endswith("__pycache__") else entry


def _unpack(source: Path, out: Path) -> None:
    """The plain files of an archive, and of those only what stays below the folder."""
    with tarfile.open(source) as archive:
        for entry in archive:
            target = Path(out, entry.name)
            if entry.isfile() and ".." not in target.parts and target.is_relative_to(out):
                content = archive.extractfile(entry)
                assert content is not None  # a plain file has some
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())


def _emulate(machine: Image, work: Path, console: Path, timeout: float, follow: bool) -> bool:
    """Runs QEMU until it ends by itself; False if it had to be killed at the deadline."""
    disks = [
        ("root", machine.disk, "snapshot=on"),
        ("input", work / "input.tar", "readonly=on"),
        ("output", work / "output.tar", "cache=unsafe"),
    ]
    options = []
    for name, path, how in disks:
        options += ["-drive", f"if=none,id={name},file={path},format=raw,{how}"]
        options += ["-device", f"virtio-blk-pci,drive={name},serial=lab-{name}"]
    command = [
        "setpriv", "--pdeathsig", "KILL", "nice", "-n", NICENESS,
        "qemu-system-x86_64", "-machine", "pc,accel=tcg", "-cpu", CPU, "-m", MEMORY, "-smp", CORES,
        "-nodefaults", "-display", "none", "-no-reboot", "-nic", "none", "-serial", f"file:{console}",
        "-kernel", str(machine.kernel), "-initrd", str(machine.initramfs),
        "-append", "console=ttyS0 root=/dev/vda rw quiet panic=-1 systemd.show_status=1 systemd.log_color=0",
        *options,
    ]  # fmt: skip
    console.touch()
    emulator = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=ENVIRONMENT | {"TMPDIR": str(work)}, cwd=work, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + timeout
    shown = 0
    try:
        while emulator.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
            if follow:
                shown = _show(console, shown)
        finished = emulator.poll() is not None
    finally:
        if emulator.poll() is None:
            emulator.kill()
        said, _ = emulator.communicate()
    if follow:
        _show(console, shown)
    if emulator.returncode > 0:
        raise LabError(f"qemu: exit {emulator.returncode}\n{said.decode(errors='replace').strip()}")
    return finished


def _show(console: Path, shown: int) -> int:
    with console.open("rb") as log:
        log.seek(shown)
        sys.stdout.buffer.write(log.read())
        sys.stdout.flush()
        return log.tell()


@contextmanager
def _alone() -> Iterator[None]:
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.lab.qemu.guest", description=__doc__)
    parser.add_argument("suite")
    parser.add_argument("program", type=Path)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--timeout", type=float, default=GUEST_TIMEOUT)
    chosen = parser.parse_args()
    out = Path(tempfile.mkdtemp(prefix=f"aa-lab-{chosen.suite}-"))
    report = boot(
        image(chosen.suite),
        chosen.program.read_text(),
        {path.name: path for path in chosen.files},
        out,
        timeout=chosen.timeout,
        follow=True,
    )
    print(f"exit {report.code} after {report.seconds:.0f} s; left behind: {out}")
    return report.code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LabError as problem:
        sys.exit(f"lab: {problem}")
