"""The built-in exports: what is written from a tuned model without any plugin."""

from __future__ import annotations

from ..hookspecs import hookimpl
from ..planning.exports import ADAPTER, MERGES
from ..records import Export
from .gguf.export import Gguf, GgufAdapter
from .hub import Hub
from .ollama import Ollama
from .onto import OntoBase
from .saving import AdapterFolder
from .stage import MergedDense, MergedRequantized
from .vllm import Vllm

EXPORTS = (
    Export(ADAPTER, "the adapter as a PEFT folder, which every run writes first", AdapterFolder),
    Export(MERGES["dense"], "the adapter merged into dense weights", MergedDense),
    Export(
        MERGES["requantize"],
        "the adapter merged, and the weights quantized again as the base was",
        MergedRequantized,
    ),
    Export(
        "onto-base",
        "the adapter merged onto an unquantized base, in the memory of one shard",
        OntoBase,
    ),
    Export(
        "gguf",
        "the merged model in one GGUF file, for llama.cpp and what is built on it",
        Gguf,
        requires=("gguf>=0.17",),
        extra="quantadapt[gguf]",
    ),
    Export(
        "gguf-adapter",
        "the LoRA adapter in one GGUF file, for a GGUF file of its base",
        GgufAdapter,
        requires=("gguf>=0.17",),
        extra="quantadapt[gguf]",
    ),
    Export(
        "ollama",
        "a GGUF file and a Modelfile with the chat template, for `ollama create`",
        Ollama,
        requires=("gguf>=0.17",),
        extra="quantadapt[gguf]",
    ),
    Export(
        "vllm", "a folder that vLLM serves: the merged model, or the adapter beside its base", Vllm
    ),
    Export("hub", "pushed to the Hugging Face Hub, with a model card made of the run", Hub),
)


@hookimpl
def quantadapt_exports() -> tuple[Export, ...]:
    """Return the built-in exports."""
    return EXPORTS
