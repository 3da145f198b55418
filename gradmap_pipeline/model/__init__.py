"""Models as layers kept and tensors patched over a base checkpoint."""
