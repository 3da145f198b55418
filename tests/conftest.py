"""Fixtures for all tests: one thread, no network, tiny models made once."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tiny import make_model, make_text


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random 4-layer Llama in fp32. Do not write into it."""
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of about 17 kB."""
    return make_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Each test runs in one large block of Python's stack of frames.

    CPython asks the system for 16 KiB of it at a time, and gives them back with the frame that needed them: a loop whose calls go
    over such an edge, as happens at some depths below pytest, spent 90 of 150 s there.
    """
    pyfuncitem.obj = partial(_call_with_room, pyfuncitem.obj)
    return (yield)


def _call_with_room(test: Callable[..., object], **fixtures: object) -> object:
    return test(**fixtures)


_call_with_room.__code__ = _call_with_room.__code__.replace(co_stacksize=100_000)
