"""The command line: parse, call, print. Nothing heavy is imported before a command runs.

stdout carries the result (a path, a table, with --json one JSON object), stderr everything else.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from warmerge.cli import (
    choosing,
    comparing,
    demonstrating,
    merging,
    optimising,
    publishing,
    reporting,
    scoring,
    theorising,
    training,
)
from warmerge.cli.shared import errors
from warmerge.errors import UsageError

app = typer.Typer(
    help="One robust reward model out of many: train, check, average and measure reward models (WARM).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(demonstrating.demo)
app.command()(merging.average)
app.command()(merging.inspect)
app.command()(merging.rules)
app.command("eval")(scoring.evaluate)
app.command()(scoring.lmc_curve)
app.command()(scoring.score)
app.command()(scoring.plot)
app.command()(training.train)
app.command()(training.probe)
app.command()(choosing.bon)
app.command()(optimising.rl)
app.command()(comparing.winrate)
app.command()(reporting.rl_report)
app.command()(reporting.report)
app.command()(publishing.push)
app.command()(theorising.theory)


# Commands whose work the processes of torchrun or accelerate divide. Of any other each of them would do all.
_ON_RANKS = ("train", "rl")


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from warmerge.version import versions

        typer.echo(versions()["warmerge"])
        raise typer.Exit
    command, ranks = context.invoked_subcommand, os.environ.get("WORLD_SIZE", "")
    if command not in (None, *_ON_RANKS) and ranks.isdecimal() and int(ranks) > 1:
        with errors(debug=False):
            what = f"{command} is the work of one process, and WORLD_SIZE says that {ranks} were started to do it"
            raise UsageError(f"{what}; start it without torchrun or accelerate launch, or unset WORLD_SIZE")


def main() -> None:
    """The entry point of the `warmerge` command."""
    if not sys.stderr.isatty():  # read by huggingface_hub when it is imported: its own bars would go into logs
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app(prog_name="warmerge")  # also of `python -m warmerge`, whose completion would be that of `python` otherwise
