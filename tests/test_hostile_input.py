"""Data, results and records by strangers: read rightly or refused in words; no bomb goes off, no pipe is waited for."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warmerge.errors import Finding, RefusedError, UsageError, WarmergeError, plain, quoted
from warmerge.pipeline.found.rl_runs import read_runs
from warmerge.pipeline.publication.licence import stated
from warmerge.pipeline.report import write_report
from warmerge.report.results import redraw
from warmerge.rewards import rows
from warmerge.rewards.pairs import read_preferences
from warmerge.rewards.pools import read_pool
from warmerge.rewards.rows import read_rows
from warmerge.training.seen import seen_in_training
from warmerge.weights.output import made_of

PAIR = b'{"prompt":"p","chosen":"a","rejected":"b"}'
seeds = st.integers(0, 2**32)


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


def peak(work: Any) -> int:
    """Bytes that Python held at most while `work` ran, refused or not."""
    tracemalloc.start()
    try:
        with contextlib.suppress(WarmergeError):
            work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- data -------------------------------------------------------------------------------------------------------------


@examples(120)
@given(seeds)
def test_rows_are_read_or_refused(seed: int) -> None:
    fuzz.rows(fuzz.from_seed("rows", seed))


def test_rows_that_nothing_is_wrong_with_are_accepted() -> None:
    accepted = [fuzz.rows(fuzz.from_seed("rows", seed)) for seed in range(40)]
    assert 10 < sum(accepted) < 40
    assert all(fuzz.rows(b"\x00" + json.dumps(row).encode()) for row in fuzz.seeds()["rows"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"chosen":"a","rejected":"b","margin":1' + b"0" * 400 + b"}", "is not JSON (a number in it has 401 digits)"),
        (b'{"chosen":"a","rejected":"b","margin":1e999}', "'margin' is inf, expected a number"),
        (b'{"chosen":' + b"[" * 900 + b"]" * 900 + b',"rejected":"b"}', "nested more than 100 levels deep"),
        (b'{"chosen":[{"role":"user","content":"x","y":' + b"[" * 99 + b"]" * 99 + b"}]}", "nested more than 100"),
        (b'{"chosen":"\\ud800","rejected":"b"}', "'chosen' holds half a character"),
        (b'{"chosen":"a\xff","rejected":"b"}', "is not UTF-8 (byte 12)"),
    ],
    ids=["huge margin", "infinite margin", "deep", "deep message", "surrogate", "bytes"],
)  # fmt: skip
def test_a_row_that_would_break_what_comes_after_is_named(row: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"chosen":"a","rejected":"b","margin":1}\n' + row + b"\n")
    with pytest.raises(RefusedError) as refusal:
        read_preferences(str(tmp_path / "p.jsonl"))
    assert message in str(refusal.value)
    assert "p.jsonl:2" in str(refusal.value)


def test_a_bomb_does_not_unpack(tmp_path: Path) -> None:
    """A hundred kilobytes hold a hundred megabytes of one letter."""
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(b"\n" * 110_000_000, 1))
    with pytest.raises(RefusedError, match="bytes, which unpack to more, expected 100,000,000 bytes at most"):
        read_rows(str(tmp_path / "p.jsonl.gz"))


def test_a_table_of_long_texts_does_not_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """25 kB were a GB; columns that nobody asked for count too."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {name: arrow.array(["x" * 100_000] * 64) for name in ("chosen", "rejected", "more", "yet more")}
    parquet.write_table(
        arrow.table(columns), tmp_path / "p.parquet", compression="zstd", use_dictionary=False, write_statistics=False
    )
    del columns
    monkeypatch.setattr(rows, "_UNPACKED", 1_000_000)
    before = arrow.default_memory_pool()
    watched = arrow.proxy_memory_pool(before)
    arrow.set_memory_pool(watched)
    try:
        with pytest.raises(RefusedError, match="unpack to more"):
            read_rows(str(tmp_path / "p.parquet"))
    finally:
        arrow.set_memory_pool(before)
    assert watched.max_memory() < 10_000_000


@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_more_values_than_rows_may_have_are_not_made(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 GB of them, or 100 MB packed, are 200 GB of empty objects."""
    values = "[" + "{}," * 200_000 + "{}]"
    (tmp_path / name).write_text(values if name == "p.json" else f'{{"x":{values}}}\n')
    monkeypatch.setattr(rows, "_MOST_ROWS", 1000)
    assert peak(lambda: read_rows(str(tmp_path / name))) < 10 * len(values)


def test_what_texts_are_packed_to_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_UNPACKED", 1000)
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress((PAIR + b"\n") * 100))
    assert len(read_rows(str(tmp_path / "p.jsonl.gz"))) == 100
    monkeypatch.setattr(rows, "_PACKING", 2)
    with pytest.raises(RefusedError, match="unpack to more, expected 1,000 bytes at most"):
        read_rows(str(tmp_path / "p.jsonl.gz"))


def test_a_table_that_repeats_one_text_does_not_unpack(tmp_path: Path) -> None:
    """Parquet keeps a text once that stands in every row; in memory it stands there for each."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    text = arrow.DictionaryArray.from_arrays(arrow.array([0] * 1000, arrow.int32()), arrow.array(["x" * 200_000]))
    parquet.write_table(arrow.table({"chosen": text, "rejected": text}), tmp_path / "p.parquet")
    with pytest.raises(RefusedError, match="has values that unpack to more, expected"):
        read_rows(str(tmp_path / "p.parquet"))


def test_a_table_is_read_as_a_whole(tmp_path: Path) -> None:
    """Batch by batch it is the same rows, in their order."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": "b"} for i in range(200)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "p.parquet", row_group_size=77)
    assert [row for _, _, row in read_rows(str(tmp_path / "p.parquet"))] == rows


@pytest.mark.parametrize(
    ("name", "data", "limit", "message"),
    [
        (
            "p.jsonl",
            b"1\n" * 12,
            "_MOST_UNREADABLE",
            "p.jsonl:11: is the last of 11 rows that cannot be read (is a bare",
        ),
        ("p.json", b"[" + b"1," * 11 + b"1]", "_MOST_UNREADABLE", "rows that cannot be read"),
        ("p.jsonl", (PAIR + b"\n") * 11, "_MOST_ROWS", "has 11 lines, expected 10 at most"),
        ("p.json", b"[" + b"{}," * 10 + b"{}]", "_MOST_ROWS", "has 11 rows, expected 10 at most"),
        ("p.jsonl", PAIR, "_MOST_BYTES", "has 42 bytes, expected 10 at most"),
    ],
)
def test_more_rows_than_fit_into_memory_are_refused(
    name: str, data: bytes, limit: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, limit, 10)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RefusedError) as refusal:
        read_preferences(str(tmp_path / name), skip_bad_rows=True)
    assert message in str(refusal.value)


def test_a_file_of_terabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "p.jsonl").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(RefusedError, match="has 1,000,000,000,000 bytes, expected 10,000,000,000 at most"):
        read_pool(tmp_path / "p.jsonl")


@pytest.mark.parametrize("name", ["p.jsonl", "p.json.gz", "p.parquet"])
def test_a_pipe_is_no_data_file(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UsageError, match="is not a data file"):
        read_rows(str(tmp_path / name))


# --- results ----------------------------------------------------------------------------------------------------------


@examples(12)
@given(seeds)
def test_results_are_shown_or_refused(seed: int) -> None:
    fuzz.results(fuzz.from_seed("results", seed))


@pytest.mark.slow
@examples(1000)
@given(seeds)
def test_many_results_are_shown_or_refused(seed: int) -> None:
    fuzz.results(fuzz.from_seed("results", seed))


@pytest.mark.parametrize("name", [name for name in fuzz.RESULTS if "." not in name and name != "training"])
def test_a_table_that_is_none_is_not_drawn(name: str, tmp_path: Path) -> None:
    content = fuzz.seeds()[name] | {
        "rows": [{"set": [[1]], "model": {}, "accuracy": "x"}],
        "coefficients": "abc",
        "wins": 5,
    }
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(UsageError) as error:
        redraw(tmp_path)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("table", "value"), [("coefficients", "abc"), ("coefficients", 7), ("features", [[1]]), ("rows", [{"m": 10**400}])]
)
def test_a_theory_of_a_stranger_is_not_drawn(table: str, value: Any, tmp_path: Path) -> None:
    content = fuzz.seeds()["theory"] | {table: value}
    (tmp_path / "theory.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"theory.json is not as warmerge writes it|figure: expected"):
        redraw(tmp_path)


@pytest.mark.parametrize("name", ["eval.json", "training.json", "rl.json"])
def test_a_result_of_terabytes_is_not_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "rows.jsonl").touch()
    with (tmp_path / "in" / name).open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(RefusedError, match="has 1,000,000,000,000 bytes, expected 100,000,000 at most"):
        write_report([tmp_path / "in"], tmp_path / "report.html")
    if name != "rl.json":
        with pytest.raises(UsageError, match="has 1,000,000,000,000 bytes, expected 100,000,000 at most"):
            redraw(tmp_path / "in")


@pytest.mark.parametrize("name", ["eval.json", "training.json", "rl.json"])
def test_a_pipe_among_results_is_not_waited_for(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in" / name)
    with pytest.raises(RefusedError, match=r"it is no regular file|has no rl\.json"):
        write_report([tmp_path / "in"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["rl.json", "rows.jsonl"])
def test_a_run_of_pipes_and_devices_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "rl.json").write_text(json.dumps(fuzz.seeds()["rl.json"]))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fuzz.seeds()["rows.jsonl"]))
    assert len(read_runs([tmp_path]).folders) == 1
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(RefusedError, match="it is no regular file"):
        read_runs([tmp_path])
    with pytest.raises(RefusedError, match="it is no regular file"):
        write_report([tmp_path], tmp_path / "report.html")


@pytest.mark.parametrize("value", ["1" + "0" * 400, "1e999", "[" * 900 + "]" * 900, "NaN"])
def test_a_number_of_a_run_that_no_float_holds_is_refused(value: str, tmp_path: Path) -> None:
    text = json.dumps(fuzz.seeds()["rl.json"]).replace('"kl_coef": 0.05', f'"kl_coef": {value}')
    assert value in text
    (tmp_path / "rl.json").write_text(text)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fuzz.seeds()["rows.jsonl"]))
    with pytest.raises(RefusedError, match=r"is not JSON|expected a number for 'settings.kl_coef'"):
        read_runs([tmp_path])


# --- records and cards ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["[" * 900 + "]" * 900, '{"inputs": 5}', '{"inputs": [5, null]}', '{"input": "x"}', "{", "", "null", "\ufeff{}"],
)
def test_a_record_of_a_stranger_says_nothing_or_what_it_says(text: str, tmp_path: Path) -> None:
    (tmp_path / "warmerge.json").write_text(text, encoding="utf-8")
    assert made_of(tmp_path) == []


@pytest.mark.parametrize("name", ["n" * 5000, "a\x00b", "..", ".", "/", "~"])
def test_a_record_that_names_strange_places_is_followed_nowhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "warmerge.json").write_text(json.dumps({"inputs": [{"checkpoint": name}]}))
    assert seen_in_training([tmp_path / "m"], ["Why?"]) == []


@pytest.mark.parametrize(
    "asked",
    [{"data": "n" * 5000 + ".jsonl"}, {"data": "a\x00b"}, {"data": "/dev/zero"}, {"data": "p.jsonl", "limit": "x"},
     {"data": "p.jsonl", "seed": []}, {"data": ["p.jsonl"]}],
    ids=["long", "nul", "device", "limit", "seed", "list"],
)  # fmt: skip
def test_a_training_record_of_a_stranger_is_doubted(asked: dict[str, Any], tmp_path: Path) -> None:
    member = tmp_path / "run" / "members" / "01"
    member.mkdir(parents=True)
    (tmp_path / "p.jsonl").write_bytes(PAIR)
    measuring = {"limit": asked.get("limit"), "seed": asked.get("seed", 0)}
    record = {"asked": {"data": asked["data"], "data_fingerprint": "0"}, "measuring": measuring}
    (tmp_path / "run" / "train.json").write_text(json.dumps(record))
    (finding,) = seen_in_training([member], ["Why?"])
    assert "unknown" in finding.what


@pytest.mark.parametrize(
    "front",
    ["license: mit\ndate: 2023-13-45", "license: mit\nx: " + "[" * 600,
     "license: !!python/object/apply:os.system ['x']",
     "license: [mit]", "license: {a: b}", "a: &a [x]\nb: &b [*a, *a]\nlicense: *b", "- license"],
    ids=["date", "deep", "object", "list", "table", "aliases", "no table"],
)  # fmt: skip
def test_the_front_matter_of_a_stranger_states_no_licence(front: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    assert stated(tmp_path / "README.md") == {}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert stated(tmp_path / "README.md") == {"license": "mit"}


def test_what_a_library_says_of_a_file_is_one_line() -> None:
    """pyarrow shows the byte that it did not understand as it is."""
    found = Finding("p.parquet", "cannot be read (don't know what type:\n \x0f\x1b[2J\u202e)")
    assert str(found) == r"p.parquet: cannot be read (don't know what type: \x0f\x1b[2J\u202e)"
    assert str(Finding("m", "is a\nb", tensor="x\n")) == r"m: tensor 'x\n' is a b"


def test_a_name_in_a_message_is_one_line_of_bounded_length() -> None:
    for name in ("a\x1b[2J", "\u202egnp.exe", "a\nb", "\x9b31m", "\u2028", "n" * 10**6):
        assert quoted(name).isprintable()
        assert plain(name).isprintable()
        assert len(quoted(name)) < 5000
        assert len(plain(name)) < 5000
    assert isinstance(WarmergeError(), Exception)
