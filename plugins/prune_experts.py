"""Remove experts from a mixture of experts: the same number in every layer that has some, so that every loader takes what is left.

Source: REAP, https://arxiv.org/abs/2510.13999: an expert's saliency is the mean, over the tokens that the router sends to it, of
the router's weight times the norm of the expert's output.
Sizes: N tokens, D hidden, E experts of a layer, K experts that a token is sent to.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, model_validator

from gradmap_pipeline import (
    Artifact,
    CalibrationSet,
    Context,
    Estimate,
    ExpertLayout,
    Forecasts,
    ModelCosts,
    ModelError,
    ModelGraph,
    OptionError,
    Stage,
    StageError,
    StructureProbe,
    TensorFile,
    check_tokenizer,
    find_experts,
    hookimpl,
    known,
    open_sweep,
    write_fewer_experts,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

Routed = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]
"""What experts are called with: hidden states (N, D), experts int64 (N, K), and the router's weights (N, K)."""


def add_saliency(experts: nn.Module, routed: Routed, is_real: torch.Tensor, saliency: torch.Tensor, tokens: torch.Tensor) -> None:
    """Add Σ g·‖f(x)‖ to `saliency`, and to `tokens` their number: (E,) fp64. `is_real`: bool (N,), False where padded."""
    import torch

    hidden, chosen, weights = routed
    for expert in range(len(saliency)):
        row, place = torch.where((chosen == expert) & is_real[:, None])
        if len(row):
            one = torch.full((len(row), 1), expert, dtype=chosen.dtype, device=chosen.device)
            output = experts(hidden[row], one, torch.ones_like(one, dtype=weights.dtype))
            saliency[expert] += (weights[row, place].double() * output.double().norm(dim=-1)).sum().cpu()
            tokens[expert] += len(row)


class ExpertScores(Artifact):
    """How experts were ranked, and which were kept."""

    model: str
    """Digest of the model that was scored."""
    criterion: str
    scores: dict[int, list[float]]
    """By base layer, of each expert; higher means keep."""
    kept: dict[int, list[int]]
    """By base layer, in ascending order, which is that of their new numbers."""
    weights: list[TensorFile]
    """Files of the model that is left."""


class PruneExperts(Stage):
    """Remove the experts of a mixture that matter least, the same number in each layer."""

    name = "prune_experts"

    ratio: float | None = Field(None, gt=0, lt=1, description="Share of the experts of a layer to remove. Default: 0.25.")
    experts: int | None = Field(None, ge=1, description="How many experts of each layer to remove, instead of `ratio`.")
    criterion: Literal["reap", "frequency", "random"] = Field(
        "reap",
        description="`reap`: the router's weight times the norm of the expert's output, averaged over the tokens sent to it. "
        "`frequency`: how many tokens are sent to it. `random`: a baseline.",
    )

    class Inputs(BaseModel):
        model: ModelGraph
        calibration: CalibrationSet

    class Outputs(BaseModel):
        model: ModelGraph
        experts: ExpertScores

    @model_validator(mode="after")
    def _check_choice(self) -> PruneExperts:
        if self.ratio is not None and self.experts is not None:
            raise ValueError("give 'ratio' or 'experts', not both")
        return self

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        self._count_removed(find_experts(probe.graph))
        probe.check_layerwise()

    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        text, layers = inputs.of(CalibrationSet), known(inputs.of(ModelGraph).layers)
        size = costs.count_bytes(layers)
        writing = Estimate(
            costs.program_bytes, size, size, seconds=size * (costs.speed.read_again(size) + costs.speed.write), disk_bytes=size
        )
        sweep = costs.forward_sweep(layers, known(text.samples), known(text.sequence_length), losses=False)
        return (sweep if self.criterion == "random" else sweep * 2) + writing

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        check_tokenizer(inputs.calibration, inputs.model)
        model = inputs.model
        layout = find_experts(model)
        removed = self._count_removed(layout)
        if self.criterion == "random":
            drawn = random.Random(context.seed)
            scores = {layer: [drawn.random() for _ in range(layout.count)] for layer in layout.layers}
        else:
            key = {"model": model.digest, "calibration": inputs.calibration.digest}
            measured = context.remember(key, lambda: self._measure(model, layout, inputs.calibration, context))
            scores = {int(layer): figures[self.criterion] for layer, figures in measured.items()}
        kept = {
            layer: sorted(sorted(range(layout.count), key=lambda expert: (-values[expert], expert))[: layout.count - removed])
            for layer, values in scores.items()
        }
        smaller, weights = write_fewer_experts(model, layout, kept, context.folder / "fewer", context)
        context.note(f"removed {removed} of {layout.count} experts in each of {len(kept)} layers")
        ranked = ExpertScores(model=model.digest, criterion=self.criterion, scores=scores, kept=kept, weights=weights)
        return self.Outputs(model=smaller, experts=ranked)

    def _count_removed(self, layout: ExpertLayout) -> int:
        """Raises `OptionError` where fewer are left than a token is sent to."""
        option = "experts" if self.experts is not None else "ratio"
        removed = (
            self.experts if self.experts is not None else max(1, round(layout.count * (0.25 if self.ratio is None else self.ratio)))
        )
        if layout.count - removed < layout.chosen:
            raise OptionError(
                option,
                f"removing {removed} of {layout.count} experts leaves {max(layout.count - removed, 0)}, and each token is sent to "
                f"{layout.chosen}; remove {layout.count - layout.chosen} at most",
            )
        return removed

    @staticmethod
    def _measure(model: ModelGraph, layout: ExpertLayout, calibration: CalibrationSet, context: Context) -> dict[str, Any]:
        """By layer: the mean saliency of each expert, and how many tokens it gets."""
        import torch

        results: dict[str, Any] = {}
        with open_sweep(model, calibration.load(), context) as sweep, torch.no_grad():
            units = len(sweep.batches) * len(model.layers)
            with context.progress("score experts", units, "layer batch") as sweep.advance:
                sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
                for step in sweep.forward():
                    if step.layer not in layout.layers:
                        for _ in step:
                            pass
                        continue
                    saliency, tokens = sums.setdefault(
                        step.layer, (torch.zeros(layout.count).double(), torch.zeros(layout.count).double())
                    )
                    experts = find_expert_module(step.module)
                    with _routed(experts) as calls:
                        for visit in step:
                            if len(calls) != 1:
                                raise StageError(f"the experts of layer {step.layer} were called {len(calls)} times for one batch")
                            add_saliency(experts, calls.pop(), visit.mask.flatten(), saliency, tokens)
                            calls.clear()
        for layer, (saliency, tokens) in sums.items():
            results[str(layer)] = {"reap": (saliency / tokens.clamp(min=1)).tolist(), "frequency": tokens.tolist()}
        return results


def find_expert_module(layer: nn.Module) -> nn.Module:
    """The module of a layer that gets hidden states, experts and weights. Raises `ModelError` unless there is one."""
    modules: list[nn.Module] = [
        module for name, module in layer.named_modules() if name.split(".")[-1] == "experts" and not hasattr(module, "__len__")
    ]
    if len(modules) != 1:
        raise ModelError(
            f"{type(layer).__name__} has {len(modules)} modules of experts that a router's choice is given to; one is needed"
        )
    return modules[0]


@contextmanager
def _routed(experts: nn.Module) -> Iterator[list[Routed]]:
    """What the experts are called with, while the block runs and outside of what it calls itself."""
    calls: list[Routed] = []

    def listen(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden, chosen, weights = (*given, *named.values())
        calls.append(
            (
                hidden.reshape(-1, hidden.shape[-1]).detach(),
                chosen.reshape(-1, chosen.shape[-1]),
                weights.reshape(-1, weights.shape[-1]),
            )
        )

    handle = experts.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [PruneExperts]
