"""Read and write what lies on disk: a model's source, tensors, tokenizer, and its config with and without layers."""
