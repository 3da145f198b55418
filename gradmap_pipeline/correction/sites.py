"""Where a layer takes a correction of the residual stream exactly.

Three kinds of site:

- a linear map that writes to the layer's output (a down-projection): what is added to its output is added to the layer's,
  times a constant gain;
- a norm that does (architectures with a norm after each part): what is added to its weight scales single channels;
- a linear map that writes to the residual stream before the feed-forward part (an attention output projection). It can make up
  for what was missing when the layer began.

A linear map may write through a norm, as in architectures with a norm after each part. It can turn what the norm writes then, and
not lengthen it (`behind_norms`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from ..errors import StageError
from ..machine.distributed import ProcessGroup


class NoSiteError(StageError):
    """A layer has no place for a correction."""


class NotFiniteError(StageError):
    """What a correction is computed from is not finite. The message names it, as the subject of a sentence."""


class CapturedError(Exception):
    """Leaves a layer whose rest is of no interest."""


@dataclass(frozen=True)
class Site:
    """A module inside a layer whose weights take a correction."""

    name: str
    """Name of the module inside its layer."""
    role: Literal["output", "norm", "attention"]
    """`output` and `norm` write to the layer's output, `attention` to the residual stream before the feed-forward part."""
    inputs: int
    """Inputs of a linear map (tokens, inputs) to (tokens, hidden); of a norm, the hidden size."""
    is_transposed: bool = False
    """Whether its weight is (inputs, hidden), as in GPT-2's Conv1D, instead of (hidden, inputs)."""
    gain: float = 1.0
    """Factor between what the module returns and what arrives in the residual stream; of a map behind a norm, what this returns."""
    norm: str = ""
    """Name of the norm that takes what a linear map returns, and writes in its place; empty where there is none."""
    norm_offset: float = 0.0
    """What that norm adds to its weight before it multiplies by it: 1 in those of Gemma."""
    has_bias: bool = field(default=False, compare=False)
    """Whether it has one."""

    @property
    def writer(self) -> str:
        """Name of the module whose output is added to the residual stream."""
        return self.norm or self.name


def share_sites(sites_by_layer: Mapping[int, Sequence[Site]], group: ProcessGroup) -> dict[int, tuple[Site, ...]]:
    """The sites of layers as the leading process found them, so that all correct the same ones."""
    told = group.tell({str(layer): [asdict(site) for site in sites] for layer, sites in sites_by_layer.items()})
    return {int(layer): tuple(Site(**site) for site in sites) for layer, sites in told.items()}
