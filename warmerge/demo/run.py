"""`warmerge demo`: runs the steps of the story one after the other, each by the command that it prints."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from warmerge.demo.story import EVAL_OUT, FULL, QUICK, REPORT, WORLD, Step, steps
from warmerge.errors import Interrupted, UsageError, WarmergeError, plain

COMMANDS = "commands.sh"
_SEEDS = 2**31  # each of the libraries takes these, and a few more for the members
# Rows of the table at the end: the name of a model in eval's rows, or a kind of which the mean is shown.
_SUMMARY = (
    ("start, head probed", "start", None),
    ("gentle single", None, "gentle"),
    ("single", "member", None),
    ("single, half-way to its start", "halfway", None),
    ("ensemble, standardised", None, "ensemble (mean, standardised)"),
    ("average", "average", None),
)


def run_demo(
    out: Path,
    run: Callable[[Sequence[str]], int],
    program: Callable[[Sequence[Sequence[str]]], list[str]],
    *,
    seed: int = 0,
    quick: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Tells the story in the new folder `out` and returns the path of its report.html.

    Args:
        run: runs one `warmerge ...` command, as words, in the current folder, and returns its exit code.
        program: what starts a process that runs several of them, one after the other.
        seed: of the world, of training and sampling: another seed is another story.
        quick: models that have hardly learned: shows the commands, not the results.

    Raises:
        UsageError: `out` is there already, a seed that is none, or what `train` and `rl` need is not installed.
        WarmergeError: a command ended with another exit code than 0.
        Interrupted: Ctrl-C, the process was told to end, or its terminal was closed; nothing goes on beside.
    """
    missing = [name for name in ("accelerate", "peft", "trl") if find_spec(name) is None]
    if missing:
        raise UsageError(f"the demo needs {', '.join(missing)}: pip install 'warmerge[train]'")
    if not 0 <= seed < _SEEDS:
        raise UsageError(f"--seed: expected 0 to {_SEEDS - 1}, found {seed}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{plain(str(out))} is there already; choose another -o, or delete it")
    plan = QUICK if quick else FULL
    story = steps(plan, seed)
    out.mkdir(parents=True, exist_ok=True)
    (out / COMMANDS).write_text(script(story), encoding="utf-8")
    begun = time.monotonic()
    folder = shlex.quote(str(out) if not str(out).startswith("-") else f"./{out}")
    say(f"$ mkdir -p {folder} && cd {folder}")
    with _inside(out), _beside(program) as aside:
        for i, step in enumerate(story, start=1):
            say(f"\n== {i} of {len(story)}: {step.title}\n{step.why}\n\n$ {step.typed()}")
            since = time.monotonic()
            code = aside(step, say) if step.log else next(filter(None, map(partial(_here, run), step.commands)), 0)
            if code == Interrupted.exit_code:
                raise Interrupted(f"the demo was stopped in step {i}; delete {plain(str(out))} to begin again")
            if code:
                raise WarmergeError(f"the demo ends here: step {i}, {step.title!r}, gave the exit code {code}")
            say(f"({time.monotonic() - since:.1f} s)")
        for line in summary(json.loads(Path(EVAL_OUT, "eval.json").read_text(encoding="utf-8"))):
            say(line)
        say("\nFigures: " + ", ".join(map(str, sorted(Path().glob("*/*.png")))))
    say(f"{len(story)} steps in {time.monotonic() - begun:.0f} s. To run them again, in another folder: {COMMANDS}")
    if quick:
        say("--quick: these models have hardly learned. The commands are the real ones, the numbers mean nothing.")
    return out / REPORT


def _here(run: Callable[[Sequence[str]], int], command: Sequence[str]) -> int:
    """Runs a command in this process, and returns its exit code."""
    if command[: len(WORLD)] != WORLD:
        return run(command)
    from warmerge.demo import world

    world.main(command[len(WORLD) :])
    return 0


@contextmanager
def _beside(
    program: Callable[[Sequence[Sequence[str]]], list[str]],
) -> Iterator[Callable[[Step, Callable[[str], None]], int]]:
    """Begins a step with a log in a process of its own; a step of a log alone waits for it, and shows what it said.

    The process ends with this one, also where that is told to end, or its terminal is closed.
    """
    begun: list[subprocess.Popen[bytes]] = []

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def follow(step: Step, say: Callable[[str], None]) -> int:
        if step.commands:
            with Path(step.log).open("wb") as log:
                # In a session of its own, so that what it starts can be ended with it.
                started = subprocess.Popen(program(step.commands), stdout=log, stderr=log, start_new_session=True)
            begun.append(started)
            return 0
        code = begun[-1].wait()
        say(Path(step.log).read_text(encoding="utf-8"))
        return code

    before = {}
    if threading.current_thread() is threading.main_thread():  # which alone can be told
        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield follow
    finally:
        for process in begun:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def script(story: Sequence[Step]) -> str:
    """The steps as a shell script."""
    lines = [
        "#!/usr/bin/env bash",
        "# The steps of `warmerge demo`, to be run in an empty folder.",
        "set -euo pipefail",
        "command -v python warmerge > /dev/null || { echo 'activate the environment that has warmerge' >&2; exit 1; }",
    ]
    for step in story:
        lines += ["", f"# {step.title}", step.typed()]
    return "\n".join(lines) + "\n"


def summary(found: Mapping[str, Any]) -> Iterator[str]:
    """The demo's table, out of eval.json: for single models with their 95 % interval, for several the mean of them."""
    sets = {entry["name"]: entry["n"] for entry in found["sets"]}
    width = max(len(label) for label, _, _ in _SUMMARY) + 14
    yield "\nAccuracy [95 %]; of swapped labels, agreement with the wrong label: lower has memorised less"
    yield " " * width + "".join(f"{f'{name} (n = {n})':<26}" for name, n in sets.items())
    for label, kind, model in _SUMMARY:
        cells, count = [], 0
        for name in sets:
            rows = [
                row for row in found["rows"]
                if row["set"] == name and (row["kind"] == kind if model is None else row["model"] == model)
            ]  # fmt: skip
            cells.append(_cell(rows))
            count = len(rows)
        shown = label if count == 1 else f"{label} (mean of {count})"
        yield f"{shown:<{width}}" + "".join(f"{cell:<26}" for cell in cells)


def _cell(rows: Sequence[Mapping[str, Any]]) -> str:
    mean = sum(row["accuracy"] for row in rows) / len(rows)
    return f"{mean:.3f}" + (f" [{rows[0]['low']:.3f}, {rows[0]['high']:.3f}]" if len(rows) == 1 else "")


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """The folder as the current one, for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
