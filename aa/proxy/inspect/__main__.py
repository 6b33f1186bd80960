"""A worker's program: `python3 -I __main__.py ENGINE DESCRIPTOR SETTINGS`, started by `pool` alone.

ENGINE is the folder with mitmproxy and all it needs. It goes first, so that one version of each
library serves everything in this process.
"""

from __future__ import annotations

import sys
from pathlib import Path


def _find_modules(engine: str) -> None:
    sys.path.insert(0, engine)
    ours = str(Path(__file__).resolve().parents[3])
    if ours not in sys.path:
        sys.path.append(ours)


if __name__ == "__main__":
    _find_modules(sys.argv[1])
    from aa.proxy.inspect.worker import main

    sys.exit(main(int(sys.argv[2]), sys.argv[3]))
