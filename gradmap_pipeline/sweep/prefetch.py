"""The weights of the next layer, read while this one computes.

On a GPU they go through pinned memory, and are copied to the device on a stream of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Weights = dict[str, "torch.Tensor"]


class Prefetcher:
    """Holds at most one layer that is on its way."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._coming: tuple[int, Future[tuple[Weights, torch.cuda.Event | None]]] | None = None

    def start(self, layer: int, read: Callable[[], Weights]) -> None:
        """Have a base layer on its way, in place of any other.

        `read` brings its weights into memory, pinned where the device is a GPU. It runs in another thread.
        """
        if self._coming is None or self._coming[0] != layer:
            self.drop()
            self._coming = layer, self._thread.submit(self._fetch, read)

    def take(self, layer: int) -> Weights | None:
        """The weights of a base layer, on the device, if it is on its way. Raises what reading it raised."""
        import torch

        if self._coming is None or self._coming[0] != layer:
            self.drop()
            return None
        (_, future), self._coming = self._coming, None
        weights, copied = future.result()
        if copied is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(copied)
            for value in weights.values():
                value.record_stream(computing)
        return weights

    def drop(self) -> None:
        """Forget what is on its way."""
        if self._coming is not None:
            (_, future), self._coming = self._coming, None
            if not future.cancel():
                future.exception()  # waits: two layers are all that memory is planned for

    def _fetch(self, read: Callable[[], Weights]) -> tuple[Weights, torch.cuda.Event | None]:
        import torch

        weights = read()
        if self._stream is None:
            return weights, None
        with torch.cuda.stream(self._stream):
            weights = {name: value.to(self._device, non_blocking=True) for name, value in weights.items()}
            return weights, self._stream.record_event()
