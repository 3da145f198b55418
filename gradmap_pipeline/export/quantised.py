"""Checkpoints that transformers loads with quantised weights: written, loaded back and compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StageError
from ..stages.targets import NewFolder, describe_folder
from .exports import TransformersFolder, load_folder
from .folders import check_loading, explain_config, find_deviations, make_lineage, write_card, write_companions

if TYPE_CHECKING:
    import torch

    from ..checkpoint.graph import ModelGraph
    from ..context import Context
    from ..stages.stage import Stage
    from .card_usage import Format

_CHECK_SHAPE = (2, 32)  # sequences, tokens


def write_quantised(
    graph: ModelGraph,
    new: NewFolder,
    form: Format,
    quantisation: str,
    quantise: Callable[[Path], Any],
    stage: Stage,
    context: Context,
    tolerance: float = 0.0,
    **saving: Any,
) -> TransformersFolder:
    """Quantise a graph and write it as a new folder for plain `from_pretrained`.

    `quantise` gets a folder with the model as it is, and returns the quantised model. Loaded back, that must give the same
    logits on random tokens, to `tolerance` times the largest. `saving` goes to `save_pretrained`. Raises `StageError`, and
    writes nothing then.
    """
    from ..checkpoint.checkpoint import write_folder

    plain = context.folder / "plain"
    plain.mkdir()
    list(write_folder(graph.export_tensors(), plain, graph.dtype))
    write_companions(graph, plain)
    draft = new.path
    with context.progress(f"quantise to {quantisation}", 3, "step") as advance:
        before = _logits(load_folder(plain), context.seed)
        advance()
        model = quantise(plain)
        logits = _logits(model, context.seed)
        if not logits.isfinite().all():
            raise StageError("the quantised model computes values that are not finite; nothing was written")
        write_companions(graph, draft)
        ours = json.loads((draft / "config.json").read_text(encoding="utf-8"))
        model.save_pretrained(draft, **saving)
        del model
        _complete_config(draft / "config.json", ours)
        advance()
        check_loading(draft)
        again = _logits(load_folder(draft), context.seed)
        apart = float((again - logits).abs().max())
        if not apart <= tolerance * float(logits.abs().max()):
            raise StageError(
                f"the quantised folder does not compute what the quantised model does: logits differ by up to {apart:.2g}; "
                "nothing was written"
            )
        difference = float((again - before).abs().max())
        told = f"Logits of random tokens differ by up to {difference:.2g} from those of the model before quantisation."
        write_card(draft, graph, context.metrics, form, quantisation, (told,))
        files = describe_folder(draft)
        lineage = make_lineage(graph, files, difference, stage, context) | {"quantisation": quantisation}
        files = new.finish(lineage, files)
        advance()
    shutil.rmtree(plain)
    for line in (*explain_config(graph), *find_deviations(graph, form)):
        context.note(line)
    size = sum(file.size for file in files.values()) / 1e6
    told = f"loaded back, logits differ from the unquantised by up to {difference:.2g}"
    context.note(f"wrote {new.target}{new.replaced}: {size:.1f} MB of files, {told}")
    return TransformersFolder(
        graph=graph, folder=new.target, files=files, max_logit_difference=difference, quantisation=quantisation
    )


def _complete_config(file: Path, ours: dict[str, Any]) -> None:
    """Add what the pruned model's config has and transformers left out: the older form of rotary parameters."""
    from ..checkpoint.infinities import to_json

    written = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(to_json({**ours, **written}, file.parent), encoding="utf-8")


def _logits(model: Any, seed: int) -> torch.Tensor:
    import torch

    words = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(words, _CHECK_SHAPE, generator=torch.Generator().manual_seed(seed)).to(model.device)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits.float().cpu()
    return logits
