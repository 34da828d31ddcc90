"""Pushing to the hub: a real server here plays its API, and what arrives there is looked at."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from merging import HELD_OUT

import quantadapt as qa
from quantadapt import demo
from quantadapt.errors import PlanRefused
from quantadapt.exporting.card import card, escaped, license_of, public_name
from quantadapt.exporting.stage import write
from quantadapt.exporting.tuned import Tuned
from quantadapt.planning.exports import export_of
from quantadapt.testing.small_demo import small_model

TOKEN = "hf_verysecret"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload takes; `server.files` is what arrived."""

    server: Any

    def log_message(self, *_: Any) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, values: Any, status: int = 200) -> None:
        data = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        data, path = self.body(), self.path.split("?")[0]
        self.server.asked.append((path, self.headers.get("authorization")))
        if self.headers.get("authorization") != f"Bearer {TOKEN}" or self.server.closed:
            return self.answer({"error": f"no entry for {TOKEN}"}, 403)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            self.server.created = json.loads(data)
            return self.answer({"url": f"{self.server.url}/me/it", "id": "me/it"})
        if path.endswith("/preupload/main"):
            files = json.loads(data)["files"]
            mode = {True: "lfs", False: "regular"}
            found = [
                {
                    "path": f["path"],
                    "uploadMode": mode[f["path"].endswith("safetensors")],
                    "shouldIgnore": False,
                    "oid": None,
                }
                for f in files
            ]
            return self.answer({"files": found, "commitOid": "0" * 40})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    **{"oid": o["oid"], "size": o["size"], "authenticated": True},
                    "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}},
                }
                for o in json.loads(data)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if path.endswith("/commit/main"):
            for line in data.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.lfs[value["oid"]]
            url = f"{self.server.url}/me/it/commit/{'1' * 40}"
            return self.answer({"commitUrl": url, "commitOid": "1" * 40, "success": True})
        return self.answer({"error": f"what is {path}"}, 404)

    def do_PUT(self) -> None:
        data = self.body()
        self.server.lfs[hashlib.sha256(data).hexdigest()] = data
        self.answer({})

    def do_GET(self) -> None:
        self.answer({"id": "me/it", "sha": "0" * 40, "siblings": [], "private": True})


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.files, server.lfs, server.asked, server.created = {}, {}, [], None
    server.closed = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def export(run: Path, *options: str, url: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own: what the hub's library is told, it reads once."""
    values = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    values |= {"HF_ENDPOINT": url} if url else {}
    sets = [part for option in options for part in ("--set", option)]
    command = [sys.executable, "-m", "quantadapt", "export", str(run), "hub", *sets, "--overwrite"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=values)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with figures."""
    folder = tmp_path_factory.mktemp("hub") / "run"
    spec = qa.Spec(
        model=str(small_model()),
        output=str(folder),
        train={"max_steps": 2, "per_device_train_batch_size": 1},
        data={"max_examples": 8, "max_length": 128},
        evaluate={"max_examples": 2, "samples": 0, "unquantized": False},
        export={"merge": "never"},
        device="cpu",
    )
    qa.run(spec, verbose=False)
    return folder


def front_of(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, flags=re.S)[1])
    return found


def test_the_adapter_of_a_run_has_a_card(run) -> None:
    text = (run / "adapter" / "README.md").read_text()
    assert front_of(text)["library_name"] == "peft"
    assert front_of(text)["tags"] == ["quantadapt", "hqq", "lora"]
    metrics = json.loads((run / "metrics.json").read_text())
    values = metrics["evaluations"]["perplexity"]["perplexity"]["values"]
    change = (values["tuned"] - values["quantized"]) / values["quantized"]
    row = next(line for line in text.splitlines() if line.startswith("| perplexity |"))
    assert f"{values['quantized']:.4g}" in row
    assert escaped(f"{change:+.1%}") in row
    assert str(small_model()) not in text
    assert str(run) not in text
    # what is listed as ours is what is there: the run can be replaced, and resumed
    from quantadapt.folders.written import not_ours

    assert not_ours(run / "adapter") == []


def test_a_push_arrives_whole_and_names_no_path_of_this_machine(run, hub) -> None:
    done = export(run, "repo=me/it", "base=some/base", url=hub.url)
    assert done.returncode == 0, done.stderr
    assert "pushed to me/it" in done.stdout
    assert hub.created["name"] == "it"
    assert hub.created.get("private") or hub.created.get("visibility") == "private"
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert hub.files["adapter_model.safetensors"] == adapter
    assert "quantadapt-files.json" not in hub.files
    said = json.loads(hub.files["adapter_config.json"])
    assert said["base_model_name_or_path"] == "some/base"
    assert json.loads(hub.files["quantadapt.json"])["base"] == "some/base"
    text = hub.files["README.md"].decode()
    assert front_of(text)["base_model"] == "some/base"
    assert front_of(text)["base_model_relation"] == "adapter"
    assert 'snapshot_download("me/it")' in text
    everything = b"".join(hub.files.values()).decode("utf-8", "replace")
    for private in (str(small_model()), str(run), str(Path.home()) + "/", TOKEN):
        assert private not in everything
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.slow
def test_what_was_pushed_is_loaded_again(run, hub, tmp_path) -> None:
    assert export(run, "repo=me/it", "content=merged", url=hub.url).returncode == 0
    for name, data in hub.files.items():
        (tmp_path / name).write_bytes(data)
    assert front_of((tmp_path / "README.md").read_text())["library_name"] == "transformers"
    assert "KL to the adapter" not in (tmp_path / "README.md").read_text()
    assert "| kl |" in (tmp_path / "README.md").read_text()
    assert qa.load(tmp_path, device="cpu")


@pytest.mark.slow
def test_a_push_that_fails_is_told_without_the_token(run, hub) -> None:
    hub.closed = True
    done = export(run, "repo=me/it", "base=some/base", url=hub.url)
    assert done.returncode == 1
    assert "pushing failed" in done.stderr
    assert "403" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    if log := re.search(r"Details are in (\S+)", done.stderr):
        assert TOKEN not in Path(log[1]).read_text()
    nobody = export(run, "repo=me/it", "base=some/base", url="http://127.0.0.1:9")
    assert nobody.returncode == 1
    assert "pushing failed" in nobody.stderr


@pytest.mark.slow
def test_a_dry_run_writes_the_folder_and_asks_nobody(run, hub, tmp_path) -> None:
    done = export(run, "repo=me/it", "base=some/base", "dry_run=true", url=hub.url)
    assert done.returncode == 0
    assert not hub.asked
    assert (run / "hub" / "README.md").exists()


def test_a_plan_refuses_what_cannot_be_pushed(monkeypatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)

    def plan(**options: Any) -> Any:
        spec = {"merge": "never", "formats": [{"name": "hub", **options}]}
        return qa.plan(qa.Spec(model=str(small_model()), export=spec), check_output=False)

    with pytest.raises(PlanRefused, match="HF_HUB_OFFLINE is set") as told:
        plan(repo="me/it")
    assert "which nobody else has" in str(told.value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(PlanRefused, match="nobody is logged in to the hub"):
        plan(repo="me/it", base="some/base")
    for repo in ("it", "me/../it", "a/b/c", "me/it--x"):
        with pytest.raises(PlanRefused, match="repo"):
            plan(repo=repo, base="some/base", dry_run=True)
    assert plan(repo="me/it", base="some/base", dry_run=True)


def test_a_card_escapes_what_comes_from_elsewhere(tmp_path) -> None:
    manifest = {
        **{"base": str(tmp_path / "secret" / "base<b>"), "backend": "hqq", "options": {"bits": 4}},
        **{"dtype": "float32", "adapter": "lora", "adapter_options": {"target_modules": ["a|b"]}},
    }
    bad = "x](javascript:1) <script>|`a` **b**\n# head"
    figures = {bad: {"unit": bad, "better": "lower", "values": {"quantized": 2.0, "tuned": 1.0}}}
    metrics = {
        "evaluations": {bad: figures},
        "data": {"files": [{"file": "/home/me/<img>.jsonl", "rows": 1}]},
        "warnings": [bad],
    }
    text = card(manifest, metrics=metrics, title="a<b>/c")
    assert "<script>" not in text
    assert "<img>" not in text
    assert "\n# head" not in text
    assert str(tmp_path) not in text
    assert "/home/me" not in text
    assert "-50" in text
    lines = [line for line in text.splitlines() if line.startswith("| x")]
    assert re.sub(r"\\\|", "", lines[0]).count("|") == 6  # figure, two models, change, better
    front = front_of(text)
    assert front["library_name"] == "peft"
    assert "base_model" not in front


def test_names_and_licenses(tmp_path) -> None:
    assert public_name("owner/name") == "owner/name"
    assert public_name(str(tmp_path / "it")) == "it"
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# It\n")
    assert license_of(str(tmp_path)) == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: [a, <b>]\n---\n")
    assert license_of(str(tmp_path)) == ""
    for name in ("gone/model dir", "models/org--name", "other|<b>base</b> $x"):
        assert license_of(name) == ""  # no ids of the hub, and no reason to fail


def test_a_card_that_fails_costs_no_adapter(tmp_path, monkeypatch) -> None:
    from quantadapt.exporting import saving

    def broken(*_, **__):
        raise ValueError("no such word")

    model = qa.attach(qa.quantize(str(demo.MODEL_DIR), "none", device="cpu"), r=2)
    monkeypatch.setattr(saving, "write_card", broken)
    with pytest.warns(saving.NoCardWarning, match="no model card: ValueError: no such word"):
        saved = qa.save(model, tmp_path / "out")
    assert qa.load(saved, device="cpu").active_adapters == ["default"]


@pytest.mark.parametrize(("backend", "stock"), [("hqq", False), ("bnb-nf4", True)])
def test_a_card_says_who_reads_what_was_quantized_again(backend, stock, tmp_path) -> None:
    """transformers makes random layers of hqq's files, and says so in a table alone."""
    model = qa.attach(qa.quantize(str(small_model()), backend, device="cpu"), "lora", r=2)
    exporter = export_of("hub", {"repo": "me/it", "content": "requantized", "dry_run": True})
    write(exporter.exporter, Tuned(model, data=lambda _: HELD_OUT), tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "quantadapt.load(" in text
    assert ("AutoModelForCausalLM" in text) == stock
    assert ("is not known to read checkpoints of hqq" in text) != stock
