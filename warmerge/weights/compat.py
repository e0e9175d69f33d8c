"""Every check of whether checkpoints may be merged. All findings are collected; the caller raises once.

Refusals are things that make a merge wrong or unloadable. Warnings are things that make it doubtful.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from warmerge.errors import Finding, plain, quoted, some
from warmerge.weights.checkpoint import Checkpoint
from warmerge.weights.folder import Folder, read_bytes
from warmerge.weights.plan import Selection
from warmerge.weights.safetensors_format import AVERAGED, COMPARED

Config = Mapping[str, Any]
# One component of a tensor's name tells a reward head, whatever the architecture around it.
HEAD_NAMES = frozenset(
    {
        "score", "classifier", "classification_head", "value_head", "v_head", "reward_head", "rm_head",
        "regression_layer", "reward_model_head", "logits_proj",
    }
)  # fmt: skip
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
OTHER_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
# Fields that do not change what a loaded model computes: where it came from, how it was trained, how it runs.
_CONFIG_IGNORED = frozenset(
    {
        "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "_attn_implementation",
        "_attn_implementation_autoset", "attn_implementation", "id2label", "label2id", "num_labels", "architectures",
        "pad_token_id", "mean", "std", "return_dict", "output_attentions", "output_hidden_states", "unsloth_version",
        "initializer_range", "gradient_checkpointing",
    }
)  # fmt: skip
# What a tokenizer's files carry of its last use (cutting and padding are set anew by every caller), or of its author.
_TOKENIZER_IGNORED = {
    "tokenizer.json": frozenset({"truncation", "padding"}),
    "tokenizer_config.json": frozenset({"name_or_path", "_name_or_path", "chat_template", "transformers_version"}),
}


def is_head(name: str) -> bool:
    """Whether a tensor belongs to a reward head.

    >>> is_head("score.weight"), is_head("model.layers.0.mlp.gate.e_score_correction_bias")
    (True, False)
    """
    return not HEAD_NAMES.isdisjoint(name.split("."))


def check(
    members: Sequence[Checkpoint],
    *,
    base: Checkpoint | None = None,
    selection: Selection | None = None,
    dtype: str = "auto",
    any_model: bool = False,
    allow_duplicates: bool = False,
    tokenizer_from: int | None = None,
    effective_config: Callable[[Config], Config] | None = None,
) -> tuple[list[Finding], list[Finding]]:
    """Reasons to refuse the merge, and reasons for doubt, from headers and small files alone.

    Args:
        members: at least one; the first is the one that the others are compared with.
        selection: restricts the comparison of tensors to those that will be merged.
        tokenizer_from: the member whose tokenizer is to be taken although they differ.
        effective_config: config.json -> all fields with the defaults of its model type, for members whose files
            were written by different versions of transformers. Called only when the files differ.
    """
    chosen = selection or Selection()
    refusals: list[Finding] = []
    warnings: list[Finding] = []
    if len(members) < 2:
        refusals.append(Finding(members[0].label, "is the only checkpoint; a merge takes two or more"))
    if not allow_duplicates:
        refusals += _duplicates(members)
    for checkpoint in (*members, *([] if base is None else [base])):
        refusals += _quantised(checkpoint)
    refusals += _tensors(members, chosen, dtype)
    source = members[chosen.rest_from or 0]
    if not any_model:
        refusals += _heads([source] if chosen.partial else members)
    refusals += _configs(members, chosen, effective_config)
    refusals += _code(members)
    differences = [] if chosen.partial else _tokenizers(members)
    if tokenizer_from is None:
        hint = "; choose one with --tokenizer-from N if that is what you want"
        refusals += [Finding(found.where, found.what + hint) for found in differences]
    else:
        warnings += differences
    warnings += _reward_scales(members)
    return refusals, warnings


def head_shape(checkpoint: Checkpoint) -> str:
    """The reward head in a few words, for a table: name and shape, or 'none'."""
    heads = [name for name in checkpoint.tensors if is_head(name)]
    weights = [name for name in heads if name.endswith("weight")] or heads
    if not weights:
        return "none"
    name = weights[-1]
    return f"{plain(name)} {list(checkpoint.tensors[name].shape)}"


def num_labels(config: Config) -> int:
    """Number of outputs as transformers reads it from a config: 2 where nothing is said."""
    labels = config.get("id2label")
    return len(labels) if isinstance(labels, dict) else int(config.get("num_labels") or 2)


def tokenizer_folder(checkpoint: Checkpoint) -> Folder:
    """Where the tokenizer lies: beside the weights, or for an adapter that brought none beside its base's."""
    own = any(name in checkpoint.folder.sizes() for name in TOKENIZER_FILES)
    return checkpoint.folder if own or checkpoint.fallback is None else checkpoint.fallback


def small_file(checkpoint: Checkpoint, name: str) -> bytes | None:
    """A file beside the weights, or for an adapter one beside its base's; None where there is none."""
    for folder in (checkpoint.folder, checkpoint.fallback):
        if folder is not None and name in folder.sizes():
            return read_bytes(folder, name)
    return None


def code_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The Python files of a model that brings its own code (`auto_map` in its config)."""
    folder = checkpoint.fallback or checkpoint.folder
    return {name: read_bytes(folder, name) for name in folder.sizes() if name.endswith(".py")}


def pad_token_id(config: Config) -> Any:
    """The padding id: the model's own, or that of its text part."""
    text = config.get("text_config")
    inner = text.get("pad_token_id") if isinstance(text, dict) else None
    return config.get("pad_token_id", inner)


def _duplicates(members: Sequence[Checkpoint]) -> list[Finding]:
    findings: list[Finding] = []
    seen: dict[frozenset[tuple[str, str]], str] = {}
    for member in members:
        if member.identity in seen:
            what = f"is the same checkpoint as {plain(seen[member.identity])}; --allow-duplicates counts it twice"
            findings.append(Finding(member.label, what))
        seen.setdefault(member.identity, member.label)
    return findings


def _quantised(checkpoint: Checkpoint) -> list[Finding]:
    findings = []
    config = checkpoint.config or {}
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            method = config[key].get("quant_method", "unknown") if isinstance(config[key], dict) else "unknown"
            what = (
                f"is quantised ({key}, method {quoted(str(method))}); merge the unquantised checkpoints, then quantise"
            )
            findings.append(Finding(checkpoint.label, what))
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype not in AVERAGED | COMPARED:
            what = f"is {tensor.dtype}, which cannot be averaged; merge the bfloat16 or float32 checkpoints"
            findings.append(Finding(checkpoint.label, what, name))
    return findings


def _tensors(members: Sequence[Checkpoint], chosen: Selection, dtype: str) -> list[Finding]:
    """Names, shapes and dtypes, member by member against the first (or the one that the rest comes from)."""
    findings = []
    reference = members[chosen.rest_from or 0]
    other = plain(reference.label)
    expected = {name: tensor for name, tensor in reference.tensors.items() if chosen.merges(name)}
    for member in members:
        if member is reference:
            continue
        missing = sorted(expected.keys() - member.tensors.keys())
        extra = [] if chosen.partial else sorted(member.tensors.keys() - expected.keys())
        findings += _named(member, missing, f"missing; {other} has it. Nothing is filled in from another member")
        findings += _named(member, extra, f"extra; {other} does not have it")
        mixed: dict[tuple[str, str], list[str]] = {}
        for name in sorted(expected.keys() & member.tensors.keys()):
            ours, theirs = member.tensors[name], expected[name]
            if ours.shape != theirs.shape:
                what = f"has shape {list(ours.shape)}, expected {list(theirs.shape)} as in {other}"
                findings.append(Finding(member.label, what, name))
            elif ours.dtype != theirs.dtype and not (dtype != "auto" and {ours.dtype, theirs.dtype} <= AVERAGED):
                mixed.setdefault((ours.dtype, theirs.dtype), []).append(name)
        for (ours_dtype, theirs_dtype), names in mixed.items():
            what = f"{ours_dtype}, but {theirs_dtype} in {other}"
            if {ours_dtype, theirs_dtype} <= AVERAGED:
                what += "; say which the result should have: --dtype float32, bfloat16 or float16"
            findings += _named(member, names, what)
    return findings


def _named(member: Checkpoint, names: Sequence[str], what: str) -> list[Finding]:
    """A finding for each tensor; one for all of them where they are many, with the first few named."""
    if len(names) <= 5:
        return [Finding(member.label, f"is {what}", name) for name in names]
    return [Finding(member.label, f"{len(names)} tensors ({some(names)}) are {what}")]


def _heads(members: Iterable[Checkpoint]) -> list[Finding]:
    findings = []
    for member in members:
        heads = [name for name in member.tensors if is_head(name)]
        if not heads:
            what = (
                "has no reward head (no tensor named like score.weight, classifier.*, v_head.*); loading it would draw "
                "a random one. --any-model merges models that are not reward models"
            )
            findings.append(Finding(member.label, what))
        if member.config is None:
            continue
        architectures = member.config.get("architectures") or ["unknown"]
        if heads and str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")):
            what = (
                f"has a head ({some(heads)}) but its config says {quoted(str(architectures[0]))}, which would drop it"
            )
            findings.append(Finding(member.label, what))
        labels = num_labels(member.config)
        for name in heads:
            shape = member.tensors[name].shape
            final = name.endswith(("score.weight", "classifier.weight", "classifier.out_proj.weight"))
            if (
                final
                and "ForSequenceClassification" in str(architectures[0])
                and len(shape) == 2
                and shape[0] != labels
            ):
                what = f"has {shape[0]} rows, but config.json says {labels} labels"
                findings.append(Finding(member.label, what, name))
    return findings


def _configs(
    members: Sequence[Checkpoint], chosen: Selection, effective: Callable[[Config], Config] | None
) -> list[Finding]:
    findings = []
    reference = members[chosen.rest_from or 0]
    for member in members:
        if member is reference:
            continue
        if (member.config is None) != (reference.config is None):
            lacking = member if member.config is None else reference
            findings.append(Finding(lacking.label, "has no config.json, others have one; add it"))
            continue
        if member.config is None or reference.config is None:
            continue
        ours, theirs = member.config, reference.config
        if not chosen.partial:
            findings += _differences(
                member, reference, "architectures", ours.get("architectures"), theirs.get("architectures")
            )
            findings += _differences(member, reference, "num_labels", num_labels(ours), num_labels(theirs))
            findings += _differences(member, reference, "pad_token_id", pad_token_id(ours), pad_token_id(theirs))
        if chosen.partial:
            findings += _differences(member, reference, "model_type", ours.get("model_type"), theirs.get("model_type"))
            continue
        keys = _differing_keys(ours, theirs)
        if keys and effective is not None:
            ours, theirs = effective(ours), effective(theirs)
            keys = _differing_keys(ours, theirs)
        for key in keys:
            findings += _differences(member, reference, key, ours.get(key), theirs.get(key))
    return findings


def _code(members: Sequence[Checkpoint]) -> list[Finding]:
    """A model whose code comes with it computes what that code says: it must be the same code in all."""
    if not any((member.config or {}).get("auto_map") for member in members):
        return []
    findings, first = [], members[0]

    for member in members[1:]:
        if code_files(member) != code_files(first):
            findings.append(Finding(member.label, f"brings other model code (*.py) than {plain(first.label)}"))
    return findings


def _differing_keys(ours: Config, theirs: Config) -> list[str]:
    def matters(key: str) -> bool:
        return key not in _CONFIG_IGNORED and "dropout" not in key and not key.endswith("_pdrop")

    return [key for key in sorted(ours.keys() | theirs.keys()) if matters(key) and ours.get(key) != theirs.get(key)]


def _differences(member: Checkpoint, reference: Checkpoint, key: str, ours: Any, theirs: Any) -> list[Finding]:
    if ours == theirs:
        return []
    what = f"has {key} {_short(ours)}, expected {_short(theirs)} as in {plain(reference.label)}"
    return [Finding(f"{member.label}/config.json", what)]


def _tokenizers(members: Sequence[Checkpoint]) -> list[Finding]:
    findings = []
    reference = members[0]
    for member in members[1:]:
        for file in TOKENIZER_FILES:
            here, there = (file in tokenizer_folder(checkpoint).sizes() for checkpoint in (member, reference))
            if file == "chat_template.jinja" or not (here or there):
                continue
            if here != there:
                has, lacks = (member, reference) if here else (reference, member)
                findings.append(Finding(lacks.label, f"has no {file}, {plain(has.label)} has one"))
                continue
            ours, theirs = (read_bytes(tokenizer_folder(checkpoint), file) for checkpoint in (member, reference))
            if ours != theirs and (keys := _differing_fields(file, ours, theirs)):
                findings.append(
                    Finding(f"{member.label}/{file}", f"differs from {plain(reference.label)}'s in {some(keys)}")
                )
        if _chat_template(member) != _chat_template(reference):
            findings.append(Finding(member.label, f"has another chat template than {plain(reference.label)}"))
    return findings


def _differing_fields(file: str, ours: bytes, theirs: bytes) -> list[str]:
    if not file.endswith(".json"):
        return ["its text"]
    try:
        left, right = json.loads(ours), json.loads(theirs)
    except ValueError:
        return ["its text"]
    if not isinstance(left, dict) or not isinstance(right, dict):
        return [] if left == right else ["its values"]
    ignored = _TOKENIZER_IGNORED.get(file, frozenset())
    return [key for key in left.keys() | right.keys() if key not in ignored and left.get(key) != right.get(key)]


def _chat_template(checkpoint: Checkpoint) -> Any:
    """The template that transformers would use: its own file, else the field of tokenizer_config.json."""
    folder = tokenizer_folder(checkpoint)
    if "chat_template.jinja" in folder.sizes():
        return read_bytes(folder, "chat_template.jinja").decode(errors="replace")
    if "tokenizer_config.json" not in folder.sizes():
        return None
    try:
        return json.loads(read_bytes(folder, "tokenizer_config.json")).get("chat_template")
    except (ValueError, AttributeError):
        return None


def _reward_scales(members: Sequence[Checkpoint]) -> list[Finding]:
    """OpenRLHF keeps the reward's mean and std in the config: a member on another scale weighs more or less."""
    findings = []
    scales = [(member, (member.config or {}).get("mean"), (member.config or {}).get("std")) for member in members]
    first, mean, std = scales[0]
    for member, other_mean, other_std in scales[1:]:
        if not (_close(mean, other_mean) and _close(std, other_std)):
            what = (
                f"has reward mean {_short(other_mean)} and std {_short(other_std)}, {plain(first.label)} has "
                f"{_short(mean)} and {_short(std)}; the output keeps the latter: measure the merged model's own"
            )
            findings.append(Finding(f"{member.label}/config.json", what))
    return findings


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."
