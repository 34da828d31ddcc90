"""What every causal class of transformers learns is the next token, against float64 by hand; those
that see it are refused."""

from __future__ import annotations

import ast
import inspect
import textwrap
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
import torch
import transformers
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import quantadapt as qa
from quantadapt.errors import TrainingError
from quantadapt.evaluation.predictions import predicted
from quantadapt.model.logits import next_token_loss
from quantadapt.objectives.answers import token_log_probs
from quantadapt.objectives.sft import SFT, _fuse_head, _whose_head
from quantadapt.spec import TrainSpec
from quantadapt.testing.small_demo import small_model
from quantadapt.training.next_tokens import _tokens, refuse_foresight, refuse_unshifted
from quantadapt.training.stage import train

torch.set_num_threads(1)
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "emb_dim", "dim"), 32),
    **dict.fromkeys(("intermediate_size", "d_inner", "ffn_dim", "dim_ff"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 2),
    **{"dim_head": 16, "max_position_embeddings": 64, "vocab_size": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
UNSHIFTED = {
    **{"bart": {}, "bigbird_pegasus": {}, "blenderbot": {}, "blenderbot-small": {}},
    **{"marian": {}, "mbart": {}, "mvp": {}, "pegasus": {}, "plbart": {}, "trocr": {}},
    **{"prophetnet": {}, "whisper": {"max_target_positions": 64}, "xlm": {"causal": True}},
}
"""Families whose causal class has a loss of labels that are shifted already."""
SEEING = {
    **{"bert": "is_decoder", "roberta": "is_decoder", "xlm": "causal"},
    **{"xlnet": "", "cpmant": ""},
}
"""Families whose causal class is an encoder unless the option says otherwise, if there is one."""
MUSIC = {"musicgen", "musicgen_melody"}
"""Their tokens are those of several codebooks."""


def unsaid(note: str) -> None:
    raise AssertionError(note)


def model_of(family: str, **options: Any) -> Any:
    torch.manual_seed(0)
    known = transformers.AutoConfig.for_model(family).to_dict()
    sizes = {name: value for name, value in SIZES.items() if name in known}
    config = transformers.AutoConfig.for_model(family, **(sizes | options))
    model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    model.get_base_model = lambda: model
    return model


def batch(**more: Any) -> dict[str, Any]:
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(ids < 16, -100)
    return {"input_ids": ids, "labels": labels, **more}


def by_hand(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean of the next tokens' losses, float64."""
    return cross_entropy(logits.double()[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def near(found: Any, wanted: Any, limit: float) -> bool:
    return float((found.double() - wanted).norm()) <= limit * float(wanted.norm())


@pytest.mark.parametrize("trained", ["head", "layer"])
@pytest.mark.parametrize("family", UNSHIFTED)
def test_the_loss_is_that_of_the_next_token(family, trained) -> None:
    model, given = model_of(family, **UNSHIFTED[family]), batch()
    head = model.get_output_embeddings().weight
    inside = next(
        p for n, p in model.named_parameters() if p.ndim == 2 and ("attn" in n or "q_lin" in n)
    )
    weight = head if trained == "head" else inside
    model.requires_grad_(False)
    weight.requires_grad_(True)
    logits = model(input_ids=given["input_ids"], use_cache=False).logits
    wanted = by_hand(logits, given["labels"])
    (gradient,) = torch.autograd.grad(wanted, weight)
    own = model(**given, use_cache=False).loss
    assert abs(float(own) - float(wanted)) > 0.1  # it is trained to say each token itself

    counted = int((given["labels"][:, 1:] != -100).sum())
    answers = -token_log_probs(model, given).sum() / counted  # of dpo, orpo, grpo and others
    (of_answers,) = torch.autograd.grad(answers, weight)
    assert float(answers) == pytest.approx(float(wanted), rel=1e-6)
    assert near(of_answers, gradient.double(), 1e-5)
    _fuse_head(model)
    loss = SFT().loss(model, batch(), None)
    (found,) = torch.autograd.grad(loss, weight)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    assert near(found, gradient.double(), 1e-5)
    # a share of the tokens of a step, which the model's own loss takes no notice of
    share = SFT().loss(model, batch(counted=counted), torch.tensor(2 * counted))
    assert float(share) == pytest.approx(float(wanted) / 2, rel=1e-6)
    refuse_foresight(model, unsaid)


def test_there_are_no_more_such_families() -> None:
    """All other classes hand their labels to the loss that transformers keeps for their kind."""
    found = set()
    for family, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        cls: Any = getattr(transformers, name if isinstance(name, str) else name[0])
        source = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))
        if "loss_function" not in {getattr(node, "attr", "") for node in ast.walk(source)}:
            found.add(family)
    others = {"gemma4_assistant", "gemma4_unified_assistant"}  # they have no loss
    assert found == set(UNSHIFTED) | {"xlnet", "cpmant"} | MUSIC | others


@pytest.mark.parametrize("family", SEEING)
def test_models_that_see_what_they_are_to_predict_are_refused(family) -> None:
    """Some have a switch in their config, which the message names, and learn once it is on."""
    switch = SEEING[family]
    told = f"set {switch} to true in its config.json, or use" if switch else "use"
    with pytest.raises(TrainingError, match="sees the tokens after each") as caught:
        refuse_foresight(model_of(family), unsaid)
    assert caught.value.problems[0].fix.startswith(f"{told} a causal language model")
    if switch:
        refuse_foresight(model_of(family, **{switch: True}), unsaid)


@pytest.mark.parametrize(
    ("family", "option", "value"),
    [
        ("llama", "is_causal", False),  # heeded by masks alone: attention says that it is causal
        ("qwen2", "is_causal", False),
        ("gemma3_text", "use_bidirectional_attention", True),
        ("gemma", "use_bidirectional_attention", True),
    ],
)
def test_causal_models_that_a_config_makes_encoders_are_refused(family, option, value) -> None:
    sizes = {"head_dim": 16, "num_key_value_heads": 2, "layer_types": ["full_attention"] * 2}
    known = transformers.AutoConfig.for_model(family).to_dict()
    sizes = {name: size for name, size in sizes.items() if name in known}
    model = model_of(family, **sizes, **{option: value})
    row = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    one, other = model(input_ids=row).logits[:, :-1]
    assert float((one - other).norm() / one.norm()) > 0.1
    with pytest.raises(TrainingError, match="sees the tokens after each") as caught:
        refuse_foresight(model, unsaid)
    wanted = f"set {option} to {str(not value).lower()} in its config.json, or"
    assert caught.value.problems[0].fix.startswith(wanted)
    refuse_foresight(model_of(family, **sizes), unsaid)


def test_masks_that_go_by_the_kinds_of_tokens_are_tried_out_with_them() -> None:
    """PaliGemma 2 takes 0 for a prefix, whose tokens see each other, and batches call text so (in
    transformers 5.17 without kinds, too); Gemma 3 takes 0 for text."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    vision = {**small, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    text = {
        **{**small, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16},
        **{"vocab_size": 64, "layer_types": ["full_attention"] * 2},
    }
    pali = transformers.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **vision},
        text_config={"model_type": "gemma2", **text},
        **{"image_token_id": 60, "projection_dim": 32},
    )
    gemma = transformers.Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **vision},
        text_config={"model_type": "gemma3_text", **text},
        **{"image_token_id": 60, "mm_tokens_per_image": 4},
    )
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    for config, sees in ((pali, True), (gemma, False)):
        model = transformers.AutoModelForImageTextToText.from_config(config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        for kinds in ({}, {"token_type_ids": torch.zeros_like(ids)}):
            with torch.no_grad():
                one, other = model(input_ids=ids, **kinds).logits[:, :-1]
            copies = float((one - other).norm() / one.norm()) > 0.05
            assert copies == sees or not kinds
            told = pytest.raises(TrainingError, match="sees the tokens after each")
            with told if copies else nullcontext():
                refuse_foresight(model, unsaid, ["input_ids", "completion_mask", *kinds])


def test_a_model_that_takes_no_text_by_itself_is_told_and_not_refused() -> None:
    """It may get what it wants from the data."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config={**small, "num_hidden_layers": 1, "image_size": 28},
        qformer_config={**small, "num_hidden_layers": 1, "encoder_hidden_size": 32},
        text_config={
            **{"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "vocab_size": 64, "word_embed_proj_dim": 32},
        },
        num_query_tokens=2,
        image_token_id=40,
    )
    model = transformers.Blip2ForConditionalGeneration(config).train()
    notes: list[str] = []
    refuse_foresight(model, notes.append)
    (note,) = notes
    assert "Blip2ForConditionalGeneration" in note
    assert "pixel_values" in note
    assert model.training
    assert all(module.training for module in model.modules())


def test_what_is_tried_out_is_text() -> None:
    """Mistral's token for pictures is the tenth; some models have few tokens."""
    config = transformers.LlamaConfig(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config.image_token_index, config.video_token_id = 5, 7
    assert _tokens(SimpleNamespace(config=config), 9) == [3, 4, 6, 8, 9, 10, 11, 12, 13]
    for size in (2, 3, 4, 8, 9):
        config.vocab_size = size
        *row, other = _tokens(SimpleNamespace(config=config), 9)
        assert max(*row, other) < size
        assert other != row[-1]


def test_a_run_with_such_a_model_is_refused(tokenizer) -> None:
    model = model_of("bert")
    del model.get_base_model
    tuned = qa.attach(qa.quantize(model, "none", device="cpu"), "lora", r=2)
    with pytest.raises(TrainingError, match="BertLMHeadModel sees the tokens after each"):
        qa.train(tuned, rows(), max_steps=1, tokenizer=tokenizer)


@pytest.mark.parametrize("head", [False, True])
def test_a_run_of_bart_as_a_decoder_reports_it(head, tokenizer) -> None:
    """With a LoRA on the head the logits are whole, without one they never are: the loss of two
    micro-batches of unlike lengths is the mean over their tokens both times."""
    model = model_of("bart", dropout=0.0)
    del model.get_base_model
    with torch.no_grad():
        parts = [(b := as_batch(row), model(input_ids=b["input_ids"]).logits) for row in rows()]
    losses = [
        (by_hand(logits, b["labels"]), int(sum(b["labels"][0, 1:] != -100))) for b, logits in parts
    ]
    wanted = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    targets = ["q_proj", "lm_head"] if head else ["q_proj"]
    quantized = qa.quantize(model, "none", device="cpu", dtype="float32")
    tuned = qa.attach(quantized, "lora", r=2, target_modules=targets)
    held_out = torch.cat([found.losses() for found in predicted(tuned, rows(), 2, 0)])
    assert float(held_out.double().mean()) == pytest.approx(float(wanted), rel=1e-6)
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    result = qa.train(tuned, rows(), max_steps=1, tokenizer=tokenizer, **settings)
    assert result.losses[0][1] == pytest.approx(float(wanted), rel=1e-6)


def test_a_patched_forward_whose_labels_are_not_shifted_is_refused() -> None:
    model = model_of("bart")
    original = model.forward
    model.forward = lambda **kwargs: original(**kwargs)  # somebody's own
    _fuse_head(model)
    assert _whose_head(model) is None
    with pytest.raises(TrainingError, match="compares what it says of a token with that token"):
        refuse_unshifted(model, lambda given: SFT().loss(model, given, None), unsaid)


class Weighted(SFT):
    """An objective that wants a number of each row, and goes on with the model's own loss."""

    logits: ClassVar[Literal["model"]] = "model"

    def columns(self, row: Any) -> dict[str, float]:
        return {"weight": 2.0}

    def loss(self, model: Any, batch: dict[str, Any], count: Any) -> Any:
        return batch.pop("weight").mean() * super().loss(model, batch, count)


def test_a_subclass_of_sft_trains_on_a_patched_forward(tokenizer, tmp_path) -> None:
    """Whether its labels are shifted is asked of the model, without the columns of the subclass."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, vocab_size=64, num_attention_heads=2)
    model = transformers.LlamaForCausalLM(config).eval()
    data, spec = rows(), TrainSpec(per_device_train_batch_size=2, max_steps=1)
    parts = [(b := as_batch(row), model(input_ids=b["input_ids"]).logits) for row in data]
    losses = [by_hand(logits, b["labels"]) for b, logits in parts]
    wanted = (5 * losses[0] + 3 * losses[1]) / 8  # of so many tokens that count
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)
    tuned = qa.attach(qa.quantize(model, "none", device="cpu", dtype="float32"), "lora", r=2)
    data = data.add_column("weight", [2.0, 2.0])
    result = train(tuned, tokenizer, data, spec, task=Weighted(), output=tmp_path, seed=0)
    assert result.losses[0][1] == pytest.approx(2 * float(wanted), rel=1e-6)


def test_a_loss_function_that_is_not_used_is_told(tokenizer) -> None:
    model = model_of("bart", dropout=0.0)
    del model.get_base_model
    model.loss_function = lambda *args, **kwargs: torch.zeros(())
    tuned = qa.attach(qa.quantize(model, "none", device="cpu", dtype="float32"), "lora", r=2)
    notes: list[str] = []
    result = qa.train(tuned, rows(), max_steps=1, tokenizer=tokenizer, on_note=notes.append)
    assert result.losses[0][1] > 1
    assert any(note.startswith("the loss_function that was given") for note in notes)


def test_logits_in_chunks_have_torchs_loss_and_gradient(monkeypatch) -> None:
    monkeypatch.setattr("quantadapt.model.head.HEAD_CHUNK", 128 * 50 * 4)  # one chunk is cut short
    torch.manual_seed(0)
    logits = torch.randn(3, 111, 50, requires_grad=True)
    labels = torch.randint(50, (3, 111)).masked_fill(torch.rand(3, 111) < 0.2, -100)
    wanted = by_hand(logits, labels)
    (gradient,) = torch.autograd.grad(wanted, logits)
    loss = next_token_loss(logits, labels)
    (found,) = torch.autograd.grad(3 * loss, logits)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    assert near(found, 3 * gradient.double(), 1e-6)
    nothing = next_token_loss(logits, torch.full_like(labels, -100))
    (none,) = torch.autograd.grad(nothing, logits)
    assert nothing.item() == 0.0
    assert not none.any()


def rows() -> Dataset:
    ids = [[5, 9, 33, 21, 17, 40, 8], [50, 12, 30, 7]]
    return Dataset.from_dict(
        {"input_ids": ids, "completion_mask": [[0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1]]}
    )


def as_batch(row: Any) -> dict[str, torch.Tensor]:
    ids, mask = torch.tensor([row["input_ids"]]), torch.tensor([row["completion_mask"]])
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(small_model())
