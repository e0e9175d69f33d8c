"""What the commands share: arguments, errors, progress, tables. Nothing heavy is imported here."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from warmerge.errors import Finding, UsageError, WarmergeError, plain

_LOCAL, _HUB = "a folder, a .safetensors file, a LoRA adapter folder", "a Hub id (org/name, org/name@revision)"
CKPT = f"{_LOCAL}, or {_HUB}"

Checkpoints = Annotated[list[str], typer.Argument(metavar="CKPT", help=f"Checkpoints: {CKPT}.", show_default=False)]
Streamable = Annotated[
    list[str],
    typer.Argument(metavar="CKPT", help=f"Checkpoints: {_LOCAL}, {_HUB}, or s3://bucket/folder.", show_default=False),
]
Base = Annotated[
    str | None,
    typer.Option(
        rich_help_panel="Rule",
        help="The checkpoint that all members started from; for LoRA adapters, the model they adapt.",
    ),
]
AnyModel = Annotated[
    bool, typer.Option("--any-model", rich_help_panel="Checks", help="Also accept models without a reward head.")
]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads; all that this process may use, at most 16, if not given.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", rich_help_panel="Output", help="Replace what an earlier run wrote there.")
]


def _go_offline(wanted: bool) -> bool:
    if wanted:  # read by huggingface_hub and transformers when they are imported, so before any of our own code is
        os.environ["HF_HUB_OFFLINE"] = "1"
    return wanted


Offline = Annotated[
    bool,
    typer.Option("--offline", callback=_go_offline, help="Ask the Hub nothing: take checkpoints from its cache only."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")]


@contextmanager
def errors(debug: bool) -> Iterator[None]:
    """Turns our own errors into one message on stderr and the exit code that errors.py gives them."""
    try:
        yield
    except WarmergeError as error:
        if debug:
            raise
        typer.echo(f"warmerge: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except OSError as error:
        if debug:
            raise
        where = "" if error.filename is None else f"{plain(str(error.filename))}: "
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; make room, then give the same command again" if full else ""
        typer.echo(f"warmerge: {where}{error.strerror or error}{hint}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("warmerge: stopped", err=True)
        raise typer.Exit(130) from None


@contextmanager
def bar(verb: str, unit: str = "bytes") -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """begin(total) and advance(count) of a progress bar; both do nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield (lambda total: None), (lambda count: None)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )  # fmt: skip

    counts = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
    columns = (TextColumn(verb), BarColumn(), *counts, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(verb, total=None, start=False)

        def begin(total: int) -> None:
            progress.reset(task, total=total)

        yield begin, lambda count: progress.advance(task, count)


def warn(warnings: Sequence[Finding]) -> None:
    """Reasons for doubt, a line each, on stderr."""
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)


def numbers(flag: str, text: str | None) -> tuple[float, ...] | None:
    """The numbers in `1,2.5,3`; UsageError naming the flag where they are none."""
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{flag}: expected numbers with commas between them, found {text!r}") from None


def table(columns: list[str], rows: list[list[str]]) -> None:
    """A table in full width: a pipe or a file gets every character, a terminal wraps as it likes."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=not sys.stdout.isatty())
    for row in rows:
        table.add_row(*(cell if cell.isprintable() else repr(cell) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else 100_000, markup=False, emoji=False, highlight=False)
    console.print(table)
