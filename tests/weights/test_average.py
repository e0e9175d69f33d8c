"""The merge itself: exact, the same whatever the threads, tiles and shards, and refused where it would be wrong."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIG, llama_tensors, write_checkpoint
from safetensors.torch import load_file, save_file

import warmerge
from warmerge.errors import RefusedError, UsageError
from warmerge.pipeline import average as pipeline
from warmerge.weights.stream import Engine

Tensors = dict[str, torch.Tensor]
HEAD = {"score.weight": torch.linspace(-1, 1, 16).reshape(1, 16)}
RULES: list[dict[str, Any]] = [
    {"rule": "uniform"},
    {"rule": "weighted", "weights": (0.2, 0.3, 0.5)},
    {"rule": "slerp", "base": True},
    {"rule": "stock", "base": True},
]
installed = functools.cache(metadata.version)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up what is installed takes longer than these merges: once is enough."""
    monkeypatch.setattr(metadata, "version", installed)


def plain(folder: Path, tensors: Tensors) -> Path:
    """A checkpoint without a config: a head and whatever else."""
    return write_checkpoint(folder, HEAD | tensors, config=None)


def load(folder: Path) -> Tensors:
    """All tensors of a folder, from its one file or its shards."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def data(tensors: Tensors) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {n: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).numpy().tobytes()) for n, t in tensors.items()}


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("model*"))}


def nothing_left(out: Path) -> bool:
    return not any(out.name in entry.name for entry in out.parent.iterdir())


@pytest.fixture
def tile(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """tile(7): merges that follow compute 7 elements at a time."""
    return lambda size: monkeypatch.setattr(pipeline, "Engine", functools.partial(Engine, tile=size))


# --- what the result does not depend on ---


@pytest.mark.parametrize("choices", RULES, ids=lambda choices: choices["rule"])
def test_threads_and_tiles_do_not_change_a_bit(
    tmp_path: Path, tile: Callable[[int], None], choices: dict[str, Any]
) -> None:
    def some(seed: int) -> Tensors:
        return {name: llama_tensors(seed)[name] for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight")}

    members = [plain(tmp_path / f"m{seed}", some(seed)) for seed in (1, 2, 3)]
    if "base" in choices:
        choices = choices | {"base": plain(tmp_path / "base", some(4))}
    expected = weights(warmerge.average(members, tmp_path / "out", threads=1, **choices).out)
    for threads, size in [(2, None), (5, None), (2, 1), (5, 7), (1, 4096)]:
        if size is not None:
            tile(size)
        out = tmp_path / f"out-{threads}-{size}"
        assert weights(warmerge.average(members, out, threads=threads, **choices).out) == expected, out


@pytest.mark.parametrize("choices", RULES, ids=lambda choices: choices["rule"])
def test_shard_layouts_do_not_change_a_bit(tmp_path: Path, rm: Any, choices: dict[str, Any]) -> None:
    same = [rm(f"one{seed}", seed=seed) for seed in (1, 2, 3)]
    cut = [rm(f"cut{seed}", seed=seed, shards=seed + 1) for seed in (1, 2, 3)]
    if "base" in choices:
        choices = choices | {"base": rm("base", spread=0.0)}
    expected = warmerge.average(same, tmp_path / "out", **choices).out
    assert weights(warmerge.average(cut, tmp_path / "cut", **choices).out) == weights(expected)
    for size, files in (("3KB", 10), ("1B", 21)):
        sharded = warmerge.average(cut, tmp_path / f"out-{size}", max_shard_size=size, **choices).out
        assert data(load(sharded)) == data(load(expected))
        assert len(list(sharded.glob("*.safetensors"))) == files
        index = json.loads((sharded / "model.safetensors.index.json").read_bytes())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in load(expected).values())
        for name, file in index["weight_map"].items():
            assert name in load_file(sharded / file)
        assert not list(expected.glob("*.json.index"))


def test_a_shard_holds_no_more_than_the_size_unless_one_tensor_does(tmp_path: Path, rm: Any) -> None:
    out = warmerge.average([rm("a", seed=1), rm("b", seed=2)], tmp_path / "out", max_shard_size="1600B").out
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 1600


@pytest.mark.parametrize(
    ("size", "shown"), [("0", "'0'"), ("-5GB", "'-5GB'"), ("five", "'five'"), ("0.0001KB", "'0.0001KB'")]
)
def test_a_shard_size_that_is_none(tmp_path: Path, rm: Any, size: str, shown: str) -> None:
    with pytest.raises(UsageError) as caught:
        warmerge.average([rm("a", seed=1), rm("b", seed=2)], tmp_path / "out", max_shard_size=size)
    assert str(caught.value) == f"--max-shard-size: expected a size such as 5GB or 500MB, found {shown}"


def test_two_runs_write_the_same_bytes(tmp_path: Path, rm: Any) -> None:
    members = [rm(f"m{seed}", seed=seed) for seed in (1, 2, 3)]
    first, second = (warmerge.average(members, tmp_path / name, max_shard_size="2KB").out for name in ("x", "y"))
    for path in first.iterdir():
        if path.name != "warmerge.json":  # holds the seconds
            assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}


def test_the_file_is_what_safetensors_itself_would_write(tmp_path: Path, rm: Any) -> None:
    merged = warmerge.average([rm("a", seed=1), rm("b", seed=2)], tmp_path / "out").out
    save_file(load(merged), tmp_path / "again.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "again.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


# --- exact ---

FORMATS = {torch.bfloat16: (8, 8, -126), torch.float16: (5, 11, -14), torch.float32: (8, 24, -126)}


def rounded(value: Fraction, dtype: torch.dtype) -> float:
    """The nearest number of a binary format, ties to even: the definition, in whole numbers."""
    _, digits, lowest = FORMATS[dtype]
    if value == 0:
        return 0.0
    exponent = max(lowest, math.frexp(float(value))[1] - 1)
    assert exponent == lowest or Fraction(2) ** exponent <= abs(value) < Fraction(2) ** (exponent + 1)
    unit = Fraction(2) ** (exponent - digits + 1)
    return float(round(value / unit) * unit)  # round() of a Fraction takes ties to even


def random_bits(dtype: torch.dtype, count: int, seed: int, exponents: tuple[int, int]) -> torch.Tensor:
    """Random signs, mantissas and biased exponents in [low, high): any finite values, subnormals too where low is 0."""
    _, digits, _ = FORMATS[dtype]
    generator = torch.Generator().manual_seed(seed)
    mantissa = torch.randint(2 ** (digits - 1), (count,), generator=generator)
    exponent = torch.randint(*exponents, (count,), generator=generator)
    bits = mantissa + (exponent << (digits - 1))
    values = bits.to(torch.int16).view(dtype) if digits < 24 else bits.to(torch.int32).view(dtype)
    return torch.where(torch.randint(2, (count,), generator=generator).bool(), values, -values)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("dtype", "exponents"), [(torch.bfloat16, (100, 136)), (torch.float16, (0, 31))], ids=str)
def test_the_uniform_mean_is_the_correctly_rounded_one(
    tmp_path: Path, dtype: torch.dtype, exponents: tuple[int, int], count: int
) -> None:
    values = [random_bits(dtype, 500, seed, exponents) for seed in range(count)]
    members = [plain(tmp_path / f"m{i}", {"x": value}) for i, value in enumerate(values)]
    merged = load(warmerge.average(members, tmp_path / "out").out)["x"]
    columns = zip(*(value.double().tolist() for value in values), strict=True)
    expected = [rounded(sum(map(Fraction, column), Fraction(0)) / count, dtype) for column in columns]
    assert merged.double().tolist() == expected
    swapped = load(warmerge.average(members[::-1], tmp_path / "swapped").out)["x"]
    assert data({"x": swapped}) == data({"x": merged})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_mean_just_beside_a_tie_is_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    """The tie itself goes to even, what is a little above or below it does not: float32 in between would hide that."""
    step = 2.0 ** (1 - FORMATS[dtype][1])
    small = 2.0**-24 if dtype == torch.float16 else 2.0**-30
    rows = [
        [1.0, 1.0, 1.0 + step, small],
        [1.0, 1.0, 1.0 + step, -small],
        [1.0, 1.0, 1.0 + 3 * step, small],
        [1.0, 1.0, 1.0 + 3 * step, -small],
        [-1.0, -1.0, -1.0 - step, -small],
    ] * 9  # more than one vector register, and a rest
    if dtype == torch.float16:  # the smallest float16 is too large beside 1: take large numbers
        rows = [[value * 2.0**13 if abs(value) > 0.5 else value for value in row] for row in rows]
    columns = torch.tensor(rows, dtype=torch.float64).T.to(dtype)
    assert columns.T.double().tolist() == rows
    members = [plain(tmp_path / f"m{i}", {"x": column.contiguous()}) for i, column in enumerate(columns)]
    merged = load(warmerge.average(members, tmp_path / "out", allow_duplicates=True).out)["x"]
    expected = [rounded(sum(map(Fraction, row), Fraction(0)) / 4, dtype) for row in rows]
    assert merged.double().tolist() == expected


def test_float32_is_rounded_once_and_cast_once(tmp_path: Path) -> None:
    values = [random_bits(torch.float32, 500, seed, (115, 135)) for seed in range(3)]
    members = [plain(tmp_path / f"m{i}", {"x": value}) for i, value in enumerate(values)]
    columns = list(zip(*(value.double().tolist() for value in values), strict=True))
    means = [sum(map(Fraction, column), Fraction(0)) / 3 for column in columns]
    for dtype, name in ((torch.float32, "auto"), (torch.bfloat16, "bfloat16")):
        merged = load(warmerge.average(members, tmp_path / name, dtype=name).out)["x"]
        assert merged.dtype == dtype
        assert merged.double().tolist() == [rounded(mean, dtype) for mean in means]


def test_huge_finite_values_have_a_mean(tmp_path: Path) -> None:
    """Their sum does not fit float32; neither does the sum over a tile that looks for NaN."""
    values = {"f32": torch.full((50,), 3e38), "bf16": torch.full((50,), 3e38, dtype=torch.bfloat16)}
    values |= {"f16": torch.full((50,), 65504.0, dtype=torch.float16)}
    members = [plain(tmp_path / f"m{i}", values | {"n": torch.ones(1) * i}) for i in range(4)]
    merged = load(warmerge.average(members, tmp_path / "out").out)
    for name, value in values.items():
        assert torch.equal(merged[name], value), name


def test_subnormal_and_signed_zero_values(tmp_path: Path) -> None:
    tiny = torch.tensor([1e-45, 3e-45, -0.0, 0.0, -1e-45])
    members = [plain(tmp_path / f"m{i}", {"x": tiny, "n": torch.ones(1) * i}) for i in range(2)]
    merged = load(warmerge.average(members, tmp_path / "out").out)
    assert data({"x": merged["x"]}) == data({"x": tiny})


# --- shapes and names ---


def test_empty_scalar_and_large_tensors(tmp_path: Path, tile: Callable[[int], None]) -> None:
    def tensors(seed: int) -> Tensors:
        torch.manual_seed(seed)
        shapes = {"empty": (0, 4), "scalar": (), "large": (3, 100, 100), "one": (1,), "edge": (4096,)}
        return {name: torch.randn(shape) for name, shape in shapes.items()}

    members = [plain(tmp_path / f"m{seed}", tensors(seed)) for seed in (1, 2)]
    expected = {name: ((tensors(1)[name].double() + tensors(2)[name].double()) / 2).float() for name in tensors(1)}
    tile(4096)
    merged = load(warmerge.average(members, tmp_path / "out").out)
    assert data(merged) == data(expected | HEAD)
    base = plain(tmp_path / "base", tensors(3))
    assert load(warmerge.average(members, tmp_path / "slerp", rule="stock", base=base).out).keys() == merged.keys()


def test_a_tensor_larger_than_the_default_tile(tmp_path: Path) -> None:
    from warmerge.weights.kernels import TILE

    values = [torch.arange(TILE + 3, dtype=torch.float32) * factor for factor in (1, 3)]
    members = [plain(tmp_path / f"m{i}", {"x": value}) for i, value in enumerate(values)]
    assert torch.equal(load(warmerge.average(members, tmp_path / "out").out)["x"], values[0] * 2)


def test_two_thousand_small_tensors(tmp_path: Path) -> None:
    members = [
        plain(tmp_path / f"m{i}", {f"layers.{n}.w": torch.full((2,), float(n + i)) for n in range(2000)})
        for i in (0, 2)
    ]
    merged = load(warmerge.average(members, tmp_path / "out").out)
    assert len(merged) == 2001
    assert all(merged[f"layers.{n}.w"].tolist() == [n + 1, n + 1] for n in range(2000))


@pytest.mark.parametrize("sharded", [False, True])
def test_odd_names(tmp_path: Path, sharded: bool) -> None:
    names = ["モデル.重み", "with space", 'quote"s', "it's", "back\\slash", "emoji😀", "tab\there", "a/b", "", "%s{}"]
    members = [plain(tmp_path / f"m{i}", {n: torch.full((3,), float(i)) for n in names}) for i in (1, 3)]
    size = "12B" if sharded else "5GB"
    merged = load(warmerge.average(members, tmp_path / "öut put", max_shard_size=size).out)
    assert all(merged[name].tolist() == [2, 2, 2] for name in names)
    assert merged.keys() == {*names, *HEAD}


def test_names_that_write_to_the_terminal_are_escaped(tmp_path: Path) -> None:
    members = [
        plain(tmp_path / f"m{i}", {"a\x1b[31m": torch.tensor([1.0, float("nan") if i else 2.0])}) for i in (0, 1)
    ]
    with pytest.raises(RefusedError) as caught:
        warmerge.average(members, tmp_path / "out")
    assert r"tensor 'a\x1b[31m' holds nan at element 1" in str(caught.value)
    assert "\x1b" not in str(caught.value)


# --- integers ---

INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def test_equal_integers_are_copied(tmp_path: Path) -> None:
    whole = {str(dtype): torch.tensor([0, 1, 1, 0, 1]).to(dtype) for dtype in INTEGERS}
    whole["scalar"], whole["none"] = torch.tensor(2**62 + 1), torch.zeros(0, dtype=torch.int64)
    members = [plain(tmp_path / f"m{i}", whole | {"n": torch.ones(1) * i}) for i in range(2)]
    for dtype in ("auto", "bfloat16"):
        merged = load(warmerge.average(members, tmp_path / dtype, dtype=dtype).out)
        assert data({name: merged[name] for name in whole}) == data(whole)


def test_different_integers_are_refused_all_of_them(tmp_path: Path) -> None:
    ones = {str(dtype): torch.ones(5).to(dtype) for dtype in INTEGERS}
    members = [plain(tmp_path / f"m{i}", dict(ones) | {"n": torch.ones(1) * i}) for i in range(3)]
    changed = {name: tensor.clone() for name, tensor in ones.items()}
    for tensor in changed.values():
        tensor[4] = 0
    members[2] = plain(tmp_path / "m2", changed | {"n": torch.ones(1) * 2})
    with pytest.raises(RefusedError) as caught:
        warmerge.average(members, tmp_path / "out")
    assert len(caught.value.findings) == len(INTEGERS)
    for name, dtype in (("torch.int64", "I64"), ("torch.bool", "BOOL")):
        expected = f"{members[2]}: tensor '{name}' ({dtype}) differs from {members[0]}'s; integers cannot be averaged"
        assert expected in str(caught.value)
    assert nothing_left(tmp_path / "out")


# --- dtypes ---


def test_mixed_dtypes_need_a_decision(tmp_path: Path, rm: Any) -> None:
    members = [rm("a", seed=1), rm("b", seed=2, dtype=torch.bfloat16), rm("c", seed=3, dtype=torch.float16)]
    with pytest.raises(RefusedError, match="say which the result should have: --dtype float32, bfloat16 or float16"):
        warmerge.average(members, tmp_path / "out")
    inputs = [load(member) for member in members]
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        merged = warmerge.average(members, tmp_path / name, dtype=name).out
        for tensor, value in load(merged).items():
            exact = sum(member[tensor].double() for member in inputs) / 3
            assert value.dtype == dtype
            torch.testing.assert_close(value.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=1e-7)
        assert json.loads((merged / "config.json").read_bytes())["dtype"] == name


def test_a_dtype_that_is_none(tmp_path: Path, rm: Any) -> None:
    with pytest.raises(UsageError, match=r"^--dtype: expected auto, float32, bfloat16, float16, found 'int8'$"):
        warmerge.average([rm("a", seed=1), rm("b", seed=2)], tmp_path / "out", dtype="int8")


def test_what_does_not_fit_float16_is_refused_by_name(tmp_path: Path) -> None:
    values = {"fits": torch.full((9,), 65504.0), "large": torch.tensor([1.0, 2.0, 7e4]), "low": torch.tensor([-1e6])}
    members = [plain(tmp_path / f"m{i}", values | {"n": torch.ones(1) * i}) for i in range(2)]
    with pytest.raises(RefusedError) as caught:
        warmerge.average(members, tmp_path / "out", dtype="float16")
    assert sorted(map(str, caught.value.findings)) == [
        "output: tensor 'large' becomes inf at element 2: the merged value does not fit float16 (largest 6.55e+04); "
        "choose --dtype bfloat16 or float32",
        "output: tensor 'low' becomes -inf at element 0: the merged value does not fit float16 (largest 6.55e+04); "
        "choose --dtype bfloat16 or float32",
    ]
    assert nothing_left(tmp_path / "out")


# --- NaN and Inf ---


@pytest.mark.parametrize("shards", [1, 3])
def test_values_that_are_not_finite_are_named_all_at_once(tmp_path: Path, rm: Any, shards: int) -> None:
    def spoiled(seed: int, name: str, element: int, value: float) -> Path:
        tensor = llama_tensors(seed)[name]
        tensor.view(-1)[element] = value
        return rm(f"m{seed}", seed=seed, shards=shards, add={name: tensor})

    gate, norm = "model.layers.1.mlp.gate_proj.weight", "model.norm.weight"
    members = [rm("good", seed=9), spoiled(1, gate, 383, float("nan")), spoiled(2, norm, 5, float("-inf"))]
    with pytest.raises(RefusedError) as caught:
        warmerge.average(members, tmp_path / "out", max_shard_size="2KB")
    names = sorted(llama_tensors(0))
    files = [f"model-{1 + names.index(n) % 3:05d}-of-00003.safetensors" for n in (gate, norm)]
    if shards == 1:
        files = ["model.safetensors"] * 2
    assert sorted(map(str, caught.value.findings)) == [
        f"{members[1]}/{files[0]}: tensor '{gate}' holds nan at element 383; leave this checkpoint out, or repair it",
        f"{members[2]}/{files[1]}: tensor '{norm}' holds -inf at element 5; leave this checkpoint out, or repair it",
    ]
    assert str(caught.value).startswith("refused, 2 findings:\n")
    assert nothing_left(tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "choices",
    [
        {"rule": "lambda", "lam": 0.0},
        {"rule": "weighted", "weights": (1.0, 0.0)},
        {"rule": "slerp", "lam": 0.0, "base": True},
        {"rule": "stock", "base": True},
    ],
    ids=lambda choices: choices["rule"],
)
def test_a_nan_that_counts_nothing_is_refused_too(
    tmp_path: Path, rm: Any, choices: dict[str, Any], value: float
) -> None:
    bad = llama_tensors(2)["score.weight"]
    bad[0, 3] = value
    members = [rm("a", seed=1), rm("b", seed=2, add={"score.weight": bad})]
    if "base" in choices:
        choices = choices | {"base": rm("base", spread=0.0)}
    with pytest.raises(RefusedError) as caught:
        warmerge.average(members, tmp_path / "out", **choices)
    assert str(caught.value) == (
        f"refused: {members[1]}/model.safetensors: tensor 'score.weight' holds {value} at element 3; leave this "
        "checkpoint out, or repair it"
    )
    assert nothing_left(tmp_path / "out")


def test_a_nan_in_the_base_is_named(tmp_path: Path, rm: Any) -> None:
    bad = llama_tensors(0)["score.weight"]
    bad[0, 0] = float("nan")
    base = rm("base", add={"score.weight": bad})
    with pytest.raises(RefusedError) as caught:
        warmerge.average([rm("a", seed=1), rm("b", seed=2)], tmp_path / "out", rule="liti", eta=1.0, base=base)
    assert f"{base}/model.safetensors: tensor 'score.weight' holds nan at element 0" in str(caught.value)


# --- inputs that change while they are read ---


def touch(file: Path) -> None:
    os.utime(file, ns=(1, 1))


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 8)


def grow(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"more")


def replace(file: Path) -> None:
    """Another file with the same size and time, as `mv` would put it there."""
    stat = file.stat()
    shutil.copy(file, file.with_suffix(".new"))
    os.utime(file.with_suffix(".new"), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(file.with_suffix(".new"), file)


def overwrite_in_place(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(struct.pack("<f", 5.0))
    touch(file)


@pytest.mark.parametrize("change", [touch, truncate, grow, replace, overwrite_in_place])
@pytest.mark.parametrize("when", ["planned", "reading"])
@pytest.mark.parametrize("rule", ["uniform", "stock"])
def test_an_input_that_changes_is_refused(
    tmp_path: Path, rm: Any, change: Callable[[Path], None], when: str, rule: str
) -> None:
    members = [rm("a", seed=1), rm("b", seed=2)]
    victim, done = members[1] / "model.safetensors", []

    def once(_: Any) -> None:
        if not done:
            done.append(True)
            change(victim)

    hook = {"on_plan": once} if when == "planned" else {"progress": once}
    base = {} if rule == "uniform" else {"base": rm("base", spread=0.0)}
    with pytest.raises(RefusedError) as caught:
        warmerge.average(members, tmp_path / "out", threads=1, rule=rule, **base, **hook)
    assert str(caught.value) == (
        f"refused: {victim}: changed while it was read (size, time or inode), or was removed; merge it when it is still"
    )
    assert done
    assert nothing_left(tmp_path / "out")


@pytest.mark.parametrize("integers", [False, True])
def test_an_input_that_disappears_is_named(tmp_path: Path, rm: Any, integers: bool) -> None:
    extra = {"ids": torch.arange(3)} if integers else {}
    members = [rm("a", seed=1, add=extra), rm("b", seed=2, add=extra)]
    victim = members[1] / "model.safetensors"
    with pytest.raises(warmerge.WarmergeError) as caught:
        warmerge.average(members, tmp_path / "out", on_plan=lambda _: victim.unlink())
    assert str(victim) in str(caught.value)
    assert "while writing" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# --- a part of the tensors ---


def test_only_except_and_the_rest_to_the_bit(tmp_path: Path, rm: Any) -> None:
    members = [rm("a", seed=1), rm("b", seed=2), rm("c", seed=3)]
    first, second, third = map(load, members)
    merged = warmerge.average(members, tmp_path / "only", only=["*layers.1.*", "score*"], rest_from=2)
    found = load(merged.out)
    for name in first:
        mean = ((first[name].double() + second[name].double() + third[name].double()) / 3).float()
        chosen = "layers.1." in name or name == "score.weight"
        assert torch.equal(found[name], mean if chosen else second[name]), name
    assert merged.manifest["copied_tensors"] == [n for n in merged.manifest["copied_tensors"] if "layers.1." not in n]
    assert len(merged.manifest["copied_tensors"]) == 11
    complement = load(
        warmerge.average(members, tmp_path / "except", exclude=["*layers.0.*", "*embed*", "*.norm.*"], rest_from=2).out
    )
    assert data(complement) == data(found)


def test_a_reward_model_merged_with_a_language_model(tmp_path: Path) -> None:
    """DogeRM (arXiv 2407.01470): the body of an RM with that of a causal LM, the RM's head kept."""
    reward, language = llama_tensors(1), llama_tensors(2)
    del language["score.weight"]
    language["lm_head.weight"] = torch.randn(32, 16)
    reward["score.weight"][0, 0] = -0.0
    rm = write_checkpoint(tmp_path / "rm", reward)
    lm = write_checkpoint(tmp_path / "lm", language, CONFIG | {"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(RefusedError) as caught:
        warmerge.average([rm, lm], tmp_path / "out")
    assert f"{lm}: tensor 'score.weight' is missing" in str(caught.value)
    assert f"{lm}: tensor 'lm_head.weight' is extra" in str(caught.value)
    choices = {"rule": "weighted", "weights": (0.75, 0.25), "exclude": ["score*"], "rest_from": 1}
    out = warmerge.average([rm, lm], tmp_path / "out", **choices).out
    found = load(out)
    assert found.keys() == reward.keys()
    assert data({"s": found["score.weight"]}) == data({"s": reward["score.weight"]})
    name = "model.layers.0.mlp.up_proj.weight"
    exact = (0.75 * reward[name].double() + 0.25 * language[name].double()).float()
    assert torch.equal(found[name], exact)
    assert json.loads((out / "config.json").read_bytes()) == CONFIG


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"only": ["score*"]},
            "--only and --except need --rest-from N: the checkpoint that the other tensors come from",
        ),
        ({"rest_from": 1}, "--rest-from is used with --only or --except; without them every tensor is merged"),
        ({"only": ["score*"], "rest_from": 3}, "--rest-from: expected a checkpoint's number from 1 to 2, found 3"),
        ({"only": ["score*"], "rest_from": 0}, "--rest-from: expected a checkpoint's number from 1 to 2, found 0"),
        ({"exclude": ["*"], "rest_from": 1}, "--only and --except leave no tensor to merge"),
        ({"tokenizer_from": 9}, "--tokenizer-from: expected a checkpoint's number from 1 to 2, found 9"),
        ({"threads": 0}, "--threads: expected 1 or more, found 0"),
        ({"device": "tpu"}, "--device: expected auto, cpu, cuda or cuda:N, found 'tpu'"),
        ({"device": "mps"}, "--device: expected auto, cpu, cuda or cuda:N, found 'mps'"),
    ],
)
def test_choices_that_cannot_be(tmp_path: Path, rm: Any, choices: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        warmerge.average([rm("a", seed=1), rm("b", seed=2)], tmp_path / "out", **choices)
    assert str(caught.value) == message


def test_a_glob_that_matches_nothing(tmp_path: Path, rm: Any) -> None:
    members = [rm("a", seed=1), rm("b", seed=2)]
    with pytest.raises(UsageError) as caught:
        warmerge.average(members, tmp_path / "out", only=["score*", "scroe*"], exclude=["x"], rest_from=1)
    assert str(caught.value) == f"no tensor of {members[0]} matches 'scroe*', 'x'"


# --- a live model ---


@pytest.fixture(scope="module")
def quiet_transformers() -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def live(transformers: Any, name: str = "LlamaForSequenceClassification", **changes: Any) -> Any:
    config = {k: v for k, v in CONFIG.items() if k not in ("architectures", "model_type", "dtype")}
    return getattr(transformers, name)(transformers.LlamaConfig(**config | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_live_model_gets_the_values_of_the_file(
    tmp_path: Path, rm: Any, quiet_transformers: Any, dtype: torch.dtype
) -> None:
    members = [rm("a", seed=1), rm("b", seed=2), rm("c", seed=3)]
    on_disk = load(warmerge.average(members, tmp_path / "out", rule="weighted", weights=(0.5, 0.25, 0.25)).out)
    model = live(quiet_transformers).to(dtype)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    warnings = warmerge.average_into(model, members, rule="weighted", weights=(0.5, 0.25, 0.25))
    assert warnings == ()
    assert data(dict(model.state_dict())) == data({name: tensor.to(dtype) for name, tensor in on_disk.items()})
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    assert not list(tmp_path.glob(".*partial"))


def test_a_live_model_of_other_tensors_is_refused_and_untouched(
    tmp_path: Path, rm: Any, quiet_transformers: Any
) -> None:
    members = [rm("a", seed=1), rm("b", seed=2)]
    model = live(quiet_transformers, num_hidden_layers=1, num_labels=2)
    model.register_parameter("extra", torch.nn.Parameter(torch.ones(3)))
    before = data({name: tensor.clone() for name, tensor in model.state_dict().items()})
    with pytest.raises(RefusedError) as caught:
        warmerge.average_into(model, members)
    message = list(map(str, caught.value.findings))
    assert "model: tensor 'score.weight' has shape [2, 16] in the model, [1, 16] in the checkpoints" in message
    assert "model: tensor 'extra' is in the model but not in the checkpoints" in message
    missing = [line for line in message if line.endswith("is in the checkpoints but not in the model")]
    assert len(missing) == 9
    assert all("'model.layers.1." in line for line in missing)
    assert data(dict(model.state_dict())) == before


def test_tied_weights_count_as_filled(tmp_path: Path, quiet_transformers: Any) -> None:
    members = []
    for seed in (1, 2):
        tensors = llama_tensors(seed)
        del tensors["score.weight"]
        config = CONFIG | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
        members.append(write_checkpoint(tmp_path / f"m{seed}", tensors, config))
    model = live(quiet_transformers, "LlamaForCausalLM", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    warmerge.average_into(model, members, any_model=True)
    expected = (load(members[0])["model.embed_tokens.weight"] + load(members[1])["model.embed_tokens.weight"]) / 2
    assert torch.equal(model.lm_head.weight, expected)
    untied = live(quiet_transformers, "LlamaForCausalLM", tie_word_embeddings=False)
    with pytest.raises(RefusedError, match=r"tensor 'lm_head.weight' is in the model but not in the checkpoints"):
        warmerge.average_into(untied, members, any_model=True)


def test_integers_go_into_integers_only(tmp_path: Path) -> None:
    """The bits of an int32 are not those of a float32."""
    members = [plain(tmp_path / f"m{i}", {"ids": torch.arange(4, dtype=torch.int32)}) for i in range(2)]
    members[1] = plain(
        tmp_path / "m1", {"ids": torch.arange(4, dtype=torch.int32), "score.weight": -HEAD["score.weight"]}
    )

    class Module(torch.nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.score = torch.nn.Linear(16, 1, bias=False)
            self.register_buffer("ids", torch.zeros(4, dtype=dtype))

    same = Module(torch.int32)
    warmerge.average_into(same, members)
    assert same.ids.tolist() == [0, 1, 2, 3]
    for dtype in (torch.float32, torch.int64):
        other = Module(dtype)
        with pytest.raises(RefusedError, match=r"model: tensor 'ids'"):
            warmerge.average_into(other, members)


def test_tensors_that_are_not_contiguous_are_refused(tmp_path: Path) -> None:
    members = [plain(tmp_path / f"m{i}", {"x": torch.ones(2, 3) * i}) for i in range(2)]
    engine = Engine(1)
    plan = pipeline.prepare(members).plan
    with pytest.raises(RefusedError, match=r"tensor 'x' is not contiguous in the model; call .contiguous\(\) on it"):
        pipeline.merge_into(plan, {"x": torch.zeros(3, 2).T, "score.weight": torch.zeros(1, 16)}, engine)


def test_a_bad_value_on_its_way_into_a_live_model(tmp_path: Path) -> None:
    members = [plain(tmp_path / f"m{i}", {"x": torch.tensor([1.0, float("nan") if i else 2.0])}) for i in range(2)]
    module = torch.nn.Module()
    module.x = torch.nn.Parameter(torch.zeros(2))
    module.score = torch.nn.Linear(16, 1, bias=False)
    with pytest.raises(RefusedError, match="tensor 'x' holds nan at element 1"):
        warmerge.average_into(module, members)


# --- what lies beside the weights ---

TOKENIZER = {
    "tokenizer.json": '{"version": "1.0",   "model": {"vocab": {"é": 0}}}',
    "tokenizer_config.json": '{"model_max_length": 512}\n',
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}\r\n",
}


def test_config_and_tokenizer_are_copied_to_the_byte(tmp_path: Path, rm: Any) -> None:
    members = [rm("a", seed=1), rm("b", seed=2)]
    odd = json.dumps(CONFIG | {"_name_or_path": "a"}).replace('"hidden_size": 16', '"hidden_size":   16')
    (members[0] / "config.json").write_text(odd)
    for member in members:
        for name, text in TOKENIZER.items():
            (member / name).write_bytes(text.encode())
        (member / "generation_config.json").write_text('{"do_sample": false}')
        (member / "notes.txt").write_text("not copied")
        (member / "training_args.bin").write_bytes(b"not copied")
    out = warmerge.average(members, tmp_path / "out").out
    assert {path.name for path in out.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "warmerge.json", *TOKENIZER,
    }  # fmt: skip
    assert (out / "config.json").read_text() == odd
    for name, text in TOKENIZER.items():
        assert (out / name).read_bytes() == text.encode(), name


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_says_the_dtype_of_the_weights(tmp_path: Path, rm: Any, key: str) -> None:
    config = {k: v for k, v in CONFIG.items() if k != "dtype"}
    config |= {key: "float32", "text_config": {key: "float32", "hidden_size": 16}, "vision": {"depth": 2}}
    members = [write_checkpoint(tmp_path / f"m{i}", llama_tensors(i), config) for i in (1, 2)]
    out = warmerge.average(members, tmp_path / "out", dtype="bfloat16").out
    assert json.loads((out / "config.json").read_bytes()) == config | {
        key: "bfloat16",
        "text_config": {key: "bfloat16", "hidden_size": 16},
    }


@pytest.mark.parametrize(("dtype", "size"), [("auto", "5GB"), ("bfloat16", "2KB")])
def test_transformers_loads_the_output_with_no_key_missing(
    tmp_path: Path, rm: Any, quiet_transformers: Any, dtype: str, size: str
) -> None:
    members = [rm("a", seed=1), rm("b", seed=2, shards=2)]
    out = warmerge.average(members, tmp_path / "out", dtype=dtype, max_shard_size=size).out
    model, info = quiet_transformers.AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    assert data(dict(model.state_dict())) == data(load(out))
    assert model.dtype == (torch.float32 if dtype == "auto" else torch.bfloat16)
    assert model.config.num_labels == 1


def test_the_manifest_tells_how_it_was_made(tmp_path: Path, rm: Any) -> None:
    members = [rm("a", seed=1), rm("b", seed=2)]
    command = ["warmerge", "average", "a", "b"]
    merged = warmerge.average(
        members, tmp_path / "out", rule="weighted", weights=(1, 3), normalize=True, command=command
    )
    manifest = json.loads((merged.out / "warmerge.json").read_bytes())
    assert manifest == json.loads(json.dumps(merged.manifest))
    assert manifest["command"] == command
    assert manifest["rule"]["name"] == "weighted"
    assert manifest["rule"]["weights"] == [1, 3]
    assert manifest["rule"]["normalize"] is True
    assert manifest["coefficients"] == {"members": [0.25, 0.75], "base": 0.0}
    assert [(entry["role"], entry["checkpoint"]) for entry in manifest["inputs"]] == [
        ("member", str(members[0])),
        ("member", str(members[1])),
    ]
    prints = [entry["fingerprint"] for entry in manifest["inputs"]]
    assert len(set(prints)) == 2
    assert all(len(bytes.fromhex(text)) == 32 for text in prints)
    assert manifest["dtype"] == "float32"
    assert manifest["parameters"] == sum(tensor.numel() for tensor in llama_tensors(0).values())
    assert manifest["bytes"] == (merged.out / "model.safetensors").stat().st_size
    assert manifest["copied_tensors"] == []
    assert manifest["resumed_shards"] == []
    assert manifest["warnings"] == []
    assert manifest["seconds"]
    assert all(seconds >= 0 for seconds in manifest["seconds"].values())
    assert {"python", "torch", "safetensors", "transformers", "warmerge"} <= manifest["versions"].keys()


@pytest.mark.parametrize(("rule", "option", "value"), [("lambda", "lam", 0.0), ("liti", "eta", 0.0)])
def test_the_manifest_keeps_an_option_of_zero(tmp_path: Path, rm: Any, rule: str, option: str, value: float) -> None:
    base = {"base": rm("base", spread=0.0)} if rule == "liti" else {}
    merged = warmerge.average(
        [rm("a", seed=1), rm("b", seed=2)], tmp_path / "out", rule=rule, **{option: value}, **base
    )
    assert merged.manifest["rule"][option] == value


def test_the_manifest_holds_measured_coefficients(tmp_path: Path, rm: Any) -> None:
    members, base = [rm("a", seed=1), rm("b", seed=2)], rm("base", spread=0.0)
    merged = warmerge.average(members, tmp_path / "out", rule="stock", base=base, max_shard_size="2KB")
    table = merged.manifest["coefficients"]["per_tensor"]
    assert table.keys() == llama_tensors(0).keys()
    for name, row in table.items():
        assert sum(row["members"]) + row["base"] == pytest.approx(1, abs=1e-12)
        theta = sum(c * load(m)[name].double() for c, m in zip(row["members"], members, strict=True))
        exact = theta + row["base"] * load(base)[name].double()
        torch.testing.assert_close(load(merged.out)[name].double(), exact, rtol=1e-6, atol=1e-7)
    assert [entry["role"] for entry in merged.manifest["inputs"]] == ["member", "member", "base"]


@pytest.mark.parametrize("rule", ["uniform", "stock"])
def test_the_model_card_has_front_matter_and_no_local_path(tmp_path: Path, rm: Any, rule: str) -> None:
    import yaml

    base = {"base": rm("base", spread=0.0)} if rule == "stock" else {}
    merged = warmerge.average([rm("secret-a", seed=1), rm("secret-b", seed=2)], tmp_path / "out", rule=rule, **base)
    card = (merged.out / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", "warm", "model-merging", "warmerge", "RLHF"],
    }
    for private in (str(tmp_path), "secret", os.sep + "tmp", str(Path.home())):
        assert private not in card
    assert f"{'uniform average' if rule == 'uniform' else '`stock` merge'} of those of 2 fine-tuned" in body
    for entry in merged.manifest["inputs"]:
        assert f"`{entry['fingerprint'][:16]}`" in body


def test_the_same_checkpoint_twice_is_refused(tmp_path: Path, rm: Any) -> None:
    one, copy = rm("a", seed=1), rm("copy", seed=1, shards=2)
    with pytest.raises(
        RefusedError, match=f"{one}: is the same checkpoint as {one}; --allow-duplicates counts it twice"
    ):
        warmerge.average([one, one], tmp_path / "out")
    with pytest.raises(
        RefusedError, match=f"{copy}: has the same weights as {one}; --allow-duplicates counts them twice"
    ):
        warmerge.average([one, copy], tmp_path / "out")
    assert data(load(warmerge.average([one, copy], tmp_path / "out", allow_duplicates=True).out)) == data(load(one))


def test_one_checkpoint_or_none(tmp_path: Path, rm: Any) -> None:
    with pytest.raises(RefusedError, match="is the only checkpoint; a merge takes two or more"):
        warmerge.average([rm("a")], tmp_path / "out")
    with pytest.raises(UsageError, match=r"^no checkpoint given$"):
        warmerge.average([], tmp_path / "out")


def test_every_damaged_input_is_named_at_once(tmp_path: Path, rm: Any) -> None:
    good, bad, worse = rm("a", seed=1), rm("b", seed=2), rm("c", seed=3)
    truncate(bad / "model.safetensors")
    (worse / "model.safetensors").write_bytes(b"")
    with pytest.raises(RefusedError) as caught:
        warmerge.average([good, bad, worse], tmp_path / "out")
    assert [finding.where for finding in caught.value.findings] == [
        f"{bad}/model.safetensors",
        f"{worse}/model.safetensors",
    ]
