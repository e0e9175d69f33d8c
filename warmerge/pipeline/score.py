"""`warmerge score`: a reward model's reward of every answer in a file; and the same as a function for trainers."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warmerge.errors import Finding, RefusedError, UsageError, WarmergeError, naming, plain, quoted, some
from warmerge.pipeline.prepare import Spec
from warmerge.pipeline.scoring import Asked, check_scoring, remove_units, score_all, unit_folder
from warmerge.pipeline.scoring.judge import open_model
from warmerge.report.results import only_writer
from warmerge.rewards.bench import Measuring, cut_words
from warmerge.rewards.layouts import BadRow, Layout, answer_to, recognise
from warmerge.rewards.model import LoadOptions, load_reward_model
from warmerge.rewards.pairs import Text
from warmerge.rewards.rows import read_rows, refused_rows
from warmerge.rewards.scoring import Tokens, score

# What the answer to a prompt is called where a row has one only.
ANSWERS = ("completion", "response", "answer", "output")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class ScoredFile:
    """What `score` wrote: where, how many rows and answers, how many were cut, the bad rows left out, and doubts."""

    out: Path
    rows: int
    answers: int
    prompt_cut: int
    answer_cut: int
    skipped: int
    warnings: tuple[Finding, ...]

    @property
    def notes(self) -> list[str]:
        """What a reader of the file should know: texts that were cut, rows left out."""
        words = cut_words(self.answers, self.prompt_cut, self.answer_cut)
        return ([words] if words else []) + ([f"{self.skipped} bad rows were left out"] if self.skipped else [])


@dataclass(frozen=True)
class _Column:
    """The texts whose rewards go into one new column of a row: a list of them, or the one."""

    name: str
    texts: tuple[tuple[Text, Text], ...]
    is_list: bool


def score_file(
    checkpoint: Spec,
    data: str,
    out: Spec,
    *,
    column: str = "reward",
    base: Spec | None = None,
    options: LoadOptions | None = None,
    batch_tokens: int | None = None,
    threads: int | None = None,
    skip_bad_rows: bool = False,
    engine: str = "inline",
    address: str = "auto",
    overwrite: bool = False,
    on_work: Callable[[int], None] = lambda count: None,
    progress: Callable[[int], None] = lambda count: None,
) -> ScoredFile:
    """Writes the rows of `data` with their rewards added, in their order, as JSON lines. NaN and infinities in other
    columns, which JSON cannot hold, become null.

    - `prompt` and `candidates`: `reward` is a list, one number for each candidate.
    - preference pairs, in any layout that `eval` reads: `reward_chosen` and `reward_rejected`, lists where the answers
      are lists, as in RewardBench 2.
    - `prompt` and `completion` (or `response`, `answer`, `output`), or `text` alone: `reward` is a number.

    Args:
        out: a new file ending in .jsonl or .jsonl.gz.
        column: another name for `reward`.
        engine, address: the model scores in this process ("inline"), or in parts on "local" or "ray" as in `train`, the
            last on the cluster at `address`; with so many `threads` each, on the CPU.

    Raises:
        UsageError: `out` exists or is `data`, or a column of this name is there.
        WarmergeError: another command wrote `out` meanwhile; the message says where the rewards are.
        OSError: `out` cannot be written, which is found out before anything is scored.
        RefusedError: rows of no such form (the first ten are named); a checkpoint that is no reward model.
    """
    target = Path(out)
    if not target.name.endswith((".jsonl", ".jsonl.gz")):
        raise UsageError(f"-o: expected a name ending in .jsonl or .jsonl.gz, found {quoted(str(out))}")
    if target.exists() and not overwrite:
        raise UsageError(f"-o {plain(str(target))} exists; choose another name, or add --overwrite")
    if not target.parent.is_dir():
        raise UsageError(f"-o: the folder {plain(str(target.parent))} does not exist; make it first")
    if Path(data).exists() and target.exists() and target.samefile(data):
        raise UsageError(f"-o {plain(str(target))} is the data itself; choose another name")
    measuring = Measuring(
        options or LoadOptions(), base, batch_tokens=batch_tokens, threads=threads, on_work=on_work, progress=progress
    )
    check_scoring(engine, measuring, target)
    rows, skipped = _read(data, column, skip_bad_rows)
    texts = [text for _, columns in rows for entry in columns for text in entry.texts]
    asked, units = [Asked(open_model(checkpoint, base), (texts,))], unit_folder(target)
    with only_writer(target):
        _partial(target).unlink()  # that it cannot be written is not to be found out after hours
    on_work(len(texts))
    (found,) = score_all(asked, measuring, engine=engine, address=address, store=units)
    rewards = iter(found.rewards[0].tolist())
    lines = "".join(_line(row, columns, rewards) for row, columns in rows).encode()
    _write(target, gzip.compress(lines, mtime=0) if target.suffix == ".gz" else lines, overwrite)
    remove_units(asked, measuring, units)
    return ScoredFile(target, len(rows), len(texts), *found.cuts[0], skipped, found.doubts)


def reward_function(
    checkpoint: Spec, *, base: Spec | None = None, options: LoadOptions | None = None, batch_tokens: int | None = None
) -> Callable[..., list[float]]:
    """A reward function for TRL's trainers: `GRPOTrainer(reward_funcs=[warmerge.reward_function("warm")])`.

    The function takes `prompts` and `completions` (strings, or lists of messages) by name, ignores other columns, and
    returns one reward for each completion. It renders texts by the rule of `eval` and `score`, with the reward model's
    own tokenizer, whatever the policy's is.

    Raises:
        UsageError, RefusedError: as `score_file`; by the function too.
    """
    model = load_reward_model(checkpoint, options, base)

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        if len(prompts) != len(completions):
            raise UsageError(f"{len(completions)} completions for {len(prompts)} prompts; expected one for each")
        texts: list[tuple[Text, Text]] = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                texts.append(answer_to(prompt, completion, f"completions[{i}]", i))
            except BadRow as error:
                raise RefusedError([Finding(f"text {i + 1}", str(error))]) from None
        return list(map(float, score(model, Tokens(model.renderer, texts), batch_tokens)))

    reward.__name__ = f"reward_of_{Path(str(checkpoint)).resolve().name}"  # TRL logs rewards under this name
    return reward


def _read(data: str, column: str, skip_bad_rows: bool) -> tuple[list[tuple[Row, list[_Column]]], int]:
    """Rows, each with the columns that it will get, and how many bad rows were left out."""
    found = read_rows(data)
    pairs = recognise(row for _, _, row in found if not isinstance(row, Finding))
    bad, rows = [], []
    for file, number, row in found:
        if isinstance(row, Finding):
            bad.append(row)
            continue
        try:
            rows.append((row, _columns(row, number, column, pairs)))
        except BadRow as error:
            bad.append(Finding(f"{file}:{number}", str(error)))
    if not found:
        raise RefusedError([Finding(data, "is empty: there is no row in it")])
    if bad and not (skip_bad_rows and rows):
        raise refused_rows(bad, data, rest_is_good=bool(rows))
    taken = {entry.name for row, columns in rows for entry in columns if entry.name in row}
    if taken:
        raise UsageError(f"{plain(data)} has a column {some(taken)} already; name another: --column")
    return rows, len(bad)


def _columns(row: Row, number: int, column: str, pairs: tuple[Layout, frozenset[str]] | None) -> list[_Column]:
    if pairs is not None:
        layout, optional = pairs
        comparisons = layout.parse(row, number, optional)
        # One comparison, or RM-Bench's square of them: every chosen answer against every rejected one.
        side = math.isqrt(len(comparisons))
        sides = {
            "chosen": [answer for comparison in comparisons[::side] for answer in comparison.chosen],
            "rejected": [answer for comparison in comparisons[:side] for answer in comparison.rejected],
        }
        # A list of texts; one of messages is one text.
        are_lists = any(isinstance(row.get(name), list) and isinstance(row[name][0], str) for name in sides)
        first = comparisons[0].prompt
        return [
            _Column(f"{column}_{name}", tuple((first, answer) for answer in answers), are_lists)
            for name, answers in sides.items()
        ]
    prompt, candidates = row.get("prompt"), row.get("candidates")
    if candidates is not None:
        if not isinstance(candidates, list) or not candidates:
            raise BadRow("'candidates' is not a list of one text or more")
        answers = [answer_to(prompt, answer, f"candidates[{i}]", number) for i, answer in enumerate(candidates)]
        return [_Column(column, tuple(answers), True)]
    named = [name for name in ANSWERS if row.get(name) is not None]
    if prompt is None and not named and row.get("text") is not None:
        return [_Column(column, (answer_to("", row["text"], "text", number),), False)]
    if prompt is None or len(named) != 1:
        forms = f"chosen and rejected; prompt and candidates; prompt and one of {', '.join(ANSWERS)}; text"
        raise BadRow(f"has the columns {some(row)}; expected {forms}")
    return [_Column(column, (answer_to(prompt, row[named[0]], named[0], number),), False)]


def _line(row: Row, columns: Sequence[_Column], rewards: Iterator[float]) -> str:
    """A row with the next rewards, as many as it has texts."""
    added = {entry.name: [next(rewards) for _ in entry.texts] for entry in columns}
    single = {entry.name: added[entry.name][0] for entry in columns if not entry.is_list}
    return _json({**row, **added, **single}) + "\n"


def _json(row: Any) -> str:
    """One line; half a character, which JSON can hold and a file cannot, as an escape; NaN and infinities, which it
    cannot hold but Python writes into it, as null."""
    try:
        line = json.dumps(row, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        return _json(_without_nan(row))
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(row, default=str)
    return line


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and value - value != 0 else value


def _write(path: Path, data: bytes, overwrite: bool) -> None:
    """Writes a file that is there whole or not at all.

    Raises:
        WarmergeError: `path` is there by now, and not `overwrite`.
    """
    with only_writer(path), naming(path):
        partial = _partial(path)
        try:
            partial.write_bytes(data)
        except BaseException:
            partial.unlink()  # a full disk has no room for what nobody can use
            raise
        if path.exists() and not overwrite:
            what = f"-o {plain(str(path))} was written by another command meanwhile, and is left as it is"
            raise WarmergeError(f"{what}; what was scored here is in {plain(str(partial))}: give it another name")
        os.replace(partial, path)


def _partial(path: Path) -> Path:
    """An empty file of its own beside `path`: what was there may be a link, or what a killed command left."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    partial.touch(exist_ok=False)
    return partial
