"""What merging tools make of a merge that would be wrong: warmerge and its peers on the same tiny reward models.

Each case is a few Llama reward models with one thing wrong, or one thing that is easily lost. Each peer is run as a
process in an environment of its own, as its documentation says. A cell is decided by the exit code, by the message, and
by what the output holds when it is read again: never by hand. The notes below the table are written by the same code.

    python benchmarks/peers.py WORK --python mergekit=A/bin/python --python CrossEncoder.merge=B/bin/python \\
        --python sd-mecha=C/bin/python --python fusion_bench=D/bin/python
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import tiny_models

Tensors = dict[str, torch.Tensor]
HEAD, UP = "score.weight", "model.layers.1.mlp.up_proj.weight"
SECOND = ["member-2", "in model 1"]  # what a message may call the second member
WARNING = re.compile(r"(?i)warn|missing|mismatch|finite|extra keys")
TOLERANCE = 1e-5  # of the largest element of a tensor, in float32; the last case allows none

# One script for each peer: `job` has members, out, save (arguments of save_pretrained), dtype, misspelt.
SCRIPTS = {
    "plain script": """
from transformers import AutoModelForSequenceClassification, AutoTokenizer
models = [AutoModelForSequenceClassification.from_pretrained(member, **job["load"]) for member in job["members"]]
states = [model.state_dict() for model in models]
models[0].load_state_dict({name: sum(state[name] for state in states) / len(states) for name in states[0]})
models[0].save_pretrained(job["out"], **job["save"])
AutoTokenizer.from_pretrained(job["members"][0]).save_pretrained(job["out"])
""",
    "CrossEncoder.merge": """
from sentence_transformers import CrossEncoder
more = {"parameters": {"wieght": [0.5, 0.25]}} if job["misspelt"] else {}
CrossEncoder.merge(job["members"], out_dtype=job["dtype"], **more).save_pretrained(job["out"])
""",
    "sd-mecha": """
import os, shutil, torch, sd_mecha
files = [os.path.join(member, job["file"]) for member in job["members"]]
members = [sd_mecha.model(file) for file in files]
recipe = sd_mecha.weighted_sum(*members, alhpa=0.25) if job["misspelt"] else sd_mecha.n_average(*members)
os.makedirs(job["out"], exist_ok=True)
sd_mecha.merge(recipe, output=os.path.join(job["out"], job["file"]), output_dtype=getattr(torch, job["dtype"]))
for name in os.listdir(job["members"][0]):
    if name.endswith((".json", ".jinja")):
        shutil.copy(os.path.join(job["members"][0], name), job["out"])
""",
    "fusion_bench": """
from fusion_bench.method import SimpleAverageAlgorithm, WeightedAverageAlgorithm
from fusion_bench.modelpool import SequenceClassificationModelPool
target = "fusion_bench.modelpool.seq_classification_lm.create_reward_model_from_pretrained"
models = {f"m{i}": {"_target_": target, "pretrained_model_name_or_path": m} for i, m in enumerate(job["members"])}
tokenizer = {"_target_": "transformers.AutoTokenizer.from_pretrained"}
tokenizer["pretrained_model_name_or_path"] = job["members"][0]
from omegaconf import DictConfig
pool = SequenceClassificationModelPool(DictConfig(models), tokenizer=DictConfig(tokenizer))
if job["misspelt"]:
    merged = WeightedAverageAlgorithm(weights=[0.5, 0.25], verbose=False, normalise=False).run(pool)
else:
    merged = SimpleAverageAlgorithm().run(pool)
pool.save_model(merged, job["out"], save_tokenizer=True, **job["save"])
""",
}
PEERS = ["mergekit", "CrossEncoder.merge", "sd-mecha", "fusion_bench", "plain script", "warmerge"]
PACKAGES = "warmerge mergekit sentence-transformers sd-mecha fusion-bench transformers peft torch safetensors"


@dataclass(frozen=True)
class Case:
    """One row: `expected` is what the mean would be; with `refuse` there is no right output."""

    name: str
    members: Sequence[Path]
    expected: Tensors
    refuse: bool = False
    culprits: Sequence[str] = ()  # a message that holds one of these has named what is wrong
    apart: Mapping[str, str] = field(default_factory=dict)  # peers that cannot be asked for this, and why
    base: Path | None = None
    dtype: str = "float32"
    misspelt: bool = False
    exact: bool = False
    hash_seeds: Sequence[int] = (0,)
    earlier: Sequence[Path] = ()  # merged into the same folder before


def model(seed: int, dtype: torch.dtype = torch.float32, kind: str = "llama", **changes: Any) -> Tensors:
    """The weights of one member: a common start plus a small task vector of `seed`."""
    module = tiny_models.make_model(kind, seed=0, hidden_size=64, **changes)
    generator = torch.Generator().manual_seed(1000 + seed)
    return {
        name: (tensor + 0.01 * torch.randn(tensor.shape, generator=generator)).to(dtype).clone()
        for name, tensor in sorted(module.state_dict().items())
    }


def write(folder: Path, tensors: Tensors, kind: str = "llama", causal: bool = False, **changes: Any) -> Path:
    """A checkpoint folder with config, weights and tokenizer."""
    dtype = str(tensors["model.norm.weight"].dtype).removeprefix("torch.")
    labels = changes.pop("num_labels", 1)
    made = tiny_models.make_model(kind, hidden_size=64, num_labels=labels)
    tiny_models.save(folder, made, tiny_models.tokenizer(kind, template=tiny_models.TEMPLATE))
    architecture = f"{kind.capitalize()}For{'CausalLM' if causal else 'SequenceClassification'}"
    tiny_models.edit_config(folder, architectures=[architecture], dtype=dtype, **changes)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def mean(members: Sequence[Tensors]) -> Tensors:
    """The float64 mean, rounded once (float64 to bfloat16 by way of float32 rounded to odd)."""
    found = {}
    for name, first in members[0].items():
        exact = torch.stack([member[name].double() for member in members]).sum(0) / len(members)
        single = exact.float()
        if first.dtype == torch.bfloat16:
            bits = single.view(torch.int32)
            bits -= (single.abs().double() > exact.abs()).int()
            bits |= (single.double() != exact).int()
        found[name] = single.to(first.dtype)
    return found


def adapter(folder: Path, base: Path, seed: int) -> tuple[Path, Tensors]:
    """A SEQ_CLS LoRA adapter as PEFT saves it, and the reward model that it stands for."""
    generator = torch.Generator().manual_seed(seed)
    held = {
        f"base_model.model.{HEAD}": torch.linspace(-1, 1, 64)[None] + 0.02 * torch.randn(1, 64, generator=generator)
    }
    for layer in range(2):
        for part, rows in (("q", 64), ("v", 32)):
            module = f"base_model.model.model.layers.{layer}.self_attn.{part}_proj"
            held[f"{module}.lora_A.weight"] = 0.3 * torch.randn(4, 64, generator=generator)
            held[f"{module}.lora_B.weight"] = 0.3 * torch.randn(rows, 4, generator=generator)
    folder.mkdir()
    save_file(held, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": str(base), "r": 4,
                "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / file, folder)
    return folder, adapted(folder, base)


def adapted(folder: Path, base: Path) -> Tensors:
    """base + s B A with the adapter's head, in float64 before the one rounding."""
    held, start = load_file(folder / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    start.pop("lm_head.weight")
    for name, down in held.items():
        short = name.removeprefix("base_model.model.")
        if short.endswith(".lora_A.weight"):
            target = short.replace(".lora_A", "")
            up = held[name.replace("lora_A", "lora_B")]
            start[target] = (start[target].double() + 2 * (up.double() @ down.double())).float()
        elif ".lora_" not in short:
            start[short] = down
    return start


def cases(work: Path) -> list[Case]:
    def pair(name: str, change: Callable[[Tensors], Tensors] = lambda t: t, **config: Any) -> list[Path]:
        """Two members; `change` and `config` are of the second alone."""
        first = write(work / name / "member-1", model(1))
        return [first, write(work / name / "member-2", change(model(2)), **config)]

    two = [model(1), model(2)]
    sound = pair("sound")
    made = [Case("two sound members, float32", sound, mean(two))]

    biased = [model(s, attention_bias=True) for s in (1, 2)]
    folders = [write(work / "biases" / f"member-{i}", t, attention_bias=True) for i, t in enumerate(biased, 1)]
    made.append(Case("attention biases", folders, mean(biased)))

    extra = [t | {"reward_mean": torch.tensor([float(i)]), "score.bias": torch.ones(1) * i} for i, t in enumerate(two)]
    folders = [write(work / "extra" / f"member-{i}", t) for i, t in enumerate(extra, 1)]
    made.append(Case("extra head tensors (a reward's mean, a bias)", folders, mean(extra)))

    def headless(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if name != HEAD}

    for kind in ("llama", "qwen2"):
        whole = [model(seed, kind=kind) for seed in (1, 2)]
        parts = [whole[0], headless(whole[1])]
        folders = [write(work / f"headless-{kind}" / f"member-{i}", t, kind) for i, t in enumerate(parts, 1)]
        expected = mean(whole) | {HEAD: whole[0][HEAD]}
        made.append(Case(f"one member lacks its head ({kind.capitalize()})", folders, expected, True, [*SECOND, HEAD]))

    language = headless(model(0)) | {"lm_head.weight": torch.randn(410, 64)}
    base = write(work / "lora" / "base", language, causal=True, id2label=None, label2id=None)
    adapters = [adapter(work / "lora" / f"member-{i}", base, i) for i in (1, 2)]
    made.append(Case("LoRA reward adapters on a causal LM", [a for a, _ in adapters],
                     mean([full for _, full in adapters]), culprits=["member-1"], base=base))  # fmt: skip

    other = pair("other", rms_norm_eps=0.01, pad_token_id=7)
    (other[1] / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    vocabulary = json.loads((other[1] / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["a"], vocabulary["model"]["vocab"]["b"] = (
        vocabulary["model"]["vocab"][x] for x in "ba"
    )
    (other[1] / "tokenizer.json").write_text(json.dumps(vocabulary))
    weights_only = {"sd-mecha": "merges weights only: the user brings config and tokenizer"}
    made.append(Case("other config, tokenizer, chat template", other, mean(two), True,
                     [*SECOND, "rms_norm_eps", "pad_token_id"], weights_only,
                     hash_seeds=range(4)))  # fmt: skip

    def with_nan(tensors: Tensors) -> Tensors:
        tensors[UP][3, 5] = float("nan")
        return tensors

    made.append(Case("NaN in one element of a member", pair("nan", with_nan), mean(two), True, [*SECOND, UP]))

    wide = pair("heads", lambda t: t | {HEAD: torch.cat([t[HEAD], -t[HEAD]])}, num_labels=2)
    made.append(Case("heads of shape (1, 64) and (2, 64)", wide, mean(two), True, [*SECOND, HEAD]))

    cut = pair("cut")
    os.truncate(cut[1] / "model.safetensors", (cut[1] / "model.safetensors").stat().st_size - 1000)
    made.append(Case("a truncated member", cut, mean(two), True, SECOND))

    none = {"plain script": "has no options"}
    made.append(Case("a misspelt option", sound, mean(two), True, ["wieght", "alhpa", "normali", "lamda"], none,
                     misspelt=True))  # fmt: skip

    third = write(work / "stale" / "member-3", model(3))
    made.append(Case("an earlier merge, in other shards, in the output folder", [sound[0], third],
                     mean([two[0], model(3)]), earlier=sound))  # fmt: skip

    five = [model(s, torch.bfloat16) for s in range(5)]
    folders = [write(work / "bf16" / f"member-{i}", t) for i, t in enumerate(five)]
    made.append(Case("mean of five bf16 members, rounded once", folders, mean(five), dtype="bfloat16", exact=True))
    return made


def command(peer: str, python: str, case: Case, members: Sequence[Path], out: Path, sharded: bool) -> list[str]:
    """How a user of `peer` asks for this merge."""
    job = out.with_suffix(".job")
    if peer == "warmerge":
        size = ["--max-shard-size", "50KB"] if sharded else []
        more = ["--lamda", "0.25"] if case.misspelt else []
        more += ["--overwrite"] if out.exists() else []
        return [python, "-m", "warmerge", "average", *map(str, members), "-o", str(out), *size, *more]
    if peer == "mergekit":
        normal = "normalise: false" if case.misspelt else "normalize: true"
        weights = [0.5, 0.25] if case.misspelt else [1.0] * len(members)
        entries = [
            {"model": f"{case.base}+{member}" if case.base else str(member), "parameters": {"weight": weight}}
            for member, weight in zip(members, weights, strict=True)
        ]
        job.write_text(
            f"merge_method: linear\ndtype: {case.dtype}\nparameters: {{{normal}}}\nmodels: {json.dumps(entries)}\n"
        )
        size = ["--out-shard-size", "10000"] if sharded else []
        size += ["--lora-merge-cache", str(out.with_suffix(".cache"))] if case.base else []
        return [str(Path(python).parent / "mergekit-yaml"), str(job), str(out), *size]
    task = {
        "members": [str(member) for member in members], "out": str(out), "dtype": case.dtype,
        "save": {"max_shard_size": "50KB"} if sharded else {}, "misspelt": case.misspelt,
        "load": {"num_labels": 1} if case.base else {},  # an adapter has no config that says it
        "file": "adapter_model.safetensors" if case.base else "model.safetensors",
    }  # fmt: skip
    job.write_text(json.dumps(task))
    script = out.with_suffix(".py")
    script.write_text(f"import json, sys\njob = json.load(open(sys.argv[1]))\n{SCRIPTS[peer]}")
    return [python, str(script), str(job)]


def run(arguments: list[str], log: Path, hash_seed: int = 0) -> tuple[int, str]:
    """Exit code and everything that was printed."""
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(hash_seed), "COLUMNS": "1000"}
    done = subprocess.run(
        arguments, capture_output=True, text=True, env=os.environ | offline, check=False, cwd=log.parent, timeout=300
    )
    said = done.stdout + done.stderr
    log.write_text(f"$ {' '.join(arguments)}\n{said}\nexit code {done.returncode}\n")
    return done.returncode, said


def told(code: int, said: str) -> list[str]:
    """The lines that complain: warnings, loading reports, an error, the end of a traceback without its source lines."""
    before, traceback, after = said.rpartition("Traceback (most recent call last)")
    if traceback:
        rest = [line for line in after.splitlines() if line.strip() and not line.startswith("  ")]
        return [line for line in before.splitlines() if WARNING.search(line)] + rest
    return [line for line in said.splitlines() if line.strip() and (code or WARNING.search(line))]


def read(out: Path, base: Path | None, index_first: bool) -> Tensors:
    """The weights as a loader finds them: transformers prefers the single file, others the index."""
    if (out / "adapter_config.json").exists() and base is not None:
        return adapted(out, base)
    index, single = out / "model.safetensors.index.json", out / "model.safetensors"
    if single.exists() and not (index_first and index.exists()):
        return load_file(single)
    table = json.loads(index.read_text())["weight_map"]
    shards = {file: load_file(out / file) for file in set(table.values())}
    return {name: shards[file][name] for name, file in table.items()}


def differences(found: Tensors, case: Case) -> list[str]:
    """In words: how an output differs from the mean that was expected."""
    said = []
    for word, names in (("missing", case.expected.keys() - found.keys()), ("new", found.keys() - case.expected.keys())):
        if names:
            said.append(f"{len(names)} of {len(case.expected)} tensors {word} (`{min(names)}`)")
    off: dict[str, tuple[int, int]] = {}
    for name in sorted(case.expected.keys() & found.keys()):
        tensor, expected = found[name], case.expected[name]
        if tensor.dtype != expected.dtype or tensor.shape != expected.shape:
            said.append(f"`{name}` is {tensor.dtype} {list(tensor.shape)}")
            continue
        allowed = 0.0 if case.exact else TOLERANCE * float(expected.double().abs().max())
        wrong = ~((tensor.double() - expected.double()).abs() <= allowed)
        if wrong.any():
            off[name] = int(wrong.sum()), int(torch.isnan(tensor).sum())
    if off:
        wrong_elements, total = sum(count for count, _ in off.values()), sum(t.numel() for t in found.values())
        nan = sum(count for _, count in off.values())
        first = HEAD if HEAD in off else min(off)
        said.append(f"{wrong_elements} of {total} elements in {len(off)} tensors differ (`{first}`)")
        said += [f"{nan} of them NaN"] if nan else []
    return said


def loads(out: Path) -> list[str]:
    """What transformers' loader says is not there."""
    labels = {"num_labels": 1} if (out / "adapter_config.json").exists() else {}
    try:
        _, told = transformers.AutoModelForSequenceClassification.from_pretrained(
            out, output_loading_info=True, **labels
        )
    except Exception as error:  # noqa: BLE001
        return [f"does not load ({type(error).__name__})"]
    missing = sorted(told["missing_keys"])
    return [f"loads with `{missing[0]}` drawn at random"] if missing else []


def small_files(out: Path, case: Case) -> str:
    """Whose config, tokenizer and template were written."""
    said = []
    for file in ("config.json", "tokenizer.json", "chat_template.jinja"):
        if not (out / file).exists():
            said.append(f"no {file}")
            continue
        key = (lambda p: json.loads(p.read_text())["rms_norm_eps"]) if file == "config.json" else Path.read_bytes
        if file == "tokenizer.json":
            key = lambda p: json.loads(p.read_text())["model"]["vocab"]  # noqa: E731
        said.append(f"{file} of " + "/".join(m.name for m in case.members if key(m / file) == key(out / file)))
    return ", ".join(said)


def cell(peer: str, python: str | None, case: Case, out: Path) -> tuple[str, str]:
    """The verdict and its note."""
    if peer in case.apart:
        return "n/a", case.apart[peer]
    if python is None:
        return "not run", ""
    log, notes = out.with_suffix(".log"), []
    for seed in case.hash_seeds if peer == "mergekit" else (0,):
        for sharded_before in (True, False) if case.earlier else (None,):
            shutil.rmtree(out, ignore_errors=True)
            if sharded_before is not None:
                run(command(peer, python, case, case.earlier, out, sharded_before), log.with_suffix(".earlier.log"))
            arguments = command(peer, python, case, case.members, out, sharded_before is False)
            code, said = run(arguments, log, seed)
            complaint = told(code, said)
            named = any(word in line for word in case.culprits for line in complaint)
            if code:
                last = next((line.strip(" │") for line in reversed(complaint) if line.strip(" │╭╰─╯")), "")
                return ("refused, named" if named else "refused"), f"exit code {code}: {last[:160]}"
            try:
                for index_first in (False, True) if case.earlier else (False,):
                    found = differences(read(out, case.base, index_first), case)
                    how = " for a loader that prefers the index" if index_first else ""
                    before = f"{'many shards' if sharded_before else 'one file'} before{how}: " if case.earlier else ""
                    notes += [before + note for note in found]
            except (OSError, KeyError, SafetensorError, RuntimeError) as error:
                notes.append(f"cannot be read: {type(error).__name__}: {error}"[:160])
            notes += loads(out)
            if len(case.hash_seeds) > 1:
                notes.append(small_files(out, case) + (f" (hash seed {seed})" if peer == "mergekit" else ""))
    notes = list(dict.fromkeys(notes))
    if case.refuse:
        notes = ["written as if nothing were wrong", *notes] + (["a warning names it"] if named else [])
    return ("WRONG", "; ".join(notes)) if notes else ("right", "")


def versions(python: str) -> str:
    code = (
        "import sys, importlib.metadata as m\n"
        f"for p in {PACKAGES!r}.split():\n"
        " try: print(p, m.version(p), end=', ')\n except m.PackageNotFoundError: pass\n"
        "print('Python', sys.version.split()[0], end='')"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("work", type=Path, help="a folder for models, outputs and logs; it is emptied")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name this matches")
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PATH", help="a peer's interpreter")
    args = parser.parse_args()
    pythons = {"warmerge": sys.executable, "plain script": sys.executable} | dict(p.split("=", 1) for p in args.python)
    if unknown := pythons.keys() - set(PEERS):
        parser.error(f"expected peers of {', '.join(PEERS)}, found {', '.join(unknown)}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    work = args.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    lines, notes = [f"| case | {' | '.join(PEERS)} |", "|---" * (len(PEERS) + 1) + "|"], []
    for number, case in enumerate((case for case in cases(work) if re.search(args.only, case.name)), 1):
        row = []
        for peer in PEERS:
            out = work / "outputs" / f"{number}-{peer.replace(' ', '-').replace('.', '-')}"
            out.parent.mkdir(exist_ok=True)
            verdict, note = cell(peer, pythons.get(peer), case, out)
            row.append(verdict)
            if note:
                notes.append(f"- {case.name}, {peer}: {verdict}. {note.replace(str(work), '.')}")
            print(f"{case.name} | {peer} | {verdict} | {note}", file=sys.stderr, flush=True)
        lines.append(f"| {case.name} | {' | '.join(row)} |")
    print(f"{date.today()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores. Versions:\n")
    print("\n".join(f"- {peer}: {versions(pythons[peer])}" for peer in PEERS if peer in pythons))
    print("\n" + "\n".join(lines) + "\n\n" + "\n".join(notes))


if __name__ == "__main__":
    main()
