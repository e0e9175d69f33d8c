"""What `average --stream` costs: against the bytes' own way over the wire, and against downloading first.

A Hub on 127.0.0.1 serves random reward models, each answer held back by a round trip. "wire" fetches all bytes of the
members with as many requests at once and as large ones, and throws them away: no merge can be faster. "tile by tile"
is the same streaming merge without reading ahead.

    python benchmarks/stream.py WORK --members 3 --gigabytes 0.5 --round-trips 0 0.05
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import torch
from average import make_member

TESTS = Path(__file__).parent.parent / "tests"
WINDOW, REQUESTS = 8 * 2**20, 16
TILES = "import warmerge.weights.stream as s; s._read_by_tiles = lambda tensors: iter(()); "


def serve(folder: Path, round_trip: float) -> None:
    """A Hub whose every answer is held back; its address is printed."""
    sys.path.insert(0, str(TESTS))
    import loopback_hub

    serve_at_once = loopback_hub._Handler.do_GET

    def do_get(handler: loopback_hub._Handler) -> None:
        time.sleep(round_trip)
        serve_at_once(handler)

    loopback_hub._Handler.do_GET = do_get  # type: ignore[method-assign]
    with loopback_hub.LoopbackHub({f"me/{path.name}": path for path in sorted(folder.iterdir())}) as hub:
        print(hub.url, flush=True)
        sys.stdin.read()


def fetch_all(url: str, folder: Path, names: list[str]) -> None:
    """Every byte of the weights by ranged requests, many at once, thrown away."""
    import httpx2

    spans = [
        (f"{url}/me/{name}/resolve/main/{file.name}", start, min(start + WINDOW, file.stat().st_size) - 1)
        for name in names
        for file in sorted((folder / name).glob("*.safetensors"))
        for start in range(0, file.stat().st_size, WINDOW)
    ]
    with httpx2.Client(timeout=60) as client, ThreadPoolExecutor(REQUESTS) as pool:

        def get(span: tuple[str, int, int]) -> int:
            address, first, last = span
            return len(client.get(address, headers={"Range": f"bytes={first}-{last}"}).content)

        received = sum(pool.map(get, spans))
    assert received == sum(last - first + 1 for _, first, last in spans)


def timed(argv: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """Seconds, processor seconds and peak MB of a process."""
    # By way of a small process: a child's peak begins at what its parent held.
    code = (
        "import json, resource, subprocess, sys, time; begun = time.perf_counter(); "
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(json.dumps([time.perf_counter() - begun, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *argv], env=environment, stdout=subprocess.PIPE, check=True, text=True
    )
    seconds, cpu, peak = json.loads(ended.stdout)
    return seconds, cpu, peak


def size(folder: Path) -> float:
    """Megabytes on the disk."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--round-trips", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--serve", type=float)
    parser.add_argument("--wire")
    options = parser.parse_args()
    folder = options.work / "members"
    if options.serve is not None:
        serve(folder, options.serve)
        return
    names = [f"rm-{i}" for i in range(options.members)]
    if options.wire is not None:
        fetch_all(options.wire, folder, names)
        return
    for i, name in enumerate(names):
        if not (folder / name).exists():
            make_member(folder / name, i + 1, torch.bfloat16, options.gigabytes, options.shards)
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{options.members} members of {options.gigabytes} GB in bf16, {options.shards} shards each\n")
    print("| round trip ms | program | s | / wire | CPU s | peak MB | MB on the disk beside the result |")
    print("|---|---|---|---|---|---|---|")
    ids = [f"me/{name}" for name in names]
    out, cache = options.work / "out", options.work / "cache"
    reference = None
    for round_trip in options.round_trips:
        argv = [sys.executable, __file__, str(options.work), "--serve", str(round_trip)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hub:
            assert hub.stdout is not None
            url = hub.stdout.readline().strip()
            environment = os.environ | {
                "HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub"), "HF_TOKEN": "",
                "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            }  # fmt: skip
            wire = [sys.executable, __file__, str(options.work), "--members", str(options.members), "--wire", url]
            merge = ["average", *ids, "-o", str(out), "--any-model"]
            code = "import sys; from warmerge.cli import main; sys.argv = ['warmerge', *sys.argv[1:]]; "
            programs = {
                "wire": wire,
                "download, then merge": [sys.executable, "-m", "warmerge", *merge],
                "--stream": [sys.executable, "-m", "warmerge", *merge, "--stream"],
                "--stream, tile by tile": [sys.executable, "-c", TILES + code + "main()", *merge, "--stream"],
            }
            floor = None
            for program, command in programs.items():
                shutil.rmtree(cache, ignore_errors=True)
                seconds, cpu, peak = timed(command, environment)
                floor = floor or seconds
                used = size(cache) if cache.exists() else 0
                row = (f"{1000 * round_trip:.0f}", program, f"{seconds:.1f}", f"{seconds / floor:.2f}", f"{cpu:.1f}")
                print(f"| {' | '.join(row)} | {peak:.0f} | {used:.0f} |", flush=True)
                if out.exists():
                    made = {p.name: p.read_bytes() for p in out.glob("*.safetensors")}
                    reference = reference or made
                    assert made == reference, "the same bytes, however they were read"
                    shutil.rmtree(out)
            hub.communicate("")
    print(json.dumps({"bytes of a member": sum(p.stat().st_size for p in (folder / names[0]).glob("*.safetensors"))}))


if __name__ == "__main__":
    main()
