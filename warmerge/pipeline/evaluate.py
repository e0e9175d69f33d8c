"""`warmerge eval`: members, their ensembles, their average and what they must beat, in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from warmerge.errors import Finding, RefusedError, UsageError, plain, quoted
from warmerge.pipeline.prepare import Spec, mixture, prepare, short_labels
from warmerge.pipeline.scoring import (
    Asked,
    Found,
    check_scoring,
    cuts_of,
    doubts_of_mixing,
    remove_units,
    score_all,
    unit_folder,
)
from warmerge.pipeline.scoring.judge import Judge, open_model
from warmerge.report.results import EVAL, check_results, try_results, write_results
from warmerge.rewards import metrics
from warmerge.rewards.bench import Bench, Measuring, Subset, answer_lengths, open_bench, results_record
from warmerge.rewards.corruption import memorised, read_corruption, split_by_corruption
from warmerge.rewards.ensembles import ENSEMBLES, Scored, constant, ensemble_moved, with_ensembles
from warmerge.rewards.rows import parse_named
from warmerge.rewards.smoothness import Sample, movements, sample_changes
from warmerge.weights.checkpoint import read_json
from warmerge.weights.locate import open_checkpoint
from warmerge.weights.output import MANIFEST
from warmerge.weights.samples import read_sample, same_contents

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from warmerge.rewards.layouts import Text

    Array = NDArray[numpy.float64]
    Texts = Sequence[tuple[Text, Text]]

AVERAGE, START, LENGTH = "average", "start", "length only"
MEMBERS_MEAN, HALFWAY_MEAN, HALFWAY = "mean of the members", "mean of the half-way models", "half-way to start"


@dataclass(frozen=True)
class Evaluation:
    """What `eval` found. Rows are plain: what is in eval.json, eval.csv and the other files.

    `rows`: a model on a set; `differences`: of accuracies between two models, paired; `movements`: how far small
    changes move the reward; `notes`: what a reader should know; `warnings`: reasons for doubt of the merge.
    """

    rows: tuple[dict[str, Any], ...]
    differences: tuple[dict[str, Any], ...]
    movements: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    warnings: tuple[Finding, ...]
    record: Mapping[str, Any] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        return {
            **self.record,
            "rows": list(self.rows),
            "differences": list(self.differences),
            "movements": list(self.movements),
            "notes": list(self.notes),
            "warnings": [str(warning) for warning in self.warnings],
        }


def evaluate(
    checkpoints: Sequence[Spec],
    data: Sequence[str],
    *,
    out: Spec | None = None,
    init: Spec | None = None,
    beside: Sequence[Spec] = (),
    with_average: bool = True,
    perturb_answers: int = 0,
    mask: Spec | None = None,
    measuring: Measuring | None = None,
    engine: str = "inline",
    address: str = "auto",
    overwrite: bool = False,
    command: Sequence[str] = (),
) -> Evaluation:
    """Accuracy of each checkpoint, of their ensembles and of their average (computed in memory), side by side.

    Args:
        checkpoints: reward models; two or more are also averaged. One that warmerge merged earlier is measured beside
            them, and is no member: it would be averaged with what it was made of.
        data: sets of preference pairs, each `NAME=PATH` or `PATH`.
        out: a folder for eval.json, the tables as CSV, and the figure.
        init: the start that the members share: also measured itself, and half-way between it and each member. An
            average has to beat plain shrinkage to be worth its cost.
        beside: models, each `NAME=CKPT` or `CKPT`, to measure beside the members: never averaged, in no ensemble.
        with_average: False compares models that cannot be averaged.
        perturb_answers: so many answers of each set are also scored after small changes that should not matter.
        mask: a corruption.json; the set that it is of is split into swapped and clean pairs.
        measuring: how models are loaded and scored, sets are read and intervals made.
        engine, address: models score in this process ("inline"), or in parts on "local" or "ray" as in `train`, the
            last on the cluster at `address`; these need `out`.

    Raises:
        UsageError, RefusedError, RemoteError: see warmerge.errors. Nothing was scored before a UsageError.

    Example:
        >>> import warmerge
        >>> found = warmerge.evaluate(["runs/1", "runs/2"], ["val=val.jsonl"])  # doctest: +SKIP
        >>> found.rows[0]["accuracy"]  # doctest: +SKIP
        0.7123
    """
    measuring = measuring or Measuring()
    if perturb_answers < 0:
        raise UsageError(f"--perturb: expected a number of answers, found {perturb_answers}")
    check_scoring(engine, measuring, None if out is None else Path(out))
    named = dict(zip(_names(checkpoints), checkpoints, strict=True))
    merged = {name: checkpoint for name, checkpoint in named.items() if _was_merged(checkpoint, measuring.base)}
    members = {name: checkpoint for name, checkpoint in named.items() if name not in merged} or named
    if out is not None:
        check_results(Path(out), EVAL, overwrite)
    bench = open_bench(data, measuring)
    if mask is not None:
        bench.sets = split_by_corruption(bench.sets, read_corruption(Path(mask)))
    merges, warnings = _merges(members, init, measuring.base, with_average)
    extra = _beside(beside, named, measuring.base)
    samples = sample_changes(bench, perturb_answers) if perturb_answers else []
    passes = len(named) + len(extra) + len(merges) + (init is not None)
    changed = (len(members) + (len(merges) > 0)) * sum(len(sample.changed) for sample in samples)
    measuring.on_work(passes * sum(map(len, bench.texts().values())) + changed)
    others = [] if init is None else [(START, init, "start")]
    others += [(name, spec, "merged") for name, spec in merged.items() if members is not named]
    others += [(name, spec, "beside") for name, spec in extra.items()]
    models = _models(members, others, merges, measuring.base)
    asked = [Asked(model.judge, _lists(model, bench, samples)) for model in models]
    units = None if out is None else unit_folder(Path(out) / f"{EVAL}.json")
    if out is not None:
        try_results(Path(out), EVAL)
    answers = list(score_all(asked, measuring, engine=engine, address=address, store=units))
    scored, moved, doubts = _scored(models, answers, bench)
    doubts += doubts_of_mixing((model.name, one.computed) for model, one in zip(models, answers, strict=True))
    lengths = {name: answer_lengths(texts) for name, texts in bench.texts().items()}
    apart = [model for model in scored if model.kind == "beside"]
    compared = [*with_ensembles(scored), *apart, Scored(LENGTH, "baseline", lengths)]
    rows, differences = _compare(bench, compared)
    moves = movements(bench, samples, {model.name: model.rewards for model in compared}, ensemble_moved(scored, moved))
    fingerprints = {model.name: model.fingerprint for model in scored if model.fingerprint is not None}
    cuts = cuts_of(answers, bench.texts())
    record = results_record("eval 1", command, [*checkpoints, *extra.values()], fingerprints, bench, cuts)
    notes = [*record["notes"], *_notes(scored), *memorised(bench.sets, rows)]
    found = tuple(dict.fromkeys((*warnings, *doubts)))
    result = Evaluation(tuple(rows), tuple(differences), tuple(moves), tuple(notes), found, record)
    if out is not None:
        write_results(Path(out), EVAL, result.as_json(), overwrite=overwrite)
    if units is not None:
        remove_units(asked, measuring, units)
    return result


def _names(checkpoints: Sequence[Spec]) -> list[str]:
    """What the table calls the checkpoints: never what it calls something else."""
    twice = [str(checkpoint) for checkpoint in checkpoints if checkpoints.count(checkpoint) > 1]
    if twice:
        raise UsageError(f"{plain(twice[0])} is given twice; give each checkpoint once")
    taken = {AVERAGE, START, LENGTH, *ENSEMBLES}
    return [f"checkpoint {name}" if name in taken else name for name in short_labels(checkpoints)]


def _beside(given: Sequence[Spec], named: Mapping[str, Spec], base: Spec | None) -> dict[str, Spec]:
    """Models to measure beside `named`, none of which they are, each by a name that nothing else in the table has."""
    taken = {AVERAGE, START, LENGTH, MEMBERS_MEAN, HALFWAY_MEAN, *ENSEMBLES, *named, *(f"{n} {HALFWAY}" for n in named)}
    found: dict[str, Spec] = {}
    for name, checkpoint in (parse_named(str(spec)) for spec in given):
        if name in taken or name in found or name.startswith("best member ("):
            advice = f"name {plain(checkpoint)} otherwise, as in other={plain(checkpoint)}"
            raise UsageError(f"--beside: the table has a row {quoted(name)} of something else; {advice}")
        found[name], own = checkpoint, open_checkpoint(checkpoint, base)
        for other in (open_checkpoint(spec, base) for spec in named.values()):
            if same_contents((other, own), (read_sample(other), read_sample(own))):
                what = f"has the same weights as {plain(other.label)}; give it once, as a member or with --beside"
                raise RefusedError([Finding(own.label, what)])
    return found


def _was_merged(checkpoint: Spec, base: Spec | None) -> bool:
    """Whether warmerge.json says that a merge made it. What cannot be opened is refused later, with everything else."""
    try:
        manifest = read_json(open_checkpoint(checkpoint, base).folder, MANIFEST)
    except RefusedError:
        return False
    return "rule" in (manifest or {})


@dataclass(frozen=True)
class Model:
    """A row of the table before it is one."""

    name: str
    kind: str
    judge: Judge


def _merges(
    members: Mapping[str, Spec], init: Spec | None, base: Spec | None, with_average: bool
) -> tuple[list[Model], list[Finding]]:
    """The average, and with `init` each member half-way back to it; every merge is checked as `average` checks it."""
    if len(members) < 2 or not with_average:
        if init is not None:
            raise UsageError("--init compares with an average: give two checkpoints or more, without --no-average")
        return [], []
    specs = tuple(members.values())
    prepared = prepare(specs, base=base)
    average = Judge(AVERAGE, prepared.plan.members, prepared.fingerprints, prepared.plan, (), specs, base)
    merges, warnings = [Model(AVERAGE, "average", average)], [*prepared.warnings]
    for name, checkpoint in members.items() if init is not None else ():
        assert init is not None
        # float32: members and start may be stored in different dtypes.
        pair = prepare([checkpoint, init], base=base, dtype="float32")
        label, plan = f"{name} {HALFWAY}", mixture(pair.plan.members, (0.5, 0.5), "float32")
        halfway = Judge(label, plan.members, pair.fingerprints, plan, (), (checkpoint, init), base, "float32")
        merges.append(Model(label, "halfway", halfway))
        warnings += pair.warnings
    return merges, warnings


def _models(
    members: Mapping[str, Spec], others: Sequence[tuple[str, Spec, str]], merges: Sequence[Model], base: Spec | None
) -> list[Model]:
    """All models in the order in which they are scored. Merges are poured into the last one before them, a member: the
    start may have another dtype."""
    loaded = [*others, *((name, spec, "member") for name, spec in members.items())]
    models = [Model(name, kind, open_model(spec, base)) for name, spec, kind in loaded]
    host = models[-1].judge
    return [*models, *(replace(merge, judge=replace(merge.judge, into=host)) for merge in merges)]


def _lists(model: Model, bench: Bench, samples: Sequence[Sample]) -> tuple[Texts, ...]:
    """The texts of every set; for members and average then the changed answers."""
    changed = (sample.changed for sample in samples if model.kind in ("member", "average"))
    return (*bench.texts().values(), *changed)


def _scored(
    models: Sequence[Model], answers: Sequence[Found], bench: Bench
) -> tuple[list[Scored], dict[str, list[Array]], list[Finding]]:
    """Every model's rewards of the sets, of the changed answers (members and average), and doubts of the models."""
    scored: list[Scored] = []
    moved: dict[str, list[Array]] = {}
    doubts: list[Finding] = []
    names = list(bench.texts())
    for model, found in zip(models, answers, strict=True):
        merged = model.judge.plan is not None
        rewards, seconds = dict(zip(names, found.rewards, strict=False)), sum(found.seconds[: len(names)])
        weights = None if merged else model.judge.fingerprints[0]
        scored.append(Scored(model.name, model.kind, rewards, seconds, found.weights_bytes, weights))
        doubts += [] if merged else found.doubts
        if model.kind in ("member", "average"):
            moved[model.name] = list(found.rewards[len(names) :])
    return scored, moved, doubts


def _compare(bench: Bench, models: Sequence[Scored]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Accuracy of each model on each set, and the average's difference to what it has to beat, paired by prompt."""
    rows: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    for subset in bench.sets:
        rewards = numpy.stack([model.rewards[subset.scored] for model in models])
        margins = subset.margins(rewards)
        right = metrics.right(margins)
        accuracies, drawn = bench.means(subset, right)
        lengths = answer_lengths(subset.texts.texts)
        for k, model in enumerate(models):
            found = metrics.interval(float(accuracies[k]), drawn[:, k], subset.prompts, bounds=(0.0, 1.0))
            rows.append(
                {
                    "set": subset.name, "model": model.name, "kind": model.kind,
                    "n": subset.n, "prompts": subset.prompts,
                    "accuracy": found.value, "low": found.low, "high": found.high, "ties": metrics.ties(margins[k]),
                    "reward_mean": float(rewards[k].mean()), "reward_std": float(rewards[k].std()),
                    "length_correlation": metrics.correlation(rewards[k], lengths),
                    "seconds": model.seconds, "weights_bytes": model.weights_bytes,
                }
            )  # fmt: skip
        differences += _differences(subset, models, right, drawn)
    return rows, differences


def _differences(subset: Subset, models: Sequence[Scored], right: Array, drawn: Array) -> list[dict[str, Any]]:
    """The average's accuracy minus that of others, with paired intervals. The best member is the best of this set."""
    kinds = [model.kind for model in models]
    if "average" not in kinds:
        return []
    at = {kind: [k for k, other in enumerate(kinds) if other == kind] for kind in kinds}
    names = [model.name for model in models]
    others = {f"best member ({names[best]})": [best] for best in [max(at["member"], key=lambda k: right[k].mean())]}
    others |= {MEMBERS_MEAN: at["member"]} | {names[k]: [k] for k in at["ensemble"]}
    others |= {"start": at["start"]} if "start" in at else {}
    others |= {HALFWAY_MEAN: at["halfway"]} if "halfway" in at else {}
    others |= {names[k]: [k] for k in at.get("beside", ())}
    (average,) = at["average"]
    rows = []
    for name, columns in others.items():
        replicates = drawn[:, average] - drawn[:, columns].mean(axis=1)
        found = metrics.difference(right[average] - right[columns].mean(axis=0), replicates, subset.texts.clusters)
        rows.append({"set": subset.name, "a": AVERAGE, "b": name, "n": subset.n, "prompts": subset.prompts,
                     "difference": found.value, "low": found.low, "high": found.high})  # fmt: skip
    return rows


def _notes(scored: Sequence[Scored]) -> list[str]:
    """What a reader of the table should know, from this run's numbers."""
    members = [entry for entry in scored if entry.kind == "member"]
    notes = [
        f"{plain(key)}: {plain(name)} gives every text the same reward, so that all its comparisons are ties; what "
        "needs a scale (standardised ensembles, small changes) is left out"
        for name, key in constant(members)
    ]
    if any(entry.kind == "average" for entry in scored):
        notes.append("the best member is picked on the very set that it is reported on, which flatters it")
    for key in members[0].rewards:
        stds = [float(member.rewards[key].std()) for member in members]
        if max(stds) > 2 * min(stds):
            spans = ", ".join(f"{plain(member.name)} {std:.3g}" for member, std in zip(members, stds, strict=True))
            what = f"the members' reward scales differ (std {spans}); raw ensembles follow the largest"
            notes.append(f"{plain(key)}: {what}")
    return notes
