"""`push`: what is refused, what is sent and what is not, and what a Hub or a network that fails leaves behind."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_checkpoint
from loopback_hub import CLIENT_WARNING, Commit, Fault, LoopbackHub, not_found
from reward_world import World, write_tokenizer
from safetensors.torch import load_file, save_file
from tiny_models import TEMPLATE
from tiny_models import folder as tiny_folder

import warmerge
import warmerge.pipeline.push as push_module
from warmerge.errors import RefusedError, RemoteError, UsageError
from warmerge.pipeline.found.results import FORMATS
from warmerge.pipeline.publication import example
from warmerge.pipeline.publication.contents import model_files, without_origin
from warmerge.pipeline.publication.licence import stated
from warmerge.pipeline.publication.measured import read_measured
from warmerge.pipeline.push import Proposal, propose, send
from warmerge.report.card import CARD_MARK
from warmerge.rewards.model import load_reward_model
from warmerge.weights.locate import open_checkpoint
from warmerge.weights.remote.pushing import change

pytestmark = pytest.mark.filterwarnings(CLIENT_WARNING)
# Stands in every local path of these tests, and must not stand in anything that is sent.
SECRET = "bobs-machine"
APACHE = "---\nlicense: apache-2.0\n---\n# a member\n"
MODEL = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "warmerge.json"}
Sent = dict[str, bytes]


@pytest.fixture(scope="session")
def merged(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with members a, b, c and their uniform average `warm`, all below a place that nobody is to know."""
    root = tmp_path_factory.mktemp(SECRET)
    members = [Path(shutil.copytree(getattr(world, name), root / name)) for name in "abc"]
    for member in members:
        (member / "README.md").write_text(APACHE)
    sets = [{"name": "val", "source": str(root / "val.jsonl"), "n": 9, "prompts": 5, "fingerprint": "0" * 64}]
    accuracies = {str(root / name): 0.5 for name in "abcd"}
    selection = {"selection": "best:3", "sets": sets, "accuracies": accuracies, "kept": [str(m) for m in members]}
    command = ["warmerge", "average", *map(str, members), "-o", str(root / "warm")]
    warmerge.average(members, root / "warm", command=command, selection=selection)
    return root


@pytest.fixture(scope="session")
def measured(merged: Path, world: World) -> Path:
    """Folders `eval` and `lmc` of the members, `own` of the average itself."""
    members = [merged / name for name in "abc"]
    data = [f"val={world.data('val')}"]
    quick = warmerge.Measuring(limit=60, resamples=100)
    warmerge.evaluate(members, data, out=merged / "eval", measuring=quick)
    warmerge.evaluate([merged / "warm"], data, out=merged / "own", measuring=quick)
    warmerge.lmc_curve(members[:2], data, out=merged / "lmc", points=3, measuring=quick)
    return merged


@pytest.fixture
def warm(merged: Path, tmp_path: Path) -> Path:
    """A copy of `warm` that a test may change."""
    return Path(shutil.copytree(merged / "warm", tmp_path / SECRET / "warm"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub({}) as running:
        running.tokens = {"good"}
        running.use(monkeypatch, tmp_path / "cache", token="good")
        yield running


def push(folder: Path, repo: str = "me/x", **choices: Any) -> warmerge.Pushed:
    return warmerge.push(folder, repo, **{"run_lines": False, **choices})


def writes(hub: LoopbackHub) -> list[str]:
    return [f"{request.method} {request.path}" for request in hub.requests if request.method not in ("GET", "HEAD")]


def commits(hub: LoopbackHub, repo: str = "me/x", revision: str = "main") -> list[Commit]:
    """Those that are not the repository's first, the newest first."""
    return hub.log(repo, revision)[:-1]


def sent(hub: LoopbackHub, repo: str = "me/x", revision: str = "main") -> Sent:
    return {name: data for name, data in hub.at(repo, revision)[1].items() if name != ".gitattributes"}


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def tree(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- what is refused ---


def _drop_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    tensors["score.weight"][0, 1] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def _lying_index(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_checkpoint(folder, tensors, None, shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["score.weight"] = content["weight_map"]["model.norm.weight"]
    content["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    content["weight_map"]["score.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (_drop_head, ["head"]),
        (_nan, ["'model.norm.weight' holds nan at element 3", "'score.weight' holds inf at element 1"]),
        (_no_tokenizer, ["has no tokenizer files; copy those of the model it was trained from"]),
        (lambda folder: (folder / "config.json").unlink(), ["has no config.json, without which nobody can load it"]),
        (_lying_index, ["model.safetensors.index.json"]),
        (_pickle_only, ["holds pickle weights only ('pytorch_model.bin')"]),
        (lambda folder: edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
         ["quantis"]),
        (lambda folder: (folder / "warmerge.json").write_text("{"), ["warmerge.json: is not a JSON object"]),
    ],
    ids=["no head", "nan", "no tokenizer", "no config", "lying index", "pickle", "quantised", "record"],
)  # fmt: skip
def test_what_must_not_be_published(
    hub: LoopbackHub, warm: Path, damage: Callable[[Path], Any], messages: list[str]
) -> None:
    damage(warm)
    with pytest.raises(RefusedError) as error:
        push(warm)
    assert str(warm) in str(error.value)
    for message in messages:
        assert message in str(error.value)
    assert writes(hub) == []
    assert hub.repos == {}


def test_all_findings_come_at_once(hub: LoopbackHub, warm: Path) -> None:
    _drop_head(warm)
    _no_tokenizer(warm)
    with pytest.raises(RefusedError) as error:
        push(warm)
    assert len(error.value.findings) >= 2
    assert "has no tokenizer files" in str(error.value)


def test_only_a_folder_with_a_full_model_is_pushed(hub: LoopbackHub, warm: Path) -> None:
    with pytest.raises(UsageError, match=r"^me/a: no such folder; push takes the folder of a reward model$"):
        push(Path("me/a"))
    with pytest.raises(UsageError, match=r"model\.safetensors: no such folder"):
        push(warm / "model.safetensors")
    (warm / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"warm is a LoRA adapter; push takes a full model, as average writes it$"):
        push(warm)
    assert writes(hub) == []


def test_a_model_without_a_head_with_any_model(hub: LoopbackHub, warm: Path) -> None:
    _drop_head(warm)
    push(warm, any_model=True)
    assert sent(hub)["model.safetensors"] == (warm / "model.safetensors").read_bytes()


def test_a_damaged_weight_is_found_whatever_its_shard(hub: LoopbackHub, warm: Path) -> None:
    tensors = load_file(warm / "model.safetensors")
    tensors["score.weight"][0, 5] = float("-inf")
    (warm / "model.safetensors").unlink()
    write_checkpoint(warm, tensors, None, shards=3)
    with pytest.raises(
        RefusedError, match=r"model-0000\d-of-00003\.safetensors: tensor 'score\.weight' holds -inf at element 5"
    ):
        push(warm)
    assert writes(hub) == []


# --- the card's lines are run ---


def test_a_model_that_does_not_load_as_its_config_says(hub: LoopbackHub, warm: Path) -> None:
    tensors = load_file(warm / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, warm / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusedError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        push(warm, run_lines=True)
    assert hub.repos == {}


def _lines_print(monkeypatch: pytest.MonkeyPatch, out: str, err: str = "", code: int = 0) -> None:
    monkeypatch.setattr(example, "_run", lambda lines: example.subprocess.CompletedProcess([], code, out, err))


@pytest.mark.parametrize(
    ("out", "err", "code", "message"),
    [
        ("12.5\n", "", 0, r"gets reward 12\.5 from the lines of its model card, -?\d+\.\d{4} from warmerge; do not"),
        ("nan\n", "", 0, r"gets reward nan from the lines of its model card"),
        ("", "", 0, r"gets reward  from the lines of its model card"),
        ("", "Traceback:\nValueError: no such class", 1,
         r"is not loaded by the lines of its model card: ValueError: no such class"),
        ("", "", 1, r"is not loaded by the lines of its model card: nothing said"),
    ],
)  # fmt: skip
def test_lines_that_say_something_else_than_warmerge(
    hub: LoopbackHub, warm: Path, monkeypatch: pytest.MonkeyPatch, out: str, err: str, code: int, message: str
) -> None:
    _lines_print(monkeypatch, out, err, code)
    with pytest.raises(RefusedError, match=message):
        push(warm, run_lines=True)
    assert hub.repos == {}


def test_a_reward_that_differs_by_the_order_of_sums_is_accepted(
    hub: LoopbackHub, warm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    _lines_print(monkeypatch, "1e9")
    with pytest.raises(RefusedError) as error:
        push(warm, run_lines=True)
    found = re.search(r"(-?\d+\.\d+) from warmerge", str(error.value))
    assert found
    said = f"{float(found[1]) + 0.001:.4f}"

    def run(lines: str) -> Any:
        asked.append(lines)
        return example.subprocess.CompletedProcess([], 0, said + "\n", "")

    monkeypatch.setattr(example, "_run", run)
    push(warm, run_lines=True)
    card = sent(hub)["README.md"].decode()
    assert f"\n# {said}\n```" in card
    assert 'from_pretrained("me/x", dtype="float32")' in card
    assert asked[0].replace(str(warm), "me/x") in card  # the very lines, but for the place
    assert "The last line is what they printed when this card was written." in card


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda folder: edit(folder / "config.json", auto_map={"AutoModel": "modeling_x.X"}),
         "the model brings its own code"),
        (lambda folder: edit(folder / "config.json", architectures=["LlamaForTokenClassification"]),
         "LlamaForTokenClassification is not loaded by AutoModelForSequenceClassification"),
    ],
)  # fmt: skip
def test_lines_that_cannot_be_run_are_said_not_to_have_been(
    hub: LoopbackHub, warm: Path, damage: Callable[[Path], Any], why: str
) -> None:
    damage(warm)
    (warning,) = push(warm, run_lines=True, any_model=True).proposal.warnings
    assert str(warning) == f"README.md: its lines that load and score were not run: {why}"
    assert "The last line is what they printed" not in sent(hub)["README.md"].decode()


def test_a_model_that_does_not_fit_is_not_run(hub: LoopbackHub, warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("warmerge.pipeline.publication.readme.fits_in_memory", lambda checkpoint: False)
    (warning,) = push(warm, run_lines=True).proposal.warnings
    assert str(warning).endswith("were not run: the model does not fit into this machine's memory in float32")


@pytest.mark.slow
def test_a_tokenizer_that_does_not_write_its_own_end(hub: LoopbackHub, warm: Path) -> None:
    """Its end-of-sequence token is read as three words, so the lines give another reward than warmerge."""
    edit(warm / "tokenizer_config.json", eos_token="[UNK]")
    with pytest.raises(
        RefusedError, match=r"gets reward -?[\d.]+ from the lines of its model card, -?[\d.]+ from warmer"
    ):
        push(warm, run_lines=True)
    assert hub.repos == {}


@pytest.mark.slow
def test_a_tokenizer_whose_end_is_the_models_padding(hub: LoopbackHub, warm: Path) -> None:
    """transformers reads the reward at the last token that is no padding: the lines must give what warmerge gives."""
    edit(warm / "config.json", pad_token_id=2)
    pushed = push(warm, run_lines=True)
    printed = re.search(r"\n# (-?\d+\.\d+)\n```", sent(hub)["README.md"].decode())
    assert printed
    assert pushed.proposal.warnings == ()


# --- what is sent ---


def test_the_model_and_nothing_else_is_sent(hub: LoopbackHub, warm: Path) -> None:
    for name in ("optimizer.pt", "member.json", ".env", "trainer_state.json", "training_args.bin", "notes.txt"):
        (warm / name).write_text("HF_TOKEN=hf_secret")
    (warm / "checkpoint-5").mkdir()
    (warm / "checkpoint-5" / "model.safetensors").write_bytes(b"old")
    before = tree(warm)
    pushed = push(warm)
    assert set(sent(hub)) == MODEL
    assert sent(hub)["model.safetensors"] == (warm / "model.safetensors").read_bytes()
    assert {".env", "member.json", "notes.txt", "optimizer.pt", "trainer_state.json", "training_args.bin"} == set(
        pushed.proposal.left_out
    )
    assert b"hf_secret" not in b"".join(sent(hub).values())
    assert tree(warm) == before
    (made,) = commits(hub)
    assert made.parent == hub.log("me/x")[-1].sha
    assert made.title == f"Reward model: uniform merge of 3, by warmerge {warmerge.version.versions()['warmerge']}"
    assert (pushed.url, pushed.commit) == (f"{hub.url}/me/x", made.sha)
    assert hub.private == {"me/x": True}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_what_says_nothing_of_the_machine_is_sent_to_the_byte(hub: LoopbackHub, warm: Path, name: str) -> None:
    push(warm)
    assert sent(hub)[name] == (warm / name).read_bytes()


def test_no_local_path_is_in_anything_that_is_sent(hub: LoopbackHub, merged: Path, measured: Path, warm: Path) -> None:
    inside = {"model_type": "llama", "_name_or_path": f"/home/{SECRET}/text"}
    edit(warm / "config.json", _name_or_path=f"/home/{SECRET}/run 7", aux_config=inside)
    edit(
        warm / "tokenizer_config.json",
        name_or_path=f"C:\\{SECRET}\\run", tokenizer_file=f"/{SECRET}/tokenizer.json",
        special_tokens_map_file=f"/root/{SECRET}/special_tokens_map.json",
    )  # fmt: skip
    manifest = json.loads((warm / "warmerge.json").read_text())
    assert SECRET in json.dumps([manifest["command"], manifest["selection"], manifest["inputs"]])  # it could get out
    first = str(merged / "a")
    manifest["warnings"] = [f"{first}: has a doubt", f"/mnt/{SECRET}/x: has another"]
    manifest["inputs"][0] |= {"adapter": f"{first}/lora", "base": f"/mnt/{SECRET}/base", "rank": 8, "alpha": 16}
    (warm / "warmerge.json").write_text(json.dumps(manifest))
    push(warm, results=[measured / "eval", measured / "lmc"])
    files = sent(hub)
    assert set(files) == {*MODEL, "eval.png", "lmc.png"}
    for name, data in files.items():
        assert SECRET.encode() not in data, name
        assert str(warm.parent.parent).encode() not in data, name
    assert json.loads(files["config.json"])["aux_config"] == {"model_type": "llama"}
    record = json.loads(files["warmerge.json"])
    assert "command" not in record
    assert record["inputs"][0]["rank"] == 8
    assert [entry["fingerprint"] for entry in record["inputs"]] == [e["fingerprint"] for e in manifest["inputs"]]
    assert record["selection"] == {
        "selection": "best:3", "kept": 3, "of": 4,
        "sets": [{"name": "val", "n": 9, "prompts": 5, "fingerprint": "0" * 64}],
    }  # fmt: skip
    assert "member 1: has a doubt" in files["README.md"].decode()
    for name in ("eval.png", "lmc.png"):
        chunks = set(re.findall(rb"(tEXt|iTXt|zTXt)([ -~]*)", files[name]))
        assert all(word.startswith(b"Software") for _, word in chunks), chunks


@pytest.mark.parametrize("origin", ["/home/me/run", "../run", "runs/1", "org/name", "C:\\run", "run 7"])
def test_no_origin_is_sent(origin: str) -> None:
    data = json.dumps({"_name_or_path": origin, "text_config": {"name_or_path": origin}, "x": [1, 2.5]}).encode()
    assert json.loads(without_origin("config.json", data)) == {"text_config": {}, "x": [1, 2.5]}
    own = json.dumps({"name_or_path": origin, "tokenizer_file": origin, "extra": {"name_or_path": "<x>"}}).encode()
    assert json.loads(without_origin("tokenizer_config.json", own)) == {"extra": {"name_or_path": "<x>"}}


def test_a_file_without_an_origin_is_sent_to_the_byte() -> None:
    for data in (b'{"x":1, "_name_or_path": ""}', b"[1,\n2]", b"no JSON", b'{"x": "/home/me"}'):
        assert without_origin("config.json", data) == data


@pytest.mark.parametrize("word", ["name_or_path", "_name_or_path", "tokenizer_file"])
def test_what_is_called_like_an_origin_and_is_none_is_sent(word: str) -> None:
    """A token, a tensor, a label."""
    contents: dict[str, Any] = {
        "vocab.json": {"a": 0, word: 1}, "added_tokens.json": {word: 7},
        "tokenizer.json": {"model": {"type": "WordLevel", "vocab": {"a": 0, word: 1}}},
        "model.safetensors.index.json": {"weight_map": {word: "model-00001-of-00002.safetensors"}},
        "config.json": {"id2label": {"0": "a", word: "b"}, "label2id": {word: "0", "a": 1}, word: 1},
    }  # fmt: skip
    for name, content in contents.items():
        data = json.dumps(content).encode()
        assert without_origin(name, data) == data


@pytest.mark.parametrize("revision", ["", "a b", "refs/pr/1", "0" * 40, "a..b"])
def test_what_is_no_branch_is_refused(hub: LoopbackHub, warm: Path, revision: str) -> None:
    with pytest.raises(UsageError, match=r"--revision: expected the name of a branch, found "):
        push(warm, revision=revision)
    assert hub.requests == []


@pytest.mark.parametrize(
    "change",
    [
        {"rule": {}}, {"rule": "uniform"}, {"rule": None}, {"inputs": []}, {"inputs": 5}, {"warmerge": None},
        {"coefficients": 5}, {"coefficients": {"members": 5}}, {"coefficients": {"members": ["a", "b", "c"]}},
        {"coefficients": {"members": [0.5, 0.5]}}, {"copied_tensors": 5}, {"versions": ["a"]}, {"warnings": 5},
        {"selection": {}}, {"selection": {"selection": "x", "kept": 1, "of": 2, "sets": [5]}},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_that_no_merge_writes_is_refused(hub: LoopbackHub, warm: Path, change: dict[str, Any]) -> None:
    edit(warm / "warmerge.json", **change)
    (key,) = change
    message = rf"/warmerge\.json is not what a merge writes \(see .*'{key}'\); merge again, or delete it"
    with pytest.raises(UsageError, match=message):
        push(warm)


@pytest.mark.parametrize(
    "change",
    [{"role": "memebr"}, {"role": None}, {"fingerprint": [1]}, {"repo": "me/a"}, {"repo": 5, "revision": "main"},
     {"checkpoint": 5}, {"base": 5}],
    ids=str,
)  # fmt: skip
def test_a_record_of_inputs_that_are_none_is_refused(hub: LoopbackHub, warm: Path, change: dict[str, Any]) -> None:
    first, *others = json.loads((warm / "warmerge.json").read_text())["inputs"]
    edit(warm / "warmerge.json", inputs=[first | change, *others])
    with pytest.raises(UsageError, match=r"/warmerge\.json is not what a merge writes \(see .*'inputs'\); merge again"):
        push(warm)


def test_a_record_without_a_rule_is_looked_at_too(hub: LoopbackHub, warm: Path) -> None:
    (warm / "warmerge.json").write_text(json.dumps({"inputs": [{"checkpoint": "runs/1"}]}))
    with pytest.raises(UsageError, match=r"/warmerge\.json is not what a merge writes \(see .*'inputs', 'rule'"):
        push(warm)


def test_names_that_mean_two_members_are_refused(tmp_path: Path) -> None:
    """An eval and a curve that were run in different places."""
    inputs = [{"role": "member", "fingerprint": weights} for weights in ("aa", "bb")]
    rule = {"name": "uniform", "formula": "", "source": ""}
    manifest = {"rule": rule, "copied_tensors": [], "inputs": inputs, "warmerge": "0"}
    kinds = {"average": "average", "1": "member", "2": "member"}
    rows = [{"set": "s", "model": name, "kind": kind, "accuracy": 0.5} for name, kind in kinds.items()]
    for kind, weights in (("eval", ("aa", "bb")), ("curve", ("bb", "aa"))):
        (tmp_path / kind).mkdir()
        content = {"format": FORMATS[kind], "fingerprints": dict(zip("12", weights, strict=True)), "rows": rows}
        (tmp_path / kind / f"{kind}.json").write_text(json.dumps(content))
    assert read_measured([tmp_path / "eval"], "cc", manifest).member_names == {"1": "member 1", "2": "member 2"}
    with pytest.raises(UsageError, match=r"call different members '1'; run both commands from one place"):
        read_measured([tmp_path / "eval", tmp_path / "curve"], "cc", manifest)


def test_own_code_goes_with_the_model_that_needs_it(hub: LoopbackHub, warm: Path) -> None:
    (warm / "modeling_x.py").write_text("class X: ...\n")
    assert "modeling_x.py" in push(warm, "me/plain").proposal.left_out
    edit(warm / "config.json", auto_map={"AutoModel": "modeling_x.X"})
    push(warm)
    assert sent(hub)["modeling_x.py"] == b"class X: ...\n"


def test_a_tokenizers_own_code_goes_with_it(warm: Path) -> None:
    (warm / "own.py").write_text("class Own: ...\n")
    edit(warm / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    assert model_files(open_checkpoint(warm))["own.py"] == b"class Own: ...\n"


def test_a_model_that_is_no_merge(hub: LoopbackHub, merged: Path) -> None:
    push(merged / "a")
    card = sent(hub)["README.md"].decode()
    assert card == (merged / "a" / "README.md").read_text()  # its own
    assert "warmerge.json" not in sent(hub)
    assert commits(hub)[0].title.startswith("Reward model, sent by warmerge ")


# --- what was there before ---


def _shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_checkpoint(folder, tensors, None, shards=3)


def test_what_an_earlier_model_left_is_deleted_in_the_same_commit(
    hub: LoopbackHub, merged: Path, measured: Path, warm: Path
) -> None:
    _shard(warm)
    (warm / "special_tokens_map.json").write_text("{}")
    (warm / "chat_template.jinja").write_text("{{ messages }}")
    push(warm, results=[measured / "eval", measured / "lmc"])
    shards = {name for name in sent(hub) if name.startswith("model-")}
    assert len(shards) == 3
    kept = {"LICENSE": b"Apache", "docs/eval.png": b"x", "docs/model.safetensors": b"y", "notes.txt": b"z"}
    junk = {"pytorch_model.bin": b"p", "optimizer.pt": b"o", "adapter_model.safetensors": b"a"}
    hub.commit("me/x", hub.repos["me/x"] | kept | junk, "by hand")
    pushed = push(merged / "warm")
    gone = {
        *shards, *junk, "model.safetensors.index.json", "special_tokens_map.json", "chat_template.jinja", "eval.png",
        "lmc.png",
    }  # fmt: skip
    assert set(pushed.proposal.deleted) == gone
    assert set(sent(hub)) == {*MODEL, *kept}
    assert {name: sent(hub)[name] for name in kept} == kept
    assert ".gitattributes" in hub.repos["me/x"]
    assert [commit.title for commit in commits(hub)][1] == "by hand"
    assert len(commits(hub)) == 3
    push(warm)  # and back to shards
    assert "model.safetensors" not in sent(hub)
    assert shards <= set(sent(hub))


def test_an_unchanged_folder_is_not_sent_again(hub: LoopbackHub, measured: Path, warm: Path) -> None:
    first = push(warm, results=[measured / "eval"])
    hub.requests.clear()
    again = push(warm, results=[measured / "eval"])
    assert again.proposal.nothing
    assert (again.commit, again.url) == (first.commit, first.url)
    assert writes(hub) == []
    assert len(commits(hub)) == 1


def test_a_changed_card_is_sent_alone(hub: LoopbackHub, warm: Path) -> None:
    push(warm)
    hub.requests.clear()
    changed = push(warm, licence="mit").proposal
    assert set(changed.files) - set(changed.unchanged) == {"README.md"}
    assert changed.nbytes == len(sent(hub)["README.md"])
    assert not any("lfs" in request for request in writes(hub))
    assert "license: mit" in sent(hub)["README.md"].decode()
    new, old = commits(hub)
    assert {name for name in new.files if new.files[name] != old.files.get(name)} == {"README.md"}


def test_a_gitignore_in_the_repository_does_not_leave_out_weights(hub: LoopbackHub, warm: Path) -> None:
    hub.put("me/x", {".gitignore": b"*.safetensors\ntokenizer.json\n"})
    push(warm)
    assert set(sent(hub)) == {*MODEL, ".gitignore"}


# --- who may see it ---


def test_visibility(hub: LoopbackHub, warm: Path) -> None:
    hub.put("me/open", {"LICENSE": b""})
    assert push(warm, "me/open").proposal.private is False
    assert push(warm, "me/new", private=False).proposal.private is False
    assert push(warm, "me/hidden").proposal.private is True
    assert push(warm, "me/hidden", private=True, licence="mit").proposal.exists
    assert hub.private == {"me/open": False, "me/new": False, "me/hidden": True}


@pytest.mark.parametrize(
    ("there", "wanted", "message"),
    [
        (False, True, "me/x exists and is public; make it private at URL/me/x/settings, or leave out --private"),
        (True, False, "me/x exists and is private; make it public at URL/me/x/settings, or leave out --public"),
    ],
)
def test_visibility_is_not_changed(hub: LoopbackHub, warm: Path, there: bool, wanted: bool, message: str) -> None:
    hub.put("me/x", {"LICENSE": b""})
    hub.private["me/x"] = there
    with pytest.raises(UsageError) as error:
        push(warm, private=wanted)
    assert str(error.value) == message.replace("URL", hub.url)
    assert writes(hub) == []
    assert hub.private["me/x"] is there


# --- where ---


@pytest.mark.parametrize("exists", [False, True])
def test_a_branch_is_made_and_main_stays(hub: LoopbackHub, warm: Path, exists: bool) -> None:
    if exists:
        hub.put("me/x", {"LICENSE": b"text"})
    pushed = push(warm, revision="v2")
    assert pushed.url == f"{hub.url}/me/x/tree/v2"
    assert set(sent(hub)) == ({"LICENSE"} if exists else set())
    assert set(sent(hub, "me/x", "v2")) == {*MODEL, *(["LICENSE"] if exists else [])}
    assert len(commits(hub, "me/x", "v2")) == 1
    main = hub.commits["me/x"]
    push(warm, revision="v2", message="again", licence="mit")
    assert commits(hub, "me/x", "v2")[0].title == "again"
    assert hub.commits["me/x"] == main


def test_a_new_branch_is_made_although_main_has_the_same_files(hub: LoopbackHub, warm: Path) -> None:
    (warm / "README.md").write_text(APACHE)  # of the user: no address stands in it
    push(warm)
    pushed = push(warm, revision="v2")
    assert set(sent(hub, "me/x", "v2")) == MODEL
    assert pushed.url == f"{hub.url}/me/x/tree/v2"


def test_an_unchanged_branch_is_named(hub: LoopbackHub, warm: Path) -> None:
    first = push(warm, revision="v2")
    again = push(warm, revision="v2")
    assert again.proposal.nothing
    assert (again.url, again.commit) == (first.url, first.commit)


def test_a_pull_request_leaves_main(hub: LoopbackHub, warm: Path) -> None:
    hub.put("me/x", {"LICENSE": b"text", "pytorch_model.bin": b"old"})
    pushed = push(warm, create_pr=True)
    assert pushed.url == f"{hub.url}/me/x/discussions/1"
    assert pushed.proposal.create_pr
    assert set(sent(hub)) == {"LICENSE", "pytorch_model.bin"}
    assert set(sent(hub, "me/x", "refs/pr/1")) == {*MODEL, "LICENSE"}


def test_a_branch_and_a_pull_request_do_not_go_together(hub: LoopbackHub, warm: Path) -> None:
    with pytest.raises(UsageError, match=r"^--create-pr asks to change the main branch; leave out --revision$"):
        push(warm, create_pr=True, revision="v2")
    assert hub.requests == []


def test_a_name_alone_is_of_the_tokens_owner(hub: LoopbackHub, warm: Path) -> None:
    assert push(warm, "x").url == f"{hub.url}/me/x"
    assert "scored.jsonl" in sent(hub)["README.md"].decode()
    assert "`warmerge score me/x " in sent(hub)["README.md"].decode()


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("me/x@v1", r"^me/x@v1: give the branch with --revision v1, not with an '@'$"),
        ("a b", r"not a Hub id"),
        ("me/x/y", r"not a Hub id"),
        ("", r"not a Hub id"),
    ],
)
def test_names_that_are_none(hub: LoopbackHub, warm: Path, repo: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        push(warm, repo)
    assert hub.requests == []


def test_nothing_is_sent_unless_it_is_confirmed(hub: LoopbackHub, warm: Path) -> None:
    shown: list[Proposal] = []

    def no(proposal: Proposal) -> bool:
        shown.append(proposal)
        return False

    pushed = push(warm, confirm=no)
    assert pushed.commit is None
    assert set(shown[0].files) == MODEL
    assert shown[0].files["model.safetensors"] == (warm / "model.safetensors").stat().st_size
    assert push(warm, dry_run=True).commit is None
    assert writes(hub) == []
    assert hub.repos == {}


# --- networks and Hubs that fail ---


@pytest.mark.parametrize(
    "fault",
    [
        Fault("hangup", path="/api/models/me/x"),
        Fault("hangup", path="/api/repos/create"),
        Fault("lost", path="/api/repos/create"),
        Fault("hangup", path="/objects/batch"),
        Fault("hangup", method="PUT"),
        Fault("lost", method="PUT"),
        Fault("hangup", path="/commit/"),
        Fault("lost", path="/commit/"),
        Fault(status=503, path="/commit/"),
        Fault(status=500, path="/objects/batch", times=2),
        Fault(status=502, path="/preupload/"),
        Fault(status=503, path="/validate-yaml"),
        Fault(status=504, path="/api/models/me/x", times=3),
    ],
    ids=lambda fault: f"{fault.kind or fault.status} {fault.method}{fault.path}",
)
def test_a_fault_that_passes_leaves_exactly_one_commit(
    hub: LoopbackHub, warm: Path, waits: list[float], fault: Fault
) -> None:
    hub.faults.append(replace(fault))
    pushed = push(warm)
    assert [commit.sha for commit in commits(hub)] == [pushed.commit]
    assert set(sent(hub)) == MODEL
    assert hub.faults[0].times == 0
    assert hub.private == {"me/x": True}


def test_the_hub_asks_to_wait(hub: LoopbackHub, warm: Path, waits: list[float]) -> None:
    hub.faults.append(Fault(status=429, headers={"Retry-After": "7"}, path="/commit/"))
    push(warm)
    assert 7 in waits
    assert len(commits(hub)) == 1


@pytest.mark.parametrize("where", ["/objects/batch", "/commit/"])
def test_a_fault_that_stays(hub: LoopbackHub, warm: Path, waits: list[float], where: str) -> None:
    hub.put("me/x", {"LICENSE": b""})
    hub.faults.append(Fault("hangup", path=where, times=99))
    message = (
        rf"^me/x cannot be written: {hub.url} cannot be reached \(\w+\); check the network and run the command again$"
    )
    with pytest.raises(RemoteError, match=message):
        push(warm)
    assert len(hub.log("me/x")) == 1
    hub.faults.clear()
    push(warm)
    assert set(sent(hub)) == {*MODEL, "LICENSE"}


@pytest.mark.parametrize("kind", ["hangup", "lost"])
def test_a_pull_request_is_asked_for_once(hub: LoopbackHub, warm: Path, waits: list[float], kind: str) -> None:
    hub.put("me/x", {"LICENSE": b""})
    hub.faults.append(Fault(kind, path="/commit/"))
    with pytest.raises(RemoteError) as error:
        push(warm, create_pr=True)
    pulls = [name for name in hub.branches["me/x"] if name.startswith("refs/pr/")]
    assert pulls == (["refs/pr/1"] if kind == "lost" else [])
    assert f"{hub.url}/me/x/discussions" in str(error.value)  # where to look before asking for a second one


@pytest.mark.parametrize("retried", [False, True])
def test_a_repository_that_changed_meanwhile_is_not_overwritten(
    hub: LoopbackHub, warm: Path, waits: list[float], retried: bool
) -> None:
    hub.put("me/x", {"LICENSE": b""})
    if retried:
        hub.faults.append(Fault(status=503, path="/commit/"))

    def meanwhile(proposal: Proposal) -> bool:
        hub.commit("me/x", {"LICENSE": b"", "model.safetensors": b"of somebody else"}, "theirs")
        return True

    message = (
        r"^me/x changed on the Hub since this command looked at it; run it again to see what it would replace now$"
    )
    with pytest.raises(RemoteError, match=message):
        push(warm, confirm=meanwhile)
    assert [commit.title for commit in hub.log("me/x")] == ["theirs", "put"]
    assert hub.repos["me/x"]["model.safetensors"] == b"of somebody else"


@pytest.mark.parametrize("name", ["model.safetensors", ".gitattributes"])
def test_a_repository_that_was_made_meanwhile_is_not_overwritten(hub: LoopbackHub, warm: Path, name: str) -> None:
    """And a public one, empty as it may be, is not filled with a model that was to be private."""

    def meanwhile(proposal: Proposal) -> bool:
        hub.put("me/x", {name: b"of somebody else"})
        return True

    with pytest.raises(warmerge.WarmergeError, match=r"changed on the Hub since"):
        push(warm, confirm=meanwhile)
    assert hub.repos["me/x"] == {name: b"of somebody else"}


def test_weights_that_change_while_they_are_sent(hub: LoopbackHub, warm: Path) -> None:
    def meanwhile(proposal: Proposal) -> bool:
        data = bytearray((warm / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (warm / "model.safetensors").write_bytes(data)
        return True

    with pytest.raises(warmerge.WarmergeError):
        push(warm, confirm=meanwhile)
    assert commits(hub) == []


# --- what the errors say ---


def test_no_token(hub: LoopbackHub, warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    message = r"^me/x cannot be written without a token; log in with `hf auth login`, or set HF_TOKEN$"
    for repo in ("me/x", "x"):
        with pytest.raises(RemoteError, match=message.replace("me/x", repo)):
            push(warm, repo)
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["me/x", "x"])
def test_a_token_that_is_none(hub: LoopbackHub, warm: Path, monkeypatch: pytest.MonkeyPatch, repo: str) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong")
    hub.put("me/x", {"LICENSE": b""})
    with pytest.raises(RemoteError) as error:
        push(warm, repo)
    assert str(error.value) == (
        f"{repo} cannot be written: the Hub does not accept your token; log in with `hf auth login`, or set HF_TOKEN "
        "anew"
    )
    assert writes(hub) == []


@pytest.mark.parametrize("exists", [False, True])
def test_a_token_that_may_only_read(
    hub: LoopbackHub, warm: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    hub.readers = {"reader"}
    monkeypatch.setenv("HF_TOKEN", "reader")
    if exists:
        hub.put("me/x", {"LICENSE": b""})
    with pytest.raises(RemoteError) as error:
        push(warm)
    assert str(error.value) == (
        f"me/x cannot be written: your token may not; give it write access to me/x at {hub.url}/settings/tokens"
    )
    assert set(hub.repos) == ({"me/x"} if exists else set())


def test_no_room(hub: LoopbackHub, warm: Path) -> None:
    hub.quota = 1000
    with pytest.raises(RemoteError) as error:
        push(warm)
    assert str(error.value) == (
        "me/x cannot be written: Private repository storage limit reached, please upgrade your plan "
        f"({hub.url}/settings/billing shows what you use)"
    )
    assert commits(hub) == []


@pytest.mark.parametrize("text", ["---\nlicense: [unclosed\n---\n# mine\n", "---\nbase_model: /home/me/x\n---\n"])
def test_an_own_card_that_the_hub_does_not_accept(hub: LoopbackHub, warm: Path, text: str) -> None:
    (warm / "README.md").write_text(text)
    with pytest.raises(UsageError, match=r"^README\.md: the Hub does not accept its front matter \(.+\); correct it$"):
        push(warm)
    assert hub.repos == {}  # it is found out before a repository is made and weights are sent


def test_a_base_model_that_is_a_path(hub: LoopbackHub, warm: Path) -> None:
    with pytest.raises(UsageError, match=r"expected Hub ids such as org/name as base model, found '/home/me/base'"):
        push(warm, base_model=["/home/me/base"])
    assert writes(hub) == []


def test_gated(hub: LoopbackHub, warm: Path) -> None:
    hub.faults.append(not_found("GatedRepo", 403))
    with pytest.raises(RemoteError, match=rf"^me/x is gated: accept its licence at {hub.url}/me/x with the account"):
        push(warm)


def test_offline(hub: LoopbackHub, warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"^push needs the Hub: .*unset HF_HUB_OFFLINE$"):
        push(warm)
    assert hub.requests == []


def test_a_hub_that_is_not_there(
    hub: LoopbackHub, warm: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = r"^me/x cannot be written: http://127\.0\.0\.1:9 cannot be reached \(ConnectError\); check the network"
    with pytest.raises(RemoteError, match=message):
        push(warm)
    assert sum(waits) < 5


# --- results in the card ---


def test_results_of_the_members(hub: LoopbackHub, warm: Path, measured: Path) -> None:
    push(warm, results=[measured / "eval", measured / "lmc"])
    card = sent(hub)["README.md"].decode()
    rows = json.loads((measured / "eval" / "eval.json").read_text())["rows"]
    (average,) = (row for row in rows if row["model"] == "average")
    assert f"{average['accuracy']:.3f} [{average['low']:.3f}, {average['high']:.3f}]" in card
    assert f"value: {round(average['accuracy'], 4)}" in card
    for name in ("member 1", "member 2", "member 3", "![Accuracy of the models in the table](eval.png)", "(lmc.png)"):
        assert name in card
    assert sent(hub)["eval.png"].startswith(b"\x89PNG")


def test_results_of_the_model_itself(hub: LoopbackHub, warm: Path, measured: Path) -> None:
    push(warm, results=[measured / "own"])
    (row,) = json.loads((measured / "own" / "eval.json").read_text())["rows"][:1]
    assert f"value: {round(row['accuracy'], 4)}" in sent(hub)["README.md"].decode()


def test_the_model_is_pushed_and_measured_under_the_same_weights(
    hub: LoopbackHub, warm: Path, measured: Path, tmp_path: Path
) -> None:
    """One weight moved by one bit: these are results of another model."""
    tensors = load_file(warm / "model.safetensors")
    tensors["score.weight"][0, 0] *= 1.001
    save_file(tensors, warm / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusedError, match=r"eval\.json: measured other models"):
        push(warm, results=[measured / "own"])


@pytest.mark.parametrize(
    ("folders", "kind", "message"),
    [
        (["alien"], RefusedError, r"eval\.json: measured other models: neither these weights nor the average of the"),
        (["alien-curve"], RefusedError, r"curve\.json: is the curve of other models than the members of this one; run"),
        (["a"], UsageError, r"^--results \S+/a: expected eval\.json or curve\.json in it, found neither$"),
        (["nowhere"], UsageError, r"nowhere: expected eval\.json or curve\.json in it, found neither$"),
        (["eval", "own"], UsageError, r"^--results: eval\.json is in \S+/eval and in \S+/own$"),
        (["eval", "eval"], UsageError, r"^--results: eval\.json is in "),
        (["damaged"], RefusedError, r"eval\.json: is not a result of warmerge eval: expected the format 'warmerge"),
        (["old"], UsageError, r"eval\.json does not say which weights it measured; run the command again$"),
        (["old-curve"], UsageError, r"curve\.json does not say which weights it measured; run the command again$"),
        (["nameless-curve"], UsageError, r"curve\.json does not say which weights it measured; run the command again$"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_results_that_are_not_of_this_model(
    hub: LoopbackHub,
    warm: Path,
    measured: Path,
    tmp_path: Path,
    folders: list[str],
    kind: type[Exception],
    message: str,
) -> None:
    curve, rows = (json.loads((measured / f).read_text()) for f in ("lmc/curve.json", "eval/eval.json"))
    others = {name: digit * 64 for name, digit in zip(rows["fingerprints"], "abcdef", strict=False)}
    written = {
        "alien/eval.json": rows | {"fingerprints": others},
        "alien-curve/curve.json": curve | {"fingerprints": {**curve["fingerprints"], "b": "f" * 64}},
        "old/eval.json": {key: value for key, value in rows.items() if key != "fingerprints"},
        "old-curve/curve.json": {key: value for key, value in curve.items() if key != "fingerprints"},
        "nameless-curve/curve.json": curve | {"fingerprints": {}},
        "damaged/eval.json": {"rows": 3},
    }
    for name, content in written.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    places = [tmp_path / name if (tmp_path / name).exists() else measured / name for name in folders]
    with pytest.raises(kind, match=message):
        push(warm, results=places)
    assert writes(hub) == []


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprints": {"me": ["0"]}}, {"rows": [5]}, {"rows": [{"model": "x"}]}, {"differences": 5},
        {"differences": [5]}, {"notes": 5}, {"sets": [{"fingerprint": []}]}, {"format": "warmerge bon 1"},
    ],
    ids=str,
)  # fmt: skip
def test_a_result_that_is_not_as_eval_writes_it_is_refused(
    hub: LoopbackHub, warm: Path, measured: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    shutil.copy(measured / "eval" / "eval.json", tmp_path)
    edit(tmp_path / "eval.json", **change)
    with pytest.raises((RefusedError, UsageError), match=rf"{tmp_path}/eval\.json:? "):
        push(warm, results=[tmp_path])


def test_a_result_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "eval.json").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(RefusedError, match=r"eval\.json: .* 1,000,000,000,000 bytes, expected 100,000,000 at most"):
        read_measured([tmp_path], "0", None)


def test_more_than_a_picture_shows_is_not_drawn(hub: LoopbackHub, warm: Path, measured: Path, tmp_path: Path) -> None:
    content = json.loads((measured / "own" / "eval.json").read_text())
    (row,) = content["rows"][:1]
    rows = [*content["rows"], *(row | {"model": f"{number}", "kind": "other"} for number in range(300))]
    (tmp_path / "eval.json").write_text(json.dumps(content | {"rows": rows}))
    proposal = push(warm, results=[tmp_path], dry_run=True).proposal
    assert "eval.png" not in proposal.files
    assert "eval.png" not in proposal.card
    assert any("has no figure of eval.json: 30" in str(warning) for warning in proposal.warnings)


def test_results_of_the_average_do_not_speak_for_another_rule(
    hub: LoopbackHub, merged: Path, measured: Path, tmp_path: Path
) -> None:
    members = [merged / name for name in "abc"]
    warmerge.average(members, tmp_path / "w", rule="weighted", weights=(0.5, 0.25, 0.25))
    warmerge.average(members, tmp_path / "part", exclude=["score.weight"], rest_from=1)
    for folder in ("w", "part"):
        with pytest.raises(RefusedError, match="measured other models"):
            push(tmp_path / folder, results=[measured / "eval"])


# --- the card ---


def test_an_own_card_is_sent_as_it_is(hub: LoopbackHub, warm: Path) -> None:
    text = "---\r\nlicense: mit\r\n---\r\n# Mine 我的\r\n"
    (warm / "README.md").write_bytes(text.encode())
    pushed = push(warm)
    assert sent(hub)["README.md"] == text.encode()
    assert [str(warning) for warning in pushed.proposal.warnings] == [
        "README.md: is your own and is sent as it is; delete it to get a card by warmerge"
    ]


def test_an_own_card_that_is_no_utf8_is_not_altered(hub: LoopbackHub, warm: Path) -> None:
    (warm / "README.md").write_bytes("# Müller\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"^README\.md is not UTF-8; save it as UTF-8$"):
        push(warm)
    assert hub.repos == {}


def test_an_own_card_without_front_matter(hub: LoopbackHub, warm: Path) -> None:
    """What the Hub remarks about it is no Python warning on the user's screen."""
    (warm / "README.md").write_text("# mine\n")
    push(warm)
    assert sent(hub)["README.md"] == b"# mine\n"


def test_a_card_by_average_is_replaced(hub: LoopbackHub, warm: Path) -> None:
    assert CARD_MARK in (warm / "README.md").read_text()
    push(warm)
    card = sent(hub)["README.md"].decode()
    assert CARD_MARK in card
    assert "# x\n" in card
    (warm / "README.md").unlink()
    assert push(warm).proposal.nothing


def test_a_card_that_states_what_was_asked_for(hub: LoopbackHub, warm: Path) -> None:
    """A licence that is given is stated, or refused: never dropped."""
    (warm / "README.md").write_text("---\nlibrary_name: transformers\n---\n# mine\n")
    try:
        proposal = push(warm, licence="mit").proposal
    except UsageError as error:
        assert "README.md" in str(error)  # noqa: PT017
    else:
        stated = "license: mit" in sent(hub)["README.md"].decode()
        assert stated == (proposal.licence.get("license") == "mit")


def test_the_licence_that_all_members_state(hub: LoopbackHub, warm: Path) -> None:
    proposal = push(warm).proposal
    assert (proposal.licence, proposal.licence_source) == ({"license": "apache-2.0"}, "that of all members")
    assert "\nlicense: apache-2.0\n" in sent(hub)["README.md"].decode()


@pytest.mark.parametrize(("kind", "template", "rule", "ends"), [
    ("llama", None, "plain", True), ("llama", TEMPLATE, "chat", False), ("gpt2", None, "plain", True),
    ("bert", None, "plain", False), ("bert", TEMPLATE, "chat", False),
])  # fmt: skip
def test_how_texts_are_made_is_known_without_the_weights(
    kind: str, template: str | None, rule: str, ends: bool, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_folder(kind, template=template), tmp_path / "copy"))
    checkpoint = open_checkpoint(copy)
    loaded = load_reward_model(checkpoint).renderer
    (copy / "model.safetensors").unlink()
    assert example.texts_of(checkpoint) == example.Texts(rule, ends)
    assert (loaded.template, rule == "plain" and loaded.ends is not None) == (rule, ends)


def test_a_config_that_makes_no_model_is_refused(hub: LoopbackHub, warm: Path) -> None:
    edit(warm / "config.json", text_config={"x": 1})
    with pytest.raises(RefusedError, match=r"warm/config.json: makes no model, so nobody can load it: 'dict' object"):
        push(warm)
    assert writes(hub) == []


def test_lines_that_were_not_run_stand_in_the_card_and_say_so(hub: LoopbackHub, warm: Path) -> None:
    card = push(warm, run_lines=False).proposal.card
    assert 'AutoModelForSequenceClassification.from_pretrained("me/x", dtype="float32")' in card
    assert "\nThese lines were not run when this card was written. " in card
    assert re.search(r"^# -?[0-9.]+$", card, re.MULTILINE) is None


def test_a_file_that_changes_meanwhile_is_not_sent(
    hub: LoopbackHub, warm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def then_overwritten(*arguments: Any) -> Any:
        found = change(*arguments)
        with (warm / "model.safetensors").open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"\0\0\0\0")
        return found

    monkeypatch.setattr(push_module, "change", then_overwritten)
    with pytest.raises(RefusedError, match=r"model.safetensors: changed while it was read"):
        push(warm)
    assert writes(hub) == []


def test_a_member_that_is_gone_is_not_looked_for_on_the_hub(hub: LoopbackHub, warm: Path) -> None:
    manifest = json.loads((warm / "warmerge.json").read_text())
    edit(warm / "warmerge.json", inputs=[entry | {"checkpoint": "runs/1"} for entry in manifest["inputs"]])
    push(warm, dry_run=True)
    assert not [request for request in hub.requests if "runs/1" in request.path]


def test_what_was_published_can_be_published_again(hub: LoopbackHub, warm: Path, tmp_path: Path) -> None:
    """Its record names no folder of a member any more."""
    push(warm, licence="mit")
    again = tmp_path / "downloaded"
    again.mkdir()
    for name, data in sent(hub).items():
        (again / name).write_bytes(data)
    pushed = push(again, "me/y")
    assert dict(pushed.proposal.licence) == {}
    assert pushed.proposal.licence_source == "member 1: none stated, member 2: none stated, member 3: none stated"
    assert sent(hub, "me/y")["warmerge.json"] == sent(hub)["warmerge.json"]


def test_a_member_with_a_name_that_no_folder_has_states_no_licence(hub: LoopbackHub, warm: Path) -> None:
    first, *others = json.loads((warm / "warmerge.json").read_text())["inputs"]
    edit(warm / "warmerge.json", inputs=[first | {"checkpoint": "n" * 300}, *others])
    assert push(warm).proposal.licence_source.startswith("member 1: none stated, member 2: apache-2.0")


def test_long_front_matter_is_not_read(tmp_path: Path) -> None:
    """YAML takes 300 times its size in memory."""
    (tmp_path / "README.md").write_text("---\nlicense: mit\nx: [" + "a," * 1000 + "]\n---\n")
    assert stated(tmp_path / "README.md") == {"license": "mit"}
    (tmp_path / "README.md").write_text("---\nlicense: mit\nx: [" + "a," * 60_000 + "]\n---\n")
    assert stated(tmp_path / "README.md") == {}


def test_a_given_licence_wins(hub: LoopbackHub, warm: Path) -> None:
    proposal = push(warm, licence="mit").proposal
    assert (proposal.licence, proposal.licence_source) == ({"license": "mit"}, "as given")


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ("---\nlicense: mit\n---\n", "member 1: apache-2.0, member 2: mit, member 3: apache-2.0"),
        ("# no front matter\n", "member 1: apache-2.0, member 2: none stated, member 3: apache-2.0"),
        ("---\nlicense: [\n---\n", "member 1: apache-2.0, member 2: none stated, member 3: apache-2.0"),
        (None, "member 1: apache-2.0, member 2: none stated, member 3: apache-2.0"),
    ],
    ids=["another", "no front matter", "broken", "no card"],
)
def test_licences_that_do_not_agree(
    hub: LoopbackHub, merged: Path, tmp_path: Path, second: str | None, words: str
) -> None:
    members = [Path(shutil.copytree(merged / name, tmp_path / name)) for name in "abc"]
    (members[1] / "README.md").unlink()
    if second is not None:
        (members[1] / "README.md").write_text(second)
    warmerge.average(members, tmp_path / "warm")
    proposal = push(tmp_path / "warm").proposal
    assert (proposal.licence, proposal.licence_source) == ({}, words)
    card = sent(hub)["README.md"].decode()
    assert "\nlicense" not in card.split("---")[1]
    assert "No licence is stated; ask its owner before using it." in card


def test_the_licence_of_another_folder_of_a_members_name(
    hub: LoopbackHub, warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members are recorded as they were typed; where the command runs now, the same words may name other models."""
    record = json.loads((warm / "warmerge.json").read_text())
    for entry, name in zip(record["inputs"], "abc", strict=True):
        entry["checkpoint"] = f"runs/{name}"
        other = Path(shutil.copytree(warm, tmp_path / "elsewhere" / "runs" / name))
        (other / "README.md").write_text("---\nlicense: wtfpl\n---\n")
    (warm / "warmerge.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert push(warm).proposal.licence == {}


def test_licences_of_members_on_the_hub(hub: LoopbackHub, merged: Path, tmp_path: Path) -> None:
    for name in "abc":
        hub.put(f"org/{name}", merged / name)
    other = "---\nlicense: other\nlicense_name: our-own\nlicense_link: https://x.org/l\n---\n"
    for name in "ab":
        hub.put(f"org/{name}", hub.repos[f"org/{name}"] | {"README.md": other.encode()})
    warmerge.average(["org/a", "org/b"], tmp_path / "two")
    proposal = push(tmp_path / "two").proposal
    assert proposal.licence == {"license": "other", "license_name": "our-own", "license_link": "https://x.org/l"}
    record = json.loads(sent(hub)["warmerge.json"])["inputs"]
    assert [(entry["repo"], entry["revision"]) for entry in record] == [
        (f"org/{name}", hub.commits[f"org/{name}"]) for name in "ab"
    ]
    card = sent(hub)["README.md"].decode()
    assert "base_model:\n- org/a\n- org/b\nbase_model_relation: merge\n" in card
    warmerge.average(["org/a", "org/c"], tmp_path / "mixed")
    assert push(tmp_path / "mixed", "me/mixed").proposal.licence_source == "member 1: other, member 2: apache-2.0"
    hub.repos.pop("org/c")
    gone = push(tmp_path / "mixed", "me/gone").proposal
    assert gone.licence == {}
    assert "org/c" in gone.licence_source


def test_other_terms_under_one_name_do_not_agree(hub: LoopbackHub, merged: Path, tmp_path: Path) -> None:
    members = [Path(shutil.copytree(merged / name, tmp_path / name)) for name in "ab"]
    for name, member in zip("ab", members, strict=True):
        (member / "README.md").write_text(f"---\nlicense: other\nlicense_name: terms-{name}\n---\n")
    warmerge.average(members, tmp_path / "warm")
    assert push(tmp_path / "warm").proposal.licence == {}


# --- others can use it ---


def test_what_was_pushed_can_be_merged_again(hub: LoopbackHub, merged: Path, tmp_path: Path) -> None:
    for name in "abc":
        push(merged / name, f"me/{name}")
    warmerge.average([f"me/{name}" for name in "abc"], tmp_path / "again", stream=True)
    weights = (tmp_path / "again" / "model.safetensors", merged / "warm" / "model.safetensors")
    again, local = map(load_file, weights)
    assert again.keys() == local.keys()
    assert all(torch.equal(again[name], local[name]) for name in local)
    hub.requests.clear()
    pushed = push(tmp_path / "again", licence="apache-2.0")
    assert pushed.proposal.files["model.safetensors"] == weights[0].stat().st_size


def test_a_chat_template_that_was_left_behind_is_gone(hub: LoopbackHub, warm: Path, tmp_path: Path) -> None:
    with_template = Path(shutil.copytree(warm, tmp_path / "chat"))
    write_tokenizer(with_template, template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert (with_template / "chat_template.jinja").exists()
    push(with_template)
    assert "chat_template.jinja" in sent(hub)
    push(warm)
    assert "chat_template.jinja" not in sent(hub)


def test_propose_sends_nothing_and_send_makes_the_commit(hub: LoopbackHub, warm: Path) -> None:
    ready = propose(warm, "me/x", run_lines=False)
    assert writes(hub) == []
    assert send(ready).commit == hub.commits["me/x"]


def test_json_holds_the_proposal(hub: LoopbackHub, warm: Path) -> None:
    found = json.loads(json.dumps(push(warm, dry_run=True).as_json()))
    assert found["commit"] is None
    assert set(found["files"]) == MODEL
    assert found["private"] is True
    assert found["warnings"] == ["README.md: its lines that load and score were not run: --no-run"]
