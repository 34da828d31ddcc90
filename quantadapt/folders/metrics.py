"""The layout of `metrics.json`, which the pipeline writes and the report reads."""

from __future__ import annotations

from typing import TypedDict


class Perplexity(TypedDict, total=False):
    """Perplexity on the held-out data; null where it was not measured."""

    unquantized: float | None
    quantized: float | None
    tuned: float | None
    merged: float | None


class Training(TypedDict, total=False):
    """What training took; `seconds` is the training loop alone, of which `dequantize_share` went
    into dequantizing the base."""

    steps: int
    seconds: float
    tokens: int | None
    peak_memory_gib: float | None
    dequantize_share: float | None
    trainable_parameters: int
    base_parameters: int
    resumed_from: int | None
    processes: int
    parallel: str
    memory: Memory


class Memory(TypedDict, total=False):
    """The setting that training ended with (see `memory.Setting`), out of so many `layers` and of
    batches of `batch`; on a GPU what is predicted for it and the tokens of the longest example."""

    recomputed_layers: int
    offload: bool
    micro_batch: int
    layers: int
    batch: int
    longest: int
    predicted_gib: float


class Size(TypedDict, total=False):
    """Sizes of the weights in MiB."""

    dense_mib: float | None
    quantized_mib: float | None
    adapter_mib: float | None


class Refusal(TypedDict, total=False):
    """A rule that forbids the merge, as in `errors.Problem`."""

    what: str
    fix: str
    rule: str
    where: str


class MergeVerdict(TypedDict, total=False):
    """What became of the merge. `kind` is "dense", "requantize", "refused" or "never"; the
    perplexities are on the tokens that were compared."""

    kind: str
    kl: float | None
    top1: float | None
    perplexity_adapter: float | None
    perplexity_merged: float | None
    gain_kept: float | None
    refusals: list[Refusal]


class DataFile(TypedDict, total=False):
    """What became of a data file: see `data.report.FileReport`. `dropped` and `remarks` count by
    reason."""

    file: str
    format: str
    rows: int
    examples: int
    held_out: int
    tokens: int
    learnt: int
    cut: int
    lost: int
    dropped: dict[str, int]
    remarks: dict[str, int]
    unused: list[str]


class Data(TypedDict, total=False):
    """The data, file by file; examples are cut to `max_length` tokens."""

    max_length: int
    files: list[DataFile]


class Sample(TypedDict, total=False):
    """One held-out prompt, answered before and after training."""

    prompt: str
    reference: str | None
    before: str
    after: str


class Metrics(TypedDict, total=False):
    """The layout of `metrics.json`. Every part may be missing; `stages` are seconds by name."""

    perplexity: Perplexity
    stages: dict[str, float]
    train: Training
    size: Size
    merge: MergeVerdict
    data: Data
    samples: list[Sample]
    command: str
