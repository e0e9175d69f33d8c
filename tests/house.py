"""docs/house.md: every file of the house with one phrase, out of the files themselves.

python tests/house.py > docs/house.md
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
_SKIPPED = ("__pycache__", "egg-info", ".ruff_cache", ".mypy_cache", ".pytest_cache")
_FOLDERS = ("warmerge", "tests", "examples", "benchmarks", "docs")


def phrase(path: Path) -> str:
    """The first line that says what a file is: a docstring's, a script's comment, a page's headline.

    >>> phrase(Path(__file__))
    'docs/house.md: every file of the house with one phrase, out of the files themselves.'
    """
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    if path.suffix == ".sh":
        return path.read_text(encoding="utf-8").splitlines()[1].lstrip("# ")
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
    return ""


def page() -> str:
    """The page, ended by a newline."""
    return "\n".join(["# The house, file by file", "", *_lines()]) + "\n"


def _lines() -> Iterator[str]:
    for folder in _FOLDERS:
        yield from _tree(ROOT / folder, 0)


def _tree(folder: Path, depth: int) -> Iterator[str]:
    inside = folder / "__init__.py"
    about = phrase(inside) if inside.exists() else ""
    yield "  " * depth + f"- **{folder.name}/** {about}".rstrip()
    entries = sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name))
    for entry in entries:
        if any(part in entry.name for part in _SKIPPED) or entry.name in ("__init__.py", "house.md"):
            continue
        if entry.is_dir():
            yield from _tree(entry, depth + 1)
        elif entry.suffix in (".py", ".sh", ".md"):
            yield "  " * (depth + 1) + f"- `{entry.name}` {phrase(entry)}".rstrip()


if __name__ == "__main__":
    print(page(), end="")
