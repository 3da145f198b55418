"""The weights of the next layer, read while this one computes.

On an accelerator they go through pinned memory, and are copied to it on a stream of their own once the layer before this one is
done: two layers are all that memory is planned for, and the host may be many operations ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ..machine.accelerators import is_accelerator, module_of

if TYPE_CHECKING:
    import torch

Weights = dict[str, "torch.Tensor"]


class Prefetcher:
    """Holds at most one layer that is on its way."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._accelerator: Any = module_of(str(device)) if is_accelerator(str(device)) else None
        self._stream = self._accelerator.Stream(device) if self._accelerator else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._coming: tuple[int, Future[tuple[Weights, Any]]] | None = None

    def start(self, layer: int, read: Callable[[], Weights]) -> None:
        """Have a base layer on its way, in place of any other, while the one that is there now computes; none else is there.

        `read` brings its weights into memory, pinned where there is an accelerator. It runs in another thread.
        """
        if self._coming is None or self._coming[0] != layer:
            self.drop()
            # What is in the stream now are the layers before the one that is there.
            before = self._accelerator.current_stream(self._device).record_event() if self._accelerator else None
            self._coming = layer, self._thread.submit(self._fetch, read, before)

    def take(self, layer: int) -> Weights | None:
        """The weights of a base layer, on the device, if it is on its way. Raises what reading it raised."""
        if self._coming is None or self._coming[0] != layer:
            self.drop()
            return None
        (_, future), self._coming = self._coming, None
        weights, copied = future.result()
        if copied is not None:
            computing = self._accelerator.current_stream(self._device)
            computing.wait_event(copied)
            for value in weights.values():
                value.record_stream(computing)  # their memory is the other stream's, which would use it again at once
        return weights

    def drop(self) -> None:
        """Forget what is on its way."""
        if self._coming is not None:
            (_, future), self._coming = self._coming, None
            if not future.cancel():
                future.exception()  # waits: two layers are all that memory is planned for

    def _fetch(self, read: Callable[[], Weights], before: Any) -> tuple[Weights, Any]:
        weights = read()
        if self._stream is None:
            return weights, None
        before.synchronize()
        with self._accelerator.stream(self._stream):
            weights = {name: value.to(self._device, non_blocking=True) for name, value in weights.items()}
            return weights, self._stream.record_event()
