"""winrate: who wins by rewards and by a language model, what is asked and kept, whom it takes, and what it says."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import causal_models
import numpy
import pytest
from conftest import bot, user
from loopback_llm import Llm, Request, answers_in, by, completion, failure, serve
from reward_world import BAD, GOOD, NEUTRAL, World

import warmerge
from warmerge import LlmJudge, Measuring, WinRates, win_rate
from warmerge.errors import Finding, Interrupted, RefusedError, RemoteError, UsageError, WarmergeError
from warmerge.pipeline.judging import llm as client
from warmerge.pipeline.judging.contenders import Contender, parse_contenders
from warmerge.pipeline.judging.doubts import judge_doubts, prompt_doubts
from warmerge.pipeline.judging.template import TEMPLATE
from warmerge.pipeline.sampling import Sampling, sample_pool
from warmerge.pipeline.scoring.rewarders import open_rewarder
from warmerge.report import results
from warmerge.rewards.metrics import FEW

FAST = Measuring(resamples=100)
PROMPTS = [f"What is number {i}?" for i in range(12)]
LENGTH = "def gold(prompts, completions):\n    return [len(c) for c in completions]\n"
SHORT = Sampling(n=1, temperature=0.9, max_new_tokens=5)


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of one's own with a judge in it; nothing is drawn, nobody waits, and nobody has a key."""
    monkeypatch.setitem(results._FIGURES, results.WINRATE, (lambda *_: [], ("rows",)))
    monkeypatch.setattr(client, "_FIRST_WAIT", 0.001)
    monkeypatch.delenv(client.KEY_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gold.py").write_text(LENGTH)
    prompts("prompts.jsonl")
    return tmp_path


@pytest.fixture
def model() -> Iterator[Llm]:
    with serve(by(len)) as running:
        yield running


def prompts(path: str, asked: Sequence[Any] = PROMPTS) -> str:
    return write(path, [{"prompt": prompt} for prompt in asked])


def write(path: str, rows: Sequence[dict[str, Any]]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(path: str, texts: Sequence[Any], asked: Sequence[Any] = PROMPTS, **columns: Sequence[Any]) -> str:
    """A file of answers; `columns` have one value for each."""
    rows = [{"prompt": prompt, "candidates": [text, "not this one"]} for prompt, text in zip(asked, texts, strict=True)]
    for name, values in columns.items():
        rows = [row | {name: [value, value]} for row, value in zip(rows, values, strict=True)]
    return write(path, rows)


def three() -> list[str]:
    """Answers of lengths that are known: b beats a 8 times, ties 2 times, loses 2 times; c is the longest always."""
    length = {"a": [5] * 12, "b": [6] * 8 + [5] * 2 + [4] * 2, "c": [9] * 12}
    return [
        answers(f"{name}.jsonl", [name * n for n in lengths], tokens=lengths, finished=[True] * 12)
        for name, lengths in length.items()
    ]


def judge(model: Llm, **changes: Any) -> LlmJudge:
    return LlmJudge(model.url, "judge-1", **{"parallel": 2, **changes})


def rates(found: WinRates) -> dict[tuple[str, str], tuple[Any, ...]]:
    return {(r["policy"], r["against"]): (r["win"], r["wins"], r["ties"], r["losses"], r["n"]) for r in found.rows}


def compare(policies: Sequence[str], judged: Any = "gold.py:gold", **options: Any) -> WinRates:
    return win_rate(policies, "prompts.jsonl", judged, options.pop("out", "out"), measuring=FAST, **options)


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# --- rewards ----------------------------------------------------------------------------------------------------------


def test_the_larger_reward_wins() -> None:
    found = compare(three(), command=["warmerge", "winrate"])
    assert rates(found) == {
        ("a", "b"): (pytest.approx(3 / 12), 2, 2, 8, 12), ("a", "c"): (0.0, 0, 0, 12, 12),
        ("b", "c"): (0.0, 0, 0, 12, 12),
    }  # fmt: skip
    first = found.rows[0]
    assert list(first) == [
        "policy", "against", "judge", "n", "win", "low", "high", "wins", "ties", "losses", "length_win", "tokens",
        "tokens_against", "step", "proxy",
    ]  # fmt: skip
    # The judge is one that counts characters: the baseline says the same.
    assert first["length_win"] == first["win"]
    assert (first["tokens"], first["tokens_against"]) == (5.0, pytest.approx(66 / 12))
    assert (first["judge"], first["step"], first["proxy"]) == ("gold.py:gold", None, None)
    assert 0 < first["low"] < first["win"] < first["high"] < 1
    assert found.rows[1]["high"] == pytest.approx(1 - 0.025 ** (1 / 12))
    assert lines("out/rewards.jsonl")[11] == {"prompt": PROMPTS[11], "rewards": {"a": 5.0, "b": 4.0, "c": 9.0}}
    content = json.loads(Path("out/winrate.json").read_text(), parse_constant=pytest.fail)
    assert content["rows"] == list(found.rows)
    assert content["pairs"][0] == {"policy": "a", "against": "b", "prompts": 12, "different": 12}
    assert content["policies"][1] | {"tokens": None} == {
        "policy": "b", "source": "b.jsonl", "answers": "b.jsonl", "seed": None, "step": None, "proxy": None,
        "tokens": None, "characters": 66 / 12,
    }  # fmt: skip
    assert (content["command"], content["format"]) == (["warmerge", "winrate"], "warmerge winrate 1")
    assert (content["prompts"]["asked"], content["prompts"]["compared"]) == (12, 12)
    with open("out/winrate.csv", newline="") as file:
        assert [row["win"] for row in csv.DictReader(file)] == [repr(row["win"]) for row in found.rows]
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "rewards.jsonl", "winrate-pairs.csv", "winrate-policies.csv", "winrate.csv", "winrate.json"
    ]  # fmt: skip


def test_a_reward_model_as_judge(world: World) -> None:
    random = numpy.random.default_rng(0)
    good, bad = (
        [" ".join(random.choice([*words, *NEUTRAL], 6)) for _ in PROMPTS] for words in ([*GOOD] * 2, [*BAD] * 2)
    )
    both = [answers("good.jsonl", good), answers("bad.jsonl", bad)]
    found = compare(both, world.a)
    want = []
    for path in both:
        warmerge.score_file(world.a, path, f"scored-{path}")
        want.append([row["reward"][0] for row in lines(f"scored-{path}")])
    assert [list(row["rewards"].values()) for row in lines("out/rewards.jsonl")] == [
        pytest.approx(list(pair), abs=1e-5) for pair in zip(*want, strict=True)
    ]
    (row,) = found.rows
    assert row["win"] == sum(a > b for a, b in zip(*want, strict=True)) / 12 > 0.6
    assert (row["judge"], row["tokens"]) == (str(world.a), None)
    assert found.record["judge"]["fingerprints"]


def test_one_policy_against_all_others() -> None:
    a, b, c = three()
    by_name = compare([a, b, c], against="c")
    assert rates(by_name) == {("a", "c"): (0.0, 0, 0, 12, 12), ("b", "c"): (0.0, 0, 0, 12, 12)}
    by_path = compare([a, b, c], against="c.jsonl", out="path")
    added = compare([a, b], against="c.jsonl", out="added")
    named = compare([a, b], against="start=c.jsonl", out="named")
    assert by_path.rows == added.rows == by_name.rows
    assert [row["against"] for row in named.rows] == ["start", "start"]
    assert [row["win"] for row in named.rows] == [0.0, 0.0]
    alone = compare([b], against="a.jsonl", out="alone")
    assert rates(alone) == {("b", "a"): (pytest.approx(9 / 12), 8, 2, 2, 12)}


# --- a language model -------------------------------------------------------------------------------------------------


def test_a_fair_judge_says_what_rewards_say(model: Llm) -> None:
    policies = three()
    by_rewards = compare(policies, out="rewards")
    found = compare(policies, judge(model))
    assert rates(found) == rates(by_rewards)
    assert {row["judge"] for row in found.rows} == {"judge-1"}
    assert [(row["low"], row["high"]) for row in found.rows] == [(row["low"], row["high"]) for row in by_rewards.rows]
    assert len(model.requests) == 2 * 3 * 12
    assert found.pairs[0] == {
        "policy": "a", "against": "b", "prompts": 12, "different": 12, "asked": 12, "both_orders": 12, "disagreed": 0,
        "disagreement": 0.0, "first_place": 10 / 24, "unreadable": 0,
    }  # fmt: skip
    assert "differ for 0 of 36 pairs of answers (0.0%): ties" in found.record["notes"][0]
    about = json.loads(Path("out/winrate.json").read_text())["judge"]
    assert (about["template"], about["model"], about["url"]) == (TEMPLATE, "judge-1", model.url)


def test_a_judge_of_the_first_place_alone(model: Llm) -> None:
    model.reply = lambda request: "The first one.\nA"
    (row,) = (found := compare(three()[:2], judge(model))).rows
    assert (row["win"], row["wins"], row["ties"], row["losses"]) == (0.5, 0, 12, 0)
    (pair,) = found.pairs
    assert (pair["disagreed"], pair["disagreement"], pair["first_place"]) == (12, 1.0, 1.0)
    assert found.record["notes"] == [
        "the judge's verdicts on the two orders differ for 12 of 12 pairs of answers (100.0%): ties"
    ]


def test_half_a_preference_is_a_tie(model: Llm) -> None:
    """A in one order and a tie in the other: the verdicts differ."""
    model.reply = lambda request: "A" if answers_in(request.content)[0].startswith("b") else "tie"
    (row,) = (found := compare(three()[:2], judge(model))).rows
    assert (row["ties"], found.pairs[0]["disagreed"], found.pairs[0]["first_place"]) == (12, 12, 0.5)


def test_a_verdict_that_cannot_be_read_is_no_verdict(model: Llm) -> None:
    fair = by(len)

    def reply(request: Request) -> Any:
        number = next(i for i in reversed(range(12)) if f"number {i}?" in request.content)
        first, _ = answers_in(request.content)
        if number == 0 and first.startswith("a"):
            return "I cannot say."
        if number == 11:
            return completion("A is", "length") if first.startswith("a") else failure(400, "too long")
        return fair(request)

    model.reply = reply
    found = compare(three()[:2], judge(model))
    (row,) = found.rows
    # Without the first prompt, which a loses, and the last one, which it wins.
    assert (row["n"], row["wins"], row["ties"], row["losses"], row["win"]) == (10, 1, 2, 7, pytest.approx(0.2))
    assert row["length_win"] == pytest.approx(0.2)
    assert (row["tokens"], row["tokens_against"]) == (5.0, pytest.approx((66 - 6 - 4) / 10))
    assert (found.pairs[0]["unreadable"], found.pairs[0]["both_orders"]) == (3, 10)
    what = "3 of 24 replies do not end with A, B or tie (cut off by --judge-tokens: 1, refused: 1): their prompts are "
    assert Finding("judge-1", f"{what}left out of the pair, and its n is smaller") in found.warnings
    assert len(lines("out/verdicts.jsonl")) == 24


def test_a_pair_without_any_verdict_has_no_win_rate(model: Llm) -> None:
    fair = by(len)
    model.reply = lambda request: "?" if "aaaaa" in request.content and "ccccc" in request.content else fair(request)
    found = compare(three(), judge(model))
    nothing = found.rows[1]
    assert (nothing["policy"], nothing["against"], nothing["n"]) == ("a", "c", 0)
    assert all(math.isnan(nothing[name]) for name in ("win", "low", "high", "length_win"))
    saved = json.loads(Path("out/winrate.json").read_text(), parse_constant=pytest.fail)["rows"][1]
    assert (saved["win"], saved["low"], saved["tokens"], saved["n"]) == (None, None, None, 0)
    assert found.rows[0]["n"] == found.rows[2]["n"] == 12


def test_no_verdict_at_all(model: Llm) -> None:
    prompts("prompts.jsonl", PROMPTS[:2])
    model.reply = lambda request: "?"
    with pytest.raises(WarmergeError) as raised:
        compare(three()[:2], judge(model))
    assert str(raised.value) == (
        "of 4 replies none ends with A, B or tie; the last one: '?'. They are in out/verdicts.jsonl; "
        "look at the template, the model and --judge-tokens"
    )
    assert not Path("out/winrate.json").exists()


def test_the_same_answer_ties_without_a_question(model: Llm) -> None:
    same = ["the same"] * 5 + [""]
    policies = [
        answers("a.jsonl", [*same, *("a" * n for n in range(2, 8))]),
        answers("b.jsonl", [*same, *("bbb" for _ in range(6))]),
    ]
    found = compare(policies, judge(model))
    assert len(model.requests) == 12
    (row,) = found.rows
    assert (row["n"], row["wins"], row["ties"], row["losses"]) == (12, 4, 7, 1)
    assert (found.pairs[0]["different"], found.pairs[0]["asked"]) == (6, 6)
    assert found.record["notes"][1] == "for 6 of 12 pairs of answers both are the same text: ties, without asking"
    twins = compare([policies[0], answers("twin.jsonl", [row["candidates"][0] for row in lines("a.jsonl")])],
                    judge(model), out="twins")  # fmt: skip
    assert (twins.rows[0]["ties"], len(model.requests)) == (12, 12)
    assert twins.pairs[0]["disagreement"] != twins.pairs[0]["disagreement"]  # NaN: nothing was asked


def test_conversations_are_judged_as_they_read(model: Llm) -> None:
    asked: list[Any] = [[user("Hi"), bot("Hey"), user(f"And {i}?")] for i in range(2)] + [[user("Alone")], "Text"]
    prompts("prompts.jsonl", asked)
    # One message of a user is the same prompt as its words.
    texts = answers("text.jsonl", ["a", "b", "c", "dddddd"], [*asked[:2], "Alone", [user("Text")]])
    messages = answers("messages.jsonl", [[bot(text)] for text in ("aa", "bb", "cc", "dd")], asked)
    (row,) = compare([texts, messages], judge(model)).rows
    assert (row["n"], row["wins"], row["losses"]) == (4, 1, 3)
    shown = [request.content for request in model.requests]
    assert any("<request>\nuser: Hi\n\nassistant: Hey\n\nuser: And 1?\n</request>" in content for content in shown)
    assert any("<request>\nAlone\n</request>" in content for content in shown)


def test_what_is_missing_is_asked_and_nothing_else(model: Llm) -> None:
    policies, one = three(), judge(model, parallel=1)
    left = [40]
    fair = by(len)

    def reply(request: Request) -> Any:
        left[0] -= 1
        return failure(503, "gone") if left[0] < 0 else fair(request)

    model.reply = reply
    with pytest.raises(
        RemoteError, match=r"gone\); 40 of 72 verdicts are kept in out/verdicts\.jsonl; the same command"
    ):
        compare(policies, one)
    assert not Path("out/winrate.json").exists()
    model.reply = fair
    model.requests.clear()
    found = compare(policies, one)
    assert len(model.requests) == 32
    with pytest.raises(UsageError, match=r"out holds winrate\.json already"):
        compare(policies, one)
    again = compare(policies, one, overwrite=True)
    assert (again.rows, len(model.requests)) == (found.rows, 32)
    # A changed answer, and one more policy: what is new alone.
    answers("a.jsonl", ["x"] + ["aaaaa"] * 11)
    more = compare([*policies, answers("d.jsonl", ["dd"] * 12)], one, against="d", overwrite=True)
    assert len(model.requests) == 32 + 3 * 24
    assert [row["win"] for row in more.rows] == [pytest.approx(11 / 12), 1.0, 1.0]


def test_the_key_is_in_no_file(model: Llm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "sk-secret-77")
    found = compare(three(), judge(model, key_variable="MINE"))
    assert model.requests[0].headers["Authorization"] == "Bearer sk-secret-77"
    assert found.record["judge"]["key_variable"] == "MINE"
    assert not [path for path in Path("out").rglob("*") if path.is_file() and b"sk-secret" in path.read_bytes()]
    monkeypatch.delenv("MINE")
    with pytest.raises(UsageError, match="the environment has no MINE"):
        compare(three(), judge(model, key_variable="MINE"), out="second")
    assert not Path("second").exists()


def test_what_the_server_did_not_take_is_said(model: Llm) -> None:
    model.reply = lambda request: failure(400, "no 'temperature'") if "temperature" in request.body else "tie"
    found = compare(three()[:2], judge(model))
    what = "its server does not take 'temperature': verdicts may differ when asked again"
    assert Finding("judge-1", what) in found.warnings


# --- policies ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def policies(place: Path) -> list[str]:
    """Two tiny language models that differ."""
    shutil.copytree(causal_models.folder(), "one")
    causal_models.write(place / "two", spread=0.2)
    return ["one", "two"]


def test_policies_answer_once(policies: list[str]) -> None:
    heard: list[str] = []
    found = compare(policies, sampling=SHORT, say=heard.append)
    assert heard == ["12 answers of one", "12 answers of two", "24 rewards of gold.py:gold"]
    seeds = {row["policy"]: row["seed"] for row in found.policies}
    assert len({0, *seeds.values()}) == 3
    for name in policies:
        rows = lines(f"out/answers/{name}.jsonl")
        assert [row["prompt"] for row in rows] == PROMPTS
        assert {len(row["candidates"]) for row in rows} == {1}
        sample_pool(name, "prompts.jsonl", "again.jsonl", Sampling(n=1, temperature=0.9, max_new_tokens=5,
                    seed=seeds[name]), overwrite=True)  # fmt: skip
        assert lines("again.jsonl") == rows
    (row,) = found.rows
    texts = [[row["candidates"][0] for row in lines(f"out/answers/{name}.jsonl")] for name in policies]
    assert row["wins"] == sum(len(a) > len(b) for a, b in zip(*texts, strict=True))
    assert row["tokens"] == sum(row["tokens"][0] for row in lines("out/answers/one.jsonl")) / 12
    # Answers that were cut are said.
    assert [w for w in found.warnings if "answers were cut at 5 tokens" in w.what]
    # The files that were sampled can be judged again, under other names.
    again = compare(["a=out/answers/one.jsonl", "b=out/answers/two.jsonl"], out="again")
    assert again.rows == (row | {"policy": "a", "against": "b"},)
    assert [w.what for w in again.warnings if "cut where they were sampled" in w.what]


def test_answers_are_not_sampled_again(policies: list[str]) -> None:
    found = compare(policies, sampling=SHORT)
    before = {path: path.read_bytes() for path in Path("out/answers").glob("*.jsonl")}
    shutil.rmtree("two")
    causal_models.write(Path("two"), spread=0.25)
    Path("out/winrate.json").unlink()
    with pytest.raises(UsageError, match=r"out/answers/two\.jsonl holds another pool"):
        compare(policies, sampling=SHORT)
    assert {path: path.read_bytes() for path in before} == before
    again = compare(policies, sampling=SHORT, overwrite=True)
    assert Path("out/answers/one.jsonl").read_bytes() == before[Path("out/answers/one.jsonl")]
    assert Path("out/answers/two.jsonl").read_bytes() != before[Path("out/answers/two.jsonl")]
    assert again.policies[0] == found.policies[0]


def test_the_sample_of_prompts_is_the_same_for_all(policies: list[str]) -> None:
    measuring = Measuring(resamples=100, limit=4, seed=3)
    found = win_rate(policies, "prompts.jsonl", "gold.py:gold", "out", sampling=SHORT, measuring=measuring)
    asked = [[row["prompt"] for row in lines(f"out/answers/{name}.jsonl")] for name in policies]
    assert asked[0] == asked[1] == [row["prompt"] for row in lines("out/prompts.jsonl")]
    assert len(asked[0]) == found.rows[0]["n"] == 4
    assert [w for w in found.warnings if w.where == "--prompts"] == [
        Finding("--prompts", "4 prompts: intervals over so few are too narrow to be trusted")
    ]


def test_ctrl_c_while_policies_answer(policies: list[str]) -> None:
    done: list[int] = []

    def stop(count: int) -> None:
        done.append(count)
        if len(done) == 15:
            raise KeyboardInterrupt

    measuring = Measuring(resamples=100, progress=stop)
    with pytest.raises(Interrupted, match=r"3 of 12 prompts are sampled and kept in out/answers/two\.jsonl; the same"):
        win_rate(policies, "prompts.jsonl", "gold.py:gold", "out", sampling=SHORT, measuring=measuring)
    done.clear()
    found = win_rate(policies, "prompts.jsonl", "gold.py:gold", "out", sampling=SHORT,
                     measuring=Measuring(resamples=100, progress=done.append))  # fmt: skip
    assert len(done) == 9
    assert found.rows == compare(policies, sampling=SHORT, out="whole").rows


def test_what_cannot_be_sampled_is_noticed_before_anything_is(policies: list[str], world: World) -> None:
    both = [f"x={world.a}", f"y={world.b}"]
    with pytest.raises(RefusedError) as raised:
        compare([policies[0], *both], sampling=SHORT)
    assert [finding.where for finding in raised.value.findings] == [f"--policy {world.a}", f"--policy {world.b}"]
    Path("gold.py").write_text("def other(): pass\n")
    with pytest.raises(UsageError, match="the file has no function of this name; it has 'other'"):
        compare(policies, sampling=SHORT)
    with pytest.raises(UsageError, match="--judge-model is missing"):
        compare(policies, "http://localhost:1/v1", sampling=SHORT)
    assert not Path("out").exists()


def test_names(place: Path) -> None:
    assert [one.name for one in parse_contenders(["runs/sft", "b=runs/lr=1/x", "org/name@v2"], None)[0]] == [
        "sft", "b", "name@v2"
    ]  # fmt: skip
    (place / "same").mkdir()
    cases: list[tuple[list[str], str | None, str]] = [
        (["a"], None, "a win rate takes two policies; give another --policy, or --against"),
        ([], None, "a win rate takes two policies"),
        (["a"], "a", "a win rate takes two policies"),
        (["x/a", "y/a"], None, "x/a and y/a are both named 'a'; name one of them, as in other=y/a"),
        (["a", "b"], "b=c", "b and c are both named 'b'; name one of them, as in other=c"),
        (["same=elsewhere", "b"], "same", "'same' is both the name of elsewhere and a path; name one of them, as in "
         "--against start=same"),
    ]  # fmt: skip
    for policies, against, message in cases:
        with pytest.raises(UsageError) as raised:
            parse_contenders(policies, against)
        assert message in str(raised.value)


def test_files_are_named_as_policies_are() -> None:
    names = ["warm step 500", "a/b", "a_b", "..", "é", "x" * 200, "a\nb", "\ud800"]
    files = [Contender(name, "source").file for name in names]
    assert files[0] == "warm step 500.jsonl"
    assert files[2] == "a_b.jsonl"
    assert files[4] == "é.jsonl"
    assert len(set(files)) == len(files)
    assert all("/" not in file and len(file) < 100 and not file.startswith(".") for file in files)


# --- policies of warmerge rl ------------------------------------------------------------------------------------------


def rl_run(folder: str, proxy: dict[str, Any] | str, *steps: int) -> str:
    """A run's folder with kept policies."""
    for step in steps:
        shutil.copytree(causal_models.folder(), f"{folder}/step-{step}")
    record = {"format": "warmerge rl 1", "proxy": proxy}
    Path(folder, "rl.json").write_text(proxy if isinstance(proxy, str) else json.dumps(record))
    return folder


def test_steps_of_a_run_are_a_ladder(place: Path) -> None:
    rl_run("rl/w", {"name": "warm", "kind": "warm", "checkpoints": ["gold.py:gold"]}, 5, 10)
    start = str(shutil.copytree(causal_models.folder(), place / "sft"))
    found = compare(["rl/w/step-5", "late=rl/w/step-10/", "free=rl/w/step-10"], against=start, sampling=SHORT)
    assert [(row["policy"], row["against"], row["step"], row["proxy"]) for row in found.rows] == [
        ("warm step 5", "sft", 5, "warm"), ("late", "sft", 10, "warm"), ("free", "sft", 10, "warm")
    ]  # fmt: skip
    assert Path("out/answers/warm step 5.jsonl").exists()
    # The judge is what the run was optimised for.
    what = (
        "shares weights with 'warm', which the policies of rl/w were optimised for: it flatters them; judge by another"
    )
    assert [w for w in found.warnings if "optimised" in w.what] == [Finding("gold.py:gold", f"{what} model")]


def proxied(run: dict[str, Any] | str, judged: Any) -> list[Finding]:
    """What is said of a judge and of a run's proxy."""
    if not Path("rl/step-1").exists():
        Path("rl/step-1").mkdir(parents=True)
    Path("rl/rl.json").write_text(run if isinstance(run, str) else json.dumps({"proxy": run}))
    contenders, _ = parse_contenders(["rl/step-1", "b"], None)
    return judge_doubts(open_rewarder(judged), str(judged), contenders, [])


def test_a_judge_that_the_policy_was_optimised_for(world: World, place: Path) -> None:
    warmerge.average([world.a, world.b], place / "averaged")
    warm = {"name": "warm", "kind": "warm", "checkpoints": [str(world.a), str(world.b)]}
    flattering = [world.a, world.b, place / "averaged", shutil.copytree(world.a, place / "copy")]
    for judged in flattering:
        (found,) = proxied(warm, judged)
        assert found.where == str(judged)
        assert found.what.startswith("shares weights with 'warm', which the policies of rl were optimised for")
    assert proxied(warm, world.alien) == []
    # Relative to where the run lies.
    shutil.copytree(world.c, "c")
    assert proxied({"name": "c", "checkpoints": ["../c"]}, world.c)[0].what.startswith("shares weights with 'c'")
    (unknown,) = proxied({"name": "far", "checkpoints": ["org/away", str(world.a)]}, world.alien)
    assert unknown == Finding(
        "rl/rl.json", "its proxy 'far' is not here ('org/away'): whether the judge shares its weights is unknown"
    )
    assert proxied({"name": "far", "checkpoints": ["org/away", str(world.a)]}, world.a)[0].where == str(world.a)
    for broken in ("{", "[]", '{"proxy": {"name": "x"}}'):
        (unreadable,) = proxied(broken, world.a)
        assert unreadable == Finding(
            "rl/rl.json", "cannot be read: whether the judge is what this run was optimised for is unknown"
        )


def test_a_function_that_the_policy_was_optimised_for() -> None:
    proxy = {"name": "gold", "checkpoints": ["gold.py:gold"]}
    assert len(proxied(proxy, "gold.py:gold")) == 1
    shutil.copy("gold.py", "copied.py")
    assert len(proxied(proxy, "copied.py:gold")) == 1
    Path("other.py").write_text(f"{LENGTH}# not the same\n")
    assert proxied(proxy, "other.py:gold") == []


def test_folders_that_only_look_like_steps(place: Path) -> None:
    (place / "x" / "step-5").mkdir(parents=True)
    (one, _), _ = parse_contenders(["x/step-5", "b"], None)
    assert (one.name, one.step, one.proxy, one.run) == ("step-5", None, None, None)
    (place / "x" / "rl.json").write_text("nonsense")
    (one, _), _ = parse_contenders(["x/step-5", "b"], None)
    assert (one.name, one.step, one.proxy, one.run) == ("step-5", 5, None, Path("x"))


# --- files of answers -------------------------------------------------------------------------------------------------


def test_all_prompts_must_be_answered() -> None:
    a, b, _ = three()
    answers("b.jsonl", ["b"] * 9, PROMPTS[3:])
    with pytest.raises(RefusedError) as raised:
        compare([a, b])
    assert str(raised.value) == (
        "refused: b: has no answer to 3 of 12 prompts, as to that of prompts.jsonl:1; "
        "--skip-bad-rows compares on the prompts that all have answered"
    )
    skipping = Measuring(resamples=100, skip_bad_rows=True)
    found = win_rate([a, b], "prompts.jsonl", "gold.py:gold", "out", measuring=skipping)
    assert (found.rows[0]["n"], found.record["prompts"]["compared"]) == (9, 9)
    assert found.record["notes"] == ["b has no answer to 3 prompts: left out for all"]
    answers("b.jsonl", ["b"], ["Another?"])
    with pytest.raises(RefusedError, match=r"b: has no answer to 12 of 12 prompts.*; no prompt is left"):
        win_rate([a, b], "prompts.jsonl", "gold.py:gold", "second", measuring=skipping)


def test_more_prompts_than_are_asked() -> None:
    policies = three()
    prompts("prompts.jsonl", PROMPTS[8:])
    found = compare(policies[:2])
    assert rates(found) == {("a", "b"): (pytest.approx(0.75), 2, 2, 0, 4)}
    assert found.record["notes"] == [f"{name} has answers to 8 prompts not asked: left out" for name in "ab"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "x", "candidates": ["a"]}] * 2,
            "has prompts for the second time (in row '2'): which answer counts?",
        ),
        ([{"prompt": "x"}], "bad.jsonl:1: has the columns 'prompt'; expected prompt and candidates"),
        ([{"prompt": "x", "candidates": []}], "bad.jsonl:1: 'candidates' is not a list of one text or more"),
        ([], "bad.jsonl: is empty: there is no row in it"),
    ],
)
def test_files_that_are_no_answers(rows: list[dict[str, Any]], message: str) -> None:
    write("bad.jsonl", rows)
    with pytest.raises(RefusedError) as raised:
        compare([three()[0], "bad.jsonl"])
    assert message in str(raised.value)


def test_doubts_about_answers() -> None:
    cut = answers("cut.jsonl", ["x"] * 12, finished=[True] * 10 + [False] * 2, tokens=[3] * 12)
    empty = answers("empty.jsonl", ["y"] * 11 + [""], tokens=[None] * 12)
    found = compare([cut, empty])
    assert list(found.warnings) == [
        Finding("cut.jsonl", "2 of 12 answers were cut where they were sampled; half an answer is judged as such"),
        Finding("empty.jsonl", "1 of 12 answers are empty; they are judged as they are"),
    ]
    (row,) = found.rows
    assert (row["wins"], row["ties"], row["tokens"], row["tokens_against"]) == (1, 11, 3.0, None)


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (1, "one prompt: its win rate says nothing about others"),
        (2, "2 prompts: intervals over so few are too narrow to be trusted"),
        (FEW, None),
    ],
)
def test_few_prompts(count: int, message: str | None) -> None:
    policies = three()[:2]
    prompts("prompts.jsonl", PROMPTS[:count])
    found = compare(policies)
    assert list(found.warnings) == ([Finding("--prompts", message)] if message else [])
    if count == 1:
        assert (found.rows[0]["low"], found.rows[0]["high"]) == (0.0, 1.0)


def test_ctrl_c_while_a_function_works(place: Path) -> None:
    Path("stops.py").write_text("def stop(prompts, completions):\n    raise KeyboardInterrupt\n")
    with pytest.raises(Interrupted, match="stopped; the answers are kept in out; the same command goes on"):
        compare(three(), "stops.py:stop")


def test_names_of_the_package() -> None:
    assert warmerge.win_rate is win_rate
    make: Callable[..., LlmJudge] = warmerge.LlmJudge
    assert make("http://localhost/v1", "m").parallel == 8


def test_prompts_that_a_policy_was_optimised_on_are_said(place: Path) -> None:
    Path("rl/step-1").mkdir(parents=True)
    Path("rl/rl.json").write_text(json.dumps({"proxy": {}, "prompts": "trained.jsonl"}))
    contenders, _ = parse_contenders(["rl/step-1", "b"], None)
    where = "rl/rl.json"
    unknown = "its prompts trained.jsonl are not here: whether they hold the ones that are judged is unknown"
    assert prompt_doubts(contenders, PROMPTS) == [Finding(where, unknown)]
    prompts("trained.jsonl", [*PROMPTS[:2], "another"])
    what = f"2 of {len(PROMPTS)} prompts are among those that its policies were optimised on; use other ones"
    assert prompt_doubts(contenders, PROMPTS) == [Finding(where, what)]
    prompts("trained.jsonl", ["another"])
    assert prompt_doubts(contenders, PROMPTS) == []
    assert prompt_doubts(contenders[1:], PROMPTS) == []
