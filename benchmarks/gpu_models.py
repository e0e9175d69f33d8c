"""The parts of benchmarks/gpu.py that run reward models of random weights: scoring and `lmc-curve`."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy
import torch
from gpu_part import NotRunError, Part, matrix_peak, peak_gigabytes, seconds

import warmerge
from warmerge.pipeline.scoring import mixtures
from warmerge.rewards.forward import one_by_one
from warmerge.rewards.model import load_reward_model
from warmerge.rewards.render import encode
from warmerge.rewards.scoring import Tokens, method_of, score

WORDS = 4096
# As SmolLM2-135M, Llama-3.2-1B, Qwen2.5-1.5B and Llama-2-7B, all of them by Llama's code.
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": WORDS},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip


def make_decoder(folder: Path, shape: str, device: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A Llama with one label and random weights, and a tokenizer of made-up words, "w3" to "w4095"."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", **SHAPES[shape], max_position_embeddings=4096, num_labels=1, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    with torch.device(device):
        module = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    module.save_pretrained(folder)
    words = {word: i for i, word in enumerate(["[PAD]", "[BOS]", "[EOS]", *(f"w{i}" for i in range(3, WORDS))])}
    made = Tokenizer(models.WordLevel(words, unk_token="[EOS]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", model_max_length=4096
    ).save_pretrained(folder)
    return folder


def make_texts(count: int, prompt: int, answers: int) -> list[tuple[str, str]]:
    """About `count` texts: prompts of so many words, each with so many answers of 32 to 96 words."""
    random = numpy.random.default_rng(0)

    def words(n: int) -> str:
        return " ".join(f"w{i}" for i in random.integers(3, WORDS, n))

    prompts = [words(prompt) for _ in range(max(1, count // answers))]
    return [(text, words(int(random.integers(32, 97)))) for text in prompts for _ in range(answers)]


def _options(part: Part) -> warmerge.LoadOptions:
    return warmerge.LoadOptions(device=part.device, dtype="bfloat16", template="plain", max_length=4000)


# --- scoring ----------------------------------------------------------------------------------------------------------


def scoring(part: Part) -> None:
    """Rewards in bf16: tokens a second, share of the matrix peak, and how far a batch's are from a text's alone."""
    peak = matrix_peak(part.device, 64 if part.smoke else 8192)
    part.row(limit="bf16 matrix product, TFLOP/s", found=peak)
    words_of_a_case = {"tiny": 1000} if part.smoke else {"135M": 400_000, "1B": 200_000, "7B": 50_000}
    for shape, words in words_of_a_case.items():
        folder = part.work / shape
        with suppress(NotRunError), part.case(f"{shape}, made and loaded", needs=25 if shape == "7B" else 5):
            begun = time.perf_counter()
            make_decoder(folder, shape, part.device)
            made = time.perf_counter()
            model = load_reward_model(folder, _options(part))
            loaded = time.perf_counter()
            part.row(model=shape, GB=model.nbytes / 1e9, made_and_saved_s=made - begun, loaded_s=loaded - made)
            for prompt in (32,) if part.smoke else (128, 512, 2048):
                for answers in (1, 16):
                    texts = make_texts(max(answers, words // (prompt + 64)), prompt, answers)
                    with suppress(NotRunError), part.case(f"{shape}, prompts of {prompt}, {answers} answers", needs=5):
                        _scored(part, shape, model, texts, prompt, answers, peak)
        model = None
        shutil.rmtree(folder, ignore_errors=True)
        torch.cuda.empty_cache()


def _scored(
    part: Part, shape: str, model: Any, texts: list[tuple[str, str]], prompt: int, answers: int, peak: float
) -> None:
    """A row: texts of one kind, the faster of two turns; and the first of them each alone."""
    body, computed = model.module.base_model, [0]
    parameters = sum(p.numel() for p in body.parameters()) - body.get_input_embeddings().weight.numel()
    begun = time.perf_counter()
    ids = [entry.ids for entry in encode(model.renderer, texts)]
    tokenising = time.perf_counter() - begun
    method_of(model)  # tried out before the clock starts

    def count(module: Any, args: Any, kwargs: Any) -> None:
        computed[0] += kwargs["input_ids"].numel()

    peak_gigabytes()
    hook, times = body.register_forward_pre_hook(count, with_kwargs=True), []
    for _ in range(2):
        computed[0], begun = 0, time.perf_counter()
        rewards = score(model, Tokens(model.renderer, texts))
        times.append(time.perf_counter() - begun)
    hook.remove()
    elapsed, held, tried = min(times), peak_gigabytes(), ids[:16]
    alone = _alone(model, tried)
    begun = time.perf_counter()
    _alone(model, tried)
    single = (time.perf_counter() - begun) / len(tried)
    part.row(
        model=shape, prompt=prompt, answers=answers, texts=len(texts), method=method_of(model).__name__, s=elapsed,
        texts_per_s=len(texts) / elapsed, tokens_per_s=sum(map(len, ids)) / elapsed,
        computed_tokens_per_s=computed[0] / elapsed, share_of_peak=2 * parameters * computed[0] / elapsed / peak / 1e12,
        tokenising_s=tokenising, x_one_at_a_time=single * len(texts) / elapsed, peak_GB=held,
        largest_difference_to_alone=float(numpy.abs(rewards[: len(tried)] - alone).max()), std=float(rewards.std()),
    )  # fmt: skip


@torch.inference_mode()
def _alone(model: Any, ids: list[Any]) -> Any:
    return torch.cat([values[:, 0] for _, values in one_by_one(model.module, ids, 0)]).double().cpu().numpy()


# --- lmc-curve --------------------------------------------------------------------------------------------------------


def lmc(part: Part) -> None:
    """`lmc-curve` of two models: seconds of merging into the live one and of the rest, against merge, load, score."""
    shape, points, pairs = ("tiny", 3, 8) if part.smoke else ("1.5B", 11, 256)
    a = make_decoder(part.work / "a", shape, part.device)
    b = _moved(a, part.work / "b", part.device)
    texts = make_texts(2 * pairs, 128, 2)
    rows = [{"prompt": p, "chosen": x, "rejected": y} for (p, x), (_, y) in zip(texts[::2], texts[1::2], strict=True)]
    data = part.work / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fills: list[float] = []
    own = mixtures.fill

    def timed(*arguments: Any) -> Any:
        begun = time.perf_counter()
        filled = own(*arguments)
        fills.append(time.perf_counter() - begun)
        return filled

    with suppress(NotRunError), part.case("lmc-curve", needs=20):
        mixtures.fill = timed  # type: ignore[assignment]
        try:
            begun = time.perf_counter()
            warmerge.lmc_curve([a, b], [str(data)], points=points, measuring=warmerge.Measuring(_options(part)))
            whole = time.perf_counter() - begun
        finally:
            mixtures.fill = own
        part.row(
            way="lmc-curve", model=shape, texts=len(texts), points=len(fills), s_a_point=whole / len(fills),
            of_it_merging=sum(fills) / len(fills), loading=float("nan"), rest=(whole - sum(fills)) / len(fills),
        )  # fmt: skip
    with suppress(NotRunError), part.case("merge, load, score", needs=15):
        _by_way_of_the_disk(part, a, b, shape, texts)
    with suppress(NotRunError), part.case("both models on the device", needs=5):
        ours, theirs = (load_reward_model(folder, _options(part)).module for folder in (a, b))
        both = list(zip(ours.parameters(), theirs.parameters(), strict=True))
        with torch.inference_mode():
            bound = seconds(lambda: [torch.lerp(x, y, 0.3) for x, y in both])
        part.row(bound="a merge of two models that lie on the device, s", found=bound)


def _moved(folder: Path, target: Path, device: str) -> Path:
    """A copy of a model whose weights are a small step away."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    torch.manual_seed(1)
    for file in sorted(target.glob("*.safetensors")):
        tensors = load_file(file, device=device)
        save_file({n: (t + 0.002 * torch.randn_like(t)).cpu() for n, t in tensors.items()}, file, {"format": "pt"})
    return target


def _by_way_of_the_disk(part: Part, a: Path, b: Path, shape: str, texts: list[tuple[str, str]]) -> None:
    """A row: the mean of three points, each merged into a folder, loaded and scored; one before them is not timed."""
    spent, out = numpy.zeros(3), part.work / "point"
    for turn in range(4):
        times = [time.perf_counter()]
        warmerge.average([a, b], out, rule="lambda", lam=0.2 * (turn + 1))
        times.append(time.perf_counter())
        model = load_reward_model(out, _options(part))
        times.append(time.perf_counter())
        score(model, Tokens(model.renderer, texts))
        times.append(time.perf_counter())
        shutil.rmtree(out)
        spent += numpy.diff(times) if turn else 0
    merging, loading, scoring = (spent / 3).tolist()
    part.row(
        way="merge, load, score", model=shape, texts=len(texts), points=3, s_a_point=float(spent.sum() / 3),
        of_it_merging=merging, loading=loading, rest=scoring,
    )  # fmt: skip
