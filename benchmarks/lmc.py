"""How fast `warmerge lmc-curve` is: against merging to disk, loading and evaluating each of its points.

The other way is what people write: `warmerge average --rule lambda` into a folder, AutoModelForSequenceClassification,
batches padded to their longest text, and the accuracies; the folder is removed again. Both give the same accuracies.

    python benchmarks/lmc.py RM_A RM_B PAIRS.jsonl --work FOLDER --limit 200 --max-length 128
    python benchmarks/lmc.py RM_A RM_B --long-prompts --work FOLDER --max-length 1024 --points 3

`--long-prompts` makes up its pairs: two prompts of 512 words with 16 answers each, as best-of-n data has them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from datetime import date
from pathlib import Path

import numpy
import torch
from scoring import make_texts, padded_loop

import warmerge
from warmerge.rewards.model import load_reward_model
from warmerge.rewards.pairs import read_preferences, unique_texts


def by_way_of_the_disk(
    arguments: argparse.Namespace, options: warmerge.LoadOptions, lambdas: list[float]
) -> list[float]:
    """Accuracy at each lambda: merge, write, load, score every text of every pair, remove."""
    texts = unique_texts(read_preferences(arguments.data, limit=arguments.limit))
    accuracies = []
    for lam in lambdas:
        out = Path(arguments.work) / "point"
        warmerge.average([arguments.a, arguments.b], out, rule="lambda", lam=lam)
        model = load_reward_model(out, options)
        rewards = padded_loop(model, list(texts.texts))
        right = [
            min(rewards[list(c)]) >= max(rewards[list(r)]) for c, r in zip(texts.chosen, texts.rejected, strict=True)
        ]
        accuracies.append(float(numpy.mean(right)))
        shutil.rmtree(out)
    return accuracies


def write_long_prompts(folder: Path) -> Path:
    """A file of pairs that share long prompts: each prompt has 16 answers, in 8 pairs."""
    texts = make_texts(prompts=2, prompt_tokens=512, answers=16)
    pairs = zip(texts[::2], texts[1::2], strict=True)
    rows = [{"prompt": prompt, "chosen": a, "rejected": b} for (prompt, a), (_, b) in pairs]
    path = folder / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--long-prompts", action="store_true")
    parser.add_argument("--work", required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--points", type=int, default=11)
    arguments = parser.parse_args()
    if arguments.long_prompts:
        arguments.data = str(write_long_prompts(Path(arguments.work)))
    options = warmerge.LoadOptions(template="plain", max_length=arguments.max_length, dtype="float32")
    measuring = warmerge.Measuring(options, limit=arguments.limit)
    lambdas = [i / (arguments.points - 1) for i in range(arguments.points)]
    load_reward_model(arguments.a, options)  # imports and the page cache, before the clock starts
    begun = time.perf_counter()
    curve = warmerge.lmc_curve([arguments.a, arguments.b], [arguments.data], lambdas=lambdas, measuring=measuring)
    ours = time.perf_counter() - begun
    begun = time.perf_counter()
    theirs = by_way_of_the_disk(arguments, options, lambdas)
    disk = time.perf_counter() - begun
    different = max(abs(row["wa"] - other) for row, other in zip(curve.rows, theirs, strict=True))
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}\n")
    print("| pairs | points | lmc-curve s | merge, load, evaluate s | ratio | largest difference in accuracy |")
    print("|---|---|---|---|---|---|")
    n = curve.rows[0]["n"]
    print(f"| {n} | {len(lambdas)} | {ours:.1f} | {disk:.1f} | {disk / ours:.2f} | {different:.4f} |")


if __name__ == "__main__":
    main()
