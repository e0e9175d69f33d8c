"""A language model on 127.0.0.1, as OpenAI's chat completions show one: it replies what a test says."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Response(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str] = {}  # noqa: RUF012 - never changed


class Request(NamedTuple):
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def content(self) -> str:
        return str(self.body["messages"][0]["content"])


Reply = Callable[[Request], "str | Response"]


@dataclass
class Llm:
    """`reply` may be changed at any time; `requests` are those that came; `most` of them were under way at once."""

    reply: Reply
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    under_way: int = 0
    most: int = 0


def completion(text: str | None, finish: str | None = "stop") -> Response:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return Response(200, json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode())


def failure(status: int, message: str = "", **headers: str) -> Response:
    return Response(status, json.dumps({"error": {"message": message}}).encode(), headers)


def answers_in(content: str) -> tuple[str, str]:
    """The two answers in a question of the default template, in the order in which they stand."""
    found = [re.search(f"<answer_{name}>\n(.*?)\n</answer_{name}>", content, re.DOTALL) for name in "AB"]
    return found[0][1], found[1][1]  # type: ignore[index]


def by(worth: Callable[[str], float]) -> Reply:
    """A judge that prefers what is worth more, in whatever order, and says why."""

    def reply(request: Request) -> str:
        first, second = map(worth, answers_in(request.content))
        return f"One is worth {first}, the other one {second}.\n" + (
            "A" if first > second else "B" if second > first else "tie"
        )

    return reply


def slowly(reply: Reply, seconds: float) -> Reply:
    def later(request: Request) -> str | Response:
        time.sleep(seconds)
        return reply(request)

    return later


@contextmanager
def serve(reply: Reply) -> Iterator[Llm]:
    llm, lock = Llm(reply), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request = Request(self.path, dict(self.headers.items()), body)
            with lock:
                llm.requests.append(request)
                llm.under_way += 1
                llm.most = max(llm.most, llm.under_way)
            try:
                found = llm.reply(request)
            finally:
                with lock:
                    llm.under_way -= 1
            status, data, headers = completion(found) if isinstance(found, str) else found
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """Who asked has gone away."""

    with Server(("127.0.0.1", 0), Handler) as server:
        llm.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield llm
        finally:
            server.shutdown()
            thread.join()
