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

    from .records import Adapter, Backend

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
            `TrainResult`, the perplexities by name, what became of the merge. Look at it, do not
            change it.
    """
