"""The report of folders: what is found in them, what of it is shown, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from policy_runs import hacked, write_rows, write_run
from result_contents import CONTENTS, evaluation, training, winrate

import warmerge
from warmerge.errors import RefusedError, UsageError
from warmerge.pipeline.report import write_report
from warmerge.pipeline.rl_report import rl_report
from warmerge.report import results
from warmerge.report.page.places import without_places


def without_figure(folder: Path, kind: str, _: Any) -> list[Path]:
    path = folder / f"{kind}.svg"
    path.write_text('<svg viewBox="0 0 3 4"><path d="M 0 0"/></svg>')
    return [path]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No figures: the page's own tests draw them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warmerge.report.page.svg.draw", without_figure)
    monkeypatch.setitem(results._FIGURES, results.RL, (lambda *_: [], ("rows",)))
    return tmp_path


def put(folder: str, kind: str, content: Any = None) -> Path:
    path = Path(folder, f"{kind}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(CONTENTS[kind]() if content is None else content))
    return path


def findings(*folders: str) -> list[str]:
    with pytest.raises(RefusedError) as caught:
        write_report(folders, "report.html")
    assert not Path("report.html").exists()
    return [str(finding) for finding in caught.value.findings]


# --- what is found ---


def test_results_anywhere_beneath_in_the_order_of_a_story() -> None:
    for kind in reversed(CONTENTS):
        put(f"out/{kind}/deep", kind)
    (Path("out/eval/deep") / "eval.csv").write_text("")
    done = write_report(["out"], "new/report.html", command=["warmerge", "report", "out"])
    assert done.results == tuple((f"{kind}/deep", kind) for kind in CONTENTS)
    assert (done.path, done.title, done.remarks) == (Path("new/report.html"), "Results of out", ())
    html = done.path.read_text()
    at = [html.index(f'<p class="folder"><bdi>{kind}/deep</bdi></p>') for kind in CONTENTS]
    assert at == sorted(at)
    assert {claim.source for claim in done.claims} >= {"eval/deep", "curve/deep"}
    assert "<bdi>eval/deep/eval.csv</bdi>" in html
    assert done.as_json()["results"][1] == {"folder": "eval/deep", "kind": "eval"}


def test_it_is_exported_lazily() -> None:
    assert warmerge.write_report is write_report


def test_folders_are_called_as_from_the_one_that_was_given(place: Path) -> None:
    put("a/runs/10", "eval")
    put("a/runs/9", "eval")
    put("b/runs", "eval")
    assert write_report(["a"], "1.html").results == (("runs/9", "eval"), ("runs/10", "eval"))
    assert write_report([place / "b" / "runs"], "2.html").results == (("runs", "eval"),)
    assert write_report(["a", "b"], "3.html").results == (
        ("a/runs/9", "eval"), ("a/runs/10", "eval"), ("b/runs", "eval")
    )  # fmt: skip
    assert write_report(["a/runs", "b/runs"], "4.html").results == (
        ("a/runs/9", "eval"), ("a/runs/10", "eval"), ("b/runs", "eval")
    )  # fmt: skip
    # What is in two of the folders is shown once.
    assert write_report(["a", "a/runs/9"], "5.html").results == (("a/runs/9", "eval"), ("a/runs/10", "eval"))


def test_no_place_on_this_machine_is_on_the_page(place: Path) -> None:
    content = winrate() | {"judge": {"label": f"{place}/out/gold.py:gold"}, "warnings": ["/srv/me/a.jsonl: is short"]}
    content["command"] = ["warmerge", "winrate", "/srv/me/one/sft", "--data", "/srv/me/two/sft"]
    content["rows"][0]["policy"] = "/srv/me/policy"
    put("out", "winrate", content)
    html = write_report([place / "out"], "report.html").path.read_text()
    assert str(place) not in html
    assert "/srv" not in html
    assert "<dd>gold.py:gold</dd>" in html
    assert "…/me/a.jsonl: is short" in html
    assert "…/one/sft --data …/two/sft" in html


def test_paths_stay_apart_and_other_words_stay_as_they_are() -> None:
    words = ["1/2 and/or http://x.org/a", "eval", "a eval/b", "~/x/y"]
    assert without_places(words, {"/d/eval": ""}) == words
    assert without_places({"a": ("/d/eval", "/d/eval/x", "at /d/evaluation/x")}, {"/d/eval": ""}) == {
        "a": ["eval", "x", "at …/x"]
    }
    assert without_places(["/d/eval/x"], {"/d/eval": "name"}) == ["name/x"]


def test_links_are_followed_and_may_go_in_circles() -> None:
    put("real", "eval")
    Path("out").mkdir()
    Path("out/linked").symlink_to(Path("real").resolve())
    Path("out/again").symlink_to(Path("out").resolve())
    assert write_report(["out"], "report.html").results == (("linked", "eval"),)


def test_the_same_results_give_the_same_bytes() -> None:
    put("out", "eval")
    put("out", "theory")
    first = write_report(["out"], "a.html").path.read_bytes()
    Path("moved").mkdir()
    Path("out").rename("moved/out")
    assert write_report(["moved/out"], "b.html").path.read_bytes() == first


def test_a_training_is_read_with_its_record() -> None:
    content = {key: value for key, value in training().items() if key in ("members", "accuracies", "rows")}
    path = put("runs", "training", content)
    bare = write_report(["runs"], "1.html").path.read_text()
    assert "not recorded in this result" in bare
    record = {"format": "warmerge train 1", "command": ["warmerge", "train"], "versions": {"torch": "2"},
              "training_pairs": 100, "swapped": 25, "measuring": {"resamples": 500, "seed": 7}}  # fmt: skip
    path.with_name("train.json").write_text(json.dumps(record))
    html = write_report(["runs"], "2.html").path.read_text()
    assert "95 %: percentile bootstrap over prompts, 500 resamples, seed 7; a tie counts as right" in html
    assert "<pre><code>warmerge train</code></pre>" in html
    path.with_name("train.json").write_text(json.dumps({"format": "x"}))
    assert findings("runs") == ["runs/train.json: expected the format 'warmerge train 1', found 'x'"]


def test_a_training_that_is_not_finished_is_said() -> None:
    put("out", "eval")
    Path("out/runs").mkdir()
    Path("out/runs/train.json").write_text("{}")
    done = write_report(["out"], "report.html")
    assert [str(remark) for remark in done.remarks] == [
        "runs: has train.json and no training.json: this training is not finished"
    ]
    assert "runs: has train.json and no training.json" in done.path.read_text()


@pytest.mark.parametrize(
    ("kind", "rows", "said"),
    [
        ("eval", [{"model": f"m{i}"} for i in range(201)], "201 models"),
        ("eval", [{"set": f"s{i}"} for i in range(51)], "51 sets"),
        ("eval", [{"model": f"m{i}", "set": f"s{j}"} for i in range(77) for j in range(13)], "1,001 rows"),
        ("winrate", [{"policy": f"p{i}"} for i in range(201)], "201 policies"),
    ],
)
def test_a_figure_of_too_much_is_left_out_and_said(kind: str, rows: Any, said: str) -> None:
    content = CONTENTS[kind]()
    first = content["rows"][0]
    path = put("out", kind, {**content, "rows": [first | row for row in rows]})
    path.with_suffix(".svg").write_text("")
    sentence = f'<p class="below">The figure is left out: {said} are more than can be read in a picture.'
    html = write_report(["out"], "1.html").path.read_text()
    assert f"{sentence} The folder's own is <bdi>out/{kind}.svg</bdi>.</p>" in html
    assert "<svg" not in html
    path.with_suffix(".svg").unlink()
    assert f"{sentence}</p>" in write_report(["out"], "2.html").path.read_text()
    put("out", kind, {**content, "rows": [first | row for row in rows[:-1]]})
    drawn = write_report(["out"], "3.html").path.read_text()
    assert "The figure is left out" not in drawn
    assert "<svg" in drawn


# --- runs of rl ---


def test_runs_that_no_report_has_are_summarised_as_rl_report_does_it() -> None:
    for seed in (0, 1):
        write_run(Path(f"out/rl/warm-{seed}"), hacked(40, seed=seed, top=15), seed=seed)
    done = write_report(["out"], "report.html", command=["warmerge", "report", "out"])
    assert done.results == (("rl", "rl-report"),)
    expected = rl_report([Path("out/rl")], "elsewhere").as_json()
    html = done.path.read_text()
    for words in expected["words"]:
        assert words.replace("'", "&#x27;") in html
    assert "<bdi>rl/warm-0</bdi>" in html
    assert "out/rl/warm-0" not in html
    assert "<pre><code>warmerge report out</code></pre>" in html


def test_runs_that_a_report_has_are_shown_once_wherever_they_were_read() -> None:
    write_run(Path("runs/a"), hacked(40, top=15))
    write_run(Path("runs/b"), hacked(40, top=20), proxy="single")
    rl_report(["runs/a"], "runs/report")
    done = write_report([Path("runs").resolve()], "1.html")
    assert done.results == (("b", "rl-report"), ("report", "rl-report"))
    rl_report(["runs/a", "runs/b"], "runs/report", overwrite=True)
    assert write_report(["runs"], "2.html").results == (("report", "rl-report"),)
    # A run that went on since is not the one in the report.
    record = json.loads(Path("runs/a/rl.json").read_text())
    Path("runs/a/rl.json").write_text(json.dumps({**record, "finished": False}))
    write_rows(Path("runs/a/rows.jsonl"), hacked(41, top=15))
    assert write_report(["runs"], "3.html").results == (("a", "rl-report"), ("report", "rl-report"))


def test_a_run_without_a_control_reward_is_left_out_and_said() -> None:
    put("out", "eval")
    rows = [{**row, "control": None, "control_std": None} for row in hacked(5)]
    write_run(Path("out/rl"), rows, control=None)
    done = write_report(["out"], "report.html")
    assert done.results == (("out", "eval"),)
    said = "rl: is a run of warmerge rl without a control reward: it shows no hacking"
    assert [str(remark) for remark in done.remarks] == [said]
    with pytest.raises(UsageError) as caught:
        write_report(["out/rl"], "other.html")
    assert str(caught.value).endswith(said)


def test_a_run_that_cannot_be_read_is_refused() -> None:
    write_run(Path("out/rl"), hacked(9))
    (Path("out/rl") / "rows.jsonl").write_text("{")
    assert findings("out")[0].startswith("out/rl/rows.jsonl: line 1 is not JSON")


# --- what is refused ---


def test_everything_that_is_wrong_is_said_at_once() -> None:
    put("out/a", "eval", {"format": "other 1", "rows": []})
    put("out/b", "bon", [1])
    put("out/c", "training", {"rows": [{"member": "1"}]})
    put("out/d", "curve").write_text("{")
    put("out/e", "theory").write_bytes(b'{"x": NaN}')
    wrong = evaluation()
    wrong["rows"][0]["accuracy"] = 71.2
    put("out/f", "eval", wrong)
    put("out/g", "winrate", {**winrate(), "prompts": {"source": "x"}})
    put("out/h", "vs_m")
    put("out/i", "rl-report", {"format": "warmerge rl-report 1", "rows": [3]})
    put("out/j", "winrate").write_bytes(b"\xff")
    found = findings("out")
    assert [finding.split(" (")[0] for finding in found[:-2]] == [
        "out/a/eval.json: is not a result of warmerge eval: expected the format 'warmerge eval 1', found 'other 1'",
        "out/b/bon.json: is not a result of warmerge: expected a JSON object",
        "out/c/training.json: is not a result of warmerge train: expected rows and members, lists of objects",
        "out/d/curve.json: is not JSON: Expecting property name enclosed in double quotes: line 1 column 2",
        "out/e/theory.json: is not JSON: NaN is no number of JSON",
        "out/i/rl-report.json: is not a result of warmerge rl-report: expected rows, lists of objects",
        "out/j/winrate.json: is not JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    ]
    assert found[-2].startswith("out/f/eval.json: expected a fraction from 0 to 1 for 'accuracy', found 71.2 in {")
    assert found[-1] == "out/g/winrate.json: is not as warmerge winrate writes it (KeyError: 'compared')"


def test_no_results_says_what_was_looked_for() -> None:
    Path("empty").mkdir()
    with pytest.raises(UsageError) as caught:
        write_report(["empty"], "report.html")
    assert str(caught.value) == (
        "empty: no results anywhere beneath; looked for training.json, eval.json, curve.json, vs_m.json, bon.json, "
        "rl-report.json, winrate.json, theory.json, and for runs of warmerge rl (rl.json)"
    )


def test_what_is_there_is_not_replaced_unasked() -> None:
    put("out", "eval")
    Path("report.html").write_text("mine")
    with pytest.raises(UsageError, match=r"^report\.html is there already; choose another -o, or add --overwrite$"):
        write_report(["out"], "report.html")
    assert Path("report.html").read_text() == "mine"
    write_report(["out"], "report.html", overwrite=True, title="<b>")
    assert "<h1><bdi>&lt;b&gt;</bdi></h1>" in Path("report.html").read_text()
    with pytest.raises(UsageError, match=r"^-o out is a folder; name a file, such as out/report\.html$"):
        write_report(["out"], "out", overwrite=True)
    with pytest.raises(UsageError, match="no folder is given"):
        write_report([], "other.html")


def test_what_is_no_file_is_not_replaced() -> None:
    put("out", "eval")
    os.mkfifo("pipe")
    Path("linked").symlink_to("pipe")
    Path("dangling").symlink_to("nowhere")
    for name in ("pipe", "linked", "dangling"):
        with pytest.raises(UsageError) as caught:
            write_report(["out"], name, overwrite=True)
        assert str(caught.value) == f"-o {name} is no regular file, and is not replaced; choose another -o"
    assert Path("pipe").is_fifo()
    assert Path("linked").is_symlink()
    assert Path("dangling").is_symlink()


def test_what_the_page_is_made_of_is_not_replaced(place: Path) -> None:
    put("out/e", "eval")
    put("out/t", "training")
    write_run(Path("out/rl"), hacked(9))
    for name in ("e/eval.csv", "t/training.csv", "t/train.json", "e/other.json"):
        (Path("out") / name).write_text('{"format": "warmerge train 1"}')
    Path("linked").symlink_to("out/e/eval.json")
    made_of = [
        f"out/{name}"
        for name in (
            "e/eval.json",
            "e/eval.csv",
            "t/training.json",
            "t/training.csv",
            "t/train.json",
            "rl/rl.json",
            "rl/rows.jsonl",
            "e/../e/eval.json",
        )
    ]
    for name in [*made_of, "linked", str(place / "out/e/eval.json")]:
        before = Path(name).read_bytes()
        with pytest.raises(UsageError) as caught:
            write_report(["out"], name, overwrite=True)
        assert str(caught.value) == f"-o {name} is one of the results of the page; choose another -o"
        assert Path(name).read_bytes() == before
    assert write_report(["out"], "out/e/other.json", overwrite=True).path.read_text().startswith("<!doctype html>")


def test_folders_that_are_none_are_named() -> None:
    put("out", "eval")
    assert findings("out", "none", "out/eval.json") == [
        "none: is no folder; name one that holds results",
        "out/eval.json: is no folder; name one that holds results",
    ]
