"""Take a small model of any architecture through every stage, and compare what comes out with the original, layers skipped.

`python tests/walk.py docs/architectures.md` writes the table of all architectures.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gradmap_plugins.export import ExportModel
from gradmap_plugins.gradmap_score import GradmapScore
from gradmap_plugins.project_compensate import ProjectCompensate
from gradmap_plugins.prune import Prune
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from zoo import DEPTH, make_config

from gradmap_pipeline import CalibrationSet, Forecasts, ModelGraph, StructureProbe, TensorFile
from gradmap_pipeline.checkpoint.architecture import full_config
from gradmap_pipeline.checkpoint.cadence import strict_cadences_of
from gradmap_pipeline.checkpoint.graph import open_model
from gradmap_pipeline.checkpoint.skeleton import find_layer_list
from gradmap_pipeline.checkpoint.source import ModelSource
from gradmap_pipeline.errors import GradmapError
from gradmap_pipeline.testing import run_stage

ARCHITECTURES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
WHOLE = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
"""Types that have an encoder of images besides the decoder."""
LARGEST = 20_000_000  # parameters
MEMORY = 4 << 30
PROMPT, GENERATED = 12, 8
LISTED = [0, 1]
"""Layers to remove where scores cannot be had."""


@dataclass
class Outcome:
    """What became of one architecture."""

    status: str = "works"
    """`works`, `refused` or `not built`."""
    removed: tuple[int, ...] = ()
    sites: tuple[str, ...] = ()
    """Parameters that took a correction, without the layer, and the kind of site."""
    note: str = ""
    difference: float = 0.0
    """Largest difference of logits between the export and the original with layers skipped, relative to the largest logit."""
    cached: float = 0.0
    """The same while generating 8 tokens with a cache."""
    uncached: float = 0.0
    """And against the original without a cache: the removal of a layer that counts tokens makes its cache useless."""
    uncached_dense: float = 0.0
    """What the cache makes of the unpruned original."""
    scores: dict[int, tuple[float, float]] = field(default_factory=dict)
    """By layer: ours, and by plain backward through the whole model."""


def walk(model_type: str, folder: Path) -> Outcome:
    """Every stage on one architecture. A refusal must come before any stage runs; any other error is a failure."""
    outcome = Outcome()
    try:
        base = make_model(folder / "base", model_type)
    except NotBuiltError as error:
        return Outcome("not built", note=str(error))
    try:
        graph = open_model(ModelSource(path=base))
        probe = StructureProbe(graph, MEMORY)
        ExportModel(to=folder / "out").inspect(Forecasts(ExportModel), probe)
        pruning = Prune(layers=2, among="expressible" if strict_cadences_of(full_config(base)) else "any")
        pruning.inspect(Forecasts(Prune, scores=None), probe)
    except GradmapError as error:
        return Outcome("refused", note=str(error).replace(str(base), "it").removeprefix("'it' is ").replace("'it'", "the model"))
    calibration = make_calibration(graph, folder / "calibration")
    try:
        GradmapScore(sample_share=1.0, layers=2).inspect(Forecasts(GradmapScore), probe)
    except GradmapError as error:
        outcome.note = f"scores: {error}"
        pruned = run_stage(Prune(layers=LISTED), folder / "prune", model=graph).model
    else:
        scores = run_stage(GradmapScore(sample_share=1.0, layers=2), folder / "score", model=graph, calibration=calibration).scores
        plain = score_by_backward(base, graph, calibration)
        outcome.scores = {layer: (score, plain[layer]) for layer, score in scores.decisions[0].scores.items()}
        pruned = run_stage(pruning, folder / "prune", model=graph, scores=scores).model
    outcome.removed = pruned.removed
    result = pruned
    try:
        ProjectCompensate().inspect(Forecasts(ProjectCompensate), probe)
    except GradmapError as error:
        outcome.note = outcome.note or f"correction: {error}"
    else:
        done = run_stage(ProjectCompensate(), folder / "compensate", model=pruned, calibration=calibration)
        result = done.model
        outcome.sites = tuple(
            sorted({f"{site.parameter.removesuffix('.weight')} ({site.role})" for site in done.compensation.sites})
        )
    run_stage(ExportModel(to=folder / "out"), folder / "export", model=result)
    compare(result, base, folder / "out", outcome)
    return outcome


class NotBuiltError(Exception):
    """transformers does not make a small model of this type here."""


def make_model(folder: Path, model_type: str, **changes: Any) -> Path:
    """A random model with spread-out logits; of one that cannot be made small, the config alone."""
    try:
        config = make_config(model_type, **changes)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    except Exception as error:
        raise NotBuiltError(_first_line(error)) from error
    if size > LARGEST:
        config.save_pretrained(folder)
        return folder
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText if model_type in WHOLE else AutoModelForCausalLM
    model = whole.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
        try:
            model(input_ids=torch.ones(1, 8, dtype=torch.long))
        except Exception as error:
            raise NotBuiltError(f"does not run: {_first_line(error)}") from error
    model.save_pretrained(folder)
    make_tokenizer(folder)
    if model_type in WHOLE:
        (folder / "whole").touch()
    return folder


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:160]


def make_calibration(graph: ModelGraph, folder: Path) -> CalibrationSet:
    """Four sequences of 24 random tokens."""
    folder.mkdir()
    ids = torch.randint(3, 259, (4, 24), generator=torch.Generator().manual_seed(0))
    file = TensorFile.save(
        {"input_ids": ids.int(), "attention_mask": torch.ones_like(ids, dtype=torch.uint8)}, folder / "c.safetensors"
    )
    return CalibrationSet(
        tensors=file, samples=4, sequence_length=24, tokens=96, tokenizer=graph.base.tokenizer_sha256, source="random"
    )


def load(folder: Path) -> Any:
    """The model of a folder by plain transformers; nothing may be missing or left over."""
    whole = AutoModelForImageTextToText if (folder / "whole").exists() else AutoModelForCausalLM
    model, report = whole.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def score_by_backward(base: Path, graph: ModelGraph, calibration: CalibrationSet) -> dict[int, float]:
    """Σ |⟨∂loss/∂output, output - input⟩| of each layer, by one backward through the whole model."""
    model = load(base)
    _, layers = find_layer_list(model, graph.base.layers, graph.base.layer_prefix)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(index: int) -> Any:
        def hook(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple | list) else output
            hidden.retain_grad()
            seen[index] = (named["hidden_states"] if "hidden_states" in named else inputs[0], hidden)

        return hook

    for index, layer in enumerate(layers):
        layer.register_forward_hook(keep(index), with_kwargs=True)
    ids, _ = calibration.load()
    logits = model(input_ids=ids, use_cache=False).logits.float()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {
        index: float((output.grad * (output - entered).detach()).sum(-1).abs().double().sum())
        for index, (entered, output) in seen.items()
        if output.grad is not None
    }


def compare(graph: ModelGraph, base: Path, exported: Path, outcome: Outcome) -> None:
    """Logits of the export against the original's, in prefill and while generating."""
    from safetensors.torch import load_file, save_file

    if (base / "whole").exists():
        (exported / "whole").touch()
    dense, new = load(base), load(exported)
    patched = base.parent / "patched"
    shutil.copytree(base, patched)
    tensors = load_file(base / "model.safetensors")
    for name, file in graph.patches.items():
        tensors[name] = file.load()[name]
    save_file(tensors, patched / "model.safetensors", metadata={"format": "pt"})
    old = load(patched)
    with torch.no_grad(), skipping(old, graph):
        ids = torch.randint(3, 259, (2, PROMPT + GENERATED), generator=torch.Generator().manual_seed(1))
        outcome.difference = relative(logits_of(new, ids), logits_of(old, ids))
        try:
            dense_made, dense_steps = generate(dense, ids[:, :PROMPT])
        except Exception as error:
            outcome.note = f"transformers cannot generate with the original: {_first_line(error)}"
            return
        made, steps = generate(new, ids[:, :PROMPT])
        outcome.cached = relative(steps, generate(old, ids[:, :PROMPT])[1])
        outcome.uncached = relative(steps, logits_of(old, made)[:, PROMPT - 1 : -1])
        outcome.uncached_dense = relative(dense_steps, logits_of(dense, dense_made)[:, PROMPT - 1 : -1])


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(B, T, V), without a cache."""
    extra = {"num_logits_to_keep": None} if getattr(model.config, "num_logits_to_keep", None) else {}
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, **extra).logits
    return logits


def generate(model: Any, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences that greedy search makes with a cache, and the logits of each step (B, steps, V)."""
    settings = GenerationConfig(do_sample=False, max_new_tokens=GENERATED, use_cache=True, pad_token_id=0)
    settings.return_dict_in_generate = settings.output_logits = True
    model.generation_config = settings
    result = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    return result.sequences, torch.stack(result.logits, dim=1)


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, in parts of the largest value."""
    assert ours.shape == expected.shape
    assert ours.isfinite().all()
    return float((ours - expected).abs().max() / expected.abs().max())


@contextmanager
def skipping(model: Any, graph: ModelGraph) -> Iterator[None]:
    """The model, with its removed layers returning what they are given, in the form they return it."""
    _, layers = find_layer_list(model, graph.base.layers, graph.base.layer_prefix)
    returned: list[Any] = []
    with torch.no_grad():
        handle = layers[0].register_forward_hook(lambda _module, _inputs, output: returned.append(output))
        model(input_ids=torch.ones(1, 2, dtype=torch.long), use_cache=False)
        handle.remove()

    def skip(*inputs: Any, **named: Any) -> Any:
        hidden = named["hidden_states"] if "hidden_states" in named else inputs[0]
        like = returned[0]
        if "state" in named:  # rwkv hands on what it remembers of the tokens before
            like = (hidden, named["state"], *like[2:])
        return type(like)([hidden, *like[1:]]) if isinstance(like, tuple | list) else hidden

    for index in graph.removed:
        layers[index].forward = skip
    yield


HEADER = """# Architectures

Every causal LM that transformers {version} registers, taken through every stage as a random model of {depth} layers, of several
kinds where the architecture has them (`tests/walk.py`, configs in `tests/zoo.py`). Two layers are removed. {works} of {count} work:
the export loads with plain transformers, and its logits equal those of the original with the same layers skipped, without a cache
and with one over {generated} generated tokens; the scores equal those of a plain backward pass.

`corrected in` is where `project_compensate` folds its correction: a linear map that writes to the layer's output, through a norm or
not, that norm, or, before experts, the output projection of attention. Refusals come before any step runs.

| model type | status | corrected in | note |
|---|---|---|---|
"""


def describe(model_type: str, outcome: Outcome) -> str:
    """One row of the table."""
    sites = ", ".join(f"`{site.partition(' ')[0]}` {site.partition(' ')[2]}".replace(" (output)", "") for site in outcome.sites)
    return f"| {model_type} | {outcome.status} | {sites} | {outcome.note.replace('|', '/')} |"


def main(target: Path) -> None:
    """Write the table of all architectures, or show what becomes of some."""
    from tempfile import TemporaryDirectory

    from transformers import __version__
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows, works = [], 0
    for model_type in ARCHITECTURES:
        with TemporaryDirectory() as folder:
            outcome = walk(model_type, Path(folder))
        rows.append(describe(model_type, outcome))
        works += outcome.status == "works"
        print(rows[-1], flush=True)
    text = HEADER.format(version=__version__, depth=DEPTH, works=works, count=len(rows), generated=GENERATED)
    target.write_text(text + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
