"""The adapters: one record for each PEFT method that adapts linear layers.

To add one, add a record. Its options are the fields of PEFT's own config class, under PEFT's names;
nothing about a backend is said here, because PEFT only ever meets `QuantLinear`.
"""

from __future__ import annotations

from ..capabilities import KEEP, Merge, Patterns, Rule, WhenGiven
from ..hookspecs import hookimpl
from ..records import Adapter, Start


def _no_merge(name: str, reason: str) -> Rule:
    return Rule(f"{name}-no-merge", {"adapter": (name,), "action": ("merge",)}, reason, KEEP)


def _refused(name: str, reason: str, fix: str) -> Rule:
    return Rule(f"{name}-not-supported", {"adapter": (name,)}, reason, fix)


LOFTQ_ONTO = Rule(
    "loftq-onto",
    {"adapter.init_lora_weights": ("loftq",), "action": ("onto",)},
    "the adapter also holds what quantization took away, which that base still has",
    "merge it dense into its own base, or keep it beside the base",
)

RANDOM_START_ONTO = Rule(
    "random-start-onto",
    {
        "adapter.init_lora_weights": Patterns(("pissa_niter_*", "corda", "lora_ga")),
        "action": ("onto",),
    },
    "this start takes away from the base what it gives to the adapter, by random numbers or data,"
    " so what it took cannot be found again in another copy of the base",
    "merge it into its own base (quantadapt merge RUN), or start with init_lora_weights: pissa;"
    " PEFT can convert an adapter whose first state was kept: path_initial_model_for_weight_"
    "conversion",
)
"""PiSSA's exact start and OLoRA's are found again, so these are merged onto any copy. The starts
that leave the base as it is (true, false, gaussian, orthogonal, eva, mica) need nothing."""

INVOKED_MERGE = Rule(
    "alora-no-merge",
    {"adapter.alora_invocation_tokens": WhenGiven(("given",)), "action": ("merge",)},
    "aLoRA is off in each row up to its invocation, so no weight holds it",
    KEEP,
)
LORA_RULES = (LOFTQ_ONTO, RANDOM_START_ONTO, INVOKED_MERGE)

ADAPTERS = (
    Adapter(
        "lora",
        "low-rank update, arXiv:2106.09685",
        "LORA",
        {"r": 16, "lora_alpha": 32},
        rules=LORA_RULES,
        experts=True,
    ),
    Adapter(
        "dora",
        "LoRA with the magnitude learned apart, arXiv:2402.09353",
        "LORA",
        {"r": 16, "lora_alpha": 32, "use_dora": True},
        rules=LORA_RULES,
        experts=True,
    ),
    Adapter(
        "rslora",
        "LoRA scaled by alpha/sqrt(r), arXiv:2312.03732",
        "LORA",
        {"r": 16, "lora_alpha": 16, "use_rslora": True},
        rules=LORA_RULES,
        experts=True,
    ),
    Adapter(
        "pissa",
        "LoRA started from the largest singular vectors, the rest quantized, arXiv:2404.02948",
        "LORA",
        {"r": 16, "lora_alpha": 16, "init_lora_weights": "pissa"},
        start=Start.CHANGED,
        rules=LORA_RULES,
    ),
    Adapter(
        "loftq",
        "LoRA started from what quantization took away, arXiv:2310.08659",
        "LORA",
        {"r": 16, "lora_alpha": 16, "init_lora_weights": "loftq"},
        start=Start.CHANGED,
        rules=LORA_RULES,
    ),
    Adapter("vera", "trained scales on shared random matrices, arXiv:2310.11454", "VERA"),
    Adapter(
        "adalora",
        "LoRA whose rank budget moves to where it matters, arXiv:2303.10512",
        "ADALORA",
        {"init_r": 12, "target_r": 8},
    ),
    Adapter(
        "ia3",
        "learned rescaling of activations, arXiv:2205.05638",
        "IA3",
        {"feedforward_modules": []},
    ),
    Adapter("adamss", "adaptive multi-subspace updates", "ADAMSS", requires=("scikit-learn",)),
    Adapter(
        "beft",
        "trains biases of linear layers",
        "BEFT",
        merge=Merge.NEVER,
        rules=(_no_merge("beft", "it merges only into layers that have a bias already"),),
    ),
    Adapter("boft", "butterfly orthogonal rotation, arXiv:2311.06243", "BOFT"),
    Adapter("c3a", "block-circular convolution, arXiv:2407.19342", "C3A", {"block_size": 128},
            start=Start.CHANGED),
    Adapter("deft", "decompositional efficient fine-tuning", "DEFT", start=Start.ROUNDING),
    Adapter("delora", "decoupled low-rank, angle and strength, arXiv:2503.18225", "DELORA"),
    Adapter("fourierft", "sparse spectrum of the update, arXiv:2405.03003", "FOURIERFT",
            start=Start.CHANGED),
    Adapter("frod", "full-rank update by joint decomposition", "FROD", start=Start.ROUNDING),
    Adapter(
        "glora",
        "generalized LoRA, arXiv:2306.07967",
        "GLORA",
        rules=(
            _refused(
                "glora",
                "PEFT's GLoRA takes `nn.Linear` itself only, no subclass, so no quantized layer",
                "use lora, dora or gralora",
            ),
        ),
    ),
    Adapter("gralora", "granular LoRA in blocks, arXiv:2505.20355", "GRALORA"),
    Adapter("hira", "Hadamard high-rank update", "HIRA"),
    Adapter("hra", "Householder reflections, arXiv:2405.17484", "HRA", start=Start.ROUNDING),
    Adapter(
        "lily",
        "low-rank interconnected adaptation, arXiv:2407.09946",
        "LILY",
        merge=Merge.NEVER,
        rules=(_no_merge("lily", "its update depends on the input, so no weight holds it"),),
    ),
    Adapter("loha", "Hadamard product of low-rank pairs, arXiv:2108.06098", "LOHA"),
    Adapter("lokr", "Kronecker product, arXiv:2309.14859", "LOKR"),
    Adapter("miss", "matrix shard sharing, arXiv:2409.15371", "MISS"),
    Adapter("oft", "orthogonal rotation, arXiv:2306.07280", "OFT"),
    Adapter("osf", "orthogonal subspace tuning, arXiv:2504.07097", "OSF", start=Start.ROUNDING),
    Adapter("peanut", "neural tweakers on the weight", "PEANUT"),
    Adapter(
        "poly",
        "mixture of LoRA skills by task",
        "POLY",
        rules=(_refused("poly", "it needs a task id with every example", "use lora"),),
    ),
    Adapter("psoft", "orthogonal tuning in the principal subspace", "PSOFT"),
    Adapter("pvera", "probabilistic VeRA", "PVERA"),
    Adapter("randlora", "full-rank sums of random bases, arXiv:2502.00987", "RANDLORA"),
    Adapter("road", "two-dimensional rotations, arXiv:2409.00119", "ROAD"),
    Adapter(
        "shadow",
        "a shadow network beside the model",
        "SHADOW",
        rules=(
            _refused("shadow", "it replaces whole decoder layers, not linear ones", "use lora"),
        ),
    ),
    Adapter("shira", "sparse high-rank update, arXiv:2406.13175", "SHIRA"),
    Adapter("supertuning", "trains few entries of each weight", "SUPERTUNING"),
    Adapter("tinylora", "a few trained numbers per model", "TINYLORA"),
    Adapter("unilora", "all LoRA entries from one vector, arXiv:2506.00799", "UNILORA",
            start=Start.CHANGED),
    Adapter("vblora", "LoRA from a shared vector bank, arXiv:2405.15179", "VBLORA",
            {"vector_length": 128}, start=Start.CHANGED),
    Adapter("waveft", "sparse wavelet coefficients, arXiv:2505.12532", "WAVEFT"),
)  # fmt: skip


@hookimpl
def quantadapt_adapters() -> tuple[Adapter, ...]:
    """Return the built-in adapters."""
    return ADAPTERS
