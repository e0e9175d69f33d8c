"""train, probe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from warmerge.cli.scoring import (
    Address,
    BatchTokens,
    Device,
    Dtype,
    Limit,
    MaxLength,
    Out,
    Resamples,
    Seed,
    SkipBadRows,
    Template,
    TrustRemoteCode,
    loading_of,
    measuring_of,
)
from warmerge.cli.shared import CKPT, Debug, Json, Offline, Overwrite, Threads, bar, errors, numbers, warn
from warmerge.cli.tables import print_json, print_probed, print_trained
from warmerge.errors import UsageError, WarmergeError

if TYPE_CHECKING:
    from warmerge.training.sft import SftRecipe

_START, _MEMBERS, _LOSS, _SPEED, _ENGINE = "Start", "Members", "Loss", "Memory and speed", "Engine"


def train(
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Preference pairs to train on: .jsonl[.gz], .parquet, a folder, or a data-set id (org/name:split).",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder of the run. Given again, an interrupted run goes on.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(rich_help_panel=_START, help="A causal language model, an encoder or a reward model."),
    ] = None,
    init: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CKPT",
            rich_help_panel=_START,
            help="Instead of --base: one of several starts, such as your own SFT checkpoints. Repeatable.",
        ),
    ] = None,
    val: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PATH", help="Pairs to measure members on; ranked on the first. Repeatable."),
    ] = None,
    runs: Annotated[int, typer.Option(rich_help_panel=_MEMBERS, help="Members.")] = 6,
    lr: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_MEMBERS,
            help="Learning rates, e.g. 1e-5,4e-5. The paper's 1e-5,4e-5,1e-4 if not given: less above 10^9 parameters, "
            "ten times as much for LoRA.",
        ),
    ] = None,
    dropout: Annotated[
        str, typer.Option(rich_help_panel=_MEMBERS, help="Probabilities, of every dropout of the model.")
    ] = "0.05,0.1",
    draw: Annotated[
        str, typer.Option(rich_help_panel=_MEMBERS, help="grid: all combinations in turn; random: between the ends.")
    ] = "grid",
    epochs: Annotated[float, typer.Option(rich_help_panel=_MEMBERS, help="Times through the pairs.")] = 1.0,
    steps: Annotated[int | None, typer.Option(rich_help_panel=_MEMBERS, help="Optimizer steps, instead.")] = None,
    batch: Annotated[int, typer.Option(rich_help_panel=_MEMBERS, help="Pairs of an optimizer step.")] = 128,
    warmup: Annotated[float, typer.Option(rich_help_panel=_MEMBERS, help="Share of steps of rising rate.")] = 0.05,
    schedule: Annotated[
        str, typer.Option(rich_help_panel=_MEMBERS, help="Of the learning rate after that: linear (to 0) or constant.")
    ] = "linear",
    weight_decay: Annotated[float, typer.Option(rich_help_panel=_MEMBERS, help="Of AdamW.")] = 0.0,
    seed: Annotated[
        int,
        typer.Option(
            rich_help_panel=_MEMBERS,
            help="Members count up from it for data order and dropout; also of every random sample.",
        ),
    ] = 0,
    no_probe: Annotated[
        bool,
        typer.Option("--no-probe", rich_help_panel=_START, help="Do not fit the head first: for the ablation only."),
    ] = False,
    sft_steps: Annotated[
        int,
        typer.Option(
            rich_help_panel=_START,
            help="First fine-tune a language model on the chosen answers for so many steps (Baklava); 0: do not.",
        ),
    ] = 0,
    sft_checkpoints: Annotated[
        int, typer.Option(rich_help_panel=_START, help="So many of its checkpoints, late ones, are starts.")
    ] = 3,
    sft_lr: Annotated[float, typer.Option(rich_help_panel=_START, help="Learning rate of it.")] = 1e-5,
    sft_batch: Annotated[int, typer.Option(rich_help_panel=_START, help="Answers of an optimizer step of it.")] = 32,
    use_margins: Annotated[
        bool, typer.Option("--margins", rich_help_panel=_LOSS, help="Use the pairs' column `margin`.")
    ] = False,
    centring: Annotated[
        float, typer.Option(rich_help_panel=_LOSS, help="Weight of (sum of a pair's rewards)^2, e.g. 0.01.")
    ] = 0.0,
    label_smoothing: Annotated[
        float, typer.Option(rich_help_panel=_LOSS, help="Probability that a label is wrong, 0 to below 0.5.")
    ] = 0.0,
    corrupt: Annotated[
        float, typer.Option(rich_help_panel=_LOSS, help="Swap so large a share of the training labels: an experiment.")
    ] = 0.0,
    corrupt_seed: Annotated[int, typer.Option(rich_help_panel=_LOSS, help="Draws them.")] = 0,
    lora: Annotated[
        int,
        typer.Option(
            metavar="RANK", rich_help_panel=_SPEED, help="Train low-rank adapters of all linear layers; 0: all weights."
        ),
    ] = 0,
    adapter: Annotated[
        bool, typer.Option("--adapter", rich_help_panel=_SPEED, help="With --lora: save adapters, not merged weights.")
    ] = False,
    freeze_embeddings: Annotated[
        bool, typer.Option("--freeze-embeddings", rich_help_panel=_SPEED, help="Leave input embeddings as they are.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", rich_help_panel=_SPEED, help="Less memory, more time.")
    ] = False,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard",
            rich_help_panel=_SPEED,
            help="Under torchrun: divide each member's weights, gradients and optimizer state between the processes.",
        ),
    ] = False,
    precision: Annotated[
        str,
        typer.Option(
            rich_help_panel=_SPEED,
            help="Of the arithmetic: float32, bfloat16, or auto (bfloat16 if the machine this is typed on has a GPU "
            "for it). Weights are float32.",
        ),
    ] = "auto",
    batch_tokens: Annotated[
        int, typer.Option(rich_help_panel=_SPEED, help="Most tokens in one forward pass of training, with padding.")
    ] = 8192,
    save_every: Annotated[
        int, typer.Option(rich_help_panel=_SPEED, help="Steps between checkpoints to go on from.")
    ] = 100,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", rich_help_panel=_SPEED, help="Keep the last one, optimizer and all.")
    ] = False,
    engine: Annotated[
        str,
        typer.Option(
            rich_help_panel=_ENGINE,
            help="local: one member for each GPU at a time, or one on the CPU; ray: on an existing Ray cluster; "
            "inline: in this process, for tiny models.",
        ),
    ] = "local",
    address: Address = "auto",
    threads: Threads = None,
    template: Template = "auto",
    max_length: MaxLength = None,
    trust_remote_code: TrustRemoteCode = False,
    limit: Limit = None,
    skip_bad_rows: SkipBadRows = False,
    resamples: Resamples = 2000,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train diverse reward models from one linearly probed start, so that they can be averaged (WARM).

    Finished members are kept and interrupted ones resumed when the same command is given again. Example:

    warmerge train --base org/language-model --data pairs.jsonl --val val=val.jsonl --runs 6 -o runs
    """
    with errors(debug):
        if data is None or out is None:
            missing = [flag for flag, value in (("--data", data), ("-o", out)) if value is None]
            raise UsageError(f"{' and '.join(missing)} missing; see warmerge train --help")
        if (base is None) == (not init):
            raise UsageError("give --base MODEL, or --init CKPT for each of several starts")
        if steps is not None and steps < 1:
            raise UsageError(f"--steps: expected 1 or more, found {steps}")
        from warmerge.pipeline.train import train as run
        from warmerge.training.member import Recipe
        from warmerge.training.settings import TrainSettings

        recipe = Recipe(
            steps=steps or 0, batch=batch, warmup=0, schedule=schedule, weight_decay=weight_decay,
            label_smoothing=label_smoothing, centring=centring, use_margins=use_margins, lora=lora, adapter=adapter,
            freeze_embeddings=freeze_embeddings, gradient_checkpointing=gradient_checkpointing, shard=shard,
            precision=precision, batch_tokens=batch_tokens, save_every=save_every, keep_checkpoints=keep_checkpoints,
        )  # fmt: skip
        settings = TrainSettings(
            recipe, runs, numbers("--lr", lr) or (), numbers("--dropout", dropout) or (), draw, seed, epochs, warmup
        )
        sft = _sft(sft_steps, sft_checkpoints, sft_lr, sft_batch, seed, precision, max_length, trust_remote_code)
        with bar("working", "") as progress:
            loading = loading_of("auto", "auto", template, max_length, trust_remote_code)
            trained = run(
                init or [str(base)], data, out, val=val or (), settings=settings, sft=sft, probe=not no_probe,
                corrupt=corrupt, corrupt_seed=corrupt_seed, engine=engine, address=address,
                measuring=measuring_of(
                    loading, None, limit, skip_bad_rows, resamples, seed, None, threads, progress
                ),
                command=["warmerge", *sys.argv[1:]], say=lambda line: typer.echo(line, err=True),
            )  # fmt: skip
        if trained is None:  # one of several ranks: the first one reports
            return
        warn(trained.warnings)
        if as_json:
            print_json(trained.as_json())
        else:
            print_trained(trained)
        if trained.failed:
            raise WarmergeError(
                f"{len(trained.failed)} of {len(trained.members)} members failed; the same command tries them again"
            )


def probe(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help=f"A reward model: {CKPT}.", show_default=False)],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PATH", help="Preference pairs to fit the head to. Repeatable."),
    ] = None,
    out: Out = None,
    strength: Annotated[
        str | None,
        typer.Option(help="Of the regularisation: one, or several to choose from on held-out prompts, e.g. 1e-3,1e-1."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    template: Template = "auto",
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = None,
    trust_remote_code: TrustRemoteCode = False,
    limit: Limit = None,
    skip_bad_rows: SkipBadRows = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    offline: Offline = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fit the last layer of a reward model anew, all else frozen: against a bias that all members of an average share.

    Give length-balanced or clean pairs. Example:

    warmerge probe warm --data balanced.jsonl -o warm-probed
    """
    with errors(debug):
        if not data or out is None:
            raise UsageError("--data and -o are needed: pairs to fit the head to, and a folder for the model")
        from warmerge.pipeline.probe import probe as run

        with bar("scoring", "texts") as progress:
            loading = loading_of(device, dtype, template, max_length, trust_remote_code)
            probed = run(
                checkpoint, data, out, strengths=numbers("--strength", strength), overwrite=overwrite,
                command=["warmerge", *sys.argv[1:]],
                measuring=measuring_of(loading, None, limit, skip_bad_rows, 2000, seed, batch_tokens, None, progress),
            )  # fmt: skip
        warn(probed.warnings)
        if as_json:
            print_json(probed.as_json())
        else:
            print_probed(probed)


def _sft(
    steps: int, checkpoints: int, lr: float, batch: int, seed: int, precision: str, max_length: int | None, trust: bool
) -> SftRecipe | None:
    if steps < 0:
        raise UsageError(f"--sft-steps: expected 1 or more, found {steps}")
    if steps == 0:
        return None
    from warmerge.training.settings import precision_here
    from warmerge.training.sft import SftRecipe

    return SftRecipe(
        steps=steps, checkpoints=checkpoints, lr=lr, batch=batch, seed=seed, precision=precision_here(precision),
        max_length=max_length, trust_remote_code=trust,
    )  # fmt: skip
