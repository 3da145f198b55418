"""Nothing leaves the machine where everything is local."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_model, make_text

pytestmark = pytest.mark.full

GUARDED = """
import sys, runpy
def guard(event, arguments):
    if event == "socket.connect" and not isinstance(arguments[1], (str, bytes)) or event in (
        "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"
    ):
        import traceback
        with open("sent", "a") as file:
            print(event, arguments[1:] if event == "socket.connect" else arguments, file=file)
            traceback.print_stack(file=file)
        raise OSError(f"nothing may leave this machine: {event}")
sys.addaudithook(guard)
from gradmap_pipeline.cli import main
main()
"""
TASK = """\
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["a", "b"]
doc_to_target: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, as people start it: nothing says that it is offline."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_HOME": str(folder / "home"), "HF_ENDPOINT": "https://hub.invalid"}
    command = [sys.executable, "-c", GUARDED, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


def test_a_whole_recipe_of_local_things_sends_nothing(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    make_text(tmp_path / "text.txt")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"words {n} " * 20}) + "\n" for n in range(50)))
    sizes = {"samples": 4, "sequence_length": 32}
    steps = [
        {"use": "calibrate", "with": {"dataset": {"path": "text.txt"}, **sizes}},
        {"use": "gradmap_score"},
        {"use": "prune", "with": {"ratio": 0.25}},
        {"use": "project_compensate"},
        {"use": "evaluate", "with": {"dataset": {"path": "rows.jsonl"}, **sizes}},
        {"use": "evaluate", "id": "builtin", "with": {"dataset": {"builtin": "heldout"}, **sizes}},
        {"use": "export", "with": {"to": "out"}},
    ]
    (tmp_path / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": "model"}, "steps": steps}))
    for command in (["check", "r.yaml"], ["plan", "r.yaml"], ["run", "r.yaml"]):
        done = run(tmp_path, *command)
        assert not (tmp_path / "sent").exists(), (tmp_path / "sent").read_text()
        assert done.returncode == 0, done.stderr


def test_tasks_of_a_folder_send_nothing(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    make_model(tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "t.yaml").write_text(TASK)
    (tmp_path / "tasks" / "rows.jsonl").write_text("".join(json.dumps({"question": f"words {n}"}) + "\n" for n in range(5)))
    steps = [{"use": "evaluate_lm_eval", "with": {"tasks": ["mine"], "task_folder": "tasks"}}]
    (tmp_path / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": "model"}, "steps": steps}))
    done = run(tmp_path, "run", "r.yaml")
    assert not (tmp_path / "sent").exists(), (tmp_path / "sent").read_text()
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("attempt", ["getaddrinfo('hub.invalid', 443)", "create_connection(('127.0.0.1', 9))"])
def test_the_guard_sees_what_is_sent(attempt: str, tmp_path: Path) -> None:
    code = GUARDED.replace("from gradmap_pipeline.cli import main\nmain()", f"import socket\nsocket.{attempt}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "nothing may leave this machine" in done.stderr
    assert (tmp_path / "sent").exists()
