"""What an exported folder answers, in plain transformers and lm-eval: accuracy on tasks, and greedy continuations."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

PROMPT = 64
"""Tokens that a continuation starts from."""
CONTINUATION = 64
"""Tokens of a continuation."""
PERIOD = 8
"""A continuation that ends in three rounds of at most so many tokens is a loop."""


def measure_accuracy(folder: Path, tasks: Path, questions: int | None, dtype: str) -> dict[str, tuple[float, float]]:
    """Zero-shot accuracy by task with its standard error; of each task the first `questions` of its file.

    `tasks`: a folder of lm-eval tasks. Accuracy is normalised by length where the task says that too.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    model = HFLM(pretrained=str(folder), dtype=dtype, device="cpu", batch_size=8)
    with contextlib.redirect_stdout(io.StringIO()):
        done: dict[str, Any] = lm_eval.simple_evaluate(
            model=model, tasks=list(manager.all_tasks), limit=questions, bootstrap_iters=0, task_manager=manager
        )
    accuracies = {}
    for task, values in sorted(done["results"].items()):
        share = float(values["acc_norm,none"] if "acc_norm,none" in values else values["acc,none"])
        accuracies[task] = share, (share * (1 - share) / (done["n-samples"][task]["effective"] - 1)) ** 0.5
    return accuracies


def mean_accuracy(accuracies: dict[str, tuple[float, float]]) -> tuple[float, float]:
    """The mean over tasks, and its standard error."""
    values = list(accuracies.values())
    return sum(value for value, _ in values) / len(values), sum(error**2 for _, error in values) ** 0.5 / len(values)


def continue_greedily(folder: Path, prompts: Any, dtype: str) -> list[list[int]]:
    """`CONTINUATION` tokens after each prompt (int64, (prompts, PROMPT)), each the most likely one."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    length = {"max_new_tokens": CONTINUATION, "min_new_tokens": CONTINUATION}
    tokens = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, pad_token_id=0, **length)
    return [[int(token) for token in row] for row in tokens[:, prompts.shape[1] :]]


def count_agreeing(ours: Sequence[int], dense: Sequence[int]) -> int:
    """Tokens before the first one that differs."""
    return next((place for place, (one, other) in enumerate(zip(ours, dense, strict=True)) if one != other), len(dense))


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether the last tokens are three rounds of one period of at most `PERIOD` tokens."""
    tokens = list(tokens)
    periods = range(1, min(PERIOD, len(tokens) // 3) + 1)
    return any(tokens[-period:] == tokens[-2 * period : -period] == tokens[-3 * period : -2 * period] for period in periods)
