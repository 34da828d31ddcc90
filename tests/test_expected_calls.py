"""A library that calls none of ours any more is found out before it does harm."""

from __future__ import annotations

from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
import trl
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from processes import in_processes
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from quantadapt.distributed import world
from quantadapt.errors import TrainingError
from quantadapt.spec import TrainSpec
from quantadapt.training import expected_calls, train

TRANSFORMERS = f"transformers {transformers.__version__}"
TRL = f"trl {trl.__version__}"
ACCELERATE = f"accelerate {accelerate.__version__}"


def adapted(config: Any = None) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads))
    config = config or LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    return get_peft_model(base, config)


@pytest.fixture
def run(tokenizer, random_data, tmp_path) -> Any:
    """Train for two steps; return what was noted."""

    def trained(model: Any = None, **options: Any) -> list[str]:
        notes: list[str] = []
        spec = TrainSpec(**{"max_steps": 2, "per_device_train_batch_size": 2, **options})
        model = adapted() if model is None else model
        train(model, tokenizer, random_data, spec, output=tmp_path, seed=0, on_note=notes.append)
        return notes

    return trained


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"save_steps": 1, "gradient_accumulation_steps": 2},
        {"packing": True, "max_grad_norm": 0.0},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_libraries_that_call_everything_pass(options, run) -> None:
    notes = run(**options)
    told = [note for note in notes if note.startswith(("packing: ", "attention of packed rows: "))]
    assert len(told) == (2 if options.get("packing") else 0)
    assert len(notes) == len(told)


STEPS = {
    "_get_num_items_in_batch": TRANSFORMERS,
    "training_step": f"{TRANSFORMERS} or {TRL}",
    "compute_loss": f"{TRANSFORMERS} or {TRL}",
    "_get_grad_norm": TRANSFORMERS,
}


def calling_another(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have Trainer's loop use a method of its own in place of the one that is overridden."""
    own = getattr(Trainer, name)
    watch = expected_calls.ExpectedCalls.__init__

    def init(self: Any, trainer: Any, *args: Any) -> None:
        watch(self, trainer, *args)
        setattr(trainer, name, own.__get__(trainer))  # neither ours nor one that is counted

    monkeypatch.setattr(expected_calls.ExpectedCalls, "__init__", init)


@pytest.mark.parametrize(("name", "library"), STEPS.items())
def test_a_step_that_is_not_ours_stops_before_it_changes_a_weight(
    name, library, run, monkeypatch
) -> None:
    calling_another(monkeypatch, name)
    model = adapted()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(TrainingError) as caught:
        run(model)
    (problem,) = caught.value.problems
    assert problem.what.startswith(f"{library} does not call {name} in the first step: ")
    assert problem.fix.startswith("install the transformers")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_count_that_does_not_reach_the_loss(run, monkeypatch) -> None:
    step = Trainer.training_step
    monkeypatch.setattr(
        Trainer, "training_step", lambda self, model, batch, _: step(self, model, batch)
    )
    with pytest.raises(TrainingError, match="does not call num_items_in_batch in the first step"):
        run()


def test_a_loss_that_is_divided_twice(run, monkeypatch) -> None:
    step = Trainer.training_step
    monkeypatch.setattr(
        *(Trainer, "training_step"),
        lambda self, *args: step(self, *args) / self.current_gradient_accumulation_steps,
    )
    assert run() == []  # by one batch
    words = f"{TRANSFORMERS} or {TRL} divides the loss"
    with pytest.raises(TrainingError, match=words):
        run(gradient_accumulation_steps=2)


@pytest.mark.parametrize("name", ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step"])
def test_events_that_do_not_come_are_told_at_the_latest_at_the_end(name, run, monkeypatch) -> None:
    from transformers.trainer_callback import CallbackHandler

    monkeypatch.setattr(CallbackHandler, name, lambda self, args, state, control: control)
    with pytest.raises(TrainingError, match=rf"{TRANSFORMERS} does not call {name}"):
        run()


def test_a_last_look_that_does_not_come(run, monkeypatch) -> None:
    calling_another(monkeypatch, "_maybe_log_save_evaluate")
    with pytest.raises(TrainingError, match="does not call _maybe_log_save_evaluate at each step"):
        run()


@pytest.mark.parametrize("name", ["_save_checkpoint", "_save", "_get_output_dir"])
def test_a_checkpoint_that_is_not_written_our_way(name, run, monkeypatch) -> None:
    calling_another(monkeypatch, name)
    with pytest.raises(TrainingError) as caught:
        run(save_steps=2)
    words = f"{TRANSFORMERS} or {TRL} does not call {name} to save: "
    assert caught.value.problems[0].what.startswith(words)


def test_weights_that_are_not_loaded_before_a_run_goes_on(run, monkeypatch) -> None:
    run(save_steps=2)
    calling_another(monkeypatch, "_load_from_checkpoint")
    with pytest.raises(TrainingError, match="does not call _load_from_checkpoint to resume"):
        run(max_steps=4, save_steps=2, resume=True)


@pytest.mark.parametrize("kind", ["layers", "all or none"])
def test_layers_that_do_not_heed_their_flag(kind, run, monkeypatch) -> None:
    from quantadapt.training import recomputing

    monkeypatch.setattr(recomputing, "FLAG", "activation_recomputing")
    model = adapted()
    if kind == "all or none":
        monkeypatch.setattr(recomputing, "decoder_layers", lambda _: [])
        monkeypatch.setattr(type(model.get_base_model()), "_set_gradient_checkpointing",
                            lambda self, **_: None)  # fmt: skip
    with pytest.raises(TrainingError, match=f"{TRANSFORMERS} does not call _gradient_checkpoint"):
        run(model, gradient_checkpointing=True)


def test_a_model_that_is_wrapped_past_accelerate(run, monkeypatch) -> None:
    prepare = accelerate.Accelerator.prepare

    def wrapped(self: Any, first: Any, *others: Any) -> Any:
        done = prepare(self, first, *others)
        return (torch.nn.Sequential(first), *done[1:]) if others else done

    monkeypatch.setattr(accelerate.Accelerator, "prepare", wrapped)
    words = f"{TRANSFORMERS} or {ACCELERATE} puts the model into Sequential"
    with pytest.raises(TrainingError, match=words):
        run()


def test_a_device_that_is_not_heeded(run, monkeypatch) -> None:
    def device(self: Any) -> torch.device:
        assert self._setup_devices is not None
        return torch.device("meta")

    monkeypatch.setattr(TrainingArguments, "device", property(device))
    with pytest.raises(TrainingError, match=f"{TRANSFORMERS} puts the batches on meta"):
        run()


def test_an_adalora_that_allocates_no_ranks(run, monkeypatch) -> None:
    config = AdaLoraConfig(init_r=6, target_r=2, total_step=9, target_modules=["q_proj"])
    model = adapted(config)
    monkeypatch.delattr(type(model.base_model), "update_and_allocate")
    words = f"peft {peft.__version__} has no update_and_allocate in its AdaLoRA"
    with pytest.raises(TrainingError, match=words):
        run(model)


# What costs time alone is told --------------------------------------------------------------------


def test_what_only_costs_time_is_noted_once(run, monkeypatch) -> None:
    calling_another(monkeypatch, "floating_point_ops")
    (note,) = run()
    assert note.startswith(f"slower: {TRANSFORMERS} does not call floating_point_ops")


def clip_with_torch(self: Any, model: Any) -> Any:
    """Trainer's clipping, without accelerate's."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)


def test_clipping_without_accelerate_is_slower_in_one_process(run, monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "_clip_grad_norm", clip_with_torch)
    (note,) = run()
    assert note.startswith(f"slower: {TRANSFORMERS} or {ACCELERATE} does not call clip_grad_norm_")


def beside_another(folder: Any, clips: bool, data: Any, tokenizer: Any) -> str:
    """Train in one of two processes; return the error."""
    with pytest.MonkeyPatch.context() as patched:
        if not clips:
            patched.setattr(Trainer, "_clip_grad_norm", clip_with_torch)
        spec = TrainSpec(max_steps=2, per_device_train_batch_size=2, save_steps=2)
        output = folder / ("right" if clips else "wrong")
        try:
            train(adapted(), tokenizer, data, spec, output=output, seed=0)
        except TrainingError as error:
            return f"{world().size}: {error}"
    return f"{world().size}: trained"


def both(folder: Any, data: Any, tokenizer: Any) -> list[str]:
    return [beside_another(folder, clips, data, tokenizer) for clips in (True, False)]


@pytest.mark.slow
def test_gradients_that_would_not_be_averaged(tmp_path, random_data, tokenizer) -> None:
    for right, wrong in in_processes(2, both, tmp_path, tmp_path, random_data, tokenizer):
        assert right == "2: trained"
        words = f"{TRANSFORMERS} or {ACCELERATE} does not call clip_grad_norm_ in the first step: "
        assert wrong.startswith(f"2: train: {words}")
