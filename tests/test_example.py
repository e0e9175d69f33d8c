"""examples/average_two.py as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "average_two.py"


def test_the_example_runs_and_its_average_loads(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "tiny"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "These checkpoints may be merged." in done.stdout
    assert "tiny/average loads with no missing and no unexpected tensor; its reward for a text is" in done.stdout
