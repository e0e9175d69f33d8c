"""Answers sampled from a language model, saved as a pool before anything is done with them.

A tool of several commands: best-of-N scores a pool, and can do so again without sampling again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from warmerge.errors import Finding, Interrupted, naming, plain
from warmerge.pipeline.sampling import pool_file
from warmerge.pipeline.sampling.policy import (
    Drawn,
    OpenedPolicy,
    contents_of,
    dtype_of,
    fitting,
    open_for_sampling,
    open_policy,
)
from warmerge.pipeline.sampling.pool_file import Totals
from warmerge.pipeline.sampling.prompts import Prompts, read_prompts
from warmerge.pipeline.sampling.settings import Sampling
from warmerge.rewards.layouts import Text, canonical
from warmerge.rewards.pools import said
from warmerge.version import versions
from warmerge.weights.checkpoint import Checkpoint

__all__ = ["Prompts", "SampledPool", "Sampling", "read_prompts", "sample_pool"]
# Prompts (token ids, seed) -> what was sampled after each, in their order.
Generate = Callable[[Iterable[tuple[list[int], int]]], Iterator[list[Drawn]]]
# More answers cut than this are worth a warning: a reward of half an answer says little.
_MANY_CUT = 0.05


@dataclass(frozen=True)
class SampledPool:
    """A complete pool: where it is, what it holds, and how it came about.

    `seconds` is the time spent on sampling, also in earlier runs that were stopped; `skipped` counts prompts that were
    left out, bad rows and too long ones; `repeats` the rows whose prompt had been seen.
    """

    path: Path
    prompts: int
    answers: int
    tokens: int
    truncated: float
    seconds: float
    skipped: int
    repeats: int
    warnings: tuple[Finding, ...]


@dataclass(frozen=True)
class _Work:
    """What is sampled, from which policy, into which file; `left_out` counts prompts that were too long."""

    policy: OpenedPolicy
    prompts: tuple[Text, ...]
    ids: tuple[list[int], ...]
    out: Path
    settings: Sampling
    left_out: int


def sample_pool(
    policy: str | Path,
    prompts: str,
    out: str | Path,
    sampling: Sampling | None = None,
    *,
    limit: int | None = None,
    skip_bad_rows: bool = False,
    overwrite: bool = False,
    on_work: Callable[[int], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> SampledPool:
    """Samples `n` answers to each prompt and writes them to `out`, a line for each prompt when it is done.

    A call that was stopped goes on when it is made again, to the same file; a pool that is finished is returned at
    once. What was asked lies beside it, in NAME.sampling.json.

    Args:
        policy: a causal language model: a folder, a Hub id, hf://...
        prompts: rows with a `prompt`: a file, a folder, or a data set on the Hub; see `read_prompts`.
        out: a name ending in .jsonl.
        limit: a random sample of so many prompts, drawn with the seed of `sampling`.
        overwrite: replace a pool of another question.
        on_work: told how many prompts are left; `progress`: how many more of them are done.

    Raises:
        UsageError: `out` holds something else; an argument that cannot be used.
        RefusedError: no causal language model; bad rows; prompts that are too long (ten are named).
        Interrupted: Ctrl-C; finished prompts are kept.
        WarmergeError: out of memory; another run writes the same pool.
    """
    settings, target = sampling or Sampling(), Path(out)
    pool_file.check_out(target, str(prompts))
    found = read_prompts(str(prompts), limit, settings.seed, skip_bad_rows)
    opened = open_for_sampling(policy)
    asked = _asked(opened, found, settings)
    record = pool_file.begun(target, asked, overwrite)
    held = pool_file.finished(target, record)
    if held is None:
        work = _work(
            open_policy(opened, settings.template, settings.trust_remote_code), found, target, settings, skip_bad_rows
        )
        generate = _generator(work.policy, settings, max(map(len, work.ids)))
        fresh = {"asked": asked, "policy": str(policy), "prompts": str(prompts), "versions": versions(), "seconds": 0.0}
        with pool_file.opened(target, anew=not record) as descriptor:
            record = (record or fresh) | {"left_out": work.left_out, "ends": len(work.policy.ends)}
            held, record = _sample(work, generate, descriptor, record, on_work, progress)
    return SampledPool(
        target, held.prompts, held.answers, held.tokens, held.truncated / held.answers, record["seconds"],
        found.skipped + record["left_out"], found.repeats, _doubts(target, held, record["ends"], settings),
    )  # fmt: skip


def seed_of(prompt: Text, seed: int) -> int:
    """A prompt's own seed: its answers depend neither on the other prompts nor on its place among them.

    >>> asked = [("Say hi.", 0), ("Say hi.", 1), ("Say no.", 0), (({"role": "user", "content": "Say hi."},), 0)]
    >>> len({seed_of(prompt, seed) for prompt, seed in asked})
    3
    """
    return int.from_bytes(hashlib.sha256(canonical([seed, said(prompt)]).encode()).digest()[:6], "big")


def _asked(policy: Checkpoint, prompts: Prompts, settings: Sampling) -> dict[str, Any]:
    """All that the answers depend on. Where the policy runs, and how many answers at once, is not part of it."""
    chosen = asdict(settings)
    for name in ("batch", "device", "trust_remote_code"):
        del chosen[name]
    return {**contents_of(policy), "prompts": prompts.digest, **chosen, "dtype": dtype_of(policy, settings)}


def _work(policy: OpenedPolicy, prompts: Prompts, out: Path, settings: Sampling, skip_too_long: bool) -> _Work:
    """What is to be sampled, when it is known that every answer fits."""
    asked = fitting(policy, prompts, settings.max_new_tokens, skip_too_long)
    return _Work(policy, asked.texts, asked.ids, out, settings, asked.left_out)


def _generator(policy: OpenedPolicy, settings: Sampling, longest: int) -> Generate:
    if settings.generator == "vllm":
        from warmerge.pipeline.sampling.vllm_generator import VllmGenerator

        return VllmGenerator(policy, settings, longest)
    from warmerge.pipeline.sampling.transformers_generator import TransformersGenerator

    return TransformersGenerator(policy, settings)


def _sample(
    work: _Work,
    generate: Generate,
    descriptor: int,
    record: dict[str, Any],
    on_work: Callable[[int], None] | None,
    progress: Callable[[int], None] | None,
) -> tuple[Totals, dict[str, Any]]:
    """The rest of a pool: what it holds then, and its record."""
    done = pool_file.keep_complete(work.out, descriptor, work.prompts, work.settings.n)
    pool_file.write_record(work.out, record)
    if on_work is not None:
        on_work(len(work.ids) - done)
    seeds = [seed_of(prompt, work.settings.seed) for prompt in work.prompts]
    before, begun = record["seconds"], time.perf_counter()
    try:
        for drawn in generate(list(zip(work.ids, seeds, strict=True))[done:]):
            prompt, ids = work.prompts[done], work.ids[done]
            answers = [work.policy.answer(prompt, ids, one) for one in drawn]
            with naming(work.out):
                pool_file.append(descriptor, prompt, answers)
            done += 1
            if progress is not None:
                progress(1)
    except KeyboardInterrupt:
        what = f"stopped; {done} of {len(work.ids)} prompts are sampled and kept in {plain(str(work.out))}"
        raise Interrupted(f"{what}; the same command goes on") from None
    finally:
        record = record | {"seconds": round(before + time.perf_counter() - begun, 3)}
        pool_file.write_record(work.out, record)
    held = pool_file.totals(work.out)
    record = record | {"totals": asdict(held)}
    pool_file.write_record(work.out, record)
    return held, record


def _doubts(out: Path, held: Totals, ends: int, settings: Sampling) -> tuple[Finding, ...]:
    """What a reader of the pool should know."""
    found = []
    if not ends:
        found.append("the policy's files name no end-of-sequence token, so no answer ends by itself")
    elif held.truncated > _MANY_CUT * held.answers:
        cut = f"{held.truncated} of {held.answers} answers were cut at {settings.max_new_tokens} tokens"
        found.append(f"{cut}; their rewards are those of unfinished texts: raise --max-new-tokens")
    if held.empty:
        found.append(f"{held.empty} of {held.answers} answers are empty; they are kept")
    return tuple(Finding(str(out), what) for what in found)
