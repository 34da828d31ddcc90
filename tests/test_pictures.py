"""Pictures in chats: what is read, learnt, measured, answered, saved and merged; bad input."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image

import quantadapt as qa
from quantadapt.data.batches import CausalCollator
from quantadapt.data.pixels import PIXELS, joined
from quantadapt.data.reading import load_data, load_everything
from quantadapt.data.sources import read_source
from quantadapt.errors import DataError, PlanRefused, TrainingError
from quantadapt.evaluation.perplexity import perplexity
from quantadapt.loading.processors import processor_at
from quantadapt.objectives.sft import SFT
from quantadapt.quantizing.tokenizer import load_tokenizer
from quantadapt.spec import DataSpec, Spec
from quantadapt.testing.small_pictures import QUESTION, write_data

FAMILIES = ["qwen", "gemma"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("pictures"), 16)


@pytest.fixture(scope="module", params=FAMILIES)
def kind(request, small_picture_models):
    path = str(small_picture_models[request.param])
    return SimpleNamespace(
        name=request.param,
        path=path,
        tokenizer=load_tokenizer(path),
        processor=processor_at(path),
    )


@pytest.mark.slow
def test_the_command_of_the_page_writes_a_model_and_data_and_prints_nothing_else(tmp_path):
    command = [sys.executable, "-m", "quantadapt.testing.small_pictures", str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    model, data = tmp_path / "small" / "model", tmp_path / "small" / "data" / "train.jsonl"
    assert done.stdout == f"{model} and {data}\n"
    assert (model / "config.json").is_file()
    assert len(data.read_text().splitlines()) == 64


def png(colour=(220, 30, 30), size=(16, 16)) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", size, colour).save(written, "PNG")
    return written.getvalue()


def write(folder: Path, *rows, name="rows.jsonl") -> str:
    (folder / "red.png").write_bytes(png())
    (folder / "blue.png").write_bytes(png((30, 60, 220), (24, 16)))
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def chat(*parts, answer="It is red."):
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]


HERE, ASKED = {"type": "image"}, {"type": "text", "text": QUESTION}


# --- tokens and masks ----------------------------------------------------------------------------


def trl_batch(kind, rows):
    """What TRL's own collator makes of prompts and completions with pictures."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    collator = DataCollatorForVisionLanguageModeling(kind.processor, completion_only_loss=True)
    kind.processor.tokenizer.padding_side = "right"
    return collator(
        [
            {
                "images": [Image.open(file) for file in files],
                "prompt": [{"role": "user", "content": asked}],
                "completion": [{"role": "assistant", "content": answer}],
            }
            for files, asked, answer in rows
        ]
    )


def test_tokens_pixels_and_loss_are_those_of_trl(kind, tmp_path) -> None:
    source = write(
        tmp_path,
        {"messages": chat(HERE, ASKED), "images": ["red.png"]},
        {"messages": chat(HERE, HERE, ASKED, answer="Blue."), "images": ["blue.png", "red.png"]},
    )
    ours = load_everything(source, kind.tokenizer)
    red, blue = tmp_path / "red.png", tmp_path / "blue.png"
    theirs = trl_batch(kind, [([red], QUESTION, "It is red."), ([blue, red], QUESTION, "Blue.")])
    batch = CausalCollator(kind.tokenizer.pad_token_id)(list(ours))
    for row, their_row, labels in zip(ours, theirs["input_ids"], theirs["labels"], strict=True):
        kept = [int(t) for t in their_row if t != kind.tokenizer.pad_token_id]
        assert list(row["input_ids"]) == kept
        learnt = [t for t, m in zip(row["input_ids"], row["completion_mask"], strict=True) if m]
        # what the template writes behind the end of a turn is not learnt here
        said = kind.tokenizer.decode([t for t in labels.tolist() if t != -100])
        assert said.startswith(kind.tokenizer.decode(learnt))
        assert said[len(kind.tokenizer.decode(learnt)) :].strip() == ""
    given = joined(batch[PIXELS])
    names = {n for n in theirs if n not in ("input_ids", "attention_mask", "labels")}
    assert {n for n in names if not n.endswith("token_type_ids")} == set(given)
    for name, value in given.items():
        assert torch.equal(value, theirs[name]), name
    model = transformers.AutoModelForImageTextToText.from_pretrained(kind.path).eval()
    labels = batch["labels"]
    stock = {k: v for k, v in theirs.items() if k not in ("labels", "input_ids", "attention_mask")}
    width = labels.shape[1]  # TRL pads prompts on the left and moves them; types are padded alike
    assert all(v.shape[1] == width for k, v in stock.items() if k.endswith("token_type_ids"))
    with torch.no_grad():
        expected = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels,
            **stock,
        ).loss  # fmt: skip
        model.quantadapt = None
        tuned = SimpleNamespace(config=model.config, get_base_model=lambda: model, __call__=None)
        found = SFT().loss(_Called(model, tuned), dict(batch), None)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


class _Called:
    """A model that is called as a PeftModel is."""

    def __init__(self, model, more) -> None:
        self._model, self.config, self.get_base_model = model, more.config, more.get_base_model

    def __call__(self, **given):
        return self._model(**given)


def test_no_token_of_a_picture_is_learnt(kind, tmp_path) -> None:
    turns = [*chat(HERE, ASKED), {"role": "user", "content": "And now?"}]
    turns.append({"role": "assistant", "content": [{"type": "text", "text": "So "}, HERE]})
    source = write(tmp_path, {"messages": turns, "images": ["red.png", "blue.png"]})
    row = load_everything(source, kind.tokenizer)[0]
    token = kind.tokenizer.image_token_id if kind.name == "gemma" else kind.processor.image_token_id
    at = [i for i, t in enumerate(row["input_ids"]) if t == token]
    # blue is 24 x 16: six tokens for Qwen, which sees 8 x 8 pixels in each
    assert len(at) == {"qwen": 4 + 6, "gemma": 4 + 4}[kind.name]
    assert not any(row["completion_mask"][i] for i in at)
    assert sum(row["completion_mask"]) > 6
    types = next(row[name] for name in row if name.endswith("token_type_ids"))
    assert [i for i, t in enumerate(types) if t] == at


FORMS = {
    "parts and a column": {"messages": chat(HERE, ASKED), "images": ["red.png"]},
    "one picture": {"messages": chat(HERE, ASKED), "image": "red.png"},
    "no place": {"messages": chat(ASKED), "images": ["red.png"]},
    "text and no place": {
        "messages": [{"role": "user", "content": QUESTION}, *chat()[1:]],
        "images": ["red.png"],
    },
    "in the part": {"messages": chat({"type": "image", "image": "red.png"}, ASKED)},
    "path": {"messages": chat({"type": "image", "path": "./red.png"}, ASKED)},
    "url": {
        "messages": chat(
            {
                "type": "image_url",
                "image_url": {"url": "data:image/png;base64," + base64.b64encode(png()).decode()},
            },
            ASKED,
        )
    },
    "base64": {
        "messages": chat({"type": "image", "base64": base64.b64encode(png()).decode()}, ASKED)
    },
    "llava": {
        "image": "red.png",
        "conversations": [
            {"from": "human", "value": f"<image>\n{QUESTION}"},
            {"from": "gpt", "value": "It is red."},
        ],
    },
    "pair": {"prompt": QUESTION, "completion": "It is red.", "image": "red.png"},
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_one_example(form, kind, tmp_path) -> None:
    expected = load_everything(write(tmp_path, FORMS["parts and a column"]), kind.tokenizer)[0]
    found = load_everything(write(tmp_path, FORMS[form], name="form.jsonl"), kind.tokenizer)[0]
    for name in ("input_ids", "completion_mask"):
        assert list(found[name]) == list(expected[name])


def test_parquet_and_the_hubs_structs_hold_bytes(kind, tmp_path, monkeypatch) -> None:
    import datasets

    turns = [{"role": "user", "content": QUESTION}, *chat()[1:]]
    rows = {"messages": [turns] * 2, "images": [[Image.new("RGB", (16, 16))]] * 2}
    features = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "images": [datasets.Image()],
        }
    )
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(tmp_path / "rows.parquet")
    found = load_everything(str(tmp_path / "rows.parquet"), kind.tokenizer)
    assert len(found) == 2
    assert found[0]["pictures"][0]["bytes"][:4] == b"\x89PNG"
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": made})
    row = read_source("owner/name")[0][0]
    assert row.values["images"][0]["bytes"][:4] == b"\x89PNG"


# --- bad input -----------------------------------------------------------------------------------


def shows(*pictures, parts=(HERE, ASKED)):
    return {"messages": chat(*parts), "images": list(pictures)}


OUT = "leads out of the folder"
BAD = {
    "missing": (shows("none.png"), 'no picture "none.png"'),
    "outside": (shows("../red.png"), OUT),
    "absolute": (shows("/etc/passwd"), OUT),
    "address": (shows("https://a.b/c.png"), "is an address"),
    "too few": (shows("red.png", parts=(HERE, HERE, ASKED)), "picture 2 of the chat"),
    "too many": (shows("red.png", "blue.png"), "it has 2 pictures, and places for 1"),
    "a number": (shows(7), "a picture is a number"),
    "no base64": (shows("data:image/png;base64,?"), "in a data: URL cannot be read"),
    "no picture": (shows("rows.jsonl"), "cannot be read as a picture: it is none of PNG, JPEG"),
    "empty": (shows("empty.png"), "cannot be read as a picture: it is empty"),
    "cut short": (shows("cut.png"), "cannot be read as a picture"),
    "a folder": (shows("."), 'there is no picture "."'),
    "sound": (shows(parts=({"type": "audio", "path": "a.wav"}, ASKED)), "part of type 'audio'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pictures_are_told_with_their_row(case, small_picture_models, tmp_path) -> None:
    row, text = BAD[case]
    tokenizer = load_tokenizer(str(small_picture_models["qwen"]))
    (tmp_path / "cut.png").write_bytes(png(size=(64, 64))[:60])
    (tmp_path / "empty.png").write_bytes(b"")
    good = {"messages": chat(HERE, ASKED), "images": ["red.png"]}
    source = write(tmp_path, good, row)
    with pytest.raises(DataError) as caught:
        load_everything(source, tokenizer)
    assert text in str(caught.value)
    assert f"{source}:2" in str(caught.value)


def test_all_bad_pictures_are_told_at_once(small_picture_models, tmp_path) -> None:
    tokenizer = load_tokenizer(str(small_picture_models["qwen"]))
    (tmp_path / "empty.png").write_bytes(b"")
    good = {"messages": chat(HERE, ASKED), "images": ["red.png"]}
    empty, junk = shows("empty.png"), shows("rows.jsonl")
    source = write(tmp_path, good, empty, junk, good, empty)
    with pytest.raises(DataError) as caught:
        load_everything(source, tokenizer)
    one, other = caught.value.problems
    assert (one.where, other.where) == (f"{source}:2", f"{source}:3")
    assert one.what.endswith("it is empty; likewise at 5")


def test_bad_pictures_that_are_held_out_are_told_beside_the_others(
    small_picture_models, tmp_path
) -> None:
    tokenizer = load_tokenizer(str(small_picture_models["qwen"]))
    (tmp_path / "empty.png").write_bytes(b"")
    good = {"messages": chat(HERE, ASKED), "images": ["red.png"]}
    train = write(tmp_path, good, shows("empty.png"))
    held_out = shutil.copy(train, tmp_path / "held.jsonl")
    with pytest.raises(DataError) as caught:
        load_data(DataSpec(path=train, eval_path=str(held_out)), tokenizer, seed=0)
    places = [problem.where for problem in caught.value.problems]
    assert places == [f"{train}:2", f"{held_out}:2"]


def test_a_checkpoint_that_tells_nothing_of_videos_needs_no_torchvision(
    small_picture_models, monkeypatch
) -> None:
    """Where torchvision is installed, transformers looks for how videos are read."""
    from quantadapt.loading import processors

    found = processor_at(str(small_picture_models["qwen"]))
    processors._processor_at.cache_clear()
    monkeypatch.setattr(processors, "find_spec", lambda name: name)
    again = processor_at(str(small_picture_models["qwen"]))
    assert again is not found
    pictures = {"text": ["<|image_pad|>"], "images": [Image.new("RGB", (16, 16), (9, 30, 90))]}
    both = [of(**pictures, return_tensors="pt")["pixel_values"] for of in (found, again)]
    assert torch.equal(*both)


def test_a_link_out_of_the_folder_is_refused(small_picture_models, tmp_path) -> None:
    tokenizer = load_tokenizer(str(small_picture_models["qwen"]))
    inside = tmp_path / "inside"
    inside.mkdir()
    source = write(inside, {"messages": chat(HERE, ASKED), "images": ["link.png"]})
    (tmp_path / "secret.png").write_bytes(png())
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="leads out of the folder"):
        load_everything(source, tokenizer)


def test_a_huge_picture_is_refused_before_it_is_decoded(small_picture_models, tmp_path) -> None:
    import struct
    import zlib

    def part(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", b"") + part(b"IEND", b"")
    source = write(tmp_path, {"messages": chat(HERE, ASKED), "images": ["bomb.png"]})
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(DataError, match=r"60,000 x 60,000 pixels|cannot be read as a picture"):
        load_everything(source, load_tokenizer(str(small_picture_models["qwen"])))


def test_what_stands_for_a_picture_may_not_be_written(kind, tmp_path) -> None:
    word = {"qwen": "<|image_pad|>", "gemma": "<start_of_image>"}[kind.name]
    asked = {"type": "text", "text": f"{word} {QUESTION}"}
    source = write(tmp_path, {"messages": chat(HERE, asked), "images": ["red.png"]})
    with pytest.raises(DataError, match="stands 2 times in a chat of 1 pictures"):
        load_everything(source, kind.tokenizer)


def test_pictures_want_a_model_that_sees(tmp_path) -> None:
    from quantadapt import demo

    source = write(tmp_path, {"messages": chat(HERE, ASKED), "images": ["red.png"]})
    with pytest.raises(DataError, match="reads text alone"):
        load_everything(source, load_tokenizer(str(demo.MODEL_DIR)))


def test_a_picture_that_is_cut_off_drops_its_row(kind, tmp_path) -> None:
    small = {"messages": chat(ASKED, HERE), "images": ["red.png"]}
    large = {"messages": chat(HERE, HERE, HERE, ASKED, HERE), "images": ["red.png"] * 4}
    spec = DataSpec(path=write(tmp_path, small, small, large), max_length=30)
    found = load_data(spec, kind.tokenizer, seed=0)
    (report,) = found.report.files
    assert report.dropped == {"with pictures that do not fit into 30 tokens": 1}
    assert report.pictures == 2
    assert "2 pictures of" in report.counts(30)


def test_larger_pictures_are_made_smaller(small_picture_models, tmp_path) -> None:
    tokenizer = load_tokenizer(str(small_picture_models["qwen"]))
    (tmp_path / "large.png").write_bytes(png(size=(32, 32)))
    row = {"messages": chat(HERE, ASKED), "images": ["large.png"]}
    source = write(tmp_path, row, row)
    counts = []
    for most in (None, 256):
        spec = DataSpec(path=source, max_pixels=most)
        counts.append(load_data(spec, tokenizer, seed=0).report.files[0].standing)
    assert counts == [2 * 16, 2 * 4]


def test_the_plan_finds_missing_pictures(small_picture_models, tmp_path) -> None:
    from quantadapt import planning
    from quantadapt.objectives.surveying import surveyed

    source = write(tmp_path, {"messages": chat(HERE, ASKED), "images": ["none.png"]})
    model = str(small_picture_models["qwen"])
    plan = planning.plan(Spec(model=model, data=source, output=str(tmp_path / "run")))
    with pytest.raises(PlanRefused, match=r"no picture .none"):
        surveyed(plan)


# --- training ------------------------------------------------------------------------------------


def test_parts_of_a_batch_add_up_to_it(kind, data) -> None:
    rows = list(load_everything(str(data), kind.tokenizer))[:4]
    rows[1] = {"input_ids": [40, 41, 42], "completion_mask": [0, 1, 1]}  # text alone
    batch = CausalCollator(kind.tokenizer.pad_token_id)(rows)
    model = transformers.AutoModelForImageTextToText.from_pretrained(kind.path).eval()
    called = _Called(model, SimpleNamespace(config=model.config, get_base_model=lambda: model))
    count = torch.tensor(float(SFT().count(batch)))
    with torch.no_grad():
        whole = SFT().loss(called, dict(batch), count)
        parts = [SFT().loss(called, part, count) for part in SFT().parts(dict(batch), 2)]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.slow
def test_training_sees_the_pictures_and_leaves_the_towers(kind, data, tmp_path) -> None:
    model = qa.quantize(kind.path, "hqq", dtype="float32")
    own = ("model.language_model.", "lm_head")
    towers = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith(own)}
    tuned = qa.attach(model, "lora", r=8)
    before = qa.evaluate(tuned, str(data))["loss"]
    result = qa.train(
        tuned, str(data), max_steps=12, learning_rate=1e-2, logging_steps=4, eval_steps=6,
        gradient_accumulation_steps=2, per_device_train_batch_size=4,
    )  # fmt: skip
    after = qa.evaluate(tuned, str(data))["loss"]
    assert after < before - 2
    assert result.validation[-1][1] == pytest.approx(result.validation[-1][1])
    assert len(towers) > 20
    now = tuned.get_base_model().state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in towers.items())
    # other pictures are other losses
    rows = [dict(row) for row in load_everything(str(data), kind.tokenizer)]
    mixed = [{**row, "pictures": rows[i - 1]["pictures"]} for i, row in enumerate(rows)]
    assert perplexity(tuned, rows).loss != perplexity(tuned, mixed).loss


def test_examples_with_pictures_are_not_packed(small_picture_models, data) -> None:
    tuned = qa.attach(qa.quantize(str(small_picture_models["qwen"]), "hqq"), "lora")
    with pytest.raises(TrainingError, match="not packed"):
        qa.train(tuned, str(data), max_steps=1, packing=True)


# --- from disk -----------------------------------------------------------------------------------


def shown_to(model, kind, folder: Path):
    """Return what stock transformers gives for a picture: logits of the last token."""
    image = Image.open(folder / "pictures" / "001.png")
    turns = [{"role": "user", "content": [{"type": "image", "image": image}, ASKED]}]
    inputs = kind.processor.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    with torch.no_grad():
        return model.eval()(**inputs).logits[0, -1].float()


def trained(kind, data, folder: Path, backend="hqq", adapter="lora", **more):
    values = {
        "model": kind.path,
        "backend": backend,
        "adapter": adapter,
        "data": str(data),
        "dtype": "float32",
        "output": str(folder),
        "train": {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 4},
        "evaluate": {"samples": 1, "max_new_tokens": 4, "unquantized": False},
    }
    return qa.run(Spec(**{**values, **more}), verbose=False)


of_runs = pytest.mark.parametrize(
    "kind", ["qwen", pytest.param("gemma", marks=pytest.mark.slow)], indirect=True
)


@pytest.fixture(scope="module")
def run_(kind, data, tmp_path_factory):
    return trained(kind, data, tmp_path_factory.mktemp("runs") / kind.name)


@of_runs
def test_a_run_is_merged_and_loads_in_stock_transformers(kind, data, run_) -> None:
    figures = run_.metrics["exports"]["merged-dense"]["figures"]
    assert figures["kl"]["value"] < 1e-6
    assert run_.metrics["data"]["files"][0]["pictures"] == 16
    assert run_.metrics["samples"][0]["after"]
    merged = run_.folder / "merged"
    stock = transformers.AutoModelForImageTextToText.from_pretrained(merged, dtype="float32")
    tuned = run_.model
    assert torch.allclose(
        shown_to(stock, kind, data.parent), shown_to(tuned, kind, data.parent), atol=1e-4
    )
    before = transformers.AutoModelForImageTextToText.from_pretrained(kind.path).state_dict()
    after = stock.state_dict()
    own = ("model.language_model.layers", "lm_head")
    others = [name for name in before if not name.startswith(own)]
    assert all(torch.equal(before[name], after[name]) for name in others)
    for folder in (merged, run_.folder / "adapter"):
        assert (folder / "processor_config.json").read_bytes() == (
            Path(kind.path) / "processor_config.json"
        ).read_bytes()
        assert processor_at(str(folder)) is not None


@of_runs
def test_stock_peft_loads_the_adapter(kind, data, run_) -> None:
    from peft import PeftModel

    base = transformers.AutoModelForImageTextToText.from_pretrained(kind.path, dtype="float32")
    stock = PeftModel.from_pretrained(base, run_.folder / "adapter")
    ours = qa.load(run_.folder / "adapter", base=qa.quantize(kind.path, "none", dtype="float32"))
    assert torch.allclose(
        shown_to(stock, kind, data.parent), shown_to(ours, kind, data.parent), atol=1e-4
    )


@of_runs
def test_it_answers_as_stock_generate_does(kind, data, run_) -> None:
    picture = data.parent / "pictures" / "001.png"
    asked = [{"role": "user", "content": [{"type": "image", "image": str(picture)}, ASKED]}]
    (ours,) = qa.generate(run_.model, [asked], max_new_tokens=5)
    inputs = kind.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": Image.open(picture)}, ASKED]}],
        tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
    )  # fmt: skip
    out = run_.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    assert ours.text == kind.tokenizer.decode(new, skip_special_tokens=True)
    assert ours.prompt_tokens == inputs["input_ids"].shape[1]
    again = qa.load(run_.folder)
    image = [{"type": "image", "image": Image.open(picture)}, ASKED]
    (other,) = qa.generate(again, [[{"role": "user", "content": image}]], max_new_tokens=5)
    assert other.text == ours.text
    # text by itself, by our own batches and by transformers' generate
    (text,) = qa.generate(run_.model, ["Which colour"], max_new_tokens=5)
    ids = kind.tokenizer("Which colour", return_tensors="pt")
    out = run_.model.generate(**ids, max_new_tokens=5, do_sample=False)
    said = out[0, ids["input_ids"].shape[1] :]
    assert text.text == kind.tokenizer.decode(said, skip_special_tokens=True)


@pytest.mark.slow
def test_commands_show_pictures(kind, data, run_, capsys) -> None:
    from quantadapt import cli

    picture = str(data.parent / "pictures" / "001.png")
    command = ["generate", str(run_.folder), "--image", picture, "--prompt", QUESTION]
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--max-new-tokens", "5", "--json"])
    assert not ended.value.code
    (found,) = json.loads(capsys.readouterr().out)
    asked = [{"role": "user", "content": [{"type": "image", "image": picture}, ASKED]}]
    assert found["answer"] == qa.generate(run_.model, [asked], max_new_tokens=5)[0].text
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", str(run_.folder), "--image", "none.png", "--prompt", "x"])
    assert ended.value.code == 2
    assert "--image" in capsys.readouterr().err


@of_runs
def test_files_of_prompts_name_their_pictures(kind, data, run_) -> None:
    from quantadapt.generation.files import read_prompts

    pairs = read_prompts(str(data))
    assert len(pairs) == 16
    (answer,) = qa.generate(run_.model, [pairs[1][1]], max_new_tokens=3)
    picture = str(data.parent / "pictures" / "001.png")
    asked = [{"role": "user", "content": [{"type": "image", "image": picture}, ASKED]}]
    assert answer == qa.generate(run_.model, [asked], max_new_tokens=3)[0]


@of_runs
def test_requests_show_pictures_as_data_urls_alone(kind, run_) -> None:
    from quantadapt.generation import PromptWriter, Sampling
    from quantadapt.serving.worker import Job, Worker

    writer = PromptWriter(kind.tokenizer, "chat")
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    ids = writer.ids([{"role": "user", "content": [part, ASKED]}])
    with pytest.raises(DataError, match="send it as a data: URL"):
        writer.ids([{"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}, ASKED]}])
    events: list = []
    worker = Worker(run_.model, kind.tokenizer, {"it": None}, max_batch=2)
    sampling = Sampling(max_new_tokens=3)
    job = Job("it", ids, sampling, 0, events.append)
    worker._answer(job)
    assert events[-1].finish in ("stop", "length")


@pytest.mark.slow
def test_a_run_is_resumed_with_the_same_losses(kind, data, tmp_path) -> None:
    train = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    train |= {"save_steps": 2, "logging_steps": 1, "lr_scheduler_type": "constant"}
    whole = trained(kind, data, tmp_path / "whole", train=train)
    trained(kind, data, tmp_path / "parts", train={**train, "max_steps": 2})
    parts = trained(kind, data, tmp_path / "parts", train={**train, "resume": True})
    assert parts.metrics["train"]["resumed_from"] == 2
    figures = [r.metrics["evaluations"]["perplexity"]["loss"]["values"] for r in (whole, parts)]
    assert figures[0]["tuned"] == figures[1]["tuned"]


@pytest.mark.slow
def test_it_is_merged_onto_its_base_and_quantized_again(kind, data, run_, tmp_path) -> None:
    found = qa.merge_onto(run_.folder, kind.path, tmp_path / "onto", data=str(data))
    assert found["kl"] < 1e-6
    assert (tmp_path / "onto" / "merged" / "processor_config.json").is_file()
    stock = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "onto" / "merged")
    assert shown_to(stock, kind, data.parent).isfinite().all()
    tuned = qa.load(run_.folder)
    made = qa.merge(tuned, tmp_path / "again", kind="requantize", data=str(data), min_gain=0)
    assert made["kind"] == "requantize"
    again = qa.load(tmp_path / "again")
    assert qa.evaluate(again, str(data))["loss"] == pytest.approx(
        qa.evaluate(tuned, str(data))["loss"], abs=1.0
    )


BACKENDS = {"hqq": {}, "bnb-nf4": {}, "torchao-int8": {}, "gptq": {"group_size": 32}}
CELLS = [
    (backend, adapter)
    for backend in BACKENDS
    for adapter in ("lora", "dora", "ia3", "vera", "pissa")
    if (backend, adapter) != ("gptq", "pissa")  # PiSSA rewrites layers, which GPTQ does not
]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "adapter"), CELLS)
def test_cells(backend, adapter, kind, data, tmp_path) -> None:
    named = {"name": backend, **BACKENDS[backend]}
    made = trained(kind, data, tmp_path / "run", named, adapter)
    figures = made.metrics["evaluations"]["perplexity"]["loss"]["values"]
    assert figures["tuned"] < figures["quantized"]
    assert qa.evaluate(qa.load(tmp_path / "run"), str(data))["loss"] == pytest.approx(
        qa.evaluate(made.model, str(data))["loss"], rel=1e-5
    )
