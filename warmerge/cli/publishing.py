"""push."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from warmerge.cli.shared import AnyModel, Debug, Json, Threads, bar, errors, warn
from warmerge.errors import UsageError, plain, some

if TYPE_CHECKING:
    from warmerge.pipeline.push import Proposal, Pushed, Ready

Yes = Annotated[bool, typer.Option("-y", "--yes", help="Do not ask before sending.")]


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A reward model, as average writes it.")],
    repo: Annotated[str, typer.Argument(metavar="REPO_ID", help="org/name, or name for one of your own.")],
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Who may see a new repository: private if not given.", show_default=False
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made when it is missing.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of changing the main branch.")
    ] = False,
    message: Annotated[str | None, typer.Option("-m", "--message", help="Commit message.")] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel="Model card",
            help="Results of eval or lmc-curve, of this model or of its members; repeatable.",
        ),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            "--license",
            metavar="ID",
            rich_help_panel="Model card",
            help="Such as apache-2.0; if not given, the one that all members state.",
        ),
    ] = None,
    base_model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REPO_ID", rich_help_panel="Model card", help="What local members were fine-tuned from; repeatable."
        ),
    ] = None,
    no_run: Annotated[
        bool,
        typer.Option(
            "--no-run", rich_help_panel="Model card", help="Do not load the model to run the card's lines on it."
        ),
    ] = False,
    any_model: AnyModel = False,
    threads: Threads = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, show what would be sent and the model card, and stop.")
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Publish a reward model on the Hugging Face Hub, with an honest model card, in one commit.

    Before anything is sent the folder is checked, every weight looked at, and the card's lines are run. Example:

    warmerge push warm me/warm-rm --results eval --results lmc
    """
    with errors(debug):
        from warmerge.pipeline import push as pipeline

        refuse_unasked(yes or dry_run)
        choices = {
            "private": private, "revision": revision, "create_pr": create_pr, "message": message,
            "results": results or (), "base_model": base_model or (), "run_lines": not no_run, "any_model": any_model,
            "threads": threads,
        }  # fmt: skip
        ready = described(folder, repo, licence, asking=not (yes or dry_run), **choices)
        if dry_run:
            dry = pipeline.Pushed(ready.target.url, None, ready.proposal)
            typer.echo(json.dumps(dry.as_json(), indent=2) if as_json else ready.proposal.card)
            return
        pushed = sent(ready, yes)
        typer.echo(json.dumps(pushed.as_json(), indent=2) if as_json else pushed.url)


def described(folder: Path, repo: str, licence: str | None, *, asking: bool, **choices: Any) -> Ready:
    """Checks and describes a push, and shows on stderr what it would do. `asking`: the user may be asked."""
    from warmerge.pipeline.push import propose

    if licence is None and asking:
        licence = _ask_licence(folder)
    with bar("checking") as (begin, advance):
        ready = propose(folder, repo, licence=licence, on_bytes=begin, progress=advance, **choices)
    _show(ready.proposal)
    return ready


def sent(ready: Ready, yes: bool) -> Pushed:
    """Sends it when the user agrees, or has agreed; ends with exit code 1 when not."""
    from warmerge.pipeline.push import send

    agreed = yes or ready.proposal.nothing
    if not agreed and _answer(f"Send {_bytes(ready.proposal.nbytes)}? [y/N]: ").lower() not in ("y", "yes"):
        raise typer.Abort
    return send(ready)


def refuse_unasked(yes: bool) -> None:
    """Raises UsageError where a question would be needed and there is nobody to answer it."""
    if not yes and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("this is no terminal, so nobody can be asked; add -y to send without asking, or --dry-run")


def _ask_licence(folder: Path) -> str | None:
    """The licence, asked for where the members do not state one."""
    from warmerge.pipeline.push import unknown_licence

    words = unknown_licence(folder)
    return None if words is None else _answer(f"Licence, such as apache-2.0 ({words}; empty: state none): ") or None


def _answer(question: str) -> str:
    """What the user types. The question goes to stderr as a whole, which typer's own does not: stdout is the result."""
    typer.echo(question, nl=False, err=True)
    return sys.stdin.readline().strip()


def _show(proposal: Proposal) -> None:
    state = "private" if proposal.private else "public"
    where = f"{proposal.repo}{f', branch {proposal.revision}' if proposal.revision else ''}"
    kind = "pull request to" if proposal.create_pr else "" if proposal.exists else "new repository"
    lines = [f"{kind} {where} ({state})".strip()]
    for name, size in sorted(proposal.files.items()):
        lines.append(f"  {plain(name):32} {size:>16,}  {'unchanged' if name in proposal.unchanged else 'send'}")
    lines += [f"  {plain(name):32} {'':>16}  delete" for name in proposal.deleted]
    if proposal.left_out:
        lines.append(f"not sent: {some(proposal.left_out)}")
    licence = proposal.licence.get("license")
    lines.append(
        f"licence: {plain(licence) if licence else 'none; name one with --license'} ({proposal.licence_source})"
    )
    if proposal.nothing:
        lines.append("nothing to send: the repository is already as this folder")
    for line in lines:
        typer.echo(line, err=True)
    warn(proposal.warnings)


def _bytes(count: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.1f} kB"
