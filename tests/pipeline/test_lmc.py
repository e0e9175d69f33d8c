"""lmc-curve: WA, ENS and Diag by another way, verdicts that are right, and runs that go on where they stopped."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from reward_world import World, pairs, write_rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import warmerge
from warmerge.errors import Interrupted, RefusedError, UsageError
from warmerge.pipeline import lmc as module
from warmerge.pipeline.lmc import Curve, lambda_grid, lmc_curve
from warmerge.pipeline.scoring import mixtures
from warmerge.pipeline.scoring.mixtures import POINTS
from warmerge.report.results import redraw
from warmerge.rewards import metrics
from warmerge.rewards.bench import Bench, Measuring, open_bench
from warmerge.rewards.model import LoadOptions, load_reward_model

FAST = Measuring(resamples=200)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("something was scored")


def rows_of(curve: Curve, path: str, name: str = "val") -> dict[float, dict[str, Any]]:
    return {row["lambda"]: row for row in curve.rows if (row["path"], row["set"]) == (path, name)}


@pytest.fixture(scope="module")
def bench(world: World) -> Bench:
    return open_bench([f"val={world.data('val')}"])


@pytest.fixture(scope="module")
def curve(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Curve, Path]:
    out = tmp_path_factory.mktemp("curve") / "out"
    data = [f"val={world.data('val')}", f"ood={world.data('ood')}"]
    found = lmc_curve([world.a, world.alien], data, out, points=5, extrapolate=0.5, measuring=FAST)
    return found, out


# --- numbers ---


def test_lambdas_go_beyond_both_ends(curve: tuple[Curve, Path]) -> None:
    assert list(rows_of(curve[0], "a -> alien")) == [-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]


@pytest.mark.parametrize(("lam", "other"), [(0.0, "a"), (1.0, "alien"), (0.5, None), (0.25, None), (1.25, None)])
def test_wa_is_the_accuracy_of_the_model_on_the_disk(
    curve: tuple[Curve, Path], world: World, bench: Bench, tmp_path: Path, lam: float, other: str | None
) -> None:
    folder = tmp_path / "merged"
    if other is not None:
        folder = getattr(world, other)
    elif lam == 0.5:
        warmerge.average([world.a, world.alien], folder)
    else:
        warmerge.average([world.a, world.alien], folder, rule="weighted", weights=[1 - lam, lam])
    rewards = bench.score(load_reward_model(folder))["val"]
    row = rows_of(curve[0], "a -> alien")[lam]
    right = metrics.right(bench.sets[0].margins(rewards))
    assert row["wa"] == right.mean()
    assert row["reward_std"] == pytest.approx(rewards.std(), rel=1e-5)
    alone = metrics.accuracy(bench.sets[0].margins(rewards), bench.sets[0].texts.clusters, 200, 0)
    assert (row["wa_low"], row["wa_high"]) == (alone.low, alone.high)
    if other is not None:
        assert row["wa"] == row["ens"] == row["diag"]


def test_ens_and_diag_by_brute_force(curve: tuple[Curve, Path], world: World, bench: Bench) -> None:
    a, b = (bench.score(load_reward_model(folder))["val"] for folder in (world.a, world.alien))
    ends = [metrics.right(bench.sets[0].margins(r)).mean() for r in (a, b)]
    for lam, row in rows_of(curve[0], "a -> alien").items():
        mixed = metrics.right(bench.sets[0].margins((1 - lam) * a + lam * b)).mean()
        assert row["ens"] == mixed
        assert row["diag"] == pytest.approx((1 - lam) * ends[0] + lam * ends[1])
        assert row["wa_minus_ens"] == pytest.approx(row["wa"] - row["ens"])
        assert row["wa_minus_ens_low"] <= row["wa_minus_ens"] <= row["wa_minus_ens_high"]
        assert (row["n"], row["prompts"]) == (160, 80)


def test_a_tie_of_all_members_is_a_tie_of_their_ensemble(world: World, bench: Bench, tmp_path: Path) -> None:
    """Members that give all texts one reward (not 0): however the sum is rounded, it is one reward again."""
    for name, bias in (("one", 0.1), ("two", 0.3)):
        shutil.copytree(world.flat, tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors["model.norm.weight"] *= bias  # different members, the same rewards
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    found = lmc_curve(
        [tmp_path / "one", tmp_path / "two"], [world.data("val")], lambdas=[0, 0.1, 0.3, 1], measuring=FAST
    )
    assert {(row["wa"], row["ens"], row["diag"]) for row in found.rows} == {(1.0, 1.0, 1.0)}


def test_more_than_two_are_taken_in_all_pairs(world: World) -> None:
    found = lmc_curve([world.a, world.b, world.c], [world.data("val")], points=3, measuring=FAST)
    assert list(dict.fromkeys(row["path"] for row in found.rows)) == ["a -> b", "a -> c", "b -> c"]
    assert [verdict["path"] for verdict in found.verdicts] == ["a -> b", "a -> c", "b -> c"]


def test_paths_to_the_mean(world: World, bench: Bench, tmp_path: Path) -> None:
    found = lmc_curve([world.a, world.b, world.c], [world.data("val")], points=3, path="mean", measuring=FAST)
    assert list(dict.fromkeys(row["path"] for row in found.rows)) == ["a -> mean", "b -> mean", "c -> mean"]
    warmerge.average([world.a, world.b, world.c], tmp_path / "warm")
    rewards = [bench.score(load_reward_model(folder))["val"] for folder in (world.a, world.b, world.c)]
    warm = bench.score(load_reward_model(tmp_path / "warm"))["val"]
    right = {name: metrics.right(bench.sets[0].margins(r)).mean() for name, r in zip("abc", rewards, strict=True)}
    for name in "abc":
        rows = rows_of(found, f"{name} -> mean")
        assert rows[0.0]["wa"] == right[name]
        assert rows[1.0]["wa"] == metrics.right(bench.sets[0].margins(warm)).mean()
        assert rows[1.0]["ens"] == metrics.right(bench.sets[0].margins(numpy.mean(rewards, axis=0))).mean()
        assert rows[0.5]["diag"] == pytest.approx((right[name] + rows[1.0]["wa"]) / 2)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"points": 3}, (0.0, 0.5, 1.0)),
        ({"points": 3, "extrapolate": 0.1}, (-0.5, 0.0, 0.5, 1.0, 1.5)),  # at least so far, in whole steps
        ({"points": 11, "extrapolate": 0.2}, tuple(i / 10 for i in range(-2, 13))),
        ({"lambdas": [1, 0.5, 0.5, 2]}, (0.5, 1, 2)),
    ],
)
def test_grids(given: dict[str, Any], expected: tuple[float, ...]) -> None:
    assert lambda_grid(**given) == expected


# --- verdicts ---


def near(world: World, folder: Path, seed: int) -> Path:
    """A member a hair's breadth from a."""
    shutil.copytree(world.a, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: t + 1e-4 * t.abs().mean() * torch.randn(t.shape, generator=generator)
        for name, t in load_file(world.a / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_it_holds_between_members_that_are_nearly_one(world: World, tmp_path: Path) -> None:
    members = [near(world, tmp_path / "x", 1), near(world, tmp_path / "y", 2)]
    data = write_rows(tmp_path / "big.jsonl", pairs(500, 9, each=1))
    (verdict,) = lmc_curve(members, [data], points=3, measuring=FAST).verdicts
    assert (verdict["verdict"], verdict["n"], verdict["prompts"], verdict["at"]) == ("holds", 500, 500, 0.5)
    assert verdict["words"].startswith("holds on big: on the way from x to y the average is nowhere below the straight")
    (few,) = lmc_curve(members, [data], points=3, measuring=replace(FAST, limit=30)).verdicts
    assert (few["verdict"], few["n"]) == ("cannot tell", 30)
    assert few["words"].startswith("cannot tell on big: on the way from x to y the average may fall between")


def test_it_does_not_hold_with_a_member_of_other_random_weights(curve: tuple[Curve, Path]) -> None:
    for verdict in curve[0].verdicts:
        assert verdict["verdict"] == "does not hold"
        assert verdict["low"] > 0.05
        assert verdict["words"].startswith(f"does not hold on {verdict['set']}: on the way from a to alien the average")
    assert any("heads look independently drawn" in warning.what for warning in curve[0].warnings)


def test_without_an_inner_point_there_is_no_verdict(world: World) -> None:
    assert lmc_curve([world.a, world.b], [world.data("ood")], lambdas=[0, 1, 2], measuring=FAST).verdicts == ()


# --- files ---


def test_files_hold_rows_and_no_weights(curve: tuple[Curve, Path], world: World) -> None:
    found, out = curve
    assert sorted(path.name for path in out.iterdir()) == [
        "curve-verdicts.csv", "curve.csv", "curve.json", "curve.png", "curve.svg", POINTS
    ]  # fmt: skip
    texts = {name: len(open_bench([f"{name}={world.data(name)}"]).texts()[name]) for name in ("val", "ood")}
    with safe_open(out / POINTS, framework="numpy") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            name, *weights = json.loads(key)
            assert (file.get_tensor(key).shape, len(weights)) == ((texts[name],), 2)
    content = json.loads((out / "curve.json").read_text())
    assert content == json.loads(json.dumps(found.as_json()))
    assert content["format"] == "warmerge lmc-curve 1"
    assert content["intervals"] == (
        "percentile bootstrap over prompts, 200 resamples, seed 0; barrier: simultaneous over the inner points"
    )
    assert len(content["fingerprint"]) == 64
    assert all(len(entry["fingerprint"]) == 64 and entry["n"] and entry["prompts"] for entry in content["sets"])
    assert content["checkpoints"] == [str(world.a), str(world.alien)]
    with (out / "curve.csv").open() as file:
        table = list(csv.DictReader(file))
    assert table == [{key: str(value) for key, value in row.items()} for row in found.rows]


def test_figures_are_drawn_again_byte_by_byte(curve: tuple[Curve, Path], tmp_path: Path) -> None:
    shutil.copytree(curve[1], tmp_path / "out")
    (tmp_path / "out" / POINTS).unlink()
    for name in ("curve.png", "curve.svg"):
        (tmp_path / "out" / name).unlink()
    assert redraw(tmp_path / "out") == [tmp_path / "out" / "curve.png", tmp_path / "out" / "curve.svg"]
    for name in ("curve.png", "curve.svg"):
        assert (tmp_path / "out" / name).read_bytes() == (curve[1] / name).read_bytes()


# --- runs that stop and go on ---


def test_a_stopped_run_goes_on_and_gives_the_same_bytes(
    curve: tuple[Curve, Path], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [f"val={world.data('val')}", f"ood={world.data('ood')}"]
    arguments: dict[str, Any] = {"points": 5, "extrapolate": 0.5}
    original, calls = Bench.score, []

    def counted(self: Bench, model: Any) -> Any:
        calls.append(model.label)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, model)

    monkeypatch.setattr(Bench, "score", counted)
    with pytest.raises(Interrupted) as caught:
        lmc_curve([world.a, world.alien], data, tmp_path, **arguments)
    assert str(caught.value) == f"stopped; 3 points are kept in {tmp_path}; the same command goes on there"
    assert caught.value.exit_code == 130
    assert [path.name for path in tmp_path.iterdir()] == [POINTS]
    begun: list[int] = []
    again = lmc_curve(
        [world.a, world.alien], data, tmp_path, **arguments, measuring=replace(FAST, on_work=begun.append)
    )
    assert len(calls) == 4 + 6  # nine points in all; the fourth was lost
    texts = sum(len(open_bench([part]).sets[0].texts.texts) for part in data)
    assert begun == [6 * texts]
    for name in ("curve.csv", "curve-verdicts.csv", "curve.png", "curve.svg"):
        assert (tmp_path / name).read_bytes() == (curve[1] / name).read_bytes(), name
    assert again.as_json() == curve[0].as_json()


def test_finished_results_are_refused_before_anything_is_scored(
    curve: tuple[Curve, Path], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(curve[1], tmp_path / "out")
    monkeypatch.setattr(mixtures, "load_reward_model", never)
    data = [f"val={world.data('val')}", f"ood={world.data('ood')}"]
    with pytest.raises(UsageError) as caught:
        lmc_curve([world.a, world.alien], data, tmp_path / "out", points=5)
    assert str(caught.value) == f"{tmp_path / 'out'} holds curve.json already; choose another -o, or add --overwrite"
    # Fewer points of the same inputs: nothing is scored.
    fewer = lmc_curve([world.a, world.alien], data, tmp_path / "out", points=3, measuring=FAST, overwrite=True)
    assert len(fewer.rows) == 6
    assert fewer.record["cut"] == curve[0].record["cut"]


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoints": ["a", "b"]},
        {"checkpoints": ["alien", "a"]},
        {"data": ["ood"]},
        {"measuring": Measuring(limit=50)},
        {"measuring": Measuring(LoadOptions(max_length=30))},
        {"measuring": Measuring(LoadOptions(dtype="bfloat16"))},
    ],
)
def test_points_of_something_else_are_refused(
    curve: tuple[Curve, Path], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    shutil.copy(curve[1] / POINTS, tmp_path / POINTS)
    monkeypatch.setattr(mixtures, "load_reward_model", never)
    given = {"checkpoints": ["a", "alien"], "data": ["val", "ood"], "points": 5, **change}
    checkpoints = [getattr(world, name) for name in given.pop("checkpoints")]
    data = [f"{name}={world.data(name)}" for name in given.pop("data")]
    with pytest.raises(
        UsageError, match="holds points of other checkpoints, data, options or versions; choose another"
    ):
        lmc_curve(checkpoints, data, tmp_path, **given)


# --- refusals ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 1}, "a path has two ends: give two checkpoints or more"),
        ({"path": "all"}, "--path: expected pairs or mean, found 'all'"),
        ({"tolerance": 1.5}, "--tolerance: expected a fraction from 0 to 1 (0.01 is one point), found 1.5"),
        ({"points": 2}, "--points: expected 3 or more, so that one lies between the ends; found 2"),
        ({"extrapolate": -1}, "--extrapolate: expected how far to go beyond 0 and 1, such as 0.2; found -1"),
        ({"lambdas": []}, "--lambdas: expected numbers such as 0,0.25,0.5,0.75,1, found []"),
        ({"lambdas": [float("nan")]}, "--lambdas: expected numbers such as 0,0.25,0.5,0.75,1, found [nan]"),
        (
            {"lambdas": [0, 1], "extrapolate": 0.1},
            "--extrapolate continues the steps of --points; with --lambdas, name",
        ),
        ({"data": []}, "--data is missing: at least one set"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_scored(
    world: World, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(mixtures, "load_reward_model", never)
    given = {"data": [world.data("val")], **given}
    with pytest.raises(UsageError) as caught:
        lmc_curve([world.a, world.b][: given.pop("count", 2)], **given)
    assert str(caught.value).startswith(message)


def test_models_that_may_not_be_averaged_are_refused(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.b, tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(RefusedError, match="has rms_norm_eps"):
        lmc_curve([world.a, tmp_path / "b"], [world.data("val")], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert module.PATHS == ("pairs", "mean")


def test_an_average_that_loses_what_the_ensemble_keeps_is_told_apart(world: World) -> None:
    data = [f"val={world.data('val')}"]
    (near,) = lmc_curve([world.a, world.b], data, points=3, measuring=FAST).verdicts
    (far,) = lmc_curve([world.a, world.alien], data, points=3, measuring=FAST).verdicts
    assert "below the ensemble" not in near["words"]
    assert near["below_ensemble"] < 0.1
    assert far["below_ensemble_low"] > far["tolerance"]
    assert "points below the ensemble of the same models (95 % interval" in far["words"]
    assert far["words"].endswith("averaging their weights loses what averaging their rewards keeps.")
    assert far["words"].count("o not merge them") == 1


def test_an_end_that_only_guesses_is_judged_by_the_ensemble(world: World, tmp_path: Path) -> None:
    """Random weights: WA falls to chance, and so does the straight line, which therefore sees nothing wrong."""
    shutil.copytree(world.a, tmp_path / "random")
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(world.a / "model.safetensors")
    drawn = {name: t.std() * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    save_file(drawn, tmp_path / "random" / "model.safetensors", metadata={"format": "pt"})
    (verdict,) = lmc_curve([world.a, tmp_path / "random"], [world.data("val")], points=5, measuring=FAST).verdicts
    assert (verdict["against"], verdict["verdict"]) == ("ensemble", "does not hold")
    assert verdict["low"] < verdict["tolerance"] < verdict["below_ensemble_low"]
    assert (
        "points below the ensemble of the same models, which is the test here because one end is no better than"
        in verdict["words"]
    )
    assert verdict["words"].endswith(
        "Averaging their weights loses what averaging their rewards keeps: do not merge them."
    )
    (sound,) = lmc_curve([world.a, world.b], [world.data("val")], points=3, measuring=FAST).verdicts
    assert sound["against"] == "line"
