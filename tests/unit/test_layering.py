"""A module imports only from its own package, from packages of a layer below it, and from the base."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"policy", "audit", "ca", "redirect"}),
    frozenset({"gateway", "proxy", "ebpf", "launch"}),
    frozenset({"cli"}),
)
"""Packages of `aa`, lowest first. Everything else in `aa` is the base."""

MODULES = sorted((ROOT / "aa").rglob("*.py"))


def height(package: str) -> int:
    """0 for the base, then as in LAYERS."""
    return next((n for n, layer in enumerate(LAYERS, 1) if package in layer), 0)


def package_of(dotted: str) -> str:
    """`policy` for aa.policy.engine, the module's own name for a module of the base."""
    return dotted.split(".")[1] if "." in dotted else "aa"


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.module == "aa":
                found += [f"aa.{a.name}" for a in node.names]
            else:
                found.append(node.module or "")
    return [name for name in found if name.split(".")[0] == "aa"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_downwards(path: Path) -> None:
    own = path.relative_to(ROOT / "aa").parts[0].removesuffix(".py")
    for name in imports(path):
        other = package_of(name)
        if other != own:
            assert height(other) < height(own) or height(other) == height(own) == 0, (
                f"{path.relative_to(ROOT)} imports {name}"
            )


def test_the_rule_would_notice_a_sideways_import(tmp_path: Path) -> None:
    module = tmp_path / "m.py"
    module.write_text("from aa.proxy import front\nfrom aa import paths\nimport os\n")
    assert imports(module) == ["aa.proxy", "aa.paths"]
    assert height("proxy") == height("launch") > height("policy") > height("paths")
