"""A recipe to start from: written for one model and this machine, with comments, and tried until it plans without error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import GradmapError
from ..recipe.plan import Plan, make_plan
from ..recipe.recipe import read_recipe
from .costs import estimate_plan
from .store import Store
from .verdicts import inspect_once

if TYPE_CHECKING:
    from ..machine.machine import Machine
    from ..recipe.catalog import Catalog

QUANTISATIONS = {
    "onnx": ("quantize_onnx", {"method": "int8"}, "8-bit weights for ONNX Runtime"),
    "torchao": ("quantize_torchao", {"method": "int8"}, "8-bit weights for transformers with torchao"),
    "gguf": ("quantize_gguf", {"type": "q4_k_m"}, "4-bit weights for llama.cpp"),
}
"""By what `--quantise` says: the stage, its options, and what it makes."""
_RANKINGS = {
    "lookahead_score": "Ranks layers by what the corrected model predicts without them; `gradmap_score` is faster and worse.",
    "gradmap_score": "Ranks layers by their gradients.",
}
"""By stage: the comment before it."""
_SAMPLES = (128, 64, 32, 16, 8)
_LENGTH = 512
_SHORT = 256
"""Tokens in a sequence of a model for which answers of the usual length are too long."""


@dataclass(frozen=True)
class Start:
    """What a recipe is to do."""

    model: dict[str, Any]
    """`model` of the recipe."""
    title: str
    """Of the model, for the first comment."""
    out: str
    """Name of the folders it writes, in `out`."""
    prune: dict[str, Any]
    """`ratio` or `target`."""
    length: int = _LENGTH
    """Tokens in a sequence."""
    samples: int = _SAMPLES[0]
    among: str = "any"
    ranking: str = "lookahead_score"
    is_corrected: bool = True
    quantisation: str | None = None
    answers: bool = False
    """Whether prompts are answered before and after."""


def write_starting_recipe(start: Start) -> str:
    """The recipe as YAML, a comment before what a user is likely to change."""
    amount = f"samples: {start.samples}, sequence_length: {start.length}"
    prune = _flow({**start.prune, **({} if start.among == "any" else {"among": start.among})})
    lines = [
        f"# {start.title}",
        "# `gradmap plan` says what it takes, `gradmap run` runs it, and `gradmap suggest` shows how small the model can get.",
        "version: 1",
        f"model: {_flow(start.model)}",
        "seed: 0",
        "steps:",
        "  # The text that quality is measured on. Python code comes along; name one like what the model is used for:",
        "  # {path: held-out.txt}, or {id: Salesforce/wikitext, config: wikitext-2-raw-v1, split: test} from the hub.",
        "  - use: evaluate",
        "    id: evaluate_dense",
        "    with: &measure {dataset: {builtin: heldout}, " + amount + "}",
        "  # The text that decides which layers go and what the correction fits. More text closes more of the gap.",
        "  - use: calibrate",
        "    with: {dataset: {builtin: calibration}, " + amount + "}",
        f"  # {_RANKINGS[start.ranking]}",
        f"  - use: {start.ranking}",
        "  # How much goes: a share (`ratio`), a number (`layers`) or a `target` of parameters, bytes, perplexity or speed.",
        "  - use: prune",
        f"    with: {prune}",
        "  - use: evaluate",
        "    id: evaluate_pruned",
        "    with: *measure",
    ]
    if start.is_corrected:
        lines += [
            "  # Folds what is missing into weights that are there. `refit_layers` after it recovers more, and takes longer.",
            "  - use: project_compensate",
            "  - use: evaluate",
            "    with: *measure",
            "    # limits: {perplexity: {max_ratio: 2.0}}  # ends the run with exit code 5 where it is missed",
        ]
    if start.answers:
        lines += ["  # Answers of both models to three prompts; give your own with `prompts: [...]`.", "  - use: answer_prompts"]
        if start.length < _SHORT:
            lines += [f"    with: {{tokens: {max(1, start.length // 4)}}}"]
    if start.quantisation is None:
        lines += ["  - use: export", f"    with: {{to: out/{start.out}}}"]
    else:
        stage, options, made = QUANTISATIONS[start.quantisation]
        if start.quantisation == "onnx":
            lines += ["  - use: export", f"    with: {{format: onnx, to: out/{start.out}-onnx}}"]
        lines += [
            f"  # {made[0].upper()}{made[1:]}.",
            f"  - use: {stage}",
            f"    with: {_flow({**options, 'to': f'out/{start.out}-{start.quantisation}'})}",
        ]
    return "\n".join(lines) + "\n"


def fit_start(start: Start, file: Path, catalog: Catalog, machine: Machine, store: Path) -> Start:
    """The first variant that plans without error: the choice of layers, the correction and the amount of text give way.

    Raises what the variant nearest to the wish is refused with, where none does.
    """
    refusal: GradmapError | None = None
    for variant in _vary(start):
        try:
            plan = make_plan(read_recipe(write_starting_recipe(variant), file), catalog, store)
            inspect_once(plan, Store(store))
        except GradmapError as error:
            refusal = refusal or error
            continue
        fitted = _fit_samples(variant, plan, file, catalog, machine, store)
        inspect_once(make_plan(read_recipe(write_starting_recipe(fitted), file), catalog, store), Store(store))  # `check` will know
        return fitted
    assert refusal is not None
    raise refusal


def _vary(start: Start) -> Iterator[Start]:
    for ranking, is_corrected in (("lookahead_score", True), ("gradmap_score", True), ("gradmap_score", False)):
        for among in ("any", "expressible"):
            yield replace(start, among=among, ranking=ranking, is_corrected=is_corrected)


def _fit_samples(start: Start, plan: Plan, file: Path, catalog: Catalog, machine: Machine, store: Path) -> Start:
    """With as much text as the memory allows; with the least where not even that fits, which `plan` then says."""
    for samples in _SAMPLES:
        fewer = replace(start, samples=samples)
        plan = make_plan(read_recipe(write_starting_recipe(fewer), file), catalog, store)
        costs = estimate_plan(plan, machine, store)
        if costs is None or not costs.obstacles:
            return fewer
    return fewer


def _flow(value: dict[str, Any]) -> str:
    """A mapping on one line."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).strip()
