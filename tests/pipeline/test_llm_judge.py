"""A language model as judge: what it is asked, what its replies say, how a server fails, and what is kept."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import bot, user
from loopback_llm import Llm, Request, Response, answers_in, by, completion, failure, serve, slowly

from warmerge.errors import Finding, Interrupted, RemoteError, UsageError, WarmergeError
from warmerge.pipeline.judging import llm as client
from warmerge.pipeline.judging.llm import ATTEMPTS, Client, LlmJudge, is_address
from warmerge.pipeline.judging.template import TEMPLATE, check_template, filled, read_template, verdict_of
from warmerge.pipeline.judging.verdicts import Asked, Question, ask_all, question
from warmerge.pipeline.sampling import pool_file

KEY = "sk-very-secret-93"


@pytest.fixture
def model() -> Iterator[Llm]:
    """A judge that prefers the longer answer."""
    with serve(by(len)) as running:
        yield running


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardly any waiting, and no key of whoever runs the tests."""
    monkeypatch.setattr(client, "_FIRST_WAIT", 0.001)
    monkeypatch.delenv(client.KEY_VARIABLE, raising=False)


def judge(model: Llm, **changes: Any) -> LlmJudge:
    return LlmJudge(model.url, "judge-1", **changes)


def questions(judge: LlmJudge, count: int) -> list[Question]:
    """Two orders for each of `count` prompts; the second answer is the longer one."""
    texts = ("short", "a longer answer")
    return [question(judge, f"prompt {i}", ("a", "b"), texts, order) for i in range(count) for order in (0, 1)]


def ask(judge: LlmJudge, content: str = "Which?", seed: int = 3) -> client.Reply:
    return Client(judge, seed, lambda seconds: None).ask(content)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(reply: str | Response) -> Callable[[Request], str | Response]:
    return lambda request: reply


def first(*replies: str | Response, then: Callable[[Request], str | Response]) -> Callable[[Request], str | Response]:
    """These replies, one each; then those of another one."""
    left = list(replies)
    return lambda request: left.pop(0) if left else then(request)


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_a_request_is_what_chat_completions_expect(model: Llm, monkeypatch: pytest.MonkeyPatch) -> None:
    model.reply = said("A")
    assert ask(judge(model, max_tokens=77), "Which? é {}") == ("A", "stop", None, ())
    (request,) = model.requests
    assert request.path == "/v1/chat/completions"
    assert request.body == {
        "model": "judge-1", "messages": [{"role": "user", "content": "Which? é {}"}], "temperature": 0, "seed": 3,
        "max_tokens": 77,
    }  # fmt: skip
    assert request.headers["Content-Type"] == "application/json"
    assert "Authorization" not in request.headers
    monkeypatch.setenv(client.KEY_VARIABLE, f" {KEY}\n")
    ask(judge(model))
    assert model.requests[1].headers["Authorization"] == f"Bearer {KEY}"
    monkeypatch.setenv("OTHER", "other")
    ask(replace(judge(model, key_variable="OTHER"), url=f"{model.url}/chat/completions/"))
    assert (model.requests[2].path, model.requests[2].headers["Authorization"]) == (request.path, "Bearer other")


def test_texts_stand_in_the_template_as_they_are() -> None:
    template = "{prompt}|{first}|{second}|{other}|{{first}}"
    texts = ("{first} \\1", "{second}{", "}é\n")
    assert filled(template, *texts) == "{first} \\1|{second}{|}é\n|{other}|{{second}{}"
    conversation = (user("Hi"), bot("Hey"), user("{prompt}?"))
    assert filled("{prompt}//{first}{second}", conversation, (bot("x"),), "") == (
        "user: Hi\n\nassistant: Hey\n\nuser: {prompt}?//x"
    )
    shown = filled(TEMPLATE, "Why?", "one", "two")
    assert answers_in(shown) == ("one", "two")
    assert shown.index("Why?") < shown.index("<answer_A>")
    assert "{" not in shown


def test_both_orders_are_two_questions(model: Llm) -> None:
    one = judge(model)
    straight, swapped = (question(one, "Q", ("a", "b"), ("one", "two"), order) for order in (0, 1))
    assert [answers_in(asked.content) for asked in (straight, swapped)] == [("one", "two"), ("two", "one")]
    # The pair the other way round asks the same two questions.
    assert [question(one, "Q", ("b", "a"), ("two", "one"), order).key for order in (1, 0)] == [
        straight.key,
        swapped.key,
    ]
    others = [
        question(replace(one, **{name: value}), "Q", ("a", "b"), ("one", "two"), 0).key
        for name, value in (
            ("model", "judge-2"), ("template", f"{TEMPLATE} "), ("max_tokens", 5), ("url", "http://127.0.0.1:1/v1")
        )
    ]  # fmt: skip
    others += [question(one, prompt, ("a", "b"), (text, "two"), 0).key for prompt, text in (("Q", "1"), ("R", "one"))]
    assert len({straight.key, swapped.key, *others}) == 8
    assert question(replace(one, timeout=5, parallel=1), "Q", ("x", "y"), ("one", "two"), 0).key == straight.key


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A", "A"), ("B\n", "B"), ("tie", "tie"), ("Tie.", "tie"), ("TIE", "tie"), ("a", "A"), ("**B**", "B"),
        ("[[A]]", "A"), ("`tie`", "tie"), ("B is wordy.\n\nA\n \n", "A"), ("Verdict: B", "B"), ("Answer A", "A"),
        ("Final verdict: **A**", "A"), ("The better one is A\nThe winner is: B.", "B"), ("**Answer:** tie", "tie"),
        ("<think>B? no</think>\nA", "A"), ("answer_B", "B"), ("My choice is A", "A"), ('"A"', "A"), ("A\r\n", "A"),
        # Nothing is guessed.
        ("A or B", None), ("A/B", None), ("A\nB is worse.", None), ("I prefer A", None), ("not A", None), ("AB", None),
        ("", None), (None, None), ("\n \n", None), ("C", None), ("A better answer", None), ("tie-break: A", None),
        ("Neither", None), ("A is better than B", None), ("BA", None), ("Answer", None), ("A.B", None), ("É", None),
    ],
)  # fmt: skip
def test_the_last_line_is_the_verdict(reply: str | None, verdict: str | None) -> None:
    assert verdict_of(reply) == verdict


def test_templates_are_checked(tmp_path: Path) -> None:
    good = "{prompt}{first}{second}"
    assert check_template(good) == good
    path = tmp_path / "t.txt"
    path.write_text(good)
    assert read_template(path) == good
    path.write_text("{first} {prompt")
    with pytest.raises(UsageError, match=r"t\.txt has no \{prompt\} and no \{second\}; it must hold"):
        read_template(path)
    path.write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"t\.txt is not UTF-8 \(byte 0\)"):
        read_template(path)
    with pytest.raises(UsageError, match=r"cannot read .*none: No such file"):
        read_template(tmp_path / "none")
    with pytest.raises(UsageError, match=r"the template has no \{prompt\}"):
        LlmJudge("http://localhost/v1", "m", template="{first}{second}")


@pytest.mark.parametrize(
    "url",
    ["ftp://h/v1", "http://", "http://me:pw@h/v1", "https://h/v1?key=1", "https://h/v1#x", "http://h:x/v1", "h:80/v1",
     "http://h:0/v1", "http://h\n/v1", "http://[/v1"],
)  # fmt: skip
def test_addresses_that_cannot_be_used(url: str) -> None:
    with pytest.raises(UsageError, match=r"^--judge: expected an address like http://localhost:8000/v1") as raised:
        LlmJudge(url, "m")
    assert "pw" not in str(raised.value)


def test_all_values_that_cannot_be_used_are_named() -> None:
    with pytest.raises(UsageError) as raised:
        LlmJudge("x", "", parallel=0, max_tokens=0, timeout=0)
    found = str(raised.value)
    for part in ("--judge:", "--judge-model:", "--parallel:", "--judge-tokens:", "--judge-timeout:"):
        assert part in found
    assert [is_address(x) for x in ("http://x", "HTTPS://x", "runs/1", "gold.py:gold")] == [True, True, False, False]


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    there = LlmJudge("http://example.org/v1", "m")
    assert (there.key(), there.doubts()) == (None, [])
    with pytest.raises(UsageError, match="--judge-key-env: the environment has no MY_KEY, or it is empty"):
        replace(there, key_variable="MY_KEY").key()
    monkeypatch.setenv(client.KEY_VARIABLE, KEY)
    assert there.doubts() == [
        Finding(there.url, "is not encrypted (http), and the key is sent there; https hides it on its way")
    ]
    assert replace(there, url="https://example.org/v1").doubts() == []
    assert replace(there, url="http://localhost:8000/v1").doubts() == []
    assert KEY not in repr(there)
    monkeypatch.setenv(client.KEY_VARIABLE, "two\nlines")
    with pytest.raises(UsageError, match=r"WARMERGE_JUDGE_KEY holds characters that no key has$"):
        there.key()


# --- a server that fails ----------------------------------------------------------------------------------------------


def test_a_busy_server_is_asked_again(model: Llm) -> None:
    busy = [failure(429, "slow down", **{"Retry-After": "7"}), failure(503), failure(500), Response(502, b"<html>")]
    model.reply = first(*busy, then=said("B"))
    waits: list[float] = []
    assert Client(judge(model), 0, waits.append).ask("?").text == "B"
    assert waits == [7.0, 0.002, 0.004, 0.008]
    assert len(model.requests) == 5


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (failure(500, "out of\x1b[0m order"), "answers with status 500 (out of [0m order)"),
        (failure(429, "slow down"), "is asked too often: lower --parallel (slow down)"),
        (Response(200, b"<html>hello"), "does not answer as chat completions do: '<html>hello'; check --judge"),
        (Response(200, b'{"choices": []}'), "does not answer as chat completions do: "),
        (Response(200, b'{"choices": [{"message": {"content": 5}}]}'), "does not answer as chat completions do: "),
        (failure(200, "overloaded"), "does not answer as chat completions do: 'overloaded'"),
    ],
)
def test_patience_has_an_end(model: Llm, response: Response, message: str) -> None:
    model.reply = said(response)
    with pytest.raises(RemoteError) as raised:
        ask(judge(model))
    assert str(raised.value).startswith(f"{model.url} {message}")
    assert len(model.requests) == ATTEMPTS


@pytest.mark.parametrize(
    ("status", "key", "message"),
    [
        (401, None, "wants a key (no): put it into WARMERGE_JUDGE_KEY, or name its variable with --judge-key-env"),
        (401, KEY, "does not accept the key in WARMERGE_JUDGE_KEY (no); check the key, and what it may use"),
        (403, KEY, "does not accept the key in WARMERGE_JUDGE_KEY (no); check the key, and what it may use"),
        (404, None, "knows no such address, or no model 'judge-1' (no); --judge ends before /chat/completions, as in "
         "http://localhost:8000/v1; URL/models lists names"),
        (402, KEY, "answers with status 402 (no)"),
    ],
)  # fmt: skip
def test_what_waiting_does_not_mend(
    model: Llm, monkeypatch: pytest.MonkeyPatch, status: int, key: str | None, message: str
) -> None:
    if key:
        monkeypatch.setenv(client.KEY_VARIABLE, key)
    model.reply = said(failure(status, "no"))
    with pytest.raises(RemoteError) as raised:
        ask(judge(model))
    assert str(raised.value) == f"{model.url} {message.replace('URL', model.url)}"
    assert len(model.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_takes_no_key_along(model: Llm, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv(client.KEY_VARIABLE, KEY)
    with serve(said("A")) as elsewhere:
        other = elsewhere.url.replace("127.0.0.1", "user:word@localhost")
        model.reply = said(failure(status, Location=other))
        with pytest.raises(RemoteError) as raised:
            ask(judge(model))
        host = other.split("@")[1].removesuffix("/v1")
        then = "redirects are not followed, so that no key goes astray; give the address itself to --judge"
        assert str(raised.value) == f"{model.url} redirects to '{host}': {then}"
        assert elsewhere.requests == []
    assert len(model.requests) == 1


def test_the_key_is_in_no_message(model: Llm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(client.KEY_VARIABLE, KEY)
    for response in (failure(401, f"wrong key {KEY}"), Response(200, KEY.encode()), failure(418, KEY)):
        model.reply = said(response)
        with pytest.raises(RemoteError, match=r"\[key\]") as raised:
            ask(judge(model))
        assert KEY not in str(raised.value)
    model.reply = said(failure(400, KEY))
    assert ask(judge(model)) == (None, None, "status 400: [key]", ())


def test_a_slow_server(model: Llm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ATTEMPTS", 2)
    model.reply = slowly(said("A"), 0.4)
    with pytest.raises(RemoteError, match=r"gives no answer within 0\.1 s; --judge-timeout waits longer$"):
        ask(judge(model, timeout=0.1))
    assert len(model.requests) == 2
    assert ask(judge(model, timeout=5)).text == "A"


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        waits: list[float] = []
        with pytest.raises(RemoteError) as raised:
            Client(LlmJudge(url, "m"), 0, waits.append).ask("?")
    why = "ConnectionRefusedError: [Errno 111] Connection refused"
    assert str(raised.value) == f"{url} cannot be reached ({why}); check the address, and that the server is running"
    assert waits == []


def test_a_proxy_is_not_asked_about_this_machine(model: Llm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    model.reply = said("A")
    assert ask(judge(model)).text == "A"


def test_what_a_server_does_not_take_is_left_out(model: Llm) -> None:
    def reply(request: Request) -> str | Response:
        for name in ("seed", "temperature", "max_tokens"):
            if name in request.body:
                return failure(400, f"Unsupported parameter: '{name}'")
        return "A" if request.content != "long" else failure(400, "seed and temperature and too long")

    model.reply = reply
    asker = Client(judge(model, max_tokens=9), 0, lambda seconds: None)
    assert asker.ask("?") == ("A", "stop", None, ("seed", "temperature"))
    assert model.requests[-1].body.keys() == {"model", "messages", "max_completion_tokens"}
    assert asker.ask("long") == (None, None, "status 400: seed and temperature and too long", ())
    # A server that has answered takes them: what it says later is about something else.
    model.reply = first("A", then=said(failure(422, "temperature in the text")))
    asker = Client(judge(model), 0, lambda seconds: None)
    asker.ask("?")
    assert asker.ask("?").error == "status 422: temperature in the text"
    assert model.requests[-1].body.keys() >= {"seed", "temperature"}


# --- verdicts that are kept -------------------------------------------------------------------------------------------


def test_verdicts_are_saved_as_they_come(model: Llm, tmp_path: Path) -> None:
    store, told = tmp_path / "out" / "verdicts.jsonl", []
    asked = questions(judge(model), 5)
    found = ask_all(judge(model), asked, store, seed=9, on_work=told.append, progress=lambda n: told.append(f"+{n}"))
    assert told == [10, *["+1"] * 10]
    # The longer answer stands second in order 0, first in order 1.
    assert [found.verdict(one) for one in asked] == ["B", "A"] * 5
    assert {request.body["seed"] for request in model.requests} == {9}
    saved = {row["key"]: row for row in rows(store)}
    assert saved.keys() == {one.key for one in asked}
    assert saved[asked[0].key] == {
        "key": asked[0].key, "prompt": "prompt 0", "policy": "a", "against": "b", "order": 0,
        "reply": "One is worth 5, the other one 15.\nB", "finish": "stop", "verdict": "B", "error": None, "without": [],
        "model": "judge-1", "template": saved[asked[1].key]["template"], "seed": 9,
    }  # fmt: skip
    again = ask_all(judge(model), asked, store)
    assert (again, len(model.requests)) == (found, 10)


def test_the_same_question_is_asked_once(model: Llm, tmp_path: Path) -> None:
    asked = questions(judge(model), 2)
    ask_all(judge(model), [*asked, *asked], tmp_path / "v.jsonl")
    assert len(model.requests) == 4


def test_only_what_changed_is_asked_anew(model: Llm, tmp_path: Path) -> None:
    store, one = tmp_path / "v.jsonl", judge(model)
    ask_all(one, questions(one, 3), store)
    for changed, more in ((replace(one, model="judge-2"), 6), (replace(one, template=f"{TEMPLATE}!"), 6)):
        before = len(model.requests)
        ask_all(changed, questions(changed, 3), store)
        assert len(model.requests) - before == more
    before = len(model.requests)
    ask_all(one, [*questions(one, 3), question(one, "prompt 0", ("a", "b"), ("new", "answer"), 0)], store)
    assert len(model.requests) - before == 1
    assert len(rows(store)) == 19


def test_a_run_that_was_killed_goes_on(model: Llm, tmp_path: Path) -> None:
    store, one = tmp_path / "v.jsonl", judge(model, parallel=1)
    ask_all(one, questions(one, 4), store)
    whole = store.read_bytes().splitlines(keepends=True)
    store.write_bytes(b"".join(whole[:5]) + whole[5][:-9])
    model.requests.clear()
    found = ask_all(one, questions(one, 4), store)
    assert len(model.requests) == 3
    assert [row["key"] for row in rows(store)] == [asked.key for asked in questions(one, 4)]
    assert found.verdict(questions(one, 4)[7]) == "A"


def test_an_error_keeps_what_came_before_it(model: Llm, tmp_path: Path) -> None:
    store, one = tmp_path / "v.jsonl", judge(model, parallel=1)
    model.reply = first("A", "B", "tie", then=said(failure(500, "broken")))
    with pytest.raises(RemoteError) as raised:
        ask_all(one, questions(one, 4), store)
    kept = f"3 of 8 verdicts are kept in {store}; the same command goes on"
    assert str(raised.value) == f"{model.url} answers with status 500 (broken); {kept}"
    model.reply, before = by(len), len(model.requests)
    found = ask_all(one, questions(one, 4), store)
    assert len(model.requests) - before == 5
    assert [found.verdict(asked) for asked in questions(one, 4)] == ["A", "B", "tie", "A", "B", "A", "B", "A"]


def test_ctrl_c_keeps_what_came_before_it(model: Llm, tmp_path: Path) -> None:
    store, one = tmp_path / "v.jsonl", judge(model, parallel=1)
    going_on = threading.Event()

    def stop(request: Request) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        going_on.wait(20)  # nobody waits for this reply
        return "A"

    model.reply = first("A", "B", then=stop)
    # A job in the background begins with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Interrupted) as raised:
            ask_all(one, questions(one, 4), store)
    finally:
        signal.signal(signal.SIGINT, before)
        going_on.set()
    assert str(raised.value) == f"stopped; 2 of 8 verdicts are kept in {store}; the same command goes on"
    model.reply, asked = by(len), len(model.requests)
    ask_all(one, questions(one, 4), store)
    assert len(model.requests) - asked == 6


def test_several_questions_at_a_time(model: Llm, tmp_path: Path) -> None:
    together = threading.Barrier(3)

    def reply(request: Request) -> str:
        together.wait(10)  # breaks, and the request fails, if fewer than three come together
        return "A"

    model.reply = reply
    one = judge(model, parallel=3)
    found = ask_all(one, questions(one, 6), tmp_path / "v.jsonl")
    assert (len(found.replies), model.most) == (12, 3)


def test_replies_that_say_nothing(model: Llm, tmp_path: Path) -> None:
    store, one = tmp_path / "v.jsonl", judge(model, parallel=1)
    model.reply = first("A", "No idea.", completion(None), completion("I say\nA", "length"), then=said("tie"))
    asked = questions(one, 3)
    found = ask_all(one, asked, store)
    assert [found.verdict(each) for each in asked] == ["A", None, None, None, "tie", "tie"]
    saved = rows(store)
    assert [(row["reply"], row["finish"]) for row in saved[1:4]] == [
        ("No idea.", "stop"), (None, "stop"), ("I say\nA", "length")
    ]  # fmt: skip
    assert [row["verdict"] for row in saved] == ["A", None, None, None, "tie", "tie"]
    before = len(model.requests)
    assert ask_all(one, asked, store) == found
    assert len(model.requests) == before  # the same reply would come again


def test_a_question_that_the_server_refuses_is_asked_again_another_time(model: Llm, tmp_path: Path) -> None:
    store, one = tmp_path / "v.jsonl", judge(model, parallel=1)
    asked = questions(one, 2)
    model.reply = first("A", failure(400, "too long"), then=said("B"))
    found = ask_all(one, asked, store)
    assert [found.verdict(each) for each in asked] == ["A", None, "B", "B"]
    assert rows(store)[1]["error"] == "status 400: too long"
    model.requests.clear()
    assert [ask_all(one, asked, store).verdict(each) for each in asked] == ["A", "B", "B", "B"]
    assert len(model.requests) == 1


@pytest.mark.parametrize(
    ("reply", "end"),
    [
        ("Well, A.\nOr B.", "'Well, A.\\nOr B.'"),
        (completion("so I think", "length"), "'so I think', cut off (--judge-tokens)"),
        (completion(None), "no text"),
        (failure(400, "no such parameter"), "status 400: no such parameter"),
    ],
)
def test_a_judge_of_whom_nothing_can_be_read_is_not_asked_on(
    model: Llm, tmp_path: Path, reply: str | Response, end: str
) -> None:
    store, one = tmp_path / "v.jsonl", judge(model, parallel=1)
    model.reply = said(reply)
    with pytest.raises(WarmergeError) as raised:
        ask_all(one, questions(one, 30), store)
    assert str(raised.value) == (
        f"of 20 replies none ends with A, B or tie; the last one: {end}. They are in {store}; "
        "look at the template, the model and --judge-tokens"
    )
    assert len(model.requests) <= 21
    if isinstance(reply, str):
        with pytest.raises(WarmergeError, match=r"^of 20 replies none"):
            ask_all(one, questions(one, 30), store)


def test_replies_in_all_languages(model: Llm, tmp_path: Path) -> None:
    store, one = tmp_path / "v.jsonl", judge(model)
    text = "巴黎 \U0001f5fc \u2028 \ud800 é\nA"
    body = completion(text).body
    assert b"\\ud800" in body
    model.reply = said(Response(200, body))
    asked = [question(one, "Où? \U0001f5fc {first}", ("é", "ü"), ("ça\u2028", "פריז"), 0)]
    found = ask_all(one, asked, store)
    assert (found.replies[asked[0].key].text, found.verdict(asked[0])) == (text, "A")
    assert "Où? \U0001f5fc {first}" in model.requests[0].content
    assert ask_all(one, asked, store) == found
    assert len(model.requests) == 1


@pytest.mark.parametrize(
    "line", ['{"key": 1}', "[]", "nonsense", '{"key": "k", "reply": 5, "finish": "", "error": null, "without": []}']
)
def test_a_file_that_was_changed(model: Llm, tmp_path: Path, line: str) -> None:
    store, one = tmp_path / "v.jsonl", judge(model)
    ask_all(one, questions(one, 1), store)
    store.write_text(store.read_text() + line + "\n")
    with pytest.raises(UsageError, match=r"v\.jsonl:3 is no verdict of warmerge: the file was changed; .* --overwrite"):
        ask_all(one, questions(one, 1), store)
    assert len(model.requests) == 2
    ask_all(one, questions(one, 1), store, overwrite=True)
    assert (len(model.requests), len(rows(store))) == (4, 2)


def test_two_runs_do_not_write_one_file(model: Llm, tmp_path: Path) -> None:
    store = tmp_path / "v.jsonl"
    with pool_file.opened(store, anew=True), pytest.raises(WarmergeError, match="another run is writing"):
        ask_all(judge(model), questions(judge(model), 1), store)
    assert model.requests == []


def test_what_the_server_did_not_take_is_said(model: Llm, tmp_path: Path) -> None:
    model.reply = lambda request: failure(400, "seed?") if "seed" in request.body else "A"
    one = judge(model, parallel=4)
    found = ask_all(one, questions(one, 4), tmp_path / "v.jsonl")
    assert isinstance(found, Asked)
    assert found.left_out == ["seed"]
    again = ask_all(one, questions(one, 4), tmp_path / "v.jsonl")
    assert (again, again.left_out) == (found, ["seed"])
    assert all(found.verdict(asked) == "A" for asked in questions(one, 4))


def test_the_key_is_in_no_file(model: Llm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(client.KEY_VARIABLE, KEY)
    one = judge(model)
    ask_all(one, questions(one, 2), tmp_path / "v.jsonl")
    assert {request.headers["Authorization"] for request in model.requests} == {f"Bearer {KEY}"}
    assert KEY not in (tmp_path / "v.jsonl").read_text()
