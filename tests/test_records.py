"""Records of runs: every end is recorded, a run fails for no record, and log, show and diff tell what was recorded."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from rich.console import Console
from tiny import make_model, make_text
from typer.testing import CliRunner, Result

from gradmap_pipeline.cli import app
from gradmap_pipeline.report import run_log
from gradmap_pipeline.report.run_log import list_heads
from gradmap_pipeline.run.difference import Side, find_differences, load_run
from gradmap_pipeline.run.run_files import RunFile, dump_run, find_run, list_runs, read_head, read_run, shorten_ids
from gradmap_pipeline.run.store import Store

_TEXT = {"dataset": {"path": "text.txt"}, "samples": 4, "sequence_length": 32}
_STEPS: list[dict[str, Any]] = [
    {"use": "prune", "with": {"layers": [1]}},
    {"use": "evaluate", "with": _TEXT, "limits": {"perplexity": {"max": 1e6}}},
]
ENDS = '''
from pydantic import BaseModel, Field
from gradmap_pipeline import ModelGraph, Stage, hookimpl

class End(Stage):
    """End in some way."""
    name = "end_somehow"
    how: str = Field(description="In which.")
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        model: ModelGraph
    def run(self, inputs, context):
        raise {"error": ValueError("broken\\nbadly"), "interrupt": KeyboardInterrupt(), "memory": MemoryError()}[self.how]

@hookimpl
def gradmap_stages():
    return [End]
'''

NAPS = '''
import time
from datetime import datetime, timezone
from pathlib import Path
from pydantic import BaseModel
from gradmap_pipeline import ModelGraph, Stage, StageError, hookimpl

class Nap(Stage):
    """Sleep in two parts."""
    name = "nap"
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        model: ModelGraph
    def run(self, inputs, context):
        context.remember("long", lambda: time.sleep(1.2))
        if Path("stop").exists():
            raise StageError("stopped")
        return self.Outputs(model=inputs.model)

@hookimpl
def gradmap_stages():
    return [Nap]
'''


def gradmap(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a recipe ran twice, with other options."""
    folder = tmp_path_factory.mktemp("ran")
    make_model(folder / "model")
    make_text(folder / "text.txt")
    (folder / "ends.py").write_text(ENDS)
    recipe = {"version": 1, "description": "Remove a layer.", "model": {"path": "model"}, "steps": _STEPS}
    (folder / "r.yaml").write_text(json.dumps(recipe))
    ending = {"use": "end_somehow", "with": {"how": "error"}}
    (folder / "ends.yaml").write_text(json.dumps({"version": 1, "model": {"path": "model"}, "steps": [*_STEPS, ending]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert gradmap("run", "r.yaml").exit_code == 0
        assert gradmap("run", "r.yaml", "--set", "prune.layers=[2]", "--set", "evaluate.samples=2").exit_code == 0
    return folder


@pytest.fixture
def folder(ran: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ran)
    return ran


def last_record(folder: Path) -> dict[str, Any]:
    return load_run(folder / ".gradmap", "last")


def test_record_holds_what_decided_the_result(folder: Path) -> None:
    record = load_run(folder / ".gradmap", "last~1")
    assert (record["head"]["outcome"], record["head"]["exit_code"], record["head"]["layers"]) == ("done", 0, 3)
    assert record["head"]["description"] == "Remove a layer."
    provenance = record["provenance"]
    assert provenance["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "transformers"} <= provenance["libraries"].keys()
    assert (provenance["device"], provenance["dtype"], provenance["seed"]) == ("cpu", "float32", 0)
    assert provenance["model"]["sha256"] == record["base"]["sha256"]
    by_id = {step["id"]: step for step in provenance["steps"]}
    assert by_id["evaluate"]["options"]["dataset"]["files"] == [Store(folder / ".gradmap").digest_of(folder / "text.txt")]
    assert record["planned"][0]["options"]["layers"] == [1]
    stored = {path.name for path in (folder / ".gradmap" / "steps").iterdir()}
    assert {f"{step['stage']}-{step['key'][:16]}" for step in record["steps"]} <= stored


@pytest.mark.parametrize(
    ("how", "outcome", "code", "told"),
    [
        ("error", "failed", 4, "step 'end_somehow': stage 'end_somehow' (ends.py) failed: ValueError: broken; badly"),
        ("interrupt", "interrupted", 130, ""),
        ("memory", "failed", 3, "memory"),
    ],
)
def test_every_end_is_recorded(folder: Path, how: str, outcome: str, code: int, told: str) -> None:
    result = gradmap("run", "ends.yaml", "--plugin", "ends.py", "--set", f"end_somehow.how={how}")
    assert result.exit_code == code
    record = last_record(folder)
    assert (record["head"]["outcome"], record["head"]["exit_code"]) == (outcome, code)
    assert told in record["failure"]
    assert [step["id"] for step in record["steps"]] == ["prune", "evaluate"]
    assert record["head"]["metrics"]
    shown = gradmap("show").stdout
    assert f"of ends.yaml: {outcome}, exit code {code}; of 3 steps, 2 done\n" in shown
    assert f"set on the command line: end_somehow.how={how}\n" in shown
    listed = gradmap("log", "--limit", 1).stdout.splitlines()[3]
    assert re.fullmatch(rf" [0-9a-f]+ .* ends\.yaml +{outcome} \({code}\) +[\d.]+ s +of 3 steps, 2 done", listed)
    assert not list((folder / ".gradmap" / "runs").glob("*.lock"))


def test_limit_that_is_missed_is_recorded(folder: Path) -> None:
    assert gradmap("run", "r.yaml", "--set", "evaluate.limits.perplexity.max=1").exit_code == 5
    assert last_record(folder)["head"]["outcome"] == "limit missed"
    line = gradmap("log", "--limit", 1).stdout.splitlines()[3]
    assert re.search(r"r\.yaml +limit missed \(5\) +[\d.]+ s +4 → 3 +perplexity on text\.txt [\d.e+]+", line)


def test_model_that_cannot_be_opened_is_recorded(folder: Path) -> None:
    (folder / "spoilt").mkdir(exist_ok=True)
    for file in (folder / "model").iterdir():
        (folder / "spoilt" / file.name).write_bytes(file.read_bytes()[: -10 if file.suffix == ".safetensors" else None])
    assert gradmap("run", "r.yaml", "--set", "model.path=spoilt").exit_code == 2
    head = list_heads(folder / ".gradmap", 1)[0][0]
    assert (head["outcome"], head["exit_code"], head["model"], "layers" in head) == ("failed", 2, "spoilt", False)


def test_killed_run_and_running_one_are_told_apart(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    run = RunFile(tmp_path / "runs" / "20260101T000000000000Z-0123456789ab.json", "0123456789ab")
    head = {"id": run.id, "outcome": "running", "recipe": "r.yaml", "started_at": "2026-01-01T00:00:00Z", "seconds": 0.0}
    run.path.write_text(dump_run(head, {"recipe": ""}))
    with FileLock(run.lock):
        assert (read_head(run) or {})["outcome"] == "running"
    assert (read_head(run) or {})["outcome"] == "killed"
    assert "killed" in gradmap("log", "--store", tmp_path).stdout
    assert run.lock.exists()
    assert gradmap("run", "r.yaml", "--store", tmp_path).exit_code == 0
    assert not run.lock.exists()
    assert [head["outcome"] for head in list_heads(tmp_path, 0)[0]] == ["done", "killed"]


def test_disk_that_is_full_costs_the_record_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(store: Store, file: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Store, "save_run", fail)
    result = gradmap("run", "r.yaml", "--store", tmp_path / "store")
    assert result.exit_code == 0
    assert result.stdout.count(f"no record of this run is kept in '{tmp_path}/store/runs': No space left on device") == 1
    assert list_runs(tmp_path / "store") == []


def test_log_lists_newest_first(folder: Path) -> None:
    heads = [json.loads(line) for line in gradmap("log", "--json", "--limit", 0).stdout.splitlines()]
    assert [head["started_at"] for head in heads] == sorted((head["started_at"] for head in heads), reverse=True)
    assert len(heads) == len(list_runs(folder / ".gradmap")) >= 2
    assert all(head["id"].startswith(head["short_id"]) for head in heads)
    of_one = [json.loads(line)["recipe"] for line in gradmap("log", "r.yaml", "--json").stdout.splitlines()]
    assert set(of_one) == {"r.yaml"}
    shown = gradmap("log", "--limit", 1).stdout
    assert f"1 of {len(heads)} runs; --limit 0 lists all" in shown
    assert gradmap("log", "--store", "nowhere").stdout == "no runs in nowhere\n"
    assert not (folder / "nowhere").exists()


def test_log_in_80_columns_has_what_counts_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(width=80, force_terminal=True, color_system=None, _environ={"TERM": "xterm"})
    monkeypatch.setattr(run_log, "make_console", lambda: console)
    metrics = {"perplexity on /texts/wikitext-2/test.txt": 43.512, "repetition": 0.17}
    common = {"started_at": "2026-11-28T00:13:22Z", "base_layers": 30, "layers": 24, "metrics": metrics, "seconds": 89.2}
    done = {"short_id": "00904a", "recipe": "/recipes/of/a/long/place/mine.yaml", "outcome": "done", "exit_code": 0}
    stopped = {"short_id": "88fd8e", "recipe": "mine.yaml", "outcome": "interrupted", "exit_code": 130, "steps": 9, "steps_done": 4}
    export = {"short_id": "7c4814", "recipe": "out/smollm2-pruned/gradmap.json", "outcome": "limit missed", "exit_code": 5}
    run_log.print_log([{**common, **head} for head in (done, stopped, export)], 3, Path(".gradmap"))
    shown = capsys.readouterr().out
    start = datetime(2026, 11, 28, 0, 13, tzinfo=timezone.utc).astimezone().strftime("%m-%d %H:%M")
    assert [line.rstrip() for line in shown.splitlines()] == [
        "run     started      ended                    took  recipe",
        f"00904a  {start}  done               1 min 29 s  mine.yaml",
        "        30 → 24 layers, perplexity on test.txt 43.51, 1 more",
        f"88fd8e  {start}  interrupted (130)  1 min 29 s  mine.yaml",
        "        of 9 steps, 4 done",
        f"7c4814  {start}  limit missed (5)   1 min 29 s  smollm2-pruned/gradmap.json",
        "        30 → 24 layers, perplexity on test.txt 43.51, 1 more",
    ]


def test_step_that_went_on_after_an_interruption_says_so(folder: Path) -> None:
    (folder / "naps.py").write_text(NAPS)
    (folder / "naps.yaml").write_text(json.dumps({"version": 1, "model": {"path": "model"}, "steps": [{"use": "nap"}]}))
    for is_stopped in (True, False):
        (folder / "stop").touch() if is_stopped else (folder / "stop").unlink()
        assert gradmap("run", "naps.yaml", "--plugin", "naps.py").exit_code == (4 if is_stopped else 0)
    (step,) = last_record(folder)["steps"]
    assert step["seconds"] > 1.2
    assert step["seconds_here"] < 1.0
    assert re.search(r" nap +1\.[2-9] s, 0\.\d s of it in this run ", gradmap("show").stdout)
    assert gradmap("run", "naps.yaml", "--plugin", "naps.py").exit_code == 0
    assert re.search(r" nap +from the store ", gradmap("show").stdout)


def test_show_gives_the_recipe_back(folder: Path) -> None:
    run_id = next(head["id"] for head in list_heads(folder / ".gradmap", 0)[0] if head["recipe"] == "r.yaml")
    assert gradmap("show", run_id[:8], "--recipe").stdout == (folder / "r.yaml").read_text()
    assert json.loads(gradmap("show", run_id, "--json").stdout)["head"]["id"] == run_id


def test_diff_of_two_runs(folder: Path) -> None:
    first, second = (run.id for run in reversed(list_runs(folder / ".gradmap")[-2:]))
    shown = gradmap("diff", first, second).stdout
    assert "  prune.layers: [1] → [2]\n" in shown
    assert "  evaluate.samples: 4 → 2\n" in shown
    assert "  prune: layers removed: [1] → [2]\n" in shown
    assert re.search(r"  pruned \(prune\): perplexity on text\.txt: [\d.e+]+ → [\d.e+]+ \([+-][\d.]+%\)\n", shown)
    assert "versions" not in shown
    differences = json.loads(gradmap("diff", first, second, "--json").stdout)["differences"]
    assert differences["options"] == {"prune.layers": [[1], [2]], "evaluate.samples": [4, 2]}
    assert "no differences" in gradmap("diff", first, first).stdout


def test_diff_of_data_versions_and_recipes(folder: Path) -> None:
    first = list_runs(folder / ".gradmap")[-1]
    record = read_run(first)
    assert record is not None
    changed = json.loads(json.dumps(record))
    changed["provenance"]["libraries"]["torch"] = "1.0"
    changed["provenance"]["steps"][1]["options"]["dataset"]["files"] = ["0" * 64]
    other = RunFile(first.path.with_name("20200101T000000000000Z-ffffffffffff.json"), "ffffffffffff")
    other.path.write_text(dump_run({**changed.pop("head"), "id": other.id}, changed))
    shown = gradmap("diff", first.id, "ffffffffffff").stdout
    other.path.unlink()
    assert re.search(r"  evaluate\.dataset\.files: \[[0-9a-f]{12}\] → \[000000000000\]\n", shown)
    assert re.search(r"  torch: [\d.+a-z]+ → 1\.0\n", shown)
    (folder / "s.yaml").write_text((folder / "r.yaml").read_text().replace("[1]", "[0, 1]"))
    shown = gradmap("diff", "r.yaml", "s.yaml").stdout
    assert shown == "- r.yaml\n+ s.yaml\noptions\n  prune.layers: [1] → [0, 1]\n"
    assert "no differences" in gradmap("diff", "r.yaml", first.id).stdout


def test_diff_of_an_export_and_a_run(folder: Path) -> None:
    """Of the steps that led to the export, and of its model; where it lies is no difference."""
    steps = [*_STEPS, {"use": "export", "with": {"to": "out"}}, {"use": "evaluate", "id": "last", "with": _TEXT}]
    (folder / "e.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(folder / "model")}, "steps": steps}))
    assert gradmap("run", "e.yaml").exit_code == 0
    run = list_runs(folder / ".gradmap")[0].id
    shown = gradmap("diff", "out", run).stdout
    assert shown.splitlines()[2:] == ["options", f"  model.path: model → {folder / 'model'}"]
    shown = gradmap("diff", "out/gradmap.json", list_runs(folder / ".gradmap")[-2].id).stdout
    assert "  prune.layers: [1] → [2]\n" in shown
    assert re.search(r"result\n  layers removed: \[1\] → \[2\]\n  perplexity on text\.txt: [\d.e+]+ → ", shown)
    assert "last" not in shown


def test_parts_that_one_side_lacks_are_not_compared() -> None:
    assert find_differences(Side("a", {"options": {"x": 1}}), Side("b", {"options": {"y": 2}, "metrics": {"m": 1.0}})) == {
        "options": {"x": (1, None), "y": (None, 2)}
    }


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["show", "zz"], "found 'zz' as the name of a run; give the beginning of an id, as gradmap log shows it, last, or last~1"),
        (["show", "last~999"], "so there is no 'last~999'; see gradmap log"),
        (["show", "last", "--store", "nowhere"], "the store 'nowhere' has no record of a run; run a recipe first"),
        (["diff", "nix.yaml", "last"], "'nix.yaml' is neither a file nor the name of a run"),
        (["diff", "text.txt", "last"], "text.txt:1:1: a recipe is a mapping"),
        (["show", ""], "is empty; leave it out, or name something"),
        (["log", "--limit", "-1"], "--limit"),
    ],
)
def test_what_names_no_run_is_refused(folder: Path, arguments: list[str], told: str) -> None:
    result = gradmap(*arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stderr.count("\n") == 1


def test_damaged_record_is_named(folder: Path) -> None:
    run = list_runs(folder / ".gradmap")[-1]
    text = run.path.read_text()
    try:
        run.path.write_text(text.replace("Remove", "Leave", 1))
        assert [head["outcome"] for head in list_heads(folder / ".gradmap", 0)[0] if head["id"] == run.id] == ["damaged"]
        assert "damaged" in gradmap("log", "--limit", 0).stdout
        result = gradmap("show", run.id)
        assert result.exit_code == 2
        assert "is damaged: it is not what was written when the run ended; name another run" in result.stderr
        run.path.write_text("".join(text.splitlines(keepends=True)[:1]) + '"recipe": "other"}')
        assert gradmap("show", run.id).exit_code == 2
    finally:
        run.path.write_text(text)


def test_ids_are_shortened_as_far_as_they_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    ids = ["0123456789ab", "012345678fff", "0123aaaaaaaa"]
    for number, run_id in enumerate(ids):
        (tmp_path / "runs" / f"2026010{number + 1}T000000000000Z-{run_id}.json").write_text("{}")
    assert [run.id for run in list_runs(tmp_path)] == ids[::-1]
    assert shorten_ids(list_runs(tmp_path)) == {ids[0]: "0123456789", ids[1]: "012345678f", ids[2]: "0123aa"}
    assert find_run(tmp_path, "0123a").id == ids[2]
    assert find_run(tmp_path, "last~2").id == ids[0]
    with pytest.raises(Exception, match="2 runs have an id that begins with '012345678': 012345678fff, 0123456789ab; give more"):
        find_run(tmp_path, "012345678")
    with pytest.raises(Exception, match="has an id that begins with 'ff'; see gradmap log"):
        find_run(tmp_path, "ff")


@pytest.fixture(scope="module")
def thousand(ran: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a thousand records."""
    store = tmp_path_factory.mktemp("thousand")
    record = read_run(list_runs(ran / ".gradmap")[-1])
    assert record is not None
    head = record.pop("head")
    (store / "runs").mkdir()
    for number in range(1000):
        run_id = f"{number:012x}"
        (store / "runs" / f"20260101T{number:012d}Z-{run_id}.json").write_text(dump_run({**head, "id": run_id}, record))
    return store


def test_a_thousand_runs_are_listed_at_once(thousand: Path) -> None:
    started = time.process_time()
    result = gradmap("log", "--store", thousand, "--limit", 0, "--json")
    assert time.process_time() - started < 0.3
    assert result.stdout.count("\n") == 1000
    for arguments in (["log"], ["show", "last~500"], ["diff", "last~999", "last"]):
        started = time.process_time()
        assert gradmap(*arguments, "--store", thousand).exit_code == 0
        assert time.process_time() - started < 0.3


@pytest.mark.parametrize("arguments", [["log"], ["diff", "last~1", "last"]])
def test_they_import_nothing_heavy(arguments: list[str], thousand: Path) -> None:
    code = "import sys; from gradmap_pipeline.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.__stderr__)"
    command = [sys.executable, "-c", code, *arguments, "--store", str(thousand)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "gradmap_pipeline.report.run_log" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "numpy", "pluggy", "huggingface_hub", "gradmap_pipeline.run.store"}
