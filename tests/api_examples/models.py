"""A model as layers kept and tensors replaced over a checkpoint."""

import torch

from gradmap_pipeline import (
    ExportableModel,
    Model,
    ModelGraph,
    ModelSource,
    check_same_layers,
    full_config,
    lengths_apart_in,
    load_tensor,
    make_batches,
    open_model,
)

model: ModelGraph = open_model(ModelSource(builtin="docs-llama"))
assert isinstance(model, Model)
assert isinstance(model, ExportableModel)  # its logits are those of its graph, which is the model itself

pruned = model.without_layers([4, 8])
assert pruned.layers == (0, 1, 2, 3, 5, 6, 7, 9, 10, 11)
check_same_layers(pruned.base, pruned.layers)  # the config can say what is left

weight = load_tensor(model.layer_tensors(0)["model.layers.0.mlp.down_proj.weight"], torch.float32)
assert weight.shape == (full_config(model.base.folder)["hidden_size"], full_config(model.base.folder)["intermediate_size"])

# `open` reads a model into memory and gives logits of batches.
ids = torch.tensor([[1, 2, 3, 4]])
(batch,) = make_batches(ids, torch.ones_like(ids), lengths_apart=lengths_apart_in(model.base.folder))
logits = pruned.open("cpu")(batch)
assert logits.shape == (1, 4, full_config(model.base.folder)["vocab_size"])
