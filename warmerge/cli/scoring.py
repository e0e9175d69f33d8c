"""eval, lmc-curve, score, plot."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from warmerge.cli.shared import Checkpoints, Debug, Json, Offline, Overwrite, Threads, bar, errors, numbers, warn
from warmerge.cli.tables import print_curve, print_evaluation, print_json, print_vs_m
from warmerge.errors import UsageError

if TYPE_CHECKING:
    from warmerge.pipeline.lmc import Curve
    from warmerge.pipeline.vs_m import AccuracyVsM
    from warmerge.rewards.bench import Measuring
    from warmerge.rewards.model import LoadOptions

_MODEL, _DATA, _OUTPUT, _ENGINE = "Model", "Data", "Output", "Engine"
AdaptedModel = Annotated[
    str | None, typer.Option("--base", rich_help_panel=_MODEL, help="For LoRA adapters: the model that they adapt.")
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]PATH",
        rich_help_panel=_DATA,
        help="Preference pairs: .jsonl[.gz], .parquet, a folder, or a data-set id (org/name:split). Repeatable.",
    ),
]
Limit = Annotated[
    int | None, typer.Option(rich_help_panel=_DATA, help="A random sample of about so many pairs, by whole prompts.")
]
SkipBadRows = Annotated[
    bool, typer.Option("--skip-bad-rows", rich_help_panel=_DATA, help="Leave bad rows out and count them.")
]
Out = Annotated[
    Path | None, typer.Option("-o", "--out", rich_help_panel=_OUTPUT, help="Folder for results and figures.")
]
Device = Annotated[str, typer.Option(rich_help_panel=_MODEL, help="auto (a GPU if there is one), cpu or cuda[:N].")]
Dtype = Annotated[
    str,
    typer.Option(
        rich_help_panel=_MODEL,
        help="Of the model's body: auto, float32, bfloat16 or float16. Heads and rewards are float32.",
    ),
]
Template = Annotated[
    str,
    typer.Option(
        rich_help_panel=_MODEL,
        help="chat: the tokenizer's template; plain: prompt, blank line, answer; auto: chat if there is a template.",
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_MODEL, help="In tokens: longer texts are cut, and counted. The model's own limit if not given."
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", rich_help_panel=_MODEL, help="Run model code that a checkpoint brings.")
]
BatchTokens = Annotated[
    int | None, typer.Option(rich_help_panel=_MODEL, help="Most tokens in one forward pass, padding included.")
]
Engine = Annotated[
    str,
    typer.Option(
        rich_help_panel=_ENGINE,
        help="inline: in this process; local: a process for each GPU, or one on the CPU; ray: on a Ray cluster.",
    ),
]
Address = Annotated[str, typer.Option(rich_help_panel=_ENGINE, help="Of the Ray cluster.")]
Resamples = Annotated[int, typer.Option(rich_help_panel=_DATA, help="Bootstrap resamples of the intervals.")]
Seed = Annotated[int, typer.Option(rich_help_panel=_DATA, help="Of the bootstrap and of every random sample.")]


def evaluate(
    checkpoints: Checkpoints,
    data: Data = None,
    init: Annotated[
        str | None,
        typer.Option(help="The members' shared start: also measured, and half-way between it and each member."),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]CKPT", help="Measured beside them, never averaged: say, one long-trained model. Repeatable."
        ),
    ] = None,
    no_average: Annotated[
        bool, typer.Option("--no-average", help="Only compare: also models that cannot be averaged.")
    ] = False,
    perturb: Annotated[
        int, typer.Option(metavar="N", help="Also change N answers of each set slightly: how far do rewards move?")
    ] = 0,
    mask: Annotated[
        Path | None,
        typer.Option(rich_help_panel=_DATA, help="A corruption.json: reports its set's swapped and clean pairs apart."),
    ] = None,
    base: AdaptedModel = None,
    out: Out = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    template: Template = "auto",
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = None,
    trust_remote_code: TrustRemoteCode = False,
    limit: Limit = None,
    skip_bad_rows: SkipBadRows = False,
    resamples: Resamples = 2000,
    seed: Seed = 0,
    engine: Engine = "inline",
    address: Address = "auto",
    threads: Threads = None,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare members, their ensembles and their average (made in memory) on preference pairs, with 95 % intervals.

    An average is worth its cost if it beats the ensemble, the best member, and with --init plain shrinkage. Example:

    warmerge eval runs/1 runs/2 runs/3 --init runs/init --data val=val.jsonl --data ood=ood.jsonl -o results
    """
    with errors(debug):
        from warmerge.pipeline.evaluate import evaluate as run

        with bar("scoring", "texts") as progress:
            loading = loading_of(device, dtype, template, max_length, trust_remote_code)
            found = run(
                checkpoints, _given(data), out=out, init=init, beside=beside or (), with_average=not no_average,
                perturb_answers=perturb, mask=mask, engine=engine, address=address, overwrite=overwrite,
                command=["warmerge", *sys.argv[1:]],
                measuring=measuring_of(
                    loading, base, limit, skip_bad_rows, resamples, seed, batch_tokens, threads, progress
                ),
            )  # fmt: skip
        warn(found.warnings)
        if as_json:
            print_json(found.as_json())
        else:
            print_evaluation(found)


def lmc_curve(
    checkpoints: Checkpoints,
    data: Data = None,
    out: Out = None,
    points: Annotated[int, typer.Option(help="Equally spaced lambdas from 0 to 1.")] = 11,
    lambdas: Annotated[str | None, typer.Option(help="Lambdas one by one instead, e.g. 0,0.3,0.5,1.")] = None,
    extrapolate: Annotated[float, typer.Option(help="Go so far beyond both ends, in the same steps.")] = 0.0,
    path: Annotated[
        str, typer.Option(help="pairs: between all pairs of checkpoints; mean: from each one to the mean of all.")
    ] = "pairs",
    tolerance: Annotated[
        float, typer.Option(help="How far below the straight line counts as a barrier; 0.01 is one point of accuracy.")
    ] = 0.01,
    accuracy_vs_m: Annotated[
        bool, typer.Option("--accuracy-vs-m", help="Instead: accuracy of average and ensemble as members are added.")
    ] = False,
    order: Annotated[
        str, typer.Option(help="For --accuracy-vs-m: best-first, worst-first, random or greedy.")
    ] = "best-first",
    select_data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH", rich_help_panel=_DATA, help="For --accuracy-vs-m: pairs to rank members on."
        ),
    ] = None,
    base: AdaptedModel = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    template: Template = "auto",
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = None,
    trust_remote_code: TrustRemoteCode = False,
    limit: Limit = None,
    skip_bad_rows: SkipBadRows = False,
    resamples: Resamples = 2000,
    seed: Seed = 0,
    threads: Threads = None,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check linear mode connectivity: is the average of two checkpoints as accurate as the line between them?

    No weights are written. Ctrl-C keeps the finished points in OUT, and the same command goes on there. Example:

    warmerge lmc-curve runs/1 runs/2 --data val=val.jsonl --data ood=ood.jsonl -o lmc
    """
    with errors(debug):
        from warmerge.pipeline import lmc, vs_m

        if out is None and not as_json:
            raise UsageError("-o OUT is missing: the folder for rows and figures")
        if not accuracy_vs_m and (select_data or order != "best-first"):
            raise UsageError("--order and --select-data go with --accuracy-vs-m")
        if accuracy_vs_m and (points, lambdas, extrapolate, path, tolerance) != (11, None, 0.0, "pairs", 0.01):
            raise UsageError(
                "--points, --lambdas, --extrapolate, --path and --tolerance do not go with --accuracy-vs-m"
            )
        found: Curve | AccuracyVsM
        with bar("scoring", "texts") as progress:
            loading = loading_of(device, dtype, template, max_length, trust_remote_code)
            common: dict[str, Any] = {
                "overwrite": overwrite, "command": ["warmerge", *sys.argv[1:]],
                "measuring": measuring_of(
                    loading, base, limit, skip_bad_rows, resamples, seed, batch_tokens, threads, progress
                ),
            }  # fmt: skip
            if accuracy_vs_m:
                found = vs_m.accuracy_vs_m(
                    checkpoints, _given(data), out, order=order, select_data=select_data or (), **common
                )
            else:
                found = lmc.lmc_curve(
                    checkpoints, _given(data), out, points=points, lambdas=numbers("--lambdas", lambdas),
                    extrapolate=extrapolate, path=path, tolerance=tolerance, **common,
                )  # fmt: skip
        warn(found.warnings)
        if as_json:
            print_json(found.as_json())
        elif isinstance(found, vs_m.AccuracyVsM):
            print_vs_m(found)
        else:
            print_curve(found)


def score(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="A reward model.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            help="Rows: pairs; prompt and candidates; prompt and completion (response, answer, output); or text.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="New file, .jsonl or .jsonl.gz.")],
    column: Annotated[str, typer.Option(help="Name of the new column.")] = "reward",
    base: AdaptedModel = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    template: Template = "auto",
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = None,
    trust_remote_code: TrustRemoteCode = False,
    skip_bad_rows: SkipBadRows = False,
    engine: Engine = "inline",
    address: Address = "auto",
    threads: Threads = None,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Add rewards to a file: `reward` to answers and lists of candidates, `reward_chosen`, `reward_rejected` to pairs.

    Example:

    warmerge score warm --data pool.jsonl -o scored.jsonl
    """
    with errors(debug):
        from warmerge.pipeline.score import score_file

        with bar("scoring", "texts") as (begin, advance):
            done = score_file(
                checkpoint, data, out, column=column, base=base, skip_bad_rows=skip_bad_rows,
                batch_tokens=_positive("--batch-tokens", batch_tokens), threads=threads_of(threads),
                options=loading_of(device, dtype, template, max_length, trust_remote_code),
                engine=engine, address=address, overwrite=overwrite, on_work=begin, progress=advance,
            )  # fmt: skip
        warn(done.warnings)
        for note in done.notes:
            typer.echo(f"note: {note}", err=True)
        if as_json:
            print_json({**vars(done), "out": str(done.out), "warnings": [str(w) for w in done.warnings]})
        else:
            typer.echo(str(done.out))


def plot(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Results of eval, lmc-curve, train, bon, winrate or rl-report.", show_default=False
        ),
    ],
    debug: Debug = False,
) -> None:
    """Draw the figures of a results folder again, from its rows. Example: warmerge plot lmc"""
    with errors(debug):
        from warmerge.report.results import redraw

        for path in redraw(folder):
            typer.echo(str(path))


def _given(data: list[str] | None) -> list[str]:
    if not data:
        raise UsageError("--data is missing: preference pairs, as NAME=PATH or PATH")
    return data


def loading_of(device: str, dtype: str, template: str, max_length: int | None, trust_remote_code: bool) -> LoadOptions:
    """How models are loaded, as the arguments say."""
    from warmerge.rewards.model import LoadOptions

    return LoadOptions(device, dtype, template, max_length, trust_remote_code)


def measuring_of(
    loading: LoadOptions,
    base: str | None,
    limit: int | None,
    skip_bad_rows: bool,
    resamples: int,
    seed: int,
    batch_tokens: int | None,
    threads: int | None,
    progress: tuple[Callable[[int], None], Callable[[int], None]],
) -> Measuring:
    """How models are measured, as the arguments say. `threads` are those of the whole process from here on."""
    from warmerge.rewards.bench import Measuring

    batch_tokens, threads = _positive("--batch-tokens", batch_tokens), threads_of(threads)
    return Measuring(loading, base, limit, skip_bad_rows, resamples, seed, batch_tokens, threads, *progress)


def threads_of(threads: int | None) -> int | None:
    """The number that was asked for, which are those of the whole process from here on."""
    import torch

    if (threads := _positive("--threads", threads)) is not None:
        torch.set_num_threads(threads)
    return threads


def _positive(flag: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise UsageError(f"{flag}: expected 1 or more, found {value}")
    return value
