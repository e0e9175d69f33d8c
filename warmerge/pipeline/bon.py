"""`warmerge bon`: the best of N answers by single reward models, ensembles and averages, and what each choice is worth.

OUT/pool.jsonl           where a policy was sampled: prompts and their answers
OUT/scores.safetensors   each model's reward of each text, kept as soon as it is finished
OUT/.scores...units      on an engine: parts of that, until all are finished
OUT/chosen.jsonl         the best of N for each prompt
OUT/bon.json, bon*.csv   every number; bon.png, bon-wins.png and .svg are drawn from them
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from warmerge.errors import Finding, UsageError, counted, plain, quoted, some
from warmerge.pipeline.prepare import Spec
from warmerge.pipeline.proxies import LENGTH, RANDOM, WARM, Proxy
from warmerge.pipeline.proxies.choosers import (
    Key,
    check_chosen,
    choosers_of,
    cost_words,
    doubts_after,
    doubts_before,
    open_judges,
    proxy_rows,
    targets_of,
    write_chosen,
)
from warmerge.pipeline.sampling import SampledPool, Sampling, sample_pool
from warmerge.pipeline.scoring import check_scoring
from warmerge.pipeline.scoring.judge import Judge
from warmerge.pipeline.scoring.rewarders import is_function, load_rewarder, open_rewarder
from warmerge.pipeline.scoring.scorebook import Scores, open_book
from warmerge.report.results import BON, check_results, without_nan, write_results
from warmerge.rewards.bench import Measuring, cut_words
from warmerge.rewards.metrics import FEW
from warmerge.rewards.pool_curves import Ragged, pool_curves
from warmerge.rewards.pools import Pool, read_pool
from warmerge.version import versions

POOL, CHOSEN = "pool.jsonl", "chosen.jsonl"


@dataclass(frozen=True)
class Policy:
    """A language model to sample the pool from, and what to ask it.

    `checkpoint` is a folder or a Hub id, `prompts` a file with a column `prompt`.
    """

    checkpoint: Spec
    prompts: str
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class BestOfN:
    """What `bon` found. Rows are plain: what is in bon.json and the CSV files.

    `rows`: a proxy's best-of-n at one n; `differences`: to one of them; `wins`: of one proxy over another; `peaks`
    and `fits`: of a proxy's curve; `proxies`: what each is made of and costs. `chosen` is the file of choices.
    """

    rows: tuple[dict[str, Any], ...]
    differences: tuple[dict[str, Any], ...]
    wins: tuple[dict[str, Any], ...]
    peaks: tuple[dict[str, Any], ...]
    fits: tuple[dict[str, Any], ...]
    proxies: tuple[dict[str, Any], ...]
    chosen: Path
    warnings: tuple[Finding, ...]
    record: Mapping[str, Any] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        names = ("rows", "differences", "wins", "peaks", "fits", "proxies")
        tables = {name: list(getattr(self, name)) for name in names}
        return {**self.record, **tables, "chosen": str(self.chosen), "warnings": [str(w) for w in self.warnings]}


def best_of_n(
    pool: Spec | Policy,
    proxies: Sequence[Proxy],
    out: Spec,
    *,
    control: Spec | None = None,
    n: int | None = None,
    chooser: str | None = None,
    reference: str | None = None,
    min_candidates: int = 1,
    measuring: Measuring | None = None,
    engine: str = "inline",
    address: str = "auto",
    overwrite: bool = False,
    command: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> BestOfN:
    """Chooses among each prompt's candidates by every proxy, and measures what the choices are worth, from n = 1 to N.

    Every model scores each text once; ensembles are computed from their members' rewards. Beside the proxies stand the
    longest answer, a random one, and where the pool has `gold`, or a function is the control, the best one.

    Args:
        pool: a file with `prompt`, `candidates` and perhaps `gold`, or a policy to sample it from into OUT/pool.jsonl.
        proxies: reward models, ensembles, averages.
        out: a folder for choices, results and figures.
        control: a reward model that no proxy was trained with, to judge the choices by; or `FILE.py:FUNCTION`, with
            the signature of TRL's reward functions, that says what they are worth.
        n: the N of the choices, and the largest on the curves; as many as every prompt has if not given.
        chooser: the proxy whose choices go into chosen.jsonl; the first average, else the first proxy.
        reference: the proxy or baseline that differences are to; the first proxy if not given.
        min_candidates: leave out and count the prompts that have fewer.
        measuring: how models are loaded and scored, rows are read (`limit` counts prompts) and intervals made.
        engine, address: models score in this process ("inline"), or as parts on "local" or "ray" as in `train`, the
            last on the cluster at `address`. A policy is sampled here.
        say: is told what is being done, a line each.

    Raises:
        UsageError, RefusedError, RemoteError: see warmerge.errors. Models are looked at before anything is sampled.
        Interrupted: Ctrl-C; the same command goes on.

    Example:
        >>> import warmerge
        >>> single = warmerge.Proxy("rm", "rm", ("runs/1",))
        >>> warm = warmerge.Proxy("warm", "warm", ("runs/1", "runs/2"))
        >>> found = warmerge.best_of_n("pool.jsonl", [single, warm], "bon")  # doctest: +SKIP
        >>> found.rows[0]["gold"]  # doctest: +SKIP
        0.1171
    """
    measuring, out = measuring or Measuring(), Path(out)
    chooser, reference = _named(proxies, chooser, reference)
    if n is not None and n < 1:
        raise UsageError(f"-n: expected 1 or more, found {n}")
    check_scoring(engine, measuring, out)
    check_results(out, BON, overwrite)
    if control is not None and is_function(control):
        load_rewarder(open_rewarder(control), measuring)  # a file that is not there, or cannot be run, is told at once
    check_chosen(out / CHOSEN, pool.prompts if isinstance(pool, Policy) else pool, overwrite)
    read, judges, sampled = _opened(pool, proxies, control, out, min_candidates, measuring, overwrite, say)
    size, warnings = _size(read, n)
    warnings += [] if sampled is None else sampled.warnings
    warnings += doubts_before([row.prompt for row in read.rows], proxies, judges, control)
    book = open_book(read.texts, read.fingerprint, measuring, out, overwrite, engine=engine, address=address)
    missing = book.missing(list(judges.values()))
    todo = f"{counted(missing, 'reward')} to compute" if missing else "all rewards are kept from an earlier run"
    say(f"{counted(len(read.texts), 'text')}, {counted(len(judges), 'model')}: {todo}")
    measuring.on_work(missing)
    book.measure(list(judges.values()))
    scores = {key: book.scores(judge) for key, judge in judges.items()}
    targets, exact = targets_of(read, control, scores, measuring)
    choosers = choosers_of(read, proxies, scores, exact)
    warnings += doubts_after(read, choosers, judges, scores)
    curves = pool_curves(choosers, targets, read.clusters, size, measuring.resamples, measuring.seed, reference)
    made = proxy_rows(read, proxies, choosers, scores)
    record = _record(read, judges, control, size, chooser, reference, measuring, command)
    record["notes"] = [*_left_out(sampled), *_notes(read, scores, targets), *cost_words(made, proxies, scores)]
    # Looked at again: another command may have finished here meanwhile.
    check_results(out, BON, overwrite)
    check_chosen(out / CHOSEN, pool.prompts if isinstance(pool, Policy) else pool, overwrite)
    chosen = write_chosen(out / CHOSEN, read, choosers, targets, chooser, size, measuring.seed)
    result = BestOfN(
        curves.rows, curves.differences, curves.wins, curves.peaks, curves.fits, tuple(made), chosen,
        tuple(dict.fromkeys(warnings)), record,
    )  # fmt: skip
    # Of one prompt intervals are infinite, and cannot be drawn.
    write_results(out, BON, without_nan(result.as_json()), overwrite=overwrite)
    return result


def _named(proxies: Sequence[Proxy], chooser: str | None, reference: str | None) -> tuple[str, str]:
    """The proxy whose choices are written, and the one that differences are to."""
    if not proxies:
        raise UsageError("no proxy is given: name reward models with --rm, --ensemble or --warm")
    names = [proxy.name for proxy in proxies]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"two proxies are named {quoted(twice[0])}; give each a name of its own")
    baselines = [LENGTH, RANDOM]
    for flag, name, known in (("--choose", chooser, names), ("--reference", reference, [*names, *baselines])):
        if name is not None and name not in known:
            raise UsageError(f"{flag}: expected one of {some(known, 20)}, found {quoted(name)}")
    first_average = next((proxy.name for proxy in proxies if proxy.kind == WARM), names[0])
    return chooser or first_average, reference or names[0]


def _opened(
    pool: Spec | Policy, proxies: Sequence[Proxy], control: Spec | None, out: Path, min_candidates: int,
    measuring: Measuring, overwrite: bool, say: Callable[[str], None],
) -> tuple[Pool, dict[Key, Judge], SampledPool | None]:  # fmt: skip
    """The pool, sampled if there is none, and the models. What is cheap to refuse comes first: rows before models are
    downloaded, models before an hour of sampling."""
    if not isinstance(pool, Policy):
        read = _read(pool, measuring, min_candidates)
        return read, open_judges(proxies, control, measuring.base), None
    judges = open_judges(proxies, control, measuring.base)
    sampled = _sampled(pool, out, measuring, overwrite, say)
    return _read(sampled.path, measuring, min_candidates), judges, sampled


def _read(source: Spec, measuring: Measuring, min_candidates: int) -> Pool:
    return read_pool(
        source, limit=measuring.limit, seed=measuring.seed, skip_bad_rows=measuring.skip_bad_rows,
        min_candidates=min_candidates,
    )  # fmt: skip


def _sampled(
    policy: Policy, out: Path, measuring: Measuring, overwrite: bool, say: Callable[[str], None]
) -> SampledPool:
    """Samples the policy, or what is missing of it, into OUT/pool.jsonl."""
    sampling = policy.sampling
    say(f"sampling {sampling.n} answers of {plain(str(policy.checkpoint))} to each prompt of {plain(policy.prompts)}")
    return sample_pool(
        policy.checkpoint, policy.prompts, out / POOL, sampling, limit=measuring.limit,
        skip_bad_rows=measuring.skip_bad_rows, overwrite=overwrite, on_work=measuring.on_work,
        progress=measuring.progress,
    )  # fmt: skip


def _size(pool: Pool, n: int | None) -> tuple[int, list[Finding]]:
    """The largest n that every prompt has candidates for, and what has to be said of that."""
    smallest, largest = min(pool.sizes), max(pool.sizes)
    warnings = []
    if smallest < largest and (n is None or n > smallest):
        what = f"has {smallest} to {largest} candidates for a prompt, so n ends at {smallest}"
        warnings.append(Finding(pool.source, f"{what}; --min-candidates leaves out prompts with fewer"))
    elif n is not None and n > smallest:
        warnings.append(Finding(pool.source, f"has {smallest} candidates for a prompt, so n ends there, not at {n}"))
    if smallest == 1:
        warnings.append(Finding(pool.source, "has a prompt with one candidate: there is nothing to choose from"))
    prompts = len(set(pool.clusters))
    if prompts < FEW:
        what = f"has {counted(prompts, 'prompt')}: intervals over so few are too narrow to be trusted"
        warnings.append(Finding(pool.source, what if prompts > 1 else "has one prompt: there are no intervals"))
    return smallest if n is None else min(n, smallest), warnings


def _record(
    pool: Pool, judges: Mapping[Key, Judge], control: Spec | None, n: int, chooser: str, reference: str,
    measuring: Measuring, command: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """What bon.json says of how it came about."""
    function = open_rewarder(control) if control is not None and is_function(control) else None
    rule = {} if function is None else {f"function {plain(str(control))}": function.contents()}
    return {
        "format": "warmerge bon 1",
        "command": list(command),
        "versions": versions(),
        "pool": {
            "source": pool.source, "prompts": len(set(pool.clusters)), "rows": len(pool.rows),
            "candidates": sum(pool.sizes), "texts": len(pool.texts), "smallest": min(pool.sizes),
            "largest": max(pool.sizes), "gold": pool.gold is not None, "skipped_rows": pool.skipped,
            "short_rows": pool.short, "fingerprint": pool.fingerprint,
        },
        "control": None if control is None else str(control),
        "n": n,
        "chooser": chooser,
        "reference": reference,
        "fingerprints": {plain(" ".join(key)): list(judge.fingerprints) for key, judge in judges.items()} | rule,
        "intervals": measuring.intervals(),
        "loading": asdict(measuring.loading),
    }  # fmt: skip


def _left_out(sampled: SampledPool | None) -> list[str]:
    """How many rows of the prompts were not asked: what the pool itself does not show."""
    if sampled is None:
        return []
    notes = []
    if sampled.skipped:
        notes.append(f"{counted(sampled.skipped, 'prompt')} not asked: bad rows, or too long for the policy")
    if sampled.repeats:
        notes.append(f"{counted(sampled.repeats, 'row')} of a prompt that was asked already")
    return notes


def _notes(pool: Pool, scores: Mapping[Key, Scores], targets: Mapping[str, Ragged]) -> list[str]:
    """What a reader of the tables should know of the data."""
    notes = []
    most = max(scores.values(), key=lambda entry: entry.prompt_cut + entry.answer_cut)
    if words := cut_words(len(pool.texts), most.prompt_cut, most.answer_cut):
        notes.append(words)
    repeats, candidates = sum(len(at) - len(set(at.tolist())) for at in pool.at), sum(pool.sizes)
    alike = sum(len(set(at.tolist())) == 1 for at in pool.at)
    if repeats:
        words = f"{repeats} of {candidates} candidates repeat another one of their prompt"
        no_choice = f"; for {counted(alike, 'prompt')} all are the same, and there is no choice"
        notes.append(words + (no_choice if alike else ""))
    unfinished = sum(row.unfinished for row in pool.rows)
    if unfinished:
        notes.append(f"{unfinished} of {candidates} candidates were cut off where they were sampled")
    for count, why in ((pool.skipped, "bad rows"), (pool.short, "prompts with too few candidates")):
        notes += [f"{count} {why} were left out"] if count else []
    if not targets:
        notes.append(
            "no gold and no --control: only what proxies think of their choices is known, not what these are worth"
        )
    return notes
