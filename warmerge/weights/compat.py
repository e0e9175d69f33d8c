"""Every check of whether checkpoints may be merged. All findings are collected; the caller raises once.

Refusals are things that make a merge wrong or unloadable. Warnings are things that make it doubtful.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from warmerge.errors import Finding, plain, quoted, some
from warmerge.weights.checkpoint import Checkpoint
from warmerge.weights.heads import FINAL_WEIGHTS, is_head
from warmerge.weights.plan import Selection
from warmerge.weights.safetensors_format import AVERAGED, COMPARED
from warmerge.weights.small_files import (
    Effective,
    architecture,
    compare_code,
    compare_configs,
    compare_reward_scales,
    compare_tokenizers,
    num_labels,
)


def check(
    members: Sequence[Checkpoint],
    *,
    base: Checkpoint | None = None,
    selection: Selection | None = None,
    dtype: str = "auto",
    any_model: bool = False,
    allow_duplicates: bool = False,
    tokenizer_from: int | None = None,
    effective_config: Effective | None = None,
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
    if not allow_duplicates:
        refusals += _duplicates(members)
    for checkpoint in (*members, *([] if base is None else [base])):
        refusals += _quantised(checkpoint)
    refusals += _tensors(members, chosen, dtype)
    reference = members[chosen.rest_from or 0]
    if not any_model:
        refusals += _heads([reference] if chosen.partial else members)
    refusals += compare_configs(members, reference, chosen.partial, effective_config)
    refusals += compare_code(members)
    differences = [] if chosen.partial else compare_tokenizers(members)
    if tokenizer_from is None:
        hint = "; choose one with --tokenizer-from N if that is what you want"
        refusals += [Finding(found.where, found.what + hint) for found in differences]
    else:
        warnings += differences
    warnings += compare_reward_scales(members)
    return refusals, warnings


def head_shape(checkpoint: Checkpoint) -> str:
    """The reward head in a few words, for a table: name and shape, or 'none'."""
    heads = [name for name in checkpoint.tensors if is_head(name)]
    weights = [name for name in heads if name.endswith("weight")] or heads
    if not weights:
        return "none"
    name = weights[-1]
    return f"{plain(name)} {list(checkpoint.tensors[name].shape)}"


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
        findings += _named(member, missing, f"missing here, present in {other}; nothing is filled in from another")
        findings += _named(member, extra, f"extra, not present in {other}")
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
        named = architecture(member.config)
        if heads and named.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")):
            what = f"has a head ({some(heads)}) but its config says {quoted(named)}, which would drop it"
            findings.append(Finding(member.label, what))
        labels = num_labels(member.config)
        for name in heads:
            shape = member.tensors[name].shape
            final = name.endswith(FINAL_WEIGHTS)
            if final and "ForSequenceClassification" in named and len(shape) == 2 and shape[0] != labels:
                what = f"has {shape[0]} rows, but config.json says {labels} labels"
                findings.append(Finding(member.label, what, name))
    return findings
