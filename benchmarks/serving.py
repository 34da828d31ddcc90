"""Does vLLM answer as the tuned model did? Compares it with `expected.json` of the export `vllm`.

    python benchmarks/serving.py runs/nf4-lora/vllm

Runs where vLLM is installed; quantadapt need not be there. Prints one JSON line: how far the
log-probabilities of held-out tokens are from those noted, and for which share of them the first
choice is the same. Ends with 1 where the mean is further off than `--limit` nats.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any


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
    given = parser.parse_args()
    if find_spec("vllm") is None:
        parser.error("vLLM is not installed for this Python: pip install vllm, where it will serve")
    if not (given.folder / "expected.json").is_file():
        parser.error(f"{given.folder} has no expected.json: name a folder that export vllm wrote")
    noted = json.loads((given.folder / "expected.json").read_text())
    os.environ.setdefault(
        "HF_HUB_OFFLINE", "1" if (given.folder / noted["model"]).is_dir() else "0"
    )
    options = {"gpu_memory_utilization": given.gpu_memory_utilization, "dtype": given.dtype}
    found = compare(noted["examples"], answers(given.folder, noted, **options))
    print(json.dumps(found))
    return int(not found["mean_apart"] <= given.limit)


if __name__ == "__main__":
    raise SystemExit(main())
