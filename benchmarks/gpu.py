"""What a GPU brings: limits, tests, averaging, scoring, lmc-curve and training, in one call.

Models are made on the spot with random weights; nothing is downloaded. It needs this repository, torch, transformers,
accelerate, what else warmerge imports (which need not be installed itself), and for the tests pytest. Each part runs in
a process of its own with a time limit, prints its rows as they come, and keeps them in OUT/PART.json; all tables
together are in OUT/gpu.md in the end.

    python benchmarks/gpu.py --out OUT                 # all parts, the most valuable first, in under ten minutes
    python benchmarks/gpu.py scoring lmc --out OUT
    python benchmarks/gpu.py --smoke --out OUT         # tiny sizes, on a CPU where there is no GPU: do the parts work?
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Parts in their order: the module that has each, and the seconds after which it begins no further case.
PARTS = {
    "limits": ("gpu_part", 30), "tests": ("gpu", 60), "average": ("gpu_average", 130), "scoring": ("gpu_models", 110),
    "lmc": ("gpu_models", 75), "train": ("gpu_training", 120),
}  # fmt: skip
# A case that had begun by then may take so long; then the part is stopped.
GRACE = 15
# Imports, on a machine that has not read them before.
STARTING = 20


def tests(part: Any) -> None:
    """The tests marked `gpu`. Warnings are no errors here: those of libraries' other versions are not the question."""
    files = sorted(str(file) for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text("utf-8"))
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", "--tb=short", "-W", "default"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *files], cwd=ROOT, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, check=False, timeout=max(1, part.ends - time.perf_counter()),
    )  # fmt: skip
    print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    said = [row for row in done.stdout.splitlines() if row.strip()]
    for failure in [row for row in said if row.startswith(("FAILED", "ERROR"))]:
        part.row(failure=failure[:300])
    part.row(files=len(files), exit_status=done.returncode, pytest=said[-1] if said else done.stderr[-300:])
    part.failed = done.returncode != 0


def run_here(name: str, out: Path, work: Path, smoke: bool, limit: float) -> bool:
    """Runs a part in this process, on the GPU if there is one; whether all its cases went well."""
    sys.path[:0] = [place for place in (str(ROOT), str(ROOT / "benchmarks")) if place not in sys.path]
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    import torch
    from gpu_part import NotRunError, Part

    print(f"\n## {name}", flush=True)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=work, prefix="warmerge-gpu-") as place:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        part = Part(name, out, Path(place), device, smoke, begun + limit)
        with contextlib.suppress(NotRunError), part.case(name):
            getattr(importlib.import_module(PARTS[name][0]), name)(part)
    print(f"\n{name}: {time.perf_counter() - begun:.0f} s", flush=True)
    return not part.failed


def run_apart(names: Sequence[str], arguments: argparse.Namespace) -> list[str]:
    """Runs each part in a process of its own, all of them within `arguments.seconds`; those that went wrong."""
    begun, failed = time.perf_counter(), []
    for name in names:
        left = arguments.seconds - (time.perf_counter() - begun)
        limit = min(PARTS[name][1], left - GRACE)
        if limit <= 0:
            print(f"\n## {name}\n\nnot run: no time was left", flush=True)
            failed.append(name)
            continue
        command = [sys.executable, __file__, name, "--here", "--limit", f"{limit:.0f}", "--out", str(arguments.out)]
        command += ["--work", str(arguments.work), *(["--smoke"] if arguments.smoke else [])]
        try:
            status = subprocess.run(command, check=False, timeout=min(limit + GRACE + STARTING, left)).returncode
        except subprocess.TimeoutExpired:
            print(f"\n{name}: stopped; what it had printed is kept", flush=True)
            status = 1
        for left_behind in arguments.work.glob("warmerge-gpu-*"):
            shutil.rmtree(left_behind, ignore_errors=True)
        failed += [name] if status else []
    return failed


def tables(out: Path) -> str:
    """The tables of all parts that left rows in `out`, as markdown."""
    from gpu_part import header, line

    found: list[str] = []
    for kept in (json.loads((out / f"{name}.json").read_text()) for name in PARTS if (out / f"{name}.json").exists()):
        found += ["", f"## {kept['part']}", ", ".join(f"{key}: {value}" for key, value in kept["machine"].items())]
        columns: list[str] = []
        for row in kept["rows"]:
            found += [] if list(row) == columns else ["", header(row)]
            columns = list(row)
            found.append(line(row.values()))
    return "\n".join(found[1:]) + "\n"


def place_to_work() -> Path:
    """Memory where there is enough of it, so that no disk is measured; else the usual place for temporary files."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and shutil.disk_usage(shared).free > 32e9 else Path(tempfile.gettempdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them if none is given")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the results")
    parser.add_argument("--work", type=Path, help="a folder for models and merges, up to 24 GB; memory if not given")
    parser.add_argument("--seconds", type=float, default=560, help="of all parts together")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, also without a GPU")
    parser.add_argument("--here", action="store_true", help="all parts in this process")
    parser.add_argument("--limit", type=float, default=100, help="with --here: seconds of a part")
    arguments = parser.parse_args()
    names = arguments.parts or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    asked = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if not arguments.smoke and not arguments.here and subprocess.call([sys.executable, "-c", asked]):
        sys.exit("torch finds no GPU here; --smoke shows on a CPU that the parts work")
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.work = arguments.work or place_to_work()
    if arguments.here:
        # A list: all parts are run, also after one that failed.
        went_well = [run_here(name, arguments.out, arguments.work, arguments.smoke, arguments.limit) for name in names]
        sys.exit(not all(went_well))
    failed = run_apart(names, arguments)
    (arguments.out / "gpu.md").write_text(tables(arguments.out))
    if failed:
        sys.exit(f"went wrong in part or whole: {', '.join(failed)}")


if __name__ == "__main__":
    main()
