"""Every command that README, docs and examples show is one that warmerge takes and, unless it is marked, that works.

A command with a trailing comment of MARKERS (such as `# needs the network`, `# takes hours`) is only parsed.
All others of a document are run in order, by a real bash, in a copy of the folder of documented_folder.py; `warmerge`
in them is this process's, with what takes long made small by SMALL and MORE. A transcript that shows a refusal must be
refused, for the reasons that it shows. `SHOW_SECONDS=1 pytest -s` prints what each command takes.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import documented_folder
import pytest
import typer
from command_bridge import BASH, Bridge
from documented_commands import (
    MARKERS,
    ROOT,
    Documented,
    calls,
    commands_of,
    documents,
    scripts,
    why_not,
)
from loopback_hub import CLIENT_WARNING, LoopbackHub
from test_cli import Done, environment
from typer.testing import CliRunner

from warmerge import cli
from warmerge.cli import publishing

# Where a command asks for more than this, it gets this.
SMALL = {
    "--runs": 3, "--epochs": 1, "--steps": 4, "--sft-steps": 9, "--sft-batch": 8, "--batch": 8, "--max-length": 32,
    "--points": 3, "--max-new-tokens": 4, "--keep-every": 1, "--sample-every": 2, "--micro-batch": 8, "-n": 4,
    "--resamples": 100,
}  # fmt: skip
# What each command gets if it does not say: small values of what is large when it is not given.
_RESAMPLES, _THREADS = {"--resamples": "100"}, {"--threads": "1"}
MORE = {
    "train": {"--steps": "2", "--batch": "8", **_RESAMPLES, **_THREADS}, "average": _THREADS,
    "eval": {"--max-length": "32", **_RESAMPLES, **_THREADS}, "lmc-curve": {"--points": "3", **_RESAMPLES, **_THREADS},
    "bon": {**_RESAMPLES, **_THREADS}, "winrate": {"--max-new-tokens": "4", **_RESAMPLES},
    "rl": {
        "--steps": "4", "--batch": "8", "--max-new-tokens": "4", "--start-answers": "8", "--keep-every": "1",
        **_THREADS,
    },
    # The card's lines would be run in a process of their own; an empty value is a flag.
    "push": {"--no-run": ""},
}  # fmt: skip
# Begins so: why it is only parsed, although nothing at the command says so.
NOT_RUN = {
    "python3 -m venv": ".ci/run runs README's two installations, and what they install",
    "pip install": ".ci/run installs the package; extras are installed in the environment that runs this",
    "warmerge demo": "takes minutes; it has tests of its own, and what it leaves is in the folder",
}
REFUSED = re.compile(r"warmerge: refused(?:, \d+ findings)?: ?")

pytestmark = [
    pytest.mark.skipif(BASH is None, reason="bash is not installed"),
    pytest.mark.filterwarnings(CLIENT_WARNING),
]


def shown_in(path: Path) -> str:
    return str(path.relative_to(ROOT))


def runnable(path: Path) -> list[Documented]:
    return [c for c in commands_of(path) if c.marker is None and not c.text.startswith(tuple(NOT_RUN))]


# --- every command parses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*documents(), *scripts()], ids=shown_in)
def test_every_command_is_one_that_warmerge_takes(path: Path) -> None:
    wrong = [f"{c.where}: {reason}" for c in commands_of(path) for call in calls(c.text) if (reason := why_not(call))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", [*documents(), *scripts()], ids=shown_in)
def test_markers_are_those_that_are_known(path: Path) -> None:
    unknown = [c.where for c in commands_of(path) if re.match(r"(needs|takes)\b", c.comment) and c.marker is None]
    assert not unknown, f"expected one of {MARKERS}:\n" + "\n".join(unknown)


@pytest.mark.parametrize("path", documents(), ids=shown_in)
def test_every_option_in_the_text_is_one_of_some_command(path: Path) -> None:
    """Options in `code` within sentences; after another program's name they are that program's."""
    commands: Any = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    known = {o for c in commands.values() for p in c.params for o in (*p.opts, *p.secondary_opts)} | {
        "--version", "--help", "-h", "--install-completion", "--show-completion",
    }  # fmt: skip
    text = re.sub(r"(?ms)^```.*?^```", "", path.read_text(encoding="utf-8"))
    wrong = []
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
        words = [*code.split(), ""]
        if words[0] == "warmerge" and re.fullmatch(r"[a-z][a-z-]*", words[1]) and words[1] not in commands:
            wrong.append(f"{code}: no such command")
        if words[0] == "warmerge" or words[0].startswith("-"):
            wrong += [f"{code}: no such option" for o in re.findall(r"(?<!\S)--[a-z][a-z-]*", code) if o not in known]
    assert not wrong, f"{shown_in(path)}: " + "; ".join(wrong)


def test_what_is_wrong_is_seen_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "text\n```console\n$ warmerge average a b \\\n    -o x | tee log\nwarmerge averge\n$ warmerge averge a b\n```\n"
        "```bash\n# a comment\nwarmerge eval a --dta val.jsonl  # takes hours\nfor i in 1 2; do\n"
        '  warmerge score "$i" --data <(zcat x.gz) -o "$(warmerge rl-report --smoth 3 x -o y)"\ndone\n'
        "warmerge train --runs many -o runs  # takes days\n```\n```python\nwarmerge nothing\n```\n"
    )
    monkeypatch.setattr("documented_commands.ROOT", tmp_path)
    found = commands_of(page)
    assert [(c.line, c.marker) for c in found] == [(3, None), (6, None), (10, "takes hours"), (11, None), (14, None)]
    assert found[0].output == ("warmerge averge",)
    assert [call for c in found for call in calls(c.text)][:3] == [
        ["average", "a", "b", "-o", "x"], ["averge", "a", "b"], ["eval", "a", "--dta", "val.jsonl"]
    ]  # fmt: skip
    said = [f"{c.where}: {why}" for c in found for call in calls(c.text) if (why := why_not(call))]
    assert said[0] == "page.md:6: warmerge averge a b: No such command 'averge'."
    assert said[1].startswith("page.md:10: warmerge eval a --dta val.jsonl # takes hours: No such option: --dta")
    assert said[2].startswith("page.md:11: for i in 1 2; do warmerge score")
    assert "No such option: --smoth" in said[2]
    assert said[3].startswith("page.md:14: warmerge train --runs many -o runs # takes days: Invalid value for '--runs'")
    assert found[4].comment == "takes days"
    with pytest.raises(ValueError, match="'nohup' is not known to run warmerge"):
        calls("nohup warmerge rules")


# --- every command works ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, quick_demo: tuple[Path, str]) -> Path:
    """The folder of documented_folder.py, with the project that the demo leaves."""
    root = documented_folder.build(tmp_path_factory.mktemp("documented"))
    shutil.copytree(quick_demo[0], root / "demo")
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, with a Hub on 127.0.0.1 that has its members as me/rm-1 to me/rm-3."""
    pytest.importorskip("trl")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "0"))  # --offline sets it: put back
    with LoopbackHub({}) as hub:
        hub.tokens = {"good"}
        hub.use(monkeypatch, tmp_path / "cache", token="good")
        for i in range(3):
            hub.put(f"me/rm-{i + 1}", made / f"rm-{i}")
        yield Path(shutil.copytree(made, tmp_path / "work"))


def shrunk(arguments: Sequence[str]) -> list[str]:
    """The same command with values of SMALL where its own are larger, and with those of MORE that it does not give."""
    words = list(arguments)
    for i, word in enumerate(words[:-1]):
        if word in SMALL and re.fullmatch(r"[\d.]+", words[i + 1]) and float(words[i + 1]) > SMALL[word]:
            words[i + 1] = str(SMALL[word])
    for option, value in MORE.get((words or [""])[0], {}).items():
        if option not in words and (option, "--epochs" in words) != ("--steps", True):
            words += [option, value] if value else [option]
    return words


def reached(arguments: Sequence[str], place: Path) -> list[str]:
    """The same with `RUN/step-N`, which a shrunk run did not come to, as one of the steps that it came to."""
    names = [re.fullmatch(r"((?:.*=)?)(.*/step-)(\d+)", word) for word in arguments]
    words = list(arguments)
    for run in {match[2] for match in names if match}:
        have = sorted(int(path.name[5:]) for path in place.glob(f"{run}*"))
        asked = [i for i, match in enumerate(names) if match and match[2] == run and int(match[3]) not in have]
        for i, step in zip(asked, have[-len(asked) :] if asked else (), strict=False):
            words[i] = f"{names[i][1]}{run}{step}"  # type: ignore[index]
    return words


class Reader:
    """Someone who types a document's commands one after the other."""

    def __init__(self, folder: Path) -> None:
        self.untouched = {name for name in documented_folder.NAMES if (folder / name).exists()}
        self.root, self.reply, self.settings = folder, "", list[str]()

    def answer(self, arguments: Sequence[str], place: Path) -> Done:
        """`warmerge` in this process. What the fixture made makes room for what a command writes under its name."""
        words = reached(shrunk(arguments), place)
        for option, value in pairwise(words):
            name = os.path.relpath(place / value, self.root)
            inner = [known for known in self.untouched if known == name or known.startswith(f"{name}/")]
            if option in ("-o", "--out") and inner and "--dry-run" not in words:
                shutil.rmtree(place / value) if (place / value).is_dir() else (place / value).unlink()
                self.untouched -= set(inner)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            if self.reply:  # a terminal, as far as `push` can see
                patch.setattr(publishing, "refuse_unasked", lambda yes: None)
            done = CliRunner().invoke(cli.app, words, env=environment(), input=self.reply, prog_name="warmerge")
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            return Done(99, done.stdout, f"{done.stderr}\n{type(done.exception).__name__}: {done.exception}")
        return Done(done.exit_code, done.stdout, done.stderr)

    def type(self, bridge: Bridge, command: Documented, before: int) -> tuple[int, str | None]:
        """Its exit code, and what is wrong with it."""
        self.reply = "y\n" if any("[y/N]: y" in line for line in command.output) else ""
        script = re.sub(r" \.\.\.(?= |$)", "", command.text)
        if re.fullmatch(r"""(export )?\w+=('[^']*'|"[^"]*"|\S*)""", script):
            self.settings.append(script)
        state = "\n".join(self.settings)
        done = bridge.run(f"{state}\n(exit {before})\n{script}")
        refused = bool(command.output) and REFUSED.match(command.output[0]) is not None
        if done.code != (3 if refused else 0):
            return done.code, f"exit {done.code}, expected {3 if refused else 0}: {done.err.strip()[-1500:]}"
        shown, said = reasons(command.output), reasons(done.err.splitlines())
        if refused and (shown - said or (said - shown and "..." not in command.output)):
            return done.code, f"refused for {sorted(said)}; shown is {sorted(shown)}"
        if script.startswith("echo") and done.out.split() != " ".join(command.output).split():
            return done.code, f"printed {done.out!r}, shown is {command.output}"
        return done.code, None


def reasons(lines: Sequence[str]) -> set[str]:
    """Findings of a refusal, without their numbers: sizes are those of tiny models."""
    found = {REFUSED.sub("", line) for line in lines if REFUSED.match(line)}
    found |= {line.removeprefix("  - ") for line in lines if line.startswith("  - ")}
    return {re.sub(r"\d+", "N", line) for line in found if line}


@pytest.mark.parametrize("path", [p for p in documents() if runnable(p)], ids=shown_in)
@pytest.mark.timeout(300)
def test_every_command_works(path: Path, folder: Path) -> None:
    reader, wrong, code = Reader(folder), list[str](), 0
    with Bridge(folder, reader.answer) as bridge:
        for command in runnable(path):
            begun = time.perf_counter()
            code, problem = reader.type(bridge, command, code)
            if os.environ.get("SHOW_SECONDS"):
                print(f"{time.perf_counter() - begun:6.1f} s  {command.where[:100]}")
            if problem:
                wrong.append(f"{command.where}\n    {problem}")
    assert not wrong, "\n".join(wrong)


def test_a_command_that_fails_or_says_something_else_is_told(tmp_path: Path) -> None:
    class Told(Reader):
        def answer(self, arguments: Sequence[str], place: Path) -> Done:
            seen.append([place.name, *arguments])
            if "bad" in arguments:
                return Done(3, "", "warmerge: refused: b: tensor 'x' holds nan at element 7; repair it\n")
            return Done(0, "fine\nand more\n", "")

    seen = list[list[str]]()
    (tmp_path / "a").mkdir()
    refused = "warmerge: refused: b: tensor 'x' holds {} at element 123; repair it"
    with Bridge(tmp_path, (reader := Told(tmp_path)).answer) as bridge:

        def typed(text: str, *output: str, before: int = 0) -> tuple[int, str | None]:
            return reader.type(bridge, Documented("page.md", 1, text, output), before)

        assert typed("cd a && warmerge rules | head -n 1 > out.txt") == (0, None)
        assert (tmp_path / "a" / "out.txt").read_text() == "fine\n"
        assert typed("X='b c'") == (0, None)
        assert typed('warmerge good "$X" *.txt ... $(warmerge inner)') == (0, None)
        assert seen == [["a", "rules"], ["a", "inner"], ["a", "good", "b c", "out.txt", "fine", "and", "more"]]
        assert typed("warmerge bad", refused.format("nan")) == (3, None)
        assert typed("echo $?", "3", before=3) == (0, None)
        assert "shown is (" in str(typed("echo $?", "2", before=3)[1])
        assert "shown is [\"b: tensor 'x' holds inf" in str(typed("warmerge bad", refused.format("inf"))[1])
        assert typed("warmerge bad")[1] == f"exit 3, expected 0: {refused.format('nan').replace('123', '7')}"
        assert str(typed("warmerge rules", refused.format("nan"))[1]).startswith("exit 0, expected 3")
        assert str(typed("ls nowhere")[1]).startswith("exit 2, expected 0: ls:")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_papers_protocol_is_a_chain_that_holds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """examples/tldr.md, marked commands and all, with tiny models in place of its own."""
    monkeypatch.setitem(SMALL, "--runs", 6)
    for i, name in enumerate(("train", "val", "select", "ood", "control")):
        documented_folder.rows(documented_folder.pairs(24, seed=50 + i))(folder / f"{name}.jsonl")
    (folder / "tldr").mkdir()
    for name in ("train", "val", "select", "ood", "control", "prompts", "test"):
        shutil.copy(folder / f"{name}.jsonl", folder / "tldr")
    replaced = {
        "Qwen/Qwen2.5-1.5B": "my-sft", "Qwen/Qwen2.5-3B": "world/base", "HuggingFaceTB/SmolLM2-135M": "my-sft",
        " --precision bfloat16": "",  # accelerate takes one precision for each process
    }  # fmt: skip
    reader, wrong = Reader(folder), list[str]()
    with Bridge(folder, reader.answer) as bridge:
        for command in commands_of(ROOT / "examples" / "tldr.md"):
            if command.marker is not None:
                text = command.text
                for theirs, tiny in replaced.items():
                    text = text.replace(theirs, tiny)
                _, problem = reader.type(bridge, Documented(command.document, command.line, text), 0)
                wrong += [f"{command.where}\n    {problem}"] if problem else []
    assert not wrong, "\n".join(wrong)
