"""Folders as `warmerge rl` leaves them, with rows as such a run has them: no model is trained."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SETTINGS: Row = {
    "steps": 140, "kl_coef": 0.05, "batch": 128, "baseline": "loo", "answers": 4, "lr": 3e-4, "temperature": 0.9,
    "seed": 0, "control_every": 1, "clip": None, "lora": 0,
}  # fmt: skip


def hacked(steps: int = 140, *, seed: int = 0, every: int = 1, top: float = 60.0, height: float = 1.0,
           noise: float = 0.1, speed: float = 1.0) -> list[Row]:  # fmt: skip
    """Rows of a run whose control reward is highest at about step `top`, and then falls; the proxy rises on.

    The start has a control reward of 2 with a standard deviation of 2, and a proxy reward of 10 with one of 4.
    """
    draw = random.Random(seed)
    rows = []
    for step in range(1, steps + 1):
        t = (step - 1) / top
        control = 2 + 2 * (height * t * (2 - t) + draw.gauss(0, noise))
        measured = step in (1, steps) or step % every == 0
        rows.append(
            {
                "step": step, "proxy": 10 + 4 * (2 * (1 - math.exp(-t)) + draw.gauss(0, noise)), "proxy_std": 4.0,
                "reward": 0.0, "reward_std": 1.0, "control": control if measured else None,
                "control_std": 2.0 if measured else None, "disagreement": None, "kl_token": 0.01 * t,
                "kl_sequence": speed * 1.5 * t**1.2 + draw.gauss(0, 0.2 * noise), "length": 12 + 4 * t, "entropy": 1.0,
                "truncated": min(1.0, 0.05 * t), "no_signal": 0.0, "lr": 3e-4, "gradient_norm": 1.0,
                "tokens_per_second": 900.0, "seconds": 0.1,
            }
        )  # fmt: skip
    return rows


def rising(steps: int = 140, **more: Any) -> list[Row]:
    """Rows of a run whose control reward still rises at its end."""
    return hacked(steps, top=2.0 * steps, **more)


def straight(*points: tuple[float, float, float], std: float = 2.0) -> list[Row]:
    """Rows by hand: control, proxy and KL of each step, both rewards with the same standard deviation."""
    (first, *_) = hacked(1)
    return [
        {**first, "step": i, "control": c, "control_std": std, "proxy": p, "proxy_std": std, "kl_sequence": kl}
        for i, (c, p, kl) in enumerate(points, start=1)
    ]


def write_run(folder: Path, rows: list[Row], *, proxy: str = "warm", finished: bool = True, **more: Any) -> Path:
    """A run's folder. `more` are settings, or what of rl.json has the same name."""
    top = {key: more.pop(key) for key in ("policy", "prompts", "control", "asked", "format") if key in more}
    own = {key: more.pop(key) for key in ("kind", "checkpoints", "aggregate") if key in more}
    settings = {**SETTINGS, "steps": len(rows), **more}
    record = {
        "format": "warmerge rl 1", "command": [], "versions": {}, "finished": finished, "policy": "sft",
        "prompts": "prompts.jsonl", "control": "gold.py:gold",
        "proxy": {"name": proxy, "kind": "warm", "checkpoints": ["runs/1", "runs/2"], "aggregate": "mean", "k": 0.5,
                  "standardize": False, **own},
        "settings": settings, "asked": {"settings": settings, "proxy": proxy, **top, **own}, "checkpoints": [],
        "seconds": 1.0, "notes": [], "warnings": [], **top,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "rl.json").write_text(json.dumps(record))
    write_rows(folder / "rows.jsonl", rows)
    return folder


def write_rows(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def three_by_three(folder: Path) -> Path:
    """Three proxies, three seeds each: single models are hacked early, the ensemble later, the average later still."""
    for k, (name, top, height) in enumerate((("rm-0", 45.0, 0.7), ("ensemble", 55.0, 0.75), ("warm", 75.0, 1.1))):
        for seed in range(3):
            rows = hacked(seed=10 * k + seed, top=top + 5 * seed, height=height + 0.05 * seed)
            write_run(folder / f"{name}-{seed}", rows, proxy=name, seed=seed)
    return folder


def wins(steps: tuple[int, ...] = (20, 60, 100, 140), proxies: tuple[str, ...] = ("rm-0", "ensemble", "warm")) -> Row:
    """A result of `warmerge winrate`: policies of several steps against the start."""
    rows = [
        {"policy": f"{proxy}/step-{step}", "against": "sft", "win": (win := 0.5 + 0.4 * math.sin(step / 50 - 0.1 * k)),
         "low": win - 0.05, "high": win + 0.05, "n": 192, "step": step, "proxy": proxy}
        for k, proxy in enumerate(proxies)
        for step in steps
    ]  # fmt: skip
    return {"format": "warmerge winrate 1", "rows": rows}
