"""Run folders and atomic writing: whole or not at all, and never somebody else's files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantadapt.errors import OutputError
from quantadapt.folders import atomic
from quantadapt.folders.atomic import atomic_folder, refuse_overlap, write_atomic
from quantadapt.folders.checkpoints import seal
from quantadapt.folders.environment import environment
from quantadapt.folders.run_folder import MARKER, RunFolder
from quantadapt.folders.written import LIST


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder`, hidden ones too, with the bytes of the files."""
    paths = sorted(folder.rglob("*"))
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() and not p.is_symlink() else None
        for p in paths
    }


def listed(sizes: dict[str, int]) -> bytes:
    files = {name: {"size": size} for name, size in sizes.items()}
    return f"{json.dumps({'files': files}, indent=1)}\n".encode()


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill(final: Path, body: Callable[[Path], None], *, overwrite: bool = False) -> None:
    with atomic_folder(final, overwrite=overwrite) as temporary:
        body(temporary)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    folder = tmp_path / "thesis"
    (folder / "figures").mkdir(parents=True)
    (folder / "thesis.tex").write_bytes(b"four years \x00 of work")
    (folder / "figures" / "one.pdf").write_bytes(b"%PDF")
    (folder / "metrics.json").write_bytes(b"{}")  # looks like ours, but has no marker
    return folder


@pytest.fixture
def earlier(tmp_path: Path) -> RunFolder:
    with RunFolder.create(tmp_path / "run") as folder:
        folder.write_text("spec.yaml", "seed: 0\n")
        with atomic_folder(folder.path / "adapter") as adapter:
            (adapter / "weights").write_bytes(b"trained")
        folder.set_state("finished")
    return folder


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A folder that quantadapt wrote: with a list of its files."""
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "part").mkdir()
        (folder / "part" / "weights").write_bytes(b"earlier")
    return tmp_path / "model"


def created(path: Path, **how: Any) -> RunFolder:
    """Create a run folder, and give it free."""
    with RunFolder.create(path, **how) as folder:
        return folder


class TestCreate:
    def test_new_with_parents(self, tmp_path: Path) -> None:
        folder = created(tmp_path / "a" / "b")
        assert list(contents(tmp_path)) == ["a", "a/b", f"a/b/{MARKER}"]
        assert folder.marker["state"] == "running"
        assert {"version", "started"} <= set(folder.marker)

    def test_new_obeys_the_umask(self, tmp_path: Path) -> None:
        (tmp_path / "plain").mkdir()
        created(tmp_path / "run")
        modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "run")]
        assert modes[0] == modes[1]

    def test_empty_folder_is_taken_in_place(self, tmp_path: Path) -> None:
        before = tmp_path.stat().st_ino
        created(tmp_path)
        assert tmp_path.stat().st_ino == before
        assert list(contents(tmp_path)) == [MARKER]

    @pytest.mark.parametrize(
        "how", [{}, {"overwrite": True}, {"resume": True}], ids=["new", "overwrite", "resume"]
    )
    def test_foreign_folder_is_untouched(
        self, foreign: Path, tmp_path: Path, how: dict[str, Any]
    ) -> None:
        before = contents(tmp_path)
        with pytest.raises(OutputError, match=r"fix: .*--output"):
            created(foreign, **how)
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "other"}'])
    def test_folder_with_a_false_marker_is_foreign(self, foreign: Path, text: str) -> None:
        (foreign / MARKER).write_text(text)
        before = contents(foreign)
        with pytest.raises(OutputError, match="not made by quantadapt"):
            created(foreign, overwrite=True)
        assert contents(foreign) == before

    def test_earlier_run_is_refused(self, earlier: RunFolder, tmp_path: Path) -> None:
        before = contents(tmp_path)
        with pytest.raises(OutputError) as caught:
            created(earlier.path)
        assert contents(tmp_path) == before
        for word in ("earlier run", "finished", "--output", "--overwrite", "resume"):
            assert word in str(caught.value)

    def test_overwrite_replaces_an_earlier_run(self, earlier: RunFolder, tmp_path: Path) -> None:
        created(earlier.path, overwrite=True)
        assert list(contents(tmp_path)) == ["run", f"run/{MARKER}"]
        assert earlier.marker["state"] == "running"

    def test_overwrite_that_fails_leaves_the_earlier_run(
        self, earlier: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = contents(tmp_path)
        monkeypatch.setattr(os, "fsync", no_space)
        with pytest.raises(OutputError, match="not enough disk space"):
            created(earlier.path, overwrite=True)
        assert contents(tmp_path) == before

    def test_overwrite_through_a_link_keeps_the_link(
        self, earlier: RunFolder, tmp_path: Path
    ) -> None:
        link = tmp_path / "latest"
        link.symlink_to(earlier.path)
        created(link, overwrite=True)
        assert link.is_symlink()
        assert list(contents(earlier.path)) == [MARKER]

    def test_overwrite_never_deletes_an_input(self, earlier: RunFolder) -> None:
        before = contents(earlier.path)
        with pytest.raises(OutputError, match=r"would replace .*adapter, which is read"):
            created(earlier.path, overwrite=True, inputs=[(earlier.path / "adapter")])
        assert contents(earlier.path) == before

    def test_overwrite_never_deletes_the_working_directory(
        self, earlier: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(earlier.path / "adapter")
        with pytest.raises(OutputError, match="in use"):
            created(Path(".."), overwrite=True)

    def test_resume_keeps_everything_and_clears_leftovers(self, earlier: RunFolder) -> None:
        before = contents(earlier.path)
        started = earlier.marker["started"]
        (earlier.path / ".merged.0a1b2c3d.tmp").mkdir()
        (earlier.path / ".plan.json.0a1b2c3d.tmp").write_text("{")
        created(earlier.path, resume=True)
        assert {**contents(earlier.path), MARKER: None} == {**before, MARKER: None}
        assert earlier.marker["state"] == "running"
        assert earlier.marker["started"] == started
        assert "ended" not in earlier.marker

    def test_resume_needs_an_earlier_run(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="no earlier run"):
            created(tmp_path / "typo", resume=True)
        assert contents(tmp_path) == {}

    def test_resume_and_overwrite_exclude_each_other(self, earlier: RunFolder) -> None:
        before = contents(earlier.path)
        with pytest.raises(OutputError, match="exclude"):
            created(earlier.path, resume=True, overwrite=True)
        assert contents(earlier.path) == before

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_file_in_the_way(self, tmp_path: Path, overwrite: bool) -> None:
        path = tmp_path / "run"
        path.write_text("mine")
        with pytest.raises(OutputError, match="a file is in the way"):
            created(path, overwrite=overwrite)
        assert path.read_text() == "mine"

    def test_parent_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match=r"cannot write it: .*\n +fix: "):
            created(tmp_path / "file" / "run")


@pytest.fixture
def unprivileged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that this process may read but not write, also where tests run as root."""
    folder = Path(os.path.realpath(tmp_path_factory.mktemp("locked")))
    opened = [path for path in folder.parents if not path.stat().st_mode & 0o001]
    modes = {path: path.stat().st_mode for path in opened}
    as_root = os.geteuid() == 0
    for path in opened:
        path.chmod(0o755)
    folder.chmod(0o555)
    if as_root:
        os.seteuid(65534)
    yield folder
    if as_root:
        os.seteuid(0)
    folder.chmod(0o755)
    for path, mode in modes.items():
        path.chmod(mode)


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_parent_that_is_not_writable(unprivileged: Path) -> None:
    with pytest.raises(OutputError) as caught:
        RunFolder.create(unprivileged / "run")
    assert "permission denied" in str(caught.value)
    assert f"make {unprivileged} writable, or choose another --output" in str(caught.value)
    assert contents(unprivileged) == {}


class TestOpen:
    def test_run_folder(self, earlier: RunFolder) -> None:
        assert RunFolder.open(earlier.path).marker == earlier.marker

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="no such folder"):
            RunFolder.open(tmp_path / "typo")

    def test_foreign(self, foreign: Path) -> None:
        with pytest.raises(OutputError, match="no run folder"):
            RunFolder.open(foreign)


class TestFiles:
    def test_json_is_strict_and_round_trips(self, earlier: RunFolder) -> None:
        values = {"nan": float("nan"), "paths": (Path("a"),), "text": "naïve \ud800"}
        path = earlier.write_json("x.json", values)
        json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))
        assert earlier.read_json("x.json") == {"nan": None, "paths": ["a"], "text": "naïve \ud800"}

    def test_missing_json_is_empty(self, earlier: RunFolder) -> None:
        assert earlier.read_json("plan.json") == {}

    def test_broken_json_is_named(self, earlier: RunFolder) -> None:
        earlier.write_text("plan.json", "{")
        with pytest.raises(OutputError, match=r"plan\.json: not valid JSON"):
            earlier.read_json("plan.json")

    @pytest.mark.parametrize("failing", ["fsync", "replace"])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "full")])
    def test_interrupted_write_leaves_the_old_file(
        self,
        earlier: RunFolder,
        monkeypatch: pytest.MonkeyPatch,
        failing: str,
        error: BaseException,
    ) -> None:
        before = contents(earlier.path)

        def fail(*_: Any) -> None:
            raise error

        monkeypatch.setattr(os, failing, fail)
        with pytest.raises((KeyboardInterrupt, OutputError)):
            earlier.write_text("spec.yaml", "seed: 1\n")
        assert contents(earlier.path) == before

    def test_metrics_are_appended_and_readable_at_once(self, earlier: RunFolder) -> None:
        earlier.append_metric({"step": 1, "loss": 2.5})
        earlier.append_metric({"step": 2, "loss": float("nan")})
        lines = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}]
        assert earlier.read_metrics() == lines

    def test_line_cut_by_a_crash_harms_no_other(self, earlier: RunFolder) -> None:
        earlier.append_metric({"step": 1})
        with (earlier.path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "lo')
        earlier.append_metric({"step": 2})
        assert earlier.read_metrics() == [{"step": 1}, {"step": 2}]

    def test_resumed_run_replaces_the_steps_it_repeats(self, earlier: RunFolder) -> None:
        for step, loss in [(5, 3.0), (10, 2.0), (15, 1.9), (20, 1.8), (15, 1.7), (20, 1.6)]:
            earlier.append_metric({"step": step, "loss": loss})
        assert [line["loss"] for line in earlier.read_metrics()] == [3.0, 2.0, 1.7, 1.6]

    def test_state(self, earlier: RunFolder) -> None:
        earlier.set_state("failed")
        assert earlier.marker["state"] == "failed"
        assert earlier.marker["ended"] >= earlier.marker["started"]


class TestEnvironment:
    def test_versions(self) -> None:
        facts = environment(["pytest>=1", "no-such-thing[x]>=2", "torch"])
        assert facts["versions"]["pytest"] == pytest.__version__
        assert facts["versions"]["no-such-thing"] is None
        assert list(facts["versions"])[:2] == ["torch", "transformers"]
        assert all(facts[name] for name in ("python", "platform", "cpu", "cores"))

    def test_is_written(self, earlier: RunFolder) -> None:
        earlier.write_environment(["pytest"])
        assert earlier.read_json("environment.json")["versions"]["pytest"]


class TestAtomicFolder:
    def test_appears_only_when_done(self, tmp_path: Path) -> None:
        final = tmp_path / "deep" / "merged"
        with atomic_folder(final) as temporary:
            (temporary / "part").mkdir()
            (temporary / "part" / "weights").write_bytes(b"new")
            assert not final.exists()
            assert temporary.parent == final.parent
        assert contents(tmp_path / "deep") == {
            "merged": None,
            "merged/part": None,
            "merged/part/weights": b"new",
            f"merged/{LIST}": listed({"part/weights": 3}),
        }

    def test_every_file_is_flushed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        flushed: set[int] = set()
        fsync = os.fsync

        def noting(descriptor: int) -> None:
            flushed.add(os.fstat(descriptor).st_ino)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", noting)
        with atomic_folder(tmp_path / "merged") as temporary:
            (temporary / "part").mkdir()
            (temporary / "part" / "weights").write_bytes(b"new")
        paths = [tmp_path, *tmp_path.rglob("*")]
        assert {path.stat().st_ino for path in paths} <= flushed
        flushed.clear()
        write_atomic(tmp_path / "spec.yaml", "seed: 1")
        assert flushed == {(tmp_path / "spec.yaml").stat().st_ino, tmp_path.stat().st_ino}

    def test_a_link_to_nowhere_is_written_as_it_is(self, tmp_path: Path) -> None:
        with atomic_folder(tmp_path / "merged") as temporary:
            (temporary / "weights").symlink_to("nowhere")
        assert os.readlink(tmp_path / "merged" / "weights") == "nowhere"

    def test_empty_folder_is_used(self, tmp_path: Path) -> None:
        final = tmp_path / "merged"
        final.mkdir()
        with atomic_folder(final) as temporary:
            (temporary / "weights").write_bytes(b"new")
        assert contents(tmp_path).keys() == {"merged", "merged/weights", f"merged/{LIST}"}

    def test_occupied_is_refused_before_the_body(self, foreign: Path, tmp_path: Path) -> None:
        before = contents(tmp_path)
        with pytest.raises(OutputError, match="not empty"), atomic_folder(foreign):
            pytest.fail("the body ran")
        assert contents(tmp_path) == before

    def test_occupied_meanwhile_is_refused(self, tmp_path: Path) -> None:
        final = tmp_path / "merged"

        def theirs(_: Path) -> None:
            final.mkdir()
            (final / "theirs").write_text("theirs")

        with pytest.raises(OutputError, match="not empty"):
            fill(final, theirs)
        assert contents(tmp_path) == {"merged": None, "merged/theirs": b"theirs"}

    def test_overwrite(self, ours: Path, tmp_path: Path) -> None:
        with atomic_folder(ours, overwrite=True) as temporary:
            (temporary / "weights").write_bytes(b"new")
            assert (ours / "part" / "weights").read_bytes() == b"earlier"
        assert contents(tmp_path).keys() == {"model", "model/weights", f"model/{LIST}"}

    def test_overwrite_never_deletes_what_is_not_ours(self, foreign: Path, tmp_path: Path) -> None:
        before = contents(tmp_path)
        with (
            pytest.raises(OutputError, match=r"figures/one\.pdf, metrics\.json, thesis\.tex"),
            atomic_folder(foreign, overwrite=True),
        ):
            pytest.fail("the body ran")
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_file_is_never_replaced(self, tmp_path: Path, overwrite: bool) -> None:
        (tmp_path / "merged").write_text("mine")
        with (
            pytest.raises(OutputError, match="a file is in the way"),
            atomic_folder(tmp_path / "merged", overwrite=overwrite),
        ):
            pytest.fail("the body ran")
        assert (tmp_path / "merged").read_text() == "mine"

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), ValueError("x")])
    def test_any_exception_leaves_no_trace(
        self, ours: Path, tmp_path: Path, error: BaseException
    ) -> None:
        before = contents(tmp_path)

        def half(temporary: Path) -> None:
            (temporary / "weights").write_bytes(b"half")
            raise error

        with pytest.raises(type(error)) as caught:
            fill(ours, half, overwrite=True)
        assert caught.value is error
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("call", [1, 2])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "broken")])
    def test_failing_swap_puts_the_old_folder_back(
        self,
        ours: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        call: int,
        error: BaseException,
    ) -> None:
        before = contents(tmp_path)
        rename, calls = os.rename, []

        def fail(*paths: Any) -> None:
            calls.append(paths)
            if len(calls) == call:
                raise error
            rename(*paths)

        monkeypatch.setattr(os, "rename", fail)
        with (
            pytest.raises((KeyboardInterrupt, OutputError)),
            atomic_folder(ours, overwrite=True) as temporary,
        ):
            (temporary / "weights").write_bytes(b"new")
        assert contents(tmp_path) == before

    def test_full_disk_while_flushing(
        self, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = contents(tmp_path)
        monkeypatch.setattr(os, "fsync", no_space)
        with (
            pytest.raises(OutputError) as caught,
            atomic_folder(ours, overwrite=True, needed=2048) as temporary,
        ):
            (temporary / "weights").write_bytes(b"x" * 1024)
        assert contents(tmp_path) == before
        for words in ("2.00 KiB are needed", "1.05 KiB had been written", "are free", "fix: free"):
            assert words in str(caught.value)

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
    def test_full_disk_in_the_body(self, tmp_path: Path) -> None:
        def too_much(temporary: Path) -> None:
            (temporary / "weights").symlink_to("/dev/full")
            (temporary / "weights").write_bytes(b"x")

        with pytest.raises(OutputError, match="not enough disk space"):
            fill(tmp_path / "merged", too_much)
        assert contents(tmp_path) == {}

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
    def test_a_copied_folder_that_does_not_fit(self, tmp_path: Path) -> None:
        """shutil tells of all files at once, in an error without a number."""
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "README.md").write_text("much")

        def full(source: str, target: str) -> None:
            Path("/dev/full").write_text(Path(source).read_text())

        def copied(folder: Path) -> None:
            shutil.copytree(tmp_path / "adapter", folder / "again", copy_function=full)

        with pytest.raises(OutputError, match="not enough disk space"):
            fill(tmp_path / "merged", copied)
        assert "merged" not in contents(tmp_path)

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
    @pytest.mark.parametrize(("free", "words"), [(0, "not enough disk space"), (2**30, "cannot")])
    def test_what_numpy_could_not_write(
        self, free: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its error has no number. GGUF files are written so."""
        monkeypatch.setattr("quantadapt.folders.atomic.free_space", lambda _: free)

        def too_much(_: Path) -> None:
            with open("/dev/full", "wb") as full:
                np.zeros(2**16).tofile(full)

        with pytest.raises(OutputError, match=words):
            fill(tmp_path / "merged", too_much)
        assert contents(tmp_path) == {}

    @pytest.mark.parametrize(
        "message",
        [
            "Error while serializing: I/O error: No space left on device (os error 28)",
            "I/O error: os error 28",
        ],
    )
    def test_full_disk_as_other_libraries_report_it(self, tmp_path: Path, message: str) -> None:
        with (
            pytest.raises(OutputError, match="not enough disk space"),
            atomic_folder(tmp_path / "merged"),
        ):
            raise RuntimeError(message)

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_full_disk_or_quota_behind_another_error(self, tmp_path: Path, number: int) -> None:
        def failing(_: Path) -> None:
            try:
                raise OSError(number, "full")
            except OSError:
                raise RuntimeError("it cannot be saved")  # noqa: B904

        with pytest.raises(OutputError, match="not enough disk space"):
            fill(tmp_path / "merged", failing)

    def test_full_disk_as_torch_reports_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        error = RuntimeError(
            "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"
        )
        reading = RuntimeError("inline_container.cc:1 PytorchStreamReader failed reading a file")
        with pytest.raises(RuntimeError), atomic_folder(tmp_path / "merged"):
            raise reading
        with pytest.raises(OutputError, match="cannot write"), atomic_folder(tmp_path / "merged"):
            raise error  # whatever the reason is, for the disk is not full
        monkeypatch.setattr(atomic, "free_space", lambda path: 4096)
        with (
            pytest.raises(OutputError, match=r"4\.00 KiB are free"),
            atomic_folder(tmp_path / "merged"),
        ):
            raise error

    def test_too_small_a_disk_is_refused_before_the_body(self, tmp_path: Path) -> None:
        with (
            pytest.raises(OutputError, match=r"1,024 TiB are needed.*\n +fix: free .* more on"),
            atomic_folder(tmp_path / "deep" / "merged", needed=2**50),
        ):
            pytest.fail("the body ran")
        assert contents(tmp_path) == {}

    def test_errors_of_the_body_stay_what_they_are(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "merged"):
            Path("/no/such/file").read_text()
        assert contents(tmp_path) == {}


@pytest.mark.skipif(os.name == "nt", reason="no umask")
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077], ids=oct)
def test_files_of_weights_get_the_mode_of_other_files(umask: int, tmp_path: Path) -> None:
    """safetensors makes them for their owner alone."""
    import torch
    from safetensors.torch import save_file

    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "model") as made:
            (made / "part").mkdir()
            for place in (made, made / "part"):
                save_file({"weight": torch.ones(2)}, place / "model.safetensors")
            (made / "script").touch(mode=0o700)
            (made / "plain").touch()
            (made / "copied.json").touch()
            (made / "copied.json").chmod(0o666)
            (made / "link").symlink_to("plain")
        seal_one(tmp_path)
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.rglob("*.*")}
    usual = 0o666 & ~umask
    names = (
        "model.safetensors",
        "adapter.safetensors",
        LIST,
        "quantadapt-checkpoint.json",
        "copied.json",
    )
    assert modes == dict.fromkeys(names, usual)
    assert stat.S_IMODE((tmp_path / "model/script").stat().st_mode) == 0o700 | usual


def seal_one(folder: Path) -> None:
    """Write a checkpoint of one file into `folder`."""
    import torch
    from safetensors.torch import save_file

    (folder / "made").mkdir()
    save_file({"weight": torch.ones(2)}, folder / "made" / "adapter.safetensors")
    seal(folder / "made", folder / "checkpoint-1", {})


def test_write_atomic_into_a_missing_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such file or directory"):
        write_atomic(tmp_path / "gone" / "x.txt", "text")


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "adapter"])
def test_a_resumed_run_writes_nowhere_else(name: str, tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run").release()
    elsewhere = tmp_path / name
    elsewhere.write_text("mine")
    (tmp_path / "run" / name).symlink_to(elsewhere)
    with pytest.raises(OutputError, match="leads out of the folder"):
        RunFolder.create(tmp_path / "run", resume=True)
    assert elsewhere.read_text() == "mine"


@pytest.mark.parametrize("exports", [["*"], ["notes.txt"], ["../notes.txt"], 5, None, [{"a": 1}]])
def test_what_a_marker_names_is_not_deleted(exports: object, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    RunFolder.create(folder).release()
    marker = json.loads((folder / MARKER).read_text())
    (folder / MARKER).write_text(json.dumps({**marker, "exports": exports}))
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        RunFolder.create(folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"


def test_the_folder_that_one_is_in_is_not_replaced(tmp_path: Path, monkeypatch) -> None:
    with atomic_folder(tmp_path / "made") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("ours")
    for inside in (tmp_path / "made", tmp_path / "made" / "inner"):
        monkeypatch.chdir(inside)
        with (
            pytest.raises(OutputError, match="which is in use"),
            atomic_folder(tmp_path / "made", overwrite=True),
        ):
            pass
    assert (tmp_path / "made" / "inner" / "file").read_text() == "ours"


def test_one_folder_under_two_names_is_one(tmp_path: Path, monkeypatch) -> None:
    for name in ("Model", "model/out"):  # as if case did not count
        (tmp_path / name).mkdir(parents=True)
    same = lambda a, b: str(a).lower() == str(b).lower()  # noqa: E731
    monkeypatch.setattr(os.path, "samefile", same)
    with pytest.raises(OutputError, match="which is read"):
        refuse_overlap(tmp_path / "Model", [tmp_path / "model" / "out"])
    with pytest.raises(OutputError, match="which is read"):
        refuse_overlap(tmp_path / "model" / "out", [tmp_path / "Model"])
