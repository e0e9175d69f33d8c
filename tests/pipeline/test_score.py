"""score: every form of row, rewards that are those of eval and of transformers; and the function for trainers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from reward_world import World, own_rewards, pairs, write_rows, write_tokenizer

import warmerge
from warmerge.errors import RefusedError, UsageError, WarmergeError
from warmerge.pipeline.score import reward_function, score_file
from warmerge.pipeline.scoring import judge
from warmerge.rewards.bench import open_bench
from warmerge.rewards.model import LoadOptions, load_reward_model

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }}{{ ' and ' + m.name if m.name is defined }} {% endfor %}"


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("a model was loaded")


def scored(world: World, tmp_path: Path, rows: list[Any], **options: Any) -> list[dict[str, Any]]:
    out = tmp_path / "out.jsonl"
    score_file(world.a, write_rows(tmp_path / "in.jsonl", rows), out, overwrite=True, **options)
    return [json.loads(line) for line in out.read_text().splitlines()]


# --- forms of rows ---


@pytest.mark.parametrize("name", ["completion", "response", "answer", "output"])
def test_answers(world: World, tmp_path: Path, name: str) -> None:
    rows = [{"id": i, "prompt": row["prompt"], name: row["chosen"]} for i, row in enumerate(pairs(6, 1))]
    found = scored(world, tmp_path, rows)
    assert [{key: row[key] for key in ("id", "prompt", name)} for row in found] == rows
    own = own_rewards(world.a, [f"{row['prompt']}\n\n{row[name]}" for row in rows])
    assert [row["reward"] for row in found] == pytest.approx(own, abs=1e-4)
    assert len({row["reward"] for row in found}) > 1


def test_candidates_are_lists_even_of_one(world: World, tmp_path: Path) -> None:
    rows = [{"prompt": "why oak", "candidates": ["clear", "vague", "the"]}, {"prompt": "how", "candidates": ["it"]}]
    found = scored(world, tmp_path, rows)
    own = own_rewards(world.a, ["why oak\n\nclear", "why oak\n\nvague", "why oak\n\nthe", "how\n\nit"])
    assert found[0]["reward"] == pytest.approx(own[:3], abs=1e-4)
    assert found[1]["reward"] == pytest.approx(own[3:], abs=1e-4)
    # A column that is there and null, as columnar files have it, is as good as none.
    (row,) = scored(world, tmp_path, [{"prompt": "how", "completion": "it", "candidates": None, "answer": None}])
    assert row["reward"] == pytest.approx(own[3], abs=1e-4)


def test_texts(world: World, tmp_path: Path) -> None:
    found = scored(world, tmp_path, [{"text": "warm clear"}, {"text": "rude"}])
    assert [row["reward"] for row in found] == pytest.approx(own_rewards(world.a, ["warm clear", "rude"]), abs=1e-4)


def test_pairs(world: World, tmp_path: Path) -> None:
    rows = pairs(6, 1)
    found = scored(world, tmp_path, rows, column="score")
    for side in ("chosen", "rejected"):
        own = own_rewards(world.a, [f"{row['prompt']}\n\n{row[side]}" for row in rows])
        assert [row[f"score_{side}"] for row in found] == pytest.approx(own, abs=1e-4)
    assert list(found[0]) == ["prompt", "chosen", "rejected", "score_chosen", "score_rejected"]


def test_lists_of_answers_give_lists_of_one_length(world: World, tmp_path: Path) -> None:
    """RewardBench 2 and RM-Bench: a column is of lists in every row, so that it can be loaded as a column."""
    two = {"subset": "Ties", "num_correct": 1, "prompt": "why"}
    rows = [
        {**two, "chosen": ["clear", "warm"], "rejected": ["rude"]},
        {**two, "chosen": ["true"], "rejected": ["rude", "false", "vague"]},
    ]
    found = scored(world, tmp_path, rows)
    assert [(len(row["reward_chosen"]), len(row["reward_rejected"])) for row in found] == [(2, 1), (1, 3)]
    bench = {"id": 7, "prompt": "why", "domain": "chat", "chosen": ["a", "the", "it"], "rejected": ["is", "so", "was"]}
    (row,) = scored(world, tmp_path, [bench])
    own = own_rewards(world.a, [f"why\n\n{answer}" for answer in (*bench["chosen"], *bench["rejected"])])
    assert [*row["reward_chosen"], *row["reward_rejected"]] == pytest.approx(own, abs=1e-4)


def test_rewards_are_those_of_eval(world: World, tmp_path: Path) -> None:
    path = world.data("val")
    done = score_file(world.a, path, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in done.out.read_text().splitlines()]
    row = warmerge.evaluate([world.a], [path]).rows[0]
    assert row["accuracy"] == numpy.mean([r["reward_chosen"] >= r["reward_rejected"] for r in rows])
    bench = open_bench([f"val={path}"])
    rewards, texts = bench.score(load_reward_model(world.a))["val"], bench.sets[0].texts
    assert [r["reward_chosen"] for r in rows] == pytest.approx([rewards[i[0]] for i in texts.chosen], abs=1e-5)
    assert (done.rows, done.answers, done.skipped, done.notes) == (160, 320, 0, [])


def test_messages_are_read_as_eval_reads_them(world: World, tmp_path: Path) -> None:
    """With a chat template: a conversation that repeats its prompt, fields that are null, the prompt as text."""
    import shutil

    folder = tmp_path / "chat"
    shutil.copytree(world.a, folder)
    write_tokenizer(folder, template=TEMPLATE)
    user, bot = {"role": "user", "content": "why oak", "name": None}, {"role": "assistant", "content": "warm so"}
    data = write_rows(
        tmp_path / "in.jsonl",
        [
            {"prompt": [user], "completion": [bot]},
            {"prompt": [user], "completion": [user, bot]},
            {"prompt": "why oak", "completion": "warm so"},
            {"prompt": "why oak", "completion": [user, bot]},
        ],
    )
    done = score_file(folder, data, tmp_path / "out.jsonl")
    rewards = [json.loads(line)["reward"] for line in done.out.read_text().splitlines()]
    own = own_rewards(folder, ["user why oak assistant warm so"], end="")
    assert rewards == pytest.approx(own * 4, abs=1e-4)
    pair = write_rows(
        tmp_path / "pair.jsonl", [{"prompt": [user], "chosen": [user, bot], "rejected": [user, user | bot]}] * 2
    )
    (row, _) = (
        json.loads(line) for line in score_file(folder, pair, tmp_path / "p.jsonl").out.read_text().splitlines()
    )
    assert row["reward_chosen"] == pytest.approx(rewards[0], abs=1e-5)
    reward = reward_function(folder)
    assert reward(prompts=[[user], "why oak"], completions=[[bot], "warm so"]) == pytest.approx(rewards[:2], abs=1e-5)


# --- files ---


def test_order_and_gz(world: World, tmp_path: Path) -> None:
    rows = [{"text": "clear " * (1 + i % 7), "id": i} for i in range(40)]
    data = tmp_path / "in.jsonl.gz"
    data.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    outs = [tmp_path / "one.jsonl.gz", tmp_path / "two.jsonl.gz"]
    for out in outs:
        score_file(world.a, str(data), out)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    found = [json.loads(line) for line in gzip.decompress(outs[0].read_bytes()).decode().splitlines()]
    assert [row["id"] for row in found] == list(range(40))
    assert [row["reward"] for row in found[:7]] == pytest.approx(
        own_rewards(world.a, [r["text"] for r in rows[:7]]), abs=1e-4
    )


def test_other_columns_stay_whatever_is_in_them(world: World, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a", "note": "é \\u2028 \\n", "x": 0.1}\n{"text": "a", "note": "\\ud800 é"}\n')
    done = score_file(world.a, str(path), tmp_path / "out.jsonl")
    lines = done.out.read_bytes().decode().split("\n")
    assert [json.loads(line)["note"] for line in lines[:2]] == ["é \u2028 \n", "\ud800 é"]
    assert "é" in lines[0]
    assert lines[2:] == [""]
    assert json.loads(lines[0])["x"] == 0.1


def test_cut_texts_and_bad_rows_are_counted(world: World, tmp_path: Path) -> None:
    rows = [{"prompt": "why", "completion": "warm " * 20}, {"prompt": "why"}, {"prompt": "why", "completion": "so"}]
    data = write_rows(tmp_path / "in.jsonl", rows)
    done = score_file(world.a, data, tmp_path / "out.jsonl", skip_bad_rows=True, options=LoadOptions(max_length=12))
    assert (done.rows, done.answers, done.prompt_cut, done.answer_cut, done.skipped) == (2, 2, 0, 1, 1)
    assert done.notes == [
        "of 2 texts 0 lost the beginning of their prompt and 1 the end of their answer to the length limit "
        "(--max-length)",
        "1 bad rows were left out",
    ]
    assert len(done.out.read_text().splitlines()) == 2


# --- refusals, before a model is loaded ---

FORMS = "chosen and rejected; prompt and candidates; prompt and one of completion, response, answer, output; text"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, f"has the columns 'prompt'; expected {FORMS}"),
        ({"completion": "c"}, f"has the columns 'completion'; expected {FORMS}"),
        ({"prompt": "p", "answer": "a", "output": "b"},
         f"has the columns 'answer', 'output', 'prompt'; expected {FORMS}"),
        ({"prompt": "p", "completion": 3}, "'completion' is 3, expected text or a list of messages"),
        ({"prompt": 3, "completion": "c"}, "'prompt' is 3, expected text or a list of messages"),
        ({"prompt": "p", "candidates": []}, "'candidates' is not a list of one text or more"),
        ({"prompt": "p", "candidates": "c"}, "'candidates' is not a list of one text or more"),
        ({"prompt": "p", "candidates": ["a", 2]}, "'candidates[1]' is 2, expected text or a list of messages"),
        ({"candidates": ["a"]}, "'prompt' is null"),
        ({"text": ["t"]}, "'text[0]' is text, expected a message with role and content"),
        ({"prompt": "p", "completion": "\ud800"},
         r"'completion' holds half a character, '\ud800', which no tokenizer takes"),
        ({"prompt": "p", "completion": [{"role": "user", "content": "x"}]},
         "'completion' starts with a user message, but not with the prompt"),
    ],
)  # fmt: skip
def test_rows_of_no_known_form(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(judge, "load_reward_model", never)
    data = write_rows(tmp_path / "in.jsonl", [{"prompt": "p", "completion": "c"}, row])
    with pytest.raises(RefusedError) as caught:
        score_file(world.a, data, tmp_path / "out.jsonl")
    assert str(caught.value).splitlines()[1:] == [
        f"  - {data}:2: {message}", f"  - {data}: --skip-bad-rows leaves bad rows out and counts them"
    ]  # fmt: skip
    alone = write_rows(tmp_path / "alone.jsonl", [row] * 12)
    with pytest.raises(RefusedError) as caught:
        score_file(world.a, alone, tmp_path / "out.jsonl", skip_bad_rows=True)
    assert len(caught.value.findings) == 11
    assert str(caught.value).endswith(f"{alone}: ... and 2 more bad rows; no good row is left")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"out": "OUT.json"}, "-o: expected a name ending in .jsonl or .jsonl.gz, found 'OUT.json'"),
        ({"out": "there.jsonl"}, "-o there.jsonl exists; choose another name, or add --overwrite"),
        ({"out": "none/out.jsonl"}, "-o: the folder none does not exist; make it first"),
        ({"out": "in.jsonl", "overwrite": True}, "-o in.jsonl is the data itself; choose another name"),
        ({"column": "id"}, "in.jsonl has a column 'id' already; name another: --column"),
        ({"data": "gone.jsonl"}, "no file or folder 'gone.jsonl', and not a data-set id like org/name"),
    ],
)
def test_what_cannot_be_used_is_refused_before_a_model_is_loaded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(judge, "load_reward_model", never)
    Path("there.jsonl").write_text("mine")
    write_rows(Path("in.jsonl"), [{"id": 1, "text": "a"}])
    with pytest.raises(UsageError) as caught:
        score_file(world.a, **{"data": "in.jsonl", "out": "out.jsonl", **given})
    assert str(caught.value) == message
    assert Path("there.jsonl").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "there.jsonl"]


def test_an_empty_file_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n")
    with pytest.raises(RefusedError, match="is empty: there is no row in it"):
        score_file(world.a, str(tmp_path / "in.jsonl"), tmp_path / "out.jsonl")


@pytest.mark.parametrize("out", ["x" * 244 + ".jsonl", "/proc/scored.jsonl"])
def test_an_output_that_cannot_be_written_is_said_before_scoring(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    """A name without room for what it is called until it is finished; a folder that nobody may write to."""
    monkeypatch.setattr(judge, "load_reward_model", never)
    data = write_rows(tmp_path / "in.jsonl", [{"text": "a"}])
    with pytest.raises(OSError, match=out[:5]):
        score_file(world.a, data, tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_output_that_came_meanwhile_is_left_as_it_is(world: World, tmp_path: Path) -> None:
    out, data = tmp_path / "out.jsonl", write_rows(tmp_path / "in.jsonl", [{"text": "a"}])
    with pytest.raises(WarmergeError) as caught:
        score_file(world.a, data, out, on_work=lambda _: out.write_text("another command's"))
    ours = tmp_path / ".out.jsonl.partial"
    what = f"-o {out} was written by another command meanwhile, and is left as it is"
    assert str(caught.value) == f"{what}; what was scored here is in {ours}: give it another name"
    assert out.read_text() == "another command's"
    score_file(world.a, data, tmp_path / "again.jsonl")
    assert ours.read_bytes() == (tmp_path / "again.jsonl").read_bytes()
    score_file(world.a, data, out, overwrite=True)
    assert not ours.exists()


# --- the function for trainers ---


def test_a_reward_function_takes_texts_and_ignores_other_columns(world: World) -> None:
    reward = reward_function(world.a)
    assert reward.__name__ == "reward_of_a"
    found = reward(prompts=["why oak", "how"], completions=["clear", "rude it"], completion_ids=[[1], [2]], ground="x")
    assert found == pytest.approx(own_rewards(world.a, ["why oak\n\nclear", "how\n\nrude it"]), abs=1e-4)
    assert all(type(value) is float for value in found)
    assert reward(prompts=[], completions=[]) == []
    messages = [[{"role": "user", "content": "why oak"}]], [[{"role": "assistant", "content": "clear"}]]
    assert reward(prompts=messages[0], completions=messages[1]) == pytest.approx(found[:1], abs=1e-6)
    assert warmerge.reward_function is reward_function


def test_a_reward_function_refuses_what_it_cannot_read(world: World) -> None:
    reward = reward_function(world.a)
    with pytest.raises(RefusedError) as caught:
        reward(prompts=["a", "b"], completions=["c", None])
    assert str(caught.value) == "refused: text 2: 'completions[1]' is null"
    with pytest.raises(UsageError) as usage:
        reward(prompts=["a"], completions=["b", "c"])
    assert str(usage.value) == "2 completions for 1 prompts; expected one for each"


def test_scored_rows_are_json(world: World, tmp_path: Path) -> None:
    """Python's own reader and writer take NaN and infinities for JSON; nobody else does."""
    (tmp_path / "d.jsonl").write_text(
        '{"prompt": "Why?", "completion": "It is so.", "x": NaN, "y": {"z": [1e999, 2.5]}}\n'
    )
    warmerge.score_file(world.a, str(tmp_path / "d.jsonl"), tmp_path / "o.jsonl")
    row = json.loads((tmp_path / "o.jsonl").read_text(), parse_constant=pytest.fail)
    assert (row["x"], row["y"]) == (None, {"z": [None, 2.5]})
