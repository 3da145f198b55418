"""GradMAP's second stage: correct the drift that removed layers leave, in closed form, inside a down-projection.

Source: https://arxiv.org/abs/2602.14649; here the exact ridge optimum stands in for a short training of the same objective.
Sizes: N tokens that are not padding, F inputs of the down-projection, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, model_validator

from gradmap_pipeline import Artifact, CalibrationSet, CapacityError, Context, ModelGraph, Stage, StageError, TensorFile, hookimpl

if TYPE_CHECKING:
    import torch

    from gradmap_pipeline.group import Group
    from gradmap_pipeline.model.boundaries import Boundaries
    from gradmap_pipeline.model.layerwise import LayerwiseModel
    from gradmap_pipeline.model.projection import Projection
    from gradmap_pipeline.model.sweep import Sweep


def solve_ridge(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> tuple[torch.Tensor, float]:
    """X (F, D) minimising ‖A X - R‖² + λ‖X‖², from gram = AᵀA (F, F) and cross = AᵀR (F, D), both fp64; and λ.

    λ is `ridge` times the mean of the diagonal of AᵀA. `gram` is overwritten, so that one (F, F) matrix is all there is.
    """
    import torch

    penalty = ridge * float(gram.diagonal().mean())
    gram.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(gram.mT, out=(gram.mT, torch.empty((), dtype=torch.int32, device=gram.device)))
    if int(failed):
        raise StageError("the calibration tokens do not determine the correction (singular Gram matrix); raise 'ridge'")
    below = torch.linalg.solve_triangular(factor, cross, upper=False)
    return torch.linalg.solve_triangular(factor.mT, below, upper=True), penalty


@dataclass
class Drift:
    """Sums over tokens, fp64, from which the mean shift at one boundary follows."""

    difference: torch.Tensor | float = 0.0
    """Σ (h' - h), (D,)"""
    norm: float = 0.0
    """Σ ‖h‖"""
    tokens: int = 0

    def add(self, drifted: torch.Tensor, target: torch.Tensor) -> None:
        """Both (n, D), fp64."""
        self.difference = self.difference + (drifted - target).sum(0)
        self.norm += float(target.norm(dim=-1).sum())
        self.tokens += len(target)

    def join(self, group: Group) -> None:
        """Sum over the processes of a group."""
        group.sum(self.difference)  # type: ignore[arg-type]
        sums = group.sum_values({"norm": self.norm, "tokens": self.tokens})
        self.norm, self.tokens = sums["norm"], int(sums["tokens"])

    @property
    def shift(self) -> float:
        """‖E[h'] - E[h]‖"""
        return float((self.difference / self.tokens).norm())  # type: ignore[union-attr]

    @property
    def relative_shift(self) -> float:
        """Over E‖h‖."""
        return self.shift / max(self.norm / self.tokens, 1e-300)


@dataclass
class Moments:
    """Sums over tokens, fp64, from which a correction at one layer follows."""

    gram: torch.Tensor
    """AᵀA (F, F), A the inputs (or, in output space, the outputs) of the down-projection in the pruned model."""
    cross: torch.Tensor
    """AᵀR (F, D), R the residual that is missing."""
    missing: float
    """‖R‖²"""

    def add(self, a: torch.Tensor, r: torch.Tensor) -> None:
        """a (n, F), r (n, D), fp64."""
        self.gram += a.T @ a
        self.cross += a.T @ r
        self.missing += float(r.square().sum())

    def join(self, group: Group) -> None:
        """Sum over the processes of a group."""
        group.sum(self.gram)
        group.sum(self.cross)
        self.missing = group.sum_values({"missing": self.missing})["missing"]

    def solve(self, ridge: float) -> tuple[torch.Tensor, float]:
        """The correction X (F, D), and the share of ‖R‖² that is left after it. Overwrites `gram`."""
        x, penalty = solve_ridge(self.gram, self.cross, ridge)
        # ‖R - A X‖² = ‖R‖² - 2⟨X, C⟩ + ⟨X, G X⟩, and (G + λ) X = C.
        left = self.missing - float((x * self.cross).sum()) - penalty * float(x.square().sum())
        return x, left / max(self.missing, 1e-300)


class CorrectedSite(BaseModel):
    """What was done at one layer."""

    layer: int
    """Base layer whose down-projection takes the correction."""
    parameter: str
    shift: float
    """‖E[h'] - E[h]‖ at the layer's output, before the correction."""
    relative_shift: float
    """Shift over the mean norm of h."""
    missing_left: float
    """Share of the squared missing residual that the correction leaves, on the calibration tokens."""


class Compensation(Artifact):
    """Where a pruned model was corrected, and how far it had drifted there."""

    sites: tuple[CorrectedSite, ...]
    shifts: dict[int, float]
    """Mean shift by kept base layer, before any correction."""


class ProjectCompensate(Stage):
    """Fold a ridge correction of the drift after removed layers into down-projections; no parameter is added."""

    name = "project_compensate"
    parallel = True

    space: Literal["input", "output"] = Field(
        "input",
        description="`input`: add a matrix to the down-projection. `output`: multiply it by one near the identity.",
    )
    site: Literal["largest_shift", "largest_relative_shift", "before_cuts", "every_layer"] = Field(
        "every_layer",
        description="Which layers to correct: those with the largest mean shift, absolute or relative to the mean norm; "
        "those right before removed layers; or every layer from the first removal up, in order.",
    )
    sites: int | None = Field(
        None, ge=1, description="How many layers to correct. Default: 1 for the largest shift, all of them otherwise."
    )
    ridge: float = Field(0.1, gt=0, description="Regularisation, relative to the mean diagonal of the Gram matrix.")

    class Inputs(BaseModel):
        model: ModelGraph
        calibration: CalibrationSet

    class Outputs(BaseModel):
        model: ModelGraph
        compensation: Compensation

    @model_validator(mode="after")
    def _check_combinations(self) -> ProjectCompensate:
        if self.sites is not None and not self.site.startswith("largest"):
            raise ValueError(f"'sites' counts the layers of largest shift; site {self.site!r} names its layers itself")
        return self

    def forecast(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"model": inputs.get("model")}

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        from gradmap_pipeline.data import check_tokenizer

        check_tokenizer(inputs.calibration, inputs.model)
        graph = inputs.model
        if not graph.removed:
            raise StageError("the model has all its layers, so there is nothing to correct; put prune before this step")
        streams = open_streams(graph, inputs.calibration, context)
        drift = streams.measure_drift()
        corrected: list[CorrectedSite] = []
        patches: dict[str, TensorFile] = {}
        planned = self._choose_all(graph)
        count = len(planned) if planned else self.sites or 1
        with context.progress("correct layers", count, "layer") as advance:
            for number in range(count):
                layer = planned[number] if planned else self._choose_largest(streams.measure_drift(), corrected)
                site, new_patches = streams.correct(layer, self.space, self.ridge, context)
                corrected.append(site)
                patches |= new_patches
                advance()
        for site in corrected:
            context.note(
                f"layer {site.layer}: shift {site.shift:.3g} ({site.relative_shift:.1%} of the mean norm), "
                f"{1 - site.missing_left:.1%} of the missing residual restored"
            )
        return self.Outputs(
            model=graph.with_patches(patches, "compensated"),
            compensation=Compensation(sites=tuple(corrected), shifts={layer: at.shift for layer, at in drift.items()}),
        )

    def _choose_all(self, graph: ModelGraph) -> list[int]:
        """Layers to correct in order, where the options name them without a measurement."""
        after_first_cut = [layer for layer in graph.layers if layer + 1 >= graph.removed[0]]
        if self.site == "every_layer":
            return after_first_cut
        if self.site != "before_cuts":
            return []
        before = [layer for layer in after_first_cut if layer + 1 in graph.removed]
        if not before:
            raise StageError("site 'before_cuts' needs a kept layer below a removed one, and none is; use 'every_layer'")
        return before

    def _choose_largest(self, drift: dict[int, Drift], corrected: list[CorrectedSite]) -> int:
        free = {layer: at for layer, at in drift.items() if layer not in {site.layer for site in corrected}}
        if not free:
            raise StageError(f"'sites' is {self.sites}, but the model has only {len(drift)} layers that drift")
        if self.site == "largest_relative_shift":
            return max(free, key=lambda layer: free[layer].relative_shift)
        return max(free, key=lambda layer: free[layer].shift)


def open_streams(graph: ModelGraph, calibration: CalibrationSet, context: Context) -> Streams:
    """Run the original model, keep what enters its kept layers, and get the pruned one ready; one model is in memory at a time."""
    from gradmap_pipeline.memory import resident_bytes
    from gradmap_pipeline.model.batches import make_batches
    from gradmap_pipeline.model.boundaries import Boundaries
    from gradmap_pipeline.model.budget import choose_way, measure_needs
    from gradmap_pipeline.model.layerwise import LayerwiseModel
    from gradmap_pipeline.model.sweep import Sweep

    ids, mask = map(context.group.share, calibration.load())
    samples, tokens = ids.shape

    def open_model(graph: ModelGraph) -> LayerwiseModel:
        return LayerwiseModel(graph, device=context.device, dtype=context.dtype, resident_bytes=0)

    model = open_model(graph.dense)
    needs = measure_needs(model, samples, tokens, backward=False)
    # Half for the boundaries of each stream; what the correction itself takes is checked where it starts.
    way = choose_way(needs, (context.memory - resident_bytes()) // 2, divisible=False)
    batches = make_batches(ids, mask, way.batch_samples * tokens)
    layers = graph.base.layers + len(graph.layers)
    with context.progress("run both models", layers * len(batches), "layer batch") as advance:
        targets = Boundaries(way.boundary_limit, context.folder)
        model.resident = way.resident
        original = Sweep(model, batches, boundaries=targets, advance=advance)
        for step in original.forward():
            for _ in step:
                pass
            if step.layer not in graph.layers or step.layer < graph.removed[0]:
                targets.drop(step.layer)  # nothing is compared there
        del original, step
        model = open_model(graph)
        model.resident = way.resident
        pruned = Sweep(model, batches, boundaries=Boundaries(way.boundary_limit, context.folder), advance=advance)
        pruned.run_forward()
    pruned.advance = lambda units=1, /: None
    return Streams(targets, pruned, graph, context.group)


@dataclass
class Streams:
    """The same tokens inside the original and the pruned model."""

    targets: Boundaries
    """What enters each layer of the original model, where the pruned model has that layer too and has lost one before."""
    pruned: Sweep
    graph: ModelGraph
    group: Group

    def target(self, position: int, batch: int) -> torch.Tensor:
        """What should leave the kept layer at `position`: what enters the next kept layer in the original model."""
        kept = self.graph.layers
        return self.targets.get(kept[position + 1] if position + 1 < len(kept) else self.graph.base.layers, batch)

    def measure_drift(self) -> dict[int, Drift]:
        """Drift at the output of every kept layer from the first removal up."""
        self.pruned.run_forward()
        found = {}
        for position, layer in enumerate(self.graph.layers):
            if layer + 1 >= self.graph.removed[0]:
                found[layer] = Drift()
                for index, batch in enumerate(self.pruned.batches):
                    drifted, target = self.pruned.boundary(position + 1, index), self.target(position, index)
                    mask = batch.mask.to(target.device)
                    found[layer].add(drifted[mask].double(), target[mask].double())
                found[layer].join(self.group)
        return found

    def correct(self, layer: int, space: str, ridge: float, context: Context) -> tuple[CorrectedSite, dict[str, TensorFile]]:
        """Solve for the correction at one layer, put it into the pruned stream, and write the patched tensors."""
        import torch

        model = self.pruned.model
        projection, moments, drift = self._collect(layer, space, context)
        x, left = moments.solve(ridge)
        del moments
        with model.layer(layer) as module:
            weight = module.get_parameter(f"{projection.name}.weight").detach().double()
            weight = weight.T if projection.transposed else weight  # (D, F)
            new = {f"{projection.name}.weight": weight + (x.T if space == "input" else x.T @ weight)}
            bias = module.get_submodule(projection.name).bias
            if space == "output" and bias is not None:
                new[f"{projection.name}.bias"] = bias.detach().double() + x.T @ bias.detach().double()
            if projection.transposed:
                new[f"{projection.name}.weight"] = new[f"{projection.name}.weight"].T
        patches = {}
        for parameter, value in new.items():
            name = model.disk_name(layer, parameter)
            stored = self.graph.stored_tensor(name)
            rounded = value.to(getattr(torch, self.graph.dtype or stored.torch_dtype)).contiguous().cpu()
            patches[name] = TensorFile.save({name: rounded}, context.folder / f"{name}.safetensors")
            model.override(layer, parameter, rounded)
        self.pruned.invalidate_from(layer)
        site = CorrectedSite(
            layer=layer,
            parameter=f"{projection.name}.weight",
            shift=drift.shift,
            relative_shift=drift.relative_shift,
            missing_left=left,
        )
        return site, patches

    def _collect(self, layer: int, space: str, context: Context) -> tuple[Projection, Moments, Drift]:
        """Run the layer once more in the pruned stream and sum what the ridge problem needs."""
        import torch

        from gradmap_pipeline.model.projection import find_down_projection

        position = self.graph.layers.index(layer)
        self.pruned.invalidate_from(layer)
        for step in self.pruned.forward():
            if step.layer != layer:
                continue
            hidden = self.pruned.boundary(position, 0)
            projection = find_down_projection(self.pruned.model, layer, hidden, self.pruned.arguments(0, layer))
            size, width = (projection.inputs if space == "input" else hidden.shape[-1]), hidden.shape[-1]
            check_room(size, width, context)
            zeros = {"dtype": torch.float64, "device": hidden.device}
            moments = Moments(torch.zeros(size, size, **zeros), torch.zeros(size, width, **zeros), 0.0)
            drift = Drift()
            with capture(self.pruned.model, layer, projection, space) as captured:
                for visit in step:
                    drifted, target = visit.output[visit.mask].double(), self.target(position, visit.batch)[visit.mask].double()
                    moments.add(captured.pop().reshape(*visit.mask.shape, -1)[visit.mask].double(), target - drifted)
                    drift.add(drifted, target)
            moments.join(self.group)
            drift.join(self.group)
            return projection, moments, drift
        raise AssertionError(f"layer {layer} is not in the sweep")


def check_room(inputs: int, width: int, context: Context) -> None:
    """Raise `CapacityError` unless the fp64 sums of one correction, and their solution, fit into memory."""
    from gradmap_pipeline.memory import resident_bytes

    needed = 8 * (inputs * inputs + 3 * inputs * width)
    free = context.memory - resident_bytes()
    if needed > free:
        raise CapacityError(
            f"correcting {inputs} inputs takes {needed / 2**30:.2f} GiB, and {max(0, free) / 2**30:.2f} GiB are free; "
            "use space: output, or allow more with --memory"
        )


@contextmanager
def capture(model: LayerwiseModel, layer: int, projection: Projection, space: str) -> Iterator[list[torch.Tensor]]:
    """Collect what enters (`input`) or leaves (`output`) a linear map each time its layer runs."""
    captured: list[torch.Tensor] = []

    def listen(_module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        captured.append(inputs[0] if space == "input" else output)

    handle = model.module.get_submodule(f"{model.layers_path}.{layer}.{projection.name}").register_forward_hook(listen)
    try:
        yield captured
    finally:
        handle.remove()


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [ProjectCompensate]
