"""Policies with their answers to the same prompts, and what a judge makes of each two of these."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from warmerge.errors import Finding, Interrupted, counted, plain
from warmerge.pipeline.judging.contenders import Answers
from warmerge.pipeline.judging.llm import LlmJudge
from warmerge.pipeline.judging.template import FIRST, TIE
from warmerge.pipeline.judging.verdicts import Asked, Question, ask_all, nothing_read, question
from warmerge.pipeline.scoring.rewarders import Rewarder
from warmerge.report.results import write_text
from warmerge.rewards import win_rates
from warmerge.rewards.bench import Measuring
from warmerge.rewards.pairs import distinct
from warmerge.rewards.pools import said

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from warmerge.rewards.layouts import Text

    Array = NDArray[numpy.float64]

VERDICTS, REWARDS = "verdicts.jsonl", "rewards.jsonl"
Pair = tuple[str, str]


@dataclass(frozen=True)
class Match:
    """What is compared: policies with their answers to the same prompts, and who with whom."""

    prompts: tuple[Text, ...]
    answers: Mapping[str, Answers]
    pairs: tuple[Pair, ...]

    def texts(self, name: str) -> list[Text]:
        """A policy's answers, in the order of the prompts."""
        return [self.answers[name].texts[said(prompt)] for prompt in self.prompts]

    def different(self, pair: Pair) -> list[bool]:
        return [first != second for first, second in zip(*map(self.texts, pair), strict=True)]


@dataclass(frozen=True)
class Judged:
    """Outcomes (prompts,) of each pair, NaN where the judge said nothing; and how it came to them."""

    outcomes: Mapping[Pair, Array]
    pairs: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[Finding, ...] = ()


def by_rewards(load: Callable[[], Rewarder], match: Match, out: Path, say: Callable[[str], None]) -> Judged:
    """By rewards: the larger one wins. They are written to OUT/rewards.jsonl.

    Raises:
        Interrupted: Ctrl-C. UsageError, RefusedError, WarmergeError: as `load_rewarder` and what it loads.
    """
    names = list(match.answers)
    texts, at = distinct(
        (prompt, text) for name in names for prompt, text in zip(match.prompts, match.texts(name), strict=True)
    )
    try:
        rewarder = load()
        say(f"{counted(len(texts), 'reward')} of {plain(rewarder.label)}")
        given = rewarder.rewards(texts)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; the answers are kept in {plain(str(out))}; the same command goes on") from None
    by_name = dict(zip(names, given.rewards[numpy.array(at)].reshape(len(names), -1), strict=True))
    lines = [
        {"prompt": prompt, "rewards": {name: float(by_name[name][i]) for name in names}}
        for i, prompt in enumerate(match.prompts)
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / REWARDS, "".join(json.dumps(line) + "\n" for line in lines))
    outcomes = {pair: win_rates.outcomes(by_name[pair[0]], by_name[pair[1]]) for pair in match.pairs}
    cut = f"{given.cut} of {len(texts)} texts were cut to the judge's length limit (--max-length)"
    pairs = tuple(_pair(match, pair) for pair in match.pairs)
    return Judged(outcomes, pairs, (cut,) if given.cut else (), rewarder.warnings)


def by_llm(
    judge: LlmJudge, match: Match, out: Path, measuring: Measuring, overwrite: bool, say: Callable[[str], None]
) -> Judged:
    """By a language model, which is asked about both orders of every pair: where they agree the answer wins that both
    prefer, where not it is a tie. Replies are kept in OUT/verdicts.jsonl.

    Raises:
        WarmergeError: no reply can be read. UsageError, RemoteError, Interrupted: as `ask_all`.
    """
    # Equal answers are not asked about: (pair, prompt) -> the two orders of the others.
    questions: dict[tuple[Pair, int], tuple[Question, Question]] = {}
    for pair in match.pairs:
        for i, (prompt, *texts) in enumerate(zip(match.prompts, *map(match.texts, pair), strict=True)):
            if texts[0] != texts[1]:
                both = [question(judge, prompt, pair, (texts[0], texts[1]), order) for order in (0, 1)]
                questions[pair, i] = (both[0], both[1])
    flat = [one for two in questions.values() for one in two]
    say(f"{counted(len({one.key for one in flat}), 'verdict')} of {plain(judge.model)}, less those that are kept")
    found = ask_all(
        judge, flat, out / VERDICTS, seed=measuring.seed, overwrite=overwrite, on_work=measuring.on_work,
        progress=measuring.progress,
    )  # fmt: skip
    outcomes, rows = {}, []
    for pair in match.pairs:
        asked = {i: questions[pair, i] for i in range(len(match.prompts)) if (pair, i) in questions}
        views = numpy.full((2, len(match.prompts)), 0.5)
        for i, two in asked.items():
            views[:, i] = [_outcome(found.verdict(one), one.order) for one in two]
        outcomes[pair] = win_rates.both_orders(*views)
        rows.append(_pair(match, pair) | _agreement(views[:, list(asked)]))
    return Judged(outcomes, tuple(rows), tuple(_agreement_notes(rows)), tuple(_doubts(judge, rows, found, out)))


def _outcome(verdict: str | None, order: int) -> float:
    """A verdict from the view of the first policy, whose answer stands first in order 0."""
    if verdict is None:
        return math.nan
    return 0.5 if verdict == TIE else float((verdict == FIRST) == (order == 0))


def _agreement(views: Array) -> dict[str, Any]:
    """How a judge's two orders (2, asked) go together."""
    known = views[:, ~numpy.isnan(views).any(axis=0)]
    differing = int(numpy.count_nonzero(known[0] != known[1]))
    # In order 0 the first place is the policy's, in order 1 the other one's.
    first = numpy.concatenate([views[0] == 1, views[1] == 0])
    replies = int(numpy.count_nonzero(~numpy.isnan(views)))
    return {
        "asked": views.shape[1], "both_orders": known.shape[1], "disagreed": differing,
        "disagreement": differing / known.shape[1] if known.shape[1] else math.nan,
        "first_place": int(numpy.count_nonzero(first)) / replies if replies else math.nan,
        "unreadable": int(numpy.isnan(views).sum()),
    }  # fmt: skip


def _agreement_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    asked, differing = (sum(row[key] for row in rows) for key in ("both_orders", "disagreed"))
    same = sum(row["prompts"] - row["different"] for row in rows)
    words = f"the judge's verdicts on the two orders differ for {differing} of {asked} pairs of answers"
    notes = [f"{words} ({differing / asked:.1%}): ties"] if asked else []
    pairs = sum(row["prompts"] for row in rows)
    words = f"for {same} of {pairs} pairs of answers both are the same text: ties, without asking"
    return notes + ([words] if same else [])


def _doubts(judge: LlmJudge, rows: Sequence[Mapping[str, Any]], found: Asked, out: Path) -> list[Finding]:
    """What the judge did not say, and what its server did not take."""
    doubts = []
    unreadable, replies = sum(row["unreadable"] for row in rows), 2 * sum(row["asked"] for row in rows)
    if replies and unreadable == replies:
        raise nothing_read(found.replies, out / VERDICTS)
    if unreadable:
        cut = sum(reply.finish == "length" for reply in found.replies.values())
        refused = sum(reply.error is not None for reply in found.replies.values())
        why = ", ".join([f"cut off by --judge-tokens: {cut}"] * bool(cut) + [f"refused: {refused}"] * bool(refused))
        what = f"{unreadable} of {replies} replies do not end with A, B or tie{f' ({why})' if why else ''}"
        doubts.append(Finding(judge.model, f"{what}: their prompts are left out of the pair, and its n is smaller"))
    for name in found.left_out:
        doubts.append(Finding(judge.model, f"its server does not take {name!r}: verdicts may differ when asked again"))
    return doubts


def _pair(match: Match, pair: Pair) -> dict[str, Any]:
    different = sum(match.different(pair))
    return {"policy": pair[0], "against": pair[1], "prompts": len(match.prompts), "different": different}
