"""Quantise a GGUF file with llama.cpp's own code. A program of its own: it runs in the Python that has llama-cpp-python.

    python quantize_file.py IN OUT Q4_K_M THREADS

It takes the arguments of llama.cpp's program `llama-quantize`.
"""

from __future__ import annotations

import ctypes
import sys


def quantize(source: str, target: str, file_type: str, threads: int) -> None:
    """Exits with llama.cpp's own message where it refuses."""
    import llama_cpp

    number = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}", None)
    if number is None:
        raise SystemExit(f"this llama-cpp-python has no type {file_type}")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = number, threads
    code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options))
    if code:
        raise SystemExit(f"llama_model_quantize gave {code}")


if __name__ == "__main__":
    quantize(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
