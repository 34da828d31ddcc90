"""The studio, without and through Gradio: plan, data, runs, report, chat."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from html import unescape
from pathlib import Path

import pytest
from pages import served

from quantadapt import cli
from quantadapt.errors import OutputError, PlanRefused, SpecError
from quantadapt.folders.lock import take
from quantadapt.folders.run_folder import MARKER, RunFolder
from quantadapt.studio.app import studio_page
from quantadapt.studio.desk import Desk
from quantadapt.studio.form import Form
from quantadapt.studio.looking import CARDS, data_html, plan_html
from quantadapt.studio.page import page_app
from quantadapt.studio.running import Runs
from quantadapt.studio.watching import report_html, watch_html

PYTHON = sys.executable
UGLY = '<img src=x onerror=alert(1)><script>alert("2")</script>'


def shown(page: str) -> str:
    """Return the text of a page."""
    return unescape(re.sub(r"<[^>]+>", "\n", page))


@pytest.fixture
def say(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


# Plan ---------------------------------------------------------------------------------------------

FORMS = [
    {},
    {"backend": "torchao-int4", "adapter": "vera", "steps": "7", "learning_rate": "1e-3"},
    {"more": "backend.bits=3\nadapter.r=4\ndata.max_length=64", "name": "mine"},
    {"pasted": '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}'},
    {"model": "ORG/NAME", "data": "some/set"},
    {"objective": "dpo", "more": "objective.beta=0.3"},
]


@pytest.mark.parametrize("fields", FORMS)
def test_the_command_that_is_shown_says_what_is_planned(fields, tmp_path, say) -> None:
    form = Form(tmp_path / "runs", **fields)
    form.keep_pasted()
    code, out, _ = say("plan", *form.arguments()[1:], "--json")
    assert code == 0
    assert form.plan().spec.model_dump(mode="json") == json.loads(out)["spec"]


def test_the_plan_has_the_words_of_the_command(tmp_path, say) -> None:
    form = Form(tmp_path / "runs", backend="hqq", adapter="dora", more="export.merge=requantize")
    page = shown(plan_html(form, [0.1, 24.0]))
    code, out, _ = say("plan", *form.arguments()[1:])
    assert code == 0
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if line[:1].isalpha())
    assert {"model", "backend", "adapter", "memory", "output", "export"} <= rows.keys()
    for words in rows.values():
        assert words.strip() in page
    code, out, _ = say("plan", *form.arguments()[1:], "--card", "0.1", "--card", "24")
    assert code == 0
    fits = re.findall(r"fits .*\S", out)
    assert len(fits) == 2
    for words in fits:
        assert words in page


def test_all_that_is_wrong_is_told_at_once_and_nothing_starts(tmp_path) -> None:
    form = Form(
        tmp_path / "runs",
        name=f"../{UGLY}",
        model=f"/nowhere/{UGLY}",
        backend="hqq",
        data="/no/such.jsonl",
        steps="many",
        more="adapter.rank=3\nbackend.bits=77",
    )
    page = plan_html(form, [])
    words = shown(page)
    for told in ("name", "train.max_steps", "adapter.rank", "backend.bits", "/no/such.jsonl"):
        assert told in words
    assert "/nowhere/" in words
    assert "<img" not in page
    assert "<script" not in page
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["a/b", "..", ".", ".hidden", "pasted", "/tmp"])
def test_no_name_leads_elsewhere(name, tmp_path) -> None:
    with pytest.raises(SpecError, match="is no name for a run"):
        Form(tmp_path, name=name).plan()
    runs = Runs(tmp_path / "runs")
    RunFolder.create(tmp_path / "other").release()
    (tmp_path / "runs").mkdir()
    assert runs.folder("../other") is None
    assert runs.folder(name) is None


def test_a_taken_name_gets_a_number(tmp_path) -> None:
    assert Form(tmp_path).folder == tmp_path / "hqq-lora"
    RunFolder.create(tmp_path / "hqq-lora").release()
    assert Form(tmp_path).folder == tmp_path / "hqq-lora-2"
    with pytest.raises(PlanRefused, match="the folder holds an earlier run"):
        Form(tmp_path, name="hqq-lora").plan()


def test_every_card_is_told(tmp_path) -> None:
    page = shown(plan_html(Form(tmp_path), list(CARDS.values())))
    assert page.count(" GiB: yes, with") == len(CARDS)


# Data ---------------------------------------------------------------------------------------------


def test_what_is_learnt_is_coloured(tmp_path, tokenizer) -> None:
    rows = [
        {"prompt": "<b>", "completion": UGLY * 3},
        {"prompt": "p", "completion": "c"},
    ]
    form = Form(tmp_path, pasted="\n".join(map(json.dumps, rows)), more="data.max_length=32")
    page = data_html(form)
    assert not [tag for tag in ("<img", "<b>", "<script") if tag in page]
    spans = re.findall(r'<span class="(learnt|given)">(.*?)</span>', page, re.DOTALL)
    pieces = [(kind, unescape(text)) for kind, text in spans]
    ids = tokenizer(rows[1]["completion"], add_special_tokens=False)["input_ids"]
    assert pieces[2:4] == [
        ("given", f"{tokenizer.bos_token}p"),
        ("learnt", tokenizer.decode([*ids, tokenizer.eos_token_id])),
    ]
    assert "are cut" in shown(page)


def test_data_that_cannot_be_read_are_told(tmp_path) -> None:
    for form in (
        Form(tmp_path, pasted='{"prompt": "a"'),
        Form(tmp_path, pasted='{"question": "a", "label": 1}'),
        Form(tmp_path, data=str(tmp_path / "none.jsonl")),
        Form(tmp_path, more="data.max_length=2"),
    ):
        page = shown(data_html(form))
        assert "The data cannot be read" in page
        assert "Way out" in page


# Runs ---------------------------------------------------------------------------------------------

FAKE = """\
import json, os, signal, sys, time
from pathlib import Path
folder = Path(next(a for a in sys.argv if a.startswith("--output="))[9:])
if "early" in str(folder):
    print("training was refused: <u>no</u>"); sys.exit(2)
folder.mkdir(parents=True, exist_ok=True)
def state(name):
    text = {"version": "0", "started": "2026-01-01T00:00:00", "state": name}
    (folder / "quantadapt-run.json").write_text(json.dumps(text))
def ended(*_):
    if "deaf" in str(folder):
        return
    state("interrupted"); sys.exit(143)
signal.signal(signal.SIGTERM, ended)
state("running")
lines = [{"step": s, "max_steps": 8, "loss": 4 / s, "tokens": 50 * s, "seconds": s / 2.0}
         for s in (1, 2, 4)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
print("<i>training</i>", "token" if os.environ.get("QUANTADAPT_TOKEN") else "none", flush=True)
if "done" in str(folder):
    state("finished"); sys.exit(0)
while True:
    time.sleep(0.05)
"""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs whose processes only pretend to train."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr("quantadapt.studio.running.sys.executable", str(python))
    monkeypatch.setenv("QUANTADAPT_TOKEN", "hush")
    made = Runs(tmp_path / "runs")
    yield made
    if made.running:
        os.killpg(made.running[1], signal.SIGKILL)


def wait(until) -> None:
    while not until():
        time.sleep(0.02)


def started(runs: Runs, name: str) -> RunFolder:
    folder = runs.root / name
    runs.start(["run", f"--output={folder}"], folder)
    wait(lambda: "training" in runs.printed(RunFolder(folder)))
    return RunFolder(folder)


def test_a_run_is_watched_and_stopped(runs) -> None:
    folder = started(runs, "one")
    assert runs.names() == ["one"]
    assert runs.state(folder).kind == "running"
    page = watch_html(runs, folder)
    words = shown(page)
    for told in ("running", "4 of 8", "100", "tokens per second", "<i>training</i> none"):
        assert told in words
    assert '<div style="width: 50.0%">' in page
    assert "<i>" not in page
    assert page.count("<svg") == 2
    with pytest.raises(OutputError, match="the run 'one' goes on"):
        runs.start(["run", "--output=x"], Path("x"))
    runs.stop(folder)
    wait(lambda: not runs.running)
    assert runs.state(folder).kind == "interrupted"
    assert runs.state(started(runs, "done")).kind in ("running", "finished")
    wait(lambda: not runs.running)
    assert runs.state(RunFolder(runs.root / "done")).kind == "finished"


def test_one_that_does_not_listen_is_killed_at_the_second_time(runs) -> None:
    folder = started(runs, "deaf")
    runs.stop(folder)
    assert runs.is_told_to_stop(folder)
    time.sleep(0.2)
    assert runs.running
    runs.stop(folder)
    wait(lambda: not runs.running)
    state = runs.state(folder)
    assert (state.kind, state.words) == ("ended", "killed")
    assert "Go on" in watch_html(runs, folder)


def test_one_that_ends_before_it_has_a_folder_is_told(runs) -> None:
    folder = started(runs, "early")
    wait(lambda: not runs.running)
    assert runs.names() == ["early"]
    assert runs.state(folder).kind == "failed"
    page = watch_html(runs, folder)
    assert "it ended before it had a folder" in shown(page).lower()
    assert "training was refused: <u>no</u>" in shown(page)
    assert "<u>" not in page


def test_the_runs_of_others_are_shown_and_not_touched(runs) -> None:
    other = RunFolder.create(runs.root / "theirs")
    code = "import sys, time; from pathlib import Path; from quantadapt.folders.lock import take\n"
    code += "lock = take(Path(sys.argv[1])); print('locked', flush=True); time.sleep(600)"
    other.release()
    command = [PYTHON, "-c", code, str(other.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"locked\n"
            state = runs.state(other)
            assert state.kind == "elsewhere"
            assert f"process {process.pid} on" in state.more
            assert "not touched" in watch_html(runs, other)
            runs.stop(other)
            runs.stop(other)
            assert process.poll() is None
        finally:
            process.kill()
    assert runs.state(other).kind == "ended"
    take(other.path).release()  # looking has left no lock


def test_a_report_may_do_nothing(tmp_path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.release()
    assert "when the run has ended" in report_html(folder)
    folder.write_text("report.html", f'<p title="it">{UGLY}</p>')
    page = report_html(folder)
    frame = re.search(r'<iframe srcdoc="([^"]*)" sandbox="" title="[^"]*"></iframe>', page)
    assert frame is not None
    assert unescape(frame[1]) == f'<p title="it">{UGLY}</p>'
    assert page.count("<iframe") == 1
    assert "<script" not in page
    (tmp_path / "secret").write_text("secret words")
    (folder.path / "report.html").unlink()
    (folder.path / "report.html").symlink_to(tmp_path / "secret")
    assert "secret" not in report_html(folder)


def test_folders_with_rubbish_are_shown_all_the_same(tmp_path) -> None:
    runs = Runs(tmp_path)
    for name, text in (("list", "[]"), ("cut", '{"plan"'), ("nul", "\0")):
        folder = RunFolder.create(tmp_path / name)
        folder.release()
        folder.set_state("finished")
        for file in ("plan.json", "metrics.json", "metrics.jsonl", "report.html"):
            (folder.path / file).write_text(text)
    (tmp_path / "none").mkdir()
    ugly = RunFolder.create(tmp_path / "<b>x")
    ugly.release()
    ugly.set_state("failed")
    assert set(runs.names()) == {"list", "cut", "nul", "<b>x"}
    for name in runs.names():
        found = runs.folder(name)
        page = watch_html(runs, found) + report_html(found)
        assert "<b>" not in page
        assert found is not None
        assert found.marker["state"] in page
    (tmp_path / "list" / MARKER).write_text('{"version": 1, "state": {"a": []}, "started": 5}')
    assert watch_html(runs, RunFolder(tmp_path / "list"))


# The page -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    root = tmp_path_factory.mktemp("studio") / "runs"
    with served(page_app(studio_page(Desk(root)))) as found:
        yield found, root


def fields(**given):
    names = ("name", "model", "backend", "adapter", "objective", "data", "pasted")
    names += ("steps", "rate", "more")
    values = {"backend": "hqq", "adapter": "lora", "objective": "sft", **given}
    return [*(values.get(name, "") for name in names), 1]


def test_the_page_plans_looks_and_refuses(address, tmp_path) -> None:
    from gradio_client import Client

    url, root = address
    client = Client(url, verbose=False, download_files=str(tmp_path))
    plan = client.predict(*fields(adapter="dora"), ["24 GiB (RTX 3090, RTX 4090, A10)"],
                          api_name="/plan")  # fmt: skip
    assert "This can be run." in plan
    assert "fits 24 GiB: yes" in shown(plan)
    pasted = f'{{"prompt": "{"p" * 3}", "completion": "{UGLY.replace(chr(34), "")}"}}\n' * 2
    seen = client.predict(*fields(pasted=pasted), api_name="/look")
    assert 'class="learnt"' in seen
    assert "<img" not in seen
    refused = client.predict(*fields(steps="none", model="/no/where"), api_name="/start")[0]
    assert "Nothing was started" in refused
    assert "train.max_steps" in refused
    assert "/no/where" in refused
    assert [path.name for path in root.iterdir()] == ["pasted"]
    for name in ("watch", "stop_run", "resume", "open"):
        with pytest.raises(Exception, match="not in the list of choices"):
            client.predict("../../etc", api_name=f"/{name}")
    assert "no run with an adapter is chosen" in client.predict(None, api_name="/open")[0]


def test_six_who_start_at_once_start_one(runs) -> None:
    begun: list[str] = []

    def start(name: str) -> None:
        try:
            runs.start(["run", f"--output={runs.root / name}"], runs.root / name)
            begun.append(name)
        except OutputError:
            pass

    threads = [threading.Thread(target=start, args=(f"r{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(begun) == 1


def test_the_command_refuses(say, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("QUANTADAPT_TOKEN", raising=False)
    code, _, err = say("studio", "--host", "0.0.0.0")
    assert code == 2
    assert "QUANTADAPT_TOKEN" in err
    (tmp_path / "file").write_text("")
    code, _, err = say("studio", str(tmp_path / "file"))
    assert code == 2
    assert "it is no folder" in err
