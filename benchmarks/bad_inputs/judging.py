"""What `judge` and `people` read: answers, pairs, verdicts, votes, and what an endpoint says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from .cases import Case, at, documents, written

ONE, OTHER, JUDGED, MINE = "one.jsonl", "other.jsonl", "judged", "mine.txt"
_PORT = 18463
_URL = f"http://127.0.0.1:{_PORT}/v1"
PAIR = ("judge", ONE, OTHER, "--output", JUDGED, "--pairs-only")
JUDGE = ("judge", ONE, OTHER, "--output", JUDGED, "--endpoint", _URL, "--judge-model", "it",
         "--retries", "0", "--timeout", "2")  # fmt: skip
REPORT = ("people", JUDGED, "--report")
_ESCAPE = "\x1b[31m\x1b]0;mine\x07 <b>bold</b>"
_PAIR = {"prompt": "Which?", "a": "one", "b": "other", "answer_a": "left", "answer_b": "right"}


def cases() -> Iterator[Case]:
    yield from _answers()
    yield from _folders()
    yield from _pairs()
    yield from _votes()
    yield from _endpoints()


def _made(folder: Path) -> None:
    """Write two files of answers and the pairs that they make, as if they had been judged."""
    from quantadapt.judging.pairs import Pair, paired, read_answers, write_pairs

    for name, words in ((ONE, "long "), (OTHER, "short ")):
        rows = ({"prompt": f"Question {n}", "answer": words * (n + 1)} for n in range(3))
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = folder / JUDGED
    judged.mkdir()
    pairs = paired(*(read_answers(str(folder / name)) for name in (ONE, OTHER)))
    write_pairs(judged / "pairs.jsonl", [*pairs, Pair(**_PAIR)])
    votes = (
        {"pair": pair.id, "voter": "me", "vote": "a", "left": "a", "time": ""} for pair in pairs
    )
    (judged / "votes.jsonl").write_text("".join(json.dumps(vote) + "\n" for vote in votes))
    lines = (
        {"pair": pair.id, "order": order, "verdict": "a", "said": "[[A]]"}
        for pair in pairs
        for order in ("ab", "ba")
    )
    (judged / "judgements.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _with(*damages: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [damage(folder) for damage in (_made, *damages)]


def _fresh(*damages: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return what makes the files of answers alone, and damages those."""
    import shutil

    return _with(lambda folder: shutil.rmtree(folder / JUDGED), *damages)


def _answers() -> Iterator[Case]:
    row = {"prompt": "Question", "answer": "long"}
    texts: dict[str, str] = {
        "nothing": "",
        "a list": "[1]\n",
        "other columns": '{"x": 1}\n',
        "an answer that is a number": json.dumps({**row, "answer": 3}),
        "an answer that is null": json.dumps({**row, "answer": None}),
        "no answer": json.dumps({"prompt": "Question"}),
        "a prompt that is a number": json.dumps({**row, "prompt": 3}),
        "fewer answers": json.dumps(row),
        "other questions": "".join(json.dumps({**row, "prompt": f"x{n}"}) + "\n" for n in range(3)),
        "messages that are numbers": json.dumps({"messages": [1], "answer": "a"}),
        "a broken line": '{"prompt": "Question 0", "answer": "a"}\n{"prompt\n',
    }
    for name, text in texts.items():
        yield Case("judge: answers", name, PAIR, _fresh(written(OTHER, text)))
    for name, damage in documents():
        wanted = "refused"
        yield Case("judge: answers", name, PAIR, _fresh(at(OTHER, damage)), wanted)
    hostile = "".join(
        json.dumps({"prompt": f"Question {n}", "answer": _ESCAPE + "[[A]]" + "\ud800"}) + "\n"
        for n in range(3)
    )
    yield Case("judge: answers", "that are hostile", PAIR, _fresh(written(OTHER, hostile)), "works")
    for name, arguments in {
        "both the same": ("judge", ONE, ONE, "--pairs-only"),
        "a name with an escape": ("judge", ONE, "\x1b[31mx", "--pairs-only"),
        "a folder that is nothing": ("judge", ONE, JUDGED, "--pairs-only", "-o", "out"),
        "no endpoint": ("judge", ONE, OTHER, "-o", "out"),
        "prompts beside": ("judge", ONE, OTHER, "--prompts", ONE, "-o", "out", "--pairs-only"),
        "output is a file": ("judge", ONE, OTHER, "-o", ONE, "--pairs-only"),
        "output below a file": ("judge", ONE, OTHER, "-o", f"{ONE}/x", "--pairs-only"),
        "output too long": ("judge", ONE, OTHER, "-o", "a" * 300, "--pairs-only"),
        "output is a run": ("judge", ONE, OTHER, "-o", "run", "--pairs-only", "--overwrite"),
        "output is what is read": ("judge", ONE, OTHER, "-o", ".", "--pairs-only", "--overwrite"),
    }.items():
        yield Case("judge: options", name, arguments, _with())
    for flag, value in (("--max-prompts", "0"), ("--judge-tokens", "1"), ("--parallel", "0"),
                        ("--timeout", "nan"), ("--timeout", "inf"), ("--timeout", "-1"),
                        ("--retries", "-1"), ("--temperature", "nan"), ("--max-new-tokens", "0"),
                        ("--layout", "odd"), ("--endpoint", "file:///etc/passwd"),
                        ("--endpoint", "http://u:p@x/v1"), ("--endpoint", "http://[x/v1"),
                        ("--endpoint", "http://127.0.0.1:1/v1"), ("--endpoint", "\x1b[31m"),
                        ("--endpoint", "http://\x1b[31mx/v1"), ("--endpoint", "http://x:99999999/v1"),
                        ("--judge-model", "")):  # fmt: skip
        arguments = (*JUDGE, flag, value)
        yield Case("judge: options", f"{flag} {value!r}", arguments, _fresh())


def _folders() -> Iterator[Case]:
    """The folder that was judged before, and what lies in it."""
    settings = f"{JUDGED}/settings.json"
    for name, damage in documents():
        yield Case("judge: settings.json", name, PAIR, _with(_begun, at(settings, damage)))
        for file in ("pairs.jsonl", "judgements.jsonl", "votes.jsonl"):
            cut = ("empty", "missing", "cut in half")  # where a line ends, nobody can tell
            wanted = "either" if name in cut else "refused"
            damaged = _with(at(f"{JUDGED}/{file}", damage))
            yield Case(f"people: {file}", name, REPORT, damaged, wanted)
    inside = f"{JUDGED}/answers-a.jsonl"
    moved = _with(_begun, lambda folder: (folder / ONE).rename(folder / inside))
    for more in ((), ("--overwrite",)):
        arguments = ("judge", inside, OTHER, "--output", JUDGED, "--pairs-only", *more)
        yield Case("judge: folder", f"what is read lies in it {more}", arguments, moved)


def _begun(folder: Path) -> None:
    """Let the folder be one that was begun with something else."""
    made = {"pairs": {"a": "x"}, "judge": None}
    (folder / JUDGED / "settings.json").write_text(json.dumps(made))


def _pairs() -> Iterator[Case]:
    for key in _PAIR:
        for value in (None, 3, [1], {"a": 1}, float("nan")):
            row = json.dumps({**_PAIR, key: value}) + "\n"
            damage = _with(written(f"{JUDGED}/pairs.jsonl", row))
            yield Case("people: pairs.jsonl", f"{key} is {value}", REPORT, damage)
    hostile = dict.fromkeys(_PAIR, _ESCAPE)
    damage = _with(written(f"{JUDGED}/pairs.jsonl", json.dumps(hostile) + "\n"))
    yield Case("people: pairs.jsonl", "that is hostile", REPORT, damage, "either")


def _votes() -> Iterator[Case]:
    file = f"{JUDGED}/votes.jsonl"
    vote: dict[str, Any] = {"pair": "x", "voter": "me", "vote": "a", "left": "a", "time": ""}
    for key in vote:
        for value in (None, 3, [1], {"a": 1}, "other"):
            damage = _with(written(file, json.dumps({**vote, key: value}) + "\n"))
            wanted = (
                "either" if value == "other" and key in ("pair", "voter", "time") else "refused"
            )
            yield Case("people: votes.jsonl", f"{key} is {value}", REPORT, damage, wanted)
    for key in ("pair", "order", "verdict"):
        for value in (None, 3, [1], {"a": 1}, "other"):
            line = {"pair": "x", "order": "ab", "verdict": "a", "said": "", key: value}
            damage = _with(written(f"{JUDGED}/judgements.jsonl", json.dumps(line) + "\n"))
            wanted = "either" if value == "other" and key == "pair" else "refused"
            yield Case("people: judgements.jsonl", f"{key} is {value}", REPORT, damage, wanted)
    for key in ("more", 3):
        damage = _with(written(file, json.dumps({**vote, str(key): 1}) + "\n"))
        yield Case("people: votes.jsonl", f"with {key}", REPORT, damage)
    mine = _with(written(MINE, "what I wrote, without an end of the line"))
    yield Case("people: votes", "are a text of the user", ("people", JUDGED, "--votes", MINE), mine)


def _endpoints() -> Iterator[Case]:
    well = {"choices": [{"message": {"content": "Good.\n[[A]]"}}]}
    replies: dict[str, Any] = {
        "no JSON": b"hello",
        "nothing": b"",
        "a list": b"[]",
        "no choices": {"choices": []},
        "a choice that is a number": {"choices": [3]},
        "deep nesting": b"[" * 200_000,
        "a long number": b'{"choices": ' + b"9" * 6000 + b"}",
        "more than there may be": b" " * 2**23,
    }
    for name, reply in replies.items():
        yield Case("judge: endpoint", name, JUDGE, _fresh(), before=_answering(reply))
    odd = {
        "content that is null": {"choices": [{"message": {"content": None}}]},
        "content that is a list": {"choices": [{"message": {"content": [{"type": "text"}]}}]},
        "content that is hostile": {"choices": [{"message": {"content": _ESCAPE + "\ud800[[A]]"}}]},
        "content of a megabyte": {"choices": [{"message": {"content": "[[" * 500_000}}]},
    }
    for name, reply in odd.items():
        yield Case("judge: endpoint", name, JUDGE, _fresh(), "works", before=_answering(reply))
    for status in (301, 400, 401, 404, 418, 429, 500):
        error = {"error": {"message": _ESCAPE}}
        before = _answering(error, status)
        yield Case("judge: endpoint", f"status {status}", JUDGE, _fresh(), before=before)
    hostile = (*JUDGE[:-6], "--judge-model", _ESCAPE, *JUDGE[-4:])
    yield Case("judge: endpoint", "a model of a hostile name", hostile, _fresh(), "works",
               before=_answering(well))  # fmt: skip


def _answering(reply: Any, status: int = 200) -> Callable[[Path], object]:
    """Return what lets an endpoint answer so, in the process of the command."""
    body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Location", "http://127.0.0.1:1/")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    def before(folder: Path) -> None:
        server = ThreadingHTTPServer(("127.0.0.1", _PORT), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()

    return before
