"""Tiny causal language models with random weights, to sample from; nothing is downloaded."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import tiny_models
import torch

# A BOS of its own, and a beginning for the answer, as most public templates have.
TEMPLATE = tiny_models.TEMPLATE + "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def write(folder: Path, kind: str = "llama", template: str | None = None, spread: float = 0.3, **changes: Any) -> Path:
    """A checkpoint folder of one of `tiny_models.DECODERS`; `changes` go into its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"vocab_size": 410, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **{**tiny_models.KINDS[kind], **settings, **changes})
    module = AutoModelForCausalLM.from_config(config)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            one = ("norm" in name.lower() or "ln_" in name) and name.endswith("weight") and kind != "gemma3_text"
            parameter.copy_(torch.randn(parameter.shape, generator=random) * spread + (1.0 if one else 0.0))
    return tiny_models.save(folder, module, tiny_models.tokenizer(pad=None, template=template))


def edit(folder: Path, file: str, **changes: Any) -> None:
    """Sets fields of a JSON file of a checkpoint; makes it where there is none."""
    path = folder / file
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | changes))


@functools.cache
def _session() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="warmerge-tests-")


@functools.cache
def folder(kind: str = "llama", template: str | None = None) -> Path:
    """A read-only checkpoint, made once a session."""
    return write(Path(tempfile.mkdtemp(dir=_session().name)), kind, template)
