"""What benchmarks/scale.py measures on: checkpoints of any size, models with random weights, texts and pairs."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

import torch

from warmerge.weights.safetensors_format import build_header

VOCABULARY = 4096
_BLOCK, _PIECE = 1 << 26, 1 << 25


def checkpoint(folder: Path, seed: int, nbytes: int, tensors: int = 100, shards: int = 1) -> Path:
    """A checkpoint in bfloat16 of about `nbytes` in equal tensors and a head: one start plus a small step of `seed`.

    Its bytes are pieces of one block of random numbers from ever other places: quick to make, and as many to read.
    """
    folder.mkdir(parents=True)
    block = memoryview(_block(seed).numpy())
    shape = (max(1, nbytes // 2 // tensors),)
    names = [f"model.layers.{i // 10}.part{i % 10}.weight" for i in range(tensors - 1)]
    shapes = dict.fromkeys(names, ("BF16", shape)) | {"score.weight": ("BF16", (1, 64))}
    table: dict[str, str] = {}
    piece = 0
    for number in range(shards):
        chosen = [*shapes][number * tensors // shards : (number + 1) * tensors // shards]
        name = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        header, _ = build_header({name: shapes[name] for name in chosen})
        left = sum(2 * functools.reduce(int.__mul__, shapes[name][1]) for name in chosen)
        with (folder / name).open("wb", buffering=0) as file:
            file.write(header)
            while left:
                start = piece * 7_340_034 % (_BLOCK - _PIECE)
                left -= file.write(block[start : start + min(left, _PIECE)])
                piece += 1
        table |= dict.fromkeys(chosen, name)
    if shards > 1:
        index = {"metadata": {"total_size": nbytes}, "weight_map": table}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    return folder


@functools.lru_cache(maxsize=1)
def _block(seed: int) -> torch.Tensor:
    """Bytes of bfloat16 numbers, all finite: those of a start and a twentieth of others."""
    start, step = (torch.randn(_BLOCK // 2, generator=torch.Generator().manual_seed(s)) for s in (0, seed + 1))
    return (start * 0.02 + step * 0.001).bfloat16().view(torch.uint8)


def reward_model(folder: Path, kind: str, seed: int = 0, width: int = 64) -> Path:
    """A decoder ("llama") or an encoder ("bert") with random weights, and a tokenizer of made-up words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=4 * width, max_position_embeddings=4096, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    module = AutoModelForSequenceClassification.from_config(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.002 * torch.randn_like(parameter))
    module.save_pretrained(folder)
    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=4096
    )
    tokenizer.save_pretrained(folder)
    return folder


def words(source: random.Random, count: int) -> str:
    return " ".join(f"w{source.randint(2, VOCABULARY - 1)}" for _ in range(count))


def texts(count: int, prompt: int, answers: int = 4, answer: int = 32) -> list[tuple[str, str]]:
    """(prompt, answer): each prompt of so many tokens with so many answers of `answer` tokens, half as many or more."""
    source, made = random.Random(0), []
    for _ in range(-(-count // answers)):
        asked = words(source, prompt)
        made += [(asked + " ", words(source, source.randint(answer // 2, answer))) for _ in range(answers)]
    return made[:count]


def pairs(path: Path, count: int, each: int = 4) -> Path:
    """Preference pairs as JSON lines: about so many of one prompt, 20 words a prompt and 30 an answer."""
    source = random.Random(0)
    with path.open("w") as file:
        for i in range(count):
            if i % each == 0:
                prompt = f"{i} {words(source, 20)}"
            row = {"prompt": prompt, **{side: words(source, 30) for side in ("chosen", "rejected")}}
            file.write(json.dumps(row) + "\n")
    return path
