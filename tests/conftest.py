"""Fixed seeds, one thread, nothing from the network, quiet libraries.

What is marked slow takes long and rarely fails: processes, vendors and whole runs where a test that
is run by default would fail with them, and the cells of a product but for a cross-section in which
each value stands once. CI runs it where what it names has changed (`.ci/slow_tests.py`).
"""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("QUANTADAPT_STRICT", "1")
# Tiny matrices: a second thread costs more than it brings, five times more on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

_CACHE = tempfile.TemporaryDirectory(prefix="quantadapt-cache-")
os.environ["QUANTADAPT_CACHE"] = _CACHE.name  # backends are to work, not to remember

pytest_plugins = ("quantadapt.testing.plugin",)


VARIED = ("dora", "vera", "adalora", "ia3", "pissa", "loha", "oft", "fourierft", "shira", "vblora")
"""One of each way to change a layer: magnitudes, what layers share, ranks that move, a factor, a
start that rewrites the base, a product, a rotation, a transform, single weights, a bank."""
IN_FULL = "hqq"
"""The backend under which all of them are tried by default: PEFT sees no other."""
SLOW_TO_QUANTIZE = ("aqlm", "autoround", "awq", "gptq", "inc")
"""Backends that calibrate or tune: what quantizes one model more is slow."""
THINNED = {
    **dict.fromkeys(
        (
            "test_a_plugin_cannot_take_the_command_down",
            "test_fp4.py::test_merged_it_is_what_was_tuned",
            "test_the_command_line_works_beside_a_hanging_plugin",
            "test_an_unreadable_file_of_a_distribution",
            "test_two_processes_train_as_one",
            "test_a_client_that_goes_away_frees_its_place",
            "test_experts_and_routers_that_are_trained_whole",
            "test_what_the_adapter_does_not_touch_keeps_its_bytes",
            "test_the_figures_are_those_of_stock_transformers",
            "test_figures_and_answers_are_those_of_lm_eval",
            "test_adapters_on_such_a_base",
            "test_tuned_rounding_beats_the_nearest",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "test_a_broken_plugin_is_kept_explained_and_harmless",
            "test_merged_files_are_the_trained_model",
            "test_a_model_in_16_bits_is_merged_as_it_computes",
            "test_it_is_loaded_adapted_saved_and_merged_as_what_it_is",
            "test_merged_files.py::test_onto_the_base",
            "test_layers_adapted_later_are_merged_as_they_compute",
            "test_merged_files.py::test_damaged_files_are_no_success",
            "test_merged_files.py::test_dense",
            "test_the_second_adapter_is_looked_at_as_the_first",
            "test_a_quantized_checkpoint_without_a_tensor_is_refused",
            "test_slots_hold_what_a_growing_cache_holds",
            "test_it_is_what_peft_does_in_memory",
            "test_ways_on_models_of_all_kinds",
            "test_transformers_reads_the_model_that_was_written",
            "test_each_is_saved_whatever_another_is_called",
            "test_starts_are_merged_into_their_own_base",
            "test_a_resumed_run_is_the_one_that_was_not_interrupted",
            "test_results_in_a_journal_that_are_none_are_told",
            "test_what_is_saved_loads_in_plain_transformers",
            "test_gptq_trades_weight_error_for_output_error",
            "test_a_base_that_was_trained_since_is_refused",
            "test_judgements_that_are_none_are_told",
            "test_each_tensor_of_an_adapter_is_wanted_and_used",
            "test_what_is_stored_of_a_quantized_layer",
            "test_the_active_adapter_is_merged_whatever_its_name",
            "test_a_lie_is_caught",
        ),
        3,
    ),
}
"""Tests that do one thing with many values: every second or third is tried by default."""
ONCE = {"test_merge_onto_the_unquantized_base", "test_gradient_checkpointing[reentrant]"}
"""Tests that hardly see the backend: under `IN_FULL` alone."""


@pytest.hookimpl(tryfirst=True)  # before those that are slow are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of the suites as slow, all but a cross-section: each backend with LoRA, one
    backend with one of each kind of adapter, and of further options of a backend, or of one that
    takes long, the layers and that they are saved and loaded."""
    from quantadapt.testing import AdapterSuite, ExpertsSuite, TargetSuite
    from quantadapt.testing.layer_suite import LayerSuite
    from quantadapt.testing.parts import adapter_of, suite_of

    def is_slow(item: pytest.Item) -> bool:
        adapter, suite = adapter_of(item), suite_of(item)
        if suite is None or item.get_closest_marker("cuda") is not None:  # on its own device, all
            return False
        name = getattr(item, "originalname", item.name)
        if suite.backend == IN_FULL and issubclass(suite, AdapterSuite):
            return adapter not in ("", "lora", *VARIED)
        if adapter not in ("", "lora") or ONCE & {name, item.name}:
            return True
        if issubclass(suite, AdapterSuite) and suite.backend not in SLOW_TO_QUANTIZE:
            return False
        kept = hasattr(LayerSuite, name) or name == "test_save_and_load_give_equal_logits"
        return not kept and (hasattr(TargetSuite, name) or hasattr(ExpertsSuite, name))

    seen: Counter[str] = Counter()
    for item in items:
        if is_slow(item) or _is_thinned_out(item, seen):
            item.add_marker(pytest.mark.slow)


def _is_thinned_out(item: pytest.Item, seen: Counter[str]) -> bool:
    """Say whether `THINNED` leaves it out; counts in `seen` how many of its kind came before."""
    file, name = item.path.name, getattr(item, "originalname", item.name)
    one_of = THINNED.get(name) or THINNED.get(f"{file}::{name}") or 1
    if item.get_closest_marker("cuda") or item.get_closest_marker("slow"):
        return False
    seen[f"{file}::{name}"] += 1
    return (seen[f"{file}::{name}"] - 1) % one_of > 0


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Away from the checkout: a user's `runs/` there is none of a test's business."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


@pytest.fixture(scope="module", autouse=True)
def _settled() -> None:
    """What is there for good, libraries most of all, is not gone through at each collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The demo's."""
    from transformers import AutoTokenizer

    from quantadapt.demo import MODEL_DIR

    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="session")
def random_data() -> Any:
    """32 examples of 6 to 19 random tokens below 64; the first three of each are the prompt."""
    import torch
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 20, (32,), generator=generator).tolist()
    ids = [torch.randint(3, 64, (n,), generator=generator).tolist() for n in lengths]
    masks = [[0] * 3 + [1] * (n - 3) for n in lengths]
    return Dataset.from_dict({"input_ids": ids, "completion_mask": masks})


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same numbers whatever ran before; torch is not loaded for it."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def small_picture_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of small image-text models, by family; not to be changed."""
    from quantadapt.testing.small_pictures import FAMILIES, write_model

    folder = tmp_path_factory.mktemp("picture-models")
    return {family: write_model(folder / family, family) for family in FAMILIES}
