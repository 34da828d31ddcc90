"""The server, through the real client of OpenAI and by bare HTTP."""

import asyncio
import json
import queue
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import openai
import pytest
import torch

import quantadapt as qa
from quantadapt import demo
from quantadapt.cli.listening import listening, token_for
from quantadapt.cli.serve import _names, _paths, for_load, writers_for
from quantadapt.errors import SpecError
from quantadapt.generation import PromptWriter, Sampling
from quantadapt.generation.sampling import Chooser
from quantadapt.serving.app import Served, _sent, create_app
from quantadapt.serving.worker import Job, Worker
from quantadapt.testing.small_demo import small_model


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
def serving(model, tokenizer, *, token="", writers=None, **options):
    import uvicorn

    names = {"tuned": "default", "base": None, "other": "other"}
    worker = Worker(model, tokenizer, names, **options)
    writer = PromptWriter(tokenizer, "chat")
    served = Served(worker, writer, Sampling(max_new_tokens=8), 256, token, writers or {})
    config = uvicorn.Config(create_app(served), log_level="error", lifespan="off")
    server, listener = uvicorn.Server(config), listening("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    worker.start()
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()
        worker.stop()
        listener.close()


@pytest.fixture(scope="module")
def address(model, tokenizer):
    with serving(model, tokenizer, max_batch=4) as found:
        yield found


@pytest.fixture
def client(address):
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0)


PROMPT = "def add(a, b):\n"
JSON = {"Content-Type": "application/json"}
CHAT = [{"role": "user", "content": "Add a and b."}]


def stock(model, tokenizer, ids, count=8):
    output = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def test_answers_are_those_of_transformers(client, model, tokenizer) -> None:
    expected = {}
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)
    for name in ("tuned", "other"):
        model.set_adapter({"tuned": "default", "other": "other"}[name])
        expected[name] = stock(model, tokenizer, ids["input_ids"])
    with model.disable_adapter():
        expected["base"] = stock(model, tokenizer, ids["input_ids"])
    assert len(set(expected.values())) == 3
    for name, text in expected.items():
        found = client.chat.completions.create(model=name, messages=CHAT)
        assert found.choices[0].message.content == text
        assert found.usage.prompt_tokens == len(ids["input_ids"])
        assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
        parts = list(
            client.chat.completions.create(
                model=name, messages=CHAT, stream=True, stream_options={"include_usage": True}
            )
        )
        pieces = [part.choices[0].delta.content or "" for part in parts if part.choices]
        assert "".join(pieces) == text
        assert parts[-2].choices[0].finish_reason == found.choices[0].finish_reason
        assert parts[-1].usage == found.usage


def test_each_adapter_is_asked_as_its_run_learnt(model, tokenizer, tmp_path) -> None:
    """A run that learnt alpaca's layout beside one that learnt chats."""
    for name, form in (("a", "messages"), ("b", "alpaca")):
        (tmp_path / name).mkdir()
        metrics = {"data": {"files": [{"format": form}]}}
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    paths = {"a": str(tmp_path / "a"), "other": str(tmp_path / "b")}
    own = PromptWriter(tokenizer, "chat")
    writers = writers_for(own, paths, None)
    assert {name: writer.layout for name, writer in writers.items()} == {"other": "instruction"}
    assert writers_for(own, paths, "chat") == {}
    text = CHAT[0]["content"]
    prompt = f"### Instruction:\n{text}\n\n### Response:\n"
    asked = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)
    expected = {"tuned": len(asked["input_ids"]), "other": len(tokenizer(prompt)["input_ids"])}
    assert expected["tuned"] != expected["other"]
    with serving(model, tokenizer, writers=writers) as address:
        there = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        for name, count in expected.items():
            found = there.chat.completions.create(model=name, messages=CHAT)
            assert found.usage.prompt_tokens == count


def test_completions_of_texts_and_of_tokens(client, model, tokenizer) -> None:
    ids = tokenizer(PROMPT)["input_ids"]
    with model.disable_adapter():
        text = stock(model, tokenizer, ids, 6)
    for prompt in (PROMPT, ids, [PROMPT], [ids]):
        found = client.completions.create(model="base", prompt=prompt, max_tokens=6)
        assert found.choices[0].text == text
    for prompt in ([], [True], [PROMPT] * 300):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="base", prompt=prompt)
    with pytest.raises(openai.BadRequestError, match="logprobs=0 is not served"):
        client.completions.create(model="base", prompt=PROMPT, logprobs=0)
    nothing = dict.fromkeys(["n", "stream", "temperature", "logprobs", "stop", "echo", "seed"])
    nothing |= {"frequency_penalty": 0.0, "presence_penalty": 0, "best_of": 1, "max_tokens": 6}
    found = client.completions.create(model="base", prompt=PROMPT, extra_body=nothing)
    assert found.choices[0].text == text  # OpenAI takes null for each option
    both = client.completions.create(model="base", prompt=[PROMPT, PROMPT], n=2, max_tokens=6)
    assert [choice.text for choice in both.choices] == [text] * 4
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.usage.prompt_tokens == 2 * len(ids)  # each prompt once, as OpenAI counts
    assert both.usage.completion_tokens == 4 * found.usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_in_the_last_token_is_told_as_such(client, model, tokenizer, stream) -> None:
    ids = tokenizer(PROMPT)["input_ids"]
    model.set_adapter("default")
    stop = stock(model, tokenizer, ids, 6).removeprefix(stock(model, tokenizer, ids, 5))
    text = stock(model, tokenizer, ids, 6).partition(stop)[0]
    found = client.completions.create(
        model="tuned", prompt=PROMPT, max_tokens=6, stop=stop, stream=stream
    )
    parts = [part.choices[0] for part in found] if stream else found.choices
    assert "".join(part.text for part in parts) == text
    assert parts[-1].finish_reason == "stop"


def test_an_event_is_one_line_for_every_client() -> None:
    """httpx's iter_lines, among others, cut it in the middle of a text with such characters."""
    text = {"text": "größe\u2028日本\x85🙂\n"}
    sent = httpx.Response(200, text=_sent(text), headers={"Content-Type": "text/event-stream"})
    first, *rest = sent.iter_lines()
    assert json.loads(first.removeprefix("data: ")) == text
    assert [*rest] == [""]


def test_draws_repeat_with_their_seed(client) -> None:
    def ask(**options):
        found = client.chat.completions.create(
            model="tuned", messages=CHAT, temperature=1.5, n=3, **options
        )
        return [choice.message.content for choice in found.choices]

    first = ask(seed=1)
    assert first == ask(seed=1)
    assert len(set(first)) > 1
    assert first != ask(seed=2)


def test_models_are_listed(client) -> None:
    assert [model.id for model in client.models.list()] == ["tuned", "base", "other"]
    assert client.models.retrieve("other").owned_by == "quantadapt"


def test_many_at_once_get_their_own_answers(client, model, tokenizer) -> None:
    names, prompts = ("tuned", "base", "other"), [f"def f{n}(x):\n" for n in range(3)]

    def ask(job):
        name, prompt = job
        return client.completions.create(model=name, prompt=prompt, max_tokens=5).choices[0].text

    kinds = [(name, prompt) for name in names for prompt in prompts]
    alone = {job: ask(job) for job in kinds}
    assert len(set(alone.values())) > 3
    jobs = [kinds[n % len(kinds)] for n in range(27)]
    with ThreadPoolExecutor(27) as pool:
        assert list(pool.map(ask, jobs)) == [alone[job] for job in jobs]


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"model": "gpt"}, 404, "there is no model 'gpt'; served are tuned, base, other"),
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"frequency_penalty": 1.0}, 400, "frequency_penalty=1.0 is not served here"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"extra_body": {"bogus": 1}}, 400, "bogus: it is not known here"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "content"),
        ({"extra_body": {"top_k": 0}}, 400, "top_k: 0 is not possible; use a value greater than"),
        ({"seed": -1}, 400, "seed: -1 is not possible; use a value greater than"),
        ({"messages": [{"role": "user", "content": "a b c " * 200}]}, 400, "tokens; the model"),
    ],
)
def test_wrong_requests_are_told(client, options, status, words) -> None:
    wanted = {"model": "tuned", "messages": CHAT, **options}
    with pytest.raises(openai.APIStatusError, match=words) as caught:
        client.chat.completions.create(**wanted)
    assert caught.value.status_code == status
    assert client.chat.completions.create(model="tuned", messages=CHAT, max_tokens=1)


def test_requests_name_no_files_of_the_machine(tmp_path, monkeypatch) -> None:
    """Neither to have a picture read, nor to find out what there is."""
    from starlette.testclient import TestClient

    from quantadapt.cli import serve

    there = tmp_path / "there.png"
    there.write_bytes(b"x")
    found = []

    def run(served, _):
        client = TestClient(create_app(served), base_url="http://127.0.0.1")
        for name in (str(there), str(tmp_path / "nowhere.png"), f"file://{there}"):
            turn = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": name}}]}
            asked = {"model": next(iter(served.worker.names)), "messages": [turn]}
            answer = client.post("/v1/chat/completions", json=asked)
            found.append((answer.status_code, answer.json()["error"]["message"]))

    monkeypatch.setattr(serve, "_run", run)
    serve.serve(str(demo.MODEL_DIR), port=0, answers={})
    words = "messages: a picture is named by a path; send it as a data: URL"
    assert found == [(400, words)] * 3


def test_pages_of_other_hosts_do_not_use_it(address) -> None:
    models = f"{address}/models"
    assert httpx.get(models, headers={"Host": "evil.example:8000"}).status_code == 403
    assert httpx.get(models, headers={"Host": "localhost:1"}).status_code == 200
    body = {"model": "base", "prompt": "a", "max_tokens": 1}
    evil = {"Origin": "http://evil.example"}
    found = httpx.post(f"{address}/completions", json=body, headers=evil)
    assert (found.status_code, found.json()["error"]["message"][:6]) == (403, "a page")
    own = {"Origin": address.removesuffix("/v1")}
    assert httpx.post(f"{address}/completions", json=body, headers=own).status_code == 200


@pytest.mark.parametrize("body", ["{", "[]", '{"model": 1}', "\xff", '{"model": "tuned"}'])
def test_rubbish_is_no_harm(address, body) -> None:
    found = httpx.post(f"{address}/chat/completions", content=body.encode("latin-1"))
    assert found.status_code == 400
    assert found.json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{address}/bogus").status_code == 404
    assert httpx.get(address.replace("/v1", "/health")).json() == {"status": "ok"}


def test_text_that_cannot_be_encoded_is_told(address) -> None:
    for prompt in ("a\ud800", ["b", "\udcff"]):
        asked = json.dumps({"model": "base", "prompt": prompt})
        found = httpx.post(f"{address}/completions", content=asked, headers=JSON)
        assert found.status_code == 400, found.text
        assert "half a surrogate pair" in found.text


@pytest.mark.parametrize("temperature", [0, 1])
def test_numbers_that_are_none_are_no_answer(model, tokenizer, temperature) -> None:
    weight = model.get_base_model().model.norm.weight.data
    kept = weight.clone()
    weight[0] = float("nan")
    asked = {"model": "tuned", "prompt": PROMPT, "temperature": temperature}
    try:
        with serving(model, tokenizer) as address:
            found = httpx.post(f"{address}/completions", json=asked)
    finally:
        weight.copy_(kept)
    assert found.status_code == 500
    assert "NaN or infinity" in found.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(model, tokenizer, monkeypatch, stream) -> None:
    chosen, choose = [0], Chooser.__call__

    def slowly(*args):
        chosen[0] += 1
        time.sleep(0.02)  # the server looks every half second who is gone: 25 tokens
        return choose(*args)

    monkeypatch.setattr(Chooser, "__call__", slowly)
    with serving(model, tokenizer, max_batch=1) as address:
        url = f"{address}/completions"
        body = {"model": "tuned", "prompt": PROMPT, "max_tokens": 100}
        body |= {"temperature": 2.0, "seed": 1}
        asked = {"json": body | {"stream": stream}, "timeout": 0.2}
        with suppress(httpx.ReadTimeout), httpx.stream("POST", url, **asked) as found:
            next(found.iter_lines())
        one = httpx.post(url, json=body | {"max_tokens": 1}, timeout=60)
        assert one.json()["usage"]["completion_tokens"] == 1
        until_then, chosen[0] = chosen[0], 0
        whole = httpx.post(url, json=body, timeout=120).json()["usage"]["completion_tokens"]
    assert whole == chosen[0] > 80
    assert until_then < 60


def test_one_who_cannot_be_answered_stops_nobody_else(model, tokenizer, monkeypatch) -> None:
    choose = Chooser.__call__

    def breaking(self, logits, ids):
        if self.sampling.seed == 13:
            raise RuntimeError("no luck")
        return choose(self, logits, ids)

    monkeypatch.setattr(Chooser, "__call__", breaking)
    with serving(model, tokenizer) as address:

        def ask(seed):
            body = {"model": "tuned", "prompt": PROMPT, "max_tokens": 20, "seed": seed}
            body["temperature"] = 1.0
            return httpx.post(f"{address}/completions", json=body, timeout=60).status_code

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(ask, [1, 2, 13, 4])) == [200, 200, 500, 200]


def test_halting_ends_what_is_being_answered(model, tokenizer) -> None:
    told = []
    worker = Worker(model, tokenizer, {"tuned": "default"}, max_batch=1)
    worker.start()
    many = Sampling(max_new_tokens=400, temperature=2.0, seed=1)
    for number in range(3):
        worker.submit(Job("tuned", [5, 6, 7], many, number, told.append))
    while not told:
        time.sleep(0.01)
    started = time.perf_counter()
    worker.stop()
    assert time.perf_counter() - started < 5
    assert [event.text for event in told if event.finish] == ["the server is stopping"] * 3


def test_too_many_are_told_to_come_again(model, tokenizer) -> None:
    with serving(model, tokenizer, max_batch=1, max_waiting=2) as address:

        def ask(_):
            body = {"model": "tuned", "prompt": PROMPT, "max_tokens": 40}
            return httpx.post(f"{address}/completions", json=body, timeout=120)

        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(ask, range(12)))
        codes = [answer.status_code for answer in found]
        assert set(codes) == {200, 429}
        assert {a.headers.get("retry-after") for a in found if a.status_code == 429} == {"1"}
        assert ask(0).status_code == 200


def test_a_failure_ends_its_requests_and_nothing_else(model, tokenizer, monkeypatch) -> None:
    base = model.get_base_model()
    forward = base.forward

    def failing(*args, **kwargs):
        if kwargs["input_ids"].shape[1] > 30:
            raise RuntimeError("too long for me")
        return forward(*args, **kwargs)

    with serving(model, tokenizer) as address:
        monkeypatch.setattr(base, "forward", failing)
        body = {"model": "tuned", "prompt": PROMPT * 8, "max_tokens": 2}
        found = httpx.post(f"{address}/completions", json=body, timeout=60)
        assert found.status_code == 500
        assert "too long for me" in found.json()["error"]["message"]
        body["prompt"] = PROMPT
        assert httpx.post(f"{address}/completions", json=body, timeout=60).status_code == 200


def test_a_token_is_asked_for_and_never_logged(model, tokenizer, caplog, capfd) -> None:
    with serving(model, tokenizer, token="secret-token") as address:
        with pytest.raises(openai.AuthenticationError, match="show the server's token"):
            openai.OpenAI(base_url=address, api_key="secret-tokem", max_retries=0).models.list()
        client = openai.OpenAI(base_url=address, api_key="secret-token", max_retries=0)
        assert client.completions.create(model="base", prompt=PROMPT, max_tokens=1)
    out = capfd.readouterr()
    assert "secret-token" not in json.dumps([caplog.text, out.out, out.err])


def test_adapters_that_work_together_answer_together(tokenizer, tmp_path) -> None:
    """Also once another one was asked: the first of them answered alone then."""
    model = qa.attach(qa.quantize(str(small_model()), "none", device="cpu"), r=2)
    model.add_adapter("other", model.peft_config["default"])
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.base_model.set_adapter(["default", "other"])
    loaded = qa.load(qa.save(model, tmp_path)).eval()
    names = _names(loaded, "both", {})
    assert names == {
        "both": ("default", "other"),
        "base": None,
        "default": "default",
        "other": "other",
    }
    ids = tokenizer(PROMPT)["input_ids"]
    expected = {}
    for name, active in names.items():
        model.base_model.set_adapter([active] if isinstance(active, str) else list(active or ()))
        expected[name] = stock(model.eval(), tokenizer, ids)
    assert len(set(expected.values())) == 4
    worker, found = Worker(loaded, tokenizer, names), queue.Queue()
    worker.start()
    try:
        for name in (*names, *names):
            text = ""
            worker.submit(Job(name, ids, Sampling(max_new_tokens=8), 0, found.put))
            while not (event := found.get(timeout=60)).finish:
                text += event.text
            assert text + event.text == expected[name], name
    finally:
        worker.stop()


def test_no_two_models_have_one_name(model) -> None:
    assert _names(model, "tuned", {}) == {"tuned": "default", "base": None, "other": "other"}
    for name in ("base", "other"):
        with pytest.raises(SpecError, match="choose another --name"):
            _names(model, name, {})
    with pytest.raises(SpecError, match="two models are called 'base'"):
        _names(model, "tuned", {"base": "beside_0"})
    assert _paths(["b=runs/b=1", "v1.2=c"]) == {"b": "runs/b=1", "v1.2": "c"}
    for wrong in (["b"], ["=b"], ["b="], ["b=1", "b=2"]):
        with pytest.raises(SpecError, match="NAME=PATH"):
            _paths(wrong)


def test_where_it_listens(monkeypatch) -> None:
    monkeypatch.delenv("QUANTADAPT_TOKEN", raising=False)
    for host in ("127.0.0.1", "localhost", "::1"):
        assert token_for(host) == ""
    for host in ("0.0.0.0", "::", "example.org", "192.168.0.4"):
        with pytest.raises(SpecError, match="QUANTADAPT_TOKEN"):
            token_for(host)
    monkeypatch.setenv("QUANTADAPT_TOKEN", "x")
    assert token_for("0.0.0.0") == "x"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SpecError, match=f"127.0.0.1:{port} cannot be listened on: address"):
            listening("127.0.0.1", port)


def test_a_body_in_pieces_ends_at_16_mib(model, tokenizer) -> None:
    """It is refused as soon as that much has come, and not when it ends: this one never does."""
    writer = PromptWriter(tokenizer, "chat")
    worker = Worker(model, tokenizer, {"base": None})
    app = create_app(Served(worker, writer, Sampling(), 256, "secret"))
    headers = [(b"content-type", b"application/json"), (b"transfer-encoding", b"chunked")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
    }
    piece, read, sent = b" " * 2**20, [], []

    async def receive():
        read.append(None)
        assert len(read) < 32
        return {"type": "http.request", "body": piece, "more_body": True}

    async def send(message):
        sent.append(message)

    def answered(*shown):
        read.clear()
        sent.clear()
        asyncio.run(app(scope | {"headers": [*headers, *shown]}, receive, send))
        return sent[0]["status"], json.loads(sent[1]["body"])["error"]

    status, error = answered((b"authorization", b"Bearer secret"))
    assert (status, error["message"]) == (413, "the request is larger than 16 MiB")
    assert len(read) == 17
    assert answered()[0] == 401
    assert not read  # nobody who does not show the token is listened to


def test_who_wants_more_is_sent_to_a_server_for_load(tmp_path) -> None:
    """With what the rules allow, the least first; where nothing is, nothing is said."""
    cases = {"bnb-nf4": "adapter", "hqq": "merged"}
    for backend, content in cases.items():
        saved = qa.save(
            qa.attach(qa.quantize(str(small_model()), backend), r=4), tmp_path / backend
        )
        told = for_load(str(saved))
        assert told == f"quantadapt export {saved} vllm --set content={content}"
    dora = qa.attach(qa.quantize(str(small_model()), "bnb-nf4"), "dora", r=4)
    assert for_load(str(qa.save(dora, tmp_path / "dora"))).endswith("content=requantized")
    assert for_load(str(small_model())) == ""
    assert for_load("org/name") == ""
