"""What several processes make of one member: the same weights as one, and with --shard less memory for each.

Three ways to train the same member: one process; two ranks that each hold the whole model (torchrun); two ranks that
each hold a part of it (torchrun, --shard). First on a small model, whether they come to the same; then on a larger one,
which memory a rank takes while it begins, in a step, when a checkpoint is written and when the model is saved. Memory
is what the process has for itself (RssAnon, asked for every 5 ms), less what it had before the member was begun; pages
of files, which the system can drop, are not counted. Each way runs in processes of its own, with one thread each.

    python benchmarks/ranks.py                   # 162M random weights, 10 GB of memory; nothing is downloaded
    python benchmarks/ranks.py --layers 4        # a smaller model
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import torch
from safetensors.torch import load_file
from training import make_pairs

from warmerge.training.head import head_digest
from warmerge.training.member import Member, Recipe, read_member, train_member
from warmerge.training.training_set import read_pairs, save_pairs

VOCABULARY = 8192
WAYS = {"one process": (1, False), "two ranks": (2, False), "two ranks, --shard": (2, True)}
# What a member does until each of its rows, and after the last one: a checkpoint is written at step 3 of 4.
PHASES = ("beginning and a step", "a step", "a step and a checkpoint", "a step and the model")
MEASURED = Recipe(steps=4, batch=2, warmup=0, schedule="constant", save_every=3, batch_tokens=256)
COMPARED = Recipe(steps=20, batch=8, warmup=2, save_every=8, batch_tokens=1024)


def make_decoder(folder: Path, width: int, layers: int) -> Path:
    """A Llama of random weights with one label, and a tokenizer of made-up words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, intermediate_size=int(2.75 * width), max_position_embeddings=512, num_labels=1,
        pad_token_id=0,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="w0", unk_token="w1", eos_token="w2", model_max_length=512
    ).save_pretrained(folder)
    return folder


def own_memory() -> int:
    """Bytes of this process that are no file's."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def rank(folder: Path) -> None:
    """One process: trains the member, and writes what memory it took until each row, and the seconds of each step."""
    import accelerate
    import transformers
    from torch.distributed.fsdp import fully_shard

    assert all((accelerate, transformers, fully_shard))  # what is imported later would be counted
    member = read_member(folder / "member.json")
    pairs = read_pairs(folder.parent / "pairs.safetensors", "")
    bare, peaks, phase, done = own_memory(), [0] * (member.recipe.steps + 1), 0, threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peaks[phase] = max(peaks[phase], own_memory() - bare)

    thread = threading.Thread(target=watch)
    thread.start()
    seconds, begun = [], time.perf_counter()
    for row in train_member(member, folder.parent / "init", pairs, folder):
        phase = row["step"]
        seconds.append(row["seconds"])
    done.set()
    thread.join()
    number = os.environ.get("RANK", "0")
    content = {"peaks": peaks, "seconds": seconds, "all": time.perf_counter() - begun}
    (folder / f"measured-{number}.json").write_text(json.dumps(content))


def trained(place: Path, way: str, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """Trains a member in PLACE/way: what each of its processes measured."""
    ranks, shard = WAYS[way]
    folder = place / way.replace(" ", "-")
    folder.mkdir()
    digest = head_digest(place / "init")
    member = Member("01", "init", digest, "", 1e-4, 0.0, 0, Recipe(**recipe | {"shard": shard}))
    (folder / "member.json").write_text(json.dumps(asdict(member)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    subprocess.run(
        [sys.executable, *launcher, __file__, "--rank", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True,
    )  # fmt: skip
    return [json.loads((folder / f"measured-{number}.json").read_text()) for number in range(ranks)]


def compare(place: Path) -> None:
    """A table of how far apart the members are that the three ways leave."""
    make_decoder(place / "init", 128, 2)
    save_pairs(make_pairs(COMPARED.steps * COMPARED.batch, VOCABULARY, 0), place / "pairs.safetensors", "")
    print("| the member of | and of | largest relative difference of a tensor | of a loss | of a gradient norm |")
    print("|---|---|---|---|---|")
    for way in WAYS:
        trained(place, way, asdict(COMPARED))
    names = list(WAYS)
    for one, other in ((names[0], names[1]), (names[1], names[2])):
        folders = [place / way.replace(" ", "-") for way in (one, other)]
        first, second = (load_file(folder / "model.safetensors") for folder in folders)
        weights = max(float((first[name] - second[name]).norm() / first[name].norm()) for name in first)
        rows = [[json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()] for folder in folders]
        apart = [max(abs(a[key] / b[key] - 1) for a, b in zip(*rows, strict=True)) for key in ("loss", "gradient_norm")]
        print(f"| {one} | {other} | {weights:.1e} | {apart[0]:.1e} | {apart[1]:.1e} |")


def measure(place: Path, width: int, layers: int) -> None:
    """A table of the largest memory of a rank, in bytes for each parameter and in MB."""
    from safetensors import safe_open

    make_decoder(place / "init", width, layers)
    with safe_open(place / "init" / "model.safetensors", framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - not a dict
    parameters = sum(torch.Size(shape).numel() for shape in shapes)
    save_pairs(make_pairs(MEASURED.steps * MEASURED.batch, VOCABULARY, 0), place / "pairs.safetensors", "")
    print(f"\n{parameters / 1e6:.0f}M parameters, {layers} layers; MB (bytes for each parameter)\n")
    print(f"| way | rank | {' | '.join(PHASES)} | s a step |")
    print(f"|---|---|{'---|' * (len(PHASES) + 1)}")
    for way in WAYS:
        for number, found in enumerate(trained(place, way, asdict(MEASURED))):
            # The model is saved after the last row is given out, so the last step's own memory counts there too.
            *earlier, last, saved = found["peaks"]
            cells = [f"{n / 1e6:,.0f} ({n / parameters:.1f})" for n in (*earlier, max(last, saved))]
            print(f"| {way} | {number} | {' | '.join(cells)} | {min(found['seconds']):.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="hidden size of the larger model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=12, help="of the larger model")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank(arguments.rank)
        return
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, ", end="")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, gloo, float32\n")
    with tempfile.TemporaryDirectory() as place:
        compare(Path(place))
    with tempfile.TemporaryDirectory() as place:
        measure(Path(place), arguments.width, arguments.layers)


if __name__ == "__main__":
    main()
