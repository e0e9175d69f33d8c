"""The merge itself: plan -> tiles -> sink. The sink is a folder on disk, or the parameters of a live model."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from warmerge.errors import Finding, Interrupted, RefusedError, UsageError, WarmergeError, plain
from warmerge.weights.checkpoint import LowRank
from warmerge.weights.folder import LocalFolder
from warmerge.weights.kernels import INTEGER_DTYPE
from warmerge.weights.output import (
    MANIFEST,
    Output,
    ShardFile,
    discard,
    mark_finished,
    open_output,
    publish,
    write_file,
)
from warmerge.weights.plan import MergePlan, Shard, TensorPlan
from warmerge.weights.rules import Coefficients
from warmerge.weights.stream import (
    Engine,
    coefficients_of,
    refuse_changed,
    refuse_changed_inputs,
    refuse_unequal_integers,
)


def choose_device(name: str) -> torch.device:
    """The device that tiles are computed on.

    "auto" is the CPU: a merge moves each byte once and adds, so the disk, then the memory, then the bus to the GPU
    are the limit. It will pick CUDA when a table in benchmarks/ shows where that is faster. It does not try out both
    here: where a GPU's last bit is another one (Gram matrices, LoRA), the result would then depend on a clock.

    Raises:
        UsageError: the name is not auto, cpu or cuda[:N], or there is no such GPU.
    """
    if name in ("auto", "cpu"):
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device: expected auto, cpu, cuda or cuda:N, found {name!r}") from None
    if device.type != "cuda":
        raise UsageError(f"--device: expected auto, cpu, cuda or cuda:N, found {name!r}")
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there is no such GPU here; {torch.cuda.device_count()} found")
    return device


def write_merge(
    plan: MergePlan,
    out: Path,
    engine: Engine,
    files: Mapping[str, bytes],
    manifest: dict[str, Any],
    *,
    fingerprint: str,
    overwrite: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Writes the merged checkpoint to `out` and returns its manifest, completed with coefficients and timings.

    Args:
        files: what to put beside the weights: config, tokenizer, model card.
        fingerprint: of inputs and plan (`plan_fingerprint`); a resumed merge must have the same one.

    Raises:
        RefusedError: a value that is not finite, integers that differ, an input that changed meanwhile.
        Interrupted: Ctrl-C; the finished shards are kept.
        WarmergeError: the disk is full or failed; the finished shards are kept.
    """
    refuse_unequal_integers(plan)
    extra = sum(map(len, files.values())) + 1_000_000
    output = open_output(out, plan, fingerprint, overwrite=overwrite, resume=resume, extra_bytes=extra)
    resumed = sorted(output.finished)
    try:
        seconds = _write_shards(plan, output, engine)
        manifest |= {
            "coefficients": _reported_coefficients(plan, output),
            "resumed_shards": resumed,
            "seconds": seconds,
        }
        for name, data in files.items():
            write_file(output, name, data)
        write_file(output, MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
        publish(output, plan)
    except RefusedError:
        discard(output)
        raise
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; {_kept(output, plan)}") from None
    except OSError as error:
        what = f"{plain(str(error.filename or out))}: {error.strerror or error}"
        raise WarmergeError(f"{what}; {_kept(output, plan)}") from error
    finally:
        os.close(output.lock)
    return manifest


def merge_into(plan: MergePlan, parameters: Mapping[str, torch.Tensor], engine: Engine) -> None:
    """Streams the merged tensors into live ones, e.g. `module.state_dict()`; nothing is written to the disk.

    Args:
        parameters: name -> tensor, in any floating dtype and on any device; filled in place. Tensors that share
            memory (tied weights) count as filled when one of them is.

    Raises:
        RefusedError: a tensor of the plan has no counterpart of its shape, or a parameter would keep its old value.
    """
    findings = []
    for tensor in plan.tensors:
        target = parameters.get(tensor.name)
        if target is None:
            findings.append(Finding("model", "is in the checkpoints but not in the model", tensor.name))
        elif tuple(target.shape) != tensor.shape:
            what = f"has shape {list(target.shape)} in the model, {list(tensor.shape)} in the checkpoints"
            findings.append(Finding("model", what, tensor.name))
        elif not (target.is_floating_point() if tensor.averaged else target.dtype == INTEGER_DTYPE[tensor.dtype]):
            what = f"is {target.dtype} in the model, {tensor.dtype} in the checkpoints"
            findings.append(Finding("model", what, tensor.name))
        elif not target.is_contiguous():
            findings.append(Finding("model", "is not contiguous in the model; call .contiguous() on it", tensor.name))
    filled = {parameters[t.name].data_ptr() for t in plan.tensors if t.name in parameters}
    for name, target in parameters.items():
        if target.numel() and target.data_ptr() not in filled:
            findings.append(Finding("model", "is in the model but not in the checkpoints", name))
    if findings:
        raise RefusedError(findings)
    refuse_unequal_integers(plan)

    def sink(tensor: TensorPlan, start: int, tile: torch.Tensor) -> None:
        values = tile if tensor.averaged else tile.view(parameters[tensor.name].dtype)
        parameters[tensor.name].view(-1)[start : start + values.numel()].copy_(values)

    for shard in plan.shards:
        engine.merge(shard.tensors, coefficients_of(plan, shard.tensors, engine), sink)
    refuse_changed(plan.inputs)
    engine.refuse_bad()


def plan_fingerprint(plan: MergePlan, contents: Sequence[str]) -> str:
    """A digest (hex) of everything that decides the output: input files as they are now, rule, dtypes, shards.

    Args:
        contents: a fingerprint of each input's weights, in order, the base's last.
    """
    digest = hashlib.sha256()
    for checkpoint in plan.inputs:
        for folder, file in checkpoint.weight_files:
            state = folder.states[file] if isinstance(folder, LocalFolder) else "remote"
            digest.update(f"{folder.identity}\0{file}\0{state}\0".encode(errors="surrogatepass"))
    digest.update(json.dumps([*contents, plan.rule.name, asdict(plan.options)]).encode())
    # The scale of an adapter's product stands in its config, not in a weight file.
    inputs = ((name, tensor) for checkpoint in plan.inputs for name, tensor in sorted(checkpoint.tensors.items()))
    scales = [(name, t.scale, t.factors_transposed) for name, t in inputs if isinstance(t, LowRank)]
    digest.update(json.dumps(scales).encode() if scales else b"")
    for shard in plan.shards:
        digest.update(shard.file.encode() + shard.header)
        digest.update("".join("+" if tensor.merged else "=" for tensor in shard.tensors).encode())
        for part in (part for tensor in shard.tensors if not tensor.merged for part in tensor.members[0].parts):
            digest.update(f"{part.folder.identity}\0{part.file}\0{part.offset}\0".encode(errors="surrogatepass"))
    return digest.hexdigest()


def _write_shards(plan: MergePlan, output: Output, engine: Engine) -> dict[str, float]:
    """One shard after the other; while one is being forced to the disk, the next is already computed.

    Returns the seconds of reading, computing and writing ("stream"), and of waiting for the disk after it ("sync").
    After the first value that is not finite no further shard is finished, but all tensors are still looked at: the
    user gets every finding at once.
    """

    def finish(file: ShardFile, shard: Shard, note: Any) -> None:
        file.finish()
        mark_finished(output, shard, note)

    begun = time.perf_counter()
    finishing: list[Future[None]] = []
    with ThreadPoolExecutor(1) as background:
        for shard in output.missing(plan.shards):
            coefficients = coefficients_of(plan, shard.tensors, engine)
            file = ShardFile(output, shard)
            try:
                engine.merge(shard.tensors, coefficients, file.write)
                refuse_changed_inputs(shard.tensors)
            except BaseException:
                file.abandon()
                raise
            note = _noted(coefficients) if plan.rule.needs_gram else None
            if engine.bad:
                file.abandon()
            else:
                finishing.append(background.submit(finish, file, shard, note))
        streamed = time.perf_counter()
        for future in finishing:
            future.result()
    engine.refuse_bad()
    return {"stream": round(streamed - begun, 3), "sync": round(time.perf_counter() - streamed, 3)}


def _noted(coefficients: Mapping[str, Coefficients]) -> dict[str, Any]:
    return {name: [*(c / chosen.divisor for c in chosen.members), chosen.base / chosen.divisor]
            for name, chosen in coefficients.items() if len(chosen.members) > 1}  # fmt: skip


def _reported_coefficients(plan: MergePlan, output: Output) -> dict[str, Any]:
    constant = plan.constant_coefficients()
    if constant is not None:
        return {
            "members": [c / constant.divisor for c in constant.members],
            "base": constant.base / constant.divisor,
        }
    table: dict[str, Any] = {}
    for shard in plan.shards:
        table |= output.finished[shard.file] or {}
    return {"per_tensor": {name: {"members": row[:-1], "base": row[-1]} for name, row in table.items()}}


def _kept(output: Output, plan: MergePlan) -> str:
    if not output.partial.exists():  # the last rename is done
        return f"{plain(str(output.out))} is complete, but may not outlive a power cut"
    return (
        f"{len(output.finished)} of {len(plan.shards)} shards are finished and kept; run the same command with "
        f"--resume to continue, or delete {output.partial}"
    )
