"""The start as a module to train: float32 weights, a member's dropout everywhere, its head in full precision."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import nn

from warmerge.errors import Finding, RefusedError, UsageError
from warmerge.rewards.model import DTYPES, LoadOptions, head_layers, load_reward_model
from warmerge.training.recipe import Member
from warmerge.training.training_set import TrainingSet

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Integers = NDArray[numpy.int64]

# Texts on which padding is tried.
_TRIED = 4


def trainable(member: Member, init: Path, device: torch.device) -> Any:
    """The start as a transformers or PEFT model on `device`, with what is to be trained marked so. One that is to be
    divided between ranks is on the CPU, whole, and computes on `device` once its parts are there.

    The body computes in the recipe's precision, the head always in float32: bfloat16 has steps of .03 at a reward of 4.

    Raises:
        UsageError: a recipe with a schedule, precision or dtype that is not known, or an adapter without a rank.
        RefusedError: as `load_reward_model`.
    """
    recipe = member.recipe
    for key, known in (("schedule", ("linear", "constant")), ("precision", ("float32", "bfloat16")), ("dtype", DTYPES)):
        if (found := getattr(recipe, key)) not in known:
            raise UsageError(f"recipe: {key} is {found!r}, expected {' or '.join(known)}")
    if recipe.adapter and not recipe.lora:
        raise UsageError("recipe: adapter without lora: there is no adapter to save")
    place = "cpu" if device.type == "cpu" or recipe.shard else str(device)  # accelerate numbers CPUs too
    options = LoadOptions(
        device=place, dtype="float32", max_length=recipe.max_length, trust_remote_code=recipe.trust_remote_code
    )
    module = load_reward_model(init, options, dropout=member.dropout).module
    if hasattr(module.config.get_text_config(), "use_cache"):
        module.config.get_text_config().use_cache = False  # for generation; here it would only take memory
    if recipe.precision == "bfloat16":
        # Of the body alone: what comes after it sees float32, and stays in it. A divided layer is whole only while it
        # computes, and so must be the cast of it.
        cast = torch.autocast(device.type, torch.bfloat16, cache_enabled=not recipe.shard)
        module.base_model.forward = cast(module.base_model.forward)
    if recipe.freeze_embeddings:
        module.get_input_embeddings().requires_grad_(False)
    trained = _with_lora(module, member) if recipe.lora else module
    if recipe.gradient_checkpointing:
        # transformers renamed it on the way to 6.
        enable = getattr(module, "activation_checkpointing_enable", module.gradient_checkpointing_enable)
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            raise UsageError(f"gradient checkpointing: {error} Train without it") from None
    return trained


def _with_lora(module: Any, member: Member) -> Any:
    """Adapters of the same start for the same seed, at every linear layer of the body; the head is trained whole."""
    from peft import get_peft_model

    heads = [name for name, layer in head_layers(module).items() if next(layer.parameters(), None) is not None]
    torch.manual_seed(member.seed)
    # With another task the head would stay as it is, and would not be saved.
    config = lora_config(module, member.recipe.lora, "SEQ_CLS", member.dropout, heads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a property of transformers that has a new name
        return get_peft_model(module, config)


def lora_config(module: Any, rank: int, task: str, dropout: float = 0.0, whole: Sequence[str] = ()) -> Any:
    """PEFT's config of adapters at every linear layer of the body: not at its head, be it a reward's or a language
    model's.

    Args:
        task: one of PEFT's task types.
        whole: layers that are trained with all their weights.
    """
    from peft import LoraConfig, TaskType
    from transformers.pytorch_utils import Conv1D

    body = next(name for name, child in module.named_modules() if child is module.base_model)
    targets = {
        f"{body}.{name}": layer for name, layer in module.base_model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D)
    }  # fmt: skip
    return LoraConfig(
        task_type=TaskType[task],
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=dropout,
        target_modules=list(targets),
        modules_to_save=list(whole) or None,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in targets.values()),
    )


def rewards(
    model: Any, config: Any, pairs: TrainingSet, part: Integers, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rewards of the chosen and of the rejected texts of these pairs, (len(part),) each, in float32."""
    rows = [pairs.text(i) for i in (*pairs.chosen[part], *pairs.rejected[part])]
    pad = config.get_text_config().pad_token_id
    ids = torch.full((len(rows), max(map(len, rows))), 0 if pad is None else pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(row)
        mask[i, : len(row)] = 1
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, 0].float()
    chosen, rejected = logits.chunk(2)
    return chosen, rejected


def refuse_other_head(member: Member, init: Path) -> None:
    """Members whose heads start apart do not average: `init` must have the head that the member was given.

    Raises:
        RefusedError: it has another one.
    """
    from warmerge.training.head import head_digest

    found = head_digest(init)
    if found != member.head:
        what = f"has the head {found}, but member {member.name} was given {member.head}; it was changed since"
        raise RefusedError([Finding(str(init), what)])


def refuse_padding_dependence(
    module: Any, init: Path, pairs: TrainingSet, device: torch.device, tolerance: float
) -> None:
    """A batch pads its texts to one length: their rewards must be those that the model gives each text alone.

    Args:
        tolerance: that is allowed, beside so much of the reward's own size.

    Raises:
        RefusedError: they are not, as for models that read their last column.
    """
    by_length = numpy.argsort(pairs.longest(numpy.arange(len(pairs))), kind="stable")
    part = by_length[numpy.linspace(0, len(pairs) - 1, min(_TRIED, len(pairs))).astype(int)]
    module.eval()
    with torch.no_grad():
        batched = torch.cat(rewards(module, module.config, pairs, part, device))
        rows = [torch.from_numpy(pairs.text(i)).to(device) for i in (*pairs.chosen[part], *pairs.rejected[part])]
        alone = torch.stack([module(input_ids=row[None]).logits[0, 0].float() for row in rows])
    lengths = " and ".join(str(length) for length in sorted({min(map(len, rows)), max(map(len, rows))}))
    if not torch.all((batched - alone).abs() <= tolerance * (1 + alone.abs())):
        what = f"gives texts of {lengths} tokens other rewards in a padded batch than alone, so it cannot be trained"
        raise RefusedError([Finding(str(init), what)])
