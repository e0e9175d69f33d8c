"""The tiny world of the demo: its gold rule, its texts, its pairs, and how they reach policy and reward model."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from warmerge.demo import world as demo_world
from warmerge.pipeline.sampling.policy import Drawn, open_for_sampling, open_policy
from warmerge.pipeline.sampling.settings import Sampling
from warmerge.rewards.render import Renderer, encode

POST = "exam um lunch rent job bus well loan cat TL;DR:"
ROUND_TRIPS = ("train", "val", "ood")


@pytest.fixture(scope="module")
def world() -> Any:
    return demo_world


@pytest.fixture(scope="module")
def small(world: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A world of each of the seeds 0, 0 and 1, of models that have hardly learned."""
    size = world.Size(
        pretrain_steps=12, sft_steps=6, batch=16, sft_texts=64, train_pairs=40, test_pairs=30, prompts=20, held_out=5
    )
    made = [tmp_path_factory.mktemp("worlds") / "world" for _ in range(3)]
    for out, seed in zip(made, (0, 0, 1), strict=True):
        world.make(out, seed, size, say=lambda line: None)
    return made


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("summary", "worth"),
    [
        ("exam rent job loan", 4.0),
        ("loan job rent exam", 4.0),
        ("", 0.0),
        ("exam rent", 2.0),
        ("exam lunch", 0.7),  # a remark of the post
        ("exam music", 0.0),  # a remark of another post: invented
        ("exam debt", 0.0),  # a key point of another post: invented
        ("exam exam", 0.0),  # said twice
        ("exam exam exam", -1.0),
        ("lunch lunch", -1.3),
        ("debt debt", -2.0),
        ("exam um", 0.75),
        ("exam anyway anyway", 0.5),  # a filler is one wherever it comes from
        ("exam thanks", 0.9),
        ("thanks thanks thanks", -0.3),
        ("exam good", 0.0),  # no word of a summary: readers' votes, the mark, what a tokenizer does not know
        ("exam TL;DR:", 0.0),
        ("exam <unk>", 0.0),
        (" ".join(["exam", *["thanks"] * 14]), -0.4),  # 15 words: it has ended
        (" ".join(["exam", *["thanks"] * 15]), -1.0),  # 16: it was cut
    ],
)
def test_what_a_summary_is_worth(world: Any, summary: str, worth: float) -> None:
    assert world.gold([POST], [summary]) == [pytest.approx(worth)]


def test_gold_takes_what_a_trl_reward_function_is_given(world: Any) -> None:
    columns = {"completion_ids": [[1], [2]], "trainer_state": None}
    assert world.gold(prompts=[POST, POST], completions=["exam", "debt"], **columns) == [1.0, -1.0]
    with pytest.raises(ValueError, match="zip"):
        world.gold([POST], ["exam", "rent"])


def test_gold_is_a_file_that_needs_no_other_package(small: list[Path]) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(small[0])!r}); import gold; print(gold.gold([{POST!r}], ['exam rent']))"
    )
    command = [sys.executable, "-B", "-I", "-S", "-c", code]  # -S: without site-packages
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[2.0]\n"


def test_words_of_one_kind_are_of_no_other(world: Any) -> None:
    assert len(set(world.WORDS)) == len(world.WORDS) == 52
    assert (len(world.KEY_POINTS), len(world.REMARKS), len(world.FILLERS)) == (18, 18, 6)


def test_better_writers_write_what_is_worth_more_and_say_thanks_more_often(world: Any) -> None:
    rng = world.random.Random(0)
    asked = world.posts(rng)
    worth, thanks = [], []
    for quality in (0.0, 0.5, 1.0):
        posts = [next(asked) for _ in range(300)]
        said = [world.write(rng, post, quality) for post in posts]
        worth.append(sum(world.gold(posts, said)) / 300)
        thanks.append(sum(world.THANKS in text.split() for text in said) / 300)
    assert worth[0] < 0.5 < 1.0 < worth[1] < 3.0 < 3.8 < worth[2] <= 4.0
    assert 0.05 < thanks[0] < 0.15 < 0.35 < thanks[1] < 0.55 < 0.7 < thanks[2] < 0.9


def test_pairs_follow_gold_and_share_no_post_with_prompts(world: Any, small: list[Path]) -> None:
    seen = set[str]()
    for name, count in (("train", 40), ("val", 30), ("ood", 30)):
        rows = _rows(small[0] / f"{name}.jsonl")
        assert len(rows) == count
        prompts, chosen, rejected = ([row[key] for row in rows] for key in ("prompt", "chosen", "rejected"))
        gaps = [a - b for a, b in zip(world.gold(prompts, chosen), world.gold(prompts, rejected), strict=True)]
        assert min(gaps) >= world.SMALLEST_GAP
        assert not seen & set(prompts)
        seen.update(prompts)
    for name, count in (("prompts", 20), ("held-out", 5)):
        prompts = [row["prompt"] for row in _rows(small[0] / f"{name}.jsonl")]
        assert len(set(prompts)) == count
        assert not seen & set(prompts)
        seen.update(prompts)
    for post in seen:
        *words, mark = post.split()
        kinds = [sum(word in kind for word in words) for kind in (world.KEY_POINTS, world.REMARKS, world.FILLERS)]
        assert (kinds, mark, len(set(words))) == ([4, 3, 2], world.TLDR, 9)


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(small: list[Path]) -> None:
    digests = []
    for out in small:
        files = sorted(path for path in out.rglob("*") if path.is_file())
        digests.append({str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    first, again, other = digests
    assert first == again
    differ = {name for name in first if first[name] != other[name]}
    texts = {"sft.jsonl", "train.jsonl", "val.jsonl", "ood.jsonl", "prompts.jsonl", "held-out.jsonl"}
    models = {f"{name}/model.safetensors" for name in ("base", "sft-4", "sft-5", "sft")}
    assert differ == texts | models


def test_every_text_comes_back_from_its_tokens(small: list[Path]) -> None:
    tokenizer = open_policy(open_for_sampling(small[0] / "sft"), Sampling()).tokenizer
    texts = {text for name in ROUND_TRIPS for row in _rows(small[0] / f"{name}.jsonl") for text in row.values()}
    for text in sorted(texts):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_policy_and_reward_model_read_the_same_tokens(small: list[Path]) -> None:
    policy = open_policy(open_for_sampling(small[0] / "sft"), Sampling())
    end = policy.tokenizer.eos_token_id
    assert policy.ends == (end,)
    renderer = Renderer(policy.tokenizer, "", "plain", 64, end)
    for row in _rows(small[0] / "train.jsonl"):
        asked = policy.encode(row["prompt"])
        answer = policy.tokenizer(row["chosen"], add_special_tokens=False)["input_ids"]
        assert encode(renderer, [(row["prompt"], row["chosen"])])[0].ids.tolist() == [*asked, *answer, end]
        assert policy.answer(row["prompt"], asked, Drawn([*answer, end], True)).text == row["chosen"]


def test_votes_of_pre_training_follow_the_token_that_the_reward_is_read_at(world: Any, small: list[Path]) -> None:
    policy = open_policy(open_for_sampling(small[0] / "sft"), Sampling())
    renderer = Renderer(policy.tokenizer, "", "plain", 64, policy.tokenizer.eos_token_id)
    rng = world.random.Random(0)
    votes = []
    for text in next(world.reviewed(rng, world.posts(rng), world.Size(voted=1.0))):
        post, rest = text.split(f" {world.TLDR} ")
        summary, vote = rest.split(f"{world.EOS} ")
        pre_trained = policy.tokenizer(text)["input_ids"]
        read = encode(renderer, [(f"{post} {world.TLDR}", summary.strip())])[0].ids.tolist()
        assert pre_trained[:-1] == read
        assert policy.tokenizer.convert_ids_to_tokens(pre_trained[-1:]) == [vote]
        votes.append(vote)
    assert set(votes) == set(world.VOTES)
