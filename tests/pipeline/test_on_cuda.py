"""Models on a GPU against the same on the CPU. Run by hand on a machine with a GPU: pytest -m gpu."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import causal_models
import numpy
import pytest
import torch
from reward_world import World
from reward_world import pairs as world_pairs
from safetensors.torch import load_file
from tiny_models import DECODERS, ENCODERS, folder, make_model, save, texts, tokenizer

import warmerge
from warmerge.pipeline.prepare import mixture, prepare
from warmerge.pipeline.sampling import Sampling, sample_pool
from warmerge.rewards.model import fill, load_reward_model
from warmerge.rewards.scoring import Tokens, method_of, score
from warmerge.training.head import head_digest
from warmerge.training.member import Member, Recipe, train_member
from warmerge.training.training_set import TrainingSet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = "cuda"


def options(device: str, dtype: str = "float32") -> warmerge.LoadOptions:
    return warmerge.LoadOptions(device=device, dtype=dtype)


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
def test_rewards_are_those_of_the_cpu(kind: str) -> None:
    here, there = (load_reward_model(folder(kind), options(device)) for device in ("cpu", CUDA))
    assert there.device.type == CUDA
    assert method_of(there) is method_of(here)
    for budget in (64, None):
        found = score(there, Tokens(there.renderer, texts()), budget)
        numpy.testing.assert_allclose(found, score(here, Tokens(here.renderer, texts())), atol=1e-3)


def test_auto_is_the_gpu_and_the_models_own_dtype(tmp_path: Path) -> None:
    place = save(tmp_path / "rm", make_model("llama").to(torch.bfloat16), tokenizer("llama"))
    model = load_reward_model(place)
    assert (model.device.type, model.module.dtype) == (CUDA, torch.bfloat16)
    exact = load_reward_model(place, options("cpu"))
    found, expected = (score(each, Tokens(each.renderer, texts())) for each in (model, exact))
    assert (numpy.abs(found - expected) <= 0.1 * (1 + numpy.abs(expected))).all()


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_reward_model(folder("llama"), options(CUDA))
    what = [(f"{i} {prompt}"[:200], answer) for i in range(120) for prompt, answer in texts()]
    expected = score(model, Tokens(model.renderer, what), batch_tokens=4096)
    emptied, empty = [], torch.cuda.empty_cache
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: (emptied.append(True), empty()))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    emptied.clear()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (48 << 20)) / total)
    try:
        found = score(model, Tokens(model.renderer, what), batch_tokens=10_000_000)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert emptied, "it did fit, so nothing was tested: give it more texts"
    numpy.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_live_model_on_the_gpu_gets_the_bits_that_average_writes(world: World, tmp_path: Path) -> None:
    members = [world.a, world.b]
    written = load_file(warmerge.average(members, tmp_path / "out", rule="lambda", lam=0.3).out / "model.safetensors")
    model = load_reward_model(world.a, options(CUDA))
    filled = fill(model, mixture(prepare(members).plan.members, (0.7, 0.3)), "mixture")
    for name, value in filled.module.state_dict().items():
        assert value.device.type == CUDA
        assert torch.equal(value.cpu(), written[name]), name
    for device in ("cpu", CUDA):  # what computes the tiles is one thing, where the model lies another
        warmerge.average_into(model.module, members, device=device)
        means = (load_file(folder / "model.safetensors") for folder in members)
        a, b = (tensors["score.weight"].double() for tensors in means)
        assert torch.equal(model.module.score.weight.cpu(), ((a + b) / 2).float())


def test_a_curve_is_that_of_the_cpu(world: World) -> None:
    here, there = (
        warmerge.lmc_curve(
            [world.a, world.b], [world.data("val")], points=3, measuring=warmerge.Measuring(options(device))
        )
        for device in ("cpu", CUDA)
    )
    for mine, other in zip(here.rows, there.rows, strict=True):
        assert mine["wa"] == pytest.approx(other["wa"], abs=0.02)
        assert mine["reward_std"] == pytest.approx(other["reward_std"], rel=1e-3)


def test_answers_are_those_of_the_cpu(tmp_path: Path) -> None:
    policy = causal_models.write(tmp_path / "lm")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in world_pairs(8, 1)))
    settings = Sampling(n=3, max_new_tokens=6, dtype="float32", device="cpu")
    pools = []
    for device in ("cpu", CUDA):
        sample_pool(policy, str(prompts), tmp_path / f"{device}.jsonl", replace(settings, device=device))
        rows = [json.loads(line) for line in (tmp_path / f"{device}.jsonl").read_text().splitlines()]
        pools.append([answer for row in rows for answer in row["candidates"]])
    same = numpy.mean([mine == other for mine, other in zip(*pools, strict=True)])
    assert same > 0.8, "an answer may turn where two tokens are equally good; not most of them"


@pytest.mark.parametrize("changes", [{}, {"lora": 4}, {"precision": "bfloat16"}, {"gradient_checkpointing": True}])
def test_training_is_that_of_the_cpu(tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_model("llama")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.3 if parameter.ndim > 1 else 1.0)
    init = save(tmp_path / "init", module, tokenizer("llama"))
    random = numpy.random.default_rng(0)
    ids = [random.integers(6, 400, int(n)) for n in random.integers(5, 40, 64)]
    starts, sides = numpy.cumsum([0, *map(len, ids)]), numpy.arange(64).reshape(2, 32)
    pairs = TrainingSet(numpy.concatenate(ids), starts, sides[0], sides[1], numpy.zeros(32))
    recipe = Recipe(steps=4, batch=8, warmup=1, batch_tokens=256, **changes)
    member = Member("01", "init", head_digest(init), "", 1e-3, 0.0, 0, recipe)
    on_gpu = list(train_member(member, init, pairs, _fresh(tmp_path / "gpu")))
    saved = load_reward_model(tmp_path / "gpu", options(CUDA))
    assert numpy.isfinite(score(saved, Tokens(saved.renderer, texts()))).all()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = list(train_member(member, init, pairs, _fresh(tmp_path / "cpu")))
    tolerance = 0.05 if recipe.precision == "bfloat16" else 1e-3
    for mine, other in zip(on_gpu, on_cpu, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=tolerance)
        assert mine["tokens"] == other["tokens"]


def test_a_hidden_gpu_is_none(world: World, tmp_path: Path) -> None:
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    average = ["average", str(world.a), str(world.b), "-o", str(tmp_path / "out"), "--device"]
    ran = [
        subprocess.run([sys.executable, "-m", "warmerge", *average, device], env=hidden, capture_output=True, text=True)
        for device in ("cuda", "auto")
    ]
    assert "--device cuda: there is no such GPU here; 0 found" in ran[0].stderr
    assert [each.returncode for each in ran] == [2, 0], ran[1].stderr
    evaluate = ["eval", str(world.a), str(tmp_path / "out"), "--data", world.data("val"), "--json"]
    found = subprocess.run([sys.executable, "-m", "warmerge", *evaluate], env=hidden, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def _fresh(folder: Path) -> Path:
    """A new folder, for a member that is trained as if nothing else had been: accelerate keeps its first device."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    folder.mkdir()
    return folder
