"""People vote on pairs without knowing whose answers they are; no vote is lost or counted twice."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from html import unescape
from pathlib import Path
from typing import Any

import pages
import pytest

from quantadapt import cli
from quantadapt.errors import DataError, OutputError
from quantadapt.judging.pairs import Pair, write_pairs
from quantadapt.judging.votes import Ballot, Vote, Votes, read_votes, tally

UGLY = "<img src=x onerror=alert(1)><script>alert(2)</script>"
PAIRS = [
    Pair(f"Question {i} {UGLY}", "model-x", "model-y", f"mine {i}", f"theirs {i}") for i in range(4)
]
SAME = Pair("Question", "model-x", "model-y", "same", "same")


def vote(pair: Pair, voter: str, what: Any, left: Any = "a") -> Vote:
    return Vote(pair.id, voter, what, left, "2026-01-01T00:00:00+00:00")


# What is shown to whom ----------------------------------------------------------------------------


def test_order_and_sides_are_each_voters_own_and_always_the_same() -> None:
    many = [Pair(str(i), "x", "y", "1", "2") for i in range(60)]
    ballot = Ballot.of([*many, SAME], seed=1)
    assert len(ballot.pairs) == 60

    def shown(voter: str, ballot: Ballot) -> list[tuple[str, str]]:
        done: set[str] = set()
        found = []
        while pair := ballot.next_for(voter, done):
            found.append((pair.id, ballot.left(voter, pair)))
            done.add(pair.id)
        return found

    ann, bob = shown("ann", ballot), shown("bob", ballot)
    assert {pair for pair, _ in ann} == {pair for pair, _ in bob} == ballot.pairs.keys()
    assert ann != bob
    assert ann == shown("ann", Ballot.of(many[::-1], seed=1))
    assert ann != shown("ann", Ballot.of(many, seed=2))
    assert 18 <= sum(left == "a" for _, left in ann) <= 42


@pytest.mark.parametrize("side", ["left", "right", "tie"])
def test_a_side_is_the_answer_that_stood_there(side) -> None:
    ballot = Ballot.of(PAIRS)
    for pair in PAIRS:
        found = ballot.vote("ann", pair, side)
        texts = {"a": pair.answer_a, "b": pair.answer_b}
        assert found.left == ballot.left("ann", pair)
        if side == "tie":
            assert found.vote == "tie"
        else:
            assert (texts[found.vote] == texts[found.left]) == (side == "left")


# The file -----------------------------------------------------------------------------------------


def test_votes_are_kept_once_each_by_any_number_of_threads(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "votes.jsonl")
    added: list[bool] = []

    def work() -> None:
        added.extend(votes.add(vote(pair, "ann", "a")) for pair in PAIRS)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(added) == len(PAIRS)
    assert len(read_votes(votes.path)) == len(PAIRS)
    assert not Votes(votes.path).add(vote(PAIRS[0], "ann", "b"))
    assert Votes(votes.path).of("ann") == {pair.id for pair in PAIRS}


def test_half_a_vote_of_a_process_that_died_harms_nothing(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    assert Votes(file).add(vote(PAIRS[0], "ann", "a"))
    with file.open("a") as torn:
        torn.write('{"pair": "ha')
    votes = Votes(file)
    assert votes.of("ann") == {PAIRS[0].id}
    assert votes.add(vote(PAIRS[1], "Ann \u2028 é", "tie"))
    assert [found.voter for found in read_votes(file)] == ["ann", "Ann \u2028 é"]


def test_a_line_that_is_no_vote_is_told(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    for line in ("[]", '{"pair": "x"}', json.dumps(vars(vote(SAME, "ann", "both")))):
        file.write_text(line + "\n")
        with pytest.raises(DataError, match=r"votes.jsonl:1: it is no vote"):
            Votes(file)


@pytest.mark.parametrize(
    "line", [{"pair": 3}, {"pair": [1]}, {"voter": None}, {"time": {}}, {"left": "c"}, {"x": 1}]
)
def test_a_vote_of_other_types_is_told(line: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    file.write_text(json.dumps(vars(vote(SAME, "ann", "a")) | line) + "\n")
    with pytest.raises(DataError, match=r"votes.jsonl:1: it is no vote"):
        read_votes(file)


@pytest.mark.parametrize("text", ["what I wrote", '{"mine": 1', "[" * 5000])
def test_a_text_of_somebody_is_not_taken_for_half_a_vote(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(text)
    with pytest.raises(DataError, match=r"mine.txt:1: it is no vote"):
        Votes(file)
    assert file.read_text() == text


def test_half_a_pair_of_surrogates_is_a_name_like_others(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    assert Votes(file).add(vote(PAIRS[0], "ann\ud800", "a"))
    assert [found.voter for found in read_votes(file)] == ["ann\ud800"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_vote_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch) -> None:
    import os

    votes = Votes(tmp_path / "votes.jsonl")
    with monkeypatch.context() as patch:

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="no space left"):
            votes.add(vote(PAIRS[0], "ann", "a"))
    assert votes.of("ann") == set()
    assert votes.path.read_bytes() == b""
    assert votes.add(vote(PAIRS[0], "ann", "a"))


def test_what_votes_come_to() -> None:
    votes = [vote(pair, "ann", "a") for pair in PAIRS] + [vote(PAIRS[0], "bob", "a", "b")]
    votes += [vote(PAIRS[1], "bob", "b", "b"), vote(SAME, "bob", "a")]
    found = tally(PAIRS, votes, {PAIRS[0].id: "a", PAIRS[1].id: "b"})
    assert (found.votes, found.others, found.by_voter) == (6, 1, {"ann": 4, "bob": 2})
    assert found.ratings["model-x"].value > found.ratings["model-y"].value
    assert found.kappas["bob", "the judge"] == (1.0, 2)
    assert found.kappas["ann", "bob"] == (0.0, 2)
    assert found.left == pytest.approx(5 / 6)
    assert json.loads(json.dumps(found.to_dict()))["votes"] == 6


# The page -----------------------------------------------------------------------------------------


def served(folder: Path, **options: Any) -> AbstractContextManager[str]:
    """Return the address of the page, while a test looks at it."""
    from quantadapt.judging.page import people_page
    from quantadapt.studio.page import page_app

    blocks = people_page(Ballot.of(PAIRS), Votes(folder / "votes.jsonl"))
    return pages.served(page_app(blocks, **options))


def client_of(address: str, **options: Any) -> Any:
    from gradio_client import Client

    return Client(address, verbose=False, download_files=False, **options)


def texts(panel: str) -> str:
    return unescape("".join(re.findall(r"<pre[^>]*>(.*?)</pre>", panel, re.DOTALL)))


def test_somebody_votes_and_goes_on_later(tmp_path: Path) -> None:
    ballot = Ballot.of(PAIRS)
    with served(tmp_path) as address:
        client = client_of(address)
        shown = client.predict("  ann\n b ", api_name="/begin")
        told, question, left, right, seen = shown
        assert "ann b: 0 of 4 done" in told
        pair = ballot.pairs[seen]
        assert texts(question) == pair.prompt
        assert "<img" not in question
        expected = [pair.answer_a, pair.answer_b]
        assert [texts(left), texts(right)] == expected[
            :: 1 if ballot.left("ann b", pair) == "a" else -1
        ]
        assert "model-" not in json.dumps(shown)  # nobody sees whose they are
        after = client.predict(seen, api_name="/vote_left")
        assert "1 of 4 done" in after[0]
        assert client.predict(seen, api_name="/vote_right")[-1] == after[-1]  # a click too many
    (kept,) = read_votes(tmp_path / "votes.jsonl")
    assert (kept.pair, kept.voter, kept.vote) == (seen, "ann b", kept.left)
    with served(tmp_path) as address:  # another time
        client = client_of(address)
        shown = client.predict("ann b", api_name="/begin")
        assert shown[-1] == after[-1]
        for _ in range(3):
            shown = client.predict(shown[-1], api_name="/vote_tie")
        assert "Thank you" in shown[0]
        client_of(address).predict("bob", api_name="/begin")
    votes = read_votes(tmp_path / "votes.jsonl")
    assert {found.pair for found in votes} == ballot.pairs.keys()
    assert [found.vote for found in votes[1:]] == ["tie"] * 3


def test_without_a_name_or_with_a_wrong_pair_nothing_is_kept(tmp_path: Path) -> None:
    with served(tmp_path) as address:
        client = client_of(address)
        assert "Say who you are" in client.predict(" ", api_name="/begin")[0]
        assert "Say who you are" in client.predict(PAIRS[0].id, api_name="/vote_left")[0]
        client.predict("ann", api_name="/begin")
        client.predict("no such pair", api_name="/vote_left")
    assert not (tmp_path / "votes.jsonl").exists()


def test_whoever_logs_in_votes_under_that_name(tmp_path: Path) -> None:
    with served(tmp_path, token="word") as address:
        client = client_of(address, auth=("eve", "word"))
        assert "eve: 0 of 4" in client.predict("ann", api_name="/begin")[0]


@pytest.fixture
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("there is no Chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.slow
def test_in_a_browser(tmp_path: Path, browser) -> None:
    with served(tmp_path) as address:
        page, troubles = browser.new_page(), list[str]()
        page.on("dialog", lambda dialog: troubles.append(dialog.message) or dialog.dismiss())
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(address)
        page.fill("#name input, #name textarea", "ann")
        page.press("#name input, #name textarea", "Enter")
        page.wait_for_selector("#left pre")
        assert UGLY in page.inner_text("#question pre")
        for number in range(1, 5):
            page.click("#vote-left" if number % 2 else "#vote-tie")
            page.get_by_text(f"{number} of 4 done").wait_for()
        page.get_by_text("Thank you").wait_for()
        assert not page.is_visible("#vote-left")
        assert troubles == []
    votes = read_votes(tmp_path / "votes.jsonl")
    assert [found.vote == found.left for found in votes] == [True, False, True, False]


# On the command line ------------------------------------------------------------------------------


def call(*arguments: str) -> int:
    try:
        cli.main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_report_and_what_it_needs(tmp_path: Path, capsys) -> None:
    write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    assert call("people", str(tmp_path), "--report") == 2
    assert "there are no votes yet" in capsys.readouterr().err
    votes = Votes(tmp_path / "votes.jsonl")
    for pair in PAIRS:
        votes.add(vote(pair, "ann", "a"))
        votes.add(vote(pair, "bob\x1b[31m", "tie" if pair is PAIRS[0] else "a"))
    said = [{"pair": p.id, "order": o, "verdict": "a"} for p in PAIRS[:2] for o in ("ab", "ba")]
    (tmp_path / "judgements.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in said))
    assert call("people", str(tmp_path), "--report") == 0
    out = capsys.readouterr().out
    assert out.index("model-x") < out.index("model-y")
    assert "the judge" in out
    assert "\x1b[31m" not in out
    assert call("people", str(tmp_path / "pairs.jsonl"), "--report", "--json") == 0
    assert json.loads(capsys.readouterr().out)["by_voter"]["ann"] == 4
    assert call("people", str(tmp_path), "--json") == 2
    assert call("people", str(tmp_path / "none")) == 2
    assert "there is no file" in capsys.readouterr().err


def test_what_cannot_be_served_is_refused(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("QUANTADAPT_TOKEN", raising=False)
    write_pairs(tmp_path / "pairs.jsonl", [SAME])
    assert call("people", str(tmp_path), "--port", "0") == 2
    assert "no pair has two different answers" in capsys.readouterr().err
    assert call("people", str(tmp_path), "--host", "0.0.0.0") == 2
    assert "QUANTADAPT_TOKEN" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert call("people", str(tmp_path), "--port", str(taken.getsockname()[1])) == 2
    assert "cannot be listened on" in capsys.readouterr().err


@pytest.mark.slow
def test_a_second_page_may_not_write_the_same_votes(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    command = [sys.executable, "-m", "quantadapt", "people", str(tmp_path), "--port", "0"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert first.stderr is not None
        while "the page is at" not in (line := first.stderr.readline()):
            assert line
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert f"process {first.pid}" in second.stderr
    finally:
        first.terminate()
        first.wait()
    assert first.returncode in (0, 143, -15)
