"""Rewards of texts by judges: models opened and named, scored here or as units of work on an engine, and kept.

Both ways give the same rewards to the bit, at equal threads: windows of texts are scored apart in any case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from warmerge.errors import UsageError
from warmerge.pipeline.engine import check_engine
from warmerge.pipeline.scoring.asked import Asked, Found, cuts_of, doubts_of_mixing
from warmerge.pipeline.scoring.here import score_here
from warmerge.pipeline.scoring.units import remove_units, score_in_units
from warmerge.rewards.bench import Measuring
from warmerge.rewards.scoring import Tokens

__all__ = ["Asked", "Found", "check_scoring", "cuts_of", "doubts_of_mixing", "remove_units", "score_all", "unit_folder"]


def score_all(
    asked: Sequence[Asked],
    measuring: Measuring,
    *,
    engine: str = "inline",
    address: str = "auto",
    store: Path | None = None,
    tokens: list[Tokens] | None = None,
) -> Iterator[Found]:
    """What each judge gives to its lists of texts, in the order of `asked`.

    Args:
        engine: "inline", in this process, one model in memory at a time, each given as soon as it is scored; "local"
            and "ray" as for `engine.run_units`, all given in the end.
        store: the folder of units; every machine that may run one has it by this path. What is there of an earlier run
            is used where it is of the same weights, texts, options and versions. The caller removes it when results
            are written.
        tokens: of texts that were scored here before, to be used again; those of these texts are added.

    Raises:
        UsageError, RefusedError, WarmergeError: as `load_reward_model`, `fill` and `scoring.score`; of units all that
            failed, with the model's name.
        RefusedError: parts of one model were computed in different dtypes or on different kinds of devices; a model's
            weights changed before its units had ended.
        WarmergeError: another command removed finished units.
        Interrupted: units were stopped; what is finished is kept.
    """
    check_scoring(engine, measuring, store)
    if engine == "inline":
        return score_here(asked, measuring, [] if tokens is None else tokens)
    assert store is not None
    return iter(score_in_units(asked, measuring, engine, address, store))


def check_scoring(engine: str, measuring: Measuring, out: Path | None) -> None:
    """Refuses an engine that cannot be used, before data are read.

    Raises:
        UsageError: an unknown engine, fewer threads than one, no folder for units, one GPU named for all of them.
    """
    check_engine(engine, measuring.threads)
    if engine == "inline":
        return
    if out is None:
        raise UsageError(f"--engine {engine}: -o is missing; finished parts are kept beside the results")
    if measuring.loading.device not in ("auto", "cpu", "cuda"):
        what = f"--device {measuring.loading.device}: with --engine {engine} each process has a GPU of its own"
        raise UsageError(f"{what}; give --device cuda, and choose GPUs with CUDA_VISIBLE_DEVICES")


def unit_folder(results: Path) -> Path:
    """Where the units of a command lie whose results are this file: beside it, hidden.

    >>> unit_folder(Path("out/eval.json")).as_posix()
    'out/.eval.json.units'
    """
    return results.with_name(f".{results.name}.units")
