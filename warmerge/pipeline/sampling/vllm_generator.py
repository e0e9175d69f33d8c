"""Sampling with vLLM, from an environment of its own.

Written after vLLM's documentation and source, and tested against a stand-in of the few names that are used here: it was
not run with vLLM itself. The prompts' token ids and the answers' texts are made by the same code as for transformers.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

from warmerge.errors import UsageError, WarmergeError, plain
from warmerge.pipeline.sampling.policy import Drawn, OpenedPolicy, dtype_of
from warmerge.pipeline.sampling.settings import Sampling

# Prompts in one call: enough to fill a GPU, few enough that little is lost when a run is stopped.
_TOGETHER = 64


class VllmGenerator:
    """Answers of a policy that vLLM runs. Called with prompts, it yields the answers to each, in their order.

    Args:
        longest: tokens of the longest prompt; no memory is set aside for longer ones.

    Raises:
        UsageError: vLLM is not installed.
        WarmergeError: vLLM cannot load the policy.
    """

    def __init__(self, policy: OpenedPolicy, settings: Sampling, longest: int) -> None:
        # It would log to stdout, which is for results. Its own processes read this too.
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        self._vllm = _vllm()
        self._settings, self._ends, self._label = settings, list(policy.ends), policy.source.label
        try:
            self._model = self._vllm.LLM(
                model=str(policy.path),
                dtype=dtype_of(policy.source, settings),
                seed=settings.seed % 2**31,
                trust_remote_code=settings.trust_remote_code,
                max_model_len=longest + settings.max_new_tokens,
                # vLLM's neutral values for all that is not said, not those of generation_config.json.
                generation_config="vllm",
            )
        except Exception as error:  # vLLM's own processes fail in ways of their own
            raise WarmergeError(f"vLLM cannot load {plain(self._label)}: {error}"[:600]) from error

    def __call__(self, prompts: Iterable[tuple[list[int], int]]) -> Iterator[list[Drawn]]:
        """The answers to each (token ids, seed).

        Raises:
            WarmergeError: vLLM gave another number of answers than were asked for.
        """
        left = iter(prompts)
        while together := list(itertools.islice(left, _TOGETHER)):
            asked = [{"prompt_token_ids": ids} for ids, _ in together]
            outputs = self._model.generate(asked, [self._parameters(seed) for _, seed in together], use_tqdm=False)
            found = [[_drawn(completion) for completion in output.outputs] for output in outputs]
            if [len(answers) for answers in found] != [self._settings.n] * len(together):
                what = f"{len(found)} times {[len(answers) for answers in found][:5]}... answers"
                raise WarmergeError(f"vLLM gave {what} for {len(together)} prompts, {self._settings.n} each expected")
            yield from found

    def _parameters(self, seed: int) -> Any:
        """vLLM draws the k-th answer with the seed + k."""
        settings = self._settings
        return self._vllm.SamplingParams(
            n=settings.n, temperature=settings.temperature, top_p=settings.top_p, max_tokens=settings.max_new_tokens,
            seed=seed, stop_token_ids=self._ends, detokenize=False,
        )  # fmt: skip


def _drawn(completion: Any) -> Drawn:
    return Drawn(list(completion.token_ids), completion.finish_reason == "stop")


def _vllm() -> Any:
    try:
        return import_module("vllm")
    except ImportError as error:
        what = "install it beside warmerge in an environment of its own, for it pins its own torch and transformers"
        how = "python -m venv sampling && sampling/bin/pip install vllm warmerge"
        note = "The pool file that is sampled there can be scored in any environment"
        raise UsageError(f"--generator vllm needs vLLM ({error}): {what}: {how}. {note}") from error
