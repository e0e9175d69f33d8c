"""train.json: what was asked of a run. The same question in the same folder goes on; another one is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from warmerge.errors import Finding, RefusedError, UsageError, WarmergeError, naming, plain
from warmerge.locks import take_lock
from warmerge.rewards.bench import Measuring
from warmerge.rewards.pairs import PreferenceSet
from warmerge.training.recipe import Member, read_member
from warmerge.training.settings import TrainSettings
from warmerge.training.sft import SftRecipe
from warmerge.weights.output import sync

TRAIN, MEMBERS, LOCK = "train.json", "members", ".lock"


@dataclass(frozen=True)
class Asked:
    """What a run is of. The same question in the same folder goes on; another one is refused.

    Args:
        base: what every member starts from; several where the user brings a start for each (Baklava).
        data: the training pairs.
        val: sets to measure members on, `NAME=PATH` or `PATH` each.
        probe: whether a head is fitted; without it the start's own, or a random one.
        corruption: share of the training labels that are swapped, and the seed that draws them.
    """

    base: tuple[str, ...]
    data: str
    settings: TrainSettings
    val: tuple[str, ...] = ()
    sft: SftRecipe | None = None
    probe: bool = True
    corruption: tuple[float, int] = (0.0, 0)


def question_of(
    asked: Asked,
    preferences: PreferenceSet,
    measuring: Measuring,
    bases: Sequence[str] = (),
    val: Sequence[str] = (),
) -> dict[str, Any]:
    """What makes a run this run: equal for the same question to the same data.

    Args:
        bases: fingerprints of the weights of each base.
        val: fingerprints of the validation sets: members that are ranked together were measured on the same.
    """
    question = asdict(asked)
    del question["settings"]["runs"]
    question["loading"] = asdict(measuring.loading)
    question |= {key: getattr(measuring, key) for key in ("limit", "skip_bad_rows")}
    question |= {"data_fingerprint": preferences.fingerprint, "base_fingerprints": bases, "val_fingerprints": val}
    found: dict[str, Any] = json.loads(json.dumps(question))  # as it will be read again: lists for tuples
    return found


def begun(out: Path, question: dict[str, Any]) -> dict[str, Any]:
    """train.json of a run of the same question that was prepared; {} where none was: it is prepared from the start."""
    # A kill while the record was written leaves its beginning, under another name.
    if not out.exists() or (out.is_dir() and {path.name for path in out.iterdir()} <= {f".{TRAIN}.partial", LOCK}):
        return {}
    try:
        record = json.loads((out / TRAIN).read_text(encoding="utf-8"))
        earlier = record["asked"]
    except FileNotFoundError:
        raise UsageError(f"{plain(str(out))} is not empty and holds no {TRAIN}; choose another folder for -o") from None
    except (ValueError, KeyError, TypeError, OSError):
        raise UsageError(f"{plain(str(out / TRAIN))} cannot be read; choose another folder for -o") from None
    if "head" not in record:
        return {}
    differing = _differences(earlier, question)
    if differing:
        what = f"{plain(str(out))} holds another run; choose another folder for -o, or delete it. Differing:"
        raise UsageError("\n".join([what, *differing]))
    assert isinstance(record, dict)
    return record


@contextmanager
def only_preparation(out: Path) -> Iterator[None]:
    """Holds the lock on a run's folder, which is made, while what its members share is written.

    Raises:
        WarmergeError: another process holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    # The file stays: to remove it would let another process lock another file of that name.
    with (out / LOCK).open("a") as file:
        if not take_lock(file.fileno()):
            what = f"another process is preparing a run in {plain(str(out))} at this moment"
            raise WarmergeError(f"{what}; wait for it, or choose another folder for -o")
        yield


def _differences(earlier: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two questions, a line each: `  settings.seed: 0 there, 1 now`."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*earlier, *now]))
        return [
            line for key in keys for line in _differences(earlier.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if earlier == now else [f"  {name}: {json.dumps(earlier)} there, {json.dumps(now)} now"]


def write_members(out: Path, made: Sequence[Member]) -> None:
    """member.json of each; one that is there must say the same."""
    for member in made:
        path = out / MEMBERS / member.name / "member.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_json(path, asdict(member))
        elif read_member(path) != member:
            what = f"says something else than {TRAIN} does; delete {path.parent} to train this member again"
            raise RefusedError([Finding(str(path), what)])


def write_json(path: Path, content: Any) -> None:
    """Writes a file that is there whole or not at all, and on the disk when this returns."""
    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        sync(partial)
        os.replace(partial, path)
