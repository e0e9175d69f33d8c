"""winrate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from warmerge.cli.scoring import (
    AdaptedModel,
    BatchTokens,
    Device,
    Dtype,
    MaxLength,
    Resamples,
    Seed,
    SkipBadRows,
    Template,
    TrustRemoteCode,
    loading_of,
    measuring_of,
)
from warmerge.cli.shared import Debug, Json, Offline, Overwrite, Threads, bar, errors, table, warn
from warmerge.cli.tables import print_json
from warmerge.errors import UsageError, plain

if TYPE_CHECKING:
    from warmerge.pipeline.judging.llm import LlmJudge
    from warmerge.pipeline.winrate import WinRates

_POLICIES, _SAMPLING, _JUDGE, _LLM, _DATA = "Policies", "Sampling", "Judge", "A language model as judge", "Data"


def _show_template(wanted: bool) -> None:
    if wanted:
        from warmerge.pipeline.judging.template import TEMPLATE

        typer.echo(TEMPLATE, nl=False)
        raise typer.Exit


def winrate(
    policy: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]LM",
            rich_help_panel=_POLICIES,
            help="A language model, or a file of answers: rows with prompt and candidates, of which the first counts. "
            "Repeatable.",
        ),
    ],
    prompts: Annotated[
        str, typer.Option(metavar="PATH", rich_help_panel=_POLICIES, help="Rows with prompt. Each is asked once.")
    ],
    judge: Annotated[
        str,
        typer.Option(
            metavar="CKPT|FILE.py:FUNCTION|URL",
            rich_help_panel=_JUDGE,
            help="A reward model; a function of your own; or where a language model answers, up to /v1.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", rich_help_panel="Output", help="Folder for answers, verdicts, results, figures."),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|LM",
            rich_help_panel=_POLICIES,
            help="Compare all with this one only: a policy's name, or one more policy. All pairs, if not given.",
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(rich_help_panel=_SAMPLING, help="As in WARM's own comparisons; 0: the likeliest tokens.")
    ] = 0.9,
    top_p: Annotated[
        float,
        typer.Option("--top-p", rich_help_panel=_SAMPLING, help="Only the likeliest tokens of this share; 1: all."),
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(rich_help_panel=_SAMPLING, help="Of one answer.")] = 256,
    policy_template: Annotated[
        str, typer.Option(rich_help_panel=_SAMPLING, help="How prompts become text: auto, chat or plain.")
    ] = "auto",
    generator: Annotated[
        str, typer.Option(rich_help_panel=_SAMPLING, help="transformers, or vllm where that is installed.")
    ] = "transformers",
    judge_model: Annotated[
        str | None, typer.Option(metavar="NAME", rich_help_panel=_LLM, help="The model's name at that URL.")
    ] = None,
    judge_template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_LLM,
            help="What it is asked, with {prompt}, {first} and {second}. Its reply must end with a line A, B or tie.",
        ),
    ] = None,
    show_template: Annotated[
        bool,
        typer.Option(
            "--show-template",
            callback=_show_template,
            is_eager=True,
            rich_help_panel=_LLM,
            help="Print what is asked if no file is given, and stop.",
        ),
    ] = False,
    judge_key_env: Annotated[
        str | None,
        typer.Option(
            metavar="VARIABLE",
            rich_help_panel=_LLM,
            help="Environment variable that holds the key. WARMERGE_JUDGE_KEY, if not given.",
        ),
    ] = None,
    judge_tokens: Annotated[int, typer.Option(rich_help_panel=_LLM, help="Most tokens of a reply.")] = 2048,
    judge_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", rich_help_panel=_LLM, help="How long to wait for a reply.")
    ] = 120.0,
    parallel: Annotated[int, typer.Option(rich_help_panel=_LLM, help="Questions at a time.")] = 8,
    overwrite: Overwrite = False,
    base: AdaptedModel = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    template: Template = "auto",
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = None,
    trust_remote_code: TrustRemoteCode = False,
    limit: Annotated[
        int | None, typer.Option(rich_help_panel=_DATA, help="A random sample of so many prompts.")
    ] = None,
    skip_bad_rows: SkipBadRows = False,
    resamples: Resamples = 2000,
    seed: Seed = 0,
    threads: Threads = None,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """How often is one policy's answer judged better than another's? Win rates with 95 % intervals.

    By a reward model the larger reward wins. A language model reads both orders of every pair, and where its verdicts
    differ it is a tie. Beside it: how often the longer answer would win. Ctrl-C keeps what is finished. Examples:

    warmerge winrate --policy rl/step-500 --policy rl/step-900 --against sft --prompts test.jsonl --judge rm -o wins

    warmerge winrate --policy a --policy b --prompts test.jsonl --judge http://HOST:8000/v1 --judge-model NAME -o wins
    """
    with errors(debug):
        from warmerge.pipeline.sampling import Sampling
        from warmerge.pipeline.winrate import win_rate

        llm = {
            "--judge-model": judge_model, "--judge-template": judge_template, "--judge-key-env": judge_key_env,
            "--judge-tokens": judge_tokens, "--judge-timeout": judge_timeout, "--parallel": parallel,
        }  # fmt: skip
        chosen = _judge(judge, llm)
        with bar("working", "done") as progress:
            loading = loading_of(device, dtype, template, max_length, trust_remote_code)
            found = win_rate(
                policy, prompts, chosen, out, against=against, overwrite=overwrite,
                sampling=Sampling(
                    n=1, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed,
                    generator=generator, device=device, dtype=dtype, template=policy_template,
                    trust_remote_code=trust_remote_code,
                ),
                measuring=measuring_of(
                    loading, base, limit, skip_bad_rows, resamples, seed, batch_tokens, threads, progress
                ),
                command=["warmerge", *sys.argv[1:]],
                say=lambda line: typer.echo(line, err=True),
            )  # fmt: skip
        warn(found.warnings)
        if as_json:
            print_json(found.as_json())
        else:
            print_win_rates(found, out)


def _judge(judge: str, given: dict[str, Any]) -> str | LlmJudge:
    """The judge; with an address, what goes with it. An option that would be ignored is refused."""
    from warmerge.pipeline.judging.llm import LlmJudge, is_address
    from warmerge.pipeline.judging.template import TEMPLATE, read_template

    if not is_address(judge):
        defaults = {"--judge-tokens": 2048, "--judge-timeout": 120.0, "--parallel": 8}
        spelled = ", ".join(flag for flag, value in given.items() if value != defaults.get(flag))
        if spelled:
            raise UsageError(f"{spelled}: only for a language model, whose --judge is an address (http://...)")
        return judge
    if given["--judge-model"] is None:
        raise UsageError("--judge-model is missing: the name of the model at the address of --judge")
    template = given["--judge-template"]
    return LlmJudge(
        judge, given["--judge-model"], TEMPLATE if template is None else read_template(template),
        given["--judge-key-env"], given["--parallel"], given["--judge-tokens"], given["--judge-timeout"],
    )  # fmt: skip


def print_win_rates(found: WinRates, out: Path) -> None:
    """Win rates, what they are made of, and what a judge would say that only looks at the length."""
    rows = found.rows
    typer.echo(f"\njudged by {plain(rows[0]['judge'])}; a tie counts as half a win")
    known = any(row["tokens"] is not None or row["tokens_against"] is not None for row in rows)
    columns = ["policy", "against", "win rate [95 %]", "n", "wins", "ties", "losses", "if longer won"]
    columns += ["tokens, policy / against"] if known else []
    cells = []
    for row in rows:
        none = row["n"] == 0
        rate = "nothing judged" if none else f"{row['win']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        counts = [str(row[name]) for name in ("n", "wins", "ties", "losses")]
        cell = [row["policy"], row["against"], rate, *counts, "" if none else f"{row['length_win']:.3f}"]
        both = ("?" if row[name] is None else f"{row[name]:.0f}" for name in ("tokens", "tokens_against"))
        cells.append([*cell, " / ".join(both)] if known else cell)
    table(columns, cells)
    for note in found.record["notes"]:
        typer.echo(f"note: {note}")
    typer.echo(f"intervals: {found.record['intervals']}")
    typer.echo(plain(str(out)))
