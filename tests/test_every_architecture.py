"""Every causal LM that transformers registers goes through every stage, or is refused before work starts, as documented."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import __version__
from walk import ARCHITECTURES, describe, walk

TABLE = Path(__file__).parent.parent / "docs" / "architectures.md"
ROWS = {line.split("|")[1].strip(): line for line in TABLE.read_text().splitlines() if line.startswith("| ")}
KNOWN = f"transformers {__version__} " in TABLE.read_text()
"""Whether the table is about the transformers that is installed; another has other architectures."""

NAMED = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "opt",
    "bloom",
    "falcon",
    "mpt",
    "stablelm",
    "starcoder2",
    "olmo",
    "olmo2",
    "olmoe",
    "cohere",
    "cohere2",
    "granite",
    "granitemoe",
    "glm",
    "glm4",
    "smollm3",
    "lfm2",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "llama4_text",
    "ernie4_5",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "mamba",
    "mamba2",
    "falcon_mamba",
    "jamba",
    "bamba",
    "nemotron",
    "exaone4",
    "seed_oss",
    "minimax",
    "dots1",
]

QUICK = ("llama", "gpt2", "gpt_neox", "bloom", "gemma3_text", "qwen3_moe", "deepseek_v3", "gpt_oss", "mamba2", "jamba")
"""Of each kind one: plain, learned positions, parallel residuals, ALiBi, windows, experts, latent attention, state spaces."""


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.full) for name in ARCHITECTURES]
)
def test_architecture(architecture: str, tmp_path: Path) -> None:
    outcome = walk(architecture, tmp_path)
    if KNOWN:
        assert describe(architecture, outcome) == ROWS[architecture]
    if outcome.status != "works":
        assert outcome.note
        return
    assert outcome.difference == 0
    assert min(outcome.cached, outcome.uncached) <= 1e-5
    for layer, (ours, plain) in outcome.scores.items():
        assert ours == pytest.approx(plain, rel=1e-4), layer


@pytest.mark.skipif(not KNOWN, reason="docs/architectures.md is about another transformers")
def test_all_are_documented() -> None:
    assert ROWS.keys() - {"model type"} == set(ARCHITECTURES)
    works = {architecture for architecture, row in ROWS.items() if "| works |" in row}
    assert len(works) >= 60
    assert {*NAMED, *QUICK} <= works
