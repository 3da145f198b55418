"""lm-eval as it runs here: local data by their names, templates in a sandbox."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..machine.atomic_folder import scratch_folder
from .data_files import READERS, find_data, load_local
from .folder import TaskFolder


@contextmanager
def guarded(folder: TaskFolder | None, *, allow_code: bool) -> Iterator[None]:
    """Have lm-eval find the data of a folder's tasks, and, unless code is allowed, keep their templates from reaching Python."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils
    from lm_eval.api.task import ConfigurableTask

    files = {} if folder is None else {file.path.resolve(): file for file in folder.task_files()}
    download, environment = ConfigurableTask.download, utils.env
    with scratch_folder() as scratch:

        def find_and_download(task: Any, dataset_kwargs: dict[str, Any] | None = None, **others: Any) -> None:
            options, reader = dict(dataset_kwargs or {}), task.DATASET_PATH
            folders = _folders_of(task, files, folder)
            is_local = (
                folder is not None
                and isinstance(reader, str)
                and ((reader in READERS and bool({"data_files", "data_dir"} & set(options))) or bool(find_data(reader, folders)))
            )
            if callable(task.config.custom_dataset) or not is_local:
                download(task, dataset_kwargs, **others)
                return
            options.pop("trust_remote_code", None)
            place = scratch / str(len(list(scratch.iterdir())))
            place.mkdir()
            task.dataset = load_local(reader, task.DATASET_NAME, options, folders, place)

        ConfigurableTask.download = find_and_download
        if not allow_code:
            sandbox = SandboxedEnvironment(
                loader=environment.loader, undefined=environment.undefined, keep_trailing_newline=environment.keep_trailing_newline
            )
            sandbox.filters.update(environment.filters)
            utils.env = sandbox
        try:
            yield
        finally:
            ConfigurableTask.download, utils.env = download, environment


def _folders_of(task: Any, files: dict[Path, Any], folder: TaskFolder | None) -> list[Path]:
    """Where a task's relative paths may start."""
    if folder is None:
        return []
    metadata = getattr(task.config, "metadata", None) or {}
    source = Path(str(metadata.get("config_source", ""))).resolve()
    return folder.find_bases(files, [source] if source in files else list(files))
