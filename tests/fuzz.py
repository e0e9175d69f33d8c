"""Fuzzes the readers of files that strangers write: each input is read, or refused with an error of ours.

By hand, with atheris (libFuzzer for Python; no dependency of the project, wheels for CPython 3.11 and later):

    pip install --target /tmp/atheris atheris
    PYTHONPATH=/tmp/atheris python tests/fuzz.py header -max_total_time=600

Targets: header, index, config, tokenizer_files, adapter, rows, results. Options with one dash are libFuzzer's. At the
end it prints executions, coverage (cov: edges of warmerge's own byte code) and what was accepted and what refused. An
input that breaks something is written to crash-*; give that file in place of the options to run it again.

The targets are plain functions of bytes: tests/test_hostile_input.py and tests/weights/test_hostile_files.py call them
with hypothesis. What a target asserts beside the absence of other errors stands in its docstring.
"""

from __future__ import annotations

import atexit
import json
import mmap
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

# How to pick one of n: from libFuzzer's bytes, or from a seed.
Choose = Callable[[int], int]
_RAW = "\x00raw "
# Pieces of JSON that have broken readers, somewhere.
FRAGMENTS = [
    "null", "true", "0", "-0", "-1", "1", "2", "0.5", "1.0", "1e999", "-1e999", "1E400", "NaN", "Infinity", "-Infinity",
    "9" * 400, "9" * 5000, str(2**31), str(2**63 - 1), str(2**63), str(2**64), "-" + str(2**63), '""', '"a"', '"²"',
    '"\\ud800"', '"\\u0000"', '"\\u001b[31mred"', '"\\u202egnp"', '"../../etc/passwd"', '"/dev/zero"', '"."', '".."',
    '"x\\ny"', '"%s{0}{x}$\\\\frac"', '"' + "n" * 5000 + '"', '"' + "7" * 5000 + '"', "[]", "{}", "[[]]", '{"a":null}',
    "[null]", '["a"]', "[1,2]", "[-1]", "[[[[]]]]", "[" * 90 + "]" * 90, "[" * 960 + "]" * 960,
    '{"a":' * 950 + "1" + "}" * 950, "[" * 100_000, '{"a":1,"a":2}', '"(a+)+$"', '"(.*)*x"', '"["',
    "[" + "0," * 70 + "0]", '"s3://bucket/x"', '"memory://x"',
]  # fmt: skip


# --- inputs -----------------------------------------------------------------------------------------------------------


def mutated(value: Any, choose: Choose) -> bytes:
    """JSON of a value in which one to three things were replaced, removed, doubled or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(1 + choose(3)):
        value = _changed(value, choose)
    text = json.dumps(value)
    for number, fragment in enumerate(FRAGMENTS):
        text = text.replace(json.dumps(f"{_RAW}{number}"), fragment)
    data = text.encode()
    if choose(8) == 0:
        data = flipped(data, choose)
    return (b"\xef\xbb\xbf" if choose(40) == 0 else b"") + data


def flipped(data: bytes, choose: Choose) -> bytes:
    """A few bytes changed, cut out or doubled."""
    changed = bytearray(data)
    for _ in range(1 + choose(4)):
        if not changed:
            break
        at = choose(len(changed))
        kind = choose(5)
        if kind == 0:
            del changed[at : at + 1 + choose(16)]
        elif kind == 1:
            changed[at:at] = changed[at : at + 1 + choose(64)]
        elif kind == 2:
            del changed[at:]
        else:
            changed[at] = choose(256) if kind == 3 else changed[at] ^ (1 << choose(8))
    return bytes(changed)


def _changed(value: Any, choose: Choose) -> Any:
    if isinstance(value, list) and value and choose(6):
        at = choose(len(value))
        return [*value[:at], _changed(value[at], choose), *value[at + 1 :]]
    if isinstance(value, dict) and value and choose(6):
        key = list(value)[choose(len(value))]
        kind = choose(10)
        if kind == 0:
            return {name: inner for name, inner in value.items() if name != key}
        if kind == 1:
            return {(_fragment(choose) if name == key else name): inner for name, inner in value.items()}
        if kind == 2:
            return value | {list(value)[choose(len(value))]: value[key]}
        return value | {key: _changed(value[key], choose)}
    return _fragment(choose)


def _fragment(choose: Choose) -> str:
    return f"{_RAW}{choose(len(FRAGMENTS))}"


def framed(header: bytes, data: bytes) -> bytes:
    """A file of safetensors: the header's length, the header, the data."""
    return len(header).to_bytes(8, "little") + header + data


class Files:
    """A folder in memory."""

    far = False

    def __init__(self, files: Mapping[str, bytes], label: str = "m") -> None:
        self.files, self.label, self.identity = files, label, label

    def sizes(self) -> Mapping[str, int]:
        return {name: len(data) for name, data in self.files.items()}

    def readinto(self, file: str, offset: int, buffer: memoryview) -> None:
        assert offset + len(buffer) <= len(self.files[file]), "asked for bytes that the file does not have"
        buffer[:] = self.files[file][offset : offset + len(buffer)]

    def reader(self, pause: object = None) -> Files:
        return self

    def close(self) -> None:
        pass

    def refuse_changed(self, files: Iterable[str]) -> None:
        pass


@cache
def seeds() -> dict[str, Any]:
    """Small valid contents of every kind of file, from which inputs are made."""
    import result_contents as contents
    from policy_runs import SETTINGS, hacked

    config = {
        "architectures": ["LlamaForSequenceClassification"], "model_type": "llama", "hidden_size": 4, "num_labels": 1,
        "num_hidden_layers": 1, "vocab_size": 8, "id2label": {"0": "LABEL_0"}, "pad_token_id": 0, "mean": 0.5, "std": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "text_config": {"pad_token_id": 0},
        "dtype": "float32",
    }  # fmt: skip
    adapter = {
        "peft_type": "LORA", "base_model_name_or_path": "base", "revision": None, "r": 2, "lora_alpha": 4,
        "rank_pattern": {"a.q": 2}, "alpha_pattern": {"q": 8}, "fan_in_fan_out": False, "use_rslora": False,
        "modules_to_save": ["score"], "task_type": "SEQ_CLS", "target_modules": ["q"], "init_lora_weights": True,
    }  # fmt: skip
    message = [{"role": "user", "content": "Why?"}]
    info = {"id": "x1", "subreddit": "a", "title": "b", "post": "c"}
    pair = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
    rows = [
        pair, pair | {"prompt": message, "prompt_id": 1, "margin": 0.5, "subset": "s"},
        {"chosen": [*message, {"role": "assistant", "content": "a", "tool_calls": [{"f": {"x": [1]}}]}],
         "rejected": [*message, {"role": "assistant", "content": "b"}]},
        {"prompt": "p", "chosen": ["a"], "rejected": ["b", "c"], "subset": "Ties", "num_correct": 1},
        {"prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "domain": "code", "id": 3},
        {"info": info, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1},
        {"prompt": "p", "candidates": ["a", "b"], "gold": [0.5, 1], "finished": [True, False], "prompt_id": "7"},
    ]  # fmt: skip
    token = {"id": 0, "content": "<pad>", "special": True}
    tokenizer = {"model": {"type": "BPE", "vocab": {"<pad>": 0, "a": 1}, "merges": []}, "added_tokens": [token]}
    settings = {
        "pad_token": "<pad>", "chat_template": "{{ messages }}", "model_max_length": 9,
        "added_tokens_decoder": {"0": {"content": "<pad>"}},
    }  # fmt: skip
    record = {
        "format": "warmerge rl 1", "finished": True, "policy": "p", "prompts": "q", "control": "gold", "asked": {},
        "proxy": {"name": "rm", "checkpoints": ["a"], "kind": "model"}, "settings": SETTINGS | {"steps": 4},
    }  # fmt: skip
    return {
        "config": config, "adapter": adapter, "rows": rows, "tokenizer.json": tokenizer,
        "tokenizer_config.json": settings, "special_tokens_map.json": {"pad_token": {"content": "<pad>"}},
        "rl.json": record, "rows.jsonl": hacked(4),
        "eval": contents.evaluation(), "curve": contents.curve(), "vs_m": contents.vs_m(),
        "training": contents.training(), "bon": contents.bon(), "rl-report": contents.policies(),
        "winrate": contents.winrate(), "theory": contents.theory(),
    }  # fmt: skip


@cache
def tensors() -> dict[str, tuple[str, tuple[int, ...]]]:
    """A reward model of four tensors."""
    return {"a.q.weight": ("F32", (4, 4)), "b": ("BF16", (3,)), "ids": ("I64", (2,)), "score.weight": ("F32", (1, 4))}


def header_of(table: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """The header of a file with these tensors, as a value."""
    from warmerge.weights.safetensors_format import build_header

    text = build_header(table)[0][8:]
    found: dict[str, Any] = json.loads(text)
    return found


def file_of(table: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """A file with these tensors, filled with zeros."""
    from warmerge.weights.safetensors_format import build_header, tensor_bytes

    return build_header(table)[0] + bytes(sum(tensor_bytes(*entry) for entry in table.values()))


def shards() -> dict[str, bytes]:
    """The same model in two shards with an index."""
    names = list(tensors())
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[2 * i : 2 * i + 2] for i in range(2)}
    table = {name: file for file, own in files.items() for name in own}
    index = {"metadata": {"total_size": 110}, "weight_map": table}
    made = {file: file_of({name: tensors()[name] for name in own}) for file, own in files.items()}
    return made | {"model.safetensors.index.json": json.dumps(index).encode()}


# --- targets ----------------------------------------------------------------------------------------------------------


def header(file: bytes) -> bool:
    """What is accepted, safetensors' own reader accepts with the same dtypes, shapes and bytes."""
    import safetensors

    from warmerge.errors import RefusedError
    from warmerge.weights.safetensors_format import parse_header

    try:
        found = parse_header(lambda offset, length: file[offset : offset + length], len(file), "m/model.safetensors")
    except RefusedError as error:
        return _harmless(error)
    official = dict(safetensors.deserialize(file))
    assert official.keys() == found.keys()
    for name, entry in found.items():
        assert (entry.dtype, list(entry.shape)) == (official[name]["dtype"], official[name]["shape"])
        assert file[entry.offset : entry.offset + entry.nbytes] == bytes(official[name]["data"])
    return True


def index(text: bytes) -> bool:
    """What is accepted has each tensor once, in a file of the folder."""
    from warmerge.weights.checkpoint import read_checkpoint

    files = shards() | {"model.safetensors.index.json": text}

    def read() -> None:
        checkpoint = read_checkpoint(Files(files))
        assert {name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()} == tensors()
        assert {file for _, file in checkpoint.weight_files} <= files.keys()

    return _refused_or(read)


def config(text: bytes) -> bool:
    """A member with this config.json, opened and compared with a good one; what is accepted can be written again."""
    from warmerge.pipeline.average import _config_json
    from warmerge.report.card import CardFacts, model_card
    from warmerge.weights import compat, small_files
    from warmerge.weights.checkpoint import read_checkpoint

    good = read_checkpoint(
        Files({"model.safetensors": file_of(tensors()), "config.json": json.dumps(seeds()["config"]).encode()}, "good")
    )

    def read() -> None:
        member = read_checkpoint(Files({"model.safetensors": file_of(tensors()), "config.json": text}))
        assert _printable(*(str(finding) for found in compat.check([good, member]) for finding in found))
        assert _printable(*(str(finding) for found in compat.check([member, good]) for finding in found))
        json.loads(_config_json(member, "bfloat16"))
        rule = {"name": "uniform", "formula": "f", "source": "s"}
        manifest = {
            "warmerge": "0",
            "versions": {},
            "rule": rule,
            "inputs": [],
            "coefficients": {"members": [], "base": 0},
            "warnings": [],
        }
        model_card(manifest, CardFacts(architecture=small_files.architecture(member.config or {}))).encode()

    return _refused_or(read)


def tokenizer_files(data: bytes) -> bool:
    """The first byte chooses the file. Compared with a good one, and asked for its padding token."""
    from warmerge.weights.checkpoint import read_checkpoint
    from warmerge.weights.classifier_config import _tokenizer_pad_id
    from warmerge.weights.small_files import TOKENIZER_FILES, compare_tokenizers, tokenizer_digest

    name = TOKENIZER_FILES[(data[0] if data else 0) % len(TOKENIZER_FILES)]
    files = {name: json.dumps(seeds()[name]).encode() for name in TOKENIZER_FILES if name in seeds()}
    files["model.safetensors"] = file_of(tensors())

    def read() -> None:
        good, member = read_checkpoint(Files(files, "good")), read_checkpoint(Files(files | {name: data[1:]}))
        assert _printable(*(str(finding) for finding in compare_tokenizers([good, member])))
        tokenizer_digest(member)
        found = _tokenizer_pad_id(member.folder)
        assert found is None or type(found) is int

    return _refused_or(read)


def adapter(data: bytes) -> bool:
    """adapter_config.json, a zero byte, and the header of the weights. What is accepted has the base's tensors."""
    from warmerge.weights.adapter import base_named_by, read_adapter
    from warmerge.weights.checkpoint import read_checkpoint

    base = read_checkpoint(
        Files({"model.safetensors": file_of(tensors()), "config.json": json.dumps(seeds()["config"]).encode()}, "base")
    )
    text, _, head = data.partition(b"\x00")
    files = {"adapter_config.json": text, "adapter_model.safetensors": _with_data(head)}

    def read() -> None:
        named = base_named_by(Files(files))
        assert named is None or named
        found = read_adapter(Files(files), base)
        assert {name: tensor.shape for name, tensor in found.tensors.items()} == {
            name: tensor.shape for name, tensor in base.tensors.items()
        }

    return _refused_or(read)


def rows(data: bytes) -> bool:
    """The first byte chooses .jsonl, .json or .gz. As pairs and as a pool: all texts can be written as UTF-8."""
    from warmerge.rewards.pairs import read_preferences, unique_texts
    from warmerge.rewards.pools import read_pool

    suffix = (".jsonl", ".json", ".jsonl.gz")[(data[0] if data else 0) % 3]
    path = _folder() / f"rows{suffix}"
    path.write_bytes(data[1:])

    def pairs() -> None:
        found = unique_texts(read_preferences(str(path), skip_bad_rows=True))
        json.dumps(found.texts, ensure_ascii=False).encode()

    def pool() -> None:
        found = read_pool(path, skip_bad_rows=True)
        json.dumps(found.texts, ensure_ascii=False).encode()

    accepted = [_refused_or(pairs), _refused_or(pool)]
    return any(accepted)


RESULTS = ("eval", "curve", "vs_m", "training", "bon", "rl-report", "winrate", "theory", "rl.json", "rows.jsonl")


def results(data: bytes) -> bool:
    """The first byte chooses the file. The page of a folder with it is UTF-8 and holds no script but its own."""
    from warmerge.pipeline.report import write_report

    name = RESULTS[(data[0] if data else 0) % len(RESULTS)]
    folder = _folder() / "results"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if name in ("rl.json", "rows.jsonl"):
        lines = "".join(json.dumps(row) + "\n" for row in seeds()["rows.jsonl"])
        (folder / "rl.json").write_text(json.dumps(seeds()["rl.json"]))
        (folder / "rows.jsonl").write_text(lines)
    (folder / (name if "." in name else f"{name}.json")).write_bytes(data[1:])

    def read() -> None:
        out = _folder() / "report.html"
        write_report([folder], out, overwrite=True)
        page = out.read_text(encoding="utf-8").lower()
        assert page.count("<script") == page.count("</script>") == 1, "the page sorts its tables by one script, its own"

    return _refused_or(read)


TARGETS: dict[str, Callable[[bytes], bool]] = {
    "header": header, "index": index, "config": config, "tokenizer_files": tokenizer_files, "adapter": adapter,
    "rows": rows, "results": results,
}  # fmt: skip


def made(target: str, choose: Choose) -> bytes:
    """An input for a target: a valid one in which a few things are wrong."""
    from warmerge.weights.safetensors_format import tensor_bytes

    if target == "header":
        text = mutated(header_of(tensors()), choose)
        return framed(
            text, bytes(choose(200) if choose(8) == 0 else sum(tensor_bytes(*entry) for entry in tensors().values()))
        )
    if target == "index":
        return mutated(json.loads(shards()["model.safetensors.index.json"]), choose)
    if target == "config":
        return mutated(seeds()["config"], choose)
    if target == "tokenizer_files":
        from warmerge.weights.small_files import TOKENIZER_FILES

        number = choose(len(TOKENIZER_FILES))
        name = TOKENIZER_FILES[number]
        return bytes([number]) + mutated(seeds().get(name, seeds()["tokenizer.json"]), choose)
    if target == "adapter":
        table = {
            "a.q.lora_A.weight": ("F32", (2, 4)),
            "a.q.lora_B.weight": ("F32", (4, 2)),
            "score.weight": ("F32", (1, 4)),
        }
        head = header_of({f"base_model.model.{name}": entry for name, entry in table.items()})
        settings = seeds()["adapter"]
        text = mutated(settings, choose) if choose(3) else json.dumps(settings).encode()
        return (
            text.replace(b"\x00", b"")
            + b"\x00"
            + (mutated(head, choose) if choose(3) == 0 else json.dumps(head).encode())
        )
    if target == "rows":
        import gzip

        suffix = choose(3)
        own = [seeds()["rows"][choose(len(seeds()["rows"]))] for _ in range(1 + choose(3))]
        lines = [mutated(row, choose) if choose(2) else json.dumps(row).encode() for row in own]
        data = b"[" + b",".join(lines) + b"]" if suffix == 1 else b"\n".join(lines)
        if suffix == 2:
            data = flipped(gzip.compress(data), choose) if choose(4) == 0 else gzip.compress(data)
        return bytes([suffix]) + data
    number = choose(len(RESULTS))
    content = seeds()[RESULTS[number]]
    if RESULTS[number] == "rows.jsonl":
        return bytes([number]) + b"".join(
            mutated(row, choose) + b"\n" if choose(3) == 0 else json.dumps(row).encode() + b"\n" for row in content
        )
    return bytes([number]) + mutated(content, choose)


def from_seed(target: str, seed: int) -> bytes:
    """The input of a number: the same on every machine."""
    return made(target, random.Random(seed).randrange)


def _refused_or(read: Callable[[], None]) -> bool:
    from warmerge.errors import WarmergeError

    try:
        read()
    except WarmergeError as error:
        return _harmless(error)
    return True


def _harmless(error: Exception) -> bool:
    """False: it was refused. Nothing of the file's may be printed that moves the cursor, or fills the screen."""
    assert _printable(str(error)), "a control character of the file's would be printed"
    assert len(str(error)) < 200_000, "a message of no use"
    return False


def _printable(*lines: str) -> bool:
    return all(line.replace("\n", "").isprintable() for line in lines)


def _with_data(text: bytes) -> bytes:
    """A file with this header and as many zeros as its last tensor needs, if that can be told."""
    try:
        entries = [entry for name, entry in json.loads(text).items() if name != "__metadata__"]
        size = max(int(entry["data_offsets"][1]) for entry in entries)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError):
        size = 0
    return framed(text, bytes(size if 0 <= size < 4096 else 0))


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="warmerge-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# --- by hand ----------------------------------------------------------------------------------------------------------


def heaviest() -> dict[str, Callable[[], object]]:
    """Inputs at the limits, made to take as much memory as can be; each is made first, and read by what is returned."""
    from functools import partial

    from warmerge.rewards.pairs import read_preferences
    from warmerge.weights.checkpoint import read_json
    from warmerge.weights.folder import WHOLE_LIMIT
    from warmerge.weights.safetensors_format import HEADER_LIMIT, parse_header

    def filled(piece: str, size: int) -> bytes:
        return f'{{"a":[{piece.join([""] * (size // len(piece)))[:-1]}]}}'.encode()

    def names(size: int) -> bytes:
        return ("{" + ",".join(f'"{number}":0' for number in range(size // 12)) + "}").encode()

    def entries(size: int) -> bytes:
        entry = '"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
        return ("{" + ",".join(entry % number for number in range(size // 60)) + "}").encode()

    def read(text: bytes) -> object:
        file = framed(text, b"")
        return parse_header(lambda offset, length: file[offset : offset + length], len(file), "m")

    def pairs(data: bytes, suffix: str) -> Callable[[], object]:
        path = _folder() / f"heavy{suffix}"
        path.write_bytes(data)
        return partial(read_preferences, str(path), skip_bad_rows=True)

    header_size, whole = HEADER_LIMIT - 1000, WHOLE_LIMIT - 1000
    found: dict[str, Callable[[], object]] = {}
    for kind, text in (("tensors", entries), ("names", names), ("lists", partial(filled, "[],"))):
        found[f"header of 25 MB: {kind}"] = partial(read, text(header_size))
    for kind, text in (("names", names), ("objects", partial(filled, "{},"))):
        found[f"config.json of 25 MB: {kind}"] = partial(
            read_json, Files({"config.json": text(header_size)}), "config.json"
        )
    file = Files({"tokenizer.json": filled("{},", whole)})
    found["tokenizer.json of 100 MB: objects"] = partial(read_json, file, "tokenizer.json")
    good = b'{"chosen":"a","rejected":"b"}\n'
    found["a million rows of 3 bytes, 3 MB"] = pairs(good + b"{}\n" * 1_000_000, ".jsonl")
    found["a million pairs of 33 bytes, 33 MB"] = pairs(good * 1_000_000, ".jsonl")
    return found


def memory() -> None:
    """Prints what the heaviest inputs cost, each in a process of its own."""
    from warmerge.errors import WarmergeError

    cases = heaviest()
    for name in cases:
        if os.fork() == 0:
            before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
            try:
                cases[name]()
                said = "read"
            except WarmergeError as error:
                said = str(error)[:90]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            print(f"{name:42} {peak / 1e6:5.2f} GB {time.perf_counter() - begun:6.1f} s  {said}", flush=True)
            os._exit(0)
        os.wait()


def main(arguments: list[str]) -> None:
    if arguments[1:] == ["memory"]:
        memory()
        return
    if len(arguments) < 2 or arguments[1] not in TARGETS:
        sys.exit(f"usage: python {arguments[0]} {'|'.join(TARGETS)}|memory [-max_total_time=60] [crash file]")
    import atheris

    name, options = arguments[1], arguments[2:]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with atheris.instrument_imports(include=["warmerge"]):
        import warmerge.pipeline.average
        import warmerge.pipeline.report
        import warmerge.rewards.pools
        import warmerge.weights.adapter
        import warmerge.weights.compat  # noqa: F401
    # Shared with the process that fuzzes, which libFuzzer ends without a word to Python.
    target, seen = TARGETS[name], memoryview(mmap.mmap(-1, 16)).cast("Q")
    corpus = _folder() / "corpus"
    corpus.mkdir()
    for number in range(300):
        (corpus / f"made-{number}").write_bytes(b"\x00" + from_seed(name, number))
    folder = _folder()

    def one(data: bytes) -> None:
        # Half of all inputs are taken as they are, of the other half libFuzzer's bytes choose what is wrong with them.
        if data[:1] < b"\x80":
            text = data[1:]
        else:
            provider = atheris.FuzzedDataProvider(data[1:])
            text = made(name, lambda count: provider.ConsumeIntInRange(0, count - 1))
        seen[target(text)] += 1

    given = {option.partition("=")[0] for option in options}
    defaults = {
        "-max_len": 20_000,
        "-rss_limit_mb": 3000,
        "-timeout": 20,
        "-print_final_stats": 1,
        "-use_value_profile": 1,
    }
    options += [f"{flag}={value}" for flag, value in defaults.items() if flag not in given]
    files = [option for option in options if not option.startswith("-")]
    atheris.Setup([arguments[0], *options, *([] if files else [str(corpus)])], one)
    pid = os.fork()
    if pid == 0:
        atexit.unregister(shutil.rmtree)
        atheris.Fuzz()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(f"{name}: {seen[True]} inputs accepted, {seen[False]} refused", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    sys.exit(status)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv)
