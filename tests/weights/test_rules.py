"""A contract that every row of the rules table keeps, and each rule against the formula of its paper."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_checkpoint
from safetensors.torch import load_file

import warmerge
from warmerge.errors import RefusedError, UsageError
from warmerge.weights.rules import RULES, Coefficients, Options, check_options, liti, slerp, stock, uniform, weighted

Array = np.ndarray[Any, np.dtype[np.float64]]
# Options with which each rule can be called, by number of members. A new row of RULES needs a line here.
VALID: dict[str, Callable[[int], dict[str, Any]]] = {
    "uniform": lambda count: {},
    "weighted": lambda count: {"weights": tuple(float(i + 1) for i in range(count)), "normalize": True},
    "lambda": lambda count: {"lam": 0.3},
    "slerp": lambda count: {"lam": 0.3} if count == 2 else {},
    "liti": lambda count: {"eta": 0.4},
    "stock": lambda count: {},
}
SYMMETRIC = ("uniform", "liti", "stock")
# liti leads back to the base by design, so copies of one checkpoint come back only when they are the base.
PULLED_TO_BASE = ("liti",)
# One checkpoint holds tensors of all dtypes, so that one merge shows what becomes of each.
DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SHAPES = {"score.weight": (1, 96), "model.a.weight": (12, 8), "model.b.bias": (7,)}
installed = functools.cache(metadata.version)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up what is installed takes longer than these merges: once is enough."""
    monkeypatch.setattr(metadata, "version", installed)


def counts(rule: str) -> list[int]:
    only = RULES[rule].members
    return [2, 3, 5] if only is None else [only]


CASES = [(rule, count) for rule in RULES for count in counts(rule)]
NEEDS_BASE = [rule for rule in RULES if RULES[rule].needs_base]


def tensors(seed: int, spread: float = 0.1) -> dict[str, torch.Tensor]:
    """One start and a task vector of `seed`, in every dtype; some values are 0 and -0 in every member."""
    start, step = torch.Generator().manual_seed(7), torch.Generator().manual_seed(100 + seed)
    made = {}
    for short, dtype in DTYPES.items():
        for name, shape in SHAPES.items():
            body = torch.randn(shape, generator=start, dtype=torch.float64)
            moved = body + spread * torch.randn(shape, generator=step, dtype=torch.float64)
            moved.view(-1)[:2] = torch.tensor([0.0, -0.0])
            made[f"{short}.{name}"] = moved.to(dtype)
    return made


def narrow(checkpoint: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All but the float64 tensors: those have no wider type to be summed in, so their last bits may differ."""
    return {name: tensor for name, tensor in checkpoint.items() if tensor.dtype != torch.float64}


def merge(
    tmp_path: Path,
    members: Sequence[dict[str, torch.Tensor]],
    base: dict[str, torch.Tensor] | None = None,
    **choices: Any,
) -> dict[str, torch.Tensor]:
    """What `warmerge.average` makes of checkpoints with these tensors."""
    place = tmp_path / f"merge-{len(list(tmp_path.iterdir()))}"
    folders = [write_checkpoint(place / f"m{i}", member, config=None) for i, member in enumerate(members)]
    if base is not None:
        choices["base"] = write_checkpoint(place / "base", base, config=None)
    warmerge.average(folders, place / "out", allow_duplicates=True, threads=1, **choices)
    return load_file(place / "out" / "model.safetensors")


def same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name].view(-1).view(torch.uint8), theirs[name].view(-1).view(torch.uint8)), name


def angle(a: Array, b: Array) -> float:
    return math.acos(max(-1.0, min(1.0, float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b)))))


def arc(a: Array, b: Array, lam: float) -> Array:
    """The textbook formula, on raw vectors."""
    omega = angle(a, b)
    return math.sin((1 - lam) * omega) / math.sin(omega) * a + math.sin(lam * omega) / math.sin(omega) * b


def reference(rule: str, thetas: Sequence[Array], base: Array, options: dict[str, Any]) -> Array:
    """Each rule's formula as its paper writes it, in float64, with nothing shared with the code under test."""
    deltas, mean = [theta - base for theta in thetas], np.mean(thetas, axis=0)
    if rule == "uniform":
        return mean
    if rule == "weighted":
        weights = np.array(options["weights"])
        return np.tensordot(weights / weights.sum(), np.array(thetas), axes=1)
    if rule == "lambda":
        return (1 - options["lam"]) * thetas[0] + options["lam"] * thetas[1]
    if rule == "slerp":
        merged = deltas[0]
        for m, delta in enumerate(deltas[1:], start=2):
            merged = arc(merged, delta, options.get("lam", 1 / m))
        return base + merged
    if rule == "liti":
        return (1 - options["eta"]) * base + options["eta"] * mean
    if rule == "stock":
        count = len(deltas)
        pairs = [math.cos(angle(deltas[i], deltas[j])) for i in range(count) for j in range(i)]
        cos = max(0.0, sum(pairs) / len(pairs))
        t = count * cos / (1 + (count - 1) * cos)
        return t * mean + (1 - t) * base
    raise AssertionError(f"rule {rule!r} has no reference formula in this test")


def test_every_rule_has_options_in_this_test() -> None:
    assert VALID.keys() == RULES.keys()


# --- the contract ---


@pytest.mark.parametrize(
    ("rule", "count", "same_base"),
    [(rule, count, True) for rule, count in CASES]
    + [(rule, count, False) for rule, count in CASES if rule in NEEDS_BASE and rule not in PULLED_TO_BASE],
)
def test_copies_of_one_checkpoint_come_back(tmp_path: Path, rule: str, count: int, same_base: bool) -> None:
    one = tensors(1)
    base = (one if same_base else tensors(9)) if RULES[rule].needs_base else None
    merged = merge(tmp_path, [one] * count, base, rule=rule, **VALID[rule](count))
    same_bits(narrow(merged), narrow(one))
    torch.testing.assert_close(merged, one, rtol=count * 2**-52, atol=2**-52)


@pytest.mark.parametrize(("rule", "count"), CASES)
def test_coefficients_sum_to_one(rule: str, count: int) -> None:
    rng = np.random.default_rng(count)
    for _ in range(20):
        deltas = rng.normal(size=(count, 30)) + rng.normal()
        chosen = RULES[rule].coefficients(count, Options(**VALID[rule](count)), (deltas @ deltas.T).tolist())
        assert len(chosen.members) == count
        assert RULES[rule].needs_base or chosen.base == 0
        assert (math.fsum(chosen.members) + chosen.base) / chosen.divisor == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize(("rule", "count"), CASES)
def test_output_is_the_formula_rounded_once(tmp_path: Path, rule: str, count: int) -> None:
    members, base = [tensors(seed) for seed in range(count)], tensors(50, spread=0.0)
    options = VALID[rule](count)
    merged = merge(tmp_path, members, base if RULES[rule].needs_base else None, rule=rule, **options)
    for name, found in merged.items():
        flat = [member[name].double().numpy().ravel() for member in members]
        exact = torch.from_numpy(reference(rule, flat, base[name].double().numpy().ravel(), options))
        off = (found.double().view(-1) - exact).abs()
        rounding = (exact.to(found.dtype).double() - exact).abs()
        assert (found.dtype, found.shape) == (base[name].dtype, base[name].shape)
        assert (off <= rounding + 1e-14 * exact.abs().max()).all(), f"{name}: {off.max()}"


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("rule", SYMMETRIC)
def test_the_order_of_members_does_not_matter(tmp_path: Path, rule: str, count: int) -> None:
    members = [narrow(tensors(seed)) for seed in range(count)]
    base = narrow(tensors(50, spread=0.0)) if RULES[rule].needs_base else None
    first = merge(tmp_path, members, base, rule=rule, **VALID[rule](count))
    for order in ([*range(1, count), 0], [*reversed(range(count))]):
        same_bits(merge(tmp_path, [members[i] for i in order], base, rule=rule, **VALID[rule](count)), first)


def signed_zeros(first: float, second: float) -> dict[str, torch.Tensor]:
    values = torch.tensor([[1.0, first, 0.1, second, 1e-42]])
    return {"score.weight": values, "rest": torch.tensor([first, second, 3.0, 4.0])}


@pytest.mark.parametrize(
    ("rule", "options", "expected"),
    [
        ("lambda", {"lam": 0.0}, 0),
        ("lambda", {"lam": 1.0}, 1),
        ("slerp", {"lam": 0.0}, 0),
        ("slerp", {"lam": 1.0}, 1),
        ("liti", {"eta": 0.0}, "base"),
        ("weighted", {"weights": (1.0, 0.0)}, 0),
        ("weighted", {"weights": (0.0, 1.0)}, 1),
    ],
)
def test_end_points_are_a_checkpoint_to_the_bit(
    tmp_path: Path, rule: str, options: dict[str, float], expected: int | str
) -> None:
    members, base = [signed_zeros(-0.0, 0.0), signed_zeros(0.0, -0.0)], signed_zeros(-0.0, -0.0)
    members[0]["rest"] = torch.tensor([-0.0, 0.0, 2.7, 0.5])
    members[0]["score.weight"][0, 2], members[1]["score.weight"][0, 0] = 0.3, -1.7
    merged = merge(tmp_path, members, base if RULES[rule].needs_base else None, rule=rule, **options)
    same_bits(merged, base if expected == "base" else members[int(expected)])


def test_liti_at_one_is_the_uniform_mean_to_the_bit(tmp_path: Path) -> None:
    members = [tensors(seed) for seed in range(3)]
    pulled = merge(tmp_path, members, tensors(50, spread=0.0), rule="liti", eta=1.0)
    same_bits(pulled, merge(tmp_path, members))


@pytest.mark.parametrize(("rule", "count"), [case for case in CASES if case[0] in NEEDS_BASE])
def test_tensors_that_no_member_moved_stay_the_base(tmp_path: Path, rule: str, count: int) -> None:
    base = tensors(50, spread=0.0)
    frozen = {name: tensor for name, tensor in narrow(base).items() if name.endswith("bias")}
    members = [tensors(seed) | frozen for seed in range(count)]
    merged = merge(tmp_path, members, base, rule=rule, **VALID[rule](count))
    same_bits({name: merged[name] for name in frozen}, frozen)
    assert len(frozen) == 3


def test_one_member_that_did_not_move(tmp_path: Path) -> None:
    """A zero task vector has no direction: slerp takes the straight line, stock leaves its pairs out."""
    base = tensors(50, spread=0.0)
    moved, other = tensors(1), tensors(2)
    halfway = merge(tmp_path, [moved, base], base, rule="slerp")
    same_bits(narrow(halfway), narrow(merge(tmp_path, [moved, base])))
    same_bits(narrow(merge(tmp_path, [moved, base], base, rule="stock")), narrow(halfway))
    three = merge(tmp_path, [moved, base, other], base, rule="stock")
    for name in base:
        origin = base[name].double().numpy().ravel()
        deltas = [(m[name].double().numpy().ravel() - origin) for m in (moved, other)]
        cos = max(0.0, math.cos(angle(*deltas)))
        t = 3 * cos / (1 + 2 * cos)
        expected = torch.from_numpy(origin + t * (deltas[0] + deltas[1]) / 3).to(three[name].dtype)
        torch.testing.assert_close(three[name].view(-1), expected, rtol=1e-14, atol=1e-14)


def test_slerp_of_opposite_task_vectors_is_the_straight_line(tmp_path: Path) -> None:
    """No arc between them is shortest; and in a tensor of one element two directions are the same or opposite."""
    base = {"score.weight": torch.zeros(1, 4), "model.x": torch.tensor([1.0, 2.0, 4.0])}
    step = torch.tensor([0.5, -0.25, 1.0])
    ahead = {"score.weight": torch.tensor([[1.0, 0, 2, 0]]), "model.x": base["model.x"] + step}
    behind = {"score.weight": torch.tensor([[0.0, 3, 1, 0]]), "model.x": base["model.x"] - step}
    merged = merge(tmp_path, [ahead, behind], base, rule="slerp", lam=0.25)
    assert torch.equal(merged["model.x"], base["model.x"] + 0.5 * step)


# --- each rule against its paper ---


def test_uniform_and_weighted_by_hand() -> None:
    assert uniform(3, Options()) == Coefficients((1.0, 1.0, 1.0), divisor=3.0)
    assert weighted(2, Options(weights=(0.25, 0.75))) == Coefficients((0.25, 0.75))
    assert weighted(2, Options(weights=(1, 3), normalize=True)) == Coefficients((1, 3), divisor=4.0)
    assert weighted(2, Options(weights=(1.5, -0.5))) == Coefficients((1.5, -0.5))
    assert liti(2, Options(eta=0.25)) == Coefficients((0.25, 0.25), base=1.5, divisor=2.0)


@pytest.mark.parametrize("lam", [None, 0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("degrees", [1e-3, 17, 90, 120, 179])
def test_slerp_of_two_is_the_textbook_formula(degrees: float, lam: float | None) -> None:
    a = np.array([2.0, 0.0, 0.0])
    b = 0.7 * np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), 0.0])
    deltas = np.array([a, b])
    chosen = slerp(2, Options(lam=lam), (deltas @ deltas.T).tolist())
    found = np.tensordot(np.array(chosen.members), deltas, axes=1)
    tolerance = 1e-15 / math.sin(math.radians(degrees)) ** 2 + 1e-14  # acos loses digits near 0 and 180 degrees
    np.testing.assert_allclose(found, arc(a, b, 0.5 if lam is None else lam), atol=tolerance)
    assert chosen.divisor == 1
    assert chosen.base == pytest.approx(1 - sum(chosen.members), abs=1e-12)


def test_slerp_keeps_the_norm_of_equally_long_task_vectors() -> None:
    """What the arc is for: the straight line between orthogonal unit vectors would give norm 0.707."""
    chosen = slerp(2, Options(lam=0.5), [[1.0, 0.0], [0.0, 1.0]])
    assert math.hypot(*chosen.members) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("count", [3, 4, 6])
def test_slerp_of_many_takes_them_one_after_the_other_with_one_over_m(count: int) -> None:
    deltas = np.random.default_rng(3).normal(size=(count, 20)) + 0.5
    chosen = slerp(count, Options(), (deltas @ deltas.T).tolist())
    merged = deltas[0]
    for m in range(2, count + 1):
        merged = arc(merged, deltas[m - 1], 1 / m)
    np.testing.assert_allclose(np.tensordot(np.array(chosen.members), deltas, axes=1), merged, rtol=1e-12)


@pytest.mark.parametrize("cos", [0.0, 0.3, 0.8, 1.0])
def test_stock_of_two_is_equation_4(cos: float) -> None:
    """Model Stock: t = 2 cos / (1 + cos) for two members, from the angle alone, whatever their lengths."""
    chosen = stock(2, Options(), [[4.0, 6.0 * cos], [6.0 * cos, 9.0]])
    t = 2 * cos / (1 + cos)
    np.testing.assert_allclose([c / chosen.divisor for c in chosen.members], [t / 2, t / 2], atol=1e-15)
    assert chosen.base / chosen.divisor == pytest.approx(1 - t, abs=1e-15)


def test_stock_of_three_takes_the_mean_cosine_of_the_pairs() -> None:
    gram = [[1.0, 0.2, 0.4], [0.2, 1.0, 0.6], [0.4, 0.6, 1.0]]
    chosen = stock(3, Options(), gram)
    t = 3 * 0.4 / (1 + 2 * 0.4)
    assert [c / chosen.divisor for c in chosen.members] == pytest.approx([t / 3] * 3, abs=1e-15)
    assert chosen.base / chosen.divisor == pytest.approx(1 - t, abs=1e-15)


def test_stock_of_members_that_point_apart_is_the_base() -> None:
    chosen = stock(2, Options(), [[1.0, -0.5], [-0.5, 1.0]])
    assert chosen.members == (0.0, 0.0)
    assert chosen.base / chosen.divisor == 1


@pytest.mark.parametrize("rule", ["slerp", "stock"])
@pytest.mark.parametrize("size", [1e-170, 1e-90, 1e90, 1e170])
def test_the_length_of_task_vectors_does_not_matter(rule: str, size: float) -> None:
    """Their angle decides: products of very small or large inner products must not underflow or overflow."""
    gram = [[1.0, 0.5], [0.5, 1.0]]
    plain, scaled = (
        RULES[rule].coefficients(2, Options(), [[value * factor for value in row] for row in gram])
        for factor in (1.0, size)
    )
    assert scaled.members == pytest.approx(plain.members, rel=1e-12)
    assert scaled.base == pytest.approx(plain.base, rel=1e-12)


# --- options that cannot be used ---

OTHER_WRONG = [
    ("weighted", {}, 2, "--weights: expected 2 numbers, one for each checkpoint, found none"),
    ("weighted", {"weights": (1.0,)}, 2, "--weights: expected 2 numbers, one for each checkpoint, found 1"),
    ("weighted", {"weights": (0.5, 0.6)}, 2, "--weights sum to 1.1, expected 1; change them, or add --normalize"),
    (
        "weighted",
        {"weights": (-1.0, 0.5), "normalize": True},
        2,
        "--weights must be finite and have a positive sum; found [-1.0, 0.5]",
    ),
    ("weighted", {"weights": (1.0, -1.0)}, 2, "--weights must be finite and have a positive sum; found [1.0, -1.0]"),
    (
        "weighted",
        {"weights": (math.nan, 0.5)},
        2,
        "--weights must be finite and have a positive sum; found [nan, 0.5]",
    ),
    (
        "weighted",
        {"weights": (math.inf, -math.inf)},
        2,
        "--weights must be finite and have a positive sum; found [inf, -inf]",
    ),
    ("lambda", {}, 2, "--lambda: expected a number from 0 to 1, found None"),
    ("lambda", {"lam": 1.5}, 2, "--lambda: expected a number from 0 to 1, found 1.5"),
    ("lambda", {"lam": -0.1}, 2, "--lambda: expected a number from 0 to 1, found -0.1"),
    ("lambda", {"lam": math.nan}, 2, "--lambda: expected a number from 0 to 1, found nan"),
    ("lambda", {"lam": 0.5}, 3, "--rule lambda takes 2 checkpoints, found 3"),
    ("slerp", {"lam": 2.0}, 2, "--lambda: expected a number from 0 to 1, found 2.0"),
    (
        "slerp",
        {"lam": 0.5},
        3,
        "--lambda with --rule slerp takes two checkpoints; more are merged with 1/m each",
    ),
    ("liti", {}, 2, "--eta: expected a number from 0 to 1, found None"),
    ("liti", {"eta": 1.01}, 2, "--eta: expected a number from 0 to 1, found 1.01"),
    ("uniform", {"lam": 0.0}, 2, "--lambda is not used by --rule uniform"),
    (
        "uniform",
        {"weights": (0.5, 0.5), "normalize": True, "lam": 0.5, "eta": 0.5},
        2,
        "--weights is not used by --rule uniform; --normalize is not used by --rule uniform; --lambda is not used by "
        "--rule uniform; --eta is not used by --rule uniform",
    ),
    ("stock", {"eta": 0.5}, 2, "--eta is not used by --rule stock"),
]


@pytest.mark.parametrize(("rule", "options", "count", "message"), OTHER_WRONG)
def test_wrong_options(rule: str, options: dict[str, Any], count: int, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_options(RULES[rule], Options(**options), count, has_base=True)
    assert str(caught.value) == message


def test_weights_whose_sum_overflows() -> None:
    with pytest.raises(UsageError, match="--weights must be finite and have a positive sum"):
        check_options(RULES["weighted"], Options(weights=(1e308, 1e308), normalize=True), 2, has_base=False)


@pytest.mark.parametrize("rule", RULES)
def test_a_missing_base_and_options_of_other_rules_are_named(rule: str) -> None:
    row = RULES[rule]
    if row.needs_base:
        with pytest.raises(UsageError, match=f"^--rule {rule} needs --base, the checkpoint that the members started"):
            check_options(row, Options(**VALID[rule](2)), 2, has_base=False)
    everything = {"weights": (0.5, 0.5), "normalize": True, "lam": 0.5, "eta": 0.5}
    flags = {"weights": "--weights", "normalize": "--normalize", "lam": "--lambda", "eta": "--eta"}
    for option in everything.keys() - row.options:
        with pytest.raises(UsageError) as caught:
            check_options(row, Options(**VALID[rule](2) | {option: everything[option]}), 2, has_base=True)
        assert str(caught.value) == f"{flags[option]} is not used by --rule {rule}"
    check_options(row, Options(**VALID[rule](2)), 2, has_base=row.needs_base)


def test_a_base_that_no_rule_would_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        merge(tmp_path, [tensors(1), tensors(2)], tensors(50), rule="uniform")
    assert str(caught.value) == (
        "--base is not used: --rule uniform does not need it, and no checkpoint is a LoRA adapter"
    )


def test_an_unknown_rule_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        merge(tmp_path, [tensors(1), tensors(2)], rule="mean")
    assert list(RULES)[:3] == ["uniform", "weighted", "lambda"]
    assert str(caught.value) == f"--rule: expected one of {', '.join(RULES)}, found 'mean'"


def test_a_base_that_lacks_tensors_or_has_other_shapes(tmp_path: Path) -> None:
    base = tensors(50) | {"f32.model.b.bias": torch.zeros(8)}
    del base["f16.score.weight"]
    with pytest.raises(RefusedError) as caught:
        merge(tmp_path, [tensors(1), tensors(2)], base, rule="stock")
    message = str(caught.value)
    assert "tensor 'f16.score.weight' is missing from the base; give the model that the members started from" in message
    assert "tensor 'f32.model.b.bias' is F32 [8] in the base, F32 [7] in the members" in message
    assert message.startswith("refused, 2 findings:")
