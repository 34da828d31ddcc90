"""Stands in for `quantadapt run SPEC --json ...` where a test is about who runs what, and when.

Its loss follows from the spec alone. The adapter's `r` says what goes wrong: 13 an error in words,
66 a kill, 67 and 68 one while a base is made, 77 a crash without words, 99 it works until it is
told to end (once: a resumed run ends). Backend gptq makes a base first, unless it is told of one:
that fails where the group size is 16, and with 32 goes on until it is told to end (likewise). r=14
fails once it is there.
`log.txt` in the run folder tells what was asked of it: [steps done before, steps after].
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

MAKING = {
    "of": json.loads(os.environ["MADE_FROM"]),
    "seconds": 100.0,
    "peak_memory_gib": 5.0,
    "device": "cuda",
}
COST = {"gptq": 4.1, "hqq": 4.0, "none": 14.0, "bnb-nf4": 4.4, "quanto": 7.0}
WORSE = {"gptq": 0.03, "hqq": 0.05, "none": 0.0, "bnb-nf4": 0.01, "quanto": 0.02}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--set", action="append", default=[])
    given = parser.parse_args()
    spec = read(given.spec)
    folder, wrong = Path(spec["output"]), spec["adapter"].get("r")
    folder.mkdir(exist_ok=True)
    begun = (folder / "quantadapt-run.json").exists()
    if begun and not given.resume:
        fail("the folder holds an earlier run")
    mark(folder, "running")
    legs = read_legs(folder)
    done, steps = legs[-1][1] if legs else 0, given.max_steps or spec["train"]["max_steps"]
    if wrong == 13:
        fail("it cannot be done")
    if spec["backend"]["name"] == "gptq":
        base = reused(given.set) or spec.get("reuse_base") or ""
        if wrong in (67, 68) and not base:
            (folder / "plan.json").write_text('{"adopt": false}')
            (folder / "metrics.json").write_text('{"stages": {"plan": 0.1, "evaluate": 0.1}}')
            os.kill(os.getpid(), signal.SIGKILL)
        make_base(folder, spec["backend"].get("group_size", 128), base, given.resume)
    if wrong == 14:
        fail("it cannot be trained")
    if wrong == 66:
        os.kill(os.getpid(), signal.SIGKILL)
    if wrong == 77:
        print("something odd\nlast words", file=sys.stderr)
        os._exit(3)
    if wrong == 99 and not given.resume:
        wait_to_be_told(folder)
    (folder / "log.txt").write_text(
        "".join(json.dumps(leg) + "\n" for leg in [*legs, [done, steps]])
    )
    found = metrics(spec, steps, steps - done)
    if (folder / "base").exists():
        manifest = json.loads((folder / "base" / "quantadapt.json").read_text())
        found["quantize"] = {k: v for k, v in manifest["making"].items() if k != "of"}
    (folder / "metrics.json").write_text(json.dumps(found))
    mark(folder, "finished")


def reused(assignments: list) -> str:
    words = [text.partition("=")[2] for text in assignments if text.startswith("reuse_base=")]
    return json.loads(words[-1]) if words else ""


def make_base(folder: Path, size: int, given: str, resumed: bool) -> None:
    (folder / "plan.json").write_text('{"adopt": false}')
    if (folder / "base").exists():
        return
    half = folder / ".base.01234567.tmp"
    half.mkdir(exist_ok=True)
    (half / "quantadapt.json").write_text("{")
    if size == 16 and not given:
        (folder / "metrics.json").write_text('{"stages": {"plan": 0.1, "evaluate": 0.1}}')
        fail("it does not converge")
    if size == 32 and not given and not resumed:
        wait_to_be_told(folder)
    time.sleep(0 if given else 0.3)
    taken = given
    if given:
        earlier = json.loads((Path(given) / "base" / "quantadapt.json").read_text())["making"]
        taken = earlier["taken_from"] or given
    manifest = {"making": MAKING | {"taken_from": taken}}
    (half / "quantadapt.json").write_text(json.dumps(manifest))
    half.rename(folder / "base")


def read(file: Path) -> dict:
    """Read the YAML that specs are written in. PyYAML would take longer than all the rest."""
    above: list[tuple[int, dict]] = [(-1, {})]
    for line in file.read_text().splitlines():
        key, colon, text = line.strip().partition(":")
        if not colon or key.startswith("-"):
            continue
        indent = len(line) - len(line.lstrip())
        while above[-1][0] >= indent:
            above.pop()
        value = {} if not text else value_of(text.strip())
        above[-1][1][key] = value
        if value == {}:
            above.append((indent, value))
    return above[0][1]


def value_of(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def metrics(spec: dict, steps: int, trained: int) -> dict:
    backend = spec["backend"]["name"]
    rate = spec["train"]["learning_rate"]
    tuned = 1.0 + WORSE[backend] + 10 / steps + 100 * abs(rate - 3e-4) + 0.001 * spec["seed"]
    before = 3.0 + WORSE[backend]
    values = {"quantized": before, "tuned": tuned, "merged": tuned + 0.1 * (before - tuned)}
    if spec["evaluate"]["unquantized"]:
        values["unquantized"] = 3.0
    loss = {"unit": "nats per token", "better": "lower", "values": values}
    perplexity = {k: 2.718281828459045**v for k, v in values.items()}
    first = {"unit": "", "better": "lower", "values": perplexity}
    size = {"quantized_mib": COST[backend], "adapter_mib": 0.5}
    return {
        "evaluations": {"perplexity": {"perplexity": first, "loss": loss}},
        "size": size | ({"dense_mib": 14.0} if "unquantized" in values else {}),
        "train": {"steps": steps, "seconds": 0.01 * trained, "tokens": 100, "peak_memory_gib": 0.7},
        "warnings": [],
    }


def read_legs(folder: Path) -> list:
    file = folder / "log.txt"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def mark(folder: Path, state: str) -> None:
    marker = {"version": "0", "started": "now", "state": state}
    (folder / "quantadapt-run.json").write_text(json.dumps(marker))


def wait_to_be_told(folder: Path) -> None:
    def told(*_: object) -> None:
        (folder / "log.txt").write_text("[0, 7]\n")
        mark(folder, "interrupted")
        os._exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, told)
    line = {"step": 7, "max_steps": 90, "loss": 1.5}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    time.sleep(60)


def fail(what: str) -> None:
    problem = {"what": what, "fix": "leave it out", "where": "adapter", "rule": ""}
    print(json.dumps({"error": {"message": what, "problems": [problem], "exit_code": 1}}))
    sys.exit(1)


if __name__ == "__main__":
    main()
