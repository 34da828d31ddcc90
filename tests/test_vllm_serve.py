"""`benchmarks/serving.py` against a server by HTTP: here a stand-in of the command `vllm serve`,
which takes the options that it is given and answers by transformers and PEFT."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_gguf import command, tuned
from test_vllm import SCRIPT

from quantadapt.demo import MODEL_DIR

STAND_IN = """#!{python}
import argparse, json, os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("verb", choices=["serve"])
parser.add_argument("model")
for name in ("dtype", "port", "served-model-name", "chat-template", "lora-modules"):
    parser.add_argument("--" + name)
parser.add_argument("--max-lora-rank", type=int)
parser.add_argument("--gpu-memory-utilization", type=float)
parser.add_argument("--enable-lora", action="store_true")
parser.add_argument("--enforce-eager", action="store_true")
given = parser.parse_args()
tokenizer = AutoTokenizer.from_pretrained(given.model)
model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
name = given.served_model_name or given.model
if given.enable_lora:
    from peft import PeftModel

    name, path = given.lora_modules.split("=")
    model = PeftModel.from_pretrained(model, path).eval()
template = open(given.chat_template).read() if given.chat_template else tokenizer.chat_template


def scores(ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def told(row, token):
    ids = {{token, int(row.argmax())}}
    return {{id_: (float(row[id_]), int((row > row[id_]).sum()) + 1) for id_ in ids}}


def completions(asked):
    ids = asked["prompt"]
    if "prompt_logprobs" in asked:
        assert not given.enable_lora  # vLLM has none with an adapter
        rows = scores(ids)
        found = [told(row, token) for row, token in zip(rows, ids[1:])]
        parts = lambda lp, rank: {{"logprob": lp, "rank": rank, "decoded_token": ""}}
        values = [{{str(id_): parts(*one[id_]) for id_ in one}} for one in found]
        return {{"choices": [{{"prompt_logprobs": [None, *values]}}]}}
    assert asked["return_tokens_as_token_ids"] and asked["logprobs"] == 1
    [token] = asked["allowed_token_ids"]
    found = {{f"token_id:{{id_}}": lp for id_, (lp, _) in told(scores(ids)[-1], token).items()}}
    chosen = f"token_id:{{token}}"
    told_ = {{"tokens": [chosen], "token_logprobs": [found[chosen]], "top_logprobs": [found]}}
    return {{"choices": [{{"logprobs": told_}}]}}


def chat(asked):
    assert asked["return_token_ids"]
    how = {{"chat_template": template, "add_generation_prompt": True, "return_dict": False}}
    return {{"prompt_token_ids": tokenizer.apply_chat_template(asked["messages"], **how)}}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({{}})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (asked["model"], asked["max_tokens"], asked["temperature"]) == (name, 1, 0)
        paths = {{"/v1/completions": completions, "/v1/chat/completions": chat}}
        self.answer(paths[self.path](asked))

    def answer(self, value):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_):
        pass


ThreadingHTTPServer.request_queue_size = 64  # 16 ask at once
ThreadingHTTPServer(("127.0.0.1", int(given.port)), Handler).serve_forever()
"""


@pytest.fixture
def there(tmp_path, monkeypatch) -> None:
    """Have a command `vllm`, and a module that is found."""
    script = tmp_path / "bin" / "vllm"
    script.parent.mkdir()
    script.write_text(STAND_IN.format(python=sys.executable))
    script.chmod(0o755)
    (script.parent / "vllm.py").touch()
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(script.parent))


def served(folder: Path) -> tuple[dict[str, float], int]:
    given = [sys.executable, SCRIPT, folder, "--serve"]
    found = subprocess.run(given, capture_output=True, text=True, check=False)
    assert found.stdout, found.stderr
    return json.loads(found.stdout), found.returncode


@pytest.mark.slow
@pytest.mark.parametrize("content", ["merged", "adapter"])
def test_the_command_beside_an_export_is_started_and_asked(content, tmp_path, there) -> None:
    run = tuned(tmp_path / "run", base=MODEL_DIR, backend="none")
    metrics = {"data": {"files": [{"format": "alpaca"}]}}
    (run.parent / "metrics.json").write_text(json.dumps(metrics))
    wanted = ["--set", f"content={content}", "--set", "examples=1", "-o", tmp_path]
    assert command("export", run, "vllm", *wanted) == 0
    folder = tmp_path / "vllm"
    figures, code = served(folder)
    assert code == 0
    assert figures["mean_apart"] < 1e-4
    assert figures["same_first_choice"] > 0.98
    assert figures["tokens"] == len(
        json.loads((folder / "expected.json").read_text())["examples"][0]["logprobs"]
    )
    assert figures["chats"] == figures["chats_alike"] == 3
    readme = (folder / "README.md").read_text()
    asked = re.search(r"/v1/chat/completions .*-d '(.*?)'\n", readme, flags=re.S)[1]
    assert json.loads(asked)["model"] == "tuned"
    if content == "merged":  # one start will do
        return
    (folder / "README.md").write_text(readme.replace(" --chat-template as_learnt.jinja", ""))
    figures, code = served(folder)  # the template of the base begins no text
    assert (code, figures["chats_alike"]) == (1, 0)


@pytest.mark.slow
def test_a_server_that_does_not_come_up_is_a_sentence(tmp_path, there) -> None:
    (tmp_path / "expected.json").write_text('{"model": ".", "examples": [], "chats": []}')
    given = [sys.executable, SCRIPT, tmp_path, "--serve"]
    for text, says in (
        (
            "```bash\nvllm serve nothing-there\n```\n",
            "it did not come up: vllm serve nothing-there",
        ),
        ("", "has no command: export it again"),
    ):
        (tmp_path / "README.md").write_text(text)
        found = subprocess.run(given, capture_output=True, text=True, check=False)
        assert found.returncode == 1
        assert says in found.stderr.splitlines()[-1]
