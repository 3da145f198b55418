"""Run a GGUF file in llama.cpp, in a process of the Python that has its bindings.

Sizes: B sequences, T tokens, V vocabulary of the file.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ...machine.atomic_folder import scratch_folder
from ...machine.processes import explain_end, tie
from .pythons import RUNNER

if TYPE_CHECKING:
    import torch


class GgufSession:
    """A GGUF file, opened. Its process ends with `with`, with `close`, or with the last reference.

    Raises `StageError` where llama.cpp does not load the file, and in every method where it ends.
    """

    def __init__(self, file: Path, python: str, program: Path | None = None) -> None:
        """`python`: one with llama-cpp-python. `program`: what it runs there; None: the one that computes logits."""
        import torch

        with ExitStack() as stack:
            self._scratch = stack.enter_context(scratch_folder())
            self._said = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
            command = tie([python, str(program or RUNNER), str(file), str(torch.get_num_threads())])
            streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said}
            environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}  # else a failure starts a debugger, where there is one
            self._process = stack.enter_context(subprocess.Popen(command, **streams, text=True, env=environment))
            stack.callback(self._process.kill)
            self.words: int = self._read()["words"]
            """Tokens that the file knows."""
            self._end = weakref.finalize(self, stack.pop_all().close)

    def run(self, prompts: Sequence[Sequence[int]], steps: int) -> torch.Tensor:
        """Logits (B, steps + 1, V) of the last positions of each prompt, float32; the last `steps` tokens come one by one."""
        return self._ask(prompts, steps, every=False)

    def run_batch(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) after each token of ids (B, T), float32."""
        return self._ask(input_ids.tolist(), 0, every=True)

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, Any]:
        """What `decode_gguf.py`, where that is the program, answers for prompts of one length and so many further tokens."""
        answer: dict[str, Any] = self._request({"prompts": [list(prompt) for prompt in prompts], "tokens": tokens})
        return answer

    def close(self) -> None:
        """End the process."""
        self._end()

    def __enter__(self) -> GgufSession:
        return self

    def __exit__(self, cls: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _ask(self, prompts: Sequence[Sequence[int]], steps: int, *, every: bool) -> torch.Tensor:
        import numpy as np
        import torch

        out = self._scratch / "logits.npy"
        self._request({"prompts": [list(prompt) for prompt in prompts], "steps": steps, "every": every, "out": str(out)})
        logits = torch.from_numpy(np.load(out))
        out.unlink()
        return logits

    def _request(self, request: dict[str, Any]) -> Any:
        """The answer to a request."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # why it ended is told where the answer is read
        return self._read()

    def _read(self) -> Any:
        """The next line of the process."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._said.seek(0)
        raise explain_end("llama.cpp", code, self._said.read() or "it said nothing")
