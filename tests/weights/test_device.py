"""Which device a merge is computed on: asked for by name, and without a name the CPU."""

from __future__ import annotations

import pytest
import torch
from conftest import Writer

import warmerge
from warmerge.errors import UsageError
from warmerge.weights.average import choose_device


def test_auto_is_the_cpu_and_does_not_even_ask_for_a_gpu(monkeypatch: pytest.MonkeyPatch, rm: Writer) -> None:
    def asked() -> bool:
        raise AssertionError("asked for a GPU")

    monkeypatch.setattr(torch.cuda, "is_available", asked)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    out = warmerge.average([rm("a", seed=1), rm("b", seed=2)], rm("c").parent / "out").out
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize(("name", "index"), [("cuda", None), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_that_is_there_is_taken_by_name(monkeypatch: pytest.MonkeyPatch, name: str, index: int | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(name) == torch.device("cuda", index) if index is not None else torch.device("cuda")
    with pytest.raises(UsageError, match="--device cuda:2: there is no such GPU here; 2 found"):
        choose_device("cuda:2")


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match=f"--device {name}: there is no such GPU here; 0 found"):
        choose_device(name)


@pytest.mark.parametrize("name", ["tpu", "mps", "meta", "CUDA", "", "cuda:x", "cuda:-1"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--device: expected auto, cpu, cuda or cuda:N, found '"):
        choose_device(name)
