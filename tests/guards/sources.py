"""The source files of the package and what they import, read without importing them."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "regard"


@dataclass(frozen=True)
class Import:
    """`module` is the absolute name of the module that is imported, or imported from."""

    path: Path
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.module}"


def files(package: Path = PACKAGE) -> list[Path]:
    """All Python files."""
    return sorted(package.rglob("*.py"))


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """`regard.ops.linear` for `.../regard/ops/linear/__init__.py`."""
    parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, package: Path = PACKAGE) -> list[Import]:
    """Every import of a file, those inside functions and type-checking blocks too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [Import(path, node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, path, package)
            # A name may be a module of its own: `from regard import ops`.
            targets = {_module_or_home(f"{base}.{alias.name}", package) for alias in node.names}
            found += [Import(path, node.lineno, target) for target in sorted(targets)]
    return found


def _absolute(node: ast.ImportFrom, path: Path, package: Path) -> str:
    if not node.level:
        return node.module or ""
    own = module_name(path, package).split(".")
    up = node.level - (path.name == "__init__.py")
    return ".".join([*own[: len(own) - up], *([node.module] if node.module else [])])


def _module_or_home(dotted: str, package: Path) -> str:
    home, _, _ = dotted.rpartition(".")
    parts = dotted.split(".")
    if parts[0] != package.name:
        return home
    place = package.joinpath(*parts[1:])
    is_module = place.is_dir() or place.with_suffix(".py").is_file()
    return dotted if is_module else home
