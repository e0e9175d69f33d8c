"""average, inspect, rules."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from warmerge.cli.publishing import Yes, described, refuse_unasked, sent
from warmerge.cli.shared import (
    AnyModel,
    Base,
    Debug,
    Json,
    Offline,
    Streamable,
    Threads,
    bar,
    errors,
    numbers,
    table,
    warn,
)
from warmerge.cli.tables import print_inspection
from warmerge.errors import UsageError, plain
from warmerge.weights.rules import FLAGS, RULES

if TYPE_CHECKING:
    from warmerge.pipeline.prepare import Prepared


def average(
    checkpoints: Streamable,
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
    select: Annotated[
        str | None,
        typer.Option(
            metavar="best:M|greedy",
            rich_help_panel="Selection",
            help="Average only the M most accurate checkpoints on --data, or those that help one after the other.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            rich_help_panel="Selection",
            help="Preference pairs to select on; report on others. Repeatable.",
        ),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(rich_help_panel="Selection", help="For --select: longest text in tokens.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(rich_help_panel="Output", help="auto (each tensor's own), float32, bfloat16 or float16.")
    ] = "auto",
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Read checkpoints on the Hub piece by piece: only the result is put on the disk."
        ),
    ] = False,
    offline: Offline = False,
    device: Annotated[str, typer.Option(help="auto (the CPU), cpu or cuda[:N].")] = "auto",
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
    push: Annotated[
        str | None,
        typer.Option(
            metavar="REPO_ID", rich_help_panel="Output", help="Then publish OUT there, as `warmerge push OUT REPO_ID`."
        ),
    ] = None,
    yes: Yes = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Average checkpoints into one, after every check; refuse (exit code 3) what would come out wrong.

    Members may each have their own shard layout. The result is a folder that transformers loads. Example:

    warmerge average runs/1 runs/2 runs/3 -o warm
    """
    with errors(debug):
        from warmerge.pipeline import average as pipeline
        from warmerge.pipeline.prepare import prepare
        from warmerge.weights.output import check_out

        choices: dict[str, Any] = {
            "rule": rule, "weights": numbers("--weights", weights), "normalize": normalize, "lam": lam, "eta": eta,
            "base": base, "only": only or (), "exclude": exclude or (), "rest_from": rest_from, "dtype": dtype,
            "max_shard_size": max_shard_size, "any_model": any_model, "allow_duplicates": allow_duplicates,
            "tokenizer_from": tokenizer_from, "stream": stream,
        }  # fmt: skip
        chosen: dict[str, Any] | None = None
        if bool(select) != bool(data):
            raise UsageError("--select and --data go together: which checkpoints to keep, and pairs to judge them on")
        if out is None and not dry_run:
            raise UsageError("-o OUT is missing: the new folder for the merged checkpoint")
        if max_length is not None and not select:
            raise UsageError("--max-length is for --select: a merge has no texts")
        if push:  # before hours of selecting and merging
            _refuse_unwritable(push, yes or dry_run)
        if select and data:
            _refuse_positions({"--weights": weights, "--lambda": lam, "--rest-from": rest_from,
                               "--tokenizer-from": tokenizer_from})  # fmt: skip
            if out is not None:
                check_out(out, [Path(checkpoint) for checkpoint in checkpoints if Path(checkpoint).is_dir()], overwrite)
            checkpoints, chosen = _select(checkpoints, select, data, base, max_length)
        if dry_run:
            prepared = prepare(checkpoints, **choices)
            warn(prepared.warnings)
            typer.echo(json.dumps(_plan_json(prepared), indent=2) if as_json else _plan_text(prepared))
            return
        assert out is not None
        with bar("merging") as (begin, advance):

            def planned(prepared: Prepared) -> None:
                warn(prepared.warnings)
                begin(prepared.plan.input_bytes)

            merged = pipeline.average(
                checkpoints,
                out,
                threads=threads,
                device=device,
                overwrite=overwrite,
                resume=resume,
                command=["warmerge", *sys.argv[1:]],
                selection=chosen,
                progress=advance,
                on_plan=planned,
                **choices,
            )
        result = {"out": str(merged.out), **merged.manifest}
        if push:
            result["url"] = _pushed(merged.out, push, yes, any_model)
        typer.echo(json.dumps(result, indent=2) if as_json else str(merged.out))
        if push and not as_json:
            typer.echo(result["url"])


def _refuse_positions(options: Mapping[str, object]) -> None:
    given = [flag for flag, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{given[0]} goes by position, which --select changes: select first, then merge those")


def _refuse_unwritable(repo: str, unasked: bool) -> None:
    from warmerge.pipeline.push import check_target

    refuse_unasked(unasked)
    check_target(repo)


def _pushed(out: Path, repo: str, yes: bool, any_model: bool) -> str:
    """The address of the merge that was just written, once it is on the Hub."""
    try:
        return sent(described(out, repo, None, asking=not yes, any_model=any_model), yes).url
    except BaseException:
        typer.echo(f"the merge is in {out}; `warmerge push {out} {repo}` publishes it", err=True)
        raise


def _select(
    checkpoints: list[str], select: str, data: list[str], base: str | None, max_length: int | None
) -> tuple[list[str], dict[str, Any]]:
    from warmerge.pipeline.ranking import select_members
    from warmerge.rewards.bench import Measuring
    from warmerge.rewards.model import LoadOptions

    with bar("selecting", "texts") as (begin, advance):
        measuring = Measuring(LoadOptions(max_length=max_length), base, on_work=begin, progress=advance)
        kept, record = select_members(checkpoints, select, data, measuring)
    names = [str(checkpoint) for checkpoint in kept]
    typer.echo(f"selected {len(names)} of {len(checkpoints)}: {', '.join(map(plain, names))}", err=True)
    return names, record


def inspect(
    checkpoints: Streamable,
    distances: Annotated[
        bool, typer.Option("--distances", help="Stream every weight: norms, distances, angles, layer by layer.")
    ] = False,
    base: Base = None,
    figure: Annotated[Path | None, typer.Option(help="With --distances: a PNG heat map.")] = None,
    any_model: AnyModel = False,
    offline: Offline = False,
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

        with bar("reading") as (begin, advance):
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
            print_inspection(found)
        if found.findings:
            raise typer.Exit(3)


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
        table(list(rows[0]), [[v if isinstance(v, str) else " ".join(v) for v in row.values()] for row in rows])


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
