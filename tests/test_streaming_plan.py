"""What a plan says of a base that is streamed from CPU memory, and what a run makes of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_sizes import LLAMA_8B

import quantadapt as qa
from quantadapt.errors import PlanRefused
from quantadapt.machine import Machine, host_memory
from quantadapt.memory.cards import GIB
from quantadapt.memory.setting import Setting
from quantadapt.planning import Plan, plan
from quantadapt.spec import Spec

QWEN_30B = {
    **{"model_type": "qwen3_moe", "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    **{"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768},
    **{"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4},
    **{"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936},
    "architectures": ["Qwen3MoeForCausalLM"],
}


def card(gib: float, host: float | None = 200.0, count: int = 1) -> Machine:
    there = None if host is None else int(host * GIB)
    return Machine(cuda=((9, 0),) * count, memory=(int(gib * GIB),) * count, host=there)


@pytest.fixture
def planned(tmp_path: Path) -> Any:
    """Plans a run of a shape on a machine."""

    def made(config: dict[str, Any], machine: Machine, count: int = 1, **spec: Any) -> Plan:
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model/config.json").write_text(json.dumps(config), encoding="utf-8")
        values: dict[str, Any] = {"model": str(tmp_path / "model"), "backend": "bnb-nf4"}
        values |= {"data": {"max_length": 512}, "evaluate": {"unquantized": False}} | spec
        values["train"] = {"per_device_train_batch_size": 1} | values.get("train", {})
        return plan(
            Spec(output=str(tmp_path / "run"), device="cuda", **values),
            machine=machine,
            processes=count,
            weights=False,
        )

    return made


def refused(planned: Any, *given: Any, **spec: Any) -> str:
    with pytest.raises(PlanRefused) as caught:
        planned(*given, **spec)
    return str(caught.value)


def notes(made: Plan) -> list[str]:
    return [note for note in made.notes if note.startswith("stream")]


def test_a_base_is_streamed_where_it_does_not_fit_otherwise(planned: Any) -> None:
    assert planned(LLAMA_8B, card(24)).stream == "none"
    assert notes(planned(LLAMA_8B, card(24))) == []
    made = planned(LLAMA_8B, card(5))
    assert made.stream == "all"
    first, second = notes(made)
    assert "3.35 GiB of CPU memory, as training does not fit otherwise" in first
    assert "evaluate.samples: 0" in second
    quiet = {"samples": 0, "unquantized": False}
    assert len(notes(planned(LLAMA_8B, card(5), evaluate=quiet))) == 1


def test_experts_are_streamed_before_all_is(planned: Any) -> None:
    assert planned(QWEN_30B, card(40)).stream == "none"
    assert planned(QWEN_30B, card(20)).stream == "experts"


def test_without_enough_cpu_memory_nothing_is_streamed(planned: Any) -> None:
    assert "too small" in refused(planned, LLAMA_8B, card(4, host=5))
    assert "too small" in refused(planned, LLAMA_8B, card(4, host=None))


def test_what_is_asked_for_is_streamed_on_any_card(planned: Any) -> None:
    assert planned(LLAMA_8B, card(80), train={"stream": "all"}).stream == "all"
    assert planned(LLAMA_8B, card(80, host=None), train={"stream": "all"}).stream == "all"
    assert "too small" in refused(planned, LLAMA_8B, card(4), train={"stream": "none"})


def test_what_cannot_be_streamed_is_refused(planned: Any) -> None:
    wanted = {"train": {"stream": "all"}}
    text = refused(planned, LLAMA_8B, card(80, host=4), **wanted)
    assert "take 5.35 GiB of CPU memory, 4.00 GiB are free" in text
    assert "[rule stream-needs-memory]" in text
    two = refused(planned, LLAMA_8B, card(80, 8, 2), 2, train={"stream": "all", "parallel": "ddp"})
    assert "2 streamed bases and the process take 8.71 GiB" in two
    assert "use train.stream: all" in refused(
        planned, LLAMA_8B, card(80), train={"stream": "experts"}
    )
    assert "[rule stream-keeps-the-base]" in refused(
        planned, LLAMA_8B, card(80), adapter="pissa", **wanted
    )
    shared = {"stream": "all", "parallel": "fsdp"}
    assert "shared by several GPUs, or streamed" in refused(
        planned, LLAMA_8B, card(80, count=2), 2, train=shared
    )


def test_a_backend_that_takes_the_whole_model_at_once_needs_a_card_for_it(planned: Any) -> None:
    options = {"backend": "gptq", "train": {"stream": "all"}}
    assert planned(LLAMA_8B, card(24), **options).stream == "all"
    assert "[rule stream-by-layers]" in refused(planned, LLAMA_8B, card(5), **options)


def test_a_start_that_rewrites_the_base_is_not_streamed_by_itself(planned: Any) -> None:
    assert "too small" in refused(planned, LLAMA_8B, card(4), adapter="pissa")


def test_merging_needs_a_card_that_holds_what_is_merged(planned: Any) -> None:
    def written(gib: float) -> list[str]:
        made = planned(LLAMA_8B, card(gib), train={"stream": "all"})
        return [export.name for export in made.exports if not export.refusals]

    assert written(80) == ["adapter", "merged-dense"]
    assert written(12) == ["adapter"]
    again = {"train": {"stream": "all"}, "export": {"merge": "requantize"}}
    planned(LLAMA_8B, card(24), **again)
    with pytest.raises(qa.QuantadaptError, match="the merged model beside the quantized one"):
        planned(LLAMA_8B, card(6), **again)


def test_memory_is_two_blocks_and_the_rest(planned: Any) -> None:
    setting = Setting(31, False, 1)
    whole = planned(LLAMA_8B, card(80)).memory.work
    streamed = planned(LLAMA_8B, card(80), train={"stream": "all"}).memory.work
    block = 218_103_808 * 4.127 / 8  # weights of a decoder layer, bits of nf4
    saved = whole.peak(setting) - streamed.peak(setting)
    graphs = 4 * whole.trained + 2 * 2**25  # those are not recorded
    assert saved - graphs == pytest.approx(30 * block, rel=0.06)
    assert streamed.host_bytes == pytest.approx(32 * block, rel=0.06)


def test_cards_that_are_asked_about_are_told_how_they_suffice(planned: Any, tmp_path: Path) -> None:
    planned(LLAMA_8B, card(24))  # writes the config
    spec = Spec(
        model=str(tmp_path / "model"),
        backend="bnb-nf4",
        data={"max_length": 512},
        train={"per_device_train_batch_size": 1},
    )
    made = plan(spec, machine=Machine(), cards=[5, 24], weights=False)
    small, large = made.memory.words()
    assert "fits 5 GiB: yes" in small
    assert "the base streamed from 3.35 GiB of CPU memory" in small
    assert "fits 24 GiB: yes" in large
    assert "streamed" not in large.partition("; longest example")[0]
    assert [entry["streamed"] for entry in made.to_dict()["memory"]["cards"]] == ["all", "none"]
    assert made.stream == "none"


def test_streaming_that_makes_no_room_is_no_way_to_a_longer_example(
    planned: Any, tmp_path: Path
) -> None:
    """The same count was printed for each of them."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    small = QWEN_30B | sizes | {"num_hidden_layers": 2, "num_experts": 4, "vocab_size": 512}
    for config, ways in ((small, 1), (QWEN_30B, 3)):
        planned(config, card(80))  # writes the config
        spec = Spec(model=str(tmp_path / "model"), backend="bnb-nf4")
        made = plan(spec, machine=Machine(), cards=[80], weights=False).memory
        counts = sorted(set(made.cards[0].longest.values()))
        words = made.words()[0].partition("; longest example")[2]
        found = [int(count.replace(",", "")) for count in re.findall(r"([\d,]+) tokens", words)]
        assert list(made.cards[0].longest) == ["none", "experts", "all"]
        assert found == counts
        assert len(found) == ways


def test_without_a_gpu_it_is_said_that_nothing_comes_of_it(tmp_path: Path) -> None:
    spec = Spec(train={"stream": "all"}, device="cpu", output=str(tmp_path / "run"))
    made = plan(spec, machine=Machine())
    assert made.stream == "none"
    assert [note for note in made.notes if "train.stream has no effect here" in note]


GROUP = "sys/fs/cgroup"
MEMINFO = {"proc/meminfo": "MemTotal: 64 kB\nMemAvailable:   1000 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MEMINFO, 1_024_000),
        ({**MEMINFO, f"{GROUP}/memory.max": "max", f"{GROUP}/memory.current": "9"}, 1_024_000),
        ({**MEMINFO, f"{GROUP}/memory.max": "5000", f"{GROUP}/memory.current": "4000"}, 1000),
        (
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/a/b\n",
                f"{GROUP}/a/b/memory.max": "5000",
                f"{GROUP}/a/b/memory.current": "4000",
                f"{GROUP}/a/b/memory.stat": "anon 3\ninactive_file 500\n",
            },
            1500,
        ),
        (
            {
                **MEMINFO,
                f"{GROUP}/memory/memory.limit_in_bytes": "7000",
                f"{GROUP}/memory/memory.usage_in_bytes": "9000",
            },
            0,
        ),
    ],
)
def test_free_cpu_memory_is_what_system_and_group_leave(
    tmp_path: Path, files: dict[str, str], expected: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert host_memory(tmp_path) == expected


def test_a_base_is_streamed_while_it_loads() -> None:
    from quantadapt.quantizing import quantize_plan
    from quantadapt.streaming import streamer_of

    made = plan(Spec(backend="hqq", device="cpu"), check_output=False)
    whole = qa.quantize(None, "hqq", device="cpu")
    model = quantize_plan(replace(made, stream="all"))
    streamer = streamer_of(model)
    assert streamer is not None
    assert len(streamer.blocks) == model.config.num_hidden_layers
    ids = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits)


def input_notes(made: Plan) -> list[str]:
    return [note for note in made.notes if "inputs of layers" in note]


def test_inputs_in_cpu_memory_are_counted_beside_a_streamed_base(planned: Any) -> None:
    """30,016 tokens x 4096 numbers of 2 bytes x 32 layers are 7.33 GiB; 3.35 are streamed, and the
    process has 2. Of what is left inputs may take nine tenths, else every second one is made again.
    """
    long = {"data": {"max_length": 30_000}}
    assert planned(LLAMA_8B, card(8, host=9), **long).stream == "all"
    (told,) = input_notes(planned(LLAMA_8B, card(8, host=9), **long))
    assert (
        "inputs of layers take 3.66 GiB of it, what is streamed 3.35 GiB, the process 2.00 GiB"
        in told
    )
    assert "9.00 GiB are free" in told
    for host, every in ((9.1, 2), (13.4, 2), (13.6, 1)):
        made = planned(LLAMA_8B, card(8, host=host), **long)
        assert input_notes(made) == []
        assert made.memory.cards[0].setting.input_every == every


def test_a_copy_of_a_start_that_changes_the_base_is_counted(planned: Any) -> None:
    """Of PiSSA, whose reference for dpo is not the model without it; 10.0 GiB at rank 1024."""
    adapter = {"name": "pissa", "r": 1024, "init_lora_weights": "pissa"}
    given: dict[str, Any] = {"adapter": adapter, "objective": "dpo"}
    made = planned(LLAMA_8B, card(140, host=11.9), **given)
    trained = 32 * 1024 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert made.memory.copied == 4 * trained
    (told,) = [note for note in made.notes if note.startswith("CPU memory may not suffice")]
    assert f"the adapter's start, as a reference {4 * trained / GIB:.1f} GiB of it" in told
    for other in ({"objective": "sft"}, {"adapter": {"name": "lora", "r": 1024}}):
        made = planned(LLAMA_8B, card(140, host=11.9), **(given | other))
        assert made.memory.copied == 0
        assert not [note for note in made.notes if note.startswith("CPU memory may")]


def test_each_process_of_this_machine_keeps_inputs_in_cpu_memory(
    planned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100,032 tokens are 24.4 GiB for one, or 12.2 where every second input is made again."""
    long = {"data": {"max_length": 100_000}, "train": {"parallel": "ddp"}}
    (told,) = input_notes(planned(LLAMA_8B, card(24, 26, 2), 2, **long))
    assert (
        "inputs of layers take 24.4 GiB of it, the process 2.00 GiB, and 26.0 GiB are free" in told
    )
    launched_on_two_nodes(monkeypatch)
    assert input_notes(planned(LLAMA_8B, card(24, 26), 2, **long)) == []


def launched_on_two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `torchrun --nnodes 2 --nproc-per-node 1` tells the second one."""
    told = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)


def test_bases_on_other_nodes_take_nothing_of_this_one(
    planned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two bases take 8.71 GiB with the process, one takes 5.4."""
    given = {"train": {"stream": "all", "parallel": "ddp"}}
    assert "take 8.71 GiB" in refused(planned, LLAMA_8B, card(80, 6, 2), 2, **given)
    launched_on_two_nodes(monkeypatch)
    assert planned(LLAMA_8B, card(80, 6), 2, **given).stream == "all"
    assert "take 5.35 GiB" in refused(planned, LLAMA_8B, card(80, 4), 2, **given)
