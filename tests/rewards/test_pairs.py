"""Preference pairs: what is read from which file, in which layout, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import bot, lines, system, user
from hypothesis import given, settings
from hypothesis import strategies as st

from warmerge.errors import Finding, RefusedError, RemoteError, UsageError
from warmerge.rewards.layouts import LAYOUTS
from warmerge.rewards.pairs import Comparison, PreferenceSet, read_all, read_preferences, unique_texts
from warmerge.rewards.rows import parse_named, read_rows

Row = Mapping[str, Any]
Writer = Callable[..., str]
PLAIN = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """`rows` in the format that the name of the file says."""
    name = path.name
    if name.endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
        return
    data = json.dumps(rows).encode() if ".json" in name and ".jsonl" not in name else lines(rows)
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """write(row, row, ..., name="a.jsonl") writes a file and returns its path; one bytes object is written as it is."""

    def _write(*rows: Any, name: str = "pairs.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(rows) == 1 and isinstance(rows[0], bytes):
            path.write_bytes(rows[0])
        else:
            write_rows(path, rows)
        return str(path)

    return _write


@pytest.fixture
def one(write: Writer) -> Callable[[Row], Comparison]:
    """The only comparison of a file with one row."""

    def _one(row: Row) -> Comparison:
        (comparison,) = read_preferences(write(row)).comparisons
        return comparison

    return _one


def findings(spec: str, **options: Any) -> list[str]:
    """What a refusal says of a source, in lines, without the folder that the file lies in."""
    with pytest.raises(RefusedError) as caught:
        read_preferences(spec, **options)
    return [str(finding).replace(f"{Path(spec).parent}{os.sep}", "") for finding in caught.value.findings]


# --- files ------------------------------------------------------------------------------------------------------------

NAMES = ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet", "A.JSONL", "a.Json"]
ROWS = [{"prompt": f"p{i // 2}", "chosen": f"good {i} \u2028 é 🙂", "rejected": f"bad {i}"} for i in range(5)]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_file_gives_the_same_comparisons_and_fingerprint(write: Writer, name: str) -> None:
    found, expected = read_preferences(write(*ROWS, name=name)), read_preferences(write(*ROWS, name="expected.jsonl"))
    assert found.comparisons == expected.comparisons
    assert found.fingerprint == expected.fingerprint
    assert (found.layout, found.skipped) == ("TRL explicit prompt", 0)
    assert [c.row for c in found.comparisons] == [1, 2, 3, 4, 5]
    assert found.comparisons[3] == Comparison("p1", ("good 3 \u2028 é 🙂",), ("bad 3",), "p1", "", 4)


def test_a_json_file_of_lines_is_read_as_lines(write: Writer) -> None:
    found = read_preferences(write(lines(ROWS), name="a.json"))
    assert found.fingerprint == read_preferences(write(*ROWS)).fingerprint


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_byte_order_mark_and_windows_line_ends_are_accepted(write: Writer, name: str) -> None:
    data = b"\xef\xbb\xbf" + lines([PLAIN, PLAIN]).replace(b"\n", b"\r\n")
    assert len(read_preferences(write(data, name=name)).comparisons) == 2


def test_a_last_line_without_an_end_is_a_row(write: Writer) -> None:
    assert len(read_preferences(write(lines([PLAIN, PLAIN]).rstrip(b"\n"))).comparisons) == 2


def test_blank_lines_are_skipped_but_counted(write: Writer) -> None:
    row = json.dumps(PLAIN).encode()
    found = read_preferences(write(b"\n" + row + b"\n  \t\n\n" + row + b"\n"))
    assert [c.row for c in found.comparisons] == [2, 5]


def test_a_carriage_return_between_fields_does_not_end_a_row(write: Writer) -> None:
    assert len(read_preferences(write(lines([PLAIN]).replace(b", ", b",\r"))).comparisons) == 1


def test_a_fingerprint_is_of_comparisons_alone(write: Writer) -> None:
    spread = write(b"\n\n".join(json.dumps(row).encode() for row in ROWS), name="spread.jsonl")
    more = write(*[row | {"margin": 2} for row in ROWS], name="more.jsonl")
    prints = {read_preferences(f"{name}={path}").fingerprint for name, path in (("a", spread), ("b", more))}
    assert prints == {read_preferences(write(*ROWS)).fingerprint}


@pytest.mark.parametrize("change", ["order", "prompt", "chosen", "rejected", "swapped", "cluster", "subset"])
def test_a_fingerprint_changes_with_whatever_is_compared(write: Writer, change: str) -> None:
    changed = {
        "order": ROWS[::-1],
        "prompt": [row | {"prompt": "P", "prompt_id": row["prompt"]} for row in ROWS],  # the same clusters
        "chosen": [ROWS[0] | {"chosen": "P"}, *ROWS[1:]],
        "rejected": [ROWS[0] | {"rejected": "P"}, *ROWS[1:]],
        "swapped": [ROWS[0] | {"rejected": ROWS[0]["chosen"], "chosen": ROWS[0]["rejected"]}, *ROWS[1:]],
        "cluster": [row | {"prompt_id": 1} for row in ROWS],
        "subset": [row | {"subset": "s"} for row in ROWS],
    }[change]
    found = read_preferences(write(*changed, name="b.jsonl")).fingerprint
    assert found != read_preferences(write(*ROWS)).fingerprint
    assert len(found) == 64


def test_a_folder_is_read_in_the_order_of_names_without_hidden_and_other_files(write: Writer, tmp_path: Path) -> None:
    write(PLAIN | {"prompt": "2"}, name="set/b.json")
    write(PLAIN | {"prompt": "1"}, PLAIN | {"prompt": "1b"}, name="set/a.jsonl.gz")
    write(b"junk", name="set/.c.jsonl")
    write(b"# a set", name="set/README.md")
    write(b"junk", name="set/sub.jsonl/deep.jsonl")
    found = read_preferences(str(tmp_path / "set"))
    assert [(c.prompt, c.row) for c in found.comparisons] == [("1", 1), ("1b", 2), ("2", 1)]
    assert (found.name, found.source) == ("set", str(tmp_path / "set"))


def test_a_bad_row_in_a_folder_is_named_with_its_file(write: Writer, tmp_path: Path) -> None:
    write(PLAIN, name="set/a.jsonl")
    bad = write(PLAIN, PLAIN | {"chosen": 3}, name="set/b.jsonl")
    with pytest.raises(RefusedError) as caught:
        read_preferences(str(tmp_path / "set"))
    assert caught.value.findings[0] == Finding(f"{bad}:2", "'chosen' is 3, expected text or a list of messages")


def test_read_rows_names_file_and_row_and_gives_unreadable_rows_as_findings(write: Writer) -> None:
    path = write(b'{"a": 1}\n\nnot json\n{"a": 2}\n')
    first, second, third = read_rows(path)
    assert (first, third) == ((path, 1, {"a": 1}), (path, 4, {"a": 2}))
    assert second[:2] == (path, 3)
    assert isinstance(second[2], Finding)
    assert second[2].where == f"{path}:3"


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(write: Writer, data: bytes) -> None:
    assert findings(write(data)) == ["pairs.jsonl: is empty: there is no row in it"]


@pytest.mark.parametrize(("name", "data"), [("a.json", b"[]"), ("a.jsonl.gz", gzip.compress(b"")), ("a.jsonl.gz", b"")])
def test_an_empty_array_or_archive_is_refused(write: Writer, name: str, data: bytes) -> None:
    assert findings(write(data, name=name)) == [f"{name}: is empty: there is no row in it"]


@pytest.mark.parametrize("kept", [5, 30, -9, -8, -1])
def test_a_gzip_file_that_is_cut_off_is_refused_however_little_is_missing(write: Writer, kept: int) -> None:
    whole = gzip.compress(lines(ROWS * 20))
    (finding,) = findings(write(whole[:kept], name="a.jsonl.gz"), skip_bad_rows=True)
    assert finding.startswith("a.jsonl.gz: is cut off or damaged (")
    assert finding.endswith("); fetch it again")


@pytest.mark.parametrize("damage", ["block", "middle", "checksum", "no gzip"])
def test_a_damaged_gzip_file_is_refused(write: Writer, damage: str) -> None:
    data = bytearray(gzip.compress(lines(ROWS * 20)))
    if damage == "no gzip":
        data = bytearray(lines(ROWS))
    else:
        data[{"block": 10, "middle": len(data) // 2, "checksum": -6}[damage]] ^= 0xFF
    (finding,) = findings(write(bytes(data), name="a.jsonl.gz"))
    assert finding.startswith("a.jsonl.gz: is cut off or damaged (")


def test_a_cut_off_parquet_file_is_refused(write: Writer) -> None:
    path = Path(write(*ROWS, name="a.parquet"))
    path.write_bytes(path.read_bytes()[:-20])
    (finding,) = findings(str(path))
    assert finding.startswith("a.parquet: cannot be read as Parquet (")


def test_a_parquet_file_in_a_folder_like_a_partition_has_its_own_columns_only(write: Writer) -> None:
    path = write(*ROWS, name="subset=hard/a.parquet")
    (row, *_) = read_rows(path)
    assert row == (path, 1, ROWS[0])


def test_messages_in_parquet_lose_the_nulls_that_columns_add(write: Writer) -> None:
    rows = [
        {"chosen": [user("a"), bot("b") | {"name": "x"}], "rejected": [user("a"), bot("c")]},
        {"chosen": [user("d"), bot("e")], "rejected": [user("d"), bot("f")]},
    ]
    assert read_preferences(write(*rows, name="a.parquet")).comparisons == read_preferences(write(*rows)).comparisons


def test_a_json_array_that_is_broken_is_refused_as_a_whole(write: Writer) -> None:
    (finding,) = findings(write(b'[{"chosen": "a"},', name="a.json"), skip_bad_rows=True)
    assert finding.startswith("a.json: is not JSON (")


def test_row_numbers_in_an_array_are_positions(write: Writer) -> None:
    found = findings(write(PLAIN, "text", name="a.json"))
    assert found[0] == "a.json:2: is a bare value, expected an object with one row's columns"


UNREADABLE = {
    b"{broken": "is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
    b'{"prompt": "\xff"}': "is not UTF-8 (byte 12)",
    b"[1]": "is an array (a file that is one array is named .json), expected an object with one row's columns",
    b"null": "is a bare value, expected an object with one row's columns",
    b'"text"': "is a bare value, expected an object with one row's columns",
}


@pytest.mark.parametrize("line", UNREADABLE)
def test_a_line_that_is_no_row_is_refused_with_its_number(write: Writer, line: bytes) -> None:
    found = findings(write(lines([PLAIN]) + b"\n" + line + b"\n" + lines([PLAIN])))
    # The words in the brackets are Python's and differ between its versions; ours are exact.
    assert found[0].split(" (E")[0] == f"pairs.jsonl:3: {UNREADABLE[line]}".split(" (E")[0]
    assert found[1:] == [f"{closing(1)}"]


@pytest.mark.parametrize("line", [b"[" * 200_000, b'{"a": ' + b"9" * 10_000 + b"}"])
def test_json_that_python_will_not_take_is_a_bad_row_not_a_crash(write: Writer, line: bytes) -> None:
    found = read_preferences(write(lines([PLAIN]) + line), skip_bad_rows=True)
    assert (len(found.comparisons), found.skipped) == (1, 1)


def closing(bad: int) -> str:
    if bad > 10:
        return f"pairs.jsonl: ... and {bad - 10} more bad rows; --skip-bad-rows leaves them out and counts them"
    return "pairs.jsonl: --skip-bad-rows leaves bad rows out and counts them"


# --- what is named ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("val=data/pairs.jsonl", ("val", "data/pairs.jsonl")),
        ("data/pairs.jsonl", ("pairs", "data/pairs.jsonl")),
        ("pairs.jsonl.gz", ("pairs", "pairs.jsonl.gz")),
        ("a.b.json", ("a.b", "a.b.json")),
        ("a.json.gz", ("a", "a.json.gz")),
        ("a.PARQUET", ("a", "a.PARQUET")),
        ("data/", ("data", "data/")),
        (".jsonl", (".jsonl", ".jsonl")),
        ("allenai/reward-bench:filtered", ("reward-bench:filtered", "allenai/reward-bench:filtered")),
        ("rb=allenai/reward-bench", ("rb", "allenai/reward-bench")),
        ("a=b=c.jsonl", ("a", "b=c.jsonl")),
        ("runs/lr=1e-5/a.jsonl", ("a", "runs/lr=1e-5/a.jsonl")),
    ],
)
def test_a_source_is_named_by_the_user_or_after_its_file(spec: str, expected: tuple[str, str]) -> None:
    assert parse_named(spec) == expected


def test_a_folder_that_is_called_dot_is_named_after_itself() -> None:
    assert parse_named(".") == (Path.cwd().name, ".")


def test_a_file_with_an_equals_sign_in_its_name_is_that_file(
    write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(PLAIN, name="lr=1.jsonl")
    monkeypatch.chdir(tmp_path)
    found = read_preferences("lr=1.jsonl")
    assert (found.name, found.source) == ("lr=1", "lr=1.jsonl")


@pytest.mark.parametrize("spec", ["=a.jsonl", "a=", "="])
def test_a_name_or_a_path_that_is_missing_is_a_usage_error(spec: str) -> None:
    with pytest.raises(UsageError, match=f"'{spec}': expected NAME=PATH, or PATH"):
        parse_named(spec)


@pytest.mark.parametrize("spec", ["nowhere", "nowhere/pairs.jsonl", "a/b/c", "/no/where", "a b/c", ""])
def test_a_source_that_is_neither_a_path_nor_an_id_is_a_usage_error(spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_rows(spec or "?")
    assert str(caught.value) == f"no file or folder '{spec or '?'}', and not a data-set id like org/name"


def test_a_folder_without_data_and_a_file_of_another_kind_are_usage_errors(write: Writer, tmp_path: Path) -> None:
    other = write(b"a,b", name="csv/pairs.csv")
    kinds = ".jsonl.gz, .json.gz, .jsonl, .json, .parquet"
    with pytest.raises(UsageError) as caught:
        read_preferences(other)
    assert str(caught.value) == f"{other} is not a data file; expected one of {kinds}"
    with pytest.raises(UsageError) as caught:
        read_preferences(str(tmp_path / "csv"))
    assert str(caught.value) == f"no data file in {tmp_path / 'csv'}; expected some of {kinds}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_a_usage_error(write: Writer) -> None:
    path = write(PLAIN)
    os.chmod(path, 0)
    with pytest.raises(UsageError, match=r"cannot read .*pairs\.jsonl: Permission denied"):
        read_preferences(path)


def test_read_all_keeps_the_order_and_passes_the_options_on(write: Writer) -> None:
    a = write(*ROWS, {"prompt": 1}, name="a.jsonl")
    b = write(*ROWS, name="b.jsonl")
    found = read_all([f"z={a}", b], skip_bad_rows=True, limit=1, seed=3)
    assert [(s.name, s.skipped) for s in found] == [("z", 1), ("b", 0)]
    assert found[1] == read_preferences(b, limit=1, seed=3)
    assert len(found[1].comparisons) < len(ROWS)


def test_two_sets_of_one_name_are_a_usage_error_that_names_both() -> None:
    with pytest.raises(UsageError) as caught:
        read_all(["x/val.jsonl", "other.jsonl", "val=y/z.jsonl"])
    assert (
        str(caught.value) == "x/val.jsonl and y/z.jsonl are both named 'val'; name one of them, as in other=y/z.jsonl"
    )


# --- the Hub, here a module of that name ------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Row]]:
    """Splits and their rows of `org/name`, as a stand-in for the datasets library gives them."""
    splits: dict[str, list[Row]] = {"test": [PLAIN, PLAIN | {"prompt": "What?"}]}

    def known(identity: str) -> list[str]:
        if identity != "org/name":
            raise FileNotFoundError(f"{identity} does not exist")
        return list(splits)

    def load_dataset(identity: str, split: str) -> Any:
        return SimpleNamespace(to_list=lambda: splits[split])

    module = SimpleNamespace(get_dataset_split_names=known, load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)  # type: ignore[arg-type]
    return splits


def test_a_data_set_of_one_split_needs_no_split_named(hub: object) -> None:
    found = read_preferences("org/name")
    assert [(c.prompt, c.row) for c in found.comparisons] == [("Why?", 1), ("What?", 2)]
    assert (found.name, found.source) == ("name", "org/name")
    assert found.fingerprint == read_preferences("b=org/name:test").fingerprint


def test_a_split_is_the_one_that_is_named(hub: dict[str, list[Row]]) -> None:
    hub["train"] = [PLAIN | {"prompt": "in train"}]
    assert [c.prompt for c in read_preferences("org/name:train").comparisons] == ["in train"]


def test_a_split_that_is_missing_or_must_be_chosen_is_a_usage_error(hub: dict[str, list[Row]]) -> None:
    with pytest.raises(UsageError) as caught:
        read_rows("org/name:val")
    assert str(caught.value) == "org/name has no split 'val'; name one of 'test', as in org/name:test"
    hub["train"] = [PLAIN]
    with pytest.raises(UsageError) as caught:
        read_rows("org/name")
    assert str(caught.value) == "org/name has several splits; name one of 'test', 'train', as in org/name:test"


def test_a_bad_row_on_the_hub_is_named_with_its_split(hub: dict[str, list[Row]]) -> None:
    hub["test"].append({"prompt": "a", "chosen": None, "rejected": "c"})
    with pytest.raises(RefusedError, match="org/name:test:3: 'chosen' is null"):
        read_preferences("org/name:test")


def test_what_the_hub_does_not_have_is_a_remote_error(hub: object) -> None:
    with pytest.raises(RemoteError) as caught:
        read_rows("org/other")
    told = "no file or folder 'org/other', and as a data set it could not be read from the Hub: "
    assert str(caught.value) == told + "FileNotFoundError: org/other does not exist"


def test_a_local_path_wins_over_the_hub(
    hub: object, write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(PLAIN | {"prompt": "here"}, name="org/name/a.jsonl")
    monkeypatch.chdir(tmp_path)
    assert [c.prompt for c in read_preferences("org/name").comparisons] == ["here"]


def test_a_missing_library_is_a_usage_error_that_says_how_to_get_it(
    write: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError) as caught:
        read_rows("org/name")
    assert str(caught.value) == "reading this needs datasets: pip install 'warmerge[data]'"
    with pytest.raises(UsageError) as caught:
        read_rows(write(b"PAR1", name="a.parquet"))
    assert str(caught.value) == "reading this needs pyarrow: pip install 'warmerge[data]'"
    assert len(read_rows(write(PLAIN))) == 1


# --- TRL, explicit prompt ---------------------------------------------------------------------------------------------


def test_plain_text_is_kept_verbatim(one: Callable[[Row], Comparison]) -> None:
    row = {"prompt": " Why?\n", "chosen": "\tyes ", "rejected": "", "extra": [1, None]}
    assert one(row) == Comparison(" Why?\n", ("\tyes ",), ("",), " Why?\n", "", 1)


def test_an_empty_prompt_does_not_make_one_cluster_of_all(write: Writer) -> None:
    rows = [{"prompt": "", "chosen": f"a{i}", "rejected": "b"} for i in range(3)]
    assert len({c.cluster for c in read_preferences(write(*rows, rows[0])).comparisons}) == 3


CHAT = [
    # prompt, chosen, rejected; expected prompt, chosen, rejected
    pytest.param("Q", [bot("a")], [bot("b")], [user("Q")], [bot("a")], [bot("b")], id="a text and answers"),
    pytest.param([user("Q")], "a", "b", [user("Q")], [bot("a")], [bot("b")], id="messages and texts"),
    pytest.param("Q", "a", [bot("b")], [user("Q")], [bot("a")], [bot("b")], id="one answer in messages"),
    pytest.param([user("Q")], [bot("a")], [bot("b")], [user("Q")], [bot("a")], [bot("b")], id="all messages"),
    pytest.param(
        "Q", [user("Q"), bot("a")], [user("Q"), bot("b")], [user("Q")], [bot("a")], [bot("b")], id="whole dialogues"
    ),
    pytest.param(
        [system("S"), user("Q")], [system("S"), user("Q"), bot("a")], [system("S"), user("Q"), bot("b")],
        [system("S"), user("Q")], [bot("a")], [bot("b")], id="whole dialogues and their messages",
    ),
    pytest.param(
        "Q", [system("S"), user("Q"), bot("a")], [system("S"), user("Q"), bot("b")],
        [system("S"), user("Q")], [bot("a")], [bot("b")], id="a system message before the prompt",
    ),
    pytest.param(
        "Q", [user("Q"), bot("x"), user("y"), bot("a")], [user("Q"), bot("x"), user("y"), bot("b")],
        [user("Q"), bot("x"), user("y")], [bot("a")], [bot("b")], id="several turns in common",
    ),
    pytest.param(
        "Q", [user("Q"), bot("a"), user("y"), bot("z")], [user("Q"), bot("b")],
        [user("Q")], [bot("a"), user("y"), bot("z")], [bot("b")], id="answers of several turns",
    ),
    pytest.param(
        "Q", [user("Q"), bot("a")], [user("Q"), bot("a")], [user("Q")], [bot("a")], [bot("a")], id="identical"
    ),
    pytest.param(
        "Q", [bot("Q"), bot("a")], [bot("Q"), bot("b")],
        [user("Q")], [bot("Q"), bot("a")], [bot("Q"), bot("b")], id="an answer that repeats the prompt",
    ),
    pytest.param(
        [user("Q")], [user("Q"), bot("a")], [bot("b")], [user("Q")], [bot("a")], [bot("b")], id="one whole dialogue"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "chosen", "rejected", "p", "c", "r"), CHAT)
def test_messages_are_prompt_and_answers_without_overlap(
    one: Callable[[Row], Comparison], prompt: Any, chosen: Any, rejected: Any, p: Any, c: Any, r: Any
) -> None:
    found = one({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert (found.prompt, found.chosen, found.rejected) == (tuple(p), (tuple(c),), (tuple(r),))
    assert json.loads(found.cluster) == p


def test_other_fields_of_a_message_are_kept_and_nulls_are_not(one: Callable[[Row], Comparison]) -> None:
    answer = bot("a") | {"name": "x", "tool_calls": None}
    found = one({"prompt": "Q", "chosen": [answer], "rejected": [bot("b")]})
    assert found.chosen == ((bot("a") | {"name": "x"},),)


@pytest.mark.parametrize(("identity", "cluster"), [(7, "7"), ("x", "x"), (1.5, "1.5")])
def test_a_prompt_id_is_the_cluster(one: Callable[[Row], Comparison], identity: Any, cluster: str) -> None:
    assert one(PLAIN | {"prompt_id": identity}).cluster == cluster


def test_equal_prompts_are_one_cluster_in_whatever_order_their_keys_are(write: Writer) -> None:
    rows = [
        {"prompt": [user("Q")], "chosen": [bot("a")], "rejected": [bot("b")]},
        {"prompt": [{"content": "Q", "role": "user"}], "chosen": [bot("c")], "rejected": [bot("d")]},
    ]
    first, second = read_preferences(write(*rows)).comparisons
    assert first.cluster == second.cluster


def test_rewardbench_is_explicit_with_subsets(write: Writer) -> None:
    row = PLAIN | {"chosen_model": "x", "rejected_model": "y", "subset": "llmbar-natural", "id": 3}
    found = read_preferences(write(row))
    assert found.layout == "RewardBench"
    assert found.comparisons == (Comparison("Why?", ("Because.",), ("No.",), "Why?", "llmbar-natural", 1),)


def test_a_subset_column_of_ones_own_is_used(write: Writer) -> None:
    found = read_preferences(write(PLAIN | {"subset": "math"}))
    assert (found.layout, found.comparisons[0].subset) == ("TRL explicit prompt", "math")


# --- TRL, implicit prompt ---------------------------------------------------------------------------------------------


def test_leading_messages_in_common_are_the_prompt(write: Writer) -> None:
    lead = [system("S"), user("Q"), bot("x"), user("y")]
    found = read_preferences(write({"chosen": [*lead, bot("a")], "rejected": [*lead, bot("b"), user("z")]}))
    (c,) = found.comparisons
    assert found.layout == "TRL implicit prompt"
    assert (c.prompt, c.chosen, c.rejected) == (tuple(lead), ((bot("a"),),), ((bot("b"), user("z")),))
    assert json.loads(c.cluster) == lead


def test_identical_conversations_keep_an_answer_each(one: Callable[[Row], Comparison]) -> None:
    found = one({"chosen": [user("Q"), bot("a")], "rejected": [user("Q"), bot("a")]})
    assert (found.prompt, found.chosen, found.rejected) == ((user("Q"),), ((bot("a"),),), ((bot("a"),),))


HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "cluster"),
    [
        (HH + " Because of it", HH + " Because I say so", HH),
        (HH + " a", HH + " a", HH),
        (HH + " a\n\nHuman: And", HH + " b", HH),
        ("one two three", "one two thrice", "one two "),
        ("one\ntwo", "one\tthree", None),
        ("one\ntwo a", "one\ntwo b", "one\ntwo "),
        ("abc", "abd", None),
        ("yes", "no", None),
        ("", "", None),
    ],
)
def test_plain_text_has_no_prompt_and_the_common_start_as_cluster(
    one: Callable[[Row], Comparison], chosen: str, rejected: str, cluster: str | None
) -> None:
    found = one({"chosen": chosen, "rejected": rejected})
    assert (found.prompt, found.chosen, found.rejected, found.subset) == ("", (chosen,), (rejected,), "")
    # Without a common start each pair is its own cluster: "" would make one of them all.
    assert found.cluster == (json.dumps([chosen, rejected]) if cluster is None else cluster)


def test_a_question_beside_plain_answers_is_not_dropped(write: Writer) -> None:
    found = findings(write({"question": "Why?", "chosen": "a", "rejected": "b"}))
    told = "has 'question' beside plain-text 'chosen' and 'rejected': if it is the prompt, rename it to 'prompt'"
    assert found[0] == f"pairs.jsonl:1: {told}, else remove it"


def test_an_implicit_set_with_a_prompt_further_down_is_refused(write: Writer) -> None:
    found = findings(write({"chosen": "a b", "rejected": "a c"}, PLAIN))
    assert found == ["pairs.jsonl:2: has a 'prompt', the rows before it have none", closing(1)]


# --- benchmarks -------------------------------------------------------------------------------------------------------

RB2 = {
    "id": "a-1", "prompt": "Name a colour", "chosen": ["red", "blue"], "rejected": ["dog", "cat", "cow"],
    "num_correct": 2, "num_incorrect": 3, "total_completions": 5, "models": ["m"], "subset": "Ties",
    "additional_metadata": {"category": None},
}  # fmt: skip
RM_BENCH = {
    "id": "chat/1", "prompt": "Q", "chosen": ["c0", "c1", "c2"], "rejected": ["r0", "r1", "r2"],
    "domain": "chat",
}  # fmt: skip
POST = {
    "info": {"id": "t3_a", "post": "I did it.", "title": "Me", "subreddit": "advice", "site": None, "article": None},
    "summaries": [{"text": " first\n", "policy": "x", "note": None}, {"text": "second", "policy": "ref"}],
    "choice": 1, "worker": "w", "batch": "b", "split": "train", "extra": {"confidence": 8},
}  # fmt: skip
ARTICLE = POST | {"info": {"id": "c1", "site": "cnn", "title": "T", "article": "It rained.", "post": None}, "choice": 0}


def test_rewardbench_2_is_one_comparison_of_all_with_all(write: Writer) -> None:
    found = read_preferences(write(RB2))
    assert found.layout == "RewardBench 2"
    (c,) = found.comparisons
    assert (c.prompt, c.chosen, c.rejected) == ("Name a colour", ("red", "blue"), ("dog", "cat", "cow"))
    assert (c.cluster, c.subset) == ("Name a colour", "Ties")


def test_rm_bench_is_nine_comparisons_by_style(write: Writer) -> None:
    found = read_preferences(write(RM_BENCH, RM_BENCH | {"domain": "math", "prompt": "R"}))
    assert found.layout == "RM-Bench"
    first, second = found.comparisons[:9], found.comparisons[9:]
    assert [(c.chosen[0], c.rejected[0], c.subset) for c in first] == [
        ("c0", "r0", "chat/normal"), ("c0", "r1", "chat/hard"), ("c0", "r2", "chat/hard"),
        ("c1", "r0", "chat/easy"), ("c1", "r1", "chat/normal"), ("c1", "r2", "chat/hard"),
        ("c2", "r0", "chat/easy"), ("c2", "r1", "chat/easy"), ("c2", "r2", "chat/normal"),
    ]  # fmt: skip
    assert {(c.cluster, c.row) for c in first} == {("Q", 1)}
    assert {(c.cluster, c.row, c.subset.split("/")[0]) for c in second} == {("R", 2, "math")}


@pytest.mark.parametrize("choice", [0, 1])
def test_summaries_of_a_post_are_answers_to_trl_s_prompt(write: Writer, choice: int) -> None:
    found = read_preferences(write(POST | {"choice": choice}))
    assert found.layout == "summarize_from_feedback"
    (c,) = found.comparisons
    assert c.prompt == "SUBREDDIT: r/advice\n\nTITLE: Me\n\nPOST: I did it.\n\nTL;DR:"
    answers = [(" first",), (" second",)]
    assert (c.chosen, c.rejected) == (answers[choice], answers[1 - choice])
    assert (c.cluster, c.subset) == ("t3_a", "")


def test_summaries_of_an_article_follow_the_article(one: Callable[[Row], Comparison]) -> None:
    found = one(ARTICLE)
    assert (found.prompt, found.chosen, found.cluster) == ("It rained.\n\nTL;DR:", (" first",), "c1")


def test_braces_in_a_post_are_text(one: Callable[[Row], Comparison]) -> None:
    assert "{title}" in str(one(POST | {"info": POST["info"] | {"post": "a {title} {0}"}}).prompt)


def test_the_layout_is_that_of_the_first_good_row(write: Writer) -> None:
    broken = [{"unrelated": 1}, RM_BENCH | {"chosen": ["a"]}, PLAIN | {"chosen": None}]
    found = read_preferences(write(*broken, RM_BENCH), skip_bad_rows=True)
    assert (found.layout, found.skipped, len(found.comparisons)) == ("RM-Bench", 3, 9)


def test_a_first_row_without_its_prompt_does_not_make_the_set_an_implicit_one(write: Writer) -> None:
    found = read_preferences(write(PLAIN | {"prompt": None}, PLAIN), skip_bad_rows=True)
    assert (found.layout, found.skipped) == ("TRL explicit prompt", 1)


def test_where_no_row_is_good_it_is_measured_by_the_layout_that_says_most(write: Writer) -> None:
    found = findings(write(RM_BENCH | {"chosen": ["a"]}, RM_BENCH | {"rejected": ["a"]}))
    assert found[:2] == [
        "pairs.jsonl:1: 'chosen' is a list of 1, expected 3 texts",
        "pairs.jsonl:2: 'rejected' is a list of 1, expected 3 texts",
    ]


def test_pairs_that_happen_to_have_a_domain_and_an_id_are_no_rm_bench(write: Writer) -> None:
    found = read_preferences(write(PLAIN | {"domain": "chat", "id": 1}))
    assert (found.layout, len(found.comparisons)) == ("TRL explicit prompt", 1)


def test_unknown_columns_are_refused_with_all_that_is_known(write: Writer) -> None:
    (finding,) = findings(write({"candidates": ["a"], "go\x1bld": [1]}))
    assert finding.startswith("pairs.jsonl: has the columns 'candidates', 'go\\x1bld', which is no known layout. Known")
    assert "TRL implicit prompt: 'chosen', 'rejected';" in finding
    assert all(layout.name in finding for layout in LAYOUTS)


# --- bad rows ---------------------------------------------------------------------------------------------------------

MESSAGES = {"prompt": [user("Q")], "chosen": [bot("a")], "rejected": [bot("b")]}
IMPLICIT = {"chosen": [user("Q"), bot("a")], "rejected": [user("Q"), bot("b")]}
NOT_MESSAGES = "expected a message with role and content"
BAD = [
    (PLAIN, {"chosen": "a", "rejected": "b"}, "has no 'prompt', only 'chosen', 'rejected'"),
    (PLAIN, PLAIN | {"prompt": None}, "'prompt' is null"),
    (PLAIN, PLAIN | {"chosen": 5}, "'chosen' is 5, expected text or a list of messages"),
    (PLAIN, PLAIN | {"rejected": {"a": 1}}, "'rejected' is an object, expected text or a list of messages"),
    (PLAIN, PLAIN | {"rejected": True}, "'rejected' is True, expected text or a list of messages"),
    (PLAIN, PLAIN | {"chosen": []}, "'chosen' is an empty list, expected one message or more"),
    (PLAIN, PLAIN | {"chosen": ["a"]}, f"'chosen[0]' is text, {NOT_MESSAGES}"),
    (PLAIN, PLAIN | {"chosen": [bot("a"), None]}, f"'chosen[1]' is null, {NOT_MESSAGES}"),
    (PLAIN, PLAIN | {"chosen": [{"role": "user"}]}, "has no 'chosen[0].content', only 'role'"),
    (PLAIN, PLAIN | {"chosen": [{"content": "a"}]}, "has no 'chosen[0].role', only 'content'"),
    (PLAIN, PLAIN | {"chosen": [bot("a") | {"content": None}]}, "'chosen[0].content' is null"),
    (PLAIN, PLAIN | {"chosen": [bot("a") | {"content": []}]}, "'chosen[0].content' is a list, expected text"),
    (PLAIN, PLAIN | {"chosen": [bot("a") | {"role": 1}]}, "'chosen[0].role' is 1, expected text"),
    (PLAIN, PLAIN | {"chosen": "a\ud83d"}, "'chosen' holds half a character, '\\ud83d', which no tokenizer takes"),
    (
        PLAIN,
        PLAIN | {"prompt": [user("\udc00")]},
        "'prompt[0].content' holds half a character, '\\udc00', which no tokenizer takes",
    ),
    (
        PLAIN,
        PLAIN | {"chosen": [bot("a") | {"name": "\ud83d"}]},
        "'chosen[0]' holds half a character, '\\ud83d', which no tokenizer takes",
    ),
    (PLAIN | {"subset": "s"}, PLAIN, "has no 'subset', only 'chosen', 'prompt', 'rejected'"),
    (PLAIN | {"subset": "s"}, PLAIN | {"subset": 3}, "'subset' is 3, expected text"),
    (PLAIN | {"prompt_id": 1}, PLAIN | {"prompt_id": None}, "'prompt_id' is null"),
    (PLAIN | {"prompt_id": 1}, PLAIN | {"prompt_id": [1]}, "'prompt_id' is a list, expected text or a number"),
    (
        PLAIN | {"prompt_id": "a"},
        PLAIN | {"prompt_id": "\ud83d"},
        "'prompt_id' holds half a character, '\\ud83d', which no tokenizer takes",
    ),
    (MESSAGES, MESSAGES | {"chosen": [user("Q")]}, "'chosen' is the prompt alone, without an answer"),
    (
        MESSAGES,
        MESSAGES | {"rejected": [user("Q?"), bot("b")]},
        "'rejected' starts with a user message, but not with the prompt",
    ),
    (
        MESSAGES,
        IMPLICIT | {"prompt": "Q "},
        "'chosen' starts with a user message, but not with the prompt",
    ),
    (
        MESSAGES,
        MESSAGES | {"chosen": [system("S"), user("Q"), bot("a")]},
        "'chosen' starts with a system message, but not with the prompt",
    ),
    (IMPLICIT, IMPLICIT | {"rejected": "b"}, "has text on one side and messages on the other, and no 'prompt'"),
    (
        IMPLICIT,
        IMPLICIT | {"rejected": [user("R"), bot("b")]},
        "has no 'prompt', and 'chosen' and 'rejected' share no leading message before an answer",
    ),
    (
        IMPLICIT,
        IMPLICIT | {"rejected": [user("Q")]},
        "has no 'prompt', and 'chosen' and 'rejected' share no leading message before an answer",
    ),
    (IMPLICIT, {"chosen": "a"}, "has no 'rejected', only 'chosen'"),
    (RB2, RB2 | {"rejected": []}, "'rejected' is a list of 0, expected one or more texts"),
    (RB2, RB2 | {"chosen": "red"}, "'chosen' is text, expected a list of texts"),
    (RB2, RB2 | {"chosen": ["red", None]}, "'chosen[1]' is null, expected text"),
    (RB2, RB2 | {"subset": None}, "'subset' is null"),
    (RB2, RB2 | {"prompt": [user("Q")]}, "'prompt' is a list, expected text"),
    (RM_BENCH, RM_BENCH | {"chosen": ["a", "b"]}, "'chosen' is a list of 2, expected 3 texts"),
    (RM_BENCH, RM_BENCH | {"rejected": ["a"] * 4}, "'rejected' is a list of 4, expected 3 texts"),
    (RM_BENCH, RM_BENCH | {"domain": 1}, "'domain' is 1, expected text"),
    (POST, POST | {"choice": 2}, "'choice' is 2, expected 0 or 1"),
    (POST, POST | {"choice": -1}, "'choice' is -1, expected 0 or 1"),
    (POST, POST | {"choice": True}, "'choice' is True, expected 0 or 1"),
    (POST, POST | {"choice": 1.0}, "'choice' is 1.0, expected 0 or 1"),
    (POST, POST | {"choice": "1"}, "'choice' is text, expected 0 or 1"),
    (POST, POST | {"choice": None}, "'choice' is null"),
    (POST, POST | {"info": "x"}, "'info' is text, expected an object"),
    (POST, POST | {"summaries": POST["summaries"][:1]}, "'summaries' is not a list of two objects"),
    (POST, POST | {"summaries": ["a", "b"]}, "'summaries' is not a list of two objects"),
    (POST, POST | {"summaries": [{"text": "a"}, {"text": None}]}, "'summaries[1].text' is null"),
    (POST, POST | {"info": POST["info"] | {"title": None}}, "'info.title' is null"),
    (POST, POST | {"info": POST["info"] | {"id": None}}, "'info.id' is null"),
    (POST, POST | {"info": POST["info"] | {"post": None}}, "'info.post' is null"),
    (POST, POST | {"info": POST["info"] | {"post": 4}}, "'info.post' is 4, expected text"),
]


@pytest.mark.parametrize(("good", "bad", "what"), BAD)
def test_a_bad_row_is_refused_with_what_is_wrong(write: Writer, good: Row, bad: Row, what: str) -> None:
    path = write(good, bad)
    assert findings(path) == [f"pairs.jsonl:2: {what}", closing(1)]
    found = read_preferences(path, skip_bad_rows=True)
    assert (found.skipped, {c.row for c in found.comparisons}) == (1, {1})


@pytest.mark.parametrize("bad", [1, 9, 10, 11, 25])
def test_all_bad_rows_are_found_and_ten_are_shown(write: Writer, bad: int) -> None:
    rows: list[Any] = []
    for _ in range(bad):
        rows += [PLAIN, PLAIN | {"chosen": None}]
    found = findings(write(*rows))
    assert found == [f"pairs.jsonl:{2 * i + 2}: 'chosen' is null" for i in range(min(bad, 10))] + [closing(bad)]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("bad", [2, 12])
def test_where_no_row_is_good_skipping_does_not_help(write: Writer, bad: int, skip: bool) -> None:
    found = findings(write(*[PLAIN | {"chosen": None}] * bad), skip_bad_rows=skip)
    assert found[0] == "pairs.jsonl:1: 'chosen' is null"
    assert found[-1] == "pairs.jsonl: " + ("... and 2 more bad rows; " if bad > 10 else "") + "no good row is left"
    assert len(found) == min(bad, 10) + 1


def test_a_file_of_junk_is_refused_by_its_lines(write: Writer) -> None:
    found = findings(write(b"junk\nmore junk\n"), skip_bad_rows=True)
    assert [line.split(" (")[0] for line in found] == [
        "pairs.jsonl:1: is not JSON", "pairs.jsonl:2: is not JSON", "pairs.jsonl: no good row is left",
    ]  # fmt: skip


FINE = {
    "empty answers": PLAIN | {"chosen": "", "rejected": ""},
    "identical answers": PLAIN | {"chosen": "same", "rejected": "same"},
    "a long prompt": PLAIN | {"prompt": "word " * 300_000},
    "right to left": PLAIN | {"prompt": "\u202eשלום", "chosen": "مرحبا"},  # noqa: RUF001
    "emoji": PLAIN | {"chosen": "👩‍👩‍👧‍👦🏳️‍🌈"},
    "a zero byte": PLAIN | {"chosen": "a\x00b"},
    "more columns": PLAIN | {"score": 3, "tags": ["a"], "meta": {"b": None}, "odd": "\ud800"},
    "an empty message": PLAIN | {"chosen": [bot("")]},
}


@pytest.mark.parametrize("row", FINE.values(), ids=FINE)
def test_odd_but_fine_rows_are_kept(write: Writer, row: Row) -> None:
    (c,) = read_preferences(write(row)).comparisons
    if isinstance(row["chosen"], str):
        assert (c.prompt, c.chosen, c.rejected) == (row["prompt"], (row["chosen"],), (row["rejected"],))
    else:
        assert c.chosen == (tuple(row["chosen"]),)


TEXTS = st.one_of(
    st.text(st.characters(codec="utf-8")),
    st.sampled_from(["", "\ufeff", "שלום 👩‍👧", "\u2028\u2029\x85\r\n", "\x00", "\\ud800", '"]}', "x" * 100_000]),
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=4), escaped=st.booleans())
def test_any_text_survives_a_file_of_lines(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]], escaped: bool
) -> None:
    path = tmp_path_factory.mktemp("pairs") / "a.jsonl.gz"
    texts = [json.dumps(dict(zip(PLAIN, row, strict=True)), ensure_ascii=escaped) for row in rows]
    path.write_bytes(gzip.compress("\n".join(texts).encode(), 1))
    found = read_preferences(str(path))
    assert [(c.prompt, c.chosen[0], c.rejected[0]) for c in found.comparisons] == rows
    unique = unique_texts(found)
    for c, good, bad in zip(found.comparisons, unique.chosen, unique.rejected, strict=True):
        assert unique.texts[good[0]] == (c.prompt, c.chosen[0])
        assert unique.texts[bad[0]] == (c.prompt, c.rejected[0])


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clustered(write: Writer) -> str:
    """60 comparisons of 20 prompts, 1 to 5 of each, the prompts interleaved."""
    rows = [{"prompt": f"p{i % 20}", "chosen": f"{i}", "rejected": "b"} for i in range(40)]
    rows += [{"prompt": f"p{i % 7}", "chosen": f"{40 + i}", "rejected": "b"} for i in range(20)]
    return write(*rows)


def rows_of(found: PreferenceSet) -> list[int]:
    return [c.row for c in found.comparisons]


@pytest.mark.parametrize("limit", [1, 10, 31, 59])
def test_a_limit_keeps_whole_clusters_in_file_order(clustered: str, limit: int) -> None:
    whole, part = read_preferences(clustered), read_preferences(clustered, limit=limit)
    kept = {c.cluster for c in part.comparisons}
    assert list(part.comparisons) == [c for c in whole.comparisons if c.cluster in kept]
    sizes = [sum(c.cluster == cluster for c in part.comparisons) for cluster in kept]
    assert limit <= len(part.comparisons) < limit + max(sizes)
    assert part.fingerprint != whole.fingerprint or part.comparisons == whole.comparisons


@pytest.mark.parametrize("limit", [60, 1000])
def test_a_limit_beyond_the_set_keeps_all_of_it(clustered: str, limit: int) -> None:
    assert read_preferences(clustered, limit=limit) == read_preferences(clustered)


def test_a_sample_depends_on_its_seed_alone(clustered: str) -> None:
    samples = [tuple(rows_of(read_preferences(clustered, limit=10, seed=seed))) for seed in range(8)]
    assert samples == [tuple(rows_of(read_preferences(clustered, limit=10, seed=seed))) for seed in range(8)]
    assert len(set(samples)) > 4
    assert len({row for sample in samples for row in sample}) > 30, "not only one part of the file"


def test_a_sample_is_taken_of_good_rows(write: Writer) -> None:
    path = write(*ROWS, PLAIN | {"chosen": None})
    found = read_preferences(path, limit=2, skip_bad_rows=True)
    assert (found.skipped, len(found.comparisons)) == (1, 2)
    assert findings(path, limit=2)[0] == "pairs.jsonl:6: 'chosen' is null"


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_that_is_none_is_a_usage_error(clustered: str, limit: int) -> None:
    with pytest.raises(UsageError, match=f"--limit: expected 1 or more, found {limit}"):
        read_preferences(clustered, limit=limit)


# --- unique texts -----------------------------------------------------------------------------------------------------


def test_every_text_is_there_once_in_the_order_seen(write: Writer) -> None:
    rows = [("p", "a", "b"), ("q", "a", "b"), ("p", "c", "a"), ("p", "b", "b")]
    found = unique_texts(read_preferences(write(*[dict(zip(PLAIN, row, strict=True)) for row in rows])))
    assert found.texts == (("p", "a"), ("p", "b"), ("q", "a"), ("q", "b"), ("p", "c"))
    assert found.chosen == ((0,), (2,), (4,), (1,))
    assert found.rejected == ((1,), (3,), (0,), (1,))
    assert found.clusters == ("p", "q", "p", "p")


def test_equal_prompts_are_one_object(write: Writer) -> None:
    long = "a prompt " * 10
    rows = [
        {"prompt": [user(prompt)], "chosen": [bot("a")], "rejected": [bot(f"b{i}")]}
        for i, prompt in enumerate([long, "other", long])
    ]
    texts = unique_texts(read_preferences(write(*rows))).texts
    assert len({id(prompt) for prompt, _ in texts}) == 2
    plain = [{"prompt": long, "chosen": f"a{i}", "rejected": "b"} for i in range(3)]
    texts = unique_texts(read_preferences(write(*plain))).texts
    assert len({id(prompt) for prompt, _ in texts}) == 1
    assert len(texts) == 4


def test_a_benchmark_s_answers_are_scored_once_each(write: Writer) -> None:
    found = unique_texts(read_preferences(write(RM_BENCH)))
    assert len(found.texts) == 6
    assert (len(found.chosen), len(set(found.chosen)), len(set(found.rejected))) == (9, 3, 3)
    found = unique_texts(read_preferences(write(RB2)))
    assert (found.chosen, found.rejected) == (((0, 1),), ((2, 3, 4),))


def test_a_text_is_not_the_message_that_says_the_same(write: Writer) -> None:
    message = [user("p")]
    rows = [
        {
            "prompt": json.dumps(message, sort_keys=True),
            "chosen": json.dumps([bot("a")], sort_keys=True),
            "rejected": "b",
        },
        {"prompt": message, "chosen": [bot("a")], "rejected": [bot("b")]},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ]
    assert len(unique_texts(read_preferences(write(*rows))).texts) == 6


def test_results_cannot_be_changed(write: Writer) -> None:
    found = read_preferences(write(PLAIN))
    with pytest.raises(FrozenInstanceError):
        found.name = "other"  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        found.comparisons[0].row = 2  # type: ignore[misc]


def test_a_table_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = [arrow.array([text]) for text in ("good", "bad", "another")]
    parquet.write_table(arrow.table(columns, names=["chosen", "rejected", "chosen"]), tmp_path / "p.parquet")
    with pytest.raises(RefusedError, match="chosen"):
        read_preferences(str(tmp_path / "p.parquet"))


def test_a_row_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"chosen": "good", "rejected": "bad", "chosen": "another"}\n')
    with pytest.raises(RefusedError, match=r"p\.jsonl:1"):
        read_preferences(str(tmp_path / "p.jsonl"))
