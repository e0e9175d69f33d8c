"""Ways to run a reward model over token ids: alone, padded, or with what texts share computed once.

Decoders: texts that begin with the same tokens (the answers to one prompt) are a group. Its prefix runs once, then all
suffixes on copies of its cache. Encoders see every text whole, in batches of similar length.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

Ids = Sequence["NDArray[numpy.int64]"]
# Which texts, and what the module gives for each, (texts, outputs): a reward, or the features of a model without head.
Batches = Iterator[tuple[list[int], torch.Tensor]]
# A shared beginning shorter than this costs more to handle than to compute again.
_MIN_PREFIX = 16
# What a forward pass costs beside its tokens, as a share of its budget: padding may cost as much, before it is split.
_PASS_COST = 1 / 64


@dataclass(frozen=True)
class Group:
    """Texts (indices) that share their first `prefix` tokens; none is shared where `prefix` is 0."""

    texts: tuple[int, ...]
    prefix: int


def one_by_one(module: Any, ids: Ids, budget: int) -> Batches:
    """The model's own output for each text, alone: what every other method has to equal."""
    for i, row in enumerate(ids):
        yield [i], _own_output(module, torch.from_numpy(row)[None].to(_device(module)), None)


def padded(module: Any, ids: Ids, budget: int) -> Batches:
    """Encoders: batches of texts of similar length, longest first, padded on the right and masked."""
    pad = module.config.get_text_config().pad_token_id
    for rows in chunks(range(len(ids)), [len(row) for row in ids], budget):
        inputs = _pad([ids[i] for i in rows], 0 if pad is None else pad, _device(module))
        sizes = torch.tensor([len(ids[i]) for i in rows], device=inputs.device)
        mask = torch.arange(inputs.shape[1], device=inputs.device) < sizes[:, None]
        yield rows, _own_output(module, inputs, mask.long())


def prefix_reuse(module: Any, ids: Ids, budget: int) -> Batches:
    """Decoders: each group's shared prefix once, then its suffixes on copies of the prefix's cache.

    Nothing after the token that the head reads has an influence on it: texts end there, and what pads them on the right
    needs no mask. (A mask over the suffix alone would be accepted, and wrong.)
    """
    from transformers import DynamicCache

    config, device = module.config.get_text_config(), _device(module)
    same_rotation = _rotated_alike(config)
    yield from (
        ([i], values)
        for i, row in enumerate(ids)
        if len(row) > same_rotation
        for _, values in one_by_one(module, [row], budget)
    )
    alike = [i for i, row in enumerate(ids) if len(row) <= same_rotation]
    texts = [ids[i][: scored_position(ids[i], config.pad_token_id) + 1] for i in alike]
    lengths = [len(text) for text in texts]
    for groups in _batched(group_by_prefix(texts), lengths, budget):
        prefix, cache = groups[0].prefix, DynamicCache(config=module.config)
        if prefix:
            shared = torch.from_numpy(numpy.stack([texts[group.texts[0]][:prefix] for group in groups]))
            module.base_model(input_ids=shared.to(device), past_key_values=cache, use_cache=True)
        owner = {text: number for number, group in enumerate(groups) for text in group.texts}
        for rows in chunks(list(owner), lengths, budget):
            reused: dict[str, Any] = {"use_cache": False}
            if prefix:
                own = _selected(cache, torch.tensor([owner[i] for i in rows], device=device))
                reused = {"use_cache": True, "past_key_values": own}
            out = module.base_model(input_ids=_pad([texts[i][prefix:] for i in rows], 0, device), **reused)
            last = torch.tensor([lengths[i] - prefix - 1 for i in rows], device=device)
            hidden = out.last_hidden_state[torch.arange(len(rows), device=device), last]
            yield [alike[i] for i in rows], module.score(hidden)


def scored_position(ids: NDArray[numpy.int64], pad: int | None) -> int:
    """Where transformers' decoder heads read the reward: the last token that is not the padding id.

    A text of nothing but padding is read at its first token; without a padding id, every text at its last.

    >>> scored_position(numpy.array([5, 6, 0, 0]), 0), scored_position(numpy.array([0, 0]), 0)
    (1, 0)
    """
    real = numpy.arange(len(ids)) if pad is None else numpy.flatnonzero(ids != pad)
    return int(real[-1]) if len(real) else 0


def group_by_prefix(texts: Ids) -> list[Group]:
    """Texts in groups with a common beginning: found from the tokens alone, whatever the data calls a prompt.

    In lexicographic order neighbours share most. A text joins the group before it if at least half of that group's
    prefix remains. Every text keeps at least its last token to itself.
    """
    order = sorted(range(len(texts)), key=lambda i: texts[i].astype(">i8").tobytes())
    groups: list[Group] = []
    for i in order:
        if groups:
            last = groups[-1]
            shared = min(common(texts[last.texts[-1]], texts[i]), last.prefix or len(texts[i]) - 1)
            shared = min(shared, len(texts[i]) - 1, len(texts[last.texts[-1]]) - 1)
            if shared >= max(_MIN_PREFIX, last.prefix // 2):
                groups[-1] = Group((*last.texts, i), shared)
                continue
        groups.append(Group((i,), 0))
    return groups


def common(a: NDArray[numpy.int64], b: NDArray[numpy.int64]) -> int:
    """How many tokens two texts have in common from their beginning."""
    shorter = min(len(a), len(b))
    differing = numpy.flatnonzero(a[:shorter] != b[:shorter])
    return int(differing[0]) if len(differing) else shorter


def _batched(groups: Sequence[Group], lengths: Sequence[int], budget: int) -> Iterator[list[Group]]:
    """Groups with the same prefix length together, as many as fit: no padding inside, so exact for any attention.

    A small group gives up to an eighth of its prefix to its suffixes, so that more groups have the same length.
    """
    rounded = []
    for group in groups:
        size = group.prefix + sum(lengths[i] - group.prefix for i in group.texts)
        step = max(8, 1 << max(0, group.prefix.bit_length() - 4)) if size < budget // 8 else 1
        longest = max(lengths[i] for i in group.texts)
        rounded.append((longest, Group(group.texts, group.prefix // step * step)))
    rounded.sort(key=lambda entry: (-entry[1].prefix, -entry[0]))
    batch: list[Group] = []
    rows = widest = 0
    for longest, group in rounded:
        rows, widest = rows + len(group.texts), max(widest, longest)
        if batch and (group.prefix != batch[0].prefix or rows * widest > budget):
            yield batch
            batch, rows, widest = [], len(group.texts), longest
        batch.append(group)
    if batch:
        yield batch


def chunks(texts: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """The texts, longest first, in runs of at most `budget` tokens, padding included; at least one text each.

    A run also ends where its padding would cost more than another forward pass does.

    >>> chunks(range(4), [5, 9, 9, 5], 20), chunks(range(4), [8, 9, 9, 8], 6400)
    ([[1, 2], [0, 3]], [[1, 2, 0, 3]])
    """
    found: list[list[int]] = []
    longest = padding = 0
    for i in sorted(texts, key=lambda i: -lengths[i]):
        padding += longest - lengths[i]
        if not found or (len(found[-1]) + 1) * longest > budget or padding > budget * _PASS_COST:
            found.append([])
            longest, padding = lengths[i], 0
        found[-1].append(i)
    return found


def _pad(rows: Ids, pad: int, device: torch.device) -> torch.Tensor:
    """Token ids (N, longest) padded on the right."""
    inputs = torch.full((len(rows), max(map(len, rows))), pad, dtype=torch.long)
    for i, row in enumerate(rows):
        inputs[i, : len(row)] = torch.from_numpy(row)
    return inputs.to(device)


def _selected(cache: Any, rows: torch.Tensor) -> Any:
    """A cache of copies of these rows of another one, which stays as it is."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    own.batch_select_indices(rows)
    return own


def _rotated_alike(config: Any) -> float:
    """The longest text whose prefix is computed as if nothing followed: no limit, but for rotary embeddings that depend
    on the length of the whole (LongRoPE, as in Phi-3, and dynamic NTK)."""
    table = getattr(config, "rope_parameters", None) or {}
    limits = [
        entry.get("original_max_position_embeddings") or config.max_position_embeddings
        for entry in (table, *table.values())  # one for all layers, or one for each kind of layer
        if isinstance(entry, dict) and entry.get("rope_type") in ("longrope", "dynamic")
    ]
    return min(limits, default=math.inf)


def _own_output(module: Any, inputs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    logits: torch.Tensor = module(input_ids=inputs, attention_mask=mask).logits
    return logits


def _device(module: Any) -> torch.device:
    device: torch.device = next(module.parameters()).device
    return device
