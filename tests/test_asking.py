"""How exported models are asked: as their runs learnt, whatever chat template their bases have."""

from __future__ import annotations

import copy
import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
from test_gguf import command, keys_of, tuned
from test_ollama import CHATML, GEMMA, go

from quantadapt.data.chats import PLAIN_TEMPLATE
from quantadapt.demo import MODEL_DIR
from quantadapt.exporting.asking import asking, asking_tokenizer
from quantadapt.exporting.chat_turns import chat_turns
from quantadapt.exporting.ollama import go_template

USER = {"role": "user", "content": "Add a and b."}
ANSWER = {"role": "assistant", "content": "a + b"}
SYSTEM = {"role": "system", "content": "Be brief."}
ALPACA = {  # written out, as what was learnt began with it
    (0,): "### Instruction:\nAdd a and b.\n\n### Response:\n",
    (0, 1, 0): "### Instruction:\nAdd a and b.\n\n### Response:\na + b</s>\n\n"
    "### Instruction:\nAdd a and b.\n\n### Response:\n",
    (2, 0): "Be brief.\n\n### Instruction:\nAdd a and b.\n\n### Response:\n",
}
TALKS = [([(USER, ANSWER, SYSTEM)[i] for i in key], text) for key, text in ALPACA.items()]


def learnt(tokenizer: Any, form: str, template: str | None = CHATML) -> Any:
    """Return what exports are given of a run that learnt from files of a format."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return SimpleNamespace(
        tokenizer=tokenizer, metrics_so_far={"data": {"files": [{"format": form}]}}
    )


def of_spaces(scheme: str) -> Any:
    """Return a tokenizer that puts a space in front of a text, as Llama 2's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted({letter for _, text in TALKS for letter in text} | set("And{c}?Bebrf.\u2581"))
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.mark.parametrize("form", ["alpaca", "dolly", "messages without a template"])
def test_a_template_makes_the_tokens_that_were_learnt(form, tokenizer) -> None:
    kind, _, without = form.partition(" ")
    run = learnt(tokenizer, kind, None if without else CHATML)
    asked = asking(run)
    assert asked.path == "chat/completions"
    assert asked.template == "{{ bos_token }}" + PLAIN_TEMPLATE
    for talk, text in TALKS:
        ids = tokenizer.apply_chat_template(
            talk, chat_template=asked.template, add_generation_prompt=True, return_dict=False
        )
        assert ids == tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
    noted = asked.chats[0]
    assert noted["prompt"] == tokenizer(ALPACA[(0,)]).input_ids
    assert noted["messages"] == [USER]


@pytest.mark.parametrize(("scheme", "head"), [("first", "{{ bos_token }} "), ("never", "")])
def test_a_space_is_where_it_was_learnt(scheme, head) -> None:
    tokenizer = of_spaces(scheme)
    if scheme == "never":  # and no beginning of text
        from tokenizers import processors

        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    asked = asking(learnt(tokenizer, "alpaca"))
    assert asked.template == head + PLAIN_TEMPLATE
    for talk, text in TALKS[:1]:
        ids = tokenizer.apply_chat_template(
            talk, chat_template=asked.template, add_generation_prompt=True, return_dict=False
        )
        assert ids == tokenizer(text).input_ids


def test_what_no_template_writes_is_asked_as_a_text(tokenizer) -> None:
    run = learnt(tokenizer, "alpaca")
    run.tokenizer.bos_token = None  # which the tokenizer goes on to add
    asked = asking(run)
    assert (asked.path, asked.template, asked.chats) == ("completions", None, [])
    assert asked.body == {"prompt": "### Instruction:\nHello\n\n### Response:\n"}
    assert "no chat template makes the same tokens" in asked.words


def test_what_learnt_chats_is_asked_by_its_template(tokenizer) -> None:
    for template, count in ((CHATML, 3), (GEMMA, 2)):  # Gemma's takes no system turn
        asked = asking(run := learnt(tokenizer, "messages", template))
        assert (asked.template, asked.words, len(asked.chats)) == (None, "", count)
        for chat in asked.chats:
            how = {"add_generation_prompt": True, "return_dict": False}
            assert run.tokenizer.apply_chat_template(chat["messages"], **how) == chat["prompt"]
        assert asking_tokenizer(run) is run.tokenizer


@pytest.mark.parametrize("template", [CHATML, None])
def test_what_learnt_texts_is_asked_for_texts(template, tokenizer) -> None:
    asked = asking(learnt(tokenizer, "text", template))
    assert (asked.path, asked.template) == ("completions", None)
    assert asked.words.endswith("a chat template writes what it did not learn.")


@pytest.mark.parametrize("template", [CHATML, None])
def test_ollama_and_llama_cpp_write_chats_as_they_were_learnt(template, tokenizer) -> None:
    """They put the beginning of text there themselves."""
    run = learnt(tokenizer, "alpaca", template)
    found = asking_tokenizer(run)
    assert run.tokenizer.chat_template == template
    for talk, text in TALKS:
        how = {"tokenize": False, "add_generation_prompt": True}
        assert found.apply_chat_template(talk, **how) == text
        assert go(go_template(chat_turns(found)), talk) == text


@pytest.mark.parametrize(("form", "head"), [("alpaca", "### Instruction:\nHi"), ("messages", "")])
def test_the_files_of_an_export(form, head, tokenizer, tmp_path) -> None:
    pytest.importorskip("gguf")
    run = tuned(tmp_path / "run", base=MODEL_DIR)
    metrics = {"data": {"files": [{"format": form}]}}
    (run.parent / "metrics.json").write_text(json.dumps(metrics))
    (run / "chat_template.jinja").write_text(CHATML)
    assert command("export", run, "ollama", "--set", "check=false", "-o", tmp_path) == 0
    written = (tmp_path / "ollama" / "Modelfile").read_text()
    template = re.search(r'TEMPLATE """(.*?)"""', written, flags=re.S)[1]
    talk = [{"role": "user", "content": "Hi"}]
    said = go(template, talk)
    assert said.startswith(head or "<|im_start|>user\nHi")
    keys = keys_of(tmp_path / "ollama" / "model.gguf")
    assert (
        tokenizer.apply_chat_template(
            talk,
            chat_template=keys["tokenizer.chat_template"],
            tokenize=False,
            add_generation_prompt=True,
        )
        == said
    )
