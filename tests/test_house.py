"""docs/house.md names every file, and every file says what it is."""

from __future__ import annotations

import house


def test_the_page_is_what_the_files_say() -> None:
    assert (house.ROOT / "docs" / "house.md").read_text(encoding="utf-8") == house.page(), (
        "docs/house.md is out of date: python tests/house.py > docs/house.md"
    )


def test_every_file_has_a_phrase() -> None:
    silent = [line for line in house.page().splitlines() if line.lstrip().startswith("- `") and line.endswith("`")]
    assert not silent
