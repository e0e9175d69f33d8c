"""Verdicts of a language model, a line each in a file, on the disk before the next is counted.

{"key", "prompt", "policy", "against", "order", "reply", "finish", "error", "without", "verdict", "model", "template",
"seed"}

`order` 0 shows the policy's answer first, 1 the other one. `key` is the digest of all that was asked: of whom, with
which template, about which texts. A verdict is read from its reply each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from warmerge.errors import Interrupted, RemoteError, UsageError, WarmergeError, counted, naming, plain
from warmerge.pipeline.judging.llm import Client, LlmJudge, Reply
from warmerge.pipeline.judging.template import digest_of, filled, shown, verdict_of
from warmerge.pipeline.sampling import pool_file
from warmerge.rewards.layouts import Text, canonical

# So many replies without a single verdict: then the template does not fit the model, and asking on costs for nothing.
_HOPELESS = 20
Tell = Callable[[int], None]


class Question(NamedTuple):
    """One order of one pair for one prompt; `content` is the text that the model reads."""

    key: str
    prompt: Text
    policy: str
    against: str
    order: int
    content: str


@dataclass(frozen=True)
class Asked:
    """Replies by the key of their question, kept ones too."""

    replies: Mapping[str, Reply]

    @property
    def left_out(self) -> list[str]:
        """What the server did not take for some of them: "seed", "temperature"."""
        return sorted({name for reply in self.replies.values() for name in reply.without})

    def verdict(self, asked: Question) -> str | None:
        """What the model says: "A", "B" or "tie"; None where its reply does not say so."""
        return _verdict(self.replies[asked.key])


def question(judge: LlmJudge, prompt: Text, names: tuple[str, str], answers: tuple[Text, Text], order: int) -> Question:
    """The question about two answers; with `order` 1 the second one is shown first."""
    first, second = answers if order == 0 else answers[::-1]
    content = filled(judge.template, prompt, first, second)
    decides = [judge.address, judge.model, judge.max_tokens, content]
    key = hashlib.sha256(canonical(decides).encode()).hexdigest()
    return Question(key, prompt, *names, order, content)


def ask_all(
    judge: LlmJudge,
    questions: Sequence[Question],
    store: Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    on_work: Tell = lambda count: None,
    progress: Tell = lambda count: None,
) -> Asked:
    """The reply to every question: those that the file holds already, and the others, `judge.parallel` at a time.

    Args:
        store: the file of verdicts; begun if it is not there.
        overwrite: begin anew where it is damaged.
        on_work: told how many are to be asked; `progress`: how many more are.

    Raises:
        UsageError: the file is damaged. WarmergeError: another run writes it; no reply can be read.
        RemoteError: the model gave no reply; says what is kept.
        Interrupted: Ctrl-C; likewise.
    """
    wanted = {asked.key: asked for asked in questions}
    with pool_file.opened(store, anew=False) as descriptor:
        kept = _kept(store, descriptor, overwrite)
        replies = {key: kept[key] for key in wanted if key in kept}
        missing = [asked for key, asked in wanted.items() if key not in replies]
        _refuse_hopeless(replies, store)
        on_work(len(missing))
        run = _Run(judge, seed, missing)
        try:
            for asked, reply in run.replies():
                with naming(store):
                    _append(descriptor, judge, asked, reply, seed)
                replies[asked.key] = reply
                progress(1)
                _refuse_hopeless(replies, store)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; {_are_kept(replies, wanted, store)}") from None
        except RemoteError as error:
            raise RemoteError(f"{error}; {_are_kept(replies, wanted, store)}") from error
        finally:
            run.stop()
    return Asked(replies)


class _Run:
    """Threads that ask. They are daemons: whoever stops does not wait for a reply that is under way."""

    def __init__(self, judge: LlmJudge, seed: int, questions: Sequence[Question]) -> None:
        self._stopped = threading.Event()
        self.client = Client(judge, seed, self._stopped.wait)
        self._questions, self._parallel = questions, min(judge.parallel, len(questions))
        self._todo: queue.SimpleQueue[Question | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Question, Reply | BaseException]] = queue.SimpleQueue()

    def replies(self) -> Iterator[tuple[Question, Reply]]:
        """(question, reply) as they come, of all; those that came before an error are given before it is raised.

        A question is handed out when a reply has been dealt with, so that no more are lost than are under way.
        """
        left = iter(self._questions)
        for _ in range(self._parallel):
            self._todo.put(next(left))
            threading.Thread(target=self._work, daemon=True).start()
        for _ in self._questions:
            asked, found = self._next()
            if isinstance(found, BaseException):
                self.stop()
                while not self._done.empty():
                    other, reply = self._done.get()
                    if isinstance(reply, Reply):
                        yield other, reply
                raise found
            yield asked, found
            self._todo.put(next(left, None))

    def stop(self) -> None:
        """Ends all threads: those that wait for a question, or before another attempt, at once."""
        self._stopped.set()
        for _ in range(self._parallel):
            self._todo.put(None)

    def _next(self) -> tuple[Question, Reply | BaseException]:
        # A wait without an end is not woken by a Ctrl-C that another thread was given.
        while True:
            with contextlib.suppress(queue.Empty):
                return self._done.get(timeout=0.2)

    def _work(self) -> None:
        while (asked := self._todo.get()) is not None and not self._stopped.is_set():
            try:
                self._done.put((asked, self.client.ask(asked.content)))
            except BaseException as error:  # noqa: BLE001 - raised again by who waits for the replies
                self._done.put((asked, error))
                return


def _verdict(reply: Reply) -> str | None:
    # A reply that was cut off may end in the middle of a sentence that begins with "A".
    return None if reply.finish == "length" else verdict_of(reply.text)


def _kept(store: Path, descriptor: int, overwrite: bool) -> dict[str, Reply]:
    """The replies in a file, by key. A last line that was not written to its end is cut off."""
    found: dict[str, Reply] = {}
    whole = 0
    with store.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                key, reply = str(row["key"]), Reply(row["reply"], row["finish"], row["error"], tuple(row["without"]))
                if not all(part is None or isinstance(part, str) for part in (*reply[:3], *reply.without)):
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError):
                if not overwrite:
                    what = f"{plain(str(store))}:{number} is no verdict of warmerge: the file was changed"
                    raise UsageError(f"{what}; choose another -o, or add --overwrite to begin anew") from None
                os.ftruncate(descriptor, 0)
                return {}
            whole += len(line)
            # What a server took no notice of may be taken another time.
            if reply.error is None:
                found[key] = reply
    os.ftruncate(descriptor, whole)
    return found


def _append(descriptor: int, judge: LlmJudge, asked: Question, reply: Reply, seed: int) -> None:
    row = {
        "key": asked.key, "prompt": asked.prompt, "policy": asked.policy, "against": asked.against,
        "order": asked.order, "reply": reply.text, "finish": reply.finish, "error": reply.error,
        "without": reply.without, "verdict": _verdict(reply), "model": judge.model,
        "template": digest_of(judge.template), "seed": seed,
    }  # fmt: skip
    # ASCII: a reply may hold half a character, which UTF-8 has not.
    data = memoryview((json.dumps(row) + "\n").encode())
    while data:
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)


def _refuse_hopeless(replies: Mapping[str, Reply], store: Path) -> None:
    if len(replies) >= _HOPELESS and not any(_verdict(reply) for reply in replies.values()):
        raise nothing_read(replies, store)


def nothing_read(replies: Mapping[str, Reply], store: Path) -> WarmergeError:
    """What to say where no reply has a verdict."""
    last = list(replies.values())[-1]
    end = last.error or shown(last.text) + (", cut off (--judge-tokens)" if last.finish == "length" else "")
    what = f"of {len(replies)} replies none ends with A, B or tie; the last one: {end}"
    return WarmergeError(f"{what}. They are in {plain(str(store))}; look at the template, the model and --judge-tokens")


def _are_kept(replies: Mapping[str, Reply], wanted: Mapping[str, Question], store: Path) -> str:
    have = f"{sum(reply.error is None for reply in replies.values())} of {counted(len(wanted), 'verdict')}"
    return f"{have} are kept in {plain(str(store))}; the same command goes on"
