"""The export `vllm`: a folder that vLLM serves, with the command for it and what to check it by."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..capabilities import Cell
from ..errors import Problem
from ..folders.written import LIST
from ..inputs.documents import read_object
from ..paths import MANIFEST
from ..planning.on_disk import quantization_of
from ..protocols import Figure
from ..records import Adapter, Backend, Serving
from ..registry import registry
from .adapter_files import CONFIG, copy_files, refuse_several
from .card import README, is_local
from .content import ContentExport
from .hub import without_paths
from .saving import write_base

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from .asking import Asking
    from .tuned import Tuned

SERVER, EXPECTED, BASE, ADAPTER = "vllm", "expected.json", "base", "adapter"
TEMPLATE, NAME = "as_learnt.jinja", "tuned"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the highest rank of adapters."""
_NOT_SERVED = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices")
"""Options of LoRA that vLLM has nothing for."""


class Vllm(ContentExport):
    """A folder for vLLM: the adapter beside its quantized base, or a merged model."""

    for_load = ({"content": "adapter"}, {"content": "requantized"}, {"content": "merged"})

    content: Literal["requantized", "adapter", "merged"] = Field(
        "requantized",
        description="the merged model, quantized again as the base was; or the adapter beside the "
        "quantized base; or the model merged into dense weights, which vLLM always reads",
    )
    examples: int = Field(
        8, ge=1, description="held-out examples whose answers are noted, to compare vLLM's with"
    )

    @property
    def planned(self) -> str:
        return f"{self.content} for vLLM"

    def done(self, figures: Mapping[str, Figure]) -> str:
        from .kept import merge_words

        said = merge_words(figures)
        return ", ".join(filter(None, [self.content, said, "its README.md says how to serve it"]))

    def refusals(self, cell: Cell, backend: Backend, adapter: Adapter) -> list[Problem]:
        found = super().refusals(cell, backend, adapter)
        if self.content == "merged":
            return found
        serving, where = serving_of(backend), cell.where
        if serving is None:
            what = f"vLLM reads no checkpoints of {backend.name}"
            return [*found, Problem(what, "take content=merged", where, "vllm-format")]
        if self.content == "requantized":
            return found
        if not serving.adapters:
            what = f"vLLM has no adapters on layers of {backend.name}"
            found.append(Problem(what, "take content=requantized", where, "vllm-adapters"))
        fix = "take content=requantized, or content=merged"
        if adapter.peft_type != "LORA":
            found.append(Problem("vLLM knows LoRA alone", fix, where, "vllm-lora"))
        options = cell.adapter_options
        unknown = [name for name in _NOT_SERVED if options.get(name)]
        found += [Problem(f"vLLM has no {name}", fix, where, "vllm-lora") for name in unknown]
        if isinstance(rank := options.get("r"), int) and rank > _RANKS[-1]:
            what = f"vLLM takes adapters of rank {_RANKS[-1]} and less, not {rank}"
            found.append(Problem(what, fix, where, "vllm-rank"))
        return found

    def refusals_of_rounded(self) -> list[Problem]:
        if self.content != "adapter":
            return []
        what = "the model was trained through the quantizer, and vLLM rounds nothing that it adds"
        fix = "take content=requantized, which is what was trained, or content=merged"
        return [Problem(what, fix, "export", "vllm-merge-aware")]

    def write(self, tuned: Tuned, folder: Path) -> dict[str, Figure]:
        from .asking import asking

        figures: dict[str, Figure] = {}
        if self.content == "adapter":
            refuse_several(tuned.manifest["active"], "vLLM adds")
            served = self._write_pair(tuned, folder)
        else:
            figures |= self.merged.write(tuned, folder)
            served = {"model": "."}
            without_paths(folder, "")
        asked = asking(tuned)
        if asked.template is not None:
            (folder / TEMPLATE).write_text(asked.template, encoding="utf-8")
            served["chat_template"] = TEMPLATE
        examples = self._expected(self._served(tuned, folder), tuned.held_out)
        noted = {**served, "examples": examples, "chats": asked.chats}
        (folder / EXPECTED).write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")
        needs = "" if self.content == "merged" else _needs(tuned.manifest)
        text = _readme(served, asked, tuned.manifest, needs)
        (folder / README).write_text(text, encoding="utf-8")
        return figures

    def _write_pair(self, tuned: Tuned, folder: Path) -> dict[str, Any]:
        """Write the adapter and its base, unless that is a checkpoint of the hub as it is; return
        what is served."""
        from ..quantizing.state import state_of

        source, state = tuned.manifest["base"], state_of(tuned.model)
        copy_files(tuned.adapter, folder / ADAPTER, leave_out=(LIST, README))
        model = source
        is_there = source and not is_local(source) and quantization_of(source) is not None
        if not is_there or state.rewritten or state.changed or state.own_base:
            model = BASE
            (folder / BASE).mkdir()
            write_base(tuned.model, state, folder / BASE)
            if state.rewritten:
                _note_plain_start(folder / ADAPTER)
            without_paths(folder / BASE, "")
        without_paths(folder / ADAPTER, f"../{BASE}" if model == BASE else model)
        options = read_object(folder / ADAPTER / CONFIG)
        ranks = [int(options["r"]), *map(int, (options.get("rank_pattern") or {}).values())]
        rank = next(known for known in _RANKS if known >= max(ranks))
        return {"model": model, "adapter": ADAPTER, "max_lora_rank": rank}

    def _served(self, tuned: Tuned, folder: Path) -> nn.Module:
        """Return the model whose answers vLLM is to give: the tuned one, or, where that has been
        quantized again, what was written; the export's figures say how far that is from it."""
        from ..quantizing.state import state_of
        from .loading import load

        model: nn.Module = tuned.model
        if self.content == "requantized":
            model = load(folder, device=state_of(tuned.model).device)
        return model

    def _expected(self, model: nn.Module, data: Dataset) -> list[dict[str, Any]]:
        """Return held-out examples with the log-probability that a model gives each token after
        those before it, and which token it would choose."""
        import torch

        found, device = [], next(model.eval().parameters()).device
        for row in data.select(range(min(self.examples, len(data)))):
            ids = torch.tensor([row["input_ids"]], device=device)
            with torch.inference_mode():
                scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            known = scores.gather(1, ids[0, 1:, None])[:, 0]
            found.append(
                {
                    "tokens": ids[0].tolist(),
                    "logprobs": [round(value, 6) for value in known.tolist()],
                    "first_choices": scores.argmax(-1).tolist(),
                }
            )
        return found


def _note_plain_start(adapter: Path) -> None:
    """Have an adapter's config no longer name a start that changes the base: here that has been
    changed, and PEFT would do it again."""
    config, manifest = read_object(adapter / CONFIG), read_object(adapter / MANIFEST)
    for options in (config, *manifest["adapter_config"].values()):
        options["init_lora_weights"] = True
    for name, values in ((CONFIG, config), (MANIFEST, manifest)):
        (adapter / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def serving_of(backend: Backend) -> Serving | None:
    """Return what vLLM does with a backend's checkpoints; None where it reads none."""
    return next((each for each in backend.serves if each.server == SERVER), None)


def serve_command(served: Mapping[str, Any], dtype: str) -> str:
    """Return the command that serves a folder, from inside of it, what was tuned as `NAME`."""
    command = ["vllm", "serve", served["model"], "--dtype", dtype]
    if "adapter" in served:
        command += ["--enable-lora", "--max-lora-rank", str(served["max_lora_rank"])]
        command += ["--lora-modules", f"{NAME}={served['adapter']}"]
    else:
        command += ["--served-model-name", NAME]
    if "chat_template" in served:
        command += ["--chat-template", served["chat_template"]]
    return shlex.join(command)


def _needs(manifest: Mapping[str, Any]) -> str:
    """Return what vLLM has to have beside it for the base's format; empty: nothing."""
    serving = serving_of(registry().backend(manifest["backend"]))
    return serving.needs if serving else ""


def _readme(
    served: Mapping[str, Any], asked: Asking, manifest: Mapping[str, Any], needs: str
) -> str:
    # vLLM computes in half precision where weights are quantized.
    dtype = "bfloat16" if manifest["dtype"] == "float32" else manifest["dtype"]
    body = shlex.quote(json.dumps({"model": NAME, **asked.body}))
    request = f"curl http://localhost:8000/v1/{asked.path} \\\n"
    request += f"  -H 'Content-Type: application/json' -d {body}"
    parts = [
        f"# For vLLM\n\nIn this folder:\n\n```bash\n{serve_command(served, dtype)}\n```",
        f"It needs {needs}." if needs else "",
        f"What was tuned answers under the name `{NAME}`:\n\n```bash\n{request}\n```",
        asked.words,
        "Written by quantadapt; vLLM itself was not there to try it.",
        f"`{EXPECTED}` holds what the tuned model answers: `python benchmarks/serving.py .` of "
        "quantadapt's sources compares vLLM with it, where vLLM is installed; with `--serve` it "
        "asks the server that the command above starts.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
