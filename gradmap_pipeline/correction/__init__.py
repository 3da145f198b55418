"""What corrects a model after its layers are removed: where it goes, and how it is computed."""
