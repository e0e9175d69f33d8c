"""How fast a member trains: warmerge against TRL's RewardTrainer, on the same pairs in the same order.

All start from the same reward model, in float32 without dropout, with as many pairs in a step, the same AdamW, constant
learning rate and clipping. TRL is given token ids, and makes its own batches: a step's pairs, padded to the longest.
A third program lets transformers group pairs by length over the whole set; its steps are of other pairs, so its losses
are not comparable step by step. warmerge runs with its own most tokens a pass, and with fewer. The first step is not
timed. Tokens are those of the texts, without padding. CPU seconds are what to compare on a machine that is shared.

    python benchmarks/training.py                  # an encoder of 22M random weights; nothing is downloaded
    python benchmarks/training.py --model FOLDER   # a reward model
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import numpy
import torch

from warmerge.rewards.tokenizer import quiet
from warmerge.training.head import head_digest
from warmerge.training.member import Member, Recipe, train_member
from warmerge.training.training_set import TrainingSet, batch_of, micro_batches

VOCABULARY = 30522
LR = 2e-5


@dataclass(frozen=True)
class Measured:
    """A program's steps: losses, and of those that were timed the tokens without and with padding, wall seconds and CPU
    seconds of all threads."""

    losses: list[float]
    tokens: int
    padded: int
    seconds: float
    cpu: float


def make_encoder(folder: Path) -> Path:
    """A BERT of 6 layers, 384 wide, with one label and a tokenizer of made-up words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert", vocab_size=VOCABULARY, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=1536, max_position_embeddings=512, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])}
    words |= {f"w{i}": i for i in range(len(words), VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=512,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_pairs(n: int, vocabulary: int, pad: int | None) -> TrainingSet:
    """Pairs of texts of 30 to 256 tokens, log-normal around 100: half a shared prompt, half an answer of its own.

    Chosen answers take more of their tokens from one half of the vocabulary, so that there is something to learn.
    """
    rng = numpy.random.default_rng(0)
    low, high = vocabulary // 30, vocabulary

    def words() -> numpy.ndarray[Any, Any]:
        return rng.integers(low, high, int(rng.lognormal(numpy.log(50), 0.6)))

    texts = []
    for _ in range(n):
        prompt = words()
        for share in (0.7, 0.3):
            answer = words()
            answer = numpy.where(rng.random(len(answer)) < share, low + (answer - low) // 2, answer)
            body = numpy.concatenate([prompt, answer])
            body = numpy.resize(body, min(max(len(body), 28), 254))
            texts.append(numpy.concatenate([[2], numpy.where(body == pad, low, body), [3]]))
    starts = numpy.concatenate([[0], numpy.cumsum([len(text) for text in texts])])
    chosen = numpy.arange(0, 2 * n, 2)
    return TrainingSet(numpy.concatenate(texts), starts, chosen, chosen + 1, numpy.zeros(n))


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def by_warmerge(init: Path, pairs: TrainingSet, steps: int, batch: int, folder: Path, batch_tokens: int) -> Measured:
    recipe = Recipe(
        steps=steps, batch=batch, warmup=0, schedule="constant", save_every=steps + 1, batch_tokens=batch_tokens
    )
    member = Member("01", "init", head_digest(init), "", LR, 0.0, 0, recipe)
    rows, ends = [], []
    for row in train_member(member, init, pairs, folder):
        rows.append(row)
        ends.append(clock())
    # As a step deals them out: pairs of similar length together, as many as fit in the recipe's tokens.
    padded = 0
    for step in range(1, steps):
        lengths = pairs.longest(batch_of(step, len(pairs), batch, 0))
        padded += sum(2 * len(part) * int(lengths[part].max()) for part in micro_batches(lengths, recipe.batch_tokens))
    tokens = sum(row["tokens"] for row in rows[1:])
    wall, cpu = (after - before for before, after in zip(ends[0], ends[-1], strict=True))
    return Measured([row["loss"] for row in rows], tokens, padded, wall, cpu)


def by_trl(init: Path, pairs: TrainingSet, steps: int, batch: int, folder: Path, grouped: bool) -> Measured:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    dealt = numpy.concatenate([batch_of(step, len(pairs), batch, 0) for step in range(steps)])
    data = Dataset.from_dict(
        {
            "chosen_ids": [pairs.text(pairs.chosen[k]).tolist() for k in dealt],
            "rejected_ids": [pairs.text(pairs.rejected[k]).tolist() for k in dealt],
            **({"length": pairs.longest(dealt).tolist()} if grouped else {}),
        }
    )
    with quiet():
        module = AutoModelForSequenceClassification.from_pretrained(init, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(init)
    ends: list[tuple[float, float]] = []
    sizes: list[tuple[int, int]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(clock())

    padding = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)

    def counted(examples: list[dict[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = padding(examples)
        sizes.append((int(made["attention_mask"].sum()), made["attention_mask"].numel()))
        return made

    arguments = RewardConfig(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch, learning_rate=LR,
        lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch",
        bf16=False, activation_checkpointing=False, disable_dropout=True, max_length=None, save_strategy="no",
        report_to="none", logging_steps=1, disable_tqdm=True, use_cpu=not torch.accelerator.is_available(),
        train_sampling_strategy="group_by_length" if grouped else "sequential",
        remove_unused_columns=not grouped,
    )  # fmt: skip
    with quiet():
        trainer = RewardTrainer(
            model=module, args=arguments, train_dataset=data, processing_class=tokenizer, data_collator=counted
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Clock())
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    timed = sizes[1:steps]
    wall, cpu = (after - before for before, after in zip(ends[0], ends[-1], strict=True))
    return Measured(losses, sum(n for n, _ in timed), sum(n for _, n in timed), wall, cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a reward model's folder")
    parser.add_argument("--steps", type=int, default=6, help="of each program; the first is not timed")
    parser.add_argument("--batch", type=int, default=32, help="pairs in a step")
    parser.add_argument("--repeat", type=int, default=3, help="how often all programs are run in turn")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="most tokens a pass in warmerge's second turn")
    parser.add_argument("--threads", type=int, help="of torch; its own choice if not given")
    parser.add_argument("--count-padding", action="store_true", help="only count padding over 200 steps")
    arguments = parser.parse_args()
    if arguments.count_padding:
        count_padding((Recipe.batch_tokens, arguments.batch_tokens))
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}")
    steps, batch = arguments.steps, arguments.batch
    with tempfile.TemporaryDirectory() as place:
        init = arguments.model or make_encoder(Path(place) / "init")
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(init).get_text_config()
        pairs = make_pairs(steps * batch, config.vocab_size, config.pad_token_id)
        programs = {
            "TRL": partial(by_trl, init, pairs, steps, batch, grouped=False),
            "TRL, grouped by length": partial(by_trl, init, pairs, steps, batch, grouped=True),
            **{
                f"warmerge, {budget:,} tokens a pass": partial(
                    by_warmerge, init, pairs, steps, batch, batch_tokens=budget
                )
                for budget in (Recipe.batch_tokens, arguments.batch_tokens)
            },
        }
        found: dict[str, list[Measured]] = {name: [] for name in programs}
        for turn in range(arguments.repeat):
            for k, (name, program) in enumerate(programs.items()):
                folder = Path(place) / f"{turn}-{k}"
                folder.mkdir()
                found[name].append(program(folder=folder))
    report(found, steps, batch)


def count_padding(budgets: tuple[int, ...], steps: int = 200) -> None:
    """A table of the share of padding: a step's texts padded to the longest, and in passes of like length."""
    pairs = make_pairs(6400, VOCABULARY, 0)
    names = " | ".join(f"warmerge, {budget:,} tokens a pass (passes a step)" for budget in budgets)
    print(f"| pairs a step | all padded to the longest | {names} |\n|---|---|{'---|' * len(budgets)}")
    for batch in (8, 16, 32, 128):
        dealt = [batch_of(step, len(pairs), batch, 0) for step in range(steps)]
        tokens = sum(pairs.tokens(part) for part in dealt)
        lengths = [pairs.longest(part) for part in dealt]
        cells = [f"{1 - tokens / sum(2 * batch * int(own.max()) for own in lengths):.0%}"]
        for budget in budgets:
            passes = [own[part] for own in lengths for part in micro_batches(own, budget)]
            padded = sum(2 * len(part) * int(part.max()) for part in passes)
            cells.append(f"{1 - tokens / padded:.0%} ({len(passes) / steps:.1f})")
        print(f"| {batch} | {' | '.join(cells)} |")


def report(found: dict[str, list[Measured]], steps: int, batch: int) -> None:
    """A table of medians, and how far apart the losses of warmerge and TRL are."""
    trl, *_, ours = found.values()
    timed = steps - 1
    print(f"{batch} pairs a step, {trl[0].tokens / timed / batch / 2:.0f} tokens a text on average\n")
    print(f"| program | s a step | CPU s a step | tokens/CPU s | x TRL | padding | loss at steps 1 and {steps} |")
    print("|---|---|---|---|---|---|---|")
    rates = {name: statistics.median(run.tokens / run.cpu for run in runs) for name, runs in found.items()}
    for name, runs in found.items():
        wall, cpu = (sorted(getattr(run, kind) / timed for run in runs) for kind in ("seconds", "cpu"))
        print(
            f"| {name} | {statistics.median(wall):.2f} | "
            f"{statistics.median(cpu):.2f} ({cpu[0]:.2f} to {cpu[-1]:.2f}) | {rates[name]:,.0f} | "
            f"{rates[name] / rates['TRL']:.2f} | {1 - runs[0].tokens / runs[0].padded:.0%} | "
            f"{runs[0].losses[0]:.6f}, {runs[0].losses[-1]:.6f} |"
        )
    apart = max(abs(a - b) for a, b in zip(ours[0].losses, trl[0].losses, strict=True))
    print(f"\nLargest difference between the losses of warmerge and TRL at any step: {apart:.1e}")


if __name__ == "__main__":
    main()
