"""The page: complete, escaped, self-contained, and whole whatever the folder lacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from quantadapt.folders.metrics import Metrics
from quantadapt.folders.run_folder import RunFolder
from quantadapt.memory import size_words
from quantadapt.reporting.charts import Bar, Curve, bar_chart, line_drawings, smoothed, thinned
from quantadapt.reporting.html import Html, el
from quantadapt.reporting.page import render, write_report
from quantadapt.reporting.run import Run
from quantadapt.reporting.svg import nice_ticks
from quantadapt.reporting.words import duration, headline, mebibytes, percent, short

PLAN = {
    "backend": {"name": "hqq", "options": {"bits": 4, "group_size": 64}},
    "adapter": {"name": "lora", "options": {"r": 16}},
    "device": "cpu",
    "adopt": False,
    "merge": "dense",
    "notes": ["The head is left dense."],
    "target_modules": ["q_proj", "v_proj"],
}
METRICS: Metrics = {
    "evaluations": {
        "perplexity": {
            "perplexity": {
                "unit": "",
                "better": "lower",
                "values": {"unquantized": 38.6, "quantized": 41.2, "tuned": 3.1, "merged": 3.13},
            },
            "loss": {"unit": "nats per token", "better": "lower", "values": {"tuned": 1.131}},
        },
        "exact": {
            "exact": {
                "unit": "share",
                "better": "higher",
                "values": {"quantized": 0.0, "tuned": 0.417},
            }
        },
    },
    "failed_evaluations": {"tasks": "it failed with OSError: no network, on the tuned model"},
    "stages": {"plan": 0.4, "quantize": 3.2, "train": 48.1},
    "train": {
        "steps": 100,
        "seconds": 48.1,
        "tokens": 1_230_000,
        "peak_memory_gib": 1.43,
        "dequantize_share": 0.062,
        "rounding_share": 0.173,
        "trainable_parameters": 8_798_208,
        "base_parameters": 494_032_768,
        "resumed_from": 50,
        "memory": {
            "recomputed_layers": 20,
            "offload": True,
            "micro_batch": 2,
            "layers": 32,
            "batch": 4,
            "longest": 2048,
            "predicted_gib": 1.52,
        },
    },
    "size": {"dense_mib": 988.1, "quantized_mib": 312.4, "adapter_mib": 33.6},
    "exports": {
        "adapter": {
            "state": "written",
            "folder": "adapter",
            "words": "written to adapter/",
            "figures": {"size": {"value": 33.6, "unit": "MiB", "better": "lower"}},
            "refusals": [],
        },
        "merged-dense": {
            "state": "written",
            "folder": "merged",
            "words": "written to merged/",
            "figures": {
                "kl": {"value": 0.0021, "unit": "nats per token", "better": "lower"},
                "top1": {"value": 0.991, "unit": "share", "better": "higher"},
                "gain_kept": {"value": 0.998, "unit": "share", "better": "higher"},
            },
            "refusals": [],
        },
    },
    "samples": [{"prompt": "Ask", "reference": "Right", "before": "Wrong", "after": "Better"}],
    "command": "quantadapt run --backend hqq",
}
LOG = [{"step": step, "loss": 4.0 - step / 50} for step in range(5, 105, 5)]
EVIL = "<script>alert('x')</script>&\"\x00\x1b[31m"


def run(**parts: Any) -> Run:
    values: dict[str, Any] = {
        "marker": {"version": "0.1", "state": "finished", "started": "2026-01-02T03:04:05+00:00"},
        "plan": PLAN,
        "metrics": METRICS,
        "log": LOG,
        "environment": {"python": "3.12.1", "gpu": None, "versions": {"torch": "2.9", "trl": None}},
        "spec": "seed: 0\n",
    }
    return Run(**{**values, **parts})


class Page(HTMLParser):
    """Reads a page, insisting that every element is closed in order and every id is unique."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts).replace("\N{NO-BREAK SPACE}", " ")

    @property
    def headings(self) -> list[str]:
        return [str(attributes["id"]) for tag, attributes in self.tags if tag == "h2"]


def test_everything_is_on_the_page() -> None:
    page = Page(render(run()))
    for words in (
        "perplexity 41.2 → 3.10 in 48 s",
        "13.3 times lower",
        "312 MiB instead of 988 MiB",
        "The scale is logarithmic.",
        "On held-out data; lower is better.",
        "loss, nats per token",
        "1.13",
        "On held-out data; higher is better.",
        "41.7%",
        "no network",
        "8.80 million",
        "1.43 GiB",
        "1.52 GiB",
        "6.2%",
        "17.3%",
        "20 of 32 layers recomputed, their inputs in CPU memory, micro-batches of 2.",
        "resumed",
        "52 s in all",
        "99.8%",
        "99.1%",
        "0.0021",
        "Wrong",
        "Better",
        "Right",
        "group_size=64",
        "q_proj",
        "The head is left dense.",
        "seed: 0",
        "not installed",
        "quantadapt run --backend hqq",
    ):
        assert words in page.text, words
    assert page.headings == [
        "evaluation-1",
        "evaluation-2",
        "not-measured",
        "samples",
        "training-loss",
        "exports",
        "memory",
        "time-per-stage",
        "run-it-again",
        "plan",
        "spec",
        "environment",
    ]


def test_page_is_self_contained() -> None:
    text = render(run())
    page = Page(text)
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "default-src 'none'" in str(page.tags)
    outside = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href")]
    assert all(str(value).startswith("data:") for value in outside)
    assert "@import" not in text
    assert "url(" not in text


def test_charts_are_named_and_described() -> None:
    page = Page(render(run()))
    ids = {attributes.get("id") for _, attributes in page.tags}
    charts = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(charts) == 10  # five charts, each for wide and for narrow screens
    for chart in charts:
        assert chart["role"] == "img"
        assert set(str(chart["aria-labelledby"]).split()) <= ids
    assert "quantized: 41.2; quantized + adapter: 3.10" in page.text


def evil(value: Any) -> Any:
    """The same structure with markup in every key and every text."""
    if isinstance(value, Mapping):
        return {key: evil(item) for key, item in value.items()} | {EVIL: EVIL}
    if isinstance(value, list):
        return [evil(item) for item in value]
    return EVIL if isinstance(value, str) else value


def test_everything_is_escaped() -> None:
    refusal = {"what": "w", "fix": "f", "rule": "r", "where": "h"}
    refused = {"words": "w", "figures": {"f": {"value": 1.0, "unit": "u"}}, "refusals": [refusal]}
    hostile = run(
        marker=evil({"state": "finished", "version": "1", "started": "now"}),
        plan=evil(PLAN),
        metrics={
            **evil(METRICS),
            "stages": {EVIL: 1.0},
            "exports": {EVIL: evil(refused)},
        },
        environment=evil({"python": "3", "versions": {"torch": "2"}}),
        spec=EVIL,
    )
    text = render(hostile)
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script" not in text
    assert "\x00" not in text
    assert "\x1b" not in text
    assert page.text.count("alert('x')") > 20


def test_a_refused_export_says_why_and_the_way_out() -> None:
    refusal = {
        "what": "Codes stay.",
        "fix": "keep it beside",
        "rule": "aqlm",
        "where": "aqlm x oft",
    }
    export = {"state": "refused", "words": "no merged model", "refusals": [refusal]}
    shown = ("no merged model", "Codes stay.", "keep it beside", "rule aqlm", "aqlm x oft")
    text = Page(render(run(metrics={"exports": {"merged-dense": export}}))).text
    for words in ("merged-dense", *shown):
        assert words in text
    planned = [{"name": "adapter", "refusals": []}, {"name": "merged-dense", **export}]
    text = Page(render(run(metrics={}, plan={"exports": planned}))).text
    for words in ("merged-dense", *shown):
        assert words in text
    assert "adapter: " not in text


def test_a_figure_that_no_page_knows_is_shown() -> None:
    figures = {"shards_written": {"value": 12, "unit": "files", "better": ""}, "odd": {"value": 1}}
    found = {"gguf": {"state": "written", "words": "written to gguf/", "figures": figures}}
    page = render(run(metrics={"exports": found}))
    assert "<dt>shards written</dt><dd>12 files</dd>" in page
    assert "<dt>odd</dt><dd>1</dd>" in page
    assert "Way out" not in page


def test_figures_of_an_export_are_shown_once() -> None:
    """Where its words tell them, they are not listed beside."""
    figures = {"size": {"value": 33.6, "unit": "MiB"}, "tensors": {"value": 15, "unit": ""}}
    words = "written to tiny2/, size 33.6 MiB, tensors 15"
    found = {"tiny": {"state": "written", "folder": "tiny2", "words": words, "figures": figures}}
    text = Page(render(run(metrics={"exports": found}))).text
    assert words in text
    assert text.count("33.6") == text.count("tensors") == 1
    found["tiny"]["words"] = "written to tiny2/"
    text = Page(render(run(metrics={"exports": found}))).text
    assert text.count("33.6") == text.count("tensors") == 1
    assert "15.0" not in text


def test_counts_of_an_evaluation_are_whole() -> None:
    values = {"quantized": 2345, "tuned": 2345}
    first = {"unit": "", "better": "lower", "values": {"quantized": 3.5, "tuned": 2.5}}
    table = {"perplexity": first, "tokens": {"unit": "", "better": "", "values": values}}
    text = Page(render(run(metrics={"evaluations": {"perplexity": table}}))).text
    assert text.count("2,345") == 2


@pytest.mark.parametrize("missing", list(METRICS))
def test_missing_parts_are_left_out(missing: str) -> None:
    metrics = {key: value for key, value in METRICS.items() if key != missing}
    whole, page = Page(render(run())), Page(render(run(metrics=metrics)))
    assert set(page.headings) <= set(whole.headings)
    gone = {"evaluations": "evaluation-1 evaluation-2", "failed_evaluations": "not-measured"}
    gone |= {"stages": "time-per-stage", "exports": "exports"}
    gone |= {"samples": "samples", "command": "run-it-again"}
    if missing in gone:
        assert set(whole.headings) - set(page.headings) == set(gone[missing].split())


def paths(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from paths(item, (*path, key))


def replaced(value: Any, path: tuple[str, ...], new: object) -> Any:
    if not path:
        return new
    return {**value, path[0]: replaced(value[path[0]], path[1:], new)}


JUNK: list[object] = [None, {}, [], "text", [None, 3], 0, -1.0, 1e300, 1e-300, float("nan"), True]


PATHS = [path for path in paths(METRICS) if path]


@pytest.mark.parametrize("junk", JUNK, ids=repr)
def test_no_value_breaks_the_page(junk: object) -> None:
    """Each kind in places all over the metrics."""
    for path in PATHS[JUNK.index(junk) :: len(JUNK)]:
        Page(render(run(metrics=replaced(METRICS, path, junk), log=LOG[:2])))


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_no_value_breaks_the_page_anywhere(path: tuple[str, ...]) -> None:
    for junk in JUNK:
        Page(render(run(metrics=replaced(METRICS, path, junk), log=LOG[:2])))


@pytest.mark.parametrize("path", [path for path in paths(PLAN) if path], ids=".".join)
def test_no_plan_breaks_the_page(path: tuple[str, ...]) -> None:
    for junk in JUNK:
        Page(render(run(plan=replaced(PLAN, path, junk), log=LOG[:2])))


@pytest.mark.parametrize(
    "log",
    [
        [],
        LOG[:1],
        [{"step": 5, "loss": None}] * 3,
        [{"step": 5, "loss": 1.0}] * 3,
        [{"step": s, "loss": 10.0**s} for s in range(-9, 9)],
        [{"step": s, "loss": 1.0} for s in range(5000)],
        [{"loss": 1.0}, {"step": "x", "loss": "y"}, {"eval_loss": 2.0}],
    ],
    ids=["none", "one", "nan", "one step", "steep", "long", "odd"],
)
def test_no_log_breaks_the_page(log: list[dict[str, Any]]) -> None:
    text = render(run(log=log))
    Page(text)
    assert len(text) < 200_000


def test_bare_folder(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    path = write_report(folder)
    assert path == folder.path / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.headings == []
    assert "quantadapt run" in page.text


def test_made_from_the_files_alone_and_twice_the_same(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.write_json("plan.json", PLAN)
    folder.write_json("metrics.json", METRICS)
    folder.write_text("spec.yaml", "seed: 0\n")
    folder.write_environment(["pytest"])
    for line in LOG:
        folder.append_metric(line)
    first = write_report(folder).read_bytes()
    (folder.path / "report.html").unlink()
    assert write_report(RunFolder.open(folder.path)).read_bytes() == first
    assert len(Page(first.decode()).headings) == 12


def test_headline() -> None:
    assert (
        headline(run()) == "hqq 4-bit \N{MULTIPLICATION SIGN} lora: perplexity 41.2 → 3.10 in 48 s"
    )
    failed = run(metrics={}, marker={"state": "failed"})
    assert headline(failed) == "hqq 4-bit \N{MULTIPLICATION SIGN} lora: failed"
    assert headline(run(plan={}, metrics={})) == "quantadapt run"


def measured(unit: str, **values: float) -> dict[str, Any]:
    return {"evaluations": {"some": {"thing": {"unit": unit, "better": "", "values": values}}}}


@pytest.mark.parametrize(
    ("before", "after", "unit", "sentence"),
    [
        (10.0, 4.0, "", "model's some thing 2.50 times lower"),
        (4.0, 10.0, "s", "2.50 times higher"),
        (10.0, 9.0, "", "lowered the quantized model's some thing by 10.0%"),
        (10.0, 12.0, "", "raised"),
        (10.0, 10.01, "", "as it was"),
        (0.0, 41.66, "", "from 0 to 41.7."),
        (20.0, 60.0, "%", "from 20.0 to 60.0%."),
        (0.2, 0.6, "share", "from 20.0% to 60.0%."),
        (-2.5, 1.5, "nats", "from -2.50 to 1.50 nats."),
        (0.0, 0.0, "", "as it was"),
    ],
)
def test_what_training_changed_is_told(
    before: float, after: float, unit: str, sentence: str
) -> None:
    text = Page(render(run(metrics=measured(unit, quantized=before, tuned=after)))).text
    assert sentence in text
    assert "logarithmic" not in text


def test_bars_of_negative_numbers_end_where_the_others_begin() -> None:
    chart = bar_chart("margin", [Bar("a", -2.0, "-2", "before"), Bar("b", 2.0, "2", "after")])
    bars = [a["d"] for tag, a in Page(chart).tags if tag == "path"]
    (x0, width0), (x1, width1) = ([float(n) for n in _sizes(str(d))] for d in bars[:2])
    assert width0 == pytest.approx(width1, abs=0.2)
    assert x0 + width0 == pytest.approx(x1, abs=0.2)


def _sizes(path: str) -> tuple[str, str]:
    """Return where a bar begins, and its length; its tip is rounded by 4."""
    start, length = path[1:].split()[0], path.split("h")[1].split("a")[0]
    return start, str(float(length) + 4)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.1, "3.10"),
        (41.23, "41.2"),
        (0, "0"),
        (15, "15"),
        (15.0, "15.0"),
        (-4321, "-4,321"),
        (1234.5, "1,230"),
        (0.05, "0.0500"),
        (2e9, "2.00e+09"),
    ],
)
def test_short(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.01, "under 0.1 s"),
        (0.4, "0.4 s"),
        (48.1, "48 s"),
        (192, "3 min 12 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_percent_and_sizes() -> None:
    assert [percent(x) for x in (0.0022, 0.018, 0.991, 1.0)] == [
        "0.22%",
        "1.8%",
        "99.1%",
        "100%",
    ]
    assert [mebibytes(x) for x in (33.6, 312.4, 1270)] == ["33.6 MiB", "312 MiB", "1.24 GiB"]
    sizes = {0: "0 bytes", 1: "1 byte", 1023: "1,023 bytes", 1024: "1.00 KiB", 2000: "1.95 KiB"}
    sizes |= {10240: "10.0 KiB", 2**20 - 1: "1.00 MiB", 2**30: "1.00 GiB", 2**52: "4,096 TiB"}
    assert {size: size_words(size) for size in sizes} == sizes


def test_steps_on_an_axis_are_whole() -> None:
    """Of a run of two steps the axis showed 1.2 and 1.4."""
    drawn = line_drawings(Curve([(1.0, 0.1), (2.0, 0.2)]))
    texts = Page(str(drawn[0])).texts
    assert [text for text in texts if text in ("1", "1.2", "1.4", "2")] == ["1", "2"]


@pytest.mark.parametrize(("learnt", "told"), [(90, True), (0, False)])
def test_where_no_text_is_learnt_no_tokens_are_told_as_learnt(learnt: int, told: bool) -> None:
    file = {"file": "a.jsonl", "format": "anchor + positive", "tokens": 7000, "learnt": learnt}
    data = {"max_length": 512, "files": [file]}
    page = Page(render(run(metrics={**METRICS, "data": data})))
    assert "7,000" in page.texts
    assert ("learnt" in page.texts) == told


def test_elements_escape_everything_but_html() -> None:
    assert (
        el("p", "<b>", el("b", "&"), class_='a"b')
        == '<p class="a&quot;b">&lt;b&gt;<b>&amp;</b></p>'
    )
    assert isinstance(el("p"), Html)
    hebrew = "\u200fש\u200e"  # marks turn nothing that follows
    assert el("p", "a\x1b\u202egnp.exe\u2069", title="\u202d", lang=hebrew) == (
        f'<p title="\\u202d" lang="{hebrew}">a␛\\u202egnp.exe\\u2069</p>'
    )


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0.9, 3.7, 5) == [1, 2, 3]
    assert nice_ticks(5, 300, 6) == [50, 100, 150, 200, 250, 300]
    assert nice_ticks(1, 1, 5) == [1]


def test_smoothing_keeps_constants_and_ends() -> None:
    flat = [(float(step), 2.0) for step in range(100)]
    assert smoothed(flat) == flat
    assert smoothed([(0.0, 5.0), (1.0, 1.0)])[0] == (0.0, 5.0)


def test_thinning_keeps_the_ends() -> None:
    assert thinned(range(1000), 5) == [0, 250, 500, 749, 999]
    assert thinned([1, 2], 5) == [1, 2]
