"""The CUDA engine against the CPU's. Run by hand on a machine with a GPU: pytest -m gpu."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Writer
from safetensors.torch import load_file

import warmerge

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CHOICES: list[dict[str, Any]] = [
    {},
    {"rule": "weighted", "weights": (0.5, 0.3, 0.2)},
    {"rule": "slerp"},
    {"rule": "stock"},
    {"rule": "liti", "eta": 0.3},
    {"dtype": "float16"},
]


@pytest.mark.parametrize("choices", CHOICES, ids=[str(choice) for choice in CHOICES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_and_cpu_agree_within_one_rounding(
    rm: Writer, tmp_path: Path, dtype: torch.dtype, choices: dict[str, Any]
) -> None:
    members = [rm(f"m{i}", seed=i + 1, dtype=dtype, shards=i + 1) for i in range(3)]
    if choices.get("rule") in ("slerp", "stock", "liti"):
        choices = choices | {"base": rm("base", spread=0)}
    here = load_file(warmerge.average(members, tmp_path / "cpu", **choices).out / "model.safetensors")
    there = warmerge.average(members, tmp_path / "cuda", device="cuda", threads=3, **choices).out
    for name, value in load_file(there / "model.safetensors").items():
        apart = (value.double() - here[name].double()).abs()
        step = torch.finfo(value.dtype).eps * here[name].double().abs() + torch.finfo(value.dtype).tiny
        assert (apart <= step).all(), name


def test_cuda_names_what_is_not_finite(rm: Writer, tmp_path: Path) -> None:
    bad = torch.zeros(1, 16)
    bad[0, 3] = float("nan")
    with pytest.raises(warmerge.RefusedError, match=r"'score\.weight' holds nan at element 3"):
        warmerge.average([rm("a", seed=1), rm("b", add={"score.weight": bad})], tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()
