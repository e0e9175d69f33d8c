"""A folder with everything that the commands of README and examples name: tiny models, pairs, pools and results.

`NAMES` is the table: a new name is one line. Builders are called in its order, so that a later one may use
earlier names.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import causal_models
import policy_runs
import pytest
import tiny_models
import torch
from conftest import write_checkpoint
from reward_world import pairs
from safetensors.torch import load_file
from test_cli import here

import warmerge

Build = Callable[[Path], object]
WORDS = ("a", "clear", "kind", "right", "short", "true", "useful", "cruel", "false", "harsh", "long", "rude", "vague")
# A true reward that is a rule, as of the tiny world: e's are good, and a long answer is not.
GOLD = """
def gold(prompts, completions, **columns):
    return [0.5 * text.count("e") - 0.05 * len(text) for text in completions]
"""


def build(root: Path) -> Path:
    """Makes all of NAMES in the empty folder `root`; builders find it as the current one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for place, make in NAMES.items():
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            make(Path(place))
            assert Path(place).exists(), place
    return root


# --- models -----------------------------------------------------------------------------------------------------------


def _start(kind: str) -> Any:
    return tiny_models.make_model(kind, **({"num_hidden_layers": 4} if kind == "bert" else {}))


def start(kind: str) -> Build:
    return lambda place: tiny_models.save(place, _start(kind), tiny_models.tokenizer(kind))


def member(kind: str, seed: int, shards: int = 1) -> Build:
    """The start of this kind, moved a little; in so many files."""

    def make(place: Path) -> None:
        module = _start(kind)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        tiny_models.save(place, module, tiny_models.tokenizer(kind))
        (place / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        if shards > 1:
            _reshard(place, load_file(place / "model.safetensors"), shards)

    return make


def changed(source: str, change: Callable[[dict[str, torch.Tensor]], object], shards: int = 3) -> Build:
    """A copy of an earlier checkpoint in one file, with other tensors."""

    def make(place: Path) -> None:
        shutil.copytree(source, place)
        tensors = load_file(place / "model.safetensors")
        change(tensors)
        _reshard(place, tensors, shards)

    return make


def _reshard(place: Path, tensors: Mapping[str, torch.Tensor], shards: int) -> None:
    (place / "model.safetensors").unlink()
    write_checkpoint(place, tensors, json.loads((place / "config.json").read_text()), shards)


def encoder(place: Path) -> None:
    """A pre-trained encoder without a head."""
    tiny_models.save(place, _start("bert").bert, tiny_models.tokenizer("bert"))


def policy(spread: float = 0.3) -> Build:
    """A language model with random weights so far apart."""
    return lambda place: causal_models.write(place, spread=spread)


def permuted(tensors: dict[str, torch.Tensor]) -> None:
    """The same function by other weights: hidden units of one layer in another order."""
    layer = "bert.encoder.layer.0."
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    for name in ("intermediate.dense.weight", "intermediate.dense.bias"):
        tensors[layer + name] = tensors[layer + name][order].contiguous()
    tensors[layer + "output.dense.weight"] = tensors[layer + "output.dense.weight"][:, order].contiguous()


def reinitialised(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= tiny_models.make_model("bert", num_hidden_layers=4, seed=77).state_dict()


def with_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["bert.encoder.layer.3.attention.self.value.weight"].view(-1)[5] = torch.nan


def headless(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["classifier.weight"], tensors["classifier.bias"]


def cut(place: Path) -> None:
    """A copy of rm-0 whose first file is truncated."""
    shutil.copytree("rm-0", place)
    file = place / "model-00001-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


# --- data -------------------------------------------------------------------------------------------------------------


def rows(made: Sequence[Mapping[str, Any]]) -> Build:
    """A .jsonl or .jsonl.gz file."""

    def make(place: Path) -> None:
        data = "".join(json.dumps(row) + "\n" for row in made).encode()
        place.write_bytes(gzip.compress(data) if place.suffix == ".gz" else data)

    return make


def prompts(count: int, seed: int) -> list[dict[str, str]]:
    return [{"prompt": f"Which words {seed} {i}?"} for i in range(count)]


def pool(count: int, each: int, gold: bool) -> list[dict[str, Any]]:
    source = random.Random(5)
    made = []
    for row in prompts(count, 5):
        answers = [" ".join(source.choices(WORDS, k=source.randint(2, 9))) for _ in range(each)]
        scores = {"gold": [float(text.count("e")) for text in answers]} if gold else {}
        made.append({**row, "candidates": answers, **scores})
    return made


def text(content: str) -> Build:
    return lambda place: place.write_text(content)


def same_as(name: str) -> Build:
    """A copy of an earlier name of this folder."""

    def make(place: Path) -> None:
        shutil.copytree(name, place)

    return make


# --- results ----------------------------------------------------------------------------------------------------------


def average_of(*members: str) -> Build:
    return lambda place: warmerge.average(members, place)


def result_of(*arguments: str) -> Build:
    """What a command writes into this folder; paths in `arguments` are those of NAMES."""

    def make(place: Path) -> None:
        done = here(*arguments, "-o", place)
        assert done.code == 0, (place, done.err)

    return make


def rl_runs(*names: str, seed: int = 0) -> Build:
    """Finished runs of `rl`, one of each proxy, with the policies that they kept; nothing is trained."""

    def make(place: Path) -> None:
        for i, name in enumerate(names):
            history = policy_runs.hacked(40, seed=10 * i + seed, top=14.0 + 4 * i)
            policy_runs.write_run(place / name, history, proxy=name, seed=seed)
            for step in (50, 100, 150, 200):
                shutil.copytree("world/sft", place / name / f"step-{step}")

    return make


_PROXIES = ("warm", "single-1", "single-2", "single-3", "ensemble", "true")
_MEMBERS = [f"members/{i:02d}" for i in range(1, 7)]
_FEW = ("--resamples", "100")
_PAIRS = {"pairs.jsonl": 48, "train.jsonl": 48, "select.jsonl": 16, "val.jsonl": 20, "test.jsonl": 20, "ood.jsonl": 20}

NAMES: dict[str, Build] = {
    # Encoders, and what is wrong with some of them.
    "minilm": encoder,
    "start": start("bert"),
    "rm-0": member("bert", 0, shards=3),
    "rm-1": member("bert", 1),
    "rm-2": member("bert", 2, shards=7),
    "warm": average_of("rm-0", "rm-1", "rm-2"),
    "other-rm": member("bert", 9),
    "permuted": changed("rm-1", permuted),
    "reinit": changed("rm-1", reinitialised),
    "nan": changed("rm-1", with_nan),
    "no-head": changed("rm-1", headless),
    "cut": cut,
    # Pairs, pools and prompts.
    **{name: rows(pairs(count, seed=i)) for i, (name, count) in enumerate(_PAIRS.items())},
    **{f"{name}.gz": rows(pairs(count, seed=i)) for i, (name, count) in enumerate(_PAIRS.items())},
    "pool.jsonl": rows(pool(3, 3, gold=False)),
    "pool_ood.jsonl.gz": rows(pool(6, 8, gold=True)),
    "prompts.jsonl": rows(prompts(24, 1)),
    "gold.py": text(GOLD),
    # A world of language models, and reward models of the same tokenizer.
    "world/base": policy(0.27),
    "world/sft-168": policy(0.28),
    "world/sft-208": policy(0.29),
    "world/sft": policy(0.3),
    "world/gold.py": text(GOLD),
    **{f"world/{name}": rows(pairs(20, seed=i)) for i, name in enumerate(("train.jsonl", "val.jsonl", "ood.jsonl"))},
    "world/prompts.jsonl": rows(prompts(40, 2)),
    "world/held-out.jsonl": rows(prompts(6, 3)),
    "my-sft": same_as("world/sft"),
    "world-start": start("llama"),
    **{name: member("llama", i) for i, name in enumerate(_MEMBERS)},
    # Results of the encoders, and runs of `rl`.
    "results": result_of("eval", "rm-0", "rm-1", "rm-2", "--data", "val=val.jsonl", *_FEW),
    "lmc": result_of("lmc-curve", "rm-0", "rm-2", "--data", "val=val.jsonl", "--points", "3", *_FEW),
    **{f"seed-{seed}/rl": rl_runs(*_PROXIES, seed=seed) for seed in range(3)},
    **{f"seed-{seed}/wins/winrate.json": text(json.dumps(policy_runs.wins())) for seed in range(3)},
}
