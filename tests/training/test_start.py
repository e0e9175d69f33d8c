"""The start: a base becomes a reward model, a reward model stays one; the rest is refused and the message says why."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    DECODERS,
    EOS,
    KINDS,
    PAD,
    TEMPLATE,
    edit_config,
    heard,
    make_model,
    own_folder,
    save,
    texts,
    tokenizer,
)

from warmerge.errors import Finding, RefusedError, UsageError
from warmerge.rewards.model import LoadOptions, RewardModel, load_reward_model
from warmerge.rewards.scoring import Tokens, score
from warmerge.training import start as start_module
from warmerge.training.head import head_digest
from warmerge.training.start import make_start
from warmerge.weights.locate import open_checkpoint

CPU = LoadOptions(device="cpu")
# Of the library that makes the adapters.
PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
FAMILIES = ["llama", "gemma3_text", "gpt2", "bert", "roberta", "modernbert", "xlnet"]


def base_folder(
    place: Path, kind: str = "llama", auto: str = "", wrapped: Any = None, dtype: Any = torch.float32, **changes: Any
) -> Path:
    """A pre-trained model of a kind as it is published: without a reward head."""
    import transformers

    auto = auto or ("AutoModelForMaskedLM" if kind in ("bert", "roberta", "modernbert") else "AutoModelForCausalLM")
    settings = {
        "vocab_size": 410,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None if kind in DECODERS else 0,
    }
    config = transformers.AutoConfig.for_model(kind, **{**KINDS[kind], **settings, **changes})
    module = getattr(transformers, auto).from_config(config)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)
    pad = None if kind in DECODERS else PAD
    return save(place, module.to(dtype), wrapped or tokenizer(kind, pad))


def start(source: Path | str, out: Path, **options: Any) -> list[Finding]:
    """make_start; nothing that transformers has to say reaches the user."""
    with heard() as said:
        found = make_start(open_checkpoint(source), out, **options)
    assert said == []
    return found


def refusal(source: Path, out: Path, **options: Any) -> str:
    with pytest.raises(RefusedError) as refused:
        start(source, out, **options)
    assert [path.name for path in out.parent.iterdir() if out.name in path.name] == []
    return str(refused.value)


def rewards(model: RewardModel) -> torch.Tensor:
    return torch.from_numpy(score(model, Tokens(model.renderer, texts())))


def values(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def edit_json(file: Path, **changes: Any) -> None:
    found = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


# --- models without a head --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_base_becomes_a_reward_model_with_its_own_body(tmp_path: Path, kind: str) -> None:
    base = base_folder(tmp_path / "base", kind)
    start(base, tmp_path / "init")
    model = load_reward_model(tmp_path / "init", CPU)  # refuses what is missing or not known
    assert torch.isfinite(rewards(model)).all()
    before, after = values(base), values(tmp_path / "init")
    shared = before.keys() & after.keys()
    assert len(shared) > 0.75 * len(before)
    assert all(torch.equal(before[name], after[name]) for name in shared)
    assert model.module.config.num_labels == 1
    assert load_config(tmp_path / "init")["architectures"] == [type(model.module).__name__]


def load_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize(("kind", "prefix"), [("llama", "model."), ("gpt2", "transformer."), ("bert", "bert.")])
def test_a_bare_backbone_is_as_good_as_a_language_model(tmp_path: Path, kind: str, prefix: str) -> None:
    """Its tensors have no prefix, and there is no output layer."""
    whole = base_folder(tmp_path / "whole", kind)
    bare = Path(shutil.copytree(whole, tmp_path / "bare"))
    tensors = {name.removeprefix(prefix): value for name, value in values(whole).items() if name.startswith(prefix)}
    save_file(tensors, bare / "model.safetensors", {"format": "pt"})
    for source in (whole, bare):
        start(source, tmp_path / f"{source.name}-init")
    expected, found = values(tmp_path / "whole-init"), values(tmp_path / "bare-init")
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_the_seed_decides_the_head_and_nothing_else(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    state = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        start(base, tmp_path / name, seed=seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    a, b, c = (values(tmp_path / name) for name in "abc")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert [name for name in a if not torch.equal(a[name], c[name])] == ["score.weight"]
    assert head_digest(tmp_path / "a") == head_digest(tmp_path / "b") != head_digest(tmp_path / "c")
    assert b["score.weight"].abs().max() > 0


@pytest.mark.parametrize(("kind", "auto", "drawn"), [
    ("bert", "AutoModelForMaskedLM", ["bert.pooler.dense.bias", "bert.pooler.dense.weight"]),
    ("bert", "AutoModel", []),
    ("roberta", "AutoModelForMaskedLM", ["classifier.dense.bias", "classifier.dense.weight"]),
    ("modernbert", "AutoModelForMaskedLM", []),
    ("modernbert", "AutoModel", ["head.dense.weight", "head.norm.weight"]),
])  # fmt: skip
def test_layers_that_an_encoder_lacks_are_drawn_and_named(
    tmp_path: Path, kind: str, auto: str, drawn: list[str]
) -> None:
    found = start(base_folder(tmp_path / "base", kind, auto), tmp_path / "init")
    names = ", ".join(map(repr, drawn))
    expected = [f"{tmp_path}/base: comes without {names}: drawn at random, once for all members"] if drawn else []
    assert list(map(str, found)) == expected


def test_the_base_keeps_its_dtype(tmp_path: Path) -> None:
    start(base_folder(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "init")
    assert {tensor.dtype for tensor in values(tmp_path / "init").values()} == {torch.bfloat16}
    assert load_config(tmp_path / "init")["dtype"] == "bfloat16"


def test_a_base_of_several_dtypes_becomes_float32(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", dtype=torch.bfloat16)
    mixed = {name: value.float() if "norm" in name else value for name, value in values(base).items()}
    save_file(mixed, base / "model.safetensors", {"format": "pt"})
    start(base, tmp_path / "init")
    assert {tensor.dtype for tensor in values(tmp_path / "init").values()} == {torch.float32}


@PEFT
def test_a_base_in_shards_and_one_with_an_adapter(tmp_path: Path) -> None:
    """Read as `average` reads them: transformers would look for the adapter's base where its config says it is."""
    base = base_folder(tmp_path / "base")
    whole = values(base)
    sharded = tmp_path / "sharded"
    shutil.copytree(base, sharded)
    (sharded / "model.safetensors").unlink()
    for k in (1, 2):
        part = {name: whole[name] for i, name in enumerate(sorted(whole)) if i % 2 == k - 1}
        save_file(part, sharded / f"model-{k:05d}-of-00002.safetensors", {"format": "pt"})
    start(base, tmp_path / "init")
    start(sharded, tmp_path / "init-sharded")
    for name, tensor in values(tmp_path / "init").items():
        assert torch.equal(values(tmp_path / "init-sharded")[name], tensor)

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    adapted.save_pretrained(tmp_path / "adapter")
    make_start(open_checkpoint(tmp_path / "adapter", base), tmp_path / "init-adapter")
    merged, expected = values(tmp_path / "init-adapter"), adapted.merge_and_unload().state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(merged[name], expected[name], atol=1e-6)
    assert not torch.allclose(merged[name], whole[name], atol=1e-2)


MODELING = """
from transformers import BertConfig, BertForSequenceClassification
class OwnConfig(BertConfig):
    model_type = "own"
class OwnReward(BertForSequenceClassification):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("made", [base_folder, own_folder])
def test_a_model_that_brings_its_own_code_takes_it_along(
    tmp_path: Path, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = made(tmp_path / "base", "bert")
    (source / "modeling_own.py").write_text(MODELING)
    table = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForSequenceClassification": "modeling_own.OwnReward"}
    edit_config(source, auto_map=table, model_type="own")
    assert "--trust-remote-code runs it" in refusal(source, tmp_path / "init")
    make_start(open_checkpoint(source), tmp_path / "init", trust_remote_code=True)
    assert (tmp_path / "init/modeling_own.py").read_text() == MODELING
    shutil.rmtree(source)
    model = load_reward_model(tmp_path / "init", LoadOptions(device="cpu", trust_remote_code=True))
    assert type(model.module).__name__ == "OwnReward"
    assert torch.isfinite(rewards(model)).all()


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = base_folder(tmp_path / "base", "roberta")
    capfd.readouterr()
    start(base, tmp_path / "init")
    assert capfd.readouterr() == ("", "")


# --- padding ----------------------------------------------------------------------------------------------------------


def own_batch(folder: Path, padded_to: int = 9) -> tuple[list[float], list[float]]:
    """transformers' own rewards of three texts that end in EOS: alone, and in a batch that is padded on the right."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    module = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    wrapped = AutoTokenizer.from_pretrained(folder)
    rows = [[1, 20, 30, 2], [1, 40, 2], [1, 20, 30, 40, 50, 60, 2]]
    with torch.inference_mode():
        alone = [float(module(input_ids=torch.tensor([row])).logits) for row in rows]
        cut = [float(module(input_ids=torch.tensor([row[:-1]])).logits) for row in rows]
        ids = torch.tensor([row + [wrapped.pad_token_id] * (padded_to - len(row)) for row in rows])
        batch = module(input_ids=ids).logits[:, 0].tolist()
    assert all(abs(a - c) > 1e-3 for a, c in zip(alone, cut, strict=True))  # the head sees EOS
    return alone, batch


def words(*special: str, pad: str | None = None) -> Any:
    """A word tokenizer whose special tokens are given: 0 <unk>, 1 <s>, 2 </s>, then words, then these."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<unk>", "<s>", EOS, *(f"w{i}" for i in range(397))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token=EOS, unk_token="<unk>", model_max_length=256
    )
    wrapped.add_special_tokens({"additional_special_tokens": list(special)} if special else {})
    wrapped.pad_token = pad
    return wrapped


@pytest.mark.parametrize(("wrapped", "chosen", "number", "rows"), [
    (words("<|x|>", "<|reserved_0|>", "<|finetune_right_pad|>"), "<|finetune_right_pad|>", 402, 410),  # named so
    (words("<|x|>", "<|reserved_0|>", pad=EOS), "<|reserved_0|>", 401, 410),  # pad is EOS: another one
    (words(), "<|pad|>", 400, 410),  # a new token, in a row to spare
    (words(*(f"<|x{i}|>" for i in range(10))), "<|pad|>", 410, 411),  # a new token and a new row
])  # fmt: skip
def test_a_decoder_gets_a_padding_token_of_its_own(
    tmp_path: Path, wrapped: Any, chosen: str, number: int, rows: int
) -> None:
    base = base_folder(tmp_path / "base", wrapped=wrapped)
    (found,) = start(base, tmp_path / "init")
    what = f"has no padding token of its own: {chosen!r} (id {number}) was chosen, and saved in config and tokenizer"
    assert str(found) == f"{base}: {what}"
    model = load_reward_model(tmp_path / "init", CPU)
    assert model.warnings == ()
    assert (model.renderer.tokenizer.pad_token, model.renderer.tokenizer.pad_token_id) == (chosen, number)
    assert load_config(tmp_path / "init")["pad_token_id"] == number
    assert model.module.get_input_embeddings().weight.shape[0] == rows
    alone, batch = own_batch(tmp_path / "init")
    assert batch == pytest.approx(alone, abs=1e-5)


def test_a_padding_token_that_no_text_ends_in_stays(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", wrapped=tokenizer("llama", PAD, TEMPLATE), pad_token_id=None)
    assert start(base, tmp_path / "init") == []
    assert load_config(tmp_path / "init")["pad_token_id"] == 0
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "init" / name).read_bytes() == (base / name).read_bytes()


def test_what_the_model_itself_ends_texts_in_is_no_padding(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", wrapped=tokenizer("llama", PAD), eos_token_id=[2, 0])
    (found,) = start(base, tmp_path / "init")
    assert "'<|pad|>'" in str(found)


# --- reward models ----------------------------------------------------------------------------------------------------


def layouts(place: Path) -> Iterator[tuple[str, Path]]:
    """One reward model in every layout."""
    single = own_folder(place / "single", dtype=torch.bfloat16)
    whole = values(single) | {"score.weight": values(single)["score.weight"].float() + 1e-4}
    save_file(whole, single / "model.safetensors", {"format": "pt"})
    yield "single", single
    names = sorted(whole)
    for layout in ("indexed", "unindexed"):
        folder = place / layout
        shutil.copytree(single, folder)
        (folder / "model.safetensors").unlink()
        table = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(names)}
        for file in set(table.values()):
            part = {name: whole[name] for name in names if table[name] == file}
            save_file(part, folder / file, {"format": "pt"})
        if layout == "indexed":
            index = {"metadata": {"total_size": 1}, "weight_map": table}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        yield layout, folder
    folder = place / "file"
    shutil.copytree(single, folder)
    (folder / "model.safetensors").rename(folder / "step-7.safetensors")
    yield "file", folder / "step-7.safetensors"


def test_a_reward_model_stays_as_it_is_in_any_layout(tmp_path: Path) -> None:
    expected = None
    for layout, source in layouts(tmp_path):
        out = tmp_path / f"{layout}-init"
        assert start(source, out) == []
        folder = source if source.is_dir() else source.parent
        assert {name: value.dtype for name, value in values(out).items()} == {
            name: value.dtype for name, value in values(folder).items()
        }
        assert all(torch.equal(value, values(folder)[name]) for name, value in values(out).items())
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (out / name).read_bytes() == (folder / name).read_bytes()
        found = rewards(load_reward_model(out, LoadOptions(device="cpu", dtype="float32")))
        expected = found if expected is None else expected
        assert torch.equal(found, expected)
    assert head_digest(tmp_path / "single-init") == head_digest(tmp_path / "unindexed-init")


@PEFT
def test_an_adapter_is_merged_into_its_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = own_folder(tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    get_peft_model(make_model("llama"), config).save_pretrained(tmp_path / "adapter")
    make_start(open_checkpoint(tmp_path / "adapter", base), tmp_path / "init")
    expected = rewards(load_reward_model(tmp_path / "adapter", CPU, base))
    assert torch.allclose(rewards(load_reward_model(tmp_path / "init", CPU)), expected, atol=1e-5)
    assert not torch.allclose(rewards(load_reward_model(base, CPU)), expected, atol=1e-2)


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "gpt2", "xlnet"])
def test_a_reward_model_of_another_kind_keeps_its_rewards(tmp_path: Path, kind: str) -> None:
    source = own_folder(tmp_path / "rm", kind)
    assert start(source, tmp_path / "init") == []
    expected = rewards(load_reward_model(source, CPU))
    assert torch.equal(rewards(load_reward_model(tmp_path / "init", CPU)), expected)


def test_a_reward_model_without_padding_gets_a_token_that_its_vocabulary_has(tmp_path: Path) -> None:
    source = save(tmp_path / "rm", make_model("llama", pad=None), words("<|reserved_0|>"))
    (found,) = start(source, tmp_path / "init")
    assert "'<|reserved_0|>' (id 400) was chosen" in str(found)
    assert load_config(tmp_path / "init") == load_config(source) | {"pad_token_id": 400}
    alone, batch = own_batch(tmp_path / "init")
    assert batch == pytest.approx(alone, abs=1e-5)
    assert (tmp_path / "init/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()

    own = save(tmp_path / "own", make_model("llama", pad=None), tokenizer("llama"))
    assert start(own, tmp_path / "init-own") == []
    assert load_config(tmp_path / "init-own")["pad_token_id"] == 0

    full = save(tmp_path / "full", make_model("llama", pad=None), words(*(f"<|x{i}|>" for i in range(10))))
    message = refusal(full, tmp_path / "init-full")
    assert "has no padding token, and its vocabulary has none to spare, so it cannot be trained in batches" in message


def test_one_label_that_the_config_does_not_say_is_said(tmp_path: Path) -> None:
    source = own_folder(tmp_path / "rm", id2label=None, label2id=None)
    start(source, tmp_path / "init")
    assert load_config(tmp_path / "init") == load_config(source) | {"num_labels": 1}


# --- what is left of this machine -------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [base_folder, own_folder])
def test_no_path_and_no_closed_file_is_left(tmp_path: Path, made: Any) -> None:
    source = made(tmp_path / "base")
    edit_config(source, _name_or_path=str(tmp_path / "secret"))
    edit_json(source / "tokenizer_config.json", name_or_path=str(tmp_path / "secret"))
    mask = os.umask(0o027)
    try:
        start(source, tmp_path / "out/init")
    finally:
        os.umask(mask)
    files = list((tmp_path / "out/init").iterdir())
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {"0o640"}
    for path in files:
        assert path.name == "warmerge.json" or str(tmp_path).encode() not in path.read_bytes()
        assert path.name == "warmerge.json" or b"name_or_path" not in path.read_bytes()
    record = json.loads((tmp_path / "out/init/warmerge.json").read_text())
    assert record["start"]["checkpoint"] == str(source)
    assert record["start"]["head"] == ("drawn" if made is base_folder else "as it came")
    assert len(record["start"]["fingerprint"]) == 64


def test_out_is_there_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_folder(tmp_path / "base")

    def fail(*paths: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(start_module.os, "rename", fail)
        with pytest.raises(OSError, match="No space left"):
            make_start(open_checkpoint(base), tmp_path / "init")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    start(base, tmp_path / "init")
    with pytest.raises(UsageError, match="init exists; choose another folder"):
        make_start(open_checkpoint(base), tmp_path / "init")


# --- refusals ---------------------------------------------------------------------------------------------------------


def without(folder: Path, *names: str, **added: torch.Tensor) -> Path:
    found = values(folder) | {name.replace("__", "."): value for name, value in added.items()}
    save_file({k: v for k, v in found.items() if k not in names}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_checkpoints_that_are_no_start_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "init"
    two = save(tmp_path / "two", make_model("llama", num_labels=2), tokenizer("llama"))
    assert refusal(two, out) == f"refused: {two}/config.json: has 2 labels; a reward model has one (num_labels: 1)"
    t5 = own_folder(tmp_path / "t5", "t5")
    assert refusal(t5, out).endswith("is an encoder-decoder (t5); training starts from a decoder or an encoder")
    t5_base = base_folder(tmp_path / "t5-base", "t5", "AutoModelForSeq2SeqLM")
    assert "is an encoder-decoder (t5)" in refusal(t5_base, out)
    quantised = base_folder(tmp_path / "quantised")
    edit_config(quantised, quantization_config={"quant_method": "gptq"})
    assert "config.json: is quantised (quantization_config)" in refusal(quantised, out)
    code = base_folder(tmp_path / "code")
    edit_config(code, auto_map={"AutoModelForCausalLM": "evil.Model"})
    assert "brings its own model code (auto_map); --trust-remote-code runs it" in refusal(code, out)
    value = without(base_folder(tmp_path / "value"), v_head__summary__weight=torch.ones(1, 32))
    assert "is a language model with a value head ('v_head.summary.weight'), which transformers would drop" in refusal(
        value, out
    )
    lost = without(own_folder(tmp_path / "lost"), "score.weight")
    assert "is a sequence classifier by its config.json, but its head is missing; download it again" in refusal(
        lost, out
    )
    fp8 = without(base_folder(tmp_path / "fp8"), lm_head__weight=torch.ones(410, 32).to(torch.float8_e4m3fn))
    assert "tensor 'lm_head.weight' is F8_E4M3, which is no plain weight" in refusal(fp8, out)


def test_weights_that_are_not_the_configs_are_named_together(tmp_path: Path) -> None:
    norm, gate = "model.norm.weight", "model.layers.7.mlp.gate_proj.weight"
    base = base_folder(tmp_path / "base")
    without(base, "model.layers.1.mlp.up_proj.weight", model__layers__7__mlp__gate_proj__weight=torch.ones(2))
    without(base, model__norm__weight=torch.ones(33))
    assert refusal(base, tmp_path / "init").splitlines() == [
        "refused, 3 findings:",
        f"  - {base}: 1 tensor is missing, so transformers would draw them at random: "
        "'model.layers.1.mlp.up_proj.weight'",
        f"  - {base}: 1 tensor is not part of this architecture: {gate!r}",
        f"  - {base}: 1 tensor is of another shape than the config says: {norm!r}",
    ]


def test_tokenizers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "init"
    none = base_folder(tmp_path / "none")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (none / name).unlink()
    assert "has no tokenizer files; copy those of the model it was trained from" in refusal(none, out)
    endless = tokenizer("llama", PAD)
    endless.eos_token = None
    message = refusal(base_folder(tmp_path / "endless", wrapped=endless), out)
    assert "has a tokenizer without an end-of-sequence token: texts would not end in anything" in message
    assert "set eos_token in tokenizer_config.json" in message
    larger = base_folder(tmp_path / "larger", wrapped=words(*(f"<|x{i}|>" for i in range(20))))
    message = refusal(larger, out)
    assert "has a tokenizer with ids up to 420, but embeddings for 410 tokens: not the model's tokenizer" in message
    unknown = base_folder(tmp_path / "vision")
    edit_config(unknown, model_type="vit")
    assert "is a vit model, for which there is no sequence classifier" in refusal(unknown, out)
