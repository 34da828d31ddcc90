"""One writer for each folder, nothing of the user's deleted, nothing broken by a kill."""

import errno
import fcntl
import json
import logging
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import quantadapt as qa
from quantadapt import cli
from quantadapt.cli.quiet import Quiet
from quantadapt.errors import FolderInUse, ModelError, OutputError, PlanRefused
from quantadapt.exporting import saving
from quantadapt.folders import lock, written
from quantadapt.folders.atomic import atomic_folder, clear_up, in_words, put_back, refuse_overlap
from quantadapt.folders.lines import lines_file
from quantadapt.folders.lock import LockTakenOver, lock_file, take
from quantadapt.folders.run_folder import RunFolder
from quantadapt.folders.written import LIST, not_ours
from quantadapt.testing.small_demo import small_model

ROOT = Path(__file__).parent.parent

DEAD = 2**22 + 1  # above Linux's largest process id


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def model_at(folder: Path, text: str = "earlier", **how: Any) -> Path:
    """Write a folder as a backend's checkpoint would be."""
    with atomic_folder(folder, **how) as made:
        (made / "weights").write_text(text)
        (made / "quantadapt.json").write_text('{"backend": "none"}')
    return folder


# Locks -------------------------------------------------------------------------------------------


HOLDER = """
import sys, time
from quantadapt.folders.run_folder import RunFolder
from quantadapt.folders.lock import take
from pathlib import Path
held = take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def elsewhere() -> Iterator[Any]:
    """Have another process lock a folder; kill it at the end."""
    processes = []

    def hold(folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(folder)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "held\n"
        return processes[-1]

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def test_a_live_run_keeps_everybody_else_out(tmp_path: Path, elsewhere: Any) -> None:
    run = tmp_path / "run"
    with RunFolder.create(run) as folder:
        folder.set_state("interrupted")
    other = elsewhere(run)
    before = tree(run)
    for how in ({"resume": True}, {"overwrite": True}):
        for attempt in (RunFolder.check, RunFolder.create):
            with pytest.raises(FolderInUse) as caught:
                attempt(run, **how)
            assert f"process {other.pid} on {socket.gethostname()}, since 20" in str(caught.value)
    with pytest.raises(OutputError), atomic_folder(run, overwrite=True):
        pytest.fail("the body ran")
    assert caught.value.exit_code == 2
    assert tree(run) == before
    spec = {"backend": "none", "output": str(run), "train": {"resume": True}}
    with pytest.raises(PlanRefused, match=f"process {other.pid} on .* is writing there"):
        qa.plan(qa.Spec(**spec))


def test_the_lock_of_a_dead_process_is_taken_over_and_told(tmp_path: Path, elsewhere: Any) -> None:
    run = tmp_path / "run"
    with RunFolder.create(run):
        pass
    other = elsewhere(run)
    other.kill()
    other.wait()
    assert lock_file(run).exists()
    with (
        pytest.warns(LockTakenOver, match=f"left by process {other.pid} .* does not run any more"),
        RunFolder.create(run, resume=True),
    ):
        assert lock_file(run).exists()
    assert not lock_file(run).exists()


NOBODY = {"host": socket.gethostname(), "pid": 1, "since": "", "born": ""}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "[1]",
        "{}",
        *(json.dumps({**NOBODY, "pid": pid}) for pid in ("x", None, [1], -1, 0, 10**30, 1.5)),
        json.dumps({**NOBODY, "host": [1]}),
        json.dumps({**NOBODY, "born": {}, "since": 3}),
    ],
)
@pytest.mark.parametrize("flock", [True, False])
def test_a_lock_that_nobody_holds_and_that_says_nothing_is_no_lock(
    text, flock, tmp_path, monkeypatch
) -> None:
    run = tmp_path / "run"
    if not flock:
        monkeypatch.setattr(lock, "fcntl", None)
    with RunFolder.create(run):
        pass
    lock_file(run).write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LockTakenOver)
        with RunFolder.create(run, resume=True):
            assert json.loads(lock_file(run).read_text())["pid"] == os.getpid()


def test_a_link_in_the_place_of_a_lock_is_not_written_through(dense: Path, tmp_path: Path) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine.txt"
    mine.write_text("mine")
    lock_file(run).symlink_to(mine)
    for call in (
        lambda: RunFolder.create(run),
        lambda: qa.save(qa.quantize(str(dense), "none"), run),
    ):
        with pytest.raises(OutputError, match="it is a link, and no lock"):
            call()
    assert mine.read_text() == "mine"
    assert not run.exists()


def test_one_of_many_threads_writes(tmp_path: Path) -> None:
    inside, refused, together = [0], [], []
    gate = threading.Barrier(8)

    def write() -> None:
        gate.wait()
        try:
            with atomic_folder(tmp_path / "model", overwrite=True) as folder:
                inside[0] += 1
                together.append(inside[0])
                time.sleep(0.05)
                (folder / "weights").write_text("x")
                inside[0] -= 1
        except FolderInUse:
            refused.append(1)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(together) == {1}
    assert len(together) + len(refused) == 8
    assert refused
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_each_writer_has_the_lock_alone_however_quickly_they_follow(tmp_path: Path) -> None:
    """A lock file that is removed while somebody opens it must not count."""
    inside, wrong = [0], []

    def write() -> None:
        for _ in range(200):
            try:
                held = take(tmp_path / "model")
            except FolderInUse:
                continue
            inside[0] += 1
            if inside[0] != 1:
                wrong.append(inside[0])
            inside[0] -= 1
            held.release()

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert list(tmp_path.iterdir()) == []


def held_by(folder: Path, **facts: Any) -> Path:
    """Write a lock file that nobody holds any more, or that flock does not reach."""
    holder = {"host": socket.gethostname(), "pid": DEAD, "since": "2026-01-01", "born": ""}
    file = lock_file(folder)
    file.write_text(json.dumps(holder | facts))
    return file


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("without_flock")
def test_without_flock_the_process_is_looked_for(tmp_path: Path) -> None:
    file = held_by(tmp_path / "a")
    with pytest.warns(LockTakenOver, match=str(DEAD)):
        take(tmp_path / "a").release()
    assert not file.exists()
    mine = {"pid": os.getpid(), "born": lock._born(os.getpid())}
    held_by(tmp_path / "b", **mine)
    with pytest.raises(FolderInUse, match=f"process {os.getpid()}"):
        take(tmp_path / "b")
    held_by(tmp_path / "c", **mine | {"born": "1"})  # an earlier process of that number
    with pytest.warns(LockTakenOver):
        take(tmp_path / "c").release()


@pytest.mark.parametrize("shared", [True, False])
def test_other_machines_on_a_shared_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """flock may not reach them: a lock counts for as long as its holder touches it."""
    monkeypatch.setattr(lock, "_is_shared", lambda file: shared)
    file = held_by(tmp_path / "run", host="elsewhere")
    if shared:
        with pytest.raises(
            FolderInUse, match=rf"on elsewhere(.|\n)*wait 5 minutes, or delete {file}"
        ):
            take(tmp_path / "run")
        long_ago = time.time() - lock.LEASE - 60
        os.utime(file, (long_ago, long_ago))
    with pytest.warns(LockTakenOver, match="elsewhere"):
        take(tmp_path / "run").release()
    assert list(tmp_path.iterdir()) == []


def test_a_held_lock_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LEASE", 0.25)
    monkeypatch.setattr(lock, "_is_shared", lambda file: True)
    held = take(tmp_path / "run")
    os.utime(held.file, (0, 0))
    deadline = time.monotonic() + 10
    while held.file.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert held.file.stat().st_mtime > 0
    held.release()


def test_which_file_systems_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = "\n".join(
        [
            "/dev/sda / ext4 rw 0 0",
            "srv:/x /mnt/my\\040home nfs4 rw 0 0",
            "tmpfs /mnt/b tmpfs rw 0 0",
        ]
    )
    monkeypatch.setattr(Path, "read_text", lambda self, **_: mounts)
    assert lock._is_shared(Path("/mnt/my home/runs/x"))
    assert not lock._is_shared(Path("/mnt/b/x"))
    assert not lock._is_shared(Path("/home/x"))


# Lists: what is ours -----------------------------------------------------------------------------


def test_what_is_not_on_the_list_is_found(tmp_path: Path) -> None:
    folder = model_at(tmp_path / "model")
    assert not_ours(folder) == []
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    (folder / "weights").write_text("changed by me")
    (folder / "link").symlink_to(tmp_path)
    model_at(folder / "adapter")  # ours, and not of this folder
    assert not_ours(folder) == [
        *("adapter/quantadapt.json", "adapter/weights"),
        *("link", "notes/mine.txt", "weights"),
    ]


def test_a_run_with_files_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with RunFolder.create(run) as folder:
        model_at(run / "adapter")
        model_at(run / "tiny")
        model_at(run / "mine")
        folder.note_exports(["tiny"])
    before = tree(run)
    with pytest.raises(OutputError, match=r"did not write there: mine/"):
        RunFolder.create(run, overwrite=True)
    assert tree(run) == before
    shutil.move(run / "mine", tmp_path)
    (run / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"did not write there: adapter/notes.txt"):
        RunFolder.create(run, overwrite=True)
    (run / "adapter" / "notes.txt").unlink()
    with RunFolder.create(run, overwrite=True):
        assert [path.name for path in run.iterdir()] == ["quantadapt-run.json"]


@pytest.mark.parametrize(
    "listed", ["[]", "{", "[" * 100_000, '{"files": [1]}', '{"files": {"weights": 3}}']
)
def test_with_a_list_that_is_none_nothing_is_ours(tmp_path: Path, listed: str) -> None:
    folder = model_at(tmp_path / "model")
    (folder / LIST).write_text(listed)
    with pytest.raises(OutputError, match=r"quantadapt\.json, weights"):
        model_at(folder, overwrite=True)


def test_names_that_no_text_can_hold(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model") as made:
        (made / os.fsdecode(b"caf\xe9 \xff")).write_text("x")
    assert not_ours(tmp_path / "model") == []


# Inputs and outputs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(tmp_path_factory: Any) -> Path:
    return shutil.copytree(small_model(), tmp_path_factory.mktemp("dense") / "model")


def run_cli(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    code = ended.value.code
    return code if isinstance(code, int) else 0


def test_quantize_never_deletes_its_source(dense: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    source = shutil.copytree(dense, out / "source")
    model_at(tmp_path / "made")
    for file in (tmp_path / "made").iterdir():
        shutil.move(file, out)  # as if it had been quantized into OUT before
    command = ("quantize", source, "--backend", "none", "--overwrite", "--output")
    before = tree(tmp_path)
    for output in (out, source, source / "inside"):
        assert run_cli(*command, output) == 2
        told = capsys.readouterr().err
        assert "which is read" in told or (output == source and "not made by quantadapt" in told)
    shutil.move(source, tmp_path / "source")
    (out / "mine.txt").write_text("mine")
    assert run_cli("quantize", tmp_path / "source", "-b", "none", "-o", out, "--overwrite") == 2
    assert "did not write there: mine.txt" in capsys.readouterr().err
    (out / "mine.txt").unlink()
    shutil.move(tmp_path / "source", source)
    assert tree(tmp_path) == before


def test_save_replaces_only_what_it_is_asked_to(dense: Path, tmp_path: Path) -> None:
    model = qa.quantize(str(dense), "none", device="cpu")
    out = tmp_path / "out"
    model_at(out / "adapter")
    model_at(out / "merged")
    before = tree(out)
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            qa.save(model, out, overwrite=overwrite)
        assert tree(out) == before
    saved = qa.save(model, tmp_path / "saved")
    first = tree(saved)
    with pytest.raises(OutputError, match="overwrite=True"):
        qa.save(model, saved)
    assert tree(saved) == first
    qa.save(model, saved, overwrite=True)
    tuned = qa.attach(model, "lora", r=2)
    qa.save(tuned, tmp_path / "tuned")
    with pytest.raises(OutputError, match="overwrite=True"):
        qa.save(tuned, tmp_path / "tuned")
    qa.save(tuned, tmp_path / "tuned", overwrite=True)


def test_save_never_replaces_what_the_model_was_read_from(dense: Path, tmp_path: Path) -> None:
    source = shutil.copytree(dense, tmp_path / "source")
    model = qa.quantize(str(source), "none", device="cpu")
    before = tree(source)
    for place in (source, source / "inside", tmp_path):
        with pytest.raises(OutputError, match=f"{source}, which is read"):
            qa.save(model, place, overwrite=True)
    assert tree(source) == before


def test_merging_onto_a_base_never_touches_it(dense: Path, tmp_path: Path) -> None:
    base = shutil.copytree(dense, tmp_path / "merged")
    tuned = qa.attach(qa.quantize(str(dense), "none", device="cpu"), "lora", r=2)
    qa.save(tuned, tmp_path / "run")
    before = tree(base)
    for place in (tmp_path, base):  # `merged` goes into them
        with pytest.raises(OutputError, match="which is read"):
            qa.merge_onto(tmp_path / "run", str(base), place, check=False, overwrite=True)
    assert tree(base) == before
    command = ["merge", tmp_path / "run", "--onto", base, "--overwrite", "--output"]
    assert run_cli(*command, tmp_path) == run_cli(*command, tmp_path / "run" / "adapter") == 2
    assert tree(base) == before


def test_a_run_whose_data_or_model_overlap_with_its_folder_is_refused(
    dense: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "a"}\n' * 8)
    spec = {"model": str(dense), "backend": "none", "data": str(tmp_path / "data")}
    for output in (tmp_path / "data" / "run", dense / "run"):
        with pytest.raises(PlanRefused, match=r"the folder is inside .*, which is read"):
            qa.plan(qa.Spec(output=str(output), **spec))


def test_links_do_not_hide_an_overlap(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(OutputError):
        refuse_overlap(tmp_path / "link", [tmp_path / "real" / "model"])
    with pytest.raises(OutputError):
        refuse_overlap(tmp_path / "real" / "model" / "out", [tmp_path / "link" / "model"])
    refuse_overlap(tmp_path / "real" / "model2", [tmp_path / "link" / "model", "ORG/NAME", None])


# What a kill leaves ------------------------------------------------------------------------------


def killed_between_renames(folder: Path) -> dict[str, bytes]:
    before = tree(folder)
    folder.rename(folder.with_name(f".{folder.name}.0a1b2c3d.old"))
    half = folder.with_name(f".{folder.name}.4e5f6a7b.tmp")
    half.mkdir()
    (half / "weights").write_text("new")
    return before


def test_what_was_there_comes_back_on_the_next_look(tmp_path: Path) -> None:
    for reader in (put_back, RunFolder.open):
        run = tmp_path / reader.__name__
        with RunFolder.create(run):
            model_at(run / "adapter")
        inner = killed_between_renames(run / "adapter")
        outer = killed_between_renames(run)
        reader(run)
        assert tree(run / "adapter") == inner
        assert set(outer) - set(tree(run)) == {n for n in outer if "0a1b2c3d" in n or "4e5f" in n}
        assert [path.name for path in tmp_path.glob(".*")] == []
        shutil.rmtree(run)


def test_a_model_comes_back_when_it_is_loaded(dense: Path, tmp_path: Path) -> None:
    saved = qa.save(qa.quantize(str(dense), "none", device="cpu"), tmp_path / "saved")
    before = killed_between_renames(saved)
    qa.load(saved, device="cpu")
    assert tree(saved) == before


def test_a_finished_swap_only_loses_the_earlier_one(tmp_path: Path) -> None:
    folder = model_at(tmp_path / "model", "new")
    old = tmp_path / ".model.0a1b2c3d.old"
    old.mkdir()
    (old / "weights").write_text("earlier")
    put_back(folder)
    assert old.exists()  # reading deletes nothing
    model_at(folder, "newer", overwrite=True)
    assert (folder / "weights").read_text() == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_somebody_is_writing_is_left_alone(tmp_path: Path, elsewhere: Any) -> None:
    folder = model_at(tmp_path / "model")
    killed_between_renames(folder)
    elsewhere(folder)
    before = tree(tmp_path)
    put_back(folder)
    assert tree(tmp_path) == before


def test_hidden_files_of_others_stay(tmp_path: Path) -> None:
    names = (".model.backup.old", ".model.tmp", ".model.lock", ".models.0a1b2c3d.tmp", ".yarn.lock")
    for name in names:
        (tmp_path / name).write_text("mine")
    model_at(tmp_path / "model")
    clear_up(tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"model", *names}
    assert not any(written.is_leftover(name) for name in names if "0a1b2c3d" not in name)


def test_a_run_that_died_before_its_marker_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".quantadapt-run.json.0a1b2c3d.tmp").write_text("{")
    (tmp_path / ".b.0a1b2c3d.tmp").mkdir()
    for name in ("a", "b"):
        RunFolder.check(tmp_path / name, resume=True)
        with RunFolder.create(tmp_path / name, resume=True) as folder:
            assert folder.marker["state"] == "running"
            assert tree(folder.path).keys() == {"quantadapt-run.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


@pytest.fixture
def small_files() -> Iterator[None]:
    """Let no file have more than 1000 bytes, as a disk that fails in the middle of one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def of_torch_2_11(file: Path) -> None:
    try:
        file.write_text("x" * 4000)
    except OSError:
        raise RuntimeError("basic_ios::clear: iostream error") from None


@pytest.mark.usefixtures("small_files")
def test_what_libraries_cannot_write_is_told_in_words(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weight = torch.zeros(1000)
    for name, write in {
        "text": lambda file: file.write_text("x" * 4000),
        "safetensors": lambda file: save_file({"w": weight}, file),
        "pickle": lambda file: torch.save(weight, file),
        "as torch 2.11 says it": of_torch_2_11,
    }.items():
        told = pytest.raises(OutputError, match=f"{name}: cannot write it: .+(.|\n)*fix: ")
        with told, atomic_folder(tmp_path / name) as folder:
            write(folder / "weights")
        with pytest.raises(OutputError, match="cannot write it"), in_words(tmp_path):
            write(tmp_path / "weights")
    with pytest.raises(ValueError, match="mine"), atomic_folder(tmp_path / "other"):
        raise ValueError("mine")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_a_link_to_nowhere_is_something_that_is_there(tmp_path: Path) -> None:
    link = tmp_path / "answers.jsonl"
    link.symlink_to("nowhere")
    with (
        pytest.raises(OutputError, match="the file is there already"),
        lines_file(link, {}, 0, what="answers"),
    ):
        pass
    with pytest.raises(SystemExit) as ended:
        cli.main(["init", "demo", "--output", str(link)])
    assert ended.value.code == 1
    assert os.readlink(link) == "nowhere"


def test_a_disk_without_inodes_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save says only that it failed."""
    found = os.statvfs(tmp_path)
    full = os.statvfs_result((*found[:5], 100, 0, 0, *found[8:]))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    told = r"not enough disk space: (.|\n)*no room for another file"
    with pytest.raises(OutputError, match=told), in_words(tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc:784] . unexpected pos 64 vs 0")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_what_a_library_prints_into_a_full_log_costs_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: Path("/dev/full").open("w+b"))  # noqa: SIM115
    logger = logging.Logger("library")
    quiet = Quiet(lambda *_: None)
    quiet.start()
    try:
        logger.addHandler(logging.StreamHandler())
        for _ in range(2):
            print("a banner", flush=True)
            sys.stderr.write("a bar\n")
            logger.warning("a warning")
    finally:
        quiet.stop()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_that_cannot_be_moved_stays_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    quiet = Quiet(lambda *_: None)
    quiet.start()
    try:
        quiet.write_log("first\n")
        with pytest.raises(OSError, match="No space left"):
            quiet.move_log(Path("/dev/full"))
        quiet.write_log("second\n")
        with monkeypatch.context() as patched:
            patched.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
            assert quiet.kept_log() == ""
        assert Path(quiet.kept_log()).read_text() == "first\nsecond\n"
    finally:
        quiet.stop()


def with_own_base(rank: int) -> Any:
    """Return a model whose adapter has rewritten the base."""
    return qa.attach(qa.quantize(small_model(), "hqq", device="cpu"), "pissa", r=rank)


def test_an_adapter_is_never_put_onto_the_base_of_another(tmp_path: Path) -> None:
    """As a process leaves them that dies between the two renames."""
    run, other = tmp_path / "run", tmp_path / "other"
    qa.save(with_own_base(2), run)
    model = with_own_base(3)
    qa.save(model, other)
    shutil.rmtree(run / "adapter")
    shutil.copytree(other / "adapter", run / "adapter")
    with pytest.raises(ModelError, match=r"base is not the one .*(.|\n)*fix: save both again"):
        qa.load(run, device="cpu")
    shutil.rmtree(run / "base")
    with pytest.raises(ModelError, match="its own base, which was saved with it, is not in"):
        qa.load(run / "adapter", device="cpu")
    qa.load(run, base=qa.quantize(small_model(), "hqq", device="cpu"))  # asked for
    qa.save(model, run, overwrite=True)
    loaded, ids = qa.load(run, device="cpu"), torch.arange(3, 19)[None]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    plain = qa.attach(qa.quantize(small_model(), "hqq", device="cpu"), "lora", r=2)
    qa.save(plain, run, overwrite=True, base=False)
    shutil.rmtree(run / "base", ignore_errors=True)
    shutil.copytree(other / "base", run / "base")  # died before that of the earlier one was removed
    with pytest.raises(ModelError, match="base is not the one"):
        qa.load(run, device="cpu")


def test_an_earlier_pair_stays_until_all_of_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qa.save(with_own_base(2), tmp_path)
    before = tree(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("write_base", "_write"):
        with monkeypatch.context() as patched:
            patched.setattr(saving, name, full)
            with pytest.raises(OutputError, match="not enough disk space"):
                qa.save(with_own_base(3), tmp_path, overwrite=True)
        assert tree(tmp_path) == before
    qa.load(tmp_path, device="cpu")


def test_an_adapter_is_exported_with_its_base_again_and_again(tmp_path: Path) -> None:
    for rank in (2, 3):
        qa.save(with_own_base(rank), tmp_path / str(rank))
    out = tmp_path / "out"
    export = ("export", tmp_path / "2", "adapter", "--output", out)
    assert run_cli(*export) == 0
    shutil.rmtree(out / "adapter")  # killed before it was there
    assert run_cli(*export) == 0
    assert run_cli(*export) == 2
    assert run_cli("export", tmp_path / "3", "adapter", "--output", out, "--overwrite") == 0
    assert tree(out / "base") == tree(tmp_path / "3" / "base")
    qa.load(out, device="cpu")
