"""May these checkpoints be merged? Every check by itself, and all findings at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_tensors, write_checkpoint

import warmerge
from warmerge.errors import Finding, RefusedError
from warmerge.pipeline.prepare import prepare
from warmerge.rewards.config import effective_config
from warmerge.weights import compat, small_files
from warmerge.weights.checkpoint import Checkpoint
from warmerge.weights.locate import open_checkpoint
from warmerge.weights.plan import Selection
from warmerge.weights.samples import doubts, read_sample, same_contents

Writer = Callable[..., Path]
Folders = Sequence[Path]


def check(folders: Folders, **choices: Any) -> tuple[list[Finding], list[Finding]]:
    return compat.check([open_checkpoint(f) for f in folders], effective_config=effective_config, **choices)


def refused(folders: Folders, **choices: Any) -> list[Finding]:
    return check(folders, **choices)[0]


def sampled(folders: Folders) -> tuple[list[Finding], list[Finding]]:
    """Doubts, and members of equal contents."""
    members = [open_checkpoint(f) for f in folders]
    samples = [read_sample(member) for member in members]
    return doubts(members, samples), same_contents(members, samples)


def assert_healthy(folders: Folders, **choices: Any) -> None:
    assert check(folders, **choices) == ([], [])
    assert sampled(folders) == ([], [])


# --- healthy members ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [2, 3, 6])
def test_healthy_members_raise_no_doubt(rm: Writer, dtype: torch.dtype, count: int) -> None:
    assert_healthy([rm(f"m{i}", seed=i, dtype=dtype, shards=1 + i % 3) for i in range(count)])


def test_members_need_no_config(tmp_path: Path) -> None:
    assert_healthy([write_checkpoint(tmp_path / f"m{i}", llama_tensors(i), config=None) for i in range(3)])


# --- names, shapes, dtypes ------------------------------------------------------------------------------------------


def test_a_missing_tensor_is_named_with_both_members(rm: Writer) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2, drop=("model.norm.weight",))
    assert refused([a, b]) == [
        Finding(str(b), f"is missing here, present in {a}; nothing is filled in from another", "model.norm.weight")
    ]


def test_an_extra_tensor_is_named_with_both_members(rm: Writer) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2, add={"score.bias": torch.zeros(1)})
    assert refused([a, b]) == [Finding(str(b), f"is extra, not present in {a}", "score.bias")]
    assert refused([b, a]) == [
        Finding(str(a), f"is missing here, present in {b}; nothing is filled in from another", "score.bias")
    ]


def test_many_missing_tensors_make_one_finding(rm: Writer) -> None:
    layer = tuple(name for name in llama_tensors(0) if name.startswith("model.layers.1."))
    a, b = rm("a", seed=1), rm("b", seed=2, drop=layer)
    (found,) = refused([a, b])
    assert (found.where, found.tensor) == (str(b), None)
    assert found.what.startswith(f"{len(layer)} tensors ('model.layers.1.input_layernorm.weight', ")
    assert f"and {len(layer) - 5} more) are missing here, present in {a}; nothing" in found.what


def test_every_member_is_compared_not_only_the_second(rm: Writer) -> None:
    a, b, c = rm("a", seed=1), rm("b", seed=2), rm("c", seed=3, drop=("model.norm.weight",))
    assert [(finding.where, finding.tensor) for finding in refused([a, b, c])] == [(str(c), "model.norm.weight")]


@pytest.mark.parametrize("shape", [(1,), (16, 1), (17,), (1, 16), ()])
def test_another_shape_is_named_with_both(rm: Writer, shape: tuple[int, ...]) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2, add={"model.norm.weight": torch.ones(shape)})
    assert refused([a, b]) == [
        Finding(str(b), f"has shape {list(shape)}, expected [16] as in {a}", "model.norm.weight")
    ]


def test_another_dtype_is_refused_until_the_user_chooses(rm: Writer) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2, add={"score.weight": llama_tensors(2, torch.bfloat16)["score.weight"]})
    assert refused([a, b]) == [
        Finding(
            str(b),
            f"is BF16, but F32 in {a}; say which the result should have: --dtype float32, bfloat16 or float16",
            "score.weight",
        )
    ]
    assert refused([a, b], dtype="float32") == []


def test_another_dtype_everywhere_makes_one_finding(rm: Writer) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2, dtype=torch.bfloat16)
    (found,) = refused([a, b])
    assert found.where == str(b)
    assert f"are BF16, but F32 in {a}; say which the result should have: --dtype" in found.what


def test_integers_against_floats_stay_refused_whatever_the_dtype(rm: Writer) -> None:
    a = rm("a", seed=1, add={"steps": torch.zeros(3)})
    b = rm("b", seed=2, add={"steps": torch.zeros(3, dtype=torch.int64)})
    assert refused([a, b], dtype="float32") == [Finding(str(b), f"is I64, but F32 in {a}", "steps")]


def test_only_selected_tensors_are_compared(rm: Writer) -> None:
    a = rm("a", seed=1)
    b = rm(
        "b", seed=2, drop=("score.weight",), add={"model.norm.weight": torch.ones(17), "lm_head.weight": torch.ones(1)}
    )
    chosen = Selection(only=("model.layers.*",), rest_from=0)
    assert refused([a, b], selection=chosen) == []
    wider = Selection(only=("model.*",), rest_from=0)
    assert [found.tensor for found in refused([a, b], selection=wider)] == ["model.norm.weight"]


def test_a_partial_merge_compares_with_the_member_that_the_rest_comes_from(rm: Writer) -> None:
    a, b = rm("a", seed=1, add={"model.norm.weight": torch.ones(17)}), rm("b", seed=2)
    (found,) = refused([a, b], selection=Selection(only=("model.*",), rest_from=1))
    assert found == Finding(str(a), f"has shape [17], expected [16] as in {b}", "model.norm.weight")


# --- quantised ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "method"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"load_in_4bit": True}, "unknown"),
        ("compression_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_a_quantised_member_is_refused(rm: Writer, key: str, value: Any, method: str) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2, config={key: value})
    found = refused([a, b])[0]
    assert (found.where, found.tensor) == (str(b), None)
    assert found.what.startswith(f"is quantised ({key}, method {method!r}); merge the unquantised checkpoints")


def test_a_quantised_base_is_refused(rm: Writer) -> None:
    a, b, base = rm("a", seed=1), rm("b", seed=2), rm("base", config={"quantization_config": {"quant_method": "fp8"}})
    (found,) = refused([a, b], base=open_checkpoint(base))
    assert (found.where, "method 'fp8'" in found.what) == (str(base), True)


def test_fp8_weights_are_refused_in_every_member(rm: Writer) -> None:
    weight = torch.zeros(16, 16).to(torch.float8_e4m3fn)
    name = "model.layers.0.self_attn.q_proj.weight"
    a, b = rm("a", seed=1, add={name: weight}), rm("b", seed=2, add={name: weight})
    what = "is F8_E4M3, which cannot be averaged; merge the bfloat16 or float32 checkpoints"
    assert refused([a, b]) == [Finding(str(a), what, name), Finding(str(b), what, name)]


# --- heads ----------------------------------------------------------------------------------------------------------


def test_no_reward_head_is_refused_for_each_member(rm: Writer) -> None:
    folders = [rm(name, seed=seed, drop=("score.weight",)) for seed, name in enumerate("ab")]
    found = refused(folders)
    assert [finding.where for finding in found] == [str(folder) for folder in folders]
    assert all(finding.what.startswith("has no reward head (no tensor named like score.weight") for finding in found)
    assert all("--any-model merges models that are not reward models" in finding.what for finding in found)
    assert refused(folders, any_model=True) == []


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("score.weight", True),
        ("score.0.weight", True),
        ("classifier.out_proj.weight", True),
        ("v_head.summary.weight", True),
        ("value_head.weight", True),
        ("pretrained_model.score.weight", True),
        ("reward_mean", False),
        ("model.layers.0.mlp.gate.e_score_correction_bias", False),
        ("lm_head.weight", False),
        ("model.scores.weight", False),
        ("underscore.weight", False),
    ],
)
def test_a_head_is_told_by_one_component_of_its_name(name: str, head: bool) -> None:
    assert compat.is_head(name) is head


def test_a_head_in_a_language_models_config_is_refused(rm: Writer) -> None:
    change = {"architectures": ["LlamaForCausalLM"]}
    a, b = rm("a", seed=1, config=change), rm("b", seed=2, config=change)
    assert refused([a, b]) == [
        Finding(str(f), "has a head ('score.weight') but its config says 'LlamaForCausalLM', which would drop it")
        for f in (a, b)
    ]


def test_more_labels_than_rows_are_refused(rm: Writer) -> None:
    change = {"id2label": {"0": "a", "1": "b"}}
    a, b = rm("a", seed=1, config=change), rm("b", seed=2, config=change)
    assert refused([a, b]) == [
        Finding(str(f), "has 1 rows, but config.json says 2 labels", "score.weight") for f in (a, b)
    ]


def test_the_labels_of_one_member_must_be_those_of_the_others(rm: Writer) -> None:
    two = {"id2label": {"0": "a", "1": "b"}}
    a = rm("a", seed=1)
    b = rm("b", seed=2, config=two, add={"score.weight": torch.ones(2, 16)})
    found = refused([a, b])
    assert Finding(str(b), f"has shape [2, 16], expected [1, 16] as in {a}", "score.weight") in found
    assert Finding(f"{b}/config.json", f"has num_labels 2, expected 1 as in {a}") in found
    assert len(found) == 2


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({}, 2),
        ({"num_labels": 1}, 1),
        ({"id2label": {"0": "x"}}, 1),
        ({"id2label": {"0": "x", "1": "y", "2": "z"}, "num_labels": 1}, 3),
        ({"num_labels": None}, 2),
    ],
)
def test_the_number_of_labels_is_read_as_transformers_reads_it(config: Mapping[str, Any], labels: int) -> None:
    assert compat.num_labels(config) == labels


# --- configs --------------------------------------------------------------------------------------------------------

MATTERS = [
    ("architectures", ["Qwen2ForSequenceClassification"], '["LlamaForSequenceClassification"]'),
    ("pad_token_id", 3, "0"),
    ("num_attention_heads", 4, "2"),
    ("vocab_size", 33, "32"),
    ("hidden_act", "gelu", None),
    ("rms_norm_eps", 0.01, None),
    ("attention_bias", True, None),
    ("tie_word_embeddings", True, None),
    ("max_position_embeddings", 77, None),
    ("reward_transform", "tanh", "nothing"),
]


@pytest.mark.parametrize(("key", "value", "expected"), MATTERS, ids=[row[0] for row in MATTERS])
def test_a_config_that_computes_something_else_is_refused(
    rm: Writer, key: str, value: Any, expected: str | None
) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2, config={key: value})
    (found,) = refused([a, b])
    assert (found.where, found.tensor) == (f"{b}/config.json", None)
    assert found.what.startswith(f"has {key} {json.dumps(value)}, expected ")
    assert found.what.endswith(f" as in {a}")
    if expected is not None:
        assert found.what == f"has {key} {json.dumps(value)}, expected {expected} as in {a}"


def test_null_is_not_the_default(rm: Writer) -> None:
    """Mistral's sliding_window: 4096 where config.json does not have it, none where it says null, as v0.2 does."""
    mistral = {"model_type": "mistral", "architectures": ["MistralForSequenceClassification"]}
    a, b = rm("a", seed=1, config=mistral), rm("b", seed=2, config=mistral | {"sliding_window": None})
    expected = f"has sliding_window null, expected 4096 as in {a}"
    assert refused([a, b]) == [Finding(f"{b}/config.json", expected)]


def test_another_rope_is_refused_however_it_is_spelled(rm: Writer) -> None:
    a = rm("a", seed=1)
    for name, change in (
        ("old", {"rope_theta": 5e5}),
        ("new", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ):
        (found,) = refused([a, rm(name, seed=2, config=change)])
        assert found.where.endswith(f"{name}/config.json")
        assert "has rope_parameters" in found.what
        assert "500000.0" in found.what


def test_another_model_type_is_refused(rm: Writer) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2, config={"model_type": "mistral"})
    found = refused([a, b])
    assert Finding(f"{b}/config.json", f'has model_type "mistral", expected "llama" as in {a}') in found


IGNORED = {
    "transformers_version": "4.30.0",
    "_name_or_path": "/elsewhere/run-7",
    "attention_dropout": 0.1,
    "use_cache": False,
    "initializer_range": 0.5,
    "torch_dtype": "float32",
    "id2label": {"0": "reward"},
    "unsloth_version": "2025.1",
}


@pytest.mark.parametrize("key", IGNORED)
def test_what_says_how_a_model_was_trained_or_saved_is_ignored(rm: Writer, key: str) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2, config={key: IGNORED[key]})
    assert check([a, b]) == ([], [])
    assert check([b, a]) == ([], [])
    assert compat.check([open_checkpoint(a), open_checkpoint(b)]) == ([], []), "without transformers' help"


SPELLINGS = {
    "rope_theta or rope_parameters": (
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "a default spelled out": ({}, {"rms_norm_eps": 1e-6, "hidden_act": "silu"}),
    "null where there is no such field": ({}, {"finetuning_task": None}),
    "num_labels or id2label": ({"id2label": None, "label2id": None, "num_labels": 1}, {}),
}


@pytest.mark.parametrize(("one", "other"), SPELLINGS.values(), ids=SPELLINGS.keys())
def test_two_spellings_of_one_config_are_equal(rm: Writer, one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    a, b = rm("a", seed=1, config=one), rm("b", seed=2, config=other)
    assert check([a, b]) == ([], [])


def test_configs_are_only_read_by_transformers_when_their_files_differ(rm: Writer) -> None:
    def unwanted(config: Mapping[str, Any]) -> Mapping[str, Any]:
        raise AssertionError("imports transformers for nothing")

    members = [open_checkpoint(rm("a", seed=1)), open_checkpoint(rm("b", seed=2, config={"use_cache": False}))]
    assert compat.check(members, effective_config=unwanted) == ([], [])


def test_without_transformers_a_spelling_is_a_difference(rm: Writer) -> None:
    members = [open_checkpoint(rm("a", seed=1)), open_checkpoint(rm("b", seed=2, config={"rms_norm_eps": 1e-6}))]
    refusals, _ = compat.check(members)
    assert [finding.what for finding in refusals] == [
        f"has rms_norm_eps 1e-06, expected nothing as in {members[0].label}"
    ]


def test_one_config_missing_is_refused_whichever_it_is(rm: Writer) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2)
    (b / "config.json").unlink()
    expected = [Finding(str(b), "has no config.json, others have one; add it")]
    assert refused([a, b]) == expected
    assert refused([b, a]) == expected


def test_the_padding_id_of_a_text_part_counts(rm: Writer) -> None:
    def config(pad: int) -> dict[str, Any]:
        return {"pad_token_id": None, "model_type": "unknown", "text_config": {"pad_token_id": pad}}

    assert small_files.pad_token_id({"text_config": {"pad_token_id": 7}}) == 7
    assert small_files.pad_token_id({"pad_token_id": 3, "text_config": {"pad_token_id": 7}}) == 3


def test_a_partial_merge_asks_for_one_model_type_only(rm: Writer) -> None:
    chosen = Selection(only=("model.layers.*",), rest_from=0)
    a, b = rm("a", seed=1), rm("b", seed=2, config={"pad_token_id": 3, "architectures": ["LlamaModel"]})
    assert check([a, b], selection=chosen) == ([], [])
    c = rm("c", seed=2, config={"model_type": "mistral"})
    assert refused([a, c], selection=chosen) == [
        Finding(f"{c}/config.json", f'has model_type "mistral", expected "llama" as in {a}')
    ]


def assert_shown_escaped(rm: Writer, change: Mapping[str, Any]) -> None:
    (found,) = refused([rm("a", seed=1), rm("b", seed=2, config=change)])
    assert "evil" in str(found)
    assert str(found).isprintable()


def test_an_escape_in_the_value_of_a_config_field_never_reaches_the_message(rm: Writer) -> None:
    assert_shown_escaped(rm, {"evil": "\x1b[31m"})


def test_an_escape_in_the_name_of_a_config_field_never_reaches_the_message(rm: Writer) -> None:
    assert_shown_escaped(rm, {"\x1b[31mevil": 1})


DAMAGED = [
    {"architectures": 5},
    {"architectures": {"a": 1}},
    {"num_labels": "many", "id2label": None},
    {"num_labels": [1], "id2label": None},
    {"hidden_size": "x"},
    {"quantization_config": "awq"},
    {"num_attention_heads": 3},
]


def test_a_config_that_transformers_cannot_read_is_compared_as_it_stands(rm: Writer) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2, config={"auto_map": {"AutoModel": "modeling.M"}})
    assert [f.what for f in refused([a, b])] == [
        f'has auto_map {{"AutoModel": "modeling.M"}}, expected nothing as in {a}'
    ]


@pytest.mark.parametrize("change", DAMAGED, ids=[json.dumps(change) for change in DAMAGED])
def test_a_config_of_wrong_types_is_refused_not_a_traceback(rm: Writer, change: Mapping[str, Any]) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2, config=change)
    try:
        found = refused([a, b])
    except RefusedError as refusal:
        found = list(refusal.findings)
    assert any(finding.where.startswith(str(b)) for finding in found)


@pytest.mark.parametrize("value", ["LlamaForCausalLM", [5], {"a": 1}])
def test_architectures_that_are_no_list_of_names_are_refused(rm: Writer, value: Any) -> None:
    a = rm("a", seed=1, config={"architectures": value})
    with pytest.raises(RefusedError) as caught:
        open_checkpoint(a)
    what = f"has architectures {json.dumps(value)}, expected a list of names; it is damaged"
    assert caught.value.findings == (Finding(f"{a}/config.json", what),)


# --- tokenizers -----------------------------------------------------------------------------------------------------

HINT = "; choose one with --tokenizer-from N if that is what you want"
TOKENIZER = {"version": "1.0", "truncation": None, "padding": None, "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}}


def write_json(path: Path, content: Any, **style: Any) -> None:
    path.write_text(json.dumps(content, **style))


def two(rm: Writer) -> tuple[Path, Path]:
    a, b = rm("a", seed=1), rm("b", seed=2)
    for folder in (a, b):
        write_json(folder / "tokenizer.json", TOKENIZER)
        write_json(folder / "tokenizer_config.json", {"pad_token": "<pad>"})
    return a, b


def assert_differ(a: Path, b: Path, where: str, what: str) -> None:
    (found,), none = check([a, b])
    assert none == []
    assert found.what.endswith(HINT)
    assert check([a, b], tokenizer_from=1) == ([], [Finding(where, found.what.removesuffix(HINT))])
    assert (found.where, found.what.removesuffix(HINT).replace("'its text'", "its text")) == (where, what)


def test_equal_tokenizers_pass_however_they_are_laid_out(rm: Writer) -> None:
    a, b = two(rm)
    write_json(b / "tokenizer.json", dict(reversed(TOKENIZER.items())), indent=2)
    assert_healthy([a, b])


def test_what_a_tokenizer_remembers_of_its_last_use_is_ignored(rm: Writer) -> None:
    a, b = two(rm)
    write_json(b / "tokenizer.json", TOKENIZER | {"truncation": {"max_length": 512}, "padding": {"strategy": "Fixed"}})
    write_json(b / "tokenizer_config.json", {"pad_token": "<pad>", "name_or_path": "/elsewhere", "chat_template": None})
    assert_healthy([a, b])


def test_another_vocabulary_is_refused(rm: Writer) -> None:
    a, b = two(rm)
    write_json(b / "tokenizer.json", TOKENIZER | {"model": {"type": "BPE", "vocab": {"a": 1, "b": 0}}})
    assert_differ(a, b, f"{b}/tokenizer.json", f"differs from {a}'s in 'model'")


def test_other_tokenizer_settings_are_refused_by_name(rm: Writer) -> None:
    a, b = two(rm)
    write_json(b / "tokenizer_config.json", {"pad_token": "<eos>", "add_bos_token": True})
    assert_differ(a, b, f"{b}/tokenizer_config.json", f"differs from {a}'s in 'add_bos_token', 'pad_token'")


@pytest.mark.parametrize(
    "file", ["merges.txt", "vocab.txt", "tokenizer.model", "spm.model", "bpe.codes", "tekken.json"]
)
def test_tokenizer_files_that_are_no_json_are_compared_by_their_bytes(rm: Writer, file: str) -> None:
    a, b = two(rm)
    (a / file).write_bytes(b"a b\n\xff")
    (b / file).write_bytes(b"b a\n\xff")
    assert_differ(a, b, f"{b}/{file}", f"differs from {a}'s in its text")


def test_a_tokenizer_file_that_only_one_has_is_refused_whichever_it_is(rm: Writer) -> None:
    a, b = two(rm)
    write_json(b / "added_tokens.json", {"<x>": 40})
    assert_differ(a, b, str(a), f"has no added_tokens.json, {b} has one")
    assert_differ(b, a, str(a), f"has no added_tokens.json, {b} has one")


def test_a_damaged_tokenizer_file_differs_from_a_good_one(rm: Writer) -> None:
    a, b = two(rm)
    (b / "tokenizer.json").write_text("{")
    assert_differ(a, b, f"{b}/tokenizer.json", f"differs from {a}'s in its text")


def test_another_chat_template_is_refused_wherever_it_stands(rm: Writer) -> None:
    a, b = two(rm)
    what = f"has another chat template than {a}"
    (a / "chat_template.jinja").write_text("{{ one }}")
    assert_differ(a, b, str(b), what)
    (b / "chat_template.jinja").write_text("{{ other }}")
    assert_differ(a, b, str(b), what)
    (b / "chat_template.jinja").unlink()
    write_json(b / "tokenizer_config.json", {"pad_token": "<pad>", "chat_template": "{{ other }}"})
    assert_differ(a, b, str(b), what)


def test_one_template_in_a_file_and_in_a_field_is_the_same_template(rm: Writer) -> None:
    a, b = two(rm)
    (a / "chat_template.jinja").write_text("{{ one }}")
    write_json(b / "tokenizer_config.json", {"pad_token": "<pad>", "chat_template": "{{ one }}"})
    assert_healthy([a, b])
    write_json(a / "tokenizer_config.json", {"pad_token": "<pad>", "chat_template": "{{ hidden by the file }}"})
    assert_healthy([a, b])


def test_a_chat_template_in_a_folder_of_its_own_is_refused(rm: Writer) -> None:
    """transformers applies it; a template for tools beside a chat_template.jinja it does not."""
    a, b = two(rm)
    templates = b / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ one }}")
    for folder in (a, b):
        (folder / "chat_template.jinja").write_text("{{ one }}")
    assert_healthy([a, b])
    for name, change in (("tool_use", (b / "chat_template.jinja").unlink), ("default", lambda: None)):
        change()
        (templates / f"{name}.jinja").write_text("{{ other }}")
        with pytest.raises(RefusedError) as caught:
            open_checkpoint(b)
        (found,) = caught.value.findings
        assert found.where == f"{templates}/{name}.jinja"
        assert "save the one that is meant as chat_template.jinja beside the weights" in found.what


def test_vocabularies_for_versions_of_transformers_are_refused(rm: Writer) -> None:
    """transformers takes one of them in the place of tokenizer.json."""
    a, b = two(rm)
    for named in ([], ["tokenizer.json"]):
        for folder in (a, b):
            write_json(folder / "tokenizer_config.json", {"pad_token": "<pad>", "fast_tokenizer_files": named})
        assert_healthy([a, b])
    for folder in (a, b):
        write_json(folder / "tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]})
    found = refused([a, b])
    assert [finding.where for finding in found] == [f"{folder}/tokenizer_config.json" for folder in (a, b)]
    assert 'has transformers read ["tokenizer.4.0.0.json"] in the place of tokenizer.json' in found[0].what
    with pytest.raises(RefusedError, match=r"tokenizer\.4\.0\.0\.json"):
        warmerge.average([a, b], a.parent / "out", tokenizer_from=1)


def test_a_tokenizer_file_nested_too_deep_is_refused(rm: Writer) -> None:
    a, b = two(rm)
    (b / "tokenizer_config.json").write_text("[" * 100_000)
    assert any(found.where == f"{b}/tokenizer_config.json" for found in refused([a, b]))


# --- code, reward scales --------------------------------------------------------------------------------------------


def test_other_model_code_is_refused(rm: Writer) -> None:
    change = {"auto_map": {"AutoModel": "modeling.M"}, "model_type": "custom"}
    a, b = rm("a", seed=1, config=change), rm("b", seed=2, config=change)
    for folder in (a, b):
        (folder / "modeling.py").write_text("M = 1")
    assert check([a, b]) == ([], [])
    (b / "modeling.py").write_text("M = 2")
    assert refused([a, b]) == [Finding(str(b), f"brings other model code (*.py) than {a}")]
    (b / "modeling.py").unlink()
    assert refused([a, b]) == [Finding(str(b), f"brings other model code (*.py) than {a}")]


def test_python_files_of_a_model_that_needs_no_code_are_left_alone(rm: Writer) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2)
    (b / "train.py").write_text("x = 1")
    assert_healthy([a, b])


def test_the_code_of_a_tokenizer_is_compared_and_copied(rm: Writer) -> None:
    a, b = two(rm)
    for number, folder in enumerate((a, b)):
        write_json(folder / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Own", None]}})
        (folder / "own.py").write_text(f"OWN = {number}")
    assert_differ(a, b, str(b), f"brings other tokenizer code (*.py) than {a}")
    assert small_files.tokenizer_digest(open_checkpoint(a)) != small_files.tokenizer_digest(open_checkpoint(b))
    warmerge.average([a, b], a.parent / "out", tokenizer_from=2)
    assert (a.parent / "out" / "own.py").read_text() == "OWN = 1"


@pytest.mark.parametrize(("mean", "std"), [(0.5, 2.0), (0.0, 1.5), (None, 2.0)])
def test_another_reward_scale_is_doubted(rm: Writer, mean: float | None, std: float) -> None:
    a, b = rm("a", seed=1, config={"mean": 0.5, "std": 1.5}), rm("b", seed=2, config={"mean": mean, "std": std})
    refusals, warnings = check([a, b])
    assert refusals == []
    (found,) = warnings
    assert found.where == f"{b}/config.json"
    assert found.what.startswith(
        f"has reward mean {'nothing' if mean is None else mean} and std {std}, {a} has 0.5 and 1.5; the output keeps "
    )
    assert found.what.endswith("measure the merged model's own")


def test_a_reward_scale_equal_but_for_its_last_digit_is_not_doubted(rm: Writer) -> None:
    a, b = rm("a", seed=1, config={"mean": 0.5}), rm("b", seed=2, config={"mean": 0.5 + 1e-9})
    assert check([a, b]) == ([], [])


# --- one checkpoint twice -------------------------------------------------------------------------------------------


def test_damaged_files_and_what_the_others_lack_are_refused_together(rm: Writer) -> None:
    cut, headless = rm("cut", seed=1), rm("headless", seed=2, drop=("score.weight",))
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(RefusedError) as caught:
        prepare([cut, headless, rm("whole", seed=3)])
    named = [(finding.where, finding.tensor) for finding in caught.value.findings]
    assert (f"{cut}/model.safetensors", None) in named
    assert (str(headless), None) in named  # no reward head
    assert any(
        finding.where.endswith("whole") and finding.tensor == "score.weight" for finding in caught.value.findings
    )


def test_one_member_is_no_merge(rm: Writer) -> None:
    a = rm("a")
    with pytest.raises(RefusedError) as caught:
        prepare([a])
    assert caught.value.findings == (Finding(str(a), "is the only checkpoint; a merge takes two or more"),)


def test_one_folder_twice_is_refused_unless_it_is_meant(rm: Writer, tmp_path: Path) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2)
    (tmp_path / "link").symlink_to(a)
    for twin in (a, a / ".." / "a", tmp_path / "link", a / "model.safetensors"):
        expected = [Finding(str(twin), f"is the same checkpoint as {a}; --allow-duplicates counts it twice")]
        assert refused([a, b, twin]) == expected
        assert refused([a, b, twin], allow_duplicates=True) == []


def test_a_copy_is_found_by_its_contents_even_in_other_shards(rm: Writer, tmp_path: Path) -> None:
    a, b, resharded = rm("a", seed=1), rm("b", seed=2), rm("again", seed=1, shards=3)
    copied = Path(shutil.copytree(a, tmp_path / "copy"))
    for twin in (copied, resharded):
        assert refused([a, b, twin]) == []
        assert sampled([a, b, twin])[1] == [
            Finding(str(twin), f"has the same weights as {a}; --allow-duplicates counts them twice")
        ]


def test_members_that_differ_in_one_head_value_are_no_copies(rm: Writer) -> None:
    head = llama_tensors(1)["score.weight"].clone()
    head[0, 15] += 1e-3
    a, b = rm("a", seed=1), rm("b", seed=1, add={"score.weight": head})
    assert sampled([a, b]) == ([], [])


@pytest.mark.parametrize("element", [0, 1500, 2999])
def test_a_long_head_is_compared_whole(tmp_path: Path, element: int) -> None:
    head = torch.linspace(-1, 1, 3000).reshape(1, 3000)
    other = head.clone()
    other[0, element] += 1e-3
    folders = [
        write_checkpoint(tmp_path / name, {"score.weight": tensor}, config=None)
        for name, tensor in (("a", head), ("b", other))
    ]
    assert sampled(folders)[1] == []


# --- doubts ---------------------------------------------------------------------------------------------------------


def test_independently_drawn_heads_are_doubted(rm: Writer) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2)
    head = torch.randn(1, 16, generator=torch.Generator().manual_seed(5)) * 0.2
    c = rm("c", seed=3, add={"score.weight": head})
    first = llama_tensors(1)["score.weight"]
    second = llama_tensors(2)["score.weight"]
    cosines = [float(torch.nn.functional.cosine_similarity(head, other)) for other in (first, second)]
    assert max(cosines) < 0.5, "the drawn head is not far enough from the shared one for this test"
    (found,) = sampled([a, b, c])[0]
    other = (a, b)[cosines.index(min(cosines))]
    assert (found.where, found.tensor) == (str(c), "score.weight")
    assert found.what.startswith(f"has cosine {min(cosines):.2f} with {other}'s: these heads look independently drawn")
    assert "one probed head (WARM, section 3.2)" in found.what


def test_a_head_of_one_start_is_not_doubted_whatever_its_scale(rm: Writer) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2, add={"score.weight": 3 * llama_tensors(2)["score.weight"]})
    assert [finding for finding in sampled([a, b])[0] if finding.tensor is not None] == []


def test_unrelated_pretraining_is_doubted(rm: Writer) -> None:
    other = {
        name: torch.randn(t.shape, generator=torch.Generator().manual_seed(77 + i)) * 0.2
        for i, (name, t) in enumerate(llama_tensors(0).items())
        if name != "score.weight"
    }
    a, b, c = rm("a", seed=1), rm("b", seed=2), rm("c", seed=3, add=other)
    (found,) = sampled([a, b, c])[0]
    assert (found.where, found.tensor) == (str(c), None)
    assert found.what.startswith(f"differs from {a} by ")
    assert "do they come from one pre-trained model? The average of unrelated models is not a model" in found.what


def test_an_outlier_is_doubted(rm: Writer) -> None:
    near = [rm(f"m{i}", seed=i, spread=0.005) for i in range(4)]
    far = rm("far", seed=9, spread=0.05)
    (found,) = sampled([*near, far])[0]
    assert (found.where, found.tensor) == (str(far), None)
    assert found.what.endswith(" times as far from the mean of the others as is usual among them")
    times = float(found.what.removeprefix("is ").split(" ")[0])
    assert 3 < times < 11


def test_members_twice_as_far_as_others_are_not_doubted(rm: Writer) -> None:
    folders = [rm(f"m{i}", seed=i, spread=0.02 if i == 2 else 0.01) for i in range(4)]
    assert sampled(folders)[0] == []


# --- everything at once ---------------------------------------------------------------------------------------------


def test_five_faults_in_three_members_are_found_in_one_call(rm: Writer) -> None:
    a, b = rm("a", seed=1), rm("b", seed=2, drop=("score.weight",), config={"pad_token_id": 5})
    c = rm(
        "c",
        seed=3,
        add={"model.norm.weight": torch.ones(17), "extra.weight": torch.zeros(1)},
        config={"quantization_config": {"quant_method": "gptq"}},
    )
    (c / "chat_template.jinja").write_text("{{ x }}")
    found = refused([a, b, c, a])
    expected = [
        (str(b), "score.weight", "is missing"),
        (str(b), None, "has no reward head"),
        (f"{b}/config.json", None, f"has pad_token_id 5, expected 0 as in {a}"),
        (str(c), "model.norm.weight", "has shape [17], expected [16]"),
        (str(c), "extra.weight", "is extra"),
        (str(c), None, "is quantised (quantization_config, method 'gptq')"),
        (str(c), None, "has another chat template"),
        (str(a), None, "is the same checkpoint as"),
    ]
    for where, tensor, words in expected:
        assert [f for f in found if (f.where, f.tensor) == (where, tensor) and words in f.what], (where, words)
    message = str(RefusedError(found))
    assert message.startswith(f"refused, {len(found)} findings:\n")
    assert all(words in message for _, _, words in expected)


def test_a_head_is_shown_in_a_few_words(rm: Writer) -> None:
    def shown(folder: Path) -> str:
        checkpoint: Checkpoint = open_checkpoint(folder)
        return compat.head_shape(checkpoint)

    assert shown(rm("a")) == "score.weight [1, 16]"
    assert shown(rm("b", drop=("score.weight",))) == "none"
    bias = {"v_head.summary.bias": torch.zeros(1), "v_head.summary.weight": torch.zeros(1, 16)}
    assert shown(rm("c", drop=("score.weight",), add=bias)) == "v_head.summary.weight [1, 16]"
