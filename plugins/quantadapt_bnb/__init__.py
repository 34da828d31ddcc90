"""bitsandbytes: nf4 and fp4 (QLoRA, https://arxiv.org/abs/2305.14314) and LLM.int8
(https://arxiv.org/abs/2208.07339). Checkpoints are transformers' own."""

from __future__ import annotations

from quantadapt.capabilities import Merge
from quantadapt.hookspecs import hookimpl
from quantadapt.protocols import Quantizer
from quantadapt.records import Backend, Serving
from quantadapt_bnb.four_bit import FP4, NF4
from quantadapt_bnb.int8 import Int8

_VLLM_PLUGIN = "vllm-bnb-plugin from vLLM 0.28 on"
"""vLLM has no bitsandbytes of its own since."""


def _backend(name: str, summary: str, quantizer: type[Quantizer]) -> Backend:
    return Backend(
        name=name,
        summary=summary,
        quantizer=quantizer,
        requires=("bitsandbytes>=0.50",),
        imports=("bitsandbytes",),
        extra="quantadapt[bitsandbytes]",
        merge=Merge.REQUANTIZE,
        serves=(Serving("vllm", "vllm>=0.7", adapters=True, needs=_VLLM_PLUGIN),),
    )


@hookimpl
def quantadapt_backends() -> list[Backend]:
    return [
        _backend("bnb-nf4", "bitsandbytes 4-bit NormalFloat, as in QLoRA", NF4),
        _backend("bnb-fp4", "bitsandbytes 4-bit float", FP4),
        _backend("bnb-int8", "bitsandbytes LLM.int8, int8 weights and activations", Int8),
    ]
