"""Which quick tests are about which module: a mutant is shown to these, not to the whole suite."""

from __future__ import annotations

from collections.abc import Mapping

ROOMS = ("forge/stages", "forge/verify", "forge/adapter")
_STAGE = (
    "test_stages_asking.py", "test_stages_published.py", "test_stages_judged.py", "test_stages_checks.py",
    "test_recipe_requests.py",
)  # fmt: skip
_ADAPTER = ("test_adapter.py", "test_adapter_names.py", "test_adapter_settings.py", "test_refusals.py")
_CAUGHT = "test_verify_misreadings.py::test_the_certificate_catches_it"
_MATHS = "test_verify_maths.py"
_REFUSED = "test_verify_refusals.py"
_FAULTS = tuple(
    f"test_verify_faults.py::test_{name}"
    for name in (
        "a_sound_file_passes_and_its_quantized_one_too", "dora_is_certified_and_missed",
        "an_adapter_beside_its_base", "a_prompt_that_differs_is_shown",
    )
)  # fmt: skip
_BESIDE = "test_verify_faults.py::test_a_tensor_that_is_not_as_in_llama_cpps_own"
_SHARES = ("test_verify_faults.py::test_a_share_of_the_adapter_that_rounding_hides",)
# Whole certificates of small models, sound ones and a faulty one.
_WHOLE = (
    _MATHS, f"{_CAUGHT}[none]", f"{_CAUGHT}[dropped layer]", *_FAULTS,
)  # fmt: skip
_REFERENCE = ("test_verify_reference.py", "test_resized.py::test_the_tuned_model_is_peft_s")
_RETIED = (
    "test_untied.py::test_the_certificate_sees_a_retied_head",
    "test_untied.py::test_what_is_read_otherwise_than_peft_has_it_is_refused[embedding, factors]",
)
_ROWS = (
    "test_resized.py", "test_untied.py::test_a_head_that_differs_is_not_tied",
    "test_untied.py::test_trained_as_one_is_written_as_one",
    *(f"test_untied.py::test_trained_apart_is_written_apart[{case}]"
      for case in ("head, factors", "rows of tokens, head factors")),
)  # fmt: skip
_CALIBRATED = (
    "test_calibrate.py::test_it_holds_the_mean_square_of_what_each_linear_layer_reads",
    "test_calibrate.py::test_each_expert_has_its_own",
)  # fmt: skip
_SEARCHED = tuple(
    f"test_calibrate.py::test_{name}"
    for name in (
        "the_smallest_is_chosen_by_bytes_and_not_by_place",
        "another_file_is_no_importance_matrix",
        "the_smallest_type_within_the_budget_is_found",
        "a_stopped_search_goes_on_with_the_next_type",
        "a_search_that_was_killed_early_goes_on_in_a_process_of_its_own",
        "a_full_disk_ends_the_search",
        "a_type_that_cannot_be_made_is_left_out_with_the_reason",
    )
)
TESTS: Mapping[str, tuple[str, ...]] = {
    "forge/adapter/adopt.py": ("test_adapter_names.py",),
    "forge/adapter/change.py": ("test_adapters_merged.py",),
    "forge/adapter/combine.py": ("test_adapters_merged.py",),
    "forge/adapter/directory.py": _ADAPTER,
    "forge/adapter/experts.py": ("test_expert_factors.py",),
    "forge/adapter/names.py": _ADAPTER,
    "forge/adapter/places.py": (*_ADAPTER, "test_resized.py::test_the_tuned_model_is_peft_s[untied]"),
    "forge/adapter/probe.py": ("test_adapters_held.py",),
    "forge/adapter/read.py": (*_ADAPTER, "test_resized.py::test_the_tuned_model_is_peft_s"),
    "forge/adapter/save.py": ("test_adapters_merged.py",),
    "forge/adapter/settings.py": _ADAPTER,
    "forge/adapter/several.py": ("test_adapters_held.py",),
    "forge/adapter/status.py": (*_ADAPTER, *_ROWS),
    "forge/adapter/tokenizer.py": ("test_stages_published.py",),
    "forge/adapter/vocabulary.py": (*_ADAPTER, *_ROWS),
    "forge/stages/__init__.py": ("test_stages_published.py", "test_several_types.py"),
    "forge/stages/adopt.py": _STAGE,
    "forge/stages/calibrate.py": _STAGE,
    "forge/stages/data.py": (*_STAGE, "test_data_preflight.py"),
    "forge/stages/deploy.py": ("test_stages_deployed.py", "test_stages_judged.py"),
    "forge/stages/evaluate.py": (
        *_STAGE,
        "test_learned.py::test_an_improvement_beyond_its_uncertainty",
        "test_learned.py::test_of_pairs_the_share_that_is_preferred_is_told",
        "test_learned.py::test_more_rows_tell_a_smaller_improvement",
    ),
    "forge/stages/export.py": (*_STAGE, "test_several_types.py"),
    "forge/stages/merge.py": _STAGE,
    "forge/stages/modelfile.py": (*_STAGE, "test_several_types.py", "test_beginning.py"),
    "forge/stages/smoke.py": ("test_live_stops.py", "test_stages_deployed.py", "test_stages_judged.py"),
    "forge/stages/train.py": _STAGE,
    "forge/stages/validate.py": _STAGE,
    "forge/stages/verify.py": (*_STAGE, "test_several_types.py"),
    "forge/verify/activations.py": _CALIBRATED,
    "forge/verify/asked.py": ("test_verify_asked.py",),
    "forge/verify/bases.py": ("test_verify_bases.py",),
    "forge/verify/basis.py": ("test_verify_recheck.py", "test_stages_asking.py"),
    "forge/verify/beside.py": (_BESIDE,),
    "forge/verify/calibrate.py": _SEARCHED,
    "forge/verify/calibration.py": ("test_stages_asking.py", "test_stages_judged.py"),
    "forge/verify/cause.py": (*_WHOLE, f"{_CAUGHT}[scale]", f"{_CAUGHT}[wrong layer]"),
    "forge/verify/compare.py": _WHOLE,
    "forge/verify/decide.py": (_MATHS,),
    "forge/verify/inputs.py": (_MATHS, _REFUSED),
    "forge/verify/kept.py": ("test_verify_thrift.py", *_WHOLE),
    "forge/verify/loader.py": (*_REFERENCE, "test_verify_thrift.py"),
    "forge/verify/measure.py": (*_WHOLE, _REFUSED),
    "forge/verify/measurement.py": (_MATHS,),
    "forge/verify/reference.py": _REFERENCE,
    "forge/verify/rounding.py": ("test_verify_thrift.py", *_REFERENCE, *_WHOLE),
    "forge/verify/pretokenizers.py": (
        "test_verify_faults.py::test_metadata_that_no_row_shows_is_a_fault",
        "test_verify_faults.py::test_another_name_of_the_same_pre_tokenizer_is_no_fault",
    ),
    "forge/verify/sample.py": (_MATHS, "test_verify_recheck.py", "test_verify_asked.py"),
    "forge/verify/served.py": ("test_verify_asked.py", *_WHOLE),
    "forge/verify/session.py": (
        _REFUSED,
        "test_verify_faults.py::test_a_scale_in_bf16_is_named",
        "test_verify_faults.py::test_metadata_that_no_row_shows_is_a_fault",
        _BESIDE,
        *_WHOLE,
    ),
    "forge/verify/experts.py": ("test_expert_factors.py",),
    "forge/verify/spread.py": (_MATHS,),
    "forge/verify/tensor_values.py": ("test_resized.py", _BESIDE, *_SHARES),
    "forge/verify/token_rows.py": ("test_resized.py", f"{_CAUGHT}[token rows]"),
    "forge/verify/token_table.py": (
        "test_verify_faults.py::test_an_entry_that_no_text_has_is_the_tokenizers",
        "test_verify_faults.py::test_a_sound_file_passes_and_its_quantized_one_too",
    ),
    "forge/verify/tuned.py": (
        *_REFERENCE,
        *_RETIED,
        "test_resized.py::test_the_certificate_sees_lost_rows",
        *_FAULTS,
    ),
    "forge/verify/verdict.py": _WHOLE,
    "forge/verify/vocabulary.py": (
        *_WHOLE,
        *(
            f"test_verify_faults.py::test_{name}"
            for name in (
                "a_word_that_ends_an_answer_is_named",
                "an_entry_that_no_text_has_is_the_tokenizers",
                "llama_cpp_ends_an_answer_only_where_the_base_does",
                "a_template_of_another_text_is_asked_for_what_no_row_has",
            )
        ),
    ),
    "forge/verify/weights.py": (
        *_WHOLE,
        *_SHARES,
        *_RETIED,
        "test_verify_misreadings.py::test_one_row_of_a_large_vocabulary[dropped-f16]",
        "test_verify_misreadings.py::test_a_row_that_was_damaged_on_the_way",
    ),
    "forge/verify/yardstick.py": ("test_verify_thrift.py", *_WHOLE),
}
