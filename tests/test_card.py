"""The model card: valid front matter for any name, no local path, numbers read as they stand, lines that run."""

from __future__ import annotations

import contextlib
import io
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import TEMPLATE, folder

from warmerge.errors import Finding, UsageError
from warmerge.report import model_card
from warmerge.report.card import ANSWER, CARD_MARK, PROMPT, CardFacts, Example, scoring_lines
from warmerge.report.card.results import public_sets, read_results, reading
from warmerge.report.card.text import clean, code, escaped, public_warnings

ODD = [
    "yes", "1.0", "null", "- a", "a: b", "'", '"', "#", "---", "a\n---\nb", "é\u2028\x85", "\ud800", "\x1b[31m", "|",
    "`x`", "<img src=x onerror=y>", "![x](y)", "[x](y)", "{a: 1}", "%TAG", "@x", "*", "&a", "🗼", "\ufeff", "\u202e",
    "=", "1. x", "~", "\\", "a\\|b", "$x$", "__x__", "&lt;", "x" * 300, " ", "!!python/object", "<!-- x -->", "a\tb",
]  # fmt: skip
names = st.one_of(st.sampled_from(ODD), st.text(st.characters(), min_size=1, max_size=12))


def entry(name: str, role: str = "member", **more: Any) -> dict[str, Any]:
    return {"role": role, "checkpoint": name, "fingerprint": "0123456789abcdef" * 4, "bytes": 10, **more}


def manifest(*inputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    inputs = inputs or (entry("runs/1"), entry("runs/2"))
    count = sum(found["role"] == "member" for found in inputs)
    return {
        "command": ["warmerge", "average", *(found["checkpoint"] for found in inputs)],
        "warmerge": "0.1.0", "versions": {"python": "3.11.7", "warmerge": "0.1.0", "torch": "2.13.0"},
        "rule": {"name": "uniform", "formula": "1/M sum_i theta_i", "source": "WARM, arXiv 2401.12187"},
        "inputs": list(inputs), "copied_tensors": [], "dtype": "bfloat16", "parameters": 22713601, "bytes": 10,
        "warnings": [], "coefficients": {"members": [1 / count] * count, "base": 0.0}, **more,
    }  # fmt: skip


def row(key: str, model: str, kind: str, accuracy: float, low: float, high: float, **more: Any) -> dict[str, Any]:
    return {"set": key, "model": model, "kind": kind, "n": 200, "prompts": 50, "accuracy": accuracy, "low": low,
            "high": high, "length_correlation": 0.25, **more}  # fmt: skip


def difference(key: str, b: str, value: float, low: float, high: float, a: str = "average") -> dict[str, Any]:
    return {"set": key, "a": a, "b": b, "n": 200, "prompts": 50, "difference": value, "low": low, "high": high}


def evaluation(key: str = "val", **more: Any) -> dict[str, Any]:
    """Two members on one set: the average is worse than the ensemble, and nothing is sure about the best member."""
    return {
        "sets": [{"name": key, "source": "val.jsonl", "fingerprint": "f1", "n": 200}],
        "intervals": "percentile bootstrap over prompts, 2000 resamples, seed 0",
        "notes": [], "warnings": [],
        "rows": [
            row(key, "01", "member", 0.7, 0.65, 0.75), row(key, "02", "member", 0.68, 0.63, 0.73),
            row(key, "ensemble (mean)", "ensemble", 0.74, 0.69, 0.79), row(key, "average", "average", 0.71, 0.66, 0.76),
            row(key, "start", "start", 0.5, 0.4, 0.6), row(key, "01 half-way to start", "halfway", 0.6, 0.55, 0.65),
            row(key, "02 half-way to start", "halfway", 0.62, 0.57, 0.67),
            row(key, "length only", "baseline", 0.55, 0.5, 0.6, length_correlation=1.0),
        ],
        "differences": [
            difference(key, "best member (01)", 0.01, -0.0204, 0.03),
            difference(key, "ensemble (mean)", -0.03, -0.05, -0.0004),
            difference(key, "ensemble (median)", -0.01, -0.05, 0.04),
            difference(key, "mean of the half-way models", 0.1, 0.05, 0.15),
        ], **more,
    }  # fmt: skip


PUBLIC = {"01": "member 1", "02": "member 2"}
FACTS = CardFacts(architecture="LlamaForSequenceClassification", member_names=PUBLIC)


def parts(card: str) -> tuple[dict[str, Any], str]:
    """The front matter, found as the Hub finds it, and the text after it."""
    found = re.match(r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\n|$))", card)
    assert found
    return yaml.safe_load(found[2]), card[found.end() :]


def cells(body: str) -> list[list[str]]:
    """The text of the cells of every table, as a Markdown reader shows them; HTML anywhere is a failure."""
    from markdown_it import MarkdownIt

    rows: list[list[str]] = []
    inside = False
    for token in MarkdownIt("commonmark").enable("table").parse(body):
        assert token.type != "html_block" or token.content.strip() == CARD_MARK, token.content
        inside = token.type == "table_open" or (inside and token.type != "table_close")
        if token.type == "tr_open":
            rows.append([])
        if token.type == "inline":
            children = token.children or []
            assert {child.type for child in children} <= {
                "text", "softbreak", "link_open", "link_close", "image", "code_inline", "strong_open", "strong_close",
                "text_special",
            }, token.content  # fmt: skip
            if inside:
                rows[-1].append("".join(child.content for child in children))
    return rows


# --- front matter -----------------------------------------------------------------------------------------------------


def test_members_on_the_hub_are_what_the_card_is_a_merge_of() -> None:
    commit = "f" * 40
    made = manifest(
        entry("/cache/models--org--a", repo="org/a", revision=commit), entry("org/b", repo="org/b", revision=commit),
        entry("org/base", "base", repo="org/base", revision=commit),
    )  # fmt: skip
    front, body = parts(model_card(made, FACTS))
    assert front == {
        "library_name": "transformers",
        "base_model": ["org/a", "org/b"],
        "base_model_relation": "merge",
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", "warm", "model-merging", "warmerge", "RLHF"],
    }
    assert f"| member 1 | [org/a](https://huggingface.co/org/a/tree/{commit}) | 0.5 | `0123456789abcdef` |" in body
    assert f"| base | [org/base](https://huggingface.co/org/base/tree/{commit}) | 0 | `0123456789abcdef` |" in body
    assert "/cache" not in body


def test_local_members_are_fine_tuned_from_what_the_publisher_says() -> None:
    front, body = parts(model_card(manifest(), replace(FACTS, base_model=("org/lm",))))
    assert (front["base_model"], front["base_model_relation"]) == (["org/lm"], "finetune")
    assert "were fine-tuned from [org/lm](https://huggingface.co/org/lm), as their owner says" in body
    front, _ = parts(model_card(manifest(), FACTS))
    assert "base_model" not in front
    assert "base_model_relation" not in front
    with pytest.raises(UsageError, match=r"expected Hub ids such as org/name as base model, found '/home/me/lm'"):
        model_card(manifest(), replace(FACTS, base_model=("/home/me/lm",)))


def test_a_model_that_is_no_merge() -> None:
    facts = replace(FACTS, repo="me/rm", base_model=("org/lm",), architecture="MyRewardModel", texts="plain")
    front, body = parts(model_card(None, facts))
    assert front == {
        "library_name": "transformers",
        "base_model": ["org/lm"],
        "base_model_relation": "finetune",
        "tags": ["reward-model", "warmerge", "RLHF"],
    }
    assert "\n# rm\n" in body
    assert "merge" not in re.sub("warmerge", "", body)
    assert "from_pretrained" not in body, "transformers would draw the head of this class at random"
    assert "`warmerge score me/rm --data pool.jsonl -o scored.jsonl`" in body
    assert "\n# Reward model\n" in model_card(None, replace(facts, repo=None))


def test_the_licence_is_stated_or_said_to_be_missing() -> None:
    _, body = parts(model_card(manifest(), FACTS))
    assert "No licence is stated; ask its owner before using it." in body
    stated = {"license": "other", "license_name": "my: licence", "license_link": "https://example.org/x"}
    front, body = parts(model_card(manifest(), replace(FACTS, license=stated)))
    assert {key: front[key] for key in stated} == stated
    assert "Licence: other, my: licence, https://example.org/x." in body
    assert "No licence" not in body


def test_the_index_holds_this_model_on_held_out_sets_and_the_hub_can_read_it() -> None:
    from huggingface_hub import ModelCard

    both = evaluation("My Val")
    both["rows"] += evaluation("train[swapped]")["rows"] + evaluation("train[clean]")["rows"]
    both["rows"] += [{**found, "set": "my-val", "accuracy": 0.123456} for found in evaluation()["rows"]]
    read = ModelCard(model_card(manifest(), replace(FACTS, repo="me/warm-rm", evaluation=both))).data
    assert (read.model_name, read.library_name) == ("warm-rm", "transformers")
    assert [(r.dataset_name, r.dataset_type, r.metric_type, r.metric_value) for r in read.eval_results] == [
        ("My Val", "my-val", "accuracy", 0.71),
        ("my-val", "my-val-2", "accuracy", 0.1235),
    ]
    assert read.eval_results[0].metric_name == "accuracy (n = 200, 50 prompts; 95 % interval 0.660 to 0.760)"
    assert read.eval_results[0].task_name == "Pairwise preference accuracy"


@settings(max_examples=100, deadline=None)
@given(names, names, names)
@example("a\n---\nb: c", "\n\n- x", "yes")
def test_any_name_makes_valid_yaml_and_leaves_tables_whole(key: str, member: str, license: str) -> None:
    found = evaluation(key)
    found["rows"].append(row(f"2{key}", "average", "average", 0.6, 0.5, 0.7))
    facts = replace(FACTS, repo="me/rm", evaluation=found, license={"license": license}, member_names={"01": member})
    made = manifest(entry("runs/1"), entry(member), rule={"name": license, "formula": key, "source": member})
    front, body = parts(model_card(made, facts))
    assert front["license"] == clean(license)
    short = re.split(r"[/\\]", key)[-1].strip() or "pairs"
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == clean(short)
    assert all(re.fullmatch(r"[a-z0-9._-]+", r["dataset"]["type"]) for r in front["model-index"][0]["results"])
    rows = cells(body)
    assert [len(line) for line in rows] == [4] * 3 + [3] * (len(rows) - 3)
    assert rows[3][1] == clean(short).strip()
    assert clean(member).strip() in [line[0] for line in rows] or not clean(member).strip()
    for line in body.splitlines():
        assert line.isprintable(), line


@given(names)
def test_an_escaped_name_is_shown_as_it_is(name: str) -> None:
    from markdown_it import MarkdownIt

    for shown in (escaped(name), f"- {escaped(name)}", code(name)):
        inline = [token for token in MarkdownIt("commonmark").enable("table").parse(shown) if token.type == "inline"]
        assert len(inline) == 1
        assert "".join(child.content for child in inline[0].children or []).strip() in (
            clean(name).strip(),
            "(no name)",
        )


# --- nothing private --------------------------------------------------------------------------------------------------


def test_no_local_path_is_in_the_card(tmp_path: Path) -> None:
    one, two, base = (str(tmp_path / name) for name in ("secret-a", "secret-b", "secret-base"))
    adapter = {"adapter": two, "base": base, "rank": 8, "alpha": 16, "use_rslora": False, "prefix": "model."}
    warnings = [
        str(Finding(two, f"differs from {one} by 30% of its norm (over a sample)")),
        str(Finding(f"{two}/config.json", f"has reward mean 1 and std 2, {one} has 1 and 2; the output keeps both")),
        str(Finding(base, f"was read from {tmp_path}/cache, which is odd")),
        "secret-base is not what it was",
    ]
    found = evaluation(notes=[
        "val: 01 gives every text the same reward, so that all its comparisons are ties",
        "val: the members' reward scales differ (std 01 0.93, secret-b 1.6); raw ensembles follow the largest",
        f"read from {one}",
    ])  # fmt: skip
    found["rows"] += [
        row("val", "secret-b", "member", 0.6, 0.5, 0.7),
        row("val", "secret-b half-way to start", "halfway", 0.6, 0.5, 0.7),
        row("val", f"{tmp_path}/secret-c", "merged", 0.6, 0.5, 0.7),
        row(f"{tmp_path}/ood", "average", "average", 0.6, 0.5, 0.7),
    ]
    found["differences"].append(difference(f"{tmp_path}/ood", "best member (secret-b)", 0.0, -0.1, 0.1))
    found["sets"] = [{"name": "val", "source": f"{tmp_path}/val.jsonl", "fingerprint": "f1"}]
    selection = {
        "selection": "best:2", "kept": [one, two], "accuracies": {one: 0.5, two: 0.5, base: 0.4},
        "sets": [{"name": "val", "source": f"{tmp_path}/val.jsonl", "fingerprint": "f1"}],
    }  # fmt: skip
    verdict = {"path": f"{one} -> mean", "set": "val", "n": 9, "prompts": 3, "barrier": 0.0, "low": 0.0, "high": 0.0,
               "below_ensemble": 0.0, "below_ensemble_low": 0.0, "below_ensemble_high": 0.0, "tolerance": 0.01,
               "against": "line", "verdict": "holds", "words": f"holds on the way from {one}"}  # fmt: skip
    facts = replace(FACTS, evaluation=found, curve={"rows": [], "verdicts": [verdict]}, texts="plain")
    made = manifest(entry(one), entry(two, **adapter), entry(base, "base"), warnings=warnings, selection=selection)
    card = model_card(made, facts)
    for private in (str(tmp_path), "secret", tmp_path.name, str(Path.home())):
        assert private not in card, card
    for said in (
        "- Warned when it was merged: member 2: differs from member 1 by 30% of its norm (over a sample).",
        "- Warned when it was merged: member 2's config.json: has reward mean 1 and std 2, member 1 has 1 and 2; the "
        "output keeps both.",
        "- 2 warnings of the merge left out here, which may name local files.",
        "- val: member 1 gives every text the same reward",
        "(std member 1 0.93, another model (1) 1.6)",
        "- 1 note of the evaluation left out here, which may name local files",
        "| another model (2) |",
        "(another model (1)) |",
        "The members were chosen from 3 checkpoints by their accuracy (best:2). The numbers below on val are of the",
        "| member 2 | not on the Hub, LoRA adapter (rank 8, alpha 16) | 0.5 |",
        "from one member to the mean of the members",
    ):
        assert said in card, said


def test_warnings_of_a_real_merge_name_members_by_number(
    tmp_path: Path, rm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from warmerge.pipeline.average import _manifest
    from warmerge.pipeline.prepare import prepare

    # Folders that are called like numbers in the sentences.
    heads = [{"score.weight": torch.randn(1, 16, generator=torch.Generator().manual_seed(seed))} for seed in (1, 3)]
    rm("1", seed=1, add=heads[0], config={"mean": 1, "std": 2})
    rm("2", seed=2, add=heads[1], config={"mean": 3, "std": 1})
    monkeypatch.chdir(tmp_path)
    for specs in (["1", "2"], [tmp_path / "1", "2"]):
        prepared = prepare(specs)
        assert len(prepared.warnings) == 2
        card = model_card(_manifest(prepared, ["warmerge", "average", *map(str, specs)]), FACTS)
        assert str(tmp_path) not in card
        assert "merged: member 2's config.json: has reward mean 3 and std 1, member 1 has 1 and 2; the output" in card
        assert "merged: member 2: tensor 'score.weight' has cosine" in card
        assert "with member 1's: these heads look independently drawn" in card
        assert "left out" not in card


def test_many_names_take_no_more_time_than_their_number() -> None:
    begun = time.process_time()
    sets = public_sets([(f"{number}/x", "") for number in range(3000)])
    assert list(sets.values())[::1000] == ["x", "x-1001", "x-2001"]
    made = manifest(*(entry(f"{number}-m") for number in range(600)), warnings=["x", "7-m: y"] * 10)
    assert public_warnings(made) == ["x", "member 8: y"] * 10
    assert time.process_time() - begun < 0.5


def test_more_names_than_are_looked_for_leave_out_all_that_may_have_one() -> None:
    made = manifest(*(entry(f"{number}-m") for number in range(1001)), warnings=["7-m: y"])
    assert public_warnings(made) == [None]


def test_numbers_in_notes_are_not_taken_for_members() -> None:
    """Members are often called 1, 2, 3."""
    said = ["val: of 3 texts 1 lost the beginning of their prompt", "val: 2 bad rows were left out",
            "the scales differ (std 1 1, 2 0.5, x-y 2e-05); more"]  # fmt: skip
    found = evaluation(notes=said)
    found["rows"] = [row("val", name, "member", 0.6, 0.5, 0.7) for name in ("1", "2", "x-y")]
    public = {"1": "member 1", "2": "member 2", "x-y": "member 3"}
    assert read_results(found, "1", public).notes == (
        said[0], said[1], "the scales differ (std this model 1, member 2 0.5, member 3 2e-05); more",
    )  # fmt: skip


def test_what_is_no_hub_id_is_not_linked() -> None:
    for repo in ("/home/me/rm", "a/b/c", "x](javascript:y)", "../rm"):
        card = model_card(manifest(entry("a", repo=repo, revision="main"), entry("b")), FACTS)
        assert "| member 1 | not on the Hub | 0.5 |" in card
        assert repo not in card
        assert "base_model" not in parts(card)[0]


# --- what it says -----------------------------------------------------------------------------------------------------


def test_without_measurements_it_says_so() -> None:
    body = model_card(manifest(), FACTS)
    assert "Nothing has been measured on this model unless it is written here." in body
    assert "measured, see below" not in body
    assert CARD_MARK in body


def test_the_reading_follows_from_the_intervals() -> None:
    found = read_results(evaluation(), "average", PUBLIC)
    assert reading(found) == (
        "Against a coin (0.5): better on val (0.710). Against the ensemble of its members, which costs as much as all "
        "of them: worse on val (-3.00 points [-5.00, -0.04]). Against the best member (picked on the same pairs): "
        "undecided on val (+1.0 points [-2.0, +3.0]). Against its members pulled half-way back to their start: better "
        "on val (+10.0 points [+5.0, +15.0])."
    )


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [(0.501, 0.6, "better"), (0.4, 0.499, "worse"), (0.5, 0.6, "undecided"), (0.4, 0.5, "undecided"),
     (None, None, "undecided")],
)  # fmt: skip
def test_an_interval_that_holds_the_level_decides_nothing(low: Any, high: Any, answer: str) -> None:
    found = evaluation(rows=[row("val", "average", "average", 0.5, low, high)], differences=[])
    assert reading(read_results(found, "average", {})) == (
        f"Against a coin (0.5): {answer} on val (0.500). It was not compared pair by pair: where "
        "intervals overlap, they do not say which model is better."
    )


def test_training_pairs_are_no_evidence() -> None:
    found = evaluation("t[swapped]")
    for key in ("rows", "differences"):
        found[key] += evaluation("t[clean]")[key]
    assert reading(read_results(found, "average", PUBLIC)) == (
        r"t\[swapped\] and t\[clean\]: pairs that the members were trained on, no measure of new ones; on \[swapped\] "
        "the labels were made wrong on purpose, so that less is better."
    )
    assert "model-index" not in parts(model_card(manifest(), replace(FACTS, evaluation=found)))[0]


def test_the_tables_hold_the_numbers() -> None:
    found = evaluation(notes=["val: 2 bad rows were left out"])
    found["rows"] += [{**r, "set": "ood", "accuracy": None, "low": None, "high": None} for r in found["rows"]]
    facts = replace(FACTS, evaluation=found, figures={"eval": "my eval.png"})
    _, body = parts(model_card(manifest(), facts))
    for line in (
        "| accuracy [95 % interval] | val | ood |",
        "| measured on | n = 200, 50 prompts | n = 200, 50 prompts |",
        "| **this model** | 0.710 [0.660, 0.760] | not measured |",
        "| ensemble (mean) | 0.740 [0.690, 0.790] | not measured |",
        "| member 2 | 0.680 [0.630, 0.730] | not measured |",
        "| members half-way to the start, lowest to highest | 0.600 to 0.620 | not measured |",
        "| length only | 0.550 [0.500, 0.600] | not measured |",
        "| best member on that set | +0.010 [-0.020, +0.030] (member 1) | not measured |",
        "![Accuracy of the models in the table](my%20eval.png)",
        "- val: 2 bad rows were left out",
    ):
        assert line in body.splitlines(), line
    assert "Preferring the longer answer has accuracy 0.550 [0.500, 0.600] on val, not measured on ood." in body
    assert "Its rewards correlate with the length of the answer: 0.25 on val" in body
    assert "intervals: percentile bootstrap over prompts, 2000 resamples, seed 0." in body
    assert "ensemble (median)" not in body, "it has a difference, but no accuracy here"


def test_more_sets_than_fit_make_more_tables() -> None:
    found = evaluation(differences=[])
    found["rows"] = [{**r, "set": f"s{i}"} for i in range(9) for r in found["rows"]]
    rows = cells(model_card(manifest(), replace(FACTS, evaluation=found)).split("---\n", 2)[2])
    heads = [line[1:] for line in rows if line[0].startswith("accuracy")]
    assert heads == [["s0", "s1", "s2", "s3"], ["s4", "s5", "s6", "s7"], ["s8"]]


def test_a_merged_checkpoint_measured_beside_its_members_is_this_model() -> None:
    found = evaluation()
    found["rows"].append(row("val", "warm", "merged", 0.72, 0.67, 0.77))
    _, body = parts(model_card(manifest(), replace(FACTS, evaluation=found, evaluated_as="warm")))
    assert "| **this model** | 0.720 [0.670, 0.770] |" in body
    assert "| uniform average of the members | 0.710 [0.660, 0.760] |" in body
    assert "It was not compared pair by pair" in body, "the differences are the other one's"
    with pytest.raises(UsageError, match=r"expected rows of 'cold' in the evaluation, found '01', '01 half-way"):
        model_card(manifest(), replace(FACTS, evaluation=found, evaluated_as="cold"))
    with pytest.raises(UsageError, match="expected one row for each model and set in the evaluation, found several"):
        model_card(manifest(), replace(FACTS, evaluation=evaluation(rows=found["rows"] * 2)))
    with pytest.raises(UsageError, match="expected a fraction from 0 to 1 for 'accuracy', found 71"):
        model_card(manifest(), replace(FACTS, evaluation=evaluation(rows=[row("v", "average", "average", 71, 0, 1)])))


def verdict(high: float, low: float = -0.01, against: str = "line", path: str = "01 -> 02", **more: float) -> Any:
    value = {"barrier": 0.004, "low": low, "high": high}
    return {"path": path, "set": "val", "n": 1314, "prompts": 89, **value, "at": 0.5, "below_ensemble": 0.03,
            "below_ensemble_low": -0.01, "below_ensemble_high": 0.05, "tolerance": 0.01, "against": against,
            "verdict": "?", "words": "private words", **more}  # fmt: skip


def test_verdicts_are_rebuilt_from_their_numbers() -> None:
    curve = {"rows": [], "verdicts": [
        verdict(0.008, below_ensemble_low=0.02), verdict(0.0101), verdict(0.03, low=0.02),
        verdict(0.0, against="ensemble", path="02 -> mean"),
    ]}  # fmt: skip
    _, body = parts(model_card(manifest(), replace(FACTS, curve=curve, figures={"curve": "lmc.png"})))
    line, both = "largest fall below the line between their accuracies", "n = 1314, 89 prompts."
    assert [said for said in body.splitlines() if said.startswith("- **")] == [
        f"- **does not hold** on val, from member 1 to member 2: {line} 0.4 points [2.0, 3.0]; tolerance 1, {both}",
        f"- **cannot tell** on val, from member 1 to member 2: {line} 0.40 points [-1.00, 1.01]; tolerance 1, {both}",
        "- **cannot tell** on val, from member 2 to the mean of the members: largest fall below the ensemble of the "
        f"two (the test where one end is no better than a coin) 3.0 points [-1.0, 5.0]; tolerance 1, {both}",
        f"- **holds** on val, from member 1 to member 2: {line} 0.4 points [-1.0, 0.8]; tolerance 1, {both} Below the "
        "ensemble of the two: 3.0 points [2.0, 5.0]; averaging weights loses what that keeps.",
    ]
    assert "![Accuracy along the lines between members](lmc.png)" in body
    assert "private" not in body


def test_many_verdicts_are_counted_and_the_bad_ones_shown() -> None:
    curve = {"rows": [], "verdicts": [verdict(0.005)] * 20 + [verdict(0.03, low=0.02)]}
    body = model_card(manifest(), replace(FACTS, curve=curve))
    assert body.count("- **does not hold**") == 1
    assert body.count("- **holds**") == 7
    assert "- 13 more are not shown; in all: does not hold 1, cannot tell 0, holds 20" in body


def test_how_it_was_merged() -> None:
    rule = {"name": "lambda", "formula": "(1-l) theta_1 + l theta_2", "source": "WARM, Observation 1", "lam": 0.25}
    made = manifest(rule=rule, coefficients={"members": [0.75, 0.25], "base": 0.0}, copied_tensors=["a", "b"])
    facts = replace(FACTS, fingerprint="abc123", parameters=1234, dtype="float16", head="score.weight [1, 16]")
    body = model_card(made, facts)
    assert "Rule: lambda, `(1-l) theta_1 + l theta_2`, lam = 0.25 (WARM, Observation 1), tensor by tensor; " in body
    assert "sums in float64, rounded once to float16." in body
    assert "A partial merge: 2 tensors are copies of one member's" in body
    assert "Its weights are the weighted average of those of 2 fine-tuned reward models" in body
    assert [line[2] for line in cells(body.split("---\n", 2)[2])[1:3]] == ["0.75", "0.25"]
    assert "Merged with warmerge 0.1.0, torch 2.13.0; [`warmerge.json`](warmerge.json) holds the record" in body
    assert (
        r"Weights: 1,234 parameters, float16, LlamaForSequenceClassification, reward head score.weight \[1, 16\]"
        in body
    )
    assert "fingerprint `abc123`" in body


@pytest.mark.parametrize(
    ("name", "coefficients", "shown"),
    [
        (
            "stock",
            {"per_tensor": {"x": {"members": [0.5, 0.5], "base": 0}}},
            "measured per tensor, see `warmerge.json`",
        ),
        ("stock", None, "see `warmerge.json`"),
        ("uniform", None, "0.5"),
    ],
)
def test_coefficients_that_are_not_constant_or_not_yet_known(name: str, coefficients: Any, shown: str) -> None:
    made = manifest(coefficients=coefficients, rule={"name": name, "formula": "f", "source": "s"})
    assert f"| member 2 | not on the Hub | {shown} |" in model_card(made, FACTS)


# --- the lines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "texts", "pad"),
    [("llama", "plain", "own"), ("llama", "chat", "own"), ("llama", "plain", "eos"), ("gpt2", "plain", "none"),
     ("bert", "plain", "own"), ("roberta", "chat", "own")],
)  # fmt: skip
def test_the_lines_print_what_warmerge_scores(kind: str, texts: str, pad: str) -> None:
    from warmerge.rewards.model import LoadOptions, load_reward_model
    from warmerge.rewards.scoring import Tokens, score

    place = folder(kind, pad, TEMPLATE if texts == "chat" else None)
    model = load_reward_model(place, LoadOptions(device="cpu", dtype="float32"))
    assert model.renderer.template == texts
    lines = scoring_lines(str(place), texts, ends_in_eos=model.renderer.ends is not None)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(lines, "card", "exec"), {})
    (expected,) = score(model, Tokens(model.renderer, [(PROMPT, ANSWER)]))
    assert float(said.getvalue()) == pytest.approx(expected, abs=1e-4)
    if model.renderer.ends is not None and texts == "plain" and pad != "eos":
        wrong = io.StringIO()
        with contextlib.redirect_stdout(wrong), contextlib.redirect_stderr(io.StringIO()):
            exec(compile(scoring_lines(str(place), texts), "card", "exec"), {})
        assert abs(float(wrong.getvalue()) - expected) > 1e-3, "the end-of-sequence token does not matter here"


def test_the_lines_name_the_place_and_the_revision() -> None:
    lines = scoring_lines('me/"rm"', "plain", "v1")
    named = r'from_pretrained("me/\"rm\"", revision="v1"'
    assert lines.count(named) == 2
    compile(lines, "card", "exec")


def test_an_example_stands_with_what_it_printed() -> None:
    facts = replace(FACTS, repo="me/rm", texts="plain", example=Example("print('```')", "1.5\n2"))
    body = model_card(manifest(), facts)
    assert "````python\nprint('```')\n# 1.5\n# 2\n````\n\nThe last line is what they printed when this card" in body
    body = model_card(manifest(), replace(facts, example=Example("print(1)", None)))
    assert "```python\nprint(1)\n```\n\nThese lines were not run when this card was written." in body


def test_lines_are_made_where_none_were_run() -> None:
    body = model_card(manifest(), replace(FACTS, texts="plain", ends_in_eos=True))
    assert scoring_lines(".", "plain", ends_in_eos=True) in body
    assert "These lines were not run when this card was written. `.` is this folder." in body
    assert "the answer and the end-of-sequence token; `warmerge score FOLDER" in body
    body = model_card(manifest(), replace(FACTS, repo="me/rm", revision="v1", texts="chat"))
    assert scoring_lines("me/rm", "chat", "v1") in body
    assert "`warmerge score me/rm@v1 --data pool.jsonl" in body
    body = model_card(manifest(), FACTS)
    assert "from_pretrained" not in body, "how texts become tokens is not known"
