"""Does vLLM answer as the tuned model did? Compares it with `expected.json` of the export `vllm`.

    python benchmarks/serving.py runs/nf4-lora/vllm
    python benchmarks/serving.py runs/nf4-lora/vllm --serve

Runs where vLLM is installed; quantadapt need not be there. The first asks vLLM's engine, the second
starts the command of the folder's README.md and asks that server by HTTP; `--url` asks one that is
there, anywhere. Prints one JSON line: how far the log-probabilities of held-out tokens are from
those noted, for which share of them the first choice is the same, and by HTTP how many of the chats
noted the server writes with the same tokens. Ends with 1 where the mean is further off than
`--limit` nats, or a chat is written otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NAME = "tuned"
START = 600
"""Seconds until a server has to answer; it may compile the model first."""


def compare(expected: list[dict[str, Any]], answered: list[list[Any]]) -> dict[str, float]:
    """Return figures of vLLM's `prompt_logprobs`, one list for each example, whose entries hold for
    a token id its log-probability and rank."""
    apart, same = [], 0
    for example, answer in zip(expected, answered, strict=True):
        for place, token in enumerate(example["tokens"][1:]):
            found = answer[place + 1]
            apart.append(abs(found[token].logprob - example["logprobs"][place]))
            first = min(found, key=lambda id_: found[id_].rank)
            same += first == example["first_choices"][place]
    return {
        "tokens": len(apart),
        "mean_apart": sum(apart) / len(apart),
        "max_apart": max(apart),
        "same_first_choice": same / len(apart),
    }


class Server:
    """vLLM's, by HTTP."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        data = json.dumps({"model": NAME, "temperature": 0, "max_tokens": 1, **body}).encode()
        request = urllib.request.Request(f"{self.url}/v1/{path}", data)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=START) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except OSError:
            return False

    def logprobs(self, tokens: list[int]) -> list[Any]:
        """Return what vLLM's engine calls `prompt_logprobs`."""
        found = self.ask("completions", prompt=tokens, prompt_logprobs=1)["choices"][0]
        return [values and _by_id(values) for values in found["prompt_logprobs"]]

    def logprob_after(self, tokens: list[int], token: int) -> dict[int, Any]:
        """Return the log-probabilities of a token and of the first choice after those before it."""
        how = {"logprobs": 1, "return_tokens_as_token_ids": True, "allowed_token_ids": [token]}
        told = self.ask("completions", prompt=tokens, **how)["choices"][0]["logprobs"]
        known = {**told["top_logprobs"][0], told["tokens"][0]: told["token_logprobs"][0]}
        return _ranked({int(name.removeprefix("token_id:")): known[name] for name in known})

    def answers(self, noted: dict[str, Any]) -> list[list[Any]]:
        """Return what `answers` does."""
        asked = [example["tokens"] for example in noted["examples"]]
        if "adapter" not in noted:
            return [self.logprobs(tokens) for tokens in asked]
        with ThreadPoolExecutor(16) as pool:
            after = [
                [
                    pool.submit(self.logprob_after, tokens[:i], tokens[i])
                    for i in range(1, len(tokens))
                ]
                for tokens in asked
            ]
            return [[None, *(each.result() for each in row)] for row in after]

    def chats_alike(self, noted: dict[str, Any]) -> int:
        """Return how many chats the server writes with the tokens that are noted."""
        alike = 0
        for chat in noted["chats"]:
            how = {"messages": chat["messages"], "return_token_ids": True}
            alike += self.ask("chat/completions", **how)["prompt_token_ids"] == chat["prompt"]
        return alike


def _by_id(found: dict[str, Any]) -> dict[int, Any]:
    return {int(id_): SimpleNamespace(**values) for id_, values in found.items()}


def _ranked(logprobs: dict[int, float]) -> dict[int, Any]:
    order = sorted(logprobs, key=lambda id_: -logprobs[id_])
    return {
        id_: SimpleNamespace(logprob=logprobs[id_], rank=rank) for rank, id_ in enumerate(order, 1)
    }


@contextmanager
def serving(folder: Path, *more: str) -> Iterator[Server]:
    """Start the command of a folder's README.md, with more options; end it in the end."""
    found = re.search(r"```bash\n(vllm serve .*)\n```", (folder / "README.md").read_text())
    if found is None:
        raise SystemExit(f"{folder / 'README.md'} has no command: export it again")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*shlex.split(found[1]), *more, "--port", str(port)]
    server = Server(f"http://127.0.0.1:{port}")
    process = subprocess.Popen(command, cwd=folder, stdout=sys.stderr)  # stdout has the figures
    try:
        end = time.monotonic() + START
        while not server.is_up():
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"it did not come up: {shlex.join(command)}")
            time.sleep(1)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def answers(folder: Path, noted: dict[str, Any], **options: Any) -> list[list[Any]]:
    from vllm import LLM, SamplingParams

    local = folder / noted["model"]
    model = str(local) if local.is_dir() else noted["model"]
    request = None
    if "adapter" in noted:
        from vllm.lora.request import LoRARequest

        options |= {"enable_lora": True, "max_lora_rank": noted["max_lora_rank"]}
        request = LoRARequest("tuned", 1, str(folder / noted["adapter"]))
    # Compiling would take longer than these few answers.
    llm = LLM(model=model, enforce_eager=True, **options)
    asked = [example["tokens"] for example in noted["examples"]]
    if request is None:
        wanted = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
        prompts = [{"prompt_token_ids": tokens} for tokens in asked]
        return [found.prompt_logprobs for found in llm.generate(prompts, wanted)]
    # With an adapter vLLM has no logits of a prompt: each token is asked for after those before it.
    prompts, choices = [], []
    for tokens in asked:
        for place in range(1, len(tokens)):
            prompts.append({"prompt_token_ids": tokens[:place]})
            how = {"max_tokens": 1, "temperature": 0.0, "logprobs": 1}
            choices.append(SamplingParams(allowed_token_ids=[tokens[place]], **how))
    told = iter(llm.generate(prompts, choices, lora_request=request))
    return [[None, *(next(told).outputs[0].logprobs[0] for _ in tokens[1:])] for tokens in asked]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--limit", type=float, default=0.05, help="nats a token, in the mean")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.5)
    parser.add_argument("--serve", action="store_true", help="start the README's command, ask that")
    parser.add_argument("--url", help="of a server that was started by the README's command")
    given = parser.parse_args()
    if given.url is None and find_spec("vllm") is None:
        parser.error("vLLM is not installed for this Python: pip install vllm, where it will serve")
    if not (given.folder / "expected.json").is_file():
        parser.error(f"{given.folder} has no expected.json: name a folder that export vllm wrote")
    noted = json.loads((given.folder / "expected.json").read_text())
    os.environ.setdefault(
        "HF_HUB_OFFLINE", "1" if (given.folder / noted["model"]).is_dir() else "0"
    )
    options = {"gpu_memory_utilization": given.gpu_memory_utilization, "dtype": given.dtype}
    if given.url is not None:
        found = over_http(Server(given.url), noted)
    elif given.serve:
        more = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        with serving(given.folder, "--enforce-eager", *more) as server:
            found = over_http(server, noted)
    else:
        found = compare(noted["examples"], answers(given.folder, noted, **options))
    print(json.dumps(found))
    alike = found.get("chats_alike", 0) == found.get("chats", 0)
    return int(not (found["mean_apart"] <= given.limit and alike))


def over_http(server: Server, noted: dict[str, Any]) -> dict[str, float]:
    """Return figures of a server's answers, and how many of the chats noted it writes alike."""
    found = compare(noted["examples"], server.answers(noted))
    return {**found, "chats": len(noted["chats"]), "chats_alike": server.chats_alike(noted)}


if __name__ == "__main__":
    raise SystemExit(main())
