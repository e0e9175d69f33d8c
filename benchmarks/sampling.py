"""How fast answers are sampled: the prompt computed once for all its answers, against transformers' own generate.

`generate` with the prompt repeated for each answer is what TRL and most scripts do. Both draw the same random numbers,
from the same weights in float32; answers are compared one by one (rounding may change a token, and all after it).

    python benchmarks/sampling.py LANGUAGE_MODEL          # a causal language model's folder
"""

from __future__ import annotations

import argparse
import platform
import random
import time
from dataclasses import replace
from datetime import date

import torch

from warmerge.pipeline.sampling import Sampling
from warmerge.pipeline.sampling.policy import open_for_sampling, open_policy
from warmerge.pipeline.sampling.transformers_generator import TransformersGenerator

WORDS = ["the", "of", "and", "to", "in", "is", "that", "it", "for", "was", "on", "are", "as", "with", "they", "be"]
CASES = ((128, 16, 16), (512, 4, 16), (512, 16, 16), (512, 16, 64))  # prompt words, answers, new tokens


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("model")
    arguments.add_argument("--repeat", type=int, default=2)
    given = arguments.parse_args()
    print(f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| prompt | answers | new tokens | program | s | CPU s | x generate | same answers |")
    print("|---|---|---|---|---|---|---|---|")
    rng = random.Random(0)
    for words, answers, tokens in CASES:
        settings = Sampling(n=answers, max_new_tokens=tokens, template="plain")
        policy = open_policy(open_for_sampling(given.model), settings)
        policy = replace(policy, ends=())  # all answers have the same length
        generator = TransformersGenerator(policy, settings)
        assert generator.reuses_prompt
        prompts = [policy.encode(" ".join(rng.choice(WORDS) for _ in range(words))) for _ in range(given.repeat)]
        found: dict[bool, tuple[float, float, list[list[int]]]] = {}
        for reuses in (False, True):
            generator.reuses_prompt = reuses
            list(generator([(prompts[0][:8], 0)]))  # the first call pays for what is set up once
            wall, processor = time.perf_counter(), time.process_time()
            drawn = [one.ids for each in generator([(ids, seed) for seed, ids in enumerate(prompts)]) for one in each]
            found[reuses] = (time.perf_counter() - wall, time.process_time() - processor, drawn)
        for reuses, name in ((False, "generate"), (True, "warmerge")):
            wall, processor, drawn = found[reuses]
            same = sum(a == b for a, b in zip(drawn, found[False][2], strict=True))
            ratio = found[False][0] / wall
            row = [len(prompts[0]), answers, tokens, name, f"{wall:.1f}", f"{processor:.1f}", f"{ratio:.2f}"]
            print("| " + " | ".join(map(str, [*row, f"{same} of {len(drawn)}"])) + " |", flush=True)


if __name__ == "__main__":
    main()
