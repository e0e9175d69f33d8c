"""Tiny reward models, made from configs and seeds; nothing is downloaded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

torch.set_num_threads(1)

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForSequenceClassification"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 32,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "pad_token_id": 0,
    "dtype": "float32",
}
Tensors = dict[str, torch.Tensor]
Writer = Callable[..., Path]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def bot(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def lines(rows: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def llama_tensors(seed: int, dtype: torch.dtype = torch.float32, spread: float = 0.01) -> Tensors:
    """The tensors of CONFIG's model: one start (seed 0 of `torch.Generator`) plus a small task vector of `seed`."""
    start, step = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1000 + seed)
    shapes = {"model.embed_tokens.weight": (32, 16), "model.norm.weight": (16,), "score.weight": (1, 16)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{p}_proj.weight": (16, 16) for p in "qkvo"}
        shapes |= {f"{prefix}mlp.{p}_proj.weight": (24, 16) for p in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": (16, 24)}
        shapes |= {f"{prefix}{n}_layernorm.weight": (16,) for n in ("input", "post_attention")}
    tensors = {}
    for name, shape in sorted(shapes.items()):
        body = torch.randn(shape, generator=start) * 0.2 + ("norm" in name)
        tensors[name] = (body + spread * torch.randn(shape, generator=step)).to(dtype)
    return tensors


def write_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = CONFIG, shards: int = 1
) -> Path:
    """A checkpoint folder with config.json, in one file or in so many shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    names = sorted(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    table = {name: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(table.values())):
        part = {name: tensors[name] for name in names if table[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def rm(tmp_path: Path) -> Writer:
    """rm("a", seed=1, dtype=..., shards=2, config={...}, drop=[...], add={...}) writes a tiny reward model."""

    def write(
        name: str,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        shards: int = 1,
        spread: float = 0.01,
        config: Mapping[str, Any] | None = None,
        drop: tuple[str, ...] = (),
        add: Mapping[str, torch.Tensor] | None = None,
    ) -> Path:
        tensors = llama_tensors(seed, dtype, spread) | dict(add or {})
        for unwanted in drop:
            del tensors[unwanted]
        names = {
            torch.float32: "float32",
            torch.bfloat16: "bfloat16",
            torch.float16: "float16",
            torch.float64: "float64",
        }
        return write_checkpoint(tmp_path / name, tensors, CONFIG | {"dtype": names[dtype]} | dict(config or {}), shards)

    return write


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The models and data of reward_world.py, made once."""
    from reward_world import build

    return build(tmp_path_factory.mktemp("world"))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited between two requests."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def quick_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The project that `warmerge demo --quick` leaves, and what it said. It is shared: copy it to change something."""
    from typer.testing import CliRunner

    from warmerge.cli import app

    out = tmp_path_factory.mktemp("demo") / "demo"
    found = CliRunner().invoke(app, ["demo", "--quick", "-o", str(out)])
    assert found.exit_code == 0, found.output
    return out, found.output
