"""Rewards that are kept: each model is scored once, and never is a kept reward taken for that of another input."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from reward_world import VOCABULARY, WIDTH, World, own_rewards, pairs, with_head, write_tokenizer
from safetensors.torch import load_file, save_file

import warmerge
from warmerge.errors import Interrupted, RefusedError, UsageError
from warmerge.pipeline.scoring import here
from warmerge.pipeline.scoring import judge as module
from warmerge.pipeline.scoring.judge import Judge, open_average, open_judge
from warmerge.pipeline.scoring.kept import read_kept, write_kept
from warmerge.pipeline.scoring.scorebook import SCORES, ScoreBook, open_book
from warmerge.rewards import scoring
from warmerge.rewards.bench import Measuring
from warmerge.rewards.model import LoadOptions, load_reward_model
from warmerge.rewards.scoring import Tokens, score

TEXTS = [(row["prompt"], row[side]) for row in pairs(6, 1) for side in ("chosen", "rejected")]


@pytest.fixture
def models(tmp_path: Path, world: World) -> Path:
    """A folder with copies of a, b, c."""
    for name in "abc":
        shutil.copytree(getattr(world, name), tmp_path / name)
    return tmp_path


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of the models that were loaded."""
    loaded: list[str] = []

    def counting(source: Any, *arguments: Any) -> Any:
        loaded.append(Path(source.label).name)
        return load_reward_model(source, *arguments)

    monkeypatch.setattr(module, "load_reward_model", counting)
    return loaded


def book(store: Path | None, texts: Any = TEXTS, fingerprint: str = "texts", **options: Any) -> ScoreBook:
    measuring = options.pop("measuring", Measuring())
    overwrite = options.pop("overwrite", False)
    return open_book(texts, fingerprint, replace(measuring, loading=LoadOptions(**options)), store, overwrite)


def alone(folder: Path, **options: Any) -> Any:
    """The rewards of a model as `score` gives them."""
    model = load_reward_model(folder, LoadOptions(**options))
    return score(model, Tokens(model.renderer, TEXTS))


# --- rewards ----------------------------------------------------------------------------------------------------------


def test_a_judges_rewards_are_the_models_own(models: Path) -> None:
    found = book(None).scores(open_judge(models / "a"))
    expected = own_rewards(models / "a", [f"{prompt}\n\n{answer}" for prompt, answer in TEXTS])
    assert found.rewards == pytest.approx(expected, abs=1e-4)
    assert numpy.array_equal(found.rewards, alone(models / "a"))
    assert (found.prompt_cut, found.answer_cut, found.computed, found.doubts) == (0, 0, "float32 on cpu", ())
    assert found.weights_bytes == sum(4 * t.numel() for t in load_file(models / "a" / "model.safetensors").values())
    assert found.merge_seconds < found.seconds


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [(torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.bfloat16, "float32"), (torch.float16, "float32")],
)
def test_an_average_in_memory_is_the_one_on_the_disk(models: Path, dtype: torch.dtype, computed: str) -> None:
    """Rounded as `average` rounds it: an average that is not the one to be published would be praised for nothing."""
    for name in "abc":
        path = models / name / "model.safetensors"
        tensors = {key: value.to(dtype) for key, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    members = [models / name for name in "abc"]
    warmerge.average(members, models / "warm")
    found = book(None, dtype=computed).scores(open_average("warm", members))
    assert numpy.array_equal(found.rewards, alone(models / "warm", dtype=computed))
    assert found.computed == f"{computed} on cpu"
    for name in "abc":
        assert not numpy.allclose(found.rewards, alone(models / name, dtype=computed), atol=1e-4)
    one = book(None, dtype=computed).scores(open_judge(models / "a"))
    assert found.weights_bytes == one.weights_bytes


def test_an_average_does_not_leave_its_weights_in_a_member(models: Path) -> None:
    found = book(None)
    judges = [open_judge(models / "a"), open_average("warm", [models / "a", models / "b"]), open_judge(models / "b")]
    rewards = [found.scores(judge).rewards for judge in (*judges, replace(judges[0], label="again"))]
    assert numpy.array_equal(rewards[0], alone(models / "a"))
    assert numpy.array_equal(rewards[2], alone(models / "b"))
    assert rewards[3] is rewards[0]


def test_tokens_are_shared_by_models_of_one_rule_only(
    models: Path, monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    """Token ids of another vocabulary are in range, and would give rewards that mean nothing."""
    write_tokenizer(models / "b", [*VOCABULARY[:3], *reversed(VOCABULARY[3:])])
    write_tokenizer(models / "c", template="{% for m in messages %}{{ m.content }} is {% endfor %}")
    made = []

    def counting(*arguments: Any) -> Tokens:
        made.append(arguments)
        return Tokens(*arguments)

    monkeypatch.setattr(here, "Tokens", counting)
    found = book(None)
    for folder in (models / "a", models / "b", models / "c", world.a, world.b):
        assert numpy.array_equal(found.scores(open_judge(folder)).rewards, alone(folder)), folder
    assert len(made) == 3


def test_no_model_pays_for_the_tokens_of_all(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ensembles come before averages: their cost would hold what the average is given for nothing."""
    original = scoring.encode

    def slow(*arguments: Any) -> Any:
        time.sleep(1)
        return original(*arguments)

    monkeypatch.setattr(scoring, "encode", slow)
    found = book(None)
    seconds = [found.scores(judge).seconds for judge in map(open_judge, (models / "a", models / "b"))]
    assert max(seconds) < 1


def test_texts_that_were_cut_are_counted_by_model(models: Path) -> None:
    found = book(None, max_length=9).scores(open_judge(models / "a"))
    model = load_reward_model(models / "a", LoadOptions(max_length=9))
    assert (found.prompt_cut, found.answer_cut) == Tokens(model.renderer, TEXTS).cut()
    assert found.answer_cut == len(TEXTS)


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapter(folder: Path, base: Path) -> Path:
    """A LoRA adapter of rank 2 on every value projection, large enough to change rewards."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.v_proj.lora_"
        tensors[f"{name}A.weight"] = torch.randn((2, WIDTH), generator=generator) * 0.3
        tensors[f"{name}B.weight"] = torch.randn((WIDTH, 2), generator=generator) * 0.3
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 4, "task_type": "SEQ_CLS",
        "target_modules": ["v_proj"], "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_an_adapter_of_another_scale_is_another_model(models: Path) -> None:
    """Its weights are the same bytes; what they are multiplied by stands in its config."""
    lora, found, averages = adapter(models / "lora", models / "a"), [], []
    config = lora / "adapter_config.json"
    for alpha in (4, 8):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": alpha}))
        found.append(book(models / "out").scores(open_judge(lora)).rewards)
        assert numpy.array_equal(found[-1], alone(lora))
        averages.append(book(models / "out").scores(open_average("warm", [models / "b", lora])).rewards)
    assert numpy.abs(found[0] - found[1]).max() > 0.01
    assert numpy.abs(averages[0] - averages[1]).max() > 0.005


def test_full_models_are_averaged_beside_an_adapter_that_needs_a_base(models: Path) -> None:
    lora = adapter(models / "lora", models / "a")
    plain = open_average("warm", [models / "a", models / "b"], base=models / "c")
    assert plain.contents() == open_average("warm", [models / "a", models / "b"]).contents()
    assert open_average("warm", [models / "b", lora], models / "c").contents() != plain.contents()


def test_an_adapter_on_another_base_is_another_model(models: Path) -> None:
    lora = adapter(models / "lora", models / "a")
    found = book(models / "out").scores(open_judge(lora)).rewards
    # The named base wins over the one in its config.
    other = book(models / "out").scores(open_judge(lora, models / "b")).rewards
    assert numpy.abs(found - other).max() > 0.01
    again = book(models / "out")
    assert again.missing([open_judge(lora), open_judge(lora, models / "b")]) == 0
    assert again.missing([open_judge(lora, models / "c")]) == len(TEXTS)


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_each_model_is_scored_once(models: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    found = book(models / "out")
    # One checkpoint by three names is one model.
    judges = [open_judge(spec) for spec in ("a", "b", models / "a", "a/")]
    judges += [open_average("warm", ["a", "b"]), open_average("another", ["a", "b"]), open_average("of c", ["a", "c"])]
    assert found.missing(judges) == 4 * len(TEXTS)
    for judge in judges:
        found.scores(judge)
    assert (found.missing(judges), len(loads), len(found.kept)) == (0, 4, 4)
    again = book(models / "out")
    assert again.missing(judges) == 0
    for judge in judges:
        kept, fresh = again.scores(judge), found.scores(judge)
        assert numpy.array_equal(kept.rewards, fresh.rewards)
        assert replace(kept, rewards=fresh.rewards) == fresh
    assert len(loads) == 4


def test_what_is_known_of_a_model_is_kept_too(models: Path, world: World) -> None:
    head = load_file(world.a / "model.safetensors")["score.weight"]
    with_head(world.a, models / "a", head, pad_token_id=1)
    first = book(models / "out", max_length=9).scores(open_judge(models / "a"))
    kept = book(models / "out", max_length=9).scores(open_judge(models / "a"))
    assert replace(kept, rewards=first.rewards) == first
    ((where, what),) = kept.doubts
    assert where == str(models / "a" / "config.json")
    assert "has pad_token_id 1, its tokenizer pads with 0" in what
    assert kept.answer_cut == len(TEXTS)


@pytest.mark.parametrize(
    "what",
    ["weights", "same weights anew", "tokenizer", "template", "config", "max_length", "dtype", "template option",
     "texts", "versions"],
)  # fmt: skip
def test_other_inputs_are_scored_again(
    models: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    book(models / "out").scores(open_judge(models / "a"))
    weights, options = models / "a" / "model.safetensors", {}
    before = weights.stat()
    if what == "weights":
        # Bytes that no sample of 4 KiB sees, and the same size: only the time tells.
        tensors = load_file(weights)
        tensors["model.embed_tokens.weight"][3:10] += 1.0
        save_file(tensors, weights, metadata={"format": "pt"})
        assert weights.stat().st_size == before.st_size
    elif what == "same weights anew":
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    elif what == "tokenizer":
        write_tokenizer(models / "a", [*VOCABULARY[:3], *reversed(VOCABULARY[3:])])
    elif what == "template":
        write_tokenizer(models / "a", template="{% for m in messages %}{{ m.content }} {% endfor %}")
    elif what == "config":
        path = models / "a" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))
    elif what == "versions":
        monkeypatch.setattr(module, "versions", lambda: {"warmerge": "another"})
    elif what != "texts":
        values: dict[str, Any] = {"max_length": 9, "dtype": "bfloat16", "template option": "plain"}
        options = {what.removesuffix(" option"): values[what]}
    fingerprint = "other texts" if what == "texts" else "texts"
    again = book(models / "out", fingerprint=fingerprint, **options)
    judge = open_judge(models / "a")
    assert again.missing([judge]) == len(TEXTS)
    assert numpy.array_equal(again.scores(judge).rewards, alone(models / "a", **options))
    assert loads == ["a", "a"]
    # What was there before is there still.
    assert len(book(models / "out").kept) == 2


def test_weights_that_change_after_they_were_opened_are_refused(models: Path) -> None:
    """Else the new weights' rewards would be kept under the old ones' name."""
    judge = open_judge(models / "a")
    shutil.copy(models / "b" / "model.safetensors", models / "a" / "model.safetensors")
    os.utime(models / "a" / "model.safetensors", ns=(1, 1))
    found = book(models / "out")
    with pytest.raises(RefusedError, match="changed while it was read"):
        found.scores(judge)
    assert found.kept == {}
    assert not (models / "out").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_overwrite_uses_what_is_the_same(models: Path, overwrite: bool) -> None:
    book(models / "out").scores(open_judge(models / "a"))
    again = book(models / "out", overwrite=overwrite)
    judges = [open_judge(models / "a"), open_judge(models / "b")]
    assert again.missing(judges) == len(TEXTS)


def with_facts(path: Path, facts: Any) -> None:
    """A whole file that says something else of each model."""
    arrays = read_kept(path)[0]
    write_kept(path, arrays, {"facts": json.dumps(dict.fromkeys(arrays, facts) if isinstance(facts, dict) else [])})


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x00"),
        lambda path: path.write_bytes(path.read_bytes().replace(b"float32 on cpu", b"float33 on cpu")),
        lambda path: with_facts(path, {}),
        lambda path: with_facts(path, {"doubts": [], "seconds": 1}),
        lambda path: with_facts(path, {"doubts": 3}),
        lambda path: with_facts(path, None),
    ],
)  # fmt: skip
def test_a_damaged_file_is_said(models: Path, damage: Any) -> None:
    judge = open_judge(models / "a")
    first = book(models / "out").scores(judge)
    path = models / "out" / SCORES
    damage(path)
    with pytest.raises(UsageError) as caught:
        book(models / "out")
    assert str(caught.value).startswith(f"{path} is damaged (")
    assert str(caught.value).endswith("); add --overwrite to start anew")
    anew = book(models / "out", overwrite=True)
    assert anew.kept == {}
    assert numpy.array_equal(anew.scores(judge).rewards, first.rewards)
    assert len(book(models / "out").kept) == 1


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (0, "stopped; nothing is kept"),
        (1, "stopped; the rewards of 1 model are kept in FILE; the same command goes on there"),
        (2, "stopped; the rewards of 2 models are kept in FILE; the same command goes on there"),
    ],
)
def test_ctrl_c_says_what_is_kept(models: Path, loads: list[str], kept: int, message: str) -> None:
    judges = [open_judge(models / name) for name in "abc"]
    first = book(models / "out")
    for judge in judges[:kept]:
        first.scores(judge)

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    found = book(models / "out", measuring=Measuring(progress=stopped))
    for judge in judges[:kept]:
        found.scores(judge)
    with pytest.raises(Interrupted) as caught:
        found.scores(judges[kept])
    assert str(caught.value) == message.replace("FILE", str(models / "out" / SCORES))
    again = book(models / "out")
    assert len(again.kept) == kept
    for judge in judges:
        again.scores(judge)
    # The one that was interrupted was loaded twice, the others once.
    assert sorted(loads) == sorted(["a", "b", "c", "abc"[kept]])


def test_ctrl_c_while_nothing_is_stored(models: Path) -> None:
    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    found = book(None, measuring=Measuring(progress=stopped))
    with pytest.raises(Interrupted, match=r"^stopped; nothing is kept$"):
        found.scores(open_judge(models / "a"))


def test_nothing_is_written_without_a_store(models: Path) -> None:
    before = sorted(models.rglob("*"))
    book(None).scores(open_judge(models / "a"))
    assert sorted(models.rglob("*")) == before


def test_two_books_in_one_folder_keep_what_both_scored(models: Path, loads: list[str]) -> None:
    one, other = book(models), book(models)
    one.measure([open_judge(models / "a")])
    other.measure([open_judge(models / "b")])
    assert len(book(models).kept) == 2
    other.measure([open_judge(models / "a")])
    assert loads == ["a", "b"]
    assert not list(models.glob(".*"))


# --- opening ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_without_a_head_is_refused_before_anything_is_scored(models: Path, loads: list[str]) -> None:
    tensors = load_file(models / "a" / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, models / "a" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusedError) as caught:
        open_judge(models / "a")
    assert str(caught.value) == (
        f"refused: {models / 'a'}: has no reward head (no tensor named like score.weight, classifier.*, v_head.*): it "
        "is no reward model"
    )
    assert loads == []


def test_a_head_by_any_name_may_be_in_a_models_own_code(models: Path) -> None:
    """What its head is called is for its code to say; loading looks at it."""
    tensors = load_file(models / "a" / "model.safetensors")
    tensors["judgement.weight"] = tensors.pop("score.weight")
    save_file(tensors, models / "a" / "model.safetensors", metadata={"format": "pt"})
    path = models / "a" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "code.Config"}}))
    judge = open_judge(models / "a")
    with pytest.raises(RefusedError, match="brings its own model code"):
        book(None).scores(judge)


def test_an_average_is_checked_when_it_is_opened(models: Path, world: World, loads: list[str]) -> None:
    with pytest.raises(RefusedError, match="has the same weights as"):
        open_average("warm", [models / "a", world.a])
    doubted: Judge = open_average("warm", [models / "a", world.alien])
    assert any("do they come from one pre-trained model?" in warning.what for warning in doubted.warnings)
    assert loads == []
