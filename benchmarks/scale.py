"""How costs grow: each command over ever larger inputs, with a line and a power law fitted to what was measured.

Every case is a process of its own that does the work of one command. Its CPU seconds (user and system, all threads),
wall seconds, peak memory above what the libraries took, and the bytes and calls of reading and writing are those of
the work alone, without imports; the least of `--repeats` runs counts. The copy floor (see average.py) runs right before
each merge. Bytes and calls do not depend on who else uses the machine, CPU seconds little, wall seconds much.

    python benchmarks/scale.py WORK                   # small sizes: does all of it work?
    python benchmarks/scale.py WORK --full --write    # 10 GB of disk; into scale.md, docs/scale.md and docs/scale.png
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import scale_inputs as inputs
import scale_plan
import scale_tables
from average import copy_floor

Arguments = dict[str, Any]
Measured = dict[str, float]
GB = 10**9


# --- the work of a command, in a process of its own -------------------------------------------------------------------


def measured(work: Callable[[], object]) -> Measured:
    """What a piece of work takes, beyond what this process took before it. Linux only: /proc knows peaks and bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
    before, cpu, begun = _counters(), time.process_time(), time.perf_counter()
    work()
    wall, cpu, after = time.perf_counter() - begun, time.process_time() - cpu, _counters()
    return {
        "wall": wall, "cpu": cpu, "peak": after["VmHWM"] - before["VmRSS"],
        "read": (after["rchar"] - before["rchar"]) / 1e6, "written": (after["wchar"] - before["wchar"]) / 1e6,
        "calls": after["syscr"] + after["syscw"] - before["syscr"] - before["syscw"],
    }  # fmt: skip


def _counters() -> Measured:
    """Memory in MB; bytes and calls of reading and writing so far."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    io = dict(line.split(":", 1) for line in Path("/proc/self/io").read_text().splitlines())
    return {name: int(fields[name].split()[0]) / 1024 for name in ("VmHWM", "VmRSS")} | {
        name: int(value) for name, value in io.items()
    }


def average_case(given: Arguments) -> Measured:
    import warmerge
    import warmerge.pipeline.average

    choices = {"max_shard_size": given.get("shard", "5GB"), "threads": given["threads"], "any_model": True}
    choices |= {"rule": given["rule"], "base": given["base"]} if "rule" in given else {}
    floor = measured(lambda: copy_floor([Path(m) for m in given["members"]], Path(given["out"]), given["threads"]))
    shutil.rmtree(given["out"])
    found = measured(lambda: warmerge.average(given["members"], given["out"], **choices))
    return found | {f"floor_{name}": floor[name] for name in ("cpu", "wall")}


def distances_case(given: Arguments) -> Measured:
    import warmerge

    return measured(
        lambda: warmerge.inspect(given["members"], distances=True, any_model=True, threads=given["threads"])
    )


def scoring_case(given: Arguments) -> Measured:
    from warmerge.rewards.model import LoadOptions, load_reward_model
    from warmerge.rewards.scoring import Tokens, method_of, score

    options = LoadOptions(template="plain", dtype="float32", device="cpu")
    model = load_reward_model(given["model"], options)
    method_of(model)  # verified before the clock starts: once for each model, not for each text
    texts = inputs.texts(given["texts"], given["prompt"])
    return measured(lambda: score(model, Tokens(model.renderer, texts)))


def curve_case(given: Arguments) -> Measured:
    import warmerge
    import warmerge.report.figures

    options = warmerge.LoadOptions(template="plain", dtype="float32", device="cpu")
    measuring = warmerge.Measuring(options, resamples=500, threads=given["threads"])
    points = given["points"]
    return measured(
        lambda: warmerge.lmc_curve(
            given["members"], [given["data"]], given["out"], points=points, measuring=measuring, overwrite=True
        )
    )


def bootstrap_case(given: Arguments) -> Measured:
    import numpy

    from warmerge.rewards.metrics import replicates

    values = numpy.random.default_rng(0).random((10, given["rows"]))
    clusters = [str(i // 2) for i in range(given["rows"])]
    return measured(lambda: replicates(values, clusters, resamples=500))


def pairs_case(given: Arguments) -> Measured:
    from warmerge.rewards.pairs import read_preferences, unique_texts

    return measured(lambda: unique_texts(read_preferences(given["data"])))


def best_of_n_case(given: Arguments) -> Measured:
    import numpy

    from warmerge.rewards.pool_curves import Chooser, pool_curves

    drawn = numpy.random.default_rng(0).random((4, given["prompts"], 16))
    choosers = [Chooser(f"proxy {i}", "rm", list(drawn[i])) for i in range(3)]
    gold, clusters = {"gold": list(drawn[3])}, [str(i) for i in range(given["prompts"])]
    return measured(lambda: pool_curves(choosers, gold, clusters, 16, resamples=500))


def report_case(given: Arguments) -> Measured:
    import warmerge
    import warmerge.pipeline.report

    return measured(lambda: warmerge.write_report([given["folder"]], given["out"], overwrite=True))


# --- what grows -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """A case over growing x. `given(place, x)` makes its inputs: in `place` / "x" what this x alone needs, elsewhere in
    `place` what others need too."""

    name: str
    grows: str
    case: Callable[[Arguments], Measured]
    given: Callable[[Path, float], Arguments]
    quick: tuple[float, ...]
    full: tuple[float, ...]


def members(place: Path, count: int, nbytes: float, **layout: int) -> list[str]:
    """So many checkpoints of so many bytes each; those that are there already are used."""
    folders = [place / f"{i}" for i in range(count)]
    made = [f if f.exists() else inputs.checkpoint(f, i, int(nbytes), **layout) for i, f in enumerate(folders)]
    return [str(folder) for folder in made]


def model(place: Path, kind: str, seed: int = 0, width: int = 64) -> str:
    folder = place / f"{kind}-{seed}"
    return str(folder if folder.exists() else inputs.reward_model(folder, kind, seed, width))


def of_size(place: Path, x: float) -> Arguments:
    return {"members": members(place / "x", 8, x * GB / 8)}


def of_members(place: Path, x: float) -> Arguments:
    return {"members": members(place, int(x), 0.1 * GB)}


def of_tensors(place: Path, x: float) -> Arguments:
    return {"members": members(place / "x", 2, 0.2 * GB, tensors=int(x))}


def of_shards(place: Path, x: float) -> Arguments:
    given = {"members": members(place / "x", 2, 0.2 * GB, tensors=10_000, shards=int(x))}
    return given | {"shard": f"{math.ceil(0.2 * GB / x * 1.01)}B" if x > 1 else "5GB"}


def of_shards_by_gram(place: Path, x: float) -> Arguments:
    given = of_shards(place, x)
    base = members(place / "x", 3, 0.2 * GB, tensors=10_000, shards=int(x))[2]
    return given | {"rule": "stock", "base": base}


def of_texts(kind: str) -> Callable[[Path, float], Arguments]:
    return lambda place, x: {"model": model(place, kind), "texts": int(x), "prompt": 16}


def of_prompts(kind: str) -> Callable[[Path, float], Arguments]:
    return lambda place, x: {"model": model(place, kind, width=256), "texts": 16, "prompt": int(x)}


def of_points(place: Path, x: float) -> Arguments:
    data = place / "pairs.jsonl"
    data = data if data.exists() else inputs.pairs(data, 200)
    return {"members": [model(place, "bert", i) for i in (0, 1)], "data": str(data), "points": int(x) + 1}


def of_rows(place: Path, x: float) -> Arguments:
    return {"data": str(inputs.pairs(place / "x" / "pairs.jsonl", int(x)))}


def of_results(place: Path, x: float) -> Arguments:
    first = place / "first"
    if not first.exists():
        one_thread = {"threads": 1, "out": str(first)}
        run("curve", of_points(place, 10) | one_thread)
    for i in range(int(x)):
        shutil.copytree(first, place / "x" / "results" / f"run-{i}")
    return {"folder": str(place / "x" / "results")}


SERIES = (
    Series("average-size", "GB of 8 members in all", average_case, of_size, (0.1, 0.2, 0.4), (0.5, 1, 2, 4, 8)),
    Series("average-members", "members of 0.1 GB", average_case, of_members, (2, 4, 8), (2, 4, 8, 16)),
    Series("average-tensors", "tensors in 0.2 GB, 2 members", average_case, of_tensors, (100, 1000, 10_000),
           (100, 1000, 5000, 10_000, 25_000, 50_000)),
    Series("average-shards", "shards of 10,000 tensors in 0.2 GB, in and out", average_case, of_shards, (1, 10, 50),
           (1, 25, 50, 100, 200)),
    Series("average-shards-stock", "shards, --rule stock", average_case, of_shards_by_gram, (1, 10, 50),
           (1, 25, 50, 100, 200)),
    Series("distances-size", "GB of 8 members in all", distances_case, of_size, (0.1, 0.2, 0.4), (0.5, 1, 2, 4)),
    Series("distances-members", "members of 0.1 GB", distances_case, of_members, (2, 4, 8), (2, 4, 8, 16)),
    Series("score-texts-decoder", "texts of 40 tokens", scoring_case, of_texts("llama"), (128, 256, 512),
           (512, 1024, 2048, 4096, 8192)),
    Series("score-texts-encoder", "texts of 40 tokens", scoring_case, of_texts("bert"), (128, 256, 512),
           (512, 1024, 2048, 4096, 8192)),
    Series("score-prompt-decoder", "tokens of a prompt, 4 answers to each", scoring_case, of_prompts("llama"),
           (64, 128, 256), (128, 256, 512, 1024, 2048)),
    Series("score-prompt-encoder", "tokens of a prompt, 4 answers to each", scoring_case, of_prompts("bert"),
           (64, 128, 256), (128, 256, 512, 1024, 2048)),
    Series("lmc-points", "steps from one member to the other", curve_case, of_points, (2, 4, 8), (4, 8, 16, 32, 64)),
    Series("bootstrap-rows", "comparisons, 10 models, 500 resamples", bootstrap_case,
           lambda place, x: {"rows": int(x)}, (1000, 4000, 16_000), (10_000, 30_000, 100_000, 300_000)),
    Series("best-of-n-prompts", "prompts of 16 answers, 3 proxies", best_of_n_case,
           lambda place, x: {"prompts": int(x)}, (100, 400, 1600), (300, 1000, 3000, 10_000)),
    Series("pairs-rows", "rows of pairs", pairs_case, of_rows, (1000, 4000, 16_000),
           (10_000, 30_000, 100_000, 300_000)),
    Series("report-results", "results of lmc-curve in a report", report_case, of_results, (1, 2, 4), (2, 4, 8, 16, 32)),
)  # fmt: skip
CASES = {case.__name__.removesuffix("_case"): case for case in (series.case for series in SERIES)}


# --- measuring --------------------------------------------------------------------------------------------


def run(case: str, given: Arguments) -> Measured:
    """One case in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(given.get("threads", 1))}
    command = [sys.executable, __file__, "--case", case, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{case} {given} failed:\n{done.stderr[-3000:]}")
    found: Measured = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(series: Series, place: Path, xs: Sequence[float], threads: int, repeats: int) -> list[Measured]:
    """A row for each x: the least of each quantity over the repeats. `floor_*` are of the copy floor."""
    rows = []
    for x in xs:
        (place / "x").mkdir(parents=True)
        given = series.given(place, x) | {"threads": threads, "out": str(place / "x" / "out")}
        found: list[Measured] = []
        for _ in range(repeats):
            found.append(run(series.case.__name__.removesuffix("_case"), given))
            shutil.rmtree(given["out"], ignore_errors=True)
        rows.append({"x": x} | {name: min(one[name] for one in found) for name in found[0]})
        print(f"  {series.name} {x:g}: " + ", ".join(f"{k} {v:.4g}" for k, v in rows[-1].items() if k != "x"),
              file=sys.stderr, flush=True)  # fmt: skip
        shutil.rmtree(place / "x")
    shutil.rmtree(place)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=textwrap.dedent(__doc__ or "").split("\n\n")[0])
    parser.add_argument("work", type=Path, nargs="?", help="a folder on the disk to measure; its scale/ is emptied")
    parser.add_argument("--full", action="store_true", help="the sizes of scale.md")
    parser.add_argument("--only", nargs="+", choices=[series.name for series in SERIES])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="into scale.md, docs/scale.md and its figure")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(CASES[arguments.case[0]](json.loads(arguments.case[1]))))
        return
    work, found, begun = arguments.work / "scale", {}, time.perf_counter()
    shutil.rmtree(work, ignore_errors=True)
    for series in SERIES:
        if not arguments.only or series.name in arguments.only:
            xs = series.full if arguments.full else series.quick
            found[series.name] = measure(series, work / series.name, xs, arguments.threads, arguments.repeats)
    shutil.rmtree(work, ignore_errors=True)
    machine = f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, {arguments.threads} thread(s), Python "
    machine += f"{platform.python_version()}, least of {arguments.repeats}; {time.perf_counter() - begun:.0f} s in all."
    grows = {series.name: series.grows for series in SERIES}
    fits, points = ["", machine, "", *scale_tables.summary(found, grows), ""], ["", *scale_tables.points(found), ""]
    print("\n".join([*fits, *points]))
    if arguments.write:
        page = scale_plan.filled(scale_plan.MEASURED.read_text(), "measured", "\n".join(fits))
        scale_plan.MEASURED.write_text(scale_plan.filled(page, "points", "\n".join(points)))
        scale_tables.draw(found, grows, scale_plan.ROOT / "docs" / "scale.png")
        scale_plan.fill_page()


if __name__ == "__main__":
    main()
