"""Processes that train one member together: how they were started, and weights of which each holds a part (FSDP)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from warmerge.errors import UsageError, some

if TYPE_CHECKING:
    import torch

_HOW = "torchrun --nproc_per_node N -m warmerge train ..."
# What accelerate's launcher says of itself: the variable, the option, what takes its place.
_OTHER_SHARDING = (
    ("ACCELERATE_USE_FSDP", "--use_fsdp"),
    ("ACCELERATE_USE_DEEPSPEED", "--use_deepspeed"),
    ("ACCELERATE_USE_MEGATRON_LM", "--use_megatron_lm"),
)


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
    """Of a whole tensor what this rank holds, if the parameter `like` is divided; a single number is not."""
    if tensor.ndim == 0 or not _divided(like):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def _divided(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")
