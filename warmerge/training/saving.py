"""What a member leaves on the disk: checkpoints to go on from, in the end a reward model.

Whatever happens, what has its final name is whole. A checkpoint is one file of parameters and optimizer state that no
program takes for a model. A model's weights get their name last, so a folder that has them is a finished member.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from warmerge.errors import Finding, RefusedError, WarmergeError, quoted, some
from warmerge.rewards.tokenizer import quiet
from warmerge.training.ranks import part_of, whole
from warmerge.weights.adapter import BASE
from warmerge.weights.checkpoint import ADAPTER_WEIGHTS, INDEX, SINGLE
from warmerge.weights.folder import TEMPLATES
from warmerge.weights.kernels import TORCH_DTYPE, memory
from warmerge.weights.locate import open_checkpoint
from warmerge.weights.output import MANIFEST, sync
from warmerge.weights.safetensors_format import build_header
from warmerge.weights.samples import read_sample

_CHECKPOINT, _STATE = "checkpoint-", "state.safetensors"
# The file that makes a folder a model: renamed last.
_LAST = (SINGLE, INDEX, ADAPTER_WEIGHTS)
_DTYPE = {dtype: name for name, dtype in TORCH_DTYPE.items()}


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a member's folder, the last one last. One that somebody set aside by another name is none."""
    found = folder.glob(f"{_CHECKPOINT}*")
    return sorted((path for path in found if re.fullmatch(r"\d+", path.name.removeprefix(_CHECKPOINT))), key=step_of)


def step_of(checkpoint: Path) -> int:
    """How many steps a checkpoint holds.

    >>> step_of(Path("members/01/checkpoint-200"))
    200
    """
    return int(checkpoint.name.removeprefix(_CHECKPOINT))


def write_checkpoint(
    folder: Path, step: int, module: Any, optimizer: torch.optim.Optimizer, member: str, keep: bool
) -> None:
    """Writes trained parameters and optimizer state after `step` steps; then removes earlier ones, unless `keep`.

    One tensor after the other is fetched and written. Of a module that is divided between ranks the first rank calls
    this, and the others `take_part`.

    Args:
        member: all that the run depends on; only the same goes on from here.

    Raises:
        WarmergeError: it could not be written. Earlier checkpoints are as they were.
    """
    tensors = _state(module, optimizer)
    fetched = whole(tensors)
    partial = folder / ".checkpoint.partial"
    earlier = checkpoints(folder)
    try:
        with _written(partial, f"a checkpoint at step {step}"):
            _write_tensors(partial / _STATE, tensors, fetched, {"member": member})
            sync(partial / _STATE)
            os.rename(partial, folder / f"{_CHECKPOINT}{step}")
    finally:
        for _ in fetched:  # also where writing failed: other ranks give their parts to the end
            pass
    sync(folder)
    for old in earlier if not keep else ():
        shutil.rmtree(old)


def take_part(module: Any, optimizer: torch.optim.Optimizer) -> None:
    """Gives the first rank this rank's parts of what `write_checkpoint` writes."""
    for _ in whole(_state(module, optimizer)):
        pass


def _state(module: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {f"parameter.{name}": p.detach() for name, p in module.named_parameters() if p.requires_grad}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
    return tensors


def _write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    fetched: Iterator[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """A safetensors file of tensors that are on the CPU only one after the other."""
    shapes = {name: (_DTYPE[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    header, offsets = build_header(shapes, metadata)
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in fetched:
            file.seek(offsets[name])
            file.write(memory(tensor.contiguous()))


def load_checkpoint(checkpoint: Path, module: Any, optimizer: torch.optim.Optimizer, member: str) -> None:
    """Puts a checkpoint's parameters and optimizer state in place, to the bit; each rank takes its parts.

    Raises:
        RefusedError: it is damaged, or of another member.
    """
    from safetensors import SafetensorError, safe_open

    where, advice = str(checkpoint / _STATE), "delete this checkpoint to begin again"
    trained = {f"parameter.{name}": p for name, p in module.named_parameters() if p.requires_grad}
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(where, framework="pt") as file, torch.no_grad():
            if (file.metadata() or {}).get("member") != member:
                what = f"belongs to another member or recipe than member.json says; {advice}"
                raise RefusedError([Finding(where, what)])
            names = set(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names if name.startswith("parameter.")}
            if shapes != {name: tuple(p.shape) for name, p in trained.items()}:
                raise RefusedError([Finding(where, f"holds other parameters than this member trains; {advice}")])
            for name, parameter in trained.items():
                parameter.copy_(part_of(file.get_tensor(name), parameter))
            for name in sorted(names - trained.keys()):  # all ranks in the same order
                _, number, key = name.split(".")
                value = part_of(file.get_tensor(name), ordered[int(number)])
                state.setdefault(int(number), {})[key] = value
    except (SafetensorError, OSError) as error:
        raise RefusedError([Finding(where, f"cannot be read ({error}); {advice}")]) from None
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def is_saved(folder: Path) -> bool:
    """Whether a member's folder holds its reward model, whole."""
    return any((folder / name).exists() for name in _LAST)


def remove_checkpoints(folder: Path) -> None:
    """Removes optimizer state that nothing will go on from."""
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint, ignore_errors=True)


def save_reward_model(module: Any, init: Path, folder: Path, dtype: torch.dtype, adapter: bool) -> None:
    """Writes the trained model into `folder`, with the start's own config and tokenizer files.

    The config stays the start's so that members average: dropout is the run's, not the model's.

    Args:
        module: a transformers model, or a PEFT model, whose adapter is merged unless `adapter`.
        dtype: of the weights that are written.

    Raises:
        WarmergeError: it could not be written, holds a value that is not finite, or other tensors than the start.
    """
    partial = folder / ".model.partial"
    with _written(partial, "the trained model"):
        if adapter:
            _write_adapter(module, init, partial, dtype)
        else:
            _write_model(module, partial, dtype)
        _copy_small_files(init, partial, dtype, adapter)
        _refuse_other_tensors(partial, init)
        # safetensors makes files for their owner alone; the umask says what other files may be.
        mode = (partial / "tokenizer_config.json").stat().st_mode & 0o777
        for file in (path for path in partial.rglob("*") if path.is_file()):
            file.chmod(mode)
            sync(file)
        for entry in sorted(partial.iterdir(), key=_order):
            if entry.is_dir():
                shutil.rmtree(folder / entry.name, ignore_errors=True)
            os.replace(entry, folder / entry.name)
        partial.rmdir()
    sync(folder)


def _order(entry: Path) -> tuple[int, str]:
    """Small files, then shards, then what makes them a model."""
    return (2 if entry.name in _LAST else entry.suffix == ".safetensors", entry.name)


def _write_model(module: Any, partial: Path, dtype: torch.dtype) -> None:
    if hasattr(module, "merge_and_unload"):
        module = module.merge_and_unload()
    state = {name: _cast(name, value, dtype) for name, value in module.state_dict().items()}
    with quiet():
        module.save_pretrained(partial, state_dict=state, max_shard_size="5GB")


def _write_adapter(module: Any, init: Path, partial: Path, dtype: torch.dtype) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    # Embeddings are not trained; "auto" would ask the Hub for the base's config.
    state = get_peft_model_state_dict(module, save_embedding_layers=False)
    tensors = {name: _cast(name, value, dtype).contiguous() for name, value in state.items()}
    save_file(tensors, partial / ADAPTER_WEIGHTS, {"format": "pt"})
    config = module.peft_config["default"]
    # PEFT takes a relative path from where a program runs. When the run is moved, this one leads nowhere: --base.
    config.base_model_name_or_path, config.inference_mode = str(init.absolute()), True
    config.save_pretrained(partial)
    # Another run's start may lie there by then: by this one it is known.
    fingerprint = read_sample(open_checkpoint(init)).fingerprint
    (partial / BASE).write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")


def _cast(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    cast = value.detach().to(dtype)
    if not torch.isfinite(cast).all():
        what = f"is not finite in {str(dtype).removeprefix('torch.')}; nothing was saved"
        raise WarmergeError(f"tensor {quoted(name)} of the trained model {what}")
    return cast


def _copy_small_files(init: Path, partial: Path, dtype: torch.dtype, adapter: bool) -> None:
    """The start's files beside its weights, byte for byte; of the config only the dtype changes, where it is another.

    A folder with an adapter has no config: it would be taken for a whole model's.
    """
    for file in init.iterdir():
        weights = file.suffix == ".safetensors" or file.name in (INDEX, MANIFEST)
        whole_models_own = file.name == "config.json" or file.suffix == ".py"
        if file.is_file() and not weights and not file.name.startswith(".") and not (adapter and whole_models_own):
            (partial / file.name).write_bytes(file.read_bytes())
    if (init / TEMPLATES).is_dir():
        shutil.copytree(init / TEMPLATES, partial / TEMPLATES)
    if adapter:
        return
    config, name = json.loads((partial / "config.json").read_bytes()), str(dtype).removeprefix("torch.")
    said = {key: name for key in ("dtype", "torch_dtype") if config.get(key, name) != name}
    if said:
        (partial / "config.json").write_text(json.dumps(config | said, indent=2) + "\n", encoding="utf-8")


def _refuse_other_tensors(partial: Path, init: Path) -> None:
    """Members and start average only if they hold the same tensors."""
    found, expected = (_shapes(folder, init) for folder in (partial, init))
    if found != expected:
        differing = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
        what = f"{len(differing)} tensors have other names or shapes than in {init}: {some(differing)}"
        raise WarmergeError(f"the trained model would not average with its start: {what}; nothing was saved")


def _shapes(folder: Path, base: Path) -> Mapping[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in open_checkpoint(folder, base).tensors.items()}


@contextlib.contextmanager
def _written(partial: Path, what: str) -> Iterator[None]:
    """An empty folder to write in, gone if that fails; an error of the disk says what to do."""
    from safetensors import SafetensorError

    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(partial.parent).free
        advice = f"{free / 1e6:,.0f} MB are free there. What was kept before is intact: make room and run it again"
        raise WarmergeError(f"{partial.parent}: {what} could not be written ({error}); {advice}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
