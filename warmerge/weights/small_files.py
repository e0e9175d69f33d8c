"""What lies beside the weights, config and tokenizer: which files there are, what they say, where members differ."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from warmerge.errors import Finding, plain, some
from warmerge.weights.checkpoint import Checkpoint, parse_json
from warmerge.weights.folder import Folder, read_bytes

Config = Mapping[str, Any]
Effective = Callable[[Config], Config | None]
# Every file that a tokenizer of transformers reads, of its models for text, speech and pictures alike.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json",
    "spm.model", "sentencepiece.model", "spm_char.model", "source.spm", "target.spm", "tiktoken.model", "tekken.json",
    "bpe.codes", "dict.txt", "prophetnet.tokenizer", "byte_maps.json", "emoji.json", "normalizer.json",
    "entity_vocab.json", "word_shape.json", "word_pronunciation.json", "vocab-src.json", "vocab-tgt.json",
    "target_vocab.json",
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
_ABSENT = object()  # a field that is not there: what null means instead is the model's to say


def architecture(config: Config) -> str:
    """The class that a config names, or '' where it names none.

    >>> architecture({"architectures": ["LlamaForSequenceClassification"]}), architecture({})
    ('LlamaForSequenceClassification', '')
    """
    names = config.get("architectures") or [""]
    return str(names[0])


def num_labels(config: Config) -> int:
    """Number of outputs as transformers reads it from a config: 2 where nothing is said."""
    labels = config.get("id2label")
    return len(labels) if isinstance(labels, dict) else int(config.get("num_labels") or 2)


def tokenizer_folder(checkpoint: Checkpoint) -> Folder:
    """Where the tokenizer lies: beside the weights, or for an adapter that brought none beside its base's."""
    own = any(name in checkpoint.folder.sizes() for name in TOKENIZER_FILES)
    return checkpoint.folder if own or checkpoint.fallback is None else checkpoint.fallback


def tokenizer_digest(checkpoint: Checkpoint) -> str:
    """Eight hex digits, equal for equal tokenizer files; "none" where there are none."""
    folder = tokenizer_folder(checkpoint)
    digest, found = hashlib.sha256(), False
    for name in TOKENIZER_FILES:
        if name in folder.sizes():
            found = True
            digest.update(name.encode() + read_bytes(folder, name))
    for name, data in tokenizer_code(checkpoint).items():
        digest.update(name.encode() + data)
    return digest.hexdigest()[:8] if found else "none"


def tokenizer_code(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The Python files beside a tokenizer that brings its own code (`auto_map` in tokenizer_config.json)."""
    folder = tokenizer_folder(checkpoint)
    if not _tokenizer_settings(folder).get("auto_map"):
        return {}
    return {name: read_bytes(folder, name) for name in sorted(folder.sizes()) if name.endswith(".py")}


def strange_vocabularies(checkpoint: Checkpoint) -> list[Finding]:
    """What is wrong with a tokenizer_config.json that has transformers read another vocabulary than tokenizer.json."""
    folder = tokenizer_folder(checkpoint)
    named = _tokenizer_settings(folder).get("fast_tokenizer_files") or []
    if named == ["tokenizer.json"] or not named:
        return []
    what = (
        f"has transformers read {_short(named)} in the place of tokenizer.json (fast_tokenizer_files), each version "
        "another one; save the tokenizer with the version that you use, which writes one tokenizer.json for all"
    )
    return [Finding(f"{folder.label}/tokenizer_config.json", what)]


def _tokenizer_settings(folder: Folder) -> Config:
    if "tokenizer_config.json" not in folder.sizes():
        return {}
    settings = parse_json(read_bytes(folder, "tokenizer_config.json"))
    return settings if isinstance(settings, dict) else {}


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


def compare_configs(
    members: Sequence[Checkpoint], reference: Checkpoint, partial: bool, effective: Effective | None
) -> list[Finding]:
    """Fields in which a member's config.json says another model than the reference's. See `compat.check`."""
    findings = []
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
        pairs = {"model_type": _said(ours, theirs, "model_type")}
        if not partial:
            pairs |= {
                "architectures": _said(ours, theirs, "architectures"),
                "num_labels": (num_labels(ours), num_labels(theirs)),
                "pad_token_id": (pad_token_id(ours), pad_token_id(theirs)),
            }
            if ours.get("model_type") == theirs.get("model_type"):  # else every field differs
                pairs |= _differing_fields(ours, theirs, effective)
        for key, (found, expected) in pairs.items():
            if found != expected:
                what = f"has {plain(key)} {_short(found)}, expected {_short(expected)} as in {plain(reference.label)}"
                findings.append(Finding(f"{member.label}/config.json", what))
    return findings


def compare_code(members: Sequence[Checkpoint]) -> list[Finding]:
    """A model whose code comes with it computes what that code says: it must be the same code in all."""
    if not any((member.config or {}).get("auto_map") for member in members):
        return []
    findings, first = [], members[0]
    for member in members[1:]:
        if code_files(member) != code_files(first):
            findings.append(Finding(member.label, f"brings other model code (*.py) than {plain(first.label)}"))
    return findings


def _said(ours: Config, theirs: Config, key: str) -> tuple[Any, Any]:
    """A field of two configs in which null says nothing."""
    here, there = (_ABSENT if config.get(key) is None else config[key] for config in (ours, theirs))
    return here, there


def _differing_fields(ours: Config, theirs: Config, effective: Effective | None) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (ours, theirs) of every field that matters and differs, also once defaults are filled in."""
    differing = _differing_keys(ours, theirs)
    if differing and effective is not None:
        full_ours, full_theirs = effective(ours), effective(theirs)
        if full_ours is not None and full_theirs is not None:
            return _differing_keys(full_ours, full_theirs, filled=True)
    return differing


def _differing_keys(ours: Config, theirs: Config, prefix: str = "", filled: bool = False) -> dict[str, tuple[Any, Any]]:
    """`filled`: defaults stand in both, so what one lacks is no field of this model, and null for it says nothing."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(ours.keys() | theirs.keys()):
        if key in _CONFIG_IGNORED or "dropout" in key or key.endswith("_pdrop"):
            continue
        here, there = ours.get(key, _ABSENT), theirs.get(key, _ABSENT)
        if isinstance(here, dict) and isinstance(there, dict):
            found |= _differing_keys(here, there, f"{prefix}{key}.", filled)
        elif here != there and not (filled and all(value is None or value is _ABSENT for value in (here, there))):
            found[prefix + key] = (here, there)
    return found


def compare_tokenizers(members: Sequence[Checkpoint]) -> list[Finding]:
    """Tokenizer files and chat templates in which a member differs from the first."""
    findings = [finding for member in members for finding in strange_vocabularies(member)]
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
            if ours != theirs and (difference := _tokenizer_difference(file, ours, theirs)):
                findings.append(
                    Finding(f"{member.label}/{file}", f"differs from {plain(reference.label)}'s{difference}")
                )
        if _chat_template(member) != _chat_template(reference):
            findings.append(Finding(member.label, f"has another chat template than {plain(reference.label)}"))
        if tokenizer_code(member) != tokenizer_code(reference):
            findings.append(Finding(member.label, f"brings other tokenizer code (*.py) than {plain(reference.label)}"))
    return findings


def _tokenizer_difference(file: str, ours: bytes, theirs: bytes) -> str:
    """Where two files differ, as the end of a sentence; empty where only ignored fields do."""
    left, right = (parse_json(data) if file.endswith(".json") else None for data in (ours, theirs))
    if not isinstance(left, dict) or not isinstance(right, dict):
        return " in its text"
    ignored = _TOKENIZER_IGNORED.get(file, frozenset())
    keys = [key for key in left.keys() | right.keys() if key not in ignored and left.get(key) != right.get(key)]
    return f" in {some(keys)}" if keys else ""


def _chat_template(checkpoint: Checkpoint) -> Any:
    """The template that transformers would use: its own file, else the field of tokenizer_config.json."""
    folder = tokenizer_folder(checkpoint)
    if "chat_template.jinja" in folder.sizes():
        return read_bytes(folder, "chat_template.jinja").decode(errors="replace")
    return _tokenizer_settings(folder).get("chat_template")


def compare_reward_scales(members: Sequence[Checkpoint]) -> list[Finding]:
    """OpenRLHF keeps the reward's mean and std in the config: a member on another scale weighs more or less."""
    findings = []
    first, *others = members
    for member in others:
        other_mean, mean = _said(member.config or {}, first.config or {}, "mean")
        other_std, std = _said(member.config or {}, first.config or {}, "std")
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
    if value is _ABSENT:
        return "nothing"
    text = json.dumps(value, default=str, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."
