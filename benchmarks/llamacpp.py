"""Does llama.cpp answer as the tuned model did? Writes a run's GGUF files and has it read them.

    python benchmarks/llamacpp.py runs/nf4-lora [--dtypes f32 f16 bf16 q8_0] [--device cpu]
        [--server llama-server]

Runs where llama-cpp-python is installed beside quantadapt. For the merged model in each dtype, and
for the adapter on a GGUF file of its base, the log-probabilities of held-out tokens are compared
with those of the tuned model: KL divergence, mean difference at the token that follows (both in
nats), and the share with the same first choice. Texts are tokenized by both. With `--server` its
llama-server renders chats and answers them greedily, and both have to be what transformers does.
Prints a Markdown table. Ends with 1 where a merged file is further off than `--limit` nats.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DTYPES = ("f32", "f16", "bf16", "q8_0")
TEXTS = (
    "  two spaces\n\n\tand a tab",
    "It's 1234567 x 89",
    "\u00e9\u4e2d\u6587 \U0001f600!",
    "a</s>b",
)
"""Besides the run's own: where tokenizers differ."""
SAID = (
    "Create a function called add_type which multiplies max by timeout.",
    "A function that subtracts value from size is needed. Name it start_header.",
)
COUNT = 64
"""Of tokens, the most that an answer has."""
COLUMNS = ("file", "KL", "mean apart", "same first choice", "same tokens", "same answers")


def compare(wanted: list[Any], found: list[Any], rows: list[list[int]]) -> dict[str, float]:
    """Return figures of logits [tokens, vocabulary], one tensor for each of `rows` of token ids."""
    import torch

    kl, apart, same = [], [], []
    for meant, told, ids in zip(wanted, found, rows, strict=True):
        ours, theirs = (scores[:-1].double().log_softmax(-1) for scores in (meant, told))
        following = torch.tensor(ids[1:])[:, None]
        kl.append((ours.exp() * (ours - theirs)).sum(-1))
        apart.append((ours - theirs).gather(1, following).abs()[:, 0])
        same.append((ours.argmax(-1) == theirs.argmax(-1)).double())
    means = (float(torch.cat(values).mean()) for values in (kl, apart, same))
    return dict(zip(("kl", "mean_apart", "same_first_choice"), means, strict=True))


def loaded(file: Path, adapter: Path | None = None) -> Any:
    """Return a file as llama.cpp has it: its cache in 32 bits, the logits of all tokens kept."""
    import llama_cpp

    options = {"n_ctx": 0, "n_threads": 2, "logits_all": True, "verbose": False}
    cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    lora = None if adapter is None else str(adapter)
    return llama_cpp.Llama(str(file), lora_path=lora, **cache, **options)


def scores(llama: Any, rows: list[list[int]]) -> list[Any]:
    import torch

    found = []
    for ids in rows:
        llama.reset()
        llama.eval(ids)
        found.append(torch.tensor(llama.scores[: len(ids)]))
    return found


def same_tokens(llama: Any, tokenizer: Any, texts: list[str]) -> str:
    """Say how many texts have the same tokens, but for what is put before and after them."""
    alike = [
        llama.tokenize(text.encode(), add_bos=False, special=True)
        == tokenizer(text, add_special_tokens=False).input_ids
        for text in texts
    ]
    return f"{sum(alike)} of {len(alike)}"


class Server:
    """llama-server with one file."""

    def __init__(self, address: str) -> None:
        self.address = address

    def ask(self, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if body else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}/{path}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def ready(self) -> bool:
        try:
            return self.ask("health")["status"] == "ok"
        except (urllib.error.URLError, ConnectionError):
            return False


@contextmanager
def serving(program: str, file: Path, *more: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "-m", str(file), "--port", str(port), "-np", "1", "-t", "2", *more]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = Server(f"http://127.0.0.1:{port}")
    try:
        while not server.ready():
            if process.poll() is not None:
                raise SystemExit(f"{program} ended with {process.returncode} on {file.name}")
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait()


def same_answers(server: Server, tuned: Any, prompts: list[Any]) -> str:
    """Say for how many prompts of the run, and chats, the server takes the same tokens as were
    learnt, and answers as `generate` of transformers does, to the same end."""
    from quantadapt.data.tokens import Prompt, encode_prompt
    from quantadapt.exporting.asking import asking_tokenizer, learnt_layout

    model, tokenizer = tuned.model, asking_tokenizer(tuned)
    alike = 0
    for prompt in prompts:
        ids = encode_prompt(tokenizer, prompt)
        words, ends = answer(model, tokenizer, ids)
        said = server.ask("completion", prompt=prompt.text, n_predict=COUNT, temperature=0)
        seen = (said["tokens_evaluated"], said["content"], said["stop_type"] == "eos")
        alike += seen == (len(ids), words, ends)
    chats = [[{"role": "user", "content": text}] for text in SAID if tokenizer.chat_template]
    chats += [[*chat, {"role": "assistant", "content": "No."}, *chat] for chat in chats]
    for chat in chats:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = encode_prompt(tokenizer, Prompt(text, "", templated=learnt_layout(tuned) == "chat"))
        words, ends = answer(model, tokenizer, ids)
        written = server.ask("apply-template", messages=chat)["prompt"]
        options = {"temperature": 0, "max_tokens": COUNT}
        said = server.ask("v1/chat/completions", messages=chat, **options)
        found, used = said["choices"][0], said["usage"]["prompt_tokens"]
        seen = (written, used, found["message"]["content"], found["finish_reason"] == "stop")
        alike += seen == (text, len(ids), words, ends)
    return f"{alike} of {len(prompts) + len(chats)}"


def answer(model: Any, tokenizer: Any, ids: list[int]) -> tuple[str, bool]:
    """Return what transformers answers, the first choice each time, and whether it came to an
    end."""
    import torch

    given = torch.tensor([ids], device=model.device)
    how = {"attention_mask": torch.ones_like(given), "max_new_tokens": COUNT, "do_sample": False}
    with torch.inference_mode():
        output = model.generate(input_ids=given, **how)[0, len(ids) :]
    ends = model.generation_config.eos_token_id
    last = int(output[-1]) in (ends if isinstance(ends, list) else [ends])
    return tokenizer.decode(output, skip_special_tokens=True), last


def bare(tuned: Any, scratch: Path) -> Any:
    """Return the quantized base, dense: merged with an adapter that adds nothing."""
    from safetensors.torch import load_file, save_file

    from quantadapt.exporting.tuned import Tuned

    folder = shutil.copytree(tuned.adapter, scratch / "nothing")
    weights = folder / "adapter_model.safetensors"
    factors = load_file(weights)
    for name, factor in factors.items():
        if "lora_B" in name:
            factor.zero_()
    save_file(factors, weights, {"format": "pt"})
    return Tuned(saved=folder, device="cpu").merged("dense")


def adapter_file(tuned: Any, scratch: Path) -> Path | None:
    """Write the adapter as GGUF; return None where llama.cpp has no place for such a one."""
    from quantadapt.errors import QuantadaptError
    from quantadapt.exporting.gguf.adapter import write_adapter
    from quantadapt.exporting.gguf.families import adapter_problems
    from quantadapt.inputs.documents import read_object

    if tuned.manifest["adapter"] == "dora" or adapter_problems(
        read_object(tuned.adapter / "adapter_config.json")
    ):
        return None
    file, config = scratch / "adapter.gguf", tuned.model.get_base_model().config.to_dict()
    try:
        write_adapter(tuned.adapter, config, file, "f32", "adapter")
    except QuantadaptError as error:
        print(f"No adapter: {error}\n")
        return None
    return file


def asked(
    given: argparse.Namespace, tokenizer: Any
) -> tuple[list[list[int]], list[Any], list[str]]:
    """Return the token ids of held-out examples, prompts to answer, and texts to take apart."""
    from quantadapt.cli.models import held_out_of

    held_out, _ = held_out_of(str(given.run), None, tokenizer)
    rows = [list(row["input_ids"]) for row in held_out.examples.select(range(given.examples))]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]
    return rows, list(held_out.prompts[: given.answers]), [*texts, *TEXTS]


def reference(model: Any, rows: list[list[int]]) -> list[Any]:
    """Return the logits [tokens, vocabulary] of the tuned model for each of `rows`."""
    import torch

    with torch.inference_mode():
        given = [torch.tensor([ids], device=model.device) for ids in rows]
        return [model(input_ids=ids).logits[0].float().cpu() for ids in given]


def compared(given: argparse.Namespace, scratch: Path) -> int:
    """Print the table; return 1 where a merged file is too far off."""
    from quantadapt.exporting.asking import asking_tokenizer, learnt_layout
    from quantadapt.exporting.gguf.model import write_model
    from quantadapt.exporting.manifest import adapter_folder
    from quantadapt.exporting.tuned import Tuned

    tuned = Tuned(saved=adapter_folder(given.run), device=given.device)
    rows, prompts, texts = asked(given, tuned.tokenizer)
    wanted = reference(tuned.model, rows)
    files: list[tuple[str, Path, Path | None]] = []
    merged, tokenizer = tuned.merged("dense"), asking_tokenizer(tuned)
    chats = learnt_layout(tuned) == "chat"
    for dtype in given.dtypes:
        files.append((f"merged, {dtype}", scratch / f"{dtype}.gguf", None))
        write_model(merged, tokenizer, files[-1][1], dtype, "merged", chats=chats)
    if (adapter := adapter_file(tuned, scratch)) is not None:
        files.append(("adapter on its base, f32", scratch / "base.gguf", adapter))
        base, to = bare(tuned, scratch), files[-1][1]
        write_model(base, tokenizer, to, "f32", "base", chats=chats)
    print(f"| {' | '.join(COLUMNS)} |\n| --- |{' ---: |' * (len(COLUMNS) - 1)}")
    near = True
    for name, file, lora in files:
        llama = loaded(file, lora)
        found = compare(wanted, scores(llama, rows), rows)
        near &= lora is not None or found["kl"] <= given.limit
        cells = [f"{found['kl']:.1e}", f"{found['mean_apart']:.1e}"]
        cells += [f"{found['same_first_choice']:.1%}", same_tokens(llama, tuned.tokenizer, texts)]
        llama.close()
        if given.server:
            more = () if lora is None else ("--lora", str(lora))
            with serving(given.server, file, *more) as server:
                cells.append(same_answers(server, tuned, prompts))
        else:
            cells.append("not asked")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    tokens = sum(len(ids) - 1 for ids in rows)
    import llama_cpp
    from versions import versions

    others = versions("gguf", "transformers", "peft", "torch")
    used = f"llama-cpp-python {llama_cpp.__version__}, {others}"
    print(f"\n{tokens} held-out tokens; {platform.machine()}; {used}")
    return int(not near)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--answers", type=int, default=8, help="prompts that the server answers")
    parser.add_argument("--server", help="llama.cpp's llama-server, a program")
    parser.add_argument("--limit", type=float, default=0.01, help="KL divergence in nats")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    if find_spec("llama_cpp") is None:
        parser.error("llama.cpp is not installed for this Python: pip install llama-cpp-python")
    if given.server and shutil.which(given.server) is None:
        parser.error(f"{given.server} is no program: build llama.cpp's target llama-server")
    with tempfile.TemporaryDirectory() as scratch:
        return compared(given, Path(scratch))


if __name__ == "__main__":
    raise SystemExit(main())
