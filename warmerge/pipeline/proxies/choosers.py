"""From proxies as they were asked for to their rewards of a pool's candidates: each model is opened and scored once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from warmerge.errors import Finding, RefusedError, UsageError, plain, some
from warmerge.pipeline.prepare import Spec
from warmerge.pipeline.proxies import BASELINE, ENSEMBLE, LENGTH, ORACLE, RANDOM, WARM, Proxy
from warmerge.pipeline.scoring import doubts_of_mixing
from warmerge.pipeline.scoring.judge import Judge, open_average, open_judge
from warmerge.pipeline.scoring.rewarders import is_function, load_rewarder, open_rewarder
from warmerge.pipeline.scoring.scorebook import Scores
from warmerge.report.results import write_text
from warmerge.rewards import metrics
from warmerge.rewards.bench import Measuring, answer_lengths
from warmerge.rewards.best_of_n import choose
from warmerge.rewards.ensembles import aggregate
from warmerge.rewards.pool_curves import Chooser, Ragged, tie_orders
from warmerge.rewards.pools import Pool
from warmerge.training.seen import seen_in_training

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from warmerge.rewards.layouts import Text

# The key of a model among the judges: its checkpoint, or for an average the name of its proxy.
Key = tuple[str, str]


def open_judges(proxies: Sequence[Proxy], control: Spec | None, base: Spec | None) -> dict[Key, Judge]:
    """Every model that has to be scored, once: members of several ensembles, an rm that is also a member, the control.

    Raises:
        RefusedError: with the findings of all of them. UsageError, RemoteError: as `open_judge`.
    """
    singles = [checkpoint for proxy in proxies if proxy.kind != WARM for checkpoint in proxy.checkpoints]
    singles += [] if control is None or is_function(control) else [str(control)]
    wanted = {single(checkpoint): partial(open_judge, checkpoint, base) for checkpoint in singles}
    averages = [proxy for proxy in proxies if proxy.kind == WARM]
    wanted |= {merged(proxy): partial(open_average, proxy.name, proxy.checkpoints, base) for proxy in averages}
    judges: dict[Key, Judge] = {}
    findings: list[Finding] = []
    for key, opened in wanted.items():
        try:
            judges[key] = opened()
        except RefusedError as error:
            findings += error.findings
    if findings:
        raise RefusedError(findings)
    if base is not None and not any("adapter" in entry.details for judge in judges.values() for entry in judge.inputs):
        raise UsageError("--base is not used: no checkpoint is a LoRA adapter")
    return judges


def single(checkpoint: Spec) -> Key:
    """The key of a checkpoint among the judges."""
    return "checkpoint", str(checkpoint)


def merged(proxy: Proxy) -> Key:
    """The key of an average among the judges."""
    return "average", proxy.name


def judges_of(proxy: Proxy) -> list[Key]:
    """The models that a proxy's rewards are made of."""
    return [merged(proxy)] if proxy.kind == WARM else [single(checkpoint) for checkpoint in proxy.checkpoints]


def targets_of(
    pool: Pool, control: Spec | None, scores: Mapping[Key, Scores], measuring: Measuring
) -> tuple[dict[str, Ragged], Ragged | None]:
    """What choices are worth, by gold and by the control; and the one of them that is exact, gold or a function.

    Raises:
        UsageError, RefusedError: as `load_rewarder` and the function.
    """
    targets: dict[str, Ragged] = {} if pool.gold is None else {"gold": pool.gold}
    if control is not None and is_function(control):
        given = load_rewarder(open_rewarder(control), measuring).rewards(pool.texts)
        targets["control"] = pool.by_row(given.rewards)
        return targets, targets.get("gold", targets["control"])
    if control is not None:
        targets["control"] = pool.by_row(scores[single(control)].rewards)
    return targets, pool.gold


def choosers_of(
    pool: Pool, proxies: Sequence[Proxy], scores: Mapping[Key, Scores], exact: Ragged | None
) -> list[Chooser]:
    """The proxies, then what they must beat: the longest answer, a random one; and the best one where `exact` says.

    A random choice is a constant reward: ties are broken at random everywhere.

    Raises:
        RefusedError: a member that is to be standardised gives every text the same reward.
    """
    choosers = []
    for proxy in proxies:
        rewards = numpy.stack([scores[key].rewards for key in judges_of(proxy)])
        if proxy.standardize:
            _refuse_flat(proxy, rewards)
        if proxy.kind == ENSEMBLE:
            one = aggregate(rewards, proxy.aggregate, proxy.k, standardize=proxy.standardize)
        else:
            (one,) = rewards
        choosers.append(Chooser(proxy.name, proxy.kind, pool.by_row(one)))
    choosers.append(Chooser(LENGTH, BASELINE, pool.by_row(answer_lengths(pool.texts))))
    choosers.append(Chooser(RANDOM, BASELINE, pool.by_row(numpy.zeros(len(pool.texts))), believes=False))
    return choosers + ([] if exact is None else [Chooser(ORACLE, BASELINE, exact)])


def _refuse_flat(proxy: Proxy, rewards: NDArray[numpy.float64]) -> None:
    flat = [str(name) for name, row in zip(proxy.checkpoints, rewards, strict=True) if not numpy.ptp(row)]
    if flat:
        what = f"gives every text the same reward, so {plain(proxy.name)} cannot bring it to the others' scale"
        raise RefusedError(Finding(name, f"{what}; leave it out, or add scale=raw") for name in flat)


def proxy_rows(
    pool: Pool, proxies: Sequence[Proxy], choosers: Sequence[Chooser], scores: Mapping[Key, Scores]
) -> list[dict[str, Any]]:
    """What each proxy is made of, what its rewards look like, and what they cost: texts through a model, seconds of
    scoring (members' added up) and of merging, bytes of weights that must be in memory."""
    lengths = numpy.concatenate(pool.by_row(answer_lengths(pool.texts)))
    made = {proxy.name: proxy for proxy in proxies}
    rows = []
    for chooser in choosers:
        rewards = numpy.concatenate(list(chooser.rewards))
        row: dict[str, Any] = {"proxy": chooser.name, "kind": chooser.kind}
        proxy = made.get(chooser.name) if chooser.kind != BASELINE else None
        if proxy is not None:
            found = [scores[key] for key in judges_of(proxy)]
            row |= {
                "checkpoints": ", ".join(map(str, proxy.checkpoints)),
                "aggregate": proxy.aggregate if proxy.kind == ENSEMBLE else "",
                "standardized": proxy.standardize,
                "texts_scored": len(pool.texts) * len(found),
                "seconds": sum(entry.seconds for entry in found),
                "merge_seconds": sum(entry.merge_seconds for entry in found),
                "weights_bytes": sum(entry.weights_bytes for entry in found),
            }
        row |= {"reward_mean": float(rewards.mean()), "reward_std": float(rewards.std()),
                "length_correlation": metrics.correlation(rewards, lengths)}  # fmt: skip
        rows.append(row)
    return rows


def doubts_before(
    prompts: Sequence[Text], proxies: Sequence[Proxy], judges: Mapping[Key, Judge], control: Spec | None
) -> list[Finding]:
    """Reasons for doubt that need no score: merges, a control that is a proxy, models trained on these prompts."""
    found = [warning for judge in judges.values() for warning in judge.warnings]
    for proxy in (proxy for proxy in proxies if proxy.kind == ENSEMBLE):
        first: dict[str, str] = {}
        for checkpoint in map(str, proxy.checkpoints):
            (weights,) = judges[single(checkpoint)].fingerprints
            if weights in first:
                what = f"has {some([first[weights], checkpoint])} as members, which seem to have the same weights"
                found.append(Finding(proxy.name, f"{what}: such a member counts twice"))
            first.setdefault(weights, checkpoint)
    if control is not None and not is_function(control):
        own = judges[single(control)].ingredients()
        same = [proxy.name for proxy in proxies if any(own & judges[key].ingredients() for key in judges_of(proxy))]
        if same:
            what = f"is the control, and shares weights with {some(same)}: it flatters them; judge by another model"
            found.append(Finding(str(control), what))
    return found + seen_in_training({folder for judge in judges.values() for folder in judge.folders}, prompts)


def doubts_after(
    pool: Pool, choosers: Sequence[Chooser], judges: Mapping[Key, Judge], scores: Mapping[Key, Scores]
) -> list[Finding]:
    """Reasons for doubt that only scores show: what loading said, mixed precision, rewards that tell nothing apart."""
    found = [Finding(*doubt) for entry in scores.values() for doubt in entry.doubts]
    found += doubts_of_mixing((judges[key].label, entry.computed) for key, entry in scores.items())
    varied = [row for row in range(len(pool.rows)) if len(set(pool.at[row].tolist())) > 1]
    for chooser in choosers:
        flat = sum(not numpy.ptp(chooser.rewards[row]) for row in varied)
        if flat and chooser.believes:
            what = f"gives all candidates of {flat} of {len(varied)} prompts the same reward: a random choice"
            found.append(Finding(chooser.name, what))
    return found


def check_chosen(path: Path, data: Spec, overwrite: bool) -> None:
    """Refuses to write choices over something else: over the data itself, or over what no results stand beside."""
    if path.exists() and Path(data).exists() and path.samefile(data):
        raise UsageError(f"{plain(str(data))} is where the choices would be written; choose another -o")
    if path.exists() and not overwrite:
        what = f"{plain(str(path.parent))} holds {path.name} already"
        raise UsageError(f"{what}; choose another -o, or add --overwrite")


def write_chosen(
    path: Path, pool: Pool, choosers: Sequence[Chooser], targets: Mapping[str, Ragged], name: str, n: int, seed: int
) -> Path:
    """One line for each prompt: the choice of the proxy `name` among n candidates, its rewards of these, and where the
    choices of all proxies stand among the candidates. Of more than n, those n are drawn at random."""
    lines = []
    for p, (row, order) in enumerate(zip(pool.rows, tie_orders(pool.sizes, seed), strict=True)):
        among = order[:n]
        first = numpy.arange(len(among))  # who comes first in the order is first among them
        choices = {each.name: int(among[choose(each.rewards[p][among], first)]) for each in choosers}
        index, own = choices[name], next(each.rewards[p] for each in choosers if each.name == name)
        rewards: list[float | None] = [None] * len(own)
        for i in among:
            rewards[i] = float(own[i])
        line = {
            "prompt": row.prompt, "chosen": row.answers[index], "index": index, "rewards": rewards, "proxy": name,
            "choices": choices, **{target: float(worth[p][index]) for target, worth in targets.items()},
        }  # fmt: skip
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return write_text(path, "".join(lines))


def cost_words(rows: Sequence[Mapping[str, Any]], proxies: Sequence[Proxy], scores: Mapping[Key, Scores]) -> list[str]:
    """What an ensemble costs beside the average of the same members: WARM's claim to efficiency, as measured here."""
    by_name, words = {row["proxy"]: row for row in rows}, []
    # Aggregates of the same members cost the same: the first one stands for them.
    ensembles = {frozenset(proxy.checkpoints): proxy for proxy in reversed(proxies) if proxy.kind == ENSEMBLE}
    for ensemble in reversed(ensembles.values()):
        for warm in (proxy for proxy in proxies if proxy.kind == WARM):
            if set(ensemble.checkpoints) != set(warm.checkpoints):
                continue
            many, one = by_name[ensemble.name], by_name[warm.name]
            ratio = many["seconds"] / max(one["seconds"], 1e-9)
            runs = {scores[key].run for proxy in (ensemble, warm) for key in judges_of(proxy)}
            told = f"{ratio:.1f} x the seconds for the ensemble" if len(runs) == 1 else "seconds of different runs"
            words.append(
                f"cost: {plain(ensemble.name)} {many['texts_scored']:,} texts scored, {many['seconds']:.1f} s, "
                f"{many['weights_bytes'] / 1e6:.0f} MB of weights; {plain(warm.name)} {one['texts_scored']:,}, "
                f"{one['seconds']:.1f} s (and {one['merge_seconds']:.1f} s to merge), "
                f"{one['weights_bytes'] / 1e6:.0f} MB: {told}"
            )
    return words
