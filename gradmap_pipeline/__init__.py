"""Everything that a plugin needs. `docs/api.md` says what each name does.

Names are imported when they are first used, so that the command line starts at once.

"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from .api import HOMES, RENAMED, list_groups

if TYPE_CHECKING:
    from .artifacts import (
        LINEAGE as LINEAGE,
        Artifact as Artifact,
        ExportedFile as ExportedFile,
        NameOf as NameOf,
        TensorFile as TensorFile,
    )
    from .batches import (
        Batch as Batch,
        count_predicted as count_predicted,
        make_batches as make_batches,
        next_token_losses as next_token_losses,
        predicted_tokens as predicted_tokens,
    )
    from .checkpoint.architecture import full_config as full_config
    from .checkpoint.checkpoint import load_tensor as load_tensor
    from .checkpoint.experts import ExpertLayout as ExpertLayout, find_experts as find_experts
    from .checkpoint.forecast import ModelForecast as ModelForecast
    from .checkpoint.graph import ModelGraph as ModelGraph, open_model as open_model
    from .checkpoint.layer_check import check_same_layers as check_same_layers
    from .checkpoint.lengths import lengths_apart_in as lengths_apart_in
    from .checkpoint.model import ExportableModel as ExportableModel, Model as Model
    from .checkpoint.source import ModelSource as ModelSource
    from .context import Context as Context
    from .correction.correction import (
        Compensation as Compensation,
        CorrectedSite as CorrectedSite,
        collect_moments as collect_moments,
        correct_site as correct_site,
        find_output_site as find_output_site,
        layers_before_cuts as layers_before_cuts,
        sites_of as sites_of,
        solve_site as solve_site,
    )
    from .correction.fitting import HELD_OUT as HELD_OUT
    from .correction.look_ahead import CorrectedModel as CorrectedModel, divide_samples as divide_samples
    from .correction.patches import write_patches as write_patches
    from .correction.refit import (
        Refit as Refit,
        RefitSettings as RefitSettings,
        count_batch_samples as count_batch_samples,
        count_best_bytes as count_best_bytes,
        disk_for_refit as disk_for_refit,
        measure_room_for_refit as measure_room_for_refit,
        put_values as put_values,
        refit_layer as refit_layer,
        room_for_refit as room_for_refit,
    )
    from .correction.ridge import Moments as Moments, check_room as check_room, room_for as room_for
    from .correction.scaling import (
        magnitude_ratio as magnitude_ratio,
        nearest_scale as nearest_scale,
        rescale_from as rescale_from,
        rescale_stream as rescale_stream,
    )
    from .correction.site_search import check_gain as check_gain
    from .correction.sites import NoSiteError as NoSiteError, NotFiniteError as NotFiniteError, Site as Site
    from .correction.streams import (
        Drift as Drift,
        Streams as Streams,
        capture_site as capture_site,
        open_streams as open_streams,
    )
    from .correction.training import (
        Trained as Trained,
        TrainingSettings as TrainingSettings,
        check_room_for_training as check_room_for_training,
        train_whole as train_whole,
    )
    from .correction.training_curve import TrainingPoint as TrainingPoint
    from .correction.training_memory import (
        TrainingNeeds as TrainingNeeds,
        check_memory_for_training as check_memory_for_training,
        count_trained as count_trained,
        measure_training_needs as measure_training_needs,
        training_bytes as training_bytes,
    )
    from .correction.writers import Writer as Writer
    from .cost.decoding_costs import (
        DecodingShape as DecodingShape,
        check_room_for_decoding as check_room_for_decoding,
        estimate_decoding as estimate_decoding,
    )
    from .cost.estimate import Estimate as Estimate
    from .cost.layers_left import LayersLeft as LayersLeft
    from .cost.model_costs import ModelCosts as ModelCosts
    from .cost.stream_work import StreamWork as StreamWork
    from .data.answers import (
        Answer as Answer,
        Answers as Answers,
        Prompts as Prompts,
        agreeing_share as agreeing_share,
        answer_prompts as answer_prompts,
        repetition as repetition,
    )
    from .data.calibration_set import (
        CalibrationForecast as CalibrationForecast,
        CalibrationPart as CalibrationPart,
        CalibrationSet as CalibrationSet,
    )
    from .data.calibration_sources import CalibrationSource as CalibrationSource
    from .data.drawing import draw_samples as draw_samples
    from .data.sequences import SHUFFLE_POOL as SHUFFLE_POOL, digest_sequences as digest_sequences, make_sequences as make_sequences
    from .data.sources import DatasetSource as DatasetSource
    from .data.tokenizer import (
        check_length as check_length,
        check_tokenizer as check_tokenizer,
        count_embeddings as count_embeddings,
        load_tokenizer as load_tokenizer,
    )
    from .errors import (
        CapacityError as CapacityError,
        ModelError as ModelError,
        OptionError as OptionError,
        QualityError as QualityError,
        StageError as StageError,
    )
    from .export.agreement import (
        Agreement as Agreement,
        TextAgreement as TextAgreement,
        check_text as check_text,
        compare_models as compare_models,
        read_text as read_text,
    )
    from .export.consumers import (
        explain_forecast as explain_forecast,
        explain_removal as explain_removal,
        find_index_programs as find_index_programs,
    )
    from .export.exportable import take_graph as take_graph
    from .export.exports import (
        Export as Export,
        GgufFolder as GgufFolder,
        OnnxFolder as OnnxFolder,
        TransformersFolder as TransformersFolder,
        load_folder as load_folder,
    )
    from .export.fewer_experts import write_fewer_experts as write_fewer_experts
    from .export.folders import (
        explain_config as explain_config,
        extend_lineage as extend_lineage,
        find_deviations as find_deviations,
        make_lineage as make_lineage,
        write_card as write_card,
        write_companions as write_companions,
    )
    from .export.llamacpp.converter import GgufConverter as GgufConverter
    from .export.llamacpp.quantiser import FileAgreement as FileAgreement, GgufQuantiser as GgufQuantiser
    from .export.ort.apart import estimate_tracing_memory as estimate_tracing_memory
    from .export.ort.folder import (
        QuantisedGraph as QuantisedGraph,
        check_onnx_exportable as check_onnx_exportable,
        write_onnx_folder as write_onnx_folder,
    )
    from .export.ort.quantise import OnnxQuantisation as OnnxQuantisation
    from .export.quantised import write_quantised as write_quantised
    from .export.speed import Rates as Rates, Speed as Speed, SpeedCase as SpeedCase, measure_speed as measure_speed
    from .export.transformers_folder import check_export as check_export, write_transformers_folder as write_transformers_folder
    from .machine.distributed import ProcessGroup as ProcessGroup
    from .machine.environment import Environment as Environment
    from .machine.extras import explain_missing as explain_missing
    from .machine.memory_advice import lack_of_memory as lack_of_memory
    from .measurements import Evaluation as Evaluation, Measurement as Measurement
    from .metrics import Metric as Metric
    from .stages.compensating import (
        LayerCompensation as LayerCompensation,
        check_rescaling as check_rescaling,
        find_writers as find_writers,
    )
    from .stages.exporting import FolderExport as FolderExport
    from .stages.forecasts import Forecasts as Forecasts, Outlook as Outlook, known as known
    from .stages.hookspecs import hookimpl as hookimpl
    from .stages.layer_scores import Decision as Decision, LayerScores as LayerScores, ScoresForecast as ScoresForecast
    from .stages.perplexity import perplexity_of as perplexity_of
    from .stages.pruning_target import PruningTarget as PruningTarget
    from .stages.ranking import Measure as Measure, Scoring as Scoring
    from .stages.removal import (
        check_regular_removal as check_regular_removal,
        check_removal_by_config as check_removal_by_config,
        choose_expressible as choose_expressible,
        count_removed as count_removed,
    )
    from .stages.scoring import LayerScoring as LayerScoring, take_lowest as take_lowest
    from .stages.stage import Stage as Stage
    from .stages.structure_probe import StructureProbe as StructureProbe
    from .stages.targets import copy_files as copy_files, describe_folder as describe_folder
    from .sweep.finite import explain_nonfinite as explain_nonfinite, find_nonfinite_weights as find_nonfinite_weights
    from .sweep.sample_pass import SamplePass as SamplePass
    from .sweep.sweep import Sweep as Sweep, open_sweep as open_sweep
    from .sweep.top_choices import find_top_choices as find_top_choices
    from .tasks.folder import TaskFolder as TaskFolder
    from .tasks.task_harness import TaskHarness as TaskHarness
    from .work import Round as Round, Work as Work

__version__ = "0.1.0"

API_VERSION = 1
"""Version of what plugins may use; docs/write-a-plugin.md says what stays as it is within one."""

__all__ = list(HOMES)
__doc__ += list_groups()


def __getattr__(name: str) -> Any:
    if name in RENAMED:
        raise ImportError(f"{name!r} is called {RENAMED[name]!r} now", name=name)
    if name in HOMES:
        return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return [*globals(), *__all__]
