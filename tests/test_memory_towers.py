"""What a model's tower that sees pictures takes of memory: predicted, and counted on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from allocations import peak_of
from peft import LoraConfig, get_peft_model
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from quantadapt import planning
from quantadapt.memory import Setting
from quantadapt.memory.adapters import Method
from quantadapt.memory.towers import Tower, tower_weights
from quantadapt.spec import Spec

torch.set_num_threads(1)
BLOCKS = 12
SIDE, PATCH = 64, 4
"""Of the pictures, in pixels, and of what each is cut into."""


def siglip() -> tuple[Any, Any, Any]:
    config = SiglipVisionConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=BLOCKS, num_attention_heads=4,
        image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    return config, SiglipVisionModel(config), {"pixel_values": torch.randn(2, 3, SIDE, SIDE)}


def qwen(config_class: Any, model_class: Any, **sizes: Any) -> tuple[Any, Any, Any]:
    config = config_class(depth=BLOCKS, num_heads=2, patch_size=PATCH, **sizes)
    side = SIDE // PATCH
    pictures = {"grid_thw": torch.tensor([[1, side, side]] * 2)}
    pictures["hidden_states"] = torch.randn(2 * side**2, 3 * 2 * PATCH**2)
    return config, model_class(config), pictures


def qwen2() -> tuple[Any, Any, Any]:
    return qwen(
        *(Qwen2VLVisionConfig, Qwen2VisionTransformerPretrainedModel),
        embed_dim=64, hidden_size=32, mlp_ratio=2,
    )  # fmt: skip


def qwen2_5() -> tuple[Any, Any, Any]:
    return qwen(
        *(Qwen2_5_VLVisionConfig, Qwen2_5_VisionTransformerPretrainedModel),
        hidden_size=64, out_hidden_size=32, intermediate_size=160, window_size=16,
        fullatt_block_indexes=[1],
    )  # fmt: skip


@pytest.mark.parametrize("made", [siglip, qwen2, qwen2_5])
def test_what_an_adapted_tower_keeps_is_that_which_is_counted(made) -> None:
    """In stock PEFT; a frozen one keeps nothing."""
    config, model, pictures = made()
    tower = Tower.of({"vision_config": config.to_dict()}, 512, SIDE**2)
    assert tower is not None
    assert tower.patches == (SIDE // PATCH) ** 2
    linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)
              and any(part in n for part in ("layers.", "blocks."))]  # fmt: skip
    assert tower.weights == sum(m.weight.numel() for m in linear)
    assert tower_weights({"vision_config": config.to_dict()}) == tower.weights
    held: list[Any] = []
    frozen = peak_of(lambda: held.append(model.requires_grad_(False)(**pictures)))
    adapted = get_peft_model(model, LoraConfig(r=1, target_modules="all-linear"))
    counted = peak_of(lambda: held.append(adapted(**pictures)))
    predicted = tower.kept_bytes(2, 4)
    assert counted == pytest.approx(predicted, rel=0.1)
    assert frozen < 3 * predicted / BLOCKS
    trained = sum(p.numel() for n, p in adapted.named_parameters() if p.requires_grad
                  and any(part in n for part in ("layers.", "blocks.")))  # fmt: skip
    apart = 2 * 64 * BLOCKS  # of queries, keys and values each has an input of its own there
    assert trained - Method("LORA", {"r": 1}).size(tower.adapted, 4).trained in (0, apart)


def test_only_a_tower_that_is_adapted_counts(small_picture_models, tmp_path) -> None:
    def made(**values: Any) -> Any:
        path = str(small_picture_models["qwen"])
        spec = Spec(model=path, output=str(tmp_path / "run"), dtype="float32", **values)
        return planning.plan(spec)

    plain, both = made(), made(towers=["language", "vision"])
    assert plain.memory.work.tower is None
    tower = both.memory.work.tower
    assert (tower.hidden, tower.inside, tower.blocks) == (32, 48, 2)
    assert tower.patches == 512 * 4  # all of an example's tokens stand for its picture
    assert any("one picture of 2,048 patches for each example" in note for note in both.notes)
    assert not any("patches" in note for note in plain.notes)
    one, other = (
        work.parts(Setting(0, False, 1)) for work in (plain.memory.work, both.memory.work)
    )
    assert other["activations"] - one["activations"] == tower.kept_bytes(1, 4)
    assert other["adapter"] > one["adapter"]
    small = made(towers=["language", "vision"], data={"max_pixels": 1024})
    assert small.memory.work.tower.patches == 1024 // 16


def test_pictures_of_one_size_have_as_many_patches(small_picture_models, tmp_path) -> None:
    path = str(small_picture_models["gemma"])
    values = {"towers": ["language", "vision"], "data": {"max_length": 64}}
    work = planning.plan(Spec(model=path, output=str(tmp_path / "run"), **values)).memory.work
    assert work.tower.patches == (16 // 4) ** 2
    assert Tower.of({}, 512, None) is None
    assert Tower.of({"vision_config": {"hidden_size": 8, "depth": 2}}, 512, None) is None
