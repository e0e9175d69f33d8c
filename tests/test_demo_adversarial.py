"""Attacks on the demo, the report, its claims, the theory, units run inline: what broke is marked, what held stays."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy
import pytest
from result_contents import CONTENTS
from typer.testing import CliRunner

from warmerge.cli import app
from warmerge.cli.demonstrating import program
from warmerge.demo import run as demo_run
from warmerge.demo.run import run_demo, script
from warmerge.demo.story import QUICK, steps
from warmerge.errors import RefusedError, UsageError
from warmerge.pipeline.engine import Outcome, Unit, run_units
from warmerge.pipeline.report import write_report
from warmerge.pipeline.scoring.rewarders import OwnFunction, Rewarder, load_rewarder, open_rewarder
from warmerge.report.claims import Claim, claims_of
from warmerge.report.page.claims import in_short
from warmerge.rewards import feature_theory as theory
from warmerge.rewards.bench import Measuring
from warmerge.rewards.feature_theory import FeatureGroup, Scenario

Row = dict[str, Any]
HOSTILE = ["<script>alert(1)</script>", "\x1b[31mred", "a\u202eb", "x" * 5000, "</title><b>", "a\nb", "\ud800", "$x_1$"]


# --- the demo ---


@pytest.fixture
def worldless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder in which the demo makes no world."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warmerge.demo.world.main", lambda words: None)
    return tmp_path


def test_ctrl_c_in_a_step_is_a_ctrl_c_of_the_demo(worldless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("warmerge.cli.demonstrating.run", lambda words: 130)
    assert CliRunner().invoke(app, ["demo", "--quick", "-o", "d"]).exit_code == 130


@pytest.mark.parametrize("seed", [-1, 10**23])
def test_a_seed_that_no_step_takes_is_refused_before_the_first(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warmerge.cli.demonstrating.run", lambda words: 2)
    monkeypatch.setattr("warmerge.demo.world.make", lambda out, seed, size: __import__("torch").manual_seed(seed))
    done = CliRunner().invoke(app, ["demo", "--quick", "--seed", str(seed), "-o", "d"])
    assert done.exit_code == 2
    assert not Path("d").exists()


def test_the_script_ends_where_the_policies_failed(tmp_path: Path) -> None:
    (tmp_path / "commands.sh").write_text(script(steps(QUICK, 0)))
    for name in ("warmerge", "python"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$1" >> called.txt\n[ "$1" != rl ]\n')
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "commands.sh"], cwd=tmp_path, env={**os.environ, "PATH": path}, check=False)
    assert done.returncode != 0
    assert "rl-report" not in (tmp_path / "called.txt").read_text().split()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP])
def test_what_runs_beside_ends_with_a_demo_that_is_ended(how: signal.Signals, tmp_path: Path) -> None:
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\necho $$ > pid.txt.new && mv pid.txt.new pid.txt\nexec sleep 30\n")
    sleeper.chmod(0o755)
    code = (
        # The world is not needed, and takes seconds to import.
        "import sys, time, types\n"
        "sys.modules['warmerge.demo.world'] = types.SimpleNamespace(EARLIER=(), SIZES={})\n"
        "from warmerge.demo import run; from warmerge.demo.story import Step\n"
        f"with run._beside(lambda commands: [{str(sleeper)!r}]) as follow:\n"
        "    follow(Step('', '', (('warmerge', 'rl'),), 'log.txt'), print)\n"
        "    time.sleep(30)\n"
    )
    demo = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    while not (tmp_path / "pid.txt").exists():
        assert demo.poll() is None
        time.sleep(0.02)
    pid = int((tmp_path / "pid.txt").read_text())
    demo.send_signal(how)
    demo.wait()
    time.sleep(0.3)
    alive = Path(f"/proc/{pid}").exists()
    if alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive


def test_the_page_of_a_quick_demo_says_that_its_numbers_mean_nothing() -> None:
    ((*words,),) = steps(QUICK, 0)[-1].commands
    assert "quick" in words[words.index("--title") + 1]


def test_the_printed_mkdir_makes_what_the_demo_makes(worldless: Path) -> None:
    said: list[str] = []
    with pytest.raises(Exception, match="the demo ends here"):
        run_demo(Path("a/b"), lambda words: 3, program, quick=True, say=said.append)
    done = subprocess.run(["bash", "-ec", said[0].removeprefix("$ ")], cwd=worldless / "a", check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("name", ["a b", "a'b", "$(touch x)", "ü"])
def test_odd_names_of_the_folder_are_printed_as_a_shell_takes_them(name: str, worldless: Path) -> None:
    said: list[str] = []
    with pytest.raises(Exception, match="the demo ends here"):
        run_demo(worldless / "one" / name, lambda words: 3, program, quick=True, say=said.append)
    (worldless / "one" / name / demo_run.COMMANDS).unlink()
    (worldless / "one" / name).rmdir()
    subprocess.run(["bash", "-ec", said[0].removeprefix("$ ")], check=True, cwd=worldless)
    assert [path.name for path in (worldless / "one").iterdir()] == [name]


# --- claims ---


def of(kind: str, content: Row) -> list[Claim]:
    return claims_of([("place", kind, content)])


def rl(groups: dict[str, tuple[str, float, str]]) -> Row:
    """A report with one run for each group: kind of its proxy, KL coefficient, outcome."""
    content: Row = {"runs": [], "peaks": [], "ends": [], "equal_kl": []}
    for group, (kind, coef, outcome) in groups.items():
        about = {"group": group, "run": group}
        proxy = {"name": group, "kind": kind, "checkpoints": [f"m/{group}"]}
        content["runs"].append({**about, "seed": 0, "control": "gold.py:gold", "settings": {"kl_coef": coef},
                                "proxy": proxy})  # fmt: skip
        content["peaks"].append({**about, "outcome": outcome, "step": 20, "kl": 1.0, "control_gain": 0.5,
                                 "control_error": 0.05, "proxy_gain": 0.6, "proxy_error": 0.05})  # fmt: skip
        content["ends"].append({**about, "step": 80, "control_gain": -0.9, "proxy_gain": 1.3, "kl": 7.0 / coef / 20})
        content["equal_kl"].append({**about, "at_kl": 0.4, "control_gain": 0.1})
    return content


def test_a_declining_run_did_not_fail_to_fall() -> None:
    (claim,) = of("rl-report", rl({"single": ("rm", 0.05, "declining")}))
    assert "0 hacked the proxy within 80 steps: the control reward fell beyond its noise" not in claim.seen


def test_the_largest_kl_of_some_runs_is_not_called_that_of_others() -> None:
    groups = {f"{kind}-{coef}": (kind, coef, "kept") for kind in ("rm", "warm") for coef in (0.05, 0.5)}
    seen = [claim.seen for claim in of("rl-report", rl(groups)) if claim.seen.startswith("Control gain at 0.4 nats")]
    assert len(seen) == 2
    assert not any("the largest KL that all runs reached with a KL coefficient of 0.05" in words for words in seen)


def test_hacking_of_the_average_is_said_where_that_of_single_models_is() -> None:
    claims = of(
        "rl-report", rl({"single": ("rm", 0.05, "over-optimised"), "average": ("warm", 0.05, "over-optimised")})
    )
    assert any("hacked" in claim.seen and "average" in claim.seen for claim in claims)


@pytest.mark.parametrize("name", ["warm-start", "warm_up", "below-average"])
def test_a_single_model_is_no_average_for_its_name(name: str) -> None:
    claims = of("rl-report", rl({name: ("rm", 0.05, "over-optimised")}))
    assert [claim.verdict for claim in claims] == ["agrees"]


def test_what_is_not_in_the_paper_does_not_agree_with_the_paper() -> None:
    claim = Claim("not reported: averaging is worth more than the start", "s", "agrees", "ev", ("w", "on val", "+2"))
    assert "agrees with the paper" not in in_short([(claim, "r1")])


def test_clean_training_pairs_are_shown_with_what_they_are() -> None:
    size = {"n": 900, "prompts": 900}
    shares = {("train[clean]", "m"): 0.97, ("train[clean]", "average"): 0.88, ("val", "m"): 0.7,
              ("val", "average"): 0.75, ("train[swapped]", "m"): 0.8, ("train[swapped]", "average"): 0.4}  # fmt: skip
    rows = [
        {**size, "set": name, "model": model, "kind": "member" if model == "m" else "average", "accuracy": share}
        for (name, model), share in shares.items()
    ]
    gap = {**size, "a": "average", "b": "ensemble (mean)", "set": "train[clean]"}
    content = {"rows": rows, "differences": [{**gap, "difference": -0.09, "low": -0.1, "high": -0.08}]}
    claims = [claim for claim in of("eval", content) if "train[clean]" in claim.seen]
    assert not claims or "memor" in claims[0].seen


@pytest.mark.parametrize(
    ("change"),
    [
        pytest.param({"difference": 0.5, "low": 0.4, "high": 0.6}, id="not the difference of the rows"),
        pytest.param({"difference": -0.5, "low": 0.02, "high": 0.03}, id="outside of its own interval"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(change: Row) -> None:
    content = CONTENTS["eval"]()
    content["differences"][1] |= change
    with pytest.raises(UsageError):
        of("eval", content)


def test_numbers_in_a_claim_are_those_of_its_rows() -> None:
    (claim,) = of("eval", CONTENTS["eval"]())
    assert "71.2 % against 70.0 %, +1.2 points (95 % interval +0.3 to +2.1; n = 900 comparisons of 90" in claim.seen


# --- the report ---


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a result; figures are not drawn."""

    def drawn(folder: Path, kind: str, _: Any) -> list[Path]:
        (folder / "f.svg").write_text('<svg viewBox="0 0 3 4"><path d="M 0 0"/></svg>')
        return [folder / "f.svg"]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warmerge.report.page.svg.draw", drawn)
    put("w", "eval", CONTENTS["eval"]())
    return tmp_path


def put(folder: str, kind: str, content: Row) -> Path:
    path = Path(folder, f"{kind}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.usefixtures("place")
def test_a_report_does_not_replace_what_it_is_made_of() -> None:
    before = Path("w/eval.json").read_text()
    with pytest.raises((UsageError, RefusedError)):
        write_report(["w"], "w/eval.json", overwrite=True)
    assert Path("w/eval.json").read_text() == before


@pytest.mark.usefixtures("place")
def test_a_pipe_or_device_is_not_replaced() -> None:
    os.mkfifo("pipe")
    with pytest.raises(UsageError):
        write_report(["w"], "pipe", overwrite=True)
    assert Path("pipe").is_fifo()


@pytest.mark.usefixtures("place")
def test_a_proxy_that_is_no_text_is_refused() -> None:
    content = CONTENTS["bon"]()
    content["peaks"][0]["proxy"] = 5
    put("w", "bon", content)
    with pytest.raises(RefusedError):
        write_report(["w"], "r.html")


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("name", HOSTILE, ids=[repr(name)[:12] for name in HOSTILE])
def test_hostile_names_stay_names(name: str) -> None:
    content = CONTENTS["eval"]()
    for row in [*content["rows"], *content["differences"], *content["sets"]]:
        row |= {"set": name, "name": name}
    content["rows"][0]["model"] = name
    content |= {"notes": [name], "warnings": [name], "command": ["warmerge", name], "versions": {name: name}}
    put("w", "eval", content)
    write_report(["w"], "r.html", title=name)
    html = Path("r.html").read_text(encoding="utf-8")
    assert not any(raw in html for raw in ("<script>alert", "</title><b>", "\x1b", "\u202e"))
    assert html.count("<title>") == html.count("</title>") == 1


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("text", "what"),
    [
        (json.dumps(CONTENTS["eval"]())[:200], "is not JSON"),
        (json.dumps(CONTENTS["eval"]()).replace("0.712", "NaN"), "NaN is no number of JSON"),
        (json.dumps(CONTENTS["eval"]()).replace("0.712", "1e999"), "1e999 is no number of JSON"),
        (json.dumps(CONTENTS["eval"]()).replace("eval 1", "eval 2"), "expected the format 'warmerge eval 1'"),
        (json.dumps(CONTENTS["eval"]()).replace("0.733", "0.1"), "expected low <= high"),
    ],
)
def test_broken_results_are_refused_and_named(text: str, what: str) -> None:
    Path("w/eval.json").write_text(text)
    with pytest.raises(RefusedError, match=r"w/eval\.json") as caught:
        write_report(["w"], "r.html")
    assert what in str(caught.value)
    assert not Path("r.html").exists()


@pytest.mark.usefixtures("place")
def test_a_folder_given_in_many_ways_and_through_links_is_shown_once() -> None:
    put("w/in/deep", "eval", CONTENTS["eval"]())
    Path("link").symlink_to("w")
    Path("w/in/up").symlink_to("..")
    assert len(write_report(["w", "./w", "w/in", "link", "w/in/.."], "w/r.html").results) == 2
    before = Path("w/r.html").read_bytes()
    write_report(["w", "./w", "w/in", "link", "w/in/.."], "w/r.html", overwrite=True)  # its own page is no result
    assert Path("w/r.html").read_bytes() == before


# --- a control reward of bon that is a function ---


def of_function(body: str) -> Rewarder:
    Path("own.py").write_text(f"def reward(prompts, completions, **columns):\n    {body}\n")
    return load_rewarder(cast("OwnFunction", open_rewarder("own.py:reward")), Measuring())


def test_what_a_function_prints_is_not_printed_among_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert of_function("print('HELLO'); return [1.0] * len(prompts)").rewards([("p", "a")]).rewards.tolist() == [1.0]
    assert "HELLO" not in capsys.readouterr().out


def test_what_a_function_raises_is_said_in_plain_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"own\.py:reward failed: ValueError") as caught:
        of_function("raise ValueError('\\x1b[2Jgone')").rewards([("p", "a")])
    assert "\x1b" not in str(caught.value)


def test_a_function_that_changes_what_it_is_given_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts: list[tuple[Any, str]] = [("p", "a"), ([{"role": "user", "content": "q"}], "b")]
    body = "prompts.reverse(); prompts[0][0].clear(); return [float(len(c)) for c in completions]"
    assert of_function(body).rewards(texts).rewards.tolist() == [1.0, 1.0]
    assert texts == [("p", "a"), ([{"role": "user", "content": "q"}], "b")]


# --- the theory ---


def by_hand(scenario: Scenario, noise: float, members: int, layers: int) -> float:
    """Over all that the members may have learned."""
    p, norms, signs = (scenario.each(key) for key in ("p", "norm", "sign"))
    total = 0.0
    for bits in itertools.product((0, 1), repeat=members * len(p)):
        learned = numpy.array(bits).reshape(members, len(p))
        c = learned.mean(axis=0) ** layers
        signal, spread = float(c @ (signs * norms**2)), noise * math.sqrt(float(c**2 @ norms**2))
        right = 0.5 if spread == 0 else 0.5 * math.erfc(-signal / spread / math.sqrt(2))
        total += float(numpy.where(learned == 1, p, 1 - p).prod()) * right
    return total


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("noise", [0.3, 1.0, 5.0])
def test_exact_accuracies_are_those_of_all_that_can_be_learned(noise: float, layers: int) -> None:
    groups = (FeatureGroup("x", 1, 0.5, 2.0), FeatureGroup("y", 1, 1.0, 0.5, 0), FeatureGroup("z", 2, 0.3, 1.0, -1))
    scenario = Scenario("s", groups)
    for members in (1, 2):
        found = theory.expected_accuracy(scenario, noise, members, layers)
        assert found == pytest.approx(by_hand(scenario, noise, members, layers), abs=1e-8)


def test_exact_accuracies_of_many_features_are_as_exact_as_said() -> None:
    sure = Scenario("s", (FeatureGroup("x", 100_000, 0.5),))
    assert theory.expected_accuracy(sure, 1.0, 1000, 2) == pytest.approx(1.0, abs=5e-9)


# --- units inline ---


def test_a_unit_that_fails_inline_does_not_take_the_others_along(tmp_path: Path) -> None:
    units = []
    for name, function in (("bad", "json:no_such_name"), ("exits", "sys:exit"), ("good", "builtins:print")):
        (tmp_path / name).mkdir()
        units.append(Unit(name, function, tmp_path / name))
    told: list[Outcome] = []
    found = run_units(units, engine="inline", on_outcome=told.append)
    assert [outcome.state for outcome in found] == ["failed", "failed", "done"]
    assert found == told
    assert str(tmp_path / "good") in (tmp_path / "good" / "log.txt").read_text()
