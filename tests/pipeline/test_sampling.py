"""Sampling pools: what is drawn, what it depends on, what is kept when a run stops, and what is refused."""

from __future__ import annotations

import fcntl
import gzip
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import causal_models
import numpy
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import warmerge.pipeline.sampling as sampling
from warmerge.errors import Interrupted, RefusedError, UsageError, WarmergeError
from warmerge.pipeline.sampling import Sampling, read_prompts, sample_pool, seed_of, transformers_generator
from warmerge.pipeline.sampling.policy import Drawn, OpenedPolicy, dtype_of, open_for_sampling, open_policy, stored_ends
from warmerge.pipeline.sampling.transformers_generator import TransformersGenerator, draw, random_numbers
from warmerge.pipeline.score import score_file

ASK = Sampling(n=3, max_new_tokens=9, seed=3)
PROMPTS = ["What is the capital of France?", "Write a short poem about the sea.", "TL;DR: "]
LONG = "The quick brown fox jumps over the lazy dog, and nobody says why it does so. Say it."


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompt_file(path: Path, prompts: list[Any] = PROMPTS) -> str:
    return write_rows(path, [{"prompt": prompt} for prompt in prompts])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def policy(folder: Path, settings: Sampling = ASK) -> OpenedPolicy:
    return open_policy(open_for_sampling(folder), settings.template, settings.trust_remote_code)


def drawn(folder: Path, prompt: Any = LONG, settings: Sampling = ASK, reuse: bool = True) -> list[Drawn]:
    opened = policy(folder, settings)
    generate = TransformersGenerator(opened, settings)
    generate.reuses_prompt = generate.reuses_prompt and reuse
    (found,) = generate([(opened.encode(prompt), seed_of(prompt, settings.seed))])
    return found


def stop_after(count: int) -> Callable[[int], None]:
    left = [count]

    def progress(done: int) -> None:
        left[0] -= done
        if left[0] == 0:
            raise KeyboardInterrupt

    return progress


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_settings_out_of_range_are_refused_with_all_that_is_wrong() -> None:
    with pytest.raises(UsageError) as refused:
        Sampling(n=0, temperature=float("nan"), top_p=1.5, max_new_tokens=0, seed=-1, batch=0, dtype="int8")
    assert str(refused.value) == (
        "-n: expected 1 or more, found 0; --temperature: expected 0 or more, found nan; --top-p: expected above 0 and "
        "at most 1, found 1.5; --max-new-tokens: expected 1 or more, found 0; --seed: expected 0 or more, found -1; "
        "--batch: expected 1 or more, found 0; --dtype: expected auto or float32 or bfloat16 or float16, found 'int8'"
    )
    with pytest.raises(UsageError, match="--generator: expected transformers or vllm, found 'tgi'"):
        Sampling(generator="tgi")


def test_a_temperature_of_zero_is_for_one_answer() -> None:
    with pytest.raises(UsageError, match="--temperature 0 would make all 8 answers to a prompt the same; raise it, or"):
        Sampling(n=8, temperature=0)
    assert Sampling(n=1, temperature=0).n == 1


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_vllm_would_change_or_refuse_some_temperatures(temperature: float) -> None:
    with pytest.raises(UsageError, match=rf"--temperature: vLLM takes 0, or 0.01 to 2, found {temperature}"):
        Sampling(generator="vllm", temperature=temperature)
    assert Sampling(temperature=temperature).temperature == temperature


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_are_read_from_pairs_pools_and_conversations_each_once(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    rows = [
        {"prompt": "a", "chosen": "x", "rejected": "y"},
        {"prompt": "b", "candidates": ["x", "y"], "gold": [1, 2]},
        {"prompt": "a"},
        {"prompt": talk, "chosen": [{"role": "assistant", "content": "x"}]},
        {"prompt": [{"role": "user", "content": "a", "name": None}]},
    ]
    found = read_prompts(write_rows(tmp_path / "rows.jsonl", rows))
    assert found.texts == ("a", "b", tuple(talk))
    assert (found.repeats, found.skipped) == (2, 0), "a user's only message says the same as its text"
    assert found.places[1] == f"{tmp_path}/rows.jsonl:2"
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    assert read_prompts(str(tmp_path / "rows.jsonl.gz")).digest == found.digest


def test_bad_prompts_are_all_looked_at_and_ten_are_named(tmp_path: Path) -> None:
    bad = [{"prompt": None}, {"question": "a"}, {"prompt": ""}, {"prompt": 3}, {"prompt": []}, {"prompt": [{}]}]
    source = write_rows(tmp_path / "rows.jsonl", [*bad, *[{"prompt": 1}] * 6, {"prompt": "good"}])
    with pytest.raises(RefusedError) as refused:
        read_prompts(source)
    said = [str(finding).removeprefix(f"{source}:") for finding in refused.value.findings]
    assert said[:6] == [
        "1: 'prompt' is null",
        "2: has no 'prompt', only 'question'",
        "3: 'prompt' is empty text: there is nothing to answer",
        "4: 'prompt' is 3, expected text or a list of messages",
        "5: 'prompt' is an empty list, expected one message or more",
        "6: has no 'prompt[0].role', only ",
    ]
    assert len(said) == 11
    assert said[10] == " ... and 2 more bad rows; --skip-bad-rows leaves them out and counts them"
    kept = read_prompts(source, skip_bad_rows=True)
    assert (kept.texts, kept.skipped) == (("good",), 12)
    with pytest.raises(RefusedError, match="no good row is left"):
        read_prompts(write_rows(tmp_path / "bad.jsonl", bad), skip_bad_rows=True)
    with pytest.raises(RefusedError, match="is empty: there is no row in it"):
        read_prompts(write_rows(tmp_path / "none.jsonl", []))


def test_a_limit_is_a_random_sample_in_the_order_of_the_file(tmp_path: Path) -> None:
    source = prompt_file(tmp_path / "p.jsonl", [f"{i:02}" for i in range(40)])
    samples = [read_prompts(source, limit=10, seed=seed).texts for seed in range(3)]
    assert all(list(sample) == sorted(sample) and len(sample) == 10 for sample in samples)
    assert len(set(samples)) == 3
    assert samples[0] == read_prompts(source, limit=10, seed=0).texts
    assert len(read_prompts(source, limit=99).texts) == 40
    with pytest.raises(UsageError, match="--limit: expected 1 or more, found 0"):
        read_prompts(source, limit=0)


# --- prompts as tokens, tokens as answers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "read"),
    [("Say hi.", "<s>Say hi.\n\n"), ("TL;DR: ", "<s>TL;DR: "), ([{"role": "user", "content": "Hi"}], "<s>Hi\n\n")],
)
def test_plain_prompts_are_read_up_to_where_the_answer_begins(prompt: Any, read: str) -> None:
    opened = policy(causal_models.folder())
    assert opened.template == "plain"
    assert opened.tokenizer.decode(opened.encode(prompt)) == read


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt() -> None:
    ending = replace(policy(causal_models.folder()), tokenizer=tiny_models.tokenizer("bert"))
    assert ending.tokenizer("Say hi.")["input_ids"][-1] == 2
    assert ending.tokenizer.decode(ending.encode("Say hi. ")) == "<s>Say hi. "
    # An end that the prompt itself writes stays.
    assert ending.tokenizer.decode(ending.encode("Say ")[:1]) == "<s>"


def test_chat_prompts_end_where_the_template_lets_the_assistant_begin() -> None:
    opened = policy(causal_models.folder(template=causal_models.TEMPLATE))
    read = "<s><|user|>Say hi.<|assistant|>"
    assert opened.tokenizer.decode(opened.encode("Say hi.")) == read
    assert opened.tokenizer.decode(opened.encode(({"role": "user", "content": "Say hi."},))) == read
    plain = policy(causal_models.folder(template=causal_models.TEMPLATE), replace(ASK, template="plain"))
    assert plain.tokenizer.decode(plain.encode("Say hi.")) == "<s>Say hi.\n\n"


def test_conversations_need_a_template() -> None:
    talk = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"})
    with pytest.raises(
        RefusedError, match=r"--prompts: holds a conversation \(2 of system, user\), which has no plain"
    ):
        policy(causal_models.folder()).encode(talk)
    with pytest.raises(UsageError, match=r"--policy-template chat: the tokenizer of \S+ has no chat template"):
        policy(causal_models.folder(), replace(ASK, template="chat"))


def test_a_template_that_fails_is_said() -> None:
    opened = policy(causal_models.folder(template="{{ raise_exception('only users') }}"))
    with pytest.raises(RefusedError, match="chat template: cannot render a conversation of user: only users"):
        opened.encode("Hi")


@pytest.mark.parametrize(
    ("prompt", "written", "answer"),
    [
        ("Say hi.", " Paris", "Paris"),
        ("Say hi.", "\n\n", ""),
        ("Say hi.", "a city </s>", "a city "),
        ("TL;DR: ", " Paris", " Paris"),
        ("TL;DR:\n", "Paris ", "Paris "),
    ],
)
def test_prompt_and_answer_make_what_the_policy_read_and_wrote(prompt: str, written: str, answer: str) -> None:
    opened = policy(causal_models.folder())
    new = opened.tokenizer(written, add_special_tokens=False)["input_ids"]
    found = opened.answer(prompt, opened.encode(prompt), Drawn(new, new[-1] == 2))
    assert (found.text, found.tokens, found.finished) == (answer, len(new), "</s>" in written)


def test_spaces_that_a_tokenizer_drops_at_the_beginning_of_a_text_are_kept() -> None:
    """Tokenizers of Llama 2's kind: a word's token carries the space before it, and decoded alone it loses it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[U]", "▁Say", "▁it", "▁", "▁now", "<0x0A>"])}
    made = Tokenizer(models.WordLevel(words, unk_token="[U]"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    opened = replace(policy(causal_models.folder()), tokenizer=PreTrainedTokenizerFast(tokenizer_object=made))
    assert opened.tokenizer.decode([4]) == "now"
    assert opened.answer("Say it ", [1, 2], Drawn([4], False)).text == " now"


def test_answers_of_chat_policies_are_the_new_words() -> None:
    opened = policy(causal_models.folder(template=causal_models.TEMPLATE))
    new = opened.tokenizer("Paris, a city</s>", add_special_tokens=False)["input_ids"]
    assert opened.answer("Say hi.", opened.encode("Say hi."), Drawn(new, True)).text == "Paris, a city"


# --- what is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_tokens_are_drawn_with_their_probabilities(temperature: float, top_p: float) -> None:
    from transformers import TopPLogitsWarper

    logits, count = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 2, 20_000
    scores = logits / temperature
    expected = (TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores).softmax(-1)[0].double()
    even = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = draw(logits.expand(count, -1), even, temperature, top_p)
    # Evenly spread numbers hit every token as often as its probability says, to one.
    assert (torch.bincount(tokens, minlength=50) - count * expected).abs().max() <= 1.01


def test_extreme_logits_and_temperatures_draw_a_token() -> None:
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    logits = torch.tensor([[0.0, 500.0, -torch.inf], [-torch.inf, -3e38, -torch.inf]])
    for temperature, top_p in ((1e-9, 1.0), (1e9, 1.0), (1.0, 1e-9), (0.0, 1.0)):
        found = draw(logits, uniforms, temperature, top_p)
        assert found[1] == 1, (temperature, top_p)
    assert draw(logits[:1], uniforms[:1], 1e-9, 1.0).tolist() == [1]


def test_random_numbers_belong_to_an_answer() -> None:
    few, many = random_numbers(5, 2, 3), random_numbers(5, 4, 6)
    assert torch.equal(few, many[:2, :3])
    assert len(set(many.flatten().tolist())) == 24
    assert not torch.equal(few, random_numbers(6, 2, 3))


def by_hand(folder: Path, prompt: str, settings: Sampling) -> list[Drawn]:
    """Each token from a forward pass over the whole text so far: no cache, no batch, no generate."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    opened = policy(folder, settings)
    begin = opened.encode(prompt)
    uniforms = random_numbers(seed_of(prompt, settings.seed), settings.n, settings.max_new_tokens)
    found = []
    for row in uniforms:
        new: list[int] = []
        while len(new) < settings.max_new_tokens and not (new and new[-1] in opened.ends):
            with torch.inference_mode():
                logits = module(input_ids=torch.tensor([[*begin, *new]]), use_cache=False).logits[:, -1]
            new.append(int(draw(logits, row[len(new)][None], settings.temperature, settings.top_p)))
        found.append(Drawn(new, new[-1] in opened.ends))
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text", "gpt2", "gpt_neox", "bloom"])
def test_a_prompt_that_is_computed_once_gives_the_same_answers(kind: str) -> None:
    """The prompt is longer than the sliding window of Gemma 3."""
    folder = causal_models.folder(kind)
    assert TransformersGenerator(policy(folder), ASK).reuses_prompt
    expected = by_hand(folder, LONG, ASK)
    assert drawn(folder) == expected
    assert drawn(folder, reuse=False) == expected
    assert len({tuple(answer.ids) for answer in expected}) == ASK.n


def test_a_prompt_is_not_reused_where_rotations_depend_on_the_length() -> None:
    folder = causal_models.folder("phi3")
    assert not TransformersGenerator(policy(folder), ASK).reuses_prompt
    settings, prompt = replace(ASK, n=2, max_new_tokens=40), LONG
    length = len(policy(folder).encode(prompt))
    assert length < 64 < length + 40
    assert drawn(folder, prompt, settings) == by_hand(folder, prompt, settings)


def test_a_prompt_is_not_reused_where_that_gives_other_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = transformers_generator._computed
    monkeypatch.setattr(transformers_generator, "_computed", lambda module, inputs: computed(module, inputs + 1))
    assert not TransformersGenerator(policy(causal_models.folder()), ASK).reuses_prompt

    def refuse(module: Any, inputs: torch.Tensor) -> Any:
        raise TypeError("another kind of cache")

    monkeypatch.setattr(transformers_generator, "_computed", refuse)
    assert drawn(causal_models.folder()) == by_hand(causal_models.folder(), LONG, ASK)


def test_answers_do_not_depend_on_how_many_are_drawn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = causal_models.folder()
    expected = drawn(folder, settings=replace(ASK, n=7))
    assert drawn(folder, settings=replace(ASK, n=7, batch=3)) == expected
    assert drawn(folder, settings=replace(ASK, n=5)) == expected[:5]
    sampled, rows = transformers_generator._sampled, []

    def small(module: Any, inputs: torch.Tensor, *more: Any, **named: Any) -> Any:
        rows.append(len(inputs))
        if len(inputs) > 2:
            raise torch.OutOfMemoryError
        return sampled(module, inputs, *more, **named)

    monkeypatch.setattr(transformers_generator, "_sampled", small)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert drawn(folder, settings=replace(ASK, n=7)) == expected
    assert rows[-6:] == [7, 4, 2, 2, 2, 1]


def test_out_of_memory_with_one_answer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = policy(causal_models.folder())
    generate = TransformersGenerator(opened, ASK)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(transformers_generator, "_sampled", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(
        WarmergeError, match=r"out of memory with one answer at a time; try --dtype bfloat16, --max-new"
    ):
        next(generate([([1, 5, 6], 0)]))


def test_nothing_of_the_models_own_generation_config_leaks_in(tmp_path: Path) -> None:
    expected = drawn(causal_models.folder())
    folder = causal_models.write(tmp_path / "lm")
    causal_models.edit(
        folder, "generation_config.json", top_k=1, temperature=0.1, top_p=0.1, do_sample=True, repetition_penalty=5.0,
        no_repeat_ngram_size=1, min_new_tokens=9, suppress_tokens=[5, 6, 7], max_length=20, num_beams=2, eos_token_id=2,
    )  # fmt: skip
    assert drawn(folder) == expected


def test_an_answer_ends_at_every_end_that_is_named(tmp_path: Path) -> None:
    settings = replace(ASK, n=8, max_new_tokens=30)
    common = Counter(token for answer in drawn(causal_models.folder(), settings=settings) for token in answer.ids)
    end = next(token for token, _ in common.most_common() if token > 10)
    folder = causal_models.write(tmp_path / "lm")
    causal_models.edit(folder, "generation_config.json", eos_token_id=[9, end])
    opened = policy(folder, settings)
    assert opened.ends == (9, end, 2), "and at the tokenizer's own"
    found = drawn(folder, settings=settings)
    assert found == by_hand(folder, LONG, settings)
    assert any(answer.ids[-1] == end for answer in found)
    for answer in found:
        assert not set(answer.ids[:-1]) & {9, end, 2}
        assert answer.finished == (answer.ids[-1] in (9, end, 2)) == (len(answer.ids) < 30 or answer.finished)
    texts = [opened.answer(LONG, opened.encode(LONG), answer) for answer in found]
    assert [text.tokens for text in texts] == [len(answer.ids) for answer in found]


def test_ends_are_those_that_files_name(tmp_path: Path) -> None:
    folder = causal_models.write(tmp_path / "lm", eos_token_id=None)
    (folder / "generation_config.json").unlink()
    assert stored_ends(open_for_sampling(folder)) == [], "a config class has an id of its own, of any word"
    causal_models.edit(folder, "config.json", eos_token_id=[7, 8])
    assert stored_ends(open_for_sampling(folder)) == [7, 8]
    causal_models.edit(folder, "generation_config.json", eos_token_id=9)
    assert stored_ends(open_for_sampling(folder)) == [9]


def test_weights_that_overflow_are_no_answers(tmp_path: Path) -> None:
    folder = causal_models.write(tmp_path / "lm")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusedError, match="gives logits that are not finite; its weights hold NaN or overflow"):
        drawn(folder)


def test_on_a_cpu_answers_are_computed_in_float32(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "lm"
    module = AutoModelForCausalLM.from_pretrained(causal_models.folder()).to(torch.bfloat16)
    tiny_models.save(folder, module, tiny_models.tokenizer(pad=None))
    source = open_for_sampling(folder)
    assert dtype_of(source, replace(ASK, device="cpu")) == "float32"
    assert dtype_of(source, replace(ASK, generator="vllm")) == "bfloat16"
    assert TransformersGenerator(policy(folder), replace(ASK, device="cpu")).module.dtype == torch.float32
    assert TransformersGenerator(policy(folder), replace(ASK, dtype="bfloat16")).module.dtype == torch.bfloat16


# --- what is no policy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("bert", "a BERT encoder"),
        ("t5", r"an encoder-decoder \(t5\)"),
        ("llama", r"a reward model \(LlamaForSequenceClassification\)"),
    ],
)
def test_only_causal_language_models_write_text(kind: str, what: str, tmp_path: Path) -> None:
    folder = tiny_models.folder(kind)
    if kind != "llama":
        folder = tiny_models.own_folder(tmp_path / "base", kind, architectures=None)
    with pytest.raises(RefusedError, match=rf"--policy \S+: is {what}, which writes no text; give a causal language"):
        sample_pool(folder, prompt_file(tmp_path / "p.jsonl"), tmp_path / "pool.jsonl", ASK)
    assert not (tmp_path / "pool.jsonl").exists()


def test_adapters_and_single_files_are_no_policies(tmp_path: Path) -> None:
    prompts, adapter = prompt_file(tmp_path / "p.jsonl"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    with pytest.raises(UsageError, match=r"--policy: \S+adapter is a LoRA adapter; merge it into its base first"):
        sample_pool(adapter, prompts, tmp_path / "pool.jsonl", ASK)
    with pytest.raises(UsageError, match=r"model.safetensors is a file; give its folder, with config and tokenizer"):
        sample_pool(causal_models.folder() / "model.safetensors", prompts, tmp_path / "pool.jsonl", ASK)


def test_missing_and_unknown_weights_are_refused(tmp_path: Path) -> None:
    folder = causal_models.write(tmp_path / "lm")
    tensors = load_file(folder / "model.safetensors")
    tensors["v_head.weight"] = tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusedError) as refused:
        sample_pool(folder, prompt_file(tmp_path / "p.jsonl"), tmp_path / "pool.jsonl", ASK)
    assert "1 tensors are missing, so transformers would draw them at random: 'lm_head.weight'" in str(refused.value)
    assert "1 tensors are no part of a causal language model: 'v_head.weight'" in str(refused.value)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("pool")] == []


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = causal_models.write(tmp_path / "lm", vocab_size=300)
    with pytest.raises(RefusedError, match="a tokenizer with ids up to 399, but 300 tokens: not the model's tokenizer"):
        policy(folder)


def test_prompts_that_leave_no_room_for_an_answer_are_refused_or_left_out(tmp_path: Path) -> None:
    long = [f"{i} {LONG * 9}" for i in range(12)]
    prompts = prompt_file(tmp_path / "p.jsonl", ["Hi", *long])
    arguments = (causal_models.folder(), prompts, tmp_path / "pool.jsonl", replace(ASK, n=2))
    with pytest.raises(RefusedError) as refused:
        sample_pool(*arguments)
    findings = refused.value.findings
    tokens = len(policy(causal_models.folder()).encode(long[0]))
    assert str(findings[0]) == f"{prompts}:2: has {tokens} tokens, more than 247"
    assert findings[10].what.startswith("... and 2 more; ")
    assert findings[10].what.endswith(
        "has 256 positions for a prompt and --max-new-tokens 9 together; --skip-bad-rows leaves such prompts out and "
        "counts them"
    )
    found = sample_pool(*arguments, skip_bad_rows=True)
    assert (found.prompts, found.skipped) == (1, 12)
    assert sample_pool(*arguments, skip_bad_rows=True) == found
    only_long = prompt_file(tmp_path / "long.jsonl", long)
    with pytest.raises(RefusedError, match=r"has 256 positions .* 9 together; no prompt fits"):
        sample_pool(arguments[0], only_long, tmp_path / "other.jsonl", replace(ASK, n=2), skip_bad_rows=True)


# --- the pool ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pool that was sampled without interruption, and its prompts."""
    folder = tmp_path_factory.mktemp("pool")
    sample_pool(causal_models.folder(), prompt_file(folder / "p.jsonl"), folder / "pool.jsonl", ASK)
    return folder


def test_a_pool_holds_the_answers_to_each_prompt_in_order(finished: Path) -> None:
    rows = lines(finished / "pool.jsonl")
    assert [row["prompt"] for row in rows] == PROMPTS
    for row in rows:
        opened = policy(causal_models.folder())
        answers = drawn(causal_models.folder(), row["prompt"])
        texts = [opened.answer(row["prompt"], opened.encode(row["prompt"]), answer) for answer in answers]
        assert row["candidates"] == [text.text for text in texts]
        assert row["tokens"] == [text.tokens for text in texts]
        assert row["finished"] == [text.finished for text in texts]
        assert len(set(row["candidates"])) > 1


def test_what_was_asked_lies_beside_the_pool(finished: Path) -> None:
    record = json.loads((finished / "pool.sampling.json").read_text())
    assert record["asked"] | {"n": 3, "temperature": 1.0, "seed": 3, "dtype": "float32"} == record["asked"]
    assert record["policy"] == str(causal_models.folder())
    assert record["versions"]["torch"] == torch.__version__
    assert record["totals"]["answers"] == 9
    assert record["seconds"] > 0


def test_an_answer_does_not_depend_on_the_other_prompts(finished: Path, tmp_path: Path) -> None:
    prompts = prompt_file(tmp_path / "p.jsonl", PROMPTS[::-1][:2])
    sample_pool(causal_models.folder(), prompts, tmp_path / "pool.jsonl", ASK)
    assert lines(tmp_path / "pool.jsonl") == lines(finished / "pool.jsonl")[::-1][:2]


@pytest.mark.parametrize("kept", [1, 2])
def test_a_stopped_run_goes_on_to_the_same_bytes(kept: int, finished: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "pool.jsonl", []
    arguments: tuple[Any, ...] = (causal_models.folder(), str(finished / "p.jsonl"), out, ASK)
    with pytest.raises(Interrupted) as stopped:
        sample_pool(*arguments, progress=stop_after(kept))
    expected = f"stopped; {kept} of 3 prompts are sampled and kept in {out}; the same command goes on"
    assert str(stopped.value) == expected
    assert len(lines(out)) == kept
    with out.open("ab") as file:  # a line that a power cut tore
        file.write((finished / "pool.jsonl").read_bytes()[:40])
    earlier = json.loads((tmp_path / "pool.sampling.json").read_text())["seconds"]
    found = sample_pool(*arguments, on_work=said.append, progress=said.append)
    assert said == [3 - kept, *[1] * (3 - kept)]
    assert out.read_bytes() == (finished / "pool.jsonl").read_bytes()
    assert found.seconds > earlier > 0


def test_a_finished_pool_is_returned_without_loading_anything(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("nothing is to be loaded")

    before = (finished / "pool.jsonl").stat().st_mtime_ns
    monkeypatch.setattr(sampling, "open_policy", refuse)
    found = sample_pool(
        causal_models.folder(),
        str(finished / "p.jsonl"),
        finished / "pool.jsonl",
        replace(ASK, batch=1),
        overwrite=True,
    )
    rows = lines(finished / "pool.jsonl")
    assert (found.prompts, found.answers) == (3, 9)
    assert found.tokens == sum(sum(row["tokens"]) for row in rows)
    assert found.truncated == sum(row["finished"].count(False) for row in rows) / 9
    assert (finished / "pool.jsonl").stat().st_mtime_ns == before


def test_another_question_is_refused_with_all_that_differs(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "pool.jsonl"
    for name in ("pool.jsonl", "pool.sampling.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    other = prompt_file(tmp_path / "other.jsonl", PROMPTS[:2])
    settings = replace(ASK, n=2, temperature=0.5)
    with pytest.raises(UsageError) as refused:
        sample_pool(causal_models.folder(), other, out, settings)
    said = str(refused.value).splitlines()
    assert said[0] == f"{out} holds another pool; choose another name for -o, or add --overwrite. Differing:"
    assert [line.split(":")[0] for line in said[1:]] == ["  prompts", "  n", "  temperature"]
    assert said[2:] == ["  n: 3 there, 2 now", "  temperature: 1.0 there, 0.5 now"]
    assert out.read_bytes() == (finished / "pool.jsonl").read_bytes()
    sample_pool(causal_models.folder(), other, out, settings, overwrite=True)
    assert [len(row["candidates"]) for row in lines(out)] == [2, 2]


def test_another_policy_of_the_same_path_is_another_question(finished: Path, tmp_path: Path) -> None:
    folder, prompts, out = causal_models.write(tmp_path / "lm"), str(finished / "p.jsonl"), tmp_path / "pool.jsonl"
    sample_pool(folder, prompts, out, replace(ASK, n=1))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    causal_models.edit(folder, "config.json", rope_theta=5.0)
    causal_models.edit(folder, "generation_config.json", eos_token_id=[2, 3])
    with pytest.raises(UsageError) as refused:
        sample_pool(folder, prompts, out, replace(ASK, n=1))
    assert [line.split(":")[0] for line in str(refused.value).splitlines()[1:]] == ["  policy", "  config", "  ends"]


def test_a_pool_that_was_changed_is_neither_continued_nor_returned(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "pool.jsonl"
    arguments: tuple[Any, ...] = (causal_models.folder(), str(finished / "p.jsonl"), out, ASK)
    (tmp_path / "pool.sampling.json").write_bytes((finished / "pool.sampling.json").read_bytes())
    first, second, _ = (finished / "pool.jsonl").read_bytes().splitlines(keepends=True)
    out.write_bytes(first + second)
    with pytest.raises(UsageError, match=r"pool.jsonl was changed since it was sampled; score it as it is, choose"):
        sample_pool(*arguments)
    record = json.loads((tmp_path / "pool.sampling.json").read_text())
    del record["totals"]
    (tmp_path / "pool.sampling.json").write_text(json.dumps(record))
    for bad in (second + first, first + b"{}\n", first + b"\n", first * 4):
        out.write_bytes(bad)
        with pytest.raises(UsageError, match=r"pool.jsonl:[12] is not the line of this pool that belongs there; the"):
            sample_pool(*arguments)
        assert out.read_bytes() == bad


def test_files_of_something_else_are_left_alone(finished: Path, tmp_path: Path) -> None:
    prompts = str(finished / "p.jsonl")
    other = tmp_path / "other.jsonl"
    other.write_text("{}\n")
    for out, what in (
        (other, r"other.jsonl exists, without a readable other.sampling.json that says what was asked; choose another"),
        (Path(prompts), r"-o \S+p.jsonl is the file of prompts itself; choose another name"),
        (tmp_path / "pool.json", r"-o: expected a name ending in .jsonl, found '\S+pool.json'"),
    ):
        with pytest.raises(UsageError, match=what):
            sample_pool(causal_models.folder(), prompts, out, ASK)
    assert other.read_text() == "{}\n"
    found = sample_pool(causal_models.folder(), prompts, other, replace(ASK, n=1), overwrite=True)
    assert len(lines(other)) == found.prompts == 3


def test_a_folder_is_made_when_there_is_something_to_put_there(finished: Path, tmp_path: Path) -> None:
    out, prompts = tmp_path / "new" / "folder" / "pool.jsonl", str(finished / "p.jsonl")
    with pytest.raises(
        UsageError, match=r"--max-new-tokens 256: \S+ has 256 positions for a prompt and its answer toge"
    ):
        sample_pool(causal_models.folder(), prompts, out, replace(ASK, max_new_tokens=256))
    assert not (tmp_path / "new").exists()
    sample_pool(causal_models.folder(), prompts, out, ASK)
    assert out.read_bytes() == (finished / "pool.jsonl").read_bytes()


def test_two_runs_do_not_write_one_pool(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "pool.jsonl"
    arguments: tuple[Any, ...] = (causal_models.folder(), str(finished / "p.jsonl"), out, ASK)
    with pytest.raises(Interrupted):
        sample_pool(*arguments, progress=stop_after(1))
    with out.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for settings in (ASK, replace(ASK, n=2)):
            with pytest.raises(WarmergeError, match=r"another run is writing \S+pool.jsonl at this moment; wait for"):
                sample_pool(*arguments[:3], settings, overwrite=True)
    assert len(lines(out)) == 1


def test_pools_are_scored_as_they_are(finished: Path, tmp_path: Path) -> None:
    reward = tiny_models.folder("llama")
    score_file(reward, str(finished / "pool.jsonl"), tmp_path / "scored.jsonl")
    scored = lines(tmp_path / "scored.jsonl")
    assert [len(row["reward"]) for row in scored] == [3, 3, 3]
    assert numpy.isfinite([row["reward"] for row in scored]).all()


def test_what_a_reader_of_the_pool_should_know_is_said(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(answers: list[Drawn]) -> Any:
        return lambda policy, settings, longest: lambda prompts: iter([answers] * len(list(prompts)))

    monkeypatch.setattr(sampling, "_generator", given([Drawn([50, 51], False), Drawn([2], True)]))
    arguments: tuple[Any, ...] = (causal_models.folder(), str(finished / "p.jsonl"), tmp_path / "pool.jsonl")
    found = sample_pool(*arguments, replace(ASK, n=2))
    assert [warning.what for warning in found.warnings] == [
        "3 of 6 answers were cut at 9 tokens; their rewards are those of unfinished texts: raise --max-new-tokens",
        "3 of 6 answers are empty; they are kept",
    ]
    assert (found.truncated, found.tokens) == (0.5, 9)
    assert lines(tmp_path / "pool.jsonl")[0]["finished"] == [False, True]


# --- vLLM -------------------------------------------------------------------------------------------------------------


class StandIn:
    """The names of vLLM that are used: remembers what it is asked, and answers with the number and the seed."""

    def __init__(self, each: int | None = None, broken: bool = False) -> None:
        self.models: list[dict[str, Any]] = []
        self.calls: list[tuple[list[Any], list[Any]]] = []
        self.each, self.broken = each, broken

    def SamplingParams(self, **given: Any) -> SimpleNamespace:  # noqa: N802 - vLLM's own name
        return SimpleNamespace(**given)

    def LLM(self, **given: Any) -> SimpleNamespace:  # noqa: N802 - vLLM's own name
        if self.broken:
            raise RuntimeError("no GPU")
        self.models.append(given)
        return SimpleNamespace(generate=self.generate)

    def generate(self, prompts: list[Any], parameters: list[Any], use_tqdm: bool) -> list[SimpleNamespace]:
        assert use_tqdm is False
        self.calls.append((prompts, parameters))
        return [
            SimpleNamespace(
                outputs=[
                    SimpleNamespace(token_ids=(30 + k, asked.seed % 100 + 30, 2)[: 3 - k % 2], finish_reason=reason)
                    for k, reason in zip(range(self.each or asked.n), ["stop", "length"] * asked.n, strict=False)
                ]
            )
            for asked in parameters
        ]


def test_vllm_is_asked_for_the_same_with_nothing_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm, settings = StandIn(), replace(ASK, generator="vllm", n=3, temperature=0.7, top_p=0.9)
    monkeypatch.setitem(sys.modules, "vllm", vllm)  # type: ignore[arg-type]
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    texts = [f"{i} Say hi." for i in range(70)]
    folder, prompts = causal_models.folder(), prompt_file(tmp_path / "p.jsonl", texts)
    found = sample_pool(folder, prompts, tmp_path / "pool.jsonl", settings)
    opened = policy(folder)
    assert vllm.models == [
        {
            "model": str(folder), "dtype": "float32", "seed": 3, "trust_remote_code": False,
            "max_model_len": max(len(opened.encode(text)) for text in texts) + 9, "generation_config": "vllm",
        }
    ]  # fmt: skip
    assert [len(asked) for asked, _ in vllm.calls] == [64, 6]
    assert vllm.calls[1][0][0] == {"prompt_token_ids": opened.encode(texts[64])}
    assert vars(vllm.calls[1][1][0]) == {
        "n": 3, "temperature": 0.7, "top_p": 0.9, "max_tokens": 9, "seed": seed_of(texts[64], 3),
        "stop_token_ids": [2], "detokenize": False,
    }  # fmt: skip
    row = lines(tmp_path / "pool.jsonl")[64]
    expected = [[30 + k, seed_of(texts[64], 3) % 100 + 30] for k in range(3)]
    whole = [opened.answer(texts[64], opened.encode(texts[64]), Drawn(ids, False)).text for ids in expected]
    assert (row["prompt"], row["candidates"]) == (texts[64], whole)
    assert (row["finished"], row["tokens"]) == ([True, False, True], [3, 2, 3])
    assert found.truncated == pytest.approx(1 / 3)


def test_without_vllm_it_is_said_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    settings = replace(ASK, generator="vllm")
    arguments = (causal_models.folder(), prompt_file(tmp_path / "p.jsonl"), tmp_path / "pool.jsonl", settings)
    with pytest.raises(
        UsageError, match=r"--generator vllm needs vLLM \(.*\): install it beside warmerge in an environ"
    ):
        sample_pool(*arguments)
    monkeypatch.setitem(sys.modules, "vllm", StandIn(broken=True))  # type: ignore[arg-type]
    with pytest.raises(WarmergeError, match=r"vLLM cannot load \S+: no GPU"):
        sample_pool(*arguments)
    monkeypatch.setitem(sys.modules, "vllm", StandIn(each=2))  # type: ignore[arg-type]
    with pytest.raises(WarmergeError, match=r"vLLM gave 3 times \[2, 2, 2\]... answers for 3 prompts, 3 each expected"):
        sample_pool(*arguments)
    assert not (tmp_path / "pool.jsonl").read_bytes()
