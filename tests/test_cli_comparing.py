"""winrate as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback_llm import Llm, by, failure, serve, slowly
from test_cli import cells, environment, here, run

from warmerge.pipeline.judging import llm as client
from warmerge.pipeline.judging.template import TEMPLATE
from warmerge.report import results

QUICK = ("--resamples", "100")
BOTH = ("--policy", "a.jsonl", "--policy", "b.jsonl", "--prompts", "prompts.jsonl")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files of answers, of which b's are longer 7 times and the same once, and a judge who counts characters."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(client.KEY_VARIABLE, raising=False)
    monkeypatch.setattr(client, "_FIRST_WAIT", 0.001)
    prompts = [f"Why {i}?" for i in range(12)]
    for name, texts in (("a", ["same"] + ["four"] * 11), ("b", ["same"] + ["sixsix"] * 7 + ["two"] * 4)):
        rows = [
            {"prompt": p, "candidates": [text], "tokens": [len(text)]} for p, text in zip(prompts, texts, strict=True)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    (tmp_path / "gold.py").write_text("def gold(prompts, completions):\n    return [len(c) for c in completions]\n")
    return tmp_path


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(results._FIGURES, results.WINRATE, (lambda *_: [], ("rows",)))


@pytest.fixture
def model() -> Iterator[Llm]:
    with serve(by(len)) as running:
        yield running


def test_a_function_in_a_process_of_its_own(place: Path) -> None:
    arguments = ("winrate", *BOTH, "--judge", "gold.py:gold", "-o", "out", *QUICK)
    done = run(*arguments, cwd=place)
    assert (done.code, done.err) == (
        0, "reading the first candidates of a (a.jsonl)\nreading the first candidates of b (b.jsonl)\n"
        "23 rewards of gold.py:gold\n",
    )  # fmt: skip
    content = json.loads((place / "out" / "winrate.json").read_text(), parse_constant=pytest.fail)
    assert content["command"] == ["warmerge", *arguments]
    (row,) = content["rows"]
    shown = done.out.splitlines()
    assert shown[1] == "judged by gold.py:gold; a tie counts as half a win"
    columns, values = (cells(shown[i]) for i in (3, 5))
    assert dict(zip(columns, values, strict=True)) == {
        "policy": "a", "against": "b", "win rate [95 %]": f"0.375 [{row['low']:.3f}, {row['high']:.3f}]", "n": "12",
        "wins": "4", "ties": "1", "losses": "7", "if longer won": "0.375", "tokens, policy / against": "4 / 5",
    }  # fmt: skip
    assert shown[-2:] == ["intervals: percentile bootstrap over prompts, 100 resamples, seed 0", "out"]
    drawn = ["winrate.png", "winrate.svg"]
    before = {name: (place / "out" / name).read_bytes() for name in drawn}
    for name in drawn:
        (place / "out" / name).unlink()
    assert here("plot", "out").out.split() == [f"out/{name}" for name in drawn]
    assert {name: (place / "out" / name).read_bytes() for name in drawn} == before


def test_a_language_model(model: Llm, no_figures: None) -> None:
    arguments = ("winrate", *BOTH, "--judge", model.url, "--judge-model", "j", "-o", "out", *QUICK)
    done = here(*arguments, "--against", "a")
    assert done.code == 0, done.err
    assert "22 verdicts of j, less those that are kept\n" in done.err
    shown = done.out.splitlines()
    assert cells(shown[5])[:3][:2] == ["b", "a"]
    assert cells(shown[5])[2].startswith("0.625 [")
    assert "note: the judge's verdicts on the two orders differ for 0 of 11 pairs of answers (0.0%): ties" in shown
    assert "note: for 1 of 12 pairs of answers both are the same text: ties, without asking" in shown
    assert {request.body["seed"] for request in model.requests} == {0}
    # As JSON, from what is kept.
    again = here(*arguments, "--against", "a", "--overwrite", "--json", "--seed", "0")
    assert json.loads(again.out)["rows"] == json.loads(Path("out/winrate.json").read_text())["rows"]
    assert len(model.requests) == 22


def test_options_of_a_language_model(model: Llm, no_figures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.txt").write_text("{prompt}: <answer_A>\n{first}\n</answer_A> <answer_B>\n{second}\n</answer_B>")
    monkeypatch.setenv("MINE", "sk-mine")
    done = here(
        "winrate", *BOTH, "--judge", model.url, "--judge-model", "j", "-o", "out", *QUICK, "--judge-template",
        "mine.txt", "--judge-key-env", "MINE", "--judge-tokens", "9", "--parallel", "1", "--seed", "4",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert model.most == 1
    first = model.requests[0]
    assert (first.body["max_tokens"], first.body["seed"], first.headers["Authorization"]) == (9, 4, "Bearer sk-mine")
    assert first.content == "Why 1?: <answer_A>\nfour\n</answer_A> <answer_B>\nsixsix\n</answer_B>"
    assert "sk-mine" not in done.out + done.err


def test_failures_of_a_language_model(model: Llm) -> None:
    arguments = ("winrate", *BOTH, "--judge", model.url, "--judge-model", "j", "-o", "out", *QUICK)
    model.reply = lambda request: failure(401, "who are you")
    done = here(*arguments)
    kept = "0 of 22 verdicts are kept in out/verdicts.jsonl; the same command goes on"
    key = "wants a key (who are you): put it into WARMERGE_JUDGE_KEY, or name its variable with --judge-key-env"
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines()[-1] == f"warmerge: {model.url} {key}; {kept}"


def test_a_killed_process_goes_on(model: Llm, place: Path) -> None:
    """What was on the disk when it was killed is not asked again."""
    arguments = ("winrate", *BOTH, "--judge", model.url, "--judge-model", "j", "-o", "out", "--parallel", "2", *QUICK)
    model.reply = slowly(by(len), 0.05)
    process = subprocess.Popen(
        [sys.executable, "-m", "warmerge", *arguments], cwd=place, env=environment(), stderr=subprocess.DEVNULL
    )
    verdicts, end = place / "out" / "verdicts.jsonl", time.monotonic() + 60
    while not (verdicts.exists() and verdicts.read_bytes().count(b"\n") >= 6):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = verdicts.read_bytes().count(b"\n")
    assert 6 <= kept < 22
    model.reply = by(len)
    model.requests.clear()
    done = here(*arguments)
    assert done.code == 0, done.err
    assert len(model.requests) == 22 - kept
    assert json.loads((place / "out" / "winrate.json").read_text())["rows"][0]["win"] == 0.375


def test_the_template_is_shown() -> None:
    done = here("winrate", "--show-template")
    assert (done.code, done.out, done.err) == (0, TEMPLATE, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--judge", "gold.py:gold", "--judge-model", "j", "--parallel", "2"],
         "--judge-model, --parallel: only for a language model, whose --judge is an address (http://...)"),
        (["--judge", "http://localhost:8000/v1"],
         "--judge-model is missing: the name of the model at the address of --judge"),
        (["--judge", "http://localhost:8000/v1", "--judge-model", "j", "--judge-tokens", "0"],
         "--judge-tokens: expected 1 or more, found 0"),
        (["--judge", "http://localhost:8000/v1", "--judge-model", "j", "--judge-template", "prompts.jsonl"],
         "--judge-template: prompts.jsonl has no {prompt} and no {first} and no {second}; it must hold {prompt}, "
         "{first}, {second}"),
        (["--judge", "http://localhost:8000/v1", "--judge-model", "j", "--judge-key-env", "NO_SUCH"],
         "--judge-key-env: the environment has no NO_SUCH, or it is empty"),
        (["--judge", "none.py:gold"], "none.py:gold: there is no file none.py"),
        (["--judge", "gold.py:gold", "--temperature", "-1"], "--temperature: expected 0 or more, found -1.0"),
        (["--judge", "gold.py:gold", "--resamples", "5"], "--resamples: expected 100 or more, found 5"),
        (["--judge", "gold.py:gold", "--policy", "x=a.jsonl", "--policy", "x=b.jsonl"],
         "--policy: a.jsonl and b.jsonl are both named 'x'; name one of them, as in other=b.jsonl"),
    ],
)  # fmt: skip
def test_misuse_exits_2(arguments: list[str], message: str) -> None:
    done = here("winrate", *BOTH, "-o", "out", *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err == f"warmerge: {message}\n"
    assert not Path("out").exists()


def test_warnings_and_names_go_to_the_terminal_as_they_can(no_figures: None, place: Path) -> None:
    (place / "prompts.jsonl").write_text('{"prompt": "Why 1?"}\n')
    arguments = ("winrate", "--policy", "a\x1b[0m=a.jsonl", "--policy", ":fire:=b.jsonl", "--prompts", "prompts.jsonl")
    done = here(*arguments, "--judge", "gold.py:gold", "-o", "out", *QUICK)
    assert done.code == 0
    assert "warning: --prompts: one prompt: its win rate says nothing about others\n" in done.err
    assert "\x1b" not in done.out + done.err
    assert cells(done.out.splitlines()[5])[:3] == ["'a\\x1b[0m'", ":fire:", "0.000 [0.000, 1.000]"]


def test_help_says_what_it_is_for() -> None:
    done = here("winrate", "--help")
    assert done.code == 0
    for words in ("Win rates with 95 % intervals", "--against", "WARMERGE_JUDGE_KEY", "[default: 0.9]"):
        assert words in done.out


def test_results_are_not_replaced(no_figures: None) -> None:
    arguments: tuple[Any, ...] = ("winrate", *BOTH, "--judge", "gold.py:gold", "-o", "out", *QUICK)
    assert here(*arguments).code == 0
    done = here(*arguments)
    assert (done.code, done.err) == (
        2, "warmerge: out holds winrate.json already; choose another -o, or add --overwrite\n"
    )  # fmt: skip
    assert here(*arguments, "--overwrite").code == 0
