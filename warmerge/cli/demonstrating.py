"""demo."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from warmerge.cli.shared import Debug, errors
from warmerge.errors import plain


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="A new folder: it becomes a project to go on with.")] = Path(
        "warmerge-demo"
    ),
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="The same commands in half a minute, on models that hardly learn: the numbers mean nothing."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Another seed is another world, and other numbers.")] = 0,
    debug: Debug = False,
) -> None:
    """See WARM from beginning to end, on models trained in front of you. Offline, on a CPU, in under three minutes.

    A tiny world in which the true worth of every answer is known: reward models with noisy labels, their average,
    connectivity, memorisation, best-of-n, a policy that learns to hack its reward. Each step is a command that you
    could type, and is printed. Nothing is staged: what the paper claims and this run does not show is said.

    warmerge demo -o demo
    """
    with errors(debug):
        from warmerge.demo.run import run_demo

        report = run_demo(out, run, program, seed=seed, quick=quick, say=typer.echo)
        typer.echo(plain(str(report)))


def run(words: Sequence[str]) -> int:
    """Runs `warmerge ...` in this process, where all libraries are loaded already, and returns its exit code."""
    from warmerge.cli import app

    before = sys.argv
    sys.argv = [before[0], *words[1:]]  # commands note in their results how they were called
    try:
        return app(list(words[1:]), standalone_mode=False) or 0
    finally:
        sys.argv = before


def program(commands: Sequence[Sequence[str]]) -> list[str]:
    """What starts a process that runs these commands, up to the first that fails."""
    code = (
        f"from {__name__} import run; import json, sys; "
        "sys.exit(next(filter(None, map(run, json.loads(sys.argv[1]))), 0))"
    )
    return [sys.executable, "-c", code, json.dumps(commands)]
