"""`warmerge probe`: a new last layer for any reward model, and what is said of what it gained."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_world import World, own_accuracy, write_rows
from safetensors.torch import load_file, save_file
from tiny_models import make_model, own_folder, save, tokenizer

import warmerge
from warmerge.errors import RefusedError, UsageError
from warmerge.pipeline import probe as probe_module
from warmerge.pipeline.probe import Probed, probe
from warmerge.rewards.bench import Measuring
from warmerge.rewards.model import LoadOptions

CPU = Measuring(loading=LoadOptions(device="cpu", dtype="float32"))


def rows(data: str, count: int | None = None) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(data).read_text().splitlines()][:count]


@pytest.fixture(scope="module")
def probed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Probed:
    """The harmful model, whose head prefers wrong answers, put right."""
    place = tmp_path_factory.mktemp("probed")
    data = write_rows(place / "pairs.jsonl", rows(world.data("train"), 150))
    return probe(world.harmful, [data], place / "out", measuring=CPU, command=["warmerge", "probe", "harmful"])


def test_the_accuracies_are_those_that_transformers_gives(world: World, probed: Probed) -> None:
    train, val = rows(world.data("train"), 150), rows(world.data("val"), 60)
    assert (probed.n, probed.prompts) == (150, len({row["prompt"] for row in train}))
    assert probed.fitted_before == pytest.approx(own_accuracy(world.harmful, train), abs=0.01)
    assert probed.fitted_after == pytest.approx(own_accuracy(probed.out, train), abs=0.01)
    assert probed.before < 0.5 < 0.65 < probed.after
    assert own_accuracy(probed.out, val) > 0.65
    assert 0.15 * probed.n < probed.held_out < 0.25 * probed.n
    assert probed.had_head
    assert {warning.where for warning in probed.warnings} <= {"probe"}  # nothing is wrong with model or data


def test_only_the_head_is_another(world: World, probed: Probed) -> None:
    before, after = load_file(world.harmful / "model.safetensors"), load_file(probed.out / "model.safetensors")
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["score.weight"]
    assert torch.equal(after["score.weight"][0], torch.from_numpy(probed.probe.weight).float())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (probed.out / name).read_bytes() == (world.harmful / name).read_bytes()


def test_the_record_holds_what_is_needed_to_do_it_again(world: World, probed: Probed) -> None:
    record = json.loads((probed.out / "warmerge.json").read_text())
    assert record["command"] == ["warmerge", "probe", "harmful"]
    assert record["input"]["checkpoint"] == str(world.harmful)
    assert len(record["input"]["fingerprint"]) == 64
    (used,) = record["sets"]
    assert (used["name"], used["source"]) == ("pairs", str(probed.out.parent / "pairs.jsonl"))
    assert (used["n"], len(used["fingerprint"])) == (150, 64)
    assert [entry["strength"] for entry in record["probe"]["tried"]] == [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    assert (record["seed"], record["limit"], record["loading"]["dtype"]) == (0, None, "float32")
    assert record["versions"]["torch"]
    best = min(record["probe"]["tried"], key=lambda entry: entry["loss"])
    assert (record["probe"]["strength"], record["after"]) == (best["strength"], best["accuracy"])
    assert record["before"] == probed.before
    json.loads(json.dumps(probed.as_json(), allow_nan=False))
    assert "weight" not in probed.as_json()["probe"]


def test_the_same_command_writes_the_same_model(world: World, probed: Probed, tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        probe(world.harmful, [str(probed.out.parent / "pairs.jsonl")], tmp_path / "again", measuring=CPU)
    finally:
        os.umask(mask)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (probed.out / "model.safetensors").read_bytes()
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "again").iterdir()} == {0o644}


def test_an_average_can_be_probed_and_the_result_be_averaged(world: World, tmp_path: Path) -> None:
    warmerge.average([world.a, world.b], tmp_path / "warm")
    found = probe(tmp_path / "warm", [world.data("train")], tmp_path / "probed", measuring=CPU)
    assert found.fitted_after >= found.fitted_before - 0.01
    assert own_accuracy(tmp_path / "probed", rows(world.data("val"))) > 0.7
    warmerge.average([tmp_path / "probed", world.c], tmp_path / "again")
    evaluation = warmerge.evaluate([tmp_path / "probed", world.c], [world.data("val")], measuring=CPU)
    # Last-layer retraining is no merge: what it gives is a member like any other.
    assert [row["kind"] for row in evaluation.rows if row["model"] == "probed"] == ["member"]


def test_several_sets_are_fitted_together(world: World, tmp_path: Path) -> None:
    scored: list[int] = []
    measuring = Measuring(loading=CPU.loading, on_work=scored.append, progress=lambda count: scored.append(-count))
    data = [f"one={world.data('val')}", f"two={world.data('ood')}"]
    found = probe(world.a, data, tmp_path / "out", measuring=measuring, strengths=[0.01])
    assert (found.n, found.probe.strength) == (260, 0.01)
    record = json.loads((tmp_path / "out/warmerge.json").read_text())
    assert [(entry["name"], entry["n"]) for entry in record["sets"]] == [("one", 160), ("two", 100)]
    assert sum(scored) == 0
    assert scored[0] > 260


def test_every_chosen_answer_counts_against_every_rejected_one(world: World, tmp_path: Path) -> None:
    """RewardBench 2: several answers on each side, one prompt for all of their pairs."""
    pairs = rows(world.data("train"), 40)
    many = [
        {"prompt": row["prompt"], "chosen": [row["chosen"], other["chosen"]], "rejected": [row["rejected"]] * 2
         + [other["rejected"]], "subset": "x", "num_correct": 2}
        for row, other in zip(pairs[::2], pairs[1::2], strict=True)
    ]  # fmt: skip
    found = probe(world.a, [write_rows(tmp_path / "many.jsonl", many)], tmp_path / "out", measuring=CPU)
    assert (found.n, found.prompts) == (20 * 6, 20)
    assert found.held_out == 4 * 6


def test_a_language_model_gets_a_head_first(tmp_path: Path, world: World) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(world.a, architectures=None)
    module = AutoModelForCausalLM.from_config(config)
    body = {name: value for name, value in load_file(world.a / "model.safetensors").items() if name != "score.weight"}
    module.load_state_dict(body, strict=False)
    module.save_pretrained(tmp_path / "lm")
    for file in world.a.glob("*token*"):
        shutil.copy(file, tmp_path / "lm")
    found = probe(tmp_path / "lm", [world.data("train")], tmp_path / "out", measuring=CPU)
    assert not found.had_head
    assert found.after > 0.7
    # The same body, so the same head as of the reward model that was made of it.
    other = probe(world.a, [world.data("train")], tmp_path / "other", measuring=CPU)
    assert torch.allclose(torch.from_numpy(found.probe.weight), torch.from_numpy(other.probe.weight), rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoder_keeps_all_but_its_last_layer(tmp_path: Path, world: World, kind: str) -> None:
    source = own_folder(tmp_path / "rm", kind)
    data = write_rows(tmp_path / "pairs.jsonl", rows(world.data("train"), 60))
    found = probe(source, [data], tmp_path / "out", measuring=CPU)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    last = "classifier.out_proj" if kind == "roberta" else "classifier"
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{last}.weight", f"{last}.bias"}
    assert found.fitted_after > found.fitted_before


def test_doubts_are_said(tmp_path: Path, world: World) -> None:
    few = [row | {"prompt": "why alder"} for row in rows(world.data("train"), 12)]
    path = Path(write_rows(tmp_path / "few.jsonl", few))
    path.write_text(path.read_text() + "{}\n")
    loading = LoadOptions(device="cpu", dtype="float32", max_length=8)
    measuring = Measuring(loading=loading, skip_bad_rows=True)
    found = probe(world.a, [str(path)], tmp_path / "out", measuring=measuring)
    assert (math.isnan(found.before), math.isnan(found.after), found.held_out) == (True, True, 0)
    said = list(map(str, found.warnings))
    assert said[0] == f"{path}: 1 bad rows were left out"
    assert said[1].startswith("data: of 2")
    assert said[1].endswith("to the length limit (--max-length)")
    assert said[2] == (
        "data: prompts: 1; with fewer than five none is held out, so nothing says how good the new head is"
    )
    assert json.loads((tmp_path / "out/warmerge.json").read_text())["after"] is None

    data = write_rows(tmp_path / "more.jsonl", rows(world.data("train"), 150))
    found = probe(world.a, [data], tmp_path / "strong", measuring=CPU, strengths=[0.1, 1.0])
    what = "the weakest regularisation that was tried (0.1) was the best; try weaker ones too"
    assert [str(warning) for warning in found.warnings] == [f"probe: {what}"]


def test_out_is_never_replaced_unasked(world: World, tmp_path: Path) -> None:
    data, out = [write_rows(tmp_path / "pairs.jsonl", rows(world.data("train"), 40))], tmp_path / "out"
    probe(world.a, data, out, measuring=CPU)
    first = (out / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="out exists and is not empty; choose another folder, or add --overwrite"):
        probe(world.b, data, out, measuring=CPU)
    assert (out / "model.safetensors").read_bytes() == first
    probe(world.b, data, out, measuring=CPU, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != first
    with pytest.raises(UsageError, match="is, lies in, or holds the input"):
        probe(out, data, out, measuring=CPU, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(UsageError, match="was not written by warmerge"):
        probe(world.a, data, tmp_path / "mine", measuring=CPU, overwrite=True)
    with pytest.raises(UsageError, match="--data is missing"):
        probe(world.a, [], tmp_path / "none", measuring=CPU)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out", "pairs.jsonl"]


def test_nothing_is_left_after_a_failure(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", rows(world.data("train"), 40))
    same = write_rows(tmp_path / "same.jsonl", [row | {"rejected": row["chosen"]} for row in rows(data)])
    with pytest.raises(RefusedError, match="the same tokens in every pair: there is nothing to learn"):
        probe(world.a, [same], tmp_path / "out", measuring=CPU)
    with pytest.raises(UsageError, match="--strength: expected positive numbers, found -1"):
        probe(world.a, [data], tmp_path / "out", measuring=CPU, strengths=[-1.0])
    two = save(tmp_path / "two", make_model("llama", num_labels=2), tokenizer("llama"))
    with pytest.raises(RefusedError, match=r"two/config\.json: has 2 labels; a reward model has one"):
        probe(two, [data], tmp_path / "out", measuring=CPU)
    broken = own_folder(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][:] = torch.finfo(torch.float32).max
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(RefusedError, match=f"{broken}: gives the reward"):  # by the name that the user knows
        probe(broken, [data], tmp_path / "out", measuring=CPU)

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(probe_module, "write_head", stop)
    with pytest.raises(KeyboardInterrupt):
        probe(world.a, [data], tmp_path / "out", measuring=CPU)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
