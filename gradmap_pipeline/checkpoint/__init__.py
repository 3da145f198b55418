"""What lies on disk: a model's source, its tensors, its config with and without layers, its tokenizer."""
