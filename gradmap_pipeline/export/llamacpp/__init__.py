"""GGUF files: what llama.cpp makes of a config, what a file must say besides, and whether it computes what the model does."""
