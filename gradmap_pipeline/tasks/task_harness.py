"""What a step measures with lm-eval: the tasks found and checked, and a model measured on one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data import load_tokenizer
from ..errors import OptionError
from ..machine.digests import sha256_of, sha256_of_value
from ..recipe.validation import suggest
from . import harness
from .checks import find_faults
from .folder import TaskFolder
from .guard import guarded

if TYPE_CHECKING:
    from ..checkpoint.graph import ModelGraph
    from ..context import Context
    from ..export.exports import TransformersFolder

_RESAMPLES = 1000  # of documents, for the standard error of metrics that have no formula for it
_SHOWN = 5  # faults of tasks told at once


@dataclass(frozen=True)
class TaskHarness:
    """Tasks of lm-eval, its own or those of a folder, as a step names them by its options `tasks` and `task_folder`."""

    tasks: Sequence[str]
    folder: TaskFolder | None
    allow_code: bool
    """Whether Python that the folder's tasks name may run."""

    def check_folder(self) -> None:
        """Raise `OptionError` where the folder cannot be read, or would have Python run that nobody allowed."""
        folder = self.folder
        if folder is None:
            return
        try:
            code = [] if self.allow_code else list(folder.find_code())
            faults = [] if code else list(find_faults(folder, self.tasks, allow_code=self.allow_code))
            folder.outside_files()
        except (ValueError, OSError) as error:
            raise OptionError("task_folder", str(error)) from error
        if code:
            others = f" (and {len(code) - 1} more)" if len(code) > 1 else ""
            advice = "read it, and set `allow_code: true` if it may run"
            raise OptionError("task_folder", f"would run Python code: {code[0]}{others}; {advice}")
        if faults:
            others = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
            raise OptionError("task_folder", "; ".join(faults[:_SHOWN]) + others)

    def find_manager(self) -> Any:
        """lm-eval's manager of the tasks. Raises `OptionError` where it has no task of a name."""
        self.check_folder()
        folder = None if self.folder is None else str(self.folder.root.resolve())
        content = None if self.folder is None else sha256_of_value(self.fingerprint())
        manager = None if folder is None else harness.open_manager(folder, content, includes_defaults=False)
        if manager is None or not set(self.tasks) <= set(manager.all_tasks):
            manager = harness.open_manager(folder, content, includes_defaults=True)
        for task in self.tasks:
            if task not in manager.all_tasks:
                near = suggest(task, manager.all_tasks)
                advice = near if near.startswith("did") else "`lm-eval ls tasks` lists those it has; yours go into 'task_folder'"
                raise OptionError("tasks", f"lm-eval has no task {task!r}; {advice}")
        return manager

    def try_tasks(self) -> None:
        """Have lm-eval make the folder's tasks with their first row. Raises `OptionError` where it cannot."""
        manager = self.find_manager()
        if self.folder is not None:
            harness.try_tasks(manager, self.folder, list(self.tasks), allow_code=self.allow_code)

    def fingerprint(self) -> Any:
        """What the folder holds, by content; None without one."""
        return None if self.folder is None else self.folder.fingerprint(sha256_of)

    def load(self, model: ModelGraph | TransformersFolder, batch_size: int, context: Context) -> Any:
        """The model as lm-eval takes it, whole and in memory. Raises `CapacityError` where it does not fit."""
        with harness.quietly(), guarded(self.folder, allow_code=self.allow_code):
            return harness.make_harness(model, load_tokenizer(model.graph.base), batch_size, context)

    def measure(self, loaded: Any, task: str, manager: Any, fewshot: int | None, samples: int | None, seed: int) -> dict[str, Any]:
        """What `lm_eval.simple_evaluate` returns for one task. `loaded`: from `load`. `manager`: from `find_manager`."""
        with harness.quietly(), guarded(self.folder, allow_code=self.allow_code):
            import lm_eval

            results: dict[str, Any] = lm_eval.simple_evaluate(
                model=loaded,
                tasks=[task],
                task_manager=manager,
                num_fewshot=fewshot,
                limit=samples,
                bootstrap_iters=_RESAMPLES,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed % 2**32,  # it takes no more
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        return results
