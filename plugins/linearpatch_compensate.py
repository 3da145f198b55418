"""LinearPatch: scale the channels of the rotated residual stream at each cut to the size they had.

Source: https://arxiv.org/abs/2505.24680. With H a Hadamard matrix over √D, x what enters the cut and y what left the removed
layers, d_c is the mean over samples of mean_t |yH|_c / mean_t |xH|_c, and P = H diag(d) Hᵀ. The published model multiplies
the stream by P, with a matrix of its own. Here that is folded: the down-projection before the cut gets the least-squares fit of
x(P - I), and where that leaves more than a tolerance the step is refused. With `rescale`, the multiple s of x that is nearest to xP
is folded exactly, into all that writes above the cut, and only x(P/s - I) is fitted.
Sizes: B sequences, T tokens, N tokens that are not padding, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from gradmap_pipeline import (
    CapacityError,
    Context,
    CorrectedSite,
    Drift,
    Estimate,
    Forecasts,
    LayerCompensation,
    LayersLeft,
    ModelCosts,
    ModelGraph,
    Moments,
    Site,
    Stage,
    StageError,
    Streams,
    StreamWork,
    StructureProbe,
    TensorFile,
    capture_site,
    check_rescaling,
    check_room,
    find_output_site,
    find_writers,
    hookimpl,
    layers_before_cuts,
    rescale_from,
    room_for,
    solve_site,
    write_patches,
)

if TYPE_CHECKING:
    import torch


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
        raise StageError(f"linearpatch_compensate needs a Hadamard matrix of the hidden size; none of size {size} is known here")
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


class LinearpatchCompensate(LayerCompensation):
    """Fold a channel-wise rescaling of the rotated stream into the layer before each cut (LinearPatch)."""

    name = "linearpatch_compensate"

    tolerance: float = Field(
        0.1, gt=0, le=1, description="Largest share of what the patch adds that folding may leave out before the step is refused."
    )

    rescale: bool = Field(
        False,
        description="Fold the common part of the rescaling exactly, by dividing what is written above each cut; only the rest is "
        "fitted.",
    )

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        super().inspect(inputs, probe)
        if self.rescale:
            check_rescaling(probe)

    def prepare(self, streams: Streams, context: Context) -> dict[str, TensorFile]:
        if self.rescale:
            streams.writers = find_writers(streams.graph, context)
        return {}

    def room(self, graph: ModelGraph) -> int:
        return room_for(*graph.map_sizes())

    def estimate_streams(self, left: LayersLeft, samples: int, tokens: int, costs: ModelCosts) -> Estimate:
        cuts, (inputs, width) = left.count_before_cuts(), costs.graph.map_sizes()
        again = 2 * cuts + (left.count if self.rescale else 0)  # a patch is found, then folded
        passes = costs.two_streams(left.count, samples, tokens, StreamWork(self.room(costs.graph), again, self.goes_up()))
        return passes + costs.speed.correction(inputs, width, samples * tokens) * cuts

    def tell(self, site: CorrectedSite) -> str:
        return f"layer {site.layer}: {1 - site.missing_left:.1%} of the patch folded into {site.parameter}"

    def check(self, graph: ModelGraph) -> None:
        layers_before_cuts(graph)
        make_hadamard(graph.map_sizes()[1])

    def goes_up(self) -> bool:
        return not self.rescale

    def choose(self, streams: Streams, known: Mapping[int, Sequence[Site]]) -> Iterator[int]:
        yield from layers_before_cuts(streams.graph)

    def correct(
        self, streams: Streams, layer: int, known: Mapping[int, Sequence[Site]], context: Context
    ) -> tuple[list[CorrectedSite], dict[str, TensorFile]]:
        width = streams.graph.map_sizes()[1]
        patch = find_patch(streams, layer, make_hadamard(width) / width**0.5)
        scale = nearest_multiple(streams, layer, patch) if self.rescale else 1.0
        done, patches = fold_patch(streams, layer, find_output_site(streams, layer, known), patch, context, scale)
        if self.rescale:
            position, total = streams.graph.layers.index(layer) + 1, streams.scale_above(layer) * scale
            patches |= rescale_from(streams, position, total, context)
        with streams.group.agreeing(StageError):
            if done.missing_left > self.tolerance:
                raise StageError(
                    f"the patch after layer {layer} cannot be folded into {done.parameter}: {done.missing_left:.0%} of what it "
                    f"adds would be left out, over 'tolerance' ({self.tolerance:g}); "
                    f"{'' if self.rescale else 'set rescale: true, or '}raise it to take the nearest fold"
                )
        return [done], patches


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


def nearest_multiple(streams: Streams, layer: int, patch: torch.Tensor) -> float:
    """s minimising Σ ‖xP - s x‖² over the tokens that leave a kept layer."""
    along = squares = 0.0
    with streams.pruned.look(layer) as step:
        for visit in step:
            leaving = visit.output[visit.mask].double()
            along += float((leaving @ patch * leaving).sum())
            squares += float(leaving.square().sum())
    sums = streams.group.sum_values({"along": along, "squares": squares})
    return sums["along"] / max(sums["squares"], 1e-300)


def fold_patch(
    streams: Streams, layer: int, site: Site, patch: torch.Tensor, context: Context, scale: float = 1.0
) -> tuple[CorrectedSite, dict[str, TensorFile]]:
    """Fit x(P/s - I) by the inputs of the layer's down-projection, and add it there.

    What is left is relative to all that the patch adds, x(P - I), in its size.
    """
    import torch

    position, width = streams.graph.layers.index(layer), len(patch)
    with streams.group.agreeing(CapacityError):
        check_room(site.inputs, width, context.memory, context.device)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=patch.device)

    moments, drift = Moments(zeros(site.inputs, site.inputs), zeros(site.inputs, width), 0.0), Drift()
    identity = torch.eye(width, dtype=torch.float64, device=patch.device)
    change, added = patch / scale - identity, 0.0
    pruned = streams.pruned
    with pruned.look(layer) as step:
        streams.check_gain(layer, site)
        with capture_site(pruned.model, layer, site, "input") as captured:
            for visit in step:
                leaving = visit.output[visit.mask].double()
                moments.add(captured.pop().reshape(*visit.mask.shape, -1)[visit.mask], leaving @ change)
                added += float((leaving @ (patch - identity)).square().sum())
                drift.add(leaving, streams.target(position, visit.batch)[visit.mask].double())
    streams.join(drift, layer)
    moments.join(streams.group)
    added, rest = streams.group.sum_values({"added": added})["added"], scale**2 * moments.missing
    with streams.group.agreeing(StageError):
        new, left = solve_site(pruned.model, layer, site, moments, space="input", ridge=_RIDGE)
    corrected = CorrectedSite(
        layer=layer,
        parameter=f"{site.name}.weight",
        shift=drift.shift,
        relative_shift=drift.relative_shift,
        missing_left=left * rest / max(added, 1e-300),
    )
    return corrected, write_patches(streams, layer, new, context)


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [LinearpatchCompensate]
