"""What a step would take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Estimate:
    """What a step would take on this machine."""

    peak_bytes: int = 0
    """Most resident memory of the process, all included."""
    bytes_read: int = 0
    bytes_written: int = 0
    flops: float = 0.0
    """Floating-point operations; a multiplication and an addition are two."""
    seconds: float = 0.0
    how: str = ""
    """Which way the work is done, where the memory decides it."""
    disk_bytes: int = 0
    """Most bytes that lie in the store at once besides results: what is written, less what takes the place of other things."""
    lines: Mapping[str, int] = field(default_factory=dict)
    """Bytes at the peak, by what they are for."""

    def __add__(self, after: Estimate) -> Estimate:
        """One after the other."""
        return Estimate(
            max(self.peak_bytes, after.peak_bytes),
            self.bytes_read + after.bytes_read,
            self.bytes_written + after.bytes_written,
            self.flops + after.flops,
            self.seconds + after.seconds,
            self.how or after.how,
            max(self.disk_bytes, after.disk_bytes),
            after.lines if after.peak_bytes > self.peak_bytes else self.lines,
        )

    def __mul__(self, times: float) -> Estimate:
        """Several times over."""
        return replace(
            self,
            bytes_read=round(self.bytes_read * times),
            bytes_written=round(self.bytes_written * times),
            flops=self.flops * times,
            seconds=self.seconds * times,
        )
