"""`python3 -m aa.ebpf`: the kernel layer's service. With --unload: takes everything out of the kernel."""

from __future__ import annotations

import argparse
import sys

from aa import config as configuration
from aa.daemon import CannotStart, Daemon, serve
from aa.ebpf.loader import PIN_DIR, NoPinDirectory, unload
from aa.ebpf.service import KernelLayer, settings_from
from aa.tomlfile import InvalidFile


async def _main(daemon: Daemon) -> None:
    try:
        config = configuration.load()
    except InvalidFile as e:
        hint = "mend it and `systemctl restart aa-ebpf`; what is pinned stays in force"
        raise CannotStart(str(e.problems[0]), hint=hint) from e
    await KernelLayer(settings_from(config), daemon).run()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m aa.ebpf", description=__doc__)
    parser.add_argument(
        "--unload",
        action="store_true",
        help="remove every pinned program and map: nothing is guarded or seen any more",
    )
    if not parser.parse_args().unload:
        return serve(_main)
    try:
        gone = unload()
    except NoPinDirectory as e:
        print(f"nothing to unload: {e}", file=sys.stderr)
        return 0
    print(f"removed {len(gone)} pins from {PIN_DIR}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
