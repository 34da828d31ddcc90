"""The page of `quantadapt demo`, through Gradio's own client and by bare HTTP."""

import json
import re
import socket
import threading
from contextlib import contextmanager
from html import unescape

import httpx
import pytest
import torch
from pages import served

import quantadapt as qa
from quantadapt import demo
from quantadapt.data.tokens import encode_prompt
from quantadapt.generation import PromptWriter, Sampling
from quantadapt.generation.questions import Question, held_out_questions
from quantadapt.spec import DataSpec
from quantadapt.studio.demo import demo_page
from quantadapt.studio.page import page_app
from quantadapt.studio.speaking import BASE, Speaker
from quantadapt.testing.small_demo import small_model

GREEDY = [5, 0, "", 1, 0, 1, "", ""]
"""Values of the options, in the order of `Sampling`."""
UGLY = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture(scope="module")
def model():
    """Two layers of the demo in hqq with two adapters that say other things."""
    torch.manual_seed(0)
    found = qa.attach(qa.quantize(str(small_model()), "hqq", device="cpu"), r=4)
    found.add_adapter("other", found.peft_config["default"])
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return found.eval()


@contextmanager
def speaking(model, tokenizer, layout="chat", **more):
    found = Speaker.open(model, PromptWriter(tokenizer, layout), name="it", **more)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def address(model, tokenizer):
    asked = [Question(f"Add a and b. {UGLY}", f"# {UGLY}", "be brief"), Question("Two", "2")]
    with speaking(model, tokenizer, questions=asked) as speaker:
        blocks = demo_page(speaker, Sampling(max_new_tokens=5))
        with served(page_app(blocks)) as found:
            yield found


@pytest.fixture
def client(address, tmp_path):
    from gradio_client import Client

    return Client(address, verbose=False, download_files=str(tmp_path))


def texts(panel: str) -> list[str]:
    """Return what a panel shows, turn by turn."""
    return [unescape(found) for found in re.findall(r"<pre[^>]*>(.*?)</pre>", panel, re.DOTALL)]


def stock(model, tokenizer, turns, count=5):
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    ids = ids["input_ids"]
    output = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def test_both_sides_answer_as_transformers_does(client, model, tokenizer) -> None:
    system, first, second = "Be brief.", f"Add a and b. {UGLY}", "Now three."
    expected = {}
    for name in ("default", "other", None):
        opening = [{"role": "system", "content": system}]
        model.set_adapter(name or "default")
        said = []
        for question in (first, second):
            opening.append({"role": "user", "content": question})
            if name is None:
                with model.disable_adapter():
                    said.append(stock(model, tokenizer, opening))
            else:
                said.append(stock(model, tokenizer, opening))
            opening.append({"role": "assistant", "content": said[-1]})
        expected[name] = said
    assert expected["default"] != expected["other"] != expected[None] != expected["default"]
    for voices in ((BASE, "adapter default"), ("adapter other", BASE)):
        for count, question in enumerate((first, second), 1):
            _, left, right, _ = client.predict(question, system, *voices, *GREEDY, api_name="/ask")
            for panel, voice in ((left, voices[0]), (right, voices[1])):
                answers = expected[None if voice == BASE else voice.removeprefix("adapter ")]
                assert texts(panel)[1::2] == answers[:count]
                assert texts(panel)[0] == first
                assert "<img" not in panel
                assert "<script" not in panel
        _, left, right, _ = client.predict(*voices, api_name="/anew")
        assert (left + right).count("<pre") == 0


def test_questions_of_the_data_show_their_answer(client) -> None:
    question, system = client.predict(0, api_name="/example")
    assert (question, system) == (f"Add a and b. {UGLY}", "be brief")
    expected = client.predict(question, system, BASE, BASE, *GREEDY, api_name="/ask")[3]
    assert texts(expected) == [f"# {UGLY}"]
    assert client.predict("no such", "", BASE, BASE, *GREEDY, api_name="/ask")[3] == ""


def test_what_cannot_be_asked_is_told(client) -> None:
    long = client.predict("a b c " * 300, "", BASE, BASE, *GREEDY, api_name="/ask")
    assert re.search(r"the prompt has [\d,]+ tokens; the model takes 512 with the answer", long[1])
    after = client.predict("short", "", BASE, BASE, *GREEDY, api_name="/ask")
    assert len(texts(after[1])) == 3  # the long question, the short one and its answer
    wrong = [5, 0, "few", 1, 0, 1, "-3", ""]
    told = client.predict("short", "", BASE, BASE, *wrong, api_name="/ask")[3]
    assert "top_k" in told
    assert "seed" in told
    nothing = client.predict("  ", "", BASE, BASE, *GREEDY, api_name="/ask")
    assert nothing[1] == after[1]


def test_an_answer_that_is_stopped_ends(model, tokenizer) -> None:
    stopped = threading.Event()
    turns = [{"role": "user", "content": "Add a and b."}]
    sampling = Sampling(max_new_tokens=200, temperature=2.0, seed=1)
    with speaking(model, tokenizer) as speaker:
        asked = {"left": (BASE, turns), "right": ("adapter other", turns)}
        for said in speaker.answers(asked, sampling, stopped):
            if all(one.text for one in said.values()):
                stopped.set()
        assert {one.finish for one in said.values()} <= {"stopped", "stop"}
        assert all(0 < one.tokens < 200 for one in said.values())
        *_, last = speaker.answers(asked, Sampling(max_new_tokens=3), threading.Event())
        assert {one.tokens for one in last.values()} == {3}  # the places are free again


def test_each_layout_is_asked_as_it_learnt(model, tokenizer) -> None:
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    with speaking(model, tokenizer, "instruction") as speaker:
        assert speaker.takes_system
        assert not speaker.chats
        *_, said = speaker.answers(
            {"left": (BASE, turns)}, Sampling(max_new_tokens=4), threading.Event()
        )
    ids = encode_prompt(tokenizer, "S\n\n### Instruction:\nQ\n\n### Response:\n")
    with model.disable_adapter():
        output = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
    assert said["left"].text == tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def test_the_page_is_for_this_machine_alone(address) -> None:
    found = httpx.get(address)
    assert found.status_code == 200
    policy = found.headers["content-security-policy"]
    assert policy.startswith("default-src 'self' ")
    assert "http" not in policy
    config = httpx.get(f"{address}/config").json()
    assert config["analytics_enabled"] is False
    for host in ("evil.example", "evil.example:80", "192.168.1.4", ""):
        assert httpx.get(address, headers={"Host": host}).status_code == 403
    assert httpx.get(address, headers={"Host": "localhost:99"}).status_code == 200
    url = f"{address}/gradio_api/call/stop"
    answers = [
        httpx.post(url, json={"data": []}, headers={"Origin": origin}).status_code
        for origin in ("http://evil.example", "null", address)
    ]
    assert answers == [403, 403, 200]


def test_a_token_is_asked_for(model, tokenizer) -> None:
    with speaking(model, tokenizer, questions=[Question("hush hush", "")]) as speaker:
        app = page_app(demo_page(speaker, Sampling()), token="tök3n", any_host=True)
        with served(app) as address:
            shown = httpx.get(address).text
            assert not [word for word in ("hush", "other", "/ask") if word in shown]
            for path in ("config", "gradio_api/info"):
                assert httpx.get(f"{address}/{path}").status_code == 401
            for password, status in (("t", 400), ("tok3n", 400), ("tök3n", 200)):
                data = {"username": "any", "password": password}
                with httpx.Client() as browser:
                    assert browser.post(f"{address}/login", data=data).status_code == status
                    after = browser.get(f"{address}/config", headers={"Host": "x.example"})
                    assert after.status_code == (200 if status == 200 else 401)


def test_a_model_without_adapter_answers_alone(tokenizer) -> None:
    model = qa.quantize(str(demo.MODEL_DIR), "none", device="cpu")
    with speaking(model, tokenizer) as speaker:
        assert list(speaker.voices) == [BASE]
        turns = [{"role": "user", "content": "Add a and b."}]
        *_, said = speaker.answers(
            {"right": (BASE, turns)}, Sampling(max_new_tokens=5), threading.Event()
        )
        assert said["right"].text == stock(model, tokenizer, turns)


ROWS = {
    "alpaca": ({"instruction": "I", "input": "X", "output": "O"}, Question("I\n\nX", "O")),
    "alpaca without input": ({"instruction": "I", "output": "O"}, Question("I", "O")),
    "dolly": ({"instruction": "I", "context": "C", "response": "R"}, Question("I\n\nC", "R")),
    "pair": ({"prompt": "P", "completion": "C"}, Question("P", "C")),
    "text": ({"text": "a" * 90}, Question("a" * 80, "a" * 10)),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "H"},
                {"from": "gpt", "value": "G"},
            ]
        },
        Question("H", "G", "S"),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_held_out_data_say_what_they_ask(tmp_path, name) -> None:
    row, expected = ROWS[name]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([json.dumps(row)] * 4), encoding="utf-8")
    found = held_out_questions(DataSpec(path=str(file), eval_path=str(file)), seed=0, most=2)
    assert found == [expected] * 2
    split = DataSpec(path=str(file), eval_fraction=0.5)
    assert held_out_questions(split, seed=3, most=9) == [expected] * 2


def test_the_command_refuses_before_it_loads(capsys, tmp_path, monkeypatch) -> None:
    from quantadapt import cli

    def told(*options: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["demo", str(tmp_path), *options])
        return ended.value.code, capsys.readouterr().err

    monkeypatch.delenv("QUANTADAPT_TOKEN", raising=False)
    code, words = told("--host", "0.0.0.0")
    assert code == 2
    assert "QUANTADAPT_TOKEN" in words
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, words = told("--port", port)
        assert code == 2
        assert f"127.0.0.1:{port} cannot be listened on" in words
    code, words = told("--questions", str(tmp_path / "none.jsonl"))
    assert code == 1
    assert "there is no such file" in words
    monkeypatch.setattr("quantadapt.cli.listening.installed_version", lambda _: None)
    code, words = told()
    assert code == 1
    assert "the demo needs gradio, which is not installed" in words
    assert "pip install 'quantadapt[studio]'" in words
