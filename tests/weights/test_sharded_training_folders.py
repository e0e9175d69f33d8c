"""What FSDP and DeepSpeed leave: refused with the command that makes a model of it; that command's output averages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import llama_tensors
from safetensors.torch import load_file, save_file

from warmerge import average
from warmerge.errors import RefusedError
from warmerge.weights.locate import open_checkpoint

Writer = Callable[..., Path]
THEN = "copy the start's config.json and tokenizer files into OUT, and give that. These files can run code when read"


def said(spec: Path) -> str:
    with pytest.raises(RefusedError) as refused:
        open_checkpoint(spec)
    (finding,) = refused.value.findings
    assert str(finding).startswith(f"{spec}: ")
    return str(finding).removeprefix(f"{spec}: ")


def distributed(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """What torch.distributed.checkpoint writes, here of one process."""
    from torch.distributed import checkpoint

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process
        checkpoint.save({"model": tensors}, storage_writer=checkpoint.FileSystemWriter(folder))
    assert sorted(path.name for path in folder.iterdir()) == [".metadata", "__0_0.distcp"]
    return folder


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"...")
    return folder


def test_fsdp_shards(tmp_path: Path) -> None:
    """As accelerate's save_state leaves them: the user may name the checkpoint, or the folder in it."""
    whole = tmp_path / "my checkpoint"
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        touch(whole / name, ".metadata", "__0_0.distcp", "__1_0.distcp")
    command = f"accelerate merge-weights '{whole}/pytorch_model_fsdp_0' OUT"
    what = (
        f"holds weights in the pieces of a sharded training's ranks (.distcp), not a model; make one: {command}; {THEN}"
    )
    assert said(whole / "pytorch_model_fsdp_0") == what
    assert said(whole) == what
    what = "holds the optimizer's state of a sharded training; its weights are in the folder beside this one"
    assert said(whole / "optimizer_0") == what
    shutil.rmtree(whole / "pytorch_model_fsdp_0")
    assert said(whole) == "holds no .safetensors file"


def test_verl_shards(tmp_path: Path) -> None:
    names = (f"{name}_world_size_2_rank_{rank}.pt" for name in ("model", "optim", "extra_state") for rank in (0, 1))
    folder = touch(tmp_path / "actor", *names)
    command = f"python -m verl.model_merger merge --backend fsdp --local_dir {folder} --target_dir OUT"
    what = f"holds weights in the pieces of verl's ranks, not a model; make one: {command}; then give OUT. "
    assert said(folder) == what + "These files can run code when read"


@pytest.mark.parametrize("alone", [False, True])
def test_parts_that_torch_saves_as_safetensors(rm: Writer, alone: bool) -> None:
    """HuggingFaceStorageWriter(save_distributed=True) on a machine's own disk: slices under the tensors' names."""
    folder, name = rm("a", seed=1), "shard-00001-model-00001-of-00001.safetensors"
    slices = {name: tensor[: -(-len(tensor) // 2)].contiguous() for name, tensor in llama_tensors(1).items()}
    (folder / "model.safetensors").unlink()
    save_file(slices, folder / name, {"format": "pt", "DCP_VERSION": "1.0"})
    with pytest.raises(
        RefusedError, match=f"holds what single ranks of a training saved, parts of tensors .'{name}'.,"
    ):
        open_checkpoint(folder / name if alone else folder)


def test_a_model_beside_shards_is_a_model(rm: Writer) -> None:
    folder = rm("a", seed=1)
    touch(folder / "pytorch_model_fsdp_0", "__0_0.distcp")
    touch(folder, "zero_to_fp32.py", "latest")
    assert set(open_checkpoint(folder).tensors) == set(llama_tensors(1))


def test_deepspeed_shards(tmp_path: Path) -> None:
    """As its save_checkpoint leaves them (ZeRO-1 to ZeRO-3); names of DeepSpeed 0.17."""
    whole = touch(tmp_path / "run", "zero_to_fp32.py", "latest")
    two = touch(whole / "global_step10", "mp_rank_00_model_states.pt", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")
    three = touch(whole / "global_step20", "zero_pp_rank_0_mp_rank_00_model_states.pt")
    command = f"cd {whole}; python zero_to_fp32.py . OUT --safe_serialization"
    what = f"holds weights in the pieces of DeepSpeed's ranks, not a model; make one: {command}; {THEN}"
    assert [said(folder) for folder in (whole, two, three)] == [what] * 3
    touch(whole, "pytorch_model.bin")
    assert said(whole).startswith("holds pickle weights only ('pytorch_model.bin'), which can run code when loaded")


def test_fsdp_pickles(tmp_path: Path) -> None:
    ranks = touch(tmp_path / "ranks", "pytorch_model_fsdp_0_rank0.bin", "pytorch_model_fsdp_0_rank1.bin")
    assert said(ranks) == (
        "holds what each rank of an FSDP training kept for itself ('pytorch_model_fsdp_0_rank0.bin', "
        "'pytorch_model_fsdp_0_rank1.bin'); only that training reads it: load it there, and save it with "
        "FSDP_STATE_DICT_TYPE=SHARDED_STATE_DICT"
    )
    whole = touch(tmp_path / "whole", "pytorch_model_fsdp.bin")
    assert said(whole) == (
        "holds the weights of an FSDP training as a pickle ('pytorch_model_fsdp.bin'), not as a model; make one: "
        f"safetensors.torch.save_file(torch.load('{whole}/pytorch_model_fsdp.bin', weights_only=True), "
        f"'OUT/model.safetensors'); {THEN}"
    )


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: f"_fsdp_wrapped_module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"_forward_module.{name}",
        lambda name: f"_fpw_module.{name}",
        lambda name: f"module.{name}",
        lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    ],
)
def test_names_of_a_wrapper(rm: Writer, renamed: Callable[[str], str]) -> None:
    """They would average, and transformers would then load the average with weights drawn at random."""
    folder, tensors = rm("a", seed=1), llama_tensors(1)
    others = {renamed(name): tensor for name, tensor in tensors.items()}
    save_file(others, folder / "model.safetensors", {"format": "pt"})
    what = said(folder)
    assert what.startswith(
        f"has {len(others.keys() - tensors.keys())} tensors named as a training's wrapper names them ("
    )
    assert what.endswith(
        "; transformers would not find them and draw others at random; save the model itself: accelerator.unwrap_model("
        "model).save_pretrained(folder, state_dict=accelerator.get_state_dict(model))"
    )


def test_weights_that_were_not_gathered(rm: Writer) -> None:
    """ZeRO-3 leaves tensors of no elements in a module that it has divided; they average to tensors of no elements."""
    folder, tensors = rm("a", seed=1), llama_tensors(1)
    left = {name: tensor if name == "score.weight" else torch.empty(0) for name, tensor in tensors.items()}
    save_file(left, folder / "model.safetensors", {"format": "pt"})
    what = said(folder)
    assert what.startswith(f"has {len(tensors) - 1} tensors without elements ('model.embed_tokens.weight', ")
    assert what.endswith(
        "as DeepSpeed's ZeRO-3 leaves them where weights were not gathered; in its checkpoint: "
        "python zero_to_fp32.py . OUT --safe_serialization"
    )


@pytest.mark.slow
def test_what_is_advised_for_fsdp_shards_averages(rm: Writer, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    start, merged = rm("start", seed=0), []
    for seed in (1, 2):
        source = distributed(tmp_path / f"checkpoint-{seed}" / "pytorch_model_fsdp_0", llama_tensors(seed))
        assert "make one: accelerate merge-weights" in said(source)
        out = tmp_path / f"merged-{seed}"
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "merge-weights", str(source), str(out)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        for path in start.iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, out)
        merged.append(out)
    average(merged, tmp_path / "mean")
    found = load_file(tmp_path / "mean" / "model.safetensors")
    one, two = llama_tensors(1), llama_tensors(2)
    assert found.keys() == one.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, ((one[name].double() + two[name].double()) / 2).float()), name
