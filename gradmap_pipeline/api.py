"""Which names plugins may use, in groups: the root package exports them, and `docs/api.md` describes them."""

from __future__ import annotations

from textwrap import wrap

GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "Stages and artifacts": {
        "stages.stage": ("Stage",),
        "stages.hookspecs": ("hookimpl",),
        "context": ("Context",),
        "machine.environment": ("Environment",),
        "machine.extras": ("explain_missing",),
        "artifacts": ("Artifact", "TensorFile", "ExportedFile", "NameOf"),
        "data.calibration_set": ("CalibrationSet", "CalibrationForecast"),
        "stages.layer_scores": ("LayerScores", "Decision", "ScoresForecast"),
        "stages.pruning_target": ("PruningTarget",),
        "work": ("Round", "Work"),
        "checkpoint.forecast": ("ModelForecast",),
        "measurements": ("Measurement", "Evaluation"),
        "metrics": ("Metric",),
        "stages.forecasts": ("Forecasts", "Outlook", "known"),
        "stages.structure_probe": ("StructureProbe",),
        "cost.estimate": ("Estimate",),
        "cost.model_costs": ("ModelCosts",),
        "errors": ("OptionError", "ModelError", "StageError", "QualityError", "CapacityError"),
        "machine.memory_advice": ("lack_of_memory",),
    },
    "Models": {
        "checkpoint.model": ("Model", "ExportableModel"),
        "checkpoint.graph": ("ModelGraph", "open_model"),
        "checkpoint.source": ("ModelSource",),
        "checkpoint.checkpoint": ("load_tensor",),
        "checkpoint.architecture": ("full_config",),
        "checkpoint.layer_check": ("check_same_layers",),
        "checkpoint.experts": ("ExpertLayout", "find_experts"),
        "export.fewer_experts": ("write_fewer_experts",),
        "checkpoint.lengths": ("lengths_apart_in",),
    },
    "Rankings": {
        "stages.scoring": ("LayerScoring", "take_lowest"),
        "stages.ranking": ("Measure", "Scoring"),
        "correction.look_ahead": ("CorrectedModel", "divide_samples"),
        "stages.removal": ("count_removed", "check_removal_by_config", "check_regular_removal", "choose_expressible"),
    },
    "Sweeps": {
        "sweep.sweep": ("open_sweep", "Sweep"),
        "sweep.sample_pass": ("SamplePass",),
        "sweep.top_choices": ("find_top_choices",),
        "machine.distributed": ("ProcessGroup",),
        "batches": ("Batch", "make_batches", "next_token_losses", "predicted_tokens", "count_predicted"),
        "sweep.finite": ("find_nonfinite_weights", "explain_nonfinite"),
        "stages.perplexity": ("perplexity_of",),
    },
    "Corrections": {
        "stages.compensating": ("LayerCompensation", "find_writers", "check_rescaling"),
        "correction.streams": ("Streams", "Drift", "capture_site", "open_streams"),
        "cost.stream_work": ("StreamWork",),
        "cost.layers_left": ("LayersLeft",),
        "correction.sites": ("Site", "NoSiteError", "NotFiniteError"),
        "correction.site_search": ("check_gain",),
        "correction.ridge": ("Moments", "room_for", "check_room"),
        "correction.correction": (
            "Compensation",
            "CorrectedSite",
            "layers_before_cuts",
            "sites_of",
            "find_output_site",
            "collect_moments",
            "solve_site",
            "correct_site",
        ),
        "correction.patches": ("write_patches",),
        "correction.fitting": ("HELD_OUT",),
        "correction.refit": (
            "Refit",
            "RefitSettings",
            "count_batch_samples",
            "room_for_refit",
            "count_best_bytes",
            "disk_for_refit",
            "measure_room_for_refit",
            "refit_layer",
            "put_values",
        ),
        "correction.training": ("TrainingSettings", "Trained", "check_room_for_training", "train_whole"),
        "correction.training_curve": ("TrainingPoint",),
        "correction.training_memory": (
            "TrainingNeeds",
            "measure_training_needs",
            "count_trained",
            "training_bytes",
            "check_memory_for_training",
        ),
        "correction.writers": ("Writer",),
        "correction.scaling": ("nearest_scale", "magnitude_ratio", "rescale_stream", "rescale_from"),
    },
    "Exports": {
        "stages.exporting": ("FolderExport",),
        "export.exports": ("Export", "TransformersFolder", "OnnxFolder", "GgufFolder", "load_folder"),
        "export.exportable": ("take_graph",),
        "export.quantised": ("write_quantised",),
        "export.transformers_folder": ("write_transformers_folder", "check_export"),
        "export.ort.folder": ("write_onnx_folder", "check_onnx_exportable", "QuantisedGraph"),
        "export.ort.apart": ("estimate_tracing_memory",),
        "export.ort.quantise": ("OnnxQuantisation",),
        "export.llamacpp.converter": ("GgufConverter",),
        "export.llamacpp.quantiser": ("GgufQuantiser", "FileAgreement"),
        "export.speed": ("Speed", "SpeedCase", "Rates", "measure_speed"),
        "cost.decoding_costs": ("DecodingShape", "check_room_for_decoding", "estimate_decoding"),
        "export.agreement": ("Agreement", "TextAgreement", "check_text", "read_text", "compare_models"),
        "export.folders": (
            "write_companions",
            "write_card",
            "make_lineage",
            "extend_lineage",
            "explain_config",
            "find_deviations",
        ),
        "stages.targets": ("describe_folder", "copy_files"),
        "artifacts": ("LINEAGE",),
        "export.consumers": ("explain_forecast", "explain_removal", "find_index_programs"),
    },
    "Tasks of lm-eval": {
        "tasks.folder": ("TaskFolder",),
        "tasks.task_harness": ("TaskHarness",),
    },
    "Texts": {
        "data.sources": ("DatasetSource",),
        "data.calibration_set": ("CalibrationPart",),
        "data.calibration_sources": ("CalibrationSource",),
        "data.drawing": ("draw_samples",),
        "data.tokenizer": ("check_length", "load_tokenizer", "check_tokenizer", "count_embeddings"),
        "data.answers": ("Answer", "Answers", "Prompts", "answer_prompts", "repetition", "agreeing_share"),
        "data.sequences": ("make_sequences", "digest_sequences", "SHUFFLE_POOL"),
    },
}
"""By title of a group and by module of this package: its public names."""

HOMES = {name: module for group in GROUPS.values() for module, names in group.items() for name in names}
"""By public name: the module that defines it."""


RENAMED = {
    "Group": "ProcessGroup",
    "POOL": "SHUFFLE_POOL",
    "Quantisation": "OnnxQuantisation",
    "Rehearsal": "ModelCosts",
    "Survey": "StructureProbe",
    "capture": "capture_site",
    "check_twins": "check_same_layers",
    "estimate_memory": "estimate_tracing_memory",
    "find_output": "find_output_site",
    "find_weights": "find_nonfinite_weights",
    "not_finite": "explain_nonfinite",
}
"""Earlier names, and what they are called now."""


def list_groups() -> str:
    """The groups with their names, for `help`."""
    lines = []
    for title, modules in GROUPS.items():
        names = ", ".join(name for listed in modules.values() for name in listed)
        lines += [title, *(f"    {line}" for line in wrap(names, 100)), ""]
    return "\n".join(lines)
