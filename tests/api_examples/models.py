"""A model as layers kept and tensors replaced over a checkpoint."""

from pathlib import Path

import pytest
import torch

from gradmap_pipeline import (
    ExpertLayout,
    ExportableModel,
    Model,
    ModelError,
    ModelGraph,
    ModelSource,
    StageError,
    check_same_layers,
    find_experts,
    full_config,
    lengths_apart_in,
    load_tensor,
    make_batches,
    open_model,
    write_fewer_experts,
)
from gradmap_pipeline.testing import make_context

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

# A mixture of experts says what it has; a model without is refused, and so is one whose names are of no known layout.
with pytest.raises(ModelError, match="llama has no experts"):
    find_experts(model)
layout = ExpertLayout(count=4, chosen=2, fields=("num_experts",), layers={})
with pytest.raises(StageError, match="no layer has experts"):
    write_fewer_experts(model, layout, {}, Path("fewer"), make_context(Path("step")))
