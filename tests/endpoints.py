"""An endpoint on this machine that answers chats as a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Mapping[str, str], bytes]
"""Status, headers and body."""


def said(text: str | None) -> Reply:
    """A completed chat."""
    message = {"role": "assistant", "content": text}
    return 200, {}, json.dumps({"choices": [{"index": 0, "message": message}]}).encode()


def refused(status: int, message: str, **headers: str) -> Reply:
    """An error as OpenAI's API has it."""
    return status, headers, json.dumps({"error": {"message": message}}).encode()


class Fake:
    """What was asked, and how it is answered.

    Attributes:
        url: to give as an endpoint.
        asked: the bodies of all requests, in the order that they came in.
        headers: theirs.
    """

    def __init__(self, reply: Callable[[dict[str, Any]], Reply]) -> None:
        self.reply, self.url = reply, ""
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []

    @property
    def judged(self) -> list[str]:
        """What the judge was shown, without the first word that tells whether it is there."""
        texts = [body["messages"][-1]["content"] for body in self.asked]
        return [text for text in texts if "ANSWER A" in text]


@contextmanager
def endpoint(reply: Callable[[dict[str, Any]], Reply]) -> Iterator[Fake]:
    """Yield a fake endpoint on a free port."""
    fake = Fake(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.asked.append(body)
            fake.headers.append(dict(self.headers))
            status, headers, content = fake.reply(body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield fake
        finally:
            server.shutdown()
