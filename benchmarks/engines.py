"""What it costs to score as units of work: in one process, in processes of this machine, and on a Ray cluster on it.

Each model and the average of all score the same texts, in one thread for each process. Rewards are equal to the bit.

    python benchmarks/engines.py MODEL MODEL MODEL          # reward models that may be averaged
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import numpy
import torch

from warmerge.pipeline.scoring import Asked, score_all, units
from warmerge.pipeline.scoring.judge import open_average, open_judge
from warmerge.rewards.bench import Measuring
from warmerge.rewards.model import LoadOptions

WORDS = ["the", "of", "and", "to", "in", "is", "that", "it", "for", "was", "on", "are", "as", "with", "they", "be"]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("models", nargs="+")
    arguments.add_argument("--texts", type=int, default=1024)
    arguments.add_argument("--words", type=int, default=50)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    texts = [("", " ".join(random.choices(WORDS, k=random.randint(10, given.words)))) for _ in range(given.texts)]
    judges = [*map(open_judge, given.models), open_average("average", given.models)]
    asked = [Asked(judge, (texts,)) for judge in judges]
    measuring = Measuring(LoadOptions(device="auto"), threads=1)
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}")
    print(f"{len(judges)} models, {given.texts} texts of up to {given.words} words; load {os.getloadavg()[0]:.1f}\n")
    print("| engine | processes | s | s of scoring, summed | s beside scoring, for each unit |")
    print("|---|---|---|---|---|")
    first = None
    for engine, processes in (("inline", 1), ("local", 1), ("local", 2), ("ray", 2)):
        with tempfile.TemporaryDirectory() as folder, cluster(engine, processes):
            units.visible_devices = lambda count=processes: ["cpu"] * count
            begun = time.perf_counter()
            found = list(score_all(asked, measuring, engine=engine, store=Path(folder) / "units"))
            wall = time.perf_counter() - begun
        rewards = numpy.stack([one.rewards[0] for one in found])
        first = rewards if first is None else first
        assert numpy.array_equal(first, rewards), "not equal to the bit"
        scoring = sum(one.seconds[0] for one in found)
        beside = (wall * processes - scoring) / len(judges)
        print(f"| {engine} | {processes} | {wall:.1f} | {scoring:.1f} | {beside:.1f} |", flush=True)


@contextmanager
def cluster(engine: str, processors: int) -> Iterator[None]:
    """For "ray" a cluster of this many processors on this machine, for as long as it is needed."""
    if engine != "ray":
        yield
        return
    import ray

    ray.init("local", num_cpus=processors, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
