"""Which tasks lm-evaluation-harness knows, and what they need, without its whole index.

Its own index parses all of its 14,000 files, which takes half a minute. Here the names are looked
up in their text, and it is shown the folders of those tasks alone that are wanted.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from ..dependencies import unchanged_process
from ..errors import Problem
from ..inputs.likely_names import likely_name

_KEYS = re.compile(
    r"""^["']?(task|group|tag|class|include)["']?[ \t]*:(.*(?:\n(?:[ \t]+|-).*)*)""", re.MULTILINE
)
_WORD = re.compile(r"""\s*(["']?)([\w.+/-]+)\1\s*(?:#.*)?""")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PASSED_OVER = {"__pycache__", ".ipynb_checkpoints"}
_PACKAGED = ("json", "csv", "text", "parquet", "arrow")
"""What `datasets` reads from files that a task names."""


def task_problems(
    names: Sequence[str], folders: Sequence[str], *, confirmed: bool
) -> Iterator[Problem]:
    """Yield what is wrong with tasks: there are none of that name, they run code that a model
    wrote, or the hub is off and their data are not here.

    Args:
        names: of tasks, groups and tags.
        folders: hold files of tasks, beside lm-eval's own.
        confirmed: whether code that a model wrote may run.
    """
    missing = [folder for folder in folders if not Path(folder).expanduser().is_dir()]
    for folder in missing:
        yield Problem(f"{folder} is no folder", "check the path", _where("include_path"))
    known = known_tasks([folder for folder in folders if folder not in missing], names)
    if not missing:
        for name in names:
            if name not in known:
                yield Problem(f"there is no task {name!r}", _near(name, known), _where("tasks"))
    found = [name for name in names if name in known]
    if found:
        yield from _needs(found, manager_of(found, folders), confirmed)


def _where(option: str) -> str:
    return f"evaluation.{option}"


def _near(name: str, known: Iterable[str]) -> str:
    words = sorted(known)
    near = [word for word in words if name.lower() in word.lower()][:5]
    likely = likely_name(name, words)
    if likely or near:
        shown = dict.fromkeys([*([likely] if likely else []), *near])
        return f"did you mean {' or '.join(map(repr, shown))}?"
    return "`lm-eval ls tasks` lists them; include_path names a folder with others"


def known_tasks(
    folders: Sequence[str] = (), wanted: Iterable[str] | None = None
) -> Mapping[str, frozenset[Path]]:
    """Return the names of all tasks, groups and tags with the files that they are in; those in
    `folders` take the place of lm-eval's, which are left out if all that is `wanted` is there."""
    own: dict[str, frozenset[Path]] = {}
    for folder in folders:
        own |= _tasks_in(Path(folder).expanduser())
    if wanted is not None and own.keys() >= set(wanted):
        return own
    return {**_tasks_in(_own_folder()), **own}


@cache
def _tasks_in(root: Path) -> Mapping[str, frozenset[Path]]:
    found: dict[str, set[Path]] = {}
    for path in sorted(root.rglob("*.yaml"), key=lambda path: path.as_posix()):
        if not _PASSED_OVER.intersection(path.parts):
            for name in _names(_head(path)):
                found.setdefault(name, set()).add(path)
    return {name: frozenset(paths) for name, paths in found.items()}


def _own_folder() -> Path:
    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "tasks"


def _names(head: Mapping[str, str]) -> Iterator[str]:
    """Yield what a file is found by: as a group by its name, as a task by its tags, too."""
    name = _values(head.get("group", "") if "class" not in head and "group" in head else
                   head.get("task", ""))  # fmt: skip
    yield from name[:1]
    if name and ("class" in head or "group" not in head):
        yield from _values(head.get("tag", ""))


def _task_in(path: Path) -> list[str]:
    return _values(_head(path).get("task", ""))


def _values(text: str) -> list[str]:
    """Return the text, or the list of texts, that a YAML value is; nothing where it is neither."""
    if word := _WORD.fullmatch(text):
        return [word[2]]
    try:
        value = yaml.load(f"x:{text}", Loader=_LOADER)["x"]
    except (yaml.YAMLError, TypeError):
        return []
    values = value if isinstance(value, list) else [value]
    return [value for value in values if isinstance(value, str)]


@cache
def _head(path: Path, inside: tuple[Path, ...] = ()) -> Mapping[str, str]:
    """Return the text of the keys that say what a file is; what it includes stands behind it.

    Args:
        inside: the files that include it, none of which is read again.
    """
    if path in inside:
        return {}
    try:
        found = dict(_KEYS.findall(path.read_text(encoding="utf-8", errors="replace")))
    except OSError:
        return {}
    merged: dict[str, str] = {}
    for name in _values(found.pop("include", "")):
        merged |= _head(Path(os.path.normpath(path.parent / name)), (*inside, path))
    return merged | found


def manager_of(names: Sequence[str], folders: Sequence[str]) -> Any:
    """Return lm-eval's TaskManager, which knows `names`, and what groups among them consist of."""
    with unchanged_process():
        from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval.tasks").setLevel(logging.ERROR)  # what takes the place of what
    roots = [Path(folder).expanduser() for folder in folders]
    wanted = set(names)
    known = known_tasks(folders, wanted)
    while True:
        parents = {path.parent for name in wanted for path in known.get(name, ())}
        own = [parent for parent in parents if not any(map(parent.is_relative_to, roots))]
        shown = sorted(p for p in own if not any(p != o and p.is_relative_to(o) for o in own))
        manager = TaskManager(include_defaults=False, include_path=[*shown, *roots])
        index = manager.task_index
        for name in wanted & index.keys():
            if index[name].yaml_path is None:  # a tag: in one folder it knows not the others
                index[name].tags |= {one for path in known[name] for one in _task_in(path)}
        more = {m for name in wanted if name in index for m in _members(index[name])}
        known = known_tasks(folders, wanted | more)
        if not (more & known.keys()) - wanted:
            return manager
        wanted |= more & known.keys()


def _members(entry: Any) -> Iterator[str]:
    """Yield the names that a tag stands for, or that a group consists of."""
    yield from entry.tags if entry.yaml_path is None else ()
    members = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else ()
    yield from _named_in(members if isinstance(members, list) else ())


def _named_in(members: Iterable[Any]) -> Iterator[str]:
    for member in members:
        if isinstance(member, str):
            yield member
        elif isinstance(member, Mapping):
            group, task = member.get("group"), member.get("task")
            yield from (name for name in (group, task) if isinstance(name, str))
            yield from _named_in(task if isinstance(task, list) else ())


def _needs(names: Sequence[str], manager: Any, confirmed: bool) -> Iterator[Problem]:
    for name in names:
        found: dict[tuple[str, str], list[str]] = {}
        for leaf, config in _leaves(name, manager.task_index, set()):
            for problem in _lacks(config, confirmed):
                found.setdefault(problem, []).append(leaf)
        for (what, fix), leaves in found.items():
            parts = "" if leaves == [name] else f", in {len(leaves)} of its tasks"
            yield Problem(f"task {name!r}{parts}: {what}", fix, _where("tasks"))


def _leaves(
    name: str, index: Mapping[str, Any], seen: set[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the tasks that `name` consists of, each with its config."""
    entry = index.get(name)
    if entry is None or name in seen:
        return
    seen.add(name)
    members = list(_members(entry))
    if not members and entry.cfg:
        yield name, entry.cfg
    for member in members:
        yield from _leaves(member, index, seen)


def _lacks(config: Mapping[str, Any], confirmed: bool) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with one task, and what to do."""
    if config.get("unsafe_code") and not confirmed:
        what = "it runs the Python code that the model writes, on this machine"
        yield what, "set confirm_run_unsafe_code, inside a container, or leave it out"
    if "doc_to_image" in config or "doc_to_audio" in config:
        yield "it shows images or sounds, and language models read text alone", "leave it out"
    source = config.get("dataset_path")
    if source and "custom_dataset" not in config:
        options = json.dumps(config.get("dataset_kwargs") or {}, default=str)
        if why := _absent(source, config.get("dataset_name"), options):
            yield why


@cache
def _absent(source: str, part: str | None, options: str) -> tuple[str, str] | None:
    """Return why the data of a task cannot be had, and what to do; nothing is downloaded.

    Args:
        options: of `load_dataset`, as JSON.
    """
    from datasets import config, load_dataset_builder

    given = json.loads(options)
    given.pop("trust_remote_code", None)
    local = source in _PACKAGED and "://" not in str(given.get("data_files", ""))
    if not (local or config.HF_HUB_OFFLINE):
        return None
    try:
        load_dataset_builder(source, part, **given)
    except Exception as error:
        if local:
            reason = " ".join(str(error).split())
            return f"its data cannot be read: {reason}", "check data_files in the task's file"
        what = f"its data, {source}, are not in the cache, and the hub is off (HF_HUB_OFFLINE)"
        return what, "run it once without HF_HUB_OFFLINE, or leave it out"
    return None
