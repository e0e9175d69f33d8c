"""`warmerge rl` as a hostile user and a sceptical engineer would run it: odd policies, rewards, folders and stops.

Each of these was once a fault, or is a promise that holds.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import causal_models
import numpy
import pytest
import tiny_models
import torch
from conftest import lines, user
from rl_worlds import close, optimise, same_weights, small, untimed, watch_batches, write_prompts
from safetensors.torch import load_file, save_file

from warmerge import Interrupted, RefusedError, UsageError, WarmergeError
from warmerge.pipeline.proxies import Proxy
from warmerge.pipeline.scoring.rewarders import load_rewarder, open_rewarder
from warmerge.rewards.bench import Measuring

LENGTHS = "    return [float(len(text)) for text in completions]\n"


def function(folder: Path, body: str = LENGTHS, before: str = "") -> str:
    """folder/own.py:own, whose body is given."""
    path = folder / "own.py"
    path.write_text(f"{before}def own(prompts, completions, **kwargs):\n{body}")
    return f"{path}:own"


def uneven(path: Path) -> str:
    """Prompts of very different lengths, so that a batch is padded."""
    path.write_bytes(lines([{"prompt": "why " * (1 + 7 * (i % 5)) + f"{i}?"} for i in range(24)]))
    return str(path)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What TRL made of each step's answers, and the policy's weights at that moment."""
    return watch_batches(monkeypatch)


def said(batch: dict[str, Any]) -> list[list[int]]:
    """The token ids of a batch's answers."""
    both = zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    return [row[mask.bool()].tolist() for row, mask in both]


def by_hand(policy: Path, state: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and summed entropy of each answer (N,), one text at a time, without padding."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    if state is not None:
        module.load_state_dict(state)
    sums, entropies = [], []
    for prompt, mask, answer in zip(batch["prompt_ids"], batch["prompt_mask"], said(batch), strict=True):
        asked = prompt[mask.bool()]
        with torch.no_grad():
            logits = module(input_ids=torch.cat([asked, torch.tensor(answer)])[None]).logits[0, len(asked) - 1 : -1]
        steps = (logits / 0.9).log_softmax(-1)
        sums.append(steps[torch.arange(len(answer)), answer].sum())
        entropies.append(-(steps.exp() * steps).sum())
    return torch.stack(sums), torch.stack(entropies)


# --- policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("opt", "gemma3_text"))]
)
def test_log_probabilities_are_those_of_the_model(tmp_path: Path, batches: list[dict[str, Any]], kind: str) -> None:
    """Also what is learned: gradients are those of the same log-probabilities."""
    policy = causal_models.write(tmp_path / "policy", kind)
    found = optimise(tmp_path, policy=policy, prompts=uneven(tmp_path / "p.jsonl"), lr=3e-3, steps=2, samples=0)
    batch, row = batches[1], found.rows[1]
    assert len(set(batch["prompt_mask"].sum(1).tolist())) > 1
    now, _ = by_hand(policy, batch["state"], batch)
    start, _ = by_hand(policy, None, batch)
    assert close(row["kl_sequence"], float((now - start).mean()), 1e-3)


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("gpt_neo", marks=pytest.mark.slow), "recurrent_gemma"])
def test_other_log_probabilities_are_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions counted from the padding (GPT-2), and logits that go through more than TRL knows of."""
    for name, settings in {
        "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]], "hidden_size": 32},
        "recurrent_gemma": {
            "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1,
            "intermediate_size": 48, "lru_width": 32, "attention_window_size": 64,
        },
    }.items():  # fmt: skip
        monkeypatch.setitem(tiny_models.KINDS, name, {"max_position_embeddings": 256, **settings})
    policy = causal_models.write(tmp_path / "policy", kind)
    with pytest.raises(RefusedError, match=r"TRL gives its tokens other log-probabilities than it has itself \(by \d"):
        optimise(tmp_path, policy=policy, prompts=uneven(tmp_path / "p.jsonl"), steps=2, samples=0)
    assert not (tmp_path / "run" / "rows.jsonl").read_text()


def test_a_mixture_of_experts_learns_from_rewards_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**tiny_models._GROUPED, "num_local_experts": 4}
    monkeypatch.setitem(tiny_models.KINDS, "mixtral", settings)
    policy = causal_models.write(tmp_path / "policy", "mixtral")
    spec = function(
        tmp_path, "    calls.append(1)\n" + LENGTHS.replace("float", "(len(calls) < 2) * float"), "calls = []\n"
    )
    found = optimise(tmp_path, policy=policy, proxy=Proxy("own", "rm", (spec,)), control=None, kl_coef=0.0, samples=0)
    assert [row["no_signal"] for row in found.rows] == [1.0] * 4
    assert [row["gradient_norm"] for row in found.rows] == [0.0] * 4


@pytest.mark.slow
def test_several_ends(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    policy = causal_models.write(tmp_path / "policy", spread=0.05)
    ends = list(range(50, 130))
    causal_models.edit(policy, "generation_config.json", eos_token_id=ends)
    found = optimise(tmp_path, policy=policy, steps=2, eos_penalty=0.25)
    for batch, row in zip(batches, found.rows, strict=True):
        cut = [answer[-1] not in (*ends, 2) for answer in said(batch)]
        assert row["truncated"] == sum(cut) / 8
        assert close(row["proxy"] - row["reward"], 0.25 * sum(cut) / 8)
        assert row["length"] == sum(map(len, said(batch))) / 8
        assert all(not set(answer[:-1]) & {*ends, 2} for answer in said(batch))


def test_a_padding_token_that_is_a_word_ends_no_answer(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    from transformers import AutoTokenizer

    policy = causal_models.write(tmp_path / "policy", spread=0.05)
    causal_models.edit(policy, "tokenizer_config.json", pad_token="e")
    pad = AutoTokenizer.from_pretrained(policy).pad_token_id
    weights = load_file(policy / "model.safetensors")
    weights["lm_head.weight"][pad] *= 60
    save_file(weights, policy / "model.safetensors", {"format": "pt"})
    found = optimise(tmp_path, policy=policy, steps=1, batch=64, max_new_tokens=3)
    assert any(answer[-1] == pad for answer in said(batches[0]))
    assert found.rows[0]["truncated"] == sum(answer[-1] != 2 for answer in said(batches[0])) / 64


def test_an_end_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    policy = causal_models.write(tmp_path / "policy")
    causal_models.edit(policy, "tokenizer_config.json", eos_token=None, pad_token=None)
    for file in ("config.json", "generation_config.json"):
        causal_models.edit(policy, file, eos_token_id=405)
    with pytest.raises(RefusedError, match="ends answers with the token 405, which its tokenizer does not have"):
        optimise(tmp_path, policy=policy, steps=1)


def test_a_config_without_architectures(tmp_path: Path) -> None:
    policy = causal_models.write(tmp_path / "policy")
    config = json.loads((policy / "config.json").read_text())
    del config["architectures"]
    (policy / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedError, match=r"names no architectures in its config\.json"):
        optimise(tmp_path, policy=policy, steps=1)


@pytest.mark.slow
def test_generation_settings_of_the_policy_do_not_matter(tmp_path: Path) -> None:
    policy = causal_models.write(tmp_path / "policy")
    wild = {
        "top_k": 1, "repetition_penalty": 5.0, "temperature": 0.01, "max_length": 12, "forced_bos_token_id": 7,
        "forced_eos_token_id": 2, "suppress_tokens": [80], "no_repeat_ngram_size": 1, "min_new_tokens": 9,
    }  # fmt: skip
    causal_models.edit(policy, "generation_config.json", do_sample=False, **wild)
    causal_models.edit(policy, "config.json", top_k=1, repetition_penalty=5.0)
    found, plain = optimise(tmp_path, policy=policy, steps=1), optimise(tmp_path, "plain", steps=1)
    assert same_weights(found.checkpoints[1], plain.checkpoints[1])
    names = {path.name for path in policy.iterdir()}
    assert {path.name for path in found.checkpoints[1].iterdir()} == names
    for name in names - {"model.safetensors"}:
        assert (found.checkpoints[1] / name).read_bytes() == (policy / name).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [{"tied": True, "lora": 4}, {"stored": torch.bfloat16, "precision": "bfloat16"}],
    ids=["tied", "bfloat16"],
)
@pytest.mark.slow
def test_odd_policies_go_on_to_the_same_weights(tmp_path: Path, changes: dict[str, Any]) -> None:
    policy = causal_models.write(tmp_path / "policy", tie_word_embeddings=changes.pop("tied", False))
    dtype = changes.pop("stored", torch.float32)
    weights = {name: value.to(dtype) for name, value in load_file(policy / "model.safetensors").items()}
    save_file(weights, policy / "model.safetensors", {"format": "pt"})
    given: dict[str, Any] = {"policy": policy, "lr": 1e-2, "control": None, **changes}
    whole = optimise(tmp_path, "whole", **given)
    stop(tmp_path, 4, **given)
    again = optimise(tmp_path, **given)
    assert untimed(again.rows) == untimed(whole.rows)
    for step in (2, 4):
        assert same_weights(again.checkpoints[step], whole.checkpoints[step])
    kept = load_file(again.checkpoints[4] / "model.safetensors")
    assert {name: (value.dtype, value.shape) for name, value in kept.items()} == {
        name: (value.dtype, value.shape) for name, value in weights.items()
    }


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, less = (optimise(tmp_path, str(on), gradient_checkpointing=on, steps=1) for on in (False, True))
    assert same_weights(plain.checkpoints[1], less.checkpoints[1])


@pytest.mark.slow
def test_what_accelerate_finds_in_the_environment_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = optimise(tmp_path, "plain", steps=1)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert same_weights(optimise(tmp_path, steps=1).checkpoints[1], plain.checkpoints[1])


# --- prompts and numbers ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_prompt_and_intervals_beyond_the_end(tmp_path: Path) -> None:
    found = optimise(
        tmp_path, prompts=write_prompts(tmp_path / "one.jsonl", 1), batch=4, samples=0, steps=3, micro_batch=64,
        save_every=100, keep_every=100, sample_every=100, control_every=100,
    )  # fmt: skip
    assert [row["control"] is None for row in found.rows] == [False, True, False]
    assert list(found.checkpoints) == [3]
    assert not (tmp_path / "run" / "samples").exists()


@pytest.mark.slow
def test_lines_that_are_no_lines(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    prompts = [f"a\u2028b\x85 \x0b {i}" for i in range(12)]
    path.write_text("".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in prompts), "utf-8")
    optimise(tmp_path, prompts=str(path), steps=2, shaping="sigmoid")
    rows = (tmp_path / "run/samples/step-2.jsonl").read_text("utf-8").split("\n")[:-1]
    assert len(rows) == 3
    assert {json.loads(row)["prompt"] for row in rows} < set(prompts)


def test_a_row_by_hand(tmp_path: Path) -> None:
    log = tmp_path / "log"
    spec = function(
        tmp_path, f"    with open({str(log)!r}, 'a') as file:\n        print(repr(completions), file=file)\n{LENGTHS}"
    )
    found = optimise(tmp_path, control=spec, control_every=100, steps=3, samples=0)
    for row, texts in zip((found.rows[0], found.rows[2]), map(eval, log.read_text().splitlines()), strict=True):
        lengths = [len(text) for text in texts]
        proxy = [text.count("e") + len(text) / 100 for text in texts]
        for key, values in (("control", lengths), ("proxy", proxy)):
            assert close(row[key], float(numpy.mean(values)))
            assert close(row[f"{key}_std"], float(numpy.std(values, ddof=1)))
        assert close(row["tokens_per_second"] * row["seconds"], row["length"] * 8)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["mean", "min", "uwo", "median"])
def test_ensembles_by_hand(tmp_path: Path, world: Any, how: str) -> None:
    models = [str(world.a), str(world.b), str(world.alien)]
    standardize = how in ("min", "uwo")
    optimise(tmp_path, proxy=Proxy("e", "ensemble", tuple(models), how, 0.5, standardize), control=None, steps=1)
    rows, start = (
        [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]
        for name in ("samples/step-1.jsonl", "start.jsonl")
    )
    texts = [(row["prompt"], row["answer"]) for row in rows]
    r = numpy.stack([load_rewarder(open_rewarder(model), Measuring()).rewards(texts).rewards for model in models])
    if standardize:
        own = numpy.array([line["rewards"] for line in start]).T
        r = (r - own.mean(1, keepdims=True)) / own.std(1, keepdims=True)
    expected = {"mean": r.mean(0), "min": r.min(0), "median": numpy.median(r, 0), "uwo": r.mean(0) - 0.5 * r.var(0)}
    numpy.testing.assert_allclose([row["proxy"] for row in rows], expected[how], atol=1e-5)


def test_a_seed_that_is_too_large() -> None:
    with pytest.raises(UsageError, match="--seed"):
        small(seed=2**32)


# --- rewards ----------------------------------------------------------------------------------------------------------

_RANDOM = "    return torch.rand(len(completions)).tolist()\n"


@pytest.mark.parametrize(
    "changes", [{"control": None}, pytest.param({"sample_every": 1}, marks=pytest.mark.slow)], ids=str
)
def test_a_control_that_draws_random_numbers_moves_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    spec = function(tmp_path, _RANDOM, "import torch\n")
    watched = optimise(tmp_path, "watched", control=spec, steps=2)
    other = optimise(tmp_path, "other", **{"control": spec, "steps": 2, **changes})
    assert same_weights(watched.checkpoints[2], other.checkpoints[2])


def test_a_function_that_changes_its_messages_changes_nothing_else(tmp_path: Path) -> None:
    policy = causal_models.folder(template=causal_models.TEMPLATE)
    asked = [[user(f"What is {i}?")] for i in range(12)]
    (tmp_path / "talks.jsonl").write_bytes(lines([{"prompt": talk} for talk in asked]))
    spec = function(tmp_path, f"    for prompt in prompts:\n        prompt[0]['content'] += '!'\n{LENGTHS}")
    optimise(tmp_path, policy=policy, prompts=str(tmp_path / "talks.jsonl"), control=spec, control_every=1, steps=1)
    rows = (tmp_path / "run/samples/step-1.jsonl").read_text().splitlines()
    assert all(json.loads(row)["prompt"] in asked for row in rows)


@pytest.mark.parametrize("role", ["proxy", pytest.param("control", marks=pytest.mark.slow)])
def test_rewards_that_float32_does_not_hold_are_refused(tmp_path: Path, role: str) -> None:
    spec = function(tmp_path, "    return [1e39 * (1 + text.count('e')) for text in completions]\n")
    proxy = Proxy("own", "rm", (spec,)) if role == "proxy" else None
    with pytest.raises(WarmergeError, match="reward"):
        optimise(tmp_path, proxy=proxy, control=spec if role == "control" else None, steps=1)


def test_rewards_that_float32_does_not_tell_apart_are_refused(tmp_path: Path) -> None:
    spec = function(tmp_path, "    return [3e8 + text.count('e') for text in completions]\n")
    with pytest.raises(RefusedError, match=r"gives rewards of 3e\+08 .* subtract a constant"):
        optimise(tmp_path, proxy=Proxy("own", "rm", (spec,)), control=None, steps=1)


@pytest.mark.parametrize("when", ["import", pytest.param("call", marks=pytest.mark.slow)])
def test_a_file_that_exits(tmp_path: Path, when: str) -> None:
    leave = "import sys\nsys.exit(0)\n"
    spec = function(tmp_path, LENGTHS if when == "import" else "    import sys\n    sys.exit(0)\n",
                    leave if when == "import" else "")  # fmt: skip
    with pytest.raises(UsageError, match="SystemExit"):
        optimise(tmp_path, control=spec, steps=1)


def test_a_file_with_a_dataclass(tmp_path: Path) -> None:
    before = "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    b: int\n"
    optimise(tmp_path, control=function(tmp_path, before=before), steps=1)


def test_a_function_that_fails_on_the_way_says_when(tmp_path: Path) -> None:
    spec = function(tmp_path, "    calls.append(1)\n    assert len(calls) < 2\n" + LENGTHS, "calls = []\n")
    with pytest.raises(WarmergeError) as error:
        optimise(tmp_path, control=spec, control_every=1, samples=0, steps=3)
    assert "step 2" in str(error.value)


def test_a_control_that_is_a_member_beside_a_function_is_said(tmp_path: Path, world: Any) -> None:
    proxy = Proxy("mixed", "ensemble", (str(world.a), function(tmp_path)), "mean")
    found = optimise(tmp_path, proxy=proxy, control=str(world.a), steps=1)
    assert any("is the control" in str(warning) for warning in found.warnings)


@pytest.mark.slow
def test_a_control_that_is_the_proxy_by_another_path_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = function(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = optimise(tmp_path, proxy=Proxy("own", "rm", ("own.py:own",)), control=spec, steps=1)
    assert any("is the control" in str(warning) for warning in found.warnings)


# --- stops and folders ------------------------------------------------------------------------------------------------


def stop(folder: Path, row: int, **given: Any) -> None:
    """A run in folder/run that is interrupted at a row."""
    rows: list[int] = []

    def interrupt(count: int) -> None:
        rows.append(count)
        if len(rows) == row:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        optimise(folder, measuring=Measuring(progress=interrupt), **given)


_STOPPED: dict[str, Any] = {"steps": 5, "scale": "std", "lr": 1e-2}


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """whole/: a run to its end; run/: the same one, stopped after its checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("halves")
    optimise(folder, "whole", **_STOPPED)
    stop(folder, 4, **_STOPPED)
    return folder


@pytest.fixture
def stopped(halves: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run."""
    return Path(shutil.copytree(halves / "run", tmp_path / "run"))


def goes_on(run: Path, halves: Path) -> None:
    """A resumed run says what is wrong with its folder, or comes to the weights of one that was not stopped."""
    try:
        found = optimise(run.parent, **_STOPPED)
    except WarmergeError:
        return
    assert same_weights(found.checkpoints[5], halves / "whole" / "step-5")


def test_a_moved_run_goes_on(stopped: Path, halves: Path) -> None:
    found = optimise(stopped.parent, **_STOPPED)
    assert same_weights(found.checkpoints[5], halves / "whole" / "step-5")


def test_a_start_that_is_missing(stopped: Path, halves: Path) -> None:
    (stopped / "start.jsonl").unlink()
    goes_on(stopped, halves)


def test_a_start_that_is_not_whole(stopped: Path, halves: Path) -> None:
    path = stopped / "start.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    goes_on(stopped, halves)


def test_a_start_that_is_damaged(stopped: Path, halves: Path) -> None:
    path = stopped / "start.jsonl"
    path.write_text(path.read_text()[:-30])
    goes_on(stopped, halves)


@pytest.mark.parametrize(
    "rows", ['{"step": 1}\nnonsense\n', pytest.param('{"step": 1}\n{"step": 2}\n', marks=pytest.mark.slow)]
)
def test_rows_that_are_damaged(stopped: Path, halves: Path, rows: str) -> None:
    (stopped / "rows.jsonl").write_text(rows)
    goes_on(stopped, halves)


@pytest.mark.parametrize("name", ["optimizer.pt", pytest.param("model.safetensors", marks=pytest.mark.slow)])
def test_a_checkpoint_that_is_damaged(stopped: Path, halves: Path, name: str) -> None:
    (path,) = stopped.glob(f"working/checkpoint-2/{name}")
    path.write_bytes(path.read_bytes()[:500])
    goes_on(stopped, halves)


@pytest.mark.parametrize("name", ["optimizer.pt", pytest.param("rng_state.pth", marks=pytest.mark.slow)])
def test_a_checkpoint_that_lacks_a_file(stopped: Path, halves: Path, name: str) -> None:
    (stopped / "working" / "checkpoint-2" / name).unlink()
    goes_on(stopped, halves)


def test_a_policy_that_was_replaced(tmp_path: Path) -> None:
    policy = causal_models.write(tmp_path / "policy")
    stop(tmp_path, 3, policy=policy)
    weights = load_file(policy / "model.safetensors")
    weights["model.embed_tokens.weight"][:150] += 0.5
    save_file(weights, policy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="holds another run"):
        optimise(tmp_path, policy=policy)


def test_other_intervals_after_a_stop(stopped: Path, halves: Path) -> None:
    """They change nothing of the weights, so that they may be changed."""
    found = optimise(stopped.parent, keep_every=1, **_STOPPED)
    listed = json.loads((stopped / "rl.json").read_text())["checkpoints"]
    assert all((stopped / entry["path"]).is_dir() for entry in listed)
    assert {entry["path"] for entry in listed} == {path.name for path in stopped.glob("step-*")}
    assert same_weights(found.checkpoints[5], halves / "whole" / "step-5")


def test_a_folder_that_another_run_writes(tmp_path: Path) -> None:
    rows: list[int] = []

    def another(count: int) -> None:
        rows.append(count)
        if len(rows) == 3:
            with pytest.raises(WarmergeError, match="another"):
                optimise(tmp_path)

    optimise(tmp_path, measuring=Measuring(progress=another))


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
        with pytest.raises((WarmergeError, OSError)):
            optimise(tmp_path, steps=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_killed_while_a_policy_is_written(tmp_path: Path) -> None:
    """The half of it goes away, and the run goes on to the same weights."""
    whole = optimise(tmp_path, "whole", steps=4)
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from pathlib import Path\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "from rl_worlds import optimise\n"
        "os.rename = lambda *paths: os._exit(9)\n"
        f"optimise(Path({str(tmp_path)!r}), policy={str(causal_models.folder())!r}, steps=4)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 9, done.stderr[-2000:]
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert ".step-2.partial" in left
    assert "step-2" not in left
    again = optimise(tmp_path, steps=4)
    assert untimed(again.rows) == untimed(whole.rows)
    assert same_weights(again.checkpoints[4], whole.checkpoints[4])
    expected = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "run").iterdir()} == expected
