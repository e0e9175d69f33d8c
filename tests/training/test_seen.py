"""What is said of models that were trained on the prompts they are judged on; runs and merges are built by hand."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import bot, user

from warmerge.errors import Finding
from warmerge.rewards.bench import Measuring
from warmerge.rewards.pairs import read_preferences
from warmerge.training import seen
from warmerge.training.preparation import _for_members
from warmerge.training.recipe import Recipe
from warmerge.training.record import Asked, question_of, write_json
from warmerge.training.seen import seen_in_training
from warmerge.training.settings import TrainSettings
from warmerge.weights.output import made_of

Row = Mapping[str, Any]
ROWS = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(10)]
ADVICE = "models do better on what they were trained on: use other prompts"
UNKNOWN = "whether these models were trained on these prompts is unknown"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_data(path: str | Path, rows: Sequence[Row]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def trained(out: str | Path, data: str, members: int = 1, **measuring: Any) -> list[Path]:
    """The folders of a run's members, with the train.json that `warmerge train --data DATA -o OUT` writes."""
    out, how = Path(out), Measuring(**measuring)
    asked = Asked(base=("lm",), data=data, settings=TrainSettings(Recipe(steps=1, batch=2, warmup=0)))
    read = read_preferences(data, skip_bad_rows=how.skip_bad_rows, limit=how.limit, seed=how.seed)
    folders = [out / "members" / f"{i:02d}" for i in range(1, members + 1)]
    for folder in folders:
        folder.mkdir(parents=True)
    write_json(out / "train.json", {"asked": question_of(asked, read, how), **_for_members(asked, how)})
    return folders


def merged(folder: str | Path, *members: str | Path, **others: str) -> Path:
    """A merge's folder with the part of warmerge.json that names what it was made of."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    entries = [*(("member", str(member)) for member in members), *others.items()]
    inputs = [{"role": role, "checkpoint": name, "fingerprint": "0"} for role, name in entries]
    (folder / "warmerge.json").write_text(json.dumps({"command": [], "inputs": inputs}))
    return folder


def said(folders: Sequence[Path], prompts: Sequence[Any]) -> list[str]:
    """What is said, without the folder that one is in."""
    found = seen_in_training(folders, prompts)
    assert all(isinstance(finding, Finding) for finding in found)
    return [str(finding).replace(str(Path.cwd()) + os.sep, "") for finding in found]


def shared(count: int, total: int, data: str = "pairs.jsonl", run: str = "runs") -> str:
    where = os.path.join(run, "train.json")
    return f"{where}: {count} of {total} prompts are in its training data ({data}); {ADVICE}"


# --- members ----------------------------------------------------------------------------------------------------------


def test_prompts_in_the_training_data_are_counted_once_for_each_run() -> None:
    write_data("pairs.jsonl", ROWS)
    folders = trained("runs", "pairs.jsonl", members=3)
    assert said(folders, ["p1", "new", "p2", "p1", "new too"]) == [shared(2, 4)]
    assert said(folders[2:], ["p9"]) == [shared(1, 1)]
    assert said(folders, ["new", "p", "p1 ", "P1"]) == []
    assert said(folders, []) == []
    assert said([], ["p1"]) == []


def test_each_run_is_named() -> None:
    write_data("pairs.jsonl", ROWS)
    write_data("more.jsonl", ROWS[:2])
    write_data("others.jsonl", [{**row, "prompt": "q" + row["prompt"]} for row in ROWS])
    folders = [
        trained(out, data)[0] for out, data in (("b", "pairs.jsonl"), ("a", "more.jsonl"), ("c", "others.jsonl"))
    ]
    assert said(folders, ["p1", "p5"]) == [shared(1, 2, "more.jsonl", "a"), shared(2, 2, "pairs.jsonl", "b")]


def test_a_model_without_any_record_says_nothing(here: Path) -> None:
    write_data("pairs.jsonl", ROWS)
    (member,) = trained("runs", "pairs.jsonl")
    others = [
        here / "plain",
        here / "runs" / "init",
        here / "runs" / "other" / "01",
        here / "no" / "x",
    ]
    for folder in others[:-1]:
        folder.mkdir(parents=True)
    assert said(others, ["p1"]) == []
    # A member of something else: there is no train.json where a run would have it.
    shutil.copytree(member, here / "copied" / "members" / "01")
    assert said([here / "copied" / "members" / "01"], ["p1"]) == []


def test_a_member_is_found_by_any_path_to_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data("pairs.jsonl", ROWS)
    trained("runs", "pairs.jsonl")
    (here / "link").symlink_to(here / "runs" / "members" / "01")
    for folder in ("runs/members/01", "./runs/../runs/members/01", "link", str(here / "link")):
        assert said([Path(folder)], ["p1"]) == [shared(1, 1)]
    monkeypatch.chdir(here / "runs" / "members")
    assert str(seen_in_training([Path("01")], ["p1"])[0]).endswith(shared(1, 1))


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_a_message_of_the_user_is_the_same_prompt_as_its_text() -> None:
    write_data("pairs.jsonl", [{"prompt": [user("as message")], "chosen": [bot("a")], "rejected": [bot("b")]}])
    write_data("texts.jsonl", [{"prompt": "as text", "chosen": "a", "rejected": "b"}])
    messages, texts = trained("m", "pairs.jsonl"), trained("t", "texts.jsonl")
    prompts = ["as message", (user("as text"),), (bot("as text"),), (user("as text"), bot("as message"))]
    assert said(messages, prompts) == [shared(1, 4, "pairs.jsonl", "m")]
    assert said(texts, prompts) == [shared(1, 4, "texts.jsonl", "t")]
    assert said(messages, [(user("as message"),), "as message"]) == [shared(1, 1, "pairs.jsonl", "m")]


def test_conversations_are_the_same_where_all_messages_are() -> None:
    talk = [{"role": "system", "content": "Be brief."}, user("Why?")]
    write_data("pairs.jsonl", [{"chosen": [*talk, bot("a")], "rejected": [*talk, bot("b")]}])
    folders = trained("runs", "pairs.jsonl")
    assert said(folders, [tuple(talk), tuple(talk[1:]), "Why?"]) == [shared(1, 2)]


def test_whole_dialogues_are_known_by_how_both_begin() -> None:
    """Sets such as hh-rlhf have no prompt of their own: what both answers begin with is one, as in a pool."""
    asked = "\n\nHuman: Why?\n\nAssistant:"
    write_data("pairs.jsonl", [{"chosen": f"{asked} Because.", "rejected": f"{asked} Bah."}])
    assert said(trained("runs", "pairs.jsonl"), [asked, "", "Why?"]) == [shared(1, 3)]
    # Two prompts that are empty are not one.
    write_data("empty.jsonl", [{"prompt": "", "chosen": "a", "rejected": "b"}])
    assert said(trained("empty", "empty.jsonl"), ["", "a"]) == []


# --- data that is not what it was -------------------------------------------------------------------------------------


def test_changed_data_is_said_to_be_also_where_it_shares_nothing_now() -> None:
    write_data("pairs.jsonl", ROWS)
    folders = trained("runs", "pairs.jsonl")
    write_data("pairs.jsonl", ROWS[:5])
    changed = "pairs.jsonl, as it is now: it has changed since"
    assert said(folders, ["p1", "p7"]) == [shared(1, 2, changed)]
    # The p7 that the models were trained on is gone: nothing is known of it.
    what = "its training data pairs.jsonl has changed since: whether it held these prompts is unknown"
    assert said(folders, ["p7"]) == [f"{os.path.join('runs', 'train.json')}: {what}"]


def test_what_a_limit_left_out_was_not_trained_on() -> None:
    write_data("pairs.jsonl", ROWS)
    for seed in (0, 7):
        folders = trained(f"runs{seed}", "pairs.jsonl", limit=4, seed=seed)
        drawn = {c.prompt for c in read_preferences("pairs.jsonl", limit=4, seed=seed).comparisons}
        assert len(drawn) == 4
        every = [row["prompt"] for row in ROWS]
        assert said(folders, every) == [shared(4, 10, run=f"runs{seed}")]
        assert said(folders, [prompt for prompt in every if prompt not in drawn]) == []
    write_data("pairs.jsonl", ROWS[::-1])
    (found,) = said(folders, ["new"])
    assert "has changed since" in found


def test_bad_rows_that_were_left_out_are_left_out_again() -> None:
    write_data("pairs.jsonl", [*ROWS, {"prompt": "p10", "chosen": "yes", "rejected": None}])
    folders = trained("runs", "pairs.jsonl", skip_bad_rows=True)
    assert said(folders, ["p1", "p10"]) == [shared(1, 2)]


def test_data_that_is_missing_leaves_it_unknown(here: Path) -> None:
    write_data("pairs.jsonl", ROWS)
    folders = trained("runs", "pairs.jsonl")
    (here / "pairs.jsonl").unlink()
    what = "its training data pairs.jsonl is not here: whether it holds these prompts is unknown"
    assert said(folders, ["p1"]) == [f"{os.path.join('runs', 'train.json')}: {what}"]
    # A data set on the Hub is not fetched for this.
    path = here / "runs" / "train.json"
    path.write_text(path.read_text().replace("pairs.jsonl", "org/name:train"))
    assert said(folders, ["p1"]) == [
        f"{os.path.join('runs', 'train.json')}: {what.replace('pairs.jsonl', 'org/name:train')}"
    ]


@pytest.mark.parametrize("name", ["pairs.json.gz", "pairs.json"])
def test_data_that_cannot_be_read_leaves_it_unknown(here: Path, name: str) -> None:
    data = json.dumps(ROWS).encode()
    (here / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    folders = trained("runs", name)
    (here / name).write_bytes((here / name).read_bytes()[:-9])
    (found,) = said(folders, ["p1"])
    where = os.path.join("runs", "train.json")
    assert found.startswith(f"{where}: its training data cannot be read, so that its prompts are unknown: refused: ")
    assert name in found


def test_data_is_looked_for_beside_the_run_and_then_here(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data("pairs.jsonl", ROWS)
    (member,) = trained("runs", "pairs.jsonl")
    member = member.absolute()
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert str(seen_in_training([member], ["p1"])[0]).endswith(shared(1, 1))
    # A file of that name here is another one: it must not speak for the run's.
    write_data("pairs.jsonl", [{**row, "prompt": "other"} for row in ROWS])
    assert str(seen_in_training([member], ["p1"])[0]).endswith(shared(1, 1))
    assert seen_in_training([member], ["other"]) == []
    # Where the run's is gone, what is here is not what it was trained on.
    (here / "pairs.jsonl").unlink()
    assert "pairs.jsonl has changed since" in str(seen_in_training([member], ["p1"])[0])


def test_named_data_and_paths_with_an_equals_sign_are_found(here: Path) -> None:
    (here / "lr=1").mkdir()
    write_data("lr=1/pairs.jsonl", ROWS)
    write_data("x=y.jsonl", ROWS)
    assert said(trained("a", "val=lr=1/pairs.jsonl"), ["p1"]) == [shared(1, 1, "lr=1/pairs.jsonl", "a")]
    assert said(trained("b", "x=y.jsonl"), ["p1"]) == [shared(1, 1, "x=y.jsonl", "b")]
    absolute = str(here / "x=y.jsonl")
    assert said(trained("c", absolute), ["p1"]) == [shared(1, 1, "x=y.jsonl", "c")]


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "5", "{}", '{"asked": {}}', '{"asked": null}', "\ud83d",
        '{"asked": {"data": 5, "data_fingerprint": "", "limit": null}, "measuring": {"limit": null, "seed": 0}}',
        '{"asked": {"data": "a=", "data_fingerprint": "", "limit": null}, "measuring": {"limit": null, "seed": 0}}',
        '{"asked": {"data": "pairs.jsonl", "data_fingerprint": "", "limit": null}}',
        '{"asked": {"data": "pairs.jsonl"}, "measuring": {"limit": null, "seed": 0}}',
    ],
)  # fmt: skip
def test_a_train_json_that_says_nothing_leaves_it_unknown(here: Path, text: str) -> None:
    write_data("pairs.jsonl", ROWS)
    folders = trained("runs", "pairs.jsonl")
    (here / "runs" / "train.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert said(folders, ["p1"]) == [f"{os.path.join('runs', 'train.json')}: cannot be read: {UNKNOWN}"]


# --- merges -----------------------------------------------------------------------------------------------------------


def test_a_merge_has_seen_what_its_members_have(here: Path) -> None:
    write_data("pairs.jsonl", ROWS)
    members = trained("runs", "pairs.jsonl", members=2)
    for name, inputs in (
        ("typed", members),  # relative to where the merge was made
        ("absolute", [member.absolute() for member in members]),
        ("runs/warm", members),
        ("deep/er/warm", [members[1]]),
    ):
        assert said([merged(name, *inputs)], ["p1", "p2", "new"]) == [shared(2, 3)], name
    assert said([here / "typed", here / "runs" / "warm", *members], ["p1"]) == [shared(1, 1)]


def test_inputs_of_a_merge_are_looked_for_beside_it_where_it_was_made_elsewhere(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data("pairs.jsonl", ROWS)
    members = trained("runs", "pairs.jsonl")
    folder = merged("warm", *members).absolute()
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert str(seen_in_training([folder], ["p1"])[0]).endswith(shared(1, 1))


def test_a_new_head_has_seen_what_its_model_has(here: Path) -> None:
    """`warmerge probe` names its one input; prompts its own pairs hold are another question."""
    write_data("pairs.jsonl", ROWS)
    merged("warm", *trained("runs", "pairs.jsonl"))
    (here / "probed").mkdir()
    record = {"input": {"checkpoint": "warm", "fingerprint": "0"}, "sets": []}
    (here / "probed" / "warmerge.json").write_text(json.dumps(record))
    assert said([here / "probed"], ["p1", "x"]) == [
        f"runs/train.json: 1 of 2 prompts are in its training data (pairs.jsonl); {ADVICE}"
    ]


def test_merges_of_merges_are_followed_and_a_circle_of_them_ends() -> None:
    write_data("pairs.jsonl", ROWS)
    write_data("more.jsonl", ROWS[:2])
    first, second = trained("a", "pairs.jsonl")[0], trained("b", "more.jsonl")[0]
    merged("inner", second)
    merged("itself", "itself", first)
    merged("there", "back", first)
    merged("back", "there", second)
    both = [shared(2, 2, "pairs.jsonl", "a"), shared(1, 2, "more.jsonl", "b")]
    assert said([merged("outer", first, "inner")], ["p1", "p5"]) == both
    assert said([Path("itself")], ["p1", "p5"]) == both[:1]
    for name in ("there", "back"):
        assert said([Path(name)], ["p1", "p5"]) == both


def test_inputs_that_are_not_on_this_machine_say_nothing_and_a_base_counts_as_the_members_do() -> None:
    write_data("pairs.jsonl", ROWS)
    members = trained("runs", "pairs.jsonl", members=2)
    assert said([merged("hub", "org/model", "org/model@v1", "hf://org/model", "gone/members/01")], ["p1"]) == []
    assert said([merged("mixed", "org/model", members[1])], ["p1"]) == [shared(1, 1)]
    # base + lambda (member - base) is made of the base too.
    assert said([merged("vectors", "org/model", base=str(members[0]))], ["p1"]) == [shared(1, 1)]


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "{}", '{"inputs": null}', '{"inputs": {"a": 1}}', '{"inputs": [5]}',
        '{"inputs": [{"role": "member"}]}', '{"inputs": []}', "\udc00",
    ],
)  # fmt: skip
def test_a_warmerge_json_that_names_no_members_says_nothing(here: Path, text: str) -> None:
    folder = merged("warm")
    (folder / "warmerge.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert said([folder], ["p1"]) == []


def chained(root: Path, names: Callable[[int], list[str]], count: int) -> Path:
    """Folders of which each is a merge of the next one, by these names."""
    for number in range(count):
        (root / str(number)).mkdir(parents=True)
        inputs = [{"checkpoint": name} for name in names(number + 1)]
        (root / str(number) / "warmerge.json").write_text(json.dumps({"inputs": inputs}))
    return root / "0"


def test_a_merge_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge of merges, or a record that names the same one twice."""
    read: list[Path] = []

    def looked_at(folder: Path) -> list[dict[str, Any]]:
        read.append(folder)
        return made_of(folder)

    monkeypatch.setattr(seen, "made_of", looked_at)
    first = chained(tmp_path / "m", lambda number: [f"{number}", f"../m/{number}"], 8)
    assert seen_in_training([first], ["Why?"]) == []
    assert len(read) <= 20


def test_a_long_chain_of_merges_is_followed(tmp_path: Path) -> None:
    first = chained(tmp_path, lambda number: [f"{number}"], 600)
    assert seen_in_training([first], ["Why?"]) == []
