"""push and average --push as a user runs them: what is printed where, what is asked, and that others can use it."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loopback_hub import CLIENT_WARNING, Fault, LoopbackHub
from reward_world import World
from safetensors.torch import load_file, save_file
from test_cli import Done, environment, here

import warmerge
from warmerge.errors import RefusedError
from warmerge.weights.locate import make_local, open_checkpoint

pytestmark = pytest.mark.filterwarnings(CLIENT_WARNING)
MODEL = ["README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "warmerge.json"]
QUICK = ("-y", "--no-run")


@pytest.fixture(scope="module")
def merged(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with members a, b, c and their average `warm`."""
    root = tmp_path_factory.mktemp("publishing")
    for name, licence in zip("abc", ("mit", "mit", "apache-2.0"), strict=True):
        shutil.copytree(getattr(world, name), root / name)
        (root / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    warmerge.average([root / name for name in "abc"], root / "warm")
    return root


@pytest.fixture
def warm(merged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged / "warm", tmp_path / "warm"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with LoopbackHub({}) as running:
        running.tokens = {"good"}
        running.use(monkeypatch, tmp_path / "cache", token="good")
        yield running


def variables(hub: LoopbackHub, cache: Path) -> dict[str, str]:
    """Of a process that talks to this Hub only. Its client warns of itself, so warnings are no errors there."""
    return environment(**hub.environment(cache), HF_TOKEN="good", OMP_NUM_THREADS="1")


def run(hub: LoopbackHub, *arguments: str | Path, cwd: Path) -> Done:
    done = subprocess.run(
        [sys.executable, "-m", "warmerge", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env=variables(hub, cwd / "cache"), timeout=200,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def writes(hub: LoopbackHub) -> list[str]:
    return [f"{request.method} {request.path}" for request in hub.requests if request.method not in ("GET", "HEAD")]


# --- processes of their own ---


@pytest.mark.timeout(300)  # three processes that import transformers
def test_from_members_on_the_hub_to_a_reward_for_anybody(hub: LoopbackHub, merged: Path, tmp_path: Path) -> None:
    """average --stream --push, then the very lines of the card that lies on the Hub, in a fresh cache."""
    for name in "abc":
        hub.put(f"me/{name}", merged / name)
    arguments = ("average", "--stream", "me/a", "me/b", "me/c", "-o", "out", "--push", "warm-rm", "-y")
    done = run(hub, *arguments, cwd=tmp_path)
    assert (done.code, done.out) == (0, f"out\n{hub.url}/me/warm-rm\n"), done.err
    lines = done.err.splitlines()
    assert lines[0] == "new repository me/warm-rm (private)"
    assert [line.split()[0] for line in lines[1:7]] == MODEL
    assert all(line.endswith("  send") for line in lines[1:7])
    said = "member 1: mit, member 2: mit, member 3: apache-2.0"
    assert lines[7:] == [f"licence: none; name one with --license ({said})"]
    files = hub.repos["me/warm-rm"]
    local, expected = load_file(tmp_path / "out" / "model.safetensors"), load_file(merged / "warm/model.safetensors")
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert all(torch.equal(local[name], expected[name]) for name in expected)
    card = files["README.md"].decode()
    code = re.search(r"```python\n(.+?)\n# (-?[\d.]+)\n```", card, re.DOTALL)
    assert code
    cache = variables(hub, tmp_path / "another-cache")
    read = subprocess.run(
        [sys.executable, "-c", code[1]], capture_output=True, text=True, cwd=tmp_path, env=cache, timeout=200
    )
    assert (read.returncode, read.stdout) == (0, f"{code[2]}\n"), read.stderr
    assert any("/me/warm-rm/resolve/" in request.path for request in hub.requests)


def test_offline_the_hub_is_not_asked(hub: LoopbackHub, merged: Path, tmp_path: Path) -> None:
    for name in "abc":
        hub.put(f"me/{name}", merged / name)
    make_local([open_checkpoint("me/a"), open_checkpoint("me/b")])  # now they are in the cache
    hub.requests.clear()
    done = run(hub, "average", "me/a", "me/b", "-o", "out", "--offline", cwd=tmp_path)
    assert (done.code, done.out) == (0, "out\n"), done.err
    done = run(hub, "average", "me/a", "me/c", "-o", "other", "--stream", "--offline", cwd=tmp_path)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(
        "warmerge: me/c is no local folder, and not in the Hub's cache; without --offline and HF_"
    )
    assert hub.requests == []


def test_push_in_a_process_of_its_own(hub: LoopbackHub, warm: Path, tmp_path: Path) -> None:
    (warm / "optimizer.pt").write_text("state")
    done = run(hub, "push", "warm", "me/x", *QUICK, "--license", "mit", "-m", "First", cwd=tmp_path)
    assert (done.code, done.out) == (0, f"{hub.url}/me/x\n"), done.err
    assert done.err.splitlines()[7:] == [
        "not sent: 'optimizer.pt'",
        "licence: mit (as given)",
        "warning: README.md: its lines that load and score were not run: --no-run",
    ]
    assert hub.log("me/x")[0].title == "First"
    assert sorted(hub.repos["me/x"]) == [".gitattributes", *MODEL]


def test_a_terminal_is_asked(hub: LoopbackHub, warm: Path, tmp_path: Path) -> None:
    """For the licence, as the members do not agree; and whether to send, which is declined."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "warmerge", "push", "warm", "me/x", "--no-run"], cwd=tmp_path,
        env=variables(hub, tmp_path / "cache") | {"TERM": "dumb"}, stdin=follower, stderr=follower,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(follower)
    watchdog = threading.Timer(90, process.kill)
    watchdog.start()
    shown = ""
    answers = {"empty: state none):": "bsd-3-clause\n", "[y/N]:": "n\n"}
    try:
        while True:
            shown += os.read(leader, 4096).decode()
            for question, answer in list(answers.items()):
                if question in shown:
                    os.write(leader, answers.pop(question).encode())
                    assert answer
    except OSError:  # Linux says so when the other end is closed
        pass
    finally:
        watchdog.cancel()
        os.close(leader)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out.strip()) == (1, ""), shown
    assert answers == {}, shown
    said = "member 1: mit, member 2: mit, member 3: apache-2.0"
    assert f"Licence, such as apache-2.0 ({said}; empty: state none):" in shown
    assert "new repository me/x (private)" in shown
    assert "licence: bsd-3-clause (as given)" in shown
    assert re.search(r"Send \d+\.\d kB\? \[y/N\]:\s*n\s+Aborted", shown)
    assert "Traceback" not in shown
    assert writes(hub) == []


# --- within this process ---


@pytest.mark.parametrize("arguments", [["push", "WARM", "me/x"], ["average", "A", "B", "-o", "OUT", "--push", "me/x"]])
def test_without_a_terminal_nobody_can_be_asked(
    hub: LoopbackHub, merged: Path, tmp_path: Path, arguments: list[str]
) -> None:
    places = {"WARM": merged / "warm", "A": merged / "a", "B": merged / "b", "OUT": tmp_path / "out"}
    done = here(*(places.get(argument, argument) for argument in arguments))
    message = "this is no terminal, so nobody can be asked; add -y to send without asking, or --dry-run"
    assert done == Done(2, "", f"warmerge: {message}\n")
    assert hub.requests == []
    assert not (tmp_path / "out").exists()


def test_dry_run_prints_the_card(hub: LoopbackHub, warm: Path) -> None:
    done = here("push", warm, "me/x", "--dry-run", "--no-run", "--license", "mit")
    assert done.code == 0
    assert done.out.startswith("---\nlibrary_name: transformers\nlicense: mit\n")
    assert "\n# x\n" in done.out
    assert done.err.startswith("new repository me/x (private)\n  README.md ")
    assert writes(hub) == []
    assert hub.repos == {}
    here("push", warm, "me/x", *QUICK, "--license", "mit")
    assert hub.repos["me/x"]["README.md"].decode() == done.out.removesuffix("\n")


def test_json_is_one_object(hub: LoopbackHub, warm: Path) -> None:
    dry = here("push", warm, "me/x", "--dry-run", "--no-run", "--json")
    assert (dry.code, json.loads(dry.out)["commit"]) == (0, None)
    assert json.loads(dry.out)["url"] in ("", f"{hub.url}/me/x")
    done = here("push", warm, "me/x", *QUICK, "--json", "--public")
    found = json.loads(done.out)
    assert done.code == 0
    assert (found["url"], found["commit"]) == (f"{hub.url}/me/x", hub.commits["me/x"])
    assert (found["repo"], found["private"], found["exists"]) == ("me/x", False, False)
    assert sorted(found["files"]) == MODEL
    assert "new repository me/x (public)" in done.err


def test_an_unchanged_folder(hub: LoopbackHub, warm: Path) -> None:
    here("push", warm, "me/x", *QUICK)
    hub.requests.clear()
    done = here("push", warm, "me/x", *QUICK)
    assert (done.code, done.out) == (0, f"{hub.url}/me/x\n")
    assert "\nnothing to send: the repository is already as this folder\n" in done.err
    assert [line.split()[-1] for line in done.err.splitlines()[1:7]] == ["unchanged"] * 6
    assert writes(hub) == []


def test_what_will_be_deleted_is_shown(hub: LoopbackHub, warm: Path) -> None:
    hub.put("me/x", {"pytorch_model.bin": b"old", "LICENSE": b"text"})
    done = here("push", warm, "me/x", *QUICK)
    assert done.err.startswith("me/x (public)\n")
    assert re.search(r"^  pytorch_model\.bin +delete$", done.err, re.M)
    assert "LICENSE" not in done.err


def test_branches_and_pull_requests(hub: LoopbackHub, warm: Path) -> None:
    hub.put("me/x", {"LICENSE": b"text"})
    branch = here("push", warm, "me/x", *QUICK, "--revision", "v2")
    assert (branch.code, branch.out) == (0, f"{hub.url}/me/x/tree/v2\n")
    assert branch.err.startswith("me/x, branch v2 (public)\n")
    pull = here("push", warm, "me/x", *QUICK, "--create-pr")
    assert (pull.code, pull.out) == (0, f"{hub.url}/me/x/discussions/1\n")
    assert pull.err.startswith("pull request to me/x (public)\n")
    assert list(hub.repos["me/x"]) == ["LICENSE"]
    both = here("push", warm, "me/x", *QUICK, "--create-pr", "--revision", "v2")
    assert both == Done(2, "", "warmerge: --create-pr asks to change the main branch; leave out --revision\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["NOWHERE", "me/x"], 2, "NOWHERE: no such folder; push takes the folder of a reward model"),
        (["WARM", "me/x@v1"], 2, "me/x@v1: give the branch with --revision v1, not with an '@'"),
        (["WARM", "a b"], 2, "no local folder 'a b', and not a Hub id (org/name or org/name@revision); check the path"),
        (["WARM", "me/open", "--private"], 2,
         "me/open exists and is public; make it private at URL/me/open/settings, or leave out --private"),
        (["WARM", "me/x", "--results", "WARM"], 2,
         "--results WARM: expected eval.json or curve.json in it, found neither"),
        (["WARM", "me/x", "--base-model", "/home/me"], 2,
         "model card: expected Hub ids such as org/name as base model, found '/home/me'"),
        (["BROKEN", "me/x"], 3, "refused: BROKEN/model.safetensors: tensor 'score.weight' holds nan at element 1; "
         "leave this checkpoint out, or repair it"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(
    hub: LoopbackHub, warm: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    hub.put("me/open", {"LICENSE": b""})
    broken = Path(shutil.copytree(warm, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["score.weight"][0, 1] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    places = {"WARM": str(warm), "NOWHERE": str(tmp_path / "no"), "BROKEN": str(broken), "URL": hub.url}
    done = here("push", *(places.get(argument, argument) for argument in arguments), *QUICK)
    expected = re.sub("|".join(places), lambda found: places[found[0]], message)
    assert done == Done(code, "", f"warmerge: {expected}\n")
    assert writes(hub) == []


def test_debug_shows_where_it_was(hub: LoopbackHub, warm: Path) -> None:
    (warm / "config.json").unlink()
    with pytest.raises(RefusedError, match=r"has no config\.json"):
        here("push", warm, "me/x", *QUICK, "--debug")


def test_the_hubs_error_has_exit_code_1(hub: LoopbackHub, warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    done = here("push", warm, "me/x", *QUICK)
    message = "me/x cannot be written without a token; log in with `hf auth login`, or set HF_TOKEN"
    assert done == Done(1, "", f"warmerge: {message}\n")


# --- average --push ---


def test_a_target_that_cannot_be_written_to_is_found_out_before_the_merge(
    hub: LoopbackHub, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members, out = [merged / "a", merged / "b"], tmp_path / "out"
    for repo, code in (("me/x@v1", 2), ("a b", 2)):
        assert here("average", *members, "-o", out, "--push", repo, "-y").code == code
    monkeypatch.setenv("HF_TOKEN", "wrong")
    done = here("average", *members, "-o", out, "--push", "x", "-y")
    assert (done.code, done.out) == (1, "")
    assert "does not accept your token" in done.err
    assert not out.exists()


def test_a_merge_that_cannot_be_sent_is_kept(
    hub: LoopbackHub, merged: Path, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("warmerge.pipeline.publication.readme.fits_in_memory", lambda checkpoint: False)
    hub.faults.append(Fault("hangup", path="/commit/", times=99))
    out = tmp_path / "out"
    done = here("average", merged / "a", merged / "b", "-o", out, "--push", "me/x", "-y")
    assert (done.code, done.out) == (1, "")
    assert f"the merge is in {out}; `warmerge push {out} me/x` publishes it\n" in done.err
    assert re.search(
        r"^warmerge: me/x cannot be written: .+ check the network and run the command again$", done.err, re.M
    )
    assert (out / "model.safetensors").exists()
    hub.faults.clear()
    again = here("push", out, "me/x", *QUICK)
    assert (again.code, again.out) == (0, f"{hub.url}/me/x\n")


def test_average_push_json_is_one_object(
    hub: LoopbackHub, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("warmerge.pipeline.publication.readme.fits_in_memory", lambda checkpoint: False)
    out = tmp_path / "out"
    done = here("average", merged / "a", merged / "b", "-o", out, "--push", "me/x", "-y", "--json")
    found = json.loads(done.out)
    assert (done.code, found["out"], found["url"]) == (0, str(out), f"{hub.url}/me/x")
    assert "licence: mit (that of all members)" in done.err


def test_average_push_dry_run_asks_for_nothing_to_be_written(hub: LoopbackHub, merged: Path) -> None:
    done = here("average", merged / "a", merged / "b", "--push", "me/x", "--dry-run")
    assert done.code == 0
    assert "checks        all passed; nothing was written" in done.out
    assert writes(hub) == []
