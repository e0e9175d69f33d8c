"""Policies as users name them, and one answer of each to every prompt: sampled, or from a file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from warmerge.errors import Finding, RefusedError, UsageError, counted, plain, quoted, some
from warmerge.pipeline.found.rl_runs import RECORD
from warmerge.pipeline.prepare import Spec
from warmerge.pipeline.sampling import Prompts, Sampling, sample_pool
from warmerge.pipeline.sampling.policy import open_for_sampling, open_policy
from warmerge.rewards.bench import Measuring
from warmerge.rewards.layouts import Text
from warmerge.rewards.pools import read_pool, said
from warmerge.rewards.rows import parse_named, read_rows
from warmerge.weights.foreign_json import parse, text_of

ANSWERS = "answers"
_STEP = re.compile(r"step-(\d+)")
# More answers cut than this are worth a warning, as for sampled pools.
_MANY_CUT = 0.05


@dataclass(frozen=True)
class Contender:
    """A policy to be judged: a causal language model, or with `is_file` a file of answers.

    One that `warmerge rl` kept has the `run` that it lies in, its `step`, and the name of the run's proxy.
    """

    name: str
    source: str
    is_file: bool = False
    run: Path | None = None
    step: int | None = None
    proxy: str | None = None

    @property
    def file(self) -> str:
        """The name of its answers in a folder: its own, but for what file names cannot hold."""
        kept = re.sub(r"[^\w .,+=@()-]", "_", self.name)[:80]
        if kept == self.name and not kept.startswith("."):
            return f"{kept}.jsonl"
        return f"{kept.lstrip('.')}-{hashlib.sha256(self.name.encode(errors='surrogatepass')).hexdigest()[:6]}.jsonl"


@dataclass(frozen=True)
class Answers:
    """A policy's answer to each prompt, by `pools.said` of the prompt: the text, its tokens where they are known, and
    whether it ended by itself. `seed`: what it was sampled with."""

    contender: Contender
    path: Path
    texts: Mapping[str, Text]
    tokens: Mapping[str, int] | None
    warnings: tuple[Finding, ...] = ()
    seed: int | None = None


def parse_contenders(policies: Sequence[Spec], against: str | None) -> tuple[tuple[Contender, ...], str | None]:
    """The policies of `[NAME=]LM` each, and the name of the one that all others are compared with, if `against` says.

    `against` is the name or the path of one of the policies, or another policy.

    Raises:
        UsageError: two of one name; fewer than two policies; a name that is also another path.
    """
    found = [_contender(str(spec)) for spec in policies]
    chosen = None
    if against is not None:
        chosen = next((one for one in found if against in (one.name, one.source)), None)
        path = Path(against)
        if chosen and against == chosen.name != chosen.source and path.exists():
            same = Path(chosen.source).exists() and path.samefile(chosen.source)
            if not same:
                what = f"{quoted(against)} is both the name of {plain(chosen.source)} and a path"
                raise UsageError(f"--against: {what}; name one of them, as in --against start={plain(against)}")
        if chosen is None:
            chosen = _contender(against)
            found.append(chosen)
    names = [one.name for one in found]
    for one, other in ((one, other) for i, one in enumerate(found) for other in found[:i] if one.name == other.name):
        what = f"{plain(other.source)} and {plain(one.source)} are both named {quoted(one.name)}"
        raise UsageError(f"--policy: {what}; name one of them, as in other={plain(one.source)}")
    if len(names) < 2:
        raise UsageError("--policy: a win rate takes two policies; give another --policy, or --against")
    return tuple(found), None if chosen is None else chosen.name


def check_policies(contenders: Sequence[Contender], sampling: Sampling) -> None:
    """Opens every language model without its weights: what cannot be sampled is noticed before the first one is.

    Raises:
        RefusedError: with the findings of all. UsageError, RemoteError: as `open_policy`.
    """
    findings: list[Finding] = []
    for contender in (one for one in contenders if not one.is_file):
        try:
            open_policy(open_for_sampling(contender.source), sampling.template, sampling.trust_remote_code)
        except RefusedError as error:
            findings += error.findings
    if findings:
        raise RefusedError(findings)


def answers_of(
    contender: Contender, source: str, out: Path, sampling: Sampling, measuring: Measuring, overwrite: bool
) -> Answers:
    """One answer of a policy to each prompt, sampled into OUT/answers/NAME.jsonl or what is missing of it; or a file's.

    Each policy draws with random numbers of its own, from the seed and its name: with the same ones the answers of two
    policies that hardly differ would go together, and a win rate is one of answers that do not.

    Args:
        source: the prompts to ask; all of them.

    Raises:
        UsageError, RefusedError, Interrupted, WarmergeError: as `sample_pool` and `read_pool`.
    """
    if contender.is_file:
        return _read(contender, Path(contender.source))
    path = out / ANSWERS / contender.file
    seed = int.from_bytes(
        hashlib.sha256(f"{sampling.seed}\0{contender.name}".encode(errors="replace")).digest()[:4], "big"
    )
    sampled = sample_pool(
        contender.source, source, path, replace(sampling, n=1, seed=seed), skip_bad_rows=measuring.skip_bad_rows,
        overwrite=overwrite, on_work=measuring.on_work, progress=measuring.progress,
    )  # fmt: skip
    # Its warnings say "raise --max-new-tokens", which a file's cannot.
    return replace(_read(contender, path), warnings=sampled.warnings, seed=seed)


def shared_prompts(prompts: Prompts, answers: Sequence[Answers], skip: bool) -> tuple[tuple[Text, ...], list[str]]:
    """The prompts that every policy has answered, and what is to be said of the others.

    Raises:
        RefusedError: a policy that has no answer to some, and not `skip`; or none that all have.
    """
    lacking = {
        one.contender.name: [i for i, prompt in enumerate(prompts.texts) if said(prompt) not in one.texts]
        for one in answers
    }
    kept = tuple(prompt for prompt in prompts.texts if all(said(prompt) in one.texts for one in answers))
    bad = {name: missing for name, missing in lacking.items() if missing}
    if bad and not (skip and kept):
        then = "--skip-bad-rows compares on the prompts that all have answered" if kept else "no prompt is left"
        raise RefusedError(
            Finding(name, f"has no answer to {len(missing)} of {len(prompts.texts)} prompts, as to that of "
                    f"{plain(prompts.places[missing[0]])}; {then}")
            for name, missing in bad.items()
        )  # fmt: skip
    notes = [
        f"{plain(name)} has no answer to {counted(len(missing), 'prompt')}: left out for all"
        for name, missing in bad.items()
    ]
    for one in (one for one in answers if one.contender.is_file):
        if more := len(one.texts.keys() - {said(prompt) for prompt in prompts.texts}):
            notes.append(f"{plain(one.contender.name)} has answers to {counted(more, 'prompt')} not asked: left out")
    return kept, notes


def _contender(spec: str) -> Contender:
    name, source = parse_named(spec)
    path = Path(source)
    if path.is_file():
        return Contender(name, source, is_file=True)
    step, run = _STEP.fullmatch(path.resolve().name), path.resolve().parent
    if step is None or not (run / RECORD).is_file():
        return Contender(name, source)
    try:
        proxy = parse(text_of(run / RECORD))["proxy"]["name"]
    except (OSError, ValueError, KeyError, TypeError):
        proxy = None
    given = source != spec
    proxy = proxy if isinstance(proxy, str) and proxy else None
    shown = name if given or proxy is None else f"{proxy} step {int(step[1])}"
    # As it was typed, for messages.
    return Contender(shown, source, run=path.parent if path.name == step[0] else run, step=int(step[1]), proxy=proxy)


def _read(contender: Contender, path: Path) -> Answers:
    """The first candidate of each row of a pool."""
    pool, rows = read_pool(path), read_rows(str(path))
    by_number = {number: row for _, number, row in rows if not isinstance(row, Finding)}
    texts: dict[str, Text] = {}
    twice = []
    tokens: dict[str, int] = {}
    cut = empty = 0
    for row in pool.rows:
        key, columns = said(row.prompt), by_number[row.row]
        twice += [str(row.row)] if key in texts else []
        texts[key] = row.answers[0]
        count = columns.get("tokens")
        if isinstance(count, list) and count and isinstance(count[0], int):
            tokens[key] = count[0]
        finished = columns.get("finished")
        cut += isinstance(finished, list) and not finished[0]
        empty += row.answers[0] == ""
    if twice:
        what = f"has prompts for the second time (in row {some(twice)}): which answer counts? Keep one row of each"
        raise RefusedError([Finding(str(path), what)])
    warnings = []
    if cut > _MANY_CUT * len(texts):
        what = f"{cut} of {len(texts)} answers were cut where they were sampled; half an answer is judged as such"
        warnings.append(Finding(str(path), what))
    if empty:
        warnings.append(Finding(str(path), f"{empty} of {len(texts)} answers are empty; they are judged as they are"))
    return Answers(contender, path, texts, tokens if len(tokens) == len(texts) else None, tuple(warnings))
