"""Judges scored in this process, one in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from warmerge.pipeline.scoring.asked import Asked, Found, Texts, computed_in, rule_of
from warmerge.pipeline.scoring.judge import load_host, poured
from warmerge.rewards.bench import Measuring
from warmerge.rewards.model import RewardModel
from warmerge.rewards.scoring import Tokens, doubts_of, score


def score_here(asked: Sequence[Asked], measuring: Measuring, tokens: list[Tokens]) -> Iterator[Found]:
    """As `score_all`. Averages that are poured into one checkpoint follow each other in one live module."""
    model: RewardModel | None = None
    for i, one in enumerate(asked):
        judge, before = one.judge, asked[i - 1].judge if i else None
        if model is None or before is None or judge.plan is None or judge.host is not before.host:
            model = None  # frees the last one first
            model = load_host(judge, measuring)
        begun = time.perf_counter()
        model = poured(model, judge, measuring)
        merge_seconds = time.perf_counter() - begun
        doubts = tuple(doubts_of(model))
        rewards, seconds, cuts = [], [], []
        for texts in one.lists:
            made = _tokens_of(model, texts, tokens)
            begun, waited = time.perf_counter(), made.waited
            rewards.append(score(model, made, measuring.batch_tokens, measuring.progress))
            # Only the first model waits for the tokens that all of them use.
            seconds.append(time.perf_counter() - begun - (made.waited - waited))
            cuts.append(made.cut())
        yield Found(
            tuple(rewards), tuple(seconds), tuple(cuts), merge_seconds, model.nbytes, computed_in(model),
            rule_of(model.renderer), doubts,
        )  # fmt: skip


def _tokens_of(model: RewardModel, texts: Texts, known: list[Tokens]) -> Tokens:
    """The tokens of a list by a model's own rule; those of an earlier model of an equal rule, if any."""
    for made in known:
        if made.texts is texts and made.renderer == model.renderer:
            return made
    known.append(Tokens(model.renderer, texts))
    return known[-1]
