"""The config of a language model, made into that of the reward model that an adapter turned it into."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from warmerge.errors import Finding, quoted, some
from warmerge.weights.checkpoint import Tensor, read_json
from warmerge.weights.folder import Folder
from warmerge.weights.heads import FINAL_WEIGHTS, is_head
from warmerge.weights.small_files import pad_token_id

Config = Mapping[str, Any]
# What a classifier of the model type has between backbone and head. PEFT saves it only if it is in modules_to_save.
BETWEEN = {
    **dict.fromkeys(["albert", "bert", "ernie", "gte", "megatron-bert", "mobilebert", "nomic_bert"], "pooler"),
    **dict.fromkeys(["rembert", "roc_bert", "deberta", "deberta-v2"], "pooler"),
    "distilbert": "pre_classifier",
    "eurobert": "dense",
    "modernbert": "head",
    "modernbert-decoder": "head",
}
_LANGUAGE_MODEL = re.compile(r"([A-Z]\w*?)(ForCausalLM|LMHeadModel|ForMaskedLM|ForPreTraining|Model)")


def reward_config(
    config: Config, architecture: str, tensors: Mapping[str, Tensor], folder: Folder
) -> tuple[Config, list[Finding]]:
    """A language model's config made into that of its sequence classifier, with as many labels as the head has rows."""
    findings = []
    match = _LANGUAGE_MODEL.fullmatch(architecture)
    if not match or match[1].endswith(("With", "Base", "Heads", "Encoder", "Decoder", "Vision")):
        what = f"brings a reward head, which a base of architecture {quoted(architecture)} has no place for"
        findings.append(Finding(folder.label, what))
    final = [tensors[name].shape for name in FINAL_WEIGHTS if name in tensors]
    if len(final) != 1 or len(final[0]) != 2:
        what = f"has the head {some(filter(is_head, tensors))}; expected a matrix named {' or '.join(FINAL_WEIGHTS)}"
        findings.append(Finding(folder.label, what))
    if findings or not match:
        return config, findings
    # Gemma3ForCausalLM is of model type gemma3_text, whose classifier is Gemma3TextForSequenceClassification.
    text = "Text" if str(config.get("model_type")).endswith("_text") and not match[1].endswith("Text") else ""
    rows = range(final[0][0])
    pad = _tokenizer_pad_id(folder) if pad_token_id(config) is None else None
    changed = {
        "architectures": [f"{match[1]}{text}ForSequenceClassification"],
        "id2label": {str(row): f"LABEL_{row}" for row in rows},
        "label2id": {f"LABEL_{row}": row for row in rows},
        **({} if pad is None else {"pad_token_id": pad}),
    }
    return {key: value for key, value in config.items() if key != "num_labels"} | changed, []


def _tokenizer_pad_id(folder: Folder) -> int | None:
    """The padding token's id by the tokenizer's own files; None where they do not say it."""
    settings = read_json(folder, "tokenizer_config.json") or {}
    tokenizer = read_json(folder, "tokenizer.json") or {}
    try:
        token = settings.get("pad_token") or (read_json(folder, "special_tokens_map.json") or {}).get("pad_token")
        token = token["content"] if isinstance(token, dict) else token
        vocabulary = tokenizer.get("model", {}).get("vocab", {})
        if isinstance(vocabulary, list):  # Unigram: [token, log probability] in the order of ids
            vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
        ids = vocabulary | {added["content"]: added["id"] for added in tokenizer.get("added_tokens", [])}
        ids |= {added["content"]: int(number) for number, added in settings.get("added_tokens_decoder", {}).items()}
        return ids.get(token) if token else None
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        return None
