"""lm-eval itself: its tasks made and tried, and a model handed to it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..machine.memory_advice import lack_of_memory
from ..machine.shortages import is_shortage
from ..machine.streams import set_aside
from .checks import find_local_tasks
from .folder import TaskFolder
from .guard import guarded

if TYPE_CHECKING:
    from ..checkpoint.graph import ModelGraph
    from ..context import Context
    from ..export.exports import TransformersFolder


@cache
def open_manager(folder: str | None, content: str | None, *, includes_defaults: bool) -> Any:
    """lm-eval's manager of tasks; to look through its own takes it some ten seconds. `content`: digest of the folder."""
    from lm_eval.tasks import TaskManager

    with quietly():
        return TaskManager(include_path=folder, include_defaults=includes_defaults)


def try_tasks(manager: Any, folder: TaskFolder, wanted: Sequence[str], *, allow_code: bool) -> None:
    """Have lm-eval make the tasks whose data lie on this machine, with their first row. Raises `OptionError`."""
    for name, file in find_local_tasks(folder, wanted):
        try:
            with quietly(), guarded(folder, allow_code=allow_code):
                fault = _find_target_fault(manager.load([name])["tasks"][name])
        except Exception as error:  # lm-eval fails in as many ways as there are settings
            if is_shortage(error):
                raise
            said = " ".join(str(error).split())[:300]
            fault = f"lm-eval cannot make it: {type(error).__name__}: {said}"
        if fault is not None:
            raise OptionError("task_folder", f"{str(file)!r}: task {name!r}: {fault}")


def _find_target_fault(task: Any) -> str | None:
    """Why no answer to the first question can be right. lm-eval would go on, and count all as wrong."""
    if task.config.output_type != "multiple_choice" or task.multiple_input or task.multiple_target:
        return None
    row = task.task_docs[0]
    choices, target = task.doc_to_choice(row), task.doc_to_target(row)
    if (isinstance(target, int) and target < len(choices)) or target in choices:
        return None
    return f"in the first row doc_to_target gives {str(target)[:60]!r}, which is none of the choices {str(choices)[:200]}"


def make_harness(model: ModelGraph | TransformersFolder, tokenizer: Any, batch_size: int, context: Context) -> Any:
    """The model as lm-eval takes it: whole, in memory."""
    from lm_eval.models.huggingface import HFLM

    from ..checkpoint.graph import ModelGraph
    from ..checkpoint.lengths import lengths_apart
    from ..checkpoint.rope import forget_lengths
    from ..checkpoint.whole import load_whole
    from ..export.exports import load_folder
    from ..machine.memory import resident_bytes

    width = 4 if context.dtype == "float32" else 2
    needed = model.count_parameters() * width if isinstance(model, ModelGraph) else model.size_bytes
    free = context.memory - resident_bytes(context.device)
    if needed > free:
        raise lack_of_memory(
            f"lm-eval needs the whole model in memory, {needed / 2**30:.2f} GiB, and of the memory allowed "
            f"{max(0, free) / 2**30:.2f} GiB are left",
            context.memory - free + needed,
            ["use evaluate"],
            dtype=context.dtype,
        )
    if isinstance(model, ModelGraph):
        loaded = load_whole(model, context.dtype, context.device)
    else:
        loaded = load_folder(model.folder).to(context.device)
    _guard_embeddings(loaded, tokenizer)
    forget_lengths(loaded)
    alone = lengths_apart(loaded.config.to_dict())  # then the harness must not pad one sequence to the length of another
    return HFLM(pretrained=loaded.eval(), tokenizer=tokenizer, batch_size=1 if alone else batch_size, trust_remote_code=False)


def _guard_embeddings(loaded: Any, tokenizer: Any) -> None:
    """Have ids that the model has no embedding for refused by name, and padding done with one that it has."""
    from ..data.tokenizer import check_ids

    table = loaded.get_input_embeddings()
    rows = int(table.weight.shape[0])
    if isinstance(tokenizer.pad_token_id, int) and tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    table.register_forward_pre_hook(lambda _, inputs: check_ids(inputs[0].tolist(), tokenizer, rows))


@contextmanager
def quietly() -> Iterator[None]:
    """Keep what lm-eval says to itself: every bar and log line it has is about its own work; git may say it is in no repository."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with set_aside(), redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(level)
