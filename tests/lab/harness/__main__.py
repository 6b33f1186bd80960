"""A lab from a shell, as root, from the top of the source tree.

/usr/bin/python3 -m tests.lab.harness up NAME            boots and stays; nothing of ours is installed
/usr/bin/python3 -m tests.lab.harness install NAME       the newest dist/*.deb into it
/usr/bin/python3 -m tests.lab.harness sync NAME          aa/ and units/ of this tree over an installed deb
/usr/bin/python3 -m tests.lab.harness run NAME [--user dev] -- CMD...
/usr/bin/python3 -m tests.lab.harness shell NAME [--user dev]
/usr/bin/python3 -m tests.lab.harness seen NAME          what the origins saw
/usr/bin/python3 -m tests.lab.harness down NAME
/usr/bin/python3 -m tests.lab.harness list | sweep
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tests.lab.harness.container import REPOSITORY, STATE, Container, LabError, destroy, sweep

DIST = REPOSITORY / "dist"
ENGINE = "agent-assembly-inspect"
HERE = "deb12"
"""The Debian release whose userland the labs run."""


def newest_debs(*, engine: str = "") -> list[Path]:
    """The packages of the newest build in dist/, one file for each package name.

    `engine` names a Debian release: the inspection engine for it goes along.
    """
    newest: dict[str, Path] = {}
    for path in sorted(DIST.glob("*.deb"), key=lambda p: p.stat().st_mtime):
        name, version = path.name.split("_")[:2]
        if name != ENGINE or (engine and version.endswith(f"~{engine}")):
            newest[name] = path
    if not newest or (engine and ENGINE not in newest):
        raise LabError(f"not all packages are in {DIST}: run `make deb`")
    return [newest[name] for name in sorted(newest)]


def sync(box: Container) -> None:
    """Copies this tree's Python package and units over what the deb installed, and reloads systemd."""
    for source, target in (("aa", "/usr/lib/python3/dist-packages"), ("units", "/var/cache/lab")):
        packed = subprocess.run(
            ["tar", "-C", REPOSITORY, "--exclude=__pycache__", "-c", source],
            check=True,
            capture_output=True,
            timeout=60,
        ).stdout
        box.raw(["tar", "-C", target, "--no-same-owner", "-x"], input=packed).check()
    copy = "cp /var/cache/lab/units/*.service /var/cache/lab/units/*.socket /lib/systemd/system/; "
    copy += "cp /var/cache/lab/units/*.slice /var/cache/lab/units/*.target /var/cache/lab/units/*.mount /lib/systemd/system/"
    box.raw(["sh", "-c", f"({copy}) 2> /dev/null; systemctl daemon-reload"]).check()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tests.lab.harness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "verb", choices=["up", "install", "sync", "run", "shell", "seen", "down", "list", "sweep"]
    )
    parser.add_argument("name", nargs="?", default="shell")
    parser.add_argument("--user", default="root")
    arguments, command = parser.parse_known_args()
    box = Container(arguments.name, keep=True)
    match arguments.verb:
        case "up":
            box.up()
            print(f"{box.name} is up; its pid 1 is {box.leader}")
        case "install":
            print(box.attach().install_deb(*newest_debs()).out)
        case "sync":
            sync(box.attach())
        case "run":
            done = box.attach().run(
                [c for c in command if c != "--"], user=arguments.user, timeout=600
            )
            sys.stdout.write(done.out)
            sys.stderr.write(done.err)
            return done.code
        case "shell":
            return box.attach().shell(arguments.user)
        case "seen":
            sys.stdout.write(box.origins.log.read_text())
        case "down":
            try:
                box.attach()
            except LabError:
                destroy(box.name)
            else:
                box.down()
        case "list":
            print("\n".join(p.name for p in sorted(STATE.glob("aa-lab-*"))))
        case "sweep":
            print("\n".join(sweep()))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LabError as problem:
        sys.exit(f"lab: {problem}")
