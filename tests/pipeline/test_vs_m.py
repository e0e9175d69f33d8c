"""Accuracy against M: members in their order, average and ensemble of the first M, no hidden selection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from reward_world import World, pairs, write_rows

import warmerge
from warmerge.errors import Interrupted, UsageError
from warmerge.pipeline.scoring import mixtures
from warmerge.pipeline.scoring.mixtures import POINTS
from warmerge.pipeline.vs_m import AccuracyVsM, accuracy_vs_m
from warmerge.rewards import metrics
from warmerge.rewards.bench import Bench, Measuring, open_bench
from warmerge.rewards.model import load_reward_model

FAST = Measuring(resamples=200)
SAME = "members are ranked and reported on the same set, which overstates every M; rank on others: --select-data"


@pytest.fixture(scope="module")
def found(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[AccuracyVsM, Path]:
    out = tmp_path_factory.mktemp("vs_m") / "out"
    members = [world.harmful, world.a, world.b, world.c]
    data, select = [f"val={world.data('val')}"], [f"ood={world.data('ood')}"]
    return accuracy_vs_m(members, data, out, select_data=select, measuring=FAST), out


def test_each_row_is_the_average_and_the_ensemble_of_the_first_m(
    found: tuple[AccuracyVsM, Path], world: World, tmp_path: Path
) -> None:
    record, rows = found[0].record, found[0].rows
    assert [row["m"] for row in rows] == [1, 2, 3, 4]
    assert [row["added"] for row in rows] == record["ranking"]
    assert record["ranking"][-1] == "harmful"
    bench = open_bench([f"val={world.data('val')}"])
    order = [getattr(world, name) for name in record["ranking"]]
    rewards = [bench.score(load_reward_model(folder))["val"] for folder in order]

    def share(values: Any) -> float:
        return float(metrics.right(bench.sets[0].margins(values)).mean())

    for row, alone in zip(rows, rewards, strict=True):
        m = row["m"]
        assert row["single"] == share(alone)
        assert row["ens"] == share(numpy.mean(rewards[:m], axis=0))
        if m == 1:
            assert row["wa"] == row["ens"] == row["single"]
        else:
            warmerge.average(order[:m], tmp_path / f"warm-{m}")
            assert row["wa"] == share(bench.score(load_reward_model(tmp_path / f"warm-{m}"))["val"])
        assert row["wa_low"] <= row["wa"] <= row["wa_high"]
        assert (row["n"], row["prompts"], row["selected_on"]) == (160, 80, False)


def test_files(found: tuple[AccuracyVsM, Path]) -> None:
    result, out = found
    assert sorted(path.name for path in out.iterdir()) == [POINTS, "vs_m.csv", "vs_m.json", "vs_m.png", "vs_m.svg"]
    content = json.loads((out / "vs_m.json").read_text())
    assert content == json.loads(json.dumps(result.as_json()))
    assert content["order"] == "best-first"
    assert content["selected_on"] == ["ood"]
    assert [entry["name"] for entry in content["sets"]] == ["val", "ood"]
    assert content["left_out"] == []
    assert all("--select-data" not in warning.what for warning in result.warnings)


def test_greedy_leaves_out_who_does_harm(world: World) -> None:
    members = [world.harmful, world.a, world.b]
    result = accuracy_vs_m(
        members, [f"val={world.data('val')}"], order="greedy", select_data=[world.data("ood")], measuring=FAST
    )
    assert "harmful" not in result.record["ranking"]
    assert "harmful" in result.record["left_out"]
    assert [row["added"] for row in result.rows] == result.record["ranking"]


def test_ranking_and_reporting_on_one_set_is_said(world: World) -> None:
    result = accuracy_vs_m([world.a, world.b], [f"val={world.data('val')}"], measuring=FAST)
    assert [str(warning) for warning in result.warnings] == [f"val: {SAME}"]
    assert {row["selected_on"] for row in result.rows} == {True}
    assert result.record["selected_on"] == ["val"]
    shuffled = accuracy_vs_m([world.a, world.b], [f"val={world.data('val')}"], order="random", measuring=FAST)
    assert shuffled.warnings == ()
    assert {row["selected_on"] for row in shuffled.rows} == {False}
    assert shuffled.record["selected_on"] == []


def test_shared_prompts_are_found_whatever_the_file_is_called(world: World, tmp_path: Path) -> None:
    """The same pairs in another order, or some of them: ranked on what is reported all the same."""
    rows = pairs(20, 1)
    report = write_rows(tmp_path / "report.jsonl", rows)
    turned = write_rows(tmp_path / "turned.jsonl", rows[::-1])
    some = write_rows(tmp_path / "some.jsonl", [*rows[:4], *pairs(10, 2)])
    result = accuracy_vs_m([world.a, world.b], [report], select_data=[turned], measuring=FAST)
    assert [str(warning) for warning in result.warnings] == [f"report: {SAME}"]
    assert {row["selected_on"] for row in result.rows} == {True}
    result = accuracy_vs_m([world.a, world.b], [report], select_data=[some], measuring=FAST)
    assert [str(warning) for warning in result.warnings] == [
        "report: members are ranked on 2 of its 10 prompts, which overstates every M; rank on others: --select-data"
    ]
    assert {row["selected_on"] for row in result.rows} == {False}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 1}, "accuracy against M takes two checkpoints or more"),
        ({"order": "best"}, "--order: expected one of best-first, worst-first, random, greedy, found 'best'"),
        ({"out": "OUT"}, "OUT holds vs_m.json already; choose another -o, or add --overwrite"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_scored(
    found: tuple[AccuracyVsM, Path], world: World, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("scored")

    monkeypatch.setattr(mixtures, "load_reward_model", never)
    given = {key: str(found[1]) if value == "OUT" else value for key, value in given.items()}
    with pytest.raises(UsageError) as caught:
        accuracy_vs_m([world.a, world.b][: given.pop("count", 2)], [world.data("val")], **given)
    assert str(caught.value) == message.replace("OUT", str(found[1]))


def test_ctrl_c_while_greedy_tries_keeps_what_is_known(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Bench.score, []

    def counted(self: Bench, model: Any) -> Any:
        calls.append(model.label)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, model)

    arguments: dict[str, Any] = {"order": "greedy", "select_data": [world.data("ood")], "measuring": FAST}
    members, data = [world.a, world.b, world.c], [f"val={world.data('val')}"]
    monkeypatch.setattr(Bench, "score", counted)
    with pytest.raises(Interrupted, match=f"stopped; 3 points are kept in {tmp_path}; the same command goes on there"):
        accuracy_vs_m(members, data, tmp_path, **arguments)
    resumed = accuracy_vs_m(members, data, tmp_path, **arguments)
    assert resumed.rows == accuracy_vs_m(members, data, **arguments).rows
