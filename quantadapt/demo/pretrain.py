"""Pretrain the demo model on the Python standard library.

``python -m quantadapt.demo.pretrain --output DIR`` reads the source files of the running
interpreter's standard library, trains a byte-level BPE tokenizer and a small Llama on them, and
writes both to ``DIR`` in the transformers layout, together with the held-out text and a report.

The corpus has three parts: source files, the language reference topics behind ``help()``, and
one short plain-language description per documented function, made from its signature and
docstring. Files with licence terms of their own are left out. The files in ``HELD_OUT`` give
neither source nor descriptions; the reported loss is measured on them alone.
"""

import argparse
import ast
import hashlib
import json
import math
import platform
import re
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"

HELD_OUT = (
    "asyncio/queues.py",
    "fileinput.py",
    "graphlib.py",
    "json/encoder.py",
    "shelve.py",
    "zipapp.py",
)

EXCLUDED_PARTS = {
    *("test", "tests", "idlelib", "lib2to3", "encodings", "ensurepip", "turtledemo"),
    *("site-packages", "dist-packages", "lib-dynload", "pydoc_data"),
    *("__phello__", "__pycache__"),
}
"""Folders left out: tests, tables, programs, and whatever is not the standard library itself."""

OWN_TERMS = re.compile(
    r"permission (?:to use|is hereby|is granted)|redistribut|secret labs|cnri|spdx-|"
    r"apache license|mit license|public domain",
    re.IGNORECASE,
)
"""Marks of a file that carries (or may carry) licence terms other than Python's own."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
    "{% else %}"
    "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, apart from the corpus."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 768
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    context: int = 512
    dropout: float = 0.2
    steps: int = 2400
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.5
    warmup: int = 200
    eval_every: int = 100
    seed: int = 0


@dataclass(frozen=True)
class Corpus:
    """Training documents, held-out documents and the paths both were read from."""

    train: list[str]
    held_out: list[str]
    files: list[str]
    left_out: list[str]


# --------------------------------------------------------------------------- text


def source_files(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (relative path, text) of every standard library module, in a fixed order."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        generated = parts[0].startswith(("config-", "_sysconfigdata"))
        if EXCLUDED_PARTS.isdisjoint(parts) and not generated:
            yield "/".join(parts), path.read_text(encoding="utf-8", errors="replace")


def help_topics(root: Path) -> list[str]:
    """Return the texts behind ``help('topics')``, without importing the module."""
    path = root / "pydoc_data" / "topics.py"
    if not path.is_file():
        return []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            return [text for _, text in sorted(ast.literal_eval(node.value).items())]
    return []


def first_sentence(docstring: str) -> str:
    """Return the first sentence of a docstring on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s", paragraph)[0]


def word_list(words: list[str]) -> str:
    """Join words as in English: ``a, b and c``."""
    if len(words) < 2:
        return "".join(words) or "nothing"
    return f"{', '.join(words[:-1])} and {words[-1]}"


def describe(node: ast.FunctionDef | ast.AsyncFunctionDef, module: str) -> str | None:
    """Return a plain-language description of one function, or None if it has no docstring."""
    docstring = ast.get_docstring(node)
    if not docstring:
        return None
    arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    plain = [name for name in arguments if name not in ("self", "cls")]
    sentence = first_sentence(docstring)
    return (
        f"The function {node.name} of module {module} takes {word_list(plain)}. {sentence}\n\n"
        f'def {node.name}({", ".join(arguments)}):\n    """{sentence}"""\n'
    )


def descriptions(path: str, source: str) -> list[str]:
    """Return the descriptions of all documented functions of one source file."""
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, functions)]
    return [text for node in nodes if (text := describe(node, module))]


def build_corpus(root: Path) -> Corpus:
    """Read the standard library at ``root`` and split it into training and held-out text."""
    corpus = Corpus(train=help_topics(root), held_out=[], files=[], left_out=[])
    for path, source in source_files(root):
        if OWN_TERMS.search(source):
            corpus.left_out.append(path)
        elif path in HELD_OUT:
            corpus.held_out.append(source)
        else:
            corpus.files.append(path)
            corpus.train.append(source)
            corpus.train.extend(descriptions(path, source))
    if not corpus.held_out or not corpus.files:
        raise SystemExit(f"no standard library sources under {root}")
    return corpus


# --------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: list[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that begins every text with BOS, as the model knows it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Encode documents into one stream, each between a BOS and an EOS token."""
    stream: list[int] = []
    for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
        stream += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return torch.tensor(stream)


# --------------------------------------------------------------------------- model


def add_dropout(model: LlamaForCausalLM, rate: float) -> None:
    """Drop out the embeddings and what each block adds to the residual stream.

    Llama has no such option, and the corpus is small enough to be learned by heart without it.
    The hooks are no part of the model's configuration or of its saved weights.
    """

    def hook(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, rate, module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(hook)


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained Llama of the given shape, with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def windows(stream: torch.Tensor, settings: Settings, generator: torch.Generator) -> torch.Tensor:
    """Draw one batch of random windows from the token stream."""
    size = (settings.batch_size, 1)
    starts = torch.randint(len(stream) - settings.context, size, generator=generator)
    return stream[(starts + torch.arange(settings.context)).to(stream.device)]


def mean_loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token loss of a batch, in bfloat16 where the device is a GPU."""
    on_gpu = batch.device.type == "cuda"
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=on_gpu):
        loss: torch.Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
        return loss


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, context: int) -> float:
    """Return the mean loss over non-overlapping windows of the held-out stream."""
    model.eval()
    total = count = 0.0
    for window in torch.split(stream, context):
        if len(window) > 1:
            total += mean_loss(model, window[None]).item() * (len(window) - 1)
            count += len(window) - 1
    model.train()
    return total / count


def learning_rate_factor(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to a hundredth."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2


def make_optimizer(model: LlamaForCausalLM, settings: Settings) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))


def train(
    model: LlamaForCausalLM, stream: torch.Tensor, held_out: torch.Tensor, settings: Settings
) -> dict[str, float]:
    """Train the model in place, leave it at its best checkpoint and return the figures."""
    optimizer = make_optimizer(model, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, settings)
    )
    generator = torch.Generator().manual_seed(settings.seed)
    best = {"step": 0.0, "held_out_loss": held_out_loss(model, held_out, settings.context)}
    untrained, weights = best["held_out_loss"], model.state_dict()
    started = time.perf_counter()
    for step in range(1, settings.steps + 1):
        loss = mean_loss(model, windows(stream, settings, generator))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % settings.eval_every == 0 or step == settings.steps:
            current = held_out_loss(model, held_out, settings.context)
            elapsed = time.perf_counter() - started
            print(
                f"step {step} train {loss.item():.3f} held-out {current:.4f} {elapsed:.0f} s",
                flush=True,
            )
            if current < best["held_out_loss"]:
                best = {"step": float(step), "held_out_loss": current}
                weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights)
    return best | {"untrained_loss": untrained, "seconds": time.perf_counter() - started}


# --------------------------------------------------------------------------- output


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the model in bfloat16 and its tokenizer."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=64,
    )
    model.bfloat16().save_pretrained(output)
    tokenizer.save_pretrained(output)
    path = output / "tokenizer.json"
    compact = json.dumps(json.loads(path.read_text(encoding="utf-8")), separators=(",", ":"))
    path.write_text(compact, encoding="utf-8")


def make_report(
    settings: Settings, corpus: Corpus, tokens: dict[str, int], figures: dict[str, float]
) -> dict[str, object]:
    """Collect what a reader needs to judge or repeat the run."""
    text = "\0".join(corpus.train)
    on_gpu = torch.cuda.is_available()
    return {
        "settings": asdict(settings),
        "files": len(corpus.files),
        "documents": len(corpus.train),
        "train_bytes": len(text.encode()),
        "train_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "held_out_files": list(HELD_OUT),
        "left_out_for_their_licence": corpus.left_out,
        "tokens": tokens,
        "result": figures,
        "held_out_perplexity": math.exp(figures["held_out_loss"]),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line; every field of ``Settings`` is an option."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--stdlib",
        type=Path,
        default=Path(sysconfig.get_path("stdlib")),
        help="standard library to read (default: the running interpreter's)",
    )
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return parser.parse_args()


def main() -> None:
    """Build corpus, tokenizer and model, train, and write everything."""
    arguments = vars(parse_arguments())
    output, stdlib = arguments.pop("output"), arguments.pop("stdlib")
    settings = Settings(**arguments)
    torch.manual_seed(settings.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    corpus = build_corpus(stdlib)
    tokenizer = train_tokenizer(corpus.train, settings.vocab_size, settings.context)
    stream, held_out = encode(tokenizer, corpus.train), encode(tokenizer, corpus.held_out)
    tokens = {"train": len(stream), "held_out": len(held_out)}
    model = build_model(settings, tokenizer)
    add_dropout(model, settings.dropout)
    torch.nn.Module.to(model, device)
    print(f"{len(corpus.files)} files, {tokens}, {model.num_parameters()} parameters", flush=True)

    figures = train(model, stream.to(device), held_out.to(device), settings)
    save(model, tokenizer, output)
    (output / "heldout.txt").write_text("\n".join(corpus.held_out), encoding="utf-8")
    report = make_report(settings, corpus, tokens, figures)
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report["result"]))


if __name__ == "__main__":
    main()
