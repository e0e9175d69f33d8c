"""`warmerge average`: check, plan, stream, write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from warmerge.errors import Finding, RefusedError, some
from warmerge.pipeline.prepare import Prepared, Spec, prepare
from warmerge.report.card import CardFacts, model_card
from warmerge.version import versions
from warmerge.weights import small_files
from warmerge.weights.average import choose_device, merge_into, plan_fingerprint, write_merge
from warmerge.weights.checkpoint import Checkpoint
from warmerge.weights.folder import read_bytes
from warmerge.weights.output import check_out
from warmerge.weights.plan import DTYPE_NAMES, MergePlan, choose_threads
from warmerge.weights.remote.reading import revision_of
from warmerge.weights.safetensors_format import AVERAGED
from warmerge.weights.stream import Engine

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Merged:
    """A finished merge: where it is, its manifest (also in warmerge.json), and the reasons for doubt."""

    out: Path
    manifest: Mapping[str, Any]
    warnings: tuple[Finding, ...]


def average(
    checkpoints: Sequence[Spec],
    out: Spec,
    *,
    threads: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    command: Sequence[str] = (),
    selection: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    on_plan: Callable[[Prepared], None] | None = None,
    **choices: Any,
) -> Merged:
    """Merges checkpoints into the folder `out`, and returns where it is and how it was made.

    Args:
        checkpoints: two or more: folders, .safetensors files, Hub ids (`org/name@revision`), LoRA adapter folders.
        out: a new folder. It appears all at once, when everything in it is on the disk.
        rule: uniform (default), weighted, lambda, slerp, liti or stock: `warmerge rules` lists them.
        weights: for weighted, one number for each checkpoint, with sum 1 (or any sum with `normalize`).
        lam: for lambda and slerp: 0 is the first checkpoint, 1 the second.
        eta: for liti: 0 is the base, 1 the average.
        base: what the members started from; for LoRA adapters, the model that they adapt.
        only, exclude: globs of tensor names to merge or not; the rest is copied from checkpoint number `rest_from`.
        dtype: auto (each tensor's own), float32, bfloat16 or float16.
        max_shard_size: largest shard, such as "5GB".
        any_model: also merge models without a reward head.
        allow_duplicates: also count one checkpoint twice.
        tokenizer_from: number (from 1) of the checkpoint whose tokenizer to take although they differ.
        stream: read checkpoints on the Hub by ranged requests, instead of downloading them into its cache first.
        threads, device: how to compute; results do not depend on them (CUDA: within one rounding). The device is auto
            (the CPU, also where there is a GPU), cpu, cuda or cuda:N.
        overwrite: replace `out` if an earlier merge wrote it.
        resume: continue an interrupted merge into `out`.
        command, selection: for the record in warmerge.json: what was typed, and how members were selected.
        progress: called with the number of input bytes of each finished tile, from any thread.
        on_plan: called once before the first weight is read, with what will be done.

    Raises:
        UsageError, RefusedError, RemoteError, Interrupted, WarmergeError: see warmerge.errors.

    Example:
        >>> import warmerge
        >>> warmerge.average(["runs/1", "runs/2"], "warm").manifest["rule"]["name"]  # doctest: +SKIP
        'uniform'
    """
    target = Path(out)
    inputs = [Path(spec) for spec in (*checkpoints, *([] if choices.get("base") is None else [choices["base"]]))]
    existing = [path.parent if path.is_file() else path for path in inputs if path.exists()]
    check_out(target, existing, overwrite)
    torch_device = choose_device(device)
    prepared = prepare(checkpoints, **choices)
    if on_plan is not None:
        on_plan(prepared)
    engine = _engine(threads, torch_device, progress)
    manifest = _manifest(prepared, command) | ({} if selection is None else {"selection": dict(selection)})
    manifest = write_merge(
        prepared.plan,
        target,
        engine,
        _small_files(prepared, manifest),
        manifest,
        fingerprint=plan_fingerprint(prepared.plan, prepared.fingerprints),
        overwrite=overwrite,
        resume=resume,
    )
    return Merged(target, manifest, prepared.warnings)


def average_into(
    module: nn.Module,
    checkpoints: Sequence[Spec],
    *,
    threads: int | None = None,
    device: str = "auto",
    **choices: Any,
) -> tuple[Finding, ...]:
    """Streams the merge of checkpoints into a live module's parameters and buffers; writes no file.

    Args:
        module: with the checkpoints' tensor names and shapes, in any floating dtype, on any device.
        checkpoints, choices: as for `average`.

    Returns:
        The reasons for doubt, as `average` would warn of them.

    Raises:
        RefusedError: the checkpoints must not be merged, or they and the module have different tensors.
    """
    prepared = prepare(checkpoints, **choices)
    merge_into(prepared.plan, module.state_dict(), _engine(threads, choose_device(device), None))
    return prepared.warnings


def _engine(threads: int | None, device: torch.device, progress: Callable[[int], None] | None) -> Engine:
    return Engine(choose_threads(threads), device, progress=progress or (lambda nbytes: None))


def _manifest(prepared: Prepared, command: Sequence[str]) -> dict[str, Any]:
    plan, rule = prepared.plan, prepared.plan.rule
    roles = [*(("member", member) for member in plan.members), *([] if plan.base is None else [("base", plan.base)])]
    inputs = [
        {
            "role": role,
            "checkpoint": checkpoint.label,
            **revision_of(checkpoint.folder),
            **checkpoint.details,
            "fingerprint": fingerprint,
            "bytes": checkpoint.nbytes,
        }
        for (role, checkpoint), fingerprint in zip(roles, prepared.fingerprints, strict=True)
    ]
    return {
        "command": list(command),
        "warmerge": versions()["warmerge"],
        "versions": versions(),
        "rule": {"name": rule.name, "formula": rule.formula, "source": rule.source, **plan.options.given()},
        "inputs": inputs,
        "copied_tensors": [tensor.name for tensor in plan.tensors if not tensor.merged],
        "dtype": _main_dtype(plan),
        "parameters": sum(tensor.numel for tensor in plan.tensors),
        "bytes": plan.output_bytes,
        "warnings": [str(warning) for warning in prepared.warnings],
    }


def _small_files(prepared: Prepared, manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """Config, tokenizer, code and model card of the output: copied to the byte where they need not change.

    Raises:
        RefusedError: the tokenizer cannot be copied, or its code and the model's are two files of one name.
    """
    source = prepared.source
    if strange := small_files.strange_vocabularies(prepared.tokenizer):
        raise RefusedError(strange)
    found = {name: small_files.small_file(source, name) for name in small_files.OTHER_FILES if name != "config.json"}
    files = {name: data for name, data in found.items() if data is not None}
    if source.config is not None:
        files["config.json"] = _config_json(source, str(manifest["dtype"]))
        if source.config.get("auto_map"):
            files |= small_files.code_files(source)
    tokenizer = small_files.tokenizer_folder(prepared.tokenizer)
    files |= {name: read_bytes(tokenizer, name) for name in small_files.TOKENIZER_FILES if name in tokenizer.sizes()}
    code = small_files.tokenizer_code(prepared.tokenizer)
    if clash := [name for name in code if name in files and files[name] != code[name]]:
        what = f"brings tokenizer code that is named as other model code: {some(clash)}; make both one file"
        raise RefusedError([Finding(prepared.tokenizer.label, what)])
    files |= code
    facts = CardFacts(architecture=small_files.architecture(source.config or {}))
    return files | {"README.md": model_card(manifest, facts).encode()}


def _main_dtype(plan: MergePlan) -> str | None:
    """The dtype of most of the output's floating values, as transformers names it."""
    counts: dict[str, int] = {}
    for tensor in plan.tensors:
        if tensor.dtype in AVERAGED:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel
    return DTYPE_NAMES[max(counts, key=lambda dtype: counts[dtype])] if counts else None


def _config_json(source: Checkpoint, dtype: str) -> bytes:
    """The source's config.json to the byte, unless its dtype would contradict the weights."""
    assert source.config is not None
    config = json.loads(json.dumps(source.config))

    def state(part: dict[str, Any]) -> None:
        for key in ("dtype", "torch_dtype"):
            if key in part and part[key] in DTYPE_NAMES.values():
                part[key] = dtype
        for value in part.values():
            if isinstance(value, dict):
                state(value)

    state(config)
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = dtype
    if "config.json" in source.folder.sizes():
        original = read_bytes(source.folder, "config.json")
        if json.loads(original) == config:
            return original
    return (json.dumps(config, indent=2) + "\n").encode()
