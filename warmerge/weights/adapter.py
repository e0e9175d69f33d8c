"""Base + LoRA adapter, read as if it were a full reward-model checkpoint. Headers and JSON only.

An adapter is understood completely or refused: a field or a tensor that is not known here may change what PEFT would
compute. https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import math
import os.path
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from warmerge.errors import Finding, RefusedError, plain, quoted, some
from warmerge.weights.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, LowRank, Stored, Tensor, read_json
from warmerge.weights.classifier_config import BETWEEN, reward_config
from warmerge.weights.folder import Folder, read_bytes
from warmerge.weights.heads import FINAL_WEIGHTS, is_head
from warmerge.weights.safetensors_format import AVERAGED, parse_header
from warmerge.weights.samples import read_sample
from warmerge.weights.small_files import architecture as architecture_of
from warmerge.weights.small_files import num_labels, pad_token_id

Settings = Mapping[str, Any]
# What `warmerge train --adapter` writes beside an adapter: the fingerprint of the model that it adapts.
BASE = "adapter_base.json"
# Fields that are used below, or that say only how the adapter was trained. Any other field that is set is refused.
_KNOWN_FIELDS = frozenset(
    {
        "peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "rank_pattern",
        "alpha_pattern", "fan_in_fan_out", "modules_to_save", "init_lora_weights", "task_type", "auto_mapping",
        "peft_version", "inference_mode", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
        "layers_pattern", "bias", "eva_config", "megatron_core", "qalora_group_size",
    }
)  # fmt: skip
# The other initialisations (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's weights before training.
_INITS_THAT_KEEP_THE_BASE = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"})
# A regular expression of a stranger may match for ever on a name that was made for it: where a group is repeated, where
# much is optional, on a long name. What people write has a choice or two, and a * or two.
_NAME, _PATTERN, _PATTERNS, _CHOICES, _REPEATS = 500, 500, 1000, 3, 2
_BLOCK = 1 << 20
_ENDLESS = re.compile(r"[)*+?}][*+?{]|\\\d")
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_(embedding_)?([AB])(?(2)|\.weight)")
_WRAPPERS = re.compile(r"\.modules_to_save(\.default)?(?=\.)|\.base_layer(?=\.)|^base_model\.model\.")
_LM_HEAD = re.compile(
    r"(lm_head|cls|predictions|sop_classifier|vocab_transform|vocab_layer_norm|vocab_projector|embed_out|lm_loss|"
    r"pred_layer|output_projection|generator_predictions|generator_lm_head|discriminator_predictions|"
    r"entity_predictions|lm_predictions|mask_predictions)\.|decoder\.(weight|bias)$"
)


@dataclass(frozen=True)
class _Factors:
    """The two factors of one module's LoRA: up @ down has the module's shape, or its transpose."""

    up: Stored
    down: Stored
    embedding: bool


def base_named_by(folder: Folder) -> str | None:
    """The base that an adapter names: `id`, `id@revision` or a local path; None where it names none.

    Raises:
        RefusedError: adapter_config.json is missing or damaged.
    """
    settings = _read_settings(folder)
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str) or not name:
        return None
    return f"{name}@{revision}" if revision and not os.path.isdir(name) else name


def refuse_other_base(folder: Folder, base: Checkpoint) -> None:
    """A path may lead to another model by now: where an adapter's folder says what its base was, it must be that.

    Raises:
        RefusedError: it is another one, or what the folder says of it is damaged.
    """
    said = read_json(folder, BASE)
    if said is None:
        return
    expected, found = said.get("fingerprint"), read_sample(base).fingerprint
    if expected != found:
        what = f"was trained on a base with the fingerprint {quoted(str(expected)[:64])} ({BASE}), but that of "
        what += f"{plain(base.label)} is {quoted(found)}; give the start that it was trained from with --base"
        raise RefusedError([Finding(folder.label, what)])


def read_adapter(folder: Folder, base: Checkpoint) -> Checkpoint:
    """The full model that a LoRA adapter and its base make, under the tensor names that transformers gives it.

    Args:
        folder: adapter_config.json, adapter_model.safetensors and, if it was saved there, the tokenizer.
        base: the model that the adapter adapts: a reward model, or a language model whose head the adapter brings.

    Returns:
        A checkpoint with the base's tensors, `LowRank` where the adapter adds to them, and a reward model's config.

    Raises:
        RefusedError: with every finding: files missing or damaged, an adapter that is not a plain sum of LoRA
            products, tensors not understood; and, once the adapter is understood, a base that it does not fit.
    """
    settings, factors, whole = _read_files(folder)
    findings = [] if base.config else [Finding(base.label, "has no config.json, which the adapter's full model needs")]
    config = base.config or {}
    architecture = architecture_of(config) or "unknown"
    is_classifier = architecture.endswith("ForSequenceClassification")
    gets_head = any(map(is_head, whole)) and not is_classifier and not any(map(is_head, base.tensors))
    prefix = _missing_prefix(factors, base)
    tensors = {name if _is_any_head(name) else prefix + name: tensor for name, tensor in base.tensors.items()}
    between = BETWEEN.get(str(config.get("model_type")), "")
    dropped = []
    if gets_head:
        known = {between, *(name.split(".")[0] for name in factors)}
        outside = [name for name in tensors if name.split(".")[0] not in known]
        dropped = [name for name in outside if _LM_HEAD.match(name)]
        if strange := set(outside) - set(dropped):
            what = f"has tensors outside the adapted backbone that are no known language-model head: {some(strange)}"
            findings.append(Finding(base.label, what))
        tensors = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    findings += _unsaved_modules(settings, whole, tensors, folder.label)
    for name, stored in whole.items():
        findings += _check_whole(name, stored, tensors.get(name), between, folder.label)
        tensors[name] = stored
    findings += _add_factors(factors, tensors, settings, folder.label)
    if gets_head:
        if between and not any(between in name.split(".") for name in tensors):
            what = (
                f"lacks {quoted(between)}, which the classifier needs and {architecture} has not: PEFT trained on a "
                "random one and did not save it. Give the classifier that training started from with --base"
            )
            findings.append(Finding(folder.label, what))
        config, wrong = reward_config(config, architecture, tensors, folder)
        findings += wrong
    elif is_classifier:
        for name in (
            name for name in FINAL_WEIGHTS if name in tensors and tensors[name].shape[0] != num_labels(config)
        ):
            what = f"has {tensors[name].shape[0]} rows, but the base's config.json says {num_labels(config)} labels"
            findings.append(Finding(folder.label, what, name))
    if findings:
        raise RefusedError(findings)
    details = {"adapter": folder.label, "base": base.label, "rank": settings["r"], "alpha": settings["lora_alpha"]}
    details |= {key: settings.get(key) for key in ("use_rslora", "rank_pattern", "alpha_pattern")}
    details |= {"prefix": prefix, "dropped": dropped, "pad_token_id": pad_token_id(config)}
    return Checkpoint(folder.label, folder, tensors, config, details)


def _is_any_head(name: str) -> bool:
    return is_head(name) or _LM_HEAD.match(name) is not None


def _read_settings(folder: Folder) -> Settings:
    settings = read_json(folder, ADAPTER_CONFIG)
    if settings is None:
        raise RefusedError([Finding(folder.label, f"holds an adapter's weights, but no {ADAPTER_CONFIG}; add it")])
    if not isinstance(settings, dict):
        raise RefusedError([Finding(f"{folder.label}/{ADAPTER_CONFIG}", "is not a JSON object; it is damaged")])
    return settings


def _read_files(folder: Folder) -> tuple[Settings, Mapping[str, _Factors], Mapping[str, Stored]]:
    """The adapter's settings, its factors by module, its whole tensors by their name in the full model."""
    settings: Settings = {}
    factors: Mapping[str, _Factors] = {}
    whole: Mapping[str, Stored] = {}
    findings: list[Finding] = []
    try:
        settings = _read_settings(folder)
        findings += _check_settings(settings, f"{folder.label}/{ADAPTER_CONFIG}")
    except RefusedError as error:
        findings += error.findings
    try:
        factors, whole, strange = _read_weights(folder)
        findings += strange
    except RefusedError as error:
        findings += error.findings
    if findings:
        raise RefusedError(findings)
    return settings, factors, whole


def _check_settings(settings: Settings, where: str) -> list[Finding]:
    """Every setting by which PEFT would compute something else than weight + scale * up @ down."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        return [Finding(where, f"has peft_type {quoted(str(kind))}; only LORA adapters can be merged")]
    wrong = [
        f"sets {quoted(key)}, which warmerge does not reproduce; merge the adapter into its base with PEFT first"
        for key, value in sorted(settings.items())
        if value and key not in _KNOWN_FIELDS
    ]
    init = str(settings.get("init_lora_weights", True))
    if init.lower() not in _INITS_THAT_KEEP_THE_BASE:
        wrong.append(
            f"has init_lora_weights {quoted(init)}, which changes the base's weights before training; save the adapter "
            "again with path_initial_model_for_weight_conversion, or merge it into its base with PEFT"
        )
    for key, field, kinds in (("r", "rank_pattern", (int,)), ("lora_alpha", "alpha_pattern", (int, float))):
        table = settings.get(field) or {}
        try:
            values = [settings.get(key), *table.values()]
            for pattern in table:
                re.compile(pattern)
        except (AttributeError, re.error, RecursionError, OverflowError):
            wrong.append(f"has a damaged {field}: it is a table of regular expressions")
            continue
        if slow := [pattern for pattern in table if _may_never_end(pattern)]:
            what = f"has {some(slow)} in {field}, regular expressions which may take for ever to match"
            wrong.append(f"{what}; write out the modules' names, or merge the adapter into its base with PEFT first")
        if len(table) > _PATTERNS:
            wrong.append(f"has {len(table)} patterns in {field}, expected {_PATTERNS} at most")
        if any(type(value) not in kinds or not math.isfinite(value) or (key == "r" and value < 1) for value in values):
            wrong.append(
                f"has {key} {quoted(str(settings.get(key)))} and {field} {str(table)[:100]!a}; these must be numbers"
            )
    return [Finding(where, what) for what in wrong]


def _may_never_end(pattern: str) -> bool:
    """Whether a regular expression might backtrack without end on a name of some hundred characters."""
    repeats, choices = len(re.findall(r"[*+{]", pattern)), len(re.findall(r"[*+{?(]", pattern))
    many = repeats > _REPEATS or choices > _CHOICES or len(pattern) > _PATTERN
    return many or _ENDLESS.search(pattern) is not None


def _read_weights(folder: Folder) -> tuple[dict[str, _Factors], dict[str, Stored], list[Finding]]:
    if ADAPTER_WEIGHTS not in folder.sizes():
        what = f"holds no {ADAPTER_WEIGHTS}"
        if "adapter_model.bin" in folder.sizes():
            what += (
                ", only adapter_model.bin, a pickle, which can run code when loaded; convert it once, where you trust "
                "it: PeftModel.from_pretrained(base_model, folder).save_pretrained(new)"
            )
        raise RefusedError([Finding(folder.label, what)])
    where, findings = f"{folder.label}/{ADAPTER_WEIGHTS}", []
    header = parse_header(partial(read_bytes, folder, ADAPTER_WEIGHTS), folder.sizes()[ADAPTER_WEIGHTS], where)
    halves: dict[str, dict[str, Stored]] = {}
    whole: dict[str, Stored] = {}
    for name, entry in header.items():
        stored = Stored(entry.dtype, entry.shape, folder, ADAPTER_WEIGHTS, entry.offset, entry.nbytes)
        if len(name) > _NAME:
            findings.append(Finding(where, f"has {len(name)} characters, expected {_NAME} at most", name[:40]))
        elif match := _FACTOR.fullmatch(name):
            halves.setdefault(match[1], {})[f"lora_{match[2] or ''}{match[3]}"] = stored
            if entry.dtype not in AVERAGED or len(entry.shape) != 2 or 0 in entry.shape:
                what = f"is {entry.dtype} {list(entry.shape)}; expected a floating-point matrix that is not empty"
                findings.append(Finding(where, what, name))
        elif not name.startswith("base_model.model.") or any(part.startswith("lora_") for part in name.split(".")):
            what = "is not understood; merge the adapter into its base with PEFT first"
            findings.append(Finding(where, what, name))
        elif ".original_module." not in name:  # PEFT's copy of what was there before training
            target = _WRAPPERS.sub("", name)
            if target in whole and not _same(whole[target], stored):
                findings.append(Finding(where, f"has other values than another copy of {quoted(target)}", name))
            whole[target] = stored
    factors = {}
    for module, found in halves.items():
        embedding = "lora_embedding_A" in found
        up, down = ("lora_embedding_B", "lora_embedding_A") if embedding else ("lora_B", "lora_A")
        if found.keys() == {up, down}:
            factors[module] = _Factors(found[up], found[down], embedding)
        else:
            what = f"has {some(found)}, expected both factors: 'lora_A' and 'lora_B', or those of an embedding"
            findings.append(Finding(where, what, module))
    if not halves:
        findings.append(Finding(where, "holds no lora_A and lora_B tensors"))
    return factors, whole, findings


def _same(one: Stored, other: Stored) -> bool:
    """Whether two tensors are equal to the byte; of large ones only a part is in memory."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for done in range(0, one.nbytes, _BLOCK):
        length = min(_BLOCK, one.nbytes - done)
        first, second = (read_bytes(part.folder, part.file, part.offset + done, length) for part in (one, other))
        if first != second:
            return False
    return True


def _missing_prefix(factors: Mapping[str, _Factors], base: Checkpoint) -> str:
    """The first component of the adapted modules' names when the base's names lack it (`model.`), else ''."""
    if any(f"{module}.weight" in base.tensors for module in factors):
        return ""
    split = (module.partition(".") for module in factors)
    return next((f"{first}." for first, _, rest in split if f"{rest}.weight" in base.tensors), "")


def _unsaved_modules(
    settings: Settings, whole: Mapping[str, Stored], tensors: Mapping[str, Tensor], label: str
) -> list[Finding]:
    """Modules that were trained whole must be in the file, or the base's untrained ones would be taken.

    PEFT takes every module whose name ends so: 'classifier' is DistilBERT's pre_classifier too.
    """
    findings = []
    modules = settings.get("modules_to_save") or []
    if not isinstance(modules, list):
        what = f"has modules_to_save {quoted(str(modules)[:60])}, expected a list of names; it is damaged"
        return [Finding(f"{label}/{ADAPTER_CONFIG}", what)]
    for module in modules:
        lacking = [name for name in tensors if f"{module}." in name and name not in whole]
        if lacking:
            what = f"trained {quoted(str(module))} (modules_to_save), but its file lacks {some(lacking)}; save it again"
            findings.append(Finding(label, what))
    return findings


def _check_whole(name: str, new: Stored, old: Tensor | None, between: str, label: str) -> list[Finding]:
    """A whole tensor of the adapter takes the place of the base's; a reward head may be new, or have other rows."""
    if old is None:
        if is_head(name) or between in name.split("."):
            return []
        return [Finding(label, "is in the adapter, but the base has no such tensor; is it the right base?", name)]
    if new.shape == old.shape or (is_head(name) and new.shape[1:] == old.shape[1:]):
        return []
    what = f"has shape {list(new.shape)} in the adapter, {list(old.shape)} in the base; give a base of the same shape"
    return [Finding(label, what, name)]


def _add_factors(
    factors: Mapping[str, _Factors], tensors: dict[str, Tensor], settings: Settings, label: str
) -> list[Finding]:
    """Puts a `LowRank` in the place of every adapted weight of `tensors`.

    Linear layers hold (out, in), embeddings and GPT-2's Conv1D the transpose. PEFT asks the module's class which it is;
    here the shape says it, and fan_in_fan_out for square weights, unless the shapes of others contradict it.
    """
    findings, squares, contradicted = [], [], False
    transposed_if_square = bool(settings.get("fan_in_fan_out"))
    for module, pair in factors.items():
        name = f"{module}.weight"
        weight, rank = tensors.get(name), _by_pattern(settings, "rank_pattern", "r", module)
        product = (pair.up.shape[0], pair.down.shape[1])
        square = product[0] == product[1] and not pair.embedding
        if weight is None:
            what = "is adapted, but the base has no such tensor; is it the right base?"
        elif isinstance(weight, LowRank):
            what = "is adapted in the base too; merge the base with its adapter first"
        elif weight.dtype not in AVERAGED:
            what = f"is {weight.dtype} in the base, to which nothing can be added; give the unquantised base"
        elif (pair.down.shape[0], pair.up.shape[1]) != (rank, rank):
            ranks = f"{pair.down.shape[0]} and {pair.up.shape[1]}"
            what = f"has LoRA factors of rank {ranks}, but {ADAPTER_CONFIG} gives it rank {rank}"
        elif weight.shape != product[::-1] and (weight.shape != product or pair.embedding):
            what = f"is {list(weight.shape)} in the base, but its LoRA is for {list(product)}; is it the right base?"
        else:
            transposed = transposed_if_square if square else weight.shape == product[::-1]
            squares += [name] if square else []
            contradicted |= not square and not pair.embedding and transposed != transposed_if_square
            alpha = _by_pattern(settings, "alpha_pattern", "lora_alpha", module)
            scale = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
            tensors[name] = LowRank(weight, pair.up, pair.down, scale, transposed)
            continue
        findings.append(Finding(label, what, name))
    if contradicted and squares:
        what = (
            f"has fan_in_fan_out {transposed_if_square}, which other weights' shapes contradict, so that it is unknown "
            f"whether the square ones are transposed: {some(squares)}"
        )
        findings.append(Finding(f"{label}/{ADAPTER_CONFIG}", what))
    return findings


def _by_pattern(settings: Settings, field: str, default: str, module: str) -> Any:
    """A module's rank or alpha as PEFT resolves it: by the first pattern that matches the end of its name."""
    table = settings.get(field) or {}
    return next((table[key] for key in table if re.match(rf"(.*\.)?({key})$", module)), settings[default])
