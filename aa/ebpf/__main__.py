"""`python3 -m aa.ebpf`: the kernel layer's service. With --unload: takes everything out of the kernel."""

from __future__ import annotations

import argparse
import os
import sys

from aa.daemon import Daemon, serve
from aa.ebpf.loader import PIN_DIR, NoPinDirectory, unload
from aa.ebpf.service import KernelLayer, settings_from


async def _main(daemon: Daemon) -> None:
    await KernelLayer(settings_from(os.environ), daemon).run()


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
