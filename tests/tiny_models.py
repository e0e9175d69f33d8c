"""Tiny reward models of many architectures with tokenizers trained on a few sentences; nothing is downloaded.

No conftest.py: a second module of that name would hide tests/conftest.py from tests that import from it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

Text = Any
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
# A BOS of its own, as most public templates have: rendering to a string and tokenising that would make two.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
_SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and nobody says why it does so.",
    "What is the capital of France? The capital of France is Paris, a city on the Seine.",
    "Write a short poem about the sea. The sea is wide, the sea is deep, it rocks the sailors into sleep.",
    "How do I sort a list in Python? Call sorted(list), which returns a new one, or list.sort() in place.",
]
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "max_position_embeddings": 256}
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0],
}  # fmt: skip
DECODERS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": {**_GROUPED, "use_sliding_window": False},
    "qwen3": {**_GROUPED, "head_dim": 8},
    "mistral": {**_GROUPED, "head_dim": 8, "sliding_window": 12},
    "gemma3_text": {
        **_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": {**_SIZES, "max_position_embeddings": 256},
    "phi3": {**_GROUPED, "rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64},
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {**_SIZES, "max_position_embeddings": 256},
    "roberta": {**_SIZES, "max_position_embeddings": 258},
    "modernbert": {
        **_SIZES, "max_position_embeddings": 256, "local_attention": 16, "global_attn_every_n_layers": 2,
        "cls_token_id": 1, "sep_token_id": 2,
    },
}  # fmt: skip
# Positions that come from the mask (OPT, Bloom), heads that read the last column (XLNet) or the EOS (T5).
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("prefix_reuse", {
        "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
        "max_position_embeddings": 256,
    }),
    "bloom": ("prefix_reuse", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "xlnet": ("one_by_one", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    "t5": ("one_by_one", {
        "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 32, "num_layers": 1, "decoder_start_token_id": 0,
    }),
}  # fmt: skip
KINDS = {**DECODERS, **ENCODERS, **{kind: settings for kind, (_, settings) in OTHERS.items()}}
# Their tokenizers end texts themselves.
_ENDED = (*ENCODERS, "xlnet", "t5")


def tokenizer(
    kind: str = "llama", pad: str | None = PAD, template: str | None = None, vocab_size: int = 400, **options: Any
) -> Any:
    """A byte-level BPE tokenizer that adds a BOS to decoders' texts, BOS and EOS to encoders'.

    Ids: 0 <pad>, 1 <s>, 2 </s>, 3 <|user|>, 4 <|assistant|>, 5 <|system|>.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = [PAD, BOS, EOS, "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(_SENTENCES, trainer)
    single = f"{BOS} $A {EOS}" if kind in _ENDED else f"{BOS} $A"
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(BOS, 1), (EOS, 2)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=BOS, eos_token=EOS, model_max_length=options.pop("model_max_length", 256),
        **({} if pad is None else {"pad_token": pad}), **options,
    )  # fmt: skip
    wrapped.chat_template = template
    return wrapped


def make_model(kind: str, pad: int | None = 0, seed: int = 0, **changes: Any) -> Any:
    """A reward model with random weights, large enough that a wrong mask or position changes its rewards by far."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    settings = {"vocab_size": 410, "pad_token_id": pad, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 1}
    module = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(kind, **{**KINDS[kind], **settings, **changes})
    )
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            around = (
                1.0
                if ("norm" in name.lower() or "ln_" in name) and name.endswith("weight") and kind != "gemma3_text"
                else 0.0
            )
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3 + around)
    return module.eval()


def save(folder: Path, module: Any, wrapped: Any, **config: Any) -> Path:
    """A checkpoint folder; `config` changes its config.json."""
    module.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    if config:
        edit_config(folder, **config)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets fields of config.json; None removes one."""
    found = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


def alone(folder: Path, ids: Sequence[numpy.ndarray[Any, Any]]) -> numpy.ndarray[Any, Any]:
    """What transformers itself gives for each text alone, in float32: the definition of a reward."""
    from transformers import AutoModelForSequenceClassification

    module = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        rewards = [float(module(input_ids=torch.from_numpy(row)[None]).logits[0, 0]) for row in ids]
    return numpy.array(rewards)


def texts() -> list[tuple[Text, Text]]:
    """Prompts with 16, 2 and 1 answers, with everything that has gone wrong somewhere."""
    prompt = "What is the capital of France? Say it, and say a word or two about the city, the sea and the dog."
    answers = [
        "Paris.", "", "The capital of France is Paris, a city on the Seine.", "Paris.", "Lyon" * 20, " ", "\n\nParis",
        f"Paris.{PAD}", f"Paris.{PAD}{PAD}", f"Paris{EOS}", f"a{PAD}b", PAD, "פריז היא בירת צרפת", "巴黎 🗼👩‍👩‍👧 é",
        "The capital of France is London, a town.", "sleep, " * 25,
    ]  # fmt: skip
    found: list[tuple[Text, Text]] = [(prompt, answer) for answer in answers]
    found += [
        (f"{_SENTENCES[0][: 20 + 6 * n]}", answer) for n in range(7) for answer in ("Because.", "I do not know it.")
    ]
    found += [
        ("", "A whole text without a prompt."),
        ("Say nothing.", ""),
        ("", PAD),
        (prompt * 3, "x"),
        (prompt * 2, ""),
    ]
    return found


@functools.cache
def _session() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="warmerge-tests-")


@functools.cache
def folder(kind: str, pad: str = "own", template: str | None = None, seed: int = 0) -> Path:
    """A read-only checkpoint, made once a session. `pad`: a token of its "own", "eos", or "none"."""
    number = {"own": 0, "eos": 2, "none": None}[pad]
    wrapped = tokenizer(kind, {"own": PAD, "eos": EOS, "none": None}[pad], template)
    return save(Path(tempfile.mkdtemp(dir=_session().name)), make_model(kind, number, seed), wrapped)


def own_folder(place: Path, kind: str = "llama", seed: int = 0, dtype: Any = torch.float32, **config: Any) -> Path:
    """A checkpoint that a test may damage."""
    return save(place, make_model(kind, seed=seed).to(dtype), tokenizer(kind), **config)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """What transformers logs: its handler keeps the stderr of its first import, which pytest may not capture."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
