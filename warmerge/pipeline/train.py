"""train: M diverse reward models from one linearly probed start. WARM, sections 3.1 and 3.2 (arXiv 2401.12187)."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from warmerge.errors import Finding, Interrupted, UsageError, WarmergeError
from warmerge.pipeline.engine import Outcome, Unit, check_engine, run_units, stop_requested
from warmerge.pipeline.engine.child import only_worker
from warmerge.report.results import TRAINING, write_results
from warmerge.rewards.bench import Measuring
from warmerge.training.member import ROWS
from warmerge.training.preparation import CORRUPTION, Run, prepare_run
from warmerge.training.ranks import check_batch, check_launcher, on_all_ranks, refuse_copies
from warmerge.training.recipe import Member, Recipe
from warmerge.training.record import MEMBERS, Asked
from warmerge.training.settings import TrainSettings
from warmerge.training.sft import SftRecipe
from warmerge.training.unit import RESULT, run_member

Spec = str | Path
# Points of a learning curve: each is the mean over so many steps that there are at most so many.
_POINTS = 60


@dataclass(frozen=True)
class Trained:
    """The members of a run, best first on the first validation set.

    `members` are rows of the table; one that failed says why under "failed". `start` is how the start does on each
    set. `curves` and `accuracies` are the rows of the figure.
    """

    out: Path
    members: tuple[dict[str, Any], ...]
    start: dict[str, dict[str, float]]
    curves: tuple[dict[str, Any], ...]
    accuracies: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    warnings: tuple[Finding, ...]
    next: tuple[str, ...]

    @property
    def failed(self) -> tuple[dict[str, Any], ...]:
        return tuple(row for row in self.members if row["failed"])

    def as_json(self) -> dict[str, Any]:
        words = {"out": str(self.out), "warnings": [str(warning) for warning in self.warnings]}
        return {**{key: value for key, value in vars(self).items() if key != "curves"}, **words}


def train(
    base: Spec | Sequence[Spec],
    data: Spec,
    out: Spec,
    *,
    val: Sequence[str] = (),
    settings: TrainSettings | None = None,
    sft: SftRecipe | None = None,
    probe: bool = True,
    corrupt: float = 0.0,
    corrupt_seed: int = 0,
    engine: str = "local",
    address: str = "auto",
    measuring: Measuring | None = None,
    command: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Trained | None:
    """Members that start from one head, and so can be averaged, in `out`/members; with a table and learning curves.

    Calling it again goes on: finished members are kept, interrupted ones resume to the same weights.

    Args:
        base: a causal language model, an encoder or a reward model; or several, a start each.
        data: preference pairs to train on.
        out: the run's folder.
        val: sets of pairs to measure members on, `NAME=PATH` or `PATH` each. They are ranked on the first.
        settings: how members are trained and what differs between them.
        sft: fine-tune a causal language model on the chosen answers first, and start members from several of its
            checkpoints (WARM, "Baklava").
        probe: fit the head before members are trained. Without it members are hardly connected: for the ablation.
        corrupt, corrupt_seed: swap exactly round(corrupt * n) of the training labels.
        engine, address: "local", "inline" (in this process), or "ray" on the cluster at `address`.
        measuring: how texts are rendered and cut, sets are read, models measured.
        say: is told what is being done, a line each.

    Returns:
        None on all ranks but the first, where `torchrun` or `accelerate launch` started several.

    Raises:
        UsageError, RefusedError, RemoteError: see warmerge.errors; nothing was trained.
        Interrupted: stopped by the user; what was done is kept.

    Example:
        >>> import warmerge
        >>> done = warmerge.train("org/language-model", "pairs.jsonl", "runs", val=["val.jsonl"])  # doctest: +SKIP
        >>> warmerge.average([f"runs/members/{row['member']}" for row in done.members], "warm")  # doctest: +SKIP
    """
    settings = settings or TrainSettings(Recipe(steps=0, batch=128, warmup=0, precision="auto"))
    measuring = measuring or Measuring()
    bases = (str(base),) if isinstance(base, str | Path) else tuple(map(str, base))
    if not bases:
        raise UsageError("--base is missing: the model that every member starts from")
    missing = [name for name in ("accelerate", "peft") if find_spec(name) is None]
    if missing:
        raise UsageError(f"train needs {' and '.join(missing)}: pip install 'warmerge[train]'")
    refuse_copies()
    check_launcher(settings.recipe.shard)
    check_engine(engine, measuring.threads)
    asked = Asked(bases, str(data), settings, tuple(val), sft, probe, (corrupt, corrupt_seed))
    out = Path(out)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _train_on_ranks(asked, out, engine, measuring, command, say)
    run = prepare_run(asked, out, measuring, command, say)
    units = [_unit(out, member) for member in run.members if not (out / MEMBERS / member.name / RESULT).exists()]
    say(f"training {len(units)} of {len(run.members)} members, {run.members[0].recipe.steps:,} steps each")
    outcomes = run_units(
        units, engine=engine, address=address, threads=measuring.threads, while_waiting=_counted(units, measuring, run),
    )  # fmt: skip
    return _finished(asked, run, {outcome.unit.folder.name: outcome for outcome in outcomes})


def _unit(out: Path, member: Member) -> Unit:
    folder = out.absolute() / MEMBERS / member.name
    return Unit(f"member {member.name}", f"{run_member.__module__}:{run_member.__name__}", folder)


def _counted(units: Sequence[Unit], measuring: Measuring, run: Run) -> Callable[[], None]:
    """Tells the progress bar of steps that members have written down since it was last asked."""
    seen = {unit.folder / ROWS: (0, 0) for unit in units}
    measuring.on_work(run.members[0].recipe.steps * len(units))

    def look() -> None:
        for rows, (size, count) in seen.items():
            now = rows.stat().st_size if rows.exists() else 0
            if now != size:
                seen[rows] = now, rows.read_bytes().count(b"\n")
                measuring.progress(seen[rows][1] - count)

    return look


def _train_on_ranks(
    asked: Asked, out: Path, engine: str, measuring: Measuring, command: Sequence[str], say: Callable[[str], None]
) -> Trained | None:
    """One process of several that train each member together: the first prepares, all train, the first reports."""
    from datetime import timedelta

    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    if asked.sft is not None:
        raise UsageError("--sft-steps under torchrun: fine-tune first, and give the checkpoints with --init")
    check_batch(asked.settings.recipe.batch, int(os.environ["WORLD_SIZE"]))
    if engine != "local":
        raise UsageError(f"--engine {engine}: under torchrun members are trained by its own processes; leave it away")
    # The others wait while the first one prepares; on a large model the probe alone takes longer than the usual limit.
    # Without cpu=True every process of a machine without a GPU would take itself for the only one.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=12))
    run = prepare_run(asked, out, measuring, command, say) if state.is_main_process else None
    # In the folder there may be more of them, of a run that was larger.
    names = broadcast_object_list([None if run is None else [member.name for member in run.members]])[0]
    outcomes = {}
    with stop_requested() as stop:
        for name in names:
            folder = (out / MEMBERS / name).absolute()
            try:
                with ExitStack() as held:
                    lock = only_worker(folder, stop) if state.is_main_process else nullcontext()
                    on_all_ranks(partial(held.enter_context, lock))
                    run_member(folder, stop)
            except Interrupted:
                raise
            except WarmergeError as error:
                outcomes[name] = Outcome(Unit(f"member {name}", "", folder), "failed", str(error))
    return None if run is None else _finished(asked, run, outcomes)


def _finished(asked: Asked, run: Run, outcomes: dict[str, Outcome]) -> Trained:
    """The table, the figure and what to do next, from what the members have written."""
    rows, curves = [], []
    for member in run.members:
        folder = run.out / MEMBERS / member.name
        result = json.loads((folder / RESULT).read_text()) if (folder / RESULT).exists() else None
        outcome = outcomes.get(member.name)
        failed = "" if result else outcome.message if outcome else "was not trained"
        rows.append(_row(member, result, failed))
        curves += _curve(member, folder)
    names = list(run.start)
    if names:
        rows.sort(key=lambda row: -row["val"].get(names[0], {"accuracy": -1.0})["accuracy"])
    good = sorted(str(run.out / MEMBERS / row["member"]) for row in rows if not row["failed"])
    notes = [*run.notes]
    if names:
        notes.append(f"ranked on {names[0]}: choose members by it, and report on another set")
    trained = Trained(
        run.out,
        tuple(rows),
        run.start,
        tuple(curves),
        tuple(_accuracies(rows, run.start)),
        tuple(notes),
        run.warnings,
        _next(asked, run.out, good),
    )
    if curves:
        table = [{**{k: v for k, v in row.items() if k != "val"}, **_flat(row["val"])} for row in rows]
        content = {**trained.as_json(), "rows": curves, "members": table}
        write_results(run.out, TRAINING, content)
    return trained


def _row(member: Member, result: dict[str, Any] | None, failed: str) -> dict[str, Any]:
    found = {
        "member": member.name,
        "lr": member.lr,
        "dropout": member.dropout,
        "seed": member.seed,
        "init": member.init,
    }
    keys = ("steps", "final_loss", "final_accuracy", "seconds", "tokens", "val")
    return {**found, "failed": failed, **({"val": {}} if result is None else {key: result[key] for key in keys})}


def _flat(val: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{name}_{key}": value for name, entry in val.items() for key, value in entry.items()}


def _accuracies(rows: Sequence[dict[str, Any]], start: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Rows of the figure's panels: start and members on each validation set."""
    found = [{"set": name, **entry, "model": "start", "kind": "start"} for name, entry in start.items()]
    for row in sorted(rows, key=lambda row: str(row["member"])):
        found += [
            {"set": name, **entry, "model": row["member"], "kind": "member"} for name, entry in row["val"].items()
        ]
    return found


def _curve(member: Member, folder: Path) -> list[dict[str, Any]]:
    """Loss and accuracy on the training pairs, each point the mean over as many steps as the others."""
    path = folder / ROWS
    steps = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    width = -(-member.recipe.steps // _POINTS)
    points = []
    for begin in range(0, len(steps), width):
        part = steps[begin : begin + width]
        means = {key: sum(row[key] for row in part) / len(part) for key in ("step", "loss", "accuracy")}
        points.append({"member": member.name, "lr": member.lr, "dropout": member.dropout, "init": member.init, **means})
    return points


def _next(asked: Asked, out: Path, good: Sequence[str]) -> tuple[str, ...]:
    """Commands to go on with."""
    if len(good) < 2:
        return ()
    init = ["--init", str(out / "init")] if (out / "init").is_dir() else []
    data = [word for spec in asked.val or ["VAL"] for word in ("--data", spec)]
    if asked.corruption[0]:
        data += ["--data", f"train={asked.data}", "--mask", str(out / CORRUPTION)]
    return (
        shlex.join(["warmerge", "average", *good, "-o", f"{out}-average"]),
        shlex.join(["warmerge", "eval", *good, *init, *data, "-o", f"{out}-eval"]),
    )
