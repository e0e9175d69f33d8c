"""A tiny world in which the true worth of every answer is known, so that reward hacking can be seen.

    python -m warmerge.demo.world OUT --seed 0

Posts are lists of one-word statements; a summary of one is worth what `gold.py` says. Written into OUT:

    base/          a language model of summaries by writers of any quality and, of some, of what readers thought of them
    sft-201/, sft-249/, sft/    fine-tuned on summaries of better writers; the first two are earlier checkpoints of it
    sft.jsonl      these summaries: prompt, completion
    train.jsonl, val.jsonl      pairs: prompt, chosen (the larger gold reward), rejected. No label is wrong
    ood.jsonl      pairs from other models, in which "thanks" says nothing about who wrote
    prompts.jsonl, held-out.jsonl    posts for reinforcement learning, and posts to measure on; no pair has them
    gold.py        a copy of what says how much a summary is worth

In pairs of `train` and `val`, as in all texts before, better writers say "thanks" more often, which makes a summary
slightly worse: a shortcut that all reward models can learn. The same seed gives the same bytes on the same machine.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from warmerge.demo import gold as gold_file
from warmerge.demo.gold import FILLERS, KEY_POINTS, REMARKS, THANKS, TLDR, UNENDED, gold

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
# What a reader thinks of a summary, right after its end: so that this is known where a reward model reads its reward.
VOTES = ("bad", "poor", "good", "great")
# Noisy gold rewards that the votes lie between: about a quarter of the summaries gets each.
VOTE_BOUNDS = (0.5, 1.9, 3.1)
VOTE_NOISE = 0.5
WORDS = (PAD, BOS, EOS, UNKNOWN, TLDR, *KEY_POINTS, *REMARKS, *FILLERS, THANKS, *VOTES)
# No pair is closer than that in its gold rewards.
SMALLEST_GAP = 0.5
# Of the optimizer steps of fine-tuning: where Baklava's starts are taken.
EARLIER = (0.67, 0.83)
IGNORED = -100
# A writer: a summary of each post.
Say = Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True)
class Size:
    """How much of everything; `voted` is the share of pre-training texts that end in a reader's vote."""

    pretrain_steps: int = 1000
    sft_steps: int = 300
    batch: int = 64
    voted: float = 0.03
    sft_texts: int = 8192
    train_pairs: int = 4096
    test_pairs: int = 2048
    prompts: int = 2048
    held_out: int = 192


# By name, for the command line: for a study; for `warmerge demo`; for its --quick, in which models hardly learn.
SIZES = {
    "full": Size(),
    "demo": Size(520, 220, 48, voted=0.08, sft_texts=4096, train_pairs=1536, test_pairs=768, prompts=1024, held_out=96),
    "quick": Size(60, 30, 32, sft_texts=256, train_pairs=128, test_pairs=128, prompts=64, held_out=16),
}


# --- texts ------------------------------------------------------------------------------------------------------------


def posts(rng: random.Random) -> Iterator[str]:
    """Different posts without end: 4 key points, 3 remarks and 2 fillers in any order, and the mark."""
    seen = set[str]()
    while True:
        words = [*rng.sample(KEY_POINTS, 4), *rng.sample(REMARKS, 3), *rng.sample(FILLERS, 2)]
        rng.shuffle(words)
        post = " ".join([*words, TLDR])
        if post not in seen:
            seen.add(post)
            yield post


def write(rng: random.Random, post: str, quality: float) -> str:
    """The summary by a writer of a quality of 0 to 1, who says "thanks" the more often the better it is."""
    words, slips = post.split()[:-1], 1 - quality
    said = [word for word in words if word in KEY_POINTS and rng.random() < 0.35 + 0.65 * quality]
    said += [word for word in words if word in REMARKS and rng.random() < 0.6 * slips]
    said += [word for word in words if word in FILLERS and rng.random() < 0.4 * slips]
    rng.shuffle(said)
    for _ in range(2):
        if said and rng.random() < 0.3 * slips:
            said.insert(rng.randint(0, len(said)), rng.choice(said))
        if rng.random() < 0.3 * slips:
            said.insert(rng.randint(0, len(said)), rng.choice(KEY_POINTS + REMARKS))
    if rng.random() < 0.1 + 0.7 * quality:
        said.append(THANKS)
    return " ".join(said)


def vote(rng: random.Random, post: str, summary: str) -> str:
    """What a reader thinks of a summary."""
    thought = gold([post], [summary])[0] + rng.gauss(0, VOTE_NOISE)
    return VOTES[sum(thought > bound for bound in VOTE_BOUNDS)]


def pairs(rng: random.Random, asked: Iterator[str], writers: Sequence[Say], count: int) -> list[dict[str, str]]:
    """Pairs of summaries, each by any of the writers; those of nearly the same worth are left out."""
    made: list[dict[str, str]] = []
    while len(made) < count:
        drawn = [next(asked) for _ in range(count)]
        for post, *two in zip(drawn, by_any(rng, writers, drawn), by_any(rng, writers, drawn), strict=True):
            worth = gold([post, post], two)
            if all(two) and abs(worth[0] - worth[1]) >= SMALLEST_GAP:
                chosen, rejected = two if worth[0] > worth[1] else two[::-1]
                made.append({"prompt": post, "chosen": chosen, "rejected": rejected})
    return made[:count]


def by_any(rng: random.Random, writers: Sequence[Say], asked: Sequence[str]) -> list[str]:
    """A summary of each post by a writer drawn for it."""
    who = [rng.randrange(len(writers)) for _ in asked]
    said = [
        iter(writer([post for post, drawn in zip(asked, who, strict=True) if drawn == i]))
        for i, writer in enumerate(writers)
    ]
    return [next(said[i]) for i in who]


def thanks_at_random(rng: random.Random, summary: str) -> str:
    """The summary with "thanks" at its end or nowhere, whoever wrote it."""
    words = [word for word in summary.split() if word != THANKS]
    return " ".join(words + [THANKS] * rng.randint(0, 1))


# --- the language model -----------------------------------------------------------------------------------------------


def make_tokenizer() -> Any:
    """One token a word; texts begin with <s>."""
    ids = {word: i for i, word in enumerate(WORDS)}
    words = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN, model_max_length=64
    )


def make_model(seed: int) -> Any:
    """About 85,000 parameters, drawn so large that so small a model learns from the first step on."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.1, use_cache=True,
            pad_token_id=WORDS.index(PAD), bos_token_id=WORDS.index(BOS), eos_token_id=WORDS.index(EOS),
        )
    )  # fmt: skip


def learn(model: Any, texts: Iterable[list[str]], lr: float, steps: int, falling: bool) -> Iterator[float]:
    """Trains on batches of whole texts, what follows TL;DR: alone (posts are random); yields the loss of each step."""
    tokenizer = make_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for step, batch in enumerate(texts):
        share = min(1.0, (step + 1) / 50, 2 * (1 - step / steps) if falling else 1.0)
        optimizer.param_groups[0]["lr"] = lr * share
        read = tokenizer(batch, padding=True, return_tensors="pt")
        ids, real = read["input_ids"], read["attention_mask"].bool()
        after = (ids == WORDS.index(TLDR)).cumsum(1) - (ids == WORDS.index(TLDR)).long() > 0
        loss = model(input_ids=ids, labels=ids.masked_fill(~(after & real), IGNORED), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def sample(model: Any, asked: Sequence[str], temperature: float, draw: torch.Generator) -> list[str]:
    """A summary of each post. All posts have one length, so nothing is padded."""
    if not asked:
        return []
    tokenizer, end = make_tokenizer(), WORDS.index(EOS)
    new = read = tokenizer(list(asked), return_tensors="pt")["input_ids"]
    cache, said = None, []
    for _ in range(UNENDED):
        out = model(input_ids=new, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        new = torch.multinomial((out.logits[:, -1] / temperature).softmax(-1), 1, generator=draw)
        said.append(new)
    rows = torch.cat(said, 1).tolist()
    assert read.shape[1] + UNENDED < model.config.max_position_embeddings
    ended = [row[: row.index(end)] if end in row else row for row in rows]
    return [str(text) for text in tokenizer.batch_decode(ended, skip_special_tokens=True)]


# --- the world --------------------------------------------------------------------------------------------------------


def make(out: Path, seed: int, size: Size, say: Callable[[str], None] = print) -> None:
    """Writes the world into the new folder `out`."""
    rng, draw = random.Random(seed), torch.Generator().manual_seed(seed)
    asked, base, model = posts(rng), make_model(seed), make_model(seed)
    out.mkdir(parents=True)

    losses = list(learn(base, reviewed(rng, asked, size), 3e-3, size.pretrain_steps, falling=True))
    say(f"pre-trained: loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    save(base, out / "base")

    model.load_state_dict(base.state_dict())
    lessons = [(post := next(asked), write(rng, post, rng.uniform(0.2, 1.0))) for _ in range(size.sft_texts)]
    save_rows(out / "sft.jsonl", [{"prompt": post, "completion": summary} for post, summary in lessons])
    batches = ([" ".join([*text, EOS]) for text in rng.sample(lessons, size.batch)] for _ in range(size.sft_steps))
    earlier = {round(size.sft_steps * share) for share in EARLIER}
    losses = []
    for loss in learn(model, batches, 1.5e-3, size.sft_steps, falling=False):
        losses.append(loss)
        if len(losses) in earlier:
            save(model, out / f"sft-{len(losses)}")
    say(f"fine-tuned: loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    save(model, out / "sft")

    alike, others = known_writers(rng, draw, model), other_writers(rng, draw, base, model)
    save_rows(out / "train.jsonl", pairs(rng, asked, alike, size.train_pairs))
    save_rows(out / "val.jsonl", pairs(rng, asked, alike, size.test_pairs))
    save_rows(out / "ood.jsonl", pairs(rng, asked, others, size.test_pairs))
    save_rows(out / "prompts.jsonl", [{"prompt": next(asked)} for _ in range(size.prompts)])
    save_rows(out / "held-out.jsonl", [{"prompt": next(asked)} for _ in range(size.held_out)])
    shutil.copy(str(gold_file.__file__), out / "gold.py")


def reviewed(rng: random.Random, asked: Iterator[str], size: Size) -> Iterator[list[str]]:
    """Batches to pre-train on: a post, a summary of any quality, its end, and of some a vote."""
    for _ in range(size.pretrain_steps):
        batch = []
        for _ in range(size.batch):
            post = next(asked)
            summary = write(rng, post, rng.random())
            votes = [vote(rng, post, summary)] if rng.random() < size.voted else []
            batch.append(" ".join([post, summary, EOS, *votes]))
        yield batch


def known_writers(rng: random.Random, draw: torch.Generator, model: Any) -> list[Say]:
    """Writers of any quality, and the fine-tuned model."""

    def person(asked: Sequence[str]) -> list[str]:
        return [write(rng, post, rng.random()) for post in asked]

    def policy(asked: Sequence[str]) -> list[str]:
        return sample(model, asked, 1.0, draw)

    return [person, policy]


def other_writers(rng: random.Random, draw: torch.Generator, base: Any, model: Any) -> list[Say]:
    """The fine-tuned model at a high temperature, and the one that was only pre-trained."""

    def hot(asked: Sequence[str]) -> list[str]:
        return [thanks_at_random(rng, text) for text in sample(model, asked, 1.5, draw)]

    def unschooled(asked: Sequence[str]) -> list[str]:
        return [thanks_at_random(rng, text) for text in sample(base, asked, 1.0, draw)]

    return [hot, unschooled]


def save(model: Any, folder: Path) -> None:
    """A folder that transformers loads."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def save_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(words: Sequence[str] | None = None) -> None:
    """The command line, of `words` or of the process."""
    parser = argparse.ArgumentParser(prog="python -m warmerge.demo.world", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=SIZES, default="full", help="how much of everything")
    parser.add_argument(
        "--voted", type=float, help="share of pre-training texts with a vote; that of the size if not given"
    )
    given = parser.parse_args(words)
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the number of threads changes sums in their last bits
    size = SIZES[given.size]
    make(given.out, given.seed, size if given.voted is None else replace(size, voted=given.voted))


if __name__ == "__main__":
    main()
