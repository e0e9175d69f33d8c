"""What a run is of, beside what it was begun with; and the lock that keeps other processes out of its folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from warmerge.errors import UsageError, WarmergeError, plain
from warmerge.locks import take_lock
from warmerge.pipeline.found.rl_runs import RECORD
from warmerge.pipeline.scoring.judge import Judge
from warmerge.pipeline.scoring.mixtures import digests_of_small_files
from warmerge.pipeline.scoring.rewarders import OwnFunction
from warmerge.weights.checkpoint import ADAPTER_CONFIG
from warmerge.weights.samples import content_digest
from warmerge.weights.small_files import small_file

LOCK, WORKING = ".lock", "working"


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Holds the lock on a run's folder, which is made.

    Raises:
        WarmergeError: another process writes it.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"-o {plain(str(out))} is a file; name a folder")
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    # The file stays: to remove it would let another process lock another file of that name.
    with (out / LOCK).open("a") as file:
        if not take_lock(file.fileno()):
            what = f"another process is writing {plain(str(out))} at this moment"
            raise WarmergeError(f"{what}; wait for it or choose another -o")
        try:
            yield
        finally:
            if made and {path.name for path in out.iterdir()} <= {LOCK}:  # nothing came of it
                shutil.rmtree(out)


def decides(judge: Judge | OwnFunction) -> list[Any]:
    """What decides a judge's rewards: every byte of its weights, wherever they lie, and what makes them a model."""
    if isinstance(judge, OwnFunction):
        return judge.contents()
    return [
        [content_digest(source), digests_of_small_files(source),
         hashlib.sha256(small_file(source, ADAPTER_CONFIG) or b"").hexdigest()]
        for source in judge.inputs
    ]  # fmt: skip


def begun(out: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run of the same question, {} where none was begun.

    Raises:
        UsageError: the folder holds something else, or a run of another question.
    """
    asked = json.loads(json.dumps(asked))  # as it was written, and will be read again
    # Other ranks than the first make no folder; the trainer makes its own before the record is written.
    if not out.exists() or {path.name for path in out.iterdir()} <= {WORKING, LOCK, f".{RECORD}.partial"}:
        return {}
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        earlier = record["asked"]
        differing = [
            f"  {key}: {json.dumps(there)} there, {json.dumps(now)} now" for key, there, now in _pairs(earlier, asked)
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        what = f"{plain(str(out))} is not empty and holds no readable {RECORD}"
        raise UsageError(f"{what}; choose another folder for -o") from None
    if differing:
        what = f"{plain(str(out))} holds another run; choose another folder for -o, or delete it. Differing:"
        raise UsageError("\n".join([what, *differing]))
    assert isinstance(record, dict)
    return record


def _pairs(earlier: Mapping[str, Any], asked: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(what, there, now) of all that differs; settings one by one."""
    flat = [{**{k: v for k, v in each.items() if k != "settings"}, **each["settings"]} for each in (earlier, asked)]
    keys = dict.fromkeys([*flat[0], *flat[1]])
    return [(key, flat[0].get(key), flat[1].get(key)) for key in keys if flat[0].get(key) != flat[1].get(key)]
