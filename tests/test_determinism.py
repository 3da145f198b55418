"""`--verify-determinism`: each step runs once more, and what differs is named down to the tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model, make_text
from typer.testing import CliRunner, Result

from gradmap_pipeline.cli import app

_TEXT = {"dataset": {"path": "text.txt"}, "samples": 2, "sequence_length": 16}
_STEPS: list[dict[str, Any]] = [
    {"use": "calibrate", "with": _TEXT},
    {"use": "gradmap_score", "with": {"layers": 2}},
    {"use": "prune", "with": {"layers": 1}},
    {"use": "project_compensate"},
    {"use": "evaluate", "with": _TEXT, "limits": {"perplexity": {"max_ratio": 100}}},
    {"use": "export", "with": {"to": "out"}},
]
WAVERS = '''
from pathlib import Path
from pydantic import BaseModel, Field
from gradmap_pipeline import Artifact, FolderExport, ModelGraph, Stage, TensorFile, hookimpl

CALLS = []

class Note(Artifact):
    """How often, and in which time."""
    calls: list[dict[str, float]]
    seconds: float = 0.0

class Waver(Stage):
    """Give another tensor, or another figure, the second time."""
    name = "waver"
    what: str = Field(description="What wavers.")
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        note: Note
        model: ModelGraph
        more: Note | None = None
    def run(self, inputs, context):
        import torch
        CALLS.append(self.what)
        second = CALLS.count(self.what) > 1
        calls = context.remember("calls", lambda: len(CALLS)) if self.what == "remembered" else 1
        name = "model.norm.weight"
        old = inputs.model.base.tensors[name]
        values = torch.ones(old.shape)
        if self.what == "tensor" and second:
            values[3] = 1.5
        file = TensorFile.save({name: values}, context.folder / "norm.safetensors")
        figure = 2.0 if self.what == "figure" and second else 1.0
        note = Note(calls=[{"first": calls}, {"second": figure}], seconds=len(CALLS))
        more = note if self.what == "more" and second else None
        return self.Outputs(note=note, model=inputs.model.with_patches({name: file}, "wavered"), more=more)

@hookimpl
def gradmap_stages():
    return [Waver]
'''


def gradmap(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twice")
    make_model(folder / "model")
    make_text(folder / "text.txt")
    (folder / "wavers.py").write_text(WAVERS)
    (folder / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": "model"}, "steps": _STEPS}))
    waver = [{"use": "waver", "with": {"what": "nothing"}}, {"use": "export", "with": {"to": "wavered"}}]
    (folder / "w.yaml").write_text(json.dumps({"version": 1, "model": {"path": "model"}, "steps": waver}))
    return folder


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_each_step_runs_once_more(folder: Path) -> None:
    result = gradmap("run", "r.yaml", "--verify-determinism", "--json")
    assert result.exit_code == 0, result.output
    events = [json.loads(line) for line in result.stdout.splitlines()]
    told = [event["step"] for event in events if event["event"] == "note" and "ran once more" in event["text"]]
    assert list(dict.fromkeys(told)) == [step["use"] for step in _STEPS]
    assert told.count("evaluate") == 2  # of the unpruned model, too
    assert [path.name for path in folder.iterdir() if path.name.startswith("out")] == ["out"]
    assert not list((folder / ".gradmap").rglob("*.partial-*"))


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (
            "tensor",
            "output 'model', patches.model.norm.weight: tensor 'model.norm.weight' differs in 1 of 32 values, by up to 0.5",
        ),
        ("figure", "output 'note', calls.1.second: 1.0, then 2.0"),
        ("more", "output 'more' was made the second time alone"),
        ("remembered", "output 'note', calls.0.first: "),
    ],
)
def test_what_differs_is_named(folder: Path, what: str, told: str) -> None:
    given = ["w.yaml", "--plugin", "wavers.py", "--set", f"waver.what={what}"]
    result = gradmap("run", *given, "--verify-determinism")
    assert result.exit_code == 6
    assert f"error: step 'waver': stage 'waver' gave something else when it ran once more: {told}" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (folder / "wavered").exists()
    log = gradmap("log", "--limit", 1, "--json").stdout
    assert (json.loads(log)["outcome"], json.loads(log)["exit_code"]) == ("failed", 6)


def test_times_and_places_are_no_difference(folder: Path) -> None:
    for _ in range(2):  # the second time all is in the store
        result = gradmap("run", "w.yaml", "--plugin", "wavers.py", "--verify-determinism")
        assert result.exit_code == 0, result.output
        assert result.stdout.count("ran once more, and gave the same to the bit") == 2
    assert (folder / "wavered").is_dir()


def test_file_of_an_export_that_differs_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradmap_pipeline.export import transformers_folder

    write, counts = transformers_folder.write_companions, []

    def write_otherwise(model: Any, to: Path) -> None:
        write(model, to)
        counts.append(to)
        (to / "config.json").write_text((to / "config.json").read_text() + " " * len(counts))

    monkeypatch.setattr(transformers_folder, "write_companions", write_otherwise)
    result = gradmap("run", "r.yaml", "--verify-determinism", "--set", "export.to=another")
    assert result.exit_code == 6
    assert "step 'export': stage 'export' gave something else when it ran once more: output 'exported', file 'config.json'" in (
        result.stderr
    )
