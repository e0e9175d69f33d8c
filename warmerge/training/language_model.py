"""A causal language model in its folder: opened with every weight from its file, written as its source was."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from warmerge.errors import Finding, RefusedError, naming, plain, some
from warmerge.rewards.config import transformers_config
from warmerge.rewards.model import own_weights
from warmerge.rewards.tokenizer import quiet
from warmerge.weights.checkpoint import Checkpoint
from warmerge.weights.folder import LocalFolder, read_bytes
from warmerge.weights.kernels import TORCH_DTYPE
from warmerge.weights.small_files import OTHER_FILES, TOKENIZER_FILES, architecture
from warmerge.weights.stream import refuse_changed


def open_language_model(source: Checkpoint, trust_remote_code: bool) -> Any:
    """The language model in float32, every weight from its file."""
    assert isinstance(source.folder, LocalFolder), "fine-tuning starts from files on this machine"
    config = transformers_config(source, trust_remote_code, labels=1)
    if (kind := not_causal(source, config)) is not None:
        what = f"--sft-steps needs a causal language model; {plain(source.label)} is {kind}: leave --sft-steps away"
        raise RefusedError([Finding("--base", what)])
    return load_language_model(source, config, torch.float32, trust_remote_code, "fine-tuned")


def load_language_model(
    source: Checkpoint, config: Any, dtype: torch.dtype, trust_remote_code: bool, purpose: str
) -> Any:
    """The language model of a folder on this machine, every weight from its file.

    Args:
        purpose: what it cannot be if transformers does not load it: "fine-tuned".

    Raises:
        RefusedError: transformers cannot load it; weights that are missing, not known or of another shape; a file
            that changed meanwhile.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    assert isinstance(source.folder, LocalFolder), "models are loaded from files on this machine"
    try:
        with quiet():
            module, info = AutoModelForCausalLM.from_pretrained(
                source.folder.path, config=config, dtype=dtype, use_safetensors=True,
                trust_remote_code=trust_remote_code, ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except (ValueError, ImportError, RuntimeError, OSError, SafetensorError) as error:
        refuse_changed([source])  # which would be why
        raise RefusedError([Finding(source.label, f"cannot be {purpose}: {error}"[:400])]) from error
    wrong = [
        Finding(source.label, f"{len(names)} tensors {what}: {some(names)}")
        for names, what in (
            (sorted(info["missing_keys"]), "are missing, so transformers would draw them at random"),
            (sorted(info["unexpected_keys"]), "are no part of a causal language model"),
            (sorted(str(name[0]) for name in info["mismatched_keys"]), "have another shape than the config says"),
        )
        if names
    ]
    if wrong:
        raise RefusedError(wrong)
    own_weights(module)
    refuse_changed([source])
    return module


def not_causal(source: Checkpoint, config: Any) -> str | None:
    """What a model is that predicts no next token, or None."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind, named = config.model_type, architecture(source.config or {})
    if source.fallback is not None:
        return "a LoRA adapter"
    if named.endswith("ForSequenceClassification"):
        return f"a reward model ({named})"
    if config.is_encoder_decoder:
        return f"an encoder-decoder ({kind})"
    # transformers would load a BERT as a "causal" model too: one that sees the token that it has to predict. So does
    # an XLNet without its permutation masks.
    if (type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)) or kind == "xlnet":
        return f"{'an' if kind[0] in 'aeioux' else 'a'} {kind.upper()} encoder"
    own_code = "AutoModelForCausalLM" in (source.config or {}).get("auto_map", {})
    return None if own_code or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else f"a {kind} model"


def merged_state(module: Any) -> dict[str, torch.Tensor]:
    """The weights of a language model with its LoRA adapters merged into them, on the CPU; `module` stays as it is."""
    copied = copy.deepcopy(module).to("cpu")
    state: dict[str, torch.Tensor] = copied.merge_and_unload().state_dict()
    return state


def write_language_model(
    source: Checkpoint, tokenizer: Any, module: Any, state: Mapping[str, torch.Tensor], out: Path
) -> None:
    """The weights in the dtype of the source, beside the source's own config and tokenizer files, byte for byte."""
    stored = {TORCH_DTYPE[tensor.dtype] for tensor in source.tensors.values() if tensor.dtype in TORCH_DTYPE}
    dtype = stored.pop() if len(stored) == 1 else torch.float32
    cast: dict[Any, torch.Tensor] = {}
    weights = {}
    for name, value in state.items():
        # Tied weights stay one tensor, so that they are written once.
        place = (value.data_ptr(), value.shape, value.stride())
        weights[name] = cast.setdefault(place, value.to(dtype) if value.is_floating_point() else value)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with quiet(), naming(out):
        module.save_pretrained(partial, state_dict=weights)
    for name in OTHER_FILES:
        (partial / name).unlink(missing_ok=True)
    named = {*TOKENIZER_FILES, *OTHER_FILES, *tokenizer.vocab_files_names.values()}
    for name in source.folder.sizes():
        if name in named or name.endswith(".py"):
            (partial / name).write_bytes(read_bytes(source.folder, name))
    for path in partial.glob("*.safetensors"):  # safetensors makes them readable for their owner alone
        path.chmod((partial / "config.json").stat().st_mode)
    shutil.rmtree(out, ignore_errors=True)
    os.rename(partial, out)
