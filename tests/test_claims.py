"""Claims of the paper: verdicts follow the numbers, each sentence has them, and nothing is said without rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import mean
from typing import Any

import pytest

from warmerge.errors import UsageError
from warmerge.report.claims import Claim, claims_of, in_words
from warmerge.report.claims.claim import over_seeds
from warmerge.report.results import BON, CURVE, EVAL, RL, TRAINING, VS_M

Row = dict[str, Any]
MEMBERS, HALFWAY = "mean of the members", "mean of the half-way models"
RAW, STANDARDISED = "ensemble (mean)", "ensemble (mean, standardised)"
# Intervals of a difference that are above 0, below 0, around 0.
UP, DOWN, OPEN = (0.05, 0.03, 0.07), (-0.05, -0.07, -0.03), (0.004, -0.01, 0.02)


def of(kind: str, content: Row) -> list[Claim]:
    return claims_of([("results", kind, json.loads(json.dumps(content)))])


def one(kind: str, content: Row, paper: str) -> Claim:
    (claim,) = (claim for claim in of(kind, content) if paper in claim.paper)
    return claim


# --- eval ---


def model(name: str, kind: str, accuracy: float, where: str = "val") -> Row:
    return {"set": where, "model": name, "kind": kind, "n": 400, "prompts": 100, "accuracy": accuracy}


def difference(against: str, gap: Sequence[float | None], where: str = "val", prompts: int = 100) -> Row:
    value, low, high = gap
    return {"set": where, "a": "average", "b": against, "n": 400, "prompts": prompts, "difference": value,
            "low": low, "high": high}  # fmt: skip


def evaluation(*differences: Row, sets: Sequence[str] = ("val",), extra: Sequence[Row] = ()) -> Row:
    rows = [
        row for where in sets for row in (
            model("01", "member", 0.70, where), model("02", "member", 0.74, where),
            model(RAW, "ensemble", 0.75, where), model("average", "average", 0.77, where),
        )
    ]  # fmt: skip
    rows += extra
    for where in {row["set"] for row in rows}:
        _settle([row for row in rows if row["set"] == where], [row for row in differences if row["set"] == where])
    return {"rows": rows, "differences": list(differences)}


def _settle(rows: Sequence[Row], differences: Sequence[Row]) -> None:
    """Makes the accuracies of a set what its differences say: of the average by its members, of others by it."""
    average = next((row for row in rows if row["kind"] == "average"), None)
    known = [row for row in differences if isinstance(row["difference"], float)]
    members = [row["accuracy"] for row in rows if row["kind"] == "member"]
    for row in known:
        if average and row["b"] == MEMBERS and members:
            average["accuracy"] = mean(members) + row["difference"]
    for row in known:
        for other in rows:
            if average and other["model"] == row["b"]:
                other["accuracy"] = average["accuracy"] - row["difference"]


@pytest.mark.parametrize(
    ("gap", "verdict", "seen"),
    [
        (UP, "agrees", "On val the average is more accurate than the mean of its 2 members (01 and 02): 77.0 % against "
         "72.0 %, +5.0 points (95 % interval +3.0 to +7.0; n = 400 comparisons of 100 prompts)."),
        (DOWN, "disagrees", "On val the average is less accurate than the mean of its 2 members (01 and 02): 67.0 % "
         "against 72.0 %, -5.0 points (95 % interval -7.0 to -3.0; n = 400 comparisons of 100 prompts)."),
        (OPEN, "cannot tell", "On val it cannot be told whether the average is more accurate than the mean of its 2 "
         "members (01 and 02): 72.4 % against 72.0 %, +0.4 points (95 % interval -1.0 to +2.0; n = 400 comparisons of "
         "100 prompts)."),
        # 0 is in it: rounding must not hide that.
        ((0.02, 0.0, 0.04), "cannot tell", None),
        ((-0.02, -0.04, 0.0), "cannot tell", None),
        ((0.02, 0.00004, 0.04), "agrees", None),
    ],
)  # fmt: skip
def test_the_average_against_its_members(gap: tuple[float, float, float], verdict: str, seen: str | None) -> None:
    (claim,) = of(EVAL, evaluation(difference(MEMBERS, gap)))
    assert (claim.verdict, claim.source) == (verdict, "results")
    assert claim.paper.startswith("an average is more accurate than the models that it is made of (figure 4")
    if seen:
        assert claim.seen == seen
    elif verdict == "agrees":
        assert "(95 % interval +0.004 to +4.000;" in claim.seen


@pytest.mark.parametrize(
    ("prompts", "verdict", "words"),
    [(30, "agrees", ""), (29, "agrees", " Only 29 prompts: the interval is a rough guess."),
     (9, "cannot tell", " Only 9 prompts: too few for any interval to be trusted.")],
)  # fmt: skip
def test_few_prompts_are_said_and_very_few_decide_nothing(prompts: int, verdict: str, words: str) -> None:
    claims = of(
        EVAL, evaluation(difference(MEMBERS, UP, prompts=prompts), difference(RAW, (0.0, 0, 0), prompts=prompts))
    )
    assert [claim.verdict for claim in claims] == [verdict, verdict]
    assert all(claim.seen.endswith(f"of {prompts} prompts).{words}") for claim in claims)


def test_a_difference_without_an_interval_decides_nothing() -> None:
    (claim,) = of(EVAL, evaluation(difference(MEMBERS, (0.25, None, None))))
    assert claim.verdict == "cannot tell"
    assert "+25.0 points (no interval is known; n = 400" in claim.seen


@pytest.mark.parametrize(
    ("gap", "verdict", "words"),
    [
        ((0.001, -0.008, 0.01), "agrees", "the average is as accurate as the ensemble of its members' rewards"),
        ((0.03, 0.011, 0.05), "disagrees", "On val the average is more accurate than the ensemble of its members' "
         "rewards, by over 1 point: 77.0 % against 74.0 %, +3.0 points (95 % interval +1.1"),
        ((-0.03, -0.05, -0.011), "disagrees", "the average is less accurate than the ensemble"),
        ((-0.02, -0.04, -0.002), "cannot tell", "It is less accurate; whether by over 1 point is open."),
        ((0.0, -0.02, 0.02), "cannot tell", "it cannot be told whether the average is as accurate as the ensemble"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("which", [RAW, STANDARDISED])
def test_the_average_and_the_ensemble_to_one_point(
    which: str, gap: tuple[float, float, float], verdict: str, words: str
) -> None:
    (claim,) = of(EVAL, evaluation(difference(which, gap)))
    if which == STANDARDISED:
        words = words.replace("members' rewards", "members' standardised rewards").replace(
            "77.0 % against 74.0 %, ", ""
        )
    assert claim.verdict == verdict
    assert words in claim.seen
    assert "Observation 2" in claim.paper


def noisy(memory: float, *differences: Row, held_out: Sequence[str] = ("val",)) -> Row:
    """Members that are wrong on 28 % of the held-out pairs, and agree with a share of the swapped labels."""
    parts = [model(name, "member", memory, "train[swapped]") for name in ("01", "02")]
    parts += [model("average", "average", 0.35, "train[swapped]"), model("average", "average", 0.9, "train[clean]")]
    return evaluation(*differences, sets=held_out, extra=parts)


@pytest.mark.parametrize(("gap", "verdict"), [(DOWN, "agrees"), (UP, "disagrees"), (OPEN, "cannot tell")])
@pytest.mark.parametrize("against", [MEMBERS, RAW, STANDARDISED])
def test_swapped_labels_are_forgotten(gap: tuple[float, float, float], verdict: str, against: str) -> None:
    (claim,) = of(EVAL, noisy(0.6, difference(against, gap, "train[swapped]")))
    assert claim.verdict == verdict
    assert "Observation 3" in claim.paper
    who = {
        MEMBERS: "its 2 members (01 and 02)", RAW: "the ensemble of its members' rewards",
        STANDARDISED: "the ensemble of its members' standardised rewards",
    }[against]  # fmt: skip
    verb = "agrees with more" if verdict == "disagrees" else "agrees with fewer"
    share = {DOWN: 5.0, UP: -5.0, OPEN: -0.4}[gap]
    ours = 60 - share if against == MEMBERS else 35.0
    if against != STANDARDISED:
        assert "wrong labels among the swapped training labels" in claim.short[0]
        assert (
            claim.short[1:]
            == {
                MEMBERS: ("than its members", f"{ours:.1f} % against 60.0 %"),
                RAW: ("than the ensemble", f"of plain rewards {gap[0] * 100:+.1f} points"),
            }[against]
        )
    whether = "it cannot be told whether " if verdict == "cannot tell" else ""
    assert claim.seen.startswith(f"On train[swapped] {whether}the average {verb} wrong labels than {who}: ")


def test_label_noise_that_was_not_memorised_tests_nothing() -> None:
    gaps = [difference(against, DOWN, "train[swapped]") for against in (MEMBERS, RAW, HALFWAY)]
    (claim,) = of(EVAL, noisy(0.375, *gaps))
    assert claim.verdict == "cannot tell"
    assert claim.seen == (
        "On train[swapped] members agree with 37.5 % of the swapped labels (n = 400 comparisons of 100 prompts), and "
        "are wrong on 28.0 % of val: that is not 10 points more, so they did not memorise label noise that an average "
        "could remove."
    )
    (claim,) = of(EVAL, noisy(0.9, *gaps, held_out=()))
    assert claim.seen.endswith("cannot be told without a set that they were not trained on.")
    assert claim.verdict == "cannot tell"


def test_accuracy_on_clean_training_pairs_is_also_memory_and_held_against_nothing() -> None:
    gaps = [difference(against, UP, "train[clean]") for against in (MEMBERS, RAW, STANDARDISED, "start", HALFWAY)]
    assert of(EVAL, noisy(0.9, *gaps)) == []


@pytest.mark.parametrize(
    ("gap", "changes", "what"),
    [
        (UP, {"difference": 0.0501, "high": 0.07},
         "the accuracies of average and mean of the members on val of 0.05, found 0.0501"),
        ((0.05, 0.06, 0.07), {}, "expected low <= difference <= high, found 0.06, 0.05, 0.07"),
        ((0.05, 0.03, 0.04), {}, "expected low <= difference <= high, found 0.03, 0.05, 0.04"),
    ],
)  # fmt: skip
def test_numbers_that_contradict_each_other_are_refused(gap: Sequence[float], changes: Row, what: str) -> None:
    content = evaluation(difference(MEMBERS, gap))
    content["differences"][0] |= changes
    with pytest.raises(UsageError) as caught:
        of(EVAL, content)
    assert str(caught.value).startswith("results: eval.json is not a result of warmerge: ")
    assert what in str(caught.value)
    with pytest.raises(UsageError, match="low <= difference <= high"):
        of(BON, choices(differences=[worth("ens", "warm", (0.05, 0.06, 0.07))]))


def test_a_set_called_swapped_without_its_other_part_is_a_set_like_others() -> None:
    content = evaluation(difference(MEMBERS, UP, "x[swapped]"), sets=("x[swapped]",))
    (claim,) = of(EVAL, content)
    assert claim.seen.startswith("On x[swapped] the average is more accurate than")


@pytest.mark.parametrize(("gap", "verdict"), [(UP, "agrees"), (DOWN, "disagrees"), (OPEN, "cannot tell")])
@pytest.mark.parametrize(
    ("against", "implied", "who"),
    [
        ("start", "the start alone, its probed head without further training", "the start that its members share"),
        (HALFWAY, "shrinking each member half-way back to its start", "its members half-way back to their start"),
        ("gentle", "the single model gentle measured beside it", "the model gentle measured beside it"),
    ],
)
def test_what_the_paper_does_not_compare_with(
    against: str, implied: str, who: str, gap: tuple[float, float, float], verdict: str
) -> None:
    extra = [model("start", "start", 0.6), model("gentle", "beside", 0.75)]
    content = evaluation(difference(against, gap), extra=extra)
    (claim,) = of(EVAL, content)
    assert (claim.paper, claim.verdict) == (f"not reported: averaging is worth more than {implied}", verdict)
    assert claim.beyond
    assert f"than {who}: 77.0 %" in claim.seen or against == HALFWAY
    assert f"{gap[0] * 100:+.1f} points" in claim.seen


def test_a_control_that_memorises_less_is_said() -> None:
    content = noisy(0.6, *(difference(name, UP, "train[swapped]") for name in (HALFWAY, "start")))
    (claim,) = of(EVAL, content)  # the start was never trained, so that nothing can be made of it
    assert claim.verdict == "disagrees"
    assert claim.paper == (
        "not reported: averaging removes more label noise than shrinking each member half-way back to its start"
    )
    assert "agrees with more wrong labels than its members half-way back to their start" in claim.seen


# --- paths ---


def path(
    name: str = "a -> b", gap: Sequence[float] = (0.002, -0.001, 0.004), where: str = "val", **changes: Any
) -> Row:
    keys = ("barrier", "low", "high")
    below = dict.fromkeys(("below_ensemble", "below_ensemble_low", "below_ensemble_high"), 0.0)
    return {"path": name, "set": where, "n": 400, "prompts": 100, **dict(zip(keys, gap, strict=True)), **below,
            "tolerance": 0.01, "against": "line", **changes}  # fmt: skip


def curve(*rows: Row, warnings: Sequence[str] = (), checkpoints: Sequence[str] = ("runs/a", "runs/b")) -> Row:
    return {"rows": [], "verdicts": list(rows), "warnings": list(warnings), "checkpoints": list(checkpoints)}


HOLDS, FAILS, UNDECIDED = (0.002, -0.001, 0.004), (0.05, 0.03, 0.08), (0.01, -0.02, 0.04)
HEADS = "runs/{}: tensor 'score.weight' has cosine 0.01 with runs/{}'s: these heads look independently drawn. Averaging"
BODY = "runs/{}: differs from runs/{} by 76% of its norm (over a sample): do they come from one pre-trained model? The"


@pytest.mark.parametrize(
    ("gap", "verdict", "words"),
    [(HOLDS, "agrees", "+0.2 points (95 % interval -0.1 to +0.4; n = 400 comparisons of 100 prompts), with a tolerance "
      "of 1: it holds."),
     (FAILS, "disagrees", "it does not hold."), (UNDECIDED, "cannot tell", "whether it holds cannot be told.")],
)  # fmt: skip
def test_observation_1(gap: tuple[float, float, float], verdict: str, words: str) -> None:
    (claim,) = of(CURVE, curve(path(gap=gap)))
    assert claim.verdict == verdict
    assert claim.seen.startswith("On val, from a to b, the largest fall below the line between their accuracies is ")
    assert claim.seen.endswith(words)
    assert "nowhere less accurate than the straight line" in claim.paper
    (few,) = of(CURVE, curve(path(gap=gap, prompts=5)))
    assert few.verdict == "cannot tell"


@pytest.mark.parametrize("warning", [HEADS.format("b", "a"), BODY.format("b", "a")])
@pytest.mark.parametrize(("gap", "verdict"), [(FAILS, "agrees"), (HOLDS, "disagrees"), (UNDECIDED, "cannot tell")])
def test_a_path_between_strangers_should_fail(gap: tuple[float, float, float], verdict: str, warning: str) -> None:
    (claim,) = of(CURVE, curve(path(gap=gap), warnings=[warning]))
    assert claim.verdict == verdict
    assert claim.paper.startswith("without a shared pre-training and a shared probed head, averaging weights fails")
    assert "These are models that do not share a start, as the warnings of the result say." in claim.seen


def test_only_the_paths_that_are_surely_of_strangers_are_judged_as_such() -> None:
    """Of three or more checkpoints a warning of heads names one pair; of the others nothing is known."""
    names, three = ("a -> b", "a -> c", "b -> c"), ("runs/a", "runs/b", "runs/c")
    rows = [path(name, FAILS) for name in names]
    heads = of(CURVE, curve(*rows, warnings=[HEADS.format("c", "b")], checkpoints=three))
    assert [(claim.verdict, claim.paper.split()[0]) for claim in heads] == [
        ("cannot tell", "between"), ("agrees", "without"),
    ]  # fmt: skip
    assert "models that may not share a start" in heads[0].seen
    bodies = of(CURVE, curve(*rows, warnings=[BODY.format("c", "a")], checkpoints=three))
    assert [(claim.verdict, claim.paper.split()[0]) for claim in bodies] == [
        ("disagrees", "between"), ("agrees", "without"),
    ]  # fmt: skip
    assert "of 2 paths: 2 fails" in bodies[1].seen
    (mean,) = of(CURVE, curve(path("a -> mean", HOLDS), warnings=[HEADS.format("c", "b")], checkpoints=three))
    assert mean.verdict == "cannot tell"


def test_many_paths_make_one_claim_for_each_set() -> None:
    three = ("runs/a", "runs/b", "runs/c")
    rows = [path("a -> b", HOLDS), path("a -> c", UNDECIDED), path("b -> c", FAILS), path("a -> b", HOLDS, "ood")]
    val, ood = of(CURVE, curve(*rows, checkpoints=three))
    assert (val.verdict, ood.verdict) == ("disagrees", "agrees")
    assert val.seen.startswith("On val, from b to c, the largest fall")
    assert val.seen.endswith("That is the largest of its kind of 3 paths: 1 holds, 1 fails, 1 is open.")
    (mixed,) = of(CURVE, curve(*rows[:2], checkpoints=three))
    assert mixed.verdict == "cannot tell"
    assert "from a to c" in mixed.seen


def test_where_an_end_only_guesses_the_ensemble_is_the_test() -> None:
    below = {"below_ensemble": 0.158, "below_ensemble_low": 0.096, "below_ensemble_high": 0.219}
    (claim,) = of(CURVE, curve(path(gap=HOLDS, against="ensemble", **below)))
    assert claim.verdict == "disagrees"
    assert (
        "the ensemble of both (the test where one end is no better than chance) is +15.8 points (95 % inter"
        in claim.seen
    )
    (claim,) = of(CURVE, curve(path(gap=HOLDS, **below)))
    assert claim.verdict == "agrees"
    assert claim.seen.endswith("Below the ensemble of both it is up to +15.8 points: do not merge them.")


# --- accuracy against M ---


def with_members(m: int, accuracy: float, half: float = 0.02, **changes: Any) -> Row:
    return {"set": "val", "m": m, "added": str(m), "n": 400, "prompts": 100, "wa": accuracy, "wa_low": accuracy - half,
            "wa_high": accuracy + half, "selected_on": False, **changes}  # fmt: skip


@pytest.mark.parametrize(("last", "verdict"), [(0.8, "agrees"), (0.6, "disagrees"), (0.73, "cannot tell")])
def test_accuracy_grows_with_members(last: float, verdict: str) -> None:
    content = {"order": "best-first", "rows": [with_members(3, last), with_members(1, 0.7), with_members(2, 0.7)]}
    (claim,) = of(VS_M, content)
    assert claim.verdict == verdict
    assert claim.paper.startswith("not reported: that an average of more members is more accurate")
    assert "On val, M = 1 is right on 70.0 % (68.0 % to 72.0 %) and M = 3 on " in claim.seen
    assert ("their intervals overlap" in claim.seen) == (verdict == "cannot tell")


def test_accuracy_against_m_that_says_nothing_of_averaging() -> None:
    rows = [with_members(1, 0.7, selected_on=True), with_members(2, 0.8, selected_on=True)]
    (claim,) = of(VS_M, {"order": "worst-first", "rows": rows})
    assert claim.verdict == "cannot tell"
    assert "cannot be told where each member is better than the one before." in claim.seen
    assert claim.seen.endswith("Members were ranked on this very set, which flatters every M.")
    (claim,) = of(VS_M, {"order": "random", "rows": [{**row, "prompts": 5} for row in rows]})
    assert claim.verdict == "cannot tell"
    assert "overlap" not in claim.seen
    assert of(VS_M, {"order": "greedy", "rows": rows[:1]}) == []


# --- best-of-N ---


def choices(
    peaks: Sequence[Row] = (), differences: Sequence[Row] = (), target: str = "gold", prompts: int = 100
) -> Row:
    kinds = {"m1": "rm", "m2": "rm", "ens": "ensemble", "uwo": "ensemble", "warm": "warm", "length": "baseline"}
    rows = [
        {"proxy": name, "kind": kind, "n": n, "prompts": prompts, target: 1.0}
        for name, kind in kinds.items()
        for n in (1, 64)
    ]
    return {"rows": rows, "peaks": list(peaks), "differences": list(differences)}


def top(name: str, fall: Sequence[float], peak_low: int = 8, kind: str = "rm", peak: int = 8) -> Row:
    return {"proxy": name, "kind": kind, "target": "gold", "peak_n": peak, "peak_low": peak_low, "peak_high": 64,
            "fall": fall[0], "fall_low": fall[1], "fall_high": fall[2]}  # fmt: skip


def worth(name: str, to: str, gap: Sequence[float], n: int = 64, target: str = "gold") -> Row:
    return {"proxy": name, "to": to, "n": n, "target": target, "difference": gap[0], "low": gap[1], "high": gap[2]}


@pytest.mark.parametrize(
    ("peaks", "verdict", "seen"),
    [
        ([top("m1", (0.4, 0.2, 0.6)), top("m2", (0.3, 0.1, 0.5))], "agrees",
         "By gold, choices of 2 of 2 single models are surely worth less at n = 64 than at the best n (100 prompts). "
         "The most is lost by m1: 0.40 since n = 8 (95 % interval +0.20 to +0.60)."),
        ([top("m1", (0.4, 0.2, 0.6)), top("m2", (0.3, -0.1, 0.5))], "cannot tell", "of 1 of 2 single models are"),
        ([top("m1", (0, 0, 0), 64, peak=64), top("m2", (0, 0, 0), 64, peak=64)], "disagrees",
         "All are surely worth most at n = 64 itself: there is no over-optimisation up to there."),
        ([top("m1", (0, 0, 0), 48, peak=64)], "cannot tell", "choices of 0 of 1 single model are surely worth less"),
    ],
)  # fmt: skip
def test_best_of_n_over_optimises_single_models(peaks: Sequence[Row], verdict: str, seen: str) -> None:
    ensemble = top("ens", (9.0, 8.0, 10.0), kind="ensemble")
    (claim,) = of(BON, choices([*peaks, ensemble]))
    assert claim.verdict == verdict
    assert seen in claim.seen
    (few,) = of(BON, choices(peaks, prompts=8))
    assert few.verdict == "cannot tell"
    assert claim.beyond
    assert "Gao et al., arXiv 2210.10760" in claim.paper


@pytest.mark.parametrize(
    ("average", "words"),
    [
        (top("warm", (0.3, 0.1, 0.5), kind="warm"), "are surely worth less than at the best n: 0.30 since n = 8 (95"),
        (top("warm", (0, 0, 0), 64, "warm", 64), "are surely worth most at n = 64 itself."),
        (top("warm", (0, 0, 0), 8, "warm", 64), "are worth most at n = 64: whether they get worse cannot be told."),
        (top("warm", (0.1, -0.1, 0.3), kind="warm"), "lost 0.10 since n = 8 (95 % interval -0.10 to +0.30): whether"),
    ],
)  # fmt: skip
def test_best_of_n_by_the_average_is_told_beside_single_models(average: Row, words: str) -> None:
    (claim,) = of(BON, choices([top("m1", (0.4, 0.2, 0.6)), average]))
    assert claim.verdict == "agrees"
    assert "of 1 of 1 single model are" in claim.seen
    assert f" Those of the average (warm) {words}" in claim.seen
    assert of(BON, choices([average])) == []


@pytest.mark.parametrize("name", [5, None, ["m1"]])
def test_a_proxy_that_is_no_text_is_refused(name: object) -> None:
    with pytest.raises(UsageError, match=r"expected a name for 'proxy' in each row of peaks, found"):
        of(BON, choices([top("m1", UP) | {"proxy": name}]))


@pytest.mark.parametrize(
    ("m1", "m2", "verdict", "words"),
    [
        (UP, UP, "agrees", "are worth more than those of m1 (+0.05, 95 % interval +0.03 to +0.07), m2 (+0.05, 95"),
        (UP, OPEN, "cannot tell", "more than those of m1 (+0.05, 95 % interval +0.03 to +0.07); not surely more or "
         "less than those of m2 (+0.004, 95 % interval -0.010 to +0.020); n = 100 prompts."),
        (UP, DOWN, "disagrees", "less than those of m2 (-0.05, 95 % interval -0.07 to -0.03)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("reversed_", [True, False])
def test_choices_of_the_average_against_single_models(
    m1: tuple[float, float, float], m2: tuple[float, float, float], verdict: str, words: str, reversed_: bool
) -> None:
    """Differences are to one proxy: to the average, of which the sign is turned, or from it to the reference."""
    if reversed_:
        rows = [worth(name, "warm", (-gap[0], -gap[2], -gap[1])) for name, gap in (("m1", m1), ("m2", m2))]
        rows += [worth("length", "warm", UP), worth("m1", "warm", UP, n=1), worth("m1", "warm", UP, target="control")]
        (claim,) = of(BON, choices(differences=rows))
        assert words in claim.seen
    else:
        (claim,) = of(BON, choices(differences=[worth("warm", "m2", m2), worth("m1", "m2", UP)]))
        verdict = {UP: "agrees", OPEN: "cannot tell", DOWN: "disagrees"}[m2]
    assert claim.verdict == verdict
    assert "worth more than a single model's" in claim.paper


@pytest.mark.parametrize(("gap", "verdict"), [(DOWN, "agrees"), (UP, "disagrees"), (OPEN, "cannot tell")])
def test_choices_of_the_average_against_each_ensemble(gap: tuple[float, float, float], verdict: str) -> None:
    found = of(BON, choices(differences=[worth("ens", "warm", gap), worth("uwo", "warm", gap)]))
    assert [claim.verdict for claim in found] == [verdict, verdict]
    assert ["ens (" in claim.seen for claim in found] == [True, False]
    assert all("worth more than the ensemble's" in claim.paper for claim in found)


def test_a_pool_without_a_target_says_nothing_and_a_control_reward_is_named() -> None:
    assert of(BON, {"rows": [{"proxy": "m1", "kind": "rm", "n": 1, "prompts": 9, "reward": 1.0}]}) == []
    (claim,) = of(BON, choices(differences=[worth("ens", "warm", UP, target="control")], target="control"))
    assert claim.seen.startswith("By control, choices of warm at n = 64")


# --- reinforcement learning ---


def runs(values: dict[str, Sequence[tuple[int, float]]], coef: float = 0.05, **changes: Any) -> Row:
    """A report with a run for each (seed, number) of each proxy; the number is its gain, and the KL of its peak."""
    kinds = {"single": "rm", "ensemble": "ensemble", "average": "warm", "true": "rm"}
    content: Row = {"runs": [], "peaks": [], "equal_kl": [], "ends": []}
    for group, own in values.items():
        for i, (seed, value) in enumerate(own):
            name = f"rl/{group}-{i}"
            checkpoints = ["gold.py:gold"] if group == "true" else ["m/01"]
            about = {"group": group, "run": name}
            proxy = {"name": group, "kind": kinds[group], "checkpoints": checkpoints}
            settings = {"control": "gold.py:gold", "settings": {"kl_coef": coef}}
            content["runs"].append({**about, "seed": seed, **settings, "proxy": proxy})
            content["peaks"].append({**about, "outcome": "declining", "step": 10, "kl": value, "control_gain": value,
                                     "control_error": 0.01, "proxy_error": 0.01, **changes})  # fmt: skip
            content["ends"].append({**about, "step": 200, "control_gain": -1.0, "proxy_gain": 1.0})
            content["equal_kl"] += [{**about, "at_kl": kl, "control_gain": value * kl} for kl in (0.5, 1.0)]
        for table in ("peaks", "equal_kl"):  # the group's own rows are no runs
            content[table].append({"group": group, "run": None, "at_kl": 1.0, "control_gain": 99.0, "kl": 99.0})
    return content


SINGLE = [(0, 0.4), (1, 0.5), (2, 0.45)]


def shifted(by: float, noise: float = 0.01) -> list[tuple[int, float]]:
    return [(seed, value + by + noise * (seed - 1)) for seed, value in SINGLE]


@pytest.mark.parametrize(("by", "verdict"), [(0.2, "agrees"), (-0.2, "disagrees"), (0.01, "cannot tell")])
@pytest.mark.parametrize(
    "paper", ["at the same KL, the average's policy", "peaks higher than a single model's", "peaks later than a single"]
)
def test_the_average_against_single_models_in_rl(by: float, verdict: str, paper: str) -> None:
    claim = one(RL, runs({"single": SINGLE, "average": shifted(by), "true": [(0, 9.0), (1, 9.0)]}), paper)
    assert claim.verdict == verdict
    assert f"{0.45 + by:.2f} (average, 3 runs) against 0.45 (single, 3 runs), {by:+.2f}" in claim.seen
    assert "n = 3 seeds, paired)" in claim.seen
    assert "figure 8" in claim.paper
    if paper.startswith("at the same KL"):
        shown = "Control gain at 1 nats (the largest shown KL that all runs of this report reached): "
        assert claim.seen.startswith(shown)


@pytest.mark.parametrize(("by", "verdict"), [(0.2, "agrees"), (-0.2, "disagrees"), (0.01, "cannot tell")])
def test_the_average_against_the_ensemble_in_rl(by: float, verdict: str) -> None:
    (claim,) = of(RL, runs({"ensemble": SINGLE, "average": shifted(by)}))
    assert claim.verdict == verdict
    assert claim.paper.startswith("not reported for more than two members")


def test_runs_are_paired_by_seed_and_several_of_a_seed_are_one() -> None:
    singles = [(0, 0.3), (0, 0.5), (1, 1.4)]
    claim = one(RL, runs({"single": singles, "average": [(0, 0.5), (1, 1.5), (7, 99.0)]}), "at the same KL")
    assert "1.00 (average, 3 runs) against 0.90 (single, 3 runs), +0.10 (95 % interval " in claim.seen
    assert "n = 2 seeds, paired)" in claim.seen


@pytest.mark.parametrize(
    ("average", "words"),
    [([(0, 5.4)], "+5.00 (no interval is known; n = 1 seed, paired)"),
     ([(7, 5.4), (8, 5.4)], "+5.00 (no interval is known; no seed in common)")],
)  # fmt: skip
def test_one_run_each_decides_nothing(average: list[tuple[int, float]], words: str) -> None:
    found = of(RL, runs({"single": [(0, 0.4)], "average": average}))[1:]
    assert len(found) == 3
    assert {claim.verdict for claim in found} == {"cannot tell"}
    assert all(words in claim.seen for claim in found)
    assert all("Without several seeds of both, whether that is more than luck is not known." in c.seen for c in found)


def test_a_peak_that_may_still_come_is_no_earlier_peak() -> None:
    content = runs({"single": SINGLE, "average": shifted(0.2)})
    content["peaks"][0]["outcome"] = "kept"
    claim = one(RL, content, "peaks later")
    assert claim.verdict == "cannot tell"
    assert "but in runs that have not fallen the peak may still come" in claim.seen
    flat = of(RL, runs({"single": SINGLE, "average": shifted(0.2)}, outcome="within noise"))
    assert [("peaks higher" in claim.paper, "peaks later" in claim.paper) for claim in flat].count((True, False)) == 1
    assert not [claim for claim in flat if "peaks later" in claim.paper]


@pytest.mark.parametrize(
    ("outcomes", "verdict", "hacked"),
    [
        (["over-optimised", "over-optimised", "kept"], "agrees", 2),
        (["over-optimised", "kept", "collapsed"], "cannot tell", 1),
        (["kept", "kept", "declining"], "cannot tell", 1),
        (["kept", "declining", "declining"], "agrees", 2),
        (["kept", "kept", "collapsed"], "cannot tell", 0),  # the proxy did not rise
        (["never rose", "within noise", "kept"], "agrees", 2),  # control fell, proxy rose: from the start on
    ],
)
def test_reward_hacking_in_rl(outcomes: Sequence[str], verdict: str, hacked: int) -> None:
    content = runs({"single": SINGLE, "true": [(0, 0.5)]})
    for row, outcome in zip(content["peaks"], outcomes, strict=False):
        row["outcome"] = outcome
    (claim,) = of(RL, content)
    assert claim.verdict == verdict
    assert claim.seen.startswith(
        f"Of 3 runs against single models (single), {hacked} hacked the proxy within 200 steps (the control reward "
    )
    assert ("More steps" in claim.seen) == (verdict == "cannot tell")
    if "never rose" in outcomes:
        assert claim.seen.endswith(
            "1 over-optimised from the start on (never rose in the table), 1 over-optimised from the start on (within "
            "noise in the table), 1 kept."
        )


@pytest.mark.parametrize(
    ("single", "average", "words"),
    [
        ("over-optimised", "declining", "hacked as well (3 of 3 runs): 3 declining."),
        ("kept", "over-optimised", "hacked (3 of 3 runs): 3 over-optimised."),
        ("over-optimised", "kept", "not hacked (0 of 3 runs): 3 kept."),
    ],
)
def test_how_the_average_s_own_policy_went_is_told_beside(single: str, average: str, words: str) -> None:
    content = runs({"single": SINGLE, "average": shifted(0.2)})
    for row in content["peaks"]:
        row["outcome"] = {"single": single, "average": average}[row["group"]]
    claim = of(RL, content)[0]
    assert claim.verdict == ("agrees" if single == "over-optimised" else "cannot tell")
    assert claim.seen.endswith(f" The average's policy (average): {words}")
    assert claim.short[2].endswith(f"; the average: {words[words.index('(') + 1 : words.index(')')]}")


@pytest.mark.parametrize(("control", "proxy"), [(-0.02, 1.0), (-1.0, 0.02), (0.5, 1.0), (None, None)])
def test_a_run_that_lost_no_more_than_its_noise_hacked_nothing(control: float | None, proxy: float | None) -> None:
    content = runs({"single": SINGLE}, outcome="never rose")
    for row in content["ends"]:
        row |= {"control_gain": control, "proxy_gain": proxy}
    (claim,) = of(RL, content)
    assert claim.verdict == "cannot tell"
    assert "0 hacked the proxy" in claim.seen


def of_two_coefficients(values: dict[str, Sequence[tuple[int, float]]]) -> Row:
    first, second = (runs(values, coef) for coef in (0.05, 0.1))
    for row in [row for rows in second.values() for row in rows if row["run"]]:
        row["run"] += "-other"
    return {name: [*rows, *second[name]] for name, rows in first.items()}


def test_runs_of_other_kl_coefficients_are_not_compared() -> None:
    one_, other = runs({"single": SINGLE}), runs({"average": shifted(0.2)}, coef=0.1)
    (claim,) = of(RL, {name: [*one_[name], *other[name]] for name in one_})
    assert "with a KL coefficient of 0.05" in claim.seen
    content = of_two_coefficients({"single": SINGLE, "average": shifted(0.2)})
    kl = "Control gain at 1 nats (the largest shown KL that all runs of this report reached)"
    seen = [claim.seen.split(": ")[0] for claim in of(RL, content)]
    assert [words for words in seen if words.startswith(kl)] == [
        f"{kl} with a KL coefficient of {coef}" for coef in (0.05, 0.1)
    ]


@pytest.mark.parametrize(("name", "checkpoint"), [("warm", "x"), ("rm", "runs/my-average"), ("below-average", "x")])
def test_what_a_proxy_is_says_its_kind_and_not_its_name(name: str, checkpoint: str) -> None:
    content = runs({"single": SINGLE})
    for run in content["runs"]:
        run["proxy"] |= {"name": name, "checkpoints": [checkpoint]}
    assert [claim.verdict for claim in of(RL, content)] == ["agrees"]


def test_intervals_over_seeds_are_students() -> None:
    from statistics import NormalDist

    assert over_seeds([1.0, 2.0, 3.0]).high == pytest.approx(2 + 4.303 / 3**0.5, abs=1e-3)
    many = over_seeds([0.0, 1.0] * 500)
    width = NormalDist().inv_cdf(0.975) * 0.50025 / 1000**0.5
    assert width <= many.high - many.value <= 1.06 * width


# --- nothing without rows, and rows that nobody wrote ---


@pytest.mark.parametrize("kind", [EVAL, CURVE, VS_M, BON, RL, TRAINING, "unheard-of"])
def test_no_claim_without_rows(kind: str) -> None:
    assert of(kind, {}) == []
    assert of(kind, {"rows": [], "differences": [], "verdicts": None, "peaks": [], "runs": []}) == []


def test_no_claim_of_what_was_not_measured() -> None:
    assert of(EVAL, evaluation(difference(MEMBERS, (None, None, None)))) == []
    assert of(EVAL, evaluation({**difference(MEMBERS, UP), "a": "another"})) == []
    assert of(EVAL, evaluation(difference("best member (01)", UP), difference("ensemble (min, WCO)", UP))) == []
    assert of(CURVE, curve(path(low=None))) == []


@pytest.mark.parametrize(
    ("kind", "content", "what"),
    [
        (EVAL, {"rows": 3}, "expected a table of rows in 'rows'"),
        (EVAL, {"rows": [3]}, "expected a table of rows in 'rows'"),
        (EVAL, evaluation(difference(MEMBERS, UP), difference(MEMBERS, DOWN)), "expected one row for each set and 'b'"),
        (EVAL, evaluation(difference(MEMBERS, ("x", 0, 1))), "expected a number for 'difference', found \"'x'\""),  # type: ignore[arg-type]
        (EVAL, evaluation(difference(MEMBERS, (0.0, 1, -1))), "expected low <= high"),
        (CURVE, {"verdicts": [path(name="")]}, "expected 'path' in each row, found none"),
        (CURVE, {"verdicts": [path()], "warnings": 3}, "expected a list in 'warnings'"),
        (RL, {"runs": [{"run": "r", "group": "g", "proxy": {"kind": "rm"}}]}, "expected a number for 'seed'"),
    ],
)  # fmt: skip
def test_what_warmerge_did_not_write_is_refused(kind: str, content: Row, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        of(kind, content)
    assert str(caught.value).startswith(f"results: {kind}.json is not a result of warmerge: ")
    assert what.replace("\"'x'\"", "'x'") in str(caught.value)


def test_hostile_names_are_shown_safely() -> None:
    bad, long = "v\x1b[31m\n: val", "very-" * 60
    extra = [model(long, "beside", 0.7, bad), model("x\u202e", "member", 0.7, bad)]
    content = evaluation(
        difference(MEMBERS, UP, bad), difference(long, UP, bad), difference(RAW, OPEN, bad), sets=(bad,), extra=extra
    )
    claims = of(EVAL, content) + of(CURVE, curve(path(f"{bad} -> {long}", where=bad)))
    claims += of(BON, choices([top(bad, UP)]))
    report = runs({"single": SINGLE, "average": shifted(0.2)}, outcome=bad)
    for run in report["runs"]:
        run["group"] = bad
    claims += of(RL, report)
    assert len(claims) == 9
    for text in [*(claim.seen + claim.paper for claim in claims), in_words(claims)]:
        assert text.isprintable()
        assert "very-" * 20 not in text
    assert r"On 'v\x1b[31m\n: val' the average" in claims[0].seen
    assert r"'x\u202e'" in claims[0].seen


# --- in words ---


def test_words_say_what_agrees_then_what_does_not_then_what_is_open() -> None:
    content = evaluation(
        difference(MEMBERS, OPEN, "val"), difference(MEMBERS, UP, "ood"), difference(MEMBERS, UP, "more"),
        difference(RAW, (-0.04, -0.05, -0.03), "val"), sets=("val", "ood", "more"),
    )  # fmt: skip
    assert in_words(of(EVAL, content)) == (
        "In line with the paper: the average is more accurate than its members on ood (+5.0 points) and on more (+5.0 "
        "points). Not in line with the paper: the average is more than 1 point worse than the ensemble on val (of "
        "plain rewards -4.0 points). It cannot be told whether the average is more accurate than its members on "
        "val (+0.4 points)."
    )


def test_words_say_apart_what_the_paper_does_not_report() -> None:
    gaps = [evaluation(difference(HALFWAY, gap)) for gap in (UP, (0.06, 0.03, 0.08), (0.07, 0.03, 0.08), UP)]
    claims = claims_of([(f"seed-{i}", EVAL, gap) for i, gap in enumerate(gaps)])
    assert [claim.source for claim in claims] == ["seed-0", "seed-1", "seed-2", "seed-3"]
    assert in_words(claims) == (
        "Beside what the paper reports: the average is more accurate than its members half-way "
        "to their start on val (+5.0 points, +6.0 points and 1 more)."
    )
    worse = in_words(of(EVAL, evaluation(difference(HALFWAY, DOWN))))
    assert worse.startswith("Beside what the paper reports: the average is less accurate than its")
    unknown = in_words(of(EVAL, evaluation(difference(HALFWAY, OPEN), difference(MEMBERS, (0.0, -0.01, 0.01)))))
    assert unknown == (
        "It cannot be told whether the average is more accurate than its members on val (no difference). Beside what "
        "the paper reports, it cannot be told whether the average is more accurate than its members half-way to "
        "their start on val (+0.4 points)."
    )


def test_words_never_hide_what_came_of_using_rewards() -> None:
    many = [Claim(f"p{i}", f"thing {i} was seen", "cannot tell", "f") for i in range(9)]
    used = claims_of([("rl", RL, of_two_coefficients({"single": SINGLE, "average": [(0, 1.0)]}))])
    worth_more = [worth(name, "warm", OPEN) for name in ("m1", "ens")]
    used += claims_of([("bon", BON, choices([top("m1", (0, 0, 0), peak=64)], worth_more))])
    words = in_words([*many, *used])
    assert len({claim.short[0] for claim in used if claim.verdict == "cannot tell" and not claim.beyond}) == 5
    assert all(claim.short[0] in words for claim in used)
    assert words.startswith(
        "In line with the paper: policies hack single models in RL with a KL coefficient of 0.05 (3"
    )
    assert (
        "whether the average's choices at n = 64 are worth more than those of a single model (-0.004) and than those "
        "of the ensemble (-0.004)"
    ) in words
    assert (
        "whether the average's policy is worth more than that of single models in RL with a KL coefficient of 0.1 at "
        "equal KL (+0.60 standard deviations) and at its peak (+0.60 standard deviations)"
    ) in words
    assert words.index("equal KL") < words.index("; and 9 more.")
    assert "thing 0" not in words


def test_words_are_one_paragraph_of_what_can_be_read() -> None:
    assert in_words([]) == "Nothing that was measured here bears on a claim of the paper."
    many = [Claim("p", f"thing {i} was seen.", "agrees", "f") for i in range(9)]
    assert in_words(many) == (
        "In line with the paper: thing 0 was seen; thing 1 was seen; thing 2 was seen; thing 3 was seen; and 5 more."
    )
    assert in_words([Claim("p", "nothing is known.", "cannot tell", "f")]) == "It cannot be told: nothing is known."


def test_a_claim_takes_four_words() -> None:
    claim = Claim("paper", "seen", "agrees", "folder")
    assert (claim.paper, claim.seen, claim.verdict, claim.source) == ("paper", "seen", "agrees", "folder")
