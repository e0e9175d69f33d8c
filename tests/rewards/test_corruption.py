"""Swapped labels: which pairs they are, what is counted on them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from reward_world import pairs, write_rows

from warmerge.errors import RefusedError, UsageError
from warmerge.rewards import metrics
from warmerge.rewards.bench import Bench, open_bench
from warmerge.rewards.corruption import Corruption, memorised, read_corruption, split_by_corruption


def bench_of(tmp_path: Path, **sets: list[Any]) -> Bench:
    return open_bench([f"{name}={write_rows(tmp_path / f'{name}.jsonl', rows)}" for name, rows in sets.items()])


def of(bench: Bench, swapped: tuple[int, ...] = (1, 4, 5)) -> Corruption:
    return Corruption(bench.sets[0].preferences.fingerprint, bench.sets[0].n, swapped)


def test_a_file_says_which_are_swapped(tmp_path: Path) -> None:
    path = tmp_path / "corruption.json"
    path.write_text(json.dumps({"fingerprint": "ab", "n": 9, "swapped": [7, 2], "more": "is ignored"}))
    assert read_corruption(path) == Corruption("ab", 9, (2, 7))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read: Expecting property name"),
        ("[]", 'expected {"fingerprint": "...", "n": 4096, "swapped": [3, 17, ...]}'),
        ('{"fingerprint": "a", "n": 4}', "expected {"),
        ('{"fingerprint": 7, "n": 4, "swapped": []}', "expected {"),
        ('{"fingerprint": "a", "n": 4.0, "swapped": []}', "expected {"),
        ('{"fingerprint": "a", "n": true, "swapped": []}', "expected {"),
        ('{"fingerprint": "a", "n": 4, "swapped": {"1": 2}}', "expected {"),
        ('{"fingerprint": "a", "n": 4, "swapped": [4]}', "swapped: expected numbers from 0 to 4 - 1"),
        ('{"fingerprint": "a", "n": 4, "swapped": [-1]}', "swapped: expected numbers from 0 to 4 - 1"),
        ('{"fingerprint": "a", "n": 4, "swapped": [true]}', "swapped: expected numbers from 0 to 4 - 1"),
        ('{"fingerprint": "a", "n": 4, "swapped": [1, 1]}', "swapped: a comparison is named twice"),
        ("\udcff", "cannot be read: 'utf-8' codec"),
    ],
)
def test_a_file_of_another_format_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "corruption.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RefusedError) as caught:
        read_corruption(path)
    assert str(caught.value).startswith(f"refused: {path}: {message}")


def test_a_file_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--mask: cannot read .*none\.json: No such file or directory"):
        read_corruption(tmp_path / "none.json")


def test_parts_hold_every_comparison_once_and_the_swapped_one_exchanges_its_sides(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, train=pairs(12, 1), val=pairs(6, 2))
    (whole, val), parts = bench.sets, split_by_corruption(bench.sets, of(bench))
    assert [(part.name, part.part, part.scored, part.n) for part in parts] == [
        ("train[swapped]", "swapped", "train", 3), ("train[clean]", "clean", "train", 9), ("val", "", "val", 6)
    ]  # fmt: skip
    assert parts[2] is val
    assert parts[0].texts.texts is parts[1].texts.texts is whole.texts.texts
    rewards = numpy.random.default_rng(0).random(len(whole.texts.texts))
    right = metrics.right(whole.margins(rewards))
    swapped = [1, 4, 5]
    agreed = metrics.right(parts[0].margins(rewards))
    assert agreed.tolist() == [1 - right[i] for i in swapped]
    assert 0 < agreed.sum() < 3
    clean = metrics.right(parts[1].margins(rewards))
    assert clean.tolist() == [right[i] for i in range(12) if i not in swapped]
    assert parts[0].texts.clusters == tuple(whole.texts.clusters[i] for i in swapped)


def test_the_same_data_under_two_names_is_split_twice(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, train=pairs(12, 1), copy=pairs(12, 1))
    assert [s.name for s in split_by_corruption(bench.sets, of(bench))] == [
        "train[swapped]", "train[clean]", "copy[swapped]", "copy[clean]"
    ]  # fmt: skip


@pytest.mark.parametrize("change", [{"fingerprint": "other"}, {"n": 11}])
def test_a_mask_of_other_data_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    bench = bench_of(tmp_path, train=pairs(12, 1))
    mask = Corruption(**{**vars(of(bench, (1, 4))), **change})
    with pytest.raises(UsageError) as caught:
        split_by_corruption(bench.sets, mask)
    assert str(caught.value) == (
        f"--mask is of a set of {mask.n} comparisons that is not among --data: train (12 comparisons); give the set as "
        "it was before its labels were swapped, without --limit and --skip-bad-rows"
    )


@pytest.mark.parametrize(("swapped", "part"), [((), "swapped"), ((0, 1), "swapped"), (tuple(range(10)), "clean")])
def test_a_part_without_two_prompts_is_refused(tmp_path: Path, swapped: tuple[int, ...], part: str) -> None:
    bench = bench_of(tmp_path, train=pairs(12, 1))
    with pytest.raises(UsageError) as caught:
        split_by_corruption(bench.sets, of(bench, swapped))
    assert str(caught.value) == f"--mask leaves fewer than two prompts in train[{part}]"


def test_a_set_with_the_name_of_a_part_is_refused(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, train=pairs(12, 1), **{"train[clean]": pairs(12, 2)})
    with pytest.raises(UsageError, match=r"--mask makes a set named train\[clean\], and --data has one: name that one"):
        split_by_corruption(bench.sets, of(bench))


def rows_of(**accuracies: float) -> list[dict[str, Any]]:
    members = [
        {"set": name, "model": m, "kind": "member", "accuracy": a} for name, a in accuracies.items() for m in "ab"
    ]
    return [*members, {"set": "train[swapped]", "model": "average", "kind": "average", "accuracy": 0.0}]


def test_whether_label_noise_was_memorised_is_said(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, train=pairs(12, 1), **{"val]": pairs(6, 2)})
    assert memorised(bench.sets, rows_of(train=0.8)) == []
    sets = split_by_corruption(bench.sets, of(bench))
    rows = {"train[clean]": 0.9, "val]": 0.75}
    assert memorised(sets, rows_of(**{"train[swapped]": 0.36}, **rows)) == [
        "members agree with 0.360 of the swapped labels, and are wrong on 0.250 of the other sets: they memorised "
        "label noise, so what averaging does to it can be read off [swapped]"
    ]
    assert memorised(sets, rows_of(**{"train[swapped]": 0.34}, **rows)) == [
        "members agree with 0.340 of the swapped labels, and are wrong on 0.250 of the other sets: they did not "
        "memorise label noise, so its removal by averaging cannot be tested here"
    ]
    assert memorised(sets[:2], rows_of(**{"train[swapped]": 0.34, "train[clean]": 0.9})) == [
        "whether members memorised the swapped labels cannot be told without a set that they were not trained on"
    ]
