"""The page of results: well-formed, harmless whatever stands in the files, and with every number of a section."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from result_contents import CONTENTS, bon, curve, evaluation, policies, training

from warmerge.errors import UsageError
from warmerge.report import results
from warmerge.report.page import FOLDED_ROWS, SHOWN_ROWS, Result, Section, page, section
from warmerge.report.page.claims import FOLDED_CLAIMS
from warmerge.report.page.places import without_places
from warmerge.report.page.style import SCRIPT, STYLE
from warmerge.report.page.svg import inline_svg

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}
MINUS = "\N{MINUS SIGN}"


class Parsed(HTMLParser):
    """A page taken apart; tags that are not closed in order are `faults`."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if len({key for key, _ in attrs}) < len(attrs):
            self.faults.append(f"<{tag}> has an attribute twice")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def words(self) -> str:
        return " ".join("".join(text for tag, text in self.texts if tag not in ("style", "script")).split())


def without_figure(folder: Path, kind: str, _: Any) -> list[Path]:
    path = folder / f"{kind}.svg"
    path.write_text('<svg viewBox="0 0 3 4"><path d="M 0 0"/></svg>')
    return [path]


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("warmerge.report.page.svg.draw", without_figure)


def made(*found: tuple[str, str, dict[str, Any]], title: str = "Results", remarks: Sequence[str] = ()) -> Parsed:
    """The page of (folder, kind, content)s."""
    return Parsed(page(title, sections(*found), remarks))


def sections(*found: tuple[str, str, dict[str, Any]]) -> list[Section]:
    return [section(Result(folder, kind, content), f"r{i}") for i, (folder, kind, content) in enumerate(found, 1)]


@pytest.fixture(scope="module")
def everything() -> tuple[str, Parsed]:
    """A page with every kind of result, and figures as matplotlib draws them."""
    found = [(f"out/{kind}", kind, make()) for kind, make in CONTENTS.items()]
    html = page("Results of out", sections(*found))
    return html, Parsed(html)


# --- the page as a document ---


def test_every_kind_of_result_has_contents_to_test() -> None:
    assert CONTENTS.keys() == results._TABLES.keys()


def test_all_tags_are_closed_and_all_ids_are_there_once(everything: tuple[str, Parsed]) -> None:
    html, parsed = everything
    assert html.startswith("<!doctype html>\n")
    assert (parsed.faults, parsed.open) == ([], [])
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(set(ids)) == len(ids) > 100
    pointed = {value[1:] for _, attributes in parsed.tags if (value := attributes.get("href", "")).startswith("#")}
    pointed |= {name for _, attributes in parsed.tags for name in attributes.get("aria-labelledby", "").split()}
    pointed |= {at for _, attributes in parsed.tags for at in re.findall(r"url\(#(.*?)\)", str(attributes))}
    assert pointed <= set(ids)


def test_nothing_is_asked_of_a_network(everything: tuple[str, Parsed]) -> None:
    html, parsed = everything
    for name, attributes in parsed.tags:
        for key in ("href", "src", "xlink:href", "action", "data", "srcset", "poster"):
            value = attributes.get(key, "#")
            assert value.startswith("#") or (name == "image" and value.startswith("data:image/png;base64,")), value
        assert not [key for key in attributes if key.startswith(("on", "xmlns", "style"))]
    assert not {"link", "iframe", "object", "embed", "img", "base", "form"} & {name for name, _ in parsed.tags}
    assert not re.search(r"https?:|@import|@font-face|url\((?!#)", html)


def test_its_policy_allows_its_own_style_and_script_and_nothing_else(everything: tuple[str, Parsed]) -> None:
    html, parsed = everything
    (policy,) = [meta["content"] for meta in parsed.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    hashes = {}
    for tag in ("style", "script"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def test_it_can_be_read_without_javascript(everything: tuple[str, Parsed]) -> None:
    _, parsed = everything
    assert not parsed.all("button")
    assert not [attributes for _, attributes in parsed.tags if "hidden" in attributes or "aria-sort" in attributes]
    assert "aria-sort" in SCRIPT


def test_letters_on_a_screen_are_large_enough() -> None:
    screen = STYLE.split("@media print")[0]
    sizes = re.findall(r"(?:font-size:|font:)(?:\d+ )?(?:clamp\()?([\d.]+)(\w+|%)", screen)
    assert len(sizes) > 10
    assert {unit for _, unit in sizes} == {"rem", "%"}
    assert all(float(number) >= (1 if unit == "rem" else 100) for number, unit in sizes)


def test_figures_of_one_page_do_not_share_ids(everything: tuple[str, Parsed]) -> None:
    _, parsed = everything
    figures = parsed.all("svg")
    assert len(figures) == len(CONTENTS) + 1  # best-of-N has two
    assert all(figure["role"] == "img" and len(figure["aria-label"]) > 20 for figure in figures)
    source = (
        '<svg viewBox="0 0 1 1"><defs><clipPath id="p1"><rect id="x"/></clipPath></defs><g clip-path="url(#p1)"/></svg>'
    )
    one, two = (inline_svg(source, prefix, "A & <b>") for prefix in ("a", "b"))
    assert re.findall(r'id="(.*?)"', one) == ["a-p1"]
    assert "a-p1" not in two
    assert 'aria-label="A &amp; &lt;b&gt;"' in one


def test_the_same_results_give_the_same_bytes(everything: tuple[str, Parsed]) -> None:
    found = [(f"out/{kind}", kind, make()) for kind, make in CONTENTS.items() if kind == "winrate"]
    assert page("x", sections(*found)) == page("x", sections(*found))


# --- what stands in files ---

HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=y>\x1b[31m\u202e\n--></style>"


def hostile(value: Any) -> Any:
    """The same content with a hostile end on each name."""
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, dict):
        return {key: inner if key in ("kind", "target", "data") else hostile(inner) for key, inner in value.items()}
    return [hostile(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.usefixtures("no_figures")
def test_no_name_can_become_a_part_of_the_page() -> None:
    clean = [(f"out/{kind}", kind, make()) for kind, make in CONTENTS.items()]
    bad = [(folder + HOSTILE, kind, hostile(content)) for folder, kind, content in clean]
    html = page("Title" + HOSTILE, sections(*bad), ["remark" + HOSTILE])
    parsed = Parsed(html)
    assert (parsed.faults, parsed.open) == ([], [])
    assert (len(parsed.all("script")), len(parsed.all("style")), len(parsed.all("img"))) == (1, 1, 0)
    assert not [key for _, attributes in parsed.tags for key in attributes if key.startswith("on")]
    assert [c for c in html if not c.isprintable() and c != "\n"] == []
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 100


def test_a_hostile_figure_label_stays_a_label() -> None:
    """Names are drawn as outlines, and matplotlib's comments with them are left out."""
    content = evaluation()
    content["rows"][0]["model"] = "--><script>alert(1)</script>"
    html = section(Result("x", "eval", content), "r1").html
    assert "<script" not in html
    assert "<!--" not in html


# --- sections ---


def test_a_section_for_each_result_with_its_folder_and_what_it_measures(everything: tuple[str, Parsed]) -> None:
    _, parsed = everything
    words = parsed.words()
    headings = ["Training", "Accuracy", "Linear mode connectivity", "Accuracy against the number of members",
                "Best-of-N", "Policy optimisation", "Win rates", "Theory"]  # fmt: skip
    for heading, kind in zip(headings, CONTENTS, strict=True):
        assert f"{heading}out/{kind}" in words
    entries = [attributes["href"] for attributes in parsed.all("a")]
    assert entries[-len(CONTENTS) :] == [f"#r{i}" for i in range(1, len(CONTENTS) + 1)]
    assert words.count("How it was made") == len(CONTENTS)
    assert words.count("Intervals") == len(CONTENTS)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("training", ["0.700 [0.600, 0.800]", "n = 90, 30 prompts",
                      "100 pairs, the labels of 25 of them swapped on purpose (25%)"]),
        ("eval", ["0.712 [0.691, 0.733]", f"+0.012 [{MINUS}0.003, +0.027]", "val: 900 pairs of 90 prompts",
                  "95 %: percentile bootstrap over prompts, 2000 resamples, seed 0; a tie counts as right"]),
        ("curve", ["Cannot tell", f"0.8 [{MINUS}2.0, 4.3]", "cannot tell on val: more comparisons are needed",
                   "val: 1,314 pairs of 89 prompts, 2 bad rows left out"]),
        ("vs_m", ["val: n = 70, 5 prompts", "0.586 [0.280, 0.802]", "Members were ranked on this very set"]),
        ("bon", ["Best of 4: 192 prompts, judged by the gold reward", "2.500 [2.300, 2.700]", "2 [1, 4]",
                 "768 candidates of 192 prompts", "0.682 [0.643, 0.719]", "itself"]),
        ("rl-report", ["+0.39 [+0.27, +0.50]", "104 [60, 149] in 2 of 3 runs", "that is no 95 % interval", "n = 3",
                       "warm was highest at step 52", "2 over-optimised, 1 declining"]),
        ("winrate", ["0.669 [0.604, 0.732]", "120 · 17 · 55", "192 prompts of 200 asked", "gold.py:gold"]),
        ("theory", ["2,000 simulated trials for each number", "0.800 [0.780, 0.820]", "+0.100 [+0.080, +0.120]"]),
    ],
)  # fmt: skip
def test_numbers_with_their_intervals_and_n(kind: str, said: list[str]) -> None:
    words = made(("out", kind, CONTENTS[kind]())).words()
    assert [expected for expected in said if expected not in words] == []


@pytest.mark.usefixtures("no_figures")
def test_what_a_result_doubts_and_notes_and_how_it_was_made() -> None:
    content = evaluation() | {"notes": ["scales differ"], "warnings": ["3 rows left out"]}
    words = made(("out", "eval", content)).words()
    assert "Doubts3 rows left out" in words
    assert "Notesscales differ" in words
    assert "warmerge eval 'a model' b" in words
    assert "torch 2.13.0, warmerge 0.1.0" in words
    bare = made(("out", "eval", {"rows": content["rows"]})).words()
    assert "Commandmade from Python; not recordedVersionsnot recorded" in bare
    assert "Intervalsnot recorded in this result" in bare


@pytest.mark.usefixtures("no_figures")
def test_rows_are_shown_up_to_a_number_that_is_said() -> None:
    few, many = evaluation(), evaluation()
    many["rows"] = [{**few["rows"][0], "model": f"m{i}"} for i in range(SHOWN_ROWS + 5)]
    short, long = (section(Result("out", "eval", content, "out/eval.csv"), "r1").html for content in (few, many))
    assert "All 2 rows" in short
    assert f"The first {SHOWN_ROWS} of {SHOWN_ROWS + 5} rows. All of them are in <bdi>out/eval.csv</bdi>." in long
    assert f"{SHOWN_ROWS} of {SHOWN_ROWS + 5} rows" in long
    # The table of models itself has all of them, and is folded; only the table of rows ends early.
    assert [long.count(f"<bdi>m{i}</bdi>") for i in (SHOWN_ROWS - 1, SHOWN_ROWS)] == [2, 1]
    assert '<details class="longer">' in long
    assert FOLDED_ROWS < SHOWN_ROWS


@pytest.mark.usefixtures("no_figures")
def test_columns_are_shown_up_to_a_number_that_is_said() -> None:
    """A page does not grow by columns times rows: a file may have a key of its own in each row."""
    rows = [{f"k{number}": 1 for number in range(3000)}, *({"k0": number} for number in range(40))]
    found = made(("x", "odd", {"rows": rows}))
    assert len(found.all("th")) + len(found.all("td")) < 2 * 101 * 42
    assert "2,900 more columns are in the file." in found.words()


def test_long_paths_take_no_more_time_than_their_length() -> None:
    one, other = (f"/{first}{'/a' * 8000}" for first in "bc")
    begun = time.process_time()
    assert without_places([one, other], {}) == [f"…{one}", f"…{other}"]
    assert time.process_time() - begun < 0.5


def test_columns_know_what_they_are_sorted_by() -> None:
    parsed = made(("out", "rl-report", policies()))
    values = [attributes.get("data-v") for attributes in parsed.all("td")]
    assert "Infinity" in values  # "never"
    assert {"3", "52", "1.51", "0.39"} <= set(filter(None, values))


@pytest.mark.usefixtures("no_figures")
def test_members_that_were_not_measured_are_not_ranked_and_have_no_intervals() -> None:
    ranked = made(("runs", "training", training())).words()
    assert "The members, best first" in ranked
    assert "Intervals" in ranked
    words = made(("runs", "training", {**training(), "accuracies": []})).words()
    assert "best first" not in words
    assert "Intervals" not in words


@pytest.mark.usefixtures("no_figures")
def test_a_member_that_failed_and_the_start_are_in_the_table() -> None:
    content = training()
    content["members"][1] |= {"failed": "the loss is not finite"}
    words = made(("out", "training", content)).words()
    assert "failed the loss is not finite" in words
    assert "start0.500 [0.400, 0.600]" in words


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("eval", {"accuracy": 71.2}, "expected a fraction from 0 to 1 for 'accuracy', found 71.2"),
        ("eval", {"accuracy": "high"}, "expected a number for 'accuracy', found 'high'"),
        ("eval", {"low": 0.9, "high": 0.1}, "expected low <= high, found 0.9 > 0.1"),
        ("winrate", {"policy": None}, "expected 'policy' in each row, found none"),
    ],
)
def test_what_cannot_be_what_its_column_says_is_refused(kind: str, change: dict[str, Any], message: str) -> None:
    content = CONTENTS[kind]()
    content["rows"][0] |= change
    with pytest.raises(UsageError, match=re.escape(message)):
        section(Result("out", kind, content), "r1")


# --- in short ---


@pytest.mark.usefixtures("no_figures")
def test_claims_with_their_verdicts_as_words_and_links_to_their_results() -> None:
    parsed = made(("a", "training", training()), ("a", "eval", evaluation()), ("b", "curve", curve()))
    words = parsed.words()
    claims = [claim for each in sections(("a", "eval", evaluation()), ("b", "curve", curve())) for claim in each.claims]
    assert 1 < len(claims) <= FOLDED_CLAIMS
    assert f"{len(claims)} comparisons with the paper on " in words
    for claim in claims:
        assert claim.seen in words
        assert claim.verdict.capitalize() in words
    # Two results in one folder: the link leads to the one that says it.
    start = words.index("In short")
    assert start < words.index("Contents") < words.index("Several reward models were fine-tuned")
    links = [attributes["href"] for attributes in parsed.all("a")]
    assert links[1 : 1 + len(claims)] == ["#r2" if claim.source == "a" else "#r3" for claim in claims]
    assert all("open" in attributes for attributes in parsed.all("details") if attributes["class"] == "claim")


@pytest.mark.usefixtures("no_figures")
def test_what_the_paper_does_not_report_is_counted_and_headed_apart() -> None:
    content, size = evaluation(), {"set": "val", "n": 900, "prompts": 90}
    content["rows"].append({**size, "model": "start", "kind": "start", "accuracy": 0.6})
    content["differences"].append({**size, "a": "average", "b": "start", "difference": 0.112, "low": 0.1, "high": 0.2})
    words = made(("a", "eval", content)).words()
    said = "1 comparison with the paper on 1 question: 1 agrees with it. 1 comparison on 1 question beyond the paper."
    assert said in words
    first, second = words.split("Beyond the paper: what it does not report, and what was seen here")
    assert "In line with the paper: the average is more accurate than its members on val (+1.2 points)." in first
    assert "Beside what the paper reports: the average is more accurate than the shared start" in first
    assert "So here Not reported: averaging is worth more than the start alone" in second
    assert "Agrees" not in second


@pytest.mark.usefixtures("no_figures")
def test_results_that_say_nothing_of_the_paper_and_results_that_are_not_here() -> None:
    words = made(("out", "training", training()), title="A title", remarks=["runs: is not finished"]).words()
    assert "A title" in words
    assert "Nothing that was measured here bears on a claim of the paper." in words
    assert "Left outruns: is not finished" in words


@pytest.mark.usefixtures("no_figures")
def test_best_of_n_without_a_judge_shows_its_own_reward() -> None:
    content = bon()
    for row in content["rows"]:
        for key in [key for key in row if key.startswith(("gold", "win"))]:
            del row[key]
    content |= {"peaks": [], "differences": [], "wins": []}
    assert "in standard deviations above the mean" in made(("out", "bon", content)).words()


def test_contents_are_json() -> None:
    for make in CONTENTS.values():
        assert json.loads(json.dumps(make())) == make()
