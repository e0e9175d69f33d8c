"""bon."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from warmerge.cli.scoring import (
    AdaptedModel,
    Address,
    BatchTokens,
    Device,
    Dtype,
    Engine,
    MaxLength,
    Resamples,
    Seed,
    SkipBadRows,
    Template,
    TrustRemoteCode,
    loading_of,
    measuring_of,
)
from warmerge.cli.shared import Debug, Json, Offline, Overwrite, Threads, bar, errors, warn
from warmerge.cli.tables import print_best_of_n, print_json
from warmerge.errors import UsageError

if TYPE_CHECKING:
    from warmerge.pipeline.bon import Policy

_POOL, _SAMPLING, _PROXIES, _DATA, _OUTPUT = "Pool", "Sampling a policy", "Proxies", "Data", "Output"


def bon(
    out: Annotated[
        Path,
        typer.Option("-o", "--out", rich_help_panel=_OUTPUT, help="Folder for choices, rewards, results and figures."),
    ],
    pool: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", rich_help_panel=_POOL, help="Rows with prompt, candidates and perhaps gold (a list)."
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="LM",
            rich_help_panel=_POOL,
            help="Instead: a language model to sample the pool from, into OUT/pool.jsonl.",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="PATH", rich_help_panel=_POOL, help="For --policy: rows with prompt. Each is asked once."),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            "-n",
            rich_help_panel=_POOL,
            help="N: answers to choose from, and to sample (64 if not given). Of a pool, as many as every prompt has.",
        ),
    ] = None,
    min_candidates: Annotated[
        int, typer.Option(metavar="K", rich_help_panel=_POOL, help="Leave out and count prompts with fewer candidates.")
    ] = 1,
    temperature: Annotated[
        float, typer.Option(rich_help_panel=_SAMPLING, help="1 samples the policy as it is; lower: likelier tokens.")
    ] = 1.0,
    top_p: Annotated[
        float,
        typer.Option("--top-p", rich_help_panel=_SAMPLING, help="Only the likeliest tokens of this share; 1: all."),
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(rich_help_panel=_SAMPLING, help="Of one answer.")] = 256,
    policy_template: Annotated[
        str, typer.Option(rich_help_panel=_SAMPLING, help="How prompts become text: auto, chat or plain.")
    ] = "auto",
    batch: Annotated[
        int | None,
        typer.Option(rich_help_panel=_SAMPLING, help="Answers in one forward pass; all N of a prompt if not given."),
    ] = None,
    generator: Annotated[
        str, typer.Option(rich_help_panel=_SAMPLING, help="transformers, or vllm where that is installed.")
    ] = "transformers",
    rm: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]CKPT", rich_help_panel=_PROXIES, help="A reward model. Repeatable."),
    ] = None,
    ensemble: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]CKPT,CKPT[,agg=...]",
            rich_help_panel=_PROXIES,
            help="Rewards combined: agg=mean, min, uwo (k=0.5: mean - k variance) or median; scale=raw or std. "
            "A CKPT may be the NAME of an --rm. Repeatable.",
        ),
    ] = None,
    warm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]CKPT,CKPT", rich_help_panel=_PROXIES, help="Weights averaged, in memory. Repeatable."
        ),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            metavar="CKPT|FILE.py:FUNCTION",
            rich_help_panel=_PROXIES,
            help="Judges the choices: a model no proxy was trained with, or a function like TRL's reward functions.",
        ),
    ] = None,
    choose: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_OUTPUT,
            help="Whose choices go into OUT/chosen.jsonl: the first --warm, else the first proxy, if not given.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_OUTPUT,
            help="The proxy (or length, random) that differences are to: the first proxy, if not given.",
        ),
    ] = None,
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
    engine: Engine = "inline",
    address: Address = "auto",
    threads: Threads = None,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Best of N: which answers do a reward model, an ensemble and WARM choose, and what are these worth as N grows?

    The longest answer, a random one, and with gold the best one stand beside them. Each model scores each text once;
    Ctrl-C keeps what is finished, and the same command goes on. Examples:

    warmerge bon --pool pool.jsonl --rm runs/1 --ensemble ens=runs/1,runs/2 --warm warm=runs/1,runs/2 -o bon

    warmerge bon --policy my-sft --prompts prompts.jsonl -n 64 --rm runs/1 --warm runs/1,runs/2 --control big-rm -o bon
    """
    with errors(debug):
        from warmerge.pipeline.bon import best_of_n
        from warmerge.pipeline.proxies import parse_proxies

        proxies = parse_proxies(rm or (), ensemble or (), warm or ())
        sampling = {
            "temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "batch": batch,
            "template": policy_template, "generator": generator,
        }  # fmt: skip
        shared = {"n": n or 64, "seed": seed, "device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        source = _source(pool, policy, prompts, sampling, shared)
        with bar("working", "done") as progress:
            loading = loading_of(device, dtype, template, max_length, trust_remote_code)
            found = best_of_n(
                source, proxies, out, control=control, n=n, chooser=choose, reference=reference,
                min_candidates=min_candidates, engine=engine, address=address, overwrite=overwrite,
                command=["warmerge", *sys.argv[1:]],
                say=lambda line: typer.echo(line, err=True),
                measuring=measuring_of(
                    loading, base, limit, skip_bad_rows, resamples, seed, batch_tokens, threads, progress
                ),
            )  # fmt: skip
        warn(found.warnings)
        if as_json:
            print_json(found.as_json())
        else:
            print_best_of_n(found)


def _source(
    pool: str | None, policy: str | None, prompts: str | None, sampling: dict[str, Any], shared: dict[str, Any]
) -> str | Policy:
    """The pool, or the policy to sample it from. An option that would be ignored is refused."""
    from warmerge.pipeline.bon import Policy
    from warmerge.pipeline.sampling import Sampling

    if (pool is None) == (policy is None):
        raise UsageError("give either --pool, or --policy and --prompts to sample one")
    if policy is not None:
        if prompts is None:
            raise UsageError("--policy: --prompts is missing, the rows with the prompts to ask it")
        return Policy(policy, prompts, Sampling(**sampling, **shared))
    default = Sampling()
    given = [f"--{name.replace('_', '-')}" for name, value in sampling.items() if value != getattr(default, name)]
    given += ["--prompts"] if prompts is not None else []
    if given:
        spelled = ", ".join(given).replace("--template", "--policy-template")
        raise UsageError(f"{spelled}: only for sampling, which goes with --policy and not with --pool")
    assert pool is not None
    return pool
