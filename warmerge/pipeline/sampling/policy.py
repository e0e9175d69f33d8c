"""The language model that answers are sampled from: prompt -> token ids, sampled ids -> answer. Its weights are loaded
by a generator."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from warmerge.errors import Finding, RefusedError, UsageError, plain, some
from warmerge.pipeline.found.rl_runs import RECORD
from warmerge.pipeline.sampling.prompts import Prompts
from warmerge.pipeline.sampling.settings import Sampling
from warmerge.rewards.config import transformers_config
from warmerge.rewards.layouts import Text, canonical
from warmerge.rewards.model import DTYPES
from warmerge.rewards.render import plain_text
from warmerge.rewards.tokenizer import open_tokenizer
from warmerge.training.language_model import not_causal
from warmerge.weights.average import choose_device
from warmerge.weights.checkpoint import ADAPTER_CONFIG, Checkpoint, read_json
from warmerge.weights.folder import LocalFolder
from warmerge.weights.kernels import TORCH_DTYPE
from warmerge.weights.locate import make_local, open_checkpoint
from warmerge.weights.samples import read_sample
from warmerge.weights.small_files import tokenizer_digest

_SHOWN = 10


class Drawn(NamedTuple):
    """What was sampled after a prompt: token ids, the end-of-sequence token included, and whether one came."""

    ids: list[int]
    finished: bool


@dataclass(frozen=True)
class Answer:
    """A sampled answer. `tokens` counts the end-of-sequence token; `finished`: it ended by itself, and was not cut."""

    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True)
class OpenedPolicy:
    """A causal language model on this machine, with its tokenizer; its weights are not loaded.

    `template` is "chat" or "plain"; `ends` are the ids that end an answer; `context` is the most tokens that the model
    has positions for.
    """

    source: Checkpoint
    config: Any
    tokenizer: Any
    template: str
    ends: tuple[int, ...]
    context: int

    @property
    def path(self) -> Path:
        """Its folder on this machine."""
        assert isinstance(self.source.folder, LocalFolder), "policies are made local"
        return self.source.folder.path

    def encode(self, prompt: Text) -> list[int]:
        """The token ids of a prompt, up to where its answer begins.

        Raises:
            RefusedError: a conversation for a tokenizer without template; a template that fails.
        """
        if self.template == "chat":
            return self._from_template([{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt])
        text = _before_answer(_as_string(prompt))
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        bare: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        # Some tokenizers end every text: then there would be nothing to say any more.
        end = self.tokenizer.eos_token_id
        return ids[:-1] if ids[-1:] == [end] and bare[-1:] != [end] else ids

    def answer(self, prompt: Text, ids: list[int], drawn: Drawn) -> Answer:
        """A sampled answer as text, so that the prompt and this text make what the policy has read and written.

        Args:
            ids: of the prompt.
        """
        new = [token for token in drawn.ids if token not in self.ends]
        if self.template == "chat":
            return Answer(self._decode(new), len(drawn.ids), drawn.finished)
        # Decoded after its prompt: at the beginning of a text some tokenizers drop a space.
        before, whole = self._decode(ids), self._decode([*ids, *new])
        text = whole[len(before) :] if whole.startswith(before) else self._decode(new)
        asked = _as_string(prompt)
        # No blank line is put before an answer that begins with white space: scoring would read another text.
        return Answer(text.lstrip() if _before_answer(asked) != asked else text, len(drawn.ids), drawn.finished)

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _from_template(self, messages: list[Any]) -> list[int]:
        try:
            # tokenize=True: rendering to a string and tokenising that adds a second BOS.
            ids: list[int] = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False,
                tokenizer_kwargs={"verbose": False},
            )  # fmt: skip
        except Exception as error:  # a template is a program of its own and may raise anything
            roles = ", ".join(str(message["role"]) for message in messages)
            what = f"cannot render a conversation of {roles}: {error}"
            raise RefusedError([Finding("chat template", what[:400])]) from error
        return list(ids)


@dataclass(frozen=True)
class Questions:
    """Prompts that leave room for an answer, and their token ids; `left_out` counts those that did not."""

    texts: tuple[Text, ...]
    ids: tuple[list[int], ...]
    left_out: int


def fitting(policy: OpenedPolicy, prompts: Prompts, max_new_tokens: int, skip_too_long: bool) -> Questions:
    """The prompts that fit into the policy's context together with an answer.

    Raises:
        UsageError: no prompt at all could fit.
        RefusedError: some do not (ten are named), and not `skip_too_long`; `OpenedPolicy.encode` refuses one.
    """
    ids = [policy.encode(prompt) for prompt in prompts.texts]
    limit = policy.context - max_new_tokens
    if limit < 1:
        room = f"{plain(policy.source.label)} has {policy.context} positions for a prompt and its answer together"
        raise UsageError(f"--max-new-tokens {max_new_tokens}: {room}")
    bad = [
        Finding(place, f"has {len(row)} tokens, more than {limit}" if row else "has no tokens to begin from")
        for place, row in zip(prompts.places, ids, strict=True)
        if not 0 < len(row) <= limit
    ]
    if bad and not (skip_too_long and len(bad) < len(ids)):
        room = f"{plain(policy.source.label)} has {policy.context} positions for a prompt and --max-new-tokens"
        more = f"... and {len(bad) - _SHOWN} more; " if len(bad) > _SHOWN else ""
        hint = "--skip-bad-rows leaves such prompts out and counts them" if len(bad) < len(ids) else "no prompt fits"
        summary = Finding("--max-new-tokens", f"{more}{room} {max_new_tokens} together; {hint}")
        raise RefusedError([*bad[:_SHOWN], summary])
    kept = [(prompt, row) for prompt, row in zip(prompts.texts, ids, strict=True) if 0 < len(row) <= limit]
    texts, rows = zip(*kept, strict=True)
    return Questions(texts, rows, len(bad))


def open_for_sampling(spec: str | Path) -> Checkpoint:
    """The checkpoint of a policy, from its headers alone.

    Raises:
        UsageError: it is not there, or not a folder; a LoRA adapter.
    """
    if Path(spec).is_file():
        raise UsageError(f"--policy: {plain(str(spec))} is a file; give its folder, with config and tokenizer")
    if (Path(spec) / RECORD).is_file() and not (Path(spec) / "config.json").is_file():
        kept = sorted(path.name for path in Path(spec).glob("step-*"))
        what = f"is a run of warmerge rl; name one of its policies ({some(kept) if kept else 'none is kept yet'})"
        raise UsageError(f"--policy: {plain(str(spec))} {what}")
    if (Path(spec) / ADAPTER_CONFIG).is_file():
        raise _adapter(str(spec))
    source = open_checkpoint(spec)
    if source.fallback is not None:
        raise _adapter(source.label)
    return source


def open_policy(opened: Checkpoint, template: str = "auto", trust_remote_code: bool = False) -> OpenedPolicy:
    """The policy of a checkpoint: its config, its tokenizer, and the rule for its prompts.

    Raises:
        UsageError: a template that it does not have; files in an object store.
        RefusedError: no causal language model; no tokenizer, or one with more tokens than the model has.
    """
    (source,) = make_local([opened])
    config = transformers_config(source, trust_remote_code, labels=1)
    if (kind := not_causal(source, config)) is not None:
        what = f"is {kind}, which writes no text; give a causal language model"
        raise RefusedError([Finding(f"--policy {plain(source.label)}", what)])
    tokenizer = open_tokenizer(source, trust_remote_code)
    inner = config.get_text_config()
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= inner.vocab_size:
        what = f"has a tokenizer with ids up to {highest}, but {inner.vocab_size} tokens: not the model's tokenizer"
        raise RefusedError([Finding(source.label, what)])
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if template == "chat" and not has_template:
        raise UsageError(f"--policy-template chat: the tokenizer of {plain(source.label)} has no chat template")
    own_end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return OpenedPolicy(
        source,
        config,
        tokenizer,
        "chat" if has_template and template != "plain" else "plain",
        tuple(dict.fromkeys([*stored_ends(source), *own_end])),
        int(getattr(inner, "max_position_embeddings", None) or tokenizer.model_max_length),
    )


def contents_of(source: Checkpoint) -> dict[str, Any]:
    """What decides how a policy answers: its weights and its small files."""
    config = hashlib.sha256(canonical(source.config).encode()).hexdigest()[:16]
    return {
        "policy": read_sample(source).fingerprint, "config": config, "tokenizer": tokenizer_digest(source),
        "ends": stored_ends(source),
    }  # fmt: skip


def stored_ends(source: Checkpoint) -> list[int]:
    """The end-of-sequence ids that a model's files name: generation_config.json, where it says any, else config.json.

    Not what a config class takes where its file says nothing: that may be any word.
    """
    config = source.config or {}
    for place in (read_json(source.folder, "generation_config.json"), config, config.get("text_config")):
        found = place.get("eos_token_id") if isinstance(place, dict) else None
        if found is not None:
            return list(found) if isinstance(found, list) else [found]
    return []


def device_of(settings: Sampling) -> torch.device:
    """Where the policy runs: auto is the first GPU, if there is one.

    Raises:
        UsageError: the device is not known, or not there.
    """
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() or settings.generator == "vllm" else "cpu")
    return choose_device(settings.device)


def dtype_of(source: Checkpoint, settings: Sampling) -> str:
    """The name of the dtype that the policy computes in: auto is its own on a GPU, float32 on a CPU or if it has
    several."""
    if settings.dtype != "auto":
        return settings.dtype
    stored = {TORCH_DTYPE[tensor.dtype] for tensor in source.tensors.values() if tensor.dtype in TORCH_DTYPE}
    if device_of(settings).type == "cpu" or len(stored) != 1:
        return "float32"
    (own,) = stored
    return next((name for name, dtype in DTYPES.items() if dtype == own), "float32")


def _adapter(label: str) -> UsageError:
    what = "is a LoRA adapter; merge it into its base first (peft: merge_and_unload, then save_pretrained)"
    return UsageError(f"--policy: {plain(label)} {what}")


def _before_answer(prompt: str) -> str:
    """What stands before an answer by the plain rule."""
    return plain_text(prompt, "x")[:-1]


def _as_string(prompt: Text) -> str:
    """A plain string, or the one message of a user that is as good as one."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return str(prompt[0]["content"])
    roles = ", ".join(str(message["role"]) for message in prompt)
    what = (
        f"holds a conversation ({len(prompt)} of {roles}), which has no plain text: the policy's tokenizer has no chat "
        "template, or --policy-template plain was given"
    )
    raise RefusedError([Finding("--prompts", what)])
