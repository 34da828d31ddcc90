"""The commands that faults befall, with what there is before each and what has to come of it."""

from __future__ import annotations

import gc
import importlib
import json
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .processes import SCRATCH, Action, Ended, Fault, call, cli

OPTIONS = (
    *("adapter.r=2", "data.max_length=32", "train.per_device_train_batch_size=2"),
    *("train.save_steps=2", "train.logging_steps=1", "evaluate.evaluations=[]"),
    *("evaluate.samples=0", "evaluate.unquantized=false", "backend.group_size=32"),
    "train.learning_rate=0.01",  # so that the adapter changes what the model answers
)
PISSA = ("--adapter", "pissa", "--merge", "never")
"""A run that saves a base of its own beside the adapter."""


ANSWERS = "answers.jsonl"
EXPORTED = {
    "gguf": (),
    "gguf-adapter": (),
    "ollama": (),
    "vllm": ("--set", "content=merged"),
    "hub": ("--set", "repo=me/it", "--set", "dry_run=true", "--set", "base=me/base"),
}
"""The exports that are tried, with options."""


@dataclass
class Command:
    """A command that writes a folder, or a file.

    Attributes:
        name: what it is called here.
        action: what it does.
        output: the folder or file that it writes, in the root that is watched.
        before: the folder of which `out` is a copy before it; None: there is nothing.
        again: what to try afterwards by name, the first that is not refused counts.
        result: returns what a folder holds that was written to its end, to be compared.
        reads: reads the output as others would; it must refuse one that is of two calls.
        obeys: whether it obeys signals, as runs do.
        expected, earlier: the result of an undisturbed call, and of what was there before.
        changes: what an undisturbed call changes, in order.
        needs: bytes and inodes that are taken in the root at the end of an undisturbed call.
        largest: bytes of its largest file.
    """

    name: str
    action: Action
    output: Path
    before: Path | None
    again: dict[str, Action]
    result: Callable[[Path], Any]
    reads: Action | None = None
    obeys: bool = False
    expected: Any = None
    earlier: Any = None
    changes: list[str] = field(default_factory=list)
    needs: tuple[int, int] = (0, 0)
    largest: int = 0


@dataclass
class Bench:
    """The folder that is watched, and what is read beside it."""

    root: Path
    inputs: Path

    @property
    def out(self) -> Path:
        return self.root / "out"

    def fresh(self, command: Command) -> None:
        """Make the root anew, with what is there before a command."""
        self.empty()
        if command.before is not None:
            shutil.copytree(command.before, self.out)

    def empty(self) -> None:
        """Leave nothing in the root."""
        self.root.mkdir(parents=True, exist_ok=True)
        for entry in self.root.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def measure(self, command: Command) -> None:
        """Let a command run to its end, and note its changes and its result."""
        self.fresh(command)
        if command.before is not None:
            command.earlier = command.result(command.output)
        ended = call(command.action, self.root)
        assert ended.code == 0, f"{command.name}: {ended.text}"
        command.expected, command.changes = command.result(command.output), ended.changes
        command.needs, command.largest = self.taken()

    def taken(self) -> tuple[tuple[int, int], int]:
        """Return bytes in blocks of 4096 and inodes that are taken in the root, and the bytes of
        the largest file."""
        found = list(self.root.rglob("*"))
        sizes = [file.lstat().st_size for file in found if file.is_file()]
        return (sum(-(-size // 4096) * 4096 for size in sizes), len(found)), max(sizes, default=0)

    def contents(self) -> dict[str, bytes]:
        """Return what lies in the root, but for what is only there while somebody is at work."""
        files = [file for file in self.root.rglob("*") if file.is_file()]
        named = {str(file.relative_to(self.root)): file for file in files}
        return {
            name: f.read_bytes() for name, f in named.items() if not name.startswith(f"{SCRATCH}/")
        }

    def made(self, *actions: Action) -> None:
        """Let processes make what is read; what they import is imported here as well, so that it
        need not be again each time."""
        names = self.inputs / "modules.txt"
        for action in actions:
            ended = call(noting(names, action), self.root)
            assert ended.code == 0, ended.text
            for name in set(names.read_text().split()) - set(sys.modules):
                with suppress(Exception):
                    importlib.import_module(name)
        gc.collect()
        gc.freeze()  # or each process would copy all of it as it collects


def noting(names: Path, action: Action) -> Action:
    """Return an action that also writes down which modules it has imported."""

    def act() -> int:
        code = action()
        names.write_text("\n".join(sys.modules))
        return code

    return act


# Results -----------------------------------------------------------------------------------------


def losses(run: Path) -> Any:
    """Return the state of a run, its losses, and the tensors of its adapter and base."""
    from quantadapt.folders.run_folder import RunFolder

    folder = RunFolder.open(run)
    steps = {line["step"]: line["loss"] for line in folder.read_metrics()}
    return folder.marker["state"], steps, tensors(run / "adapter"), tensors(run / "base")


def tensors(folder: Path) -> dict[str, bytes]:
    """Return the contents of the safetensors files, each of which has to be whole."""
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="np") as opened:
            assert list(opened.keys())
        found[file.name] = file.read_bytes()
    return found


def contents(output: Path) -> dict[str, bytes]:
    """Return the contents of a file, or of all below a folder."""
    files = [output] if output.is_file() else sorted(output.rglob("*"))
    found = [file for file in files if file.is_file()]
    return {str(file.relative_to(output.parent)): file.read_bytes() for file in found}


def pair(folder: Path) -> Any:
    """Return the tensors of an adapter and of the base beside it."""
    return tensors(folder / "adapter"), tensors(folder / "base")


def load(folder: Path) -> Action:
    """Return what loads a folder; exit code 2 where that is refused in words."""

    def act() -> int:
        import quantadapt as qa

        try:
            qa.load(folder, device="cpu")
        except qa.QuantadaptError as error:
            print(error)
            return 2
        return 0

    return act


# Inputs ------------------------------------------------------------------------------------------


def make_model(folder: Path, seed: int = 0) -> None:
    """Write a random Llama with the demo's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from quantadapt import demo

    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_prompts(file: Path) -> None:
    """Write four prompts."""
    rows = ({"prompt": f"Line {i}", "id": i} for i in range(4))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_data(file: Path) -> None:
    """Write a dozen short texts."""
    rows = ({"text": f"Line {i}: " + "say it again. " * (1 + i % 3)} for i in range(12))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(bench: Bench, folder: Path, *more: str) -> Action:
    """Return a run into `folder`."""
    model, data = str(bench.inputs / "model"), str(bench.inputs / "data.jsonl")
    options = [part for option in OPTIONS for part in ("--set", option)]
    given = ["--model", model, "--data", data, "--max-steps", "4", "--device", "cpu", *options]
    return cli("run", *given, "--output", str(folder), *more)


def make_inputs(bench: Bench) -> None:
    """Make what the commands read, and what lies there before them; once."""
    inputs = bench.inputs
    if inputs.exists():
        return
    inputs.mkdir(parents=True)
    bench.empty()

    def make() -> int:
        make_model(inputs / "model")
        make_data(inputs / "data.jsonl")
        make_prompts(inputs / "prompts.jsonl")
        return 0

    never, other = ("--merge", "never"), ("--seed", "1")
    bench.made(
        make,
        run(bench, inputs / "run", *never),
        run(bench, inputs / "earlier-run", *never, *other),
        run(bench, inputs / "earlier-pissa", *PISSA, *other),
        quantize(bench, inputs / "earlier-model", "--set", "group_size=16"),
        merge(bench, "earlier-run", inputs / "earlier-merge"),
        save(inputs / "model", inputs / "earlier-pair", seed=1),
        answer(bench, inputs / "earlier-answers", "--max-new-tokens", "2"),
        export(bench, "gguf", inputs / "earlier-gguf", "--set", "dtype=f32"),
    )


def quantize(bench: Bench, folder: Path, *more: str) -> Action:
    """Return what quantizes the model into `folder`."""
    given = ("--output", str(folder), "--device", "cpu", "--set", "group_size=32", *more)
    return cli("quantize", str(bench.inputs / "model"), *given)


def merge(bench: Bench, run: str, folder: Path, *more: str) -> Action:
    """Return what merges a run into `folder`."""
    data = str(bench.inputs / "data.jsonl")
    given = ("--output", str(folder), "--data", data, "--device", "cpu", *more)
    return cli("merge", str(bench.inputs / run), *given)


def answer(bench: Bench, folder: Path, *more: str) -> Action:
    """Return what answers the prompts into a file in `folder`."""
    given = ("--file", str(bench.inputs / "prompts.jsonl"), "--out", str(folder / ANSWERS))
    return cli("generate", str(bench.inputs / "model"), *given, "--device", "cpu", *more)


def export(bench: Bench, name: str, folder: Path, *more: str) -> Action:
    """Return what exports a run into `folder`."""
    data = str(bench.inputs / "data.jsonl")
    given = ("--output", str(folder), "--data", data, "--device", "cpu", *more)
    return cli("export", str(bench.inputs / "run"), name, *given)


def save(model: Path, folder: Path, seed: int = 0, overwrite: bool = False) -> Action:
    """Return what saves an adapter and a base of its own in Python; what it refuses is told, and
    ends, as a command does."""

    def act() -> int:
        import quantadapt as qa

        try:
            base = qa.quantize(str(model), "hqq", device="cpu", group_size=32)
            tuned = qa.attach(base, "pissa", r=2 + seed)
            qa.save(tuned, folder, overwrite=overwrite)
        except qa.QuantadaptError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        return 0

    return act


def commands(bench: Bench) -> list[Command]:
    """Return every command."""
    make_inputs(bench)
    inputs, out = bench.inputs, bench.out
    plain = run(bench, out)
    then = {"resume": run(bench, out, "--resume"), "run": plain}
    found = [Command("run", plain, out, None, then, losses, obeys=True)]
    for name, more, before in (
        ("run-overwrite", (), "earlier-run"),
        ("run-own-base-overwrite", PISSA, "earlier-pissa"),
    ):
        anew = run(bench, out, *more, "--overwrite")
        then = {"resume": run(bench, out, *more, "--resume"), "overwrite": anew}
        reads = load(out)
        found.append(Command(name, anew, out, inputs / before, then, losses, reads, obeys=True))
    found.append(resuming(bench))
    plain, anew = quantize(bench, out), quantize(bench, out, "--overwrite")
    then = {"quantize": plain, "overwrite": anew}
    found.append(Command("quantize", plain, out, None, then, tensors))
    before = inputs / "earlier-model"
    found.append(Command("quantize-overwrite", anew, out, before, {"overwrite": anew}, tensors))
    for name, more in (("merge", ()), ("onto", ("--onto", str(inputs / "model")))):
        plain = merge(bench, "run", out, *more)
        anew = merge(bench, "run", out, *more, "--overwrite")
        merged, then = out / "merged", {"merge": plain, "overwrite": anew}
        found.append(Command(name, plain, merged, None, then, tensors))
        before, then = inputs / "earlier-merge", {"overwrite": anew}
        found.append(Command(f"{name}-overwrite", anew, merged, before, then, tensors))
    saving = save(inputs / "model", out, overwrite=True)
    before, then = inputs / "earlier-pair", {"save": saving}
    found.append(Command("save-overwrite", saving, out, before, then, pair, load(out)))
    return found + others(bench)


def others(bench: Bench) -> list[Command]:
    """Return the commands that write what others read: answers, and exports."""
    inputs, out, found = bench.inputs, bench.out, list[Command]()
    few = ("--max-new-tokens", "3", "--batch-size", "1")
    plain, anew = answer(bench, out, *few), answer(bench, out, *few, "--overwrite")
    file, then = out / ANSWERS, {"generate": plain, "overwrite": anew}
    found.append(Command("generate", plain, file, None, then, contents))
    before, then = inputs / "earlier-answers", {"overwrite": anew}
    found.append(Command("generate-overwrite", anew, file, before, then, contents))
    for name, more in EXPORTED.items():
        plain, anew = (export(bench, name, out, *more, *over) for over in ((), ("--overwrite",)))
        made, then = out / name, {"export": plain, "overwrite": anew}
        found.append(Command(f"export-{name}", plain, made, None, then, contents))
    before, then = inputs / "earlier-gguf", {"overwrite": export(bench, "gguf", out, "--overwrite")}
    anew = then["overwrite"]
    found.append(Command("export-gguf-overwrite", anew, out / "gguf", before, then, contents))
    return found


def resuming(bench: Bench) -> Command:
    """Return the command that goes on with a run that was killed as its last checkpoint came."""
    first = run(bench, bench.out, *PISSA)
    again = run(bench, bench.out, *PISSA, "--resume")
    whole = call(first, bench.root)
    assert whole.code == 0, whole.text
    moved = [n for n, change in enumerate(whole.changes, 1) if "tmp/checkpoint-4" in change]
    bench.empty()
    call(first, bench.root, Fault(moved[0], signal.SIGKILL))
    before = bench.inputs / "killed-run"
    shutil.move(bench.out, before)
    reads, then = load(bench.out), {"resume": again}
    return Command("resume", again, bench.out, before, then, losses, reads, obeys=True)


def checkpoint(bench: Bench) -> Command:
    """Return the command that goes on with a run that is over, whose checkpoints are harmed."""
    make_inputs(bench)
    again = run(bench, bench.out, "--merge", "never", "--resume")
    before = bench.inputs / "run"
    return Command("checkpoint", again, bench.out, before, {"resume": again}, losses)


# What is left ------------------------------------------------------------------------------------


def broken(root: Path) -> list[str]:
    """Return the files with a final name that are not whole."""
    from quantadapt.folders.checkpoints import last_whole
    from quantadapt.folders.written import is_leftover, read_list

    found = []
    for file in sorted(root.rglob("*")):
        parts = file.relative_to(root).parts
        if parts[0] == SCRATCH or any(map(is_leftover, parts)) or not file.is_file():
            continue
        try:
            if file.suffix == ".json":
                json.loads(file.read_text())
            if file.suffix == ".safetensors":
                tensors(file.parent)
        except Exception as error:
            found.append(f"{file.relative_to(root)}: {error!r}")
        for name, facts in (read_list(file.parent) or {}).items():
            listed = file.parent / name
            if not listed.exists() or listed.stat().st_size != facts["size"]:
                found.append(f"{listed.relative_to(root)} is not as listed")
    if (root / "out" / "checkpoints").is_dir():
        last_whole(root / "out")
    return found


def left_whole(command: Command, root: Path) -> list[str]:
    """Return what is wrong with what a fault has left."""
    wrong = broken(root)
    if command.earlier is not None and not command.output.exists():
        from quantadapt.folders.atomic import put_back

        put_back(command.output)
        if not command.output.exists():
            wrong.append("what was there before is gone")
    if command.reads is not None and command.output.exists():
        wrong += _mixed(command, root)
    return wrong


def _mixed(command: Command, root: Path) -> list[str]:
    """Return what is wrong where an adapter is loaded with a base that is not its own."""
    assert command.reads is not None
    whole = [*map(_pair_in, (command.expected, command.earlier))]
    if pair(command.output) in whole:
        return []
    ended = call(command.reads, root)  # which may put back what was there before
    if unexpected(ended) or (ended.code == 0 and pair(command.output) not in whole):
        return [f"adapter and base are of two calls, and loading says: {ended.text[-300:]}"]
    return []


def _pair_in(result: Any) -> Any:
    """Return adapter and base in the result of a run or of `save`."""
    return result and result[-2:]


def called_again(command: Command, root: Path) -> list[str]:
    """Call the command again, as a user would; return what is wrong then."""
    for name, action in command.again.items():
        how, ended = name, call(action, root)
        if ended.code != 2:
            break
    if ended.code:
        return [f"{how} ends with {ended.code}: {ended.text[-600:]}"]
    wrong, found = [], command.result(command.output)
    if found != command.expected:
        earlier = found == command.earlier
        wrong.append(f"after {how} the result is {'the earlier' if earlier else 'another'} one")
    return wrong + hidden(root)


def hidden(root: Path) -> list[str]:
    """Return what is left behind that nobody needs."""
    kept = (".log",)
    found = [*root.rglob(".*"), *root.rglob("*.partial")]
    names = [path.relative_to(root) for path in found if path.suffix not in kept]
    return [f"{name} is left" for name in names if name.parts[0] != SCRATCH]


def unexpected(ended: Ended) -> list[str]:
    """Return what a command must never say."""
    if ended.code is None:
        return ["it took too long"]
    if "This was not expected" in ended.text or "Traceback (most recent" in ended.text:
        return [f"it was not prepared for that: {ended.text[-900:]}"]
    return []
