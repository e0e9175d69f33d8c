"""Loading: every weight of every layout arrives, or the checkpoint is refused and the message says which did not."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    DECODERS,
    EOS,
    PAD,
    TEMPLATE,
    alone,
    edit_config,
    folder,
    heard,
    make_model,
    own_folder,
    save,
    texts,
    tokenizer,
)

import warmerge
from warmerge.errors import RefusedError, UsageError
from warmerge.pipeline.prepare import prepare
from warmerge.rewards import model as model_module
from warmerge.rewards.model import LoadOptions, RewardModel, fill, load_reward_model
from warmerge.rewards.render import encode
from warmerge.rewards.scoring import Tokens, method_of, score
from warmerge.weights.plan import plan_merge
from warmerge.weights.rules import RULES, Options

FLOAT32 = LoadOptions(device="cpu", dtype="float32")
HALF = LoadOptions(device="cpu", dtype="bfloat16")


def rewards(model: RewardModel) -> Any:
    return score(model, Tokens(model.renderer, texts()))


def ids_of(model: RewardModel) -> list[Any]:
    return [entry.ids for entry in encode(model.renderer, texts())]


def refusal(place: Path | str, **options: Any) -> str:
    with pytest.raises(RefusedError) as refused:
        load_reward_model(place, LoadOptions(device="cpu", **options))
    return str(refused.value)


def edit_weights(place: Path, **changes: torch.Tensor | None) -> None:
    """Sets tensors of model.safetensors (dots of names as two underscores); None removes one."""
    tensors = load_file(place / "model.safetensors") | {k.replace("__", "."): v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, place / "model.safetensors", {"format": "pt"})


def hidden(place: Path, ids: list[Any], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The backbone's hidden state of the last token of each text (N, H)."""
    from transformers import AutoModelForSequenceClassification

    module = AutoModelForSequenceClassification.from_pretrained(place, dtype=dtype).eval()
    with torch.inference_mode():
        rows = [module.base_model(torch.from_numpy(row)[None]).last_hidden_state[0, -1] for row in ids]
    return torch.stack(rows)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "bert", "roberta", "modernbert"])
def test_a_missing_head_is_refused(tmp_path: Path, kind: str) -> None:
    place = own_folder(tmp_path / "rm", kind)
    heads = [n for n in load_file(place / "model.safetensors") if n.startswith(("score", "classifier"))]
    edit_weights(place, **{name.replace(".", "__"): None for name in heads})
    message = refusal(place)
    assert message.startswith(f"refused: {place}: {len(heads)} tensor")
    assert "missing, so transformers would draw them at random: " in message
    assert all(repr(name) in message for name in heads)


def test_every_missing_tensor_is_refused(tmp_path: Path) -> None:
    place = own_folder(tmp_path / "rm")
    whole = load_file(place / "model.safetensors")
    for name in whole:
        save_file({k: v for k, v in whole.items() if k != name}, place / "model.safetensors", {"format": "pt"})
        assert f"1 tensor is missing, so transformers would draw them at random: {name!r}" in refusal(place)


def test_unexpected_misshapen_and_missing_tensors_are_named_together(tmp_path: Path) -> None:
    place = own_folder(tmp_path / "rm")
    edit_weights(place, model__layers__7__mlp__up_proj__weight=torch.ones(2), score__weight=None)
    edit_weights(place, model__norm__weight=torch.ones(33))
    message = refusal(place)
    assert message.splitlines() == [
        "refused, 3 findings:",
        f"  - {place}: 1 tensor is missing, so transformers would draw them at random: 'score.weight'",
        f"  - {place}: 1 tensor is not part of this architecture and would be dropped: "
        "'model.layers.7.mlp.up_proj.weight'",
        f"  - {place}: 1 tensor is of another shape than the config says: 'model.norm.weight'",
    ]


def test_a_head_of_two_rows_is_refused(tmp_path: Path) -> None:
    place = own_folder(tmp_path / "rm")
    edit_weights(place, score__weight=torch.ones(2, 32))
    assert "of another shape than the config says: 'score.weight'" in refusal(place)


@pytest.mark.parametrize("said", [{"id2label": {"0": "A", "1": "B"}, "label2id": {"A": 0, "B": 1}}, {"num_labels": 2}])
def test_two_labels_are_refused(tmp_path: Path, said: dict[str, Any]) -> None:
    place = own_folder(tmp_path / "rm")
    edit_config(place, **({"id2label": None, "label2id": None} | said))
    assert f"{place}/config.json: has 2 labels; a reward model has one (num_labels: 1)" in refusal(place)


def test_labels_that_are_not_said_are_the_heads_rows(tmp_path: Path) -> None:
    place = own_folder(tmp_path / "rm")
    expected = rewards(load_reward_model(place, FLOAT32))
    edit_config(place, id2label=None, label2id=None)
    numpy.testing.assert_allclose(rewards(load_reward_model(place, FLOAT32)), expected, atol=1e-5)
    edit_weights(place, score__weight=torch.ones(2, 32))
    assert "has 2 labels" in refusal(place)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"auto_map": {"AutoConfig": "evil.C"}}, "brings its own model code (auto_map); --trust-remote-code runs it"),
        ({"quantization_config": {"bits": 4}}, "is quantised (quantization_config); score the unquantised checkpoint"),
        ({"compression_config": {"x": 1}}, "is quantised (compression_config)"),
        ({"model_type": "no_such"}, "is not a config that transformers knows (model_type 'no_such'): "),
        ({"model_type": None}, "is not a config that transformers knows (model_type None): "),
        ({"hidden_size": "many"}, "is not a config that transformers knows (model_type 'llama'): "),
        ({"num_attention_heads": 0}, "is not a config that transformers knows (model_type 'llama'): "),
        ({"hidden_size": 30}, ""),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    place = own_folder(tmp_path / "rm")
    edit_config(place, **config)
    found = refusal(place)
    assert f"{place}" in found
    assert message in found


def test_an_architecture_without_a_classifier_is_refused(tmp_path: Path) -> None:
    place = own_folder(tmp_path / "rm")
    edit_config(place, model_type="mamba")
    assert "cannot be loaded as a reward model" in refusal(place)
    (place / "model.safetensors").rename(place / "part.safetensors")
    assert "is a mamba model, for which transformers has no sequence classifier" in refusal(place)


def test_no_config_is_refused(tmp_path: Path) -> None:
    place = own_folder(tmp_path / "rm")
    (place / "config.json").unlink()
    assert f"{place}: has no config.json, so its architecture is not known; add it" in refusal(place)


def test_no_tokenizer_is_refused(tmp_path: Path) -> None:
    place = own_folder(tmp_path / "rm")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / name).unlink()
    assert f"{place}: has no tokenizer files; copy those of the model it was trained from" in refusal(place)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    place = own_folder(tmp_path / "rm")
    (place / "tokenizer.json").write_text('{"model": ')
    assert f"{place}: has a tokenizer that cannot be loaded: " in refusal(place)


def edit_tokenizer_config(place: Path, **changes: Any) -> None:
    path = place / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_tokenizer_that_names_another_vocabulary_is_refused(tmp_path: Path) -> None:
    place = own_folder(tmp_path / "rm")
    edit_tokenizer_config(place, fast_tokenizer_files=["tokenizer.4.0.0.json"])
    message = refusal(place)
    assert f"{place}/tokenizer_config.json: has transformers read " in message
    assert "(fast_tokenizer_files)" in message


@pytest.mark.parametrize("length", ["512", [512]], ids=str)
def test_a_length_that_is_no_number_is_refused(length: Any, tmp_path: Path) -> None:
    place = own_folder(tmp_path / "rm")
    edit_tokenizer_config(place, model_max_length=length)
    assert f"{place}/tokenizer_config.json: has model_max_length '{length}', expected a number" in refusal(place)


@pytest.mark.parametrize(
    ("fields", "why"),
    [({"hidden_act": "none"}, "KeyError: 'none'"), ({"pad_token_id": 10**6}, "Padding_idx"),
     ({"rope_parameters": {"rope_type": "none"}}, "none")],
    ids=["activation", "padding", "positions"],
)  # fmt: skip
def test_a_config_of_no_model_is_refused(fields: dict[str, Any], why: str, tmp_path: Path) -> None:
    place = own_folder(tmp_path / "rm")
    edit_config(place, **fields)
    message = refusal(place)
    assert str(place) in message
    assert why in message


@pytest.mark.parametrize("field", ["_attn_implementation", "attn_implementation"])
def test_a_config_does_not_have_code_fetched(field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `kernels` installed, transformers loads compiled code from the Hub that such a field names."""
    from transformers.integrations import hub_kernels

    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda name, **_: pytest.fail(f"{name} is fetched"))
    place = own_folder(tmp_path / "rm")
    edit_config(place, **{field: "kernels-community/any"})
    assert load_reward_model(place, FLOAT32).module.config._attn_implementation == "sdpa"


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    place = own_folder(tmp_path / "rm")
    made = tokenizer()
    made.add_tokens([f"<new{i}>" for i in range(30)])
    made.save_pretrained(place)
    message = refusal(place)
    assert f"{place}: has a tokenizer with ids up to {len(made) - 1}, but embeddings for 410 tokens" in message


def test_two_heads_are_refused(tmp_path: Path) -> None:
    place = own_folder(tmp_path / "rm")
    edit_weights(place, value_head__weight=torch.ones(1, 32))
    message = refusal(place)
    assert f"{place}: has several reward heads, 'score.weight', 'value_head.weight'; remove all but one" in message


def test_options_that_cannot_be_used(tmp_path: Path) -> None:
    place = folder("llama")
    for options, message in [
        ({"dtype": "int8"}, "--dtype: expected auto, float32, bfloat16, float16, found 'int8'"),
        ({"device": "tpu"}, "--device: expected auto, cpu, cuda or cuda:N, found 'tpu'"),
        ({"template": "chatty"}, "--template: expected auto, chat, plain, found 'chatty'"),
        ({"template": "chat"}, f"--template chat: the tokenizer of {place} has no chat template"),
        ({"max_length": 0}, f"--max-length: expected 1 to 256 tokens for {place}, found 0"),
        ({"max_length": 257}, f"--max-length: expected 1 to 256 tokens for {place}, found 257"),
    ]:
        with pytest.raises(UsageError) as raised:
            load_reward_model(place, LoadOptions(**{"device": "cpu", **options}))  # type: ignore[arg-type]
        assert str(raised.value) == message
    with pytest.raises(UsageError, match="no local folder"):
        load_reward_model(tmp_path / "no" / "such" / "folder", FLOAT32)


# --- layouts ----------------------------------------------------------------------------------------------------------


def shard(place: Path, index: bool) -> None:
    """Splits model.safetensors in three."""
    tensors = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    table = {name: f"model-{1 + i % 3:05d}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in sorted(set(table.values())):
        save_file({n: t for n, t in tensors.items() if table[n] == file}, place / file, {"format": "pt"})
    if index:
        (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


@pytest.mark.parametrize("index", [True, False])
def test_shards(tmp_path: Path, index: bool) -> None:
    place = own_folder(tmp_path / "rm")
    expected = rewards(load_reward_model(place, FLOAT32))
    shard(place, index)
    numpy.testing.assert_allclose(rewards(load_reward_model(place, FLOAT32)), expected, atol=1e-5)


def test_a_single_file_is_the_one_that_was_named(tmp_path: Path) -> None:
    """Beside it lie an index and its shards, which transformers would load instead."""
    place = own_folder(tmp_path / "rm")
    other = load_file(own_folder(tmp_path / "other", seed=1) / "model.safetensors")
    expected = rewards(load_reward_model(tmp_path / "other", FLOAT32))
    save_file(other, place / "other.safetensors", {"format": "pt"})
    named = load_reward_model(place / "other.safetensors", FLOAT32)
    numpy.testing.assert_allclose(rewards(named), expected, atol=1e-5)
    assert named.label == str(place / "other.safetensors")
    first = rewards(load_reward_model(place / "model.safetensors", FLOAT32))
    assert abs(first - expected).max() > 0.1
    shard(place, index=True)
    numpy.testing.assert_allclose(rewards(load_reward_model(place / "other.safetensors", FLOAT32)), expected, atol=1e-5)


def causal(place: Path, head: dict[str, torch.Tensor], pad: int | None = 2, dtype: torch.dtype = torch.float32) -> Path:
    """A causal language model's folder with a value head, as TRL and OpenRLHF save them."""
    own_folder(place, dtype=dtype)
    config = {"architectures": ["LlamaForCausalLM"], "id2label": None, "label2id": None, "num_labels": None}
    edit_config(place, **config, pad_token_id=pad)
    edit_weights(place, score__weight=None, **{name.replace(".", "__"): tensor for name, tensor in head.items()})
    return place


def value_heads(dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    weight, bias = torch.randn(1, 32, generator=torch.Generator().manual_seed(5)), torch.tensor([1.234567])
    lm_head = torch.ones(410, 32).to(dtype)
    return [
        {"value_head.weight": weight},
        {"v_head.summary.weight": weight, "v_head.summary.bias": bias, "lm_head.weight": lm_head},
        {"value_head.weight": weight, "value_head.bias": bias, "lm_head.weight": lm_head},
    ]


@pytest.mark.parametrize("pad", [None, 0, 2])
@pytest.mark.parametrize("head", value_heads(), ids=["OpenRLHF", "TRL", "bias"])
def test_value_heads_read_the_last_token(tmp_path: Path, head: dict[str, torch.Tensor], pad: int | None) -> None:
    """reward = bias + w . last hidden state, also of a text that ends in the padding token."""
    weight = next(tensor for name, tensor in head.items() if name.endswith("_head.weight") or "summary.weight" in name)
    bias = next((float(tensor[0]) for name, tensor in head.items() if name.endswith("bias")), 0.0)
    model = load_reward_model(causal(tmp_path / "rm", head, pad), FLOAT32)
    expected = (hidden(own_folder(tmp_path / "plain"), ids_of(model)) @ weight[0] + bias).numpy()
    assert method_of(model).__name__ == "prefix_reuse"
    numpy.testing.assert_allclose(rewards(model), expected, atol=1e-4)
    assert model.warnings == ()


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_bfloat16_folder_has_its_head_in_float32(tmp_path: Path, kind: str) -> None:
    place = own_folder(tmp_path / "rm", dtype=torch.bfloat16)
    weight = load_file(place / "model.safetensors")["score.weight"]
    model = load_reward_model(place, LoadOptions(device="cpu", dtype=kind))
    assert model.module.score.weight.dtype == torch.float32
    assert model.module.dtype == getattr(torch, kind)
    ids, tolerance = ids_of(model), 1e-4
    if kind == "bfloat16":
        # The backbone's own rounding differs between ways of batching: the head must add none, alone.
        with torch.inference_mode():
            found = torch.tensor([float(model.module(torch.from_numpy(row)[None]).logits[0, 0]) for row in ids])
        last = [int(numpy.flatnonzero(row != 0)[-1]) for row in ids]
        rows = [row[: end + 1] for row, end in zip(ids, last, strict=True)]
        states = hidden(place, rows, torch.bfloat16).double()
        off = abs(found.double() - states @ weight[0].double())
        assert float(torch.quantile(off, 0.5)) < 1e-4
        rounded = abs(found.bfloat16().double() - found.double())
        assert float(off.median()) < 0.1 * float(rounded.median())
    else:
        numpy.testing.assert_allclose(rewards(model), alone(place, ids), atol=tolerance)


def test_a_head_stored_in_float32_keeps_its_bits(tmp_path: Path) -> None:
    precise = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    place = own_folder(tmp_path / "rm", dtype=torch.bfloat16)
    edit_weights(place, score__weight=precise)
    for model in (load_reward_model(place, HALF), load_reward_model(place, LoadOptions(device="cpu"))):
        assert torch.equal(model.module.score.weight, precise)
    head = value_heads(torch.bfloat16)[1]
    model = load_reward_model(causal(tmp_path / "trl", head, dtype=torch.bfloat16), HALF)
    assert torch.equal(model.module.score.weight, head["v_head.summary.weight"])
    assert torch.equal(model.module.score.bias, head["v_head.summary.bias"])
    assert model.module.dtype == torch.bfloat16


def test_the_dtype_of_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, wide = own_folder(tmp_path / "rm", dtype=torch.bfloat16), folder("llama")
    auto = LoadOptions(device="cpu")
    for faster in (True, False):
        monkeypatch.setattr(model_module, "bfloat16_is_faster", lambda faster=faster: faster)
        assert load_reward_model(place, auto).module.dtype == (torch.bfloat16 if faster else torch.float32)
        assert load_reward_model(wide, auto).module.dtype == torch.float32
    opened = load_reward_model(place, auto).source
    assert model_module.choose_dtype("auto", opened, torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize(
    ("rank", "device"), [(None, "cuda"), ("0", "cuda:0"), ("1", "cuda:1"), ("2", "cuda"), ("", "cuda"), ("x", "cuda")]
)
def test_processes_of_torchrun_have_a_gpu_each(rank: str | None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless each sees one only, by CUDA_VISIBLE_DEVICES."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert model_module._device("auto") == torch.device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model_module._device("auto") == torch.device("cpu")


def test_bfloat16_is_measured() -> None:
    assert model_module.bfloat16_is_faster() in (True, False)


def adapted(place: Path, base: Path, seed: int = 0, **options: Any) -> Any:
    """A LoRA adapter in `place`, and the module that PEFT merges it into."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    module = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that it will drop
        wrapped = get_peft_model(module, config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(wrapped.named_parameters()):
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    wrapped.save_pretrained(place)
    return wrapped.merge_and_unload().eval()


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_adapter_scores_as_peft_merges_it(tmp_path: Path, rslora: bool) -> None:
    base = folder("llama")
    merged = adapted(tmp_path / "adapter", base, use_rslora=rslora)
    model = load_reward_model(tmp_path / "adapter", FLOAT32, base=base)
    with torch.inference_mode():
        expected = [float(merged(torch.from_numpy(row)[None]).logits[0, 0]) for row in ids_of(model)]
    numpy.testing.assert_allclose(rewards(model), expected, atol=1e-4)
    assert abs(rewards(load_reward_model(base, FLOAT32)) - expected).max() > 0.1
    assert model.label == str(tmp_path / "adapter")


def test_an_opened_checkpoint_is_taken() -> None:
    from warmerge.weights.locate import open_checkpoint

    model = load_reward_model(open_checkpoint(folder("llama")), FLOAT32)
    assert model.nbytes == sum(t.numel() * 4 for t in load_file(folder("llama") / "model.safetensors").values())
    assert model.device == torch.device("cpu")


CODE = """
import torch
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

class OwnConfig(LlamaConfig):
    model_type = "own"

class Own(LlamaPreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = torch.nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = (torch.arange(input_ids.shape[1]) * (input_ids != self.config.pad_token_id)).argmax(-1)
        return SequenceClassifierOutputWithPast(logits=self.score(states[torch.arange(len(states)), last]))
"""


def test_code_of_its_own_is_run_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    classes = {"AutoConfig": "code.OwnConfig", "AutoModelForSequenceClassification": "code.Own"}
    members = []
    for seed in (1, 2):
        members.append(own_folder(tmp_path / f"own{seed}", seed=seed))
        (members[-1] / "code.py").write_text(CODE)
        edit_config(members[-1], model_type="own", architectures=["Own"], auto_map=classes)
    model = load_reward_model(members[1], LoadOptions(device="cpu", dtype="float32", trust_remote_code=True))
    assert type(model.module).__name__ == "Own"
    expected = alone(own_folder(tmp_path / "plain", seed=2), ids_of(model))
    numpy.testing.assert_allclose(rewards(model), expected, atol=1e-4)
    filled = fill(model, prepare(members).plan, "average")
    one, two = (load_file(member / "model.safetensors")["score.weight"] for member in members)
    torch.testing.assert_close(filled.module.score.weight.data, (one + two) / 2, rtol=0, atol=1e-6)


# --- quietly ----------------------------------------------------------------------------------------------------------


def test_loading_prints_nothing_and_leaves_transformers_settings(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    place, broken = own_folder(tmp_path / "rm"), own_folder(tmp_path / "broken")
    edit_weights(broken, score__weight=None, model__norm__bias=torch.ones(1))
    odd = own_folder(tmp_path / "odd")
    edit_config(odd, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "beta": 3})
    capfd.readouterr()
    for verbosity in (logging.INFO, logging.WARNING):
        for bars in (True, False):
            logging.set_verbosity(verbosity)
            (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
            try:
                with heard() as said:
                    rewards(load_reward_model(place, FLOAT32))
                    load_reward_model(odd, FLOAT32)
                    refusal(broken)
                shown = capfd.readouterr()
                assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)
                assert (shown.out, shown.err, said) == ("", "", [])
            finally:
                logging.set_verbosity(logging.WARNING)
                logging.enable_progress_bar()


# --- renderers --------------------------------------------------------------------------------------------------------


def test_another_padding_token_in_the_config_is_doubted(tmp_path: Path) -> None:
    place = own_folder(tmp_path / "rm")
    assert load_reward_model(place, FLOAT32).warnings == ()
    edit_config(place, pad_token_id=2)
    (warning,) = load_reward_model(place, FLOAT32).warnings
    assert str(warning).startswith(
        f"{place}/config.json: has pad_token_id 2, its tokenizer pads with 0: in padded batches"
    )
    encoder = own_folder(tmp_path / "bert", "bert")
    edit_config(encoder, pad_token_id=2)
    assert load_reward_model(encoder, FLOAT32).warnings == ()


def test_equal_tokenizers_make_equal_renderers(tmp_path: Path) -> None:
    place = own_folder(tmp_path / "rm")
    shutil.copytree(place, tmp_path / "copy")
    first, again = (load_reward_model(p, FLOAT32).renderer for p in (place, tmp_path / "copy"))
    assert first == again
    assert first.tokenizer is not again.tokenizer
    assert first != load_reward_model(place, LoadOptions(device="cpu", max_length=100)).renderer
    tokenizer(template=TEMPLATE).save_pretrained(tmp_path / "copy")
    chat = load_reward_model(tmp_path / "copy", FLOAT32).renderer
    assert (first.template, chat.template) == ("plain", "chat")
    assert first != chat
    plain = load_reward_model(tmp_path / "copy", LoadOptions(device="cpu", template="plain")).renderer
    assert plain.template == "plain"
    assert [e.ids.tolist() for e in encode(plain, texts())] == [e.ids.tolist() for e in encode(first, texts())]


@pytest.mark.parametrize(("kind", "ends"), [("llama", 2), ("gpt2", 2), ("bert", None), ("roberta", None)])
def test_the_renderer_of_a_model(kind: str, ends: int | None) -> None:
    made = load_reward_model(folder(kind), FLOAT32).renderer
    assert (made.ends, made.template, made.max_length) == (ends, "plain", 256)


def test_the_models_positions_limit_the_length(tmp_path: Path) -> None:
    """RoBERTa has 258 positions, of which those up to its padding id are no token's."""
    for kind, pad, positions in (("roberta", 0, 257), ("roberta", 1, 256), ("bert", 0, 256), ("gpt2", 0, 256)):
        place = save(tmp_path / f"{kind}{pad}", make_model(kind, pad), tokenizer(kind, model_max_length=int(1e30)))
        model = load_reward_model(place, FLOAT32)
        assert model.renderer.max_length == positions
        found = score(model, Tokens(model.renderer, [("", "the sea is deep " * 200)]))
        assert numpy.isfinite(found).all()


# --- merges -----------------------------------------------------------------------------------------------------------


def same_module(one: RewardModel, other: RewardModel) -> None:
    left, right = one.module.state_dict(), other.module.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("live", ["float32", "bfloat16"])
def test_a_filled_model_is_the_written_average_loaded(tmp_path: Path, stored: torch.dtype, live: str) -> None:
    members = [own_folder(tmp_path / str(seed), seed=seed, dtype=stored) for seed in (1, 2)]
    options = LoadOptions(device="cpu", dtype=live)
    warmerge.average(members, out=tmp_path / "out")
    loaded = load_reward_model(tmp_path / "out", options)
    filled = fill(load_reward_model(members[1], options), prepare(members).plan, "average", threads=2)
    assert filled.label == "average"
    same_module(filled, loaded)
    numpy.testing.assert_allclose(rewards(filled), rewards(loaded), atol=1e-5 if live == "float32" else 0.1)
    assert abs(rewards(loaded) - rewards(load_reward_model(members[0], options))).max() > 0.1


def test_a_plan_from_plan_merge_is_taken(tmp_path: Path) -> None:
    members = [load_reward_model(folder("gpt_neox", seed=seed), FLOAT32) for seed in (1, 2)]
    plan = plan_merge([member.source for member in members], RULES["weighted"], Options((0.25, 0.75)))
    one, two = (member.module.state_dict() for member in members)
    expected = {name: (0.25 * one[name].double() + 0.75 * two[name].double()).float() for name in one}
    filled = fill(members[0], plan, "mix")
    for name, tensor in filled.module.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("live", ["float32", "bfloat16"])
def test_value_heads_are_filled_by_way_of_a_state_dict(tmp_path: Path, which: int, live: str) -> None:
    members = []
    for seed in (1, 2):
        head = {name: tensor * seed for name, tensor in value_heads(torch.bfloat16)[which].items()}
        place = causal(tmp_path / str(seed), head, dtype=torch.bfloat16)
        name = "model.embed_tokens.weight"
        edit_weights(place, **{name: load_file(place / "model.safetensors")[name] * seed})
        members.append(place)
    options = LoadOptions(device="cpu", dtype=live)
    # The head's name is not one of transformers: whoever averages such models says that they know.
    warmerge.average(members, out=tmp_path / "out", any_model=True)
    filled = fill(load_reward_model(members[0], options), prepare(members, any_model=True).plan, "average")
    same_module(filled, load_reward_model(tmp_path / "out", options))
    assert abs(rewards(filled) - rewards(load_reward_model(members[0], options))).max() > 1e-3


def test_names_that_transformers_converts_are_filled_too(tmp_path: Path) -> None:
    """Old checkpoints say gamma and beta, or bring buffers that are no parameters any more."""
    members = []
    for seed in (1, 2):
        place = own_folder(tmp_path / str(seed), "bert", seed=seed)
        tensors = load_file(place / "model.safetensors")
        renamed = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in tensors.items()
        }
        assert renamed.keys() != tensors.keys()
        save_file(renamed, place / "model.safetensors", {"format": "pt"})
        members.append(place)
    warmerge.average(members, out=tmp_path / "out")
    filled = fill(load_reward_model(members[0], FLOAT32), prepare(members).plan, "average")
    same_module(filled, load_reward_model(tmp_path / "out", FLOAT32))


def test_adapters_are_filled_too(tmp_path: Path) -> None:
    base = folder("llama")
    members = [tmp_path / "a", tmp_path / "b"]
    for seed, place in enumerate(members):
        adapted(place, base, seed)
    warmerge.average(members, out=tmp_path / "out", base=base)
    filled = fill(load_reward_model(members[0], FLOAT32, base=base), prepare(members, base=base).plan, "average")
    same_module(filled, load_reward_model(tmp_path / "out", FLOAT32))


def test_a_merge_of_another_model_is_refused(tmp_path: Path) -> None:
    other = prepare([folder("gpt2", seed=seed) for seed in (1, 2)]).plan
    with pytest.raises(RefusedError, match=r"missing|not in the model"):
        fill(load_reward_model(own_folder(tmp_path / "rm"), FLOAT32), other, "average")


@pytest.mark.parametrize("kind", [*DECODERS, "bert", "roberta", "modernbert"])
def test_every_architecture_fills_in_place(kind: str) -> None:
    members = [folder(kind, seed=seed) for seed in (0, 1)]
    model = load_reward_model(members[0], FLOAT32)
    before = {name: tensor.data_ptr() for name, tensor in model.module.state_dict().items()}
    filled = fill(model, prepare(members).plan, "average")
    assert {name: tensor.data_ptr() for name, tensor in filled.module.state_dict().items()} == before
    other = load_reward_model(members[1], FLOAT32).module.state_dict()
    first = load_reward_model(members[0], FLOAT32).module.state_dict()
    for name, tensor in filled.module.state_dict().items():
        torch.testing.assert_close(tensor, (first[name] + other[name]) / 2, rtol=0, atol=1e-6)


def test_the_pad_variants_are_what_they_say() -> None:
    for pad, token, number in (("own", PAD, 0), ("eos", EOS, 2), ("none", None, None)):
        model = load_reward_model(folder("llama", pad), FLOAT32)
        assert (model.renderer.tokenizer.pad_token, model.module.config.pad_token_id) == (token, number)
