"""How answers are sampled: everything that decides it, and nothing of what a model's own files suggest."""

from __future__ import annotations

import math
from dataclasses import dataclass

from warmerge.errors import UsageError
from warmerge.rewards.render import TEMPLATES

GENERATORS = ("transformers", "vllm")
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Sampling:
    """What is asked of a policy.

    `n` answers to each prompt, of `max_new_tokens` tokens at most, drawn at `temperature` from the most probable tokens
    that make up `top_p` together (1.0: from all). A temperature of 0 takes the most probable token each time.

    `batch` is the number of answers in one forward pass: None for all n, halved when a GPU runs out of memory. It does
    not change what is drawn. `dtype` auto is the policy's own on a GPU, float32 on a CPU. `template` is auto, chat or
    plain, as for reward models.

    Raises:
        UsageError: values out of their range; all of them are named.

    >>> Sampling(n=8, top_p=0.95).temperature
    1.0
    >>> Sampling(n=0, top_p=95)
    Traceback (most recent call last):
    warmerge.errors.UsageError: -n: expected 1 or more, found 0; --top-p: expected above 0 and at most 1, found 95
    """

    n: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    generator: str = "transformers"
    batch: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    template: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        known = {"generator": GENERATORS, "dtype": DTYPE_NAMES, "policy-template": TEMPLATES}
        checks = [
            ("-n", self.n, self.n >= 1, "1 or more"),
            ("--temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more"),
            ("--seed", self.seed, self.seed >= 0, "0 or more"),
            ("--batch", self.batch, self.batch is None or self.batch >= 1, "1 or more"),
            *(
                (f"--{name}", repr(value), value in names, " or ".join(names))
                for name, names in known.items()
                if (value := getattr(self, name.removeprefix("policy-"))) is not None
            ),
        ]
        wrong = [f"{flag}: expected {expected}, found {value}" for flag, value, fits, expected in checks if not fits]
        if self.temperature == 0 and self.n > 1:
            wrong.append(f"--temperature 0 would make all {self.n} answers to a prompt the same; raise it, or use -n 1")
        if self.generator == "vllm" and (0 < self.temperature < 0.01 or self.temperature > 2):
            wrong.append(f"--temperature: vLLM takes 0, or 0.01 to 2, found {self.temperature}")
        if wrong:
            raise UsageError("; ".join(wrong))
