"""Every exception that warmerge raises on purpose, and what it says.

WarmergeError            exit code 1   something could not be done
├── UsageError           exit code 2   an argument that cannot be used
├── RefusedError         exit code 3   a checkpoint that must not be merged; carries every finding
├── RemoteError          exit code 1   the Hub did not give what was asked for
└── Interrupted          exit code 130 stopped by the user; says how to resume
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

_SHOWN = 20
# Of one name in a message; the longest path that Linux opens has 4,095 bytes, a tensor's name may have millions.
_LONGEST = 4096
# Errors of the file system in exceptions that are no OSError: of safetensors and tokenizers, and of torch.
_RUST_SAYS = re.compile(r"\(os error (?P<number>\d+)\)")
_TORCH_SAYS = re.compile(r"unable to .*file <(?P<file>.*)>.*\((?P<number>\d+)\)", re.DOTALL)


@dataclass(frozen=True)
class Finding:
    """One reason to refuse, or to warn: where it was found, and one sentence about it.

    `where` is a member or a file as the user would name it; `tensor` is a tensor's name or None.
    Names come from files that anybody may have written, so they are shown with `quoted`; so may what a library says of
    a damaged file, which becomes one line without control characters.

    >>> print(Finding("runs/1", "is NaN at element 3", tensor="score.weight"))
    runs/1: tensor 'score.weight' is NaN at element 3
    """

    where: str
    what: str
    tensor: str | None = None

    def __str__(self) -> str:
        place, what = plain(self.where), self.what
        if not what.isprintable():
            what = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(what.split()))
        return f"{place}: {what}" if self.tensor is None else f"{place}: tensor {quoted(self.tensor)} {what}"


class WarmergeError(Exception):
    """The root of the tree: `except warmerge.WarmergeError` catches all that warmerge raises on purpose."""

    exit_code = 1


class UsageError(WarmergeError):
    """An argument, or a combination of arguments, that cannot be used."""

    exit_code = 2


class RefusedError(WarmergeError):
    """A checkpoint that must not be merged. `findings` holds every reason, not only the first.

    >>> str(RefusedError([Finding("a", "is empty"), Finding("b", "is empty")])).splitlines()[0]
    'refused, 2 findings:'
    """

    exit_code = 3

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings: tuple[Finding, ...] = tuple(dict.fromkeys(findings))
        assert self.findings, "a refusal names its reasons"
        super().__init__(_listed(self.findings))


class RemoteError(WarmergeError):
    """The Hub could not be reached, or did not give what was asked for."""


class Interrupted(WarmergeError):  # noqa: N818 - not a fault
    """The user stopped a run; what was finished is kept, and the message says how to go on."""

    exit_code = 130


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Gives an OSError that names no file the name of this one: a full disk is met on writing, a failing one on
    reading, where a number stands for the file. What Rust and torch raise for the same becomes an OSError here."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:  # libraries raise some that are sentences
            error.filename = str(path)
        raise
    except Exception as error:
        said = _RUST_SAYS.search(str(error)) or _TORCH_SAYS.search(str(error))
        if said is None:
            raise
        number = int(said["number"])
        raise OSError(number, os.strerror(number), said.groupdict().get("file", str(path))) from error


def quoted(name: str) -> str:
    r"""`name` in quotes with control characters escaped, so that a file cannot write to the terminal.

    >>> quoted("a\x1b[31m")
    "'a\\x1b[31m'"
    """
    return repr(name) if len(name) <= _LONGEST else f"{name[:_LONGEST]!r}... ({len(name):,} characters)"


def plain(text: str) -> str:
    r"""`text` without quotes when it is printable, else as `quoted` shows it.

    >>> plain("runs/1"), plain("a\x00")
    ('runs/1', "'a\\x00'")
    """
    return text if text.isprintable() and len(text) <= _LONGEST else quoted(text)


def counted(number: int, noun: str) -> str:
    """A number with its noun, which gets an s where there is not one.

    >>> counted(1, "prompt"), counted(1200, "prompt")
    ('1 prompt', '1,200 prompts')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def some(names: Iterable[str], shown: int = 5) -> str:
    """The first few of `names`, sorted and quoted, and how many more there are.

    >>> some(["b", "a", "c"], shown=2)
    "'a', 'b' and 1 more"
    """
    ordered = sorted(names)
    text = ", ".join(quoted(name) for name in ordered[:shown])
    return text if len(ordered) <= shown else f"{text} and {len(ordered) - shown} more"


def _listed(findings: Sequence[Finding]) -> str:
    if len(findings) == 1:
        return f"refused: {findings[0]}"
    lines = [f"refused, {len(findings)} findings:", *(f"  - {finding}" for finding in findings[:_SHOWN])]
    if len(findings) > _SHOWN:
        lines.append(f"  ... and {len(findings) - _SHOWN} more")
    return "\n".join(lines)
