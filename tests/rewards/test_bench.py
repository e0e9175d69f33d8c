"""Preference sets as a test bench: what is counted, what is refused, and whose tokens are used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from reward_world import pairs, write_rows

from warmerge.errors import UsageError
from warmerge.rewards.bench import (
    Bench,
    Measuring,
    answer_lengths,
    columns,
    cut_words,
    data_notes,
    open_bench,
    set_record,
)
from warmerge.rewards.metrics import Estimate
from warmerge.rewards.model import LoadOptions, load_reward_model
from warmerge.rewards.scoring import Tokens, score


def bench_of(tmp_path: Path, rows: list[Any], name: str = "val", **options: Any) -> Bench:
    return open_bench([f"{name}={write_rows(tmp_path / f'{name}.jsonl', rows)}"], Measuring(**options))


@pytest.mark.parametrize(
    ("resamples", "seed", "message"),
    [
        (99, 0, "--resamples: expected 100 or more, found 99"),
        (100, -1, "--seed: expected 0 or more, found -1"),
    ],
)
def test_a_bootstrap_that_cannot_be_is_refused_before_anything_is_scored(
    resamples: int, seed: int, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        Measuring(resamples=resamples, seed=seed)
    assert str(caught.value) == message


def test_how_intervals_are_made_is_said() -> None:
    assert Measuring(resamples=500, seed=7).intervals() == "percentile bootstrap over prompts, 500 resamples, seed 7"


def test_no_set_and_one_prompt_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--data is missing: at least one set of preference pairs, as NAME=PATH"):
        open_bench([])
    with pytest.raises(UsageError) as caught:
        bench_of(tmp_path, pairs(4, 1, each=4))
    assert str(caught.value) == "--data val: 4 comparisons of one prompt; an interval takes two prompts"


def test_a_set_is_counted_in_comparisons_and_prompts(tmp_path: Path) -> None:
    (subset,) = bench_of(tmp_path, pairs(10, 1, each=5)).sets
    assert (subset.n, subset.prompts, subset.scored, subset.part) == (10, 2, "val", "")
    record = set_record(subset)
    assert (record["n"], record["prompts"], record["skipped_rows"]) == (10, 2, 0)
    assert record["fingerprint"] == subset.preferences.fingerprint
    assert record["source"] == str(tmp_path / "val.jsonl")


def test_all_models_see_the_same_resampled_prompts(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, pairs(20, 1), resamples=100, seed=3)
    values = numpy.random.default_rng(0).random((1, 20))
    means, drawn = bench.means(bench.sets[0], numpy.concatenate([values, values + 1]))
    assert means == pytest.approx([values.mean(), values.mean() + 1])
    assert drawn.shape == (100, 2)
    assert drawn[:, 0].std() > 0
    assert drawn[:, 1] - drawn[:, 0] == pytest.approx(numpy.ones(100))


def test_tokens_are_made_once_for_each_rule_and_never_lent_to_another(tmp_path: Path, world: Any) -> None:
    bench = bench_of(tmp_path, pairs(6, 1))
    one, same = (load_reward_model(folder) for folder in (world.a, world.b))
    shorter = load_reward_model(world.a, LoadOptions(max_length=12))
    texts = bench.sets[0].texts.texts
    first = bench.tokens(one.renderer, "val", texts)
    assert bench.tokens(same.renderer, "val", texts) is first
    other = bench.tokens(shorter.renderer, "val", texts)
    assert other is not first
    assert other.renderer is shorter.renderer


def test_rewards_of_a_set_are_those_of_its_texts(tmp_path: Path, world: Any) -> None:
    seen: list[int] = []
    bench = bench_of(tmp_path, pairs(6, 1), progress=seen.append)
    model = load_reward_model(world.a)
    rewards = bench.score(model)["val"]
    assert rewards == pytest.approx(score(model, Tokens(model.renderer, bench.sets[0].texts.texts)), abs=1e-6)
    assert sum(seen) == len(rewards)


def test_cuts_are_those_of_the_rule_that_cuts_most(tmp_path: Path, world: Any) -> None:
    bench = bench_of(tmp_path, pairs(6, 1))
    assert bench.cuts() == {}
    bench.score(load_reward_model(world.a))
    count = len(bench.sets[0].texts.texts)
    assert bench.cuts() == {"val": {"texts": count, "prompt_cut": 0, "answer_cut": 0, "rules": 1}}
    assert data_notes(bench.sets, bench.cuts()) == []
    bench.score(load_reward_model(world.a, LoadOptions(max_length=8)))
    found = bench.cuts()
    assert found == {"val": {"texts": count, "prompt_cut": count, "answer_cut": count, "rules": 2}}
    assert data_notes(bench.sets, found) == [
        f"val: of {count} texts {count} lost the beginning of their prompt and {count} the end of their answer to the "
        "length limit (--max-length); counted for the one of 2 tokenizers or limits that cuts most"
    ]


def test_notes_say_what_was_left_out_and_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    (subset,) = bench_of(tmp_path, pairs(6, 1)).sets
    skipped = replace(subset, preferences=replace(subset.preferences, skipped=3), scored="a\x1b[31m")
    assert data_notes([skipped, skipped], {}) == ["'a\\x1b[31m': 3 bad rows were left out"]
    assert cut_words(4, 0, 0) == ""


def test_lengths_are_those_of_answers() -> None:
    messages = ({"role": "assistant", "content": "four"}, {"role": "user", "content": "abc"})
    assert answer_lengths([("prompt", "12345"), ("", messages)]).tolist() == [5.0, 7.0]


def test_columns_of_an_estimate() -> None:
    assert columns("wa", Estimate(0.5, 0.25, 0.75)) == {"wa": 0.5, "wa_low": 0.25, "wa_high": 0.75}
