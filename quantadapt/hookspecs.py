"""The hooks that a plugin may implement.

A plugin is a module, named by an entry point in the group `quantadapt`. It decorates the hooks that
it implements with `quantadapt.hookimpl`; a hook may leave out arguments that it does not need. The
module is imported whenever somebody lists the backends, so it imports torch and other libraries
inside functions. [The tutorial](../tutorial/write-a-backend.md) makes a plugin from start to end.

A plugin that cannot be loaded harms no other. `quantadapt doctor` says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import typer

    from .records import Adapter, Backend, Evaluation, Export, Objective

PROJECT = "quantadapt"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def quantadapt_backends() -> Iterable[Backend]:  # type: ignore[empty-body]
    """Return the backends that this plugin provides.

    Called once, when the plugin is loaded. A name that another plugin claims too can be used from
    neither.

        from quantadapt import Backend, Merge, hookimpl
        from quantadapt_absmax import AbsmaxQuantizer  # the tutorial's

        @hookimpl
        def quantadapt_backends():
            return [
                Backend(
                    name="absmax8",
                    summary="int8 with one scale per output channel",
                    quantizer=AbsmaxQuantizer,
                    merge=Merge.REQUANTIZE,
                )
            ]
    """


@hookspec
def quantadapt_adapters() -> Iterable[Adapter]:  # type: ignore[empty-body]
    """Return the adapters that this plugin provides.

    Called once, when the plugin is loaded. An adapter is a method of PEFT with defaults of its
    own, as here, or a method of the plugin's: [Write an adapter](../how-to/write-an-adapter.md).

        from quantadapt import Adapter, hookimpl

        @hookimpl
        def quantadapt_adapters():
            return [
                Adapter(
                    name="lora-qv",
                    summary="LoRA on queries and values alone",
                    peft_type="LORA",
                    defaults={"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
                )
            ]
    """


@hookspec
def quantadapt_objectives() -> Iterable[Objective]:  # type: ignore[empty-body]
    """Return the objectives that this plugin provides.

    Called once, when the plugin is loaded. An objective says how examples become batches and a
    loss. This one learns some examples more than others: each has a number in a column.

        from pydantic import Field

        from quantadapt import SFT, Objective, hookimpl

        class Weighted(SFT):
            column: str = Field("weight", description="the column that holds the weights")

            def columns(self, row):
                return {"weight": row.values.get(self.column, 1)}

            def loss(self, model, batch, count):
                from torch.nn.functional import cross_entropy

                ids, mask = batch["input_ids"], batch["attention_mask"]
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                losses = cross_entropy(
                    logits[:, :-1].float().transpose(1, 2), batch["labels"][:, 1:], reduction="none"
                )
                return (losses.sum(1) * batch["weight"]).sum() / count

        @hookimpl
        def quantadapt_objectives():
            return [Objective("weighted", "examples count as a column says", Weighted)]
    """


@hookspec
def quantadapt_evaluations() -> Iterable[Evaluation]:  # type: ignore[empty-body]
    """Return the evaluations that this plugin provides.

    Called once, when the plugin is loaded. A run measures those that `evaluate.evaluations` names
    on the unquantized, quantized, tuned and merged model; terminal, metrics.json and report show
    the figures with unit and direction.

        from pydantic import Field

        from quantadapt import Evaluation, Evaluator, Figure, hookimpl

        class ExactMatch(Evaluator):
            first: int = Field(20, ge=1, description="how many prompts to answer")

            def measure(self, model, given):
                from quantadapt.generation import greedy

                prompts = given.prompts[: self.first]
                count = given.max_new_tokens
                answers = greedy(model, given.tokenizer, prompts, max_new_tokens=count)
                right = sum(a.strip() == p.reference.strip() for a, p in zip(answers, prompts))
                return {"exact-match": Figure(right / len(prompts), "share", "higher")}

        @hookimpl
        def quantadapt_evaluations():
            return [Evaluation("exact-match", "answers that are just the reference", ExactMatch)]
    """


@hookspec
def quantadapt_exports() -> Iterable[Export]:  # type: ignore[empty-body]
    """Return the exports that this plugin provides.

    Called once, when the plugin is loaded. An export is what `export.formats` and
    `quantadapt export RUN NAME` write from a tuned model; terminal, metrics and report tell its
    figures by themselves.

        from pydantic import Field
        from quantadapt import Export, Exporter, Figure, Merge, hookimpl

        class Flat(Exporter):
            dtype: str = Field("float16", description="of the numbers in the file")

            @property
            def merges(self):
                return Merge.DENSE  # refused where backend or adapter never merge

            def write(self, tuned, folder):
                from safetensors.torch import save_file
                import torch

                dtype = getattr(torch, self.dtype)
                merged = tuned.merged("dense").state_dict()
                tensors = {name: value.to(dtype).clone() for name, value in merged.items()}
                save_file(tensors, folder / "flat.safetensors")
                return {"tensors": Figure(len(tensors))}

        @hookimpl
        def quantadapt_exports():
            return [Export("flat", "all merged weights in one file", Flat)]
    """


@hookspec
def quantadapt_commands(app: typer.Typer) -> None:
    """Add commands to the `quantadapt` command line application.

    Called when a command is asked for that is none of quantadapt's own.

        from pathlib import Path

        from quantadapt import hookimpl

        @hookimpl
        def quantadapt_commands(app):
            @app.command(help="Print the size of a checkpoint in MiB.")
            def size(folder: Path):
                files = folder.glob("*.safetensors")
                print(f"{sum(file.stat().st_size for file in files) / 2**20:.1f}")

    Args:
        app: the application. What is there already keeps its name.
    """


@hookspec
def quantadapt_stage_done(stage: str, value: Any) -> None:
    """Called after each stage of a run.

    What is printed here goes into the run's log.

        from quantadapt import hookimpl

        @hookimpl
        def quantadapt_stage_done(stage, value):
            if stage == "train":
                with open("trainings.csv", "a") as file:
                    print(value.steps, value.seconds, value.losses[-1][1], sep=",", file=file)

    Args:
        stage: "plan", "quantize", "attach", "train", "evaluate" or "export".
        value: what the stage returned: the `Plan`, the quantized model, the `PeftModel`, a
            `TrainResult`, the figures as under `evaluations` in metrics.json, what it says of the
            exports. Look at it, do not change it.
    """
