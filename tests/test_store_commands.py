"""`gradmap store`: what is listed, what goes and what stays, above all under a run; what is damaged is named."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from test_store import Outputs, Store, save
from typer.testing import CliRunner, Result

from gradmap_pipeline.cli import app
from gradmap_pipeline.errors import CommandError
from gradmap_pipeline.machine.digests import sha256_of_value
from gradmap_pipeline.run.run_files import DONE, dump_run, new_run_file
from gradmap_pipeline.run.store_collection import Criteria, collect, parse_age
from gradmap_pipeline.run.store_entries import list_entries
from gradmap_pipeline.run.store_files import with_digest
from gradmap_pipeline.run.store_uses import read_uses

DAY = 24 * 3600.0
A, B = "a" * 64, "b" * 64


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def gradmap(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def age(path: Path, days: float) -> None:
    """Let a path and all in it have been used so many days ago."""
    for part in [*path.rglob("*"), path]:
        os.utime(part, (time.time() - days * DAY,) * 2)


def use(store: Path, recipe: Path, *keys: str, is_complete: bool = True) -> None:
    """A run of a recipe that takes these results."""
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.touch()
    runner = Store(store)
    runner.prepare(recipe, ["make"])
    for key in keys:
        runner.load("make", key, Outputs)
    runner.close(is_complete=is_complete)


@pytest.fixture
def store(place: Path) -> Path:
    """Results `a` and `b`, one unit, and the record of a run."""
    made = Store(place / ".gradmap")
    made.prepare()
    save(made, 1, A)
    save(made, 2, B)
    made.save_unit("make", "part", 3, 0.1)
    run = new_run_file(made.root)
    made.save_run(run.path, dump_run({"id": run.id, "outcome": DONE}, {"figures": 1}))
    made.close()
    return made.root


def names(root: Path) -> list[str]:
    return sorted(f"{entry.sort} {entry.key[:1]}".strip() for entry in list_entries(root) if entry.sort != "other")


def test_ls_says_what_is_kept_for_which_recipe_and_since_when(store: Path, place: Path) -> None:
    use(store, place / "one.yaml", A)
    use(store, place / "two.yaml", A)
    age(store / "steps" / f"make-{B[:16]}", 40)
    listed = gradmap("store", "ls")
    assert listed.exit_code == 0
    headings, first, second, *others = (line.split() for line in listed.output.splitlines())
    assert " ".join(headings) == "stage key size last used used by"
    assert first[:2] == ["make", A[:12]]
    assert first[-2:] == ["one.yaml,", "two.yaml"]
    assert second[:2] == ["make", B[:12]]
    assert second[4] == time.strftime("%Y-%m-%d", time.localtime(time.time() - 40 * DAY))
    assert [line[:2] for line in others] == [["make", "1"], ["records", "of"]]
    listing: list[dict[str, Any]] = json.loads(gradmap("store", "ls", "--json").output)
    sizes = {entry["key"]: entry["bytes"] for entry in listing if entry["sort"] == "step"}
    assert sizes[A[:16]] == sum(file.stat().st_size for file in (store / "steps" / f"make-{A[:16]}").iterdir())
    assert {entry["key"]: len(entry["recipes"]) for entry in listing if entry["sort"] == "step"} == {A[:16]: 2, B[:16]: 0}


def test_du_adds_up_to_all_that_lies_there(store: Path) -> None:
    said = json.loads(gradmap("store", "du", "--json").output)
    assert said["bytes"] == sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    assert {(part["sort"], part["name"]): part["count"] for part in said["parts"]} == {
        ("step", "make"): 2, ("unit", "make"): 1, ("record", ""): 1, ("other", ""): 2
    }  # fmt: skip
    lines = gradmap("store", "du").output.splitlines()
    assert any(line.startswith("results of make") for line in lines)
    assert lines[-1].startswith("all ")


def test_gc_by_age_and_only_when_told(store: Path) -> None:
    age(store, 40)
    age(store / "steps" / f"make-{A[:16]}", 10)
    before = names(store)
    for refused, message in (
        ([], "gc needs a criterion; give --older-than 30d, --max-size 20GiB or --unused-by FOLDER"),
        (["--older-than", "30"], "--older-than: found '30', accepted: a number of hours, days or weeks, as 12h, 30d or 2w"),
        (["--unused-by", "nowhere"], "--unused-by 'nowhere' is not a folder"),
        (["--older-than", "30d", "--store", "elsewhere"], "--store 'elsewhere' is no store"),
    ):
        done = gradmap("store", "gc", *refused)
        assert done.exit_code == 2
        assert message in done.output
    dry = gradmap("store", "gc", "--older-than", "30d", "--dry-run")
    assert f"would remove result make {B[:12]} (" in dry.output
    assert "would remove 3 of what the store keeps" in dry.output
    assert names(store) == before == ["record", "step a", "step b", "unit e"]
    assert gradmap("store", "gc", "--older-than", "30d").output == dry.output.replace("would remove", "removed").replace(
        "would stay", "stay"
    )
    assert names(store) == ["step a"]
    assert not [path for path in store.iterdir() if "removed" in path.name]
    assert Store(store).load("make", A, Outputs) is not None
    assert [parse_age(text) / 3600 for text in ("12h", "30d", "2w")] == [12, 720, 336]


def test_gc_by_size_takes_what_was_used_longest_ago(store: Path) -> None:
    for path, days in ((f"steps/make-{A[:16]}", 3), (f"steps/make-{B[:16]}", 2)):
        age(store / path, days)
    whole = sum(entry.bytes for entry in list_entries(store))
    assert not collect(store, Criteria(max_bytes=whole), is_dry=False).removed
    done = collect(store, Criteria(max_bytes=whole - 1), is_dry=False)
    assert [entry.key[:1] for entry in done.removed] == ["a"]
    assert done.kept_bytes < whole


def test_criteria_must_all_be_met(store: Path, place: Path) -> None:
    use(store, place / "kept" / "one.yaml", A)
    age(store, 40)
    done = gradmap("store", "gc", "--unused-by", "kept", "--older-than", "50d")
    assert "removed 0 of" in done.output
    done = gradmap("store", "gc", "--unused-by", "kept", "--older-than", "30d")
    assert done.exit_code == 0, done.output
    assert names(store) == ["record", "step a", "unit e"]  # a unit of a stage that is needed, and records, stay


def test_what_no_recipe_of_a_folder_needs(store: Path, place: Path) -> None:
    (place / "empty").mkdir()
    refused = gradmap("store", "gc", "--unused-by", "empty")
    assert refused.exit_code == 2
    assert "--unused-by 'empty': no recipe in it has run with this store, so everything would go" in refused.output
    use(store, place / "kept" / "one.yaml", A, B)
    use(store, place / "kept" / "one.yaml", A, is_complete=False)  # was stopped: the end of the run before still counts
    assert "removed 0 of" in gradmap("store", "gc", "--unused-by", "kept").output
    use(store, place / "kept" / "one.yaml", A)
    use(store, place / "kept" / "gone.yaml", B)
    (place / "kept" / "gone.yaml").unlink()
    assert "removed 1 of" in gradmap("store", "gc", "--unused-by", "kept").output
    assert names(store) == ["record", "step a", "unit e"]


def test_rm_by_stage_key_and_run(store: Path, place: Path) -> None:
    use(store, place / "one.yaml", A)
    use(store, place / "two.yaml", A, B)
    for refused, message in (
        ([], "rm removes what is named; give --step STAGE, --key KEY or --run RECIPE"),
        (["--step", "nothing"], "--step 'nothing': the store"),
        (["--key", "abc"], "--key: found 'abc'; accepted: 4 digits or more"),
        (["--run", "three.yaml"], "--run 'three.yaml': the store"),
    ):
        done = gradmap("store", "rm", *refused)
        assert done.exit_code == 2
        assert message in done.output
    assert "would remove 1 of" in gradmap("store", "rm", "--key", "AAAA", "--dry-run").output
    assert gradmap("store", "rm", "--run", "two.yaml").exit_code == 0
    assert names(store) == ["record", "step a", "unit e"]
    record = next((store / "runs").iterdir()).stem.rpartition("-")[2]
    assert gradmap("store", "rm", "--run", record[:6]).exit_code == 0
    assert gradmap("store", "rm", "--step", "make").exit_code == 0
    assert names(store) == []


def test_what_a_run_uses_stays_until_it_ends(store: Path, place: Path) -> None:
    runner = Store(store)
    runner.prepare(place / "r.yaml", ["make"])
    loaded = runner.load("make", A, Outputs)
    assert isinstance(loaded, Outputs)
    everything = Criteria(max_bytes=1)
    done = collect(store, everything, is_dry=False)
    assert sorted(f"{entry.sort} {entry.key[:1]}" for entry in done.left) == ["step a", "unit e"]
    assert loaded.thing.tensors.load()["x"].tolist() == [1.0, 1.0, 1.0]
    assert runner.load("make", B, Outputs) is None
    runner.close(is_complete=True)
    assert not collect(store, everything, is_dry=False).left
    assert names(store) == []


def test_tensors_that_a_result_hands_on_from_another_stay(store: Path, place: Path) -> None:
    """A result may rest on files of a step that this run does not have."""
    made = Store(store)
    made.prepare()
    first = made.load("make", A, Outputs)
    assert isinstance(first, Outputs)
    with made.step("hand_on", B) as folder:
        made.finish(folder, B, {"step": "hand_on"}, first)
    made.close()
    runner = Store(store)
    runner.prepare(place / "r.yaml", ["hand_on"])
    assert isinstance(runner.load("hand_on", B, Outputs), Outputs)
    left = collect(store, Criteria(max_bytes=1), is_dry=False).left
    runner.close()
    assert sorted(f"{entry.name} {entry.key[:1]}" for entry in left) == ["hand_on b", "make a"]


def test_a_killed_run_holds_nothing_and_its_uses_are_known(store: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = place / "r.yaml"
    recipe.touch()
    runner = Store(store)
    runner.prepare(recipe, ["make"])
    runner.load("make", A, Outputs)
    (running,) = (store / "uses").glob("running-*.jsonl")
    with running.open("a") as file:
        file.write('{"step": "make-bb')  # where it was killed
    runner._uses._lock.release()  # as the system does when its process ends
    done = collect(store, Criteria(unused_by=place), is_dry=False)
    assert not done.left
    assert [entry.key[:1] for entry in done.removed if entry.sort == "step"] == ["b"]
    assert [(one.recipe, one.is_running, one.steps) for one in read_uses(store)] == [
        (str(recipe), False, (f"make-{A[:16]}",)),
    ]


def test_work_and_records_that_a_process_holds_stay(store: Path) -> None:
    from filelock import FileLock

    (record,) = (store / "runs").glob("*.json")
    worker = Store(store)
    folder = worker.hold_folder("train", A)
    (folder / "state").write_text("half done")
    with FileLock(record.with_suffix(".lock")):
        done = collect(store, Criteria(max_bytes=1), is_dry=False)
    assert sorted(entry.sort for entry in done.left) == ["record", "unit"]
    assert (folder / "state").read_text() == "half done"
    worker.close()
    assert len(collect(store, Criteria(max_bytes=1), is_dry=False).removed) == 2
    assert not folder.exists()
    assert names(store) == []


COLLECTING = '''
"""Collect all that may go, while a run goes on."""
from pathlib import Path
from pydantic import BaseModel
from gradmap_pipeline import ModelGraph, Stage, hookimpl

class CollectAll(Stage):
    """Collect."""
    name = "collect_all"
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        model: ModelGraph
    def run(self, inputs, context):
        from gradmap_pipeline.run.store_collection import Criteria, collect
        done = collect(Path(".gradmap").resolve(), Criteria(max_bytes=1), is_dry=False)
        context.note(f"left {sorted(entry.name for entry in done.left)}, removed {sorted({entry.name for entry in done.removed})}")
        return self.Outputs(model=inputs.model)

@hookimpl
def gradmap_stages():
    return [CollectAll]
'''


def test_gc_during_a_run_loses_nothing(llama: Path, text: Path, place: Path) -> None:
    (place / "collecting.py").write_text(COLLECTING)
    amount = {"dataset": {"path": str(text)}, "samples": 4, "sequence_length": 16}
    steps: list[dict[str, Any]] = [
        {"use": "calibrate", "with": amount},
        {"use": "gradmap_score", "with": {"layers": 1}},
        {"use": "prune", "with": {"layers": 1}},
        {"use": "project_compensate"},
        {"use": "evaluate", "with": amount},
    ]
    recipe = {"version": 1, "model": {"path": str(llama)}, "steps": steps}
    (place / "other.yaml").write_text(json.dumps({**recipe, "seed": 1}))
    recipe["steps"] = [*steps[:-1], {"use": "collect_all"}, steps[-1]]
    (place / "r.yaml").write_text(json.dumps(recipe))
    assert gradmap("run", "other.yaml").exit_code == 0
    ran = gradmap("run", "r.yaml", "--plugin", "collecting.py")
    assert ran.exit_code == 0, ran.output
    assert "'calibrate'" in ran.output.partition("left ")[2].partition("removed")[0]
    assert "'evaluate'" in ran.output.partition("removed")[2]
    again = gradmap("run", "r.yaml", "--plugin", "collecting.py")
    assert again.output.count("done (from the store)") == 6


def test_check_names_what_is_damaged(llama: Path, text: Path, place: Path) -> None:
    amount = {"dataset": {"path": str(text)}, "samples": 2, "sequence_length": 8}
    steps = [{"use": "calibrate", "with": amount}, {"use": "evaluate", "with": amount}]
    (place / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(llama)}, "steps": steps}))
    assert gradmap("run", "r.yaml", "--quiet").exit_code == 0
    sound = gradmap("store", "check")
    assert sound.exit_code == 0, sound.output
    assert "0 damaged" in sound.output
    (step,) = (place / ".gradmap" / "steps").glob("calibrate-*")
    (tensors,) = step.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    (unit,) = (place / ".gradmap" / "units").glob("evaluate-*.json")
    unit.write_text(unit.read_text().replace("loss", "lose"))
    damaged = gradmap("store", "check")
    assert damaged.exit_code == 4
    assert f"error: result calibrate {step.name.partition('-')[2][:12]} (" in damaged.output
    assert f"is damaged: 'steps/{step.name}/{tensors.name}' is not as it was written" in damaged.output
    assert "error: unit of work evaluate " in damaged.output
    assert "2 damaged" in damaged.output
    advice = damaged.output.partition("a run makes them again; gradmap store rm ")[2]
    assert f"--key {step.name.partition('-')[2][:12]}" in advice
    (step / "outputs.json").write_text("{}")
    assert "its outputs.json is missing, or not as it was written" in gradmap("store", "check").output


def test_a_result_of_a_stage_that_is_not_there_is_told(store: Path) -> None:
    checked = gradmap("store", "check")
    assert checked.exit_code == 0
    assert checked.output.count("as its stage is not installed; name its file with --plugin") == 2


def test_ls_of_a_thousand_runs_is_quick(place: Path) -> None:
    root = place / ".gradmap"
    for folder in ("steps", "units", "runs", "uses"):
        (root / folder).mkdir(parents=True)
    for number in range(1000):
        key = sha256_of_value(number)
        (root / "steps" / f"make-{key[:16]}").mkdir()
        (root / "steps" / f"make-{key[:16]}" / "outputs.json").write_text("{}")
        (root / "runs" / f"r{number}-{key[:16]}.json").write_text("{}")
        content = {"recipe": f"/r/{number}.yaml", "stages": ["make"], "steps": [f"make-{key[:16]}"], "at": 1.0}
        (root / "uses" / f"{number}-{key[:16]}.json").write_text(json.dumps(with_digest(content)))
    started = time.process_time()
    listed = gradmap("store", "ls")
    assert time.process_time() - started < 0.5
    assert listed.output.count(".yaml") == 1000


def test_a_store_that_is_none(place: Path) -> None:
    for command in ("ls", "du", "check"):
        done = gradmap("store", command)
        assert done.exit_code == 2
        assert "--store '.gradmap' is no store; name the folder of one, as a run makes it" in done.output
    assert not (place / ".gradmap").exists()
    with pytest.raises(CommandError, match="no recipe in it has run"):
        collect(place, Criteria(unused_by=place), is_dry=True)
