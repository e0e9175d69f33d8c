"""Big work on paper: bytes, hours, memory and dollars of models of 8 and 70 billion parameters, by stated assumptions.

`warmerge` has not done any of it: these are the numbers to plan with. Only the CPU time of averaging is measured (the
slope of `average-size` in benchmarks/scale.md). Rewrites the tables between the marks of docs/scale.md:

    python benchmarks/scale_plan.py
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
MEASURED, PAGE = ROOT / "benchmarks" / "scale.md", ROOT / "docs" / "scale.md"

# Assumptions. Each is in the page's tables of assumptions, made by `assumptions`.
MEMBERS = 6
SIZES = {"8B": 8e9, "70B": 70e9}
PEAK = 989e12  # bf16 FLOP/s of an H100 SXM, dense, by its data sheet
MFU = 0.4  # share of the peak that training and scoring reach
DECODE_MFU = 0.1  # sampling, many answers at once
GPU_BYTES = 80e9
DOLLARS = 3.0  # an hour of one H100
PAIRS, TEXT_TOKENS, PROMPT_TOKENS, ANSWER_TOKENS = 100_000, 600, 300, 300
PROMPTS, ANSWERS = 1_000_000, 16
GPUS, RANKS = 8, 32  # of one machine; that train one member
TEXT_BYTES = 4  # of UTF-8, a token
WINDOW, WINDOWS = 2048, 16  # texts tokenised at a time, windows of a unit of work
SOURCES = {
    "NVMe, 3 GB/s": 3e9, "network file system, 0.5 GB/s": 0.5e9, "--stream, 10 Gbit/s": 1.25e9,
    "--stream, 1 Gbit/s": 0.125e9,
}  # fmt: skip
DISK = 3e9  # where a streamed merge is written to
THREADS = 16


def assumptions() -> list[list[str]]:
    """What the tables stand on, and for whom it is."""
    return [
        ["assumed", "value"],
        ["members", f"{MEMBERS}, in bfloat16: 2 bytes a parameter"],
        ["peak of one H100, bf16, dense (data sheet)", f"{PEAK / 1e12:.0f} TFLOP/s"],
        ["share of it that training and scoring reach", f"{MFU:.0%}"],
        ["share of it that sampling reaches", f"{DECODE_MFU:.0%}"],
        ["FLOP a token and parameter", "6 to train, 2 to score or sample; attention left out"],
        ["an H100 hour", f"${DOLLARS:.2f}"],
        ["training data", f"{PAIRS:,} pairs, 2 x {TEXT_TOKENS} tokens each, one epoch"],
        ["texts to score", f"{PROMPT_TOKENS} tokens of prompt, {ANSWER_TOKENS} of answer, {TEXT_BYTES} bytes a token"],
    ]


# --- (a) averaging ----------------------------------------------------------------------------------------------------


def average_bytes(parameters: float, members: int = MEMBERS) -> tuple[float, float]:
    """Bytes read and bytes written.

    >>> average_bytes(70e9)
    (840000000000.0, 140000000000.0)
    """
    return 2 * parameters * members, 2 * parameters


def average_hours(parameters: float, bandwidth: float, streamed: bool, cpu_seconds: float, threads: int) -> float:
    """Reading and writing share a disk, but not a network; arithmetic goes on beside both.

    Args:
        bandwidth: of the source, in bytes a second.
        cpu_seconds: measured, for each GB that is read; divided by `threads`, which is better than was measured.
    """
    read, written = average_bytes(parameters)
    moving = max(read / bandwidth, written / DISK) if streamed else (read + written) / bandwidth
    return max(moving, read / 1e9 * cpu_seconds / threads) / 3600


def averaging(cpu_seconds: float) -> list[list[str]]:
    rows = [["members", "source", "GB read", "GB written", "moving bytes, hours",
             "CPU hours", f"hours in all, {THREADS} threads", "2 threads"]]  # fmt: skip
    for name, parameters in SIZES.items():
        read, written = average_bytes(parameters)
        for source, bandwidth in SOURCES.items():
            streamed = source.startswith("--stream")
            hours = [average_hours(parameters, bandwidth, streamed, cpu_seconds, n) for n in (THREADS, 2)]
            moving = average_hours(parameters, bandwidth, streamed, 0, 1)
            rows.append([f"{MEMBERS} x {name}", source, _n(read / 1e9), _n(written / 1e9),
                         _n(moving), _n(read / 1e9 * cpu_seconds / 3600), *map(_n, hours)])  # fmt: skip
    return rows


# --- (b) training -----------------------------------------------------------------------------------------------------


def training_flop(parameters: float, tokens: float) -> float:
    """6 N D: 2 N D forward, 4 N D backward. Activations that are computed again are not counted.

    >>> training_flop(70e9, 120e6)
    5.04e+19
    """
    return 6 * parameters * tokens


def gpu_hours(flop: float, share: float = MFU) -> float:
    """Hours of one H100.

    >>> round(gpu_hours(989e12 * 0.4 * 3600), 9)
    1.0
    """
    return flop / (PEAK * share) / 3600


def state_bytes(parameters: float) -> float:
    """Weights, gradients and AdamW's two moments in float32, as `warmerge train` keeps them: 16 bytes a parameter.

    >>> state_bytes(70e9) / 1e9
    1120.0
    """
    return 16 * parameters


def training() -> list[list[str]]:
    tokens = PAIRS * 2 * TEXT_TOKENS
    rows = [["members", "GPU hours, one member", f"GPU hours, {MEMBERS} members", "probe (2 N D, once)", "dollars",
             "AdamW's state, GB", "fewest H100 for it", f"of it on each of {RANKS}, GB", "LoRA: frozen float32, GB",
             f"RAM of a machine with {GPUS} ranks, GB"]]  # fmt: skip
    for name, parameters in SIZES.items():
        one = gpu_hours(training_flop(parameters, tokens))
        probe = gpu_hours(2 * parameters * tokens)
        state = state_bytes(parameters)
        rows.append([f"{MEMBERS} x {name}", _n(one), _n(one * MEMBERS), _n(probe),
                     _n((one * MEMBERS + probe) * DOLLARS), _n(state / 1e9), _n(math.ceil(state / GPU_BYTES)),
                     _n(state / RANKS / 1e9), _n(4 * parameters / 1e9), _n(4 * parameters * GPUS / 1e9)])  # fmt: skip
    return rows


# --- (c) scoring, (d) best-of-N ---------------------------------------------------------------------------------------


def units(texts: int) -> int:
    """Units of work for one model: windows of texts, so many to a unit.

    >>> units(2048 * 16), units(2048 * 16 + 1)
    (1, 2)
    """
    return math.ceil(texts / (WINDOW * WINDOWS))


def scoring() -> list[list[str]]:
    tokens = PROMPTS * TEXT_TOKENS
    rows = [["model", "models", "texts", "GPU hours", f"hours on {GPUS} x H100", "dollars", "units", "loading: GB read",
             "text MB a unit", "result MB a unit", "all token ids, GB"]]  # fmt: skip
    each = PROMPTS / units(PROMPTS)
    for name, parameters in SIZES.items():
        for models in (1, MEMBERS):
            hours = models * gpu_hours(2 * parameters * tokens)
            count = models * units(PROMPTS)
            rows.append([name, str(models), f"{PROMPTS:,}", _n(hours), _n(hours / GPUS), _n(hours * DOLLARS),
                         str(count), _n(count * 2 * parameters / 1e9), _n(each * TEXT_TOKENS * TEXT_BYTES / 1e6),
                         _n(each * 8 / 1e6), _n(8 * tokens / 1e9)])  # fmt: skip
    return rows


def best_of_n_tokens() -> tuple[int, int, int]:
    """Tokens of one prompt: sampled or read by the policy, scored with the prompt once, and with it for each answer.

    >>> best_of_n_tokens()
    (5100, 5100, 9600)
    """
    shared = PROMPT_TOKENS + ANSWERS * ANSWER_TOKENS
    return shared, shared, ANSWERS * (PROMPT_TOKENS + ANSWER_TOKENS)


def best_of_n() -> list[list[str]]:
    sampled, shared, alone = best_of_n_tokens()
    rows = [["policy and reward models", "sampling, GPU hours", "scoring by the average", f"by the {MEMBERS} members",
             "by the average, prompt not shared", f"hours on {GPUS} x H100, average", "dollars, average",
             "dollars, ensemble"]]  # fmt: skip
    for name, parameters in SIZES.items():
        drawn = gpu_hours(2 * parameters * sampled * PROMPTS, DECODE_MFU)
        one, repeated = (gpu_hours(2 * parameters * tokens * PROMPTS) for tokens in (shared, alone))
        rows.append([name, _n(drawn), _n(one), _n(MEMBERS * one), _n(repeated), _n((drawn + one) / GPUS),
                     _n((drawn + one) * DOLLARS), _n((drawn + MEMBERS * one) * DOLLARS)])  # fmt: skip
    return rows


# --- into the page ----------------------------------------------------------------------------------------------------


def measured_cpu_seconds(page: str) -> float:
    """CPU seconds for each GB of members that is read: the slope of `average-size` in benchmarks/scale.md.

    >>> measured_cpu_seconds("| average-size | GB | 0.5, 8 | 1, 9 | 1.0 (1%) | 1.0 | 0.20 s + 1.50 s (3%) | 46 | 3 |")
    1.5
    """
    row = next(line for line in page.splitlines() if line.startswith("| average-size | GB"))
    found = re.search(r"s \+ ([\d.]+) s \(", row)
    assert found is not None, row
    return float(found[1])


def tables(page: str) -> dict[str, str]:
    """The tables of docs/scale.md by the names of their marks, from the text of benchmarks/scale.md."""
    measured = [line for line in page.splitlines() if line.startswith("|")]
    fits = measured[: next(i for i, line in enumerate(measured) if line.startswith("| series | x |"))]
    parts = {
        "assumptions": assumptions(), "averaging": averaging(measured_cpu_seconds(page)), "training": training(),
        "scoring": scoring(), "best of n": best_of_n(),
    }  # fmt: skip
    return {"measured": "\n".join(fits)} | {name: markdown(rows) for name, rows in parts.items()}


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def filled(page: str, name: str, text: str) -> str:
    """A page with the text between the marks `<!-- name -->` and `<!-- end of name -->` replaced.

    >>> filled("a <!-- t -->old<!-- end of t --> b", "t", "new")
    'a <!-- t -->\\nnew\\n<!-- end of t --> b'
    """
    before, mark, rest = page.partition(f"<!-- {name} -->")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    assert mark, f"no mark {name}"
    assert end, f"no end of {name}"
    return f"{before}{mark}\n{text}\n{end}{after}"


def fill_page() -> None:
    """Writes docs/scale.md anew from benchmarks/scale.md and the assumptions."""
    page = PAGE.read_text()
    for name, text in tables(MEASURED.read_text()).items():
        page = filled(page, name, text)
    PAGE.write_text(page)


def _n(value: float) -> str:
    """Two digits that count below 100, none behind the point above."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.2g}"


if __name__ == "__main__":
    fill_page()
