"""Contents of the JSON files of all commands, as small as that each has what a page shows of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Content = dict[str, Any]
INTERVALS = "percentile bootstrap over prompts, 2000 resamples, seed 0"


def made_by(command: str) -> Content:
    versions = {"torch": "2.13.0", "warmerge": "0.1.0"}
    return {
        "format": f"warmerge {command} 1", "command": ["warmerge", command, "a model", "b"], "versions": versions,
        "intervals": INTERVALS, "notes": [], "warnings": [],
    }  # fmt: skip


def training() -> Content:
    """With what of train.json stands on the page."""
    measured = {"set": "val", "n": 90, "prompts": 30}
    own = {"lr": 1e-4, "dropout": 0.1, "init": "init"}
    return {
        **made_by("train"), "training_pairs": 100, "swapped": 25,
        "members": [
            {"member": name, **own, "failed": "", "final_loss": 0.25, "final_accuracy": 0.9} for name in ("01", "02")
        ],
        "accuracies": [
            {**measured, "model": "start", "kind": "start", "accuracy": 0.5, "low": 0.4, "high": 0.6},
            *({**measured, "model": name, "kind": "member", "accuracy": 0.7, "low": 0.6, "high": 0.8}
              for name in ("01", "02")),
        ],
        "rows": [
            {"member": name, **own, "step": step, "loss": 0.7 - 0.1 * step, "accuracy": 0.5 + 0.1 * step}
            for name in ("01", "02") for step in (1, 2, 3)
        ],
    }  # fmt: skip


def evaluation() -> Content:
    size = {"set": "val", "n": 900, "prompts": 90}
    return {
        **made_by("eval"), "sets": [{"name": "val", "n": 900, "prompts": 90, "skipped_rows": 0}],
        "rows": [
            {**size, "model": "01", "kind": "member", "accuracy": 0.7, "low": 0.68, "high": 0.72, "ties": 0},
            {**size, "model": "average", "kind": "average", "accuracy": 0.712, "low": 0.691, "high": 0.733, "ties": 0},
        ],
        "differences": [
            {**size, "a": "average", "b": "best member (01)", "difference": 0.012, "low": -0.003, "high": 0.027},
            {**size, "a": "average", "b": "mean of the members", "difference": 0.012, "low": 0.003, "high": 0.021},
        ],
        "movements": [],
    }  # fmt: skip


def curve() -> Content:
    size = {"path": "01 -> 02", "set": "val", "n": 1314, "prompts": 89}
    ends = {"wa": 0.6, "wa_low": 0.55, "wa_high": 0.65, "ens": 0.6, "ens_low": 0.55, "ens_high": 0.65, "diag": 0.6,
            "wa_minus_ens": 0.0, "wa_minus_ens_low": -0.01, "wa_minus_ens_high": 0.01}  # fmt: skip
    return {
        **made_by("lmc-curve"), "sets": [{"name": "val", "n": 1314, "prompts": 89, "skipped_rows": 2}],
        "rows": [{**size, **ends, "lambda": at} for at in (0.0, 0.5, 1.0)],
        "verdicts": [
            {**size, "barrier": 0.008, "low": -0.02, "high": 0.043, "at": 0.25, "below_ensemble": 0.014,
             "below_ensemble_low": -0.02, "below_ensemble_high": 0.05, "tolerance": 0.01, "against": "line",
             "verdict": "cannot tell", "words": "cannot tell on val: more comparisons are needed"},
        ],
    }  # fmt: skip


def vs_m() -> Content:
    found = {"wa": 0.5857, "wa_low": 0.28, "wa_high": 0.8019, "ens": 0.53, "ens_low": 0.25, "ens_high": 0.77}
    rows = [
        {"set": "val", "m": m, "added": f"rm-{m}", "n": 70, "prompts": 5, **found, "single": 0.5, "selected_on": True}
        for m in (1, 2)
    ]
    return {**made_by("accuracy-vs-m"), "sets": [{"name": "val", "n": 70, "prompts": 5}], "rows": rows}


def bon() -> Content:
    rows = [
        {"proxy": proxy, "kind": kind, "n": n, "kl_bound": 0.1 * n, "prompts": 192, "reward": n, "reward_low": n - 0.1,
         "reward_high": n + 0.1, "gain": 0.3 * n, "gain_low": 0.2 * n, "gain_high": 0.4 * n,
         "gold": 0.625 * n, "gold_low": 0.575 * n, "gold_high": 0.675 * n,
         "win": 0.682, "win_low": 0.643, "win_high": 0.719}
        for proxy, kind in (("m1", "rm"), ("warm", "warm")) for n in (1, 2, 4)
    ]  # fmt: skip
    return {
        **made_by("bon"), "pool": {"source": "pool.jsonl", "prompts": 192, "candidates": 768}, "n": 4,
        "reference": "warm", "rows": rows,
        "differences": [{"proxy": "m1", "to": "warm", "n": 4, "target": "gold", "difference": 0.1, "low": -0.1,
                         "high": 0.3}],
        "peaks": [{"proxy": "m1", "kind": "rm", "target": "gold", "peak_n": 2, "peak_low": 1, "peak_high": 4,
                   "at_peak": 2.6, "fall": 0.16, "fall_low": 0.05, "fall_high": 0.29}],
        "wins": [], "fits": [], "proxies": [],
    }  # fmt: skip


def policies() -> Content:
    group = {"group": "warm", "run": None, "runs": 3}

    def span(**keys: tuple[float, float, float]) -> Content:
        return {
            f"{key}{end}": value
            for key, three in keys.items()
            for end, value in zip(("", "_low", "_high"), three, strict=True)
        }

    curve = [
        {**group, "step": step, "smooth": 1,
         **span(kl=(step / 10, step / 20, step / 5), control_gain=(0.1, 0.0, 0.2), proxy_gain=(0.2, 0.1, 0.3))}
        for step in (1, 2, 3)
    ]  # fmt: skip
    peak = {
        **group, "proxy": "warm", "kl_coef": 0.05, "outcome": "2 over-optimised, 1 declining",
        **span(step=(52, 19, 76), kl=(1.51, 0.53, 2.52), control_gain=(0.39, 0.27, 0.5), collapse_step=(104, 60, 149)),
        "collapse_step_runs": 2,
    }  # fmt: skip
    true = {**peak, "group": "true", "runs": 1, "proxy": "true", "outcome": "1 kept", "collapse_step": None}
    end = {**group, **span(control_gain=(-0.18, -1.07, 0.38), proxy_gain=(1.15, 0.71, 1.68), kl=(7.48, 3.47, 14.17))}
    return {
        **made_by("rl-report"), "margin": 0.5, "runs": [{"group": "warm", "control": "gold.py:gold"}] * 3,
        "words": ["warm was highest at step 52"], "rows": curve, "peaks": [peak, true], "ends": [end],
        "equal_kl": [{**group, "at_kl": 1.0, **span(control_gain=(0.3, 0.2, 0.4))}],
        "wins": [{"file": "wins.json", "policy": "warm", "against": "start", "proxy": "warm", "step": 50, "n": 192,
                  "win": 0.6, "low": 0.5, "high": 0.7}],
    }  # fmt: skip


def winrate() -> Content:
    row = {"policy": "warm step 50", "against": "start", "judge": "gold.py:gold", "n": 192, "win": 0.66927,
           "low": 0.6041, "high": 0.7318, "wins": 120, "ties": 17, "losses": 55, "length_win": 0.49}  # fmt: skip
    return {
        **made_by("winrate"), "prompts": {"source": "test.jsonl", "asked": 200, "compared": 192},
        "judge": {"label": "gold.py:gold"}, "rows": [row], "pairs": [], "policies": [],
    }  # fmt: skip


def theory() -> Content:
    law = {"ens_law": 0.7, "wa_law": 0.8, "gain_law": 0.1}
    drawn = {"ens": 0.7, "ens_se": 0.0102, "wa": 0.8, "wa_se": 0.0102, "gain": 0.1, "gain_se": 0.0102, "trials": 2000}
    return {
        **made_by("theory"), "trials": 2000, "seed": 0, "noise": 0.5, "layers": 2,
        "rows": [{"scenario": "one flips", "data": "out of distribution", "m": m, **law, **drawn} for m in (1, 2)],
        "coefficients": [{"p": p, "m": 2, "ens_law": p, "wa_law": p * p} for p in (0.0, 0.5, 1.0)],
        "features": [{"scenario": "one flips", "count": 6, "p": 0.8, "sign": 1}],
    }  # fmt: skip


CONTENTS: dict[str, Callable[[], Content]] = {
    "training": training, "eval": evaluation, "curve": curve, "vs_m": vs_m, "bon": bon, "rl-report": policies,
    "winrate": winrate, "theory": theory,
}  # fmt: skip
