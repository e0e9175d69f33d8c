"""Supervised fine-tuning: what TRL is made to learn from, what is kept, and that a stopped run goes on to the bit."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from warmerge.errors import RefusedError, UsageError, WarmergeError
from warmerge.rewards.layouts import Text
from warmerge.rewards.render import Renderer
from warmerge.training.answers import tokenise_answers
from warmerge.training.sft import SftRecipe, fine_tune, kept_steps

pytest.importorskip("trl")

TEXTS: list[tuple[Text, Text]] = [
    ("What is the capital of France?", "Paris, a city on the Seine."),
    ("Say why.", "Nobody says why it does so."),
    ("Write a short poem.", "The sea is wide, the sea is deep, it rocks the sailors into sleep."),
    ("How do I sort a list in Python?", "Call sorted(list)."),
    ("", "A whole text without a prompt."),
]
RECIPE = SftRecipe(steps=6, checkpoints=2, batch=4, lr=1e-2, batch_tokens=100, save_every=3)


def language_model(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A tiny Llama with a tokenizer; without a padding token, as most have none."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"vocab_size": 410, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**tiny_models.DECODERS["llama"], **settings, **changes})
    tiny_models.save(folder, AutoModelForCausalLM.from_config(config).to(dtype), tiny_models.tokenizer(pad=None))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model(tmp_path_factory.mktemp("sft") / "source")


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run without interruptions, and the rows that it reported."""
    out, rows = tmp_path_factory.mktemp("sft") / "out", []
    fine_tune(source, TEXTS, out, RECIPE, progress=lambda row: rows.append(dict(row)))
    return out, rows


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def renderer(template: str | None = None, max_length: int = 256) -> Renderer:
    wrapped = tiny_models.tokenizer(template=template)
    return Renderer(wrapped, "", "plain" if template is None else "chat", max_length, wrapped.eos_token_id)


def stop_after(step: int) -> Callable[[Mapping[str, Any]], None]:
    def progress(row: Mapping[str, Any]) -> None:
        if row["step"] == step:
            raise KeyboardInterrupt

    return progress


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "checkpoints", "kept"),
    [(12000, 3, [8000, 10000, 12000]), (5, 1, [5]), (1, 1, [1]), (9, 4, [6, 7, 8, 9]), (3, 2, [2, 3])],
)
def test_steps_are_kept_over_the_last_third(steps: int, checkpoints: int, kept: list[int]) -> None:
    assert kept_steps(steps, checkpoints) == kept


def test_recipes_that_cannot_be_are_refused_with_all_that_is_wrong() -> None:
    with pytest.raises(UsageError, match="3 checkpoints do not fit in the last third of 4 steps; ask for fewer"):
        SftRecipe(steps=4)
    with pytest.raises(UsageError) as refused:
        SftRecipe(steps=0, lr=float("nan"), seed=-1, precision="float16")
    assert str(refused.value) == (
        "supervised fine-tuning: steps: expected 1 or more, found 0; lr: expected a number above 0, found nan; "
        "seed: expected 0 or more, found -1; precision: expected float32 or bfloat16, found float16"
    )


def test_the_loss_falls_and_what_is_left_are_language_models(
    source: Path, finished: tuple[Path, list[dict[str, Any]]]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, rows = finished
    assert sorted(path.name for path in out.iterdir()) == ["rows.jsonl", "sft.json", "step-4", "step-6"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {row["lr"] for row in rows} == {1e-2}, "the learning rate is constant"
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()] == rows
    record = json.loads((out / "sft.json").read_text())
    assert [record[key] for key in ("texts", "prompts_cut", "answers_cut", "without_answer")] == [5, 0, 0, 0]
    steps = [weights(source), weights(out / "step-4"), weights(out / "step-6")]
    for name, first in steps[0].items():
        assert first.shape == steps[1][name].shape == steps[2][name].shape
    moved = [float((step["lm_head.weight"] - steps[0]["lm_head.weight"]).norm()) for step in steps]
    assert 0 == moved[0] < moved[1] < moved[2]
    module, info = AutoModelForCausalLM.from_pretrained(out / "step-6", output_loading_info=True)
    assert not any(info.values()), info
    assert module.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(out / "step-6").pad_token is None
    assert (out / "step-6" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    import os

    found = os.umask(0)
    os.umask(found)
    return found


def test_tokenizer_and_config_are_the_sources_own(source: Path, finished: tuple[Path, list[dict[str, Any]]]) -> None:
    """TRL would make the end token the padding token of both, and write its own dtype."""
    names = {path.name for path in source.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} < names
    for step in ("step-4", "step-6"):
        assert {path.name for path in (finished[0] / step).iterdir()} == names
        for name in names - {"model.safetensors"}:
            assert (finished[0] / step / name).read_bytes() == (source / name).read_bytes(), name


def test_bfloat16_sources_train_in_float32_and_are_kept_in_bfloat16(tmp_path: Path) -> None:
    source = language_model(tmp_path / "source", torch.bfloat16, tie_word_embeddings=True)
    # A step of 1e-5 is lost on a bfloat16 weight of 0.02; forty of them are not, summed in float32.
    recipe = replace(RECIPE, steps=40, checkpoints=1, lr=1e-5, batch=2)
    (kept,) = fine_tune(source, TEXTS, tmp_path / "out", recipe)
    before, after = weights(source), weights(kept)
    assert before.keys() == after.keys(), "tied weights are written once"
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    name = "model.layers.0.self_attn.q_proj.weight"
    large = before[name].abs() > 0.01
    assert float((before[name] != after[name])[large].float().mean()) > 0.3


# --- what is learnt ---------------------------------------------------------------------------------------------------


def test_the_first_loss_is_that_of_the_answer_tokens(source: Path, finished: tuple[Path, list[dict[str, Any]]]) -> None:
    """TRL's contract: labels of -100 are left out, and the mean is over all answer tokens of a step, also where the
    step is made of several passes of unlike lengths."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(source).eval()
    wrapped = tiny_models.tokenizer(pad=None)
    first = numpy.random.default_rng([RECIPE.seed, 0]).permutation(len(TEXTS))[: RECIPE.batch]
    total = count = 0.0
    for prompt, answer in [TEXTS[i] for i in first]:
        begin = len(wrapped(f"{prompt}\n\n")["input_ids"]) if prompt else 1
        ids = torch.tensor([[*wrapped(f"{prompt}\n\n{answer}" if prompt else answer)["input_ids"], 2]])
        with torch.inference_mode():
            nats = -module(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        total += float(nats[begin - 1 :].sum())
        count += len(nats[begin - 1 :])
    assert finished[1][0]["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("prompt", "answer", "learnt"),
    [
        ("Say hi.", "Hi!", "Hi!</s>"),
        ("Say hi.\n", "Hi!", "Hi!</s>"),
        ("TL;DR:", " the dog", " the dog</s>"),
        ("TL;DR:", "\n\nParis", "\n\nParis</s>"),
        ("Say x.", "xylophone", "xylophone</s>"),
        ("Say nothing.", "", "</s>"),
        ("Say the end.", "</s> was it", "</s> was it</s>"),
        ("", "A whole text", "<s>A whole text</s>"),
    ],
)
def test_answers_begin_where_the_prompt_ends(prompt: str, answer: str, learnt: str) -> None:
    rule = renderer()
    ((encoded, begin),) = tokenise_answers(rule, [(prompt, answer)])
    assert rule.tokenizer.decode(encoded.ids[begin:]) == learnt


@pytest.mark.parametrize("answer", ["Hi!", "x", "", "</s>", " Hi!"])
def test_answers_of_conversations_begin_after_the_templates_own_tokens(answer: str) -> None:
    rule = renderer(tiny_models.TEMPLATE)
    as_messages = (({"role": "user", "content": "Say hi."},), ({"role": "assistant", "content": answer},))
    for encoded, begin in tokenise_answers(rule, [("Say hi.", answer), as_messages]):
        assert rule.tokenizer.decode(encoded.ids[:begin]) == "<s><|user|>Say hi.<|assistant|>"
        assert rule.tokenizer.decode(encoded.ids[begin:]) == f"{answer}</s>"


def test_a_token_over_the_border_is_the_answers() -> None:
    """ " sea" is one token: with a prompt that ends in the space, it is in the answer."""
    rule = renderer()
    ((encoded, begin),) = tokenise_answers(rule, [("The ", "sea is wide")])
    pieces = [rule.tokenizer.decode(i) for i in encoded.ids]
    assert pieces[begin] == " sea", pieces
    assert "".join(pieces[:begin]) == "<s>The"


def test_answers_are_found_again_in_texts_that_were_cut() -> None:
    rule = renderer(max_length=40)
    long = ("What is the capital of France? " * 9).strip()
    cases = [(long, "Paris."), ("Say why.", "sleep, " * 40), (long, "the sea and the dog " * 9)]
    made = tokenise_answers(rule, cases)
    assert [(entry.prompt_cut, entry.answer_cut) for entry, _ in made] == [(True, False), (False, True), (True, True)]
    words = [rule.tokenizer.decode(entry.ids[begin:]) for entry, begin in made]
    assert words[0] == "Paris.</s>"
    for (entry, begin), (prompt, answer), learnt in zip(made[1:], cases[1:], words[1:], strict=True):
        assert learnt.endswith("</s>")
        assert answer.startswith(learnt.removesuffix("</s>"))
        assert prompt.endswith(rule.tokenizer.decode(entry.ids[1:begin]).removesuffix("\n\n"))


def test_cut_texts_are_counted(source: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=1, checkpoints=1, max_length=24)
    fine_tune(source, [*TEXTS, ("Why? " * 30, "So."), ("Why?", "So. " * 30)], tmp_path / "out", recipe)
    record = json.loads((tmp_path / "out" / "sft.json").read_text())
    assert (record["texts"], record["answers_cut"]) == (7, 2)
    assert record["prompts_cut"] >= 1


def test_other_seeds_are_other_orders_and_other_passes_are_not(
    source: Path, finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    def losses(name: str, **changes: Any) -> list[float]:
        rows: list[float] = []
        recipe = replace(RECIPE, steps=2, checkpoints=1, **changes)
        fine_tune(source, TEXTS, tmp_path / name, recipe, progress=lambda row: rows.append(row["loss"]))
        return rows

    expected = [row["loss"] for row in finished[1][:2]]
    assert losses("seed", seed=1)[0] != pytest.approx(expected[0], rel=1e-4)
    assert losses("one pass", batch_tokens=10**6) == pytest.approx(expected, rel=1e-5)
    assert losses("checkpointing", gradient_checkpointing=True) == pytest.approx(expected, rel=1e-5)
    assert losses("bfloat16", precision="bfloat16") == pytest.approx(expected, rel=1e-2)
    assert losses("bfloat16 again", precision="bfloat16") != pytest.approx(expected, rel=1e-6)


# --- stopping and going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_stopped_run_goes_on_to_the_bit(
    source: Path, finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path, step: int
) -> None:
    out, rows = tmp_path / "out", []
    with pytest.raises(KeyboardInterrupt):
        fine_tune(source, TEXTS, out, RECIPE, progress=stop_after(step))
    kept = fine_tune(source, TEXTS, out, RECIPE, progress=lambda row: rows.append(row["step"]))
    assert rows[0] == {2: 1, 4: 4, 6: 5}[step], "from the last checkpoint: after 3 steps, or where one is kept"
    assert [folder.name for folder in kept] == ["step-4", "step-6"]
    assert (out / "rows.jsonl").read_text() == (finished[0] / "rows.jsonl").read_text()
    for folder in kept:
        assert (folder / "model.safetensors").read_bytes() == (
            finished[0] / folder.name / "model.safetensors"
        ).read_bytes()


def test_a_checkpoint_that_was_not_written_to_its_end_is_not_used(
    source: Path, finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        fine_tune(source, TEXTS, out, RECIPE, progress=stop_after(4))
    torn = out / "working" / "checkpoint-3"
    (torn / "optimizer.pt").unlink()
    (torn / "whole").unlink()
    rows: list[int] = []
    fine_tune(source, TEXTS, out, RECIPE, progress=lambda row: rows.append(row["step"]))
    assert rows[0] == 1
    last = "step-6/model.safetensors"
    assert (out / last).read_bytes() == (finished[0] / last).read_bytes()


def test_checkpoints_without_a_record_are_not_gone_on_from(source: Path, tmp_path: Path) -> None:
    out, rows = tmp_path / "out", []
    with pytest.raises(KeyboardInterrupt):
        fine_tune(source, TEXTS, out, RECIPE, progress=stop_after(4))
    (out / "sft.json").unlink()
    fine_tune(source, TEXTS[:4], out, RECIPE, progress=lambda row: rows.append(row["step"]))
    assert rows == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_only_looked_at(source: Path, finished: tuple[Path, list[dict[str, Any]]]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")}
    kept = fine_tune(source, TEXTS, finished[0], RECIPE, progress=stop_after(1))
    assert kept == [finished[0] / "step-4", finished[0] / "step-6"]
    assert {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")} == before


def test_a_folder_of_something_else_is_refused(
    source: Path, finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"holds a fine-tuning with other texts, lr; choose another folder, or delete"):
        fine_tune(source, TEXTS[:3], finished[0], replace(RECIPE, lr=1e-3))
    fine_tune(source, TEXTS, finished[0], replace(RECIPE, save_every=50))
    with pytest.raises(UsageError, match=r"source is not an interrupted fine-tuning \(no readable sft.json\)"):
        fine_tune(source, TEXTS, source, RECIPE)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("bert", "a BERT encoder"),
        ("roberta", "a ROBERTA encoder"),
        ("xlnet", "an XLNET encoder"),
        ("modernbert", "a MODERNBERT encoder"),
        ("t5", r"an encoder-decoder \(t5\)"),
        ("llama", r"a reward model \(LlamaForSequenceClassification\)"),
    ],
)
def test_only_causal_language_models_are_fine_tuned(kind: str, what: str, tmp_path: Path) -> None:
    folder = tiny_models.folder(kind)
    if kind != "llama":  # an encoder as it is published: with no reward head, or with any
        folder = tiny_models.own_folder(tmp_path / "base", kind, architectures=None)
    with pytest.raises(RefusedError) as refused:
        fine_tune(folder, TEXTS, tmp_path / "out", RECIPE)
    expected = rf"--base: --sft-steps needs a causal language model; \S+ is {what}: leave --sft-steps away"
    assert re.fullmatch(f"refused: {expected}", str(refused.value)), refused.value
    assert not (tmp_path / "out").exists()


def test_missing_and_unknown_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = language_model(tmp_path / "source")
    tensors = weights(source)
    tensors["v_head.weight"] = tensors.pop("lm_head.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusedError) as refused:
        fine_tune(source, TEXTS, tmp_path / "out", RECIPE)
    assert "1 tensors are missing, so transformers would draw them at random: 'lm_head.weight'" in str(refused.value)
    assert "1 tensors are no part of a causal language model: 'v_head.weight'" in str(refused.value)


def test_texts_without_answers_are_refused(tmp_path: Path) -> None:
    source = language_model(tmp_path / "source")
    (source / "tokenizer_config.json").write_text(
        json.dumps(json.loads((source / "tokenizer_config.json").read_text()) | {"eos_token": None})
    )
    with pytest.raises(RefusedError, match="data: no text has an answer: there is nothing to fine-tune on"):
        fine_tune(source, [("Say nothing.", "")], tmp_path / "out", RECIPE)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_kept(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(
        WarmergeError, match=r"fine-tuning: step \d is not finite \(loss nan, .*try a lower learning rate"
    ):
        fine_tune(source, TEXTS, out, replace(RECIPE, lr=1e30, save_every=1))
    assert not list(out.glob("step-*"))


def test_without_trl_it_is_said_what_to_install(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UsageError, match=r"--sft-steps needs TRL \(.*\): pip install 'warmerge\[train\]'"):
        fine_tune(source, TEXTS, tmp_path / "out", RECIPE)


def test_nothing_is_printed_and_nothing_is_sent(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.utils import _telemetry

    monkeypatch.delenv("CI", raising=False)  # TRL keeps silent there
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    sent: list[str] = []
    monkeypatch.setattr(_telemetry, "_start_telemetry_thread", lambda: sent.append("started"))
    fine_tune(source, TEXTS, tmp_path / "out", replace(RECIPE, steps=1, checkpoints=1))
    assert capfd.readouterr() == ("", "")
    assert sent == []
