"""LinearPatch: scale the channels of the rotated residual stream at each cut to the size they had.

Source: https://arxiv.org/abs/2505.24680. With H a Hadamard matrix over √D, x what enters the cut and y what left the removed
layers, d_c is the mean over samples of mean_t |yH|_c / mean_t |xH|_c, and P = H diag(d) Hᵀ. The published model multiplies
the stream by P, with a matrix of its own. Here that is folded: the down-projection before the cut gets the least-squares fit of
x(P - I), and where that leaves more than a tolerance the step is refused.
Sizes: B sequences, T tokens, N tokens that are not padding, D hidden.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from gradmap_pipeline import (
    CalibrationSet,
    Compensation,
    Context,
    CorrectedSite,
    Estimate,
    ModelGraph,
    Rehearsal,
    Stage,
    StageError,
    Survey,
    TensorFile,
    Work,
    hookimpl,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from gradmap_pipeline.model.sites import Site
    from gradmap_pipeline.model.streams import Streams

_RIDGE = 1e-6  # for the fold alone, which is to reproduce a known matrix


def make_hadamard(size: int) -> torch.Tensor:
    """H (size, size), entries ±1, HHᵀ = size·I, fp64: Sylvester's doubling of a matrix by Paley.

    Raises `StageError` where these constructions have none. Source: https://en.wikipedia.org/wiki/Paley_construction
    """
    import torch

    doubled = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    matrix = _make_paley(size)
    if matrix is None and size % 2:
        raise StageError("no Hadamard matrix of the hidden size is known here, and linearpatch_compensate needs one")
    return torch.kron(doubled, make_hadamard(size // 2)) if matrix is None else matrix


def _make_paley(size: int) -> torch.Tensor | None:
    """Paley's first construction for size q + 1 with a prime q ≡ 3 mod 4, his second for 2(q + 1) with q ≡ 1 mod 4."""
    import torch

    def is_prime(number: int) -> bool:
        return number > 2 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))

    def bordered(prime: int, sign: float) -> torch.Tensor:
        """Jacobsthal's matrix with a border of ones."""
        squares = {number * number % prime for number in range(1, prime)}
        row = torch.tensor([0.0] + [1.0 if number in squares else -1.0 for number in range(1, prime)], dtype=torch.float64)
        inner = torch.stack([torch.roll(row, shift) for shift in range(prime)]).T
        matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
        matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1.0, sign, inner
        return matrix

    if size % 4 == 0 and is_prime(size - 1):
        return bordered(size - 1, -1.0) + torch.eye(size, dtype=torch.float64)
    prime = size // 2 - 1
    if size % 4 == 0 and prime % 4 == 1 and is_prime(prime):
        one, other = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
        return torch.kron(bordered(prime, 1.0), one) + torch.kron(torch.eye(prime + 1, dtype=torch.float64), other)
    return None


def channel_ratios(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Σ over samples of mean_t |yH| / mean_t |xH|, (D,). before, after (B, T, D); mask bool (B, T); rotation (D, D)."""
    real = mask[..., None].double()
    sizes = [((hidden.double() @ rotation).abs() * real).sum(1) / real.sum(1) for hidden in (before, after)]
    ratios: torch.Tensor = sizes[1] / sizes[0].clamp_min(1e-12)
    return ratios.sum(0)


class LinearpatchCompensate(Stage):
    """Fold a channel-wise rescaling of the rotated stream into the layer before each cut (LinearPatch)."""

    name = "linearpatch_compensate"
    parallel = True

    tolerance: float = Field(
        0.1, gt=0, le=1, description="Largest share of what the patch adds that folding may leave out before the step is refused."
    )

    class Inputs(BaseModel):
        model: ModelGraph
        calibration: CalibrationSet

    class Outputs(BaseModel):
        model: ModelGraph
        compensation: Compensation
        work: Work

    def forecast(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"model": inputs.get("model")}

    def inspect(self, inputs: Mapping[str, Any], survey: Survey) -> None:
        survey.check_layerwise()

    def estimate(self, inputs: Mapping[str, Any], rehearsal: Rehearsal) -> Estimate | None:
        model, calibration = inputs.get("model"), inputs.get("calibration")
        if model is None or model.layers is None or calibration is None or calibration.sequence_length is None:
            return None
        from gradmap_pipeline.model.ridge import room_for

        cuts = min(len(rehearsal.graph.layers) - model.layers, model.layers)
        room = room_for(*rehearsal.graph.map_sizes())
        return rehearsal.two_streams(model.layers, calibration.samples, calibration.sequence_length, room, 2 * cuts)

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        from gradmap_pipeline.data import check_tokenizer
        from gradmap_pipeline.model.correction import layers_before_cuts, sites_of
        from gradmap_pipeline.model.ridge import room_for
        from gradmap_pipeline.model.streams import open_streams

        check_tokenizer(inputs.calibration, inputs.model)
        started = time.perf_counter()
        graph = inputs.model
        layers = layers_before_cuts(graph)
        sizes = graph.map_sizes()
        rotation = make_hadamard(sizes[1]) / sizes[1] ** 0.5
        known = Survey(graph, context.memory).find_sites()
        streams = open_streams(graph, inputs.calibration, context, room_for(*sizes))
        corrected: list[CorrectedSite] = []
        patches: dict[str, TensorFile] = {}
        with context.progress("patch cuts", len(layers), "cut") as advance:
            for layer in layers:
                writing = [site for site in sites_of(streams, layer, known) if site.kind == "output"]
                if not writing:
                    raise StageError(f"layer {layer} has no linear map that writes to its output, which a patch is folded into")
                patch = find_patch(streams, layer, rotation)
                done, new = fold_patch(streams, layer, writing[-1], patch, context)
                if done.missing_left > self.tolerance:
                    raise StageError(
                        f"the patch after layer {layer} cannot be folded into {done.parameter}: {done.missing_left:.0%} of what it "
                        f"adds would be left out, over 'tolerance' ({self.tolerance:g}); raise it to take the nearest fold"
                    )
                corrected.append(done)
                patches |= new
                context.note(f"layer {layer}: {1 - done.missing_left:.1%} of the patch folded into {done.parameter}")
                advance()
        return self.Outputs(
            model=graph.with_patches(patches, "compensated"),
            compensation=Compensation(sites=tuple(corrected)),
            work=Work(rounds=(streams.work(time.perf_counter() - started),)),
        )


def find_patch(streams: Streams, layer: int, rotation: torch.Tensor) -> torch.Tensor:
    """P (D, D), fp64, for the cut above a kept layer, from the pruned model as it is now."""
    position = streams.graph.layers.index(layer)
    total: torch.Tensor = rotation.new_zeros(len(rotation))
    samples = 0
    with streams.pruned.look(layer) as step:
        for visit in step:
            target = streams.target(position, visit.batch)
            total = total.to(target.device) + channel_ratios(visit.output, target, visit.mask, rotation.to(target.device))
            samples += len(target)
    count = streams.group.sum_values({"samples": samples})["samples"]
    ratios = streams.group.sum(total) / count
    rotation = rotation.to(ratios.device)
    return (rotation * ratios) @ rotation.T


def fold_patch(
    streams: Streams, layer: int, site: Site, patch: torch.Tensor, context: Context
) -> tuple[CorrectedSite, dict[str, TensorFile]]:
    """Fit x(P - I) by the inputs of the layer's down-projection, and add it there."""
    import torch

    from gradmap_pipeline.model.correction import solve_site, write_patches
    from gradmap_pipeline.model.ridge import Moments, check_room
    from gradmap_pipeline.model.streams import Drift, capture

    position, width = streams.graph.layers.index(layer), len(patch)
    check_room(site.inputs, width, context.memory, context.device)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=patch.device)

    moments, drift = Moments(zeros(site.inputs, site.inputs), zeros(site.inputs, width), 0.0), Drift()
    change = patch - torch.eye(width, dtype=torch.float64, device=patch.device)
    pruned = streams.pruned
    with pruned.look(layer) as step, capture(pruned.model, layer, site, "input") as captured:
        for visit in step:
            leaving = visit.output[visit.mask].double()
            moments.add(captured.pop().reshape(*visit.mask.shape, -1)[visit.mask], leaving @ change)
            drift.add(leaving, streams.target(position, visit.batch)[visit.mask].double())
    moments.join(streams.group)
    drift.join(streams.group)
    new, left = solve_site(pruned.model, layer, site, moments, space="input", ridge=_RIDGE)
    corrected = CorrectedSite(
        layer=layer,
        parameter=f"{site.name}.weight",
        shift=drift.shift,
        relative_shift=drift.relative_shift,
        missing_left=left,
    )
    return corrected, write_patches(streams, layer, new, context)


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [LinearpatchCompensate]
