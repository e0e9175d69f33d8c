"""The command as a user runs it: a process of its own, its two streams and its exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from conftest import llama_tensors
from safetensors.torch import load_file
from typer.testing import CliRunner

import warmerge
from warmerge import cli

ROOT = Path(warmerge.__file__).parents[1]
COMMANDS = sorted(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
HEAVY = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "matplotlib"}


class Done(NamedTuple):
    code: int
    out: str
    err: str


def environment(**more: str) -> dict[str, str]:
    """Ours without what would colour or wrap the output."""
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_COLOR") and key != "GITHUB_ACTIONS"}
    return kept | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)} | more


def cells(line: str) -> list[str]:
    """The cells of a table's line."""
    return re.split(r" {2,}", line.strip())


def run(*arguments: str | Path, cwd: Path) -> Done:
    """`python -m warmerge ...` in a process of its own; torch's import makes it take seconds."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "warmerge", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env=environment(), timeout=100,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def here(*arguments: str | Path) -> Done:
    """The same within this process: for the many cases whose parsing and printing is what matters."""
    result = CliRunner().invoke(cli.app, list(map(str, arguments)), env=environment())
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


# --- processes of their own ---


def test_average_prints_the_folder_alone(tmp_path: Path, rm: Any) -> None:
    rm("a", seed=1)
    rm("b", seed=2, shards=2)
    done = run("average", "a", "b", "-o", "warm", cwd=tmp_path)
    assert done == Done(0, "warm\n", "")
    merged = load_file(tmp_path / "warm" / "model.safetensors")
    for name, tensor in merged.items():
        assert torch.equal(tensor, ((llama_tensors(1)[name].double() + llama_tensors(2)[name].double()) / 2).float())
    manifest = json.loads((tmp_path / "warm" / "warmerge.json").read_bytes())
    assert manifest["command"] == ["warmerge", "average", "a", "b", "-o", "warm"]


def test_inspect_and_rules_run_alone(tmp_path: Path, rm: Any) -> None:
    rm("a", seed=1)
    rm("b", seed=2)
    done = run("inspect", "a", "b", cwd=tmp_path)
    assert done.code == 0
    assert done.err == ""
    assert done.out.splitlines()[-1] == "These checkpoints may be merged."
    assert re.search(
        r"^ *a +LlamaForSequenceClassification +score\.weight \[1, 16\] +4,960 +F32 +1 +none *$", done.out, re.M
    )
    rm("c", seed=3, drop=("score.weight",))
    done = run("inspect", "a", "c", cwd=tmp_path)
    assert (done.code, done.err) == (3, "")
    assert "refused: c: tensor 'score.weight' is missing here, present in a;" in done.out
    done = run("inspect", "a", "nowhere/to/be", cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    done = run("rules", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    for rule in ("uniform", "weighted", "lambda", "slerp", "liti", "stock"):
        assert re.search(rf"^ *{rule} ", done.out, re.M)


def test_the_installed_command_is_the_module(tmp_path: Path) -> None:
    from importlib.metadata import entry_points

    (entry,) = (entry for entry in entry_points(group="console_scripts") if entry.name == "warmerge")
    assert entry.load() is cli.main


# --- results and refusals ---


def test_average_json_is_one_object_and_warnings_go_to_stderr(tmp_path: Path, rm: Any) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2, add={"score.weight": -llama_tensors(1)["score.weight"]})
    out = tmp_path / "warm"
    done = here("average", a, b, "-o", out, "--json", "--weights", "0.25,0.75", "--rule", "weighted")
    assert done.code == 0
    result = json.loads(done.out)
    assert result["out"] == str(out)
    assert result["coefficients"] == {"members": [0.25, 0.75], "base": 0.0}
    assert {key: value for key, value in result.items() if key != "out"} == json.loads(
        (tmp_path / "warm" / "warmerge.json").read_bytes()
    )
    (line,) = done.err.splitlines()
    assert line.startswith(f"warning: {b}: tensor 'score.weight' has cosine -1.00 with {a}'s: these heads look")


def test_a_refusal_exits_3_and_prints_no_result(tmp_path: Path, rm: Any) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2, drop=("score.weight",))
    done = here("average", a, b, "-o", tmp_path / "warm", "--json")
    assert done.code == 3
    assert done.out == ""
    lines = done.err.splitlines()
    assert lines[0] == "warmerge: refused, 2 findings:"
    assert lines[1].startswith(f"  - {b}: tensor 'score.weight' is missing here, present in {a};")
    assert lines[2].startswith(f"  - {b}: has no reward head")
    assert "Traceback" not in done.err
    assert not (tmp_path / "warm").exists()


# --- inspect, rules, plans ---


def test_inspect_says_why_not(rm: Any) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2, config={"hidden_size": 32})
    done = here("inspect", a, b)
    assert done.code == 3
    assert f"refused: {b}/config.json: has hidden_size 32, expected 16 as in {a}" in done.out
    assert "may be merged" not in done.out


def test_inspect_json(rm: Any) -> None:
    done = here("inspect", rm("a", seed=1), rm("b", seed=2), "--json")
    found = json.loads(done.out)
    assert done.code == 0
    assert [row["head"] for row in found["checkpoints"]] == ["score.weight [1, 16]"] * 2
    assert (found["findings"], found["warnings"], found["distances"]) == ([], [], None)
    done = here("inspect", rm("a", seed=1), rm("c", drop=("model.norm.weight",)), "--json")
    assert done.code == 3
    assert [finding["tensor"] for finding in json.loads(done.out)["findings"]] == ["model.norm.weight"]


def test_inspect_distances_and_figure(tmp_path: Path, rm: Any) -> None:
    members, base = [rm("a", seed=1), rm("b", seed=2)], rm("base", spread=0.0)
    done = here("inspect", *members, "--distances", "--base", base, "--json", "--figure", tmp_path / "angles.png")
    assert done.code == 0
    whole = json.loads(done.out)["distances"][0]
    deltas = [
        torch.cat([load_file(m / "model.safetensors")[n].flatten() - t.flatten() for n, t in sorted(start.items())])
        for start in [load_file(base / "model.safetensors")]
        for m in members
    ]
    cosine = float(torch.nn.functional.cosine_similarity(deltas[0], deltas[1], dim=0))
    assert whole["cosines"][0][1] == pytest.approx(cosine, abs=1e-6)
    assert whole["norms"] == pytest.approx([float(delta.norm()) for delta in deltas], rel=1e-5)
    assert (tmp_path / "angles.png").read_bytes().startswith(b"\x89PNG")
    done = here("inspect", *members, "--figure", tmp_path / "x.png")
    assert (done.code, done.err) == (2, "warmerge: --figure draws distances; add --distances\n")


def test_rules_json_lists_the_table() -> None:
    from warmerge.weights.rules import RULES

    done = here("rules", "--json")
    rows = json.loads(done.out)
    table = rows if isinstance(rows, list) else rows["rules"]
    assert [row["rule"] for row in table] == list(RULES)
    slerp = next(row for row in table if row["rule"] == "slerp")
    assert slerp["options"] in ("--lambda --base", ["--lambda", "--base"])
    assert slerp["source"] == "WARP, arXiv 2406.16768"


def test_dry_run_writes_nothing(tmp_path: Path, rm: Any) -> None:
    a, b, base = rm("a", seed=1), rm("b", seed=2), rm("base", spread=0.0)
    before = sorted(tmp_path.iterdir())
    done = here("average", a, b, "-o", tmp_path / "warm", "--dry-run", "--rule", "liti", "--eta", "0.5", "--base", base)
    assert (done.code, done.err) == (0, "")
    assert f"coefficients  {a}: 0.25, {b}: 0.25, base: 0.5" in done.out
    assert "tensors       21 merged, 0 copied" in done.out
    assert done.out.splitlines()[-1] == "checks        all passed; nothing was written"
    done = here(
        "average", a, b, "--dry-run", "--json", "--max-shard-size", "2KB", "--only", "score*", "--rest-from", "2"
    )
    plan = json.loads(done.out)
    assert plan["rule"] == "uniform"
    assert plan["coefficients"] == [0.5, 0.5]
    assert (plan["tensors"], plan["merged"]) == (21, 1)
    assert sum(plan["shards"].values()) == plan["output_bytes"]
    done = here("average", a, b, "--dry-run", "--rule", "stock", "--base", base)
    assert "coefficients  measured for each tensor" in done.out
    assert sorted(tmp_path.iterdir()) == before


def test_a_dry_run_promises_what_is_written(tmp_path: Path, rm: Any) -> None:
    members = [rm("a", seed=1), rm("b", seed=2)]
    plan = json.loads(here("average", *members, "--dry-run", "--json", "--max-shard-size", "2KB").out)
    here("average", *members, "-o", tmp_path / "warm", "--max-shard-size", "2KB")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "warm").glob("*.safetensors")}
    assert plan["shards"] == sizes


def test_a_dry_run_refuses_what_the_run_would(tmp_path: Path, rm: Any) -> None:
    a, b, bad = rm("a", seed=1), rm("b", seed=2), rm("bad", seed=3, config={"vocab_size": 33})
    out = tmp_path / "warm"
    assert here("average", a, bad, "--dry-run").code == 3
    for wrong in (
        ["--lambda", "0.5"],
        ["--rule", "slerp"],
        ["--rule", "mean"],
        ["--weights", "1,x"],
        ["--only", "nil*"],
    ):
        dry, wet = here("average", a, b, "--dry-run", *wrong), here("average", a, b, "-o", out, *wrong)
        assert dry == wet, wrong
        assert (dry.code, dry.out) == (2, ""), wrong
        assert not out.exists()


# --- wrong usage ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["average", "A", "B"], "warmerge: -o OUT is missing: the new folder for the merged checkpoint"),
        (["average", "A", "B", "-o", "O", "--weights", "a,b"], "warmerge: --weights: expected numbers with commas"),
        (["average", "A", "B", "-o", "O", "--rule", "lambda", "--lambda", "2"], "--lambda: expected a number from 0"),
        (["average", "A", "B", "-o", "A"], "is, lies in, or holds the input"),
        (["average", "A", "nowhere/at/all", "-o", "O"], "warmerge: no local folder 'nowhere/at/all'"),
        (["average", "A", "B", "-o", "O", "--resume"], "warmerge: nothing to resume: no interrupted merge into"),
        (["inspect", "A", "--distances"], "warmerge: --distances takes two checkpoints or more"),
    ],
)
def test_usage_errors_exit_2_in_one_sentence(tmp_path: Path, rm: Any, arguments: list[str], message: str) -> None:
    places = {"A": str(rm("a", seed=1)), "B": str(rm("b", seed=2)), "O": str(tmp_path / "out")}
    done = here(*(places.get(argument, argument) for argument in arguments))
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith("warmerge: ")


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["average", "a", "b", "--wieghts", "1,2"], "--wieghts"),
        (["average", "a", "b", "-o", "x", "--threads", "many"], "--threads"),
        (["average"], "CKPT"),
        (["averge", "a", "b"], "averge"),
        (["rules", "--verbose"], "--verbose"),
        (["inspect", "a", "--distance"], "--distance"),
    ],
)
def test_misspelt_options_and_commands_exit_2(arguments: list[str], shown: str) -> None:
    done = here(*arguments)
    assert (done.code, done.out) == (2, "")
    assert shown in done.err
    assert "Traceback" not in done.err


def test_processes_of_torchrun_do_not_all_do_the_same(rm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a = rm("a", seed=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    what = "inspect is the work of one process, and WORLD_SIZE says that 2 were started to do it"
    advice = "start it without torchrun or accelerate launch, or unset WORLD_SIZE"
    assert here("inspect", a) == Done(2, "", f"warmerge: {what}; {advice}\n")
    for command in ("train", "rl"):
        assert "WORLD_SIZE" not in here(command).err
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert here("inspect", a).code == 0


def test_a_failure_exits_1(tmp_path: Path, rm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    members = [rm("a", seed=1), rm("b", seed=2)]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=7))
    done = here("average", *members, "-o", tmp_path / "warm")
    assert (done.code, done.out) == (1, "")
    assert re.fullmatch(rf"warmerge: {tmp_path}: [\d,]+ bytes are needed, 7 are free; nothing was written\n", done.err)


def test_a_traceback_only_with_debug(tmp_path: Path, rm: Any) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2, drop=("score.weight",))
    plain = here("average", a, b, "-o", tmp_path / "warm")
    assert plain.code == 3
    with pytest.raises(warmerge.RefusedError) as caught:
        here("average", a, b, "-o", tmp_path / "warm", "--debug")
    assert plain.err == f"warmerge: {caught.value}\n"
    shown = run("inspect", a, "--figure", "x.png", "--debug", cwd=tmp_path)
    assert shown.code == 1
    assert shown.err.startswith("Traceback (most recent call last):")
    assert shown.err.rstrip().endswith("UsageError: --figure draws distances; add --distances")


def test_ctrl_c_outside_of_a_merge(monkeypatch: pytest.MonkeyPatch, rm: Any) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("warmerge.pipeline.inspect.inspect", stopped)
    assert here("inspect", rm("a")) == Done(130, "", "warmerge: stopped\n")


def test_every_error_has_the_exit_code_of_the_table() -> None:
    codes = {
        kind.__name__: kind.exit_code
        for kind in (
            warmerge.WarmergeError, warmerge.UsageError, warmerge.RefusedError, warmerge.RemoteError,
            warmerge.Interrupted,
        )
    }  # fmt: skip
    assert codes == {
        "WarmergeError": 1, "UsageError": 2, "RefusedError": 3, "RemoteError": 1, "Interrupted": 130,
    }  # fmt: skip


# --- help ---


@pytest.mark.parametrize("command", COMMANDS)
def test_help_mentions_every_option(command: str) -> None:
    done = here(command, "--help")
    assert done.code == 0
    parameters = typer.main.get_command(cli.app).commands[command].params  # type: ignore[attr-defined]
    for parameter in parameters:
        for flag in (*parameter.opts, *parameter.secondary_opts):
            if flag.startswith("-"):
                assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", done.out), flag
                assert parameter.help, f"{flag} has no help"
    assert done.out == here(command, "-h").out


def test_help_of_the_whole_lists_the_commands() -> None:
    done = here("--help")
    assert done.code == 0
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", done.out)
    assert {"average", "inspect", "rules"} <= set(COMMANDS)
    assert here("--version").out == f"{__import__('importlib.metadata').metadata.version('warmerge')}\n"


# --- what is imported before a command runs ---


def heavy_imports(code: str, *path: Path) -> set[str]:
    """Which of the heavy libraries a fresh interpreter has loaded after it ran `code`."""
    report = f"import sys, json\nloaded = sorted({HEAVY!r} & {{name.partition('.')[0] for name in sys.modules}})\n"
    script = f"{code}\n{report}print('loaded', json.dumps(loaded), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60,
        env=environment(PYTHONPATH=os.pathsep.join(map(str, (*path, ROOT)))),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1].removeprefix("loaded ")))


def called(*arguments: str) -> str:
    return (
        f"import sys\nsys.argv = {['warmerge', *arguments]!r}\nfrom warmerge.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code"
    )


@pytest.mark.parametrize(
    "code",
    ["import warmerge", called("--help"), called("average", "--help"), called("rules"), called("--version")],
    ids=["import", "--help", "average --help", "rules", "--version"],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str) -> None:
    assert heavy_imports(code) == set()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import planted", {"torch"}),
        ("import planted.deep", {"torch", "numpy"}),
        ("import warmerge\nimport planted", {"torch"}),
    ],
)
def test_the_import_check_can_fail(tmp_path: Path, code: str, expected: set[str]) -> None:
    """The same checker on a module that does import them; stand-ins for the libraries, so that it takes no seconds."""
    for library in ("torch", "numpy"):
        (tmp_path / library).mkdir()
        (tmp_path / library / "__init__.py").write_text("")
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "__init__.py").write_text("def later():\n    pass\nimport torch\n")
    (tmp_path / "planted" / "deep.py").write_text("from numpy import __name__\n")
    assert heavy_imports(code, tmp_path) == expected


def test_the_import_check_sees_the_real_torch() -> None:
    assert {"torch"} <= heavy_imports("import warmerge.weights.kernels")
