"""Open, check and plan a merge: what every command does before it sums the first weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from warmerge.errors import Finding, RefusedError, UsageError
from warmerge.rewards.config import effective_config
from warmerge.weights import compat
from warmerge.weights.checkpoint import Checkpoint
from warmerge.weights.locate import make_local, open_checkpoint
from warmerge.weights.plan import DTYPES, MergePlan, Selection, parse_size, plan_merge, refuse_missing_base_tensors
from warmerge.weights.rules import RULES, Options, check_options
from warmerge.weights.samples import doubts, read_sample, same_contents

Spec = str | Path


@dataclass(frozen=True)
class Prepared:
    """A merge that was checked and planned; no weight has been summed. `warnings` are reasons for doubt."""

    plan: MergePlan
    warnings: tuple[Finding, ...]
    fingerprints: tuple[str, ...]
    tokenizer: Checkpoint
    source: Checkpoint


def prepare(
    checkpoints: Sequence[Spec],
    *,
    rule: str = "uniform",
    weights: Sequence[float] | None = None,
    normalize: bool = False,
    lam: float | None = None,
    eta: float | None = None,
    base: Spec | None = None,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rest_from: int | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    any_model: bool = False,
    allow_duplicates: bool = False,
    tokenizer_from: int | None = None,
    stream: bool = False,
) -> Prepared:
    """Opens, checks and plans; reads headers, small files and 4 KiB of each tensor. Arguments as for `average`.

    What lies on the Hub is then downloaded into its cache, unless `stream`: the plan reads it where it is, as it does
    what lies in an object store.

    Raises:
        UsageError: an argument that cannot be used.
        RefusedError: the checkpoints must not be merged; with every finding.
    """
    if not checkpoints:
        raise UsageError("no checkpoint given")
    if rule not in RULES:
        raise UsageError(f"--rule: expected one of {', '.join(RULES)}, found {rule!r}")
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"--dtype: expected auto, {', '.join(DTYPES)}, found {dtype!r}")
    chosen, options = RULES[rule], Options(None if weights is None else tuple(weights), normalize, lam, eta)
    check_options(chosen, options, len(checkpoints), base is not None)
    selection = Selection(tuple(only), tuple(exclude), _position("--rest-from", rest_from, len(checkpoints)))
    tokenizer = _position("--tokenizer-from", tokenizer_from, len(checkpoints))
    shard_bytes = parse_size(max_shard_size)

    members, base_checkpoint, damaged = _open_all(checkpoints, base, stream)
    if damaged:
        # What can be opened is checked too: the user learns of everything at once.
        more = compat.check(members, any_model=any_model)[0] if members and not selection.partial else []
        raise RefusedError([*damaged, *more])
    refusals, warnings = compat.check(
        members,
        base=base_checkpoint,
        selection=selection,
        dtype=dtype,
        any_model=any_model,
        allow_duplicates=allow_duplicates,
        tokenizer_from=tokenizer,
        effective_config=effective_config,
    )
    if len(members) < 2:
        refusals.append(Finding(members[0].label, "is the only checkpoint; a merge takes two or more"))
    if refusals:
        raise RefusedError(refusals)
    if base is not None and not chosen.needs_base and not any("adapter" in member.details for member in members):
        raise UsageError(f"--base is not used: --rule {rule} does not need it, and no checkpoint is a LoRA adapter")
    if chosen.needs_base:
        assert base_checkpoint is not None
        refuse_missing_base_tensors(members, base_checkpoint, selection)
    used = [*members, *([base_checkpoint] if chosen.needs_base and base_checkpoint is not None else [])]
    local = used if stream else make_local(used, leave_stores=True)
    members, base_checkpoint = local[: len(members)], local[len(members)] if chosen.needs_base else None
    samples = [read_sample(checkpoint) for checkpoint in local]
    same = [] if allow_duplicates else same_contents(members, samples[: len(members)])
    if same:
        raise RefusedError(same)
    warnings += doubts(members, samples[: len(members)])
    plan = plan_merge(
        members, chosen, options, base=base_checkpoint, selection=selection, dtype=dtype, max_shard_bytes=shard_bytes
    )
    source = members[selection.rest_from or 0]
    return Prepared(
        plan,
        tuple(warnings),
        tuple(sample.fingerprint for sample in samples),
        source if tokenizer is None else members[tokenizer],
        source,
    )


def _open_all(
    checkpoints: Sequence[Spec], base: Spec | None, streamed: bool
) -> tuple[list[Checkpoint], Checkpoint | None, list[Finding]]:
    """The checkpoints that can be opened, the base, and why the others cannot."""
    opened: list[Checkpoint] = []
    findings: list[Finding] = []
    base_checkpoint = None
    for spec in checkpoints:
        try:
            opened.append(open_checkpoint(spec, base, streamed=streamed))
        except RefusedError as error:
            findings += error.findings
    if base is not None:
        try:
            base_checkpoint = open_checkpoint(base, streamed=streamed)
        except RefusedError as error:
            findings += error.findings
    return opened, base_checkpoint, findings


def _position(flag: str, number: int | None, count: int) -> int | None:
    if number is None:
        return None
    if not 1 <= number <= count:
        raise UsageError(f"{flag}: expected a checkpoint's number from 1 to {count}, found {number}")
    return number - 1


def mixture(members: Sequence[Checkpoint], weights: Sequence[float], dtype: str = "auto") -> MergePlan:
    """The plan of sum_i w_i theta_i over checkpoints that `prepare` has checked.

    Args:
        weights: with sum 1; some may be negative. Those that are 0 are not read. Equal ones are the uniform rule, so
            that the result is the one of `average` to the bit.
    """
    used = [(member, weight) for member, weight in zip(members, weights, strict=True) if weight != 0]
    chosen = tuple(weight for _, weight in used)
    uniform = all(weight == 1 / len(chosen) for weight in chosen)
    rule, options = (RULES["uniform"], Options()) if uniform else (RULES["weighted"], Options(chosen))
    return plan_merge([member for member, _ in used], rule, options, dtype=dtype)


def short_labels(specs: Sequence[Spec]) -> list[str]:
    """The last part of each name where those differ, else the names as they were given.

    >>> short_labels(["runs/1", "runs/2"]), short_labels(["a/rm", "b/rm"])
    (['1', '2'], ['a/rm', 'b/rm'])
    """
    names = [Path(spec).name for spec in specs]
    return names if len(set(names)) == len(names) and all(names) else [str(spec) for spec in specs]
