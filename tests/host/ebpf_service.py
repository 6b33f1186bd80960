"""Runs the kernel layer's service for a test: the arguments say where its world is."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from aa.daemon import Daemon, serve
from aa.ebpf import service
from aa.ebpf.loader import Slices

LINGER_SECONDS = 1.0


async def _main(daemon: Daemon) -> None:
    pins, objects, gateway, root, agents, proxy = sys.argv[1:]
    settings = service.Settings(
        pins=Path(pins),
        objects=Path(objects),
        gateway=Path(gateway),
        slices=Slices(Path(root), agents, proxy),
        linger=LINGER_SECONDS,
    )
    await service.KernelLayer(settings, daemon).run()


if __name__ == "__main__":
    sys.exit(serve(_main))
