"""What a model predicts once it has lost some layers and is corrected, and what it would predict without one more.

Sizes: B sequences a batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from ..checkpoint.checkpoint import item_bytes
from ..checkpoint.pretrained import read_config
from ..errors import StageError
from ..sweep.head_losses import slice_positions
from ..sweep.sweep import Samples, Stream, open_sweep
from .correction import collect_moments, solve_site
from .patches import use_values
from .sites import NoSiteError
from .streams import Streams

if TYPE_CHECKING:
    import torch

    from ..checkpoint.graph import ModelGraph
    from ..context import Context
    from .sites import Site


class CorrectedModel:
    """A model without some of its layers, corrected at each kept layer on some samples and compared with the original on others.

    The correction is that of `project_compensate`: least squares towards what enters the next kept layer of the original model, at
    the attention's output projection and at the last map that writes. Values of weights are not written anywhere. The processes of
    `context` share the samples of both kinds.
    """

    def __init__(
        self,
        graph: ModelGraph,
        fit: Samples,
        held_out: Samples,
        sites: dict[int, tuple[Site, ...]],
        context: Context,
        *,
        reserve: int,
        ridge: float,
        shrink: float,
    ) -> None:
        """`fit`: samples that corrections are solved on. `held_out`: samples that predictions are compared on.

        `sites`: by layer. `reserve`: bytes that solving takes. `ridge`, `shrink`: as in `correct_site`.
        """
        words = int(read_config(graph.base.folder).get_text_config().vocab_size)
        counts = len(fit[0]), len(held_out[0])
        sizes = self.count_kept_bytes(graph, counts, fit[0].shape[1], words, context.dtype)
        self.graph, self.context = graph, context
        self._sites, self._ridge, self._shrink = sites, ridge, shrink
        shares = {name: size / sum(sizes.values()) for name, size in sizes.items()}
        whole, left = (Stream(reserve, share=shares[name], has_head=True) for name in ("original", "pruned"))
        dense = open_sweep(graph, fit, context, keep="all", divisible=False, stream=whole)
        for _ in dense.forward():
            pass
        targets, plan = dense.detach(), dense.plan
        pruned = open_sweep(graph, fit, context, keep="all", divisible=False, stream=left, plan=plan)
        self._streams = Streams(targets, pruned.open_only_pass(), graph, context.group, graph.base.layers)
        self._sweep = pruned
        ids, mask = (context.group.share(part) for part in held_out)
        self._checked = pruned.open_beside((ids, mask), shares["compared"] / left.share)
        self._predictions = pruned.kept.open_beside(shares["predictions"] / left.share)
        """Log-probabilities of the original model by slice and batch (B, n, V), in half precision."""
        self._keep_predictions()
        self._dense_forwards = len(graph.layers)

    @staticmethod
    def count_kept_bytes(graph: ModelGraph, samples: tuple[int, int], tokens: int, words: int, dtype: str) -> dict[str, int]:
        """Bytes of what is kept of so many samples to fit on, and so many to compare on, of so many tokens each.

        `original`, `pruned`: hidden states of the samples to fit on, in either model. `compared`: those of the others.
        `predictions`: of the original model on these, two bytes for each of its `words`.
        """
        fit, held_out = samples
        depth, boundary = len(graph.layers), tokens * graph.map_sizes()[1] * item_bytes(dtype)
        return {
            "original": fit * (depth + 1) * boundary,
            "pruned": fit * (depth + 1) * boundary,
            "compared": held_out * (depth + 2) * boundary,
            "predictions": 2 * held_out * tokens * words,
        }

    @property
    def layer_forwards(self) -> float:
        """Passes of all samples, those for the fit and those to compare on, through one layer."""
        shares = [sum(len(batch.input_ids) for batch in one.batches) for one in (self._streams.pruned, self._checked)]
        fit, held_out = (share / sum(shares) for share in shares)
        fitted = self._streams.pruned.layer_forwards + self._dense_forwards
        return fit * fitted + held_out * self._checked.layer_forwards

    def close(self) -> None:
        """Give back the memory of weights and hidden states."""
        for kept in (self._streams.targets, self._predictions):
            kept.clear()
        self._sweep.close()

    def remove(self, layers: Collection[int]) -> None:
        """Take base layers out of the model, and correct all kept layers from the one below the lowest of them up."""
        kept = self._streams.pruned.layers
        lowest = kept.index(min(layers))
        for layer in layers:
            self._streams.pruned.remove(layer)
            self._streams.pruned.model.weights.restore(layer)
            self._checked.remove(layer)
        self._streams.graph = self._streams.graph.without_layers(set(layers))
        for layer in self._streams.pruned.layers[max(0, lowest - 1) :]:
            self._correct(layer)

    def divergence(self) -> float:
        """KL divergence from the original model's predictions to this one's: nats a token, on the samples held out."""
        self._checked.run_forward()
        last = len(self._checked.layers)
        return self._compare([((index, self._checked.boundary(last, index)) for index in range(len(self._checked.batches)))])

    def divergence_without(self, layer: int) -> float:
        """The same, without one more base layer, the layer below it corrected for that and none above corrected anew.

        As it is corrected where it has a place for that; the lowest layer has none below it.
        """
        kept = self._checked.layers
        position = kept.index(layer)
        if position == 0:
            return self._compare(self._checked.outputs_of(kept[1:], 0))
        below = kept[position - 1]
        self._checked.run_up_to(below)
        with self._corrected_for(layer, below):
            return self._compare(self._checked.outputs_of([below, *kept[position + 1 :]], position - 1))

    @contextmanager
    def _corrected_for(self, layer: int, below: int) -> Iterator[None]:
        """The layer below corrected as if `layer` were gone, for the time of the `with` block."""
        weights = self._streams.pruned.model.weights
        site = self._output_site(below)
        if site is None:
            yield
            return
        with weights.set_aside(below, f"{site.name}."):
            without = replace(self._streams, graph=self._streams.graph.without_layers({layer}))
            for name, value in self._solve(without, below, site, goes_on=False):
                weights.override(below, name, value)
            yield

    def _output_site(self, layer: int) -> Site | None:
        return next((site for site in self._sites.get(layer, ()) if site.role != "attention"), None)

    def _correct(self, layer: int) -> None:
        """Correct a kept layer anew, from the weights of the checkpoint."""
        pruned, removed = self._streams.pruned, self._streams.graph.removed
        pruned.model.weights.restore(layer)
        pruned.invalidate_from(layer)
        self._checked.invalidate_from(layer)
        pruned.run_up_to(layer)
        with pruned.model.layer(layer):
            for site in self._sites.get(layer, ()):
                if site.role == "attention" and layer < removed[0]:
                    continue  # nothing was missing when this layer began
                new = dict(self._solve(self._streams, layer, site, goes_on=True))
                if new:
                    use_values(self._streams, layer, new, site, {})
            pruned.run_up_to(layer, through=True)

    def _solve(self, streams: Streams, layer: int, site: Site, *, goes_on: bool) -> Sequence[tuple[str, torch.Tensor]]:
        """New values of a site's parameters; none where it takes no correction. `goes_on`: as in `collect_moments`."""
        model = streams.pruned.model
        try:
            moments, _ = collect_moments(streams, layer, site, "input", self.context, goes_on=goes_on)
        except NoSiteError:
            return ()
        new, _ = solve_site(model, layer, site, moments, space="input", ridge=self._ridge, shrink=self._shrink)
        broken = next((name for name, value in new.items() if not value.isfinite().all()), None)
        if broken is not None:
            raise StageError(f"the correction of {broken!r} in layer {layer} is not finite, computed in {self.context.dtype}")
        return tuple(new.items())

    def _keep_predictions(self) -> None:
        self._checked.run_forward()
        last = len(self._checked.layers)
        with self._checked.model.weights.head():
            for index in range(len(self._checked.batches)):
                for number, _, ours in self._predict(index, self._checked.boundary(last, index)):
                    self._predictions.put(number, index, ours.half())

    def _compare(self, outputs: Iterable[Iterable[tuple[int, torch.Tensor]]]) -> float:
        """KL divergence by what leaves the last layer for each batch, (B, T, D), in groups of batches."""
        total = 0.0
        for group in outputs:
            with self._checked.model.weights.head():
                total += sum(self._sum_divergence(index, hidden) for index, hidden in group)
        counted = sum(int(batch.mask[:, :-1].sum()) for batch in self._checked.batches)
        sums = self.context.group.sum_values({"divergence": total, "tokens": counted})
        return sums["divergence"] / max(1.0, sums["tokens"])

    def _sum_divergence(self, index: int, hidden: torch.Tensor) -> float:
        total = 0.0
        for number, counted, q in self._predict(index, hidden):
            p = self._predictions.get(number, index).float().log_softmax(-1)
            less = q.neg_().add_(p)  # p - q, in place: while p is made there are three tensors of this size, in fp32
            total += float((p.exp_().mul_(less).sum(-1) * counted).double().sum())
            del p, q, less
        return total

    def _predict(self, index: int, hidden: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """A batch in slices of positions: number, which tokens count (B, n), and log-probabilities (B, n, V), fp32.

        The last token of a sequence predicts nothing that is known, and is left out.
        """
        import torch

        model, batch = self._checked.model, self._checked.batches[index]
        for number, positions in enumerate(slice_positions(model, batch)):
            end = min(positions.stop, batch.input_ids.shape[1] - 1)
            with torch.no_grad():
                logits = model.head(batch, hidden, positions)[:, : end - positions.start]
            logs = logits.float().log_softmax(-1)
            del logits
            yield number, batch.mask[:, positions.start : end].to(hidden.device), logs
            del logs


def divide_samples(samples: Samples, held_out: int) -> tuple[Samples, Samples]:
    """Samples to fit on, and every n-th, `held_out` of them, to compare on: spread over all."""
    import torch

    ids, mask = samples
    chosen = torch.zeros(len(ids), dtype=torch.bool)
    chosen[torch.linspace(0, len(ids) - 1, held_out).long()] = True
    return (ids[~chosen], mask[~chosen]), (ids[chosen], mask[chosen])
