"""A language model as a judge, behind any address that speaks OpenAI's chat completions. The key goes there alone.

The standard library's HTTP is enough: one question, one answer, no redirect is followed.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from warmerge.errors import Finding, RemoteError, UsageError, plain, quoted
from warmerge.pipeline.judging.template import TEMPLATE, check_template

KEY_VARIABLE = "WARMERGE_JUDGE_KEY"
ATTEMPTS = 6
_FIRST_WAIT, _LONGEST_BACKOFF = 1.0, 32.0
# Servers count requests over minutes: this is the longest that one has reason to ask for.
_LONGEST_WAIT = 330.0
_TRY_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
# What is wrong with one question, such as its length, is not wrong with the others.
_ABOUT_THE_QUESTION = frozenset({400, 413, 422})
# What servers may not know or not allow; `max_tokens` then goes by its newer name.
_OPTIONAL = ("seed", "temperature", "max_tokens")
_LARGEST = 1 << 24
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class LlmJudge:
    """A language model that says which of two answers is better.

    Args:
        url: up to where `/chat/completions` is added, as in http://localhost:8000/v1.
        model: its name there.
        template: with {prompt}, {first} and {second}; must ask for a last line "A", "B" or "tie".
        key_variable: the environment variable that holds the key. If not given WARMERGE_JUDGE_KEY, where it is set.
        parallel: questions at a time.
        max_tokens: of one reply; of one that is longer nothing is read.
        timeout: seconds to wait for a reply.

    Raises:
        UsageError: values that cannot be used; all of them are named.
    """

    url: str
    model: str
    template: str = TEMPLATE
    key_variable: str | None = None
    parallel: int = 8
    max_tokens: int = 2048
    timeout: float = 120.0

    def __post_init__(self) -> None:
        wrong = [*_wrong_address(self.url)]
        wrong += [] if self.model else [f"--judge-model: expected the name of the model at {plain(self.url)}"]
        counts = (("--parallel", self.parallel), ("--judge-tokens", self.max_tokens))
        wrong += [f"{flag}: expected 1 or more, found {value}" for flag, value in counts if value < 1]
        if not 0 < self.timeout <= 86_400:
            wrong.append(f"--judge-timeout: expected seconds above 0 and at most a day, found {self.timeout}")
        if wrong:
            raise UsageError("; ".join(wrong))
        check_template(self.template)

    @property
    def address(self) -> str:
        """Where questions go."""
        url = self.url.rstrip("/")
        return url if url.endswith("/chat/completions") else f"{url}/chat/completions"

    def key(self) -> str | None:
        """The key, from the environment at this moment: it is kept nowhere.

        Raises:
            UsageError: the variable is not set, or holds what no header can.
        """
        name = self.key_variable or KEY_VARIABLE
        found = os.environ.get(name, "").strip()
        if not found and self.key_variable is not None:
            raise UsageError(f"--judge-key-env: the environment has no {plain(name)}, or it is empty")
        if not (found.isascii() and found.isprintable()):
            raise UsageError(f"the environment's {plain(name)} holds characters that no key has")
        return found or None

    def doubts(self) -> list[Finding]:
        """What to say before a key is sent."""
        parts = urlsplit(self.url)
        if self.key() is None or parts.scheme == "https" or parts.hostname in _LOOPBACK:
            return []
        return [Finding(self.url, "is not encrypted (http), and the key is sent there; https hides it on its way")]


class Reply(NamedTuple):
    """What the model said, and why it ended ("stop", "length"); or with `error` why the server took no question.

    `without` names what the server did not take: "seed", "temperature".
    """

    text: str | None
    finish: str | None = None
    error: str | None = None
    without: tuple[str, ...] = ()


class Client:
    """Asks a judge; several threads may use it."""

    def __init__(self, judge: LlmJudge, seed: int, pause: Callable[[float], object]) -> None:
        """`pause` waits so many seconds; where it returns something true, no further attempt is made."""
        self.judge, self._seed, self._pause, self._key = judge, seed, pause, judge.key()
        self._left_out: set[str] = set()
        self._lock, self._answered = threading.Lock(), False
        # A judge on this machine is not reached through a proxy elsewhere.
        own = [urllib.request.ProxyHandler({})] if urlsplit(judge.url).hostname in _LOOPBACK else []
        self._opener = urllib.request.build_opener(_NoRedirect, *own)

    def ask(self, content: str) -> Reply:
        """The reply to one question, asked again a few times where the server is busy or the connection breaks.

        Raises:
            RemoteError: no reply; why, and what to do.
        """
        tried = 0
        while True:
            body, wait = self._body(content), None
            try:
                reply = self._reply(self._post(body))
            except HTTPError as error:
                said, wait = self._said(error), _seconds(error)
                if error.code in _ABOUT_THE_QUESTION and self._without(body, said):
                    continue
                if error.code in _ABOUT_THE_QUESTION:
                    return Reply(None, error=f"status {error.code}: {said}")
                what = self._explained(error, said)
                may_help = error.code in _TRY_AGAIN
            except (OSError, http.client.HTTPException, ValueError) as error:
                what, may_help = self._unanswered(error), self._answered or not _refused(error)
            else:
                self._answered = True
                return reply._replace(without=tuple(sorted({"seed", "temperature"} - body.keys())))
            tried += 1
            wait = min(_FIRST_WAIT * 2 ** (tried - 1), _LONGEST_BACKOFF) if wait is None else wait
            if tried >= ATTEMPTS or wait > _LONGEST_WAIT or not may_help or self._pause(wait):
                raise RemoteError(what)

    def _body(self, content: str) -> dict[str, Any]:
        judge = self.judge
        body: dict[str, Any] = {"model": judge.model, "messages": [{"role": "user", "content": content}]}
        with self._lock:
            optional = {"temperature": 0, "seed": self._seed, "max_tokens": judge.max_tokens}
            body |= {name: value for name, value in optional.items() if name not in self._left_out}
            if "max_tokens" in self._left_out:
                body["max_completion_tokens"] = judge.max_tokens
        return body

    def _without(self, body: dict[str, Any], said: str) -> bool:
        """Leaves out what a server that has not answered yet does not take; whether there was such a thing."""
        with self._lock:
            found = {name for name in _OPTIONAL if name in body and name in said}
            self._left_out |= set() if self._answered else found
            return bool(found & self._left_out)

    def _post(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "warmerge"}
        request = urllib.request.Request(self.judge.address, json.dumps(body).encode(), headers)
        if self._key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        with self._opener.open(request, timeout=self.judge.timeout) as response:
            data: bytes = response.read(_LARGEST)
            return data

    def _reply(self, data: bytes) -> Reply:
        """Raises ValueError where the answer is not what chat completions are."""
        try:
            choice = json.loads(data)["choices"][0]
            text, finish = choice["message"].get("content"), choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise ValueError(self._clean(data)) from None
        if not (text is None or isinstance(text, str)):
            raise ValueError(self._clean(data))
        return Reply(text, None if finish is None else str(finish))

    def _said(self, error: HTTPError) -> str:
        try:
            return self._clean(error.read(_LARGEST))
        except (OSError, http.client.HTTPException):
            return ""
        finally:
            error.close()

    def _clean(self, data: bytes) -> str:
        """What a server says of an error, on one line, without the key should it repeat it."""
        text = data.decode(errors="replace")
        try:
            found = json.loads(text)
            inner = found.get("error", found.get("detail", found.get("message"))) if isinstance(found, dict) else found
            inner = inner.get("message", inner) if isinstance(inner, dict) else inner
            text = inner if isinstance(inner, str) else text
        except (ValueError, RecursionError):
            pass
        text = text if self._key is None else text.replace(self._key, "[key]")
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]

    def _explained(self, error: HTTPError, said: str) -> str:
        status, where, why = error.code, plain(self.judge.url), f" ({said})" if said else ""
        if 300 <= status < 400:
            # Of a hostile address only the host is shown.
            host = urlsplit(error.headers.get("Location") or "").netloc.rpartition("@")[2] or "elsewhere"
            then = "redirects are not followed, so that no key goes astray; give the address itself to --judge"
            return f"{where} redirects to {quoted(host)}: {then}"
        if status in (401, 403) and self._key is None:
            return f"{where} wants a key{why}: put it into {KEY_VARIABLE}, or name its variable with --judge-key-env"
        if status in (401, 403):
            variable = plain(self.judge.key_variable or KEY_VARIABLE)
            return f"{where} does not accept the key in {variable}{why}; check the key, and what it may use"
        if status == 404:
            then = f"--judge ends before /chat/completions, as in http://localhost:8000/v1; {where}/models lists names"
            return f"{where} knows no such address, or no model {quoted(self.judge.model)}{why}; {then}"
        busy = "is asked too often: lower --parallel" if status == 429 else f"answers with status {status}"
        return f"{where} {busy}{why}"

    def _unanswered(self, error: Exception) -> str:
        where = plain(self.judge.url)
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, TimeoutError):
            return f"{where} gives no answer within {self.judge.timeout:g} s; --judge-timeout waits longer"
        if isinstance(error, ValueError):
            return f"{where} does not answer as chat completions do: {quoted(str(error)[:120])}; check --judge"
        why = f"{type(reason).__name__}: {reason}"
        return f"{where} cannot be reached ({why}); check the address, and that the server is running"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error like others: the key and the question would go to another place."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def is_address(judge: object) -> bool:
    """Whether a judge is given by a URL."""
    return str(judge).lower().startswith(("http://", "https://"))


def _wrong_address(url: str) -> list[str]:
    try:
        parts = urlsplit(url)
        port = parts.port  # a ValueError for one that is no number
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0
    except ValueError:
        fits = False
    # A password in it would stand in every file of results.
    if fits and not (parts.username or parts.password or parts.query or parts.fragment or not url.isprintable()):
        return []
    return ["--judge: expected an address like http://localhost:8000/v1, without user, password or query"]


def _seconds(error: HTTPError) -> float | None:
    """How long the server asks to wait, where it says so in seconds."""
    asked = (error.headers.get("Retry-After") or "").strip()
    return float(asked) if asked.isascii() and asked.replace(".", "", 1).isdigit() else None


def _refused(error: Exception) -> bool:
    """Whether nobody listens there, or there is no such host."""
    reason = error.reason if isinstance(error, URLError) else error
    return isinstance(reason, ConnectionRefusedError) or type(reason).__name__ == "gaierror"
