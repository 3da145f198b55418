"""A stage that breaks its promises is named, and never loops, hides from checks, or removes what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from gradmap_pipeline import ModelGraph, Stage
from gradmap_pipeline.cli import app
from gradmap_pipeline.errors import PluginError
from gradmap_pipeline.recipe.catalog import load_catalog

RANKING = '''
from gradmap_pipeline import Decision, LayerScoring, Measure, hookimpl

class Odd(LayerScoring):
    """Rank oddly."""
    name = "odd_score"
    def describe(self):
        return "odd"
    def measure(self, context):
        return Measure(lambda sweep: SCORES, "odd")
    def decide(self, kept, scores, wanted, protected):
        return DECISIONS

@hookimpl
def gradmap_stages():
    return [Odd]
'''
PLAIN = "{layer: float(layer) for layer in sweep.layers}"
LOWEST = "super().decide(kept, scores, wanted, protected)"
ONE = "[Decision(removed=N, scores=scores, removed_if_unprotected=N)]"
MANY = "[Decision(removed=layer, scores=scores, removed_if_unprotected=layer) for layer in kept]"
CASES = {
    "nothing": (PLAIN, "[]", "'decide' must return 1 to 2 decisions, got 0"),
    "None": (PLAIN, "None", "'decide' must return a list of Decision, got None"),
    "numbers": (PLAIN, "[1, 2]", "'decide' must return a list of Decision, got [1, 2]"),
    "too many": (PLAIN, MANY, "'decide' must return 1 to 2 decisions, got 4"),
    "protected": (PLAIN, ONE.replace("N", "0"), "'decide' removes layer 0, which is protected"),
    "gone": (PLAIN, ONE.replace("N", "9"), "'decide' removes layer 9, which is not left"),
    "twice": (PLAIN, ONE.replace("N", "1") + " * 2", "'decide' removes layer 1, which is removed already"),
    "no scores": ("{}", LOWEST, "a ranking must be scores by layer, at least one; got {}"),
    "other layers": ("{7: 1.0}", LOWEST, "scores layer 7, which the model does not have; it has [0, 1, 2, 3]"),
    "text": ("{1: 'low'}", LOWEST, "the score of layer 1 must be a number, got 'low'"),
    "nan": ("{layer: float('nan') for layer in sweep.layers}", LOWEST, "the score of layer 0 is not a finite number"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_rankings_are_held_to_what_they_promise(
    case: str, tmp_path: Path, llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, decisions, message = CASES[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.py").write_text(RANKING.replace("SCORES", scores).replace("DECISIONS", decisions))
    (tmp_path / "r.yaml").write_text(
        f"version: 1\nmodel: {{path: {llama}}}\nsteps:\n  - use: calibrate\n"
        f"    with: {{dataset: {{path: {text}}}, samples: 2, sequence_length: 16}}\n  - use: odd_score\n    with: {{layers: 2}}\n"
    )
    result = CliRunner().invoke(app, ["run", "r.yaml", "--plugin", "odd.py"])
    assert result.exit_code == 4, result.output
    assert message in result.stderr
    assert "odd_score" in result.stderr


class Ports(BaseModel):
    model: ModelGraph


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"abstract": False}, "must define 'name'"),
        ({"name": "x", "abstract": False, "Inputs": Ports, "Outputs": Ports, "__doc__": None}, "needs a docstring"),
        ({"name": "x", "abstract": 0, "Inputs": Ports, "Outputs": int, "__doc__": "X."}, "'Outputs' must be a class derived from"),
        ({"name": 3, "Inputs": Ports, "Outputs": Ports, "__doc__": "X."}, "'name' must be text"),
    ],
)
def test_only_a_true_abstract_leaves_checks_out(body: dict[str, object], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        type("Odd", (Stage,), {"__module__": __name__, **body})
    assert issubclass(type("Base", (Stage,), {"__module__": __name__, "abstract": True}), Stage)


def test_checks_hold_for_what_derives_from_a_base() -> None:
    base = type("Base", (Stage,), {"__module__": __name__, "abstract": True})
    options = {"__annotations__": {"speed": int}, "speed": Field(3)}
    with pytest.raises(PluginError, match=r"option 'speed' needs a Field\(description=...\)"):
        type("Odd", (base,), {"__module__": __name__, "__doc__": "X.", "name": "x", "Inputs": Ports, "Outputs": Ports, **options})


def test_base_in_the_list_of_a_plugin_is_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(RANKING.replace("return [Odd]", "return [LayerScoring]"))
    with pytest.raises(PluginError, match="LayerScoring is a base of stages, not a stage"):
        load_catalog([tmp_path / "odd.py"])
