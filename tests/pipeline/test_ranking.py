"""Ranking members, and `average --select`: the same as averaging the chosen by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reward_world import World

from warmerge.errors import RefusedError, UsageError
from warmerge.pipeline.ranking import accuracy, parse_selection, rank, select_members
from warmerge.pipeline.scoring import mixtures as module
from warmerge.pipeline.scoring.mixtures import Mixtures, open_mixtures
from warmerge.rewards import metrics
from warmerge.rewards.bench import Measuring, open_bench
from warmerge.rewards.model import LoadOptions, load_reward_model


@pytest.fixture(scope="module")
def four(world: World) -> Mixtures:
    """harmful, a, b and alien on two sets."""
    bench = open_bench([f"val={world.data('val')}", f"ood={world.data('ood')}"])
    return open_mixtures([world.harmful, world.a, world.b, world.alien], bench)


def test_accuracy_is_the_mean_over_the_sets(four: Mixtures, world: World) -> None:
    rewards = four.bench.score(load_reward_model(world.b))
    expected = [metrics.right(subset.margins(rewards[subset.name])).mean() for subset in four.bench.sets]
    assert accuracy(four, four.single(2), four.bench.sets) == pytest.approx(sum(expected) / 2)
    assert expected[0] != expected[1]
    assert accuracy(four, four.single(2), four.bench.sets[:1]) == expected[0]


def test_orders(four: Mixtures) -> None:
    alone = [accuracy(four, four.single(i), four.bench.sets) for i in range(4)]
    assert rank(four, four.bench.sets, "best-first") == sorted(range(4), key=lambda i: -alone[i])
    assert rank(four, four.bench.sets, "worst-first") == sorted(range(4), key=lambda i: alone[i])
    assert rank(four, four.bench.sets, "worst-first")[0] == 0
    shuffled = rank(four, four.bench.sets, "random", seed=1)
    assert sorted(shuffled) == [0, 1, 2, 3]
    assert shuffled == rank(four, four.bench.sets, "random", seed=1)
    assert any(rank(four, four.bench.sets, "random", seed=s) != shuffled for s in range(5))
    with pytest.raises(UsageError) as caught:
        rank(four, four.bench.sets, "best")
    assert str(caught.value) == "--order: expected one of best-first, worst-first, random, greedy, found 'best'"


def test_greedy_leaves_out_who_does_harm(four: Mixtures) -> None:
    kept = rank(four, four.bench.sets, "greedy")
    best = rank(four, four.bench.sets, "best-first")
    assert kept[0] == best[0]
    assert 0 not in kept
    soup, reached = [best[0]], accuracy(four, four.single(best[0]), four.bench.sets)
    for i in best[1:]:
        found = accuracy(four, four.uniform([*soup, i]), four.bench.sets)
        if found >= reached:
            soup, reached = [*soup, i], found
    assert kept == soup


@pytest.mark.parametrize(
    "text", ["best", "best:1", "best:5", "best:x", "best:-2", "best:2:3", "Greedy", "", "greedy:2"]
)
def test_a_selection_that_cannot_be(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_selection(text, 4)
    assert str(caught.value) == f"--select: expected best:M with M from 2 to 4, or greedy; found {text!r}"


def test_the_chosen_stay_in_the_order_that_was_given(world: World) -> None:
    """Else --lambda, or a sum that depends on its order, would be another one than by hand."""
    members = [world.harmful, world.a, world.c, world.b]
    kept, record = select_members(members, "best:3", [world.data("val")])
    assert kept == [world.a, world.c, world.b]
    assert record["kept"] == [str(folder) for folder in kept]
    assert list(record["accuracies"]) == [str(folder) for folder in members]
    bench = open_bench([world.data("val")])
    own = metrics.right(bench.sets[0].margins(bench.score(load_reward_model(world.harmful))["val"])).mean()
    assert record["accuracies"][str(world.harmful)] == own
    assert (record["selection"], record["sets"][0]["n"]) == ("best:3", 160)


def test_one_that_is_left_alone_is_said(world: World) -> None:
    with pytest.raises(UsageError) as caught:
        select_members([world.harmful, world.a], "greedy", [world.data("val")])
    assert str(caught.value) == (
        f"--select greedy: only {world.a} is left: no average with another one was as accurate; use that checkpoint "
        "alone, or --select best:M"
    )


def test_what_may_not_be_averaged_is_refused_before_anything_is_scored(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("scored")

    monkeypatch.setattr(module, "load_reward_model", never)
    with pytest.raises(RefusedError, match="is the same checkpoint as"):
        select_members([world.a, world.a], "best:2", [world.data("val")])
    with pytest.raises(UsageError, match="--select: expected best:M"):
        select_members([world.a, world.b], "best:3", [str(tmp_path / "none.jsonl")])


def test_the_length_limit_is_used(world: World) -> None:
    seen: list[int] = []
    whole = select_members([world.a, world.b], "best:2", [world.data("val")], Measuring(on_work=seen.append))[1]
    cut = select_members([world.a, world.b], "best:2", [world.data("val")], Measuring(LoadOptions(max_length=6)))[1]
    assert cut["accuracies"] != whole["accuracies"]
    assert seen == [2 * len(open_bench([world.data("val")]).sets[0].texts.texts)]
