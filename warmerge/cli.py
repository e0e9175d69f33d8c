"""The command line: parse, call, print. Nothing heavy is imported before a command runs.

stdout carries the result (a path, a table, with --json one JSON object), stderr everything else.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from warmerge.errors import Finding, WarmergeError, plain
from warmerge.weights.rules import FLAGS, RULES

if TYPE_CHECKING:
    from warmerge.pipeline.average import Prepared
    from warmerge.pipeline.inspect import Inspection
    from warmerge.weights.distances import Distances

app = typer.Typer(
    help="One robust reward model out of many: check, average and inspect reward-model checkpoints (WARM).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
CKPT = "a folder, a .safetensors file, a LoRA adapter folder, or a Hub id (org/name, org/name@revision)"

Checkpoints = Annotated[list[str], typer.Argument(metavar="CKPT", help=f"Checkpoints: {CKPT}.", show_default=False)]
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
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")]


@app.command()
def average(
    checkpoints: Checkpoints,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", rich_help_panel="Output", help="New folder for the merged checkpoint.")
    ] = None,
    rule: Annotated[
        str,
        typer.Option(rich_help_panel="Rule", help=f"{', '.join(RULES)}: see `warmerge rules`."),
    ] = "uniform",
    weights: Annotated[
        str | None,
        typer.Option(rich_help_panel="Rule", help="For weighted: one number per checkpoint, e.g. 0.5,0.3,0.2."),
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", rich_help_panel="Rule", help="Divide --weights by their sum.")
    ] = False,
    lam: Annotated[
        float | None,
        typer.Option(
            "--lambda", rich_help_panel="Rule", help="For lambda, slerp: 0 is the first checkpoint, 1 the second."
        ),
    ] = None,
    eta: Annotated[
        float | None, typer.Option(rich_help_panel="Rule", help="For liti: 0 is the base, 1 the average.")
    ] = None,
    base: Base = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB", rich_help_panel="Partial merges", help="Merge only tensors that match; repeatable."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--except",
            metavar="GLOB",
            rich_help_panel="Partial merges",
            help="Do not merge tensors that match; repeatable.",
        ),
    ] = None,
    rest_from: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel="Partial merges",
            help="Copy the tensors that are not merged from checkpoint N (1 is the first).",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(rich_help_panel="Output", help="auto (each tensor's own), float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:N].")] = "auto",
    threads: Threads = None,
    max_shard_size: Annotated[
        str, typer.Option(rich_help_panel="Output", help="Largest output file, e.g. 500MB.")
    ] = "5GB",
    tokenizer_from: Annotated[
        int | None,
        typer.Option(metavar="N", rich_help_panel="Checks", help="Take checkpoint N's tokenizer although they differ."),
    ] = None,
    allow_duplicates: Annotated[
        bool, typer.Option("--allow-duplicates", rich_help_panel="Checks", help="Also count one checkpoint twice.")
    ] = False,
    any_model: AnyModel = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel="Output", help="Replace OUT if an earlier merge wrote it.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", rich_help_panel="Output", help="Continue an interrupted merge into OUT.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", rich_help_panel="Output", help="Check, print the plan, and stop.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Average checkpoints into one, after every check; refuse (exit code 3) what would come out wrong.

    Members may each have their own shard layout. The result is a folder that transformers loads. Example:

    warmerge average runs/1 runs/2 runs/3 -o warm
    """
    with errors(debug):
        from warmerge.errors import UsageError
        from warmerge.pipeline import average as pipeline

        choices: dict[str, Any] = {
            "rule": rule, "weights": _numbers("--weights", weights), "normalize": normalize, "lam": lam, "eta": eta,
            "base": base, "only": only or (), "exclude": exclude or (), "rest_from": rest_from, "dtype": dtype,
            "max_shard_size": max_shard_size, "any_model": any_model, "allow_duplicates": allow_duplicates,
            "tokenizer_from": tokenizer_from,
        }  # fmt: skip
        if dry_run:
            prepared = pipeline.prepare(checkpoints, **choices)
            _warn(prepared.warnings)
            typer.echo(json.dumps(_plan_json(prepared), indent=2) if as_json else _plan_text(prepared))
            return
        if out is None:
            raise UsageError("-o OUT is missing: the new folder for the merged checkpoint")
        with _bar("merging") as (begin, advance):

            def planned(prepared: Prepared) -> None:
                _warn(prepared.warnings)
                begin(prepared.plan.input_bytes)

            merged = pipeline.average(
                checkpoints,
                out,
                threads=threads,
                device=device,
                overwrite=overwrite,
                resume=resume,
                command=["warmerge", *sys.argv[1:]],
                progress=advance,
                on_plan=planned,
                **choices,
            )
        result = {"out": str(merged.out), **merged.manifest}
        typer.echo(json.dumps(result, indent=2) if as_json else str(merged.out))


@app.command()
def inspect(
    checkpoints: Checkpoints,
    distances: Annotated[
        bool, typer.Option("--distances", help="Stream every weight: norms, distances, angles, layer by layer.")
    ] = False,
    base: Base = None,
    figure: Annotated[Path | None, typer.Option(help="With --distances: a PNG heat map.")] = None,
    any_model: AnyModel = False,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what checkpoints are and every reason why `average` would refuse them (exit code 3 if there is one).

    Reads headers only, whatever their size, also over the Hub; --distances reads the weights. Example:

    warmerge inspect runs/* --distances --base start --figure angles.png
    """
    with errors(debug):
        from warmerge.pipeline import inspect as pipeline

        with _bar("reading") as (begin, advance):
            found = pipeline.inspect(
                checkpoints,
                base=base,
                distances=distances,
                any_model=any_model,
                threads=threads,
                figure=figure,
                progress=advance,
                on_bytes=begin,
            )
        if as_json:
            typer.echo(json.dumps(found.as_json(), indent=2))
        else:
            _print_inspection(found)
        if found.findings:
            raise typer.Exit(3)


@app.command()
def rules(as_json: Json = False) -> None:
    """List the merge rules with their formulas and sources."""
    rows = [
        {
            "rule": rule.name,
            "formula": rule.formula,
            "options": [FLAGS[option] for option in FLAGS if option in rule.options] + ["--base"] * rule.needs_base,
            "source": rule.source,
        }
        for rule in RULES.values()
    ]
    if as_json:
        typer.echo(json.dumps({"rules": rows}, indent=2))
    else:
        _table(list(rows[0]), [[v if isinstance(v, str) else " ".join(v) for v in row.values()] for row in rows])


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from warmerge.version import versions

        typer.echo(versions()["warmerge"])
        raise typer.Exit


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
        typer.echo(f"warmerge: {where}{error.strerror or error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("warmerge: stopped", err=True)
        raise typer.Exit(130) from None


@contextmanager
def _bar(verb: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """begin(total bytes) and advance(bytes) of a progress bar; both do nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield (lambda total: None), (lambda nbytes: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(verb), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(verb, total=None, start=False)

        def begin(total: int) -> None:
            progress.update(task, total=total)
            progress.start_task(task)

        yield begin, lambda nbytes: progress.advance(task, nbytes)


def _warn(warnings: tuple[Finding, ...]) -> None:
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)


def _numbers(flag: str, text: str | None) -> tuple[float, ...] | None:
    from warmerge.errors import UsageError

    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{flag}: expected numbers with commas between them, found {text!r}") from None


def _plan_json(prepared: Prepared) -> dict[str, Any]:
    plan = prepared.plan
    constant = plan.constant_coefficients()
    return {
        "rule": plan.rule.name,
        "members": [member.label for member in plan.members],
        "base": None if plan.base is None else plan.base.label,
        "coefficients": "measured for each tensor"
        if constant is None
        else [c / constant.divisor for c in constant.members],
        "base_coefficient": None if constant is None else constant.base / constant.divisor,
        "tensors": len(plan.tensors),
        "merged": sum(tensor.merged for tensor in plan.tensors),
        "input_bytes": plan.input_bytes,
        "output_bytes": plan.output_bytes,
        "shards": {shard.file: shard.nbytes for shard in plan.shards},
        "warnings": [str(warning) for warning in prepared.warnings],
    }


def _plan_text(prepared: Prepared) -> str:
    plan = _plan_json(prepared)
    coefficients = plan["coefficients"]
    if not isinstance(coefficients, str):
        coefficients = ", ".join(f"{label}: {c:.6g}" for label, c in zip(plan["members"], coefficients, strict=True))
        if plan["base"] is not None:
            coefficients += f", base: {plan['base_coefficient']:.6g}"
    return "\n".join(
        [
            f"rule          {plan['rule']}: {prepared.plan.rule.formula}",
            f"coefficients  {coefficients}",
            f"tensors       {plan['merged']} merged, {plan['tensors'] - plan['merged']} copied",
            f"reads         {plan['input_bytes']:,} bytes",
            f"writes        {plan['output_bytes']:,} bytes in {len(plan['shards'])} file(s)",
            "checks        all passed; nothing was written",
        ]
    )


def _print_inspection(found: Inspection) -> None:
    columns = ["checkpoint", "architecture", "head", "parameters", "dtype", "files", "tokenizer"]
    cells = [
        [r.checkpoint, r.architecture, r.head, f"{r.parameters:,}", r.dtype, str(r.files), r.tokenizer]
        for r in found.rows
    ]
    _table(columns, cells)
    if found.distances is not None:
        _print_distances(found.distances, [row.checkpoint for row in found.rows])
    _warn(found.warnings)
    for finding in found.findings:
        typer.echo(f"refused: {finding}")
    if not found.findings and len(found.rows) > 1:
        typer.echo("These checkpoints may be merged.")


def _print_distances(distances: tuple[Distances, ...], labels: list[str]) -> None:
    whole = distances[0]
    if whole.cosines is None:
        typer.echo("\nDistance |a - b| / |a|:")
        _table(
            ["", *labels],
            [[label, *(f"{v:.4g}" for v in row)] for label, row in zip(labels, whole.relative, strict=True)],
        )
        typer.echo("\nPart by part, to the first member:")
        _table(["part", *labels[1:]], [[d.group, *(f"{v:.4g}" for v in d.relative[0][1:])] for d in distances])
        return
    assert whole.norms is not None
    assert whole.drift is not None
    typer.echo("\nTask vectors (member - base): norm, norm / |base|, and cosines:")
    rows = zip(labels, whole.norms, whole.drift, whole.cosines, strict=True)
    _table(
        ["", "norm", "drift", *labels], [[a, f"{n:.4g}", f"{d:.4g}", *(f"{c:.3f}" for c in cs)] for a, n, d, cs in rows]
    )
    typer.echo("\nDrift part by part:")
    _table(["part", *labels], [[d.group, *(f"{v:.4g}" for v in d.drift or ())] for d in distances])


def _table(columns: list[str], rows: list[list[str]]) -> None:
    """A table in full width: a pipe or a file gets every character, a terminal wraps as it likes."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=not sys.stdout.isatty())
    for row in rows:
        table.add_row(*(cell if cell.isprintable() else repr(cell) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else 400, markup=False, highlight=False)
    console.print(table)


def main() -> None:
    """The entry point of the `warmerge` command."""
    if not sys.stderr.isatty():  # read by huggingface_hub when it is imported: its own bars would go into logs
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app()
