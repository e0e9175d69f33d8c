"""Processes that train one member together: how they were started, and weights of which each holds a part (FSDP)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from warmerge.errors import Interrupted, UsageError, WarmergeError, some

Found = TypeVar("Found")
_HOW = "torchrun --nproc_per_node N -m warmerge train ..."
# What accelerate's launcher says of itself: the variable, the option, what takes its place.
_OTHER_SHARDING = (
    ("ACCELERATE_USE_FSDP", "--use_fsdp"),
    ("ACCELERATE_USE_DEEPSPEED", "--use_deepspeed"),
    ("ACCELERATE_USE_MEGATRON_LM", "--use_megatron_lm"),
)
# How many processes mpirun (MPICH, Open MPI, MVAPICH) or srun started. SLURM_NTASKS is not asked: a batch script, which
# is one process, has it too.
_COPIES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def check_launcher(shard: bool) -> None:
    """Several processes were asked for in a way that members are trained by, or none.

    Args:
        shard: whether a member is to be divided between them.

    Raises:
        UsageError: `accelerate launch` was asked for several processes and started one; another kind of sharding was
            asked of it; `shard` in one process.
    """
    for variable, option in _OTHER_SHARDING:
        if os.environ.get(variable, "").lower() in ("1", "true"):
            what = f"accelerate launch {option}: members are not trained with it"
            raise UsageError(f"{what}; to divide each between processes: {_HOW} --shard")
    # Its launcher for CPUs names an address to meet at where it was asked for several, and then starts one.
    alone = "WORLD_SIZE" not in os.environ and "ACCELERATE_USE_CPU" in os.environ
    if alone and "MASTER_ADDR" in os.environ:
        what = "accelerate launch was asked for several processes, but on CPUs it starts only one"
        raise UsageError(f"{what}; start them with {_HOW}")
    if shard and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise UsageError(f"--shard divides each member between several processes, found one; start them with {_HOW}")


def refuse_copies() -> None:
    """Refuses a command that mpirun or srun started several times: each would do all of the work, in one folder.

    What a command starts is not asked: a Ray cluster's workers come from srun, and each does a work of its own.

    Raises:
        UsageError: it was, and not to start torchrun.
    """
    counts = {name: os.environ.get(name, "") for name in _COPIES if "WORLD_SIZE" not in os.environ}
    for name, count in counts.items():
        if count.isdecimal() and int(count) > 1:
            what = f"{count} processes were started by mpirun or srun ({name}), which members are not trained by"
            raise UsageError(f"{what}; start them with {_HOW}, with srun or mpirun one torchrun on each machine")


def check_batch(batch: int, ranks: int) -> None:
    """Each of `ranks` processes takes as many pairs of a batch.

    Raises:
        UsageError: it cannot be divided so.
    """
    if batch % ranks:
        raise UsageError(f"--batch {batch}: expected a multiple of {ranks}, the processes that share each batch")


def on_all_ranks(work: Callable[[], Found], says: Callable[[Found], Any] = lambda found: None) -> Found:
    """What `work` gives on this rank, once it was done on all of them. One that failed alone would go on to another
    member while the others train this one, and each would get the gradients of the other.

    Args:
        work: without anything that ranks do together, unless it fails on all of them or on none.
        says: of what was found, what has to be the same on all ranks; JSON.

    Raises:
        Interrupted, WarmergeError: on all ranks, where it failed on one, or did not say the same on each.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return work()
    from accelerate import PartialState
    from accelerate.utils import gather_object

    # Processes without a GPU know of one another only if told so.
    PartialState(cpu=not torch.cuda.is_available())
    failed: WarmergeError | None = None
    try:
        found = work()
        said = ("", json.dumps(says(found), sort_keys=True))
    except WarmergeError as error:
        failed, said = error, ("stopped" if isinstance(error, Interrupted) else "failed", str(error))
    heard: list[tuple[str, str]] = gather_object([said])
    for kind, error_of in (("stopped", Interrupted), ("failed", WarmergeError)):
        for other, (how, what) in enumerate(heard):
            if how == kind:
                raise failed if failed is not None and said[0] == kind else error_of(f"rank {other}: {what}")
    if differing := [other for other, entry in enumerate(heard) if entry != heard[0]]:
        what = f"rank 0 found {heard[0][1][:500]}, rank {differing[0]} found {heard[differing[0]][1][:500]}"
        raise WarmergeError(f"{what}: all ranks must share the run's folder; put it where each machine sees it")
    return found


def shard(module: Any, device: torch.device, ranks: int) -> None:
    """Divides the weights of a transformers or PEFT model on the CPU between all ranks, in place; their parts are put
    on `device`.

    A layer is whole only while it computes; what belongs to no layer, such as embeddings, only from where the model
    begins until it ends.

    Raises:
        UsageError: it has no list of layers, or layers that share weights with each other or with what is around them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers = _layers(module)
    if not layers:
        raise UsageError(f"--shard: {type(module).__name__} has no list of layers to divide; train without it")
    if shared := _shared(module, layers):
        raise UsageError(f"--shard: weights that several layers share are not divided ({some(shared)}); train without")
    mesh = init_device_mesh(device.type, (ranks,))
    for part in (*layers.values(), module):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    """The members of the outermost lists of modules. Lists within them stay whole: not every text goes through each
    expert of a mixture, and ranks have to ask for the same parts in the same order."""
    lists = [name for name, child in module.named_modules() if isinstance(child, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return {f"{name}.{key}": layer for name in outermost for key, layer in module.get_submodule(name).named_children()}


def _shared(module: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """Weights that are in two layers, or in one and outside of them."""
    homes: dict[int, tuple[str, set[str]]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        home = next((layer for layer in layers if name.startswith(f"{layer}.")), "")
        homes.setdefault(id(parameter), (name, set()))[1].add(home)
    return [name for name, found in homes.values() if len(found) > 1]


def whole(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor on the CPU, one after the other, put together from its parts where ranks hold parts of it.

    Then every rank has to go through all of them: a rank that stops keeps the others waiting.
    """
    for name, tensor in tensors.items():
        found: Any = tensor.detach()
        yield name, (found.full_tensor() if _divided(found) else found).cpu()


def part_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Of a whole tensor what this rank holds, if the parameter `like` is divided; a single number is not.

    Every rank has the whole tensor, so none is sent anything: one that cannot read it keeps no other waiting.
    """
    if tensor.ndim == 0 or not _divided(like):
        return tensor
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(like, DTensor)
    assert like.placements == (Shard(0),), "rows are what `shard` divides"
    mesh = like.device_mesh
    rows = -(-len(tensor) // mesh.size())
    own = tensor[mesh.get_local_rank() * rows :][:rows].to(like.device)
    return DTensor.from_local(own, mesh, like.placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def _divided(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")
