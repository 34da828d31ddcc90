"""The export `hub`: what was tuned, with a model card, pushed to the Hugging Face Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..capabilities import Cell
from ..errors import ModelError, Problem
from ..folders.written import LIST
from ..inputs.documents import read_object, reason
from ..paths import MANIFEST
from ..protocols import Figure
from ..records import Adapter, Backend
from .adapter_files import copy_files
from .card import Content, is_local, public_name, write_card
from .content import ContentExport
from .manifest import BASE

if TYPE_CHECKING:
    from .tuned import Tuned

_LEFT_OUT = (LIST,)
"""Files that are of use on this machine alone."""
_WITH_PATHS = ("base_model_name_or_path", "_name_or_path", "name_or_path", "base")
"""Keys of JSON files that name what a model was made from."""


class Hub(ContentExport):
    """A repository of the hub: adapter or merged model, with a card made of the run."""

    repo: str = Field(description="the repository, OWNER/NAME; made if it is not there")
    content: Content = Field(
        "adapter",
        description="adapter; merged, into dense weights; or requantized, merged and quantized "
        "again as the base was",
    )
    base: str | None = Field(
        None, description="hub id of the base, where it was trained from a local folder"
    )
    private: bool = Field(True, description="whether a repository that is made is private")
    dry_run: bool = Field(False, description="write the folder, and push nothing")

    @property
    def planned(self) -> str:
        return f"{self.content} for {self.repo}" if self.dry_run else f"{self.repo} on the hub"

    def done(self, figures: Mapping[str, Figure]) -> str:
        from .kept import merge_words

        where = f"to be pushed to {self.repo}" if self.dry_run else f"pushed to {self.repo}"
        return ", ".join(filter(None, [where, merge_words(figures)]))

    def refusals(self, cell: Cell, backend: Backend, adapter: Adapter) -> list[Problem]:
        from huggingface_hub import get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        found = super().refusals(cell, backend, adapter)
        for name, repo in (("repo", self.repo), ("base", self.base)):
            try:
                if repo is not None:
                    validate_repo_id(repo)
            except HFValidationError:
                found.append(Problem(f"{repo!r} is no repository", "name it OWNER/NAME", name))
        if "/" not in self.repo:
            found.append(Problem(f"{self.repo!r} names no owner", "name it OWNER/NAME", "repo"))
        if self.content == "adapter" and self.base is None and cell.model and is_local(cell.model):
            what = f"the base is a folder of this machine, {cell.model}, which nobody else has"
            fix = "name its hub id, base=OWNER/NAME; or push content=merged"
            found.append(Problem(what, fix, "base", "hub-local-base"))
        if self.dry_run:
            return found
        if _is_offline():
            what = "HF_HUB_OFFLINE is set, so nothing can be pushed"
            found.append(Problem(what, "unset it, or take dry_run=true", "hub"))
        elif not get_token():
            fix = "hf auth login, or set HF_TOKEN; or take dry_run=true"
            found.append(Problem("nobody is logged in to the hub", fix, "hub"))
        return found

    def write(self, tuned: Tuned, folder: Path) -> dict[str, Figure]:
        figures: dict[str, Figure] = {}
        if self.content == "adapter":
            self._write_adapter(tuned, folder)
        else:
            figures = dict(self.merged.write(tuned, folder))
        source = tuned.manifest["base"]
        without_paths(folder, self.base or public_name(source))
        write_card(
            folder,
            tuned.manifest,
            content=self.content,
            title=self.repo,
            base=self.base or "",
            metrics=tuned.metrics_so_far,
            figures=figures,
        )
        if not self.dry_run:
            self._push(folder)
        return figures

    def _write_adapter(self, tuned: Tuned, folder: Path) -> None:
        if (tuned.adapter.parent / BASE / MANIFEST).exists():
            what = "the adapter's base was made here, from data or by its start, and lies beside it"
            fix = "push the merged model, content=merged"
            raise ModelError(what, fix=fix, where=str(tuned.adapter))
        copy_files(tuned.adapter, folder, leave_out=_LEFT_OUT)

    def _push(self, folder: Path) -> None:
        """Push the folder. Raises ModelError, which never holds the token."""
        from huggingface_hub import HfApi, get_token

        api = HfApi()
        try:
            api.create_repo(self.repo, private=self.private, exist_ok=True)
            api.upload_folder(
                repo_id=self.repo,
                folder_path=folder,
                commit_message=f"Upload of quantadapt: {self.content}",
                ignore_patterns=list(_LEFT_OUT),
            )
        except Exception as error:  # of the hub, of the network
            said = reason(error).replace(get_token() or "\0", "***")
            fix = "see whether you may write there and the net is there;"
            fix += " dry_run=true keeps a folder"
            raise ModelError(f"pushing failed: {said}", fix=fix, where=self.repo) from None


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")


def without_paths(folder: Path, base: str) -> None:
    """Have the JSON files in `folder` name the base `base`, and no local path."""
    for file in folder.rglob("*.json"):  # further adapters have folders of their own
        if file.name == "tokenizer.json" or file.stat().st_size > 2**20:
            continue
        values = read_object(file, fix="remove it: nothing reads it")
        if _renamed(values, base):
            file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _renamed(values: Any, base: str) -> bool:
    """Change what names a local path in place; say whether anything did."""
    changed = False
    items = values.items() if isinstance(values, dict) else ()
    for key, value in list(items):
        if isinstance(value, str) and key in _WITH_PATHS and value and is_local(value):
            values[key], changed = base, True
        else:
            changed |= _renamed(value, base)
    return changed
