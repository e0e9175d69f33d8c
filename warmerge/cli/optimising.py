"""rl."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from warmerge.cli.scoring import (
    AdaptedModel,
    BatchTokens,
    Dtype,
    MaxLength,
    SkipBadRows,
    Template,
    TrustRemoteCode,
    loading_of,
    measuring_of,
)
from warmerge.cli.shared import Debug, Json, Offline, Threads, bar, errors, table, warn
from warmerge.cli.tables import print_json
from warmerge.errors import UsageError, plain

if TYPE_CHECKING:
    from warmerge.pipeline.proxies import Proxy
    from warmerge.pipeline.rl import Optimised

_WHAT, _REWARD, _LEARNING, _KEPT = "What is optimised", "Reward", "Learning", "What is kept"
_SPEED, _DATA = "Speed and memory", "Data"
# Rows of the printed table.
_SHOWN = 10


def rl(
    policy: Annotated[
        str, typer.Option(metavar="LM", rich_help_panel=_WHAT, help="The language model to start from, after SFT.")
    ],
    prompts: Annotated[str, typer.Option(metavar="PATH", rich_help_panel=_WHAT, help="Rows with prompt.")],
    out: Annotated[Path, typer.Option("-o", "--out", rich_help_panel=_WHAT, help="Folder of the run.")],
    rm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]CKPT",
            rich_help_panel=_WHAT,
            help="The reward model to optimise, or a FILE.py:FUNCTION. Several, with --ensemble: combined.",
        ),
    ] = None,
    ensemble: Annotated[
        str | None,
        typer.Option(
            metavar="AGG",
            rich_help_panel=_WHAT,
            help="Of several --rm: mean, min, uwo or median; also as uwo,k=1 or min,scale=raw.",
        ),
    ] = None,
    warm: Annotated[
        str | None,
        typer.Option(
            metavar="[NAME=]CKPT,CKPT", rich_help_panel=_WHAT, help="Instead: the average of these, made in memory."
        ),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            metavar="CKPT|FILE.py:FUNCTION",
            rich_help_panel=_WHAT,
            help="Watches, and never moves the policy: a reward model that the proxy was not made from, or a function "
            "(prompts, completions, **kwargs) -> numbers.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(rich_help_panel=_WHAT, help="What figures call the run; the proxy's if not given.")
    ] = None,
    kl_coef: Annotated[
        float, typer.Option(rich_help_panel=_REWARD, help="Times the KL divergence to the start, off the reward.")
    ] = 0.003,
    scale: Annotated[
        str,
        typer.Option(rich_help_panel=_REWARD, help="raw, or std: mean 0, deviation 1 on the start's answers."),
    ] = "raw",
    clip: Annotated[
        float | None,
        typer.Option(rich_help_panel=_REWARD, help="Bound the reward to this, up and down, after --scale."),
    ] = None,
    shaping: Annotated[
        str,
        typer.Option(rich_help_panel=_REWARD, help="none, or sigmoid: sigmoid(r - r of the start's own answer)."),
    ] = "none",
    eos_penalty: Annotated[
        float, typer.Option(rich_help_panel=_REWARD, help="Off the reward of an answer that did not end by itself.")
    ] = 0.0,
    start_answers: Annotated[
        int, typer.Option(rich_help_panel=_REWARD, help="Answers of the start, to measure the rewards' scale on.")
    ] = 128,
    steps: Annotated[int, typer.Option(rich_help_panel=_LEARNING, help="Updates.")] = 3500,
    batch: Annotated[int, typer.Option(rich_help_panel=_LEARNING, help="Answers in each step.")] = 128,
    baseline: Annotated[
        str,
        typer.Option(
            rich_help_panel=_LEARNING,
            help="loo: several answers to a prompt, less the mean of the others. batch: one answer to each, less the "
            "mean of the other prompts'.",
        ),
    ] = "loo",
    answers: Annotated[int, typer.Option(rich_help_panel=_LEARNING, help="To each prompt, with loo.")] = 4,
    lr: Annotated[float, typer.Option(rich_help_panel=_LEARNING, help="Learning rate, constant.")] = 1e-5,
    temperature: Annotated[float, typer.Option(rich_help_panel=_LEARNING, help="Answers are sampled at it.")] = 0.9,
    max_new_tokens: Annotated[int, typer.Option(rich_help_panel=_LEARNING, help="Of one answer.")] = 128,
    policy_template: Annotated[
        str, typer.Option(rich_help_panel=_LEARNING, help="How prompts become text: auto, chat or plain.")
    ] = "auto",
    lora: Annotated[
        int, typer.Option(metavar="RANK", rich_help_panel=_LEARNING, help="Train low-rank adapters; 0: all weights.")
    ] = 0,
    control_every: Annotated[int, typer.Option(rich_help_panel=_KEPT, help="Steps between control rewards.")] = 10,
    samples: Annotated[
        int, typer.Option(rich_help_panel=_KEPT, help="Prompts held out, whose answers are kept to be read.")
    ] = 16,
    sample_every: Annotated[int, typer.Option(rich_help_panel=_KEPT, help="Steps between these.")] = 100,
    keep_every: Annotated[int, typer.Option(rich_help_panel=_KEPT, help="Steps between policies that are kept.")] = 500,
    save_every: Annotated[
        int, typer.Option(rich_help_panel=_KEPT, help="Steps between checkpoints to go on from.")
    ] = 100,
    micro_batch: Annotated[
        int, typer.Option(rich_help_panel=_SPEED, help="Answers in one forward and backward pass.")
    ] = 8,
    precision: Annotated[str, typer.Option(rich_help_panel=_SPEED, help="float32 or bfloat16.")] = "float32",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", rich_help_panel=_SPEED, help="Less memory, more time.")
    ] = False,
    generator: Annotated[
        str, typer.Option(rich_help_panel=_SPEED, help="transformers, or vllm beside the policy on its GPU.")
    ] = "transformers",
    base: AdaptedModel = None,
    device: Annotated[
        str, typer.Option(rich_help_panel=_SPEED, help="auto (a GPU if there is one), cpu or cuda: of all models.")
    ] = "auto",
    dtype: Dtype = "auto",
    template: Template = "auto",
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = None,
    trust_remote_code: TrustRemoteCode = False,
    limit: Annotated[
        int | None, typer.Option(rich_help_panel=_DATA, help="A random sample of so many prompts.")
    ] = None,
    skip_bad_rows: SkipBadRows = False,
    seed: Annotated[
        int, typer.Option(rich_help_panel=_LEARNING, help="Of the order of prompts, and of what is sampled.")
    ] = 0,
    threads: Threads = None,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Optimise a policy against a reward model, an ensemble or WARM, and watch it by a control reward.

    REINFORCE with a leave-one-out baseline, on TRL. A row for each step: proxy, control, members' disagreement, KL,
    length, entropy. Answers to held-out prompts are kept, so that hacking can be read. Ctrl-C or a crash loses nothing:
    the same command goes on. Examples:

    warmerge rl --policy sft --warm runs/1,runs/2 --control big-rm --prompts prompts.jsonl -o rl/warm

    warmerge rl --policy sft --rm runs/1 --rm runs/2 --ensemble min --prompts prompts.jsonl --steps 500 -o rl/min
    """
    with errors(debug):
        from warmerge.pipeline.reinforce.settings import RlSettings
        from warmerge.pipeline.rl import optimise_policy

        proxy = proxy_of(rm or (), ensemble, warm, name)
        settings = RlSettings(
            steps=steps, kl_coef=kl_coef, batch=batch, baseline=baseline, answers=answers, lr=lr,
            temperature=temperature, max_new_tokens=max_new_tokens, seed=seed, scale=scale, clip=clip, shaping=shaping,
            eos_penalty=eos_penalty, start_answers=start_answers, control_every=control_every, samples=samples,
            sample_every=sample_every, keep_every=keep_every, save_every=save_every, micro_batch=micro_batch, lora=lora,
            precision=precision, gradient_checkpointing=gradient_checkpointing, template=policy_template,
            generator=generator, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        with bar("optimising", "steps") as progress:
            loading = loading_of(device, dtype, template, max_length, trust_remote_code)
            measuring = measuring_of(loading, base, limit, skip_bad_rows, 2000, seed, batch_tokens, threads, progress)
            found = optimise_policy(
                policy, proxy, prompts, out, control=control, settings=settings, measuring=measuring,
                command=["warmerge", *sys.argv[1:]], say=lambda line: typer.echo(line, err=True),
            )  # fmt: skip
        if found is None:  # another rank says it
            return
        warn(found.warnings)
        if as_json:
            print_json(found.as_json())
        else:
            _print(found)


def proxy_of(rms: Sequence[str], ensemble: str | None, warm: str | None, name: str | None) -> Proxy:
    """The one reward that is optimised.

    Raises:
        UsageError: none, or several; as `parse_proxies`.
    """
    from warmerge.pipeline.proxies import parse_proxies

    if (warm is None) == (not rms):
        raise UsageError("give either --rm, several --rm with --ensemble, or --warm: one reward is optimised")
    if ensemble is not None and len(rms) < 2:
        raise UsageError("--ensemble: give two --rm or more, whose rewards it combines")
    if ensemble is None and len(rms) > 1:
        raise UsageError(f"{len(rms)} --rm: say how their rewards are combined, as in --ensemble mean; or use --warm")
    if warm is not None:
        (proxy,) = parse_proxies((), (), [warm])
    else:
        singles = parse_proxies(rms)
        joined = [] if ensemble is None else [f"{','.join(each.name for each in singles)},agg={ensemble}"]
        proxy = parse_proxies(rms, joined)[-1]
    return proxy if name is None else replace(proxy, name=name)


def _print(found: Optimised) -> None:
    rows, last = found.rows, len(found.rows) - 1
    shown = sorted({round(i * last / (_SHOWN - 1)) for i in range(_SHOWN)})
    # Where the control was measured, if it was.
    at = [max((j for j in range(i + 1) if rows[j]["control"] is not None), default=i) for i in shown]
    columns = ["step", "proxy", "control", "disagreement", "KL", "tokens", "entropy", "cut off"]
    cells = [
        [
            str(row["step"]), f"{row['proxy']:.3f}", *(_number(row[key]) for key in ("control", "disagreement")),
            f"{row['kl_sequence']:.2f}", f"{row['length']:.1f}", f"{row['entropy']:.2f}", f"{row['truncated']:.0%}",
        ]
        for row in (rows[i] for i in sorted(set(at)))
    ]  # fmt: skip
    table(columns, cells)
    typer.echo("means over a step's answers; KL in nats per answer, entropy in nats per token")
    for note in found.notes:
        typer.echo(note)
    typer.echo(f"policies: {', '.join(plain(str(path)) for path in found.checkpoints.values())}")
    typer.echo(f"next: warmerge rl-report {plain(str(found.out))} -o report")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
