"""One member: fine-tune a reward model from the shared start on preference pairs, top to bottom.

Each step is a function of the member's seed and the step's number: which pairs it takes, in which order, what dropout
drops. A run that goes on from a checkpoint therefore ends in the same weights.

Left out on purpose: a data loader (the tokens fit in memory), evaluation on the way (the learning curve is of the
training pairs; `eval` reports on others), early stopping (it would pick each member on a set of its own).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch.nn.functional import softplus

from warmerge.errors import Finding, RefusedError, UsageError, WarmergeError
from warmerge.rewards.model import DTYPES
from warmerge.training import saving
from warmerge.training.ranks import check_batch, check_launcher, on_all_ranks, shard, whole
from warmerge.training.recipe import Member, Recipe, learning_rate, read_member
from warmerge.training.trainable import refuse_other_head, refuse_padding_dependence, rewards, trainable
from warmerge.training.training_set import TrainingSet, batch_of, micro_batches
from warmerge.weights.output import sync

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Integers = NDArray[numpy.int64]

__all__ = ["ROWS", "Member", "Recipe", "bradley_terry", "learning_rate", "read_member", "train_member"]
ROWS = "rows.jsonl"


def bradley_terry(
    chosen: torch.Tensor, rejected: torch.Tensor, margins: torch.Tensor, label_smoothing: float, centring: float
) -> torch.Tensor:
    """(n,): -log sigmoid(r_chosen - r_rejected - margin), WARM Equation 1 (arXiv 2401.12187), with two additions.

    With label smoothing e the label is taken for wrong with probability e (Mitchell, cDPO); centring adds
    (r_chosen + r_rejected)^2, which keeps rewards around zero (Eisenstein et al., arXiv 2312.09244).

    >>> one, zero = torch.tensor([1.0]), torch.tensor([0.0])
    >>> round(bradley_terry(2 * one, zero, zero, 0.0, 0.0).item(), 6)
    0.126928
    >>> round(bradley_terry(one, one, zero, label_smoothing=0.0, centring=0.1).item(), 6)
    1.093147
    """
    margin = chosen - rejected - margins
    loss = (1 - label_smoothing) * softplus(-margin) + label_smoothing * softplus(margin)
    return loss + centring * (chosen + rejected).square()


def train_member(
    member: Member, init: Path, pairs: TrainingSet, folder: Path, stop: Callable[[], bool] = lambda: False
) -> Iterator[dict[str, Any]]:
    """Trains, yields a row for each step (also kept in `folder`), and in the end leaves the reward model in `folder`.

    It goes on from the last checkpoint in `folder` if there is one; a finished member has no steps left. Under torchrun
    every rank runs this function, and each batch is split between them; the model is copied to each, or divided too.

    Args:
        init: the reward model to start from.
        pairs: those of `member.pairs`, see `read_pairs`.
        folder: for rows, checkpoints and the model.
        stop: asked at each step; if so on any rank, a checkpoint is written after it and the rows end.

    Raises:
        UsageError: a recipe that cannot be used.
        RefusedError: another head in `init` than the member's; a checkpoint of another run; a start whose rewards
            change in a padded batch.
        WarmergeError: the loss, the gradient or a weight is not finite; the disk is full; ranks that do not see the
            same in `folder`, or of which one fails before the first step: then none trains.
    """
    if on_all_ranks(partial(_is_done, member, init, folder), lambda done: [_identity(member), done]):
        if not member.recipe.keep_checkpoints:
            saving.remove_checkpoints(folder)
        return
    run = _begin(member, init, pairs, folder)
    recipe = member.recipe
    for step in range(run.done, recipe.steps):
        row, stopping = _step(run, step, stop)
        last = step + 1 == recipe.steps
        if run.accelerator.is_main_process:
            with (folder / ROWS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if not last and (stopping or (step + 1) % recipe.save_every == 0):
            _on_first_rank(run.accelerator, partial(_keep, run, folder, step + 1), partial(_lend_state, run))
        yield row
        if stopping and not last:
            return
    _on_first_rank(run.accelerator, partial(_save, run, init, folder), partial(_lend_weights, run))


def _is_done(member: Member, init: Path, folder: Path) -> bool:
    refuse_other_head(member, init)
    return saving.is_saved(folder)


@dataclass(frozen=True)
class _Run:
    """A member being trained. `model` is `module`, or what averages its gradients between ranks around it."""

    member: Member
    pairs: TrainingSet
    accelerator: Any
    module: Any
    model: Any
    optimizer: torch.optim.Optimizer
    done: int


def _begin(member: Member, init: Path, pairs: TrainingSet, folder: Path) -> _Run:
    """The start, or what the last checkpoint made of it."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    recipe = member.recipe
    check_launcher(recipe.shard)
    # BigBird's pooler, and experts that no text of a batch goes to, get no gradient: ranks would wait for it.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # The body has an autocast of its own, see `trainable`. Processes without a GPU know of one another only if told so.
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=[unused])
    kind, ranks = str(accelerator.distributed_type.value), accelerator.num_processes
    if ranks != int(os.environ.get("WORLD_SIZE", "1")):
        started = f"{os.environ['WORLD_SIZE']} processes were started, but accelerate joined {ranks}"
        raise UsageError(f"{started}: each would train alone into one folder; start them with torchrun")
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise UsageError(f"members are not trained with {kind}; start them with torchrun, or without a launcher")
    check_batch(recipe.batch, ranks)
    module = on_all_ranks(partial(trainable, member, init, accelerator.device))
    if recipe.shard:
        shard(module, accelerator.device, ranks)  # before the optimizer takes the parameters

    def begun() -> tuple[torch.optim.Optimizer, int]:
        refuse_padding_dependence(
            module, init, pairs, accelerator.device, tolerance=1e-3 if recipe.precision == "float32" else 0.1
        )
        optimizer = _optimizer(module, member)
        return optimizer, _go_on(folder, module, optimizer, member)

    optimizer, done = on_all_ranks(begun, lambda found: found[1])
    if accelerator.is_main_process:  # all have read
        _forget_rows(folder, done)
    module.train()
    model = module if recipe.shard else accelerator.prepare(module)
    return _Run(member, pairs, accelerator, module, model, optimizer, done)


def _optimizer(module: Any, member: Member) -> torch.optim.Optimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": member.recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=member.lr)


def _go_on(folder: Path, module: Any, optimizer: torch.optim.Optimizer, member: Member) -> int:
    """Loads the last checkpoint, and returns how many steps are done."""
    found = saving.checkpoints(folder)
    done = saving.step_of(found[-1]) if found else 0
    if found:
        saving.load_checkpoint(found[-1], module, optimizer, _identity(member))
    rows = _rows(folder)
    if len(rows) < done:
        what = f"has {len(rows)} rows, but {found[-1].name} was written after {done}; delete that to begin again"
        raise RefusedError([Finding(str(folder / ROWS), what)])
    return done


def _rows(folder: Path) -> list[str]:
    path = folder / ROWS
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []


def _forget_rows(folder: Path, done: int) -> None:
    """Of steps after the last checkpoint: they are done again."""
    rows = _rows(folder)
    if len(rows) > done:
        short = folder / f".{ROWS}.partial"
        short.write_text("".join(rows[:done]), encoding="utf-8")
        sync(short)
        short.replace(folder / ROWS)


def _keep(run: _Run, folder: Path, step: int) -> None:
    sync(folder / ROWS)  # after a power cut nothing goes on from a checkpoint without its rows
    keep = run.member.recipe.keep_checkpoints
    saving.write_checkpoint(folder, step, run.module, run.optimizer, _identity(run.member), keep)


def _lend_state(run: _Run) -> None:
    """What other ranks do while the first one keeps a checkpoint."""
    if run.member.recipe.shard:
        saving.take_part(run.module, run.optimizer)


def _save(run: _Run, init: Path, folder: Path) -> None:
    sync(folder / ROWS)
    recipe = run.member.recipe
    module = _undivided(run, init) if recipe.shard else run.module
    saving.save_reward_model(module, init, folder, DTYPES[recipe.dtype], recipe.adapter)
    if not recipe.keep_checkpoints:
        saving.remove_checkpoints(folder)


def _lend_weights(run: _Run) -> None:
    """What other ranks do while the first one saves the model."""
    if run.member.recipe.shard:
        for _ in whole(run.module.state_dict()):
            pass


def _undivided(run: _Run, init: Path) -> Any:
    """The trained weights in a module that is not divided, on the CPU: it is saved as any other."""
    fetched = whole(run.module.state_dict())
    try:
        module = trainable(run.member, init, torch.device("cpu"))
        places = module.state_dict()
        for name, tensor in fetched:
            places[name].copy_(tensor)
    finally:
        for _ in fetched:  # also where the start was lost meanwhile: other ranks give their parts to the end
            pass
    return module


def _identity(member: Member) -> str:
    return json.dumps(asdict(member), sort_keys=True)


def _on_first_rank(accelerator: Any, work: Callable[[], None], elsewhere: Callable[[], None]) -> None:
    """Does what one rank does for all, and what the others do meanwhile. Where it fails all of them fail, so that none
    waits for another."""
    from accelerate.utils import broadcast_object_list

    said = [""]
    if accelerator.is_main_process:
        try:
            work()
        except WarmergeError as error:
            if accelerator.num_processes == 1:
                raise
            said = [str(error)]
    else:
        elsewhere()
    if accelerator.num_processes > 1:
        broadcast_object_list(said)
    if said[0]:
        raise WarmergeError(said[0])


def _step(run: _Run, step: int, stop: Callable[[], bool]) -> tuple[dict[str, Any], bool]:
    """One step of the optimizer, over a batch in as many forward passes as its tokens need: its row, and whether any
    rank was told to stop."""
    begun = time.perf_counter()
    member, recipe, pairs, accelerator = run.member, run.member.recipe, run.pairs, run.accelerator
    rank, ranks, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    torch.manual_seed(_seed(member.seed, step, rank))  # of dropout: ranks drop apart
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(step, member)
    batch = batch_of(step, len(pairs), recipe.batch, member.seed)
    passes = _passes(pairs, batch, recipe.batch_tokens, ranks)[rank]
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    sums[2] = float(stop())
    for k, part in enumerate(passes):
        with contextlib.nullcontext() if k == len(passes) - 1 else accelerator.no_sync(run.model):
            chosen, rejected = rewards(run.model, run.module.config, pairs, part, device)
            margins = torch.tensor(pairs.margins[part] * recipe.use_margins, dtype=torch.float32, device=device)
            losses = bradley_terry(chosen, rejected, margins, recipe.label_smoothing, recipe.centring)
            # The mean over the batch, however it is split; gradients are averaged over ranks.
            # accelerator.backward would divide by what its launcher was told of accumulation, too.
            (losses.sum() * (ranks / recipe.batch)).backward()
        sums[0] += losses.detach().double().sum()
        sums[1] += (chosen >= rejected).sum()
    norm = _clipped(run.module, recipe.max_gradient_norm or math.inf)
    loss, right, stopping = accelerator.reduce(sums, "sum").tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        what = f"loss {loss / recipe.batch:.4g}, gradient norm {norm:.4g}"
        raise WarmergeError(
            f"member {member.name}: step {step + 1} is not finite ({what}), so its weights are not saved; its learning "
            f"rate is {member.lr:g}, try lower ones"
        )
    run.optimizer.step()
    run.optimizer.zero_grad()
    row = {
        "step": step + 1, "loss": loss / recipe.batch, "accuracy": right / recipe.batch,
        "lr": learning_rate(step, member), "gradient_norm": norm, "tokens": pairs.tokens(batch),
        "seconds": time.perf_counter() - begun,
    }  # fmt: skip
    return row, stopping > 0


def _clipped(module: Any, most: float) -> float:
    """The norm of all gradients together, on whatever rank their parts are, before it is brought down to `most`."""
    norm: Any = torch.nn.utils.clip_grad_norm_(module.parameters(), most)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _passes(pairs: TrainingSet, batch: Integers, budget: int, ranks: int) -> list[list[Integers]]:
    """For each rank its forward passes, as many for each: ranks wait for one another in the last one."""
    shares = [batch[rank::ranks] for rank in range(ranks)]
    most = max(len(micro_batches(pairs.longest(share), budget)) for share in shares)
    return [[share[part] for part in micro_batches(pairs.longest(share), budget, most)] for share in shares]


def _seed(seed: int, step: int, rank: int) -> int:
    return int(numpy.random.SeedSequence([seed, step, rank]).generate_state(1, numpy.uint64)[0] >> 1)
