"""Supervised fine-tuning on the chosen answers, with checkpoints kept on the way: the starts of Baklava.

WARM, section 3.1 (arXiv 2401.12187): runs that start from different checkpoints of one trajectory differ more, and are
still connected. The paper takes 12k steps of 128 texts at 1e-5, and the checkpoints of 8k, 10k and 12k.

    OUT/sft.json       what was asked, and how many texts were cut
    OUT/step-8000/     a causal language model with its tokenizer, in the dtype of its source
    OUT/rows.jsonl     a row each step; written last
    OUT/working/       TRL's own checkpoints, while it trains

TRL's SFTTrainer is given token ids, labels, and the order of its texts, so that it has nothing left to decide.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from warmerge.errors import Finding, RefusedError, UsageError, WarmergeError, plain
from warmerge.rewards.layouts import canonical
from warmerge.rewards.render import Encoded, Renderer
from warmerge.rewards.tokenizer import open_renderer, quiet
from warmerge.training.answers import tokenise_answers
from warmerge.training.language_model import open_language_model, write_language_model
from warmerge.training.trl_checkpoints import (
    checkpoints_in,
    finish_checkpoint,
    last_checkpoint,
    remove_partial,
    step_of,
)
from warmerge.weights.checkpoint import Checkpoint
from warmerge.weights.locate import make_local, open_checkpoint
from warmerge.weights.samples import read_sample

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from warmerge.rewards.layouts import Text

    Integers = NDArray[numpy.int64]

RECORD, ROWS, WORKING = "sft.json", "rows.jsonl", "working"
# No label: the loss leaves the token out.
_IGNORED = -100


@dataclass(frozen=True)
class SftRecipe:
    """How a language model is fine-tuned before it becomes a start.

    `steps` of `batch` texts each at a constant learning rate; `checkpoints` are kept. `precision` is what the model
    computes in; its weights are float32 while it trains. `batch_tokens` is the most in one forward pass, padding
    included; a longer text passes alone. `max_length` is in tokens, None for as many as the model takes. Every
    `save_every` steps a checkpoint is written to go on from; it is the only field that does not change what comes out.

    Raises:
        UsageError: values out of their range; all of them are named.
    """

    steps: int
    checkpoints: int = 3
    batch: int = 32
    lr: float = 1e-5
    seed: int = 0
    batch_tokens: int = 8192
    precision: str = "float32"
    gradient_checkpointing: bool = False
    max_length: int | None = None
    trust_remote_code: bool = False
    save_every: int = 500

    def __post_init__(self) -> None:
        counts = ("steps", "checkpoints", "batch", "batch_tokens", "save_every")
        wrong = [(name, "1 or more") for name in counts if getattr(self, name) < 1]
        wrong += [("lr", "a number above 0")] if not 0 < self.lr < math.inf else []
        wrong += [("seed", "0 or more")] if self.seed < 0 else []
        precisions = ("float32", "bfloat16")
        wrong += [("precision", " or ".join(precisions))] if self.precision not in precisions else []
        if wrong:
            said = [f"{name}: expected {expected}, found {getattr(self, name)}" for name, expected in wrong]
            raise UsageError(f"supervised fine-tuning: {'; '.join(said)}")
        kept_steps(self.steps, self.checkpoints)


def kept_steps(steps: int, checkpoints: int) -> list[int]:
    """After which steps a checkpoint is kept: evenly over the last third, the last step among them.

    Raises:
        UsageError: the last third has fewer steps.

    >>> kept_steps(12000, 3), kept_steps(100, 1), kept_steps(10, 2)
    ([8000, 10000, 12000], [100], [7, 10])
    """
    if checkpoints == 1:
        return [steps]
    kept = numpy.linspace(steps * 2 / 3, steps, checkpoints).round().astype(int).tolist()
    if kept[0] < 1 or len(set(kept)) < checkpoints:
        raise UsageError(f"{checkpoints} checkpoints do not fit in the last third of {steps} steps; ask for fewer")
    return list(kept)


def fine_tune(
    source: Path,
    texts: Sequence[tuple[Text, Text]],
    out: Path,
    recipe: SftRecipe,
    template: str = "auto",
    progress: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> list[Path]:
    """The kept checkpoints, `out`/step-N, oldest first. The loss is on the answers and their end, not on prompts.

    An interrupted call that is made again goes on from its last checkpoint, to the same weights; one that was finished
    returns at once. Under torchrun every rank calls this function, and each batch is split between them.

    Args:
        source: folder of a causal language model with its tokenizer.
        texts: (prompt, answer) each. Those that are cut are counted in `out`/sft.json.
        template: auto, chat or plain: the rule of the reward models that will start here.
        progress: is given a row each step: step, loss (nats per answer token), lr, gradient_norm.

    Raises:
        UsageError: TRL is missing; `out` holds something else; values that cannot be used.
        RefusedError: no causal language model; weights that are missing or not known; texts that cannot be rendered.
        WarmergeError: the loss or the gradient is not finite.
    """
    (local,) = make_local([open_checkpoint(source)])
    asked = _asked(local, texts, recipe, template)
    _refuse_other(out, asked)
    kept = {step: out / f"step-{step}" for step in kept_steps(recipe.steps, recipe.checkpoints)}
    if not ((out / ROWS).exists() and all(folder.is_dir() for folder in kept.values())):
        _train(local, texts, out, recipe, asked, kept, progress)
    return list(kept.values())


# --- what was asked ---------------------------------------------------------------------------------------------------


def _asked(source: Checkpoint, texts: Sequence[tuple[Text, Text]], recipe: SftRecipe, template: str) -> dict[str, Any]:
    """All that the checkpoints depend on."""
    digest = hashlib.sha256()
    for prompt, answer in texts:
        digest.update(canonical([prompt, answer]).encode() + b"\n")
    settings = asdict(recipe)
    del settings["save_every"]
    return {"source": read_sample(source).fingerprint, "texts": digest.hexdigest(), "template": template, **settings}


def _refuse_other(out: Path, asked: Mapping[str, Any]) -> None:
    """Goes on only with what was begun with the same source, texts and recipe."""
    # The trainer makes its folder before the record is written.
    if not out.exists() or (out.is_dir() and {path.name for path in out.iterdir()} <= {WORKING, f".{RECORD}.partial"}):
        return
    try:
        earlier = json.loads((out / RECORD).read_text(encoding="utf-8"))["asked"]
    except (OSError, ValueError, KeyError, TypeError):
        what = f"{plain(str(out))} is not an interrupted fine-tuning (no readable {RECORD}); choose another folder"
        raise UsageError(what) from None
    differing = [key for key in asked if earlier.get(key) != asked[key]]
    if differing:
        what = f"{plain(str(out))} holds a fine-tuning with other {', '.join(differing)}"
        raise UsageError(f"{what}; choose another folder, or delete it")


# --- training ---------------------------------------------------------------------------------------------------------


def _in_order(lengths: Integers, recipe: SftRecipe) -> Integers:
    """Which text comes when, (steps * batch,): epochs without a gap, within a step the longest first."""
    n, needed = len(lengths), recipe.steps * recipe.batch
    epochs = [numpy.random.default_rng([recipe.seed, epoch]).permutation(n) for epoch in range(-(-needed // n))]
    order = numpy.concatenate(epochs)[:needed].reshape(recipe.steps, recipe.batch)
    return numpy.take_along_axis(order, numpy.argsort(-lengths[order], axis=1, kind="stable"), axis=1).reshape(-1)


def _train(
    source: Checkpoint,
    texts: Sequence[tuple[Text, Text]],
    out: Path,
    recipe: SftRecipe,
    asked: Mapping[str, Any],
    kept: Mapping[int, Path],
    progress: Callable[[Mapping[str, Any]], None],
) -> None:
    _need_trl()
    module = open_language_model(source, recipe.trust_remote_code)
    renderer = open_renderer(source, module, str(asked["template"]), recipe.max_length, True, recipe.trust_remote_code)
    made = tokenise_answers(renderer, texts)
    counts = {
        "texts": len(made),
        "prompts_cut": sum(entry.prompt_cut for entry, _ in made),
        "answers_cut": sum(entry.answer_cut for entry, _ in made),
        "without_answer": sum(begin >= len(entry.ids) for entry, begin in made),
    }
    if counts["without_answer"] == len(made):
        raise RefusedError([Finding("data", "no text has an answer: there is nothing to fine-tune on")])
    working = out / WORKING
    with quiet():
        trainer = _trainer(module, renderer, made, recipe, working)
        wait = trainer.accelerator.wait_for_everyone
        wait()  # until every rank has looked at what lies in `out`
        if trainer.is_world_process_zero():
            _prepare(out, {"asked": asked, **counts})
        wait()

        def write(folder: Path) -> None:
            state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
            if trainer.is_world_process_zero():
                write_language_model(
                    source, renderer.tokenizer, trainer.accelerator.unwrap_model(trainer.model), state, folder
                )

        trainer.add_callback(_keeping(working, kept, write, wait, progress))
        last = last_checkpoint(working)
        if last is None or step_of(last) < recipe.steps:
            with checkpoints_in(working):
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if trainer.is_world_process_zero():
        last = last_checkpoint(working)
        assert last is not None, "the last step is kept"
        history = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        _write(out / ROWS, "".join(json.dumps(_row(entry)) + "\n" for entry in history if "loss" in entry))
        shutil.rmtree(working)
    wait()


def _prepare(out: Path, record: Mapping[str, Any]) -> None:
    """The record, and beside it no checkpoint that does not belong to it or was not written to its end."""
    if (out / RECORD).exists():
        remove_partial(out / WORKING)
    else:
        shutil.rmtree(out / WORKING, ignore_errors=True)
    _write(out / RECORD, json.dumps(record, indent=2) + "\n")


def _need_trl() -> None:
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--sft-steps needs TRL ({error}): pip install 'warmerge[train]'") from error


def _trainer(
    module: Any, renderer: Renderer, made: Sequence[tuple[Encoded, int]], recipe: SftRecipe, working: Path
) -> Any:
    """TRL's trainer, with everything said that it would choose by itself."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    class Trainer(SFTTrainer):  # type: ignore[misc]
        def _send_telemetry(self) -> None:
            """Nothing: TRL pings the Hub from here, unless a variable was set before its first import."""

    known = SFTConfig.__dataclass_fields__
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    arguments = SFTConfig(
        output_dir=str(working), max_steps=recipe.steps, learning_rate=recipe.lr, lr_scheduler_type="constant",
        warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch", seed=recipe.seed,
        data_seed=recipe.seed, use_cpu=not torch.accelerator.is_available(),
        bf16=recipe.precision == "bfloat16", fp16=False, **{checkpointing: recipe.gradient_checkpointing},
        max_length=None, packing=False, padding_free=False, shuffle_dataset=False, loss_type="nll",
        label_smoothing_factor=0.0, train_sampling_strategy="sequential", ddp_find_unused_parameters=False,
        dataset_kwargs={"skip_prepare_dataset": True}, dataloader_pin_memory=torch.cuda.is_available(),
        logging_strategy="steps", logging_steps=1, logging_nan_inf_filter=False, report_to="none", disable_tqdm=True,
        save_strategy="steps", save_steps=recipe.save_every, eval_strategy="no", push_to_hub=False,
    )  # fmt: skip
    # The recipe's, not that of the environment which `accelerate launch` sets.
    arguments.mixed_precision = "bf16" if arguments.bf16 else "no"
    # One process, one device: with several in sight transformers would split each pass between them.
    arguments._n_gpu = min(1, arguments.n_gpu)
    lengths = numpy.array([len(entry.ids) for entry, _ in made])
    share, left = divmod(recipe.batch, arguments.world_size)
    if left:
        raise UsageError(f"a batch of {recipe.batch} texts cannot be split between {arguments.world_size} processes")
    sizes = [size for size in range(1, share + 1) if share % size == 0 and size * lengths.max() <= recipe.batch_tokens]
    arguments.per_device_train_batch_size = max(sizes, default=1)
    arguments.gradient_accumulation_steps = share // arguments.per_device_train_batch_size
    data = Dataset.from_dict(
        {
            "input_ids": [entry.ids.tolist() for entry, _ in made],
            "labels": [[_IGNORED] * begin + entry.ids[begin:].tolist() for entry, begin in made],
        }
    ).select(_in_order(lengths, recipe))
    # A collator of our own choice: TRL would make the end token the padding token of tokenizer and model, where there
    # is none. Any id will do, for padding is masked.
    pad = renderer.tokenizer.pad_token_id
    trainer = Trainer(
        model=module, args=arguments, train_dataset=data, processing_class=renderer.tokenizer,
        data_collator=DataCollatorForLanguageModeling(pad_token_id=0 if pad is None else pad),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # it prints rows to stdout
    return trainer


def _keeping(
    working: Path,
    kept: Mapping[int, Path],
    write: Callable[[Path], None],
    wait: Callable[[], None],
    progress: Callable[[Mapping[str, Any]], None],
) -> Any:
    """The callback that watches over the loss, reports rows, and keeps checkpoints. `wait` is for all ranks."""
    from transformers import TrainerCallback

    class Keeping(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save |= state.global_step in kept

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            # Before anything is saved of this step.
            if "loss" not in (logs or {}):
                return
            row = _row({**logs, "step": state.global_step})
            if not (math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])):
                what = f"loss {row['loss']:.4g}, gradient norm {row['gradient_norm']:.4g}; try a lower learning rate"
                raise WarmergeError(f"fine-tuning: step {state.global_step} is not finite ({what})")
            if state.is_world_process_zero:
                progress(row)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in kept:
                write(kept[state.global_step])
            wait()  # each rank writes a part of TRL's checkpoint
            if state.is_world_process_zero:
                finish_checkpoint(working, state.global_step)

    return Keeping()


def _row(logs: Mapping[str, Any]) -> dict[str, Any]:
    """A step as TRL logs it, in warmerge's words."""
    return {
        "step": logs["step"], "loss": logs["loss"], "lr": logs["learning_rate"], "gradient_norm": logs["grad_norm"],
    }  # fmt: skip


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
