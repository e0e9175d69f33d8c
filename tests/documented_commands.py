"""The commands that README, docs and examples show: found, taken apart as a shell would, parsed as warmerge would.

Nothing is run here. See test_documented_commands.py for what is done with them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from warmerge import cli

ROOT = Path(__file__).parent.parent
# A trailing comment that says why a command is parsed, but not run.
MARKERS = ("needs the network", "needs a GPU", "needs the runs above", "takes hours")
# What may stand before `warmerge` in a command that runs it; in scripts, also functions of theirs.
LAUNCHERS = ("accelerate", "env", "exec", "python", "python3", "step", "time", "torchrun")
# Programs whose arguments may be called warmerge.
OTHERS = ("cd", "echo", "export", "git", "pip", "printf", "ray")
_KEYWORDS = ("if", "then", "else", "elif", "do", "while", "until", "!", "{", "}", "time")
_FENCE = re.compile(r"^(`{3,})(\w*)\s*$")
_OPENS, _CLOSES = re.compile(r"^(for|while|until|if)\b"), re.compile(r"(^|; *)(done|fi)$")
# What an expansion becomes: a number, which is also a text and a path; or, where it may be any number of words, LIST.
_VALUE, LIST = "1", "\0"
_USAGE_ERROR: Any = typer.BadParameter.__base__


@dataclass(frozen=True)
class Documented:
    """A command line of a document. `output`: what a transcript shows after it; `document` is relative to the root."""

    document: str
    line: int
    text: str
    output: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        return f"{self.document}:{self.line}: {' '.join(self.text.split())}"

    @property
    def marker(self) -> str | None:
        """Of MARKERS, the one that its trailing comment begins with."""
        return next((marker for marker in MARKERS if self.comment.startswith(marker)), None)

    @property
    def comment(self) -> str:
        found = re.search(r"(?:^|\s)#\s+([^'\"#]*)$", self.text)
        return found[1] if found else ""


def documents() -> list[Path]:
    """README.md, docs/*.md and examples/**/*.md."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]


def scripts() -> list[Path]:
    return sorted((ROOT / "examples").rglob("*.sh"))


def commands_of(path: Path) -> list[Documented]:
    """The commands of a document's ```console and ```bash blocks, or of a script, in order."""
    name, lines = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".sh":
        return [Documented(name, line, text) for line, text in _logical(list(enumerate(lines, start=1)))]
    found = []
    for kind, block in _blocks(lines):
        if kind == "console":
            found += _transcript(name, block)
        elif kind in ("bash", "sh"):
            found += [Documented(name, line, text) for line, text in _statements(block)]
    return found


def _blocks(lines: Sequence[str]) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    fence, kind, block = "", "", list[tuple[int, str]]()
    for number, line in enumerate(lines, start=1):
        if not fence and (match := _FENCE.match(line)):
            fence, kind, block = match[1], match[2], []
        elif fence and line.strip() == fence:
            yield kind, block
            fence = ""
        elif fence:
            block.append((number, line))


def _transcript(name: str, block: Sequence[tuple[int, str]]) -> list[Documented]:
    """Commands begin with `$ ` and go on after a trailing backslash; what follows is their output."""
    found, i = list[Documented](), 0
    while i < len(block):
        number, line = block[i]
        i += 1
        if not line.startswith("$ "):
            continue
        text = line[2:]
        while text.endswith("\\") and i < len(block):
            text += "\n" + block[i][1]
            i += 1
        end = next((j for j in range(i, len(block)) if block[j][1].startswith("$ ")), len(block))
        found.append(Documented(name, number, text, tuple(shown for _, shown in block[i:end])))
    return found


def _logical(lines: Sequence[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Lines joined at trailing backslashes, and within quotes that are still open; none that are empty or comments."""
    begun, text = 0, ""
    for number, line in lines:
        if not text and (not line.strip() or line.lstrip().startswith("#")):
            continue
        begun, text = (begun, f"{text}\n{line}") if text else (number, line)
        if not line.endswith("\\") and _balanced(text):
            yield begun, text
            text = ""
    assert not text, f"line {begun}: a quote that is never closed"


def _statements(block: Sequence[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Logical lines; a loop is one of them, to its end."""
    open_, begun, text = 0, 0, ""
    for number, line in _logical(block):
        begun, text = (begun, f"{text}\n{line}") if text else (number, line)
        open_ += bool(_OPENS.match(line.strip())) - bool(_CLOSES.search(line.strip()))
        if open_ <= 0:
            yield begun, text
            open_, text = 0, ""


def _balanced(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return True


# --- as a shell takes it apart ----------------------------------------------------------------------------------------


def calls(text: str) -> list[list[str]]:
    """The arguments of each `warmerge` that a command line runs, in pipes and substitutions too.

    >>> calls("warmerge rl --warm $(ls -d members/0? | paste -sd,) --seed $((1 + 1)) -o 'a b' > log.txt  # takes hours")
    [['rl', '--warm', '1', '--seed', '1', '-o', 'a b']]
    >>> calls('X=1 torchrun --nproc_per_node 8 -m warmerge train "${more[@]}" ... && warmerge rules 2>&1 | head')
    [['train', '\\x00'], ['rules']]

    Raises:
        ValueError: `warmerge` stands where it is not known to be a command.
    """
    plain, inner = _without_expansions(text)
    found = [arguments for part in inner for arguments in calls(part)]
    reader = shlex.shlex(plain, posix=True, punctuation_chars="();<>|&")
    reader.whitespace_split, reader.commenters = True, ""
    words, redirected = list[str](), False
    for word in [*reader, ";"]:
        if word and not word.strip("();<>|&"):
            redirected = "<" in word or ">" in word
            if not redirected:
                found += _call(words)
                words = []
        elif redirected:
            redirected = False
        elif word != "...":
            words.append(word)
    return found


def _call(words: Sequence[str]) -> list[list[str]]:
    """What the `warmerge` of a simple command is given, if there is one."""
    while words and (words[0] in _KEYWORDS or re.match(r"\w+=", words[0])):
        words = words[1:]
    place = next((i for i, word in enumerate(words) if word == "warmerge" or word.endswith("/bin/warmerge")), None)
    if place is None or words[0] in OTHERS:
        return []
    if place and words[0].rsplit("/", 1)[-1] not in LAUNCHERS:
        raise ValueError(f"{words[0]!r} is not known to run warmerge: see LAUNCHERS and OTHERS")
    return [list(words[place + 1 :])]


def _without_expansions(text: str) -> tuple[str, list[str]]:
    """The text without comments, with `;` for ends of lines and placeholders for expansions; and what `$()` runs."""
    text = re.sub(r"\\\n\s*", " ", text)
    out, inner, quote, i = list[str](), list[str](), "", 0
    while i < len(text):
        c = text[i]
        if c == "\\" and quote != "'":
            out.append(text[i : i + 2])
            i += 2
            continue
        if c in "'\"" and quote in ("", c):
            quote = "" if quote else c
        elif c == "#" and not quote and (i == 0 or text[i - 1].isspace()):
            i = (text + "\n").index("\n", i)
            continue
        elif c in "$<" and quote != "'" and (end := _expansion(text, i)):
            body = text[i:end]
            if body[1] == "(" and not body.startswith("$(("):
                inner.append(body[2:-1])
            out.append(LIST if re.match(r"\$([@*]|\{\w+(\[[@*]\]|:\+))", body) else _VALUE)
            i = end
            continue
        elif not quote and c in "012" and text[i - 1 : i].isspace() and text[i + 1 : i + 2] in ("<", ">"):
            c = ""
        out.append(" ; " if c == "\n" and not quote else c)
        i += 1
    return "".join(out), inner


def _expansion(text: str, start: int) -> int:
    """Where the expansion that begins here ends; 0 where none does."""
    if match := re.compile(r"\$(\w+|[@*#?!$-])").match(text, start):
        return match.end()
    if text[start + 1 : start + 2] not in ("(", "{") or (text[start] == "<" and text[start + 1] != "("):
        return 0
    closing, depth = {"(": ")", "{": "}"}[text[start + 1]], 0
    for i in range(start + 1, len(text)):
        depth += (text[i] == text[start + 1]) - (text[i] == closing)
        if depth == 0:
            return i + 1
    return 0


# --- as warmerge takes it ---------------------------------------------------------------------------------------------


def why_not(arguments: Sequence[str]) -> str | None:
    """Why `warmerge` would not take these arguments, in its own words; None where it would. Nothing is run."""
    lists, arguments = LIST in arguments, [argument for argument in arguments if argument != LIST]
    program: Any = typer.main.get_command(cli.app)
    command = program.commands.get(arguments[0]) if arguments else None
    try:
        if command is None:
            program.make_context("warmerge", list(arguments)).close()
            return None if arguments[0].startswith("-") else f"No such command {arguments[0]!r}."
        with program.make_context("warmerge", [arguments[0], "x"]) as parent:
            command.make_context(arguments[0], list(arguments[1:]), parent=parent).close()
    except (typer.Exit, SystemExit):  # --help and the like
        return None
    except _USAGE_ERROR as error:
        missing = type(error).__name__ == "MissingParameter"  # perhaps in the list
        return None if missing and lists else str(error.format_message()) or "A command is missing."
    return None
