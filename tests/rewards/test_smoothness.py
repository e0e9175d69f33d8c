"""How far rewards move under small changes: by brute force, and over the right prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
from reward_world import pairs, write_rows

from warmerge.rewards.bench import Bench, Measuring, open_bench
from warmerge.rewards.corruption import Corruption, split_by_corruption
from warmerge.rewards.perturb import PERTURBATIONS, perturb
from warmerge.rewards.smoothness import Sample, movements, sample_changes


def bench_of(tmp_path: Path, rows: list[Any]) -> Bench:
    return open_bench([f"val={write_rows(tmp_path / 'val.jsonl', rows)}"], Measuring(resamples=200))


def test_so_many_answers_in_every_change_that_there_is(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, pairs(20, 1))
    (sample,) = sample_changes(bench, 5)
    assert sample_changes(bench, 5) == [sample]
    assert len(set(sample.origin)) == 5
    assert len(sample.origin) == len(sample.change) == len(sample.prompts) == len(sample.changed)
    texts = bench.sets[0].texts
    for i, change, prompt, (before, answer) in zip(
        sample.origin, sample.change, sample.prompts, sample.changed, strict=True
    ):
        assert (before, answer) == (texts.texts[i][0], perturb(texts.texts[i][1], change, 0))
        assert answer != texts.texts[i][1]
        assert any(
            prompt == p and i in (*c, *r) for p, c, r in zip(texts.clusters, texts.chosen, texts.rejected, strict=True)
        )
    assert set(sample.change) == set(PERTURBATIONS)
    assert len(set(sample_changes(bench, 10_000)[0].origin)) == len(texts.texts)


def test_answers_without_anything_to_change_are_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "1", "rejected": "2"} for i in range(4)]
    (sample,) = sample_changes(bench_of(tmp_path, rows), 8)
    assert set(sample.change) == {"white space", "politeness"}  # a digit has no case, no typo and is no word


def test_a_split_set_keeps_its_prompts(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, pairs(20, 1))
    whole = sample_changes(bench, 40)
    bench.sets = split_by_corruption(
        bench.sets, Corruption(bench.sets[0].preferences.fingerprint, 20, tuple(range(0, 20, 2)))
    )
    assert sample_changes(bench, 40) == whole


def test_movements_are_means_of_distances_in_standard_deviations(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, pairs(20, 1))
    (sample,) = sample_changes(bench, 8)
    random = numpy.random.default_rng(0)
    before, after = random.random(len(bench.sets[0].texts.texts)), random.random(len(sample.changed))
    flat = numpy.zeros_like(before)
    rows = movements(bench, [sample], {"m": {"val": before}, "flat": {"val": flat}}, {"m": [after], "flat": [after]})
    assert [row["change"] for row in rows] == ["all", *PERTURBATIONS]
    assert {row["model"] for row in rows} == {"m"}
    distances = [abs(after[k] - before[i]) / before.std() for k, i in enumerate(sample.origin)]
    for row in rows:
        own = [d for d, change in zip(distances, sample.change, strict=True) if row["change"] in ("all", change)]
        assert row["n"] == len(own)
        assert row["moved"] == pytest.approx(numpy.mean(own))
        assert row["low"] < row["moved"] < row["high"]
        assert row["prompts"] <= row["n"]


def test_one_answer_can_be_measured_too(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, pairs(20, 1))
    sample = Sample("val", (3,), ("typo",), ("p",), (("p", "changed"),))
    before = numpy.arange(float(len(bench.sets[0].texts.texts)))
    rows = movements(bench, [sample], {"m": {"val": before}}, {"m": [numpy.array([4.0])]})
    assert [row["moved"] for row in rows] == [pytest.approx(1 / before.std())] * 2
    assert (rows[0]["low"], rows[0]["high"]) == (-numpy.inf, numpy.inf)  # of one prompt nothing is known about others
