"""A tiny policy, tiny reward models and prompts for `warmerge rl`; a run takes a second."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import causal_models
import numpy
import pytest
from safetensors.torch import load_file

from warmerge.pipeline.proxies import Proxy
from warmerge.pipeline.reinforce import run as running
from warmerge.pipeline.reinforce.settings import RlSettings
from warmerge.pipeline.rl import Optimised, optimise_policy
from warmerge.rewards.bench import Measuring

# Rewards of a text's letters, which need no model: "e" is what is wanted, length is what is watched.
FUNCTIONS = """
def letters(prompts, completions, **kwargs):
    return [text.count("e") + len(text) / 100 for text in completions]

def length(prompts, completions, **kwargs):
    return [float(len(text)) for text in completions]

def flat(prompts, completions, **kwargs):
    return [3.0] * len(completions)
"""
SMALL: dict[str, Any] = {
    "steps": 4, "batch": 8, "answers": 4, "lr": 1e-3, "max_new_tokens": 10, "kl_coef": 0.05, "control_every": 2,
    "samples": 3, "sample_every": 2, "keep_every": 2, "save_every": 2, "micro_batch": 4, "start_answers": 16,
}  # fmt: skip


def write_prompts(path: Path, count: int = 24) -> str:
    path.write_text("".join(json.dumps({"prompt": f"What is {i} and why?"}) + "\n" for i in range(count)))
    return str(path)


def small(**changes: Any) -> RlSettings:
    return RlSettings(**{**SMALL, **changes})


def optimise(
    folder: Path, name: str = "run", proxy: Proxy | None = None, control: str | None = "length", policy: Any = None,
    prompts: str | None = None, say: Any = None, measuring: Measuring | None = None, **changes: Any,
) -> Optimised:  # fmt: skip
    """A run in folder/name against a function of `functions.py`, unless another proxy is given."""
    functions = folder / "functions.py"
    if not functions.exists():
        functions.write_text(FUNCTIONS)
    found = optimise_policy(
        policy or causal_models.folder(), proxy or Proxy("letters", "rm", (f"{functions}:letters",)),
        prompts or write_prompts(folder / "prompts.jsonl"), folder / name,
        control=f"{functions}:{control}" if control in ("letters", "length", "flat") else control,
        settings=small(**changes), measuring=measuring, say=say or (lambda line: None),
    )  # fmt: skip
    assert found is not None or int(os.environ.get("RANK", "0")), "the first rank returns what it found"
    return found  # type: ignore[return-value]


def same_weights(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same bytes in every tensor."""
    left, right = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert left.keys() == right.keys()
    return all(left[name].equal(right[name]) for name in left)


def untimed(rows: Sequence[Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")} for row in rows]


def close(found: float, expected: float, tolerance: float = 1e-5) -> bool:
    return bool(numpy.isclose(found, expected, rtol=tolerance, atol=tolerance))


def watch_batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What TRL makes of each step's answers: tokens, masks, advantages; and the policy's weights at that moment."""
    seen: list[dict[str, Any]] = []
    make = running.make_trainer

    def watched(*given: Any) -> Any:
        trainer = make(*given)
        score = trainer._generate_and_score_completions

        def kept(inputs: Any) -> Any:
            state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
            out = score(inputs)
            copied = {key: value.clone() for key, value in out.items()}
            seen.append({**copied, "numbers": [int(row["prompt"]) for row in inputs], "state": state})
            return out

        trainer._generate_and_score_completions = kept
        return trainer

    monkeypatch.setattr(running, "make_trainer", watched)
    return seen
