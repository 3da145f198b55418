"""What the command line says about this machine; no part of the recipe."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CapacityError
from .accelerators import is_accelerator
from .distributed import ProcessGroup
from .memory import default_budget

ALONE = ProcessGroup()


@dataclass(frozen=True)
class Machine:
    """Where and how to compute."""

    device: str = "auto"
    dtype: str = "float32"
    """Floating-point type to compute in; it changes results, so it is part of every key."""
    threads: int | None = None
    memory: int | None = None
    """Bytes this process may have resident, on the GPU if there is one; None: 80 % of what is free."""
    host_memory: int | None = None
    """Bytes this process may have resident in the machine where there is a GPU; None: 80 % of what is free."""

    def budget(self, device: str, group: ProcessGroup = ALONE) -> int:
        """Bytes each process of a group may have resident, on a GPU of its own or all together in the machine."""
        sharing = 1 if is_accelerator(device) else group.size
        return default_budget(device) // sharing if self.memory is None else self.memory

    def host_budget(self, device: str, group: ProcessGroup = ALONE) -> int:
        """Bytes each process of a group may have resident in the machine beside its GPU; 0 where there is no GPU."""
        if not is_accelerator(device):
            return 0
        return default_budget() // group.size if self.host_memory is None else self.host_memory

    def prepare_torch(self, group: ProcessGroup = ALONE) -> str:
        """Apply these settings to torch, and return the device by torch's name. Raises `CapacityError` where it is not there."""
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device_count = torch.cuda.device_count()
        if self.device == "auto":
            return f"cuda:{group.gpu}" if device_count else "cpu"
        device_type, _, number = self.device.partition(":")
        if device_type == "cuda" and not number:
            number = str(group.gpu)
        if device_type == "cuda" and int(number) >= device_count:
            raise CapacityError(f"--device {self.device}: torch sees {device_count} CUDA devices here; use --device cpu, or auto")
        return f"cuda:{number}" if device_type == "cuda" else self.device
