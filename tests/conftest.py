"""Fixtures for all tests: one thread, no network, tiny models made once."""

from __future__ import annotations

import os
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
