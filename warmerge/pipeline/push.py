"""`warmerge push`: check a reward model, describe it honestly, and put it on the Hub in one commit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from warmerge.errors import Finding, RefusedError, UsageError, plain
from warmerge.pipeline.publication.contents import CARD, left_out, merge_record, model_files, stale
from warmerge.pipeline.publication.licence import licence_of_members
from warmerge.pipeline.publication.measured import read_measured
from warmerge.pipeline.publication.readme import OWN, own_card, refuse_for_own_card, written_card
from warmerge.report.card import CardFacts
from warmerge.rewards.config import effective_config
from warmerge.version import versions
from warmerge.weights import compat, small_files
from warmerge.weights.checkpoint import ADAPTER_CONFIG, Checkpoint
from warmerge.weights.locate import open_checkpoint
from warmerge.weights.plan import DTYPE_NAMES, choose_threads, plan_merge
from warmerge.weights.remote.pushing import Change, Target, change, commit, full_name, look
from warmerge.weights.remote.reading import is_branch
from warmerge.weights.rules import RULES, Options
from warmerge.weights.samples import read_sample
from warmerge.weights.stream import Engine, coefficients_of, refuse_changed


@dataclass(frozen=True)
class Proposal:
    """What a push would do; nothing has been sent.

    `files`: name -> bytes of each; `unchanged` are there already, `deleted` are of an earlier model; `left_out` lie in
    the folder and are not sent. `licence` with the words on where it comes from. `card` is README.md.
    """

    repo: str
    revision: str | None
    exists: bool
    private: bool
    create_pr: bool
    message: str
    files: Mapping[str, int]
    unchanged: tuple[str, ...]
    deleted: tuple[str, ...]
    left_out: tuple[str, ...]
    licence: Mapping[str, str]
    licence_source: str
    card: str
    warnings: tuple[Finding, ...]
    new_branch: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes that are to be sent."""
        return sum(size for name, size in self.files.items() if name not in self.unchanged)

    @property
    def nothing(self) -> bool:
        """Whether the repository is already as it would be."""
        return self.exists and not self.new_branch and len(self.unchanged) == len(self.files) and not self.deleted


@dataclass(frozen=True)
class Ready:
    """A push that was checked and described; `send` makes it."""

    proposal: Proposal
    target: Target
    changes: Change


@dataclass(frozen=True)
class Pushed:
    """Where the model is: an address for people and the commit, None after `dry_run`."""

    url: str
    commit: str | None
    proposal: Proposal

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        content = asdict(self.proposal) | {"warnings": [str(warning) for warning in self.proposal.warnings]}
        return {"url": self.url, "commit": self.commit, **content}


def push(
    folder: str | Path,
    repo: str,
    *,
    dry_run: bool = False,
    confirm: Callable[[Proposal], bool] = lambda proposal: True,
    **choices: Any,
) -> Pushed:
    """Publishes a reward model's folder with a model card, in one commit, after every check.

    Only the model's own files are sent: weights, config, tokenizer, code, the card, and of warmerge.json what names
    no local folder. What an earlier model left in the repository is deleted in the same commit.

    Args:
        folder: a full reward model, as `average` writes it.
        repo: `org/name`, or `name` for one's own.
        dry_run: nothing is sent.
        confirm: is shown what will be done; nothing is sent unless it returns True.
        choices: as for `propose`.

    Raises:
        UsageError, RefusedError, RemoteError: see warmerge.errors. Where the message does not say otherwise, nothing
            has changed on the Hub.

    Example:
        >>> import warmerge
        >>> warmerge.push("warm", "me/warm-rm", dry_run=True).commit is None  # doctest: +SKIP
        True
    """
    ready = propose(folder, repo, **choices)
    return send(ready) if confirm(ready.proposal) and not dry_run else Pushed(ready.target.url, None, ready.proposal)


def propose(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    results: Sequence[str | Path] = (),
    licence: str | None = None,
    base_model: Sequence[str] = (),
    run_lines: bool = True,
    any_model: bool = False,
    threads: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Ready:
    """Checks a folder, looks at the repository, writes the model card; sends nothing.

    Args:
        private: None keeps a repository as it is and makes new ones private.
        revision: a branch; made when it is missing.
        create_pr: open a pull request instead of changing the main branch.
        message: of the commit.
        results: folders of `eval` and `lmc-curve`, of this model or of its members; they go into the card.
        licence: a licence of the Hub's list, such as apache-2.0; if not given, the one that all members state.
        base_model: Hub ids of what local members were fine-tuned from.
        run_lines: False leaves out loading the model and running the card's lines.
        any_model: also push what has no reward head.
        on_bytes, progress: called with the bytes to look through, and with those of each part that was.
    """
    if revision is not None and not is_branch(revision):
        raise UsageError(f"--revision: expected the name of a branch, found {revision!r}; --create-pr opens a request")
    if create_pr and revision is not None:
        raise UsageError("--create-pr asks to change the main branch; leave out --revision")
    target = look(full_name(repo), revision, private)
    checkpoint, warnings = _checked(Path(folder), any_model)
    progress = progress or (lambda count: None)
    (on_bytes or (lambda count: None))(2 * checkpoint.nbytes)  # once for every value, once for the files' digests
    _refuse_not_finite(checkpoint, Engine(choose_threads(threads), progress=progress))
    merge = merge_record(checkpoint)
    fingerprint = read_sample(checkpoint).fingerprint
    measured = read_measured(results, fingerprint, merge)
    own = own_card(checkpoint)
    if own is not None:
        refuse_for_own_card({"--license": licence, "--results": results, "--base-model": base_model})
    fields, source = _licence(licence, merge, Path(folder), own is not None)
    facts = CardFacts(
        repo=target.repo, revision=revision, license=fields, base_model=tuple(base_model), fingerprint=fingerprint,
        parameters=checkpoint.parameters, head=compat.head_shape(checkpoint), dtype=_dtypes(checkpoint),
        architecture=small_files.architecture(checkpoint.config or {}),
    )  # fmt: skip
    card, said = written_card(checkpoint, merge, facts, measured, run_lines) if own is None else (own, [OWN])
    files = {**model_files(checkpoint), **measured.pictures, CARD: card.encode(errors="backslashreplace")}
    try:
        changes = change(target, files, stale(target.digests, files), progress)
    except ValueError:  # as huggingface_hub says it where a file is gone
        refuse_changed([checkpoint])
        raise
    refuse_changed([checkpoint])  # what was looked through is what was hashed, and the Hub checks the hash
    proposal = Proposal(
        target.repo, revision, target.exists, target.private, create_pr, message or _message(merge),
        {name: _size(content) for name, content in files.items()}, changes.unchanged, changes.deletions,
        left_out(checkpoint, files), fields, source, card, (*warnings, *measured.remarks, *said), target.new_branch,
    )  # fmt: skip
    return Ready(proposal, target, changes)


def send(ready: Ready) -> Pushed:
    """Makes the commit; none where there is nothing to change."""
    proposal, target = ready.proposal, ready.target
    if proposal.nothing:
        return Pushed(target.url, target.head, proposal)
    published = commit(target, ready.changes, proposal.message, proposal.create_pr)
    return Pushed(published.url, published.commit, proposal)


def _checked(folder: Path, any_model: bool) -> tuple[Checkpoint, list[Finding]]:
    """The checkpoint, after the checks of `inspect` and those of a model that others are to load; and the doubts."""
    if not folder.is_dir():
        raise UsageError(f"{plain(str(folder))}: no such folder; push takes the folder of a reward model")
    if (folder / ADAPTER_CONFIG).exists():
        raise UsageError(f"{plain(str(folder))} is a LoRA adapter; push takes a full model, as average writes it")
    checkpoint = open_checkpoint(folder)
    refusals, warnings = compat.check([checkpoint], any_model=any_model, effective_config=effective_config)
    if checkpoint.config is None:
        refusals.append(Finding(str(folder), "has no config.json, without which nobody can load it; add it"))
    if not any(name in checkpoint.folder.sizes() for name in small_files.TOKENIZER_FILES):
        refusals.append(Finding(str(folder), "has no tokenizer files; copy those of the model it was trained from"))
    if refusals:
        raise RefusedError(refusals)
    return checkpoint, warnings


def _refuse_not_finite(checkpoint: Checkpoint, engine: Engine) -> None:
    """Looks through every weight; RefusedError with each tensor that holds NaN or Inf."""
    plan = plan_merge([checkpoint], RULES["uniform"], Options())
    engine.merge(plan.tensors, coefficients_of(plan, plan.tensors, engine), lambda tensor, start, tile: None)
    engine.refuse_bad()


def check_target(repo: str) -> None:
    """Raises what `propose` would raise of a repository that cannot be written to, before the hours of a merge."""
    look(full_name(repo), None, None)


def unknown_licence(folder: str | Path) -> str | None:
    """In words, why no licence is known; None where the members of a merge agree, or the user wrote the card."""
    checkpoint, _ = _checked(Path(folder), any_model=True)
    if own_card(checkpoint) is not None:
        return None
    fields, words = licence_of_members(merge_record(checkpoint), Path(folder))
    return None if fields else words


def _licence(
    given: str | None, merge: Mapping[str, Any] | None, folder: Path, own_card: bool
) -> tuple[dict[str, str], str]:
    if given:
        return {"license": given}, "as given"
    return licence_of_members(None if own_card else merge, folder)


def _message(manifest: Mapping[str, Any] | None) -> str:
    by = f"by warmerge {versions()['warmerge']}"
    if manifest is None:
        return f"Reward model, sent {by}"
    members = sum(entry["role"] == "member" for entry in manifest["inputs"])
    return f"Reward model: {manifest['rule']['name']} merge of {members}, {by}"


def _dtypes(checkpoint: Checkpoint) -> str:
    found = {tensor.dtype for tensor in checkpoint.tensors.values() if tensor.dtype in DTYPE_NAMES}
    return "+".join(sorted(DTYPE_NAMES[dtype] for dtype in found))


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size
