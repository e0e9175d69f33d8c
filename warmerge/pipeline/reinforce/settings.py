"""How a policy is optimised: everything that decides it, with WARM's values where the paper says them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from warmerge.errors import UsageError
from warmerge.rewards.render import TEMPLATES

BASELINES = ("loo", "batch")
SHAPINGS = ("none", "sigmoid")
SCALES = ("raw", "std")
PRECISIONS = ("float32", "bfloat16")
GENERATORS = ("transformers", "vllm")
# What changes nothing of the weights that come out, but for rounding.
FREE = ("save_every", "keep_every", "sample_every", "micro_batch", "gradient_checkpointing")


@dataclass(frozen=True)
class RlSettings:
    """REINFORCE with a leave-one-out baseline (arXiv 2402.14740), and a KL penalty to the start policy in the reward.

    Each of `steps` updates samples `batch` answers at `temperature`: with the baseline "loo" `answers` to each prompt,
    an answer's baseline being the mean reward of the others to its prompt; with "batch" one answer to each of `batch`
    different prompts, the baseline being the mean reward of the others in the batch. The paper's REINFORCE has a
    learned value function for a baseline instead. `kl_coef` is the paper's alpha: nats are multiplied by it and
    subtracted from the reward.

    The proxy's reward r is what is optimised, after this: with `scale` "std" it is brought to mean 0 and standard
    deviation 1 on answers of the start policy (`start_answers` of them); `clip` bounds it to [-clip, clip]; `shaping`
    "sigmoid" makes it sigmoid(r - r_ref), r_ref being the reward of the start policy's own answer to the prompt;
    `eos_penalty` is subtracted from an answer that was cut at `max_new_tokens`.

    The control reward is measured every `control_every` steps. Every `sample_every` steps the policy answers `samples`
    prompts that it is not trained on; every `keep_every` it is kept, and every `save_every` a checkpoint is written to
    go on from: these three intervals change nothing of the weights that come out. `micro_batch` is how many answers are
    in one forward and backward pass; fewer take less memory, as `gradient_checkpointing` does: both change the weights
    by rounding alone, and may be changed when a run goes on. `lora` is a rank, 0 for all weights.

    Raises:
        UsageError: values out of their range; all of them are named.

    >>> RlSettings(baseline="loo", batch=6, answers=4)
    Traceback (most recent call last):
    warmerge.errors.UsageError: --batch: expected a multiple of 4 (--answers to each prompt), found 6
    """

    steps: int = 3500
    kl_coef: float = 0.003
    batch: int = 128
    baseline: str = "loo"
    answers: int = 4
    lr: float = 1e-5
    temperature: float = 0.9
    max_new_tokens: int = 128
    seed: int = 0
    scale: str = "raw"
    clip: float | None = None
    shaping: str = "none"
    eos_penalty: float = 0.0
    start_answers: int = 128
    control_every: int = 10
    samples: int = 16
    sample_every: int = 100
    keep_every: int = 500
    save_every: int = 100
    micro_batch: int = 8
    lora: int = 0
    precision: str = "float32"
    gradient_checkpointing: bool = False
    template: str = "auto"
    generator: str = "transformers"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        counts = ("steps", "batch", "max_new_tokens", "control_every", "sample_every", "keep_every", "save_every")
        checks = [
            *((name, getattr(self, name) >= 1, "1 or more") for name in (*counts, "micro_batch")),
            *((name, getattr(self, name) >= 0, "0 or more") for name in ("samples", "lora")),
            ("seed", 0 <= self.seed < 2**32, "0 to 4294967295"),
            *(
                (name, 0 <= getattr(self, name) < math.inf, "a number of 0 or more")
                for name in ("kl_coef", "eos_penalty")
            ),
            *((name, 0 < getattr(self, name) < math.inf, "a number above 0") for name in ("lr", "temperature")),
            *(
                (name, getattr(self, name) in known, " or ".join(known))
                for name, known in (
                    ("baseline", BASELINES), ("shaping", SHAPINGS), ("scale", SCALES), ("precision", PRECISIONS),
                    ("generator", GENERATORS), ("template", TEMPLATES),
                )
            ),
            ("answers", self.answers >= 2, "2 or more: an answer's baseline is made of the others to its prompt"),
            ("clip", self.clip is None or 0 < self.clip < math.inf, "a number above 0"),
            ("start_answers", self.start_answers >= 8, "8 or more"),
        ]  # fmt: skip
        wrong = [
            f"{_flag(name)}: expected {what}, found {getattr(self, name)}" for name, fits, what in checks if not fits
        ]
        if not wrong and self.baseline == "loo" and self.batch % self.answers:
            what = f"expected a multiple of {self.answers} (--answers to each prompt), found {self.batch}"
            wrong.append(f"--batch: {what}")
        if not wrong and self.baseline == "batch" and self.batch < 2:
            wrong.append("--batch: expected 2 or more: an answer's baseline is made of the others, found 1")
        if self.generator == "vllm" and self.baseline == "batch":
            wrong.append(
                "--generator vllm goes with --baseline loo alone: TRL asks vLLM for groups of answers to a prompt"
            )
        if wrong:
            raise UsageError("; ".join(wrong))

    @property
    def group(self) -> int:
        """How many answers make up each other's baseline."""
        return self.answers if self.baseline == "loo" else self.batch

    @property
    def prompts_per_step(self) -> int:
        return self.batch // self.answers if self.baseline == "loo" else self.batch

    def deciding(self) -> dict[str, Any]:
        """All that the weights which come out depend on."""
        return {key: value for key, value in asdict(self).items() if key not in FREE}


def _flag(name: str) -> str:
    return "--policy-template" if name == "template" else f"--{name.replace('_', '-')}"
