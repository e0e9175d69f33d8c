"""What other merging tools get wrong in silence, case by case: refused here, or proven right, on real files."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIG, llama_tensors, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import warmerge

Writer = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


def read(folder: Path) -> Tensors:
    """Every tensor of a checkpoint as a loader would find it: by the index if there is one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    assert not (folder / "model.safetensors").exists()
    table = json.loads(index.read_text())["weight_map"]
    assert set(table.values()) == {file.name for file in folder.glob("*.safetensors")}
    tensors: Tensors = {}
    for name, file in table.items():
        with safe_open(folder / file, "pt") as shard:
            tensors[name] = shard.get_tensor(name)
    return tensors


def correctly_rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 -> dtype in one rounding. A cast by way of float32 would round twice: make its last bit sticky."""
    if dtype in (torch.float32, torch.float64):
        return exact.to(dtype)
    near = exact.to(torch.float32)
    inexact = near.double() != exact
    bits = near.view(torch.int32)
    toward_zero = torch.where(inexact & (near.double().abs() > exact.abs()), bits - 1, bits)
    return torch.where(inexact, toward_zero | 1, toward_zero).view(torch.float32).to(dtype)


def mean(members: Sequence[torch.Tensor]) -> torch.Tensor:
    total = torch.stack([member.double() for member in members]).sum(0)
    return correctly_rounded(total / len(members), members[0].dtype)


def assert_is_mean(folder: Path, members: Sequence[Mapping[str, torch.Tensor]]) -> None:
    found = read(folder)
    assert found.keys() == members[0].keys(), "a tensor was dropped or invented"
    for name, tensor in found.items():
        expected = mean([member[name] for member in members])
        assert tensor.dtype == expected.dtype, name
        assert torch.equal(tensor, expected), name


def refusal(checkpoints: Iterable[Path], out: Path, **choices: Any) -> warmerge.RefusedError:
    """average(...) refuses with exit code 3 and leaves nothing at all behind."""
    before = set(out.parent.iterdir())
    with pytest.raises(warmerge.RefusedError) as refused:
        warmerge.average(list(checkpoints), out, **choices)
    assert refused.value.exit_code == 3
    assert set(out.parent.iterdir()) == before
    return refused.value


def test_attention_biases_are_kept(rm: Writer, tmp_path: Path) -> None:
    """mergekit copies only the names in its table of architectures: the biases of attention_bias=true are dropped."""
    members, folders = [], []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        biases = {
            f"model.layers.{layer}.self_attn.{p}_proj.bias": torch.randn(16, generator=generator)
            for layer in range(2)
            for p in "qkvo"
        }
        members.append(llama_tensors(seed) | biases)
        folders.append(rm(f"m{seed}", seed=seed, add=biases, config={"attention_bias": True}))
    warmerge.average(folders, tmp_path / "out")
    assert_is_mean(tmp_path / "out", members)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["attention_bias"] is True


def test_extra_head_tensors_are_kept(rm: Writer, tmp_path: Path) -> None:
    """mergekit drops what its table does not list: a reward's mean, a head of two layers."""
    members, folders = [], []
    for seed in (1, 2, 3):
        extra = {
            "reward_mean": torch.tensor(float(seed)),
            "score.0.weight": torch.full((4, 16), 1.0) + 0.01 * seed,
            "score.2.weight": torch.full((1, 4), 2.0) + 0.01 * seed,
        }
        tensors = llama_tensors(seed) | extra
        del tensors["score.weight"]
        members.append(tensors)
        folders.append(rm(f"m{seed}", seed=seed, add=extra, drop=("score.weight",)))
    warmerge.average(folders, tmp_path / "out")
    assert_is_mean(tmp_path / "out", members)
    assert float(read(tmp_path / "out")["reward_mean"]) == 2.0


@pytest.mark.parametrize("lacking", [0, 1, 2])
def test_a_head_that_one_member_lacks_is_not_taken_from_another(rm: Writer, tmp_path: Path, lacking: int) -> None:
    """mergekit gives the merge the head of whichever member has one."""
    folders = [rm(f"m{i}", seed=i, drop=("score.weight",) if i == lacking else ()) for i in range(3)]
    found = refusal(folders, tmp_path / "out").findings
    assert any(f.where == str(folders[lacking]) and f.what.startswith("has no reward head") for f in found)
    assert {f.tensor for f in found} == {None, "score.weight"}
    if lacking:
        what = f"is missing here, present in {folders[0]}; nothing is filled in from another"
        assert warmerge.Finding(str(folders[lacking]), what, "score.weight") in found


def write_adapter(folder: Path, base: Path, seed: int) -> tuple[Path, Tensors]:
    """A SEQ_CLS LoRA adapter as PEFT saves it, and the deltas (with head) that it stands for."""
    generator = torch.Generator().manual_seed(seed)
    tensors, full = {}, {}
    for layer in range(2):
        for p in "qv":
            module = f"model.layers.{layer}.self_attn.{p}_proj"
            down, up = torch.randn(2, 16, generator=generator), 0.05 * torch.randn(16, 2, generator=generator)
            tensors[f"base_model.model.{module}.lora_A.weight"] = down
            tensors[f"base_model.model.{module}.lora_B.weight"] = up
            full[f"{module}.weight"] = (8 / 2) * (up.double() @ down.double())
    head = torch.linspace(-1, 1, 16).reshape(1, 16) + 0.02 * torch.randn(1, 16, generator=generator)
    tensors["base_model.model.score.weight"] = head
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": str(base),
        "r": 2,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["classifier", "score"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder, full | {"score.weight": head}


def test_adapters_on_a_language_model_become_a_reward_model_with_their_heads(tmp_path: Path) -> None:
    """mergekit makes of SEQ_CLS adapters on a causal base a causal model: the heads are gone."""
    language = llama_tensors(0, spread=0) | {"lm_head.weight": torch.ones(32, 16)}
    del language["score.weight"]
    config = {k: v for k, v in CONFIG.items() if k not in ("id2label", "label2id")}
    base = write_checkpoint(tmp_path / "lm", language, config | {"architectures": ["LlamaForCausalLM"]})
    folders, deltas = zip(*(write_adapter(tmp_path / f"a{seed}", base, seed) for seed in (1, 2)), strict=True)
    warmerge.average(folders, tmp_path / "out")
    found = read(tmp_path / "out")
    assert found.keys() == (language.keys() - {"lm_head.weight"}) | {"score.weight"}
    assert torch.equal(found["score.weight"], mean([delta["score.weight"] for delta in deltas]))
    for name, start in language.items():
        if name != "lm_head.weight":
            shift = sum(delta.get(name, torch.zeros(1)).double() for delta in deltas) / 2
            torch.testing.assert_close(found[name].double(), start.double() + shift, rtol=1e-6, atol=1e-7)
    adapted = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(found[adapted], language[adapted])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForSequenceClassification"]
    assert written["id2label"] == {"0": "LABEL_0"}


def test_different_configs_tokenizers_and_templates_are_refused_not_drawn(rm: Writer, tmp_path: Path) -> None:
    """mergekit copies config, tokenizer and template from an input that the hash seed picks."""
    a, b = rm("a", seed=1), rm("b", seed=2, config={"pad_token_id": 7, "rms_norm_eps": 0.01})
    for number, folder in enumerate((a, b)):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": number}}}))
        (folder / "chat_template.jinja").write_text("{{ messages }}" * (number + 1))
    for first, second in ((a, b), (b, a)):
        found = refusal([first, second], tmp_path / "out").findings
        said = {(f.where, f.what.split(" ")[1]) for f in found}
        assert (f"{second}/config.json", "pad_token_id") in said
        assert (f"{second}/config.json", "rms_norm_eps") in said
        assert any(f.where == f"{second}/tokenizer.json" and f"differs from {first}'s" in f.what for f in found)
        assert any(f.where == str(second) and f"has another chat template than {first}" in f.what for f in found)


@pytest.mark.parametrize("chosen", [1, 2])
def test_a_tokenizer_is_the_one_that_was_asked_for(rm: Writer, tmp_path: Path, chosen: int) -> None:
    """mergekit copies config, tokenizer and template from an input that the hash seed picks."""
    folders = [rm("a", seed=1), rm("b", seed=2)]
    for number, folder in enumerate(folders):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": number}}}))
        (folder / "chat_template.jinja").write_text("{{ messages }}" * (number + 1))
    merged = warmerge.average(folders, tmp_path / "out", tokenizer_from=chosen)
    assert len(merged.warnings) == 2
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / file).read_bytes() == (folders[chosen - 1] / file).read_bytes()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_the_configs_dtype_is_that_of_the_weights(rm: Writer, tmp_path: Path, dtype: str) -> None:
    """mergekit leaves the dtype of some input's config beside weights of another dtype."""
    folders = [rm(f"m{i}", seed=i, config={"torch_dtype": "float32"}) for i in (1, 2)]
    warmerge.average(folders, tmp_path / "out", dtype=dtype)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    held = {str(t.dtype).removeprefix("torch.") for t in read(tmp_path / "out").values()}
    assert held == {"float32" if dtype == "auto" else dtype} == {written["dtype"]} == {written["torch_dtype"]}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_that_is_not_finite_is_refused(rm: Writer, tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    """mergekit writes one input's NaN through."""
    bad = llama_tensors(2, dtype)["model.layers.1.mlp.up_proj.weight"].clone()
    bad[3, 5] = value
    folders = [
        rm("a", seed=1, dtype=dtype),
        rm("b", seed=2, dtype=dtype, add={"model.layers.1.mlp.up_proj.weight": bad}),
    ]
    (found,) = refusal(folders, tmp_path / "out").findings
    assert found == warmerge.Finding(
        f"{folders[1]}/model.safetensors",
        f"holds {value} at element {3 * 16 + 5}; leave this checkpoint out, or repair it",
        "model.layers.1.mlp.up_proj.weight",
    )


def test_a_misspelt_option_is_an_error(rm: Writer, tmp_path: Path) -> None:
    """mergekit ignores an option that it does not know, and merges with the default."""
    a, b = rm("a", seed=1), rm("b", seed=2)
    with pytest.raises(TypeError, match="'lamda'"):
        warmerge.average([a, b], tmp_path / "out", lamda=0.3)
    with pytest.raises(warmerge.UsageError, match=r"--rule: expected one of uniform, .*, found 'unifrom'"):
        warmerge.average([a, b], tmp_path / "out", rule="unifrom")
    with pytest.raises(warmerge.UsageError, match="--lambda is not used by --rule uniform"):
        warmerge.average([a, b], tmp_path / "out", lam=0.3)
    run = subprocess.run(
        [sys.executable, "-m", "warmerge", "average", a, b, "-o", tmp_path / "out", "--lamda", "0.3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert "--lamda" in run.stderr
    assert not (tmp_path / "out").exists()


def test_files_of_an_earlier_merge_never_win(rm: Writer, tmp_path: Path) -> None:
    """With mergekit and transformers a second run leaves the first one's shards and index, and they are loaded."""
    a, b, c, out = rm("a", seed=1), rm("b", seed=2), rm("c", seed=3), tmp_path / "out"
    (a / "chat_template.jinja").write_text("x")
    (b / "chat_template.jinja").write_text("x")
    warmerge.average([a, b], out, max_shard_size="2KB")
    first = {file.name: file.read_bytes() for file in out.iterdir()}
    assert len(read(out)) == len(llama_tensors(0))
    assert len(first) > 5
    with pytest.raises(warmerge.UsageError, match="exists and is not empty; choose another folder, or add --overwrite"):
        warmerge.average([b, a], out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == first
    (a / "chat_template.jinja").unlink()
    warmerge.average([a, c], out, overwrite=True)
    assert_is_mean(out, [llama_tensors(1), llama_tensors(3)])
    assert {file.name for file in out.iterdir()} == {"model.safetensors", "config.json", "README.md", "warmerge.json"}
    warmerge.average([a, c], out, overwrite=True, max_shard_size="4KB")
    assert_is_mean(out, [llama_tensors(1), llama_tensors(3)])
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c", "out"}


def test_a_folder_that_warmerge_did_not_write_is_left_alone(rm: Writer, tmp_path: Path) -> None:
    """With mergekit and transformers old weights in the output folder survive and are loaded."""
    a, b, stale = rm("a", seed=1), rm("b", seed=2), rm("stale", seed=9)
    with pytest.raises(warmerge.UsageError, match=r"was not written by warmerge \(no warmerge.json in it\)"):
        warmerge.average([a, b], stale, overwrite=True)
    assert_is_mean(stale, [llama_tensors(9)])


def test_stale_weights_in_an_input_are_refused(rm: Writer, tmp_path: Path) -> None:
    """An input folder with an old index or single file beside the new weights is read from the stale one elsewhere."""
    a, b = rm("a", seed=1), rm("b", seed=2, shards=2)
    save_file(llama_tensors(9), b / "model.safetensors")
    (found,) = refusal([a, b], tmp_path / "out").findings
    assert found.where == f"{b}/model.safetensors.index.json"
    assert "two checkpoints in one folder, one of them stale" in found.what


@pytest.mark.parametrize("cut", [1, 64, 1000])
def test_a_truncated_input_is_refused_by_name(rm: Writer, tmp_path: Path, cut: int) -> None:
    """sd-mecha reads what is left of a truncated file: wrong tensors, the head among them."""
    a, b = rm("a", seed=1), rm("b", seed=2)
    file = b / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - cut)
    assert refusal([a, b], tmp_path / "out").findings == (
        warmerge.Finding(str(file), f"is truncated: expected {size} bytes, found {size - cut}; download it again"),
    )


def test_heads_of_other_shapes_are_not_broadcast(rm: Writer, tmp_path: Path) -> None:
    """sd-mecha broadcasts a head of one row against one of two."""
    a, b = rm("a", seed=1), rm("b", seed=2, add={"score.weight": torch.ones(2, 16)})
    found = refusal([a, b], tmp_path / "out").findings
    expected = f"has shape [2, 16], expected [1, 16] as in {a}"
    assert warmerge.Finding(str(b), expected, "score.weight") in found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_output_keeps_each_tensors_dtype_and_every_name(rm: Writer, tmp_path: Path, dtype: torch.dtype) -> None:
    """sd-mecha writes float16 unless told otherwise, and leaves out the key of a tensor that came out NaN."""
    heads = [{"score.weight": llama_tensors(seed)["score.weight"]} for seed in (1, 2)]
    folders = [rm(f"m{seed}", seed=seed, dtype=dtype, add=head) for seed, head in zip((1, 2), heads, strict=True)]
    warmerge.average(folders, tmp_path / "out")
    assert_is_mean(tmp_path / "out", [llama_tensors(s, dtype) | head for s, head in zip((1, 2), heads, strict=True)])


@pytest.mark.parametrize("name", [None, "reward_projection.weight"])
def test_a_checkpoint_without_a_reward_head_is_refused(rm: Writer, tmp_path: Path, name: str | None) -> None:
    """transformers loads it with a head drawn at random, and a warning."""
    add = {} if name is None else {name: torch.ones(1, 16)}
    folders = [rm(f"m{seed}", seed=seed, drop=("score.weight",), add=add) for seed in (1, 2)]
    found = refusal(folders, tmp_path / "out").findings
    assert [f.where for f in found] == [str(folder) for folder in folders]
    assert all(f.what.startswith("has no reward head") and "would draw a random one" in f.what for f in found)
    warmerge.average(folders, tmp_path / "out", any_model=True)
    assert (name is None) or (name in read(tmp_path / "out"))


ELEMENTS = 100_000


def orders(count: int) -> list[tuple[int, ...]]:
    """Every order of up to three members, and a sample of the others with both ends of it."""
    every = list(itertools.permutations(range(count)))
    return every if count < 4 else [*every[:: len(every) // 4], every[-1]]


@pytest.mark.parametrize("count", [2, 3, 5, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_is_correctly_rounded_in_every_order(tmp_path: Path, count: int, dtype: torch.dtype) -> None:
    """fusion_bench, LM-Cocktail and many scripts add up in bfloat16: up to half of the elements are off."""
    generator = torch.Generator().manual_seed(count)
    start = torch.randn(ELEMENTS, generator=generator)
    members = [
        {"score.weight": (start + 0.1 * torch.randn(ELEMENTS, generator=generator)).to(dtype)} for _ in range(count)
    ]
    folders = [write_checkpoint(tmp_path / f"m{i}", member, config=None) for i, member in enumerate(members)]
    exact = torch.stack([member["score.weight"].double() for member in members]).sum(0) / count
    expected = correctly_rounded(exact, dtype)
    for number, order in enumerate(orders(count)):
        out = warmerge.average([folders[i] for i in order], tmp_path / f"out{number}").out
        assert torch.equal(read(out)["score.weight"], expected), order
    running = members[0]["score.weight"].clone()
    for member in members[1:]:
        running += member["score.weight"]
    running /= count
    assert count == 2 or (running != expected).double().mean() > 0.01, "the example would not show the fault"


def test_the_reference_rounds_once() -> None:
    """The helper of these tests against values whose rounding is known."""
    half = torch.tensor([1 + 2**-8, 1 + 2**-8 + 2**-40, 1 + 3 * 2**-8, 1 + 3 * 2**-8 - 2**-40], dtype=torch.float64)
    expected = torch.tensor([1, 1 + 2**-7, 1 + 2 * 2**-7, 1 + 2**-7], dtype=torch.bfloat16)
    assert torch.equal(correctly_rounded(half, torch.bfloat16), expected)
    assert torch.equal(correctly_rounded(-half, torch.bfloat16), -expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mean_next_to_a_midpoint_is_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    """1 + half a unit + a little more lies above the midpoint; rounding to float32 first would forget the little."""
    half = torch.finfo(dtype).eps / 2
    little = 2.0**-30 if dtype == torch.bfloat16 else 2.0**-24
    rows = [[1.0, -1.0], [half, -half], [little, -little], [0.0, 0.0]]
    folders = [
        write_checkpoint(tmp_path / f"m{i}", {"score.weight": torch.tensor([row], dtype=dtype)}, config=None)
        for i, row in enumerate(rows)
    ]
    for number, order in enumerate(itertools.permutations(folders)):
        if number % 6 == 0:
            found = read(warmerge.average(order, tmp_path / f"out{number}").out)["score.weight"]
            assert found.tolist() == [[(1 + 2 * half) / 4, -(1 + 2 * half) / 4]]
