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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark.expression import Expression

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
COMPILED = {"aqlm": ("test_forward_is_the_vendors", "test_refused_merges_touch_nothing")}
"""Tests for which a vendor compiles a kernel, for seconds."""
THINNED = {
    **dict.fromkeys(
        (
            "test_fp4.py::test_merged_it_is_what_was_tuned",
            "test_an_unreadable_file_of_a_distribution",
            "test_two_processes_train_as_one",
            "test_a_client_that_goes_away_frees_its_place",
            "test_experts_and_routers_that_are_trained_whole",
            "test_what_the_adapter_does_not_touch_keeps_its_bytes",
            "test_the_figures_are_those_of_stock_transformers",
            "test_figures_and_answers_are_those_of_lm_eval",
            "test_adapters_on_such_a_base",
            "test_tuned_rounding_beats_the_nearest",
            "test_compensating.py::test_on_layers_of_the_demo_it_keeps_a_small_change",
            "test_a_calibrated_base_survives_saving_over_itself",
            "test_an_adapter_survives_saving_over_itself",
            "test_it_comes_nearer_and_leaves_the_model_as_it_is",
            "test_the_same_calibration_gives_the_same_codes",
            "test_merging_calibrated.py::test_stock_transformers_reads_what_is_written",
            "test_merged_again_it_is_a_base_like_any_other",
            "test_more_steps_go_on",
            "test_bfloat16_checkpoints",
            "test_layers_of_gpt2_that_are_trained_whole",
            "test_so_does_a_run_of_a_hub_id",
            "test_gptqmodel_reads_and_writes_layers_alike",
            "test_so_is_what_is_trained_beside_it",
            "test_tokens_are_drawn_by_their_share",
            "test_several_adapters_work_as_on_dense_layers",
            "test_parameters_are_counted_as_dense_ones",
            "test_a_tensor_that_was_cut_is_found_while_loading",
            "test_fp4.py::test_transformers_reads_what_is_written",
            "test_adapters_go_from_facades_to_stock_layers_and_are_swapped",
            "test_others_quantize_what_the_codes_stand_for",
            "test_a_comparison_writes_through_no_link_that_leads_out",
            "test_inc.py::test_a_layer_takes_another_weight",
            "test_a_broken_entry_point",
            "test_a_vendor_that_breaks_is_named_and_explained",
            "test_memory_options_do_not_change_the_loss",
            "test_lora_on_two_stacks_of_which_one_is_dense",
            "test_encoder_decoders",
            "test_two_active_adapters_and_one_that_is_not",
            "test_starts_that_are_found_again_are_merged_onto_the_base",
            "test_nothing_is_written_beside_or_over_a_foreign_one",
            "test_a_resumed_run_knows_what_was_measured_before",
            "test_running_out_of_memory_changes_no_number",
            "test_split_batches_change_no_number",
            "test_calibrating_backends_save_and_load",
            "test_it_starts_closer_to_the_unquantized_model",
            "test_what_forbids_sharing_is_respected_and_told",
            "test_blocks_that_are_cut_off",
            "test_training.py::test_a_resume_goes_on_with_the_same_losses",
            "test_onto_a_base_with_attention_or_shared_experts_adapted_alone",
            "test_an_adapter_that_is_too_large_for_its_base",
            "test_gemma_is_written_as_the_gguf_package_names_it",
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
            "test_the_command_line_works_beside_a_hanging_plugin",
            "test_a_plugin_cannot_take_the_command_down",
            "test_recomputing.py::test_loss_and_gradients_stay_the_same",
            "test_a_weight_is_packed_onto_the_scales_that_are_there",
            "test_experts_one_by_one_become_stacks",
            "test_lora_on_experts_trains_as_stock_peft_does",
            "test_what_is_given_is_filled_in_and_all_comments_stay",
            "test_a_config_that_was_edited_is_refused_by_key",
            "test_experts_merging.py::test_ways_of_rounding",
            "test_stacks_that_are_left_dense",
            "test_tensors_that_are_not_whole_are_named",
            "test_experts_are_rounded_by_what_is_routed_to_them",
            "test_experts.py::test_saved_and_loaded_it_gives_the_same",
            "test_whatever_of_a_plugin_breaks_is_named",
            "test_no_plan_breaks_the_page",
            "test_what_an_adapted_tower_keeps_is_that_which_is_counted",
            "test_no_word_is_broken_in_the_middle",
            "test_any_base_is_exported_by_a_scheme",
            "test_an_endless_chat_template_is_refused",
            "test_onto_a_base_whose_experts_are_stored_in_any_way",
            "test_an_adapter_is_trained_on_it_and_merged_into_its_format",
            "test_what_a_link_leads_to_is_never_handed_on",
            "test_merged_files.py::test_quantized_again",
            "test_the_model_is_the_one_without_reading_ahead",
            "test_a_checkpoint_of_the_library_is_adopted_as_it_is_served",
            "test_unload_gives_the_base_back",
            "test_a_lost_or_damaged_expert_is_named",
            "test_kept_dense.py::test_what_is_saved_loads",
            "test_a_checkpoint_tells_which_layers_are_dense",
            "test_a_refusal_is_told_at_once_and_without_the_key",
            "test_a_head_that_is_quantized_comes_back",
            "test_tiling.py::test_facades_and_fused_layers",
            "test_a_quantized_checkpoint_is_merged_under_the_names_of_dense_ones",
            "test_a_tracker_that_fails_costs_no_training",
            "test_quantized_again_what_is_adapted_changes_alone",
            "test_linears.py::test_they_are_quantized_saved_and_loaded",
            "test_grid_and_repack",
            "test_experts_are_written_one_by_one",
            "test_tiling.py::test_loss_and_gradients_are_those_of_the_whole",
            "test_all_stacks_are_quantized_and_the_model_answers_as_the_dense_one",
            "test_experts_may_be_named_as_the_layers_of_their_checkpoints",
            "test_losses_and_gradients_are_those_of_the_examples_alone",
            "test_packing.py::test_in_one_call_they_are_so_as_well",
            "test_inc.py::test_any_module",
            "test_merging_in_place_and_back",
            "test_a_stack_is_what_its_experts_would_be",
            "test_the_adapter_in_one_file_adds_what_pefts_does",
            "test_how_training_saves_memory_does_not_matter",
            "test_names_that_both_have_are_of_the_language_model",
            "test_losses_are_those_of_sentence_transformers",
            "test_of_all_kinds_the_merged_model_is_the_trained_one",
            "test_what_stock_peft_has_trained_is_read",
            "test_the_longest_example_fits_and_no_longer_one",
            "test_patterns_of_ranks_may_name_stacks_as_in_peft",
            "test_share_of_weights_quantized",
            "test_a_checkpoint_with_dense_layers_comes_back",
            "test_the_state_dict_of_another_model_is_loaded",
            "test_what_was_resolved_plans_the_same",
            "test_an_adapter_is_that_of_peft_on_the_dense_model",
            "test_integers_are_what_inc_recovers",
            "test_quantize_stops_at_a_weight_that_is_no_number",
            "test_a_head_that_stays_dense_is_no_packed_layer",
            "test_a_base_is_saved_as_what_it_is",
            "test_no_value_breaks_the_page",
            "test_made_dense_it_is_a_model_of_transformers_own_again",
            "test_a_stack_reads_as_the_parameter_that_it_was",
            "test_a_dense_merge_has_the_layout_of_its_class",
            "test_what_peft_refuses_leaves_the_model_as_it_was",
            "test_peft_on_facades.py::test_biases_train_and_are_saved",
            "test_experts.py::test_what_is_written_into_a_stack_is_quantized",
            "test_it_is_hqqs_own_result_in_several_chunks",
        ),
        3,
    ),
}
"""Tests that do one thing with many values: a half or a third of them is tried by default."""
QUANTIZERS = {"test_hqq_quantize.py"}
"""Tests of how weights are quantized: there nothing is remembered."""
ONCE = {
    "test_disabled_adapter_leaves_the_base",
    "test_gradient_checkpointing[reentrant]",
    "test_merge_onto_the_unquantized_base",
    "test_merged_model_is_an_ordinary_checkpoint",
    "test_vanilla_peft_loads_it",
}
"""Tests that hardly see the backend: under `IN_FULL` alone."""
SIBLINGS = ("bnb-fp4", "nvfp4", "torchao-fp8", "torchao-int4", "torchao-intx")
"""Backends whose plugin has another one, which is tried with LoRA."""
OF_SIBLINGS = ("test_requantized_merge", "test_save_and_load_give_equal_logits")
"""Tests that are tried with them, beside those of layers."""


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from runs that leave out what is marked cuda: their tests are of a machine that has
    none, and a model goes to a GPU by default."""
    chosen = config.getoption("markexpr")

    def runs(*marks: str) -> bool:
        return Expression.compile(chosen).evaluate(lambda name, **_: name in marks)

    if chosen and not runs("cuda") and (runs("slow") or not runs("cuda", "slow")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)  # before those that are slow are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of the suites as slow, all but a cross-section: a backend of each plugin with
    LoRA, one backend with one of each kind of adapter, and of further options of a backend, of a
    plugin's others, or of one that takes long, the layers and that they are saved and loaded."""
    from quantadapt.testing import AdapterSuite, ExpertsSuite, TargetSuite
    from quantadapt.testing.layer_suite import LayerSuite
    from quantadapt.testing.parts import adapter_of, suite_of

    def is_slow(item: pytest.Item) -> bool:
        adapter, suite = adapter_of(item), suite_of(item)
        if suite is None or item.get_closest_marker("cuda") is not None:  # on its own device, all
            return False
        name = getattr(item, "originalname", item.name)
        if name in COMPILED.get(suite.backend, ()):
            return True
        if suite.backend == IN_FULL and issubclass(suite, AdapterSuite):
            return adapter not in ("", "lora", *VARIED)
        if adapter not in ("", "lora") or ONCE & {name, item.name}:
            return True
        if suite.backend in SIBLINGS:
            return not hasattr(LayerSuite, name) and name not in OF_SIBLINGS
        if issubclass(suite, AdapterSuite) and suite.backend not in SLOW_TO_QUANTIZE:
            return False
        kept = hasattr(LayerSuite, name) or name == "test_save_and_load_give_equal_logits"
        return not kept and (hasattr(TargetSuite, name) or hasattr(ExpertsSuite, name))

    seen: Counter[str] = Counter()
    for item in items:
        if is_slow(item) or _is_thinned_out(item, seen):
            item.add_marker(pytest.mark.slow)


def _is_thinned_out(item: pytest.Item, seen: Counter[str]) -> bool:
    """Say whether `THINNED` leaves it out; counts in `seen` how many of its kind came before.

    Those that stay lie on diagonals: of a product of two lists all values of both are there."""
    file, name = item.path.name, getattr(item, "originalname", item.name)
    one_of = THINNED.get(name) or THINNED.get(f"{file}::{name}") or 1
    if item.get_closest_marker("cuda") or item.get_closest_marker("slow"):
        return False
    before = seen[f"{file}::{name}"]
    seen[f"{file}::{name}"] += 1
    return before % one_of != before // one_of % one_of


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


@pytest.fixture(scope="module", autouse=True)
def _optimized_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Weights that have been quantized are not optimized again, but where that is what is tested;
    torch is not loaded for it."""
    if "torch" not in sys.modules or request.path.name in QUANTIZERS:
        yield
        return
    from remembering import hqq_once

    with pytest.MonkeyPatch.context() as patch:
        hqq_once(patch)
        yield


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
