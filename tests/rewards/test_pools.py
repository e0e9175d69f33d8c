"""Candidate pools: what is read, what is refused and how it is said, and which texts are scored for whom."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import bot, lines, system, user

from warmerge.errors import RefusedError, UsageError
from warmerge.rewards.pools import Pool, read_pool, said

Row = Mapping[str, Any]
Writer = Callable[..., str]
GOOD = {"prompt": "Why?", "candidates": ["Because.", "No."], "gold": [0.5, -1]}


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """write(row, row, ..., name="pool.jsonl") writes a file and returns its path; one bytes object is written as is."""

    def _write(*rows: Any, name: str = "pool.jsonl") -> str:
        path = tmp_path / name
        if len(rows) == 1 and isinstance(rows[0], bytes):
            path.write_bytes(rows[0])
        elif name.endswith(".parquet"):
            pyarrow = pytest.importorskip("pyarrow")
            pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(list(rows)), path)
        else:
            data = json.dumps(rows).encode() if ".jsonl" not in name else lines(rows)
            path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return _write


def findings(source: str, **options: Any) -> list[str]:
    """What a refusal says, in lines, without the folder that the file lies in."""
    with pytest.raises(RefusedError) as caught:
        read_pool(source, **options)
    return [str(finding).replace(f"{Path(source).parent}{os.sep}", "") for finding in caught.value.findings]


def usage(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(text)}$"):
        call()


def holds_what_it_says(pool: Pool) -> None:
    """Texts are there once; `at` leads from each row to its own candidates."""
    assert len(pool.at) == len(pool.rows) == len(pool.sizes) == len(pool.clusters)
    assert len({json.dumps(text) for text in pool.texts}) == len(pool.texts)
    for row, at in zip(pool.rows, pool.at, strict=True):
        assert [pool.texts[i] for i in at] == [(row.prompt, answer) for answer in row.answers]
        assert row.gold is None or (row.gold.shape == (len(row.answers),) and row.gold.dtype == np.float64)


# --- what is read -----------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": f"p{i} \u2028 é 🙂", "candidates": [f"a{i}{j} \U0001d11e" for j in range(n)], "gold": [0.5] * n}
    for i, n in enumerate((2, 3, 4, 2, 3, 4, 2))
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet"])
def test_every_kind_of_file_gives_the_same_pool(write: Writer, name: str) -> None:
    found, expected = read_pool(write(*ROWS, name=name)), read_pool(write(*ROWS, name="expected.jsonl"))
    assert found.fingerprint == expected.fingerprint
    assert found.texts == expected.texts
    assert [row.answers for row in found.rows] == [tuple(row["candidates"]) for row in ROWS]
    assert [row.prompt for row in found.rows] == [row["prompt"] for row in ROWS]
    assert found.sizes == [2, 3, 4, 2, 3, 4, 2]
    assert [row.row for row in found.rows] == [1, 2, 3, 4, 5, 6, 7]
    assert (found.skipped, found.short) == (0, 0)
    holds_what_it_says(found)


def test_a_file_of_one_row_with_one_candidate_is_a_pool(write: Writer) -> None:
    found = read_pool(write({"prompt": "Why?", "candidates": [""]}))
    assert found.texts == (("Why?", ""),)
    assert [at.tolist() for at in found.at] == [[0]]
    assert found.at[0].dtype == np.int64
    assert found.gold is None
    assert found.clusters == ("Why?",)
    assert [one.tolist() for one in found.by_row(np.array([3.0]))] == [[3.0]]


def test_gold_is_given_for_each_row_or_for_none(write: Writer) -> None:
    rows = [GOOD, {"prompt": "Who?", "candidates": ["I"], "gold": [3]}]
    gold = read_pool(write(*rows)).gold
    assert gold is not None
    assert [one.tolist() for one in gold] == [[0.5, -1.0], [3.0]]
    assert read_pool(write(*({**row, "gold": None} for row in rows))).gold is None


def test_rewards_of_texts_are_handed_to_the_rows_that_hold_them(write: Writer) -> None:
    again = {"prompt": "Why?", "candidates": ["No.", "New.", "Because.", "No."], "gold": [1, 2, 3, 4]}
    found = read_pool(write(GOOD, again))
    holds_what_it_says(found)
    # Each distinct text is scored once, also where another row, or the same one, has it again.
    assert found.texts == (("Why?", "Because."), ("Why?", "No."), ("Why?", "New."))
    assert [one.tolist() for one in found.by_row(np.array([10.0, 20.0, 30.0]))] == [[10, 20], [20, 30, 10, 20]]
    assert found.sizes == [2, 4]
    assert found.gold is not None
    assert found.gold[1].tolist() == [1, 2, 3, 4]  # of the candidates as they stand, repeats included
    assert all(text[0] is found.texts[0][0] for text in found.texts)


def test_the_same_answer_to_another_prompt_is_another_text(write: Writer) -> None:
    found = read_pool(write(*({"prompt": prompt, "candidates": ["Yes.", "No."]} for prompt in ("A?", "B?"))))
    assert len(found.texts) == 4
    assert [at.tolist() for at in found.at] == [[0, 1], [2, 3]]


def test_messages_are_kept_and_text_answers_to_them_become_the_assistants(write: Writer) -> None:
    talk = [system("Be brief."), user("Why?")]
    found = read_pool(write({"prompt": talk, "candidates": ["So.", [bot("No.")], [*talk, bot("Yes.")]]}))
    (row,) = found.rows
    assert row.prompt == tuple(talk)
    assert row.answers == ((bot("So."),), (bot("No."),), (bot("Yes."),))
    holds_what_it_says(found)


def test_a_text_and_a_message_of_the_same_words_are_two_texts_of_one_prompt(write: Writer) -> None:
    mixed = {"prompt": "Why?", "candidates": ["So.", [bot("So.")], "So."]}
    talk = {"prompt": [user("Why?")], "candidates": ["So."]}
    found = read_pool(write(mixed, talk))
    assert found.texts == (("Why?", "So."), ("Why?", (bot("So."),)), ((user("Why?"),), (bot("So."),)))
    assert [at.tolist() for at in found.at] == [[0, 1, 0], [2]]
    assert found.clusters == ("Why?", "Why?")


def test_a_conversation_that_repeats_a_text_prompt_keeps_what_else_it_says(write: Writer) -> None:
    before = [system("Be brief."), user("Why?")]
    found = read_pool(write({"prompt": "Why?", "candidates": [[*before, bot("So.")], [*before, bot("No.")]]}))
    assert found.rows[0].prompt == tuple(before)
    assert found.rows[0].answers == ((bot("So."),), (bot("No."),))
    holds_what_it_says(found)


# --- what counts as one prompt ----------------------------------------------------------------------------------------


def test_rows_of_one_prompt_are_one_cluster_and_prompt_id_says_otherwise(write: Writer) -> None:
    rows = [{"prompt": prompt, "candidates": ["a", "b"]} for prompt in ("A?", "B?", "A?")]
    assert read_pool(write(*rows)).clusters == ("A?", "B?", "A?")
    numbered = [{**row, "prompt_id": number} for row, number in zip(rows, (7, 7, "x"), strict=True)]
    assert read_pool(write(*numbered)).clusters == ("7", "7", "x")


@pytest.mark.parametrize(
    ("value", "shown"), [({"a": 1}, '{"a": 1}'), ([7], "[7]"), (float("nan"), "NaN")]
)  # NaN: what a table writes where it has no id; all of them would be one prompt
def test_a_prompt_id_must_tell_prompts_apart(write: Writer, value: Any, shown: str) -> None:
    found = findings(write({**GOOD, "prompt_id": 1}, {**GOOD, "prompt_id": value}))
    assert found[0] == f"pool.jsonl:2: 'prompt_id' is {shown}, expected text or a number"


def test_what_is_said_does_not_depend_on_how() -> None:
    assert said("Why?") == said((user("Why?"),)) == "Why?"
    assert len({said("Why?"), said((bot("Why?"),)), said((user("Why?"), bot("So."))), said((system("Why?"),))}) == 4


# --- what is refused --------------------------------------------------------------------------------------------------

GOLD = "'gold' is not a list of 2 numbers, one for each candidate: found "
FINISHED = "'finished' is not a list of 2 times true or false, one for each candidate"
OTHER = (
    "'candidates[1]' continues another conversation than 'candidates[0]' does: give the prompt as messages, and "
    "answers without it"
)
# Changes to a good row that has gold and finished; a GONE column is removed.
GONE = object()
BAD: list[tuple[str, dict[str, Any], str]] = [
    (
        "no candidates",
        {"candidates": GONE},
        "has the columns 'finished', 'gold', 'prompt'; expected prompt and candidates",
    ),
    ("no prompt", {"prompt": GONE}, "has the columns 'candidates', 'finished', 'gold'; expected prompt and candidates"),
    ("empty list", {"candidates": []}, "'candidates' is not a list of one text or more"),
    ("a string", {"candidates": "Because."}, "'candidates' is not a list of one text or more"),
    ("candidates null", {"candidates": None}, "'candidates' is not a list of one text or more"),
    ("candidates object", {"candidates": {"0": "a"}}, "'candidates' is not a list of one text or more"),
    ("candidate null", {"candidates": ["a", None]}, "'candidates[1]' is null"),
    ("candidate number", {"candidates": ["a", 5]}, "'candidates[1]' is 5, expected text or a list of messages"),
    (
        "candidate object",
        {"candidates": [bot("a"), "b"]},
        "'candidates[0]' is an object, expected text or a list of messages",
    ),
    ("candidate empty", {"candidates": ["a", []]}, "'candidates[1]' is an empty list, expected one message or more"),
    (
        "message without role",
        {"candidates": ["a", [{"content": "b"}]]},
        "has no 'candidates[1][0].role', only 'content'",
    ),
    (
        "message content",
        {"candidates": ["a", [{"role": "assistant", "content": 5}]]},
        "'candidates[1][0].content' is 5, expected text",
    ),
    (
        "candidates of text",
        {"candidates": ["a", ["b"]]},
        "'candidates[1][0]' is text, expected a message with role and content",
    ),
    (
        "half a character",
        {"candidates": ["a", "b\ud83d"]},
        "'candidates[1]' holds half a character, '\\ud83d', which no tokenizer takes",
    ),
    (
        "half in the prompt",
        {"prompt": "\udc00"},
        "'prompt' holds half a character, '\\udc00', which no tokenizer takes",
    ),
    ("prompt null", {"prompt": None}, "'prompt' is null"),
    ("prompt number", {"prompt": 5}, "'prompt' is 5, expected text or a list of messages"),
    ("prompt empty", {"prompt": []}, "'prompt' is an empty list, expected one message or more"),
    (
        "the prompt alone",
        {"candidates": ["a", [user("Why?")]]},
        "'candidates[1]' is the prompt alone, without an answer",
    ),
    (
        "another prompt",
        {"prompt": [user("Why?")], "candidates": ["a", [user("Who?"), bot("b")]]},
        "'candidates[1]' starts with a user message, but not with the prompt",
    ),
    # Each of these conversations would be read; but with the prompt of the first one before all answers.
    (
        "a longer talk",
        {"candidates": [[user("Why?"), bot("a")], [user("Why?"), bot("b"), user("And?"), bot("c")]]},
        OTHER,
    ),
    ("another system", {"candidates": [[user("Why?"), bot("a")], [system("Lie."), user("Why?"), bot("b")]]}, OTHER),
    ("no prompt in one", {"prompt": "", "candidates": ["a", [bot("b")]]}, OTHER),
    ("gold too short", {"gold": [1.0]}, GOLD + "1 of them"),
    ("gold too long", {"gold": [1, 2, 3]}, GOLD + "3 of them"),
    ("gold empty", {"gold": []}, GOLD + "0 of them"),
    ("gold a number", {"gold": 0.5}, GOLD + "0.5"),
    ("gold a string", {"gold": "12"}, GOLD + '"12"'),
    ("gold by name", {"gold": {"0": 1, "1": 2}}, GOLD + '{"0": 1, "1": 2}'),
    ("gold false", {"gold": False}, GOLD + "false"),
    ("gold NaN", {"gold": [1, float("nan")]}, "'gold[1]' is NaN, expected a finite number"),
    ("gold Infinity", {"gold": [float("inf"), 1]}, "'gold[0]' is Infinity, expected a finite number"),
    ("gold -Infinity", {"gold": [1, float("-inf")]}, "'gold[1]' is -Infinity, expected a finite number"),
    ("gold true", {"gold": [1, True]}, "'gold[1]' is true, expected a finite number"),
    ("gold text", {"gold": ["1", 2]}, "'gold[0]' is \"1\", expected a finite number"),
    ("gold null inside", {"gold": [None, 2]}, "'gold[0]' is null, expected a finite number"),
    ("gold nested", {"gold": [[1], 2]}, "'gold[0]' is [1], expected a finite number"),
    ("gold beyond float", {"gold": [1, 10**400]}, "is not JSON (a number in it has 401 digits)"),
    ("gold missing", {"gold": GONE}, "has no 'gold', which other rows have"),
    ("gold null", {"gold": None}, "has no 'gold', which other rows have"),
    ("finished missing", {"finished": GONE}, "has no 'finished', which other rows have"),
    ("finished true", {"finished": True}, FINISHED),
    ("finished text", {"finished": "true"}, FINISHED),
    ("finished short", {"finished": [True]}, FINISHED),
    ("finished words", {"finished": ["yes", "no"]}, FINISHED),
    ("finished numbers", {"finished": [1, 0]}, FINISHED),
    ("finished null", {"finished": [True, None]}, FINISHED),
]
FULL = {**GOOD, "finished": [True, False]}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("change", "what"), [pytest.param(*rest, id=name) for name, *rest in BAD])
def test_a_bad_row_is_named_and_can_be_left_out(write: Writer, change: Row, what: str, first: bool) -> None:
    bad = {key: value for key, value in {**FULL, **change}.items() if value != GONE}
    other = {**FULL, "prompt": "Other?"}
    number = 1 if first else 2
    source = write(*([bad, other] if first else [other, bad]))
    assert findings(source) == [
        f"pool.jsonl:{number}: {what}",
        "pool.jsonl: --skip-bad-rows leaves bad rows out and counts them",
    ]
    kept = read_pool(source, skip_bad_rows=True)
    assert [(row.prompt, row.row) for row in kept.rows] == [("Other?", 3 - number)]
    assert kept.skipped == 1
    assert kept.fingerprint == read_pool(write(other, name="kept.jsonl")).fingerprint


def test_a_row_that_is_no_row_is_named_with_its_line(write: Writer) -> None:
    good = json.dumps(GOOD).encode()
    data = b"\n".join([good, b"", b"{", b'["a"]', b"\xff", b"7", good])
    found = findings(write(data))
    assert [line.partition(" is ")[0] for line in found[:4]] == [f"pool.jsonl:{n}:" for n in (3, 4, 5, 6)]
    assert found[0].startswith("pool.jsonl:3: is not JSON (")
    assert found[1].endswith("expected an object with one row's columns")
    assert found[2] == "pool.jsonl:5: is not UTF-8 (byte 0)"
    kept = read_pool(write(data), skip_bad_rows=True)
    assert [row.row for row in kept.rows] == [1, 7]
    assert kept.skipped == 4


def test_all_bad_rows_are_counted_and_ten_are_named(write: Writer) -> None:
    bad = [{"prompt": "Why?", "candidates": []}] * 12
    found = findings(write(*bad, GOOD))
    assert [line.partition(": ")[0] for line in found[:10]] == [f"pool.jsonl:{n}" for n in range(1, 11)]
    assert found[10:] == ["pool.jsonl: ... and 2 more bad rows; --skip-bad-rows leaves them out and counts them"]
    assert read_pool(write(*bad, GOOD), skip_bad_rows=True).skipped == 12
    for skip in (False, True):
        found = findings(write(*bad), skip_bad_rows=skip)
        assert found[-1] == "pool.jsonl: ... and 2 more bad rows; no good row is left"


def test_a_gold_in_one_row_alone_is_not_overlooked(write: Writer) -> None:
    bare = {"prompt": "Who?", "candidates": ["I", "you"]}
    found = findings(write(bare, {**bare, "gold": None}, GOOD, bare))
    assert found[:-1] == [f"pool.jsonl:{n}: has no 'gold', which other rows have" for n in (1, 2, 4)]
    kept = read_pool(write(bare, bare, GOOD), skip_bad_rows=True)
    assert (len(kept.rows), kept.skipped) == (1, 2)


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(write: Writer, data: bytes) -> None:
    assert findings(write(data)) == ["pool.jsonl: is empty: there is no row in it"]
    assert findings(write(data), skip_bad_rows=True) == ["pool.jsonl: is empty: there is no row in it"]


def test_a_source_that_is_not_there_is_said_to_be(tmp_path: Path) -> None:
    missing = str(tmp_path / "pool.jsonl")
    usage(lambda: read_pool(missing), f"no file or folder {missing!r}, and not a data-set id like org/name")


def test_a_gzip_that_was_cut_off_is_refused(write: Writer) -> None:
    data = gzip.compress(lines([GOOD] * 50))
    (found,) = findings(write(data[:-20], name="pool.jsonl.gz"))
    assert re.fullmatch(r"pool\.jsonl\.gz: is cut off or damaged \(.+\); fetch it again", found)


def test_a_parquet_file_says_which_row_is_bad(write: Writer) -> None:
    pytest.importorskip("pyarrow")
    rows = [GOOD, {**GOOD, "gold": [1.0, None]}, {**GOOD, "candidates": None}]
    assert findings(write(*rows, name="pool.parquet"))[:2] == [
        "pool.parquet:2: 'gold[1]' is null, expected a finite number",
        "pool.parquet:3: 'candidates' is not a list of one text or more",
    ]
    talk = {"prompt": [user("Why?")], "candidates": [[bot("a")], [{**bot("b"), "name": "x"}]]}
    found = read_pool(write(talk, name="talk.parquet"))
    assert found.rows[0].answers == ((bot("a"),), ({**bot("b"), "name": "x"},))  # the column's nulls are no fields


def test_a_folder_is_read_file_by_file(write: Writer, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write({"prompt": "B?", "candidates": ["b"]}, name="parts/2.jsonl")
    write({"prompt": "A?", "candidates": ["a"]}, {"prompt": "A2?", "candidates": []}, name="parts/1.jsonl")
    folder = str(tmp_path / "parts")
    assert findings(folder)[0].endswith("1.jsonl:2: 'candidates' is not a list of one text or more")
    assert [row.prompt for row in read_pool(folder, skip_bad_rows=True).rows] == ["A?", "B?"]


# --- what was cut off where it was sampled ----------------------------------------------------------------------------


def test_answers_that_did_not_end_are_counted(write: Writer) -> None:
    rows = [{**GOOD, "finished": ended} for ended in ([True, True], [False, True], [False, False])]
    assert [row.unfinished for row in read_pool(write(*rows)).rows] == [0, 1, 2]
    assert [row.unfinished for row in read_pool(write(GOOD)).rows] == [0]


# --- a part of it -----------------------------------------------------------------------------------------------------


def test_a_limit_draws_the_same_rows_for_the_same_seed_in_their_order(write: Writer) -> None:
    source = write(*({"prompt": f"p{i:02d}", "candidates": ["a", "b"]} for i in range(40)))
    drawn = {seed: [row.prompt for row in read_pool(source, limit=10, seed=seed).rows] for seed in range(5)}
    for seed, prompts in drawn.items():
        assert len(set(prompts)) == 10
        assert prompts == sorted(prompts)
        assert prompts == [row.prompt for row in read_pool(source, limit=10, seed=seed).rows]
    assert len({tuple(prompts) for prompts in drawn.values()}) == 5
    # The first ten of a file are no random sample of it.
    assert all(prompts != [f"p{i:02d}" for i in range(10)] for prompts in drawn.values())
    holds_what_it_says(read_pool(source, limit=10))
    assert [row.prompt for row in read_pool(source, limit=40).rows] == [f"p{i:02d}" for i in range(40)]
    assert read_pool(source, limit=99).fingerprint == read_pool(source).fingerprint


def test_prompts_with_too_few_candidates_are_left_out_and_counted(write: Writer) -> None:
    source = write(*({"prompt": f"p{n}", "candidates": [f"{i}" for i in range(n)]} for n in (1, 4, 2, 3)))
    found = read_pool(source, min_candidates=3)
    assert (found.sizes, found.short, found.skipped) == ([4, 3], 2, 0)
    assert [row.row for row in found.rows] == [2, 4]
    assert {prompt for prompt, _ in found.texts} == {"p4", "p3"}  # what is left out is not scored
    holds_what_it_says(found)
    assert len(read_pool(source, min_candidates=3, limit=1).rows) == 1
    assert read_pool(source, min_candidates=4).sizes == [4]
    usage(lambda: read_pool(source, min_candidates=5), f"--min-candidates 5: no prompt of {source} has more than 4")


def test_a_limit_or_minimum_below_one_is_refused(write: Writer) -> None:
    source = write(GOOD)
    usage(lambda: read_pool(source, limit=0), "--limit: expected 1 or more, found 0")
    usage(lambda: read_pool(source, min_candidates=-1), "--min-candidates: expected 1 or more, found -1")


# --- the fingerprint --------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_texts_to_score_and_of_nothing_else(write: Writer) -> None:
    rows = [{"prompt": f"p{i}", "candidates": ["a", "b", "c"]} for i in range(3)]
    own = read_pool(write(*rows)).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", own)
    more = [{**row, "gold": [1, 2, 3], "finished": [True] * 3, "prompt_id": 1, "by": "me"} for row in rows]
    assert read_pool(write(*more, name="more.jsonl.gz")).fingerprint == own
    assert read_pool(write(*reversed(rows))).fingerprint != own
    for change in (
        {"prompt": "P0"},
        {"prompt": [user("p0")]},
        {"candidates": ["b", "a", "c"]},
        {"candidates": ["a", "b", "c "]},
        {"candidates": ["a", "b"]},
        {"candidates": ["a", "b", "c", "d"]},
        {"candidates": ["a", "b", [bot("c")]]},
    ):
        assert read_pool(write({**rows[0], **change}, *rows[1:])).fingerprint != own, change
