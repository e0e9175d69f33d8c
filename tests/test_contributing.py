"""The diffs of CONTRIBUTING.md can be applied to the code as it is, and the tests hold with them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"^```diff\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def files_of(diff: str) -> list[str]:
    return re.findall(r"^\+\+\+ b/(.+)$", diff, re.MULTILINE)


def apply(diff: str, folder: Path) -> None:
    done = subprocess.run(["git", "apply", "-"], input=diff, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_there_is_a_diff_for_a_rule_a_layout_and_a_head() -> None:
    assert [files_of(diff)[0] for diff in DIFFS] == [
        "warmerge/weights/rules.py", "warmerge/rewards/layouts.py", "warmerge/weights/heads.py",
    ]  # fmt: skip


@pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: files_of(diff)[0])
def test_each_diff_applies(tmp_path: Path, diff: str) -> None:
    for name in files_of(diff):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    apply(diff, tmp_path)
    changed = [name for name in files_of(diff) if (tmp_path / name).read_bytes() != (ROOT / name).read_bytes()]
    assert changed == files_of(diff)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: files_of(diff)[0])
def test_the_tests_hold_with_each_diff(tmp_path: Path, diff: str) -> None:
    copy = tmp_path / "house"
    for name in ("warmerge", "tests", "examples", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    apply(diff, copy)
    code, tests = files_of(diff)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", code, tests]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
