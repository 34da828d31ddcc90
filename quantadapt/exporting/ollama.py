"""The export `ollama`: a GGUF file and the Modelfile that `ollama create` takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..capabilities import Cell, Merge
from ..errors import Problem
from ..paths import path_problem
from ..protocols import Figure
from ..records import Adapter, Backend
from .gguf.export import Gguf, GgufAdapter

if TYPE_CHECKING:
    from .chat_turns import Turns
    from .tuned import Tuned

MODELFILE = "Modelfile"


class Ollama(Gguf):
    """A model for Ollama: weights, chat template and where an answer ends."""

    onto: str | None = Field(
        None,
        description="leave the adapter beside the base: a model that Ollama has, or a GGUF file of "
        "the base; by default the merged model is written",
    )

    @property
    def merges(self) -> Merge:
        return Merge.DENSE if self.onto is None else Merge.NEVER

    @property
    def planned(self) -> str:
        return f"model for Ollama in {self.dtype}" if self.onto is None else "adapter for Ollama"

    @property
    def _adapter(self) -> GgufAdapter:
        return GgufAdapter(converter=self.converter)

    def refusals(self, cell: Cell, backend: Backend, adapter: Adapter) -> list[Problem]:
        if self.onto is None:
            return super().refusals(cell, backend, adapter)
        found = self._adapter.refusals(cell, backend, adapter)
        if why := path_problem(self.onto):  # a line of its own would be another instruction
            what = f"{self.onto!r} is no model of Ollama's, nor a file: {why}"
            found.append(Problem(what, "name it as `ollama list` does", where="onto"))
        return found

    def done(self, figures: Mapping[str, Figure]) -> str:
        said = super().done(figures) if self.onto is None else f"an adapter for {self.onto}"
        template = "" if figures["template"].value else ", without its chat template: see Modelfile"
        return f"{said}{template}; ollama create NAME -f {MODELFILE}"

    def needed(self, tuned: Tuned) -> int | None:
        return super().needed(tuned) if self.onto is None else None

    def write(self, tuned: Tuned, folder: Path) -> dict[str, Figure]:
        if self.onto is None:
            figures = super().write(tuned, folder)
        else:
            figures = self._adapter.write(tuned, folder)
        from .asking import asking_tokenizer
        from .chat_turns import chat_turns

        tokenizer = asking_tokenizer(tuned)
        turns = chat_turns(tokenizer)
        text = modelfile(tokenizer, turns, self.onto)
        (folder / MODELFILE).write_text(text, encoding="utf-8")
        has_template = getattr(tokenizer, "chat_template", None) is not None
        return figures | {"template": Figure(int(turns is not None or not has_template))}


def modelfile(tokenizer: Any, turns: Turns | None, onto: str | None) -> str:
    """Return a Modelfile.

    Args:
        turns: of the chat template; None where there is none that can be told.
        onto: what an adapter is put on; None for a merged model.
    """
    from_ = "./model.gguf" if onto is None else _file_or_name(onto)
    lines = [f"FROM {from_}"]
    if onto is not None:
        lines.append("ADAPTER ./adapter.gguf")
    if turns is not None and (template := go_template(turns)) is not None:
        lines.append(f'TEMPLATE """{template}"""')
    elif getattr(tokenizer, "chat_template", None) is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    else:
        lines.append("# The chat template does more than put texts around turns. Write a TEMPLATE,")
        lines.append("# or see whether Ollama knows the one in the GGUF file.")
    stops = (json.dumps(stop, ensure_ascii=False) for stop in _stops(tokenizer, turns))
    lines += [f"PARAMETER stop {stop}" for stop in stops]
    return "\n".join(lines) + "\n"


def go_template(turns: Turns) -> str | None:
    """Return turns as a template of Go's; None where a Modelfile cannot hold it."""
    parts, others = [], "if"
    for role in ("system", "user", "assistant"):
        if role in turns.around:
            before, after = (_literal(text) for text in turns.around[role])
            turn = f"{before}{{{{ .Content }}}}{after}"
            parts.append(f'{{{{ {others} eq .Role "{role}" }}}}{turn}')
            others = "else if"
    start = ""
    if turns.start:
        first = '{{ with index .Messages 0 }}{{ if ne .Role "system" }}'
        start = f"{first}{_literal(turns.start)}{{{{ end }}}}{{{{ end }}}}"
    loop = f"{{{{ range .Messages }}}}{''.join(parts)}{{{{ end }}}}{{{{ end }}}}"
    found = f"{start}{loop}{_literal(turns.answer)}"
    return None if '"""' in found or found.endswith('"') else found


def _literal(text: str) -> str:
    """Return text as it stands in a template: what would open an action is a string in one."""
    return text.replace("{{", '{{ "{{" }}')


def _file_or_name(onto: str) -> str:
    found = Path(onto).expanduser()
    return str(found.resolve()) if found.is_file() else onto


def _stops(tokenizer: Any, turns: Turns | None) -> list[str]:
    """Return what an answer ends with: the end of text, and the tokens that close a turn or open
    the user's."""
    stops = [getattr(tokenizer, "eos_token", None) or ""]
    if turns is not None:
        close, begin = turns.around["assistant"][1], turns.around["user"][0]
        stops += [close.strip(), begin.strip()]
    return list(dict.fromkeys(stop for stop in stops if stop and "\n" not in stop))
