"""The file format: headers equal to the official writer's to the byte, and every damaged file refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from warmerge.errors import RefusedError
from warmerge.weights.safetensors_format import BITS, HEADER_LIMIT, TensorHeader, build_header, parse_header

TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
SHAPES = [(), (0,), (0, 4), (3, 0, 2), (1,), (3,), (2, 3), (1, 1, 5)]
ODD_NAMES = [
    "",
    "a",
    "A",
    "a.b",
    "é",
    "名前",
    "\U0001f600",
    "￿",
    'quote"s',
    "back\\slash",
    "new\nline",
    "tab\t",
    "nul\x00",
    "\x1b[31mred",
    "\x7f",
    "line\u2028separator",
    "../up",
    "__metadata",
]
quick = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def values(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2 if dtype == "BOOL" else 100, shape, generator=generator).to(TORCH[dtype])


def ours(tensors: dict[str, torch.Tensor], dtypes: dict[str, str]) -> bytes:
    """The file as warmerge writes it: the header, then each tensor's bytes at its offset."""
    header, offsets = build_header({name: (dtypes[name], tuple(t.shape)) for name, t in tensors.items()})
    file = bytearray(len(header) + sum(t.numel() * t.element_size() for t in tensors.values()))
    file[: len(header)] = header
    for name, tensor in tensors.items():
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        file[offsets[name] : offsets[name] + len(data)] = data
    return bytes(file)


def parse(file: bytes) -> dict[str, TensorHeader]:
    def read(offset: int, length: int) -> bytes:
        assert offset >= 0
        assert offset + length <= len(file), "asked for bytes that the file does not have"
        return file[offset : offset + length]

    return parse_header(read, len(file), "m/model.safetensors")


def raw(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def made(data: bytes = b"", /, **entries: Any) -> bytes:
    return raw(json.dumps(entries).encode(), data)


def entry(dtype: Any = "U8", shape: Any = (2,), offsets: Any = (0, 2)) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return {"dtype": dtype, "shape": plain(shape), "data_offsets": plain(offsets)}


# --- golden bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TORCH)
def test_one_dtype_in_every_shape_is_written_as_by_save_file(dtype: str, tmp_path: Path) -> None:
    tensors = {f"t{i}": values(dtype, shape, i) for i, shape in enumerate(SHAPES)}
    save_file(tensors, tmp_path / "f", metadata={"format": "pt"})
    assert ours(tensors, dict.fromkeys(tensors, dtype)) == (tmp_path / "f").read_bytes()


def test_all_dtypes_and_odd_names_in_one_file_are_written_as_by_save_file(tmp_path: Path) -> None:
    dtypes = {f"{name}|{dtype}": dtype for i, name in enumerate(ODD_NAMES) for dtype in list(TORCH)[i % 3 :: 3]}
    dtypes |= {name: list(TORCH)[i % len(TORCH)] for i, name in enumerate(ODD_NAMES)}
    tensors = {name: values(dtype, SHAPES[i % len(SHAPES)], i) for i, (name, dtype) in enumerate(dtypes.items())}
    save_file(tensors, tmp_path / "f", metadata={"format": "pt"})
    assert ours(tensors, dtypes) == (tmp_path / "f").read_bytes()


def test_a_file_without_tensors_is_written_as_by_save_file() -> None:
    assert ours({}, {}) == save({}, metadata={"format": "pt"})


def test_the_header_does_not_depend_on_the_order_of_the_tensors() -> None:
    table = {"b": ("F16", (3,)), "a": ("F32", (2,)), "c": ("F16", (1,)), "10": ("I64", ())}
    assert build_header(table) == build_header(dict(reversed(table.items())))
    _, offsets = build_header(table)
    assert sorted(offsets, key=offsets.__getitem__) == ["10", "a", "b", "c"]


@quick
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(list(TORCH)), st.lists(st.integers(0, 3), max_size=3).map(tuple)),
        max_size=6,
    )
)
def test_any_names_dtypes_and_shapes_are_written_as_by_save_file_and_read_back(
    table: dict[str, tuple[str, tuple[int, ...]]],
) -> None:
    tensors = {name: values(dtype, shape) for name, (dtype, shape) in table.items()}
    file = save(tensors, metadata={"format": "pt"})
    assert ours(tensors, {name: dtype for name, (dtype, _) in table.items()}) == file
    assert {name: (found.dtype, found.shape) for name, found in parse(file).items()} == table


# --- reading --------------------------------------------------------------------------------------------------------


def test_the_header_says_what_safe_open_says(tmp_path: Path) -> None:
    tensors = {
        f"{name}|{dtype}": values(dtype, SHAPES[(i + j) % len(SHAPES)], i)
        for i, name in enumerate(ODD_NAMES)
        for j, dtype in enumerate(TORCH)
    }
    save_file(tensors, tmp_path / "f", metadata={"format": "pt"})
    content = (tmp_path / "f").read_bytes()
    found = parse(content)
    with safetensors.safe_open(tmp_path / "f", "pt") as official:
        assert set(found) == set(official.keys())
        for name in official.keys():  # noqa: SIM118 - a safe_open handle cannot be iterated
            view = official.get_slice(name)
            assert (found[name].dtype, list(found[name].shape)) == (view.get_dtype(), view.get_shape())
            data = content[found[name].offset : found[name].offset + found[name].nbytes]
            expected = official.get_tensor(name)
            assert data == (expected.reshape(-1).view(torch.uint8).numpy().tobytes() if expected.numel() else b"")
    offsets = [entry.offset for entry in found.values()]
    assert offsets == sorted(offsets)


def test_a_header_in_any_order_of_names_is_read_in_file_order() -> None:
    file = made(b"abcd", late=entry(offsets=(2, 4)), early=entry(offsets=(0, 2)))
    start = len(file) - 4
    assert list(parse(file).items()) == [
        ("early", TensorHeader("U8", (2,), start, 2)),
        ("late", TensorHeader("U8", (2,), start + 2, 2)),
    ]


def test_metadata_is_optional_and_trailing_spaces_are_padding() -> None:
    assert list(parse(raw(b'{"__metadata__":{"format":"pt","x":"\\u001b"}}   '))) == []
    assert list(parse(raw(b"{} "))) == []


def test_every_dtype_of_the_format_is_known_to_the_official_reader() -> None:
    for dtype, bits in BITS.items():
        file = made(bytes(bits), t=entry(dtype, (8,), (0, bits)))
        ((name, official),) = safetensors.deserialize(file)
        assert (name, official["dtype"]) == ("t", dtype)
        assert parse(file)["t"].nbytes == bits


# --- refusals -------------------------------------------------------------------------------------------------------

REFUSED = {
    "empty": (b"", "is empty (0 bytes); download it again"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
        "is a Git LFS pointer, not the weights; run `git lfs pull` in its folder",
    ),
    "one byte": (b"\x00", "is too short to be safetensors (1 bytes)"),
    "seven bytes": (b"\x00" * 7, "is too short to be safetensors (7 bytes)"),
    "text": (b"<html>404</html>", "it is not safetensors, or hostile"),
    "header cut": (made(b"ab", t=entry())[:30], "is truncated: the header alone needs 68 bytes, found 30"),
    "data cut": (made(b"a", t=entry()), "is truncated: expected 70 bytes, found 69; download it again"),
    "data missing": (made(b"", t=entry()), "is truncated: expected 70 bytes, found 68"),
    "trailing byte": (
        made(b"abc", t=entry()),
        "has 1 bytes after its last tensor: expected 70, found 71",
    ),
    "trailing, no tensor": (made(b"abc"), "has 3 bytes after its last tensor"),
    "overlap": (
        made(b"abcd", a=entry(), b=entry(shape=(3,), offsets=(1, 4))),
        "overlaps tensor 'b' (expected at byte",
    ),
    "alias": (made(b"ab", a=entry(), b=entry()), "overlaps tensor 'b'"),
    "hole": (made(b"abcde", a=entry(), b=entry(offsets=(3, 5))), "leaves a hole before tensor 'b' (expected at byte"),
    "hole first": (made(b"abc", a=entry(offsets=(1, 3))), "leaves a hole before tensor 'a'"),
    "duplicate name": (
        raw(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'),
        "has 'a' twice in its header",
    ),
    "duplicate key": (
        raw(b'{"a":{"dtype":"U8","dtype":"I8","shape":[2],"data_offsets":[0,2]}}', b"ab"),
        "has 'dtype' twice in its header",
    ),
    "duplicate, escaped": (raw(rb'{"a\u001b[31m":0,"a\u001b[31m":0}'), r"has 'a\x1b[31m' twice in its header"),
    "NaN": (raw(b'{"a":NaN}'), "has a header that is not JSON (ValueError); it is damaged"),
    "Infinity": (
        raw(b'{"a":{"dtype":"U8","shape":[-Infinity],"data_offsets":[0,2]}}', b"ab"),
        "has a header that is not JSON (ValueError)",
    ),
    "leading space": (raw(b" {}"), "has a header that does not start with '{'; it is not safetensors"),
    "leading newline": (raw(b"\n{}"), "does not start with '{'"),
    "byte order mark": (raw(b"\xef\xbb\xbf{}"), "does not start with '{'"),
    "no header": (raw(b""), "does not start with '{'"),
    "a list": (raw(b"[]"), "does not start with '{'"),
    "cut JSON": (raw(b'{"a":'), "has a header that is not JSON (JSONDecodeError)"),
    "two objects": (raw(b"{}{}"), "has a header that is not JSON (JSONDecodeError)"),
    "NUL padding": (raw(b"{}\x00\x00"), "has a header that is not JSON (JSONDecodeError)"),
    "not UTF-8": (raw(b'{"\xff":1}'), "has a header that is not JSON (UnicodeDecodeError)"),
    "deep": (raw(b'{"a":' + b"[" * 200_000), "has a header that is not JSON (ValueError); it is damaged"),
    "a huge number": (raw(b'{"a":' + b"9" * 10_000 + b"}"), "has a header that is not JSON (ValueError)"),
    "metadata list": (made(__metadata__=[]), "has a header whose __metadata__ is not a table of strings"),
    "metadata number": (made(__metadata__={"a": 1}), "has a header whose __metadata__ is not a table of strings"),
    "entry null": (made(a=None), "has a damaged header entry for tensor 'a'"),
    "entry lacks shape": (made(a={"dtype": "U8", "data_offsets": [0, 2]}), "has a damaged header entry for tensor 'a'"),
    "entry with more": (made(b"ab", a=entry() | {"x": 1}), "has a damaged header entry for tensor 'a'"),
    "entry name escaped": (made(**{"\x1b[2J": 1}), r"has a damaged header entry for tensor '\x1b[2J'"),
    "unknown dtype": (made(b"ab", a=entry("U7")), "has tensor 'a' of unknown dtype 'U7'"),
    "dtype in lower case": (made(b"ab", a=entry("u8")), "has tensor 'a' of unknown dtype 'u8'"),
    "dtype is a number": (made(b"ab", a=entry(8)), "has tensor 'a' of unknown dtype '8'"),
    "dtype is a list": (made(b"ab", a=entry(["U8"])), "has tensor 'a' of unknown dtype"),
    "negative shape": (made(b"ab", a=entry(shape=(-2,))), "has a damaged shape or offset for tensor 'a'"),
    "two negatives": (made(b"ab", a=entry(shape=(-1, -2))), "has a damaged shape or offset for tensor 'a'"),
    "float shape": (made(b"ab", a=entry(shape=(2.0,))), "has a damaged shape or offset for tensor 'a'"),
    "bool shape": (made(b"ab", a=entry(shape=(True, 2))), "has a damaged shape or offset for tensor 'a'"),
    "text shape": (made(b"ab", a=entry(shape="2")), "has a damaged shape or offset for tensor 'a'"),
    "shape over 64 bits": (made(a=entry(shape=(2**63,))), "has a damaged shape or offset for tensor 'a'"),
    "huge shape": (made(b"ab", a=entry(shape=(2**62,))), "gives tensor 'a' 2 bytes where U8 [46116"),
    "overflowing shape": (made(a=entry("F32", (2**62, 4), (0, 0))), "gives tensor 'a' 0 bytes where F32"),
    "half a byte": (made(b"a", a=entry("F4", (1,), (0, 1))), "gives tensor 'a' 1 bytes where F4 [1] needs 4/8"),
    "wrong size": (made(b"abc", a=entry("F16", (2,), (0, 3))), "gives tensor 'a' 3 bytes where F16 [2] needs 4"),
    "three offsets": (made(b"ab", a=entry(offsets=(0, 1, 2))), "has a damaged shape or offset for tensor 'a'"),
    "negative offset": (made(b"ab", a=entry(offsets=(-2, 0))), "has a damaged shape or offset for tensor 'a'"),
    "offsets reversed": (made(b"ab", a=entry(offsets=(2, 0))), "gives tensor 'a' -2 bytes where U8 [2] needs 2"),
    "offset past the end": (made(b"ab", a=entry(offsets=(2**60, 2**60 + 2))), "leaves a hole before tensor 'a'"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_damaged_file_is_refused(file: bytes, message: str) -> None:
    with pytest.raises(RefusedError) as refusal:
        parse(file)
    (finding,) = refusal.value.findings
    assert finding.where == "m/model.safetensors"
    assert message in finding.what
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("length", [HEADER_LIMIT + 1, 10**9, 2**64 - 1])
def test_an_oversized_header_is_refused_before_any_of_it_is_read(length: int) -> None:
    def read(offset: int, count: int) -> bytes:
        assert (offset, count) == (0, 64)
        return length.to_bytes(8, "little") + b"{" + b" " * 55

    with pytest.raises(
        RefusedError, match=rf"has a header of {length} bytes \(limit 25000000\); it is not safetensors"
    ):
        parse_header(read, 10**20, "big")


def test_a_header_at_the_limit_is_not_oversized() -> None:
    file = raw(b"{}" + b" " * 10)
    reads: list[tuple[int, int]] = []

    def read(offset: int, count: int) -> bytes:
        reads.append((offset, count))
        return HEADER_LIMIT.to_bytes(8, "little") + file[8:20] if offset == 0 else b"{}"

    assert parse_header(read, 8 + HEADER_LIMIT, "big") == {}
    assert reads == [(0, 64), (8, HEADER_LIMIT)]


def test_a_shape_of_many_huge_dimensions_is_refused() -> None:
    with pytest.raises(RefusedError, match="tensor 'a'"):
        parse(made(a=entry("F32", (2**62,) * 20, (0, 0))))


def test_a_name_that_is_no_unicode_text_is_refused() -> None:
    """The official reader refuses a lone surrogate; a name with one cannot be written again."""
    file = raw(rb'{"a\ud800":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"ab")
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(file)
    with pytest.raises(RefusedError):
        parse(file)


# --- fuzzing --------------------------------------------------------------------------------------------------------


def check_against_the_official_reader(file: bytes) -> bool:
    """Nothing but RefusedError is raised, and what is accepted is what the official reader makes of it."""
    try:
        found = parse(file)
    except RefusedError as refusal:
        message = str(refusal)
    else:
        message = ""
    if message:
        assert message.startswith("refused: m/model.safetensors: ")
        return False
    official = dict(safetensors.deserialize(file))
    assert {name: (e.dtype, list(e.shape)) for name, e in found.items()} == {
        name: (e["dtype"], e["shape"]) for name, e in official.items()
    }
    for name, e in found.items():
        assert file[e.offset : e.offset + e.nbytes] == bytes(official[name]["data"])
    return True


GOOD = made(
    b"abcdefgh",
    a=entry(),
    bb=entry("F16", (1, 2), (2, 6)),
    c=entry("BOOL", (), (6, 7)),
    d=entry("I8", (1,), (7, 8)),
)


def test_the_unchanged_file_of_the_fuzzer_is_accepted() -> None:
    assert check_against_the_official_reader(GOOD)


@quick
@given(st.binary(max_size=80))
def test_random_bytes_raise_nothing_but_a_refusal(file: bytes) -> None:
    check_against_the_official_reader(file)


@quick
@given(st.binary(max_size=60), st.binary(max_size=10))
def test_random_headers_of_the_right_length_raise_nothing_but_a_refusal(header: bytes, data: bytes) -> None:
    check_against_the_official_reader(raw(b"{" + header, data))


@settings(quick, max_examples=250)
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 3), st.binary(max_size=3), st.integers(0, len(GOOD)))
def test_a_mutated_file_raises_nothing_but_a_refusal(start: int, removed: int, put: bytes, end: int) -> None:
    changed = GOOD[:start] + put + GOOD[start + removed :]
    check_against_the_official_reader(changed)
    header = changed[8 : 8 + int.from_bytes(GOOD[:8], "little")]
    check_against_the_official_reader(raw(header, GOOD[-8:]))
    check_against_the_official_reader(GOOD[:end])


sizes = st.lists(
    st.one_of(st.integers(0, 8), st.sampled_from([-1, 2**31, 2**62, 2**63, 1.5, 1e300, True, None, "1"])), max_size=4
)
entries = st.one_of(
    st.fixed_dictionaries(
        {"dtype": st.sampled_from([*BITS, "U7", 1, None]), "shape": sizes, "data_offsets": sizes},
        optional={"more": st.none()},
    ),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["U8", "F4", "BOOL"]),
            "shape": st.lists(st.integers(0, 2), max_size=2),
            "data_offsets": st.sampled_from([[0, 1], [1, 2], [0, 2], [2, 2], [0, 0], [1, 1]]),
        }
    ),
    st.sampled_from([None, 0, 1.5, "a", [], [[]], {}, {"dtype": "U8"}, {"format": "pt"}]),
)


@quick
@given(st.dictionaries(st.sampled_from(["a", "b", "é\x1b", "__metadata__"]), entries, max_size=3), st.integers(0, 4))
def test_a_header_of_wrong_values_raises_nothing_but_a_refusal(header: dict[str, Any], data: int) -> None:
    check_against_the_official_reader(raw(json.dumps(header).encode(), bytes(data)))


def test_tensor_bytes_of_every_dtype_follow_its_width() -> None:
    for dtype, torch_dtype in TORCH.items():
        assert BITS[dtype] == torch_dtype.itemsize * 8
        header, offsets = build_header({"a": (dtype, (3, 5)), "b": (dtype, ())})
        assert offsets["b"] - offsets["a"] == math.prod((3, 5)) * torch_dtype.itemsize
        assert offsets["a"] == len(header)
