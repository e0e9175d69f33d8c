"""A part of a judge's work as files: what a process anywhere is to score, and what it found.

STORE/texts/DIGEST.jsonl                a window of texts
STORE/KEY/NAME/unit.json                a unit: a judge, as it was opened here, and windows
STORE/KEY/NAME/DIGEST.safetensors       the rewards of one of these windows, as soon as they are finished
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from warmerge.errors import Finding, RefusedError
from warmerge.pipeline.scoring.kept import read_kept, write_kept
from warmerge.pipeline.scoring.texts import Window

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[numpy.float64]

UNIT, TEXTS = "unit.json", "texts"
_FORMAT = "warmerge scoring unit 1"


@dataclass(frozen=True)
class Source:
    """A checkpoint as the driver saw it: how the user named it, where it is for all machines, and digests of what it
    holds. Elsewhere the same path may hold something else."""

    label: str
    at: str
    fingerprint: str
    adapter: str
    small: dict[str, str]


@dataclass(frozen=True)
class Merge:
    """How the weights of several checkpoints become one: the name of the rule, its options, the dtype of the plan."""

    rule: str
    options: dict[str, Any]
    dtype: str


@dataclass(frozen=True)
class Part:
    """What a unit is to do. `dtypes` are those of the model's body by kind of device."""

    key: str
    label: str
    inputs: tuple[Source, ...]
    into: Source | None
    base: str | None
    merge: Merge | None
    loading: dict[str, Any]
    dtypes: dict[str, str]
    batch_tokens: int | None
    versions: dict[str, str]
    windows: tuple[Window, ...]


@dataclass(frozen=True)
class Scored:
    """The rewards (N,) of a window, and how they came about. `machine` is the name of the one that computed them."""

    rewards: Array
    seconds: float
    merge_seconds: float
    weights_bytes: int
    computed: str
    rule: str
    cut: tuple[int, int]
    doubts: tuple[Finding, ...]
    machine: str


def write_part(folder: Path, part: Part) -> None:
    """Writes what the unit in this folder is to do."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNIT).write_text(json.dumps({"format": _FORMAT, **asdict(part)}, indent=1) + "\n", encoding="utf-8")


def read_part(folder: Path) -> Part:
    """What `write_part` wrote.

    Raises:
        RefusedError: the file is damaged, or of another version.
    """
    try:
        said = json.loads((folder / UNIT).read_text(encoding="utf-8"))
        if said.pop("format") != _FORMAT:
            raise ValueError("of another version")
        into, merge = said.pop("into"), said.pop("merge")
        return Part(
            inputs=tuple(Source(**source) for source in said.pop("inputs")),
            into=None if into is None else Source(**into),
            merge=None if merge is None else Merge(**merge),
            windows=tuple(Window(**window) for window in said.pop("windows")),
            **said,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"does not say what is to be scored ({error}); delete its folder, and give the same command again"
        raise RefusedError([Finding(str(folder / UNIT), what)]) from None


def windows_of_unit(folder: Path) -> set[str]:
    """The digests of the windows that a unit is to score or has scored; of those alone where its file is damaged."""
    try:
        asked = {window.digest for window in read_part(folder).windows}
    except RefusedError:
        asked = set()
    return asked | {path.stem for path in folder.glob("*.safetensors")}


def write_scored(folder: Path, key: str, window: Window, scored: Scored) -> None:
    """Keeps the rewards of a window; the file appears whole or not at all."""
    facts = {name: value for name, value in vars(scored).items() if name not in ("rewards", "doubts")}
    facts |= {"doubts": [asdict(doubt) for doubt in scored.doubts]}
    said = {"key": key, "texts": window.digest, "facts": json.dumps(facts)}
    write_kept(folder / _name(window), {"rewards": scored.rewards}, said)


def read_scored(path: Path, key: str, window: Window) -> Scored | None:
    """The rewards of a window as a unit left them in a file; None where they cannot be used."""
    try:
        arrays, said = read_kept(path)
        facts = json.loads(said["facts"])
        doubts = tuple(Finding(**doubt) for doubt in facts.pop("doubts"))
        found = Scored(arrays["rewards"], doubts=doubts, cut=tuple(facts.pop("cut")), **facts)
        own = (said["key"], said["texts"], found.rewards.dtype, found.rewards.shape)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # damaged: it is scored again, and nothing is lost but time
    good = own == (key, window.digest, numpy.dtype(numpy.float64), (window.count,))
    return found if good and bool(numpy.isfinite(found.rewards).all()) else None


def find_scored(store: Path, key: str, wanted: Sequence[Window]) -> dict[str, Scored]:
    """What units of this key left in the store, of the windows that are wanted, by their digests."""
    windows = {window.digest: window for window in wanted}
    read = ((p.stem, read_scored(p, key, windows[p.stem])) for p in finished(store, key) if p.stem in windows)
    return {digest: scored for digest, scored in read if scored is not None}


def finished(store: Path, key: str) -> list[Path]:
    """The files that units of this key left in the store; their stems are digests of windows."""
    return sorted((store / key).glob("*/*.safetensors"))


def other_contents(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """The names under which two mappings hold different values."""
    return sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))


def _name(window: Window) -> str:
    return f"{window.digest}.safetensors"
