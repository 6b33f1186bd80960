"""A worker with one hook that raises: its name is in the settings. Started by `Pool` in a test."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    sys.path.insert(0, sys.argv[1])
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    import json

    from aa.proxy.inspect import hooks, worker

    fault = json.loads(sys.argv[3])["fault"]
    proper = hooks.Hooks.table

    def table(self: hooks.Hooks) -> dict[str, hooks.Hook]:
        def raising(conn: object, data: object) -> None:
            raise RuntimeError("a fault in a hook")

        return {**proper(self), fault: raising} if fault else proper(self)

    hooks.Hooks.table = table  # type: ignore[method-assign]
    return worker.main(int(sys.argv[2]), sys.argv[3])


if __name__ == "__main__":
    sys.exit(main())
