"""A pool on the disk: a line for each prompt, and beside it what was asked. The same question goes on where it stopped.

POOL.jsonl           {"prompt", "candidates": [text], "tokens": [count], "finished": [true or false]}
POOL.sampling.json   what was asked, versions, seconds; "totals" once the pool is complete
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from warmerge.errors import UsageError, WarmergeError, plain, quoted
from warmerge.locks import take_lock
from warmerge.pipeline.sampling.policy import Answer
from warmerge.rewards.layouts import Text, canonical
from warmerge.training.record import write_json

SUFFIX = ".jsonl"


@dataclass(frozen=True)
class Totals:
    """What a pool holds: answers that were `truncated` did not end by themselves; `empty` ones have no text."""

    prompts: int
    answers: int
    tokens: int
    truncated: int
    empty: int


def record_of(out: Path) -> Path:
    """The file beside a pool that says what was asked.

    >>> record_of(Path("runs/pool.jsonl")).as_posix()
    'runs/pool.sampling.json'
    """
    return out.with_name(out.name.removesuffix(SUFFIX) + ".sampling.json")


def check_out(out: Path, prompts: str) -> None:
    """Refuses a name that a pool cannot have.

    Raises:
        UsageError: another suffix; the file of prompts itself; a folder.
    """
    if not out.name.endswith(SUFFIX):
        raise UsageError(f"-o: expected a name ending in {SUFFIX}, found {quoted(str(out))}")
    if out.is_dir():
        raise UsageError(f"-o {plain(str(out))} is a folder; choose another name")
    if out.exists() and Path(prompts).exists() and out.samefile(prompts):
        raise UsageError(f"-o {plain(str(out))} is the file of prompts itself; choose another name")


def begun(out: Path, asked: Mapping[str, Any], overwrite: bool) -> dict[str, Any]:
    """The record of a pool that was begun with the same question; {} where there is none, or `overwrite` replaces it.

    Raises:
        UsageError: the file is no such pool, or one of another question; with all that differs.
    """
    if not out.exists() or out.stat().st_size == 0:
        return {}
    try:
        record = json.loads(record_of(out).read_text(encoding="utf-8"))
        earlier = dict(record["asked"])
    except (OSError, ValueError, KeyError, TypeError):
        if overwrite:
            return {}
        what = f"{plain(str(out))} exists, without a readable {record_of(out).name} that says what was asked"
        raise UsageError(f"{what}; choose another name for -o, or add --overwrite") from None
    differing = [
        f"  {key}: {json.dumps(earlier.get(key))} there, {json.dumps(asked.get(key))} now"
        for key in dict.fromkeys([*earlier, *asked])
        if earlier.get(key) != asked.get(key)
    ]
    if differing and not overwrite:
        what = f"{plain(str(out))} holds another pool; choose another name for -o, or add --overwrite. Differing:"
        raise UsageError("\n".join([what, *differing]))
    assert isinstance(record, dict)
    return {} if differing else record


def write_record(out: Path, record: Mapping[str, Any]) -> None:
    """Writes the record beside a pool: whole or not at all."""
    write_json(record_of(out), record)


@contextmanager
def opened(out: Path, anew: bool) -> Iterator[int]:
    """A descriptor to append to a pool, which no other run may write meanwhile. `anew` empties it first.

    Raises:
        WarmergeError: another run is writing it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        if not take_lock(descriptor):
            what = f"another run is writing {plain(str(out))} at this moment"
            raise WarmergeError(f"{what}; wait for it or choose another -o")
        if anew:
            os.ftruncate(descriptor, 0)
        yield descriptor
    finally:
        os.close(descriptor)


def keep_complete(out: Path, descriptor: int, prompts: Sequence[Text], n: int) -> int:
    """How many prompts have their line. A last line that was not written to its end is cut off.

    Raises:
        UsageError: a line is not the one that belongs there.
    """
    kept = whole = 0
    with out.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            if kept >= len(prompts) or not _belongs(line, prompts[kept], n):
                what = f"{plain(str(out))}:{kept + 1} is not the line of this pool that belongs there"
                raise UsageError(f"{what}; the file was changed: choose another name for -o, or delete it")
            kept, whole = kept + 1, whole + len(line)
    os.ftruncate(descriptor, whole)
    return kept


def append(descriptor: int, prompt: Text, answers: Sequence[Answer]) -> None:
    """Adds the line of a prompt, and returns when it is on the disk."""
    row = {
        "prompt": prompt,
        "candidates": [answer.text for answer in answers],
        "tokens": [answer.tokens for answer in answers],
        "finished": [answer.finished for answer in answers],
    }
    data = memoryview((json.dumps(row, ensure_ascii=False) + "\n").encode())
    while data:
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)


def totals(out: Path) -> Totals:
    """What a complete pool holds."""
    prompts = answers = tokens = truncated = empty = 0
    with out.open("rb") as file:
        for row in map(json.loads, file):
            prompts, answers, tokens = prompts + 1, answers + len(row["candidates"]), tokens + sum(row["tokens"])
            truncated += row["finished"].count(False)
            empty += row["candidates"].count("")
    return Totals(prompts, answers, tokens, truncated, empty)


def finished(out: Path, record: Mapping[str, Any]) -> Totals | None:
    """What a pool holds that was finished; None for one that was not.

    Raises:
        UsageError: it was changed since.
    """
    if "totals" not in record:
        return None
    try:
        found = totals(out)
    except (ValueError, KeyError, TypeError, AttributeError):
        found = None
    if found is None or asdict(found) != record["totals"]:
        what = f"{plain(str(out))} was changed since it was sampled"
        raise UsageError(f"{what}; score it as it is, choose another name for -o, or delete it")
    return found


def _belongs(line: bytes, prompt: Text, n: int) -> bool:
    try:
        row = json.loads(line)
        same_prompt: bool = canonical(row["prompt"]) == canonical(prompt)
        return same_prompt and all(len(row[name]) == n for name in ("candidates", "tokens", "finished"))
    except (ValueError, KeyError, TypeError):
        return False
