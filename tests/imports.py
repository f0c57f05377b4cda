"""Which files of this project a module imports, itself and by what it imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("ffn2moe", "tasks", "flows")


# They say what params.yaml can hold and whether a run can be done. That decides whether a stage runs, not what it
# writes.
CHECKS = ("tasks.choices", "tasks.check", "tasks.section", "tasks.decompose_params", "tasks.target")


def closure(module: str) -> set[str]:
    """Return the paths (as in dvc.yaml) of a module and of every project module that it imports at run time.

    `CHECKS` and what only they import are left out.
    """
    found: dict[str, str] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        path = _path(name)
        if name in found or path is None or name in CHECKS:
            continue
        found[name] = path.relative_to(PROJECT).as_posix()
        todo += [name.rpartition(".")[0], *names(ast.parse(path.read_text(encoding="utf-8")))]
    return set(found.values())


def _path(module: str) -> Path | None:
    if module.split(".")[0] not in PACKAGES:
        return None
    base = PROJECT / Path(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def names(tree: ast.AST) -> Iterator[str]:
    """Yield the absolute names that a file imports, except under `if TYPE_CHECKING`, which never runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, "imports are absolute here"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from names(node)
