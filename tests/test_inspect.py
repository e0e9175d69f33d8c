"""`warmerge inspect`: what checkpoints are, why `average` would refuse them, and how far apart they lie."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIG, llama_tensors, write_checkpoint
from safetensors.torch import save_file

import warmerge

Writer = Callable[..., Path]
Tensors = Mapping[str, torch.Tensor]
GROUPS = {
    "all": lambda name: True,
    "model.embed_tokens": lambda name: name.startswith("model.embed_tokens."),
    "layers.0": lambda name: name.startswith("model.layers.0."),
    "layers.1": lambda name: name.startswith("model.layers.1."),
    "model.norm": lambda name: name == "model.norm.weight",
    "head": lambda name: name == "score.weight",
}


def flat(tensors: Tensors, group: str) -> torch.Tensor:
    return torch.cat([t.double().flatten() for name, t in sorted(tensors.items()) if GROUPS[group](name)])


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=1e-7,
        atol=1e-7,
    )


# --- rows -----------------------------------------------------------------------------------------------------------


def test_a_row_says_what_a_checkpoint_is(rm: Writer) -> None:
    a, b = rm("a", seed=1, dtype=torch.bfloat16, shards=3), rm("b", seed=2, dtype=torch.bfloat16)
    found = warmerge.inspect([a, b])
    parameters = sum(t.numel() for t in llama_tensors(0).values())
    first, second = found.rows
    assert first == type(first)(
        checkpoint=str(a),
        architecture="LlamaForSequenceClassification",
        head="score.weight [1, 16]",
        parameters=parameters,
        dtype="BF16",
        files=3,
        bytes=2 * parameters,
        tokenizer="none",
    )
    assert (second.checkpoint, second.files, second.bytes) == (str(b), 1, 2 * parameters)
    assert (found.findings, found.warnings, found.distances) == ((), (), None)


def test_a_single_checkpoint_is_described_and_not_refused_for_being_alone(rm: Writer) -> None:
    found = warmerge.inspect([rm("a", seed=1)])
    assert len(found.rows) == 1
    assert (found.findings, found.warnings, found.distances) == ((), (), None)


def test_a_single_checkpoint_with_a_fault_is_described_and_the_fault_named_once(rm: Writer) -> None:
    a = rm("a", seed=1, config={"id2label": {"0": "x", "1": "y"}})
    found = warmerge.inspect([a])
    assert found.rows[0].head == "score.weight [1, 16]"
    assert found.findings == (warmerge.Finding(str(a), "has 1 rows, but config.json says 2 labels", "score.weight"),)


def test_mixed_dtypes_are_listed_largest_first(rm: Writer) -> None:
    head = llama_tensors(1)["score.weight"]
    a = rm("a", seed=1, dtype=torch.float16, add={"score.weight": head, "steps": torch.zeros(2, dtype=torch.int64)})
    assert warmerge.inspect([a]).rows[0].dtype == "F16+F32+I64"


def test_no_head_and_no_config_are_said(tmp_path: Path) -> None:
    tensors = {name: t for name, t in llama_tensors(0).items() if name != "score.weight"}
    row = warmerge.inspect([write_checkpoint(tmp_path / "a", tensors, config=None)], any_model=True).rows[0]
    assert (row.head, row.architecture) == ("none", "no config.json")


def test_the_tokenizers_digest_is_equal_for_equal_files_only(rm: Writer) -> None:
    folders = [rm(name, seed=i) for i, name in enumerate("abc")]
    for folder, text in zip(folders, ("x", "x", "y"), strict=True):
        (folder / "vocab.txt").write_text(text)
    first, same, other = (row.tokenizer for row in warmerge.inspect(folders).rows)
    assert first == same != other
    assert len(first) == 8
    (folders[1] / "chat_template.jinja").write_text("x")
    assert warmerge.inspect(folders).rows[1].tokenizer != first


def test_a_single_file_is_a_checkpoint(rm: Writer) -> None:
    folder = rm("a", seed=1)
    save_file(llama_tensors(2), folder / "step.safetensors")
    row = warmerge.inspect([folder / "step.safetensors"]).rows[0]
    assert (row.checkpoint, row.files) == (str(folder / "step.safetensors"), 1)


# --- findings -------------------------------------------------------------------------------------------------------

FAULTS: dict[str, dict[str, Any]] = {
    "missing head": {"drop": ("score.weight",)},
    "shape": {"add": {"model.norm.weight": torch.ones(17)}},
    "dtype": {"dtype": torch.bfloat16},
    "extra": {"add": {"x.weight": torch.ones(1)}},
    "config": {"config": {"pad_token_id": 9, "rms_norm_eps": 0.1}},
    "quantised": {"config": {"quantization_config": {"quant_method": "gptq"}}},
    "several": {"drop": ("score.weight",), "config": {"pad_token_id": 9}, "add": {"x.weight": torch.ones(1)}},
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_findings_are_those_for_which_average_refuses(rm: Writer, tmp_path: Path, fault: dict[str, Any]) -> None:
    folders = [rm("a", seed=1), rm("b", seed=2, **fault), rm("c", seed=3)]
    found = warmerge.inspect(folders)
    with pytest.raises(warmerge.RefusedError) as refusal:
        warmerge.average(folders, tmp_path / "out")
    assert found.findings == refusal.value.findings
    assert len(found.rows) == 3


def test_a_damaged_checkpoint_is_named_and_the_others_are_described(rm: Writer, tmp_path: Path) -> None:
    a, b, c = rm("a", seed=1), rm("b", seed=2), rm("c", seed=3)
    (b / "model.safetensors").write_bytes(b"")
    found = warmerge.inspect([a, b, c])
    assert [row.checkpoint for row in found.rows] == [str(a), str(c)]
    assert found.findings == (warmerge.Finding(f"{b}/model.safetensors", "is empty (0 bytes); download it again"),)
    with pytest.raises(warmerge.RefusedError) as refusal:
        warmerge.average([a, b, c], tmp_path / "out")
    assert refusal.value.findings == found.findings


def test_warnings_are_averages_own(rm: Writer, tmp_path: Path) -> None:
    folders = [rm("a", seed=1, config={"mean": 0.0, "std": 1.0}), rm("b", seed=2, config={"mean": 3.0, "std": 1.0})]
    found = warmerge.inspect(folders)
    assert found.findings == ()
    assert len(found.warnings) == 1
    assert found.warnings[0].where == f"{folders[1]}/config.json"
    assert "has reward mean 3.0 and std 1.0" in found.warnings[0].what
    assert warmerge.average(folders, tmp_path / "out").warnings == found.warnings


def test_distances_also_warn_of_what_the_weights_show(rm: Writer, tmp_path: Path) -> None:
    head = {"score.weight": -llama_tensors(2)["score.weight"]}
    folders = [rm("a", seed=1), rm("b", seed=2, add=head), rm("c", seed=3)]
    assert warmerge.inspect(folders).warnings == ()
    found = warmerge.inspect(folders, distances=True)
    assert [warning.tensor for warning in found.warnings] == ["score.weight"]
    assert "these heads look independently drawn" in found.warnings[0].what
    assert warmerge.average(folders, tmp_path / "out").warnings == found.warnings


def test_distances_refuse_a_copy_as_average_does(rm: Writer, tmp_path: Path) -> None:
    folders = [rm("a", seed=1), rm("b", seed=2), rm("again", seed=1, shards=2)]
    with pytest.raises(warmerge.RefusedError, match="has the same weights as") as refusal:
        warmerge.inspect(folders, distances=True)
    with pytest.raises(warmerge.RefusedError) as refused:
        warmerge.average(folders, tmp_path / "out")
    assert refusal.value.findings == refused.value.findings


def test_any_model_accepts_models_without_a_head(rm: Writer) -> None:
    folders = [rm(name, seed=i, drop=("score.weight",)) for i, name in enumerate("ab")]
    assert len(warmerge.inspect(folders).findings) == 2
    assert warmerge.inspect(folders, any_model=True).findings == ()


# --- distances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distances_without_a_base_are_those_that_torch_computes(rm: Writer, dtype: torch.dtype) -> None:
    folders = [rm(f"m{i}", seed=i, dtype=dtype, shards=i) for i in (1, 2, 3)]
    members = [llama_tensors(i, dtype) for i in (1, 2, 3)]
    found = warmerge.inspect(folders, distances=True).distances
    assert found is not None
    assert [entry.group for entry in found] == list(GROUPS)
    for entry in found:
        vectors = [flat(member, entry.group) for member in members]
        assert entry.parameters == len(vectors[0])
        close(entry.relative, [[float((a - b).norm() / a.norm()) for b in vectors] for a in vectors])
        assert (entry.norms, entry.drift, entry.cosines) == (None, None, None)
        assert [entry.relative[i][i] for i in range(3)] == [0, 0, 0]


def test_distances_from_a_base_are_those_that_torch_computes(rm: Writer) -> None:
    folders = [rm(f"m{i}", seed=i, spread=0.01 * i) for i in (1, 2, 3)]
    start = llama_tensors(0, spread=0)
    base = rm("base", spread=0)
    found = warmerge.inspect(folders, base=base, distances=True).distances
    assert found is not None
    assert [entry.group for entry in found] == list(GROUPS)
    for entry in found:
        origin = flat(start, entry.group)
        deltas = [flat(llama_tensors(i, spread=0.01 * i), entry.group) - origin for i in (1, 2, 3)]
        close(entry.norms, [float(delta.norm()) for delta in deltas])
        close(entry.drift, [float(delta.norm() / origin.norm()) for delta in deltas])
        close(entry.cosines, [[float(torch.dot(a, b) / a.norm() / b.norm()) for b in deltas] for a in deltas])
        close(entry.relative, [[float((a - b).norm() / (a + origin).norm()) for b in deltas] for a in deltas])
        assert len(entry.norms or ()) == 3, "the base is no member"


def test_the_drift_of_one_part_is_seen_in_that_part_alone(rm: Writer) -> None:
    start = llama_tensors(0, spread=0)
    moved = {name: 1.5 * t if name.startswith("model.layers.1.") else t for name, t in start.items()}
    headed = start | {"score.weight": 1.25 * start["score.weight"]}
    base, a, b = rm("base", spread=0), rm("a", spread=0, add=moved), rm("b", spread=0, add=headed)
    found = warmerge.inspect([a, b], base=base, distances=True).distances
    assert found is not None
    drift = {entry.group: entry.drift for entry in found}
    close([drift[group] for group in GROUPS if group not in ("all",)], [
        [0, 0], [0, 0], [0.5, 0], [0, 0], [0, 0.25],
    ])  # fmt: skip


def test_a_member_that_is_the_base_has_no_angle_with_itself_and_json_has_no_nan(rm: Writer) -> None:
    base, a = rm("base", spread=0), rm("a", seed=1)
    found = warmerge.inspect([a, base], base=base, distances=True)
    assert found.distances is not None
    whole = found.distances[0]
    assert whole.cosines is not None
    assert (whole.cosines[0][0], math.isnan(whole.cosines[1][1])) == (1, True)
    read = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert [read["distances"][0]["cosines"][i][i] for i in (0, 1)] == [1.0, None]
    assert read["distances"][0]["norms"][1] == 0
    assert [entry["group"] for entry in read["distances"]] == list(GROUPS)


def test_the_angle_to_a_member_that_did_not_move_is_undefined(rm: Writer) -> None:
    base, a = rm("base", spread=0), rm("a", seed=1)
    found = warmerge.inspect([a, base], base=base, distances=True)
    assert found.as_json()["distances"][0]["cosines"] == [[1.0, None], [None, None]]


def test_json_holds_rows_findings_and_warnings(rm: Writer) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2, drop=("score.weight",), config={"mean": 1.0})
    found = json.loads(json.dumps(warmerge.inspect([a, b]).as_json(), allow_nan=False))
    assert [row["checkpoint"] for row in found["checkpoints"]] == [str(a), str(b)]
    assert {finding["tensor"] for finding in found["findings"]} == {"score.weight", None}
    assert [warning["where"] for warning in found["warnings"]] == [f"{b}/config.json"]
    assert found["distances"] is None


def test_distances_do_not_depend_on_threads_and_report_their_progress(rm: Writer) -> None:
    folders = [rm(f"m{i}", seed=i) for i in (1, 2)]
    totals: list[int] = []
    done: list[int] = []
    one = warmerge.inspect(folders, distances=True, threads=1, progress=done.append, on_bytes=totals.append)
    many = warmerge.inspect(folders, distances=True, threads=4)
    assert one.distances == many.distances
    assert totals == [2 * 4 * one.rows[0].parameters]
    assert sum(done) == totals[0]


def test_distances_of_members_that_do_not_fit_are_refused(rm: Writer) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2, add={"model.norm.weight": torch.ones(17)})
    with pytest.raises(warmerge.RefusedError, match=r"has shape \[17\], expected \[16\]"):
        warmerge.inspect([a, b], distances=True)
    with pytest.raises(warmerge.UsageError, match="--distances takes two checkpoints or more"):
        warmerge.inspect([a], distances=True)


def test_a_base_of_other_shapes_is_refused_not_read_past_its_end(rm: Writer, tmp_path: Path) -> None:
    folders = [rm(f"m{i}", seed=i) for i in (1, 2)]
    start = llama_tensors(0, spread=0)
    cut = start | {"model.embed_tokens.weight": start["model.embed_tokens.weight"][:20].contiguous()}
    base = write_checkpoint(tmp_path / "base", cut, CONFIG | {"vocab_size": 20})
    with pytest.raises(warmerge.RefusedError, match=r"model\.embed_tokens\.weight"):
        warmerge.inspect(folders, base=base, distances=True)


def test_a_base_without_a_head_measures_the_body_and_says_of_how_many_parameters(rm: Writer) -> None:
    folders = [rm(f"m{i}", seed=i) for i in (1, 2)]
    base = rm("base", spread=0, drop=("score.weight",))
    found = warmerge.inspect(folders, base=base, distances=True)
    assert found.distances is not None
    assert [entry.group for entry in found.distances] == [group for group in GROUPS if group != "head"]
    assert found.distances[0].parameters == found.rows[0].parameters - 16


def test_a_base_of_another_family_is_refused(rm: Writer, tmp_path: Path) -> None:
    folders = [rm(f"m{i}", seed=i) for i in (1, 2)]
    base = write_checkpoint(tmp_path / "base", {"other.weight": torch.ones(3)})
    with pytest.raises(warmerge.RefusedError, match="has no tensor in common with the others"):
        warmerge.inspect(folders, base=base, distances=True)


def test_a_nan_in_the_weights_is_never_shown_as_no_distance(rm: Writer) -> None:
    head = llama_tensors(2)["score.weight"].clone()
    head[0, 3] = math.nan
    folders = [rm("a", seed=1), rm("b", seed=2, add={"score.weight": head})]
    try:
        found = warmerge.inspect(folders, distances=True).distances
    except warmerge.RefusedError as refusal:
        found, (finding,) = None, refusal.findings
    if found is None:
        assert (finding.tensor, "nan" in finding.what) == ("score.weight", True)
    else:
        assert all(math.isnan(found[-1].relative[i][j]) for i, j in ((0, 1), (1, 0)))


@pytest.mark.parametrize(
    "threads",
    [
        0,
        -1,
    ],
)
def test_a_number_of_threads_that_is_none_is_a_usage_error(rm: Writer, threads: int) -> None:
    with pytest.raises(warmerge.UsageError, match="--threads: expected 1 or more"):
        warmerge.inspect([rm("a", seed=1), rm("b", seed=2)], distances=True, threads=threads)


# --- the figure -----------------------------------------------------------------------------------------------------


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.parametrize("with_base", [False, True])
def test_a_figure_is_a_png_that_grows_with_the_members(rm: Writer, tmp_path: Path, with_base: bool) -> None:
    folders = [rm(f"m{i}", seed=i) for i in (1, 2, 3)]
    base = rm("base", spread=0) if with_base else None
    sizes = []
    for number in (2, 3):
        path = tmp_path / f"angles{number}.png"
        warmerge.inspect([*folders[: number - 1], *(folders[2:])], base=base, distances=True, figure=path)
        sizes.append(png_size(path))
    assert sizes[0][0] > 300
    assert sizes[0][0] <= sizes[1][0]


def test_a_figure_with_an_undefined_angle_is_drawn(rm: Writer, tmp_path: Path) -> None:
    base, a = rm("base", spread=0), rm("a", seed=1)
    warmerge.inspect([a, base], base=base, distances=True, figure=tmp_path / "f.png")
    assert png_size(tmp_path / "f.png")[0] > 300


@pytest.mark.parametrize("name", ["nowhere/angles.png", "angles.txt"])
def test_a_figure_that_cannot_be_written_is_an_error_of_ours(rm: Writer, tmp_path: Path, name: str) -> None:
    with pytest.raises(warmerge.UsageError, match=r"--figure: .*(angles\.txt|nowhere)"):
        warmerge.inspect([rm("a", seed=1), rm("b", seed=2)], distances=True, figure=tmp_path / name)


def test_a_figure_without_distances_is_a_usage_error(rm: Writer, tmp_path: Path) -> None:
    with pytest.raises(warmerge.UsageError, match="--figure draws distances; add --distances"):
        warmerge.inspect([rm("a", seed=1), rm("b", seed=2)], figure=tmp_path / "f.png")
    assert not (tmp_path / "f.png").exists()
