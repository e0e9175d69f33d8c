"""base + LoRA, read tile by tile, against PEFT's own merge_and_unload."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
import transformers
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file

import warmerge
from warmerge.errors import RefusedError
from warmerge.weights.adapter import _read_weights, base_named_by, read_adapter
from warmerge.weights.average import plan_fingerprint
from warmerge.weights.checkpoint import Checkpoint, LowRank, Tensor, read_checkpoint
from warmerge.weights.folder import open_folder
from warmerge.weights.kernels import Workspace
from warmerge.weights.plan import plan_merge
from warmerge.weights.remote import ranges
from warmerge.weights.rules import RULES, Options

peft = pytest.importorskip("peft")

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 32,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, attention_bias=True),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, num_key_value_heads=2, pad_token_id=0),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=32, pad_token_id=0
    ),
    "bert": lambda: transformers.BertConfig(**SIZES),
    "deberta-v2": lambda: transformers.DebertaV2Config(**SIZES),
    "modernbert": lambda: transformers.ModernBertConfig(**SIZES, pad_token_id=0),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32
    ),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=64, dim=32, n_layers=1, n_heads=4, hidden_dim=48, max_position_embeddings=32
    ),
}
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "up_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "value", "intermediate.dense"],
    "deberta-v2": ["query_proj"],
    "distilbert": ["q_lin"],
    "modernbert": ["Wqkv"],
    "opt": ["q_proj", "fc1"],
}
CLASSIFIER = "ForSequenceClassification"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """For the time in which PEFT and transformers run: their warnings about each other are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@quietly()
def make_base(folder: Path, model_type: str, task: str = CLASSIFIER, labels: int = 1) -> None:
    """A tiny random model of that type: a classifier, a language model, or the backbone alone."""
    torch.manual_seed(0)
    config = CONFIGS[model_type]()
    config.num_labels = labels
    classes = {
        CLASSIFIER: transformers.AutoModelForSequenceClassification,
        "ForCausalLM": transformers.AutoModelForCausalLM,
        "ForMaskedLM": transformers.AutoModelForMaskedLM,
        "Model": transformers.AutoModel,
    }
    classes[task].from_config(config).save_pretrained(folder)


@quietly()
def make_adapter(base: Path, folder: Path, targets: list[str], **options: Any) -> dict[str, torch.Tensor]:
    """Trains (at random) a LoRA adapter of `base` as a reward model and saves it; gives what PEFT merges it into."""
    torch.manual_seed(1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    settings = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 12, "target_modules": targets} | options
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) / 4)
    model.save_pretrained(folder)
    return dict(model.merge_and_unload().state_dict())


def read(adapter: Path, base: Path) -> Checkpoint:
    return read_adapter(open_folder(adapter, "runs/1"), read_checkpoint(open_folder(base, "the-base")))


def values(tensor: Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
    with contextlib.closing(Workspace(torch.device("cpu"))) as work:
        return work.read(tensor, start, tensor.numel if stop is None else stop).clone()


def assert_equals_merged(checkpoint: Checkpoint, merged: Mapping[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors) == set(merged)
    for name, expected in merged.items():
        found = checkpoint.tensors[name]
        assert found.shape == tuple(expected.shape), name
        difference = (values(found).double() - expected.flatten().double()).abs().max()
        assert difference <= 1e-6 * max(1.0, float(expected.abs().max())), name


def rewrite_settings(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def refusal(adapter: Path, base: Path) -> str:
    with pytest.raises(RefusedError) as error:
        read(adapter, base)
    return str(error.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "base"
    make_base(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def saved_adapter(llama: Path) -> Path:
    make_adapter(llama, llama.parent / "adapter", TARGETS["llama"])
    return llama.parent / "adapter"


@pytest.fixture
def adapter(saved_adapter: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(saved_adapter, tmp_path / "adapter")


EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte"}
VARIANTS = [
    *[(model, {}) for model in ("llama", "qwen2", "gpt2", "bert", "deberta-v2", "distilbert")],
    ("llama", {"use_rslora": True}),
    ("llama", {"rank_pattern": {"q_proj": 6, r"layers\.1\..*down_proj": 2}, "alpha_pattern": {"^model.layers.0.*": 5}}),
    ("llama", {"rank_pattern": {"0.self_attn.v_proj": 3}, "alpha_pattern": {"v_proj": 1}, "use_rslora": True}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"embed_tokens": 7}}),
    ("gpt2", {"target_modules": ["wte", "c_attn", "wpe"]}),
    ("gpt2", {"target_modules": ["attn.c_proj"]}),
    ("llama", {"bias": "all"}),
    ("gpt2", {"bias": "lora_only"}),
    ("bert", {"bias": "all", "modules_to_save": ["pooler"]}),
    ("qwen2", {"modules_to_save": ["embed_tokens", "norm"]}),
    ("llama", {"init_lora_weights": "gaussian"}),
    ("llama", {"init_lora_weights": "orthogonal"}),
]


@pytest.mark.parametrize(("model_type", "options"), VARIANTS, ids=str)
def test_reads_what_peft_merges(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    make_base(tmp_path / "base", model_type)
    merged = make_adapter(tmp_path / "base", tmp_path / "adapter", TARGETS[model_type], **options)
    checkpoint = read(tmp_path / "adapter", tmp_path / "base")
    assert_equals_merged(checkpoint, merged)
    assert any(isinstance(tensor, LowRank) for tensor in checkpoint.tensors.values())
    assert checkpoint.label == "runs/1"
    assert checkpoint.config == json.loads((tmp_path / "base/config.json").read_text())
    json.dumps(checkpoint.details)


VOCABULARY_HEAD = [
    f"vocab_{part}"
    for part in ("layer_norm.bias", "layer_norm.weight", "projector.bias", "transform.bias", "transform.weight")
]
LANGUAGE_MODELS = [
    ("llama", "ForCausalLM", "", ["lm_head.weight"]),
    ("llama", "Model", "model.", []),
    ("qwen2", "ForCausalLM", "", ["lm_head.weight"]),
    ("gpt2", "ForCausalLM", "", []),
    ("gpt2", "Model", "transformer.", []),
    ("bert", "Model", "bert.", []),
    ("opt", "ForCausalLM", "", []),
    ("opt", "Model", "model.", []),
    ("modernbert", "ForMaskedLM", "", ["decoder.bias"]),
    ("distilbert", "ForMaskedLM", "", VOCABULARY_HEAD),
]


@pytest.mark.parametrize(("model_type", "task", "prefix", "dropped"), LANGUAGE_MODELS)
def test_language_model_base(model_type: str, task: str, prefix: str, dropped: list[str], tmp_path: Path) -> None:
    make_base(tmp_path / "base", model_type, task)
    merged = make_adapter(tmp_path / "base", tmp_path / "adapter", TARGETS[model_type])
    checkpoint = read(tmp_path / "adapter", tmp_path / "base")
    assert_equals_merged(checkpoint, merged)
    config = checkpoint.config
    assert config is not None
    with quietly():
        named = type(transformers.AutoModelForSequenceClassification.from_config(CONFIGS[model_type]())).__name__
    assert config["architectures"] == [named]
    assert (config["id2label"], config["label2id"]) == ({"0": "LABEL_0"}, {"LABEL_0": 0})
    assert (checkpoint.details["prefix"], sorted(checkpoint.details["dropped"])) == (prefix, dropped)


def test_masked_language_model_with_everything_saved(tmp_path: Path) -> None:
    make_base(tmp_path / "base", "bert", "ForMaskedLM")
    merged = make_adapter(tmp_path / "base", tmp_path / "adapter", TARGETS["bert"], modules_to_save=["pooler"])
    checkpoint = read(tmp_path / "adapter", tmp_path / "base")
    assert_equals_merged(checkpoint, merged)
    assert "cls.predictions.bias" in checkpoint.details["dropped"]


@quietly()
def test_the_result_loads_as_a_reward_model(tmp_path: Path) -> None:
    make_base(tmp_path / "base", "llama", "ForCausalLM")
    make_adapter(tmp_path / "base", tmp_path / "adapter", TARGETS["llama"])
    checkpoint = read(tmp_path / "adapter", tmp_path / "base")
    full = {name: values(t).float().reshape(t.shape) for name, t in checkpoint.tensors.items()}
    (tmp_path / "full").mkdir()
    save_file(full, tmp_path / "full/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "full/config.json").write_text(json.dumps(checkpoint.config))
    auto = transformers.AutoModelForSequenceClassification
    model, loading = auto.from_pretrained(tmp_path / "full", output_loading_info=True)
    assert not any(loading.values())
    tuned = peft.PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base", num_labels=1), tmp_path / "adapter")
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(model.eval()(tokens).logits, tuned.eval()(tokens).logits, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_tiles_may_start_in_the_middle_of_a_row(model_type: str, tmp_path: Path) -> None:
    make_base(tmp_path / "base", model_type)
    targets = [*TARGETS[model_type], EMBEDDING[model_type]]
    make_adapter(tmp_path / "base", tmp_path / "adapter", targets)
    for name, tensor in read(tmp_path / "adapter", tmp_path / "base").tensors.items():
        whole = values(tensor)
        bounds = [*range(0, tensor.numel, 37), tensor.numel]
        tiles = [values(tensor, start, stop) for start, stop in itertools.pairwise(bounds)]
        assert torch.allclose(torch.cat(tiles).double(), whole.double(), rtol=0, atol=1e-12), name


def test_bfloat16_base_with_float32_factors(tmp_path: Path) -> None:
    make_base(tmp_path / "base", "llama")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    make_adapter(tmp_path / "base", tmp_path / "adapter", TARGETS["llama"])
    tensor = read(tmp_path / "adapter", tmp_path / "bf16").tensors["model.layers.0.self_attn.q_proj.weight"]
    factors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    a, b = (factors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight"].double() for half in "AB")
    weight = model.state_dict()["model.layers.0.self_attn.q_proj.weight"].double()
    assert tensor.dtype == "BF16"
    assert torch.allclose(values(tensor), (weight + 3 * b @ a).flatten(), rtol=0, atol=1e-12)


def test_another_scale_is_another_plan(adapter: Path, llama: Path, tmp_path: Path) -> None:
    """The scale stands in the config alone; what an earlier run kept of the other one must not be taken up."""
    other = shutil.copytree(adapter, tmp_path / "other")
    found = []
    for alpha in (12, 24, 12):
        rewrite_settings(other, lora_alpha=alpha)
        plan = plan_merge([read(adapter, llama), read(other, llama)], RULES["uniform"], Options())
        found.append(plan_fingerprint(plan, ["a", "b"]))
    assert found[0] == found[2] != found[1]


def test_older_names_of_saved_modules(adapter: Path, llama: Path) -> None:
    expected = values(read(adapter, llama).tensors["score.weight"])

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        head = tensors.pop("base_model.model.score.weight")
        tensors["base_model.model.score.modules_to_save.default.weight"] = head
        tensors["base_model.model.score.modules_to_save.weight"] = head.clone()
        tensors["base_model.model.score.original_module.weight"] = torch.zeros_like(head)

    rewrite_weights(adapter, rename)
    assert torch.equal(values(read(adapter, llama).tensors["score.weight"]), expected)


def test_base_named_by(adapter: Path, llama: Path, tmp_path: Path) -> None:
    assert base_named_by(open_folder(adapter, "a")) == str(llama)
    rewrite_settings(adapter, revision="v1")
    assert base_named_by(open_folder(adapter, "a")) == str(llama)
    rewrite_settings(adapter, base_model_name_or_path="org/model")
    assert base_named_by(open_folder(adapter, "a")) == "org/model@v1"
    rewrite_settings(adapter, base_model_name_or_path="", revision=None)
    assert base_named_by(open_folder(adapter, "a")) is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(RefusedError, match=r"no adapter_config\.json"):
        base_named_by(open_folder(tmp_path / "empty", "a"))


TOKENIZERS: list[tuple[dict[str, Any], int | None]] = [
    ({"tokenizer_config.json": {"pad_token": "<p>", "added_tokens_decoder": {"7": {"content": "<p>"}}}}, 7),
    (
        {
            "tokenizer_config.json": {"pad_token": {"content": "<p>"}},
            "tokenizer.json": {"model": {"vocab": {"<p>": 3}}},
        },
        3,
    ),
    (
        {
            "tokenizer_config.json": {},
            "special_tokens_map.json": {"pad_token": "<p>"},
            "tokenizer.json": {"added_tokens": [{"id": 9, "content": "<p>"}]},
        },
        9,
    ),
    (
        {
            "tokenizer_config.json": {"pad_token": "b"},
            "tokenizer.json": {"model": {"vocab": [["a", 0.0], ["b", -1.0]]}},
        },
        1,
    ),
    ({"tokenizer_config.json": {"pad_token": "<p>"}}, None),
    ({"tokenizer_config.json": {"pad_token": None}, "tokenizer.json": {"model": {"vocab": {"<p>": 3}}}}, None),
    ({}, None),
]


@pytest.mark.parametrize(("files", "expected"), TOKENIZERS)
def test_padding_id_from_the_tokenizer(
    files: dict[str, Any], expected: int | None, adapter: Path, tmp_path: Path, language_model: Path
) -> None:
    for name, content in files.items():
        (adapter / name).write_text(json.dumps(content))
    config = json.loads((language_model / "config.json").read_text())
    base = tmp_path / "padless"
    base.mkdir()
    (base / "model.safetensors").write_bytes((language_model / "model.safetensors").read_bytes())
    (base / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "pad_token_id"}))
    found = read(adapter, base)
    assert found.config is not None
    assert found.config.get("pad_token_id") == expected == found.details["pad_token_id"]
    kept = read(adapter, language_model)
    assert kept.config is not None
    assert kept.config["pad_token_id"] == 0


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "lm"
    make_base(folder, "llama", "ForCausalLM")
    return folder


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, r"peft_type 'LOHA'"),
    *[
        ({field: value}, f"sets '{field}'")
        for field, value in {
            "use_dora": True, "lora_bias": True, "use_qalora": True, "use_bdlora": {"nblocks": 2},
            "alora_invocation_tokens": [1], "arrow_config": {"top_k": 1}, "kasa_config": {"beta": 1},
            "velora_config": {"a": 1}, "monteclora_config": {"a": 1}, "layer_replication": [[0, 1]],
            "target_parameters": ["experts.gate_up_proj"], "trainable_token_indices": [1], "megatron_config": {"a": 1},
            "loftq_config": {"loftq_bits": 4}, "corda_config": {"a": 1}, "lora_ga_config": {"a": 1},
            "a_field_of_next_year": "on",
        }.items()
    ],
    *[
        ({"init_lora_weights": init}, f"init_lora_weights '{init}'")
        for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "OLoRA")
    ],
    ({"r": None}, "these must be numbers"),
    ({"r": True}, "these must be numbers"),
    ({"lora_alpha": "16"}, "these must be numbers"),
    ({"rank_pattern": {"q_proj": 0}}, "these must be numbers"),
    ({"rank_pattern": ["q_proj"]}, "damaged rank_pattern"),
    ({"alpha_pattern": {"(": 1}}, "damaged alpha_pattern"),
    ({"r": 8}, r"has LoRA factors of rank 4 and 4, but adapter_config\.json gives it rank 8"),
    ({"rank_pattern": {"layers.1.self_attn.q_proj": 2}}, r"'model\.layers\.1\.self_attn\.q_proj\.weight' .* rank 2"),
    ({"modules_to_save": ["score", "model.norm"]}, r"trained 'model\.norm' .* lacks 'model\.norm\.weight'"),
    ({"fan_in_fan_out": True}, r"fan_in_fan_out True, which other weights' shapes contradict"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), SETTINGS, ids=str)
def test_settings_that_are_no_plain_sum_are_refused(
    changes: dict[str, Any], message: str, adapter: Path, llama: Path
) -> None:
    rewrite_settings(adapter, **changes)
    with pytest.raises(RefusedError, match=message):
        read(adapter, llama)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def test_large_copies_of_a_tensor_are_compared_in_blocks(tmp_path: Path) -> None:
    """A file of a hundred gigabytes without data takes no place on a disk."""
    table = {
        f"base_model.model.a.q.lora_{name}.weight": ("F32", shape) for name, shape in (("A", (2, 4)), ("B", (4, 2)))
    }
    places = [f"base_model.model.score.{place}weight" for place in ("", "modules_to_save.default.")]
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(fuzz.seeds()["adapter"]))
    for widths, refused in (((4_000_000, 4_000_000), False), ((4_000_000, 4_000_001), True)):
        copies = {place: ("F32", (1, width)) for place, width in zip(places, widths, strict=True)}
        (folder / "adapter_model.safetensors").write_bytes(fuzz.file_of(table | copies))
        tracemalloc.start()
        try:
            findings = _read_weights(open_folder(folder, "a"))[2]
            assert tracemalloc.get_traced_memory()[1] < 8_000_000
        finally:
            tracemalloc.stop()
        assert ["has other values than another copy" in found.what for found in findings] == [True] * refused


HEAD = "base_model.model.score.weight"
WEIGHTS: list[tuple[Callable[[dict[str, torch.Tensor]], object], str]] = [
    (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(32)}), "lora_magnitude_vector' is not understood"),
    (lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(32)}), r"lora_B\.bias' is not understood"),
    (lambda t: t.update({f"{Q}.lora_A.default.weight": torch.ones(4, 32)}), r"lora_A\.default\.weight' is not under"),
    (lambda t: t.update({"model.norm.weight": torch.ones(32)}), r"'model\.norm\.weight' is not understood"),
    (lambda t: t.pop(f"{Q}.lora_A.weight"), "q_proj' has 'lora_B', expected both"),
    (lambda t: t.pop(f"{Q}.lora_B.weight"), "q_proj' has 'lora_A', expected both"),
    (lambda t: t.update({f"{Q}.lora_embedding_A": torch.ones(4, 32)}), "expected both factors"),
    (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 32, 1, 1)}), r"\[4, 32, 1, 1\]; expected a .* matrix"),
    (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(0)}), r"F32 \[0\]; expected"),
    (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}), r"I8 \[4, 32\]; expected"),
    (lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(30, 4)}), r"is \[32, 32\] .* LoRA is for \[30, 32\]"),
    (
        lambda t: t.update({f"{Q}x.lora_A.weight": torch.ones(4, 32), f"{Q}x.lora_B.weight": torch.ones(9, 4)}),
        r"self_attn\.q_projx\.weight' is adapted, but the base has no such tensor",
    ),
    (lambda t: t.update({"base_model.model.extra.weight": torch.ones(3)}), "'extra.weight' is in the adapter, but"),
    (
        lambda t: t.update({"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(65, 32)}),
        r"shape \[65, 32\] in the adapter, \[64, 32\] in the base",
    ),
    (lambda t: t.update({HEAD: torch.ones(2, 32)}), "has 2 rows, but the base's config.json says 1 labels"),
    (lambda t: t.update({HEAD: torch.ones(1, 31)}), r"'score\.weight' has shape \[1, 31\]"),
    (lambda t: t.pop(HEAD), r"trained 'score' \(modules_to_save\), but its file lacks 'score\.weight'"),
    (
        lambda t: t.update({"base_model.model.score.modules_to_save.weight": torch.ones(1, 32)}),
        "has other values than another copy",
    ),
    (lambda t: [t.pop(name) for name in list(t) if "lora_" in name], "holds no lora_A and lora_B"),
]


@pytest.mark.parametrize(("change", "message"), WEIGHTS)
def test_tensors_that_do_not_fit_are_refused(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, adapter: Path, llama: Path
) -> None:
    rewrite_weights(adapter, change)
    with pytest.raises(RefusedError, match=message):
        read(adapter, llama)


def test_every_finding_at_once(adapter: Path, llama: Path) -> None:
    rewrite_settings(adapter, use_dora=True, init_lora_weights="pissa")
    rewrite_weights(adapter, lambda t: t.pop(f"{Q}.lora_A.weight"))
    text = refusal(adapter, llama)
    assert all(part in text for part in ("3 findings", "use_dora", "pissa", "expected both"))


def test_missing_files(adapter: Path, llama: Path) -> None:
    (adapter / "adapter_config.json").unlink()
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    text = refusal(adapter, llama)
    assert "no adapter_config.json" in text
    assert "only adapter_model.bin, a pickle" in text
    assert "save_pretrained" in text
    (adapter / "adapter_model.bin").unlink()
    assert "holds no adapter_model.safetensors" in refusal(adapter, llama)
    (adapter / "adapter_config.json").write_text("[]")
    assert "not a JSON object" in refusal(adapter, llama)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("LlavaForConditionalGeneration", "'LlavaForConditionalGeneration' has no place for"),
        ("GPT2DoubleHeadsModel", "'GPT2DoubleHeadsModel' has no place for"),
        ("XLMWithLMHeadModel", "has no place for"),
        (None, "'unknown' has no place for"),
    ],
)
def test_architectures_without_a_classifier_are_refused(
    architecture: str | None, message: str, adapter: Path, language_model: Path, tmp_path: Path
) -> None:
    base = changed_base(language_model, tmp_path / "base", architectures=architecture and [architecture])
    with pytest.raises(RefusedError, match=message):
        read(adapter, base)


def changed_base(base: Path, folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    (folder / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | changes))
    return folder


def test_text_models_of_multimodal_families(adapter: Path, language_model: Path, tmp_path: Path) -> None:
    base = changed_base(
        language_model, tmp_path / "base", architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", num_labels=2
    )
    config = read(adapter, base).config
    assert config is not None
    assert config["architectures"] == ["Gemma3TextForSequenceClassification"]
    assert "num_labels" not in config


def test_head_of_several_rows_sets_the_labels(adapter: Path, language_model: Path) -> None:
    rewrite_weights(adapter, lambda t: t.update({HEAD: torch.ones(3, 32)}))
    config = read(adapter, language_model).config
    assert config is not None
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}


def test_head_of_an_unknown_name_on_a_language_model(adapter: Path, language_model: Path) -> None:
    rewrite_weights(adapter, lambda t: t.update({"base_model.model.v_head.summary.weight": t.pop(HEAD)}))
    assert "has the head 'v_head.summary.weight'; expected" in refusal(adapter, language_model)


def test_untrained_layers_between_backbone_and_head_are_refused(tmp_path: Path) -> None:
    for model_type, lacking in (("bert", "pooler"), ("deberta-v2", "pooler")):
        base, folder = tmp_path / f"{model_type}-base", tmp_path / model_type
        make_base(base, model_type, "ForMaskedLM")
        make_adapter(base, folder, TARGETS[model_type])
        assert f"lacks '{lacking}', which the classifier needs" in refusal(folder, base)


def test_base_without_config_unknown_tensors_and_quantised_weights(
    adapter: Path, language_model: Path, tmp_path: Path
) -> None:
    base = changed_base(language_model, tmp_path / "base")
    (base / "config.json").unlink()
    assert "has no config.json" in refusal(adapter, base)
    tensors = load_file(language_model / "model.safetensors")
    tensors["vision_tower.weight"] = torch.ones(2)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.ones(512, 1, dtype=torch.uint8)
    base = changed_base(language_model, tmp_path / "strange")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    text = refusal(adapter, base)
    assert "outside the adapted backbone that are no known language-model head: 'vision_tower.weight'" in text
    assert "'model.layers.0.self_attn.q_proj.weight' is U8 in the base" in text


def test_adapter_without_a_head_stays_a_language_model(adapter: Path, language_model: Path) -> None:
    rewrite_weights(adapter, lambda t: t.pop(HEAD))
    checkpoint = read(adapter, language_model)
    assert checkpoint.config is not None
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert "lm_head.weight" in checkpoint.tensors


def test_adapter_on_an_adapter_is_refused(adapter: Path, llama: Path) -> None:
    once = read(adapter, llama)
    with pytest.raises(RefusedError, match="is adapted in the base too"):
        read_adapter(open_folder(adapter, "runs/2"), once)


def test_square_weights_need_fan_in_fan_out_to_agree(tmp_path: Path) -> None:
    make_base(tmp_path / "base", "gpt2")
    make_adapter(tmp_path / "base", tmp_path / "adapter", TARGETS["gpt2"])
    rewrite_settings(tmp_path / "adapter", fan_in_fan_out=False)
    assert "unknown whether the square ones are transposed" in refusal(tmp_path / "adapter", tmp_path / "base")


def test_adapters_on_the_hub_are_streamed_with_their_base_read_once(
    adapter: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    rewrite_weights(other, lambda tensors: tensors.update({name: value * 2 for name, value in tensors.items()}))
    local = warmerge.average([adapter, other], tmp_path / "local", base=llama, threads=2)
    monkeypatch.setattr(ranges, "WINDOW", 4096)  # these files are smaller than what one request shows of a header
    with LoopbackHub({"me/one": adapter, "me/two": other, "me/base": llama}) as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        choices = {"base": "me/base", "threads": 2, "stream": True, "on_plan": lambda prepared: hub.requests.clear()}
        streamed = warmerge.average(["me/one", "me/two"], tmp_path / "streamed", **choices)
        read = [request.range or "" for request in hub.asked(path="base/resolve/")]
    expected, found = (load_file(merged.out / "model.safetensors") for merged in (local, streamed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    spans = [tuple(map(int, asked.removeprefix("bytes=").split("-"))) for asked in read if asked]
    size = (llama / "model.safetensors").stat().st_size
    assert size / 2 < sum(last - first + 1 for first, last in spans) <= size, "once for both adapters"
    assert [entry.get("repo") for entry in streamed.manifest["inputs"]] == ["me/one", "me/two"]
