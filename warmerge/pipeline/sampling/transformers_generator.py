"""Sampling with transformers: all answers to a prompt at once, and the prompt computed once for all of them.

Every answer has random numbers of its own, one for each token, from the prompt's seed and the answer's number. So an
answer does not depend (but for rounding) on how many are drawn together, and a pool of 8 begins the pool of 64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import numpy
import torch

from warmerge.errors import Finding, RefusedError, WarmergeError
from warmerge.pipeline.sampling.policy import Drawn, OpenedPolicy, device_of, dtype_of
from warmerge.pipeline.sampling.settings import Sampling
from warmerge.rewards.model import DTYPES
from warmerge.rewards.tokenizer import quiet
from warmerge.training.language_model import load_language_model

# Rotary embeddings that depend on the length of the whole: a beginning is not computed as if nothing followed.
_BY_LENGTH = ("longrope", "dynamic")
_PROBED = 24


class TransformersGenerator:
    """Answers of a policy that transformers runs. Called with prompts, it yields the answers to each, in their order.

    `reuses_prompt` says whether a prompt runs once, and not once for each answer: where that gives the same logits.

    Raises:
        RefusedError: a weight that is missing, unexpected or of another shape.
    """

    def __init__(self, policy: OpenedPolicy, settings: Sampling) -> None:
        from transformers import GenerationConfig

        dtype = DTYPES[dtype_of(policy.source, settings)]
        module = load_language_model(policy.source, policy.config, dtype, settings.trust_remote_code, "sampled from")
        self.module = module.to(device_of(settings)).eval()
        # The defaults of generation_config.json (top_k, repetition_penalty, ...) would be taken for all that is not
        # said: what decides the samples are the settings alone.
        self.module.generation_config = GenerationConfig()
        self._label, self._settings, self._ends = policy.source.label, settings, list(policy.ends)
        self._batch = min(settings.batch or settings.n, settings.n)
        self.reuses_prompt = _may_be_reused(self.module)

    def __call__(self, prompts: Iterable[tuple[list[int], int]]) -> Iterator[list[Drawn]]:
        """The answers to each (token ids, seed).

        Raises:
            RefusedError: logits that are not finite.
            WarmergeError: out of memory with a single answer.
        """
        for ids, seed in prompts:
            yield self._answers(ids, seed)

    def _answers(self, ids: list[int], seed: int) -> list[Drawn]:
        uniforms = random_numbers(seed, self._settings.n, self._settings.max_new_tokens)
        answers: list[Drawn] = []
        inputs, shared = torch.tensor([ids], device=self.module.device), None
        while len(answers) < self._settings.n:
            try:
                if shared is None and self.reuses_prompt and len(ids) > 1:
                    shared = _computed(self.module, inputs[:, :-1])
                answers += self._generate(inputs, uniforms[len(answers) : len(answers) + self._batch], shared)
            except torch.OutOfMemoryError:
                if self._batch == 1:
                    what = "out of memory with one answer at a time; try --dtype bfloat16, --max-new-tokens, or vLLM"
                    raise WarmergeError(f"{self._label}: {what}") from None
                self._batch = -(-self._batch // 2)
                torch.cuda.empty_cache()
        return answers

    def _generate(self, inputs: torch.Tensor, uniforms: torch.Tensor, shared: Any) -> list[Drawn]:
        count, begin = len(uniforms), inputs.shape[1]
        choice = Choice(uniforms.to(inputs.device), begin, self._settings.temperature, self._settings.top_p)
        reused = {} if shared is None else {"past_key_values": _repeated(shared, count)}
        out = _sampled(self.module, inputs.expand(count, -1), choice, uniforms.shape[1], self._ends, **reused)
        if choice.failed:
            what = "gives logits that are not finite; its weights hold NaN or overflow its dtype"
            raise RefusedError([Finding(self._label, what)])
        return [_until_end(row, self._ends) for row in out.sequences[:, begin:].tolist()]


class Choice:
    """Chooses each row's next token from its logits, and leaves no other to transformers.

    Args:
        uniforms: (rows, steps) in [0, 1), one for each token.
        begin: how many tokens the prompt has.
    """

    def __init__(self, uniforms: torch.Tensor, begin: int, temperature: float, top_p: float) -> None:
        self._uniforms, self._begin, self._temperature, self._top_p = uniforms, begin, temperature, top_p
        self._failed = torch.zeros((), dtype=torch.bool, device=uniforms.device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Minus infinity is a token that a model excludes; a row of nothing else has no next token.
        self._failed |= ~scores.amax(-1).isfinite().all()
        tokens = draw(scores, self._uniforms[:, input_ids.shape[1] - self._begin], self._temperature, self._top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    @property
    def failed(self) -> bool:
        return bool(self._failed)


def draw(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """A token of each row (rows,): where the row's uniform number falls among the summed probabilities.

    Args:
        logits: (rows, vocabulary) float32.
        uniforms: (rows,) float64 in [0, 1).
        temperature: logits are divided by it; 0 takes the largest.
        top_p: of the tokens in the order of their probability, those before which less than this has been summed up.

    >>> logits = torch.tensor([[0.1, 0.2, 0.7]]).log()
    >>> [int(draw(logits, torch.tensor([u], dtype=torch.float64), 1.0, 1.0)) for u in (0.0, 0.15, 0.31, 0.99)]
    [0, 1, 2, 2]
    >>> [int(draw(logits, torch.tensor([u], dtype=torch.float64), 1.0, 0.8)) for u in (0.0, 0.77, 0.79, 0.99)]
    [2, 2, 1, 1]
    """
    if temperature == 0:
        return logits.argmax(-1)
    # Less the largest first: divided by a small temperature the logits themselves would overflow.
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    order = None
    if top_p < 1:
        probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(-1, dtype=torch.float64) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    summed = probabilities.cumsum(-1, dtype=torch.float64)
    found = torch.searchsorted(summed, uniforms[:, None] * summed[:, -1:], right=True)
    found = found.clamp(max=logits.shape[-1] - 1)
    return (found if order is None else order.gather(-1, found))[:, 0]


def random_numbers(seed: int, answers: int, tokens: int) -> torch.Tensor:
    """(answers, tokens) float64 in [0, 1): the first of them are the same, however many are asked for."""
    rows = [numpy.random.default_rng([seed, answer]).random(tokens) for answer in range(answers)]
    return torch.from_numpy(numpy.stack(rows))


def _until_end(ids: list[int], ends: list[int]) -> Drawn:
    """What was sampled, without what pads it after its end.

    >>> _until_end([5, 6, 2, 0, 0], [2, 7]), _until_end([5, 6], [2])
    (Drawn(ids=[5, 6, 2], finished=True), Drawn(ids=[5, 6], finished=False))
    """
    stop = next((i for i, token in enumerate(ids) if token in ends), None)
    return Drawn(ids, False) if stop is None else Drawn(ids[: stop + 1], True)


# --- a prompt computed once -------------------------------------------------------------------------------------------


def _sampled(module: Any, inputs: torch.Tensor, choice: Any, tokens: int, ends: list[int], **more: Any) -> Any:
    """transformers' own loop, with every choice made by `choice`: caches, masks and positions are each model's own."""
    from transformers import GenerationConfig, LogitsProcessorList

    # Padding comes after an answer's end and is cut off: any id will do.
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, num_beams=1, use_cache=True, return_dict_in_generate=True,
        output_logits=more.pop("output_logits", False), eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0,
    )  # fmt: skip
    with quiet(), torch.inference_mode():
        return module.generate(
            inputs, attention_mask=torch.ones_like(inputs), generation_config=config,
            logits_processor=LogitsProcessorList([choice]), **more,
        )  # fmt: skip


def _computed(module: Any, inputs: torch.Tensor) -> Any:
    """The cache of a text (1, tokens)."""
    from transformers import DynamicCache

    cache = DynamicCache(config=module.config)
    with quiet(), torch.inference_mode():
        module.base_model(input_ids=inputs, past_key_values=cache, use_cache=True)
    return cache


def _repeated(cache: Any, count: int) -> Any:
    """A cache for so many rows that all begin with the text of another one, which stays as it is."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    own.batch_repeat_interleave(count)
    return own


def _may_be_reused(module: Any) -> bool:
    """Whether a prompt that was computed once gives the logits that it gives with each answer: tried on one of random
    tokens, over three steps with given tokens."""
    table = getattr(module.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [entry.get("rope_type") for entry in (table, *table.values()) if isinstance(entry, dict)]
    if any(kind in _BY_LENGTH for kind in kinds):
        return False
    vocabulary = module.get_input_embeddings().weight.shape[0]
    random = numpy.random.default_rng(0)
    inputs = torch.from_numpy(random.integers(vocabulary, size=(1, _PROBED))).to(module.device)
    steps = torch.from_numpy(random.integers(vocabulary, size=(2, 3))).to(module.device)

    def given(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = steps[:, input_ids.shape[1] - _PROBED]
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    def logits(**reused: Any) -> torch.Tensor:
        out = _sampled(module, inputs.expand(2, -1), given, 3, [], output_logits=True, **reused)
        return torch.stack(out.logits).float()

    tolerance = 1e-3 if module.dtype == torch.float32 else 0.1
    try:
        expected, shared = logits(), _computed(module, inputs[:, :-1])
        for _ in range(2):  # what was computed must be as before when it has been used
            found = logits(past_key_values=_repeated(shared, 2))
            if not torch.all((found - expected).abs() <= tolerance * (1 + expected.abs())):
                return False
    except Exception:  # noqa: BLE001 - a cache of another kind, or a model that refuses random tokens
        return False
    return True
