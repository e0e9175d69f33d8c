"""What sharded training (FSDP, DeepSpeed) leaves that is no model yet, and how a model is made of it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath

from warmerge.errors import Finding, RefusedError, plain, quoted, some
from warmerge.weights.folder import Folder, LocalFolder

_DISTRIBUTED = re.compile(r"__\d+_\d+\.distcp$")
_ZERO = re.compile(r"(.*zero_pp_rank_\d+_mp_rank_\d+.*|mp_rank_\d+_model)_states\.pt$")
_ONE_RANK = re.compile(r"pytorch_model_fsdp(_\d+)?_rank\d+\.bin$")
_WHOLE_STATE = re.compile(r"pytorch_model_fsdp(_\d+)?\.bin$")
_OPTIMIZER = "optimizer"
_VERL = re.compile(r"model_world_size_\d+_rank_\d+\.pt$")
_ONE_RANK_OF_TORCH = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors$")
# What FSDP, torch.compile, activation checkpointing and Lightning put into the names of weights.
_WRAPPERS = (
    "_fsdp_wrapped_module", "_flat_param", "_fpw_module", "_orig_mod", "_checkpoint_wrapped_module", "_forward_module",
)  # fmt: skip
_THEN = "copy the start's config.json and tokenizer files into OUT, and give that. These files can run code when read"


def how_to_gather(folder: Folder) -> str | None:
    """What a folder without a model holds of a sharded training, and how a model is made of it. None for others."""
    names, label = sorted(folder.sizes()), PurePath(folder.label)
    if any(map(_DISTRIBUTED.match, names)):
        return _of_distributed(label)
    if any(map(_ZERO.match, names)):
        return _of_zero(label.parent)
    if {"zero_to_fp32.py", "latest"} <= set(names) and not any(name.endswith(".bin") for name in names):
        return _of_zero(label)
    if parts := list(filter(_ONE_RANK.match, names)):
        what = f"holds what each rank of an FSDP training kept for itself ({some(parts)}); only that training reads it"
        return f"{what}: load it there, and save it with FSDP_STATE_DICT_TYPE=SHARDED_STATE_DICT"
    if any(map(_VERL.match, names)):
        command = f"python -m verl.model_merger merge --backend fsdp --local_dir {shlex.quote(plain(str(label)))}"
        what = "holds weights in the pieces of verl's ranks, not a model; make one"
        return f"{what}: {command} --target_dir OUT; then give OUT. These files can run code when read"
    if states := list(filter(_WHOLE_STATE.match, names)):
        call = f"save_file(torch.load({plain(str(label / states[0]))!r}, weights_only=True), 'OUT/model.safetensors')"
        what = f"holds the weights of an FSDP training as a pickle ({quoted(states[0])}), not as a model; make one"
        return f"{what}: safetensors.torch.{call}; {_THEN}"
    if isinstance(folder, LocalFolder):
        inner = sorted(path.name for path in folder.path.iterdir() if path.is_dir() and _holds_shards(path))
        weights = [name for name in inner if not name.startswith(_OPTIMIZER)]
        return _of_distributed(label / weights[0]) if weights else None
    return None


def refuse_parts_of_ranks(label: str, files: Iterable[str]) -> None:
    """Each file of torch's HuggingFaceStorageWriter(save_distributed=True) looks like a model: it holds one rank's part
    of every tensor, under the tensor's own name.

    Raises:
        RefusedError: some of these files are such parts.
    """
    if parts := list(filter(_ONE_RANK_OF_TORCH.match, files)):
        what = f"holds what single ranks of a training saved, parts of tensors ({some(parts)}), not a model; save it"
        advice = "with enable_consolidation=True of HuggingFaceStorageWriter, and give the folder around this one"
        raise RefusedError([Finding(label, f"{what} {advice}")])


def leftovers(label: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Finding]:
    """What the shapes of a model's floating-point tensors show of a sharded training in whose middle it was saved: it
    would load, with other weights."""
    findings = []
    wrapped = [name for name in shapes if any(wrapper in name.split(".") for wrapper in _WRAPPERS)]
    if shapes and all(name.startswith("module.") for name in shapes):
        wrapped = list(shapes)
    if wrapped:
        what = f"has {len(wrapped)} tensors named as a training's wrapper names them ({some(wrapped)}); transformers"
        advice = "accelerator.unwrap_model(model).save_pretrained(folder, state_dict=accelerator.get_state_dict(model))"
        what += f" would not find them and draw others at random; save the model itself: {advice}"
        findings.append(Finding(label, what))
    empty = [name for name, shape in shapes.items() if shape == (0,)]
    if empty:
        what = f"has {len(empty)} tensors without elements ({some(empty)}), as DeepSpeed's ZeRO-3 leaves them where "
        what += "weights were not gathered; in its checkpoint: python zero_to_fp32.py . OUT --safe_serialization"
        findings.append(Finding(label, what))
    return findings


def _holds_shards(path: Path) -> bool:
    return any(_DISTRIBUTED.match(entry.name) for entry in path.iterdir())


def _of_distributed(source: PurePath) -> str:
    if source.name.startswith(_OPTIMIZER):
        return "holds the optimizer's state of a sharded training; its weights are in the folder beside this one"
    what = "holds weights in the pieces of a sharded training's ranks (.distcp), not a model; make one"
    return f"{what}: accelerate merge-weights {shlex.quote(plain(str(source)))} OUT; {_THEN}"


def _of_zero(source: PurePath) -> str:
    what = "holds weights in the pieces of DeepSpeed's ranks, not a model; make one"
    return f"{what}: cd {shlex.quote(plain(str(source)))}; python zero_to_fp32.py . OUT --safe_serialization; {_THEN}"
