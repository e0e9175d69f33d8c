"""eval: every number of the table by another way, and what is refused before the first text is scored."""

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
from reward_world import World, own_accuracy, own_rewards, pairs, with_head, write_rows, write_tokenizer
from safetensors.torch import load_file, save_file

import warmerge
from warmerge.errors import RefusedError, UsageError, WarmergeError
from warmerge.pipeline import evaluate as module
from warmerge.pipeline.evaluate import Evaluation, evaluate
from warmerge.pipeline.scoring import judge
from warmerge.rewards import metrics
from warmerge.rewards.bench import Measuring, answer_lengths, open_bench
from warmerge.rewards.ensembles import ENSEMBLES, aggregate
from warmerge.rewards.model import load_reward_model
from warmerge.rewards.pairs import read_all

FAST = Measuring(resamples=200)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("a model was loaded")


def row_of(found: Evaluation, model: str, name: str = "val") -> dict[str, Any]:
    (row,) = (row for row in found.rows if (row["model"], row["set"]) == (model, name))
    return row


def rows_in(path: str | Path) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def full(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    """Everything on: three members, the start, two sets, small changes, a folder."""
    out = tmp_path_factory.mktemp("full") / "out"
    found = evaluate(
        [world.a, world.b, world.c], [f"val={world.data('val')}", f"ood={world.data('ood')}"], out=out,
        init=world.start, perturb_answers=6, measuring=FAST, command=["warmerge", "eval"],
    )  # fmt: skip
    return found, out


@pytest.fixture(scope="module")
def rewards(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The rewards of val's texts by each model on the disk, merges written there by `average`."""
    root = tmp_path_factory.mktemp("merges")
    warmerge.average([world.a, world.b, world.c], root / "average")
    for name in "abc":
        warmerge.average(
            [getattr(world, name), world.start], root / f"{name} half-way to start", rule="lambda", lam=0.5
        )
    bench = open_bench([f"val={world.data('val')}"])
    folders = {name: getattr(world, name) for name in ("a", "b", "c", "start")} | {p.name: p for p in root.iterdir()}
    return {name: bench.score(load_reward_model(folder))["val"] for name, folder in folders.items()} | {"bench": bench}


def test_members_are_as_accurate_as_in_transformers(full: tuple[Evaluation, Path], world: World) -> None:
    rows = rows_in(world.data("val"))
    for name in "ab":
        accuracy = own_accuracy(getattr(world, name), rows)
        assert row_of(full[0], name)["accuracy"] == accuracy
        assert 0.75 < accuracy < 0.95


def test_every_model_is_what_it_is_on_the_disk(full: tuple[Evaluation, Path], rewards: dict[str, Any]) -> None:
    subset = rewards["bench"].sets[0]
    for name in ("a", "average", "start", "a half-way to start", "c half-way to start"):
        row = row_of(full[0], name)
        assert row["reward_mean"] == pytest.approx(rewards[name].mean(), rel=1e-5, abs=1e-6), name
        assert row["reward_std"] == pytest.approx(rewards[name].std(), rel=1e-5), name
        assert row["accuracy"] == metrics.right(subset.margins(rewards[name])).mean(), name
    assert len({row["reward_mean"] for row in full[0].rows if row["kind"] != "ensemble"}) == 2 * 9


def test_ensembles_are_aggregates_of_the_members_rewards(
    full: tuple[Evaluation, Path], rewards: dict[str, Any]
) -> None:
    members = numpy.stack([rewards[name] for name in "abc"])
    subset = rewards["bench"].sets[0]
    for name, (how, standardize) in ENSEMBLES.items():
        own = aggregate(members, how, standardize=standardize)
        row = row_of(full[0], name)
        assert row["reward_std"] == pytest.approx(own.std(), rel=1e-5), name
        assert row["accuracy"] == pytest.approx(metrics.right(subset.margins(own)).mean()), name
        assert row["seconds"] == pytest.approx(sum(row_of(full[0], m)["seconds"] for m in "abc"))
        assert row["weights_bytes"] == 3 * row_of(full[0], "average")["weights_bytes"]


def test_length_alone_is_a_baseline(full: tuple[Evaluation, Path], world: World) -> None:
    rows = rows_in(world.data("val"))
    accuracy = numpy.mean([len(row["chosen"]) >= len(row["rejected"]) for row in rows])
    ties = sum(len(row["chosen"]) == len(row["rejected"]) for row in rows)
    row = row_of(full[0], "length only")
    assert (row["accuracy"], row["ties"], row["kind"]) == (pytest.approx(accuracy), ties, "baseline")
    assert (row["seconds"], row["weights_bytes"]) == (None, None)
    assert row["length_correlation"] == pytest.approx(1.0)


def test_length_correlation(full: tuple[Evaluation, Path], rewards: dict[str, Any]) -> None:
    lengths = answer_lengths(rewards["bench"].sets[0].texts.texts)
    expected = numpy.corrcoef(rewards["a"], lengths)[0, 1]
    assert row_of(full[0], "a")["length_correlation"] == pytest.approx(expected, abs=1e-5)


def test_models_stand_in_one_order_on_every_set(full: tuple[Evaluation, Path]) -> None:
    expected = [
        "a", "b", "c", *ENSEMBLES, "average", "start", "a half-way to start", "b half-way to start",
        "c half-way to start", "length only",
    ]  # fmt: skip
    for name, n in (("val", 160), ("ood", 100)):
        rows = [row for row in full[0].rows if row["set"] == name]
        assert [row["model"] for row in rows] == expected
        assert {(row["n"], row["prompts"]) for row in rows} == {(n, n // 2)}
        assert all(0 <= row["low"] < row["accuracy"] < row["high"] <= 1 for row in rows)


def test_differences_are_those_of_the_rows(full: tuple[Evaluation, Path]) -> None:
    found = full[0]
    average = row_of(found, "average")["accuracy"]
    of = {row["b"]: row for row in found.differences if row["set"] == "val"}
    members = {name: row_of(found, name)["accuracy"] for name in "abc"}
    best = max(members, key=lambda name: members[name])
    halfway = [row_of(found, f"{name} half-way to start")["accuracy"] for name in "abc"]
    expected = {
        f"best member ({best})": members[best], "mean of the members": numpy.mean(list(members.values())),
        **{name: row_of(found, name)["accuracy"] for name in ENSEMBLES},
        "start": row_of(found, "start")["accuracy"], "mean of the half-way models": numpy.mean(halfway),
    }  # fmt: skip
    assert list(of) == list(expected)
    for name, accuracy in expected.items():
        assert of[name]["difference"] == pytest.approx(average - accuracy, abs=1e-12)
        assert of[name]["low"] <= of[name]["difference"] <= of[name]["high"]
        assert (of[name]["a"], of[name]["n"], of[name]["prompts"]) == ("average", 160, 80)


def test_differences_are_paired(world: World) -> None:
    """An interval of two accuracies' difference, each with an interval of its own, would be wider by far."""
    found = evaluate([world.a, world.b], [f"val={world.data('train')}"], measuring=FAST)
    (row,) = (row for row in found.differences if row["b"] == "mean of the members")
    widths = [r["high"] - r["low"] for r in (row_of(found, "average"), row_of(found, "a"))]
    unpaired = float(numpy.hypot(*widths))
    assert 0 < row["high"] - row["low"] < 0.6 * unpaired


def test_files_say_what_was_returned(full: tuple[Evaluation, Path]) -> None:
    found, out = full
    assert sorted(path.name for path in out.iterdir()) == [
        "eval-differences.csv", "eval-movements.csv", "eval.csv", "eval.json", "eval.png", "eval.svg"
    ]  # fmt: skip
    content = json.loads((out / "eval.json").read_text())
    assert content == json.loads(json.dumps(found.as_json()))
    assert content["format"] == "warmerge eval 1"
    assert content["command"] == ["warmerge", "eval"]
    assert content["intervals"] == "percentile bootstrap over prompts, 200 resamples, seed 0"
    assert [(entry["name"], entry["n"]) for entry in content["sets"]] == [("val", 160), ("ood", 100)]
    for name, rows in (
        ("eval", found.rows),
        ("eval-differences", found.differences),
        ("eval-movements", found.movements),
    ):
        with (out / f"{name}.csv").open() as file:
            table = list(csv.DictReader(file))
        assert len(table) == len(rows)
        for text, row in zip(table, rows, strict=True):
            assert text == {key: "" if value is None else str(value) for key, value in row.items()}


def test_small_changes_are_scored_by_members_ensemble_and_average(
    full: tuple[Evaluation, Path], world: World, rewards: dict[str, Any]
) -> None:
    rows = [row for row in full[0].movements if row["set"] == "val"]
    assert list(dict.fromkeys(row["model"] for row in rows)) == ["a", "b", "c", "ensemble (mean)", "average"]
    bench = open_bench([f"val={world.data('val')}"], measuring=FAST)
    (sample,) = module.sample_changes(bench, 6)
    after = own_rewards(world.a, [f"{prompt}\n\n{answer}" for prompt, answer in sample.changed])
    moved = numpy.abs(numpy.array(after) - rewards["a"][list(sample.origin)]) / rewards["a"].std()
    (row,) = (row for row in rows if (row["model"], row["change"]) == ("a", "all"))
    assert row["moved"] == pytest.approx(moved.mean(), rel=1e-3)
    assert row["n"] == len(sample.changed)


def test_one_checkpoint_alone(world: World) -> None:
    found = evaluate([world.a], [world.data("val")], measuring=FAST)
    assert [row["model"] for row in found.rows] == ["a", "length only"]
    assert found.differences == ()
    assert found.movements == ()
    assert found.notes == ()


def test_no_average_compares_what_cannot_be_averaged(world: World, tmp_path: Path) -> None:
    """A shorter vocabulary, and so another tokenizer: refused as a merge, but it can be compared."""
    from reward_world import VOCABULARY

    other = tmp_path / "other"
    shutil.copytree(world.b, other)
    words = [*VOCABULARY[:3], *VOCABULARY[:2:-1]]  # the same words, other ids
    write_tokenizer(other, words)
    tensors = load_file(other / "model.safetensors")
    order = [VOCABULARY.index(word) for word in words]
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][order].contiguous()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusedError) as caught:
        evaluate([world.a, other], [world.data("val")], measuring=FAST)
    assert f"{other}/tokenizer.json: differs from {world.a}'s" in str(caught.value)
    found = evaluate([world.a, world.b, other], [world.data("val")], with_average=False, measuring=FAST)
    assert "average" not in {row["model"] for row in found.rows}
    assert found.differences == ()
    # Each read the texts with its own tokenizer, so a model whose ids were exchanged is the same model.
    rows = {row["model"]: row for row in found.rows}
    assert rows["other"]["reward_mean"] == pytest.approx(rows["b"]["reward_mean"], abs=1e-5)
    assert rows["other"]["accuracy"] == rows["b"]["accuracy"]


def test_another_architecture_is_compared_and_not_averaged(world: World, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(**sizes, vocab_size=80, num_labels=1, max_position_embeddings=64, pad_token_id=0)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    write_tokenizer(tmp_path / "bert")
    with pytest.raises(RefusedError) as caught:
        evaluate([world.a, tmp_path / "bert"], [world.data("val")], measuring=FAST)
    assert f"{tmp_path / 'bert'}/config.json: has model_type" in str(caught.value)
    found = evaluate([world.a, tmp_path / "bert"], [world.data("val")], with_average=False, measuring=FAST)
    assert [row["model"] for row in found.rows][:2] == ["a", "bert"]


# --- label noise ---


def test_a_mask_splits_its_set_and_says_whether_noise_was_memorised(world: World, tmp_path: Path) -> None:
    bench = open_bench([f"train={world.data('train')}"])
    swapped = list(range(0, 500, 5))
    mask = tmp_path / "corruption.json"
    mask.write_text(json.dumps({"fingerprint": bench.sets[0].preferences.fingerprint, "n": 500, "swapped": swapped}))
    data = [f"train={world.data('train')}", f"val={world.data('val')}"]
    found = evaluate([world.a, world.b], data, mask=mask, measuring=FAST)
    parts = {name: row_of(found, "a", name) for name in ("train[swapped]", "train[clean]", "val")}
    assert [part["n"] for part in parts.values()] == [100, 400, 160]
    right = metrics.right(bench.sets[0].margins(bench.score(load_reward_model(world.a))["train"]))
    assert parts["train[swapped]"]["accuracy"] == pytest.approx(1 - right[swapped].mean())
    assert parts["train[clean]"]["accuracy"] == pytest.approx(numpy.delete(right, swapped).mean())
    assert any("they did not memorise label noise" in note for note in found.notes)


@pytest.mark.parametrize("limit", [None, 100])
def test_a_mask_of_other_data_is_refused(
    world: World, tmp_path: Path, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = tmp_path / "corruption.json"
    name = "val" if limit is None else "train"
    (whole,) = read_all([world.data("train")])
    mask.write_text(json.dumps({"fingerprint": whole.fingerprint, "n": 500, "swapped": [1, 9]}))
    monkeypatch.setattr(judge, "load_reward_model", never)
    with pytest.raises(UsageError, match="--mask is of a set of 500 comparisons that is not among --data"):
        evaluate([world.a], [world.data(name)], mask=mask, measuring=Measuring(limit=limit))


# --- data ---


def test_ties_are_counted_and_what_needs_a_scale_is_left_out(world: World) -> None:
    found = evaluate([world.a, world.flat], [world.data("val")], perturb_answers=3, measuring=FAST)
    flat = row_of(found, "flat")
    assert (flat["accuracy"], flat["ties"], flat["reward_std"]) == (1.0, 160, 0.0)
    assert numpy.isnan(flat["length_correlation"])
    assert [row["model"] for row in found.rows if row["kind"] == "ensemble"] == ["ensemble (mean)", "ensemble (median)"]
    assert (
        "val: flat gives every text the same reward, so that all its comparisons are ties; what needs a scale "
        "(standardised ensembles, small changes) is left out"
    ) in found.notes
    assert {row["model"] for row in found.movements} == {"a", "ensemble (mean)", "average"}
    assert found.as_json()["rows"]


def test_a_sample_of_whole_prompts(world: World) -> None:
    found = evaluate([world.a], [world.data("val")], measuring=replace(FAST, limit=31))
    row = found.rows[0]
    assert (row["n"], row["prompts"]) == (32, 16)
    assert (
        evaluate([world.a], [world.data("val")], measuring=replace(FAST, limit=31)).rows[0]["accuracy"]
        == row["accuracy"]
    )


def test_bad_rows_are_refused_or_counted(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "bad.jsonl", [*pairs(12, 1), {"prompt": "why", "chosen": 3, "rejected": "a"}])
    found = evaluate([world.a], [path], measuring=replace(FAST, skip_bad_rows=True))
    assert found.rows[0]["n"] == 12
    assert found.notes == ("bad: 1 bad rows were left out",)
    assert found.record["sets"][0]["skipped_rows"] == 1
    monkeypatch.setattr(judge, "load_reward_model", never)
    with pytest.raises(RefusedError) as caught:
        evaluate([world.a], [path])
    assert str(caught.value).splitlines()[1:] == [
        f"  - {path}:13: 'chosen' is 3, expected text or a list of messages",
        f"  - {path}: --skip-bad-rows leaves bad rows out and counts them",
    ]


def test_cut_texts_and_different_scales_are_noted(world: World, tmp_path: Path) -> None:
    head = load_file(world.b / "model.safetensors")["score.weight"]
    loud = with_head(world.b, tmp_path / "loud", 10 * head)
    found = evaluate(
        [world.a, loud], [world.data("val")], measuring=replace(FAST, loading=warmerge.LoadOptions(max_length=11))
    )
    cut, _, scale = found.notes
    assert cut.startswith("val: of 3")
    assert "lost the beginning of their prompt" in cut
    assert scale.startswith("val: the members' reward scales differ (std a 0.")
    assert scale.endswith("; raw ensembles follow the largest")
    assert found.record["cut"]["val"]["answer_cut"] > 0


# --- refusals, before anything is scored ---


def test_existing_results_are_refused_before_anything_is_scored(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate([world.a], [world.data("val")], out=tmp_path, measuring=FAST)
    before = (tmp_path / "eval.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(judge, "load_reward_model", never)
        with pytest.raises(UsageError) as caught:
            evaluate([world.b], [world.data("val")], out=tmp_path)
        (tmp_path / "file").write_text("")
        with pytest.raises(UsageError, match=r"-o .*/file is a file; name a folder"):
            evaluate([world.b], [world.data("val")], out=tmp_path / "file")
    assert str(caught.value) == f"{tmp_path} holds eval.json already; choose another -o, or add --overwrite"
    assert (tmp_path / "eval.json").read_bytes() == before
    evaluate([world.b], [world.data("val")], out=tmp_path, measuring=FAST, overwrite=True)
    assert json.loads((tmp_path / "eval.json").read_text())["rows"][0]["model"] == "b"


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_scored(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "load_reward_model", never)
    with pytest.raises(OSError, match="/proc"):
        evaluate([world.a], [world.data("val")], out="/proc/results")


def test_results_that_came_meanwhile_are_not_replaced(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.score_all

    def meets(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(module, "score_all", real)
        evaluate([world.b], [world.data("val")], out=tmp_path, measuring=FAST)
        return real(*arguments, **options)

    monkeypatch.setattr(module, "score_all", meets)
    with pytest.raises(WarmergeError, match=rf"{tmp_path}/eval\.json meanwhile, .* is in {tmp_path}/\.eval\.partial"):
        evaluate([world.a], [world.data("val")], out=tmp_path, measuring=FAST)
    models = [
        json.loads((folder / "eval.json").read_text())["rows"][0]["model"]
        for folder in (tmp_path, tmp_path / ".eval.partial")
    ]
    assert models == ["b", "a"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": []}, "--data is missing: at least one set of preference pairs, as NAME=PATH"),
        ({"init": "START"}, "--init compares with an average: give two checkpoints or more, without --no-average"),
        ({"perturb_answers": -1}, "--perturb: expected a number of answers, found -1"),
        ({"checkpoints": ["A", "A"], "with_average": False}, "A is given twice; give each checkpoint once"),
        ({"data": ["x=VAL", "x=OOD"]}, "VAL and OOD are both named 'x'; name one of them, as in other=OOD"),
        ({"mask": "NONE"}, "--mask: cannot read NONE: No such file or directory"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_scored(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    places = {
        "START": str(world.start), "VAL": world.data("val"), "OOD": world.data("ood"), "NONE": str(tmp_path / "none"),
    }  # fmt: skip

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(part) for part in value]
        for name, place in places.items():
            value = value.replace(name, place) if isinstance(value, str) else value
        return str(world.a) if value == "A" else value

    monkeypatch.setattr(judge, "load_reward_model", never)
    arguments = {"checkpoints": ["A"], "data": ["VAL"], **given}
    with pytest.raises(UsageError) as caught:
        evaluate(**{key: filled(value) for key, value in arguments.items()})
    assert str(caught.value) == filled(message).replace("A is given", f"{world.a} is given")


def test_a_checkpoint_without_a_head_is_refused(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "headless"
    shutil.copytree(world.b, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusedError) as caught:
        evaluate([folder], [world.data("val")])
    assert "score.weight" in str(caught.value)
    assert "at random" in str(caught.value)
    with pytest.raises(RefusedError, match="has no reward head"):
        evaluate([world.a, folder], [world.data("val")])
    with pytest.raises(RefusedError, match="has no reward head"):
        evaluate([world.a, world.b], [world.data("val")], init=folder)


@pytest.mark.parametrize("tensor", ["score.weight", "model.layers.0.mlp.up_proj.weight"])
def test_weights_that_are_nan_are_refused(world: World, tmp_path: Path, tensor: str) -> None:
    folder = tmp_path / "nan"
    shutil.copytree(world.b, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor].view(-1)[3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusedError) as caught:
        evaluate([world.a, folder], [world.data("val")], out=tmp_path / "out")
    assert "nan" in str(caught.value).lower()
    assert not (tmp_path / "out").exists()


# --- names ---


def test_a_member_may_be_called_like_something_else(world: World, tmp_path: Path) -> None:
    """Folders named start and average: each row is still of the model that it names."""
    for name, source in (("start", world.a), ("average", world.b)):
        shutil.copytree(source, tmp_path / name)
    found = evaluate(
        [tmp_path / "start", tmp_path / "average"], [world.data("val")], init=world.start, out=tmp_path / "out",
        measuring=FAST,
    )  # fmt: skip
    plain = evaluate([world.a, world.b], [world.data("val")], init=world.start, measuring=FAST)
    names = [row["model"] for row in found.rows]
    assert len(set(names)) == len(names)
    assert names[:2] == ["checkpoint start", "checkpoint average"]
    keys = ("kind", "accuracy", "low", "high", "reward_mean")
    assert [[row[k] for k in keys] for row in found.rows] == [[row[k] for k in keys] for row in plain.rows]


def test_a_start_that_is_a_member_is_refused(world: World) -> None:
    with pytest.raises(RefusedError, match="is the same checkpoint as"):
        evaluate([world.a, world.b], [world.data("val")], init=world.b)


def test_doubts_of_the_merge_are_passed_on(world: World) -> None:
    found = evaluate([world.a, world.b], [world.data("val")], init=world.alien, measuring=FAST)
    assert any("heads look independently drawn" in warning.what for warning in found.warnings)
    assert len(set(found.warnings)) == len(found.warnings)


def test_an_earlier_merge_is_measured_beside_its_members_and_is_none(world: World, tmp_path: Path) -> None:
    warmerge.average([world.a, world.b], tmp_path / "warm")
    data = [f"val={world.data('val')}"]
    found = evaluate([tmp_path / "warm", world.a, world.b], data, measuring=FAST)
    assert {row["model"]: row["kind"] for row in found.rows if row["kind"] in ("member", "merged")} == {
        "a": "member", "b": "member", "warm": "merged",
    }  # fmt: skip
    merged, average = row_of(found, "warm"), row_of(found, "average")
    assert (merged["accuracy"], merged["reward_mean"]) == (average["accuracy"], pytest.approx(average["reward_mean"]))
    alone = evaluate([tmp_path / "warm"], data, measuring=FAST)
    assert [row["kind"] for row in alone.rows] == ["member", "baseline"]


# --- models beside the members ---


def test_a_model_beside_is_measured_and_is_no_member(world: World, tmp_path: Path) -> None:
    data = [f"val={world.data('val')}", f"ood={world.data('ood')}"]
    plain = evaluate([world.a, world.b], data, init=world.start, perturb_answers=4, measuring=FAST)
    found = evaluate(
        [world.a, world.b], data, init=world.start, beside=[f"long={world.c}", world.alien], perturb_answers=4,
        measuring=FAST, out=tmp_path / "out",
    )  # fmt: skip
    names = [row["model"] for row in found.rows if row["set"] == "val"]
    assert names[-4:] == ["b half-way to start", "long", "alien", "length only"]
    assert {row["kind"] for row in found.rows if row["model"] in ("long", "alien")} == {"beside"}
    # Nothing else changes: it is averaged with none, and in no ensemble.
    untimed = [{key: value for key, value in row.items() if key != "seconds"} for row in found.rows]
    assert [row for row in untimed if row["kind"] != "beside"] == [
        {key: value for key, value in row.items() if key != "seconds"} for row in plain.rows
    ]
    assert [row for row in found.differences if row["b"] not in ("long", "alien")] == list(plain.differences)
    assert found.movements == plain.movements
    assert (found.notes, found.warnings) == (plain.notes, plain.warnings)
    for name, folder, end in (("long", world.c, "val"), ("alien", world.alien, "ood")):
        assert row_of(found, name, end)["accuracy"] == own_accuracy(folder, rows_in(world.data(end)))
        (row,) = (row for row in found.differences if (row["b"], row["set"]) == (name, end))
        gap = row_of(found, "average", end)["accuracy"] - row_of(found, name, end)["accuracy"]
        assert row["difference"] == pytest.approx(gap, abs=1e-12)
        assert row["low"] <= row["difference"] <= row["high"]
    content = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert content["checkpoints"] == [str(world.a), str(world.b), str(world.c), str(world.alien)]
    assert list(content["fingerprints"]) == ["start", "long", "alien", "a", "b"]
    one = evaluate([world.c], data[:1], measuring=FAST)
    assert content["fingerprints"]["long"] == one.record["fingerprints"]["c"]
    assert "measured beside the members" in (tmp_path / "out" / "eval.svg").read_text()


def test_a_model_beside_one_checkpoint_or_what_cannot_be_averaged(world: World) -> None:
    for checkpoints, given in (([world.a], {}), ([world.a, world.b], {"with_average": False})):
        found = evaluate(checkpoints, [world.data("val")], beside=[world.c], measuring=FAST, **given)
        assert [row["kind"] for row in found.rows if row["model"] == "c"] == ["beside"]
        assert found.differences == ()


@pytest.mark.parametrize(
    "name", ["b", "average", "start", "length only", "ensemble (mean)", "mean of the members", "a half-way to start",
             "mean of the half-way models", "best member (b)", "twice"],
)  # fmt: skip
def test_a_model_beside_has_a_name_of_its_own(world: World, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(judge, "load_reward_model", never)
    beside = [f"{name}={world.c}"] if name != "twice" else [f"twice={world.alien}", f"twice={world.c}"]
    with pytest.raises(UsageError) as caught:
        evaluate([world.a, world.b], [world.data("val")], beside=beside, measuring=FAST)
    assert str(caught.value) == (
        f"--beside: the table has a row {name!r} of something else; name {world.c} otherwise, as in other={world.c}"
    )


def test_a_member_is_not_measured_beside_itself(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "load_reward_model", never)
    shutil.copytree(world.b, tmp_path / "copy")
    for other in (world.b, tmp_path / "copy"):
        with pytest.raises(RefusedError) as caught:
            evaluate([world.a, world.b], [world.data("val")], beside=[f"other={other}"], measuring=FAST)
        assert str(caught.value) == (
            f"refused: {other}: has the same weights as {world.b}; give it once, as a member or with --beside"
        )
    with pytest.raises(UsageError, match="nothing"):
        evaluate([world.a], [world.data("val")], beside=[tmp_path / "nothing"], measuring=FAST)
