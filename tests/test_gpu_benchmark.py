"""benchmarks/gpu.py, which is run on a lent GPU once: here all its parts on a CPU, with tiny sizes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
Rows = list[dict[str, str]]


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """The scripts import one another by name, as they do when they are run."""
    before, loaded = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path[:] = before
    for name in set(sys.modules) - loaded:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, in whose process nothing of the environment is changed for the tests after it."""
    import gpu

    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return gpu


def ran(gpu: Any, name: str, place: Path, limit: float = 100.0) -> Rows:
    """The rows of a part that went well."""
    assert gpu.run_here(name, place, place, True, limit)
    assert [path.name for path in place.iterdir()] == [f"{name}.json"], "models and merges are removed"
    rows: Rows = json.loads((place / f"{name}.json").read_text())["rows"]
    return rows


def test_limits_are_numbers(gpu: Any, tmp_path: Path) -> None:
    rows = ran(gpu, "limits", tmp_path)
    assert {"device memory, GB/s read and written", "disk, cold, one thread, GB/s"} <= {row["limit"] for row in rows}
    assert all(float(row["found"]) > 0 for row in rows)


def test_merges_are_compared_byte_by_byte(gpu: Any, tmp_path: Path) -> None:
    rows = ran(gpu, "average", tmp_path)
    assert {(row["M"], row["rule"]) for row in rows} == {
        ("2", "uniform"), ("3", "uniform"), ("2", "weighted"), ("2", "stock"),
    }  # fmt: skip
    assert {row["bytes unlike the first"] for row in rows} == {"0"}
    assert {row["tile"] for row in rows} == {"262144", "4194304"}
    from gpu_average import differing

    for name, data in (("a", b"\0\1\2\3"), ("b", b"\0\7\2\4")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(data)
    assert differing(tmp_path / "a", tmp_path / "b") == 2


def test_scoring_shares_prompts_and_knows_what_it_computed(gpu: Any, tmp_path: Path) -> None:
    limit, model, single, shared = ran(gpu, "scoring", tmp_path)
    assert float(limit["found"]) > 0
    assert model["model"] == "tiny"
    assert (single["answers"], shared["answers"]) == ("1", "16")
    assert single["method"] == shared["method"] == "prefix_reuse"
    assert float(shared["computed tokens per s"]) < float(shared["tokens per s"]), "a prompt was computed once"
    assert float(single["computed tokens per s"]) > float(single["tokens per s"]), "padding is computed too"
    assert float(shared["largest difference to alone"]) < 0.1 * float(shared["std"])


def test_both_ways_to_a_curve(gpu: Any, tmp_path: Path) -> None:
    curve, disk, bound = ran(gpu, "lmc", tmp_path)
    assert [row["way"] for row in (curve, disk)] == ["lmc-curve", "merge, load, score"]
    assert (curve["points"], curve["loading"]) == ("3", "")
    for row in (curve, disk):
        parts = [float(row[name] or 0) for name in ("of it merging", "loading", "rest")]
        assert sum(parts) == pytest.approx(float(row["s a point"]), rel=0.02)
    assert float(bound["found"]) > 0


def test_members_are_trained_twice_and_averaged(gpu: Any, tmp_path: Path) -> None:
    rows = ran(gpu, "train", tmp_path)
    members = [(row["member"], row["precision"], row["steps"]) for row in rows if "member" in row]
    assert members == [("1", "bfloat16", "3"), ("1", "bfloat16", "3"), ("1", "float32", "3"), ("2", "bfloat16", "3")]
    assert [row["found"] for row in rows if "check" in row] == ["True"]
    assert [row["model"] for row in rows if "accuracy" in row] == ["member-1", "member-2", "average"]


def test_what_pytest_says_is_kept(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> Any:
        assert command[1:5] == ["-m", "pytest", "-m", "gpu"]
        assert {Path(name).name for name in command if name.endswith(".py")} >= {"test_cuda.py", "test_on_cuda.py"}
        said = "F.\nFAILED tests/x.py::test_y - assert 1 == 2\n1 failed, 1 passed in 2.00s\n"
        return subprocess.CompletedProcess(command, 1, said, "")

    monkeypatch.setattr(subprocess, "run", run)
    assert not gpu.run_here("tests", tmp_path, tmp_path, True, 10)
    rows = json.loads((tmp_path / "tests.json").read_text())["rows"]
    assert rows[0] == {"failure": "FAILED tests/x.py::test_y - assert 1 == 2"}
    assert (rows[1]["exit status"], rows[1]["pytest"]) == ("1", "1 failed, 1 passed in 2.00s")


def test_a_case_that_fails_or_has_no_time_left_is_a_row(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import gpu_part

    def part_of_three_cases(part: Any) -> None:
        for case, needs in (("a", 0), ("b", 1000), ("c", 0)):
            with contextlib.suppress(gpu_part.NotRunError), part.case(case, needs):
                if case == "a":
                    raise RuntimeError("CUDA error: an illegal\nmemory access")
                part.row(case=case, found=0.123456)

    monkeypatch.setattr(gpu_part, "limits", part_of_three_cases)
    assert not gpu.run_here("limits", tmp_path, tmp_path, True, 100)
    rows = json.loads((tmp_path / "limits.json").read_text())["rows"]
    assert rows == [
        {"case": "a", "not run": "failed: RuntimeError: CUDA error: an illegal memory access"},
        {"case": "b", "not run": "no time was left for it"},
        {"case": "c", "found": "0.123"},
    ]
    printed = capsys.readouterr().out
    (tmp_path / "average.json").write_text((tmp_path / "limits.json").read_text().replace('"limits"', '"average"'))
    table = gpu.tables(tmp_path)
    assert table.index("## limits") < table.index("## average")
    for text in (printed, table):
        assert "\n| case | found |\n|---|---|\n| c | 0.123 |\n" in text


def test_all_parts_end_in_time(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: dict[str, float] = {}

    def run(command: list[str], timeout: float, **options: Any) -> Any:
        asked[command[2]] = timeout
        if command[2] == "average":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, int(command[2] == "lmc"))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--out", str(tmp_path / "out"), "--work", str(tmp_path)])
    (tmp_path / "warmerge-gpu-left").mkdir()
    with pytest.raises(SystemExit, match=r"went wrong in part or whole: average, lmc$"):
        gpu.main()
    assert list(asked) == list(gpu.PARTS)
    for name, (_, limit) in gpu.PARTS.items():
        assert asked[name] <= limit + gpu.GRACE + gpu.STARTING
    assert "average: stopped; what it had printed is kept" in capsys.readouterr().out
    assert not (tmp_path / "warmerge-gpu-left").exists(), "what a stopped part left takes memory"
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seconds", "1"])
    with pytest.raises(SystemExit, match="limits, tests, average, scoring, lmc, train"):
        gpu.main()
    assert capsys.readouterr().out.count("not run: no time was left") == len(gpu.PARTS)


def test_no_gpu_and_no_such_part(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(subprocess, "call", lambda command: 1)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="torch finds no GPU here; --smoke shows on a CPU that the parts work"):
        gpu.main()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sys, "argv", ["gpu.py", "averge", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no such part: averge; there are limits, tests, average" in capsys.readouterr().err
