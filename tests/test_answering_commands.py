"""`quantadapt generate`, `chat` and `serve` as a user meets them.

CI takes the slow one where `quantadapt.serving` or `quantadapt.generation` change.
"""

import io
import json
import signal
import subprocess
import sys

import httpx
import pytest
import torch

from quantadapt import cli, demo

MODEL = str(demo.MODEL_DIR)
QUESTION = "Write a function that adds a and b."


@pytest.fixture
def say(capsys, monkeypatch, tmp_path):
    """Run a command with lines on stdin; returns code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, lines="", **given):
        monkeypatch.setattr("sys.stdin", given.get("stdin", io.StringIO(lines)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([*map(str, arguments)])
        shown = capsys.readouterr()
        code = ended.value.code
        return code if isinstance(code, int) else 0, shown.out, shown.err

    return call


@pytest.fixture(scope="module")
def expected():
    """What stock transformers answers, greedily, to the question in a chat and as it stands."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    user = {"role": "user", "content": QUESTION}
    system = {"role": "system", "content": "def f(x):"}
    chats = [
        tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        for turns in ([user], [system, user])
    ]
    found = []
    for ids in (chats[0]["input_ids"], tokenizer(QUESTION)["input_ids"], chats[1]["input_ids"]):
        output = model.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False)
        found.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
    return found


SHORT = ("--max-new-tokens", "10", "--device", "cpu")


def test_generate_asks_in_the_layout_of_the_model(say, expected) -> None:
    code, out, err = say("generate", MODEL, "--prompt", QUESTION, *SHORT)
    assert (code, out) == (0, f"{expected[0]}\n")
    assert "prompts as the chat template writes a chat" in err
    assert "--base" not in err
    code, out, err = say("generate", MODEL, "--base", "--prompt", QUESTION, *SHORT)
    assert (code, out) == (0, f"{expected[0]}\n")
    assert "--base has no effect" in err
    code, out, _ = say("generate", MODEL, "-p", "-", "--layout", "text", *SHORT, lines=QUESTION)
    assert (code, out) == (0, f"{expected[1]}\n")


def test_generate_answers_a_file(say, expected, tmp_path) -> None:
    rows = [{"prompt": QUESTION, "id": 1}, {"prompt": "def add(a, b):", "id": 2}]
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    wanted = ("generate", MODEL, "--file", file, "--out", out, *SHORT)
    code, _, err = say(*wanted)
    assert code == 0, err
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in found] == [1, 2]
    assert found[0]["answer"] == expected[0]
    assert found[0]["answer_tokens"] <= 10
    code, _, err = say(*wanted)
    assert code == 2
    assert "there already" in err


def test_the_prompts_are_not_written_over(say, tmp_path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "x"}\n{"prompt": "long "}\n', encoding="utf-8")
    code, _, err = say("generate", MODEL, "--file", file, "--out", file, "--overwrite")
    assert code == 2
    assert "it is the file of prompts" in err
    assert len(file.read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "there is nothing to answer"),
        (("-p", "x", "--file", "y.jsonl"), "--prompt and --file are both given"),
        (("-p", "x", "--out", "y.jsonl"), "--out takes the answers to a --file"),
        (("-p", "x", "--temperature", "-1"), "temperature"),
        (("-p", "x", "--layout", "poem"), "'poem' is no layout"),
        (("--file", "missing.jsonl"), "missing.jsonl"),
    ],
)
def test_generate_says_what_is_wrong(say, flags, words) -> None:
    code, out, err = say("generate", MODEL, *flags)
    assert code == 2
    assert words in err
    assert out == ""


def test_a_chat(say, expected) -> None:
    lines = f"{QUESTION}\n/again\n/reset\n{QUESTION}\n/adapter off\n/set top_p 7\n/x\n/help\n"
    code, out, err = say("chat", MODEL, *SHORT, lines=lines)
    assert code == 0, err
    assert out == f"{expected[0]}\n" * 3
    for words in (
        "there is no adapter",
        "a new chat",
        "top_p",
        "there is no /x",
        "/system TEXT",
    ):
        assert words in err
    code, out, _ = say("chat", MODEL, *SHORT, lines=f"/system def f(x):\n{QUESTION}\n/exit\nmore\n")
    assert (code, out) == (0, f"{expected[2]}\n")


def test_what_is_no_text_is_told(say) -> None:
    lines = b"he\xff\xfello\n/x\xff\n/set seed " + b"9" * 5000 + b"\n/set top_p '['\n/help\n"
    for command in (("generate", MODEL, "-p", "-", *SHORT), ("chat", MODEL, *SHORT)):
        given = io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8")
        code, out, err = say(*command, stdin=given)
        assert "half a surrogate pair" in err
        assert "not expected" not in err, err
        assert out == ""
        assert code == (1 if command[0] == "generate" else 0)
    assert "there is no /x\\udcff" in err
    assert "this number is too long" in err
    assert "forget the chat" in err, "it goes on after each of them"
    code, out, err = say("chat", MODEL, *SHORT, stdin=None)
    assert (code, out) == (0, ""), "a closed stdin is an empty one"


@pytest.mark.slow
def test_serve_until_it_is_told_to_stop(expected, tmp_path) -> None:
    command = [sys.executable, "-m", "quantadapt", "serve", MODEL, "--port", "0", *SHORT]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as server:
        try:
            for line in server.stderr:
                if "serving at " in line:
                    break
            address = line.split("serving at ")[1].split()[0]
            turns = [{"role": "user", "content": QUESTION}]
            found = httpx.post(
                f"{address}/chat/completions",
                json={"model": "model", "messages": turns},
                timeout=60,
            )
            assert found.json()["choices"][0]["message"]["content"] == expected[0]
            server.send_signal(signal.SIGTERM)
            out, err = server.communicate(timeout=60)
        finally:
            server.kill()
    assert server.returncode == 0, err
    assert out == ""
    assert "stopped" in err


def test_serve_refuses_before_it_loads(say, monkeypatch) -> None:
    monkeypatch.delenv("QUANTADAPT_TOKEN", raising=False)
    code, _, err = say("serve", MODEL, "--host", "0.0.0.0")
    assert code == 2
    assert "set QUANTADAPT_TOKEN" in err
    code, _, err = say("serve", "no-such-folder", "--port", "0")
    assert code in (1, 2)
    assert "no-such-folder" in err
