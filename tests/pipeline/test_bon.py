"""bon: every number by another way, from all subsets of the candidates; and what is refused, said, or kept."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from reward_world import BAD, GOOD, NAMES, NEUTRAL, World, write_rows
from safetensors.torch import load_file, save_file

import warmerge
from warmerge import Measuring, Proxy, best_of_n
from warmerge.errors import Interrupted, RefusedError, UsageError
from warmerge.pipeline.bon import BestOfN
from warmerge.pipeline.proxies import parse_proxies
from warmerge.pipeline.scoring import here, judge
from warmerge.report import results
from warmerge.rewards.ensembles import aggregate
from warmerge.rewards.metrics import interval, replicates
from warmerge.rewards.model import LoadOptions, load_reward_model
from warmerge.rewards.pairs import read_preferences
from warmerge.rewards.scoring import score

FAST = Measuring(resamples=100)
PROMPTS, N = 11, 8
# Instead of `best_of_n_figure`: drawing takes most of the time of a small run.
NO_FIGURES: Any = (lambda *_: [], ("rows", "wins"))
TABLES = ("rows", "differences", "wins", "peaks", "fits", "proxies")


def pool(count: int = PROMPTS, n: int = N, seed: int = 0, gold: bool = True) -> list[dict[str, Any]]:
    """Prompts with n different answers each; gold counts good and bad words, with noise, so that it never ties."""
    source = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        words = [[source.choice(source.choice((GOOD, BAD, NEUTRAL))) for _ in range(5)] for _ in range(n)]
        worth = [sum((w in GOOD) - (w in BAD) for w in answer) + source.gauss(0, 0.1) for answer in words]
        prompt = f"why {' '.join(source.sample(NAMES, 3))} {NAMES[i % 12]}"
        candidates = [" ".join([*answer, "hope" if j % 2 else "so"]) for j, answer in enumerate(words)]
        rows.append({"prompt": prompt, "candidates": candidates} | ({"gold": worth} if gold else {}))
    return rows


def rms(*folders: Path) -> list[Proxy]:
    return [Proxy(folder.name, "rm", (str(folder),)) for folder in folders]


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def small(world: World, folder: Path, rows: Sequence[dict[str, Any]], **options: Any) -> BestOfN:
    """A run of one reward model on a few prompts."""
    data = write_rows(folder / "small.jsonl", rows)
    return best_of_n(data, options.pop("proxies", rms(world.a)), folder / "out", measuring=FAST, **options)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that were scored; "stop" at the end of it interrupts after the next one."""
    loaded: list[str] = []

    def counting(model: Any, *arguments: Any) -> Any:
        if loaded[-1:] == ["stop"]:
            loaded.pop()
            raise KeyboardInterrupt
        loaded.append(Path(model.label).name)
        return score(model, *arguments)

    monkeypatch.setattr(here, "score", counting)
    return loaded


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are the question: nothing is drawn."""
    monkeypatch.setitem(results._FIGURES, results.BON, NO_FIGURES)


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded."""

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(judge, "load_reward_model", fail)


# --- everything on ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[BestOfN, Path, dict[str, int]]:
    """All kinds of proxies, gold and a control, and how often each model was loaded."""
    folder = tmp_path_factory.mktemp("bon")
    data = write_rows(folder / "pool.jsonl", pool())
    members = f"{world.a},{world.b},{world.c}"
    ensembles = ["mean={}", "std={},scale=std", "min={},agg=min", "uwo={},agg=uwo,k=2,scale=raw", "med={},agg=median"]
    proxies = parse_proxies(
        [f"a={world.a}", f"b={world.b}"], [spec.format(members) for spec in ensembles], [f"warm={members}"]
    )
    loaded: dict[str, int] = {}

    def counting(source: Any, *arguments: Any) -> Any:
        name = Path(source.label).name
        loaded[name] = loaded.get(name, 0) + 1
        return load_reward_model(source, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "load_reward_model", counting)
        patch.setitem(results._FIGURES, results.BON, NO_FIGURES)
        found = best_of_n(data, proxies, folder / "out", control=world.alien, measuring=FAST, command=["warmerge"])
    return found, folder, loaded


@pytest.fixture(scope="module")
def rewards(full: tuple[BestOfN, Path, dict[str, int]], world: World) -> dict[str, Any]:
    """(PROMPTS, N) of each proxy, of gold and control; of models by `score_file`, from their folders."""
    folder = full[1]
    data = folder / "pool.jsonl"
    warmerge.average([world.a, world.b, world.c], folder / "averaged")
    found: dict[str, Any] = {}
    folders = {"a": world.a, "b": world.b, "c": world.c, "control": world.alien, "warm": folder / "averaged"}
    for name, place in folders.items():
        warmerge.score_file(place, str(data), folder / f"{name}.jsonl")
        found[name] = numpy.array([row["reward"] for row in lines(folder / f"{name}.jsonl")])
    three = numpy.stack([found.pop("c") if name == "c" else found[name] for name in "abc"]).reshape(3, -1)
    for name, how, k, standardize in (
        ("mean", "mean", 0.5, False), ("std", "mean", 0.5, True), ("min", "min", 0.5, True), ("uwo", "uwo", 2.0, False),
        ("med", "median", 0.5, False),
    ):  # fmt: skip
        found[name] = aggregate(three, how, k, standardize).reshape(PROMPTS, N)
    found["gold"] = found["oracle"] = numpy.array([row["gold"] for row in lines(data)])
    return found


def subsets(n: int) -> list[list[int]]:
    return [list(subset) for subset in itertools.combinations(range(N), n)]


def over_subsets(own: Any, values: Callable[[Any], Any], n: int) -> Any:
    """(PROMPTS,): the mean of `values(row)` of the choices among all n of the N candidates; own has no ties."""
    out = []
    for p in range(PROMPTS):
        worth = values(p)
        out.append(numpy.mean([worth[max(subset, key=lambda i: own[p][i])] for subset in subsets(n)]))
    return numpy.array(out)


NAMED = ("a", "b", "mean", "std", "min", "uwo", "med", "warm", "oracle")


def test_every_row_by_brute_force(full: tuple[BestOfN, Path, dict[str, int]], rewards: dict[str, Any]) -> None:
    rows = {(row["proxy"], row["n"]): row for row in full[0].rows}
    assert [row["proxy"] for row in full[0].rows if row["n"] == N] == [*NAMED[:-1], "length", "random", "oracle"]
    assert sorted({n for _, n in rows}) == [1, 2, 3, 4, 6, 8]
    gold = rewards["gold"]

    def beaten(p: int) -> Any:
        return [numpy.mean([(x > y) + (x == y) / 2 for y in gold[p]]) for x in gold[p]]

    for name, n in itertools.product(NAMED, (1, 2, 3, 4, 6, 8)):
        row, own = rows[name, n], rewards[name]
        for target in ("gold", "control"):
            expected = over_subsets(own, lambda p, target=target: rewards[target][p], n).mean()  # type: ignore[misc]
            assert row[target] == pytest.approx(expected, abs=1e-5), (name, n, target)
        believed = over_subsets(own, lambda p, own=own: own[p], n).mean()  # type: ignore[misc]
        assert row["reward"] == pytest.approx(believed, abs=1e-5), (name, n)
        assert row["gain"] == pytest.approx((believed - own.mean()) / own.std(), abs=1e-4), (name, n)
        assert row["win"] == pytest.approx(over_subsets(own, beaten, n).mean(), abs=1e-9), (name, n)
        best = over_subsets(gold, lambda p: gold[p], n).mean()
        assert row["regret"] == pytest.approx(best - row["gold"], abs=1e-9), (name, n)
        assert (row["prompts"], row["kl_bound"]) == (PROMPTS, pytest.approx(numpy.log(n) - (n - 1) / n))


def test_differences_peaks_and_fits_are_those_of_the_rows(full: tuple[BestOfN, Path, dict[str, int]]) -> None:
    found = full[0]
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in found.rows:
        for target in ("gold", "control"):
            curves.setdefault((row["proxy"], target), []).append((row["n"], row[target]))
    of = {(row["proxy"], row["target"], row["n"]): row for row in found.differences}
    assert {row["to"] for row in found.differences} == {"a"}
    for (name, target), points in curves.items():
        for (n, value), (_, first) in zip(points, curves["a", target], strict=True):
            if name == "a":
                assert (name, target, n) not in of
            else:
                assert of[name, target, n]["difference"] == pytest.approx(value - first, abs=1e-12)
    for row in found.peaks:
        points = curves[row["proxy"], row["target"]]
        assert (row["peak_n"], row["at_peak"]) == max(points, key=lambda point: point[1])
        assert row["fall"] == pytest.approx(row["at_peak"] - points[-1][1])
    for row in found.fits:
        points = curves[row["proxy"], row["target"]]
        d = numpy.sqrt([numpy.log(n) - (n - 1) / n for n, _ in points[1:]])
        gains = numpy.array([value - points[0][1] for _, value in points[1:]])
        alpha, beta = numpy.linalg.lstsq(numpy.stack([d, -d * d], axis=1), gains, rcond=None)[0]
        assert (row["alpha"], row["beta"]) == (pytest.approx(alpha), pytest.approx(beta))
    judged = {(name, target) for name in (*NAMED, "length") for target in ("gold", "control")}
    for table in (found.peaks, found.fits):
        assert {(row["proxy"], row["target"]) for row in table} == judged


def test_who_wins_by_brute_force(full: tuple[BestOfN, Path, dict[str, int]], rewards: dict[str, Any]) -> None:
    gold, of = rewards["gold"], {(row["a"], row["b"], row["n"]): row for row in full[0].wins}
    assert {row["target"] for row in full[0].wins} == {"gold"}
    assert len(of) == 11 * 10 / 2 * 6
    for a, b in itertools.combinations(NAMED, 2):
        for n in (1, 3, 8):
            shares = []
            for p in range(PROMPTS):
                for subset in subsets(n):
                    x, y = (gold[p][max(subset, key=lambda i: rewards[name][p][i])] for name in (a, b))
                    shares.append((x > y) + (x == y) / 2)
            assert of[a, b, n]["win"] == pytest.approx(numpy.mean(shares), abs=1e-9), (a, b, n)


def test_baselines(full: tuple[BestOfN, Path, dict[str, int]], rewards: dict[str, Any]) -> None:
    """Ties of the length are shared out; a random choice is worth the mean at every n."""
    data = lines(full[1] / "pool.jsonl")
    for row in full[0].rows:
        if row["proxy"] == "random":
            assert row["gold"] == pytest.approx(rewards["gold"].mean(), abs=1e-12)
            assert row["control"] == pytest.approx(rewards["control"].mean(), abs=1e-5)
            assert row["win"] == pytest.approx(0.5)
            assert not {"reward", "gain"} & row.keys()
        if (row["proxy"], row["n"]) == ("length", N):
            longest = []
            for p, line in enumerate(data):
                lengths = [len(answer) for answer in line["candidates"]]
                longest.append(numpy.mean([g for g, n in zip(line["gold"], lengths, strict=True) if n == max(lengths)]))
                assert rewards["gold"][p].tolist() == line["gold"]
            assert row["gold"] == pytest.approx(numpy.mean(longest))


def test_every_model_is_scored_once_and_costs_are_counted(
    full: tuple[BestOfN, Path, dict[str, int]], rewards: dict[str, Any]
) -> None:
    found, _, loaded = full
    # The average is poured into a fresh copy of its first member.
    assert loaded == {"a": 2, "b": 1, "c": 1, "alien": 1}
    of, texts = {row["proxy"]: row for row in found.proxies}, PROMPTS * N
    assert list(of) == [*NAMED[:-1], "length", "random", "oracle"]
    bytes_of_one = of["a"]["weights_bytes"]
    for name in NAMED[:-1]:
        row, times = of[name], 3 if name in ("mean", "std", "min", "uwo", "med") else 1
        assert (row["texts_scored"], row["weights_bytes"]) == (times * texts, times * bytes_of_one), name
        assert row["reward_mean"] == pytest.approx(rewards[name].mean(), abs=1e-5)
        assert row["reward_std"] == pytest.approx(rewards[name].std(), abs=1e-5)
        lengths = [len(answer) for line in lines(full[1] / "pool.jsonl") for answer in line["candidates"]]
        expected = numpy.corrcoef(rewards[name].ravel(), lengths)[0, 1]
        assert row["length_correlation"] == pytest.approx(expected, abs=1e-4)
    assert of["mean"]["seconds"] > of["a"]["seconds"] + of["b"]["seconds"]
    assert (of["a"]["merge_seconds"], of["warm"]["merge_seconds"] > 0) == (pytest.approx(0, abs=1e-3), True)
    assert (of["uwo"]["aggregate"], of["uwo"]["standardized"]) == ("uwo", False)
    assert (of["min"]["aggregate"], of["min"]["standardized"]) == ("min", True)
    for name in ("length", "random", "oracle"):
        assert not {"texts_scored", "seconds", "weights_bytes"} & of[name].keys()
    (cost,) = (note for note in found.record["notes"] if note.startswith("cost: "))
    assert cost.startswith(f"cost: mean {3 * texts:,} texts scored, {of['mean']['seconds']:.1f} s, ")
    assert f"; warm {texts}, {of['warm']['seconds']:.1f} s (and {of['warm']['merge_seconds']:.1f} s to merge), " in cost
    ratio = of["mean"]["seconds"] / of["warm"]["seconds"]
    assert cost.endswith(f": {ratio:.1f} x the seconds for the ensemble")


def test_choices_by_hand(full: tuple[BestOfN, Path, dict[str, int]], rewards: dict[str, Any]) -> None:
    found, folder, _ = full
    data, chosen = lines(folder / "pool.jsonl"), lines(found.chosen)
    assert found.chosen == folder / "out" / "chosen.jsonl"
    assert [line["prompt"] for line in chosen] == [row["prompt"] for row in data]
    for p, (line, row) in enumerate(zip(chosen, data, strict=True)):
        best = int(rewards["warm"][p].argmax())
        assert (line["proxy"], line["index"], line["chosen"]) == ("warm", best, row["candidates"][best])
        assert line["rewards"] == pytest.approx(rewards["warm"][p].tolist(), abs=1e-5)
        assert line["gold"] == row["gold"][best]
        assert line["control"] == pytest.approx(rewards["control"][p][best], abs=1e-5)
        assert list(line["choices"]) == [*NAMED[:-1], "length", "random", "oracle"]
        for name in NAMED:
            assert line["choices"][name] == int(rewards[name][p].argmax()), name
        lengths = [len(answer) for answer in row["candidates"]]
        assert lengths[line["choices"]["length"]] == max(lengths)
    assert len({line["choices"]["random"] for line in chosen}) > 3


def test_intervals_resample_prompts(full: tuple[BestOfN, Path, dict[str, int]], rewards: dict[str, Any]) -> None:
    data = lines(full[1] / "pool.jsonl")
    prompts = [row["prompt"] for row in data]
    of = {(row["proxy"], row["n"]): row for row in full[0].rows}
    for name, n in (("a", 3), ("warm", 8)):
        values = over_subsets(rewards[name], lambda p: rewards["gold"][p], n)
        expected = interval(values.mean(), replicates(values[None], prompts, 100, 0)[:, 0], PROMPTS)
        row = of[name, n]
        assert (row["gold_low"], row["gold_high"]) == (pytest.approx(expected.low), pytest.approx(expected.high))
        assert row["gold_low"] < row["gold"] < row["gold_high"]
    paired = rewards["gold"][numpy.arange(PROMPTS), rewards["b"].argmax(axis=1)]
    paired = paired - rewards["gold"][numpy.arange(PROMPTS), rewards["a"].argmax(axis=1)]
    expected = interval(paired.mean(), replicates(paired[None], prompts, 100, 0)[:, 0], PROMPTS)
    (row,) = (r for r in full[0].differences if (r["proxy"], r["n"], r["target"]) == ("b", 8, "gold"))
    assert (row["low"], row["high"]) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_files_hold_what_was_returned(full: tuple[BestOfN, Path, dict[str, int]], world: World) -> None:
    found, folder, _ = full
    out = folder / "out"
    content = json.loads((out / "bon.json").read_text(), parse_constant=pytest.fail)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["scores.safetensors", "chosen.jsonl", "bon.json", "bon.csv", *(f"bon-{name}.csv" for name in TABLES[1:])]
    )
    for name in TABLES:
        assert content[name] == json.loads(json.dumps(results.without_nan(getattr(found, name))))
        with (out / ("bon.csv" if name == "rows" else f"bon-{name}.csv")).open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(content[name])
        for row, expected in zip(rows, content[name], strict=True):
            assert {key: value for key, value in row.items() if value} == {
                key: str(value) for key, value in expected.items() if value not in (None, "")
            }
    assert content["pool"] | {"fingerprint": ""} == {
        "source": str(folder / "pool.jsonl"), "prompts": PROMPTS, "rows": PROMPTS, "candidates": PROMPTS * N,
        "texts": PROMPTS * N, "smallest": N, "largest": N, "gold": True, "skipped_rows": 0, "short_rows": 0,
        "fingerprint": "",
    }  # fmt: skip
    assert (content["n"], content["chooser"], content["control"]) == (N, "warm", str(world.alien))
    assert content["intervals"] == "percentile bootstrap over prompts, 100 resamples, seed 0"
    single = content["fingerprints"][f"checkpoint {world.a}"]
    assert content["fingerprints"]["average warm"][0] == single[0]
    assert len(content["fingerprints"]) == 5
    assert found.warnings == ()


# --- choices ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_figures")
def test_ties_do_not_follow_the_file(world: World, tmp_path: Path) -> None:
    """On a pool that is sorted by gold a reward that knows nothing would look like an oracle, or its opposite."""
    rows = pool(60, 4)
    for row in rows:
        row["gold"] = [3.0, 2.0, 1.0, 0.0]
    found = small(world, tmp_path, rows, proxies=rms(world.flat))
    for row in found.rows:
        if row["proxy"] in ("flat", "random"):
            assert (row["gold"], row["win"]) == (pytest.approx(1.5), pytest.approx(0.5))
        if row["proxy"] == "flat":
            assert row["reward"] == 0.0
            assert "gain" not in row
    (win,) = (r["win"] for r in found.wins if (r["a"], r["b"], r["n"]) == ("flat", "random", 4))
    assert win == 0.5
    chosen = lines(found.chosen)
    counts = numpy.bincount([line["index"] for line in chosen], minlength=4)
    assert counts.min() >= 7
    assert counts.max() <= 25
    assert 1.1 < numpy.mean([line["gold"] for line in chosen]) < 1.9
    texts = [str(warning) for warning in found.warnings]
    assert "flat: gives all candidates of 60 of 60 prompts the same reward: a random choice" in texts
    assert not any(text.startswith("random: ") for text in texts)


@pytest.mark.usefixtures("no_figures")
def test_fewer_than_the_pool_has(world: World, tmp_path: Path, loads: list[str]) -> None:
    """Of 8 candidates 3 are drawn for the choice; on the curve every 3 of the 8 count."""
    rows = pool(20)
    found = small(world, tmp_path, rows, n=3, proxies=rms(world.a, world.b), chooser="b")
    whole = small(world, tmp_path, rows, overwrite=True, proxies=rms(world.a, world.b), chooser="b")
    assert loads == ["a", "b"]
    assert {row["n"] for row in found.rows} == {1, 2, 3}
    threes = {row["proxy"]: row["gold"] for row in whole.rows if row["n"] == 3}
    assert {row["proxy"]: row["gold"] for row in found.rows if row["n"] == 3} == threes
    assert (found.fits, found.record["n"], found.warnings) == ((), 3, ())
    full_lines = lines(whole.chosen)
    found = small(world, tmp_path, rows, n=3, overwrite=True, proxies=rms(world.a, world.b), chooser="b")
    drawn = set()
    for line, complete, row in zip(lines(found.chosen), full_lines, rows, strict=True):
        among = [i for i, reward in enumerate(line["rewards"]) if reward is not None]
        drawn.add(tuple(among))
        assert (len(line["rewards"]), len(among)) == (N, 3)
        for i in among:
            assert line["rewards"][i] == complete["rewards"][i]
        best = max(among, key=lambda i: complete["rewards"][i])
        assert (line["proxy"], line["index"], line["chosen"]) == ("b", best, row["candidates"][best])
        assert set(line["choices"].values()) <= set(among)
        assert line["choices"]["oracle"] == max(among, key=lambda i: row["gold"][i])
    assert len(drawn) > 10


@pytest.mark.usefixtures("no_figures")
def test_choices_and_intervals_repeat_with_the_seed(world: World, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pool.jsonl", pool(12))
    texts: list[tuple[str, ...]] = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        out = tmp_path / name
        if texts:  # the rewards of the first run
            out.mkdir()
            shutil.copy(tmp_path / "one" / "scores.safetensors", out)
        measuring = Measuring(resamples=100, seed=seed)
        best_of_n(data, rms(world.a, world.flat), out, n=2, measuring=measuring)
        texts.append(tuple((out / file).read_text() for file in ("chosen.jsonl", "bon.csv", "bon-wins.csv")))
    assert texts[0] == texts[1]
    assert all(first != other for first, other in zip(texts[0], texts[2], strict=True))


@pytest.mark.usefixtures("no_figures")
def test_rows_about_one_prompt_are_drawn_together(world: World, tmp_path: Path) -> None:
    """Twice the same rows are not twice the evidence."""
    rows = pool(12)
    once = small(world, tmp_path, rows, proxies=rms(world.a, world.b))
    twice = small(world, tmp_path, [*rows, *rows], overwrite=True, proxies=rms(world.a, world.b))
    assert (twice.record["pool"]["rows"], twice.record["pool"]["prompts"]) == (24, 12)
    assert twice.record["pool"]["texts"] == once.record["pool"]["texts"] == 12 * N
    for a, b in zip(once.rows, twice.rows, strict=True):
        assert list(a) == list(b)
        if a["proxy"] != "length":  # has ties, which are broken anew
            assert [b[key] for key in a if key != "proxy"] == [
                pytest.approx(a[key], abs=1e-9) if isinstance(a[key], float) else a[key] for key in a if key != "proxy"
            ]
    assert len(lines(twice.chosen)) == 24


@pytest.mark.usefixtures("no_figures")
def test_conversations_survive(world: World, tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "why oak\n\u2028\u00e9"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("clear", "rude \u2028 kind")]
    rows = [*pool(11, 2, gold=False), {"prompt": prompt, "candidates": answers}]
    found = small(world, tmp_path, rows)
    line = json.loads(found.chosen.read_text().split("\n")[11])
    assert line["prompt"] == prompt
    assert line["chosen"] == answers[line["index"]]


# --- what choices are worth -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_figures")
def test_differences_are_to_the_reference(world: World, tmp_path: Path) -> None:
    found = small(world, tmp_path, pool(n=4), proxies=rms(world.a, world.b), n=3, reference="length")
    gold = {(row["proxy"], row["n"]): row["gold"] for row in found.rows}
    assert {row["proxy"] for row in found.differences} == {"a", "b", "random", "oracle"}
    for row in found.differences:
        expected = gold[row["proxy"], row["n"]] - gold["length", row["n"]]
        assert row["to"] == "length"
        assert row["difference"] == pytest.approx(expected, abs=1e-12)
    assert found.record["reference"] == "length"


@pytest.mark.usefixtures("no_figures")
def test_a_control_alone_judges(world: World, tmp_path: Path) -> None:
    found = small(world, tmp_path, pool(gold=False), proxies=rms(world.a, world.b), control=world.alien, n=2)
    assert {row["target"] for table in (found.wins, found.peaks, found.differences) for row in table} == {"control"}
    assert all("control" in row and "win" in row for row in found.rows)
    assert not any(key in row for row in found.rows for key in ("gold", "regret"))
    assert "oracle" not in {row["proxy"] for row in found.rows}
    line = lines(found.chosen)[0]
    assert "gold" not in line
    assert isinstance(line["control"], float)


@pytest.mark.usefixtures("no_figures")
def test_a_function_as_control_says_what_choices_are_worth(world: World, tmp_path: Path) -> None:
    """As a gold column with the same numbers would; it also knows the best choice of all."""
    rows = pool(gold=False)
    rule = "def worth(prompts, completions):\n    return [len(text) % 7 for text in completions]\n"
    (tmp_path / "rule.py").write_text(rule)
    control = f"{tmp_path / 'rule.py'}:worth"
    found = small(world, tmp_path, rows, proxies=rms(world.a, world.b), control=control)
    (tmp_path / "gold").mkdir()
    golden = [{**row, "gold": [len(text) % 7 for text in row["candidates"]]} for row in rows]
    other = small(world, tmp_path / "gold", golden, proxies=rms(world.a, world.b))
    assert list(found.rows) == json.loads(json.dumps(list(other.rows)).replace('"gold', '"control'))
    assert found.proxies[-1]["proxy"] == other.proxies[-1]["proxy"] == "oracle"
    digest = hashlib.sha256(rule.encode()).hexdigest()
    assert found.record["fingerprints"][f"function {control}"] == ["worth", digest]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file"),
        ("def other(prompts, completions): return []", "the file has no function of this name; it has 'other'"),
        ("raise ValueError('no')", "the file cannot be run: ValueError: no"),
    ],
)
def test_a_function_that_cannot_be_run_is_told_before_anything_is_scored(
    world: World, tmp_path: Path, never: None, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "rule.py").write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)):
        small(world, tmp_path, pool(2, 2), proxies=rms(world.a), control=f"{tmp_path / 'rule.py'}:worth")


def test_without_gold_and_control_only_beliefs_are_known(world: World, tmp_path: Path) -> None:
    found = small(world, tmp_path, pool(gold=False))
    assert (found.wins, found.peaks, found.differences, found.fits) == ((), (), (), ())
    assert {row["proxy"] for row in found.rows} == {"a", "length", "random"}
    assert not any(key in row for row in found.rows for key in ("gold", "control", "win", "regret"))
    gains = [row["gain"] for row in found.rows if row["proxy"] == "a"]
    assert gains == sorted(gains)
    assert (gains[0], gains[-1] > 1) == (0, True)
    assert found.record["notes"] == [
        "no gold and no --control: only what proxies think of their choices is known, not what these are worth"
    ]
    assert sorted(path.name for path in found.chosen.parent.iterdir()) == [
        "bon-proxies.csv", "bon.csv", "bon.json", "bon.png", "bon.svg", "chosen.jsonl", "scores.safetensors"
    ]  # fmt: skip


@pytest.mark.parametrize("part", ["rm", "member", "copy", "averaged"])
@pytest.mark.usefixtures("no_figures")
def test_a_control_that_is_a_proxy_is_said(world: World, tmp_path: Path, part: str) -> None:
    control = world.b
    if part == "copy":
        control = tmp_path / "copy"
        shutil.copytree(world.b, control)
    if part == "averaged":  # what was made of a member, by warmerge.json
        control = warmerge.average([world.c, world.start], tmp_path / "averaged").out
    proxies = [*rms(world.a), Proxy("warm", "warm", (str(world.b), str(world.c)))]
    if part == "rm":
        proxies = rms(world.a, world.b)
    found = small(world, tmp_path, pool(n=2), proxies=proxies, control=control)
    name = "b" if part == "rm" else "warm"
    assert [str(warning) for warning in found.warnings] == [
        f"{control}: is the control, and shares weights with '{name}': it flatters them; judge by another model"
    ]


def test_a_base_that_no_checkpoint_needs_is_refused(world: World, tmp_path: Path, never: None) -> None:
    measuring = Measuring(base=world.start)
    with pytest.raises(UsageError) as error:
        best_of_n(write_rows(tmp_path / "p.jsonl", pool(n=2)), rms(world.a), tmp_path / "out", measuring=measuring)
    assert str(error.value) == "--base is not used: no checkpoint is a LoRA adapter"


# --- going on, and starting anew --------------------------------------------------------------------------------------


def plain_of(found: BestOfN) -> Any:
    """Results without timings and places."""
    content = found.as_json()
    for row in content["proxies"]:
        row.pop("seconds", None), row.pop("merge_seconds", None)
    notes = [note for note in content["notes"] if not note.startswith("cost: ")]
    return json.dumps(content | {"chosen": "", "notes": notes}), found.chosen.read_text()


@pytest.mark.usefixtures("no_figures")
def test_ctrl_c_and_the_same_call_again(world: World, tmp_path: Path, loads: list[str]) -> None:
    data = write_rows(tmp_path / "pool.jsonl", pool())
    both = (str(world.b), str(world.c))
    proxies = [*rms(world.a), Proxy("ens", "ensemble", both), Proxy("warm", "warm", both)]
    whole = best_of_n(data, proxies, tmp_path / "whole", measuring=FAST)
    assert loads == ["a", "b", "c", "warm"]
    loads[:] = ["stop"]  # before anything is finished
    out = tmp_path / "out"
    with pytest.raises(Interrupted, match=r"^stopped; nothing is kept$"):
        best_of_n(data, proxies, out, measuring=FAST)
    assert not out.exists()
    said: list[str] = []
    with pytest.raises(Interrupted) as caught:
        best_of_n(data, proxies, out, measuring=Measuring(resamples=100, progress=lambda _: stop_after_one(loads)))
    assert str(caught.value) == (
        f"stopped; the rewards of 1 model are kept in {out / 'scores.safetensors'}; the same command goes on there"
    )
    assert sorted(path.name for path in out.iterdir()) == ["scores.safetensors"]
    loads.clear()
    again = best_of_n(data, proxies, out, measuring=FAST, say=said.append)
    assert loads == ["b", "c", "warm"]
    texts = PROMPTS * N
    assert said == [f"{texts} texts, 4 models: {3 * texts} rewards to compute"]
    assert plain_of(again) == plain_of(whole)
    assert (out / "bon.csv").read_bytes() == (tmp_path / "whole" / "bon.csv").read_bytes()


def stop_after_one(loads: list[str]) -> None:
    """From the progress of a model that is being scored: the next one will be interrupted."""
    if loads[-1] != "stop":
        loads.append("stop")


@pytest.mark.usefixtures("no_figures")
def test_seconds_of_different_runs_are_not_compared(world: World, tmp_path: Path) -> None:
    both = (str(world.a), str(world.b))
    ens, warm = Proxy("ens", "ensemble", both), Proxy("warm", "warm", both)
    small(world, tmp_path, pool(n=2), proxies=[ens])
    later = small(world, tmp_path, pool(n=2), proxies=[ens, warm], overwrite=True)
    assert later.record["notes"][-1].endswith(" MB: seconds of different runs")
    (tmp_path / "out" / "scores.safetensors").unlink()
    together = small(world, tmp_path, pool(n=2), proxies=[ens, warm], overwrite=True)
    assert together.record["notes"][-1].endswith(" x the seconds for the ensemble")


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("name", ["bon.json", "chosen.jsonl"])
def test_results_that_came_meanwhile_are_not_replaced(world: World, tmp_path: Path, name: str) -> None:
    """And nothing is lost: rewards are kept."""
    out = tmp_path / "out"

    def meets(_: str) -> None:
        out.mkdir(exist_ok=True)
        (out / name).write_text("another command's")

    with pytest.raises(UsageError, match=rf"{out} holds {name} already; choose another -o, or add --overwrite"):
        small(world, tmp_path, pool(n=2), say=meets)
    assert sorted(path.name for path in out.iterdir()) == sorted([name, "scores.safetensors"])
    assert (out / name).read_text() == "another command's"


@pytest.mark.usefixtures("no_figures")
def test_a_proxy_more_scores_only_that(world: World, tmp_path: Path, loads: list[str]) -> None:
    rows = pool(n=2)
    small(world, tmp_path, rows, proxies=rms(world.a, world.b))
    with pytest.raises(UsageError) as caught:
        small(world, tmp_path, rows, proxies=rms(world.a, world.b, world.c))
    out = tmp_path / "out"
    assert str(caught.value) == f"{out} holds bon.json already; choose another -o, or add --overwrite"
    found = small(world, tmp_path, rows, proxies=rms(world.a, world.b, world.c), overwrite=True)
    assert loads == ["a", "b", "c"]
    assert {row["proxy"] for row in found.rows if row["kind"] == "rm"} == {"a", "b", "c"}


@pytest.mark.parametrize("what", ["weights", "pool", "max_length"])
@pytest.mark.usefixtures("no_figures")
def test_what_changed_is_scored_again(world: World, tmp_path: Path, loads: list[str], what: str) -> None:
    shutil.copytree(world.a, tmp_path / "a")
    data = write_rows(tmp_path / "pool.jsonl", pool(n=3))
    first = best_of_n(data, rms(tmp_path / "a", world.b), tmp_path / "out", measuring=FAST)
    measuring, weights = FAST, tmp_path / "a" / "model.safetensors"
    if what == "weights":
        size = weights.stat().st_size
        tensors = load_file(weights)
        save_file(tensors | {"score.weight": -tensors["score.weight"]}, weights, metadata={"format": "pt"})
        os.utime(weights, ns=(0, 0))
        assert weights.stat().st_size == size
    elif what == "pool":
        write_rows(tmp_path / "pool.jsonl", pool(n=3, seed=1))
    else:
        measuring = Measuring(resamples=100, loading=LoadOptions(max_length=8))
    found = best_of_n(data, rms(tmp_path / "a", world.b), tmp_path / "out", measuring=measuring, overwrite=True)
    assert loads == ["a", "b", "a"] + ([] if what == "weights" else ["b"])
    old, new = ([row["reward"] for row in run.rows if row["proxy"] == "a"] for run in (first, found))
    assert old != new
    if what == "weights":  # the reward of the best of 1 is the mean of all
        assert new[0] == pytest.approx(-old[0])
    if what == "max_length":
        assert found.record["notes"][0].startswith("of 33 texts 33 lost the beginning of their prompt and 33 the end")
        assert first.record["notes"] == []


# --- pools ------------------------------------------------------------------------------------------------------------


def warned(found: BestOfN) -> list[str]:
    return [f"{Path(warning.where).name}: {warning.what}" for warning in found.warnings]


@pytest.mark.usefixtures("no_figures")
def test_ragged_pools_end_where_the_shortest_row_does(world: World, tmp_path: Path) -> None:
    rows = pool(n=4)
    for row in rows[:2]:
        row["candidates"], row["gold"] = row["candidates"][:2], row["gold"][:2]
    found = small(world, tmp_path, rows)
    what = "has 2 to 4 candidates for a prompt, so n ends at 2; --min-candidates leaves out prompts with fewer"
    assert warned(found) == [f"small.jsonl: {what}"]
    assert max(row["n"] for row in found.rows) == 2
    for line, row in zip(lines(found.chosen), rows, strict=True):
        assert len(line["rewards"]) == len(row["candidates"])
        assert sum(reward is not None for reward in line["rewards"]) == 2
    found = small(world, tmp_path, rows, overwrite=True, n=2)
    assert warned(found) == []
    found = small(world, tmp_path, rows, overwrite=True, n=3, min_candidates=3)
    assert warned(found) == ["small.jsonl: has 9 prompts: intervals over so few are too narrow to be trusted"]
    assert found.record["notes"] == ["2 prompts with too few candidates were left out"]
    assert (found.record["n"], found.record["pool"]["short_rows"]) == (3, 2)


@pytest.mark.usefixtures("no_figures")
def test_n_beyond_the_pool(world: World, tmp_path: Path) -> None:
    found = small(world, tmp_path, pool(n=3), n=64)
    assert warned(found) == ["small.jsonl: has 3 candidates for a prompt, so n ends there, not at 64"]
    assert (found.record["n"], max(row["n"] for row in found.rows)) == (3, 3)


@pytest.mark.usefixtures("no_figures")
def test_one_candidate(world: World, tmp_path: Path) -> None:
    found = small(world, tmp_path, pool(n=1))
    assert warned(found) == ["small.jsonl: has a prompt with one candidate: there is nothing to choose from"]
    assert {(row["n"], row["kl_bound"]) for row in found.rows} == {(1, 0.0)}
    assert all(row["win"] == 0.5 and row["regret"] == 0 for row in found.rows)
    assert {line["index"] for line in lines(found.chosen)} == {0}


def test_one_prompt_has_no_intervals(world: World, tmp_path: Path) -> None:
    found = small(world, tmp_path, pool(1, 3))
    assert warned(found) == ["small.jsonl: has one prompt: there are no intervals"]
    content = json.loads((tmp_path / "out" / "bon.json").read_text(), parse_constant=pytest.fail)
    assert {row["gold_low"] for row in content["rows"]} == {None}
    assert (tmp_path / "out" / "bon.svg").exists()


@pytest.mark.usefixtures("no_figures")
def test_candidates_that_repeat_are_counted(world: World, tmp_path: Path, loads: list[str]) -> None:
    rows = pool(n=3)
    rows[0]["candidates"] = ["kind"] * 3
    rows[1]["candidates"][2] = rows[1]["candidates"][0]
    found = small(world, tmp_path, rows)
    assert found.record["notes"] == [
        "3 of 33 candidates repeat another one of their prompt; for 1 prompt all are the same, and there is no choice"
    ]
    # One text, one reward: no two of them differ by how they were batched.
    first, second = (line["rewards"] for line in lines(found.chosen)[:2])
    assert len(set(first)) == 1
    assert second[0] == second[2]
    assert found.record["pool"]["texts"] == 30
    assert warned(found) == []  # it is the pool that has no choice there, not the model
    (row,) = (row for row in found.proxies if row["proxy"] == "a")
    assert row["texts_scored"] == 30


@pytest.mark.usefixtures("no_figures")
def test_finished_and_skipped_are_said(world: World, tmp_path: Path) -> None:
    rows = [row | {"finished": [True, False]} for row in pool(12, 2)]
    data = write_rows(tmp_path / "rows.jsonl", [*rows, {"prompt": "why"}])
    measuring = Measuring(resamples=100, skip_bad_rows=True)
    found = best_of_n(data, rms(world.a), tmp_path / "out", measuring=measuring)
    assert found.record["notes"] == [
        "12 of 24 candidates were cut off where they were sampled",
        "1 bad rows were left out",
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "refused: FILE: is empty: there is no row in it"),
        ([{"prompt": "why"}], "FILE:1: has the columns 'prompt'; expected prompt and candidates"),
        ([{"prompt": "why", "candidates": []}], "FILE:1: 'candidates' is not a list of one text or more"),
        ([*pool(3, 2), {"prompt": "x", "candidates": ["a", "b"], "gold": [1, float("nan")]}],
         "FILE:4: 'gold[1]' is NaN, expected a finite number"),
        ([*pool(1, 2), {"prompt": "x", "candidates": ["a", "b"], "gold": [1]}],
         "FILE:2: 'gold' is not a list of 2 numbers, one for each candidate: found 1 of them"),
        ([*pool(1, 2), {"prompt": "x", "candidates": ["a", "b"]}], "FILE:2: has no 'gold', which other rows have"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("never")
def test_bad_rows_are_refused_before_a_model_is_loaded(
    world: World, tmp_path: Path, rows: list[Any], message: str
) -> None:
    with pytest.raises(RefusedError) as caught:
        small(world, tmp_path, rows)
    assert message.replace("FILE", str(tmp_path / "small.jsonl")) in str(caught.value)
    assert not (tmp_path / "out").exists()


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("never")
def test_all_broken_checkpoints_are_named_at_once(world: World, tmp_path: Path) -> None:
    for name in ("cut", "headless", "b"):
        shutil.copytree(world.b, tmp_path / name)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    tensors = load_file(world.b / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, tmp_path / "headless" / "model.safetensors", metadata={"format": "pt"})
    proxies = rms(tmp_path / "cut", world.a, tmp_path / "headless")
    proxies.append(Proxy("warm", "warm", (str(world.b), str(tmp_path / "b"))))
    with pytest.raises(RefusedError) as caught:
        small(world, tmp_path, pool(2, 2), proxies=proxies, control=tmp_path / "cut")
    where = [finding.where for finding in caught.value.findings]
    assert [Path(place).name for place in where] == ["model.safetensors", "headless", "b"]
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("never")
def test_a_checkpoint_that_is_not_there(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no-such"):
        small(world, tmp_path, pool(2, 2), proxies=rms(world.a, tmp_path / "no-such"))


@pytest.mark.usefixtures("no_figures")
def test_unrelated_members_are_doubted(world: World, tmp_path: Path) -> None:
    proxies = [Proxy("warm", "warm", (str(world.a), str(world.alien)))]
    found = small(world, tmp_path, pool(n=2), proxies=proxies)
    assert any("The average of unrelated models is not a model" in warning.what for warning in found.warnings)
    assert json.loads((tmp_path / "out" / "bon.json").read_text())["warnings"] == [str(w) for w in found.warnings]


@pytest.mark.usefixtures("no_figures")
def test_a_member_twice_is_said(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.a, tmp_path / "copy")
    proxies = [Proxy("ens", "ensemble", (str(world.a), str(world.b), str(tmp_path / "copy")))]
    found = small(world, tmp_path, pool(n=2), proxies=proxies)
    names = ", ".join(sorted(repr(str(place)) for place in (world.a, tmp_path / "copy")))
    assert [str(warning) for warning in found.warnings] == [
        f"ens: has {names} as members, which seem to have the same weights: such a member counts twice"
    ]


@pytest.mark.usefixtures("no_figures")
def test_a_member_without_spread_cannot_be_standardised(world: World, tmp_path: Path) -> None:
    ensemble = Proxy("ens", "ensemble", (str(world.a), str(world.flat)), "min", standardize=True)
    with pytest.raises(RefusedError) as caught:
        small(world, tmp_path, pool(n=2), proxies=[ensemble])
    assert str(caught.value) == (
        f"refused: {world.flat}: gives every text the same reward, so ens cannot bring it to the others' scale; "
        "leave it out, or add scale=raw"
    )
    # What was scored is kept.
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scores.safetensors"]


@pytest.mark.usefixtures("no_figures")
def test_a_reward_that_is_not_a_number_is_refused(world: World, tmp_path: Path, loads: list[str]) -> None:
    shutil.copytree(world.b, tmp_path / "nan")
    path = tmp_path / "nan" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(RefusedError, match=r"nan: gives the reward nan to text 1; its weights hold NaN or overflow"):
        small(world, tmp_path, pool(n=2), proxies=rms(world.a, tmp_path / "nan"))
    assert not (tmp_path / "out" / "bon.json").exists()
    small(world, tmp_path, pool(n=2), proxies=rms(world.a))
    assert loads == ["a", "nan"]


@pytest.mark.usefixtures("no_figures")
def test_mixed_precision_is_said(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--dtype auto may choose one for each model, and another on another machine."""

    def mixed(source: Any, *_: Any) -> Any:
        return load_reward_model(source, LoadOptions(dtype="bfloat16" if source.label == str(world.b) else "float32"))

    monkeypatch.setattr(judge, "load_reward_model", mixed)
    found = small(world, tmp_path, pool(n=2), proxies=rms(world.a, world.b))
    which = f"{world.a}: float32 on cpu; {world.b}: bfloat16 on cpu"
    assert [str(warning) for warning in found.warnings] == [
        f"rewards: were computed in different precisions ({which}); give --dtype and --device"
    ]


@pytest.mark.usefixtures("no_figures")
def test_a_model_that_was_trained_on_these_prompts_is_said(world: World, tmp_path: Path) -> None:
    rows = pool(n=2)
    trained = [{"prompt": row["prompt"], "chosen": "kind", "rejected": "rude"} for row in rows[:3]]
    data = write_rows(tmp_path / "train-data.jsonl", trained)
    for name in ("0", "1"):
        shutil.copytree(world.a if name == "0" else world.b, tmp_path / "run" / "members" / name)
    said = {"data": data, "data_fingerprint": read_preferences(data).fingerprint}
    record = {"asked": said, "measuring": {"limit": None, "seed": 0}}
    (tmp_path / "run" / "train.json").write_text(json.dumps(record))
    places = (tmp_path / "run" / "members" / "0", tmp_path / "run" / "members" / "1")
    proxies = [Proxy("warm", "warm", (str(places[0]), str(places[1])))]
    found = small(world, tmp_path, rows, proxies=proxies)
    assert [str(warning) for warning in found.warnings] == [
        f"{tmp_path / 'run' / 'train.json'}: 3 of 11 prompts are in its training data ({data}); models do "
        "better on what they were trained on: use other prompts"
    ]


@pytest.mark.usefixtures("no_figures")
def test_paths_may_be_paths(world: World, tmp_path: Path) -> None:
    """In Python a checkpoint is often a Path: it must not fail after everything was scored."""
    proxies = [Proxy("a", "rm", (world.a,)), Proxy("ens", "ensemble", (world.a, world.b))]  # type: ignore[arg-type]
    found = small(world, tmp_path, pool(n=2), proxies=proxies)
    assert found.proxies[1]["checkpoints"] == f"{world.a}, {world.b}"


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "-n: expected 1 or more, found 0"),
        ({"n": -3}, "-n: expected 1 or more, found -3"),
        ({"chooser": "x"}, "--choose: expected one of 'a', found 'x'"),
        ({"chooser": "length"}, "--choose: expected one of 'a', found 'length'"),
        ({"reference": "x"}, "--reference: expected one of 'a', 'length', 'random', found 'x'"),
        ({"min_candidates": 0}, "--min-candidates: expected 1 or more, found 0"),
        ({"min_candidates": 9}, "--min-candidates 9: no prompt of FILE has more than 2"),
        ({"proxies": []}, "no proxy is given: name reward models with --rm, --ensemble or --warm"),
        ({"proxies": [Proxy("a", "rm", ("x",)), Proxy("a", "rm", ("y",))]},
         "two proxies are named 'a'; give each a name of its own"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("never")
def test_arguments_that_cannot_be_used(world: World, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        small(world, tmp_path, pool(2, 2), **options)
    assert str(caught.value) == message.replace("FILE", str(tmp_path / "small.jsonl"))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("never")
def test_places_where_results_cannot_go(world: World, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError) as caught:
        small(world, tmp_path, pool(2, 2))
    assert str(caught.value) == f"-o {tmp_path / 'out'} is a file; name a folder"
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.usefixtures("never")
def test_choices_do_not_replace_what_is_not_theirs(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    data = write_rows(out / "chosen.jsonl", pool(2, 2))
    before = Path(data).read_text()
    for overwrite in (False, True):
        with pytest.raises(UsageError) as caught:
            best_of_n(data, rms(world.a), out, overwrite=overwrite)
        assert str(caught.value) == f"{data} is where the choices would be written; choose another -o"
    with pytest.raises(UsageError) as caught:
        small(world, tmp_path, pool(2, 2))
    assert str(caught.value) == f"{out} holds chosen.jsonl already; choose another -o, or add --overwrite"
    assert Path(data).read_text() == before
