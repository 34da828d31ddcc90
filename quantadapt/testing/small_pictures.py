"""Small image-text models, with their real processors, and pictures to learn from: made on the
spot, with random weights, for tests and for whoever wants to try how pictures are trained on.

`python -m quantadapt.testing.small_pictures FOLDER` writes a model to `FOLDER/model` and data to
`FOLDER/data`: squares of a colour, with questions on it. Needs the extra `vision`.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (30, 60, 220), "grey": (128,) * 3}
"""What the pictures of the data show."""
QUESTION = "Which colour is this?"
_QWEN = "{%- for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # noqa: E501
_GEMMA = "{{ bos_token }}{%- for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{% if m.content is string %}{{ m.content | trim }}{% else %}{% for part in m.content %}{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text | trim }}{% endif %}{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"  # noqa: E501
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}


def qwen(**more: Any) -> tuple[Any, Any]:
    """Return a model and its processor as Qwen2.5-VL has them: a token for each 8 x 8 pixels.

    Args:
        more: sizes of the text part in place of those here.
    """
    from transformers import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from ..loading.processors import without_videos

    special = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = _tokenizer("<|endoftext|>", "<|im_end|>", ("<|im_start|>", *special))
    ids = tokenizer.convert_tokens_to_ids
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    pixels = {"size": {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}}
    images = Qwen2VLImageProcessorPil(**sizes, **pixels)
    kind = without_videos(Qwen2_5_VLProcessor)
    processor = kind(images, tokenizer, chat_template=_QWEN)
    vision = {
        **{"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2},
        **{"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]},
        **{"out_hidden_size": (_TEXT | more)["hidden_size"], "initializer_range": 0.1},
    }
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    config = {
        "text_config": _TEXT | _ends(tokenizer) | {"rope_parameters": rope} | more,
        "vision_config": vision,
        **{f"{name}_token_id": ids(f"<|{name}_pad|>") for name in ("image", "video")},
        **{f"vision_{name}_token_id": ids(f"<|vision_{name}|>") for name in ("start", "end")},
    }
    return _model("Qwen2_5_VLConfig", config, tokenizer), processor


def gemma(**more: Any) -> tuple[Any, Any]:
    """Return a model and its processor as Gemma 3 has them: four tokens for each picture, which see
    each other; see `qwen`."""
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    names |= {"image_token": "<image_soft_token>"}
    special = ("<start_of_turn>", *names.values())
    tokenizer = _tokenizer("<pad>", "<end_of_turn>", special, bos="<bos>", extra=names)
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16}, do_pan_and_scan=False)
    processor = Gemma3Processor(images, tokenizer, chat_template=_GEMMA, image_seq_length=4)
    ids = tokenizer.convert_tokens_to_ids
    vision = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "image_size": 16, "patch_size": 4},
    }
    text: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64}
    text["layer_types"] = ["sliding_attention", "full_attention"]
    config = {
        "text_config": _TEXT | _ends(tokenizer) | text | more,
        "vision_config": vision,
        "mm_tokens_per_image": 4,
        "image_token_index": ids(names["image_token"]),
        "boi_token_index": ids(names["boi_token"]),
        "eoi_token_index": ids(names["eoi_token"]),
        "initializer_range": 0.1,
    }
    model = _model("Gemma3Config", config, tokenizer)
    # transformers leaves it at zero, and nothing would come through.
    import torch

    projector = model.model.multi_modal_projector.mm_input_projection_weight
    torch.nn.init.normal_(projector, std=0.1, generator=torch.Generator().manual_seed(1))
    return model, processor


FAMILIES = {"qwen": qwen, "gemma": gemma}
"""Makers of models, by name."""


def _ends(tokenizer: Any) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def _model(kind: str, values: Mapping[str, Any], tokenizer: Any) -> Any:
    import torch
    import transformers

    config = getattr(transformers, kind)(**values, **_ends(tokenizer))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):  # zeros would hide one that is lost
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(key)))
    return model.eval()


def _tokenizer(
    pad: str,
    eos: str,
    special: tuple[str, ...],
    *,
    bos: str | None = None,
    extra: Mapping[str, str] | None = None,
) -> Any:
    """Return a tokenizer of bytes and a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[pad, eos, *([bos] if bos else []), *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [f"{QUESTION} It is {colour}." for colour in COLOURS]
    core.train_from_iterator([*words, "user assistant system model"] * 3, trainer)
    options: dict[str, Any] = {"extra_special_tokens": dict(extra)} if extra else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, eos_token=eos, bos_token=bos, **options
    )


def write_model(folder: Path, family: str = "qwen", **more: Any) -> Path:
    """Write a model with its processor into `folder`, as `save_pretrained` does; see `qwen`."""
    model, processor = FAMILIES[family](**more)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_data(folder: Path, count: int = 64, *, side: int = 16) -> Path:
    """Write `count` pictures of `side` pixels, and `train.jsonl` with a chat on each; return that
    file."""
    from PIL import Image

    draws, rows = random.Random(0), []
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        colour, value = list(COLOURS.items())[number % len(COLOURS)]
        shade = tuple(max(0, min(255, part + draws.randint(-25, 25))) for part in value)
        name = f"pictures/{number:03}.png"
        Image.new("RGB", (side, side), shade).save(folder / name)
        asked = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        said = [{"type": "text", "text": f"It is {colour}."}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        rows.append({"messages": turns, "images": [name]})
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def main() -> None:
    """Write a model and data into the folder that the command line names."""
    if len(sys.argv) not in (2, 3) or (sys.argv[2:3] and sys.argv[2] not in FAMILIES):
        sys.exit(f"write FOLDER, and perhaps one of {', '.join(FAMILIES)}")
    from ..showing.quietly import quietly

    folder = Path(sys.argv[1])
    with quietly():
        write_model(folder / "model", *sys.argv[2:])
    print(f"{folder / 'model'} and {write_data(folder / 'data')}")


if __name__ == "__main__":
    main()
