"""How fast `warmerge average` is: against the copy floor, mergekit and a plain torch script, in one run.

The copy floor reads every input byte and writes every output byte with the same threads and block sizes and does no
arithmetic. mergekit runs from an environment of its own; its imports are timed apart, because they say nothing about
merging. Every output is compared with the float64 mean, rounded once.

    python benchmarks/average.py /dev/shm/work --caches warm --mergekit ENVIRONMENT/bin/python
    python benchmarks/average.py WORK --caches cold --mergekit ENVIRONMENT/bin/python

A folder in memory keeps the disk's own work (writing back, discarding) out of the warm cases.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from datetime import date
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

BLOCK = 1 << 20
HIDDEN, INNER, VOCAB = 2048, 5632, 32000


def make_member(folder: Path, seed: int, dtype: torch.dtype, gigabytes: float, shards: int) -> Path:
    """A Llama-shaped reward model with random weights: one start plus a small task vector of `seed`."""
    folder.mkdir(parents=True)
    layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER
    layers = max(1, round((gigabytes * 1e9 / dtype.itemsize - VOCAB * HIDDEN) / layer))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(layers):
        prefix = f"model.layers.{i}."
        shapes |= {f"{prefix}self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
        shapes |= {f"{prefix}mlp.{p}_proj.weight": (INNER, HIDDEN) for p in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": (HIDDEN, INNER)}
        shapes |= {f"{prefix}{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,), "score.weight": (1, HIDDEN)}
    start = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02
    step = torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed)) * 0.001
    total = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
    part: dict[str, torch.Tensor] = {}
    table: dict[str, str] = {}
    filled, number = 0, 1
    for position, (name, shape) in enumerate(shapes.items()):
        count = torch.Size(shape).numel()
        values = torch.roll(start, 101 * position) + torch.roll(step, 37 * position)
        part[name] = values.repeat(-(-count // len(values)))[:count].reshape(shape).to(dtype)
        filled += count * dtype.itemsize
        if filled * shards >= total * number or position == len(shapes) - 1:
            file = f"model-{number:05d}-of-{shards:05d}.safetensors"
            save_file(part, folder / file, metadata={"format": "pt"})
            table |= dict.fromkeys(part, file)
            part, number = {}, number + 1
    index = {"metadata": {"total_size": total}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 16, "vocab_size": VOCAB,
        "num_key_value_heads": 16, "dtype": str(dtype).removeprefix("torch."), "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def copy_floor(members: list[Path], out: Path, threads: int) -> float:
    """Seconds to read all members and write as many bytes as one of them holds, in the page cache of `out`."""
    files = [sorted(member.glob("*.safetensors")) for member in members]
    sizes = [file.stat().st_size for file in files[0]]
    out.mkdir()
    begun = time.perf_counter()
    inputs = [[os.open(file, os.O_RDONLY) for file in group] for group in files]
    outputs = [os.open(out / file.name, os.O_RDWR | os.O_CREAT) for file in files[0]]
    for descriptor, size in zip(outputs, sizes, strict=True):
        os.posix_fallocate(descriptor, 0, size)
    blocks = iter([(i, at) for i, size in enumerate(sizes) for at in range(0, size, BLOCK)])
    lock = threading.Lock()

    def worker() -> None:
        buffer = memoryview(bytearray(BLOCK))
        while True:
            with lock:
                block = next(blocks, None)
            if block is None:
                return
            shard, at = block
            for group in inputs:
                os.preadv(group[shard], [buffer], at)
            os.pwritev(outputs[shard], [buffer[: min(BLOCK, sizes[shard] - at)]], at)

    pool = [threading.Thread(target=worker) for _ in range(threads)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    elapsed = time.perf_counter() - begun
    for descriptor in (*outputs, *(descriptor for group in inputs for descriptor in group)):
        os.close(descriptor)
    return elapsed


MERGEKIT = """
import sys, time, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
recipe, out, threads = sys.argv[1:]
config = MergeConfiguration.model_validate(yaml.safe_load(open(recipe)))
begun = time.perf_counter()
run_merge(config, out, options=MergeOptions(num_threads=int(threads), copy_tokenizer=False, quiet=True))
print("merge seconds", time.perf_counter() - begun)
"""
PLAIN = """
import sys, time, torch
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import save_file
*members, out = map(Path, sys.argv[1:])
out.mkdir()
begun = time.perf_counter()
for file in sorted(members[0].glob("*.safetensors")):
    handles = [safe_open(m / file.name, "pt") for m in members]
    mean = {}
    for name in handles[0].keys():
        total = handles[0].get_tensor(name).float()
        for handle in handles[1:]:
            total += handle.get_tensor(name).float()
        mean[name] = (total / len(members)).to(handles[0].get_tensor(name).dtype)
    save_file(mean, out / file.name, metadata={"format": "pt"})
print("merge seconds", time.perf_counter() - begun)
"""


# A process inherits the peak memory of the one that it was forked from, so programs are started from a small one.
START = """
import json, resource, subprocess, sys, time
begun = time.perf_counter()
status = subprocess.call(sys.argv[2:], stdout=open(sys.argv[1], "w"), stderr=subprocess.STDOUT)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([status, time.perf_counter() - begun, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""


def run(command: list[str], log: Path) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak resident MB of a whole process."""
    done = subprocess.run([sys.executable, "-c", START, str(log), *command], capture_output=True, text=True, check=True)
    status, wall, cpu, peak = json.loads(done.stdout)
    if status:
        sys.exit(f"{command[0]} failed, see {log}:\n{log.read_text()[-2000:]}")
    return wall, cpu, peak


def merge_seconds(log: Path) -> float:
    """The seconds that a program printed for its merge alone, without imports."""
    text = log.read_text()
    if text.startswith("{"):
        return float(json.loads(text)["seconds"]["stream"])
    return float(re.findall(r"merge seconds ([\d.]+)", text)[-1])


def mismatches(out: Path, members: list[Path]) -> tuple[int, int]:
    """Elements of `out` that are not the float64 mean of the members rounded once, and how many there are."""
    wrong = total = 0
    for file in sorted(members[0].glob("*.safetensors")):
        handles = [safe_open(member / file.name, "pt") for member in members]
        results = {n: h for f in out.glob("*.safetensors") for h in [safe_open(f, "pt")] for n in h.keys()}  # noqa: SIM118
        for name in handles[0].keys():  # noqa: SIM118
            mean = handles[0].get_tensor(name).double()
            for handle in handles[1:]:
                mean += handle.get_tensor(name)
            if name not in results:  # mergekit drops the head: its table of Llama's tensors does not have it
                wrong, total = wrong + mean.numel(), total + mean.numel()
                continue
            result = results[name].get_tensor(name)
            wrong += int((result != rounded(mean / len(members), result.dtype)).sum())
            total += result.numel()
    return wrong, total


def rounded(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 rounded once. torch rounds to 16 bits by way of float32; with that step rounded to odd it is once."""
    single = value.float()
    if dtype == torch.float32:
        return single
    bits = single.view(torch.int32)
    bits -= (single.abs().double() > value.abs()).int()
    bits |= (single != value).int()
    return single.to(dtype)


def drop_caches() -> bool:
    """Empties the page cache; False where that is not allowed."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def warm(members: list[Path]) -> None:
    """Everything written before is on the disk, every input byte in the page cache."""
    os.sync()
    for member in members:
        for file in member.glob("*.safetensors"):
            with file.open("rb", buffering=0) as stream:
                while stream.read(1 << 24):
                    pass


def case(work: Path, count: int, dtype: torch.dtype, members: list[Path], args: argparse.Namespace) -> list[str]:
    """One line of the table for each program, for `count` members."""
    chosen, lines = members[:count], []
    out, log = work / "out", work / "log"
    name = {torch.bfloat16: "bf16", torch.float32: "f32"}[dtype]
    arguments = [str(member) for member in chosen]
    recipe = work / "recipe.yaml"
    entries = "\n".join(f"  - model: {member}\n    parameters: {{weight: 1.0}}" for member in chosen)
    full_name = str(dtype).removeprefix("torch.")
    recipe.write_text(f"merge_method: linear\nparameters: {{normalize: true}}\ndtype: {full_name}\nmodels:\n" + entries)
    scripts = {"plain torch": work / "merge_with_torch.py", "mergekit": work / "merge_with_mergekit.py"}
    scripts["plain torch"].write_text(PLAIN)
    scripts["mergekit"].write_text(MERGEKIT)
    ours = [sys.executable, "-m", "warmerge", "average", *arguments, "-o", str(out), "--any-model", "--json"]
    peers = {
        "warmerge": [*ours, "--threads", str(args.threads)],
        "plain torch": [sys.executable, str(scripts["plain torch"]), *arguments, str(out)],
    }
    if args.mergekit:
        peers["mergekit"] = [args.mergekit, str(scripts["mergekit"]), str(recipe), str(out), str(args.threads)]
    for cache in args.caches:
        if cache == "cold" and not drop_caches():
            continue
        phases: dict[str, list[float]] = {"copy floor": []}
        rows: dict[str, list[tuple[float, float, float]]] = {}
        for turn in range(args.repeats if cache == "warm" else 1):
            shutil.rmtree(out, ignore_errors=True)
            warm(chosen) if cache == "warm" else drop_caches()
            phases["copy floor"].append(copy_floor(chosen, out, args.threads))
            if cache == "cold":
                drop_caches()
                begun = time.perf_counter()
                files = [str(file) for member in chosen for file in sorted(member.glob("*.safetensors"))]
                subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
                phases.setdefault("cat", []).append(time.perf_counter() - begun)
            for program, command in peers.items():
                shutil.rmtree(out, ignore_errors=True)
                warm(chosen) if cache == "warm" else drop_caches()
                rows.setdefault(program, []).append(run(command, log))
                phases.setdefault(program, []).append(merge_seconds(log))
                if cache == "warm" and turn == 0:
                    wrong, total = mismatches(out, chosen)
                    print(f"  {program}: {wrong} of {total} elements are not the float64 mean rounded once", flush=True)
                    rows.setdefault(f"{program} wrong", []).append((wrong, total, 0))
        shutil.rmtree(out, ignore_errors=True)
        for program, times in phases.items():
            floor = sorted(phases["copy floor"])[len(times) // 2]
            phase = sorted(times)[len(times) // 2]
            wall, cpu, rss = sorted(rows[program])[len(rows[program]) // 2] if program in rows else (float("nan"),) * 3
            wrong = rows.get(f"{program} wrong")
            cells = [
                str(count), name, cache, program, f"{phase:.2f}", f"{phase / floor:.2f}", f"{wall:.1f}", f"{cpu:.1f}",
                f"{rss:.0f}", f"{wrong[0][0]:.0f}" if wrong else "",
            ]  # fmt: skip
            lines.append("| " + " | ".join("" if cell == "nan" else cell for cell in cells) + " |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=textwrap.dedent(__doc__ or "").split("\n\n")[0])
    parser.add_argument("work", type=Path, help="a folder on the disk to measure; it is emptied")
    parser.add_argument("--mergekit", help="python of an environment with mergekit 0.1.5")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of one member")
    parser.add_argument("--members", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3, help="of each warm case; the median is printed")
    parser.add_argument("--caches", nargs="+", default=["warm", "cold"], choices=["warm", "cold"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = [
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, {args.threads} threads, "
        f"{args.gigabytes} GB members, torch {torch.__version__}",
        "",
        "| M | dtype | cache | program | merge s | / floor | process s | CPU s | peak MB | wrong elements |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in args.dtypes:
        dtype = getattr(torch, name)
        shutil.rmtree(args.work, ignore_errors=True)
        members = [
            make_member(args.work / f"member-{i}", i + 1, dtype, args.gigabytes, shards=3)
            for i in range(max(args.members))
        ]
        for count in args.members:
            table += case(args.work, count, dtype, members, args)
    shutil.rmtree(args.work, ignore_errors=True)
    bare = run([sys.executable, "-c", "import torch"], Path(os.devnull))[2]
    table += ["", f"Peak of a bare `import torch`: {bare:.0f} MB."]
    print("\n".join(table))


if __name__ == "__main__":
    main()
