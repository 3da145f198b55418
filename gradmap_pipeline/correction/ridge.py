"""Ridge regression from sums over tokens, in fp64 and in place.

Sizes: N tokens, F inputs, D outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import StageError
from ..machine.memory import give_back, resident_bytes
from ..machine.memory_advice import lack_of_memory

if TYPE_CHECKING:
    import torch

    from ..machine.distributed import ProcessGroup

_COLUMNS = 512  # solved for at a time
_BLOCK = 256  # columns of a Gram matrix that are summed at a time
_BATCH = 1024  # tokens that are converted at a time
_TOKENS = 128  # whose products are summed in fp32, before they are added in fp64
_LARGE = 4.0  # times the median squared norm: a token whose products are summed in fp64


def solve_ridge(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> tuple[torch.Tensor, float]:
    """X (F, D) minimising ‖A X - R‖² + λ‖X‖², from gram = AᵀA (F, F) and cross = AᵀR (F, D), both fp64; and its value less ‖R‖².

    Of `gram` the upper triangle is read.
    λ is `ridge` times the mean of the diagonal of AᵀA. Both matrices are overwritten, `cross` by X, so that these two
    and a block of columns are all there is in memory.
    """
    import torch

    gram.diagonal().add_(ridge * float(gram.diagonal().mean()))
    factor, failed = torch.linalg.cholesky_ex(gram.mT, out=(gram.mT, torch.empty((), dtype=torch.int32, device=gram.device)))
    if int(failed):
        raise StageError("the calibration tokens do not determine the correction (singular Gram matrix); raise 'ridge'")
    gained = 0.0
    for block in cross.split(_COLUMNS, dim=1):
        x = torch.linalg.solve_triangular(factor.mT, torch.linalg.solve_triangular(factor, block, upper=False), upper=True)
        gained += float((x * block).sum())  # ‖A X - R‖² + λ‖X‖² = ‖R‖² - ⟨X, AᵀR⟩
        block.copy_(x)
    return cross, -gained


def hold_back(missing: float, along: float, squares: float, shrink: float) -> tuple[float, float]:
    """The factor e / (e + shrink) for a correction that explains a share e of ‖R‖², and the share that is left with it.

    `missing` is ‖R‖², `along` ⟨AX, R⟩, `squares` ‖AX‖². A correction that explains little is mostly fitted to these very tokens,
    and does harm on others. Like the factor of Stein's estimator, https://www.jstor.org/stable/2284155, it is close to 1 where the
    signal is large against the noise.
    """
    total = max(missing, 1e-300)
    explained = max(0.0, (2 * along - squares) / total)
    factor = explained / (explained + shrink) if shrink else 1.0
    return factor, (missing - 2 * factor * along + factor**2 * squares) / total


def _mirror(gram: torch.Tensor) -> None:
    """Fill what lies below the diagonal blocks from above them."""
    for start in range(0, len(gram), _BLOCK):
        end = start + _BLOCK
        gram[end:, start:end] = gram[start:end, end:].T


@dataclass
class Moments:
    """Sums over tokens, fp64, from which a correction at one layer follows."""

    gram: torch.Tensor
    """AᵀA (F, F), its upper triangle; A are the inputs (or, in output space, the outputs) of the map in the pruned model."""
    cross: torch.Tensor
    """AᵀR (F, D), R the residual that is missing."""
    missing: float
    """‖R‖²"""
    _group: ProcessGroup | None = field(default=None, repr=False, compare=False)

    def add(self, a: torch.Tensor, r: torch.Tensor) -> None:
        """a (n, F), r (n, D). Below the diagonal blocks nothing is summed.

        Products are in fp32, a few tokens at a time, and their sums in fp64. Real models have tokens a thousand times as large as
        others; where these are summed in fp32 with others, what the others say is rounded away. So large tokens go through fp64.
        """
        import torch

        self.missing += float(r.double().square().sum())
        for some_a, some_r in zip(a.split(_BATCH), r.split(_BATCH), strict=True):
            if a.dtype == torch.float64:
                self._add_products(some_a, some_r.double(), _BATCH)
                continue
            sizes = some_a.float().square().sum(1)
            large = sizes > _LARGE * sizes.median()
            self._add_products(some_a[large].double(), some_r[large].double(), _BATCH)
            self._add_products(some_a[~large].float(), some_r[~large].float(), _TOKENS)

    def _add_products(self, a: torch.Tensor, r: torch.Tensor, tokens: int) -> None:
        """Sums over so many tokens are in the type of both, and those over all in fp64.

        All products go into the same memory: to get a block from the system costs more than the product that fills it.
        """
        import torch

        inputs, outputs = a.shape[1], r.shape[1]
        rows = min(_BLOCK, inputs)
        memory = a.new_empty(rows * max(inputs, outputs))
        doubles = memory if a.dtype == torch.float64 else a.new_empty(memory.shape, dtype=torch.float64)

        def add(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
            product = torch.mm(left.T, right, out=memory[: sums.numel()].view(sums.shape))
            sums += doubles[: sums.numel()].view(sums.shape).copy_(product)

        for start in range(0, inputs, _BLOCK):
            end = start + _BLOCK
            for some_a, some_r in zip(a.split(tokens), r.split(tokens), strict=True):
                block = some_a[:, start:end]
                add(self.gram[start:end, start:], block, some_a[:, start:])
                add(self.cross[start:end], block, some_r)

    def join(self, group: ProcessGroup) -> None:
        """Sum over the processes of a group. The leading one has the sums and solves; all get its solution."""
        group.sum_to_leader(self.gram)
        group.sum_to_leader(self.cross)
        self.missing = group.sum_values({"missing": self.missing})["missing"]
        self._group = group

    def solve(self, ridge: float, shrink: float = 0.0) -> tuple[torch.Tensor, float]:
        """The correction X (F, D), and the share of ‖R‖² that is left after it. Overwrites the sums.

        `shrink`: as in `hold_back`.
        """
        return self._lead(lambda: self._solve(ridge, shrink))

    def _solve(self, ridge: float, shrink: float) -> tuple[torch.Tensor, float]:
        penalty = ridge * float(self.gram.diagonal().mean())
        x, value = solve_ridge(self.gram, self.cross, ridge)
        self.gram = self.gram.new_empty(0)  # as large as the rest together, and used up
        # ⟨X, AᵀR⟩ = -value, and (AᵀA + λI) X = AᵀR
        factor, left = hold_back(self.missing, -value, -value - penalty * float(x.square().sum()), shrink)
        return x.mul_(factor), left

    def solve_factor(self, ridge: float) -> tuple[torch.Tensor, float]:
        """As `solve` in output space, but the factor I + X is kept small, not X: X = (AᵀA + λI)⁻¹ Aᵀ(R + A) - I.

        `ridge` may be 0 where the outputs determine the factor. Overwrites the sums.
        """
        return self._lead(lambda: self._solve_factor(ridge))

    def _lead(self, solve: Callable[[], tuple[torch.Tensor, float]]) -> tuple[torch.Tensor, float]:
        """What the leading process solves, in all."""
        if self._group is None or self._group.size == 1:
            return solve()
        with self._group.agreeing(StageError):
            x, left = solve() if self._group.leads else (self.cross, 0.0)
        return self._group.lead(x.contiguous()), self._group.tell(left)

    def _solve_factor(self, ridge: float) -> tuple[torch.Tensor, float]:
        penalty = ridge * float(self.gram.diagonal().mean())
        squares = self.missing + 2 * float(self.cross.diagonal().sum()) + float(self.gram.diagonal().sum())  # ‖R + A‖²
        _mirror(self.gram)
        self.cross += self.gram
        factor, value = solve_ridge(self.gram, self.cross, ridge)
        self.gram = self.gram.new_empty(0)
        left = squares + value - penalty * float(factor.square().sum())
        factor.diagonal().sub_(1)
        return factor, left / max(self.missing, 1e-300)


@dataclass
class ChannelMoments:
    """Sums over tokens, fp64, from which a scale and a shift of each channel follow: R ≈ A·x + b, channel by channel."""

    sums: torch.Tensor
    """Σa², Σar, Σa, Σr, each (D,): (4, D)"""
    missing: float = 0.0
    """‖R‖²"""
    tokens: int = 0

    def add(self, a: torch.Tensor, r: torch.Tensor) -> None:
        """Both (n, D)."""
        import torch

        a, r = a.double(), r.double()
        self.sums += torch.stack([values.sum(0) for values in (a * a, a * r, a, r)])
        self.missing += float(r.square().sum())
        self.tokens += len(a)

    def join(self, group: ProcessGroup) -> None:
        """Sum over the processes of a group."""
        group.sum(self.sums)
        sums = group.sum_values({"missing": self.missing, "tokens": self.tokens})
        self.missing, self.tokens = sums["missing"], int(sums["tokens"])

    def solve(self, ridge: float, shift: bool, shrink: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Scale x (D,), shift b (D,), zero unless wanted, and the share of ‖R‖² that is left after them.

        Minimises ‖R - A·x - b‖² + λ‖x‖²; λ is `ridge` times the mean of Σa² over channels. `shrink`: as in `hold_back`.
        """
        import torch

        square, product, a, r = self.sums
        mean_a, mean_r = (a / self.tokens, r / self.tokens) if shift else (torch.zeros_like(a), torch.zeros_like(r))
        penalty = ridge * float(square.mean())
        x = (product - mean_r * a) / (square - mean_a * a + penalty).clamp_min(1e-300)
        b = mean_r - x * mean_a
        along = float((x * product + b * r).sum())
        squares = float((x.square() * square + 2 * x * b * a + self.tokens * b.square()).sum())
        factor, left = hold_back(self.missing, along, squares, shrink)
        return x * factor, b * factor, left


def room_for(inputs: int, width: int) -> int:
    """Bytes that the sums of one correction and their solution take."""
    return 8 * (inputs * inputs + inputs * width + 3 * _COLUMNS * inputs)


def check_room(inputs: int, width: int, memory: int, device: str) -> None:
    """Raise `CapacityError` unless the sums of one correction fit into what is left of `memory` bytes on a device."""
    needed = room_for(inputs, width)
    if needed > memory - resident_bytes(device):
        give_back()
    free = memory - resident_bytes(device)
    if needed > free:
        raise lack_of_memory(
            f"correcting {inputs} inputs takes {needed / 2**30:.2f} GiB, and of the memory allowed "
            f"{max(0, free) / 2**30:.2f} GiB are left",
            memory - free + needed,
            by_option={"space": "use space: output"},
        )
